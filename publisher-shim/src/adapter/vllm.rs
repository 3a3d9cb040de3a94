//! vLLM's KV events, 0.9 to 0.33, and TensorRT-LLM and LMCache, which speak the same.
//!
//! Up to 0.23 an event is an array (`["BlockStored", ...]`), from 0.24 a map (`{"type": "BlockStored", ...}`).

use crate::adapter::dialect::{self, Dialect, Field, Kind};
use crate::adapter::{Adapter, DecodeError};
use crate::event::Batch;

/// The adapter.
#[derive(Clone, Copy, Debug)]
pub struct Vllm;

/// Fields in the order of the array form, as of 0.33; older versions stop earlier.
pub(super) const STORED_FIELDS: [Field; 15] = [
    Field::BlockHashes,
    Field::Parent,
    Field::TokenIds,
    Field::BlockSize,
    Field::LoraId,
    Field::Medium,
    Field::LoraName,
    Field::ExtraKeys,
    Field::Group,
    Field::GroupKind,
    Field::Window,
    Field::Locality,
    Field::Other,
    Field::Other,
    Field::Lookahead,
];
const REMOVED_FIELDS: [Field; 4] = [Field::BlockHashes, Field::Medium, Field::Group, Field::Locality];

const DIALECT: Dialect = Dialect {
    kind_keys: &[b"type"],
    kind,
    field,
    stored_fields: &STORED_FIELDS,
    removed_fields: &REMOVED_FIELDS,
    // 0.9 carries a stored event up to lora_id and a removed one up to its hashes.
    stored_required: 5,
    removed_required: 1,
};

// === impl Vllm ===

impl Adapter for Vllm {
    fn name(&self) -> &'static str {
        "vllm"
    }

    fn decode(&self, payload: &[u8], batch: &mut Batch) -> Result<(), DecodeError> {
        dialect::decode(&DIALECT, payload, batch)
    }
}

pub(super) fn kind(name: &[u8]) -> Kind {
    match name {
        b"BlockStored" => Kind::Stored,
        b"BlockRemoved" => Kind::Removed,
        b"AllBlocksCleared" => Kind::Cleared,
        _ => Kind::Unknown,
    }
}

pub(super) fn field(key: &[u8]) -> Field {
    match key {
        b"block_hashes" => Field::BlockHashes,
        b"parent_block_hash" => Field::Parent,
        b"token_ids" => Field::TokenIds,
        b"block_size" => Field::BlockSize,
        b"lora_id" => Field::LoraId,
        b"medium" => Field::Medium,
        b"lora_name" => Field::LoraName,
        b"extra_keys" => Field::ExtraKeys,
        b"group_idx" => Field::Group,
        b"kv_cache_spec_kind" => Field::GroupKind,
        b"kv_cache_spec_sliding_window" => Field::Window,
        b"locality" => Field::Locality,
        b"lookahead_token_ids" => Field::Lookahead,
        b"remaining_copy_counts" => Field::RemainingCopies,
        _ => Field::Other,
    }
}
