//! The index server: wires the index to a bus, a gRPC port and an HTTP port. The handle is the lifetime: dropped, the
//! server stops.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use kvatlas_bus::{Bus, SubscribeError};
use kvatlas_proto::grpc::FILE_DESCRIPTOR_SET;
use kvatlas_proto::grpc::atlas_server::AtlasServer;
use kvatlas_proto::keys::KeySeed;
use kvatlas_proto::subject::Subjects;
use prometheus_client::registry::Registry;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::codec::CompressionEncoding;
use tonic::server::NamedService;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::clock::Clock;
use crate::http::{self, HttpState, ListenError, listen};
use crate::index::{Index, IndexLimits};
use crate::ingest::{Ingest, IngestLog, RESYNC_QUEUE, end_leases, send_resyncs};
use crate::matching::TierWeights;
use crate::metrics::Metrics;
use crate::request::MAX_PROMPT_TOKENS;
use crate::service::AtlasService;

/// Largest request, bytes: the most token ids at five bytes each (the longest varint of 32 bits), and a mebibyte for
/// candidates and multimodal items.
pub const MAX_REQUEST_BYTES: usize = MAX_PROMPT_TOKENS * 5 + (1 << 20);
/// Calls open on one connection. Gateways use few connections with many calls; a caller that needs more opens another.
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
    /// Weight of a block per tier, for requests that name none.
    pub weights: TierWeights,
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
            weights: TierWeights::default(),
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
        let (grpc_listener, grpc_addr) = listen("gRPC", config.grpc_listen).await?;
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
        let filter = config.subjects.all_events();
        let subscription = bus.subscribe(filter.clone()).await.map_err(|source| StartError::Subscribe {
            filter,
            bus: bus.describe(),
            source,
        })?;

        let index = Arc::new(Index::new(config.limits, config.key_seed));
        let metrics = Arc::new(Metrics::default());
        let (clock, stop) = (Clock::start(), CancellationToken::new());
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_service_status(SERVICE_NAME, ServingStatus::Serving).await;
        let (ready_sender, ready) = watch::channel(true);
        let mut tasks = JoinSet::new();

        let (resync, requests) = mpsc::channel(RESYNC_QUEUE);
        let ingest = Ingest {
            index: Arc::clone(&index),
            subjects: config.subjects.clone(),
            metrics: Arc::clone(&metrics),
            clock,
            resync,
            log: IngestLog::default(),
        };
        let (on_closed, stop_ingest) = (health.clone(), stop.clone());
        tasks.spawn(async move {
            if ingest.run(subscription, stop_ingest).await {
                return;
            }
            tracing::error!(
                "the event bus is closed for good: answers go stale, so this server is not ready any more"
            );
            ready_sender.send_replace(false);
            for name in ["", SERVICE_NAME] {
                on_closed.set_service_status(name, ServingStatus::NotServing).await;
            }
        });
        tasks.spawn(send_resyncs(bus, config.subjects, Arc::clone(&metrics), clock, requests, stop.clone()));
        tasks.spawn(end_leases(Arc::clone(&index), Arc::clone(&metrics), clock, stop.clone()));

        let http_addr = http.as_ref().map(|(_, address)| *address);
        if let Some((listener, _)) = http {
            metrics.register(&mut registry);
            let (totals_of, totals_to) = (Arc::clone(&index), Arc::clone(&metrics));
            let state = HttpState {
                registry: Arc::new(registry),
                refresh: Arc::new(move || totals_to.set_totals(&totals_of.totals())),
                ready,
            };
            tasks.spawn(http::serve(listener, state, stop.clone()));
        }

        let service = AtlasService::new(Arc::clone(&index), config.weights, metrics, clock, stop.clone());
        let atlas = AtlasServer::new(service)
            .max_decoding_message_size(MAX_REQUEST_BYTES)
            .accept_compressed(CompressionEncoding::Gzip);
        let grpc = Server::builder()
            .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .add_service(health_service)
            .add_service(reflection_v1)
            .add_service(reflection_v1alpha)
            .add_service(atlas);
        let incoming = TcpIncoming::from(grpc_listener).with_nodelay(Some(true));
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
