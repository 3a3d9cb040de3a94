//! Changes: storing, removing, clearing.
//!
//! A key's place never moves. A block that nobody holds any more stays as long as one that follows it is held, so that
//! the known part of a chain is always a beginning and a hole heals where it was; with the last held descendant it
//! goes at once.

use std::sync::atomic::{AtomicU64, Ordering};

use kvatlas_proto::{BlockKey, Digest};

use super::locate::Base;
use super::raw::{Limbo, Owned, Token};
use super::sets::SetWriter;
use super::sets::{EMPTY, SetNo};
use super::strand::{Header, MAX_BLOCKS, MAX_STRANDS, Parent, Place, Step, StrandNo, prefetch, spill_words};
use super::table::TableWriter;
use super::{EngineLimits, Freed, Holder, MAX_HOLDERS, Removed, Retired, Shared, Stored};

/// Children whose offsets are read to learn which is the highest one left. Above that the old bound stays: blocks may
/// be kept a little too long, until children are fewer.
const KIDS_READ: usize = 64;
/// Cost of a strand in a slice of a removal, in blocks: what its header and sets cost beside the blocks.
const STRAND_COST: usize = 16;
/// Strands in a holder's list from which on it is tidied whenever it has doubled.
const TIDY_FROM: usize = 64;

/// What only the writer has.
pub(super) struct Writer {
    pub(super) token: Token,
    pub(super) limbo: Limbo,
    pub(super) freed: Freed,
    pub(super) table: TableWriter,
    pub(super) sets: SetWriter,
    pub(super) free_strands: Vec<StrandNo>,
    /// Strand numbers below this were given out.
    pub(super) top: StrandNo,
    pub(super) holders: Vec<HolderState>,
    /// (holder, block) pairs.
    pub(super) entries: usize,
    /// Blocks that somebody holds.
    pub(super) distinct: usize,
    /// Bytes of keys, steps and holders' lists.
    pub(super) array_bytes: usize,
    /// Counts stores and matches; what strands are stamped with.
    pub(super) clock: u32,
    /// Where the search for something to evict goes on.
    pub(super) hand: StrandNo,
    pub(super) evicted: u64,
    pub(super) limits: EngineLimits,
    old: Vec<Step>,
    new: Vec<Step>,
}

#[derive(Default)]
pub(super) struct HolderState {
    /// Strands in which it holds something, and some in which it did; repeats are possible.
    pub(super) strands: Vec<StrandNo>,
    pub(super) blocks: usize,
    pub(super) digest: Digest,
    /// Length of the list after it was last tidied.
    tidied: usize,
}

/// What new blocks follow.
type Attach = Parent;

/// What became of blocks that were to be added.
struct Appended {
    /// What the next block would follow.
    last: Attach,
    /// How many were not added.
    left: usize,
    /// The first of them is known already; otherwise there was no room.
    met_known: bool,
}

// === impl Writer ===

impl Writer {
    pub(super) fn new(shared: &Shared, table: TableWriter, limits: EngineLimits) -> Self {
        shared.strands.grow_to(0);
        Self {
            token: Token::new(),
            limbo: Limbo::default(),
            freed: Freed::default(),
            table,
            sets: SetWriter::new(&shared.sets),
            free_strands: Vec::new(),
            top: 1,
            holders: Vec::new(),
            entries: 0,
            distinct: 0,
            array_bytes: 0,
            clock: 0,
            hand: 1,
            evicted: 0,
            limits,
            old: Vec::new(),
            new: Vec::new(),
        }
    }

    pub(super) fn store(
        &mut self,
        shared: &Shared,
        holder: Holder,
        parent: Option<BlockKey>,
        keys: &[BlockKey],
    ) -> Stored {
        let mut stored = Stored::default();
        if keys.is_empty() {
            return stored;
        }
        if !self.has_room(shared) || !self.admit(holder) {
            stored.refused = keys.len();
            return stored;
        }
        self.clock = self.clock.wrapping_add(1);
        let before = (self.entries, self.distinct);
        let mut left = if shared.floating.load(Ordering::Relaxed) == 0 {
            self.store_chain(shared, holder, parent, keys)
        } else {
            self.store_each(shared, holder, parent, keys)
        };
        if left == Err(NotAChain) {
            left = self.store_each(shared, holder, parent, keys);
        }
        stored.refused = left.unwrap_or(0);
        stored.new = self.entries - before.0;
        stored.new_keys = self.distinct.saturating_sub(before.1);
        self.tidy(shared);
        stored
    }

    /// Stores keys of which a beginning is known and the rest is not. Returns how many were refused.
    fn store_chain(
        &mut self,
        shared: &Shared,
        holder: Holder,
        parent: Option<BlockKey>,
        keys: &[BlockKey],
    ) -> Result<usize, NotAChain> {
        let mut attach = None;
        let known = if let [key] = keys {
            attach = self.place_of(shared, *key);
            usize::from(attach.is_some())
        } else {
            let base = Base::Root;
            match shared.deepest(base, keys, &self.token) {
                Ok(Some(deepest)) => {
                    attach = Some(deepest.place);
                    deepest.at + 1
                }
                _ => 0,
            }
        };
        let (mut left, mut at) = (known as u32, attach);
        while left > 0 {
            let place = at.ok_or(NotAChain)?;
            let (strand, end) = (place.strand(), place.offset() + 1);
            let take = left.min(end);
            if shared.strands.get(strand).key(end - take, &self.token) != keys[(left - take) as usize] {
                return Err(NotAChain);
            }
            self.edit(shared, strand, end - take, end, holder, true);
            left -= take;
            at = match shared.strands.get(strand).parent() {
                Parent::At(parent) => Some(parent),
                Parent::Root | Parent::Unknown => None,
            };
        }
        let fresh = &keys[known..];
        if fresh.is_empty() {
            return Ok(0);
        }
        let attach = match (attach, parent) {
            (Some(place), _) => Attach::At(place),
            (None, None) => Attach::Root,
            (None, Some(parent)) => match self.place_or_ghost(shared, parent) {
                Some(place) => Attach::At(place),
                None => return Ok(fresh.len()),
            },
        };
        let appended = self.append(shared, Some(holder), attach, fresh);
        let left = &fresh[fresh.len() - appended.left..];
        if appended.met_known {
            let before = keys[..keys.len() - left.len()].last().copied().or(parent);
            return self.store_each(shared, holder, before, left);
        }
        if !left.is_empty() {
            self.trim_at(shared, attach);
        }
        Ok(left.len())
    }

    /// Stores keys of which any may be known, and gives strands whose beginning was unknown their parent.
    fn store_each(
        &mut self,
        shared: &Shared,
        holder: Holder,
        parent: Option<BlockKey>,
        keys: &[BlockKey],
    ) -> Result<usize, NotAChain> {
        let mut attach = match parent {
            None => Attach::Root,
            Some(parent) => match self.place_or_ghost(shared, parent) {
                Some(place) => Attach::At(place),
                None => return Ok(keys.len()),
            },
        };
        let first = attach;
        let mut at = 0;
        while at < keys.len() {
            if let Some(place) = self.place_of(shared, keys[at]) {
                if place.offset() == 0 && shared.strands.get(place.strand()).parent() == Parent::Unknown {
                    self.adopt(shared, place.strand(), attach);
                }
                // Joining may have moved it.
                let place = self.place_of(shared, keys[at]).ok_or(NotAChain)?;
                self.edit(shared, place.strand(), place.offset(), place.offset() + 1, holder, true);
                attach = Attach::At(place);
                at += 1;
                continue;
            }
            let known = |key: &&BlockKey| self.place_of(shared, **key).is_none();
            let run = keys[at..].iter().take_while(known).count();
            let appended = self.append(shared, Some(holder), attach, &keys[at..at + run]);
            attach = appended.last;
            at += run - appended.left;
            if appended.left > 0 && !appended.met_known {
                self.trim_at(shared, first);
                return Ok(keys.len() - at);
            }
        }
        self.trim_at(shared, first);
        Ok(0)
    }

    /// Forgets a block that was added for a child which then did not come.
    fn trim_at(&mut self, shared: &Shared, attach: Attach) {
        if let Attach::At(place) = attach
            && shared.strands.get(place.strand()).blocks() > 0
        {
            self.trim(shared, place.strand());
        }
    }

    pub(super) fn remove(&mut self, shared: &Shared, holder: Holder, keys: &[BlockKey]) -> Removed {
        let mut removed = Removed::default();
        if self.holders.get(holder.0 as usize).is_none_or(|state| state.blocks == 0) {
            return removed;
        }
        let before = (self.entries, self.distinct);
        let mut at = 0;
        while at < keys.len() {
            if let Some(ahead) = keys.get(at + 16) {
                shared.table.prefetch(shared.table.hash(*ahead), &self.token);
            }
            let Some(place) = self.place_of(shared, keys[at]) else {
                at += 1;
                continue;
            };
            let (low, high, taken) = self.stretch(shared, place, &keys[at..]);
            self.edit(shared, place.strand(), low, high, holder, false);
            self.trim(shared, place.strand());
            at += taken;
        }
        removed.blocks = before.0 - self.entries;
        removed.last_copies = before.1 - self.distinct;
        self.tidy(shared);
        removed
    }

    /// The part of a strand that a list of keys goes through, up or down, and how many keys that are.
    fn stretch(&self, shared: &Shared, place: Place, keys: &[BlockKey]) -> (u32, u32, usize) {
        let header = shared.strands.get(place.strand());
        let (at, blocks) = (place.offset(), header.blocks());
        let mine = header.keys.load(&self.token);
        let is = |offset: u32, key: BlockKey| mine[offset as usize].load(Ordering::Relaxed) == key.0;
        let mut down = 1;
        while down < keys.len() && down as u32 <= at && is(at - down as u32, keys[down]) {
            down += 1;
        }
        if down > 1 {
            return (at + 1 - down as u32, at + 1, down);
        }
        let mut up = 1;
        while up < keys.len() && at + (up as u32) < blocks && is(at + up as u32, keys[up]) {
            up += 1;
        }
        (at, at + up as u32, up)
    }

    /// The first half of a clear: the list of what is to be taken from the holder.
    pub(super) fn retire(&mut self, holder: Holder) -> Retired {
        let Some(state) = self.holders.get_mut(holder.0 as usize) else {
            return Retired { holder, strands: Vec::new(), blocks: 0 };
        };
        state.tidied = 0;
        let strands = std::mem::take(&mut state.strands);
        self.array_bytes -= strands.capacity() * 4;
        Retired { holder, blocks: state.blocks, strands }
    }

    /// The second half, a piece of it: about `blocks` blocks. True when nothing is left.
    pub(super) fn release(&mut self, shared: &Shared, retired: &mut Retired, blocks: usize) -> bool {
        let mut cost = 0;
        while cost < blocks
            && let Some(strand) = retired.strands.pop()
        {
            if let Some(ahead) = retired.strands.len().checked_sub(8) {
                prefetch(&shared.strands, Place::new(retired.strands[ahead], 0));
            }
            cost += STRAND_COST;
            // The strand may be gone, or be another one by now; then the holder has nothing in it.
            let length = shared.strands.get(strand).blocks();
            if length > 0 {
                cost += self.edit(shared, strand, 0, length, retired.holder, false) as usize;
                self.trim(shared, strand);
            }
            self.tidy(shared);
        }
        retired.strands.is_empty()
    }

    /// Calls with each stretch of consecutive blocks of a holder and the key that the stretch follows.
    pub(super) fn each_run(
        &self,
        shared: &Shared,
        holder: Holder,
        mut with: impl FnMut(Option<BlockKey>, &[BlockKey]),
    ) {
        let Some(state) = self.holders.get(holder.0 as usize) else { return };
        let mut strands = state.strands.clone();
        strands.sort_unstable();
        strands.dedup();
        let mut keys = Vec::new();
        for strand in strands {
            let header = shared.strands.get(strand);
            let length = header.blocks();
            let steps = header.steps(&self.token);
            let count = if length == 0 { 0 } else { steps.len() };
            let held = |at: usize| shared.sets.get(steps.at(at).set).contains(holder.0, &self.token);
            let mut at = 0;
            while at < count {
                if !held(at) {
                    at += 1;
                    continue;
                }
                let start = steps.at(at).start;
                while at < count && held(at) {
                    at += 1;
                }
                let end = if at < count { steps.at(at).start } else { length };
                keys.clear();
                keys.extend((start..end).map(|offset| header.key(offset, &self.token)));
                with(self.key_before(shared, strand, start), &keys);
            }
        }
    }

    fn key_before(&self, shared: &Shared, strand: StrandNo, offset: u32) -> Option<BlockKey> {
        let header = shared.strands.get(strand);
        if offset > 0 {
            return Some(header.key(offset - 1, &self.token));
        }
        match header.parent() {
            Parent::At(place) => Some(shared.strands.get(place.strand()).key(place.offset(), &self.token)),
            Parent::Root | Parent::Unknown => None,
        }
    }

    pub(super) fn holds(&self, shared: &Shared, holder: Holder, key: BlockKey) -> bool {
        self.place_of(shared, key).is_some_and(|place| {
            let step = shared.strands.get(place.strand()).steps(&self.token).covering(place.offset());
            shared.sets.get(step.set).contains(holder.0, &self.token)
        })
    }

    #[inline]
    pub(super) fn place_of(&self, shared: &Shared, key: BlockKey) -> Option<Place> {
        shared.table.find(shared.table.hash(key), &self.token, |place| {
            let header = shared.strands.get(place.strand());
            place.offset() < header.blocks() && header.key(place.offset(), &self.token) == key
        })
    }

    /// Where the key is; one that is not known becomes a block that nobody holds, of unknown beginning.
    fn place_or_ghost(&mut self, shared: &Shared, key: BlockKey) -> Option<Place> {
        if let Some(place) = self.place_of(shared, key) {
            return Some(place);
        }
        match self.append(shared, None, Attach::Unknown, &[key]) {
            Appended { last: Attach::At(place), left: 0, .. } => Some(place),
            _ => None,
        }
    }

    /// Adds blocks that are not known, up to the first that is: a list may name a key twice, or one that was said to
    /// follow another block.
    fn append(
        &mut self,
        shared: &Shared,
        holder: Option<Holder>,
        mut attach: Attach,
        mut keys: &[BlockKey],
    ) -> Appended {
        let set = match holder {
            None => EMPTY,
            Some(holder) => match self.sets.toggled(&shared.sets, EMPTY, holder.0, true, &self.token) {
                Some(set) => set,
                None => return Appended { last: attach, left: keys.len(), met_known: false },
            },
        };
        while !keys.is_empty() {
            let open = match attach {
                Attach::At(place) => {
                    let blocks = shared.strands.get(place.strand()).blocks();
                    (place.offset() + 1 == blocks && blocks < MAX_BLOCKS).then_some(place.strand())
                }
                Attach::Root | Attach::Unknown => None,
            };
            let strand = match open {
                Some(strand) => strand,
                None => match self.new_strand(shared, attach) {
                    Some(strand) => strand,
                    None => return Appended { last: attach, left: keys.len(), met_known: false },
                },
            };
            let header = shared.strands.get(strand);
            let from = header.blocks();
            let take = keys.len().min((MAX_BLOCKS - from) as usize);
            let (now, rest) = keys.split_at(take);
            for key in now {
                shared.table.prefetch(shared.table.hash(*key), &self.token);
            }
            self.extend(shared, header, strand, now, set, holder);
            let (mut inserted, mut met_known) = (0, false);
            for (offset, key) in (from..).zip(now) {
                let place = Place::new(strand, offset);
                let hash = shared.table.hash(*key);
                // The line is at hand: the insertion needs it too.
                if self.place_of(shared, *key).is_some() {
                    met_known = true;
                    break;
                }
                let done =
                    self.table.insert(&shared.table, hash, place, &self.token, &shared.pins, &mut self.limbo);
                if done.is_err() {
                    break;
                }
                inserted += 1;
            }
            if inserted < take {
                self.cut_back(shared, strand, from + inserted as u32, from + take as u32, holder);
                if let Some(last) = (from + inserted as u32).checked_sub(1).filter(|_| inserted > 0) {
                    attach = Attach::At(Place::new(strand, last));
                }
                return Appended { last: attach, left: keys.len() - inserted, met_known };
            }
            attach = Attach::At(Place::new(strand, from + take as u32 - 1));
            keys = rest;
        }
        Appended { last: attach, left: 0, met_known: false }
    }

    /// Undoes the end of an [`Self::extend`] whose keys found no place in the table.
    #[cold]
    fn cut_back(&mut self, shared: &Shared, strand: StrandNo, keep: u32, end: u32, holder: Option<Holder>) {
        if let Some(holder) = holder {
            self.edit(shared, strand, keep, end, holder, false);
        }
        self.shorten(shared, strand, keep);
        if keep > 0 {
            self.trim(shared, strand);
        }
    }

    /// Writes keys and their holder at the end of a strand.
    fn extend(
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

    /// Adds a holder to, or takes it from, the blocks `low..high` of a strand. Returns for how many that was news.
    #[inline]
    fn edit(
        &mut self,
        shared: &Shared,
        strand: StrandNo,
        low: u32,
        high: u32,
        holder: Holder,
        add: bool,
    ) -> u32 {
        let header = shared.strands.get(strand);
        let length = header.blocks();
        let steps = header.steps(&self.token);
        let count = steps.len();
        let (mut old, mut new) = (std::mem::take(&mut self.old), std::mem::take(&mut self.new));
        old.clear();
        new.clear();
        let (mut changed, mut came, mut went, mut had) = (0, 0, 0, false);
        for at in 0..count {
            let step = steps.at(at);
            let end = if at + 1 < count { steps.at(at + 1).start } else { length };
            old.push(step);
            let entry = shared.sets.get(step.set);
            let held = entry.contains(holder.0, &self.token);
            had |= held;
            let (from, to) = (step.start.max(low), end.min(high));
            if from >= to || held == add {
                push_step(&mut new, step);
                continue;
            }
            let Some(set) = self.sets.toggled(&shared.sets, step.set, holder.0, add, &self.token) else {
                push_step(&mut new, step);
                continue;
            };
            if step.start < from {
                push_step(&mut new, step);
            }
            push_step(&mut new, Step { start: from, set });
            if to < end {
                push_step(&mut new, Step { start: to, set: step.set });
            }
            let digest = &mut self.holders[holder.0 as usize].digest;
            for offset in from..to {
                let key = header.key(offset, &self.token);
                if add { digest.add(key) } else { digest.remove(key) }
            }
            changed += to - from;
            came += if step.set == EMPTY { to - from } else { 0 };
            went += if set == EMPTY { to - from } else { 0 };
        }
        if changed > 0 {
            new.iter().for_each(|step| self.sets.refer(step.set));
            old.iter().for_each(|step| self.sets.release(step.set));
            header.begin();
            self.write_steps(shared, header, &new);
            if add {
                header.set_stamp(self.clock);
            }
            header.end();
            let state = &mut self.holders[holder.0 as usize];
            if add {
                state.blocks += changed as usize;
                self.entries += changed as usize;
                self.distinct += came as usize;
                if !had {
                    self.note_strand(shared, holder, strand);
                }
            } else {
                state.blocks -= changed as usize;
                self.entries -= changed as usize;
                self.distinct -= went as usize;
            }
        } else if add {
            header.set_stamp(self.clock);
        }
        (self.old, self.new) = (old, new);
        changed
    }

    /// Writes steps; between `begin` and `end` of the header.
    fn write_steps(&mut self, shared: &Shared, header: &Header, steps: &[Step]) {
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
    fn shorten(&mut self, shared: &Shared, strand: StrandNo, keep: u32) {
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
            self.detach(shared, strand);
            self.limbo.strand(&shared.pins, strand);
        }
    }

    /// A strand without blocks; the caller extends it at once.
    fn new_strand(&mut self, shared: &Shared, attach: Attach) -> Option<StrandNo> {
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
        self.attach(shared, strand, attach);
        Some(strand)
    }

    /// Hangs a strand below its parent.
    pub(super) fn attach(&mut self, shared: &Shared, strand: StrandNo, attach: Attach) {
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
    pub(super) fn detach(&mut self, shared: &Shared, strand: StrandNo) {
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
    fn adopt(&mut self, shared: &Shared, strand: StrandNo, attach: Attach) {
        if let Attach::At(place) = attach
            && self.is_above(shared, strand, place.strand())
        {
            // Two sources contradict each other about who follows whom. The first one stays right.
            return;
        }
        self.detach(shared, strand);
        self.attach(shared, strand, attach);
    }

    /// True if `strand` is `below` or one of those above it.
    fn is_above(&self, shared: &Shared, strand: StrandNo, below: StrandNo) -> bool {
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

    fn admit(&mut self, holder: Holder) -> bool {
        if holder.0 >= MAX_HOLDERS {
            return false;
        }
        if self.holders.len() <= holder.0 as usize {
            self.holders.resize_with(holder.0 as usize + 1, HolderState::default);
        }
        true
    }

    /// The holder has something in this strand from now on.
    fn note_strand(&mut self, shared: &Shared, holder: Holder, strand: StrandNo) {
        let Self { holders, token, .. } = self;
        let state = &mut holders[holder.0 as usize];
        let before = state.strands.capacity();
        if state.strands.len() == before && before >= TIDY_FROM.max(2 * state.tidied) {
            // What it held once and does not any more, and repeats, go; so the list stays in proportion.
            state.strands.sort_unstable();
            state.strands.dedup();
            state.strands.retain(|strand| {
                let header = shared.strands.get(*strand);
                let is_in = |step: Step| shared.sets.get(step.set).contains(holder.0, token);
                header.blocks() > 0 && header.steps(token).iter().any(is_in)
            });
            state.tidied = state.strands.len();
        }
        if state.strands.len() == before {
            // A quarter more: doubling would cost as much as the lists themselves.
            state.strands.reserve_exact((before / 4).max(8));
        }
        state.strands.push(strand);
        self.array_bytes += (state.strands.capacity() - before) * 4;
    }

    /// Housekeeping after each change, when nothing refers to old arrays any more.
    #[inline]
    pub(super) fn tidy(&mut self, shared: &Shared) {
        self.sets.sweep(&shared.sets, &self.token, &shared.pins, &mut self.limbo);
        self.limbo.collect(&mut self.token, &shared.pins, &mut self.freed);
        if !self.freed.strands.is_empty() {
            self.free_strands.append(&mut self.freed.strands);
        }
        if !self.freed.sets.is_empty() {
            let mut sets = std::mem::take(&mut self.freed.sets);
            self.sets.recycle(&shared.sets, &mut sets, &shared.pins, &mut self.limbo, &self.token);
            self.freed.sets = sets;
        }
    }
}

/// Keys are not a chain as the engine knows it.
#[derive(Debug, PartialEq, Eq)]
struct NotAChain;

/// Adds a step, or lengthens the one before if that has the same holders.
#[inline]
fn push_step(steps: &mut Vec<Step>, step: Step) {
    if steps.last().is_none_or(|last| last.set != step.set) {
        steps.push(step);
    }
}

/// Length of the array for this many keys: an eighth more for those that follow, and odd, which with malloc's own
/// word makes full pairs.
fn key_capacity(keys: usize) -> usize {
    (keys + (keys / 8).min(64) + 2) | 1
}
