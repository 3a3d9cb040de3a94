//! A simulated engine: schedules requests and manages KV-cache blocks as vLLM does, and says so with vLLM's events.
//!
//! Per step it gives running requests the tokens they lack and admits waiting ones, all within a token budget (so long
//! prompts are prefilled in chunks); a request that finds no block preempts the latest one. Blocks that become full are
//! cached and announced at once, one event per request and step, after one removal per block whose content had to go.
//! The last token of a prompt is always computed again, so a fully cached prompt stores its last block a second time.
//!
//! The model is replaced by [`next_token`], a function of all tokens before it: equal texts continue equally, as under
//! greedy decoding. There is no clock: a step is a call.
//!
//! Not simulated: several cache groups, adapters and salts, speculative decoding, other tiers. The recordings in
//! `fixtures/` have them.

mod model;
mod pool;

use std::collections::{BTreeMap, VecDeque};

use bytes::BufMut;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use self::model::TokenState;
pub use self::model::{VOCABULARY, answer, next_token};
use self::pool::{BlockId, BlockPool, ChainHash};
use crate::wire::{BlockRemoved, BlockStored, EngineHash, Event};

/// Most requests that wait in one simulated engine. At the bound a request is refused, so a runaway workload shows as an
/// error and not as memory.
pub const MAX_WAITING_REQUESTS: usize = 4_096;
/// Most blocks of one simulated engine; at 16 tokens each, 16 million tokens.
pub const MAX_BLOCKS: u32 = 1 << 20;

/// Names that vLLM uses for its GPU pool.
const MEDIUM: &str = "GPU";
const GROUP_KIND: &str = "full_attention";

/// The size of a simulated engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimConfig {
    /// Physical blocks, 1 to [`MAX_BLOCKS`].
    pub blocks: u32,
    /// Tokens per block, at least 1.
    pub block_size: u32,
    /// Tokens that one step computes over all requests, at least 1.
    pub max_step_tokens: u32,
    /// Requests that run at the same time, at least 1.
    pub max_running: u32,
    /// How hashes are named in events.
    pub hashes: HashForm,
}

/// How hashes are named in events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HashForm {
    /// 64-bit integers (vLLM's default).
    Int,
    /// 32-byte strings.
    Bytes,
}

/// A simulated engine.
#[derive(Debug)]
pub struct SimEngine {
    config: SimConfig,
    seed: u64,
    pool: BlockPool,
    waiting: VecDeque<Request>,
    running: Vec<Request>,
    /// Events since the last step ended. An idle engine publishes nothing, not even its own reset.
    events: Vec<Event>,
    next_request: u64,
}

/// Names a request of one engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(u64);

/// What a finished request cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestReport {
    /// Which request.
    pub request: RequestId,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens of the prompt that were cached when it was first scheduled; less than the prompt.
    pub cached_tokens: u32,
    /// Blocks of the prompt, a partial one included, that were computed.
    pub blocks_prefilled: u32,
    /// The answer.
    pub output: Vec<u32>,
    /// Times it lost its blocks to an older request and started again.
    pub preemptions: u32,
}

/// What one step did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepReport {
    /// The batch to publish; nothing is published for a step without events.
    pub events: Vec<Event>,
    /// Requests that ended with this step.
    pub finished: Vec<RequestReport>,
}

/// A request that was run alone to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Submitted {
    /// What it cost.
    pub report: RequestReport,
    /// The batches its steps publish, none empty.
    pub batches: Vec<Vec<Event>>,
}

/// A configuration that no engine can have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("simulated engine: {field} is {value}; it must be 1 to {max}")]
pub struct InvalidSimConfigError {
    field: &'static str,
    value: u32,
    max: u32,
}

/// Why a request was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum EnqueueError {
    /// There is nothing to compute.
    #[error("a request needs at least one prompt token and one output token")]
    Empty,
    /// It would not fit an empty engine.
    #[error(
        "the request needs {needed} blocks and the engine has {blocks}; shorten it or give the engine more blocks"
    )]
    TooLong {
        /// Blocks for prompt and answer.
        needed: u32,
        /// Blocks of the engine.
        blocks: u32,
    },
    /// Too many requests wait.
    #[error("{MAX_WAITING_REQUESTS} requests wait already; run steps before adding more")]
    Full,
}

#[derive(Debug)]
struct Request {
    id: RequestId,
    /// Prompt, then the answer so far.
    tokens: Vec<u32>,
    prompt: usize,
    output: usize,
    state: TokenState,
    /// Hashes of the full blocks of `tokens`.
    hashes: Vec<ChainHash>,
    /// Blocks held; they cover at least `computed` tokens.
    blocks: Vec<BlockId>,
    /// Tokens whose KV is in the blocks.
    computed: usize,
    /// Leading blocks that are cached under their hash.
    cached_blocks: usize,
    /// Set when first scheduled, tokens.
    first_hit: Option<usize>,
    preemptions: u32,
}

// === impl SimConfig ===

impl Default for SimConfig {
    /// A small engine: 1,024 blocks of 16 tokens, otherwise vLLM's defaults.
    fn default() -> Self {
        Self {
            blocks: 1_024,
            block_size: 16,
            max_step_tokens: 2_048,
            max_running: 128,
            hashes: HashForm::Int,
        }
    }
}

impl SimConfig {
    fn check(&self) -> Result<(), InvalidSimConfigError> {
        let fields = [
            ("blocks", self.blocks, MAX_BLOCKS),
            ("block_size", self.block_size, u32::MAX),
            ("max_step_tokens", self.max_step_tokens, u32::MAX),
            ("max_running", self.max_running, u32::MAX),
        ];
        match fields.into_iter().find(|(_, value, max)| *value == 0 || value > max) {
            Some((field, value, max)) => Err(InvalidSimConfigError { field, value, max }),
            None => Ok(()),
        }
    }
}

// === impl SimEngine ===

impl SimEngine {
    /// An empty engine. Engines with different seeds name the same block differently.
    pub fn new(config: SimConfig, seed: u64) -> Result<Self, InvalidSimConfigError> {
        config.check()?;
        Ok(Self {
            config,
            seed,
            pool: BlockPool::new(config.blocks),
            waiting: VecDeque::new(),
            running: Vec::new(),
            events: Vec::new(),
            next_request: 0,
        })
    }

    /// Adds a request to the end of the queue.
    pub fn enqueue(&mut self, prompt: &[u32], output_tokens: u32) -> Result<RequestId, EnqueueError> {
        if prompt.is_empty() || output_tokens == 0 {
            return Err(EnqueueError::Empty);
        }
        // The last token of the answer is never computed.
        let tokens = prompt.len() + output_tokens as usize - 1;
        let needed = u32::try_from(tokens.div_ceil(self.block_size())).unwrap_or(u32::MAX);
        if needed > self.config.blocks {
            return Err(EnqueueError::TooLong { needed, blocks: self.config.blocks });
        }
        if self.waiting.len() >= MAX_WAITING_REQUESTS {
            return Err(EnqueueError::Full);
        }
        let id = RequestId(self.next_request);
        self.next_request += 1;
        self.waiting.push_back(Request::new(id, prompt, output_tokens));
        Ok(id)
    }

    /// True if no request waits or runs.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Runs one step. An idle engine does nothing.
    pub fn step(&mut self) -> StepReport {
        if self.is_idle() {
            return StepReport::default();
        }
        let mut budget = self.config.max_step_tokens as usize;
        if !self.schedule_running(&mut budget) {
            self.admit_waiting(&mut budget);
        }
        let finished = self.sample();
        StepReport { events: std::mem::take(&mut self.events), finished }
    }

    /// Runs one request on an idle engine to its end. Requests that were enqueued before run to their end too, but are
    /// not reported.
    pub fn submit(&mut self, prompt: &[u32], output_tokens: u32) -> Result<Submitted, EnqueueError> {
        let id = self.enqueue(prompt, output_tokens)?;
        let mut batches = Vec::new();
        loop {
            let step = self.step();
            if !step.events.is_empty() {
                batches.push(step.events);
            }
            if let Some(report) = step.finished.into_iter().find(|report| report.request == id) {
                return Ok(Submitted { report, batches });
            }
        }
    }

    /// Forgets the whole cache; published with the next step. Refused (false) while a request runs.
    pub fn reset_prefix_cache(&mut self) -> bool {
        let cleared = self.pool.clear();
        if cleared {
            self.events.push(Event::Cleared);
        }
        cleared
    }

    /// Every cached hash with its number of copies: the truth an index is compared with. It includes what the events
    /// of the steps so far said, nothing more, except after a reset that no step has published yet.
    pub fn held(&self) -> BTreeMap<EngineHash, u32> {
        self.pool.copies().map(|(hash, copies)| (self.name(hash), copies as u32)).collect()
    }

    /// Leading tokens of a prompt that are cached, in whole blocks. A request would reuse less if this is all of it.
    pub fn cached_tokens(&self, prompt: &[u32]) -> u32 {
        let mut request = Request::new(RequestId(u64::MAX), prompt, 1);
        request.extend_hashes(self.block_size(), self.seed);
        (self.hits(&request, prompt.len()).len() * self.block_size()) as u32
    }

    fn block_size(&self) -> usize {
        self.config.block_size as usize
    }

    /// Gives every running request the tokens it lacks, oldest first. True if one had to be preempted.
    fn schedule_running(&mut self, budget: &mut usize) -> bool {
        let mut preempted = false;
        let mut index = 0;
        while index < self.running.len() && *budget > 0 {
            let tokens = self.running[index].pending().min(*budget);
            let needed = self.blocks_needed(&self.running[index], tokens);
            if needed > self.pool.available_beside(&[]) {
                // The victim is the latest request, at worst this one itself; either way the loop ends or comes back.
                if let Some(victim) = self.running.pop() {
                    self.preempt(victim);
                    preempted = true;
                }
                continue;
            }
            let mut request = self.running.remove(index);
            self.advance(&mut request, tokens, needed);
            self.running.insert(index, request);
            *budget -= tokens;
            index += 1;
        }
        preempted
    }

    fn admit_waiting(&mut self, budget: &mut usize) {
        while *budget > 0 && self.running.len() < self.config.max_running as usize {
            let Some(mut request) = self.waiting.pop_front() else { return };
            request.extend_hashes(self.block_size(), self.seed);
            // At least one token is always computed: its output is the next token.
            let hits = self.hits(&request, request.tokens.len() - 1);
            let cached = hits.len() * self.block_size();
            let tokens = (request.tokens.len() - cached).min(*budget);
            let needed = (cached + tokens).div_ceil(self.block_size()) - hits.len();
            if needed > self.pool.available_beside(&hits) {
                self.waiting.push_front(request);
                return;
            }
            self.pool.take(&hits);
            request.first_hit.get_or_insert(cached);
            request.cached_blocks = hits.len();
            request.blocks = hits;
            request.computed = cached;
            self.advance(&mut request, tokens, needed);
            self.running.push(request);
            *budget -= tokens;
        }
    }

    /// Cached blocks that lead the request's first `tokens` tokens.
    fn hits(&self, request: &Request, tokens: usize) -> Vec<BlockId> {
        let hashes = &request.hashes[..tokens / self.block_size()];
        hashes.iter().map_while(|hash| self.pool.find(*hash)).collect()
    }

    /// Blocks that a running request needs beside its own for its next `tokens`.
    fn blocks_needed(&self, request: &Request, tokens: usize) -> usize {
        (request.computed + tokens).div_ceil(self.block_size()).saturating_sub(request.blocks.len())
    }

    /// Computes `tokens` more tokens in `needed` more blocks and announces what that stored and removed.
    fn advance(&mut self, request: &mut Request, tokens: usize, needed: usize) {
        let mut removed = Vec::new();
        request.blocks.extend(self.pool.allocate(needed, &mut removed));
        for hash in removed {
            let block_hashes = vec![self.name(hash)];
            self.events.push(Event::Removed(BlockRemoved {
                block_hashes,
                medium: Some(MEDIUM.to_owned()),
                group_idx: Some(0),
                ..Default::default()
            }));
        }
        request.computed += tokens;
        request.extend_hashes(self.block_size(), self.seed);
        let (first, end) = (request.cached_blocks, request.computed / self.block_size());
        if first == end {
            return;
        }
        for index in first..end {
            self.pool.cache(request.blocks[index], request.hashes[index]);
        }
        request.cached_blocks = end;
        let size = self.block_size();
        let parent = first.checked_sub(1).map(|index| self.name(request.hashes[index]));
        self.events.push(Event::Stored(BlockStored {
            block_hashes: request.hashes[first..end].iter().map(|hash| self.name(*hash)).collect(),
            parent_block_hash: parent,
            token_ids: request.tokens[first * size..end * size].to_vec(),
            block_size: self.config.block_size,
            medium: Some(MEDIUM.to_owned()),
            extra_keys: Some(vec![None; end - first]),
            group_idx: Some(0),
            kv_cache_spec_kind: Some(GROUP_KIND.to_owned()),
            ..Default::default()
        }));
    }

    fn preempt(&mut self, mut victim: Request) {
        self.pool.release(&victim.blocks);
        victim.blocks.clear();
        victim.computed = 0;
        victim.cached_blocks = 0;
        victim.preemptions += 1;
        self.waiting.push_front(victim);
    }

    /// Appends a token to every request that is computed to its end, and ends those that have their answer.
    fn sample(&mut self) -> Vec<RequestReport> {
        let mut finished = Vec::new();
        let mut running = Vec::with_capacity(self.running.len());
        for mut request in self.running.drain(..) {
            if request.computed == request.tokens.len() {
                request.push_token();
            }
            if request.tokens.len() == request.prompt + request.output {
                self.pool.release(&request.blocks);
                finished.push(request.report(self.config.block_size as usize));
            } else {
                running.push(request);
            }
        }
        self.running = running;
        finished
    }

    /// The name of a hash in events.
    fn name(&self, hash: ChainHash) -> EngineHash {
        match self.config.hashes {
            HashForm::Int => EngineHash::Int(hash.0),
            HashForm::Bytes => {
                let mut bytes = Vec::with_capacity(32);
                (0..4).for_each(|part| bytes.put_u64(xxh3_64_with_seed(&hash.0.to_le_bytes(), part)));
                EngineHash::Bytes(bytes)
            }
        }
    }
}

// === impl Request ===

impl Request {
    fn new(id: RequestId, prompt: &[u32], output_tokens: u32) -> Self {
        Self {
            id,
            tokens: prompt.to_vec(),
            prompt: prompt.len(),
            output: output_tokens as usize,
            state: TokenState::of(prompt),
            hashes: Vec::new(),
            blocks: Vec::new(),
            computed: 0,
            cached_blocks: 0,
            first_hit: None,
            preemptions: 0,
        }
    }

    /// Tokens that are known and not computed.
    fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    fn push_token(&mut self) {
        let token = self.state.next_token();
        self.state.push(token);
        self.tokens.push(token);
    }

    /// Hashes the blocks that became full since the last call.
    fn extend_hashes(&mut self, block_size: usize, seed: u64) {
        for block in self.tokens.chunks_exact(block_size).skip(self.hashes.len()) {
            let mut content = Vec::with_capacity(8 + 4 * block_size);
            content.put_u64_le(self.hashes.last().map_or(seed, |parent| parent.0));
            for token in block {
                content.put_u32_le(*token);
            }
            self.hashes.push(ChainHash(xxh3_64_with_seed(&content, seed)));
        }
    }

    fn report(self, block_size: usize) -> RequestReport {
        let cached = self.first_hit.unwrap_or(0);
        RequestReport {
            request: self.id,
            prompt_tokens: self.prompt as u32,
            cached_tokens: cached as u32,
            blocks_prefilled: (self.prompt.div_ceil(block_size) - cached / block_size) as u32,
            output: self.tokens[self.prompt..].to_vec(),
            preemptions: self.preemptions,
        }
    }
}

#[cfg(test)]
#[path = "engine_sim_tests.rs"]
mod tests;
