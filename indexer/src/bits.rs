//! A growable set of block positions of one prompt: bit `i` says that the prompt's block `i` is held.

const WORD: u32 = u64::BITS;

/// Positions from 0; as long as its last set bit needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bits {
    words: Vec<u64>,
}

// === impl Bits ===

impl Bits {
    /// Adds a position.
    #[inline]
    pub fn set(&mut self, at: u32) {
        let word = (at / WORD) as usize;
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= 1 << (at % WORD);
    }

    /// Adds the positions `start..end`.
    pub fn set_range(&mut self, start: u32, end: u32) {
        if start >= end {
            return;
        }
        let (first, last) = ((start / WORD) as usize, ((end - 1) / WORD) as usize);
        if self.words.len() <= last {
            self.words.resize(last + 1, 0);
        }
        let head = u64::MAX << (start % WORD);
        let tail = u64::MAX >> (WORD - 1 - (end - 1) % WORD);
        if first == last {
            self.words[first] |= head & tail;
            return;
        }
        self.words[first] |= head;
        self.words[first + 1..last].fill(u64::MAX);
        self.words[last] |= tail;
    }

    /// True if the position was added.
    #[inline]
    pub fn get(&self, at: u32) -> bool {
        self.words.get((at / WORD) as usize).is_some_and(|word| word >> (at % WORD) & 1 == 1)
    }

    /// Adds all positions of `other`.
    pub fn union(&mut self, other: &Self) {
        if self.words.len() < other.words.len() {
            self.words.resize(other.words.len(), 0);
        }
        self.words.iter_mut().zip(&other.words).for_each(|(mine, theirs)| *mine |= theirs);
    }

    /// The positions in chunks of `size` (aligned to 0, `size` at least 1) that are here as a whole.
    #[must_use]
    pub fn whole_chunks(&self, size: u32) -> Self {
        let mut whole = Self::default();
        for start in (0..self.words.len() as u32 * WORD).step_by(size as usize) {
            if (start..start + size).all(|at| self.get(at)) {
                (start..start + size).for_each(|at| whole.set(at));
            }
        }
        whole
    }

    /// The positions below `end` as stretches, ascending: first one, and the one after the last.
    pub fn runs(&self, end: u32) -> impl Iterator<Item = (u32, u32)> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.next(at, end, true)?;
            at = self.next(start, end, false).unwrap_or(end);
            Some((start, at))
        })
    }

    /// The first position from `at` on, below `end`, that is here (or is not).
    fn next(&self, mut at: u32, end: u32, is_here: bool) -> Option<u32> {
        while at < end {
            let word = self.words.get((at / WORD) as usize).copied().unwrap_or(0);
            let wanted = if is_here { word } else { !word } >> (at % WORD);
            if wanted != 0 {
                return Some(at + wanted.trailing_zeros()).filter(|at| *at < end);
            }
            at += WORD - at % WORD;
        }
        None
    }

    /// Length of the run from position 0 without a hole.
    pub fn leading_run(&self) -> u32 {
        let full = self.words.iter().take_while(|word| **word == u64::MAX).count();
        let tail = self.words.get(full).map_or(0, |word| word.trailing_ones());
        full as u32 * WORD + tail
    }

    /// Number of positions below `end` that are here and not in `other`.
    pub fn count_new(&self, other: &Self, end: u32) -> u32 {
        let mut count = 0;
        for (at, word) in self.words.iter().enumerate() {
            let start = at as u32 * WORD;
            if start >= end {
                break;
            }
            let new = word & !other.words.get(at).copied().unwrap_or(0);
            let below = if end - start >= WORD { new } else { new & ((1 << (end - start)) - 1) };
            count += below.count_ones();
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn bits(positions: &BTreeSet<u32>) -> Bits {
        let mut out = Bits::default();
        for at in positions {
            out.set(*at);
        }
        out
    }

    proptest! {
        #[test]
        fn behaves_like_a_set_of_positions(
            a in proptest::collection::btree_set(0u32..300, 0..250),
            b in proptest::collection::btree_set(0u32..300, 0..250),
            first in 0u32..300,
            end in 0u32..320,
        ) {
            let (left, right) = (bits(&a), bits(&b));
            prop_assert!((0..320).all(|at| left.get(at) == a.contains(&at)));
            prop_assert_eq!(left.leading_run() as usize, (0..300).take_while(|at| a.contains(at)).count());
            let new = a.difference(&b).filter(|at| **at < end).count();
            prop_assert_eq!(left.count_new(&right, end) as usize, new);
            let of_runs: BTreeSet<u32> = left.runs(end).flat_map(|(from, to)| from..to).collect();
            prop_assert_eq!(of_runs, a.iter().copied().filter(|at| *at < end).collect::<BTreeSet<_>>());
            let runs: Vec<_> = left.runs(end).collect();
            prop_assert!(runs.iter().all(|run| run.0 < run.1) && runs.windows(2).all(|two| two[0].1 < two[1].0));
            let mut both = left.clone();
            both.union(&right);
            prop_assert!((0..320).all(|at| both.get(at) == (a.contains(&at) || b.contains(&at))));
            let (from, to) = (first.min(end), first.max(end));
            both.set_range(from, to);
            let within = |at: u32| (from..to).contains(&at);
            prop_assert!((0..320).all(|at| both.get(at) == (within(at) || a.contains(&at) || b.contains(&at))));
            prop_assert_eq!(both.leading_run() as usize, (0..400).take_while(|at| both.get(*at)).count());
        }
    }
}
