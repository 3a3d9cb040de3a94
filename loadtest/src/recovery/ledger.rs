//! What an engine held, and when: the truth that answers are judged by.
//!
//! An answer is always a little behind the engine. So a claim is wrong only if the engine did not hold the block at any
//! time of a stated window before the answer, and a block is missed only if the engine has held it for longer than such
//! a window. Pure: times are arguments, in milliseconds of one clock that does not go back.

use std::collections::{HashMap, VecDeque};

/// How long blocks that are gone are remembered, milliseconds: longer than any window that is asked for.
const MEMORY_MS: u64 = 5_000;

/// Blocks of one engine with the time of their last change.
#[derive(Debug, Default)]
pub struct Ledger {
    spans: HashMap<u64, Span>,
    /// Blocks that went, in order of time, to be forgotten.
    gone: VecDeque<(u64, u64)>,
    held: usize,
}

/// One block: held since `changed_ms`, or gone since then.
#[derive(Clone, Copy, Debug)]
struct Span {
    copies: u32,
    changed_ms: u64,
}

// === impl Ledger ===

impl Ledger {
    /// The engine holds one (more) copy of the block from now on.
    pub fn store(&mut self, key: u64, now_ms: u64) {
        let span = self.spans.entry(key).or_insert(Span { copies: 0, changed_ms: now_ms });
        if span.copies == 0 {
            span.changed_ms = now_ms;
            self.held += 1;
        }
        span.copies += 1;
    }

    /// The engine holds one copy less. A block that is not held stays so.
    pub fn remove(&mut self, key: u64, now_ms: u64) {
        let Some(span) = self.spans.get_mut(&key).filter(|span| span.copies > 0) else { return };
        span.copies -= 1;
        if span.copies == 0 {
            span.changed_ms = now_ms;
            self.gone.push_back((now_ms, key));
            self.held -= 1;
        }
    }

    /// The engine holds nothing any more.
    pub fn clear(&mut self, now_ms: u64) {
        for key in self.held_keys() {
            if let Some(span) = self.spans.get_mut(&key) {
                *span = Span { copies: 0, changed_ms: now_ms };
                self.gone.push_back((now_ms, key));
            }
        }
        self.held = 0;
    }

    /// Forgets blocks that went long ago. To be called from time to time.
    pub fn forget(&mut self, now_ms: u64) {
        let before = now_ms.saturating_sub(MEMORY_MS);
        while let Some((at, key)) = self.gone.front().copied().filter(|(at, _)| *at < before) {
            self.gone.pop_front();
            // It may have come back since.
            if self.spans.get(&key).is_some_and(|span| span.copies == 0 && span.changed_ms == at) {
                self.spans.remove(&key);
            }
        }
    }

    /// Leading blocks of a chain each of which was held at some time from `since_ms` on: the most that an answer may claim.
    pub fn depth_since(&self, chain: &[u64], since_ms: u64) -> usize {
        let held = |span: &Span| span.copies > 0 || span.changed_ms >= since_ms;
        chain.iter().take_while(|key| self.spans.get(key).is_some_and(held)).count()
    }

    /// Leading blocks of a chain each of which has been held at least since `before_ms`: the least that an answer may say.
    pub fn depth_before(&self, chain: &[u64], before_ms: u64) -> usize {
        let settled = |span: &Span| span.copies > 0 && span.changed_ms <= before_ms;
        chain.iter().take_while(|key| self.spans.get(key).is_some_and(settled)).count()
    }

    /// Number of blocks held.
    pub fn held(&self) -> usize {
        self.held
    }

    /// The blocks held, in no particular order.
    pub fn held_keys(&self) -> Vec<u64> {
        self.spans.iter().filter(|(_, span)| span.copies > 0).map(|(key, _)| *key).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_that_went_may_be_claimed_for_the_window_and_no_longer() {
        let mut ledger = Ledger::default();
        (1..=3).for_each(|key| ledger.store(key, 100));
        ledger.remove(3, 500);
        assert_eq!([500, 501].map(|since| ledger.depth_since(&[1, 2, 3], since)), [3, 2]);
        assert_eq!([99, 100].map(|before| ledger.depth_before(&[1, 2, 3], before)), [0, 2]);
    }

    #[test]
    fn a_copy_keeps_the_block_held_and_its_time() {
        let mut ledger = Ledger::default();
        (0..2).for_each(|at| ledger.store(7, at));
        ledger.remove(7, 50);
        assert_eq!((ledger.held(), ledger.depth_before(&[7], 0)), (1, 1));
        ledger.remove(7, 60);
        ledger.remove(7, 70);
        assert_eq!((ledger.held(), ledger.depth_since(&[7], 60), ledger.depth_since(&[7], 61)), (0, 1, 0));
    }

    #[test]
    fn what_is_gone_is_forgotten_after_a_while_unless_it_came_back() {
        let mut ledger = Ledger::default();
        (1..=2).for_each(|key| ledger.store(key, 0));
        ledger.clear(10);
        ledger.store(2, 20);
        ledger.forget(10 + MEMORY_MS);
        assert_eq!(ledger.spans.len(), 2);
        ledger.forget(11 + MEMORY_MS);
        assert_eq!((ledger.spans.len(), ledger.held_keys(), ledger.held()), (1, vec![2], 1));
    }
}
