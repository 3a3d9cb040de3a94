//! Asks at a rate that does not depend on the answers, and takes the time from when a question was due.
//!
//! A thread of its own waits for each question's time, because timers of the runtime are a millisecond coarse, which is more than
//! an answer takes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use kvatlas_client::Client;
use kvatlas_proto::grpc;
use parking_lot::Mutex;

/// Questions at a time. At the bound a question is not asked and counts as failed: the rate is not sustained.
const MAX_OPEN: usize = 2_048;
/// Longest wait for answers after the last question.
const DRAIN: Duration = Duration::from_secs(3);
/// Time between two looks meanwhile.
const DRAIN_POLL: Duration = Duration::from_millis(5);
/// Longest time that the histogram tells apart, microseconds.
const MAX_LATENCY_US: u64 = 60_000_000;

/// What came of some time at one rate.
#[derive(Clone, Debug)]
pub struct Run {
    /// Questions that were due.
    pub due: u64,
    /// Those that were answered with coverage 1.
    pub answered: u64,
    latency: Histogram<u64>,
}

struct Running {
    open: AtomicUsize,
    answered: AtomicU64,
    latency: Mutex<Histogram<u64>>,
}

// === impl Run ===

impl Run {
    /// Time within which this share of the answers came, microseconds.
    pub fn latency_us(&self, share: f64) -> u64 {
        self.latency.value_at_quantile(share)
    }
}

/// Asks `rate` questions a second for `time`, of all clients in turn.
pub async fn run(
    clients: &[Client],
    questions: &Arc<[grpc::ScoreRequest]>,
    rate: f64,
    time: Duration,
) -> Run {
    let latency = Histogram::new_with_max(MAX_LATENCY_US, 3).expect("bounds are constants");
    let running = Arc::new(Running {
        open: AtomicUsize::new(0),
        answered: AtomicU64::new(0),
        latency: Mutex::new(latency),
    });
    let due = (rate * time.as_secs_f64()) as u64;
    let began = Instant::now();
    let (asked, runtime) = (Arc::clone(&running), tokio::runtime::Handle::current());
    let (clients, questions) = (clients.to_vec(), Arc::clone(questions));
    let asking = tokio::task::spawn_blocking(move || {
        for number in 0..due {
            let at = began + Duration::from_secs_f64(number as f64 / rate);
            if let Some(wait) = at.checked_duration_since(Instant::now()) {
                thread::sleep(wait);
            }
            if asked.open.fetch_add(1, Ordering::Relaxed) >= MAX_OPEN {
                asked.open.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let client = clients[number as usize % clients.len()].clone();
            let question = questions[number as usize % questions.len()].clone();
            let asked = Arc::clone(&asked);
            runtime.spawn(async move {
                let answer = client.score(question).await;
                if answer.is_ok_and(|answer| answer.coverage >= 1.0) {
                    asked.answered.fetch_add(1, Ordering::Relaxed);
                    asked.latency.lock().saturating_record(at.elapsed().as_micros() as u64);
                }
                asked.open.fetch_sub(1, Ordering::Relaxed);
            });
        }
    });
    // The task does not panic and is not aborted.
    let _ = asking.await;
    let last = Instant::now();
    while running.open.load(Ordering::Relaxed) > 0 && last.elapsed() < DRAIN {
        tokio::time::sleep(DRAIN_POLL).await;
    }
    let latency = running.latency.lock().clone();
    let answered = running.answered.load(Ordering::Relaxed);
    Run { due, answered, latency }
}
