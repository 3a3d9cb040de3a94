use std::collections::{HashMap, HashSet};

use kvatlas_proto::BlockKey;
use proptest::prelude::*;

use super::*;
use crate::naive::{NaiveGroup, longest_prefix};

/// (tier, medium, group, kind, positions held)
type Held = (Tier, &'static str, u16, GroupKind, Vec<u32>);

fn matched(held: &[Held], prompt: PromptShape) -> SourceMatch {
    let owners: Vec<(TierName, Bits)> = held
        .iter()
        .map(|(tier, medium, _, _, positions)| {
            let mut bits = Bits::default();
            for at in positions {
                bits.set(*at);
            }
            (TierName::new(*tier, medium), bits)
        })
        .collect();
    let views: Vec<HeldBlocks<'_>> = held
        .iter()
        .zip(&owners)
        .map(|((_, _, group, kind, _), (tier, blocks))| HeldBlocks {
            tier,
            group: CacheGroup(*group),
            kind: *kind,
            blocks,
            load_blocks: 1,
        })
        .collect();
    match_source(&views, prompt)
}

fn prompt(blocks: u32) -> PromptShape {
    PromptShape { block_tokens: 16, blocks, tokens: None }
}

fn run(blocks: std::ops::Range<u32>) -> Vec<u32> {
    blocks.collect()
}

fn window(window_tokens: u32, block_tokens: u32) -> GroupKind {
    GroupKind::SlidingWindow { window_tokens, block_tokens }
}

fn summary(result: &SourceMatch) -> Vec<(Tier, u32, u32)> {
    result.tiers.iter().map(|tier| (tier.tier.tier(), tier.matched_blocks, tier.best_blocks)).collect()
}

#[test]
fn a_hole_ends_the_run_of_a_full_group() {
    let result = matched(&[(Tier::Gpu, "GPU", 0, GroupKind::Full, vec![0, 1, 2, 4, 5])], prompt(8));
    assert_eq!(result.matched_blocks, 3);
    assert_eq!(summary(&result), [(Tier::Gpu, 3, 3)]);
}

#[test]
fn tiers_complete_each_other_and_each_block_counts_for_its_fastest_tier() {
    let held = [
        (Tier::Ssd, "STORAGE", 0, GroupKind::Full, run(0..8)),
        (Tier::Gpu, "GPU", 0, GroupKind::Full, run(0..2)),
        (Tier::Cpu, "CPU", 0, GroupKind::Full, vec![1, 2, 3, 6]),
    ];
    let result = matched(&held, prompt(10));
    assert_eq!(result.matched_blocks, 8);
    // CPU alone has no leading block, but it is the fastest that has blocks 2, 3 and 6.
    assert_eq!(summary(&result), [(Tier::Gpu, 2, 2), (Tier::Cpu, 0, 3), (Tier::Ssd, 8, 3)]);
    let score = result.score(&TierWeights::default(), 10);
    assert!((score - (2.0 * 1.0 + 3.0 * 0.8 + 3.0 * 0.5) / 10.0).abs() < 1e-12, "{score}");
}

#[test]
fn a_medium_that_loads_chunks_counts_whole_chunks_only() {
    let positions = |blocks: &[u32]| {
        let mut bits = Bits::default();
        blocks.iter().for_each(|at| bits.set(*at));
        bits
    };
    let (gpu, cpu) = (TierName::new(Tier::Gpu, "GPU"), TierName::new(Tier::Cpu, "CPU"));
    let on_gpu = positions(&[0, 1, 2, 3, 4]);
    let on_cpu = positions(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    let held = |tier, blocks, load_blocks| HeldBlocks {
        tier,
        group: CacheGroup(0),
        kind: GroupKind::Full,
        blocks,
        load_blocks,
    };
    let result = match_source(&[held(&gpu, &on_gpu, 1), held(&cpu, &on_cpu, 4)], prompt(10));
    // Blocks 8 and 9 are in host memory, but their chunk is not complete.
    assert_eq!(result.matched_blocks, 8);
    assert_eq!(summary(&result), [(Tier::Gpu, 5, 5), (Tier::Cpu, 8, 3)]);
}

#[test]
fn a_tier_without_a_leading_block_is_not_listed() {
    let held =
        [(Tier::Gpu, "GPU", 0, GroupKind::Full, run(0..2)), (Tier::Cpu, "CPU", 0, GroupKind::Full, vec![5])];
    assert_eq!(summary(&matched(&held, prompt(8))), [(Tier::Gpu, 2, 2)]);
}

#[test]
fn unknown_media_stay_apart_and_are_worth_nothing() {
    let held = [
        (Tier::Unknown, "CXL", 0, GroupKind::Full, run(0..4)),
        (Tier::Unknown, "TAPE", 0, GroupKind::Full, run(0..2)),
        (Tier::Gpu, "GPU", 0, GroupKind::Full, run(0..1)),
    ];
    let result = matched(&held, prompt(4));
    let media: Vec<_> =
        result.tiers.iter().map(|t| (t.tier.medium(), t.matched_blocks, t.best_blocks)).collect();
    assert_eq!(media, [("", 1, 1), ("CXL", 4, 3), ("TAPE", 2, 0)]);
    assert_eq!(result.score(&TierWeights::default(), 4), 0.25);
}

#[test]
fn a_group_of_unknown_kind_fails_closed() {
    let full = (Tier::Gpu, "GPU", 0, GroupKind::Full, run(0..4));
    let held = [full.clone(), (Tier::Gpu, "GPU", 1, GroupKind::Unknown, run(0..4))];
    assert_eq!(matched(&held, prompt(4)), SourceMatch::default());
    // An owner that does not know its group never counts, but the group is known from the other tier.
    let held = [full, (Tier::Cpu, "CPU", 0, GroupKind::Unknown, run(0..9))];
    assert_eq!(summary(&matched(&held, prompt(9))), [(Tier::Gpu, 4, 4)]);
}

#[test]
fn owners_that_disagree_about_a_group_make_it_unknown() {
    let held =
        [(Tier::Gpu, "GPU", 0, GroupKind::Full, run(0..4)), (Tier::Cpu, "CPU", 0, window(64, 16), run(0..4))];
    assert_eq!(matched(&held, prompt(4)).matched_blocks, 0);
}

#[test]
fn a_window_group_needs_only_the_blocks_of_its_window() {
    // Window 64, block 16: the last ceil(63 / 16) = 4 blocks before the end.
    let held = |positions| {
        [(Tier::Gpu, "GPU", 0, GroupKind::Full, run(0..10)), (Tier::Gpu, "GPU", 1, window(64, 16), positions)]
    };
    assert_eq!(matched(&held(run(6..10)), prompt(10)).matched_blocks, 10);
    assert_eq!(matched(&held(run(7..10)), prompt(10)).matched_blocks, 0);
    // Near the beginning, blocks before position 0 need nothing.
    assert_eq!(matched(&held(run(0..2)), prompt(10)).matched_blocks, 2);
    // A group that holds nothing still has to accept.
    assert_eq!(matched(&held(vec![]), prompt(10)).matched_blocks, 0);
}

#[test]
fn window_blocks_larger_than_the_scope_block_align_the_match() {
    // Window 96, block 32: ceil(95 / 32) = 3 group blocks; their keys are at positions 1, 3, 5, ... (ends 32, 64, 96).
    let held = [
        (Tier::Gpu, "GPU", 0, GroupKind::Full, run(0..9)),
        (Tier::Gpu, "GPU", 1, window(96, 32), vec![1, 3, 5, 7]),
    ];
    assert_eq!(
        matched(&held, prompt(9)).matched_blocks,
        8,
        "nine full blocks, but the window group ends at 8"
    );
}

#[test]
fn window_blocks_without_a_key_are_not_held() {
    let held =
        [(Tier::Gpu, "GPU", 0, GroupKind::Full, run(0..9)), (Tier::Gpu, "GPU", 1, window(96, 24), run(0..9))];
    assert_eq!(matched(&held, prompt(9)).matched_blocks, 0);
}

#[test]
fn a_state_group_needs_its_entry_exactly_at_the_end() {
    let held = [
        (Tier::Gpu, "GPU", 0, GroupKind::Full, run(0..9)),
        (Tier::Gpu, "GPU", 1, GroupKind::State { block_tokens: 64 }, vec![3, 4, 9]),
    ];
    assert_eq!(matched(&held, prompt(10)).matched_blocks, 5);
}

#[test]
fn a_tier_without_one_of_the_groups_matches_nothing_alone() {
    let held = [
        (Tier::Gpu, "GPU", 0, GroupKind::Full, run(0..8)),
        (Tier::Gpu, "GPU", 1, window(64, 16), run(0..8)),
        (Tier::Cpu, "CPU", 0, GroupKind::Full, run(0..8)),
    ];
    assert_eq!(summary(&matched(&held, prompt(8))), [(Tier::Gpu, 8, 8)]);
}

#[test]
fn a_source_with_a_tiny_window_only_does_not_hold_every_prompt() {
    assert_eq!(matched(&[(Tier::Gpu, "GPU", 0, window(1, 16), vec![])], prompt(8)).matched_blocks, 0);
    let result = matched(&[(Tier::Gpu, "GPU", 0, window(32, 16), vec![4, 5])], prompt(8));
    assert_eq!(result.matched_blocks, 6);
    assert_eq!(summary(&result), [(Tier::Gpu, 6, 6)], "blocks before the window need not be computed either");
}

#[test]
fn at_least_one_token_is_left_to_compute() {
    let held = [(Tier::Gpu, "GPU", 0, GroupKind::Full, run(0..4))];
    let cached = |tokens| matched(&held, PromptShape { tokens: Some(tokens), ..prompt(4) }).cached_blocks;
    assert_eq!(cached(64), Some(3), "the prompt ends with the fourth block");
    assert_eq!(cached(65), Some(4));
    assert_eq!(matched(&held, prompt(4)).cached_blocks, None);
}

#[test]
fn the_rule_is_applied_again_below_the_last_token() {
    // The state at block 4 is used up by the limit; the one before it is at block 2.
    let held = [
        (Tier::Gpu, "GPU", 0, GroupKind::Full, run(0..4)),
        (Tier::Gpu, "GPU", 1, GroupKind::State { block_tokens: 32 }, vec![1, 3]),
    ];
    let result = matched(&held, PromptShape { tokens: Some(64), ..prompt(4) });
    assert_eq!((result.matched_blocks, result.cached_blocks), (4, Some(2)));
}

#[test]
fn weights_out_of_range_are_refused() {
    let weights = TierWeights::default();
    assert_eq!(weights.with(Tier::Ssd, 0.25).unwrap().of(Tier::Ssd), 0.25);
    for bad in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
        assert!(matches!(weights.with(Tier::Gpu, bad), Err(WeightError::Range { .. })));
    }
    assert_eq!(weights.with(Tier::Unknown, 0.5), Err(WeightError::UnknownTier));
}

fn any_kind() -> impl Strategy<Value = GroupKind> {
    prop_oneof![
        4 => Just(GroupKind::Full),
        4 => (1u32..200, 1u32..6).prop_map(|(w, b)| window(w, b * 16)),
        1 => (1u32..200, 1u32..60).prop_map(|(w, b)| window(w, b)),
        3 => (1u32..6).prop_map(|b| GroupKind::State { block_tokens: b * 16 }),
        1 => Just(GroupKind::Unknown),
    ]
}

const TIERS: [Tier; 3] = [Tier::Gpu, Tier::Cpu, Tier::Ssd];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn every_source_matches_as_in_the_naive_model(
        kinds in proptest::collection::vec(any_kind(), 1..4),
        // Mostly held, so that long matches are common.
        seeds in proptest::collection::vec(proptest::collection::vec(0u8..8, 24), 9),
        blocks in 0u32..24,
        tail in 0u64..16,
        present in proptest::collection::vec(any::<bool>(), 9),
    ) {
        let mut held: Vec<Held> = Vec::new();
        for (group, kind) in kinds.iter().enumerate() {
            for (at, tier) in TIERS.iter().enumerate() {
                if at == 0 || present[group * 3 + at] {
                    let positions = (0..24).filter(|i| seeds[group * 3 + at][*i as usize] > 1).collect();
                    held.push((*tier, "", group as u16, *kind, positions));
                }
            }
        }
        let tokens = u64::from(blocks) * 16 + tail;
        let result = matched(&held, PromptShape { tokens: Some(tokens), ..prompt(blocks) });

        let keys: Vec<BlockKey> = (0..u64::from(blocks)).map(BlockKey).collect();
        let naive = |tier: Option<Tier>, cap: u64| {
            let mut groups: HashMap<u16, NaiveGroup> = HashMap::new();
            for (owner, _, group, kind, positions) in &held {
                let group = groups.entry(*group).or_insert(NaiveGroup { kind: *kind, keys: HashSet::new() });
                if tier.is_none_or(|only| only == *owner) {
                    group.keys.extend(positions.iter().map(|at| BlockKey(u64::from(*at))));
                }
            }
            longest_prefix(&groups.into_values().collect::<Vec<_>>(), &keys, 16, cap) as u32
        };
        prop_assert_eq!(result.matched_blocks, naive(None, u64::MAX));
        prop_assert_eq!(result.cached_blocks, Some(naive(None, tokens.saturating_sub(1))));
        for tier in TIERS {
            let alone = result.tiers.iter().find(|t| t.tier.tier() == tier).map_or(0, |t| t.matched_blocks);
            prop_assert_eq!(alone, naive(Some(tier), u64::MAX));
        }
        prop_assert_eq!(result.tiers.iter().map(|t| t.best_blocks).sum::<u32>(), result.matched_blocks);
        let score = result.score(&TierWeights::default(), blocks);
        prop_assert!((0.0..=1.0).contains(&score));
    }
}
