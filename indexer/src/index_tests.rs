use std::collections::{HashMap, HashSet};

use kvatlas_proto::frame::SourceHealth;
use kvatlas_proto::keys::{KeyVariant, MultimodalItem, PromptExtras};
use kvatlas_proto::request::Want;
use kvatlas_proto::{Epoch, FrameSeq, GroupKind, KeyHasher, Tier};
use proptest::prelude::*;

use super::*;
use crate::frames::{Op, Publisher, owner};
use crate::matching::TierWeights;
use crate::naive::{NaiveGroup, longest_prefix};
use crate::query::{PromptInput, ScoreQuery};
use crate::sources::{DegradedReason, Expiry, FORGET_MS, LEASE_MS, STALE_MS, SourceState};

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
    receive(index, bytes, now_ms).unwrap()
}

fn receive(index: &Index, bytes: Vec<u8>, now_ms: u64) -> Result<Applied, LimitReached> {
    let bytes = Bytes::from(bytes);
    let applied = index.apply(&FrameView::parse(&bytes).unwrap(), &bytes, now_ms);
    assert_eq!(index.check(), Ok(()));
    applied
}

fn reply(index: &Index, bytes: Vec<u8>, now_ms: u64) -> Option<Applied> {
    let bytes = Bytes::from(bytes);
    let applied = index.on_reply(&FrameView::parse(&bytes).unwrap(), &bytes, now_ms);
    assert_eq!(index.check(), Ok(()));
    applied
}

fn reply_all(index: &Index, frames: Vec<Vec<u8>>, now_ms: u64) {
    for frame in frames {
        reply(index, frame, now_ms);
    }
}

/// Asks what the index wants to ask now, of this publisher. Returns the questions.
fn help(index: &Index, publisher: &mut Publisher, now_ms: u64) -> Vec<Want> {
    let asked = index.poll(now_ms);
    for (_, request) in &asked {
        reply_all(index, publisher.answer(request), now_ms);
    }
    asked.into_iter().map(|(_, request)| request.want).collect()
}

fn state(index: &Index) -> SourceState {
    index.sources(&OwnerFilter::default(), 0)[0].state
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
    assert_eq!((applied.verdict, applied.stored, applied.before), (Some(Verdict::NewEpoch), 3, None));
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
    assert_eq!(index.totals(0).blocks, 3);
}

#[test]
fn a_new_epoch_starts_empty() {
    let (index, mut a) = (index(), Publisher::new("m", "a:1"));
    send(&index, &mut a, &[Op::Stored(0, vec![1, 2, 3])]);
    let applied = send(&index, a.epoch(2), &[Op::Stored(0, vec![1])]);
    assert_eq!((applied.verdict, applied.removed), (Some(Verdict::NewEpoch), 3));
    assert_eq!(depth(&index, "m", &[1, 2, 3]), 1);
}

#[test]
fn a_gap_keeps_the_entries_and_is_closed_by_exactly_the_missing_frames() {
    let (index, mut a) = (index(), Publisher::new("m", "a:1"));
    send(&index, &mut a, &[Op::Stored(0, vec![1, 2])]);
    let _lost = a.frame(&[Op::Removed(0, vec![2])]);
    let applied = send(&index, &mut a, &[Op::Stored(0, vec![1, 2, 3])]);
    assert_eq!((applied.verdict, applied.has_gap), (Some(Verdict::Held), true));
    assert_eq!(applied.after, SourceState::Degraded(DegradedReason::FramesLost));
    assert_eq!(depth(&index, "m", &[1, 2, 3]), 2, "what was held counts until more is known");
    let asked = help(&index, &mut a, 0);
    assert_eq!(asked, [Want::Frames(vec![(FrameSeq(1), FrameSeq(1))])]);
    assert_eq!((depth(&index, "m", &[1, 2, 3]), state(&index)), (3, SourceState::Live));
    assert!(!index.poll(1_000).iter().any(|_| true), "nothing is left to ask");
}

#[test]
fn missing_frames_are_asked_for_once_until_a_wait_has_passed_and_new_ones_at_once() {
    let (index, mut a) = (index(), Publisher::new("m", "a:1"));
    send(&index, &mut a, &[]);
    a.frame(&[]);
    send(&index, &mut a, &[]);
    let ranges = |now_ms| -> Vec<_> {
        let ask = |(_, request): (SourceId, Request)| match request.want {
            Want::Frames(ranges) => ranges.into_iter().map(|(a, b)| (a.0, b.0)).collect::<Vec<_>>(),
            Want::State(_) => panic!("frames are enough"),
        };
        index.poll(now_ms).into_iter().flat_map(ask).collect()
    };
    assert_eq!(ranges(0), [(1, 1)]);
    assert_eq!(ranges(10), []);
    a.frame(&[]);
    send_at(&index, &mut a, &[], 10);
    assert_eq!(ranges(10), [(3, 3)], "only what was not asked for yet");
    assert_eq!(ranges(40), [(1, 1), (3, 3)], "again, for the answer may have been lost");
    assert_eq!(ranges(80), [], "the waits grow");
    assert_eq!(ranges(100), [(1, 1), (3, 3)]);
}

#[test]
fn frames_that_are_not_kept_any_more_are_replaced_by_the_difference() {
    let (index, mut a) = (index(), Publisher::new("m", "a:1"));
    send(&index, &mut a, &[Op::Stored(0, (1..1_000).collect()), Op::Stored(1, vec![1, 2])]);
    a.frame(&[Op::Removed(0, vec![999]), Op::Cleared(1), Op::Stored(2, vec![5])]);
    send(&index, &mut a, &[]);
    a.sent.clear();
    assert!(matches!(help(&index, &mut a, 0)[..], [Want::Frames(_)]));
    // Changes go on while the difference is on its way.
    send(&index, &mut a, &[Op::Removed(0, vec![998])]);
    let requests = index.poll(0);
    let frames = a.answer(&requests[0].1);
    assert!(frames.iter().map(Vec::len).sum::<usize>() < 4_000, "of 16 slices one differs");
    send(&index, &mut a, &[Op::Removed(0, vec![997])]);
    reply_all(&index, frames, 0);
    assert_eq!(state(&index), SourceState::Verified);
    let keys: Vec<u64> = (1..1_000).collect();
    assert_eq!((depth(&index, "m", &keys), index.totals(0).blocks), (996, 997));
}

#[test]
fn a_difference_that_a_digest_shows_is_repaired_and_the_source_is_verified_again() {
    let (index, mut a) = (index(), Publisher::new("m", "a:1"));
    send(&index, &mut a, &[Op::Stored(0, vec![1, 2, 3])]);
    let beat = a.heartbeat();
    assert_eq!(receive(&index, beat, 0).unwrap().after, SourceState::Verified);
    // A publisher that forgot to say something.
    a.held[0].remove(&3);
    let beat = a.heartbeat();
    let applied = receive(&index, beat, 0).unwrap();
    let diverged = SourceState::Degraded(DegradedReason::Diverged);
    assert_eq!((applied.compared, applied.after), (Some(false), diverged));
    assert_eq!(depth(&index, "m", &[1, 2, 3]), 3, "marked, and still counted");
    assert!(matches!(help(&index, &mut a, 0)[..], [Want::State(_)]));
    assert_eq!((depth(&index, "m", &[1, 2, 3]), state(&index)), (2, SourceState::Verified));
}

#[test]
fn a_new_epoch_hides_everything_until_it_is_known_and_equal_digests_cost_nothing() {
    let (index, mut a) = (index(), Publisher::new("m", "a:1"));
    send(&index, &mut a, &[Op::Stored(0, vec![1, 2])]);
    let start = a.start(2);
    let applied = receive(&index, start, 0).unwrap();
    assert_eq!((applied.verdict, applied.compared), (Some(Verdict::NewEpochHidden), Some(true)));
    assert_eq!((applied.after, depth(&index, "m", &[1, 2])), (SourceState::Verified, 2));

    a.held[0].remove(&2);
    let start = a.start(3);
    assert_eq!(receive(&index, start, 0).unwrap().after, SourceState::Syncing);
    assert_eq!(depth(&index, "m", &[1, 2]), 0, "what an earlier life held does not count");
    send(&index, &mut a, &[Op::Stored(0, vec![1, 2, 3])]);
    help(&index, &mut a, 0);
    assert_eq!((depth(&index, "m", &[1, 2, 3]), state(&index)), (3, SourceState::Verified));
}

#[test]
fn an_engine_that_starts_with_nothing_needs_no_question() {
    let (index, mut a) = (index(), Publisher::new("m", "a:1"));
    send(&index, &mut a, &[Op::Stored(0, vec![1, 2])]);
    a.held.clear();
    let start = a.start(2);
    let applied = receive(&index, start, 0).unwrap();
    assert_eq!((applied.after, applied.removed), (SourceState::Verified, 2));
    assert!(!index.is_troubled());
}

#[test]
fn a_source_first_heard_in_the_middle_does_not_count_until_its_state_arrived() {
    let (index, mut a) = (index(), Publisher::new("m", "a:1"));
    a.piece_blocks = 10;
    a.frame(&[Op::Stored(0, (1..100).collect())]);
    let applied = send(&index, &mut a, &[Op::Removed(0, vec![99])]);
    assert_eq!(applied.after, SourceState::Syncing);
    assert!(index.is_finding_out(0));
    let requests = index.poll(0);
    let mut pieces = a.answer(&requests[0].1);
    assert!(pieces.len() > 5);
    let last = pieces.pop().unwrap();
    reply_all(&index, pieces, 0);
    assert_eq!(depth(&index, "m", &[1, 2]), 0, "it appears as a whole");
    assert_eq!(reply(&index, last, 0).unwrap().transferred, Some(true));
    let keys: Vec<u64> = (1..100).collect();
    assert_eq!((depth(&index, "m", &keys), state(&index)), (98, SourceState::Verified));
    assert!(!index.is_finding_out(0));
}

#[test]
fn an_answer_that_got_lost_in_part_is_asked_for_again_and_only_the_rest_travels() {
    let (index, mut a) = (index(), Publisher::new("m", "a:1"));
    a.piece_blocks = 1_000;
    a.frame(&[Op::Stored(0, (1..20_000).collect())]);
    send(&index, &mut a, &[]);
    let asked = index.poll(0);
    let frames = a.answer(&asked[0].1);
    let whole: usize = frames.iter().map(Vec::len).sum();
    for frame in frames.iter().skip(1) {
        reply(&index, frame.clone(), 0);
    }
    assert!(index.poll(100).is_empty(), "not before a wait");
    let asked = index.poll(2_000);
    assert!(matches!(&asked[0].1.want, Want::State(owners) if owners.len() == 1));
    let rest = a.answer(&asked[0].1);
    // A thousand keys that are missing are in nearly each of 512 slices; in the test's form a slice lists its parents.
    assert!(rest.len() <= 2 * frames.len() && whole > 100_000);
    reply_all(&index, rest, 2_000);
    assert_eq!((index.totals(0).blocks, state(&index)), (19_999, SourceState::Verified));
}

#[test]
fn answers_to_another_question_are_ignored() {
    let (index, mut a) = (index(), Publisher::new("m", "a:1"));
    a.frame(&[Op::Stored(0, vec![1])]);
    send(&index, &mut a, &[]);
    let asked = index.poll(0);
    let stale = Request { id: kvatlas_proto::request::RequestId(99), ..asked[0].1.clone() };
    for frame in a.answer(&stale) {
        assert_eq!(reply(&index, frame, 0).unwrap().transferred, None);
    }
    assert_eq!(state(&index), SourceState::Syncing);
    let unknown = Publisher::new("m", "b:1").answer(&Request { epoch: Epoch(9), ..stale });
    assert!(unknown.into_iter().all(|frame| FrameView::parse(&frame).is_ok()));
}

#[test]
fn a_fleet_that_synchronises_takes_turns() {
    let index = index();
    let mut fleet: Vec<_> = (0..3 * MAX_TRANSFERS).map(|n| Publisher::new("m", &format!("p:{n}"))).collect();
    for publisher in &mut fleet {
        publisher.frame(&[Op::Stored(0, vec![1, 2])]);
        send(&index, publisher, &[]);
    }
    let mut turns = 0;
    loop {
        let asked = index.poll(0);
        assert!(asked.len() <= MAX_TRANSFERS);
        if asked.is_empty() {
            break;
        }
        turns += 1;
        for (source, request) in asked {
            let publisher = fleet.iter_mut().find(|p| p.header.source == source).unwrap();
            reply_all(&index, publisher.answer(&request), 0);
        }
    }
    assert_eq!((turns, index.totals(0).sources[&SourceState::Verified]), (3, 3 * MAX_TRANSFERS));
}

#[test]
fn a_checkpoint_counts_only_once_it_is_proved_and_costs_what_has_changed() {
    let mut fleet = [Publisher::new("m", "a:1"), Publisher::new("m", "b:1"), Publisher::new("m", "c:1")];
    let keys: Vec<u64> = (1..2_000).collect();
    let before = index();
    for publisher in &mut fleet {
        send(&before, publisher, &[Op::Stored(0, keys.clone()), Op::Stored(2, vec![1])]);
    }
    let (file, size) = before.write_checkpoint(std::io::Cursor::new(Vec::new())).unwrap();
    assert_eq!((size.sources, size.blocks), (3, 6_000));

    let [a, b, c] = &mut fleet;
    let after = index();
    assert_eq!(after.restore(file.get_ref(), 0).unwrap(), size);
    assert_eq!((after.check(), after.totals(0).blocks), (Ok(()), 6_000));
    assert!(depths(&after, &by_keys("m", &keys)).is_empty(), "nobody has said that it is still so");

    // One has not changed: its next heartbeat is proof.
    let beat = a.heartbeat();
    assert_eq!(receive(&after, beat, 0).unwrap().after, SourceState::Verified);
    assert!(!after.is_troubled());
    // One has changed a little meanwhile: little is sent.
    send(&after, b, &[Op::Removed(0, vec![1_999])]);
    let asked = after.poll(0);
    let answer = b.answer(&asked[0].1);
    assert!(answer.iter().map(Vec::len).sum::<usize>() < 4_000);
    reply_all(&after, answer, 0);
    // One has restarted with nothing.
    send(&after, c.epoch(5), &[]);
    let rows = depths(&after, &by_keys("m", &keys));
    assert_eq!(rows, [("a:1".to_owned(), 0, 1_999), ("b:1".to_owned(), 0, 1_998)]);
    assert_eq!(after.totals(0).blocks, 2_000 + 1_999);
}

#[test]
fn a_checkpoint_beyond_the_bounds_is_taken_in_as_far_as_it_fits() {
    let before = index();
    for name in ["a:1", "b:1"] {
        send(&before, &mut Publisher::new("m", name), &[Op::Stored(0, vec![1, 2, 3])]);
    }
    let file = before.write_checkpoint(std::io::Cursor::new(Vec::new())).unwrap().0.into_inner();
    let few_blocks = small(|limits| limits.blocks = 4);
    assert_eq!(few_blocks.restore(&file, 0).unwrap().blocks, 4);
    let few_sources = small(|limits| limits.sources_per_scope = 1);
    assert_eq!(few_sources.restore(&file, 0).unwrap().sources, 1);
    let known = index();
    send(&known, &mut Publisher::new("m", "a:1"), &[]);
    assert_eq!(known.restore(&file, 0).unwrap().sources, 1, "what is alive is newer");
}

#[test]
fn a_large_source_and_its_end_keep_the_counts() {
    let (index, mut a) = (index(), Publisher::new("m", "a:1"));
    for piece in 0..3u64 {
        send(&index, &mut a, &[Op::Stored(0, (piece * 20_000..(piece + 1) * 20_000).collect())]);
    }
    assert_eq!(index.totals(0).blocks, 60_000);
    let applied = send(&index, a.epoch(2), &[]);
    assert_eq!((applied.removed, index.totals(0).blocks, index.totals(0).distinct_blocks), (60_000, 0, 0));
    assert_eq!(index.totals(0).owners, 3);
}

#[test]
fn a_gone_source_is_known_but_does_not_count_and_is_dropped_later() {
    let (index, mut a) = (index(), Publisher::new("m", "a:1"));
    send(&index, &mut a, &[Op::Stored(0, vec![1, 2])]);
    assert!(index.tick(STALE_MS).is_empty());
    let expired = index.tick(STALE_MS + 1);
    assert_eq!(expired.iter().map(|e| e.expiry).collect::<Vec<_>>(), [Expiry::Silent]);
    assert_eq!(state(&index), SourceState::Degraded(DegradedReason::Silent));
    assert_eq!(depth(&index, "m", &[1, 2]), 2, "marked, and still counted");
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
    assert_eq!((index.totals(0).blocks, index.totals(0).owners), (0, 0));
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
    send(
        &index,
        &mut Publisher::new("m", "b:1"),
        &[Op::Stored(0, vec![1, 2]), Op::StoredAfter(0, 3, vec![4])],
    );
    let suffix = |base_key, keys: &'static [u64]| ScoreQuery {
        input: PromptInput::Suffix {
            base_key,
            base_blocks: 3,
            keys,
            base_segment: None,
            prompt_tokens: Some(90),
        },
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
    send(&index, &mut a, &[Op::StoredAfter(0, 4, vec![5, 6])]);
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
    let refused = receive(&index, frame, 0).unwrap_err();
    assert!(matches!(refused, LimitReached::Scopes { bound: 1, .. }));
    for _ in 0..2 {
        index.tick(FORGET_MS + 1);
    }
    send(&index, &mut Publisher::new("two", "b:1"), &[]);
}

#[test]
fn at_the_bound_of_sources_new_ones_are_refused() {
    let index = small(|limits| limits.sources_per_scope = 1);
    let mut a = Publisher::new("m", "a:1");
    send(&index, &mut a, &[]);
    let frame = Publisher::new("m", "b:1").frame(&[]);
    let refused = receive(&index, frame, 0).unwrap_err();
    assert!(refused.to_string().contains("b:1#0"), "{refused}");
    assert_eq!(send(&index, &mut a, &[]).verdict, Some(Verdict::Apply));
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
        let mut a = Publisher::new("m", "a:1");
        a.root = KeyHasher::new(KeySeed::secret(7)).root().0;
        send(index, &mut a, &[Op::Stored(0, keys.clone())]);
    }
    assert_eq!(depths(&secret, &by_tokens(&tokens, PromptExtras::default())).len(), 1);
}

#[test]
fn a_tenant_with_another_seed_matches_nothing_of_before_and_others_keep_theirs() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("secrets.toml");
    let keys_of_a = |secret: &str| {
        std::fs::write(&path, format!("[tenants]\na = \"{}\"\n", secret.repeat(32))).unwrap();
        TenantKeys::read(&path, KeySeed::PUBLISHED).unwrap()
    };
    let (index, tokens) = (index(), (0..32).collect::<Vec<u32>>());
    let (old, new) = (keys_of_a("1"), keys_of_a("2"));
    let publish = |keys: &TenantKeys, tenant: &str, instance: &str, epoch: u64| {
        let mut publisher = Publisher::new("m", instance).scope(tenant, 16);
        publisher.epoch(epoch);
        publisher.root = keys.of(tenant).root().0;
        let chain = keys.of(tenant).chain(&tokens, 16).iter().map(|key| key.0).collect();
        send(&index, &mut publisher, &[Op::Stored(0, chain)]);
    };
    let matched = |tenant: &str| {
        let query = by_tokens(&tokens, PromptExtras::default());
        let rows = index.score(&ScoreQuery { tenant, ..query }).unwrap().rows;
        rows.iter().map(|row| row.matched.matched_blocks).sum::<u32>()
    };
    index.replace_keys(old.clone());
    publish(&old, "a", "a:1", 1);
    publish(&old, "", "b:1", 1);
    assert_eq!((matched("a"), matched("")), (2, 2));

    index.replace_keys(new.clone());
    assert_eq!((matched("a"), matched("")), (0, 2), "nothing of before is left of the tenant");
    index.check().unwrap();
    // A shim that still has the old secret is taken in, and matches nothing.
    publish(&old, "a", "a:1", 2);
    assert_eq!(matched("a"), 0);
    // One that was restarted with the new one matches.
    publish(&new, "a", "a:1", 3);
    assert_eq!((matched("a"), matched("")), (2, 2));
    index.check().unwrap();
    // The same keys change nothing.
    index.replace_keys(new);
    assert_eq!((matched("a"), matched("")), (2, 2));
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
    assert_eq!(index.totals(0).blocks, 10_000);
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
        // One block each, in any order: the chain is 1, 2, 3 and so on.
        5 => (0u8..4, 1u64..14).prop_map(|(owner, key)| match key {
            1 => Op::Stored(owner, vec![1]),
            key => Op::StoredAfter(owner, key - 1, vec![key]),
        }),
        2 => (0u8..4, keys()).prop_map(|(owner, keys)| Op::Removed(owner, keys)),
        1 => (0u8..4).prop_map(Op::Cleared),
    ];
    prop_oneof![
        10 => (0..3usize, proptest::collection::vec(op, 0..12)).prop_map(|(at, ops)| Step::Frame(at, ops)),
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
                            Op::Stored(owner, keys) | Op::StoredAfter(owner, _, keys) => {
                                held[usize::from(owner)].extend(keys);
                            }
                            Op::Removed(owner, keys) => {
                                held[usize::from(owner)].retain(|key| !keys.contains(key));
                            }
                            Op::Cleared(owner) => held[usize::from(owner)].clear(),
                        }
                    }
                }
                Step::Lose(at) => {
                    publishers[at].frame(&[]);
                    publishers[at].sent.clear();
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
