//! The shim's benchmark: from an engine's raw payload to encoded frames, on one thread.
//!
//! The engine is in its steady state: sequences grow in turns, every message stores one event and first evicts as many
//! blocks as it needs, tail first and oldest sequence first, as vLLM's pool does. The timeline is periodic, so its
//! payloads are built once and played for as long as a measurement wants, and no block is stored twice or removed
//! unheld. A period is longer than the mirror's memory of removed blocks, so that every block is new to it.
//!
//! Pure: the caller takes the time around [`ShimBench::play`]. Sockets are deliberately absent: they are not the shim's.

use std::collections::VecDeque;

use bytes::Bytes;
use kvatlas_proto::InstanceId;
use kvatlas_proto::frame::EncodeFrameError;
use kvatlas_shim::mirror::RemovalPolicy;
use kvatlas_shim::source::{Source, SourceConfig};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::wire::{Batch, BlockRemoved, BlockStored, EngineHash, Event, MapVersion, WireForm};

/// Blocks that the engine holds in its steady state: 1.6 million tokens, a large GPU's cache.
pub const HELD_BLOCKS: usize = 100_000;
/// Tokens per block, vLLM's default.
pub const BLOCK_TOKENS: u32 = 16;
/// Blocks of a whole sequence: 2,048 tokens. Also the most that one event can store.
pub const SEQUENCE_BLOCKS: u32 = 128;
/// Sequences that grow at the same time, one event each in turn.
const RUNNING_SEQUENCES: u32 = 32;
/// Sequences of a period. Together they have more blocks than are held and remembered as removed (131,072).
const SEQUENCES: u32 = 2_048;
/// Size of the vocabulary.
const VOCABULARY: u64 = 128_000;
/// Messages between two flushes. The shim flushes by time, every 2 ms; at any rate measured here that is more messages,
/// so this counts more frames than there would be.
const FLUSH_MESSAGES: u64 = 64;

/// A source in its steady state, and the messages that keep it there.
pub struct ShimBench {
    source: Source,
    /// One period of payloads.
    period: Vec<Bytes>,
    next_seq: u64,
    unflushed: u64,
}

/// What a stretch of messages amounted to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShimWork {
    /// Stored events: one per message.
    pub events: u64,
    /// Blocks stored (and as many evicted).
    pub blocks: u64,
    /// Bytes of the frames published.
    pub frame_bytes: u64,
}

/// Why the benchmark cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ShimBenchError {
    /// An event of no blocks, or of more than a sequence has.
    #[error("{0} blocks per event; choose 1 to {SEQUENCE_BLOCKS}")]
    EventBlocks(u32),
    /// A frame could not be encoded.
    #[error(transparent)]
    Frame(#[from] EncodeFrameError),
}

/// The engine: what it stores next, and what it evicts for that.
struct Timeline {
    event_blocks: u32,
    /// The running sequences are this one and those after it.
    first_sequence: u32,
    /// Whose turn it is, counted from the first.
    turn: u32,
    /// Blocks that each running sequence has.
    grown: u32,
    /// Finished sequences' blocks in the order of eviction.
    evictable: VecDeque<(u32, u32)>,
    held: usize,
}

// === impl ShimBench ===

impl ShimBench {
    /// Fills a source to its steady state and builds one period of messages of `event_blocks` stored blocks each.
    pub fn new(event_blocks: u32) -> Result<Self, ShimBenchError> {
        if !(1..=SEQUENCE_BLOCKS).contains(&event_blocks) {
            return Err(ShimBenchError::EventBlocks(event_blocks));
        }
        let config = SourceConfig {
            removal: RemovalPolicy::default(),
            has_replay: true,
            ..SourceConfig::new("benchmark", InstanceId::new("127.0.0.1:8000").expect("a plain address"))
        };
        let source = Source::new(config, 1).expect("the names are valid");
        let mut bench = Self { source, period: Vec::new(), next_seq: 0, unflushed: 0 };
        let mut timeline = Timeline::new(event_blocks);
        let mut work = ShimWork::default();
        for _ in 0..Self::period_messages(event_blocks) {
            bench.offer(&timeline.next_message(), &mut work)?;
        }
        bench.period = (0..Self::period_messages(event_blocks)).map(|_| timeline.next_message()).collect();
        Ok(bench)
    }

    /// Plays the next `messages` messages and publishes what they changed.
    pub fn play(&mut self, messages: u64) -> Result<ShimWork, ShimBenchError> {
        let mut work = ShimWork::default();
        for _ in 0..messages {
            let payload = self.period[(self.next_seq % self.period.len() as u64) as usize].clone();
            self.offer(&payload, &mut work)?;
        }
        self.flush(&mut work)?;
        Ok(work)
    }

    /// The source, to see what the messages made of it.
    pub fn source(&self) -> &Source {
        &self.source
    }

    fn period_messages(event_blocks: u32) -> u64 {
        u64::from(SEQUENCES * SEQUENCE_BLOCKS.div_ceil(event_blocks))
    }

    fn offer(&mut self, payload: &[u8], work: &mut ShimWork) -> Result<(), ShimBenchError> {
        let before = self.source.mirror_counts().stored;
        self.source.live(self.next_seq, payload, false);
        self.next_seq += 1;
        self.unflushed += 1;
        work.events += 1;
        work.blocks += self.source.mirror_counts().stored - before;
        if self.unflushed >= FLUSH_MESSAGES || self.source.wants_flush() {
            self.flush(work)?;
        }
        Ok(())
    }

    fn flush(&mut self, work: &mut ShimWork) -> Result<(), ShimBenchError> {
        self.unflushed = 0;
        if self.source.has_frames() {
            let frames = self.source.take_frames(self.next_seq, false)?;
            work.frame_bytes += frames.iter().map(|outgoing| outgoing.frame.len() as u64).sum::<u64>();
        }
        Ok(())
    }
}

// === impl Timeline ===

impl Timeline {
    fn new(event_blocks: u32) -> Self {
        Self { event_blocks, first_sequence: 0, turn: 0, grown: 0, evictable: VecDeque::new(), held: 0 }
    }

    /// The engine's next step as it publishes it. Repeats after a period, once the cache is full.
    fn next_message(&mut self) -> Bytes {
        let sequence = self.first_sequence + self.turn;
        let blocks = self.grown..SEQUENCE_BLOCKS.min(self.grown + self.event_blocks);
        let mut events = Vec::new();
        self.held += blocks.len();
        while self.held > HELD_BLOCKS {
            let (sequence, block) =
                self.evictable.pop_front().expect("running sequences are few beside the cache");
            self.held -= 1;
            events.push(Event::Removed(BlockRemoved {
                block_hashes: vec![hash(sequence, block)],
                medium: Some("GPU".to_owned()),
                group_idx: Some(0),
                ..Default::default()
            }));
        }
        events.push(Event::Stored(BlockStored {
            block_hashes: blocks.clone().map(|block| hash(sequence, block)).collect(),
            parent_block_hash: blocks.start.checked_sub(1).map(|block| hash(sequence, block)),
            token_ids: (blocks.start * BLOCK_TOKENS..blocks.end * BLOCK_TOKENS)
                .map(|position| (mixed(sequence, position, 1) % VOCABULARY) as u32)
                .collect(),
            block_size: BLOCK_TOKENS,
            medium: Some("GPU".to_owned()),
            extra_keys: Some(vec![None; blocks.len()]),
            group_idx: Some(0),
            kv_cache_spec_kind: Some("full_attention".to_owned()),
            ..Default::default()
        }));
        self.turn += 1;
        if self.turn == RUNNING_SEQUENCES {
            self.turn = 0;
            self.grown = blocks.end;
            if self.grown == SEQUENCE_BLOCKS {
                self.finish();
            }
        }
        let time_s = 1_795_168_931.5;
        Bytes::from(Batch { time_s, events, rank: 0 }.encode(WireForm::Map(MapVersion::V0_33)))
    }

    /// The running sequences end: their blocks become evictable, tails first.
    fn finish(&mut self) {
        for sequence in self.first_sequence..self.first_sequence + RUNNING_SEQUENCES {
            self.evictable.extend((0..SEQUENCE_BLOCKS).rev().map(|block| (sequence, block)));
        }
        self.first_sequence = (self.first_sequence + RUNNING_SEQUENCES) % SEQUENCES;
        self.grown = 0;
    }
}

fn hash(sequence: u32, block: u32) -> EngineHash {
    EngineHash::Int(mixed(sequence, block, 0))
}

fn mixed(sequence: u32, position: u32, seed: u64) -> u64 {
    xxh3_64_with_seed(&(u64::from(sequence) << 32 | u64::from(position)).to_le_bytes(), seed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workload_is_steady_over_periods_and_every_block_in_it_is_new() {
        for event_blocks in [1, 32, 100] {
            let mut bench = ShimBench::new(event_blocks).unwrap();
            let before = bench.source().mirror_counts();
            for _ in 0..2 {
                let work = bench.play(ShimBench::period_messages(event_blocks)).unwrap();
                assert_eq!(work.blocks, u64::from(SEQUENCES * SEQUENCE_BLOCKS));
                assert_eq!(bench.source().mirror().visible_blocks(), HELD_BLOCKS as u64);
                // Eight bytes for a stored key and eight for a removed one, and little else.
                assert!(work.frame_bytes >= 16 * work.blocks && work.frame_bytes < 64 * work.blocks);
            }
            let (counts, source) = (bench.source().mirror_counts(), bench.source().counts());
            assert_eq!(counts.removed - before.removed, counts.stored - before.stored);
            assert_eq!((counts.unknown_removals, counts.unresolved, counts.over_limit), (0, 0, 0));
            assert_eq!((source.undecodable.len(), source.gaps, source.restarts), (0, 0, 0));
        }
    }

    #[test]
    fn events_that_no_sequence_can_hold_are_refused() {
        for blocks in [0, SEQUENCE_BLOCKS + 1] {
            assert!(matches!(ShimBench::new(blocks), Err(ShimBenchError::EventBlocks(_))));
        }
    }
}
