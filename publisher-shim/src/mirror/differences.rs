//! What makes somebody else's idea of a mirror equal to it.
//!
//! The asker says what it has of each owner in one shard as bucket sums; what differs is told in operations: whole slices where few
//! differ, everything as runs where the asker has nothing, or far too few slices to tell what differs. The answer's size follows the drift, not the
//! mirror.

use foldhash::fast::FixedState;
use hashbrown::HashMap;
use kvatlas_proto::digest::Buckets;
use kvatlas_proto::frame::OpBuffer;
use kvatlas_proto::{BlockKey, ShardId};
use smallvec::SmallVec;

use super::Mirror;
use super::lanes::Lane;

/// How much coarser than it should be an asker's division may be, as a power of two, before everything is told instead:
/// with eight times the keys in a slice, one differing block costs about 512 blocks.
const COARSER_BITS: u8 = 3;
/// Most blocks that are told as one slice, which no frame boundary may cut: 256 KiB, a third of a frame. Only keys that were
/// chosen to fall into one slice get there; then everything is told as runs, which can be cut.
const MAX_SLICE_BLOCKS: usize = 16_384;

/// A block as (parent, key).
type Block = (BlockKey, BlockKey);

/// How one owner is told.
enum Telling {
    /// All its blocks as runs; first that what the asker has is void.
    Whole { cleared: bool },
    /// Some slices, each whole.
    Slices(Vec<(u32, Vec<Block>)>),
}

/// Operations under construction, in buffers of about a size.
struct Pieces {
    max_bytes: usize,
    done: Vec<OpBuffer>,
    open: OpBuffer,
}

// === impl Mirror ===

impl Mirror {
    /// The operations after which an asker holds what this mirror holds visibly in a shard, parents before children within a
    /// run. `theirs` is what the asker has there, by the owners' numbers; `None`: nothing. Buffers have at most about
    /// `max_bytes`, and none is empty.
    pub fn differences(
        &self,
        shard: ShardId,
        theirs: &[Option<&Buckets>],
        max_bytes: usize,
    ) -> Vec<OpBuffer> {
        let lane = &self.lanes[usize::from(shard.number())];
        let mut pieces = Pieces { max_bytes, done: Vec::new(), open: OpBuffer::default() };
        // Sorting into chains touches every block: only where somebody needs it.
        let mut order = None;
        for (number, digest) in lane.digests.iter().enumerate() {
            match lane.telling(number as u8, theirs.get(number).copied().flatten()) {
                Telling::Whole { cleared } => {
                    if cleared {
                        pieces.open.cleared(number as u8);
                    }
                    if digest.is_empty() {
                        continue;
                    }
                    for &(parent, key) in order.get_or_insert_with(|| lane.chain_order()).iter() {
                        if lane.keys[&key].holders.get(number as u8) > 0 {
                            pieces.open.stored(number as u8, parent, key);
                            pieces.cut();
                        }
                    }
                }
                Telling::Slices(slices) => {
                    for (slice, blocks) in slices {
                        pieces.open.bucket(number as u8, slice, blocks);
                        pieces.cut();
                    }
                }
            }
        }
        pieces.finish()
    }
}

// === impl Lane ===

impl Lane {
    fn telling(&self, place: u8, theirs: Option<&Buckets>) -> Telling {
        let Some(theirs) = theirs else { return Telling::Whole { cleared: false } };
        let digest = self.digests[usize::from(place)];
        if theirs.bits() + COARSER_BITS < Buckets::bits_for(digest.count) {
            return Telling::Whole { cleared: true };
        }
        let bits = theirs.bits();
        let ours = Buckets::of(bits, self.blocks_in(place).map(|(_, key)| key));
        let mut slices: Vec<(u32, Vec<Block>)> =
            ours.differing(theirs).map(|slice| (slice, Vec::new())).collect();
        if slices.is_empty() {
            return Telling::Slices(slices);
        }
        if digest.is_empty() {
            return Telling::Whole { cleared: true };
        }
        for (parent, key) in self.blocks_in(place) {
            if let Ok(at) = slices.binary_search_by_key(&Buckets::slice(bits, key), |(slice, _)| *slice) {
                slices[at].1.push((parent, key));
            }
        }
        if slices.iter().any(|(_, blocks)| blocks.len() > MAX_SLICE_BLOCKS) {
            return Telling::Whole { cleared: true };
        }
        Telling::Slices(slices)
    }

    fn blocks_in(&self, place: u8) -> impl Iterator<Item = Block> + '_ {
        let held = self.keys.iter().filter(move |(_, entry)| entry.holders.get(place) > 0);
        held.map(|(key, entry)| (entry.parent, *key))
    }

    /// Visible keys with their parents, so that chains are consecutive.
    fn chain_order(&self) -> Vec<Block> {
        let mut children: HashMap<BlockKey, SmallVec<[BlockKey; 1]>, FixedState> = HashMap::default();
        let mut stack = Vec::new();
        for (key, entry) in &self.keys {
            if self.keys.contains_key(&entry.parent) {
                children.entry(entry.parent).or_default().push(*key);
            } else {
                stack.push(*key);
            }
        }
        let mut order = Vec::with_capacity(self.keys.len());
        while let Some(key) = stack.pop() {
            order.push((self.keys[&key].parent, key));
            stack.extend(children.get(&key).into_iter().flatten());
        }
        order
    }
}

// === impl Pieces ===

impl Pieces {
    /// Closes the open buffer if it is full.
    fn cut(&mut self) {
        if self.open.encoded_bytes() >= self.max_bytes {
            self.done.push(std::mem::take(&mut self.open));
        }
    }

    fn finish(mut self) -> Vec<OpBuffer> {
        if !self.open.is_empty() {
            self.done.push(self.open);
        }
        self.done
    }
}
