//! Odd but well-formed input, found by fuzzing: an index still gets a consistent account.

mod common;

use common::{Reader, StoredEvent, batch, batch_at, removed};
use kvatlas_proto::frame::FrameView;
use kvatlas_proto::{GroupKind, InstanceId};
use kvatlas_shim::event::{Batch, EngineHash, Stored};
use kvatlas_shim::source::{Live, Source, SourceConfig};
use rmpv::Value;

fn source() -> Source {
    let instance = InstanceId::new("a:1").unwrap();
    let config = SourceConfig { block_size: Some(4), ..SourceConfig::new("m", instance) };
    Source::new(config, 1).unwrap()
}

fn with(event: Value, name: &str, value: Value) -> Value {
    let Value::Map(mut pairs) = event else { panic!("a map event") };
    pairs.push((name.into(), value));
    Value::Map(pairs)
}

fn block(hash: u64, medium: &'static str) -> StoredEvent {
    StoredEvent {
        hashes: vec![hash],
        tokens: vec![hash as u32; 4],
        medium: Some(medium),
        ..StoredEvent::default()
    }
}

#[test]
fn the_last_of_all_sequences_is_followed_by_none() {
    let mut source = source();
    for (time, seq) in [(1.0, u64::MAX), (2.0, 0), (3.0, 1)] {
        let message = batch_at(time, vec![block(seq, "GPU").map()]);
        assert_eq!(source.live(seq, &message, false), Live::Done);
    }
    // 0 after the last one is another life, not the next message.
    assert_eq!((source.counts().restarts, source.mirror().visible_blocks()), (1, 2));
}

#[test]
fn a_window_of_no_tokens_does_not_unlearn_the_window() {
    let mut source = source();
    for (seq, window) in [(0, 8), (1, 0)] {
        let event = StoredEvent {
            group: Some(1),
            kind: Some("sliding_window"),
            window: Some(window),
            ..block(seq, "GPU")
        };
        source.live(seq, &batch_at(seq as f64, vec![event.map()]), false);
    }
    let frames = source.take_frames(2, true).unwrap();
    let view = FrameView::parse(&frames[0].frame).expect("a window without tokens would be refused");
    let window = GroupKind::SlidingWindow { window_tokens: 8, block_tokens: 4 };
    assert_eq!(view.header().owners[0].kind, window);
}

#[test]
fn a_medium_whose_name_is_cut_stays_one_owner() {
    const LONG: &str =
        "a-medium-with-a-name-that-is-far-longer-than-the-sixty-four-bytes-which-a-frame-keeps";
    let (mut source, mut reader) = (source(), Reader::default());
    let events = vec![block(1, LONG).map(), block(2, LONG).map(), removed(&[1], Some(LONG), None)];
    source.live(0, &batch(events), false);
    reader.follow(&mut source, 2, true);
    assert_eq!((source.mirror().owners().len(), source.mirror().visible_blocks()), (1, 1));
    assert_eq!(source.mirror_counts().unknown_removals, 0);
    assert_eq!(reader.blocks(), 1);
}

#[test]
fn media_that_an_index_cannot_tell_apart_are_one_owner() {
    let mut source = source();
    let remote = |event| with(event, "locality", "REMOTE".into());
    source.live(0, &batch(vec![block(1, "OBJ").map(), remote(block(1, "OBJ").map())]), false);
    source.live(1, &batch(vec![removed(&[1], Some("OBJ"), None)]), false);
    assert_eq!(source.mirror().owners().len(), 1);
    // Local and remote host memory are of two tiers.
    source.live(2, &batch(vec![block(2, "CPU").map(), remote(block(2, "CPU").map())]), false);
    assert_eq!(source.mirror().owners().len(), 3);
    // One copy of the first block is still there.
    assert_eq!((source.mirror().visible_blocks(), source.mirror_counts().unknown_removals), (3, 0));
}

#[test]
fn pairs_of_an_event_without_block_size_have_no_look_ahead() {
    let mut batch = Batch::default();
    batch.push_hash(EngineHash::from_bits(1));
    let mut event = Stored::of(0..1);
    batch.push_token(7);
    event.lookahead = 0..1;
    assert!(event.lookahead_of(&batch, 0).is_empty());
}
