//! What is simulated: engines, what they cost, where they stand.

use std::sync::Arc;

use kvatlas_planner::profile::{LinkSpeed, PrefillCost, TierLabel, UnknownProfileError};
use kvatlas_planner::{CostProfile, Location, Profiles, Role};
use kvatlas_proto::ids::InvalidInstanceError;
use kvatlas_proto::{InstanceId, Tier};

use super::engine::{EngineConfig, TierConfig};

/// Most engines of a fleet: more say nothing new about policies.
pub const MAX_ENGINES: u32 = 256;
/// Engines of one rack.
const ENGINES_PER_RACK: u32 = 8;
/// The profile that is modelled and not measured; see [`HardwareConfig::default`].
pub const MODELLED_PROFILE: &str = "modelled/h100-tp8";

/// What each engine runs and has.
#[derive(Clone, Debug, PartialEq)]
pub struct HardwareConfig {
    /// Model name, for KV sizes.
    pub model: String,
    /// Engine profile of the planner, or [`MODELLED_PROFILE`].
    pub profile: String,
    /// Tokens that fit the GPUs of one engine.
    pub gpu_tokens: u64,
    /// Tokens that fit its host memory.
    pub cpu_tokens: u64,
    /// Tokens that fit its disk.
    pub ssd_tokens: u64,
    /// Most tokens of a step.
    pub max_batched_tokens: u32,
    /// Most requests of a step.
    pub max_seqs: u32,
    /// Speed between engines, GB/s; `None`: the profiles' links (racks of eight).
    pub link_gb_per_s: Option<f64>,
}

/// How many engines there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// All of them prefill and decode.
    Together(u32),
    /// Some prefill, the others decode.
    Apart {
        /// Prefill engines, numbered first.
        prefill: u32,
        /// Decode engines.
        decode: u32,
    },
}

/// A fleet that can be simulated.
#[derive(Clone, Debug)]
pub struct Fleet {
    /// Who there is.
    pub shape: Shape,
    /// What each engine is.
    pub engine: EngineConfig,
    /// What things cost, for the planner and for transfers.
    pub costs: CostProfile,
    /// Names, by engine.
    pub names: Vec<InstanceId>,
    /// Places, by engine.
    pub places: Vec<Location>,
}

/// A fleet cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// The planner has no such profile.
    #[error(transparent)]
    Profile(#[from] UnknownProfileError),
    /// Too few or too many.
    #[error(
        "{engines} engines cannot be simulated: give 1 to {MAX_ENGINES}, at least one that prefills and one that decodes"
    )]
    Engines {
        /// How many were asked for.
        engines: u32,
    },
    /// No block fits.
    #[error("{gpu_tokens} tokens of GPU memory are less than one block of {block_tokens}: give more")]
    Memory {
        /// What was given.
        gpu_tokens: u64,
        /// Tokens of a block.
        block_tokens: u32,
    },
    /// A name is not valid.
    #[error(transparent)]
    Name(#[from] InvalidInstanceError),
}

// === impl HardwareConfig ===

impl Default for HardwareConfig {
    /// Llama-3.1-70B on eight H100 of 80 GB with 2 TB of host memory, of which 3 / 4 hold blocks.
    ///
    /// 8 * 80 GB * 0.9 less 141 GB of weights leave 435 GB: 1.3 million tokens of 327,680 bytes.
    fn default() -> Self {
        Self {
            model: "meta-llama/Llama-3.1-70B".to_owned(),
            profile: MODELLED_PROFILE.to_owned(),
            gpu_tokens: 1_300_000,
            cpu_tokens: 4_600_000,
            ssd_tokens: 0,
            max_batched_tokens: 8_192,
            max_seqs: 256,
            link_gb_per_s: None,
        }
    }
}

/// The profile that [`MODELLED_PROFILE`] stands for, made of the measured one.
///
/// Splitwise measured prompts of up to 8,192 tokens, and its quadratic parts, carried to 100,000 tokens, are ten to forty
/// times the arithmetic of attention. Traces with such prompts need one that can be carried so far: per token 2 *
/// parameters operations, per pair of tokens 2 * layers * query width, both at half the peak of eight H100 (989
/// TFLOP/s each, dense, bf16).
fn modelled(profiles: &Profiles, model: &str) -> Result<CostProfile, UnknownProfileError> {
    const FLOP_PER_MS: f64 = 8.0 * 989e12 * 0.5 / 1e3;
    let mut costs = profiles.resolve(model, Some("llama-2-70b/h100-tp8"))?;
    let (params, layers, width) = (
        costs.model.active_params_b * 1e9,
        f64::from(costs.model.layers),
        f64::from(costs.model.query_width),
    );
    let engine = Arc::make_mut(&mut costs.engine);
    engine.name = MODELLED_PROFILE.to_owned();
    engine.prefill = PrefillCost {
        c0_ms: engine.prefill.c0_ms,
        c1_ms_per_token: 2.0 * params / FLOP_PER_MS,
        c2_ms_per_token2: 2.0 * layers * width / FLOP_PER_MS,
    };
    Ok(costs)
}

// === impl Shape ===

impl Shape {
    /// All engines.
    pub fn engines(self) -> u32 {
        match self {
            Self::Together(engines) => engines,
            Self::Apart { prefill, decode } => prefill + decode,
        }
    }

    /// What the engine does.
    pub fn role(self, engine: usize) -> Role {
        match self {
            Self::Together(_) => Role::Both,
            Self::Apart { prefill, .. } if engine < prefill as usize => Role::Prefill,
            Self::Apart { .. } => Role::Decode,
        }
    }
}

// === impl Fleet ===

impl Fleet {
    /// A fleet of equal engines.
    pub fn new(shape: Shape, hardware: &HardwareConfig, block_tokens: u32) -> Result<Self, FleetError> {
        let engines = shape.engines();
        let is_apart = matches!(shape, Shape::Apart { .. });
        let lacks = matches!(shape, Shape::Apart { prefill: 0, .. } | Shape::Apart { decode: 0, .. });
        if engines == 0 || engines > MAX_ENGINES || lacks {
            return Err(FleetError::Engines { engines });
        }
        let blocks = |tokens: u64| (tokens / u64::from(block_tokens)).min(u64::from(u32::MAX - 1)) as u32;
        if blocks(hardware.gpu_tokens) == 0 {
            return Err(FleetError::Memory { gpu_tokens: hardware.gpu_tokens, block_tokens });
        }
        let profiles = Profiles::shipped();
        let mut costs = if hardware.profile == MODELLED_PROFILE {
            modelled(&profiles, &hardware.model)?
        } else {
            profiles.resolve(&hardware.model, Some(&hardware.profile))?
        };
        if let Some(gb_per_s) = hardware.link_gb_per_s {
            let link = LinkSpeed { gb_per_s, ..costs.links.rack };
            (costs.links.rack, costs.links.zone, costs.links.other) = (link, link, link);
            Arc::make_mut(&mut costs.engine).port_gb_per_s = gb_per_s;
        }
        let engine = Arc::make_mut(&mut costs.engine);
        engine.kv_capacity_tokens = Some(hardware.gpu_tokens);
        engine.max_running = hardware.max_seqs;
        engine.chunk_tokens = hardware.max_batched_tokens;
        engine.hands_off = is_apart;
        engine.loads_while_queued = true;
        // What the simulated engines do: a decoding request adds its time to every step, and so to a full chunk.
        let chunk = f64::from(hardware.max_batched_tokens);
        let chunk_ms = kvatlas_planner::cost::prefill_ms(&engine.prefill, chunk, 0.0);
        engine.gamma = engine.decode.per_request_ms * f64::from(hardware.max_seqs) / chunk_ms;
        engine.peer_tiers = vec![TierLabel::Cpu];
        let tier = |tier: Tier, tokens: u64| {
            let speed = costs.tiers.of(tier).filter(|_| blocks(tokens) > 0)?;
            Some(TierConfig {
                tier,
                blocks: blocks(tokens),
                alpha_ms: speed.alpha_ms,
                gb_per_s: speed.gb_per_s,
            })
        };
        let tiers = [tier(Tier::Cpu, hardware.cpu_tokens), tier(Tier::Ssd, hardware.ssd_tokens)];
        let config = EngineConfig {
            block_tokens,
            gpu_blocks: blocks(hardware.gpu_tokens),
            tiers: tiers.into_iter().flatten().collect(),
            block_bytes: costs.model.bytes_per_token() * f64::from(block_tokens),
            max_batched_tokens: hardware.max_batched_tokens,
            max_seqs: hardware.max_seqs,
            prefill: costs.engine.prefill,
            decode: costs.engine.decode,
        };
        let (mut names, mut places) = (Vec::new(), Vec::new());
        for number in 0..engines {
            names.push(InstanceId::new(format!("10.0.0.{number}:8000"))?);
            let (node, rack) = (format!("n{number}"), format!("r{}", number / ENGINES_PER_RACK));
            places.push(Location::new(None, Some(&node), Some(&rack), Some("z")));
        }
        Ok(Self { shape, engine: config, costs, names, places })
    }
}
