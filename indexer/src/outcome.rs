//! Predicted against reported: what was said about a request when it was scored is remembered for a while, and compared
//! with what the engine says afterwards. Pure: time and rows come in, labels and numbers go out.
//!
//! A comparison is evidence only where the prediction was made before the engine served the request: afterwards the
//! request's own blocks are held too. So predictions that are looked up when the report comes are answered, but they
//! are neither counted as errors nor logged.

use kvatlas_proto::Tier;
use kvatlas_proto::grpc::PredictionSource;
use kvatlas_proto::ids::MAX_INSTANCE_BYTES;
use lru::LruCache;

use crate::matching::SourceMatch;
use crate::query::{ScoreAnswer, ScoreRow};
use crate::sources::SourceState;

/// Scored requests that are remembered: those of the last half minute at 250 requests a second.
pub const REMEMBERED_REQUESTS: usize = 8_192;
/// Rows (instance and rank) remembered over all requests, 32 per request on average: about 20 MB.
pub const REMEMBERED_ROWS: usize = 262_144;

/// Ages up to which a verification is told apart, milliseconds, with their names in metrics: one missed digest, a
/// repair, a lease's length.
const AGES: [(u64, &str); 3] = [(2_000, "le_2s"), (10_000, "le_10s"), (60_000, "le_60s")];

/// What an index said about one instance and rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Prediction {
    /// Prompt tokens that the engine would report as cached.
    pub(crate) tokens: u32,
    /// What it rests on; `None` if that is not known.
    basis: Option<Basis>,
}

/// What the index knew about a source when it made a prediction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Basis {
    /// The slowest tier that has to deliver; `None` if no token is predicted.
    tier: Option<Tier>,
    /// Tokens per block; 0 for an instance that no event ever named.
    block_size: u32,
    /// `None` for an instance that no event ever named.
    state: Option<SourceState>,
    /// Since the last comparison that was equal, milliseconds.
    verified_age_ms: Option<u64>,
}

/// A prediction beside what the engine reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) prediction: Prediction,
    pub(crate) source: PredictionSource,
    /// Prompt tokens that the engine reported as cached.
    pub(crate) reported: u32,
}

/// What was said about one request.
#[derive(Debug)]
pub(crate) struct ScoredRequest {
    rows: Vec<ScoredRow>,
    /// Everybody who holds something is among the rows.
    complete: bool,
    reported: bool,
}

#[derive(Debug)]
struct ScoredRow {
    instance: Box<str>,
    rank: u32,
    prediction: Prediction,
}

/// Requests that were forgotten before anybody reported their outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Unreported {
    /// To make room.
    pub(crate) evicted: u64,
    /// Because another request has the same id.
    pub(crate) replaced: u64,
}

/// The last scored requests by id, within two bounds.
#[derive(Debug)]
pub(crate) struct OutcomeMemory {
    /// In the order in which they were scored: nothing here moves an entry to the front.
    requests: LruCache<u64, ScoredRequest>,
    rows: usize,
    max_requests: usize,
    max_rows: usize,
}

// === impl Prediction ===

impl Prediction {
    /// What a row of an answer promises. The prompt's length must have been known.
    pub(crate) fn of_row(row: &ScoreRow, now_ms: u64) -> Self {
        let cached_blocks = row.matched.cached_blocks.unwrap_or(0);
        let basis = Basis {
            tier: slowest_tier(&row.matched, cached_blocks),
            block_size: row.block_size,
            state: row.state,
            verified_age_ms: row.verified_ms.map(|at| now_ms.saturating_sub(at)),
        };
        Self { tokens: cached_blocks.saturating_mul(row.block_size), basis: Some(basis) }
    }

    /// A number without anything known about how it came about.
    pub(crate) fn bare(tokens: u32) -> Self {
        Self { tokens, basis: None }
    }
}

/// The slowest tier that is needed for the first `cached_blocks` of a match.
///
/// The tiers say where all matched blocks lie, and a prompt's last block may have to be left out. Faster tiers are
/// enough as soon as one of them holds that much alone. If only several together do, a slower one is named whose only
/// block is the one left out: a rare case, and the error is on the careful side.
fn slowest_tier(matched: &SourceMatch, cached_blocks: u32) -> Option<Tier> {
    let mut slowest = None;
    if cached_blocks == 0 {
        return slowest;
    }
    for tier in &matched.tiers {
        if tier.best_blocks > 0 {
            slowest = Some(tier.tier.tier());
        }
        if tier.matched_blocks >= cached_blocks {
            break;
        }
    }
    slowest
}

// === impl Outcome ===

impl Outcome {
    /// Positive if too much was promised.
    pub(crate) fn error_tokens(&self) -> i64 {
        i64::from(self.prediction.tokens) - i64::from(self.reported)
    }

    /// Whether the prediction was made before the request was served.
    pub(crate) fn is_evidence(&self) -> bool {
        matches!(self.source, PredictionSource::Remembered | PredictionSource::Given)
    }

    /// Whether a source that was proved equal promised more than one block too much. One block can be an engine that
    /// recomputes it for a reason of its own.
    pub(crate) fn is_broken_promise(&self) -> bool {
        self.is_evidence()
            && self.prediction.basis.is_some_and(|basis| {
                basis.state == Some(SourceState::Verified)
                    && self.error_tokens() > i64::from(basis.block_size)
            })
    }

    /// Metric label: which way the prediction was wrong.
    pub(crate) fn direction(&self) -> &'static str {
        match self.error_tokens() {
            1.. => "over",
            0 => "equal",
            ..0 => "under",
        }
    }

    /// Metric label: the slowest tier that the prediction relied on.
    pub(crate) fn tier(&self) -> &'static str {
        match (self.prediction.tokens, self.prediction.basis) {
            (0, _) => "none",
            (_, Some(basis)) => basis.tier.map_or("none", Tier::name),
            (_, None) => "unstated",
        }
    }

    /// Metric label: how long ago the source had been verified when the prediction was made.
    pub(crate) fn age(&self) -> &'static str {
        let Some(basis) = self.prediction.basis else { return "unstated" };
        let Some(age_ms) = basis.verified_age_ms else { return "never" };
        AGES.iter().find(|(most, _)| age_ms <= *most).map_or("gt_60s", |(_, name)| name)
    }
}

// === impl ScoredRequest ===

impl ScoredRequest {
    /// What is to be remembered of an answer. `complete`: whoever holds something has a row in it.
    pub(crate) fn new(answer: &ScoreAnswer, complete: bool, now_ms: u64) -> Self {
        // Candidates may be called anything; what cannot be an instance's name can never be reported.
        let rows = answer.rows.iter().filter(|row| row.instance.len() <= MAX_INSTANCE_BYTES);
        let row = |row: &ScoreRow| ScoredRow {
            instance: row.instance.as_str().into(),
            rank: row.rank,
            prediction: Prediction::of_row(row, now_ms),
        };
        Self { rows: rows.map(row).collect(), complete, reported: false }
    }

    fn prediction(&self, instance: &str, rank: u32) -> Option<Prediction> {
        // The first of several is the one that scored best.
        let row = self.rows.iter().find(|row| row.rank == rank && *row.instance == *instance);
        match row {
            Some(row) => Some(row.prediction),
            None if self.complete => Some(Prediction::bare(0)),
            None => None,
        }
    }
}

// === impl OutcomeMemory ===

impl Default for OutcomeMemory {
    fn default() -> Self {
        Self::bounded(REMEMBERED_REQUESTS, REMEMBERED_ROWS)
    }
}

impl OutcomeMemory {
    fn bounded(max_requests: usize, max_rows: usize) -> Self {
        Self { requests: LruCache::unbounded(), rows: 0, max_requests, max_rows }
    }

    /// Remembers what was said about a request instead of what was said under the same id before. `None`: nothing was,
    /// and what was said before is forgotten all the same, for it was about another prompt.
    pub(crate) fn remember(&mut self, id: u64, scored: Option<ScoredRequest>) -> Unreported {
        let mut unreported = Unreported::default();
        if let Some(before) = self.requests.pop(&id) {
            self.rows -= before.rows.len();
            unreported.replaced += u64::from(!before.reported);
        }
        let Some(scored) = scored else { return unreported };
        self.rows += scored.rows.len();
        self.requests.put(id, scored);
        while self.requests.len() > self.max_requests || self.rows > self.max_rows {
            let Some((_, oldest)) = self.requests.pop_lru() else { break };
            self.rows -= oldest.rows.len();
            unreported.evicted += u64::from(!oldest.reported);
        }
        unreported
    }

    /// What was predicted, if it is remembered. The request stays: where prefill and decode are apart, two report it.
    pub(crate) fn reported(&mut self, id: u64, instance: &str, rank: u32) -> Option<Prediction> {
        // Without moving it to the front: the oldest goes first, reported or not.
        let scored = self.requests.peek_mut(&id)?;
        let prediction = scored.prediction(instance, rank)?;
        scored.reported = true;
        Some(prediction)
    }
}

#[cfg(test)]
#[path = "outcome_tests.rs"]
mod tests;
