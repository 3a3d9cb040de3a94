//! The kvatlas contract: everything that two processes must agree on, and nothing else.
//!
//! * [`ids`]: who stores and who asks (instances, ranks, epochs, tiers, cache groups).
//! * [`scope`]: one key space (model, block size, key version, tenant).
//! * [`keys`]: how a block of token ids becomes a block key; published test vectors are in `vectors/`.
//! * [`digest`]: how two sides find out whether they hold the same blocks.
//! * [`sealed`]: the outer form of everything binary: magic, version, checksum.
//! * [`frame`]: the event frames on the bus: versioned, checksummed, validated before they are read.
//! * [`request`]: what an index asks a publisher when it has missed something.
//! * [`shard`]: how the key space is cut, and which server owns which part.
//! * [`subject`]: every NATS subject, built and parsed in one place.
//! * [`permissions`]: what each role may do with those subjects on a broker.
//! * [`grpc`]: the generated `kvatlas.v1` service.
//!
//! There is no IO here: no socket, no clock, no runtime.

pub mod digest;
pub mod frame;
pub mod grpc;
pub mod ids;
pub mod keys;
pub mod permissions;
pub mod request;
pub mod scope;
pub mod sealed;
pub mod shard;
pub mod subject;

pub use digest::Digest;
pub use ids::{CacheGroup, DpRank, Epoch, FrameSeq, GroupKind, InstanceId, OwnerRef, SourceId, Tier};
pub use keys::{BlockKey, ExtraKey, KeyHasher, KeySeed};
pub use scope::Scope;
pub use shard::{Partition, ShardId, ShardSet};
