//! Changes: storing and removing.
//!
//! A key's place never moves. A block that nobody holds any more stays as long as one that follows it is held, so that
//! the known part of a chain is always a beginning and a hole heals where it was; with the last held descendant it
//! goes at once.

use std::sync::atomic::Ordering;

use kvatlas_proto::{BlockKey, Digest};

use super::ahead::Hints;
use super::locate::Base;
use super::raw::{Limbo, Token};
use super::sets::{EMPTY, SetWriter};
use super::strand::{MAX_BLOCKS, Parent, Place, Step, StrandNo};
use super::table::{Hash, TableWriter};
use super::{EngineLimits, Freed, Holder, MAX_HOLDERS, Removed, Shared, Stored};

/// Keys whose second lines are asked for before the first of them is put into the table.
const INSERTED_TOGETHER: usize = 16;

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
    pub(super) old: Vec<Step>,
    pub(super) new: Vec<Step>,
    pub(super) hints: Hints,
}

#[derive(Default)]
pub(super) struct HolderState {
    /// Strands in which it holds something, and some in which it did; repeats are possible.
    pub(super) strands: Vec<StrandNo>,
    pub(super) blocks: usize,
    pub(super) digest: Digest,
    /// Length of the list after it was last tidied.
    pub(super) tidied: usize,
}

/// What new blocks follow.
pub(super) type Attach = Parent;

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
            hints: Hints::default(),
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
                    Self::adopt(shared, place.strand(), attach);
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
            let Some(place) = self.place_of_first(shared, keys[at]) else {
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

    #[inline]
    pub(super) fn place_of(&self, shared: &Shared, key: BlockKey) -> Option<Place> {
        shared.table.find(shared.table.hash(key), &self.token, |place| self.is_at(shared, place, key))
    }

    /// The same for a key that a change begins at: what was found out ahead saves the search.
    #[inline]
    fn place_of_first(&self, shared: &Shared, key: BlockKey) -> Option<Place> {
        match self.hints.of(key) {
            Some(place) if self.is_at(shared, place, key) => Some(place),
            _ => self.place_of(shared, key),
        }
    }

    #[inline]
    fn is_at(&self, shared: &Shared, place: Place, key: BlockKey) -> bool {
        let header = shared.strands.get(place.strand());
        place.offset() < header.blocks() && header.key(place.offset(), &self.token) == key
    }

    /// Where the key is; one that is not known becomes a block that nobody holds, of unknown beginning.
    fn place_or_ghost(&mut self, shared: &Shared, key: BlockKey) -> Option<Place> {
        if let Some(place) = self.place_of_first(shared, key) {
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
            let inserted = self.insert(shared, Place::new(strand, from), now);
            if inserted < take {
                let met_known = self.place_of(shared, now[inserted]).is_some();
                self.cut_back(shared, strand, from + inserted as u32, from + take as u32, holder);
                if let Some(last) = (from + inserted as u32).checked_sub(1).filter(|_| inserted > 0) {
                    attach = Attach::At(Place::new(strand, last));
                }
                return Appended { last: attach, left: keys.len() - inserted, met_known };
            }
            let last = Place::new(strand, from + take as u32 - 1);
            self.hints.stored(now[take - 1], last);
            attach = Attach::At(last);
            keys = rest;
        }
        Appended { last: attach, left: 0, met_known: false }
    }

    /// Puts consecutive keys into the table; the first one is at `first`. Returns how many found room and were not there.
    fn insert(&mut self, shared: &Shared, first: Place, keys: &[BlockKey]) -> usize {
        let mut inserted = 0;
        for batch in keys.chunks(INSERTED_TOGETHER) {
            if keys.len() > 1 {
                let mut full = [Hash::default(); INSERTED_TOGETHER];
                let mut count = 0;
                for key in batch {
                    full[count] = shared.table.hash(*key);
                    count += usize::from(shared.table.prefetch_if_full(full[count], 1, &self.token));
                }
                for hash in &full[..count] {
                    shared.table.prefetch_if_full(*hash, 2, &self.token);
                }
            }
            for key in batch {
                // The line is at hand: the insertion needs it too.
                if self.place_of(shared, *key).is_some() {
                    return inserted;
                }
                let (hash, place) = (shared.table.hash(*key), first.forward(inserted as u32));
                let Self { table, token, limbo, .. } = self;
                if table.insert(&shared.table, hash, place, token, &shared.pins, limbo).is_err() {
                    return inserted;
                }
                inserted += 1;
            }
        }
        inserted
    }

    /// Adds a holder to, or takes it from, the blocks `low..high` of a strand. Returns for how many that was news.
    #[inline]
    pub(super) fn edit(
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

    fn admit(&mut self, holder: Holder) -> bool {
        if holder.0 >= MAX_HOLDERS {
            return false;
        }
        if self.holders.len() <= holder.0 as usize {
            self.holders.resize_with(holder.0 as usize + 1, HolderState::default);
        }
        true
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
