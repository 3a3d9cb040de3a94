//! Checkpoints in Redis or Valkey.
//!
//! ```text
//! PREFIX:NAME                  manifest: which generation is the checkpoint
//! PREFIX:NAME:GENERATION:N     its pieces, from 0
//! ```
//!
//! Why pieces: a value holds at most 512 MB, and a server that handles one command at a time answers nobody else while it takes
//! a large one. Every save writes pieces under names of its own, then the manifest in one command, and then deletes the pieces
//! that the manifest named before. So a reader finds the old checkpoint, or the new one, or (if it reads while the old one is
//! deleted) a torn one, which it reports and does without. Every key expires; what a crash left behind goes away by itself.
//!
//! Why no hash tag: in a cluster it would put all pieces of a checkpoint onto one node. No command here needs two keys at once,
//! so they may be anywhere, and a gigabyte is spread over all nodes. (Names cannot contain braces, so no tag arises by
//! accident.)
//!
//! Servers that share a prefix and name share one checkpoint: who saved last. None of them takes harm, for a checkpoint is a
//! proposal that publishers prove.

mod connection;
mod manifest;

use async_trait::async_trait;
use futures_util::{StreamExt as _, stream};
use kvatlas_index::CheckpointSize;
use kvatlas_index::store::{AccessError, CheckpointStore, LoadError, SaveError, WriteCheckpoint};
use parking_lot::Mutex;
use std::time::Duration;
use xxhash_rust::xxh3::Xxh3;

use crate::location::RedisLocation;
use crate::pieces::{self, Pieces, SAVE_TIMEOUT};
use crate::secrets::StoreAccess;

use connection::{Connection, explain};
use manifest::{Generation, Manifest};

/// Pieces asked for at once when loading: the next ones travel while one is taken in. 16 MiB.
const READ_AHEAD: usize = 4;

/// A checkpoint in Redis or Valkey (6.2 or newer).
#[derive(Debug)]
pub struct RedisStore {
    location: RedisLocation,
    access: StoreAccess,
    /// Pieces that a save of ours wrote and that no manifest may name: those of one that failed. Deleted by the next save.
    leftover: Mutex<Option<Leftover>>,
}

/// Pieces of a generation, from 0.
#[derive(Clone, Debug)]
struct Leftover {
    generation: Generation,
    pieces: u64,
}

// === impl RedisStore ===

impl RedisStore {
    /// Connects when it is used.
    pub fn new(location: RedisLocation, access: StoreAccess) -> Self {
        Self { location, access, leftover: Mutex::new(None) }
    }

    fn manifest_key(&self) -> String {
        format!("{}:{}", self.location.prefix, self.location.name)
    }

    fn piece_key(&self, generation: &Generation, piece: u64) -> String {
        format!("{}:{}:{generation}:{piece}", self.location.prefix, self.location.name)
    }

    async fn connect(&self) -> Result<Connection, AccessError> {
        Connection::open(&self.location, &self.access).await
    }

    fn explain(&self, error: &redis::RedisError) -> AccessError {
        explain(&self.location, error)
    }

    async fn store(&self, mut pieces: Pieces) -> Result<(), SaveError> {
        let mut connection = self.connect().await?;
        self.delete_leftover(&mut connection).await?;
        let generation = Generation::new();
        let mut manifest = Manifest { generation, pieces: 0, bytes: 0, checksum: 0 };
        let mut hash = Xxh3::new();
        // The manifest is written later than every piece and must not outlive one.
        let piece_ttl = self.location.ttl + SAVE_TIMEOUT;
        while let Some(piece) = pieces.next().await? {
            let key = self.piece_key(&manifest.generation, manifest.pieces);
            hash.update(&piece);
            manifest.pieces += 1;
            manifest.bytes += piece.len() as u64;
            // Noted before it is written: it may be there even if no answer comes.
            *self.leftover.lock() = Some(Leftover::of(&manifest));
            connection.set(&key, &piece, piece_ttl).await.map_err(|error| self.explain(&error))?;
        }
        manifest.checksum = hash.digest();
        let swapped =
            connection.swap(&self.manifest_key(), manifest.to_string().as_bytes(), self.location.ttl).await;
        let before = swapped.map_err(|error| self.explain(&error))?;
        let before = before.and_then(|text| String::from_utf8(text).ok()?.parse().ok());
        *self.leftover.lock() = before.as_ref().map(Leftover::of);
        // The checkpoint is saved; what is left to delete is deleted by the next save if it cannot be now.
        if let Err(error) = self.delete_leftover(&mut connection).await {
            tracing::debug!(place = %self.location, %error, "the checkpoint before the last one is not deleted yet");
        }
        Ok(())
    }

    /// Deletes what is left of an earlier save, unless it is the checkpoint: the answer to its last command may have been lost.
    async fn delete_leftover(&self, connection: &mut Connection) -> Result<(), AccessError> {
        let Some(leftover) = self.leftover.lock().clone() else { return Ok(()) };
        let current = self.read_manifest(connection).await?;
        let is_current = matches!(current, Some(Ok(manifest)) if manifest.generation == leftover.generation);
        if !is_current {
            for piece in 0..leftover.pieces {
                let key = self.piece_key(&leftover.generation, piece);
                connection.delete(&key).await.map_err(|error| self.explain(&error))?;
            }
        }
        *self.leftover.lock() = None;
        Ok(())
    }

    /// `None`: there is none. An inner error: it is of another version, or something else.
    async fn read_manifest(
        &self,
        connection: &mut Connection,
    ) -> Result<Option<Result<Manifest, manifest::NoManifestError>>, AccessError> {
        let text = connection.get(&self.manifest_key()).await.map_err(|error| self.explain(&error))?;
        Ok(text.map(|text| str::from_utf8(&text).map_err(|_| manifest::NoManifestError)?.parse()))
    }

    async fn read(
        &self,
        connection: &Connection,
        manifest: &Manifest,
        max_bytes: u64,
    ) -> Result<Vec<u8>, LoadError> {
        let bytes = manifest.bytes;
        if bytes > max_bytes {
            return Err(LoadError::TooLarge { bytes, max_bytes });
        }
        let torn = |reason: String| LoadError::Torn { reason };
        let mut content = Vec::with_capacity(usize::try_from(bytes).unwrap_or(0));
        let mut hash = Xxh3::new();
        let mut pieces = stream::iter(0..manifest.pieces)
            .map(|number| {
                let (key, mut connection) =
                    (self.piece_key(&manifest.generation, number), connection.clone());
                async move { (number, connection.get(&key).await) }
            })
            .buffered(READ_AHEAD);
        while let Some((number, piece)) = pieces.next().await {
            let piece = piece.map_err(|error| self.explain(&error))?;
            let piece = piece.ok_or_else(|| {
                torn(format!(
                    "piece {} of {} is missing: it expired or was replaced",
                    number + 1,
                    manifest.pieces
                ))
            })?;
            if content.len() as u64 + piece.len() as u64 > bytes {
                return Err(torn(format!(
                    "its pieces are longer than the {bytes} bytes that it should have"
                )));
            }
            hash.update(&piece);
            content.extend_from_slice(&piece);
        }
        if content.len() as u64 != bytes || hash.digest() != manifest.checksum {
            return Err(torn(format!("its {} bytes are not the {bytes} that were saved", content.len())));
        }
        Ok(content)
    }
}

#[async_trait]
impl CheckpointStore for RedisStore {
    fn kind(&self) -> &'static str {
        "redis"
    }

    fn place(&self) -> String {
        self.location.to_string()
    }

    fn keeps_for(&self) -> Option<Duration> {
        Some(self.location.ttl)
    }

    async fn load(&self, max_bytes: u64) -> Result<Option<Vec<u8>>, LoadError> {
        let mut connection = self.connect().await?;
        let Some(manifest) = self.read_manifest(&mut connection).await? else { return Ok(None) };
        let manifest = manifest.map_err(|error| LoadError::Torn { reason: error.to_string() })?;
        let stored = self.read(&connection, &manifest, max_bytes).await?;
        Ok(Some(pieces::in_order(stored)))
    }

    async fn save(&self, write: WriteCheckpoint) -> Result<CheckpointSize, SaveError> {
        pieces::save(write, |pieces| self.store(pieces)).await
    }
}

// === impl Leftover ===

impl Leftover {
    fn of(manifest: &Manifest) -> Self {
        Self { generation: manifest.generation.clone(), pieces: manifest.pieces }
    }
}
