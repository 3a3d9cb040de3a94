//! One simulated engine: vLLM's scheduler over vLLM's block pool, in virtual time.
//!
//! A step takes the running requests first (one token each that decodes, a chunk of who prefills), then waiting ones in
//! the order of arrival, as far as tokens, slots and KV blocks reach. A prompt comes in only if all of its blocks find room.
//! Where a decoding request finds no block, the one that came in last is thrown out and begins anew. What was scheduled
//! takes as long as the planner's cost functions say: `c1` and `c2` per chunk, the decode time per request, and the larger
//! of the fixed parts once per step.
//!
//! Steps in which everybody only decodes are taken many at a time; an arrival ends that at the next step's end.

mod pool;
mod schedule;
mod tiers;

use std::collections::VecDeque;
use std::rc::Rc;

use foldhash::HashMap;
use kvatlas_planner::cost;
use kvatlas_planner::profile::{DecodeCost, PrefillCost};
use kvatlas_proto::Tier;

use pool::{Pool, Slot};
pub use tiers::TierConfig;
use tiers::Tiers;

/// What an engine is.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Blocks that fit its GPUs.
    pub gpu_blocks: u32,
    /// Tiers below, fastest first.
    pub tiers: Vec<TierConfig>,
    /// Bytes of a block.
    pub block_bytes: f64,
    /// Most tokens of a step.
    pub max_batched_tokens: u32,
    /// Most requests of a step.
    pub max_seqs: u32,
    /// What prefilling costs.
    pub prefill: PrefillCost,
    /// What decoding costs.
    pub decode: DecodeCost,
}

/// A request as the engine gets it.
#[derive(Clone, Debug)]
pub(super) struct Job {
    /// Its number in the trace.
    pub(super) request: u32,
    /// Full blocks of the prompt.
    pub(super) path: Rc<[u32]>,
    pub(super) prompt_tokens: u32,
    pub(super) output_tokens: u32,
    /// Blocks that are there for it by then, though not on the GPU.
    pub(super) staged: Staged,
    /// Prefill only; the blocks are kept until they are released.
    pub(super) hands_off: bool,
    /// It was prefilled elsewhere and all blocks are staged.
    pub(super) prefilled: bool,
}

/// Blocks on their way to the GPU for one request.
#[derive(Clone, Debug, Default)]
pub(super) struct Staged {
    /// Positions in the prompt, from, to.
    pub(super) ranges: Vec<(u32, u32)>,
    /// When all have arrived.
    pub(super) ready_us: u64,
}

/// A block came or went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) tier: Tier,
    pub(super) block: u32,
    pub(super) stored: bool,
}

/// What a step brought about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The first token, and how much of the prompt was taken from caches.
    FirstToken { request: u32, cached_tokens: u32 },
    /// The prompt is done and can be handed off.
    Prefilled { request: u32, cached_tokens: u32, prefill_us: u64 },
    /// The last token.
    Finished { request: u32 },
}

/// When to look at the engine again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wake {
    pub(super) at_us: u64,
    /// If the engine has another one by then, this one is void.
    pub(super) version: u64,
}

/// How busy it is, as a gateway that sees its own requests' tokens knows.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EngineLoad {
    /// Requests without a first token.
    pub waiting: u32,
    /// Their tokens that must be computed.
    pub waiting_tokens: u64,
    /// How long that takes, ms.
    pub waiting_ms: f64,
    /// Of them, those whose blocks are still on their way: whatever starts before they come delays them.
    pub fetching: u32,
    /// Requests that decode.
    pub running: u32,
    /// Share of the KV cache that requests hold or wait for; above 1 where it does not suffice.
    pub kv_usage: f64,
}

/// What it has done.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct EngineTotals {
    /// Time of steps with prefill in them.
    pub(super) prefill_us: u64,
    pub(super) busy_us: u64,
    pub(super) computed_tokens: u64,
    /// Read from own tiers below the GPU.
    pub(super) loaded_bytes: f64,
    pub(super) preemptions: u64,
    /// Requests that do not fit at all.
    pub(super) refused: u64,
}

/// One engine.
pub(super) struct Engine {
    config: EngineConfig,
    pool: Pool,
    tiers: Tiers,
    waiting: VecDeque<Seq>,
    /// Their blocks are being read from lower tiers.
    loading: Vec<Seq>,
    running: Vec<Seq>,
    /// Slots of prompts that are being handed off.
    handing: HashMap<u32, Vec<Slot>>,
    step: Option<Step>,
    version: u64,
    changes: Vec<Change>,
    pub(super) totals: EngineTotals,
}

#[derive(Debug)]
struct Seq {
    job: Job,
    /// Tokens that are in the KV cache, and how many must be for the next token.
    computed: u32,
    target: u32,
    generated: u32,
    slots: Vec<Slot>,
    /// Leading blocks of the path that can be found.
    named: u32,
    /// Tokens of this step; 0: one that is decoded.
    chunk: u32,
    cached_tokens: Option<u32>,
    /// What must be computed, as expected when it came.
    expected_tokens: u32,
    /// When its blocks are there, if they must be waited for.
    ready_us: u64,
    began_us: u64,
}

#[derive(Clone, Copy, Debug)]
struct Step {
    start_us: u64,
    each_us: u64,
    count: u32,
    has_prefill: bool,
}

enum Admitted {
    Now,
    /// Its blocks come from lower tiers first.
    Later,
    NoRoom,
}

// === impl Engine ===

impl Engine {
    pub(super) fn new(config: EngineConfig) -> Self {
        Self {
            pool: Pool::new(config.gpu_blocks),
            tiers: Tiers::new(&config.tiers),
            config,
            waiting: VecDeque::new(),
            loading: Vec::new(),
            running: Vec::new(),
            handing: HashMap::default(),
            step: None,
            version: 0,
            changes: Vec::new(),
            totals: EngineTotals::default(),
        }
    }

    /// What came and went since this was last asked.
    pub(super) fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    /// Whether the tier has the block.
    pub(super) fn holds(&self, tier: Tier, block: u32) -> bool {
        if tier == Tier::Gpu { self.pool.find(block).is_some() } else { self.tiers.holds(tier, block) }
    }

    /// Begins to read what own tiers have of a prompt, up to its first block that is neither there, nor on the GPU, nor
    /// among `pulled` (from, to).
    pub(super) fn stage(
        &mut self,
        path: &[u32],
        prompt_tokens: u32,
        pulled: &[(u32, u32)],
        now_us: u64,
    ) -> Staged {
        let mut bytes = vec![0.0; self.tiers.len()];
        let mut staged = Staged { ranges: Vec::new(), ready_us: now_us };
        for (at, block) in path.iter().take(self.usable_blocks(prompt_tokens)).enumerate() {
            let at = at as u32;
            if self.pool.find(*block).is_some() {
                continue;
            }
            if !pulled.iter().any(|(from, to)| (*from..*to).contains(&at)) {
                let Some(tier) = self.tiers.find(*block) else { break };
                bytes[tier] += self.config.block_bytes;
            }
            match staged.ranges.last_mut() {
                Some((_, to)) if *to == at => *to += 1,
                _ => staged.ranges.push((at, at + 1)),
            }
        }
        self.totals.loaded_bytes += bytes.iter().sum::<f64>();
        staged.ready_us = self.tiers.read(&bytes, now_us);
        staged
    }

    /// Takes a request. False: it does not fit at all.
    pub(super) fn submit(&mut self, job: Job) -> bool {
        let most = job.prompt_tokens + job.output_tokens;
        if most.div_ceil(self.config.block_tokens) > self.pool.len() {
            self.totals.refused += 1;
            return false;
        }
        // Who waits or runs before this one computes what both begin with.
        let before = self.waiting.iter().chain(&self.loading).chain(&self.running);
        let shared = before.map(|seq| common_blocks(&seq.job.path, &job.path)).max().unwrap_or(0);
        let usable = self.usable_blocks(job.prompt_tokens) as u32;
        let blocks = self.cached_blocks(&job, job.prompt_tokens, None).max(shared.min(usable));
        let cached = if job.prefilled { job.prompt_tokens - 1 } else { blocks * self.config.block_tokens };
        self.waiting.push_back(Seq {
            computed: 0,
            target: job.prompt_tokens,
            generated: 0,
            slots: Vec::new(),
            named: 0,
            chunk: 0,
            cached_tokens: None,
            expected_tokens: job.prompt_tokens - cached,
            ready_us: job.staged.ready_us,
            began_us: 0,
            job,
        });
        true
    }

    /// Lets the blocks of a prompt go that was handed off.
    pub(super) fn release(&mut self, request: u32) {
        let slots = self.handing.remove(&request).unwrap_or_default();
        slots.iter().rev().for_each(|slot| self.pool.release(*slot));
    }

    /// Goes on at `now_us`: ends the step that is over, begins the next one, or says when to come again.
    pub(super) fn advance(&mut self, now_us: u64, out: &mut Vec<Outcome>) -> Option<Wake> {
        if let Some(step) = &mut self.step {
            if now_us < step.end_us() {
                if step.count <= 1 {
                    return None;
                }
                // Somebody came while all decode: the step that runs now is the last one of these.
                let done = (now_us - step.start_us).div_ceil(step.each_us.max(1)).max(1) as u32;
                step.count = done.min(step.count);
                let end_us = step.end_us();
                if end_us > now_us {
                    return Some(self.wake(end_us));
                }
            }
            self.end_step(out);
        }
        self.begin_step(now_us)
    }

    pub(super) fn version(&self) -> u64 {
        self.version
    }

    pub(super) fn load(&self, now_us: u64) -> EngineLoad {
        let comes = |seq: &&Seq| seq.ready_us > now_us;
        let fetching = self.waiting.iter().chain(&self.loading).filter(comes).count() as u32;
        let mut load = EngineLoad { fetching, ..EngineLoad::default() };
        let mut add = |new: u32, cached: u32| {
            load.waiting += 1;
            load.waiting_tokens += u64::from(new);
            let chunks = f64::from(new.div_ceil(self.config.max_batched_tokens).max(1));
            load.waiting_ms += self.chunk_ms(new, cached) + chunks * self.config.prefill.c0_ms;
        };
        for seq in self.waiting.iter().chain(&self.loading) {
            add(seq.expected_tokens, seq.target.saturating_sub(seq.expected_tokens));
        }
        let mut running = 0;
        for seq in &self.running {
            if seq.computed < seq.target {
                add(seq.target - seq.computed, seq.computed);
            } else {
                running += 1;
            }
        }
        load.running = running;
        let wanted: u32 = self.waiting.iter().map(|seq| seq.target.div_ceil(self.config.block_tokens)).sum();
        let held = self.pool.len() - self.pool.free();
        load.kv_usage = (f64::from(held) + f64::from(wanted)) / f64::from(self.pool.len());
        load
    }

    fn wake(&mut self, at_us: u64) -> Wake {
        self.version += 1;
        Wake { at_us, version: self.version }
    }

    /// At least one token is computed.
    fn usable_blocks(&self, target: u32) -> usize {
        (target.saturating_sub(1) / self.config.block_tokens) as usize
    }

    /// Leading blocks that need not be computed. `load`: bytes by tier that would have to be read for that now.
    fn cached_blocks(&self, job: &Job, target: u32, mut load: Option<&mut [f64]>) -> u32 {
        let cap = self.usable_blocks(target);
        for (at, block) in job.path.iter().take(cap).enumerate() {
            let position = at as u32;
            let staged = || job.staged.ranges.iter().any(|(from, to)| (*from..*to).contains(&position));
            if self.pool.find(*block).is_some() || staged() {
                continue;
            }
            let Some(tier) = self.tiers.find(*block) else { return position };
            if let Some(bytes) = load.as_deref_mut() {
                bytes[tier] += self.config.block_bytes;
            }
        }
        job.path.len().min(cap) as u32
    }

    fn chunk_ms(&self, new: u32, cached: u32) -> f64 {
        cost::prefill_ms(&self.config.prefill, f64::from(new), f64::from(cached)) - self.config.prefill.c0_ms
    }
}

/// Blocks that both prompts begin with.
pub(super) fn common_blocks(a: &[u32], b: &[u32]) -> u32 {
    let shorter = a.len().min(b.len());
    // A block names everything before it, so equality has one end.
    let (mut equal, mut differ) = (0, shorter + 1);
    while differ - equal > 1 {
        let middle = equal + (differ - equal) / 2;
        if a[middle - 1] == b[middle - 1] { equal = middle } else { differ = middle }
    }
    equal as u32
}

// === impl Step ===

impl Step {
    fn end_us(&self) -> u64 {
        self.start_us + self.each_us * u64::from(self.count)
    }
}

#[cfg(test)]
#[path = "engine_tests.rs"]
mod tests;
