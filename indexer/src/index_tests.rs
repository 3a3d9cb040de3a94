use std::collections::{HashMap, HashSet};

use kvatlas_proto::Tier;
use kvatlas_proto::frame::{FramePart, SourceHealth};
use kvatlas_proto::keys::{KeyVariant, MultimodalItem, PromptExtras};
use proptest::prelude::*;

use super::*;
use crate::frames::{Op, Publisher, owner};
use crate::matching::TierWeights;
use crate::naive::{NaiveGroup, longest_prefix};
use crate::query::PromptInput;
use crate::sources::{DegradedReason, FORGET_MS, LEASE_MS};

fn index() -> Index {
    Index::new(IndexLimits::default(), KeySeed::PUBLISHED)
}

fn small(limits: impl FnOnce(&mut IndexLimits)) -> Index {
    let mut small = IndexLimits::default();
    limits(&mut small);
    Index::new(small, KeySeed::PUBLISHED)
}

fn send(index: &Index, publisher: &mut Publisher, ops: &[Op]) -> Applied {
    send_at(index, publisher, ops, 0)
}

fn send_at(index: &Index, publisher: &mut Publisher, ops: &[Op], now_ms: u64) -> Applied {
    let bytes = publisher.frame(ops);
    let applied = index.apply(&FrameView::parse(&bytes).unwrap(), now_ms).unwrap();
    assert_eq!(index.check(), Ok(()));
    applied
}

fn by_keys<'a>(model: &'a str, keys: &'a [u64]) -> ScoreQuery<'a> {
    ScoreQuery {
        model,
        tenant: "",
        block_size: Some(16),
        input: PromptInput::Keys { keys, prompt_tokens: None },
        candidates: &[],
        weights: TierWeights::default(),
        limit: None,
    }
}

fn by_tokens(ids: &[u32], extras: PromptExtras) -> ScoreQuery<'_> {
    ScoreQuery { block_size: None, input: PromptInput::Tokens { ids, extras }, ..by_keys("m", &[]) }
}

/// (instance, rank, matched blocks)
fn depths(index: &Index, query: &ScoreQuery<'_>) -> Vec<(String, u32, u32)> {
    let rows = index.score(query).unwrap().rows;
    rows.into_iter().map(|row| (row.instance, row.rank, row.matched.matched_blocks)).collect()
}

fn depth(index: &Index, model: &str, keys: &[u64]) -> u32 {
    depths(index, &by_keys(model, keys)).first().map_or(0, |row| row.2)
}

#[test]
fn stored_blocks_are_found_and_removed_ones_are_not() {
    let (index, mut a) = (index(), Publisher::new("m", "a:1"));
    let applied = send(&index, &mut a, &[Op::Stored(0, vec![1, 2, 3])]);
    assert_eq!((applied.verdict, applied.stored, applied.before), (Verdict::NewEpoch, 3, None));
    assert_eq!(depth(&index, "m", &[1, 2, 3, 4]), 3);
    let applied = send(&index, &mut a, &[Op::Removed(0, vec![2, 9])]);
    assert_eq!(applied.removed, 1, "a block that was not there is not counted");
    assert_eq!(depth(&index, "m", &[1, 2, 3, 4]), 1);
}

#[test]
fn clearing_an_owner_leaves_the_other_tiers() {
    let (index, mut a) = (index(), Publisher::new("m", "a:1"));
    send(&index, &mut a, &[Op::Stored(0, vec![1, 2, 3]), Op::Stored(1, vec![1, 2])]);
    let applied = send(&index, &mut a, &[Op::Cleared(0), Op::Stored(0, vec![1])]);
    assert_eq!((applied.removed, applied.stored), (3, 1));
    let rows = index.score(&by_keys("m", &[1, 2, 3])).unwrap().rows;
    assert_eq!(rows[0].matched.matched_blocks, 2);
    assert_eq!(index.totals().blocks, 3);
}

#[test]
fn a_new_epoch_starts_empty() {
    let (index, mut a) = (index(), Publisher::new("m", "a:1"));
    send(&index, &mut a, &[Op::Stored(0, vec![1, 2, 3])]);
    let applied = send(&index, a.epoch(2), &[Op::Stored(0, vec![1])]);
    assert_eq!((applied.verdict, applied.removed), (Verdict::NewEpoch, 3));
    assert_eq!(depth(&index, "m", &[1, 2, 3]), 1);
}

#[test]
fn a_gap_keeps_the_entries_marks_the_source_and_asks_once() {
    let (index, mut a) = (index(), Publisher::new("m", "a:1"));
    send(&index, &mut a, &[Op::Stored(0, vec![1, 2])]);
    let _lost = a.frame(&[Op::Removed(0, vec![2])]);
    let applied = send(&index, &mut a, &[Op::Stored(0, vec![3])]);
    assert!(applied.request_resync);
    assert_eq!(applied.after, SourceState::Degraded(DegradedReason::FramesLost));
    assert!(!send(&index, &mut a, &[]).request_resync, "the second gap within a second asks nobody");
    assert_eq!(depth(&index, "m", &[1, 2, 3]), 2);
}

#[test]
fn a_new_epoch_whose_start_was_missed_holds_nothing() {
    let (index, mut a) = (index(), Publisher::new("m", "a:1"));
    send(&index, &mut a, &[Op::Stored(0, vec![1, 2])]);
    a.epoch(2).frame(&[]);
    let applied = send(&index, &mut a, &[Op::Stored(0, vec![1])]);
    assert!(matches!(applied.verdict, Verdict::NewEpochGap { .. }) && applied.request_resync);
    assert_eq!(depth(&index, "m", &[1, 2]), 0);
}

#[test]
fn a_large_snapshot_and_its_removal_keep_the_counts() {
    let (index, mut a) = (index(), Publisher::new("m", "a:1"));
    a.header.part = FramePart::Snapshot;
    for piece in 0..3u64 {
        send(&index, &mut a, &[Op::Stored(0, (piece * 20_000..(piece + 1) * 20_000).collect())]);
    }
    assert_eq!(index.totals().blocks, 60_000);
    let applied = send(&index, a.epoch(2), &[]);
    assert_eq!((applied.removed, index.totals().blocks, index.totals().distinct_blocks), (60_000, 0, 0));
    assert_eq!(index.totals().owners, 3);
}

#[test]
fn a_gone_source_is_known_but_does_not_count_and_is_dropped_later() {
    let (index, mut a) = (index(), Publisher::new("m", "a:1"));
    send(&index, &mut a, &[Op::Stored(0, vec![1, 2])]);
    assert!(index.tick(LEASE_MS).is_empty());
    let expired = index.tick(LEASE_MS + 1);
    assert_eq!(expired.iter().map(|e| e.expiry).collect::<Vec<_>>(), [Expiry::Gone]);
    assert!(depths(&index, &by_keys("m", &[1, 2])).is_empty());
    let candidates = ["a:1".to_owned()];
    let asked = ScoreQuery { candidates: &candidates, ..by_keys("m", &[1, 2]) };
    let rows = index.score(&asked).unwrap().rows;
    assert_eq!((rows[0].state, rows[0].score), (Some(SourceState::Gone), 0.0));

    // The next frame in sequence takes it back.
    send_at(&index, &mut a, &[], LEASE_MS + 2);
    assert_eq!(depth(&index, "m", &[1, 2]), 2);

    let later = 10 * FORGET_MS;
    index.tick(later);
    assert_eq!(index.tick(later + 1).iter().map(|e| e.expiry).collect::<Vec<_>>(), [Expiry::Dropped]);
    assert_eq!(index.check(), Ok(()));
    assert_eq!((index.totals().blocks, index.totals().owners), (0, 0));
    assert!(index.score(&asked).unwrap().scope_known, "an event did name it once");
    assert_eq!(index.score(&asked).unwrap().rows[0].state, None);
}

#[test]
fn a_source_that_starts_an_epoch_in_another_scope_leaves_the_first() {
    let index = index();
    let (mut old, mut new) = (Publisher::new("old", "a:1"), Publisher::new("new", "a:1"));
    send(&index, &mut old, &[Op::Stored(0, vec![1])]);
    send(&index, new.epoch(2), &[Op::Stored(0, vec![1])]);
    assert_eq!((depth(&index, "old", &[1]), depth(&index, "new", &[1])), (0, 1));
}

#[test]
fn scopes_and_tenants_never_mix() {
    let index = index();
    let mut sources = [
        Publisher::new("m", "default:1"),
        Publisher::new("m", "tenant:1").scope("blue", 16),
        Publisher::new("other", "other:1"),
        Publisher::new("m", "large:1").scope("", 32),
    ];
    for source in &mut sources {
        send(&index, source, &[Op::Stored(0, vec![1])]);
    }
    let names = |query: &ScoreQuery<'_>| -> Vec<String> {
        depths(&index, query).into_iter().map(|row| row.0).collect()
    };
    assert_eq!(names(&by_keys("m", &[1])), ["default:1"]);
    assert_eq!(names(&ScoreQuery { tenant: "blue", ..by_keys("m", &[1]) }), ["tenant:1"]);
    assert_eq!(names(&by_keys("other", &[1])), ["other:1"]);
    assert_eq!(names(&ScoreQuery { block_size: Some(32), ..by_keys("m", &[1]) }), ["large:1"]);
    // A candidate of another tenant is as unknown as one that does not exist.
    let candidates = ["tenant:1".to_owned()];
    let rows = index.score(&ScoreQuery { candidates: &candidates, ..by_keys("m", &[1]) }).unwrap().rows;
    assert_eq!(rows[0].state, None);
}

#[test]
fn a_prompt_of_tokens_is_asked_at_every_block_size() {
    let index = index();
    let tokens: Vec<u32> = (0..64).collect();
    let keys = |size| KeyHasher::default().chain(&tokens, size).iter().map(|key| key.0).collect::<Vec<_>>();
    send(&index, &mut Publisher::new("m", "a:1"), &[Op::Stored(0, keys(16)[..3].to_vec())]);
    send(&index, &mut Publisher::new("m", "b:1").scope("", 32), &[Op::Stored(0, keys(32))]);
    let answer = index.score(&by_tokens(&tokens, PromptExtras::default())).unwrap();
    let rows: Vec<_> =
        answer.rows.iter().map(|row| (row.instance.as_str(), row.block_size, row.score)).collect();
    assert_eq!(rows, [("b:1", 32, 1.0), ("a:1", 16, 0.75)]);
    assert_eq!(answer.prompt_blocks, 4);
    assert_eq!(answer.rows[0].matched.cached_blocks, Some(1));
}

#[test]
fn a_block_size_that_nobody_uses_is_refused_and_names_the_others() {
    let index = index();
    assert!(index.score(&by_keys("m", &[1])).is_ok(), "nothing is known about an unknown scope");
    send(&index, &mut Publisher::new("m", "a:1").scope("", 32), &[Op::Stored(0, vec![1])]);
    send(&index, &mut Publisher::new("m", "b:1").scope("", 64), &[Op::Stored(0, vec![1])]);
    let error = index.score(&by_keys("m", &[1])).unwrap_err();
    assert_eq!(error.in_use, [32, 64]);
    assert!(error.to_string().contains("16") && error.to_string().contains("32, 64"), "{error}");
}

#[test]
fn a_candidate_of_another_block_size_is_known_and_matches_nothing() {
    let index = index();
    send(&index, &mut Publisher::new("m", "a:1"), &[Op::Stored(0, vec![1])]);
    send(&index, &mut Publisher::new("m", "b:1").scope("", 32), &[Op::Stored(0, vec![1])]);
    let candidates = ["b:1".to_owned(), "c:1".to_owned(), "not valid".to_owned(), "b:1".to_owned()];
    let rows = index.score(&ScoreQuery { candidates: &candidates, ..by_keys("m", &[1]) }).unwrap().rows;
    let rows: Vec<_> = rows.iter().map(|r| (r.instance.as_str(), r.state.is_some(), r.block_size)).collect();
    assert_eq!(rows, [("b:1", true, 32), ("c:1", false, 0), ("not valid", false, 0)]);
}

#[test]
fn each_rank_is_a_row_and_ties_are_by_name_and_rank() {
    let index = index();
    for (name, rank) in [("b:1", 0), ("a:1", 2), ("a:1", 10), ("a:1", 1)] {
        send(&index, &mut Publisher::new("m", name).rank(rank), &[Op::Stored(0, vec![1])]);
    }
    let rows = depths(&index, &by_keys("m", &[1]));
    let order: Vec<_> = rows.iter().map(|row| (row.0.as_str(), row.1)).collect();
    assert_eq!(order, [("a:1", 1), ("a:1", 2), ("a:1", 10), ("b:1", 0)]);
    let limited = index.score(&ScoreQuery { limit: Some(2), ..by_keys("m", &[1]) }).unwrap();
    assert_eq!(limited.rows.len(), 2);
}

#[test]
fn a_suffix_counts_its_base_as_held_by_whoever_holds_the_base_key() {
    let index = index();
    send(&index, &mut Publisher::new("m", "a:1"), &[Op::Stored(0, vec![1, 2, 3, 4])]);
    send(&index, &mut Publisher::new("m", "b:1"), &[Op::Stored(0, vec![1, 2, 4])]);
    let suffix = |base_key, keys: &'static [u64]| ScoreQuery {
        input: PromptInput::Suffix { base_key, base_blocks: 3, keys, prompt_tokens: Some(90) },
        ..by_keys("m", &[])
    };
    assert_eq!(depths(&index, &suffix(3, &[4, 5])), [("a:1".to_owned(), 0, 4)]);
    assert_eq!(depths(&index, &suffix(3, &[])), [("a:1".to_owned(), 0, 3)]);
    assert_eq!(index.score(&suffix(3, &[4, 5])).unwrap().prompt_blocks, 5);
}

#[test]
fn each_source_is_matched_with_the_keys_of_its_own_variant() {
    let index = index();
    let tokens: Vec<u32> = (0..64).collect();
    let image = MultimodalItem { identifier: "sha".into(), offset: 4, length: 20 };
    let extras = PromptExtras { multimodal: vec![image], ..PromptExtras::default() };
    let variants = [
        ("offsets:1", KeyVariant::default()),
        ("plain:1", KeyVariant { multimodal_offsets: false, lookahead_tokens: 0 }),
        ("ahead:1", KeyVariant { multimodal_offsets: true, lookahead_tokens: 1 }),
    ];
    for (name, variant) in variants {
        let mut publisher = Publisher::new("m", name);
        publisher.header.variant = variant;
        let chain = |extras: &PromptExtras| {
            let mut keys = Vec::new();
            KeyHasher::default().chain_into(&tokens, 16, extras, variant, &mut keys);
            keys.into_iter().map(|key| key.0).collect::<Vec<_>>()
        };
        let (image, text) = (chain(&extras), chain(&PromptExtras::default()));
        send(&index, &mut publisher, &[Op::Stored(0, image), Op::Stored(0, text)]);
    }
    let expected = [("offsets:1", 4), ("plain:1", 4), ("ahead:1", 3)];
    for extras in [extras, PromptExtras::default()] {
        let mut rows = depths(&index, &by_tokens(&tokens, extras));
        rows.sort_by_key(|row| std::cmp::Reverse(row.0.clone()));
        for (name, blocks) in expected {
            assert!(rows.iter().any(|row| row.0 == name && row.2 == blocks), "{name} in {rows:?}");
        }
    }
}

#[test]
fn a_source_without_a_full_group_is_followed_over_blocks_nobody_holds() {
    let index = index();
    let window = GroupKind::SlidingWindow { window_tokens: 32, block_tokens: 16 };
    let mut a = Publisher::new("m", "a:1").owners(vec![owner(Tier::Gpu, 0, window)]);
    send(&index, &mut a, &[Op::Stored(0, vec![5, 6])]);
    assert_eq!(depth(&index, "m", &[1, 2, 3, 4, 5, 6, 7]), 6);
}

#[test]
fn health_of_the_publisher_is_the_state() {
    let (index, mut a) = (index(), Publisher::new("m", "a:1"));
    a.header.health = SourceHealth::JoinedLate;
    let applied = send(&index, &mut a, &[Op::Stored(0, vec![1])]);
    assert_eq!(applied.after, SourceState::Degraded(DegradedReason::JoinedLate));
}

#[test]
fn at_the_bound_of_scopes_an_empty_one_makes_room_and_others_stay() {
    let index = small(|limits| limits.scopes = 1);
    send(&index, &mut Publisher::new("one", "a:1"), &[]);
    let frame = Publisher::new("two", "b:1").frame(&[]);
    let refused = index.apply(&FrameView::parse(&frame).unwrap(), 0).unwrap_err();
    assert!(matches!(refused, LimitReached::Scopes { bound: 1, .. }));
    index.tick(LEASE_MS + 1);
    index.tick(FORGET_MS + 1);
    send(&index, &mut Publisher::new("two", "b:1"), &[]);
}

#[test]
fn at_the_bound_of_sources_new_ones_are_refused() {
    let index = small(|limits| limits.sources_per_scope = 1);
    let mut a = Publisher::new("m", "a:1");
    send(&index, &mut a, &[]);
    let frame = Publisher::new("m", "b:1").frame(&[]);
    let refused = index.apply(&FrameView::parse(&frame).unwrap(), 0).unwrap_err();
    assert!(refused.to_string().contains("b:1#0"), "{refused}");
    assert_eq!(send(&index, &mut a, &[]).verdict, Verdict::Apply);
}

#[test]
fn at_the_bound_of_blocks_new_ones_are_refused_and_the_source_says_so() {
    let index = small(|limits| limits.blocks = 3);
    let mut a = Publisher::new("m", "a:1");
    let applied = send(&index, &mut a, &[Op::Stored(0, vec![1, 2, 3, 4, 5])]);
    assert_eq!((applied.stored, applied.refused_blocks), (3, 2));
    assert_eq!(applied.after, SourceState::Degraded(DegradedReason::OverLimit));
    let applied = send(&index, &mut a, &[Op::Stored(0, vec![1, 2, 3])]);
    assert_eq!(applied.refused_blocks, 0, "what is held already needs no room");
    send(&index, &mut a, &[Op::Removed(0, vec![1])]);
    assert_eq!(send(&index, &mut a, &[Op::Stored(0, vec![9])]).refused_blocks, 0);
    assert_eq!(send(&index, a.epoch(2), &[Op::Stored(0, vec![7, 8, 9])]).after, SourceState::Live);
}

#[test]
fn at_the_bound_of_owners_their_blocks_are_refused_and_the_source_says_so() {
    let index = small(|limits| limits.owners = 2);
    let mut a = Publisher::new("m", "a:1");
    let applied = send(&index, &mut a, &[Op::Stored(0, vec![1]), Op::Stored(2, vec![1])]);
    assert_eq!((applied.refused_owners, applied.refused_blocks, applied.stored), (1, 1, 1));
    assert_eq!(applied.after, SourceState::Degraded(DegradedReason::OverLimit));
}

#[test]
fn dump_and_list_show_the_same_owners_and_all_keys() {
    let index = index();
    let mut a = Publisher::new("m", "a:1");
    send(&index, &mut a, &[Op::Stored(0, vec![9, 3, 7]), Op::Stored(2, vec![3])]);
    send(&index, &mut Publisher::new("m", "b:1"), &[Op::Stored(1, vec![1])]);
    let filter = OwnerFilter {
        model: Some(("m".into(), String::new())),
        instance: Some("a:1".into()),
        ..OwnerFilter::default()
    };
    let sources = index.sources(&filter, 5);
    assert_eq!(sources.len(), 1);
    assert_eq!((sources[0].silent_ms, sources[0].applied_seq), (5, Some(FrameSeq(0))));
    let listed: Vec<_> = sources[0].owners.iter().map(|o| (o.medium.as_str(), o.blocks)).collect();
    assert_eq!(listed, [("GPU", 3), ("CPU", 0), ("STORAGE", 1)]);
    let dump = index.dump(&filter);
    let dumped: Vec<_> = dump.iter().map(|o| (o.owner.medium.as_str(), index.keys_of(o))).collect();
    assert_eq!(dumped, [("GPU", vec![3, 7, 9]), ("CPU", vec![]), ("STORAGE", vec![3])]);

    // Between listing and reading, the owner's number went to somebody else.
    send(&index, a.epoch(2), &[]);
    assert!(index.keys_of(&dump[0]).is_empty());
}

#[test]
fn a_seed_of_the_operator_separates_indexes() {
    let secret = Index::new(IndexLimits::default(), KeySeed::secret(7));
    let tokens: Vec<u32> = (0..32).collect();
    let keys: Vec<u64> =
        KeyHasher::new(KeySeed::secret(7)).chain(&tokens, 16).iter().map(|key| key.0).collect();
    for index in [&secret, &index()] {
        send(index, &mut Publisher::new("m", "a:1"), &[Op::Stored(0, keys.clone())]);
    }
    assert_eq!(depths(&secret, &by_tokens(&tokens, PromptExtras::default())).len(), 1);
}

#[test]
fn queries_beside_changes_never_see_a_moving_block_in_neither_tier() {
    let (index, mut a) = (index(), Publisher::new("m", "a:1"));
    // More than a slice, so that emptied owners are taken out of the table in pieces.
    let keys: Vec<u64> = (0..10_000).collect();
    send(&index, &mut a, &[Op::Stored(0, keys.clone())]);
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|threads| {
        let readers: Vec<_> = (0..2)
            .map(|_| {
                threads.spawn(|| {
                    while !done.load(std::sync::atomic::Ordering::Relaxed) {
                        assert_eq!(depth(&index, "m", &keys), 10_000);
                    }
                })
            })
            .collect();
        for round in 0..30u8 {
            let (from, to) = (round % 2, (round + 1) % 2);
            send(&index, &mut a, &[Op::Cleared(from), Op::Stored(to, keys.clone())]);
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        for reader in readers {
            reader.join().expect("a reader saw a hole");
        }
    });
    assert_eq!(index.totals().blocks, 10_000);
}

const NAMES: [&str; 3] = ["a:1", "b:1", "c:1"];

#[derive(Clone, Debug)]
enum Step {
    Frame(usize, Vec<Op>),
    Lose(usize),
    NewEpoch(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let keys = || proptest::collection::vec(1u64..14, 1..8);
    let op = prop_oneof![
        5 => (0u8..4, keys()).prop_map(|(owner, keys)| Op::Stored(owner, keys)),
        2 => (0u8..4, keys()).prop_map(|(owner, keys)| Op::Removed(owner, keys)),
        1 => (0u8..4).prop_map(Op::Cleared),
    ];
    prop_oneof![
        10 => (0..3usize, proptest::collection::vec(op, 0..6)).prop_map(|(at, ops)| Step::Frame(at, ops)),
        1 => (0..3usize).prop_map(Step::Lose),
        2 => (0..3usize).prop_map(Step::NewEpoch),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Three sources of a hybrid model (full and window group on the GPU, the full one also on the CPU, and an owner of
    /// another full group on disk), with lost frames and restarts, against sets.
    #[test]
    fn every_source_is_matched_as_in_the_naive_model(script in proptest::collection::vec(step(), 0..40)) {
        let window = GroupKind::SlidingWindow { window_tokens: 48, block_tokens: 32 };
        let owners = vec![
            owner(Tier::Gpu, 0, GroupKind::Full),
            owner(Tier::Cpu, 0, GroupKind::Full),
            owner(Tier::Gpu, 1, window),
            owner(Tier::Unknown, 0, GroupKind::Full),
        ];
        let index = index();
        let mut publishers: Vec<_> =
            NAMES.iter().map(|name| Publisher::new("m", name).owners(owners.clone())).collect();
        let mut naive: HashMap<usize, [HashSet<u64>; 4]> = HashMap::new();
        let mut lost = [false; 3];
        for step in script {
            match step {
                Step::Frame(at, ops) => {
                    send(&index, &mut publishers[at], &ops);
                    if lost[at] {
                        continue;
                    }
                    let held = naive.entry(at).or_default();
                    for op in ops {
                        match op {
                            Op::Stored(owner, keys) => held[usize::from(owner)].extend(keys),
                            Op::Removed(owner, keys) => {
                                held[usize::from(owner)].retain(|key| !keys.contains(key));
                            }
                            Op::Cleared(owner) => held[usize::from(owner)].clear(),
                        }
                    }
                }
                Step::Lose(at) => {
                    publishers[at].frame(&[]);
                    lost[at] = true;
                    // The next frame reveals the gap; one that would start the epoch is not seen either.
                }
                Step::NewEpoch(at) => {
                    let epoch = publishers[at].header.epoch.0 + 1;
                    publishers[at].epoch(epoch);
                    send(&index, &mut publishers[at], &[]);
                    naive.insert(at, Default::default());
                    lost[at] = false;
                }
            }
        }
        let prompt: Vec<u64> = (1..14).collect();
        let candidates = NAMES.map(str::to_owned);
        let rows = index.score(&ScoreQuery { candidates: &candidates, ..by_keys("m", &prompt) }).unwrap().rows;
        let keys: Vec<_> = prompt.iter().copied().map(kvatlas_proto::BlockKey).collect();
        for (at, name) in NAMES.iter().enumerate() {
            let row = rows.iter().find(|row| row.instance == *name).unwrap();
            let expected = naive.get(&at).map_or(0, |held| {
                let union = |owners: &[usize]| {
                    owners.iter().flat_map(|o| held[*o].iter()).copied().map(kvatlas_proto::BlockKey).collect()
                };
                let groups = [
                    NaiveGroup { kind: GroupKind::Full, keys: union(&[0, 1, 3]) },
                    NaiveGroup { kind: window, keys: union(&[2]) },
                ];
                longest_prefix(&groups, &keys, 16, u64::MAX)
            });
            prop_assert_eq!(u64::from(row.matched.matched_blocks), expected, "{}", name);
        }
    }
}
