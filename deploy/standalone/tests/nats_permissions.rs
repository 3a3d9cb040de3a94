//! The broker's configuration in `deploy/nats/` with a real nats-server: TLS, nkeys, and each role confined to its subjects.

#[path = "../../../indexer/tests/common/certificates.rs"]
mod certificates;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use certificates::Authority;
use kvatlas_bus::test_server::NatsServer;
use kvatlas_bus::{Bus, NatsAuth, NatsBus, NatsConfig, NatsTls, Subscription};
use kvatlas_index::sources::SourceState;
use kvatlas_index::{DISCOVERY, IndexServer, IndexServerConfig, OwnerFilter, RunningIndexServer};
use kvatlas_loadtest::engine_sim::{HashForm, SimConfig, SimEngine};
use kvatlas_loadtest::publisher::{EnginePublisher, PublisherConfig};
use kvatlas_loadtest::wire::Batch;
use kvatlas_proto::scope::ScopeToken;
use kvatlas_proto::subject::{Asker, Subjects};
use kvatlas_proto::{DpRank, InstanceId, KeyHasher, SourceId};
use kvatlas_proto::{Partition, ShardId};
use kvatlas_shim::mirror::{MirrorLimits, RemovalPolicy};
use kvatlas_shim::shim::{EndpointConfig, Shim, ShimConfig};
use kvatlas_shim::zmq::Attach;
use nkeys::KeyPair;
use prometheus_client::registry::Registry;
use tokio::time::{sleep, timeout};

/// Longest wait for something that has to happen.
const PATIENCE: Duration = Duration::from_secs(30);
/// The instance of the example configuration.
const INSTANCE: &str = "10.0.0.7:8000";

/// The shipped configuration with keys and certificates of this test.
struct Broker {
    authority: Authority,
    server: NatsServer,
}

fn shipped(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../nats").join(file)
}

fn kvatlas(arguments: &[&str]) -> std::process::Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvatlas"));
    command.args(arguments).env_remove("KVATLAS_SUBJECT_PREFIX").output().unwrap()
}

fn instance() -> InstanceId {
    InstanceId::new(INSTANCE).unwrap()
}

fn source(instance: &str) -> SourceId {
    SourceId { instance: InstanceId::new(instance).unwrap(), rank: DpRank(0) }
}

impl Broker {
    fn start() -> Option<Self> {
        let authority = Authority::new();
        let pair = authority.sign("broker", &["127.0.0.1"], "broker");
        let public = |role: &str| {
            let key = KeyPair::new_user();
            std::fs::write(authority.folder().join(role), key.seed().unwrap()).unwrap();
            key.public_key()
        };
        let keys = ["shim", "index", "observer"].map(public);
        let ca_file = authority.ca_file();
        let environment = [
            ("KVATLAS_NATS_CERT_FILE", pair.certificate.to_str().unwrap()),
            ("KVATLAS_NATS_KEY_FILE", pair.key.to_str().unwrap()),
            ("KVATLAS_NATS_CA_FILE", ca_file.to_str().unwrap()),
            ("KVATLAS_SHIM_NKEY", keys[0].as_str()),
            ("KVATLAS_INDEX_NKEY", keys[1].as_str()),
            ("KVATLAS_OBSERVER_NKEY", keys[2].as_str()),
        ];
        let configuration = shipped("nats-server.conf");
        let server = NatsServer::start_in(&["-c", configuration.to_str().unwrap()], &environment)?;
        Some(Self { authority, server })
    }

    /// Connects as one of the configured users.
    async fn connect(&self, role: &str) -> Arc<NatsBus> {
        let auth = NatsAuth::NkeySeedFile(self.authority.folder().join(role));
        let tls = NatsTls { required: true, ca_file: Some(self.authority.ca_file()), client_identity: None };
        Arc::new(
            NatsBus::connect(NatsConfig { auth, tls, ..NatsConfig::new([self.server.url()]) }).await.unwrap(),
        )
    }
}

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let waited = timeout(PATIENCE, async {
        while !done() {
            sleep(Duration::from_millis(10)).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("it never happened that {what}"));
}

/// Publishes what is forbidden, sees it counted, and then something allowed arrive first.
async fn is_refused(
    bus: &NatsBus,
    subject: String,
    observer: &mut Subscription,
    allowed: (&NatsBus, String),
) {
    let before = bus.stats().broker_errors;
    bus.publish(subject.clone(), Bytes::from_static(b"forged")).await.unwrap();
    until(&format!("the refusal of {subject} is counted"), || bus.stats().broker_errors > before).await;
    assert!(bus.stats().connected, "the connection stays");
    let (bus, subject) = allowed;
    bus.publish(subject.clone(), Bytes::from_static(b"true")).await.unwrap();
    let message = timeout(PATIENCE, observer.recv()).await.expect("in time").expect("an open bus");
    assert_eq!((message.subject, message.payload), (subject, Bytes::from_static(b"true")));
}

#[test]
fn the_shipped_users_are_what_the_tool_prints() {
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let file = std::fs::read_to_string(shipped("users.conf")).unwrap();
    let blocks: Vec<&str> = file.lines().filter(|line| !line.starts_with('#')).collect();
    let mut expected = words("users: [");
    for arguments in [
        &["--role", "shim", "--instance", INSTANCE, "--nkey", "$KVATLAS_SHIM_NKEY"][..],
        &["--role", "index", "--nkey", "$KVATLAS_INDEX_NKEY"],
        &["--role", "observer", "--nkey", "$KVATLAS_OBSERVER_NKEY"],
    ] {
        let output = kvatlas(&[&["nats-permissions"], arguments].concat());
        assert!(output.status.success(), "{output:?}");
        expected.extend(words(&String::from_utf8(output.stdout).unwrap()));
    }
    expected.push("]".to_owned());
    assert_eq!(words(&blocks.join("\n")), expected);
}

#[test]
fn permissions_are_printed_as_json_too_and_a_seed_is_never_shown() {
    let output =
        kvatlas(&["nats-permissions", "--role", "shim", "--instance", "a:1", "--rank", "2", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let allowed = &json["permissions"]["publish"]["allow"];
    assert_eq!(allowed[0], "kvatlas.v1.ev.*.*.a=3A1.2", "{json}");
    let seed = KeyPair::new_user().seed().unwrap();
    let refused = kvatlas(&["nats-permissions", "--role", "index", "--nkey", &seed]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(!String::from_utf8(refused.stderr).unwrap().contains(&seed));
}

#[tokio::test]
async fn nobody_speaks_for_another_and_the_refusal_is_counted() {
    let Some(broker) = Broker::start() else { return };
    let (shim, index) = (broker.connect("shim").await, broker.connect("index").await);
    let observer = broker.connect("observer").await;
    let subjects = Subjects::default();
    let mut events = observer.subscribe(subjects.all_events()).await.unwrap();
    let asker = Asker::new("index-1").unwrap();
    let mut replies = index.subscribe(subjects.all_replies(&asker)).await.unwrap();
    let scope = ScopeToken(7);
    let own = source(INSTANCE);
    let own_events = subjects.events(scope, ShardId::WHOLE, &own);
    let own_reply = subjects.reply(&asker, &own);
    let other = source("10.0.0.8:8000");

    // Events: another instance's by the shim, any by the index or the observer.
    let others = subjects.events(scope, ShardId::WHOLE, &other);
    is_refused(&shim, others, &mut events, (&shim, own_events.clone())).await;
    is_refused(&index, own_events.clone(), &mut events, (&shim, own_events.clone())).await;
    is_refused(&observer, own_events.clone(), &mut events, (&shim, own_events.clone())).await;
    // Answers for another instance.
    is_refused(&shim, subjects.reply(&asker, &other), &mut replies, (&shim, own_reply)).await;
    // Questions and calls are the index's.
    let mut control = shim.subscribe(subjects.control(&own)).await.unwrap();
    is_refused(&shim, subjects.control(&own), &mut control, (&index, subjects.control(&own))).await;
    let mut hello = shim.subscribe(subjects.hello()).await.unwrap();
    is_refused(&shim, subjects.hello(), &mut hello, (&index, subjects.hello())).await;

    // Listening to others is refused too.
    for filter in [subjects.all_events(), subjects.all_replies(&asker), subjects.control(&other)] {
        let before = shim.stats().broker_errors;
        let _nothing = shim.subscribe(filter.clone()).await.unwrap();
        until(&format!("the refusal of {filter} is counted"), || shim.stats().broker_errors > before).await;
    }
}

#[tokio::test]
async fn a_client_without_tls_or_with_an_unknown_key_is_refused() {
    let Some(broker) = Broker::start() else { return };
    std::fs::write(broker.authority.folder().join("nobody"), KeyPair::new_user().seed().unwrap()).unwrap();
    let tls = || NatsTls { required: true, ca_file: Some(broker.authority.ca_file()), client_identity: None };
    for (role, tls) in [("shim", NatsTls::default()), ("nobody", tls())] {
        let auth = NatsAuth::NkeySeedFile(broker.authority.folder().join(role));
        let config = NatsConfig { auth, tls, ..NatsConfig::new([broker.server.url()]) };
        assert!(NatsBus::connect(config).await.is_err(), "{role}");
    }
}

async fn start_index(bus: Arc<NatsBus>) -> RunningIndexServer {
    let mut config = IndexServerConfig::new("127.0.0.1:0".parse().unwrap());
    config.discovery = DISCOVERY;
    IndexServer::start(config, bus, Registry::default()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shim_and_an_index_work_together_under_these_permissions_repairs_included() {
    let Some(broker) = Broker::start() else { return };
    let config = SimConfig {
        blocks: 500,
        block_size: 16,
        max_step_tokens: 2_048,
        max_running: 8,
        hashes: HashForm::Int,
    };
    let mut engine = SimEngine::new(config, 0).unwrap();
    let mut publisher = EnginePublisher::bind(PublisherConfig::default()).await.unwrap();
    let shim_bus = broker.connect("shim").await;
    let bus: Arc<dyn Bus> = Arc::clone(&shim_bus) as Arc<dyn Bus>;
    let shim_config = ShimConfig {
        partition: Partition::WHOLE,
        adapter: None,
        model: "m".to_owned(),
        tenant: String::new(),
        instance: instance(),
        endpoints: vec![EndpointConfig {
            events: publisher.endpoints().events.clone(),
            attach: Attach::Connect,
            replay: Some(publisher.endpoints().replay.clone()),
            topic: String::new(),
            rank: None,
        }],
        block_size: None,
        removal: RemovalPolicy::PerCopy,
        hasher: KeyHasher::default(),
        limits: MirrorLimits::default(),
        subjects: Subjects::default(),
    };
    let shim = Shim::start(&shim_config, &bus).unwrap();
    publisher.wait_for_subscribers(1, PATIENCE).await.unwrap();

    let mut held = 0;
    let mut publish = async |from: u32| {
        let prompt: Vec<u32> = (from..from + 320).collect();
        for events in engine.submit(&prompt, 1).unwrap().batches {
            publisher.publish(&Batch { time_s: 0.0, events, rank: 0 }).await.unwrap();
        }
        held = engine.held().len() as u64;
        let progress = shim.progress()[0].clone();
        until("the shim has it", || progress.borrow().blocks == held && !progress.borrow().pending).await;
        held
    };
    let held_before = publish(0).await;

    // The index comes late: it asks everybody to show themselves, asks for the state, and is answered.
    let index_bus = broker.connect("index").await;
    let server = start_index(Arc::clone(&index_bus)).await;
    let index = server.index();
    let verified = |blocks: u64| {
        let sources = index.sources(&OwnerFilter::default(), 0);
        sources.len() == 1
            && matches!(sources[0].state, SourceState::Verified)
            && index.totals(0).blocks as u64 == blocks
    };
    until("the state was transferred and proved", || verified(held_before)).await;
    let requests = shim.progress()[0].borrow().requests;
    assert!(requests.state > 0 && requests.hello > 0 && requests.answer_frames > 0, "{requests:?}");
    // And live events follow.
    let held_after = publish(10_000).await;
    assert!(held_after > held_before);
    until("what came later is there and proved", || verified(held_after)).await;
    for bus in [&shim_bus, &index_bus] {
        assert_eq!(bus.stats().broker_errors, 0, "nothing was refused on the way");
    }
    server.shutdown().await;
    shim.shutdown().await;
}
