//! Engine adapters: each turns one engine family's messages into neutral [`crate::event`]s.
//!
//! The families share a shape (a batch of events, each an array or a map) and differ in names and in what a field means.
//! [`dialect`] reads the shape; an adapter is a table of names.

pub mod dialect;
pub mod envelope;
pub mod sglang;
pub mod vllm;

use std::fmt;

use crate::event::Batch;
use crate::msgpack::{MsgpackError, Reader, Value};

/// Turns one engine family's messages into events.
pub trait Adapter: Send + Sync {
    /// Short name for settings, logs and metrics.
    fn name(&self) -> &'static str;

    /// Sequence of the first message of an engine's life.
    fn first_seq(&self) -> u64 {
        0
    }

    /// Decodes one message into `batch`, which is cleared first. On an error `batch` holds nothing of use, and the message
    /// is to be dropped as a whole.
    fn decode(&self, payload: &[u8], batch: &mut Batch) -> Result<(), DecodeError>;
}

impl fmt::Debug for dyn Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// All adapters.
pub const ADAPTERS: [&dyn Adapter; 3] = [&vllm::Vllm, &sglang::Sglang, &envelope::Envelope];

/// The adapter with this name.
pub fn adapter(name: &str) -> Option<&'static dyn Adapter> {
    ADAPTERS.into_iter().find(|adapter| adapter.name() == name)
}

/// Which adapter a message is for, if it shows. Only the first events are looked at.
///
/// * `event_id` or `event_type` beside each event: the cross-project envelope.
/// * `cache_salt`, or negative hashes in map form: SGLang (vLLM's maps carry unsigned integers or bytes).
/// * Anything else that stores or removes: vLLM.
///
/// A message without such an event (an idle engine, a reset) shows nothing.
pub fn detect(payload: &[u8]) -> Option<&'static dyn Adapter> {
    const EVENTS: u32 = 8;
    let mut reader = Reader::new(payload);
    let Ok(Value::Array(2..)) = reader.value() else { return None };
    reader.skip().ok()?;
    let Ok(Value::Array(events)) = reader.value() else { return None };
    let mut found: Option<&'static dyn Adapter> = None;
    for _ in 0..events.min(EVENTS) {
        let raw = reader.raw().ok()?;
        match sign_of(raw) {
            Some(Sign::Envelope) => return Some(&envelope::Envelope),
            Some(Sign::Sglang) => return Some(&sglang::Sglang),
            Some(Sign::Blocks) => found = Some(&vllm::Vllm),
            None => {}
        }
    }
    found
}

/// What one event gives away.
enum Sign {
    Envelope,
    Sglang,
    Blocks,
}

fn sign_of(event: &[u8]) -> Option<Sign> {
    let mut reader = Reader::new(event);
    let pairs = match reader.value().ok()? {
        Value::Map(pairs) => pairs,
        Value::Array(2..) => {
            let name = reader.value().ok()?;
            return matches!(name, Value::Str(b"BlockStored" | b"BlockRemoved")).then_some(Sign::Blocks);
        }
        _ => return None,
    };
    let mut sign = None;
    for _ in 0..pairs {
        let Value::Str(key) = reader.value().ok()? else { return None };
        let value = reader.raw().ok()?;
        match key {
            b"event_id" | b"event_type" => return Some(Sign::Envelope),
            b"cache_salt" => sign = Some(Sign::Sglang),
            b"block_hashes" => {
                let mut hashes = Reader::new(value);
                let count = if let Ok(Value::Array(count)) = hashes.value() { count } else { 0 };
                let negative = (0..count).any(|_| matches!(hashes.value(), Ok(Value::Negative(_))));
                if negative {
                    sign = Some(Sign::Sglang);
                } else if sign.is_none() && count > 0 {
                    sign = Some(Sign::Blocks);
                }
            }
            _ => {}
        }
    }
    sign
}

/// Why a message was dropped. The message is lost as a whole; nothing else is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The message has no bytes.
    #[error("empty payload")]
    Empty,
    /// The bytes are not the MessagePack that is expected here.
    #[error(transparent)]
    Msgpack(#[from] MsgpackError),
    /// The batch is not `[time, events, ...]`.
    #[error("batch is not an array of at least time and events")]
    Batch,
    /// An event does not say what it is.
    #[error("event has no type")]
    EventType,
    /// An event lacks a field it must have.
    #[error("event lacks {0}")]
    Missing(&'static str),
    /// Bytes follow the batch.
    #[error("bytes follow the batch")]
    Trailing,
    /// A message larger than any engine sends.
    #[error("message exceeds {max} bytes", max = MAX_MESSAGE_BYTES)]
    TooLarge,
    /// More of something than any engine sends at once; see [`crate::event::Batch`].
    #[error("message has too many {0}")]
    TooMany(&'static str),
}

/// Largest message that is decoded, in bytes. Real batches stay below 64 KiB; a full announcement of a million-token
/// prompt is about 6 MB.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;

// === impl DecodeError ===

impl DecodeError {
    /// Short name for metrics and for grouping log lines.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Msgpack(MsgpackError::Truncated) => "truncated",
            Self::Msgpack(MsgpackError::Reserved) => "reserved_byte",
            Self::Msgpack(MsgpackError::TooDeep) => "too_deep",
            Self::Msgpack(MsgpackError::Expected(_) | MsgpackError::Range(_)) => "field_type",
            Self::Batch => "batch_shape",
            Self::EventType => "event_type",
            Self::Missing(_) => "missing_field",
            Self::Trailing => "trailing_bytes",
            Self::TooLarge => "too_large",
            Self::TooMany(_) => "too_many",
        }
    }
}
