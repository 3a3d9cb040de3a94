//! Real parts around simulated engines: a nats-server, an index in a process of its own, and the bus between shims and
//! broker that can lose messages.
//!
//! The index is killed and started again under the same address, as a supervisor does it. Everything is on loopback and
//! gone with the rig.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use kvatlas_bus::{Bus, NatsBus, NatsConfig};
use kvatlas_client::{CallError, Client, ClientConfig, EndpointError};
use kvatlas_proto::subject::Subjects;
use kvatlas_proto::{Partition, grpc};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use super::RecoveryError;
use super::clock::Clock;
use super::follower::Judgement;
use super::lossy::LossyBus;
use super::processes::{Process, ProcessError, free_port, http_get, nats_greets};
use super::site::Site;

/// Model name of the simulated engines.
pub const MODEL: &str = "recovery";
/// Deployment of the rig.
const PREFIX: &str = "kvatlas-recovery";
/// Ports that are tried for a process: one can be taken between being found free and being used.
const PORT_ATTEMPTS: usize = 5;
/// Deadline of calls that look at everything.
const LOOK_DEADLINE: Duration = Duration::from_secs(30);
/// Time between two looks at the index.
pub const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// Which programs, and where their files go.
#[derive(Clone, Debug)]
pub struct RigConfig {
    /// The `kvatlas` program.
    pub kvatlas: PathBuf,
    /// The broker's program.
    pub nats_server: PathBuf,
    /// Time between two checkpoints of the index; `None`: it writes none.
    pub checkpoint: Option<Duration>,
    /// Decides what is lost.
    pub seed: u64,
}

/// Broker, bus and index.
pub struct Rig {
    config: RigConfig,
    // Processes drop before the folder with their files.
    index: Option<Process>,
    nats: Option<Process>,
    nats_port: u16,
    grpc: SocketAddr,
    http: SocketAddr,
    watcher: Watcher,
    subjects: Subjects,
    folder: TempDir,
}

/// Looks at the index, also while others ask it or kill it.
#[derive(Clone)]
pub struct Watcher {
    http: SocketAddr,
    client: Client,
    bus: Arc<LossyBus>,
    clock: Clock,
}

/// The index's sources at one look.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// Sources that are what their publishers said, and up to date.
    pub exact: usize,
    /// Sources that say of themselves that they are verified.
    pub verified: usize,
    /// Sources listed.
    pub sources: usize,
    /// What is to be said about each, by instance, for errors.
    pub notes: Vec<String>,
}

/// Blocks by instance.
pub type Blocks = BTreeMap<String, BTreeSet<u64>>;

// === impl Rig ===

impl Rig {
    /// Starts the broker and connects to it. The index is started with [`Self::start_index`].
    pub async fn start(config: RigConfig) -> Result<Self, RecoveryError> {
        let folder = tempfile::tempdir().map_err(RecoveryError::Folder)?;
        let (nats, nats_port) = start_nats(&config.nats_server, folder.path()).await?;
        let loopback = async || -> Result<SocketAddr, RecoveryError> {
            Ok((Ipv4Addr::LOCALHOST, free_port().await.map_err(RecoveryError::Port)?).into())
        };
        let (grpc, http) = (loopback().await?, loopback().await?);
        let subjects = Subjects::new(PREFIX).expect("letters and a hyphen");
        let clock = Clock::start();
        let inner = NatsBus::connect(NatsConfig::new([nats_url(nats_port)])).await?;
        let bus = Arc::new(LossyBus::new(Arc::new(inner), subjects.clone(), clock, config.seed));
        let watcher = Watcher { http, client: client(grpc, LOOK_DEADLINE)?, bus, clock };
        Ok(Self { config, index: None, nats: Some(nats), nats_port, grpc, http, watcher, subjects, folder })
    }

    /// Starts the index. Returns as soon as the process runs; see [`Self::is_ready`].
    pub fn start_index(&mut self) -> Result<Instant, ProcessError> {
        let mut arguments: Vec<OsString> = [
            "--log",
            "warn,kvatlas_index=info",
            "serve",
            "--nats",
            &nats_url(self.nats_port),
            "--subject-prefix",
            PREFIX,
            "--grpc-listen",
            &self.grpc.to_string(),
            "--http-listen",
            &self.http.to_string(),
        ]
        .map(OsString::from)
        .into();
        if let Some(interval) = self.config.checkpoint {
            arguments.extend(["--checkpoint-file".into(), self.checkpoint_file().into()]);
            arguments
                .extend(["--checkpoint-interval-s".into(), interval.as_secs().max(1).to_string().into()]);
        }
        let log = self.folder.path().join("index.log");
        let process = Process::start("the index", &self.config.kvatlas, &arguments, &log)?;
        let started = process.started();
        self.index = Some(process);
        Ok(started)
    }

    /// Kills the index as a crash does.
    pub async fn kill_index(&mut self) -> Result<(), ProcessError> {
        match self.index.take() {
            Some(index) => index.kill().await,
            None => Ok(()),
        }
    }

    /// Kills the broker as a crash does.
    pub async fn kill_broker(&mut self) -> Result<(), ProcessError> {
        match self.nats.take() {
            Some(nats) => nats.kill().await,
            None => Ok(()),
        }
    }

    /// Starts the broker again under its old address.
    pub async fn restart_broker(&mut self) -> Result<(), RecoveryError> {
        self.kill_broker().await?;
        self.nats = Some(try_nats(&self.config.nats_server, self.folder.path(), self.nats_port).await?);
        Ok(())
    }

    /// Waits until the index is ready.
    pub async fn wait_ready(&mut self) -> Result<Instant, ProcessError> {
        let watcher = &self.watcher;
        if let Some(index) = &mut self.index {
            index.wait_until(async || watcher.is_ready().await).await?;
        }
        Ok(Instant::now())
    }

    /// Waits until `sources` sources are all exact at one look, and says when that was.
    pub async fn wait_exact(&mut self, sources: usize, wait: Duration) -> Result<Instant, RecoveryError> {
        self.wait_for("exact", sources, wait, |look| look.exact).await
    }

    /// Waits until `sources` sources are all verified at one look, and says when that was.
    pub async fn wait_verified(&mut self, sources: usize, wait: Duration) -> Result<Instant, RecoveryError> {
        self.wait_for("verified", sources, wait, |look| look.verified).await
    }

    async fn wait_for(
        &mut self,
        what: &'static str,
        sources: usize,
        wait: Duration,
        count: impl Fn(&Look) -> usize,
    ) -> Result<Instant, RecoveryError> {
        let deadline = Instant::now() + wait;
        loop {
            let look = self.watcher.look().await;
            if count(&look) == sources && look.sources == sources {
                return Ok(Instant::now());
            }
            if let Some(index) = &mut self.index {
                index.check()?;
            }
            if Instant::now() > deadline {
                return Err(RecoveryError::NotInTime { what, wait, sources, state: look.notes.join(", ") });
            }
            sleep(LOOK_INTERVAL).await;
        }
    }

    /// Every block that the index holds, by instance.
    pub async fn dump(&self) -> Result<Blocks, CallError> {
        let mut blocks = Blocks::new();
        let request = grpc::DumpRequest { model: MODEL.to_owned(), ..Default::default() };
        let mut dump = self.watcher.client.dump(request).await?;
        while let Some(chunk) = dump.next().await? {
            blocks.entry(chunk.instance).or_default().extend(chunk.keys);
        }
        Ok(blocks)
    }

    /// Compares every block with the truth.
    pub async fn compare(&self, truth: &Blocks) -> Result<(), RecoveryError> {
        let held = self.dump().await?;
        let nothing = BTreeSet::new();
        let names: BTreeSet<&String> = truth.keys().chain(held.keys()).collect();
        let (mut wrong, mut missing) = (0, 0);
        for name in names {
            let (ours, theirs) = (held.get(name).unwrap_or(&nothing), truth.get(name).unwrap_or(&nothing));
            wrong += ours.difference(theirs).count();
            missing += theirs.difference(ours).count();
        }
        if wrong + missing > 0 { Err(RecoveryError::NotEqual { wrong, missing }) } else { Ok(()) }
    }

    /// One counter or gauge of the index, labels added up; `None` while it does not answer.
    pub async fn metric(&self, name: &str) -> Option<f64> {
        let (_, text) = http_get(self.http, "/metrics").await?;
        let of = |line: &str| -> Option<f64> {
            let (series, value) = line.rsplit_once(' ')?;
            (series.split('{').next()? == name).then(|| value.parse().ok())?
        };
        Some(text.lines().filter_map(of).sum())
    }

    /// When the checkpoint file was last written; `None` if there is none.
    pub fn checkpoint_written(&self) -> Option<SystemTime> {
        self.checkpoint_file().metadata().ok()?.modified().ok()
    }

    /// The file in which the index writes down what it holds.
    pub fn checkpoint_file(&self) -> PathBuf {
        self.folder.path().join("index.checkpoint")
    }

    /// A client of the index with this deadline. Its connection is its own.
    pub fn client(&self, deadline: Duration) -> Result<Client, EndpointError> {
        client(self.grpc, deadline)
    }

    /// The bus between shims and broker.
    pub fn bus(&self) -> &Arc<LossyBus> {
        &self.watcher.bus
    }

    /// Looks at the index while the rig is busy with something else.
    pub fn watcher(&self) -> &Watcher {
        &self.watcher
    }

    /// What shims need to be part of the rig's deployment.
    pub fn site(&self) -> Site {
        Site {
            kvatlas: self.config.kvatlas.clone(),
            folder: self.folder.path().to_owned(),
            brokers: vec![nats_url(self.nats_port)],
            partition: Partition::WHOLE,
            prefix: PREFIX,
            subjects: self.subjects.clone(),
            bus: Arc::clone(&self.watcher.bus) as Arc<dyn Bus>,
            clock: self.watcher.clock,
        }
    }

    /// The clock by which everything is judged.
    pub fn clock(&self) -> Clock {
        self.watcher.clock
    }
}

// === impl Watcher ===

impl Watcher {
    /// Whether the index says that its answers can be relied on.
    pub async fn is_ready(&self) -> bool {
        matches!(http_get(self.http, "/readyz").await, Some((200, _)))
    }

    /// Looks at the index once and judges every source. An index that does not answer has none.
    pub async fn look(&self) -> Look {
        let request = grpc::ListOwnersRequest { model: MODEL.to_owned(), ..Default::default() };
        let Ok(answer) = self.client.list_owners(request).await else { return Look::default() };
        let now_ms = self.clock.now_ms();
        let follower = self.bus.follower().lock();
        let mut look = Look { sources: answer.sources.len(), ..Look::default() };
        for source in &answer.sources {
            let judgement = follower.judge(source, now_ms);
            look.exact += usize::from(judgement == Judgement::Exact);
            look.verified += usize::from(source.state() == grpc::SourceState::Verified);
            look.notes.push(format!(
                "{} is {:?} {} ({judgement:?})",
                source.instance,
                source.state(),
                source.degraded_reason
            ));
        }
        look
    }

    /// When the index was ready, and when `sources` sources were all exact at one look, both for the first time from now on;
    /// `None` for what did not happen within `wait`.
    pub async fn recovery(&self, sources: usize, wait: Duration) -> (Option<Instant>, Option<Instant>) {
        let deadline = Instant::now() + wait;
        let (mut ready, mut exact) = (None, None);
        while (ready.is_none() || exact.is_none()) && Instant::now() < deadline {
            if ready.is_none() && self.is_ready().await {
                ready = Some(Instant::now());
            }
            if exact.is_none() {
                let look = self.look().await;
                if (look.exact, look.sources) == (sources, sources) {
                    exact = Some(Instant::now());
                }
            }
            sleep(LOOK_INTERVAL).await;
        }
        (ready, exact)
    }
}

fn client(grpc: SocketAddr, deadline: Duration) -> Result<Client, EndpointError> {
    Client::connect(ClientConfig { deadline, ..ClientConfig::new(grpc.to_string()) })
}

fn nats_url(port: u16) -> String {
    format!("nats://127.0.0.1:{port}")
}

async fn start_nats(program: &Path, folder: &Path) -> Result<(Process, u16), RecoveryError> {
    let mut attempt = 1;
    loop {
        let port = free_port().await.map_err(RecoveryError::Port)?;
        match try_nats(program, folder, port).await {
            Ok(process) => return Ok((process, port)),
            // A taken port ends it.
            Err(ProcessError::Ended { .. }) if attempt < PORT_ATTEMPTS => attempt += 1,
            Err(error) => return Err(error.into()),
        }
    }
}

async fn try_nats(program: &Path, folder: &Path, port: u16) -> Result<Process, ProcessError> {
    let arguments = ["-a", "127.0.0.1", "-p", &port.to_string()].map(OsString::from);
    let mut process = Process::start("nats-server", program, &arguments, &folder.join("nats.log"))?;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    process.wait_until(async || nats_greets(address).await).await?;
    Ok(process)
}
