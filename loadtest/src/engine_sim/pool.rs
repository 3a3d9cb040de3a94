//! The block pool of a simulated engine: reference counts, the free list and the map of cached blocks.
//!
//! It follows vLLM's pool: a block without a holder stays cached until it is handed out again; the free list is used
//! from its front, blocks without a hash first, then the least recently freed; equal content in two blocks is two
//! cached copies.

use std::collections::{BTreeMap, HashMap};

/// Index of a physical block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct BlockId(u32);

/// Hash of a block and everything before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct ChainHash(pub(super) u64);

/// All physical blocks. Their number is fixed, and everything in here is bounded by it.
#[derive(Debug)]
pub(super) struct BlockPool {
    blocks: Vec<Block>,
    /// Free blocks by their place in line.
    free: BTreeMap<i64, BlockId>,
    /// Cached blocks by content, oldest copy first. No entry is empty.
    cached: HashMap<ChainHash, Vec<BlockId>>,
    /// Place for the next block that is freed with a hash; grows.
    back: i64,
    /// Place for the next block that is freed without one; shrinks.
    front: i64,
}

/// One physical block. It is in the free list exactly while nobody holds it.
#[derive(Debug)]
struct Block {
    holders: u32,
    hash: Option<ChainHash>,
    place: i64,
}

// === impl BlockPool ===

impl BlockPool {
    pub(super) fn new(blocks: u32) -> Self {
        Self {
            blocks: (0..blocks)
                .map(|index| Block { holders: 0, hash: None, place: i64::from(index) })
                .collect(),
            free: (0..blocks).map(|index| (i64::from(index), BlockId(index))).collect(),
            cached: HashMap::new(),
            back: i64::from(blocks),
            front: -1,
        }
    }

    /// The block that would serve this content.
    pub(super) fn find(&self, hash: ChainHash) -> Option<BlockId> {
        self.cached.get(&hash).and_then(|copies| copies.first()).copied()
    }

    /// Blocks that could be allocated if `kept` were taken first.
    pub(super) fn available_beside(&self, kept: &[BlockId]) -> usize {
        self.free.len() - kept.iter().filter(|id| self.block(**id).holders == 0).count()
    }

    /// Adds a holder to each block.
    pub(super) fn take(&mut self, blocks: &[BlockId]) {
        for id in blocks {
            let block = &mut self.blocks[id.0 as usize];
            block.holders += 1;
            if block.holders == 1 {
                self.free.remove(&block.place);
            }
        }
    }

    /// Hands out `count` blocks, each with one holder. The content that goes for them is appended to `removed`, one
    /// entry per copy. The caller has checked that there are enough.
    pub(super) fn allocate(&mut self, count: usize, removed: &mut Vec<ChainHash>) -> Vec<BlockId> {
        debug_assert!(count <= self.free.len(), "the caller checks what is available");
        let mut ids = Vec::with_capacity(count);
        for _ in 0..count {
            let Some((_, id)) = self.free.pop_first() else { break };
            let block = &mut self.blocks[id.0 as usize];
            block.holders = 1;
            if let Some(hash) = block.hash.take() {
                self.forget(hash, id);
                removed.push(hash);
            }
            ids.push(id);
        }
        ids
    }

    /// Makes a held block findable by its content.
    pub(super) fn cache(&mut self, id: BlockId, hash: ChainHash) {
        let block = &mut self.blocks[id.0 as usize];
        debug_assert!(block.holders > 0 && block.hash.is_none(), "only fresh blocks become cached");
        block.hash = Some(hash);
        self.cached.entry(hash).or_default().push(id);
    }

    /// Takes one holder from each block of a request, the last block first, so that children are evicted before
    /// their parents.
    pub(super) fn release(&mut self, blocks: &[BlockId]) {
        for id in blocks.iter().rev() {
            let block = &mut self.blocks[id.0 as usize];
            block.holders -= 1;
            if block.holders > 0 {
                continue;
            }
            let place = if block.hash.is_some() { &mut self.back } else { &mut self.front };
            block.place = *place;
            *place += if block.hash.is_some() { 1 } else { -1 };
            self.free.insert(block.place, *id);
        }
    }

    /// Forgets all content. Refused (false) while a block is held.
    pub(super) fn clear(&mut self) -> bool {
        if self.free.len() < self.blocks.len() {
            return false;
        }
        self.cached.clear();
        for block in &mut self.blocks {
            block.hash = None;
        }
        true
    }

    /// Every cached content with its number of copies.
    pub(super) fn copies(&self) -> impl Iterator<Item = (ChainHash, usize)> {
        self.cached.iter().map(|(hash, copies)| (*hash, copies.len()))
    }

    fn block(&self, id: BlockId) -> &Block {
        &self.blocks[id.0 as usize]
    }

    fn forget(&mut self, hash: ChainHash, id: BlockId) {
        if let Some(copies) = self.cached.get_mut(&hash) {
            copies.retain(|copy| *copy != id);
            if copies.is_empty() {
                self.cached.remove(&hash);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(number: u64) -> ChainHash {
        ChainHash(number)
    }

    /// Allocates and caches one block per hash.
    fn fill(pool: &mut BlockPool, hashes: &[u64]) -> Vec<BlockId> {
        let ids = pool.allocate(hashes.len(), &mut Vec::new());
        ids.iter().zip(hashes).for_each(|(id, number)| pool.cache(*id, hash(*number)));
        ids
    }

    #[test]
    fn children_are_evicted_before_their_parents_and_blocks_without_content_first() {
        let mut pool = BlockPool::new(4);
        let mut ids = fill(&mut pool, &[1, 2, 3]);
        ids.extend(pool.allocate(1, &mut Vec::new()));
        pool.release(&ids);
        let mut removed = Vec::new();
        pool.allocate(3, &mut removed);
        assert_eq!(removed, [hash(3), hash(2)]);
        assert!(pool.find(hash(1)).is_some());
    }

    #[test]
    fn a_block_taken_again_is_not_evicted() {
        let mut pool = BlockPool::new(2);
        let ids = fill(&mut pool, &[1, 2]);
        pool.release(&ids);
        let hit = [pool.find(hash(2)).unwrap()];
        assert_eq!(pool.available_beside(&hit), 1);
        pool.take(&hit);
        let mut removed = Vec::new();
        pool.allocate(1, &mut removed);
        assert_eq!(removed, [hash(1)]);
        assert_eq!(pool.find(hash(2)), Some(hit[0]));
    }

    #[test]
    fn a_second_copy_keeps_the_content_findable_when_the_first_goes() {
        let mut pool = BlockPool::new(2);
        let (first, second) = (fill(&mut pool, &[7]), fill(&mut pool, &[7]));
        pool.release(&first);
        pool.release(&second);
        let mut removed = Vec::new();
        pool.allocate(1, &mut removed);
        assert_eq!(removed, [hash(7)]);
        assert_eq!(pool.find(hash(7)), Some(second[0]));
    }

    #[test]
    fn a_reset_is_refused_while_a_block_is_held() {
        let mut pool = BlockPool::new(2);
        let ids = fill(&mut pool, &[1]);
        assert!(!pool.clear());
        pool.release(&ids);
        assert!(pool.clear());
        assert_eq!(pool.copies().count(), 0);
        let mut removed = Vec::new();
        pool.allocate(2, &mut removed);
        assert!(removed.is_empty(), "cleared content is not removed again");
    }
}
