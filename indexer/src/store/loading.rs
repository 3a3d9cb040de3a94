//! Taking the last checkpoint in at the start.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::{CheckpointStore, LOAD_TIMEOUT, LoadError};
use crate::checkpoint::{CheckpointSize, ReadCheckpointError};
use crate::clock::Clock;
use crate::index::Index;
use crate::metrics::{Metrics, StoreReasonLabel};

/// What it takes to load the last checkpoint.
pub(crate) struct Loading {
    pub(crate) store: Arc<dyn CheckpointStore>,
    pub(crate) index: Arc<Index>,
    pub(crate) max_bytes: u64,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) clock: Clock,
    /// Becomes true when it is over, whatever came of it.
    pub(crate) loaded: watch::Sender<bool>,
}

/// Why a checkpoint is not used.
#[derive(Debug, thiserror::Error)]
enum UseError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Content(#[from] ReadCheckpointError),
}

// === impl Loading ===

impl Loading {
    /// Takes the checkpoint in, if there is one that can be used, within [`LOAD_TIMEOUT`]. `stop` ends the waiting at once.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let start = Instant::now();
        let used = tokio::select! {
            () = stop.cancelled() => return,
            used = self.load() => used,
        };
        let (kind, place) = (self.store.kind(), self.store.place());
        let taken = start.elapsed();
        match used {
            Ok(Some(size)) => {
                self.metrics.checkpoint_restored_blocks.set(size.blocks as i64);
                self.metrics.checkpoint_load_duration.set(taken.as_secs_f64());
                tracing::info!(
                    %place, sources = size.sources, blocks = size.blocks, bytes = size.bytes,
                    ms = taken.as_millis() as u64,
                    "took in a checkpoint; its blocks count once their publishers have proved them"
                );
            }
            Ok(None) => tracing::info!(%place, "there is no checkpoint yet: the index starts cold"),
            Err(error) => {
                let reason = error.reason();
                self.metrics
                    .checkpoint_refused
                    .get_or_create(&StoreReasonLabel { store: kind, reason })
                    .inc();
                tracing::warn!(
                    %place, reason, %error,
                    "the last checkpoint cannot be used and the index starts cold; the next one replaces it"
                );
            }
        }
        self.loaded.send_replace(true);
    }

    async fn load(&self) -> Result<Option<CheckpointSize>, UseError> {
        let loaded = timeout(LOAD_TIMEOUT, self.store.load(self.max_bytes)).await;
        let loaded = loaded.unwrap_or(Err(LoadError::TimedOut { after: LOAD_TIMEOUT }))?;
        let restore = |bytes: Vec<u8>| self.index.restore(&bytes, self.clock.now_ms());
        Ok(loaded.map(restore).transpose()?)
    }
}

// === impl UseError ===

impl UseError {
    fn reason(&self) -> &'static str {
        match self {
            Self::Load(error) => error.reason(),
            Self::Content(error) => error.reason(),
        }
    }
}
