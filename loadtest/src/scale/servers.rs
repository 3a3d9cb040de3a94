//! Index servers as they really are: frames in, questions from one to the others, answers back.
//!
//! One index holds all shards. Shards share nothing but that, so a server that owns some of them is this index asked about
//! these alone; a study of 64 servers then needs the memory of one.

use bytes::Bytes;
use kvatlas_index::cluster::{ShardAnswer, ShardQuestion};
use kvatlas_index::matching::TierWeights;
use kvatlas_index::sources::SourceState;
use kvatlas_index::{Index, IndexLimits, PromptInput, ScoreAnswer, ScoreQuery};
use kvatlas_proto::frame::FrameView;
use kvatlas_proto::{KeySeed, Partition};

use super::ScaleError;
use super::cost::Stopwatch;
use super::cut::owners;
use super::forest::{Block, Forest};
use super::wire::{BLOCK_TOKENS, MODEL};

/// All servers of a deployment.
pub(super) struct Servers {
    index: Index,
    partition: Partition,
}

/// What a query cost when it was divided among servers.
#[derive(Clone, Debug, Default)]
pub(super) struct Asked {
    /// Servers that were asked.
    pub(super) servers: u32,
    pub(super) question_bytes: u64,
    pub(super) answer_bytes: u64,
    /// The largest answer.
    pub(super) largest_answer: u64,
    /// Answers that are too large for the bus.
    pub(super) refused: u32,
    /// Processor time of everybody who was asked.
    pub(super) look_up_ns: u64,
    /// Processor time of who asked.
    pub(super) ask_ns: u64,
    /// Sources in the answer, and how much the best one holds.
    pub(super) rows: usize,
    pub(super) deepest: u32,
}

// === impl Servers ===

impl Servers {
    /// Servers that own everything and know nothing.
    pub(super) fn new(partition: Partition) -> Self {
        let limits = IndexLimits { owners: usize::MAX, blocks: usize::MAX, ..IndexLimits::default() };
        let index = Index::cut(limits, KeySeed::PUBLISHED, partition);
        index.own(&partition.all().collect::<Vec<_>>());
        Self { index, partition }
    }

    /// Takes frames in. Returns the processor time, nanoseconds.
    pub(super) fn take(&self, frames: &[Bytes]) -> Result<u64, ScaleError> {
        let watch = Stopwatch::start();
        for frame in frames {
            let view = FrameView::parse(frame)?;
            self.index.apply(&view, frame, 0)?;
        }
        Ok(watch.elapsed_ns())
    }

    /// Blocks, counted once per pod, and different ones.
    pub(super) fn blocks(&self) -> (usize, usize) {
        let totals = self.index.totals(0);
        (totals.blocks, totals.distinct_blocks)
    }

    /// Whether the digests of all publishers were found equal.
    pub(super) fn is_verified(&self) -> bool {
        let sources = self.index.totals(0).sources;
        sources.keys().all(|state| *state == SourceState::Verified) && !sources.is_empty()
    }

    /// Asks about a prompt as a server of `servers` would. `candidates`: empty for all pods.
    pub(super) fn ask(
        &self,
        forest: &Forest,
        prompt: &[Block],
        servers: u16,
        candidates: &[String],
    ) -> Result<Asked, ScaleError> {
        let keys: Vec<u64> = prompt.iter().map(|block| forest.key(*block).0).collect();
        let query = ScoreQuery {
            model: MODEL,
            tenant: "",
            block_size: Some(BLOCK_TOKENS),
            input: PromptInput::Keys { keys: &keys, prompt_tokens: None },
            candidates,
            weights: TierWeights::default(),
            limit: Some(64),
        };
        let owners = owners(self.partition, servers);
        let mut asked = Asked::default();
        let watch = Stopwatch::start();
        let inquiry = self.index.inquire(&query).map_err(ScaleError::BlockSize)?;
        let shards = inquiry.shards(self.partition);
        let mut questions = Vec::new();
        for server in 0..servers {
            let is_its = |shard: u16| owners[usize::from(shard)] == server;
            if shards.iter().any(|shard| is_its(*shard)) {
                let question = inquiry.question(u64::from(server), is_its).encode()?;
                questions.push((server, question));
            }
        }
        asked.ask_ns += watch.elapsed_ns();
        let mut encoded = Vec::new();
        for (server, question) in &questions {
            let watch = Stopwatch::start();
            let question = ShardQuestion::parse(question)?;
            let answer =
                self.index.look_up(&question, |shard| owners[usize::from(shard.number())] == *server, 0);
            match answer.encode() {
                Ok(answer) => encoded.push(answer),
                Err(_) => asked.refused += 1,
            }
            asked.look_up_ns += watch.elapsed_ns();
        }
        let watch = Stopwatch::start();
        let answers: Vec<ShardAnswer> =
            encoded.iter().map(|answer| ShardAnswer::parse(answer)).collect::<Result<_, _>>()?;
        let answer: ScoreAnswer = self.index.conclude(&query, inquiry, &answers, 0);
        asked.ask_ns += watch.elapsed_ns();
        asked.servers = questions.len() as u32;
        asked.question_bytes = questions.iter().map(|(_, question)| question.len() as u64).sum();
        asked.answer_bytes = encoded.iter().map(|answer| answer.len() as u64).sum();
        asked.largest_answer = encoded.iter().map(|answer| answer.len() as u64).max().unwrap_or(0);
        asked.rows = answer.rows.len();
        asked.deepest = answer.rows.iter().map(|row| row.matched.matched_blocks).max().unwrap_or(0);
        Ok(asked)
    }
}
