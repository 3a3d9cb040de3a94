//! Blocks of requests that were just routed, visible before the engine has them: the next equal prompt goes to the same place
//! instead of being computed somewhere else too.
//!
//! * [`table`]: what is expected where, and for how long. Pure.
//! * [`message`]: what servers tell each other about it.
//! * [`Speculation`]: both together, on the bus.
//!
//! Every server has all speculations, whichever shards it owns: they are few and short-lived, and an answer is put together
//! in one place. What is expected is never mixed with what is held: it is added to a finished answer, and says so.

mod message;
mod table;

use std::sync::Arc;

use bytes::Bytes;
use kvatlas_bus::{Bus, BusMessage, Subscription};
use kvatlas_proto::subject::Subjects;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::index::Index;
use crate::metrics::Metrics;
use crate::query::{ScoreAnswer, ScoreQuery};

pub(crate) use message::{EncodeError, Expected, ExpectedChain};
pub(crate) use table::{FullError, MAX_BLOCKS, MAX_CHAINS, MAX_TTL_MS};

/// What is expected, kept equal on all servers of a deployment.
pub(crate) struct Speculation {
    table: Mutex<table::Table>,
    bus: Arc<dyn Bus>,
    subjects: Subjects,
    metrics: Arc<Metrics>,
    clock: Clock,
}

/// Blocks cannot be made visible.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpeculateError {
    #[error(transparent)]
    Full(#[from] FullError),
    #[error(transparent)]
    Encode(#[from] EncodeError),
}

// === impl Speculation ===

impl Speculation {
    pub(crate) fn new(bus: Arc<dyn Bus>, subjects: Subjects, metrics: Arc<Metrics>, clock: Clock) -> Self {
        Self { table: Mutex::default(), bus, subjects, metrics, clock }
    }

    /// Makes blocks visible here and on every other server. Returns how many are new here.
    pub(crate) async fn expect(&self, expected: Expected) -> Result<u32, SpeculateError> {
        let payload = Bytes::from(expected.encode()?);
        let blocks = self.table.lock().add(expected, self.clock.now_ms())?;
        self.metrics.speculations.inc();
        // Where the broker is away, the others do not know for these few seconds. That costs a hit and nothing else.
        if let Err(error) = self.bus.publish(self.subjects.speculations(), payload).await {
            tracing::debug!(%error, "other servers could not be told what to expect");
        }
        Ok(blocks)
    }

    /// Whether anything is expected in this query's key space.
    pub(crate) fn expects(&self, query: &ScoreQuery<'_>) -> bool {
        self.table.lock().has(query.model, query.tenant, self.clock.now_ms())
    }

    /// Adds to an answer what is expected beyond what is held.
    pub(crate) fn add_to(&self, index: &Index, query: &ScoreQuery<'_>, answer: &mut ScoreAnswer) {
        let now_ms = self.clock.now_ms();
        let mut table = self.table.lock();
        let confirmed = table.add_to(index, query, answer, now_ms);
        self.metrics.speculations_confirmed.inc_by(confirmed);
        self.metrics.speculations_expired.inc_by(table.take_expired());
    }

    /// Takes in what other servers say, until `stop`.
    pub(crate) async fn listen(self: Arc<Self>, mut messages: Subscription, stop: CancellationToken) {
        loop {
            let message = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                message = messages.recv() => message,
            };
            let Some(BusMessage { payload, .. }) = message else { return };
            match Expected::parse(&payload) {
                // One of our own comes back: it is there already.
                Ok(expected) => {
                    if let Err(error) = self.table.lock().add(expected, self.clock.now_ms()) {
                        self.metrics.speculations_refused.inc();
                        tracing::debug!(%error, "what another server expects is not kept");
                    }
                }
                Err(error) => {
                    self.metrics.speculations_refused.inc();
                    tracing::debug!(%error, "what another server expects is not usable");
                }
            }
        }
    }
}
