//! A fleet of cheap simulated engines with their shims, on a [`Rig`].
//!
//! Each engine is a task: it steps as fast as it is told, changes its [`ChurnEngine`] and then publishes what that said
//! over real ZMQ sockets. Shims run in this process, over the bus that loses messages, or as processes of their own,
//! straight to the broker, where they can be killed.

use std::ffi::OsString;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvatlas_proto::{InstanceId, KeyHasher, Partition};
use kvatlas_shim::mirror::{MirrorLimits, RemovalPolicy};
use kvatlas_shim::shim::{EndpointConfig, Shim, ShimConfig};
use kvatlas_shim::zmq::Attach;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, sleep};

use super::RecoveryError;
use super::churn::ChurnEngine;
use super::clock::Clock;
use super::processes::{Process, ProcessError};
use super::rig::{Blocks, LOOK_INTERVAL, MODEL, Rig};
use crate::publisher::{EnginePublisher, PublisherConfig};
use crate::sockets::{BindError, SendError, StreamEndpoints};
use crate::wire::{Batch, Event};

/// Time of one engine step, as of a real engine's decode step.
const STEP: Duration = Duration::from_millis(20);
/// A step that comes late makes up for at most this time, so that a stalled machine is not answered by a burst.
const MAKE_UP: Duration = Duration::from_millis(500);
/// Commands that wait for an engine; each is awaited, so more never do.
const COMMANDS: usize = 8;
/// Longest wait for a shim to follow its engine.
const FOLLOW_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest wait for everything that was said to arrive, once nothing more is said.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(20);

/// The size of a fleet.
#[derive(Clone, Copy, Debug)]
pub struct FleetConfig {
    /// Engines, at least 1.
    pub engines: usize,
    /// Blocks that each can hold.
    pub blocks_each: usize,
    /// Blocks of one message while engines are filled, at least 1.
    pub fill_blocks: usize,
    /// Messages that an engine keeps for replays.
    pub replay_steps: usize,
    /// Where shims run.
    pub shims: ShimPlace,
    /// Decides what engines hold.
    pub seed: u64,
}

/// Where shims run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShimPlace {
    /// In this process, over the bus that can lose messages and observes everything.
    Inside,
    /// As processes of their own, one per engine, with a folder for their state that outlives them.
    Processes,
}

/// Engines with their shims.
pub struct Fleet {
    engines: Vec<Engine>,
    shims: Vec<RunningShim>,
    stored: Arc<AtomicU64>,
}

/// One engine as others see it.
pub struct Engine {
    name: String,
    model: Arc<Mutex<ChurnEngine>>,
    endpoints: StreamEndpoints,
    commands: mpsc::Sender<Command>,
    task: JoinHandle<Result<(), EngineError>>,
}

enum RunningShim {
    Inside(Shim),
    Process(Option<Process>),
}

enum Command {
    /// Store so many blocks as fast as possible.
    Fill(usize, oneshot::Sender<()>),
    /// Store so many blocks a second from now on.
    Rate(f64),
    /// Start anew with nothing, under the same address.
    Restart(oneshot::Sender<()>),
}

/// An engine's sockets failed.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each variant is its source")]
pub enum EngineError {
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error(transparent)]
    Send(#[from] SendError),
}

/// The task of one engine.
struct Driver {
    model: Arc<Mutex<ChurnEngine>>,
    commands: mpsc::Receiver<Command>,
    clock: Clock,
    stored: Arc<AtomicU64>,
    fill_blocks: usize,
    offset: Duration,
}

// === impl Fleet ===

impl Fleet {
    /// Starts engines and shims on a rig, and waits until every shim follows its engine.
    pub async fn start(rig: &Rig, config: FleetConfig) -> Result<Self, RecoveryError> {
        let stored = Arc::new(AtomicU64::new(0));
        let mut fleet = Self { engines: Vec::new(), shims: Vec::new(), stored };
        for number in 0..config.engines {
            let buffer_steps = config.replay_steps;
            let publisher =
                EnginePublisher::bind(PublisherConfig { buffer_steps, ..PublisherConfig::default() }).await?;
            let name = format!("10.0.0.{number}:8000");
            let endpoints = publisher.endpoints().clone();
            fleet.shims.push(match config.shims {
                ShimPlace::Inside => {
                    RunningShim::Inside(Shim::start(&shim_config(rig, &name, &endpoints), &rig.shim_bus())?)
                }
                ShimPlace::Processes => {
                    RunningShim::Process(Some(shim_process(rig, number, &name, &endpoints)?))
                }
            });
            // Engines that bind lose what they say before anybody listens.
            publisher.wait_for_subscribers(1, FOLLOW_TIMEOUT).await?;
            fleet.engines.push(fleet.drive(rig, &config, number, name, publisher));
        }
        Ok(fleet)
    }

    fn drive(
        &self,
        rig: &Rig,
        config: &FleetConfig,
        number: usize,
        name: String,
        publisher: EnginePublisher,
    ) -> Engine {
        let model = ChurnEngine::new(number as u64, config.blocks_each, config.seed);
        let model = Arc::new(Mutex::new(model));
        let (commands, queue) = mpsc::channel(COMMANDS);
        let driver = Driver {
            model: Arc::clone(&model),
            commands: queue,
            clock: rig.clock(),
            stored: Arc::clone(&self.stored),
            fill_blocks: config.fill_blocks.max(1),
            offset: STEP.mul_f64(number as f64 / config.engines as f64),
        };
        let endpoints = publisher.endpoints().clone();
        Engine { name, model, endpoints, commands, task: tokio::spawn(driver.run(publisher)) }
    }

    /// Starts the shim process of an engine again.
    pub fn start_shim(&mut self, rig: &Rig, number: usize) -> Result<(), ProcessError> {
        let engine = &self.engines[number];
        let process = shim_process(rig, number, &engine.name, &engine.endpoints)?;
        self.shims[number] = RunningShim::Process(Some(process));
        Ok(())
    }

    /// Asks the shim process of an engine to stop, and waits until it has.
    pub async fn stop_shim(&mut self, number: usize) -> Result<(), ProcessError> {
        match &mut self.shims[number] {
            RunningShim::Process(process) => match process.take() {
                Some(process) => process.terminate().await,
                None => Ok(()),
            },
            RunningShim::Inside(_) => Ok(()),
        }
    }

    /// Kills the shim process of an engine as a crash does.
    pub async fn kill_shim(&mut self, number: usize) -> Result<(), ProcessError> {
        match &mut self.shims[number] {
            RunningShim::Process(process) => match process.take() {
                Some(process) => process.kill().await,
                None => Ok(()),
            },
            RunningShim::Inside(_) => Ok(()),
        }
    }

    /// The engines.
    pub fn engines(&self) -> &[Engine] {
        &self.engines
    }

    /// Blocks stored by all engines since the start.
    pub fn stored(&self) -> u64 {
        self.stored.load(Ordering::Relaxed)
    }

    /// Fills every engine, all at the same time, as fast as shims take it.
    pub async fn fill(&self) -> Result<(), RecoveryError> {
        let mut waits = Vec::new();
        for engine in &self.engines {
            let (done, wait) = oneshot::channel();
            let room = {
                let model = engine.model.lock();
                model.capacity() - model.ledger().held()
            };
            engine.command(Command::Fill(room, done)).await?;
            waits.push(wait);
        }
        for wait in waits {
            wait.await.map_err(|_| RecoveryError::EngineStopped)?;
        }
        Ok(())
    }

    /// From now on all engines together store so many blocks a second (and evict as many once they are full).
    pub async fn set_rate(&self, blocks_per_s: f64) -> Result<(), RecoveryError> {
        let each = blocks_per_s / self.engines.len() as f64;
        for engine in &self.engines {
            engine.command(Command::Rate(each)).await?;
        }
        Ok(())
    }

    /// An engine's process ends and another one starts under the same address, with nothing.
    pub async fn restart_engine(&self, number: usize) -> Result<(), RecoveryError> {
        let (done, wait) = oneshot::channel();
        self.engines[number].command(Command::Restart(done)).await?;
        wait.await.map_err(|_| RecoveryError::EngineStopped)
    }

    /// Every block that the engines hold, by instance.
    pub fn truth(&self) -> Blocks {
        let of = |engine: &Engine| {
            (engine.name.clone(), engine.model.lock().ledger().held_keys().into_iter().collect())
        };
        // An engine without a block is not in a dump either.
        self.engines
            .iter()
            .map(of)
            .filter(|(_, blocks): &(_, std::collections::BTreeSet<u64>)| !blocks.is_empty())
            .collect()
    }

    /// Stops the traffic and waits until the index holds exactly what the engines hold, block for block, and every source is
    /// verified. The error says what was still different.
    pub async fn settle(&self, rig: &mut Rig) -> Result<(), RecoveryError> {
        self.set_rate(0.0).await?;
        let deadline = Instant::now() + SETTLE_TIMEOUT;
        loop {
            rig.wait_verified(self.engines.len(), SETTLE_TIMEOUT).await?;
            let compared = rig.compare(&self.truth()).await;
            match compared {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => sleep(LOOK_INTERVAL).await,
            }
        }
    }

    /// Stops everything.
    pub async fn stop(self) -> Result<(), RecoveryError> {
        for shim in self.shims {
            match shim {
                RunningShim::Inside(shim) => shim.shutdown().await,
                RunningShim::Process(Some(process)) => process.terminate().await?,
                RunningShim::Process(None) => {}
            }
        }
        for engine in self.engines {
            drop(engine.commands);
            engine.task.await.map_err(|_| RecoveryError::EngineStopped)??;
        }
        Ok(())
    }
}

// === impl Engine ===

impl Engine {
    /// Instance name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it holds, and held.
    pub fn model(&self) -> &Arc<Mutex<ChurnEngine>> {
        &self.model
    }

    async fn command(&self, command: Command) -> Result<(), RecoveryError> {
        self.commands.send(command).await.map_err(|_| RecoveryError::EngineStopped)
    }
}

// === impl Driver ===

impl Driver {
    async fn run(mut self, mut publisher: EnginePublisher) -> Result<(), EngineError> {
        let mut steps = tokio::time::interval_at(Instant::now() + self.offset, STEP);
        steps.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut rate, mut last, mut owed) = (0.0, Instant::now(), 0.0);
        loop {
            tokio::select! {
                command = self.commands.recv() => match command {
                    None => break,
                    Some(Command::Rate(blocks_per_s)) => (rate, last, owed) = (blocks_per_s, Instant::now(), 0.0),
                    Some(Command::Fill(blocks, done)) => {
                        self.fill(&mut publisher, blocks).await?;
                        last = Instant::now();
                        // Whoever asked may have gone.
                        let _ = done.send(());
                    }
                    Some(Command::Restart(done)) => {
                        self.model.lock().restart(self.clock.now_ms());
                        publisher = publisher.restart().await?;
                        last = Instant::now();
                        let _ = done.send(());
                    }
                },
                now = steps.tick(), if rate > 0.0 => {
                    owed += rate * now.saturating_duration_since(last).min(MAKE_UP).as_secs_f64();
                    last = last.max(now);
                    let blocks = owed as usize;
                    owed -= blocks as f64;
                    self.step(&mut publisher, blocks).await?;
                }
            }
        }
        publisher.close().await;
        Ok(())
    }

    async fn fill(&self, publisher: &mut EnginePublisher, blocks: usize) -> Result<(), EngineError> {
        let mut left = blocks;
        while left > 0 {
            let now = left.min(self.fill_blocks);
            self.step(publisher, now).await?;
            left -= now;
        }
        Ok(())
    }

    async fn step(&self, publisher: &mut EnginePublisher, blocks: usize) -> Result<(), EngineError> {
        if blocks == 0 {
            return Ok(());
        }
        // Changed before it is said, so that nothing can be known before it is true.
        let events = self.model.lock().step(blocks, self.clock.now_ms());
        self.stored.fetch_add(blocks as u64, Ordering::Relaxed);
        publisher.publish(&batch(events)).await?;
        Ok(())
    }
}

/// The shim of one engine as a process of its own.
fn shim_process(
    rig: &Rig,
    number: usize,
    name: &str,
    endpoints: &StreamEndpoints,
) -> Result<Process, ProcessError> {
    let StreamEndpoints { events, replay, .. } = endpoints;
    let spec = format!("model={MODEL},instance={name},zmq={events},replay={replay}");
    let state = rig.folder().join(format!("shim-{number}"));
    let mut arguments: Vec<OsString> = ["--log", "warn,kvatlas_shim=info", "shim"].map(OsString::from).into();
    arguments.extend(rig.deployment());
    arguments.extend(["--http-listen", "127.0.0.1:0", "--engine", &spec].map(OsString::from));
    arguments.extend(["--state-dir".into(), state.into()]);
    Process::start("a shim", rig.kvatlas(), &arguments, &rig.folder().join(format!("shim-{number}.log")))
}

/// A batch as of now.
pub(super) fn batch(events: Vec<Event>) -> Batch {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Batch { time_s: now.as_secs_f64(), events, rank: 0 }
}

/// A shim in this process that follows one engine.
pub(super) fn shim_config(rig: &Rig, name: &str, endpoints: &StreamEndpoints) -> ShimConfig {
    ShimConfig {
        adapter: None,
        model: MODEL.to_owned(),
        tenant: String::new(),
        instance: InstanceId::new(name).expect("an address and a port"),
        endpoints: vec![EndpointConfig {
            events: endpoints.events.clone(),
            attach: Attach::Connect,
            replay: Some(endpoints.replay.clone()),
            topic: String::new(),
            rank: None,
        }],
        block_size: None,
        removal: RemovalPolicy::PerCopy,
        hasher: KeyHasher::default(),
        partition: Partition::WHOLE,
        limits: MirrorLimits::default(),
        subjects: rig.subjects().clone(),
    }
}
