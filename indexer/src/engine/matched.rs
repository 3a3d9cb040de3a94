//! The answer to "who holds what of these keys": runs of blocks with the same holders, in memory of the caller's.
//!
//! One walk yields the runs for all holders, that is for all tiers and cache groups; what a caller wants to know
//! (depths, positions with holes) follows from them without another look at the engine.

use std::sync::atomic::{AtomicUsize, Ordering, fence};

use kvatlas_proto::BlockKey;

use super::locate::Base;
use super::raw::Guard;
use super::sets::SetNo;
use super::strand::{Changed, Parent, Place, Steps, StrandNo, View};
use super::{Holder, Shared};

/// Matched strands that are remembered until [`super::Engine::note_matches`]; older ones are overwritten.
const MAX_TOUCHED: usize = 256;

/// What a match needs, kept from one to the next so that nothing is allocated. One per thread.
#[derive(Debug)]
pub struct Match {
    pub(super) pin_hint: usize,
    path: Vec<Visit>,
    runs: Vec<RunEntry>,
    words: Vec<u64>,
    current: Vec<u64>,
    blocks: u32,
    /// The deepest strand of recent matches, and how many there were.
    pub(super) touched: Vec<StrandNo>,
    pub(super) touches: usize,
}

/// Consecutive blocks of the query with the same holders.
#[derive(Clone, Copy, Debug)]
pub struct Run<'m> {
    /// First block, counted from the prompt's beginning.
    pub start: u32,
    /// One past the last block.
    pub end: u32,
    /// Index of the first word.
    first: u32,
    words: &'m [u64],
}

/// A strand on the way.
#[derive(Clone, Copy, Debug)]
struct Visit {
    id: StrandNo,
    version: u32,
    /// Offsets used: from, and one past the last.
    from: u32,
    end: u32,
    /// Position of `from` in the prompt.
    at: u32,
    inline: [u64; 2],
}

#[derive(Clone, Copy, Debug)]
struct RunEntry {
    start: u32,
    end: u32,
    set: SetNo,
    first: u32,
    at: u32,
    count: u32,
}

// === impl Match ===

impl Default for Match {
    fn default() -> Self {
        // Each starts at another place, so that threads mostly write to lines of their own.
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        Self {
            pin_hint: NEXT.fetch_add(1, Ordering::Relaxed),
            path: Vec::new(),
            runs: Vec::new(),
            words: Vec::new(),
            current: Vec::new(),
            blocks: 0,
            touched: Vec::new(),
            touches: 0,
        }
    }
}

impl Match {
    /// Number of leading blocks that are known, held or not. A block that nobody holds is known while one that
    /// follows it is held.
    pub fn known_blocks(&self) -> u32 {
        self.blocks
    }

    /// The runs, ascending; stretches that nobody holds are left out.
    pub fn runs(&self) -> impl Iterator<Item = Run<'_>> {
        self.runs.iter().filter(|run| run.count > 0).map(|run| self.run(run))
    }

    /// Calls once with each holder of the first block and the number of leading blocks it holds without a hole.
    #[inline]
    pub fn each_depth(&mut self, mut with: impl FnMut(Holder, u32)) {
        let Some(first) = self.runs.first().filter(|run| run.start == 0) else { return };
        let base = first.first;
        if first.count == 1 {
            self.each_depth_of_word(base, with);
            return;
        }
        self.current.clear();
        let start = first.at as usize;
        self.current.extend_from_slice(&self.words[start..start + first.count as usize]);
        let mut end = first.end;
        let mut current = self.current.as_mut_slice();
        let mut skipped = base;
        for run in &self.runs[1..] {
            if run.start != end {
                break;
            }
            let words = &self.words[run.at as usize..(run.at + run.count) as usize];
            let mut left = 0;
            for (i, now) in current.iter_mut().enumerate() {
                let index = skipped + i as u32;
                let mine = index.checked_sub(run.first).and_then(|at| words.get(at as usize)).copied();
                let next = *now & mine.unwrap_or(0);
                let gone = *now ^ next;
                *now = next;
                left |= next;
                if gone != 0 {
                    each_bit(index, gone, |holder| with(holder, end));
                }
            }
            if left == 0 {
                return;
            }
            // Words that became empty at either side need not be looked at again.
            while current.first() == Some(&0) {
                current = &mut current[1..];
                skipped += 1;
            }
            end = run.end;
        }
        for (i, now) in current.iter().enumerate() {
            each_bit(skipped + i as u32, *now, |holder| with(holder, end));
        }
    }

    /// The same where all holders of the first block are of one word.
    #[inline]
    fn each_depth_of_word(&self, index: u32, mut with: impl FnMut(Holder, u32)) {
        let mut current = self.words[self.runs[0].at as usize];
        let mut end = self.runs[0].end;
        for run in &self.runs[1..] {
            if run.start != end {
                break;
            }
            let at = index.wrapping_sub(run.first);
            let mine = if at < run.count { self.words[(run.at + at) as usize] } else { 0 };
            let next = current & mine;
            each_bit(index, current ^ next, |holder| with(holder, end));
            current = next;
            if current == 0 {
                return;
            }
            end = run.end;
        }
        each_bit(index, current, |holder| with(holder, end));
    }

    fn run(&self, entry: &RunEntry) -> Run<'_> {
        let words = &self.words[entry.at as usize..(entry.at + entry.count) as usize];
        Run { start: entry.start, end: entry.end, first: entry.first, words }
    }

    #[inline]
    fn reset(&mut self) {
        self.path.clear();
        self.runs.clear();
        self.words.clear();
        self.blocks = 0;
    }

    /// Adds blocks, joining them with the run before if that has the same holders.
    #[inline]
    fn push(&mut self, shared: &Shared, start: u32, end: u32, set: SetNo, guard: &impl Guard) {
        if let Some(last) = self.runs.last_mut()
            && last.set == set
            && last.end == start
        {
            last.end = end;
            return;
        }
        let at = self.words.len() as u32;
        let entry = shared.sets.get(set);
        let first = if let Some((first, words)) = entry.range(guard) {
            self.words.extend(words.iter().map(|word| word.load(Ordering::Relaxed)));
            first
        } else {
            let mut first = None;
            entry.each_word(guard, |index, bits| {
                let first = *first.get_or_insert(index);
                self.words.resize((at + index - first) as usize, 0);
                self.words.push(bits);
            });
            first.unwrap_or(0)
        };
        let count = self.words.len() as u32 - at;
        self.runs.push(RunEntry { start, end, set, first, at, count });
    }

    /// Remembers what was matched, for [`super::Engine::note_matches`].
    #[inline]
    fn touch(&mut self, strand: StrandNo) {
        let at = self.touches % MAX_TOUCHED;
        if at < self.touched.len() {
            self.touched[at] = strand;
        } else {
            self.touched.push(strand);
        }
        self.touches += 1;
    }
}

#[inline]
fn each_bit(index: u32, mut bits: u64, mut with: impl FnMut(Holder)) {
    while bits != 0 {
        with(Holder(index * 64 + bits.trailing_zeros()));
        bits &= bits - 1;
    }
}

// === impl Run ===

impl Run<'_> {
    /// Number of holders.
    pub fn holders(&self) -> u32 {
        self.words.iter().map(|word| word.count_ones()).sum()
    }

    /// True if `holder` holds these blocks.
    pub fn contains(&self, holder: Holder) -> bool {
        (holder.0 / 64)
            .checked_sub(self.first)
            .and_then(|at| self.words.get(at as usize))
            .is_some_and(|word| word >> (holder.0 % 64) & 1 == 1)
    }

    /// Calls with each holder, ascending.
    #[inline]
    pub fn each_holder(&self, mut with: impl FnMut(Holder)) {
        for (at, word) in self.words.iter().enumerate() {
            each_bit(self.first + at as u32, *word, &mut with);
        }
    }
}

// === impl Shared ===

impl Shared {
    /// Fills `out`. `base`: a known block and how many blocks there are up to and including it. `beyond`: also look
    /// for held blocks behind the first one that is not known.
    pub(super) fn find_runs(
        &self,
        base: Option<(BlockKey, u32)>,
        keys: &[BlockKey],
        beyond: bool,
        guard: &impl Guard,
        out: &mut Match,
    ) -> Result<(), Changed> {
        out.reset();
        let (start, before) = match base {
            None => (Base::Root, 0),
            Some((key, blocks)) => {
                let Some(place) = self.find(key, guard)? else { return Ok(()) };
                let view = self.view(place.strand(), guard)?;
                if !view.is_at(place.offset(), key) {
                    return Err(Changed);
                }
                let offset = place.offset();
                out.path.push(Visit::new(&view, offset, offset + 1, 0));
                out.push(self, 0, blocks, view.steps.covering(offset).set, guard);
                (Base::After(place), blocks)
            }
        };
        let above = out.path.len();
        if let Some(deepest) = self.deepest(start, keys, guard)? {
            out.touch(deepest.view.id);
            if self.climb(start, before, deepest.at as u32, deepest.place, &deepest.view, guard, out)? {
                for at in (above..out.path.len()).rev() {
                    let visit = out.path[at];
                    self.push_visit(&visit, guard, out);
                }
            } else {
                // The caller's keys are not one chain. Each for itself, then.
                out.path.truncate(above);
                self.scan(before, 0, keys, beyond, guard, out)?;
            }
        }
        out.blocks = out.runs.last().map_or(0, |run| run.end);
        let known = (out.blocks - before.min(out.blocks)) as usize;
        if beyond && known < keys.len() && self.floating.load(Ordering::Relaxed) > 0 {
            self.scan(before, known, keys, true, guard, out)?;
        }
        fence(Ordering::Acquire);
        let same = |visit: &Visit| self.strands.get(visit.id).unchanged(visit.version);
        if out.path.iter().all(same) { Ok(()) } else { Err(Changed) }
    }

    /// Notes the strands from the deepest known key up to the base. False if they do not lead there.
    #[expect(clippy::too_many_arguments, reason = "one caller; a struct would only rename them")]
    #[inline]
    fn climb(
        &self,
        base: Base,
        before: u32,
        at: u32,
        place: Place,
        view: &View<'_>,
        guard: &impl Guard,
        out: &mut Match,
    ) -> Result<bool, Changed> {
        // One past the last position that is still to be placed.
        let (mut end, mut place, mut view) = (at + 1, place, *view);
        loop {
            let offset = place.offset();
            if let Base::After(base) = base
                && base.strand() == place.strand()
            {
                if offset != base.offset() + end {
                    return Ok(false);
                }
                out.path.push(Visit::new(&view, base.offset() + 1, offset + 1, before));
                return Ok(true);
            }
            let Some(start) = end.checked_sub(offset + 1) else { return Ok(false) };
            out.path.push(Visit::new(&view, 0, offset + 1, before + start));
            match view.parent() {
                Parent::Root => return Ok(base == Base::Root && start == 0),
                Parent::Unknown => return Ok(false),
                Parent::At(parent) if start == 0 => return Ok(base == Base::After(parent)),
                Parent::At(parent) => {
                    end = start;
                    place = parent;
                    view = self.view(parent.strand(), guard)?;
                    if parent.offset() >= view.blocks {
                        return Err(Changed);
                    }
                }
            }
        }
    }

    #[inline]
    fn push_visit(&self, visit: &Visit, guard: &impl Guard, out: &mut Match) {
        // The header may have changed since; then the version says so in the end.
        let spilled = visit.inline[0] >> 60 > 3;
        let steps = if spilled {
            Steps { inline: visit.inline, spill: self.strands.get(visit.id).spill().load(guard) }
        } else {
            Steps { inline: visit.inline, spill: &[] }
        };
        if spilled && steps.spill.is_empty() {
            return;
        }
        let count = steps.len();
        for index in 0..count {
            let step = steps.at(index);
            let end = if index + 1 < count { steps.at(index + 1).start } else { visit.end };
            let (from, to) = (step.start.max(visit.from), end.min(visit.end));
            if from >= visit.end {
                return;
            }
            if from < to {
                let shift = visit.at.wrapping_sub(visit.from);
                out.push(self, from.wrapping_add(shift), to.wrapping_add(shift), step.set, guard);
            }
        }
    }

    /// Each key for itself, from the one with index `from` on. Without `beyond`, up to the first that is not known.
    #[cold]
    fn scan(
        &self,
        before: u32,
        from: usize,
        keys: &[BlockKey],
        beyond: bool,
        guard: &impl Guard,
        out: &mut Match,
    ) -> Result<(), Changed> {
        for (at, key) in keys.iter().enumerate().skip(from) {
            let Some(place) = self.find(*key, guard)? else {
                if beyond {
                    continue;
                }
                break;
            };
            let view = self.view(place.strand(), guard)?;
            if !view.is_at(place.offset(), *key) {
                return Err(Changed);
            }
            let position = before + at as u32;
            out.path.push(Visit::new(&view, place.offset(), place.offset() + 1, position));
            out.push(self, position, position + 1, view.steps.covering(place.offset()).set, guard);
        }
        Ok(())
    }
}

// === impl Visit ===

impl Visit {
    #[inline]
    fn new(view: &View<'_>, from: u32, end: u32, at: u32) -> Self {
        Self { id: view.id, version: view.version, from, end, at, inline: view.steps.inline }
    }
}
