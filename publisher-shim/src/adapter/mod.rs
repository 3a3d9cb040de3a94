//! Engine adapters: each turns one engine family's messages into neutral [`crate::event`]s.

pub mod vllm;

use crate::msgpack::MsgpackError;

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
