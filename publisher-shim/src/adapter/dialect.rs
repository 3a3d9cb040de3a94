//! The shape that all engine families share: `[time, events, data_parallel_rank]` in MessagePack, an event being an array
//! (fields by position) or a map (fields by name).
//!
//! Whatever the version: unknown keys and trailing elements are skipped, unknown events change nothing and are counted.
//! Hashes are integers of either sign or byte strings. What an event or a field is called is the adapter's
//! [`Dialect`].

use crate::adapter::{DecodeError, MAX_MESSAGE_BYTES};
use crate::event::{
    Batch, EngineHash, Event, Extra, ExtraValue, MAX_BATCH_EVENTS, MAX_BATCH_EXTRAS, MAX_BATCH_HASHES,
    MAX_BATCH_TOKENS, Removed, Span, Stored,
};
use crate::msgpack::{MsgpackError, Reader, Value};

/// The names of one engine family.
#[derive(Debug)]
pub struct Dialect {
    /// Map keys that say what an event is.
    pub kind_keys: &'static [&'static [u8]],
    /// What an event is, by its name.
    pub kind: fn(&[u8]) -> Kind,
    /// What a map key is.
    pub field: fn(&[u8]) -> Field,
    /// Fields of a stored event in array form, after its name.
    pub stored_fields: &'static [Field],
    /// The same of a removed event.
    pub removed_fields: &'static [Field],
    /// Fields that a stored event in array form has at least.
    pub stored_required: u32,
    /// The same of a removed event.
    pub removed_required: u32,
}

/// What a field of an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// Hashes of the blocks.
    BlockHashes,
    /// Hash of the block before the first one.
    Parent,
    /// Token ids.
    TokenIds,
    /// Tokens per block.
    BlockSize,
    /// The adapter's number.
    LoraId,
    /// Where the blocks lie.
    Medium,
    /// The adapter's name.
    LoraName,
    /// Extra keys per block.
    ExtraKeys,
    /// Cache group.
    Group,
    /// Kind of the cache group.
    GroupKind,
    /// Attention window, tokens.
    Window,
    /// Local or remote.
    Locality,
    /// Token ids after each block that its hash covers.
    Lookahead,
    /// Salt of the namespace.
    CacheSalt,
    /// Copies that remain per removed hash.
    RemainingCopies,
    /// Nothing that is used here.
    Other,
}

/// What an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Blocks are now held.
    Stored,
    /// Blocks are no longer held.
    Removed,
    /// The cache was reset.
    Cleared,
    /// Something else; it changes nothing.
    Unknown,
}

/// Decodes one message into `batch`, which is cleared first. On an error `batch` holds nothing of use.
pub fn decode(dialect: &Dialect, payload: &[u8], batch: &mut Batch) -> Result<(), DecodeError> {
    batch.clear();
    if payload.is_empty() {
        return Err(DecodeError::Empty);
    }
    if payload.len() > MAX_MESSAGE_BYTES {
        return Err(DecodeError::TooLarge);
    }
    let mut reader = Reader::new(payload);
    let fields = match reader.value()? {
        Value::Array(n) if n >= 2 => n,
        _ => return Err(DecodeError::Batch),
    };
    batch.time_ns = time_ns(reader.value()?);
    let Value::Array(events) = reader.value()? else { return Err(DecodeError::Batch) };
    check_room("events", 0, events, MAX_BATCH_EVENTS)?;
    for _ in 0..events {
        decode_event(dialect, &mut reader, batch)?;
    }
    if fields >= 3 {
        batch.rank = reader.optional_u32("data_parallel_rank")?;
    }
    for _ in 3..fields {
        reader.skip()?;
    }
    if reader.is_at_end() { Ok(()) } else { Err(DecodeError::Trailing) }
}

/// Refuses a list before any of it is taken.
fn check_room(what: &'static str, held: u32, more: u32, max: usize) -> Result<(), DecodeError> {
    let fits = u64::from(held) + u64::from(more) <= max as u64;
    if fits { Ok(()) } else { Err(DecodeError::TooMany(what)) }
}

/// Seconds as a float, or milliseconds as an integer (Mooncake). Anything else is no time.
fn time_ns(value: Value<'_>) -> u64 {
    const LATEST_S: f64 = 1e10;
    match value {
        Value::Float(seconds) if seconds > 0.0 && seconds < LATEST_S => (seconds * 1e9) as u64,
        Value::Unsigned(ms) if (ms as f64) < LATEST_S * 1e3 => ms * 1_000_000,
        _ => 0,
    }
}

fn decode_event(dialect: &Dialect, reader: &mut Reader<'_>, batch: &mut Batch) -> Result<(), DecodeError> {
    match reader.value()? {
        Value::Array(0) => Err(DecodeError::EventType),
        Value::Array(n) => decode_array_event(dialect, reader, n - 1, batch),
        Value::Map(n) => decode_map_event(dialect, reader, n, batch),
        _ => Err(DecodeError::EventType),
    }
}

fn decode_array_event(
    dialect: &Dialect,
    reader: &mut Reader<'_>,
    fields: u32,
    batch: &mut Batch,
) -> Result<(), DecodeError> {
    let Value::Str(name) = reader.value()? else { return Err(DecodeError::EventType) };
    let kind = (dialect.kind)(name);
    let (order, required): (&[Field], u32) = match kind {
        Kind::Stored => (dialect.stored_fields, dialect.stored_required),
        Kind::Removed => (dialect.removed_fields, dialect.removed_required),
        Kind::Cleared | Kind::Unknown => (&[], 0),
    };
    if fields < required {
        return Err(DecodeError::Missing("fields at the end of its array"));
    }
    let mut event = Stored::of(0..0);
    for position in 0..fields {
        let field = order.get(position as usize).copied().unwrap_or(Field::Other);
        decode_field(reader, field, &mut event, batch)?;
    }
    finish(kind, true, event, batch)
}

fn decode_map_event(
    dialect: &Dialect,
    reader: &mut Reader<'_>,
    pairs: u32,
    batch: &mut Batch,
) -> Result<(), DecodeError> {
    let mut kind = None;
    let mut has_hashes = false;
    let mut event = Stored::of(0..0);
    for _ in 0..pairs {
        let Value::Str(key) = reader.value()? else {
            return Err(MsgpackError::Expected("a text key").into());
        };
        if dialect.kind_keys.contains(&key) {
            let Value::Str(name) = reader.value()? else { return Err(DecodeError::EventType) };
            // The first name that is known wins: some producers send two.
            if kind.is_none_or(|kind| kind == Kind::Unknown) {
                kind = Some((dialect.kind)(name));
            }
        } else {
            let field = (dialect.field)(key);
            // The name comes first in every encoder known; an unknown event's fields may have any shape.
            let field = if kind == Some(Kind::Unknown) { Field::Other } else { field };
            has_hashes |= field == Field::BlockHashes;
            decode_field(reader, field, &mut event, batch)?;
        }
    }
    finish(kind.ok_or(DecodeError::EventType)?, has_hashes, event, batch)
}

fn finish(kind: Kind, has_hashes: bool, event: Stored, batch: &mut Batch) -> Result<(), DecodeError> {
    let event = match kind {
        Kind::Cleared => Event::Cleared,
        Kind::Unknown => {
            batch.unknown_events += 1;
            return Ok(());
        }
        Kind::Stored | Kind::Removed if !has_hashes => return Err(DecodeError::Missing("block_hashes")),
        Kind::Stored => Event::Stored(event),
        Kind::Removed => Event::Removed(Removed {
            hashes: event.hashes,
            medium: event.medium,
            remote: event.remote,
            group: event.group,
            remaining: event.tokens,
        }),
    };
    batch.events.push(event);
    Ok(())
}

fn decode_field(
    reader: &mut Reader<'_>,
    field: Field,
    event: &mut Stored,
    batch: &mut Batch,
) -> Result<(), DecodeError> {
    match field {
        Field::BlockHashes => {
            let start = batch.hashes_end();
            let count = reader.array("block_hashes as an array")?;
            check_room("block hashes", start, count, MAX_BATCH_HASHES)?;
            for _ in 0..count {
                let hash = hash(reader.value()?)?.ok_or(MsgpackError::Expected("a block hash"))?;
                batch.push_hash(hash);
            }
            if event.hashes.is_empty() || batch.hashes_end() > start {
                event.hashes = start..batch.hashes_end();
            }
        }
        // Where two fields say one thing, a nil does not unsay the other.
        Field::Parent => event.parent = hash(reader.value()?)?.or(event.parent),
        Field::TokenIds => decode_tokens(reader, event, batch)?,
        Field::BlockSize => event.block_size = reader.optional_u32("block_size")?.unwrap_or(0),
        Field::LoraId => {
            event.lora_id = match reader.value()? {
                Value::Unsigned(id) => Some(id as i64),
                Value::Negative(id) => Some(id),
                _ => None,
            }
        }
        Field::Medium => event.medium = optional_span(reader, "medium as text", batch)?,
        Field::LoraName => event.lora_name = optional_span(reader, "lora_name as text", batch)?,
        Field::ExtraKeys => event.extras = decode_extras(reader, batch)?,
        Field::Group => {
            let group = reader.optional_u32("group_idx")?;
            event.group =
                group.map(u16::try_from).transpose().map_err(|_| MsgpackError::Range("group_idx"))?;
        }
        Field::GroupKind => event.group_kind = optional_span(reader, "kv_cache_spec_kind as text", batch)?,
        Field::Window => event.window_tokens = reader.optional_u32("kv_cache_spec_sliding_window")?,
        Field::Locality => {
            event.remote =
                reader.optional_text("locality as text")?.is_some_and(|l| l.eq_ignore_ascii_case("remote"));
        }
        Field::CacheSalt => event.cache_salt = optional_span(reader, "cache_salt as text", batch)?,
        Field::Lookahead => decode_lookahead(reader, event, batch)?,
        Field::RemainingCopies => {
            let start = batch.tokens_end();
            let count = reader.array("remaining_copy_counts as an array")?;
            check_room("remaining copy counts", start, count, MAX_BATCH_TOKENS)?;
            for _ in 0..count {
                let Value::Unsigned(count) = reader.token()? else {
                    return Err(MsgpackError::Expected("a number of copies").into());
                };
                batch.push_token(u32::try_from(count).unwrap_or(u32::MAX));
            }
            event.tokens = start..batch.tokens_end();
        }
        Field::Other => reader.skip()?,
    }
    Ok(())
}

/// An integer of either sign, a byte string, or nil.
fn hash(value: Value<'_>) -> Result<Option<EngineHash>, MsgpackError> {
    match value {
        Value::Nil => Ok(None),
        Value::Unsigned(bits) => Ok(Some(EngineHash::from_bits(bits))),
        Value::Negative(number) => Ok(Some(EngineHash::from_bits(number as u64))),
        Value::Bin(bytes) => Ok(Some(EngineHash::from_bytes(bytes))),
        _ => Err(MsgpackError::Expected("a block hash")),
    }
}

fn optional_span(
    reader: &mut Reader<'_>,
    what: &'static str,
    batch: &mut Batch,
) -> Result<Span, MsgpackError> {
    Ok(reader.optional_text(what)?.map_or(0..0, |text| batch.push_bytes(text.as_bytes())))
}

/// Token ids; nil from stores that do not know them. Two shapes are not plain numbers: pairs (EAGLE bigrams: the second
/// of a block's last pair lies after the block) and strings (a multimodal hash in place of a token).
fn decode_tokens(reader: &mut Reader<'_>, event: &mut Stored, batch: &mut Batch) -> Result<(), DecodeError> {
    let count = match reader.value()? {
        Value::Nil => 0,
        Value::Array(n) => n,
        _ => return Err(MsgpackError::Expected("token_ids as an array").into()),
    };
    let start = batch.tokens_end();
    check_room("token ids", start, count, MAX_BATCH_TOKENS)?;
    let mut seconds = Vec::new();
    for _ in 0..count {
        match reader.token()? {
            Value::Unsigned(token) => batch.push_token(token_id(token)?),
            Value::Str(text) => batch.push_token(xxhash_rust::xxh3::xxh3_64(text) as u32),
            Value::Array(2) => {
                let mut pair = [0; 2];
                for token in &mut pair {
                    let Value::Unsigned(id) = reader.token()? else {
                        return Err(MsgpackError::Expected("a token id").into());
                    };
                    *token = token_id(id)?;
                }
                batch.push_token(pair[0]);
                seconds.push(pair[1]);
            }
            _ => return Err(MsgpackError::Expected("a token id").into()),
        }
    }
    event.tokens = start..batch.tokens_end();
    if !seconds.is_empty() {
        if seconds.len() != count as usize {
            return Err(MsgpackError::Expected("all token ids as pairs").into());
        }
        let start = batch.tokens_end();
        check_room("token ids", start, count, MAX_BATCH_TOKENS)?;
        seconds.into_iter().for_each(|token| batch.push_token(token));
        event.lookahead = start..batch.tokens_end();
        // Which of these end a block is known once the block size is; see `Stored::lookahead_of`.
        event.lookahead_each = 0;
    }
    Ok(())
}

fn token_id(token: u64) -> Result<u32, MsgpackError> {
    u32::try_from(token).map_err(|_| MsgpackError::Range("a token id"))
}

/// One list per block, all of one length, or nil.
fn decode_lookahead(
    reader: &mut Reader<'_>,
    event: &mut Stored,
    batch: &mut Batch,
) -> Result<(), DecodeError> {
    let blocks = match reader.value()? {
        Value::Nil => return Ok(()),
        Value::Array(n) => n,
        _ => return Err(MsgpackError::Expected("lookahead_token_ids as an array").into()),
    };
    let start = batch.tokens_end();
    for block in 0..blocks {
        let each = reader.array("look-ahead token ids as an array")?;
        if block > 0 && each != event.lookahead_each {
            return Err(MsgpackError::Expected("look-ahead lists of one length").into());
        }
        event.lookahead_each = each;
        check_room("token ids", batch.tokens_end(), each, MAX_BATCH_TOKENS)?;
        for _ in 0..each {
            let Value::Unsigned(id) = reader.token()? else {
                return Err(MsgpackError::Expected("a token id").into());
            };
            batch.push_token(token_id(id)?);
        }
    }
    event.lookahead = start..batch.tokens_end();
    Ok(())
}

/// One list or nil per block, or nil for all. Values of a kind not known here still separate blocks: their raw bytes
/// enter the key.
fn decode_extras(reader: &mut Reader<'_>, batch: &mut Batch) -> Result<Option<Span>, DecodeError> {
    let blocks = match reader.value()? {
        Value::Nil => return Ok(None),
        Value::Array(n) => n,
        _ => return Err(MsgpackError::Expected("extra_keys as an array").into()),
    };
    let start = batch.extras_end();
    for block in 0..blocks {
        let items = match reader.value()? {
            Value::Nil => 0,
            Value::Array(n) => n,
            _ => return Err(MsgpackError::Expected("extra keys of a block as an array").into()),
        };
        check_room("extra keys", batch.extras_end(), items, MAX_BATCH_EXTRAS)?;
        for _ in 0..items {
            let raw = reader.raw()?;
            let value = decode_extra(raw, batch)?;
            batch.push_extra(Extra { block, value });
        }
    }
    Ok(Some(start..batch.extras_end()))
}

fn decode_extra(raw: &[u8], batch: &mut Batch) -> Result<ExtraValue, MsgpackError> {
    let mut reader = Reader::new(raw);
    let value = match reader.value()? {
        Value::Str(text) if std::str::from_utf8(text).is_ok() => ExtraValue::Text(batch.push_bytes(text)),
        Value::Bin(bytes) => ExtraValue::Bytes(batch.push_bytes(bytes)),
        Value::Array(2) => match (reader.value()?, reader.value()?) {
            (Value::Str(id), Value::Unsigned(offset)) if std::str::from_utf8(id).is_ok() => {
                ExtraValue::Multimodal(batch.push_bytes(id), offset as i64)
            }
            (Value::Str(id), Value::Negative(offset)) if std::str::from_utf8(id).is_ok() => {
                ExtraValue::Multimodal(batch.push_bytes(id), offset)
            }
            _ => ExtraValue::Bytes(batch.push_bytes(raw)),
        },
        _ => ExtraValue::Bytes(batch.push_bytes(raw)),
    };
    Ok(value)
}
