//! Many servers as one index, with real processes on one machine, and the figures that `kvatlas bench cluster` prints.
//!
//! * [`proxy`]: a cable that can be cut.
//! * [`brokers`]: a cluster of brokers behind such cables.
//! * [`rig`]: brokers and servers, and whether all of them are well.
//! * [`scrape`]: their metrics.
//! * [`gateway`]: asks as gateways do, and judges the answers.
//! * [`conversations`], [`stage`]: prompts of agents, and a deployment that holds them.
//! * [`openloop`]: asks at a rate that does not depend on the answers.
//! * [`faults`], [`equal`], [`resize`], [`latency`], [`shares`]: the cases.
//!
//! Engines, their truth and the gateway are in this process ([`crate::recovery`] has them); shims, brokers and servers have one
//! each. Everything competes for the machine's cores, so times are upper bounds.

use std::path::PathBuf;
use std::time::Duration;

use kvatlas_bus::ConnectError;
use kvatlas_client::{CallError, EndpointError};
use kvatlas_proto::shard::InvalidPartitionError;
use serde::Serialize;

pub mod brokers;
pub mod conversations;
pub mod equal;
pub mod faults;
pub mod gateway;
pub mod latency;
pub mod openloop;
pub mod proxy;
pub mod resize;
pub mod rig;
pub mod scrape;
pub mod shares;
pub mod stage;

use crate::recovery::RecoveryError;
use crate::recovery::fleet::{Fleet, FleetConfig, ShimPlace};
use crate::recovery::processes::ProcessError;
use rig::{Rig, RigConfig};

/// Longest wait for anything: far above the goals, so that a figure is reported even if a goal is missed by much.
const PATIENCE: Duration = Duration::from_secs(120);
/// Blocks of one message while an engine is filled.
const FILL_BLOCKS: usize = 512;
/// Messages that an engine keeps for replays.
const REPLAY_STEPS: usize = 10_000;

/// One thing to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Case {
    /// Processes killed, brokers cut off and frozen, everything restarted in turn, under load.
    Faults,
    /// All servers give the same bytes.
    Equal,
    /// From so many servers to one more, under load.
    Resize,
    /// How evenly servers share the work when all prompts begin alike.
    Skew,
    /// What each server has of the work, for several numbers of servers.
    Scaling,
    /// What an answer costs beside one server that has everything.
    Latency,
}

/// How the cases are run.
#[derive(Clone, Debug)]
pub struct ClusterConfig {
    /// The `kvatlas` program.
    pub kvatlas: PathBuf,
    /// The broker's program.
    pub nats_server: PathBuf,
    /// Brokers of the fault cases.
    pub brokers: usize,
    /// Virtual shards.
    pub shards: u32,
    /// Servers that they are divided among.
    pub servers: u32,
    /// Replicas of each.
    pub replicas: u32,
    /// Engines.
    pub engines: usize,
    /// Blocks that all engines hold together.
    pub blocks: usize,
    /// Live traffic: blocks stored a second by all engines, with as many evicted.
    pub blocks_per_s: f64,
    /// Questions a second.
    pub questions_per_s: f64,
    /// What is done, in this order.
    pub faults: Vec<faults::Fault>,
    /// How long a fault lasts, where it is not over at once.
    pub fault_time: Duration,
    /// Load before the first fault, and how long answers are judged after each.
    pub watch: Duration,
    /// A claim is wrong if the engine held the block at no time of this window before the question.
    pub window: Duration,
    /// Questions that all servers are asked in the case of equal answers.
    pub equal_questions: usize,
    /// Conversations of the cases of skew, scaling and latency.
    pub conversations: usize,
    /// Time at one rate in the case of latency.
    pub step: Duration,
    /// Decides what engines hold and what is asked.
    pub seed: u64,
}

/// What came of a case.
#[derive(Clone, Debug, Serialize)]
pub struct CaseReport {
    /// Name of the case.
    pub case: &'static str,
    /// Whether the case's goals are met.
    pub ok: bool,
    /// The rest.
    #[serde(flatten)]
    pub details: Details,
}

/// What only one kind of case has.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Details {
    /// Of faults.
    Faults(faults::FaultsDetails),
    /// Of equal answers.
    Equal(equal::EqualDetails),
    /// Of another number of servers.
    Resize(resize::ResizeDetails),
    /// Of one beginning.
    Skew(shares::SkewDetails),
    /// Of several sizes.
    Scaling(shares::ScalingDetails),
    /// Of time.
    Latency(latency::LatencyDetails),
}

/// Why a case stopped.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// There is no place for files.
    #[error("no folder for the files of the processes: {0}")]
    Folder(std::io::Error),
    /// There is no port.
    #[error("no free port on loopback: {0}")]
    Port(std::io::Error),
    /// The number of shards cannot be.
    #[error(transparent)]
    Partition(InvalidPartitionError),
    /// A child process failed.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The brokers cannot be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// A server's address cannot be used.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// A server did not answer.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The engines failed.
    #[error(transparent)]
    Fleet(#[from] RecoveryError),
    /// A state was not reached.
    #[error("there was no {what} within {wait:?}: {state}")]
    NotInTime {
        /// Which state.
        what: &'static str,
        /// How long was waited.
        wait: Duration,
        /// What it was instead.
        state: String,
    },
    /// The servers differ from the engines.
    #[error("after the traffic stopped, the servers have {wrong} blocks too many and {missing} are missing")]
    NotEqual {
        /// Blocks that no engine holds, or that a second server should not have.
        wrong: usize,
        /// Blocks that no server has.
        missing: usize,
    },
}

// === impl Case ===

impl Case {
    /// All cases, in the order in which they are run.
    pub const ALL: [Self; 6] =
        [Self::Equal, Self::Faults, Self::Resize, Self::Skew, Self::Scaling, Self::Latency];

    /// Name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Faults => "faults",
            Self::Equal => "equal",
            Self::Resize => "resize",
            Self::Skew => "skew",
            Self::Scaling => "scaling",
            Self::Latency => "latency",
        }
    }
}

// === impl ClusterConfig ===

impl ClusterConfig {
    /// The sizes that the project's promises name.
    pub fn new(kvatlas: PathBuf, nats_server: PathBuf) -> Self {
        Self {
            kvatlas,
            nats_server,
            brokers: 3,
            shards: 64,
            servers: 4,
            replicas: 2,
            engines: 6,
            blocks: 120_000,
            blocks_per_s: 2_000.0,
            questions_per_s: 200.0,
            faults: faults::Fault::ALL.to_vec(),
            fault_time: Duration::from_secs(5),
            watch: Duration::from_secs(5),
            window: Duration::from_secs(1),
            equal_questions: 200,
            conversations: 400,
            step: Duration::from_secs(4),
            seed: 1,
        }
    }

    /// Smaller and shorter: for a look, and for tests.
    #[must_use]
    pub fn quick(self) -> Self {
        Self {
            engines: 3,
            blocks: 18_000,
            blocks_per_s: 1_000.0,
            questions_per_s: 60.0,
            fault_time: Duration::from_secs(3),
            watch: Duration::from_secs(2),
            equal_questions: 40,
            conversations: 40,
            step: Duration::from_secs(1),
            ..self
        }
    }

    fn rig(&self) -> RigConfig {
        RigConfig {
            kvatlas: self.kvatlas.clone(),
            nats_server: self.nats_server.clone(),
            brokers: self.brokers,
            shards: self.shards,
            servers: self.servers,
            replicas: self.replicas,
        }
    }

    fn fleet(&self) -> FleetConfig {
        FleetConfig {
            engines: self.engines,
            blocks_each: self.blocks / self.engines.max(1),
            fill_blocks: FILL_BLOCKS,
            replay_steps: REPLAY_STEPS,
            shims: ShimPlace::Processes,
            seed: self.seed,
        }
    }

    /// A cluster and a filled fleet.
    async fn filled(&self, rig: &RigConfig) -> Result<(Rig, Fleet), ClusterError> {
        let mut rig = Rig::start(rig).await?;
        let fleet = Fleet::start(rig.site(), self.fleet()).await?;
        fleet.fill().await?;
        rig.wait_full(self.engines, PATIENCE).await?;
        Ok((rig, fleet))
    }
}

/// Runs one case.
pub async fn run(case: Case, config: &ClusterConfig) -> Result<CaseReport, ClusterError> {
    match case {
        Case::Faults => faults::run(config).await,
        Case::Equal => equal::run(config).await,
        Case::Resize => resize::run(config).await,
        Case::Skew => shares::skew(config).await,
        Case::Scaling => shares::scaling(config).await,
        Case::Latency => latency::run(config).await,
    }
}

/// Three decimals are enough for a person and for a comparison.
fn rounded(value: f64) -> f64 {
    (value * 1_000.0).round() / 1_000.0
}
