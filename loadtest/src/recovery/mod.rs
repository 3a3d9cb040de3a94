//! How fast the map is true again: faults against real parts, and the figures that `kvatlas bench recovery` prints.
//!
//! * [`ledger`]: what an engine held, and when.
//! * [`churn`]: a simulated engine that is cheap and knows its truth.
//! * [`follower`]: what sources held after each frame: the measure for "exact".
//! * [`lossy`]: a bus that loses messages and observes all of them.
//! * [`processes`]: child processes, killed as a crash kills.
//! * [`site`]: what is common to the processes of a rig.
//! * [`rig`]: broker, bus and index.
//! * [`fleet`]: engines with their shims.
//! * [`judge`]: what an answer says against what engines held.
//! * [`sampler`]: asks without pause and judges the answers.
//! * [`restart`], [`loss`], [`routing`], [`upkeep`]: the cases.
//!
//! **Exact** means: for every source, the digest that the index has at its sequence is the one that the source had after
//! that very frame, the source counts in answers, and no frame is missing that is older than 250 ms. At the end of
//! each case the traffic stops, and every block of the index is compared with every block of the engines.
//!
//! Engines, shims, observer and questions share one process; broker and index have one each. So everything competes for
//! the machine's cores, and the figures are upper bounds.

use std::path::PathBuf;
use std::time::Duration;

use kvatlas_bus::ConnectError;
use kvatlas_client::{CallError, EndpointError};
use kvatlas_proto::frame::{EncodeFrameError, ParseFrameError};
use kvatlas_shim::shim::StartShimError;
use serde::Serialize;

pub mod churn;
pub mod clock;
pub mod fleet;
pub mod follower;
pub mod judge;
pub mod ledger;
pub mod loss;
pub mod lossy;
pub mod processes;
pub mod restart;
pub mod rig;
pub mod routing;
pub mod sampler;
pub mod site;
pub mod upkeep;

use crate::engine_sim::{EnqueueError, InvalidSimConfigError};
use crate::sockets::{BindError, NoSubscriberError, SendError};
use crate::workload::InvalidWorkloadError;
use fleet::EngineError;
use processes::ProcessError;
use rig::RigConfig;

/// Blocks of one message while an engine is filled.
const FILL_BLOCKS: usize = 512;
/// Messages that an engine keeps for replays. Fewer than vLLM's default because a fleet of them shares one machine.
const REPLAY_STEPS: usize = 1_500;

/// One thing to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Case {
    /// The index is killed and started again, with a checkpoint.
    RestartWarm,
    /// The same without one.
    RestartCold,
    /// The bus loses messages for a while.
    BusLoss,
    /// Routing decisions with the index killed and started again in the middle, with a checkpoint.
    RoutingRestart,
    /// The same without one.
    RoutingRestartCold,
    /// What digests cost.
    DigestUpkeep,
}

/// How the cases are run.
#[derive(Clone, Debug)]
pub struct RecoveryConfig {
    /// The `kvatlas` program, for the index.
    pub kvatlas: PathBuf,
    /// The broker's program.
    pub nats_server: PathBuf,
    /// Engines of the fleet.
    pub engines: usize,
    /// Blocks that all engines of the fleet hold together.
    pub blocks: usize,
    /// Live traffic of the restart cases: blocks stored a second, with as many evicted.
    pub blocks_per_s: f64,
    /// Age of the checkpoint when the index is killed.
    pub checkpoint_age: Duration,
    /// Traffic of the loss case: blocks stored a second, with as many evicted.
    pub loss_blocks_per_s: f64,
    /// Share of messages that is lost, 0 to 1.
    pub loss: f64,
    /// How long messages are lost.
    pub loss_time: Duration,
    /// Routing decisions.
    pub decisions: usize,
    /// How long the router waits for an answer before it routes without one.
    pub patience: Duration,
    /// How long digests are measured.
    pub upkeep_time: Duration,
    /// A claim is wrong if the engine held the block at no time of this window before the answer; at most
    /// [`sampler::MAX_WINDOW`].
    pub window: Duration,
    /// Decides what engines hold, what is lost and what is asked.
    pub seed: u64,
}

/// What came of a case.
#[derive(Clone, Debug, Serialize)]
pub struct CaseReport {
    /// Name of the case.
    pub case: &'static str,
    /// Whether the case's goal is met.
    pub ok: bool,
    /// Time until every source was exact again, seconds; absent where nothing was wrong.
    pub seconds_to_exact: Option<f64>,
    /// Claims beyond what an engine held within the last second.
    pub false_positives: u64,
    /// Bytes of answers that it took.
    pub bytes: u64,
    /// The rest.
    #[serde(flatten)]
    pub details: Details,
}

/// What only one kind of case has.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Details {
    /// Of a restart.
    Restart(restart::RestartDetails),
    /// Of a lossy bus.
    Loss(loss::LossDetails),
    /// Of routing decisions.
    Routing(routing::RoutingDetails),
    /// Of digests.
    Upkeep(upkeep::UpkeepDetails),
}

/// Why a case stopped.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    /// There is no place for files.
    #[error("no folder for the files of the processes: {0}")]
    Folder(std::io::Error),
    /// There is no port.
    #[error("no free port on loopback: {0}")]
    Port(std::io::Error),
    /// A child process failed.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The broker cannot be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The index's address cannot be used.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The index did not answer.
    #[error(transparent)]
    Call(#[from] CallError),
    /// A shim cannot start.
    #[error(transparent)]
    Shim(#[from] StartShimError),
    /// An engine's sockets cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// An engine cannot publish.
    #[error(transparent)]
    Send(#[from] SendError),
    /// An engine's task failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// An engine's task is gone.
    #[error("a simulated engine stopped before it was told to")]
    EngineStopped,
    /// A shim does not reach its engine.
    #[error(transparent)]
    NotFollowed(#[from] NoSubscriberError),
    /// A state was not reached.
    #[error("{sources} sources were not all {what} within {wait:?}: {state}")]
    NotInTime {
        /// Which state.
        what: &'static str,
        /// How long was waited.
        wait: Duration,
        /// How many sources there are.
        sources: usize,
        /// What the index said last.
        state: String,
    },
    /// The index differs from the engines.
    #[error("after the traffic stopped, the index has {wrong} blocks too many and {missing} are missing")]
    NotEqual {
        /// Blocks that no engine holds.
        wrong: usize,
        /// Blocks that the index does not have.
        missing: usize,
    },
    /// No checkpoint appeared.
    #[error("the index wrote no checkpoint within {0:?}")]
    NoCheckpoint(Duration),
    /// The workload is not usable.
    #[error(transparent)]
    Workload(#[from] InvalidWorkloadError),
    /// A simulated engine is not usable.
    #[error(transparent)]
    Sim(#[from] InvalidSimConfigError),
    /// A simulated engine refused a request.
    #[error(transparent)]
    Enqueue(#[from] EnqueueError),
    /// A frame cannot be written.
    #[error(transparent)]
    Encode(#[from] EncodeFrameError),
    /// A frame of our own cannot be read.
    #[error(transparent)]
    Parse(#[from] ParseFrameError),
}

// === impl Case ===

impl Case {
    /// All cases, in the order in which they are run.
    pub const ALL: [Self; 6] = [
        Self::RestartWarm,
        Self::RestartCold,
        Self::BusLoss,
        Self::RoutingRestart,
        Self::RoutingRestartCold,
        Self::DigestUpkeep,
    ];

    /// Name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::RestartWarm => "restart_warm",
            Self::RestartCold => "restart_cold",
            Self::BusLoss => "bus_loss",
            Self::RoutingRestart => "routing_restart",
            Self::RoutingRestartCold => "routing_restart_cold",
            Self::DigestUpkeep => "digest_upkeep",
        }
    }
}

// === impl RecoveryConfig ===

impl RecoveryConfig {
    /// The sizes that the project's promises name.
    pub fn new(kvatlas: PathBuf, nats_server: PathBuf) -> Self {
        Self {
            kvatlas,
            nats_server,
            engines: 10,
            blocks: 1_000_000,
            blocks_per_s: 5_000.0,
            checkpoint_age: Duration::from_secs(55),
            loss_blocks_per_s: 50_000.0,
            loss: 0.05,
            loss_time: Duration::from_secs(60),
            decisions: 1_958,
            patience: Duration::from_secs(1),
            upkeep_time: Duration::from_secs(6),
            window: Duration::from_secs(1),
            seed: 1,
        }
    }

    fn rig(&self, checkpoint: Option<Duration>) -> RigConfig {
        RigConfig {
            kvatlas: self.kvatlas.clone(),
            nats_server: self.nats_server.clone(),
            checkpoint,
            seed: self.seed,
        }
    }

    fn fleet(&self) -> fleet::FleetConfig {
        fleet::FleetConfig {
            engines: self.engines,
            blocks_each: self.blocks / self.engines.max(1),
            fill_blocks: FILL_BLOCKS,
            replay_steps: REPLAY_STEPS,
            shims: fleet::ShimPlace::Inside,
            seed: self.seed,
        }
    }
}

/// Runs one case.
pub async fn run(case: Case, config: &RecoveryConfig) -> Result<CaseReport, RecoveryError> {
    match case {
        Case::RestartWarm => restart::run(config, true).await,
        Case::RestartCold => restart::run(config, false).await,
        Case::BusLoss => loss::run(config).await,
        Case::RoutingRestart => routing::run(config, true).await,
        Case::RoutingRestartCold => routing::run(config, false).await,
        Case::DigestUpkeep => upkeep::run(config.upkeep_time),
    }
}

/// Three decimals are enough for a person and for a comparison.
fn rounded(value: f64) -> f64 {
    (value * 1_000.0).round() / 1_000.0
}
