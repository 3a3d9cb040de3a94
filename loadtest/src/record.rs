//! Records live engines: every frame of their event sockets, and what their replay sockets still hold.
//!
//! ```text
//! SUB task per stream --(bounded queue)--> writer --> file
//! DEALER task per stream -------^
//! ```
//!
//! The reading task never waits, as in the shim: a full queue drops the message, and the recording says how many and
//! where. The file grows by whole records at least once a second, so that a recorder that is killed leaves a recording.
//!
//! At the start and after each reconnect the replay socket, if there is one, is asked for everything. A reply that the
//! next reconnect overtakes is left out: it may be of another life of the engine.

mod tape;

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use kvatlas_shim::zmq::{self, Attach, Connection};
use serde_json::{Map, Value, json};
use tokio::fs::File;
use tokio::io::AsyncWriteExt as _;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;

pub use self::tape::RecordLimits;
use self::tape::{Bound, Entry, Tape, What};
use crate::kvrec::{Header, MAX_RECORDING_BYTES, MAX_STREAMS, StreamHeader, WriteRecordingError};
use crate::redact::Redactor;

/// Messages between the reading tasks and the writer; as in the shim, 20 minutes of one engine rank.
pub const QUEUE_MESSAGES: usize = 65_536;
/// Bytes between the reading tasks and the writer.
pub const QUEUE_BYTES: usize = 128 << 20;
/// Longest time that a record waits in memory.
pub const FLUSH_EVERY: Duration = Duration::from_secs(1);
/// Bytes that are written before that time has passed.
const FLUSH_BYTES: usize = 1 << 20;
/// Default of [`RecordLimits::messages`]: some five hours of one engine rank.
pub const DEFAULT_MAX_MESSAGES: u64 = 1_000_000;
/// Default and largest value of [`RecordLimits::bytes`]: what readers accept.
pub const DEFAULT_MAX_BYTES: u64 = MAX_RECORDING_BYTES;

/// What a recording says about who made it.
const RECORDED_BY: &str = concat!("kvatlas ", env!("CARGO_PKG_VERSION"));

/// What is recorded.
#[derive(Clone, Debug)]
pub struct RecordConfig {
    /// The engines' publishers, one stream each. Several are taken for the data-parallel ranks of one engine, in order.
    pub streams: Vec<StreamConfig>,
    /// Only messages whose topic starts with this; empty for all.
    pub topic: String,
    /// Name of the engine, for the header.
    pub engine: String,
    /// Version of the engine, for the header.
    pub engine_version: String,
    /// Replaces what users said; see [`crate::redact`].
    pub redact: bool,
    /// Where the recording ends by itself.
    pub limits: RecordLimits,
    /// How long to record; `None`: until told to stop or a limit is reached.
    pub duration: Option<Duration>,
}

/// One publisher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamConfig {
    /// Event socket, for example `tcp://127.0.0.1:5557`. With a wildcard host (`tcp://*:5557`) the recorder binds it
    /// and the engine connects.
    pub events: String,
    /// Replay socket, for example `tcp://127.0.0.1:5558`.
    pub replay: Option<String>,
}

/// A recording that can start.
#[derive(Debug)]
pub struct Recorder {
    config: RecordConfig,
}

/// Why a recording cannot start.
#[derive(Debug, thiserror::Error)]
pub enum InvalidRecordError {
    /// There is nothing to record, or more than a recording can hold.
    #[error("{0} streams cannot be recorded into one file: name 1 to {MAX_STREAMS} event sockets")]
    Streams(usize),
    /// An address is not a ZeroMQ endpoint.
    #[error("{0:?} is not a ZeroMQ endpoint: use tcp://HOST:PORT or ipc://PATH")]
    Endpoint(String),
    /// Readers would refuse the file.
    #[error("a recording of up to {0} bytes could not be read back: choose at most {MAX_RECORDING_BYTES}")]
    Bytes(u64),
}

/// Why a recording failed.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The header could not be written.
    #[error(transparent)]
    Header(#[from] WriteRecordingError),
    /// The file failed. It was cut back to its last whole record, if that was possible.
    #[error("cannot write the recording after {written} bytes: {source}; check the disk")]
    File {
        /// Bytes written before.
        written: u64,
        /// What the operating system said.
        source: io::Error,
    },
}

/// What was recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordSummary {
    /// Why it ended.
    pub ended: Ended,
    /// Live messages.
    pub messages: u64,
    /// Messages of replays.
    pub replayed: u64,
    /// Bytes of the file.
    pub bytes: u64,
    /// Streams in the header.
    pub streams: usize,
    /// Streams that were ever connected.
    pub connected: usize,
    /// Messages dropped because the queue was full.
    pub dropped: u64,
    /// Messages that the format has no room for.
    pub refused: u64,
    /// Messages and payloads that redaction had to blank, because they could hold anything.
    pub blanked: u64,
}

/// Why a recording ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Somebody said so.
    Stopped,
    /// [`RecordConfig::duration`] passed.
    Duration,
    /// [`RecordLimits::messages`] was reached.
    Messages,
    /// [`RecordLimits::bytes`] was reached.
    Bytes,
}

/// Shared between one stream's tasks and the writer.
#[derive(Debug, Default)]
struct Intake {
    /// Bytes in the queue, of all streams.
    queued_bytes: Arc<AtomicUsize>,
    /// Messages dropped.
    dropped: AtomicU64,
}

/// The file and how much of it is whole.
struct Output {
    file: File,
    written: u64,
}

// === impl RecordConfig ===

impl RecordConfig {
    fn header(&self) -> Header {
        let stream = |(stream, _): (u8, &StreamConfig)| StreamHeader {
            stream,
            dp_rank: u32::from(stream),
            // What a consumer subscribes to. Redacted topics have no common start.
            topic: if self.redact { String::new() } else { self.topic.clone() },
            ..StreamHeader::default()
        };
        let other = json!({
            "recorded_by": RECORDED_BY,
            "redacted": self.redact,
            "replay_frames": "rebuilt as [\"\", sequence, payload], whatever the engine's framing",
        });
        let Value::Object(other) = other else { unreachable!("an object literal") };
        Header {
            format: "KVREC01".to_owned(),
            engine: self.engine.clone(),
            engine_version: self.engine_version.clone(),
            streams: (0..=u8::MAX).zip(&self.streams).map(stream).collect(),
            config: Value::Null,
            hash_encoding: None,
            other: Map::from_iter(other),
        }
    }
}

// === impl StreamConfig ===

impl StreamConfig {
    fn attach(&self) -> Attach {
        let wildcard = self.events.contains("://*:") || self.events.contains("://0.0.0.0:");
        if wildcard { Attach::Bind } else { Attach::Connect }
    }
}

// === impl Recorder ===

impl Recorder {
    /// Checks what can be checked before anything is opened.
    pub fn new(config: RecordConfig) -> Result<Self, InvalidRecordError> {
        if config.streams.is_empty() || config.streams.len() > MAX_STREAMS {
            return Err(InvalidRecordError::Streams(config.streams.len()));
        }
        if config.limits.bytes > MAX_RECORDING_BYTES {
            return Err(InvalidRecordError::Bytes(config.limits.bytes));
        }
        for address in
            config.streams.iter().flat_map(|stream| std::iter::once(&stream.events).chain(&stream.replay))
        {
            if address.replace("://*:", "://0.0.0.0:").parse::<::zeromq::Endpoint>().is_err() {
                return Err(InvalidRecordError::Endpoint(address.clone()));
            }
        }
        Ok(Self { config })
    }

    /// Records into an empty file until `stop` completes or a limit is reached. Engines need not be there yet.
    pub async fn run(
        self,
        file: std::fs::File,
        stop: impl Future<Output = ()>,
    ) -> Result<RecordSummary, RecordError> {
        let Self { config } = self;
        // The key exists only here, and ends with the recording.
        let redactor = config.redact.then(|| Redactor::new(&rand::random()));
        let mut tape = Tape::new(&config.header(), config.limits, redactor)?;
        let mut output = Output { file: File::from_std(file), written: 0 };
        output.append(&tape.take()).await?;

        let token = CancellationToken::new();
        let (queue_in, mut queue) = mpsc::channel(QUEUE_MESSAGES);
        let mut tasks = JoinSet::new();
        let queued_bytes = Arc::new(AtomicUsize::new(0));
        let mut intakes = Vec::new();
        for (stream, settings) in (0..=u8::MAX).zip(&config.streams) {
            let intake = Arc::new(Intake { queued_bytes: Arc::clone(&queued_bytes), ..Intake::default() });
            let (connection_in, connection) = watch::channel(Connection::default());
            intakes.push(Arc::clone(&intake));
            let (settings, topic) = (settings.clone(), config.topic.clone());
            let replay = settings.replay.clone();
            tasks.spawn(attend(stream, replay, connection, queue_in.clone(), token.clone()));
            let (queue_in, token) = (queue_in.clone(), token.clone());
            tasks.spawn(async move {
                let deliver = |connection, frames| intake.deliver(&queue_in, stream, connection, frames);
                let attach = settings.attach();
                zmq::follow(&settings.events, attach, &topic, &connection_in, &token, deliver).await;
            });
        }
        // The tasks hold the rest: when they are gone, the queue ends.
        drop(queue_in);

        let until = async {
            tokio::select! {
                () = stop => Ended::Stopped,
                () = sleep(config.duration.unwrap_or_default()), if config.duration.is_some() => Ended::Duration,
            }
        };
        tokio::pin!(until);
        let mut ended = None;
        let mut flush = interval(FLUSH_EVERY);
        flush.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                entry = queue.recv() => {
                    // What was received before the end was said is still written.
                    let Some(entry) = entry else { break };
                    queued_bytes.fetch_sub(entry.bytes(), Ordering::Relaxed);
                    if let Err(bound) = tape.add(entry) {
                        ended = Some(bound.into());
                        break;
                    }
                    if tape.pending_bytes() >= FLUSH_BYTES {
                        output.append(&tape.take()).await?;
                    }
                }
                reason = &mut until, if ended.is_none() => {
                    ended = Some(reason);
                    token.cancel();
                }
                _ = flush.tick() => output.append(&tape.take()).await?,
            }
        }
        token.cancel();
        let mut dropped = 0;
        for (stream, intake) in (0..=u8::MAX).zip(&intakes) {
            let of_stream = intake.dropped.load(Ordering::Relaxed);
            dropped += of_stream;
            // A file that is full cannot say it; the summary does.
            let _ = tape.note_dropped(stream, wall_clock_ns(), of_stream);
        }
        output.append(&tape.take()).await?;
        let counts = tape.counts();
        Ok(RecordSummary {
            ended: ended.unwrap_or(Ended::Stopped),
            messages: counts.messages,
            replayed: counts.replayed,
            bytes: counts.bytes,
            streams: config.streams.len(),
            connected: tape.connected(),
            dropped,
            refused: counts.refused,
            blanked: tape.blanked(),
        })
    }
}

/// Reports a stream's connections and asks for a replay after each. Ends with the reading task.
async fn attend(
    stream: u8,
    replay_endpoint: Option<String>,
    mut connection: watch::Receiver<Connection>,
    queue: mpsc::Sender<Entry>,
    token: CancellationToken,
) {
    let mut last = Connection::default();
    loop {
        let changed = connection.wait_for(|now| *now != last).await.map(|now| *now);
        let Ok(now) = changed else { return };
        // The recorder itself hung up: nothing happened to the engine.
        if token.is_cancelled() {
            return;
        }
        let is_new = now.number > last.number;
        last = now;
        if queue.send(Entry { stream, time_ns: wall_clock_ns(), what: What::Connection(now) }).await.is_err()
        {
            return;
        }
        let Some(endpoint) = replay_endpoint.as_deref().filter(|_| now.up && is_new) else { continue };
        let asked_ns = wall_clock_ns();
        let replay = tokio::select! {
            replay = zmq::replay(endpoint, 0) => replay,
            _ = connection.wait_for(|current| *current != now) => continue,
        };
        if !replay.answered {
            tracing::warn!(
                endpoint,
                "the engine's replay socket did not answer; the recording lacks what was before"
            );
        }
        let what = What::Replay { connection: now.number, asked_ns, replay };
        if queue.send(Entry { stream, time_ns: wall_clock_ns(), what }).await.is_err() {
            return;
        }
    }
}

fn wall_clock_ns() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX)
}

// === impl Ended ===

impl From<Bound> for Ended {
    fn from(bound: Bound) -> Self {
        match bound {
            Bound::Messages => Self::Messages,
            Bound::Bytes => Self::Bytes,
        }
    }
}

// === impl Entry ===

impl Entry {
    /// Bytes that it counts against the queue's bound. Replays do not: there is one per stream, bounded where it is made.
    fn bytes(&self) -> usize {
        match &self.what {
            What::Message { frames, .. } => frames.iter().map(Bytes::len).sum(),
            What::Connection(_) | What::Replay { .. } => 0,
        }
    }
}

// === impl Intake ===

impl Intake {
    /// Called by the reading task for each message; never waits.
    fn deliver(&self, queue: &mpsc::Sender<Entry>, stream: u8, connection: u64, frames: Vec<Bytes>) {
        let dropped = self.dropped.load(Ordering::Relaxed);
        let what = What::Message { connection, dropped, frames };
        let entry = Entry { stream, time_ns: wall_clock_ns(), what };
        let bytes = entry.bytes();
        // Counted before it can be taken out again.
        let queued = self.queued_bytes.fetch_add(bytes, Ordering::Relaxed);
        let sent = if queued + bytes <= QUEUE_BYTES {
            queue.try_send(entry)
        } else {
            Err(TrySendError::Full(entry))
        };
        if let Err(error) = sent {
            self.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
            // After the end nobody takes messages: they are not part of the recording.
            self.dropped.fetch_add(u64::from(matches!(error, TrySendError::Full(_))), Ordering::Relaxed);
        }
    }
}

// === impl Output ===

impl Output {
    async fn append(&mut self, bytes: &[u8]) -> Result<(), RecordError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let written = async {
            self.file.write_all(bytes).await?;
            self.file.flush().await
        };
        if let Err(source) = written.await {
            // A disk that is full may still take less; if not, the reader will name the cut.
            let _ = self.file.set_len(self.written).await;
            return Err(RecordError::File { written: self.written, source });
        }
        self.written += bytes.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(bytes: usize) -> Vec<Bytes> {
        vec![Bytes::from(vec![0; bytes])]
    }

    #[test]
    fn a_full_queue_drops_and_the_next_message_says_how_many() {
        let (queue_in, mut queue) = mpsc::channel(2);
        let intake = Intake::default();
        for _ in 0..5 {
            intake.deliver(&queue_in, 0, 1, frames(10));
        }
        assert_eq!(intake.queued_bytes.load(Ordering::Relaxed), 20);
        queue.try_recv().unwrap();
        queue.try_recv().unwrap();
        intake.deliver(&queue_in, 0, 1, frames(10));
        let what = queue.try_recv().unwrap().what;
        assert!(matches!(what, What::Message { dropped: 3, .. }), "{what:?}");
    }

    #[test]
    fn the_queue_is_bounded_in_bytes_too() {
        let (queue_in, _queue) = mpsc::channel(10);
        let intake = Intake::default();
        intake.deliver(&queue_in, 0, 1, frames(QUEUE_BYTES));
        intake.deliver(&queue_in, 0, 1, frames(1));
        assert_eq!(intake.dropped.load(Ordering::Relaxed), 1);
        assert_eq!(intake.queued_bytes.load(Ordering::Relaxed), QUEUE_BYTES);
    }

    #[test]
    fn messages_after_the_end_are_not_counted_as_dropped() {
        let (queue_in, queue) = mpsc::channel(10);
        drop(queue);
        let intake = Intake::default();
        intake.deliver(&queue_in, 0, 1, frames(1));
        assert_eq!(intake.dropped.load(Ordering::Relaxed), 0);
    }
}
