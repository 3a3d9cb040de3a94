//! A second, deliberately simple reading of a recording: which block key each engine hash stands for.
//!
//! Engine hashes are opaque handles, so an index that speaks in block keys can only be compared with an engine's own
//! block table through such a map. It must not share code with the fast decoder that it checks: payloads are read
//! here as generic MessagePack values. Slow, and meant to be.
//!
//! Rules:
//!
//! * Positions come from stored events whose tokens line up (`token_ids` = `block_size` x number of hashes) of
//!   full-attention groups. Other groups list only the blocks they keep, under the same hashes, and their block size
//!   may differ.
//! * The parent must be known already; an event under an unknown parent defines nothing.
//! * The first meaning of a hash stays. A later, different one (an adapter was pointed elsewhere under the same name) is
//!   kept beside it as ambiguous.
//! * Media other than the GPU define only hashes that are still unknown: connectors leave extra keys out, so a salted
//!   block looks plain there.
//! * A string among the extra keys is the adapter if it equals the event's `lora_name`, else a salt or an identifier.
//!   Without extra keys the adapter's name, or else its number as `#id:N`, stands for it on every block. Tokens after the
//!   block that its hash also covers come last.

use std::collections::HashMap;

use kvatlas_proto::{BlockKey, ExtraKey, KeyHasher};
use rmpv::Value;

use crate::kvrec::Recording;

/// Deepest nesting of a payload that is read. Events need five levels; a bound keeps hostile input off the stack.
const MAX_PAYLOAD_DEPTH: usize = 32;
/// Kinds of cache groups whose events list every block of the chain. An absent kind (older engines) counts too.
const FULL_KINDS: [&str; 3] = ["full_attention", "mla_attention", "sink_full_attention"];
/// Fields of a stored event in array form, after its type.
const STORED_FIELDS: [&str; 11] = [
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
];

/// The meaning of every engine hash of a recording.
#[derive(Debug, Default)]
pub struct Oracle {
    streams: Vec<StreamKeys>,
}

/// The meaning of the engine hashes of one stream. Hashes are in lower-case hexadecimal as in truth files.
#[derive(Debug, Default)]
pub struct StreamKeys {
    defined: HashMap<String, Defined>,
    ambiguous: HashMap<String, Vec<BlockKey>>,
    counts: ReadingCounts,
}

/// What one engine hash stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Defined {
    /// Its block key.
    pub key: BlockKey,
    /// Tokens in the block.
    pub block_size: u32,
}

/// What the oracle could not use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadingCounts {
    /// Messages without the expected frames or whose payload is not a batch.
    pub unreadable_messages: u64,
    /// Stored events whose tokens do not line up with their hashes, or of a group that lists only some blocks.
    pub unaligned_events: u64,
    /// Stored events under a parent that no event had defined.
    pub unknown_parents: u64,
}

/// One event, as a map or as an array.
struct Fields<'a>(&'a Value);

// === impl Oracle ===

impl Oracle {
    /// Reads all live messages and replay replies in order of receipt.
    pub fn read(recording: &Recording, hasher: &KeyHasher) -> Self {
        let mut streams: Vec<StreamKeys> = Vec::new();
        streams.resize_with(recording.header.streams.len(), StreamKeys::default);
        for record in &recording.records {
            let keys = &mut streams[usize::from(record.stream)];
            let is_live = record.kind == crate::kvrec::RecordKind::Live;
            match record.message() {
                Some(message) => keys.read_payload(message.payload, hasher),
                None if is_live => keys.counts.unreadable_messages += 1,
                None => {}
            }
        }
        Self { streams }
    }

    /// One stream's hashes. `None` for a stream that the recording does not have.
    pub fn stream(&self, stream: u8) -> Option<&StreamKeys> {
        self.streams.get(usize::from(stream))
    }
}

// === impl StreamKeys ===

impl StreamKeys {
    /// What a hash stands for; `None` if no event defined it.
    pub fn get(&self, hash: &str) -> Option<Defined> {
        self.defined.get(hash).copied()
    }

    /// Further keys of a hash that had several meanings; nearly always empty.
    pub fn ambiguous(&self, hash: &str) -> &[BlockKey] {
        self.ambiguous.get(hash).map_or(&[], Vec::as_slice)
    }

    /// Number of hashes with a meaning.
    pub fn len(&self) -> usize {
        self.defined.len()
    }

    /// True if no event defined anything.
    pub fn is_empty(&self) -> bool {
        self.defined.is_empty()
    }

    /// What could not be used.
    pub fn counts(&self) -> ReadingCounts {
        self.counts
    }

    fn read_payload(&mut self, mut payload: &[u8], hasher: &KeyHasher) {
        let batch = rmpv::decode::read_value_with_max_depth(&mut payload, MAX_PAYLOAD_DEPTH).ok();
        let events = batch.as_ref().and_then(|batch| batch.as_array()?.get(1)?.as_array());
        let Some(events) = events else {
            self.counts.unreadable_messages += 1;
            return;
        };
        for event in events.iter().map(Fields) {
            if event.kind() == Some("BlockStored") {
                self.define(&event, hasher);
            }
        }
    }

    fn define(&mut self, event: &Fields<'_>, hasher: &KeyHasher) {
        let Some((hashes, tokens, block_size)) = event.aligned_blocks() else {
            self.counts.unaligned_events += 1;
            return;
        };
        let parent = event.get("parent_block_hash").filter(|value| !value.is_nil());
        let known = match parent {
            None => Some(hasher.root()),
            Some(value) => hash_text(value).and_then(|hash| self.get(&hash)).map(|defined| defined.key),
        };
        let Some(mut key) = known else {
            self.counts.unknown_parents += 1;
            return;
        };
        let on_gpu = event.text("medium").is_none_or(|medium| medium.eq_ignore_ascii_case("gpu"));
        let lora = event.lora_without_extra_keys();
        for (index, (hash, block)) in hashes.iter().zip(tokens.chunks(block_size as usize)).enumerate() {
            let is_first = index == 0 && parent.is_none();
            let lookahead = event.lookahead(index);
            let mut extras = event.extra_keys(index, is_first, lora.as_deref());
            if !lookahead.is_empty() {
                extras.push(ExtraKey::Lookahead(&lookahead));
            }
            key = hasher.extend(key, hasher.local(block, &extras));
            self.insert(hash, Defined { key, block_size }, on_gpu);
        }
    }

    fn insert(&mut self, hash: &str, defined: Defined, on_gpu: bool) {
        let first = *self.defined.entry(hash.to_owned()).or_insert(defined);
        if first != defined && on_gpu {
            let others = self.ambiguous.entry(hash.to_owned()).or_default();
            if !others.contains(&defined.key) {
                others.push(defined.key);
            }
        }
    }
}

// === impl Fields ===

impl<'a> Fields<'a> {
    fn kind(&self) -> Option<&'a str> {
        match self.0 {
            Value::Array(items) => items.first()?.as_str(),
            _ => self.get("type")?.as_str(),
        }
    }

    /// A field by name. `None` if the event does not have it; nil is a value.
    fn get(&self, name: &str) -> Option<&'a Value> {
        match self.0 {
            Value::Map(entries) => {
                entries.iter().find(|(key, _)| key.as_str() == Some(name)).map(|(_, value)| value)
            }
            Value::Array(items) => items.get(1 + STORED_FIELDS.iter().position(|field| *field == name)?),
            _ => None,
        }
    }

    /// A text field; an empty one is as good as none.
    fn text(&self, name: &str) -> Option<&'a str> {
        self.get(name)?.as_str().filter(|text| !text.is_empty())
    }

    /// Tokens after block `index` that its hash also covers.
    fn lookahead(&self, index: usize) -> Vec<u32> {
        let tokens =
            self.get("lookahead_token_ids").and_then(|blocks| blocks.as_array()?.get(index)?.as_array());
        tokens.into_iter().flatten().filter_map(|token| token.as_u64()?.try_into().ok()).collect()
    }

    /// Hashes, tokens and block size, if the event lists every block of its stretch and the tokens line up.
    fn aligned_blocks(&self) -> Option<(Vec<String>, Vec<u32>, u32)> {
        if self.text("kv_cache_spec_kind").is_some_and(|kind| !FULL_KINDS.contains(&kind)) {
            return None;
        }
        let hashes: Option<Vec<String>> =
            self.get("block_hashes")?.as_array()?.iter().map(hash_text).collect();
        let tokens: Option<Vec<u32>> =
            self.get("token_ids")?.as_array()?.iter().map(|token| token.as_u64()?.try_into().ok()).collect();
        let (hashes, tokens) = (hashes?, tokens?);
        let block_size = u32::try_from(self.get("block_size")?.as_u64()?).ok()?;
        let aligned = block_size > 0 && tokens.len() == hashes.len() * block_size as usize;
        aligned.then_some((hashes, tokens, block_size))
    }

    /// The adapter's name where the event has no extra keys to carry it.
    fn lora_without_extra_keys(&self) -> Option<String> {
        if self.get("extra_keys").is_some_and(|keys| !keys.is_nil()) {
            return None;
        }
        match (self.text("lora_name"), self.get("lora_id").and_then(Value::as_i64)) {
            (Some(name), _) => Some(name.to_owned()),
            (None, Some(id)) => Some(format!("#id:{id}")),
            (None, None) => None,
        }
    }

    /// Extra keys of the event's block `index`.
    fn extra_keys<'b>(&self, index: usize, is_first: bool, lora: Option<&'b str>) -> Vec<ExtraKey<'b>>
    where
        'a: 'b,
    {
        let mut keys: Vec<ExtraKey<'b>> = lora.map(ExtraKey::Lora).into_iter().collect();
        let items = self.get("extra_keys").and_then(|keys| keys.as_array()?.get(index)?.as_array());
        keys.extend(items.into_iter().flatten().filter_map(|item| self.extra_key(item)));
        if let (true, Some(salt)) = (is_first, self.text("cache_salt")) {
            keys.push(ExtraKey::Text(salt));
        }
        keys
    }

    fn extra_key(&self, item: &'a Value) -> Option<ExtraKey<'a>> {
        match item {
            Value::String(text) => {
                let text = text.as_str()?;
                let is_lora = self.text("lora_name") == Some(text);
                Some(if is_lora { ExtraKey::Lora(text) } else { ExtraKey::Text(text) })
            }
            Value::Array(pair) => match pair.as_slice() {
                [identifier, offset] => {
                    Some(ExtraKey::Multimodal { identifier: identifier.as_str()?, offset: offset.as_i64()? })
                }
                _ => None,
            },
            Value::Binary(bytes) => Some(ExtraKey::Bytes(bytes)),
            _ => None,
        }
    }
}

/// A hash as truth files write it: integers as 16 digits in two's complement, byte strings as they are.
fn hash_text(value: &Value) -> Option<String> {
    match value {
        Value::Integer(number) => {
            let bits = number.as_u64().or_else(|| number.as_i64().map(i64::cast_unsigned))?;
            Some(format!("{bits:016x}"))
        }
        Value::Binary(bytes) => {
            let mut text = String::with_capacity(2 * bytes.len());
            for nibble in bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]) {
                text.extend(char::from_digit(u32::from(nibble), 16));
            }
            Some(text)
        }
        _ => None,
    }
}

#[cfg(test)]
#[path = "oracle_tests.rs"]
mod tests;
