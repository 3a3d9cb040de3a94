//! From answers to gRPC messages. Pure.

use kvatlas_proto::grpc as pb;
use kvatlas_proto::{GroupKind, Tier};

use crate::cluster::Covered;
use crate::costing::score::Priced;
use crate::index::{DumpOwner, OwnerInfo, SourceInfo};
use crate::outcome::Outcome;
use crate::query::{ScoreAnswer, ScoreRow};
use crate::sources::SourceState;

/// What an index that has not found out everything yet says beside its answers.
const NOT_READY: &str = "the index has just started and is still finding out what publishers hold";

/// Steps in which an answer says how old a proof is, milliseconds: twice the time between two proofs, so that all servers
/// say the same of a source that is well.
pub(crate) const AGE_STEP_MS: u64 = 2_000;

/// The answer to a score request.
pub(crate) fn score_response(
    request_id: u64,
    found: Covered<ScoreAnswer>,
    priced: Vec<Priced>,
    lookup_ns: u64,
    now_ms: u64,
    ready: bool,
) -> pb::ScoreResponse {
    let Covered { answer, coverage, missing } = found;
    let (coverage, missing) = covered(coverage, missing, ready);
    // Presets that price nothing say nothing.
    let priced = priced.into_iter().chain(std::iter::repeat_with(Priced::default));
    pb::ScoreResponse {
        request_id,
        instances: answer
            .rows
            .into_iter()
            .zip(priced)
            .map(|(row, priced)| instance_score(row, priced, now_ms))
            .collect(),
        scope_known: answer.scope_known,
        prompt_blocks: answer.prompt_blocks,
        coverage,
        missing,
        lookup_ns,
    }
}

/// What an answer covers and what is missing. A server that is not ready covers nothing.
pub(crate) fn covered(coverage: f64, mut missing: Vec<String>, ready: bool) -> (f64, Vec<String>) {
    if ready {
        return (coverage, missing);
    }
    missing.push(NOT_READY.to_owned());
    (0.0, missing)
}

pub(crate) fn age_in_steps(age_ms: u64) -> u64 {
    age_ms.div_ceil(AGE_STEP_MS).max(1) * AGE_STEP_MS
}

fn instance_score(row: ScoreRow, priced: Priced, now_ms: u64) -> pb::InstanceScore {
    let tokens = |blocks| tokens_of(blocks, row.block_size);
    let tiers = row.matched.tiers.iter().map(|tier| pb::TierMatch {
        tier: tier_number(tier.tier.tier()),
        medium: tier.tier.medium().to_owned(),
        matched_blocks: tier.matched_blocks,
        matched_tokens: tokens(tier.matched_blocks),
        best_blocks: tier.best_blocks,
    });
    pb::InstanceScore {
        data_parallel_rank: row.rank,
        known: row.state.is_some(),
        score: row.score,
        matched_blocks: row.matched.matched_blocks,
        matched_tokens: tokens(row.matched.matched_blocks),
        engine_cached_tokens: tokens(row.matched.cached_blocks.unwrap_or(0)),
        tiers: tiers.collect(),
        block_size: row.block_size,
        state: row.state.map_or(pb::SourceState::Unspecified, state_of).into(),
        degraded_reason: row.state.map_or("", SourceState::degraded_reason).to_owned(),
        verified_age_ms: row.verified_ms.map(|at| age_in_steps(now_ms.saturating_sub(at))),
        instance: row.instance,
        expected_ttft_us: priced.ttft_ms.map(|ms| ms * 1_000.0),
        terms: priced.terms,
        speculative_blocks: row.speculative_blocks,
    }
}

/// Block keys of large blocks may stand for more tokens than the field can say; then it says its most.
fn tokens_of(blocks: u32, block_size: u32) -> u32 {
    blocks.saturating_mul(block_size)
}

/// The answer to a report.
pub(crate) fn outcome_response(outcome: &Outcome) -> pb::ReportOutcomeResponse {
    pb::ReportOutcomeResponse {
        error_tokens: outcome.error_tokens(),
        predicted_tokens: outcome.prediction.tokens,
        prediction_source: outcome.source.into(),
    }
}

/// One source of a list.
pub(crate) fn source(info: SourceInfo) -> pb::Source {
    pb::Source {
        model: info.scope.model().to_owned(),
        tenant: info.scope.tenant().to_owned(),
        block_size: info.scope.block_size(),
        instance: info.source.instance.as_str().to_owned(),
        data_parallel_rank: info.source.rank.0,
        epoch: info.epoch.map_or(0, |epoch| epoch.0),
        applied_seq: info.applied_seq.map(|seq| seq.0),
        state: state_of(info.state).into(),
        degraded_reason: info.state.degraded_reason().to_owned(),
        verified_age_ms: info.verified_age_ms,
        silent_ms: info.silent_ms,
        owners: info.owners.into_iter().map(owner).collect(),
    }
}

fn owner(info: OwnerInfo) -> pb::Owner {
    pb::Owner {
        tier: tier_number(info.tier.tier()),
        medium: info.medium,
        group: info.group.0.into(),
        group_kind: group_kind(info.kind).to_owned(),
        blocks: info.blocks as u64,
        digest: format!("{:032x}", info.digest.sum),
    }
}

/// One chunk of an owner's keys.
pub(crate) fn dump_chunk(owner: &DumpOwner, keys: &[u64]) -> pb::DumpResponse {
    pb::DumpResponse {
        instance: owner.owner.source.instance.as_str().to_owned(),
        data_parallel_rank: owner.owner.source.rank.0,
        block_size: owner.scope.block_size(),
        tier: tier_number(owner.owner.tier),
        medium: owner.owner.medium.clone(),
        group: owner.owner.group.0.into(),
        keys: keys.to_vec(),
    }
}

pub(crate) fn tier_number(tier: Tier) -> i32 {
    let tier = match tier {
        Tier::Gpu => pb::Tier::Gpu,
        Tier::Cpu => pb::Tier::Cpu,
        Tier::Ssd => pb::Tier::Ssd,
        Tier::Remote => pb::Tier::Remote,
        Tier::Unknown => pb::Tier::Unknown,
    };
    tier.into()
}

fn state_of(state: SourceState) -> pb::SourceState {
    match state {
        SourceState::Syncing => pb::SourceState::Syncing,
        SourceState::Live => pb::SourceState::Live,
        SourceState::Verified => pb::SourceState::Verified,
        SourceState::Degraded(_) => pb::SourceState::Degraded,
        SourceState::Gone => pb::SourceState::Gone,
    }
}

fn group_kind(kind: GroupKind) -> &'static str {
    match kind {
        GroupKind::Full => "full",
        GroupKind::SlidingWindow { .. } => "sliding_window",
        GroupKind::State { .. } => "state",
        GroupKind::Unknown => "unknown",
    }
}
