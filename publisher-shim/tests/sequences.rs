//! Order and repair on the engine's side: one test per rule of `source.rs`, with the key space in one piece and cut.

mod common;

use bytes::Bytes;
use common::{Reader, StoredEvent, batch_at, cleared, removed, shards};
use kvatlas_proto::frame::SourceHealth;
use kvatlas_proto::{DpRank, InstanceId, Partition};
use kvatlas_shim::mirror::MirrorLimits;
use kvatlas_shim::source::{Live, Source, SourceConfig};

/// Numbers of shards that each rule is tried with.
const PARTITIONS: [u32; 2] = [1, 4];

/// A source with what an index would make of its frames.
struct Rig {
    source: Source,
    reader: Reader,
    clock: u64,
}

impl Rig {
    fn new(has_replay: bool, partition: Partition) -> Self {
        let config =
            SourceConfig { has_replay, partition, ..SourceConfig::new("m", InstanceId::new("a:1").unwrap()) };
        Self { source: Source::new(config, 1).unwrap(), reader: Reader::new(partition), clock: 1 }
    }

    fn live(&mut self, seq: u64, message: &[u8]) -> Live {
        let outcome = self.source.live(seq, message, false);
        self.publish();
        outcome
    }

    fn publish(&mut self) {
        self.clock += 1;
        self.reader.follow(&mut self.source, self.clock, false);
    }

    /// Blocks the index believes in.
    fn blocks(&self) -> usize {
        self.reader.blocks()
    }
}

fn block_event(life: u64, n: u64) -> StoredEvent {
    StoredEvent {
        hashes: vec![life * 1_000 + n + 1],
        parent: (n > 0).then_some(life * 1_000 + n),
        tokens: (0..4).map(|i| (n * 4 + i) as u32).collect(),
        ..StoredEvent::default()
    }
}

/// Block number `n` of a chain of one-block messages; the time makes every life's bytes differ.
fn block(life: u64, n: u64) -> Bytes {
    Bytes::from(batch_at(1e9 + (life * 100 + n) as f64, vec![block_event(life, n).map()]))
}

fn replay(life: u64, range: std::ops::Range<u64>) -> Vec<(u64, Bytes)> {
    range.map(|n| (n, block(life, n))).collect()
}

#[test]
fn messages_in_order_are_applied_and_the_source_is_exact() {
    for partition in PARTITIONS.map(shards) {
        let mut rig = Rig::new(false, partition);
        for n in 0..5 {
            assert_eq!(rig.live(n, &block(0, n)), Live::Done);
        }
        assert_eq!((rig.blocks(), rig.reader.health.as_str()), (5, "exact"));
    }
}

#[test]
fn a_gap_is_filled_from_the_replay_in_both_overlaps() {
    for partition in PARTITIONS.map(shards) {
        let mut rig = Rig::new(true, partition);
        rig.source.replayed(0, &[]);
        rig.live(0, &block(0, 0));
        assert_eq!(rig.live(4, &block(0, 4)), Live::Replay { from: 1 });
        // The reply overlaps what was applied and what is live.
        rig.source.replayed(1, &replay(0, 0..6));
        assert_eq!(rig.source.live(4, &block(0, 4), true), Live::Done);
        assert_eq!(rig.live(5, &block(0, 5)), Live::Done);
        rig.publish();
        assert_eq!((rig.blocks(), rig.source.health()), (6, SourceHealth::Exact));
        assert_eq!(rig.source.counts().duplicates, 3);
        assert_eq!(rig.source.counts().losses, 0);
    }
}

#[test]
fn a_gap_that_cannot_be_filled_drops_what_was_known_and_says_so() {
    for partition in PARTITIONS.map(shards) {
        let mut rig = Rig::new(true, partition);
        rig.source.replayed(0, &[]);
        (0..3).for_each(|n| assert_eq!(rig.live(n, &block(0, n)), Live::Done));
        let epoch = rig.reader.epoch();
        assert_eq!(rig.live(9, &block(0, 9)), Live::Replay { from: 3 });
        // The buffer starts later than asked.
        rig.source.replayed(3, &replay(0, 7..10));
        rig.source.live(9, &block(0, 9), true);
        rig.publish();
        assert!(rig.reader.epoch() > epoch);
        assert_eq!(rig.source.health(), SourceHealth::EventsLost);
        // Blocks 7 to 9 hang on block 6, which nobody knows: they do not count.
        assert_eq!(rig.blocks(), 0);
    }
}

#[test]
fn a_message_that_can_never_be_replayed_is_asked_for_once() {
    for partition in PARTITIONS.map(shards) {
        let mut rig = Rig::new(true, partition);
        rig.source.replayed(0, &[]);
        rig.live(0, &block(0, 0));
        assert_eq!(rig.live(2, &block(0, 2)), Live::Replay { from: 1 });
        rig.source.replayed(1, &replay(0, 2..3));
        assert_eq!(rig.source.live(2, &block(0, 2), true), Live::Done);
        // No further request for what will never come.
        assert_eq!(rig.live(3, &block(0, 3)), Live::Done);
        assert_eq!(rig.source.counts().losses, 1);
        assert_eq!(rig.source.health(), SourceHealth::EventsLost);
    }
}

#[test]
fn without_a_replay_socket_a_gap_costs_the_state_at_once() {
    for partition in PARTITIONS.map(shards) {
        let mut rig = Rig::new(false, partition);
        (0..3).for_each(|n| assert_eq!(rig.live(n, &block(0, n)), Live::Done));
        assert_eq!(rig.live(5, &block(0, 5)), Live::Done);
        assert_eq!((rig.blocks(), rig.source.health()), (0, SourceHealth::EventsLost));
    }
}

#[test]
fn a_reset_by_the_engine_makes_a_degraded_source_exact_again() {
    for partition in PARTITIONS.map(shards) {
        let mut rig = Rig::new(false, partition);
        rig.live(0, &block(0, 0));
        rig.live(3, &block(0, 3));
        assert_eq!(rig.source.health(), SourceHealth::EventsLost);
        rig.live(4, &batch_at(2e9, vec![cleared()]));
        assert_eq!(rig.source.health(), SourceHealth::Exact);
    }
}

#[test]
fn a_sequence_that_goes_back_is_a_restart_and_nothing_old_survives() {
    for partition in PARTITIONS.map(shards) {
        let mut rig = Rig::new(false, partition);
        (0..5).for_each(|n| assert_eq!(rig.live(n, &block(0, n)), Live::Done));
        let epoch = rig.reader.epoch();
        assert_eq!(rig.live(0, &block(1, 0)), Live::Done);
        assert!(rig.reader.epoch() > epoch);
        assert_eq!((rig.blocks(), rig.source.health()), (1, SourceHealth::Exact));
        assert_eq!(rig.source.counts().restarts, 1);
    }
}

#[test]
fn the_same_message_twice_is_a_duplicate_and_not_a_restart() {
    for partition in PARTITIONS.map(shards) {
        let mut rig = Rig::new(false, partition);
        (0..3).for_each(|n| assert_eq!(rig.live(n, &block(0, n)), Live::Done));
        rig.live(1, &block(0, 1));
        assert_eq!((rig.blocks(), rig.source.counts().duplicates, rig.source.counts().restarts), (3, 1, 0));
    }
}

#[test]
fn a_restart_hidden_behind_a_reconnect_is_found_by_comparing_the_replay() {
    for partition in PARTITIONS.map(shards) {
        let mut rig = Rig::new(true, partition);
        rig.source.replayed(0, &[]);
        (0..5).for_each(|n| assert_eq!(rig.live(n, &block(0, n)), Live::Done));
        assert_eq!(rig.source.connected(), Some(0));
        // Another life whose sequence fits: 5 would be next.
        rig.source.replayed(0, &replay(1, 0..5));
        assert_eq!(rig.live(5, &block(1, 5)), Live::Done);
        assert_eq!(
            (rig.blocks(), rig.source.health(), rig.source.counts().restarts),
            (6, SourceHealth::Exact, 1)
        );
        assert!(!rig.source.mirror().owners().is_empty());
    }
}

#[test]
fn a_reconnect_to_the_same_life_costs_nothing() {
    for partition in PARTITIONS.map(shards) {
        let mut rig = Rig::new(true, partition);
        rig.source.replayed(0, &[]);
        (0..5).for_each(|n| assert_eq!(rig.live(n, &block(0, n)), Live::Done));
        let epoch = rig.reader.epoch();
        rig.source.connected();
        // What was published while away comes with the replay.
        rig.source.replayed(0, &replay(0, 2..8));
        rig.publish();
        assert_eq!((rig.reader.epoch(), rig.blocks(), rig.source.counts().restarts), (epoch, 8, 0));
    }
}

#[test]
fn a_reconnect_without_replay_is_not_trusted_even_if_the_sequence_fits() {
    for partition in PARTITIONS.map(shards) {
        let mut rig = Rig::new(false, partition);
        (0..5).for_each(|n| assert_eq!(rig.live(n, &block(0, n)), Live::Done));
        assert_eq!(rig.source.connected(), None);
        rig.live(5, &block(1, 5));
        assert_eq!((rig.blocks(), rig.source.health()), (0, SourceHealth::EventsLost));
    }
}

#[test]
fn joining_a_running_engine_is_said() {
    for partition in PARTITIONS.map(shards) {
        let mut rig = Rig::new(false, partition);
        rig.live(7, &block(0, 7));
        assert_eq!(rig.source.health(), SourceHealth::JoinedLate);
        let mut rig = Rig::new(true, partition);
        rig.source.replayed(0, &replay(0, 3..8));
        assert_eq!(rig.source.health(), SourceHealth::JoinedLate);
        let mut rig = Rig::new(true, partition);
        rig.source.replayed(0, &replay(0, 0..8));
        rig.publish();
        assert_eq!((rig.blocks(), rig.source.health()), (8, SourceHealth::Exact));
    }
}

#[test]
fn a_malformed_message_costs_itself_and_nothing_else() {
    for partition in PARTITIONS.map(shards) {
        let mut rig = Rig::new(false, partition);
        rig.live(0, &block(0, 0));
        rig.live(1, b"\x81nonsense");
        rig.live(2, &[]);
        rig.live(3, &block(0, 1));
        assert_eq!(rig.blocks(), 2);
        assert_eq!(rig.source.counts().undecodable, [("batch_shape", 1), ("empty", 1)]);
        assert_eq!((rig.source.counts().gaps, rig.source.health()), (0, SourceHealth::Undecodable));
    }
}

#[test]
fn an_unknown_parent_waits_and_is_linked_when_it_shows_up() {
    for partition in PARTITIONS.map(shards) {
        let mut rig = Rig::new(false, partition);
        rig.live(0, &block(0, 2));
        rig.live(1, &block(0, 1));
        assert_eq!(rig.source.mirror().unresolved_hashes(), 2);
        rig.live(2, &block(0, 0));
        assert_eq!((rig.blocks(), rig.source.mirror().unresolved_hashes()), (3, 0));
        assert_eq!(rig.source.mirror_counts().linked, 2);
    }
}

#[test]
fn unknown_parents_are_kept_up_to_the_bound_and_counted_beyond() {
    for partition in PARTITIONS.map(shards) {
        let mut rig = Rig::new(false, partition);
        let limits = MirrorLimits { unresolved: 3, ..MirrorLimits::default() };
        let config = SourceConfig {
            rank: Some(DpRank(0)),
            limits,
            partition,
            ..SourceConfig::new("m", InstanceId::new("a:1").unwrap())
        };
        rig.source = Source::new(config, 1).unwrap();
        (0..6).for_each(|n| assert_eq!(rig.live(n, &block(0, n + 1)), Live::Done));
        assert_eq!(rig.source.mirror().unresolved_hashes(), 3);
        assert_eq!(
            (rig.source.mirror_counts().over_limit, rig.source.health()),
            (3, SourceHealth::OverLimit)
        );
        // The three that were kept are linked; those beyond the bound never count.
        rig.live(6, &block(0, 0));
        assert_eq!(rig.blocks(), 4);
    }
}

#[test]
fn a_block_removed_twice_changes_nothing_the_second_time() {
    for partition in PARTITIONS.map(shards) {
        let mut rig = Rig::new(false, partition);
        rig.live(0, &block(0, 0));
        rig.live(1, &batch_at(2e9, vec![removed(&[1], Some("GPU"), None)]));
        rig.live(2, &batch_at(3e9, vec![removed(&[1], Some("GPU"), None)]));
        assert_eq!((rig.blocks(), rig.source.mirror_counts().unknown_removals), (0, 1));
        // And the next copy counts as one.
        rig.live(3, &block(0, 0));
        assert_eq!(rig.blocks(), 1);
    }
}

#[test]
fn a_known_hash_keeps_its_place_in_the_chain_whatever_a_later_event_says() {
    for partition in PARTITIONS.map(shards) {
        let mut rig = Rig::new(false, partition);
        rig.live(0, &block(0, 0));
        rig.live(1, &block(0, 1));
        let before = rig.reader.held();
        // The same hash under another parent and with other tokens.
        let event = StoredEvent { parent: None, tokens: vec![9; 4], ..block_event(0, 1) };
        rig.live(2, &batch_at(2e9, vec![event.map()]));
        assert_eq!(rig.reader.held(), before);
    }
}

#[test]
fn a_child_stored_right_after_a_reset_finds_the_parent_it_names() {
    for partition in PARTITIONS.map(shards) {
        let mut rig = Rig::new(false, partition);
        rig.live(0, &block(0, 0));
        rig.live(1, &batch_at(2e9, vec![cleared(), block_event(0, 1).map()]));
        // The parent is known but not held: the child counts, and alone it serves nothing.
        assert_eq!((rig.blocks(), rig.source.mirror().unresolved_hashes()), (1, 0));
        rig.live(2, &block(0, 0));
        assert_eq!(rig.blocks(), 2);
    }
}

#[test]
fn remaining_copies_are_believed_where_the_engine_says_them() {
    for partition in PARTITIONS.map(shards) {
        let mut rig = Rig::new(false, partition);
        rig.live(0, &block(0, 0));
        rig.live(1, &batch_at(2e9, vec![block_event(0, 0).map(), block_event(0, 0).map()]));
        let removal = |remaining: u32| {
            common::map(vec![
                ("type", "BlockRemoved".into()),
                ("block_hashes", rmpv::Value::Array(vec![1.into()])),
                ("medium", "GPU".into()),
                ("remaining_copy_counts", rmpv::Value::Array(vec![remaining.into()])),
            ])
        };
        rig.live(2, &batch_at(3e9, vec![removal(1)]));
        assert_eq!(rig.blocks(), 1);
        rig.live(3, &batch_at(4e9, vec![removal(0)]));
        assert_eq!(rig.blocks(), 0);
    }
}

#[test]
fn a_medium_that_never_announces_removals_expires_and_one_that_does_never() {
    for partition in PARTITIONS.map(shards) {
        const HOUR: u64 = 3_600_000_000_000;
        let on =
            |medium: &'static str, n: u64| StoredEvent { medium: Some(medium), ..block_event(0, n) }.map();
        let mut rig = Rig::new(false, partition);
        rig.live(0, &block(0, 0));
        rig.live(1, &batch_at(2e9, vec![on("STORAGE", 0), on("CPU", 0)]));
        assert_eq!(rig.blocks(), 3);
        // Half an hour later the store takes it in again, and the host tier shows that it announces removals.
        rig.clock = HOUR / 2;
        rig.publish();
        rig.live(2, &batch_at(3e9, vec![on("STORAGE", 0), removed(&[99], Some("CPU"), None)]));
        rig.clock = HOUR + HOUR / 4;
        rig.publish();
        assert_eq!(rig.blocks(), 3);
        rig.clock = HOUR * 2;
        rig.publish();
        assert_eq!((rig.blocks(), rig.source.mirror_counts().expired), (2, 1));
        assert!(!rig.reader.held().contains_key(&("STORAGE".to_owned(), 0)));
    }
}

#[test]
fn the_rank_is_taken_from_the_engine_until_the_first_frame() {
    for partition in PARTITIONS.map(shards) {
        let mut rig = Rig::new(false, partition);
        let with_rank = |rank: u32| {
            common::encode(&rmpv::Value::Array(vec![1e9.into(), rmpv::Value::Array(vec![]), rank.into()]))
        };
        rig.live(0, &with_rank(3));
        assert_eq!(rig.source.id().rank, DpRank(3));
        rig.live(1, &block(0, 0));
        assert_eq!(rig.source.counts().rank_mismatch, 0, "block() says rank 0 before anything was published");
        rig.live(2, &with_rank(5));
        assert_eq!((rig.source.id().rank, rig.source.counts().rank_mismatch), (DpRank(0), 1));
    }
}
