//! All blocks of a study, each once: what a block follows, how deep it lies, and its key, computed by the contract's hasher.
//!
//! A block is a number here, so that pods, prompts and counters stay small. Two requests that share a beginning share
//! numbers; nothing is ever looked up by key.

use kvatlas_proto::{BlockKey, KeyHasher};

/// Number of a block in its forest.
pub(super) type Block = u32;

/// The shortest segment length of the study; every other one is a multiple of it.
pub(super) const UNIT: u32 = 8;
const NOBODY: u16 = u16::MAX;

/// The blocks.
pub(super) struct Forest {
    hasher: KeyHasher,
    keys: Vec<BlockKey>,
    parents: Vec<Block>,
    /// First block of the stretch of [`UNIT`] blocks that a block lies in.
    units: Vec<Block>,
    roots: Vec<Block>,
    depths: Vec<u32>,
    /// The pod that stored or served the block last.
    served: Vec<u16>,
    /// Content of the next block that is like no other.
    fresh: u64,
}

// === impl Forest ===

impl Forest {
    /// No blocks yet.
    pub(super) fn new() -> Self {
        Self {
            hasher: KeyHasher::default(),
            keys: Vec::new(),
            parents: Vec::new(),
            units: Vec::new(),
            roots: Vec::new(),
            depths: Vec::new(),
            served: Vec::new(),
            fresh: 0,
        }
    }

    /// Key before every prompt's first one.
    pub(super) fn root_key(&self) -> BlockKey {
        self.hasher.root()
    }

    /// A new block that follows `parent`, or begins a prompt. Its content is like no other block's.
    pub(super) fn grow(&mut self, parent: Option<Block>) -> Block {
        let block = self.keys.len() as Block;
        self.fresh += 1;
        // Two tokens stand for all of a block's: a key takes in as much of them.
        let local = self.hasher.local(&[self.fresh as u32, (self.fresh >> 32) as u32], &[]);
        let before = parent.map_or(self.hasher.root(), |parent| self.key(parent));
        self.keys.push(self.hasher.extend(before, local));
        let depth = parent.map_or(0, |parent| self.depth(parent) + 1);
        self.depths.push(depth);
        self.parents.push(parent.unwrap_or(block));
        self.roots.push(parent.map_or(block, |parent| self.roots[parent as usize]));
        let unit = if depth.is_multiple_of(UNIT) { None } else { parent };
        self.units.push(unit.map_or(block, |parent| self.units[parent as usize]));
        self.served.push(NOBODY);
        block
    }

    /// Appends `blocks` new blocks to a chain.
    pub(super) fn extend(&mut self, chain: &mut Vec<Block>, blocks: u32) {
        for _ in 0..blocks {
            let block = self.grow(chain.last().copied());
            chain.push(block);
        }
    }

    /// The blocks up to and including this one, first one first.
    pub(super) fn chain_to(&self, last: Block) -> Vec<Block> {
        let mut chain = vec![last; self.depth(last) as usize + 1];
        let mut at = last;
        for slot in chain.iter_mut().rev() {
            *slot = at;
            at = self.parents[at as usize];
        }
        chain
    }

    pub(super) fn key(&self, block: Block) -> BlockKey {
        self.keys[block as usize]
    }

    /// How many blocks come before it.
    pub(super) fn depth(&self, block: Block) -> u32 {
        self.depths[block as usize]
    }

    /// What it follows, unless it begins a prompt.
    pub(super) fn parent(&self, block: Block) -> Option<Block> {
        (self.depth(block) > 0).then(|| self.parents[block as usize])
    }

    /// The first block of its prompt.
    pub(super) fn root(&self, block: Block) -> Block {
        self.roots[block as usize]
    }

    /// The first block of its segment, where segments have `length` blocks, a multiple of [`UNIT`].
    pub(super) fn segment(&self, block: Block, length: u32) -> Block {
        debug_assert!(length.is_multiple_of(UNIT));
        let first = self.depth(block) - self.depth(block) % length;
        let mut at = self.units[block as usize];
        while self.depth(at) > first {
            at = self.units[self.parents[at as usize] as usize];
        }
        at
    }

    /// Which pod stored or served it last.
    pub(super) fn served(&self, block: Block) -> Option<u16> {
        Some(self.served[block as usize]).filter(|pod| *pod != NOBODY)
    }

    pub(super) fn note_served(&mut self, block: Block, pod: u16) {
        self.served[block as usize] = pod;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_begin_at_multiples_of_their_length() {
        let mut forest = Forest::new();
        let mut chain = Vec::new();
        forest.extend(&mut chain, 300);
        let mut branch = chain[..150].to_vec();
        forest.extend(&mut branch, 100);
        for chain in [chain, branch] {
            for length in [16, 32, 64, 128] {
                for (depth, block) in chain.iter().enumerate() {
                    let first = depth - depth % length;
                    assert_eq!(forest.segment(*block, length as u32), chain[first]);
                }
            }
            assert_eq!(forest.chain_to(*chain.last().unwrap()), chain);
            assert!(chain.iter().all(|block| forest.root(*block) == chain[0]));
        }
    }
}
