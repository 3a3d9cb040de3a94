//! The server's metrics, as fields: registered once, counted where things happen.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use kvatlas_proto::grpc::{PlanResponse, PredictionSource};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::admission::OverloadError;
use crate::index::{Applied, IndexTotals};
use crate::outcome::{Outcome, Unreported};
use crate::sources::{DegradedReason, SourceState, Verdict};

/// Why something was dropped, refused or counted apart.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ReasonLabel {
    pub(crate) reason: &'static str,
}

/// A kind of checkpoint store.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct StoreLabel {
    pub(crate) store: &'static str,
}

/// A kind of checkpoint store, and why it did not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct StoreReasonLabel {
    pub(crate) store: &'static str,
    pub(crate) reason: &'static str,
}

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct KindLabel {
    pub(crate) kind: &'static str,
}

/// How something ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ResultLabel {
    result: &'static str,
}

/// What was read again and how that ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReloadLabel {
    what: &'static str,
    result: &'static str,
}

/// A call and how it ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct CallLabel {
    pub(crate) call: &'static str,
    pub(crate) result: &'static str,
}

/// A prediction that was compared with what an engine reported.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    direction: &'static str,
    tier: &'static str,
    age: &'static str,
}

/// State of a source.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct StateLabel {
    state: &'static str,
    /// Empty unless degraded.
    reason: &'static str,
}

/// What the server counts.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    pub(crate) frames_applied: Counter,
    pub(crate) frames_bad: Family<ReasonLabel, Counter>,
    pub(crate) frames_duplicate: Counter,
    pub(crate) frames_stale_epoch: Counter,
    frames_held: Counter,
    frames_held_over: Counter,
    pub(crate) frames_refused: Family<ReasonLabel, Counter>,
    pub(crate) gaps: Counter,
    pub(crate) epochs: Counter,
    pub(crate) requests: Family<KindLabel, Counter>,
    pub(crate) request_failures: Family<ReasonLabel, Counter>,
    pub(crate) reply_bytes: Counter,
    comparisons: Family<ResultLabel, Counter>,
    pub(crate) divergences: Counter,
    transfers: Family<ResultLabel, Counter>,
    pub(crate) blocks_stored: Counter,
    pub(crate) blocks_removed: Counter,
    pub(crate) blocks_refused: Counter,
    pub(crate) owners_refused: Counter,
    pub(crate) sources_expired: Family<ReasonLabel, Counter>,
    pub(crate) checkpoints_written: Family<StoreLabel, Counter>,
    pub(crate) checkpoint_failures: Family<StoreReasonLabel, Counter>,
    pub(crate) checkpoint_refused: Family<StoreReasonLabel, Counter>,
    pub(crate) checkpoint_restored_blocks: Gauge,
    pub(crate) checkpoint_bytes: Gauge,
    pub(crate) checkpoint_duration: Gauge<f64, AtomicU64>,
    pub(crate) checkpoint_load_duration: Gauge<f64, AtomicU64>,
    checkpoint_age: Gauge<f64, AtomicU64>,
    /// Milliseconds of the server's clock, plus one; 0: never.
    checkpoint_saved_ms: AtomicU64,
    pub(crate) calls: Family<CallLabel, Counter>,
    pub(crate) lookup: LookupHistogram,
    pub(crate) plan_time: LookupHistogram,
    plans: Family<KindLabel, Counter>,
    pub(crate) speculations: Counter,
    pub(crate) speculations_confirmed: Counter,
    pub(crate) speculations_expired: Counter,
    pub(crate) speculations_refused: Counter,
    pub(crate) connections_refused: Family<ReasonLabel, Counter>,
    pub(crate) unauthenticated: Family<ReasonLabel, Counter>,
    pub(crate) denied: Family<ReasonLabel, Counter>,
    overload: Family<ReasonLabel, Counter>,
    reloads: Family<ReloadLabel, Counter>,
    outcomes: Family<KindLabel, Counter>,
    outcome_error: OutcomeHistograms,
    outcome_predicted_tokens: Counter,
    outcome_reported_tokens: Counter,
    outcome_unreported: Family<ReasonLabel, Counter>,
    scopes: Gauge,
    blocks: Gauge,
    distinct_blocks: Gauge,
    engine_bytes: Gauge,
    owners: Gauge,
    sources: Family<StateLabel, Gauge>,
    verified_age: Gauge<f64, AtomicU64>,
}

/// Look-up times, seconds.
#[derive(Clone, Debug)]
pub(crate) struct LookupHistogram(pub(crate) Histogram);

/// Errors of predictions, tokens.
#[derive(Clone, Debug)]
struct OutcomeHistograms(Family<OutcomeLabel, Histogram, fn() -> Histogram>);

// === impl LookupHistogram ===

impl Default for LookupHistogram {
    /// From 1 us, doubling 18 times to 0.26 s: a look-up takes microseconds, the longest prompts milliseconds.
    fn default() -> Self {
        Self(Histogram::new(exponential_buckets(1e-6, 2.0, 19)))
    }
}

// === impl OutcomeHistograms ===

impl Default for OutcomeHistograms {
    /// 0 is the promise; 1 is the token that is always computed; from 16, a common block, doubling 13 times to 131,072,
    /// a long prompt.
    fn default() -> Self {
        Self(Family::new_with_constructor(|| {
            Histogram::new([0.0, 1.0].into_iter().chain(exponential_buckets(16.0, 2.0, 14)))
        }))
    }
}

// === impl Metrics ===

impl Metrics {
    /// Registers every field under `kvatlas_index_`.
    pub(crate) fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("kvatlas_index");
        let counters = [
            ("frames_applied", "Event frames that were applied", &self.frames_applied),
            (
                "frames_duplicate",
                "Event frames that were dropped because they were seen before",
                &self.frames_duplicate,
            ),
            (
                "frames_stale_epoch",
                "Event frames that were dropped because their publisher's lifetime is over",
                &self.frames_stale_epoch,
            ),
            (
                "frames_held",
                "Event frames that were kept until frames before them were sent again, or the state was known",
                &self.frames_held,
            ),
            (
                "frames_held_over",
                "Event frames that were dropped because too many were kept already; they are asked for again",
                &self.frames_held_over,
            ),
            ("gaps", "Times a source went from complete to missing frames", &self.gaps),
            ("epochs", "Publisher lifetimes that started", &self.epochs),
            ("reply_bytes", "Bytes of publishers' answers", &self.reply_bytes),
            (
                "divergences",
                "Times a source that counted was found to differ from its publisher at the same sequence",
                &self.divergences,
            ),
            ("blocks_stored", "Blocks that an owner did not hold before", &self.blocks_stored),
            ("blocks_removed", "Blocks that an owner does not hold any more", &self.blocks_removed),
            (
                "blocks_refused",
                "Blocks that were not stored because a bound was reached",
                &self.blocks_refused,
            ),
            (
                "owners_refused",
                "Owners in frames that were not taken in because a bound was reached",
                &self.owners_refused,
            ),
            ("speculations", "Routed requests whose blocks were made visible at once", &self.speculations),
            (
                "speculations_confirmed",
                "Of those that this server knows, requests whose blocks a question found to be held",
                &self.speculations_confirmed,
            ),
            (
                "speculations_expired",
                "Of those that this server knows, requests whose time passed without such a question",
                &self.speculations_expired,
            ),
            (
                "speculations_refused",
                "Speculations of other servers that were not kept: at a bound, or not usable",
                &self.speculations_refused,
            ),
            (
                "outcome_predicted_tokens",
                "Cached prompt tokens that were predicted for requests whose outcome was reported",
                &self.outcome_predicted_tokens,
            ),
            (
                "outcome_reported_tokens",
                "Cached prompt tokens that engines reported for the same requests",
                &self.outcome_reported_tokens,
            ),
        ];
        for (name, help, counter) in counters {
            registry.register(name, help, counter.clone());
        }
        let by_reason = [
            (
                "frames_bad",
                "Event frames that were dropped because they are not valid, by reason",
                &self.frames_bad,
            ),
            (
                "frames_refused",
                "Event frames that were dropped because a bound was reached, by which one",
                &self.frames_refused,
            ),
            (
                "request_failures",
                "Questions to publishers that were not sent, by reason; they are asked again",
                &self.request_failures,
            ),
            (
                "connections_refused",
                "Connections to the gRPC port that were not taken: over the limit, or the TLS handshake failed",
                &self.connections_refused,
            ),
            (
                "unauthenticated",
                "Calls of nobody who is known, by what is wrong with their credentials",
                &self.unauthenticated,
            ),
            ("denied", "Calls that the caller may not make, by what is missing", &self.denied),
            (
                "overload",
                "Calls that were not answered: at the admission limit (full, waited) or after their deadline",
                &self.overload,
            ),
            (
                "sources_expired",
                "Sources that were marked as silent, whose lease ended (gone), or that were dropped",
                &self.sources_expired,
            ),
            (
                "outcome_unreported",
                "Scored requests that were forgotten before an outcome was reported: evicted for newer ones, or replaced by one with the same id",
                &self.outcome_unreported,
            ),
        ];
        for (name, help, family) in by_reason {
            registry.register(name, help, family.clone());
        }
        registry.register(
            "checkpoints_written",
            "Checkpoints that were saved, by kind of store",
            self.checkpoints_written.clone(),
        );
        registry.register(
            "checkpoint_failures",
            "Checkpoints that could not be saved, by kind of store and reason; the last one stays",
            self.checkpoint_failures.clone(),
        );
        registry.register(
            "checkpoint_refused",
            "Checkpoints that could not be loaded or used at the start, by kind of store and reason; the index then started cold",
            self.checkpoint_refused.clone(),
        );
        registry.register(
            "requests",
            "Questions that were sent to publishers: frames (lost ones again) or state (what differs from ours)",
            self.requests.clone(),
        );
        registry.register(
            "comparisons",
            "Digests of a source that were compared with ours at the same sequence, by result",
            self.comparisons.clone(),
        );
        registry.register(
            "transfers",
            "Transfers of a source's state that were completed, by whether the digests were equal afterwards",
            self.transfers.clone(),
        );
        registry.register("calls", "gRPC calls, and requests inside streams, by result", self.calls.clone());
        registry.register(
            "reloads",
            "Files that changed and were taken in, or could not be used (what was in force before stays)",
            self.reloads.clone(),
        );
        registry.register_with_unit(
            "lookup",
            "Time of a score look-up on the server, without the network",
            Unit::Seconds,
            self.lookup.0.clone(),
        );
        registry.register_with_unit(
            "plan",
            "Time of a plan on the server, its look-up included, without the network",
            Unit::Seconds,
            self.plan_time.0.clone(),
        );
        registry.register(
            "plans",
            "Plans by kind: local (computed or read where it is decoded), pull (blocks from peers or stores), disaggregated (prefilled elsewhere)",
            self.plans.clone(),
        );
        registry.register(
            "outcomes",
            "Reported outcomes by the prediction they were compared with; those that were looked up only when the report came are counted here and nowhere else",
            self.outcomes.clone(),
        );
        registry.register_with_unit(
            "outcome_error",
            "Difference between predicted and reported cached prompt tokens, by direction, slowest tier the prediction relied on, and time since the source had been verified",
            Unit::Other("tokens".to_owned()),
            self.outcome_error.0.clone(),
        );
        let gauges = [
            (
                "checkpoint_restored_blocks",
                "Blocks that the checkpoint had at the start, counted once per owner",
                &self.checkpoint_restored_blocks,
            ),
            ("checkpoint_bytes", "Size of the last checkpoint that was written", &self.checkpoint_bytes),
            ("scopes", "Key spaces: model, block size, key version and tenant", &self.scopes),
            ("blocks", "Blocks held, counted once per owner", &self.blocks),
            ("engine_bytes", "Bytes of the tables of blocks and holders", &self.engine_bytes),
            ("distinct_blocks", "Different blocks held, counted once per scope", &self.distinct_blocks),
            ("owners", "Owners: tier and cache group of a source", &self.owners),
        ];
        for (name, help, gauge) in gauges {
            registry.register(name, help, gauge.clone());
        }
        registry.register_with_unit(
            "checkpoint_duration",
            "Time that the last checkpoint took to save",
            Unit::Seconds,
            self.checkpoint_duration.clone(),
        );
        registry.register_with_unit(
            "checkpoint_load_duration",
            "Time that it took to take in a checkpoint at the start; 0 if there was none to use",
            Unit::Seconds,
            self.checkpoint_load_duration.clone(),
        );
        registry.register_with_unit(
            "checkpoint_age",
            "Time since a checkpoint was last saved in this life of the server; infinite if none was",
            Unit::Seconds,
            self.checkpoint_age.clone(),
        );
        registry.register_with_unit(
            "verified_age",
            "Longest time since the digests of a source that counts were last equal; 0 if none counts, infinite if one was never compared",
            Unit::Seconds,
            self.verified_age.clone(),
        );
        registry.register("sources", "Sources (instance and rank) by state", self.sources.clone());
    }

    /// Takes over the sizes of the index; called before each scrape.
    pub(crate) fn set_totals(&self, totals: &IndexTotals) {
        self.scopes.set(totals.scopes as i64);
        self.blocks.set(totals.blocks as i64);
        self.distinct_blocks.set(totals.distinct_blocks as i64);
        self.engine_bytes.set(totals.engine_bytes as i64);
        self.owners.set(totals.owners as i64);
        self.verified_age.set(totals.verified_age_ms.map_or(f64::INFINITY, |age| age as f64 / 1e3));
        // All of them, so that a state that nobody is in any more goes back to 0.
        for state in SourceState::ALL {
            let label = StateLabel { state: state.name(), reason: state.degraded_reason() };
            let count = totals.sources.get(&state).copied().unwrap_or(0);
            self.sources.get_or_create(&label).set(count as i64);
        }
    }

    /// Notes that a checkpoint was saved now.
    pub(crate) fn set_checkpoint_saved(&self, now_ms: u64) {
        self.checkpoint_saved_ms.store(now_ms.saturating_add(1), Relaxed);
    }

    /// Takes over the age of the last checkpoint; called before each scrape.
    pub(crate) fn set_checkpoint_age(&self, now_ms: u64) {
        let age = match self.checkpoint_saved_ms.load(Relaxed) {
            0 => f64::INFINITY,
            saved => now_ms.saturating_sub(saved - 1) as f64 / 1e3,
        };
        self.checkpoint_age.set(age);
    }

    /// A number that is another one whenever something has changed.
    pub(crate) fn changes(&self) -> u64 {
        self.blocks_stored.get() + self.blocks_removed.get() + self.epochs.get()
    }

    /// Counts what became of a frame.
    pub(crate) fn count_applied(&self, applied: &Applied) {
        self.blocks_stored.inc_by(applied.stored as u64);
        self.blocks_removed.inc_by(applied.removed as u64);
        self.blocks_refused.inc_by(applied.refused_blocks as u64);
        self.owners_refused.inc_by(applied.refused_owners as u64);
        self.frames_applied.inc_by(applied.frames as u64);
        match applied.verdict {
            Some(Verdict::NewEpoch | Verdict::NewEpochHidden) => self.epochs.inc(),
            Some(Verdict::Held) => self.frames_held.inc(),
            Some(Verdict::HeldOver) => self.frames_held_over.inc(),
            Some(Verdict::Duplicate) => self.frames_duplicate.inc(),
            Some(Verdict::StaleEpoch) => self.frames_stale_epoch.inc(),
            Some(Verdict::Apply) | None => 0,
        };
        let lost = SourceState::Degraded(DegradedReason::FramesLost);
        if applied.has_gap && applied.before != Some(lost) {
            self.gaps.inc();
        }
        let result = |equal| ResultLabel { result: if equal { "equal" } else { "unequal" } };
        if let Some(equal) = applied.compared {
            self.comparisons.get_or_create(&result(equal)).inc();
        }
        if let Some(equal) = applied.transferred {
            self.transfers.get_or_create(&result(equal)).inc();
        }
    }

    /// Counts a reported outcome.
    pub(crate) fn count_outcome(&self, outcome: &Outcome) {
        let kind = match outcome.source {
            PredictionSource::Remembered => "remembered",
            PredictionSource::Given => "given",
            PredictionSource::LookedUp => "looked_up",
            PredictionSource::Unspecified => "unspecified",
        };
        self.outcomes.get_or_create(&KindLabel { kind }).inc();
        if !outcome.is_evidence() {
            return;
        }
        self.outcome_predicted_tokens.inc_by(outcome.prediction.tokens.into());
        self.outcome_reported_tokens.inc_by(outcome.reported.into());
        let (direction, tier, age) = (outcome.direction(), outcome.tier(), outcome.age());
        let histogram = self.outcome_error.0.get_or_create_owned(&OutcomeLabel { direction, tier, age });
        histogram.observe(outcome.error_tokens().unsigned_abs() as f64);
    }

    /// Counts requests whose outcome nobody reported in time.
    pub(crate) fn count_unreported(&self, unreported: Unreported) {
        for (reason, count) in [("evicted", unreported.evicted), ("replaced", unreported.replaced)] {
            if count > 0 {
                self.outcome_unreported.get_or_create(&ReasonLabel { reason }).inc_by(count);
            }
        }
    }

    /// Counts a call that overload left without an answer.
    pub(crate) fn count_overload(&self, error: &OverloadError) {
        let reason = match error {
            OverloadError::Full { .. } => "full",
            OverloadError::Waited { .. } => "waited",
            OverloadError::Deadline => "deadline",
        };
        self.overload.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// Counts what a plan decided.
    pub(crate) fn count_plan(&self, plan: &PlanResponse) {
        let is_elsewhere =
            (&plan.prefill_instance, plan.prefill_rank) != (&plan.decode_instance, plan.decode_rank);
        let pulls = plan.segments.iter().any(|segment| !segment.link_class.is_empty());
        let kind = match (is_elsewhere, pulls) {
            (true, _) => "disaggregated",
            (false, true) => "pull",
            (false, false) => "local",
        };
        self.plans.get_or_create(&KindLabel { kind }).inc();
    }

    /// Counts a file that changed.
    pub(crate) fn count_reload(&self, what: &'static str, taken: bool) {
        let result = if taken { "taken" } else { "refused" };
        self.reloads.get_or_create(&ReloadLabel { what, result }).inc();
    }

    pub(crate) fn count_call(&self, call: &'static str, result: &'static str) {
        self.calls.get_or_create(&CallLabel { call, result }).inc();
    }
}
