//! A naive engine: it counts copies in a map and says each step as its events.

use std::collections::BTreeMap;
use std::fmt;

use kvatlas_proto::shard::SEGMENT_BLOCKS;
use kvatlas_proto::{BlockKey, KeyHasher, Partition};
use proptest::prelude::*;

use super::{Held, Reader, StoredEvent, cleared, removed};

pub const BLOCK: usize = 4;
pub const PROMPTS: usize = 4;
pub const BLOCKS: usize = 6;
pub const MEDIA: [&str; 3] = ["GPU", "CPU", "STORAGE"];

/// One step of an engine's life, in blocks after the engine's lead. Prompts share prefixes: prompt p's blocks before `p` are
/// those of prompt 0.
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

/// The key space in one piece or cut, and how many blocks all prompts begin with: most prompts go over a cut.
pub fn any_partition() -> impl Strategy<Value = (Partition, usize)> {
    prop_oneof![
        1 => prop_oneof![Just(0), Just(30)].prop_map(|lead| (Partition::WHOLE, lead)),
        2 => (2..9u32, prop_oneof![Just(0), Just(30), Just(61)])
            .prop_map(|(number, lead)| (super::shards(number), lead)),
    ]
}

/// The naive model: an engine that counts copies in a map, and a shim that remembers which hashes it has seen tokens of.
pub struct Engine {
    /// Blocks with which all prompts begin.
    pub lead: usize,
    pub life: u64,
    pub seq: u64,
    pub time: f64,
    pub copies: BTreeMap<(usize, u64), u32>,
    pub keys: BTreeMap<u64, u64>,
}

impl Engine {
    pub fn new() -> Self {
        Self::deep(0)
    }

    /// All prompts begin with so many blocks, after which steps take place.
    pub fn deep(lead: usize) -> Self {
        Self { lead, life: 0, seq: 0, time: 1e9, copies: BTreeMap::new(), keys: BTreeMap::new() }
    }

    pub fn tokens(&self, prompt: usize, block: usize) -> Vec<u32> {
        let own = if block < self.lead + prompt { 0 } else { prompt };
        (0..BLOCK).map(|i| (own * 1_000 + block * BLOCK + i) as u32).collect()
    }

    pub fn hash(&self, prompt: usize, block: usize) -> u64 {
        let mut hash = self.life;
        for i in 0..=block {
            for token in self.tokens(prompt, i) {
                hash = (hash ^ u64::from(token)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23);
            }
        }
        hash
    }

    /// Keys of a prompt's blocks.
    pub fn chain(&self, prompt: usize, blocks: usize) -> Vec<BlockKey> {
        let tokens: Vec<u32> = (0..blocks).flat_map(|i| self.tokens(prompt, i)).collect();
        KeyHasher::default().chain(&tokens, BLOCK as u32)
    }

    pub fn key(&self, prompt: usize, block: usize) -> BlockKey {
        *self.chain(prompt, block + 1).last().unwrap()
    }

    /// Checks that a reader has each block in the shard, and under the parent, that follow from its prompt's keys.
    pub fn check_places(&self, partition: Partition, reader: &Reader) {
        let segment = if partition == Partition::WHOLE { usize::MAX } else { SEGMENT_BLOCKS as usize };
        let mut places = BTreeMap::new();
        for prompt in 0..PROMPTS {
            let chain = self.chain(prompt, self.lead + BLOCKS);
            for (depth, key) in chain.iter().enumerate() {
                let first = depth - depth % segment;
                let parent = if depth == first { KeyHasher::default().root() } else { chain[depth - 1] };
                places.insert(key.0, (partition.shard_of(chain[first]), parent.0));
            }
        }
        for lane in &reader.lanes {
            for key in lane.held.values().flatten() {
                let (shard, parent) = places[key];
                assert_eq!(lane.shard.number(), shard, "a block lies in its segment's shard");
                assert_eq!(reader.parents[key], parent, "a block follows what precedes it in its shard");
            }
        }
    }

    pub fn stored(&self, prompt: usize, blocks: std::ops::Range<usize>, medium: usize) -> StoredEvent {
        StoredEvent {
            hashes: blocks.clone().map(|b| self.hash(prompt, b)).collect(),
            parent: blocks.start.checked_sub(1).map(|b| self.hash(prompt, b)),
            tokens: blocks.flat_map(|b| self.tokens(prompt, b)).collect(),
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
        let lead = self.lead;
        match *step {
            Step::Compute { prompt, blocks } => {
                let blocks = lead + blocks;
                let first = (0..blocks).find(|&b| !self.copies.contains_key(&(0, self.hash(prompt, b))));
                let Some(first) = first else { return vec![] };
                let chain = self.chain(prompt, blocks);
                for (block, key) in chain.iter().enumerate().skip(first) {
                    self.add(prompt, block, 0);
                    self.keys.insert(self.hash(prompt, block), key.0);
                }
                vec![self.stored(prompt, first..blocks, 0).map()]
            }
            Step::Duplicate { prompt, block } => {
                let block = lead + block;
                if !self.copies.contains_key(&(0, self.hash(prompt, block))) {
                    return vec![];
                }
                self.add(prompt, block, 0);
                vec![self.stored(prompt, block..block + 1, 0).map()]
            }
            Step::Offload { prompt, block, medium } => {
                let block = lead + block;
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
                let block = lead + block;
                if !self.copies.contains_key(&(0, self.hash(prompt, block))) {
                    return vec![];
                }
                self.add(prompt, block, medium);
                vec![self.stored(prompt, block..block + 1, medium).array()]
            }
            Step::Evict { prompt, block, medium } => {
                let place = (medium, self.hash(prompt, lead + block));
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
