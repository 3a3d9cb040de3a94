//! Whatever process is killed, cut off or restarted: is an answer ever wrong, is there always one, and how long until all is
//! well again?

use std::time::Duration;

use serde::Serialize;
use tokio::time::{Instant, sleep};

use super::gateway::{Gateway, Tally};
use super::rig::Rig;
use super::{Case, CaseReport, ClusterConfig, ClusterError, Details, PATIENCE, rounded};
use crate::recovery::fleet::Fleet;
use crate::recovery::judge::Judge;

/// Share of questions that have to be answered.
const AVAILABILITY_GOAL: f64 = 0.999;
/// How long a broker that hangs can go unnoticed by an index: sources are marked after 3 s of silence. What is claimed until then
/// is judged by the window and this time.
const UNNOTICED: Duration = Duration::from_secs(3);
/// A broker hangs this many times as long as other faults last: longer than its clients take to notice, at full size.
const HANG_FACTOR: u32 = 3;
/// A shim is away for at least so long, so that indexes notice it, and all is not well until it is back.
const NOTICED: Duration = Duration::from_secs(4);
/// Pause between two restarts in turn: what a supervisor leaves at least.
const ROLLING_PAUSE: Duration = Duration::from_secs(1);

/// What is done to the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// kill -9 of one shard server, and a start with nothing.
    ServerKilled,
    /// kill -9 of one broker, and a start.
    BrokerKilled,
    /// kill -9 of one shim, and a start with its saved state.
    ShimKilled,
    /// One broker cut off from clients and brokers: every connection ends and none can be made.
    BrokerCut,
    /// One broker hangs: its connections stay, and nothing comes.
    BrokerFrozen,
    /// Every broker, server and shim restarted in turn.
    Rolling,
}

/// What came of the faults.
#[derive(Clone, Debug, Serialize)]
pub struct FaultsDetails {
    /// Brokers, servers (replicas included) and shims.
    pub processes: usize,
    /// Blocks that the engines held.
    pub blocks: u64,
    /// Blocks stored a second (and as many evicted), as measured.
    pub blocks_per_s: u64,
    /// A claim is wrong beyond what was held within this time, seconds.
    pub window_s: f64,
    /// Before any fault.
    pub quiet: Tally,
    /// Each fault.
    pub faults: Vec<FaultReport>,
    /// After the traffic stopped, every block of every server was compared with the engines' own; a difference would be an
    /// error.
    pub equal_at_the_end: bool,
}

/// What came of one fault.
#[derive(Clone, Debug, Serialize)]
pub struct FaultReport {
    /// Which.
    pub fault: &'static str,
    /// Whether its goals are met.
    pub ok: bool,
    /// From the fault's end (the process is started again, the cable joined) until every server covers everything and has every
    /// source verified, seconds.
    pub seconds_to_full: f64,
    /// How long that may take, seconds.
    pub goal_s: f64,
    /// Answers from the fault's beginning on, until a while after all was well.
    #[serde(flatten)]
    pub answers: Tally,
}

// === impl Fault ===

impl Fault {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::ServerKilled,
        Self::BrokerKilled,
        Self::ShimKilled,
        Self::BrokerCut,
        Self::BrokerFrozen,
        Self::Rolling,
    ];

    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::ServerKilled => "server_killed",
            Self::BrokerKilled => "broker_killed",
            Self::ShimKilled => "shim_killed",
            Self::BrokerCut => "broker_cut",
            Self::BrokerFrozen => "broker_frozen",
            Self::Rolling => "rolling",
        }
    }

    /// Time from its end after which all has to be well, seconds: of a restart with nothing, with a saved state, and of a loss on
    /// the bus.
    fn goal_s(self) -> f64 {
        match self {
            Self::ServerKilled | Self::Rolling => 10.0,
            Self::ShimKilled => 5.0,
            Self::BrokerKilled | Self::BrokerCut | Self::BrokerFrozen => 2.0,
        }
    }

    /// Does it, and returns when it was over. Brokers are hit in turn: clients of one that was away stay with the others.
    async fn happen(
        self,
        rig: &mut Rig,
        fleet: &mut Fleet,
        gateway: &Gateway,
        config: &ClusterConfig,
    ) -> Result<Instant, ClusterError> {
        match self {
            Self::ServerKilled => {
                rig.kill_server(0).await?;
                sleep(config.fault_time).await;
                rig.start_server(0)?;
                Ok(Instant::now())
            }
            Self::BrokerKilled => {
                rig.brokers().kill(0).await?;
                sleep(config.fault_time).await;
                let over = Instant::now();
                rig.brokers().start_node(0).await?;
                Ok(over)
            }
            Self::ShimKilled => {
                gateway.excuse(0);
                fleet.kill_shim(0).await?;
                sleep(config.fault_time.max(NOTICED)).await;
                fleet.start_shim(rig.site(), 0)?;
                Ok(Instant::now())
            }
            Self::BrokerCut => {
                rig.brokers().set_cut(1, true);
                sleep(config.fault_time).await;
                rig.brokers().set_cut(1, false);
                Ok(Instant::now())
            }
            Self::BrokerFrozen => {
                gateway.set_window(config.window + UNNOTICED);
                rig.brokers().set_frozen(2, true).await?;
                sleep(config.fault_time * HANG_FACTOR).await;
                rig.brokers().set_frozen(2, false).await?;
                Ok(Instant::now())
            }
            Self::Rolling => roll(rig, fleet, gateway).await,
        }
    }
}

async fn roll(rig: &mut Rig, fleet: &mut Fleet, gateway: &Gateway) -> Result<Instant, ClusterError> {
    for node in 0..rig.brokers().count() {
        rig.brokers().stop_node(node).await?;
        rig.brokers().start_node(node).await?;
        rig.brokers().wait_joined().await?;
        sleep(ROLLING_PAUSE).await;
    }
    for at in 0..rig.servers().len() {
        rig.stop_server(at).await?;
        rig.start_server(at)?;
        rig.wait_ready(at).await?;
        sleep(ROLLING_PAUSE).await;
    }
    let mut over = Instant::now();
    for shim in 0..fleet.engines().len() {
        gateway.excuse(shim);
        fleet.stop_shim(shim).await?;
        over = Instant::now();
        fleet.start_shim(rig.site(), shim)?;
        sleep(ROLLING_PAUSE).await;
    }
    Ok(over)
}

/// Runs the case.
pub(super) async fn run(config: &ClusterConfig) -> Result<CaseReport, ClusterError> {
    let (mut rig, mut fleet) = config.filled(&config.rig()).await?;
    fleet.set_rate(config.blocks_per_s).await?;
    let judge = Judge::of(&fleet);
    let clock = rig.site().clock;
    let gateway =
        Gateway::start(rig.servers(), judge, clock, config.window, config.questions_per_s, config.seed)?;
    let (stored, began) = (fleet.stored(), Instant::now());
    sleep(config.watch).await;
    let quiet = gateway.take().tally();
    let mut faults = Vec::new();
    for fault in &config.faults {
        tracing::info!(fault = fault.name(), "a fault");
        let over = fault.happen(&mut rig, &mut fleet, &gateway, config).await?;
        let full = rig.wait_full(config.engines, PATIENCE).await?;
        gateway.set_window(config.window);
        gateway.hold_all();
        // One fault at a time: the next one shall not find a broker that is still alone.
        rig.brokers().wait_joined().await?;
        sleep(config.watch).await;
        let answers = gateway.take().tally();
        let seconds_to_full = rounded(full.saturating_duration_since(over).as_secs_f64());
        let goal_s = fault.goal_s();
        faults.push(FaultReport {
            fault: fault.name(),
            ok: seconds_to_full <= goal_s && is_good(&answers),
            seconds_to_full,
            goal_s,
            answers,
        });
    }
    let rate = (fleet.stored() - stored) as f64 / began.elapsed().as_secs_f64();
    drop(gateway);
    let processes = rig.brokers().count() + rig.servers().len() + fleet.engines().len();
    rig.settle(&fleet).await?;
    let blocks: usize = fleet.truth().values().map(std::collections::BTreeSet::len).sum();
    fleet.stop().await?;
    Ok(CaseReport {
        case: Case::Faults.name(),
        ok: is_good(&quiet) && faults.iter().all(|fault| fault.ok),
        details: Details::Faults(FaultsDetails {
            processes,
            blocks: blocks as u64,
            blocks_per_s: rate as u64,
            window_s: config.window.as_secs_f64(),
            quiet,
            faults,
            equal_at_the_end: true,
        }),
    })
}

fn is_good(answers: &Tally) -> bool {
    answers.availability >= AVAILABILITY_GOAL && answers.false_positives == 0 && answers.missed == 0
}
