//! The way in: event frames from the bus into the index, requests for full states back out, and leases.
//!
//! Nothing here can be kept waiting by one source: a bad frame is dropped and counted, a request that cannot be sent
//! is dropped and counted and asked again at the next gap.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kvatlas_bus::{Bus, BusMessage, Subscription};
use kvatlas_proto::SourceId;
use kvatlas_proto::frame::{FrameHeader, FrameView, ParseFrameError};
use kvatlas_proto::subject::{Shard, Subject, Subjects};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio_util::sync::CancellationToken;

use crate::burst::BurstLimiter;
use crate::clock::Clock;
use crate::index::{Applied, Index, LimitReached};
use crate::metrics::{Metrics, ReasonLabel};
use crate::sources::{DegradedReason, Expiry, SourceState, Verdict};

/// Frames after which the reader lets other tasks of its thread run, however many are waiting.
const FRAMES_PER_TURN: usize = 32;
/// Requests for a full state that wait to be sent. Each source has at most one per second, so this covers a fleet that
/// is discovered at once; at the bound a request is dropped and the source's next frame asks again.
pub(crate) const RESYNC_QUEUE: usize = 4_096;
/// Time between two looks at the leases. Leases are tens of seconds, so a second late is nothing.
const TICK: Duration = Duration::from_secs(1);

/// Applies what the subscription delivers.
pub(crate) struct Ingest {
    pub(crate) index: Arc<Index>,
    pub(crate) subjects: Subjects,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) clock: Clock,
    pub(crate) resync: mpsc::Sender<SourceId>,
    pub(crate) log: IngestLog,
}

/// One limiter per kind of line.
#[derive(Default)]
pub(crate) struct IngestLog {
    bad: BurstLimiter,
    refused: BurstLimiter,
    resync: BurstLimiter,
}

/// A message on an event subject is not a frame that belongs there.
#[derive(Debug, thiserror::Error)]
enum BadFrameError {
    #[error(transparent)]
    Frame(#[from] ParseFrameError),
    #[error("subject is not an event subject of this deployment")]
    Subject,
    #[error("subject names another source or scope than the frame, which is of {source_id} in scope {scope}")]
    Mismatch { source_id: SourceId, scope: String },
    #[error("frame is of a part of its scope; this server takes in whole scopes only")]
    Sharded,
}

// === impl Ingest ===

impl Ingest {
    /// Reads until the bus is closed for good (false) or `stop` (true).
    pub(crate) async fn run(mut self, mut subscription: Subscription, stop: CancellationToken) -> bool {
        let mut turn = 0;
        loop {
            let message = tokio::select! {
                biased;
                () = stop.cancelled() => return true,
                message = subscription.recv() => message,
            };
            let Some(message) = message else { return false };
            self.take(&message);
            turn += 1;
            if turn >= FRAMES_PER_TURN {
                turn = 0;
                tokio::task::yield_now().await;
            }
        }
    }

    fn take(&mut self, message: &BusMessage) {
        let now_ms = self.clock.now_ms();
        let frame = match parse(&self.subjects, message) {
            Ok(frame) => frame,
            Err(error) => {
                // A publisher whose frame was damaged is asked for everything once its next frame shows the gap.
                self.metrics.frames_bad.get_or_create(&ReasonLabel { reason: error.reason() }).inc();
                if let Some(withheld) = self.log.bad.admit(now_ms) {
                    let (subject, bytes) = (&message.subject, message.payload.len());
                    tracing::warn!(%subject, bytes, %error, withheld, "dropped a bad event frame");
                }
                return;
            }
        };
        match self.index.apply(&frame, now_ms) {
            Ok(applied) => self.follow_up(frame.header(), &applied, now_ms),
            Err(refused) => {
                let reason = match refused {
                    LimitReached::Scopes { .. } => "scopes",
                    LimitReached::Sources { .. } => "sources",
                };
                self.metrics.frames_refused.get_or_create(&ReasonLabel { reason }).inc();
                if let Some(withheld) = self.log.refused.admit(now_ms) {
                    tracing::warn!(error = %refused, withheld, "refused an event frame");
                }
            }
        }
    }

    fn follow_up(&mut self, header: &FrameHeader, applied: &Applied, now_ms: u64) {
        let metrics = &self.metrics;
        metrics.blocks_stored.inc_by(applied.stored as u64);
        metrics.blocks_removed.inc_by(applied.removed as u64);
        metrics.blocks_refused.inc_by(applied.refused_blocks as u64);
        metrics.owners_refused.inc_by(applied.refused_owners as u64);
        match applied.verdict {
            Verdict::Apply => metrics.frames_applied.inc(),
            Verdict::NewEpoch => {
                metrics.epochs.inc();
                metrics.frames_applied.inc()
            }
            Verdict::Duplicate => metrics.frames_duplicate.inc(),
            Verdict::StaleEpoch => metrics.frames_stale_epoch.inc(),
            Verdict::Gap { .. } => metrics.frames_after_gap.inc(),
            Verdict::NewEpochGap { .. } => {
                metrics.epochs.inc();
                metrics.frames_after_gap.inc()
            }
        };
        let lost = SourceState::Degraded(DegradedReason::FramesLost);
        if applied.after == lost && applied.before != Some(lost) {
            metrics.gaps.inc();
        }
        if applied.before != Some(applied.after) {
            tracing::info!(
                scope = %header.scope,
                source = %header.source,
                epoch = header.epoch.0,
                seq = header.seq.0,
                state = applied.after.name(),
                reason = applied.after.degraded_reason(),
                "a source changed its state"
            );
        }
        if applied.request_resync {
            self.request_resync(header.source.clone(), now_ms);
        }
    }

    fn request_resync(&mut self, source: SourceId, now_ms: u64) {
        let Err(error) = self.resync.try_send(source) else { return };
        let (reason, source) = match error {
            TrySendError::Full(source) => ("queue_full", source),
            TrySendError::Closed(source) => ("stopping", source),
        };
        self.metrics.resync_failures.get_or_create(&ReasonLabel { reason }).inc();
        if let Some(withheld) = self.log.resync.admit(now_ms) {
            tracing::warn!(%source, reason, withheld, "a request for a source's full state was dropped");
        }
    }
}

fn parse<'a>(subjects: &Subjects, message: &'a BusMessage) -> Result<FrameView<'a>, BadFrameError> {
    let Ok(Subject::Events { scope, shard, source }) = subjects.parse(&message.subject) else {
        return Err(BadFrameError::Subject);
    };
    // A part has a sequence of its own: mixing parts would look like loss.
    if shard != Shard::All {
        return Err(BadFrameError::Sharded);
    }
    let frame = FrameView::parse(&message.payload)?;
    let header = frame.header();
    // Whoever may publish on one subject only must not be able to speak for another source or tenant.
    if header.source != source || header.scope.token() != scope {
        let (source_id, scope) = (header.source.clone(), header.scope.to_string());
        return Err(BadFrameError::Mismatch { source_id, scope });
    }
    Ok(frame)
}

// === impl BadFrameError ===

impl BadFrameError {
    /// Name for metric labels.
    fn reason(&self) -> &'static str {
        match self {
            Self::Subject => "subject",
            Self::Mismatch { .. } => "subject_mismatch",
            Self::Sharded => "sharded",
            Self::Frame(error) => match error {
                ParseFrameError::Size(_) => "size",
                ParseFrameError::Magic => "magic",
                ParseFrameError::Version(_) => "version",
                ParseFrameError::Checksum => "checksum",
                ParseFrameError::Archive(_) => "archive",
                ParseFrameError::Scope(_) => "scope",
                ParseFrameError::Instance(_) => "instance",
                ParseFrameError::Unknown { .. } => "unknown_value",
                ParseFrameError::Inconsistent(_) => "inconsistent",
            },
        }
    }
}

/// Sends the queued requests. Apart from the reader, because publishing may wait and reading must not.
pub(crate) async fn send_resyncs(
    bus: Arc<dyn Bus>,
    subjects: Subjects,
    metrics: Arc<Metrics>,
    clock: Clock,
    mut requests: mpsc::Receiver<SourceId>,
    stop: CancellationToken,
) {
    let mut log = BurstLimiter::default();
    loop {
        let source = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            source = requests.recv() => source,
        };
        let Some(source) = source else { return };
        // The subject says all: an empty payload asks for the full state in a new epoch.
        let sent = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            sent = bus.publish(subjects.control(&source), Bytes::new()) => sent,
        };
        match sent {
            Ok(()) => {
                metrics.resync_requests.inc();
                tracing::debug!(%source, "asked a source for its full state");
            }
            Err(error) => {
                metrics.resync_failures.get_or_create(&ReasonLabel { reason: "bus" }).inc();
                if let Some(withheld) = log.admit(clock.now_ms()) {
                    tracing::warn!(%source, %error, withheld, "a source could not be asked for its full state");
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
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = interval.tick() => {}
        }
        for expired in index.tick(clock.now_ms()) {
            let reason = match expired.expiry {
                Expiry::Gone => "gone",
                Expiry::Dropped => "dropped",
            };
            metrics.sources_expired.get_or_create(&ReasonLabel { reason }).inc();
            tracing::info!(scope = %expired.scope, source = %expired.source, reason, "a silent source expired");
        }
    }
}
