//! Answers a question from the shards that are here.

use foldhash::{HashMap, HashSet};
use kvatlas_proto::frame::FrameOwner;
use kvatlas_proto::keys::{KEY_VERSION, KeyVariant};
use kvatlas_proto::{GroupKind, InstanceId, Scope, ShardId, SourceId};

use super::answer::{Doubt, HeldByOwner, HeldBySource, ShardAnswer};
use super::question::{ChainQuestion, Piece, ShardQuestion};
use crate::index::Index;
use crate::query::MATCH;
use crate::scope_index::{OwnerEntry, OwnerNo, ScopeState, SourceEntry, SourceNo};

/// Most sources that an answer names as doubtful; beyond that, an index that is in such doubt is not ready anyway.
const MAX_DOUBTFUL: usize = 4_096;

// === impl Index ===

impl Index {
    /// What is held of a question's pieces. `serves` says of which shards this server speaks.
    pub fn look_up(
        &self,
        question: &ShardQuestion,
        serves: impl Fn(ShardId) -> bool,
        now_ms: u64,
    ) -> ShardAnswer {
        let mut answer = ShardAnswer::default();
        let wanted: HashSet<InstanceId> =
            question.candidates.iter().filter_map(|name| InstanceId::new(name.as_str()).ok()).collect();
        for (number, chain) in question.chains.iter().enumerate() {
            let Ok(scope) = Scope::new(&*question.model, &*question.tenant, chain.block_size, KEY_VERSION)
            else {
                continue;
            };
            let mut found = Found::default();
            for (shard, pieces) in self.by_shard(chain) {
                if !serves(shard) {
                    // Nobody expects this very server to have a base.
                    answer
                        .missing
                        .extend(pieces.iter().any(|piece| piece.shard.is_some()).then_some(shard.number()));
                    continue;
                }
                let Some(part) = self.part(&scope, shard) else { continue };
                let state = part.state.read();
                let asked = Asked { number: number as u16, chain, wanted: &wanted, now_ms };
                state.held(&asked, &pieces, &mut found, &mut answer);
            }
            answer.held.append(&mut found.in_order());
        }
        answer.missing.sort_unstable();
        answer.missing.dedup();
        answer
    }

    /// The pieces that have to be looked for in each shard, in ascending order.
    fn by_shard<'q>(&self, chain: &'q ChainQuestion) -> Vec<(ShardId, Vec<&'q Piece>)> {
        let anywhere: Vec<&Piece> = chain.pieces.iter().filter(|piece| piece.shard.is_none()).collect();
        let mut shards: Vec<u16> = if anywhere.is_empty() {
            chain.pieces.iter().filter_map(|piece| piece.shard).collect()
        } else {
            self.partition().all().map(ShardId::number).collect()
        };
        shards.sort_unstable();
        shards.dedup();
        let of = |shard: u16| {
            let here = chain.pieces.iter().filter(|piece| piece.shard == Some(shard));
            anywhere.iter().copied().chain(here).collect()
        };
        shards.into_iter().map(|shard| (self.partition().shard(shard), of(shard))).collect()
    }
}

/// What is asked of one chain.
struct Asked<'q> {
    number: u16,
    chain: &'q ChainQuestion,
    wanted: &'q HashSet<InstanceId>,
    now_ms: u64,
}

/// What was found of one chain, in all shards together.
#[derive(Default)]
struct Found {
    held: Vec<HeldBySource>,
    by_source: HashMap<SourceId, usize>,
}

// === impl Found ===

impl Found {
    /// The source's entry, made if there is none, and how far the source can be trusted in this shard too.
    fn of(&mut self, source: &SourceEntry, asked: &Asked<'_>) -> &mut HeldBySource {
        let state = source.tracker.state();
        let age = source.tracker.verified_ms().map(|at| asked.now_ms.saturating_sub(at));
        let verified_age_ms = age.map(|age| u32::try_from(age).unwrap_or(u32::MAX - 1));
        if let Some(at) = self.by_source.get(&source.id) {
            let held = &mut self.held[*at];
            held.state = held.state.worse(state);
            held.verified_age_ms = held.verified_age_ms.zip(verified_age_ms).map(|(a, b)| a.max(b));
            return held;
        }
        let at = self.held.len();
        self.by_source.insert(source.id.clone(), at);
        let (chain, source) = (asked.number, source.id.clone());
        self.held.push(HeldBySource { chain, source, state, verified_age_ms, owners: Vec::new() });
        &mut self.held[at]
    }

    /// Everything, with the stretches of each owner as the prompt has them.
    fn in_order(mut self) -> Vec<HeldBySource> {
        for owner in self.held.iter_mut().flat_map(|held| &mut held.owners) {
            owner.ranges.sort_unstable();
            owner.ranges.dedup_by(|next, last| {
                let overlaps = next.0 <= last.1;
                last.1 = if overlaps { last.1.max(next.1) } else { last.1 };
                overlaps
            });
        }
        self.held
    }
}

// === impl HeldBySource ===

impl HeldBySource {
    /// Adds what an owner holds in one more shard.
    fn add(&mut self, owner: &OwnerEntry, mut ranges: Vec<(u32, u32)>) {
        let is_it = |held: &HeldByOwner| {
            held.owner.tier == owner.tier.tier()
                && held.owner.group == owner.group
                && held.owner.medium == *owner.medium
        };
        match self.owners.iter_mut().find(|held| is_it(held)) {
            Some(held) => held.ranges.append(&mut ranges),
            None => self.owners.push(HeldByOwner {
                owner: FrameOwner {
                    tier: owner.tier.tier(),
                    medium: owner.medium.to_string(),
                    group: owner.group,
                    kind: owner.kind,
                    load_blocks: owner.load_blocks,
                },
                ranges,
            }),
        }
    }
}

// === impl Asked ===

impl Asked<'_> {
    fn admits(&self, source: &SourceEntry) -> bool {
        let text_only = self.chain.text_only;
        let shape = if text_only {
            KeyVariant { multimodal_offsets: true, ..source.variant }
        } else {
            source.variant
        };
        self.chain.variant.is_none_or(|variant| variant == shape)
            && (self.wanted.is_empty() || self.wanted.contains(&source.id.instance))
    }
}

// === impl ScopeState ===

impl ScopeState {
    /// Adds who holds what of these pieces, and whom not to rely on.
    fn held(&self, asked: &Asked<'_>, pieces: &[&Piece], found: &mut Found, answer: &mut ShardAnswer) {
        let mut here: HashMap<OwnerNo, Vec<(u32, u32)>> = HashMap::default();
        let mut admitted: HashMap<OwnerNo, bool> = HashMap::default();
        MATCH.with_borrow_mut(|matched| {
            for piece in pieces {
                let (keys, beyond) = (&piece.keys, !self.runs_only());
                match piece.base {
                    Some(base) => self.engine.find_after(base, piece.first, keys, beyond, matched),
                    None if beyond => self.engine.find_beyond(keys, matched),
                    None => self.engine.find(keys, matched),
                }
                let offset = if piece.base.is_some() { 0 } else { piece.first };
                answer.base_found |= piece.base.is_some() && matched.runs().next().is_some();
                for run in matched.runs() {
                    run.each_holder(|no| {
                        let counts = *admitted.entry(no).or_insert_with(|| {
                            // A number without an owner belongs to blocks that are about to be purged.
                            let source = self.owner(no).and_then(|owner| self.source(owner.source));
                            source.is_some_and(|source| source.tracker.counts() && asked.admits(source))
                        });
                        if !counts {
                            return;
                        }
                        let is_state =
                            self.owner(no).is_some_and(|owner| matches!(owner.kind, GroupKind::State { .. }));
                        // Holding the base's last block says nothing about the states before it.
                        let start = match piece.base {
                            Some(_) if is_state => run.start.max(piece.first - 1),
                            _ => run.start,
                        };
                        let (start, end) = (start + offset, run.end + offset);
                        let ranges = here.entry(no).or_default();
                        match ranges.last_mut().filter(|last| last.1 == start) {
                            Some(last) => last.1 = end,
                            None if start < end => ranges.push((start, end)),
                            None => {}
                        }
                    });
                }
            }
        });
        let mut touched: Vec<SourceNo> =
            here.keys().filter_map(|no| self.owner(*no)).map(|owner| owner.source).collect();
        touched.sort_unstable();
        touched.dedup();
        for source in touched.into_iter().filter_map(|no| self.source(no)) {
            let held = found.of(source, asked);
            for no in &source.owners {
                if let Some(owner) = self.owner(*no) {
                    held.add(owner, here.remove(no).unwrap_or_default());
                }
            }
        }
        self.add_doubtful(asked, answer);
    }

    fn add_doubtful(&self, asked: &Asked<'_>, answer: &mut ShardAnswer) {
        for source in self.doubtful().filter(|source| asked.admits(source)) {
            if answer.doubtful.len() < MAX_DOUBTFUL {
                let (id, state) = (source.id.clone(), source.tracker.state());
                answer.doubtful.push(Doubt { source: id, block_size: asked.chain.block_size, state });
            }
        }
    }
}
