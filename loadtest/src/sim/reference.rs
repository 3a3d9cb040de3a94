//! What each publisher's mirror was after each of its frames: the judge of every index. It is kept by reading the
//! published frames naively, and compared with the mirror itself each time.

use std::collections::BTreeMap;
use std::rc::Rc;

use bytes::Bytes;
use kvatlas_proto::frame::{Change, FrameHeader, FramePart, FrameView};
use kvatlas_proto::{BlockKey, Digest, Tier};

use super::engine::Content;

/// All publishers' histories.
pub(super) struct Reference(Vec<History>);

/// One publisher through all its lives.
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
    pub(super) fn new(shims: usize) -> Self {
        Self((0..shims).map(|_| History::default()).collect())
    }

    /// Notes what a process begins with.
    pub(super) fn restored(&mut self, shim: usize, content: Content) {
        self.0[shim].restored = content;
    }

    /// Notes frames that were published in one go, after which the mirror is `mirror`. Says what is wrong with them.
    pub(super) fn published(
        &mut self,
        shim: usize,
        frames: &[Bytes],
        mirror: &Content,
    ) -> Result<(), String> {
        let views: Vec<FrameView<'_>> = frames
            .iter()
            .map(|frame| FrameView::parse(frame).map_err(|error| format!("shim {shim}: {error}")))
            .collect::<Result<_, _>>()?;
        let history = &mut self.0[shim];
        for (at, view) in views.iter().enumerate() {
            history
                .published(view, &views[at + 1..], mirror)
                .map_err(|error| format!("shim {shim}: {error}"))?;
        }
        if *history.now != *mirror {
            let difference = differences(&history.now, mirror);
            return Err(format!("shim {shim}: frames do not add up to the mirror: {difference}"));
        }
        Ok(())
    }

    /// The state after a frame.
    pub(super) fn at(&self, shim: usize, epoch: u64, seq: u64) -> Option<&Content> {
        self.0[shim].epochs.get(&epoch)?.states.get(seq as usize).map(Rc::as_ref)
    }

    /// True if a block was held at any time in an epoch.
    pub(super) fn ever(&self, shim: usize, epoch: u64, block: (Tier, u64)) -> bool {
        self.0[shim].epochs.get(&epoch).is_some_and(|epoch| epoch.ever.contains(&block))
    }
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
