//! Conversations for the demo and for comparing routing policies.
//!
//! Every conversation starts with one of a few system prompts (popular ones far more often than others) and has several
//! turns; the prompt of a turn is the whole conversation so far, the engine's answers included. Answers are a
//! function of the prompt ([`answer`]), so the workload knows them without asking an engine. Several conversations are
//! open at a time and take turns at random; the turns of one conversation come in order.
//!
//! The same configuration and seed give the same requests.

use std::ops::RangeInclusive;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::engine_sim::{RequestReport, VOCABULARY, answer};

/// Most tokens of one prompt. A conversation that would grow longer ends early; the limit is far above what a demo needs.
pub const MAX_PROMPT_TOKENS: usize = 1 << 20;

/// What the conversations are like. Ranges are inclusive; every length is in tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkloadConfig {
    /// Number of conversations.
    pub conversations: u32,
    /// Conversations open at the same time, at least 1.
    pub open_at_once: u32,
    /// Number of system prompts, at least 1.
    pub system_prompts: u32,
    /// Popularity of the k-th system prompt is `1 / k^skew`; 0 makes all equal.
    pub skew: f64,
    /// Length of a system prompt.
    pub system_tokens: RangeInclusive<u32>,
    /// Turns of a conversation, at least 1.
    pub turns: RangeInclusive<u32>,
    /// Length of a user's message, at least 1.
    pub user_tokens: RangeInclusive<u32>,
    /// Length of an answer, at least 1.
    pub output_tokens: RangeInclusive<u32>,
}

/// One request to route and serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Which conversation, from 0 in the order in which they open.
    pub conversation: u32,
    /// Which turn of it, from 0.
    pub turn: u32,
    /// The prompt.
    pub tokens: Vec<u32>,
    /// Tokens to answer.
    pub output_tokens: u32,
}

/// The requests of all conversations, in the order in which they arrive.
#[derive(Debug)]
pub struct Workload {
    config: WorkloadConfig,
    random: StdRng,
    system_prompts: Vec<Vec<u32>>,
    /// Running sum of the system prompts' weights.
    popularity: Vec<f64>,
    open: Vec<Conversation>,
    opened: u32,
}

/// A configuration that makes no conversations.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("workload: {field} {problem}")]
pub struct InvalidWorkloadError {
    field: &'static str,
    problem: &'static str,
}

/// What a routing policy made of a workload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyReport {
    /// Name of the policy.
    pub name: String,
    /// Share of all prompt tokens that were cached where they were served, 0 to 1.
    pub cached_share: f64,
    /// Prompt blocks that had to be computed.
    pub blocks_prefilled: u64,
    /// Requests served.
    pub requests: u64,
}

/// Adds up the requests of one policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyTally {
    requests: u64,
    prompt_tokens: u64,
    cached_tokens: u64,
    blocks_prefilled: u64,
}

#[derive(Debug)]
struct Conversation {
    number: u32,
    turn: u32,
    turns: u32,
    /// Everything said so far.
    text: Vec<u32>,
}

// === impl WorkloadConfig ===

impl Default for WorkloadConfig {
    /// 200 chats over eight system prompts of one to two thousand tokens.
    fn default() -> Self {
        Self {
            conversations: 200,
            open_at_once: 32,
            system_prompts: 8,
            skew: 1.0,
            system_tokens: 1_024..=2_048,
            turns: 3..=6,
            user_tokens: 32..=256,
            output_tokens: 16..=128,
        }
    }
}

impl WorkloadConfig {
    fn check(&self) -> Result<(), InvalidWorkloadError> {
        let refuse = |field, problem| Err(InvalidWorkloadError { field, problem });
        if self.open_at_once == 0 {
            return refuse("open_at_once", "is 0; at least one conversation must be open at a time");
        }
        if self.system_prompts == 0 {
            return refuse("system_prompts", "is 0; conversations start with one");
        }
        if !self.skew.is_finite() || self.skew < 0.0 {
            return refuse("skew", "must be a number from 0 up");
        }
        let ranges = [
            ("system_tokens", &self.system_tokens, 0),
            ("turns", &self.turns, 1),
            ("user_tokens", &self.user_tokens, 1),
            ("output_tokens", &self.output_tokens, 1),
        ];
        for (field, range, least) in ranges {
            if range.is_empty() {
                return refuse(field, "is empty; its start must not be above its end");
            }
            if *range.start() < least {
                return refuse(field, "starts at 0; it must start at 1 or above");
            }
            if *range.end() as usize > MAX_PROMPT_TOKENS {
                return refuse(field, "ends above the longest prompt of 1,048,576");
            }
        }
        Ok(())
    }
}

// === impl Workload ===

impl Workload {
    /// Prepares the system prompts.
    pub fn new(config: WorkloadConfig, seed: u64) -> Result<Self, InvalidWorkloadError> {
        config.check()?;
        let mut random = StdRng::seed_from_u64(seed);
        let lengths: Vec<u32> =
            (0..config.system_prompts).map(|_| random.random_range(config.system_tokens.clone())).collect();
        let system_prompts = lengths.into_iter().map(|length| tokens(&mut random, length)).collect();
        let popularity = (1..=config.system_prompts)
            .scan(0.0, |sum, rank| {
                *sum += f64::from(rank).powf(-config.skew);
                Some(*sum)
            })
            .collect();
        Ok(Self { config, random, system_prompts, popularity, open: Vec::new(), opened: 0 })
    }

    fn open_conversations(&mut self) {
        while self.opened < self.config.conversations && self.open.len() < self.config.open_at_once as usize {
            let total = self.popularity.last().copied().unwrap_or(0.0);
            let point = self.random.random_range(0.0..1.0) * total;
            let chosen = self.popularity.partition_point(|sum| *sum <= point);
            // Rounding may put the point at the very end.
            let chosen = chosen.min(self.system_prompts.len() - 1);
            let turns = self.random.random_range(self.config.turns.clone());
            let text = self.system_prompts[chosen].clone();
            self.open.push(Conversation { number: self.opened, turn: 0, turns, text });
            self.opened += 1;
        }
    }
}

impl Iterator for Workload {
    type Item = Request;

    fn next(&mut self) -> Option<Request> {
        self.open_conversations();
        if self.open.is_empty() {
            return None;
        }
        let index = self.random.random_range(0..self.open.len());
        let user = self.random.random_range(self.config.user_tokens.clone());
        let output_tokens = self.random.random_range(self.config.output_tokens.clone());
        let message = tokens(&mut self.random, user);

        let conversation = &mut self.open[index];
        conversation.text.extend(message);
        let request = Request {
            conversation: conversation.number,
            turn: conversation.turn,
            tokens: conversation.text.clone(),
            output_tokens,
        };
        conversation.turn += 1;
        let longest = *self.config.user_tokens.end() as usize + output_tokens as usize;
        if conversation.turn == conversation.turns || conversation.text.len() + longest > MAX_PROMPT_TOKENS {
            self.open.swap_remove(index);
        } else {
            conversation.text.extend(answer(&request.tokens, output_tokens));
        }
        Some(request)
    }
}

/// Random text.
fn tokens(random: &mut StdRng, length: u32) -> Vec<u32> {
    (0..length).map(|_| random.random_range(0..VOCABULARY)).collect()
}

// === impl PolicyTally ===

impl PolicyTally {
    /// Adds one served request.
    pub fn add(&mut self, report: &RequestReport) {
        self.requests += 1;
        self.prompt_tokens += u64::from(report.prompt_tokens);
        self.cached_tokens += u64::from(report.cached_tokens);
        self.blocks_prefilled += u64::from(report.blocks_prefilled);
    }

    /// The sum, under a policy's name. Without requests the share is 0.
    pub fn report(&self, name: impl Into<String>) -> PolicyReport {
        PolicyReport {
            name: name.into(),
            cached_share: self.cached_tokens as f64 / self.prompt_tokens.max(1) as f64,
            blocks_prefilled: self.blocks_prefilled,
            requests: self.requests,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};

    use super::*;
    use crate::engine_sim::{SimConfig, SimEngine};

    fn small() -> WorkloadConfig {
        WorkloadConfig {
            conversations: 40,
            open_at_once: 5,
            system_prompts: 4,
            system_tokens: 64..=96,
            user_tokens: 4..=20,
            output_tokens: 2..=9,
            ..Default::default()
        }
    }

    fn requests(seed: u64) -> Vec<Request> {
        Workload::new(small(), seed).unwrap().collect()
    }

    #[test]
    fn one_seed_gives_one_workload() {
        assert_eq!(requests(1), requests(1));
        assert_ne!(requests(1), requests(2));
    }

    #[test]
    fn turns_come_in_order_and_contain_the_answers_before_them() {
        let mut last: BTreeMap<u32, Request> = BTreeMap::new();
        for request in requests(3) {
            if let Some(before) = last.get(&request.conversation) {
                assert_eq!(request.turn, before.turn + 1);
                let mut text = before.tokens.clone();
                text.extend(answer(&before.tokens, before.output_tokens));
                assert!(request.tokens.starts_with(&text) && request.tokens.len() > text.len());
            } else {
                assert_eq!(request.turn, 0);
            }
            last.insert(request.conversation, request);
        }
        assert_eq!(last.len(), 40);
        assert!(last.values().all(|request| (2..=5).contains(&request.turn)));
    }

    #[test]
    fn no_more_conversations_than_allowed_are_open_at_once() {
        let requests = requests(4);
        let last: BTreeMap<u32, usize> =
            requests.iter().enumerate().map(|(index, request)| (request.conversation, index)).collect();
        for index in 0..requests.len() {
            let started: HashSet<u32> = requests[..=index].iter().map(|r| r.conversation).collect();
            let open = started.iter().filter(|conversation| last[conversation] >= index).count();
            assert!(open <= 5);
        }
    }

    #[test]
    fn popular_system_prompts_start_more_conversations() {
        let config = WorkloadConfig { conversations: 2_000, turns: 1..=1, ..small() };
        let mut starts: BTreeMap<Vec<u32>, u32> = BTreeMap::new();
        for request in Workload::new(config, 5).unwrap() {
            *starts.entry(request.tokens[..64].to_vec()).or_default() += 1;
        }
        let mut counts: Vec<u32> = starts.into_values().collect();
        counts.sort_unstable_by(|a, b| b.cmp(a));
        assert_eq!(counts.len(), 4);
        // Expected shares are 12/25, 6/25, 4/25 and 3/25.
        assert!(counts[0] > 800 && counts[3] < 400, "{counts:?}");
    }

    #[test]
    fn an_engine_that_serves_everything_finds_most_of_it_cached() {
        let mut engine = SimEngine::new(SimConfig::default(), 0).unwrap();
        let mut tally = PolicyTally::default();
        for request in requests(6) {
            let submitted = engine.submit(&request.tokens, request.output_tokens).unwrap();
            assert_eq!(submitted.report.output, answer(&request.tokens, request.output_tokens));
            tally.add(&submitted.report);
        }
        let report = tally.report("one engine");
        assert!(report.cached_share > 0.5 && report.cached_share < 1.0, "{report:?}");
        assert_eq!(PolicyTally::default().report("none").cached_share, 0.0);
    }

    #[test]
    fn a_policy_report_has_stable_names() {
        let report =
            PolicyReport { name: "kvatlas".into(), cached_share: 0.5, blocks_prefilled: 7, requests: 3 };
        let json = serde_json::to_value(&report).unwrap();
        let expected =
            serde_json::json!({"name": "kvatlas", "cached_share": 0.5, "blocks_prefilled": 7, "requests": 3});
        assert_eq!(json, expected);
    }

    #[test]
    fn what_makes_no_conversations_is_refused_and_explained() {
        let refused = |config: WorkloadConfig| Workload::new(config, 0).unwrap_err().to_string();
        assert!(refused(WorkloadConfig { system_prompts: 0, ..small() }).contains("system_prompts"));
        assert!(refused(WorkloadConfig { open_at_once: 0, ..small() }).contains("open_at_once"));
        assert!(refused(WorkloadConfig { skew: f64::NAN, ..small() }).contains("skew"));
        assert!(refused(WorkloadConfig { turns: 0..=3, ..small() }).contains("turns"));
        let mut backwards = small();
        backwards.user_tokens = RangeInclusive::new(9, 3);
        assert!(refused(backwards).contains("user_tokens"));
    }
}
