//! A naive engine: it counts copies in a map and says each step as its events.

use std::collections::BTreeMap;
use std::fmt;

use kvatlas_proto::{BlockKey, KeyHasher};
use proptest::prelude::*;

use super::{Held, StoredEvent, cleared, removed};

pub const BLOCK: usize = 4;
pub const PROMPTS: usize = 4;
pub const BLOCKS: usize = 6;
pub const MEDIA: [&str; 3] = ["GPU", "CPU", "STORAGE"];

/// One step of an engine's life. Prompts share prefixes: prompt p's blocks before `p` are those of prompt 0.
#[derive(Clone, Debug)]
pub enum Step {
    /// Blocks 0..`blocks` of a prompt are computed on the GPU; those that exist already stay.
    Compute { prompt: usize, blocks: usize },
    /// One block is computed a second time although it exists (two copies).
    Duplicate { prompt: usize, block: usize },
    /// A block is announced on another tier, without tokens.
    Offload { prompt: usize, block: usize, medium: usize },
    /// The same with tokens and parent, but without extra keys.
    Describe { prompt: usize, block: usize, medium: usize },
    /// One copy goes.
    Evict { prompt: usize, block: usize, medium: usize },
    /// The cache is reset.
    Clear,
    /// The engine restarts; its sequence starts over.
    Restart,
    /// The shim cannot promise that what it published is all.
    NewEpoch,
    /// The index starts anew and sees the rest of the epoch only if it asks.
    Forget,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Compute { prompt, blocks } => write!(f, "compute prompt {prompt} blocks 0..{blocks}"),
            Self::Duplicate { prompt, block } => write!(f, "duplicate prompt {prompt} block {block}"),
            Self::Offload { prompt, block, medium } => {
                write!(f, "offload prompt {prompt} block {block} to {}", MEDIA[*medium])
            }
            Self::Describe { prompt, block, medium } => {
                write!(f, "describe prompt {prompt} block {block} on {}", MEDIA[*medium])
            }
            Self::Evict { prompt, block, medium } => {
                write!(f, "evict prompt {prompt} block {block} from {}", MEDIA[*medium])
            }
            Self::Clear => write!(f, "clear"),
            Self::Restart => write!(f, "restart"),
            Self::NewEpoch => write!(f, "new epoch"),
            Self::Forget => write!(f, "forget"),
        }
    }
}

pub fn any_step() -> impl Strategy<Value = Step> {
    let at = || (0..PROMPTS, 0..BLOCKS);
    prop_oneof![
        6 => (0..PROMPTS, 1..=BLOCKS).prop_map(|(prompt, blocks)| Step::Compute { prompt, blocks }),
        2 => at().prop_map(|(prompt, block)| Step::Duplicate { prompt, block }),
        2 => (at(), 1..3usize).prop_map(|((prompt, block), medium)| Step::Offload { prompt, block, medium }),
        2 => (at(), 1..3usize).prop_map(|((prompt, block), medium)| Step::Describe { prompt, block, medium }),
        6 => (at(), 0..3usize).prop_map(|((prompt, block), medium)| Step::Evict { prompt, block, medium }),
        1 => Just(Step::Clear),
        1 => Just(Step::Restart),
        1 => Just(Step::NewEpoch),
        1 => Just(Step::Forget),
    ]
}

/// The naive model: an engine that counts copies in a map, and a shim that remembers which hashes it has seen tokens of.
pub struct Engine {
    pub life: u64,
    pub seq: u64,
    pub time: f64,
    pub copies: BTreeMap<(usize, u64), u32>,
    pub keys: BTreeMap<u64, u64>,
}

impl Engine {
    pub fn new() -> Self {
        Self { life: 0, seq: 0, time: 1e9, copies: BTreeMap::new(), keys: BTreeMap::new() }
    }

    pub fn tokens(prompt: usize, block: usize) -> Vec<u32> {
        let own = if block < prompt { 0 } else { prompt };
        (0..BLOCK).map(|i| (own * 1_000 + block * BLOCK + i) as u32).collect()
    }

    pub fn hash(&self, prompt: usize, block: usize) -> u64 {
        let mut hash = self.life;
        for i in 0..=block {
            for token in Self::tokens(prompt, i) {
                hash = (hash ^ u64::from(token)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23);
            }
        }
        hash
    }

    pub fn key(prompt: usize, block: usize) -> BlockKey {
        let tokens: Vec<u32> = (0..=block).flat_map(|i| Self::tokens(prompt, i)).collect();
        *KeyHasher::default().chain(&tokens, BLOCK as u32).last().unwrap()
    }

    pub fn stored(&self, prompt: usize, blocks: std::ops::Range<usize>, medium: usize) -> StoredEvent {
        StoredEvent {
            hashes: blocks.clone().map(|b| self.hash(prompt, b)).collect(),
            parent: blocks.start.checked_sub(1).map(|b| self.hash(prompt, b)),
            tokens: blocks.flat_map(|b| Self::tokens(prompt, b)).collect(),
            block_size: BLOCK as u32,
            medium: Some(MEDIA[medium]),
            ..StoredEvent::default()
        }
    }

    pub fn add(&mut self, prompt: usize, block: usize, medium: usize) {
        *self.copies.entry((medium, self.hash(prompt, block))).or_default() += 1;
    }

    /// Performs a step; returns the messages it publishes.
    pub fn step(&mut self, step: &Step) -> Vec<rmpv::Value> {
        match *step {
            Step::Compute { prompt, blocks } => {
                let first = (0..blocks).find(|&b| !self.copies.contains_key(&(0, self.hash(prompt, b))));
                let Some(first) = first else { return vec![] };
                for block in first..blocks {
                    self.add(prompt, block, 0);
                    self.keys.insert(self.hash(prompt, block), Self::key(prompt, block).0);
                }
                vec![self.stored(prompt, first..blocks, 0).map()]
            }
            Step::Duplicate { prompt, block } => {
                if !self.copies.contains_key(&(0, self.hash(prompt, block))) {
                    return vec![];
                }
                self.add(prompt, block, 0);
                vec![self.stored(prompt, block..block + 1, 0).map()]
            }
            Step::Offload { prompt, block, medium } => {
                // Offload follows from a block on the GPU.
                if !self.copies.contains_key(&(0, self.hash(prompt, block))) {
                    return vec![];
                }
                self.add(prompt, block, medium);
                let placeholder = StoredEvent {
                    tokens: vec![],
                    parent: None,
                    block_size: 0,
                    ..self.stored(prompt, block..block + 1, medium)
                };
                vec![placeholder.map()]
            }
            Step::Describe { prompt, block, medium } => {
                if !self.copies.contains_key(&(0, self.hash(prompt, block))) {
                    return vec![];
                }
                self.add(prompt, block, medium);
                vec![self.stored(prompt, block..block + 1, medium).array()]
            }
            Step::Evict { prompt, block, medium } => {
                let place = (medium, self.hash(prompt, block));
                let Some(copies) = self.copies.get_mut(&place) else { return vec![] };
                *copies -= 1;
                if *copies == 0 {
                    self.copies.remove(&place);
                }
                vec![removed(&[place.1], Some(MEDIA[medium]), None)]
            }
            Step::Clear => {
                self.copies.clear();
                vec![cleared()]
            }
            Step::Restart => {
                self.life += 1;
                self.seq = 0;
                self.copies.clear();
                self.keys.clear();
                vec![cleared()]
            }
            Step::NewEpoch | Step::Forget => vec![],
        }
    }

    /// What an index should believe now.
    pub fn truth(&self) -> Held {
        let mut truth: Held = BTreeMap::new();
        for (medium, hash) in self.copies.keys() {
            truth.entry((MEDIA[*medium].to_owned(), 0)).or_default().insert(self.keys[hash]);
        }
        truth
    }
}
