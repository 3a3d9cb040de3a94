//! A source's state as bytes, and back. See [`crate::state`] for what is in it and what it is worth.

use kvatlas_proto::frame::{EncodeFrameError, FrameHeader, FramePart, FrameView, OpBuffer};
use kvatlas_proto::{Epoch, FrameSeq, Scope, ShardId};

use super::{Source, SourceConfig};
use crate::adapter::{self, Adapter};
use crate::mirror::Mirror;
use crate::repage::Repager;
use crate::state::{self, RestoreStateError, SaveStateError, wire};

/// Fingerprints that are saved. The replay that proves a life reaches back to the last message that was applied, so one would
/// do; the rest is for engines that could not keep every message.
const SAVED_MESSAGES: usize = 1_024;

/// Where the clock is behind the saved epoch, the next one is somewhere in the second after it, by the clock's fraction of a
/// second: two lives that begin with the same file, because the first one's own was lost, do not share a number.
const EPOCH_SPREAD_NS: u64 = 1_000_000_000;

/// Newest epoch that is taken over: one of a clock that is centuries ahead leaves none to follow it.
const MAX_EPOCH: u64 = u64::MAX / 2;

/// Where a source was: two equal marks mean that there is nothing new to save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateMark {
    epoch: Epoch,
    last: Option<u64>,
    applied: u64,
    expired: u64,
}

// === impl Source ===

impl Source {
    /// Where the source is.
    pub fn mark(&self) -> StateMark {
        let (applied, expired) = (self.counts.messages, self.mirror.counts().expired);
        StateMark { epoch: self.epoch, last: self.last, applied, expired }
    }

    /// The state as bytes. `None` while there is nothing to save: before the block size is known, and while a restored state
    /// is not proved.
    pub fn save(&self) -> Result<Option<Vec<u8>>, SaveStateError> {
        let Some(scope) = self.scope.clone().filter(|_| !self.unproved) else { return Ok(None) };
        let heartbeats = self.config.partition.all().map(|shard| self.heartbeat(&scope, shard));
        let state = wire::State {
            identity: state::identity(&self.config),
            adapter: self.adapter.map_or(String::new(), |adapter| adapter.name().to_owned()),
            heartbeats: heartbeats.collect::<Result<_, _>>()?,
            last: self.last,
            history: self.last.map_or(Vec::new(), |last| self.history.newest(last, SAVED_MESSAGES)),
            mirror: self.mirror.save(),
            repager: self.repager.as_ref().map(Repager::save),
        };
        state::seal(&state).map(Some)
    }

    fn heartbeat(&self, scope: &Scope, shard: ShardId) -> Result<Vec<u8>, EncodeFrameError> {
        let digests = self.mirror.digests(shard).to_vec();
        FrameHeader { seq: FrameSeq(0), digests, ..self.header(scope.clone(), shard) }
            .encode(&mut OpBuffer::default())
    }

    /// A source that goes on where a saved one was. It publishes nothing until the engine's replay, from the beginning
    /// ([`Self::connected`], [`Self::replayed`]), has shown that the engine still lives the same life; if it does not, nothing
    /// is left of what was saved. Without a replay nobody could show it, so then only the epoch is taken.
    ///
    /// The epoch is newer than the saved one, whatever the clock says.
    pub fn restore(config: SourceConfig, bytes: &[u8], now_ns: u64) -> Result<Self, RestoreStateError> {
        let saved = state::open(bytes, &config)?;
        let heartbeats = restore_heartbeats(saved, &config)?;
        let header = &heartbeats[0];
        if config.rank.is_some_and(|rank| rank != header.source.rank) {
            return Err(RestoreStateError::Foreign { what: "rank" });
        }
        let adapter = restore_adapter(&saved.adapter, config.adapter)?;
        let epoch = Epoch(epoch_after(header.epoch.0, now_ns));
        let mut source = Self::new(config, now_ns)
            .map_err(|_| RestoreStateError::Inconsistent("its scope is not usable"))?;
        source.epoch = epoch;
        if !source.config.has_replay {
            return Ok(source);
        }
        let (hasher, limits, removal) = (source.config.hasher, source.config.limits, source.config.removal);
        let partition = source.config.partition;
        source.mirror = Mirror::restore(hasher, partition, limits, removal, &heartbeats, &saved.mirror)?;
        source.repager = match (source.config.block_size, saved.repager.as_ref()) {
            (Some(block), Some(repager)) => Some(Repager::restore(block, repager)?),
            (None, None) => None,
            _ => {
                return Err(RestoreStateError::Inconsistent(
                    "it rewrites blocks where none are, or does not",
                ));
            }
        };
        source.new_epoch();
        source.mirror.expire(now_ns, &mut source.ops);
        source.last = saved.last.as_ref().map(|last| last.to_native());
        for applied in saved.history.iter().rev() {
            source.history.remember(applied.seq.to_native(), applied.fingerprint.to_native());
        }
        source.adapter = adapter;
        source.rank = header.source.rank;
        source.health = header.health;
        source.unproved = source.last.is_some();
        source.suspect = true;
        source.learn_scope();
        Ok(source)
    }

    /// Whether the state is a saved one that the engine has not confirmed yet.
    pub fn is_unproved(&self) -> bool {
        self.unproved
    }
}

/// The number of the life that follows a saved one. Not above the clock where that is not needed: a life that lost its file has
/// only the clock to be newer by.
fn epoch_after(saved: u64, now_ns: u64) -> u64 {
    if now_ns > saved { now_ns } else { saved + 1 + now_ns % EPOCH_SPREAD_NS }
}

fn restore_adapter(
    saved: &str,
    configured: Option<&'static dyn Adapter>,
) -> Result<Option<&'static dyn Adapter>, RestoreStateError> {
    let known = adapter::adapter(saved);
    let other = configured.is_some_and(|adapter| !saved.is_empty() && adapter.name() != saved);
    if other || (known.is_none() && !saved.is_empty()) {
        return Err(RestoreStateError::Foreign { what: "adapter" });
    }
    Ok(configured.or(known))
}

/// The heartbeats of a state, one per shard: at least one.
fn restore_heartbeats(
    saved: &wire::ArchivedState,
    config: &SourceConfig,
) -> Result<Vec<FrameHeader>, RestoreStateError> {
    let not_its_own = RestoreStateError::Inconsistent("its heartbeats are not its own");
    if saved.heartbeats.len() != usize::from(config.partition.shards()) {
        return Err(not_its_own);
    }
    let mut headers: Vec<FrameHeader> = Vec::with_capacity(saved.heartbeats.len());
    for (shard, heartbeat) in config.partition.all().zip(saved.heartbeats.iter()) {
        let header = FrameView::parse(heartbeat)?.header().clone();
        let scope = &header.scope;
        let same = scope.model() == config.model
            && scope.tenant() == config.tenant
            && header.source.instance == config.instance
            && config.block_size.is_none_or(|size| size == scope.block_size());
        let as_expected =
            header.shard == shard && header.part == FramePart::Live && header.epoch.0 <= MAX_EPOCH;
        // They differ in nothing but shard and digests.
        let like_first = headers.first().is_none_or(|first| {
            FrameHeader { shard, digests: header.digests.clone(), ..first.clone() } == header
        });
        if !(same && as_expected && like_first) {
            return Err(not_its_own);
        }
        headers.push(header);
    }
    Ok(headers)
}
