//! What the bus's side of a source promises: one test per rule of `source/publish.rs`, as an index would rely on it.

mod common;

use std::collections::BTreeSet;

use bytes::Bytes;
use common::engine::{BLOCK, Engine, Step, any_partition, any_step};
use common::{Reader, StoredEvent, batch, batch_at, removed};
use kvatlas_proto::digest::Buckets;
use kvatlas_proto::frame::{Change, FramePart, FrameView};
use kvatlas_proto::request::{OwnerBuckets, Request, RequestId, Want};
use kvatlas_proto::{CacheGroup, Digest, Epoch, FrameSeq, InstanceId, Partition, ShardId, Tier};
use kvatlas_shim::source::{ANSWER_FRAMES, SENT_FRAMES, Source, SourceConfig};
use proptest::prelude::*;

fn source() -> Source {
    cut(Partition::WHOLE)
}

fn cut(partition: Partition) -> Source {
    let config = SourceConfig {
        partition,
        block_size: Some(BLOCK as u32),
        ..SourceConfig::new("m", InstanceId::new("a:1").unwrap())
    };
    Source::new(config, 1).unwrap()
}

/// A source that holds `blocks` unrelated blocks, everything published.
fn filled(blocks: u64) -> (Source, Reader) {
    let (mut source, mut reader) = (source(), Reader::default());
    for (seq, first) in (0..blocks).step_by(1_000).enumerate() {
        let events = (first..blocks.min(first + 1_000)).map(|n| block(n).map()).collect();
        source.live(seq as u64, &batch(events), false);
    }
    reader.follow(&mut source, 2, true);
    (source, reader)
}

fn block(n: u64) -> StoredEvent {
    StoredEvent { hashes: vec![n + 1], tokens: vec![n as u32; BLOCK], ..StoredEvent::default() }
}

fn request(source: &Source, want: Want) -> Request {
    about(ShardId::WHOLE, source, want)
}

fn about(shard: ShardId, source: &Source, want: Want) -> Request {
    Request { id: RequestId(7), epoch: source.epoch(), shard, want }
}

/// What the source publishes now.
fn published(source: &mut Source, now_ns: u64, heartbeat: bool) -> Vec<Bytes> {
    common::frames(source.take_frames(now_ns, heartbeat).unwrap())
}

fn digests(source: &Source) -> &[Digest] {
    source.mirror().digests(ShardId::WHOLE)
}

fn frames(first: u64, last: u64) -> Want {
    Want::Frames(vec![(FrameSeq(first), FrameSeq(last))])
}

/// Operations with a key each: what an answer costs.
fn keys_told(answer: &[Bytes]) -> usize {
    let keys = |frame: &Bytes| {
        let ops = FrameView::parse(frame).unwrap().ops().map(|op| match op.change {
            Change::Stored { keys, .. } | Change::Removed(keys) => keys.len(),
            Change::Bucket { blocks, .. } => blocks.len(),
            Change::Cleared => 0,
        });
        ops.sum::<usize>()
    };
    answer.iter().map(keys).sum()
}

#[test]
fn an_epoch_begins_with_what_was_held_before_its_first_change() {
    let (mut source, mut reader) = (source(), Reader::default());
    source.live(0, &batch(vec![block(0).map()]), false);
    let first = published(&mut source, 2, false);
    let start = FrameView::parse(&first[0]).unwrap();
    assert_eq!((start.header().part, start.header().seq), (FramePart::Start, FrameSeq(0)));
    assert_eq!(start.header().digests, [Digest::default()]);
    first.iter().for_each(|frame| reader.read_again(frame));
    // Another epoch of the same mirror: who holds what it began with needs nothing.
    source.new_epoch();
    source.live(1, &batch(vec![block(1).map()]), false);
    reader.follow(&mut source, 3, false);
    assert_eq!((reader.blocks(), reader.repairs), (2, 0));
}

#[test]
fn a_heartbeat_comes_last_and_says_the_digests_also_while_the_source_is_busy() {
    let mut source = source();
    for seq in 0..3 {
        source.live(seq, &batch_at(seq as f64, vec![block(seq).map()]), false);
        let frames = published(&mut source, seq + 2, true);
        let (last, before) = frames.split_last().unwrap();
        let last = FrameView::parse(last).unwrap();
        assert_eq!(last.header().digests, digests(&source));
        assert_eq!((last.header().part, last.ops().count()), (FramePart::Live, 0));
        let changes = |frame: &Bytes| FrameView::parse(frame).unwrap().ops().count();
        assert_eq!(before.iter().map(changes).sum::<usize>(), 1);
    }
}

#[test]
fn a_block_size_that_is_not_known_yet_publishes_nothing_and_answers_nothing() {
    let mut source = Source::new(SourceConfig::new("m", InstanceId::new("a:1").unwrap()), 1).unwrap();
    assert!(source.take_frames(2, true).unwrap().is_empty());
    assert!(source.answer(&request(&source, Want::State(vec![]))).unwrap().is_empty());
}

#[test]
fn frames_are_sent_again_as_they_were() {
    let (mut source, mut sent) = (source(), Vec::new());
    for seq in 0..20 {
        source.live(seq, &batch_at(seq as f64, vec![block(seq).map()]), false);
        sent.extend(published(&mut source, seq + 2, seq % 2 == 0));
    }
    let ranges = vec![(FrameSeq(20), FrameSeq(21)), (FrameSeq(3), FrameSeq(5))];
    let answer = source.answer(&request(&source, Want::Frames(ranges))).unwrap();
    let expected: Vec<Bytes> = [3, 4, 5, 20, 21].iter().map(|seq| sent[*seq].clone()).collect();
    assert_eq!(answer, expected);
}

#[test]
fn frames_that_are_not_kept_any_more_are_said_to_be_gone() {
    let mut source = source();
    for now in 0..SENT_FRAMES as u64 + 10 {
        source.take_frames(now + 2, true).unwrap();
    }
    let next = source.position(ShardId::WHOLE).1.0;
    let oldest = next - SENT_FRAMES as u64;
    let answer = source.answer(&request(&source, frames(oldest - 3, oldest + 1))).unwrap();
    let seqs: Vec<u64> = answer.iter().map(|frame| FrameView::parse(frame).unwrap().header().seq.0).collect();
    assert_eq!(seqs, [oldest, oldest + 1, oldest]);
    let last = FrameView::parse(&answer[2]).unwrap();
    assert_eq!(
        (last.header().part, last.header().reply.unwrap().request),
        (FramePart::Unavailable, RequestId(7))
    );
    // What is kept is answered in portions.
    let answer = source.answer(&request(&source, frames(oldest, next + 5))).unwrap();
    assert_eq!(answer.len(), ANSWER_FRAMES);
}

#[test]
fn a_request_about_another_epoch_or_partition_or_before_everything_is_published_has_no_answer() {
    let (mut source, reader) = filled(10);
    let now = request(&source, frames(0, 0));
    assert_eq!(source.answer(&now).unwrap().len(), 1);
    let elsewhere = Request { shard: ShardId::new(0, 2).unwrap(), ..now.clone() };
    assert!(source.answer(&elsewhere).unwrap().is_empty());
    let other = Request { epoch: Epoch(now.epoch.0 + 1), ..now.clone() };
    assert!(source.answer(&other).unwrap().is_empty());
    source.live(1, &batch_at(9.0, vec![block(99).map()]), false);
    assert!(source.answer(&reader.lanes[0].request(1)).unwrap().is_empty());
    source.take_frames(3, false).unwrap();
    assert_eq!(source.answer(&reader.lanes[0].request(1)).unwrap().len(), 1);
}

#[test]
fn who_has_everything_gets_one_empty_frame_that_says_so() {
    let (source, reader) = filled(5_000);
    let answer = source.answer(&reader.lanes[0].request(3)).unwrap();
    let view = FrameView::parse(&answer[0]).unwrap();
    assert_eq!((answer.len(), view.ops().count()), (1, 0));
    assert_eq!(view.header().digests, digests(&source));
    assert_eq!(view.header().seq.0 + 1, source.position(ShardId::WHOLE).1.0);
}

#[test]
fn what_is_told_follows_the_drift_and_not_the_mirror() {
    let (source, reader) = filled(50_000);
    let owner = ("GPU".to_owned(), 0);
    for drift in [1, 10, 100] {
        let mut stale = reader.clone();
        let keys: Vec<u64> = stale.lanes[0].held[&owner].iter().copied().step_by(50_000 / drift).collect();
        for (number, key) in keys.iter().enumerate() {
            let held = stale.lanes[0].held.get_mut(&owner).unwrap();
            // Half of it is missing, half of it should not be there.
            if number % 2 == 0 {
                held.remove(key)
            } else {
                held.insert(!key)
            };
        }
        let answer = source.answer(&stale.lanes[0].request(1)).unwrap();
        let told = keys_told(&answer);
        assert!(told <= drift * 4 * 64, "{told} keys for {drift} that differ");
        stale.repair(0, &answer);
        assert_eq!(stale.held(), reader.held());
    }
}

#[test]
fn who_has_nothing_or_cuts_far_too_coarsely_gets_everything_in_runs() {
    let (mut source, reader) = filled(10_000);
    let everything = source.answer(&request(&source, Want::State(vec![]))).unwrap();
    assert_eq!(keys_told(&everything), 10_000);
    assert!(everything.len() > 1, "in pieces");
    let coarse = OwnerBuckets {
        tier: Tier::Gpu,
        medium: "GPU".to_owned(),
        group: CacheGroup(0),
        buckets: Buckets::of(0, []),
    };
    let answer = source.answer(&request(&source, Want::State(vec![coarse]))).unwrap();
    assert!(matches!(FrameView::parse(&answer[0]).unwrap().ops().next().unwrap().change, Change::Cleared));
    assert_eq!(keys_told(&answer), 10_000);
    // And who has much where the mirror has nothing is told so in a word.
    let hashes: Vec<u64> = (1..=10_000).collect();
    source.live(10, &batch_at(9.0, vec![removed(&hashes, Some("GPU"), None)]), false);
    source.take_frames(9, false).unwrap();
    let answer = source.answer(&reader.lanes[0].request(1)).unwrap();
    let changes: Vec<_> =
        FrameView::parse(&answer[0]).unwrap().ops().map(|op| format!("{:?}", op.change)).collect();
    assert_eq!((answer.len(), changes), (1, vec!["Cleared".to_owned()]));
}

/// What a lossy bus does to the frames of one step, and what the reader then does about it.
#[derive(Clone, Copy, Debug)]
enum Ask {
    /// For what is missing.
    Frames,
    /// For what differs.
    State,
    /// For what differs, after forgetting and inventing some blocks.
    StateAfterDamage(u64),
    /// Later.
    Wait,
}

fn any_ask() -> impl Strategy<Value = Ask> {
    prop_oneof![
        2 => Just(Ask::Frames),
        2 => Just(Ask::State),
        1 => any::<u64>().prop_map(Ask::StateAfterDamage),
        3 => Just(Ask::Wait),
    ]
}

/// Makes a reader that missed frames of a shard right again in one way.
fn ask(reader: &mut Reader, source: &Source, shard: ShardId, ask: Ask) {
    let (epoch, next) = source.position(shard);
    let number = usize::from(shard.number());
    match ask {
        Ask::Wait => {}
        Ask::Frames => {
            let lane = &mut reader.lanes[number];
            if lane.epoch != epoch.0 {
                (lane.epoch, lane.next, lane.stale) = (epoch.0, 0, false);
            }
            let missing = frames(lane.next, next.0);
            let answer = source.answer(&about(shard, source, missing)).unwrap();
            answer.iter().for_each(|frame| reader.read_again(frame));
            assert_eq!(reader.lanes[number].next, next.0);
            if reader.lanes[number].stale {
                let request = reader.lanes[number].request(1);
                reader.repair(number, &source.answer(&request).unwrap());
            }
        }
        Ask::State | Ask::StateAfterDamage(_) => {
            let lane = &mut reader.lanes[number];
            (lane.epoch, lane.next) = (epoch.0, next.0);
            let request = lane.request(2);
            reader.repair(number, &source.answer(&request).unwrap());
        }
    }
}

fn run((partition, lead): (Partition, usize), steps: &[(Step, u8, Ask)]) -> Result<(), TestCaseError> {
    let (mut engine, mut source) = (Engine::deep(lead), cut(partition));
    let mut reader = Reader::new(partition);
    // By shard: something was missed.
    let mut behind = vec![false; reader.lanes.len()];
    for (number, (step, lost, way)) in steps.iter().enumerate() {
        if matches!(step, Step::NewEpoch) {
            source.new_epoch();
        }
        for event in engine.step(step) {
            engine.time += 1.0;
            source.live(engine.seq, &batch_at(engine.time, vec![event]), false);
            engine.seq += 1;
        }
        let frames = source.take_frames(number as u64 + 1, number % 4 == 0).unwrap();
        for (bit, outgoing) in frames.iter().enumerate() {
            let lane = usize::from(outgoing.shard.number());
            behind[lane] |= lost >> bit.min(7) & 1 == 1;
            if !behind[lane] {
                reader.read(outgoing);
                behind[lane] = reader.lanes[lane].stale;
            }
        }
        let damaged = matches!(way, Ask::StateAfterDamage(_));
        if let Ask::StateAfterDamage(seed) = way {
            reader.damage(*seed);
        }
        for (shard, behind) in partition.all().zip(&mut behind) {
            if *behind || damaged {
                ask(&mut reader, &source, shard, *way);
                *behind &= matches!(way, Ask::Wait);
            }
        }
        if !behind.contains(&true) {
            prop_assert_eq!(&reader.held(), &engine.truth());
            engine.check_places(partition, &reader);
            for lane in &reader.lanes {
                for (owner, digest) in
                    source.mirror().owners().iter().zip(source.mirror().digests(lane.shard))
                {
                    let name = (owner.medium.clone(), owner.group.0);
                    let count = lane.held.get(&name).map_or(0, BTreeSet::len);
                    prop_assert_eq!(digest.count, count as u64);
                }
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_lost_and_however_it_is_asked_for_the_reader_ends_with_what_the_engine_holds(
        cut in any_partition(),
        steps in proptest::collection::vec((any_step(), prop_oneof![2 => Just(0u8), 1 => any::<u8>()], any_ask()), 1..60)
    ) {
        run(cut, &steps)?;
    }
}
