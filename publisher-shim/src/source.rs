//! One engine rank as a publisher: order and repair on the engine's side, epochs and frames on the bus's side.
//!
//! Pure: messages, replies and wall-clock times come in as arguments; frames come out. The shell ([`crate::shim`]) owns
//! the sockets and decides when to ask.
//!
//! # What the engine's sequence can say
//!
//! A live message's sequence is compared with the last one applied:
//!
//! | seen | meaning | what happens |
//! |---|---|---|
//! | last + 1 | in order | applied |
//! | at most last, same bytes as before | a replay overlapped | dropped |
//! | at most last, other bytes | the engine restarted | everything is forgotten; new epoch |
//! | above last + 1 | messages are missing | replay; if that cannot fill the gap, state is dropped; new epoch |
//!
//! A (re)connect is suspect: the engine may have restarted unseen, and its sequence may even fit. With a replay socket
//! the whole buffer is fetched and compared with what was applied (a payload holds a time stamp, so equal bytes at
//! equal sequence mean the same life). Without one, state from before the reconnect is dropped.
//!
//! A message that cannot be decoded spends its sequence and nothing else. A gap is asked for once; what the reply does
//! not hold will never come (the engine could not encode it), so there is no loop.
//!
//! # After a loss
//!
//! What was held is not claimed any more, and health says so until a reset or another life. Blocks count again as the engine
//! stores them again: since copies are counted from nothing, a count never exceeds the engine's.
//!
//! It is tempting to take a stored block as proof that its parent, named by hash, and all blocks before that are held, since a
//! request keeps its prefix while it runs; hot prefixes would come back at once. Not done, because it does not hold for vLLM:
//! when an external connector fails to load a block and the policy is to fail (the default), `evict_blocks` takes that block
//! and all behind it in the failed request out of the cache, also those that another request shares and goes on using. That
//! request is not stopped if it holds another copy of the block that failed (with EAGLE, whose look-up drops the last match,
//! the failed request had loaded a second copy of one that was there). What it stores later has ancestors that are not in the
//! cache. If the removals were among the lost events, these would be claimed, and no removal would ever take them back.
//!
//! # What the epoch promises
//!
//! An epoch begins with digests: what the mirror held when it began. From there its frames are contiguous and add up to the
//! mirror, and every heartbeat says the mirror's digests once more. Whenever that cannot be promised a new epoch begins.
//! Frames that were published are kept for a while to be sent again, and the mirror itself can be told to anybody who asks
//! ([`Source::answer`]), so nobody needs the whole history to be right again.
//!
//! All this holds in each virtual shard by itself, in a *lane*: sequence, digests, frames that are kept, and answers are the
//! lane's, and only the epoch is common. So who follows some of the shards needs nothing from the others.

use bytes::Bytes;
use kvatlas_proto::frame::SourceHealth;
use kvatlas_proto::keys::KEY_VERSION;
use kvatlas_proto::scope::InvalidScopeError;
use kvatlas_proto::{
    DpRank, Epoch, FrameSeq, InstanceId, KeyHasher, Partition, Scope, ShardId, SourceId, Tier,
};

use crate::adapter::{self, Adapter, DecodeError, vllm};
use crate::event::{Batch, Event};
use crate::mirror::{LaneOps, Mirror, MirrorCounts, MirrorLimits, RemovalPolicy};
use crate::repage::Repager;

mod history;
mod lanes;
mod publish;
mod saved;
mod sent;

pub use lanes::{IDLE_HEARTBEAT_BEATS, MIN_SENT_BYTES, MIN_SENT_FRAMES, Outgoing};
pub use publish::{FRAME_OPS_BYTES, PublishLimits};
pub use saved::StateMark;
pub use sent::{ANSWER_FRAMES, SENT_BYTES, SENT_FRAMES};

use history::History;
use lanes::Lane;

/// What identifies and bounds a source.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// Who speaks; `None`: the first messages show it.
    pub adapter: Option<&'static dyn Adapter>,
    /// Model name as the engine serves it.
    pub model: String,
    /// Tenant; empty for the default one.
    pub tenant: String,
    /// What a gateway routes to.
    pub instance: InstanceId,
    /// Where its events come from; part of what a saved state is of.
    pub endpoint: String,
    /// Data-parallel rank; `None` takes the one that the engine's messages name.
    pub rank: Option<DpRank>,
    /// Tokens per block; `None` takes the engine's.
    pub block_size: Option<u32>,
    /// How keys are computed.
    pub hasher: KeyHasher,
    /// How the key space is cut: the same in every process of the deployment.
    pub partition: Partition,
    /// What a removal says about copies.
    pub removal: RemovalPolicy,
    /// Bounds of the mirror.
    pub limits: MirrorLimits,
    /// Bounds of what is published and kept.
    pub publish: PublishLimits,
    /// Whether the engine can be asked for past messages.
    pub has_replay: bool,
}

/// One engine rank as a publisher.
pub struct Source {
    config: SourceConfig,
    adapter: Option<&'static dyn Adapter>,
    mirror: Mirror,
    /// Present where the scope's block size is configured: the engine's may differ.
    repager: Option<Repager>,
    batch: Batch,
    /// Changes that are not published yet.
    ops: LaneOps,
    /// Sequence of the last message applied.
    last: Option<u64>,
    history: History,
    /// The connection was (re)made and nothing from it was compared yet.
    suspect: bool,
    /// What is held was read from a file, and no replay has shown that it is of this life of the engine.
    unproved: bool,
    health: SourceHealth,
    rank: DpRank,
    scope: Option<Scope>,
    epoch: Epoch,
    /// The epoch's number was given to frames. Before the first ones the source has no name and no past.
    named: bool,
    /// The next frames start a new epoch.
    new_epoch: bool,
    /// By shard.
    lanes: Vec<Lane>,
    /// Bounds of what is kept of each lane.
    lane_limits: PublishLimits,
    /// Number of the next heartbeat.
    beat: u64,
    engine_time_ns: u64,
    counts: SourceCounts,
}

/// What to do about a live message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Live {
    /// It was dealt with.
    Done,
    /// Ask the engine for its messages from this sequence on, hand them to [`Source::replayed`], then offer the message
    /// again.
    Replay {
        /// First sequence to ask for.
        from: u64,
    },
}

/// What happened on the engine's side. Counters since the source was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceCounts {
    /// Messages applied.
    pub messages: u64,
    /// Messages dropped because they had been applied before.
    pub duplicates: u64,
    /// Messages dropped because they could not be decoded, by [`DecodeError::reason`].
    pub undecodable: Vec<(&'static str, u64)>,
    /// Events of a kind that is not known.
    pub unknown_events: u64,
    /// Gaps seen in the sequence.
    pub gaps: u64,
    /// Gaps that could not be filled: state was dropped.
    pub losses: u64,
    /// Engine restarts noticed.
    pub restarts: u64,
    /// Messages whose data-parallel rank is not the source's.
    pub rank_mismatch: u64,
}

// === impl SourceConfig ===

impl SourceConfig {
    /// This model and instance; everything else as the engine says it, or by default.
    pub fn new(model: impl Into<String>, instance: InstanceId) -> Self {
        Self {
            adapter: None,
            model: model.into(),
            tenant: String::new(),
            instance,
            endpoint: String::new(),
            rank: None,
            block_size: None,
            hasher: KeyHasher::default(),
            partition: Partition::WHOLE,
            removal: RemovalPolicy::default(),
            limits: MirrorLimits::default(),
            publish: PublishLimits::default(),
            has_replay: false,
        }
    }
}

// === impl SourceCounts ===

impl SourceCounts {
    fn count_undecodable(&mut self, reason: &'static str) {
        match self.undecodable.iter_mut().find(|(r, _)| *r == reason) {
            Some((_, n)) => *n += 1,
            None => self.undecodable.push((reason, 1)),
        }
    }
}

// === impl Source ===

impl Source {
    /// An empty source. `now_ns` is wall-clock time, nanoseconds since the Unix epoch; it becomes the first [`Epoch`].
    pub fn new(config: SourceConfig, now_ns: u64) -> Result<Self, InvalidScopeError> {
        // Checks model and tenant now, whatever block size the engine will say.
        Scope::new(&*config.model, &*config.tenant, config.block_size.unwrap_or(1), KEY_VERSION)?;
        let partition = config.partition;
        let mirror = Mirror::new(config.hasher, partition, config.limits, config.removal, config.block_size);
        let mut source = Self {
            mirror,
            repager: config.block_size.map(Repager::new),
            batch: Batch::default(),
            ops: LaneOps::new(partition),
            last: None,
            history: History::default(),
            suspect: false,
            unproved: false,
            health: SourceHealth::Exact,
            rank: config.rank.unwrap_or_default(),
            scope: None,
            epoch: Epoch(now_ns),
            named: false,
            new_epoch: true,
            lanes: partition.all().map(|_| Lane::new()).collect(),
            lane_limits: config.publish.of_lane(partition),
            beat: 0,
            engine_time_ns: 0,
            counts: SourceCounts::default(),
            adapter: config.adapter,
            config,
        };
        source.mirror.expire(now_ns, &mut source.ops);
        source.learn_scope();
        Ok(source)
    }

    /// Who publishes.
    pub fn id(&self) -> SourceId {
        SourceId { instance: self.config.instance.clone(), rank: self.rank }
    }

    /// Which key space, once the block size is known.
    pub fn scope(&self) -> Option<&Scope> {
        self.scope.as_ref()
    }

    /// Sequence of the last engine message applied.
    pub fn last_engine_seq(&self) -> Option<u64> {
        self.last
    }

    /// How the key space is cut.
    pub fn partition(&self) -> Partition {
        self.config.partition
    }

    /// The current epoch, common to all shards.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Current epoch and the sequence that the next frame of a shard will have.
    pub fn position(&self, shard: ShardId) -> (Epoch, FrameSeq) {
        (self.epoch, self.lane(shard).next())
    }

    /// What the source knows about its own truth.
    pub fn health(&self) -> SourceHealth {
        self.health
    }

    /// Who speaks, once known.
    pub fn adapter(&self) -> Option<&'static dyn Adapter> {
        self.adapter
    }

    /// Counters of the engine's side.
    pub fn counts(&self) -> &SourceCounts {
        &self.counts
    }

    /// Counters of the mirror.
    pub fn mirror_counts(&self) -> MirrorCounts {
        self.mirror.counts()
    }

    /// Pages that could not be followed, where the engine's block size is not the scope's.
    pub fn untracked_pages(&self) -> u64 {
        self.repager.as_ref().map_or(0, Repager::untracked)
    }

    /// What the engine holds, as far as it is known.
    pub fn mirror(&self) -> &Mirror {
        &self.mirror
    }

    /// The connection to the engine was (re)made. Returns the sequence to replay from, if the engine can be asked.
    pub fn connected(&mut self) -> Option<u64> {
        self.suspect = true;
        self.config.has_replay.then_some(0)
    }

    /// Offers a live message. `after_replay` says that the engine was just asked, so that what is missing now will
    /// never come.
    pub fn live(&mut self, seq: u64, payload: &[u8], after_replay: bool) -> Live {
        self.note_adapter(payload);
        if self.suspect {
            if self.config.has_replay && !after_replay {
                return Live::Replay { from: 0 };
            }
            // Nobody can say whether this is still the same life.
            self.suspect = false;
            if self.last.is_some() {
                self.restart();
                // The very first message begins a life of which nothing was missed.
                if seq > self.first_seq() {
                    self.health = SourceHealth::EventsLost;
                }
            }
        }
        match self.last {
            None if seq > self.first_seq() && self.config.has_replay && !after_replay => {
                return Live::Replay { from: 0 };
            }
            None => {
                if seq > self.first_seq() && self.health == SourceHealth::Exact {
                    self.health = SourceHealth::JoinedLate;
                }
            }
            Some(last) if last.checked_add(1) == Some(seq) => {}
            Some(last) if seq > last => {
                if self.config.has_replay && !after_replay {
                    self.counts.gaps += 1;
                    return Live::Replay { from: last + 1 };
                }
                self.counts.gaps += u64::from(!after_replay);
                self.lose();
            }
            Some(_) if self.history.is_same(seq, payload) == Some(true) => {
                self.counts.duplicates += 1;
                return Live::Done;
            }
            Some(_) => {
                self.restart();
                if seq > self.first_seq() {
                    if self.config.has_replay && !after_replay {
                        return Live::Replay { from: 0 };
                    }
                    self.health = SourceHealth::JoinedLate;
                }
            }
        }
        self.apply(seq, payload);
        Live::Done
    }

    /// Takes the engine's reply to a replay from `from`: messages in the order received. An empty reply is an engine that
    /// has published nothing (or one that did not answer).
    pub fn replayed(&mut self, from: u64, messages: &[(u64, Bytes)]) {
        if from == 0 {
            self.compare_lives(messages);
            self.unproved = false;
        }
        self.suspect = false;
        for (seq, payload) in messages {
            self.note_adapter(payload);
            match self.last {
                Some(last) if *seq <= last => self.counts.duplicates += 1,
                Some(last) if last.checked_add(1) == Some(*seq) => self.apply(*seq, payload),
                Some(_) => {
                    self.lose();
                    self.apply(*seq, payload);
                }
                None => {
                    if *seq > self.first_seq() && self.health == SourceHealth::Exact {
                        self.health = SourceHealth::JoinedLate;
                    }
                    self.apply(*seq, payload);
                }
            }
        }
    }

    /// Forgets everything if the replayed messages show (or cannot rule out) another engine life.
    fn compare_lives(&mut self, messages: &[(u64, Bytes)]) {
        let Some(last) = self.last else { return };
        let mut same = None;
        for (seq, payload) in messages.iter().filter(|(seq, _)| *seq <= last) {
            match self.history.is_same(*seq, payload) {
                Some(false) => {
                    same = Some(false);
                    break;
                }
                Some(true) => same = Some(true),
                None => {}
            }
        }
        let reaches_back = messages.last().is_some_and(|(seq, _)| *seq >= last);
        if same != Some(true) || !reaches_back {
            self.restart();
            if messages.first().is_some_and(|(seq, _)| *seq > self.first_seq()) {
                self.health = SourceHealth::EventsLost;
            }
        }
    }

    /// The engine has another life now, or may have: nothing known before counts.
    fn restart(&mut self) {
        self.counts.restarts += 1;
        self.mirror.reset();
        self.repager.iter_mut().for_each(Repager::reset);
        self.ops.clear();
        self.lanes.iter_mut().for_each(Lane::held_nothing);
        self.last = None;
        self.unproved = false;
        self.history.clear();
        self.health = SourceHealth::Exact;
        self.new_epoch = true;
    }

    /// Messages of this life are lost for good: what is held now is unknown, so nothing is claimed.
    fn lose(&mut self) {
        self.counts.losses += 1;
        self.mirror.clear(&mut self.ops);
        self.repager.iter_mut().for_each(Repager::reset);
        self.ops.clear();
        self.lanes.iter_mut().for_each(Lane::held_nothing);
        self.health = SourceHealth::EventsLost;
        self.new_epoch = true;
    }

    fn apply(&mut self, seq: u64, payload: &[u8]) {
        self.last = Some(seq);
        self.history.record(seq, payload);
        let adapter = self.adapter.unwrap_or(&vllm::Vllm);
        if let Err(error) = adapter.decode(payload, &mut self.batch) {
            self.note_undecodable(seq, error);
            return;
        }
        self.counts.messages += 1;
        self.counts.unknown_events += u64::from(self.batch.unknown_events);
        self.engine_time_ns = self.engine_time_ns.max(self.batch.time_ns);
        self.note_rank();
        let (over_limit, variant) = (self.mirror.counts().over_limit, self.mirror.variant());
        let batch = match &mut self.repager {
            Some(repager) => repager.rewrite(&self.batch),
            None => &self.batch,
        };
        self.mirror.apply(batch, &mut self.ops);
        // An index matches an epoch by one variant. What waits is said in the new one, which begins where the old one ends.
        self.new_epoch |= self.mirror.variant() != variant;
        self.note_health(self.mirror.counts().over_limit > over_limit);
        self.learn_scope();
    }

    fn note_adapter(&mut self, payload: &[u8]) {
        if self.adapter.is_none() {
            self.adapter = adapter::detect(payload);
            if let Some(adapter) = self.adapter {
                tracing::info!(source = %self.id(), adapter = adapter.name(), "recognised the engine by its events");
            }
        }
    }

    fn first_seq(&self) -> u64 {
        self.adapter.map_or(0, Adapter::first_seq)
    }

    fn learn_scope(&mut self) {
        if let (None, Some(block_size)) = (&self.scope, self.mirror.block_size()) {
            let scope = Scope::new(&*self.config.model, &*self.config.tenant, block_size, KEY_VERSION);
            self.scope =
                Some(scope.expect("the configuration was checked, and the mirror checks block sizes"));
        }
    }

    fn note_undecodable(&mut self, seq: u64, error: DecodeError) {
        tracing::debug!(source = %self.id(), seq, %error, "engine message could not be decoded");
        self.counts.count_undecodable(error.reason());
        if self.health == SourceHealth::Exact {
            self.health = SourceHealth::Undecodable;
        }
    }

    fn note_rank(&mut self) {
        let Some(said) = self.batch.rank.map(DpRank) else { return };
        if said != self.rank {
            // Before the first frame the source has no name yet, so the engine may still give it.
            if self.config.rank.is_none() && !self.named {
                self.rank = said;
            } else {
                self.counts.rank_mismatch += 1;
            }
        }
    }

    fn note_health(&mut self, over_limit: bool) {
        let cleared = self.batch.events.iter().any(|event| matches!(event, Event::Cleared));
        let only_gpu = || self.mirror.owners().iter().all(|owner| owner.tier == Tier::Gpu);
        // A reset empties the device cache for certain; other tiers may keep blocks that were missed.
        if cleared && only_gpu() {
            self.health = SourceHealth::Exact;
        }
        if over_limit {
            self.health = SourceHealth::OverLimit;
        }
    }
}
