//! Who is the best holder of each block, worked out once for all prefill instances.
//!
//! A block is held by many, and for one prefill instance only the best of each link class matters. So holders are put
//! into one group per place (island, node, rack, zone, everywhere) and tier, and each group is swept once over its
//! interval ends: the result is a list of pieces, each with the holder that sends fastest (then the one that reaches
//! farthest, then the freshest, then the first), and a second list with the second best, for whoever is the best itself.
//! An instance then looks at no more lists than there are classes and tiers, whatever the number of holders.
//!
//! Shared stores, and whoever has a link of its own, do not fit this order: they are looked at one by one.

use std::collections::BinaryHeap;

use kvatlas_proto::Tier;

use crate::cost::shared_gb_per_s;
use crate::puller::outlet_gb_per_s;
use crate::query::{Held, PlanQuery};
use crate::topology::{LinkClass, Location};

/// The tiers that blocks can be read from, by their number.
pub(crate) const TIERS: usize = 4;

/// Blocks that one source has in one tier.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Piece {
    pub(crate) start: u32,
    pub(crate) end: u32,
    /// A candidate by its number, then the pools.
    pub(crate) source: u32,
    pub(crate) tier: u8,
    pub(crate) age_ms: f64,
}

/// Pieces that lie next to each other in [`Sources::pieces`], in ascending order without overlap.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Stretch {
    pub(crate) from: u32,
    pub(crate) to: u32,
}

/// What a prefill instance chooses from. Kept between questions so that nothing is allocated.
#[derive(Debug, Default)]
pub(crate) struct Sources {
    pub(crate) pieces: Vec<Piece>,
    /// Pieces of each source and tier: `source * TIERS + tier`.
    own: Vec<Stretch>,
    /// By class, label and tier; ascending.
    groups: Vec<(GroupKey, Stretch, Stretch)>,
    /// Sources looked at one by one, ascending.
    singles: Vec<u32>,
    entries: Vec<Entry>,
    heap: BinaryHeap<Ranked>,
    links: Vec<(u32, u32, f64, f64)>,
}

/// Class, label (0 for everywhere), tier.
type GroupKey = (u8, u64, u8);

#[derive(Clone, Copy, Debug)]
struct Entry {
    key: GroupKey,
    speed: f64,
    piece: Piece,
}

/// Greater is better.
#[derive(Clone, Copy, Debug)]
struct Ranked {
    speed: f64,
    piece: Piece,
}

// === impl Ranked ===

impl Ord for Ranked {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.speed.total_cmp(&other.speed))
            .then(self.piece.end.cmp(&other.piece.end))
            .then(other.piece.age_ms.total_cmp(&self.piece.age_ms))
            .then(other.piece.source.cmp(&self.piece.source))
    }
}

impl PartialOrd for Ranked {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Ranked {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Ranked {}

// === impl Sources ===

impl Sources {
    /// Takes up a question.
    pub(crate) fn prepare(&mut self, query: &PlanQuery<'_>) {
        self.pieces.clear();
        self.own.clear();
        self.groups.clear();
        self.singles.clear();
        self.take_links(query);
        let cap = query.usable_blocks();
        let held = query.candidates.iter().map(|c| c.held).chain(query.pools.iter().map(|p| p.held));
        for (source, held) in held.enumerate() {
            for tier in 0..TIERS as u8 {
                let from = self.pieces.len() as u32;
                self.take_held(source as u32, tier, held, cap);
                self.own.push(Stretch { from, to: self.pieces.len() as u32 });
            }
        }
        let candidates = query.candidates.len() as u32;
        let linked = |source: &u32| self.links.binary_search_by_key(source, |&(from, ..)| from).is_ok();
        let named = (0..candidates).filter(linked);
        let pools = (0..query.pools.len() as u32).map(|pool| candidates + pool);
        self.singles.extend(named.chain(pools));
        self.group(query);
    }

    /// What the source has in the tier.
    pub(crate) fn own(&self, source: u32, tier: u8) -> Stretch {
        self.own[source as usize * TIERS + usize::from(tier)]
    }

    /// Best and second-best holders of the tier among all that share this class's label with the place.
    pub(crate) fn best(&self, class: LinkClass, place: Location, tier: u8) -> Option<(Stretch, Stretch)> {
        let label = place.label(class);
        if label == 0 && class != LinkClass::Other {
            return None;
        }
        let key = (class as u8, label, tier);
        let at = self.groups.binary_search_by_key(&key, |(key, ..)| *key).ok()?;
        let (_, best, second) = self.groups[at];
        Some((best, second))
    }

    /// Sources that are in no group.
    pub(crate) fn singles(&self) -> &[u32] {
        &self.singles
    }

    /// Start-up time and speed of a link that was given by name.
    pub(crate) fn link(&self, from: u32, to: u32) -> Option<(f64, f64)> {
        if self.links.is_empty() {
            return None;
        }
        let at = self.links.binary_search_by_key(&(from, to), |&(from, to, ..)| (from, to)).ok()?;
        let (.., alpha_ms, gb_per_s) = self.links[at];
        Some((alpha_ms, gb_per_s))
    }

    fn take_links(&mut self, query: &PlanQuery<'_>) {
        self.links.clear();
        if query.links.is_empty() {
            return;
        }
        let names = query.candidates.iter().map(|c| c.instance.as_str());
        let mut by_name: Vec<(&str, u32)> =
            names.chain(query.pools.iter().map(|p| p.name)).zip(0_u32..).collect();
        by_name.sort_unstable();
        // A name has one source per rank.
        let all = |name: &str| {
            let from = by_name.partition_point(|(known, _)| *known < name);
            let rest = &by_name[from..];
            &rest[..rest.partition_point(|(known, _)| *known == name)]
        };
        for link in query.links {
            for &(_, from) in all(link.from) {
                for &(_, to) in all(link.to) {
                    self.links.push((from, to, link.alpha_ms, link.gb_per_s));
                }
            }
        }
        // Stable, so that the last of a pair stays last; then it is kept.
        self.links.sort_by_key(|&(from, to, ..)| (from, to));
        self.links.reverse();
        self.links.dedup_by_key(|&mut (from, to, ..)| (from, to));
        self.links.reverse();
    }

    /// Intervals of one source and tier, clipped to the prompt; where they overlap or touch they become one, as old as
    /// the oldest.
    fn take_held(&mut self, source: u32, tier: u8, held: &[Held], cap: u32) {
        let from = self.pieces.len();
        let of_tier = held.iter().filter(|h| h.tier as u8 == tier && h.tier != Tier::Unknown);
        self.pieces.extend(of_tier.filter_map(|h| {
            let end = h.end_block.min(cap);
            (h.first_block < end).then_some(Piece {
                start: h.first_block,
                end,
                source,
                tier,
                age_ms: h.age_ms,
            })
        }));
        self.pieces[from..].sort_unstable_by_key(|piece| (piece.start, piece.end));
        let mut last = from;
        for at in from + 1..self.pieces.len() {
            let next = self.pieces[at];
            if next.start <= self.pieces[last].end {
                let kept = &mut self.pieces[last];
                kept.end = kept.end.max(next.end);
                kept.age_ms = kept.age_ms.max(next.age_ms);
            } else {
                last += 1;
                self.pieces[last] = next;
            }
        }
        self.pieces.truncate(if from == self.pieces.len() { from } else { last + 1 });
    }

    fn group(&mut self, query: &PlanQuery<'_>) {
        self.entries.clear();
        let mut pulled = [false; TIERS];
        for at in (0..query.candidates.len()).filter(|&at| query.candidates[at].role.prefills()) {
            query.engine(at).peer_tiers.iter().for_each(|label| pulled[label.tier() as usize] = true);
        }
        for (source, candidate) in query.candidates.iter().enumerate() {
            if self.singles.binary_search(&(source as u32)).is_ok() {
                continue;
            }
            let port = query.engine(source).port_gb_per_s;
            let transfers = candidate.load.transfers_out;
            for tier in (0..TIERS as u8).filter(|&tier| pulled[usize::from(tier)]) {
                let own = self.own(source as u32, tier);
                let Some(read) = Tier::from_index(tier).and_then(|tier| query.costs.tiers.of(tier)) else {
                    continue;
                };
                for class in LinkClass::ALL {
                    let label = candidate.location.label(class);
                    if label == 0 && class != LinkClass::Other {
                        continue;
                    }
                    // Limits that all of the group share are ties, so that the one who reaches farthest is taken.
                    let path = query.costs.links.of(class).gb_per_s;
                    let sending = shared_gb_per_s(outlet_gb_per_s(class, path, port), transfers);
                    let speed = sending.min(path).min(read.gb_per_s);
                    let key = (class as u8, label, tier);
                    let pieces = &self.pieces[own.from as usize..own.to as usize];
                    self.entries.extend(pieces.iter().map(|&piece| Entry { key, speed, piece }));
                }
            }
        }
        self.entries.sort_unstable_by_key(|entry| (entry.key, entry.piece.start, entry.piece.source));
        let entries = std::mem::take(&mut self.entries);
        for group in entries.chunk_by(|a, b| a.key == b.key) {
            let from = self.pieces.len() as u32;
            self.sweep(group, false);
            let middle = self.pieces.len() as u32;
            self.sweep(group, true);
            let to = self.pieces.len() as u32;
            self.groups.push((group[0].key, Stretch { from, to: middle }, Stretch { from: middle, to }));
        }
        self.entries = entries;
    }

    /// The best of the group at each block, or the second best, as pieces. A source has one interval at most at a block, so
    /// the second best is another source.
    fn sweep(&mut self, group: &[Entry], second: bool) {
        self.heap.clear();
        let first = self.pieces.len();
        let (mut next, mut at) = (0, group[0].piece.start);
        loop {
            while next < group.len() && group[next].piece.start <= at {
                self.heap.push(Ranked { speed: group[next].speed, piece: group[next].piece });
                next += 1;
            }
            let best = self.top(at);
            let (chosen, mut cut) = match (best, second) {
                (Some(best), true) => {
                    self.heap.pop();
                    let runner_up = self.top(at);
                    self.heap.push(best);
                    (runner_up, best.piece.end.min(runner_up.map_or(u32::MAX, |ranked| ranked.piece.end)))
                }
                (best, _) => (best, best.map_or(u32::MAX, |ranked| ranked.piece.end)),
            };
            // Whoever begins before the cut and is no better can wait in the heap.
            while next < group.len() && group[next].piece.start < cut {
                let later = Ranked { speed: group[next].speed, piece: group[next].piece };
                if chosen.is_none_or(|chosen| later.speed > chosen.speed) || second {
                    cut = later.piece.start;
                    break;
                }
                self.heap.push(later);
                next += 1;
            }
            if best.is_none() && next == group.len() {
                return;
            }
            if let Some(Ranked { piece, .. }) = chosen {
                match self.pieces[first..].last_mut() {
                    Some(last) if last.source == piece.source && last.end == at => last.end = cut,
                    _ => self.pieces.push(Piece { start: at, end: cut, ..piece }),
                }
            }
            at = cut;
        }
    }

    /// The best that is not over at this block.
    fn top(&mut self, at: u32) -> Option<Ranked> {
        while self.heap.peek().is_some_and(|best| best.piece.end <= at) {
            self.heap.pop();
        }
        self.heap.peek().copied()
    }
}

impl Stretch {
    /// Whether nothing lies in it.
    pub(crate) fn is_empty(self) -> bool {
        self.from == self.to
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(source: u32, speed: f64, start: u32, end: u32) -> Entry {
        Entry { key: (0, 0, 0), speed, piece: Piece { start, end, source, tier: 1, age_ms: 0.0 } }
    }

    fn swept(group: &[Entry], second: bool) -> Vec<(u32, u32, u32)> {
        let mut sources = Sources::default();
        sources.sweep(group, second);
        sources.pieces.iter().map(|piece| (piece.start, piece.end, piece.source)).collect()
    }

    #[test]
    fn of_equals_the_one_who_reaches_farthest_is_taken() {
        assert_eq!(
            swept(&[entry(0, 1.0, 0, 10), entry(1, 1.0, 0, 30), entry(2, 1.0, 0, 20)], false),
            [(0, 30, 1)]
        );
    }

    #[test]
    fn a_faster_one_is_taken_as_far_as_it_reaches() {
        let group = [entry(0, 3.0, 0, 10), entry(1, 1.0, 0, 30), entry(2, 2.0, 0, 20)];
        assert_eq!(swept(&group, false), [(0, 10, 0), (10, 20, 2), (20, 30, 1)]);
    }

    #[test]
    fn the_second_best_is_always_another_source() {
        let group = [entry(0, 3.0, 0, 10), entry(1, 1.0, 0, 30), entry(2, 2.0, 5, 20)];
        assert_eq!(swept(&group, true), [(0, 5, 1), (5, 10, 2), (10, 20, 1)]);
    }

    #[test]
    fn holes_stay_and_a_better_one_cuts_in() {
        let group = [entry(0, 1.0, 2, 10), entry(1, 2.0, 4, 6), entry(2, 1.0, 20, 22)];
        assert_eq!(swept(&group, false), [(2, 4, 0), (4, 6, 1), (6, 10, 0), (20, 22, 2)]);
    }
}
