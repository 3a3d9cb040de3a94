//! Any history of an engine, as messages with sequence numbers, reconnects and replays: what the source publishes is
//! always a valid, contiguous account of what its mirror holds, its digests are right, and whoever missed some of it is
//! made right by asking.
//!
//! ```text
//! input    = settings (1 byte), steps
//! settings = bit 0: the block size is given; bit 1: removals are of the last copy; bit 2: the engine can replay;
//!            bit 3: tiny bounds; bit 4: the key space is cut
//! step     = action (1 byte), payload length (u16, little-endian), payload
//! action   = bits 0-2: what the sequence does (see `Engine::perform`); bit 3: frames wait; bits 4-7: a small number
//! ```

#![no_main]

use std::collections::HashSet;

use bytes::Bytes;
use kvatlas_proto::digest::Buckets;
use kvatlas_proto::frame::{Change, FrameOwner, FramePart, FrameView};
use kvatlas_proto::request::{OwnerBuckets, Request, RequestId, Want};
use kvatlas_proto::{BlockKey, Digest, Epoch, InstanceId, Partition, ShardId};
use kvatlas_shim::mirror::{MirrorLimits, RemovalPolicy};
use kvatlas_shim::source::{Live, Source, SourceConfig};
use libfuzzer_sys::fuzz_target;

/// Block size where it is given, tokens.
const BLOCK_SIZE: u32 = 16;
/// Bounds that a short input reaches.
const TINY: MirrorLimits = MirrorLimits { hashes: 24, unresolved: 6, ghosts: 5, store_only_ttl_ns: 1_000 };
/// Shards where the key space is cut.
const SHARDS: u32 = 3;
/// Messages that the engine can replay.
const REPLAY_MESSAGES: usize = 16;

fuzz_target!(|input: &[u8]| {
    let Some((&settings, mut rest)) = input.split_first() else { return };
    let mut engine = Engine::new(settings);
    while let [action, low, high, tail @ ..] = rest {
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(tail.len());
        let (payload, tail) = tail.split_at(length);
        engine.perform(*action, payload);
        rest = tail;
    }
    engine.flush();
});

/// The engine's side of a source, and a reader of what it publishes.
struct Engine {
    source: Source,
    /// By shard.
    readers: Vec<Reader>,
    unresolved_max: usize,
    next_seq: u64,
    sent: Vec<(u64, Bytes)>,
    now_ns: u64,
}

/// A naive index of one shard.
struct Reader {
    shard: ShardId,
    epoch: u64,
    next: u64,
    owners: Vec<FrameOwner>,
    held: Vec<HashSet<u64>>,
    /// What is held is not what the source holds.
    stale: bool,
}

// === impl Engine ===

impl Engine {
    fn new(settings: u8) -> Self {
        let limits = if settings & 8 == 0 { MirrorLimits::default() } else { TINY };
        let shards = if settings & 16 == 0 { 1 } else { SHARDS };
        let partition = Partition::new(shards).expect("a few shards");
        let instance = InstanceId::new("a:1").expect("a plain name");
        let config = SourceConfig {
            block_size: (settings & 1 != 0).then_some(BLOCK_SIZE),
            removal: if settings & 2 == 0 { RemovalPolicy::PerCopy } else { RemovalPolicy::LastCopy },
            partition,
            limits,
            has_replay: settings & 4 != 0,
            ..SourceConfig::new("m", instance)
        };
        Self {
            source: Source::new(config, 1).expect("the names are valid"),
            readers: partition.all().map(Reader::new).collect(),
            unresolved_max: limits.unresolved,
            next_seq: 0,
            sent: Vec::new(),
            now_ns: 1,
        }
    }

    fn perform(&mut self, action: u8, payload: &[u8]) {
        let number = u64::from(action >> 4);
        let seq = match action & 7 {
            0 => self.next_seq,
            // A message is repeated, or the engine restarted.
            1 => self.next_seq.saturating_sub(1 + number),
            // Messages are missing.
            2 => self.next_seq.saturating_add(1 + number),
            // The engine restarted.
            3 => number,
            // The end of all sequences.
            4 => u64::MAX - number,
            // The connection was lost.
            5 => {
                if let Some(from) = self.source.connected() {
                    self.replay(from, number);
                }
                self.next_seq
            }
            // What was published may not be all, or somebody missed it.
            6 if number & 1 == 0 => {
                self.source.new_epoch();
                self.next_seq
            }
            6 => {
                self.readers.iter_mut().for_each(|reader| reader.forget(number));
                self.next_seq
            }
            // The clock is set.
            _ => {
                self.now_ns = number;
                self.next_seq
            }
        };
        self.next_seq = seq.saturating_add(1);
        if let Live::Replay { from } = self.source.live(seq, payload, false) {
            self.replay(from, number);
            assert_eq!(self.source.live(seq, payload, true), Live::Done, "a gap is asked for once");
        }
        if self.sent.len() == REPLAY_MESSAGES {
            self.sent.remove(0);
        }
        self.sent.push((seq, Bytes::copy_from_slice(payload)));
        assert!(self.source.mirror().unresolved_hashes() <= self.unresolved_max);
        if action & 8 == 0 {
            self.flush();
        }
    }

    /// The engine's answer: some of what it sent, or nothing.
    fn replay(&mut self, from: u64, number: u64) {
        let skipped = number as usize % (self.sent.len() + 1);
        let answer: Vec<_> = self.sent[skipped..].iter().filter(|(seq, _)| *seq >= from).cloned().collect();
        self.source.replayed(from, &answer);
    }

    fn flush(&mut self) {
        self.now_ns += 1;
        let frames = self.source.take_frames(self.now_ns, true).expect("frames are split to fit");
        for outgoing in frames {
            self.readers[usize::from(outgoing.shard.number())].read(&outgoing.frame);
        }
        for reader in self.readers.iter_mut().filter(|reader| reader.stale) {
            let answer = self.source.answer(&reader.request()).expect("answers are split to fit");
            answer.iter().for_each(|frame| reader.repair(frame));
            assert!(!reader.stale || self.source.scope().is_none(), "an answer makes a reader right");
        }
        if self.source.scope().is_some() {
            assert!(!self.readers.iter().any(|reader| reader.stale));
            let held: usize = self.readers.iter().flat_map(|reader| &reader.held).map(HashSet::len).sum();
            assert_eq!(held as u64, self.source.mirror().visible_blocks());
        }
    }
}

// === impl Reader ===

impl Reader {
    fn new(shard: ShardId) -> Self {
        Self { shard, epoch: 0, next: 0, owners: Vec::new(), held: Vec::new(), stale: false }
    }

    fn read(&mut self, frame: &[u8]) {
        let view = FrameView::parse(frame).expect("what the source publishes is a frame");
        let header = view.header();
        assert_eq!(header.shard, self.shard, "a frame travels in its own shard");
        if header.epoch.0 != self.epoch {
            assert!(header.epoch.0 > self.epoch, "epochs only grow");
            assert_eq!(header.part, FramePart::Start, "an epoch begins with its start");
            self.rename(&header.owners);
            (self.epoch, self.next) = (header.epoch.0, 0);
        }
        assert_eq!(header.seq.0, self.next, "frames are contiguous");
        self.next += 1;
        self.learn_owners(&header.owners);
        if header.part == FramePart::Start {
            self.stale = !self.equals(&header.digests);
        }
        if self.stale {
            return;
        }
        self.apply(&view);
        assert!(header.digests.is_empty() || self.equals(&header.digests), "digests are those of the mirror");
    }

    /// What differs from what is held, please.
    fn request(&self) -> Request {
        let owners = self.owners.iter().zip(&self.held).map(|(owner, held)| OwnerBuckets {
            tier: owner.tier,
            medium: owner.medium.clone(),
            group: owner.group,
            buckets: Buckets::of(Buckets::bits_for(held.len() as u64), held.iter().map(|key| BlockKey(*key))),
        });
        let want = Want::State(owners.collect());
        Request { id: RequestId(1), epoch: Epoch(self.epoch), shard: self.shard, want }
    }

    fn repair(&mut self, frame: &[u8]) {
        let view = FrameView::parse(frame).expect("an answer is of frames");
        let reply = view.header().reply.expect("an answer says what it answers");
        assert_eq!(view.header().shard, self.shard, "an answer is about the shard that was asked about");
        assert_eq!(view.header().seq.0 + 1, self.next, "an answer is of the last published frame");
        self.learn_owners(&view.header().owners);
        self.apply(&view);
        if reply.piece + 1 == reply.pieces {
            self.stale = !self.equals(&view.header().digests);
        }
    }

    /// Loses some blocks, and takes some for held that are not.
    fn forget(&mut self, number: u64) {
        for held in &mut self.held {
            held.retain(|key| key % (number + 1) != 0);
            held.extend((0..number).filter(|n| n % 4 == 1));
        }
        self.stale = true;
    }

    fn apply(&mut self, view: &FrameView<'_>) {
        let bits: Vec<u8> = self.held.iter().map(|held| Buckets::bits_for(held.len() as u64)).collect();
        for op in view.ops() {
            let held = &mut self.held[op.owner];
            match op.change {
                Change::Stored { keys, .. } => {
                    for key in keys.iter() {
                        assert!(held.insert(key.0), "a visible block is not stored again");
                    }
                }
                Change::Removed(keys) => {
                    for key in keys.iter() {
                        assert!(held.remove(&key.0), "only a visible block is removed");
                    }
                }
                Change::Cleared => held.clear(),
                Change::Bucket { slice, blocks } => {
                    held.retain(|key| Buckets::slice(bits[op.owner], BlockKey(*key)) != slice);
                    held.extend(blocks.iter().map(|(_, key)| key.0));
                }
            }
        }
    }

    fn equals(&self, digests: &[Digest]) -> bool {
        let digest = |held: &HashSet<u64>| Digest::of(held.iter().map(|key| BlockKey(*key)));
        self.held.iter().map(digest).eq(digests.iter().copied())
    }

    /// Owners have other places in another epoch; those that are gone hold nothing.
    fn rename(&mut self, owners: &[FrameOwner]) {
        let name = |owner: &FrameOwner| (owner.tier, owner.medium.clone(), owner.group);
        let old: Vec<_> = self.owners.iter().map(name).zip(std::mem::take(&mut self.held)).collect();
        let held_of =
            |owner: &FrameOwner| old.iter().find(|(known, _)| *known == name(owner)).map(|(_, held)| held);
        self.held = owners.iter().map(|owner| held_of(owner).cloned().unwrap_or_default()).collect();
        self.owners = owners.to_vec();
    }

    fn learn_owners(&mut self, owners: &[FrameOwner]) {
        let names: Vec<_> =
            owners.iter().map(|owner| (owner.tier, owner.medium.as_str(), owner.group)).collect();
        let known = self.owners.iter().map(|owner| (owner.tier, owner.medium.as_str(), owner.group));
        assert!(known.eq(names.iter().take(self.owners.len()).copied()), "owners keep their places");
        assert_eq!(HashSet::<_>::from_iter(&names).len(), names.len(), "an index tells owners apart");
        self.owners = owners.to_vec();
        self.held.resize_with(owners.len(), HashSet::new);
    }
}
