//! What a server of a cluster counts about questions between servers.

use std::sync::atomic::AtomicU64;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets, linear_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::metrics::ReasonLabel;

/// Counters and gauges of the cluster's side of a server.
#[derive(Debug)]
pub(crate) struct ClusterMetrics {
    pub(crate) questions: Counter,
    pub(crate) question_bytes: Counter,
    pub(crate) answer_bytes: Counter,
    pub(crate) hedges: Counter,
    pub(crate) timeouts: Counter,
    pub(crate) nobody: Counter,
    pub(crate) bad_answers: Counter,
    pub(crate) late_answers: Counter,
    pub(crate) answered: Counter,
    pub(crate) answered_pieces: Counter,
    pub(crate) refused: Family<ReasonLabel, Counter>,
    pub(crate) partial: Counter,
    pub(crate) foreign: Counter,
    pub(crate) owned_shards: Gauge,
    pub(crate) ready_shards: Gauge,
    pub(crate) handover: Gauge<f64, AtomicU64>,
    pub(crate) answer_time: Histogram,
    pub(crate) fan_out: Histogram,
}

// === impl ClusterMetrics ===

impl Default for ClusterMetrics {
    fn default() -> Self {
        Self {
            questions: Counter::default(),
            question_bytes: Counter::default(),
            answer_bytes: Counter::default(),
            hedges: Counter::default(),
            timeouts: Counter::default(),
            nobody: Counter::default(),
            bad_answers: Counter::default(),
            late_answers: Counter::default(),
            answered: Counter::default(),
            answered_pieces: Counter::default(),
            refused: Family::default(),
            partial: Counter::default(),
            foreign: Counter::default(),
            owned_shards: Gauge::default(),
            ready_shards: Gauge::default(),
            handover: Gauge::default(),
            // From 16 us, doubling to half a second: an answer crosses the broker twice.
            answer_time: Histogram::new(exponential_buckets(16e-6, 2.0, 16)),
            fan_out: Histogram::new(linear_buckets(0.0, 1.0, 33)),
        }
    }
}

impl ClusterMetrics {
    /// Registers every field under `kvatlas_cluster_`.
    pub(crate) fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("kvatlas_cluster");
        for (name, help, counter) in [
            ("questions", "Questions that this server asked other servers", &self.questions),
            ("hedges", "Questions that were asked a second time because the answer was slow", &self.hedges),
            ("timeouts", "Questions that nobody answered in time", &self.timeouts),
            ("nobody", "Questions for which no server was there", &self.nobody),
            ("bad_answers", "Answers of other servers that were not usable", &self.bad_answers),
            ("late_answers", "Answers that came when nobody waited for them any more", &self.late_answers),
            ("answered", "Questions of other servers that this server answered", &self.answered),
            (
                "answered_pieces",
                "Stretches of prompts that were looked up here, for this server's own callers and for other servers",
                &self.answered_pieces,
            ),
            ("partial_answers", "Answers to callers that covered only a part of the prompt", &self.partial),
            (
                "foreign_servers",
                "Announcements of servers that cut the key space into another number of shards",
                &self.foreign,
            ),
        ] {
            registry.register(name, help, counter.clone());
        }
        for (name, help, counter) in [
            ("question", "Bytes of questions that this server asked", &self.question_bytes),
            ("answer", "Bytes of answers that this server got", &self.answer_bytes),
        ] {
            registry.register_with_unit(name, help, Unit::Bytes, counter.clone());
        }
        registry.register(
            "refused_questions",
            "Questions of other servers that were not answered: overload, malformed, or too_large an answer",
            self.refused.clone(),
        );
        registry.register(
            "owned_shards",
            "Virtual shards whose events this server takes in",
            self.owned_shards.clone(),
        );
        registry.register(
            "ready_shards",
            "Virtual shards that this server answers for",
            self.ready_shards.clone(),
        );
        registry.register_with_unit(
            "handover",
            "Time from the last change of this server's set of shards until it answered for all of it",
            Unit::Seconds,
            self.handover.clone(),
        );
        registry.register_with_unit(
            "answer_time",
            "Time until another server's answer was here",
            Unit::Seconds,
            self.answer_time.clone(),
        );
        registry.register("fan_out", "Other servers that were asked about one query", self.fan_out.clone());
    }
}
