//! `kvatlas serve` and `kvatlas shim`: the long-running roles.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use kvatlas_bus::{Bus, InProcessBus, InProcessConfig, NatsBus};
use kvatlas_index::{
    ClusterConfig, DISCOVERY, HttpServer, IndexServer, IndexServerConfig, RunningIndexServer,
};
use kvatlas_proto::Tier;
use kvatlas_proto::subject::Asker;
use kvatlas_shim::metrics::ShimCollector;
use kvatlas_shim::shim::Shim;
use prometheus_client::registry::Registry;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::calibrate;
use crate::failure::Failure;
use crate::lease::ShardLease;
use crate::settings::{DEFAULT_GRPC, DEFAULT_HTTP, Ownership, Settings};

/// Time in which everything stops after a signal; what is left then is cut off.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(4_500);
/// Longest part of the host's name in a server's name, bytes.
const MAX_HOST_BYTES: usize = 40;

/// The bus, and the broker where there is one.
struct Connection {
    bus: Arc<dyn Bus>,
    broker: Option<Arc<NatsBus>>,
}

/// Runs the index server, with the shims of the configured engines.
pub async fn serve(settings: Settings) -> Result<ExitCode, Failure> {
    let mut stop = pin!(stop_signal()?);
    if settings.engines.is_empty() && settings.nats.url.is_empty() {
        return Err(Failure::usage(
            "there is nothing to index: follow an engine with --engine model=...,instance=...,zmq=tcp://HOST:5557, or \
             listen to shims elsewhere with --nats URL",
        ));
    }
    settings.cluster.ownership(!settings.nats.url.is_empty())?;
    let connection = connect(&settings, "index").await?;
    let bus = Arc::clone(&connection.bus);
    let shims = ShimCollector::default();
    let mut registry = Registry::default();
    registry.register_collector(Box::new(shims.clone()));
    let (server, lease) = tokio::select! {
        started = start_server(&settings, &connection, registry) => started?,
        // A part of the shards may be waited for.
        () = &mut stop => return Ok(ExitCode::SUCCESS),
    };
    let running = start_shims(&settings, &bus, &shims)?;
    tracing::info!(
        grpc = %server.grpc_addr(),
        http = server.http_addr().map(tracing::field::display),
        bus = bus.describe(),
        engines = settings.engines.len(),
        "kvatlas is up; /readyz says when answers are complete"
    );
    stop.await;
    tracing::info!("stopping");
    let stopping = async {
        // First, so that another server takes this one's part in while this one still answers.
        if let Some(lease) = lease {
            lease.shutdown().await;
        }
        stop_shims(running).await;
        server.shutdown().await;
    };
    if timeout(SHUTDOWN_TIMEOUT, stopping).await.is_err() {
        tracing::warn!("not everything stopped in time");
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs the shims of the configured engines over a broker.
pub async fn shim(settings: Settings) -> Result<ExitCode, Failure> {
    let stop = stop_signal()?;
    if settings.engines.is_empty() {
        return Err(Failure::usage(
            "there is no engine to follow: add --engine model=...,instance=...,zmq=tcp://HOST:5557",
        ));
    }
    if settings.nats.url.is_empty() {
        return Err(Failure::usage(
            "a shim alone needs a broker: add --nats URL, or use `kvatlas serve` to have everything in one process",
        ));
    }
    let Connection { bus, .. } = connect(&settings, "shim").await?;
    let shims = ShimCollector::default();
    let mut registry = Registry::default();
    registry.register_collector(Box::new(shims.clone()));
    let http = HttpServer::start(http_address(&settings), registry).await.map_err(Failure::run)?;
    let running = start_shims(&settings, &bus, &shims)?;
    tracing::info!(http = %http.addr(), bus = bus.describe(), engines = settings.engines.len(), "the shim is up");
    stop.await;
    tracing::info!("stopping");
    let stopping = async {
        stop_shims(running).await;
        // What the shims said last must leave the process; a broker that is away cannot take it.
        if let Err(error) = bus.flush().await {
            tracing::warn!(%error, "the last frames may not have been sent");
        }
        http.shutdown().await;
    };
    if timeout(SHUTDOWN_TIMEOUT, stopping).await.is_err() {
        tracing::warn!("not everything stopped in time");
    }
    Ok(ExitCode::SUCCESS)
}

async fn connect(settings: &Settings, role: &str) -> Result<Connection, Failure> {
    Ok(match settings.nats.config(role)? {
        None => Connection { bus: Arc::new(InProcessBus::new(InProcessConfig::default())), broker: None },
        Some(config) => {
            let broker = Arc::new(NatsBus::connect(config).await.map_err(Failure::run)?);
            Connection { bus: Arc::<NatsBus>::clone(&broker), broker: Some(broker) }
        }
    })
}

async fn start_server(
    settings: &Settings,
    connection: &Connection,
    mut registry: Registry,
) -> Result<(RunningIndexServer, Option<ShardLease>), Failure> {
    let grpc = settings.server.grpc_listen.unwrap_or_else(|| DEFAULT_GRPC.parse().expect("a valid default"));
    let mut config = IndexServerConfig::new(grpc);
    config.http_listen = Some(http_address(settings));
    config.subjects = settings.nats.subjects()?;
    config.key_seed = settings.keys.seed()?;
    config.tenant_secrets_file = settings.keys.tenant_secrets_file.clone();
    for weight in &settings.server.weights {
        let tier = Tier::ALL.into_iter().find(|tier| tier.name() == weight.tier);
        let tier = tier.expect("the setting was checked when it was read");
        config.weights =
            config.weights.with(tier, weight.weight).map_err(|error| Failure::usage(error.to_string()))?;
    }
    config.profiles = Arc::new(calibrate::profiles(&settings.server.cost_profiles)?);
    if let Some(blocks) = settings.server.max_blocks {
        config.limits.blocks = blocks;
    }
    config.tls = settings.tls.files()?;
    config.auth_file = settings.auth.file.clone();
    config.serving = settings.limits.serving()?;
    config.checkpoint = settings.checkpoint()?;
    if !settings.nats.url.is_empty() {
        config.discovery = DISCOVERY;
    }
    let partition = settings.cluster.partition()?;
    let mut lease = None;
    let wanted = match settings.cluster.ownership(connection.broker.is_some())? {
        Ownership::Whole => None,
        // The sender may go: what does not change needs none.
        Ownership::Fixed(set) => Some(watch::channel(set).1),
        Ownership::Leased { initial_servers } => {
            let broker = connection.broker.as_deref().expect("leases were refused without a broker");
            let name = name_of_this_life();
            let (subjects, server) = (&config.subjects, name.to_string());
            let taken =
                ShardLease::take(broker, subjects, server, partition, initial_servers, &mut registry).await?;
            config.name = Some(name);
            Some(lease.insert(taken).wanted())
        }
    };
    config.cluster = wanted.map(|wanted| ClusterConfig { partition, wanted });
    let server = IndexServer::start(config, Arc::clone(&connection.bus), registry).await;
    Ok((server.map_err(Failure::run)?, lease))
}

/// The host's name, for people, and a number that no other life of any server has.
fn name_of_this_life() -> Asker {
    let host = std::env::var("HOSTNAME").or_else(|_| std::fs::read_to_string("/etc/hostname"));
    let word = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
    let host: String = host.unwrap_or_default().trim().chars().map(word).take(MAX_HOST_BYTES).collect();
    Asker::new(format!("{host}-{:016x}", rand::random::<u64>())).expect("letters, digits and dashes")
}

fn http_address(settings: &Settings) -> SocketAddr {
    settings.server.http_listen.unwrap_or_else(|| DEFAULT_HTTP.parse().expect("a valid default"))
}

fn start_shims(
    settings: &Settings,
    bus: &Arc<dyn Bus>,
    collector: &ShimCollector,
) -> Result<Vec<Shim>, Failure> {
    let (keys, subjects) = (settings.keys.tenants()?, settings.nats.subjects()?);
    let partition = settings.cluster.partition()?;
    let mut shims = Vec::new();
    for engine in &settings.engines {
        let config = engine.shim_config(*keys.of(&engine.tenant), partition, &subjects)?;
        let shim = Shim::start_with_state(&config, bus, settings.shim.state_dir.as_deref())
            .map_err(|error| Failure::usage(error.to_string()))?;
        collector.watch(&shim);
        shims.push(shim);
    }
    Ok(shims)
}

async fn stop_shims(shims: Vec<Shim>) {
    for shim in shims {
        shim.shutdown().await;
    }
}

/// Completes at the first SIGTERM or SIGINT. Installed before anything starts, so that none is missed.
pub fn stop_signal() -> Result<impl Future<Output = ()>, Failure> {
    let mut terminate = signal(SignalKind::terminate()).map_err(Failure::run)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Failure::run)?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
