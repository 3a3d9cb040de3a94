//! `kvatlas plan`: where a prompt would best be served, from the shell, as a table that a person can read.

use std::process::ExitCode;
use std::str::FromStr;

use clap::Args;
use kvatlas_proto::grpc::{Link, PlanCandidate, PlanRequest, PlanResponse, Role, Segment, Tier};
use serde_json::{Value, json};

use crate::connect::ConnectArgs;
use crate::failure::Failure;
use crate::output;
use crate::query::{PromptArgs, tier_name};

/// Arguments of `plan`.
#[derive(Args)]
pub struct PlanArgs {
    #[command(flatten)]
    connect: ConnectArgs,
    #[command(flatten)]
    prompt: PromptArgs,
    /// Length of the prompt, tokens, with --keys. 0: its full blocks.
    #[arg(long, default_value_t = 0, value_name = "TOKENS")]
    prompt_tokens: u32,
    /// An instance that prefills and decodes, with its load: INSTANCE[,waiting=REQUESTS][,waiting-tokens=TOKENS]
    /// [,running=REQUESTS][,kv=SHARE]. May be given several times, like the next two.
    #[arg(long = "both", value_name = "INSTANCE[,LOAD]")]
    both: Vec<Candidate>,
    /// An instance that only prefills, as with --both.
    #[arg(long = "prefill", value_name = "INSTANCE[,LOAD]")]
    prefill: Vec<Candidate>,
    /// An instance that only decodes, as with --both.
    #[arg(long = "decode", value_name = "INSTANCE[,LOAD]")]
    decode: Vec<Candidate>,
    /// A link that differs from the server's topology: FROM,TO,GB_PER_S[,LATENCY_US]. May be given several times.
    #[arg(long = "link", value_name = "FROM,TO,GB_PER_S")]
    links: Vec<LinkArg>,
    /// Name of the engine profile. Default: the one that fits the model.
    #[arg(long, default_value = "")]
    profile: String,
    /// Expected output, tokens. 0: the profile's.
    #[arg(long, default_value_t = 0, value_name = "TOKENS")]
    output_tokens: u32,
}

/// An instance and its load.
#[derive(Clone, Debug, PartialEq)]
struct Candidate(PlanCandidate);

/// A link.
#[derive(Clone, Debug, PartialEq)]
struct LinkArg(Link);

/// Runs `plan`.
pub async fn run(args: PlanArgs) -> Result<ExitCode, Failure> {
    let as_json = args.connect.json;
    let client = args.connect.client()?;
    let mut prompt = args.prompt.into_prompt()?;
    prompt.prompt_tokens = args.prompt_tokens;
    let of_role = |given: Vec<Candidate>, role: Role| {
        given.into_iter().map(move |one| PlanCandidate { role: role.into(), ..one.0 })
    };
    let candidates = of_role(args.both, Role::Both)
        .chain(of_role(args.prefill, Role::Prefill))
        .chain(of_role(args.decode, Role::Decode));
    let request = PlanRequest {
        prompt: Some(prompt),
        candidates: candidates.collect(),
        links: args.links.into_iter().map(|link| link.0).collect(),
        profile: args.profile,
        output_tokens: args.output_tokens,
        ..PlanRequest::default()
    };
    let plan = client.plan(request).await.map_err(Failure::run)?;
    if as_json {
        output::json(&plan_json(&plan));
    } else {
        show(&plan);
    }
    Ok(ExitCode::SUCCESS)
}

fn show(plan: &PlanResponse) {
    let place = |instance: &str, rank: u32| {
        if rank == 0 { instance.to_owned() } else { format!("{instance} rank {rank}") }
    };
    let prefill = place(&plan.prefill_instance, plan.prefill_rank);
    let decode = place(&plan.decode_instance, plan.decode_rank);
    let ttft = ms(plan.expected_ttft_us);
    output::line(&if prefill == decode {
        format!("prefill and decode on {prefill}: first token after {ttft} ms")
    } else {
        format!("prefill on {prefill}, decode on {decode}: first token after {ttft} ms")
    });
    let mut terms = output::table(&["term", "ms", "because"]);
    for term in plan.terms.iter().filter(|term| term.us > 0.0) {
        terms.add_row([term.name.clone(), ms(term.us), term.explanation.clone()]);
    }
    output::line(&terms.to_string());
    let mut segments = output::table(&["blocks", "from", "tier", "over", "MB", "ms"]);
    for segment in &plan.segments {
        let last = segment.first_block + segment.blocks;
        segments.add_row([
            format!("{} to {}", segment.first_block, last.saturating_sub(1)),
            from(segment).to_owned(),
            if segment.source.is_empty() { "" } else { tier_name(segment.tier()) }.to_owned(),
            segment.link_class.clone(),
            if segment.source.is_empty() { String::new() } else { megabytes(segment.bytes) },
            ms(segment.us),
        ]);
    }
    output::line(&segments.to_string());
    for link in &plan.links {
        let (mb, time) = (megabytes(link.bytes), ms(link.us));
        output::line(&format!(
            "moves {mb} MB from {} to {} ({}), {time} ms",
            link.from, link.to, link.link_class
        ));
    }
    let mut headers: Vec<_> = plan.headers.iter().collect();
    headers.sort();
    headers.iter().for_each(|(name, value)| output::line(&format!("header {name}: {value}")));
    if let Some(other) = &plan.alternative {
        output::line(&format!(
            "next best: prefill on {}, decode on {}: {} ms. {}",
            other.prefill_instance,
            other.decode_instance,
            ms(other.expected_ttft_us),
            other.reason
        ));
    }
    output::line(&format!("costs: {}, coverage {:.2}", plan.profile, plan.coverage));
    plan.assumptions.iter().for_each(|assumed| output::line(&format!("assumed: {assumed}")));
    plan.missing.iter().for_each(|missing| output::line(missing));
}

fn from(segment: &Segment) -> &str {
    if segment.source.is_empty() { "computed" } else { &segment.source }
}

fn ms(us: f64) -> String {
    format!("{:.1}", us / 1e3)
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e6)
}

fn plan_json(plan: &PlanResponse) -> Value {
    let segment = |segment: &Segment| {
        json!({
            "first_block": segment.first_block,
            "blocks": segment.blocks,
            "source": segment.source,
            "tier": if segment.tier() == Tier::Unspecified { "" } else { tier_name(segment.tier()) },
            "bytes": segment.bytes,
            "us": segment.us,
            "link_class": segment.link_class,
        })
    };
    json!({
        "prefill_instance": plan.prefill_instance,
        "prefill_rank": plan.prefill_rank,
        "decode_instance": plan.decode_instance,
        "decode_rank": plan.decode_rank,
        "expected_ttft_us": plan.expected_ttft_us,
        "terms": plan.terms.iter().map(|term| json!({
            "name": term.name, "us": term.us, "explanation": term.explanation,
        })).collect::<Vec<_>>(),
        "segments": plan.segments.iter().map(segment).collect::<Vec<_>>(),
        "links": plan.links.iter().map(|link| json!({
            "from": link.from, "to": link.to, "link_class": link.link_class, "bytes": link.bytes, "us": link.us,
        })).collect::<Vec<_>>(),
        "alternative": plan.alternative.as_ref().map(|other| json!({
            "prefill_instance": other.prefill_instance,
            "decode_instance": other.decode_instance,
            "expected_ttft_us": other.expected_ttft_us,
            "lost_by_us": other.lost_by_us,
            "decided_by": other.decided_by,
            "reason": other.reason,
        })),
        "headers": plan.headers,
        "computed_tokens": plan.computed_tokens,
        "profile": plan.profile,
        "assumptions": plan.assumptions,
        "coverage": plan.coverage,
        "missing": plan.missing,
        "plan_ns": plan.plan_ns,
    })
}

// === impl Candidate ===

impl FromStr for Candidate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split(',');
        let instance = words.next().unwrap_or_default().to_owned();
        let mut candidate = PlanCandidate { instance, ..PlanCandidate::default() };
        for word in words {
            let problem = || {
                format!(
                    "{word:?} is no load: give waiting=REQUESTS, waiting-tokens=TOKENS, running=REQUESTS or kv=SHARE"
                )
            };
            let (name, value) = word.split_once('=').ok_or_else(problem)?;
            match name {
                "waiting" => candidate.waiting_requests = value.parse().map_err(|_| problem())?,
                "waiting-tokens" => {
                    candidate.waiting_prefill_tokens = value.parse().map_err(|_| problem())?;
                }
                "running" => candidate.running_requests = value.parse().map_err(|_| problem())?,
                "kv" => candidate.kv_usage = value.parse().map_err(|_| problem())?,
                _ => return Err(problem()),
            }
        }
        Ok(Self(candidate))
    }
}

// === impl LinkArg ===

impl FromStr for LinkArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let problem = || {
            format!("{text:?} is not FROM,TO,GB_PER_S[,LATENCY_US], such as pool:a,10.0.0.1:8000,12.5,1000")
        };
        let words: Vec<&str> = text.split(',').collect();
        let number = |text: &str| text.parse::<f64>().map_err(|_| problem());
        let (from, to, speed, latency) = match words.as_slice() {
            [from, to, speed] => (from, to, speed, 0.0),
            [from, to, speed, latency] => (from, to, speed, number(latency)?),
            _ => return Err(problem()),
        };
        Ok(Self(Link {
            from: (*from).to_owned(),
            to: (*to).to_owned(),
            bytes_per_second: number(speed)? * 1e9,
            latency_us: latency,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_candidate_is_a_name_and_its_load() {
        let Candidate(parsed) =
            "10.0.0.1:8000,waiting=2,waiting-tokens=900,running=7,kv=0.5".parse().unwrap();
        let expected = PlanCandidate {
            instance: "10.0.0.1:8000".into(),
            role: 0,
            waiting_requests: 2,
            waiting_prefill_tokens: 900,
            running_requests: 7,
            kv_usage: 0.5,
        };
        assert_eq!(parsed, expected);
        for bad in ["a,waiting", "a,waiting=x", "a,queue=3", "a,kv="] {
            assert!(bad.parse::<Candidate>().unwrap_err().contains("waiting-tokens=TOKENS"), "{bad}");
        }
    }

    #[test]
    fn a_link_has_two_ends_and_a_speed() {
        let LinkArg(link) = "pool:a,b:1,12.5,1000".parse().unwrap();
        assert_eq!((link.from.as_str(), link.to.as_str()), ("pool:a", "b:1"));
        assert_eq!((link.bytes_per_second, link.latency_us), (12.5e9, 1_000.0));
        assert!("a,b".parse::<LinkArg>().is_err() && "a,b,fast".parse::<LinkArg>().is_err());
    }
}
