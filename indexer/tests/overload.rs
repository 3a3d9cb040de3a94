//! What happens at each limit of the gRPC port, and that neither queries nor events starve the other.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::frames::{Op, Publisher};
use common::{PATIENCE, Stage, ask, ask_keys, channel, config, prompt, tokens};
use kvatlas_index::{IndexServerConfig, RequestLimits, ServingLimits};
use kvatlas_proto::grpc as pb;
use kvatlas_proto::grpc::atlas_client::AtlasClient;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::client::Grpc;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

fn limited(serving: ServingLimits) -> IndexServerConfig {
    IndexServerConfig { serving, ..config() }
}

/// A call of Score that has arrived and whose request has not.
struct HalfCall {
    request: mpsc::Sender<pb::ScoreRequest>,
    answer: tokio::task::JoinHandle<Result<pb::ScoreResponse, Status>>,
}

impl HalfCall {
    fn open(channel: Channel) -> Self {
        let (request, stream) = mpsc::channel(1);
        let answer = tokio::spawn(async move {
            let mut grpc = Grpc::new(channel);
            grpc.ready().await.unwrap();
            let path = http::uri::PathAndQuery::from_static("/kvatlas.v1.Atlas/Score");
            let codec = ProstCodec::<pb::ScoreRequest, pb::ScoreResponse>::default();
            let call = Request::new(ReceiverStream::new(stream));
            grpc.client_streaming(call, path, codec).await.map(tonic::Response::into_inner)
        });
        Self { request, answer }
    }

    async fn finish(self) -> Result<pb::ScoreResponse, Status> {
        self.request.send(ask_keys("m", [1])).await.unwrap();
        drop(self.request);
        self.answer.await.unwrap()
    }
}

async fn overloaded(stage: &Stage, reason: &str) -> u64 {
    let (_, page) = stage.get("/metrics").await;
    let name = format!("kvatlas_index_overload_total{{reason=\"{reason}\"}} ");
    page.lines().find_map(|line| line.strip_prefix(&name)).map_or(0, |count| count.parse().unwrap())
}

#[tokio::test]
async fn calls_beyond_the_admission_limit_are_refused_with_what_to_do_and_counted() {
    let stage = Stage::with(limited(ServingLimits { inflight: 1, ..ServingLimits::default() })).await;
    // One has a place, and stays; one waits; further ones are refused.
    let first = HalfCall::open(channel(&stage.server).await);
    let mut refused = None;
    let patience = tokio::time::Instant::now() + PATIENCE;
    while refused.is_none() && tokio::time::Instant::now() < patience {
        // Only some of many at once find the queue full; who waits is refused after the wait.
        let mut calls = JoinSet::new();
        for _ in 0..8 {
            let mut atlas = stage.atlas.clone();
            calls.spawn(async move { atlas.score(ask_keys("m", [1])).await.map(|_| ()) });
        }
        while let Some(ended) = calls.join_next().await {
            refused = ended.unwrap().err().or(refused);
        }
    }
    let refused = refused.expect("a call was refused");
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("--max-inflight-queries"), "{refused}");
    assert!(overloaded(&stage, "full").await + overloaded(&stage, "waited").await > 0);
    first.finish().await.expect("who had a place keeps it");
    stage.score(ask_keys("m", [1])).await.expect("its place is free again");
}

#[tokio::test]
async fn a_call_whose_deadline_passes_in_the_queue_is_not_computed() {
    let stage = Stage::with(limited(ServingLimits { inflight: 1, ..ServingLimits::default() })).await;
    let first = HalfCall::open(channel(&stage.server).await);
    // Its own connection shows when the first has its place: a call then has to wait.
    let patience = tokio::time::Instant::now() + PATIENCE;
    while overloaded(&stage, "deadline").await == 0 {
        assert!(tokio::time::Instant::now() < patience, "no deadline passed");
        let mut request = Request::new(ask_keys("m", [1]));
        request.set_timeout(Duration::from_millis(20));
        let _ = stage.atlas.clone().score(request).await;
    }
    let (_, page) = stage.get("/metrics").await;
    let count =
        |name: &str| page.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
    let answered = count("kvatlas_index_calls_total{call=\"Score\",result=\"ok\"}").unwrap_or(0);
    assert_eq!(count("kvatlas_index_lookup_seconds_count"), Some(answered), "nothing was computed in vain");
    assert!(count("kvatlas_index_calls_total{call=\"Score\",result=\"deadline_exceeded\"}").is_some());
    first.finish().await.unwrap();
}

#[tokio::test]
async fn requests_inside_a_stream_are_admitted_by_the_same_limit() {
    let stage = Stage::with(limited(ServingLimits { inflight: 1, ..ServingLimits::default() })).await;
    let (requests, stream) = mpsc::channel(1);
    let mut answers =
        stage.atlas.clone().score_stream(ReceiverStream::new(stream)).await.unwrap().into_inner();
    let mut ask = async || {
        requests.send(ask_keys("m", [1])).await.unwrap();
        match answers.message().await.unwrap().unwrap().result.unwrap() {
            pb::score_stream_response::Result::Score(_) => Code::Ok,
            pb::score_stream_response::Result::Error(error) => Code::from(error.code),
        }
    };
    assert_eq!(ask().await, Code::Ok);
    let first = HalfCall::open(channel(&stage.server).await);
    let patience = tokio::time::Instant::now() + PATIENCE;
    while ask().await != Code::ResourceExhausted {
        assert!(tokio::time::Instant::now() < patience, "the call never took its place");
    }
    first.finish().await.unwrap();
    assert_eq!(ask().await, Code::Ok, "the stream goes on");
}

#[tokio::test]
async fn a_large_prompt_is_in_nobodys_way() {
    // One thread for the server and its callers: what blocked it would be in everybody's way.
    let stage = Stage::start().await;
    stage.publish(&mut Publisher::new("m", "a:1"), &[Op::Stored(0, vec![1])]).await;
    let mut large = prompt("m", tokens(0..1_048_576));
    large.multimodal = (0..1_000)
        .map(|at| pb::MultimodalItem { identifier: "image".into(), offset: at * 1_000, length: 1_000 })
        .collect();
    let mut atlas = stage.atlas.clone();
    let large = tokio::spawn(async move { atlas.score(ask(large)).await.map(|_| ()) });
    let mut answered = 0;
    while !large.is_finished() {
        stage.score(ask_keys("m", [1])).await.unwrap();
        answered += 1;
    }
    large.await.unwrap().expect("a large prompt is answered too");
    assert!(answered > 1, "others were answered meanwhile");
}

#[tokio::test]
async fn an_operators_limits_of_a_request_hold() {
    let request = RequestLimits { prompt_tokens: 100, candidates: 2 };
    let stage =
        Stage::with(limited(ServingLimits { request, request_bytes: 1_000, ..ServingLimits::default() }))
            .await;
    let refused = async |request| {
        let status = stage.score(request).await.unwrap_err();
        (status.code(), status.message().to_owned())
    };
    stage.score(ask(prompt("m", tokens(0..100)))).await.unwrap();
    let (code, message) = refused(ask(prompt("m", tokens(0..101)))).await;
    assert!(code == Code::InvalidArgument && message.contains("--max-prompt-tokens"), "{code:?} {message}");
    let mut many = ask_keys("m", [1]);
    many.candidates = ["a:1", "b:1", "c:1"].map(str::to_owned).into();
    let (code, message) = refused(many).await;
    assert!(code == Code::InvalidArgument && message.contains("--max-candidates"), "{code:?} {message}");
    let (code, message) = refused(ask_keys("m", 0..200)).await;
    assert!(code == Code::OutOfRange && message.contains("1000"), "{code:?} {message}");
    // A small message that would be a large one is refused too.
    let compressed = stage.atlas.clone().send_compressed(tonic::codec::CompressionEncoding::Gzip);
    let status = compressed.clone().score(ask_keys("m", [7; 2_000])).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
}

#[tokio::test]
async fn connections_beyond_the_limit_are_closed_and_counted_until_one_ends() {
    let mut stage = Stage::with(limited(ServingLimits { connections: 1, ..ServingLimits::default() })).await;
    stage.score(ask_keys("m", [1])).await.expect("the first has the place");
    let other = || async {
        let endpoint = Channel::from_shared(format!("http://{}", stage.server.grpc_addr())).unwrap();
        AtlasClient::new(endpoint.connect().await.ok()?).score(ask_keys("m", [1])).await.ok()
    };
    assert!(other().await.is_none());
    let (_, page) = stage.get("/metrics").await;
    assert!(page.contains("kvatlas_index_connections_refused_total{reason=\"limit\"}"), "{page}");
    // Its connection ends with its last handle.
    let idle = Channel::from_static("http://127.0.0.1:1").connect_lazy();
    stage.atlas = AtlasClient::new(idle);
    let other = || async {
        let endpoint = Channel::from_shared(format!("http://{}", stage.server.grpc_addr())).unwrap();
        AtlasClient::new(endpoint.connect().await.ok()?).score(ask_keys("m", [1])).await.ok()
    };
    let served = tokio::time::timeout(PATIENCE, async {
        while other().await.is_none() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    served.await.expect("the place is free again");
}

#[tokio::test]
async fn calls_beyond_a_connections_streams_wait_for_one_to_end() {
    let stage =
        Stage::with(limited(ServingLimits { streams_per_connection: 1, ..ServingLimits::default() })).await;
    let one = channel(&stage.server).await;
    // Learns the server's setting.
    AtlasClient::new(one.clone()).score(ask_keys("m", [1])).await.unwrap();
    let first = HalfCall::open(one.clone());
    tokio::task::yield_now().await;
    let second =
        tokio::spawn(async move { AtlasClient::new(one).score(ask_keys("m", [1])).await.map(|_| ()) });
    // Other connections are not held up, and show that the server has had its chance.
    for _ in 0..50 {
        stage.score(ask_keys("m", [1])).await.unwrap();
    }
    assert!(!second.is_finished(), "the connection's only stream is in use");
    first.finish().await.unwrap();
    second.await.unwrap().unwrap();
}

// ------------------------------------------------------------------------------------------------ floods

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_a_flood_of_queries_every_frame_is_applied() {
    const FRAMES: u64 = 2_000;
    let stage = Stage::start().await;
    let mut publisher = Publisher::new("m", "a:1");
    stage.publish(&mut publisher, &[Op::Stored(0, vec![1])]).await;
    let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut flood = JoinSet::new();
    for _ in 0..64 {
        let (mut atlas, stop, answered) = (stage.atlas.clone(), Arc::clone(&stop), Arc::clone(&answered));
        flood.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                // Refusals are fine here, as long as they are honest.
                match atlas.score(ask_keys("m", 1..2_000)).await {
                    Ok(_) => drop(answered.fetch_add(1, Ordering::Relaxed)),
                    Err(status) => assert_eq!(status.code(), Code::ResourceExhausted, "{status}"),
                }
            }
        });
    }
    for key in 2..=FRAMES {
        stage.publish_only(&mut publisher, &[Op::StoredAfter(0, key - 1, vec![key])]).await;
    }
    stage.until("every frame is applied", || stage.server.index().totals(0).blocks as u64 == FRAMES).await;
    stop.store(true, Ordering::Relaxed);
    while let Some(ended) = flood.join_next().await {
        ended.unwrap();
    }
    let (_, page) = stage.get("/metrics").await;
    assert!(page.contains("kvatlas_index_gaps_total 0"), "no frame was lost on the way:\n{page}");
    assert!(answered.load(Ordering::Relaxed) > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_a_flood_of_events_every_query_is_answered() {
    const QUERIES: usize = 300;
    let stage = Arc::new(Stage::start().await);
    let mut publisher = Publisher::new("m", "a:1");
    stage.publish(&mut publisher, &[Op::Stored(0, (1..100).collect())]).await;
    let (stop, published) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let flood = tokio::spawn({
        let (stage, stop, published) = (Arc::clone(&stage), Arc::clone(&stop), Arc::clone(&published));
        async move {
            let mut from = 1_000_u64;
            while !stop.load(Ordering::Relaxed) {
                stage.publish_only(&mut publisher, &[Op::Stored(0, (from..from + 500).collect())]).await;
                published.fetch_add(500, Ordering::Relaxed);
                from += 500;
            }
        }
    });
    let answers = tokio_stream::iter(0..QUERIES).then(|_| stage.score(ask_keys("m", 1..100)));
    let answers: Vec<_> = answers.collect().await;
    stop.store(true, Ordering::Relaxed);
    flood.await.unwrap();
    for answer in answers {
        assert_eq!(answer.unwrap().instances[0].matched_blocks, 99);
    }
    let expected = published.load(Ordering::Relaxed) + 99;
    stage.until("every event is applied", || stage.server.index().totals(0).blocks as u64 == expected).await;
}
