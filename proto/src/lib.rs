//! The kvatlas contract: everything that two processes must agree on, and nothing else.
//!
//! * [`ids`]: who stores and who asks (instances, ranks, epochs, tiers, cache groups).
//! * [`scope`]: one key space (model, block size, key version, tenant).
//! * [`keys`]: how a block of token ids becomes a block key; published test vectors are in `vectors/`.
//! * [`frame`]: the event frames on the bus: versioned, checksummed, validated before they are read.
//! * [`subject`]: every NATS subject, built and parsed in one place.
//! * [`grpc`]: the generated `kvatlas.v1` service.
//!
//! There is no IO here: no socket, no clock, no runtime.

pub mod frame;
pub mod grpc;
pub mod ids;
pub mod keys;
pub mod scope;
pub mod subject;

pub use ids::{CacheGroup, DpRank, Epoch, FrameSeq, GroupKind, InstanceId, OwnerRef, SourceId, Tier};
pub use keys::{BlockKey, ExtraKey, KeyHasher, KeySeed};
pub use scope::Scope;
