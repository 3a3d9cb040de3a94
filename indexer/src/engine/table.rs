//! From a key to its place: one table for all holders.
//!
//! A slot is one word: 28 bits of the key's hash and the 36 bits of its place. The key itself lies in the strand, so
//! a slot that fits is a strong hint (a wrong one is rarer than one in ten thousand) that the strand confirms. Seven
//! slots and a word about overflow share a cache line.
//!
//! The table is cut into 256 parts by the first hash byte, and each grows on its own, by a quarter, into a new array.
//! The longest stop of a writer is thus one part's; readers use the old array until the new one is there.
//!
//! A key that is known is found at any time, whatever the writer does: nothing moves within an array, and a look-up
//! that misses checks that its array is still the part's.

use std::sync::atomic::{AtomicU64, Ordering};

use kvatlas_proto::BlockKey;

use super::raw::{Guard, Limbo, Line, Owned, Pins, Slot, prefetch};
use super::strand::{PLACE_BITS, Place};

/// Parts: at 100 million blocks one of them has 400 thousand, which move in about 2 ms.
const PARTS: usize = 256;
/// Slots in a bucket; the eighth word says what overflowed.
const SLOTS: usize = 7;
/// Filled slots of a part at which it grows, of 128. Measured: a fuller part costs more in look-ups than it saves.
const FULL_128THS: usize = 112;
/// A part with fewer filled slots than this, of 128, is made smaller.
const SPARSE_128THS: usize = 40;
/// Buckets from which on parts grow at different moments (see [`grown`]).
const STAGGER_FROM: usize = 32;
/// Buckets of one part at most: the length of a shared array.
const MAX_BUCKETS: usize = 65_535;

/// Buckets ahead at which an array that is replaced is fetched.
const REBUILT_AHEAD: usize = 12;

/// Buckets in which a displaced key is looked for by hash, before all others in turn.
const SPREAD: usize = 6;

const HASH_BITS: u32 = 28;
/// The word about overflow: a filter over the low five hash bits of displaced keys whose home this is, then how many
/// they are (16 bits), then how many buckets have to be looked into for the furthest (16 bits).
const META: usize = SLOTS;

/// What the table needs to know about a key. `rest` is never 0, so that an empty slot fits no key.
#[derive(Clone, Copy, Default)]
pub(super) struct Hash {
    part: usize,
    rest: u64,
}

/// The shared part.
pub(super) struct Table {
    parts: Box<[Slot<Line>]>,
    seeds: [u64; 2],
}

/// The writer's part.
pub(super) struct TableWriter {
    filled: Box<[u32]>,
    buckets: usize,
    /// Used while a part is rebuilt: filled slots by bucket, and slots whose home was full.
    fill: Vec<u8>,
    late: Vec<u64>,
}

/// No part can take another key.
#[derive(Debug)]
pub(super) struct Full;

// === impl Table ===

impl Table {
    pub(super) fn new(seeds: [u64; 2]) -> (Self, TableWriter) {
        let parts: Box<[Slot<Line>]> = (0..PARTS).map(|_| Slot::default()).collect();
        for part in &parts {
            let _nothing_before = part.swap(Some(Owned::zeroed(1)));
        }
        let filled = vec![0; PARTS].into();
        (
            Self { parts, seeds: [seeds[0], seeds[1] | 1] },
            TableWriter { filled, buckets: PARTS, fill: Vec::new(), late: Vec::new() },
        )
    }

    /// Keys may come from anybody, so they are mixed with numbers that only this engine knows.
    #[inline]
    pub(super) fn hash(&self, key: BlockKey) -> Hash {
        let product = u128::from(key.0 ^ self.seeds[0]) * u128::from(self.seeds[1]);
        let mixed = (product as u64) ^ (product >> 64) as u64;
        let rest = mixed >> (56 - HASH_BITS) & ((1 << HASH_BITS) - 1);
        Hash { part: (mixed >> 56) as usize, rest: rest.max(1) }
    }

    /// Asks for the line where the key's slot should be.
    #[inline]
    pub(super) fn prefetch(&self, hash: Hash, guard: &impl Guard) {
        let lines = self.parts[hash.part].load(guard);
        prefetch(lines.as_ptr().wrapping_add(home(hash.rest, lines.len())));
    }

    /// Asks for the next line of a key that is to be inserted, if its first `full` lines, which should be at hand, have
    /// no empty slot. True if so.
    #[inline]
    pub(super) fn prefetch_if_full(&self, hash: Hash, full: usize, guard: &impl Guard) -> bool {
        let lines = self.parts[hash.part].load(guard);
        let at = home(hash.rest, lines.len());
        for further in 0..full {
            if empty(&lines[nth(at, further, hash.rest, lines.len())]) != 0 {
                return false;
            }
        }
        prefetch(lines.as_ptr().wrapping_add(nth(at, full, hash.rest, lines.len())));
        true
    }

    /// The first place whose slot fits. Nearly always the key's; `None` is certain.
    #[inline]
    pub(super) fn hint(&self, hash: Hash, guard: &impl Guard) -> Option<Place> {
        self.find(hash, guard, |_| true)
    }

    /// The first place whose slot fits and that `is_it` confirms.
    #[inline]
    pub(super) fn find(
        &self,
        hash: Hash,
        guard: &impl Guard,
        mut is_it: impl FnMut(Place) -> bool,
    ) -> Option<Place> {
        let part = &self.parts[hash.part];
        loop {
            let lines = part.load(guard);
            let at = home(hash.rest, lines.len());
            let line = &lines[at];
            let mut fits = fitting(line, hash.rest);
            while fits != 0 {
                let place = Place::from_bits(line.0[fits.trailing_zeros() as usize].load(Ordering::Acquire));
                if is_it(place) {
                    return Some(place);
                }
                fits &= fits - 1;
            }
            let meta = line.0[META].load(Ordering::Acquire);
            if meta >> (hash.rest & 31) & 1 == 1
                && let Some(place) = find_displaced(lines, at, meta, hash.rest, &mut is_it)
            {
                return Some(place);
            }
            if part.identity() == identity(lines) {
                return None;
            }
        }
    }
}

/// The array as [`Slot::identity`] names it.
#[inline]
fn identity(lines: &[Line]) -> u64 {
    (lines.as_ptr().addr() as u64) << 16 | lines.len() as u64
}

/// Keeps the order of hashes, so that growing goes through both arrays from one end to the other.
#[inline]
fn home(rest: u64, buckets: usize) -> usize {
    (rest as usize * buckets) >> HASH_BITS
}

/// The bucket to look into after `further` full ones. The first few are spread over the part by the hash: neighbours
/// would fill each other's up. Behind them comes every bucket in turn, so that no free slot is missed.
#[inline]
fn nth(home: usize, further: usize, rest: u64, buckets: usize) -> usize {
    if further == 0 {
        return home;
    }
    if further > SPREAD {
        return (home + further - SPREAD) % buckets;
    }
    let stride = 1 + (((rest & 0x3ff) as usize * (buckets - 1)) >> 10);
    let at = home + further * stride;
    if at < buckets {
        at
    } else if at < 2 * buckets {
        at - buckets
    } else {
        at % buckets
    }
}

/// Bits of the slots with this hash.
#[inline]
fn fitting(line: &Line, rest: u64) -> u32 {
    let mut fits = 0;
    for (i, slot) in line.0[..SLOTS].iter().enumerate() {
        let slot = slot.load(Ordering::Relaxed);
        fits |= u32::from(slot >> PLACE_BITS == rest) << i;
    }
    fits
}

/// Bits of the empty slots.
#[inline]
fn empty(line: &Line) -> u32 {
    let mut empty = 0;
    for (i, slot) in line.0[..SLOTS].iter().enumerate() {
        empty |= u32::from(slot.load(Ordering::Relaxed) == 0) << i;
    }
    empty
}

#[cold]
fn find_displaced(
    lines: &[Line],
    home: usize,
    meta: u64,
    rest: u64,
    is_it: &mut impl FnMut(Place) -> bool,
) -> Option<Place> {
    let reach = (meta >> 48) as usize;
    for further in 1..=reach {
        let line = &lines[nth(home, further, rest, lines.len())];
        let mut fits = fitting(line, rest);
        while fits != 0 {
            let place = Place::from_bits(line.0[fits.trailing_zeros() as usize].load(Ordering::Acquire));
            if is_it(place) {
                return Some(place);
            }
            fits &= fits - 1;
        }
    }
    None
}

// === impl TableWriter ===

impl TableWriter {
    /// The key, which is not there yet, is at `place` from now on.
    #[inline]
    pub(super) fn insert(
        &mut self,
        table: &Table,
        hash: Hash,
        place: Place,
        guard: &impl Guard,
        pins: &Pins,
        limbo: &mut Limbo,
    ) -> Result<(), Full> {
        let lines = table.parts[hash.part].load(guard);
        let filled = self.filled[hash.part] as usize;
        let lines = if filled >= limit(lines.len()) {
            let wanted = grown(lines.len(), hash.part);
            if wanted == lines.len() && filled + 1 >= lines.len() * SLOTS {
                return Err(Full);
            }
            self.rebuild(table, hash.part, wanted, guard, pins, limbo);
            table.parts[hash.part].load(guard)
        } else {
            lines
        };
        put(lines, hash.rest, place);
        self.filled[hash.part] += 1;
        Ok(())
    }

    /// Forgets the key, which is at `place`.
    #[inline]
    pub(super) fn remove(
        &mut self,
        table: &Table,
        hash: Hash,
        place: Place,
        guard: &impl Guard,
        pins: &Pins,
        limbo: &mut Limbo,
    ) {
        let lines = table.parts[hash.part].load(guard);
        let (at, further, index) = position(lines, hash.rest, place);
        lines[nth(at, further, hash.rest, lines.len())].0[index].store(0, Ordering::Release);
        if further > 0 {
            let meta = &lines[at].0[META];
            let value = meta.load(Ordering::Relaxed);
            let left = (value >> 32 & 0xffff) - 1;
            let value = if left == 0 { 0 } else { value & !(0xffff << 32) | left << 32 };
            meta.store(value, Ordering::Release);
        }
        self.filled[hash.part] -= 1;
        if lines.len() > STAGGER_FROM && (self.filled[hash.part] as usize) < sparse(lines.len()) {
            let wanted = (lines.len() / 2).max(1);
            self.rebuild(table, hash.part, wanted, guard, pins, limbo);
        }
    }

    fn rebuild(
        &mut self,
        table: &Table,
        part: usize,
        buckets: usize,
        guard: &impl Guard,
        pins: &Pins,
        limbo: &mut Limbo,
    ) {
        let new = Owned::<Line>::zeroed(buckets);
        let old = table.parts[part].load(guard);
        self.buckets = self.buckets + buckets - old.len();
        self.fill.clear();
        self.fill.resize(buckets, 0);
        for (at, line) in old.iter().enumerate() {
            prefetch(old.as_ptr().wrapping_add(at + REBUILT_AHEAD));
            for slot in &line.0[..SLOTS] {
                let slot = slot.load(Ordering::Relaxed);
                if slot == 0 {
                    continue;
                }
                let at = home(slot >> PLACE_BITS, buckets);
                let fill = &mut self.fill[at];
                if (*fill as usize) < SLOTS {
                    new[at].0[*fill as usize].store(slot, Ordering::Relaxed);
                    *fill += 1;
                } else {
                    self.late.push(slot);
                }
            }
        }
        // What found its home full goes last, so that nobody else is displaced by it.
        for slot in self.late.drain(..) {
            put(&new, slot >> PLACE_BITS, Place::from_bits(slot));
        }
        limbo.lines(pins, table.parts[part].swap(Some(new)));
    }

    /// Number of keys.
    pub(super) fn filled(&self) -> usize {
        self.filled.iter().map(|filled| *filled as usize).sum()
    }

    pub(super) fn bytes(&self) -> usize {
        self.buckets * size_of::<Line>() + PARTS * (8 + 8 + 4)
    }
}

#[inline]
fn slot(rest: u64, place: Place) -> u64 {
    rest << PLACE_BITS | place.bits()
}

/// Home, distance from it and slot of a key that is there.
fn position(lines: &[Line], rest: u64, place: Place) -> (usize, usize, usize) {
    let at = home(rest, lines.len());
    let wanted = slot(rest, place);
    let in_line =
        |line: &Line| line.0[..SLOTS].iter().position(|slot| slot.load(Ordering::Relaxed) == wanted);
    for further in 0..=(lines[at].0[META].load(Ordering::Relaxed) >> 48) as usize {
        if let Some(index) = in_line(&lines[nth(at, further, rest, lines.len())]) {
            return (at, further, index);
        }
    }
    unreachable!("a key with a place has a slot: {place:?}")
}

/// Puts a slot where there is room; there is.
#[inline]
fn put(lines: &[Line], rest: u64, place: Place) {
    let value = slot(rest, place);
    let at = home(rest, lines.len());
    for further in 0..=lines.len() + SPREAD {
        let line = &lines[nth(at, further, rest, lines.len())];
        let empty = empty(line);
        if empty == 0 {
            continue;
        }
        line.0[empty.trailing_zeros() as usize].store(value, Ordering::Release);
        if further > 0 {
            let meta: &AtomicU64 = &lines[at].0[META];
            let old = meta.load(Ordering::Relaxed);
            let reach = (old >> 48).max(further as u64);
            let count = (old >> 32 & 0xffff) + 1;
            let filter = old & 0xffff_ffff | 1 << (rest & 31);
            meta.store(reach << 48 | count << 32 | filter, Ordering::Release);
        }
        return;
    }
    unreachable!("a part grows before its last slot is taken")
}

fn limit(buckets: usize) -> usize {
    if buckets == MAX_BUCKETS { buckets * SLOTS - 1 } else { (buckets * SLOTS * FULL_128THS / 128).max(1) }
}

fn sparse(buckets: usize) -> usize {
    buckets * SLOTS * SPARSE_128THS / 128
}

/// Buckets after growing. All parts fill at the same pace; so that they do not all grow at the same moment, and the
/// table's size does not jump, they start the sequence of quarters at different sizes.
fn grown(buckets: usize, part: usize) -> usize {
    let next = buckets + (buckets / 4).max(1);
    if buckets < STAGGER_FROM && next >= STAGGER_FROM {
        STAGGER_FROM + part * STAGGER_FROM / 4 / PARTS
    } else {
        next.min(MAX_BUCKETS)
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        self.parts.iter_mut().for_each(Slot::clear);
    }
}
