//! One policy on one trace at one load: events in virtual time, microseconds, ties in the order in which they came up.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::rc::Rc;

use bytes::Bytes;
use kvatlas_planner::cost;
use kvatlas_proto::Tier;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::engine::{Engine, EngineLoad, EngineTotals, Job, Outcome, Staged, Wake};
use super::fleet::{Fleet, Shape};
use super::policy::Policy;
use super::router::{Ask, Pull, Route, RouteError, Router};
use super::trace::Trace;

/// How a trace is replayed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// Arrivals come so many times as fast as recorded.
    pub load: f64,
    /// Time between the starts of two conversations where none is recorded, on average, at load 1, seconds.
    pub conversation_gap_s: f64,
    /// How long after it happened an event is in the index, microseconds.
    pub lag_us: u64,
    /// Where all chance comes from.
    pub seed: u64,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Served {
    /// When it came.
    pub arrived_us: u64,
    /// When its first token came; 0: never.
    pub first_us: u64,
    /// When its last token came; 0: never.
    pub ended_us: u64,
    /// Tokens of the prompt that were not computed.
    pub cached_tokens: u32,
    /// Who prefilled.
    pub engine: u32,
    /// What the planner expected, ms.
    pub expected_ttft_ms: Option<f64>,
}

/// What moved, and what the engines did.
#[derive(Clone, Debug, Default)]
pub struct FleetTotals {
    /// Time in steps with prefill, by engine that prefills, microseconds.
    pub prefill_us: Vec<u64>,
    /// Bytes pulled from peers.
    pub pulled_bytes: f64,
    /// Bytes read from own host memory and disk.
    pub loaded_bytes: f64,
    /// Bytes handed off from prefill to decode.
    pub handed_bytes: f64,
    /// Pulls whose blocks were gone.
    pub stale_pulls: u64,
    /// Requests thrown out for lack of KV space, to begin anew.
    pub preemptions: u64,
    /// Requests that fit no engine.
    pub refused: u64,
}

/// The result of one run.
#[derive(Clone, Debug, Default)]
pub struct Outcomes {
    /// By request of the trace.
    pub served: Vec<Served>,
    /// All of the fleet.
    pub totals: FleetTotals,
}

enum Event {
    Arrives(u32),
    Engine(usize, u64),
    Frames(Vec<Bytes>),
    /// The decode engine has all blocks of this request.
    Handed(u32),
    TransferEnds {
        from: usize,
        to: usize,
    },
}

struct Queued {
    at_us: u64,
    number: u64,
    event: Event,
}

struct Run<'a> {
    trace: &'a Trace,
    fleet: &'a Fleet,
    pace: Pace,
    router: Router<'a>,
    engines: Vec<Engine>,
    /// When the ports of an engine are free, in and out.
    ports_us: Vec<[u64; 2]>,
    /// Transfers in flight, in and out.
    transfers: Vec<[u32; 2]>,
    queue: BinaryHeap<Reverse<Queued>>,
    numbers: u64,
    /// Requests that wait for this one, by request.
    followers: Vec<Vec<u32>>,
    starts_us: Vec<u64>,
    routes: Vec<Option<Route>>,
    outcomes: Outcomes,
    ended: usize,
}

/// Runs one policy. `on_end` is called with the number of requests that have ended.
pub fn run(
    trace: &Trace,
    fleet: &Fleet,
    policy: Policy,
    pace: Pace,
    on_end: &mut dyn FnMut(usize),
) -> Result<Outcomes, RouteError> {
    let mut run = Run::new(trace, fleet, policy, pace)?;
    run.begin();
    while let Some(Reverse(next)) = run.queue.pop() {
        run.handle(next, on_end)?;
    }
    Ok(run.finish())
}

/// When conversations start: at random within the time that their number takes, so that all policies see the same.
fn conversation_starts(trace: &Trace, pace: &Pace) -> Vec<u64> {
    let mut random = StdRng::seed_from_u64(pace.seed ^ 0x0073_7461_7274);
    let window_us = f64::from(trace.conversations) * pace.conversation_gap_s * 1e6;
    let mut starts: Vec<u64> = (0..trace.conversations)
        .map(|_| (random.random_range(0.0..1.0) * window_us / pace.load) as u64)
        .collect();
    starts.sort_unstable();
    starts
}

// === impl Run ===

impl<'a> Run<'a> {
    fn new(trace: &'a Trace, fleet: &'a Fleet, policy: Policy, pace: Pace) -> Result<Self, RouteError> {
        let engines = fleet.names.len();
        let requests = trace.requests.len();
        let mut followers = vec![Vec::new(); requests];
        for (number, request) in trace.requests.iter().enumerate() {
            if let Some(after) = request.after {
                followers[after as usize].push(number as u32);
            }
        }
        Ok(Self {
            trace,
            fleet,
            pace,
            router: Router::new(fleet, policy, pace.seed)?,
            engines: (0..engines).map(|_| Engine::new(fleet.engine.clone())).collect(),
            ports_us: vec![[0; 2]; engines],
            transfers: vec![[0; 2]; engines],
            queue: BinaryHeap::new(),
            numbers: 0,
            followers,
            starts_us: conversation_starts(trace, &pace),
            routes: vec![None; requests],
            outcomes: Outcomes { served: vec![Served::default(); requests], totals: FleetTotals::default() },
            ended: 0,
        })
    }

    fn begin(&mut self) {
        for number in 0..self.trace.requests.len() {
            if self.trace.requests[number].after.is_none() {
                let at_us = self.not_before_us(number as u32);
                self.push(at_us, Event::Arrives(number as u32));
            }
        }
    }

    fn not_before_us(&self, number: u32) -> u64 {
        let request = &self.trace.requests[number as usize];
        let start = self.starts_us.get(request.conversation as usize).copied().unwrap_or(0);
        start + (request.offset_us as f64 / self.pace.load) as u64
    }

    fn push(&mut self, at_us: u64, event: Event) {
        self.numbers += 1;
        self.queue.push(Reverse(Queued { at_us, number: self.numbers, event }));
    }

    fn handle(&mut self, next: Queued, on_end: &mut dyn FnMut(usize)) -> Result<(), RouteError> {
        let now_us = next.at_us;
        match next.event {
            Event::Arrives(request) => self.arrive(request, now_us, on_end)?,
            Event::Engine(engine, version) if self.engines[engine].version() == version => {
                self.advance(engine, now_us, on_end)?;
            }
            Event::Engine(..) => {}
            Event::Frames(frames) => {
                if let Some(feed) = &self.router.feed {
                    feed.apply(&frames, now_us / 1_000)?;
                }
            }
            Event::Handed(request) => self.decode(request, now_us, on_end)?,
            Event::TransferEnds { from, to } => {
                self.transfers[to][0] -= 1;
                self.transfers[from][1] -= 1;
            }
        }
        Ok(())
    }

    fn arrive(&mut self, number: u32, now_us: u64, on_end: &mut dyn FnMut(usize)) -> Result<(), RouteError> {
        let request = &self.trace.requests[number as usize];
        let path: Rc<[u32]> = self.trace.full_path(request).into();
        let loads: Vec<EngineLoad> = self.engines.iter().map(|engine| engine.load(now_us)).collect();
        let ask = Ask {
            request,
            path: &path,
            tree: &self.trace.tree,
            loads: &loads,
            transfers: &self.transfers,
            ports_us: &self.ports_us,
            now_us,
        };
        let route = self.router.route(&ask)?;
        let at = route.prefill;
        let served = &mut self.outcomes.served[number as usize];
        (served.arrived_us, served.engine, served.expected_ttft_ms) =
            (now_us, at as u32, route.expected_ttft_ms);
        let (pulled, pulls_end_us) = self.pull(&route, &path, now_us);
        let mut staged = self.engines[at].stage(&path, request.prompt_tokens, &pulled, now_us);
        staged.ready_us = staged.ready_us.max(pulls_end_us);
        let hands_off = route.decode != at;
        self.routes[number as usize] = Some(route);
        let job = Job {
            request: number,
            path: path.clone(),
            prompt_tokens: request.prompt_tokens,
            output_tokens: request.output_tokens,
            staged,
            hands_off,
            prefilled: false,
        };
        if self.engines[at].submit(job) {
            self.router.sent(at, number, &path);
        } else {
            self.end(number, now_us, on_end);
        }
        self.advance(at, now_us, on_end)
    }

    /// Begins the pulls; what is gone is not pulled, nor what comes after it. Returns what is, and when it has come.
    fn pull(&mut self, route: &Route, path: &[u32], now_us: u64) -> (Vec<(u32, u32)>, u64) {
        let mut pulled = Vec::new();
        let mut ends_us = now_us;
        for Pull { source, tier, from, to } in &route.pulls {
            let wanted = &path[*from as usize..(*to as usize).min(path.len())];
            let there = wanted.iter().take_while(|block| self.engines[*source].holds(*tier, **block)).count();
            if there > 0 {
                let bytes = there as f64 * self.fleet.engine.block_bytes;
                self.outcomes.totals.pulled_bytes += bytes;
                let read = self
                    .fleet
                    .costs
                    .tiers
                    .of(*tier)
                    .map_or((0.0, f64::INFINITY), |t| (t.alpha_ms, t.gb_per_s));
                ends_us = ends_us.max(self.transfer(*source, route.prefill, bytes, read, None, now_us));
                pulled.push((*from, from + there as u32));
            }
            if there < wanted.len() {
                self.outcomes.totals.stale_pulls += 1;
                ends_us += (self.fleet.costs.engine.detect_ms * 1e3) as u64;
                break;
            }
        }
        (pulled, ends_us)
    }

    /// Moves bytes over both ports, one transfer after the other. `read`: start-up and speed of what they are read from.
    /// `beside`: layers, and the time during which all but the last could move already, ms.
    fn transfer(
        &mut self,
        from: usize,
        to: usize,
        bytes: f64,
        read: (f64, f64),
        beside: Option<(f64, f64)>,
        now_us: u64,
    ) -> u64 {
        let class = self.fleet.places[from].link_to(self.fleet.places[to]);
        let link = self.fleet.costs.links.of(class);
        let gb_per_s = link.gb_per_s.min(self.fleet.costs.engine.port_gb_per_s).min(read.1);
        let moving_ms = cost::moving_ms(bytes, gb_per_s);
        let shown_ms = match beside {
            Some((layers, prefill_ms)) => cost::hand_off_ms(0.0, moving_ms, prefill_ms, layers),
            None => moving_ms,
        };
        let start_us = now_us.max(self.ports_us[to][0]).max(self.ports_us[from][1]);
        let end_us = start_us + ((link.alpha_ms + read.0 + shown_ms) * 1e3).round() as u64;
        (self.ports_us[to][0], self.ports_us[from][1]) = (end_us, end_us);
        self.transfers[to][0] += 1;
        self.transfers[from][1] += 1;
        self.push(end_us, Event::TransferEnds { from, to });
        end_us
    }

    fn advance(&mut self, at: usize, now_us: u64, on_end: &mut dyn FnMut(usize)) -> Result<(), RouteError> {
        let mut out = Vec::new();
        let wake = self.engines[at].advance(now_us, &mut out);
        if let Some(Wake { at_us, version }) = wake {
            self.push(at_us, Event::Engine(at, version));
        }
        if !out.is_empty() || wake.is_some() {
            self.publish(at, now_us)?;
        }
        for outcome in out {
            match outcome {
                Outcome::FirstToken { request, cached_tokens } => {
                    self.router.answered(at, request);
                    let served = &mut self.outcomes.served[request as usize];
                    served.first_us = now_us;
                    if self.routes[request as usize].as_ref().is_some_and(|route| route.prefill == at) {
                        served.cached_tokens = cached_tokens;
                    }
                }
                Outcome::Prefilled { request, cached_tokens, prefill_us } => {
                    self.router.answered(at, request);
                    self.outcomes.served[request as usize].cached_tokens = cached_tokens;
                    self.hand_off(request, at, prefill_us, now_us);
                }
                Outcome::Finished { request } => self.end(request, now_us, on_end),
            }
        }
        Ok(())
    }

    /// What came and went on the engine is in the index a while later.
    fn publish(&mut self, at: usize, now_us: u64) -> Result<(), RouteError> {
        let changes = self.engines[at].take_changes();
        let Some(feed) = self.router.feed.as_mut().filter(|_| !changes.is_empty()) else { return Ok(()) };
        let frames = feed.frames(&self.trace.tree, at, &changes)?;
        self.push(now_us + self.pace.lag_us, Event::Frames(frames));
        Ok(())
    }

    fn hand_off(&mut self, number: u32, from: usize, prefill_us: u64, now_us: u64) {
        let Some(to) = self.routes[number as usize].as_ref().map(|route| route.decode) else { return };
        let request = &self.trace.requests[number as usize];
        let path = self.trace.full_path(request);
        let held = path.iter().take_while(|block| self.engines[to].holds(Tier::Gpu, **block)).count() as f64;
        let config = &self.fleet.engine;
        let missing = f64::from(request.prompt_tokens) - held * f64::from(config.block_tokens);
        let bytes = missing * config.block_bytes / f64::from(config.block_tokens);
        self.outcomes.totals.handed_bytes += bytes;
        let layers =
            if self.fleet.costs.engine.layer_wise { f64::from(self.fleet.costs.model.layers) } else { 1.0 };
        let beside = Some((layers, prefill_us as f64 / 1e3));
        let end_us = self.transfer(from, to, bytes, (0.0, f64::INFINITY), beside, now_us);
        self.push(end_us, Event::Handed(number));
    }

    fn decode(&mut self, number: u32, now_us: u64, on_end: &mut dyn FnMut(usize)) -> Result<(), RouteError> {
        let Some((from, to)) =
            self.routes[number as usize].as_ref().map(|route| (route.prefill, route.decode))
        else {
            return Ok(());
        };
        let request = &self.trace.requests[number as usize];
        let path: Rc<[u32]> = self.trace.full_path(request).into();
        self.engines[from].release(number);
        let staged = Staged { ranges: vec![(0, path.len() as u32)], ready_us: now_us };
        let job = Job {
            request: number,
            path,
            prompt_tokens: request.prompt_tokens,
            output_tokens: request.output_tokens,
            staged,
            hands_off: false,
            prefilled: true,
        };
        if !self.engines[to].submit(job) {
            self.end(number, now_us, on_end);
        }
        // Room came back where it was prefilled.
        self.advance(from, now_us, on_end)?;
        self.advance(to, now_us, on_end)
    }

    fn end(&mut self, number: u32, now_us: u64, on_end: &mut dyn FnMut(usize)) {
        self.outcomes.served[number as usize].ended_us = now_us;
        self.ended += 1;
        on_end(self.ended);
        for follower in std::mem::take(&mut self.followers[number as usize]) {
            let think_us = self.trace.requests[follower as usize].think_us;
            let at_us = self.not_before_us(follower).max(now_us + think_us);
            self.push(at_us, Event::Arrives(follower));
        }
    }

    fn finish(mut self) -> Outcomes {
        let totals = &mut self.outcomes.totals;
        let prefills = match self.fleet.shape {
            Shape::Together(engines) => engines,
            Shape::Apart { prefill, .. } => prefill,
        };
        for (at, engine) in self.engines.iter().enumerate() {
            let EngineTotals { prefill_us, loaded_bytes, preemptions, refused, .. } = engine.totals;
            if at < prefills as usize {
                totals.prefill_us.push(prefill_us);
            }
            totals.loaded_bytes += loaded_bytes;
            totals.preemptions += preemptions;
            totals.refused += refused;
        }
        self.outcomes
    }
}

// === impl Queued ===

impl PartialEq for Queued {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Queued {}

impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Queued {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at_us, self.number).cmp(&(other.at_us, other.number))
    }
}
