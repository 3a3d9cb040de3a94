//! One factor on a known profile, from what an engine says of itself: two scrapes of vLLM's `/metrics`, and what happened
//! in between.
//!
//! Histograms say how long prompts were and how long prefills took, not which prompt took how long. So the three
//! coefficients cannot be told apart; what can be had is how much slower or faster the engine is than a profile
//! expects for the mean prompt. The uncertainty that is given covers chance only. What it does not cover: prompts of very
//! different lengths cost more than the mean prompt does (the quadratic part), and where only the time to first token is
//! there it contains the queue, so the factor is an upper bound.

use crate::cost::prefill_ms;
use crate::profile::PrefillCost;

/// Fewest requests between the scrapes: the error of a mean of fewer is above its worth.
pub const MIN_REQUESTS: f64 = 30.0;

const PREFILL: &str = "vllm:request_prefill_time_seconds";
const TTFT: &str = "vllm:time_to_first_token_seconds";
const PROMPT: &str = "vllm:request_prompt_tokens";
const PROMPT_TOTAL: &str = "vllm:prompt_tokens_total";
const HITS: &str = "vllm:prefix_cache_hits_total";

/// How an engine compares with a profile.
#[derive(Clone, Debug, PartialEq)]
pub struct Scale {
    /// Measured over expected time: above 1 the engine is slower.
    pub factor: f64,
    /// Standard error of the factor, relative: 0.1 is 10 %.
    pub uncertainty: f64,
    /// Requests it was made from.
    pub requests: f64,
    /// Mean prompt, tokens.
    pub mean_prompt_tokens: f64,
    /// Of it, cached.
    pub mean_cached_tokens: f64,
    /// Mean time, ms.
    pub mean_ms: f64,
    /// The profile, scaled.
    pub cost: PrefillCost,
    /// What is to be known about it, one sentence each.
    pub remarks: Vec<String>,
}

/// Two scrapes do not say enough.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum MetricsError {
    /// A metric is missing.
    #[error("there is no {0}: give the text of a vLLM engine's /metrics, twice")]
    Missing(&'static str),
    /// A counter went down.
    #[error(
        "{0} went down: the engine restarted between the scrapes, or they are in the wrong order; scrape again"
    )]
    Restarted(&'static str),
    /// Too little happened.
    #[error("{0} requests between the scrapes: wait for at least 30")]
    Requests(f64),
}

/// A histogram's growth.
struct Growth {
    count: f64,
    sum: f64,
    /// (upper bound, growth of the count up to it).
    buckets: Vec<(f64, f64)>,
}

/// Compares what an engine did between two scrapes with what `base` expects.
pub fn scale(before: &str, after: &str, base: &PrefillCost) -> Result<Scale, MetricsError> {
    let mut remarks = Vec::new();
    let times = match growth(before, after, PREFILL) {
        Err(MetricsError::Missing(_)) => {
            remarks.push("Only the time to first token is there; it contains the queue, so the factor is an upper bound.".to_owned());
            growth(before, after, TTFT)?
        }
        found => found?,
    };
    if times.count < MIN_REQUESTS {
        return Err(MetricsError::Requests(times.count));
    }
    let mean_prompt_tokens = match growth(before, after, PROMPT) {
        Ok(prompts) if prompts.count > 0.0 => prompts.sum / prompts.count,
        Err(MetricsError::Restarted(name)) => return Err(MetricsError::Restarted(name)),
        _ => difference(before, after, PROMPT_TOTAL)? / times.count,
    };
    let mean_cached_tokens = match difference(before, after, HITS) {
        Ok(hits) => (hits / times.count).min(mean_prompt_tokens),
        Err(MetricsError::Missing(name)) => {
            remarks.push(format!("There is no {name}: nothing is taken for cached."));
            0.0
        }
        Err(error) => return Err(error),
    };
    let mean_ms = times.sum / times.count * 1e3;
    let expected = prefill_ms(base, mean_prompt_tokens - mean_cached_tokens, mean_cached_tokens);
    let factor = mean_ms / expected;
    let uncertainty = times.deviation() / (times.sum / times.count) / times.count.sqrt();
    remarks.push(format!(
        "The mean of {} requests fixes one factor, not three coefficients; its standard error by chance is {:.0} %.",
        times.count,
        uncertainty * 1e2
    ));
    let cost = PrefillCost {
        c0_ms: base.c0_ms * factor,
        c1_ms_per_token: base.c1_ms_per_token * factor,
        c2_ms_per_token2: base.c2_ms_per_token2 * factor,
    };
    Ok(Scale {
        factor,
        uncertainty,
        requests: times.count,
        mean_prompt_tokens,
        mean_cached_tokens,
        mean_ms,
        cost,
        remarks,
    })
}

// === impl Growth ===

impl Growth {
    /// Standard deviation, with every value in the middle of its bucket; those above the last bound count as twice it.
    fn deviation(&self) -> f64 {
        let mean = self.sum / self.count;
        let (mut squares, mut below, mut reached) = (0.0, 0.0, 0.0);
        for &(bound, count) in &self.buckets {
            let middle = if bound.is_finite() { f64::midpoint(below, bound) } else { 2.0 * below };
            squares += (count - reached).max(0.0) * (middle - mean).powi(2);
            (below, reached) = (bound.min(f64::MAX), count);
        }
        // Without buckets: as wide as an exponential distribution.
        if self.buckets.is_empty() { mean } else { (squares / self.count).sqrt() }
    }
}

fn growth(before: &str, after: &str, name: &'static str) -> Result<Growth, MetricsError> {
    let count = difference_of(before, after, &format!("{name}_count"), name)?;
    let sum = difference_of(before, after, &format!("{name}_sum"), name)?;
    let old = buckets(before, name);
    let grown = buckets(after, name).into_iter().map(|(bound, count)| {
        let was = old.iter().find(|(known, _)| *known == bound).map_or(0.0, |(_, was)| *was);
        (bound, count - was)
    });
    let mut buckets: Vec<(f64, f64)> = grown.collect();
    buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
    Ok(Growth { count, sum, buckets })
}

fn difference(before: &str, after: &str, name: &'static str) -> Result<f64, MetricsError> {
    difference_of(before, after, name, name)
}

/// Summed over label sets: an endpoint may serve several engines or models.
fn difference_of(before: &str, after: &str, sample: &str, name: &'static str) -> Result<f64, MetricsError> {
    let total = |text: &str| samples(text, sample).map(|(_, value)| value).reduce(|a, b| a + b);
    let now = total(after).ok_or(MetricsError::Missing(name))?;
    let grown = now - total(before).unwrap_or(0.0);
    if grown < 0.0 { Err(MetricsError::Restarted(name)) } else { Ok(grown) }
}

/// Cumulative counts by upper bound, summed over label sets.
fn buckets(text: &str, name: &str) -> Vec<(f64, f64)> {
    let mut sums: Vec<(f64, f64)> = Vec::new();
    for (labels, value) in samples(text, &format!("{name}_bucket")) {
        let bound = labels.split(',').find_map(|label| label.trim().strip_prefix("le=\"")?.strip_suffix('"'));
        let Some(bound) = bound.and_then(|bound| bound.trim_start_matches('+').parse::<f64>().ok()) else {
            continue;
        };
        match sums.iter_mut().find(|(known, _)| *known == bound) {
            Some((_, sum)) => *sum += value,
            None => sums.push((bound, value)),
        }
    }
    sums
}

/// Labels and value of each line of this sample.
fn samples<'a>(text: &'a str, sample: &'a str) -> impl Iterator<Item = (&'a str, f64)> {
    text.lines().filter_map(move |line| {
        let rest = line.strip_prefix(sample)?;
        let (labels, value) = match rest.strip_prefix('{') {
            Some(rest) => rest.rsplit_once('}')?,
            None if rest.starts_with(' ') => ("", rest),
            None => return None,
        };
        let value: f64 = value.split_whitespace().next()?.parse().ok()?;
        value.is_finite().then_some((labels, value))
    })
}
