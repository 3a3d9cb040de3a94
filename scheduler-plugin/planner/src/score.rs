//! Every candidate for itself: what it would cost to serve the prompt there, as a value in [0, 1] for scorers.
//!
//! A value is 1 for the best candidate and falls with the cost, so scorers can mix it with others: for costs it is best
//! cost / this cost, for shares of the prompt it is the share. Beside expected time, the rules of other routers are here,
//! to compare with and to move from.

use kvatlas_proto::Tier;

use crate::cost;
use crate::explain;
use crate::plan::{Scratch, Term};
use crate::puller::{path, queue_at};
use crate::query::{PlanQuery, QueryError};

/// Worth of a block per tier, relative to one on the GPU: what the index uses unless told otherwise.
pub const DEFAULT_TIER_WEIGHTS: [f64; 4] = [1.0, 0.8, 0.5, 0.3];
/// llm-d's prefix threshold is off at 0 and never disaggregates.
pub const LLMD_NEVER: u32 = 0;
/// Dynamo stays local below this many tokens that must be computed ...
pub const DYNAMO_LOCAL_TOKENS: f64 = 2_048.0;
/// ... if they are also less than this share of the prompt.
pub const DYNAMO_LOCAL_SHARE: f64 = 0.7;

/// How candidates are valued.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Preset {
    /// Share of the prompt's full blocks that lead it without a hole, in whatever tier.
    Overlap,
    /// The same, each block with the weight of the fastest tier that has it (gpu, cpu, ssd, remote).
    Weighted([f64; 4]),
    /// Expected time to first token, prefilled and decoded there; best / this.
    Cost {
        /// Whether it may pull blocks from peers and pools.
        pulls: bool,
    },
    /// Mooncake's Algorithm 1: where the longest prefix anywhere is more than `threshold` times as long as the candidate's,
    /// the difference is transferred, else computed; transfer + queue + prefill; best / this.
    Mooncake {
        /// The published `kvcache_balancing_threshold`.
        threshold: f64,
    },
    /// llm-d's prefix-based decider for pods that decode: [`Preset::Overlap`], and whether to prefill elsewhere.
    LlmdPrefixDecider {
        /// Tokens that must be computed from which on another pod prefills; 0: never.
        non_cached_tokens: u32,
    },
    /// Dynamo's router: `overlap_weight * prefill blocks + decode blocks`, the lowest is taken; best / this.
    Dynamo {
        /// Weight of a block that must be computed.
        overlap_weight: f64,
    },
}

/// One candidate's value.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// Its number in the question.
    pub index: usize,
    /// 0 to 1, higher is better.
    pub value: f64,
    /// What the value was made from: ms for times, blocks for Dynamo; absent where it is a share.
    pub cost: Option<f64>,
    /// The terms of the expected time; empty for other presets.
    pub terms: Vec<Term>,
    /// Whether llm-d's decider would prefill elsewhere; absent for other presets.
    pub disaggregates: Option<bool>,
}

/// Leading blocks without a hole, and the weighted sum of them.
struct Leading {
    blocks: u32,
    worth: f64,
}

/// Values every candidate, in the order of the question.
pub fn score(
    query: &PlanQuery<'_>,
    preset: &Preset,
    scratch: &mut Scratch,
) -> Result<Vec<Scored>, QueryError> {
    query.check()?;
    let each = 0..query.candidates.len();
    let all_blocks = f64::from((query.prompt_tokens / query.block_tokens).max(1));
    let share = |index: usize, value: f64| Scored {
        index,
        value,
        cost: None,
        terms: Vec::new(),
        disaggregates: None,
    };
    Ok(match *preset {
        Preset::Overlap => {
            each.map(|at| share(at, f64::from(leading(query, at, &[0.0; 4]).blocks) / all_blocks)).collect()
        }
        Preset::Weighted(weights) => each
            .map(|at| share(at, (leading(query, at, &weights).worth / all_blocks).clamp(0.0, 1.0)))
            .collect(),
        Preset::LlmdPrefixDecider { non_cached_tokens } => each
            .map(|at| {
                let blocks = leading(query, at, &[0.0; 4]).blocks;
                let hit = query.tokens(blocks) as u32;
                let elsewhere = llmd_disaggregates(query.prompt_tokens, hit, non_cached_tokens);
                Scored { disaggregates: Some(elsewhere), ..share(at, f64::from(blocks) / all_blocks) }
            })
            .collect(),
        Preset::Mooncake { threshold } => by_cost(mooncake(query, threshold, scratch)),
        Preset::Dynamo { overlap_weight } => by_cost(
            each.map(|at| {
                let blocks = leading(query, at, &[0.0; 4]).blocks;
                (dynamo_cost(query, at, blocks, overlap_weight), Vec::new())
            })
            .collect(),
        ),
        Preset::Cost { pulls } => by_cost(expected_times(query, pulls, scratch)),
    })
}

/// llm-d's rule: prefill elsewhere if at least so many tokens are not cached on the pod that decodes.
pub fn llmd_disaggregates(prompt_tokens: u32, hit_tokens: u32, non_cached_tokens: u32) -> bool {
    non_cached_tokens != LLMD_NEVER && prompt_tokens.saturating_sub(hit_tokens) >= non_cached_tokens
}

/// Dynamo's conditional disaggregation: stay where it is decoded if little must be computed, or the prefill worker that
/// would be used is busy.
pub fn dynamo_stays_local(prompt_tokens: u32, hit_tokens: u32, prefill_busy: bool) -> bool {
    let new = f64::from(prompt_tokens.saturating_sub(hit_tokens));
    prefill_busy || (new < DYNAMO_LOCAL_TOKENS && new / f64::from(prompt_tokens.max(1)) < DYNAMO_LOCAL_SHARE)
}

fn by_cost(costs: Vec<(f64, Vec<Term>)>) -> Vec<Scored> {
    let best = costs.iter().map(|(cost, _)| *cost).fold(f64::INFINITY, f64::min);
    let value = |cost: f64| if cost <= best { 1.0 } else { best / cost };
    let scored = costs.into_iter().enumerate();
    scored
        .map(|(index, (cost, terms))| Scored {
            index,
            value: value(cost),
            cost: Some(cost),
            terms,
            disaggregates: None,
        })
        .collect()
}

fn expected_times(query: &PlanQuery<'_>, pulls: bool, scratch: &mut Scratch) -> Vec<(f64, Vec<Term>)> {
    scratch.prepare_all(query, pulls);
    (0..query.candidates.len())
        .map(|at| {
            let pair = scratch.alone(query, at);
            let segments = explain::segments(query, scratch, &pair);
            (pair.ttft_ms(), explain::terms(query, &pair, &segments))
        })
        .collect()
}

fn mooncake(query: &PlanQuery<'_>, threshold: f64, scratch: &mut Scratch) -> Vec<(f64, Vec<Term>)> {
    scratch.sources.prepare(query);
    let cap = query.usable_blocks();
    let prefixes: Vec<u32> =
        (0..query.candidates.len()).map(|at| leading(query, at, &[0.0; 4]).blocks.min(cap)).collect();
    let longest = (0..prefixes.len()).max_by_key(|&at| (prefixes[at], std::cmp::Reverse(at))).unwrap_or(0);
    let cost_of = |at: usize| {
        let (own, best) = (prefixes[at], prefixes[longest]);
        let transfers = f64::from(best) > threshold * f64::from(own);
        let cached = query.tokens(if transfers { best } else { own });
        let engine = query.engine(at);
        let (queue_ms, slower) = queue_at(query, at);
        let new = f64::from(query.prompt_tokens) - cached;
        let prefill_ms = cost::prefill_ms(&engine.prefill, new, cached) * slower;
        if !transfers {
            return queue_ms + prefill_ms;
        }
        let path = path(query, &scratch.sources, longest as u32, at as u32);
        let size = cost::KvSize::new(&query.costs.model, engine.tensor_parallel);
        let bytes = size.bytes(query.tokens(best - own));
        path.alpha_ms + cost::moving_ms(bytes, path.gb_per_s) + queue_ms + prefill_ms
    };
    (0..prefixes.len()).map(|at| (cost_of(at), Vec::new())).collect()
}

fn dynamo_cost(query: &PlanQuery<'_>, at: usize, overlap_blocks: u32, overlap_weight: f64) -> f64 {
    let load = &query.candidates[at].load;
    let block = f64::from(query.block_tokens);
    let new = f64::from(query.prompt_tokens) - query.tokens(overlap_blocks);
    let prefill_blocks = (new.max(0.0) + load.waiting_prefill_tokens as f64) / block;
    let capacity = query.engine(at).kv_capacity_tokens.unwrap_or(0) as f64;
    let active_blocks = load.kv_usage * capacity / block;
    overlap_weight * prefill_blocks
        + active_blocks
        + f64::from(query.prompt_tokens.div_ceil(query.block_tokens))
}

/// Walks over the candidate's interval ends; `weights` by tier.
fn leading(query: &PlanQuery<'_>, at: usize, weights: &[f64; 4]) -> Leading {
    let held = query.candidates[at].held;
    let all = query.prompt_tokens / query.block_tokens;
    let (mut block, mut worth) = (0, 0.0);
    while block < all {
        let here =
            held.iter().filter(|h| h.tier != Tier::Unknown && h.first_block <= block && block < h.end_block);
        let Some(fastest) = here.min_by_key(|h| (h.tier, std::cmp::Reverse(h.end_block))) else { break };
        // A faster tier may begin before this one ends.
        let faster =
            held.iter().filter(|h| h.tier < fastest.tier && h.first_block > block).map(|h| h.first_block);
        let end = faster.fold(fastest.end_block.min(all), u32::min);
        worth += f64::from(end - block) * weights[fastest.tier as usize];
        block = end;
    }
    Leading { blocks: block, worth }
}

// === impl Scratch ===

impl Scratch {
    /// Walks for every candidate, those that only decode too.
    fn prepare_all(&mut self, query: &PlanQuery<'_>, pulls: bool) {
        self.sources.prepare(query);
        self.walks.clear();
        for index in 0..query.candidates.len() {
            self.walks.walk(query, &self.sources, index, pulls);
        }
    }
}
