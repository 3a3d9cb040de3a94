//! Asks a cluster as gateways do, at a fixed rate, and judges every answer by what the engines held.
//!
//! The rule of a gateway, which has a list of servers and no other load balancer:
//!
//! * questions go to the servers that are well in turn;
//! * a server is not well from a connection error or an exceeded [`TRY`] on, or from a health check (`/readyz`, every
//!   [`HEALTH_INTERVAL`]) without an answer of 200 within [`HEALTH_TIMEOUT`]; it is well again when a health check says so;
//! * a question that failed goes to the next server until its [`DEADLINE`]. That is one question, however many tries it took.
//!
//! Judged: a claim is wrong if the engine held the block at no time of the window before the answering try was asked, in a row
//! that the server did not mark as doubtful (degraded, gone, or still being found out); what it marked is counted apart. A block is
//! missed if the engine held it for longer than the window and an answer of coverage 1 has neither it nor a row that is marked. Nothing can be known of
//! an engine that has no shim: it is [`excused`](Gateway::excuse) until it is verified again.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use hdrhistogram::Histogram;
use kvatlas_client::{Client, ClientConfig, EndpointError};
use kvatlas_proto::grpc;
use parking_lot::{Mutex, RwLock};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde::Serialize;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, sleep, timeout, timeout_at};

use super::rig::Server;
use crate::recovery::clock::Clock;
use crate::recovery::judge::{Finding, Judge, question};
use crate::recovery::processes::http_get;
use crate::recovery::sampler::MAX_WINDOW;

/// Time that a question may take in all.
pub const DEADLINE: Duration = Duration::from_secs(1);
/// Time of one try: more than a server waits for another one.
pub const TRY: Duration = Duration::from_millis(400);
/// Time between two health checks of a server.
pub const HEALTH_INTERVAL: Duration = Duration::from_millis(250);
/// Longest wait for one.
pub const HEALTH_TIMEOUT: Duration = Duration::from_millis(500);
/// Pause before it is looked again for a server that is well, when none is.
const NOBODY_PAUSE: Duration = Duration::from_millis(20);
/// Questions at a time. At the bound a question counts as one without an answer: the cluster is too slow.
const MAX_OPEN: usize = 512;
/// Longest answer that the histogram tells apart, microseconds.
const MAX_LATENCY_US: u64 = 10_000_000;
/// Findings that are logged; the others are only counted.
const MAX_LOGGED: u64 = 10;

/// Asks until it is dropped.
pub struct Gateway {
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

struct Shared {
    backends: RwLock<Vec<Arc<Backend>>>,
    turn: AtomicU64,
    judge: Judge,
    clock: Clock,
    window_ms: AtomicU64,
    excused: Mutex<BTreeSet<usize>>,
    counts: Mutex<Counts>,
}

struct Backend {
    client: Client,
    http: SocketAddr,
    is_well: AtomicBool,
}

/// What came of the questions.
#[derive(Clone, Debug)]
pub struct Counts {
    /// Questions asked.
    pub questions: u64,
    /// Answers of coverage 1.
    pub full: u64,
    /// Answers of less, which say so.
    pub partial: u64,
    /// Questions without an answer in time.
    pub unanswered: u64,
    /// Answers that took more than one try.
    pub retried: u64,
    /// Wrong claims.
    pub false_positives: u64,
    /// Wrong claims about sources that the answer marked as doubtful.
    pub doubtful: u64,
    /// Answers that missed something.
    pub missed: u64,
    /// Findings about engines of which nothing could be known.
    pub excused: u64,
    latency: Histogram<u64>,
}

/// The same for a report.
#[derive(Clone, Debug, Serialize)]
pub struct Tally {
    /// Questions asked.
    pub questions: u64,
    /// Answers of coverage 1.
    pub answers: u64,
    /// Answers of less coverage, which say so.
    pub partial_answers: u64,
    /// Questions without an answer in time.
    pub unanswered: u64,
    /// Share of questions that were answered, 0 to 1.
    pub availability: f64,
    /// Answers that took more than one try.
    pub retried: u64,
    /// Claims beyond what an engine held within the window.
    pub false_positives: u64,
    /// The same in rows that were marked as doubtful.
    pub doubtful: u64,
    /// Answers of coverage 1 that missed what an engine had held for longer than the window.
    pub missed: u64,
    /// Findings about engines without a shim: not held against anybody.
    pub excused: u64,
    /// Median time of an answer, microseconds.
    pub p50_us: u64,
    /// 99th percentile.
    pub p99_us: u64,
    /// The longest.
    pub max_us: u64,
}

// === impl Gateway ===

impl Gateway {
    /// Starts asking about the fleet's chains, `rate` questions a second.
    pub fn start<'s>(
        servers: impl IntoIterator<Item = &'s Server>,
        judge: Judge,
        clock: Clock,
        window: Duration,
        rate: f64,
        seed: u64,
    ) -> Result<Self, EndpointError> {
        let shared = Arc::new(Shared {
            backends: RwLock::default(),
            turn: AtomicU64::new(0),
            judge,
            clock,
            window_ms: AtomicU64::new(window.min(MAX_WINDOW).as_millis() as u64),
            excused: Mutex::default(),
            counts: Mutex::default(),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(ask_all(Arc::clone(&shared), rate, StdRng::seed_from_u64(seed)));
        tasks.spawn(check_health(Arc::clone(&shared)));
        let gateway = Self { shared, _tasks: tasks };
        gateway.set_servers(servers)?;
        Ok(gateway)
    }

    /// From now on these servers are asked; those that it did not know are asked when they are well.
    pub fn set_servers<'s>(
        &self,
        servers: impl IntoIterator<Item = &'s Server>,
    ) -> Result<(), EndpointError> {
        let mut backends = Vec::new();
        let known = self.shared.backends.read().clone();
        for server in servers {
            backends.push(match known.iter().find(|backend| backend.http == server.http()) {
                Some(backend) => Arc::clone(backend),
                None => Arc::new(Backend::new(server)?),
            });
        }
        *self.shared.backends.write() = backends;
        Ok(())
    }

    /// The window by which answers are judged from now on, at most [`MAX_WINDOW`].
    pub fn set_window(&self, window: Duration) {
        self.shared.window_ms.store(window.min(MAX_WINDOW).as_millis() as u64, Ordering::Relaxed);
    }

    /// Nothing can be known of this engine until it is [`Self::hold_all`].
    pub fn excuse(&self, engine: usize) {
        self.shared.excused.lock().insert(engine);
    }

    /// From now on every engine counts.
    pub fn hold_all(&self) {
        self.shared.excused.lock().clear();
    }

    /// What came of the questions since the last call.
    pub fn take(&self) -> Counts {
        std::mem::take(&mut self.shared.counts.lock())
    }
}

// === impl Backend ===

impl Backend {
    fn new(server: &Server) -> Result<Self, EndpointError> {
        let config = ClientConfig { deadline: TRY, ..ClientConfig::new(server.grpc().to_string()) };
        let client = Client::connect(config)?;
        Ok(Self { client, http: server.http(), is_well: AtomicBool::new(false) })
    }
}

async fn check_health(shared: Arc<Shared>) {
    loop {
        let backends = shared.backends.read().clone();
        let checks = backends.iter().map(|backend| async {
            let answer = timeout(HEALTH_TIMEOUT, http_get(backend.http, "/readyz")).await;
            backend.is_well.store(matches!(answer, Ok(Some((200, _)))), Ordering::Relaxed);
        });
        futures_util::future::join_all(checks).await;
        sleep(HEALTH_INTERVAL).await;
    }
}

async fn ask_all(shared: Arc<Shared>, rate: f64, mut random: StdRng) {
    let mut ticks = tokio::time::interval(Duration::from_secs_f64(1.0 / rate.max(0.001)));
    // A machine that was busy elsewhere does not ask for it all at once afterwards.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let open = Arc::new(Semaphore::new(MAX_OPEN));
    let mut asking = JoinSet::new();
    loop {
        ticks.tick().await;
        while asking.try_join_next().is_some() {}
        let Some(chain) = shared.judge.some_chain(&mut random) else { continue };
        let Ok(permit) = Arc::clone(&open).try_acquire_owned() else {
            let mut counts = shared.counts.lock();
            (counts.questions, counts.unanswered) = (counts.questions + 1, counts.unanswered + 1);
            continue;
        };
        let shared = Arc::clone(&shared);
        asking.spawn(async move {
            shared.ask(&chain).await;
            drop(permit);
        });
    }
}

// === impl Shared ===

impl Shared {
    async fn ask(&self, chain: &[u64]) {
        let (asked, mut tries) = (Instant::now(), 0);
        let deadline = asked + DEADLINE;
        let answered = loop {
            let Some(backend) = self.next_well() else {
                if Instant::now() + NOBODY_PAUSE >= deadline {
                    break None;
                }
                sleep(NOBODY_PAUSE).await;
                continue;
            };
            tries += 1;
            let asked_ms = self.clock.now_ms();
            match timeout_at(deadline, backend.client.score(question(chain))).await {
                Ok(Ok(answer)) => break Some((answer, asked_ms)),
                Ok(Err(_)) => backend.is_well.store(false, Ordering::Relaxed),
                Err(_) => break None,
            }
        };
        let findings = answered.iter().map(|(answer, asked_ms)| self.findings(chain, answer, *asked_ms));
        let findings: Vec<Finding> = findings.flatten().collect();
        let mut counts = self.counts.lock();
        counts.questions += 1;
        let Some((answer, _)) = answered else {
            counts.unanswered += 1;
            return;
        };
        let is_full = answer.coverage >= 1.0;
        if is_full {
            counts.full += 1;
        } else {
            counts.partial += 1;
        }
        counts.retried += u64::from(tries > 1);
        counts.latency.saturating_record(asked.elapsed().as_micros() as u64);
        self.count(&mut counts, &findings, is_full);
    }

    fn findings(&self, chain: &[u64], answer: &grpc::ScoreResponse, asked_ms: u64) -> Vec<Finding> {
        let since_ms = asked_ms.saturating_sub(self.window_ms.load(Ordering::Relaxed));
        self.judge.findings(chain, answer, |_| since_ms)
    }

    fn count(&self, counts: &mut Counts, findings: &[Finding], is_full: bool) {
        let excused = self.excused.lock();
        let mut misses = false;
        for finding in findings {
            if finding.is_missed() && !is_full {
                continue;
            }
            if excused.contains(&finding.engine) {
                counts.excused += 1;
                continue;
            }
            let is_marked = match finding.state {
                Some(grpc::SourceState::Verified | grpc::SourceState::Live) | None => false,
                Some(_) => true,
            };
            if is_marked {
                counts.doubtful += u64::from(finding.is_wrong());
                continue;
            }
            if counts.false_positives + u64::from(misses) + counts.missed < MAX_LOGGED {
                tracing::warn!(?finding, is_full, "an answer is not what an engine held");
            }
            misses |= finding.is_missed();
            counts.false_positives += u64::from(finding.is_wrong());
        }
        counts.missed += u64::from(misses);
    }

    /// Whose turn it is among those that are well.
    fn next_well(&self) -> Option<Arc<Backend>> {
        let backends = self.backends.read();
        let well: Vec<_> =
            backends.iter().filter(|backend| backend.is_well.load(Ordering::Relaxed)).collect();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) as usize;
        (!well.is_empty()).then(|| Arc::clone(well[turn % well.len()]))
    }
}

// === impl Counts ===

impl Default for Counts {
    fn default() -> Self {
        Self {
            questions: 0,
            full: 0,
            partial: 0,
            unanswered: 0,
            retried: 0,
            false_positives: 0,
            doubtful: 0,
            missed: 0,
            excused: 0,
            latency: Histogram::new_with_max(MAX_LATENCY_US, 3).expect("bounds are constants"),
        }
    }
}

impl Counts {
    /// As a report says it.
    pub fn tally(&self) -> Tally {
        let answered = self.full + self.partial;
        Tally {
            questions: self.questions,
            answers: self.full,
            partial_answers: self.partial,
            unanswered: self.unanswered,
            availability: answered as f64 / self.questions.max(1) as f64,
            retried: self.retried,
            false_positives: self.false_positives,
            doubtful: self.doubtful,
            missed: self.missed,
            excused: self.excused,
            p50_us: self.latency.value_at_quantile(0.5),
            p99_us: self.latency.value_at_quantile(0.99),
            max_us: self.latency.max(),
        }
    }
}
