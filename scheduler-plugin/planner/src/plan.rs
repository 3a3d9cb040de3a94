//! The best (prefill, decode) pair, the source of each block, and why.
//!
//! Holders are grouped once (module `sources`), each prefill instance walks over its interval ends once
//! (module `walk`) and keeps a few stops; a pair then costs a few additions. Everything that is needed in between
//! lives in a [`Scratch`] that the caller keeps.

use kvatlas_proto::{DpRank, InstanceId, Tier};

use crate::cost::{self, KvSize};
use crate::explain;
use crate::profile::DEFAULT_OUTPUT_TOKENS;
use crate::puller::{Puller, Span, Stop, path};
use crate::query::{PlanQuery, QueryError};
use crate::sources::Sources;
use crate::topology::LinkClass;
use crate::walk::Walks;

/// What was decided.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Who prefills.
    pub prefill: Chosen,
    /// Who decodes; the same where the prompt is best prefilled where it is decoded.
    pub decode: Chosen,
    /// Expected time to first token, ms.
    pub expected_ttft_ms: f64,
    /// That and what else counts ([`Objective`](crate::Objective)), ms: what was minimised.
    pub objective_ms: f64,
    /// The terms; they add up to the expected time.
    pub terms: Vec<Term>,
    /// Where each stretch of the prompt comes from, in prompt order; the last one may be computed.
    pub segments: Vec<Segment>,
    /// Bytes over each link, fetches and hand-off.
    pub links: Vec<LinkUse>,
    /// The best other pair. `None` if there was none.
    pub alternative: Option<Alternative>,
    /// Request headers to set, by name.
    pub headers: Vec<(&'static str, String)>,
    /// Name of the cost profile.
    pub profile: String,
    /// What was assumed because nobody configured it, one sentence each.
    pub assumptions: Vec<String>,
    /// Partial plans that were not followed because of a bound; 0 where loads run one after another.
    pub dropped: u64,
}

/// One of the question's candidates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// Its number in the question.
    pub index: usize,
    /// Its name.
    pub instance: InstanceId,
    /// Its rank.
    pub rank: DpRank,
}

/// A part of the expected time.
#[derive(Clone, Debug, PartialEq)]
pub struct Term {
    /// One of [`TERMS`].
    pub name: &'static str,
    /// Milliseconds.
    pub ms: f64,
    /// What it was computed from, for a person.
    pub explanation: String,
}

/// Names of the terms, in the order of time: waiting for prefill, loads that this wait does not hide, computing, moving to
/// the decoder, waiting there, its first step, and what entries that are gone cost on average.
pub const TERMS: [&str; 7] = ["queue", "fetch", "prefill", "hand_off", "admit", "first_step", "staleness"];

/// A stretch of the prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Segment {
    /// First block, from 0.
    pub first_block: u32,
    /// Number of blocks, a partial one at the end included.
    pub blocks: u32,
    /// Instance or pool that it comes from. `None`: computed.
    pub source: Option<String>,
    /// Tier that it is read from. `None`: computed.
    pub tier: Option<Tier>,
    /// Bytes that move to the prefill instance; 0 in its GPU or if computed.
    pub bytes: u64,
    /// Time that takes, ms, hidden or not.
    pub ms: f64,
    /// What it comes over, if it comes from elsewhere.
    pub link: Option<LinkClass>,
}

/// Bytes over one link.
#[derive(Clone, Debug, PartialEq)]
pub struct LinkUse {
    /// Instance or pool that sends.
    pub from: String,
    /// Instance that receives.
    pub to: String,
    /// Class of the link.
    pub class: LinkClass,
    /// Bytes.
    pub bytes: u64,
    /// Time that takes, ms, hidden or not.
    pub ms: f64,
}

/// The best pair that was not chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Alternative {
    /// Who would have prefilled.
    pub prefill: Chosen,
    /// Who would have decoded.
    pub decode: Chosen,
    /// Its expected time to first token, ms.
    pub expected_ttft_ms: f64,
    /// By how much it lost, ms of the objective.
    pub lost_by_ms: f64,
    /// The term with the largest difference against it; "objective" where what lost it is no time to first token.
    pub decided_by: &'static str,
    /// Why it lost, for a person.
    pub reason: String,
}

/// There is no plan.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PlanError {
    /// The question cannot be answered as it is.
    #[error(transparent)]
    Query(#[from] QueryError),
    /// Nobody can prefill for anybody who can decode.
    #[error(
        "no candidate that prefills reaches one that decodes: give at least one of role both, or a prefill and a decode \
         instance whose engine hands off over a link with bandwidth"
    )]
    NoPair,
}

/// What a plan is worked out in. Keep it between questions: then nothing is allocated but the answer.
#[derive(Debug, Default)]
pub struct Scratch {
    pub(crate) sources: Sources,
    pub(crate) walks: Walks,
    decoders: Vec<Decoder>,
    /// Prefill instances with the least they cost.
    order: Vec<(f64, usize)>,
}

/// What a decode instance adds to a plan, whoever prefills.
#[derive(Clone, Copy, Debug)]
struct Decoder {
    index: u32,
    /// Leading blocks in its GPU.
    held_blocks: u32,
    missing_bytes: f64,
    admit_ms: f64,
    step_ms: f64,
    /// What later tokens' delay is worth.
    later_ms: f64,
}

/// What a prefill instance offers to every decoder.
struct Prefiller<'a> {
    puller: Puller<'a>,
    stops: &'a [Stop],
    spans: (u32, &'a [Span]),
    least_whole: f64,
    least_hidden: f64,
}

/// The two best pairs so far.
#[derive(Default)]
struct Top {
    best: Option<Pair>,
    second: Option<Pair>,
}

/// A pair with its best stop.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pair {
    pub(crate) prefill: usize,
    pub(crate) decode: usize,
    pub(crate) stop: Stop,
    pub(crate) objective_ms: f64,
    /// All of the hand-off, hidden or not, and what of it shows.
    pub(crate) transfer_ms: f64,
    pub(crate) hand_ms: f64,
    pub(crate) missing_bytes: f64,
    pub(crate) held_blocks: u32,
    pub(crate) admit_ms: f64,
    pub(crate) step_ms: f64,
}

/// The best plan for the question.
pub fn plan(query: &PlanQuery<'_>, scratch: &mut Scratch) -> Result<Plan, PlanError> {
    query.check()?;
    let (best, second) = scratch.best_pairs(query);
    let best = best.ok_or(PlanError::NoPair)?;
    Ok(explain::plan(query, scratch, &best, second.as_ref()))
}

// === impl Scratch ===

impl Scratch {
    /// The best pair and the best other one.
    ///
    /// Both sides are taken in the order of what they cost at least, so most that cannot be among the two best are never
    /// walked for or paired.
    fn best_pairs(&mut self, query: &PlanQuery<'_>) -> (Option<Pair>, Option<Pair>) {
        let Self { sources, walks, decoders, order } = self;
        sources.prepare(query);
        walks.clear();
        let each = 0..query.candidates.len();
        decoders.clear();
        let decoding = each.clone().filter(|&at| query.candidates[at].role.decodes());
        decoders.extend(decoding.map(|at| Decoder::new(query, sources, at)));
        decoders.sort_unstable_by(|a, b| a.paired_ms().total_cmp(&b.paired_ms()).then(a.index.cmp(&b.index)));
        let least_decode_ms = decoders.iter().map(Decoder::alone_ms).fold(f64::INFINITY, f64::min);
        order.clear();
        let prefilling = each.filter(|&at| query.candidates[at].role.prefills());
        order.extend(prefilling.map(|at| (Puller::new(query, sources, at).at_least_ms(), at)));
        order.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let mut top = Top::default();
        for (walk, &(least_ms, index)) in order.iter().enumerate() {
            if least_ms + least_decode_ms >= top.bound_ms() {
                break;
            }
            walks.walk(query, sources, index, true);
            let side = Prefiller::new(Puller::new(query, sources, index), walks, walk);
            if query.candidates[index].role.decodes() {
                top.offer(Decoder::new(query, sources, index).alone(&side));
            }
            let others = decoders.iter().filter(|decoder| decoder.index as usize != index);
            for decoder in others.take_while(|_| side.puller.engine.hands_off) {
                if side.least_whole + decoder.paired_ms() >= top.bound_ms() {
                    break;
                }
                if let Some(pair) = decoder.pair(&side, top.bound_ms()) {
                    top.offer(pair);
                }
            }
        }
        (top.best, top.second)
    }

    /// The candidate alone, for prefill and decode, whatever its role; every candidate was walked for, in order.
    pub(crate) fn alone(&self, query: &PlanQuery<'_>, index: usize) -> Pair {
        let decoder = Decoder::new(query, &self.sources, index);
        decoder.alone(&Prefiller::new(Puller::new(query, &self.sources, index), &self.walks, index))
    }
}

// === impl Prefiller ===

impl<'a> Prefiller<'a> {
    fn new(puller: Puller<'a>, walks: &'a Walks, walk: usize) -> Self {
        let stops = walks.stops(walk);
        let least = |price: fn(&Stop) -> f64| stops.iter().map(price).fold(f64::INFINITY, f64::min);
        Self {
            puller,
            stops,
            spans: walks.spans(walk),
            least_whole: least(|stop| stop.whole),
            least_hidden: least(|stop| stop.hidden),
        }
    }
}

// === impl Top ===

impl Top {
    /// What another pair must cost less than.
    fn bound_ms(&self) -> f64 {
        self.second.as_ref().map_or(f64::INFINITY, |pair| pair.objective_ms)
    }

    fn offer(&mut self, pair: Pair) {
        if self.best.as_ref().is_none_or(|best| pair.objective_ms < best.objective_ms) {
            self.second = self.best.replace(pair);
        } else if pair.objective_ms < self.bound_ms() {
            self.second = Some(pair);
        }
    }
}

// === impl Decoder ===

impl Decoder {
    fn new(query: &PlanQuery<'_>, sources: &Sources, index: usize) -> Self {
        let (load, engine) = (&query.candidates[index].load, query.engine(index));
        let gpu = sources.own(index as u32, Tier::Gpu as u8);
        let first = sources.pieces[gpu.from as usize..gpu.to as usize].first();
        let held_blocks = first.filter(|piece| piece.start == 0).map_or(0, |piece| piece.end);
        let missing = f64::from(query.prompt_tokens) - query.tokens(held_blocks);
        let step_ms = cost::step_ms(&engine.decode, load.running_requests + 1);
        let output = query.output_tokens.or(engine.output_tokens).unwrap_or(DEFAULT_OUTPUT_TOKENS);
        let output = f64::from(output);
        let admit_ms = if load.running_requests == 0 && load.kv_usage == 0.0 {
            0.0
        } else {
            cost::admit_ms(
                missing + output,
                load.kv_usage,
                engine.kv_capacity_tokens,
                output * step_ms,
                step_ms * f64::from(load.running_requests.min(1)),
            )
        };
        let idle_ms = cost::step_ms(&engine.decode, 1);
        Self {
            index: index as u32,
            held_blocks,
            missing_bytes: KvSize::new(&query.costs.model, engine.tensor_parallel).bytes(missing),
            admit_ms,
            step_ms,
            later_ms: query.objective.mu * (step_ms - idle_ms) * output,
        }
    }

    /// What it adds to its own prefill.
    fn alone_ms(&self) -> f64 {
        self.admit_ms + self.later_ms
    }

    /// What it adds to any other instance's prefill at least.
    fn paired_ms(&self) -> f64 {
        self.alone_ms() + self.step_ms
    }

    /// This instance for prefill too; it has a stop.
    fn alone(&self, side: &Prefiller<'_>) -> Pair {
        let best = side.stops.iter().min_by(|a, b| a.whole.total_cmp(&b.whole));
        let stop = *best.expect("computing everything is always a stop");
        Pair {
            prefill: self.index as usize,
            decode: self.index as usize,
            stop,
            objective_ms: stop.whole + self.alone_ms(),
            transfer_ms: 0.0,
            hand_ms: 0.0,
            missing_bytes: 0.0,
            held_blocks: self.held_blocks,
            admit_ms: self.admit_ms,
            step_ms: 0.0,
        }
    }

    /// This decoder with another instance's prefill, at its best stop; `None` if nothing gets through or it costs
    /// `bound`.
    fn pair(&self, side: &Prefiller<'_>, bound: f64) -> Option<Pair> {
        let puller = &side.puller;
        let (query, layers) = (puller.query, puller.layers);
        let path = path(query, puller.sources, puller.index, self.index);
        let transfer_ms = cost::moving_ms(self.missing_bytes, path.gb_per_s);
        let scarce = if path.scarce { query.objective.nu_ms_per_gb * self.missing_bytes / 1e9 } else { 0.0 };
        let fixed = self.paired_ms() + path.alpha_ms + scarce;
        // Where the prefill hides the transfer, the last layer's share shows; else all but the earlier layers' time.
        let price = |whole: f64, hidden: f64| (whole + transfer_ms / layers).max(hidden + transfer_ms);
        if !transfer_ms.is_finite() || price(side.least_whole, side.least_hidden) + fixed >= bound {
            return None;
        }
        let better = |best: (Stop, f64), next: (Stop, f64)| if next.1 < best.1 { next } else { best };
        let priced = |stop: Stop| (stop, price(stop.whole, stop.hidden));
        let (mut stop, mut least) = side.stops.iter().map(|stop| priced(*stop)).reduce(better)?;
        if layers > 1.0
            && let Some(block) = puller.block_where_prefill_takes(transfer_ms)
        {
            let (first, spans) = side.spans;
            for (span, number) in spans.iter().zip(first..) {
                for block in [block, block + 1] {
                    if span.from < block && block < span.to {
                        let within = priced(puller.stop_within(span, number, block));
                        (stop, least) = better((stop, least), within);
                    }
                }
            }
        }
        let objective_ms = least + fixed;
        (objective_ms < bound).then_some(Pair {
            prefill: puller.index as usize,
            decode: self.index as usize,
            stop,
            objective_ms,
            transfer_ms,
            hand_ms: cost::hand_off_ms(path.alpha_ms, transfer_ms, stop.prefill_ms, layers),
            missing_bytes: self.missing_bytes,
            held_blocks: self.held_blocks,
            admit_ms: self.admit_ms,
            step_ms: self.step_ms,
        })
    }
}

// === impl Pair ===

impl Pair {
    /// Milliseconds in the order of [`TERMS`].
    pub(crate) fn terms(&self) -> [f64; TERMS.len()] {
        let stop = &self.stop;
        [
            stop.queue_ms,
            stop.start_ms - stop.queue_ms,
            stop.prefill_ms,
            self.hand_ms,
            self.admit_ms,
            self.step_ms,
            stop.stale_ms,
        ]
    }

    /// Expected time to first token, ms.
    pub(crate) fn ttft_ms(&self) -> f64 {
        self.terms().iter().sum()
    }
}
