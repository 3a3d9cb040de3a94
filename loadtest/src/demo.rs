//! The demo: conversations over simulated engines, routed by the index and, side by side, round robin.
//!
//! Everything between an engine and an answer is the product: engines publish byte-exact vLLM messages on real ZMQ
//! sockets, shims follow them, the bus is in-process or NATS, and every routing decision asks the gRPC service. Only the
//! engines' computing is simulated. Nothing waits for the index to catch up: a decision may be a few milliseconds behind,
//! as in a cluster.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hdrhistogram::Histogram;
use kvatlas_bus::{Bus, ConnectError, InProcessBus, InProcessConfig, NatsBus, NatsConfig};
use kvatlas_client::{CallError, Client, ClientConfig, EndpointError};
use kvatlas_index::{IndexServer, IndexServerConfig, RunningIndexServer, StartError};
use kvatlas_proto::grpc;
use kvatlas_proto::ids::InvalidInstanceError;
use kvatlas_proto::subject::Subjects;
use kvatlas_proto::{InstanceId, KeyHasher, Partition};
use kvatlas_shim::mirror::{MirrorLimits, RemovalPolicy};
use kvatlas_shim::shim::{EndpointConfig, Shim, ShimConfig, StartShimError};
use kvatlas_shim::zmq::Attach;
use prometheus_client::registry::Registry;
use serde::Serialize;
use tokio::time::{Instant, sleep};

use crate::engine_sim::{EnqueueError, HashForm, InvalidSimConfigError, SimConfig, SimEngine, Submitted};
use crate::player::WaitError;
use crate::publisher::{EnginePublisher, PublisherConfig};
use crate::sockets::{BindError, NoSubscriberError, SendError};
use crate::wire::Batch;
use crate::workload::{InvalidWorkloadError, PolicyReport, PolicyTally, Request, Workload, WorkloadConfig};

/// Model name of the demo's engines.
pub const MODEL: &str = "demo";
/// Tokens per block, vLLM's default.
pub const BLOCK_SIZE: u32 = 16;
/// Longest wait for the shims to subscribe.
const SUBSCRIBE_TIMEOUT: Duration = Duration::from_secs(10);
/// Time between two requests. At 500 requests a second an answer is stale by at most a request or two.
const ARRIVAL_GAP: Duration = Duration::from_millis(2);
/// Worth of one block of work in excess of the least busy engine, in blocks to compute. Small: a prefix is followed until
/// its engine has done about ten prompts' worth more than another, then it is computed a second time elsewhere.
const LOAD_WEIGHT: f64 = 0.05;
/// Longest look-up that the histogram tells apart, microseconds.
const MAX_LATENCY_US: u64 = 10_000_000;

/// What the demo runs.
#[derive(Clone, Debug)]
pub struct DemoConfig {
    /// Simulated engines per policy, at least 1.
    pub engines: usize,
    /// Physical blocks of each engine.
    pub engine_blocks: u32,
    /// The conversations.
    pub workload: WorkloadConfig,
    /// Seed of the workload.
    pub seed: u64,
    /// Broker to use; `None`: the in-process bus.
    pub nats: Option<String>,
    /// Where gRPC is served; port 0 for any.
    pub grpc_listen: SocketAddr,
    /// Where metrics are served; `None`: nowhere.
    pub http_listen: Option<SocketAddr>,
}

/// A demo that is up: engines, shims, bus, index and server.
pub struct Demo {
    config: DemoConfig,
    engines: Vec<Engine>,
    round_robin: Vec<SimEngine>,
    shims: Vec<Shim>,
    server: RunningIndexServer,
    client: Client,
}

/// One engine whose events are followed.
struct Engine {
    name: String,
    sim: SimEngine,
    publisher: EnginePublisher,
    /// Blocks computed so far, as the router sees load.
    work: u64,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct DemoReport {
    /// One entry per policy: kvatlas, then `round_robin`.
    pub policies: Vec<PolicyReport>,
    /// Median time of a routing decision's `Score` call as the caller sees it, microseconds.
    pub score_p50_us: u64,
    /// The same, 99th percentile.
    pub score_p99_us: u64,
}

/// Where the run is.
#[derive(Clone, Copy, Debug)]
pub struct DemoProgress {
    /// Requests served.
    pub done: usize,
    /// Requests in all.
    pub total: usize,
    /// Share of prompt tokens cached so far, routed by kvatlas.
    pub kvatlas_share: f64,
    /// The same, round robin.
    pub round_robin_share: f64,
}

/// Why the demo stopped.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each variant is its source")]
pub enum DemoError {
    #[error("the demo needs at least one engine")]
    NoEngine,
    #[error(transparent)]
    Sim(#[from] InvalidSimConfigError),
    #[error(transparent)]
    Workload(#[from] InvalidWorkloadError),
    #[error(transparent)]
    Instance(#[from] InvalidInstanceError),
    #[error(transparent)]
    Broker(#[from] ConnectError),
    #[error(transparent)]
    Server(#[from] StartError),
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    #[error(transparent)]
    Shim(#[from] StartShimError),
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error(transparent)]
    Subscriber(#[from] NoSubscriberError),
    #[error(transparent)]
    Wait(#[from] WaitError),
    #[error(transparent)]
    Serve(#[from] EnqueueError),
    #[error(transparent)]
    Publish(#[from] SendError),
    #[error(transparent)]
    Call(#[from] CallError),
}

// === impl Demo ===

impl Demo {
    /// Starts engines, shims, bus, index and server, and waits until every shim follows its engine.
    pub async fn start(config: DemoConfig) -> Result<Self, DemoError> {
        if config.engines == 0 {
            return Err(DemoError::NoEngine);
        }
        let bus: Arc<dyn Bus> = match &config.nats {
            None => Arc::new(InProcessBus::new(InProcessConfig::default())),
            Some(url) => Arc::new(NatsBus::connect(NatsConfig::new([url.clone()])).await?),
        };
        // A broker may be shared: another deployment there must not be heard.
        let subjects =
            Subjects::new(format!("kvatlas-demo-{}", std::process::id())).expect("letters and digits");
        let server_config = IndexServerConfig {
            subjects: subjects.clone(),
            http_listen: config.http_listen,
            ..IndexServerConfig::new(config.grpc_listen)
        };
        let shim_metrics = kvatlas_shim::metrics::ShimCollector::default();
        let mut registry = Registry::default();
        registry.register_collector(Box::new(shim_metrics.clone()));
        let server = IndexServer::start(server_config, Arc::clone(&bus), registry).await?;
        let client = Client::connect(ClientConfig::new(server.grpc_addr().to_string()))?;
        let (mut engines, mut shims, mut round_robin) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..config.engines {
            let publisher = EnginePublisher::bind(PublisherConfig::default()).await?;
            let name = format!("engine-{number}:8000");
            let shim = Shim::start(&shim_config(&name, &publisher, &subjects)?, &bus)?;
            shim_metrics.watch(&shim);
            shims.push(shim);
            engines.push(Engine { name, sim: sim(&config)?, publisher, work: 0 });
            round_robin.push(sim(&config)?);
        }
        for engine in &engines {
            engine.publisher.wait_for_subscribers(1, SUBSCRIBE_TIMEOUT).await?;
        }
        Ok(Self { config, engines, round_robin, shims, server, client })
    }

    /// Where gRPC is served.
    pub fn grpc_addr(&self) -> SocketAddr {
        self.server.grpc_addr()
    }

    /// Where metrics are served.
    pub fn http_addr(&self) -> Option<SocketAddr> {
        self.server.http_addr()
    }

    /// Names of the engines.
    pub fn instances(&self) -> Vec<String> {
        self.engines.iter().map(|engine| engine.name.clone()).collect()
    }

    /// Serves the whole workload under both policies. `on_progress` is called after each request.
    pub async fn run(&mut self, mut on_progress: impl FnMut(DemoProgress)) -> Result<DemoReport, DemoError> {
        let requests: Vec<Request> = Workload::new(self.config.workload.clone(), self.config.seed)?.collect();
        let (mut kvatlas, mut round_robin) = (PolicyTally::default(), PolicyTally::default());
        let mut latency = Histogram::<u64>::new_with_max(MAX_LATENCY_US, 3).expect("bounds are constants");
        for (number, request) in requests.iter().enumerate() {
            let asked = Instant::now();
            let chosen = self.choose(request).await?;
            latency.saturating_record(asked.elapsed().as_micros() as u64);
            let engine = &mut self.engines[chosen];
            let submitted = engine.sim.submit(&request.tokens, request.output_tokens)?;
            engine.publish(&submitted).await?;
            engine.work += u64::from(submitted.report.blocks_prefilled);
            kvatlas.add(&submitted.report);
            let next = number % self.round_robin.len();
            let submitted = self.round_robin[next].submit(&request.tokens, request.output_tokens)?;
            round_robin.add(&submitted.report);
            on_progress(DemoProgress {
                done: number + 1,
                total: requests.len(),
                kvatlas_share: kvatlas.report("").cached_share,
                round_robin_share: round_robin.report("").cached_share,
            });
            sleep(ARRIVAL_GAP).await;
        }
        Ok(DemoReport {
            policies: vec![kvatlas.report("kvatlas"), round_robin.report("round_robin")],
            score_p50_us: latency.value_at_quantile(0.5),
            score_p99_us: latency.value_at_quantile(0.99),
        })
    }

    /// Asks the index, and picks the engine with the least to do: blocks it would have to compute, and its load.
    async fn choose(&self, request: &Request) -> Result<usize, DemoError> {
        let prompt = grpc::Prompt {
            model: MODEL.to_owned(),
            input: Some(grpc::prompt::Input::TokenIds(grpc::TokenIds { ids: request.tokens.clone() })),
            ..grpc::Prompt::default()
        };
        let scored =
            grpc::ScoreRequest { prompt: Some(prompt), candidates: self.instances(), ..Default::default() };
        let rows = self.client.score(scored).await?.instances;
        let blocks = f64::from(request.tokens.len() as u32 / BLOCK_SIZE);
        let idle = self.engines.iter().map(|engine| engine.work).min().unwrap_or(0);
        let cost = |engine: &Engine| {
            let row = rows.iter().find(|row| row.instance == engine.name);
            let cached = row.map_or(0.0, |row| row.score * blocks);
            blocks - cached + LOAD_WEIGHT * (engine.work - idle) as f64
        };
        let best = (0..self.engines.len())
            .min_by(|&a, &b| cost(&self.engines[a]).total_cmp(&cost(&self.engines[b])));
        Ok(best.unwrap_or(0))
    }

    /// Keys of the first blocks of the most popular system prompt, for an example query.
    pub fn example_keys(&self, blocks: usize) -> Result<Vec<u64>, DemoError> {
        let mut workload = Workload::new(self.config.workload.clone(), self.config.seed)?;
        let tokens = workload.next().map(|request| request.tokens).unwrap_or_default();
        let keys = KeyHasher::default().chain(&tokens, BLOCK_SIZE);
        Ok(keys.into_iter().take(blocks).map(|key| key.0).collect())
    }

    /// Stops everything.
    pub async fn shutdown(self) {
        for shim in self.shims {
            shim.shutdown().await;
        }
        self.server.shutdown().await;
        for engine in self.engines {
            engine.publisher.close().await;
        }
    }
}

// === impl Engine ===

impl Engine {
    async fn publish(&mut self, submitted: &Submitted) -> Result<(), SendError> {
        for events in &submitted.batches {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let batch = Batch { time_s: now.as_secs_f64(), events: events.clone(), rank: 0 };
            self.publisher.publish(&batch).await?;
        }
        Ok(())
    }
}

fn sim(config: &DemoConfig) -> Result<SimEngine, InvalidSimConfigError> {
    let config = SimConfig {
        blocks: config.engine_blocks,
        block_size: BLOCK_SIZE,
        max_step_tokens: 2_048,
        max_running: 8,
        hashes: HashForm::Int,
    };
    SimEngine::new(config, 0)
}

fn shim_config(
    name: &str,
    publisher: &EnginePublisher,
    subjects: &Subjects,
) -> Result<ShimConfig, InvalidInstanceError> {
    Ok(ShimConfig {
        adapter: None,
        model: MODEL.to_owned(),
        tenant: String::new(),
        instance: InstanceId::new(name)?,
        endpoints: vec![EndpointConfig {
            events: publisher.endpoints().events.clone(),
            attach: Attach::Connect,
            replay: Some(publisher.endpoints().replay.clone()),
            topic: String::new(),
            rank: None,
        }],
        block_size: None,
        removal: RemovalPolicy::PerCopy,
        hasher: KeyHasher::default(),
        partition: Partition::WHOLE,
        limits: MirrorLimits::default(),
        subjects: subjects.clone(),
    })
}
