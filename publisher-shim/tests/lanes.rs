//! Where the key space is cut, each shard has a lane of its own: one test per rule. In one piece nothing is different.

mod common;

use std::collections::BTreeSet;
use std::fmt::Write as _;

use common::engine::{BLOCK, Engine, Step};
use common::{Reader, StoredEvent, batch_at, cleared, removed, shards};
use kvatlas_proto::frame::{Change, FramePart, FrameView};
use kvatlas_proto::request::{Request, RequestId, Want};
use kvatlas_proto::shard::SEGMENT_BLOCKS;
use kvatlas_proto::{BlockKey, FrameSeq, InstanceId, KeyHasher, Partition, ShardId};
use kvatlas_shim::source::{IDLE_HEARTBEAT_BEATS, Outgoing, PublishLimits, Source, SourceConfig};
use proptest::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

/// Blocks of a prompt that goes over several cuts.
const LONG: u32 = 150;

fn config(partition: Partition) -> SourceConfig {
    SourceConfig {
        block_size: Some(BLOCK as u32),
        partition,
        ..SourceConfig::new("m", InstanceId::new("a:1").unwrap())
    }
}

fn source(partition: Partition) -> Source {
    Source::new(config(partition), 1).unwrap()
}

/// Token ids of a prompt of its own.
fn tokens(prompt: u32, blocks: std::ops::Range<u32>) -> Vec<u32> {
    blocks.flat_map(|block| vec![prompt * 10_000 + block; BLOCK]).collect()
}

fn hash(prompt: u32, block: u32) -> u64 {
    u64::from(prompt) * 10_000 + u64::from(block) + 1
}

fn stored(prompt: u32, blocks: std::ops::Range<u32>) -> StoredEvent {
    StoredEvent {
        hashes: blocks.clone().map(|block| hash(prompt, block)).collect(),
        parent: blocks.start.checked_sub(1).map(|block| hash(prompt, block)),
        tokens: tokens(prompt, blocks),
        ..StoredEvent::default()
    }
}

fn chain(prompt: u32, blocks: u32) -> Vec<BlockKey> {
    KeyHasher::default().chain(&tokens(prompt, 0..blocks), BLOCK as u32)
}

/// The shard and the parent that every block of a prompt should have, from its keys alone.
fn places(partition: Partition, prompt: u32, blocks: u32) -> Vec<(u64, u16, u64)> {
    let chain = chain(prompt, blocks);
    let root = KeyHasher::default().root();
    let segments = chain.chunks(SEGMENT_BLOCKS as usize);
    let of_segment = |keys: &[BlockKey]| {
        let shard = partition.shard_of(keys[0]);
        let parents = std::iter::once(root).chain(keys.iter().copied());
        keys.iter().zip(parents).map(|(key, parent)| (key.0, shard, parent.0)).collect::<Vec<_>>()
    };
    segments.flat_map(of_segment).collect()
}

fn about(shard: ShardId, source: &Source, want: Want) -> Request {
    Request { id: RequestId(7), epoch: source.epoch(), shard, want }
}

/// What a frame is: its shard, its part, and whether it has digests.
fn kind(outgoing: &Outgoing) -> (u16, FramePart, bool) {
    let view = FrameView::parse(&outgoing.frame).unwrap();
    (outgoing.shard.number(), view.header().part, !view.header().digests.is_empty())
}

/// Shards of the frames.
fn lanes(outgoing: &[Outgoing]) -> Vec<u16> {
    outgoing.iter().map(|outgoing| outgoing.shard.number()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn a_block_lies_in_the_shard_that_its_segment_s_first_key_picks(
        number in 2u32..64, cuts in proptest::collection::btree_set(1..LONG, 0..6), backwards in any::<bool>(),
    ) {
        let partition = shards(number);
        let (mut source, mut reader) = (source(partition), Reader::new(partition));
        let starts: Vec<u32> = std::iter::once(0).chain(cuts).collect();
        let ends = starts.iter().skip(1).copied().chain([LONG]);
        let mut events: Vec<_> = starts.iter().copied().zip(ends).map(|(start, end)| start..end).collect();
        if backwards {
            // Children come first and wait.
            events.reverse();
        }
        let mut seq = 0;
        for prompt in 0..4 {
            for blocks in &events {
                source.live(seq, &batch_at(seq as f64, vec![stored(prompt, blocks.clone()).map()]), false);
                seq += 1;
            }
        }
        reader.follow(&mut source, 2, true);
        prop_assert_eq!((reader.blocks(), reader.repairs), (4 * LONG as usize, 0));
        let check = |reader: &Reader| {
            for (key, shard, parent) in (0..4).flat_map(|prompt| places(partition, prompt, LONG)) {
                let held: Vec<u16> = reader
                    .lanes
                    .iter()
                    .filter(|lane| lane.held.values().any(|keys| keys.contains(&key)))
                    .map(|lane| lane.shard.number())
                    .collect();
                assert_eq!((held, reader.parents[&key]), (vec![shard], parent));
            }
        };
        check(&reader);
        // The same is said to who has nothing, and to who lacks some.
        for forget_all in [true, false] {
            let mut other = reader.clone();
            other.parents.clear();
            if forget_all {
                other.forget();
            } else {
                for keys in other.lanes.iter_mut().flat_map(|lane| lane.held.values_mut()) {
                    keys.retain(|key| key % 3 != 0);
                }
            }
            for lane in 0..other.lanes.len() {
                let request = other.lanes[lane].request(1);
                other.repair(lane, &source.answer(&request).unwrap());
            }
            // What was not told is as it was told before.
            for (key, parent) in &reader.parents {
                let told = other.parents.entry(*key).or_insert(*parent);
                assert_eq!(told, parent);
            }
            check(&other);
        }
    }
}

#[test]
fn a_lane_that_lost_frames_repairs_alone() {
    let partition = shards(8);
    let (mut source, mut reader) = (source(partition), Reader::new(partition));
    reader.follow(&mut source, 2, true);
    let unlucky = partition.shard(places(partition, 0, 1)[0].1);
    let number = usize::from(unlucky.number());
    // Everything from here on is lost in one lane, and in no other.
    for (seq, prompt) in (0..).zip(0..20) {
        source.live(seq, &batch_at(seq as f64, vec![stored(prompt, 0..LONG).map()]), false);
        for outgoing in source.take_frames(seq + 3, true).unwrap() {
            if outgoing.shard != unlucky {
                reader.read(&outgoing);
            }
        }
    }
    let all: BTreeSet<u64> = (0..20).flat_map(|prompt| chain(prompt, LONG)).map(|key| key.0).collect();
    let there: BTreeSet<u64> = (0..20)
        .flat_map(|prompt| places(partition, prompt, LONG))
        .filter(|(_, shard, _)| *shard == unlucky.number())
        .map(|(key, _, _)| key)
        .collect();
    assert_eq!(reader.blocks(), all.len() - there.len());
    let (mut again, mut anew) = (reader.clone(), reader);
    // The very frames, again.
    let missing = Want::Frames(vec![(FrameSeq(again.lanes[number].next), FrameSeq(u64::MAX))]);
    for frame in source.answer(&about(unlucky, &source, missing)).unwrap() {
        again.read_again(&frame);
    }
    assert_eq!(again.lanes[number].next, source.position(unlucky).1.0);
    // Or what differs: nothing is told but what lies there.
    anew.lanes[number].next = source.position(unlucky).1.0;
    let answer = source.answer(&anew.lanes[number].request(1)).unwrap();
    anew.repair(number, &answer);
    for reader in [again, anew] {
        assert_eq!(reader.lanes[number].held.values().flatten().copied().collect::<BTreeSet<_>>(), there);
        assert_eq!(reader.held().into_values().flatten().collect::<BTreeSet<_>>(), all);
    }
}

#[test]
fn an_epoch_begins_in_every_lane() {
    let partition = shards(4);
    let (mut source, mut reader) = (source(partition), Reader::new(partition));
    source.live(0, &batch_at(0.0, vec![stored(0, 0..LONG).map()]), false);
    reader.follow(&mut source, 2, true);
    source.new_epoch();
    let starts = source.take_frames(3, false).unwrap();
    assert_eq!(
        starts.iter().map(kind).collect::<Vec<_>>(),
        [0, 1, 2, 3].map(|n| (n, FramePart::Start, true))
    );
    // Who has what it begins with needs nothing.
    starts.iter().for_each(|outgoing| reader.read(outgoing));
    assert!(!reader.is_stale());
    for shard in partition.all() {
        assert_eq!(source.position(shard), (source.epoch(), FrameSeq(1)));
        let first = source.answer(&about(shard, &source, Want::Frames(vec![(FrameSeq(0), FrameSeq(9))])));
        assert_eq!(first.unwrap(), [starts[usize::from(shard.number())].frame.clone()]);
    }
}

#[test]
fn a_frame_that_cannot_be_encoded_in_one_lane_starts_an_epoch_in_all() {
    let partition = shards(2);
    let publish = PublishLimits { frame_ops_bytes: usize::MAX, ..PublishLimits::default() };
    let mut source = Source::new(SourceConfig { publish, ..config(partition) }, 1).unwrap();
    source.take_frames(2, false).unwrap();
    let epoch = source.epoch();
    // Single blocks, nearly all of them in the second shard: more than a frame takes.
    let shard_of = |prompt: &u32| partition.shard_of(chain(*prompt, 1)[0]);
    let few = (0..).filter(|prompt| shard_of(prompt) == 0).take(3);
    let many = (0..).filter(|prompt| shard_of(prompt) == 1).take(60_000);
    let events: Vec<_> = few.chain(many).map(|prompt| stored(prompt, 0..1).map()).collect();
    for (seq, events) in (0..).zip(events.chunks(1_000)) {
        source.live(seq, &batch_at(seq as f64, events.to_vec()), false);
    }
    assert!(source.take_frames(3, true).is_err());
    let starts = source.take_frames(4, false).unwrap();
    assert_eq!(starts.iter().map(kind).collect::<Vec<_>>(), [0, 1].map(|n| (n, FramePart::Start, true)));
    let counts = |outgoing: &Outgoing| FrameView::parse(&outgoing.frame).unwrap().header().digests[0].count;
    assert_eq!(starts.iter().map(counts).collect::<Vec<_>>(), [3, 60_000]);
    assert!(source.epoch() > epoch);
}

#[test]
fn a_reset_is_said_where_something_is_held_and_nowhere_else() {
    let partition = shards(64);
    let (mut source, mut reader) = (source(partition), Reader::new(partition));
    source.live(0, &batch_at(0.0, vec![stored(0, 0..LONG).map()]), false);
    reader.follow(&mut source, 2, true);
    let holding: BTreeSet<u16> = places(partition, 0, LONG).iter().map(|(_, shard, _)| *shard).collect();
    source.live(1, &batch_at(1.0, vec![cleared()]), false);
    let frames = source.take_frames(3, false).unwrap();
    assert_eq!(lanes(&frames), holding.iter().copied().collect::<Vec<_>>());
    for outgoing in &frames {
        let view = FrameView::parse(&outgoing.frame).unwrap();
        assert!(view.ops().all(|op| matches!(op.change, Change::Cleared)));
        reader.read(outgoing);
    }
    assert_eq!((reader.blocks(), source.mirror().visible_blocks()), (0, 0));
}

#[test]
fn a_lane_with_nothing_new_has_a_heartbeat_every_second_time_and_they_take_turns() {
    let partition = shards(6);
    let mut source = source(partition);
    source.take_frames(2, true).unwrap();
    for _ in 0..4 {
        let beats: Vec<_> =
            (0..IDLE_HEARTBEAT_BEATS).map(|_| lanes(&source.take_frames(3, true).unwrap())).collect();
        assert!(beats.iter().all(|lanes| lanes.len() == 3), "as many each time: {beats:?}");
        assert_eq!(beats.into_iter().flatten().collect::<BTreeSet<_>>().len(), 6);
    }
    // Where something has changed, a heartbeat says what that amounts to.
    source.live(0, &batch_at(0.0, vec![stored(0, 0..1).map()]), false);
    let changed = places(partition, 0, 1)[0].1;
    source.take_frames(4, false).unwrap();
    for _ in 0..IDLE_HEARTBEAT_BEATS {
        source.live(1, &batch_at(1.0, vec![removed(&[hash(0, 0)], Some("GPU"), None)]), false);
        assert!(lanes(&source.take_frames(5, true).unwrap()).contains(&changed));
        source.live(2, &batch_at(2.0, vec![stored(0, 0..1).map()]), false);
        source.take_frames(6, false).unwrap();
    }
    // In one piece there are no turns.
    let mut whole = Source::new(config(Partition::WHOLE), 1).unwrap();
    whole.take_frames(2, true).unwrap();
    assert!((0..5).all(|_| whole.take_frames(3, true).unwrap().len() == 1));
}

#[test]
fn who_waits_for_a_heartbeat_gets_it_at_the_next_beat() {
    let partition = shards(6);
    let mut source = source(partition);
    source.take_frames(2, true).unwrap();
    for shard in partition.all().chain([ShardId::WHOLE]) {
        source.owe_heartbeat(shard);
        let told = lanes(&source.take_frames(3, true).unwrap());
        // To a shard of another partition nothing is owed.
        assert!(told.contains(&shard.number()) || shard == ShardId::WHOLE);
        assert!(told.len() <= 4);
        source.owe_heartbeats();
        assert_eq!(lanes(&source.take_frames(3, true).unwrap()).len(), 6);
    }
}

#[test]
fn what_waits_is_bounded_over_all_lanes_as_in_one_piece() {
    for number in [1, 64] {
        let mut source = source(shards(number));
        source.take_frames(2, true).unwrap();
        let mut blocks = 0;
        while !source.wants_flush() {
            source.live(blocks, &batch_at(blocks as f64, vec![stored(blocks as u32, 0..1).map()]), false);
            blocks += 1;
        }
        // Each block is an operation of its own: they share no chain.
        assert!((2_500..4_500).contains(&blocks), "{blocks} in {number}");
        let bytes: usize = source.take_frames(3, false).unwrap().iter().map(|o| o.frame.len()).sum();
        assert!(bytes < 130 << 10, "{bytes} bytes in {number}");
        assert!(!source.wants_flush() && !source.has_frames());
    }
}

#[test]
fn who_cuts_the_key_space_otherwise_has_no_answer() {
    let mut source = source(shards(4));
    source.take_frames(2, true).unwrap();
    let want = || Want::Frames(vec![(FrameSeq(0), FrameSeq(0))]);
    for (shard, frames) in
        [(shards(4).shard(3), 1), (shards(8).shard(3), 0), (shards(2).shard(1), 0), (ShardId::WHOLE, 0)]
    {
        assert_eq!(source.answer(&about(shard, &source, want())).unwrap().len(), frames, "{shard}");
    }
}

/// Steps that anybody can repeat.
fn some_steps(count: u64) -> Vec<Step> {
    let mut state = 1u64;
    let mut below = |bound: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % bound) as usize
    };
    (0..count)
        .map(|_| {
            let (prompt, block, medium) = (below(4), below(6), below(3));
            match below(16) {
                0..6 => Step::Compute { prompt, blocks: block + 1 },
                6 => Step::Duplicate { prompt, block },
                7 => Step::Offload { prompt, block, medium: 1 + medium % 2 },
                8 => Step::Describe { prompt, block, medium: 1 + medium % 2 },
                9..14 => Step::Evict { prompt, block, medium },
                14 if block == 0 => Step::Clear,
                14 if block == 1 => Step::Restart,
                14 => Step::Compute { prompt: 0, blocks: 6 },
                _ if block == 0 => Step::NewEpoch,
                _ => Step::Evict { prompt, block, medium: 0 },
            }
        })
        .collect()
}

/// Everything that a frame says, in words.
fn said(frame: &[u8]) -> String {
    let view = FrameView::parse(frame).unwrap();
    let header = view.header();
    let owners: Vec<_> =
        header.owners.iter().map(|owner| (&*owner.medium, owner.group.0, owner.load_blocks)).collect();
    let digests: Vec<_> = header.digests.iter().map(|digest| (digest.count, digest.sum)).collect();
    let mut text = format!(
        "{} {} {:?} {} {} {owners:?} {digests:?}",
        header.epoch.0,
        header.seq.0,
        header.part,
        header.health.name(),
        header.engine_time_ns
    );
    for op in view.ops() {
        let (what, keys) = match op.change {
            Change::Stored { parent, keys } => (format!("after {:x}", parent.0), keys.iter().collect()),
            Change::Removed(keys) => ("removed".to_owned(), keys.iter().collect()),
            Change::Cleared => ("cleared".to_owned(), Vec::new()),
            Change::Bucket { .. } => unreachable!("only repairs have buckets"),
        };
        let keys: Vec<_> = keys.iter().map(|key| format!("{:x}", key.0)).collect();
        write!(text, " {} {what} {keys:?}", op.owner).unwrap();
    }
    text
}

#[test]
fn in_one_piece_nothing_changes() {
    let (mut engine, mut source) = (Engine::new(), source(Partition::WHOLE));
    let mut text = String::new();
    for (number, step) in some_steps(3_000).iter().enumerate() {
        if matches!(step, Step::NewEpoch) {
            source.new_epoch();
        }
        for event in engine.step(step) {
            engine.time += 1.0;
            source.live(engine.seq, &batch_at(engine.time, vec![event]), false);
            engine.seq += 1;
        }
        for Outgoing { shard, frame } in source.take_frames(number as u64 + 2, number % 5 == 0).unwrap() {
            assert_eq!(shard, ShardId::WHOLE);
            text += &said(&frame);
            text.push('\n');
        }
    }
    // What was said before the key space could be cut.
    assert_eq!((text.lines().count(), xxh3_64(text.as_bytes())), (1_595, 0x91a6_ffe8_faf3_4ac5));
}
