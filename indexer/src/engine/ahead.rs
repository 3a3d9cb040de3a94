//! Asking for memory ahead of use.
//!
//! Most changes are of one block: a line of the table for its parent and one for itself, the parent's strand, and the
//! end of that strand's keys. Each is a cache miss, and each leads to the next. In a list of changes, the misses of
//! the next ones overlap with the work of the present one: the table's lines are asked for first, the strand when they
//! should have come, its keys when the strand should have.

use kvatlas_proto::BlockKey;

use super::raw::prefetch as ask;
use super::strand::{Place, prefetch};
use super::write::Writer;
use super::{Change, ChangeKind, Shared};

/// Changes ahead at which each step is taken. A change of one block takes about 100 ns, a miss as much or twice that.
const TABLE_AHEAD: usize = 12;
const STRAND_AHEAD: usize = 8;
const KEYS_AHEAD: usize = 4;
/// Changes whose beginnings are remembered: those between finding them and making the change.
const REMEMBERED: usize = 2 * STRAND_AHEAD;
/// Keys of a removal whose lines are asked for.
const REMOVED_KEYS: usize = 8;

/// Where keys probably are. Whoever uses a hint looks whether the key is there.
#[derive(Default)]
pub(super) struct Hints {
    /// Where the changes ahead begin, by their index.
    ahead: [Option<Place>; REMEMBERED],
    /// Where the present change begins.
    first: Option<Place>,
    /// The block that was added last: the next one often follows it.
    last: Option<(BlockKey, Place)>,
}

// === impl Hints ===

impl Hints {
    /// Where the key may be, if it is the one that the present change begins at, or the last one that was added.
    #[inline]
    pub(super) fn of(&self, key: BlockKey) -> Option<Place> {
        match self.last {
            Some((last, place)) if last == key => Some(place),
            _ => self.first,
        }
    }

    /// This block was added.
    #[inline]
    pub(super) fn stored(&mut self, key: BlockKey, place: Place) {
        self.last = Some((key, place));
    }
}

// === impl Writer ===

impl Writer {
    /// Takes the next steps for the changes behind the one at index `at`, which is the next one to be made.
    #[inline]
    pub(super) fn look_ahead(&mut self, shared: &Shared, changes: &[Change<'_>], at: usize) {
        if at == 0 {
            (0..TABLE_AHEAD).for_each(|at| self.ask_table(shared, changes, at));
            (0..STRAND_AHEAD).for_each(|at| self.ask_strand(shared, changes, at));
            (0..KEYS_AHEAD).for_each(|at| self.ask_keys(shared, changes, at));
        }
        self.ask_table(shared, changes, at + TABLE_AHEAD);
        self.ask_strand(shared, changes, at + STRAND_AHEAD);
        self.ask_keys(shared, changes, at + KEYS_AHEAD);
        self.hints.first = self.hints.ahead[at % REMEMBERED];
    }

    #[inline]
    fn ask_table(&self, shared: &Shared, changes: &[Change<'_>], at: usize) {
        let Some(change) = changes.get(at) else { return };
        let ask = |key: BlockKey| shared.table.prefetch(shared.table.hash(key), &self.token);
        match change.kind {
            ChangeKind::Stored(_) => {
                begins_at(changes, at).into_iter().for_each(ask);
                change.keys.first().copied().into_iter().for_each(ask);
                if change.keys.len() > 1 {
                    change.keys.last().copied().into_iter().for_each(ask);
                }
            }
            ChangeKind::Removed => change.keys.iter().take(REMOVED_KEYS).copied().for_each(ask),
        }
    }

    /// Finds where the change begins, if the table's first guess is right.
    #[inline]
    fn ask_strand(&mut self, shared: &Shared, changes: &[Change<'_>], at: usize) {
        if at >= changes.len() {
            return;
        }
        let place =
            begins_at(changes, at).and_then(|key| shared.table.hint(shared.table.hash(key), &self.token));
        if let Some(place) = place {
            prefetch(&shared.strands, place);
        }
        self.hints.ahead[at % REMEMBERED] = place;
        self.ask_slot(shared, &changes[at], 1);
    }

    #[inline]
    fn ask_keys(&self, shared: &Shared, changes: &[Change<'_>], at: usize) {
        if at >= changes.len() {
            return;
        }
        if let Some(place) = self.hints.ahead[at % REMEMBERED] {
            let keys = shared.strands.get(place.strand()).keys.load(&self.token).as_ptr();
            ask(keys.wrapping_add(place.offset() as usize));
            ask(keys.wrapping_add(place.offset() as usize + 1));
        }
        self.ask_slot(shared, &changes[at], 2);
    }

    /// Asks for the line where a single new block will find room if the first `full` ones have none.
    #[inline]
    fn ask_slot(&self, shared: &Shared, change: &Change<'_>, full: usize) {
        if let (ChangeKind::Stored(_), [key]) = (change.kind, change.keys) {
            shared.table.prefetch_if_full(shared.table.hash(*key), full, &self.token);
        }
    }
}

/// The block that must be known for a change: the parent, or the first removed one. `None` if there is none, or if the
/// change before adds it.
#[inline]
fn begins_at(changes: &[Change<'_>], at: usize) -> Option<BlockKey> {
    let change = &changes[at];
    match change.kind {
        ChangeKind::Stored(parent) => {
            let before = at.checked_sub(1).and_then(|before| changes[before].keys.last().copied());
            parent.filter(|parent| before != Some(*parent))
        }
        ChangeKind::Removed => change.keys.first().copied(),
    }
}
