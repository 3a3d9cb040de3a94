//! What is asked: the prompt, who holds how much of it, how busy everybody is, and what counts. Checked once, at the door.

use kvatlas_proto::{DpRank, InstanceId, Tier};

use crate::profile::{CostProfile, EngineProfile};
use crate::topology::Location;

/// Most candidates of a question: more pods than one endpoint picker sees.
pub const MAX_CANDIDATES: usize = 4_096;
/// Most shared stores of a question: each is looked at for every candidate.
pub const MAX_POOLS: usize = 64;
/// Most links of a question: whoever is named in one is looked at for every candidate.
pub const MAX_LINKS: usize = 4_096;
/// Most intervals that one candidate or pool holds: a few per tier.
pub const MAX_INTERVALS: usize = 64;
/// Longest prompt, tokens: what the service accepts.
pub const MAX_PROMPT_TOKENS: u32 = 1_048_576;

/// One question.
#[derive(Clone, Copy, Debug)]
pub struct PlanQuery<'a> {
    /// Length of the prompt, tokens.
    pub prompt_tokens: u32,
    /// Tokens per block.
    pub block_tokens: u32,
    /// Who may be used.
    pub candidates: &'a [Candidate<'a>],
    /// Shared stores that hold some of the prompt.
    pub pools: &'a [PoolCoverage<'a>],
    /// Links that differ from their class.
    pub links: &'a [LinkOverride<'a>],
    /// Expected output, tokens. `None`: the engine's, else [`DEFAULT_OUTPUT_TOKENS`](crate::profile::DEFAULT_OUTPUT_TOKENS).
    pub output_tokens: Option<u32>,
    /// What things cost.
    pub costs: &'a CostProfile,
    /// What counts.
    pub objective: Objective,
}

/// What an instance may do in a plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// Prefill only.
    Prefill,
    /// Decode only.
    Decode,
    /// Both.
    #[default]
    Both,
}

/// One instance (or data-parallel rank of one) that may be used.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// Its name.
    pub instance: &'a InstanceId,
    /// Data-parallel rank.
    pub rank: DpRank,
    /// `ip:port` of the rank, where ranks are addressed one by one: becomes a header if it decodes.
    pub rank_address: Option<&'a str>,
    /// What it may do.
    pub role: Role,
    /// How busy it is.
    pub load: Load,
    /// What it holds of the prompt.
    pub held: &'a [Held],
    /// Where it stands.
    pub location: Location,
    /// Its engine, where that is not the question's; of the same model.
    pub engine: Option<&'a EngineProfile>,
}

/// How busy an instance is. Zero is idle.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Requests waiting for prefill.
    pub waiting_requests: u32,
    /// Their tokens that must be computed.
    pub waiting_prefill_tokens: u64,
    /// How long the chunk that runs now has been running, ms.
    pub elapsed_ms: f64,
    /// Share of time that it prefills, 0 to 1, for the expected wait where nothing is known to be waiting.
    pub prefill_utilisation: f64,
    /// Requests decoding.
    pub running_requests: u32,
    /// Share of its KV cache in use, 0 to 1.
    pub kv_usage: f64,
    /// Transfers to it in flight.
    pub transfers_in: u32,
    /// Transfers from it in flight.
    pub transfers_out: u32,
}

/// Consecutive blocks of the prompt in one tier.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Held {
    /// Where. An unknown medium is never a source.
    pub tier: Tier,
    /// First block, from 0.
    pub first_block: u32,
    /// The block after the last one.
    pub end_block: u32,
    /// Milliseconds since this was last known to be true.
    pub age_ms: f64,
}

/// A shared store that holds some of the prompt.
#[derive(Clone, Copy, Debug)]
pub struct PoolCoverage<'a> {
    /// Its name.
    pub name: &'a str,
    /// What it holds; the tier of each interval is where it is read from.
    pub held: &'a [Held],
    /// Where it stands.
    pub location: Location,
    /// Transfers from it in flight.
    pub transfers_out: u32,
    /// Read speed, GB/s. `None`: the tier's.
    pub gb_per_s: Option<f64>,
    /// Start-up time of a read, ms. `None`: the tier's.
    pub alpha_ms: Option<f64>,
}

/// A link that is known to differ from its class. The last one of a pair counts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkOverride<'a> {
    /// Instance or pool that blocks come from.
    pub from: &'a str,
    /// Instance they go to.
    pub to: &'a str,
    /// Start-up time, ms.
    pub alpha_ms: f64,
    /// GB/s.
    pub gb_per_s: f64,
}

/// What counts besides the expected time to first token, in milliseconds of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Objective {
    /// Worth of one second of one accelerator's prefill: keeps a plan from burning a free one to save 5 ms.
    pub lambda_ms_per_gpu_s: f64,
    /// Worth of one millisecond by which all later tokens together come later than on an idle decoder.
    pub mu: f64,
    /// Worth of one GB on a scarce link: keeps pulls off a busy spine.
    pub nu_ms_per_gb: f64,
}

/// A question cannot be answered as it is.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum QueryError {
    /// Nobody to use.
    #[error("there are no candidates: name at least one instance")]
    NoCandidates,
    /// Too many of something.
    #[error("there are {count} {what}: give at most {most}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        count: usize,
        /// How many may be.
        most: usize,
    },
    /// Blocks of nothing.
    #[error("block_tokens is 0: give the engines' block size, at least 1")]
    BlockTokens,
    /// A number is out of range.
    #[error("{what} of {whose} is {value}: give {allowed}")]
    Range {
        /// Which number.
        what: &'static str,
        /// Whose.
        whose: String,
        /// What was given.
        value: f64,
        /// What is allowed.
        allowed: &'static str,
    },
}

// === impl Role ===

impl Role {
    /// Whether it may prefill.
    pub fn prefills(self) -> bool {
        self != Self::Decode
    }

    /// Whether it may decode.
    pub fn decodes(self) -> bool {
        self != Self::Prefill
    }
}

// === impl Objective ===

impl Objective {
    /// Nothing but the expected time to first token.
    pub const TTFT_ONLY: Self = Self { lambda_ms_per_gpu_s: 0.0, mu: 0.0, nu_ms_per_gb: 0.0 };
}

impl Default for Objective {
    /// A GPU second is worth 10 ms, a later token's delay a tenth of the first one's, a GB on a scarce link 1 ms.
    fn default() -> Self {
        Self { lambda_ms_per_gpu_s: 10.0, mu: 0.1, nu_ms_per_gb: 1.0 }
    }
}

// === impl Held ===

impl Held {
    /// Blocks 0 to `blocks`, known to be there now.
    pub fn prefix(tier: Tier, blocks: u32) -> Self {
        Self { tier, first_block: 0, end_block: blocks, age_ms: 0.0 }
    }

    /// From a match's rows, fastest tier first, each (tier, blocks from 0 in this tier alone, blocks for which this is the
    /// fastest tier).
    ///
    /// A tier's own prefix is certain. Of blocks that are best served from a tier only their number is known: they are
    /// laid end to end, which is where they lie unless faster tiers have holes.
    pub fn of_match(rows: impl IntoIterator<Item = (Tier, u32, u32)>, age_ms: f64, into: &mut Vec<Self>) {
        let mut laid = 0;
        for (tier, matched, best) in rows {
            let (first, end) = (laid, laid + best);
            laid = end;
            if matched > 0 {
                into.push(Self { tier, first_block: 0, end_block: matched, age_ms });
            }
            if best > 0 && end > matched {
                into.push(Self { tier, first_block: first.max(matched), end_block: end, age_ms });
            }
        }
    }
}

// === impl PlanQuery ===

impl PlanQuery<'_> {
    /// Full blocks of the prompt that may be taken from a cache: at least one token is always computed.
    pub fn usable_blocks(&self) -> u32 {
        self.prompt_tokens.saturating_sub(1) / self.block_tokens
    }

    /// Tokens of this many leading blocks.
    pub(crate) fn tokens(&self, blocks: u32) -> f64 {
        f64::from(blocks) * f64::from(self.block_tokens)
    }

    /// The engine of this candidate.
    pub(crate) fn engine(&self, at: usize) -> &EngineProfile {
        self.candidates[at].engine.unwrap_or(&self.costs.engine)
    }

    /// Refuses what the planner's arithmetic is not made for.
    pub(crate) fn check(&self) -> Result<(), QueryError> {
        let most = |what, count, most| {
            if count > most { Err(QueryError::TooMany { what, count, most }) } else { Ok(()) }
        };
        if self.candidates.is_empty() {
            return Err(QueryError::NoCandidates);
        }
        if self.block_tokens == 0 {
            return Err(QueryError::BlockTokens);
        }
        most("candidates", self.candidates.len(), MAX_CANDIDATES)?;
        most("pools", self.pools.len(), MAX_POOLS)?;
        most("links", self.links.len(), MAX_LINKS)?;
        most("prompt tokens", self.prompt_tokens as usize, MAX_PROMPT_TOKENS as usize)?;
        let objective = &self.objective;
        for (what, value) in [
            ("lambda_ms_per_gpu_s", objective.lambda_ms_per_gpu_s),
            ("mu", objective.mu),
            ("nu_ms_per_gb", objective.nu_ms_per_gb),
        ] {
            at_least_0(what, "the objective", value)?;
        }
        for candidate in self.candidates {
            let (name, load) = (candidate.instance.as_str(), &candidate.load);
            most("intervals of one candidate", candidate.held.len(), MAX_INTERVALS)?;
            at_least_0("elapsed_ms", name, load.elapsed_ms)?;
            share("kv_usage", name, load.kv_usage)?;
            share("prefill_utilisation", name, load.prefill_utilisation)?;
            held(name, candidate.held)?;
        }
        for pool in self.pools {
            most("intervals of one pool", pool.held.len(), MAX_INTERVALS)?;
            at_least_0("alpha_ms", pool.name, pool.alpha_ms.unwrap_or(0.0))?;
            at_least_0("gb_per_s", pool.name, pool.gb_per_s.unwrap_or(0.0))?;
            held(pool.name, pool.held)?;
        }
        for link in self.links {
            at_least_0("alpha_ms", link.from, link.alpha_ms)?;
            // An infinite speed is a value: a link that costs its start-up time only.
            if link.gb_per_s.is_nan() || link.gb_per_s < 0.0 {
                return Err(range("gb_per_s", link.from, link.gb_per_s, "at least 0"));
            }
        }
        Ok(())
    }
}

fn range(what: &'static str, whose: &str, value: f64, allowed: &'static str) -> QueryError {
    QueryError::Range { what, whose: whose.to_owned(), value, allowed }
}

fn at_least_0(what: &'static str, whose: &str, value: f64) -> Result<(), QueryError> {
    let ok = value >= 0.0 && value.is_finite();
    if ok { Ok(()) } else { Err(range(what, whose, value, "a finite number of at least 0")) }
}

fn share(what: &'static str, whose: &str, value: f64) -> Result<(), QueryError> {
    if (0.0..=1.0).contains(&value) { Ok(()) } else { Err(range(what, whose, value, "0 to 1")) }
}

fn held(whose: &str, held: &[Held]) -> Result<(), QueryError> {
    held.iter().try_for_each(|interval| at_least_0("age_ms", whose, interval.age_ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_match_becomes_prefixes_and_the_stretches_between() {
        let mut held = Vec::new();
        Held::of_match([(Tier::Gpu, 10, 10), (Tier::Cpu, 0, 40), (Tier::Ssd, 60, 10)], 0.0, &mut held);
        let as_tuples: Vec<_> = held.iter().map(|h| (h.tier, h.first_block, h.end_block)).collect();
        assert_eq!(as_tuples, [(Tier::Gpu, 0, 10), (Tier::Cpu, 10, 50), (Tier::Ssd, 0, 60)]);
    }
}
