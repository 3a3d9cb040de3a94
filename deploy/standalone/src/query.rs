//! `kvatlas query`: asks a running server from the shell.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use kvatlas_client::Client;
use kvatlas_proto::grpc::{
    self, BlockKeys, DumpRequest, InstanceScore, ListOwnersRequest, PredictionSource, Prompt,
    ReportOutcomeRequest, ScoreRequest, Source, SourceState, TokenIds,
};
use serde_json::{Value, json};

use crate::connect::ConnectArgs;
use crate::failure::Failure;
use crate::output;

/// Arguments of `query`.
#[derive(Args)]
pub struct QueryArgs {
    #[command(flatten)]
    connect: ConnectArgs,
    #[command(subcommand)]
    question: Question,
}

#[derive(Subcommand)]
enum Question {
    /// How much of a prompt each instance holds.
    Score(ScoreArgs),
    /// Tells what an engine reported as cached, to compare with what was predicted.
    Outcome(OutcomeArgs),
    /// Who publishes, what they hold, and how far each can be trusted.
    Owners(OwnersArgs),
    /// The block keys of owners, one owner a line.
    Dump(DumpArgs),
}

/// A prompt, as it is given on the command line.
#[derive(Args)]
pub struct PromptArgs {
    /// Model name as the engines serve it.
    #[arg(long)]
    model: String,
    /// Tenant.
    #[arg(long, default_value = "")]
    tenant: String,
    /// Tokens per block; 0: every size in use. Needed with --keys.
    #[arg(long, default_value_t = 0)]
    block_size: u32,
    /// Token ids of the prompt, separated by commas.
    #[arg(long, value_delimiter = ',', value_name = "ID,...", conflicts_with_all = ["tokens_file", "keys"])]
    tokens: Option<Vec<u32>>,
    /// File with the prompt's token ids, separated by commas or white space; JSON arrays too. - is standard input.
    #[arg(long, value_name = "FILE", conflicts_with = "keys")]
    tokens_file: Option<PathBuf>,
    /// Block keys of the prompt, hexadecimal, separated by commas.
    #[arg(long, value_delimiter = ',', value_name = "KEY,...")]
    keys: Option<Vec<String>>,
    /// LoRA adapter by name.
    #[arg(long, default_value = "")]
    lora: String,
    /// Cache salt of the request.
    #[arg(long, default_value = "")]
    cache_salt: String,
}

#[derive(Args)]
struct ScoreArgs {
    #[command(flatten)]
    prompt: PromptArgs,
    /// Instance to score; may be given several times. None: all that hold something.
    #[arg(long = "candidate", value_name = "INSTANCE")]
    candidates: Vec<String>,
    /// Most rows to show; 0: all.
    #[arg(long, default_value_t = 0)]
    limit: u32,
    /// Number under which the server remembers the answer for `query outcome`; 0: it does not.
    #[arg(long, default_value_t = 0, value_name = "ID")]
    request_id: u64,
}

#[derive(Args)]
struct OutcomeArgs {
    /// Who served the request.
    #[arg(long)]
    instance: String,
    /// Data-parallel rank of the instance.
    #[arg(long, default_value_t = 0)]
    rank: u32,
    /// Prompt tokens that the engine reported as cached.
    #[arg(long, value_name = "TOKENS")]
    cached: u32,
    /// Number that `query score` was given for the request; 0: none.
    #[arg(long, default_value_t = 0, value_name = "ID")]
    request_id: u64,
    /// Cached tokens that were predicted when the request was routed.
    #[arg(long, value_name = "TOKENS")]
    predicted: Option<u32>,
}

#[derive(Args)]
struct OwnersArgs {
    /// Only this model.
    #[arg(long, default_value = "")]
    model: String,
    /// Only this tenant, together with --model.
    #[arg(long, default_value = "")]
    tenant: String,
    /// Only this instance.
    #[arg(long, default_value = "")]
    instance: String,
}

#[derive(Args)]
struct DumpArgs {
    /// Model name as the engines serve it.
    #[arg(long)]
    model: String,
    /// Tenant.
    #[arg(long, default_value = "")]
    tenant: String,
    /// Only this instance.
    #[arg(long, default_value = "")]
    instance: String,
}

/// Runs `query`.
pub async fn run(args: QueryArgs) -> Result<ExitCode, Failure> {
    let (client, as_json) = (args.connect.client()?, args.connect.json);
    match args.question {
        Question::Score(score_args) => score(&client, score_args, as_json).await?,
        Question::Outcome(outcome_args) => outcome(&client, outcome_args, as_json).await?,
        Question::Owners(owners_args) => owners(&client, owners_args, as_json).await?,
        Question::Dump(dump_args) => dump(&client, dump_args, as_json).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn score(client: &Client, args: ScoreArgs, as_json: bool) -> Result<(), Failure> {
    let request = ScoreRequest {
        prompt: Some(args.prompt.into_prompt()?),
        candidates: args.candidates,
        limit: args.limit,
        request_id: args.request_id,
        ..ScoreRequest::default()
    };
    let answer = client.score(request).await.map_err(Failure::run)?;
    if as_json {
        output::json(&json!({
            "scope_known": answer.scope_known,
            "prompt_blocks": answer.prompt_blocks,
            "coverage": answer.coverage,
            "missing": answer.missing,
            "lookup_ns": answer.lookup_ns,
            "instances": answer.instances.iter().map(instance_json).collect::<Vec<_>>(),
        }));
        return Ok(());
    }
    if !answer.scope_known {
        output::line("no event has named this model and tenant yet: every score is 0");
    }
    let mut table = output::table(&["instance", "rank", "score", "blocks", "tokens", "tiers", "state"]);
    for row in &answer.instances {
        let tiers: Vec<String> = row
            .tiers
            .iter()
            .map(|tier| format!("{} {}", tier_name(tier.tier()), tier.matched_blocks))
            .collect();
        table.add_row([
            row.instance.clone(),
            row.data_parallel_rank.to_string(),
            format!("{:.3}", row.score),
            format!("{} of {}", row.matched_blocks, answer.prompt_blocks),
            row.matched_tokens.to_string(),
            tiers.join(", "),
            if row.known {
                trust(row.state(), &row.degraded_reason, row.verified_age_ms)
            } else {
                "not known".to_owned()
            },
        ]);
    }
    output::line(&table.to_string());
    output::line(&format!(
        "look-up {:.1} us, coverage {:.2}",
        answer.lookup_ns as f64 / 1e3,
        answer.coverage
    ));
    answer.missing.iter().for_each(|missing| output::line(missing));
    Ok(())
}

async fn outcome(client: &Client, args: OutcomeArgs, as_json: bool) -> Result<(), Failure> {
    let request = ReportOutcomeRequest {
        instance: args.instance,
        data_parallel_rank: args.rank,
        cached_tokens: Some(args.cached),
        request_id: args.request_id,
        predicted_tokens: args.predicted,
        ..ReportOutcomeRequest::default()
    };
    let answer = client.report_outcome(request).await.map_err(Failure::run)?;
    let source = match answer.prediction_source() {
        PredictionSource::Unspecified => "unspecified",
        PredictionSource::Remembered => "remembered",
        PredictionSource::Given => "given",
        PredictionSource::LookedUp => "looked up",
    };
    if as_json {
        output::json(&json!({
            "predicted_tokens": answer.predicted_tokens,
            "prediction_source": source,
            "reported_tokens": args.cached,
            "error_tokens": answer.error_tokens,
        }));
        return Ok(());
    }
    output::line(&format!(
        "predicted {} tokens ({source}), reported {}: error {:+}",
        answer.predicted_tokens, args.cached, answer.error_tokens
    ));
    Ok(())
}

async fn owners(client: &Client, args: OwnersArgs, as_json: bool) -> Result<(), Failure> {
    let request = ListOwnersRequest { model: args.model, tenant: args.tenant, instance: args.instance };
    let sources = client.list_owners(request).await.map_err(Failure::run)?.sources;
    if as_json {
        output::json(&json!({ "sources": sources.iter().map(source_json).collect::<Vec<_>>() }));
        return Ok(());
    }
    let header = ["model", "block", "instance", "rank", "state", "owner", "blocks", "silent"];
    let mut table = output::table(&header);
    for source in &sources {
        let owners: Vec<String> = source
            .owners
            .iter()
            .map(|owner| format!("{} group {} ({})", tier_name(owner.tier()), owner.group, owner.group_kind))
            .collect();
        let blocks: Vec<String> = source.owners.iter().map(|owner| owner.blocks.to_string()).collect();
        table.add_row([
            source.model.clone(),
            source.block_size.to_string(),
            source.instance.clone(),
            source.data_parallel_rank.to_string(),
            trust(source.state(), &source.degraded_reason, source.verified_age_ms),
            owners.join("\n"),
            blocks.join("\n"),
            format!("{:.1} s", source.silent_ms as f64 / 1e3),
        ]);
    }
    output::line(&table.to_string());
    Ok(())
}

async fn dump(client: &Client, args: DumpArgs, as_json: bool) -> Result<(), Failure> {
    let request =
        DumpRequest { model: args.model, tenant: args.tenant, instance: args.instance, block_size: 0 };
    let mut dump = client.dump(request).await.map_err(Failure::run)?;
    while let Some(chunk) = dump.next().await.map_err(Failure::run)? {
        let keys: Vec<String> = chunk.keys.iter().map(|key| format!("{key:016x}")).collect();
        let tier = tier_name(chunk.tier());
        if as_json {
            output::json(&json!({
                "instance": chunk.instance,
                "data_parallel_rank": chunk.data_parallel_rank,
                "block_size": chunk.block_size,
                "tier": tier,
                "medium": chunk.medium,
                "group": chunk.group,
                "keys": keys,
            }));
        } else {
            let (instance, rank, group) = (&chunk.instance, chunk.data_parallel_rank, chunk.group);
            output::line(&format!("{instance} rank {rank} {tier} group {group}: {} blocks", keys.len()));
            keys.iter().for_each(|key| output::line(&format!("  {key}")));
        }
    }
    Ok(())
}

// === impl PromptArgs ===

impl PromptArgs {
    /// The prompt for a request.
    pub fn into_prompt(self) -> Result<Prompt, Failure> {
        let input = match (self.tokens, self.tokens_file, self.keys) {
            (Some(ids), _, _) => grpc::prompt::Input::TokenIds(TokenIds { ids }),
            (None, Some(path), _) => {
                let text = if path.as_os_str() == "-" {
                    std::io::read_to_string(std::io::stdin())
                } else {
                    std::fs::read_to_string(&path)
                };
                let text = text.map_err(|error| Failure::unreadable(&path, &error))?;
                let ids = parse_tokens(&text).map_err(|problem| Failure::config(&path, &problem))?;
                grpc::prompt::Input::TokenIds(TokenIds { ids })
            }
            (None, None, Some(keys)) => {
                let key = |text: &String| {
                    u64::from_str_radix(text, 16).map_err(|_| {
                        Failure::usage(format!("{text:?} is not a key: give up to 16 hex digits"))
                    })
                };
                let keys = keys.iter().map(key).collect::<Result<_, _>>()?;
                grpc::prompt::Input::BlockKeys(BlockKeys { keys })
            }
            (None, None, None) => {
                return Err(Failure::usage("give the prompt: --tokens, --tokens-file or --keys"));
            }
        };
        Ok(Prompt {
            model: self.model,
            tenant: self.tenant,
            block_size: self.block_size,
            input: Some(input),
            lora_name: self.lora,
            cache_salt: self.cache_salt,
            ..Prompt::default()
        })
    }
}

/// Token ids between commas, white space and square brackets.
fn parse_tokens(text: &str) -> Result<Vec<u32>, String> {
    text.split(|c: char| c == ',' || c.is_whitespace() || c == '[' || c == ']')
        .filter(|word| !word.is_empty())
        .map(|word| word.parse().map_err(|_| format!("{word:?} is not a token id (0 to 4294967295)")))
        .collect()
}

/// Lower-case name of a tier, as in metrics.
pub fn tier_name(tier: grpc::Tier) -> &'static str {
    match tier {
        grpc::Tier::Gpu => "gpu",
        grpc::Tier::Cpu => "cpu",
        grpc::Tier::Ssd => "ssd",
        grpc::Tier::Remote => "remote",
        grpc::Tier::Unknown | grpc::Tier::Unspecified => "unknown",
    }
}

/// A state with its reason or age, for a person.
fn trust(state: SourceState, reason: &str, verified_age_ms: Option<u64>) -> String {
    match (state, verified_age_ms) {
        (SourceState::Verified, Some(age)) => format!("verified {:.1} s ago", age as f64 / 1e3),
        _ if reason.is_empty() => state_name(state).to_owned(),
        _ => format!("{}: {reason}", state_name(state)),
    }
}

fn state_name(state: SourceState) -> &'static str {
    match state {
        SourceState::Unspecified => "unspecified",
        SourceState::Syncing => "syncing",
        SourceState::Live => "live",
        SourceState::Verified => "verified",
        SourceState::Degraded => "degraded",
        SourceState::Gone => "gone",
    }
}

fn instance_json(row: &InstanceScore) -> Value {
    let tiers: Vec<Value> = row
        .tiers
        .iter()
        .map(|tier| {
            json!({
                "tier": tier_name(tier.tier()),
                "medium": tier.medium,
                "matched_blocks": tier.matched_blocks,
                "matched_tokens": tier.matched_tokens,
                "best_blocks": tier.best_blocks,
            })
        })
        .collect();
    json!({
        "instance": row.instance,
        "data_parallel_rank": row.data_parallel_rank,
        "known": row.known,
        "score": row.score,
        "matched_blocks": row.matched_blocks,
        "matched_tokens": row.matched_tokens,
        "engine_cached_tokens": row.engine_cached_tokens,
        "block_size": row.block_size,
        "state": state_name(row.state()),
        "degraded_reason": row.degraded_reason,
        "verified_age_ms": row.verified_age_ms,
        "tiers": tiers,
    })
}

fn source_json(source: &Source) -> Value {
    let owners: Vec<Value> = source
        .owners
        .iter()
        .map(|owner| {
            json!({
                "tier": tier_name(owner.tier()),
                "medium": owner.medium,
                "group": owner.group,
                "group_kind": owner.group_kind,
                "blocks": owner.blocks,
                "digest": owner.digest,
            })
        })
        .collect();
    json!({
        "model": source.model,
        "tenant": source.tenant,
        "block_size": source.block_size,
        "instance": source.instance,
        "data_parallel_rank": source.data_parallel_rank,
        "epoch": source.epoch,
        "applied_seq": source.applied_seq,
        "state": state_name(source.state()),
        "degraded_reason": source.degraded_reason,
        "verified_age_ms": source.verified_age_ms,
        "silent_ms": source.silent_ms,
        "owners": owners,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_files_may_be_plain_or_json() {
        assert_eq!(parse_tokens("1, 2\n3"), Ok(vec![1, 2, 3]));
        assert_eq!(parse_tokens("[4,5]\n"), Ok(vec![4, 5]));
        assert!(parse_tokens("1 x").unwrap_err().contains("\"x\""));
    }
}
