//! Rules of other routers: computed as presets, and reproduced by the cost model with chosen constants.

mod common;

use std::sync::Arc;

use common::{World, costs, costs_with_bandwidth, cpu, gpu, pod};
use kvatlas_planner::profile::{PrefillCost, TierLabel};
use kvatlas_planner::score::{DEFAULT_TIER_WEIGHTS, Scored, dynamo_stays_local, llmd_disaggregates};
use kvatlas_planner::{Held, Load, Preset, Role, Scratch, score};
use kvatlas_proto::Tier;
use proptest::prelude::*;

fn scored(world: &World, preset: Preset) -> Vec<Scored> {
    world.ask(|query| score(query, &preset, &mut Scratch::default())).unwrap()
}

fn linear(c0_ms: f64, c1_ms_per_token: f64) -> PrefillCost {
    PrefillCost { c0_ms, c1_ms_per_token, c2_ms_per_token2: 0.0 }
}

#[test]
fn shares_count_leading_blocks_and_weigh_the_fastest_tier() {
    let holes = vec![
        Held::prefix(Tier::Gpu, 2),
        Held { tier: Tier::Cpu, first_block: 1, end_block: 6, age_ms: 0.0 },
        Held { tier: Tier::Gpu, first_block: 4, end_block: 5, age_ms: 0.0 },
        Held { tier: Tier::Ssd, first_block: 7, end_block: 10, age_ms: 0.0 },
    ];
    let world = World::new(vec![pod(0, holes), pod(1, vec![])], costs(), 160);
    let overlap = scored(&world, Preset::Overlap);
    assert_eq!((overlap[0].value, overlap[1].value), (0.6, 0.0));
    // gpu 0-2, cpu 2-4, gpu 4-5, cpu 5-6.
    let weighted = scored(&world, Preset::Weighted(DEFAULT_TIER_WEIGHTS));
    assert!((weighted[0].value - (3.0 + 3.0 * 0.8) / 10.0).abs() < 1e-12, "{weighted:?}");
}

#[test]
fn the_cheapest_has_the_value_one_and_the_others_less() {
    let world = World::new(vec![pod(0, gpu(50)), pod(1, cpu(20)), pod(2, vec![])], costs(), 1_000);
    let scored = scored(&world, Preset::Cost { pulls: false });
    assert_eq!(scored[0].value, 1.0);
    assert!(scored[0].value > scored[1].value && scored[1].value > scored[2].value, "{scored:?}");
    for one in &scored {
        let sum: f64 = one.terms.iter().map(|term| term.ms).sum();
        assert!((sum - one.cost.unwrap()).abs() < 1e-9);
    }
}

#[test]
fn llm_d_disaggregates_from_its_threshold_on_and_never_without_one() {
    assert!(llmd_disaggregates(1_000, 744, 256));
    assert!(!llmd_disaggregates(1_000, 745, 256));
    assert!(!llmd_disaggregates(1_000_000, 0, 0));
    let world = World::new(vec![pod(0, gpu(50)), pod(1, vec![])], costs(), 1_000);
    let scored = scored(&world, Preset::LlmdPrefixDecider { non_cached_tokens: 256 });
    assert_eq!(scored.iter().map(|s| s.disaggregates.unwrap()).collect::<Vec<_>>(), [false, true]);
}

#[test]
fn dynamo_stays_local_for_little_work_or_a_busy_prefill_worker() {
    assert!(dynamo_stays_local(4_000, 2_500, false));
    assert!(!dynamo_stays_local(2_000, 100, false), "2,048 is not reached, but nearly all is new");
    assert!(!dynamo_stays_local(100_000, 90_000, false));
    assert!(dynamo_stays_local(100_000, 0, true));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn the_cost_model_becomes_llm_ds_threshold(prompt in 1_u32..4_000, hit in 0_u32..200, threshold in 1_u32..3_000) {
        // A token costs the decoder 1 ms, prefilling elsewhere costs what the threshold's tokens do, moving costs nothing.
        let mut costs = costs_with_bandwidth(f64::INFINITY);
        let engine = Arc::make_mut(&mut costs.engine);
        engine.decode.base_ms = 0.0;
        engine.decode.per_request_ms = 0.0;
        engine.peer_tiers = Vec::new();
        engine.prefill = linear(0.0, 1.0);
        let mut elsewhere = engine.clone();
        elsewhere.prefill = linear(f64::from(threshold) - 0.5, 0.0);
        let hit = hit.min((prompt - 1) / 16);
        let mut world = World::new(vec![pod(0, gpu(hit)), pod(1, vec![])], costs, prompt);
        world.pods[1].role = Role::Prefill;
        world.pods[1].engine = Some(elsewhere);
        let disaggregates = world.plan().prefill.index == 1;
        prop_assert_eq!(disaggregates, llmd_disaggregates(prompt, hit * 16, threshold));
    }

    #[test]
    fn the_cost_model_becomes_dynamos_cost(
        pods in prop::collection::vec((0_u32..60, 0_u64..100), 1..6), weight in 0.1..5.0_f64,
    ) {
        // A block costs the overlap weight to compute; a decoding block is as much waiting work as costs 1.
        let prompt = 60 * 16 + 1;
        let mut costs = costs_with_bandwidth(0.0);
        Arc::make_mut(&mut costs.engine).prefill = linear(0.0, weight / 16.0);
        let mut by_rule = costs.clone();
        Arc::make_mut(&mut by_rule.engine).kv_capacity_tokens = Some(16_000);
        let fleet = |queue: bool| -> Vec<_> {
            let each = pods.iter().enumerate().map(|(at, &(blocks, active))| {
                let mut pod = pod(at, gpu(blocks));
                if queue {
                    pod.load.waiting_requests = u32::from(active > 0);
                    pod.load.waiting_prefill_tokens = (active as f64 * 16.0 / weight).round() as u64;
                } else {
                    pod.load.kv_usage = active as f64 / 1_000.0;
                }
                pod
            });
            each.collect()
        };
        let ours = scored(&World::new(fleet(true), costs, prompt), Preset::Cost { pulls: false });
        let rule = scored(&World::new(fleet(false), by_rule, prompt), Preset::Dynamo { overlap_weight: weight });
        // The rule counts the request's own 61 blocks everywhere, ours rounds waiting work to tokens.
        for (ours, rule) in ours.iter().zip(&rule) {
            let (ours, rule) = (ours.cost.unwrap(), rule.cost.unwrap() - 61.0);
            prop_assert!((ours - rule).abs() <= weight / 16.0 + 1e-6, "{ours} {rule}");
        }
    }

    #[test]
    fn mooncakes_algorithm_is_as_published(
        pods in prop::collection::vec((0_u32..60, 0_u32..3, 1_u64..4_000), 1..6), threshold in 1.0..4.0_f64,
    ) {
        let prompt = 60 * 16 + 1;
        let mut world = World::new(
            pods.iter().enumerate().map(|(at, &(blocks, waiting_requests, tokens))| {
                let waiting_prefill_tokens = if waiting_requests == 0 { 0 } else { tokens };
                let mut pod = pod(at, cpu(blocks));
                pod.load = Load { waiting_requests, waiting_prefill_tokens, ..Load::default() };
                pod
            }).collect(),
            costs_with_bandwidth(10.0),
            prompt,
        );
        let rule = scored(&world, Preset::Mooncake { threshold });
        let prefill = world.engine().prefill;
        let time = |m: f64, h: f64| kvatlas_planner::cost::prefill_ms(&prefill, m, h);
        let best = f64::from(pods.iter().map(|pod| pod.0).max().unwrap()) * 16.0;
        let n = f64::from(prompt);
        for (scored, &(blocks, requests, tokens)) in rule.iter().zip(&pods) {
            let queue = if requests == 0 { 0.0 } else { f64::from(requests) * time(tokens as f64 / f64::from(requests), 0.0) };
            let own = f64::from(blocks) * 16.0;
            let expected = if best > threshold * own {
                let bytes = (best - own) * world.costs.model.bytes_per_token();
                bytes / 10e6 + queue + time(n - best, best)
            } else {
                queue + time(n - own, own)
            };
            prop_assert!((scored.cost.unwrap() - expected).abs() < 1e-6);
        }
    }

    #[test]
    fn the_cost_model_never_loses_to_mooncakes_choice(
        pods in prop::collection::vec((0_u32..60, 0_u32..3, 1_u64..4_000), 1..6), threshold in 1.0..4.0_f64,
    ) {
        // With its assumptions (device cache in place, transfer then queue), choosing among all lengths includes its two.
        let mut costs = costs_with_bandwidth(10.0);
        let engine = Arc::make_mut(&mut costs.engine);
        engine.loads_while_queued = false;
        engine.peer_tiers = vec![TierLabel::Gpu];
        let fleet = pods.iter().enumerate().map(|(at, &(blocks, waiting_requests, tokens))| {
            let mut pod = pod(at, gpu(blocks));
            let waiting_prefill_tokens = if waiting_requests == 0 { 0 } else { tokens };
            pod.load = Load { waiting_requests, waiting_prefill_tokens, ..Load::default() };
            pod
        });
        let world = World::new(fleet.collect(), costs, 60 * 16 + 1);
        let rule = scored(&world, Preset::Mooncake { threshold });
        let ours = scored(&world, Preset::Cost { pulls: true });
        for (ours, rule) in ours.iter().zip(&rule) {
            prop_assert!(ours.cost.unwrap() <= rule.cost.unwrap() + 1e-6);
        }
    }
}
