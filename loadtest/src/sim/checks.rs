//! What must hold at every moment, and what must hold once everything is quiet.
//!
//! * Whatever an index says of a source that is live (verified or not, silent, or degraded by its publisher's own word) is
//!   exactly what the publisher's mirror was after the frame that the index names.
//! * A degraded source's content never has a block that its publisher did not hold in this epoch.
//! * A source that is syncing or gone does not count in a score; every other counts with what it holds.
//! * Once a frame of a newer epoch was heard, nothing of an older one is visible. (A clock that was set back makes a
//!   publisher look older than it was; then an index may go back, after the lease.)

use kvatlas_index::matching::TierWeights;
use kvatlas_index::sources::{DegradedReason, SourceState};
use kvatlas_index::{Index, OwnerFilter, PromptInput, ScoreQuery, SourceInfo};
use kvatlas_proto::frame::SourceHealth;
use kvatlas_proto::{ShardId, Tier};

use super::Sabotage;
use super::engine::Content;
use super::prompts::{BLOCK_TOKENS, PROMPTS, Prompts};
use super::reference::differences;
use super::shim_side::MODEL;
use super::world::World;

/// What a state says about the content.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Claim {
    /// It does not count.
    Hidden,
    /// It counts and may be wrong.
    Doubtful,
    /// It is the publisher's state after the last frame applied.
    Exact,
}

fn claim(state: SourceState) -> Claim {
    match state {
        SourceState::Syncing | SourceState::Gone => Claim::Hidden,
        SourceState::Degraded(DegradedReason::FramesLost | DegradedReason::Diverged) => Claim::Doubtful,
        SourceState::Live | SourceState::Verified | SourceState::Degraded(_) => Claim::Exact,
    }
}

// === impl World: checks ===

impl World {
    /// Compares one source in one index with what its publisher's mirror was.
    pub(super) fn check_source(&mut self, number: usize, shim: usize) {
        if self.sabotage == Sabotage::SkipRemovalsUnseen {
            return;
        }
        let Some((info, content)) = self.look(number, shim) else { return };
        self.counts.checks += 1;
        let claim = claim(info.state);
        let Some(epoch) = info.epoch.map(|epoch| epoch.0) else { return };
        let heard = self.indexes[number].heard.entry(shim).or_insert(epoch);
        if epoch < *heard && !self.clock_went_back && claim != Claim::Hidden {
            let what = format!("index {number} shows epoch {epoch} of shim {shim} after it heard of {heard}");
            return self.fail("nothing of an older epoch is visible", what);
        }
        match claim {
            Claim::Hidden => {}
            Claim::Doubtful => {
                let foreign = content.iter().find(|block| !self.reference.ever(shim, epoch, **block));
                if let Some((tier, key)) = foreign {
                    let what = format!(
                        "index {number} has {} {key:016x} of shim {shim}, which it never held in epoch {epoch} ({:?})",
                        tier.name(),
                        info.state
                    );
                    self.fail("only what was held in this epoch is visible", what);
                }
            }
            Claim::Exact => {
                let seq = info.applied_seq.map(|seq| seq.0);
                let expected = seq.and_then(|seq| self.reference.at(shim, epoch, seq));
                if expected != Some(&content) {
                    let none = Content::new();
                    let difference = differences(&content, expected.unwrap_or(&none));
                    let what = format!(
                        "index {number} says {:?} of shim {shim} at {epoch}.{seq:?}: {difference}",
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

    /// Compares the scores of all prompts with what the index itself says it holds.
    pub(super) fn check_scores(&mut self, number: usize) {
        self.counts.score_checks += 1;
        let held: Vec<_> = (0..self.shims.len())
            .filter_map(|shim| Some((super::name(shim), self.look(number, shim)?)))
            .collect();
        let Some(index) = self.indexes[number].index() else { return };
        let mut wrong = None;
        for prompt in 0..PROMPTS {
            let keys = Prompts::get().keys(prompt);
            let rows = score(index, &keys);
            for (name, (info, content)) in &held {
                let row = rows.iter().find(|(instance, ..)| instance == name);
                let found = row.map_or((0, 0, 0), |(_, depths)| *depths);
                let expected = match claim(info.state) {
                    Claim::Hidden => (0, 0, 0),
                    _ => depths(content, &keys),
                };
                if found != expected {
                    wrong = Some(format!(
                        "index {number} scores #{prompt} on {name} ({:?}) {found:?}, it holds {expected:?}",
                        info.state
                    ));
                }
            }
        }
        if let Some(what) = wrong {
            self.fail("scores are what visible sources hold", what);
        }
    }

    /// `None` if every index is what the engines hold, else the first thing that is not yet so. A publisher that states
    /// that it lost events may miss some; then the index is what the mirror holds, which is never more than the truth.
    pub(super) fn unlike_the_truth(&mut self) -> Option<String> {
        for shim in 0..self.shims.len() {
            let truth = self.engines[shim].engine.truth();
            let Some(source) = self.shims[shim].source() else { return Some(format!("shim {shim} is dead")) };
            let health = source.health();
            let (epoch, next) = source.position(ShardId::WHOLE);
            if self.shims[shim].is_replaying() || source.has_frames() {
                return Some(format!("shim {shim} has something to say"));
            }
            let mirror = match self.shims[shim].mirror() {
                Ok(mirror) => mirror,
                Err(error) => return Some(error),
            };
            let complete = health == SourceHealth::Exact;
            if complete && mirror != truth {
                return Some(format!("shim {shim}: {}", differences(&mirror, &truth)));
            }
            if !mirror.is_subset(&truth) {
                return Some(format!("shim {shim} ({health:?}): {}", differences(&mirror, &truth)));
            }
            for number in 0..self.indexes.len() {
                let Some((info, content)) = self.look(number, shim) else {
                    return Some(format!("index {number} does not know shim {shim}"));
                };
                let stated = match info.state {
                    SourceState::Verified => complete,
                    SourceState::Degraded(reason) => !complete && reason.name() == health.name(),
                    _ => false,
                };
                let current = info.epoch == Some(epoch)
                    && info.applied_seq.is_some_and(|seq| seq.next() == next)
                    && info.verified_age_ms.is_some();
                if !stated || !current || content != mirror {
                    return Some(format!(
                        "index {number} says {:?} of shim {shim} ({health:?}) at {:?}.{:?} of {}.{}, {}",
                        info.state,
                        info.epoch.map(|epoch| epoch.0),
                        info.applied_seq.map(|seq| seq.0),
                        epoch.0,
                        next.0,
                        differences(&content, &mirror)
                    ));
                }
            }
        }
        None
    }

    /// A source as an index has it.
    fn look(&self, number: usize, shim: usize) -> Option<(SourceInfo, Content)> {
        let index = self.indexes[number].index()?;
        let filter = OwnerFilter { instance: Some(super::name(shim)), ..OwnerFilter::default() };
        let info = index.sources(&filter, self.now_ms()).pop()?;
        let mut content = Content::new();
        for owner in index.dump(&filter) {
            let tier = owner.owner.tier;
            content.extend(index.keys_of(&owner).into_iter().map(|key| (tier, key)));
        }
        Some((info, content))
    }
}

/// Depths of a match: any tier, device alone, host alone.
type Depths = (u32, u32, u32);

fn score(index: &Index, keys: &[u64]) -> Vec<(String, Depths)> {
    let query = ScoreQuery {
        model: MODEL,
        tenant: "",
        block_size: Some(BLOCK_TOKENS),
        input: PromptInput::Keys { keys, prompt_tokens: None },
        candidates: &[],
        weights: TierWeights::default(),
        limit: None,
    };
    // Refused while no engine has said its block size: nobody holds anything then.
    let answer = index.score(&query).unwrap_or_default();
    let depths = |row: &kvatlas_index::ScoreRow| {
        let of = |tier| {
            row.matched.tiers.iter().find(|depth| depth.tier.tier() == tier).map_or(0, |it| it.matched_blocks)
        };
        (row.matched.matched_blocks, of(Tier::Gpu), of(Tier::Cpu))
    };
    answer.rows.iter().map(|row| (row.instance.clone(), depths(row))).collect()
}

fn depths(content: &Content, keys: &[u64]) -> Depths {
    let leading = |holds: &dyn Fn(u64) -> bool| keys.iter().take_while(|key| holds(**key)).count() as u32;
    let on = |tier, key| content.contains(&(tier, key));
    (
        leading(&|key| on(Tier::Gpu, key) || on(Tier::Cpu, key)),
        leading(&|key| on(Tier::Gpu, key)),
        leading(&|key| on(Tier::Cpu, key)),
    )
}
