//! Plan, Speculate and the presets of Score, over real connections.

mod common;

use std::sync::Arc;

use common::frames::{Op, Publisher};
use common::{Stage, ask_keys, config, keys, prompt};
use kvatlas_planner::Profiles;
use kvatlas_proto::grpc as pb;
use kvatlas_proto::grpc::atlas_client::AtlasClient;
use tonic::Code;

const MODEL: &str = "meta-llama/Llama-3.1-70B-Instruct";

fn candidate(instance: &str, role: pb::Role) -> pb::PlanCandidate {
    pb::PlanCandidate { instance: instance.into(), role: role.into(), ..pb::PlanCandidate::default() }
}

/// A plan for a prompt of so many blocks and ten tokens, with these candidates.
fn request(of: &[u64], candidates: Vec<pb::PlanCandidate>) -> pb::PlanRequest {
    let prompt = pb::Prompt {
        block_size: 16,
        prompt_tokens: of.len() as u32 * 16 + 10,
        ..prompt(MODEL, keys(of.iter().copied()))
    };
    pb::PlanRequest { request_id: 5, prompt: Some(prompt), candidates, ..pb::PlanRequest::default() }
}

async fn plan(stage: &Stage, request: pb::PlanRequest) -> Result<pb::PlanResponse, tonic::Status> {
    stage.atlas.clone().plan(request).await.map(tonic::Response::into_inner)
}

async fn speculate(stage: &Stage, name: &str, of: &[u64], instance: &str) -> pb::SpeculateResponse {
    let request = pb::SpeculateRequest {
        request: name.into(),
        prompt: Some(pb::Prompt { block_size: 16, ..prompt(MODEL, keys(of.iter().copied())) }),
        instance: instance.into(),
        ..pb::SpeculateRequest::default()
    };
    stage.atlas.clone().speculate(request).await.unwrap().into_inner()
}

fn chain(from: u64, blocks: usize) -> Vec<u64> {
    (from..from + blocks as u64).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect()
}

#[tokio::test]
async fn a_plan_takes_the_pod_that_has_the_prompt_and_says_why() {
    let stage = Stage::start().await;
    let of = chain(1, 500);
    stage.publish(&mut Publisher::new(MODEL, "10.0.0.1:8000"), &[Op::Stored(0, of.clone())]).await;
    stage.publish(&mut Publisher::new(MODEL, "10.0.0.2:8000"), &[Op::Stored(0, of[..10].to_vec())]).await;
    let both = ["10.0.0.2:8000", "10.0.0.1:8000"].map(|name| candidate(name, pb::Role::Both));
    let answer = plan(&stage, request(&of, both.to_vec())).await.unwrap();
    assert_eq!((answer.request_id, answer.coverage), (5, 1.0));
    assert_eq!(answer.prefill_instance, "10.0.0.1:8000", "{answer:#?}");
    assert_eq!(answer.decode_instance, "10.0.0.1:8000");
    let terms: f64 = answer.terms.iter().map(|term| term.us).sum();
    assert!((terms / answer.expected_ttft_us - 1.0).abs() < 1e-9, "{answer:?}");
    assert_eq!((answer.segments[0].first_block, answer.segments[0].blocks), (0, 500));
    assert_eq!(
        (answer.segments[0].source.as_str(), answer.segments[0].tier()),
        ("10.0.0.1:8000", pb::Tier::Gpu)
    );
    assert_eq!(answer.computed_tokens, 10);
    let other = answer.alternative.clone().unwrap();
    assert_ne!(
        (&other.prefill_instance, &other.decode_instance),
        (&answer.prefill_instance, &answer.decode_instance)
    );
    assert!(other.lost_by_us > 0.0 && other.expected_ttft_us > answer.expected_ttft_us);
    assert!(other.reason.contains("ms"), "{}", other.reason);
    assert!(answer.assumptions.iter().any(|said| said.contains("Speeds of tiers and links")), "{answer:?}");
}

#[tokio::test]
async fn a_busy_pod_hands_the_prefill_to_another_and_sets_the_header() {
    let stage = Stage::start().await;
    let of = chain(1, 500);
    stage.publish(&mut Publisher::new(MODEL, "10.0.0.9:8000"), &[Op::Stored(0, vec![3])]).await;
    let candidates = vec![
        candidate("10.0.0.1:8000", pb::Role::Prefill),
        candidate("10.0.0.2:8000", pb::Role::Decode),
        pb::PlanCandidate { waiting_prefill_tokens: 90_000, ..candidate("10.0.0.3:8000", pb::Role::Prefill) },
    ];
    let answer = plan(&stage, request(&of, candidates)).await.unwrap();
    assert_eq!((&*answer.prefill_instance, &*answer.decode_instance), ("10.0.0.1:8000", "10.0.0.2:8000"));
    assert_eq!(answer.headers["x-prefiller-host-port"], "10.0.0.1:8000");
    let handed: u64 = answer.links.iter().map(|link| link.bytes).sum();
    assert_eq!(handed, 8_010 * 327_680, "all that the decoder lacks, and nothing twice: {answer:?}");
}

#[tokio::test]
async fn shared_stores_are_considered_without_being_named() {
    let stage = Stage::start().await;
    let of = chain(1, 2_000);
    stage.publish(&mut Publisher::new(MODEL, "pool:big"), &[Op::Stored(0, of.clone())]).await;
    let mut asked = request(&of, vec![candidate("10.0.0.1:8000", pb::Role::Both)]);
    asked.links = vec![pb::Link {
        from: "pool:big".into(),
        to: "10.0.0.1:8000".into(),
        bytes_per_second: 40e9,
        latency_us: 500.0,
    }];
    let answer = plan(&stage, asked).await.unwrap();
    assert_eq!(answer.segments[0].source, "pool:big", "{answer:?}");
    assert!(answer.segments[0].bytes > 0);
    // As a place to serve it is refused.
    let named = plan(&stage, request(&of, vec![candidate("pool:big", pb::Role::Both)])).await.unwrap_err();
    assert!(named.message().contains("shared store"), "{named}");
}

#[tokio::test]
async fn what_cannot_be_planned_is_refused_and_explained() {
    let stage = Stage::start().await;
    let of = chain(1, 4);
    let one = || candidate("a:1", pb::Role::Both);
    let refused = [
        (request(&of, vec![]), "candidates are missing"),
        (request(&of, vec![one(), one()]), "named twice"),
        (request(&[], vec![one()]), "prompt"),
        (request(&of, vec![pb::PlanCandidate { kv_usage: 1.5, ..one() }]), "0 to 1"),
        (request(&of, vec![pb::PlanCandidate { role: 9, ..one() }]), "ROLE_PREFILL"),
        (request(&of, vec![candidate("a:1", pb::Role::Decode)]), "no candidate that prefills"),
        (pb::PlanRequest { profile: "nobody".into(), ..request(&of, vec![one()]) }, "not known"),
        (
            pb::PlanRequest { links: vec![pb::Link::default()], ..request(&of, vec![one()]) },
            "bytes_per_second",
        ),
        (pb::PlanRequest { prompt: None, ..request(&of, vec![one()]) }, "prompt is missing"),
    ];
    for (mut request, text) in refused {
        if text == "prompt" {
            request.prompt.as_mut().unwrap().prompt_tokens = 0;
        }
        let status = plan(&stage, request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains(text), "{text}: {status}");
    }
}

#[tokio::test]
async fn the_cost_preset_weighs_what_is_held_against_who_waits() {
    let stage = Stage::start().await;
    let of = chain(1, 1_000);
    stage.publish(&mut Publisher::new(MODEL, "10.0.0.1:8000"), &[Op::Stored(0, of.clone())]).await;
    stage.publish(&mut Publisher::new(MODEL, "10.0.0.2:8000"), &[Op::Stored(0, of[..10].to_vec())]).await;
    let scored = async |preset: pb::Preset, waiting: u64| {
        let mut request = ask_keys(MODEL, of.iter().copied());
        request.prompt.as_mut().unwrap().prompt_tokens = 16_010;
        request.candidates = vec!["10.0.0.1:8000".into(), "10.0.0.2:8000".into()];
        request.set_preset(preset);
        request.loads = vec![pb::PlanCandidate {
            waiting_prefill_tokens: waiting,
            ..candidate("10.0.0.1:8000", pb::Role::Both)
        }];
        stage.score(request).await.unwrap().instances
    };
    for preset in [pb::Preset::Cost, pb::Preset::Mooncake, pb::Preset::Dynamo] {
        let idle = scored(preset, 0).await;
        assert_eq!((idle[0].instance.as_str(), idle[0].score), ("10.0.0.1:8000", 1.0), "{preset:?}");
        assert!(idle[1].score > 0.0 && idle[1].score < 1.0, "{preset:?}");
        assert_eq!(scored(preset, 500_000).await[0].instance, "10.0.0.2:8000", "{preset:?}");
    }
    let cost = scored(pb::Preset::Cost, 0).await;
    let terms: f64 = cost[0].terms.iter().map(|term| term.us).sum();
    assert!((terms / cost[0].expected_ttft_us.unwrap() - 1.0).abs() < 1e-9, "{:?}", cost[0]);
    // Shares of the prompt look at nobody's queue.
    let overlap = scored(pb::Preset::Overlap, 500_000).await;
    assert_eq!((overlap[0].score, overlap[1].score), (1.0, 0.01));
    assert_eq!(overlap[0].expected_ttft_us, None);
}

#[tokio::test]
async fn the_next_equal_prompt_finds_what_was_just_routed_until_the_engine_has_it() {
    let stage = Stage::start().await;
    let of = chain(1, 100);
    let mut engine = Publisher::new(MODEL, "10.0.0.1:8000");
    stage.publish(&mut engine, &[Op::Stored(0, of[..20].to_vec())]).await;
    assert_eq!(speculate(&stage, "r1", &of, "10.0.0.2:8000").await.blocks, 100);
    assert_eq!(speculate(&stage, "r2", &of[..50], "10.0.0.1:8000").await.blocks, 50);
    let ask = || async {
        let rows = stage.score(ask_keys(MODEL, chain(1, 120))).await.unwrap().instances;
        let row = |row: &pb::InstanceScore| {
            (row.instance.clone(), row.known, row.matched_blocks, row.speculative_blocks)
        };
        rows.iter().map(row).collect::<Vec<_>>()
    };
    let (first, second) = ("10.0.0.1:8000".to_owned(), "10.0.0.2:8000".to_owned());
    assert_eq!(ask().await, [(second.clone(), false, 0, 100), (first.clone(), true, 20, 30)]);
    // Another prompt has nothing of it.
    let other = stage.score(ask_keys(MODEL, chain(500, 10))).await.unwrap();
    assert!(other.instances.is_empty(), "{other:?}");
    // The engine confirms: held blocks are no speculation.
    stage.publish(&mut engine, &[Op::StoredAfter(0, of[19], of[20..60].to_vec())]).await;
    assert_eq!(ask().await, [(second.clone(), false, 0, 100), (first.clone(), true, 60, 0)]);
    let (_, metrics) = stage.get("/metrics").await;
    assert!(metrics.contains("kvatlas_index_speculations_total 2"), "{metrics}");
    assert!(metrics.contains("kvatlas_index_speculations_confirmed_total 1"), "{metrics}");
    // The same request again, elsewhere: what was said before is forgotten.
    speculate(&stage, "r1", &of[..5], "10.0.0.2:8000").await;
    assert_eq!(ask().await, [(first, true, 60, 0), (second, false, 0, 5)]);
}

#[tokio::test]
async fn every_replica_knows_what_was_said_to_one() {
    let stage = Stage::start().await;
    let other = Stage::on(stage.bus.clone(), config()).await;
    stage.publish(&mut Publisher::new(MODEL, "10.0.0.1:8000"), &[Op::Stored(0, vec![7])]).await;
    let of = chain(1, 40);
    let waits = async |stage: &Stage, blocks: u32| {
        for _ in 0..2_000 {
            let mut request = ask_keys(MODEL, of.iter().copied());
            request.candidates = vec!["10.0.0.1:8000".into()];
            if stage.score(request).await.unwrap().instances[0].speculative_blocks == blocks {
                return true;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        false
    };
    assert_eq!(speculate(&stage, "r", &of, "10.0.0.1:8000").await.blocks, 40);
    assert!(waits(&stage, 40).await && waits(&other, 40).await);
    // With a short time it ends on both.
    let mut again = AtlasClient::new(common::channel(&other.server).await);
    let request = pb::SpeculateRequest {
        request: "r".into(),
        prompt: Some(pb::Prompt { block_size: 16, ..prompt(MODEL, keys(of.iter().copied())) }),
        instance: "10.0.0.1:8000".into(),
        ttl_ms: 1,
        ..pb::SpeculateRequest::default()
    };
    again.speculate(request).await.unwrap();
    assert!(waits(&stage, 0).await && waits(&other, 0).await);
}

/// A gateway that sends each request of a burst to the pod with the best score, and of equals to the one with the fewest: how many
/// pods compute the prompt.
#[tokio::test]
async fn a_burst_of_equal_prompts_is_computed_once_and_not_everywhere() {
    let stage = Stage::start().await;
    let pods: Vec<String> = (1..=8).map(|n| format!("10.0.0.{n}:8000")).collect();
    for pod in &pods {
        stage.publish(&mut Publisher::new(MODEL, pod), &[Op::Stored(0, vec![7])]).await;
    }
    let mut computed = Vec::new();
    for speculates in [false, true] {
        let of = chain(if speculates { 10_000 } else { 20_000 }, 200);
        let mut sent = vec![0; pods.len()];
        // None of them is done before the last one arrives.
        for request_number in 0..16 {
            let mut request = ask_keys(MODEL, of.iter().copied());
            request.candidates.clone_from(&pods);
            let rows = stage.score(request).await.unwrap().instances;
            let at = |row: &pb::InstanceScore| pods.iter().position(|pod| *pod == row.instance).unwrap();
            let best =
                rows.iter().filter(|row| row.score == rows[0].score).min_by_key(|row| sent[at(row)]).unwrap();
            sent[at(best)] += 1;
            if speculates {
                speculate(&stage, &format!("{request_number}"), &of, &best.instance).await;
            }
        }
        computed.push(sent.iter().filter(|sent| **sent > 0).count());
    }
    assert_eq!(computed, [8, 1], "without speculation all pods compute it, with it one does");
}

#[tokio::test]
async fn an_operators_profiles_are_used_and_named() {
    let mut profiles = Profiles::shipped();
    let text = r#"
        [[engine]]
        name = "ours"
        models = ["meta-llama/Llama-3.1-70B*"]
        prefill = { c0_ms = 1000.0, c1_ms_per_token = 0.0, c2_ms_per_token2 = 0.0 }
        decode = { base_ms = 7.0, per_request_ms = 0.0 }
    "#;
    profiles.extend("ours.toml", text).unwrap();
    let stage =
        Stage::with(kvatlas_index::IndexServerConfig { profiles: Arc::new(profiles), ..config() }).await;
    let answer = plan(&stage, request(&chain(1, 10), vec![candidate("a:1", pb::Role::Both)])).await.unwrap();
    assert!(answer.profile.contains("ours"), "{}", answer.profile);
    assert!((answer.expected_ttft_us - 1_000_000.0).abs() < 1.0, "{answer:?}");
}
