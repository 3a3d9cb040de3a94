//! How a frame changes a scope: one source at a time, under the scope's write lock.
//!
//! What a query may see in between is stated in [`crate::scope_index`].

use bytes::Bytes;
use foldhash::fast::FixedState;
use hashbrown::HashSet;
use kvatlas_proto::digest::{Buckets, MAX_BUCKET_BITS};
use kvatlas_proto::frame::{Change, FrameHeader, FrameOwner, FramePart, FrameView};
use kvatlas_proto::request::{MAX_REQUEST_BUCKETS, OwnerBuckets};
use kvatlas_proto::{BlockKey, Digest};
use parking_lot::RwLockWriteGuard;

use crate::engine;

use crate::scope_index::{Applied, Budget, OwnerEntry, OwnerNo, ScopeState, SourceNo};
use crate::session::{OwnerName, Piece};
use crate::sources::Verdict;

/// Keys after which a long change lets waiting queries through. At 100 to 200 ns a key that is below a millisecond.
pub(crate) const SLICE_KEYS: usize = 4_096;

/// Owners' numbers that nobody has any more, whose blocks are still to be taken from them.
pub(crate) type Retired = Vec<engine::Retired>;

/// A change of one source that is under way.
pub(crate) struct SourceChange<'a> {
    pub(crate) state: RwLockWriteGuard<'a, ScopeState>,
    pub(crate) no: SourceNo,
    pub(crate) budget: &'a Budget,
    pub(crate) now_ms: u64,
    pub(crate) applied: Applied,
    pub(crate) retired: Retired,
    /// Keys since queries were last let through.
    since_pause: usize,
}

/// What the answer says about one owner, gathered over several pieces.
struct SliceChange {
    owner: OwnerNo,
    bits: u8,
    /// By slice: whether the answer says all of it.
    said: Vec<bool>,
    blocks: Vec<(BlockKey, BlockKey)>,
}

// === impl SourceChange ===

impl<'a> SourceChange<'a> {
    pub(crate) fn new(
        state: RwLockWriteGuard<'a, ScopeState>,
        no: SourceNo,
        budget: &'a Budget,
        now_ms: u64,
        applied: Applied,
    ) -> Self {
        Self { state, no, budget, now_ms, applied, retired: Retired::new(), since_pause: 0 }
    }

    /// Takes a frame of the source's sequence, and those that were waiting for it.
    pub(crate) fn take(&mut self, frame: &FrameView<'_>, bytes: &Bytes) {
        let verdict = self.take_one(frame, bytes);
        self.applied.verdict = Some(verdict);
        self.take_held();
    }

    fn take_held(&mut self) {
        while let Some(bytes) = self.state.source_mut(self.no).and_then(|source| source.tracker.next_held()) {
            // It was valid when it arrived.
            if let Ok(frame) = FrameView::parse(&bytes) {
                self.take_one(&frame, &bytes);
            }
            self.pause_after(1);
        }
    }

    fn take_one(&mut self, frame: &FrameView<'_>, bytes: &Bytes) -> Verdict {
        let (no, header) = (self.no, frame.header());
        let Some(source) = self.state.source_mut(no) else { return Verdict::Duplicate };
        let verdict = source.tracker.on_frame(header, bytes, self.now_ms);
        match verdict {
            Verdict::NewEpoch => {
                self.empty_source();
                self.state.set_variant(no, header.variant);
                self.apply_operations(frame);
            }
            Verdict::NewEpochHidden => self.state.set_variant(no, header.variant),
            Verdict::Apply => self.apply_operations(frame),
            Verdict::Held | Verdict::HeldOver | Verdict::Duplicate | Verdict::StaleEpoch => {}
        }
        self.compare(header);
        verdict
    }

    /// Takes an answer to a question about the source's state.
    pub(crate) fn take_piece(&mut self, frame: &FrameView<'_>, bytes: &Bytes) {
        let header = frame.header();
        let Some(source) = self.state.source_mut(self.no) else { return };
        match header.part {
            FramePart::Unavailable => source.tracker.on_unavailable(header),
            _ => match source.tracker.on_piece(header, bytes, self.now_ms) {
                Piece::Ignored | Piece::Kept => {}
                Piece::Apply { complete } => {
                    self.apply_staged();
                    if complete {
                        self.finish_transfer(header);
                    }
                }
            },
        }
    }

    fn finish_transfer(&mut self, header: &FrameHeader) {
        self.empty_owners_beside(header);
        let equal = self.content_is(header);
        self.applied.transferred = Some(equal);
        let now_ms = self.now_ms;
        let Some(source) = self.state.source_mut(self.no) else { return };
        if equal {
            source.tracker.on_compared(header, true, now_ms);
        } else {
            source.tracker.on_transfer_failed(header, now_ms);
        }
        self.take_held();
    }

    /// Compares the digests of a frame with our content, if they say something about it.
    fn compare(&mut self, header: &FrameHeader) {
        let Some(source) = self.state.source(self.no) else { return };
        if !source.tracker.compares(header) {
            return;
        }
        let proved = !source.tracker.counts();
        if proved && header.digests.iter().all(Digest::is_empty) {
            // Whatever is here is not there: nothing has to be asked to know everything.
            self.empty_source();
        }
        let equal = self.content_is(header);
        if equal {
            // A checkpoint or an older epoch may know other kinds of groups.
            for owner in &header.owners {
                self.state.find_or_add_owner(self.no, owner, self.budget);
            }
        }
        self.applied.compared = Some(equal);
        let now_ms = self.now_ms;
        if let Some(source) = self.state.source_mut(self.no) {
            source.tracker.on_compared(header, equal, now_ms);
        }
    }

    /// True if every owner holds what the digests say, and owners that are not named hold nothing.
    fn content_is(&self, header: &FrameHeader) -> bool {
        let Some(source) = self.state.source(self.no) else { return false };
        let mut named = Vec::with_capacity(header.owners.len());
        let equal = header.owners.iter().zip(&header.digests).all(|(owner, digest)| {
            let known = self.state.find_owner(source, owner);
            named.extend(known);
            known.map_or_else(Digest::default, |no| self.state.digest_of(no)) == *digest
        });
        let others = source.owners.iter().filter(|no| !named.contains(no));
        equal && others.into_iter().all(|no| self.state.digest_of(*no).is_empty())
    }

    fn apply_operations(&mut self, frame: &FrameView<'_>) {
        let header = frame.header();
        let mut owners = self.owners_of(&header.owners);
        self.applied.frames += 1;
        for op in frame.ops() {
            let Some(owner) = owners[op.owner] else {
                if let Change::Stored { keys, .. } = op.change {
                    self.applied.refused_blocks += keys.len();
                }
                continue;
            };
            match op.change {
                // One step: a block that moves between tiers is never in neither.
                Change::Stored { parent, keys } => {
                    let keys: Vec<BlockKey> = keys.iter().collect();
                    self.store(owner, parent, &keys);
                }
                Change::Removed(keys) => {
                    let keys: Vec<BlockKey> = keys.iter().collect();
                    self.remove(owner, &keys);
                }
                Change::Cleared => owners[op.owner] = self.empty_owner(owner),
                // Validation lets them pass in answers only.
                Change::Bucket { .. } => {}
            }
        }
        self.note_limit();
    }

    /// Applies the pieces of an answer that have arrived. In whatever order they came, and whatever is missing: the
    /// content is nearer to the source's than before, and the next comparison says how near.
    pub(crate) fn apply_staged(&mut self) {
        let Some(session) = self.state.source_mut(self.no).and_then(|source| source.tracker.session()) else {
            return;
        };
        let (pieces, bits) = (session.take_staged(), session.bits.clone());
        let mut changes: Vec<SliceChange> = Vec::new();
        for bytes in pieces {
            let Ok(frame) = FrameView::parse(&bytes) else { continue };
            let header = frame.header();
            let mut owners = self.owners_of(&header.owners);
            for op in frame.ops() {
                let Some(owner) = owners[op.owner] else {
                    self.applied.refused_blocks += 1;
                    continue;
                };
                match op.change {
                    Change::Stored { parent, keys } => {
                        let keys: Vec<BlockKey> = keys.iter().collect();
                        self.store(owner, parent, &keys);
                        self.pause_after(keys.len());
                    }
                    Change::Cleared => owners[op.owner] = self.empty_owner(owner),
                    Change::Bucket { slice, blocks } => {
                        let Some(bits) = bits_of(&bits, &header.owners[op.owner]) else { continue };
                        SliceChange::find(&mut changes, owner, bits).add(slice, blocks.iter());
                    }
                    Change::Removed(_) => {}
                }
            }
        }
        for change in changes {
            self.replace_slices(change);
        }
        self.note_limit();
    }

    fn replace_slices(&mut self, change: SliceChange) {
        let SliceChange { owner, bits, said, mut blocks } = change;
        blocks.sort_unstable_by_key(|(_, key)| *key);
        let mut gone = Vec::new();
        self.state.engine.write().keys_of(owner, |_, key| {
            let is_said = said[Buckets::slice(bits, key) as usize];
            if is_said && blocks.binary_search_by_key(&key, |(_, kept)| *kept).is_err() {
                gone.push(key);
            }
        });
        for keys in gone.chunks(SLICE_KEYS) {
            self.remove(owner, keys);
            self.pause_after(keys.len());
        }
        for (parent, keys) in chains(blocks) {
            self.store(owner, parent, &keys);
            self.pause_after(keys.len());
        }
    }

    fn store(&mut self, owner: OwnerNo, parent: BlockKey, keys: &[BlockKey]) {
        let stored = self.state.store(owner, parent, keys, self.budget);
        self.applied.stored += stored.new;
        self.applied.refused_blocks += stored.refused;
    }

    fn remove(&mut self, owner: OwnerNo, keys: &[BlockKey]) {
        let removed = self.state.engine.write().remove(owner, keys).blocks;
        self.budget.give_back_entries(removed);
        self.applied.removed += removed;
    }

    fn owners_of(&mut self, owners: &[FrameOwner]) -> Vec<Option<OwnerNo>> {
        let numbers: Vec<_> =
            owners.iter().map(|owner| self.state.find_or_add_owner(self.no, owner, self.budget)).collect();
        self.applied.refused_owners = numbers.iter().filter(|no| no.is_none()).count();
        numbers
    }

    fn note_limit(&mut self) {
        if self.applied.refused_blocks + self.applied.refused_owners > 0
            && let Some(source) = self.state.source_mut(self.no)
        {
            source.tracker.on_over_limit();
        }
    }

    /// Empties an owner by giving it a new number.
    fn empty_owner(&mut self, owner: OwnerNo) -> Option<OwnerNo> {
        let (fresh, retired) = self.state.empty_owner(owner, self.budget)?;
        self.applied.removed += retired.blocks();
        self.retired.push(retired);
        Some(fresh)
    }

    fn empty_source(&mut self) {
        let retired = self.state.retire_owners(self.no, self.budget);
        self.applied.removed += retired.iter().map(engine::Retired::blocks).sum::<usize>();
        self.retired.extend(retired);
    }

    /// The source has no owners but those of the header.
    fn empty_owners_beside(&mut self, header: &FrameHeader) {
        let Some(source) = self.state.source(self.no) else { return };
        let named: Vec<OwnerNo> =
            header.owners.iter().filter_map(|owner| self.state.find_owner(source, owner)).collect();
        let others: Vec<OwnerNo> = source.owners.iter().copied().filter(|no| !named.contains(no)).collect();
        for owner in others {
            self.empty_owner(owner);
        }
    }

    /// Lets waiting queries through from time to time.
    fn pause_after(&mut self, keys: usize) {
        self.since_pause += keys;
        if self.since_pause >= SLICE_KEYS {
            self.since_pause = 0;
            RwLockWriteGuard::bump(&mut self.state);
        }
    }

    /// Takes out of the table what nobody has any more, and says what happened.
    pub(crate) fn finish(mut self) -> Applied {
        self.state.note_trust(self.no);
        purge(&mut self.state, std::mem::take(&mut self.retired));
        if let Some(source) = self.state.source_mut(self.no) {
            self.applied.after = source.tracker.state();
            self.applied.has_gap = source.tracker.has_gap();
            let asks = source.tracker.needs_help(self.now_ms);
            self.applied.enqueue = asks && !source.tracker.queued;
            source.tracker.queued |= asks;
        }
        self.applied
    }
}

/// Takes the blocks of retired numbers from them, in slices.
pub(crate) fn purge(state: &mut RwLockWriteGuard<'_, ScopeState>, retired: Retired) {
    for mut retired in retired {
        while !state.engine.write().release(&mut retired, SLICE_KEYS) {
            RwLockWriteGuard::bump(state);
        }
        state.recycle_owner(retired.holder());
    }
}

/// Blocks in any order as runs of consecutive ones, each with the key that its first block follows.
fn chains(mut blocks: Vec<(BlockKey, BlockKey)>) -> Vec<(BlockKey, Vec<BlockKey>)> {
    blocks.sort_unstable();
    let children = |key: BlockKey| {
        let from = blocks.partition_point(|(parent, _)| *parent < key);
        blocks[from..].iter().take_while(move |(parent, _)| *parent == key).map(|(_, key)| *key)
    };
    let keys: HashSet<BlockKey, FixedState> = blocks.iter().map(|(_, key)| *key).collect();
    let (mut runs, mut starts) = (Vec::new(), Vec::new());
    starts.extend(blocks.iter().filter(|(parent, _)| !keys.contains(parent)).copied());
    while let Some((parent, first)) = starts.pop() {
        let mut run = vec![first];
        loop {
            let last = run[run.len() - 1];
            let mut below = children(last);
            let Some(next) = below.next() else { break };
            starts.extend(below.map(|key| (last, key)));
            run.push(next);
        }
        runs.push((parent, run));
    }
    runs
}

/// What a question about a source's state says of our content. Cut more coarsely if it would be too long.
pub(crate) fn buckets_of(state: &ScopeState, no: SourceNo) -> Vec<OwnerBuckets> {
    let Some(source) = state.source(no) else { return Vec::new() };
    let owners: Vec<(OwnerNo, &OwnerEntry, u64)> = source
        .owners
        .iter()
        .filter_map(|no| Some((*no, state.owner(*no)?, state.digest_of(*no).count)))
        .filter(|(_, _, count)| *count > 0)
        .collect();
    let cut = |coarser: u8, count: u64| Buckets::bits_for(count).saturating_sub(coarser);
    let total =
        |coarser: u8| owners.iter().map(|(_, _, count)| 1usize << cut(coarser, *count)).sum::<usize>();
    let coarser = (0..MAX_BUCKET_BITS).find(|coarser| total(*coarser) <= MAX_REQUEST_BUCKETS);
    let coarser = coarser.unwrap_or(MAX_BUCKET_BITS);
    let of = |(no, entry, count): &(OwnerNo, &OwnerEntry, u64)| OwnerBuckets {
        tier: entry.tier.tier(),
        medium: entry.medium.to_string(),
        group: entry.group,
        buckets: Buckets::of(cut(coarser, *count), state.keys_of(*no)),
    };
    owners.iter().map(of).collect()
}

fn bits_of(bits: &[(OwnerName, u8)], owner: &FrameOwner) -> Option<u8> {
    let same = |name: &OwnerName| {
        name.tier == owner.tier && name.group == owner.group && name.medium == owner.medium
    };
    bits.iter().find(|(name, _)| same(name)).map(|(_, bits)| *bits)
}

// === impl SliceChange ===

impl SliceChange {
    fn find(changes: &mut Vec<Self>, owner: OwnerNo, bits: u8) -> &mut Self {
        let at = changes.iter().position(|change| change.owner == owner).unwrap_or_else(|| {
            changes.push(Self { owner, bits, said: vec![false; 1 << bits], blocks: Vec::new() });
            changes.len() - 1
        });
        &mut changes[at]
    }

    fn add(&mut self, slice: u32, blocks: impl Iterator<Item = (BlockKey, BlockKey)>) {
        // A slice that cannot be, or a block that is not of its slice, is a publisher's mistake. The comparison at the
        // end finds what came of it.
        if let Some(said) = self.said.get_mut(slice as usize) {
            *said = true;
            self.blocks.extend(blocks.filter(|(_, key)| Buckets::slice(self.bits, *key) == slice));
        }
    }
}
