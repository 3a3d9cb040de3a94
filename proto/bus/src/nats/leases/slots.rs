//! Which slot of a division a server takes, keeps, or leaves. Pure: what the bucket holds and the time are arguments.
//!
//! A division into N servers has slots (ordinal, replica), both from 0. What this module promises, whatever the order in
//! which servers come and go:
//!
//! * an ordinal without a server gets one before any other gets a further replica;
//! * a server that holds replica 0 of an ordinal keeps that ordinal in the next division if it exists there, so that only
//!   those shards move that the division moves;
//! * a server moves only where a difference of two or more replicas shrinks, so nobody moves back and forth.
//!
//! It does not decide who wins when two want the same slot: the bucket does, by compare and set.

use std::collections::BTreeSet;
use std::fmt;

/// How long a slot is a server's without being renewed, milliseconds. The time that a division can lack a server that died:
/// long enough for three renewals to be lost, short enough that a spare takes over before anybody is called.
pub const LEASE_MS: u64 = 6_000;
/// Longest time between two renewals, milliseconds: a third of the lease, so that two may be lost.
pub const RENEW_MS: u64 = 2_000;
/// Time between two looks at the bucket, milliseconds: how late a server notices a new division or a free slot.
pub(super) const LOOK_MS: u64 = 500;
/// Most replicas of an ordinal. Who finds all of them taken gets no slot; a deployment has two or three.
pub(super) const MAX_REPLICAS: u16 = 64;

const _: () =
    assert!(RENEW_MS + 2 * LOOK_MS <= LEASE_MS / 2, "a renewal may be lost and the lease must hold");

/// One place in a division of the shards among servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot {
    servers: u16,
    ordinal: u16,
    replica: u16,
}

/// What the bucket holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct View {
    /// Among how many servers the shards are to be divided; `None`: nobody has said so yet.
    pub(super) division: Option<u64>,
    /// Slots of any division that somebody holds.
    pub(super) taken: BTreeSet<Slot>,
}

/// What a server does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing before the next look.
    Rest,
    /// Nothing, because the division cannot be: it is none of servers for this many shards.
    Ignore(u64),
    /// Say among how many servers the shards are divided, unless somebody has.
    Found(u16),
    /// Take this slot if it is free.
    Take(Slot),
    /// Renew the slot that is held.
    Renew,
}

/// One server that wants a slot.
#[derive(Debug)]
pub(super) struct Tenant {
    initial: u16,
    max_servers: u16,
    state: State,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// It has had none yet, and looks for one since then.
    New { since_ms: Option<u64> },
    /// It has one.
    Holding { slot: Slot, renewed_ms: u64 },
    /// It had one.
    Lost { last: Slot },
}

// === impl Slot ===

impl Slot {
    /// `None` if there is no such slot.
    pub fn new(servers: u16, ordinal: u16, replica: u16) -> Option<Self> {
        (ordinal < servers && replica < MAX_REPLICAS).then_some(Self { servers, ordinal, replica })
    }

    /// Number of servers of the division.
    pub fn servers(self) -> u16 {
        self.servers
    }

    /// Which of them, from 0.
    pub fn ordinal(self) -> u16 {
        self.ordinal
    }

    /// Which of the servers with this ordinal, from 0.
    pub fn replica(self) -> u16 {
        self.replica
    }

    /// The inverse of the text form.
    pub(super) fn parse(key: &str) -> Option<Self> {
        let mut numbers = key.strip_prefix("slot.")?.split('.').map(|word| {
            // One spelling per slot: "07" and "+7" are none.
            let number: u16 = word.parse().ok()?;
            (number.to_string() == word).then_some(number)
        });
        let mut next = || numbers.next().flatten();
        let (servers, ordinal, replica) = (next()?, next()?, next()?);
        if numbers.next().is_some() { None } else { Self::new(servers, ordinal, replica) }
    }
}

/// The key in the bucket: `slot.N.I.R`.
impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot.{}.{}.{}", self.servers, self.ordinal, self.replica)
    }
}

// === impl View ===

impl View {
    /// Whether the server that holds this ordinal in another division is about to take it in this one.
    fn is_promised(&self, first: Slot) -> bool {
        let keeps =
            |slot: &Slot| slot.servers != first.servers && (slot.ordinal, slot.replica) == (first.ordinal, 0);
        !self.taken.contains(&first) && self.taken.iter().any(keeps)
    }

    /// By ordinal, how many servers have it or are about to.
    fn counts(&self, servers: u16) -> Vec<usize> {
        let mut counts = vec![0; usize::from(servers)];
        for slot in self.taken.iter().filter(|slot| slot.servers == servers) {
            counts[usize::from(slot.ordinal)] += 1;
        }
        for (ordinal, count) in (0..servers).zip(&mut counts) {
            *count += usize::from(self.is_promised(Slot { servers, ordinal, replica: 0 }));
        }
        counts
    }

    fn free_of(&self, servers: u16, ordinal: u16) -> Option<Slot> {
        let of = |replica| Slot { servers, ordinal, replica };
        let first = u16::from(self.is_promised(of(0)));
        (first..MAX_REPLICAS).map(of).find(|slot| !self.taken.contains(slot))
    }
}

// === impl Tenant ===

impl Tenant {
    /// A server that says `initial` where nobody has said among how many servers the shards are divided, and does not follow
    /// a division into more than `max_servers`.
    pub(super) fn new(initial: u16, max_servers: u16) -> Self {
        Self { initial, max_servers, state: State::New { since_ms: None } }
    }

    /// The slot that is held.
    pub(super) fn held(&self) -> Option<Slot> {
        match self.state {
            State::Holding { slot, .. } => Some(slot),
            State::New { .. } | State::Lost { .. } => None,
        }
    }

    /// What to do, given what the bucket holds.
    pub(super) fn next(&mut self, view: &View, now_ms: u64) -> Step {
        let Some(division) = view.division else {
            // The bucket is new, or has lost everything: what is divided already stays divided.
            return Step::Found(match self.state {
                State::New { .. } => self.initial,
                State::Holding { slot, .. } | State::Lost { last: slot } => slot.servers,
            });
        };
        let possible =
            u16::try_from(division).ok().filter(|servers| (1..=self.max_servers).contains(servers));
        match (self.state, possible) {
            (State::Holding { slot, renewed_ms }, _)
                if possible.is_none_or(|servers| servers == slot.servers)
                    && now_ms.saturating_sub(renewed_ms) + LOOK_MS >= RENEW_MS =>
            {
                Step::Renew
            }
            (_, None) => Step::Ignore(division),
            (State::Holding { slot, .. }, Some(servers)) if servers == slot.servers => {
                better(view, slot).map_or(Step::Rest, Step::Take)
            }
            (State::Holding { slot: last, .. } | State::Lost { last }, Some(servers)) => {
                choose(view, servers, Some(last)).map_or(Step::Rest, Step::Take)
            }
            (State::New { since_ms }, Some(servers)) => {
                let since_ms = since_ms.unwrap_or(now_ms);
                self.state = State::New { since_ms: Some(since_ms) };
                let Some(slot) = choose(view, servers, None) else { return Step::Rest };
                // Most often this is a server that has restarted, and its former life holds its slot still. A lease later it
                // gets that one, and need not take in another part first.
                let is_needed = view.counts(servers)[usize::from(slot.ordinal)] == 0;
                if is_needed || now_ms - since_ms >= LEASE_MS { Step::Take(slot) } else { Step::Rest }
            }
        }
    }

    /// The slot is this server's.
    pub(super) fn took(&mut self, slot: Slot, now_ms: u64) {
        self.state = State::Holding { slot, renewed_ms: now_ms };
    }

    /// The slot is not this server's any more.
    pub(super) fn lost(&mut self) {
        if let State::Holding { slot, .. } = self.state {
            self.state = State::Lost { last: slot };
        }
    }
}

/// The slot to take in a division into so many servers, for who had `last`; `None` if all are taken.
fn choose(view: &View, servers: u16, last: Option<Slot>) -> Option<Slot> {
    if let Some(last) = last
        && last.ordinal < servers
        && (last.replica == 0 || last.servers == servers)
    {
        let kept = Slot { servers, ..last };
        if !view.taken.contains(&kept) {
            return Some(kept);
        }
    }
    let counts = view.counts(servers);
    let had = last.map(|last| last.ordinal);
    let neediest = |ordinal: &u16| (counts[usize::from(*ordinal)], Some(*ordinal) != had, *ordinal);
    (0..servers).min_by_key(neediest).and_then(|ordinal| view.free_of(servers, ordinal))
}

/// The slot that needs the holder of `held` more than `held` does. Of the replicas of an ordinal, the last one goes.
fn better(view: &View, held: Slot) -> Option<Slot> {
    let counts = view.counts(held.servers);
    let of_held = |slot: &&Slot| (slot.servers, slot.ordinal) == (held.servers, held.ordinal);
    let is_last = view.taken.iter().filter(of_held).all(|slot| slot.replica <= held.replica);
    let neediest = (0..held.servers).min_by_key(|ordinal| counts[usize::from(*ordinal)])?;
    let gains = counts[usize::from(neediest)] + 2 <= counts[usize::from(held.ordinal)];
    if is_last && gains { view.free_of(held.servers, neediest) } else { None }
}

#[cfg(test)]
mod tests;
