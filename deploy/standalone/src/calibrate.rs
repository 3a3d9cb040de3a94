//! `kvatlas calibrate`: an engine profile from measurements, and how well it fits.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use kvatlas_planner::Profiles;
use kvatlas_planner::calibrate::metrics::{self, Scale};
use kvatlas_planner::calibrate::{Fit, csv, fit};
use kvatlas_planner::profile::PrefillCost;
use serde_json::{Value, json};

use crate::failure::Failure;
use crate::output;

/// Arguments of `calibrate`.
#[derive(Args)]
pub struct CalibrateArgs {
    /// CSV file of measured requests, with columns prompt_tokens, ttft_ms and, if some were cached, cached_tokens. Measure one
    /// request at a time: in a loaded engine the time to first token contains the queue.
    #[arg(long, value_name = "FILE", conflicts_with = "metrics")]
    csv: Option<PathBuf>,
    /// Two scrapes of a vLLM engine's /metrics, the earlier one first: gives one factor on --base.
    #[arg(long, value_names = ["BEFORE", "AFTER"], num_args = 2)]
    metrics: Option<Vec<PathBuf>>,
    /// Engine profile that --metrics compares with.
    #[arg(long, default_value = kvatlas_planner::profile::FALLBACK_ENGINE, value_name = "PROFILE")]
    base: String,
    /// Name of the new profile.
    #[arg(long, default_value = "ours")]
    name: String,
    /// Model names that the new profile is for; * stands for anything. May be given several times.
    #[arg(long = "model", value_name = "PATTERN")]
    models: Vec<String>,
    /// Files with profiles, beside those that come with kvatlas. May be given several times.
    #[arg(long = "cost-profiles", value_name = "FILE")]
    cost_profiles: Vec<PathBuf>,
    /// Print JSON instead of a profile and a table.
    #[arg(long)]
    json: bool,
}

/// Runs `calibrate`.
pub fn run(args: &CalibrateArgs) -> Result<ExitCode, Failure> {
    match (&args.csv, args.metrics.as_deref()) {
        (Some(path), _) => from_rows(args, path)?,
        (None, Some([before, after])) => from_metrics(args, before, after)?,
        (None, _) => return Err(Failure::usage("give --csv FILE, or --metrics BEFORE AFTER")),
    }
    Ok(ExitCode::SUCCESS)
}

/// What comes with kvatlas, and these files.
pub fn profiles(files: &[PathBuf]) -> Result<Profiles, Failure> {
    let mut profiles = Profiles::shipped();
    for path in files {
        let text = read(path)?;
        let extended = profiles.extend(&path.display().to_string(), &text);
        // Whoever reads logs wants one line.
        extended.map_err(|error| Failure::usage(error.to_string().trim().replace('\n', " ")))?;
    }
    Ok(profiles)
}

fn from_rows(args: &CalibrateArgs, path: &Path) -> Result<(), Failure> {
    let parsed = csv::parse(&read(path)?).map_err(|error| Failure::config(path, &error.to_string()))?;
    let fitted = fit(&parsed.rows).map_err(|error| Failure::config(path, &error.to_string()))?;
    for (line, what) in &parsed.bad {
        output::note(&format!("{}: line {line} is left out: {what}", path.display()));
    }
    if args.json {
        output::json(&fit_json(&fitted, parsed.skipped));
        return Ok(());
    }
    show_profile(args, &fitted.cost, &format!("{} rows of {}", fitted.rows, path.display()));
    let mut table = output::table(&["prompt tokens", "rows", "mean error", "bias"]);
    for bucket in &fitted.buckets {
        table.add_row([
            format!("{} to {}", bucket.from_tokens, bucket.from_tokens * 2 - 1),
            bucket.rows.to_string(),
            percent(bucket.mape),
            format!("{:+.1} %", bucket.bias * 100.0),
        ]);
    }
    output::note(&table.to_string());
    let (mean, most) = (percent(fitted.mape), percent(fitted.max_error));
    output::note(&format!(
        "{} rows, {} left out: mean error {mean}, largest {most}",
        fitted.rows, parsed.skipped
    ));
    Ok(())
}

fn from_metrics(args: &CalibrateArgs, before: &Path, after: &Path) -> Result<(), Failure> {
    let profiles = profiles(&args.cost_profiles)?;
    let base = profiles.engine(&args.base);
    let base = base.ok_or_else(|| Failure::usage(format!("there is no engine profile {:?}", args.base)))?;
    let scaled = metrics::scale(&read(before)?, &read(after)?, &base.prefill);
    let scaled = scaled.map_err(|error| Failure::config(after, &error.to_string()))?;
    if args.json {
        output::json(&scale_json(&scaled));
        return Ok(());
    }
    let source = format!("{} times {}, from metrics", round(scaled.factor), base.name);
    show_profile(args, &scaled.cost, &source);
    output::note(&format!(
        "{:.0} requests of {:.0} tokens ({:.0} cached) took {:.1} ms on average: {:.2} times {} (within {})",
        scaled.requests,
        scaled.mean_prompt_tokens,
        scaled.mean_cached_tokens,
        scaled.mean_ms,
        scaled.factor,
        base.name,
        percent(scaled.uncertainty)
    ));
    scaled.remarks.iter().for_each(|remark| output::note(remark));
    Ok(())
}

/// The profile on standard output, so that it can be redirected into a file.
fn show_profile(args: &CalibrateArgs, cost: &PrefillCost, source: &str) {
    let text = |text: &str| Value::from(text).to_string();
    let models: Vec<String> = args.models.iter().map(|model| text(model)).collect();
    output::line("[[engine]]");
    output::line(&format!("name = {}", text(&args.name)));
    output::line(&format!("models = [{}]", models.join(", ")));
    output::line(&format!(
        "prefill = {{ c0_ms = {}, c1_ms_per_token = {}, c2_ms_per_token2 = {} }}",
        number(cost.c0_ms),
        number(cost.c1_ms_per_token),
        number(cost.c2_ms_per_token2)
    ));
    output::line("# Measure the time of a decode step and put it here.");
    output::line("decode = { base_ms = 20.0, per_request_ms = 0.1 }");
    output::line(&format!("source = {}", text(source)));
}

fn fit_json(fit: &Fit, skipped: usize) -> Value {
    json!({
        "c0_ms": fit.cost.c0_ms,
        "c1_ms_per_token": fit.cost.c1_ms_per_token,
        "c2_ms_per_token2": fit.cost.c2_ms_per_token2,
        "rows": fit.rows,
        "skipped": skipped,
        "mape": fit.mape,
        "max_error": fit.max_error,
        "buckets": fit.buckets.iter().map(|bucket| json!({
            "from_tokens": bucket.from_tokens, "rows": bucket.rows, "mape": bucket.mape, "bias": bucket.bias,
        })).collect::<Vec<_>>(),
    })
}

fn scale_json(scale: &Scale) -> Value {
    json!({
        "factor": scale.factor,
        "uncertainty": scale.uncertainty,
        "requests": scale.requests,
        "mean_prompt_tokens": scale.mean_prompt_tokens,
        "mean_cached_tokens": scale.mean_cached_tokens,
        "mean_ms": scale.mean_ms,
        "c0_ms": scale.cost.c0_ms,
        "c1_ms_per_token": scale.cost.c1_ms_per_token,
        "c2_ms_per_token2": scale.cost.c2_ms_per_token2,
        "remarks": scale.remarks,
    })
}

fn read(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path).map_err(|error| Failure::unreadable(path, &error))
}

/// A number as TOML writes one that is not whole.
fn number(value: f64) -> String {
    if value == 0.0 { "0.0".to_owned() } else { format!("{value:.4e}") }
}

fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}
