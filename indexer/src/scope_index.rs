//! One scope: its sources, their owners and its table, and how a frame changes them.
//!
//! Locking. `writer` serialises changes; `state` is what queries read. A change that is large (an answer about a state,
//! the blocks of an owner that was cleared) gives the state lock away every [`SLICE_KEYS`] keys so that no query
//! waits for all of it. What a query may see in between is stated where it happens:
//!
//! * a live frame is applied in one step: a block that moves between tiers is never in neither;
//! * a cleared owner is empty at once: it gets a fresh number, and the old number's blocks are taken out afterwards,
//!   unreachable because no owner has that number any more;
//! * a state that was transferred changes in place, key by key: of a source that counts, each key is either as it was or as
//!   it should be, and the source says that it is degraded; a source that is not proved does not count at all.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use kvatlas_proto::frame::{FrameHeader, FrameOwner, FrameView, MAX_FRAME_OWNERS};
use kvatlas_proto::keys::KeyVariant;
use kvatlas_proto::request::{Request, RequestId, Want};
use kvatlas_proto::{BlockKey, CacheGroup, Digest, GroupKind, ShardId, SourceId};
use parking_lot::{Mutex, RwLock, RwLockWriteGuard};

use crate::changes::{Retired, SourceChange, buckets_of, purge};
use crate::engine::{self, Engine, Holder, MAX_HOLDERS, Stored};
use crate::held::RecoveryLimits;
use crate::index::IndexLimits;
use crate::matching::TierName;
use crate::session::{OwnerName, Permits, Session};
use crate::slots::Slots;
use crate::sources::{Ask, Expiry, SourceState, SourceTracker, Verdict};

mod saved;

/// What all scopes together may hold, and do.
#[derive(Debug)]
pub(crate) struct Budget {
    pub(crate) max_entries: usize,
    pub(crate) max_owners: usize,
    pub(crate) recovery: RecoveryLimits,
    entries: AtomicUsize,
    owners: AtomicUsize,
}

/// One shard of a scope (the whole of it, where the key space is not cut) with its locks.
#[derive(Debug)]
pub(crate) struct ScopeIndex {
    /// Which part of the scope this is.
    pub(crate) shard: ShardId,
    /// Taken before `state` by everything that changes it, and held while `state` is let go in between.
    writer: Mutex<()>,
    pub(crate) state: RwLock<ScopeState>,
}

/// Number of an owner inside one scope, which is what the engine knows of it.
pub(crate) type OwnerNo = Holder;

/// Number of a source inside one scope.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SourceNo(u32);

#[derive(Debug)]
pub(crate) struct ScopeState {
    /// The key before every prompt's first one: it follows from the tenant's seed.
    root: BlockKey,
    pub(crate) engine: Engine,
    ids: BTreeMap<SourceId, SourceNo>,
    sources: Slots<SourceEntry>,
    owners: Slots<OwnerEntry>,
    /// How many sources shape their keys in each way.
    variants: BTreeMap<KeyVariant, usize>,
    /// Sources that are neither live nor verified.
    doubtful: BTreeSet<SourceNo>,
    /// Sources that hold blocks in no full group: they may match behind a block that nobody holds.
    without_full: usize,
}

#[derive(Debug)]
pub(crate) struct SourceEntry {
    pub(crate) id: SourceId,
    pub(crate) tracker: SourceTracker,
    pub(crate) variant: KeyVariant,
    pub(crate) owners: Vec<OwnerNo>,
}

#[derive(Clone, Debug)]
pub(crate) struct OwnerEntry {
    pub(crate) source: SourceNo,
    pub(crate) tier: TierName,
    /// The engine's name of the medium, for every tier.
    pub(crate) medium: Arc<str>,
    pub(crate) group: CacheGroup,
    pub(crate) kind: GroupKind,
    pub(crate) load_blocks: u32,
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Applied {
    /// What the source's state machine said; `None` for an answer about a state.
    pub verdict: Option<Verdict>,
    /// Frames that were applied: this one, and those that waited for it.
    pub frames: usize,
    /// State before the frame; `None` for a source that was not known.
    pub before: Option<SourceState>,
    /// State after the frame.
    pub after: SourceState,
    /// True if frames of the source are missing now.
    pub has_gap: bool,
    /// Whether digests were compared, and were equal.
    pub compared: Option<bool>,
    /// Whether a transfer of the state was completed, and led to equal digests.
    pub transferred: Option<bool>,
    /// Blocks that an owner did not hold before.
    pub stored: usize,
    /// Blocks that an owner does not hold any more, cleared ones included.
    pub removed: usize,
    /// Blocks that were not stored because a bound was reached.
    pub refused_blocks: usize,
    /// Owners that were not taken in because a bound was reached.
    pub refused_owners: usize,
    /// The source has to be looked at by [`crate::Index::poll`] from now on.
    pub(crate) enqueue: bool,
}

/// What came of looking after a source.
pub(crate) struct Looked {
    pub(crate) request: Option<Request>,
    /// It has to be looked after again.
    pub(crate) again: bool,
}

// === impl Budget ===

impl Budget {
    pub(crate) fn new(limits: IndexLimits) -> Self {
        let none = || AtomicUsize::new(0);
        let IndexLimits { blocks, owners, recovery, .. } = limits;
        Self { max_entries: blocks, max_owners: owners, recovery, entries: none(), owners: none() }
    }

    pub(crate) fn entries(&self) -> usize {
        self.entries.load(Ordering::Relaxed)
    }

    pub(crate) fn owners(&self) -> usize {
        self.owners.load(Ordering::Relaxed)
    }

    pub(crate) fn give_back_entries(&self, count: usize) {
        self.entries.fetch_sub(count, Ordering::Relaxed);
    }

    pub(crate) fn take_entries(&self, count: usize) -> bool {
        Self::take(&self.entries, self.max_entries, count)
    }

    fn take(taken: &AtomicUsize, bound: usize, count: usize) -> bool {
        let more = |now: usize| Some(now + count).filter(|sum| *sum <= bound);
        taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }
}

// === impl Applied ===

impl Applied {
    fn new(before: Option<SourceState>) -> Self {
        Self {
            verdict: None,
            frames: 0,
            before,
            after: before.unwrap_or(SourceState::Syncing),
            has_gap: false,
            compared: None,
            transferred: None,
            stored: 0,
            removed: 0,
            refused_blocks: 0,
            refused_owners: 0,
            enqueue: false,
        }
    }
}

// === impl ScopeIndex ===

impl ScopeIndex {
    /// An empty part whose prompts begin after `root`.
    pub(crate) fn new(shard: ShardId, root: BlockKey) -> Self {
        Self { shard, writer: Mutex::default(), state: RwLock::new(ScopeState::new(root)) }
    }

    /// Forgets everything: the shard is somebody else's now.
    pub(crate) fn empty(&self, budget: &Budget) {
        let _writer = self.writer.lock();
        let mut state = self.state.write();
        budget.give_back_entries(state.engine.write().entries());
        let owners = state.sources().map(|(_, source)| source.owners.len()).sum();
        budget.owners.fetch_sub(owners, Ordering::Relaxed);
        *state = ScopeState::new(state.root);
    }

    /// The tenant has another seed: what is held has keys that no prompt will have again. Publishers that still use the old
    /// seed are taken in anew, and match nothing.
    pub(crate) fn on_new_root(&self, root: BlockKey, budget: &Budget) {
        let _writer = self.writer.lock();
        let sources: Vec<SourceNo> = self.state.read().sources().map(|(no, _)| no).collect();
        for no in sources {
            let mut state = self.state.write();
            let retired = state.retire_owners(no, budget);
            state.drop_source(no);
            purge(&mut state, retired);
        }
        self.state.write().root = root;
    }

    /// Applies a frame of this shard. `None` if its source is new and there are `max_sources` already.
    pub(crate) fn apply(
        &self,
        frame: &FrameView<'_>,
        bytes: &Bytes,
        now_ms: u64,
        max_sources: usize,
        budget: &Budget,
    ) -> Option<Applied> {
        let _writer = self.writer.lock();
        let mut state = self.state.write();
        let (no, before) = state.find_or_add_source(frame.header(), now_ms, max_sources, budget.recovery)?;
        let mut change = SourceChange::new(state, no, budget, now_ms, Applied::new(before));
        change.take(frame, bytes);
        Some(change.finish())
    }

    /// Takes an answer about a source's state. `None` if the source is not known.
    pub(crate) fn take_answer(
        &self,
        frame: &FrameView<'_>,
        bytes: &Bytes,
        now_ms: u64,
        budget: &Budget,
    ) -> Option<Applied> {
        let _writer = self.writer.lock();
        let state = self.state.write();
        let no = *state.ids.get(&frame.header().source)?;
        let before = state.source(no).map(|source| source.tracker.state());
        let mut change = SourceChange::new(state, no, budget, now_ms, Applied::new(before));
        change.take_piece(frame, bytes);
        Some(change.finish())
    }

    /// What is to be asked of a source's publisher now.
    pub(crate) fn look_after(
        &self,
        source: &SourceId,
        now_ms: u64,
        budget: &Budget,
        permits: &Permits,
        id: RequestId,
    ) -> Looked {
        let none = |again| Looked { request: None, again };
        let _writer = self.writer.lock();
        let mut state = self.state.write();
        let Some(no) = state.ids.get(source).copied() else { return none(false) };
        let Some(entry) = state.source_mut(no) else { return none(false) };
        let ask = entry.tracker.ask(now_ms);
        entry.tracker.queued = entry.tracker.needs_help(now_ms);
        let (again, epoch) = (entry.tracker.queued, entry.tracker.epoch());
        let (Some(ask), Some(epoch)) = (ask, epoch) else { return none(again) };
        let want = match ask {
            Ask::Frames(ranges) => Want::Frames(ranges),
            Ask::State => {
                let before = Applied::new(Some(entry.tracker.state()));
                let mut change = SourceChange::new(state, no, budget, now_ms, before);
                // What an earlier question brought need not be asked for again.
                change.apply_staged();
                let Some(want) = self.ask_for_state(change, permits, id) else { return none(again) };
                want
            }
        };
        Looked { request: Some(Request { id, epoch, shard: self.shard, want }), again }
    }

    fn ask_for_state(&self, change: SourceChange<'_>, permits: &Permits, id: RequestId) -> Option<Want> {
        let SourceChange { mut state, no, now_ms, retired, .. } = change;
        purge(&mut state, retired);
        state.source_mut(no)?.tracker.end_session();
        let permit = permits.take()?;
        // Summing up a million blocks takes milliseconds, and queries only read. The writer's lock keeps the content.
        let reading = RwLockWriteGuard::downgrade(state);
        let owners = buckets_of(&reading, no);
        drop(reading);
        let bits = owners.iter().map(|owner| {
            let name = OwnerName { tier: owner.tier, medium: owner.medium.clone(), group: owner.group };
            (name, owner.buckets.bits())
        });
        let session = Session::new(id, bits.collect(), permit, now_ms);
        self.state.write().source_mut(no)?.tracker.on_asked_for_state(session, now_ms);
        Some(Want::State(owners))
    }

    /// Ends leases. Returns what happened to whom.
    pub(crate) fn tick(&self, now_ms: u64, budget: &Budget) -> Vec<(SourceId, Expiry)> {
        let _writer = self.writer.lock();
        // Nothing expires in most ticks: look without disturbing queries. The writer lock keeps this true until below.
        let due: Vec<SourceNo> = {
            let state = self.state.read();
            state
                .sources()
                .filter(|(_, source)| source.tracker.expires(now_ms).is_some())
                .map(|(no, _)| no)
                .collect()
        };
        let mut expired = Vec::with_capacity(due.len());
        for no in due {
            let mut state = self.state.write();
            let Some(source) = state.sources.get_mut(no.0) else { continue };
            let Some(expiry) = source.tracker.on_tick(now_ms) else { continue };
            expired.push((source.id.clone(), expiry));
            if expiry == Expiry::Dropped {
                let retired = state.retire_owners(no, budget);
                state.drop_source(no);
                purge(&mut state, retired);
            }
            state.note_trust(no);
        }
        expired
    }

    /// `source` started an epoch in another scope.
    pub(crate) fn on_moved_away(&self, source: &SourceId) {
        if !self.state.read().ids.contains_key(source) {
            return;
        }
        let _writer = self.writer.lock();
        let mut state = self.state.write();
        if let Some(no) = state.ids.get(source).copied()
            && let Some(entry) = state.sources.get_mut(no.0)
        {
            entry.tracker.on_moved_away();
            state.note_trust(no);
        }
    }
}

// === impl ScopeState ===

impl ScopeState {
    fn new(root: BlockKey) -> Self {
        Self {
            root,
            engine: Engine::default(),
            ids: BTreeMap::new(),
            sources: Slots::default(),
            owners: Slots::default(),
            variants: BTreeMap::new(),
            doubtful: BTreeSet::new(),
            without_full: 0,
        }
    }

    /// The source's number and its state; `None` for the state of a new one.
    fn find_or_add_source(
        &mut self,
        header: &FrameHeader,
        now_ms: u64,
        max_sources: usize,
        recovery: RecoveryLimits,
    ) -> Option<(SourceNo, Option<SourceState>)> {
        if let Some(no) = self.ids.get(&header.source).copied() {
            let before = self.sources.get(no.0).map(|source| source.tracker.state());
            return Some((no, before));
        }
        if self.ids.len() >= max_sources {
            return None;
        }
        let entry = SourceEntry {
            id: header.source.clone(),
            tracker: SourceTracker::new(now_ms).bounded_by(recovery),
            variant: header.variant,
            owners: Vec::new(),
        };
        Some((self.add_source(entry), None))
    }

    fn add_source(&mut self, entry: SourceEntry) -> SourceNo {
        let (id, variant) = (entry.id.clone(), entry.variant);
        let no = SourceNo(self.sources.insert(entry));
        self.ids.insert(id, no);
        self.note_trust(no);
        *self.variants.entry(variant).or_default() += 1;
        no
    }

    fn drop_source(&mut self, no: SourceNo) {
        if let Some(source) = self.sources.take(no.0) {
            self.sources.recycle(no.0);
            self.ids.remove(&source.id);
            self.forget_variant(source.variant);
        }
    }

    /// A source's keys are shaped anew only with an epoch: within one, old and new keys would not fit together.
    pub(crate) fn set_variant(&mut self, no: SourceNo, variant: KeyVariant) {
        let Some(source) = self.sources.get_mut(no.0) else { return };
        let old = std::mem::replace(&mut source.variant, variant);
        *self.variants.entry(variant).or_default() += 1;
        self.forget_variant(old);
    }

    fn forget_variant(&mut self, variant: KeyVariant) {
        if let Some(count) = self.variants.get_mut(&variant) {
            *count -= 1;
            if *count == 0 {
                self.variants.remove(&variant);
            }
        }
    }

    /// The source's owner of this name.
    pub(crate) fn find_owner(&self, source: &SourceEntry, owner: &FrameOwner) -> Option<OwnerNo> {
        source.owners.iter().copied().find(|known| {
            self.owners.get(known.0).is_some_and(|entry| {
                entry.tier.tier() == owner.tier
                    && *entry.medium == *owner.medium
                    && entry.group == owner.group
            })
        })
    }

    /// `None` if a bound was reached.
    pub(crate) fn find_or_add_owner(
        &mut self,
        no: SourceNo,
        owner: &FrameOwner,
        budget: &Budget,
    ) -> Option<OwnerNo> {
        let source = self.sources.get(no.0)?;
        let known = self.find_owner(source, owner);
        let full_before = self.lacks_full(no);
        let found = if let Some(known) = known {
            if let Some(entry) = self.owners.get_mut(known.0) {
                entry.kind = owner.kind;
                entry.load_blocks = owner.load_blocks;
            }
            known
        } else {
            let has_number = self.owners.has_free() || self.owners.bound() < MAX_HOLDERS as usize;
            if source.owners.len() >= MAX_FRAME_OWNERS
                || !has_number
                || !Budget::take(&budget.owners, budget.max_owners, 1)
            {
                return None;
            }
            let tier = TierName::new(owner.tier, &owner.medium);
            let medium = owner.medium.as_str().into();
            let entry = OwnerEntry {
                source: no,
                tier,
                medium,
                group: owner.group,
                kind: owner.kind,
                load_blocks: owner.load_blocks,
            };
            let added = Holder(self.owners.insert(entry));
            self.sources.get_mut(no.0)?.owners.push(added);
            added
        };
        self.count_full(full_before, self.lacks_full(no));
        Some(found)
    }

    /// `owner` holds these consecutive blocks from now on, as far as the bounds allow.
    pub(crate) fn store(
        &mut self,
        owner: OwnerNo,
        parent: BlockKey,
        keys: &[BlockKey],
        budget: &Budget,
    ) -> Stored {
        let parent = (parent != self.root).then_some(parent);
        let mut engine = self.engine.write();
        if budget.take_entries(keys.len()) {
            let stored = engine.store(owner, parent, keys);
            budget.give_back_entries(keys.len() - stored.new);
            return stored;
        }
        // Near the bound, one by one: what is held already needs no room.
        let (mut all, mut before) = (Stored::default(), parent);
        for key in keys {
            if budget.take_entries(1) {
                let stored = engine.store(owner, before, std::slice::from_ref(key));
                budget.give_back_entries(1 - stored.new);
                all.new += stored.new;
                all.refused += stored.refused;
            } else if !engine.holds(owner, *key) {
                all.refused += 1;
            }
            before = Some(*key);
        }
        all
    }

    /// What an owner's blocks look like from far away.
    pub(crate) fn digest_of(&self, owner: OwnerNo) -> Digest {
        self.engine.write().digest_of(owner)
    }

    /// The keys of an owner, in no particular order.
    pub(crate) fn keys_of(&self, owner: OwnerNo) -> Vec<BlockKey> {
        let mut keys = Vec::new();
        self.engine.write().keys_of(owner, |_, key| keys.push(key));
        keys
    }

    /// The blocks of an owner as (parent, key); parents before children within a stretch.
    pub(crate) fn blocks_with_parents(&self, owner: OwnerNo) -> Vec<(BlockKey, BlockKey)> {
        let mut blocks = Vec::new();
        self.engine.write().keys_of(owner, |parent, key| blocks.push((parent.unwrap_or(self.root), key)));
        blocks
    }

    /// Empties an owner by giving it a new number. Returns that and the blocks of the old one, to be purged.
    pub(crate) fn empty_owner(
        &mut self,
        old: OwnerNo,
        budget: &Budget,
    ) -> Option<(OwnerNo, engine::Retired)> {
        let entry = self.owners.take(old.0)?;
        let source = entry.source;
        let fresh = Holder(self.owners.insert(entry));
        let owners = &mut self.sources.get_mut(source.0)?.owners;
        owners.iter_mut().filter(|owner| **owner == old).for_each(|owner| *owner = fresh);
        let retired = self.engine.write().retire(old);
        budget.give_back_entries(retired.blocks());
        Some((fresh, retired))
    }

    /// Takes all owners away from a source. Their blocks count as gone and are to be purged.
    pub(crate) fn retire_owners(&mut self, no: SourceNo, budget: &Budget) -> Retired {
        let full_before = self.lacks_full(no);
        let Some(source) = self.sources.get_mut(no.0) else { return Retired::new() };
        let numbers = std::mem::take(&mut source.owners);
        self.count_full(full_before, false);
        budget.owners.fetch_sub(numbers.len(), Ordering::Relaxed);
        let mut retired = Retired::with_capacity(numbers.len());
        for owner in numbers {
            self.owners.take(owner.0);
            let blocks = self.engine.write().retire(owner);
            budget.give_back_entries(blocks.blocks());
            retired.push(blocks);
        }
        retired
    }

    fn lacks_full(&self, no: SourceNo) -> bool {
        let owners = self.sources.get(no.0).map_or(&[][..], |source| &source.owners);
        let full =
            |owner: &OwnerNo| self.owners.get(owner.0).is_some_and(|entry| entry.kind == GroupKind::Full);
        !owners.is_empty() && !owners.iter().any(full)
    }

    fn count_full(&mut self, before: bool, after: bool) {
        self.without_full = self.without_full + usize::from(after) - usize::from(before);
    }

    /// True if every source that holds something has a full group, so that no match reaches beyond a block that
    /// nobody holds.
    pub(crate) fn runs_only(&self) -> bool {
        self.without_full == 0
    }

    /// The ways in which sources shape their keys.
    pub(crate) fn variants(&self) -> impl Iterator<Item = KeyVariant> + '_ {
        self.variants.keys().copied()
    }

    /// Sources by instance and rank.
    pub(crate) fn sources(&self) -> impl Iterator<Item = (SourceNo, &SourceEntry)> {
        self.ids.values().filter_map(|no| Some((*no, self.source(*no)?)))
    }

    /// The ranks of one instance, ascending.
    pub(crate) fn ranks_of<'a>(
        &'a self,
        instance: &'a kvatlas_proto::InstanceId,
    ) -> impl Iterator<Item = SourceNo> + 'a {
        let first = SourceId { instance: instance.clone(), rank: kvatlas_proto::DpRank(0) };
        self.ids.range(first..).take_while(move |(id, _)| id.instance == *instance).map(|(_, no)| *no)
    }

    /// Whom not to rely on, in no particular order.
    pub(crate) fn doubtful(&self) -> impl Iterator<Item = &SourceEntry> {
        self.doubtful.iter().filter_map(|no| self.source(*no))
    }

    /// Keeps [`Self::doubtful`] right after a source may have changed its state.
    pub(crate) fn note_trust(&mut self, no: SourceNo) {
        let state = self.source(no).map(|source| source.tracker.state());
        if state.is_none_or(|state| matches!(state, SourceState::Live | SourceState::Verified)) {
            self.doubtful.remove(&no);
        } else {
            self.doubtful.insert(no);
        }
    }

    pub(crate) fn source(&self, no: SourceNo) -> Option<&SourceEntry> {
        self.sources.get(no.0)
    }

    pub(crate) fn source_mut(&mut self, no: SourceNo) -> Option<&mut SourceEntry> {
        self.sources.get_mut(no.0)
    }

    /// Allows the number of an owner that was emptied to be used again.
    pub(crate) fn recycle_owner(&mut self, no: OwnerNo) {
        self.owners.recycle(no.0);
    }

    pub(crate) fn owner(&self, no: OwnerNo) -> Option<&OwnerEntry> {
        self.owners.get(no.0)
    }

    /// Owner numbers are below this.
    pub(crate) fn owner_bound(&self) -> usize {
        self.owners.bound()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Says what is wrong if the parts disagree. For tests and debugging.
    pub(crate) fn check(&self) -> Result<(), String> {
        let engine = self.engine.write();
        engine.check()?;
        let mut blocks = 0;
        for (no, source) in self.sources() {
            for owner in &source.owners {
                match self.owner(*owner) {
                    Some(entry) if entry.source == no => blocks += engine.blocks_of(*owner),
                    other => return Err(format!("{} has {owner:?}, which is {other:?}", source.id)),
                }
            }
        }
        if blocks != engine.entries() {
            return Err(format!("sources have {blocks} blocks, the engine {}", engine.entries()));
        }
        let lacking = self.sources().filter(|(no, _)| self.lacks_full(*no)).count();
        if lacking != self.without_full {
            return Err(format!("{lacking} sources lack a full group, {} counted", self.without_full));
        }
        for (no, source) in self.sources() {
            let relied = matches!(source.tracker.state(), SourceState::Live | SourceState::Verified);
            if relied == self.doubtful.contains(&no) {
                return Err(format!("{} is {:?}, and noted otherwise", source.id, source.tracker.state()));
            }
        }
        let counted: usize = self.variants.values().sum();
        if counted != self.ids.len() {
            return Err(format!("{} sources, {counted} variants counted", self.ids.len()));
        }
        Ok(())
    }
}
