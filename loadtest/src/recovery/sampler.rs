//! Asks an index without pause while things happen to it, and judges every answer by what the engines held.

use std::sync::Arc;
use std::time::Duration;

use hdrhistogram::Histogram;
use kvatlas_client::{Client, EndpointError};
use kvatlas_proto::grpc;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use super::churn::{BLOCK_TOKENS, ChurnEngine};
use super::clock::Clock;
use super::fleet::Fleet;
use super::rig::{MODEL, Rig};

/// A claim is wrong if the engine held the block at no time of this window before the answer, milliseconds. A block is missed
/// if the engine has held it for longer than this.
pub const WINDOW_MS: u64 = 1_000;
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
    /// Claims in answers of either kind beyond what the engine held within the last second.
    pub false_positives: u64,
    /// Answers (coverage 1) that missed blocks that an engine had held for a second.
    pub missed: u64,
    latency: Histogram<u64>,
}

struct Asker {
    client: Client,
    clock: Clock,
    engines: Vec<(String, Arc<Mutex<ChurnEngine>>)>,
    random: StdRng,
    counts: Arc<Mutex<SampleCounts>>,
}

// === impl Sampler ===

impl Sampler {
    /// Starts asking the rig's index about the fleet's chains.
    pub fn start(rig: &Rig, fleet: &Fleet, seed: u64) -> Result<Self, EndpointError> {
        let counts = Arc::new(Mutex::new(SampleCounts::default()));
        let engines = fleet.engines().iter();
        let asker = Asker {
            client: rig.client(DEADLINE)?,
            clock: rig.clock(),
            engines: engines.map(|engine| (engine.name().to_owned(), Arc::clone(engine.model()))).collect(),
            random: StdRng::seed_from_u64(seed),
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
            let at = self.random.random_range(0..self.engines.len());
            let chain = self.engines[at].1.lock().some_chain(&mut self.random);
            let Some(chain) = chain else {
                sleep(PAUSE).await;
                continue;
            };
            let (asked_ms, asked) = (self.clock.now_ms(), Instant::now());
            match self.client.score(question(&chain)).await {
                Ok(answer) => self.judge(&chain, &answer, asked_ms, asked.elapsed()),
                Err(_) => {
                    self.counts.lock().errors += 1;
                    sleep(PAUSE).await;
                }
            }
        }
    }

    fn judge(&self, chain: &[u64], answer: &grpc::ScoreResponse, asked_ms: u64, took: Duration) {
        let since_ms = asked_ms.saturating_sub(WINDOW_MS);
        let (mut wrong, mut misses) = (0, false);
        for (name, model) in &self.engines {
            let row = answer.instances.iter().find(|row| row.instance == *name);
            let claimed = row.map_or(0, |row| row.matched_blocks as usize);
            let model = model.lock();
            let (most, least) =
                (model.ledger().depth_since(chain, since_ms), model.ledger().depth_before(chain, since_ms));
            drop(model);
            misses |= claimed < least;
            if claimed > most {
                wrong += 1;
                if self.counts.lock().false_positives < MAX_LOGGED {
                    tracing::warn!(
                        instance = name,
                        claimed,
                        most,
                        coverage = answer.coverage,
                        "a false positive"
                    );
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

fn question(chain: &[u64]) -> grpc::ScoreRequest {
    let prompt = grpc::Prompt {
        model: MODEL.to_owned(),
        block_size: BLOCK_TOKENS,
        input: Some(grpc::prompt::Input::BlockKeys(grpc::BlockKeys { keys: chain.to_vec() })),
        ..Default::default()
    };
    grpc::ScoreRequest { prompt: Some(prompt), ..Default::default() }
}
