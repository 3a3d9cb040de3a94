//! One scope's block table: which owners hold which key.
//!
//! Both directions are kept: from a key to its holders (what a query walks) and from an owner to its keys (what makes
//! clearing an owner cost its own blocks, not everybody's). The price is that each entry is stored twice.
//!
//! Beside each owner's keys its [`Digest`] is kept, so that it can be compared with the publisher's at any moment, and
//! beside each key its parent's, so that the table can be written down and told to somebody else.
//!
//! The table knows no sources, tiers or time; an owner is a number here. It has no bound of its own: [`crate::Index`]
//! asks before it stores.

use foldhash::fast::RandomState;
use hashbrown::{HashMap, HashSet};
use kvatlas_proto::{BlockKey, Digest};
use smallvec::SmallVec;

/// Number of an owner inside one table. Given out by the table's user, dense from 0, reused after the owner was
/// cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OwnerNo(pub u32);

/// Holders of one key, ascending. Most blocks have few, so four fit without an allocation.
type Holders = SmallVec<[OwnerNo; 4]>;
type KeySet = HashSet<BlockKey, RandomState>;

/// A key that somebody holds.
#[derive(Debug)]
struct Block {
    parent: BlockKey,
    holders: Holders,
}

/// What one owner holds.
#[derive(Debug, Default)]
struct Owned {
    keys: KeySet,
    digest: Digest,
}

/// `key -> holders` and `owner -> keys`, always in agreement.
#[derive(Debug, Default)]
pub struct Table {
    blocks: HashMap<BlockKey, Block, RandomState>,
    /// By owner number; an owner that holds nothing has an empty set or none.
    owned: Vec<Owned>,
    /// Number of (owner, key) pairs.
    entries: usize,
}

// === impl Table ===

impl Table {
    /// `owner` holds `key`, which follows `parent`, from now on. False if it did already.
    pub fn store(&mut self, owner: OwnerNo, parent: BlockKey, key: BlockKey) -> bool {
        let at = owner.0 as usize;
        if at >= self.owned.len() {
            self.owned.resize_with(at + 1, Owned::default);
        }
        let owned = &mut self.owned[at];
        if !owned.keys.insert(key) {
            return false;
        }
        owned.digest.add(key);
        let block = self.blocks.entry(key).or_insert_with(|| Block { parent, holders: Holders::new() });
        match block.holders.binary_search(&owner) {
            Ok(_) => debug_assert!(false, "a key without its owner's entry had the owner as a holder"),
            Err(at) => block.holders.insert(at, owner),
        }
        self.entries += 1;
        true
    }

    /// `owner` no longer holds `key`. False if it did not.
    pub fn remove(&mut self, owner: OwnerNo, key: BlockKey) -> bool {
        let held = self.owned.get_mut(owner.0 as usize).filter(|owned| owned.keys.contains(&key));
        let found = held.is_some();
        if let Some(owned) = held {
            owned.keys.remove(&key);
            owned.digest.remove(key);
            self.forget_holder(owner, key);
        }
        found
    }

    /// `owner` holds nothing any more. Returns how many blocks that were.
    pub fn clear(&mut self, owner: OwnerNo) -> usize {
        let keys = self.take_keys(owner);
        self.release(owner, &keys);
        keys.len()
    }

    /// First half of a clear in pieces: takes the owner's keys away from it and returns them.
    ///
    /// Until all of them went through [`Self::release`], `owner` is still a holder of the rest in
    /// [`Self::holders`], and its number must not be given to anybody else.
    pub fn take_keys(&mut self, owner: OwnerNo) -> Vec<BlockKey> {
        let owned = self.owned.get_mut(owner.0 as usize).map(std::mem::take).unwrap_or_default();
        owned.keys.into_iter().collect()
    }

    /// Second half of a clear in pieces: `owner` is no longer a holder of `keys`, which [`Self::take_keys`] returned.
    pub fn release(&mut self, owner: OwnerNo, keys: &[BlockKey]) {
        for &key in keys {
            self.forget_holder(owner, key);
        }
    }

    /// True if `owner` holds `key`.
    pub fn holds(&self, owner: OwnerNo, key: BlockKey) -> bool {
        self.owned.get(owner.0 as usize).is_some_and(|owned| owned.keys.contains(&key))
    }

    /// Who holds `key`, ascending; empty if nobody does.
    #[inline]
    pub fn holders(&self, key: BlockKey) -> &[OwnerNo] {
        self.blocks.get(&key).map_or(&[], |block| block.holders.as_slice())
    }

    /// The keys of `owner`, in no particular order.
    pub fn keys_of(&self, owner: OwnerNo) -> impl Iterator<Item = BlockKey> + '_ {
        self.owned.get(owner.0 as usize).into_iter().flat_map(|owned| &owned.keys).copied()
    }

    /// The blocks of `owner` as (parent, key), in no particular order.
    pub fn blocks_with_parents(&self, owner: OwnerNo) -> impl Iterator<Item = (BlockKey, BlockKey)> + '_ {
        self.keys_of(owner).filter_map(|key| Some((self.blocks.get(&key)?.parent, key)))
    }

    /// What the keys of `owner` look like from far away.
    pub fn digest_of(&self, owner: OwnerNo) -> Digest {
        self.owned.get(owner.0 as usize).map_or_else(Digest::default, |owned| owned.digest)
    }

    /// Number of keys of `owner`.
    pub fn blocks_of(&self, owner: OwnerNo) -> usize {
        self.owned.get(owner.0 as usize).map_or(0, |owned| owned.keys.len())
    }

    /// Number of (owner, key) pairs.
    pub fn entries(&self) -> usize {
        self.entries
    }

    /// Number of different keys.
    pub fn distinct(&self) -> usize {
        self.blocks.len()
    }

    /// Says what is wrong if the two directions disagree. Costs a walk over everything; for tests and debugging, and
    /// not between [`Self::take_keys`] and its last [`Self::release`].
    pub fn check(&self) -> Result<(), String> {
        let mut pairs = 0;
        for (key, Block { holders, .. }) in &self.blocks {
            if holders.is_empty() || !holders.is_sorted_by(|a, b| a < b) {
                return Err(format!("holders of {key:?} are empty or out of order: {holders:?}"));
            }
            if let Some(owner) = holders.iter().find(|&&owner| !self.holds(owner, *key)) {
                return Err(format!("{owner:?} is a holder of {key:?} but does not have it"));
            }
            pairs += holders.len();
        }
        for (no, owned) in self.owned.iter().enumerate() {
            let digest = Digest::of(owned.keys.iter().copied());
            if digest != owned.digest {
                return Err(format!("owner {no} has the digest {:?}, its keys {digest:?}", owned.digest));
            }
        }
        let owned: usize = self.owned.iter().map(|owned| owned.keys.len()).sum();
        if pairs != owned || pairs != self.entries {
            return Err(format!("{pairs} holders, {owned} owned keys, {} counted", self.entries));
        }
        Ok(())
    }

    fn forget_holder(&mut self, owner: OwnerNo, key: BlockKey) {
        if let hashbrown::hash_map::Entry::Occupied(mut entry) = self.blocks.entry(key)
            && let Ok(at) = entry.get().holders.binary_search(&owner)
        {
            entry.get_mut().holders.remove(at);
            self.entries -= 1;
            if entry.get().holders.is_empty() {
                entry.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::naive::NaiveTable;

    #[derive(Clone, Debug)]
    enum Operation {
        Store(u32, u64),
        Remove(u32, u64),
        Clear(u32),
    }

    const OWNERS: u32 = 5;
    const KEYS: u64 = 12;

    fn operation() -> impl Strategy<Value = Operation> {
        prop_oneof![
            6 => (0..OWNERS, 0..KEYS).prop_map(|(owner, key)| Operation::Store(owner, key)),
            4 => (0..OWNERS, 0..KEYS).prop_map(|(owner, key)| Operation::Remove(owner, key)),
            1 => (0..OWNERS).prop_map(Operation::Clear),
        ]
    }

    proptest! {
        #[test]
        fn presence_and_match_equal_the_naive_model_for_every_owner(
            script in proptest::collection::vec(operation(), 0..200),
            prompt in proptest::collection::vec(0..KEYS, 0..10),
        ) {
            let (mut table, mut naive) = (Table::default(), NaiveTable::default());
            for operation in script {
                match operation {
                    Operation::Store(owner, key) => prop_assert_eq!(
                        table.store(OwnerNo(owner), BlockKey(key + 1), BlockKey(key)),
                        naive.store(OwnerNo(owner), BlockKey(key))
                    ),
                    Operation::Remove(owner, key) => prop_assert_eq!(
                        table.remove(OwnerNo(owner), BlockKey(key)),
                        naive.remove(OwnerNo(owner), BlockKey(key))
                    ),
                    Operation::Clear(owner) => {
                        prop_assert_eq!(table.clear(OwnerNo(owner)), naive.clear(OwnerNo(owner)));
                    }
                }
                prop_assert_eq!(table.check(), Ok(()));
            }
            let prompt: Vec<BlockKey> = prompt.into_iter().map(BlockKey).collect();
            for owner in (0..OWNERS).map(OwnerNo) {
                let run = prompt.iter().take_while(|key| table.holders(**key).contains(&owner)).count();
                prop_assert_eq!(run, naive.match_depth(owner, &prompt));
                for key in (0..KEYS).map(BlockKey) {
                    prop_assert_eq!(table.holds(owner, key), naive.holds(owner, key));
                    prop_assert_eq!(table.holders(key).contains(&owner), naive.holds(owner, key));
                }
                let mut keys: Vec<_> = table.keys_of(owner).collect();
                keys.sort_unstable();
                prop_assert_eq!(&keys, &naive.sorted_keys(owner));
                let mut blocks: Vec<_> = table.blocks_with_parents(owner).collect();
                blocks.sort_unstable();
                prop_assert_eq!(blocks, keys.iter().map(|key| (BlockKey(key.0 + 1), *key)).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn a_key_that_nobody_holds_leaves_nothing_behind() {
        let mut table = Table::default();
        assert!(table.store(OwnerNo(3), BlockKey(0), BlockKey(1)));
        assert!(table.remove(OwnerNo(3), BlockKey(1)));
        assert_eq!((table.distinct(), table.entries()), (0, 0));
        assert!(!table.remove(OwnerNo(9), BlockKey(1)), "an owner never seen holds nothing");
    }
}
