//! Many servers as one index: each owns some virtual shards, and any of them answers for all.
//!
//! * [`Inquiry`]: a query divided into the stretches of the prompt that lie together, and put together again.
//! * `question`, `answer`: what servers say to each other; `lookup`: how a question is answered from what is here.
//! * `presence`: who is there, and whom to ask about which shards.
//! * [`Coordinator`]: asks, asks again, gives up in time. `responder`: the other end.
//! * [`Steward`]: takes shards in, proves them, answers for them, lets them go.
//!
//! Deliberately absent: consensus, routing tables, health checks. Who gets a question, and what happens when a server is gone,
//! is the broker's queue groups' business; all that servers tell each other is which sets they can answer for.

mod answer;
mod coordinator;
mod inquiry;
mod lookup;
mod metrics;
mod presence;
mod question;
mod responder;
mod steward;

use std::sync::Arc;
use std::time::Duration;

use kvatlas_bus::{Bus, SubscribeError};
use kvatlas_proto::subject::{Asker, Subjects};
use kvatlas_proto::{Partition, ShardSet};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::burst::BurstLimiter;
use crate::clock::Clock;
use crate::index::Index;
use crate::ingest::Owned;
use crate::server::Readiness;

pub use answer::{EncodeAnswerError, ParseAnswerError, ShardAnswer};
pub use coordinator::SHARD_TIMEOUT;
pub(crate) use coordinator::{Coordinator, Covered};
pub use inquiry::{Coverage, Inquiry};
pub(crate) use metrics::ClusterMetrics;
use presence::Presence;
pub use presence::{ANNOUNCE_MS, Announcement, PRESENCE_MS, ParseAnnouncementError};
pub use question::{EncodeQuestionError, ParseQuestionError, ShardQuestion};
use responder::Responder;
use steward::{Serving, Steward};

/// What a server of many has to know.
#[derive(Clone, Debug)]
pub struct ClusterConfig {
    /// How the key space is cut: the same for every server and shim of the deployment.
    pub partition: Partition,
    /// The server's set of shards, as it is now and as it changes.
    pub wanted: watch::Receiver<ShardSet>,
}

/// What all parts of the cluster's side of a server share.
pub(crate) struct Shared {
    pub(crate) index: Arc<Index>,
    pub(crate) bus: Arc<dyn Bus>,
    pub(crate) subjects: Subjects,
    pub(crate) clock: Clock,
}

/// The server around it.
pub(crate) struct Shell {
    pub(crate) ingest: mpsc::Sender<Owned>,
    pub(crate) discovery: Duration,
    /// True once the checkpoint, if there is one, was taken in.
    pub(crate) loaded: watch::Receiver<bool>,
    pub(crate) ready: Readiness,
    pub(crate) stop: CancellationToken,
}

/// Starts the cluster's side of a server. An error names what could not be subscribed to.
pub(crate) async fn start(
    shared: Shared,
    config: &ClusterConfig,
    asker: Asker,
    shell: Shell,
    tasks: &mut JoinSet<()>,
) -> Result<(Arc<Coordinator>, Arc<ClusterMetrics>), (String, SubscribeError)> {
    let Shared { index, bus, subjects, clock } = shared;
    let subscribe =
        async |filter: String| bus.subscribe(filter.clone()).await.map_err(|source| (filter, source));
    let answers = subscribe(subjects.all_answers(&asker)).await?;
    let announcements = subscribe(subjects.servers()).await?;
    let metrics = Arc::new(ClusterMetrics::default());
    let serving = Arc::new(Serving::nothing(config.partition));
    let presence = Arc::new(Mutex::new(Presence::new(config.partition)));
    let server = asker.to_string();
    let coordinator = Arc::new(Coordinator::new(
        Arc::clone(&index),
        Arc::clone(&bus),
        subjects.clone(),
        asker,
        clock,
        Arc::clone(&serving),
        Arc::clone(&presence),
        Arc::clone(&metrics),
    ));
    tasks.spawn(Arc::clone(&coordinator).deliver(answers, shell.stop.clone()));
    let responder = Arc::new(Responder::new(
        Arc::clone(&index),
        Arc::clone(&bus),
        clock,
        Arc::clone(&serving),
        Arc::clone(&metrics),
    ));
    let steward = Steward {
        index,
        bus,
        subjects,
        clock,
        serving,
        presence,
        responder,
        metrics: Arc::clone(&metrics),
        server,
        wanted: config.wanted.clone(),
        discovery: shell.discovery,
        loaded: shell.loaded,
        ingest: shell.ingest,
        ready: shell.ready,
        held: Vec::new(),
        complete_since: None,
        log: BurstLimiter::default(),
    };
    tasks.spawn(steward.run(announcements, shell.stop));
    Ok((coordinator, metrics))
}

#[cfg(test)]
mod tests;
