//! A query that is divided among the shards it falls into, and put together again. Pure.

use std::collections::{BTreeMap, BTreeSet};

use kvatlas_proto::shard::SEGMENT_BLOCKS;
use kvatlas_proto::{CacheGroup, KeyHasher, Partition, SourceId};

use super::answer::{HeldBySource, ShardAnswer};
use super::question::{ChainQuestion, Piece, ShardQuestion};
use crate::bits::Bits;
use crate::index::{Subject, ranks_of};
use crate::matching::{HeldBlocks, PromptShape, SourceMatch, TierName, match_source};
use crate::query::{Chain, PromptInput, ScoreQuery, ScoreRow};
use crate::sources::SourceState;
use crate::trust::Trust;

/// A query and everything that has to be looked up about it.
pub struct Inquiry<'q> {
    subject: Subject<'q>,
    /// What to ask of everybody together.
    question: ShardQuestion,
    /// Blocks of each chain of the question.
    blocks: Vec<u32>,
}

/// How much of a query was answered.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Coverage {
    /// Blocks whose shard has not answered.
    pub missing_blocks: u64,
    /// All blocks that were asked about.
    pub blocks: u64,
}

/// What is known of a source in one chain.
struct Found {
    trust: Trust,
    owners: BTreeMap<(TierName, CacheGroup), FoundOwner>,
}

struct FoundOwner {
    kind: kvatlas_proto::GroupKind,
    load_blocks: u32,
    blocks: Bits,
}

// === impl Coverage ===

impl Coverage {
    /// The share that was answered, 0 to 1.
    pub fn share(self) -> f64 {
        if self.blocks == 0 { 1.0 } else { 1.0 - self.missing_blocks as f64 / self.blocks as f64 }
    }
}

// === impl Inquiry ===

impl<'q> Inquiry<'q> {
    pub(crate) fn new(
        query: &ScoreQuery<'_>,
        subject: Subject<'q>,
        partition: Partition,
        hasher: &KeyHasher,
    ) -> Self {
        let (mut chains, mut blocks) = (Vec::new(), Vec::new());
        for (scope, parts) in subject.looked_up() {
            let size = scope.block_size();
            let mut variants: Vec<_> =
                parts.iter().flat_map(|part| part.state.read().variants().collect::<Vec<_>>()).collect();
            variants.sort_unstable();
            variants.dedup();
            for chain in query.input.chains(hasher, size, &variants) {
                blocks.push(chain.blocks());
                chains.push(ChainQuestion {
                    block_size: size,
                    variant: chain.variant,
                    text_only: query.input.is_text_only(),
                    pieces: cut(&chain, query.input.base_segment(), partition),
                });
            }
        }
        let question = ShardQuestion {
            number: 0,
            model: query.model.to_owned(),
            tenant: query.tenant.to_owned(),
            candidates: subject.instances.iter().map(|name| name.as_str().to_owned()).collect(),
            chains,
        };
        Self { subject, question, blocks }
    }

    pub(crate) fn into_subject(self) -> Subject<'q> {
        self.subject
    }

    /// The shards that have to be asked; all of them if nobody knows where a base lies.
    pub fn shards(&self, partition: Partition) -> Vec<u16> {
        let mut shards: Vec<u16> = if self.is_base_anywhere() {
            (0..partition.shards()).collect()
        } else {
            self.pieces().filter_map(|piece| piece.shard).collect()
        };
        shards.sort_unstable();
        shards.dedup();
        shards
    }

    fn is_base_anywhere(&self) -> bool {
        self.pieces().any(|piece| piece.shard.is_none())
    }

    fn pieces(&self) -> impl Iterator<Item = &Piece> {
        self.question.chains.iter().flat_map(|chain| &chain.pieces)
    }

    /// The part of the question that is about these shards.
    pub fn question(&self, number: u64, asks: impl Fn(u16) -> bool) -> ShardQuestion {
        let chains = self.question.chains.iter().map(|chain| ChainQuestion {
            pieces: chain.pieces.iter().filter(|piece| piece.shard.is_none_or(&asks)).cloned().collect(),
            ..*chain
        });
        ShardQuestion { number, chains: chains.collect(), ..self.question.clone_head() }
    }

    /// How much these answers cover, given the shards that nobody has answered about.
    pub fn coverage(&self, answers: &[ShardAnswer], unanswered: &[u16]) -> Coverage {
        let missing = |shard: u16| {
            unanswered.contains(&shard) || answers.iter().any(|answer| answer.missing.contains(&shard))
        };
        let base_found = answers.iter().any(|answer| answer.base_found);
        let in_doubt = !unanswered.is_empty() || answers.iter().any(|answer| !answer.missing.is_empty());
        let (mut missing_blocks, mut blocks) = (0, 0);
        for piece in self.pieces() {
            let own = piece.keys.len() as u64 + piece.base.map_or(0, |_| u64::from(piece.first));
            blocks += own;
            // A base that nobody who answered has may be in a shard that did not answer.
            if piece.shard.map_or(in_doubt && !base_found, missing) {
                missing_blocks += own;
            }
        }
        Coverage { missing_blocks, blocks }
    }

    /// One row per source that holds something, or that is asked for and known.
    pub(crate) fn rows(&self, query: &ScoreQuery<'_>, answers: &[ShardAnswer], now_ms: u64) -> Vec<ScoreRow> {
        let mut found: BTreeMap<(usize, SourceId), Found> = BTreeMap::new();
        for held in answers.iter().flat_map(|answer| &answer.held) {
            let chain = usize::from(held.chain);
            if chain < self.blocks.len() {
                let trust = trust_of(held, now_ms);
                let source = found.entry((chain, held.source.clone()));
                source.or_insert_with(|| Found { trust, owners: BTreeMap::new() }).add(held, trust);
            }
        }
        let doubts = Doubts::new(answers);
        let (mut rows, mut named) = (Vec::new(), BTreeSet::new());
        for ((chain, source), found) in found {
            let block_size = self.question.chains[chain].block_size;
            let matched = found.matched(PromptShape {
                block_tokens: block_size,
                blocks: self.blocks[chain],
                tokens: query.input.tokens(),
            });
            if matched.matched_blocks == 0 && query.candidates.is_empty() {
                continue;
            }
            let trust = doubts.applied(&source, block_size, found.trust);
            rows.push(row(&source, block_size, trust, matched, query));
            named.insert((source, block_size));
        }
        for (scope, parts) in self.subject.looked_up() {
            for instance in &self.subject.instances {
                for (rank, trust) in ranks_of(parts, instance) {
                    let source = SourceId { instance: instance.clone(), rank: kvatlas_proto::DpRank(rank) };
                    if !named.contains(&(source.clone(), scope.block_size())) {
                        let trust = doubts.applied(&source, scope.block_size(), trust);
                        let cached_blocks = query.input.tokens().map(|_| 0);
                        let nothing = SourceMatch { cached_blocks, ..SourceMatch::default() };
                        rows.push(row(&source, scope.block_size(), trust, nothing, query));
                    }
                }
            }
        }
        rows
    }
}

/// A chain as the pieces that lie together.
fn cut(chain: &Chain, base_segment: Option<kvatlas_proto::BlockKey>, partition: Partition) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let (mut at, mut rest) = (0, &chain.keys[..]);
    if let Some((base, blocks)) = chain.base {
        // The blocks that follow the base in its segment lie where the base does.
        let room = (SEGMENT_BLOCKS - blocks % SEGMENT_BLOCKS) % SEGMENT_BLOCKS;
        let (beside, after) = rest.split_at(rest.len().min(room as usize));
        let shard = base_segment.map(|first| partition.shard_of(first));
        pieces.push(Piece { shard, first: blocks, base: Some(base), keys: beside.to_vec() });
        (at, rest) = (blocks + beside.len() as u32, after);
    }
    for segment in rest.chunks(SEGMENT_BLOCKS as usize) {
        let shard = Some(partition.shard_of(segment[0]));
        pieces.push(Piece { shard, first: at, base: None, keys: segment.to_vec() });
        at += segment.len() as u32;
    }
    pieces
}

fn trust_of(held: &HeldBySource, now_ms: u64) -> Trust {
    let verified_ms = held.verified_age_ms.map(|age| now_ms.saturating_sub(u64::from(age)));
    Trust { state: held.state, verified_ms }
}

fn row(
    source: &SourceId,
    block_size: u32,
    trust: Trust,
    matched: SourceMatch,
    query: &ScoreQuery<'_>,
) -> ScoreRow {
    ScoreRow {
        instance: source.instance.as_str().to_owned(),
        rank: source.rank.0,
        state: Some(trust.state),
        verified_ms: trust.verified_ms,
        block_size,
        score: matched.score(&query.weights, query.input.blocks(block_size)),
        matched,
        speculative_blocks: 0,
    }
}

/// The worst that any answer says of a source.
struct Doubts<'a>(BTreeMap<(&'a SourceId, u32), SourceState>);

// === impl Doubts ===

impl<'a> Doubts<'a> {
    fn new(answers: &'a [ShardAnswer]) -> Self {
        let mut worst: BTreeMap<(&SourceId, u32), SourceState> = BTreeMap::new();
        for doubt in answers.iter().flat_map(|answer| &answer.doubtful) {
            let state = worst.entry((&doubt.source, doubt.block_size)).or_insert(doubt.state);
            *state = state.worse(doubt.state);
        }
        Self(worst)
    }

    fn applied(&self, source: &SourceId, block_size: u32, trust: Trust) -> Trust {
        match self.0.get(&(source, block_size)) {
            Some(state) => Trust { state: trust.state.worse(*state), ..trust },
            None => trust,
        }
    }
}

// === impl Found ===

impl Found {
    fn add(&mut self, held: &HeldBySource, trust: Trust) {
        self.trust = self.trust.and(trust);
        for owner in &held.owners {
            let name = (TierName::new(owner.owner.tier, &owner.owner.medium), owner.owner.group);
            let found = self.owners.entry(name).or_insert_with(|| FoundOwner {
                kind: owner.owner.kind,
                load_blocks: owner.owner.load_blocks,
                blocks: Bits::default(),
            });
            owner.ranges.iter().for_each(|(start, end)| found.blocks.set_range(*start, *end));
        }
    }

    fn matched(&self, prompt: PromptShape) -> SourceMatch {
        let held: Vec<HeldBlocks<'_>> = self
            .owners
            .iter()
            .map(|((tier, group), owner)| HeldBlocks {
                tier,
                group: *group,
                kind: owner.kind,
                blocks: &owner.blocks,
                load_blocks: owner.load_blocks,
            })
            .collect();
        match_source(&held, prompt)
    }
}

// === impl PromptInput ===

impl PromptInput<'_> {
    /// Whether there is nothing in it that sources may shape differently.
    fn is_text_only(&self) -> bool {
        matches!(self, Self::Tokens { extras, .. } if extras.multimodal.is_empty())
    }
}

// === impl ShardQuestion ===

impl ShardQuestion {
    fn clone_head(&self) -> Self {
        Self {
            number: self.number,
            model: self.model.clone(),
            tenant: self.tenant.clone(),
            candidates: self.candidates.clone(),
            chains: Vec::new(),
        }
    }
}
