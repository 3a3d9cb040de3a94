//! How strands grow, shrink, and hang together. Writer only.

use std::sync::atomic::{AtomicU64, Ordering};

use kvatlas_proto::BlockKey;

use super::raw::Owned;
use super::sets::{EMPTY, SetNo};
use super::strand::{Header, MAX_STRANDS, Parent, Place, Step, StrandNo, spill_words};
use super::write::{Attach, Writer};
use super::{Holder, Shared};

/// Children whose offsets are read to learn which is the highest one left. Above that the old bound stays: blocks may
/// be kept a little too long, until children are fewer.
const KIDS_READ: usize = 64;

impl Writer {
    /// Writes keys and their holder at the end of a strand.
    pub(super) fn extend(
        &mut self,
        shared: &Shared,
        header: &Header,
        strand: StrandNo,
        keys: &[BlockKey],
        set: SetNo,
        holder: Option<Holder>,
    ) {
        let from = header.blocks();
        let need = from as usize + keys.len();
        let mine = header.keys.load(&self.token);
        let array = (need > mine.len()).then(|| {
            let array = Owned::<AtomicU64>::zeroed(key_capacity(need));
            for (new, old) in array.iter().zip(&mine[..from as usize]) {
                new.store(old.load(Ordering::Relaxed), Ordering::Relaxed);
            }
            self.array_bytes += Owned::<AtomicU64>::bytes_of(array.len());
            if !mine.is_empty() {
                self.array_bytes -= Owned::<AtomicU64>::bytes_of(mine.len());
            }
            array
        });
        let room: &[AtomicU64] = array.as_deref().unwrap_or(mine);
        for (word, key) in room[from as usize..].iter().zip(keys) {
            word.store(key.0, Ordering::Relaxed);
        }
        let steps = header.steps(&self.token);
        let count = if from == 0 { 0 } else { steps.len() };
        let merges = count > 0 && steps.at(count - 1).set == set;
        self.old.clear();
        if !merges {
            self.old.extend((0..count).map(|at| steps.at(at)));
            self.old.push(Step { start: from, set });
            self.sets.refer(set);
        }
        if let Some(holder) = holder {
            let before = &self.old[..self.old.len().saturating_sub(1)];
            let had =
                merges || before.iter().any(|step| shared.sets.get(step.set).contains(holder.0, &self.token));
            if !had {
                self.note_strand(shared, holder, strand);
            }
            let state = &mut self.holders[holder.0 as usize];
            state.blocks += keys.len();
            keys.iter().for_each(|key| state.digest.add(*key));
            self.entries += keys.len();
            self.distinct += keys.len();
        }
        header.begin();
        if let Some(array) = array {
            self.limbo.words(&shared.pins, header.keys.swap(Some(array)));
        }
        if !merges {
            let steps = std::mem::take(&mut self.old);
            self.write_steps(shared, header, &steps);
            self.old = steps;
        }
        header.set_blocks(need as u32);
        header.set_stamp(self.clock);
        header.end();
    }

    /// Writes steps; between `begin` and `end` of the header.
    pub(super) fn write_steps(&mut self, shared: &Shared, header: &Header, steps: &[Step]) {
        let need = spill_words(steps);
        let have = header.spill().load(&self.token).len();
        if need > have || have > 16 + 4 * need {
            let array = (need > 0).then(|| Owned::<AtomicU64>::zeroed((need + need / 4).max(6)));
            if have > 0 {
                self.array_bytes -= Owned::<AtomicU64>::bytes_of(have);
            }
            self.array_bytes += array.as_ref().map_or(0, |array| Owned::<AtomicU64>::bytes_of(array.len()));
            self.limbo.words(&shared.pins, header.spill().swap(array));
        }
        let written = header.set_steps(steps, &self.token);
        debug_assert!(written);
    }

    /// Forgets blocks at a strand's end that nobody holds and nothing follows, then the same above it.
    pub(super) fn trim(&mut self, shared: &Shared, strand: StrandNo) {
        let mut strand = strand;
        loop {
            let header = shared.strands.get(strand);
            let steps = header.steps(&self.token);
            let last = steps.at(steps.len() - 1);
            if last.set != EMPTY {
                return;
            }
            let keep = last.start.max(header.kids_end());
            let length = header.blocks();
            if keep >= length {
                return;
            }
            for offset in (keep..length).rev() {
                let hash = shared.table.hash(header.key(offset, &self.token));
                shared.table.prefetch(hash, &self.token);
            }
            let parent = header.parent();
            self.forget_keys(shared, strand, keep, length);
            if keep > 0 {
                return;
            }
            match parent {
                Parent::At(place) => strand = place.strand(),
                Parent::Root | Parent::Unknown => return,
            }
        }
    }

    /// Forgets a block that was added for a child which then did not come.
    pub(super) fn trim_at(&mut self, shared: &Shared, attach: Attach) {
        if let Attach::At(place) = attach
            && shared.strands.get(place.strand()).blocks() > 0
        {
            self.trim(shared, place.strand());
        }
    }

    /// Shortens a strand, then takes the keys out of the table.
    pub(super) fn forget_keys(&mut self, shared: &Shared, strand: StrandNo, keep: u32, length: u32) {
        let header = shared.strands.get(strand);
        // The array leaves with the last block but is not freed before the next `tidy`; read it first.
        let mut hashes = smallvec::SmallVec::<[_; 64]>::new();
        for offset in keep..length {
            hashes.push(shared.table.hash(header.key(offset, &self.token)));
        }
        self.shorten(shared, strand, keep);
        for (offset, hash) in (keep..length).zip(hashes).rev() {
            let place = Place::new(strand, offset);
            self.table.remove(&shared.table, hash, place, &self.token, &shared.pins, &mut self.limbo);
        }
    }

    /// Shortens a strand whose end nobody holds; one without blocks is given up.
    pub(super) fn shorten(&mut self, shared: &Shared, strand: StrandNo, keep: u32) {
        let header = shared.strands.get(strand);
        let steps = header.steps(&self.token);
        let mut kept = std::mem::take(&mut self.new);
        kept.clear();
        for step in steps.iter() {
            if step.start < keep {
                kept.push(step);
            } else {
                self.sets.release(step.set);
            }
        }
        header.begin();
        self.write_steps(shared, header, &kept);
        header.set_blocks(keep);
        let capacity = header.keys.load(&self.token).len();
        let bytes = Owned::<AtomicU64>::bytes_of(capacity);
        if keep == 0 {
            self.array_bytes -= bytes;
            self.limbo.words(&shared.pins, header.keys.swap(None));
        } else if capacity > 2 * key_capacity(keep as usize) {
            let array = Owned::<AtomicU64>::zeroed(key_capacity(keep as usize));
            for (new, old) in array.iter().zip(header.keys.load(&self.token)) {
                new.store(old.load(Ordering::Relaxed), Ordering::Relaxed);
            }
            self.array_bytes = self.array_bytes - bytes + Owned::<AtomicU64>::bytes_of(array.len());
            self.limbo.words(&shared.pins, header.keys.swap(Some(array)));
        }
        header.end();
        self.new = kept;
        if keep == 0 {
            Self::detach(shared, strand);
            self.limbo.strand(&shared.pins, strand);
        }
    }

    /// A strand without blocks; the caller extends it at once.
    pub(super) fn new_strand(&mut self, shared: &Shared, attach: Attach) -> Option<StrandNo> {
        let strand = match self.free_strands.pop() {
            Some(strand) => strand,
            None if self.top < MAX_STRANDS => {
                shared.strands.grow_to(self.top);
                self.top += 1;
                self.top - 1
            }
            None => return None,
        };
        let header = shared.strands.get(strand);
        header.begin();
        header.set_first_kid(0);
        header.set_kids(0, 0);
        header.end();
        Self::attach(shared, strand, attach);
        Some(strand)
    }

    /// Hangs a strand below its parent.
    pub(super) fn attach(shared: &Shared, strand: StrandNo, attach: Attach) {
        let header = shared.strands.get(strand);
        header.begin();
        header.set_parent(attach);
        header.end();
        match attach {
            Attach::Root => {}
            Attach::Unknown => {
                shared.floating.fetch_add(1, Ordering::Relaxed);
            }
            Attach::At(place) => {
                let parent = shared.strands.get(place.strand());
                let next = parent.first_kid();
                header.set_siblings(0, next);
                if next != 0 {
                    let (_, after) = shared.strands.get(next).siblings();
                    shared.strands.get(next).set_siblings(strand, after);
                }
                parent.begin();
                parent.set_first_kid(strand);
                let end = parent.kids_end().max(place.offset() + 1);
                parent.set_kids(end, parent.kids_filter() | 1 << (place.offset() % 32));
                parent.end();
            }
        }
    }

    /// Takes a strand away from its parent.
    pub(super) fn detach(shared: &Shared, strand: StrandNo) {
        let header = shared.strands.get(strand);
        let place = match header.parent() {
            Parent::Root => return,
            Parent::Unknown => {
                shared.floating.fetch_sub(1, Ordering::Relaxed);
                return;
            }
            Parent::At(place) => place,
        };
        let parent = shared.strands.get(place.strand());
        let (previous, next) = header.siblings();
        if previous == 0 {
            parent.set_first_kid(next);
        } else {
            let (before, _) = shared.strands.get(previous).siblings();
            shared.strands.get(previous).set_siblings(before, next);
        }
        if next != 0 {
            let (_, after) = shared.strands.get(next).siblings();
            shared.strands.get(next).set_siblings(previous, after);
        }
        if place.offset() + 1 == parent.kids_end() || parent.first_kid() == 0 {
            let (mut end, mut filter, mut kid) = (0, 0, parent.first_kid());
            for _ in 0..KIDS_READ {
                if kid == 0 {
                    parent.begin();
                    parent.set_kids(end, filter);
                    parent.end();
                    return;
                }
                let header = shared.strands.get(kid);
                if let Parent::At(place) = header.parent() {
                    end = end.max(place.offset() + 1);
                    filter |= 1 << (place.offset() % 32);
                }
                kid = header.siblings().1;
            }
        }
    }

    /// Gives a strand of unknown beginning its parent.
    pub(super) fn adopt(shared: &Shared, strand: StrandNo, attach: Attach) {
        if let Attach::At(place) = attach
            && Self::is_above(shared, strand, place.strand())
        {
            // Two sources contradict each other about who follows whom. The first one stays right.
            return;
        }
        Self::detach(shared, strand);
        Self::attach(shared, strand, attach);
    }

    /// True if `strand` is `below` or one of those above it.
    pub(super) fn is_above(shared: &Shared, strand: StrandNo, below: StrandNo) -> bool {
        let mut at = below;
        loop {
            if at == strand {
                return true;
            }
            match shared.strands.get(at).parent() {
                Parent::At(place) => at = place.strand(),
                Parent::Root | Parent::Unknown => return false,
            }
        }
    }

    /// Undoes the end of an [`Self::extend`] whose keys found no place in the table.
    #[cold]
    pub(super) fn cut_back(
        &mut self,
        shared: &Shared,
        strand: StrandNo,
        keep: u32,
        end: u32,
        holder: Option<Holder>,
    ) {
        if let Some(holder) = holder {
            self.edit(shared, strand, keep, end, holder, false);
        }
        self.shorten(shared, strand, keep);
        if keep > 0 {
            self.trim(shared, strand);
        }
    }
}

/// Length of the array for this many keys: a sixteenth more for those that follow, and odd, which with malloc's own
/// word makes full pairs.
fn key_capacity(keys: usize) -> usize {
    (keys + (keys / 16).min(64) + 2) | 1
}
