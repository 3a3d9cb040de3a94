//! From the chosen pair to an answer that explains itself.

use std::fmt::Write as _;

use kvatlas_proto::Tier;

use crate::cost::KvSize;
use crate::plan::{Alternative, Chosen, LinkUse, Pair, Plan, Scratch, Segment, TERMS, Term};
use crate::puller::{NONE, path};
use crate::query::{Candidate, PlanQuery};

/// Header that names the prefill instance to the decoder's side-car.
pub const PREFILLER_HEADER: &str = "x-prefiller-host-port";
/// Header that names the peer to pull the cached prefix from.
pub const SOURCE_HEADER: &str = "x-kv-cache-source-host-port";
/// Header that names the data-parallel rank.
pub const RANK_HEADER: &str = "x-data-parallel-host-port";

/// The whole answer.
pub(crate) fn plan(query: &PlanQuery<'_>, scratch: &Scratch, best: &Pair, second: Option<&Pair>) -> Plan {
    let segments = segments(query, scratch, best);
    let links = links(query, scratch, best, &segments);
    let mut assumptions = query.costs.assumptions.clone();
    let headers = headers(query, best, &segments, &mut assumptions);
    assume(query, best, &mut assumptions);
    Plan {
        prefill: chosen(query, best.prefill),
        decode: chosen(query, best.decode),
        expected_ttft_ms: best.ttft_ms(),
        objective_ms: best.objective_ms,
        terms: terms(query, best, &segments),
        segments,
        links,
        alternative: second.map(|second| alternative(query, best, second)),
        headers,
        profile: query.costs.name.clone(),
        assumptions,
        dropped: scratch.walks.plans_dropped + scratch.walks.stops_dropped,
    }
}

/// The terms of a pair with what they were computed from.
pub(crate) fn terms(query: &PlanQuery<'_>, pair: &Pair, segments: &[Segment]) -> Vec<Term> {
    let explained = TERMS.iter().zip(pair.terms());
    explained
        .map(|(&name, ms)| Term { name, ms, explanation: explanation(query, pair, segments, name) })
        .collect()
}

fn explanation(query: &PlanQuery<'_>, pair: &Pair, segments: &[Segment], term: &str) -> String {
    let (stop, load) = (&pair.stop, &query.candidates[pair.prefill].load);
    let decoder = &query.candidates[pair.decode];
    let local = pair.prefill == pair.decode;
    match term {
        "queue" if load.waiting_requests > 0 || load.waiting_prefill_tokens > 0 => {
            let (requests, tokens) = (load.waiting_requests, load.waiting_prefill_tokens);
            format!("{requests} requests with {tokens} tokens wait for prefill there.")
        }
        "queue" if stop.queue_ms > 0.0 => {
            format!(
                "Nothing is known to wait; it prefills {:.0} % of the time.",
                load.prefill_utilisation * 1e2
            )
        }
        "queue" => "Nothing waits for prefill there.".to_owned(),
        "fetch" if stop.fetch_ms > 0.0 => {
            let bytes: u64 = segments.iter().map(|segment| segment.bytes).sum();
            let mut said = format!("{} are loaded in {} ms", size(bytes as f64), number(stop.fetch_ms));
            let hidden = stop.fetch_ms - (stop.start_ms - stop.queue_ms);
            if hidden > 0.0 {
                let _ = write!(said, ", {} ms of it while the request is queued", number(hidden));
            }
            said + "."
        }
        "fetch" => "Nothing is loaded.".to_owned(),
        "prefill" => {
            let cached = query.tokens(stop.block);
            let new = f64::from(query.prompt_tokens) - cached;
            format!("{new:.0} tokens are computed after {cached:.0} cached ones.")
        }
        "hand_off" if local => "The prompt is decoded where it is prefilled.".to_owned(),
        "hand_off" => format!(
            "{} move in {} ms, of which the prefill hides a part; the decoder has {} blocks already.",
            size(pair.missing_bytes),
            number(pair.transfer_ms),
            pair.held_blocks
        ),
        "admit" => format!(
            "{} requests run there, {:.0} % of its KV cache is in use.",
            decoder.load.running_requests,
            decoder.load.kv_usage * 1e2
        ),
        "first_step" if local => "The prefill gives the first token.".to_owned(),
        "first_step" => {
            format!("One decode step beside {} running requests.", decoder.load.running_requests)
        }
        _ if stop.stale_ms == 0.0 => "All entries were true just now.".to_owned(),
        _ => "Expected cost of entries that may be gone, from their age.".to_owned(),
    }
}

fn chosen(query: &PlanQuery<'_>, index: usize) -> Chosen {
    let candidate = &query.candidates[index];
    Chosen { index, instance: candidate.instance.clone(), rank: candidate.rank }
}

fn source_name(query: &PlanQuery<'_>, source: u32) -> String {
    let count = query.candidates.len();
    let at = source as usize;
    if at < count {
        query.candidates[at].instance.to_string()
    } else {
        query.pools[at - count].name.to_owned()
    }
}

/// The stretches of a pair's stop, neighbours from one place as one, and what is computed.
pub(crate) fn segments(query: &PlanQuery<'_>, scratch: &Scratch, pair: &Pair) -> Vec<Segment> {
    let size = KvSize::new(&query.costs.model, query.engine(pair.prefill).tensor_parallel);
    let itself = pair.prefill as u32;
    let (mut segments, mut moved) = (Vec::<Segment>::new(), 0.0);
    let mut last = (NONE, 0);
    for node in scratch.walks.taken(&pair.stop) {
        let in_place = node.source == itself && node.tier == Tier::Gpu as u8;
        let before = size.bytes(moved);
        moved += if in_place { 0.0 } else { query.tokens(node.to - node.from) };
        let bytes = (size.bytes(moved) - before).round() as u64;
        if last == (node.source, node.tier)
            && let Some(segment) = segments.last_mut()
        {
            segment.blocks += node.to - node.from;
            segment.bytes += bytes;
            segment.ms += node.ms;
            continue;
        }
        last = (node.source, node.tier);
        let link = (node.source != itself).then(|| path(query, &scratch.sources, node.source, itself).class);
        segments.push(Segment {
            first_block: node.from,
            blocks: node.to - node.from,
            source: Some(source_name(query, node.source)),
            tier: Tier::from_index(node.tier),
            bytes,
            ms: node.ms,
            link,
        });
    }
    let all = query.prompt_tokens.div_ceil(query.block_tokens);
    if pair.stop.block < all {
        segments.push(Segment {
            first_block: pair.stop.block,
            blocks: all - pair.stop.block,
            source: None,
            tier: None,
            bytes: 0,
            ms: pair.stop.prefill_ms,
            link: None,
        });
    }
    segments
}

fn links(query: &PlanQuery<'_>, scratch: &Scratch, pair: &Pair, segments: &[Segment]) -> Vec<LinkUse> {
    let to = query.candidates[pair.prefill].instance.as_str();
    let mut links: Vec<LinkUse> = Vec::new();
    for segment in segments {
        let (Some(class), Some(from)) = (segment.link, &segment.source) else { continue };
        if let Some(known) = links.iter_mut().find(|link| link.from == *from && link.class == class) {
            known.bytes += segment.bytes;
            known.ms += segment.ms;
        } else {
            let (bytes, ms) = (segment.bytes, segment.ms);
            links.push(LinkUse { from: from.clone(), to: to.to_owned(), class, bytes, ms });
        }
    }
    if pair.prefill != pair.decode {
        links.push(LinkUse {
            from: to.to_owned(),
            to: query.candidates[pair.decode].instance.to_string(),
            class: path(query, &scratch.sources, pair.prefill as u32, pair.decode as u32).class,
            bytes: pair.missing_bytes.round() as u64,
            ms: pair.transfer_ms,
        });
    }
    links
}

fn headers(
    query: &PlanQuery<'_>,
    pair: &Pair,
    segments: &[Segment],
    assumptions: &mut Vec<String>,
) -> Vec<(&'static str, String)> {
    let address =
        |candidate: &Candidate<'_>| candidate.rank_address.unwrap_or(candidate.instance.as_str()).to_owned();
    let decoder = &query.candidates[pair.decode];
    let mut headers = Vec::new();
    if pair.prefill != pair.decode {
        headers.push((PREFILLER_HEADER, address(&query.candidates[pair.prefill])));
    }
    // Pools are found by the engine's own configuration; a header names a peer.
    let mut peers: Vec<(u64, &str)> = Vec::new();
    for segment in segments.iter().filter(|segment| segment.link.is_some()) {
        let Some(name) = segment.source.as_deref() else { continue };
        if query.pools.iter().any(|pool| pool.name == name) {
            continue;
        }
        match peers.iter_mut().find(|(_, known)| *known == name) {
            Some((bytes, _)) => *bytes += segment.bytes,
            None => peers.push((segment.bytes, name)),
        }
    }
    if let Some((_, name)) = peers.iter().max_by_key(|(bytes, _)| *bytes) {
        headers.push((SOURCE_HEADER, (*name).to_owned()));
    }
    if peers.len() > 1 {
        assumptions.push(format!(
            "Blocks come from {} peers, and the header names only the one that sends most.",
            peers.len()
        ));
    }
    if let Some(rank) = decoder.rank_address {
        headers.push((RANK_HEADER, rank.to_owned()));
    }
    headers
}

fn assume(query: &PlanQuery<'_>, pair: &Pair, assumptions: &mut Vec<String>) {
    let unknown = query.candidates.iter().filter(|candidate| candidate.location.is_unknown()).count();
    if unknown > 0 {
        assumptions.push(format!(
            "Where {unknown} of {} candidates stand is not known: links to them count as class other.",
            query.candidates.len()
        ));
    }
    if query.candidates[pair.decode].load.kv_usage > 0.0
        && query.engine(pair.decode).kv_capacity_tokens.is_none()
    {
        assumptions
            .push("kv_capacity_tokens is not configured: no wait for KV space is expected.".to_owned());
    }
}

fn alternative(query: &PlanQuery<'_>, best: &Pair, second: &Pair) -> Alternative {
    let (ours, theirs) = (best.terms(), second.terms());
    let worse = |at: &usize| theirs[*at] - ours[*at];
    let most = (0..TERMS.len()).max_by(|a, b| worse(a).total_cmp(&worse(b))).unwrap_or(0);
    let later = second.ttft_ms() - best.ttft_ms();
    let lost_by_ms = second.objective_ms - best.objective_ms;
    let by_time = later > 0.0 && later >= lost_by_ms / 2.0;
    let decided_by = if by_time { TERMS[most] } else { "objective" };
    let term = TERMS[most].replace('_', " ");
    let reason = if lost_by_ms <= 0.0 {
        "Equally good; the first one was taken.".to_owned()
    } else if by_time {
        format!(
            "Its first token would come {} ms later, mostly for {term}: {} ms against {} ms.",
            number(later),
            number(theirs[most]),
            number(ours[most])
        )
    } else {
        let when = if later > 0.0 { "later" } else { "sooner" };
        format!(
            "Its first token would come {} ms {when}, but accelerator time, later tokens and scarce links would cost the \
             worth of {} ms more.",
            number(later.abs()),
            number(lost_by_ms - later)
        )
    };
    Alternative {
        prefill: chosen(query, second.prefill),
        decode: chosen(query, second.decode),
        expected_ttft_ms: second.ttft_ms(),
        lost_by_ms,
        decided_by,
        reason,
    }
}

fn size(bytes: f64) -> String {
    if bytes >= 1e9 { format!("{:.2} GB", bytes / 1e9) } else { format!("{:.1} MB", bytes / 1e6) }
}

fn number(ms: f64) -> String {
    if ms >= 100.0 { format!("{ms:.0}") } else { format!("{ms:.1}") }
}
