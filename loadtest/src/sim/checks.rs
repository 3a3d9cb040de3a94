//! What must hold of a source in a shard at every moment, and what must hold once everything is quiet.
//!
//! * Whatever an index says of a source that is live (verified or not, silent, or degraded by its publisher's own word) is
//!   exactly what the publisher's mirror was after the frame that the index names.
//! * A degraded source's content never has a block that its publisher did not hold in this epoch.
//! * Once a frame of a newer epoch was heard, nothing of an older one is visible. (A clock that was set back makes a
//!   publisher look older than it was; then an index may go back, after the lease.)
//!
//! [`super::scores`] has what must hold of scores, and [`super::owned`] of what an index owns.

use kvatlas_index::sources::{DegradedReason, SourceState};
use kvatlas_index::{OwnerFilter, SourceInfo};
use kvatlas_proto::ShardId;
use kvatlas_proto::frame::SourceHealth;

use super::Sabotage;
use super::engine::Content;
use super::reference::differences;
use super::world::World;

/// What a state says about the content.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Claim {
    /// It does not count.
    Hidden,
    /// It counts and may be wrong.
    Doubtful,
    /// It is the publisher's state after the last frame applied.
    Exact,
}

// === impl Claim ===

impl Claim {
    pub(super) fn is_hidden(self) -> bool {
        self == Self::Hidden
    }
}

pub(super) fn claim(state: SourceState) -> Claim {
    match state {
        SourceState::Syncing | SourceState::Gone => Claim::Hidden,
        SourceState::Degraded(DegradedReason::FramesLost | DegradedReason::Diverged) => Claim::Doubtful,
        SourceState::Live | SourceState::Verified | SourceState::Degraded(_) => Claim::Exact,
    }
}

// === impl World: checks ===

impl World {
    /// Compares one source in one shard of an index with what its publisher's mirror was.
    pub(super) fn check_source(&mut self, number: usize, shim: usize, shard: ShardId) {
        if self.sabotage == Sabotage::SkipRemovalsUnseen {
            return;
        }
        let Some((info, content)) = self.look(number, shim, shard) else { return };
        self.counts.checks += 1;
        let claim = claim(info.state);
        let Some(epoch) = info.epoch.map(|epoch| epoch.0) else { return };
        let heard = self.indexes[number].heard.entry((shim, shard)).or_insert(epoch);
        if epoch < *heard && !self.clock_went_back && claim != Claim::Hidden {
            let what = format!(
                "index {number} shows epoch {epoch} of shim {shim} in shard {shard} after it heard of {heard}"
            );
            return self.fail("nothing of an older epoch is visible", what);
        }
        match claim {
            Claim::Hidden => {}
            Claim::Doubtful => {
                let foreign = content.iter().find(|block| !self.reference.ever(shim, shard, epoch, **block));
                if let Some((tier, key)) = foreign {
                    let what = format!(
                        "index {number} has {} {key:016x} of shim {shim} in shard {shard}, which it never held there in \
                         epoch {epoch} ({:?})",
                        tier.name(),
                        info.state
                    );
                    self.fail("only what was held in this epoch is visible", what);
                }
            }
            Claim::Exact => {
                let seq = info.applied_seq.map(|seq| seq.0);
                let expected = seq.and_then(|seq| self.reference.at(shim, shard, epoch, seq));
                if expected != Some(&content) {
                    let none = Content::new();
                    let difference = differences(&content, expected.unwrap_or(&none));
                    let what = format!(
                        "index {number} says {:?} of shim {shim} in shard {shard} at {epoch}.{seq:?}: {difference}",
                        info.state
                    );
                    let rule = if info.state == SourceState::Verified {
                        "a verified source is what its publisher held"
                    } else {
                        "a live source is what its publisher held"
                    };
                    self.fail(rule, what);
                }
            }
        }
    }

    /// `None` if every index is what the engines hold, else the first thing that is not yet so. A publisher that states
    /// that it lost events may miss some; then the index is what the mirror holds, which is never more than the truth.
    pub(super) fn unlike_the_truth(&mut self) -> Option<String> {
        for shim in 0..self.shims.len() {
            let truth = self.engines[shim].engine.truth();
            let Some(source) = self.shims[shim].source() else { return Some(format!("shim {shim} is dead")) };
            let health = source.health();
            if self.shims[shim].is_replaying() || source.has_frames() {
                return Some(format!("shim {shim} has something to say"));
            }
            let mirror = match self.shims[shim].mirror() {
                Ok(mirror) => mirror,
                Err(error) => return Some(error),
            };
            let complete = health == SourceHealth::Exact;
            let whole: Content = mirror.iter().flatten().copied().collect();
            if complete && whole != truth {
                return Some(format!("shim {shim}: {}", differences(&whole, &truth)));
            }
            if !whole.is_subset(&truth) {
                return Some(format!("shim {shim} ({health:?}): {}", differences(&whole, &truth)));
            }
            for number in 0..self.indexes.len() {
                for shard in self.indexes[number].owned.keys() {
                    let content = &mirror[usize::from(shard.number())];
                    if let Some(what) = self.unlike(number, shim, *shard, content) {
                        return Some(what);
                    }
                }
            }
        }
        None
    }

    /// `None` if a shard of an index is what a shim's mirror holds there, up to the last frame, and proved.
    fn unlike(&self, number: usize, shim: usize, shard: ShardId, mirror: &Content) -> Option<String> {
        let source = self.shims[shim].source()?;
        let ((epoch, next), health) = (source.position(shard), source.health());
        let Some((info, content)) = self.look(number, shim, shard) else {
            return Some(format!("index {number} does not know shim {shim} in shard {shard}"));
        };
        let complete = health == SourceHealth::Exact;
        let stated = match info.state {
            SourceState::Verified => complete,
            SourceState::Degraded(reason) => !complete && reason.name() == health.name(),
            _ => false,
        };
        let current = info.epoch == Some(epoch)
            && info.applied_seq.is_some_and(|seq| seq.next() == next)
            && info.verified_age_ms.is_some();
        if stated && current && content == *mirror {
            return None;
        }
        Some(format!(
            "index {number} says {:?} of shim {shim} ({health:?}) in shard {shard} at {:?}.{:?} of {}.{}, {}",
            info.state,
            info.epoch.map(|epoch| epoch.0),
            info.applied_seq.map(|seq| seq.0),
            epoch.0,
            next.0,
            differences(&content, mirror)
        ))
    }

    /// A source as an index has it in one shard.
    pub(super) fn look(&self, number: usize, shim: usize, shard: ShardId) -> Option<(SourceInfo, Content)> {
        let index = self.indexes[number].index()?;
        let filter =
            OwnerFilter { instance: Some(super::name(shim)), shard: Some(shard), ..OwnerFilter::default() };
        let info = index.sources(&filter, self.now_ms()).pop()?;
        let mut content = Content::new();
        for owner in index.dump(&filter) {
            let tier = owner.owner.tier;
            content.extend(index.keys_of(&owner).into_iter().map(|key| (tier, key)));
        }
        Some((info, content))
    }
}
