//! What a mirror holds and has to say, by virtual shard.
//!
//! A key lies in the shard of its segment ([`kvatlas_proto::shard`]). Keys and digests are kept apart by shard, so that a
//! question about one of them costs what that one holds, and no key has to remember where it lies.

use foldhash::fast::FixedState;
use hashbrown::HashMap;
use kvatlas_proto::frame::OpBuffer;
use kvatlas_proto::{BlockKey, Digest, Partition, ShardId};

use super::place::Counts;

/// What is held in one shard.
#[derive(Default)]
pub(super) struct Lane {
    pub(super) keys: HashMap<BlockKey, KeyEntry, FixedState>,
    /// Visible keys, by place.
    pub(super) digests: Vec<Digest>,
}

/// A key that is held somewhere.
pub(super) struct KeyEntry {
    /// What is said to precede it: the hasher's root before the first block of a segment.
    pub(super) parent: BlockKey,
    /// Engine hashes of this key that are held, per place. Nearly always one.
    pub(super) holders: Counts,
}

/// Operations that wait to be published, one buffer per shard.
#[derive(Debug)]
pub struct LaneOps {
    lanes: Vec<OpBuffer>,
    /// Shards whose buffer has something in it, each once: nearly none of many, at nearly all times.
    waiting: Vec<u16>,
}

// === impl LaneOps ===

impl LaneOps {
    /// No operations.
    pub fn new(partition: Partition) -> Self {
        Self { lanes: partition.all().map(|_| OpBuffer::default()).collect(), waiting: Vec::new() }
    }

    /// Nothing to say.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Upper bound of the encoded operations of all shards, in bytes.
    pub fn encoded_bytes(&self) -> usize {
        self.waiting.iter().map(|shard| self.lanes[usize::from(*shard)].encoded_bytes()).sum()
    }

    /// Forgets all operations and keeps the memory.
    pub fn clear(&mut self) {
        for shard in self.waiting.drain(..) {
            self.lanes[usize::from(shard)].clear();
        }
    }

    /// The operations of one shard.
    pub fn of(&self, shard: ShardId) -> &OpBuffer {
        &self.lanes[usize::from(shard.number())]
    }

    /// The same, to be emptied. Who empties buffers calls [`Self::clear`] in the end.
    pub(crate) fn of_mut(&mut self, shard: ShardId) -> &mut OpBuffer {
        &mut self.lanes[usize::from(shard.number())]
    }

    #[inline]
    pub(super) fn stored(&mut self, shard: u16, owner: u8, parent: BlockKey, key: BlockKey) {
        self.buffer(shard).stored(owner, parent, key);
    }

    #[inline]
    pub(super) fn removed(&mut self, shard: u16, owner: u8, key: BlockKey) {
        self.buffer(shard).removed(owner, key);
    }

    pub(super) fn cleared(&mut self, shard: u16, owner: u8) {
        self.buffer(shard).cleared(owner);
    }

    /// The buffer of a shard that is about to have something in it.
    #[inline]
    fn buffer(&mut self, shard: u16) -> &mut OpBuffer {
        let buffer = &mut self.lanes[usize::from(shard)];
        if buffer.is_empty() {
            self.waiting.push(shard);
        }
        buffer
    }
}
