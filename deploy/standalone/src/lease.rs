//! A server's part of the shards by lease: slots of the broker's bucket are sets of shards here, and counters are metrics.

use std::fmt;

use kvatlas_bus::NatsBus;
use kvatlas_bus::leases::{LeaseConfig, LeaseStats, Slot, SlotLease};
use kvatlas_proto::subject::Subjects;
use kvatlas_proto::{Partition, ShardSet};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::failure::Failure;

/// A held part of the shards, given up when this is shut down.
pub struct ShardLease {
    lease: SlotLease,
    wanted: watch::Receiver<ShardSet>,
    follow: JoinHandle<()>,
}

/// Exposes the counters of a lease.
struct LeaseCollector<F>(F);

// === impl ShardLease ===

impl ShardLease {
    /// Waits for a part, and keeps one.
    pub async fn take(
        bus: &NatsBus,
        subjects: &Subjects,
        server: String,
        partition: Partition,
        initial_servers: u16,
        registry: &mut Registry,
    ) -> Result<Self, Failure> {
        let config = LeaseConfig {
            bucket: subjects.slot_bucket(),
            server,
            initial_servers,
            max_servers: partition.shards(),
        };
        let lease = bus.lease_slot(config).await.map_err(Failure::run)?;
        registry.register_collector(Box::new(LeaseCollector(lease.stats())));
        let mut slots = lease.slot();
        let (owned, wanted) = watch::channel(set_of(*slots.borrow_and_update()));
        let follow = tokio::spawn(async move {
            while slots.changed().await.is_ok() {
                owned.send_replace(set_of(*slots.borrow_and_update()));
            }
        });
        Ok(Self { lease, wanted, follow })
    }

    /// The set of shards to own, as it is now and as it changes.
    pub fn wanted(&self) -> watch::Receiver<ShardSet> {
        self.wanted.clone()
    }

    /// Gives the part up, so that another server can take it at once.
    pub async fn shutdown(self) {
        // First, so that giving it up is not followed.
        self.follow.abort();
        self.lease.shutdown().await;
    }
}

/// Replicas own the same set.
fn set_of(slot: Slot) -> ShardSet {
    ShardSet::new(slot.ordinal().into(), slot.servers().into())
        .expect("a slot has an ordinal below its servers, of which there are no more than shards")
}

// === impl LeaseCollector ===

impl<F> fmt::Debug for LeaseCollector<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeaseCollector").finish_non_exhaustive()
    }
}

impl<F: Fn() -> LeaseStats + Send + Sync + 'static> Collector for LeaseCollector<F> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let stats = (self.0)();
        let help =
            "1 while this server holds a slot of the division of shards; without one it keeps what it owns";
        let metric = encoder.encode_descriptor("kvatlas_lease_held", help, None, MetricType::Gauge)?;
        ConstGauge::new(u64::from(stats.held)).encode(metric)?;
        for (name, help, count) in [
            ("taken", "Slots that this server took: the first, and one for each change", stats.taken),
            ("renewed", "Renewals of this server's slot", stats.renewed),
            (
                "lost",
                "Times that this server's slot was not renewed in time, or the bucket lost it",
                stats.lost,
            ),
            ("refused", "Times that another server was quicker to take a slot", stats.refused),
            ("failed", "Looks at the bucket of slots that failed", stats.failed),
            (
                "ignored",
                "Looks that found a division among more servers than there are shards",
                stats.ignored,
            ),
        ] {
            let name = format!("kvatlas_lease_{name}");
            let metric = encoder.encode_descriptor(&name, help, None, MetricType::Counter)?;
            ConstCounter::new(count).encode(metric)?;
        }
        Ok(())
    }
}
