//! Where a block lies: its key, what precedes it, and its shard.

use kvatlas_proto::keys::LocalHash;
use kvatlas_proto::{BlockKey, KeyHasher, Partition, shard};

use super::place::Counts;

/// What is known of an engine hash.
///
/// The link lies in it in pieces ([`HashEntry::link`]): as an `Option` it would make every hash eight bytes larger.
pub(super) struct HashEntry {
    pub(super) copies: Counts,
    /// Names this entry's latest turn in the ghost queue; 0 while held.
    pub(super) ghost_stamp: u32,
    key: BlockKey,
    parent: BlockKey,
    at: shard::Place,
    linked: bool,
}

/// Where a hash's block lies in its chain.
#[derive(Clone, Copy)]
pub(super) struct Link {
    pub(super) key: BlockKey,
    /// What is said to precede it: the hasher's root before the first block of a segment.
    pub(super) parent: BlockKey,
    pub(super) at: shard::Place,
}

/// What a block follows.
#[derive(Clone, Copy)]
pub(super) enum Before {
    /// Nothing: it begins a prompt.
    Root,
    /// This block.
    Block(Link),
}

// === impl HashEntry ===

impl HashEntry {
    pub(super) fn new(link: Option<Link>, copies: Counts) -> Self {
        let Link { key, parent, at } = link.unwrap_or(Link::UNKNOWN);
        Self { copies, ghost_stamp: 0, key, parent, at, linked: link.is_some() }
    }

    /// `None` while unresolved.
    pub(super) fn link(&self) -> Option<Link> {
        self.linked.then_some(Link { key: self.key, parent: self.parent, at: self.at })
    }

    /// Whether there is a link.
    pub(super) fn is_linked(&self) -> bool {
        self.linked
    }

    /// The link becomes known.
    pub(super) fn set_link(&mut self, link: Link) {
        (self.key, self.parent, self.at, self.linked) = (link.key, link.parent, link.at, true);
    }
}

// === impl Link ===

impl Link {
    /// Stands where there is no link and means nothing.
    pub(super) const UNKNOWN: Self =
        Self { key: BlockKey(0), parent: BlockKey(0), at: shard::Place { shard: 0, step: 0 } };

    /// The block of this content that follows `before`.
    pub(super) fn new(hasher: &KeyHasher, partition: Partition, before: Before, local: LocalHash) -> Self {
        let root = hasher.root();
        match before {
            Before::Root => {
                let key = hasher.extend(root, local);
                Self { key, parent: root, at: partition.first(key) }
            }
            Before::Block(before) => {
                let key = hasher.extend(before.key, local);
                let at = partition.next(before.at, key);
                // What precedes a segment lies in another shard.
                let parent = if at.starts_segment() { root } else { before.key };
                Self { key, parent, at }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_takes_no_memory_of_a_hash() {
        // Key and parent, what says that they are known, copies, and the stamp: what there was before there were shards.
        assert!(size_of::<HashEntry>() <= size_of::<(Option<(u64, u64)>, Counts, u32)>());
    }
}
