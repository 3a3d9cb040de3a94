//! What one prefill instance pays: for a stretch from a source, for computing the rest, for both together.

use kvatlas_proto::Tier;

use crate::cost::{self, KvSize};
use crate::profile::EngineProfile;
use crate::query::PlanQuery;
use crate::sources::{Piece, Sources, TIERS};
use crate::topology::LinkClass;

/// No source, no node.
pub(crate) const NONE: u32 = u32::MAX;
/// The lane of what the instance loads from its own tiers: it all goes through its host.
pub(crate) const OWN: usize = 0;
/// The lane of what comes over the network: it all goes through its port.
pub(crate) const NETWORK: usize = 1;

/// What lies between a source and an instance, others' transfers considered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Path {
    pub(crate) class: LinkClass,
    pub(crate) alpha_ms: f64,
    pub(crate) gb_per_s: f64,
    pub(crate) scarce: bool,
}

/// A priced place to stop fetching.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stop {
    /// With all of the prefill.
    pub(crate) whole: f64,
    /// With the last layer's share of it.
    pub(crate) hidden: f64,
    /// First block that is computed.
    pub(crate) block: u32,
    /// What was taken up to an interval end ...
    pub(crate) node: u32,
    /// ... or, of which span the blocks up to `block` are taken, if it ends within one; else [`NONE`].
    pub(crate) span: u32,
    pub(crate) queue_ms: f64,
    /// Time of the blocks of the span.
    pub(crate) last_ms: f64,
    /// All of the fetch, hidden or not.
    pub(crate) fetch_ms: f64,
    pub(crate) start_ms: f64,
    pub(crate) prefill_ms: f64,
    /// What entries that are gone cost on average.
    pub(crate) stale_ms: f64,
}

/// A partial plan.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Partial {
    /// Time that each lane is busy.
    pub(crate) lanes: [f64; 2],
    /// Which own tiers were read.
    pub(crate) used: [bool; TIERS],
    /// Who sends over the network now, and in which tier.
    pub(crate) sender: (u32, u8),
    pub(crate) sender_alpha_ms: f64,
    /// Probability that all that was taken is there, and the cost where it is not, weighed.
    pub(crate) valid: f64,
    pub(crate) missed_ms: f64,
    pub(crate) extra_ms: f64,
    /// Tokens that were moved; windows move once.
    pub(crate) moved: f64,
    pub(crate) node: u32,
}

/// A stretch over which a partial plan takes an offer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) plan: Partial,
    pub(crate) offer: Offer,
    pub(crate) from: u32,
    pub(crate) to: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    Own,
    Peer,
    Pool,
}

/// What a source offers from here on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Offer {
    pub(crate) piece: Piece,
    pub(crate) network: bool,
    /// The lane that is busy with it.
    pub(crate) lane: usize,
    pub(crate) alpha_ms: f64,
    pub(crate) gb_per_s: f64,
    pub(crate) scarce: bool,
    pub(crate) valid: f64,
    pub(crate) detect_ms: f64,
    /// In the instance's own GPU: nothing moves.
    pub(crate) in_place: bool,
}

/// What a walk needs to know of its instance.
pub(crate) struct Puller<'a> {
    pub(crate) query: &'a PlanQuery<'a>,
    pub(crate) sources: &'a Sources,
    pub(crate) index: u32,
    pub(crate) engine: &'a EngineProfile,
    pub(crate) size: KvSize,
    pub(crate) queue_ms: f64,
    pub(crate) slower: f64,
    pub(crate) layers: f64,
    pub(crate) cap: u32,
    /// Start-up times of its own tiers.
    pub(crate) own_alpha_ms: [f64; TIERS],
}

/// What an instance's transfers over a class of link share: its port, or, within a machine, the direct link if that is
/// more. So nobody is slower to a near place than to a far one, which the grouping of sources relies on.
pub(crate) fn outlet_gb_per_s(class: LinkClass, path_gb_per_s: f64, port_gb_per_s: f64) -> f64 {
    if class.uses_port() { port_gb_per_s } else { path_gb_per_s.max(port_gb_per_s) }
}

/// What lies between `from` (a candidate or a pool) and the candidate `to`.
pub(crate) fn path(query: &PlanQuery<'_>, sources: &Sources, from: u32, to: u32) -> Path {
    let count = query.candidates.len() as u32;
    let receiver = &query.candidates[to as usize];
    let (place, transfers_out) = if from < count {
        let sender = &query.candidates[from as usize];
        (sender.location, sender.load.transfers_out)
    } else {
        (query.pools[(from - count) as usize].location, 0)
    };
    let class = place.link_to(receiver.location);
    let link = query.costs.links.of(class);
    if let Some((alpha_ms, gb_per_s)) = sources.link(from, to) {
        let transfers = transfers_out.max(receiver.load.transfers_in);
        let gb_per_s = cost::shared_gb_per_s(gb_per_s, transfers);
        return Path { class, alpha_ms, gb_per_s, scarce: link.scarce };
    }
    let port = |at: u32| outlet_gb_per_s(class, link.gb_per_s, query.engine(at as usize).port_gb_per_s);
    let sending = if from < count { cost::shared_gb_per_s(port(from), transfers_out) } else { f64::INFINITY };
    let receiving = cost::shared_gb_per_s(port(to), receiver.load.transfers_in);
    let gb_per_s = link.gb_per_s.min(sending).min(receiving);
    Path { class, alpha_ms: link.alpha_ms, gb_per_s, scarce: link.scarce }
}

fn alpha_ms(query: &PlanQuery<'_>, tier: usize) -> f64 {
    Tier::from_index(tier as u8)
        .and_then(|tier| query.costs.tiers.of(tier))
        .map_or(0.0, |speed| speed.alpha_ms)
}

/// Steps in which the candidate hands a prompt off: its layers, or one.
pub(crate) fn layers(query: &PlanQuery<'_>, index: usize) -> f64 {
    if query.engine(index).layer_wise { f64::from(query.costs.model.layers) } else { 1.0 }
}

/// Expected wait for prefill at a candidate, and by what its prefill is slower for what it decodes.
pub(crate) fn queue_at(query: &PlanQuery<'_>, at: usize) -> (f64, f64) {
    let (load, engine) = (&query.candidates[at].load, query.engine(at));
    let slower = cost::interference(engine.gamma, load.running_requests, engine.max_running);
    let chunk = cost::prefill_ms(&engine.prefill, f64::from(engine.chunk_tokens), 0.0);
    let elapsed = load.elapsed_ms.min(chunk);
    let queue = if load.waiting_requests == 0 && load.waiting_prefill_tokens == 0 {
        let service = cost::prefill_ms(&engine.prefill, f64::from(query.prompt_tokens), 0.0);
        cost::md1_wait_ms(load.prefill_utilisation, service)
    } else {
        cost::queued_ms(&engine.prefill, load.waiting_requests, load.waiting_prefill_tokens, elapsed)
    };
    (queue * slower, slower)
}

// === impl Partial ===

impl Default for Partial {
    fn default() -> Self {
        Self {
            lanes: [0.0; 2],
            used: [false; TIERS],
            sender: (NONE, 0),
            sender_alpha_ms: 0.0,
            valid: 1.0,
            missed_ms: 0.0,
            extra_ms: 0.0,
            moved: 0.0,
            node: NONE,
        }
    }
}

impl Partial {
    /// All loads one after another.
    pub(crate) fn loads_ms(&self) -> f64 {
        self.lanes[OWN] + self.lanes[NETWORK]
    }

    fn fetch_ms(&self, side_by_side: bool) -> f64 {
        if side_by_side { self.lanes[OWN].max(self.lanes[NETWORK]) } else { self.loads_ms() }
    }

    /// Whether no continuation of the other can be cheaper than the same continuation of this one, loads in sum.
    pub(crate) fn beats(&self, other: &Self, puller: &Puller<'_>) -> bool {
        // A tier that only the other has used is started there, and would have to be here.
        let starts = (0..TIERS).filter(|&tier| other.used[tier] && !self.used[tier]);
        let own_start: f64 = starts.map(|tier| puller.own_alpha_ms[tier]).sum();
        // Whoever sends for the other goes on without starting anew; here it would have to start.
        let same = self.sender == other.sender || other.sender.0 == NONE;
        let start = if same { 0.0 } else { other.sender_alpha_ms };
        let sooner = self.loads_ms() + own_start + start <= other.loads_ms();
        let certain = self.valid == 1.0 && other.valid == 1.0;
        let alike = self.used == other.used && self.sender == other.sender && self.valid >= other.valid;
        sooner
            && self.moved >= other.moved
            && (certain || alike)
            && self.missed_ms <= other.missed_ms
            && self.extra_ms <= other.extra_ms
    }
}

// === impl Offer ===

impl Offer {
    /// Whether no plan is better with the other than with this one: both come over the network.
    pub(crate) fn beats(&self, other: &Self) -> bool {
        self.network
            && other.network
            && self.alpha_ms <= other.alpha_ms
            && self.gb_per_s >= other.gb_per_s
            && self.piece.end >= other.piece.end
            && self.valid >= other.valid
            && self.scarce <= other.scarce
    }
}

// === impl Puller ===

impl<'a> Puller<'a> {
    /// The candidate `index` as one that prefills.
    pub(crate) fn new(query: &'a PlanQuery<'a>, sources: &'a Sources, index: usize) -> Self {
        let engine = query.engine(index);
        let (queue_ms, slower) = queue_at(query, index);
        Self {
            query,
            sources,
            index: index as u32,
            engine,
            size: KvSize::new(&query.costs.model, engine.tensor_parallel),
            queue_ms,
            slower,
            layers: layers(query, index),
            cap: query.usable_blocks(),
            own_alpha_ms: std::array::from_fn(|tier| if tier == 0 { 0.0 } else { alpha_ms(query, tier) }),
        }
    }

    /// Adds the piece to the offers, unless it is among them, cannot be read, or is the instance's own as if it were a
    /// peer's. Network loads add up, so an offer that is worse in every way never helps; except whoever sends already,
    /// which need not start anew. Says whether it was added.
    pub(crate) fn add_offer(
        &self,
        piece: Piece,
        whose: Whose,
        plans: &[Partial],
        offers: &mut Vec<Offer>,
    ) -> bool {
        let known = |o: &Offer| o.piece.source == piece.source && o.piece.tier == piece.tier;
        if (whose == Whose::Peer && piece.source == self.index) || offers.iter().any(known) {
            return false;
        }
        let offer = self.offer(piece, whose);
        let sends = |o: &Offer| plans.iter().any(|plan| plan.sender == (o.piece.source, o.piece.tier));
        let beaten = offers.iter().any(|known| known.beats(&offer)) && !sends(&offer);
        if beaten || offer.gb_per_s <= 0.0 {
            return false;
        }
        offers.retain(|known| !offer.beats(known) || sends(known));
        offers.push(offer);
        true
    }

    fn offer(&self, piece: Piece, whose: Whose) -> Offer {
        let tier = Tier::from_index(piece.tier).unwrap_or(Tier::Unknown);
        let Some(read) = self.query.costs.tiers.of(tier) else {
            unreachable!("pieces of unknown media are never taken up")
        };
        let valid = cost::still_there(piece.age_ms, read.tau_s);
        if whose == Whose::Own {
            let gb_per_s = if tier == Tier::Gpu { f64::INFINITY } else { read.gb_per_s };
            return Offer {
                piece,
                network: false,
                lane: OWN,
                alpha_ms: read.alpha_ms,
                gb_per_s,
                scarce: false,
                valid,
                detect_ms: 0.0,
                in_place: tier == Tier::Gpu,
            };
        }
        let path = path(self.query, self.sources, piece.source, self.index);
        let count = self.query.candidates.len() as u32;
        let (read_alpha_ms, read_gb_per_s) = if whose == Whose::Pool {
            let pool = &self.query.pools[(piece.source - count) as usize];
            let gb_per_s = cost::shared_gb_per_s(pool.gb_per_s.unwrap_or(read.gb_per_s), pool.transfers_out);
            (pool.alpha_ms.unwrap_or(read.alpha_ms), gb_per_s)
        } else {
            (read.alpha_ms, read.gb_per_s)
        };
        Offer {
            piece,
            network: true,
            lane: NETWORK,
            alpha_ms: read_alpha_ms + path.alpha_ms,
            gb_per_s: path.gb_per_s.min(read_gb_per_s),
            scarce: path.scarce,
            valid,
            detect_ms: self.engine.detect_ms,
            in_place: false,
        }
    }

    /// Bytes that move if the plan takes these blocks from this offer.
    pub(crate) fn bytes(&self, plan: &Partial, offer: &Offer, from: u32, to: u32) -> f64 {
        if offer.in_place {
            return 0.0;
        }
        self.size.bytes(plan.moved + self.query.tokens(to - from)) - self.size.bytes(plan.moved)
    }

    /// The plan with the offer's blocks, and when its lane begins to move them. `None`: it never ends.
    pub(crate) fn take(&self, plan: &Partial, offer: &Offer, from: u32, to: u32) -> Option<(Partial, f64)> {
        let mut longer = *plan;
        let tier = usize::from(offer.piece.tier);
        let network = offer.network;
        let sender = (offer.piece.source, offer.piece.tier);
        let goes_on = if network { plan.sender == sender } else { plan.used[tier] };
        let bytes = self.bytes(plan, offer, from, to);
        let mut starts_ms = plan.lanes[offer.lane];
        if !offer.in_place {
            starts_ms += if goes_on { 0.0 } else { offer.alpha_ms };
            longer.lanes[offer.lane] = starts_ms + cost::moving_ms(bytes, offer.gb_per_s);
            longer.moved += self.query.tokens(to - from);
        }
        if !longer.lanes[offer.lane].is_finite() {
            return None;
        }
        if network {
            (longer.sender, longer.sender_alpha_ms) = (sender, offer.alpha_ms);
        } else {
            longer.used[tier] = true;
        }
        if !goes_on && offer.valid < 1.0 {
            longer.valid *= offer.valid;
            let without = cost::start_ms(
                self.queue_ms,
                plan.fetch_ms(self.engine.loads_side_by_side),
                self.engine.loads_while_queued,
            ) + self.prefill_from(from);
            longer.missed_ms += (plan.valid - longer.valid) * (without + offer.detect_ms);
        }
        longer.extra_ms += self.scarce_ms(offer, bytes);
        Some((longer, starts_ms))
    }

    /// The plan with the offer's blocks up to `block`, priced; `span` is where they are kept.
    pub(crate) fn stop_within(&self, within: &Span, span: u32, block: u32) -> Stop {
        let Span { plan, offer, from, .. } = within;
        let taken = self.take(plan, offer, *from, block);
        let (part, _) = taken.expect("the whole span is finite, so a part of it is");
        let last_ms = part.lanes[offer.lane] - plan.lanes[offer.lane];
        Stop { span, last_ms, ..self.stop(&part, block) }
    }

    /// The block from which on prefilling takes this long; `None` if no block does.
    pub(crate) fn block_where_prefill_takes(&self, ms: f64) -> Option<u32> {
        let (cost, all) = (&self.engine.prefill, f64::from(self.query.prompt_tokens));
        let (c1, c2) = (cost.c1_ms_per_token, cost.c2_ms_per_token2);
        let left = cost::prefill_ms(cost, all, 0.0) - ms / self.slower;
        // The positive root of c2 h^2 + c1 h = left, in the form that bears c2 = 0.
        let tokens = 2.0 * left / (c1 + (c1 * c1 + 4.0 * c2 * left.max(0.0)).sqrt());
        let within = tokens > 0.0 && tokens < all;
        within.then(|| (tokens / f64::from(self.query.block_tokens)) as u32)
    }

    /// What prefilling here costs at least: all blocks that may be cached for nothing, as soon as the queue is done.
    pub(crate) fn at_least_ms(&self) -> f64 {
        let prefill_ms = self.prefill_from(self.cap);
        self.queue_ms + prefill_ms + self.gpu_ms(prefill_ms)
    }

    /// What this much computing is worth besides its time.
    fn gpu_ms(&self, prefill_ms: f64) -> f64 {
        let gpu_s = prefill_ms / 1e3 * f64::from(self.engine.tensor_parallel);
        self.query.objective.lambda_ms_per_gpu_s * gpu_s
    }

    fn scarce_ms(&self, offer: &Offer, bytes: f64) -> f64 {
        if offer.scarce { self.query.objective.nu_ms_per_gb * bytes / 1e9 } else { 0.0 }
    }

    fn prefill_from(&self, block: u32) -> f64 {
        let cached = self.query.tokens(block);
        let new = f64::from(self.query.prompt_tokens) - cached;
        cost::prefill_ms(&self.engine.prefill, new, cached) * self.slower
    }

    pub(crate) fn stop(&self, plan: &Partial, block: u32) -> Stop {
        let fetch_ms = plan.fetch_ms(self.engine.loads_side_by_side);
        let start_ms = cost::start_ms(self.queue_ms, fetch_ms, self.engine.loads_while_queued);
        let prefill_ms = self.prefill_from(block);
        let both = start_ms + prefill_ms;
        let stale_ms = plan.missed_ms + plan.valid * both - both;
        let besides = stale_ms + plan.extra_ms + self.gpu_ms(prefill_ms);
        Stop {
            whole: both + besides,
            hidden: start_ms + prefill_ms / self.layers + besides,
            block,
            node: plan.node,
            span: NONE,
            last_ms: 0.0,
            queue_ms: self.queue_ms,
            fetch_ms,
            start_ms,
            prefill_ms,
            stale_ms,
        }
    }
}
