//! Plan requests: what is asked of the planner, and its answer as a message. Pure.

use kvatlas_planner::plan::{Alternative, LinkUse, Plan, Segment, Term};
use kvatlas_planner::{Profiles, plan};
use kvatlas_proto::grpc as pb;

use super::{CostError, Fleet, links};
use crate::answer::tier_number;
use crate::query::{ScoreAnswer, ScoreQuery};

const US_PER_MS: f64 = 1_000.0;

/// The best plan for a request, from what was found of its prompt.
pub(crate) fn plan_response(
    profiles: &Profiles,
    request: &pb::PlanRequest,
    query: &ScoreQuery<'_>,
    answer: &ScoreAnswer,
    now_ms: u64,
) -> Result<pb::PlanResponse, CostError> {
    let profile = ("candidates", request.profile.as_str());
    let fleet = Fleet::new(profiles, query, answer, &request.candidates, profile, now_ms)?;
    let links = links(&request.links)?;
    let output_tokens = (request.output_tokens > 0).then_some(request.output_tokens);
    let found = fleet.ask(&links, output_tokens, plan)?;
    let mut response = response(&fleet, found);
    response.request_id = request.request_id;
    Ok(response)
}

fn response(fleet: &Fleet, found: Plan) -> pb::PlanResponse {
    let computed = found.segments.iter().filter(|segment| segment.source.is_none());
    let computed_blocks: u32 = computed.map(|segment| segment.blocks).sum();
    let all_blocks = fleet.prompt_tokens.div_ceil(fleet.block_tokens);
    let read_blocks = all_blocks.saturating_sub(computed_blocks);
    let mut assumptions = fleet.assumptions.clone();
    assumptions.extend(found.assumptions);
    pb::PlanResponse {
        request_id: 0,
        prefill_instance: found.prefill.instance.as_str().to_owned(),
        prefill_rank: found.prefill.rank.0,
        decode_instance: found.decode.instance.as_str().to_owned(),
        decode_rank: found.decode.rank.0,
        expected_ttft_us: found.expected_ttft_ms * US_PER_MS,
        terms: found.terms.into_iter().map(term).collect(),
        segments: found.segments.into_iter().map(segment).collect(),
        alternative: found.alternative.map(alternative),
        headers: found.headers.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
        profile: found.profile,
        assumptions,
        links: found.links.into_iter().map(link_use).collect(),
        computed_tokens: fleet.prompt_tokens.saturating_sub(read_blocks.saturating_mul(fleet.block_tokens)),
        coverage: 0.0,
        missing: Vec::new(),
        plan_ns: 0,
    }
}

/// A term for a message.
pub(super) fn term(term: Term) -> pb::CostTerm {
    pb::CostTerm { name: term.name.to_owned(), us: term.ms * US_PER_MS, explanation: term.explanation }
}

fn segment(segment: Segment) -> pb::Segment {
    pb::Segment {
        first_block: segment.first_block,
        blocks: segment.blocks,
        source: segment.source.unwrap_or_default(),
        tier: segment.tier.map_or(pb::Tier::Unspecified.into(), tier_number),
        bytes: segment.bytes,
        us: segment.ms * US_PER_MS,
        link_class: segment.link.map_or("", |class| class.name()).to_owned(),
    }
}

fn link_use(link: LinkUse) -> pb::LinkUse {
    pb::LinkUse {
        from: link.from,
        to: link.to,
        link_class: link.class.name().to_owned(),
        bytes: link.bytes,
        us: link.ms * US_PER_MS,
    }
}

fn alternative(other: Alternative) -> pb::Alternative {
    pb::Alternative {
        prefill_instance: other.prefill.instance.as_str().to_owned(),
        decode_instance: other.decode.instance.as_str().to_owned(),
        expected_ttft_us: other.expected_ttft_ms * US_PER_MS,
        reason: other.reason,
        lost_by_us: other.lost_by_ms * US_PER_MS,
        decided_by: other.decided_by.to_owned(),
    }
}
