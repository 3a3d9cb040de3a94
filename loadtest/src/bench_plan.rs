//! A fleet to plan for, and how long a plan takes: what `kvatlas bench plan` measures. Equal configurations make equal fleets.

use kvatlas_planner::profile::UnknownProfileError;
use kvatlas_planner::{
    Candidate, CostProfile, Held, Load, Location, Objective, Plan, PlanError, PlanQuery, PoolCoverage,
    Profiles, Role, Scratch, plan,
};
use kvatlas_proto::{DpRank, InstanceId, Tier};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Tokens per block.
const BLOCK_TOKENS: u32 = 16;
/// Pods of a rack, and of a node.
const RACK_PODS: u32 = 32;
const NODE_PODS: u32 = 4;
const MODEL: &str = "meta-llama/Llama-3.1-70B-Instruct";

/// What fleet is planned for.
#[derive(Clone, Copy, Debug)]
pub struct PlanBenchConfig {
    /// Pods that only prefill.
    pub prefill: usize,
    /// Pods that only decode.
    pub decode: usize,
    /// Blocks of the prompt.
    pub blocks: u32,
    /// Whether no two pods send and receive as much: then no two of them are alike.
    pub varied: bool,
    /// Decides who holds how much and who is how busy.
    pub seed: u64,
}

/// A fleet whose pods hold prefixes of all lengths on their GPUs and in host memory, beside one store that has everything.
#[derive(Debug)]
pub struct PlanBench {
    config: PlanBenchConfig,
    costs: CostProfile,
    pods: Vec<Pod>,
    store: [Held; 1],
    scratch: Scratch,
}

#[derive(Debug)]
struct Pod {
    instance: InstanceId,
    role: Role,
    load: Load,
    held: [Held; 2],
    location: Location,
}

// === impl PlanBench ===

impl PlanBench {
    /// Makes the fleet.
    pub fn new(config: PlanBenchConfig) -> Result<Self, UnknownProfileError> {
        let mut random = StdRng::seed_from_u64(config.seed);
        let pods = (0..config.prefill + config.decode)
            .map(|at| {
                let gpu = random.random_range(0..=config.blocks / 2);
                let cpu = random.random_range(0..=config.blocks).max(gpu);
                let waiting_requests = random.random_range(0..4);
                let transfers = if config.varied { 8 } else { 1 };
                let (rack, node) = (at as u32 / RACK_PODS, at as u32 / NODE_PODS);
                let name = format!("10.{}.{}.{}:8000", rack, node % 256, at % 256);
                Pod {
                    instance: InstanceId::new(name).expect("an address is a name"),
                    role: if at < config.prefill { Role::Prefill } else { Role::Decode },
                    load: Load {
                        waiting_requests,
                        waiting_prefill_tokens: u64::from(waiting_requests) * random.random_range(0..8_000),
                        running_requests: random.random_range(0..100),
                        transfers_in: random.random_range(0..transfers),
                        transfers_out: random.random_range(0..transfers),
                        ..Load::default()
                    },
                    held: [Held::prefix(Tier::Gpu, gpu), Held::prefix(Tier::Cpu, cpu)],
                    location: Location::new(
                        None,
                        Some(&node.to_string()),
                        Some(&rack.to_string()),
                        Some("z"),
                    ),
                }
            })
            .collect();
        let costs = Profiles::shipped().resolve(MODEL, None)?;
        let store = [Held::prefix(Tier::Remote, config.blocks)];
        Ok(Self { config, costs, pods, store, scratch: Scratch::default() })
    }

    /// Plans once.
    pub fn plan(&mut self) -> Result<Plan, PlanError> {
        let candidates: Vec<Candidate<'_>> = self
            .pods
            .iter()
            .map(|pod| Candidate {
                instance: &pod.instance,
                rank: DpRank(0),
                rank_address: None,
                role: pod.role,
                load: pod.load,
                held: &pod.held,
                location: pod.location,
                engine: None,
            })
            .collect();
        let store = PoolCoverage {
            name: "pool:all",
            held: &self.store,
            location: Location::new(None, None, None, Some("z")),
            transfers_out: 2,
            gb_per_s: None,
            alpha_ms: None,
        };
        let query = PlanQuery {
            prompt_tokens: self.config.blocks * BLOCK_TOKENS + 5,
            block_tokens: BLOCK_TOKENS,
            candidates: &candidates,
            pools: &[store],
            links: &[],
            output_tokens: None,
            costs: &self.costs,
            objective: Objective::default(),
        };
        plan(&query, &mut self.scratch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_fleets_get_equal_plans_that_add_up() {
        for varied in [false, true] {
            let config = PlanBenchConfig { prefill: 20, decode: 10, blocks: 200, varied, seed: 3 };
            let plan = PlanBench::new(config).unwrap().plan().unwrap();
            assert_eq!(plan, PlanBench::new(config).unwrap().plan().unwrap());
            let terms: f64 = plan.terms.iter().map(|term| term.ms).sum();
            assert!((terms / plan.expected_ttft_ms - 1.0).abs() < 1e-9);
            assert_ne!(plan.prefill.instance, plan.decode.instance, "roles are kept apart");
        }
    }
}
