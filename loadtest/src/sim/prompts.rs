//! The prompts of all simulations: a few conversations in families that share a beginning, so that engines share
//! blocks and chains fork, inside segments, between two of them and behind some. They are the same for every seed.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use kvatlas_proto::shard::SEGMENT_BLOCKS;
use kvatlas_proto::{BlockKey, KeyHasher, Partition};

use super::rng::Rng;

/// Prompts there are.
pub(super) const PROMPTS: usize = 36;
/// Blocks of the shortest and of the longest: less than a segment, and more than three.
const PROMPT_BLOCKS: (u64, u64) = (20, 100);
/// Tokens per block.
pub(super) const BLOCK_TOKENS: u32 = 4;
/// Prompts of one family: they share a beginning.
const FAMILY: usize = 3;
/// Blocks that the prompts of each family share.
const SHARED_BLOCKS: [usize; PROMPTS / FAMILY] = [3, 33, 5, 64, 4, 32, 40, 6, 70, 31, 7, 20];

/// Number of a block among all there are.
pub(super) type BlockNo = u16;

/// A block with everything before it.
pub(super) struct Block {
    /// The engine's name of it.
    pub(super) hash: u64,
    pub(super) parent: Option<BlockNo>,
    pub(super) key: BlockKey,
    /// The first key of its segment.
    segment: BlockKey,
    pub(super) tokens: [u32; BLOCK_TOKENS as usize],
}

/// All prompts and their blocks.
pub(super) struct Prompts {
    pub(super) blocks: Vec<Block>,
    chains: Vec<Vec<BlockNo>>,
    by_key: BTreeMap<u64, BlockNo>,
}

// === impl Prompts ===

impl Prompts {
    /// The only ones there are.
    pub(super) fn get() -> &'static Self {
        static PROMPTS: OnceLock<Prompts> = OnceLock::new();
        PROMPTS.get_or_init(Self::new)
    }

    fn new() -> Self {
        let hasher = KeyHasher::default();
        let mut rng = Rng::new(0, "prompts", 0);
        let mut all = Self { blocks: Vec::new(), chains: Vec::new(), by_key: BTreeMap::new() };
        for number in 0..PROMPTS {
            let family = number / FAMILY;
            let length = rng.between(PROMPT_BLOCKS.0, PROMPT_BLOCKS.1) as usize;
            let shared = if number % FAMILY == 0 { 0 } else { SHARED_BLOCKS[family].min(length - 1) };
            let first = all.chains.get(family * FAMILY).map_or(&[][..], Vec::as_slice);
            let mut prompt: Vec<BlockNo> = first[..shared.min(first.len())].to_vec();
            while prompt.len() < length {
                let parent = prompt.last().copied();
                let mut tokens = [0; BLOCK_TOKENS as usize];
                tokens.iter_mut().for_each(|token| *token = rng.below(32_000) as u32);
                let before = parent.map_or(hasher.root(), |parent| all.blocks[usize::from(parent)].key);
                let key = hasher.extend(before, hasher.local(&tokens, &[]));
                let segment = match parent {
                    Some(parent) if !prompt.len().is_multiple_of(SEGMENT_BLOCKS as usize) => {
                        all.blocks[usize::from(parent)].segment
                    }
                    _ => key,
                };
                prompt.push(all.blocks.len() as BlockNo);
                all.by_key.insert(key.0, all.blocks.len() as BlockNo);
                all.blocks.push(Block { hash: rng.next(), parent, key, segment, tokens });
            }
            all.chains.push(prompt);
        }
        all
    }

    pub(super) fn block(&self, number: BlockNo) -> &Block {
        &self.blocks[usize::from(number)]
    }

    /// The blocks of a prompt in order.
    pub(super) fn prompt(&self, number: usize) -> &[BlockNo] {
        &self.chains[number]
    }

    /// In which shard a block lies; `None` for one that is in no prompt.
    pub(super) fn shard_of(&self, key: u64, partition: Partition) -> Option<u16> {
        self.by_key.get(&key).map(|block| partition.shard_of(self.block(*block).segment))
    }

    /// The keys of a prompt in order.
    pub(super) fn keys(&self, number: usize) -> Vec<u64> {
        self.chains[number].iter().map(|block| self.block(*block).key.0).collect()
    }
}
