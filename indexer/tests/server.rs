//! The server around the index: ports, events, questions to publishers, checkpoints, health, reflection, pages, shutdown.

mod common;

use std::sync::Arc;

use bytes::Bytes;
use common::frames::{Op, Publisher};
use common::{PATIENCE, Stage, any_port, ask_keys, bus, channel, config};
use kvatlas_bus::Bus;
use kvatlas_index::store::{LoadError, SaveError, WriteCheckpoint};
use kvatlas_index::{
    CheckpointConfig, CheckpointSize, CheckpointStore, IndexServer, IndexServerConfig, StartError,
};
use kvatlas_proto::ShardId;
use kvatlas_proto::grpc as pb;
use kvatlas_proto::request::{Request, Want};
use kvatlas_proto::subject::Subjects;
use prometheus_client::registry::Registry;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

#[tokio::test]
async fn an_address_in_use_is_named() {
    let stage = Stage::start().await;
    let taken = stage.server.grpc_addr();
    let error =
        IndexServer::start(IndexServerConfig::new(taken), bus(), Registry::default()).await.err().unwrap();
    assert!(matches!(&error, StartError::Listen(listen) if listen.address == taken));
    assert!(error.to_string().contains(&taken.to_string()) && error.to_string().contains("gRPC"), "{error}");
    let http = IndexServerConfig { http_listen: Some(taken), ..config() };
    let error = IndexServer::start(http, bus(), Registry::default()).await.err().unwrap();
    assert!(error.to_string().contains("HTTP"), "{error}");
}

#[tokio::test]
async fn a_source_first_heard_in_the_middle_is_asked_for_its_state_and_counts_once_it_arrived() {
    let stage = Stage::start().await;
    let mut a = Publisher::new("m", "10.0.0.7:8000");
    let mut requests = stage.bus.subscribe(Subjects::default().control(&a.header.source)).await.unwrap();
    a.frame(&[Op::Stored(0, vec![1])]);
    stage.publish_only(&mut a, &[Op::Stored(0, vec![1, 2])]).await;
    let message = tokio::time::timeout(PATIENCE, requests.recv()).await.unwrap().unwrap();
    let request = Request::parse(&message.payload).unwrap();
    assert_eq!(request.want, Want::State(vec![]));

    let source = pb::ListOwnersRequest { instance: "10.0.0.7:8000".into(), ..Default::default() };
    let list = || async {
        stage.atlas.clone().list_owners(source.clone()).await.unwrap().into_inner().sources.remove(0)
    };
    let before = list().await;
    assert_eq!((before.state(), before.applied_seq), (pb::SourceState::Syncing, None));
    assert!(stage.score(ask_keys("m", [1])).await.unwrap().instances.is_empty());

    for frame in a.answer(&request) {
        stage.bus.publish(message.reply.clone().unwrap(), Bytes::from(frame)).await.unwrap();
    }
    stage.until("the state is known", || stage.server.index().totals(0).blocks == 2).await;
    let row = stage.score(ask_keys("m", [1, 2])).await.unwrap().instances.remove(0);
    assert_eq!((row.state(), row.matched_blocks), (pb::SourceState::Verified, 2));
    assert!(row.verified_age_ms.is_some_and(|age| age < PATIENCE.as_millis() as u64));
    let after = list().await;
    assert_eq!((after.state(), after.applied_seq), (pb::SourceState::Verified, Some(1)));
    assert_eq!(after.owners[0].digest.len(), 32);
}

#[tokio::test]
async fn nobody_answers_for_another_source() {
    let stage = Stage::start().await;
    let (mut a, mut b) = (Publisher::new("m", "a:1"), Publisher::new("m", "b:1"));
    let mut requests = stage.bus.subscribe(Subjects::default().control(&a.header.source)).await.unwrap();
    a.frame(&[]);
    stage.publish_only(&mut a, &[]).await;
    let message = tokio::time::timeout(PATIENCE, requests.recv()).await.unwrap().unwrap();
    let mut request = Request::parse(&message.payload).unwrap();
    b.frame(&[Op::Stored(0, vec![1])]);
    request.epoch = b.header.epoch;
    for frame in b.answer(&request) {
        stage.bus.publish(message.reply.clone().unwrap(), Bytes::from(frame)).await.unwrap();
    }
    let counted = "kvatlas_index_frames_bad_total{reason=\"subject_mismatch\"} 1";
    let patience = tokio::time::timeout(PATIENCE, async {
        while !stage.get("/metrics").await.1.contains(counted) {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    });
    patience.await.expect("the foreign answer is counted");
}

#[tokio::test]
async fn a_server_that_looks_for_publishers_says_so_until_it_has_found_them_out() {
    let bus = bus();
    let mut hello = bus.subscribe(Subjects::default().hello()).await.unwrap();
    let discovery = std::time::Duration::from_millis(200);
    let stage = Stage::on(bus, IndexServerConfig { discovery, ..config() }).await;
    tokio::time::timeout(PATIENCE, hello.recv()).await.unwrap().unwrap();
    let mut a = Publisher::new("m", "a:1");
    let mut requests = stage.bus.subscribe(Subjects::default().control(&a.header.source)).await.unwrap();
    a.frame(&[Op::Stored(0, vec![1])]);
    stage.publish_only(&mut a, &[]).await;
    let message = tokio::time::timeout(PATIENCE, requests.recv()).await.unwrap().unwrap();
    tokio::time::sleep(2 * discovery).await;
    let answer = stage.score(ask_keys("m", [1])).await.unwrap();
    assert!(answer.coverage == 0.0 && answer.missing.len() == 1, "{answer:?}");
    assert!(stage.get("/readyz").await.0.contains("503"));

    for frame in a.answer(&Request::parse(&message.payload).unwrap()) {
        stage.bus.publish(message.reply.clone().unwrap(), Bytes::from(frame)).await.unwrap();
    }
    let ready = tokio::time::timeout(PATIENCE, async {
        while !stage.get("/readyz").await.0.contains("200") {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    });
    ready.await.expect("the only publisher is found out");
    let answer = stage.score(ask_keys("m", [1])).await.unwrap();
    assert_eq!((answer.coverage, answer.instances[0].matched_blocks), (1.0, 1));
}

#[tokio::test]
async fn a_restarted_server_takes_its_checkpoint_in_and_counts_it_once_it_is_proved() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("index.checkpoint");
    let interval = std::time::Duration::from_secs(3_600);
    let config =
        || IndexServerConfig { checkpoint: Some(CheckpointConfig::file(&path, interval)), ..config() };
    let stage = Stage::with(config()).await;
    let mut a = Publisher::new("m", "a:1");
    stage.publish(&mut a, &[Op::Stored(0, vec![1, 2])]).await;
    assert!(stage.server.shutdown().await, "a checkpoint is written at the end");

    let stage = Stage::with(config()).await;
    stage.until("the checkpoint is taken in", || stage.server.index().totals(0).blocks == 2).await;
    assert!(stage.get("/metrics").await.1.contains("kvatlas_index_checkpoint_restored_blocks 2"));
    assert!(stage.score(ask_keys("m", [1])).await.unwrap().instances.is_empty());
    let subject = Subjects::default().events(a.header.scope.token(), ShardId::WHOLE, &a.header.source);
    stage.bus.publish(subject, Bytes::from(a.heartbeat())).await.unwrap();
    let verified = || {
        let sources = stage.server.index().sources(&kvatlas_index::OwnerFilter::default(), 0);
        sources[0].state == kvatlas_index::sources::SourceState::Verified
    };
    stage.until("the checkpoint is proved", verified).await;
    assert_eq!(stage.score(ask_keys("m", [1, 2])).await.unwrap().instances[0].matched_blocks, 2);
    stage.server.shutdown().await;

    // A damaged one is refused, counted, and replaced.
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let stage = Stage::with(config()).await;
    stage.publish(a.epoch(2), &[Op::Stored(0, vec![1])]).await;
    assert_eq!(stage.server.index().totals(0).blocks, 1);
    let refused = "kvatlas_index_checkpoint_refused_total{store=\"file\",reason=\"damaged\"} 1";
    assert!(stage.get("/metrics").await.1.contains(refused));
    stage.server.shutdown().await;
    let stage = Stage::with(config()).await;
    stage.until("the checkpoint is taken in", || stage.server.index().totals(0).blocks == 1).await;
}

/// A store that does not answer, and notes what it is asked to keep.
#[derive(Debug, Default)]
struct SilentStore {
    /// Loading is answered: there is nothing.
    is_empty: bool,
    is_loading: tokio::sync::Notify,
    saves: std::sync::atomic::AtomicUsize,
}

#[async_trait::async_trait]
impl CheckpointStore for SilentStore {
    fn kind(&self) -> &'static str {
        "silent"
    }

    fn place(&self) -> String {
        "nowhere".to_owned()
    }

    async fn load(&self, _: u64) -> Result<Option<Vec<u8>>, LoadError> {
        self.is_loading.notify_one();
        if self.is_empty {
            return Ok(None);
        }
        std::future::pending().await
    }

    async fn save(&self, _: WriteCheckpoint) -> Result<CheckpointSize, SaveError> {
        self.saves.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        std::future::pending().await
    }
}

#[tokio::test]
async fn while_a_store_does_not_answer_questions_are_answered_as_incomplete_and_nothing_is_saved() {
    let store = Arc::new(SilentStore::default());
    let interval = std::time::Duration::from_millis(1);
    let checkpoint = Some(CheckpointConfig { store: store.clone(), interval });
    let stage = Stage::with(IndexServerConfig { checkpoint, ..config() }).await;
    store.is_loading.notified().await;
    let answer = stage.score(ask_keys("m", [1])).await.unwrap();
    assert_eq!(answer.coverage, 0.0);
    assert!(stage.get("/readyz").await.0.contains("503"));
    assert!(stage.server.shutdown().await, "nobody waits for it");
    assert_eq!(store.saves.load(std::sync::atomic::Ordering::Relaxed), 0, "an empty index replaces nothing");
}

#[tokio::test]
async fn a_save_that_does_not_end_is_the_only_one_and_does_not_hold_the_end_up() {
    let store = Arc::new(SilentStore { is_empty: true, ..SilentStore::default() });
    let interval = std::time::Duration::from_millis(1);
    let checkpoint = Some(CheckpointConfig { store: store.clone(), interval });
    let stage = Stage::with(IndexServerConfig { checkpoint, ..config() }).await;
    let saves = || store.saves.load(std::sync::atomic::Ordering::Relaxed);
    let mut a = Publisher::new("m", "a:1");
    stage.publish(&mut a, &[Op::Stored(0, vec![1])]).await;
    stage.until("a save has begun", || saves() == 1).await;
    stage.publish(&mut a, &[Op::Stored(0, vec![1, 2])]).await;
    tokio::time::sleep(20 * interval).await;
    assert!(stage.server.shutdown().await);
    assert_eq!(saves(), 1);
}

#[tokio::test]
async fn bad_frames_are_dropped_and_counted_by_reason() {
    let stage = Stage::start().await;
    let mut a = Publisher::new("m", "a:1");
    let subjects = Subjects::default();
    let scope = a.header.scope.token();
    let own = subjects.events(scope, ShardId::WHOLE, &a.header.source);
    let good = a.frame(&[Op::Stored(0, vec![1])]);
    let mut damaged = good.clone();
    *damaged.last_mut().unwrap() ^= 1;
    let mut newer = good.clone();
    newer[4] = 9;
    let other = subjects.events(scope, ShardId::WHOLE, &Publisher::new("m", "b:1").header.source);
    let messages = [
        (own.clone(), vec![], "size"),
        (own.clone(), vec![0; 64], "magic"),
        (own.clone(), damaged, "checksum"),
        (own.clone(), newer, "version"),
        (other, good.clone(), "subject_mismatch"),
        (subjects.events(scope, ShardId::new(3, 8).unwrap(), &a.header.source), good.clone(), "partition"),
        ("kvatlas.v1.ev.nonsense".to_owned(), good.clone(), "subject"),
    ];
    for (subject, payload, _) in &messages {
        stage.bus.publish(subject.clone(), Bytes::from(payload.clone())).await.unwrap();
    }
    // What comes after is taken in: nothing got stuck.
    stage.bus.publish(own, Bytes::from(good)).await.unwrap();
    stage.until("the good frame is applied", || stage.server.index().totals(0).blocks == 1).await;
    let (_, text) = stage.get("/metrics").await;
    for (_, _, reason) in messages {
        let line = format!("kvatlas_index_frames_bad_total{{reason=\"{reason}\"}} 1");
        assert!(text.contains(&line), "{line} in {text}");
    }
}

#[tokio::test]
async fn the_pages_show_metrics_with_help_and_readiness() {
    let stage = Stage::start().await;
    let mut a = Publisher::new("m", "a:1");
    stage.publish(&mut a, &[Op::Stored(0, vec![1, 2]), Op::Stored(1, vec![1])]).await;
    stage.score(ask_keys("m", [1])).await.unwrap();
    stage.score(pb::ScoreRequest::default()).await.unwrap_err();
    let (status, text) = stage.get("/metrics").await;
    assert!(status.contains("200"), "{status}");
    for line in [
        "kvatlas_index_frames_applied_total 1",
        "kvatlas_index_blocks 3",
        "kvatlas_index_distinct_blocks 2",
        "kvatlas_index_owners 3",
        "kvatlas_index_sources{state=\"live\",reason=\"\"} 1",
        "kvatlas_index_sources{state=\"degraded\",reason=\"frames_lost\"} 0",
        "kvatlas_index_calls_total{call=\"Score\",result=\"ok\"} 1",
        "kvatlas_index_calls_total{call=\"Score\",result=\"invalid_argument\"} 1",
        "kvatlas_index_lookup_seconds_count 1",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
    let names = |prefix: &str| -> Vec<String> {
        text.lines()
            .filter_map(|line| line.strip_prefix(prefix)?.split(' ').next().map(str::to_owned))
            .collect()
    };
    assert_eq!(names("# HELP "), names("# TYPE "));
    for (page, body) in [("/healthz", "ok\n"), ("/readyz", "ready\n")] {
        let (status, text) = stage.get(page).await;
        assert!(status.contains("200") && text == body, "{page}: {status} {text}");
    }
    assert!(stage.get("/nothing").await.0.contains("404"));
}

#[tokio::test]
async fn health_is_serving_for_the_server_and_the_service() {
    let stage = Stage::start().await;
    let mut health = HealthClient::new(channel(&stage.server).await);
    for service in ["", "kvatlas.v1.Atlas"] {
        let request = HealthCheckRequest { service: service.into() };
        let answer = health.check(request).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving);
    }
    let unknown = HealthCheckRequest { service: "nobody".into() };
    assert_eq!(health.check(unknown).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn reflection_names_the_service_in_both_versions() {
    let stage = Stage::start().await;
    macro_rules! services {
        ($pb:ident) => {{
            use tonic_reflection::pb::$pb::{self as api, server_reflection_client::ServerReflectionClient};
            let mut client = ServerReflectionClient::new(channel(&stage.server).await);
            let request = api::ServerReflectionRequest {
                host: String::new(),
                message_request: Some(api::server_reflection_request::MessageRequest::ListServices(
                    String::new(),
                )),
            };
            let answers = client.server_reflection_info(futures_util::stream::iter([request])).await;
            let answer = answers.unwrap().into_inner().message().await.unwrap().unwrap();
            match answer.message_response.unwrap() {
                api::server_reflection_response::MessageResponse::ListServicesResponse(list) => {
                    list.service.into_iter().map(|service| service.name).collect::<Vec<_>>()
                }
                other => panic!("{other:?}"),
            }
        }};
    }
    for names in [services!(v1), services!(v1alpha)] {
        for expected in ["kvatlas.v1.Atlas", "grpc.health.v1.Health"] {
            assert!(names.iter().any(|name| name == expected), "{expected} in {names:?}");
        }
    }
}

#[tokio::test]
async fn a_shutdown_ends_open_streams_and_frees_the_port() {
    let stage = Stage::start().await;
    let (server, mut atlas) = (stage.server, stage.atlas);
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let requests = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut answers = atlas.score_stream(requests).await.unwrap().into_inner();
    sender.send(ask_keys("m", [1])).await.unwrap();
    assert!(answers.message().await.unwrap().is_some());
    let mut health = HealthClient::new(channel(&server).await);
    let mut watch = health.watch(HealthCheckRequest { service: String::new() }).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);

    let address = server.grpc_addr();
    assert!(server.shutdown().await, "open streams do not outlast the drain time");
    assert_eq!(answers.message().await.unwrap_err().code(), Code::Unavailable);
    let again =
        IndexServer::start(IndexServerConfig::new(address), bus(), Registry::default()).await.unwrap();
    assert_eq!(again.grpc_addr(), address);
}

#[tokio::test]
async fn a_dropped_handle_stops_the_server() {
    let stage = Stage::start().await;
    let (address, index) = (stage.server.grpc_addr(), Arc::downgrade(&stage.server.index()));
    drop(stage);
    let gone = tokio::time::timeout(PATIENCE, async {
        while index.upgrade().is_some() || tokio::net::TcpStream::connect(address).await.is_ok() {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    });
    gone.await.expect("nothing of the server is left");
}

#[tokio::test]
async fn two_deployments_on_one_bus_do_not_see_each_other() {
    let bus = bus();
    let blue =
        IndexServerConfig { subjects: Subjects::new("blue").unwrap(), ..IndexServerConfig::new(any_port()) };
    let (default, blue) = (
        IndexServer::start(config(), bus.clone(), Registry::default()).await.unwrap(),
        IndexServer::start(blue, bus.clone(), Registry::default()).await.unwrap(),
    );
    let mut a = Publisher::new("m", "a:1");
    let subject =
        Subjects::new("blue").unwrap().events(a.header.scope.token(), ShardId::WHOLE, &a.header.source);
    bus.publish(subject, Bytes::from(a.frame(&[Op::Stored(0, vec![1])]))).await.unwrap();
    tokio::time::timeout(PATIENCE, async {
        while blue.index().totals(0).blocks == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    })
    .await
    .unwrap();
    assert_eq!(default.index().totals(0).scopes, 0);
}
