//! Runs one source per engine endpoint: reads at once, decides in [`crate::source`], publishes in batches.
//!
//! ```text
//! SUB task --(bounded queue)--> source task --frames--> bus
//!                                   |  ^
//!                        DEALER replay  control requests (snapshot, please)
//! ```
//!
//! The reading task never waits: a full queue drops the message, counts it, and the sequence then shows a gap, which the
//! source repairs. So a slow bus never slows an engine down.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use kvatlas_bus::{Bus, Subscription};
use kvatlas_proto::frame::SourceHealth;
use kvatlas_proto::scope::InvalidScopeError;
use kvatlas_proto::subject::{Shard, Subjects};
use kvatlas_proto::{DpRank, Epoch, FrameSeq, InstanceId, KeyHasher, SourceId};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::adapter::Adapter;
use crate::burst::Burst;
use crate::mirror::{MirrorCounts, MirrorLimits, RemovalPolicy};
use crate::source::{Live, Source, SourceConfig, SourceCounts};
use crate::zmq::{self, Attach, Connection};

/// Messages between the reading task and the source. At 50 steps a second that is 20 minutes of one engine rank.
pub const QUEUE_MESSAGES: usize = 65_536;
/// Bytes between the reading task and the source.
pub const QUEUE_BYTES: usize = 128 << 20;
/// How long changes wait for company before they are published.
pub const LINGER: Duration = Duration::from_millis(2);
/// Time between signs of life of an idle source.
pub const HEARTBEAT: Duration = Duration::from_secs(1);
/// Shortest time between two snapshots that somebody asked for.
const SNAPSHOT_SPACING: Duration = Duration::from_millis(200);
/// Pause after the bus refused a frame.
const PUBLISH_BACKOFF: Duration = Duration::from_millis(200);
/// Messages applied before other events (timers, requests) get a turn.
const TURN_MESSAGES: usize = 256;
/// Longest wait for the tasks at shutdown.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3);

/// One publisher socket of an engine: one data-parallel rank.
#[derive(Clone, Debug)]
pub struct EndpointConfig {
    /// Event socket, for example `tcp://127.0.0.1:5557`.
    pub events: String,
    /// Who opens the connection.
    pub attach: Attach,
    /// Replay socket, for example `tcp://127.0.0.1:5657`. Without it a gap costs the state from before.
    pub replay: Option<String>,
    /// Only messages whose topic starts with this; empty for all.
    pub topic: String,
    /// Data-parallel rank; `None` takes the one that the messages name.
    pub rank: Option<DpRank>,
}

/// What one shim follows and how it publishes.
#[derive(Clone, Debug)]
pub struct ShimConfig {
    /// Who speaks; `None`: the first messages show it.
    pub adapter: Option<&'static dyn Adapter>,
    /// Model name as the engine serves it.
    pub model: String,
    /// Tenant; empty for the default one.
    pub tenant: String,
    /// What a gateway routes to.
    pub instance: InstanceId,
    /// The engine's publisher sockets, one per data-parallel rank.
    pub endpoints: Vec<EndpointConfig>,
    /// Tokens per block; `None` takes the engine's.
    pub block_size: Option<u32>,
    /// What a removal says about copies.
    pub removal: RemovalPolicy,
    /// How keys are computed.
    pub hasher: KeyHasher,
    /// Bounds of each mirror.
    pub limits: MirrorLimits,
    /// Subjects of the deployment.
    pub subjects: Subjects,
}

/// A running shim. Dropping it stops it at once; [`Shim::shutdown`] publishes what is waiting first.
pub struct Shim {
    token: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
    progress: Vec<watch::Receiver<Progress>>,
}

/// Where one source is, for metrics and for those who wait for it.
#[derive(Clone, Debug)]
pub struct Progress {
    /// Who publishes.
    pub source: SourceId,
    /// Model name.
    pub model: String,
    /// Name of the adapter, once known.
    pub adapter: Option<&'static str>,
    /// State of the event connection.
    pub connection: Connection,
    /// Number of the connection up to which the source has compared or replayed.
    pub known_connection: u64,
    /// Sequence of the last engine message applied.
    pub engine_seq: Option<u64>,
    /// Messages taken off the queue and dealt with, whatever came of it.
    pub handled: u64,
    /// Messages dropped because the queue was full.
    pub overflow: u64,
    /// Messages dropped because their frames are not `[topic, sequence, payload]`.
    pub bad_frames: u64,
    /// Epoch and the sequence that the next frame will have.
    pub position: (Epoch, FrameSeq),
    /// Changes that were applied but not published yet.
    pub pending: bool,
    /// Frames handed to the bus.
    pub frames: u64,
    /// Bytes handed to the bus.
    pub frame_bytes: u64,
    /// Frames that the bus refused.
    pub publish_failures: u64,
    /// What the source knows about its own truth.
    pub health: SourceHealth,
    /// Visible blocks.
    pub blocks: u64,
    /// Counters of the engine's side.
    pub counts: SourceCounts,
    /// Counters of the mirror.
    pub mirror: MirrorCounts,
    /// Pages that could not be followed, where the engine's block size is not the scope's.
    pub untracked_pages: u64,
    /// Replays asked for, and those that no engine answered.
    pub replays: (u64, u64),
}

/// Why a shim cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartShimError {
    /// There is nothing to follow.
    #[error("no engine endpoint is given: name at least one event socket, for example tcp://127.0.0.1:5557")]
    NoEndpoint,
    /// Model, tenant or block size cannot be a scope.
    #[error(transparent)]
    Scope(#[from] InvalidScopeError),
    /// An address is not a ZeroMQ endpoint.
    #[error("{0:?} is not a ZeroMQ endpoint: use tcp://HOST:PORT or ipc://PATH")]
    Endpoint(String),
}

/// A live message on its way from the reading task.
struct Inbound {
    connection: u64,
    seq: u64,
    payload: Bytes,
}

/// Shared between the reading task and the source task.
#[derive(Default)]
struct Intake {
    queued_bytes: AtomicUsize,
    overflow: AtomicU64,
    bad_frames: AtomicU64,
}

/// The source task's state.
struct Worker {
    endpoint: EndpointConfig,
    model: String,
    source: Source,
    subjects: Subjects,
    bus: Arc<dyn Bus>,
    intake: Arc<Intake>,
    queue: mpsc::Receiver<Inbound>,
    connection: watch::Receiver<Connection>,
    /// The connection that `source` knows about.
    known_connection: u64,
    control: Option<(SourceId, Subscription)>,
    last_snapshot: Option<Instant>,
    flush_at: Option<Instant>,
    progress: watch::Sender<Progress>,
    handled: u64,
    frames: u64,
    frame_bytes: u64,
    publish_failures: u64,
    replays: (u64, u64),
    bursts: Bursts,
}

#[derive(Default)]
struct Bursts {
    undecodable: Burst,
    frames: Burst,
    overflow: Burst,
    publish: Burst,
    losses: Burst,
    over_limit: Burst,
    block_size: Burst,
}

// === impl Shim ===

impl Shim {
    /// Starts following the endpoints. Engines need not be there yet.
    pub fn start(config: &ShimConfig, bus: &Arc<dyn Bus>) -> Result<Self, StartShimError> {
        if config.endpoints.is_empty() {
            return Err(StartShimError::NoEndpoint);
        }
        let mut shim = Self { token: CancellationToken::new(), tasks: Vec::new(), progress: Vec::new() };
        for endpoint in &config.endpoints {
            shim.start_source(config, endpoint, bus)?;
        }
        Ok(shim)
    }

    fn start_source(
        &mut self,
        config: &ShimConfig,
        endpoint: &EndpointConfig,
        bus: &Arc<dyn Bus>,
    ) -> Result<(), StartShimError> {
        for address in std::iter::once(&endpoint.events).chain(&endpoint.replay) {
            if address.replace("://*:", "://0.0.0.0:").parse::<::zeromq::Endpoint>().is_err() {
                return Err(StartShimError::Endpoint(address.clone()));
            }
        }
        let source = Source::new(
            SourceConfig {
                adapter: config.adapter,
                model: config.model.clone(),
                tenant: config.tenant.clone(),
                instance: config.instance.clone(),
                rank: endpoint.rank,
                block_size: config.block_size,
                hasher: config.hasher,
                removal: config.removal,
                limits: config.limits,
                has_replay: endpoint.replay.is_some(),
            },
            wall_clock_ns(),
        )?;
        let intake = Arc::new(Intake::default());
        let (queue_in, queue) = mpsc::channel(QUEUE_MESSAGES);
        let (connection_in, connection) = watch::channel(Connection::default());
        let (progress_in, progress) = watch::channel(Progress::of(&source, &config.model));
        let worker = Worker {
            endpoint: endpoint.clone(),
            model: config.model.clone(),
            source,
            subjects: config.subjects.clone(),
            bus: bus.clone(),
            intake: intake.clone(),
            queue,
            connection,
            known_connection: 0,
            control: None,
            last_snapshot: None,
            flush_at: None,
            progress: progress_in,
            handled: 0,
            frames: 0,
            frame_bytes: 0,
            publish_failures: 0,
            replays: (0, 0),
            bursts: Bursts::default(),
        };
        let (endpoint, token) = (endpoint.clone(), self.token.clone());
        self.tasks.push(tokio::spawn(async move {
            let deliver = |connection, frames: Vec<Bytes>| intake.deliver(&queue_in, connection, &frames);
            zmq::follow(&endpoint.events, endpoint.attach, &endpoint.topic, &connection_in, &token, deliver)
                .await;
        }));
        self.tasks.push(tokio::spawn(worker.run(self.token.clone())));
        self.progress.push(progress);
        Ok(())
    }

    /// Where each source is, in the order of the endpoints.
    pub fn progress(&self) -> &[watch::Receiver<Progress>] {
        &self.progress
    }

    /// Publishes what is waiting and stops, within a bounded time.
    pub async fn shutdown(mut self) {
        self.token.cancel();
        let tasks = std::mem::take(&mut self.tasks);
        let all = async {
            for task in tasks {
                // A panic in a task was logged by the runtime; there is nothing left to stop.
                let _ = task.await;
            }
        };
        if timeout(SHUTDOWN_TIMEOUT, all).await.is_err() {
            tracing::warn!(
                "the shim did not stop in time; what was waiting is lost and will be re-sent as a snapshot"
            );
        }
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        self.token.cancel();
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

// === impl Progress ===

impl Progress {
    fn of(source: &Source, model: &str) -> Self {
        Self {
            source: source.id(),
            model: model.to_owned(),
            adapter: source.adapter().map(Adapter::name),
            connection: Connection::default(),
            known_connection: 0,
            engine_seq: source.last_engine_seq(),
            handled: 0,
            overflow: 0,
            bad_frames: 0,
            position: source.position(),
            pending: source.has_frames(),
            frames: 0,
            frame_bytes: 0,
            publish_failures: 0,
            health: source.health(),
            blocks: source.mirror().visible_blocks(),
            counts: source.counts().clone(),
            mirror: source.mirror_counts(),
            untracked_pages: source.untracked_pages(),
            replays: (0, 0),
        }
    }

    /// Messages that arrived and were dealt with in any way, dropped ones included.
    pub fn arrived(&self) -> u64 {
        self.handled + self.overflow + self.bad_frames
    }
}

// === impl Intake ===

impl Intake {
    /// Called by the reading task for each message; never waits.
    fn deliver(&self, queue: &mpsc::Sender<Inbound>, connection: u64, frames: &[Bytes]) {
        let Ok((seq, payload)) = zmq::parse_live(frames) else {
            self.bad_frames.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let size = payload.len();
        let room = self.queued_bytes.load(Ordering::Relaxed) + size <= QUEUE_BYTES;
        if !room || queue.try_send(Inbound { connection, seq, payload: payload.clone() }).is_err() {
            self.overflow.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.queued_bytes.fetch_add(size, Ordering::Relaxed);
    }
}

// === impl Worker ===

impl Worker {
    async fn run(mut self, token: CancellationToken) {
        let mut heartbeat = interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.listen_for_control().await;
            let flush_at = self.flush_at;
            tokio::select! {
                () = token.cancelled() => break,
                message = self.queue.recv() => {
                    // The reading task ends only at shutdown.
                    let Some(message) = message else { break };
                    self.take_turn(message, &token).await;
                }
                changed = self.connection.changed() => if changed.is_err() { break },
                request = next_request(&mut self.control) => self.on_control(request),
                () = sleep_until(flush_at.unwrap_or_else(Instant::now)), if flush_at.is_some() => {
                    self.flush(false).await;
                }
                _ = heartbeat.tick() => self.flush(true).await,
            }
            // With the queue empty, nothing from before the new connection is left to apply first.
            let connection = *self.connection.borrow();
            if connection.up && connection.number > self.known_connection && self.queue.is_empty() {
                self.on_connected(connection.number, &token).await;
            }
            if self.source.has_frames() {
                if self.source.wants_flush() {
                    self.flush(false).await;
                } else if self.flush_at.is_none() {
                    self.flush_at = Some(Instant::now() + LINGER);
                }
            }
            self.report();
        }
        while let Ok(message) = self.queue.try_recv() {
            self.source.live(message.seq, &message.payload, true);
        }
        self.flush(false).await;
        self.report();
    }

    /// Applies a message and those right behind it.
    async fn take_turn(&mut self, first: Inbound, token: &CancellationToken) {
        let mut message = first;
        for turn in 1..=TURN_MESSAGES {
            self.intake.queued_bytes.fetch_sub(message.payload.len(), Ordering::Relaxed);
            if message.connection > self.known_connection {
                self.on_connected(message.connection, token).await;
            }
            if let Live::Replay { from } = self.source.live(message.seq, &message.payload, false) {
                self.replay(from, token).await;
                self.source.live(message.seq, &message.payload, true);
            }
            self.handled += 1;
            if self.source.wants_flush() {
                self.flush(false).await;
            }
            if turn == TURN_MESSAGES {
                return;
            }
            match self.queue.try_recv() {
                Ok(next) => message = next,
                Err(_) => return,
            }
        }
    }

    async fn on_connected(&mut self, number: u64, token: &CancellationToken) {
        self.known_connection = number;
        tracing::info!(
            source = %self.source.id(), endpoint = self.endpoint.events, connection = number,
            "connected to the engine's event socket"
        );
        if let Some(from) = self.source.connected() {
            self.replay(from, token).await;
        }
    }

    async fn replay(&mut self, from: u64, token: &CancellationToken) {
        let Some(endpoint) = &self.endpoint.replay else { return };
        let Some(replay) = token.run_until_cancelled(zmq::replay(endpoint, from)).await else { return };
        self.replays.0 += 1;
        if replay.answered {
            tracing::info!(source = %self.source.id(), from, messages = replay.messages.len(), "replayed from the engine");
            self.source.replayed(from, &replay.messages);
        } else {
            self.replays.1 += 1;
            tracing::warn!(source = %self.source.id(), endpoint, from, "the engine's replay socket did not answer");
        }
    }

    /// Listens where requests to this source arrive; the name may become known late.
    async fn listen_for_control(&mut self) {
        let id = self.source.id();
        if self.control.as_ref().is_some_and(|(known, _)| *known == id) {
            return;
        }
        match self.bus.subscribe(self.subjects.control(&id)).await {
            Ok(subscription) => self.control = Some((id, subscription)),
            Err(error) => {
                self.control = None;
                self.publish_failures += 1;
                self.warn_publish(&error.to_string());
            }
        }
    }

    fn on_control(&mut self, request: Option<()>) {
        if request.is_none() {
            self.control = None;
            return;
        }
        let now = Instant::now();
        if self.last_snapshot.is_none_or(|last| now.duration_since(last) >= SNAPSHOT_SPACING) {
            self.last_snapshot = Some(now);
            tracing::info!(source = %self.source.id(), blocks = self.source.mirror().visible_blocks(), "asked for a snapshot");
            self.source.request_snapshot();
        }
    }

    async fn flush(&mut self, heartbeat: bool) {
        self.flush_at = None;
        let frames = match self.source.take_frames(wall_clock_ns(), heartbeat) {
            Ok(frames) => frames,
            Err(error) => {
                // What was taken is gone; only a snapshot can say it again.
                self.source.request_snapshot();
                self.publish_failures += 1;
                self.warn_publish(&error.to_string());
                self.flush_at = Some(Instant::now() + PUBLISH_BACKOFF);
                return;
            }
        };
        let Some(scope) = self.source.scope() else { return };
        let subject = self.subjects.events(scope.token(), Shard::All, &self.source.id());
        for frame in frames {
            let bytes = frame.len() as u64;
            if let Err(error) = self.bus.publish(subject.clone(), frame).await {
                self.source.request_snapshot();
                self.publish_failures += 1;
                self.warn_publish(&error.to_string());
                self.flush_at = Some(Instant::now() + PUBLISH_BACKOFF);
                return;
            }
            self.frames += 1;
            self.frame_bytes += bytes;
        }
    }

    fn warn_publish(&mut self, error: &str) {
        if let Some(count) = self.bursts.publish.note(self.publish_failures, Instant::now()) {
            tracing::warn!(source = %self.source.id(), count, error, "publishing failed; a snapshot will follow");
        }
    }

    fn report(&mut self) {
        let progress = Progress {
            connection: *self.connection.borrow(),
            known_connection: self.known_connection,
            handled: self.handled,
            overflow: self.intake.overflow.load(Ordering::Relaxed),
            bad_frames: self.intake.bad_frames.load(Ordering::Relaxed),
            frames: self.frames,
            frame_bytes: self.frame_bytes,
            publish_failures: self.publish_failures,
            replays: self.replays,
            ..Progress::of(&self.source, &self.model)
        };
        self.bursts.log(&progress);
        self.progress.send_replace(progress);
    }
}

// === impl Bursts ===

impl Bursts {
    fn log(&mut self, progress: &Progress) {
        let (now, source) = (Instant::now(), &progress.source);
        let undecodable: u64 = progress.counts.undecodable.iter().map(|(_, n)| n).sum();
        if let Some(count) = self.undecodable.note(undecodable, now) {
            let reasons = &progress.counts.undecodable;
            tracing::warn!(%source, count, ?reasons, "engine messages could not be decoded and were dropped");
        }
        if let Some(count) = self.frames.note(progress.bad_frames, now) {
            tracing::warn!(%source, count, "messages without [topic, sequence, payload] were dropped; is this the event socket?");
        }
        if let Some(count) = self.overflow.note(progress.overflow, now) {
            tracing::warn!(%source, count, "the intake queue was full; the gap will be repaired");
        }
        if let Some(count) = self.losses.note(progress.counts.losses, now) {
            tracing::warn!(%source, count, "engine events were lost for good; the source starts over and under-reports");
        }
        if let Some(count) = self.over_limit.note(progress.mirror.over_limit, now) {
            tracing::warn!(%source, count, "a bound of the mirror was reached; some blocks are not tracked");
        }
        if let Some(count) = self.block_size.note(progress.mirror.block_size_mismatch, now) {
            tracing::warn!(%source, count, "the engine's block size is not the scope's; these blocks do not count");
        }
    }
}

/// The next request, or `None` when the subscription ended; waits for ever without one.
async fn next_request(control: &mut Option<(SourceId, Subscription)>) -> Option<()> {
    match control {
        Some((_, subscription)) => subscription.recv().await.map(|_| ()),
        None => std::future::pending().await,
    }
}

fn wall_clock_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(seq: u64, bytes: usize) -> Vec<Bytes> {
        vec![Bytes::new(), Bytes::copy_from_slice(&seq.to_be_bytes()), Bytes::from(vec![0; bytes])]
    }

    #[test]
    fn a_full_queue_never_makes_the_reader_wait_and_what_is_dropped_is_counted() {
        let (queue_in, mut queue) = mpsc::channel(2);
        let intake = Intake::default();
        (0..5).for_each(|seq| intake.deliver(&queue_in, 1, &message(seq, 10)));
        assert_eq!(intake.overflow.load(Ordering::Relaxed), 3);
        // What is in the queue is in order, so the loss shows as a gap at the next message.
        let seqs: Vec<u64> =
            std::iter::from_fn(|| queue.try_recv().ok()).map(|message| message.seq).collect();
        assert_eq!(seqs, [0, 1]);
    }

    #[test]
    fn queued_bytes_are_bounded_too() {
        let (queue_in, _queue) = mpsc::channel(16);
        let intake = Intake::default();
        intake.queued_bytes.store(QUEUE_BYTES - 15, Ordering::Relaxed);
        (0..2).for_each(|seq| intake.deliver(&queue_in, 1, &message(seq, 10)));
        assert_eq!(intake.overflow.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn frames_that_are_no_message_are_counted_and_dropped() {
        let (queue_in, mut queue) = mpsc::channel(16);
        let intake = Intake::default();
        intake.deliver(&queue_in, 1, &[Bytes::new()]);
        intake.deliver(&queue_in, 1, &[Bytes::new(), Bytes::from_static(b"short"), Bytes::new()]);
        assert_eq!(intake.bad_frames.load(Ordering::Relaxed), 2);
        assert!(queue.try_recv().is_err());
    }
}
