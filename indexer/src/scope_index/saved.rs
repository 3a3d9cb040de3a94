//! What a checkpoint says of a scope, and how it is taken in.

use kvatlas_proto::SourceId;
use kvatlas_proto::frame::FrameOwner;
use parking_lot::RwLockWriteGuard;

use super::{Budget, OwnerNo, ScopeIndex, SourceEntry};
use crate::changes::SLICE_KEYS;
use crate::checkpoint::{SavedOwner, SavedSource};
use crate::index::PartId;
use crate::sources::{SourceState, SourceTracker};

// === impl ScopeIndex ===

impl ScopeIndex {
    /// Who publishes here.
    pub(crate) fn source_ids(&self) -> Vec<SourceId> {
        self.state.read().ids.keys().cloned().collect()
    }

    /// What a checkpoint says of a source; `None` for one that is gone.
    pub(crate) fn save(&self, (scope, shard): &PartId, source: &SourceId) -> Option<SavedSource> {
        let state = self.state.read();
        let entry = state.source(*state.ids.get(source)?)?;
        if entry.tracker.state() == SourceState::Gone {
            return None;
        }
        let saved = |no: &OwnerNo| {
            let owner = state.owner(*no)?;
            Some(SavedOwner {
                owner: FrameOwner {
                    tier: owner.tier.tier(),
                    medium: owner.medium.to_string(),
                    group: owner.group,
                    kind: owner.kind,
                    load_blocks: owner.load_blocks,
                },
                blocks: state.blocks_with_parents(*no),
            })
        };
        Some(SavedSource {
            scope: scope.clone(),
            shard: *shard,
            source: source.clone(),
            epoch: entry.tracker.epoch()?,
            variant: entry.variant,
            owners: entry.owners.iter().filter_map(saved).collect(),
        })
    }

    /// Takes in what a checkpoint says of a source, and returns how many blocks that are. `None` if the source is known
    /// already or does not fit.
    pub(crate) fn restore(
        &self,
        saved: &SavedSource,
        now_ms: u64,
        max_sources: usize,
        budget: &Budget,
    ) -> Option<usize> {
        let _writer = self.writer.lock();
        let mut state = self.state.write();
        if state.ids.contains_key(&saved.source) || state.ids.len() >= max_sources {
            return None;
        }
        let no = state.add_source(SourceEntry {
            id: saved.source.clone(),
            tracker: SourceTracker::restored(saved.epoch, now_ms).bounded_by(budget.recovery),
            variant: saved.variant,
            owners: Vec::new(),
        });
        let (mut stored, mut since_pause) = (0, 0);
        for SavedOwner { owner, blocks } in &saved.owners {
            let Some(owner) = state.find_or_add_owner(no, owner, budget) else { continue };
            for (parent, key) in blocks {
                stored += state.store(owner, *parent, &[*key], budget).new;
                since_pause += 1;
                if since_pause >= SLICE_KEYS {
                    since_pause = 0;
                    RwLockWriteGuard::bump(&mut state);
                }
            }
        }
        Some(stored)
    }
}
