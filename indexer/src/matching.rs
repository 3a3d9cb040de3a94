//! How much of a prompt one source can serve, and what that is worth. Pure: presence in, depths out.
//!
//! The rule. A source has cache groups; a prefix of L tokens can be served if every group accepts L:
//!
//! * a full group holds every block up to L;
//! * a sliding-window group holds its last `ceil((window - 1) / group block)` blocks that end at L, as far as they
//!   start after the prompt's beginning; the key of a group's block is the scope's chain key at its end;
//! * a state group holds the entry that ends exactly at L;
//! * a group of unknown kind accepts nothing: it fails closed.
//!
//! L is a multiple of the alignment: the least common multiple of the scope's block and the window groups' blocks, or
//! the scope's block alone if there is a state group. The match is the longest such L. A window group whose blocks
//! are not whole multiples of the scope's block has boundaries without a key; what has no key is not held.
//!
//! One case goes beyond that rule: a source with window groups only and a window of one token would "hold" every
//! prompt. Without a full or a state group a window must hold at least the block that ends at L.
//!
//! "Any tier" means the union of the tiers per group: an engine can load each block from where it lies.

use std::sync::Arc;

use kvatlas_proto::{CacheGroup, GroupKind, Tier};
use smallvec::SmallVec;

use crate::bits::Bits;

/// A tier as answers name it: the known ones are one each, unknown media stay apart by name. Ordered fastest first.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TierName {
    tier: Tier,
    /// Empty unless the tier is unknown.
    medium: Arc<str>,
}

/// What one owner (tier and cache group) of the source holds of the prompt.
#[derive(Clone, Copy, Debug)]
pub struct HeldBlocks<'a> {
    /// Where.
    pub tier: &'a TierName,
    /// Which cache group.
    pub group: CacheGroup,
    /// What the group needs to serve a prefix, as this owner said.
    pub kind: GroupKind,
    /// Positions in the prompt, in scope blocks.
    pub blocks: &'a Bits,
    /// Consecutive blocks that can only be loaded together, aligned to the prompt's start; at least 1.
    pub load_blocks: u32,
}

/// The prompt, as far as matching needs it.
#[derive(Clone, Copy, Debug)]
pub struct PromptShape {
    /// Tokens per block of the scope; not 0.
    pub block_tokens: u32,
    /// Blocks that have a key.
    pub blocks: u32,
    /// Length of the prompt, tokens, where it is known.
    pub tokens: Option<u64>,
}

/// How much of the prompt one source can serve.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceMatch {
    /// Leading blocks that can be served from any tier.
    pub matched_blocks: u32,
    /// The same where at least one token of the prompt must be left to compute; `None` if its length is not known.
    pub cached_blocks: Option<u32>,
    /// One entry per tier that holds a leading block, fastest first.
    pub tiers: Vec<TierMatch>,
}

/// The part of one tier in a [`SourceMatch`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TierMatch {
    /// Which tier.
    pub tier: TierName,
    /// Leading blocks that this tier alone can serve.
    pub matched_blocks: u32,
    /// Of [`SourceMatch::matched_blocks`], those for which this is the fastest tier that has them.
    pub best_blocks: u32,
    /// Of [`SourceMatch::matched_blocks`], those that are here: first block and the one after the last, ascending.
    pub runs: Runs,
}

/// Stretches of a prompt; nearly always one.
pub type Runs = SmallVec<[(u32, u32); 1]>;

/// Worth of a block per tier, relative to a block on the GPU. An unknown tier is worth 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TierWeights {
    gpu: f64,
    cpu: f64,
    ssd: f64,
    remote: f64,
}

/// A weight was not a number from 0 to 1, or the tier cannot have one.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum WeightError {
    /// Out of range.
    #[error("weight {weight} of tier {} is out of range: give 0 to 1", tier.name())]
    Range {
        /// Which tier.
        tier: Tier,
        /// What was given.
        weight: f64,
    },
    /// Unknown media always weigh 0.
    #[error("tier unknown cannot have a weight: it always weighs 0; name gpu, cpu, ssd or remote")]
    UnknownTier,
}

/// A block on the device: nothing to load.
pub const DEFAULT_WEIGHT_GPU: f64 = 1.0;
/// A block in host memory: one copy over PCIe, a small part of computing it.
pub const DEFAULT_WEIGHT_CPU: f64 = 0.8;
/// A block on a local disk: a read and a copy; worth about half of computing it.
pub const DEFAULT_WEIGHT_SSD: f64 = 0.5;
/// A block in a remote store: the network is shared, so its worth is the least certain.
pub const DEFAULT_WEIGHT_REMOTE: f64 = 0.3;

/// One cache group with its presence in the tiers that are looked at.
struct Group {
    number: CacheGroup,
    kind: GroupKind,
    blocks: Bits,
}

type Groups = SmallVec<[Group; 2]>;

// === impl TierName ===

impl TierName {
    /// `medium` is kept for an unknown tier only: two engines may name a known tier differently.
    pub fn new(tier: Tier, medium: &str) -> Self {
        Self { tier, medium: if tier == Tier::Unknown { medium.into() } else { "".into() } }
    }

    /// Which tier.
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// The engine's name of an unknown medium, else empty.
    pub fn medium(&self) -> &str {
        &self.medium
    }
}

// === impl TierWeights ===

impl Default for TierWeights {
    fn default() -> Self {
        Self {
            gpu: DEFAULT_WEIGHT_GPU,
            cpu: DEFAULT_WEIGHT_CPU,
            ssd: DEFAULT_WEIGHT_SSD,
            remote: DEFAULT_WEIGHT_REMOTE,
        }
    }
}

impl TierWeights {
    /// A block is worth the same in every known tier.
    pub(crate) const EQUAL: Self = Self { gpu: 1.0, cpu: 1.0, ssd: 1.0, remote: 1.0 };

    /// The same weights with another one for `tier`.
    pub fn with(mut self, tier: Tier, weight: f64) -> Result<Self, WeightError> {
        if !(0.0..=1.0).contains(&weight) {
            return Err(WeightError::Range { tier, weight });
        }
        *match tier {
            Tier::Gpu => &mut self.gpu,
            Tier::Cpu => &mut self.cpu,
            Tier::Ssd => &mut self.ssd,
            Tier::Remote => &mut self.remote,
            Tier::Unknown => return Err(WeightError::UnknownTier),
        } = weight;
        Ok(self)
    }

    /// Weight of `tier`, 0 to 1.
    pub fn of(&self, tier: Tier) -> f64 {
        match tier {
            Tier::Gpu => self.gpu,
            Tier::Cpu => self.cpu,
            Tier::Ssd => self.ssd,
            Tier::Remote => self.remote,
            Tier::Unknown => 0.0,
        }
    }
}

// === impl SourceMatch ===

impl SourceMatch {
    /// Weighted share of the prompt's full blocks that need not be computed, 0 to 1.
    pub fn score(&self, weights: &TierWeights, prompt_blocks: u32) -> f64 {
        if prompt_blocks == 0 {
            return 0.0;
        }
        let worth: f64 =
            self.tiers.iter().map(|tier| f64::from(tier.best_blocks) * weights.of(tier.tier.tier())).sum();
        // The sum of nothing is minus zero.
        (worth + 0.0) / f64::from(prompt_blocks)
    }
}

/// Matches a prompt against everything one source holds of it.
///
/// `held` must name every owner of the source, those without a block of the prompt included: a group that holds
/// nothing still has to accept.
pub fn match_source(held: &[HeldBlocks<'_>], prompt: PromptShape) -> SourceMatch {
    let any = groups(held, None);
    let matched = longest(&any, prompt.block_tokens, prompt.blocks);
    let cached_blocks = prompt.tokens.map(|tokens| {
        let cap = tokens.saturating_sub(1) / u64::from(prompt.block_tokens);
        match u32::try_from(cap) {
            // A shorter prefix is not always served by the groups that serve a longer one: a window may have moved on.
            Ok(cap) if cap < matched => longest(&any, prompt.block_tokens, cap),
            _ => matched,
        }
    });
    SourceMatch { matched_blocks: matched, cached_blocks, tiers: match_tiers(held, &any, matched, prompt) }
}

fn match_tiers(held: &[HeldBlocks<'_>], any: &Groups, matched: u32, prompt: PromptShape) -> Vec<TierMatch> {
    let mut names: SmallVec<[&TierName; 4]> = held.iter().map(|owner| owner.tier).collect();
    names.sort_unstable();
    names.dedup();
    let reference = reference_group(any);
    let (mut covered, mut left) = (Bits::default(), matched);
    let mut last_block_tier = None;
    let mut tiers = Vec::with_capacity(names.len());
    for name in names {
        let alone = groups(held, Some(name));
        let matched_blocks = longest(&alone, prompt.block_tokens, prompt.blocks);
        let (mut best_blocks, mut runs) = (0, Runs::new());
        if let Some(group) = reference.and_then(|number| alone.iter().find(|group| group.number == number)) {
            best_blocks = group.blocks.count_new(&covered, matched);
            runs.extend(group.blocks.runs(matched));
            covered.union(&group.blocks);
            left -= best_blocks;
            if last_block_tier.is_none() && matched > 0 && group.blocks.get(matched - 1) {
                last_block_tier = Some(tiers.len());
            }
        }
        tiers.push(TierMatch { tier: name.clone(), matched_blocks, best_blocks, runs });
    }
    // Without a full group, blocks before a window or a state are not held by anybody and need not be: the tier that
    // serves the prefix's end serves them too.
    if let Some(at) = last_block_tier {
        tiers[at].best_blocks += left;
        if left > 0 {
            tiers[at].runs = Runs::from_slice(&[(0, matched)]);
        }
    }
    tiers.retain(|tier| tier.matched_blocks > 0 || tier.best_blocks > 0);
    tiers
}

/// The group whose blocks say where a block lies: the first full one, else the first with a state, else the first. So
/// it holds the last block of whatever matches (a tiny window may hold nothing, but only beside one of the others).
fn reference_group(groups: &Groups) -> Option<CacheGroup> {
    let preference = |group: &&Group| match group.kind {
        GroupKind::Full => 0,
        GroupKind::State { .. } => 1,
        GroupKind::SlidingWindow { .. } | GroupKind::Unknown => 2,
    };
    groups.iter().min_by_key(preference).map(|group| group.number)
}

/// Every group of the source in ascending order, with its presence in one tier or in all.
///
/// What a group needs is a property of the group, not of the tier: the owners that know it say it. If they disagree,
/// or none knows, the group is unknown. Blocks of an owner that does not know it never count.
fn groups(held: &[HeldBlocks<'_>], only: Option<&TierName>) -> Groups {
    let mut groups = Groups::new();
    for owner in held {
        let at = match groups.binary_search_by_key(&owner.group, |group| group.number) {
            Ok(at) => at,
            Err(at) => {
                let kind = agreed_kind(held, owner.group);
                groups.insert(at, Group { number: owner.group, kind, blocks: Bits::default() });
                at
            }
        };
        if owner.kind != GroupKind::Unknown && only.is_none_or(|tier| tier == owner.tier) {
            match owner.load_blocks {
                0 | 1 => groups[at].blocks.union(owner.blocks),
                chunk => groups[at].blocks.union(&owner.blocks.whole_chunks(chunk)),
            }
        }
    }
    groups
}

fn agreed_kind(held: &[HeldBlocks<'_>], group: CacheGroup) -> GroupKind {
    let known = |owner: &&HeldBlocks<'_>| owner.group == group && owner.kind != GroupKind::Unknown;
    let mut kinds = held.iter().filter(known).map(|owner| owner.kind);
    match kinds.next() {
        Some(first) if kinds.all(|kind| kind == first) => first,
        _ => GroupKind::Unknown,
    }
}

/// The longest prefix, in blocks and at most `cap`, that every group accepts.
fn longest(groups: &Groups, block_tokens: u32, cap: u32) -> u32 {
    if groups.is_empty() || groups.iter().any(|group| group.kind == GroupKind::Unknown) {
        return 0;
    }
    let full = groups.iter().filter(|group| group.kind == GroupKind::Full);
    let limit = full.map(|group| group.blocks.leading_run()).min().unwrap_or(cap).min(cap);
    if groups.iter().all(|group| group.kind == GroupKind::Full) {
        return limit;
    }
    longest_of_hybrid(groups, block_tokens, limit)
}

fn longest_of_hybrid(groups: &Groups, block_tokens: u32, limit: u32) -> u32 {
    let Some(step) = alignment_blocks(groups, block_tokens) else { return 0 };
    let anchored = groups.iter().any(|group| matches!(group.kind, GroupKind::Full | GroupKind::State { .. }));
    let windows: SmallVec<[WindowRuns; 2]> = groups
        .iter()
        .filter_map(|group| match group.kind {
            GroupKind::SlidingWindow { window_tokens, block_tokens: group_tokens } => {
                let need = window_tokens.saturating_sub(1).div_ceil(group_tokens);
                let need = if anchored { need } else { need.max(1) };
                Some(WindowRuns::new(group, need, group_tokens, block_tokens, limit))
            }
            _ => None,
        })
        .collect();
    let accepted = |blocks: u32| {
        windows.iter().all(|window| window.accepts(blocks))
            && groups
                .iter()
                .all(|group| !matches!(group.kind, GroupKind::State { .. }) || group.blocks.get(blocks - 1))
    };
    let mut blocks = limit - limit % step;
    while blocks > 0 && !accepted(blocks) {
        blocks -= step;
    }
    blocks
}

/// The alignment in scope blocks; `None` if it does not fit any prompt.
fn alignment_blocks(groups: &Groups, block_tokens: u32) -> Option<u32> {
    let mut alignment = u64::from(block_tokens);
    for group in groups {
        match group.kind {
            GroupKind::State { .. } => return Some(1),
            GroupKind::SlidingWindow { block_tokens: group_tokens, .. } => {
                alignment = lcm(alignment, u64::from(group_tokens))?;
            }
            _ => {}
        }
    }
    u32::try_from(alignment / u64::from(block_tokens)).ok()
}

fn lcm(a: u64, b: u64) -> Option<u64> {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    // A group block of 0 tokens is refused when the frame is parsed, so x is not 0.
    (a / x).checked_mul(b)
}

/// For each prefix length, how many consecutive blocks of a window group end there.
struct WindowRuns {
    /// By prefix length in scope blocks; entry 0 is not used.
    runs: Vec<u32>,
    /// Group blocks that must be there.
    need: u32,
    group_tokens: u32,
    block_tokens: u32,
}

impl WindowRuns {
    fn new(group: &Group, need: u32, group_tokens: u32, block_tokens: u32, limit: u32) -> Self {
        // Where the group's blocks are not whole multiples of the scope's, the boundary before has no key: no run is
        // longer than its last block.
        let step =
            if group_tokens.is_multiple_of(block_tokens) { group_tokens / block_tokens } else { u32::MAX };
        let mut runs = vec![0; limit as usize + 1];
        for end in 1..=limit {
            if group.blocks.get(end - 1) {
                runs[end as usize] = 1 + if end > step { runs[(end - step) as usize] } else { 0 };
            }
        }
        Self { runs, need, group_tokens, block_tokens }
    }

    fn accepts(&self, blocks: u32) -> bool {
        // Group blocks that end after the prompt's beginning; before it nothing is needed.
        let tokens = u64::from(blocks) * u64::from(self.block_tokens);
        let ends = tokens.div_ceil(u64::from(self.group_tokens));
        u64::from(self.runs[blocks as usize]) >= u64::from(self.need).min(ends)
    }
}

#[cfg(test)]
#[path = "matching_tests.rs"]
mod tests;
