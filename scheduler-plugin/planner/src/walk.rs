//! For one prefill instance: up to which block to fetch, from where, and what that costs. Linear in the interval ends.
//!
//! The walk goes over the ends of the intervals, from the prompt's start. Between two ends each source either has all
//! blocks or none, so a partial plan is extended by each source that has them. A partial plan that another beats in
//! every way is dropped; at most [`BEAM`] are kept. After each end every partial plan is priced as if the rest were
//! computed; that is a *stop*.
//!
//! Why stops lie at ends only: within an interval each block costs the same to fetch, and the farther back it is the
//! more it costs to compute, so fetching pays for none, all, or a tail that is worth its head. There are two exceptions. A
//! fetch may hide (behind the queue or the other kind of load) for a part of the interval: the last hidden block and the
//! one after it are stops too. And a hand-off may be hidden by the prefill for a part: where that ends depends on the
//! decoder, so a pair looks into the interval ([`Walks::spans`]).
//!
//! Two prices of a stop matter: one where all of the prefill counts, one where only the last layer's share does because
//! the hand-off hides the rest. Stops that another beats in both are dropped; at most [`STOPS`] are kept. So a decoder can
//! be paired with the instance in constant time.
//!
//! Sources are chosen as if all loads ran one after another; then the result is exact, but for one thing: an interval
//! comes from one source, even where a slower one for some of its blocks would hide behind the queue and save scarce
//! bytes. Where loads from own tiers run beside those over the network, the same choice is priced with the longer of the
//! two kinds. To choose by that would mean to balance the two, which takes a hundred times as long and needs blocks of
//! one interval from both.
//!
//! What the instance has in its GPU is used in place: nothing can be cheaper, unless the entry is old and may be gone.

use crate::cost;
use crate::puller::{NONE, Offer, Partial, Puller, Span, Stop, Whose};
use crate::query::PlanQuery;
use crate::sources::{Piece, Sources, Stretch, TIERS};
use crate::topology::LinkClass;

/// Partial plans kept per interval end. There are more only where old entries or scarce links make many differ in more than
/// their time; the cheapest are kept and the rest counted.
pub(crate) const BEAM: usize = 32;
/// Stops kept per instance; beyond it those between the two extremes go, the worst first, and are counted.
pub(crate) const STOPS: usize = 64;
/// Pieces ahead in a group's list whose holders are offered before their turn. Each costs one more offer per interval; more
/// would help only where a fourth holder in a row, each slower and reaching farther, is worth it for one start-up time.
const REACH_AHEAD: u32 = 2;
/// A price must be better by this much to count: below it is rounding, and the earlier stop moves fewer bytes.
const TIE_MS: f64 = 1e-9;
/// A stretch that was taken from a source; a path through these is a plan.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Node {
    pub(crate) parent: u32,
    pub(crate) source: u32,
    pub(crate) tier: u8,
    pub(crate) from: u32,
    pub(crate) to: u32,
    pub(crate) ms: f64,
}

/// Walks, one per prefill instance. Kept between questions so that nothing is allocated.
#[derive(Debug, Default)]
pub(crate) struct Walks {
    pub(crate) nodes: Vec<Node>,
    stops: Vec<Stop>,
    spans: Vec<Span>,
    /// Stops and spans of each walk.
    ranges: Vec<(Stretch, Stretch)>,
    plans: Vec<Partial>,
    next: Vec<Partial>,
    streams: Vec<Stream>,
    offers: Vec<Offer>,
    /// Partial plans dropped because there were more than [`BEAM`].
    pub(crate) plans_dropped: u64,
    /// Stops dropped because there were more than [`STOPS`].
    pub(crate) stops_dropped: u64,
}

#[derive(Clone, Copy, Debug)]
struct Stream {
    stretch: Stretch,
    whose: Whose,
}

// === impl Walks ===

impl Walks {
    /// Forgets the last question.
    pub(crate) fn clear(&mut self) {
        self.nodes.clear();
        self.stops.clear();
        self.spans.clear();
        self.ranges.clear();
        (self.plans_dropped, self.stops_dropped) = (0, 0);
    }

    /// The stops of the instance of the `at`th walk.
    pub(crate) fn stops(&self, at: usize) -> &[Stop] {
        let (stops, _) = self.ranges[at];
        &self.stops[stops.from as usize..stops.to as usize]
    }

    /// The stretches of the instance of the `at`th walk, and the number of the first one.
    pub(crate) fn spans(&self, at: usize) -> (u32, &[Span]) {
        let (_, spans) = self.ranges[at];
        (spans.from, &self.spans[spans.from as usize..spans.to as usize])
    }

    /// What was taken for a stop, in the order of the prompt.
    pub(crate) fn taken(&self, stop: &Stop) -> Vec<Node> {
        let mut nodes = Vec::new();
        let mut at = stop.node;
        if stop.span != NONE {
            let Span { plan, offer, from, .. } = self.spans[stop.span as usize];
            let Piece { source, tier, .. } = offer.piece;
            nodes.push(Node { parent: plan.node, source, tier, from, to: stop.block, ms: stop.last_ms });
            at = plan.node;
        }
        while at != NONE {
            let node = self.nodes[at as usize];
            nodes.push(node);
            at = node.parent;
        }
        nodes.reverse();
        nodes
    }

    /// Walks for the candidate `index`; `pulls`: from others too.
    pub(crate) fn walk(&mut self, query: &PlanQuery<'_>, sources: &Sources, index: usize, pulls: bool) {
        let puller = Puller::new(query, sources, index);
        let (first, first_span) = (self.stops.len(), self.spans.len() as u32);
        self.open_streams(&puller, pulls);
        self.plans.clear();
        self.plans.push(Partial::default());
        self.push_stop(first, puller.stop(&Partial::default(), 0));
        let mut at = 0;
        while at < puller.cap && !self.plans.is_empty() {
            let Some(end) = self.look(&puller, at) else { break };
            self.extend(&puller, first, (at, end));
            at = end;
        }
        let stops = Stretch { from: first as u32, to: self.stops.len() as u32 };
        self.ranges.push((stops, Stretch { from: first_span, to: self.spans.len() as u32 }));
    }

    fn open_streams(&mut self, puller: &Puller<'_>, pulls: bool) {
        let sources = puller.sources;
        self.streams.clear();
        let mut open = |stretch: Stretch, whose| {
            if !stretch.is_empty() {
                self.streams.push(Stream { stretch, whose });
            }
        };
        for tier in 0..TIERS as u8 {
            open(sources.own(puller.index, tier), Whose::Own);
        }
        if !pulls {
            return;
        }
        let place = puller.query.candidates[puller.index as usize].location;
        for label in &puller.engine.peer_tiers {
            let tier = label.tier() as u8;
            for class in LinkClass::ALL {
                let Some((best, second)) = sources.best(class, place, tier) else { continue };
                open(best, Whose::Peer);
                // Where the instance is the best of the group itself, the second best is its best peer.
                if !sources.own(puller.index, tier).is_empty() {
                    open(second, Whose::Peer);
                }
            }
        }
        let count = puller.query.candidates.len() as u32;
        for &source in sources.singles() {
            for tier in 0..TIERS as u8 {
                let pulled = puller.engine.peer_tiers.iter().any(|label| label.tier() as u8 == tier);
                if source >= count {
                    open(sources.own(source, tier), Whose::Pool);
                } else if pulled && source != puller.index {
                    open(sources.own(source, tier), Whose::Peer);
                }
            }
        }
    }

    /// Collects the offers for block `at`, and says up to where they stay the same. `None`: nobody has it.
    fn look(&mut self, puller: &Puller<'_>, at: u32) -> Option<u32> {
        self.offers.clear();
        let mut end = puller.cap;
        let pieces = &puller.sources.pieces;
        // Own streams come first, the GPU's before the others.
        for stream in &mut self.streams {
            let stretch = &mut stream.stretch;
            while !stretch.is_empty() && pieces[stretch.from as usize].end <= at {
                stretch.from += 1;
            }
            if stretch.is_empty() {
                continue;
            }
            let piece = pieces[stretch.from as usize];
            if piece.start > at {
                end = end.min(piece.start);
                continue;
            }
            let (plans, offers) = (&self.plans, &mut self.offers);
            if puller.add_offer(piece, stream.whose, plans, offers) {
                let added = offers[offers.len() - 1];
                if added.in_place && added.valid == 1.0 {
                    return Some(end.min(piece.end));
                }
            }
            // Whoever is taken later because of its reach has this block too, as a rule: starting with it saves a start.
            // Somebody who only begins later is another matter: there the offers change.
            let after = stretch.from + 1..stretch.to.min(stretch.from + 1 + REACH_AHEAD);
            for (at_later, is_next) in after.zip(std::iter::once(true).chain(std::iter::repeat(false))) {
                let later = pieces[at_later as usize];
                let own = puller.sources.own(later.source, later.tier);
                let own = &pieces[own.from as usize..own.to as usize];
                if let Some(&now) = own.iter().find(|piece| piece.start <= at && at < piece.end) {
                    puller.add_offer(now, stream.whose, plans, offers);
                } else if is_next {
                    end = end.min(later.start);
                }
            }
        }
        let ends = self.offers.iter().map(|offer| offer.piece.end);
        ends.min().map(|first| first.min(end))
    }

    /// Extends every partial plan by every offer, over the blocks of `reach`.
    fn extend(&mut self, puller: &Puller<'_>, first: usize, reach: (u32, u32)) {
        let (from, to) = reach;
        let plans = std::mem::take(&mut self.plans);
        let offers = std::mem::take(&mut self.offers);
        self.next.clear();
        for plan in &plans {
            for offer in &offers {
                let Some((mut longer, starts_ms)) = puller.take(plan, offer, from, to) else { continue };
                let ms = longer.lanes[offer.lane] - plan.lanes[offer.lane];
                longer.node = self.push_node(plan.node, offer, reach, ms);
                self.spans.push(Span { plan: *plan, offer: *offer, from, to });
                self.hidden_stops(puller, first, longer.lanes[offer.lane], starts_ms);
                self.push_stop(first, puller.stop(&longer, to));
                self.push_plan(puller, longer);
            }
        }
        (self.plans, self.offers) = (plans, offers);
        std::mem::swap(&mut self.plans, &mut self.next);
        if self.plans.len() > BEAM {
            self.plans_dropped += (self.plans.len() - BEAM) as u64;
            let price = |plan: &Partial| plan.loads_ms() + plan.extra_ms + plan.missed_ms;
            self.plans.sort_by(|a, b| price(a).total_cmp(&price(b)));
            self.plans.truncate(BEAM);
        }
    }

    /// Where the load stops to hide behind the queue (or the other kind of load) within this stretch, the last hidden
    /// block and the one after it are stops.
    fn hidden_stops(&mut self, puller: &Puller<'_>, first: usize, ends_ms: f64, starts_ms: f64) {
        let number = self.spans.len() as u32 - 1;
        let span = self.spans[number as usize];
        let Span { plan, offer, from, to } = &span;
        let other_ms = plan.lanes[1 - offer.lane];
        let queue_ms = if puller.engine.loads_while_queued { puller.queue_ms } else { 0.0 };
        // One after another, or side by side.
        let behind = [queue_ms - other_ms, queue_ms.max(other_ms)];
        for behind_ms in &behind[..=usize::from(puller.engine.loads_side_by_side)] {
            if starts_ms >= *behind_ms || ends_ms <= *behind_ms {
                continue;
            }
            let ends_at =
                |block| starts_ms + cost::moving_ms(puller.bytes(plan, offer, *from, block), offer.gb_per_s);
            let (mut hides, mut shows) = (*from, *to);
            while shows - hides > 1 {
                let middle = hides + (shows - hides) / 2;
                if ends_at(middle) <= *behind_ms { hides = middle } else { shows = middle }
            }
            for block in [hides, shows] {
                if block > *from && block < *to {
                    self.push_stop(first, puller.stop_within(&span, number, block));
                }
            }
        }
    }

    fn push_node(&mut self, parent: u32, offer: &Offer, (from, to): (u32, u32), ms: f64) -> u32 {
        let Piece { source, tier, .. } = offer.piece;
        self.nodes.push(Node { parent, source, tier, from, to, ms });
        self.nodes.len() as u32 - 1
    }

    fn push_plan(&mut self, puller: &Puller<'_>, plan: Partial) {
        if self.next.iter().any(|known| known.beats(&plan, puller)) {
            return;
        }
        self.next.retain(|known| !plan.beats(known, puller));
        self.next.push(plan);
    }

    fn push_stop(&mut self, first: usize, stop: Stop) {
        let beats = |a: &Stop, b: &Stop| a.whole <= b.whole + TIE_MS && a.hidden <= b.hidden + TIE_MS;
        if !stop.whole.is_finite() || self.stops[first..].iter().any(|known| beats(known, &stop)) {
            return;
        }
        let mut at = first;
        while at < self.stops.len() {
            if beats(&stop, &self.stops[at]) {
                self.stops.swap_remove(at);
            } else {
                at += 1;
            }
        }
        self.stops.push(stop);
        if self.stops.len() - first > STOPS {
            self.stops_dropped += 1;
            // Ascending in one price is descending in the other: the ends are the best of each.
            self.stops[first..].sort_by(|a, b| a.whole.total_cmp(&b.whole));
            let middle = first + 1..self.stops.len() - 1;
            let price = |stop: &Stop| stop.whole + stop.hidden;
            let worst = middle.max_by(|&a, &b| price(&self.stops[a]).total_cmp(&price(&self.stops[b])));
            self.stops.remove(worst.expect("more than two stops are there"));
        }
    }
}
