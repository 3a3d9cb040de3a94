//! The index is killed while a fleet publishes, and started again: how long until it is exact?

use std::time::{Duration, SystemTime};

use serde::Serialize;
use tokio::time::{Instant, sleep};

use super::fleet::Fleet;
use super::rig::{LOOK_INTERVAL, Rig};
use super::sampler::Sampler;
use super::{Case, CaseReport, Details, RecoveryConfig, RecoveryError, rounded};

/// Time after which it has to be exact, seconds.
const WARM_GOAL_S: f64 = 5.0;
/// The same without a checkpoint.
const COLD_GOAL_S: f64 = 10.0;
/// Longest wait for anything: far above the goals, so that a figure is reported even if a goal is missed by much.
const PATIENCE: Duration = Duration::from_secs(120);
/// Traffic before an index without a checkpoint is killed, so that the fleet is in its stride.
const WARM_UP: Duration = Duration::from_secs(3);
/// How much later than it is to be old enough the next checkpoint is due, at least.
const CHECKPOINT_ROOM: Duration = Duration::from_secs(2);
/// How long answers are judged after the index is exact again.
const WATCH: Duration = Duration::from_secs(5);

/// What came of a restart.
#[derive(Clone, Debug, Serialize)]
pub struct RestartDetails {
    /// Blocks that the index held when it was killed.
    pub blocks: u64,
    /// Engines.
    pub engines: usize,
    /// Blocks stored a second (and as many evicted) meanwhile, as measured.
    pub blocks_per_s: u64,
    /// Age of the checkpoint when the index was killed, seconds.
    pub checkpoint_age_s: Option<f64>,
    /// Size of the checkpoint.
    pub checkpoint_bytes: Option<u64>,
    /// Blocks that were stored since the checkpoint; as many were evicted.
    pub drift_blocks: Option<u64>,
    /// From the process's start until it called itself ready, seconds.
    pub seconds_to_ready: f64,
    /// Until every source was verified, seconds.
    pub seconds_to_verified: f64,
    /// Requests that the index sent meanwhile.
    pub requests: u64,
    /// Answers to questions since the restart that the index stood by.
    pub answers: u64,
    /// Of these, those that missed blocks that an engine had held for longer than the window.
    pub missed: u64,
    /// 99th percentile of their time, microseconds.
    pub score_p99_us: u64,
    /// The slowest, microseconds.
    pub score_max_us: u64,
    /// After the traffic stopped, every block was compared with the engines' own; a difference would be an error.
    pub equal_at_the_end: bool,
}

struct Aged {
    age_s: f64,
    bytes: u64,
    drift: u64,
}

/// Runs the case, with a checkpoint or without.
pub(super) async fn run(config: &RecoveryConfig, warm: bool) -> Result<CaseReport, RecoveryError> {
    let interval = warm.then_some(interval_of(config.checkpoint_age));
    let mut rig = Rig::start(config.rig(interval)).await?;
    rig.start_index()?;
    rig.wait_ready().await?;
    let fleet = Fleet::start(&rig.site(), config.fleet()).await?;
    fleet.fill().await?;
    rig.wait_exact(config.engines, PATIENCE).await?;
    let filled = SystemTime::now();
    fleet.set_rate(config.blocks_per_s).await?;
    let aged = if warm {
        Some(age_checkpoint(&rig, &fleet, filled, config.checkpoint_age).await?)
    } else {
        sleep(WARM_UP).await;
        None
    };
    let held: usize = fleet.truth().values().map(std::collections::BTreeSet::len).sum();

    let (counts, stored, began) = (rig.bus().counts(), fleet.stored(), Instant::now());
    rig.kill_index().await?;
    let started = rig.start_index()?;
    let sampler = Sampler::start(&rig, &fleet, config.window, config.seed)?;
    let ready = rig.wait_ready().await?;
    let exact = rig.wait_exact(config.engines, PATIENCE).await?;
    let needed = rig.bus().counts().since(&counts);
    let verified = rig.wait_verified(config.engines, PATIENCE).await?;
    sleep(WATCH).await;
    let rate = (fleet.stored() - stored) as f64 / began.elapsed().as_secs_f64();
    let samples = sampler.take();
    drop(sampler);
    fleet.settle(&mut rig).await?;
    fleet.stop().await?;

    let since_start = |at: Instant| rounded((at - started).as_secs_f64());
    let seconds_to_exact = since_start(exact);
    let goal = if warm { WARM_GOAL_S } else { COLD_GOAL_S };
    Ok(CaseReport {
        case: if warm { Case::RestartWarm } else { Case::RestartCold }.name(),
        ok: seconds_to_exact <= goal && samples.false_positives == 0,
        seconds_to_exact: Some(seconds_to_exact),
        false_positives: samples.false_positives,
        bytes: needed.answer_bytes,
        details: Details::Restart(RestartDetails {
            blocks: held as u64,
            engines: config.engines,
            blocks_per_s: rate as u64,
            checkpoint_age_s: aged.as_ref().map(|aged| rounded(aged.age_s)),
            checkpoint_bytes: aged.as_ref().map(|aged| aged.bytes),
            drift_blocks: aged.as_ref().map(|aged| aged.drift),
            seconds_to_ready: since_start(ready),
            seconds_to_verified: since_start(verified),
            requests: needed.requests,
            answers: samples.answers,
            missed: samples.missed,
            score_p99_us: samples.latency_us(0.99),
            score_max_us: samples.latency_us(1.0),
            equal_at_the_end: true,
        }),
    })
}

/// Time between checkpoints with which one becomes this old.
fn interval_of(age: Duration) -> Duration {
    age + age / 5 + CHECKPOINT_ROOM
}

/// Waits for the next checkpoint, and then until it is as old as wanted.
async fn age_checkpoint(
    rig: &Rig,
    fleet: &Fleet,
    after: SystemTime,
    age: Duration,
) -> Result<Aged, RecoveryError> {
    let wait = interval_of(age) + PATIENCE;
    let deadline = Instant::now() + wait;
    let written = loop {
        match rig.checkpoint_written() {
            Some(written) if written > after => break written,
            _ if Instant::now() > deadline => return Err(RecoveryError::NoCheckpoint(wait)),
            _ => sleep(LOOK_INTERVAL).await,
        }
    };
    let stored = fleet.stored();
    sleep(age).await;
    let bytes = rig.checkpoint_file().metadata().map_or(0, |file| file.len());
    let age_s = SystemTime::now().duration_since(written).unwrap_or_default().as_secs_f64();
    Ok(Aged { age_s, bytes, drift: fleet.stored() - stored })
}
