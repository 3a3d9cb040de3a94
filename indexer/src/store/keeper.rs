//! Saving checkpoints from time to time and at the end, one at a time.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, sleep};
use tokio_util::sync::CancellationToken;

use super::{CheckpointConfig, LAST_SAVE_TIMEOUT, SaveError};
use crate::burst::BurstLimiter;
use crate::checkpoint::CheckpointSize;
use crate::clock::Clock;
use crate::index::Index;
use crate::metrics::{Metrics, StoreLabel, StoreReasonLabel};

/// Saves what the index holds until `stop`, and once more then, which has [`LAST_SAVE_TIMEOUT`]. Does nothing before
/// `loaded`: an index that is still empty must not replace what it is about to be filled from.
pub(crate) async fn keep(
    index: Arc<Index>,
    config: CheckpointConfig,
    metrics: Arc<Metrics>,
    clock: Clock,
    mut loaded: watch::Receiver<bool>,
    stop: CancellationToken,
) {
    tokio::select! {
        biased;
        () = stop.cancelled() => return,
        loaded = loaded.wait_for(|loaded| *loaded) => if loaded.is_err() { return },
    }
    let mut keeper = Keeper::new(index, config, metrics, clock);
    let out_of_time = async {
        stop.cancelled().await;
        sleep(LAST_SAVE_TIMEOUT).await;
    };
    tokio::select! {
        () = keeper.run(&stop) => {}
        () = out_of_time => keeper.failed(&SaveError::TimedOut { after: LAST_SAVE_TIMEOUT }),
    }
}

struct Keeper {
    index: Arc<Index>,
    config: CheckpointConfig,
    metrics: Arc<Metrics>,
    clock: Clock,
    log: BurstLimiter,
    /// [`Metrics::changes`] of what the store has; at first of what was loaded, so that nothing new is not saved.
    saved_changes: u64,
    saved_at: Instant,
}

// === impl Keeper ===

impl Keeper {
    fn new(index: Arc<Index>, config: CheckpointConfig, metrics: Arc<Metrics>, clock: Clock) -> Self {
        let log = BurstLimiter::default();
        // Ingest may have begun already, and what it changed is not in the store; before it, nothing counts as a change.
        Self { index, config, metrics, clock, log, saved_changes: 0, saved_at: Instant::now() }
    }

    async fn run(&mut self, stop: &CancellationToken) {
        let mut interval = tokio::time::interval(self.config.interval);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        interval.tick().await;
        loop {
            let last = tokio::select! {
                biased;
                () = stop.cancelled() => true,
                _ = interval.tick() => false,
            };
            let changes = self.metrics.changes();
            if changes != self.saved_changes || self.is_about_to_be_forgotten() {
                self.save(changes).await;
            }
            if last {
                return;
            }
        }
    }

    /// At half the time, so that one failure does not cost the checkpoint.
    fn is_about_to_be_forgotten(&self) -> bool {
        self.config.store.keeps_for().is_some_and(|time| self.saved_at.elapsed() >= time / 2)
    }

    async fn save(&mut self, changes: u64) {
        let start = Instant::now();
        let index = Arc::clone(&self.index);
        let write = move |out: &mut dyn super::WriteSeek| index.write_checkpoint(out).map(|(_, size)| size);
        match self.config.store.save(Box::new(write)).await {
            Ok(size) => self.succeeded(size, changes, start),
            Err(error) => self.failed(&error),
        }
    }

    fn succeeded(&mut self, size: CheckpointSize, changes: u64, start: Instant) {
        (self.saved_changes, self.saved_at) = (changes, Instant::now());
        let metrics = &self.metrics;
        metrics.checkpoints_written.get_or_create(&StoreLabel { store: self.config.store.kind() }).inc();
        metrics.checkpoint_bytes.set(size.bytes as i64);
        metrics.checkpoint_duration.set(start.elapsed().as_secs_f64());
        metrics.set_checkpoint_saved(self.clock.now_ms());
    }

    fn failed(&mut self, error: &SaveError) {
        let label = StoreReasonLabel { store: self.config.store.kind(), reason: error.reason() };
        self.metrics.checkpoint_failures.get_or_create(&label).inc();
        if let Some(withheld) = self.log.admit(self.clock.now_ms()) {
            tracing::warn!(
                place = %self.config.store.place(), reason = error.reason(), %error, withheld,
                "a checkpoint could not be saved; the last one stays, and the next one is tried in time"
            );
        }
    }
}
