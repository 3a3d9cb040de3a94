//! A simulated engine that is cheap enough to drive a fleet from one machine, and that knows exactly what it holds.
//!
//! It stores blocks in chains of random tokens, a few chains at a time, and evicts the oldest finished chain from its
//! tail when it is full, as block managers do: no child outlives its parent. A part of the chains is common to the
//! fleet, so that engines share prefixes. What it does not have: requests, schedules, copies, tiers
//! ([`crate::engine_sim`] is the model with those).
//!
//! Pure: one configuration and seed give one history, given the same calls; times only enter the [`Ledger`].

use std::collections::{HashSet, VecDeque};

use kvatlas_proto::{BlockKey, KeyHasher};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::ledger::Ledger;
use crate::wire::{BlockRemoved, BlockStored, EngineHash, Event};

/// Tokens per block, vLLM's default.
pub const BLOCK_TOKENS: u32 = 16;
/// Blocks of a finished chain: prompts of one to four thousand tokens.
const CHAIN_BLOCKS: std::ops::RangeInclusive<usize> = 64..=256;
/// Chains that grow at the same time.
const GROWING_CHAINS: usize = 8;
/// Blocks by which a chain grows in one event.
const EVENT_BLOCKS: usize = 16;
/// Chains that the whole fleet may hold.
const SHARED_CHAINS: u64 = 512;
/// Share of new chains that are such.
const SHARED_SHARE: f64 = 0.25;
/// Chains that are gone and still asked for.
const PAST_CHAINS: usize = 256;
/// Tokens are below this.
const VOCABULARY: u64 = 128_000;
/// Smallest engine: the growing chains are never evicted, and must fit.
pub const MIN_CAPACITY: usize = 2 * GROWING_CHAINS * *CHAIN_BLOCKS.end();

/// One engine.
#[derive(Debug)]
pub struct ChurnEngine {
    number: u64,
    capacity: usize,
    random: StdRng,
    hasher: KeyHasher,
    growing: Vec<Chain>,
    next_growing: usize,
    /// Oldest first.
    finished: VecDeque<Chain>,
    /// Chains of which nothing is held any more, oldest first.
    past: VecDeque<Vec<u64>>,
    /// Seeds of the chains of which something is held.
    held_seeds: HashSet<u64>,
    next_seed: u64,
    ledger: Ledger,
}

/// One chain, of which the first `held` blocks are held.
#[derive(Debug)]
struct Chain {
    seed: u64,
    /// Blocks that it will have.
    target: usize,
    keys: Vec<u64>,
    held: usize,
}

// === impl ChurnEngine ===

impl ChurnEngine {
    /// An empty engine of `capacity` blocks (at least [`MIN_CAPACITY`]). Engines of one fleet need different numbers.
    pub fn new(number: u64, capacity: usize, seed: u64) -> Self {
        Self {
            number,
            capacity: capacity.max(MIN_CAPACITY),
            random: StdRng::seed_from_u64(seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
            hasher: KeyHasher::default(),
            growing: Vec::new(),
            next_growing: 0,
            finished: VecDeque::new(),
            past: VecDeque::new(),
            held_seeds: HashSet::new(),
            next_seed: 0,
            ledger: Ledger::default(),
        }
    }

    /// What is held, and when it was.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Blocks that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Stores `blocks` blocks, evicting what has to go for them, and returns what an engine says about it.
    pub fn step(&mut self, blocks: usize, now_ms: u64) -> Vec<Event> {
        let mut events = Vec::new();
        let mut left = blocks;
        while left > 0 {
            if self.growing.len() < GROWING_CHAINS {
                let chain = self.new_chain();
                self.growing.push(chain);
            }
            self.next_growing = (self.next_growing + 1) % self.growing.len();
            let chain = &self.growing[self.next_growing];
            let run = left.min(EVENT_BLOCKS).min(chain.target - chain.keys.len());
            self.make_room(run, now_ms, &mut events);
            events.push(self.grow(run, now_ms));
            left -= run;
        }
        self.ledger.forget(now_ms);
        events
    }

    /// The engine starts anew with nothing, and does not say so: another process under the same address.
    pub fn restart(&mut self, now_ms: u64) {
        self.ledger.clear(now_ms);
        self.held_seeds.clear();
        for mut chain in self.growing.drain(..).chain(self.finished.drain(..)) {
            chain.held = 0;
            remember(&mut self.past, chain);
        }
    }

    /// The keys of a chain of the present or past that has some.
    pub fn some_chain(&self, random: &mut StdRng) -> Option<Vec<u64>> {
        let live = self.growing.iter().chain(&self.finished).map(|chain| &chain.keys);
        let chains = live.chain(&self.past).filter(|keys| !keys.is_empty());
        let count = chains.clone().count();
        chains.clone().nth(random.random_range(0..count.max(1))).cloned()
    }

    fn new_chain(&mut self) -> Chain {
        let shared = self.random.random_range(0..SHARED_CHAINS);
        let seed = if self.random.random_bool(SHARED_SHARE) && !self.held_seeds.contains(&shared) {
            shared
        } else {
            self.next_seed += 1;
            SHARED_CHAINS + (self.number << 40) + self.next_seed
        };
        self.held_seeds.insert(seed);
        Chain { seed, target: self.random.random_range(CHAIN_BLOCKS), keys: Vec::new(), held: 0 }
    }

    /// Extends the chain whose turn it is.
    fn grow(&mut self, run: usize, now_ms: u64) -> Event {
        let chain = &mut self.growing[self.next_growing];
        let first = chain.keys.len();
        let mut tokens = Vec::with_capacity(run * BLOCK_TOKENS as usize);
        let mut parent = chain.keys.last().map_or(self.hasher.root(), |key| BlockKey(*key));
        for block in first..first + run {
            let start = tokens.len();
            tokens
                .extend((0..u64::from(BLOCK_TOKENS)).map(|token| token_of(chain.seed, block as u64, token)));
            parent = self.hasher.extend(parent, self.hasher.local(&tokens[start..], &[]));
            chain.keys.push(parent.0);
            self.ledger.store(parent.0, now_ms);
        }
        chain.held = chain.keys.len();
        let event = Event::Stored(BlockStored {
            block_hashes: (first..first + run).map(|block| hash_of(chain.seed, block)).collect(),
            parent_block_hash: first.checked_sub(1).map(|block| hash_of(chain.seed, block)),
            token_ids: tokens,
            block_size: BLOCK_TOKENS,
            medium: Some("GPU".to_owned()),
            extra_keys: Some(vec![None; run]),
            group_idx: Some(0),
            kv_cache_spec_kind: Some("full_attention".to_owned()),
            ..Default::default()
        });
        if chain.keys.len() == chain.target {
            let done = self.growing.swap_remove(self.next_growing);
            self.finished.push_back(done);
        }
        event
    }

    fn make_room(&mut self, blocks: usize, now_ms: u64, events: &mut Vec<Event>) {
        while self.ledger.held() + blocks > self.capacity {
            let Some(oldest) = self.finished.front_mut() else { return };
            oldest.held -= 1;
            self.ledger.remove(oldest.keys[oldest.held], now_ms);
            // One event per block, as vLLM's pool does it.
            events.push(Event::Removed(BlockRemoved {
                block_hashes: vec![hash_of(oldest.seed, oldest.held)],
                medium: Some("GPU".to_owned()),
                group_idx: Some(0),
                ..Default::default()
            }));
            if oldest.held == 0
                && let Some(chain) = self.finished.pop_front()
            {
                self.held_seeds.remove(&chain.seed);
                remember(&mut self.past, chain);
            }
        }
    }
}

fn remember(past: &mut VecDeque<Vec<u64>>, chain: Chain) {
    past.push_back(chain.keys);
    if past.len() > PAST_CHAINS {
        past.pop_front();
    }
}

fn token_of(chain: u64, block: u64, token: u64) -> u32 {
    (mixed(chain, block << 8 | token) % VOCABULARY) as u32
}

fn hash_of(chain: u64, block: usize) -> EngineHash {
    EngineHash::Int(mixed(chain ^ 0x6861_7368, block as u64))
}

/// The finaliser of splitmix64 over both numbers.
fn mixed(a: u64, b: u64) -> u64 {
    let mut x = a.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(b);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use kvatlas_proto::digest::Digest;
    use kvatlas_proto::{InstanceId, ShardId};
    use kvatlas_shim::source::{Source, SourceConfig};

    use super::*;
    use crate::wire::{Batch, MapVersion, WireForm};

    #[test]
    fn a_shim_that_reads_the_events_holds_what_the_engine_holds() {
        let mut engine = ChurnEngine::new(3, MIN_CAPACITY, 1);
        let mut source = Source::new(SourceConfig::new("m", InstanceId::new("a:1").unwrap()), 1).unwrap();
        for seq in 0..400 {
            let batch = Batch { time_s: seq as f64, events: engine.step(50, seq), rank: 0 };
            source.live(seq, &batch.encode(WireForm::Map(MapVersion::V0_33)), false);
        }
        assert_eq!(engine.ledger().held(), engine.capacity(), "it is full and evicts");
        let truth = Digest::of(engine.ledger().held_keys().into_iter().map(BlockKey));
        assert_eq!(source.mirror().digests(ShardId::WHOLE), [truth]);
        let counts = source.mirror_counts();
        assert_eq!((counts.stored, counts.unknown_removals, counts.unresolved), (20_000, 0, 0));
    }

    #[test]
    fn engines_share_some_chains_and_one_seed_gives_one_history() {
        let keys = |number: u64| -> BTreeSet<u64> {
            let mut engine = ChurnEngine::new(number, 20_000, 7);
            (0..20).for_each(|now| drop(engine.step(1_000, now)));
            engine.ledger().held_keys().into_iter().collect()
        };
        let (one, two) = (keys(1), keys(2));
        assert_eq!(one, keys(1));
        let shared = one.intersection(&two).count();
        assert!(shared > 0 && shared < one.len() / 2, "{shared} of {} blocks are shared", one.len());
    }

    #[test]
    fn chains_of_a_life_before_a_restart_are_asked_for_and_not_held() {
        let mut engine = ChurnEngine::new(1, MIN_CAPACITY, 1);
        engine.step(1_000, 0);
        engine.restart(10);
        assert_eq!(engine.ledger().held(), 0);
        let chain = engine.some_chain(&mut StdRng::seed_from_u64(1)).unwrap();
        assert_eq!(
            (engine.ledger().depth_since(&chain, 10), engine.ledger().depth_since(&chain, 11)),
            (chain.len(), 0)
        );
    }
}
