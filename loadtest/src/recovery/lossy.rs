//! A bus that loses messages on purpose, and sees every one of them before.
//!
//! It stands between shims and the real bus: a share of what they send (frames, answers) is dropped, and a share of what
//! they are to receive (requests, calls). Which ones, a seed decides. Everything is observed before it is dropped, so the
//! rest of the rig knows what was published ([`Follower`]) and what an index had to notice ([`Losses`]).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use kvatlas_bus::{Bus, BusMessage, BusStats, FlushError, PublishError, SubscribeError, Subscription};
use kvatlas_proto::SourceId;
use kvatlas_proto::frame::FrameView;
use kvatlas_proto::request::{Request, Want};
use kvatlas_proto::subject::{Subject, Subjects};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;

use super::clock::Clock;
use super::follower::Follower;

/// Shares are counted in millionths.
const MILLION: u32 = 1_000_000;

/// A bus with losses.
pub struct LossyBus {
    inner: Arc<dyn Bus>,
    shared: Arc<Shared>,
}

struct Shared {
    subjects: Subjects,
    clock: Clock,
    /// In millionths.
    loss: AtomicU32,
    random: Mutex<StdRng>,
    follower: Mutex<Follower>,
    losses: Mutex<Losses>,
}

/// What was lost, and what of it nobody has asked for yet.
#[derive(Debug, Default)]
pub struct Losses {
    counts: LossCounts,
    sources: BTreeMap<SourceId, Missing>,
}

#[derive(Debug, Default)]
struct Missing {
    epoch: u64,
    lost: BTreeSet<u64>,
    last_lost: Option<u64>,
}

/// Counters since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LossCounts {
    /// Event frames published.
    pub frames: u64,
    /// Their bytes.
    pub frame_bytes: u64,
    /// Of these, lost.
    pub lost_frames: u64,
    /// Their bytes.
    pub lost_bytes: u64,
    /// Stretches of consecutive lost frames of one source.
    pub gaps: u64,
    /// Frames of answers sent, lost ones included.
    pub answer_frames: u64,
    /// Their bytes.
    pub answer_bytes: u64,
    /// Of these frames, lost.
    pub lost_answer_frames: u64,
    /// Requests that arrived, lost ones included.
    pub requests: u64,
    /// Of these, requests for a state.
    pub state_requests: u64,
    /// Their bytes.
    pub request_bytes: u64,
    /// Of these, lost.
    pub lost_requests: u64,
}

// === impl LossyBus ===

impl LossyBus {
    /// Loses nothing until it is told to.
    pub fn new(inner: Arc<dyn Bus>, subjects: Subjects, clock: Clock, seed: u64) -> Self {
        let shared = Shared {
            subjects,
            clock,
            loss: AtomicU32::new(0),
            random: Mutex::new(StdRng::seed_from_u64(seed)),
            follower: Mutex::default(),
            losses: Mutex::default(),
        };
        Self { inner, shared: Arc::new(shared) }
    }

    /// Loses this share of the messages from now on, 0 to 1.
    pub fn lose(&self, share: f64) {
        self.shared.loss.store((share.clamp(0.0, 1.0) * f64::from(MILLION)) as u32, Ordering::Relaxed);
    }

    /// What the sources held.
    pub fn follower(&self) -> &Mutex<Follower> {
        &self.shared.follower
    }

    /// Counters since the start.
    pub fn counts(&self) -> LossCounts {
        self.shared.losses.lock().counts
    }

    /// Lost event frames that nobody has asked for.
    pub fn unnoticed(&self) -> usize {
        self.shared.losses.lock().sources.values().map(|missing| missing.lost.len()).sum()
    }
}

impl LossyBus {
    fn lossy(&self, messages: Subscription) -> Subscription {
        let shared = Arc::clone(&self.shared);
        Subscription::new(messages.filter(move |message| std::future::ready(!shared.loses_received(message))))
    }
}

#[async_trait]
impl Bus for LossyBus {
    async fn send(&self, message: BusMessage) -> Result<(), PublishError> {
        if self.shared.loses_sent(&message) {
            return Ok(());
        }
        self.inner.send(message).await
    }

    async fn subscribe(&self, filter: String) -> Result<Subscription, SubscribeError> {
        Ok(self.lossy(self.inner.subscribe(filter).await?))
    }

    async fn subscribe_group(&self, filter: String, group: String) -> Result<Subscription, SubscribeError> {
        Ok(self.lossy(self.inner.subscribe_group(filter, group).await?))
    }

    async fn flush(&self) -> Result<(), FlushError> {
        self.inner.flush().await
    }

    fn stats(&self) -> BusStats {
        self.inner.stats()
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

// === impl Shared ===

impl Shared {
    fn draws_loss(&self) -> bool {
        let loss = self.loss.load(Ordering::Relaxed);
        loss > 0 && self.random.lock().random_range(0..MILLION) < loss
    }

    fn loses_sent(&self, message: &BusMessage) -> bool {
        let lost = self.draws_loss();
        match self.subjects.parse(&message.subject) {
            Ok(Subject::Events { .. }) => {
                if let Ok(frame) = FrameView::parse(&message.payload) {
                    self.losses.lock().on_event(&frame, &message.payload, lost);
                    self.follower.lock().observe(&frame, self.clock.now_ms());
                }
            }
            Ok(Subject::Reply { .. }) => self.losses.lock().on_answer(&message.payload, lost),
            _ => {}
        }
        lost
    }

    fn loses_received(&self, message: &BusMessage) -> bool {
        let lost = self.draws_loss();
        if let Ok(Subject::Control { source }) = self.subjects.parse(&message.subject)
            && let Ok(request) = Request::parse(&message.payload)
        {
            self.losses.lock().on_request(&source, &request, message.payload.len(), lost);
        }
        lost
    }
}

// === impl Losses ===

impl Losses {
    fn on_event(&mut self, frame: &FrameView<'_>, payload: &Bytes, lost: bool) {
        let (header, bytes) = (frame.header(), payload.len() as u64);
        self.counts.frames += 1;
        self.counts.frame_bytes += bytes;
        let missing = self.sources.entry(header.source.clone()).or_default();
        if missing.epoch != header.epoch.0 {
            // What an epoch had to say does not count in the next one.
            *missing = Missing { epoch: header.epoch.0, ..Missing::default() };
        }
        if !lost {
            return;
        }
        self.counts.lost_frames += 1;
        self.counts.lost_bytes += bytes;
        let seq = header.seq.0;
        self.counts.gaps += u64::from(missing.last_lost.is_none_or(|last| last + 1 != seq));
        missing.last_lost = Some(seq);
        missing.lost.insert(seq);
    }

    fn on_answer(&mut self, payload: &Bytes, lost: bool) {
        self.counts.answer_frames += 1;
        self.counts.answer_bytes += payload.len() as u64;
        self.counts.lost_answer_frames += u64::from(lost);
    }

    fn on_request(&mut self, source: &SourceId, request: &Request, bytes: usize, lost: bool) {
        self.counts.requests += 1;
        self.counts.state_requests += u64::from(matches!(request.want, Want::State(_)));
        self.counts.request_bytes += bytes as u64;
        self.counts.lost_requests += u64::from(lost);
        let Some(missing) = self.sources.get_mut(source).filter(|missing| missing.epoch == request.epoch.0)
        else {
            return;
        };
        match &request.want {
            Want::State(_) => missing.lost.clear(),
            Want::Frames(ranges) => {
                let asked = |seq: u64| ranges.iter().any(|(first, last)| (first.0..=last.0).contains(&seq));
                missing.lost.retain(|seq| !asked(*seq));
            }
        }
    }
}

// === impl LossCounts ===

impl LossCounts {
    /// What was counted since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            frames: self.frames - earlier.frames,
            frame_bytes: self.frame_bytes - earlier.frame_bytes,
            lost_frames: self.lost_frames - earlier.lost_frames,
            lost_bytes: self.lost_bytes - earlier.lost_bytes,
            gaps: self.gaps - earlier.gaps,
            answer_frames: self.answer_frames - earlier.answer_frames,
            answer_bytes: self.answer_bytes - earlier.answer_bytes,
            lost_answer_frames: self.lost_answer_frames - earlier.lost_answer_frames,
            requests: self.requests - earlier.requests,
            state_requests: self.state_requests - earlier.state_requests,
            request_bytes: self.request_bytes - earlier.request_bytes,
            lost_requests: self.lost_requests - earlier.lost_requests,
        }
    }
}

#[cfg(test)]
mod tests {
    use kvatlas_bus::{InProcessBus, InProcessConfig};
    use kvatlas_proto::frame::{FrameHeader, FramePart, OpBuffer, SourceHealth};
    use kvatlas_proto::keys::KeyVariant;
    use kvatlas_proto::request::RequestId;
    use kvatlas_proto::{DpRank, Epoch, FrameSeq, InstanceId, Scope, ShardId};

    use super::*;

    fn source() -> SourceId {
        SourceId { instance: InstanceId::new("a:1").unwrap(), rank: DpRank(0) }
    }

    fn bus(seed: u64) -> LossyBus {
        let inner = Arc::new(InProcessBus::new(InProcessConfig::default()));
        LossyBus::new(inner, Subjects::default(), Clock::start(), seed)
    }

    async fn publish(bus: &LossyBus, seq: u64) {
        let scope = Scope::new("m", "", 16, 1).unwrap();
        let subject = Subjects::default().events(scope.token(), ShardId::WHOLE, &source());
        let header = FrameHeader {
            scope,
            source: source(),
            shard: ShardId::WHOLE,
            variant: KeyVariant::default(),
            epoch: Epoch(1),
            seq: FrameSeq(seq),
            part: if seq == 0 { FramePart::Start } else { FramePart::Live },
            health: SourceHealth::Exact,
            engine_time_ns: 0,
            owners: Vec::new(),
            digests: Vec::new(),
            reply: None,
        };
        bus.publish(subject, header.encode(&mut OpBuffer::default()).unwrap().into()).await.unwrap();
    }

    #[tokio::test]
    async fn a_seed_decides_what_is_lost_and_all_of_it_is_observed() {
        let mut lost = Vec::new();
        for seed in [1, 1, 2] {
            let bus = bus(seed);
            let mut events = bus.subscribe(Subjects::default().all_events()).await.unwrap();
            publish(&bus, 0).await;
            bus.lose(0.5);
            for seq in 1..=200 {
                publish(&bus, seq).await;
            }
            bus.lose(0.0);
            publish(&bus, 201).await;
            let counts = bus.counts();
            assert_eq!(counts.frames, 202);
            // What is received is lost too, but not any more.
            for _ in counts.lost_frames..counts.frames {
                tokio::time::timeout(std::time::Duration::from_secs(20), events.recv()).await.unwrap();
            }
            assert!(events.try_recv().is_err());
            assert!(counts.gaps > 20 && counts.gaps < counts.lost_frames, "{counts:?}");
            assert_eq!(bus.unnoticed() as u64, counts.lost_frames);
            assert_eq!(bus.follower().lock().sources(), 1);
            lost.push(counts.lost_frames);
        }
        assert_eq!(lost[0], lost[1]);
        assert_ne!(lost[0], lost[2]);
    }

    #[tokio::test]
    async fn what_was_asked_for_is_not_unnoticed_even_if_the_request_is_lost() {
        let bus = bus(1);
        let mut control = bus.subscribe(Subjects::default().control(&source())).await.unwrap();
        publish(&bus, 0).await;
        bus.lose(1.0);
        for seq in 1..=9 {
            publish(&bus, seq).await;
        }
        assert_eq!((bus.unnoticed(), bus.counts().gaps), (9, 1));
        let ask = async |want| {
            let payload =
                Request { id: RequestId(1), epoch: Epoch(1), shard: ShardId::WHOLE, want }.encode().unwrap();
            bus.inner.publish(Subjects::default().control(&source()), payload.into()).await.unwrap();
        };
        ask(Want::Frames(vec![(FrameSeq(2), FrameSeq(3)), (FrameSeq(7), FrameSeq(20))])).await;
        assert!(control.try_recv().is_err());
        assert_eq!((bus.unnoticed(), bus.counts().lost_requests), (4, 1));
        ask(Want::State(Vec::new())).await;
        assert!(control.try_recv().is_err());
        assert_eq!((bus.unnoticed(), bus.counts().state_requests), (0, 1));
    }
}
