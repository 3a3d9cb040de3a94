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

mod access;
mod admission;
mod answer;
mod auth;
mod bits;
mod burst;
mod changes;
mod checkpoint;
mod clock;
pub mod cluster;
mod costing;
pub mod engine;
mod guard;
mod held;
mod http;
mod incoming;
mod index;
mod ingest;
pub mod matching;
mod metrics;
pub mod naive;
mod outcome;
mod query;
mod request;
mod scope_index;
mod server;
mod service;
mod session;
mod slots;
pub mod sources;
mod speculate;
mod status;
pub mod store;
mod tenant_keys;
mod tls;
mod trust;
mod watched;

// Shared with the integration tests, where `pub` is needed.
#[cfg(test)]
#[allow(unreachable_pub)]
#[path = "../tests/common/frames.rs"]
mod frames;

pub use admission::{DEFAULT_MAX_INFLIGHT, MAX_ADMISSION_WAIT};
pub use auth::{MAX_CREDENTIALS, MAX_IDENTITIES, MAX_TOKEN_BYTES};
pub use bits::Bits;
pub use checkpoint::{CHECKPOINT_VERSION, CheckpointSize, ReadCheckpointError};
pub use cluster::{ClusterConfig, SHARD_TIMEOUT};
pub use held::{HELD_BYTES, HELD_FRAMES, RecoveryLimits};
pub use http::{HttpServer, ListenError};
pub use incoming::DEFAULT_MAX_CONNECTIONS;
pub use index::{
    Applied, BlockSizeMismatch, DEFAULT_MAX_BLOCKS, DEFAULT_MAX_OWNERS, DEFAULT_MAX_SCOPES,
    DEFAULT_MAX_SOURCES_PER_SCOPE, DumpOwner, Expired, Index, IndexLimits, IndexTotals, LimitReached,
    MAX_TRANSFERS, OwnerFilter, OwnerInfo, SourceInfo,
};
pub use outcome::{REMEMBERED_REQUESTS, REMEMBERED_ROWS};
pub use query::{PromptInput, ScoreAnswer, ScoreQuery, ScoreRow};
pub use request::{
    MAX_CANDIDATES, MAX_MULTIMODAL_ITEMS, MAX_PROMPT_BLOCKS, MAX_PROMPT_KEYS, MAX_PROMPT_TOKENS,
    MAX_REQUEST_NAME_BYTES, RequestLimits,
};
pub use server::{
    DISCOVERY, DRAIN_TIMEOUT, IndexServer, IndexServerConfig, MAX_REQUEST_BYTES, MAX_STREAMS_PER_CONNECTION,
    RunningIndexServer, ServingLimits, StartError,
};
pub use service::{DUMP_CHUNK_KEYS, MAX_OPEN_DUMPS, MAX_OPEN_SCORE_STREAMS};
pub use store::{CHECKPOINT_INTERVAL, CheckpointConfig, CheckpointStore};
pub use tenant_keys::{
    MAX_SECRET_BYTES, MAX_TENANT_SECRETS, MIN_SECRET_BYTES, TenantKeys, TenantSecretsError,
};
pub use tls::TlsFiles;
pub use watched::{MAX_WATCHED_BYTES, RELOAD_INTERVAL, WatchedFileError};
