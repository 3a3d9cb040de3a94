use kvatlas_proto::frame::FrameHeader;
use kvatlas_proto::keys::KeyVariant;
use kvatlas_proto::{DpRank, InstanceId, Scope, SourceId};

use super::*;

/// A story about one source: each step is a frame or a tick, with what must come of it.
struct Story {
    tracker: SourceTracker,
    now_ms: u64,
}

fn frame(epoch: u64, seq: u64) -> FrameHeader {
    FrameHeader {
        scope: Scope::new("m", "", 16, 1).unwrap(),
        source: SourceId { instance: InstanceId::new("a:1").unwrap(), rank: DpRank(0) },
        variant: KeyVariant::default(),
        epoch: Epoch(epoch),
        seq: FrameSeq(seq),
        part: FramePart::Live,
        health: SourceHealth::Exact,
        engine_time_ns: 0,
        owners: vec![],
    }
}

fn gap(expected: u64, got: u64) -> Verdict {
    Verdict::Gap { expected: FrameSeq(expected), got: FrameSeq(got) }
}

const LOST: SourceState = SourceState::Degraded(DegradedReason::FramesLost);

impl Story {
    fn new() -> Self {
        Self { tracker: SourceTracker::new(0), now_ms: 0 }
    }

    fn frame(&mut self, epoch: u64, seq: u64, verdict: Verdict, state: SourceState) -> &mut Self {
        self.any_frame(&frame(epoch, seq), verdict, state)
    }

    fn any_frame(&mut self, header: &FrameHeader, verdict: Verdict, state: SourceState) -> &mut Self {
        assert_eq!(self.tracker.on_frame(header, self.now_ms), verdict, "{header:?}");
        assert_eq!(self.tracker.state(), state, "{header:?}");
        self
    }

    fn wait(&mut self, ms: u64, expiry: Option<Expiry>) -> &mut Self {
        self.now_ms += ms;
        assert_eq!(self.tracker.expires(self.now_ms), expiry.is_some());
        assert_eq!(self.tracker.on_tick(self.now_ms), expiry);
        self
    }
}

#[test]
fn frames_in_order_are_applied() {
    let mut story = Story::new();
    story.frame(5, 0, Verdict::NewEpoch, SourceState::Live).frame(5, 1, Verdict::Apply, SourceState::Live);
    assert_eq!(story.tracker.applied_seq(), Some(FrameSeq(1)));
    assert_eq!(story.tracker.epoch(), Some(Epoch(5)));
}

#[test]
fn a_source_first_seen_in_the_middle_of_an_epoch_has_a_gap() {
    let mut story = Story::new();
    story.frame(5, 3, gap(0, 3), LOST).frame(5, 4, gap(0, 4), LOST);
    assert_eq!(story.tracker.applied_seq(), None);
    story.frame(6, 0, Verdict::NewEpoch, SourceState::Live);
}

#[test]
fn a_snapshot_is_syncing_until_its_end_also_with_changes_in_between() {
    let part = |seq, part| FrameHeader { part, ..frame(5, seq) };
    let mut story = Story::new();
    story
        .any_frame(&part(0, FramePart::Snapshot), Verdict::NewEpoch, SourceState::Syncing)
        .any_frame(&part(1, FramePart::Live), Verdict::Apply, SourceState::Syncing)
        .any_frame(&part(2, FramePart::Snapshot), Verdict::Apply, SourceState::Syncing)
        .any_frame(&part(3, FramePart::SnapshotEnd), Verdict::Apply, SourceState::Live);
}

#[test]
fn a_jump_loses_the_epoch_and_a_new_one_heals_it() {
    Story::new()
        .frame(5, 0, Verdict::NewEpoch, SourceState::Live)
        .frame(5, 2, gap(1, 2), LOST)
        // The missing frame arrives late: those after it were dropped, so it does not help.
        .frame(5, 1, gap(1, 1), LOST)
        .frame(6, 0, Verdict::NewEpoch, SourceState::Live);
}

#[test]
fn a_snapshot_with_a_hole_is_lost() {
    let mut story = Story::new();
    let snapshot = FrameHeader { part: FramePart::Snapshot, ..frame(5, 0) };
    story.any_frame(&snapshot, Verdict::NewEpoch, SourceState::Syncing).frame(5, 2, gap(1, 2), LOST);
}

#[test]
fn a_new_epoch_whose_start_was_missed_voids_what_came_before() {
    Story::new()
        .frame(5, 0, Verdict::NewEpoch, SourceState::Live)
        .frame(6, 3, Verdict::NewEpochGap { got: FrameSeq(3) }, LOST)
        .frame(6, 4, gap(0, 4), LOST);
}

#[test]
fn repeated_frames_are_dropped_and_are_no_sign_of_life() {
    let mut story = Story::new();
    story.frame(5, 0, Verdict::NewEpoch, SourceState::Live).wait(LEASE_MS, None);
    story.frame(5, 0, Verdict::Duplicate, SourceState::Live).wait(1, Some(Expiry::Gone));
    story.frame(5, 0, Verdict::Duplicate, SourceState::Gone);
}

#[test]
fn an_older_epoch_is_ignored_while_the_current_one_lives() {
    let mut story = Story::new();
    story.frame(5, 0, Verdict::NewEpoch, SourceState::Live).wait(LEASE_MS, None);
    story.frame(4, 0, Verdict::StaleEpoch, SourceState::Live);
    // It kept nothing alive, and wins once the current epoch is silent for longer than its lease.
    story.wait(1, Some(Expiry::Gone)).frame(4, 0, Verdict::NewEpoch, SourceState::Live);
    assert_eq!(story.tracker.epoch(), Some(Epoch(4)));
}

#[test]
fn a_gone_source_is_revived_by_the_next_frame_in_sequence_only() {
    let mut story = Story::new();
    story.frame(5, 0, Verdict::NewEpoch, SourceState::Live).wait(LEASE_MS + 1, Some(Expiry::Gone));
    story.wait(1, None).frame(5, 1, Verdict::Apply, SourceState::Live);
    story.wait(LEASE_MS + 1, Some(Expiry::Gone)).frame(5, 3, gap(2, 3), SourceState::Gone);
    story.frame(6, 0, Verdict::NewEpoch, SourceState::Live);
}

#[test]
fn a_gone_source_is_dropped_after_a_minute_of_silence() {
    let mut story = Story::new();
    story.frame(5, 0, Verdict::NewEpoch, SourceState::Live).wait(LEASE_MS + 1, Some(Expiry::Gone));
    story.wait(FORGET_MS - LEASE_MS - 1, None).wait(1, Some(Expiry::Dropped));
}

#[test]
fn a_lost_source_that_falls_silent_is_gone() {
    let mut story = Story::new();
    story.frame(5, 7, gap(0, 7), LOST).wait(LEASE_MS + 1, Some(Expiry::Gone));
    assert!(!story.tracker.counts());
}

#[test]
fn a_source_that_moved_away_is_gone_until_it_speaks_here_again() {
    let mut story = Story::new();
    story.frame(5, 0, Verdict::NewEpoch, SourceState::Live);
    story.tracker.on_moved_away();
    assert_eq!(story.tracker.state(), SourceState::Gone);
    story.frame(5, 1, Verdict::Apply, SourceState::Live);
}

#[test]
fn what_the_publisher_says_about_itself_is_the_reason() {
    let mut story = Story::new();
    let reasons = [
        (SourceHealth::JoinedLate, "joined_late"),
        (SourceHealth::EventsLost, "events_lost"),
        (SourceHealth::Undecodable, "undecodable"),
        (SourceHealth::OverLimit, "over_limit"),
    ];
    for (seq, (health, name)) in reasons.into_iter().enumerate() {
        story.tracker.on_frame(&FrameHeader { health, ..frame(5, seq as u64) }, 0);
        assert_eq!(story.tracker.state().degraded_reason(), name);
    }
    story.frame(5, 4, Verdict::Apply, SourceState::Live).frame(5, 6, gap(5, 6), LOST);
    assert_eq!(story.tracker.state().degraded_reason(), "frames_lost");
}

#[test]
fn a_bound_of_the_index_marks_the_source_until_its_next_epoch() {
    let mut story = Story::new();
    story.frame(5, 0, Verdict::NewEpoch, SourceState::Live);
    story.tracker.on_over_limit();
    let over = SourceState::Degraded(DegradedReason::OverLimit);
    story.frame(5, 1, Verdict::Apply, over).frame(6, 0, Verdict::NewEpoch, SourceState::Live);
}

#[test]
fn resync_requests_start_at_once_and_slow_down() {
    let mut tracker = SourceTracker::new(0);
    let asked: Vec<u64> = (0..200_000).step_by(250).filter(|now| tracker.resync_due(*now)).collect();
    assert_eq!(asked[..7], [0, 1_000, 3_000, 7_000, 15_000, 31_000, 61_000]);
    assert!(asked[6..].windows(2).all(|pair| pair[1] - pair[0] == RESYNC_MAX_MS));
}

#[test]
fn a_new_epoch_ends_the_slow_down_but_not_the_rate_limit() {
    let mut story = Story::new();
    story.frame(5, 1, gap(0, 1), LOST);
    for now in [0, 1_000, 3_000, 7_000] {
        assert!(story.tracker.resync_due(now));
    }
    story.now_ms = 7_100;
    story.frame(6, 0, Verdict::NewEpoch, SourceState::Live);
    assert!(!story.tracker.resync_due(7_200));
    assert!(story.tracker.resync_due(8_000));
}
