//! The index engine: which holder holds which block, for any number of readers beside one writer.
//!
//! What it is made of:
//!
//! * `strand`: unforked stretches of blocks. They never split (a fork hangs a new strand below the block it leaves
//!   from), so a key's place never moves. Who holds which part of one is a step function, and neighbouring steps with
//!   the same holders are one, so a hole that heals leaves nothing behind.
//! * `sets`: sets of holders, immutable, each kept once, with remembered transitions.
//! * `table`: one map from a key to its place, for all holders.
//! * `locate`, `matched`: how a list of keys becomes runs of (start, end, holders).
//! * `write`, `shape`, `holdings`, `ahead`: changes: what they say, what becomes of strands, what one holder has, and
//!   how the cache misses of many overlap. `evict`: what gives way at the memory limit.
//! * `raw`: the only module with `unsafe`: who may free what, and when.
//!
//! Concurrency. Writers take turns ([`Engine::write`]). Readers take no lock and write no line that another reader
//! writes: they announce themselves in a slot of their own, copy what they need from strand headers under versions,
//! and check the versions in the end. So an answer is a state that existed between two changes. A reader whose strands
//! change under it starts again, and after [`MAX_TRIES`] waits for its turn with the writer.
//!
//! What is absent on purpose: sources, tiers and time (a holder is a number here), and any trust that a removal or a
//! parent makes sense: blocks may come in any order, with parents that nobody knows.

mod ahead;
mod evict;
mod holdings;
mod locate;
mod matched;
mod raw;
mod sets;
mod shape;
mod strand;
mod table;
mod verify;
mod write;

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::AtomicUsize;

use kvatlas_proto::{BlockKey, Digest};
use parking_lot::{Mutex, MutexGuard};

pub use matched::{Match, Run};
use raw::{Arena, Freed, Pins};
use sets::SetEntry;
use strand::Header;
use table::Table;
use write::Writer;

/// Holders of one engine at most.
pub const MAX_HOLDERS: u32 = 65_536;
/// Attempts of a reader before it waits for the writer's turn to end. A strand has to change during each of them.
const MAX_TRIES: usize = 32;

/// One owner of blocks as the engine knows it: a dense number below [`MAX_HOLDERS`] that its user gives out. In kvatlas
/// it stands for a source, a tier and a cache group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Holder(pub u32);

/// Bounds of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineLimits {
    /// Bytes in use at which stores begin to evict what was stored or matched longest ago, leaves before parents.
    pub max_bytes: usize,
}

/// The blocks of one key space.
pub struct Engine {
    shared: Shared,
    writer: Mutex<Writer>,
}

/// The right to change an [`Engine`]; others wait.
pub struct EngineWriter<'e> {
    shared: &'e Shared,
    writer: MutexGuard<'e, Writer>,
}

/// What became of a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stored {
    /// Blocks that the holder did not hold before.
    pub new: usize,
    /// Blocks that nobody held before.
    pub new_keys: usize,
    /// Blocks that were not stored because a bound was reached.
    pub refused: usize,
}

/// What became of a removal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Blocks that the holder held.
    pub blocks: usize,
    /// Of them, those that nobody holds any more.
    pub last_copies: usize,
}

/// One change of a list of changes.
#[derive(Clone, Copy, Debug)]
pub struct Change<'k> {
    /// Whose blocks.
    pub holder: Holder,
    /// What happens to them.
    pub kind: ChangeKind,
    /// Which blocks; see [`EngineWriter::store`] and [`EngineWriter::remove`].
    pub keys: &'k [BlockKey],
}

/// What happens to the blocks of a [`Change`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeKind {
    /// They are held from now on; the first one follows this block, or is a prompt's first.
    Stored(Option<BlockKey>),
    /// They are not held any longer.
    Removed,
}

/// What became of a [`Change`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Of a store.
    Stored(Stored),
    /// Of a removal.
    Removed(Removed),
}

/// What is still to be taken from a holder that was cleared.
#[derive(Debug)]
#[must_use = "until it is released, the holder keeps its blocks"]
pub struct Retired {
    holder: Holder,
    strands: Vec<u32>,
    blocks: usize,
}

/// How large an engine is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineTotals {
    /// (holder, block) pairs.
    pub entries: usize,
    /// Blocks that somebody holds.
    pub distinct: usize,
    /// Blocks that nobody holds but that a held one follows.
    pub ghosts: usize,
    /// Strands.
    pub strands: usize,
    /// Strands whose beginning nobody told.
    pub floating: usize,
    /// Sets of holders.
    pub sets: usize,
    /// (holder, block) pairs that had to give way to the memory limit, ever.
    pub evicted: u64,
    /// Bytes in use.
    pub bytes: usize,
}

/// What readers look at.
struct Shared {
    table: Table,
    strands: Arena<Header>,
    sets: Arena<SetEntry>,
    pins: Pins,
    /// Strands whose beginning nobody told.
    floating: AtomicUsize,
}

// === impl EngineLimits ===

impl Default for EngineLimits {
    /// No limit.
    fn default() -> Self {
        Self { max_bytes: usize::MAX }
    }
}

// === impl Engine ===

impl Default for Engine {
    fn default() -> Self {
        Self::new(EngineLimits::default())
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").finish_non_exhaustive()
    }
}

impl Engine {
    /// An empty engine.
    pub fn new(limits: EngineLimits) -> Self {
        let random = RandomState::new();
        let (table, table_writer) = Table::new([random.hash_one(0u8), random.hash_one(1u8)]);
        let shared = Shared {
            table,
            strands: Arena::default(),
            sets: Arena::default(),
            pins: Pins::default(),
            floating: AtomicUsize::new(0),
        };
        let writer = Mutex::new(Writer::new(&shared, table_writer, limits));
        Self { shared, writer }
    }

    /// Takes the writer's turn.
    pub fn write(&self) -> EngineWriter<'_> {
        EngineWriter { shared: &self.shared, writer: self.writer.lock() }
    }

    /// Who holds what of a prompt's keys, up to the first block that is not known.
    #[inline]
    pub fn find(&self, keys: &[BlockKey], out: &mut Match) {
        self.find_runs(None, keys, false, out);
    }

    /// The same, and also held blocks behind the first one that is not known: those of holders that need no whole
    /// prefix.
    pub fn find_beyond(&self, keys: &[BlockKey], out: &mut Match) {
        self.find_runs(None, keys, true, out);
    }

    /// Who holds what of the keys that follow the block `base_key`, the last of `base_blocks` (at least 1).
    ///
    /// Its holders count as holders of all `base_blocks`: what is before it is not looked at.
    pub fn find_after(
        &self,
        base_key: BlockKey,
        base_blocks: u32,
        keys: &[BlockKey],
        beyond: bool,
        out: &mut Match,
    ) {
        self.find_runs(Some((base_key, base_blocks)), keys, beyond, out);
    }

    #[inline]
    fn find_runs(&self, base: Option<(BlockKey, u32)>, keys: &[BlockKey], beyond: bool, out: &mut Match) {
        for _ in 0..MAX_TRIES {
            let pin = self.shared.pins.pin(&mut out.pin_hint);
            if self.shared.find_runs(base, keys, beyond, &pin, out).is_ok() {
                return;
            }
        }
        let writer = self.writer.lock();
        // Nothing changes now, so this succeeds.
        let done = self.shared.find_runs(base, keys, beyond, &writer.token, out);
        debug_assert!(done.is_ok(), "the writer's turn is ours");
    }

    /// Tells the engine what a thread matched since the last call, so that it counts as used. Does nothing while
    /// somebody writes; call it now and then.
    pub fn note_matches(&self, seen: &mut Match) {
        if let Some(mut writer) = self.writer.try_lock() {
            writer.note_matches(&self.shared, &seen.touched);
            seen.touched.clear();
            seen.touches = 0;
        }
    }

    /// How large it is.
    pub fn totals(&self) -> EngineTotals {
        self.write().totals()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let writer = self.writer.get_mut();
        let (strands, sets) = (writer.top, writer.sets.numbers());
        self.shared.strands.each_mut(strands, Header::clear);
        self.shared.sets.each_mut(sets, SetEntry::clear);
    }
}

// === impl EngineWriter ===

impl EngineWriter<'_> {
    /// `holder` holds these consecutive blocks from now on; the first one follows `parent`, or is a prompt's first
    /// block.
    ///
    /// Blocks may come in any order. A parent that is not known is remembered as a block that nobody holds, until it
    /// is stored itself. Who first said what a block follows is believed: keys name everything before them.
    #[inline]
    pub fn store(&mut self, holder: Holder, parent: Option<BlockKey>, keys: &[BlockKey]) -> Stored {
        self.writer.store(self.shared, holder, parent, keys)
    }

    /// `holder` holds these blocks no longer. Runs in order, forwards or backwards, are taken as one.
    #[inline]
    pub fn remove(&mut self, holder: Holder, keys: &[BlockKey]) -> Removed {
        self.writer.remove(self.shared, holder, keys)
    }

    /// Makes changes in order, and calls with the index and the outcome of each.
    ///
    /// Worth it over single calls: what a change will look at lies in several places that lead to one another, and
    /// while one change is made, those of the next ones are on their way from memory.
    pub fn apply(&mut self, changes: &[Change<'_>], mut with: impl FnMut(usize, Outcome)) {
        for (at, change) in changes.iter().enumerate() {
            self.writer.look_ahead(self.shared, changes, at);
            let outcome = match change.kind {
                ChangeKind::Stored(parent) => Outcome::Stored(self.store(change.holder, parent, change.keys)),
                ChangeKind::Removed => Outcome::Removed(self.remove(change.holder, change.keys)),
            };
            with(at, outcome);
        }
    }

    /// `holder` is to hold nothing any more. Takes time only in [`Self::release`]; until that is done, `holder` still
    /// holds the rest, and its number must not be given to anybody else.
    pub fn retire(&mut self, holder: Holder) -> Retired {
        self.writer.retire(holder)
    }

    /// Takes about `blocks` more blocks from a retired holder. True if it has none left.
    pub fn release(&mut self, retired: &mut Retired, blocks: usize) -> bool {
        self.writer.release(self.shared, retired, blocks)
    }

    /// `holder` holds nothing any more, all at once. Returns how many blocks that were.
    pub fn clear(&mut self, holder: Holder) -> usize {
        let mut retired = self.retire(holder);
        self.release(&mut retired, usize::MAX);
        retired.blocks
    }

    /// True if `holder` holds `key`.
    pub fn holds(&self, holder: Holder, key: BlockKey) -> bool {
        self.writer.holds(self.shared, holder, key)
    }

    /// Calls with each stretch of consecutive blocks that `holder` holds, and with the key the stretch follows, where
    /// there is one. Stretches come in no particular order.
    pub fn each_run_of(&self, holder: Holder, with: impl FnMut(Option<BlockKey>, &[BlockKey])) {
        self.writer.each_run(self.shared, holder, with);
    }

    /// Calls with each key of `holder` and the key it follows, where there is one.
    pub fn keys_of(&self, holder: Holder, mut with: impl FnMut(Option<BlockKey>, BlockKey)) {
        self.each_run_of(holder, |parent, keys| {
            let mut before = parent;
            for key in keys {
                with(before, *key);
                before = Some(*key);
            }
        });
    }

    /// Number of blocks of `holder`.
    pub fn blocks_of(&self, holder: Holder) -> usize {
        self.writer.holders.get(holder.0 as usize).map_or(0, |state| state.blocks)
    }

    /// What the blocks of `holder` look like from far away.
    pub fn digest_of(&self, holder: Holder) -> Digest {
        self.writer.holders.get(holder.0 as usize).map_or_else(Digest::default, |state| state.digest)
    }

    /// (holder, block) pairs.
    pub fn entries(&self) -> usize {
        self.writer.entries
    }

    /// Blocks that somebody holds.
    pub fn distinct(&self) -> usize {
        self.writer.distinct
    }

    /// Bytes in use; what the limit is about.
    pub fn bytes(&self) -> usize {
        self.writer.bytes(self.shared)
    }

    /// How large the engine is.
    pub fn totals(&self) -> EngineTotals {
        let writer = &*self.writer;
        EngineTotals {
            entries: writer.entries,
            distinct: writer.distinct,
            ghosts: writer.table.filled() - writer.distinct,
            strands: writer.top as usize - 1 - writer.free_strands.len(),
            floating: self.shared.floating.load(std::sync::atomic::Ordering::Relaxed),
            sets: writer.sets.count(),
            evicted: writer.evicted,
            bytes: writer.bytes(self.shared),
        }
    }

    /// Says what is wrong if the parts disagree. Costs a walk over everything; for tests and debugging.
    pub fn check(&self) -> Result<(), String> {
        self.writer.check(self.shared)
    }
}

// === impl Retired ===

impl Retired {
    /// Blocks that the holder held when it was retired.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// The holder whose number is not free yet.
    pub fn holder(&self) -> Holder {
        self.holder
    }
}

#[cfg(test)]
mod tests;
