//! What each publisher's mirror was in each shard after each frame of that lane: the judge of every index. It is kept by
//! reading the published frames naively, and compared with the mirror itself each time. That every block is in its own lane is
//! judged by the prompts, so that all lanes together are the mirror, and nothing is in two.

use std::collections::BTreeMap;
use std::rc::Rc;

use bytes::Bytes;
use kvatlas_proto::frame::{Change, FrameHeader, FramePart, FrameView};
use kvatlas_proto::{BlockKey, Digest, Partition, ShardId, Tier};
use kvatlas_shim::source::Outgoing;

use super::engine::Content;
use super::prompts::Prompts;

/// All publishers' histories.
pub(super) struct Reference {
    partition: Partition,
    /// By publisher and shard.
    lanes: Vec<Vec<History>>,
}

/// One publisher in one shard, through all its lives.
#[derive(Default)]
struct History {
    /// By epoch.
    epochs: BTreeMap<u64, EpochHistory>,
    /// After the newest frame.
    now: Rc<Content>,
    /// What this life of the process began with, from its file.
    restored: Content,
}

/// One epoch.
#[derive(Default)]
struct EpochHistory {
    /// After each frame, by sequence.
    states: Vec<Rc<Content>>,
    /// All blocks that were held at any time.
    ever: Content,
}

// === impl Reference ===

impl Reference {
    pub(super) fn new(shims: usize, partition: Partition) -> Self {
        let lanes = || partition.all().map(|_| History::default()).collect();
        Self { partition, lanes: (0..shims).map(|_| lanes()).collect() }
    }

    /// Notes what a process begins with, by shard.
    pub(super) fn restored(&mut self, shim: usize, mirror: Vec<Content>) {
        for (history, content) in self.lanes[shim].iter_mut().zip(mirror) {
            history.restored = content;
        }
    }

    /// Notes frames that were published in one go, after which the mirror is `mirror`, by shard. Says what is wrong with them.
    pub(super) fn published(
        &mut self,
        shim: usize,
        frames: &[Outgoing],
        mirror: &[Content],
    ) -> Result<(), String> {
        let partition = self.partition;
        for ((shard, mirror), history) in partition.all().zip(mirror).zip(&mut self.lanes[shim]) {
            let wrong = |error: String| format!("shim {shim}, shard {shard}: {error}");
            let views: Vec<FrameView<'_>> = frames
                .iter()
                .filter(|outgoing| outgoing.shard == shard)
                .map(|outgoing| FrameView::parse(&outgoing.frame).map_err(|error| wrong(error.to_string())))
                .collect::<Result<_, _>>()?;
            for (at, view) in views.iter().enumerate() {
                check_places(view, shard, partition).map_err(wrong)?;
                history.published(view, &views[at + 1..], mirror).map_err(wrong)?;
            }
            if *history.now != *mirror {
                let difference = differences(&history.now, mirror);
                return Err(wrong(format!("frames do not add up to the mirror: {difference}")));
            }
        }
        let newest = |history: &History| history.epochs.last_key_value().map(|(epoch, _)| *epoch);
        let mut epochs = self.lanes[shim].iter().map(newest);
        let first = epochs.next();
        if epochs.any(|epoch| Some(epoch) != first) {
            return Err(format!("shim {shim}: its lanes are not of one epoch"));
        }
        Ok(())
    }

    /// What was held in a shard after a frame of it.
    pub(super) fn at(&self, shim: usize, shard: ShardId, epoch: u64, seq: u64) -> Option<&Content> {
        self.epoch(shim, shard, epoch)?.states.get(seq as usize).map(Rc::as_ref)
    }

    /// True if a block was held in a shard at any time in an epoch.
    pub(super) fn ever(&self, shim: usize, shard: ShardId, epoch: u64, block: (Tier, u64)) -> bool {
        self.epoch(shim, shard, epoch).is_some_and(|epoch| epoch.ever.contains(&block))
    }

    fn epoch(&self, shim: usize, shard: ShardId, epoch: u64) -> Option<&EpochHistory> {
        self.lanes[shim][usize::from(shard.number())].epochs.get(&epoch)
    }
}

/// Every block of a frame is of the frame's shard, and the frame says so.
fn check_places(view: &FrameView<'_>, shard: ShardId, partition: Partition) -> Result<(), String> {
    if view.header().shard != shard {
        return Err(format!("a frame says that it is of shard {}", view.header().shard));
    }
    for op in view.ops() {
        let (Change::Stored { keys, .. } | Change::Removed(keys)) = op.change else { continue };
        for key in keys.iter() {
            let place = Prompts::get().shard_of(key.0, partition);
            if place != Some(shard.number()) {
                return Err(format!("block {:016x} is of shard {place:?}", key.0));
            }
        }
    }
    Ok(())
}

// === impl History ===

impl History {
    fn published(
        &mut self,
        view: &FrameView<'_>,
        later: &[FrameView<'_>],
        mirror: &Content,
    ) -> Result<(), String> {
        let header = view.header();
        let (epoch, seq) = (header.epoch.0, header.seq.0);
        if header.part == FramePart::Start {
            if self.epochs.contains_key(&epoch) {
                return Err(format!("epoch {epoch} starts twice"));
            }
            self.now = Rc::new(self.start(header, later, mirror)?);
        }
        let known = self.epochs.entry(epoch).or_default();
        if known.states.len() as u64 != seq {
            return Err(format!("sequence {seq} of epoch {epoch} follows {} frames", known.states.len()));
        }
        if view.ops().next().is_some() {
            apply(view, Rc::make_mut(&mut self.now));
        }
        check_digests(header, &self.now)?;
        known.ever.extend(self.now.iter().copied());
        known.states.push(Rc::clone(&self.now));
        Ok(())
    }

    /// What is held when an epoch starts: of each owner nothing, or what was held before, or what came from a file, or what
    /// the mirror holds less the changes of the frames that follow; the digests say which.
    fn start(
        &self,
        header: &FrameHeader,
        later: &[FrameView<'_>],
        mirror: &Content,
    ) -> Result<Content, String> {
        let mut undone = mirror.clone();
        for view in later.iter().rev() {
            let header = view.header();
            let ops: Vec<_> = view.ops().collect();
            for op in ops.into_iter().rev() {
                let tier = header.owners[op.owner].tier;
                match op.change {
                    Change::Stored { keys, .. } => {
                        keys.iter().for_each(|key| {
                            undone.remove(&(tier, key.0));
                        });
                    }
                    Change::Removed(keys) => {
                        undone.extend(keys.iter().map(|key| (tier, key.0)));
                    }
                    Change::Cleared | Change::Bucket { .. } => {}
                }
            }
        }
        let mut start = Content::new();
        for (owner, digest) in header.owners.iter().zip(&header.digests) {
            let of = |content: &Content| -> Content {
                content.iter().filter(|(tier, _)| *tier == owner.tier).copied().collect()
            };
            let candidates = [Content::new(), of(&self.now), of(&self.restored), of(&undone)];
            let fitting = candidates.into_iter().find(|content| digest_of(content, owner.tier) == *digest);
            let Some(fitting) = fitting else {
                return Err(format!(
                    "the epoch starts with {digest:?} of {:?}, which it never held",
                    owner.tier
                ));
            };
            start.extend(fitting);
        }
        Ok(start)
    }
}

fn apply(view: &FrameView<'_>, content: &mut Content) {
    let owners = &view.header().owners;
    for op in view.ops() {
        let tier = owners[op.owner].tier;
        match op.change {
            Change::Stored { keys, .. } => content.extend(keys.iter().map(|key| (tier, key.0))),
            Change::Removed(keys) => keys.iter().for_each(|key| {
                content.remove(&(tier, key.0));
            }),
            Change::Cleared => content.retain(|(other, _)| *other != tier),
            Change::Bucket { .. } => {}
        }
    }
}

fn check_digests(header: &FrameHeader, content: &Content) -> Result<(), String> {
    for (owner, digest) in header.owners.iter().zip(&header.digests) {
        if digest_of(content, owner.tier) != *digest {
            let (epoch, seq) = (header.epoch.0, header.seq.0);
            return Err(format!(
                "the digest of {:?} after frame {seq} of epoch {epoch} is not its own",
                owner.tier
            ));
        }
    }
    Ok(())
}

fn digest_of(content: &Content, tier: Tier) -> Digest {
    Digest::of(content.iter().filter(|(of, _)| *of == tier).map(|(_, key)| BlockKey(*key)))
}

/// All blocks that the frames of a whole answer say, when nothing was there before.
pub(super) fn content_of_answer(frames: &[Bytes]) -> Content {
    let mut content = Content::new();
    for frame in frames {
        if let Ok(view) = FrameView::parse(frame) {
            apply(&view, &mut content);
        }
    }
    content
}

/// How two contents differ, for people.
pub(super) fn differences(mine: &Content, theirs: &Content) -> String {
    let list = |a: &Content, b: &Content| {
        let only: Vec<String> =
            a.difference(b).map(|(tier, key)| format!("{}:{key:016x}", tier.name())).collect();
        format!("{} [{}]", only.len(), only.iter().take(6).cloned().collect::<Vec<_>>().join(" "))
    };
    format!("too many: {}, missing: {}", list(mine, theirs), list(theirs, mine))
}

#[cfg(test)]
mod tests {
    use kvatlas_proto::frame::{FrameOwner, OpBuffer, SourceHealth};
    use kvatlas_proto::keys::KeyVariant;
    use kvatlas_proto::{
        CacheGroup, DpRank, Epoch, FrameSeq, GroupKind, InstanceId, KeyHasher, Scope, SourceId,
    };

    use super::*;

    /// A frame that begins an epoch with these blocks.
    fn frame(shard: ShardId, epoch: u64, keys: &[u64]) -> Outgoing {
        let mut ops = OpBuffer::default();
        keys.iter().for_each(|key| ops.stored(0, KeyHasher::default().root(), BlockKey(*key)));
        let owner = FrameOwner {
            tier: Tier::Gpu,
            medium: "GPU".to_owned(),
            group: CacheGroup(0),
            kind: GroupKind::Full,
            load_blocks: 1,
        };
        let header = FrameHeader {
            scope: Scope::new("m", "", 4, 1).unwrap(),
            source: SourceId { instance: InstanceId::new("a:1").unwrap(), rank: DpRank(0) },
            shard,
            variant: KeyVariant::default(),
            epoch: Epoch(epoch),
            seq: FrameSeq(0),
            part: FramePart::Live,
            health: SourceHealth::Exact,
            engine_time_ns: 0,
            owners: vec![owner],
            digests: Vec::new(),
            reply: None,
        };
        Outgoing { shard, frame: header.encode(&mut ops).unwrap().into() }
    }

    #[test]
    fn a_publisher_that_puts_a_block_into_another_lane_is_found_though_its_mirror_agrees() {
        let partition = Partition::new(3).unwrap();
        let (key, prompts) = (Prompts::get().keys(4)[40], Prompts::get());
        let own = prompts.shard_of(key, partition).unwrap();
        for lane in partition.all() {
            let of = |shard: ShardId| if shard == lane { vec![key] } else { Vec::new() };
            let frames: Vec<_> = partition.all().map(|shard| frame(shard, 7, &of(shard))).collect();
            let held = |key: u64| (Tier::Gpu, key);
            let mirror: Vec<Content> =
                partition.all().map(|shard| of(shard).into_iter().map(held).collect()).collect();
            let judged = Reference::new(1, partition).published(0, &frames, &mirror);
            assert_eq!(judged.is_ok(), lane.number() == own, "{judged:?}");
        }
    }

    #[test]
    fn lanes_of_two_epochs_are_found() {
        let partition = Partition::new(2).unwrap();
        let judge = |epochs: [u64; 2]| {
            let frames: Vec<_> =
                partition.all().zip(epochs).map(|(shard, epoch)| frame(shard, epoch, &[])).collect();
            Reference::new(1, partition).published(0, &frames, &[Content::new(), Content::new()])
        };
        assert_eq!(judge([7, 7]), Ok(()));
        assert!(judge([7, 8]).unwrap_err().contains("one epoch"));
    }
}
