//! Answers the questions of other servers.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use kvatlas_bus::{Bus, BusMessage, Subscription};
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::metrics::ClusterMetrics;
use super::question::ShardQuestion;
use super::steward::Serving;
use crate::clock::Clock;
use crate::index::Index;
use crate::metrics::ReasonLabel;

/// Questions that are answered at the same time. At the bound a question is dropped and counted: whoever asked asks another
/// replica, or says what is missing.
const MAX_ANSWERING: usize = 256;
/// Questions that are remembered, so that one that is asked again is left to another replica: those of some seconds.
const REMEMBERED: usize = 8_192;

/// Looks up what others ask for.
pub(crate) struct Responder {
    pub(crate) index: Arc<Index>,
    pub(crate) bus: Arc<dyn Bus>,
    pub(crate) clock: Clock,
    pub(crate) serving: Arc<Serving>,
    pub(crate) metrics: Arc<ClusterMetrics>,
    pub(crate) permits: Arc<Semaphore>,
    pub(crate) taken: Mutex<Taken>,
}

/// The questions taken last, by the subjects for their answers.
#[derive(Default)]
pub(crate) struct Taken {
    names: HashSet<String>,
    order: VecDeque<String>,
}

// === impl Taken ===

impl Taken {
    /// False if it was taken before.
    fn take(&mut self, name: &str) -> bool {
        if !self.names.insert(name.to_owned()) {
            return false;
        }
        self.order.push_back(name.to_owned());
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.names.remove(&oldest);
        }
        true
    }
}

// === impl Responder ===

impl Responder {
    pub(crate) fn new(
        index: Arc<Index>,
        bus: Arc<dyn Bus>,
        clock: Clock,
        serving: Arc<Serving>,
        metrics: Arc<ClusterMetrics>,
    ) -> Self {
        let permits = Arc::new(Semaphore::new(MAX_ANSWERING));
        Self { index, bus, clock, serving, metrics, permits, taken: Mutex::default() }
    }

    /// Answers what comes until `stop`; then the subscription is given up.
    pub(crate) async fn answer_all(self: Arc<Self>, mut questions: Subscription, stop: CancellationToken) {
        loop {
            let message = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                message = questions.recv() => message,
            };
            let Some(BusMessage { reply: Some(reply), payload, .. }) = message else {
                if message.is_none() {
                    return;
                }
                continue;
            };
            if !self.taken.lock().take(&reply) {
                continue;
            }
            let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() else {
                self.refuse("overload");
                continue;
            };
            let responder = Arc::clone(&self);
            tokio::spawn(async move {
                responder.answer(reply, &payload).await;
                drop(permit);
            });
        }
    }

    async fn answer(&self, reply: String, payload: &[u8]) {
        let question = match ShardQuestion::parse(payload) {
            Ok(question) => question,
            Err(error) => {
                tracing::debug!(%error, "a question of another server is not usable");
                return self.refuse("malformed");
            }
        };
        let serves = |shard: kvatlas_proto::ShardId| self.serving.has(shard.number());
        let answer = self.index.look_up(&question, serves, self.clock.now_ms());
        match answer.encode(&question) {
            Ok(bytes) => {
                self.metrics.answered.inc();
                self.metrics.answered_pieces.inc_by(question.pieces() as u64);
                // A broker that is away cannot take it, and the asker's time passes.
                let _ = self.bus.publish(reply, Bytes::from(bytes)).await;
            }
            Err(error) => {
                tracing::warn!(%error, "an answer to another server could not be sent");
                self.refuse("too_large");
            }
        }
    }

    fn refuse(&self, reason: &'static str) {
        self.metrics.refused.get_or_create(&ReasonLabel { reason }).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_taken_once_and_the_memory_of_them_is_bounded() {
        let mut taken = Taken::default();
        assert!(taken.take("a"));
        assert!(!taken.take("a"));
        (0..REMEMBERED).for_each(|n| assert!(taken.take(&n.to_string())));
        assert!(taken.take("a"), "the oldest are forgotten");
        assert_eq!(taken.names.len(), REMEMBERED);
    }
}
