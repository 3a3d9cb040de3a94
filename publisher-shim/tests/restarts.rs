//! A source over the restart of its shim: one test per rule of `state.rs`.

mod common;

use bytes::Bytes;
use common::engine::{BLOCK, Engine, Step, any_partition, any_step};
use common::{Reader, StoredEvent, batch_at, shards};
use kvatlas_proto::sealed::PREAMBLE_BYTES;
use kvatlas_proto::{DpRank, InstanceId, KeyHasher, KeySeed, Partition};
use kvatlas_shim::adapter::adapter;
use kvatlas_shim::mirror::{MirrorLimits, RemovalPolicy};
use kvatlas_shim::source::{Live, Source, SourceConfig};
use kvatlas_shim::state::RestoreStateError;
use proptest::prelude::*;

fn config() -> SourceConfig {
    SourceConfig {
        has_replay: true,
        endpoint: "tcp://a:5557".to_owned(),
        ..SourceConfig::new("m", InstanceId::new("a:1").unwrap())
    }
}

/// One-block messages of one chain.
fn messages(life: u64, count: u64) -> Vec<(u64, Bytes)> {
    let message = |n: u64| {
        let event = StoredEvent {
            hashes: vec![life * 1_000 + n + 1],
            parent: (n > 0).then_some(life * 1_000 + n),
            tokens: vec![n as u32; 4],
            ..StoredEvent::default()
        };
        (n, Bytes::from(batch_at((life * 100 + n) as f64, vec![event.map()])))
    };
    (0..count).map(message).collect()
}

/// A source that applied these messages and published everything.
fn played(config: SourceConfig, messages: &[(u64, Bytes)], reader: &mut Reader) -> Source {
    let mut source = Source::new(config, 10).unwrap();
    source.replayed(0, &[]);
    for (seq, payload) in messages {
        assert_eq!(source.live(*seq, payload, false), Live::Done);
    }
    reader.follow(&mut source, 11, true);
    source
}

fn saved(source: &Source) -> Vec<u8> {
    source.save().unwrap().unwrap()
}

#[test]
fn what_was_saved_counts_for_nothing_until_the_replay_shows_the_same_life() {
    let (all, mut reader) = (messages(0, 8), Reader::default());
    let source = played(config(), &all[..5], &mut reader);
    let mut restored = Source::restore(config(), &saved(&source), 20).unwrap();
    assert!(restored.is_unproved() && restored.save().unwrap().is_none());
    assert!(restored.take_frames(21, true).unwrap().is_empty());
    let mut request = reader.lanes[0].request(1);
    request.epoch = restored.epoch();
    assert!(restored.answer(&request).unwrap().is_empty());
    assert_eq!(restored.connected(), Some(0));
    restored.replayed(0, &all[3..]);
    assert!(!restored.is_unproved());
    // Who has what was published before needs no transfer: the new epoch begins where the old one ended.
    reader.follow(&mut restored, 22, true);
    assert_eq!((reader.blocks(), reader.repairs, restored.counts().restarts), (8, 0, 0));
}

#[test]
fn an_engine_that_restarted_while_the_shim_was_down_inherits_nothing() {
    let mut reader = Reader::default();
    let bytes = saved(&played(config(), &messages(0, 5), &mut reader));
    for replay in [messages(1, 9), messages(1, 3), vec![]] {
        let (mut reader, mut restored) = (reader.clone(), Source::restore(config(), &bytes, 20).unwrap());
        restored.connected();
        restored.replayed(0, &replay);
        reader.follow(&mut restored, 21, true);
        assert_eq!((reader.blocks(), restored.counts().restarts), (replay.len(), 1));
    }
}

#[test]
fn a_replay_that_no_longer_reaches_back_proves_nothing() {
    let (all, mut reader) = (messages(0, 9), Reader::default());
    let bytes = saved(&played(config(), &all[..5], &mut reader));
    let mut restored = Source::restore(config(), &bytes, 20).unwrap();
    restored.connected();
    restored.replayed(0, &all[6..]);
    reader.follow(&mut restored, 21, true);
    assert_eq!((reader.blocks(), reader.health.as_str()), (0, "events_lost"));
}

#[test]
fn an_engine_that_does_not_answer_proves_nothing() {
    let (all, mut reader) = (messages(0, 6), Reader::default());
    let bytes = saved(&played(config(), &all[..5], &mut reader));
    let mut restored = Source::restore(config(), &bytes, 20).unwrap();
    restored.connected();
    let (seq, payload) = &all[5];
    assert_eq!(restored.live(*seq, payload, false), Live::Replay { from: 0 });
    assert_eq!(restored.live(*seq, payload, true), Live::Done);
    reader.follow(&mut restored, 21, true);
    assert_eq!((reader.blocks(), reader.health.as_str()), (0, "events_lost"));
}

#[test]
fn without_a_replay_socket_only_the_epoch_is_taken_over() {
    let mut reader = Reader::default();
    let source = played(config(), &messages(0, 5), &mut reader);
    let without = SourceConfig { has_replay: false, block_size: None, ..config() };
    let restored = Source::restore(without, &saved(&source), 0).unwrap();
    assert_eq!((restored.mirror().visible_blocks(), restored.last_engine_seq()), (0, None));
    assert!(restored.epoch() > source.epoch());
}

#[test]
fn the_epoch_is_newer_whatever_the_clock_says() {
    let mut reader = Reader::default();
    let source = played(config(), &messages(0, 5), &mut reader);
    for now in [0, 20] {
        let restored = Source::restore(config(), &saved(&source), now).unwrap();
        assert!(restored.epoch() > source.epoch());
    }
}

#[test]
fn there_is_nothing_to_save_before_the_block_size_is_known() {
    assert!(Source::new(config(), 1).unwrap().save().unwrap().is_none());
}

#[test]
fn what_was_written_for_another_source_or_other_settings_is_refused_by_name() {
    let mut reader = Reader::default();
    let bytes = saved(&played(config(), &messages(0, 5), &mut reader));
    let limits = MirrorLimits { store_only_ttl_ns: 5, ..MirrorLimits::default() };
    let others = [
        ("model", SourceConfig { model: "n".to_owned(), ..config() }),
        ("tenant", SourceConfig { tenant: "t".to_owned(), ..config() }),
        ("instance", SourceConfig { instance: InstanceId::new("b:1").unwrap(), ..config() }),
        ("endpoint", SourceConfig { endpoint: "tcp://b:5557".to_owned(), ..config() }),
        ("key seed", SourceConfig { hasher: KeyHasher::new(KeySeed::secret(1)), ..config() }),
        ("removal policy", SourceConfig { removal: RemovalPolicy::LastCopy, ..config() }),
        ("block size", SourceConfig { block_size: Some(4), ..config() }),
        ("number of shards", SourceConfig { partition: shards(2), ..config() }),
        ("lifetime on media that announce no removals", SourceConfig { limits, ..config() }),
        ("rank", SourceConfig { rank: Some(DpRank(3)), ..config() }),
        ("adapter", SourceConfig { adapter: adapter("sglang"), ..config() }),
    ];
    for (expected, other) in others {
        match Source::restore(other, &bytes, 20) {
            Err(error @ RestoreStateError::Foreign { what }) => {
                assert_eq!((what, error.reason()), (expected, "foreign"));
            }
            other => panic!("{expected}: {:?}", other.map(|_| ())),
        }
    }
    let small = MirrorLimits { hashes: 3, ..MirrorLimits::default() };
    let error = Source::restore(SourceConfig { limits: small, ..config() }, &bytes, 20).err().unwrap();
    assert_eq!(error.reason(), "over_limit");
}

#[test]
fn every_truncation_and_every_flipped_bit_is_refused() {
    let mut reader = Reader::default();
    let bytes = saved(&played(config(), &messages(0, 3), &mut reader));
    assert!(Source::restore(config(), &bytes, 20).is_ok());
    for end in 0..bytes.len() {
        assert!(Source::restore(config(), &bytes[..end], 20).is_err(), "cut at {end}");
    }
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let error = Source::restore(config(), &damaged, 20).err();
        let reason = error.unwrap_or_else(|| panic!("bit {bit}")).reason();
        let expected = match bit / 8 {
            0..4 => "foreign",
            4..6 => "version",
            _ => "damaged",
        };
        assert_eq!(reason, expected, "bit {bit}");
    }
    // What follows the end is damage too.
    let longer = [&bytes[..], &[0]].concat();
    assert!(Source::restore(config(), &longer, 20).is_err());
    assert!(bytes.len() > PREAMBLE_BYTES);
}

/// What happens between two steps of the engine.
#[derive(Clone, Copy, Debug)]
enum Event {
    Nothing,
    /// The state is saved.
    Save,
    /// The shim dies and comes back with what it saved last.
    Kill,
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![4 => Just(Event::Nothing), 2 => Just(Event::Save), 2 => Just(Event::Kill)]
}

/// Messages of the engine's life; the newest `buffer` can be replayed.
struct Sent {
    buffer: usize,
    messages: Vec<(u64, Bytes)>,
}

impl Sent {
    fn from(&self, seq: u64) -> Vec<(u64, Bytes)> {
        let kept = &self.messages[self.messages.len().saturating_sub(self.buffer)..];
        kept.iter().filter(|(at, _)| *at >= seq).cloned().collect()
    }
}

fn run(
    (partition, lead): (Partition, usize),
    buffer: usize,
    steps: &[(Step, Event)],
) -> Result<(), TestCaseError> {
    let config = || SourceConfig { block_size: Some(BLOCK as u32), partition, ..config() };
    let (mut engine, mut reader) = (Engine::deep(lead), Reader::new(partition));
    let mut source = Source::new(config(), 1).unwrap();
    // The saved state with the life and the messages that it had seen.
    let (mut sent, mut saved) = (Sent { buffer, messages: Vec::new() }, None);
    let mut exact = true;
    for (number, (step, event)) in steps.iter().enumerate() {
        let now = number as u64 + 2;
        if matches!(step, Step::Restart) {
            sent.messages.clear();
            exact = true;
        }
        for value in engine.step(step) {
            engine.time += 1.0;
            let payload = Bytes::from(batch_at(engine.time, vec![value]));
            sent.messages.push((engine.seq, payload.clone()));
            if let Live::Replay { from } = source.live(engine.seq, &payload, false) {
                source.replayed(from, &sent.from(from));
                prop_assert_eq!(source.live(engine.seq, &payload, true), Live::Done);
            }
            engine.seq += 1;
        }
        match *event {
            Event::Nothing => {}
            Event::Save => saved = Some((source.save().unwrap().unwrap(), engine.life, engine.seq, exact)),
            Event::Kill => {
                let kept = sent.from(0);
                // A cold start is exact if the replay has everything; a warm one if it goes on where the state ends.
                let first = kept.first().map_or(engine.seq, |(seq, _)| *seq);
                exact = first == 0;
                source = match &saved {
                    None => Source::new(config(), now).unwrap(),
                    Some((bytes, life, next, was_exact)) => {
                        exact |= *was_exact && *life == engine.life && first < *next;
                        Source::restore(config(), bytes, now).unwrap()
                    }
                };
                source.connected();
                source.replayed(0, &kept);
            }
        }
        reader.follow(&mut source, now, number % 3 == 0);
        let truth = engine.truth();
        if exact {
            prop_assert_eq!(&reader.held(), &truth, "after step {}", number + 1);
        }
        for (owner, keys) in &reader.held() {
            let held = truth.get(owner).cloned().unwrap_or_default();
            prop_assert!(keys.is_subset(&held), "after step {} there is too much", number + 1);
        }
        engine.check_places(partition, &reader);
        if matches!(step, Step::Clear) {
            exact = true;
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn a_source_that_died_and_came_back_is_as_if_it_had_never_stopped_or_claims_less(
        cut in any_partition(),
        buffer in prop_oneof![1..40usize, Just(usize::MAX)],
        steps in proptest::collection::vec((any_step(), any_event()), 1..60)
    ) {
        run(cut, buffer, &steps)?;
    }
}
