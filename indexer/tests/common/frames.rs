//! A publisher in miniature: builds frames with contiguous sequences. Used by unit and integration tests.

use kvatlas_proto::frame::{FrameHeader, FrameOwner, FramePart, OpBuffer, SourceHealth};
use kvatlas_proto::keys::KeyVariant;
use kvatlas_proto::{
    BlockKey, CacheGroup, DpRank, Epoch, FrameSeq, GroupKind, InstanceId, Scope, SourceId, Tier,
};

/// One source; `header` may be changed between frames.
pub struct Publisher {
    pub header: FrameHeader,
}

/// One operation on the owner with this position in the header.
#[derive(Clone, Debug)]
pub enum Op {
    Stored(u8, Vec<u64>),
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
                variant: KeyVariant::default(),
                epoch: Epoch(1),
                seq: FrameSeq(0),
                part: FramePart::Live,
                health: SourceHealth::Exact,
                engine_time_ns: 0,
                owners: vec![full(Tier::Gpu), full(Tier::Cpu), full(Tier::Ssd)],
            },
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

    pub fn epoch(&mut self, epoch: u64) -> &mut Self {
        self.header.epoch = Epoch(epoch);
        self.header.seq = FrameSeq(0);
        self
    }

    /// The next frame, encoded.
    pub fn frame(&mut self, ops: &[Op]) -> Vec<u8> {
        let mut buffer = OpBuffer::default();
        for op in ops {
            match op {
                Op::Stored(owner, keys) => {
                    let mut parent = BlockKey(0);
                    for key in keys {
                        buffer.stored(*owner, parent, BlockKey(*key));
                        parent = BlockKey(*key);
                    }
                }
                Op::Removed(owner, keys) => {
                    for key in keys {
                        buffer.removed(*owner, BlockKey(*key));
                    }
                }
                Op::Cleared(owner) => buffer.cleared(*owner),
            }
        }
        let bytes = self.header.encode(&mut buffer).unwrap();
        self.header.seq = self.header.seq.next();
        bytes
    }
}
