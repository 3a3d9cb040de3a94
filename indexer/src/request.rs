//! From gRPC requests to queries: every range the contract states is checked here, once, at the door. Pure.

use kvatlas_proto::grpc as pb;
use kvatlas_proto::ids::InvalidInstanceError;
use kvatlas_proto::keys::{MultimodalItem, PromptExtras};
use kvatlas_proto::scope::{MAX_BLOCK_SIZE, MAX_MODEL_BYTES, MAX_TENANT_BYTES};
use kvatlas_proto::{InstanceId, Tier};

use crate::costing::is_store;
use crate::index::OwnerFilter;
use crate::matching::{TierWeights, WeightError};
use crate::query::{PromptInput, ScoreQuery};
use crate::speculate::MAX_TTL_MS;

/// Most token ids of a prompt. Longer contexts than any served model's; at 16 a block this is 65,536 blocks.
pub const MAX_PROMPT_TOKENS: usize = 1_048_576;
/// Most block keys of a request, in either form: two megabytes of them.
pub const MAX_PROMPT_KEYS: usize = 262_144;
/// Most blocks of a prompt, base of a suffix included: one token a block at the longest prompt.
pub const MAX_PROMPT_BLOCKS: u32 = 1_048_576;
/// Most candidates of a request: more pods than one endpoint picker sees.
pub const MAX_CANDIDATES: usize = 4_096;
/// Most multimodal items of a prompt; each block is compared with each of them.
pub const MAX_MULTIMODAL_ITEMS: usize = 1_024;
/// Longest name of a reported request, bytes. It is only logged.
pub const MAX_REQUEST_NAME_BYTES: usize = 128;

/// How long blocks of a routed request stay visible without confirmation, milliseconds, where the caller does not say: a queue
/// and the prefill of a long prompt.
pub(crate) const DEFAULT_SPECULATION_MS: u32 = 5_000;

/// Bounds of requests that an operator may set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestLimits {
    /// Token ids of a prompt.
    pub prompt_tokens: usize,
    /// Candidates of a request.
    pub candidates: usize,
}

/// What an engine said about a request, and what that can be compared with.
#[derive(Clone, Debug)]
pub(crate) struct OutcomeReport<'a> {
    /// Who served it; a valid name.
    pub(crate) instance: &'a str,
    pub(crate) rank: u32,
    /// Prompt tokens that were cached.
    pub(crate) reported: u32,
    /// Id of the score request.
    pub(crate) request_id: Option<u64>,
    /// What the caller was told, tokens.
    pub(crate) predicted: Option<u32>,
    /// The prompt, asked about this instance.
    pub(crate) lookup: Option<ScoreQuery<'a>>,
}

/// A request is missing something or out of range.
#[derive(Debug, PartialEq, thiserror::Error)]
pub(crate) enum RequestError {
    #[error("prompt is missing: give a model and token_ids, block_keys or suffix")]
    PromptMissing,
    #[error(
        "prompt.input is missing: give token_ids (an empty list is an empty prompt), block_keys or suffix"
    )]
    InputMissing,
    #[error("model has {0} bytes: give 1 to {MAX_MODEL_BYTES}")]
    Model(usize),
    #[error("tenant has {0} bytes: give at most {MAX_TENANT_BYTES}")]
    Tenant(usize),
    #[error("tenant is given without model: name both, or neither for all")]
    TenantAlone,
    #[error("block_size {0} is out of range: give 1 to {MAX_BLOCK_SIZE} tokens, or 0 for every size in use")]
    BlockSize(u32),
    #[error("block_size is missing: block_keys and suffix need the size that their keys were computed with")]
    BlockSizeMissing,
    #[error("prompt has {given} token ids: give at most {most}, or raise --max-prompt-tokens")]
    TooManyTokens { given: usize, most: usize },
    #[error("prompt has {0} block keys: give at most {MAX_PROMPT_KEYS}")]
    TooManyKeys(usize),
    #[error(
        "suffix.base_blocks is missing: give the number of blocks up to and including the base key's, at least 1"
    )]
    BaseBlocksMissing,
    #[error("suffix ends at block {0}: give at most {MAX_PROMPT_BLOCKS} blocks, the base's included")]
    TooManyBlocks(u64),
    #[error("prompt_tokens {tokens} is less than the {blocks} blocks of {block_size} tokens that were given")]
    PromptTokens { tokens: u32, blocks: u32, block_size: u32 },
    #[error("prompt has {0} multimodal items: give at most {MAX_MULTIMODAL_ITEMS}")]
    TooManyItems(usize),
    #[error("multimodal item {0} has length 0: give its number of placeholder tokens, at least 1")]
    EmptyItem(usize),
    #[error("request has {given} candidates: give at most {most}, or raise --max-candidates")]
    TooManyCandidates { given: usize, most: usize },
    #[error(
        "weights: tier {0} is not one that can have a weight: give TIER_GPU, TIER_CPU, TIER_SSD or TIER_REMOTE"
    )]
    WeightTier(i32),
    #[error("weights: {0}")]
    Weight(#[from] WeightError),
    #[error("preset {0} is not known: give one of Preset, or none")]
    Preset(i32),
    #[error("loads has {0} entries: give at most {MAX_CANDIDATES}, one for each instance")]
    TooManyLoads(usize),
    #[error("candidates are missing: give the instances that may be used, with their roles")]
    NoCandidates,
    #[error(
        "candidates: {0} is a shared store, where nothing is served: leave it out, stores are considered anyway"
    )]
    StoreAsCandidate(String),
    #[error("request has {0} bytes: give a name of 1 to {MAX_REQUEST_NAME_BYTES}")]
    SpeculationName(usize),
    #[error("ttl_ms {0} is out of range: give 1 to {MAX_TTL_MS}, or 0 for {DEFAULT_SPECULATION_MS}")]
    SpeculationTime(u32),
    #[error("request has {0} bytes: give at most {MAX_REQUEST_NAME_BYTES}")]
    RequestName(usize),
    #[error(transparent)]
    Instance(#[from] InvalidInstanceError),
    #[error(
        "cached_tokens is missing: give the prompt tokens that the engine reported as cached, 0 if none were"
    )]
    CachedTokensMissing,
    #[error(
        "there is nothing to compare with: give request_id (of the score request), predicted_tokens or prompt"
    )]
    PredictionMissing,
    #[error(
        "prompt.prompt_tokens is missing: what is cached of block_keys and suffix depends on the prompt's length"
    )]
    LengthMissing,
}

// === impl RequestLimits ===

impl Default for RequestLimits {
    fn default() -> Self {
        Self { prompt_tokens: MAX_PROMPT_TOKENS, candidates: MAX_CANDIDATES }
    }
}

/// Checks a score request. `weights` are the server's, for tiers that the request does not list.
pub(crate) fn score_query(
    request: &pb::ScoreRequest,
    weights: TierWeights,
    limits: RequestLimits,
) -> Result<ScoreQuery<'_>, RequestError> {
    let prompt = request.prompt.as_ref().ok_or(RequestError::PromptMissing)?;
    let query = prompt_query(prompt, &request.candidates, weights, limits)?;
    Ok(ScoreQuery {
        weights: request.weights.iter().try_fold(weights, with_weight)?,
        limit: (request.limit > 0).then_some(request.limit as usize),
        ..query
    })
}

/// How rows are to be scored.
pub(crate) fn preset(request: &pb::ScoreRequest) -> Result<pb::Preset, RequestError> {
    if request.loads.len() > MAX_CANDIDATES {
        return Err(RequestError::TooManyLoads(request.loads.len()));
    }
    pb::Preset::try_from(request.preset).map_err(|_| RequestError::Preset(request.preset))
}

/// Checks a plan request; `candidates` are the names of its candidates.
pub(crate) fn plan_query<'a>(
    request: &'a pb::PlanRequest,
    candidates: &'a [String],
    weights: TierWeights,
    limits: RequestLimits,
) -> Result<ScoreQuery<'a>, RequestError> {
    let prompt = request.prompt.as_ref().ok_or(RequestError::PromptMissing)?;
    if candidates.is_empty() {
        return Err(RequestError::NoCandidates);
    }
    for name in candidates {
        InstanceId::new(name.as_str())?;
        if is_store(name) {
            return Err(RequestError::StoreAsCandidate(name.clone()));
        }
    }
    prompt_query(prompt, candidates, weights, limits)
}

/// Checks a speculation: its prompt, and how long it is to be visible, milliseconds.
pub(crate) fn speculation(
    request: &pb::SpeculateRequest,
    weights: TierWeights,
    limits: RequestLimits,
) -> Result<(ScoreQuery<'_>, u32), RequestError> {
    if request.request.is_empty() || request.request.len() > MAX_REQUEST_NAME_BYTES {
        return Err(RequestError::SpeculationName(request.request.len()));
    }
    let ttl_ms = match request.ttl_ms {
        0 => DEFAULT_SPECULATION_MS,
        ttl_ms if ttl_ms <= MAX_TTL_MS => ttl_ms,
        ttl_ms => return Err(RequestError::SpeculationTime(ttl_ms)),
    };
    let prompt = request.prompt.as_ref().ok_or(RequestError::PromptMissing)?;
    Ok((prompt_query(prompt, &[], weights, limits)?, ttl_ms))
}

/// Checks a report.
pub(crate) fn outcome_report(
    request: &pb::ReportOutcomeRequest,
    weights: TierWeights,
    limits: RequestLimits,
) -> Result<OutcomeReport<'_>, RequestError> {
    if request.request.len() > MAX_REQUEST_NAME_BYTES {
        return Err(RequestError::RequestName(request.request.len()));
    }
    InstanceId::new(request.instance.as_str())?;
    let candidate = std::slice::from_ref(&request.instance);
    let lookup = |prompt| prompt_query(prompt, candidate, weights, limits);
    let report = OutcomeReport {
        instance: &request.instance,
        rank: request.data_parallel_rank,
        reported: request.cached_tokens.ok_or(RequestError::CachedTokensMissing)?,
        request_id: (request.request_id != 0).then_some(request.request_id),
        predicted: request.predicted_tokens,
        lookup: request.prompt.as_ref().map(lookup).transpose()?,
    };
    if report.request_id.is_none() && report.predicted.is_none() && report.lookup.is_none() {
        return Err(RequestError::PredictionMissing);
    }
    Ok(report)
}

fn prompt_query<'a>(
    prompt: &'a pb::Prompt,
    candidates: &'a [String],
    weights: TierWeights,
    limits: RequestLimits,
) -> Result<ScoreQuery<'a>, RequestError> {
    check_scope(&prompt.model, &prompt.tenant)?;
    if candidates.len() > limits.candidates {
        return Err(RequestError::TooManyCandidates { given: candidates.len(), most: limits.candidates });
    }
    let block_size = optional_block_size(prompt.block_size)?;
    let input = prompt_input(prompt, block_size, limits)?;
    let (model, tenant) = (prompt.model.as_str(), prompt.tenant.as_str());
    Ok(ScoreQuery { model, tenant, block_size, input, candidates, weights, limit: None })
}

/// Token ids or keys, weighed by what else is looked at for each of them, above which a look-up takes milliseconds: 32,768
/// tokens of a plain prompt, which is 2,048 of the usual blocks and up to 32,768 of the smallest.
const LARGE_PROMPT_WORK: usize = 4_096;

/// Whether the look-up of this prompt takes long enough to be in the way of others.
pub(crate) fn is_large(prompt: &pb::Prompt) -> bool {
    let (tokens, keys) = match &prompt.input {
        Some(pb::prompt::Input::TokenIds(tokens)) => (tokens.ids.len(), 0),
        Some(pb::prompt::Input::BlockKeys(block_keys)) => (0, block_keys.keys.len()),
        Some(pb::prompt::Input::Suffix(suffix)) => (0, suffix.keys.len()),
        None => (0, 0),
    };
    // A multimodal item is compared with every block.
    let blocks_at_most = tokens / 8;
    keys + blocks_at_most + blocks_at_most.saturating_mul(prompt.multimodal.len()) / 4 >= LARGE_PROMPT_WORK
}

/// Checks a list request.
pub(crate) fn list_filter(request: pb::ListOwnersRequest) -> Result<OwnerFilter, RequestError> {
    let model = if request.model.is_empty() {
        if !request.tenant.is_empty() {
            return Err(RequestError::TenantAlone);
        }
        None
    } else {
        check_scope(&request.model, &request.tenant)?;
        Some((request.model, request.tenant))
    };
    Ok(OwnerFilter { model, instance: some_text(request.instance), block_size: None, shard: None })
}

/// Checks a dump request.
pub(crate) fn dump_filter(request: pb::DumpRequest) -> Result<OwnerFilter, RequestError> {
    check_scope(&request.model, &request.tenant)?;
    Ok(OwnerFilter {
        block_size: optional_block_size(request.block_size)?,
        instance: some_text(request.instance),
        model: Some((request.model, request.tenant)),
        shard: None,
    })
}

/// Checks the names of a key space.
pub(crate) fn check_scope(model: &str, tenant: &str) -> Result<(), RequestError> {
    if model.is_empty() || model.len() > MAX_MODEL_BYTES {
        return Err(RequestError::Model(model.len()));
    }
    if tenant.len() > MAX_TENANT_BYTES {
        return Err(RequestError::Tenant(tenant.len()));
    }
    Ok(())
}

fn optional_block_size(block_size: u32) -> Result<Option<u32>, RequestError> {
    match block_size {
        0 => Ok(None),
        size if size <= MAX_BLOCK_SIZE => Ok(Some(size)),
        size => Err(RequestError::BlockSize(size)),
    }
}

fn prompt_input(
    prompt: &pb::Prompt,
    block_size: Option<u32>,
    limits: RequestLimits,
) -> Result<PromptInput<'_>, RequestError> {
    match prompt.input.as_ref().ok_or(RequestError::InputMissing)? {
        pb::prompt::Input::TokenIds(tokens) => {
            let (given, most) = (tokens.ids.len(), limits.prompt_tokens);
            if given > most {
                return Err(RequestError::TooManyTokens { given, most });
            }
            Ok(PromptInput::Tokens { ids: &tokens.ids, extras: extras(prompt)? })
        }
        pb::prompt::Input::BlockKeys(block_keys) => {
            let keys = check_keys(&block_keys.keys)?;
            let prompt_tokens = prompt_tokens(prompt, block_size, keys.len() as u32)?;
            Ok(PromptInput::Keys { keys, prompt_tokens })
        }
        pb::prompt::Input::Suffix(suffix) => {
            let keys = check_keys(&suffix.keys)?;
            if suffix.base_blocks == 0 {
                return Err(RequestError::BaseBlocksMissing);
            }
            let blocks = u64::from(suffix.base_blocks) + keys.len() as u64;
            if blocks > u64::from(MAX_PROMPT_BLOCKS) {
                return Err(RequestError::TooManyBlocks(blocks));
            }
            let prompt_tokens = prompt_tokens(prompt, block_size, blocks as u32)?;
            let (base_key, base_blocks) = (suffix.base_key, suffix.base_blocks);
            let base_segment = suffix.base_segment_key;
            Ok(PromptInput::Suffix { base_key, base_blocks, keys, base_segment, prompt_tokens })
        }
    }
}

fn check_keys(keys: &[u64]) -> Result<&[u64], RequestError> {
    if keys.len() > MAX_PROMPT_KEYS { Err(RequestError::TooManyKeys(keys.len())) } else { Ok(keys) }
}

/// Keys carry no length: it is as the caller says, if it can be.
fn prompt_tokens(
    prompt: &pb::Prompt,
    block_size: Option<u32>,
    blocks: u32,
) -> Result<Option<u32>, RequestError> {
    let block_size = block_size.ok_or(RequestError::BlockSizeMissing)?;
    match prompt.prompt_tokens {
        0 => Ok(None),
        tokens if u64::from(tokens) < u64::from(blocks) * u64::from(block_size) => {
            Err(RequestError::PromptTokens { tokens, blocks, block_size })
        }
        tokens => Ok(Some(tokens)),
    }
}

fn extras(prompt: &pb::Prompt) -> Result<PromptExtras, RequestError> {
    if prompt.multimodal.len() > MAX_MULTIMODAL_ITEMS {
        return Err(RequestError::TooManyItems(prompt.multimodal.len()));
    }
    if let Some(at) = prompt.multimodal.iter().position(|item| item.length == 0) {
        return Err(RequestError::EmptyItem(at));
    }
    let item = |item: &pb::MultimodalItem| MultimodalItem {
        identifier: item.identifier.clone(),
        offset: item.offset,
        length: item.length,
    };
    Ok(PromptExtras {
        lora_name: some_text(prompt.lora_name.clone()),
        cache_salt: some_text(prompt.cache_salt.clone()),
        multimodal: prompt.multimodal.iter().map(item).collect(),
    })
}

fn with_weight(weights: TierWeights, weight: &pb::TierWeight) -> Result<TierWeights, RequestError> {
    let tier = match pb::Tier::try_from(weight.tier) {
        Ok(pb::Tier::Gpu) => Tier::Gpu,
        Ok(pb::Tier::Cpu) => Tier::Cpu,
        Ok(pb::Tier::Ssd) => Tier::Ssd,
        Ok(pb::Tier::Remote) => Tier::Remote,
        Ok(pb::Tier::Unspecified | pb::Tier::Unknown) | Err(_) => {
            return Err(RequestError::WeightTier(weight.tier));
        }
    };
    Ok(weights.with(tier, weight.weight)?)
}

fn some_text(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(input: pb::prompt::Input) -> pb::ScoreRequest {
        let prompt =
            pb::Prompt { model: "m".into(), block_size: 16, input: Some(input), ..pb::Prompt::default() };
        pb::ScoreRequest { prompt: Some(prompt), ..pb::ScoreRequest::default() }
    }

    fn tokens(count: usize) -> pb::prompt::Input {
        pb::prompt::Input::TokenIds(pb::TokenIds { ids: vec![1; count] })
    }

    fn keys(count: usize) -> pb::prompt::Input {
        pb::prompt::Input::BlockKeys(pb::BlockKeys { keys: vec![1; count] })
    }

    fn suffix(base_blocks: u32, count: usize) -> pb::prompt::Input {
        pb::prompt::Input::Suffix(pb::Suffix {
            base_key: 7,
            base_blocks,
            keys: vec![1; count],
            base_segment_key: None,
        })
    }

    fn refused(
        input: pb::prompt::Input,
        change: impl FnOnce(&mut pb::ScoreRequest, &mut pb::Prompt),
    ) -> RequestError {
        let mut request = request(input);
        let mut prompt = request.prompt.take().unwrap();
        change(&mut request, &mut prompt);
        request.prompt = Some(prompt);
        score_query(&request, TierWeights::default(), RequestLimits::default()).unwrap_err()
    }

    #[test]
    fn what_is_missing_is_named() {
        let weights = TierWeights::default();
        assert_eq!(
            score_query(&pb::ScoreRequest::default(), weights, RequestLimits::default()).unwrap_err(),
            RequestError::PromptMissing
        );
        assert_eq!(refused(tokens(1), |_, prompt| prompt.input = None), RequestError::InputMissing);
        assert_eq!(refused(tokens(1), |_, prompt| prompt.model.clear()), RequestError::Model(0));
        assert_eq!(refused(keys(1), |_, prompt| prompt.block_size = 0), RequestError::BlockSizeMissing);
        assert_eq!(refused(suffix(1, 1), |_, prompt| prompt.block_size = 0), RequestError::BlockSizeMissing);
        assert_eq!(refused(suffix(0, 1), |_, _| ()), RequestError::BaseBlocksMissing);
    }

    #[test]
    fn limits_are_inclusive() {
        let limits = RequestLimits::default();
        let ok = |input| score_query(&request(input), TierWeights::default(), limits).map(|_| ());
        assert_eq!(ok(tokens(0)), Ok(()));
        assert_eq!(ok(tokens(MAX_PROMPT_TOKENS)), Ok(()));
        assert_eq!(
            ok(tokens(MAX_PROMPT_TOKENS + 1)),
            Err(RequestError::TooManyTokens { given: MAX_PROMPT_TOKENS + 1, most: MAX_PROMPT_TOKENS })
        );
        assert_eq!(ok(keys(MAX_PROMPT_KEYS)), Ok(()));
        assert_eq!(ok(keys(MAX_PROMPT_KEYS + 1)), Err(RequestError::TooManyKeys(MAX_PROMPT_KEYS + 1)));
        assert_eq!(ok(suffix(MAX_PROMPT_BLOCKS - 1, 1)), Ok(()));
        assert_eq!(ok(suffix(u32::MAX, 1)), Err(RequestError::TooManyBlocks(1 << 32)));
    }

    #[test]
    fn ranges_are_checked() {
        let long = "x".repeat(300);
        assert_eq!(refused(tokens(1), |_, prompt| prompt.model = long.clone()), RequestError::Model(300));
        assert_eq!(refused(tokens(1), |_, prompt| prompt.tenant = long.clone()), RequestError::Tenant(300));
        assert_eq!(
            refused(tokens(1), |_, prompt| prompt.block_size = 65_537),
            RequestError::BlockSize(65_537)
        );
        assert_eq!(
            refused(tokens(1), |request, _| request.candidates = vec![String::new(); MAX_CANDIDATES + 1]),
            RequestError::TooManyCandidates { given: MAX_CANDIDATES + 1, most: MAX_CANDIDATES }
        );
        assert_eq!(
            refused(keys(4), |_, prompt| prompt.prompt_tokens = 63),
            RequestError::PromptTokens { tokens: 63, blocks: 4, block_size: 16 }
        );
        assert_eq!(
            refused(tokens(1), |_, prompt| prompt.multimodal = vec![pb::MultimodalItem::default()]),
            RequestError::EmptyItem(0)
        );
        assert_eq!(
            refused(tokens(1), |_, prompt| {
                prompt.multimodal = vec![pb::MultimodalItem::default(); MAX_MULTIMODAL_ITEMS + 1];
            }),
            RequestError::TooManyItems(MAX_MULTIMODAL_ITEMS + 1)
        );
    }

    #[test]
    fn weights_replace_only_the_tiers_they_name() {
        let weight = |tier: pb::Tier, weight| pb::TierWeight { tier: tier.into(), weight };
        let mut good = request(tokens(1));
        good.weights = vec![weight(pb::Tier::Cpu, 0.1)];
        let limits = RequestLimits::default();
        let weights = score_query(&good, TierWeights::default(), limits).unwrap().weights;
        assert_eq!((weights.of(Tier::Cpu), weights.of(Tier::Gpu)), (0.1, 1.0));
        for tier in [pb::Tier::Unspecified, pb::Tier::Unknown] {
            let error = refused(tokens(1), |request, _| request.weights = vec![weight(tier, 0.5)]);
            assert_eq!(error, RequestError::WeightTier(tier.into()));
        }
        let error = refused(tokens(1), |request, _| request.weights = vec![weight(pb::Tier::Gpu, 1.5)]);
        assert!(error.to_string().contains("1.5") && error.to_string().contains("gpu"), "{error}");
    }

    #[test]
    fn what_is_large_counts_tokens_keys_and_items() {
        let large = |input, items: usize| {
            let mut prompt = request(input).prompt.unwrap();
            prompt.multimodal = vec![pb::MultimodalItem::default(); items];
            is_large(&prompt)
        };
        for (input, items, expected) in [
            (tokens(32_767), 0, false),
            (tokens(32_768), 0, true),
            (keys(4_095), 0, false),
            (keys(4_096), 0, true),
            (suffix(1, 4_096), 0, true),
            (tokens(8_192), 10, false),
            (tokens(8_192), 16, true),
        ] {
            assert_eq!(large(input, items), expected, "{items} items");
        }
        assert!(!is_large(&pb::Prompt::default()));
    }

    #[test]
    fn an_operators_limits_replace_the_defaults_and_are_named() {
        let limits = RequestLimits { prompt_tokens: 3, candidates: 1 };
        let check = |request: &pb::ScoreRequest| {
            score_query(request, TierWeights::default(), limits)
                .map(|_| ())
                .map_err(|error| error.to_string())
        };
        let mut request = request(tokens(3));
        request.candidates = vec!["a:1".into()];
        assert_eq!(check(&request), Ok(()));
        request.candidates.push("b:1".into());
        assert!(check(&request).unwrap_err().contains("--max-candidates"));
        request.candidates.clear();
        request.prompt.as_mut().unwrap().input = Some(tokens(4));
        assert!(check(&request).unwrap_err().contains("--max-prompt-tokens"));
    }

    #[test]
    fn a_tenant_without_a_model_is_refused_in_lists() {
        let request = pb::ListOwnersRequest { tenant: "t".into(), ..pb::ListOwnersRequest::default() };
        assert_eq!(list_filter(request).unwrap_err(), RequestError::TenantAlone);
        assert_eq!(dump_filter(pb::DumpRequest::default()).unwrap_err(), RequestError::Model(0));
    }
}
