//! Routing decisions with the index killed and started again in the middle: how many are blind, how many wrong?
//!
//! The experiment is the one that SGLang published for its cache-aware router: 1,958 decisions, the index restarted in
//! the middle; 337 were blind with an index in memory, 12 with one backed by Valkey. Here engines are simulated from a
//! workload of conversations ([`crate::workload`]), decisions come one after the other, and each is judged by what every
//! engine holds:
//!
//! * **blind**: no usable answer came within the router's patience, or the answer misses a block of the prompt that an
//!   engine has held for at least [`SETTLE_MS`];
//! * **wrong**: the answer promises a block that the engine has not held within the last [`SETTLE_MS`].
//!
//! The router waits up to [`RecoveryConfig::patience`] for an answer and asks again meanwhile: an answer that a restarted index does not
//! stand by yet (coverage 0), or none, is not used.

use std::collections::HashMap;
use std::time::Duration;

use kvatlas_client::Client;
use kvatlas_proto::{BlockKey, KeyHasher, grpc};
use kvatlas_shim::shim::Shim;
use serde::Serialize;
use tokio::time::{Instant, sleep, timeout_at};

use super::clock::Clock;
use super::fleet::{batch, shim_config};
use super::ledger::Ledger;
use super::rig::{Blocks, LOOK_INTERVAL, MODEL, Rig};
use super::site::Site;
use super::{Case, CaseReport, Details, RecoveryConfig, RecoveryError, rounded};
use crate::engine_sim::{HashForm, SimConfig, SimEngine};
use crate::publisher::{EnginePublisher, PublisherConfig};
use crate::wire::{EngineHash, Event};
use crate::workload::{Request, Workload, WorkloadConfig};

/// What is younger than this may still be on its way, milliseconds.
pub const SETTLE_MS: u64 = 250;
/// Pause before a question is asked again.
const RETRY_PAUSE: Duration = Duration::from_millis(10);
/// Time between two decisions.
const ARRIVAL_GAP: Duration = Duration::from_millis(10);
/// Time between two checkpoints.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(5);
/// Longest wait for anything.
const LONGEST: Duration = Duration::from_secs(60);
/// Engines to choose from.
const ENGINES: usize = 4;
/// Tokens per block.
const BLOCK_TOKENS: u32 = 16;
/// Blocks of each engine: a few hundred prompts.
const ENGINE_BLOCKS: u32 = 16_384;
/// Worth of one block of work in excess of the least busy engine, in blocks to compute.
const LOAD_WEIGHT: f64 = 0.05;
/// Blind decisions that are allowed.
const MAX_BLIND: usize = 2;

/// What came of the decisions.
#[derive(Clone, Debug, Serialize)]
pub struct RoutingDetails {
    /// Decisions made.
    pub decisions: usize,
    /// Those without a usable answer in time.
    pub unanswered: usize,
    /// Those that missed something or had no answer.
    pub blind: usize,
    /// Those with a promise that did not hold.
    pub wrong: usize,
    /// Those that needed more than one question.
    pub retried: usize,
    /// Prompts of which some engine held a block when they were routed.
    pub with_prefix: usize,
    /// Share of prompt tokens that were cached where they were served.
    pub cached_share: f64,
    /// How long the router waits for an answer, milliseconds.
    pub patience_ms: u64,
    /// Longest decision, milliseconds.
    pub worst_ms: f64,
    /// Median decision, milliseconds.
    pub median_ms: f64,
    /// Questions of the longest decision.
    pub worst_tries: u32,
    /// From the killed process's successor's start until it called itself ready, seconds.
    pub seconds_to_ready: Option<f64>,
    /// Blocks that the engines held at the end.
    pub blocks: u64,
    /// After the traffic stopped, every block was compared with the engines' own; a difference would be an error.
    pub equal_at_the_end: bool,
}

/// One engine that requests are routed to.
struct Engine {
    name: String,
    sim: SimEngine,
    publisher: EnginePublisher,
    shim: Shim,
    ledger: Ledger,
    /// Keys by the engine's names, for events name only those.
    keys: HashMap<EngineHash, BlockKey>,
    hasher: KeyHasher,
    /// Blocks computed so far.
    work: u64,
}

/// One decision's question and what came of it.
struct Decision {
    rows: Option<Vec<grpc::InstanceScore>>,
    tries: u32,
    took: Duration,
    /// When the question that was answered was asked.
    asked_ms: u64,
}

#[derive(Default)]
struct Tally {
    unanswered: usize,
    blind: usize,
    wrong: usize,
    retried: usize,
    with_prefix: usize,
    prompt_tokens: u64,
    cached_tokens: u64,
    took_ms: Vec<f64>,
    worst: (Duration, u32),
}

/// Runs the case, with a checkpoint or without.
pub(super) async fn run(config: &RecoveryConfig, warm: bool) -> Result<CaseReport, RecoveryError> {
    let mut rig = Rig::start(config.rig(warm.then_some(CHECKPOINT_INTERVAL))).await?;
    rig.start_index()?;
    rig.wait_ready().await?;
    let mut engines = start_engines(&rig.site()).await?;
    let client = rig.client(config.patience)?;
    let (clock, mut tally) = (rig.clock(), Tally::default());
    let (mut counts, mut started, mut recovery) = (rig.bus().counts(), Instant::now(), None);
    for (number, request) in requests(config)?.into_iter().enumerate() {
        if number == config.decisions / 2 {
            counts = rig.bus().counts();
            rig.kill_index().await?;
            started = rig.start_index()?;
            let watcher = rig.watcher().clone();
            recovery = Some(tokio::spawn(async move { watcher.recovery(ENGINES, LONGEST).await }));
        }
        let decision = ask(&client, clock, config.patience, &request).await;
        tally.add(&decision, &engines, &request);
        let chosen = choose(&engines, decision.rows.as_deref(), &request);
        serve(&mut engines[chosen], &request, clock, &mut tally).await?;
        sleep(ARRIVAL_GAP).await;
    }
    let (ready, exact) = match recovery {
        // A panic in there would be a bug of the rig: then nothing was measured.
        Some(recovery) => recovery.await.unwrap_or_default(),
        None => (None, None),
    };
    let seconds = |at: Option<Instant>| at.map(|at| rounded((at - started).as_secs_f64()));
    let needed = rig.bus().counts().since(&counts);
    let blocks = settle(&mut rig, &engines).await?;
    for engine in engines {
        engine.shim.shutdown().await;
        engine.publisher.close().await;
    }
    tally.took_ms.sort_by(f64::total_cmp);
    Ok(CaseReport {
        case: if warm { Case::RoutingRestart } else { Case::RoutingRestartCold }.name(),
        ok: tally.blind <= MAX_BLIND && tally.wrong == 0,
        seconds_to_exact: seconds(exact),
        false_positives: tally.wrong as u64,
        bytes: needed.answer_bytes,
        details: Details::Routing(RoutingDetails {
            decisions: tally.took_ms.len(),
            unanswered: tally.unanswered,
            blind: tally.blind,
            wrong: tally.wrong,
            retried: tally.retried,
            with_prefix: tally.with_prefix,
            cached_share: rounded(tally.cached_tokens as f64 / tally.prompt_tokens.max(1) as f64),
            patience_ms: config.patience.as_millis() as u64,
            worst_ms: rounded(tally.worst.0.as_secs_f64() * 1e3),
            median_ms: rounded(tally.took_ms.get(tally.took_ms.len() / 2).copied().unwrap_or_default()),
            worst_tries: tally.worst.1,
            seconds_to_ready: seconds(ready),
            blocks,
            equal_at_the_end: true,
        }),
    })
}

async fn start_engines(site: &Site) -> Result<Vec<Engine>, RecoveryError> {
    let mut engines = Vec::new();
    for number in 0..ENGINES {
        let config = SimConfig {
            blocks: ENGINE_BLOCKS,
            block_size: BLOCK_TOKENS,
            max_step_tokens: 2_048,
            max_running: 8,
            hashes: HashForm::Int,
        };
        let name = format!("10.0.1.{number}:8000");
        let publisher = EnginePublisher::bind(PublisherConfig::default()).await?;
        let shim = Shim::start(&shim_config(site, &name, publisher.endpoints()), &site.bus)?;
        publisher.wait_for_subscribers(1, LONGEST).await?;
        engines.push(Engine {
            name,
            sim: SimEngine::new(config, 0)?,
            publisher,
            shim,
            ledger: Ledger::default(),
            keys: HashMap::new(),
            hasher: KeyHasher::default(),
            work: 0,
        });
    }
    Ok(engines)
}

fn requests(config: &RecoveryConfig) -> Result<Vec<Request>, RecoveryError> {
    let workload = WorkloadConfig {
        // Three turns at least: more conversations than are needed.
        conversations: config.decisions as u32,
        system_prompts: 24,
        ..WorkloadConfig::default()
    };
    Ok(Workload::new(workload, config.seed)?.take(config.decisions).collect())
}

/// Asks until an answer that the index stands by comes, or patience ends.
async fn ask(client: &Client, clock: Clock, patience: Duration, request: &Request) -> Decision {
    let prompt = grpc::Prompt {
        model: MODEL.to_owned(),
        input: Some(grpc::prompt::Input::TokenIds(grpc::TokenIds { ids: request.tokens.clone() })),
        ..grpc::Prompt::default()
    };
    let question = grpc::ScoreRequest { prompt: Some(prompt), ..grpc::ScoreRequest::default() };
    let (began, mut tries) = (Instant::now(), 0);
    let deadline = began + patience;
    loop {
        tries += 1;
        let asked_ms = clock.now_ms();
        let answer = timeout_at(deadline, client.score(question.clone())).await;
        let usable = match answer {
            Ok(Ok(answer)) if answer.coverage >= 1.0 => Some(answer.instances),
            _ => None,
        };
        let took = began.elapsed();
        if usable.is_some() || Instant::now() + RETRY_PAUSE >= deadline {
            return Decision { rows: usable, tries, took, asked_ms };
        }
        sleep(RETRY_PAUSE).await;
    }
}

/// The engine with the least to do: blocks it would have to compute, and its load. Blind, only the load counts.
fn choose(engines: &[Engine], rows: Option<&[grpc::InstanceScore]>, request: &Request) -> usize {
    let blocks = f64::from(request.tokens.len() as u32 / BLOCK_TOKENS);
    let idle = engines.iter().map(|engine| engine.work).min().unwrap_or(0);
    let cost = |engine: &Engine| {
        let row = rows.into_iter().flatten().find(|row| row.instance == engine.name);
        let cached = row.map_or(0.0, |row| f64::from(row.matched_blocks));
        blocks - cached + LOAD_WEIGHT * (engine.work - idle) as f64
    };
    let best = (0..engines.len()).min_by(|&a, &b| cost(&engines[a]).total_cmp(&cost(&engines[b])));
    best.unwrap_or(0)
}

async fn serve(
    engine: &mut Engine,
    request: &Request,
    clock: Clock,
    tally: &mut Tally,
) -> Result<(), RecoveryError> {
    let submitted = engine.sim.submit(&request.tokens, request.output_tokens)?;
    tally.prompt_tokens += u64::from(submitted.report.prompt_tokens);
    tally.cached_tokens += u64::from(submitted.report.cached_tokens);
    engine.work += u64::from(submitted.report.blocks_prefilled);
    for events in submitted.batches {
        engine.note(&events, clock.now_ms());
        engine.publisher.publish(&batch(events)).await?;
    }
    Ok(())
}

/// Waits until the index has exactly the engines' blocks, and returns how many that are.
async fn settle(rig: &mut Rig, engines: &[Engine]) -> Result<u64, RecoveryError> {
    let truth: Blocks = engines
        .iter()
        .map(|engine| (engine.name.clone(), engine.ledger.held_keys().into_iter().collect()))
        .collect();
    let deadline = Instant::now() + LONGEST;
    loop {
        rig.wait_verified(ENGINES, LONGEST).await?;
        match rig.compare(&truth).await {
            Ok(()) => return Ok(truth.values().map(|blocks| blocks.len() as u64).sum()),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => sleep(LOOK_INTERVAL).await,
        }
    }
}

// === impl Engine ===

impl Engine {
    /// Keeps the books of what the events say. A second, simple reading of them: no shim is involved.
    fn note(&mut self, events: &[Event], now_ms: u64) {
        for event in events {
            match event {
                Event::Stored(stored) => {
                    let parent = stored.parent_block_hash.as_ref().and_then(|hash| self.keys.get(hash));
                    let mut key = parent.copied().unwrap_or(self.hasher.root());
                    let blocks = stored.token_ids.chunks_exact(BLOCK_TOKENS as usize);
                    for (hash, tokens) in stored.block_hashes.iter().zip(blocks) {
                        key = self.hasher.extend(key, self.hasher.local(tokens, &[]));
                        self.keys.insert(hash.clone(), key);
                        self.ledger.store(key.0, now_ms);
                    }
                }
                Event::Removed(removed) => {
                    let keys = removed.block_hashes.iter().filter_map(|hash| self.keys.get(hash));
                    keys.for_each(|key| self.ledger.remove(key.0, now_ms));
                }
                Event::Cleared => self.ledger.clear(now_ms),
            }
        }
    }
}

// === impl Tally ===

impl Tally {
    fn add(&mut self, decision: &Decision, engines: &[Engine], request: &Request) {
        self.took_ms.push(decision.took.as_secs_f64() * 1e3);
        if decision.took > self.worst.0 {
            self.worst = (decision.took, decision.tries);
        }
        let chain: Vec<u64> =
            KeyHasher::default().chain(&request.tokens, BLOCK_TOKENS).into_iter().map(|key| key.0).collect();
        let since_ms = decision.asked_ms.saturating_sub(SETTLE_MS);
        let rows = decision.rows.as_deref().unwrap_or_default();
        let (mut misses, mut wrong, mut any) = (false, false, false);
        for engine in engines {
            let row = rows.iter().find(|row| row.instance == engine.name);
            let promised = row.map_or(0, |row| row.matched_blocks as usize);
            let (most, least) =
                (engine.ledger.depth_since(&chain, since_ms), engine.ledger.depth_before(&chain, since_ms));
            any |= least > 0;
            misses |= promised < least;
            wrong |= promised > most;
        }
        let unanswered = decision.rows.is_none();
        self.unanswered += usize::from(unanswered);
        self.blind += usize::from(unanswered || misses);
        self.wrong += usize::from(wrong);
        self.retried += usize::from(decision.tries > 1);
        self.with_prefix += usize::from(any);
    }
}
