//! The bus loses a share of all messages for a while: is every loss noticed, and how long until the index is exact?

use std::time::Duration;

use serde::Serialize;
use tokio::time::{Instant, sleep};

use super::fleet::Fleet;
use super::lossy::LossCounts;
use super::rig::Rig;
use super::sampler::Sampler;
use super::{Case, CaseReport, Details, RecoveryConfig, RecoveryError, rounded};

/// Time from the end of the loss after which the index has to be exact, seconds.
const GOAL_S: f64 = 2.0;
/// Bytes sent again for a byte lost, at most: a lost answer is sent a third time, and what is asked for twice comes twice.
const GOAL_FACTOR: f64 = 2.0;
/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(120);
/// Traffic before the loss.
const WARM_UP: Duration = Duration::from_secs(3);
/// Time between two looks while messages are lost.
const LOOK_PAUSE: Duration = Duration::from_millis(250);
/// Time after the loss in which the last lost frames have to be noticed: heartbeats are a second apart.
const NOTICE: Duration = Duration::from_millis(1_500);

/// The index's own count of gaps.
const GAPS: &str = "kvatlas_index_gaps_total";

/// What came of the losses.
#[derive(Clone, Debug, Serialize)]
pub struct LossDetails {
    /// Blocks that the index held.
    pub blocks: u64,
    /// Engines.
    pub engines: usize,
    /// Blocks stored a second (and as many evicted), as measured.
    pub blocks_per_s: u64,
    /// Share of messages that was lost.
    pub loss: f64,
    /// For how long, seconds.
    pub loss_seconds: f64,
    /// From the end of the loss until every source said that it is verified, seconds.
    pub seconds_to_verified: f64,
    /// Times that the index went from complete to missing frames of a source. Fewer than stretches of lost frames where one
    /// was lost before the last one was back.
    pub index_gaps: u64,
    /// Lost frames that nobody asked for.
    pub unnoticed: usize,
    /// Bytes sent again for each byte of event frames lost.
    pub bytes_per_lost_byte: f64,
    /// Share of looks while messages were lost at which every source was exact.
    pub exact_share: f64,
    /// Mean number of sources that were exact at such a look.
    pub exact_sources: f64,
    /// What was published, lost, asked for and sent again.
    #[serde(flatten)]
    pub counts: LossCounts,
    /// Answers to questions that the index stood by.
    pub answers: u64,
    /// Of these, those that missed blocks that an engine had held for longer than the window.
    pub missed: u64,
    /// 99th percentile of their time, microseconds.
    pub score_p99_us: u64,
    /// After the traffic stopped, every block was compared with the engines' own; a difference would be an error.
    pub equal_at_the_end: bool,
}

/// Runs the case.
pub(super) async fn run(config: &RecoveryConfig) -> Result<CaseReport, RecoveryError> {
    let mut rig = Rig::start(config.rig(None)).await?;
    rig.start_index()?;
    rig.wait_ready().await?;
    let fleet = Fleet::start(&rig.site(), config.fleet()).await?;
    fleet.fill().await?;
    rig.wait_exact(config.engines, PATIENCE).await?;
    fleet.set_rate(config.loss_blocks_per_s).await?;
    sleep(WARM_UP).await;
    rig.wait_exact(config.engines, PATIENCE).await?;
    let held: usize = fleet.truth().values().map(std::collections::BTreeSet::len).sum();

    let sampler = Sampler::start(&rig, &fleet, config.window, config.seed)?;
    let gaps = rig.metric(GAPS).await.unwrap_or_default();
    let (counts, stored, began) = (rig.bus().counts(), fleet.stored(), Instant::now());
    rig.bus().lose(config.loss);
    let (mut looks, mut all_exact, mut exact_sources) = (0_u32, 0_u32, 0_usize);
    while began.elapsed() < config.loss_time {
        let look = rig.watcher().look().await;
        looks += 1;
        all_exact += u32::from(look.exact == config.engines);
        exact_sources += look.exact;
        sleep(LOOK_PAUSE).await;
    }
    rig.bus().lose(0.0);
    let ended = Instant::now();
    let rate = (fleet.stored() - stored) as f64 / began.elapsed().as_secs_f64();
    let exact = rig.wait_exact(config.engines, PATIENCE).await?;
    let needed = rig.bus().counts().since(&counts);
    let verified = rig.wait_verified(config.engines, PATIENCE).await?;
    sleep(NOTICE).await;
    let unnoticed = rig.bus().unnoticed();
    let index_gaps = rig.metric(GAPS).await.unwrap_or_default() - gaps;
    let samples = sampler.take();
    drop(sampler);
    fleet.settle(&mut rig).await?;
    fleet.stop().await?;

    let seconds_to_exact = rounded((exact - ended).as_secs_f64());
    let factor = needed.answer_bytes as f64 / needed.lost_bytes.max(1) as f64;
    let fast = seconds_to_exact <= GOAL_S && factor <= GOAL_FACTOR;
    Ok(CaseReport {
        case: Case::BusLoss.name(),
        ok: fast && unnoticed == 0 && samples.false_positives == 0,
        seconds_to_exact: Some(seconds_to_exact),
        false_positives: samples.false_positives,
        bytes: needed.answer_bytes,
        details: Details::Loss(LossDetails {
            blocks: held as u64,
            engines: config.engines,
            blocks_per_s: rate as u64,
            loss: config.loss,
            loss_seconds: rounded((ended - began).as_secs_f64()),
            seconds_to_verified: rounded((verified - ended).as_secs_f64()),
            index_gaps: index_gaps as u64,
            unnoticed,
            bytes_per_lost_byte: rounded(factor),
            exact_share: rounded(f64::from(all_exact) / f64::from(looks.max(1))),
            exact_sources: rounded(exact_sources as f64 / f64::from(looks.max(1))),
            counts: needed,
            answers: samples.answers,
            missed: samples.missed,
            score_p99_us: samples.latency_us(0.99),
            equal_at_the_end: true,
        }),
    })
}
