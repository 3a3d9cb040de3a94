//! How long a plan takes; figures for a person, so not run by default:
//! `cargo test --release -p kvatlas-planner --test speed -- --ignored --nocapture`.

mod common;

use std::io::Write as _;
use std::time::{Duration, Instant};

use common::{World, costs, place, pod};
use kvatlas_planner::{Held, Load, Objective, Role, Scratch, plan};
use kvatlas_proto::Tier;

const BLOCKS: u32 = 2_000;
const ROUNDS: usize = 200;

/// Prefixes of all lengths on GPUs and in host memory, racks of 8 nodes, every load different.
fn fleet(prefill: usize, decode: usize, varied: bool, side_by_side: bool) -> World {
    let mut seed = 7_u64;
    let mut random = move |below: u32| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((seed >> 33) % u64::from(below)) as u32
    };
    let pods = (0..prefill + decode).map(|at| {
        let gpu = random(BLOCKS / 2);
        let cpu = random(BLOCKS);
        let mut pod = pod(at, vec![Held::prefix(Tier::Gpu, gpu), Held::prefix(Tier::Cpu, gpu.max(cpu))]);
        pod.location = place(at as u32 / 32, at as u32 / 4);
        pod.role = if at < prefill { Role::Prefill } else { Role::Decode };
        let waiting_requests = random(4);
        pod.load = Load {
            waiting_requests,
            waiting_prefill_tokens: u64::from(waiting_requests * random(8_000)),
            running_requests: random(100),
            transfers_in: if varied { random(4) } else { 0 },
            transfers_out: if varied { random(8) } else { 0 },
            ..Load::default()
        };
        pod
    });
    let mut world = World::new(pods.collect(), costs(), BLOCKS * 16 + 5);
    world.pools = vec![(vec![Held::prefix(Tier::Remote, BLOCKS)], place(0, 999), 2)];
    world.objective = Objective::default();
    world.engine().loads_side_by_side = side_by_side;
    world
}

#[test]
#[ignore = "prints figures, asserts nothing about time"]
fn time_of_a_plan() {
    let mut out = std::io::stderr();
    for (prefill, decode) in [(20, 20), (200, 200), (800, 800)] {
        for (varied, side_by_side) in [(false, false), (true, false), (false, true), (true, true)] {
            let world = fleet(prefill, decode, varied, side_by_side);
            let mut scratch = Scratch::default();
            let (mut times, dropped) = world.ask(|query| {
                let mut dropped = 0;
                let mut time = || {
                    let start = Instant::now();
                    dropped = plan(query, &mut scratch).unwrap().dropped;
                    start.elapsed()
                };
                ((0..ROUNDS).map(|_| time()).collect::<Vec<Duration>>(), dropped)
            });
            times.sort_unstable();
            let _ = writeln!(
                out,
                "{prefill} x {decode}, {BLOCKS} blocks, loads of senders {}, {}: median {:?}, p99 {:?}, {dropped} dropped",
                if varied { "differ" } else { "equal" },
                if side_by_side { "side by side" } else { "one after another" },
                times[ROUNDS / 2],
                times[ROUNDS * 99 / 100]
            );
        }
    }
}
