//! Where an index keeps its checkpoint when a file will not do: a bucket of a NATS object store, or Redis or Valkey, single or
//! as a cluster.
//!
//! Both stores get a checkpoint as a stream of pieces while the index writes it, so that saving takes some megabytes of memory
//! however large the index is. Both connect anew for every load and save: a checkpoint is saved every half a minute, a
//! connection costs milliseconds, and so there is nothing to keep alive, nothing to reconnect, and a secret that was
//! replaced on disk is used the next time.
//!
//! [`Location`] is what one setting says about all of it.

mod location;
mod nats;
mod pieces;
mod redis;
mod secrets;
#[cfg(feature = "test-server")]
pub mod test_server;

pub use location::{InvalidLocationError, Location, Node, ObjectName, RedisLocation};
pub use nats::NatsStore;
pub use pieces::{PIECE_BYTES, SAVE_TIMEOUT};
pub use redis::RedisStore;
pub use secrets::{Password, StoreAccess};
