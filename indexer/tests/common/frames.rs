//! A publisher in miniature: builds frames with contiguous sequences, and answers questions about them from plain sets. Used
//! by unit and integration tests.

use std::collections::BTreeMap;

use bytes::Bytes;
use kvatlas_proto::digest::Buckets;
use kvatlas_proto::frame::{FrameHeader, FrameOwner, FramePart, OpBuffer, ReplyPart, SourceHealth};
use kvatlas_proto::keys::KeyVariant;
use kvatlas_proto::request::{OwnerBuckets, Request, Want};
use kvatlas_proto::{
    BlockKey, CacheGroup, Digest, DpRank, Epoch, FrameSeq, GroupKind, InstanceId, KeyHasher, Scope, ShardId,
    SourceId, Tier,
};

/// One source; `header` may be changed between frames.
pub struct Publisher {
    pub header: FrameHeader,
    /// By owner: key to parent.
    pub held: Vec<BTreeMap<u64, u64>>,
    /// The frames of this epoch, as far as they can be sent again.
    pub sent: BTreeMap<u64, Bytes>,
    /// Blocks in one piece of an answer.
    pub piece_blocks: usize,
    /// The key before every prompt's first one.
    pub root: u64,
}

/// One operation on the owner with this position in the header.
#[derive(Clone, Debug)]
pub enum Op {
    /// Consecutive blocks from a prompt's first one.
    Stored(u8, Vec<u64>),
    /// Consecutive blocks after this one.
    StoredAfter(u8, u64, Vec<u64>),
    Removed(u8, Vec<u64>),
    Cleared(u8),
}

pub fn owner(tier: Tier, group: u16, kind: GroupKind) -> FrameOwner {
    let medium = match tier {
        Tier::Ssd => "STORAGE".to_owned(),
        Tier::Unknown => "CXL".to_owned(),
        known => known.name().to_uppercase(),
    };
    FrameOwner { tier, medium, group: CacheGroup(group), kind, load_blocks: 1 }
}

impl Publisher {
    /// Rank 0 of `instance`, epoch 1, blocks of 16 tokens of `model` on the GPU (owner 0), the CPU (owner 1), disk
    /// (owner 2).
    pub fn new(model: &str, instance: &str) -> Self {
        let full = |tier| owner(tier, 0, GroupKind::Full);
        Self {
            header: FrameHeader {
                scope: Scope::new(model, "", 16, 1).unwrap(),
                source: SourceId { instance: InstanceId::new(instance).unwrap(), rank: DpRank(0) },
                shard: ShardId::WHOLE,
                variant: KeyVariant::default(),
                epoch: Epoch(1),
                seq: FrameSeq(0),
                part: FramePart::Live,
                health: SourceHealth::Exact,
                engine_time_ns: 0,
                owners: vec![full(Tier::Gpu), full(Tier::Cpu), full(Tier::Ssd)],
                digests: Vec::new(),
                reply: None,
            },
            held: Vec::new(),
            sent: BTreeMap::new(),
            piece_blocks: 1_000,
            root: KeyHasher::default().root().0,
        }
    }

    pub fn scope(mut self, tenant: &str, block_size: u32) -> Self {
        self.header.scope = Scope::new(self.header.scope.model(), tenant, block_size, 1).unwrap();
        self
    }

    pub fn rank(mut self, rank: u32) -> Self {
        self.header.source.rank = DpRank(rank);
        self
    }

    pub fn owners(mut self, owners: Vec<FrameOwner>) -> Self {
        self.header.owners = owners;
        self
    }

    /// A new life that holds nothing.
    pub fn epoch(&mut self, epoch: u64) -> &mut Self {
        self.header.epoch = Epoch(epoch);
        self.header.seq = FrameSeq(0);
        self.held.clear();
        self.sent.clear();
        self
    }

    /// The next frame, encoded.
    pub fn frame(&mut self, ops: &[Op]) -> Vec<u8> {
        self.held.resize(self.header.owners.len(), BTreeMap::new());
        let mut buffer = OpBuffer::default();
        for op in ops {
            match op {
                Op::Stored(owner, keys) => self.store(&mut buffer, *owner, self.root, keys),
                Op::StoredAfter(owner, parent, keys) => self.store(&mut buffer, *owner, *parent, keys),
                Op::Removed(owner, keys) => {
                    for key in keys {
                        buffer.removed(*owner, BlockKey(*key));
                        self.held[usize::from(*owner)].remove(key);
                    }
                }
                Op::Cleared(owner) => {
                    buffer.cleared(*owner);
                    self.held[usize::from(*owner)].clear();
                }
            }
        }
        self.encode(&mut buffer)
    }

    fn store(&mut self, buffer: &mut OpBuffer, owner: u8, mut parent: u64, keys: &[u64]) {
        for key in keys {
            buffer.stored(owner, BlockKey(parent), BlockKey(*key));
            self.held[usize::from(owner)].insert(*key, parent);
            parent = *key;
        }
    }

    /// A sign of life that says what is held.
    pub fn heartbeat(&mut self) -> Vec<u8> {
        self.header.digests = self.digests();
        let bytes = self.encode(&mut OpBuffer::default());
        self.header.digests.clear();
        bytes
    }

    /// The first frame of a new life that holds what the last one held.
    pub fn start(&mut self, epoch: u64) -> Vec<u8> {
        let held = std::mem::take(&mut self.held);
        self.epoch(epoch).held = held;
        self.header.part = FramePart::Start;
        let bytes = self.heartbeat();
        self.header.part = FramePart::Live;
        bytes
    }

    fn encode(&mut self, buffer: &mut OpBuffer) -> Vec<u8> {
        let bytes = self.header.encode(buffer).unwrap();
        self.sent.insert(self.header.seq.0, Bytes::from(bytes.clone()));
        self.header.seq = self.header.seq.next();
        bytes
    }

    fn digests(&mut self) -> Vec<Digest> {
        self.held.resize(self.header.owners.len(), BTreeMap::new());
        self.held.iter().map(|held| Digest::of(held.keys().map(|key| BlockKey(*key)))).collect()
    }

    /// What a publisher says to a question.
    pub fn answer(&mut self, request: &Request) -> Vec<Vec<u8>> {
        if request.epoch != self.header.epoch {
            return vec![self.heartbeat()];
        }
        match &request.want {
            Want::Frames(ranges) => {
                let asked = ranges.iter().flat_map(|(first, last)| first.0..=last.0);
                let (mut frames, mut lost) = (Vec::new(), false);
                for seq in asked {
                    match self.sent.get(&seq) {
                        Some(frame) => frames.push(frame.to_vec()),
                        None => lost = true,
                    }
                }
                if lost {
                    frames.extend(self.reply(request, FramePart::Unavailable, vec![OpBuffer::default()]));
                }
                frames
            }
            Want::State(owners) => {
                let pieces = self.difference(owners);
                self.reply(request, FramePart::Repair, pieces)
            }
        }
    }

    fn difference(&self, asked: &[OwnerBuckets]) -> Vec<OpBuffer> {
        let mut pieces = Pieces { all: vec![OpBuffer::default()], blocks: 0, most: self.piece_blocks };
        for (number, (owner, held)) in (0u8..).zip(self.header.owners.iter().zip(&self.held)) {
            let same =
                |o: &&OwnerBuckets| (o.tier, &o.medium, o.group) == (owner.tier, &owner.medium, owner.group);
            let Some(theirs) = asked.iter().find(same).map(|owner| &owner.buckets) else {
                for (key, parent) in held {
                    pieces.with_room(1).stored(number, BlockKey(*parent), BlockKey(*key));
                }
                continue;
            };
            let bits = theirs.bits();
            let mine = Buckets::of(bits, held.keys().map(|key| BlockKey(*key)));
            for slice in mine.differing(theirs) {
                let of = held.iter().filter(|(key, _)| Buckets::slice(bits, BlockKey(**key)) == slice);
                let of: Vec<_> = of.map(|(key, parent)| (BlockKey(*parent), BlockKey(*key))).collect();
                pieces.with_room(of.len()).bucket(number, slice, of);
            }
        }
        pieces.all
    }

    fn reply(&mut self, request: &Request, part: FramePart, pieces: Vec<OpBuffer>) -> Vec<Vec<u8>> {
        let mut header = self.header.clone();
        header.part = part;
        header.seq = FrameSeq(self.header.seq.0 - 1);
        header.digests = self.digests();
        let count = pieces.len() as u32;
        let encode = |(piece, mut ops): (u32, OpBuffer)| {
            header.reply = Some(ReplyPart { request: request.id, piece, pieces: count });
            header.encode(&mut ops).unwrap()
        };
        (0..).zip(pieces).map(encode).collect()
    }
}

/// The pieces of an answer under construction.
struct Pieces {
    all: Vec<OpBuffer>,
    blocks: usize,
    most: usize,
}

impl Pieces {
    fn with_room(&mut self, blocks: usize) -> &mut OpBuffer {
        self.blocks += blocks;
        if self.blocks > self.most {
            self.blocks = blocks;
            self.all.push(OpBuffer::default());
        }
        self.all.last_mut().unwrap()
    }
}
