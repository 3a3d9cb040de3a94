//! The shim's metrics, read from each source's [`Progress`] when somebody scrapes.

use std::borrow::Cow;
use std::sync::Arc;

use kvatlas_proto::frame::SourceHealth;
use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use tokio::sync::watch;

use crate::shim::{Progress, Shim};
use crate::state::RestoreStateError;

/// Exposes the sources of one process. Clones share what they watch.
#[derive(Clone, Debug, Default)]
pub struct ShimCollector {
    sources: Arc<Mutex<Vec<watch::Receiver<Progress>>>>,
}

#[derive(Clone, Debug, EncodeLabelSet, Hash, PartialEq, Eq)]
struct SourceLabels {
    model: String,
    instance: String,
    rank: u32,
}

#[derive(Clone, Debug, EncodeLabelSet, Hash, PartialEq, Eq)]
struct ReasonLabels {
    model: String,
    instance: String,
    rank: u32,
    reason: Cow<'static, str>,
}

#[derive(Clone, Debug, EncodeLabelSet, Hash, PartialEq, Eq)]
struct KindLabels {
    model: String,
    instance: String,
    rank: u32,
    kind: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Hash, PartialEq, Eq)]
struct AdapterLabels {
    model: String,
    instance: String,
    rank: u32,
    adapter: &'static str,
}

type Read = fn(&Progress) -> u64;

/// Name, help and value of every counter with one value per source.
const COUNTERS: [(&str, &str, Read); 22] = [
    ("kvatlas_shim_messages", "Engine messages applied", |p| p.counts.messages),
    (
        "kvatlas_shim_duplicate_messages",
        "Engine messages dropped because they had been applied before",
        |p| p.counts.duplicates,
    ),
    ("kvatlas_shim_overflow_messages", "Engine messages dropped because the intake queue was full", |p| {
        p.overflow
    }),
    ("kvatlas_shim_unknown_events", "Engine events of a kind that is not known", |p| p.counts.unknown_events),
    ("kvatlas_shim_gaps", "Gaps seen in the engine's sequence", |p| p.counts.gaps),
    ("kvatlas_shim_losses", "Gaps that could not be filled; the source started over", |p| p.counts.losses),
    ("kvatlas_shim_engine_restarts", "Engine restarts noticed", |p| p.counts.restarts),
    ("kvatlas_shim_replays", "Replays asked for from the engine", |p| p.replays.0),
    ("kvatlas_shim_unanswered_replays", "Replays that the engine did not answer", |p| p.replays.1),
    ("kvatlas_shim_stored_blocks", "Blocks that the engine stored, copies counted", |p| p.mirror.stored),
    ("kvatlas_shim_removed_blocks", "Blocks that the engine removed, copies counted", |p| p.mirror.removed),
    ("kvatlas_shim_unknown_removals", "Removals of a block that was not held there", |p| {
        p.mirror.unknown_removals
    }),
    ("kvatlas_shim_expired_blocks", "Blocks that expired in a medium that announces no removals", |p| {
        p.mirror.expired
    }),
    ("kvatlas_shim_orphan_blocks", "Blocks that had to wait for their parent or tokens", |p| {
        p.mirror.unresolved
    }),
    ("kvatlas_shim_linked_blocks", "Blocks that waited and were then linked", |p| p.mirror.linked),
    ("kvatlas_shim_frames", "Frames published", |p| p.frames),
    ("kvatlas_shim_frame_bytes", "Bytes published", |p| p.frame_bytes),
    ("kvatlas_shim_publish_failures", "Frames that the bus refused", |p| p.publish_failures),
    ("kvatlas_shim_answer_frames", "Frames sent to servers that asked", |p| p.requests.answer_frames),
    ("kvatlas_shim_answer_bytes", "Bytes sent to servers that asked", |p| p.requests.answer_bytes),
    ("kvatlas_shim_state_saves", "Times that the state was written to its file", |p| p.state.saves),
    ("kvatlas_shim_state_failures", "Times that the state could not be written", |p| p.state.failures),
];

/// Name, help and value of every gauge with one value per source.
const GAUGES: [(&str, &str, Read); 7] = [
    ("kvatlas_shim_connected", "1 while the engine's event socket is connected", |p| {
        u64::from(p.connection.up)
    }),
    ("kvatlas_shim_blocks", "Blocks the source holds, over all tiers and groups", |p| p.blocks),
    ("kvatlas_shim_shards", "Virtual shards that the source publishes in", |p| u64::from(p.shards)),
    ("kvatlas_shim_unproved", "1 while saved blocks wait for the engine to confirm them", |p| {
        u64::from(p.unproved)
    }),
    ("kvatlas_shim_state_bytes", "Size of the state that was written last", |p| p.state.bytes),
    ("kvatlas_shim_state_restored", "1 if the source began with what an earlier process had saved", |p| {
        u64::from(p.state.restored)
    }),
    ("kvatlas_shim_exact", "1 while every event since the engine's start or reset was seen", |p| {
        u64::from(p.health == SourceHealth::Exact)
    }),
];

/// Reasons for which blocks or messages do not count, beside undecodable messages.
const DROPS: [(&str, Read); 6] = [
    ("frame_shape", |p| p.bad_frames),
    ("over_limit", |p| p.mirror.over_limit),
    ("block_size_mismatch", |p| p.mirror.block_size_mismatch),
    ("untracked_page", |p| p.untracked_pages),
    ("unknown_medium", |p| p.mirror.unknown_medium),
    ("unknown_group", |p| p.mirror.unknown_group),
];

/// What servers ask for.
const REQUESTS: [(&str, Read); 3] =
    [("frames", |p| p.requests.frames), ("state", |p| p.requests.state), ("hello", |p| p.requests.hello)];

/// Why requests are not answered.
const REFUSALS: [(&str, Read); 4] = [
    ("malformed", |p| p.requests.malformed),
    ("overflow", |p| p.requests.overflow),
    ("other_epoch", |p| p.requests.other_epoch),
    ("other_shards", |p| p.requests.other_shards),
];

// === impl ShimCollector ===

impl ShimCollector {
    /// Exposes the sources of this shim too.
    pub fn watch(&self, shim: &Shim) {
        self.sources.lock().extend(shim.progress().iter().cloned());
    }
}

impl Collector for ShimCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let sources: Vec<Progress> =
            self.sources.lock().iter().map(|source| source.borrow().clone()).collect();
        for (name, help, read) in COUNTERS {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for source in &sources {
                ConstCounter::new(read(source)).encode(metric.encode_family(&SourceLabels::of(source))?)?;
            }
        }
        for (name, help, read) in GAUGES {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for source in &sources {
                ConstGauge::new(read(source)).encode(metric.encode_family(&SourceLabels::of(source))?)?;
            }
        }
        let help =
            "1 for the adapter that reads the engine's events; its label is unknown until it is recognised";
        let mut metric = encoder.encode_descriptor("kvatlas_shim_adapter", help, None, MetricType::Gauge)?;
        for source in &sources {
            let labels = AdapterLabels::of(source);
            ConstGauge::new(1u64).encode(metric.encode_family(&labels)?)?;
        }
        let help = "Messages or blocks that were dropped or do not count, by reason";
        let mut metric = encoder.encode_descriptor("kvatlas_shim_drops", help, None, MetricType::Counter)?;
        for source in &sources {
            let fixed = DROPS.iter().map(|(reason, read)| (*reason, read(source)));
            for (reason, count) in fixed.chain(source.counts.undecodable.iter().copied()) {
                ConstCounter::new(count).encode(metric.encode_family(&ReasonLabels::of(source, reason))?)?;
            }
        }
        encode_requests(&mut encoder, &sources)?;
        encode_refused_states(&mut encoder, &sources)
    }
}

fn encode_refused_states(encoder: &mut DescriptorEncoder<'_>, sources: &[Progress]) -> std::fmt::Result {
    let help = "Saved states that were not used, by reason";
    let name = "kvatlas_shim_refused_states";
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for source in sources {
        for reason in RestoreStateError::REASONS {
            let labels = ReasonLabels::of(source, reason);
            let count = u64::from(source.state.refused == Some(reason));
            ConstCounter::new(count).encode(metric.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

fn encode_requests(encoder: &mut DescriptorEncoder<'_>, sources: &[Progress]) -> std::fmt::Result {
    let help = "Requests of servers, by what they asked for";
    let mut metric = encoder.encode_descriptor("kvatlas_shim_requests", help, None, MetricType::Counter)?;
    for source in sources {
        for (kind, read) in REQUESTS {
            let labels = KindLabels::of(source, kind);
            ConstCounter::new(read(source)).encode(metric.encode_family(&labels)?)?;
        }
    }
    let help = "Requests of servers that were not answered, by reason";
    let name = "kvatlas_shim_refused_requests";
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for source in sources {
        for (reason, read) in REFUSALS {
            let labels = ReasonLabels::of(source, reason);
            ConstCounter::new(read(source)).encode(metric.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

// === impl SourceLabels ===

impl SourceLabels {
    fn of(progress: &Progress) -> Self {
        Self {
            model: progress.model.clone(),
            instance: progress.source.instance.to_string(),
            rank: progress.source.rank.0,
        }
    }
}

// === impl KindLabels ===

impl KindLabels {
    fn of(progress: &Progress, kind: &'static str) -> Self {
        let SourceLabels { model, instance, rank } = SourceLabels::of(progress);
        Self { model, instance, rank, kind }
    }
}

// === impl AdapterLabels ===

impl AdapterLabels {
    fn of(progress: &Progress) -> Self {
        let SourceLabels { model, instance, rank } = SourceLabels::of(progress);
        Self { model, instance, rank, adapter: progress.adapter.unwrap_or("unknown") }
    }
}

// === impl ReasonLabels ===

impl ReasonLabels {
    fn of(progress: &Progress, reason: &'static str) -> Self {
        let SourceLabels { model, instance, rank } = SourceLabels::of(progress);
        Self { model, instance, rank, reason: Cow::Borrowed(reason) }
    }
}
