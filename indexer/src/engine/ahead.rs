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
/// Keys of a removal whose lines are asked for.
const REMOVED_KEYS: usize = 8;

impl Writer {
    /// Takes the next step for the changes behind the one at index `at`.
    #[inline]
    pub(super) fn look_ahead(&self, shared: &Shared, changes: &[Change<'_>], at: usize) {
        if let Some(change) = changes.get(at + TABLE_AHEAD) {
            self.ask_table(shared, change);
        }
        if let Some(change) = changes.get(at + STRAND_AHEAD)
            && let Some(place) = self.likely(shared, change)
        {
            prefetch(&shared.strands, place);
        }
        if let Some(change) = changes.get(at + KEYS_AHEAD)
            && let Some(place) = self.likely(shared, change)
        {
            let keys = shared.strands.get(place.strand()).keys.load(&self.token);
            ask(keys.as_ptr().wrapping_add(place.offset() as usize));
        }
    }

    fn ask_table(&self, shared: &Shared, change: &Change<'_>) {
        let ask = |key: BlockKey| shared.table.prefetch_pair(shared.table.hash(key), &self.token);
        match change.kind {
            ChangeKind::Stored(parent) => {
                parent.into_iter().for_each(ask);
                change.keys.first().copied().into_iter().for_each(ask);
                if change.keys.len() > 1 {
                    change.keys.last().copied().into_iter().for_each(ask);
                }
            }
            ChangeKind::Removed => change.keys.iter().take(REMOVED_KEYS).copied().for_each(ask),
        }
    }

    /// Where the change begins, if the table's first guess is right: at the parent, or at the first removed block.
    #[inline]
    fn likely(&self, shared: &Shared, change: &Change<'_>) -> Option<Place> {
        let key = match change.kind {
            ChangeKind::Stored(parent) => parent?,
            ChangeKind::Removed => *change.keys.first()?,
        };
        shared.table.hint(shared.table.hash(key), &self.token)
    }
}
