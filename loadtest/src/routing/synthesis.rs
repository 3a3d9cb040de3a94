//! Made-up traces, for who has no recorded ones. Their statistics are round figures, not anybody's.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::blocks::NONE;
use super::trace::{ReadTraceError, Trace, TraceOptions, TraceRequest};

/// Requests unless a limit says otherwise.
const REQUESTS: usize = 4_000;
/// Blocks unless asked otherwise.
const BLOCK_TOKENS: u32 = 64;
/// Documents of `zipf`, the k-th asked about 1 / k as often as the first.
const DOCUMENTS: usize = 400;
/// Requests a second of `zipf`.
const ZIPF_PER_S: f64 = 8.0;

/// Makes a trace: `zipf`, questions about documents of which some are popular; `agents`, long conversations that grow by
/// little; `chat`, short ones over a few system prompts.
pub fn synthesise(name: &str, options: TraceOptions, seed: u64) -> Result<Trace, ReadTraceError> {
    let mut making = Making::new(name, options, seed);
    match name {
        "zipf" => making.zipf(),
        "agents" => making.conversations(12, 16_000..=24_000, 20..=60, 200..=2_500, 400, 8.0),
        "chat" => making.conversations(8, 1_000..=2_000, 2..=8, 50..=600, 300, 20.0),
        _ => return Err(ReadTraceError::UnknownSynthesis { name: name.to_owned() }),
    }
    Ok(making.trace)
}

struct Making {
    trace: Trace,
    random: StdRng,
    requests: usize,
}

// === impl Making ===

impl Making {
    fn new(name: &str, options: TraceOptions, seed: u64) -> Self {
        let block_tokens = options.block_tokens.unwrap_or(BLOCK_TOKENS).max(1);
        Self {
            trace: Trace::empty(format!("synth:{name}"), block_tokens),
            random: StdRng::seed_from_u64(seed ^ 0x7379_6e74),
            requests: options.limit.unwrap_or(REQUESTS),
        }
    }

    /// An exponentially distributed time with this mean.
    fn after(&mut self, mean_s: f64) -> f64 {
        -mean_s * (1.0 - self.random.random_range(0.0..1.0_f64)).ln()
    }

    fn grow(&mut self, last: u32, tokens: u32) -> u32 {
        (0..tokens / self.trace.block_tokens).fold(last, |parent, _| self.trace.tree.add(parent))
    }

    fn push(&mut self, last: u32, blocks: u32, output_tokens: u32) -> u32 {
        // A few tokens are always left over.
        let rest = self.random.random_range(1..=self.trace.block_tokens);
        self.trace.requests.push(TraceRequest {
            prompt_tokens: blocks * self.trace.block_tokens + rest.min(self.trace.block_tokens - 1).max(1),
            output_tokens,
            last,
            full_blocks: blocks,
            session: self.trace.requests.len() as u32,
            conversation: 0,
            offset_us: 0,
            after: None,
            think_us: 0,
        });
        self.trace.requests.len() as u32 - 1
    }

    fn depth(&self, last: u32) -> u32 {
        self.trace.tree.path(last).len() as u32
    }

    fn zipf(&mut self) {
        let documents: Vec<(u32, u32)> = (0..DOCUMENTS)
            .map(|_| {
                let tokens = self.random.random_range(2_000..=20_000);
                let last = self.grow(NONE, tokens);
                (last, self.depth(last))
            })
            .collect();
        let weights: Vec<f64> = (1..=DOCUMENTS)
            .scan(0.0, |sum, k| {
                *sum += 1.0 / k as f64;
                Some(*sum)
            })
            .collect();
        let all = weights.last().copied().unwrap_or(1.0);
        let mut at_s = 0.0;
        while self.trace.requests.len() < self.requests {
            let drawn = self.random.random_range(0.0..all);
            let (document, depth) = documents[weights.partition_point(|sum| *sum < drawn).min(DOCUMENTS - 1)];
            let question = self.random.random_range(100..=800);
            let last = self.grow(document, question);
            let output = self.random.random_range(50..=400);
            let number = self.push(last, depth + question / self.trace.block_tokens, output);
            at_s += self.after(1.0 / ZIPF_PER_S);
            self.trace.requests[number as usize].offset_us = (at_s * 1e6) as u64;
        }
    }

    /// Conversations over `systems` system prompts: so many turns, each longer by so many tokens, answers of so many on
    /// average, and so long between two, seconds.
    fn conversations(
        &mut self,
        systems: usize,
        system_tokens: std::ops::RangeInclusive<u32>,
        turns: std::ops::RangeInclusive<u32>,
        turn_tokens: std::ops::RangeInclusive<u32>,
        output_tokens: u32,
        think_s: f64,
    ) {
        let systems: Vec<u32> = (0..systems)
            .map(|_| {
                let tokens = self.random.random_range(system_tokens.clone());
                self.grow(NONE, tokens)
            })
            .collect();
        while self.trace.requests.len() < self.requests {
            let conversation = self.trace.conversations;
            self.trace.conversations += 1;
            let mut last = systems[self.random.random_range(0..systems.len())];
            let mut after = None;
            for _ in 0..self.random.random_range(turns.clone()) {
                let tokens = self.random.random_range(turn_tokens.clone());
                last = self.grow(last, tokens);
                let blocks = self.depth(last);
                let output = self.random.random_range(output_tokens / 4..=output_tokens * 2);
                let think_us = (self.after(think_s) * 1e6) as u64;
                let number = self.push(last, blocks, output);
                let request = &mut self.trace.requests[number as usize];
                (request.session, request.conversation) = (conversation, conversation);
                (request.after, request.think_us) = (after, think_us);
                after = Some(number);
                // The answer is part of the next prompt.
                last = self.grow(last, output);
            }
        }
    }
}
