//! What is asked of the fleet: an endless stream of requests, each a chain of blocks.

use std::ops::RangeInclusive;
use std::rc::Rc;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::forest::{Block, Forest};

/// One request.
#[derive(Clone, Debug)]
pub(super) struct Request {
    /// The prompt's blocks, and then those that the answer fills.
    pub(super) chain: Rc<[Block]>,
    /// How many of them are the prompt.
    pub(super) prompt: usize,
}

/// An endless stream of requests. The same one for the same seed, whatever is done with it.
pub(super) trait Requests {
    /// The next one. New blocks are added to the forest.
    fn next(&mut self, forest: &mut Forest) -> Request;
}

/// What conversations over system prompts are like. All lengths are in blocks.
#[derive(Clone, Debug)]
pub(super) struct ChatConfig {
    /// Length of each system prompt, most popular first.
    pub(super) system: Vec<u32>,
    /// Popularity of the k-th is `1 / k^skew`.
    pub(super) skew: f64,
    /// Requests of a conversation.
    pub(super) turns: RangeInclusive<u32>,
    /// What the user says in a turn.
    pub(super) user: RangeInclusive<u32>,
    /// What is answered.
    pub(super) answer: RangeInclusive<u32>,
    /// Conversations that are open at the same time.
    pub(super) open: usize,
}

/// Conversations that each begin with one of some system prompts and have nothing else in common.
pub(super) struct Chats {
    config: ChatConfig,
    random: StdRng,
    systems: Vec<Vec<Block>>,
    /// Running sum of the system prompts' weights.
    popularity: Vec<f64>,
    open: Vec<Chat>,
}

struct Chat {
    text: Vec<Block>,
    turns_left: u32,
}

// === impl Request ===

impl Request {
    /// The prompt's blocks.
    pub(super) fn prompt(&self) -> &[Block] {
        &self.chain[..self.prompt]
    }
}

// === impl ChatConfig ===

impl ChatConfig {
    /// 100 system prompts of 50 to 2,000 blocks, popular ones far more often than others, and chats of a few turns.
    pub(super) fn zipf(open: usize, seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed ^ 0x5e5);
        let (shortest, longest) = (50f64.ln(), 2_000f64.ln());
        let system = (0..100).map(|_| random.random_range(shortest..longest).exp().round() as u32).collect();
        Self { system, skew: 1.0, turns: 1..=6, user: 4..=100, answer: 8..=48, open }
    }

    /// One system prompt for everybody, and single questions: user and answer have `tail` blocks together.
    pub(super) fn one_prompt(system: u32, tail: u32) -> Self {
        let answer = (tail / 4).min(200);
        Self {
            system: vec![system],
            skew: 0.0,
            turns: 1..=1,
            user: tail - answer..=tail - answer,
            answer: answer..=answer,
            open: 1,
        }
    }
}

// === impl Chats ===

impl Chats {
    /// Prepares the system prompts.
    pub(super) fn new(config: ChatConfig, forest: &mut Forest, seed: u64) -> Self {
        let systems = config.system.iter().map(|blocks| {
            let mut system = Vec::new();
            forest.extend(&mut system, *blocks);
            system
        });
        let popularity = (1..=config.system.len())
            .scan(0.0, |sum, rank| {
                *sum += (rank as f64).powf(-config.skew);
                Some(*sum)
            })
            .collect();
        let systems = systems.collect();
        Self { config, random: StdRng::seed_from_u64(seed), systems, popularity, open: Vec::new() }
    }

    fn open_one(&mut self) {
        let total = self.popularity.last().copied().unwrap_or(0.0);
        let point = self.random.random_range(0.0..1.0) * total;
        // Rounding may put the point at the very end.
        let chosen = self.popularity.partition_point(|sum| *sum <= point).min(self.systems.len() - 1);
        let turns_left = self.random.random_range(self.config.turns.clone());
        self.open.push(Chat { text: self.systems[chosen].clone(), turns_left });
    }
}

impl Requests for Chats {
    fn next(&mut self, forest: &mut Forest) -> Request {
        while self.open.len() < self.config.open.max(1) {
            self.open_one();
        }
        let at = self.random.random_range(0..self.open.len());
        let user = self.random.random_range(self.config.user.clone());
        let answer = self.random.random_range(self.config.answer.clone());
        let chat = &mut self.open[at];
        forest.extend(&mut chat.text, user);
        let prompt = chat.text.len();
        forest.extend(&mut chat.text, answer);
        chat.turns_left -= 1;
        let over = chat.turns_left == 0;
        let chain = chat.text.as_slice().into();
        if over {
            self.open.swap_remove(at);
        }
        Request { chain, prompt }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn system_prompts_are_as_long_and_as_popular_as_stated() {
        let mut forest = Forest::new();
        let config = ChatConfig { turns: 1..=1, ..ChatConfig::zipf(10, 3) };
        assert!(config.system.iter().all(|length| (50..=2_000).contains(length)));
        let mut chats = Chats::new(config, &mut forest, 3);
        let mut starts: BTreeMap<Block, u32> = BTreeMap::new();
        for _ in 0..20_000 {
            *starts.entry(chats.next(&mut forest).chain[0]).or_default() += 1;
        }
        let mut counts: Vec<u32> = starts.into_values().collect();
        counts.sort_unstable_by(|a, b| b.cmp(a));
        // The harmonic number of 100 is 5.19: the first has 19.3 % and the tenth 1.93 %.
        assert_eq!(counts.len(), 100);
        assert!((3_500..4_200).contains(&counts[0]) && (300..480).contains(&counts[9]), "{counts:?}");
    }

    #[test]
    fn one_prompt_is_shared_and_tails_are_not() {
        let mut forest = Forest::new();
        let mut chats = Chats::new(ChatConfig::one_prompt(840, 200), &mut forest, 1);
        let (a, b) = (chats.next(&mut forest), chats.next(&mut forest));
        assert_eq!((a.chain.len(), a.prompt, b.chain.len()), (1_040, 990, 1_040));
        assert_eq!(a.chain[..840], b.chain[..840]);
        assert!(a.chain[840..].iter().zip(&b.chain[840..]).all(|(a, b)| a != b));
    }
}
