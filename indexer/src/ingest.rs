//! The way in: event frames and answers from the bus into the index, questions back out, and leases.
//!
//! Nothing here can be kept waiting by one source: a bad frame is dropped and counted, a question that cannot be sent
//! is dropped and counted and asked again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::{BoxStream, SelectAll};
use kvatlas_bus::{Bus, BusMessage, Subscription};
use kvatlas_proto::frame::{FrameHeader, FramePart, FrameView, ParseFrameError};
use kvatlas_proto::request::{Request, Want};
use kvatlas_proto::sealed::OpenError;
use kvatlas_proto::subject::{Asker, Subject, Subjects};
use kvatlas_proto::{Partition, ShardId, SourceId};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::burst::BurstLimiter;
use crate::clock::Clock;
use crate::index::{Applied, Index, LimitReached};
use crate::metrics::{KindLabel, Metrics, ReasonLabel};
use crate::sources::{Expiry, SourceState};

/// Frames after which the reader lets other tasks of its thread run, however many are waiting.
const FRAMES_PER_TURN: usize = 32;
/// Answers that are taken in, if they are here already, before it is asked who owes one: 64 MiB of pieces.
const ANSWERS_BEFORE_ASKING: usize = 1_024;
/// Questions that wait to be sent. At the bound a question is dropped, and asked again after its wait.
pub(crate) const REQUEST_QUEUE: usize = 1_024;
/// Changes of what is ours that wait; each is a step of a change of servers.
pub(crate) const OWNED_QUEUE: usize = 8;
/// Time between two looks at sources that may have to be asked, while there are any.
const POLL: Duration = Duration::from_millis(10);
/// Time between two looks at the leases. Leases are tens of seconds, so a second late is nothing.
const TICK: Duration = Duration::from_secs(1);

/// Applies what the subscription delivers.
pub(crate) struct Ingest {
    pub(crate) index: Arc<Index>,
    pub(crate) subjects: Subjects,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) clock: Clock,
    pub(crate) requests: mpsc::Sender<(SourceId, Request)>,
    pub(crate) log: IngestLog,
}

/// What is to be taken in from now on.
pub(crate) struct Owned {
    /// All shards that are ours.
    pub(crate) shards: Vec<ShardId>,
    /// The events of those that were not ours before.
    pub(crate) subscriptions: Vec<TaggedSubscription>,
}

/// The events of one shard.
pub(crate) struct TaggedSubscription {
    pub(crate) shard: ShardId,
    pub(crate) events: Subscription,
}

/// The events of all shards that are ours, as they come.
struct Events {
    streams: SelectAll<BoxStream<'static, BusMessage>>,
    ends: HashMap<ShardId, CancellationToken>,
}

/// Where frames come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// From the event subjects.
    Events,
    /// From our subject for answers.
    Replies,
}

/// One limiter per kind of line.
#[derive(Default)]
pub(crate) struct IngestLog {
    bad: BurstLimiter,
    refused: BurstLimiter,
    requests: BurstLimiter,
    diverged: BurstLimiter,
}

/// A message on an event subject is not a frame that belongs there.
#[derive(Debug, thiserror::Error)]
enum BadFrameError {
    #[error(transparent)]
    Frame(#[from] ParseFrameError),
    #[error("subject is not an event subject of this deployment")]
    Subject,
    #[error(
        "subject names another source, shard or scope than the frame, which is of {source_id} in scope {scope}"
    )]
    Mismatch { source_id: SourceId, scope: String },
    #[error(
        "its publisher cuts the key space into {theirs} shards and this server into {ours}: give all shims and servers of a \
         deployment the same --shards"
    )]
    Partition { theirs: u16, ours: u16 },
    #[error("an answer to a question came as an event")]
    Unasked,
}

// === impl Ingest ===

impl Ingest {
    /// Reads until the bus is closed for good (false) or `stop` (true). `owned` says what is ours, each time that changes.
    pub(crate) async fn run(
        mut self,
        mut owned: mpsc::Receiver<Owned>,
        mut replies: Subscription,
        stop: CancellationToken,
    ) -> bool {
        let mut events = Events { streams: SelectAll::new(), ends: HashMap::new() };
        let mut turn = 0;
        let mut poll = tokio::time::interval(POLL);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let troubled = self.index.is_troubled();
            // Fair between the two: behind a large transfer of one source, changes of the others would go stale.
            let next = async {
                tokio::select! {
                    message = replies.recv() => (Origin::Replies, message),
                    message = events.streams.next(), if !events.streams.is_empty() => (Origin::Events, message),
                }
            };
            let next = tokio::select! {
                biased;
                () = stop.cancelled() => return true,
                Some(owned) = owned.recv() => {
                    self.index.own(&owned.shards);
                    events.own(owned);
                    continue;
                }
                _ = poll.tick(), if troubled => None,
                next = next => Some(next),
            };
            let Some((origin, message)) = next else {
                // Applying one answer can take so long that others wait here unread: their senders are not late.
                for _ in 0..ANSWERS_BEFORE_ASKING {
                    let Ok(message) = replies.try_recv() else { break };
                    self.take(&message, Origin::Replies);
                }
                self.ask();
                continue;
            };
            let Some(message) = message else {
                // Without shards there are no events; with some, they end with the bus only.
                if origin == Origin::Events && events.ends.is_empty() {
                    continue;
                }
                return false;
            };
            self.take(&message, origin);
            // A question that is due at once is not kept waiting for the next look.
            if !troubled && self.index.is_troubled() {
                self.ask();
            }
            turn += 1;
            if turn >= FRAMES_PER_TURN {
                turn = 0;
                tokio::task::yield_now().await;
            }
        }
    }

    fn take(&mut self, message: &BusMessage, origin: Origin) {
        let now_ms = self.clock.now_ms();
        let frame = match parse(&self.subjects, self.index.partition(), message, origin) {
            Ok(frame) => frame,
            Err(error) => {
                // A frame that was damaged is asked for once the next one shows the gap.
                self.metrics.frames_bad.get_or_create(&ReasonLabel { reason: error.reason() }).inc();
                if let Some(withheld) = self.log.bad.admit(now_ms) {
                    let (subject, bytes) = (&message.subject, message.payload.len());
                    tracing::warn!(%subject, bytes, %error, withheld, "dropped a bad event frame");
                }
                return;
            }
        };
        if origin == Origin::Replies {
            self.metrics.reply_bytes.inc_by(message.payload.len() as u64);
            if let Some(applied) = self.index.on_reply(&frame, &message.payload, now_ms) {
                self.follow_up(frame.header(), &applied, now_ms);
            }
            return;
        }
        match self.index.apply(&frame, &message.payload, now_ms) {
            Ok(applied) => self.follow_up(frame.header(), &applied, now_ms),
            Err(refused) => {
                let reason = match refused {
                    LimitReached::Scopes { .. } => "scopes",
                    LimitReached::Sources { .. } => "sources",
                    // What was on its way when the shard was given up.
                    LimitReached::Shard { .. } => "not_owned",
                };
                self.metrics.frames_refused.get_or_create(&ReasonLabel { reason }).inc();
                if let Some(withheld) = self.log.refused.admit(now_ms) {
                    tracing::warn!(error = %refused, withheld, "refused an event frame");
                }
            }
        }
    }

    fn follow_up(&mut self, header: &FrameHeader, applied: &Applied, now_ms: u64) {
        self.metrics.count_applied(applied);
        if applied.compared == Some(false) && applied.before != Some(SourceState::Syncing) {
            self.metrics.divergences.inc();
            if let Some(withheld) = self.log.diverged.admit(now_ms) {
                tracing::warn!(
                    scope = %header.scope,
                    source = %header.source,
                    epoch = header.epoch.0,
                    seq = header.seq.0,
                    withheld,
                    "a source's blocks here are not what its publisher says; the difference is asked for"
                );
            }
        }
        if applied.before != Some(applied.after) {
            // Every heartbeat that finds nothing wrong would be a line, and so would every gap of a lossy network.
            tracing::debug!(
                scope = %header.scope,
                source = %header.source,
                epoch = header.epoch.0,
                seq = header.seq.0,
                state = applied.after.name(),
                reason = applied.after.degraded_reason(),
                "a source changed its state"
            );
        }
    }

    /// Asks publishers what is due to be asked.
    fn ask(&mut self) {
        let now_ms = self.clock.now_ms();
        for (source, request) in self.index.poll(now_ms) {
            let Err(error) = self.requests.try_send((source, request)) else { continue };
            let (reason, (source, _)) = match error {
                TrySendError::Full(unsent) => ("queue_full", unsent),
                TrySendError::Closed(unsent) => ("stopping", unsent),
            };
            self.metrics.request_failures.get_or_create(&ReasonLabel { reason }).inc();
            if let Some(withheld) = self.log.requests.admit(now_ms) {
                tracing::warn!(%source, reason, withheld, "a question to a publisher was dropped");
            }
        }
    }
}

fn parse<'a>(
    subjects: &Subjects,
    partition: Partition,
    message: &'a BusMessage,
    origin: Origin,
) -> Result<FrameView<'a>, BadFrameError> {
    let (place, source) = match (subjects.parse(&message.subject), origin) {
        // Each shard has a sequence of its own: mixing them would look like loss.
        (Ok(Subject::Events { shard, .. }), Origin::Events) if shard.of() != partition.shards() => {
            return Err(BadFrameError::Partition { theirs: shard.of(), ours: partition.shards() });
        }
        (Ok(Subject::Events { scope, shard, source }), Origin::Events) => (Some((scope, shard)), source),
        (Ok(Subject::Reply { source, .. }), Origin::Replies) => (None, source),
        _ => return Err(BadFrameError::Subject),
    };
    let frame = FrameView::parse(&message.payload)?;
    let header = frame.header();
    let answers = matches!(header.part, FramePart::Repair | FramePart::Unavailable);
    if answers && origin == Origin::Events {
        return Err(BadFrameError::Unasked);
    }
    // Whoever may publish on one subject only must not be able to speak for another source or tenant.
    if header.source != source || place.is_some_and(|place| (header.scope.token(), header.shard) != place) {
        let (source_id, scope) = (header.source.clone(), header.scope.to_string());
        return Err(BadFrameError::Mismatch { source_id, scope });
    }
    Ok(frame)
}

// === impl Events ===

impl Events {
    fn own(&mut self, owned: Owned) {
        self.ends.retain(|shard, end| {
            let keep = owned.shards.contains(shard);
            if !keep {
                end.cancel();
            }
            keep
        });
        for TaggedSubscription { shard, events } in owned.subscriptions {
            let end = CancellationToken::new();
            self.streams.push(events.take_until(end.clone().cancelled_owned()).boxed());
            self.ends.insert(shard, end);
        }
    }
}

// === impl BadFrameError ===

impl BadFrameError {
    /// Name for metric labels.
    fn reason(&self) -> &'static str {
        match self {
            Self::Subject => "subject",
            Self::Mismatch { .. } => "subject_mismatch",
            Self::Partition { .. } => "partition",
            Self::Unasked => "unasked",
            Self::Frame(error) => match error {
                ParseFrameError::Size(_) | ParseFrameError::Sealed(OpenError::Size { .. }) => "size",
                ParseFrameError::Sealed(OpenError::Magic(_)) => "magic",
                ParseFrameError::Sealed(OpenError::Version { .. }) => "version",
                ParseFrameError::Sealed(OpenError::Checksum(_)) => "checksum",
                ParseFrameError::Archive(_) => "archive",
                ParseFrameError::Scope(_) => "scope",
                ParseFrameError::Instance(_) => "instance",
                ParseFrameError::Unknown { .. } => "unknown_value",
                ParseFrameError::Inconsistent(_) => "inconsistent",
            },
        }
    }
}

/// Sends the queued questions. Apart from the reader, because publishing may wait and reading must not.
pub(crate) async fn send_requests(
    bus: Arc<dyn Bus>,
    subjects: Subjects,
    asker: Asker,
    metrics: Arc<Metrics>,
    clock: Clock,
    mut requests: mpsc::Receiver<(SourceId, Request)>,
    stop: CancellationToken,
) {
    let mut log = BurstLimiter::default();
    loop {
        let next = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            next = requests.recv() => next,
        };
        let Some((source, request)) = next else { return };
        let kind = match request.want {
            Want::Frames(_) => "frames",
            Want::State(_) => "state",
        };
        let sent = async {
            let payload = request.encode().map_err(|error| ("encoding", error.to_string()))?;
            let (subject, reply) = (subjects.control(&source), Some(subjects.reply(&asker, &source)));
            let message = BusMessage { subject, reply, payload: Bytes::from(payload) };
            bus.send(message).await.map_err(|error| ("bus", error.to_string()))
        };
        let sent = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            sent = sent => sent,
        };
        match sent {
            Ok(()) => {
                metrics.requests.get_or_create(&KindLabel { kind }).inc();
                tracing::debug!(%source, kind, "asked a publisher");
            }
            Err((reason, error)) => {
                metrics.request_failures.get_or_create(&ReasonLabel { reason }).inc();
                if let Some(withheld) = log.admit(clock.now_ms()) {
                    tracing::warn!(%source, kind, error, withheld, "a publisher could not be asked");
                }
            }
        }
    }
}

/// Ends leases until `stop`.
pub(crate) async fn end_leases(
    index: Arc<Index>,
    metrics: Arc<Metrics>,
    clock: Clock,
    stop: CancellationToken,
) {
    let mut interval = tokio::time::interval(TICK);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = interval.tick() => {}
        }
        for expired in index.tick(clock.now_ms()) {
            let reason = match expired.expiry {
                Expiry::Silent => "silent",
                Expiry::Gone => "gone",
                Expiry::Dropped => "dropped",
            };
            metrics.sources_expired.get_or_create(&ReasonLabel { reason }).inc();
            tracing::info!(scope = %expired.scope, source = %expired.source, reason, "a silent source expired");
        }
    }
}
