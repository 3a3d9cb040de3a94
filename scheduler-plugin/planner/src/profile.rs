//! What a model, an engine, a tier and a link cost: the data that the cost model works on.
//!
//! Documents are TOML and may hold any number of `[[model]]`, `[[engine]]`, and a `[tiers]`, a `[links]` and a
//! `[topology]` table. A later document replaces what has the same name. [`Profiles::shipped`] has measured engines and
//! the KV sizes of common models. [`Profiles::resolve`] makes one [`CostProfile`] for a model; what nobody configured is
//! assumed, and every assumption is a sentence in the answer.

mod document;
mod resolve;

use std::sync::Arc;

use kvatlas_proto::Tier;
use serde::Deserialize;

use crate::topology::{LinkClass, Topology};

pub use document::{MAX_PROFILES, ProfileError};
pub use resolve::UnknownProfileError;

/// Output length where neither the question nor the engine's profile says one, tokens.
pub const DEFAULT_OUTPUT_TOKENS: u32 = 256;
/// Name of the model profile that stands for a model nobody described.
pub const FALLBACK_MODEL: &str = "llama-3.1-8b";
/// Name of the engine profile that stands for an engine nobody measured, scaled to the model.
pub const FALLBACK_ENGINE: &str = "llama-2-70b/h100-tp4";

/// How the blocks of one cache group are needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GroupKind {
    /// Every token of the prefix.
    #[default]
    Full,
    /// The last `window_tokens` of the prefix.
    Window,
    /// One entry at the prefix's end; `state_bytes` in all.
    State,
}

/// Element type of the KV cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvDtype {
    /// Two bytes; what sizes are stated in.
    #[default]
    Bf16,
    /// One byte: half of what is stated.
    Fp8,
}

/// KV size of one cache group, over all its layers and the whole model, in bf16.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KvGroup {
    /// How its blocks are needed.
    #[serde(default)]
    pub kind: GroupKind,
    /// Bytes per token; 0 for a state.
    #[serde(default)]
    pub bytes_per_token: f64,
    /// Window, tokens; only for a window.
    #[serde(default)]
    pub window_tokens: u32,
    /// Bytes in all; only for a state.
    #[serde(default)]
    pub state_bytes: f64,
    /// Whether each tensor-parallel rank has the whole of it (multi-head latent attention) instead of its KV heads.
    #[serde(default)]
    pub replicated: bool,
}

/// What is to be known of a model.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelProfile {
    /// Name of the profile.
    pub name: String,
    /// Model names it is for, `*` for any characters, upper and lower case the same. The most specific pattern wins.
    #[serde(default)]
    pub models: Vec<String>,
    /// Layers with attention.
    pub layers: u32,
    /// KV heads: with more ranks than that, heads are replicated.
    pub kv_heads: u32,
    /// Attention heads * head dimension; scales the quadratic part of a prefill time measured with another model.
    pub query_width: u32,
    /// Parameters that a token passes through, 10^9; scales the linear part.
    pub active_params_b: f64,
    /// Element type of the cache as it is deployed.
    #[serde(default)]
    pub kv_dtype: KvDtype,
    /// Cache groups.
    #[serde(rename = "group")]
    pub groups: Vec<KvGroup>,
}

/// Prefill time of m new tokens after h cached ones: `c0 + c1 m + c2 ((h + m)^2 - h^2)`.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrefillCost {
    /// Fixed part, ms.
    pub c0_ms: f64,
    /// Per new token, ms.
    pub c1_ms_per_token: f64,
    /// Per pair of tokens, ms.
    pub c2_ms_per_token2: f64,
}

/// Time of one decode step: `base + per_request * running requests`.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecodeCost {
    /// With nobody running, ms.
    pub base_ms: f64,
    /// Per running request, ms.
    pub per_request_ms: f64,
}

/// One engine on one kind of accelerator.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineProfile {
    /// Name of the profile.
    pub name: String,
    /// Model names for which it is taken where no profile is named. Empty: only by its name.
    #[serde(default)]
    pub models: Vec<String>,
    /// Model profile it was measured with. Absent: whatever it is used for; else times are scaled to the model at hand.
    pub measured_model: Option<String>,
    /// Tensor-parallel ranks.
    #[serde(default = "default_ranks")]
    pub tensor_parallel: u32,
    /// Prefill times.
    pub prefill: PrefillCost,
    /// Decode step times.
    pub decode: DecodeCost,
    /// How much slower a prefill is if every slot of the batch decodes beside it: 0.3 is 30 %.
    #[serde(default = "default_gamma")]
    pub gamma: f64,
    /// Requests that can run at the same time.
    #[serde(default = "default_max_running")]
    pub max_running: u32,
    /// Tokens of one prefill chunk: what runs now is at most one of them.
    #[serde(default = "default_chunk")]
    pub chunk_tokens: u32,
    /// Tokens that fit its KV cache. Absent: not known, and nothing is expected to wait for space.
    pub kv_capacity_tokens: Option<u64>,
    /// Whether it loads blocks for a request that is still queued.
    #[serde(default = "yes")]
    pub loads_while_queued: bool,
    /// Whether loads from its own tiers and loads over the network run side by side, or all one after another. Sources are
    /// chosen alike; the time of the fetch is the longer of the two kinds, or their sum.
    #[serde(default = "yes")]
    pub loads_side_by_side: bool,
    /// Whether a hand-off moves each layer as it is done, beside the next one's computation.
    #[serde(default = "yes")]
    pub layer_wise: bool,
    /// Whether it can hand the KV cache of a prompt to another instance at all.
    #[serde(default = "yes")]
    pub hands_off: bool,
    /// Tiers of a peer that it can pull from. vLLM's offloading connector pulls from host memory.
    #[serde(default = "default_peer_tiers")]
    pub peer_tiers: Vec<TierLabel>,
    /// Speed of its network port, one way, GB/s.
    #[serde(default = "default_port")]
    pub port_gb_per_s: f64,
    /// Time to find out that pulled blocks are not there, ms.
    #[serde(default = "default_detect")]
    pub detect_ms: f64,
    /// Expected output where the question does not say, tokens.
    pub output_tokens: Option<u32>,
    /// Where the numbers come from.
    #[serde(default)]
    pub source: String,
}

/// A known tier, as documents write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TierLabel {
    /// Device memory.
    Gpu,
    /// Host memory.
    Cpu,
    /// Local disk.
    Ssd,
    /// Shared store.
    Remote,
}

/// How fast blocks come out of a tier.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TierSpeed {
    /// Start-up time of a read, ms.
    pub alpha_ms: f64,
    /// GB/s for a whole instance. 0: cannot be read.
    pub gb_per_s: f64,
    /// How long an entry stays true on average, seconds: one of age t is still there with probability exp(-t / tau).
    #[serde(default = "for_ever")]
    pub tau_s: f64,
}

/// Speeds of the known tiers.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TierSpeeds {
    /// Device memory: in place for its own instance, read for a peer.
    pub gpu: TierSpeed,
    /// Host memory.
    pub cpu: TierSpeed,
    /// Local disk.
    pub ssd: TierSpeed,
    /// Shared store.
    pub remote: TierSpeed,
}

/// How fast a link is.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkSpeed {
    /// Start-up time of a transfer, ms.
    pub alpha_ms: f64,
    /// GB/s one way. 0: nothing gets through.
    pub gb_per_s: f64,
    /// Whether its bytes are worth saving (`Objective::nu_ms_per_gb`).
    #[serde(default)]
    pub scarce: bool,
}

/// Speeds by [`LinkClass`]. A wider class is never faster nor quicker to start: the planner relies on it.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkSpeeds {
    /// Direct links between accelerators.
    pub island: LinkSpeed,
    /// Within one machine.
    pub node: LinkSpeed,
    /// Within one rack.
    pub rack: LinkSpeed,
    /// Within one zone.
    pub zone: LinkSpeed,
    /// Between places that share nothing known.
    pub other: LinkSpeed,
}

/// Everything that is known: profiles by name, speeds, topology.
#[derive(Clone, Debug)]
pub struct Profiles {
    pub(crate) models: Vec<Arc<ModelProfile>>,
    pub(crate) engines: Vec<Arc<EngineProfile>>,
    /// Speeds of tiers.
    pub tiers: TierSpeeds,
    /// Speeds of links.
    pub links: LinkSpeeds,
    /// Who stands where.
    pub topology: Topology,
    pub(crate) speeds_configured: bool,
}

/// What one model costs on one kind of engine here.
#[derive(Clone, Debug)]
pub struct CostProfile {
    /// Name for answers: model and engine.
    pub name: String,
    /// The model.
    pub model: Arc<ModelProfile>,
    /// The engine, scaled to the model.
    pub engine: Arc<EngineProfile>,
    /// Speeds of tiers.
    pub tiers: TierSpeeds,
    /// Speeds of links.
    pub links: LinkSpeeds,
    /// What was assumed because nobody configured it, one sentence each.
    pub assumptions: Vec<String>,
}

fn default_ranks() -> u32 {
    1
}

/// A full batch of decodes takes about a third of a step's time; calibrate.
fn default_gamma() -> f64 {
    0.3
}

/// vLLM's default of `max_num_seqs` on large accelerators is of this order.
fn default_max_running() -> u32 {
    256
}

/// vLLM's usual `max_num_batched_tokens` with chunked prefill.
fn default_chunk() -> u32 {
    2_048
}

fn default_peer_tiers() -> Vec<TierLabel> {
    vec![TierLabel::Cpu]
}

/// One 400G port, effective.
fn default_port() -> f64 {
    45.0
}

/// A failed pull is noticed after a round trip and a scheduler step; order of magnitude.
fn default_detect() -> f64 {
    50.0
}

fn yes() -> bool {
    true
}

fn for_ever() -> f64 {
    f64::INFINITY
}

// === impl TierLabel ===

impl TierLabel {
    /// The tier it names.
    pub fn tier(self) -> Tier {
        match self {
            Self::Gpu => Tier::Gpu,
            Self::Cpu => Tier::Cpu,
            Self::Ssd => Tier::Ssd,
            Self::Remote => Tier::Remote,
        }
    }
}

// === impl KvDtype ===

impl KvDtype {
    /// Size relative to bf16.
    pub fn scale(self) -> f64 {
        match self {
            Self::Bf16 => 1.0,
            Self::Fp8 => 0.5,
        }
    }
}

// === impl ModelProfile ===

impl ModelProfile {
    /// Bytes of one token over all groups, as they are deployed, on one rank's worth of the whole model.
    pub fn bytes_per_token(&self) -> f64 {
        self.groups.iter().map(|group| group.bytes_per_token).sum::<f64>() * self.kv_dtype.scale()
    }
}

// === impl EngineProfile ===

impl EngineProfile {
    /// The same engine with another model, as far as that can be said: the linear part of the prefill and the decode step
    /// scale with the parameters that a token passes through, the quadratic part with layers * query width.
    ///
    /// It is a guess. It is too optimistic for models with experts, which move more weights than they multiply.
    #[must_use]
    pub fn scaled_to(&self, model: &ModelProfile, measured: &ModelProfile) -> Self {
        let linear = model.active_params_b / measured.active_params_b;
        let width = |m: &ModelProfile| f64::from(m.layers) * f64::from(m.query_width);
        let depth = f64::from(model.layers) / f64::from(measured.layers);
        let mut scaled = self.clone();
        // The fixed part is launches and synchronisation, once per layer.
        scaled.prefill.c0_ms *= depth;
        scaled.prefill.c1_ms_per_token *= linear;
        scaled.prefill.c2_ms_per_token2 *= width(model) / width(measured);
        scaled.decode.base_ms *= linear.max(depth * MIN_STEP_SHARE);
        scaled.decode.per_request_ms *= model.bytes_per_token() / measured.bytes_per_token();
        scaled.measured_model = Some(model.name.clone());
        scaled
    }
}

/// A decode step is at least this share of the measured one per layer, however few parameters there are: launches remain.
const MIN_STEP_SHARE: f64 = 0.25;

// === impl TierSpeeds ===

impl TierSpeeds {
    /// The speed of this tier; `None` for an unknown medium, which cannot be read.
    pub fn of(&self, tier: Tier) -> Option<&TierSpeed> {
        match tier {
            Tier::Gpu => Some(&self.gpu),
            Tier::Cpu => Some(&self.cpu),
            Tier::Ssd => Some(&self.ssd),
            Tier::Remote => Some(&self.remote),
            Tier::Unknown => None,
        }
    }
}

// === impl LinkSpeeds ===

impl LinkSpeeds {
    /// The speed of this class.
    pub fn of(&self, class: LinkClass) -> &LinkSpeed {
        match class {
            LinkClass::Island => &self.island,
            LinkClass::Node => &self.node,
            LinkClass::Rack => &self.rack,
            LinkClass::Zone => &self.zone,
            LinkClass::Other => &self.other,
        }
    }
}

#[cfg(test)]
#[path = "profile/tests.rs"]
mod tests;
