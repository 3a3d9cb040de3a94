//! From a query to rows: which scopes it is about, whom they know, and what was found there.

use std::collections::BTreeSet;
use std::sync::Arc;

use kvatlas_proto::{InstanceId, Scope, SourceId};

use super::{BlockSizeMismatch, Index};
use crate::cluster::{Inquiry, ShardAnswer};
use crate::costing::is_store;
use crate::matching::SourceMatch;
use crate::query::{Chain, ScoreAnswer, ScoreQuery, ScoreRow};
use crate::scope_index::ScopeIndex;
use crate::trust::Trust;

/// A scope with the shards of it that are known here.
pub(crate) type KnownScope = (Scope, Vec<Arc<ScopeIndex>>);

/// What a query is about.
pub(crate) struct Subject<'q> {
    /// Scopes whose blocks have the size that was asked for.
    pub(crate) asked: Vec<KnownScope>,
    /// Other scopes of the model and tenant.
    others: Vec<KnownScope>,
    candidates: BTreeSet<&'q str>,
    /// Those of the candidates that can be names of instances at all.
    pub(crate) instances: Vec<InstanceId>,
}

// === impl Index ===

impl Index {
    /// Who holds how much of a prompt, in an index of the whole key space.
    pub fn score(&self, query: &ScoreQuery<'_>) -> Result<ScoreAnswer, BlockSizeMismatch> {
        let subject = self.subject(query)?;
        let (mut rows, keys) = (Vec::new(), Arc::clone(&self.keys.read()));
        for (scope, parts) in subject.looked_up() {
            let size = scope.block_size();
            for part in parts {
                let variants: Vec<_> = part.state.read().variants().collect();
                let chains = query.input.chains(keys.of(query.tenant), size, &variants);
                part.state.read().score(query, &subject.instances, size, &chains, &mut rows);
            }
        }
        Ok(subject.answer(query, rows))
    }

    /// What has to be asked about a query, of whoever owns the shards that it falls into.
    pub fn inquire<'q>(&self, query: &'q ScoreQuery<'_>) -> Result<Inquiry<'q>, BlockSizeMismatch> {
        let subject = self.subject(query)?;
        Ok(Inquiry::new(query, subject, self.partition(), self.keys.read().of(query.tenant)))
    }

    /// The answer to a query from what was found in the shards. `now_ms` is when.
    pub fn conclude(
        &self,
        query: &ScoreQuery<'_>,
        inquiry: Inquiry<'_>,
        answers: &[ShardAnswer],
        now_ms: u64,
    ) -> ScoreAnswer {
        let rows = inquiry.rows(query, answers, now_ms);
        inquiry.into_subject().answer(query, rows)
    }

    /// The keys of a query's prompt, by block size and shape.
    pub(crate) fn chains_of(&self, query: &ScoreQuery<'_>) -> Vec<(u32, Chain)> {
        let keys = Arc::clone(&self.keys.read());
        let mut chains = Vec::new();
        for (scope, parts) in self.scopes_of(query.model, query.tenant) {
            let size = scope.block_size();
            if query.block_size.is_none_or(|asked| asked == size) {
                let mut variants: Vec<_> =
                    parts.iter().flat_map(|part| part.state.read().variants().collect::<Vec<_>>()).collect();
                variants.sort_unstable();
                variants.dedup();
                let of_size = query.input.chains(keys.of(query.tenant), size, &variants);
                chains.extend(of_size.into_iter().map(|chain| (size, chain)));
            }
        }
        chains
    }

    /// How far a source can be trusted in a query's key space of this block size; `None` if it is not known.
    pub(crate) fn trust_of(
        &self,
        query: &ScoreQuery<'_>,
        source: &SourceId,
        block_size: u32,
    ) -> Option<Trust> {
        let scopes = self.scopes_of(query.model, query.tenant);
        let (_, parts) = scopes.iter().find(|(scope, _)| scope.block_size() == block_size)?;
        let ranks = ranks_of(parts, &source.instance);
        ranks.into_iter().find(|(rank, _)| *rank == source.rank.0).map(|(_, trust)| trust)
    }

    /// Names of sources of a model and tenant that are no instances but shared stores, at most `most`.
    pub(crate) fn stores_of(&self, model: &str, tenant: &str, most: usize) -> Vec<String> {
        let mut names = BTreeSet::new();
        for part in self.scopes_of(model, tenant).iter().flat_map(|(_, parts)| parts) {
            let state = part.state.read();
            let stores = state.sources().map(|(_, source)| source.id.instance.as_str());
            names.extend(stores.filter(|name| is_store(name)).map(str::to_owned));
        }
        names.into_iter().take(most).collect()
    }

    fn subject<'q>(&self, query: &'q ScoreQuery<'_>) -> Result<Subject<'q>, BlockSizeMismatch> {
        let of_model = self.scopes_of(query.model, query.tenant);
        let (asked, others): (Vec<_>, Vec<_>) = of_model
            .into_iter()
            .partition(|(scope, _)| query.block_size.is_none_or(|size| scope.block_size() == size));
        if let Some(asked_size) = query.block_size {
            refuse_unused_size(query.model, asked_size, &asked, &others)?;
        }
        let candidates: BTreeSet<&str> = query.candidates.iter().map(String::as_str).collect();
        // A name that is not even valid was never in an event; it stays among the unknown below.
        let instances = candidates.iter().filter_map(|name| InstanceId::new(*name).ok()).collect();
        Ok(Subject { asked, others, candidates, instances })
    }
}

// === impl Subject ===

impl Subject<'_> {
    /// The scopes in which something has to be looked up.
    pub(crate) fn looked_up(&self) -> &[KnownScope] {
        // With candidates of which none is valid there is nothing to look up; an empty list would ask for everybody.
        if self.candidates.is_empty() || !self.instances.is_empty() { &self.asked } else { &[] }
    }

    fn answer(self, query: &ScoreQuery<'_>, mut rows: Vec<ScoreRow>) -> ScoreAnswer {
        self.add_unmatched(&mut rows);
        let sizes = || rows.iter().map(|row| row.block_size).filter(|size| *size > 0);
        let smallest = sizes().min().or_else(|| self.asked.iter().map(|(scope, _)| scope.block_size()).min());
        let prompt_blocks = smallest.or(query.block_size).map_or(0, |size| query.input.blocks(size));
        let scope_known = !self.asked.is_empty() || !self.others.is_empty();
        let mut answer = ScoreAnswer { rows, scope_known, prompt_blocks };
        answer.sort();
        answer.rows.truncate(query.limit.unwrap_or(usize::MAX));
        answer
    }

    /// Rows for candidates without one: known only at another block size, or not at all.
    fn add_unmatched(&self, rows: &mut Vec<ScoreRow>) {
        if self.candidates.is_empty() {
            return;
        }
        let answered: BTreeSet<String> = rows.iter().map(|row| row.instance.clone()).collect();
        for name in self.candidates.iter().filter(|name| !answered.contains(**name)) {
            let before = rows.len();
            let empty = |rank, trust: Option<Trust>, block_size| ScoreRow {
                instance: (*name).to_owned(),
                rank,
                state: trust.map(|trust| trust.state),
                verified_ms: trust.and_then(|trust| trust.verified_ms),
                block_size,
                score: 0.0,
                matched: SourceMatch::default(),
                speculative_blocks: 0,
            };
            if let Ok(instance) = InstanceId::new(*name) {
                for (scope, parts) in &self.others {
                    for (rank, trust) in ranks_of(parts, &instance) {
                        rows.push(empty(rank, Some(trust), scope.block_size()));
                    }
                }
            }
            if rows.len() == before {
                rows.push(empty(0, None, 0));
            }
        }
    }
}

/// The ranks of an instance that any of the shards knows, ascending, and how far each can be trusted in all of them.
pub(crate) fn ranks_of(parts: &[Arc<ScopeIndex>], instance: &InstanceId) -> Vec<(u32, Trust)> {
    let mut ranks: std::collections::BTreeMap<u32, Trust> = std::collections::BTreeMap::new();
    for part in parts {
        let state = part.state.read();
        for source in state.ranks_of(instance).filter_map(|no| state.source(no)) {
            let trust = source.tracker.trust();
            ranks.entry(source.id.rank.0).and_modify(|all| *all = all.and(trust)).or_insert(trust);
        }
    }
    ranks.into_iter().collect()
}

/// Engines count, not memories of engines: a scope without sources refuses nobody.
fn refuse_unused_size(
    model: &str,
    asked_size: u32,
    asked: &[KnownScope],
    others: &[KnownScope],
) -> Result<(), BlockSizeMismatch> {
    let used = |(_, parts): &&KnownScope| parts.iter().any(|part| !part.state.read().is_empty());
    let in_use: Vec<u32> = others.iter().filter(used).map(|(scope, _)| scope.block_size()).collect();
    if in_use.is_empty() || asked.iter().any(|scope| used(&scope)) {
        return Ok(());
    }
    Err(BlockSizeMismatch { model: model.to_owned(), asked: asked_size, in_use })
}
