//! Plans as a person reads them, and what a question must not be.

mod common;

use common::{World, costs, cpu, gpu, pod};
use kvatlas_planner::query::QueryError;
use kvatlas_planner::{Held, LinkClass, Load, PlanError, Role, Scratch, plan};
use kvatlas_proto::Tier;

/// A prefill pod that is near a peer with the prefix, a decoder that has the first half of it.
fn split_fleet() -> World {
    let mut world = World::new(vec![pod(0, vec![]), pod(1, gpu(100)), pod(2, cpu(200))], costs(), 4_000);
    world.pods[0].role = Role::Prefill;
    world.pods[1].role = Role::Decode;
    world.pods[2].role = Role::Prefill;
    world.pods[2].load = Load { waiting_requests: 50, waiting_prefill_tokens: 200_000, ..Load::default() };
    world
}

#[test]
fn a_plan_names_pair_segments_links_headers_and_alternative() {
    let plan = split_fleet().plan();
    assert_eq!((plan.prefill.index, plan.decode.index), (0, 1));
    let sources: Vec<_> =
        plan.segments.iter().map(|s| (s.source.as_deref(), s.tier, s.first_block, s.blocks)).collect();
    assert_eq!(sources, [(Some("10.0.0.2:8000"), Some(Tier::Cpu), 0, 200), (None, None, 200, 50)]);
    let bytes: Vec<_> = plan.links.iter().map(|link| (link.to.as_str(), link.class, link.bytes)).collect();
    let block = 16 * 327_680;
    assert_eq!(
        bytes,
        [("10.0.0.0:8000", LinkClass::Rack, 200 * block), ("10.0.0.1:8000", LinkClass::Rack, 150 * block)]
    );
    assert_eq!(
        plan.headers,
        [
            ("x-prefiller-host-port", "10.0.0.0:8000".to_owned()),
            ("x-kv-cache-source-host-port", "10.0.0.2:8000".to_owned())
        ]
    );
    let alternative = plan.alternative.unwrap();
    assert_eq!((alternative.prefill.index, alternative.decided_by), (2, "queue"));
    assert!(alternative.reason.contains("mostly for queue"), "{}", alternative.reason);
}

#[test]
fn only_what_the_decoder_lacks_is_handed_off() {
    let mut world = split_fleet();
    let full = world.plan().links.last().unwrap().bytes;
    world.pods[1].held = gpu(200);
    assert_eq!(full - world.plan().links.last().unwrap().bytes, 100 * 16 * 327_680);
}

#[test]
fn a_prompt_that_is_cached_where_it_is_decoded_stays_there() {
    let mut world = split_fleet();
    world.pods[1] = pod(1, gpu(240));
    let plan = world.plan();
    assert_eq!((plan.prefill.index, plan.decode.index), (1, 1));
    assert!(plan.headers.is_empty() && plan.links.is_empty(), "{plan:?}");
}

#[test]
fn own_tiers_and_a_pool_are_read_side_by_side() {
    let mut world = World::new(vec![pod(0, cpu(100))], costs(), 8_000);
    world.pools = vec![(vec![Held::prefix(Tier::Remote, 400)], common::place(0, 9), 0)];
    let plan = world.plan();
    let from: Vec<_> = plan.segments.iter().filter_map(|s| s.source.as_deref()).collect();
    assert_eq!(from, ["10.0.0.0:8000", "pool:a"]);
    let fetch = plan.terms.iter().find(|term| term.name == "fetch").unwrap().ms;
    assert!((fetch - plan.segments[0].ms.max(plan.segments[1].ms)).abs() < 1e-9, "{plan:?}");
    assert!(plan.headers.is_empty(), "a pool is no peer");
}

#[test]
fn an_engine_that_cannot_hand_off_serves_alone() {
    let mut world = split_fleet();
    world.engine().hands_off = false;
    let error = world.ask(|query| plan(query, &mut Scratch::default())).unwrap_err();
    assert_eq!(error, PlanError::NoPair);
    world.pods[0].role = Role::Both;
    assert_eq!(world.plan().decode.index, 0);
}

#[test]
fn a_short_prompt_and_an_empty_one_have_a_plan() {
    for tokens in [0, 1, 15, 16, 17] {
        let plan = World::new(vec![pod(0, gpu(5))], costs(), tokens).plan();
        assert!(plan.expected_ttft_ms.is_finite() && plan.expected_ttft_ms > 0.0, "{tokens} {plan:?}");
    }
}

#[test]
fn what_cannot_be_asked_is_refused_with_what_to_give() {
    let mut world = split_fleet();
    world.pods[1].load.kv_usage = 1.5;
    let error = world.ask(|query| plan(query, &mut Scratch::default())).unwrap_err();
    assert_eq!(error.to_string(), "kv_usage of 10.0.0.1:8000 is 1.5: give 0 to 1");
    let empty = World::new(vec![], costs(), 10);
    let error = empty.ask(|query| plan(query, &mut Scratch::default())).unwrap_err();
    assert_eq!(error, PlanError::Query(QueryError::NoCandidates));
}

#[test]
fn assumptions_say_what_nobody_configured() {
    let mut world = split_fleet();
    world.pods[0].location = kvatlas_planner::Location::default();
    world.pods[1].load.kv_usage = 0.5;
    let said = world.plan().assumptions.join("\n");
    for part in ["Where 1 of 3 candidates stand", "kv_capacity_tokens", "Speeds of tiers and links"] {
        assert!(said.contains(part), "{said}");
    }
}
