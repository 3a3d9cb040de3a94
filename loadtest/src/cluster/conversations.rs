//! Conversations of agents: long prompts that grow by a turn at a time over a few common beginnings. Pure.
//!
//! A conversation is asked about as its next turn arrives: by the key of its last block and the keys of the turn's blocks, which
//! nobody has yet. One shape and seed give the same conversations.

use std::collections::HashSet;
use std::ops::RangeInclusive;

use kvatlas_proto::shard::SEGMENT_BLOCKS;
use kvatlas_proto::{BlockKey, KeyHasher, grpc};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::recovery::churn::{BLOCK_TOKENS, hash_of, token_of};
use crate::recovery::judge::question;
use crate::wire::{BlockStored, Event};

/// Blocks that an engine stores in one event: a prefill of some thousand tokens.
const EVENT_BLOCKS: usize = 256;

/// What conversations are like. Lengths are in blocks of 16 tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// Conversations.
    pub conversations: usize,
    /// Engines that they are spread over.
    pub engines: usize,
    /// Common beginnings; each conversation has one of them.
    pub beginnings: usize,
    /// Blocks of a common beginning.
    pub beginning_blocks: usize,
    /// Blocks that a conversation has beyond its beginning when it is asked about.
    pub own_blocks: RangeInclusive<usize>,
    /// Blocks of the turn that is asked about.
    pub turn_blocks: usize,
    /// Decides lengths, and who begins alike.
    pub seed: u64,
}

/// One conversation.
#[derive(Clone, Debug)]
pub struct Conversation {
    /// Which engine holds it.
    pub engine: usize,
    /// Blocks that are held.
    pub held: usize,
    /// Keys of these and of the turn's blocks.
    pub keys: Vec<u64>,
    beginning: u64,
    number: u64,
}

/// All of them.
#[derive(Clone, Debug)]
pub struct Conversations {
    shape: Shape,
    all: Vec<Conversation>,
}

// === impl Shape ===

impl Shape {
    /// Agents with tools: prompts of about 1,900 blocks (30,000 tokens), 96 % of which are held.
    pub fn agentic(conversations: usize, engines: usize, seed: u64) -> Self {
        // Ends in the middle of a segment, as chance has it on average: where a segment ends, nothing that follows lies together.
        let (beginnings, beginning_blocks) = (8, 25 * SEGMENT_BLOCKS as usize + SEGMENT_BLOCKS as usize / 2);
        Self {
            conversations,
            engines,
            beginnings,
            beginning_blocks,
            own_blocks: 100..=2_750,
            turn_blocks: 76,
            seed,
        }
    }

    /// The same agents, all with one beginning.
    pub fn one_beginning(conversations: usize, engines: usize, seed: u64) -> Self {
        Self { beginnings: 1, ..Self::agentic(conversations, engines, seed) }
    }

    /// Short requests after one long beginning: nearly all of each lies where all others' lies.
    pub fn short_tails(conversations: usize, engines: usize, seed: u64) -> Self {
        Self { own_blocks: 4..=24, turn_blocks: 4, ..Self::one_beginning(conversations, engines, seed) }
    }
}

// === impl Conversations ===

impl Conversations {
    /// Makes them.
    pub fn new(shape: Shape) -> Self {
        let mut random = StdRng::seed_from_u64(shape.seed);
        let all = (0..shape.conversations)
            .map(|number| {
                let beginning = random.random_range(0..shape.beginnings.max(1)) as u64;
                let held = shape.beginning_blocks + random.random_range(shape.own_blocks.clone());
                // Seeds of the beginnings are below all others.
                let number = (shape.beginnings + number) as u64;
                let engine = random.random_range(0..shape.engines.max(1));
                let mut one = Conversation { engine, held, keys: Vec::new(), beginning, number };
                one.keys = one.all_keys(shape.beginning_blocks, held + shape.turn_blocks);
                one
            })
            .collect();
        Self { shape, all }
    }

    /// What they are like.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Every one.
    pub fn all(&self) -> &[Conversation] {
        &self.all
    }

    /// Mean length of what is asked about, blocks.
    pub fn mean_blocks(&self) -> f64 {
        self.all.iter().map(|one| one.keys.len() as f64).sum::<f64>() / self.all.len().max(1) as f64
    }

    /// Share of these blocks that is held.
    pub fn held_share(&self) -> f64 {
        let held: usize = self.all.iter().map(|one| one.held).sum();
        let asked: usize = self.all.iter().map(|one| one.keys.len()).sum();
        held as f64 / asked.max(1) as f64
    }

    /// Different blocks that each engine holds, added up.
    pub fn stored_blocks(&self) -> usize {
        let mut known = HashSet::new();
        let mut blocks = 0;
        for one in &self.all {
            let own = one.held - self.shape.beginning_blocks;
            let first = known.insert((one.engine, one.beginning));
            blocks += own + if first { self.shape.beginning_blocks } else { 0 };
        }
        blocks
    }

    /// What an engine says when it stores its conversations, a message a conversation and piece.
    pub fn events(&self, engine: usize) -> impl Iterator<Item = Event> + '_ {
        let mut known = HashSet::new();
        self.all.iter().filter(move |one| one.engine == engine).flat_map(move |one| {
            let first = if known.insert(one.beginning) { 0 } else { self.shape.beginning_blocks };
            let starts: Vec<usize> = (first..one.held).step_by(EVENT_BLOCKS).collect();
            let beginning_blocks = self.shape.beginning_blocks;
            starts
                .into_iter()
                .map(move |start| one.stored(beginning_blocks, start, (start + EVENT_BLOCKS).min(one.held)))
        })
    }
}

// === impl Conversation ===

impl Conversation {
    /// Which chain a block belongs to.
    fn chain_at(&self, beginning_blocks: usize, block: usize) -> u64 {
        if block < beginning_blocks { self.beginning } else { self.number }
    }

    fn tokens(&self, beginning_blocks: usize, block: usize) -> impl Iterator<Item = u32> {
        let chain = self.chain_at(beginning_blocks, block);
        (0..u64::from(BLOCK_TOKENS)).map(move |token| token_of(chain, block as u64, token))
    }

    fn all_keys(&self, beginning_blocks: usize, blocks: usize) -> Vec<u64> {
        let hasher = KeyHasher::default();
        let mut key = hasher.root();
        let next = |block: usize| {
            let tokens: Vec<u32> = self.tokens(beginning_blocks, block).collect();
            key = hasher.extend(key, hasher.local(&tokens, &[]));
            let BlockKey(number) = key;
            number
        };
        (0..blocks).map(next).collect()
    }

    fn stored(&self, beginning_blocks: usize, start: usize, end: usize) -> Event {
        let hash = |block| hash_of(self.chain_at(beginning_blocks, block), block);
        Event::Stored(BlockStored {
            block_hashes: (start..end).map(hash).collect(),
            parent_block_hash: start.checked_sub(1).map(hash),
            token_ids: (start..end).flat_map(|block| self.tokens(beginning_blocks, block)).collect(),
            block_size: BLOCK_TOKENS,
            medium: Some("GPU".to_owned()),
            extra_keys: Some(vec![None; end - start]),
            group_idx: Some(0),
            kv_cache_spec_kind: Some("full_attention".to_owned()),
            ..Default::default()
        })
    }

    /// Who holds the conversation, as a gateway that remembers it asks when its next turn arrives.
    pub fn suffix(&self) -> grpc::ScoreRequest {
        let base = self.held;
        let first = (base - 1) - (base - 1) % SEGMENT_BLOCKS as usize;
        let mut asked = question(&[]);
        if let Some(prompt) = &mut asked.prompt {
            prompt.input = Some(grpc::prompt::Input::Suffix(grpc::Suffix {
                base_key: self.keys[base - 1],
                base_blocks: base as u32,
                keys: self.keys[base..].to_vec(),
                base_segment_key: Some(self.keys[first]),
            }));
        }
        asked
    }

    /// The same by all of its keys, as a gateway asks that remembers nothing.
    pub fn whole(&self) -> grpc::ScoreRequest {
        question(&self.keys)
    }
}

#[cfg(test)]
mod tests {
    use kvatlas_proto::digest::Digest;
    use kvatlas_proto::{InstanceId, ShardId};
    use kvatlas_shim::source::{Source, SourceConfig};

    use super::*;
    use crate::wire::{Batch, MapVersion, WireForm};

    #[test]
    fn agents_prompts_are_as_long_and_as_well_known_as_stated() {
        let conversations = Conversations::new(Shape::agentic(400, 4, 1));
        let mean = conversations.mean_blocks();
        assert!((1_750.0..2_050.0).contains(&mean), "{mean}");
        let share = conversations.held_share();
        assert!((0.955..0.965).contains(&share), "{share}");
    }

    #[test]
    fn a_shim_that_reads_what_an_engine_says_holds_what_is_asked_about() {
        let conversations = Conversations::new(Shape::short_tails(20, 1, 1));
        let mut source = Source::new(SourceConfig::new("m", InstanceId::new("a:1").unwrap()), 1).unwrap();
        for (seq, event) in conversations.events(0).enumerate() {
            let batch = Batch { time_s: 0.0, events: vec![event], rank: 0 };
            source.live(seq as u64, &batch.encode(WireForm::Map(MapVersion::V0_33)), false);
        }
        let keys: HashSet<u64> =
            conversations.all().iter().flat_map(|one| one.keys[..one.held].to_vec()).collect();
        assert_eq!(keys.len(), conversations.stored_blocks());
        let truth = Digest::of(keys.into_iter().map(BlockKey));
        assert_eq!(source.mirror().digests(ShardId::WHOLE), [truth]);
    }
}
