//! Redacted messages: the same structure, none of the content.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use kvatlas_proto::{DpRank, InstanceId, KeyHasher};
use kvatlas_shim::source::{Source, SourceConfig};

use super::*;
use crate::kvrec::{Record, RecordKind, Recording};
use crate::oracle::Oracle;

/// Recordings that differ in what they carry: every kind of extra key, both event forms, byte and signed hashes, tiers,
/// groups, gaps, malformed messages.
const RECORDINGS: [&str; 10] = [
    "vllm0300_mixed",
    "vllm0330_extra_keys",
    "vllm0221_extra_keys",
    "vllm0112_mixed",
    "vllm0330_dp2_bytes",
    "vllm0330_hybrid_swa",
    "vllm0330_offload_placeholder",
    "vllm0330_gap_replay",
    "sglang0523_namespaces_dynamo",
    "synthetic_wire_formats",
];

fn recording(name: &str) -> Recording {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fixtures/{name}.kvrec.zst"));
    Recording::read(&path).unwrap()
}

fn redactor() -> Redactor {
    Redactor::new(&[7; KEY_BYTES])
}

/// As the recorder does it.
fn redacted(recording: &Recording) -> Recording {
    let mut redactor = redactor();
    let redact = |record: &Record| {
        let mut record = record.clone();
        match record.kind {
            RecordKind::Live => record.frames = redactor.live(&record.frames),
            RecordKind::ReplayReply => {
                let payload = record.frames.last_mut().unwrap();
                *payload = redactor.payload(payload);
            }
            RecordKind::ReplayRequest | RecordKind::Marker => {}
        }
        record
    };
    Recording { header: recording.header.clone(), records: recording.records.iter().map(redact).collect() }
}

fn decode(payload: &[u8]) -> Option<Value> {
    rmpv::decode::read_value(&mut &payload[..]).ok()
}

fn encode(value: &Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    rmpv::encode::write_value(&mut bytes, value).unwrap();
    bytes
}

fn map(fields: Vec<(&str, Value)>) -> Value {
    Value::Map(fields.into_iter().map(|(name, value)| (Value::from(name), value)).collect())
}

fn ints(values: &[i64]) -> Value {
    Value::Array(values.iter().copied().map(Value::from).collect())
}

fn batch(event: Value) -> Value {
    Value::Array(vec![Value::F64(1.5), Value::Array(vec![event]), Value::from(0)])
}

/// The event after redaction.
fn event_of(redactor: &mut Redactor, event: Value) -> Value {
    let redacted = decode(&redactor.payload(&encode(&batch(event)))).unwrap();
    assert_eq!((&redacted[0], &redacted[2]), (&Value::F64(1.5), &Value::from(0)));
    redacted[1][0].clone()
}

/// The events of all readable payloads, in order.
fn events(recording: &Recording) -> Vec<Value> {
    let payloads = recording.records.iter().filter_map(|record| Some(record.message()?.payload));
    let batches = payloads.filter_map(|payload| decode(payload));
    batches.filter_map(|batch| batch.as_array()?.get(1)?.as_array().cloned()).flatten().collect()
}

fn field<'a>(event: &'a Value, name: &str, position: usize) -> Option<&'a Value> {
    match event {
        Value::Map(fields) => {
            fields.iter().find(|(key, _)| key.as_str() == Some(name)).map(|(_, value)| value)
        }
        Value::Array(items) => items.get(position),
        _ => None,
    }
}

/// Hashes of an event as truth files spell them.
fn hashes(event: &Value) -> Vec<String> {
    let hashes = field(event, "block_hashes", 1).and_then(Value::as_array).into_iter().flatten();
    let hex = |bytes: &[u8]| {
        let nibbles = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
        nibbles.filter_map(|nibble| char::from_digit(nibble.into(), 16)).collect::<String>()
    };
    hashes
        .filter_map(|hash| match hash {
            Value::Integer(number) => {
                let bits = number.as_u64().or_else(|| number.as_i64().map(i64::cast_unsigned))?;
                Some(hex(&bits.to_be_bytes()))
            }
            Value::Binary(bytes) => Some(hex(bytes)),
            _ => None,
        })
        .collect()
}

/// Every token id, in the order written; pairs and look-ahead lists flattened.
fn tokens(value: &Value, into: &mut Vec<u64>) {
    match value {
        Value::Integer(number) => into.extend(number.as_u64()),
        Value::Array(items) => items.iter().for_each(|item| tokens(item, into)),
        _ => {}
    }
}

/// Every string below a value.
fn strings<'a>(value: &'a Value, into: &mut HashSet<&'a str>) {
    match value {
        Value::String(text) => into.extend(text.as_str()),
        Value::Array(items) => items.iter().for_each(|item| strings(item, into)),
        Value::Map(pairs) => pairs.iter().for_each(|(key, value)| {
            strings(key, into);
            strings(value, into);
        }),
        _ => {}
    }
}

/// What the shim makes of one stream's live messages.
fn shim_view(recording: &Recording, stream: u8) -> String {
    let config = SourceConfig {
        rank: Some(DpRank(u32::from(stream))),
        ..SourceConfig::new("m", InstanceId::new("a:1").unwrap())
    };
    let mut source = Source::new(config, 1).unwrap();
    for record in recording.records.iter().filter(|record| record.stream == stream) {
        if let (RecordKind::Live, Ok((seq, payload))) = (record.kind, parse_live(&record.frames)) {
            source.live(seq, payload, false);
        }
    }
    let mut counts = source.counts().clone();
    // Why a message is refused may differ; that it is, may not.
    let refused: u64 = counts.undecodable.drain(..).map(|(_, count)| count).sum();
    let mirror = source.mirror();
    format!(
        "{} blocks, {} unresolved, {refused} refused, {:?}, {counts:?}, {:?}, {:?}",
        mirror.visible_blocks(),
        mirror.unresolved_hashes(),
        source.health(),
        source.mirror_counts(),
        mirror.owners(),
    )
}

#[test]
fn the_shim_sees_the_same_structure_in_a_redacted_recording() {
    for name in RECORDINGS {
        let original = recording(name);
        let redacted = redacted(&original);
        for stream in 0..original.header.streams.len() as u8 {
            assert_eq!(shim_view(&redacted, stream), shim_view(&original, stream), "{name} stream {stream}");
        }
    }
}

/// A key names a block and everything before it: a one-to-one map between keys says that all prefixes are as before.
#[test]
fn prefixes_are_related_as_before() {
    let mut compared = 0;
    for name in RECORDINGS {
        let original = recording(name);
        let redacted = redacted(&original);
        let [before, after] = [&original, &redacted].map(|r| Oracle::read(r, &KeyHasher::default()));
        for stream in 0..original.header.streams.len() as u8 {
            let [before, after] = [&before, &after].map(|oracle| oracle.stream(stream).unwrap());
            assert_eq!((before.len(), before.counts()), (after.len(), after.counts()), "{name}");
            let of_stream = |recording: &Recording| {
                let mut recording = recording.clone();
                recording.records.retain(|record| record.stream == stream);
                events(&recording).iter().flat_map(hashes).collect::<Vec<_>>()
            };
            let (mut there, mut back) = (HashMap::new(), HashMap::new());
            for (old, new) in of_stream(&original).iter().zip(of_stream(&redacted)) {
                let (old_key, new_key) = (before.get(old).map(|d| d.key), after.get(&new).map(|d| d.key));
                assert_eq!(old_key.is_some(), new_key.is_some(), "{name}");
                if let (Some(old_key), Some(new_key)) = (old_key, new_key) {
                    assert_eq!(*there.entry(old_key).or_insert(new_key), new_key, "{name}");
                    assert_eq!(*back.entry(new_key).or_insert(old_key), old_key, "{name}");
                    compared += 1;
                }
            }
        }
    }
    assert!(compared > 1_000, "{compared}");
}

#[test]
fn no_sequence_of_tokens_no_hash_and_no_name_survives() {
    /// Token ids in a row that say something; single ids do occur, standing for others.
    const RUN: usize = 4;
    for name in RECORDINGS {
        let original = recording(name);
        let redacted = redacted(&original);
        let [before, after] = [&original, &redacted].map(events);
        let runs = |events: &[Value]| -> HashSet<Vec<u64>> {
            let mut all = Vec::new();
            for (field_name, position) in [("token_ids", 3), ("lookahead_token_ids", 15)] {
                events
                    .iter()
                    .filter_map(|event| field(event, field_name, position))
                    .for_each(|v| tokens(v, &mut all));
            }
            // Zeros stand for embeddings, and repeat as what replaces them does.
            all.windows(RUN).filter(|run| run.iter().any(|id| *id != run[0])).map(<[u64]>::to_vec).collect()
        };
        assert!(runs(&before).is_disjoint(&runs(&after)), "{name}");
        let all_hashes = |events: &[Value]| events.iter().flat_map(hashes).collect::<HashSet<_>>();
        assert!(all_hashes(&before).is_disjoint(&all_hashes(&after)), "{name}");

        let bytes: Vec<u8> =
            redacted.records.iter().flat_map(|r| r.frames.iter().flatten()).copied().collect();
        let mut names = HashSet::new();
        for event in &before {
            for (name, position) in
                [("lora_name", 7), ("extra_keys", 8), ("cache_salt", 99), ("session_id", 14)]
            {
                field(event, name, position).into_iter().for_each(|value| strings(value, &mut names));
            }
        }
        for needle in names.into_iter().filter(|name| name.len() > 3) {
            let found = bytes.windows(needle.len()).any(|window| window == needle.as_bytes());
            assert!(!found, "{name}: {needle}");
        }
    }
}

#[test]
fn nothing_readable_of_a_prompt_is_left_in_the_bytes() {
    let original = recording("vllm0300_mixed");
    let mut redactor = redactor();
    let mut needles = HashSet::new();
    for event in events(&original) {
        if let Some(ids) = field(&event, "token_ids", 3).and_then(Value::as_array) {
            needles.extend(ids.chunks_exact(8).map(|ids| ids.iter().flat_map(encode).collect::<Vec<u8>>()));
        }
    }
    assert!(needles.len() > 100);
    let longest = needles.iter().map(Vec::len).max().unwrap();
    for record in original.records.iter().filter(|record| record.kind == RecordKind::Live) {
        let payload = &redactor.live(&record.frames)[2];
        for length in 8..=longest {
            assert!(payload.windows(length).all(|window| !needles.contains(window)));
        }
    }
}

#[test]
fn equal_stays_equal_within_a_recording_and_not_between_recordings() {
    let event = |salt: &str| map(vec![("type", "BlockStored".into()), ("cache_salt", salt.into())]);
    let (mut one, mut other) = (redactor(), Redactor::new(&[8; KEY_BYTES]));
    let first = event_of(&mut one, event("tenant-a"));
    assert_eq!(event_of(&mut one, event("tenant-a")), first);
    assert_ne!(event_of(&mut one, event("tenant-b")), first);
    assert_ne!(event_of(&mut other, event("tenant-a")), first);
    assert_ne!(one.token(5), other.token(5));
}

#[test]
fn tokens_and_hashes_are_permuted_and_hashes_keep_their_sign() {
    let mut redactor = redactor();
    let tokens: HashSet<u32> = (0..5_000).map(|token| redactor.token(token)).collect();
    assert_eq!(tokens.len(), 5_000);
    let mut handles = HashSet::new();
    for number in (0..2_000i64).flat_map(|number| [number, -1 - number]) {
        let stand_in = redactor.handle(number.into());
        assert_eq!(stand_in.as_u64().is_none(), number < 0, "{number}");
        assert!(
            handles.insert(stand_in.as_u64().unwrap_or_else(|| stand_in.as_i64().unwrap().cast_unsigned()))
        );
    }
    let large = redactor.handle(u64::MAX.into());
    assert!(large.as_u64().is_some_and(|bits| bits >> 63 == 1));
}

#[test]
fn the_adapter_among_the_extra_keys_is_still_the_adapter_and_offsets_stay() {
    let extra = Value::Array(vec![
        "tenant's adapter".into(),
        "salt".into(),
        Value::Array(vec!["image-1".into(), Value::from(-3)]),
        Value::Binary(vec![1; 32]),
    ]);
    let event = map(vec![
        ("type", "BlockStored".into()),
        ("lora_name", "tenant's adapter".into()),
        ("extra_keys", Value::Array(vec![extra, Value::Nil])),
        ("medium", "GPU".into()),
    ]);
    let redacted = event_of(&mut redactor(), event);
    let keys = field(&redacted, "extra_keys", 0).unwrap();
    assert_eq!(Some(&keys[0][0]), field(&redacted, "lora_name", 0));
    assert_eq!(keys[0][2][1], Value::from(-3));
    assert!(keys[0][3].as_slice().is_some_and(|bytes| bytes.len() == 32 && bytes != [1; 32]));
    assert!(keys[1].is_nil());
    assert_eq!(field(&redacted, "medium", 0), Some(&"GPU".into()));
    for text in [&keys[0][0], &keys[0][1], &keys[0][2][0]] {
        assert!(text.as_str().unwrap().bytes().all(|byte| byte.is_ascii_hexdigit()), "{text}");
    }
}

#[test]
fn arrays_are_treated_as_maps_are() {
    let array = Value::Array(vec![
        "BlockStored".into(),
        ints(&[11]),
        Value::from(12),
        ints(&[1, 2]),
        Value::from(2),
        Value::from(4),
        "GPU".into(),
        "adapter".into(),
    ]);
    let names = [
        "type",
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
        "lora_name",
    ];
    let fields = names.into_iter().zip(array.as_array().unwrap().clone()).collect();
    let mut redactor = redactor();
    let (array, map) = (event_of(&mut redactor, array.clone()), event_of(&mut redactor, map(fields)));
    for (position, name) in names.into_iter().enumerate() {
        assert_eq!(field(&array, "", position), field(&map, name, 0), "{name}");
    }
    assert_eq!((&array[4], &array[5]), (&Value::from(2), &Value::from(4)));
}

#[test]
fn what_is_not_known_is_replaced() {
    let secret = || {
        Value::Array(vec!["secret".into(), Value::from(42), Value::F64(0.25), map(vec![("k", "v".into())])])
    };
    let unknown = map(vec![
        ("type", "BlockDreamt".into()),
        ("prompt", secret()),
        ("my secret name", Value::Nil),
        ("medium", "disk of Mr Smith".into()),
        ("block_size", "secret".into()),
    ]);
    let payload = redactor().payload(&encode(&batch(unknown)));
    for needle in [&b"secret"[..], b"Smith", &0.25f64.to_be_bytes()] {
        assert!(payload.windows(needle.len()).all(|window| window != needle));
    }
    let event = &decode(&payload).unwrap()[1][0];
    assert_eq!(field(event, "type", 0), Some(&"BlockDreamt".into()));
    assert!(
        field(event, "prompt", 0).unwrap()[1].is_u64() && field(event, "prompt", 0).unwrap()[1] != 42.into()
    );
    // Also where there is no batch at all.
    assert_eq!(
        decode(&redactor().payload(&encode(&map(vec![("secret", 1.into())]))))
            .unwrap()
            .as_map()
            .unwrap()
            .len(),
        1
    );
}

#[test]
fn payloads_that_cannot_be_read_keep_only_their_place() {
    let mut redactor = redactor();
    let trailing = [encode(&batch(Value::Nil)), b"secret".to_vec()].concat();
    let deep = vec![0x91; 1_000];
    let large = vec![0xc0; MAX_PAYLOAD_BYTES + 1];
    let seq = Bytes::copy_from_slice(&9u64.to_be_bytes());
    for payload in [b"\xd9\x20secret".to_vec(), trailing, deep, large] {
        let frames = redactor.live(&[Bytes::new(), seq.clone(), payload.into()]);
        assert_eq!(frames, [&b""[..], &seq, UNREADABLE]);
    }
    assert_eq!(redactor.payload(b""), b""[..]);
    assert_eq!(redactor.counts(), RedactionCounts { unreadable_payloads: 4, malformed_messages: 0 });
}

#[test]
fn messages_of_another_shape_keep_only_their_number_of_frames() {
    let mut redactor = redactor();
    let frame = || Bytes::from_static(b"secret");
    for frames in [vec![frame()], vec![frame(); 3], vec![frame(); 4]] {
        assert_eq!(redactor.live(&frames), vec![Bytes::new(); frames.len()]);
    }
    assert_eq!(redactor.counts().malformed_messages, 3);
}

#[test]
fn topics_are_replaced_and_the_empty_one_stays() {
    let mut redactor = redactor();
    let seq = Bytes::copy_from_slice(&0u64.to_be_bytes());
    let mut topic =
        |topic: &'static str| redactor.live(&[Bytes::from(topic), seq.clone(), Bytes::new()])[0].clone();
    assert!(topic("").is_empty());
    let long = topic("kv@10.1.2.3:8000@customer/model");
    assert_eq!((long.len(), topic("kv@10.1.2.3:8000@customer/model")), (32, long));
}
