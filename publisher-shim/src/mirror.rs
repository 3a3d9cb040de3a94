//! The mirror: what one engine rank holds, as its own events say.
//!
//! It translates engine hashes into block keys, counts copies, and says each change of what is *visible* (held at
//! least once and with a known key) as an operation for the bus. Rules, with their reasons:
//!
//! * **Copies are counted** per (medium, cache group, engine hash): an engine stores the same hash once per physical
//!   block. A key is visible in a place from its first copy to its last.
//! * **Engine hashes are opaque.** A key comes from the parent's key, the block's tokens and its extra keys. A hash
//!   that is known keeps its key, whatever a later event claims: offload events lack the extra keys.
//! * **Tokens count only where they line up** with the hashes, and only in full-attention groups: window and state
//!   groups publish the tokens of the whole step beside the few hashes they retain. Those join by hash.
//! * **A block without a key is kept, not guessed**: it waits, bounded, for its parent or its tokens, and becomes
//!   visible when they arrive. Until then it under-reports.
//! * **A removed hash is remembered for a while** (a *ghost*): a child may still be stored under it, and an offload
//!   tier may announce it without tokens.
//! * **Every block lies in one virtual shard**, which follows from how deep in its chain it is and from its segment's first
//!   key. What precedes a segment lies in another shard, so a segment's first block is said to follow the root.
//!
//! Pure: no clock, no socket. Deliberately absent: sequences and epochs (see [`crate::source`]).

use std::collections::VecDeque;

use foldhash::fast::FixedState;
use hashbrown::HashMap;
use hashbrown::hash_map::Entry;
use kvatlas_proto::frame::{FrameOwner, MAX_FRAME_OWNERS};
use kvatlas_proto::keys::{KeyVariant, LocalHash};
use kvatlas_proto::scope::MAX_BLOCK_SIZE;
use kvatlas_proto::{CacheGroup, Digest, ExtraKey, GroupKind, KeyHasher, Partition, ShardId, Tier};
use smallvec::SmallVec;

mod classify;
mod differences;
mod lanes;
mod link;
mod place;
mod saved;

pub use lanes::LaneOps;

use classify::{canonical_medium, classify_group, classify_medium, extra_key, unlisted_lora};
use lanes::{KeyEntry, Lane};
use link::{Before, HashEntry, Link};
use place::{Counts, Place, Removals};

use crate::event::{Batch, EngineHash, Event, ExtraValue, Removed, Stored};

/// Default of [`MirrorLimits::store_only_ttl_ns`]: an hour, longer than most conversations pause.
pub const STORE_ONLY_TTL_NS: u64 = 3_600 * 1_000_000_000;

/// Bounds of one mirror.
#[derive(Clone, Copy, Debug)]
pub struct MirrorLimits {
    /// Most hashes tracked at once, ghosts included. An engine with more loses the excess, visibly.
    pub hashes: usize,
    /// Most hashes whose key is not known yet.
    pub unresolved: usize,
    /// Most ghosts.
    pub ghosts: usize,
    /// How long a block counts in a medium that has never announced a removal, nanoseconds; 0: for ever. Some stores
    /// announce what they take in and never what they drop.
    pub store_only_ttl_ns: u64,
}

/// What a removal says about copies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RemovalPolicy {
    /// One removal takes one copy away (every vLLM up to 0.33).
    #[default]
    PerCopy,
    /// A removal is sent once, when the last copy goes (also right for engines that announce reused blocks again).
    LastCopy,
}

/// What happened to events that could not be applied in full. Counters since the mirror was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MirrorCounts {
    /// Stored hashes.
    pub stored: u64,
    /// Removed hashes.
    pub removed: u64,
    /// Resets.
    pub cleared: u64,
    /// Removals of a hash that was not held there; they change nothing.
    pub unknown_removals: u64,
    /// Hashes that had to wait for their key.
    pub unresolved: u64,
    /// Hashes that waited and got their key.
    pub linked: u64,
    /// Blocks that expired in a medium that announces no removals.
    pub expired: u64,
    /// Hashes not tracked because a bound was reached.
    pub over_limit: u64,
    /// Stored events whose block size is not the scope's.
    pub block_size_mismatch: u64,
    /// Stored events of a medium that is not known; kept by name, scored 0.
    pub unknown_medium: u64,
    /// Stored events of a cache group whose kind is not known; they do not count as held.
    pub unknown_group: u64,
}

/// What one engine rank holds.
pub struct Mirror {
    hasher: KeyHasher,
    partition: Partition,
    limits: MirrorLimits,
    removal: RemovalPolicy,
    block_size: Option<u32>,
    variant: KeyVariant,
    places: Vec<Place>,
    hashes: HashMap<EngineHash, HashEntry, FixedState>,
    /// What is held, by shard.
    lanes: Vec<Lane>,
    /// Visible blocks over all owners and shards.
    visible: u64,
    /// Why a hash has no key yet, where its tokens are known: its parent has none either.
    waiting: HashMap<EngineHash, Waiting, FixedState>,
    /// Parent hash -> hashes in `waiting` that need it.
    waiters: HashMap<EngineHash, SmallVec<[EngineHash; 2]>, FixedState>,
    unresolved: usize,
    ghosts: VecDeque<(EngineHash, u32)>,
    next_stamp: u32,
    /// Latest time that was told, nanoseconds.
    now_ns: u64,
    counts: MirrorCounts,
}

struct Waiting {
    parent: EngineHash,
    local: LocalHash,
}

// === impl MirrorLimits ===

impl Default for MirrorLimits {
    /// 16 Mi hashes are 268 million tokens at 16 tokens a block: an order above any single engine today.
    fn default() -> Self {
        Self { hashes: 16 << 20, unresolved: 65_536, ghosts: 131_072, store_only_ttl_ns: STORE_ONLY_TTL_NS }
    }
}

// === impl Mirror ===

impl Mirror {
    /// An empty mirror. `block_size` fixes the scope's block size; `None` takes the first one that the engine says.
    pub fn new(
        hasher: KeyHasher,
        partition: Partition,
        limits: MirrorLimits,
        removal: RemovalPolicy,
        block_size: Option<u32>,
    ) -> Self {
        Self {
            hasher,
            partition,
            limits,
            removal,
            block_size,
            variant: KeyVariant::default(),
            places: Vec::new(),
            hashes: HashMap::default(),
            lanes: partition.all().map(|_| Lane::default()).collect(),
            visible: 0,
            waiting: HashMap::default(),
            waiters: HashMap::default(),
            unresolved: 0,
            ghosts: VecDeque::new(),
            next_stamp: 1,
            now_ns: 0,
            counts: MirrorCounts::default(),
        }
    }

    /// Tokens per block, once known.
    pub fn block_size(&self) -> Option<u32> {
        self.block_size
    }

    /// How this engine shapes its keys, as far as it has shown.
    pub fn variant(&self) -> KeyVariant {
        self.variant
    }

    /// The owners, by the numbers that operations use.
    pub fn owners(&self) -> Vec<FrameOwner> {
        self.places.iter().map(|place| place.owner.clone()).collect()
    }

    /// How the key space is cut.
    pub fn partition(&self) -> Partition {
        self.partition
    }

    /// What each owner holds visibly in a shard, by the same numbers. Kept up to date with every change, so asking costs
    /// nothing.
    pub fn digests(&self, shard: ShardId) -> &[Digest] {
        &self.lanes[usize::from(shard.number())].digests
    }

    /// Visible blocks over all owners and shards.
    pub fn visible_blocks(&self) -> u64 {
        self.visible
    }

    /// Hashes whose key is not known yet.
    pub fn unresolved_hashes(&self) -> usize {
        self.unresolved
    }

    /// Counters since the mirror was made.
    pub fn counts(&self) -> MirrorCounts {
        self.counts
    }

    /// Applies a decoded message and appends what became visible or invisible to `ops`.
    pub fn apply(&mut self, batch: &Batch, ops: &mut LaneOps) {
        for event in &batch.events {
            match event {
                Event::Stored(stored) => self.store(batch, stored, ops),
                Event::Removed(removed) => self.remove(batch, removed, ops),
                Event::Cleared => self.clear(ops),
            }
        }
    }

    /// The engine's cache is empty. Hashes stay known as ghosts: the same ones usually come back.
    ///
    /// The event carries no medium, so every tier is cleared: after a reset of the GPU alone this under-reports
    /// the others, which is the safe side.
    pub fn clear(&mut self, ops: &mut LaneOps) {
        self.counts.cleared += 1;
        for (shard, lane) in self.lanes.iter_mut().enumerate() {
            for (number, digest) in lane.digests.iter_mut().enumerate() {
                if !digest.is_empty() {
                    ops.cleared(shard as u16, number as u8);
                    *digest = Digest::default();
                }
            }
            lane.keys.clear();
        }
        self.visible = 0;
        // A hash whose tokens nobody ever said, or whose parent is not known, carries no knowledge once it is gone.
        self.hashes.retain(|_, entry| entry.is_linked());
        self.unresolved = 0;
        self.waiting.clear();
        self.waiters.clear();
        let mut held = Vec::new();
        for (hash, entry) in &mut self.hashes {
            if entry.ghost_stamp == 0 {
                entry.copies = Counts::default();
                held.push(*hash);
            }
        }
        for hash in held {
            self.bury(hash);
        }
    }

    /// Forgets everything, also what hashes mean: another engine life.
    pub fn reset(&mut self) {
        *self = Self {
            counts: self.counts,
            now_ns: self.now_ns,
            ..Self::new(self.hasher, self.partition, self.limits, self.removal, self.block_size)
        };
    }

    fn store(&mut self, batch: &Batch, event: &Stored, ops: &mut LaneOps) {
        let hashes = batch.hashes(&event.hashes);
        self.counts.stored += hashes.len() as u64;
        let Some(place) = self.place(batch.text(&event.medium), event.remote, event.group) else {
            self.counts.over_limit += hashes.len() as u64;
            return;
        };
        self.learn_kind(batch, event, place);
        self.learn_chunk(hashes.len(), place);
        let positional = self.is_positional(batch, event, place);
        let mut parent_hash = event.parent;
        let mut before = match event.parent {
            None => Some(Before::Root),
            Some(hash) => self.link_of(hash).map(Before::Block),
        };
        let lora = unlisted_lora(batch, event);
        let mut extras = batch.extras(event.extras.as_ref().unwrap_or(&(0..0))).iter().peekable();
        for (index, &hash) in hashes.iter().enumerate() {
            let mut keys: SmallVec<[ExtraKey<'_>; 4]> =
                lora.iter().map(|name| ExtraKey::Lora(name)).collect();
            while let Some(extra) = extras.next_if(|extra| extra.block as usize <= index) {
                self.learn_offsets(batch, event, index, &extra.value);
                keys.push(extra_key(batch, event, &extra.value));
            }
            let mut link = self.link_of(hash);
            if link.is_none() && positional {
                let size = event.block_size as usize;
                let salt = batch.text(&event.cache_salt);
                if index == 0 && event.parent.is_none() && !salt.is_empty() {
                    // SGLang repeats the salt on every event of its namespace; in a key it is on the first block.
                    keys.push(ExtraKey::Text(salt));
                }
                let lookahead = event.lookahead_of(batch, index);
                if !lookahead.is_empty() {
                    keys.push(ExtraKey::Lookahead(lookahead));
                }
                let local = self.hasher.local(&batch.tokens(&event.tokens)[index * size..][..size], &keys);
                link = self.derive(hash, parent_hash, before, local);
            }
            self.add_copy(hash, link, place, ops);
            self.postpone(hash, place, ops);
            parent_hash = Some(hash);
            before = link.map(Before::Block);
        }
    }

    /// Whether the event's tokens say which blocks its hashes are.
    fn is_positional(&mut self, batch: &Batch, event: &Stored, place: u8) -> bool {
        let hashes = event.hashes.len();
        let size = event.block_size;
        if size == 0 || size > MAX_BLOCK_SIZE || event.tokens.len() != hashes * size as usize || hashes == 0 {
            return false;
        }
        let owner = &self.places[usize::from(place)].owner;
        if owner.kind != GroupKind::Full {
            return false;
        }
        // An offload event without extra keys may be of a salted or multimodal block: join it by hash instead. Only a
        // stream that has no device tier at all (a store's own publisher) is taken at its word.
        let offload = owner.tier != Tier::Gpu;
        if offload && event.extras.is_none() && self.places.iter().any(|p| p.owner.tier == Tier::Gpu) {
            return false;
        }
        if *self.block_size.get_or_insert(size) != size {
            self.counts.block_size_mismatch += 1;
            return false;
        }
        if !event.lookahead.is_empty() {
            self.variant.lookahead_tokens = event.lookahead_of(batch, 0).len() as u8;
        }
        true
    }

    /// The link of a hash whose content is known, or `None` after making it wait for its parent.
    fn derive(
        &mut self,
        hash: EngineHash,
        parent_hash: Option<EngineHash>,
        before: Option<Before>,
        local: LocalHash,
    ) -> Option<Link> {
        if let Some(before) = before {
            return Some(Link::new(&self.hasher, self.partition, before, local));
        }
        let parent = parent_hash.expect("a block without parent hash follows the root");
        if self.waiting.len() < self.limits.unresolved && !self.waiting.contains_key(&hash) {
            self.waiting.insert(hash, Waiting { parent, local });
            self.waiters.entry(parent).or_default().push(hash);
        }
        None
    }

    fn link_of(&self, hash: EngineHash) -> Option<Link> {
        self.hashes.get(&hash).and_then(HashEntry::link)
    }

    fn add_copy(&mut self, hash: EngineHash, link: Option<Link>, place: u8, ops: &mut LaneOps) {
        let tracked = self.hashes.len();
        match self.hashes.entry(hash) {
            Entry::Occupied(mut entry) => {
                let entry = entry.get_mut();
                entry.ghost_stamp = 0;
                let first = entry.copies.add(place);
                match (entry.link(), link) {
                    (None, Some(link)) => self.connect(hash, link, ops),
                    (Some(link), _) if first => self.acquire(link, place, ops),
                    _ => {}
                }
            }
            Entry::Vacant(entry) => {
                let room = tracked < self.limits.hashes
                    && (link.is_some() || self.unresolved < self.limits.unresolved);
                if !room {
                    self.counts.over_limit += 1;
                    self.stop_waiting(hash);
                    return;
                }
                let mut copies = Counts::default();
                copies.add(place);
                entry.insert(HashEntry::new(link, copies));
                if let Some(link) = link {
                    self.acquire(link, place, ops);
                    self.wake_waiters(hash, link, ops);
                } else {
                    self.unresolved += 1;
                    self.counts.unresolved += 1;
                }
            }
        }
    }

    /// An unresolved hash gets its key: everything held under it becomes visible, and so do those that wait for it.
    fn connect(&mut self, hash: EngineHash, link: Link, ops: &mut LaneOps) {
        let Some(entry) = self.hashes.get_mut(&hash) else { return };
        entry.set_link(link);
        let held = entry.copies.places();
        self.unresolved -= 1;
        self.counts.linked += 1;
        self.stop_waiting(hash);
        for place in held {
            self.acquire(link, place, ops);
        }
        self.wake_waiters(hash, link, ops);
    }

    fn wake_waiters(&mut self, hash: EngineHash, link: Link, ops: &mut LaneOps) {
        if self.waiters.is_empty() {
            return;
        }
        // A work list, not recursion: a whole prompt may have waited for its first block.
        let mut ready: Vec<(EngineHash, Link)> = vec![(hash, link)];
        while let Some((parent_hash, parent)) = ready.pop() {
            for child in self.waiters.remove(&parent_hash).into_iter().flatten() {
                let Some(waiting) = self.waiting.remove(&child) else { continue };
                let link = Link::new(&self.hasher, self.partition, Before::Block(parent), waiting.local);
                if let Some(entry) = self.hashes.get_mut(&child) {
                    entry.set_link(link);
                    let held = entry.copies.places();
                    self.unresolved -= 1;
                    self.counts.linked += 1;
                    for place in held {
                        self.acquire(link, place, ops);
                    }
                    ready.push((child, link));
                }
            }
        }
    }

    fn stop_waiting(&mut self, hash: EngineHash) {
        let Some(waiting) = self.waiting.remove(&hash) else { return };
        if let Some(siblings) = self.waiters.get_mut(&waiting.parent) {
            siblings.retain(|sibling| *sibling != hash);
            if siblings.is_empty() {
                self.waiters.remove(&waiting.parent);
            }
        }
    }

    fn remove(&mut self, batch: &Batch, event: &Removed, ops: &mut LaneOps) {
        let hashes = batch.hashes(&event.hashes);
        self.counts.removed += hashes.len() as u64;
        let Some(place) = self.place(batch.text(&event.medium), event.remote, event.group) else {
            self.counts.unknown_removals += hashes.len() as u64;
            return;
        };
        self.places[usize::from(place)].removals = Removals::Announced;
        let remaining = batch.tokens(&event.remaining);
        for (index, &hash) in hashes.iter().enumerate() {
            let Some(entry) = self.hashes.get_mut(&hash).filter(|entry| entry.copies.get(place) > 0) else {
                self.counts.unknown_removals += 1;
                continue;
            };
            let last = match (remaining.get(index), self.removal) {
                (Some(0), _) | (None, RemovalPolicy::LastCopy) => entry.copies.take_all(place),
                (Some(copies), _) => entry.copies.set(place, *copies),
                (None, RemovalPolicy::PerCopy) => entry.copies.take(place),
            };
            let (link, gone) = (entry.link(), entry.copies.is_empty());
            if let (true, Some(link)) = (last, link) {
                self.release(link, place, ops);
            }
            if gone {
                self.bury(hash);
            }
        }
    }

    /// Tells the time and drops what has expired.
    pub fn expire(&mut self, now_ns: u64, ops: &mut LaneOps) {
        self.now_ns = self.now_ns.max(now_ns);
        for number in 0..self.places.len() {
            while let Some(hash) = self.places[number].next_expired(self.now_ns) {
                self.drop_expired(hash, number as u8, ops);
            }
        }
    }

    /// A medium that never announces removals took a hash in (again): it counts for another while.
    fn postpone(&mut self, hash: EngineHash, place: u8, ops: &mut LaneOps) {
        let deadline = self.now_ns.saturating_add(self.limits.store_only_ttl_ns);
        let Removals::NeverSeen { deadlines, queue } = &mut self.places[usize::from(place)].removals else {
            return;
        };
        // Within one tick of the clock nothing moves, and the queue does not grow.
        if deadlines.insert(hash, deadline) != Some(deadline) {
            queue.push_back((deadline, hash));
        }
        if queue.len() > self.limits.hashes {
            let oldest = queue.pop_front();
            if let Some((_, hash)) = oldest.filter(|(at, hash)| deadlines.get(hash) == Some(at)) {
                deadlines.remove(&hash);
                self.drop_expired(hash, place, ops);
            }
        }
    }

    fn drop_expired(&mut self, hash: EngineHash, place: u8, ops: &mut LaneOps) {
        let Some(entry) = self.hashes.get_mut(&hash).filter(|entry| entry.copies.get(place) > 0) else {
            return;
        };
        self.counts.expired += 1;
        entry.copies.take_all(place);
        let (link, gone) = (entry.link(), entry.copies.is_empty());
        if let Some(link) = link {
            self.release(link, place, ops);
        }
        if gone {
            self.bury(hash);
        }
    }

    /// One more hash of this key is held in `place`.
    fn acquire(&mut self, link: Link, place: u8, ops: &mut LaneOps) {
        if self.hold(link, place) {
            ops.stored(link.at.shard, place, link.parent, link.key);
        }
    }

    /// The same without a word. Says whether it is the first.
    fn hold(&mut self, link: Link, place: u8) -> bool {
        let lane = &mut self.lanes[usize::from(link.at.shard)];
        let entry = lane
            .keys
            .entry(link.key)
            .or_insert_with(|| KeyEntry { parent: link.parent, holders: Counts::default() });
        let first = entry.holders.add(place);
        if first {
            lane.digests[usize::from(place)].add(link.key);
            self.visible += 1;
        }
        first
    }

    fn release(&mut self, link: Link, place: u8, ops: &mut LaneOps) {
        let lane = &mut self.lanes[usize::from(link.at.shard)];
        let Some(entry) = lane.keys.get_mut(&link.key) else { return };
        if entry.holders.take(place) {
            lane.digests[usize::from(place)].remove(link.key);
            self.visible -= 1;
            ops.removed(link.at.shard, place, link.key);
            if entry.holders.is_empty() {
                lane.keys.remove(&link.key);
            }
        }
    }

    /// Remembers a hash that is held nowhere; forgets the oldest such hash at the bound.
    fn bury(&mut self, hash: EngineHash) {
        let stamp = self.next_stamp;
        self.next_stamp = self.next_stamp.wrapping_add(1).max(1);
        let Some(entry) = self.hashes.get_mut(&hash) else { return };
        entry.ghost_stamp = stamp;
        self.ghosts.push_back((hash, stamp));
        while self.ghosts.len() > self.limits.ghosts {
            let Some((oldest, stamp)) = self.ghosts.pop_front() else { return };
            // Held again since, or buried again later: this turn in the queue is void.
            if self.hashes.get(&oldest).is_some_and(|entry| entry.ghost_stamp == stamp) {
                if self.hashes.remove(&oldest).is_some_and(|entry| !entry.is_linked()) {
                    self.unresolved -= 1;
                }
                self.stop_waiting(oldest);
            }
        }
    }

    /// The number of a medium and group, registered at first sight; `None` beyond [`MAX_FRAME_OWNERS`].
    fn place(&mut self, medium: &str, remote: bool, group: Option<u16>) -> Option<u8> {
        let group = CacheGroup(group.unwrap_or(0));
        let found = self.places.iter().position(|place| {
            place.owner.group == group
                && place.remote == remote
                && place.owner.medium.eq_ignore_ascii_case(canonical_medium(medium))
        });
        if let Some(number) = found {
            return Some(number as u8);
        }
        let (tier, medium) = classify_medium(medium, remote);
        // An index tells owners apart by tier, kept name and group, so what agrees in these (a long name that was cut, a
        // name that is remote in any case) must be one place here.
        let same = |owner: &FrameOwner| owner.tier == tier && owner.group == group && owner.medium == medium;
        if let Some(number) = self.places.iter().position(|place| same(&place.owner)) {
            return Some(number as u8);
        }
        if self.places.len() == MAX_FRAME_OWNERS {
            return None;
        }
        // Until the engine says otherwise, group 0 is the only group there is: full attention. Others fail closed.
        let known = self.places.iter().find(|place| place.owner.group == group).map(|place| place.owner.kind);
        let kind = known.unwrap_or(if group.0 == 0 { GroupKind::Full } else { GroupKind::Unknown });
        let owner = FrameOwner { tier, medium, group, kind, load_blocks: 1 };
        let removals = if tier == Tier::Gpu || self.limits.store_only_ttl_ns == 0 {
            Removals::Announced
        } else {
            Removals::NeverSeen { deadlines: HashMap::default(), queue: VecDeque::new() }
        };
        Some(self.add_place(Place { owner, remote, chunk: 0, removals }))
    }

    fn add_place(&mut self, place: Place) -> u8 {
        self.places.push(place);
        self.lanes.iter_mut().for_each(|lane| lane.digests.push(Digest::default()));
        (self.places.len() - 1) as u8
    }

    /// vLLM's offloading connector loads whole chunks, and announces all blocks of a chunk in one event. So a host tier
    /// whose every event had a multiple of n blocks is taken to load n at a time; at worst that under-reports.
    fn learn_chunk(&mut self, hashes: usize, place: u8) {
        let place = &mut self.places[usize::from(place)];
        if place.owner.medium == "CPU" && hashes > 0 {
            let (mut a, mut b) = (hashes as u32, place.chunk);
            while b != 0 {
                (a, b) = (b, a % b);
            }
            place.chunk = a;
            place.owner.load_blocks = a;
        }
    }

    /// Engines before vLLM 0.19 publish multimodal items without their offsets, as bare strings. On a first block such a
    /// string may be a salt; later in a chain only an adapter or an item is possible.
    fn learn_offsets(&mut self, batch: &Batch, event: &Stored, index: usize, value: &ExtraValue) {
        match value {
            ExtraValue::Multimodal(..) => self.variant.multimodal_offsets = true,
            ExtraValue::Text(span) if index > 0 || event.parent.is_some() => {
                if batch.text(span) != batch.text(&event.lora_name) {
                    self.variant.multimodal_offsets = false;
                }
            }
            ExtraValue::Text(_) | ExtraValue::Bytes(_) => {}
        }
    }

    /// Notes what an event says about its cache group, for all places of that group.
    fn learn_kind(&mut self, batch: &Batch, event: &Stored, place: u8) {
        let owner = &self.places[usize::from(place)].owner;
        let (group, before, tier) = (owner.group, owner.kind, owner.tier);
        if tier == Tier::Unknown {
            self.counts.unknown_medium += 1;
        }
        let kind = classify_group(batch.text(&event.group_kind), event, before);
        if kind == GroupKind::Unknown {
            self.counts.unknown_group += 1;
        }
        if kind != before {
            for place in self.places.iter_mut().filter(|place| place.owner.group == group) {
                place.owner.kind = kind;
            }
        }
    }
}
