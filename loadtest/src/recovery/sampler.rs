//! Asks an index without pause while things happen to it, and judges every answer by what the engines held.

use std::sync::Arc;
use std::time::Duration;

use hdrhistogram::Histogram;
use kvatlas_client::{Client, EndpointError};
use kvatlas_proto::grpc;
use parking_lot::Mutex;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use super::clock::Clock;
use super::fleet::Fleet;
use super::judge::{Judge, question};
use super::rig::Rig;

/// Largest window in which a claim may have been right: what engines held is remembered a little longer.
pub const MAX_WINDOW: Duration = Duration::from_secs(4);
/// Deadline of a question.
const DEADLINE: Duration = Duration::from_secs(1);
/// Pause after a question without an answer: nobody is there.
const PAUSE: Duration = Duration::from_millis(5);
/// Longest answer that the histogram tells apart, microseconds.
const MAX_LATENCY_US: u64 = 10_000_000;
/// Wrong answers that are logged; the others are only counted.
const MAX_LOGGED: u64 = 5;

/// Asks until it is dropped.
pub struct Sampler {
    counts: Arc<Mutex<SampleCounts>>,
    task: JoinHandle<()>,
}

/// What the answers were worth.
#[derive(Clone, Debug)]
pub struct SampleCounts {
    /// Answers that the server stood by (coverage 1).
    pub answers: u64,
    /// Answers of a server that said it was still finding out.
    pub early_answers: u64,
    /// Questions without an answer.
    pub errors: u64,
    /// Claims in answers of either kind beyond what the engine held within the window.
    pub false_positives: u64,
    /// Answers (coverage 1) that missed blocks that an engine had held for longer than the window.
    pub missed: u64,
    latency: Histogram<u64>,
}

struct Asker {
    client: Client,
    clock: Clock,
    judge: Judge,
    random: StdRng,
    window_ms: u64,
    counts: Arc<Mutex<SampleCounts>>,
}

// === impl Sampler ===

impl Sampler {
    /// Starts asking the rig's index about the fleet's chains. A claim is wrong if the engine held the block at no time of
    /// the window (at most [`MAX_WINDOW`]) before the answer, and a block is missed if the engine has held it for longer.
    pub fn start(rig: &Rig, fleet: &Fleet, window: Duration, seed: u64) -> Result<Self, EndpointError> {
        let counts = Arc::new(Mutex::new(SampleCounts::default()));
        let asker = Asker {
            client: rig.client(DEADLINE)?,
            clock: rig.clock(),
            judge: Judge::of(fleet),
            random: StdRng::seed_from_u64(seed),
            window_ms: window.min(MAX_WINDOW).as_millis() as u64,
            counts: Arc::clone(&counts),
        };
        Ok(Self { counts, task: tokio::spawn(asker.run()) })
    }

    /// What came of the questions since the last call.
    pub fn take(&self) -> SampleCounts {
        std::mem::take(&mut self.counts.lock())
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.task.abort();
    }
}

// === impl SampleCounts ===

impl Default for SampleCounts {
    fn default() -> Self {
        Self {
            answers: 0,
            early_answers: 0,
            errors: 0,
            false_positives: 0,
            missed: 0,
            latency: Histogram::new_with_max(MAX_LATENCY_US, 3).expect("bounds are constants"),
        }
    }
}

impl SampleCounts {
    /// Time within which this share of the answers came, microseconds.
    pub fn latency_us(&self, share: f64) -> u64 {
        self.latency.value_at_quantile(share)
    }
}

// === impl Asker ===

impl Asker {
    async fn run(mut self) {
        loop {
            let Some(chain) = self.judge.some_chain(&mut self.random) else {
                sleep(PAUSE).await;
                continue;
            };
            let (asked_ms, asked) = (self.clock.now_ms(), Instant::now());
            if let Ok(answer) = self.client.score(question(&chain)).await {
                self.judge(&chain, &answer, asked_ms, asked.elapsed());
            } else {
                self.counts.lock().errors += 1;
                sleep(PAUSE).await;
            }
        }
    }

    fn judge(&self, chain: &[u64], answer: &grpc::ScoreResponse, asked_ms: u64, took: Duration) {
        let since_ms = asked_ms.saturating_sub(self.window_ms);
        let (mut wrong, mut misses) = (0, false);
        for finding in self.judge.findings(chain, answer, |_| since_ms) {
            misses |= finding.is_missed();
            if finding.is_wrong() {
                wrong += 1;
                if self.counts.lock().false_positives < MAX_LOGGED {
                    tracing::warn!(?finding, coverage = answer.coverage, "a false positive");
                }
            }
        }
        let mut counts = self.counts.lock();
        counts.false_positives += wrong;
        if answer.coverage >= 1.0 {
            counts.answers += 1;
            counts.missed += u64::from(misses);
            counts.latency.saturating_record(took.as_micros() as u64);
        } else {
            counts.early_answers += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use kvatlas_client::ClientConfig;

    use super::*;
    use crate::recovery::churn::{ChurnEngine, MIN_CAPACITY};

    fn answer(matched_blocks: u32, coverage: f64) -> grpc::ScoreResponse {
        let row = grpc::InstanceScore { instance: "a:1".into(), matched_blocks, ..Default::default() };
        grpc::ScoreResponse { instances: vec![row], coverage, ..Default::default() }
    }

    /// The judge must be able to find an answer guilty, of either kind.
    #[tokio::test]
    async fn claims_beyond_the_window_are_wrong_and_old_blocks_are_missed() {
        let mut engine = ChurnEngine::new(1, MIN_CAPACITY, 1);
        engine.step(600, 1);
        let chain = engine.some_chain(&mut StdRng::seed_from_u64(1)).unwrap();
        let all = chain.len() as u32;
        let asker = Asker {
            client: Client::connect(ClientConfig::new(SocketAddr::from(([127, 0, 0, 1], 1)).to_string()))
                .unwrap(),
            clock: Clock::start(),
            judge: Judge::new(vec![("a:1".into(), Arc::new(Mutex::new(engine)))]),
            random: StdRng::seed_from_u64(1),
            window_ms: 1_000,
            counts: Arc::default(),
        };
        let judge = |matched, coverage, asked_ms| {
            asker.judge(&chain, &answer(matched, coverage), asked_ms, Duration::from_millis(1));
            let counts = std::mem::take(&mut *asker.counts.lock());
            (counts.answers, counts.early_answers, counts.false_positives, counts.missed)
        };
        assert_eq!(judge(all, 1.0, 1_500), (1, 0, 0, 0));
        assert_eq!(judge(all - 1, 1.0, 1_000), (1, 0, 0, 0), "it may still be on its way");
        assert_eq!(judge(all - 1, 1.0, 1_001), (1, 0, 0, 1));
        assert_eq!(judge(0, 0.0, 1_500), (0, 1, 0, 0), "the server said that it does not know yet");
        asker.judge.engines()[0].1.lock().restart(2_000);
        assert_eq!(judge(all, 1.0, 3_000), (1, 0, 0, 0));
        assert_eq!(judge(all, 1.0, 3_001), (1, 0, 1, 0));
        assert_eq!(judge(1, 0.0, 3_001), (0, 1, 1, 0), "a wrong claim is wrong whatever the server said");
    }
}
