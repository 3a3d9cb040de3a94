//! A live engine, recorded over its sockets, reads back and plays as it was.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use kvatlas_loadtest::check::{CheckConfig, play};
use kvatlas_loadtest::engine_sim::{HashForm, SimConfig, SimEngine};
use kvatlas_loadtest::kvrec::{Marker, Record, RecordKind, Recording};
use kvatlas_loadtest::publisher::{EnginePublisher, PublisherConfig};
use kvatlas_loadtest::record::{
    Ended, InvalidRecordError, RecordConfig, RecordError, RecordLimits, RecordSummary, Recorder, StreamConfig,
};
use kvatlas_loadtest::replay::ReplayBuffer;
use kvatlas_loadtest::sockets::{StreamPorts, StreamSockets};
use kvatlas_loadtest::wire::{Batch, Event, WireForm};
use kvatlas_shim::source::Live;
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

/// Long enough for a busy machine; no test expects it to pass.
const WAIT: Duration = Duration::from_secs(20);

/// A recorder at work.
struct Running {
    _folder: TempDir,
    path: PathBuf,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<RecordSummary, RecordError>>,
}

impl Running {
    fn start(config: RecordConfig) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("live.kvrec");
        let file = std::fs::File::create_new(&path).unwrap();
        let (stop, stopped) = oneshot::channel();
        let recorder = Recorder::new(config).unwrap();
        let task = tokio::spawn(recorder.run(file, async {
            // A dropped sender ends it too.
            let _ = stopped.await;
        }));
        Self { _folder: folder, path, stop, task }
    }

    /// Reads the growing file until it holds what is `wanted`. A read may fall into the middle of a write.
    async fn wait_for(&self, what: &str, wanted: impl Fn(&Recording) -> bool) -> Recording {
        let deadline = Instant::now() + WAIT;
        loop {
            let recording = Recording::read(&self.path);
            if let Ok(recording) = &recording
                && wanted(recording)
            {
                return recording.clone();
            }
            assert!(Instant::now() < deadline, "{what} did not come: {recording:?}");
            sleep(Duration::from_millis(20)).await;
        }
    }

    async fn wait_for_live(&self, messages: usize) -> Recording {
        self.wait_for("a message", |recording| live(recording, 0).len() >= messages).await
    }

    async fn finish(self) -> (Recording, RecordSummary) {
        drop(self.stop);
        let summary = timeout(WAIT, self.task).await.unwrap().unwrap().unwrap();
        let recording = Recording::read(&self.path).unwrap();
        assert_eq!(self.path.metadata().unwrap().len(), summary.bytes);
        (recording, summary)
    }
}

fn config(publisher: &EnginePublisher, with_replay: bool) -> RecordConfig {
    let endpoints = publisher.endpoints();
    let replay = with_replay.then(|| endpoints.replay.clone());
    of(vec![StreamConfig { events: endpoints.events.clone(), replay }])
}

fn of(streams: Vec<StreamConfig>) -> RecordConfig {
    RecordConfig {
        streams,
        topic: String::new(),
        engine: "vllm".into(),
        engine_version: "unknown".into(),
        redact: false,
        limits: RecordLimits { messages: 100_000, bytes: 1 << 28 },
        duration: None,
    }
}

fn live(recording: &Recording, stream: u8) -> Vec<Vec<Bytes>> {
    let of_stream = |record: &&Record| record.kind == RecordKind::Live && record.stream == stream;
    recording.records.iter().filter(of_stream).map(|record| record.frames.clone()).collect()
}

/// What a simulated engine says while it serves prompts that share prefixes.
fn batches() -> Vec<Batch> {
    let sizes =
        SimConfig { blocks: 64, block_size: 16, max_step_tokens: 128, max_running: 4, hashes: HashForm::Int };
    let mut engine = SimEngine::new(sizes, 3).unwrap();
    let mut batches = Vec::new();
    for request in 0..12u32 {
        let prompt: Vec<u32> =
            (0..96).map(|i| if i < 48 { 1_000 + i } else { 5_000 + 100 * request + i }).collect();
        engine.enqueue(&prompt, 40).unwrap();
        while !engine.is_idle() {
            let events = engine.step().events;
            if !events.is_empty() {
                batches.push(Batch { time_s: batches.len() as f64 + 1.0, events, rank: 0 });
            }
        }
    }
    assert!(batches.len() > 20, "{}", batches.len());
    batches
}

fn frames(topic: &'static str, seq: u64, batch: &Batch, form: WireForm) -> Vec<Bytes> {
    vec![Bytes::from(topic), Bytes::copy_from_slice(&seq.to_be_bytes()), batch.encode(form).into()]
}

async fn publisher(topic: &str) -> EnginePublisher {
    let config = PublisherConfig { topic: topic.into(), ..PublisherConfig::default() };
    EnginePublisher::bind(config).await.unwrap()
}

async fn publish_all(publisher: &mut EnginePublisher, batches: &[Batch]) {
    for batch in batches {
        publisher.publish(batch).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_live_message_is_in_the_file_byte_for_byte_and_plays() {
    let (batches, mut publisher) = (batches(), publisher("kv@").await);
    let recorder = Running::start(config(&publisher, false));
    publisher.wait_for_subscribers(1, WAIT).await.unwrap();
    publish_all(&mut publisher, &batches).await;
    recorder.wait_for_live(batches.len()).await;
    let path = recorder.path.clone();
    assert_eq!(play(&path, &CheckConfig::default()).await.unwrap(), batches.len() as u64);

    let (recording, summary) = recorder.finish().await;
    let form = PublisherConfig::default().form;
    let expected: Vec<_> = (0..).zip(&batches).map(|(seq, batch)| frames("kv@", seq, batch, form)).collect();
    assert_eq!(live(&recording, 0), expected);
    assert_eq!(recording.records.len(), batches.len(), "no remarks without a reason");
    assert!(recording.records.iter().all(|record| record.time_ns > 1_600_000_000_000_000_000));
    assert!(recording.records.is_sorted_by_key(|record| record.time_ns));
    assert_eq!(recording.header.version(), (0, 0), "an unknown version is no version, and no failure");
    assert_eq!(recording.header.other["redacted"], false);
    let counts = (summary.ended, summary.messages, summary.dropped, summary.connected);
    assert_eq!(counts, (Ended::Stopped, batches.len() as u64, 0, 1));
    publisher.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_messages_are_recorded_as_they_are() {
    let buffer = ReplayBuffer::new(Bytes::new(), kvatlas_loadtest::replay::ReplayFraming::WithTopic, 10);
    let sockets =
        StreamSockets::bind(StreamPorts::default(), std::sync::Arc::new(parking_lot::Mutex::new(buffer)))
            .await
            .unwrap();
    let stream = StreamConfig { events: sockets.endpoints().events.clone(), replay: None };
    let recorder = Running::start(of(vec![stream]));
    sockets.wait_for_subscribers(1, WAIT).await.unwrap();
    let messages: Vec<Vec<Bytes>> = vec![
        vec![Bytes::from_static(b"alone")],
        vec![Bytes::new(), Bytes::from_static(b"short"), Bytes::from_static(b"\xc1")],
        vec![Bytes::from_static(b"x"); 6],
    ];
    for message in &messages {
        sockets.send(message.clone()).await.unwrap();
    }
    recorder.wait_for_live(messages.len()).await;
    let (recording, _) = recorder.finish().await;
    assert_eq!(live(&recording, 0), messages);
    sockets.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_is_remarked_and_each_connection_brings_the_replay() {
    let (batches, mut publisher) = (batches(), publisher("").await);
    let (early, rest) = batches.split_at(5);
    let (first_life, second_life) = rest.split_at(5);
    publish_all(&mut publisher, early).await;
    let recorder = Running::start(config(&publisher, true));
    publisher.wait_for_subscribers(1, WAIT).await.unwrap();
    let ends = |recording: &Recording| {
        let is_end = |record: &&Record| record.kind == RecordKind::ReplayReply && record.message().is_none();
        recording.records.iter().filter(is_end).count()
    };
    recorder.wait_for("the first replay", |recording| ends(recording) == 1).await;
    publish_all(&mut publisher, first_life).await;
    recorder.wait_for_live(first_life.len()).await;
    let mut publisher = publisher.restart().await.unwrap();
    publisher.wait_for_subscribers(1, WAIT).await.unwrap();
    recorder.wait_for("the second replay", |recording| ends(recording) == 2).await;
    publish_all(&mut publisher, &second_life[..5]).await;
    recorder.wait_for_live(first_life.len() + 5).await;
    let (recording, summary) = recorder.finish().await;

    let story: Vec<String> = recording
        .records
        .iter()
        .map(|record| match (record.kind, record.message(), record.marker()) {
            (RecordKind::Live, Some(message), _) => format!("live {}", message.seq),
            (RecordKind::ReplayReply, Some(message), _) => format!("reply {}", message.seq),
            (RecordKind::ReplayReply, None, _) => "end".to_owned(),
            (RecordKind::ReplayRequest, ..) => "ask".to_owned(),
            (_, _, Some(Marker::SubscriberClosed { .. })) => "closed".to_owned(),
            (_, _, Some(Marker::SubscriberOpen { .. })) => "open".to_owned(),
            other => format!("{other:?}"),
        })
        .collect();
    let expected = "ask|reply 0|reply 1|reply 2|reply 3|reply 4|end|live 5|live 6|live 7|live 8|live 9|\
                    closed|open|ask|end|live 0|live 1|live 2|live 3|live 4";
    assert_eq!(story.join("|"), expected);
    assert_eq!((summary.messages, summary.replayed), (10, 5));
    // In the framing that the header states.
    let reply = &recording.records[1];
    let payload = Bytes::from(early[0].encode(PublisherConfig::default().form));
    assert_eq!(reply.frames, [Bytes::new(), Bytes::copy_from_slice(&[0; 8]), payload]);
    publisher.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ranks_are_streams_of_their_own() {
    let batch = Batch { time_s: 1.0, events: vec![Event::Cleared], rank: 0 };
    let mut publishers = [publisher("").await, publisher("").await];
    let endpoints = publishers.iter().map(|publisher| publisher.endpoints().clone());
    let streams = endpoints.map(|e| StreamConfig { events: e.events, replay: Some(e.replay) }).collect();
    let recorder = Running::start(of(streams));
    for publisher in &publishers {
        publisher.wait_for_subscribers(1, WAIT).await.unwrap();
    }
    for (publisher, count) in publishers.iter_mut().zip([2, 3]) {
        publish_all(publisher, &vec![batch.clone(); count]).await;
    }
    recorder
        .wait_for("all", |recording| live(recording, 0).len() == 2 && live(recording, 1).len() == 3)
        .await;
    let (recording, summary) = recorder.finish().await;
    let ranks: Vec<u32> = recording.header.streams.iter().map(|stream| stream.dp_rank).collect();
    assert_eq!((ranks, summary.streams, summary.connected), (vec![0, 1], 2, 2));
    for publisher in publishers {
        publisher.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redacted_recording_plays_into_as_many_blocks_and_holds_no_topic_or_prompt() {
    let (batches, mut publisher) = (batches(), publisher("kv@customer").await);
    publish_all(&mut publisher, &batches[..4]).await;
    let recorder =
        Running::start(RecordConfig { redact: true, topic: "kv@".into(), ..config(&publisher, true) });
    publisher.wait_for_subscribers(1, WAIT).await.unwrap();
    recorder.wait_for("the replay", |recording| recording.records.len() >= 6).await;
    publish_all(&mut publisher, &batches[4..]).await;
    recorder.wait_for_live(batches.len() - 4).await;
    let path = recorder.path.clone();
    let played = play(&path, &CheckConfig::default()).await.unwrap();
    assert_eq!(played, batches.len() as u64 - 4);
    let bytes = std::fs::read(&path).unwrap();
    assert!(!bytes.windows(8).any(|window| window == b"customer"));

    let (recording, summary) = recorder.finish().await;
    assert_eq!((recording.header.other["redacted"].clone(), summary.blanked), (true.into(), 0));
    let payloads = recording.records.iter().filter_map(|record| Some(record.message()?.payload));
    let form = PublisherConfig::default().form;
    let originals: Vec<Vec<u8>> = batches.iter().map(|batch| batch.encode(form)).collect();
    let blocks =
        [visible_blocks(payloads.map(Bytes::as_ref)), visible_blocks(originals.iter().map(Vec::as_slice))];
    assert!(blocks[0] > 10 && blocks[0] == blocks[1], "{blocks:?}");
    publisher.close().await;
}

fn visible_blocks<'a>(payloads: impl Iterator<Item = &'a [u8]>) -> u64 {
    use kvatlas_proto::InstanceId;
    use kvatlas_shim::source::{Source, SourceConfig};
    let config = SourceConfig::new("m", InstanceId::new("a:1").unwrap());
    let mut source = Source::new(config, 1).unwrap();
    for (seq, payload) in (0..).zip(payloads) {
        assert_eq!(source.live(seq, payload, false), Live::Done);
    }
    source.mirror().visible_blocks()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_ends_the_recording_and_is_named() {
    let batch = Batch { time_s: 1.0, events: vec![Event::Cleared; 20], rank: 0 };
    let limits = RecordLimits { messages: 3, bytes: 1 << 20 };
    for (limits, ended) in
        [(limits, Ended::Messages), (RecordLimits { messages: 1_000, bytes: 2_000 }, Ended::Bytes)]
    {
        let mut publisher = publisher("").await;
        let recorder = Running::start(RecordConfig { limits, ..config(&publisher, false) });
        publisher.wait_for_subscribers(1, WAIT).await.unwrap();
        for _ in 0..10 {
            publisher.publish(&batch).await.unwrap();
        }
        // It ends by itself.
        let Running { _folder, path, stop, task } = recorder;
        let summary = timeout(WAIT, task).await.unwrap().unwrap().unwrap();
        drop(stop);
        let recording = Recording::read(&path).unwrap();
        assert_eq!((summary.ended, live(&recording, 0).len() as u64), (ended, summary.messages));
        assert!(summary.messages <= limits.messages && summary.bytes <= limits.bytes && summary.messages > 0);
        publisher.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_duration_ends_a_recording_of_an_engine_that_never_came() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let stream = StreamConfig { events: format!("tcp://{closed}"), replay: None };
    let recorder =
        Running::start(RecordConfig { duration: Some(Duration::from_millis(50)), ..of(vec![stream]) });
    let Running { _folder, path, stop, task } = recorder;
    let summary = timeout(WAIT, task).await.unwrap().unwrap().unwrap();
    drop(stop);
    assert_eq!((summary.ended, summary.connected, summary.messages), (Ended::Duration, 0, 0));
    assert!(Recording::read(&path).unwrap().records.is_empty());
}

#[test]
fn what_cannot_be_recorded_is_refused_before_anything_is_opened() {
    let stream = |events: &str| StreamConfig { events: events.into(), replay: None };
    assert!(matches!(Recorder::new(of(Vec::new())), Err(InvalidRecordError::Streams(0))));
    assert!(matches!(
        Recorder::new(of(vec![stream("tcp://a:1"); 257])),
        Err(InvalidRecordError::Streams(257))
    ));
    let error = Recorder::new(of(vec![stream("udp://x")])).unwrap_err();
    assert!(error.to_string().contains("udp://x"), "{error}");
    let limits = RecordLimits { messages: 1, bytes: u64::MAX };
    let error = Recorder::new(RecordConfig { limits, ..of(vec![stream("tcp://*:5557")]) }).unwrap_err();
    assert!(matches!(error, InvalidRecordError::Bytes(_)));
}
