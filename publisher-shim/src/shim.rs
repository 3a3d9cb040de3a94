//! Runs one source per engine endpoint: reads at once, decides in [`crate::source`], publishes in batches.
//!
//! ```text
//! SUB task --(bounded queue)--> source task --frames--> bus
//!                                   |  ^
//!                        DEALER replay  requests from servers, answered to whoever asked
//! ```
//!
//! The reading task never waits: a full queue drops the message, counts it, and the sequence then shows a gap, which the
//! source repairs. So a slow bus never slows an engine down. The same holds on the other side: a frame that the bus loses is
//! asked for by whoever missed it, and a large answer is sent a few frames at a time between other work.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kvatlas_bus::Bus;
use kvatlas_proto::frame::SourceHealth;
use kvatlas_proto::scope::InvalidScopeError;
use kvatlas_proto::subject::Subjects;
use kvatlas_proto::{DpRank, Epoch, FrameSeq, InstanceId, KeyHasher, Partition, SourceId};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

mod intake;
mod requests;
mod state_file;
mod worker;

pub use requests::RequestCounts;
pub use state_file::StateCounts;

use intake::Intake;
use state_file::StateFile;
use worker::{Parts, Worker, wall_clock_ns};

use crate::adapter::Adapter;
use crate::mirror::{MirrorCounts, MirrorLimits, RemovalPolicy};
use crate::source::{PublishLimits, Source, SourceConfig, SourceCounts};
use crate::zmq::{self, Attach, Connection};

/// Messages between the reading task and the source. At 50 steps a second that is 20 minutes of one engine rank.
pub const QUEUE_MESSAGES: usize = 65_536;
/// Bytes between the reading task and the source.
pub const QUEUE_BYTES: usize = 128 << 20;
/// How long changes wait for company before they are published.
pub const LINGER: Duration = Duration::from_millis(2);
/// Time between signs of life of an idle source.
pub const HEARTBEAT: Duration = Duration::from_secs(1);
/// Time between two writes of a source's state, if anything has changed. What is newer comes back with the engine's replay.
pub const STATE_INTERVAL: Duration = Duration::from_secs(30);
/// Longest wait for the tasks at shutdown.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3);

/// One publisher socket of an engine: one data-parallel rank.
#[derive(Clone, Debug)]
pub struct EndpointConfig {
    /// Event socket, for example `tcp://127.0.0.1:5557`.
    pub events: String,
    /// Who opens the connection.
    pub attach: Attach,
    /// Replay socket, for example `tcp://127.0.0.1:5657`. Without it a gap costs the state from before.
    pub replay: Option<String>,
    /// Only messages whose topic starts with this; empty for all.
    pub topic: String,
    /// Data-parallel rank; `None` takes the one that the messages name.
    pub rank: Option<DpRank>,
}

/// What one shim follows and how it publishes.
#[derive(Clone, Debug)]
pub struct ShimConfig {
    /// Who speaks; `None`: the first messages show it.
    pub adapter: Option<&'static dyn Adapter>,
    /// Model name as the engine serves it.
    pub model: String,
    /// Tenant; empty for the default one.
    pub tenant: String,
    /// What a gateway routes to.
    pub instance: InstanceId,
    /// The engine's publisher sockets, one per data-parallel rank.
    pub endpoints: Vec<EndpointConfig>,
    /// Tokens per block; `None` takes the engine's.
    pub block_size: Option<u32>,
    /// What a removal says about copies.
    pub removal: RemovalPolicy,
    /// How keys are computed.
    pub hasher: KeyHasher,
    /// How the key space is cut: the same in every process of the deployment.
    pub partition: Partition,
    /// Bounds of each mirror.
    pub limits: MirrorLimits,
    /// Subjects of the deployment.
    pub subjects: Subjects,
}

/// A running shim. Dropping it stops it at once; [`Shim::shutdown`] publishes what is waiting first.
pub struct Shim {
    token: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
    progress: Vec<watch::Receiver<Progress>>,
}

/// Where one source is, for metrics and for those who wait for it.
#[derive(Clone, Debug)]
pub struct Progress {
    /// Who publishes.
    pub source: SourceId,
    /// Model name.
    pub model: String,
    /// Name of the adapter, once known.
    pub adapter: Option<&'static str>,
    /// State of the event connection.
    pub connection: Connection,
    /// Number of the connection up to which the source has compared or replayed.
    pub known_connection: u64,
    /// Sequence of the last engine message applied.
    pub engine_seq: Option<u64>,
    /// Messages taken off the queue and dealt with, whatever came of it.
    pub handled: u64,
    /// Messages dropped because the queue was full.
    pub overflow: u64,
    /// Messages dropped because their frames are not `[topic, sequence, payload]`.
    pub bad_frames: u64,
    /// Epoch and the sequence that the next frame of the first shard will have.
    pub position: (Epoch, FrameSeq),
    /// Virtual shards that the source publishes in.
    pub shards: u16,
    /// Changes that were applied but not published yet.
    pub pending: bool,
    /// Frames handed to the bus.
    pub frames: u64,
    /// Bytes handed to the bus.
    pub frame_bytes: u64,
    /// Frames that the bus refused.
    pub publish_failures: u64,
    /// What the source knows about its own truth.
    pub health: SourceHealth,
    /// What is held was saved by an earlier process and the engine has not confirmed it: nothing is published.
    pub unproved: bool,
    /// Visible blocks.
    pub blocks: u64,
    /// Counters of the engine's side.
    pub counts: SourceCounts,
    /// Counters of the mirror.
    pub mirror: MirrorCounts,
    /// Pages that could not be followed, where the engine's block size is not the scope's.
    pub untracked_pages: u64,
    /// Replays asked for, and those that no engine answered.
    pub replays: (u64, u64),
    /// What was asked of the source.
    pub requests: RequestCounts,
    /// What became of the state file.
    pub state: StateCounts,
}

/// Why a shim cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartShimError {
    /// There is nothing to follow.
    #[error("no engine endpoint is given: name at least one event socket, for example tcp://127.0.0.1:5557")]
    NoEndpoint,
    /// Model, tenant or block size cannot be a scope.
    #[error(transparent)]
    Scope(#[from] InvalidScopeError),
    /// An address is not a ZeroMQ endpoint.
    #[error("{0:?} is not a ZeroMQ endpoint: use tcp://HOST:PORT or ipc://PATH")]
    Endpoint(String),
    /// The directory for state files cannot be made.
    #[error("the state directory {dir} cannot be used: {error}; give one that this process may write to", dir = dir.display())]
    StateDir {
        /// Which one.
        dir: PathBuf,
        /// Why.
        error: std::io::Error,
    },
}

// === impl Shim ===

impl Shim {
    /// Starts following the endpoints. Engines need not be there yet.
    pub fn start(config: &ShimConfig, bus: &Arc<dyn Bus>) -> Result<Self, StartShimError> {
        Self::start_with_state(config, bus, None)
    }

    /// The same; what the sources hold survives this process in files in `state_dir`, one per endpoint that has a replay
    /// socket.
    pub fn start_with_state(
        config: &ShimConfig,
        bus: &Arc<dyn Bus>,
        state_dir: Option<&Path>,
    ) -> Result<Self, StartShimError> {
        if config.endpoints.is_empty() {
            return Err(StartShimError::NoEndpoint);
        }
        if let Some(dir) = state_dir {
            let unusable = |error| StartShimError::StateDir { dir: dir.to_owned(), error };
            std::fs::create_dir_all(dir).map_err(unusable)?;
        }
        let mut shim = Self { token: CancellationToken::new(), tasks: Vec::new(), progress: Vec::new() };
        for endpoint in &config.endpoints {
            shim.start_source(config, endpoint, bus, state_dir)?;
        }
        Ok(shim)
    }

    fn start_source(
        &mut self,
        config: &ShimConfig,
        endpoint: &EndpointConfig,
        bus: &Arc<dyn Bus>,
        state_dir: Option<&Path>,
    ) -> Result<(), StartShimError> {
        for address in std::iter::once(&endpoint.events).chain(&endpoint.replay) {
            if address.replace("://*:", "://0.0.0.0:").parse::<::zeromq::Endpoint>().is_err() {
                return Err(StartShimError::Endpoint(address.clone()));
            }
        }
        let source_config = SourceConfig {
            adapter: config.adapter,
            model: config.model.clone(),
            tenant: config.tenant.clone(),
            instance: config.instance.clone(),
            endpoint: endpoint.events.clone(),
            rank: endpoint.rank,
            block_size: config.block_size,
            hasher: config.hasher,
            partition: config.partition,
            removal: config.removal,
            limits: config.limits,
            publish: PublishLimits::default(),
            has_replay: endpoint.replay.is_some(),
        };
        let state_file = state_dir.map(|dir| StateFile::new(dir, &config.instance, &endpoint.events));
        let (source, state) = match &state_file {
            Some(file) => file.open(source_config, wall_clock_ns())?,
            None => (Source::new(source_config, wall_clock_ns())?, StateCounts::default()),
        };
        let intake = Arc::new(Intake::default());
        let (queue_in, queue) = mpsc::channel(QUEUE_MESSAGES);
        let (connection_in, connection) = watch::channel(Connection::default());
        let (progress_in, progress) = watch::channel(Progress::of(&source, &config.model));
        let worker = Worker::new(Parts {
            endpoint: endpoint.clone(),
            model: config.model.clone(),
            source,
            // Without a replay nobody could show that a state is still true.
            state_file: state_file.filter(|_| endpoint.replay.is_some()),
            state,
            subjects: config.subjects.clone(),
            bus: bus.clone(),
            intake: intake.clone(),
            queue,
            connection,
            progress: progress_in,
        });
        let (endpoint, token) = (endpoint.clone(), self.token.clone());
        self.tasks.push(tokio::spawn(async move {
            let deliver = |connection, frames: Vec<Bytes>| intake.deliver(&queue_in, connection, &frames);
            zmq::follow(&endpoint.events, endpoint.attach, &endpoint.topic, &connection_in, &token, deliver)
                .await;
        }));
        self.tasks.push(tokio::spawn(worker.run(self.token.clone())));
        self.progress.push(progress);
        Ok(())
    }

    /// Where each source is, in the order of the endpoints.
    pub fn progress(&self) -> &[watch::Receiver<Progress>] {
        &self.progress
    }

    /// Publishes what is waiting and stops, within a bounded time.
    pub async fn shutdown(mut self) {
        self.token.cancel();
        let tasks = std::mem::take(&mut self.tasks);
        let all = async {
            for task in tasks {
                // A panic in a task was logged by the runtime; there is nothing left to stop.
                let _ = task.await;
            }
        };
        if timeout(SHUTDOWN_TIMEOUT, all).await.is_err() {
            tracing::warn!(
                "the shim did not stop in time; what was waiting is lost; servers will ask for what they miss"
            );
        }
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        self.token.cancel();
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

// === impl Progress ===

impl Progress {
    fn of(source: &Source, model: &str) -> Self {
        Self {
            source: source.id(),
            model: model.to_owned(),
            adapter: source.adapter().map(Adapter::name),
            connection: Connection::default(),
            known_connection: 0,
            engine_seq: source.last_engine_seq(),
            handled: 0,
            overflow: 0,
            bad_frames: 0,
            position: source.position(source.partition().shard(0)),
            shards: source.partition().shards(),
            pending: source.has_frames(),
            frames: 0,
            frame_bytes: 0,
            publish_failures: 0,
            health: source.health(),
            unproved: source.is_unproved(),
            blocks: source.mirror().visible_blocks(),
            counts: source.counts().clone(),
            mirror: source.mirror_counts(),
            untracked_pages: source.untracked_pages(),
            replays: (0, 0),
            requests: RequestCounts::default(),
            state: StateCounts::default(),
        }
    }

    /// Messages that arrived and were dealt with in any way, dropped ones included.
    pub fn arrived(&self) -> u64 {
        self.handled + self.overflow + self.bad_frames
    }
}
