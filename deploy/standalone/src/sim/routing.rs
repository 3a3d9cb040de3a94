//! `kvatlas sim routing`: which routing policy serves a trace best.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, value_parser};
use indicatif::{ProgressBar, ProgressStyle};
use kvatlas_loadtest::routing::{
    self, Fleet, HardwareConfig, Pace, Policy, Shape, StudyReport, Trace, TraceOptions, plots, synthesis,
    trace::read_trace,
};
use serde::Serialize;

use crate::failure::Failure;
use crate::output;

/// Beginning of the names of made-up traces.
const SYNTHETIC: &str = "synth:";
/// Loads at most in one command: each runs every policy.
const MAX_LOADS: usize = 32;
/// Time between two pictures of the progress bar.
const REDRAW: Duration = Duration::from_millis(200);

/// Arguments of `sim routing`.
#[derive(Args)]
pub struct RoutingArgs {
    /// A trace: Mooncake JSONL, Claude-Code JSONL or Azure CSV, plain, gzip or zstd; or synth:zipf, synth:agents, synth:chat.
    #[arg(long, value_name = "FILE")]
    trace: String,
    /// Policies, separated by commas: random, round-robin, least-load, session, approximate, overlap, llm-d, dynamo, local,
    /// global, ours; or all.
    #[arg(long, value_name = "NAMES", default_value = "all", value_parser = parse_policies)]
    policy: Policies,
    /// How many times as fast as recorded requests come; several are separated by commas.
    #[arg(long, value_name = "FACTORS", default_value = "1", value_parser = parse_loads)]
    load: Loads,
    /// Engines that prefill and decode.
    #[arg(long, value_name = "COUNT", default_value_t = 4, conflicts_with_all = ["prefill", "decode"])]
    engines: u32,
    /// Engines that only prefill; with --decode.
    #[arg(long, value_name = "COUNT", requires = "decode")]
    prefill: Option<u32>,
    /// Engines that only decode; with --prefill.
    #[arg(long, value_name = "COUNT", requires = "prefill")]
    decode: Option<u32>,
    /// Model, for the size of its KV cache.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Engine profile, as in docs/cost-model.md, or modelled/h100-tp8 (the default), which is made for long prompts.
    #[arg(long, value_name = "NAME")]
    profile: Option<String>,
    /// Tokens that fit the GPUs of one engine.
    #[arg(long, value_name = "TOKENS")]
    gpu_tokens: Option<u64>,
    /// Tokens that fit its host memory; 0 for no such tier.
    #[arg(long, value_name = "TOKENS")]
    cpu_tokens: Option<u64>,
    /// Tokens that fit its disk.
    #[arg(long, value_name = "TOKENS")]
    ssd_tokens: Option<u64>,
    /// Most tokens of one step of an engine.
    #[arg(long, value_name = "TOKENS", value_parser = value_parser!(u32).range(16..=1_048_576))]
    max_batched_tokens: Option<u32>,
    /// Most requests of one step of an engine.
    #[arg(long, value_name = "COUNT", value_parser = value_parser!(u32).range(1..=65_536))]
    max_seqs: Option<u32>,
    /// Speed between two engines, GB/s. Default: 45 in racks of eight engines, 10 between them.
    #[arg(long, value_name = "GB_PER_S")]
    link_gb_per_s: Option<f64>,
    /// Only so many requests of the beginning (whole conversations).
    #[arg(long, value_name = "COUNT")]
    limit: Option<usize>,
    /// Tokens of a block; a divisor of what the trace has.
    #[arg(long, value_name = "TOKENS", value_parser = value_parser!(u32).range(1..=65_536))]
    block_tokens: Option<u32>,
    /// Where the starts of conversations are not recorded: time between two at load 1, on average, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0)]
    conversation_gap_s: f64,
    /// How long after it happened a change of a cache is in the index, milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 5)]
    lag_ms: u64,
    /// Where all chance comes from.
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    seed: u64,
    /// Print one JSON object instead of tables for people.
    #[arg(long)]
    json: bool,
    /// Write charts (SVG) into this folder.
    #[arg(long, value_name = "FOLDER")]
    plots: Option<PathBuf>,
}

#[derive(Clone)]
struct Policies(Vec<Policy>);

#[derive(Clone)]
struct Loads(Vec<f64>);

/// The study and how long it took.
#[derive(Serialize)]
struct Timed<'a> {
    #[serde(flatten)]
    report: &'a StudyReport,
    wall_seconds: f64,
}

/// Runs `sim routing`.
pub fn run(args: &RoutingArgs) -> Result<ExitCode, Failure> {
    let started = Instant::now();
    let options = TraceOptions { limit: args.limit, block_tokens: args.block_tokens };
    let trace = match args.trace.strip_prefix(SYNTHETIC) {
        Some(name) => synthesis::synthesise(name, options, args.seed),
        None => read_trace(Path::new(&args.trace), options),
    };
    let trace: Trace = trace.map_err(Failure::run)?;
    let shape = match (args.prefill, args.decode) {
        (Some(prefill), Some(decode)) => Shape::Apart { prefill, decode },
        _ => Shape::Together(args.engines),
    };
    let fleet = Fleet::new(shape, &args.hardware(), trace.block_tokens).map_err(Failure::run)?;
    let pace = Pace {
        load: 1.0,
        conversation_gap_s: args.conversation_gap_s.max(0.0),
        lag_us: args.lag_ms.saturating_mul(1_000),
        seed: args.seed,
    };
    let bar = bar();
    let mut on_progress = |progress: routing::Progress| {
        bar.set_length(progress.total);
        bar.set_position(progress.done);
        bar.set_message(format!("{} at load {}", progress.policy, progress.load));
    };
    let report = routing::study(&trace, &fleet, &args.policy.0, &args.load.0, pace, &mut on_progress);
    bar.finish_and_clear();
    let report = report.map_err(Failure::run)?;
    if let Some(folder) = &args.plots {
        for path in plots::write_plots(&report, folder).map_err(Failure::run)? {
            output::note(&format!("wrote {}", path.display()));
        }
    }
    if args.json {
        let wall_seconds = (started.elapsed().as_secs_f64() * 10.0).round() / 10.0;
        output::json(&Timed { report: &report, wall_seconds });
    } else {
        print(&report);
    }
    Ok(ExitCode::SUCCESS)
}

/// On standard error, and only if that is a terminal.
fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{wide_bar} {percent:>3} %, {eta} left, {msg}")
        .expect("the template is constant")
        .progress_chars("=> ");
    let bar = ProgressBar::new(0).with_style(style);
    bar.enable_steady_tick(REDRAW);
    bar
}

fn parse_policies(text: &str) -> Result<Policies, String> {
    Policy::parse_list(text).map(Policies).map_err(|error| error.to_string())
}

fn parse_loads(text: &str) -> Result<Loads, String> {
    let parse = |part: &str| part.trim().parse::<f64>().ok().filter(|load| *load > 0.0 && load.is_finite());
    let loads: Option<Vec<f64>> = text.split(',').map(parse).collect();
    let loads = loads.filter(|loads| loads.len() <= MAX_LOADS);
    loads
        .map(Loads)
        .ok_or_else(|| format!("{text:?}: give up to {MAX_LOADS} numbers above 0, separated by commas"))
}

// === impl RoutingArgs ===

impl RoutingArgs {
    fn hardware(&self) -> HardwareConfig {
        let base = HardwareConfig::default();
        HardwareConfig {
            model: self.model.clone().unwrap_or(base.model),
            profile: self.profile.clone().unwrap_or(base.profile),
            gpu_tokens: self.gpu_tokens.unwrap_or(base.gpu_tokens),
            cpu_tokens: self.cpu_tokens.unwrap_or(base.cpu_tokens),
            ssd_tokens: self.ssd_tokens.unwrap_or(base.ssd_tokens),
            max_batched_tokens: self.max_batched_tokens.unwrap_or(base.max_batched_tokens),
            max_seqs: self.max_seqs.unwrap_or(base.max_seqs),
            link_gb_per_s: self.link_gb_per_s.filter(|gb_per_s| *gb_per_s > 0.0),
        }
    }
}

fn print(report: &StudyReport) {
    let engines = match report.decode_engines {
        0 => format!("{} engines", report.prefill_engines),
        decode => format!("{} prefill and {decode} decode engines", report.prefill_engines),
    };
    output::line(&format!(
        "{}: {} requests, blocks of {} tokens, {engines} of {}, ideal hit {:.1} %",
        report.trace,
        report.requests,
        report.block_tokens,
        report.profile,
        report.ideal_hit_share * 100.0
    ));
    let mut table = output::table(&[
        "load",
        "policy",
        "TTFT mean s",
        "p50 s",
        "p99 s",
        "TPOT ms",
        "hit",
        "of ideal",
        "busiest/mean",
        "prefill share",
        "pulled GB",
        "loaded GB",
        "handed GB",
        "thrown out",
        "refused",
    ]);
    let percent = |share: f64| format!("{:.1} %", share * 100.0);
    let seconds = |ms: f64| format!("{:.3}", ms / 1e3);
    for row in &report.rows {
        table.add_row([
            row.load.to_string(),
            row.policy.to_owned(),
            seconds(row.ttft_mean_ms),
            seconds(row.ttft_p50_ms),
            seconds(row.ttft_p99_ms),
            format!("{:.1}", row.tpot_mean_ms),
            percent(row.hit_share),
            percent(row.hit_of_ideal),
            format!("{:.2}", row.busiest_to_mean),
            percent(row.prefill_share),
            format!("{:.0}", row.pulled_gb),
            format!("{:.0}", row.loaded_gb),
            format!("{:.0}", row.handed_gb),
            row.preemptions.to_string(),
            row.refused.to_string(),
        ]);
    }
    output::line(&table.to_string());
}
