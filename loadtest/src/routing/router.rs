//! Where a request goes: one policy, what it remembers, and the index and planner for those that ask them.

use foldhash::HashMap;
use kvatlas_planner::LinkOverride;
use kvatlas_planner::query::{MAX_LINKS, QueryError};
use kvatlas_planner::score::{LLMD_NEVER, Scored};
use kvatlas_planner::{
    Candidate, CostProfile, Held, Load, Objective, PlanError, PlanQuery, Preset, Role, Scratch, plan, score,
};
use kvatlas_proto::{DpRank, Tier};
use std::rc::Rc;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::blocks::BlockTree;
use super::engine::{EngineLoad, common_blocks};
use super::feed::{Feed, FeedError};
use super::fleet::{Fleet, Shape};
use super::lru::Lru;
use super::policy::Policy;
use super::trace::TraceRequest;

/// Blocks per engine that a router of approximate prefixes remembers: llm-d's default.
pub const HISTORY_BLOCKS: usize = 31_250;
/// Sessions that are remembered; the one that was longest quiet is forgotten first.
pub const MAX_SESSIONS: usize = 1 << 20;
/// llm-d's weights of the scorers for prefix, queue and free KV cache.
const LLMD_WEIGHTS: [f64; 3] = [3.0, 2.0, 2.0];
/// Dynamo's default weight of blocks that must be computed.
const DYNAMO_OVERLAP_WEIGHT: f64 = 1.0;
/// What a second of prefill costs those who come later, in seconds of their time to first token. On the traces of
/// `docs/routing.md` results hardly change from 0.3 to 3; at 0, prompts are computed anew beside pods that have them, which
/// costs a third of the time to first token where sessions ask faster than they are answered.
const WORK_WEIGHT: f64 = 1.0;
/// What it costs others if a request takes all KV space of an engine that is in use throughout, ms of their time to first
/// token: it is held for the time of an answer, and what was cached there is lost. In proportion below. Chosen on the traces of
/// `docs/routing.md`: above capacity, the more the better, up to this.
const SPACE_MS: f64 = 300_000.0;

/// Blocks that a request pulls from a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pull {
    pub(super) source: usize,
    pub(super) tier: Tier,
    pub(super) from: u32,
    pub(super) to: u32,
}

/// Where a request goes.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Route {
    pub(super) prefill: usize,
    /// The same where engines do both.
    pub(super) decode: usize,
    pub(super) pulls: Vec<Pull>,
    /// What the planner expected, ms, where it was asked.
    pub(super) expected_ttft_ms: Option<f64>,
}

/// What a router is asked.
pub(super) struct Ask<'a> {
    pub(super) request: &'a TraceRequest,
    /// Full blocks of the prompt.
    pub(super) path: &'a [u32],
    pub(super) tree: &'a BlockTree,
    /// By engine.
    pub(super) loads: &'a [EngineLoad],
    /// Transfers in flight, to and from each engine.
    pub(super) transfers: &'a [[u32; 2]],
    /// When the ports of each engine have done what they were told, in and out.
    pub(super) ports_us: &'a [[u64; 2]],
    pub(super) now_us: u64,
}

/// A request could not be routed.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// The index could not be asked.
    #[error(transparent)]
    Index(#[from] FeedError),
    /// The planner has no plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The planner has no scores.
    #[error(transparent)]
    Score(#[from] QueryError),
}

/// One policy at work.
pub(super) struct Router<'a> {
    fleet: &'a Fleet,
    policy: Policy,
    random: StdRng,
    next: usize,
    /// Engines that prefill, and that decode.
    prefills: Vec<usize>,
    decodes: Vec<usize>,
    sessions: Lru<u32, usize>,
    histories: Vec<Lru<u32>>,
    /// For those that ask.
    pub(super) feed: Option<Feed>,
    costs: CostProfile,
    numbers: HashMap<String, usize>,
    scratch: Scratch,
    held: Vec<Vec<Held>>,
    /// By engine, the requests that were sent there and have no first token yet: their blocks will be there before those of
    /// whoever is sent after them.
    pending: Vec<Vec<(u32, Rc<[u32]>)>>,
    keys: Vec<u64>,
}

// === impl Router ===

impl<'a> Router<'a> {
    pub(super) fn new(fleet: &'a Fleet, policy: Policy, seed: u64) -> Result<Self, FeedError> {
        let engines = fleet.names.len();
        let able = |able: fn(Role) -> bool| (0..engines).filter(|at| able(fleet.shape.role(*at))).collect();
        let mut costs = fleet.costs.clone();
        if policy == Policy::Local {
            std::sync::Arc::make_mut(&mut costs.engine).peer_tiers.clear();
        }
        let feed =
            policy.asks_index().then(|| Feed::new(&fleet.names, fleet.engine.block_tokens)).transpose()?;
        let numbers = fleet.names.iter().enumerate().map(|(at, name)| (name.as_str().to_owned(), at));
        let histories = if policy == Policy::Approximate { engines } else { 0 };
        Ok(Self {
            policy,
            random: StdRng::seed_from_u64(seed ^ 0x0072_6f75_7465),
            next: 0,
            prefills: able(Role::prefills),
            decodes: able(Role::decodes),
            sessions: Lru::new(MAX_SESSIONS),
            histories: (0..histories).map(|_| Lru::new(HISTORY_BLOCKS)).collect(),
            feed,
            costs,
            numbers: numbers.collect(),
            scratch: Scratch::default(),
            held: vec![Vec::new(); engines],
            pending: vec![Vec::new(); engines],
            keys: Vec::new(),
            fleet,
        })
    }

    /// A request was sent to the engine.
    pub(super) fn sent(&mut self, engine: usize, request: u32, path: &Rc<[u32]>) {
        if self.policy == Policy::Ours {
            self.pending[engine].push((request, path.clone()));
        }
    }

    /// A request has its first token from that engine, or was refused: its blocks are known to the index, or nowhere.
    pub(super) fn answered(&mut self, engine: usize, request: u32) {
        self.pending[engine].retain(|(pending, _)| *pending != request);
    }

    /// Decides.
    pub(super) fn route(&mut self, ask: &Ask<'_>) -> Result<Route, RouteError> {
        if let Some(feed) = &self.feed {
            self.keys.clear();
            self.keys.extend(ask.path.iter().map(|block| ask.tree.key(*block).0));
            feed.held(&self.keys, ask.request.prompt_tokens, &mut self.held)?;
        }
        for (held, pending) in self.held.iter_mut().zip(&self.pending) {
            let coming = pending.iter().map(|(_, path)| common_blocks(path, ask.path)).max().unwrap_or(0);
            if coming > 0 {
                held.push(Held::prefix(Tier::Gpu, coming));
            }
        }
        let prefill = match self.policy {
            Policy::Random => self.prefills[self.random.random_range(0..self.prefills.len())],
            Policy::RoundRobin => {
                self.next += 1;
                self.prefills[(self.next - 1) % self.prefills.len()]
            }
            Policy::LeastLoad => self.least_loaded(ask),
            Policy::Session => self.session(ask),
            Policy::Approximate => self.approximate(ask),
            Policy::Overlap => {
                let scored = self.scored(ask, Preset::Overlap)?;
                let value = |at: usize| scored[at].value;
                let load = |at: usize| ask.loads[at].waiting_ms;
                best(&self.prefills, |a, b| value(a).total_cmp(&value(b)).then(load(b).total_cmp(&load(a))))
            }
            Policy::Llmd => {
                let scored = self.scored(ask, Preset::LlmdPrefixDecider { non_cached_tokens: LLMD_NEVER })?;
                self.weighted(ask, |at| scored[at].value)
            }
            Policy::Dynamo => {
                let preset = Preset::Dynamo { overlap_weight: DYNAMO_OVERLAP_WEIGHT };
                let scored = self.scored(ask, preset)?;
                let cost = |at: usize| scored[at].cost.unwrap_or(f64::INFINITY);
                best(&self.prefills, |a, b| cost(b).total_cmp(&cost(a)))
            }
            Policy::Local | Policy::Global => return self.planned(ask, Objective::TTFT_ONLY, None),
            Policy::Ours => return self.ours(ask),
        };
        Ok(Route { prefill, decode: self.decode_for(prefill, ask), ..Route::default() })
    }

    /// Where engines do both, the same; else whoever decodes least.
    fn decode_for(&self, prefill: usize, ask: &Ask<'_>) -> usize {
        if self.fleet.shape.role(prefill) == Role::Both {
            return prefill;
        }
        let busy = |at: usize| ask.loads[at].running + ask.loads[at].waiting;
        best(&self.decodes, |a, b| busy(b).cmp(&busy(a)))
    }

    fn least_loaded(&self, ask: &Ask<'_>) -> usize {
        let load = |at: usize| (ask.loads[at].waiting_ms, ask.loads[at].running);
        best(&self.prefills, |a, b| {
            let (a, b) = (load(a), load(b));
            b.0.total_cmp(&a.0).then(b.1.cmp(&a.1))
        })
    }

    fn session(&mut self, ask: &Ask<'_>) -> usize {
        let session = ask.request.session;
        let engine = match self.sessions.get_mut(session) {
            Some(engine) => *engine,
            None => self.least_loaded(ask),
        };
        self.sessions.insert(session, engine);
        engine
    }

    fn approximate(&mut self, ask: &Ask<'_>) -> usize {
        let all = ask.path.len().max(1) as f64;
        let known =
            |at: usize| ask.path.iter().take_while(|block| self.histories[at].contains(**block)).count();
        let shares: Vec<f64> = (0..self.histories.len()).map(|at| known(at) as f64 / all).collect();
        let chosen = self.weighted(ask, |at| shares[at]);
        for block in ask.path.iter().rev() {
            self.histories[chosen].insert(*block, ());
        }
        chosen
    }

    /// llm-d's sum of scorers, with this one for prefixes.
    fn weighted(&self, ask: &Ask<'_>, prefix: impl Fn(usize) -> f64) -> usize {
        let waiting = |at: &usize| f64::from(ask.loads[*at].waiting);
        let most = self.prefills.iter().map(waiting).fold(0.0, f64::max);
        let least = self.prefills.iter().map(waiting).fold(f64::INFINITY, f64::min);
        let queue = |at: usize| if most > least { (most - waiting(&at)) / (most - least) } else { 1.0 };
        let value = |at: usize| {
            let scores = [prefix(at), queue(at), 1.0 - ask.loads[at].kv_usage.min(1.0)];
            scores.iter().zip(LLMD_WEIGHTS).map(|(score, weight)| score * weight).sum::<f64>()
        };
        best(&self.prefills, |a, b| value(a).total_cmp(&value(b)))
    }

    /// Links whose ports are busy with what this router ordered: their start-up time is when these are done. For `ours`, and
    /// as many as a question may have; others count transfers.
    fn links(&self, ask: &Ask<'_>) -> Vec<LinkOverride<'a>> {
        let engines = self.fleet.names.len();
        if self.policy != Policy::Ours || engines * engines > MAX_LINKS {
            return Vec::new();
        }
        let pair = |from: usize, to: usize| {
            let class = self.fleet.places[from].link_to(self.fleet.places[to]);
            let link = self.costs.links.of(class);
            let free_us = ask.ports_us[to][0].max(ask.ports_us[from][1]);
            LinkOverride {
                from: self.fleet.names[from].as_str(),
                to: self.fleet.names[to].as_str(),
                alpha_ms: link.alpha_ms + free_us.saturating_sub(ask.now_us) as f64 / 1e3,
                gb_per_s: link.gb_per_s.min(self.costs.engine.port_gb_per_s),
            }
        };
        (0..engines)
            .flat_map(|from| (0..engines).filter(move |to| *to != from).map(move |to| (from, to)))
            .map(|(from, to)| pair(from, to))
            .collect()
    }

    fn scored(&mut self, ask: &Ask<'_>, preset: Preset) -> Result<Vec<Scored>, RouteError> {
        let mut candidates = candidates(self.fleet, &self.costs, &self.held, ask);
        let links = self.links(ask);
        if !links.is_empty() {
            candidates.iter_mut().for_each(|c| (c.load.transfers_in, c.load.transfers_out) = (0, 0));
        }
        let query = PlanQuery {
            links: &links,
            ..query(self.fleet, &self.costs, &candidates, ask, Objective::TTFT_ONLY)
        };
        Ok(score(&query, &preset, &mut self.scratch)?)
    }

    /// Every engine's expected time to first token, and what others lose if this request is computed there: those whose
    /// blocks are still on their way, all of its computing; those who come later, a share of that and the space that it
    /// takes. Then a plan for the best one.
    fn ours(&mut self, ask: &Ask<'_>) -> Result<Route, RouteError> {
        let objective = Objective {
            lambda_ms_per_gpu_s: 1e3 * WORK_WEIGHT / f64::from(self.costs.engine.tensor_parallel),
            ..Objective::TTFT_ONLY
        };
        if matches!(self.fleet.shape, Shape::Apart { .. }) {
            return self.planned(ask, objective, None);
        }
        let scored = self.scored(ask, Preset::Cost { pulls: true })?;
        let cost = |at: usize| {
            let prefill_ms =
                scored[at].terms.iter().find(|term| term.name == "prefill").map_or(0.0, |term| term.ms);
            let others = WORK_WEIGHT + f64::from(ask.loads[at].fetching);
            let space_ms = SPACE_MS * self.new_share(at, ask) * ask.loads[at].kv_usage.min(1.0);
            scored[at].cost.unwrap_or(f64::INFINITY) + others * prefill_ms + space_ms
        };
        let chosen = best(&self.prefills, |a, b| cost(b).total_cmp(&cost(a)));
        self.planned(ask, objective, Some(chosen))
    }

    /// Share of the engine's KV space that this prompt takes beyond what lies in its GPUs.
    fn new_share(&self, at: usize, ask: &Ask<'_>) -> f64 {
        let begins = self.held[at].iter().filter(|held| held.tier == Tier::Gpu && held.first_block == 0);
        let there = begins.map(|held| held.end_block).max().unwrap_or(0);
        let new = (ask.path.len() as u32).saturating_sub(there);
        f64::from(new) / f64::from(self.fleet.engine.gpu_blocks)
    }

    /// The planner's plan; with `only`, where nobody else prefills.
    fn planned(
        &mut self,
        ask: &Ask<'_>,
        objective: Objective,
        only: Option<usize>,
    ) -> Result<Route, RouteError> {
        let mut candidates = candidates(self.fleet, &self.costs, &self.held, ask);
        if let Some(only) = only {
            candidates.iter_mut().for_each(|candidate| candidate.role = Role::Decode);
            candidates[only].role = Role::Both;
        }
        let links = self.links(ask);
        if !links.is_empty() {
            candidates.iter_mut().for_each(|c| (c.load.transfers_in, c.load.transfers_out) = (0, 0));
        }
        let query =
            PlanQuery { links: &links, ..query(self.fleet, &self.costs, &candidates, ask, objective) };
        let plan = plan(&query, &mut self.scratch)?;
        let pulls = plan.segments.iter().filter_map(|segment| {
            let source = *self.numbers.get(segment.source.as_deref()?)?;
            let (from, to) = (segment.first_block, segment.first_block + segment.blocks);
            (source != plan.prefill.index).then_some(Pull { source, tier: segment.tier?, from, to })
        });
        Ok(Route {
            prefill: plan.prefill.index,
            decode: plan.decode.index,
            pulls: pulls.collect(),
            expected_ttft_ms: Some(plan.expected_ttft_ms),
        })
    }
}

/// The greatest; of equals, the first.
fn best(among: &[usize], compare: impl Fn(usize, usize) -> std::cmp::Ordering) -> usize {
    let better = |best: usize, next: usize| if compare(next, best).is_gt() { next } else { best };
    among.iter().copied().reduce(better).unwrap_or(0)
}

fn candidates<'a>(
    fleet: &'a Fleet,
    costs: &CostProfile,
    held: &'a [Vec<Held>],
    ask: &Ask<'_>,
) -> Vec<Candidate<'a>> {
    let candidate = |at: usize| {
        let load = &ask.loads[at];
        let waits = load.waiting > 0;
        Candidate {
            instance: &fleet.names[at],
            rank: DpRank(0),
            rank_address: None,
            role: fleet.shape.role(at),
            load: Load {
                waiting_requests: u32::from(waits),
                waiting_prefill_tokens: if waits { tokens_that_take(costs, load.waiting_ms) } else { 0 },
                running_requests: load.running,
                kv_usage: load.kv_usage.clamp(0.0, 1.0),
                transfers_in: ask.transfers[at][0],
                transfers_out: ask.transfers[at][1],
                ..Load::default()
            },
            held: &held[at],
            location: fleet.places[at],
            engine: None,
        }
    };
    (0..fleet.names.len()).map(candidate).collect()
}

/// The one prompt that takes as long as all that wait, whatever of them is cached: the planner counts work in tokens.
fn tokens_that_take(costs: &CostProfile, ms: f64) -> u64 {
    let cost = &costs.engine.prefill;
    let left = (ms - cost.c0_ms).max(0.0);
    let (c1, c2) = (cost.c1_ms_per_token, cost.c2_ms_per_token2);
    (2.0 * left / (c1 + (c1 * c1 + 4.0 * c2 * left).sqrt())) as u64
}

fn query<'a>(
    fleet: &Fleet,
    costs: &'a CostProfile,
    candidates: &'a [Candidate<'a>],
    ask: &Ask<'_>,
    objective: Objective,
) -> PlanQuery<'a> {
    PlanQuery {
        prompt_tokens: ask.request.prompt_tokens,
        block_tokens: fleet.engine.block_tokens,
        candidates,
        pools: &[],
        links: &[],
        output_tokens: None,
        costs,
        objective,
    }
}
