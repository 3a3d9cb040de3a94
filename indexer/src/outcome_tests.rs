//! What is remembered, for how long, and how an outcome is labelled.

use super::*;
use crate::matching::{TierMatch, TierName};
use crate::sources::DegradedReason;

/// Best blocks and blocks that the tier holds alone, fastest tier first.
fn row(instance: &str, rank: u32, cached: u32, tiers: &[(Tier, u32, u32)]) -> ScoreRow {
    let tier = |(tier, best_blocks, matched_blocks): &(Tier, u32, u32)| TierMatch {
        tier: TierName::new(*tier, "X"),
        matched_blocks: *matched_blocks,
        best_blocks: *best_blocks,
        runs: crate::matching::Runs::new(),
    };
    ScoreRow {
        instance: instance.to_owned(),
        rank,
        state: Some(SourceState::Verified),
        verified_ms: Some(1_000),
        block_size: 16,
        score: 1.0,
        matched: SourceMatch {
            matched_blocks: tiers.iter().map(|tier| tier.1).sum(),
            cached_blocks: Some(cached),
            tiers: tiers.iter().map(tier).collect(),
        },
        speculative_blocks: 0,
    }
}

fn gpu(instance: &str, blocks: u32) -> ScoreRow {
    row(instance, 0, blocks, &[(Tier::Gpu, blocks, blocks)])
}

fn scored(rows: &[ScoreRow], complete: bool) -> ScoredRequest {
    let answer = ScoreAnswer { rows: rows.to_vec(), ..ScoreAnswer::default() };
    ScoredRequest::new(&answer, complete, 1_000)
}

fn outcome(row: &ScoreRow, now_ms: u64, reported: u32) -> Outcome {
    let prediction = Prediction::of_row(row, now_ms);
    Outcome { prediction, source: PredictionSource::Remembered, reported }
}

fn bare(tokens: u32, reported: u32) -> Outcome {
    Outcome { prediction: Prediction::bare(tokens), source: PredictionSource::Given, reported }
}

fn evicted(evicted: u64) -> Unreported {
    Unreported { evicted, replaced: 0 }
}

#[test]
fn the_oldest_request_goes_first_even_if_it_was_asked_for_last() {
    let mut memory = OutcomeMemory::bounded(2, 100);
    assert_eq!(memory.remember(1, Some(scored(&[gpu("a", 1)], false))), evicted(0));
    assert_eq!(memory.remember(2, Some(scored(&[gpu("a", 2)], false))), evicted(0));
    assert_eq!(memory.reported(1, "a", 0).unwrap().tokens, 16);
    // The first was reported, so nothing is lost with it.
    assert_eq!(memory.remember(3, Some(scored(&[gpu("a", 3)], false))), evicted(0));
    assert_eq!(memory.reported(1, "a", 0), None);
    assert_eq!(memory.remember(4, Some(scored(&[gpu("a", 4)], false))), evicted(1));
    assert_eq!(memory.reported(2, "a", 0), None);
    assert_eq!(memory.reported(3, "a", 0).unwrap().tokens, 48);
    assert_eq!(memory.requests.len(), 2);
}

#[test]
fn rows_are_bounded_over_all_requests() {
    let rows = |count: u32| -> Vec<_> { (0..count).map(|rank| row("a", rank, 0, &[])).collect() };
    let mut memory = OutcomeMemory::bounded(100, 10);
    for id in 1..=5 {
        assert_eq!(memory.remember(id, Some(scored(&rows(2), false))), evicted(0));
    }
    // Three rows need the room of two requests.
    assert_eq!(memory.remember(6, Some(scored(&rows(3), false))), evicted(2));
    assert_eq!((memory.rows, memory.requests.len()), (9, 4));
    assert!(memory.reported(3, "a", 1).is_some() && memory.reported(2, "a", 1).is_none());
    // What has no room even alone is not kept.
    assert_eq!(memory.remember(7, Some(scored(&rows(11), false))), evicted(4));
    assert_eq!((memory.rows, memory.requests.len()), (0, 0));
    assert_eq!(memory.remember(8, Some(scored(&rows(10), false))), evicted(0));
    assert_eq!((memory.rows, memory.requests.len()), (10, 1));
}

#[test]
fn a_later_request_with_the_same_id_replaces_the_earlier_and_is_the_newest() {
    let replaced = |replaced| Unreported { evicted: 0, replaced };
    let mut memory = OutcomeMemory::bounded(2, 100);
    memory.remember(1, Some(scored(&[gpu("a", 1)], false)));
    memory.remember(2, Some(scored(&[gpu("a", 1)], false)));
    assert_eq!(memory.remember(1, Some(scored(&[gpu("b", 2), gpu("c", 3)], false))), replaced(1));
    assert_eq!(memory.rows, 3);
    assert_eq!(memory.reported(1, "a", 0), None);
    assert_eq!(memory.reported(1, "c", 0).unwrap().tokens, 48);
    assert_eq!(memory.remember(3, Some(scored(&[], false))), evicted(1));
    assert!(memory.reported(1, "b", 0).is_some(), "the replaced one was not the oldest any more");
    // One of which nothing can be remembered makes the earlier one invalid too.
    assert_eq!(memory.remember(1, None), replaced(0));
    assert_eq!((memory.reported(1, "b", 0), memory.rows), (None, 0));
}

#[test]
fn who_is_not_in_a_complete_answer_was_predicted_nothing() {
    let mut memory = OutcomeMemory::default();
    memory.remember(1, Some(scored(&[gpu("a", 1)], true)));
    memory.remember(2, Some(scored(&[gpu("a", 1)], false)));
    assert_eq!(memory.reported(1, "b", 0), Some(Prediction::bare(0)));
    assert_eq!(memory.reported(1, "a", 1), Some(Prediction::bare(0)));
    assert_eq!(memory.reported(2, "b", 0), None);
    // A report that found nothing does not count as one.
    assert_eq!(memory.remember(2, None).replaced, 1);
}

#[test]
fn candidates_that_cannot_be_instances_take_no_memory() {
    let long = "x".repeat(MAX_INSTANCE_BYTES + 1);
    let request = scored(&[gpu(&long, 1), gpu(&long[1..], 1)], false);
    assert_eq!(request.rows.len(), 1);
}

#[test]
fn of_several_rows_of_a_source_the_best_counts() {
    let mut memory = OutcomeMemory::default();
    memory.remember(1, Some(scored(&[gpu("a", 3), gpu("a", 1)], false)));
    assert_eq!(memory.reported(1, "a", 0).unwrap().tokens, 48);
}

#[test]
fn the_direction_says_who_said_more() {
    let of = |predicted, reported| (bare(predicted, reported).direction(), bare(predicted, reported));
    let (over, under, equal) = (of(33, 32), of(0, u32::MAX), of(7, 7));
    assert_eq!((over.0, over.1.error_tokens()), ("over", 1));
    assert_eq!((under.0, under.1.error_tokens()), ("under", -i64::from(u32::MAX)));
    assert_eq!((equal.0, equal.1.error_tokens()), ("equal", 0));
}

#[test]
fn the_tier_is_the_slowest_that_has_to_deliver() {
    use Tier::{Cpu, Gpu, Remote, Unknown};
    let tier = |cached, tiers: &[(Tier, u32, u32)]| outcome(&row("a", 0, cached, tiers), 0, 0).tier();
    assert_eq!(tier(4, &[(Gpu, 2, 2), (Cpu, 2, 4)]), "cpu");
    // A tier that has nothing that a faster one has not.
    assert_eq!(tier(4, &[(Gpu, 4, 4), (Cpu, 0, 4)]), "gpu");
    // A copy of the beginning on the GPU, the rest far away, nothing of it on the CPU alone.
    assert_eq!(tier(4, &[(Gpu, 1, 1), (Cpu, 0, 1), (Remote, 3, 4)]), "remote");
    // The block that only the CPU has is the one that is computed again anyway.
    assert_eq!(tier(3, &[(Gpu, 3, 3), (Cpu, 1, 4)]), "gpu");
    // It lies in the middle: there it is needed.
    assert_eq!(tier(3, &[(Gpu, 3, 1), (Cpu, 1, 0)]), "cpu");
    assert_eq!(tier(2, &[(Unknown, 2, 2)]), "unknown");
    assert_eq!(tier(0, &[(Gpu, 1, 1)]), "none");
    assert_eq!((bare(0, 1).tier(), bare(1, 1).tier()), ("none", "unstated"));
}

#[test]
fn the_age_is_that_of_the_prediction_in_six_steps() {
    let at = |now_ms| outcome(&gpu("a", 1), now_ms, 0).age();
    assert_eq!((at(0), at(1_000), at(3_000)), ("le_2s", "le_2s", "le_2s"));
    assert_eq!((at(3_001), at(11_000), at(11_001)), ("le_10s", "le_10s", "le_60s"));
    assert_eq!((at(61_000), at(61_001), at(u64::MAX)), ("le_60s", "gt_60s", "gt_60s"));
    let never = ScoreRow { verified_ms: None, ..gpu("a", 1) };
    assert_eq!((outcome(&never, 5, 0).age(), bare(1, 1).age()), ("never", "unstated"));
}

#[test]
fn a_promise_is_broken_by_more_than_a_block_on_a_verified_source() {
    let broken = |row: &ScoreRow, reported| outcome(row, 1_000, reported).is_broken_promise();
    let row = gpu("a", 4);
    assert!(broken(&row, 47) && !broken(&row, 48) && !broken(&row, 64) && !broken(&row, 1_000));
    for state in [None, Some(SourceState::Live), Some(SourceState::Degraded(DegradedReason::Silent))] {
        assert!(!broken(&ScoreRow { state, ..row.clone() }, 0));
    }
    assert!(!bare(64, 0).is_broken_promise());
    // After the fact the request's own blocks are there.
    let late = Outcome { source: PredictionSource::LookedUp, ..outcome(&row, 1_000, 0) };
    assert!(!late.is_broken_promise() && !late.is_evidence());
}
