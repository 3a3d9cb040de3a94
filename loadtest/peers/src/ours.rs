//! Figures that only our engine has: tiers in the same walk, removal of an owner, suffix queries, agentic chains.

use std::hint::black_box;
use std::time::Instant;

use kvatlas_proto::BlockKey;

use crate::engine::{Change, ChangeKind, Engine, Holder, Match};
use crate::measure::{Report, percentile};
use crate::system;
use crate::workload::{NONE, Rng, Shape, Workload};

/// Tiers per worker in the three-tier engine.
const TIERS: u32 = 3;

/// One engine with one tier in use beside one with three, over the same prompts. A further tier holds half, the next
/// one a quarter of the chains that the first one holds.
pub fn tiers(shape: Shape, report: &mut Report) {
    let mut workload = Workload::new(shape);
    let fill = workload.fill();
    let (one, three) = (Engine::default(), Engine::default());
    for event in &fill.events {
        let keys: Vec<_> =
            fill.nodes(event).iter().map(|node| BlockKey(workload.tree.key[*node as usize])).collect();
        let parent = (event.parent != NONE).then(|| BlockKey(workload.tree.key[event.parent as usize]));
        one.write().store(Holder(event.worker), parent, &keys);
        let share = Rng::new(u64::from(event.worker) << 32 | u64::from(event.parent / 512)).below(4);
        for tier in 0..TIERS {
            if tier == 0 || (tier == 1 && share < 2) || share == 0 {
                three.write().store(Holder(event.worker * TIERS + tier), parent, &keys);
            }
        }
    }
    let (small, large) = (one.totals(), three.totals());
    let further = (large.bytes - small.bytes) as f64 / (large.entries - small.entries) as f64;
    report.add("bytes per entry of a further tier", further, "B");
    for blocks in crate::measure::LENGTHS {
        let queries: Vec<Vec<BlockKey>> = workload
            .queries(blocks, 10_000, 3)
            .into_iter()
            .map(|query| query.keys.into_iter().map(BlockKey).collect())
            .collect();
        let mut out = vec![0; shape.workers * TIERS as usize];
        for (name, engine) in [("one tier", &one), ("three tiers", &three)] {
            let mut seen = Match::default();
            let mut times: Vec<u64> = queries
                .iter()
                .map(|query| {
                    let start = Instant::now();
                    out.fill(0);
                    engine.find(black_box(query), &mut seen);
                    seen.each_depth(|holder, depth| out[holder.0 as usize] = depth);
                    black_box(&out);
                    start.elapsed().as_nanos() as u64
                })
                .collect();
            times.sort_unstable();
            report.add(format!("match {blocks} p50 {name}"), percentile(&times, 0.5), "ns");
        }
    }
}

/// An owner of a million blocks, half of them shared with another one, is removed in slices.
pub fn removal(report: &mut Report) {
    const CHAINS: u64 = 1_000;
    const BLOCKS: u64 = 1_000;
    let engine = Engine::default();
    let mut rng = Rng::new(5);
    for chain in 0..CHAINS {
        let keys: Vec<_> = (0..BLOCKS).map(|_| BlockKey(rng.next())).collect();
        engine.write().store(Holder(0), None, &keys);
        if chain % 2 == 0 {
            engine.write().store(Holder(1), None, &keys);
        }
    }
    let cpu = system::cpu();
    let mut retired = engine.write().retire(Holder(0));
    let mut longest = 0;
    loop {
        let begun = system::cpu();
        let done = engine.write().release(&mut retired, 4_096);
        longest = longest.max(system::cpu() - begun);
        if done {
            break;
        }
    }
    report.add("removal of an owner of 1,000,000 blocks", (system::cpu() - cpu) as f64 / 1e6, "ms");
    report.add("removal, longest slice", longest as f64 / 1e6, "ms");
    report.add("blocks left", engine.totals().distinct as f64, "blocks");
}

/// Long chains that mostly repeat: mean 1,900 blocks, 96 % of them known; and 3,750 blocks on 96 owners. Whole prompts,
/// and as suffix queries of the last 4 %.
pub fn agentic(report: &mut Report) {
    for (name, blocks, owners, chains) in
        [("agentic 1,900", 1_900usize, 64usize, 1_000usize), ("3,750 x 96 owners", 3_750, 96, 300)]
    {
        let engine = Engine::default();
        let mut rng = Rng::new(11);
        let mut prompts: Vec<Vec<BlockKey>> = Vec::new();
        let known = blocks * 96 / 100;
        for _ in 0..chains {
            let keys: Vec<_> = (0..blocks).map(|_| BlockKey(rng.next())).collect();
            for _ in 0..if owners == 96 { 96 } else { 1 + rng.below(4) } {
                let holder = Holder(rng.below(owners) as u32);
                let changes: Vec<_> = (0..known)
                    .step_by(256)
                    .map(|at| Change {
                        holder,
                        kind: ChangeKind::Stored(at.checked_sub(1).map(|before| keys[before])),
                        keys: &keys[at..(at + 256).min(known)],
                    })
                    .collect();
                engine.write().apply(&changes, |_, _| {});
            }
            prompts.push(keys);
        }
        let mut seen = Match::default();
        let mut out = vec![0; owners];
        for suffix in [false, true] {
            let mut times = Vec::new();
            for _ in 0..20_000 / chains {
                for keys in &prompts {
                    let start = Instant::now();
                    out.fill(0);
                    if suffix {
                        engine.find_after(
                            keys[known - 20],
                            known as u32 - 19,
                            &keys[known - 19..],
                            false,
                            &mut seen,
                        );
                    } else {
                        engine.find(black_box(keys), &mut seen);
                    }
                    seen.each_depth(|holder, depth| out[holder.0 as usize] = depth);
                    times.push(start.elapsed().as_nanos() as u64);
                    assert!(out.iter().all(|depth| *depth == 0 || *depth as usize == known));
                }
            }
            times.sort_unstable();
            let what = if suffix { "suffix query" } else { "match" };
            report.add(format!("{what} {name} p50"), percentile(&times, 0.5), "ns");
            report.add(format!("{what} {name} p99"), percentile(&times, 0.99), "ns");
        }
    }
}
