//! From N servers to N + 1 under load: the new division is started beside the old one, and the old one stopped when the new
//! one is ready. Is an answer ever wrong or partial, what does it cost, how long does it take?

use std::time::Duration;

use serde::Serialize;
use tokio::time::{Instant, sleep};

use super::gateway::{Gateway, Tally};
use super::{Case, CaseReport, ClusterConfig, ClusterError, Details, PATIENCE, rounded};
use crate::recovery::judge::Judge;

/// Time from the last stop of an old server until it is looked whether all is well: longer than an old announcement counts.
const SETTLE: Duration = Duration::from_secs(3);

/// What came of the change.
#[derive(Clone, Debug, Serialize)]
pub struct ResizeDetails {
    /// Servers before.
    pub from: u32,
    /// Servers after.
    pub to: u32,
    /// Blocks that the engines held.
    pub blocks: u64,
    /// From the first new server's start until every one was ready and had every source verified, seconds.
    pub seconds_to_ready: f64,
    /// Until the last old server was gone, seconds.
    pub seconds_in_all: f64,
    /// Bytes that publishers sent to the new servers to bring them up to date.
    pub state_bytes: u64,
    /// The same for each block that the engines held.
    pub bytes_per_block: f64,
    /// Answers meanwhile, until a while after the old servers were gone.
    #[serde(flatten)]
    pub answers: Tally,
    /// After the traffic stopped, every block of every server was compared with the engines' own; a difference would be an
    /// error.
    pub equal_at_the_end: bool,
}

/// Runs the case.
pub(super) async fn run(config: &ClusterConfig) -> Result<CaseReport, ClusterError> {
    let (from, to) = (config.servers, config.servers + 1);
    // One replica of each: what is measured is the change, not the redundancy.
    let (mut rig, fleet) = config.filled(&super::RigConfig { replicas: 1, ..config.rig() }).await?;
    let blocks: u64 = fleet.truth().values().map(|blocks| blocks.len() as u64).sum();
    fleet.set_rate(config.blocks_per_s).await?;
    let (judge, clock) = (Judge::of(&fleet), rig.site().clock);
    let gateway =
        Gateway::start(rig.servers(), judge, clock, config.window, config.questions_per_s, config.seed)?;
    sleep(config.watch).await;
    gateway.take();

    let began = Instant::now();
    rig.add_servers(to, 0).await?;
    for at in from as usize..rig.servers().len() {
        rig.wait_ready(at).await?;
    }
    let ready = rig.wait_full(config.engines, PATIENCE).await?;
    let mut state_bytes = 0.0;
    for server in rig.servers().iter().filter(|server| server.of() == to) {
        state_bytes += server.scrape().await.get("kvatlas_index_reply_bytes_total");
    }
    // A gateway takes a server off its list before it is stopped.
    gateway.set_servers(rig.servers().iter().filter(|server| server.of() == to))?;
    for at in 0..from as usize {
        rig.stop_server(at).await?;
    }
    let gone = Instant::now();
    sleep(SETTLE.max(config.watch)).await;
    rig.wait_full(config.engines, PATIENCE).await?;
    let answers = gateway.take().tally();
    drop(gateway);
    rig.settle(&fleet).await?;
    fleet.stop().await?;
    let seconds = |at: Instant| rounded(at.saturating_duration_since(began).as_secs_f64());
    let ok = answers.false_positives + answers.missed + answers.unanswered + answers.partial_answers == 0;
    Ok(CaseReport {
        case: Case::Resize.name(),
        ok,
        details: Details::Resize(ResizeDetails {
            from,
            to,
            blocks,
            seconds_to_ready: seconds(ready),
            seconds_in_all: seconds(gone),
            state_bytes: state_bytes as u64,
            bytes_per_block: rounded(state_bytes / blocks.max(1) as f64),
            answers,
            equal_at_the_end: true,
        }),
    })
}
