//! Replaces what users said in recorded messages by keyed stand-ins that behave the same.
//!
//! A redacted recording still plays: equal token ids stay equal and different ones different, so prefixes, parents and
//! removals fit together as before. Everything is kept out unless it is known to be harmless; a field that nobody
//! here knows is replaced.
//!
//! | what | becomes |
//! |---|---|
//! | token ids, look-ahead ids | a permutation of all 32-bit numbers |
//! | block hashes, integers | a permutation of all 64-bit numbers that keeps the sign, hence how the engine spells it |
//! | block hashes and other byte strings | bytes of the same length (at least 16) |
//! | LoRA names, salts, multimodal identifiers, sessions, topics | 16, 32 or 64 hex digits; the empty string stays |
//! | fields and event types that are not known | numbers and strings as above, floats 0 |
//! | time, rank, block size, group, window, `lora_id`, medium, kind, locality, offsets, names of fields | kept |
//!
//! Block hashes could stay, as far as playing goes: they are opaque handles. But an engine computes them from the tokens
//! with a public function and often a public seed, so somebody could test guesses of a prompt against them.
//!
//! What this is not: anonymous. Lengths, times and repetition stay, and so does how often each token id occurs; whoever
//! knows the language, the tokenizer or the system prompt can guess frequent ids. It is pseudonymisation, good for a bug
//! report to people who may see that much.
//!
//! All stand-ins come from HMAC-SHA-256. XXH3, which names blocks elsewhere, is no choice here: one known pair of string
//! and stand-in would give away enough of the key to test guesses of all others.
//!
//! Pure: the key is an argument.

use std::collections::HashMap;

use bytes::Bytes;
use kvatlas_shim::msgpack::Reader;
use kvatlas_shim::zmq::parse_live;
use ring::hmac;
use rmpv::{Integer, Value};

/// Bytes of the key.
pub const KEY_BYTES: usize = 32;
/// Largest payload that is read, bytes: as generic values it takes up to 40 times as much memory. The largest real
/// ones, a million-token prompt announced at once, are about 6 MB.
pub const MAX_PAYLOAD_BYTES: usize = 8 << 20;
/// Stands for a payload that cannot be read: the one byte that MessagePack never uses, so that every reader refuses it.
pub const UNREADABLE: &[u8] = &[0xc1];

/// Deepest nesting that is read. The shim's reader refuses more than 32 before this is reached.
const MAX_PAYLOAD_DEPTH: usize = 64;
/// Feistel rounds; FF1 (NIST SP 800-38G) takes ten for domains this small.
const ROUNDS: u8 = 10;
/// Token ids whose stand-in is remembered: the largest vocabularies in use. Beyond, it is computed each time.
const MAX_KNOWN_TOKENS: usize = 1 << 18;
/// Shortest stand-in of a byte string: shorter ones could coincide.
const MIN_STAND_IN_BYTES: usize = 16;
/// Longest name of a field, type or medium that is taken for a word of the engine's program.
const MAX_WORD_BYTES: usize = 64;

/// Replaces the content of one recording's messages. Not `Debug`: it knows the originals.
pub struct Redactor {
    key: hmac::Key,
    tokens: HashMap<u32, u32>,
    counts: RedactionCounts,
}

/// What could not be kept. Counters since the redactor was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RedactionCounts {
    /// Payloads that are not MessagePack or too large; each is now [`UNREADABLE`].
    pub unreadable_payloads: u64,
    /// Live messages that are not `[topic, sequence, payload]`; each frame is now empty.
    pub malformed_messages: u64,
}

/// What a stand-in is for: equal inputs of different uses have nothing in common.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Use {
    Token,
    Handle,
    Text,
    Bytes,
    Expand,
}

/// How a field of an event is treated.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Field {
    /// Block hashes, one or a list.
    Hashes,
    /// Extra keys of each block: offsets stay.
    Extras,
    /// A number that says nothing about content.
    Number,
    /// A word of the engine's program.
    Word,
    /// Everything else, token ids included.
    Content,
}

/// Fields of `BlockStored` in array form, after its type.
const STORED_FIELDS: [Field; 12] = [
    Field::Hashes,
    Field::Hashes,
    Field::Content,
    Field::Number,
    Field::Number,
    Field::Word,
    Field::Content,
    Field::Extras,
    Field::Number,
    Field::Word,
    Field::Number,
    Field::Word,
];
/// Fields of `BlockRemoved` in array form, after its type.
const REMOVED_FIELDS: [Field; 4] = [Field::Hashes, Field::Word, Field::Number, Field::Word];

// === impl Redactor ===

impl Redactor {
    /// With a key that should be random and forgotten: whoever has it can undo everything.
    pub fn new(key: &[u8; KEY_BYTES]) -> Self {
        Self {
            key: hmac::Key::new(hmac::HMAC_SHA256, key),
            tokens: HashMap::new(),
            counts: RedactionCounts::default(),
        }
    }

    /// What could not be kept.
    pub fn counts(&self) -> RedactionCounts {
        self.counts
    }

    /// The frames of a live message. One of another shape keeps its number of frames, which is what a reader refuses
    /// it for, and nothing else.
    pub fn live(&mut self, frames: &[Bytes]) -> Vec<Bytes> {
        let (Ok(_), [topic, seq, payload]) = (parse_live(frames), frames) else {
            self.counts.malformed_messages += 1;
            return vec![Bytes::new(); frames.len()];
        };
        vec![self.text(topic).into(), seq.clone(), self.payload(payload)]
    }

    /// A payload. One that cannot be read could hold anything, so nothing of it stays but its place in the sequence.
    pub fn payload(&mut self, payload: &[u8]) -> Bytes {
        if payload.is_empty() {
            return Bytes::new();
        }
        let Some(mut batch) = read(payload) else {
            self.counts.unreadable_payloads += 1;
            return Bytes::from_static(UNREADABLE);
        };
        self.batch(&mut batch);
        let mut redacted = Vec::with_capacity(payload.len() + payload.len() / 4);
        rmpv::encode::write_value(&mut redacted, &batch).expect("writing to memory does not fail");
        redacted.into()
    }

    /// `[time, events, rank, ...]`, or anything else.
    fn batch(&mut self, batch: &mut Value) {
        let Value::Array(items) = batch else { return self.content(batch) };
        for (position, item) in items.iter_mut().enumerate() {
            match (position, item) {
                (0, Value::Integer(_) | Value::F32(_) | Value::F64(_)) => {}
                (1, Value::Array(events)) => events.iter_mut().for_each(|event| self.event(event)),
                (2, rank) => self.field(Field::Number, rank),
                (_, item) => self.content(item),
            }
        }
    }

    fn event(&mut self, event: &mut Value) {
        match event {
            Value::Map(fields) => {
                for (name, value) in fields {
                    let field = name.as_str().map_or(Field::Content, Field::of_name);
                    self.field(Field::Word, name);
                    self.field(field, value);
                }
            }
            Value::Array(items) => {
                let order: &[Field] = match items.first().and_then(Value::as_str) {
                    Some("BlockStored") => &STORED_FIELDS,
                    Some("BlockRemoved") => &REMOVED_FIELDS,
                    _ => &[],
                };
                let order =
                    std::iter::once(&Field::Word).chain(order).chain(std::iter::repeat(&Field::Content));
                items.iter_mut().zip(order).for_each(|(item, field)| self.field(*field, item));
            }
            other => self.content(other),
        }
    }

    fn field(&mut self, field: Field, value: &mut Value) {
        match (field, value) {
            (Field::Hashes, Value::Array(hashes)) => hashes.iter_mut().for_each(|hash| self.hash(hash)),
            (Field::Hashes, hash) => self.hash(hash),
            (Field::Extras, Value::Array(blocks)) => {
                for block in blocks {
                    match block {
                        Value::Array(items) => items.iter_mut().for_each(|item| self.extra_key(item)),
                        other => self.content(other),
                    }
                }
            }
            (Field::Number, Value::Integer(_)) => {}
            (Field::Word, Value::String(text)) if text.as_str().is_some_and(is_word) => {}
            (_, value) => self.content(value),
        }
    }

    fn hash(&mut self, hash: &mut Value) {
        match hash {
            Value::Integer(number) => *number = self.handle(*number),
            other => self.content(other),
        }
    }

    /// A multimodal item is `[identifier, offset]`; the offset says where in the block it lies.
    fn extra_key(&mut self, item: &mut Value) {
        match item {
            Value::Array(pair) if matches!(pair.as_slice(), [Value::String(_), Value::Integer(_)]) => {
                self.content(&mut pair[0]);
            }
            other => self.content(other),
        }
    }

    /// Replaces a value whatever it means, by one of the same type.
    fn content(&mut self, value: &mut Value) {
        match value {
            Value::Nil | Value::Boolean(_) => {}
            Value::Integer(number) => {
                let token = number.as_u64().and_then(|number| u32::try_from(number).ok());
                *number = match token {
                    Some(token) => self.token(token).into(),
                    None => self.handle(*number),
                };
            }
            Value::F32(number) => *number = 0.0,
            Value::F64(number) => *number = 0.0,
            Value::String(text) => *value = Value::from(self.text(text.as_bytes())),
            Value::Binary(bytes) | Value::Ext(_, bytes) => *bytes = self.bytes(bytes),
            Value::Array(items) => items.iter_mut().for_each(|item| self.content(item)),
            Value::Map(pairs) => {
                for (key, value) in pairs {
                    self.content(key);
                    self.content(value);
                }
            }
        }
    }

    fn token(&mut self, token: u32) -> u32 {
        if let Some(stand_in) = self.tokens.get(&token) {
            return *stand_in;
        }
        let stand_in = self.permute(Use::Token, 16, token.into()) as u32;
        if self.tokens.len() < MAX_KNOWN_TOKENS {
            self.tokens.insert(token, stand_in);
        }
        stand_in
    }

    /// A 64-bit number of the same sign bit. Walking on until the sign fits is a permutation of each half: a cycle comes
    /// back to its start, and two steps are enough on average.
    fn handle(&self, number: Integer) -> Integer {
        let negative = number.as_u64().is_none();
        let bits = number.as_u64().or_else(|| number.as_i64().map(i64::cast_unsigned)).unwrap_or_default();
        let mut stand_in = self.permute(Use::Handle, 32, bits);
        while (stand_in ^ bits) >> 63 != 0 {
            stand_in = self.permute(Use::Handle, 32, stand_in);
        }
        if negative { stand_in.cast_signed().into() } else { stand_in.into() }
    }

    /// A Feistel network over two halves: a permutation whatever the round function is.
    fn permute(&self, purpose: Use, half_bits: u32, value: u64) -> u64 {
        let mask = (1 << half_bits) - 1;
        let (mut left, mut right) = (value >> half_bits, value & mask);
        for round in 0..ROUNDS {
            let tag = self.tag(purpose, &[round], &right.to_le_bytes());
            let mixed = u64::from_le_bytes(*tag.first_chunk().expect("a tag has 32 bytes"));
            (left, right) = (right, left ^ (mixed & mask));
        }
        (left << half_bits) | right
    }

    /// Hex digits, about as many as the text has bytes. Names that are compared with each other stay comparable.
    fn text(&self, text: &[u8]) -> String {
        let digits = match text.len() {
            0 => return String::new(),
            1..=16 => 16,
            17..=32 => 32,
            _ => 64,
        };
        let tag = self.tag(Use::Text, &[], text);
        let nibbles = tag.iter().flat_map(|byte| [byte >> 4, byte & 15]).take(digits);
        nibbles.filter_map(|nibble| char::from_digit(nibble.into(), 16)).collect()
    }

    fn bytes(&self, bytes: &[u8]) -> Vec<u8> {
        if bytes.is_empty() {
            return Vec::new();
        }
        // Two steps, so that the work grows with the length and not with its square.
        let seed = self.tag(Use::Bytes, &[], bytes);
        let length = bytes.len().max(MIN_STAND_IN_BYTES);
        let mut stand_in = Vec::with_capacity(length + seed.len());
        for counter in 0u32.. {
            if stand_in.len() >= length {
                break;
            }
            stand_in.extend(self.tag(Use::Expand, &counter.to_le_bytes(), &seed));
        }
        stand_in.truncate(length);
        stand_in
    }

    fn tag(&self, purpose: Use, more: &[u8], data: &[u8]) -> [u8; 32] {
        let mut context = hmac::Context::with_key(&self.key);
        context.update(&[purpose as u8]);
        context.update(more);
        context.update(data);
        *context.sign().as_ref().first_chunk().expect("SHA-256 has 32 bytes")
    }
}

/// One MessagePack value and nothing after it. The shim's reader looks first: it is strict and needs no memory.
fn read(payload: &[u8]) -> Option<Value> {
    let mut reader = Reader::new(payload);
    let whole = payload.len() <= MAX_PAYLOAD_BYTES && reader.skip().is_ok() && reader.is_at_end();
    if !whole {
        return None;
    }
    rmpv::decode::read_value_with_max_depth(&mut &payload[..], MAX_PAYLOAD_DEPTH).ok()
}

/// Whether a text can be a name in an engine's program, as opposed to something said by its users.
fn is_word(text: &str) -> bool {
    text.len() <= MAX_WORD_BYTES && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

// === impl Field ===

impl Field {
    fn of_name(name: &str) -> Self {
        match name {
            "block_hashes" | "parent_block_hash" => Self::Hashes,
            "extra_keys" => Self::Extras,
            "block_size" | "lora_id" | "group_idx" | "kv_cache_spec_sliding_window" => Self::Number,
            "type" | "medium" | "kv_cache_spec_kind" | "locality" => Self::Word,
            _ => Self::Content,
        }
    }
}

#[cfg(test)]
#[path = "redact_tests.rs"]
mod tests;
