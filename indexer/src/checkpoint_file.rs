//! The checkpoint file: read once at the start, written from time to time and at the end.
//!
//! A file that cannot be read or used never stops the server: it says so, counts it, and starts cold. A file is replaced
//! by renaming a complete new one over it, so a crash leaves the old one or the new one.

use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::checkpoint::{CheckpointSize, ReadCheckpointError};
use crate::index::Index;
use crate::metrics::{Metrics, ReasonLabel};

/// Time between two checkpoints, by default. What changed since the last one travels again after a restart.
pub const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(30);

/// Where and how often checkpoints are written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointConfig {
    /// The file. A second file beside it, with `.new` behind its name, exists while one is written.
    pub path: PathBuf,
    /// Time between two checkpoints.
    pub interval: Duration,
}

/// Why a checkpoint file is not used.
#[derive(Debug, thiserror::Error)]
enum LoadError {
    #[error(transparent)]
    Read(#[from] io::Error),
    #[error(transparent)]
    Content(#[from] ReadCheckpointError),
}

/// Takes the file in, if there is one.
pub(crate) fn load(index: &Index, path: &Path, now_ms: u64, metrics: &Metrics) {
    let start = Instant::now();
    let loaded = fs::read(path)
        .map_err(LoadError::from)
        .and_then(|bytes| index.restore(&bytes, now_ms).map_err(LoadError::from));
    match loaded {
        Ok(size) => {
            metrics.checkpoint_restored_blocks.set(size.blocks as i64);
            tracing::info!(
                file = %path.display(), sources = size.sources, blocks = size.blocks, bytes = size.bytes,
                ms = start.elapsed().as_millis() as u64,
                "took in a checkpoint; its blocks count once their publishers have proved them"
            );
        }
        Err(LoadError::Read(error)) if error.kind() == io::ErrorKind::NotFound => {
            tracing::info!(file = %path.display(), "there is no checkpoint yet: the index starts cold");
        }
        Err(error) => {
            let reason = match &error {
                LoadError::Read(_) => "unreadable",
                LoadError::Content(error) => error.reason(),
            };
            metrics.checkpoint_refused.get_or_create(&ReasonLabel { reason }).inc();
            tracing::warn!(
                file = %path.display(), reason, %error,
                "the checkpoint is refused and the index starts cold; the next checkpoint replaces the file"
            );
        }
    }
}

/// Writes checkpoints until `stop`, and one then.
pub(crate) async fn keep(
    index: Arc<Index>,
    config: CheckpointConfig,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
) {
    let mut interval = tokio::time::interval(config.interval);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval.tick().await;
    let mut written_at = None;
    loop {
        let last = tokio::select! {
            biased;
            () = stop.cancelled() => true,
            _ = interval.tick() => false,
        };
        let changes = metrics.changes();
        if written_at != Some(changes) {
            let (index, path) = (Arc::clone(&index), config.path.clone());
            let start = Instant::now();
            let written = tokio::task::spawn_blocking(move || write(&index, &path)).await;
            match written.unwrap_or_else(|panic| Err(io::Error::other(panic))) {
                Ok(size) => {
                    written_at = Some(changes);
                    metrics.checkpoints_written.inc();
                    metrics.checkpoint_bytes.set(size.bytes as i64);
                    metrics.checkpoint_duration.set(start.elapsed().as_secs_f64());
                }
                Err(error) => {
                    metrics.checkpoint_failures.inc();
                    tracing::warn!(
                        file = %config.path.display(), %error,
                        "a checkpoint could not be written; the last one stays, and the next one is tried in time"
                    );
                }
            }
        }
        if last {
            return;
        }
    }
}

fn write(index: &Index, path: &Path) -> io::Result<CheckpointSize> {
    let mut name = path.file_name().ok_or_else(|| io::Error::other("the path names no file"))?.to_owned();
    name.push(".new");
    let unfinished = path.with_file_name(name);
    let (out, size) = index.write_checkpoint(BufWriter::new(File::create(&unfinished)?))?;
    let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.sync_all()?;
    fs::rename(&unfinished, path)?;
    // The new name is on disk only with its directory.
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()?;
    Ok(size)
}
