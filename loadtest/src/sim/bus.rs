//! The bus between shims and indexes, with its faults: which copies of a message arrive, when, and in what condition.
//!
//! Every pair of a shim and an index has its own faults and its own choices. Without a fault, a pair's messages of one
//! kind arrive in order after less than a millisecond.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::op::BusFault;
use super::rng::Rng;

/// Shortest and longest time on the way without a fault, microseconds.
const LATENCY_US: (u64, u64) = (100, 900);

/// What kind of message: kinds are separate subscriptions, so their order is not kept among one another. Each shard's events
/// are a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// Event frames of one shard, shim to index.
    Event(u16),
    /// Answers, shim to index.
    Reply,
    /// Requests, index to shim.
    Request,
    /// Greetings, index to shim.
    Hello,
}

/// All links of the bus.
pub(super) struct Bus {
    indexes: usize,
    links: Vec<Link>,
}

/// One copy of a message that arrives.
pub(super) struct Delivery {
    /// When, microseconds.
    pub(super) at_us: u64,
    /// What arrives.
    pub(super) payload: Bytes,
}

/// Faults and order between one shim and one index. Each fault ends by itself.
struct Link {
    rng: Rng,
    loss: Fault,
    duplicates: Fault,
    damage: Fault,
    delay: Fault,
    cut: Fault,
    /// When the last message of each kind arrives: the next one does not overtake it.
    last_us: BTreeMap<Kind, u64>,
}

#[derive(Clone, Copy, Default)]
struct Fault {
    until_us: u64,
    /// Percent or microseconds.
    amount: u64,
}

// === impl Fault ===

impl Fault {
    fn now(self, now_us: u64) -> Option<u64> {
        (now_us < self.until_us).then_some(self.amount)
    }
}

// === impl Bus ===

impl Bus {
    pub(super) fn new(seed: u64, shims: usize, indexes: usize) -> Self {
        let link = |number| Link {
            rng: Rng::new(seed, "bus", number),
            loss: Fault::default(),
            duplicates: Fault::default(),
            damage: Fault::default(),
            delay: Fault::default(),
            cut: Fault::default(),
            last_us: BTreeMap::new(),
        };
        Self { indexes, links: (0..(shims * indexes) as u64).map(link).collect() }
    }

    /// Begins a fault.
    pub(super) fn disturb(&mut self, pair: Option<(usize, usize)>, fault: BusFault, until_us: u64) {
        let only = pair.map(|(shim, index)| shim * self.indexes + index);
        for (number, link) in self.links.iter_mut().enumerate() {
            if only.is_some_and(|only| only != number) {
                continue;
            }
            let (which, amount) = match fault {
                BusFault::Loss { percent } => (&mut link.loss, percent.into()),
                BusFault::Duplicates { percent } => (&mut link.duplicates, percent.into()),
                BusFault::Damage { percent } => (&mut link.damage, percent.into()),
                BusFault::Delay { up_to_ms } => (&mut link.delay, up_to_ms * 1_000),
                BusFault::Cut => (&mut link.cut, 0),
            };
            *which = Fault { until_us, amount };
        }
    }

    /// Ends all faults. What is on its way stays so.
    pub(super) fn calm(&mut self) {
        for link in &mut self.links {
            for fault in
                [&mut link.loss, &mut link.duplicates, &mut link.damage, &mut link.delay, &mut link.cut]
            {
                fault.until_us = 0;
            }
        }
    }

    /// What becomes of a message.
    pub(super) fn send(
        &mut self,
        (shim, index): (usize, usize),
        kind: Kind,
        payload: &Bytes,
        now_us: u64,
    ) -> Vec<Delivery> {
        let link = &mut self.links[shim * self.indexes + index];
        let hits =
            |rng: &mut Rng, fault: Fault| fault.now(now_us).is_some_and(|percent| rng.below(100) < percent);
        if link.cut.now(now_us).is_some() || hits(&mut link.rng, link.loss) {
            return Vec::new();
        }
        let copies = if hits(&mut link.rng, link.duplicates) { 2 } else { 1 };
        (0..copies)
            .map(|_| {
                let at_us = link.arrival(kind, now_us);
                let damaged = hits(&mut link.rng, link.damage) && !payload.is_empty();
                let payload = if damaged { damage(payload, &mut link.rng) } else { payload.clone() };
                Delivery { at_us, payload }
            })
            .collect()
    }
}

// === impl Link ===

impl Link {
    fn arrival(&mut self, kind: Kind, now_us: u64) -> u64 {
        let at_us = now_us + self.rng.between(LATENCY_US.0, LATENCY_US.1);
        if let Some(longest_us) = self.delay.now(now_us) {
            return at_us + self.rng.below(longest_us + 1);
        }
        let last_us = self.last_us.entry(kind).or_default();
        *last_us = at_us.max(*last_us + 1);
        *last_us
    }
}

/// The same with one bit of another value.
pub(super) fn damage(bytes: &[u8], rng: &mut Rng) -> Bytes {
    let mut bytes = bytes.to_vec();
    let at = rng.below(bytes.len() as u64) as usize;
    bytes[at] ^= 1 << rng.below(8);
    bytes.into()
}
