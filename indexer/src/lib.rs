//! The kvatlas index: who holds which block, how much of a prompt each instance can serve, and the server that says so.
//!
//! The core is pure (no runtime, no clock, no socket; time is an argument):
//!
//! * [`table`]: one scope's blocks and their owners; [`naive`]: the model it is judged by.
//! * [`matching`]: the rule how much of a prompt a source can serve, and what that is worth.
//! * [`sources`]: the state machine of a source: order, loss, epochs, leases.
//! * [`Index`]: all scopes; frames in, answers out.
//!
//! The shell around it is [`IndexServer`]: it reads frames from a bus, serves gRPC and a small HTTP port, and ends
//! leases.

mod bits;
mod index;
pub mod matching;
pub mod naive;
mod query;
mod scope_index;
mod slots;
pub mod sources;
pub mod table;

// Shared with the integration tests, where `pub` is needed.
#[cfg(test)]
#[allow(unreachable_pub)]
#[path = "../tests/common/frames.rs"]
mod frames;

pub use bits::Bits;
pub use index::{
    Applied, BlockSizeMismatch, DEFAULT_MAX_BLOCKS, DEFAULT_MAX_OWNERS, DEFAULT_MAX_SCOPES,
    DEFAULT_MAX_SOURCES_PER_SCOPE, DumpOwner, Expired, Index, IndexLimits, IndexTotals, LimitReached,
    OwnerFilter, OwnerInfo, SourceInfo,
};
pub use query::{PromptInput, ScoreAnswer, ScoreQuery, ScoreRow};
