//! Every defined answer of the gRPC contract, over a real connection.

mod common;

use common::frames::{Op, Publisher};
use common::{Stage, ask, ask_keys, keys, prompt, tokens};
use kvatlas_client::{CallError, Client, ClientConfig};
use kvatlas_index::{DUMP_CHUNK_KEYS, MAX_CANDIDATES, MAX_OPEN_DUMPS, MAX_PROMPT_KEYS, MAX_PROMPT_TOKENS};
use kvatlas_proto::KeyHasher;
use kvatlas_proto::frame::SourceHealth;
use kvatlas_proto::grpc as pb;
use tonic::Code;

fn chain(ids: &[u32], block_size: u32) -> Vec<u64> {
    KeyHasher::default().chain(ids, block_size).iter().map(|key| key.0).collect()
}

fn tier(tier: pb::Tier, matched: u32, best: u32) -> pb::TierMatch {
    pb::TierMatch {
        tier: tier.into(),
        medium: String::new(),
        matched_blocks: matched,
        matched_tokens: matched * 16,
        best_blocks: best,
    }
}

async fn refused(stage: &Stage, request: pb::ScoreRequest) -> (Code, String) {
    let status = stage.score(request).await.unwrap_err();
    (status.code(), status.message().to_owned())
}

#[tokio::test]
async fn a_row_says_everything_the_contract_says() {
    let stage = Stage::start().await;
    let ids: Vec<u32> = (0..70).collect();
    let of = chain(&ids, 16);
    let mut a = Publisher::new("m", "a:1").rank(3);
    stage.publish(&mut a, &[Op::Stored(0, of[..2].to_vec()), Op::Stored(1, of.clone())]).await;
    let answer = stage.score(ask(prompt("m", tokens(ids)))).await.unwrap();
    assert_eq!((answer.request_id, answer.scope_known, answer.prompt_blocks), (7, true, 4));
    assert_eq!((answer.coverage, answer.missing.len()), (1.0, 0));
    let expected = pb::InstanceScore {
        instance: "a:1".into(),
        data_parallel_rank: 3,
        known: true,
        score: (2.0 * 1.0 + 2.0 * 0.8) / 4.0,
        matched_blocks: 4,
        matched_tokens: 64,
        engine_cached_tokens: 64,
        tiers: vec![tier(pb::Tier::Gpu, 2, 2), tier(pb::Tier::Cpu, 4, 2)],
        block_size: 16,
        state: pb::SourceState::Live.into(),
        degraded_reason: String::new(),
        verified_age_ms: None,
        expected_ttft_us: None,
        terms: Vec::new(),
        speculative_blocks: 0,
    };
    assert_eq!(answer.instances, [expected]);
}

#[tokio::test]
async fn an_empty_and_a_short_prompt_have_no_blocks() {
    let stage = Stage::start().await;
    stage.publish(&mut Publisher::new("m", "a:1"), &[Op::Stored(0, vec![1])]).await;
    for ids in [vec![], vec![1; 15]] {
        let mut request = ask(prompt("m", tokens(ids)));
        request.candidates = vec!["a:1".into()];
        let answer = stage.score(request).await.unwrap();
        assert_eq!((answer.prompt_blocks, answer.scope_known), (0, true));
        assert_eq!((answer.instances[0].score, answer.instances[0].engine_cached_tokens), (0.0, 0));
        assert!(answer.instances[0].known && answer.instances[0].tiers.is_empty());
    }
}

#[tokio::test]
async fn at_least_one_token_is_recomputed() {
    let stage = Stage::start().await;
    let ids: Vec<u32> = (0..64).collect();
    stage.publish(&mut Publisher::new("m", "a:1"), &[Op::Stored(0, chain(&ids, 16))]).await;
    let row = stage.score(ask(prompt("m", tokens(ids.clone())))).await.unwrap().instances.remove(0);
    assert_eq!((row.matched_tokens, row.engine_cached_tokens, row.score), (64, 48, 1.0));
    // Keys say nothing about the length.
    let by_keys = ask_keys("m", chain(&ids, 16));
    assert_eq!(stage.score(by_keys.clone()).await.unwrap().instances[0].engine_cached_tokens, 0);
    let mut with_length = by_keys;
    with_length.prompt.as_mut().unwrap().prompt_tokens = 65;
    assert_eq!(stage.score(with_length).await.unwrap().instances[0].engine_cached_tokens, 64);
}

#[tokio::test]
async fn an_unknown_scope_is_an_answer_with_unknown_candidates() {
    let stage = Stage::start().await;
    let mut request = ask_keys("nobody", [1, 2]);
    request.candidates = vec!["b:1".into(), "a:1".into()];
    let answer = stage.score(request).await.unwrap();
    assert!(!answer.scope_known);
    assert_eq!(answer.prompt_blocks, 2);
    let rows: Vec<_> =
        answer.instances.iter().map(|row| (row.instance.as_str(), row.known, row.score)).collect();
    assert_eq!(rows, [("a:1", false, 0.0), ("b:1", false, 0.0)]);
    assert!(stage.score(ask_keys("nobody", [1])).await.unwrap().instances.is_empty());
}

#[tokio::test]
async fn an_unknown_candidate_is_listed_beside_known_ones() {
    let stage = Stage::start().await;
    stage.publish(&mut Publisher::new("m", "a:1"), &[Op::Stored(0, vec![1])]).await;
    stage.publish(&mut Publisher::new("m", "other:1"), &[Op::Stored(0, vec![1])]).await;
    let mut request = ask_keys("m", [1, 2]);
    request.candidates = vec!["a:1".into(), "nobody:1".into(), "a:1".into()];
    let answer = stage.score(request).await.unwrap();
    let rows: Vec<_> =
        answer.instances.iter().map(|row| (row.instance.as_str(), row.known, row.score)).collect();
    assert_eq!(rows, [("a:1", true, 0.5), ("nobody:1", false, 0.0)]);
    assert_eq!(answer.instances[1].state(), pb::SourceState::Unspecified);
}

#[tokio::test]
async fn a_request_out_of_range_is_invalid_and_says_what_is_allowed() {
    let stage = Stage::start().await;
    let weight = |tier: pb::Tier, weight| vec![pb::TierWeight { tier: tier.into(), weight }];
    let requests = [
        (pb::ScoreRequest::default(), "prompt is missing"),
        (ask(pb::Prompt { input: None, ..prompt("m", tokens([])) }), "token_ids"),
        (ask(prompt("", tokens([]))), "1 to 256"),
        (ask(pb::Prompt { tenant: "t".repeat(65), ..prompt("m", tokens([])) }), "64"),
        (ask(pb::Prompt { block_size: 65_537, ..prompt("m", tokens([])) }), "1 to 65536"),
        (ask(prompt("m", keys([1]))), "block_size is missing"),
        (ask(prompt("m", tokens(vec![u32::MAX; MAX_PROMPT_TOKENS + 1]))), "1048576"),
        (ask_keys("m", vec![1; MAX_PROMPT_KEYS + 1]), "262144"),
        (pb::ScoreRequest { candidates: vec!["a".into(); MAX_CANDIDATES + 1], ..ask_keys("m", [1]) }, "4096"),
        (pb::ScoreRequest { weights: weight(pb::Tier::Gpu, 1.1), ..ask_keys("m", [1]) }, "0 to 1"),
        (pb::ScoreRequest { weights: weight(pb::Tier::Cpu, f64::NAN), ..ask_keys("m", [1]) }, "0 to 1"),
        (pb::ScoreRequest { weights: weight(pb::Tier::Unknown, 0.5), ..ask_keys("m", [1]) }, "TIER_GPU"),
        (pb::ScoreRequest { weights: weight(pb::Tier::Unspecified, 0.5), ..ask_keys("m", [1]) }, "TIER_GPU"),
    ];
    for (request, allowed) in requests {
        let (code, message) = refused(&stage, request).await;
        assert_eq!(code, Code::InvalidArgument, "{message}");
        assert!(message.contains(allowed), "{message}");
    }
}

#[tokio::test]
async fn the_largest_prompts_are_answered() {
    let stage = Stage::start().await;
    let keys: Vec<u64> = (1..=MAX_PROMPT_KEYS as u64).collect();
    let mut a = Publisher::new("m", "a:1");
    let mut after = a.root;
    for part in keys.chunks(1 << 16) {
        stage.publish(&mut a, &[Op::StoredAfter(0, after, part.to_vec())]).await;
        after = part[part.len() - 1];
    }
    // Five bytes a token on the wire.
    let answer = stage.score(ask(prompt("m", tokens(vec![u32::MAX; MAX_PROMPT_TOKENS])))).await.unwrap();
    assert_eq!(answer.prompt_blocks as usize, MAX_PROMPT_TOKENS / 16);
    let answer = stage.score(ask_keys("m", keys)).await.unwrap();
    assert_eq!(answer.instances[0].matched_blocks as usize, MAX_PROMPT_KEYS);
}

#[tokio::test]
async fn a_block_size_that_no_engine_uses_is_a_failed_precondition_that_names_the_sizes() {
    let stage = Stage::start().await;
    stage.publish(&mut Publisher::new("m", "a:1").scope("", 32), &[Op::Stored(0, vec![1])]).await;
    stage.publish(&mut Publisher::new("m", "b:1").scope("", 64), &[Op::Stored(0, vec![1])]).await;
    for request in
        [ask_keys("m", [1]), ask(pb::Prompt { block_size: 16, ..prompt("m", tokens(vec![1; 16])) })]
    {
        let (code, message) = refused(&stage, request).await;
        assert_eq!(code, Code::FailedPrecondition);
        assert!(message.contains("16") && message.contains("32, 64"), "{message}");
    }
}

#[tokio::test]
async fn a_prompt_without_block_size_is_asked_at_every_size() {
    let stage = Stage::start().await;
    let ids: Vec<u32> = (0..64).collect();
    stage.publish(&mut Publisher::new("m", "a:1"), &[Op::Stored(0, chain(&ids, 16)[..2].to_vec())]).await;
    stage.publish(&mut Publisher::new("m", "b:1").scope("", 32), &[Op::Stored(0, chain(&ids, 32))]).await;
    let answer = stage.score(ask(prompt("m", tokens(ids)))).await.unwrap();
    assert_eq!(answer.prompt_blocks, 4);
    let rows: Vec<_> = answer
        .instances
        .iter()
        .map(|row| (row.instance.as_str(), row.block_size, row.matched_tokens, row.score))
        .collect();
    assert_eq!(rows, [("b:1", 32, 64, 1.0), ("a:1", 16, 32, 0.5)]);
}

#[tokio::test]
async fn a_suffix_extends_whoever_holds_its_base() {
    let stage = Stage::start().await;
    stage.publish(&mut Publisher::new("m", "a:1"), &[Op::Stored(0, vec![1, 2, 3, 4])]).await;
    stage.publish(&mut Publisher::new("m", "b:1"), &[Op::Stored(0, vec![1, 2])]).await;
    let suffix = |base_key, base_blocks, keys: Vec<u64>| {
        let input =
            pb::prompt::Input::Suffix(pb::Suffix { base_key, base_blocks, keys, base_segment_key: None });
        ask(pb::Prompt { block_size: 16, ..prompt("m", input) })
    };
    let answer = stage.score(suffix(2, 2, vec![3, 9])).await.unwrap();
    let rows: Vec<_> =
        answer.instances.iter().map(|row| (row.instance.as_str(), row.matched_blocks, row.score)).collect();
    assert_eq!(rows, [("a:1", 3, 0.75), ("b:1", 2, 0.5)]);
    assert_eq!(answer.prompt_blocks, 4);
    for (request, word) in [
        (suffix(2, 0, vec![3]), "at least 1"),
        (suffix(2, u32::MAX, vec![3]), "1048576"),
        (suffix(2, 1, vec![3; MAX_PROMPT_KEYS + 1]), "262144"),
    ] {
        let (code, message) = refused(&stage, request).await;
        assert_eq!(code, Code::InvalidArgument);
        assert!(message.contains(word), "{message}");
    }
}

#[tokio::test]
async fn rows_are_best_first_with_ties_by_name_and_rank_up_to_the_limit() {
    let stage = Stage::start().await;
    stage.publish(&mut Publisher::new("m", "worst:1"), &[Op::Stored(0, vec![1])]).await;
    for (name, rank) in [("tie:2", 0), ("tie:1", 1), ("tie:1", 0)] {
        stage.publish(&mut Publisher::new("m", name).rank(rank), &[Op::Stored(1, vec![1, 2])]).await;
    }
    stage.publish(&mut Publisher::new("m", "zbest:1"), &[Op::Stored(0, vec![1, 2])]).await;
    let rows = |answer: pb::ScoreResponse| -> Vec<(String, u32)> {
        answer.instances.into_iter().map(|row| (row.instance, row.data_parallel_rank)).collect()
    };
    let expected: Vec<(String, u32)> =
        [("zbest:1", 0), ("tie:1", 0), ("tie:1", 1), ("tie:2", 0), ("worst:1", 0)]
            .map(|(name, rank)| (name.to_owned(), rank))
            .into();
    assert_eq!(rows(stage.score(ask_keys("m", [1, 2])).await.unwrap()), expected);
    let limited = pb::ScoreRequest { limit: 2, ..ask_keys("m", [1, 2]) };
    assert_eq!(rows(stage.score(limited).await.unwrap()), expected[..2]);
}

#[tokio::test]
async fn weights_of_the_request_replace_the_servers() {
    let stage = Stage::start().await;
    let ops = [Op::Stored(0, vec![1]), Op::StoredAfter(1, 1, vec![2])];
    stage.publish(&mut Publisher::new("m", "a:1"), &ops).await;
    let mut request = ask_keys("m", [1, 2]);
    request.weights = vec![pb::TierWeight { tier: pb::Tier::Cpu.into(), weight: 0.0 }];
    assert_eq!(stage.score(request).await.unwrap().instances[0].score, 0.5);
    assert_eq!(stage.score(ask_keys("m", [1, 2])).await.unwrap().instances[0].score, 0.9);
}

#[tokio::test]
async fn scopes_and_tenants_never_mix() {
    let stage = Stage::start().await;
    stage.publish(&mut Publisher::new("m", "default:1"), &[Op::Stored(0, vec![1])]).await;
    stage.publish(&mut Publisher::new("m", "blue:1").scope("blue", 16), &[Op::Stored(0, vec![1])]).await;
    stage.publish(&mut Publisher::new("n", "other:1"), &[Op::Stored(0, vec![1])]).await;
    for (model, tenant, expected) in [("m", "", "default:1"), ("m", "blue", "blue:1"), ("n", "", "other:1")] {
        let mut request = ask_keys(model, [1]);
        request.prompt.as_mut().unwrap().tenant = tenant.into();
        let names: Vec<_> =
            stage.score(request).await.unwrap().instances.into_iter().map(|row| row.instance).collect();
        assert_eq!(names, [expected]);
        let request =
            pb::ListOwnersRequest { model: model.into(), tenant: tenant.into(), ..Default::default() };
        let sources = stage.atlas.clone().list_owners(request).await.unwrap().into_inner().sources;
        assert_eq!(sources.iter().map(|s| s.instance.as_str()).collect::<Vec<_>>(), [expected]);
    }
    let mut request = ask_keys("m", [1]);
    request.prompt.as_mut().unwrap().tenant = "red".into();
    assert!(!stage.score(request).await.unwrap().scope_known);
}

#[tokio::test]
async fn a_score_stream_answers_in_order_and_survives_refusals() {
    let stage = Stage::start().await;
    stage.publish(&mut Publisher::new("m", "a:1"), &[Op::Stored(0, vec![1, 2, 3])]).await;
    let requests: Vec<pb::ScoreRequest> = (0..100)
        .map(|id| {
            let request = if id % 3 == 0 { pb::ScoreRequest::default() } else { ask_keys("m", 1..=id % 3) };
            pb::ScoreRequest { request_id: id, ..request }
        })
        .collect();
    let mut answers =
        stage.atlas.clone().score_stream(futures_util::stream::iter(requests)).await.unwrap().into_inner();
    for id in 0..100 {
        let answer = answers.message().await.unwrap().unwrap();
        assert_eq!(answer.request_id, id);
        match answer.result.unwrap() {
            pb::score_stream_response::Result::Error(error) => {
                assert_eq!((id % 3, error.code), (0, Code::InvalidArgument as i32));
                assert!(error.message.contains("prompt"), "{}", error.message);
            }
            pb::score_stream_response::Result::Score(score) => {
                assert_eq!((score.request_id, u64::from(score.instances[0].matched_blocks)), (id, id % 3));
            }
        }
    }
    assert!(answers.message().await.unwrap().is_none());
}

#[tokio::test]
async fn a_call_that_is_not_answered_yet_says_so_and_what_to_use() {
    let stage = Stage::start().await;
    let mut atlas = stage.atlas.clone();
    let status = atlas.watch(pb::WatchRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
    assert!(status.message().starts_with("Watch") && status.message().contains("yet"), "{status}");
}

#[tokio::test]
async fn list_owners_shows_sources_states_and_owners() {
    let stage = Stage::start().await;
    let mut a = Publisher::new("m", "a:1").rank(1);
    a.header.health = SourceHealth::JoinedLate;
    stage.publish(&mut a, &[Op::Stored(0, vec![1, 2]), Op::Stored(2, vec![1])]).await;
    stage.publish(&mut Publisher::new("m", "b:1"), &[]).await;
    let client = Client::connect(ClientConfig::new(stage.server.grpc_addr().to_string())).unwrap();
    let all = client.list_owners(pb::ListOwnersRequest::default()).await.unwrap().sources;
    let names: Vec<_> = all.iter().map(|s| (s.instance.as_str(), s.data_parallel_rank)).collect();
    assert_eq!(names, [("a:1", 1), ("b:1", 0)]);
    let source = &all[0];
    assert_eq!((source.model.as_str(), source.block_size, source.epoch), ("m", 16, 1));
    assert_eq!((source.applied_seq, source.verified_age_ms), (Some(0), None));
    assert_eq!((source.state(), source.degraded_reason.as_str()), (pb::SourceState::Degraded, "joined_late"));
    let owners: Vec<_> = source
        .owners
        .iter()
        .map(|o| (o.tier(), o.medium.as_str(), o.group, o.group_kind.as_str(), o.blocks))
        .collect();
    assert_eq!(
        owners,
        [
            (pb::Tier::Gpu, "GPU", 0, "full", 2),
            (pb::Tier::Cpu, "CPU", 0, "full", 0),
            (pb::Tier::Ssd, "STORAGE", 0, "full", 1)
        ]
    );
    let one = pb::ListOwnersRequest { instance: "b:1".into(), ..Default::default() };
    assert_eq!(client.list_owners(one).await.unwrap().sources.len(), 1);
    let alone = pb::ListOwnersRequest { tenant: "t".into(), ..Default::default() };
    assert_eq!(client.list_owners(alone).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_dump_has_every_key_in_order_in_chunks() {
    let stage = Stage::start().await;
    let count = DUMP_CHUNK_KEYS as u64 + 10;
    let mut a = Publisher::new("m", "a:1");
    stage.publish(&mut a, &[Op::Stored(0, (0..count).rev().collect()), Op::Stored(1, vec![5])]).await;
    stage.publish(&mut Publisher::new("m", "b:1").scope("", 32), &[Op::Stored(0, vec![9])]).await;
    let client = Client::connect(ClientConfig::new(stage.server.grpc_addr().to_string())).unwrap();
    let read = async |request: pb::DumpRequest| {
        let (mut dump, mut chunks) = (client.dump(request).await.unwrap(), Vec::new());
        while let Some(chunk) = dump.next().await.unwrap() {
            chunks.push(chunk);
        }
        chunks
    };
    let all = read(pb::DumpRequest { model: "m".into(), ..Default::default() }).await;
    let sizes: Vec<_> = all.iter().map(|c| (c.instance.as_str(), c.tier(), c.keys.len())).collect();
    assert_eq!(
        sizes,
        [
            ("a:1", pb::Tier::Gpu, DUMP_CHUNK_KEYS),
            ("a:1", pb::Tier::Gpu, 10),
            ("a:1", pb::Tier::Cpu, 1),
            ("b:1", pb::Tier::Gpu, 1)
        ]
    );
    let gpu: Vec<u64> = all[..2].iter().flat_map(|chunk| chunk.keys.clone()).collect();
    assert_eq!(gpu, (0..count).collect::<Vec<_>>());
    let of_size = pb::DumpRequest { model: "m".into(), block_size: 32, ..Default::default() };
    assert_eq!(read(of_size).await.len(), 1);
    let of_instance = pb::DumpRequest { model: "m".into(), instance: "b:1".into(), ..Default::default() };
    assert_eq!(read(of_instance).await.len(), 1);
    assert!(read(pb::DumpRequest { model: "nobody".into(), ..Default::default() }).await.is_empty());
    let error = client.dump(pb::DumpRequest::default()).await.unwrap_err();
    assert!(matches!(&error, CallError::Refused { code: Code::InvalidArgument, .. }), "{error:?}");
    assert!(error.to_string().contains("model"), "{error}");
}

#[tokio::test]
async fn dumps_beyond_the_limit_are_turned_away_until_one_ends() {
    let stage = Stage::start().await;
    let mut a = Publisher::new("m", "a:1");
    // More than the connection takes in before somebody reads, so that a dump nobody reads stays open.
    for piece in 0..16u64 {
        stage.publish(&mut a, &[Op::Stored(0, (piece << 16..(piece + 1) << 16).collect())]).await;
    }
    let open = async || {
        let request = pb::DumpRequest { model: "m".into(), ..Default::default() };
        stage.atlas.clone().dump(request).await.map(tonic::Response::into_inner)
    };
    let mut dumps = Vec::new();
    for _ in 0..MAX_OPEN_DUMPS {
        dumps.push(open().await.unwrap());
    }
    let refused = open().await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("Dump") && refused.message().contains('4'), "{refused}");
    dumps.pop();
    let freed = tokio::time::timeout(common::PATIENCE, async {
        while open().await.is_err() {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    });
    freed.await.expect("an abandoned dump makes room");
}

#[tokio::test]
async fn the_client_scores_and_passes_refusals_on() {
    let stage = Stage::start().await;
    stage.publish(&mut Publisher::new("m", "a:1"), &[Op::Stored(0, vec![1])]).await;
    let endpoint = format!("http://{}", stage.server.grpc_addr());
    let client = Client::connect(ClientConfig::new(endpoint.clone())).unwrap();
    assert_eq!(client.score(ask_keys("m", [1])).await.unwrap().instances[0].score, 1.0);
    let error = client.score(pb::ScoreRequest::default()).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.to_string().contains(&endpoint), "{error}");
}
