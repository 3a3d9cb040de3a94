//! What every source held after each of its frames, according to the frames themselves: the measure for "exact".
//!
//! A follower sees every frame that shims publish, before any loss, and keeps the digests after the newest ones. An index
//! is exact about a source if its digests at its sequence are the ones kept here. That the frames are true in turn is
//! checked elsewhere: heartbeats against what is added up here, and the engines' own blocks at the end.

use std::collections::{BTreeMap, VecDeque};

use kvatlas_proto::frame::{Change, FrameOwner, FramePart, FrameView};
use kvatlas_proto::{BlockKey, Digest, SourceId, Tier, grpc};

/// Frames of which the digests are kept, per source: ten seconds of a busy source and more.
const KEPT_FRAMES: usize = 8_192;
/// An index is exact only if what it has not applied yet is not older than this, milliseconds.
pub const FRESH_MS: u64 = 250;

/// Follows the sources of a fleet.
#[derive(Debug, Default)]
pub struct Follower {
    sources: BTreeMap<SourceId, Track>,
    disagreements: u64,
}

#[derive(Debug, Default)]
struct Track {
    epoch: u64,
    owners: Vec<FrameOwner>,
    digests: Vec<Digest>,
    moments: VecDeque<Moment>,
}

/// A source after one frame.
#[derive(Debug)]
struct Moment {
    seq: u64,
    published_ms: u64,
    digests: Box<[Digest]>,
}

/// What is to be said about an index's idea of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// It is what the source held at that frame, and nothing older than [`FRESH_MS`] is missing.
    Exact,
    /// It was right at that frame, and that is too long ago.
    Behind,
    /// It is not what the source held at that frame, or of another epoch.
    Different,
    /// It does not count, or the frame is not known here.
    Unknown,
}

// === impl Follower ===

impl Follower {
    /// A frame was published on its source's event subject.
    pub fn observe(&mut self, frame: &FrameView<'_>, now_ms: u64) {
        let header = frame.header();
        let track = self.sources.entry(header.source.clone()).or_default();
        if header.part == FramePart::Start {
            *track = Track { epoch: header.epoch.0, digests: header.digests.clone(), ..Track::default() };
        }
        if header.epoch.0 != track.epoch {
            return;
        }
        track.owners.clone_from(&header.owners);
        track.digests.resize(header.owners.len(), Digest::default());
        for op in frame.ops() {
            let digest = &mut track.digests[op.owner];
            match op.change {
                Change::Stored { keys, .. } => keys.iter().for_each(|key| digest.add(key)),
                Change::Removed(keys) => keys.iter().for_each(|key| take(digest, key)),
                Change::Cleared => *digest = Digest::default(),
                Change::Bucket { .. } => {}
            }
        }
        if !header.digests.is_empty() && header.digests != track.digests {
            self.disagreements += 1;
        }
        track.moments.push_back(Moment {
            seq: header.seq.0,
            published_ms: now_ms,
            digests: track.digests.clone().into(),
        });
        if track.moments.len() > KEPT_FRAMES {
            track.moments.pop_front();
        }
    }

    /// Heartbeats whose digests are not what the frames before them add up to: a publisher that contradicts itself.
    pub fn disagreements(&self) -> u64 {
        self.disagreements
    }

    /// Sources seen so far.
    pub fn sources(&self) -> usize {
        self.sources.len()
    }

    /// Judges what an index says about a source.
    pub fn judge(&self, said: &grpc::Source, now_ms: u64) -> Judgement {
        let same =
            |id: &&SourceId| id.instance.as_str() == said.instance && id.rank.0 == said.data_parallel_rank;
        let Some(track) = self.sources.keys().find(same).and_then(|id| self.sources.get(id)) else {
            return Judgement::Unknown;
        };
        if matches!(said.state(), grpc::SourceState::Syncing | grpc::SourceState::Gone) {
            return Judgement::Unknown;
        }
        let Some(seq) = said.applied_seq else { return Judgement::Unknown };
        if said.epoch != track.epoch {
            return Judgement::Different;
        }
        let Some(at) = track.position(seq) else { return Judgement::Unknown };
        if !track.is_equal(&track.moments[at].digests, &said.owners) {
            return Judgement::Different;
        }
        let waiting = track.moments.get(at + 1).map_or(0, |next| now_ms.saturating_sub(next.published_ms));
        if waiting > FRESH_MS { Judgement::Behind } else { Judgement::Exact }
    }
}

/// A key that was not held cannot be taken away; a publisher that says so disagrees with its next heartbeat.
fn take(digest: &mut Digest, key: BlockKey) {
    if digest.count > 0 {
        digest.remove(key);
    }
}

// === impl Track ===

impl Track {
    fn position(&self, seq: u64) -> Option<usize> {
        // Sequences are contiguous.
        let at = seq.checked_sub(self.moments.front()?.seq)? as usize;
        (at < self.moments.len()).then_some(at)
    }

    fn is_equal(&self, ours: &[Digest], theirs: &[grpc::Owner]) -> bool {
        let named = |owner: &FrameOwner| {
            theirs.iter().find(|their| {
                their.tier() == tier_of(owner.tier)
                    && their.medium == owner.medium
                    && their.group == u32::from(owner.group.0)
            })
        };
        let equal = self.owners.iter().zip(ours).all(|(owner, digest)| {
            named(owner).map_or(digest.is_empty(), |their| {
                their.blocks == digest.count && their.digest == format!("{:032x}", digest.sum)
            })
        });
        let blocks: u64 = theirs.iter().map(|their| their.blocks).sum();
        equal && blocks == ours.iter().map(|digest| digest.count).sum::<u64>()
    }
}

fn tier_of(tier: Tier) -> grpc::Tier {
    match tier {
        Tier::Gpu => grpc::Tier::Gpu,
        Tier::Cpu => grpc::Tier::Cpu,
        Tier::Ssd => grpc::Tier::Ssd,
        Tier::Remote => grpc::Tier::Remote,
        Tier::Unknown => grpc::Tier::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use kvatlas_proto::{InstanceId, ShardId};
    use kvatlas_shim::source::{Source, SourceConfig};

    use super::*;
    use crate::recovery::churn::{ChurnEngine, MIN_CAPACITY};
    use crate::wire::{Batch, MapVersion, WireForm};

    struct Story {
        engine: ChurnEngine,
        source: Source,
        follower: Follower,
    }

    impl Story {
        fn new() -> Self {
            let config = SourceConfig::new("m", InstanceId::new("a:1").unwrap());
            let source = Source::new(config, 1).unwrap();
            Self { engine: ChurnEngine::new(1, MIN_CAPACITY, 1), source, follower: Follower::default() }
        }

        /// One step, published at `now_ms`; returns what an index that applied everything says.
        fn step(&mut self, seq: u64, now_ms: u64, heartbeat: bool) -> grpc::Source {
            let batch = Batch { time_s: 0.0, events: self.engine.step(100, now_ms), rank: 0 };
            self.source.live(seq, &batch.encode(WireForm::Map(MapVersion::V0_33)), false);
            for outgoing in self.source.take_frames(now_ms + 1, heartbeat).unwrap() {
                self.follower.observe(&FrameView::parse(&outgoing.frame).unwrap(), now_ms);
            }
            let digest = self.source.mirror().digests(ShardId::WHOLE)[0];
            let (epoch, next) = self.source.position(ShardId::WHOLE);
            grpc::Source {
                instance: "a:1".into(),
                epoch: epoch.0,
                applied_seq: Some(next.0 - 1),
                state: grpc::SourceState::Live.into(),
                owners: vec![grpc::Owner {
                    tier: grpc::Tier::Gpu.into(),
                    medium: "GPU".into(),
                    blocks: digest.count,
                    digest: format!("{:032x}", digest.sum),
                    ..Default::default()
                }],
                ..Default::default()
            }
        }
    }

    #[test]
    fn exact_is_what_was_held_at_that_frame_and_only_while_nothing_old_is_missing() {
        let mut story = Story::new();
        let first = story.step(0, 0, false);
        assert_eq!(story.follower.judge(&first, 9_999), Judgement::Exact, "an idle source is never behind");
        let second = story.step(1, 1_000, true);
        assert_eq!(story.follower.judge(&second, 1_000), Judgement::Exact);
        assert_eq!(story.follower.judge(&first, 1_000 + FRESH_MS), Judgement::Exact);
        assert_eq!(story.follower.judge(&first, 1_001 + FRESH_MS), Judgement::Behind);
        let mixed = grpc::Source { owners: first.owners.clone(), ..second.clone() };
        assert_eq!(story.follower.judge(&mixed, 1_000), Judgement::Different);
        let other_epoch = grpc::Source { epoch: 77, ..second.clone() };
        assert_eq!(story.follower.judge(&other_epoch, 1_000), Judgement::Different);
        let hidden = grpc::Source { state: grpc::SourceState::Syncing.into(), ..second };
        assert_eq!(story.follower.judge(&hidden, 1_000), Judgement::Unknown);
        assert_eq!((story.follower.disagreements(), story.follower.sources()), (0, 1));
    }

    #[test]
    fn a_frame_that_is_missing_here_shows_at_the_next_heartbeat() {
        let mut story = Story::new();
        story.step(0, 0, true);
        let observed = std::mem::take(&mut story.follower);
        story.step(1, 1, false);
        story.follower = observed;
        story.step(2, 2, true);
        assert_eq!(story.follower.disagreements(), 1);
    }
}
