//! Presets of a score request: rows get their score, and where there is one the expected time, from the cost model. Pure.

use kvatlas_planner::{Preset, Profiles, score};
use kvatlas_proto::grpc as pb;

use super::plan::term;
use super::{CostError, Fleet};
use crate::matching::TierWeights;
use crate::query::{ScoreAnswer, ScoreQuery};

/// Mooncake's published `kvcache_balancing_threshold`.
const MOONCAKE_THRESHOLD: f64 = 4.0;
/// Dynamo's default weight of blocks to compute.
const DYNAMO_OVERLAP_WEIGHT: f64 = 1.0;

/// What a preset says of one row, beside its score.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Priced {
    /// Expected time to first token, ms.
    pub(crate) ttft_ms: Option<f64>,
    /// What adds up to it.
    pub(crate) terms: Vec<pb::CostTerm>,
}

/// Presets whose score is a weighted share of the prompt: the index's own.
pub(crate) fn weights_of(preset: pb::Preset, weights: TierWeights) -> Option<TierWeights> {
    match preset {
        pb::Preset::Unspecified | pb::Preset::Weighted => Some(weights),
        pb::Preset::Overlap => Some(TierWeights::EQUAL),
        pb::Preset::Cost | pb::Preset::Mooncake | pb::Preset::Dynamo => None,
    }
}

/// Scores the rows of an answer anew, best first, and says why. Shared stores serve nobody: their rows are left out.
pub(crate) fn price(
    profiles: &Profiles,
    (request, preset): (&pb::ScoreRequest, pb::Preset),
    query: &ScoreQuery<'_>,
    answer: &mut ScoreAnswer,
    now_ms: u64,
) -> Result<Vec<Priced>, CostError> {
    let preset = match preset {
        pb::Preset::Mooncake => Preset::Mooncake { threshold: MOONCAKE_THRESHOLD },
        pb::Preset::Dynamo => Preset::Dynamo { overlap_weight: DYNAMO_OVERLAP_WEIGHT },
        _ => Preset::Cost { pulls: true },
    };
    let profile = ("loads", request.profile.as_str());
    let fleet = Fleet::new(profiles, query, answer, &request.loads, profile, now_ms)?;
    if fleet.members.is_empty() {
        answer.rows.clear();
        return Ok(Vec::new());
    }
    let scored = fleet.ask(&[], None, |question, scratch| score(question, &preset, scratch))?;
    let is_time = !matches!(preset, Preset::Dynamo { .. });
    let mut rows: Vec<_> = scored
        .into_iter()
        .map(|scored| {
            let mut row = answer.rows[fleet.members[scored.index].row].clone();
            row.score = scored.value.clamp(0.0, 1.0);
            let ttft_ms = scored.cost.filter(|_| is_time);
            (row, Priced { ttft_ms, terms: scored.terms.into_iter().map(term).collect() })
        })
        .collect();
    rows.sort_by(|(a, _), (b, _)| {
        b.score.total_cmp(&a.score).then_with(|| (&a.instance, a.rank).cmp(&(&b.instance, b.rank)))
    });
    let (rows, priced) = rows.into_iter().unzip();
    answer.rows = rows;
    Ok(priced)
}
