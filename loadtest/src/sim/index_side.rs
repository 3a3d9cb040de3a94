//! A simulated index process: what the shell around [`Index`] does with the bus, timers and its checkpoint, in virtual
//! time. The index and its checkpoint are the real ones.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Cursor;

use bytes::Bytes;
use kvatlas_index::sources::{DegradedReason, SourceState};
use kvatlas_index::{Applied, Index, IndexLimits, LimitReached, RecoveryLimits};
use kvatlas_proto::ShardId;
use kvatlas_proto::frame::FrameView;
use kvatlas_proto::keys::KeySeed;
use kvatlas_proto::request::Want;

use super::bus::Kind;
use super::disk::Disk;
use super::op::{DiskFault, Process};
use super::rng::Rng;
use super::world::{Event, World};

/// Time between two looks at what has to be asked, microseconds.
const POLL_US: u64 = 15_000;
/// Time between two looks at the leases, microseconds.
const TICK_US: u64 = 1_000_000;
/// Time between two checkpoints, microseconds. Shorter than the shell's, so that simulations have some.
const SAVE_US: u64 = 2_000_000;
/// Messages between two comparisons of scores with what is held, and as many more for each further shard: they cost more than
/// all other checks.
const SCORE_EVERY: u64 = 32;

/// Buffers of worlds with small ones: three frames wait, answers are applied piece by piece, one at a time.
const SMALL_BUFFERS: RecoveryLimits =
    RecoveryLimits { held_frames: 3, held_bytes: 2_048, staged_bytes: 300, transfers: 1 };

/// One index process, alive or dead.
#[derive(Default)]
pub(super) struct IndexProcess {
    index: Option<Index>,
    pub(super) life: u32,
    pub(super) stalled_until_us: u64,
    disk: Disk,
    messages: u64,
    /// What it is to own; configuration, so it outlives the process.
    pub(super) wanted: BTreeSet<ShardId>,
    /// What it owns, that is, whose events it is subscribed to, and since when.
    pub(super) owned: BTreeMap<ShardId, u64>,
    /// When that changed last.
    pub(super) owned_since_us: u64,
    /// It has not said yet that everything of that is found out.
    pub(super) finding_out: bool,
    /// The newest epoch heard from each shim in each shard in this life.
    pub(super) heard: BTreeMap<(usize, ShardId), u64>,
}

// === impl IndexProcess ===

impl IndexProcess {
    pub(super) fn lives(&self, life: u32) -> bool {
        self.is_up() && self.life == life
    }

    /// True if it is dead and this life is the next one.
    pub(super) fn awaits(&self, life: u32) -> bool {
        !self.is_up() && self.life == life
    }

    pub(super) fn is_up(&self) -> bool {
        self.index.is_some()
    }

    pub(super) fn index(&self) -> Option<&Index> {
        self.index.as_ref()
    }

    /// Whether it is up and gets the events of a shard.
    pub(super) fn owns(&self, shard: ShardId) -> bool {
        self.is_up() && self.owned.contains_key(&shard)
    }

    /// Kills the process. Returns the number of its next life, or `None` if it was dead.
    pub(super) fn kill(&mut self, fault: DiskFault, rng: &mut Rng) -> Option<u32> {
        self.index.take()?;
        let (mut disk, life) = (std::mem::take(&mut self.disk), self.life + 1);
        disk.fail(fault, rng);
        *self = Self { life, disk, wanted: std::mem::take(&mut self.wanted), ..Self::default() };
        Some(life)
    }
}

// === impl World: indexes ===

impl World {
    /// The clock of an index: it does not go back.
    pub(super) fn now_ms(&self) -> u64 {
        self.now_us / 1_000
    }

    pub(super) fn start_index(&mut self, number: usize) {
        let recovery = if self.small_buffers { SMALL_BUFFERS } else { RecoveryLimits::default() };
        let limits = IndexLimits { recovery, ..IndexLimits::default() };
        let index = Index::cut(limits, KeySeed::PUBLISHED, self.partition);
        let process = &mut self.indexes[number];
        process.owned = process.wanted.iter().map(|shard| (*shard, self.now_us)).collect();
        index.own(&process.owned.keys().copied().collect::<Vec<_>>());
        self.restore_index(number, &index);
        let process = &mut self.indexes[number];
        process.index = Some(index);
        let life = process.life;
        self.log.line(self.now_us, format_args!("index {number} starts"));
        self.begins_to_find_out(number);
        self.after(POLL_US, Event::Poll { index: number, life });
        self.after(TICK_US, Event::Tick { index: number, life });
        if self.files {
            let first_us = self.between((1_000, SAVE_US));
            self.after(first_us, Event::Save { process: Process::Index(number), life });
        }
    }

    /// Reads the checkpoint, if there is one that can be used.
    fn restore_index(&mut self, number: usize, index: &Index) {
        let Some(bytes) = self.indexes[number].disk.read() else { return };
        let restored = index.restore(bytes, self.now_ms());
        let line = match &restored {
            Ok(size) => format!("loads {} blocks", size.blocks),
            Err(error) => format!("refuses its checkpoint: {error}"),
        };
        self.counts.files_loaded += u64::from(restored.is_ok());
        self.counts.files_refused += u64::from(restored.is_err());
        self.log.line(self.now_us, format_args!("index {number} {line}"));
    }

    pub(super) fn save_index(&mut self, number: usize) {
        let life = self.indexes[number].life;
        self.after(SAVE_US, Event::Save { process: Process::Index(number), life });
        let Some(index) = &self.indexes[number].index else { return };
        match index.write_checkpoint(Cursor::new(Vec::new())) {
            Ok((bytes, size)) => {
                // Its blocks are in no particular order, so its bytes are not the same in every process.
                self.log.line(
                    self.now_us,
                    format_args!("index {number} saves {} blocks in {} bytes", size.blocks, size.bytes),
                );
                self.indexes[number].disk.write(bytes.into_inner());
            }
            Err(error) => self.fail("checkpoints can be written", error.to_string()),
        }
    }

    pub(super) fn on_index_message(&mut self, number: usize, shim: usize, kind: Kind, payload: &Bytes) {
        let now_ms = self.now_ms();
        let Some(index) = &self.indexes[number].index else { return };
        let Ok(frame) = FrameView::parse(payload) else {
            self.counts.damaged += 1;
            return;
        };
        let header = frame.header();
        let (epoch, seq, shard) = (header.epoch.0, header.seq.0, header.shard);
        let applied = match kind {
            Kind::Event(_) => match index.apply(&frame, payload, now_ms) {
                Ok(applied) => Some(applied),
                // It was on its way when the shard was given up.
                Err(LimitReached::Shard { .. }) if !index.owns(shard) => None,
                Err(error) => return self.fail("a small index reaches no bound", error.to_string()),
            },
            _ => index.on_reply(&frame, payload, now_ms),
        };
        let part = header.part;
        drop(frame);
        if !index.owns(shard) {
            if applied.is_some() {
                self.fail("what is not owned is refused", format!("index {number} took a frame of {shard}"));
            }
            return;
        }
        if let Some(applied) = applied {
            self.log.line(
                self.now_us,
                format_args!(
                    "index {number} takes {part:?} {epoch}.{seq} of shim {shim} in {shard}: {:?} {:?}",
                    applied.verdict, applied.after
                ),
            );
            self.count(&applied);
        }
        let process = &mut self.indexes[number];
        process.messages += 1;
        let heard = process.heard.entry((shim, shard)).or_default();
        *heard = epoch.max(*heard);
        let scores = process.messages.is_multiple_of(SCORE_EVERY * u64::from(self.partition.shards()));
        self.check_source(number, shim, shard);
        if scores {
            self.check_scores(number);
        }
        self.ask(number);
    }

    fn count(&mut self, applied: &Applied) {
        let lost = SourceState::Degraded(DegradedReason::FramesLost);
        let diverged = SourceState::Degraded(DegradedReason::Diverged);
        let became = |state| applied.after == state && applied.before != Some(state);
        self.counts.gaps += u64::from(became(lost));
        self.counts.divergences += u64::from(became(diverged));
        let mut repaired = |kind, by| *self.counts.repairs.entry(kind).or_default() += by;
        if applied.before == Some(SourceState::Syncing) && applied.compared == Some(true) {
            repaired("proved_without_transfer", 1);
        }
        if applied.before == Some(lost) && !applied.has_gap && applied.transferred.is_none() {
            repaired("frames_sent_again", 1);
        }
        if applied.transferred == Some(true) {
            repaired("state_transferred", 1);
        }
        if applied.transferred == Some(false) {
            repaired("state_transferred_and_not_equal", 1);
        }
    }

    pub(super) fn on_poll(&mut self, number: usize) {
        let life = self.indexes[number].life;
        self.after(POLL_US, Event::Poll { index: number, life });
        self.ask(number);
        if self.indexes[number].finding_out {
            self.look_found_out(number);
        }
    }

    /// Sends what the index wants to ask.
    fn ask(&mut self, number: usize) {
        let now_ms = self.now_ms();
        let Some(index) = &self.indexes[number].index else { return };
        if !index.is_troubled() {
            return;
        }
        for (source, request) in index.poll(now_ms) {
            let Some(shim) =
                (0..self.shims.len()).find(|shim| super::name(*shim) == source.instance.as_str())
            else {
                return self.fail("only publishers are asked", source.to_string());
            };
            if !self.indexes[number].owned.contains_key(&request.shard) {
                return self.fail("only what is owned is asked about", format!("{request:?}"));
            }
            let kind = match &request.want {
                Want::Frames(_) => "asked_for_frames",
                Want::State(_) => "asked_for_state",
            };
            *self.counts.repairs.entry(kind).or_default() += 1;
            self.log.line(self.now_us, format_args!("index {number} asks shim {shim}: {request:?}"));
            match request.encode() {
                Ok(bytes) => self.send_to_shim(number, shim, Kind::Request, &bytes.into()),
                Err(error) => return self.fail("requests can be encoded", error.to_string()),
            }
        }
    }

    pub(super) fn on_tick(&mut self, number: usize) {
        let now_ms = self.now_ms();
        let life = self.indexes[number].life;
        self.after(TICK_US, Event::Tick { index: number, life });
        let Some(index) = &self.indexes[number].index else { return };
        for expired in index.tick(now_ms) {
            self.log
                .line(self.now_us, format_args!("index {number}: {} {:?}", expired.source, expired.expiry));
        }
        let owned: Vec<ShardId> = self.indexes[number].owned.keys().copied().collect();
        for shim in 0..self.shims.len() {
            owned.iter().for_each(|shard| self.check_source(number, shim, *shard));
        }
        self.look_found_out(number);
        self.check_scores(number);
        self.ask(number);
    }

    /// Sends over the bus, as it is now.
    pub(super) fn send_to_shim(&mut self, index: usize, shim: usize, kind: Kind, payload: &Bytes) {
        let fingerprint = xxhash_rust::xxh3::xxh3_64(payload);
        let deliveries = self.bus.send((shim, index), kind, payload, self.now_us);
        self.log.line(
            self.now_us,
            format_args!(
                "index {index} -> shim {shim} {kind:?} {} bytes {fingerprint:016x} x{}",
                payload.len(),
                deliveries.len()
            ),
        );
        if !self.shims[shim].is_up() {
            return;
        }
        let life = self.shims[shim].life;
        for delivery in deliveries {
            let payload = delivery.payload;
            self.at(delivery.at_us, Event::ToShim { shim, life, index, kind, payload });
        }
    }
}
