//! The best (prefill, decode) pair, the source of each block, and why.
//!
//! Holders are grouped once ([`sources`](crate::sources)), each prefill instance walks over its interval ends once
//! ([`walk`](crate::walk)) and keeps a few stops; a pair then costs a few additions. Everything that is needed in between
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
    /// Possibilities that were not followed because of a bound. 0 in practice.
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
    scratch.prepare(query);
    let (best, second) = scratch.best_pairs(query);
    let best = best.ok_or(PlanError::NoPair)?;
    Ok(explain::plan(query, scratch, &best, second.as_ref()))
}

// === impl Scratch ===

impl Scratch {
    /// Groups the sources and walks for everybody who prefills.
    fn prepare(&mut self, query: &PlanQuery<'_>) {
        self.sources.prepare(query);
        self.walks.clear();
        for (index, candidate) in query.candidates.iter().enumerate() {
            if candidate.role.prefills() {
                self.walks.walk(query, &self.sources, index, true);
            } else {
                self.walks.skip();
            }
        }
    }

    fn best_pairs(&mut self, query: &PlanQuery<'_>) -> (Option<Pair>, Option<Pair>) {
        let decoders = (0..query.candidates.len()).filter(|&at| query.candidates[at].role.decodes());
        self.decoders.clear();
        self.decoders.extend(decoders.map(|at| Decoder::new(query, &self.sources, at)));
        let (mut best, mut second): (Option<Pair>, Option<Pair>) = (None, None);
        for prefill in 0..query.candidates.len() {
            let stops = self.walks.stops(prefill);
            if stops.is_empty() {
                continue;
            }
            let least = |price: fn(&Stop) -> f64| stops.iter().map(price).fold(f64::INFINITY, f64::min);
            let side = Prefiller {
                puller: Puller::new(query, &self.sources, prefill),
                stops,
                spans: self.walks.spans(prefill),
                least_whole: least(|stop| stop.whole),
                least_hidden: least(|stop| stop.hidden),
            };
            let hands_off = side.puller.engine.hands_off;
            for decoder in &self.decoders {
                if decoder.index as usize != prefill && !hands_off {
                    continue;
                }
                let bound = second.as_ref().map_or(f64::INFINITY, |pair| pair.objective_ms);
                let Some(pair) = decoder.pair(&side, bound) else { continue };
                if best.as_ref().is_none_or(|best| pair.objective_ms < best.objective_ms) {
                    second = best.replace(pair);
                } else {
                    second = Some(pair);
                }
            }
        }
        (best, second)
    }

    /// The candidate alone, for prefill and decode, whatever its role; `None` if it was not walked for.
    pub(crate) fn alone(&self, query: &PlanQuery<'_>, index: usize) -> Option<Pair> {
        let decoder = Decoder::new(query, &self.sources, index);
        let side = Prefiller {
            puller: Puller::new(query, &self.sources, index),
            stops: self.walks.stops(index),
            spans: self.walks.spans(index),
            least_whole: 0.0,
            least_hidden: 0.0,
        };
        decoder.pair(&side, f64::INFINITY)
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

    /// This decoder with that prefill instance, at its best stop; `None` if nothing gets through or it costs `bound`.
    fn pair(&self, side: &Prefiller<'_>, bound: f64) -> Option<Pair> {
        let puller = &side.puller;
        let (query, layers) = (puller.query, puller.layers);
        let local = puller.index == self.index;
        let fixed = self.admit_ms + self.later_ms;
        if local {
            let best = side.stops.iter().min_by(|a, b| a.whole.total_cmp(&b.whole))?;
            let objective_ms = best.whole + fixed;
            return (objective_ms < bound).then_some(Pair {
                prefill: puller.index as usize,
                decode: puller.index as usize,
                stop: *best,
                objective_ms,
                transfer_ms: 0.0,
                hand_ms: 0.0,
                missing_bytes: 0.0,
                held_blocks: self.held_blocks,
                admit_ms: self.admit_ms,
                step_ms: 0.0,
            });
        }
        let path = path(query, puller.sources, puller.index, self.index);
        let transfer_ms = cost::moving_ms(self.missing_bytes, path.gb_per_s);
        let scarce = if path.scarce { query.objective.nu_ms_per_gb * self.missing_bytes / 1e9 } else { 0.0 };
        let fixed = fixed + path.alpha_ms + scarce + self.step_ms;
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
