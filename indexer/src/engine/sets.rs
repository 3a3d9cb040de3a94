//! Sets of holders, each kept once.
//!
//! A set never changes while anybody may look at it; steps of strands refer to it by number. The writer asks for "this
//! set with (or without) that holder", remembers the answers, and counts references.
//!
//! Three forms, chosen by content alone: up to two neighbouring words of 64 holders lie in the entry itself; wider
//! sets have an array, of all words from the first to the last, or, where most of those are empty, of (index, word)
//! pairs.

use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use foldhash::fast::RandomState;
use hashbrown::HashTable;

use super::raw::{Arena, Guard, Limbo, Owned, Pins, Slot};

/// Number of a set. Bounded by 24 bits, as strands store it.
pub(super) type SetNo = u32;

/// Nobody.
pub(super) const EMPTY: SetNo = 0;

/// Sets of one engine at most.
const MAX_SETS: u32 = 1 << 24;
/// Words that fit into an entry.
const INLINE: usize = 2;
/// A set is stored as pairs if it has this many times more words between its first and last than words in use.
const SPARSE: usize = 4;
/// Answers remembered: a few per holder and hot set; 256 KiB of the writer's cache.
const MEMO: usize = 1 << 13;
/// Sets without a reference that are kept, beside as many as are in use: they often come back.
const KEPT_UNUSED: usize = 4_096;

const FIRST_BITS: u32 = 10;
const PAIRS: u32 = 1 << 31;

/// A set as readers see it. Zero is the empty set.
#[repr(C, align(32))]
#[derive(Default)]
pub(super) struct SetEntry {
    /// Index of the first word (10 bits), number of words (11 bits), and [`PAIRS`].
    shape: AtomicU32,
    inline: [AtomicU64; INLINE],
    more: Slot<AtomicU64>,
}

/// The writer's part.
pub(super) struct SetWriter {
    /// By content.
    numbers: HashTable<SetNo>,
    hasher: RandomState,
    /// Steps that refer to each set.
    references: Vec<u32>,
    unused: usize,
    /// `set << 18 | holder << 1 | add` and what came out.
    memo: Vec<(u64, SetNo)>,
    free: Vec<SetNo>,
    array_bytes: usize,
    scratch: Vec<(u32, u64)>,
}

// === impl SetEntry ===

impl SetEntry {
    #[inline]
    pub(super) fn contains(&self, holder: u32, guard: &impl Guard) -> bool {
        let (word, bit) = (holder / 64, 1u64 << (holder % 64));
        let shape = self.shape.load(Ordering::Relaxed);
        let (first, count) = (shape & ((1 << FIRST_BITS) - 1), (shape & !PAIRS) >> FIRST_BITS);
        if shape & PAIRS == 0 {
            let Some(at) = word.checked_sub(first).filter(|at| *at < count) else { return false };
            let words = self.words(count as usize, guard);
            return words[at as usize].load(Ordering::Relaxed) & bit != 0;
        }
        let mut found = false;
        self.each_word(guard, |index, bits| found |= index == word && bits & bit != 0);
        found
    }

    /// Index of the first word, and words up to the last, for sets that are stored so.
    #[inline]
    pub(super) fn range<'g>(&'g self, guard: &'g impl Guard) -> Option<(u32, &'g [AtomicU64])> {
        let shape = self.shape.load(Ordering::Relaxed);
        if shape & PAIRS != 0 {
            return None;
        }
        let count = (shape >> FIRST_BITS) as usize;
        Some((shape & ((1 << FIRST_BITS) - 1), self.words(count, guard)))
    }

    #[inline]
    fn words<'g>(&'g self, count: usize, guard: &'g impl Guard) -> &'g [AtomicU64] {
        if count <= INLINE { &self.inline[..count] } else { &self.more.load(guard)[..count] }
    }

    /// Calls with every word that is not 0 and its index, ascending.
    pub(super) fn each_word(&self, guard: &impl Guard, mut with: impl FnMut(u32, u64)) {
        if let Some((first, words)) = self.range(guard) {
            for (at, word) in words.iter().enumerate() {
                let bits = word.load(Ordering::Relaxed);
                if bits != 0 {
                    with(first + at as u32, bits);
                }
            }
            return;
        }
        for pair in self.more.load(guard).chunks_exact(2) {
            with(pair[0].load(Ordering::Relaxed) as u32, pair[1].load(Ordering::Relaxed));
        }
    }

    /// Calls with every holder, ascending.
    pub(super) fn each_holder(&self, guard: &impl Guard, mut with: impl FnMut(u32)) {
        self.each_word(guard, |index, mut bits| {
            while bits != 0 {
                with(index * 64 + bits.trailing_zeros());
                bits &= bits - 1;
            }
        });
    }

    pub(super) fn clear(&mut self) {
        self.more.clear();
    }

    /// Writes a set that nobody refers to yet. Returns the bytes of its array.
    fn write(&self, words: &[(u32, u64)]) -> usize {
        let first = words.first().map_or(0, |word| word.0);
        let span = words.last().map_or(0, |word| (word.0 - first + 1) as usize);
        let mut bytes = 0;
        let shape = if span <= INLINE {
            self.inline.iter().for_each(|word| word.store(0, Ordering::Relaxed));
            for (index, bits) in words {
                self.inline[(index - first) as usize].store(*bits, Ordering::Relaxed);
            }
            (span as u32) << FIRST_BITS | first
        } else {
            let pairs = span > words.len() * SPARSE;
            let array = Owned::<AtomicU64>::zeroed(if pairs { words.len() * 2 } else { span });
            bytes = Owned::<AtomicU64>::bytes_of(array.len());
            for (at, (index, bits)) in words.iter().enumerate() {
                if pairs {
                    array[2 * at].store(u64::from(*index), Ordering::Relaxed);
                    array[2 * at + 1].store(*bits, Ordering::Relaxed);
                } else {
                    array[(index - first) as usize].store(*bits, Ordering::Relaxed);
                }
            }
            let _nothing_before = self.more.swap(Some(array));
            if pairs { PAIRS } else { (span as u32) << FIRST_BITS | first }
        };
        self.shape.store(shape, Ordering::Release);
        bytes
    }

    fn equals(&self, words: &[(u32, u64)], guard: &impl Guard) -> bool {
        let mut at = 0;
        let mut equal = true;
        self.each_word(guard, |index, bits| {
            equal &= words.get(at) == Some(&(index, bits));
            at += 1;
        });
        equal && at == words.len()
    }
}

// === impl SetWriter ===

impl SetWriter {
    pub(super) fn new(sets: &Arena<SetEntry>) -> Self {
        sets.grow_to(EMPTY);
        Self {
            numbers: HashTable::new(),
            hasher: RandomState::default(),
            references: vec![1],
            unused: 0,
            memo: vec![(u64::MAX, 0); MEMO],
            free: Vec::new(),
            array_bytes: 0,
            scratch: Vec::new(),
        }
    }

    /// The set with the holder, or without. `None` if there are too many sets.
    #[inline]
    pub(super) fn toggled(
        &mut self,
        sets: &Arena<SetEntry>,
        set: SetNo,
        holder: u32,
        add: bool,
        guard: &impl Guard,
    ) -> Option<SetNo> {
        let key = u64::from(set) << 18 | u64::from(holder) << 1 | u64::from(add);
        let at = (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 51) as usize % MEMO;
        if self.memo[at].0 == key {
            return Some(self.memo[at].1);
        }
        let out = self.compute(sets, set, holder, add, guard)?;
        self.memo[at] = (key, out);
        Some(out)
    }

    #[cold]
    fn compute(
        &mut self,
        sets: &Arena<SetEntry>,
        set: SetNo,
        holder: u32,
        add: bool,
        guard: &impl Guard,
    ) -> Option<SetNo> {
        let Self { numbers, hasher, scratch, .. } = self;
        scratch.clear();
        sets.get(set).each_word(guard, |index, bits| scratch.push((index, bits)));
        let (word, bit) = (holder / 64, 1u64 << (holder % 64));
        match scratch.binary_search_by_key(&word, |entry| entry.0) {
            Ok(at) if add => scratch[at].1 |= bit,
            Ok(at) => {
                scratch[at].1 &= !bit;
                if scratch[at].1 == 0 {
                    scratch.remove(at);
                }
            }
            Err(at) if add => scratch.insert(at, (word, bit)),
            Err(_) => {}
        }
        if scratch.is_empty() {
            return Some(EMPTY);
        }
        let hash = hasher.hash_one(scratch.as_slice());
        if let Some(found) = numbers.find(hash, |no| sets.get(*no).equals(scratch, guard)) {
            return Some(*found);
        }
        let no = if let Some(no) = self.free.pop() {
            no
        } else {
            let no = self.references.len() as u32;
            if no >= MAX_SETS {
                return None;
            }
            sets.grow_to(no);
            self.references.push(0);
            no
        };
        let entry = sets.get(no);
        self.array_bytes += entry.write(scratch);
        self.unused += 1;
        numbers.insert_unique(hash, no, |other| hash_of(hasher, sets.get(*other), guard));
        Some(no)
    }

    /// One more step refers to the set.
    #[inline]
    pub(super) fn refer(&mut self, set: SetNo) {
        let count = &mut self.references[set as usize];
        self.unused -= usize::from(*count == 0);
        *count += 1;
    }

    /// One step fewer refers to the set.
    #[inline]
    pub(super) fn release(&mut self, set: SetNo) {
        let count = &mut self.references[set as usize];
        *count -= 1;
        self.unused += usize::from(*count == 0);
    }

    /// Steps that refer to the set.
    pub(super) fn references(&self, set: SetNo) -> u32 {
        self.references[set as usize]
    }

    /// Gives sets up that nothing refers to, if there are many.
    #[inline]
    pub(super) fn sweep(
        &mut self,
        sets: &Arena<SetEntry>,
        guard: &impl Guard,
        pins: &Pins,
        limbo: &mut Limbo,
    ) {
        if self.unused > KEPT_UNUSED.max(self.numbers.len() / 2) {
            self.sweep_all(sets, guard, pins, limbo);
        }
    }

    #[cold]
    fn sweep_all(&mut self, sets: &Arena<SetEntry>, guard: &impl Guard, pins: &Pins, limbo: &mut Limbo) {
        let Self { numbers, hasher, references, .. } = self;
        for (no, _) in references.iter().enumerate().skip(1).filter(|(_, count)| **count == 0) {
            let no = no as u32;
            let entry = sets.get(no);
            let hash = hash_of(hasher, entry, guard);
            // A number that is free or in the limbo already has no entry here.
            if let Ok(found) = numbers.find_entry(hash, |other| *other == no) {
                found.remove();
                self.unused -= 1;
                limbo.set(pins, no);
            }
        }
        self.memo.fill((u64::MAX, 0));
    }

    /// Numbers that nobody can look at any more may be used again.
    pub(super) fn recycle(
        &mut self,
        sets: &Arena<SetEntry>,
        freed: &mut Vec<SetNo>,
        pins: &Pins,
        limbo: &mut Limbo,
        guard: &impl Guard,
    ) {
        for no in freed.drain(..) {
            let entry = sets.get(no);
            let length = entry.more.load(guard).len();
            if length > 0 {
                self.array_bytes -= Owned::<AtomicU64>::bytes_of(length);
            }
            limbo.words(pins, entry.more.swap(None));
            entry.shape.store(0, Ordering::Relaxed);
            self.free.push(no);
        }
    }

    /// Sets in use or kept.
    pub(super) fn count(&self) -> usize {
        self.numbers.len()
    }

    pub(super) fn numbers(&self) -> u32 {
        self.references.len() as u32
    }

    pub(super) fn bytes(&self) -> usize {
        self.numbers.allocation_size()
            + self.references.len() * (size_of::<SetEntry>() + 4)
            + self.memo.len() * 16
            + self.free.capacity() * 4
            + self.array_bytes
    }
}

fn hash_of(hasher: &RandomState, entry: &SetEntry, guard: &impl Guard) -> u64 {
    let mut words = smallvec::SmallVec::<[(u32, u64); 16]>::new();
    entry.each_word(guard, |index, bits| words.push((index, bits)));
    hasher.hash_one(words.as_slice())
}
