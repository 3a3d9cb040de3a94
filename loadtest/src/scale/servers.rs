//! Index servers as they really are: frames in, questions from one to the others, answers back.
//!
//! One index holds all shards. Shards share nothing but that, so a server that owns some of them is this index asked about
//! these alone; a study of 64 servers then needs the memory of one.
//! Who asks is an index of its own, with the shards that one of several servers has.

use bytes::Bytes;
use kvatlas_index::cluster::{ShardAnswer, ShardQuestion};
use kvatlas_index::matching::TierWeights;
use kvatlas_index::sources::SourceState;
use kvatlas_index::{Index, IndexLimits, PromptInput, ScoreQuery};
use kvatlas_proto::frame::FrameView;
use kvatlas_proto::{KeyHasher, KeySeed, Partition, ShardId, ShardSet};

use super::ScaleError;
use super::cost::Stopwatch;
use super::cut::owners;
use super::forest::{Block, Forest};
use super::wire::{BLOCK_TOKENS, MODEL, Publishers};

/// Prompts whose answers are in memory at the same time: those of ten thousand pods have megabytes.
const PROMPTS_AT_A_TIME: usize = 64;

/// All servers of a deployment.
pub(super) struct Servers {
    index: Index,
    partition: Partition,
}

/// The server that a gateway asks: one of several, which knows all pods, but has its own shards only. Which blocks lie in these
/// makes no difference to what it asks and how it puts answers together, so it has none.
pub(super) struct Asker {
    index: Index,
    pub(super) servers: u16,
}

/// What queries cost that were divided among servers: sums over all of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Asked {
    pub(super) queries: usize,
    /// Questions.
    pub(super) questions: u64,
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
    /// Pods in the answers.
    pub(super) rows: usize,
}

// === impl Asker ===

impl Asker {
    /// The first of `servers`, which has heard of all pods.
    pub(super) fn new(pods: usize, partition: Partition, servers: u16) -> Result<Self, ScaleError> {
        let all =
            ShardSet::new(0, servers.into()).expect("the study divides among fewer servers than the most");
        let shards = all.shards(partition);
        let index = Index::cut(limits(), KeySeed::PUBLISHED, partition);
        index.own(&shards);
        let mut publishers = Publishers::new(pods, partition, KeyHasher::default().root())?;
        let mut frames = Vec::new();
        for pod in 0..pods {
            for shard in &shards {
                publishers.start_lane(pod, *shard, &mut frames)?;
            }
            take(&index, &frames)?;
            frames.clear();
        }
        Ok(Self { index, servers })
    }
}

fn limits() -> IndexLimits {
    IndexLimits { owners: usize::MAX, blocks: usize::MAX, ..IndexLimits::default() }
}

fn take(index: &Index, frames: &[Bytes]) -> Result<(), ScaleError> {
    for frame in frames {
        let view = FrameView::parse(frame)?;
        index.apply(&view, frame, 0)?;
    }
    Ok(())
}

// === impl Servers ===

impl Servers {
    /// Servers that own everything and know nothing.
    pub(super) fn new(partition: Partition) -> Self {
        let index = Index::cut(limits(), KeySeed::PUBLISHED, partition);
        index.own(&partition.all().collect::<Vec<_>>());
        Self { index, partition }
    }

    /// Takes frames in. Returns the processor time, nanoseconds.
    pub(super) fn take(&self, frames: &[Bytes]) -> Result<u64, ScaleError> {
        let watch = Stopwatch::start();
        take(&self.index, frames)?;
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

    /// Lets a server ask about prompts. `candidates`: empty for all pods.
    ///
    /// Done in steps over many prompts, because the clock of a thread is too coarse for a single one.
    pub(super) fn ask(
        &self,
        forest: &Forest,
        prompts: &[Vec<Block>],
        asker: &Asker,
        candidates: &[String],
    ) -> Result<Asked, ScaleError> {
        let owners = owners(self.partition, asker.servers);
        let mut asked = Asked::default();
        for prompts in prompts.chunks(PROMPTS_AT_A_TIME) {
            self.ask_some(forest, prompts, asker, &owners, candidates, &mut asked)?;
        }
        Ok(asked)
    }

    fn ask_some(
        &self,
        forest: &Forest,
        prompts: &[Vec<Block>],
        asker: &Asker,
        owners: &[u16],
        candidates: &[String],
        asked: &mut Asked,
    ) -> Result<(), ScaleError> {
        let key = |block: &Block| forest.key(*block).0;
        let keys: Vec<Vec<u64>> = prompts.iter().map(|prompt| prompt.iter().map(key).collect()).collect();
        let query = |keys| ScoreQuery {
            model: MODEL,
            tenant: "",
            block_size: Some(BLOCK_TOKENS),
            input: PromptInput::Keys { keys, prompt_tokens: None },
            candidates,
            weights: TierWeights::default(),
            limit: Some(64),
        };
        let queries: Vec<ScoreQuery<'_>> = keys.iter().map(|keys| query(keys)).collect();

        let watch = Stopwatch::start();
        let mut inquiries = Vec::new();
        let mut questions = Vec::new();
        for (number, query) in queries.iter().enumerate() {
            let inquiry = asker.index.inquire(query).map_err(ScaleError::BlockSize)?;
            let shards = inquiry.shards(self.partition);
            let mut asks: Vec<u16> = shards.iter().map(|shard| owners[usize::from(*shard)]).collect();
            asks.sort_unstable();
            asks.dedup();
            for server in asks {
                let question = inquiry.question(number as u64, |shard| owners[usize::from(shard)] == server);
                questions.push((number, server, question.encode()?));
            }
            inquiries.push(inquiry);
        }
        asked.ask_ns += watch.elapsed_ns();

        let watch = Stopwatch::start();
        let mut answers: Vec<Vec<(ShardQuestion, Vec<u8>)>> = vec![Vec::new(); queries.len()];
        for (number, server, question) in &questions {
            let question = ShardQuestion::parse(question)?;
            let is_its = |shard: ShardId| owners[usize::from(shard.number())] == *server;
            match self.index.look_up(&question, is_its, 0).encode(&question) {
                Ok(answer) => answers[*number].push((question, answer)),
                Err(_) => asked.refused += 1,
            }
        }
        asked.look_up_ns += watch.elapsed_ns();

        let watch = Stopwatch::start();
        for ((query, inquiry), answers) in queries.iter().zip(inquiries).zip(&answers) {
            let answers: Vec<ShardAnswer> = answers
                .iter()
                .map(|(asked, answer)| ShardAnswer::parse(answer, asked))
                .collect::<Result<_, _>>()?;
            asked.rows += asker.index.conclude(query, inquiry, &answers, 0).rows.len();
        }
        asked.ask_ns += watch.elapsed_ns();

        let lengths = || answers.iter().flatten().map(|(_, answer)| answer.len() as u64);
        asked.queries += queries.len();
        asked.questions += questions.len() as u64;
        asked.question_bytes += questions.iter().map(|(_, _, question)| question.len() as u64).sum::<u64>();
        asked.answer_bytes += lengths().sum::<u64>();
        asked.largest_answer = asked.largest_answer.max(lengths().max().unwrap_or(0));
        Ok(())
    }
}

// === impl Asked ===

impl Asked {
    /// Of one query, on average.
    pub(super) fn mean(&self, sum: u64) -> f64 {
        sum as f64 / self.queries.max(1) as f64
    }
}
