//! Recorded batches, read in a generic way and written again: the bytes must be the engine's.

use std::path::Path;

use rmpv::Value;

use super::*;
use crate::kvrec::{RecordKind, Recording};

const STORED: [&str; 14] = [
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
    "kv_cache_spec_kind",
    "kv_cache_spec_sliding_window",
    "locality",
    "ownership",
    "session_id",
];
const REMOVED: [&str; 5] = ["block_hashes", "medium", "group_idx", "locality", "ownership"];

/// A field of an event in either form; nil and absent are the same here.
fn field<'a>(event: &'a Value, names: &[&str], name: &str) -> Option<&'a Value> {
    let value = match event {
        Value::Array(items) => items.get(1 + names.iter().position(|n| *n == name)?),
        Value::Map(entries) => entries.iter().find(|(k, _)| k.as_str() == Some(name)).map(|(_, v)| v),
        _ => None,
    };
    value.filter(|value| !value.is_nil())
}

fn hash(value: &Value) -> EngineHash {
    match value {
        Value::Binary(bytes) => EngineHash::Bytes(bytes.clone()),
        number => EngineHash::Int(number.as_u64().unwrap()),
    }
}

fn hashes(value: Option<&Value>) -> Vec<EngineHash> {
    value.unwrap().as_array().unwrap().iter().map(hash).collect()
}

fn extra_item(value: &Value) -> ExtraItem {
    match value {
        Value::Binary(bytes) => ExtraItem::Bytes(bytes.clone()),
        Value::Array(pair) => {
            ExtraItem::Item(pair[0].as_str().unwrap().to_owned(), pair[1].as_i64().unwrap())
        }
        text => ExtraItem::Text(text.as_str().unwrap().to_owned()),
    }
}

fn extra_keys(value: &Value) -> Vec<Option<Vec<ExtraItem>>> {
    let block = |value: &Value| value.as_array().map(|items| items.iter().map(extra_item).collect());
    value.as_array().unwrap().iter().map(block).collect()
}

fn event(value: &Value) -> Event {
    let kind = match value {
        Value::Array(items) => items[0].as_str(),
        map => field(map, &[], "type").and_then(Value::as_str),
    };
    let names: &[&str] = if kind == Some("BlockStored") { &STORED } else { &REMOVED };
    let get = |name| field(value, names, name);
    let text = |name| get(name).map(|value| value.as_str().unwrap().to_owned());
    let number = |name| get(name).map(|value| value.as_u64().unwrap() as u32);
    match kind.unwrap() {
        "BlockStored" => Event::Stored(BlockStored {
            block_hashes: hashes(get("block_hashes")),
            parent_block_hash: get("parent_block_hash").map(hash),
            token_ids: get("token_ids")
                .unwrap()
                .as_array()
                .unwrap()
                .iter()
                .map(|token| token.as_u64().unwrap() as u32)
                .collect(),
            block_size: number("block_size").unwrap(),
            lora_id: get("lora_id").map(|value| value.as_i64().unwrap()),
            medium: text("medium"),
            lora_name: text("lora_name"),
            extra_keys: get("extra_keys").map(extra_keys),
            group_idx: number("group_idx"),
            kv_cache_spec_kind: text("kv_cache_spec_kind"),
            kv_cache_spec_sliding_window: number("kv_cache_spec_sliding_window"),
            locality: text("locality"),
            ownership: text("ownership"),
            session_id: text("session_id"),
        }),
        "BlockRemoved" => Event::Removed(BlockRemoved {
            block_hashes: hashes(get("block_hashes")),
            medium: text("medium"),
            group_idx: number("group_idx"),
            locality: text("locality"),
            ownership: text("ownership"),
        }),
        "AllBlocksCleared" => Event::Cleared,
        other => panic!("unknown event {other}"),
    }
}

fn batch(mut payload: &[u8]) -> Batch {
    let value = rmpv::decode::read_value(&mut payload).unwrap();
    let parts = value.as_array().unwrap();
    Batch {
        time_s: parts[0].as_f64().unwrap(),
        events: parts[1].as_array().unwrap().iter().map(event).collect(),
        rank: parts[2].as_u64().unwrap() as u32,
    }
}

/// Number of recorded batches that were written again.
fn rewrite(name: &str, form: WireForm) -> usize {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fixtures/{name}.kvrec.zst"));
    let recording = Recording::read(&path).unwrap();
    let live = recording.records.iter().filter(|record| record.kind == RecordKind::Live);
    let payloads: Vec<_> = live.map(|record| record.message().unwrap().payload).collect();
    for payload in &payloads {
        assert!(batch(payload).encode(form) == payload.as_ref(), "{name}: {:?}", batch(payload));
    }
    payloads.len()
}

#[test]
fn maps_are_written_as_engines_from_0_24_do() {
    for (name, version) in [
        ("vllm0240_mixed", MapVersion::V0_24),
        ("vllm0280_mixed", MapVersion::V0_24),
        ("vllm0280_offload_cpu", MapVersion::V0_24),
        ("vllm0300_mixed", MapVersion::V0_24),
        ("vllm0300_hybrid_swa", MapVersion::V0_24),
        ("vllm0330_dp2_bytes", MapVersion::V0_33),
        ("vllm0330_extra_keys", MapVersion::V0_33),
        ("vllm0330_full_report", MapVersion::V0_33),
        ("vllm0330_hybrid_mamba", MapVersion::V0_33),
        ("vllm0330_offload_placeholder", MapVersion::V0_33),
        ("vllm0330_resets", MapVersion::V0_33),
        ("vllm0330_simple_disk", MapVersion::V0_33),
    ] {
        assert!(rewrite(name, WireForm::Map(version)) > 0, "{name}");
    }
}

#[test]
fn arrays_are_written_as_engines_until_0_23_do() {
    for (name, version) in [
        ("vllm0102_mixed", ArrayVersion::V0_10),
        ("vllm0112_mixed", ArrayVersion::V0_10),
        ("vllm0112_extra_keys", ArrayVersion::V0_10),
        ("vllm0141_mixed", ArrayVersion::V0_14),
        ("vllm0181_mixed", ArrayVersion::V0_18),
        ("vllm0181_extra_keys", ArrayVersion::V0_18),
        ("vllm0221_mixed", ArrayVersion::V0_22),
        ("vllm0221_extra_keys", ArrayVersion::V0_22),
        ("vllm0221_hybrid_swa", ArrayVersion::V0_22),
    ] {
        assert!(rewrite(name, WireForm::Array(version)) > 0, "{name}");
    }
}

#[test]
fn hashes_are_named_as_in_truth_files() {
    assert_eq!(EngineHash::Int(255).to_string(), "00000000000000ff");
    assert_eq!(EngineHash::Bytes(vec![0x0a, 0xff]).to_string(), "0aff");
}
