//! The real index, fed with the frames that the engines' publishers would send, a while after it happened.

use bytes::Bytes;
use foldhash::HashMap;
use kvatlas_index::matching::TierWeights;
use kvatlas_index::{Index, IndexLimits, PromptInput, ScoreQuery};
use kvatlas_planner::Held;
use kvatlas_proto::frame::{
    EncodeFrameError, FrameHeader, FrameOwner, FramePart, FrameView, OpBuffer, ParseFrameError, SourceHealth,
};
use kvatlas_proto::keys::{KEY_VERSION, KeyVariant};
use kvatlas_proto::scope::InvalidScopeError;
use kvatlas_proto::{
    CacheGroup, Digest, DpRank, Epoch, FrameSeq, GroupKind, InstanceId, KeySeed, Scope, ShardId, SourceId,
    Tier,
};

use super::blocks::{BlockTree, NONE};
use super::engine::Change;

/// Model of the fleet, as far as scopes and queries are concerned.
const MODEL: &str = "fleet";
/// Bytes of operations in one frame at most, as the shim cuts them.
const FRAME_BYTES: usize = 256 * 1024;
/// The tiers that engines speak of, by position in frames.
const TIERS: [(Tier, &str); 3] = [(Tier::Gpu, "GPU"), (Tier::Cpu, "CPU"), (Tier::Ssd, "DISK")];

/// An index and its publishers.
pub(super) struct Feed {
    index: Index,
    headers: Vec<FrameHeader>,
    /// By name.
    numbers: HashMap<String, usize>,
    block_tokens: u32,
    ops: OpBuffer,
}

/// The index could not be fed.
#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    /// The scope is not valid.
    #[error(transparent)]
    Scope(#[from] InvalidScopeError),
    /// A frame could not be written.
    #[error(transparent)]
    Encode(#[from] EncodeFrameError),
    /// A frame that was written could not be read.
    #[error(transparent)]
    Parse(#[from] ParseFrameError),
    /// The index refused a frame.
    #[error(transparent)]
    Apply(#[from] kvatlas_index::LimitReached),
    /// The index refused a question.
    #[error(transparent)]
    Ask(#[from] kvatlas_index::BlockSizeMismatch),
}

// === impl Feed ===

impl Feed {
    /// An index that knows all engines, each with nothing.
    pub(super) fn new(names: &[InstanceId], block_tokens: u32) -> Result<Self, FeedError> {
        let limits = IndexLimits { owners: usize::MAX, blocks: usize::MAX, ..IndexLimits::default() };
        let owner = |(tier, medium): (Tier, &str)| FrameOwner {
            tier,
            medium: medium.to_owned(),
            group: CacheGroup(0),
            kind: GroupKind::Full,
            load_blocks: 1,
        };
        let mut feed = Self {
            index: Index::new(limits, KeySeed::PUBLISHED),
            headers: Vec::new(),
            numbers: HashMap::default(),
            block_tokens,
            ops: OpBuffer::default(),
        };
        for (number, name) in names.iter().enumerate() {
            feed.numbers.insert(name.as_str().to_owned(), number);
            feed.headers.push(FrameHeader {
                scope: Scope::new(MODEL, "", block_tokens, KEY_VERSION)?,
                source: SourceId { instance: name.clone(), rank: DpRank(0) },
                shard: ShardId::WHOLE,
                variant: KeyVariant::default(),
                epoch: Epoch(1),
                seq: FrameSeq(0),
                part: FramePart::Start,
                health: SourceHealth::Exact,
                engine_time_ns: 0,
                owners: TIERS.map(owner).to_vec(),
                digests: vec![Digest::default(); TIERS.len()],
                reply: None,
            });
            let start = feed.frame(number, &mut OpBuffer::default())?;
            feed.apply(&[start], 0)?;
            let header = &mut feed.headers[number];
            (header.part, header.digests) = (FramePart::Live, Vec::new());
        }
        Ok(feed)
    }

    /// What the engine's publisher sends of these changes.
    pub(super) fn frames(
        &mut self,
        tree: &BlockTree,
        engine: usize,
        changes: &[Change],
    ) -> Result<Vec<Bytes>, FeedError> {
        let mut ops = std::mem::take(&mut self.ops);
        for change in changes {
            let Some(owner) = TIERS.iter().position(|(tier, _)| *tier == change.tier) else { continue };
            let key = tree.key(change.block);
            if change.stored {
                let parent = tree.parent(change.block);
                let parent = if parent == NONE { tree.root_key() } else { tree.key(parent) };
                ops.stored(owner as u8, parent, key);
            } else {
                ops.removed(owner as u8, key);
            }
        }
        let mut frames = Vec::new();
        while !ops.is_empty() {
            frames.push(self.frame(engine, &mut ops.take_chunk(FRAME_BYTES))?);
        }
        self.ops = ops;
        Ok(frames)
    }

    fn frame(&mut self, engine: usize, ops: &mut OpBuffer) -> Result<Bytes, FeedError> {
        let header = &mut self.headers[engine];
        let frame = header.encode(ops)?;
        header.seq = header.seq.next();
        Ok(Bytes::from(frame))
    }

    /// Applies frames.
    pub(super) fn apply(&self, frames: &[Bytes], now_ms: u64) -> Result<(), FeedError> {
        for frame in frames {
            self.index.apply(&FrameView::parse(frame)?, frame, now_ms)?;
        }
        Ok(())
    }

    /// What the index says that each engine holds of a prompt.
    pub(super) fn held(
        &self,
        keys: &[u64],
        prompt_tokens: u32,
        held: &mut [Vec<Held>],
    ) -> Result<(), FeedError> {
        held.iter_mut().for_each(Vec::clear);
        let answer = self.index.score(&ScoreQuery {
            model: MODEL,
            tenant: "",
            block_size: Some(self.block_tokens),
            input: PromptInput::Keys { keys, prompt_tokens: Some(prompt_tokens) },
            candidates: &[],
            weights: TierWeights::default(),
            limit: None,
        })?;
        for row in &answer.rows {
            let Some(number) = self.numbers.get(&row.instance) else { continue };
            let tiers = row.matched.tiers.iter().map(|t| (t.tier.tier(), t.matched_blocks, t.best_blocks));
            Held::of_match(tiers, 0.0, &mut held[*number]);
        }
        Ok(())
    }
}
