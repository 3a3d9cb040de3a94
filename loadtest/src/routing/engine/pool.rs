//! The GPU blocks of an engine, in vLLM's order: whoever nobody holds any more stays to be found again, and is given away
//! when it was let go longest ago.
//!
//! A request lets its last block go first, so leaves go before their parents; a hit takes a block out of the line.

use foldhash::HashMap;

use crate::routing::blocks::NONE;

/// Number of a place in the GPU's memory.
pub(super) type Slot = u32;

/// All places. Their number is fixed.
#[derive(Clone, Debug)]
pub(super) struct Pool {
    slots: Vec<Entry>,
    /// Where a block of the trace is. Of equal copies, the first one.
    known: HashMap<u32, Slot>,
    /// The line of those that nobody holds: given away next, let go last.
    ends: [Slot; 2],
    free: u32,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// What it can be found by; [`NONE`] for copies, generated tokens and what is not full.
    block: u32,
    holders: u32,
    before: Slot,
    after: Slot,
}

// === impl Pool ===

impl Pool {
    pub(super) fn new(slots: u32) -> Self {
        let empty = Entry { block: NONE, holders: 0, before: NONE, after: NONE };
        let mut pool =
            Self { slots: vec![empty; slots as usize], known: HashMap::default(), ends: [NONE; 2], free: 0 };
        (0..slots).for_each(|slot| pool.enqueue(slot));
        pool
    }

    /// Places that nobody holds.
    pub(super) fn free(&self) -> u32 {
        self.free
    }

    /// All places.
    pub(super) fn len(&self) -> u32 {
        self.slots.len() as u32
    }

    pub(super) fn find(&self, block: u32) -> Option<Slot> {
        self.known.get(&block).copied()
    }

    pub(super) fn is_free(&self, slot: Slot) -> bool {
        self.slots[slot as usize].holders == 0
    }

    /// One more holder.
    pub(super) fn hold(&mut self, slot: Slot) {
        if self.is_free(slot) {
            self.unlink(slot);
        }
        self.slots[slot as usize].holders += 1;
    }

    /// A place for something new, and the block that is gone for it. `None`: all are held.
    pub(super) fn take(&mut self) -> Option<(Slot, Option<u32>)> {
        let slot = self.ends[0];
        if slot == NONE {
            return None;
        }
        self.unlink(slot);
        let entry = &mut self.slots[slot as usize];
        entry.holders = 1;
        let block = std::mem::replace(&mut entry.block, NONE);
        let gone = (block != NONE).then(|| {
            self.known.remove(&block);
            block
        });
        Some((slot, gone))
    }

    /// From now on the block can be found here. Says no where it is known already: then this stays a copy.
    pub(super) fn name(&mut self, slot: Slot, block: u32) -> bool {
        if self.known.contains_key(&block) {
            return false;
        }
        self.known.insert(block, slot);
        self.slots[slot as usize].block = block;
        true
    }

    /// One holder less.
    pub(super) fn release(&mut self, slot: Slot) {
        let entry = &mut self.slots[slot as usize];
        debug_assert!(entry.holders > 0, "only holders let go");
        entry.holders -= 1;
        if entry.holders == 0 {
            self.enqueue(slot);
        }
    }

    fn enqueue(&mut self, slot: Slot) {
        let last = self.ends[1];
        (self.slots[slot as usize].before, self.slots[slot as usize].after) = (last, NONE);
        match last {
            NONE => self.ends[0] = slot,
            last => self.slots[last as usize].after = slot,
        }
        self.ends[1] = slot;
        self.free += 1;
    }

    fn unlink(&mut self, slot: Slot) {
        let Entry { before, after, .. } = self.slots[slot as usize];
        match before {
            NONE => self.ends[0] = after,
            before => self.slots[before as usize].after = after,
        }
        match after {
            NONE => self.ends[1] = before,
            after => self.slots[after as usize].before = before,
        }
        self.free -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_go_before_parents_and_a_hit_leaves_the_line() {
        let mut pool = Pool::new(3);
        let slots: Vec<_> = (0..3).map(|_| pool.take().unwrap().0).collect();
        for (slot, block) in slots.iter().zip([10, 11, 12]) {
            assert!(pool.name(*slot, block));
        }
        assert!(pool.take().is_none());
        slots.iter().rev().for_each(|slot| pool.release(*slot));
        pool.hold(pool.find(12).unwrap());
        assert_eq!(pool.take().unwrap().1, Some(11));
        assert_eq!(pool.take().unwrap().1, Some(10));
        assert!(pool.take().is_none() && pool.find(12).is_some());
    }

    #[test]
    fn an_equal_copy_is_not_found_and_frees_nothing_that_is() {
        let mut pool = Pool::new(2);
        let (a, b) = (pool.take().unwrap().0, pool.take().unwrap().0);
        assert!(pool.name(a, 5) && !pool.name(b, 5));
        pool.release(b);
        assert_eq!((pool.take().unwrap().1, pool.find(5)), (None, Some(a)));
    }
}
