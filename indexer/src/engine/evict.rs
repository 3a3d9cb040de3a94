//! What gives way at the memory limit: whole strands that nothing follows, the least recently stored or matched ones.
//!
//! Exact order would cost every store and match a place in a list. Instead strands carry the writer's clock of their
//! last use, and the oldest leaf of a window of strands goes; the window moves on. With no more strands than the
//! window has, the order is exact.
//!
//! A parent becomes a leaf when its last child went and then counts as used when that child was, so children always go
//! before their parents.

use super::Shared;
use super::sets::EMPTY;
use super::strand::{Parent, StrandNo};
use super::write::Writer;

/// Strands looked at for one eviction.
const WINDOW: usize = 128;
/// Strands evicted in one go: bounds what a store at the limit has to wait for.
const MAX_PER_STORE: usize = 16;

impl Writer {
    /// Bytes in use. What waits to be freed counts.
    pub(super) fn bytes(&self, shared: &Shared) -> usize {
        let strands = self.top as usize * size_of::<super::strand::Header>();
        self.table.bytes()
            + strands
            + self.free_strands.capacity() * 4
            + self.sets.bytes()
            + self.array_bytes
            + self.limbo.bytes()
            + self.holders.capacity() * size_of::<super::write::HolderState>()
            + shared.pins.bytes()
    }

    /// True if something more may be stored; evicts if need be.
    pub(super) fn has_room(&mut self, shared: &Shared) -> bool {
        if self.fits(shared) {
            return true;
        }
        for _ in 0..MAX_PER_STORE {
            let Some(strand) = self.oldest_leaf(shared) else { break };
            self.evict(shared, strand);
            self.tidy(shared);
            if self.fits(shared) {
                return true;
            }
        }
        false
    }

    /// What waits for readers to leave is as good as free: to evict more would not free it sooner.
    fn fits(&self, shared: &Shared) -> bool {
        self.bytes(shared) - self.limbo.bytes() <= self.limits.max_bytes
    }

    fn oldest_leaf(&mut self, shared: &Shared) -> Option<StrandNo> {
        let mut oldest: Option<(u32, StrandNo)> = None;
        let mut seen = 0;
        for _ in 1..self.top {
            self.hand = if self.hand + 1 >= self.top { 1 } else { self.hand + 1 };
            let header = shared.strands.get(self.hand);
            if header.blocks() == 0 || header.first_kid() != 0 {
                continue;
            }
            let age = self.clock.wrapping_sub(header.stamp());
            if oldest.is_none_or(|(most, _)| age > most) {
                oldest = Some((age, self.hand));
            }
            seen += 1;
            if seen == WINDOW {
                break;
            }
        }
        oldest.map(|(_, strand)| strand)
    }

    /// Forgets a strand, whoever holds it.
    fn evict(&mut self, shared: &Shared, strand: StrandNo) {
        let header = shared.strands.get(strand);
        let length = header.blocks();
        let parent = header.parent();
        let stamp = header.stamp();
        let steps = header.steps(&self.token);
        let count = steps.len();
        let mut gone = 0;
        for at in 0..count {
            let step = steps.at(at);
            let blocks = (if at + 1 < count { steps.at(at + 1).start } else { length } - step.start) as usize;
            let entry = shared.sets.get(step.set);
            let (from, to) = (step.start, step.start + blocks as u32);
            entry.each_holder(&self.token, |holder| {
                let state = &mut self.holders[holder as usize];
                state.blocks -= blocks;
                (from..to).for_each(|offset| state.digest.remove(header.key(offset, &self.token)));
                gone += blocks;
            });
            self.distinct -= if step.set == EMPTY { 0 } else { blocks };
        }
        self.entries -= gone;
        self.evicted += gone as u64;
        self.forget_keys(shared, strand, 0, length);
        if let Parent::At(place) = parent {
            let above = shared.strands.get(place.strand());
            if (above.stamp().wrapping_sub(stamp) as i32) < 0 {
                above.set_stamp(stamp);
            }
            self.trim(shared, place.strand());
        }
    }

    /// Strands that were matched count as used now, and those above them.
    pub(super) fn note_matches(&mut self, shared: &Shared, strands: &[StrandNo]) {
        self.clock = self.clock.wrapping_add(1);
        for strand in strands {
            let header = shared.strands.get(*strand);
            if header.blocks() > 0 {
                header.set_stamp(self.clock);
            }
        }
    }
}
