//! A place (medium and cache group) of one source, and counters by place.

use std::collections::VecDeque;

use foldhash::fast::FixedState;
use hashbrown::HashMap;
use kvatlas_proto::frame::FrameOwner;
use smallvec::SmallVec;

use crate::event::EngineHash;

/// A medium and cache group: one owner of the source.
pub(super) struct Place {
    pub(super) owner: FrameOwner,
    pub(super) remote: bool,
    /// Greatest common divisor of the numbers of hashes per stored event; 0 before the first.
    pub(super) chunk: u32,
    /// Whether it says what it drops.
    pub(super) removals: Removals,
}

/// Whether a medium says what it drops.
pub(super) enum Removals {
    /// It does, or is device memory, which always does.
    Announced,
    /// It has not so far: what it took in expires.
    NeverSeen {
        /// When each hash expires, nanoseconds.
        deadlines: HashMap<EngineHash, u64, FixedState>,
        /// The same in order; an entry whose deadline has moved is void.
        queue: VecDeque<(u64, EngineHash)>,
    },
}

/// Small counters by place.
#[derive(Default)]
pub(super) struct Counts(pub(super) SmallVec<[(u8, u32); 2]>);

// === impl Counts ===

impl Counts {
    pub(super) fn get(&self, place: u8) -> u32 {
        self.0.iter().find(|(p, _)| *p == place).map_or(0, |(_, n)| *n)
    }

    /// Adds one and says whether it is the first.
    pub(super) fn add(&mut self, place: u8) -> bool {
        if let Some((_, n)) = self.0.iter_mut().find(|(p, _)| *p == place) {
            *n = n.saturating_add(1);
            return false;
        }
        self.0.push((place, 1));
        true
    }

    /// Takes one away and says whether it was the last. Must be held.
    pub(super) fn take(&mut self, place: u8) -> bool {
        match self.get(place) {
            0 | 1 => self.take_all(place),
            n => self.set(place, n - 1),
        }
    }

    /// Takes all away: true, for the last has gone.
    pub(super) fn take_all(&mut self, place: u8) -> bool {
        self.0.retain(|(p, _)| *p != place);
        true
    }

    /// Sets a number above 0: false, for some are left. Must be held.
    pub(super) fn set(&mut self, place: u8, copies: u32) -> bool {
        self.0.iter_mut().filter(|(p, _)| *p == place).for_each(|(_, n)| *n = copies);
        false
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn places(&self) -> SmallVec<[u8; 4]> {
        self.0.iter().map(|(place, _)| *place).collect()
    }
}

// === impl Place ===

impl Place {
    /// The next hash whose time is up.
    pub(super) fn next_expired(&mut self, now_ns: u64) -> Option<EngineHash> {
        let Removals::NeverSeen { deadlines, queue } = &mut self.removals else { return None };
        while queue.front().is_some_and(|(deadline, _)| *deadline <= now_ns) {
            let (deadline, hash) = queue.pop_front()?;
            if deadlines.get(&hash) == Some(&deadline) {
                deadlines.remove(&hash);
                return Some(hash);
            }
        }
        None
    }
}
