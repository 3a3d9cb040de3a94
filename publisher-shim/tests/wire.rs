//! The vLLM dialect on the wire: both encodings, both kinds of hashes, and what is refused.

mod common;

use common::{StoredEvent, batch, cleared, encode, map, removed};
use kvatlas_shim::adapter::envelope::Envelope;
use kvatlas_shim::adapter::vllm::Vllm;
use kvatlas_shim::adapter::{Adapter, DecodeError, detect};
use kvatlas_shim::event::{Batch, EngineHash, Event, Stored};
use proptest::prelude::*;
use rmpv::Value;

fn decode(payload: &[u8]) -> Result<Batch, DecodeError> {
    let mut batch = Batch::default();
    Vllm.decode(payload, &mut batch).map(|()| batch)
}

fn stored(batch: &Batch) -> &Stored {
    match &batch.events[0] {
        Event::Stored(stored) => stored,
        other => panic!("expected a stored event, got {other:?}"),
    }
}

fn example() -> StoredEvent {
    StoredEvent {
        hashes: vec![7, 8],
        parent: Some(6),
        tokens: (100..108).collect(),
        ..StoredEvent::default()
    }
}

#[test]
fn array_and_map_forms_say_the_same() {
    for event in [example().map(), example().array()] {
        let batch = decode(&batch(vec![event, removed(&[7], Some("GPU"), None), cleared()])).unwrap();
        let stored = stored(&batch);
        assert_eq!(batch.hashes(&stored.hashes), [EngineHash::from_bits(7), EngineHash::from_bits(8)]);
        assert_eq!(stored.parent, Some(EngineHash::from_bits(6)));
        assert_eq!(batch.tokens(&stored.tokens), (100..108).collect::<Vec<u32>>());
        assert_eq!((stored.block_size, batch.text(&stored.medium)), (4, "GPU"));
        assert!(matches!(batch.events[1..], [Event::Removed(_), Event::Cleared]));
        assert_eq!((batch.rank, batch.time_ns), (Some(0), 1_795_168_931_500_000_000));
    }
}

#[test]
fn the_adapter_is_recognised_by_the_first_events_that_show_it() {
    let name = |events: Vec<Value>| detect(&batch(events)).map(Adapter::name);
    let with = |key: &'static str, value: Value| {
        let mut event = example().map();
        if let Value::Map(pairs) = &mut event {
            pairs.push((key.into(), value));
        }
        event
    };
    assert_eq!(name(vec![example().map()]), Some("vllm"));
    assert_eq!(name(vec![example().array()]), Some("vllm"));
    assert_eq!(name(vec![cleared(), with("cache_salt", "a".into())]), Some("sglang"));
    let signed =
        map(vec![("type", "BlockRemoved".into()), ("block_hashes", Value::Array(vec![(-5).into()]))]);
    assert_eq!(name(vec![example().map(), signed]), Some("sglang"));
    assert_eq!(name(vec![with("event_id", 1.into())]), Some("envelope"));
    assert_eq!(name(vec![cleared()]), None);
    assert!(detect(b"\xc1").is_none());
}

#[test]
fn an_envelope_says_each_hash_twice_and_counts_once() {
    let event = map(vec![
        ("event_id", 1.into()),
        ("event_type", "stored".into()),
        ("type", "BlockStored".into()),
        ("medium", "cpu".into()),
        ("seq_hashes", Value::Array(vec![u64::MAX.into()])),
        ("block_hashes", Value::Array(vec![(-1).into()])),
        ("parent_hash", 7.into()),
        ("token_ids", Value::Nil),
        ("block_size", Value::Nil),
        ("parent_block_hash", Value::Nil),
    ]);
    let mut decoded = Batch::default();
    Envelope.decode(&batch(vec![event]), &mut decoded).unwrap();
    let stored = stored(&decoded);
    assert_eq!(decoded.hashes(&stored.hashes), [EngineHash::from_bits(u64::MAX)]);
    assert_eq!(stored.parent, Some(EngineHash::from_bits(7)));
    assert_eq!(Envelope.first_seq(), 1);
}

#[test]
fn signed_hashes_are_the_unsigned_ones_and_bytes_stay_bytes() {
    let event =
        |hash: Value| map(vec![("type", "BlockRemoved".into()), ("block_hashes", Value::Array(vec![hash]))]);
    let hash = |value: Value| {
        let batch = decode(&batch(vec![event(value)])).unwrap();
        let Event::Removed(removed) = &batch.events[0] else { panic!("expected a removed event") };
        batch.hashes(&removed.hashes)[0]
    };
    assert_eq!(hash((-1i64).into()), hash(u64::MAX.into()));
    assert_ne!(hash(Value::Binary(vec![0; 32])), hash(0.into()));
    assert_eq!(hash(Value::Binary(vec![1; 32])), hash(Value::Binary(vec![1; 32])));
}

#[test]
fn unknown_events_keys_and_trailing_fields_are_skipped() {
    let mut longer = example().array();
    if let Value::Array(fields) = &mut longer {
        fields.extend((0..20).map(|i| Value::Array(vec![i.into()])).map(|v| map(vec![("new", v)])).skip(19));
    }
    let moved = map(vec![("type", "BlockMoved".into()), ("block_hashes", "not a list".into())]);
    let mut newer = example().map();
    if let Value::Map(pairs) = &mut newer {
        pairs.push(("ownership".into(), map(vec![("tier", 1.into())])));
    }
    let batch = decode(&batch(vec![moved, newer])).unwrap();
    assert_eq!((batch.events.len(), batch.unknown_events), (1, 1));
}

#[test]
fn extra_keys_of_every_known_shape_are_kept_by_block() {
    let mut event = example().map();
    if let Value::Map(pairs) = &mut event {
        let first = Value::Array(vec![
            "adapter".into(),
            Value::Array(vec!["image".into(), (-3).into()]),
            "salt".into(),
            Value::Binary(vec![9]),
        ]);
        pairs.push(("extra_keys".into(), Value::Array(vec![first, Value::Nil])));
    }
    let batch = decode(&batch(vec![event])).unwrap();
    let extras = batch.extras(stored(&batch).extras.as_ref().unwrap());
    assert_eq!(extras.len(), 4);
    assert!(extras.iter().all(|extra| extra.block == 0));
}

#[test]
fn bigram_pairs_are_tokens_with_a_look_ahead_of_one() {
    let pairs = (0..8u32).map(|i| Value::Array(vec![i.into(), (i + 1).into()])).collect();
    let event = map(vec![
        ("type", "BlockStored".into()),
        ("block_hashes", Value::Array(vec![1.into(), 2.into()])),
        ("parent_block_hash", Value::Nil),
        ("token_ids", Value::Array(pairs)),
        ("block_size", 4.into()),
    ]);
    let batch = decode(&batch(vec![event])).unwrap();
    let stored = stored(&batch);
    assert_eq!(batch.tokens(&stored.tokens), [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!((stored.lookahead_of(&batch, 0), stored.lookahead_of(&batch, 1)), (&[4][..], &[8][..]));
}

#[test]
fn malformed_messages_are_refused_with_a_reason() {
    let reason = |payload: &[u8]| decode(payload).unwrap_err().reason();
    let events = |events: Vec<Value>| batch(events);
    let whole = events(vec![example().map()]);
    assert_eq!(reason(&[]), "empty");
    assert_eq!(reason(&whole[..whole.len() - 5]), "truncated");
    assert_eq!(reason(&[0x92, 0xc1, 0xc0]), "reserved_byte");
    assert_eq!(reason(&encode(&map(vec![("ts", 1.into())]))), "batch_shape");
    assert_eq!(reason(&encode(&Value::Array(vec![1.0.into()]))), "batch_shape");
    assert_eq!(reason(&events(vec![map(vec![("block_hashes", Value::Array(vec![]))])])), "event_type");
    assert_eq!(reason(&events(vec![Value::Array(vec![])])), "event_type");
    let text = map(vec![("type", "BlockRemoved".into()), ("block_hashes", "12".into())]);
    assert_eq!(reason(&events(vec![text])), "field_type");
    let short = Value::Array(vec!["BlockStored".into(), Value::Array(vec![1.into()]), Value::Nil]);
    assert_eq!(reason(&events(vec![short])), "missing_field");
    assert_eq!(reason(&[whole.clone(), vec![0]].concat()), "trailing_bytes");
    // An array that claims four billion elements in ten bytes.
    assert_eq!(reason(&[0x92, 0xcb, 0, 0, 0, 0, 0, 0, 0, 0, 0xdd, 0xff, 0xff, 0xff, 0xff]), "truncated");
    let mut deep = vec![0x93, 0xc0, 0x91, 0x82, 0xa4];
    deep.extend_from_slice(b"type");
    deep.extend_from_slice(&[0xa1, b'x', 0xa1, b'y']);
    deep.extend(std::iter::repeat_n(0x91, 1 << 20));
    assert_eq!(reason(&deep), "too_deep");
}

proptest! {
    #[test]
    fn no_bytes_make_the_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = decode(&bytes);
    }

    #[test]
    fn damaged_messages_are_decoded_or_refused_without_panic(
        at in any::<proptest::sample::Index>(), byte in any::<u8>(),
    ) {
        let mut payload = batch(vec![example().map(), example().array(), removed(&[1], None, Some(1))]);
        let at = at.index(payload.len());
        payload[at] = byte;
        let _ = decode(&payload);
    }
}
