//! A score query against one scope: from keys to rows. Pure: the state is borrowed, nothing is changed.

use std::cell::RefCell;

use foldhash::HashSet;
use kvatlas_proto::keys::{KeyVariant, PromptExtras};
use kvatlas_proto::{BlockKey, GroupKind, InstanceId, KeyHasher};

use crate::bits::Bits;
use crate::engine::Match;
use crate::matching::{HeldBlocks, PromptShape, SourceMatch, TierWeights, match_source};
use crate::scope_index::{OwnerNo, ScopeState, SourceEntry, SourceNo};
use crate::sources::SourceState;

/// Who holds how much of a prompt. Limits were checked by whoever took the request in.
#[derive(Clone, Debug)]
pub struct ScoreQuery<'a> {
    /// Model name.
    pub model: &'a str,
    /// Tenant, empty for the default one.
    pub tenant: &'a str,
    /// Tokens per block. `None`: every block size of the model (token ids only).
    pub block_size: Option<u32>,
    /// The prompt.
    pub input: PromptInput<'a>,
    /// Instances to score. Empty: every instance that holds a leading block.
    pub candidates: &'a [String],
    /// Weight of a block per tier.
    pub weights: TierWeights,
    /// Most rows, best first. `None`: all.
    pub limit: Option<usize>,
}

/// A prompt in one of its three forms.
#[derive(Clone, Debug)]
pub enum PromptInput<'a> {
    /// Token ids and what else enters the keys.
    Tokens {
        /// In prompt order.
        ids: &'a [u32],
        /// LoRA, salt, multimodal items.
        extras: PromptExtras,
    },
    /// Chain keys of the full blocks.
    Keys {
        /// From the first block.
        keys: &'a [u64],
        /// Length of the prompt, where it is known.
        prompt_tokens: Option<u32>,
    },
    /// Chain keys of the blocks after a known one.
    ///
    /// A chained key names everything before it, so a source that holds `base_key` counts as holding all
    /// `base_blocks`: holes before it cannot be seen by such a query. Of a state group only the base's own entry
    /// counts.
    Suffix {
        /// Key of the last block before `keys`.
        base_key: u64,
        /// Number of blocks up to and including the base; at least 1.
        base_blocks: u32,
        /// The blocks that follow.
        keys: &'a [u64],
        /// Key at which the base's segment begins, where the caller knows it: says in which shard the base lies.
        base_segment: Option<u64>,
        /// Length of the prompt, where it is known.
        prompt_tokens: Option<u32>,
    },
}

/// The answer to a [`ScoreQuery`].
#[derive(Clone, Debug, Default)]
pub struct ScoreAnswer {
    /// Best score first, ties by name and rank.
    pub rows: Vec<ScoreRow>,
    /// False if no event ever named the model and tenant.
    pub scope_known: bool,
    /// Full blocks of the prompt at the smallest block size among the rows.
    pub prompt_blocks: u32,
}

/// One instance and rank in an answer.
#[derive(Clone, Debug)]
pub struct ScoreRow {
    /// Instance name, as the candidate was given.
    pub instance: String,
    /// Data-parallel rank.
    pub rank: u32,
    /// `None` for a candidate that no event ever named.
    pub state: Option<SourceState>,
    /// When digests were last equal, on the clock of the index's calls; `None` if they have not been since the content
    /// was last in doubt.
    pub verified_ms: Option<u64>,
    /// Tokens per block; 0 for an unknown candidate.
    pub block_size: u32,
    /// 0 to 1.
    pub score: f64,
    /// Depths per tier.
    pub matched: SourceMatch,
    /// Leading blocks beyond the matched ones that a request which was routed there will bring.
    pub speculative_blocks: u32,
}

/// The keys of a prompt at one block size, in the shape of one variant.
pub(crate) struct Chain {
    /// Which sources it fits; `None` fits all.
    pub(crate) variant: Option<KeyVariant>,
    pub(crate) base: Option<(BlockKey, u32)>,
    pub(crate) keys: Vec<BlockKey>,
}

/// Blocks of one chain by owner.
struct Presence {
    /// By owner number: 0 not met, [`SKIPPED`], or 1 + position in `bits`.
    slots: Vec<u32>,
    bits: Vec<Bits>,
}

thread_local! {
    /// What a walk needs, kept from one query to the next so that nothing is allocated.
    pub(crate) static MATCH: RefCell<Match> = RefCell::default();
}

const SKIPPED: u32 = u32::MAX;
static NOTHING: std::sync::LazyLock<Bits> = std::sync::LazyLock::new(Bits::default);

// === impl ScoreAnswer ===

impl ScoreAnswer {
    /// Puts rows in order: best score first, ties by name and rank.
    pub(crate) fn sort(&mut self) {
        self.rows.sort_by(|a, b| {
            b.score
                .total_cmp(&a.score)
                .then_with(|| a.instance.cmp(&b.instance))
                .then_with(|| (a.rank, a.block_size).cmp(&(b.rank, b.block_size)))
        });
    }
}

// === impl PromptInput ===

impl PromptInput<'_> {
    /// Full blocks at this block size.
    pub(crate) fn blocks(&self, block_size: u32) -> u32 {
        match self {
            Self::Tokens { ids, .. } => (ids.len() / block_size.max(1) as usize) as u32,
            Self::Keys { keys, .. } => keys.len() as u32,
            Self::Suffix { base_blocks, keys, .. } => base_blocks.saturating_add(keys.len() as u32),
        }
    }

    /// The key that says where a suffix's base lies, if it is known.
    pub(crate) fn base_segment(&self) -> Option<BlockKey> {
        match self {
            Self::Suffix { base_segment, .. } => base_segment.map(BlockKey),
            Self::Tokens { .. } | Self::Keys { .. } => None,
        }
    }

    /// Length of the prompt, where it is known.
    pub(crate) fn tokens(&self) -> Option<u64> {
        match self {
            Self::Tokens { ids, .. } => Some(ids.len() as u64),
            Self::Keys { prompt_tokens, .. } | Self::Suffix { prompt_tokens, .. } => {
                prompt_tokens.map(u64::from)
            }
        }
    }

    /// The shape of keys that sources of `variant` use for this prompt. Without multimodal items, offsets of them make
    /// no difference.
    pub(crate) fn effective(&self, variant: KeyVariant) -> KeyVariant {
        match self {
            Self::Tokens { extras, .. } if extras.multimodal.is_empty() => {
                KeyVariant { multimodal_offsets: true, ..variant }
            }
            _ => variant,
        }
    }

    /// One chain per shape of keys that is in use.
    pub(crate) fn chains(&self, hasher: &KeyHasher, block_size: u32, variants: &[KeyVariant]) -> Vec<Chain> {
        let given = |keys: &[u64]| keys.iter().copied().map(BlockKey).collect();
        match self {
            Self::Tokens { ids, extras } => {
                let mut shapes: Vec<_> = variants.iter().map(|variant| self.effective(*variant)).collect();
                shapes.sort_unstable();
                shapes.dedup();
                let chain = |variant| {
                    let mut keys = Vec::new();
                    hasher.chain_into(ids, block_size, extras, variant, &mut keys);
                    Chain { variant: Some(variant), base: None, keys }
                };
                shapes.into_iter().map(chain).collect()
            }
            Self::Keys { keys, .. } => vec![Chain { variant: None, base: None, keys: given(keys) }],
            Self::Suffix { base_key, base_blocks, keys, .. } => {
                let base = Some((BlockKey(*base_key), *base_blocks));
                vec![Chain { variant: None, base, keys: given(keys) }]
            }
        }
    }
}

// === impl Chain ===

impl Chain {
    pub(crate) fn blocks(&self) -> u32 {
        self.base.map_or(0, |(_, blocks)| blocks) + self.keys.len() as u32
    }
}

// === impl ScopeState ===

impl ScopeState {
    /// Appends the rows of this scope.
    ///
    /// With candidates: a row for each rank of each candidate that is known here. Without: a row for each source that
    /// holds a leading block.
    pub(crate) fn score(
        &self,
        query: &ScoreQuery<'_>,
        candidates: &[InstanceId],
        block_size: u32,
        chains: &[Chain],
        rows: &mut Vec<ScoreRow>,
    ) {
        let wanted: HashSet<&InstanceId> = candidates.iter().collect();
        let mut touched = Vec::new();
        let presences: Vec<Presence> = chains
            .iter()
            .map(|chain| {
                let admit = |source: &SourceEntry| {
                    source.tracker.counts()
                        && chain.variant.is_none_or(|shape| shape == query.input.effective(source.variant))
                        && (wanted.is_empty() || wanted.contains(&source.id.instance))
                };
                self.walk(chain, admit, &mut touched)
            })
            .collect();
        let reported: Vec<SourceNo> = if candidates.is_empty() {
            touched.sort_unstable();
            touched.dedup();
            touched
        } else {
            candidates.iter().flat_map(|instance| self.ranks_of(instance)).collect()
        };
        for source in reported.into_iter().filter_map(|no| self.source(no)) {
            let shape = query.input.effective(source.variant);
            let fitting =
                chains.iter().position(|chain| chain.variant.is_none_or(|variant| variant == shape));
            let matched = fitting.map_or_else(SourceMatch::default, |at| {
                let prompt = PromptShape {
                    block_tokens: block_size,
                    blocks: chains[at].blocks(),
                    tokens: query.input.tokens(),
                };
                self.match_one(source, &presences[at], prompt)
            });
            if candidates.is_empty() && matched.matched_blocks == 0 {
                continue;
            }
            rows.push(ScoreRow {
                instance: source.id.instance.as_str().to_owned(),
                rank: source.id.rank.0,
                state: Some(source.tracker.state()),
                verified_ms: source.tracker.verified_ms(),
                block_size,
                score: matched.score(&query.weights, query.input.blocks(block_size)),
                matched,
                speculative_blocks: 0,
            });
        }
    }

    /// Which owners hold which positions of the chain. Stops where no match can go further.
    fn walk(
        &self,
        chain: &Chain,
        admit: impl Fn(&SourceEntry) -> bool,
        touched: &mut Vec<SourceNo>,
    ) -> Presence {
        let mut presence = Presence { slots: vec![0; self.owner_bound()], bits: Vec::new() };
        MATCH.with_borrow_mut(|found| {
            let beyond = !self.runs_only();
            match chain.base {
                Some((key, blocks)) => self.engine.find_after(key, blocks, &chain.keys, beyond, found),
                None if beyond => self.engine.find_beyond(&chain.keys, found),
                None => self.engine.find(&chain.keys, found),
            }
            let base_blocks = chain.base.map_or(0, |(_, blocks)| blocks);
            for run in found.runs() {
                run.each_holder(|owner| {
                    let Some(bits) = presence.of(self, owner, &admit, touched) else { return };
                    // Holding the base's last block says nothing about the states before it.
                    let is_state = base_blocks > 0
                        && self
                            .owner(owner)
                            .is_some_and(|owner| matches!(owner.kind, GroupKind::State { .. }));
                    let start = if is_state { run.start.max(base_blocks - 1) } else { run.start };
                    bits.set_range(start, run.end);
                });
            }
        });
        presence
    }

    fn match_one(&self, source: &SourceEntry, presence: &Presence, prompt: PromptShape) -> SourceMatch {
        let held: Vec<HeldBlocks<'_>> = source
            .owners
            .iter()
            .filter_map(|no| {
                let owner = self.owner(*no)?;
                Some(HeldBlocks {
                    tier: &owner.tier,
                    group: owner.group,
                    kind: owner.kind,
                    blocks: presence.get(*no),
                    load_blocks: owner.load_blocks,
                })
            })
            .collect();
        match_source(&held, prompt)
    }
}

// === impl Presence ===

impl Presence {
    /// The owner's blocks, to be added to; `None` if its source is not asked for.
    fn of(
        &mut self,
        state: &ScopeState,
        no: OwnerNo,
        admit: &impl Fn(&SourceEntry) -> bool,
        touched: &mut Vec<SourceNo>,
    ) -> Option<&mut Bits> {
        let slot = &mut self.slots[no.0 as usize];
        if *slot == 0 {
            // A number without an owner belongs to blocks that are about to be purged.
            let owner = state.owner(no);
            let admitted = owner.filter(|owner| state.source(owner.source).is_some_and(admit));
            *slot = SKIPPED;
            if let Some(owner) = admitted {
                touched.push(owner.source);
                self.bits.push(Bits::default());
                *slot = self.bits.len() as u32;
            }
        }
        if *slot == SKIPPED { None } else { self.bits.get_mut(*slot as usize - 1) }
    }

    fn get(&self, no: OwnerNo) -> &Bits {
        match self.slots.get(no.0 as usize) {
            None | Some(&(0 | SKIPPED)) => &NOTHING,
            Some(slot) => &self.bits[*slot as usize - 1],
        }
    }
}
