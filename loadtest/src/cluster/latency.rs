//! What it costs a query that its prompt is divided among servers: agents' questions to a cluster and to one server that has
//! everything, both on this machine.
//!
//! Everything shares the machine's cores: all servers, the broker and who asks. So a cluster on one machine cannot answer more than
//! one server does; what is compared is how long an answer takes at a rate that both sustain.

use std::sync::Arc;
use std::time::Duration;

use kvatlas_client::{Client, ClientConfig};
use kvatlas_proto::grpc;
use serde::Serialize;

use super::conversations::{Conversations, Shape};
use super::openloop::{Run, run as ask};
use super::rig::RigConfig;
use super::scrape::Scrape;
use super::stage::Stage;
use super::{Case, CaseReport, ClusterConfig, ClusterError, Details, rounded};

/// 99th percentile of the cluster over that of one server, at most.
const GOAL: f64 = 1.5;
/// Rate at which the ramp begins, questions a second.
const FIRST_RATE: f64 = 200.0;
/// What a step of the ramp asks more.
const STEP: f64 = 1.25;
/// Steps of the ramp at most: more than a million questions a second.
const MAX_STEPS: usize = 40;
/// A rate is sustained if this share of the questions is answered, ...
const SUSTAINED_SHARE: f64 = 0.999;
/// ... 99 % of them within this time, so that no queue grows.
const SUSTAINED_P99: Duration = Duration::from_millis(50);
/// Connections to each system: clusters and one server are asked over equally many.
const CONNECTIONS: usize = 4;
/// Deadline of a question: far above what is still sustained.
const DEADLINE: Duration = Duration::from_secs(2);
/// Rounds of each measurement, taken in turns, so that what the machine does meanwhile hits all alike. Percentiles are the medians
/// over the rounds: one round that something else disturbed shall not decide.
const ROUNDS: usize = 7;

/// What came of the comparison.
#[derive(Clone, Debug, Serialize)]
pub struct LatencyDetails {
    /// Cores that everything shares.
    pub cores: usize,
    /// Servers of the cluster.
    pub servers: u32,
    /// Blocks held.
    pub blocks: usize,
    /// Mean length of a prompt that is asked about, blocks.
    pub mean_blocks: f64,
    /// Share of these that is held.
    pub held_share: f64,
    /// 99th percentile of the cluster over that of one server, both at half of what the cluster sustains.
    pub p99_ratio: f64,
    /// The same with the server instead of the cluster: how far two equal measurements differ.
    pub p99_ratio_control: f64,
    /// The cluster.
    pub cluster: SystemFigures,
    /// One server with a key space in one piece.
    pub one_server: SystemFigures,
    /// Other servers that a server asked about one question, mean.
    pub fan_out: f64,
    /// Bytes of questions between servers, for each query.
    pub question_bytes: f64,
    /// Bytes of answers between servers, for each query.
    pub answer_bytes: f64,
    /// Stretches that were looked up, for each query.
    pub pieces: f64,
    /// Questions that were asked a second time, for each query.
    pub hedges: f64,
}

/// One of the two systems.
#[derive(Clone, Debug, Serialize)]
pub struct SystemFigures {
    /// Largest rate of the ramp at which nothing piled up, questions a second.
    pub sustained_per_s: f64,
    /// At half of what the cluster sustains.
    pub at_half_of_the_cluster: RateFigures,
    /// At half of what it sustains itself.
    pub at_half_of_its_own: RateFigures,
}

/// Some time at one rate.
#[derive(Clone, Debug, Serialize)]
pub struct RateFigures {
    /// Questions a second.
    pub rate_per_s: f64,
    /// Questions that were answered fully.
    pub answered: u64,
    /// Questions that were not.
    pub failed: u64,
    /// Median time from when the question was due, microseconds.
    pub p50_us: u64,
    /// 99th percentile.
    pub p99_us: u64,
    /// The same of each round.
    pub p99_us_of_rounds: Vec<u64>,
}

/// The rounds of one measurement.
#[derive(Default)]
struct Rounds(Vec<Run>);

struct System {
    stage: Stage,
    clients: Vec<Client>,
    questions: Arc<[grpc::ScoreRequest]>,
}

// === impl System ===

impl System {
    async fn start(config: &RigConfig, conversations: &Conversations) -> Result<Self, ClusterError> {
        let stage = Stage::start(config, conversations).await?;
        let servers = stage.rig.servers();
        let clients: Result<Vec<Client>, _> = (0..CONNECTIONS.max(servers.len()))
            .map(|n| servers[n % servers.len()].grpc().to_string())
            .map(|address| Client::connect(ClientConfig { deadline: DEADLINE, ..ClientConfig::new(address) }))
            .collect();
        let questions = conversations.all().iter().map(super::conversations::Conversation::suffix).collect();
        Ok(Self { stage, clients: clients?, questions })
    }

    async fn ask(&self, rate: f64, time: Duration) -> Run {
        ask(&self.clients, &self.questions, rate, time).await
    }

    /// The largest rate at which nothing piles up.
    async fn sustained(&self, step: Duration) -> f64 {
        // Connections are made, and tables are warm.
        self.ask(FIRST_RATE, step).await;
        let (mut rate, mut sustained) = (FIRST_RATE, 0.0);
        for _ in 0..MAX_STEPS {
            // A machine that others share stalls now and then: a rate is too high if it is twice in a row.
            if !self.sustains(rate, step).await && !self.sustains(rate, step).await {
                break;
            }
            (sustained, rate) = (rate, rate * STEP);
        }
        sustained
    }

    async fn sustains(&self, rate: f64, step: Duration) -> bool {
        let run = self.ask(rate, step).await;
        let is_answered = run.answered as f64 >= run.due as f64 * SUSTAINED_SHARE;
        is_answered && run.latency_us(0.99) <= SUSTAINED_P99.as_micros() as u64
    }

    /// One counter over all servers.
    fn sum(scrapes: &[Scrape], name: &str) -> f64 {
        scrapes.iter().map(|scrape| scrape.get(name)).sum()
    }
}

/// Runs the case.
pub(super) async fn run(config: &ClusterConfig) -> Result<CaseReport, ClusterError> {
    let conversations = Conversations::new(Shape::agentic(config.conversations, config.engines, config.seed));
    let many = RigConfig { brokers: 1, replicas: 1, ..config.rig() };
    let one = RigConfig { servers: 1, shards: 1, ..many.clone() };
    let cluster = System::start(&many, &conversations).await?;
    let single = System::start(&one, &conversations).await?;
    let sustained = (cluster.sustained(config.step).await, single.sustained(config.step).await);
    let half = sustained.0 / 2.0;
    let before = cluster.stage.scrapes().await;
    let (mut at_half, mut own): ([Rounds; 3], [Rounds; 2]) = Default::default();
    for _ in 0..ROUNDS {
        for (rounds, system) in at_half.iter_mut().zip([&cluster, &single, &single]) {
            rounds.0.push(system.ask(half, config.step).await);
        }
        own[0].0.push(cluster.ask(half, config.step).await);
        own[1].0.push(single.ask(sustained.1 / 2.0, config.step).await);
    }
    let after = cluster.stage.scrapes().await;
    let asked = at_half[0].due() + own[0].due();
    let each = |name: &str| {
        let more = System::sum(&after, name) - System::sum(&before, name);
        rounded(more / asked.max(1) as f64)
    };
    let p99 = |rounds: &Rounds| rounds.latency_us(0.99) as f64;
    let p99_ratio = rounded(p99(&at_half[0]) / p99(&at_half[1]).max(1.0));
    let figures = |sustained: f64, at_half: &Rounds, own: &Rounds| SystemFigures {
        sustained_per_s: rounded(sustained),
        at_half_of_the_cluster: at_half.figures(half),
        at_half_of_its_own: own.figures(sustained / 2.0),
    };
    let details = LatencyDetails {
        cores: std::thread::available_parallelism().map_or(0, Into::into),
        servers: config.servers,
        blocks: conversations.stored_blocks(),
        mean_blocks: rounded(conversations.mean_blocks()),
        held_share: rounded(conversations.held_share()),
        p99_ratio,
        p99_ratio_control: rounded(p99(&at_half[2]) / p99(&at_half[1]).max(1.0)),
        cluster: figures(sustained.0, &at_half[0], &own[0]),
        one_server: figures(sustained.1, &at_half[1], &own[1]),
        fan_out: each("kvatlas_cluster_questions_total"),
        question_bytes: each("kvatlas_cluster_question_bytes_total"),
        answer_bytes: each("kvatlas_cluster_answer_bytes_total"),
        pieces: each("kvatlas_cluster_answered_pieces_total"),
        hedges: each("kvatlas_cluster_hedges_total"),
    };
    cluster.stage.stop().await;
    single.stage.stop().await;
    let ok = sustained.0 > 0.0 && p99_ratio <= GOAL;
    Ok(CaseReport { case: Case::Latency.name(), ok, details: Details::Latency(details) })
}

// === impl Rounds ===

impl Rounds {
    fn due(&self) -> u64 {
        self.0.iter().map(|run| run.due).sum()
    }

    /// The median over the rounds of the time within which this share of the answers came, microseconds.
    fn latency_us(&self, share: f64) -> u64 {
        let mut times: Vec<u64> = self.0.iter().map(|run| run.latency_us(share)).collect();
        times.sort_unstable();
        times.get(times.len() / 2).copied().unwrap_or(0)
    }

    fn figures(&self, rate: f64) -> RateFigures {
        let answered = self.0.iter().map(|run| run.answered).sum();
        RateFigures {
            rate_per_s: rounded(rate),
            answered,
            failed: self.due() - answered,
            p50_us: self.latency_us(0.5),
            p99_us: self.latency_us(0.99),
            p99_us_of_rounds: self.0.iter().map(|run| run.latency_us(0.99)).collect(),
        }
    }
}
