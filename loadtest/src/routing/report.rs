//! What came of a study: a row per policy and load.

use serde::Serialize;

use super::fleet::{Fleet, Shape};
use super::policy::Policy;
use super::run::{Outcomes, Pace};
use super::trace::Trace;

/// All rows, and what they are about.
#[derive(Clone, Debug, Serialize)]
pub struct StudyReport {
    /// Which study.
    pub case: &'static str,
    /// Where the requests are from.
    pub trace: String,
    /// How many there are.
    pub requests: usize,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Engines that prefill.
    pub prefill_engines: u32,
    /// Engines that only decode.
    pub decode_engines: u32,
    /// Model and engine profile.
    pub profile: String,
    /// Blocks that fit the GPUs of one engine, and its lower tiers.
    pub blocks_per_engine: Vec<u32>,
    /// What an infinite cache that all share would have of the prompts, in the order of the trace; share of tokens.
    pub ideal_hit_share: f64,
    /// Time from an event to the index, ms.
    pub lag_ms: f64,
    /// Where chance comes from.
    pub seed: u64,
    /// By load, then policy.
    pub rows: Vec<Row>,
}

/// One policy at one load.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Which policy.
    pub policy: &'static str,
    /// Arrivals come so many times as fast as recorded.
    pub load: f64,
    /// Requests that were answered.
    pub answered: usize,
    /// Requests that fit no engine.
    pub refused: u64,
    /// Time to first token, mean, ms.
    pub ttft_mean_ms: f64,
    /// Median.
    pub ttft_p50_ms: f64,
    /// 99th percentile.
    pub ttft_p99_ms: f64,
    /// Time per later token, mean over requests that have some, ms.
    pub tpot_mean_ms: f64,
    /// Share of prompt tokens that were not computed.
    pub hit_share: f64,
    /// That, as a share of what an infinite shared cache would have.
    pub hit_of_ideal: f64,
    /// Time in which the busiest engine prefilled, relative to the mean.
    pub busiest_to_mean: f64,
    /// Share of time in which engines prefilled.
    pub prefill_share: f64,
    /// Pulled from peers, GB.
    pub pulled_gb: f64,
    /// Read from own host memory and disk, GB.
    pub loaded_gb: f64,
    /// Handed off from prefill to decode, GB.
    pub handed_gb: f64,
    /// Pulls that found blocks gone.
    pub stale_pulls: u64,
    /// Times that a request was thrown out for lack of space.
    pub preemptions: u64,
    /// By how much the planner's expectation of the time to first token was too long (or too short, below 0), mean, ms.
    pub expected_error_ms: Option<f64>,
}

// === impl StudyReport ===

impl StudyReport {
    /// A report without rows.
    pub(super) fn new(trace: &Trace, fleet: &Fleet, pace: Pace) -> Self {
        let (prefill_engines, decode_engines) = match fleet.shape {
            Shape::Together(engines) => (engines, 0),
            Shape::Apart { prefill, decode } => (prefill, decode),
        };
        let tiers = fleet.engine.tiers.iter().map(|tier| tier.blocks);
        Self {
            case: "routing",
            trace: trace.name.clone(),
            requests: trace.requests.len(),
            block_tokens: trace.block_tokens,
            prefill_engines,
            decode_engines,
            profile: fleet.costs.name.clone(),
            blocks_per_engine: std::iter::once(fleet.engine.gpu_blocks).chain(tiers).collect(),
            ideal_hit_share: trace.ideal_hit_tokens() as f64 / trace.prompt_tokens().max(1) as f64,
            lag_ms: pace.lag_us as f64 / 1e3,
            seed: pace.seed,
            rows: Vec::new(),
        }
    }
}

// === impl Row ===

impl Row {
    pub(super) fn new(policy: Policy, load: f64, trace: &Trace, outcomes: &Outcomes, ideal: f64) -> Self {
        let (mut ttfts, mut tpots, mut errors) = (Vec::new(), Vec::new(), Vec::new());
        let (mut cached, mut end_us) = (0, 0);
        for (served, request) in outcomes.served.iter().zip(&trace.requests) {
            end_us = end_us.max(served.ended_us);
            if served.first_us == 0 {
                continue;
            }
            let ttft_ms = (served.first_us - served.arrived_us) as f64 / 1e3;
            ttfts.push(ttft_ms);
            errors.extend(served.expected_ttft_ms.map(|expected| expected - ttft_ms));
            cached += u64::from(served.cached_tokens);
            if request.output_tokens > 1 {
                let us = (served.ended_us - served.first_us) as f64;
                tpots.push(us / 1e3 / f64::from(request.output_tokens - 1));
            }
        }
        ttfts.sort_by(f64::total_cmp);
        let totals = &outcomes.totals;
        let busiest = totals.prefill_us.iter().copied().max().unwrap_or(0) as f64;
        let busy = mean(&totals.prefill_us.iter().map(|us| *us as f64).collect::<Vec<_>>());
        let hit_share = cached as f64 / trace.prompt_tokens().max(1) as f64;
        Self {
            policy: policy.name(),
            load,
            answered: ttfts.len(),
            refused: totals.refused,
            ttft_mean_ms: mean(&ttfts),
            ttft_p50_ms: quantile(&ttfts, 0.5),
            ttft_p99_ms: quantile(&ttfts, 0.99),
            tpot_mean_ms: mean(&tpots),
            hit_share,
            hit_of_ideal: if ideal > 0.0 { hit_share / ideal } else { 0.0 },
            busiest_to_mean: if busy > 0.0 { busiest / busy } else { 1.0 },
            prefill_share: busy / (end_us.max(1) as f64),
            pulled_gb: totals.pulled_bytes / 1e9,
            loaded_gb: totals.loaded_bytes / 1e9,
            handed_gb: totals.handed_bytes / 1e9,
            stale_pulls: totals.stale_pulls,
            preemptions: totals.preemptions,
            expected_error_ms: (!errors.is_empty()).then(|| mean(&errors)),
        }
    }
}

fn mean(values: &[f64]) -> f64 {
    if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / values.len() as f64 }
}

/// Of sorted values.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = ((sorted.len() as f64 * share).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(at).copied().unwrap_or(0.0)
}
