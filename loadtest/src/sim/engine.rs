//! A small engine: what is in its device and host memory, and the messages in which it says so.
//!
//! As in vLLM, a request holds its whole prefix while it stores; what has to go for it goes first, in the same message;
//! content after the first miss is computed and stored anew, also if a copy is there; a wholly cached prompt stores its
//! last block a second time. Other than there, [`Engine::evict`] takes any block, so that chains have holes, and a
//! reset empties the host memory too.

use std::collections::{BTreeSet, VecDeque};

use bytes::Bytes;
use kvatlas_proto::Tier;

use super::prompts::{BLOCK_TOKENS, BlockNo, Prompts};
use super::rng::Rng;
use crate::wire::{Batch, BlockRemoved, BlockStored, EngineHash, Event, MapVersion, WireForm};

/// Blocks that one step stores at most: longer prompts take several messages.
const STEP_BLOCKS: usize = 5;
const DEVICE: &str = "GPU";
const HOST: &str = "CPU";

/// What somebody holds: tier and key of every block.
pub(super) type Content = BTreeSet<(Tier, u64)>;

/// One engine.
pub(super) struct Engine {
    device_blocks: usize,
    host_blocks: usize,
    replay_messages: usize,
    /// One entry per physical block, least recently used first.
    device: Vec<BlockNo>,
    /// Oldest first, each once.
    host: VecDeque<BlockNo>,
    next_seq: u64,
    replay: VecDeque<(u64, Bytes)>,
}

// === impl Engine ===

impl Engine {
    pub(super) fn new(device_blocks: usize, host_blocks: usize, replay_messages: usize) -> Self {
        Self {
            device_blocks,
            host_blocks,
            replay_messages,
            device: Vec::new(),
            host: VecDeque::new(),
            next_seq: 0,
            replay: VecDeque::new(),
        }
    }

    /// A request for the first blocks of a prompt. Returns the messages: (sequence, payload).
    pub(super) fn serve(&mut self, prompt: usize, blocks: usize, now_us: u64) -> Vec<(u64, Bytes)> {
        let prompt = Prompts::get().prompt(prompt);
        let wanted = &prompt[..blocks.clamp(1, prompt.len().min(self.device_blocks))];
        let cached = wanted.iter().take_while(|block| self.device.contains(block)).count();
        let hits = cached.min(wanted.len() - 1);
        // Held by the request from here on, out of the evictable ones.
        for block in &wanted[..hits] {
            let at = self.device.iter().position(|held| held == block).expect("it was found above");
            self.device.remove(at);
        }
        let mut held: Vec<BlockNo> = wanted[..hits].to_vec();
        let mut messages = Vec::new();
        for step in wanted[hits..].chunks(STEP_BLOCKS) {
            let mut events = Vec::new();
            while self.device.len() + held.len() + step.len() > self.device_blocks {
                events.push(removed(self.device.remove(0), DEVICE));
            }
            events.push(stored(step));
            held.extend(step);
            messages.push(self.publish(events, now_us));
        }
        // The tail is freed first, so it is evicted before what it builds on.
        self.device.extend(held.into_iter().rev());
        messages
    }

    /// Evicts any blocks.
    pub(super) fn evict(&mut self, blocks: usize, rng: &mut Rng, now_us: u64) -> Vec<(u64, Bytes)> {
        let mut events = Vec::new();
        for _ in 0..blocks.min(self.device.len()) {
            let at = rng.below(self.device.len() as u64) as usize;
            events.push(removed(self.device.remove(at), DEVICE));
        }
        self.publish_some(events, now_us)
    }

    /// Copies blocks of the device to the host's memory.
    pub(super) fn offload(&mut self, blocks: usize, rng: &mut Rng, now_us: u64) -> Vec<(u64, Bytes)> {
        let mut events = Vec::new();
        let mut candidates: Vec<BlockNo> =
            self.device.iter().filter(|block| !self.host.contains(block)).copied().collect();
        candidates.sort_unstable();
        candidates.dedup();
        for _ in 0..blocks.min(candidates.len()).min(self.host_blocks) {
            let at = rng.below(candidates.len() as u64) as usize;
            let block = candidates.swap_remove(at);
            if self.host.len() == self.host_blocks {
                events.extend(self.host.pop_front().map(|oldest| removed(oldest, HOST)));
            }
            self.host.push_back(block);
            events.push(offloaded(block));
        }
        self.publish_some(events, now_us)
    }

    /// Forgets everything.
    pub(super) fn reset(&mut self, now_us: u64) -> Vec<(u64, Bytes)> {
        self.device.clear();
        self.host.clear();
        vec![self.publish(vec![Event::Cleared], now_us)]
    }

    /// Another life: nothing is held, sequences start again.
    pub(super) fn restart(&mut self) {
        *self = Self::new(self.device_blocks, self.host_blocks, self.replay_messages);
    }

    /// What the replay socket answers.
    pub(super) fn replay(&self, from: u64) -> Vec<(u64, Bytes)> {
        self.replay.iter().filter(|(seq, _)| *seq >= from).cloned().collect()
    }

    pub(super) fn has_replay(&self) -> bool {
        self.replay_messages > 0
    }

    /// What is really held.
    pub(super) fn truth(&self) -> Content {
        let prompts = Prompts::get();
        let key = |block: &BlockNo| prompts.block(*block).key.0;
        let device = self.device.iter().map(|block| (Tier::Gpu, key(block)));
        device.chain(self.host.iter().map(|block| (Tier::Cpu, key(block)))).collect()
    }

    fn publish_some(&mut self, events: Vec<Event>, now_us: u64) -> Vec<(u64, Bytes)> {
        if events.is_empty() { Vec::new() } else { vec![self.publish(events, now_us)] }
    }

    fn publish(&mut self, events: Vec<Event>, now_us: u64) -> (u64, Bytes) {
        // The sequence makes messages of one instant differ, as an engine's finer clock would.
        let time_s = 1_700_000_000.0 + (now_us as f64 + self.next_seq as f64 / 1e3) / 1e6;
        let payload = Batch { time_s, events, rank: 0 }.encode(WireForm::Map(MapVersion::V0_33));
        let message = (self.next_seq, Bytes::from(payload));
        self.next_seq += 1;
        if self.has_replay() {
            if self.replay.len() == self.replay_messages {
                self.replay.pop_front();
            }
            self.replay.push_back(message.clone());
        }
        message
    }
}

fn stored(blocks: &[BlockNo]) -> Event {
    let prompts = Prompts::get();
    let of = |number: &BlockNo| prompts.block(*number);
    let parent = blocks.first().and_then(|first| of(first).parent);
    Event::Stored(BlockStored {
        block_hashes: blocks.iter().map(|block| EngineHash::Int(of(block).hash)).collect(),
        parent_block_hash: parent.map(|parent| EngineHash::Int(of(&parent).hash)),
        token_ids: blocks.iter().flat_map(|block| of(block).tokens).collect(),
        block_size: BLOCK_TOKENS,
        medium: Some(DEVICE.to_owned()),
        ..BlockStored::default()
    })
}

/// The offloading connector names neither parent nor tokens. One event per block, so that each can be loaded alone.
fn offloaded(block: BlockNo) -> Event {
    Event::Stored(BlockStored {
        block_hashes: vec![EngineHash::Int(Prompts::get().block(block).hash)],
        medium: Some(HOST.to_owned()),
        ..BlockStored::default()
    })
}

fn removed(block: BlockNo, medium: &str) -> Event {
    Event::Removed(BlockRemoved {
        block_hashes: vec![EngineHash::Int(Prompts::get().block(block).hash)],
        medium: Some(medium.to_owned()),
        ..BlockRemoved::default()
    })
}
