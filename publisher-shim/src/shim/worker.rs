//! The task of one source: applies what the engine says, publishes, answers.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use kvatlas_bus::{Bus, BusMessage, Subscription};
use kvatlas_proto::SourceId;
use kvatlas_proto::subject::Subjects;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use xxhash_rust::xxh3::xxh3_64;

use super::intake::{Inbound, Intake};
use super::requests::Desk;
use super::state_file::{StateCounts, StateFile};
use super::{EndpointConfig, HEARTBEAT, LINGER, Progress, STATE_INTERVAL};
use crate::burst::Burst;
use crate::source::{Live, Outgoing, Source, StateMark};
use crate::zmq::{self, Connection};

/// Shortest time between two heartbeats that somebody asked for.
const HELLO_SPACING: Duration = Duration::from_millis(200);
/// Longest wait before a heartbeat that somebody asked for, so that a fleet does not answer in one instant.
const HELLO_JITTER: Duration = Duration::from_millis(50);
/// Pause after a frame could not be encoded.
const ENCODE_BACKOFF: Duration = Duration::from_millis(200);
/// Pause before another attempt to listen for requests.
const SUBSCRIBE_BACKOFF: Duration = Duration::from_secs(1);
/// Pause between attempts to have a restored state proved by an engine that does not answer.
const PROVE_SPACING: Duration = Duration::from_secs(5);
/// Messages applied before other events (timers, requests) get a turn.
const TURN_MESSAGES: usize = 256;

/// What a source task needs from outside.
pub(super) struct Parts {
    pub(super) endpoint: EndpointConfig,
    pub(super) model: String,
    pub(super) source: Source,
    pub(super) state_file: Option<StateFile>,
    pub(super) state: StateCounts,
    pub(super) subjects: Subjects,
    pub(super) bus: Arc<dyn Bus>,
    pub(super) intake: Arc<Intake>,
    pub(super) queue: mpsc::Receiver<Inbound>,
    pub(super) connection: watch::Receiver<Connection>,
    pub(super) progress: watch::Sender<Progress>,
}

/// The source task's state.
pub(super) struct Worker {
    parts: Parts,
    /// The connection that the source knows about.
    known_connection: u64,
    control: Option<(SourceId, Subscription)>,
    hello: Option<Subscription>,
    /// No attempt to listen before this.
    listen_at: Instant,
    desk: Desk,
    flush_at: Option<Instant>,
    last_heartbeat: Instant,
    heartbeat_at: Instant,
    /// Where the source was when its state was saved.
    saved: Option<StateMark>,
    save_at: Instant,
    saving: Option<JoinHandle<io::Result<u64>>>,
    /// No attempt to have a restored state proved before this.
    prove_at: Instant,
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
    requests: Burst,
    save: Burst,
    shards: Burst,
}

// === impl Worker ===

impl Worker {
    pub(super) fn new(parts: Parts) -> Self {
        let now = Instant::now();
        let desk = Desk::new(parts.source.partition());
        Self {
            parts,
            known_connection: 0,
            control: None,
            hello: None,
            listen_at: now,
            desk,
            flush_at: None,
            last_heartbeat: now,
            heartbeat_at: now,
            saved: None,
            save_at: now + STATE_INTERVAL,
            saving: None,
            prove_at: now + PROVE_SPACING,
            handled: 0,
            frames: 0,
            frame_bytes: 0,
            publish_failures: 0,
            replays: (0, 0),
            bursts: Bursts::default(),
        }
    }

    pub(super) async fn run(mut self, token: CancellationToken) {
        loop {
            self.listen().await;
            let flush_at = self.flush_at;
            tokio::select! {
                () = token.cancelled() => break,
                message = self.parts.queue.recv() => {
                    // The reading task ends only at shutdown.
                    let Some(message) = message else { break };
                    self.take_turn(message, &token).await;
                }
                changed = self.parts.connection.changed() => if changed.is_err() { break },
                message = next_request(&mut self.control) => self.on_request(message),
                message = next_hello(&mut self.hello) => self.on_hello(message.as_ref()),
                () = std::future::ready(()), if self.desk.is_busy() => self.answer_turn().await,
                () = sleep_until(flush_at.unwrap_or_else(Instant::now)), if flush_at.is_some() => {
                    self.flush(false).await;
                }
                () = sleep_until(self.heartbeat_at) => self.flush(true).await,
                written = written(&mut self.saving) => self.on_written(written),
                () = sleep_until(self.save_at), if self.saving.is_none() => self.save(),
                () = sleep_until(self.prove_at), if self.parts.source.is_unproved() => self.prove(&token).await,
            }
            // With the queue empty, nothing from before the new connection is left to apply first.
            let connection = *self.parts.connection.borrow();
            if connection.up && connection.number > self.known_connection && self.parts.queue.is_empty() {
                self.on_connected(connection.number, &token).await;
            }
            if self.parts.source.has_frames() {
                if self.parts.source.wants_flush() {
                    self.flush(false).await;
                } else if self.flush_at.is_none() {
                    self.flush_at = Some(Instant::now() + LINGER);
                }
            }
            self.report();
        }
        while let Ok(message) = self.parts.queue.try_recv() {
            // What would need a replay is left for the next life of the shim.
            if self.parts.source.live(message.seq, &message.payload, false) != Live::Done {
                break;
            }
        }
        self.flush(true).await;
        if self.saving.is_some() {
            let written = written(&mut self.saving).await;
            self.on_written(written);
        }
        self.save();
        if self.saving.is_some() {
            let written = written(&mut self.saving).await;
            self.on_written(written);
        }
        self.report();
    }

    /// Begins to write the state, if it has changed. Only the disk is waited for elsewhere: the state is of one moment.
    fn save(&mut self) {
        self.save_at = Instant::now() + STATE_INTERVAL;
        let Some(file) = self.parts.state_file.clone() else { return };
        let mark = self.parts.source.mark();
        if self.saved == Some(mark) {
            return;
        }
        match self.parts.source.save() {
            Ok(None) => {}
            Ok(Some(bytes)) => {
                self.saved = Some(mark);
                self.saving = Some(tokio::task::spawn_blocking(move || {
                    file.write(&bytes).map(|()| bytes.len() as u64)
                }));
            }
            Err(error) => self.on_save_failed(&error.to_string()),
        }
    }

    fn on_written(&mut self, written: io::Result<u64>) {
        match written {
            Ok(bytes) => {
                self.parts.state.saves += 1;
                self.parts.state.bytes = bytes;
            }
            Err(error) => self.on_save_failed(&error.to_string()),
        }
    }

    fn on_save_failed(&mut self, error: &str) {
        self.saved = None;
        self.parts.state.failures += 1;
        if let Some(count) = self.bursts.save.note(self.parts.state.failures, Instant::now()) {
            let file = self.parts.state_file.as_ref().map(|file| file.path().display());
            tracing::warn!(
                source = %self.parts.source.id(), file = file.map(tracing::field::display), count, error,
                "the state could not be saved; the last one stays, and the next one is tried in time"
            );
        }
    }

    /// An engine that is idle and did not answer when the connection was made is asked again: until it answers, a restored state
    /// counts for nothing.
    async fn prove(&mut self, token: &CancellationToken) {
        let up = self.parts.connection.borrow().up;
        if up && let Some(from) = self.parts.source.connected() {
            self.replay(from, token).await;
        }
        self.prove_at = Instant::now() + PROVE_SPACING;
    }

    /// Applies a message and those right behind it.
    async fn take_turn(&mut self, first: Inbound, token: &CancellationToken) {
        let mut message = first;
        for turn in 1..=TURN_MESSAGES {
            self.parts.intake.queued_bytes.fetch_sub(message.payload.len(), Ordering::Relaxed);
            if message.connection > self.known_connection {
                self.on_connected(message.connection, token).await;
            }
            if let Live::Replay { from } = self.parts.source.live(message.seq, &message.payload, false) {
                self.replay(from, token).await;
                self.parts.source.live(message.seq, &message.payload, true);
            }
            self.handled += 1;
            if self.parts.source.wants_flush() {
                self.flush(false).await;
            }
            if turn == TURN_MESSAGES {
                return;
            }
            match self.parts.queue.try_recv() {
                Ok(next) => message = next,
                Err(_) => return,
            }
        }
    }

    async fn on_connected(&mut self, number: u64, token: &CancellationToken) {
        self.known_connection = number;
        tracing::info!(
            source = %self.parts.source.id(), endpoint = self.parts.endpoint.events, connection = number,
            "connected to the engine's event socket"
        );
        if let Some(from) = self.parts.source.connected() {
            self.replay(from, token).await;
        }
    }

    async fn replay(&mut self, from: u64, token: &CancellationToken) {
        let Some(endpoint) = self.parts.endpoint.replay.clone() else { return };
        let mut asking = pin!(zmq::replay(&endpoint, from));
        // An engine may take seconds to answer; a source that is silent for so long would be taken for one that is gone.
        let replay = loop {
            tokio::select! {
                () = token.cancelled() => return,
                replay = &mut asking => break replay,
                () = sleep_until(self.heartbeat_at) => self.flush(true).await,
            }
        };
        self.replays.0 += 1;
        let source = self.parts.source.id();
        if replay.answered {
            tracing::info!(%source, from, messages = replay.messages.len(), "replayed from the engine");
            self.parts.source.replayed(from, &replay.messages);
        } else {
            self.replays.1 += 1;
            tracing::warn!(%source, endpoint, from, "the engine's replay socket did not answer");
        }
    }

    /// Listens where requests to this source arrive (its name may become known late), and where everybody is called.
    async fn listen(&mut self) {
        let id = self.parts.source.id();
        let known = self.control.as_ref().is_some_and(|(known, _)| *known == id);
        if (known && self.hello.is_some()) || Instant::now() < self.listen_at {
            return;
        }
        let (bus, subjects) = (self.parts.bus.clone(), &self.parts.subjects);
        let mut failure = None;
        if !known {
            let control = bus.subscribe(subjects.control(&id)).await.map_err(|error| failure = Some(error));
            self.control = control.ok().map(|subscription| (id, subscription));
        }
        if self.hello.is_none() {
            let hello = bus.subscribe(subjects.hello()).await;
            self.hello = hello.map_err(|error| failure = Some(error)).ok();
        }
        if let Some(error) = failure {
            self.listen_at = Instant::now() + SUBSCRIBE_BACKOFF;
            self.publish_failures += 1;
            self.warn_publish(&error.to_string());
        }
    }

    fn on_request(&mut self, message: Option<BusMessage>) {
        match message {
            Some(message) => self.desk.take(message, &self.parts.subjects, &self.parts.source.id()),
            None => self.control = None,
        }
    }

    fn on_hello(&mut self, message: Option<&BusMessage>) {
        let Some(message) = message else {
            self.hello = None;
            return;
        };
        self.desk.take_hello(&message.payload);
        self.parts.source.owe_heartbeats();
        let span = HELLO_JITTER.as_nanos() as u64;
        let seed = format!("{} {}", self.parts.source.id(), wall_clock_ns());
        self.hurry_heartbeat(Duration::from_nanos(xxh3_64(seed.as_bytes()) % span));
    }

    /// The next heartbeat comes after `wait`, unless one was sent just now or would come sooner anyway.
    fn hurry_heartbeat(&mut self, wait: Duration) {
        let at = (Instant::now() + wait).max(self.last_heartbeat + HELLO_SPACING);
        self.heartbeat_at = self.heartbeat_at.min(at);
    }

    /// Sends the next few frames of an answer, or begins the next answer.
    async fn answer_turn(&mut self) {
        if let Some(asked) = self.desk.next_request() {
            // An answer says what is held after the last published frame, so everything has to be published.
            self.flush(false).await;
            if asked.request.epoch != self.parts.source.epoch() {
                self.desk.counts.other_epoch += 1;
                self.parts.source.owe_heartbeat(asked.request.shard);
                self.hurry_heartbeat(Duration::ZERO);
                return;
            }
            match self.parts.source.answer(&asked.request) {
                Ok(frames) => {
                    tracing::debug!(
                        source = %self.parts.source.id(), reply = asked.reply, frames = frames.len(), "answering a request"
                    );
                    self.desk.begin(asked.reply, frames);
                }
                Err(error) => {
                    self.publish_failures += 1;
                    self.warn_publish(&error.to_string());
                }
            }
        }
        let Some((reply, frames)) = self.desk.next_turn() else { return };
        for frame in frames {
            self.publish(reply.clone(), frame).await;
        }
    }

    async fn flush(&mut self, heartbeat: bool) {
        self.flush_at = None;
        if heartbeat {
            self.last_heartbeat = Instant::now();
            self.heartbeat_at = self.last_heartbeat + HEARTBEAT;
        }
        let frames = match self.parts.source.take_frames(wall_clock_ns(), heartbeat) {
            Ok(frames) => frames,
            Err(error) => {
                self.publish_failures += 1;
                self.warn_publish(&error.to_string());
                self.flush_at = Some(Instant::now() + ENCODE_BACKOFF);
                return;
            }
        };
        let Some(scope) = self.parts.source.scope() else { return };
        let (scope, source) = (scope.token(), self.parts.source.id());
        for Outgoing { shard, frame } in frames {
            self.frame_bytes += frame.len() as u64;
            self.frames += 1;
            self.publish(self.parts.subjects.events(scope, shard, &source), frame).await;
        }
    }

    /// A frame that the bus refuses is lost like any other that does not arrive: whoever misses it asks for it.
    async fn publish(&mut self, subject: String, frame: Bytes) {
        if let Err(error) = self.parts.bus.publish(subject, frame).await {
            self.publish_failures += 1;
            self.warn_publish(&error.to_string());
        }
    }

    fn warn_publish(&mut self, error: &str) {
        if let Some(count) = self.bursts.publish.note(self.publish_failures, Instant::now()) {
            let source = self.parts.source.id();
            tracing::warn!(%source, count, error, "publishing failed; servers will ask for what they miss");
        }
    }

    fn report(&mut self) {
        let progress = Progress {
            connection: *self.parts.connection.borrow(),
            known_connection: self.known_connection,
            handled: self.handled,
            overflow: self.parts.intake.overflow.load(Ordering::Relaxed),
            bad_frames: self.parts.intake.bad_frames.load(Ordering::Relaxed),
            frames: self.frames,
            frame_bytes: self.frame_bytes,
            publish_failures: self.publish_failures,
            replays: self.replays,
            requests: self.desk.counts,
            state: self.parts.state,
            ..Progress::of(&self.parts.source, &self.parts.model)
        };
        self.bursts.log(&progress, self.desk.other_shards);
        self.parts.progress.send_replace(progress);
    }
}

// === impl Bursts ===

impl Bursts {
    fn log(&mut self, progress: &Progress, other_shards: Option<u16>) {
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
        if let (Some(theirs), ours) = (other_shards, progress.shards)
            && let Some(count) = self.shards.note(progress.requests.other_shards, now)
        {
            tracing::warn!(
                %source, count, ours, theirs,
                "somebody cuts the key space into another number of shards and will not find this source; --shards must be \
                 equal for every shim and server of the deployment"
            );
        }
        let refused = progress.requests.malformed + progress.requests.overflow;
        if let Some(count) = self.requests.note(refused, now) {
            tracing::warn!(%source, count, "requests to this source were dropped: not valid, or too many at once");
        }
    }
}

/// The next message from the control subject, or `None` when the subscription ended; waits for ever without one.
async fn next_request(control: &mut Option<(SourceId, Subscription)>) -> Option<BusMessage> {
    match control {
        Some((_, subscription)) => subscription.recv().await,
        None => std::future::pending().await,
    }
}

/// The same for the call to everybody.
async fn next_hello(hello: &mut Option<Subscription>) -> Option<BusMessage> {
    match hello {
        Some(subscription) => subscription.recv().await,
        None => std::future::pending().await,
    }
}

/// The outcome of the write that is under way; waits for ever without one.
async fn written(saving: &mut Option<JoinHandle<io::Result<u64>>>) -> io::Result<u64> {
    let Some(task) = saving else { return std::future::pending().await };
    let written = task.await.unwrap_or_else(|panic| Err(io::Error::other(panic)));
    *saving = None;
    written
}

pub(super) fn wall_clock_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}
