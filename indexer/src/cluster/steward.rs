//! Keeps a server's shards: takes in what it is to own, answers for it once it is proved, and lets go of what it is not to own
//! any more once the others can answer for it.
//!
//! That is all there is to a change of the number of servers. What a server is to own is somebody else's decision
//! (configuration, or a lease); until it has it, the old division answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use kvatlas_bus::{Bus, SubscribeError, Subscription};
use kvatlas_proto::subject::Subjects;
use kvatlas_proto::{Partition, ShardId, ShardSet};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::coordinator::SHARD_TIMEOUT;
use super::metrics::ClusterMetrics;
use super::presence::{ANNOUNCE_MS, Announcement, Presence};
use super::responder::Responder;
use crate::burst::BurstLimiter;
use crate::clock::Clock;
use crate::index::Index;
use crate::ingest::{Owned, TaggedSubscription};
use crate::server::Readiness;

/// Time between two looks at what has become ready.
const TICK: Duration = Duration::from_millis(50);
/// How long the new division has to be complete before the old one is given up: longer than an announcement takes to be
/// everywhere, so that nobody asks who has let go.
const HANDOVER_GRACE: Duration = Duration::from_secs(1);
/// How long a set that is given up is still answered for after the last announcement that names it: two announcements without it
/// (one may be lost), and the longest that a question is waited for. Whoever asked before it heard gets its answer.
const LEAVE_GRACE: Duration = Duration::from_millis(2 * ANNOUNCE_MS + SHARD_TIMEOUT.as_millis() as u64);
/// Longest wait for publishers that do not prove what they hold; then the server answers for what it has, which says so.
pub(crate) const PROOF_MAX: Duration = Duration::from_secs(30);
/// Name of the queue group that servers of a set share.
const GROUP: &str = "shard";

/// The shards that this server answers for.
#[derive(Debug)]
pub(crate) struct Serving(Box<[AtomicBool]>);

/// Looks after the shards of one server.
pub(crate) struct Steward {
    pub(crate) index: Arc<Index>,
    pub(crate) bus: Arc<dyn Bus>,
    pub(crate) subjects: Subjects,
    pub(crate) clock: Clock,
    pub(crate) serving: Arc<Serving>,
    pub(crate) presence: Arc<Mutex<Presence>>,
    pub(crate) responder: Arc<Responder>,
    pub(crate) metrics: Arc<ClusterMetrics>,
    /// Name of this life of the server.
    pub(crate) server: String,
    /// What it is to own.
    pub(crate) wanted: watch::Receiver<ShardSet>,
    /// How long publishers have to show themselves.
    pub(crate) discovery: Duration,
    /// True once the checkpoint, if there is one, was taken in; events wait until then.
    pub(crate) loaded: watch::Receiver<bool>,
    pub(crate) ingest: mpsc::Sender<Owned>,
    /// Is told when the first wanted set is answered for.
    pub(crate) ready: Readiness,
    pub(crate) held: Vec<HeldSet>,
    pub(crate) complete_since: Option<Instant>,
    pub(crate) log: BurstLimiter,
}

/// A set that this server has, or is taking in.
pub(crate) struct HeldSet {
    set: ShardSet,
    since: Instant,
    /// Ends the answering of questions about it; `None` while it is taken in.
    answering: Option<CancellationToken>,
    /// Since when it is not announced any more, if it is to be given up.
    leaving: Option<Instant>,
}

// === impl Serving ===

impl Serving {
    pub(crate) fn nothing(partition: Partition) -> Self {
        Self((0..partition.shards()).map(|_| AtomicBool::new(false)).collect())
    }

    pub(crate) fn has(&self, shard: u16) -> bool {
        self.0.get(usize::from(shard)).is_some_and(|has| has.load(Ordering::Relaxed))
    }

    fn set(&self, shards: &[ShardId]) {
        for (number, has) in self.0.iter().enumerate() {
            has.store(shards.iter().any(|shard| usize::from(shard.number()) == number), Ordering::Relaxed);
        }
    }
}

// === impl Steward ===

impl Steward {
    /// Runs until `stop`; says goodbye then.
    pub(crate) async fn run(mut self, mut announcements: Subscription, stop: CancellationToken) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut announce_at = Instant::now();
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                said = announcements.recv() => match said {
                    Some(message) => {
                        self.hear(&message.payload);
                        continue;
                    }
                    None => break,
                },
                _ = tick.tick() => {}
            }
            let changed = self.look_after().await;
            if changed || Instant::now() >= announce_at {
                announce_at = Instant::now() + Duration::from_millis(ANNOUNCE_MS);
                self.announce().await;
            }
        }
        for held in &mut self.held {
            held.answering.take().iter().for_each(CancellationToken::cancel);
        }
        self.held.clear();
        self.announce().await;
    }

    fn hear(&mut self, payload: &[u8]) {
        let now_ms = self.clock.now_ms();
        let said = match Announcement::parse(payload) {
            Ok(said) => said,
            Err(error) => {
                tracing::debug!(%error, "an announcement of a server is not usable");
                return;
            }
        };
        let (server, shards) = (said.server.clone(), said.shards);
        if !self.presence.lock().hear(said, now_ms) {
            self.metrics.foreign.inc();
            let ours = self.index.partition().shards();
            if let Some(withheld) = self.log.admit(now_ms) {
                tracing::warn!(
                    server,
                    shards,
                    ours,
                    withheld,
                    "another server cuts the key space into another number of shards, or there are too many servers: give \
                     all servers and shims of a deployment the same --shards"
                );
            }
        }
    }

    /// Takes in, answers for, lets go. True if what others must know has changed.
    async fn look_after(&mut self) -> bool {
        let wanted = *self.wanted.borrow_and_update();
        match self.held.iter_mut().find(|held| held.set == wanted) {
            // Wanted again before it was gone.
            Some(held) => held.leaving = None,
            None => self.take_in(wanted).await,
        }
        if !*self.loaded.borrow() {
            self.held.iter_mut().for_each(|held| held.since = Instant::now());
            return false;
        }
        let mut changed = false;
        for at in 0..self.held.len() {
            if self.held[at].answering.is_none() && self.is_proved(&self.held[at]) {
                changed |= self.answer_for(at).await;
            }
        }
        let leaves = self.leave(wanted);
        self.let_go(wanted).await;
        changed | leaves
    }

    async fn take_in(&mut self, set: ShardSet) {
        let before = self.owned();
        self.held.push(HeldSet { set, since: Instant::now(), answering: None, leaving: None });
        let owned = self.owned();
        let mut subscriptions = Vec::new();
        for shard in owned.iter().filter(|shard| !before.contains(shard)) {
            match self.bus.subscribe(self.subjects.events_in(*shard)).await {
                Ok(events) => subscriptions.push(TaggedSubscription { shard: *shard, events }),
                Err(error) => {
                    // It is tried again with the next look.
                    tracing::warn!(%shard, %error, "the events of a shard cannot be subscribed to");
                    self.held.pop();
                    return;
                }
            }
        }
        tracing::info!(%set, shards = owned.len(), new = subscriptions.len(), "taking in a set of shards");
        self.metrics.owned_shards.set(owned.len() as i64);
        if self.ingest.send(Owned { shards: owned, subscriptions }).await.is_err() {
            return;
        }
        // Twice, for the first can be lost.
        let (bus, hello, wait) = (Arc::clone(&self.bus), self.subjects.hello(), self.discovery / 2);
        let shards = Bytes::copy_from_slice(&self.index.partition().shards().to_le_bytes());
        tokio::spawn(async move {
            for _ in 0..2 {
                if let Err(error) = bus.publish(hello.clone(), shards.clone()).await {
                    tracing::warn!(%error, "publishers could not be asked to show themselves; their heartbeats will");
                }
                tokio::time::sleep(wait).await;
            }
        });
    }

    /// Whether everything that publishers have in the set is known and proved.
    fn is_proved(&self, held: &HeldSet) -> bool {
        let age = held.since.elapsed();
        if age < self.discovery {
            return false;
        }
        let shards = held.set.shards(self.index.partition());
        age >= PROOF_MAX || !self.index.is_finding_out_of(&shards, self.clock.now_ms())
    }

    async fn answer_for(&mut self, at: usize) -> bool {
        let set = self.held[at].set;
        let stop = CancellationToken::new();
        let subscribed: Result<_, SubscribeError> = async {
            let asked = self.bus.subscribe_group(self.subjects.query(set), GROUP.to_owned()).await?;
            Ok((asked, self.bus.subscribe(self.subjects.hedge(set)).await?))
        }
        .await;
        let (asked, again) = match subscribed {
            Ok(both) => both,
            Err(error) => {
                tracing::warn!(%set, %error, "questions about a set of shards cannot be subscribed to");
                return false;
            }
        };
        self.held[at].answering = Some(stop.clone());
        self.serve();
        tokio::spawn(Arc::clone(&self.responder).answer_all(asked, stop.clone()));
        tokio::spawn(Arc::clone(&self.responder).answer_all(again, stop));
        let took = self.held[at].since.elapsed();
        self.metrics.handover.set(took.as_secs_f64());
        tracing::info!(
            %set, took_ms = took.as_millis() as u64, blocks = self.index.totals(self.clock.now_ms()).blocks,
            "answering for a set of shards"
        );
        if set == *self.wanted.borrow() {
            self.ready.set(true).await;
        }
        true
    }

    /// Says no more that it has what is not wanted, once everybody can do without.
    fn leave(&mut self, wanted: ShardSet) -> bool {
        let has_wanted = self.held.iter().any(|held| held.set == wanted && held.answering.is_some());
        let complete = has_wanted && self.presence.lock().is_complete(wanted.servers(), self.clock.now_ms());
        let stays = |held: &HeldSet| held.set == wanted || held.leaving.is_some();
        if self.held.iter().all(stays) || !complete {
            self.complete_since = None;
            return false;
        }
        if self.complete_since.get_or_insert_with(Instant::now).elapsed() < HANDOVER_GRACE {
            return false;
        }
        self.complete_since = None;
        for held in self.held.iter_mut().filter(|held| !stays(held)) {
            held.leaving = Some(Instant::now());
        }
        true
    }

    /// Gives up what nobody counts on any more.
    async fn let_go(&mut self, wanted: ShardSet) {
        let is_over = |held: &HeldSet| held.leaving.is_some_and(|since| since.elapsed() >= LEAVE_GRACE);
        if !self.held.iter().any(is_over) {
            return;
        }
        let (old, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut self.held).into_iter().partition(is_over);
        self.held = kept;
        self.serve();
        for held in old {
            held.answering.iter().for_each(CancellationToken::cancel);
            tracing::info!(set = %held.set, now = %wanted, "let go of a set of shards");
        }
        let owned = self.owned();
        self.metrics.owned_shards.set(owned.len() as i64);
        let _ = self.ingest.send(Owned { shards: owned, subscriptions: Vec::new() }).await;
    }

    fn owned(&self) -> Vec<ShardId> {
        self.shards_of(|_| true)
    }

    fn shards_of(&self, admit: impl Fn(&HeldSet) -> bool) -> Vec<ShardId> {
        let partition = self.index.partition();
        let held = self.held.iter().filter(|held| admit(held));
        let mut shards: Vec<ShardId> = held.flat_map(|held| held.set.shards(partition)).collect();
        shards.sort_unstable();
        shards.dedup();
        shards
    }

    fn serve(&self) {
        let ready = self.shards_of(|held| held.answering.is_some());
        self.serving.set(&ready);
        self.metrics.ready_shards.set(ready.len() as i64);
    }

    async fn announce(&self) {
        let answered = self.held.iter().filter(|held| held.answering.is_some() && held.leaving.is_none());
        let said = Announcement {
            server: self.server.clone(),
            shards: self.index.partition().shards(),
            sets: answered.map(|held| held.set).collect(),
        };
        let bytes = Bytes::from(said.encode());
        // Ours is known without the broker, too.
        self.presence.lock().hear(said, self.clock.now_ms());
        if let Err(error) = self.bus.publish(self.subjects.servers(), bytes).await {
            tracing::debug!(%error, "an announcement could not be sent");
        }
    }
}
