//! Tests of the oracle: small hand-built payloads, then the recordings.

use std::path::Path;

use kvatlas_proto::keys::{KeyVariant, PromptExtras};
use rmpv::Value;

use super::*;
use crate::kvrec::Recording;
use crate::truth::{Truth, find_truth};

fn nil() -> Value {
    Value::Nil
}

fn ints(values: impl IntoIterator<Item = i64>) -> Value {
    Value::Array(values.into_iter().map(Value::from).collect())
}

fn map(fields: Vec<(&str, Value)>) -> Value {
    Value::Map(fields.into_iter().map(|(name, value)| (Value::from(name), value)).collect())
}

/// A plain stored event in map form, block size 2; `more` adds or overrides nothing but appends.
fn stored(parent: Value, hashes: Value, tokens: Value, more: Vec<(&str, Value)>) -> Value {
    let mut fields = vec![
        ("type", Value::from("BlockStored")),
        ("block_hashes", hashes),
        ("parent_block_hash", parent),
        ("token_ids", tokens),
        ("block_size", Value::from(2)),
    ];
    fields.extend(more);
    map(fields)
}

fn read(events: Vec<Value>) -> StreamKeys {
    let batch = Value::Array(vec![Value::F64(1.0), Value::Array(events), Value::from(0)]);
    let mut payload = Vec::new();
    rmpv::encode::write_value(&mut payload, &batch).unwrap();
    let mut keys = StreamKeys::default();
    keys.read_payload(&payload, &KeyHasher::default());
    keys
}

fn keys_of(tokens: &[u32], extras: &PromptExtras) -> Vec<BlockKey> {
    let mut keys = Vec::new();
    KeyHasher::default().chain_into(tokens, 2, extras, KeyVariant::default(), &mut keys);
    keys
}

fn key(keys: &StreamKeys, hash: &str) -> Option<BlockKey> {
    keys.get(hash).map(|defined| defined.key)
}

const ONE: &str = "0000000000000001";
const TWO: &str = "0000000000000002";

#[test]
fn a_chain_over_two_events_has_the_keys_of_the_prompt() {
    let keys = read(vec![
        stored(nil(), ints([1]), ints([10, 11]), vec![]),
        stored(Value::from(1), ints([2]), ints([12, 13]), vec![]),
    ]);
    let expected = keys_of(&[10, 11, 12, 13], &PromptExtras::default());
    assert_eq!([key(&keys, ONE), key(&keys, TWO)], [Some(expected[0]), Some(expected[1])]);
}

#[test]
fn arrays_and_maps_mean_the_same() {
    let array = Value::Array(vec![
        Value::from("BlockStored"),
        ints([1]),
        nil(),
        ints([10, 11]),
        Value::from(2),
        nil(),
        Value::from("GPU"),
        Value::from("ad"),
    ]);
    let lora = PromptExtras { lora_name: Some("ad".into()), ..Default::default() };
    assert_eq!(key(&read(vec![array]), ONE), Some(keys_of(&[10, 11], &lora)[0]));
}

#[test]
fn signed_integers_and_bytes_are_named_as_in_truth_files() {
    let keys = read(vec![
        stored(nil(), ints([-1]), ints([10, 11]), vec![]),
        stored(nil(), Value::Array(vec![Value::Binary(vec![0xab, 0x01])]), ints([20, 21]), vec![]),
    ]);
    assert!(keys.get("ffffffffffffffff").is_some());
    assert!(keys.get("ab01").is_some());
}

#[test]
fn tokens_that_do_not_line_up_define_nothing() {
    let keys = read(vec![
        stored(nil(), ints([1]), ints([10, 11, 12, 13]), vec![]),
        stored(nil(), ints([]), ints([10, 11]), vec![]),
        stored(nil(), ints([2]), ints([]), vec![]),
    ]);
    assert!(keys.is_empty());
    assert_eq!(keys.counts().unaligned_events, 3);
}

#[test]
fn groups_that_keep_only_some_blocks_define_nothing() {
    let kind = |kind: &str| vec![("kv_cache_spec_kind", Value::from(kind))];
    assert!(read(vec![stored(nil(), ints([1]), ints([1, 2]), kind("sliding_window"))]).is_empty());
    assert!(!read(vec![stored(nil(), ints([1]), ints([1, 2]), kind("full_attention"))]).is_empty());
}

#[test]
fn an_unknown_parent_defines_nothing() {
    let keys = read(vec![stored(Value::from(9), ints([1]), ints([10, 11]), vec![])]);
    assert!(keys.is_empty());
    assert_eq!(keys.counts().unknown_parents, 1);
}

#[test]
fn extra_keys_are_told_apart_by_shape_and_by_the_adapters_name() {
    let item = Value::Array(vec![Value::from("img"), Value::from(-4)]);
    let first = Value::Array(vec![Value::from("ad"), item, Value::from("salt"), Value::Binary(vec![7, 8])]);
    let second = nil();
    let keys = read(vec![stored(
        nil(),
        ints([1, 2]),
        ints([10, 11, 12, 13]),
        vec![("lora_name", Value::from("ad")), ("extra_keys", Value::Array(vec![first, second]))],
    )]);
    let hasher = KeyHasher::default();
    let extras = [
        ExtraKey::Lora("ad"),
        ExtraKey::Multimodal { identifier: "img", offset: -4 },
        ExtraKey::Text("salt"),
        ExtraKey::Bytes(&[7, 8]),
    ];
    let one = hasher.extend(hasher.root(), hasher.local(&[10, 11], &extras));
    let two = hasher.extend(one, hasher.local(&[12, 13], &[]));
    assert_eq!([key(&keys, ONE), key(&keys, TWO)], [Some(one), Some(two)]);
}

#[test]
fn without_extra_keys_the_adapter_is_its_name_or_its_number() {
    let with = |more| key(&read(vec![stored(nil(), ints([1]), ints([10, 11]), more)]), ONE).unwrap();
    let expected = |name: &str| {
        keys_of(&[10, 11], &PromptExtras { lora_name: Some(name.into()), ..Default::default() })[0]
    };
    assert_eq!(with(vec![("lora_id", Value::from(3)), ("lora_name", Value::from("ad"))]), expected("ad"));
    assert_eq!(with(vec![("lora_id", Value::from(3))]), expected("#id:3"));
}

#[test]
fn tokens_after_a_block_that_its_hash_covers_are_part_of_its_key() {
    let ahead = Value::Array(vec![ints([12]), ints([14])]);
    let more = vec![("lookahead_token_ids", ahead)];
    let keys = read(vec![stored(nil(), ints([1, 2]), ints([10, 11, 12, 13]), more)]);
    let variant = KeyVariant { lookahead_tokens: 1, ..Default::default() };
    let mut expected = Vec::new();
    let prompt = [10, 11, 12, 13, 14];
    KeyHasher::default().chain_into(&prompt, 2, &PromptExtras::default(), variant, &mut expected);
    assert_eq!([key(&keys, ONE), key(&keys, TWO)], [Some(expected[0]), Some(expected[1])]);
}

#[test]
fn a_salt_field_marks_the_first_block_of_the_chain_only() {
    let salt = || vec![("cache_salt", Value::from("t"))];
    let keys = read(vec![
        stored(nil(), ints([1]), ints([10, 11]), salt()),
        stored(Value::from(1), ints([2]), ints([12, 13]), salt()),
    ]);
    let salted = PromptExtras { cache_salt: Some("t".into()), ..Default::default() };
    let expected = keys_of(&[10, 11, 12, 13], &salted);
    assert_eq!([key(&keys, ONE), key(&keys, TWO)], [Some(expected[0]), Some(expected[1])]);
}

#[test]
fn other_media_do_not_change_what_a_hash_means() {
    let salt = Value::Array(vec![Value::Array(vec![Value::from("t")])]);
    let keys = read(vec![
        stored(nil(), ints([1]), ints([10, 11]), vec![("medium", "GPU".into()), ("extra_keys", salt)]),
        stored(nil(), ints([1]), ints([10, 11]), vec![("medium", "CPU".into())]),
    ]);
    let salted = PromptExtras { cache_salt: Some("t".into()), ..Default::default() };
    assert_eq!(key(&keys, ONE), Some(keys_of(&[10, 11], &salted)[0]));
    assert!(keys.ambiguous(ONE).is_empty());
}

#[test]
fn a_second_meaning_on_the_gpu_is_kept_as_ambiguous() {
    let id = |id: i64| vec![("lora_id", Value::from(id))];
    let keys = read(vec![
        stored(nil(), ints([1]), ints([10, 11]), id(1)),
        stored(nil(), ints([1]), ints([10, 11]), id(3)),
        stored(nil(), ints([1]), ints([10, 11]), id(3)),
    ]);
    assert_eq!(keys.ambiguous(ONE).len(), 1);
}

#[test]
fn payloads_that_are_no_batches_are_counted_and_skipped() {
    let mut keys = StreamKeys::default();
    for payload in [&b""[..], b"\xc1", b"\x80", b"\x91\xc0", b"\x92\xc0\x05"] {
        keys.read_payload(payload, &KeyHasher::default());
    }
    assert_eq!(keys.counts().unreadable_messages, 5);
}

fn fixture(name: &str) -> (Recording, Option<Truth>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let path = folder.join(format!("{name}.kvrec.zst"));
    let truth = find_truth(&path).ok().map(|path| Truth::read(&path).unwrap());
    (Recording::read(&path).unwrap(), truth)
}

/// (hashes without a key, hashes) over all checkpoints' full-attention GPU sets.
fn coverage(name: &str) -> (usize, usize) {
    let (recording, truth) = fixture(name);
    let oracle = Oracle::read(&recording, &KeyHasher::default());
    let mut missing = 0;
    let mut all = 0;
    for checkpoint in &truth.unwrap().checkpoints {
        let keys = oracle.stream(checkpoint.stream).unwrap();
        for hash in &checkpoint.tiers["GPU"]["0"].hashes {
            all += 1;
            missing += usize::from(keys.get(hash).is_none());
        }
    }
    (missing, all)
}

#[test]
fn every_hash_that_an_engine_held_has_a_key() {
    for name in [
        "vllm0330_long",
        "vllm0330_fleet4",
        "vllm0330_dp2_bytes",
        "vllm0330_async",
        "vllm0330_duplicates",
        "vllm0330_resets",
        "vllm0330_extra_keys",
        "vllm0330_full_report",
        "vllm0330_gap_replay",
        "vllm0330_restart",
        "vllm0330_restart_hidden",
        "vllm0330_hybrid_swa",
        "vllm0330_hybrid_swa_dense",
        "vllm0330_hybrid_blocks",
        "vllm0330_hybrid_mamba",
        "vllm0330_offload_cpu",
        "vllm0330_offload_chunk4",
        "vllm0330_offload_placeholder",
        "vllm0330_simple_cpu",
        "vllm0330_simple_disk",
        "vllm0102_mixed",
        "vllm0112_extra_keys",
        "vllm0112_mixed",
        "vllm0141_mixed",
        "vllm0181_mixed",
        "vllm0221_mixed",
        "vllm0221_hybrid_swa",
        "vllm0240_mixed",
        "vllm0280_mixed",
        "vllm0300_mixed",
        "sglang0523_page16",
        "sglang0523_page1",
        "sglang0523_namespaces_default",
        "sglang0523_namespaces_dynamo",
    ] {
        let (missing, all) = coverage(name);
        assert!(all > 0, "{name}");
        assert_eq!(missing, 0, "{name}: {missing} of {all} hashes have no key");
    }
}

#[test]
fn only_a_batch_that_nobody_received_leaves_hashes_without_a_key() {
    let (missing, all) = coverage("vllm0330_poison_gap");
    assert!(missing > 0 && missing * 2 < all, "{missing} of {all}");
}

#[test]
fn a_probes_keys_are_held_exactly_as_deep_as_the_engine_says() {
    // An independent check of the keys themselves: the engine's own answer is the depth at which the chain of the
    // probe's keys leaves the keys of the held hashes.
    for (name, block_size) in [("vllm0330_long", 16), ("vllm0330_dp2_bytes", 32), ("vllm0221_extra_keys", 16)]
    {
        let (recording, truth) = fixture(name);
        let truth = truth.unwrap();
        let oracle = Oracle::read(&recording, &KeyHasher::default());
        for checkpoint in &truth.checkpoints {
            let keys = oracle.stream(checkpoint.stream).unwrap();
            let held: std::collections::HashSet<BlockKey> =
                checkpoint.tiers["GPU"]["0"].hashes.iter().filter_map(|hash| key(keys, hash)).collect();
            for answer in &checkpoint.probes {
                let probe = &truth.probes[answer.probe];
                let mut chain = Vec::new();
                KeyHasher::default().chain_into(
                    &probe.token_ids,
                    block_size,
                    &probe.extras(),
                    KeyVariant::default(),
                    &mut chain,
                );
                let depth = chain.iter().take_while(|key| held.contains(key)).count() as u32;
                assert_eq!(depth * block_size, answer.max_hit_tokens, "{name} probe {}", probe.id);
            }
        }
    }
}

#[test]
fn wire_formats_of_other_producers_are_read_or_counted_but_never_fatal() {
    let (recording, _) = fixture("synthetic_wire_formats");
    let oracle = Oracle::read(&recording, &KeyHasher::default());
    assert!(!oracle.stream(0).unwrap().is_empty(), "vLLM 0.9 arrays with signed hashes");
    assert!(!oracle.stream(4).unwrap().is_empty(), "LMCache chunks");
    assert!(oracle.stream(2).unwrap().is_empty(), "Mooncake names no tokens");
    assert!(oracle.stream(5).unwrap().is_empty(), "bigram tokens are pairs");
    assert!(oracle.stream(6).unwrap().counts().unreadable_messages > 0, "malformed messages");
}
