//! The prompts of all simulations: a few conversations in families that share a beginning, so that engines share
//! blocks and chains fork. They are the same for every seed.

use std::sync::OnceLock;

use kvatlas_proto::{BlockKey, KeyHasher};

use super::rng::Rng;

/// Prompts there are.
pub(super) const PROMPTS: usize = 36;
/// Blocks of each.
pub(super) const PROMPT_BLOCKS: usize = 32;
/// Tokens per block.
pub(super) const BLOCK_TOKENS: u32 = 4;
/// Prompts of one family: they share [`SHARED_BLOCKS`] at the beginning, each family one more than the last.
const FAMILY: usize = 3;
const SHARED_BLOCKS: usize = 3;

/// Number of a block among all there are.
pub(super) type BlockNo = u16;

/// A block with everything before it.
pub(super) struct Block {
    /// The engine's name of it.
    pub(super) hash: u64,
    pub(super) parent: Option<BlockNo>,
    pub(super) key: BlockKey,
    pub(super) tokens: [u32; BLOCK_TOKENS as usize],
}

/// All prompts and their blocks.
pub(super) struct Prompts {
    pub(super) blocks: Vec<Block>,
    prompts: Vec<Vec<BlockNo>>,
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
        let mut all = Self { blocks: Vec::new(), prompts: Vec::new() };
        for number in 0..PROMPTS {
            let family = number / FAMILY;
            let shared = if number % FAMILY == 0 { 0 } else { SHARED_BLOCKS + family };
            let mut prompt: Vec<BlockNo> =
                all.prompts.get(family * FAMILY).map_or(&[][..], |first| &first[..shared]).to_vec();
            while prompt.len() < PROMPT_BLOCKS {
                let parent = prompt.last().copied();
                let mut tokens = [0; BLOCK_TOKENS as usize];
                tokens.iter_mut().for_each(|token| *token = rng.below(32_000) as u32);
                let before = parent.map_or(hasher.root(), |parent| all.blocks[usize::from(parent)].key);
                let key = hasher.extend(before, hasher.local(&tokens, &[]));
                prompt.push(all.blocks.len() as BlockNo);
                all.blocks.push(Block { hash: rng.next(), parent, key, tokens });
            }
            all.prompts.push(prompt);
        }
        all
    }

    pub(super) fn block(&self, number: BlockNo) -> &Block {
        &self.blocks[usize::from(number)]
    }

    /// The blocks of a prompt in order.
    pub(super) fn prompt(&self, number: usize) -> &[BlockNo] {
        &self.prompts[number]
    }

    /// The keys of a prompt in order.
    pub(super) fn keys(&self, number: usize) -> Vec<u64> {
        self.prompts[number].iter().map(|block| self.block(*block).key.0).collect()
    }
}
