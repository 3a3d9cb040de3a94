//! One simulated pod: which blocks it holds, and which give way when it is full.
//!
//! As engines do, the block that was used longest ago goes first, and of one request the last block before the first one, so
//! that what is held of a prompt is its beginning.

use foldhash::HashMap;

use super::forest::Block;

const NONE: u32 = u32::MAX;

/// What a pod holds, in the order of use.
pub(super) struct Pod {
    capacity: usize,
    slots: Vec<Slot>,
    at: HashMap<Block, u32>,
    /// Used longest ago.
    oldest: u32,
    newest: u32,
}

#[derive(Clone, Copy)]
struct Slot {
    block: Block,
    older: u32,
    newer: u32,
}

// === impl Pod ===

impl Pod {
    /// An empty pod with room for so many blocks.
    pub(super) fn new(capacity: usize) -> Self {
        Self { capacity, slots: Vec::new(), at: HashMap::default(), oldest: NONE, newest: NONE }
    }

    pub(super) fn holds(&self, block: Block) -> bool {
        self.at.contains_key(&block)
    }

    /// Number of blocks held.
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// What is held, in the order in which blocks came to be: a block after what it follows.
    pub(super) fn blocks(&self) -> Vec<Block> {
        let mut blocks: Vec<Block> = self.slots.iter().map(|slot| slot.block).collect();
        blocks.sort_unstable();
        blocks
    }

    /// Leading blocks of a chain that are held.
    pub(super) fn depth_of(&self, chain: &[Block]) -> usize {
        chain.iter().take_while(|block| self.holds(**block)).count()
    }

    /// Counts the held ones of a chain as used now, its beginning last.
    pub(super) fn touch(&mut self, chain: &[Block]) {
        for block in chain.iter().rev() {
            if let Some(slot) = self.at.get(block).copied() {
                self.unlink(slot);
                self.link_newest(slot);
            }
        }
    }

    /// Holds a block that it did not hold. Returns the one that gave way.
    pub(super) fn store(&mut self, block: Block) -> Option<Block> {
        debug_assert!(!self.holds(block));
        if self.slots.len() < self.capacity {
            let slot = self.slots.len() as u32;
            self.slots.push(Slot { block, older: NONE, newer: NONE });
            self.link_newest(slot);
            self.at.insert(block, slot);
            return None;
        }
        let slot = self.oldest;
        self.unlink(slot);
        let evicted = std::mem::replace(&mut self.slots[slot as usize].block, block);
        self.link_newest(slot);
        self.at.remove(&evicted);
        self.at.insert(block, slot);
        Some(evicted)
    }

    fn unlink(&mut self, slot: u32) {
        let Slot { older, newer, .. } = self.slots[slot as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.slots[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.slots[newer as usize].older = older,
        }
    }

    fn link_newest(&mut self, slot: u32) {
        let before = self.newest;
        let own = &mut self.slots[slot as usize];
        (own.older, own.newer) = (before, NONE);
        match before {
            NONE => self.oldest = slot,
            before => self.slots[before as usize].newer = slot,
        }
        self.newest = slot;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_the_request_that_was_used_longest_ago_goes_first() {
        let mut pod = Pod::new(6);
        let (first, second) = ([0, 1, 2], [10, 11, 12]);
        for chain in [first, second] {
            chain.iter().for_each(|block| assert_eq!(pod.store(*block), None));
            pod.touch(&chain);
        }
        assert_eq!([20, 21].map(|block| pod.store(block)), [Some(2), Some(1)]);
        pod.touch(&first);
        assert_eq!([22, 23].map(|block| pod.store(block)), [Some(12), Some(11)]);
        assert_eq!((pod.depth_of(&first), pod.depth_of(&second), pod.len()), (1, 1, 6));
        assert_eq!(pod.blocks(), [0, 10, 20, 21, 22, 23]);
    }
}
