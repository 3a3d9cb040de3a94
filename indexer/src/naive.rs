//! The obviously right model of the table and of the match rule. Slow on purpose, and kept for ever: it is the oracle
//! that every faster structure is compared with.
//!
//! Nothing here shares code with what it judges.

use std::collections::{HashMap, HashSet};

use kvatlas_proto::{BlockKey, GroupKind};

use crate::engine::Holder;

/// Per owner the set of its keys; nothing else.
#[derive(Clone, Debug, Default)]
pub struct NaiveTable {
    owners: HashMap<Holder, HashSet<BlockKey>>,
}

/// One cache group of a source: what it needs and the keys it holds.
#[derive(Clone, Debug)]
pub struct NaiveGroup {
    /// What the group needs to serve a prefix.
    pub kind: GroupKind,
    /// Keys it holds.
    pub keys: HashSet<BlockKey>,
}

// === impl NaiveTable ===

impl NaiveTable {
    /// `owner` holds `key` from now on. False if it did already.
    pub fn store(&mut self, owner: Holder, key: BlockKey) -> bool {
        self.owners.entry(owner).or_default().insert(key)
    }

    /// `owner` no longer holds `key`. False if it did not.
    pub fn remove(&mut self, owner: Holder, key: BlockKey) -> bool {
        self.owners.get_mut(&owner).is_some_and(|keys| keys.remove(&key))
    }

    /// `owner` holds nothing any more. Returns how many blocks that were.
    pub fn clear(&mut self, owner: Holder) -> usize {
        self.owners.remove(&owner).map_or(0, |keys| keys.len())
    }

    /// True if `owner` holds `key`.
    pub fn holds(&self, owner: Holder, key: BlockKey) -> bool {
        self.owners.get(&owner).is_some_and(|keys| keys.contains(&key))
    }

    /// Number of leading keys of `prompt` that `owner` holds without a hole.
    pub fn match_depth(&self, owner: Holder, prompt: &[BlockKey]) -> usize {
        let mut depth = 0;
        for key in prompt {
            if !self.holds(owner, *key) {
                break;
            }
            depth += 1;
        }
        depth
    }

    /// The keys of `owner`, ascending.
    pub fn sorted_keys(&self, owner: Holder) -> Vec<BlockKey> {
        let mut keys: Vec<_> = self.owners.get(&owner).into_iter().flatten().copied().collect();
        keys.sort_unstable();
        keys
    }
}

/// The longest prefix of `prompt`, in blocks and at most `cap_tokens` long, that all `groups` together can serve: the
/// rule of [`crate::matching`], tried for every length from the longest one down.
pub fn longest_prefix(groups: &[NaiveGroup], prompt: &[BlockKey], block_tokens: u64, cap_tokens: u64) -> u64 {
    if groups.is_empty() || groups.iter().any(|group| group.kind == GroupKind::Unknown) {
        return 0;
    }
    let anchored = groups.iter().any(|group| matches!(group.kind, GroupKind::Full | GroupKind::State { .. }));
    let mut tokens = (prompt.len() as u64 * block_tokens).min(cap_tokens);
    while tokens > 0 {
        if aligned(groups, tokens, block_tokens)
            && groups.iter().all(|group| group.serves(prompt, tokens, block_tokens, anchored))
        {
            return tokens / block_tokens;
        }
        tokens -= 1;
    }
    0
}

/// A prefix ends at a block, and, without a state group, at a block of every window group.
fn aligned(groups: &[NaiveGroup], tokens: u64, block_tokens: u64) -> bool {
    let state = groups.iter().any(|group| matches!(group.kind, GroupKind::State { .. }));
    tokens.is_multiple_of(block_tokens)
        && groups.iter().all(|group| match group.kind {
            GroupKind::SlidingWindow { block_tokens, .. } => {
                state || tokens.is_multiple_of(u64::from(block_tokens))
            }
            _ => true,
        })
}

// === impl NaiveGroup ===

impl NaiveGroup {
    /// `anchored`: the source also has a full or state group; without one, a window must hold at least its last block.
    fn serves(&self, prompt: &[BlockKey], tokens: u64, block_tokens: u64, anchored: bool) -> bool {
        let held_until = |end: u64| {
            end.is_multiple_of(block_tokens)
                && self.keys.contains(&prompt[usize::try_from(end / block_tokens).expect("small") - 1])
        };
        match self.kind {
            GroupKind::Full => (1..=tokens / block_tokens).all(|block| held_until(block * block_tokens)),
            GroupKind::State { .. } => held_until(tokens),
            GroupKind::SlidingWindow { window_tokens, block_tokens: group_tokens } => {
                let need = (u64::from(window_tokens) - 1).div_ceil(u64::from(group_tokens));
                let need = if anchored { need } else { need.max(1) };
                (0..need)
                    .map(|back| back * u64::from(group_tokens))
                    .filter(|back| *back < tokens)
                    .all(|back| held_until(tokens - back))
            }
            GroupKind::Unknown => false,
        }
    }
}
