//! Scenarios from seeds. Each seed makes a world of another size and switches some kinds of faults off (as swarm testing
//! does): faults that would hide one another then meet alone, too.

use kvatlas_proto::ShardSet;

use super::op::{BusFault, DiskFault, Op, Process, Scenario, Step, WorldConfig};
use super::prompts::PROMPTS;
use super::rng::Rng;

/// Steps of one scenario, least and most.
const STEPS: (u64, u64) = (5, 120);
/// Time over which the steps are spread, milliseconds, least and most.
const SPAN_MS: (u64, u64) = (500, 9_000);
/// Longest effect of a fault, milliseconds. Some are longer than the time after which silence is noticed.
const LONGEST_MS: u64 = 5_000;

/// Device blocks of large worlds: several slices of digests, and all prompts fit.
const LARGE_BLOCKS: usize = 1_000;
/// Blocks of a request, most: in one piece, and where the key space is cut, so that segments have to meet.
const REQUEST_BLOCKS: (u64, u64) = (32, 100);
/// Shards of a key space that is cut, least and most.
const SHARDS: (u64, u64) = (2, 5);

/// Kinds of operations that a seed may switch off. Requests are always there.
#[derive(Clone, Copy)]
enum Kind {
    Evict,
    Offload,
    Reset,
    RestartEngine,
    LoseEvents,
    CutEvents,
    HoldReplay,
    KillShim,
    KillIndex,
    StallShim,
    StallIndex,
    Own,
    SetBack,
    Loss,
    Duplicates,
    Damage,
    Delay,
    Cut,
}

/// Kinds with how often they come, relative to one another.
const KINDS: [(Kind, u32); 18] = [
    (Kind::Evict, 8),
    (Kind::Offload, 5),
    (Kind::Reset, 2),
    (Kind::RestartEngine, 3),
    (Kind::LoseEvents, 4),
    (Kind::CutEvents, 3),
    (Kind::HoldReplay, 2),
    (Kind::KillShim, 4),
    (Kind::KillIndex, 4),
    (Kind::StallShim, 2),
    (Kind::StallIndex, 2),
    (Kind::Own, 6),
    (Kind::SetBack, 1),
    (Kind::Loss, 5),
    (Kind::Duplicates, 3),
    (Kind::Damage, 2),
    (Kind::Delay, 4),
    (Kind::Cut, 4),
];

/// The scenario of a seed. `shards`: into how many the key space is cut; `None`: the seed says it.
pub fn generate(seed: u64, shards: Option<u32>) -> Scenario {
    let mut rng = Rng::new(seed, "scenario", 0);
    let drawn = if rng.chance(50) { 1 } else { rng.between(SHARDS.0, SHARDS.1) as u32 };
    let shards = shards.unwrap_or(drawn);
    let is_cut = shards > 1;
    let indexes = rng.between(1, if is_cut { 3 } else { 2 });
    // Sometimes a part is nobody's.
    let most_parts = indexes + u64::from(rng.chance(15));
    let parts = if is_cut { rng.between(1, most_parts) } else { 1 };
    let most_blocks = if is_cut { 200 } else { 60 };
    let world = WorldConfig {
        seed,
        engines: rng.between(1, 3) as usize,
        device_blocks: if rng.chance(15) { LARGE_BLOCKS } else { rng.between(6, most_blocks) as usize },
        host_blocks: *rng.pick(&[0, 0, 8, 30]),
        replay_messages: *rng.pick(&[0, 4, 20, 10_000, 10_000]),
        indexes: indexes as usize,
        shards,
        parts: parts as u32,
        files: rng.chance(75),
        small_buffers: rng.chance(40),
    };
    let prompts = if world.device_blocks == LARGE_BLOCKS { PROMPTS } else { *rng.pick(&[3, 9]) };
    let kinds: Vec<(Kind, u32)> = KINDS
        .into_iter()
        .filter(|(kind, _)| rng.chance(50) && (is_cut || !matches!(kind, Kind::Own)))
        .collect();
    // How much of it is plain work.
    let work_percent = *rng.pick(&[20, 50, 80]);
    let span_ms = rng.between(SPAN_MS.0, SPAN_MS.1);
    let mut steps: Vec<Step> = (0..rng.between(STEPS.0, STEPS.1))
        .map(|_| {
            let at_ms = rng.below(span_ms);
            let op = if kinds.is_empty() || rng.chance(work_percent) {
                serve(&mut rng, &world, prompts)
            } else {
                let kind = weighted(&mut rng, &kinds);
                fault(&mut rng, &world, kind)
            };
            Step { at_ms, op }
        })
        .collect();
    steps.sort_by_key(|step| step.at_ms);
    Scenario { world, steps }
}

fn weighted(rng: &mut Rng, kinds: &[(Kind, u32)]) -> Kind {
    let total: u32 = kinds.iter().map(|(_, weight)| weight).sum();
    let mut at = rng.below(total.into()) as u32;
    for (kind, weight) in kinds {
        if at < *weight {
            return *kind;
        }
        at -= weight;
    }
    kinds[0].0
}

fn serve(rng: &mut Rng, world: &WorldConfig, prompts: usize) -> Op {
    Op::Serve {
        engine: rng.below(world.engines as u64) as usize,
        prompt: rng.below(prompts as u64) as usize,
        blocks: rng.between(1, if world.shards > 1 { REQUEST_BLOCKS.1 } else { REQUEST_BLOCKS.0 }) as usize,
    }
}

fn fault(rng: &mut Rng, world: &WorldConfig, kind: Kind) -> Op {
    let engine = rng.below(world.engines as u64) as usize;
    let index = rng.below(world.indexes as u64) as usize;
    // Short ones are more frequent: most things happen around the edges of a fault.
    let longest_ms = *rng.pick(&[100, 500, LONGEST_MS]);
    let for_ms = rng.between(1, longest_ms);
    match kind {
        Kind::Evict => Op::Evict { engine, blocks: rng.between(1, 8) as usize },
        Kind::Offload => Op::Offload { engine, blocks: rng.between(1, 6) as usize },
        Kind::Reset => Op::Reset { engine },
        Kind::RestartEngine => Op::RestartEngine { engine, for_ms },
        Kind::LoseEvents => Op::LoseEvents { engine, messages: rng.between(1, 6) as usize },
        Kind::CutEvents => Op::CutEvents { engine, for_ms },
        Kind::HoldReplay => Op::HoldReplay { engine, for_ms },
        Kind::KillShim => {
            Op::Kill { process: Process::Shim(engine), for_ms, disk: *rng.pick(&DiskFault::ALL) }
        }
        Kind::KillIndex => {
            Op::Kill { process: Process::Index(index), for_ms, disk: *rng.pick(&DiskFault::ALL) }
        }
        Kind::StallShim => Op::Stall { process: Process::Shim(engine), for_ms },
        Kind::StallIndex => Op::Stall { process: Process::Index(index), for_ms },
        Kind::Own => {
            let parts = rng.between(1, 3) as u32;
            let set = ShardSet::new(rng.below(parts.into()) as u32, parts).expect("it is below their number");
            Op::Own { index, set, beside: rng.chance(40) }
        }
        Kind::SetBack => Op::SetBack { shim: engine, by_ms: rng.between(1, 20_000) },
        Kind::Loss | Kind::Duplicates | Kind::Damage | Kind::Delay | Kind::Cut => {
            let percent = *rng.pick(&[5, 20, 60]);
            let fault = match kind {
                Kind::Loss => BusFault::Loss { percent },
                Kind::Duplicates => BusFault::Duplicates { percent },
                Kind::Damage => BusFault::Damage { percent },
                Kind::Delay => BusFault::Delay { up_to_ms: *rng.pick(&[5, 50, 400]) },
                _ => BusFault::Cut,
            };
            let pair = rng.chance(60).then_some((engine, index));
            Op::Bus { pair, fault, for_ms }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cmp::Ordering;

    use super::*;

    #[test]
    fn every_generated_scenario_reads_back_from_its_text() {
        for seed in 0..300 {
            let scenario = generate(seed, None);
            assert_eq!(scenario.to_string().parse(), Ok(scenario));
        }
    }

    #[test]
    fn every_kind_of_operation_is_generated() {
        let mut kinds: Vec<&str> =
            (0..100).flat_map(|seed| generate(seed, None).steps).map(|step| step.op.kind()).collect();
        kinds.sort_unstable();
        kinds.dedup();
        assert_eq!(kinds.len(), KINDS.len() + 1, "{kinds:?}");
    }

    #[test]
    fn about_half_of_the_worlds_are_cut_unless_it_is_said_how() {
        let cut = (0..400).filter(|seed| generate(*seed, None).world.shards > 1).count();
        assert!((150..250).contains(&cut), "{cut}");
        assert!((0..50).all(|seed| generate(seed, Some(3)).world.shards == 3));
        // Replicas, divisions, and parts that nobody has.
        let worlds: Vec<_> = (0..400).map(|seed| generate(seed, Some(4)).world).collect();
        for order in [Ordering::Less, Ordering::Equal, Ordering::Greater] {
            assert!(worlds.iter().any(|world| (world.parts as usize).cmp(&world.indexes) == order));
        }
    }
}
