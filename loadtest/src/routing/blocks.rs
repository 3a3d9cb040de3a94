//! The blocks of a trace as a tree: a block is its place, so its number names everything before it.

use foldhash::HashMap;
use kvatlas_proto::{BlockKey, KeyHasher};
use xxhash_rust::xxh3::xxh3_64;

/// No block: what the first block of a prompt follows.
pub const NONE: u32 = u32::MAX;

/// All blocks of a trace. Numbers are dense, from 0.
#[derive(Clone, Debug)]
pub struct BlockTree {
    parents: Vec<u32>,
    keys: Vec<u64>,
    root: u64,
}

/// Ids of a trace and the blocks they stand for, within one id space.
#[derive(Clone, Debug)]
pub(super) struct Ids {
    /// Blocks of one id.
    blocks_per_id: u32,
    /// By what precedes it and the id: its first block. Ids that mean content and not place are chained by that.
    known: HashMap<(u32, u64), u32>,
}

// === impl BlockTree ===

impl Default for BlockTree {
    fn default() -> Self {
        Self { parents: Vec::new(), keys: Vec::new(), root: KeyHasher::default().root().0 }
    }
}

impl BlockTree {
    /// A new block after `parent`.
    pub fn add(&mut self, parent: u32) -> u32 {
        let number = self.parents.len() as u32;
        let before = if parent == NONE { self.root } else { self.keys[parent as usize] };
        let mut name = [0; 12];
        name[..8].copy_from_slice(&before.to_le_bytes());
        name[8..].copy_from_slice(&number.to_le_bytes());
        self.parents.push(parent);
        self.keys.push(xxh3_64(&name));
        number
    }

    /// How many blocks there are.
    pub fn len(&self) -> usize {
        self.parents.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.parents.is_empty()
    }

    /// What precedes the block; [`NONE`] at the start of a prompt.
    pub fn parent(&self, block: u32) -> u32 {
        self.parents[block as usize]
    }

    /// Its chain key.
    pub fn key(&self, block: u32) -> BlockKey {
        BlockKey(self.keys[block as usize])
    }

    /// The key that a prompt's first block follows.
    pub fn root_key(&self) -> BlockKey {
        BlockKey(self.root)
    }

    /// The blocks from a prompt's start up to and including `last`.
    pub fn path(&self, last: u32) -> Vec<u32> {
        let mut path = Vec::new();
        let mut at = last;
        while at != NONE {
            path.push(at);
            at = self.parents[at as usize];
        }
        path.reverse();
        path
    }
}

// === impl Ids ===

impl Ids {
    pub(super) fn new(blocks_per_id: u32) -> Self {
        Self { blocks_per_id, known: HashMap::default() }
    }

    /// Blocks of one id.
    pub(super) fn blocks_per_id(&self) -> u32 {
        self.blocks_per_id
    }

    /// The last block of a prompt with these ids.
    pub(super) fn last(&mut self, tree: &mut BlockTree, ids: &[u64]) -> u32 {
        let mut at = NONE;
        for id in ids {
            let first = *self.known.entry((at, *id)).or_insert_with(|| {
                let first = tree.add(at);
                (1..self.blocks_per_id).fold(first, |parent, _| tree.add(parent));
                first
            });
            // The blocks of an id are added together, so their numbers follow one another.
            at = first + self.blocks_per_id - 1;
        }
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ids_become_places() {
        let (mut tree, mut ids) = (BlockTree::default(), Ids::new(1));
        let a = ids.last(&mut tree, &[7, 7, 3]);
        let b = ids.last(&mut tree, &[3, 7]);
        assert_eq!(tree.path(a), [0, 1, 2]);
        assert_eq!(tree.path(b), [3, 4]);
        assert_eq!(ids.last(&mut tree, &[7, 7]), 1);
        assert_ne!(tree.key(1), tree.key(4));
    }

    #[test]
    fn an_id_of_many_tokens_is_several_blocks() {
        let (mut tree, mut ids) = (BlockTree::default(), Ids::new(4));
        let last = ids.last(&mut tree, &[0, 5]);
        assert_eq!(tree.path(last), (0..8).collect::<Vec<_>>());
        assert_eq!(ids.last(&mut tree, &[0]), 3);
    }
}
