//! vLLM's event batches, byte for byte as its own encoder writes them.
//!
//! A batch is the array `[ts, events, data_parallel_rank]`. Until 0.23 each event is an array whose length grew over the
//! versions; trailing nils are written. From 0.24 it is a map with the type first; fields that have a default are left
//! out when absent. Integers take their smallest form, `ts` is always a 64-bit float.
//!
//! Only writing is here: the tests read recorded batches in a generic way and must get the same bytes back.

use rmp::Marker;
use rmp::encode::{self, ByteBuf};

/// A batch: what an engine publishes for one step.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// Wall clock at the engine, seconds since the Unix epoch.
    pub time_s: f64,
    /// What happened in the step, in order.
    pub events: Vec<Event>,
    /// Data-parallel rank, 0 without data parallelism.
    pub rank: u32,
}

/// One change of an engine's cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Blocks became cached.
    Stored(BlockStored),
    /// Blocks are no longer cached.
    Removed(BlockRemoved),
    /// Nothing is cached any more.
    Cleared,
}

/// A run of blocks that became cached. Absent options are nil or left out, as the version does it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockStored {
    /// One hash per physical block.
    pub block_hashes: Vec<EngineHash>,
    /// Hash of the block before the first one; absent at the start of a prompt.
    pub parent_block_hash: Option<EngineHash>,
    /// Tokens of the blocks, concatenated.
    pub token_ids: Vec<u32>,
    /// Tokens per block.
    pub block_size: u32,
    /// The adapter's number.
    pub lora_id: Option<i64>,
    /// Where the blocks lie, for example `GPU`.
    pub medium: Option<String>,
    /// The adapter's name (0.14 and later).
    pub lora_name: Option<String>,
    /// Extra keys per block (0.18 and later).
    pub extra_keys: Option<Vec<Option<Vec<ExtraItem>>>>,
    /// Cache group (0.20 and later).
    pub group_idx: Option<u32>,
    /// Kind of the group (0.22 and later).
    pub kv_cache_spec_kind: Option<String>,
    /// Attention window of the group, tokens (0.22 and later).
    pub kv_cache_spec_sliding_window: Option<u32>,
    /// `LOCAL` or `REMOTE` (maps only).
    pub locality: Option<String>,
    /// Identifier of a secondary tier (maps only).
    pub ownership: Option<String>,
    /// Session whose request triggered the store (maps only).
    pub session_id: Option<String>,
}

/// Blocks that are no longer cached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockRemoved {
    /// One hash per physical block; vLLM's own pool names one per event.
    pub block_hashes: Vec<EngineHash>,
    /// Where the blocks lay.
    pub medium: Option<String>,
    /// Cache group (0.20 and later).
    pub group_idx: Option<u32>,
    /// `LOCAL` or `REMOTE` (maps only).
    pub locality: Option<String>,
    /// Identifier of a secondary tier (maps only).
    pub ownership: Option<String>,
}

/// A block hash as the engine names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EngineHash {
    /// The low 64 bits (the default).
    Int(u64),
    /// The whole hash, 16 or 32 bytes.
    Bytes(Vec<u8>),
}

/// One extra key of a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExtraItem {
    /// An adapter's name, a cache salt, or a multimodal identifier (before 0.20).
    Text(String),
    /// A multimodal identifier with its start relative to the block, tokens.
    Item(String, i64),
    /// A digest of prompt embeddings.
    Bytes(Vec<u8>),
}

/// How a version writes events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireForm {
    /// Arrays, until 0.23.
    Array(ArrayVersion),
    /// Maps, from 0.24.
    Map(MapVersion),
}

/// The headers that stored events have had in map form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapVersion {
    /// 0.24 to 0.32: one byte, as there are at most 15 fields.
    V0_24,
    /// 0.33: three bytes, whatever is present. The encoder reserves the header for all of its 16 fields.
    V0_33,
}

/// The lengths that events have had in array form. Fields that a version does not know are not written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArrayVersion {
    /// 0.10 to 0.13: up to the medium.
    V0_10,
    /// 0.14 to 0.17: with the adapter's name.
    V0_14,
    /// 0.18 and 0.19: with extra keys.
    V0_18,
    /// 0.22 and 0.23: with cache group, kind and window.
    V0_22,
}

/// Appends MessagePack to memory, which cannot fail.
struct Packer(ByteBuf);

/// Reason for the `expect`s below.
const IN_MEMORY: &str = "writing to memory does not fail";

// === impl Batch ===

impl Batch {
    /// The payload frame.
    pub fn encode(&self, form: WireForm) -> Vec<u8> {
        let mut out = Packer(ByteBuf::new());
        out.array(3);
        encode::write_f64(&mut out.0, self.time_s).expect(IN_MEMORY);
        out.array(self.events.len());
        for event in &self.events {
            match form {
                WireForm::Array(version) => event.write_array(&mut out, version),
                WireForm::Map(version) => event.write_map(&mut out, version),
            }
        }
        out.unsigned(u64::from(self.rank));
        out.0.into_vec()
    }
}

// === impl Event ===

impl Event {
    fn write_map(&self, out: &mut Packer, version: MapVersion) {
        match self {
            Self::Stored(event) => event.write_map(out, version),
            Self::Removed(event) => event.write_map(out),
            Self::Cleared => {
                out.map(1);
                out.field("type");
                out.text("AllBlocksCleared");
            }
        }
    }

    fn write_array(&self, out: &mut Packer, version: ArrayVersion) {
        match self {
            Self::Stored(event) => event.write_array(out, version),
            Self::Removed(event) => event.write_array(out, version),
            Self::Cleared => {
                out.array(1);
                out.text("AllBlocksCleared");
            }
        }
    }
}

// === impl BlockStored ===

impl BlockStored {
    fn write_map(&self, out: &mut Packer, version: MapVersion) {
        let optional = [
            self.extra_keys.is_some(),
            self.group_idx.is_some(),
            self.kv_cache_spec_kind.is_some(),
            self.kv_cache_spec_sliding_window.is_some(),
            self.locality.is_some(),
            self.ownership.is_some(),
            self.session_id.is_some(),
        ];
        let length = 8 + optional.iter().filter(|present| **present).count();
        match version {
            MapVersion::V0_24 => out.map(length),
            MapVersion::V0_33 => out.wide_map(length as u16),
        }
        out.field("type");
        out.text("BlockStored");
        out.field("block_hashes");
        out.hashes(&self.block_hashes);
        out.field("parent_block_hash");
        out.optional(self.parent_block_hash.as_ref(), Packer::hash);
        out.field("token_ids");
        out.tokens(&self.token_ids);
        out.field("block_size");
        out.unsigned(u64::from(self.block_size));
        out.field("lora_id");
        out.optional(self.lora_id, Packer::signed);
        out.field("medium");
        out.optional(self.medium.as_deref(), Packer::text);
        out.field("lora_name");
        out.optional(self.lora_name.as_deref(), Packer::text);
        out.present("extra_keys", self.extra_keys.as_deref(), Packer::extra_keys);
        out.present("group_idx", self.group_idx.map(u64::from), Packer::unsigned);
        out.present("kv_cache_spec_kind", self.kv_cache_spec_kind.as_deref(), Packer::text);
        let window = self.kv_cache_spec_sliding_window.map(u64::from);
        out.present("kv_cache_spec_sliding_window", window, Packer::unsigned);
        out.present("locality", self.locality.as_deref(), Packer::text);
        out.present("ownership", self.ownership.as_deref(), Packer::text);
        out.present("session_id", self.session_id.as_deref(), Packer::text);
    }

    fn write_array(&self, out: &mut Packer, version: ArrayVersion) {
        out.array(1 + version.stored_fields());
        out.text("BlockStored");
        out.hashes(&self.block_hashes);
        out.optional(self.parent_block_hash.as_ref(), Packer::hash);
        out.tokens(&self.token_ids);
        out.unsigned(u64::from(self.block_size));
        out.optional(self.lora_id, Packer::signed);
        out.optional(self.medium.as_deref(), Packer::text);
        if version.has(ArrayVersion::V0_14) {
            out.optional(self.lora_name.as_deref(), Packer::text);
        }
        if version.has(ArrayVersion::V0_18) {
            out.optional(self.extra_keys.as_deref(), Packer::extra_keys);
        }
        if version.has(ArrayVersion::V0_22) {
            out.optional(self.group_idx.map(u64::from), Packer::unsigned);
            out.optional(self.kv_cache_spec_kind.as_deref(), Packer::text);
            out.optional(self.kv_cache_spec_sliding_window.map(u64::from), Packer::unsigned);
        }
    }
}

// === impl BlockRemoved ===

impl BlockRemoved {
    fn write_map(&self, out: &mut Packer) {
        let optional = [self.group_idx.is_some(), self.locality.is_some(), self.ownership.is_some()];
        out.map(3 + optional.iter().filter(|present| **present).count());
        out.field("type");
        out.text("BlockRemoved");
        out.field("block_hashes");
        out.hashes(&self.block_hashes);
        out.field("medium");
        out.optional(self.medium.as_deref(), Packer::text);
        out.present("group_idx", self.group_idx.map(u64::from), Packer::unsigned);
        out.present("locality", self.locality.as_deref(), Packer::text);
        out.present("ownership", self.ownership.as_deref(), Packer::text);
    }

    fn write_array(&self, out: &mut Packer, version: ArrayVersion) {
        let has_group = version.has(ArrayVersion::V0_22);
        out.array(3 + usize::from(has_group));
        out.text("BlockRemoved");
        out.hashes(&self.block_hashes);
        out.optional(self.medium.as_deref(), Packer::text);
        if has_group {
            out.optional(self.group_idx.map(u64::from), Packer::unsigned);
        }
    }
}

// === impl EngineHash ===

/// Lower-case hexadecimal as in truth files: 16 digits for an integer, two per byte otherwise.
impl std::fmt::Display for EngineHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Int(number) => write!(f, "{number:016x}"),
            Self::Bytes(bytes) => bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}")),
        }
    }
}

// === impl ArrayVersion ===

impl ArrayVersion {
    /// Fields of a stored event after its type.
    fn stored_fields(self) -> usize {
        match self {
            Self::V0_10 => 6,
            Self::V0_14 => 7,
            Self::V0_18 => 8,
            Self::V0_22 => 11,
        }
    }

    /// True if this version writes what came with `since`.
    fn has(self, since: Self) -> bool {
        self.stored_fields() >= since.stored_fields()
    }
}

// === impl Packer ===

impl Packer {
    fn array(&mut self, length: usize) {
        encode::write_array_len(&mut self.0, length as u32).expect(IN_MEMORY);
    }

    fn map(&mut self, length: usize) {
        encode::write_map_len(&mut self.0, length as u32).expect(IN_MEMORY);
    }

    /// A map header of three bytes, also where one would do.
    fn wide_map(&mut self, length: u16) {
        let bytes = self.0.as_mut_vec();
        bytes.push(Marker::Map16.to_u8());
        bytes.extend_from_slice(&length.to_be_bytes());
    }

    fn unsigned(&mut self, value: u64) {
        encode::write_uint(&mut self.0, value).expect(IN_MEMORY);
    }

    fn signed(&mut self, value: i64) {
        encode::write_sint(&mut self.0, value).expect(IN_MEMORY);
    }

    fn text(&mut self, value: &str) {
        encode::write_str(&mut self.0, value).expect(IN_MEMORY);
    }

    fn bytes(&mut self, value: &[u8]) {
        encode::write_bin(&mut self.0, value).expect(IN_MEMORY);
    }

    fn field(&mut self, name: &str) {
        self.text(name);
    }

    fn hash(&mut self, hash: &EngineHash) {
        match hash {
            EngineHash::Int(number) => self.unsigned(*number),
            EngineHash::Bytes(bytes) => self.bytes(bytes),
        }
    }

    fn hashes(&mut self, hashes: &[EngineHash]) {
        self.array(hashes.len());
        for hash in hashes {
            self.hash(hash);
        }
    }

    fn tokens(&mut self, tokens: &[u32]) {
        self.array(tokens.len());
        for token in tokens {
            self.unsigned(u64::from(*token));
        }
    }

    fn extra_keys(&mut self, blocks: &[Option<Vec<ExtraItem>>]) {
        self.array(blocks.len());
        for block in blocks {
            self.optional(block.as_deref(), |out, items| {
                out.array(items.len());
                for item in items {
                    out.extra_item(item);
                }
            });
        }
    }

    fn extra_item(&mut self, item: &ExtraItem) {
        match item {
            ExtraItem::Text(text) => self.text(text),
            ExtraItem::Item(identifier, offset) => {
                self.array(2);
                self.text(identifier);
                self.signed(*offset);
            }
            ExtraItem::Bytes(bytes) => self.bytes(bytes),
        }
    }

    /// A value, or nil.
    fn optional<T>(&mut self, value: Option<T>, write: impl FnOnce(&mut Self, T)) {
        match value {
            Some(value) => write(self, value),
            None => encode::write_nil(&mut self.0).expect(IN_MEMORY),
        }
    }

    /// A field, or nothing.
    fn present<T>(&mut self, name: &str, value: Option<T>, write: impl FnOnce(&mut Self, T)) {
        if let Some(value) = value {
            self.field(name);
            write(self, value);
        }
    }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
