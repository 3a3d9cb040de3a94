//! The cross-project event envelope (Mooncake RFC #1527), as Mooncake's master publishes it.
//!
//! Each event is a map with `event_type` (`stored`, `removed`, `cleared`) and, for compatibility, vLLM's `type`. Hashes
//! come as unsigned `seq_hashes` and, once more, as signed `block_hashes`: one value in two spellings, so the last one
//! read wins. The batch's time is in milliseconds, and sequences start at 1. There is no replay; a dropped event is a
//! gap.
//!
//! Events without token ids can only join blocks that another event of the stream has described.

use crate::adapter::dialect::{self, Dialect, Field, Kind};
use crate::adapter::{Adapter, DecodeError, vllm};
use crate::event::Batch;

/// The adapter.
#[derive(Clone, Copy, Debug)]
pub struct Envelope;

const DIALECT: Dialect = Dialect {
    kind_keys: &[b"event_type", b"type"],
    kind,
    field,
    stored_fields: &vllm::STORED_FIELDS,
    removed_fields: &[Field::BlockHashes, Field::Medium],
    stored_required: 5,
    removed_required: 1,
};

// === impl Envelope ===

impl Adapter for Envelope {
    fn name(&self) -> &'static str {
        "envelope"
    }

    fn first_seq(&self) -> u64 {
        1
    }

    fn decode(&self, payload: &[u8], batch: &mut Batch) -> Result<(), DecodeError> {
        dialect::decode(&DIALECT, payload, batch)
    }
}

fn kind(name: &[u8]) -> Kind {
    match name {
        b"stored" => Kind::Stored,
        b"removed" => Kind::Removed,
        b"cleared" => Kind::Cleared,
        name => vllm::kind(name),
    }
}

fn field(key: &[u8]) -> Field {
    match key {
        b"seq_hashes" => Field::BlockHashes,
        b"parent_hash" => Field::Parent,
        b"additional_salt" => Field::CacheSalt,
        key => vllm::field(key),
    }
}
