//! SGLang's KV events: vLLM's dialect with fewer fields and one of its own, `cache_salt`, on every event of a namespace.
//!
//! Up to 0.5.18 an event is an array (0.5.18 appends a map of metadata), from 0.5.20 a map. Hashes are signed. Runs of
//! blocks are coalesced; with EAGLE, token ids are pairs. Two adapters (`extra_key`) share one hash in the default
//! format, so they cannot be told apart.

use crate::adapter::dialect::{self, Dialect, Field};
use crate::adapter::{Adapter, DecodeError, vllm};
use crate::event::Batch;

/// The adapter.
#[derive(Clone, Copy, Debug)]
pub struct Sglang;

/// Fields in the order of the array form.
const STORED_FIELDS: [Field; 6] =
    [Field::BlockHashes, Field::Parent, Field::TokenIds, Field::BlockSize, Field::LoraId, Field::Medium];

const DIALECT: Dialect = Dialect {
    kind_keys: &[b"type"],
    kind: vllm::kind,
    field,
    stored_fields: &STORED_FIELDS,
    removed_fields: &[Field::BlockHashes, Field::Medium],
    stored_required: 5,
    removed_required: 1,
};

// === impl Sglang ===

impl Adapter for Sglang {
    fn name(&self) -> &'static str {
        "sglang"
    }

    fn decode(&self, payload: &[u8], batch: &mut Batch) -> Result<(), DecodeError> {
        dialect::decode(&DIALECT, payload, batch)
    }
}

fn field(key: &[u8]) -> Field {
    match key {
        b"cache_salt" => Field::CacheSalt,
        key => vllm::field(key),
    }
}
