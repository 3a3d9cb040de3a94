use kvatlas_proto::frame::OpBuffer;
use kvatlas_proto::{Digest, GroupKind, Tier};

use super::*;
use crate::frames::{Publisher, owner};

const LIVE: SourceState = SourceState::Live;
const LOST: SourceState = SourceState::Degraded(DegradedReason::FramesLost);

fn frame(epoch: u64, seq: u64) -> FrameHeader {
    let mut header = Publisher::new("m", "a:1").header;
    (header.epoch, header.seq) = (Epoch(epoch), FrameSeq(seq));
    header
}

fn beat(epoch: u64, seq: u64) -> FrameHeader {
    let owners = vec![owner(Tier::Gpu, 0, GroupKind::Full)];
    FrameHeader { owners, digests: vec![Digest::default()], ..frame(epoch, seq) }
}

/// A tracker and a clock, with expectations as a script.
struct Story {
    tracker: SourceTracker,
    now_ms: u64,
}

impl Story {
    fn new() -> Self {
        Self { tracker: SourceTracker::new(0), now_ms: 0 }
    }

    fn frame(&mut self, epoch: u64, seq: u64, verdict: Verdict, state: SourceState) -> &mut Self {
        self.any_frame(&frame(epoch, seq), verdict, state)
    }

    fn any_frame(&mut self, header: &FrameHeader, verdict: Verdict, state: SourceState) -> &mut Self {
        let bytes = Bytes::from(header.encode(&mut OpBuffer::default()).unwrap());
        assert_eq!(self.tracker.on_frame(header, &bytes, self.now_ms), verdict);
        assert_eq!(self.tracker.state(), state);
        self
    }

    /// A frame with digests, which are compared.
    fn beat(&mut self, epoch: u64, seq: u64, equal: bool, state: SourceState) -> &mut Self {
        let header = beat(epoch, seq);
        let bytes = Bytes::from(header.encode(&mut OpBuffer::default()).unwrap());
        self.tracker.on_frame(&header, &bytes, self.now_ms);
        assert!(self.tracker.compares(&header));
        self.tracker.on_compared(&header, equal, self.now_ms);
        assert_eq!(self.tracker.state(), state);
        self
    }

    fn wait(&mut self, ms: u64, expiry: Option<Expiry>) -> &mut Self {
        self.now_ms += ms;
        assert_eq!(self.tracker.on_tick(self.now_ms), expiry);
        self
    }
}

#[test]
fn frames_in_order_are_applied() {
    Story::new()
        .frame(1, 0, Verdict::NewEpoch, LIVE)
        .frame(1, 1, Verdict::Apply, LIVE)
        .beat(1, 2, true, SourceState::Verified)
        .frame(1, 3, Verdict::Apply, SourceState::Verified);
}

#[test]
fn a_source_first_heard_in_the_middle_does_not_count() {
    let mut story = Story::new();
    story.frame(1, 5, Verdict::NewEpochHidden, SourceState::Syncing);
    assert!(!story.tracker.counts());
    assert_eq!(story.tracker.ask(0), Some(Ask::State));
    story.beat(1, 6, true, SourceState::Verified);
    assert!(story.tracker.counts());
}

#[test]
fn a_jump_is_a_gap_until_the_missing_frames_are_there_in_any_order() {
    let mut story = Story::new();
    story
        .frame(1, 0, Verdict::NewEpoch, LIVE)
        .frame(1, 4, Verdict::Held, LOST)
        .frame(1, 2, Verdict::Held, LOST)
        .frame(1, 1, Verdict::Apply, LOST);
    let seq = |bytes: Option<Bytes>| {
        let bytes = bytes?;
        Some(kvatlas_proto::frame::FrameView::parse(&bytes).unwrap().header().seq.0)
    };
    assert_eq!(seq(story.tracker.next_held()), Some(2));
    story.frame(1, 2, Verdict::Apply, LOST);
    assert_eq!(seq(story.tracker.next_held()), None);
    story.frame(1, 3, Verdict::Apply, LOST);
    assert_eq!(seq(story.tracker.next_held()), Some(4));
    story.frame(1, 4, Verdict::Apply, LIVE);
}

#[test]
fn a_difference_holds_later_frames_back_until_the_content_is_proved() {
    let diverged = SourceState::Degraded(DegradedReason::Diverged);
    let mut story = Story::new();
    story.frame(1, 0, Verdict::NewEpoch, LIVE).beat(1, 1, false, diverged).frame(
        1,
        2,
        Verdict::Held,
        diverged,
    );
    assert!(story.tracker.counts());
    assert_eq!(story.tracker.ask(0), Some(Ask::State));
    story.beat(1, 3, true, SourceState::Verified);
    assert_eq!(story.tracker.applied_seq(), Some(FrameSeq(3)));
}

#[test]
fn a_new_epoch_voids_what_came_before_also_when_its_start_was_missed() {
    Story::new()
        .frame(1, 0, Verdict::NewEpoch, LIVE)
        .frame(2, 3, Verdict::NewEpochHidden, SourceState::Syncing)
        .frame(1, 1, Verdict::StaleEpoch, SourceState::Syncing)
        .frame(3, 0, Verdict::NewEpoch, LIVE);
}

#[test]
fn repeated_frames_are_dropped_and_are_no_sign_of_life() {
    Story::new()
        .frame(1, 0, Verdict::NewEpoch, LIVE)
        .frame(1, 1, Verdict::Apply, LIVE)
        .wait(LEASE_MS - 1_000, Some(Expiry::Silent))
        .frame(1, 1, Verdict::Duplicate, SourceState::Degraded(DegradedReason::Silent))
        .wait(1_001, Some(Expiry::Gone));
}

#[test]
fn an_older_epoch_is_ignored_while_the_current_one_lives() {
    Story::new()
        .frame(5, 0, Verdict::NewEpoch, LIVE)
        .wait(LEASE_MS, Some(Expiry::Silent))
        .frame(4, 0, Verdict::StaleEpoch, SourceState::Degraded(DegradedReason::Silent))
        .wait(1, Some(Expiry::Gone))
        .frame(4, 0, Verdict::NewEpoch, LIVE);
}

#[test]
fn silence_is_marked_then_gone_then_dropped() {
    Story::new()
        .frame(1, 0, Verdict::NewEpoch, LIVE)
        .wait(STALE_MS, None)
        .wait(1, Some(Expiry::Silent))
        .frame(1, 1, Verdict::Apply, LIVE)
        .wait(STALE_MS + 1, Some(Expiry::Silent))
        .wait(LEASE_MS - STALE_MS, Some(Expiry::Gone))
        .wait(FORGET_MS - LEASE_MS - 1, None)
        .wait(1, Some(Expiry::Dropped));
}

#[test]
fn a_gone_source_is_revived_by_the_next_frame_in_sequence_or_a_proof_only() {
    let mut story = Story::new();
    story.frame(1, 0, Verdict::NewEpoch, LIVE).wait(LEASE_MS + 1, Some(Expiry::Gone));
    story.frame(1, 1, Verdict::Apply, LIVE);
    story.wait(LEASE_MS + 1, Some(Expiry::Gone));
    story.frame(1, 5, Verdict::Held, SourceState::Gone);
    assert!(story.tracker.needs_help(story.now_ms), "it lives, so it can be asked");
    story.frame(1, 2, Verdict::Apply, LOST);
}

#[test]
fn a_silent_publisher_is_not_asked() {
    let mut story = Story::new();
    story.frame(1, 5, Verdict::NewEpochHidden, SourceState::Syncing);
    assert!(story.tracker.needs_help(LEASE_MS));
    assert!(!story.tracker.needs_help(LEASE_MS + 1));
}

#[test]
fn a_restored_source_counts_and_is_asked_only_once_it_was_heard() {
    let mut story = Story { tracker: SourceTracker::restored(Epoch(3), 0), now_ms: 0 };
    assert_eq!((story.tracker.state(), story.tracker.counts()), (SourceState::Syncing, false));
    assert!(!story.tracker.needs_help(0));
    story.frame(3, 70, Verdict::Held, SourceState::Syncing);
    assert_eq!(story.tracker.ask(0), Some(Ask::State));
    story.beat(3, 71, true, SourceState::Verified);
}

#[test]
fn a_source_that_moved_away_is_gone_until_it_speaks_here_again() {
    let mut story = Story::new();
    story.frame(1, 0, Verdict::NewEpoch, LIVE);
    story.tracker.on_moved_away();
    assert_eq!(story.tracker.state(), SourceState::Gone);
    story.frame(1, 1, Verdict::Apply, LIVE);
}

#[test]
fn what_the_publisher_says_about_itself_is_the_reason_even_if_digests_are_equal() {
    let says = |health, seq| FrameHeader { health, ..beat(1, seq) };
    let reasons = [
        (SourceHealth::JoinedLate, DegradedReason::JoinedLate),
        (SourceHealth::EventsLost, DegradedReason::EventsLost),
        (SourceHealth::Undecodable, DegradedReason::Undecodable),
        (SourceHealth::OverLimit, DegradedReason::OverLimit),
    ];
    let mut story = Story::new();
    story.frame(1, 0, Verdict::NewEpoch, LIVE);
    for (seq, (health, reason)) in (1..).zip(reasons) {
        let header = says(health, seq);
        story.any_frame(&header, Verdict::Apply, SourceState::Degraded(reason));
        story.tracker.on_compared(&header, true, 0);
        assert_eq!(story.tracker.state(), SourceState::Degraded(reason));
    }
    story.frame(1, 5, Verdict::Apply, SourceState::Verified);
}

#[test]
fn a_bound_of_the_index_marks_the_source_until_its_next_epoch_and_ends_comparisons() {
    let over = SourceState::Degraded(DegradedReason::OverLimit);
    let mut story = Story::new();
    story.frame(1, 0, Verdict::NewEpoch, LIVE);
    story.tracker.on_over_limit();
    story.frame(1, 1, Verdict::Apply, over);
    assert!(!story.tracker.compares(&beat(1, 1)));
    story.frame(2, 0, Verdict::NewEpoch, LIVE);
}

#[test]
fn questions_about_a_state_slow_down_while_nothing_comes() {
    let mut story = Story::new();
    story.frame(1, 5, Verdict::NewEpochHidden, SourceState::Syncing);
    let mut asked = Vec::new();
    let permits = crate::session::Permits::new(1);
    for now_ms in (0..LEASE_MS).step_by(10) {
        if story.tracker.ask(now_ms) == Some(Ask::State) {
            asked.push(now_ms);
            story.tracker.end_session();
            let permit = permits.take().unwrap();
            let session = Session::new(kvatlas_proto::request::RequestId(1), vec![], permit, now_ms);
            story.tracker.on_asked_for_state(session, now_ms);
        }
    }
    assert_eq!(asked, [0, 500, 1_500, 3_500, 7_500]);
}
