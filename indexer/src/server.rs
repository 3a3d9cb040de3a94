//! The index server: wires the index to a bus, a gRPC port and an HTTP port. The handle is the lifetime: dropped, the
//! server stops.

use std::hash::{BuildHasher as _, RandomState};
use std::net::SocketAddr;
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use kvatlas_bus::{Bus, SubscribeError};
use kvatlas_planner::Profiles;
use kvatlas_proto::ShardId;
use kvatlas_proto::grpc::FILE_DESCRIPTOR_SET;
use kvatlas_proto::grpc::atlas_server::AtlasServer;
use kvatlas_proto::keys::KeySeed;
use kvatlas_proto::subject::{Asker, Subjects};
use prometheus_client::registry::Registry;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::codec::CompressionEncoding;
use tonic::server::NamedService;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::access::{Access, Keep};
use crate::admission::{Admission, DEFAULT_MAX_INFLIGHT};
use crate::clock::Clock;
use crate::cluster::{self, ClusterConfig};
use crate::guard::Guard;
use crate::http::{self, HttpState, ListenError, listen};
use crate::incoming::{Acceptor, DEFAULT_MAX_CONNECTIONS};
use crate::index::{Index, IndexLimits};
use crate::ingest::{
    Ingest, IngestLog, OWNED_QUEUE, Owned, REQUEST_QUEUE, TaggedSubscription, end_leases, send_requests,
};
use crate::matching::TierWeights;
use crate::metrics::Metrics;
use crate::request::{MAX_PROMPT_TOKENS, RequestLimits};
use crate::service::{AtlasService, Parts};
use crate::speculate::Speculation;
use crate::store::{self, CheckpointConfig, Loading};
use crate::tenant_keys::{TenantKeys, TenantSecrets};
use crate::tls::TlsFiles;
use crate::watched::WatchedFileError;

/// Largest request, bytes, by default: the most token ids at five bytes each (the longest varint of 32 bits), and a mebibyte for
/// candidates and multimodal items.
pub const MAX_REQUEST_BYTES: usize = MAX_PROMPT_TOKENS * 5 + (1 << 20);
/// Calls open on one connection, by default. Gateways use few connections with many calls; a caller that needs more opens another.
pub const MAX_STREAMS_PER_CONNECTION: u32 = 256;
/// Silence on a connection after which the peer is probed.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// Time a probed peer has to answer before its connection is closed.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes a caller may send on one call before the server has read them: a prompt of typical size in one flight.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
/// The same for all calls of a connection.
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;
/// Time that open calls have to end at a shutdown. Below the 5 s after which supervisors commonly lose patience.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(4);
/// Time that publishers on a broker usually need to show themselves, with room: they answer at once when asked.
pub const DISCOVERY: Duration = Duration::from_millis(500);
/// Longest time that answers count as incomplete after the start. Who could not be found out by then does not count.
const DISCOVERY_MAX: Duration = Duration::from_secs(30);
/// How often it is looked whether all publishers are found out.
const DISCOVERY_POLL: Duration = Duration::from_millis(20);

/// How an index server is to run.
#[derive(Clone, Debug)]
pub struct IndexServerConfig {
    /// Where gRPC is served; port 0 takes a free one.
    pub grpc_listen: SocketAddr,
    /// Where `/metrics`, `/healthz` and `/readyz` are served; `None`: nowhere.
    pub http_listen: Option<SocketAddr>,
    /// Subjects of the deployment.
    pub subjects: Subjects,
    /// What the index may hold.
    pub limits: IndexLimits,
    /// Seed of the block keys: the publishers' one.
    pub key_seed: KeySeed,
    /// TOML file with secrets of tenants that have a seed of their own; `None`: all have `key_seed`.
    pub tenant_secrets_file: Option<PathBuf>,
    /// Weight of a block per tier, for requests that name none.
    pub weights: TierWeights,
    /// What costs are computed from: models, engines, links, topology.
    pub profiles: Arc<Profiles>,
    /// How long to wait for publishers to show themselves before answers count as complete. Zero where the publishers
    /// start after the server, in the same process.
    pub discovery: Duration,
    /// TLS of the gRPC port; `None`: plain text.
    pub tls: Option<TlsFiles>,
    /// TOML file that says who may ask what; `None`: everybody may ask everything.
    pub auth_file: Option<PathBuf>,
    /// How much callers may ask for.
    pub serving: ServingLimits,
    /// Where what is held is written down, for the next start; `None`: nowhere.
    pub checkpoint: Option<CheckpointConfig>,
    /// Which part of the key space is this server's; `None`: all of it, in one piece.
    pub cluster: Option<ClusterConfig>,
    /// What others call this life of the server; no other may have the name, not even its next life. `None`: one is made up.
    pub name: Option<Asker>,
}

/// How much callers of the gRPC port may ask for. At a bound the call is refused with its name and counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServingLimits {
    /// Bytes of a request.
    pub request_bytes: usize,
    /// What a request may hold.
    pub request: RequestLimits,
    /// Calls open on one connection.
    pub streams_per_connection: u32,
    /// Connections at a time; more are closed at once.
    pub connections: usize,
    /// Calls in flight on all connections; as many wait for a moment, more are refused.
    pub inflight: usize,
}

/// Starts index servers.
#[derive(Debug)]
pub struct IndexServer;

/// A server that runs until this is dropped or shut down.
pub struct RunningIndexServer {
    grpc_addr: SocketAddr,
    http_addr: Option<SocketAddr>,
    index: Arc<Index>,
    health: HealthReporter,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

/// The server could not start; nothing of it is left running.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address cannot be listened on.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// A file with certificates or identities cannot be used.
    #[error(transparent)]
    File(#[from] WatchedFileError),
    /// The bus refused the subscription.
    #[error("cannot subscribe to {filter} on {bus}: {source}")]
    Subscribe {
        /// What was asked for.
        filter: String,
        /// Which bus.
        bus: String,
        /// Why.
        source: SubscribeError,
    },
    /// The description of the service cannot be served: a broken build.
    #[error("the gRPC reflection service cannot be built: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

// === impl IndexServerConfig ===

impl IndexServerConfig {
    /// Defaults for everything but the gRPC address; no HTTP port.
    pub fn new(grpc_listen: SocketAddr) -> Self {
        Self {
            grpc_listen,
            http_listen: None,
            subjects: Subjects::default(),
            limits: IndexLimits::default(),
            key_seed: KeySeed::PUBLISHED,
            tenant_secrets_file: None,
            weights: TierWeights::default(),
            profiles: Arc::new(Profiles::shipped()),
            discovery: Duration::ZERO,
            tls: None,
            auth_file: None,
            serving: ServingLimits::default(),
            checkpoint: None,
            cluster: None,
            name: None,
        }
    }
}

// === impl ServingLimits ===

impl Default for ServingLimits {
    fn default() -> Self {
        Self {
            request_bytes: MAX_REQUEST_BYTES,
            request: RequestLimits::default(),
            streams_per_connection: MAX_STREAMS_PER_CONNECTION,
            connections: DEFAULT_MAX_CONNECTIONS,
            inflight: DEFAULT_MAX_INFLIGHT,
        }
    }
}

// === impl IndexServer ===

impl IndexServer {
    /// Starts a server. When this returns, its ports are bound and every event published from now on is seen. Its
    /// metrics are added to those in `registry`.
    pub async fn start(
        config: IndexServerConfig,
        bus: Arc<dyn Bus>,
        mut registry: Registry,
    ) -> Result<RunningIndexServer, StartError> {
        let metrics = Arc::new(Metrics::default());
        let (clock, stop) = (Clock::start(), CancellationToken::new());
        let mut tasks = JoinSet::new();
        let access = Access::open(config.tls.as_ref(), config.auth_file, &metrics, &stop, &mut tasks)?;
        let (grpc_listener, grpc_addr) = listen("gRPC", config.grpc_listen).await?;
        access.warn_if_open(grpc_addr);
        let http = match config.http_listen {
            Some(address) => Some(listen("HTTP", address).await?),
            None => None,
        };
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        let (reflection_v1, reflection_v1alpha) = (reflection().build_v1()?, reflection().build_v1alpha()?);
        let asker = config.name.clone().unwrap_or_else(asker);
        let subscribe = async |filter: String| {
            bus.subscribe(filter.clone()).await.map_err(|source| subscribe_error(&bus, filter, source))
        };
        let (owned_in, owned) = mpsc::channel(OWNED_QUEUE);
        let replies = subscribe(config.subjects.all_replies(&asker)).await?;
        let expectations = subscribe(config.subjects.speculations()).await?;

        let index = Arc::new(match &config.cluster {
            None => Index::new(config.limits, config.key_seed),
            Some(cluster) => {
                let index = Index::cut(config.limits, config.key_seed, cluster.partition);
                // A checkpoint is taken in for these.
                index.own(&cluster.wanted.borrow().shards(cluster.partition));
                index
            }
        });
        if let Some(path) = config.tenant_secrets_file {
            let (watched, secrets) = TenantSecrets::open(path)?;
            index.replace_keys(TenantKeys::with_secrets(config.key_seed, &secrets));
            let (replaced, seed) = (Arc::clone(&index), config.key_seed);
            let mut keep = Keep { metrics: &metrics, stop: &stop, tasks: &mut tasks };
            keep.current("tenant_secrets", watched, move |secrets| {
                replaced.replace_keys(TenantKeys::with_secrets(seed, &secrets));
            });
        }
        if config.cluster.is_none() {
            let events = subscribe(config.subjects.all_events()).await?;
            let whole = TaggedSubscription { shard: ShardId::WHOLE, events };
            let owned = Owned { shards: vec![ShardId::WHOLE], subscriptions: vec![whole] };
            owned_in.try_send(owned).expect("nothing was sent before");
        }
        let (loaded_in, loaded) = watch::channel(config.checkpoint.is_none());
        let loading = config.checkpoint.as_ref().map(|checkpoint| Loading {
            store: Arc::clone(&checkpoint.store),
            index: Arc::clone(&index),
            max_bytes: store::max_bytes(config.limits.blocks),
            metrics: Arc::clone(&metrics),
            clock,
            loaded: loaded_in,
        });
        let (health, health_service) = tonic_health::server::health_reporter();
        let readiness = Readiness { ready: watch::Sender::new(false), health: health.clone() };
        let ready = readiness.ready.subscribe();
        let is_complete_once_loaded = config.discovery.is_zero() && config.cluster.is_none();
        readiness.set(is_complete_once_loaded && loading.is_none()).await;
        let mut cluster_metrics = None;
        let coordinator = match &config.cluster {
            None => None,
            Some(cluster) => {
                let shared = cluster::Shared {
                    index: Arc::clone(&index),
                    bus: Arc::clone(&bus),
                    subjects: config.subjects.clone(),
                    clock,
                };
                let shell = cluster::Shell {
                    ingest: owned_in,
                    discovery: config.discovery,
                    loaded: loaded.clone(),
                    ready: readiness.clone(),
                    stop: stop.clone(),
                };
                let started = cluster::start(shared, cluster, asker.clone(), shell, &mut tasks).await;
                let (coordinator, metrics) =
                    started.map_err(|(filter, source)| subscribe_error(&bus, filter, source))?;
                cluster_metrics = Some(metrics);
                Some(coordinator)
            }
        };

        let speculation =
            Speculation::new(Arc::clone(&bus), config.subjects.clone(), Arc::clone(&metrics), clock);
        let speculation = Arc::new(speculation);
        let (requests_in, requests) = mpsc::channel(REQUEST_QUEUE);
        let ingest = Ingest {
            index: Arc::clone(&index),
            subjects: config.subjects.clone(),
            metrics: Arc::clone(&metrics),
            clock,
            requests: requests_in,
            log: IngestLog::default(),
        };
        let (on_closed, stop_ingest, runtime) = (readiness.clone(), stop.clone(), Handle::current());
        // A thread of its own: a large change keeps it busy for a while, and queries shall not wait for that, nor it for
        // them.
        tasks.spawn_blocking(move || {
            if let Some(loading) = loading {
                // Events that arrive meanwhile wait in the subscription. Questions are answered, and told that more is to come.
                runtime.block_on(loading.run(stop_ingest.clone()));
                if is_complete_once_loaded {
                    runtime.block_on(on_closed.set(true));
                }
            }
            if runtime.block_on(ingest.run(owned, replies, stop_ingest)) {
                return;
            }
            tracing::error!(
                "the event bus is closed for good: answers go stale, so this server is not ready any more"
            );
            runtime.block_on(on_closed.set(false));
        });
        tasks.spawn(send_requests(
            Arc::clone(&bus),
            config.subjects.clone(),
            asker,
            Arc::clone(&metrics),
            clock,
            requests,
            stop.clone(),
        ));
        if let Some(checkpoint) = config.checkpoint {
            tasks.spawn(store::keep(
                Arc::clone(&index),
                checkpoint,
                Arc::clone(&metrics),
                clock,
                loaded.clone(),
                stop.clone(),
            ));
        }
        if !config.discovery.is_zero() && config.cluster.is_none() {
            let discovery = Discovery { index: Arc::clone(&index), clock, wait: config.discovery, loaded };
            tasks.spawn(discovery.run(bus, config.subjects, readiness, stop.clone()));
        }
        tasks.spawn(end_leases(Arc::clone(&index), Arc::clone(&metrics), clock, stop.clone()));

        let http_addr = http.as_ref().map(|(_, address)| *address);
        if let Some((listener, _)) = http {
            metrics.register(&mut registry);
            cluster_metrics.iter().for_each(|metrics| metrics.register(&mut registry));
            let (totals_of, totals_to) = (Arc::clone(&index), Arc::clone(&metrics));
            let state = HttpState {
                registry: Arc::new(registry),
                refresh: Arc::new(move || {
                    totals_to.set_checkpoint_age(clock.now_ms());
                    totals_to.set_totals(&totals_of.totals(clock.now_ms()));
                }),
                ready: ready.clone(),
            };
            tasks.spawn(http::serve(listener, state, stop.clone()));
        }

        tasks.spawn(Arc::clone(&speculation).listen(expectations, stop.clone()));

        let serving = config.serving;
        let admission = Admission::of_calls(serving.inflight);
        let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
        let service = AtlasService::new(Parts {
            index: Arc::clone(&index),
            coordinator,
            weights: config.weights,
            profiles: config.profiles,
            speculation,
            limits: serving.request,
            metrics: Arc::clone(&metrics),
            clock,
            ready,
            admission: admission.clone(),
            large: Admission::of_large(processors),
            stop: stop.clone(),
        });
        let atlas = AtlasServer::new(service)
            .max_decoding_message_size(serving.request_bytes)
            .accept_compressed(CompressionEncoding::Gzip);
        let atlas = Guard::new(atlas, access.gate, admission);
        let grpc = Server::builder()
            .max_concurrent_streams(serving.streams_per_connection)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .add_service(health_service)
            .add_service(reflection_v1)
            .add_service(reflection_v1alpha)
            .add_service(atlas);
        let acceptor = Acceptor { tls: access.tls, max_connections: serving.connections, metrics, clock };
        let incoming = acceptor.start(grpc_listener, stop.clone(), &mut tasks);
        let stopped = stop.clone().cancelled_owned();
        tasks.spawn(async move {
            if let Err(error) = grpc.serve_with_incoming_shutdown(incoming, stopped).await {
                tracing::error!(%error, "the gRPC port failed");
            }
        });
        tracing::info!(%grpc_addr, ?http_addr, "the index server runs");
        Ok(RunningIndexServer { grpc_addr, http_addr, index, health, stop, tasks })
    }
}

/// A name for this life of the server, so that answers to an earlier one do not reach it.
fn asker() -> Asker {
    let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    // Seeded anew in each process, which tells apart servers that start at the same moment.
    let salt = RandomState::new().hash_one(std::process::id());
    Asker::new(format!("{started:x}-{salt:x}")).expect("hexadecimal digits and a dash")
}

fn subscribe_error(bus: &Arc<dyn Bus>, filter: String, source: SubscribeError) -> StartError {
    StartError::Subscribe { filter, bus: bus.describe(), source }
}

/// Says to everybody who asks whether answers can be relied on.
#[derive(Clone)]
pub(crate) struct Readiness {
    ready: watch::Sender<bool>,
    health: HealthReporter,
}

/// Finds out who publishes before the server calls itself ready.
struct Discovery {
    index: Arc<Index>,
    clock: Clock,
    wait: Duration,
    loaded: watch::Receiver<bool>,
}

// === impl Readiness ===

impl Readiness {
    pub(crate) async fn set(&self, ready: bool) {
        self.ready.send_replace(ready);
        let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
        for name in ["", SERVICE_NAME] {
            self.health.set_service_status(name, status).await;
        }
    }
}

// === impl Discovery ===

impl Discovery {
    async fn run(
        mut self,
        bus: Arc<dyn Bus>,
        subjects: Subjects,
        readiness: Readiness,
        stop: CancellationToken,
    ) {
        let found_out = async {
            // An error means that the server ends.
            let _ = self.loaded.wait_for(|loaded| *loaded).await;
            // Twice, for the first can be lost.
            for _ in 0..2 {
                if let Err(error) = bus.publish(subjects.hello(), Bytes::new()).await {
                    tracing::warn!(%error, "publishers could not be asked to show themselves; their heartbeats will");
                }
                tokio::time::sleep(self.wait / 2).await;
            }
            while self.index.is_finding_out(self.clock.now_ms()) {
                tokio::time::sleep(DISCOVERY_POLL).await;
            }
        };
        let found_out = tokio::time::timeout(DISCOVERY_MAX, found_out);
        let in_time = tokio::select! {
            () = stop.cancelled() => return,
            in_time = found_out => in_time.is_ok(),
        };
        let totals = self.index.totals(self.clock.now_ms());
        tracing::info!(
            after_ms = self.clock.now_ms(), in_time, blocks = totals.blocks, sources = ?totals.sources,
            "publishers are found out: answers count as complete from now on"
        );
        readiness.set(true).await;
    }
}

const SERVICE_NAME: &str = <AtlasServer<AtlasService> as NamedService>::NAME;

// === impl RunningIndexServer ===

impl RunningIndexServer {
    /// Where gRPC is served.
    pub fn grpc_addr(&self) -> SocketAddr {
        self.grpc_addr
    }

    /// Where the HTTP port is, if there is one.
    pub fn http_addr(&self) -> Option<SocketAddr> {
        self.http_addr
    }

    /// The index, for questions from inside the process.
    pub fn index(&self) -> Arc<Index> {
        Arc::clone(&self.index)
    }

    /// Stops: no new calls, open ones have [`DRAIN_TIMEOUT`] to end. False if some had to be cut off.
    pub async fn shutdown(mut self) -> bool {
        // Health watchers see the end, and then their streams end too: they would otherwise hold up the rest.
        let mut health = self.health.clone();
        for name in ["", SERVICE_NAME] {
            health.set_service_status(name, ServingStatus::NotServing).await;
            health.clear_service_status(name).await;
        }
        self.stop.cancel();
        let tasks = &mut self.tasks;
        let drained =
            tokio::time::timeout(DRAIN_TIMEOUT, async { while tasks.join_next().await.is_some() {} })
                .await
                .is_ok();
        if !drained {
            tracing::warn!(timeout = ?DRAIN_TIMEOUT, "calls were still open at the end of the drain time");
            self.tasks.shutdown().await;
        }
        drained
    }
}

impl Drop for RunningIndexServer {
    fn drop(&mut self) {
        // The tasks are aborted with their set; this ends what they had spawned, such as open score streams.
        self.stop.cancel();
    }
}
