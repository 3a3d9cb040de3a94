//! What digests cost: their share of what a block costs at the shim and at the index.
//!
//! One engine's messages go through the shim's source and its frames through an index, on one thread and without sockets;
//! each part is timed by itself. Then the digests' operations for the very same blocks are timed alone. The share is
//! their cost over the cost of the part that they are in.

use std::hint::black_box;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvatlas_index::{Index, IndexLimits};
use kvatlas_proto::frame::{Change, FrameView};
use kvatlas_proto::{BlockKey, Digest, InstanceId, KeySeed};
use kvatlas_shim::source::{Source, SourceConfig};
use serde::Serialize;

use super::churn::ChurnEngine;
use super::rig::MODEL;
use super::{Case, CaseReport, Details, RecoveryError, rounded};
use crate::wire::{Batch, MapVersion, WireForm};

/// Blocks that the engine holds: a large GPU's cache.
const HELD_BLOCKS: usize = 100_000;
/// Blocks stored (and evicted) by one message: a busy engine's step.
const STEP_BLOCKS: usize = 100;
/// Messages of one round. Long beside the clock's resolution, short beside a pre-emption.
const ROUND_MESSAGES: usize = 200;
/// Rounds at least, however short the time: fewer have no meaningful median.
const MIN_ROUNDS: usize = 5;
/// Highest share that is allowed, percent.
const GOAL_PERCENT: f64 = 5.0;

/// What was measured. Times are medians over rounds, nanoseconds for one block stored and one evicted.
#[derive(Clone, Debug, Serialize)]
pub struct UpkeepDetails {
    /// Blocks stored (and as many evicted) while measuring.
    pub blocks: u64,
    /// The shim, from a raw message to frames.
    pub shim_ns_per_block: f64,
    /// The index, from a frame to its table.
    pub index_ns_per_block: f64,
    /// One side's digest.
    pub digest_ns_per_block: f64,
    /// Share of the shim's time, percent.
    pub shim_percent: f64,
    /// Share of the index's time, percent.
    pub index_percent: f64,
}

/// What a round cost in all, nanoseconds.
struct Round {
    shim: f64,
    index: f64,
    digest: f64,
}

struct Parts {
    engine: ChurnEngine,
    source: Source,
    index: Index,
    digest: Digest,
    next_seq: u64,
}

/// Runs the case for about this time.
pub(super) fn run(time: Duration) -> Result<CaseReport, RecoveryError> {
    let mut parts = Parts::new();
    while parts.engine.ledger().held() < HELD_BLOCKS {
        parts.round()?;
    }
    let (started, mut rounds) = (Instant::now(), Vec::new());
    while rounds.len() < MIN_ROUNDS || started.elapsed() < time {
        rounds.push(parts.round()?);
    }
    let blocks = (ROUND_MESSAGES * STEP_BLOCKS) as f64;
    let median = |of: fn(&Round) -> f64| {
        let mut all: Vec<f64> = rounds.iter().map(of).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2] / blocks
    };
    let (shim, index, digest) =
        (median(|round| round.shim), median(|round| round.index), median(|round| round.digest));
    let (shim_percent, index_percent) = (digest / shim * 100.0, digest / index * 100.0);
    Ok(CaseReport {
        case: Case::DigestUpkeep.name(),
        ok: shim_percent.max(index_percent) < GOAL_PERCENT,
        seconds_to_exact: None,
        false_positives: 0,
        bytes: 0,
        details: Details::Upkeep(UpkeepDetails {
            blocks: blocks as u64 * rounds.len() as u64,
            shim_ns_per_block: rounded(shim),
            index_ns_per_block: rounded(index),
            digest_ns_per_block: rounded(digest),
            shim_percent: rounded(shim_percent),
            index_percent: rounded(index_percent),
        }),
    })
}

// === impl Parts ===

impl Parts {
    fn new() -> Self {
        let instance = InstanceId::new("10.0.0.1:8000").expect("an address and a port");
        Self {
            engine: ChurnEngine::new(1, HELD_BLOCKS, 1),
            source: Source::new(SourceConfig::new(MODEL, instance), 1).expect("the names are valid"),
            index: Index::new(IndexLimits::default(), KeySeed::PUBLISHED),
            digest: Digest::default(),
            next_seq: 0,
        }
    }

    fn round(&mut self) -> Result<Round, RecoveryError> {
        let payloads: Vec<Vec<u8>> = (0..ROUND_MESSAGES as u64)
            .map(|step| {
                let events = self.engine.step(STEP_BLOCKS, self.next_seq + step);
                Batch { time_s: 0.0, events, rank: 0 }.encode(WireForm::Map(MapVersion::V0_33))
            })
            .collect();

        let (start, mut frames) = (Instant::now(), Vec::new());
        for payload in &payloads {
            self.source.live(self.next_seq, payload, false);
            self.next_seq += 1;
            let outgoing = self.source.take_frames(self.next_seq, false)?;
            frames.extend(outgoing.into_iter().map(|outgoing| outgoing.frame));
        }
        let shim = start.elapsed().as_nanos() as f64;

        let start = Instant::now();
        for frame in &frames {
            let view = FrameView::parse(frame)?;
            // Its bounds are far above one engine.
            black_box(self.index.apply(&view, frame, self.next_seq).is_ok());
        }
        let index = start.elapsed().as_nanos() as f64;

        let changes = changes_of(&frames)?;
        let start = Instant::now();
        for &(key, stored) in black_box(&changes) {
            if stored { self.digest.add(key) } else { self.digest.remove(key) }
        }
        black_box(self.digest);
        let digest = start.elapsed().as_nanos() as f64;
        Ok(Round { shim, index, digest })
    }
}

/// Every block that became visible (true) or invisible, in order.
fn changes_of(frames: &[Bytes]) -> Result<Vec<(BlockKey, bool)>, RecoveryError> {
    let mut changes = Vec::new();
    for frame in frames {
        for op in FrameView::parse(frame)?.ops() {
            match op.change {
                Change::Stored { keys, .. } => changes.extend(keys.iter().map(|key| (key, true))),
                Change::Removed(keys) => changes.extend(keys.iter().map(|key| (key, false))),
                Change::Cleared | Change::Bucket { .. } => {}
            }
        }
    }
    Ok(changes)
}

#[cfg(test)]
mod tests {
    use kvatlas_proto::ShardId;

    use super::*;

    #[test]
    fn the_three_parts_see_the_same_blocks() {
        let mut parts = Parts::new();
        for _ in 0..6 {
            parts.round().unwrap();
        }
        let sources = parts.index.sources(&kvatlas_index::OwnerFilter::default(), 0);
        let held = parts.engine.ledger().held() as u64;
        assert_eq!(held, HELD_BLOCKS as u64);
        assert_eq!((parts.digest, held), (sources[0].owners[0].digest, parts.digest.count));
        assert_eq!(parts.source.mirror().digests(ShardId::WHOLE), [parts.digest]);
    }
}
