//! What an index says about itself: refusals, sources, owners, sizes.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use kvatlas_proto::{CacheGroup, Digest, Epoch, FrameSeq, GroupKind, OwnerRef, Scope, ShardId, SourceId};

use super::PartId;
use crate::matching::TierName;
use crate::scope_index::{OwnerNo, ScopeIndex};
use crate::sources::{Expiry, SourceState};

/// A frame was refused because a bound was reached and it would have needed something new.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitReached {
    /// No room for another scope.
    #[error(
        "the index has {bound} scopes already, so frames of {scope} are refused: raise the limit of scopes"
    )]
    Scopes {
        /// The refused scope.
        scope: Scope,
        /// The limit.
        bound: usize,
    },
    /// The frame is of a shard that this index does not own.
    #[error("frames of shard {shard} of {scope} are not for this server")]
    Shard {
        /// The scope of the frame.
        scope: Scope,
        /// Its shard.
        shard: ShardId,
    },
    /// No room for another source.
    #[error(
        "scope {scope} has {bound} sources already, so frames of {source_id} are refused: raise the limit of sources"
    )]
    Sources {
        /// Where.
        scope: Scope,
        /// The refused source.
        source_id: SourceId,
        /// The limit.
        bound: usize,
    },
}

/// The question names a block size that no engine of the model and tenant uses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no engine of model {model:?} uses blocks of {asked} tokens; block sizes in use: {}. Ask with one of these, or \
     with token ids and without a block size",
    in_use.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
)]
pub struct BlockSizeMismatch {
    /// Which model.
    pub model: String,
    /// What was asked for, tokens.
    pub asked: u32,
    /// What there is, tokens, ascending.
    pub in_use: Vec<u32>,
}

/// A source whose lease ended, or that was dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expired {
    /// In which scope.
    pub scope: Scope,
    /// In which shard of it.
    pub shard: ShardId,
    /// Who.
    pub source: SourceId,
    /// What happened.
    pub expiry: Expiry,
}

/// Which sources and owners to list or dump; what is `None` matches all.
#[derive(Clone, Debug, Default)]
pub struct OwnerFilter {
    /// Model and tenant.
    pub model: Option<(String, String)>,
    /// Instance.
    pub instance: Option<String>,
    /// Tokens per block.
    pub block_size: Option<u32>,
    /// Only what is known in this shard: then everything that is said of a source is of its sequence there.
    pub shard: Option<ShardId>,
}

/// One source as it is now.
#[derive(Clone, Debug)]
pub struct SourceInfo {
    /// Its scope.
    pub scope: Scope,
    /// Instance and rank.
    pub source: SourceId,
    /// The newest epoch heard of.
    pub epoch: Option<Epoch>,
    /// The last frame that was applied; of several shards', the one that is furthest behind.
    pub applied_seq: Option<FrameSeq>,
    /// How far it can be trusted.
    pub state: SourceState,
    /// Milliseconds since digests were last equal; `None` if they have not been since the content was last in doubt.
    pub verified_age_ms: Option<u64>,
    /// Milliseconds since the last frame that proved life.
    pub silent_ms: u64,
    /// What it holds.
    pub owners: Vec<OwnerInfo>,
}

/// One owner of a source as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnerInfo {
    /// Where the blocks lie.
    pub tier: TierName,
    /// The engine's name of the medium.
    pub medium: String,
    /// Cache group.
    pub group: CacheGroup,
    /// What the group needs.
    pub kind: GroupKind,
    /// Blocks held.
    pub blocks: usize,
    /// Their digest.
    pub digest: Digest,
}

/// An owner whose keys can be read with [`Index::keys_of`].
#[derive(Clone, Debug)]
pub struct DumpOwner {
    /// Its scope.
    pub scope: Scope,
    /// Who it is.
    pub owner: OwnerRef,
    /// Its number in each shard.
    pub(super) parts: Vec<(Arc<ScopeIndex>, OwnerNo)>,
}

/// Sizes of an index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IndexTotals {
    /// Key spaces.
    pub scopes: usize,
    /// Owners.
    pub owners: usize,
    /// Blocks, counted once per owner.
    pub blocks: usize,
    /// Different blocks, counted once per scope.
    pub distinct_blocks: usize,
    /// Bytes of the tables that hold them.
    pub engine_bytes: usize,
    /// Sources by state.
    pub sources: BTreeMap<SourceState, usize>,
    /// Longest time since digests were equal, over the sources that count, milliseconds; 0 if none counts, `None` if one
    /// was never compared.
    pub verified_age_ms: Option<u64>,
}

// === impl OwnerFilter ===

impl OwnerFilter {
    pub(super) fn admits_part(&self, (scope, shard): &PartId) -> bool {
        self.shard.is_none_or(|only| only == *shard)
            && self
                .model
                .as_ref()
                .is_none_or(|(model, tenant)| scope.model() == model && scope.tenant() == tenant)
            && self.block_size.is_none_or(|size| scope.block_size() == size)
    }

    pub(super) fn admits_source(&self, source: &SourceId) -> bool {
        self.instance.as_ref().is_none_or(|instance| source.instance.as_str() == instance)
    }
}

/// Puts together what the shards say of each source.
pub(super) fn merge_sources(parts: Vec<SourceInfo>) -> Vec<SourceInfo> {
    let mut merged: BTreeMap<(Scope, SourceId), SourceInfo> = BTreeMap::new();
    for part in parts {
        match merged.entry((part.scope.clone(), part.source.clone())) {
            Entry::Vacant(entry) => _ = entry.insert(part),
            Entry::Occupied(entry) => entry.into_mut().add(part),
        }
    }
    let mut sources: Vec<_> = merged.into_values().collect();
    for source in &mut sources {
        source.owners.sort_by(|a, b| a.name().cmp(&b.name()));
    }
    sources
}

// === impl SourceInfo ===

impl SourceInfo {
    /// The same source in another shard.
    pub(crate) fn add(&mut self, other: Self) {
        self.epoch = self.epoch.max(other.epoch);
        self.applied_seq = self.applied_seq.min(other.applied_seq);
        self.state = self.state.worse(other.state);
        self.verified_age_ms = self.verified_age_ms.zip(other.verified_age_ms).map(|(a, b)| a.max(b));
        self.silent_ms = self.silent_ms.max(other.silent_ms);
        for owner in other.owners {
            match self.owners.iter_mut().find(|known| known.name() == owner.name()) {
                Some(known) => {
                    known.blocks += owner.blocks;
                    known.digest = known.digest.and(owner.digest);
                }
                None => self.owners.push(owner),
            }
        }
    }
}

// === impl OwnerInfo ===

impl OwnerInfo {
    fn name(&self) -> (&TierName, &str, CacheGroup) {
        (&self.tier, &self.medium, self.group)
    }
}
