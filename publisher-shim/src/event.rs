//! What an engine said, in one neutral form that every adapter decodes into.
//!
//! A [`Batch`] is reused from message to message: events hold ranges into shared buffers, so that decoding a message
//! allocates nothing once the buffers have grown.

use std::ops::Range;

use xxhash_rust::xxh3::xxh3_128;

/// An engine's own name of a block: an opaque handle, used to find parents and removals.
///
/// Integers are taken as 64 bits, signed or not (both spellings of one hash are the same hash). Byte hashes are
/// folded to 128 bits with XXH3, with the top bit set, so that they never equal an integer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EngineHash(u128);

/// A range into one of the batch's buffers.
pub type Span = Range<u32>;

/// Most events of one message. A report of a whole cache block by block has one per block: 4 million tokens at 16 a block.
pub const MAX_BATCH_EVENTS: usize = 256 << 10;
/// Most hashes of one message: 4 million tokens in blocks of a single one.
pub const MAX_BATCH_HASHES: usize = 4 << 20;
/// Most token ids of one message, look-ahead included: four times the same prompt.
pub const MAX_BATCH_TOKENS: usize = 16 << 20;
/// Most extra keys of one message: an adapter on every block of 2 million tokens in blocks of a single one.
pub const MAX_BATCH_EXTRAS: usize = 2 << 20;

/// Everything one message says. Each list is bounded, because one byte of a message can become 16 (a hash) to about
/// 200 (an event) bytes here.
#[derive(Debug, Default)]
pub struct Batch {
    /// Engine wall clock, nanoseconds since the Unix epoch; 0 if the message has none that makes sense.
    pub time_ns: u64,
    /// Data-parallel rank, where the engine says it.
    pub rank: Option<u32>,
    /// Events in order.
    pub events: Vec<Event>,
    /// Events of a kind that the adapter does not know; they change nothing.
    pub unknown_events: u32,
    hashes: Vec<EngineHash>,
    tokens: Vec<u32>,
    extras: Vec<Extra>,
    text: Vec<u8>,
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Blocks are now held.
    Stored(Stored),
    /// Blocks are no longer held.
    Removed(Removed),
    /// The engine's cache was reset. It carries no medium.
    Cleared,
}

/// Fields of a stored event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Block hashes in chain order.
    pub hashes: Span,
    /// Hash of the block before the first one of the step; `None` at the prompt's start.
    pub parent: Option<EngineHash>,
    /// Token ids; may be empty, and in window and state groups covers more than the hashes.
    pub tokens: Span,
    /// Tokens after each block that its hash also covers, `lookahead_each` per block in block order.
    pub lookahead: Span,
    /// Look-ahead tokens per block; 0 for nearly every engine.
    pub lookahead_each: u32,
    /// Tokens per hash; 0 where the event does not say.
    pub block_size: u32,
    /// Where the blocks lie, as the engine spells it; empty for engines without tiers (device memory).
    pub medium: Span,
    /// The medium is another node's or a shared store.
    pub remote: bool,
    /// LoRA adapter's name; empty if none or not said.
    pub lora_name: Span,
    /// LoRA adapter's integer id, from engines that do not say the name.
    pub lora_id: Option<i64>,
    /// Extra keys per hash: position of the block in the event, then the key. `None` if the engine sent none at all.
    pub extras: Option<Span>,
    /// Cache salt of the whole event's namespace (SGLang); empty if none.
    pub cache_salt: Span,
    /// Cache group; `None` from engines that do not say.
    pub group: Option<u16>,
    /// Kind of the cache group as the engine spells it; empty if not said.
    pub group_kind: Span,
    /// Attention window of the group, tokens.
    pub window_tokens: Option<u32>,
}

/// Fields of a removed event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removed {
    /// Block hashes, in any order.
    pub hashes: Span,
    /// As in [`Stored::medium`].
    pub medium: Span,
    /// As in [`Stored::remote`].
    pub remote: bool,
    /// As in [`Stored::group`].
    pub group: Option<u16>,
    /// Copies that remain, one number per hash, in the tokens' buffer; empty from engines that do not say.
    pub remaining: Span,
}

/// One extra key of one block of a stored event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extra {
    /// Position of the block in the event's hashes.
    pub block: u32,
    /// What it is.
    pub value: ExtraValue,
}

/// An extra key as the engine sends it: untagged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExtraValue {
    /// A string: LoRA name, cache salt, or a multimodal identifier without offset.
    Text(Span),
    /// A multimodal identifier with its offset from the block's start, tokens.
    Multimodal(Span, i64),
    /// A digest.
    Bytes(Span),
}

// === impl EngineHash ===

impl EngineHash {
    /// From an unsigned integer, or the bits of a signed one.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits as u128)
    }

    /// The name of part `number` of a block that is taken apart. Parts of different blocks never share a name in practice
    /// (128 bits), nor does a part share one with an engine's own.
    #[must_use]
    pub fn part(self, number: u32) -> Self {
        let mut bytes = [0; 20];
        bytes[..16].copy_from_slice(&self.0.to_le_bytes());
        bytes[16..].copy_from_slice(&number.to_le_bytes());
        Self::from_bytes(&bytes)
    }

    /// The same, to be written down.
    pub(crate) const fn to_raw(self) -> u128 {
        self.0
    }

    /// As it was written down.
    pub(crate) const fn from_raw(raw: u128) -> Self {
        Self(raw)
    }

    /// From a byte string.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self(xxh3_128(bytes) | 1 << 127)
    }
}

// === impl Batch ===

impl Batch {
    /// Forgets the message and keeps the memory.
    pub fn clear(&mut self) {
        self.time_ns = 0;
        self.rank = None;
        self.events.clear();
        self.unknown_events = 0;
        self.hashes.clear();
        self.tokens.clear();
        self.extras.clear();
        self.text.clear();
    }

    /// The hashes of a range.
    pub fn hashes(&self, span: &Span) -> &[EngineHash] {
        &self.hashes[span.start as usize..span.end as usize]
    }

    /// The token ids of a range.
    pub fn tokens(&self, span: &Span) -> &[u32] {
        &self.tokens[span.start as usize..span.end as usize]
    }

    /// The extra keys of a range.
    pub fn extras(&self, span: &Span) -> &[Extra] {
        &self.extras[span.start as usize..span.end as usize]
    }

    /// The bytes of a range.
    pub fn bytes(&self, span: &Span) -> &[u8] {
        &self.text[span.start as usize..span.end as usize]
    }

    /// The string of a range. Adapters only store valid UTF-8 where a string is meant.
    pub fn text(&self, span: &Span) -> &str {
        std::str::from_utf8(self.bytes(span)).unwrap_or_default()
    }

    /// Appends a hash.
    #[inline]
    pub fn push_hash(&mut self, hash: EngineHash) {
        self.hashes.push(hash);
    }

    /// Appends a token id.
    #[inline]
    pub fn push_token(&mut self, token: u32) {
        self.tokens.push(token);
    }

    /// Appends an extra key.
    pub fn push_extra(&mut self, extra: Extra) {
        self.extras.push(extra);
    }

    /// Copies bytes in and returns where they are.
    pub fn push_bytes(&mut self, bytes: &[u8]) -> Span {
        let start = self.text.len() as u32;
        self.text.extend_from_slice(bytes);
        start..self.text.len() as u32
    }

    /// Appends hashes and returns where they are.
    pub fn push_hashes(&mut self, hashes: impl IntoIterator<Item = EngineHash>) -> Span {
        let start = self.hashes_end();
        self.hashes.extend(hashes);
        start..self.hashes_end()
    }

    /// Appends token ids and returns where they are.
    pub fn push_tokens(&mut self, tokens: &[u32]) -> Span {
        let start = self.tokens_end();
        self.tokens.extend_from_slice(tokens);
        start..self.tokens_end()
    }

    /// Appends an event of another batch, with everything it refers to.
    pub fn copy_event(&mut self, from: &Self, event: &Event) {
        let event = match event {
            Event::Cleared => Event::Cleared,
            Event::Removed(removed) => Event::Removed(Removed {
                hashes: self.push_hashes(from.hashes(&removed.hashes).iter().copied()),
                medium: self.push_bytes(from.bytes(&removed.medium)),
                remaining: self.push_tokens(from.tokens(&removed.remaining)),
                ..removed.clone()
            }),
            Event::Stored(stored) => Event::Stored(self.copy_stored(from, stored)),
        };
        self.events.push(event);
    }

    /// Copies what a stored event of another batch refers to, and returns the event as it is here.
    pub fn copy_stored(&mut self, from: &Self, stored: &Stored) -> Stored {
        let extras = stored.extras.as_ref().map(|span| {
            let start = self.extras_end();
            for extra in from.extras(span) {
                let value = match &extra.value {
                    ExtraValue::Text(text) => ExtraValue::Text(self.push_bytes(from.bytes(text))),
                    ExtraValue::Multimodal(id, offset) => {
                        ExtraValue::Multimodal(self.push_bytes(from.bytes(id)), *offset)
                    }
                    ExtraValue::Bytes(bytes) => ExtraValue::Bytes(self.push_bytes(from.bytes(bytes))),
                };
                self.push_extra(Extra { block: extra.block, value });
            }
            start..self.extras_end()
        });
        Stored {
            hashes: self.push_hashes(from.hashes(&stored.hashes).iter().copied()),
            tokens: self.push_tokens(from.tokens(&stored.tokens)),
            lookahead: self.push_tokens(from.tokens(&stored.lookahead)),
            medium: self.push_bytes(from.bytes(&stored.medium)),
            lora_name: self.push_bytes(from.bytes(&stored.lora_name)),
            cache_salt: self.push_bytes(from.bytes(&stored.cache_salt)),
            group_kind: self.push_bytes(from.bytes(&stored.group_kind)),
            extras,
            ..stored.clone()
        }
    }

    /// Where the next hash will go.
    pub fn hashes_end(&self) -> u32 {
        self.hashes.len() as u32
    }

    /// Where the next token will go.
    pub fn tokens_end(&self) -> u32 {
        self.tokens.len() as u32
    }

    /// Where the next extra key will go.
    pub fn extras_end(&self) -> u32 {
        self.extras.len() as u32
    }

    /// Forgets the tokens from `end` on.
    pub fn truncate_tokens(&mut self, end: u32) {
        self.tokens.truncate(end as usize);
    }
}

impl Stored {
    /// An event with these hashes and nothing else said.
    pub fn of(hashes: Span) -> Self {
        Self {
            hashes,
            parent: None,
            tokens: 0..0,
            lookahead: 0..0,
            lookahead_each: 0,
            block_size: 0,
            medium: 0..0,
            remote: false,
            lora_name: 0..0,
            lora_id: None,
            extras: None,
            cache_salt: 0..0,
            group: None,
            group_kind: 0..0,
            window_tokens: None,
        }
    }

    /// Tokens after block number `block` that its hash also covers.
    ///
    /// Bigram pages carry the second token of every pair: the one that follows the block is its last pair's.
    pub fn lookahead_of<'a>(&self, batch: &'a Batch, block: usize) -> &'a [u32] {
        let all = batch.tokens(&self.lookahead);
        let (start, each) = match (self.lookahead_each as usize, self.block_size as usize) {
            // Without a block size nobody knows which pairs end a block.
            (0, 0) => return &[],
            (0, size) => ((block + 1) * size - 1, 1),
            (each, _) => (block * each, each),
        };
        all.get(start..start + each).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signed_and_unsigned_spellings_are_one_hash_and_bytes_are_another() {
        assert_eq!(EngineHash::from_bits((-9i64) as u64), EngineHash::from_bits(u64::MAX - 8));
        assert_ne!(EngineHash::from_bits(1), EngineHash::from_bytes(&1u64.to_be_bytes()));
    }
}
