//! Where the index keeps its checkpoint between two lives: one small trait, the file behind it, and the shell around both.
//! Remote stores are in a crate of their own (`kvatlas-stores`), so that whoever links the index gets no client library.
//!
//! A store never stops the server and never delays an answer. What cannot be read in time is reported, counted and done
//! without: the index starts cold. What cannot be written is tried again at the next interval. What is read is checked as a
//! whole before any of it is taken in, whatever the store says about it, and counts only once its publishers proved it.

mod errors;
mod file;
mod keeper;
mod loading;

use std::fmt;
use std::io::{self, Seek, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::checkpoint::CheckpointSize;

pub use errors::{AccessError, LoadError, SaveError};
pub use file::FileStore;
pub(crate) use keeper::keep;
pub(crate) use loading::Loading;

/// Time between two checkpoints, by default. What changed since the last one travels again after a restart.
pub const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(30);
/// Longest wait for the store at the start; then the index starts cold. Measured: a gigabyte, which is what the default limit of
/// blocks comes to, takes 9 to 10 s from a server on the same busy two-core machine in an unoptimised build; ten million blocks
/// take 2 s. Events that wait for longer than this would not fit into a subscription.
pub const LOAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Time that saving has to end in after the server was asked to stop. Below [`crate::DRAIN_TIMEOUT`].
pub const LAST_SAVE_TIMEOUT: Duration = Duration::from_millis(3_500);
/// Bytes of a checkpoint that are accepted whatever the limits of the index: twice what the default limits come to.
pub const MIN_CHECKPOINT_BYTES: u64 = 2 << 30;
/// Bytes of a checkpoint for each block that the index may hold: 16, and as much for names and small owners.
const BYTES_PER_BLOCK: u64 = 32;

/// What a store writes a checkpoint into: bytes in order, and at the end a return to the first 16, which seal it.
pub trait WriteSeek: Write + Seek {}

impl<T: Write + Seek> WriteSeek for T {}

/// Writes a checkpoint into what it is given. Runs where blocking is allowed; an error of the target ends it at once.
pub type WriteCheckpoint = Box<dyn FnOnce(&mut dyn WriteSeek) -> io::Result<CheckpointSize> + Send>;

/// Keeps one checkpoint: the newest that was saved as a whole.
///
/// An error says that this one call failed; the next may succeed. Nothing is kept between two calls that a restart of the
/// store's server or a changed secret could spoil.
#[async_trait]
pub trait CheckpointStore: fmt::Debug + Send + Sync {
    /// Kind of store, for metric labels.
    fn kind(&self) -> &'static str;

    /// Which place, for messages; without secrets.
    fn place(&self) -> String;

    /// How long the store keeps a checkpoint, if it forgets by itself; then it is saved anew in time, changed or not.
    fn keeps_for(&self) -> Option<Duration> {
        None
    }

    /// The newest checkpoint, or `None` if there is none. At most `max_bytes` are taken into memory. The caller bounds the
    /// time by dropping the future.
    async fn load(&self, max_bytes: u64) -> Result<Option<Vec<u8>>, LoadError>;

    /// Replaces the checkpoint by what `write` writes. Until that is complete, the old one stays. Bounds its own time; dropped,
    /// it leaves the old one. Callers never save twice at a time.
    async fn save(&self, write: WriteCheckpoint) -> Result<CheckpointSize, SaveError>;
}

/// Where and how often checkpoints are written.
#[derive(Clone, Debug)]
pub struct CheckpointConfig {
    /// The place.
    pub store: Arc<dyn CheckpointStore>,
    /// Time between two checkpoints.
    pub interval: Duration,
}

// === impl CheckpointConfig ===

impl CheckpointConfig {
    /// Keeps checkpoints in a file.
    pub fn file(path: impl Into<PathBuf>, interval: Duration) -> Self {
        Self { store: Arc::new(FileStore::new(path)), interval }
    }
}

/// Largest checkpoint that is taken in by an index that may hold so many blocks.
pub(crate) fn max_bytes(blocks: usize) -> u64 {
    MIN_CHECKPOINT_BYTES.max((blocks as u64).saturating_mul(BYTES_PER_BLOCK))
}
