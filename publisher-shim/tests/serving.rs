//! The shell of the shim: a real socket on the engine's side, the in-process bus on the other.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use common::{StoredEvent, batch_at};
use kvatlas_bus::{Bus, BusMessage, InProcessBus, InProcessConfig, Subscription};
use kvatlas_proto::frame::{FramePart, FrameView};
use kvatlas_proto::request::{Request, RequestId, Want};
use kvatlas_proto::subject::{Asker, Subjects};
use kvatlas_proto::{DpRank, Epoch, FrameSeq, InstanceId, KeyHasher, Partition, ShardId, SourceId};
use kvatlas_shim::mirror::{MirrorLimits, RemovalPolicy};
use kvatlas_shim::shim::{EndpointConfig, Progress, Shim, ShimConfig};
use kvatlas_shim::zmq::Attach;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::timeout;
use zeromq::{PubSocket, RouterSocket, Socket as _, SocketRecv as _, SocketSend as _, ZmqMessage};

/// Far longer than anything here takes.
const WAIT: Duration = Duration::from_secs(30);

struct Rig {
    engine: PubSocket,
    bus: Arc<dyn Bus>,
    shim: Shim,
    events: Subscription,
    replies: Subscription,
    subjects: Subjects,
}

/// The engine's replay socket: everything that was sent, to whoever asks.
async fn serve_replays(mut socket: RouterSocket, sent: Arc<Mutex<Vec<(u64, Bytes)>>>) {
    while let Ok(request) = socket.recv().await {
        let frames = request.into_vec();
        let from = u64::from_be_bytes(frames[2].as_ref().try_into().unwrap());
        let kept: Vec<_> = sent.lock().iter().filter(|(seq, _)| *seq >= from).cloned().collect();
        for (seq, payload) in kept.into_iter().chain([(u64::MAX, Bytes::new())]) {
            let seq = Bytes::copy_from_slice(&seq.to_be_bytes());
            let reply = vec![frames[0].clone(), Bytes::new(), Bytes::new(), seq, payload];
            socket.send(ZmqMessage::try_from(reply).unwrap()).await.unwrap();
        }
    }
}

impl Rig {
    /// Without a replay socket and a state, the key space in one piece.
    async fn start() -> Self {
        Self::cut(Partition::WHOLE).await
    }

    /// The same where the key space is cut.
    async fn cut(partition: Partition) -> Self {
        let mut engine = PubSocket::new();
        let address = engine.bind("tcp://127.0.0.1:0").await.unwrap().to_string();
        let subjects = Subjects::default();
        let bus: Arc<dyn Bus> = Arc::new(InProcessBus::new(InProcessConfig::default()));
        let events = bus.subscribe(subjects.all_events()).await.unwrap();
        let replies = bus.subscribe(subjects.all_replies(&asker())).await.unwrap();
        let config = ShimConfig { partition, ..config(&address, None) };
        let shim = Shim::start(&config, &bus).unwrap();
        Self { engine, bus, shim, events, replies, subjects }
    }

    async fn publish(&mut self, n: u64) {
        let frames = vec![Bytes::new(), Bytes::copy_from_slice(&n.to_be_bytes()), message(n)];
        self.engine.send(ZmqMessage::try_from(frames).unwrap()).await.unwrap();
    }

    /// Publishes `blocks` blocks and waits until they are held.
    async fn fill(&mut self, blocks: u64) {
        // A message that is sent before the subscription is there is lost; the same message again changes nothing.
        while self.progress().borrow().blocks == 0 {
            self.publish(0).await;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        for n in 1..blocks {
            self.publish(n).await;
        }
        let mut progress = self.progress();
        let filled = progress.wait_for(|progress| progress.blocks == blocks && !progress.pending);
        timeout(WAIT, filled).await.unwrap().unwrap();
    }

    fn progress(&self) -> watch::Receiver<Progress> {
        self.shim.progress()[0].clone()
    }

    fn epoch(&self) -> Epoch {
        self.progress().borrow().position.0
    }

    async fn ask(&self, epoch: Epoch, want: Want) {
        self.ask_about(ShardId::WHOLE, epoch, want).await;
    }

    async fn ask_about(&self, shard: ShardId, epoch: Epoch, want: Want) {
        let payload = Request { id: RequestId(5), epoch, shard, want }.encode().unwrap().into();
        let reply = Some(self.subjects.reply(&asker(), &source()));
        self.bus
            .send(BusMessage { subject: self.subjects.control(&source()), reply, payload })
            .await
            .unwrap();
    }

    async fn reply(&mut self) -> Bytes {
        timeout(WAIT, self.replies.recv()).await.unwrap().unwrap().payload
    }

    /// Waits for the next heartbeat after everything that is in the queue already.
    async fn next_heartbeat(&mut self) {
        while self.events.try_recv().is_ok() {}
        loop {
            let frame = timeout(WAIT, self.events.recv()).await.unwrap().unwrap().payload;
            if !FrameView::parse(&frame).unwrap().header().digests.is_empty() {
                return;
            }
        }
    }
}

/// A message that stores a block of its own.
fn message(n: u64) -> Bytes {
    let event = StoredEvent { hashes: vec![n + 1], tokens: vec![n as u32; 4], ..StoredEvent::default() };
    Bytes::from(batch_at(n as f64, vec![event.map()]))
}

async fn wait(shim: &Shim, reached: impl FnMut(&Progress) -> bool) -> Progress {
    let mut progress = shim.progress()[0].clone();
    timeout(WAIT, progress.wait_for(reached)).await.unwrap().unwrap().clone()
}

fn asker() -> Asker {
    Asker::new("index-1").unwrap()
}

fn source() -> SourceId {
    SourceId { instance: InstanceId::new("a:1").unwrap(), rank: DpRank(0) }
}

fn config(events: &str, replay: Option<String>) -> ShimConfig {
    ShimConfig {
        adapter: None,
        model: "m".to_owned(),
        tenant: String::new(),
        instance: source().instance,
        endpoints: vec![EndpointConfig {
            events: events.to_owned(),
            attach: Attach::Connect,
            replay,
            topic: String::new(),
            rank: Some(DpRank(0)),
        }],
        block_size: None,
        removal: RemovalPolicy::PerCopy,
        hasher: KeyHasher::default(),
        partition: Partition::WHOLE,
        limits: MirrorLimits::default(),
        subjects: Subjects::default(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_missed_everything_asks_and_is_answered() {
    let mut rig = Rig::start().await;
    rig.fill(50).await;
    rig.ask(rig.epoch(), Want::State(vec![])).await;
    let frame = rig.reply().await;
    let view = FrameView::parse(&frame).unwrap();
    assert_eq!((view.header().part, view.header().digests[0].count), (FramePart::Repair, 50));
    rig.ask(rig.epoch(), Want::Frames(vec![(FrameSeq(0), FrameSeq(0))])).await;
    let frame = rig.reply().await;
    assert_eq!(FrameView::parse(&frame).unwrap().header().part, FramePart::Start);
    let mut progress = rig.progress();
    let counted = progress.wait_for(|p| p.requests.answer_frames == 2);
    let requests = timeout(WAIT, counted).await.unwrap().unwrap().requests;
    assert_eq!((requests.state, requests.frames, requests.other_epoch), (1, 1, 0));
    assert!(requests.answer_bytes > 50 * 8);
    rig.shim.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_about_another_epoch_gets_a_heartbeat_and_no_answer() {
    let mut rig = Rig::start().await;
    rig.fill(5).await;
    rig.ask(Epoch(1), Want::State(vec![])).await;
    rig.next_heartbeat().await;
    let mut progress = rig.progress();
    timeout(WAIT, progress.wait_for(|p| p.requests.other_epoch == 1)).await.unwrap().unwrap();
    assert!(rig.replies.try_recv().is_err());
    rig.shim.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hello_is_counted_and_answered_with_a_heartbeat() {
    let mut rig = Rig::start().await;
    rig.fill(5).await;
    rig.bus.publish(rig.subjects.hello(), Bytes::new()).await.unwrap();
    rig.next_heartbeat().await;
    let mut progress = rig.progress();
    timeout(WAIT, progress.wait_for(|p| p.requests.hello == 1)).await.unwrap().unwrap();
    rig.shim.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_lane_has_a_subject_of_its_own_and_a_hello_is_answered_in_all() {
    let partition = Partition::new(4).unwrap();
    let mut rig = Rig::cut(partition).await;
    rig.fill(20).await;
    while rig.events.try_recv().is_ok() {}
    rig.bus.publish(rig.subjects.hello(), Bytes::copy_from_slice(&4u16.to_le_bytes())).await.unwrap();
    let mut silent: BTreeSet<ShardId> = partition.all().collect();
    while !silent.is_empty() {
        let message = timeout(WAIT, rig.events.recv()).await.unwrap().unwrap();
        let view = FrameView::parse(&message.payload).unwrap();
        let (shard, scope) = (view.header().shard, view.header().scope.token());
        assert_eq!(message.subject, rig.subjects.events(scope, shard, &source()));
        silent.remove(&shard);
    }
    let progress = wait(&rig.shim, |p| p.requests.hello == 1).await;
    assert_eq!((progress.requests.other_shards, progress.shards), (0, 4));
    for shard in partition.all() {
        rig.ask_about(shard, rig.epoch(), Want::State(vec![])).await;
        let frame = rig.reply().await;
        assert_eq!(FrameView::parse(&frame).unwrap().header().shard, shard);
    }
    rig.shim.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_cuts_the_key_space_otherwise_is_counted_and_not_answered() {
    let partition = Partition::new(4).unwrap();
    let mut rig = Rig::cut(partition).await;
    rig.fill(5).await;
    rig.bus.publish(rig.subjects.hello(), Bytes::copy_from_slice(&8u16.to_le_bytes())).await.unwrap();
    rig.next_heartbeat().await;
    rig.ask_about(ShardId::WHOLE, rig.epoch(), Want::State(vec![])).await;
    let requests = wait(&rig.shim, |p| p.requests.other_shards == 2).await.requests;
    assert_eq!((requests.hello, requests.state, requests.malformed), (1, 0, 0));
    rig.ask_about(partition.shard(2), rig.epoch(), Want::State(vec![])).await;
    let frame = rig.reply().await;
    assert_eq!(FrameView::parse(&frame).unwrap().header().shard, partition.shard(2));
    assert!(rig.replies.try_recv().is_err());
    rig.shim.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_request_is_counted_and_costs_nothing() {
    let mut rig = Rig::start().await;
    rig.fill(5).await;
    rig.bus.publish(rig.subjects.control(&source()), Bytes::from_static(b"snapshot")).await.unwrap();
    let mut progress = rig.progress();
    timeout(WAIT, progress.wait_for(|p| p.requests.malformed == 1)).await.unwrap().unwrap();
    rig.ask(rig.epoch(), Want::State(vec![])).await;
    rig.reply().await;
    rig.shim.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_held_survives_the_shim_and_goes_on_with_the_engine_s_replay() {
    let (mut engine, mut router) = (PubSocket::new(), RouterSocket::new());
    let events = engine.bind("tcp://127.0.0.1:0").await.unwrap().to_string();
    let replay = router.bind("tcp://127.0.0.1:0").await.unwrap().to_string();
    let sent = Arc::new(Mutex::new((0..20).map(|n| (n, message(n))).collect::<Vec<_>>()));
    let replays = tokio::spawn(serve_replays(router, sent.clone()));
    let bus: Arc<dyn Bus> = Arc::new(InProcessBus::new(InProcessConfig::default()));
    let dir = tempfile::tempdir().unwrap();
    let start =
        || Shim::start_with_state(&config(&events, Some(replay.clone())), &bus, Some(dir.path())).unwrap();

    let shim = start();
    let before = wait(&shim, |p| p.blocks == 20 && !p.pending && p.frames > 0).await;
    assert_eq!((before.state.restored, before.state.refused), (false, None));
    shim.shutdown().await;

    // While the shim is down the engine goes on, and forgets its first messages.
    sent.lock().extend((20..25).map(|n| (n, message(n))));
    sent.lock().drain(..15);
    let shim = start();
    let after = wait(&shim, |p| p.blocks == 25 && !p.pending && p.frames > 0).await;
    assert!(after.state.restored && after.position.0 > before.position.0);
    assert_eq!((after.health.name(), after.counts.restarts), ("exact", 0));
    shim.shutdown().await;

    // Another engine's life, in which the same sequences mean other messages.
    *sent.lock() = (0..30).map(|n| (n, message(n + 100))).collect();
    let shim = start();
    let after = wait(&shim, |p| p.blocks == 30 && !p.pending && p.frames > 0).await;
    assert_eq!((after.state.restored, after.counts.restarts), (true, 1));
    shim.shutdown().await;

    // A damaged file costs what was in it and is replaced.
    let file = fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
    let shim = start();
    let after = wait(&shim, |p| p.blocks == 30 && !p.pending).await;
    assert_eq!((after.state.restored, after.state.refused), (false, Some("damaged")));
    shim.shutdown().await;
    assert!(fs::read(&file).unwrap().len() >= bytes.len());
    replays.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_directory_that_cannot_be_made_is_an_error_at_the_start() {
    let bus: Arc<dyn Bus> = Arc::new(InProcessBus::new(InProcessConfig::default()));
    let file = tempfile::NamedTempFile::new().unwrap();
    let config = config("tcp://127.0.0.1:1", None);
    let error = Shim::start_with_state(&config, &bus, Some(file.path())).err().unwrap().to_string();
    assert!(error.contains("state directory") && error.contains(file.path().to_str().unwrap()), "{error}");
}
