//! All scopes together: frames go in, answers come out. Synchronous and without a clock; time is an argument.
//!
//! `now_ms` is any clock that does not go back, in milliseconds, the same for all calls.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{self, Seek, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use kvatlas_proto::frame::{FrameHeader, FramePart, FrameView};
use kvatlas_proto::keys::{KEY_VERSION, KeySeed};
use kvatlas_proto::request::{Request, RequestId};
use kvatlas_proto::scope::MAX_BLOCK_SIZE;
use kvatlas_proto::{OwnerRef, Partition, Scope, ShardId, SourceId};
use parking_lot::{Mutex, RwLock};

use crate::checkpoint::{self, CheckpointSize, CheckpointWriter, ReadCheckpointError};
use crate::held::RecoveryLimits;
pub use crate::scope_index::Applied;
use crate::scope_index::{Budget, OwnerEntry, OwnerNo, ScopeIndex, ScopeState};
use crate::session::Permits;
use crate::sources::{SourceState, Verdict};
use crate::tenant_keys::TenantKeys;

mod score;
mod views;

pub(crate) use score::{Subject, ranks_of};
pub use views::{
    BlockSizeMismatch, DumpOwner, Expired, IndexTotals, LimitReached, OwnerFilter, OwnerInfo, SourceInfo,
};

/// Scopes, by default. Far more models and tenants than one index serves; each costs about a kilobyte.
pub const DEFAULT_MAX_SCOPES: usize = 1_024;
/// Sources (instance and rank) per scope, by default: the largest fleets have thousands.
pub const DEFAULT_MAX_SOURCES_PER_SCOPE: usize = 65_536;
/// Owners (tier and cache group of a source) of all scopes, by default: 16 for each of 65,536 sources.
pub const DEFAULT_MAX_OWNERS: usize = 1_048_576;
/// Blocks, counted once per owner, of all scopes, by default. At 60 bytes each, which they stay below, this is
/// 4 GB.
pub const DEFAULT_MAX_BLOCKS: usize = 64 << 20;

/// State transfers that run at the same time: a fleet that synchronises takes its turns, and queries keep their latency.
pub const MAX_TRANSFERS: usize = 8;
/// Sources that one [`Index::poll`] looks after; the others have their turn in the next.
const SOURCES_PER_POLL: usize = 256;

/// What an index may hold. At a bound the new thing is refused and counted; what is there stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexLimits {
    /// Key spaces, counted once per shard. At the bound, one without sources makes room; else frames of the new scope are
    /// refused.
    pub scopes: usize,
    /// Sources per scope and shard. At the bound, frames of new sources are refused.
    pub sources_per_scope: usize,
    /// Owners of all scopes. At the bound, blocks of new owners are refused and their source is degraded.
    pub owners: usize,
    /// Blocks of all scopes, counted once per owner. At the bound, new ones are refused and their source is degraded.
    pub blocks: usize,
    /// What repairs may take.
    pub recovery: RecoveryLimits,
}

/// One shard of a scope.
pub(crate) type PartId = (Scope, ShardId);

/// The map of who holds which block.
pub struct Index {
    limits: IndexLimits,
    /// How each tenant's keys are computed.
    keys: RwLock<Arc<TenantKeys>>,
    partition: Partition,
    /// By shard number, whether its frames are for us.
    owned: RwLock<Vec<bool>>,
    /// The owned shards of each scope that anybody has published in.
    scopes: RwLock<BTreeMap<PartId, Arc<ScopeIndex>>>,
    budget: Budget,
    /// Sources whose publishers may have to be asked, each once and shard, in the order of their turns.
    troubled: Mutex<VecDeque<(PartId, SourceId)>>,
    permits: Permits,
    next_request: AtomicU64,
}

// === impl IndexLimits ===

impl Default for IndexLimits {
    fn default() -> Self {
        Self {
            scopes: DEFAULT_MAX_SCOPES,
            sources_per_scope: DEFAULT_MAX_SOURCES_PER_SCOPE,
            owners: DEFAULT_MAX_OWNERS,
            blocks: DEFAULT_MAX_BLOCKS,
            recovery: RecoveryLimits::default(),
        }
    }
}

// === impl Index ===

impl Index {
    /// An empty index of the whole key space. `seed` must be the publishers' one: with another one, no prompt given as token
    /// ids matches.
    pub fn new(limits: IndexLimits, seed: KeySeed) -> Self {
        let index = Self::cut(limits, seed, Partition::WHOLE);
        index.own(&[ShardId::WHOLE]);
        index
    }

    /// An empty index of a key space that is cut, which owns none of its shards yet ([`Self::own`]).
    pub fn cut(limits: IndexLimits, seed: KeySeed, partition: Partition) -> Self {
        Self {
            partition,
            owned: RwLock::new(vec![false; usize::from(partition.shards())]),
            limits,
            keys: RwLock::new(Arc::new(TenantKeys::new(seed))),
            scopes: RwLock::default(),
            budget: Budget::new(limits),
            troubled: Mutex::default(),
            permits: Permits::new(limits.recovery.transfers),
            next_request: AtomicU64::new(1),
        }
    }

    /// How the key space is cut.
    pub fn partition(&self) -> Partition {
        self.partition
    }

    /// Owns exactly these shards from now on. What is known of others is dropped, and their frames are refused.
    pub fn own(&self, shards: &[ShardId]) {
        let mut owned = self.owned.write();
        owned.fill(false);
        for shard in shards.iter().filter(|shard| shard.of() == self.partition.shards()) {
            owned[usize::from(shard.number())] = true;
        }
        let mut dropped = Vec::new();
        self.scopes.write().retain(|(_, shard), part| {
            let keep = owned[usize::from(shard.number())];
            if !keep {
                dropped.push(Arc::clone(part));
            }
            keep
        });
        // Else who comes back with the shard would be in there twice.
        self.troubled.lock().retain(|((_, shard), _)| owned[usize::from(shard.number())]);
        drop(owned);
        dropped.iter().for_each(|part| part.empty(&self.budget));
    }

    /// Whether a shard is ours.
    pub fn owns(&self, shard: ShardId) -> bool {
        shard.of() == self.partition.shards()
            && self.owned.read().get(usize::from(shard.number())).copied().unwrap_or(false)
    }

    /// Tenants have these seeds from now on. Where a seed has changed, everything held of the tenant is dropped: its keys would
    /// never match again. Its publishers are asked for their state anew, whichever seed they use.
    pub fn replace_keys(&self, keys: TenantKeys) {
        let keys = Arc::new(keys);
        // Until this is let go nobody adds a scope, so none is made with the old root.
        let scopes = self.scopes.write();
        let before = std::mem::replace(&mut *self.keys.write(), Arc::clone(&keys));
        let root_of = |keys: &TenantKeys, scope: &Scope| keys.of(scope.tenant()).root();
        let changed: Vec<_> = scopes
            .iter()
            .filter(|((scope, _), _)| root_of(&before, scope) != root_of(&keys, scope))
            .map(|((scope, _), index)| (root_of(&keys, scope), Arc::clone(index)))
            .collect();
        drop(scopes);
        for (root, index) in changed {
            index.on_new_root(root, &self.budget);
        }
    }

    /// Applies a frame from the source's event subject, or says why not. `bytes` is what `frame` was parsed from: it may
    /// have to wait for frames before it.
    pub fn apply(&self, frame: &FrameView<'_>, bytes: &Bytes, now_ms: u64) -> Result<Applied, LimitReached> {
        let header = frame.header();
        let scope = self.find_or_add_part(&header.scope, header.shard)?;
        let bound = self.limits.sources_per_scope;
        let Some(applied) = scope.apply(frame, bytes, now_ms, bound, &self.budget) else {
            let (scope, source_id) = (header.scope.clone(), header.source.clone());
            return Err(LimitReached::Sources { scope, source_id, bound });
        };
        if matches!(applied.verdict, Some(Verdict::NewEpoch | Verdict::NewEpochHidden)) {
            self.leave_other_scopes(&header.source, &header.scope, header.shard);
        }
        self.note(header, &applied);
        Ok(applied)
    }

    /// Applies a frame that answers one of our questions. `None` if nobody asked about its source.
    pub fn on_reply(&self, frame: &FrameView<'_>, bytes: &Bytes, now_ms: u64) -> Option<Applied> {
        let header = frame.header();
        if matches!(header.part, FramePart::Live | FramePart::Start) {
            return self.apply(frame, bytes, now_ms).ok();
        }
        let scope = self.scopes.read().get(&(header.scope.clone(), header.shard)).cloned()?;
        let applied = scope.take_answer(frame, bytes, now_ms, &self.budget)?;
        self.note(header, &applied);
        Some(applied)
    }

    fn note(&self, header: &FrameHeader, applied: &Applied) {
        if applied.enqueue {
            let part = (header.scope.clone(), header.shard);
            self.troubled.lock().push_back((part, header.source.clone()));
        }
    }

    /// What is to be asked of publishers now. To be called every ten milliseconds or so while [`Self::is_troubled`].
    pub fn poll(&self, now_ms: u64) -> Vec<(SourceId, Request)> {
        let mut requests = Vec::new();
        let turns = self.troubled.lock().len().min(SOURCES_PER_POLL);
        for _ in 0..turns {
            let Some((part, source)) = self.troubled.lock().pop_front() else { break };
            let Some(index) = self.scopes.read().get(&part).cloned() else { continue };
            let id = RequestId(self.next_request.fetch_add(1, Ordering::Relaxed));
            let looked = index.look_after(&source, now_ms, &self.budget, &self.permits, id);
            requests.extend(looked.request.map(|request| (source.clone(), request)));
            if looked.again {
                self.troubled.lock().push_back((part, source));
            }
        }
        requests
    }

    /// True if publishers may have to be asked.
    pub fn is_troubled(&self) -> bool {
        !self.troubled.lock().is_empty()
    }

    /// A source publishes in one scope at a time: an engine that was restarted with another model, tenant or block size
    /// holds nothing of the old one.
    fn leave_other_scopes(&self, source: &SourceId, scope: &Scope, shard: ShardId) {
        let others: Vec<_> = {
            let scopes = self.scopes.read();
            let others = scopes.iter().filter(|((other, of), _)| other != scope && *of == shard);
            others.map(|(_, index)| Arc::clone(index)).collect()
        };
        for other in others {
            other.on_moved_away(source);
        }
    }

    fn find_or_add_part(&self, scope: &Scope, shard: ShardId) -> Result<Arc<ScopeIndex>, LimitReached> {
        let id = (scope.clone(), shard);
        if let Some(found) = self.scopes.read().get(&id) {
            return Ok(Arc::clone(found));
        }
        // Held until the part is there: a shard that is given up meanwhile would else come back.
        let owned = self.owned.read();
        let ours = shard.of() == self.partition.shards();
        if !ours || !owned.get(usize::from(shard.number())).copied().unwrap_or(false) {
            return Err(LimitReached::Shard { scope: id.0, shard });
        }
        let mut scopes = self.scopes.write();
        if scopes.len() >= self.limits.scopes && !scopes.contains_key(&id) {
            let unused = scopes.iter().find(|(_, index)| index.state.read().is_empty());
            let unused = unused.map(|(unused, _)| unused.clone());
            let Some(unused) = unused else {
                return Err(LimitReached::Scopes { scope: id.0, bound: self.limits.scopes });
            };
            // A frame that is on its way into it is lost; its source then has a gap and is asked for everything.
            scopes.remove(&unused);
        }
        let root = self.keys.read().of(scope.tenant()).root();
        let added = scopes.entry(id).or_insert_with(|| Arc::new(ScopeIndex::new(shard, root)));
        Ok(Arc::clone(added))
    }

    /// Ends leases and drops what has been gone for long. To be called about once a second.
    pub fn tick(&self, now_ms: u64) -> Vec<Expired> {
        let mut expired = Vec::new();
        for ((scope, shard), index) in self.parts_where(|_| true) {
            for (source, expiry) in index.tick(now_ms, &self.budget) {
                expired.push(Expired { scope: scope.clone(), shard, source, expiry });
            }
        }
        expired
    }

    /// Sources by model, tenant, block size, instance and rank.
    pub fn sources(&self, filter: &OwnerFilter, now_ms: u64) -> Vec<SourceInfo> {
        let mut out = Vec::new();
        for ((scope, _), index) in self.parts_where(|part| filter.admits_part(part)) {
            let state = index.state.read();
            for (_, source) in state.sources().filter(|(_, source)| filter.admits_source(&source.id)) {
                let owners = source.owners.iter().filter_map(|no| owner_info(&state, *no)).collect();
                out.push(SourceInfo {
                    scope: scope.clone(),
                    source: source.id.clone(),
                    epoch: source.tracker.epoch(),
                    applied_seq: source.tracker.applied_seq(),
                    state: source.tracker.state(),
                    verified_age_ms: source.tracker.verified_ms().map(|at| now_ms.saturating_sub(at)),
                    silent_ms: source.tracker.silent_ms(now_ms),
                    owners,
                });
            }
        }
        views::merge_sources(out)
    }

    /// The owners that a dump would go through, in the order of [`Self::sources`].
    pub fn dump(&self, filter: &OwnerFilter) -> Vec<DumpOwner> {
        let mut found = BTreeMap::new();
        for ((scope, _), index) in self.parts_where(|part| filter.admits_part(part)) {
            let state = index.state.read();
            for (_, source) in state.sources().filter(|(_, source)| filter.admits_source(&source.id)) {
                for (no, entry) in source.owners.iter().filter_map(|no| Some((*no, state.owner(*no)?))) {
                    let order =
                        (source.id.clone(), entry.tier.clone(), Arc::clone(&entry.medium), entry.group);
                    let owner = found.entry((scope.clone(), order)).or_insert_with(|| DumpOwner {
                        scope: scope.clone(),
                        owner: owner_ref(&source.id, entry),
                        parts: Vec::new(),
                    });
                    owner.parts.push((Arc::clone(&index), no));
                }
            }
        }
        found.into_values().collect()
    }

    /// The owner's keys now, ascending; empty if it is not there any more. Copies and sorts them all.
    pub fn keys_of(&self, owner: &DumpOwner) -> Vec<u64> {
        let mut keys = Vec::new();
        for (index, no) in &owner.parts {
            let state = index.state.read();
            // Its number may belong to somebody else by now.
            let same = state.owner(*no).is_some_and(|entry| {
                state.source(entry.source).is_some_and(|source| owner_ref(&source.id, entry) == owner.owner)
            });
            if same {
                keys.extend(state.keys_of(*no).into_iter().map(|key| key.0));
            }
        }
        keys.sort_unstable();
        keys
    }

    /// True while a publisher is known to live whose state is not known here yet.
    pub fn is_finding_out(&self, now_ms: u64) -> bool {
        let owned = self.owned.read();
        let ours = self.partition.all().filter(|shard| owned[usize::from(shard.number())]);
        let shards: Vec<_> = ours.collect();
        drop(owned);
        self.is_finding_out_of(&shards, now_ms)
    }

    /// The same for some shards. Who publishes in any shard of a scope publishes in all of them: what a checkpoint says of
    /// a source in one of them is not known as long as nothing was heard there, though the source be proved in another.
    pub fn is_finding_out_of(&self, shards: &[ShardId], now_ms: u64) -> bool {
        let mut living: BTreeMap<Scope, BTreeSet<SourceId>> = BTreeMap::new();
        for ((scope, _), index) in self.parts_where(|_| true) {
            let state = index.state.read();
            let known = state
                .sources()
                .filter(|(_, source)| source.tracker.counts() || source.tracker.needs_help(now_ms));
            living.entry(scope).or_default().extend(known.map(|(_, source)| source.id.clone()));
        }
        living.iter().any(|(scope, sources)| {
            shards.iter().any(|shard| {
                let Some(part) = self.part(scope, *shard) else { return !sources.is_empty() };
                let state = part.state.read();
                let known = state.sources().filter(|(_, source)| source.tracker.counts());
                let known: BTreeSet<&SourceId> = known.map(|(_, source)| &source.id).collect();
                sources.iter().any(|id| !known.contains(id))
            })
        })
    }

    /// Writes down what is held. Sources change while others are written; each is written as it is at one moment.
    pub fn write_checkpoint<W: Write + Seek>(&self, out: W) -> io::Result<(W, CheckpointSize)> {
        let mut writer = CheckpointWriter::new(out)?;
        for (part, index) in self.parts_where(|_| true) {
            for source in index.source_ids() {
                if let Some(saved) = index.save(&part, &source) {
                    writer.add(&saved)?;
                }
            }
        }
        writer.finish()
    }

    /// Takes in a checkpoint. Nothing of it counts before its publisher proved it. Sources that are known already keep
    /// what they have; at a bound of the index, what does not fit is left out.
    pub fn restore(&self, checkpoint: &[u8], now_ms: u64) -> Result<CheckpointSize, ReadCheckpointError> {
        let mut size = CheckpointSize { bytes: checkpoint.len() as u64, ..CheckpointSize::default() };
        for saved in checkpoint::read(checkpoint)? {
            let Ok(scope) = self.find_or_add_part(&saved.scope, saved.shard) else { continue };
            let bound = self.limits.sources_per_scope;
            if let Some(blocks) = scope.restore(&saved, now_ms, bound, &self.budget) {
                size.sources += 1;
                size.blocks += blocks;
            }
        }
        Ok(size)
    }

    /// Sizes now.
    pub fn totals(&self, now_ms: u64) -> IndexTotals {
        let mut totals = IndexTotals {
            verified_age_ms: Some(0),
            owners: self.budget.owners(),
            blocks: self.budget.entries(),
            ..IndexTotals::default()
        };
        let mut states: BTreeMap<(Scope, SourceId), SourceState> = BTreeMap::new();
        let mut scopes = BTreeSet::new();
        for ((scope, _), index) in self.parts_where(|_| true) {
            let state = index.state.read();
            let engine = state.engine.write();
            totals.distinct_blocks += engine.distinct();
            totals.engine_bytes += engine.bytes();
            drop(engine);
            for (_, source) in state.sources() {
                let (id, now) = ((scope.clone(), source.id.clone()), source.tracker.state());
                states.entry(id).and_modify(|all| *all = all.worse(now)).or_insert(now);
                if source.tracker.counts() {
                    let age = source.tracker.verified_ms().map(|at| now_ms.saturating_sub(at));
                    totals.verified_age_ms = totals.verified_age_ms.zip(age).map(|(a, b)| a.max(b));
                }
            }
            scopes.insert(scope);
        }
        totals.scopes = scopes.len();
        for state in states.into_values() {
            *totals.sources.entry(state).or_default() += 1;
        }
        totals
    }

    /// Says what is wrong if the parts of the index disagree. Walks everything; for tests and debugging, and only while
    /// no frame is being applied.
    pub fn check(&self) -> Result<(), String> {
        let mut entries = 0;
        for ((scope, shard), index) in self.parts_where(|_| true) {
            let state = index.state.read();
            state.check().map_err(|problem| format!("scope {scope}, shard {shard}: {problem}"))?;
            entries += state.engine.write().entries();
        }
        if entries != self.budget.entries() {
            return Err(format!("{entries} blocks in tables, {} counted", self.budget.entries()));
        }
        Ok(())
    }

    pub(crate) fn parts_where(&self, admit: impl Fn(&PartId) -> bool) -> Vec<(PartId, Arc<ScopeIndex>)> {
        let scopes = self.scopes.read();
        let admitted = scopes.iter().filter(|(part, _)| admit(part));
        admitted.map(|(id, index)| (id.clone(), Arc::clone(index))).collect()
    }

    /// The shards of one scope of which anything is known.
    pub(crate) fn part(&self, scope: &Scope, shard: ShardId) -> Option<Arc<ScopeIndex>> {
        self.scopes.read().get(&(scope.clone(), shard)).cloned()
    }

    /// The scopes of one model and tenant with what is known of each, smallest block size first.
    pub(crate) fn scopes_of(&self, model: &str, tenant: &str) -> Vec<(Scope, Vec<Arc<ScopeIndex>>)> {
        let end = |size| Scope::new(model, tenant, size, KEY_VERSION);
        // Scopes are ordered by model, tenant and then size. A name that no scope can have has no scopes.
        let (Ok(first), Ok(last)) = (end(1), end(MAX_BLOCK_SIZE)) else { return Vec::new() };
        let last_shard = self.partition.shard(u16::MAX);
        let scopes = self.scopes.read();
        let mut found: Vec<(Scope, Vec<Arc<ScopeIndex>>)> = Vec::new();
        for ((scope, _), index) in scopes.range((first, self.partition.shard(0))..=(last, last_shard)) {
            match found.last_mut().filter(|(same, _)| same == scope) {
                Some((_, parts)) => parts.push(Arc::clone(index)),
                None => found.push((scope.clone(), vec![Arc::clone(index)])),
            }
        }
        found
    }
}

fn owner_info(state: &ScopeState, no: OwnerNo) -> Option<OwnerInfo> {
    let owner = state.owner(no)?;
    let digest = state.digest_of(no);
    Some(OwnerInfo {
        tier: owner.tier.clone(),
        medium: owner.medium.to_string(),
        group: owner.group,
        kind: owner.kind,
        blocks: digest.count as usize,
        digest,
    })
}

fn owner_ref(source: &SourceId, entry: &OwnerEntry) -> OwnerRef {
    OwnerRef {
        source: source.clone(),
        tier: entry.tier.tier(),
        medium: entry.medium.to_string(),
        group: entry.group,
    }
}

#[cfg(test)]
#[path = "index_tests.rs"]
mod tests;
