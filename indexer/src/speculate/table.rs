//! What is expected where, until when. Pure: time is an argument.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use foldhash::HashMap;
use kvatlas_proto::{BlockKey, SourceId};

use super::message::{Expected, ExpectedChain};
use crate::index::Index;
use crate::matching::SourceMatch;
use crate::query::{Chain, ScoreAnswer, ScoreQuery, ScoreRow};

/// Most requests that are expected at a time: five seconds of 13,000 a second.
const MAX_SPECULATIONS: usize = 65_536;
/// Most keys of all of them together: 64 MB.
const MAX_KEYS: usize = 8_388_608;
/// Most blocks of one: half a megabyte of keys, a message. Longer prompts are expected up to here.
pub(crate) const MAX_BLOCKS: usize = 65_536;
/// Most shapes of keys of one: engines of a model have one, rarely two.
pub(crate) const MAX_CHAINS: usize = 4;
/// Longest time that something is expected, milliseconds.
pub(crate) const MAX_TTL_MS: u32 = 60_000;

/// Too much is expected already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{requests} requests with {keys} block keys are expected at the moment, and the limits are {MAX_SPECULATIONS} and \
     {MAX_KEYS}: give a shorter ttl_ms, or suffixes"
)]
pub(crate) struct FullError {
    requests: usize,
    keys: usize,
}

/// Everything that is expected.
#[derive(Default)]
pub(crate) struct Table {
    entries: HashMap<u64, Entry>,
    by_request: HashMap<String, u64>,
    /// By model and tenant.
    by_scope: HashMap<Arc<(String, String)>, BTreeSet<u64>>,
    /// By when it ends.
    by_end: BTreeSet<(u64, u64)>,
    keys: usize,
    next: u64,
    expired: u64,
}

struct Entry {
    scope: Arc<(String, String)>,
    request: String,
    source: SourceId,
    block_size: u32,
    ends_ms: u64,
    chains: Vec<ExpectedChain>,
}

/// What is expected of one source of a prompt: stretches, ascending.
type Stretches = BTreeMap<(SourceId, u32), Vec<(u32, u32)>>;

// === impl Table ===

impl Table {
    /// Expects this from now on; what was expected of the same request is forgotten. Returns its blocks.
    pub(crate) fn add(&mut self, expected: Expected, now_ms: u64) -> Result<u32, FullError> {
        self.expire(now_ms);
        if let Some(number) = self.by_request.get(&expected.request).copied() {
            self.remove(number);
        }
        let keys: usize = expected.chains.iter().map(|chain| chain.keys.len()).sum();
        if self.entries.len() >= MAX_SPECULATIONS || self.keys + keys > MAX_KEYS {
            return Err(FullError { requests: self.entries.len(), keys: self.keys });
        }
        let number = self.next;
        self.next += 1;
        self.keys += keys;
        let scope = Arc::new((expected.model, expected.tenant));
        let ends_ms = now_ms + u64::from(expected.ttl_ms);
        self.by_request.insert(expected.request.clone(), number);
        self.by_scope.entry(Arc::clone(&scope)).or_default().insert(number);
        self.by_end.insert((ends_ms, number));
        let blocks = expected.chains.iter().map(|chain| chain.keys.len() as u32).max().unwrap_or(0);
        let (request, source, block_size) = (expected.request, expected.source, expected.block_size);
        self.entries
            .insert(number, Entry { scope, request, source, block_size, ends_ms, chains: expected.chains });
        Ok(blocks)
    }

    /// Whether anything is expected of this model and tenant.
    pub(crate) fn has(&mut self, model: &str, tenant: &str, now_ms: u64) -> bool {
        self.expire(now_ms);
        !self.by_scope.is_empty() && self.by_scope.contains_key(&(model.to_owned(), tenant.to_owned()))
    }

    /// How many ended unconfirmed since this was last asked.
    pub(crate) fn take_expired(&mut self) -> u64 {
        std::mem::take(&mut self.expired)
    }

    /// Adds to an answer what is expected beyond what is held. What is held by now is forgotten; returns how many that are.
    pub(crate) fn add_to(
        &mut self,
        index: &Index,
        query: &ScoreQuery<'_>,
        answer: &mut ScoreAnswer,
        now_ms: u64,
    ) -> u64 {
        if !self.has(query.model, query.tenant, now_ms) {
            return 0;
        }
        let chains = index.chains_of(query);
        let (stretches, whole) = self.stretches(query, &chains);
        for ((source, block_size), stretches) in &stretches {
            let at = row_of(index, query, answer, source, *block_size);
            let row = &mut answer.rows[at];
            let held = row.matched.matched_blocks;
            let reach =
                |reach: u32, (start, end): &(u32, u32)| if *start <= reach { reach.max(*end) } else { reach };
            row.speculative_blocks = stretches.iter().fold(held, reach) - held;
            let all = f64::from(query.input.blocks(*block_size).max(1));
            let worth = f64::from(row.speculative_blocks) * query.weights.of(kvatlas_proto::Tier::Gpu) / all;
            row.score = (row.score + worth).min(1.0);
        }
        answer.rows.retain(|row| {
            row.speculative_blocks > 0 || row.matched.matched_blocks > 0 || !query.candidates.is_empty()
        });
        answer.sort();
        let is_held = |(_, source, block_size, end): &(u64, SourceId, u32, u32)| {
            let of = |row: &&ScoreRow| is_row_of(row, source, *block_size);
            answer.rows.iter().find(of).is_some_and(|row| row.matched.matched_blocks >= *end)
        };
        let confirmed: Vec<u64> = whole.iter().filter(|entry| is_held(entry)).map(|entry| entry.0).collect();
        confirmed.iter().for_each(|number| self.remove(*number));
        confirmed.len() as u64
    }

    /// What is expected of the prompt, by source, and what of it is expected no further than the prompt goes.
    #[allow(clippy::type_complexity)]
    fn stretches(
        &self,
        query: &ScoreQuery<'_>,
        chains: &[(u32, Chain)],
    ) -> (Stretches, Vec<(u64, SourceId, u32, u32)>) {
        let (mut found, mut whole) = (Stretches::new(), Vec::new());
        let numbers = self.by_scope.get(&(query.model.to_owned(), query.tenant.to_owned()));
        for number in numbers.into_iter().flatten() {
            let Some(entry) = self.entries.get(number) else { continue };
            let is_asked = |name: &String| *name == entry.source.instance.as_str();
            if !query.candidates.is_empty() && !query.candidates.iter().any(is_asked) {
                continue;
            }
            let asked = chains.iter().filter(|(size, _)| *size == entry.block_size);
            let shared = |(_, chain): &(u32, Chain)| {
                entry.chains.iter().filter_map(|expected| shared(expected, chain)).max_by_key(|range| range.1)
            };
            let Some((start, end)) = asked.filter_map(shared).max_by_key(|range| range.1) else { continue };
            let key = (entry.source.clone(), entry.block_size);
            if entry.chains.iter().all(|chain| chain.first + chain.keys.len() as u32 <= end) {
                whole.push((*number, key.0.clone(), key.1, end));
            }
            found.entry(key).or_default().push((start, end));
        }
        found.values_mut().for_each(|stretches| stretches.sort_unstable());
        (found, whole)
    }

    fn expire(&mut self, now_ms: u64) {
        while let Some((_, number)) = self.by_end.first().copied().filter(|(ends_ms, _)| *ends_ms <= now_ms) {
            self.remove(number);
            self.expired += 1;
        }
    }

    fn remove(&mut self, number: u64) {
        let Some(entry) = self.entries.remove(&number) else { return };
        self.keys -= entry.chains.iter().map(|chain| chain.keys.len()).sum::<usize>();
        self.by_end.remove(&(entry.ends_ms, number));
        self.by_request.remove(&entry.request);
        if let Some(numbers) = self.by_scope.get_mut(&entry.scope) {
            numbers.remove(&number);
            if numbers.is_empty() {
                self.by_scope.remove(&entry.scope);
            }
        }
    }
}

/// The positions at which the prompt has what is expected. A chained key names all before it, so halving finds the end.
fn shared(expected: &ExpectedChain, chain: &Chain) -> Option<(u32, u32)> {
    let base = chain.base.map_or(0, |(_, blocks)| blocks);
    let asked = |at: u32| -> Option<BlockKey> {
        match at.checked_sub(base) {
            Some(at) => chain.keys.get(at as usize).copied(),
            None => chain.base.filter(|(_, blocks)| at + 1 == *blocks).map(|(key, _)| key),
        }
    };
    let first = expected.first.max(base.saturating_sub(1));
    let end = (expected.first + expected.keys.len() as u32).min(base + chain.keys.len() as u32);
    let is_equal = |at: u32| asked(at) == expected.keys.get((at - expected.first) as usize).copied();
    if first >= end || !is_equal(first) {
        return None;
    }
    let (mut equal, mut different) = (first, end);
    while different - equal > 1 {
        let middle = equal + (different - equal) / 2;
        if is_equal(middle) { equal = middle } else { different = middle }
    }
    Some((expected.first, equal + 1))
}

fn is_row_of(row: &ScoreRow, source: &SourceId, block_size: u32) -> bool {
    row.instance == source.instance.as_str() && row.rank == source.rank.0 && row.block_size == block_size
}

/// Position of the source's row; a new one where it holds nothing yet.
fn row_of(
    index: &Index,
    query: &ScoreQuery<'_>,
    answer: &mut ScoreAnswer,
    source: &SourceId,
    block_size: u32,
) -> usize {
    if let Some(at) = answer.rows.iter().position(|row| is_row_of(row, source, block_size)) {
        return at;
    }
    let trust = index.trust_of(query, source, block_size);
    // Somebody whom no event ever named: the row of an unknown candidate is its.
    let unknown = |row: &ScoreRow| {
        row.instance == source.instance.as_str() && row.state.is_none() && source.rank.0 == 0
    };
    if let Some(at) = answer.rows.iter().position(unknown) {
        answer.rows[at].block_size = block_size;
        return at;
    }
    answer.rows.push(ScoreRow {
        instance: source.instance.as_str().to_owned(),
        rank: source.rank.0,
        state: trust.map(|trust| trust.state),
        verified_ms: trust.and_then(|trust| trust.verified_ms),
        block_size,
        score: 0.0,
        matched: SourceMatch { cached_blocks: query.input.tokens().map(|_| 0), ..SourceMatch::default() },
        speculative_blocks: 0,
    });
    answer.rows.len() - 1
}

#[cfg(test)]
mod tests {
    use kvatlas_proto::{DpRank, InstanceId};
    use proptest::prelude::*;

    use super::*;

    fn expected(request: &str, keys: &[u64], ttl_ms: u32) -> Expected {
        Expected {
            request: request.into(),
            model: "m".into(),
            tenant: String::new(),
            source: SourceId { instance: InstanceId::new("a:1").unwrap(), rank: DpRank(0) },
            block_size: 16,
            ttl_ms,
            chains: vec![ExpectedChain { first: 0, keys: keys.iter().copied().map(BlockKey).collect() }],
        }
    }

    #[test]
    fn what_is_expected_ends_by_itself_and_is_counted() {
        let mut table = Table::default();
        assert_eq!(table.add(expected("r", &[1, 2, 3], 100), 0), Ok(3));
        assert!(table.has("m", "", 99));
        assert!(!table.has("m", "", 100));
        assert_eq!((table.take_expired(), table.take_expired(), table.keys), (1, 0, 0));
    }

    #[test]
    fn a_second_call_of_a_request_replaces_the_first() {
        let mut table = Table::default();
        table.add(expected("r", &[1, 2, 3], 100), 0).unwrap();
        table.add(expected("r", &[1], 100), 50).unwrap();
        assert_eq!((table.entries.len(), table.keys), (1, 1));
        assert!(table.has("m", "", 149), "the time is the second one's");
    }

    #[test]
    fn at_the_bound_new_ones_are_refused_and_old_ones_stay() {
        let mut table = Table::default();
        let keys = vec![7; MAX_BLOCKS];
        for n in 0..MAX_KEYS / MAX_BLOCKS {
            table.add(expected(&n.to_string(), &keys, 100), 0).unwrap();
        }
        let error = table.add(expected("more", &[1], 100), 0).unwrap_err();
        assert!(error.to_string().contains("shorter ttl_ms"), "{error}");
        assert_eq!(table.add(expected("more", &[1], 100), 100), Ok(1), "there is room when they have ended");
    }

    proptest! {
        /// Chains that are equal up to some position, seen from any base.
        #[test]
        fn the_shared_stretch_ends_where_the_chains_part(
            common in 0u32..20, more in 0u32..20, asked_more in 0u32..20, first in 0u32..10, base in 0u32..25,
        ) {
            let key = |at: u32, whose: u64| BlockKey(if at < common { u64::from(at) } else { whose + u64::from(at) });
            let expected = ExpectedChain {
                first,
                keys: (first..(common + more).max(first)).map(|at| key(at, 1_000)).collect(),
            };
            let end = (common + asked_more).max(base);
            let chain = Chain {
                variant: None,
                base: (base > 0).then(|| (key(base - 1, 5_000), base)),
                keys: (base..end).map(|at| key(at, 5_000)).collect(),
            };
            // Whoever names a base beyond the common part names another prompt.
            let visible = common.min(first + expected.keys.len() as u32).min(end);
            let expects = (base <= common || base == 0) && visible > first && visible > base.saturating_sub(1);
            let found = shared(&expected, &chain);
            prop_assert_eq!(found, expects.then_some((first, visible)));
        }
    }
}
