//! The planner against one that tries everything: every pair, every block to stop at, every source of every block. Written
//! from the formulas alone, with nothing of the planner's but its inputs.

mod common;

use common::{World, costs, place, pod};
use kvatlas_planner::{Held, LinkClass, Load, Objective, Role};
use kvatlas_proto::Tier;
use proptest::prelude::*;

const MOST_BLOCKS: u32 = 8;

/// Where one block can come from: (identity for start-up times, start-up ms, ms per block, scarce).
type Option4 = ((usize, usize), f64, f64, bool);

struct Oracle<'a> {
    world: &'a World,
    bytes_per_block: f64,
}

impl Oracle<'_> {
    fn prefill(&self, from: u32) -> f64 {
        let (n, h) = (f64::from(self.world.prompt_tokens), f64::from(from * self.world.block_tokens));
        let c = self.world.costs.engine.prefill;
        c.c0_ms + c.c1_ms_per_token * (n - h) + c.c2_ms_per_token2 * (n * n - h * h)
    }

    fn queue(&self, p: usize) -> f64 {
        let load = self.world.pods[p].load;
        if load.waiting_requests == 0 {
            return 0.0;
        }
        let requests = f64::from(load.waiting_requests);
        let each = load.waiting_prefill_tokens as f64 / requests;
        let c = self.world.costs.engine.prefill;
        requests * (c.c0_ms + c.c1_ms_per_token * each + c.c2_ms_per_token2 * each * each)
    }

    fn link(&self, from: Option<usize>, to: usize, place: kvatlas_planner::Location) -> (f64, f64, bool) {
        let class = place.link_to(self.world.pods[to].location);
        let named = from.map(|from| self.world.pods[from].name.to_string());
        let to_name = self.world.pods[to].name.to_string();
        let out = from.map_or(0, |from| self.world.pods[from].load.transfers_out);
        let into = self.world.pods[to].load.transfers_in;
        let link = self.world.costs.links.of(class);
        if let Some((_, _, alpha, speed)) =
            self.world.links.iter().rfind(|(f, t, ..)| Some(f) == named.as_ref() && *t == to_name)
        {
            return (*alpha, speed / f64::from(1 + out.max(into)), link.scarce);
        }
        let port = self.world.costs.engine.port_gb_per_s;
        let outlet = if class >= LinkClass::Rack { port } else { port.max(link.gb_per_s) };
        let sender = if from.is_some() { outlet / f64::from(1 + out) } else { f64::INFINITY };
        (link.alpha_ms, link.gb_per_s.min(sender).min(outlet / f64::from(1 + into)), link.scarce)
    }

    fn has(held: &[Held], tier: Tier, block: u32) -> bool {
        held.iter().any(|h| h.tier == tier && h.first_block <= block && block < h.end_block)
    }

    /// All sources of a block for p; in its own GPU it is free.
    fn sources(&self, p: usize, block: u32) -> Vec<Option4> {
        let tiers = &self.world.costs.tiers;
        let mut all = Vec::new();
        for (tier_at, tier) in [Tier::Gpu, Tier::Cpu, Tier::Ssd].into_iter().enumerate() {
            let read = tiers.of(tier).unwrap();
            for (q, pod) in
                self.world.pods.iter().enumerate().filter(|(_, pod)| Self::has(&pod.held, tier, block))
            {
                if q == p && tier == Tier::Gpu {
                    return vec![((q, tier_at), 0.0, 0.0, false)];
                }
                if q == p {
                    let ms = self.bytes_per_block / (read.gb_per_s * 1e6);
                    all.push(((q, tier_at), read.alpha_ms, ms, false));
                } else {
                    let (alpha, speed, scarce) = self.link(Some(q), p, pod.location);
                    let ms = self.bytes_per_block / (speed.min(read.gb_per_s) * 1e6);
                    all.push(((q, tier_at), alpha + read.alpha_ms, ms, scarce));
                }
            }
        }
        for (at, (held, place, transfers)) in self.world.pools.iter().enumerate() {
            if Self::has(held, Tier::Remote, block) {
                let (alpha, speed, scarce) = self.link(None, p, *place);
                let read = tiers.remote;
                let ms = self.bytes_per_block / (speed.min(read.gb_per_s / f64::from(1 + transfers)) * 1e6);
                all.push(((1_000 + at, 3), alpha + read.alpha_ms, ms, scarce));
            }
        }
        all
    }

    /// Least of (load ms, scarce bytes' worth) in sum for blocks 0 to each stop: every source of every block is tried.
    /// Own tiers start once, senders each time they take over.
    fn loads(&self, p: usize, cap: u32) -> Vec<Vec<(f64, f64)>> {
        // State: who sends, which own tiers were started; per state the least sum.
        type State = (Option<(usize, usize)>, u8);
        let mut states: Vec<(State, f64, f64)> = vec![((None, 0), 0.0, 0.0)];
        let mut stops = vec![vec![(0.0, 0.0)]];
        let worth = self.world.objective.nu_ms_per_gb * self.bytes_per_block / 1e9;
        for block in 0..cap {
            let mut next: Vec<(State, f64, f64)> = Vec::new();
            for &((sender, started), ms, extra) in &states {
                for (who, alpha, each, scarce) in self.sources(p, block) {
                    let own = who.0 == p;
                    let goes_on = if own { started & (1 << who.1) != 0 } else { sender == Some(who) };
                    let state = if own { (sender, started | 1 << who.1) } else { (Some(who), started) };
                    let ms = ms + each + if goes_on { 0.0 } else { alpha };
                    let extra = extra + if scarce { worth } else { 0.0 };
                    next.push((state, ms, extra));
                }
            }
            if next.is_empty() {
                break;
            }
            // Equal states differ in what they cost so far only.
            next.sort_by(|a, b| (a.0, a.1, a.2).partial_cmp(&(b.0, b.1, b.2)).unwrap());
            let mut kept: Vec<(State, f64, f64)> = Vec::new();
            for one in next {
                if !kept.iter().any(|k| k.0 == one.0 && k.1 <= one.1 && k.2 <= one.2) {
                    kept.push(one);
                }
            }
            states = kept;
            stops.push(states.iter().map(|(_, ms, extra)| (*ms, *extra)).collect());
        }
        stops
    }

    fn best(&self) -> f64 {
        let world = self.world;
        let cap = (world.prompt_tokens - 1) / world.block_tokens;
        let engine = &world.costs.engine;
        let layers = if engine.layer_wise { f64::from(world.costs.model.layers) } else { 1.0 };
        let mut best = f64::INFINITY;
        for p in (0..world.pods.len()).filter(|&p| world.pods[p].role != Role::Decode) {
            let loads = self.loads(p, cap);
            for d in (0..world.pods.len()).filter(|&d| world.pods[d].role != Role::Prefill) {
                if p != d && !engine.hands_off {
                    continue;
                }
                for (stop, loads) in loads.iter().enumerate() {
                    let prefill = self.prefill(stop as u32);
                    for (fetch, extra) in loads {
                        let queue = self.queue(p);
                        let start = if engine.loads_while_queued { queue.max(*fetch) } else { queue + fetch };
                        let gpu = prefill / 1e3 * f64::from(engine.tensor_parallel);
                        let mut cost = start + prefill + extra + world.objective.lambda_ms_per_gpu_s * gpu;
                        if p != d {
                            let held = (0..cap)
                                .take_while(|&b| Self::has(&world.pods[d].held, Tier::Gpu, b))
                                .count();
                            let missing =
                                f64::from(world.prompt_tokens) - held as f64 * f64::from(world.block_tokens);
                            let bytes = missing * self.bytes_per_block / f64::from(world.block_tokens);
                            let (alpha, speed, scarce) = self.link(Some(p), d, world.pods[p].location);
                            let t = bytes / (speed * 1e6);
                            cost += alpha + (t / layers).max(t - prefill * (layers - 1.0) / layers);
                            cost += engine.decode.base_ms + engine.decode.per_request_ms;
                            cost += if scarce { world.objective.nu_ms_per_gb * bytes / 1e9 } else { 0.0 };
                        }
                        best = best.min(cost);
                    }
                }
            }
        }
        best
    }
}

fn worlds() -> impl Strategy<Value = World> {
    let held = (0..=MOST_BLOCKS, 0..=MOST_BLOCKS, 0..MOST_BLOCKS, 0..=MOST_BLOCKS);
    let load = (0_u32..3, 1_u64..2_000, 0_u32..4, 0_u32..4);
    let pods = prop::collection::vec((held, load, 0_u32..2, 0_u32..3, 0_u8..3), 1..5);
    let pools = prop::collection::vec((0..=MOST_BLOCKS, 0_u32..2), 0..2);
    let named = prop::collection::vec((0_usize..4, 0_usize..4, 0.0..5.0_f64, 1.0..100.0_f64), 0..3);
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    // Blocks of 16 to 2,048 tokens: start-up times, loads and computing are of one magnitude somewhere in between.
    (pods, pools, named, flags, 4_u32..12, 1_u32..MOST_BLOCKS, 0.01..1.0_f64).prop_map(
        |(pods, pools, named, (queued, layer_wise, hands_off, objective), log_block, blocks, slow)| {
            let pods = pods.into_iter().enumerate().map(|(at, (held, load, rack, node, role))| {
                let (gpu, cpu, from, ssd) = held;
                let mut pod = pod(
                    at,
                    vec![
                        Held::prefix(Tier::Gpu, gpu / 2),
                        Held::prefix(Tier::Cpu, cpu),
                        Held { tier: Tier::Ssd, first_block: from.min(gpu / 2), end_block: ssd, age_ms: 0.0 },
                    ],
                );
                let (waiting_requests, waiting_prefill_tokens, transfers_in, transfers_out) = load;
                pod.load = Load { waiting_requests, transfers_in, transfers_out, ..Load::default() };
                pod.load.waiting_prefill_tokens =
                    if waiting_requests == 0 { 0 } else { waiting_prefill_tokens };
                pod.location = place(rack, rack * 10 + node);
                pod.role = [Role::Both, Role::Prefill, Role::Decode][usize::from(role)];
                pod
            });
            let mut pods: Vec<_> = pods.collect();
            pods[0].role = Role::Both;
            let mut world = World::new(pods, costs(), blocks << log_block | 1);
            world.block_tokens = 1 << log_block;
            let held = |blocks| vec![Held::prefix(Tier::Remote, blocks)];
            world.pools = pools.into_iter().map(|(blocks, k)| (held(blocks), place(0, 99), k)).collect();
            let name = |at: usize| format!("10.0.0.{at}:8000");
            world.links =
                named.into_iter().map(|(f, t, alpha, speed)| (name(f), name(t), alpha, speed)).collect();
            let engine = world.engine();
            (engine.loads_while_queued, engine.layer_wise, engine.hands_off) =
                (queued, layer_wise, hands_off);
            engine.loads_side_by_side = false;
            engine.prefill.c1_ms_per_token *= slow;
            engine.prefill.c2_ms_per_token2 *= slow;
            if objective {
                world.objective = Objective { mu: 0.0, ..Objective::default() };
                if queued {
                    // Behind a queue, a slow source for some blocks of an interval may save scarce bytes at no time; the
                    // planner takes an interval from one source.
                    world.objective.nu_ms_per_gb = 0.0;
                }
            }
            world
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn no_pair_stop_or_source_is_better_than_the_plan(world in worlds()) {
        let bytes_per_block = world.costs.model.bytes_per_token() * f64::from(world.block_tokens);
        let best = Oracle { world: &world, bytes_per_block }.best();
        let plan = world.plan();
        prop_assert!((plan.objective_ms - best).abs() < 1e-6 * best, "{best} against {plan:?}");
    }

    #[test]
    fn loads_side_by_side_are_never_worse_than_one_after_another(mut world in worlds()) {
        let serial = world.plan().objective_ms;
        world.engine().loads_side_by_side = true;
        let parallel = world.plan().objective_ms;
        prop_assert!(parallel <= serial + 1e-6, "{parallel} against {serial}");
    }
}
