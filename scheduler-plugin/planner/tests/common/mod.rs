//! Small fleets to ask about.
#![allow(dead_code)] // Each test file uses a part of it.

use std::sync::Arc;

use kvatlas_planner::profile::{EngineProfile, LinkSpeed, TierLabel, TierSpeed};
use kvatlas_planner::{
    Candidate, CostProfile, Held, LinkOverride, Load, Location, Objective, Plan, PlanQuery, PoolCoverage,
    Profiles, Role, Scratch, plan,
};
use kvatlas_proto::{DpRank, InstanceId, Tier};

/// One instance.
#[derive(Clone, Debug)]
pub(crate) struct Pod {
    pub(crate) name: InstanceId,
    pub(crate) role: Role,
    pub(crate) load: Load,
    pub(crate) held: Vec<Held>,
    pub(crate) location: Location,
    pub(crate) engine: Option<EngineProfile>,
}

/// A fleet and a prompt.
#[derive(Clone, Debug)]
pub(crate) struct World {
    pub(crate) pods: Vec<Pod>,
    /// Held, location, transfers.
    pub(crate) pools: Vec<(Vec<Held>, Location, u32)>,
    pub(crate) links: Vec<(String, String, f64, f64)>,
    pub(crate) costs: CostProfile,
    pub(crate) prompt_tokens: u32,
    pub(crate) block_tokens: u32,
    pub(crate) objective: Objective,
}

/// Pods in one rack each of their own node.
pub(crate) fn place(rack: u32, node: u32) -> Location {
    Location::new(None, Some(&format!("n{node}")), Some(&format!("r{rack}")), Some("z"))
}

pub(crate) fn pod(at: usize, held: Vec<Held>) -> Pod {
    Pod {
        name: InstanceId::new(format!("10.0.0.{at}:8000")).unwrap(),
        role: Role::Both,
        load: Load::default(),
        held,
        location: place(0, at as u32),
        engine: None,
    }
}

/// Llama-2-70B on H100s, every tier of a peer can be pulled from.
pub(crate) fn costs() -> CostProfile {
    let mut costs =
        Profiles::shipped().resolve("meta-llama/Llama-2-70b", Some("llama-2-70b/h100-tp4")).unwrap();
    let engine = Arc::make_mut(&mut costs.engine);
    engine.peer_tiers = vec![TierLabel::Gpu, TierLabel::Cpu, TierLabel::Ssd, TierLabel::Remote];
    costs
}

/// The same bandwidth everywhere, no start-up times.
pub(crate) fn costs_with_bandwidth(gb_per_s: f64) -> CostProfile {
    let mut costs = costs();
    let link = LinkSpeed { alpha_ms: 0.0, gb_per_s, scarce: false };
    let links = &mut costs.links;
    (links.island, links.node, links.rack, links.zone, links.other) = (link, link, link, link, link);
    let tier = TierSpeed { alpha_ms: 0.0, gb_per_s, tau_s: f64::INFINITY };
    let tiers = &mut costs.tiers;
    (tiers.gpu, tiers.cpu, tiers.ssd, tiers.remote) = (tier, tier, tier, tier);
    Arc::make_mut(&mut costs.engine).port_gb_per_s = gb_per_s;
    costs
}

pub(crate) fn gpu(blocks: u32) -> Vec<Held> {
    vec![Held::prefix(Tier::Gpu, blocks)]
}

pub(crate) fn cpu(blocks: u32) -> Vec<Held> {
    vec![Held::prefix(Tier::Cpu, blocks)]
}

impl World {
    pub(crate) fn new(pods: Vec<Pod>, costs: CostProfile, prompt_tokens: u32) -> Self {
        let (pools, links) = (Vec::new(), Vec::new());
        Self { pods, pools, links, costs, prompt_tokens, block_tokens: 16, objective: Objective::TTFT_ONLY }
    }

    pub(crate) fn engine(&mut self) -> &mut EngineProfile {
        Arc::make_mut(&mut self.costs.engine)
    }

    pub(crate) fn ask<R>(&self, ask: impl FnOnce(&PlanQuery<'_>) -> R) -> R {
        let candidates: Vec<Candidate<'_>> = self
            .pods
            .iter()
            .map(|pod| Candidate {
                instance: &pod.name,
                rank: DpRank(0),
                rank_address: None,
                role: pod.role,
                load: pod.load,
                held: &pod.held,
                location: pod.location,
                engine: pod.engine.as_ref(),
            })
            .collect();
        let names = ["pool:a", "pool:b", "pool:c"];
        let pools: Vec<PoolCoverage<'_>> = (self.pools.iter().zip(names))
            .map(|((held, location, transfers_out), name)| PoolCoverage {
                name,
                held,
                location: *location,
                transfers_out: *transfers_out,
                gb_per_s: None,
                alpha_ms: None,
            })
            .collect();
        let links: Vec<LinkOverride<'_>> = (self.links.iter())
            .map(|(from, to, alpha_ms, gb_per_s)| LinkOverride {
                from,
                to,
                alpha_ms: *alpha_ms,
                gb_per_s: *gb_per_s,
            })
            .collect();
        ask(&PlanQuery {
            prompt_tokens: self.prompt_tokens,
            block_tokens: self.block_tokens,
            candidates: &candidates,
            pools: &pools,
            links: &links,
            output_tokens: None,
            costs: &self.costs,
            objective: self.objective,
        })
    }

    pub(crate) fn plan(&self) -> Plan {
        self.ask(|query| plan(query, &mut Scratch::default())).unwrap()
    }
}

/// First block that is computed.
pub(crate) fn computed_from(plan: &Plan) -> u32 {
    plan.segments
        .last()
        .filter(|segment| segment.source.is_none())
        .map_or(u32::MAX, |segment| segment.first_block)
}
