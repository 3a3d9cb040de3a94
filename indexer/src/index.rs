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
use kvatlas_proto::{InstanceId, OwnerRef, Scope, SourceId};
use parking_lot::{Mutex, RwLock};

use crate::checkpoint::{self, CheckpointSize, CheckpointWriter, ReadCheckpointError};
use crate::held::RecoveryLimits;
use crate::matching::SourceMatch;
use crate::query::{ScoreAnswer, ScoreQuery, ScoreRow};
pub use crate::scope_index::Applied;
use crate::scope_index::{Budget, OwnerEntry, OwnerNo, ScopeIndex, ScopeState};
use crate::session::Permits;
use crate::sources::{SourceTracker, Verdict};
use crate::tenant_keys::TenantKeys;

mod views;

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
    /// Key spaces. At the bound, one without sources makes room; else frames of the new scope are refused.
    pub scopes: usize,
    /// Sources per scope. At the bound, frames of new sources are refused.
    pub sources_per_scope: usize,
    /// Owners of all scopes. At the bound, blocks of new owners are refused and their source is degraded.
    pub owners: usize,
    /// Blocks of all scopes, counted once per owner. At the bound, new ones are refused and their source is degraded.
    pub blocks: usize,
    /// What repairs may take.
    pub recovery: RecoveryLimits,
}

/// The map of who holds which block.
pub struct Index {
    limits: IndexLimits,
    /// How each tenant's keys are computed.
    keys: RwLock<Arc<TenantKeys>>,
    scopes: RwLock<BTreeMap<Scope, Arc<ScopeIndex>>>,
    budget: Budget,
    /// Sources whose publishers may have to be asked, each once, in the order of their turns.
    troubled: Mutex<VecDeque<(Scope, SourceId)>>,
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
    /// An empty index. `seed` must be the publishers' one: with another one, no prompt given as token ids matches.
    pub fn new(limits: IndexLimits, seed: KeySeed) -> Self {
        Self {
            limits,
            keys: RwLock::new(Arc::new(TenantKeys::new(seed))),
            scopes: RwLock::default(),
            budget: Budget::new(limits),
            troubled: Mutex::default(),
            permits: Permits::new(limits.recovery.transfers),
            next_request: AtomicU64::new(1),
        }
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
            .filter(|(scope, _)| root_of(&before, scope) != root_of(&keys, scope))
            .map(|(scope, index)| (root_of(&keys, scope), Arc::clone(index)))
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
        let scope = self.find_or_add_scope(&header.scope)?;
        let bound = self.limits.sources_per_scope;
        let Some(applied) = scope.apply(frame, bytes, now_ms, bound, &self.budget) else {
            let (scope, source_id) = (header.scope.clone(), header.source.clone());
            return Err(LimitReached::Sources { scope, source_id, bound });
        };
        if matches!(applied.verdict, Some(Verdict::NewEpoch | Verdict::NewEpochHidden)) {
            self.leave_other_scopes(&header.source, &header.scope);
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
        let scope = self.scopes.read().get(&header.scope).cloned()?;
        let applied = scope.take_answer(frame, bytes, now_ms, &self.budget)?;
        self.note(header, &applied);
        Some(applied)
    }

    fn note(&self, header: &FrameHeader, applied: &Applied) {
        if applied.enqueue {
            self.troubled.lock().push_back((header.scope.clone(), header.source.clone()));
        }
    }

    /// What is to be asked of publishers now. To be called every ten milliseconds or so while [`Self::is_troubled`].
    pub fn poll(&self, now_ms: u64) -> Vec<(SourceId, Request)> {
        let mut requests = Vec::new();
        let turns = self.troubled.lock().len().min(SOURCES_PER_POLL);
        for _ in 0..turns {
            let Some((scope, source)) = self.troubled.lock().pop_front() else { break };
            let Some(index) = self.scopes.read().get(&scope).cloned() else { continue };
            let id = RequestId(self.next_request.fetch_add(1, Ordering::Relaxed));
            let looked = index.look_after(&source, now_ms, &self.budget, &self.permits, id);
            requests.extend(looked.request.map(|request| (source.clone(), request)));
            if looked.again {
                self.troubled.lock().push_back((scope, source));
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
    fn leave_other_scopes(&self, source: &SourceId, scope: &Scope) {
        let others: Vec<_> = {
            let scopes = self.scopes.read();
            scopes.iter().filter(|(other, _)| *other != scope).map(|(_, index)| Arc::clone(index)).collect()
        };
        for other in others {
            other.on_moved_away(source);
        }
    }

    fn find_or_add_scope(&self, scope: &Scope) -> Result<Arc<ScopeIndex>, LimitReached> {
        if let Some(found) = self.scopes.read().get(scope) {
            return Ok(Arc::clone(found));
        }
        let mut scopes = self.scopes.write();
        if scopes.len() >= self.limits.scopes && !scopes.contains_key(scope) {
            let unused = scopes.iter().find(|(_, index)| index.state.read().is_empty());
            let unused = unused.map(|(unused, _)| unused.clone());
            let Some(unused) = unused else {
                return Err(LimitReached::Scopes { scope: scope.clone(), bound: self.limits.scopes });
            };
            // A frame that is on its way into it is lost; its source then has a gap and is asked for everything.
            scopes.remove(&unused);
        }
        let root = || self.keys.read().of(scope.tenant()).root();
        let index = scopes.entry(scope.clone()).or_insert_with(|| Arc::new(ScopeIndex::new(root())));
        Ok(Arc::clone(index))
    }

    /// Ends leases and drops what has been gone for long. To be called about once a second.
    pub fn tick(&self, now_ms: u64) -> Vec<Expired> {
        let mut expired = Vec::new();
        for (scope, index) in self.scopes_where(|_| true) {
            for (source, expiry) in index.tick(now_ms, &self.budget) {
                expired.push(Expired { scope: scope.clone(), source, expiry });
            }
        }
        expired
    }

    /// Who holds how much of a prompt.
    pub fn score(&self, query: &ScoreQuery<'_>) -> Result<ScoreAnswer, BlockSizeMismatch> {
        let of_model = self.scopes_of(query.model, query.tenant);
        let (asked, others): (Vec<_>, Vec<_>) = of_model
            .iter()
            .partition(|(scope, _)| query.block_size.is_none_or(|size| scope.block_size() == size));
        if let Some(asked_size) = query.block_size {
            refuse_unused_size(query.model, asked_size, &asked, &others)?;
        }
        let candidates: BTreeSet<&str> = query.candidates.iter().map(String::as_str).collect();
        // A name that is not even valid was never in an event; it stays among the unknown below.
        let instances: Vec<InstanceId> =
            candidates.iter().filter_map(|name| InstanceId::new(*name).ok()).collect();
        let mut rows = Vec::new();
        let keys = Arc::clone(&self.keys.read());
        let hasher = keys.of(query.tenant);
        // With candidates of which none is valid there is nothing to look up; an empty list would ask for everybody.
        if candidates.is_empty() || !instances.is_empty() {
            for (scope, index) in &asked {
                let size = scope.block_size();
                let variants: Vec<_> = index.state.read().variants().collect();
                let chains = query.input.chains(hasher, size, &variants);
                index.state.read().score(query, &instances, size, &chains, &mut rows);
            }
        }
        add_unmatched(&candidates, &others, &mut rows);
        let sizes = || rows.iter().map(|row| row.block_size).filter(|size| *size > 0);
        let smallest = sizes().min().or_else(|| asked.iter().map(|(scope, _)| scope.block_size()).min());
        let prompt_blocks = smallest.or(query.block_size).map_or(0, |size| query.input.blocks(size));
        rows.sort_by(|a, b| {
            b.score
                .total_cmp(&a.score)
                .then_with(|| a.instance.cmp(&b.instance))
                .then_with(|| (a.rank, a.block_size).cmp(&(b.rank, b.block_size)))
        });
        rows.truncate(query.limit.unwrap_or(usize::MAX));
        Ok(ScoreAnswer { rows, scope_known: !of_model.is_empty(), prompt_blocks })
    }

    /// Sources by model, tenant, block size, instance and rank.
    pub fn sources(&self, filter: &OwnerFilter, now_ms: u64) -> Vec<SourceInfo> {
        let mut out = Vec::new();
        for (scope, index) in self.scopes_where(|scope| filter.admits_scope(scope)) {
            let state = index.state.read();
            for (_, source) in state.sources().filter(|(_, source)| filter.admits_source(&source.id)) {
                let mut owners: Vec<OwnerInfo> =
                    source.owners.iter().filter_map(|no| owner_info(&state, *no)).collect();
                owners.sort_by(|a, b| (&a.tier, &a.medium, a.group).cmp(&(&b.tier, &b.medium, b.group)));
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
        out
    }

    /// The owners that a dump would go through, in the order of [`Self::sources`].
    pub fn dump(&self, filter: &OwnerFilter) -> Vec<DumpOwner> {
        let mut out = Vec::new();
        for (scope, index) in self.scopes_where(|scope| filter.admits_scope(scope)) {
            let state = index.state.read();
            for (_, source) in state.sources().filter(|(_, source)| filter.admits_source(&source.id)) {
                let mut owners: Vec<(OwnerNo, &OwnerEntry)> =
                    source.owners.iter().filter_map(|no| Some((*no, state.owner(*no)?))).collect();
                owners.sort_by(|(_, a), (_, b)| {
                    (&a.tier, &a.medium, a.group).cmp(&(&b.tier, &b.medium, b.group))
                });
                out.extend(owners.into_iter().map(|(no, entry)| DumpOwner {
                    scope: scope.clone(),
                    owner: owner_ref(&source.id, entry),
                    index: Arc::clone(&index),
                    no,
                }));
            }
        }
        out
    }

    /// The owner's keys now, ascending; empty if it is not there any more. Copies and sorts them all.
    pub fn keys_of(&self, owner: &DumpOwner) -> Vec<u64> {
        let mut keys: Vec<u64> = {
            let state = owner.index.state.read();
            // Its number may belong to somebody else by now.
            let same = state.owner(owner.no).is_some_and(|entry| {
                state.source(entry.source).is_some_and(|source| owner_ref(&source.id, entry) == owner.owner)
            });
            if same { state.keys_of(owner.no).into_iter().map(|key| key.0).collect() } else { Vec::new() }
        };
        keys.sort_unstable();
        keys
    }

    /// True while a publisher is known to live whose state is not known here yet.
    pub fn is_finding_out(&self, now_ms: u64) -> bool {
        self.scopes_where(|_| true).iter().any(|(_, index)| {
            let state = index.state.read();
            state.sources().any(|(_, source)| !source.tracker.counts() && source.tracker.needs_help(now_ms))
        })
    }

    /// Writes down what is held. Sources change while others are written; each is written as it is at one moment.
    pub fn write_checkpoint<W: Write + Seek>(&self, out: W) -> io::Result<(W, CheckpointSize)> {
        let mut writer = CheckpointWriter::new(out)?;
        for (scope, index) in self.scopes_where(|_| true) {
            for source in index.source_ids() {
                if let Some(saved) = index.save(&scope, &source) {
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
            let Ok(scope) = self.find_or_add_scope(&saved.scope) else { continue };
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
        for (_, index) in self.scopes_where(|_| true) {
            let state = index.state.read();
            totals.scopes += 1;
            totals.distinct_blocks += state.engine.write().distinct();
            for (_, source) in state.sources() {
                *totals.sources.entry(source.tracker.state()).or_default() += 1;
                if source.tracker.counts() {
                    let age = source.tracker.verified_ms().map(|at| now_ms.saturating_sub(at));
                    totals.verified_age_ms = totals.verified_age_ms.zip(age).map(|(a, b)| a.max(b));
                }
            }
        }
        totals
    }

    /// Says what is wrong if the parts of the index disagree. Walks everything; for tests and debugging, and only while
    /// no frame is being applied.
    pub fn check(&self) -> Result<(), String> {
        let mut entries = 0;
        for (scope, index) in self.scopes_where(|_| true) {
            let state = index.state.read();
            state.check().map_err(|problem| format!("scope {scope}: {problem}"))?;
            entries += state.engine.write().entries();
        }
        if entries != self.budget.entries() {
            return Err(format!("{entries} blocks in tables, {} counted", self.budget.entries()));
        }
        Ok(())
    }

    fn scopes_where(&self, admit: impl Fn(&Scope) -> bool) -> Vec<(Scope, Arc<ScopeIndex>)> {
        let scopes = self.scopes.read();
        scopes
            .iter()
            .filter(|(scope, _)| admit(scope))
            .map(|(scope, index)| (scope.clone(), Arc::clone(index)))
            .collect()
    }

    /// The scopes of one model and tenant, smallest block size first.
    fn scopes_of(&self, model: &str, tenant: &str) -> Vec<(Scope, Arc<ScopeIndex>)> {
        let end = |size| Scope::new(model, tenant, size, KEY_VERSION);
        // Scopes are ordered by model, tenant and then size. A name that no scope can have has no scopes.
        let (Ok(first), Ok(last)) = (end(1), end(MAX_BLOCK_SIZE)) else { return Vec::new() };
        let scopes = self.scopes.read();
        scopes.range(first..=last).map(|(scope, index)| (scope.clone(), Arc::clone(index))).collect()
    }
}

type Scopes<'a> = [&'a (Scope, Arc<ScopeIndex>)];

/// Engines count, not memories of engines: a scope without sources refuses nobody.
fn refuse_unused_size(
    model: &str,
    asked_size: u32,
    asked: &Scopes<'_>,
    others: &Scopes<'_>,
) -> Result<(), BlockSizeMismatch> {
    let used = |(_, index): &&(Scope, Arc<ScopeIndex>)| !index.state.read().is_empty();
    let in_use: Vec<u32> = others.iter().copied().filter(used).map(|(scope, _)| scope.block_size()).collect();
    if in_use.is_empty() || asked.iter().copied().any(|scope| used(&scope)) {
        return Ok(());
    }
    Err(BlockSizeMismatch { model: model.to_owned(), asked: asked_size, in_use })
}

/// Rows for candidates without one: known only at another block size, or not at all.
fn add_unmatched(candidates: &BTreeSet<&str>, others: &Scopes<'_>, rows: &mut Vec<ScoreRow>) {
    if candidates.is_empty() {
        return;
    }
    let answered: BTreeSet<String> = rows.iter().map(|row| row.instance.clone()).collect();
    for name in candidates.iter().filter(|name| !answered.contains(**name)) {
        let before = rows.len();
        let empty = |rank, tracker: Option<&SourceTracker>, block_size| ScoreRow {
            instance: (*name).to_owned(),
            rank,
            state: tracker.map(SourceTracker::state),
            verified_ms: tracker.and_then(SourceTracker::verified_ms),
            block_size,
            score: 0.0,
            matched: SourceMatch::default(),
        };
        if let Ok(instance) = InstanceId::new(*name) {
            for (scope, index) in others {
                let state = index.state.read();
                let known = state.ranks_of(&instance).filter_map(|no| state.source(no));
                rows.extend(
                    known.map(|source| empty(source.id.rank.0, Some(&source.tracker), scope.block_size())),
                );
            }
        }
        if rows.len() == before {
            rows.push(empty(0, None, 0));
        }
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
