//! `kvatlas bench`: how fast a part of kvatlas is on this machine.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand, value_parser};
use kvatlas_loadtest::bench_shim::{SEQUENCE_BLOCKS, ShimBench, ShimBenchError};
use serde::Serialize;

mod cluster;
mod plan;
mod recovery;

use crate::failure::Failure;
use crate::output;

/// Time of one round, at least. A round is long beside the clock's resolution and a pre-emption, and short enough
/// that a second has several.
const ROUND: Duration = Duration::from_millis(100);
/// Messages between two looks at the clock.
const SLICE_MESSAGES: u64 = 1_024;
/// Rounds at least, however short the time: fewer have no meaningful median.
const MIN_ROUNDS: usize = 3;

/// Arguments of `bench`.
#[derive(Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    part: Part,
}

#[derive(Subcommand)]
enum Part {
    /// The publisher shim: an engine's raw event payloads in, encoded frames out, on one thread.
    Shim(ShimArgs),
    /// Restarts and losses with real parts: seconds until the map is exact again, and whether an answer was ever wrong.
    Recovery(recovery::RecoveryArgs),
    /// A plan for a large fleet: who prefills, who decodes, which blocks move. On one thread.
    Plan(plan::PlanArgs),
    /// Many servers as one index: faults, equal answers, another number of servers, with real processes.
    Cluster(cluster::ClusterArgs),
}

#[derive(Args)]
struct ShimArgs {
    /// Print one JSON object instead of lines for people.
    #[arg(long)]
    json: bool,
    /// How long to measure, seconds, over both sizes of events.
    #[arg(long, value_name = "SECONDS", default_value_t = 6, value_parser = value_parser!(u64).range(1..=3_600))]
    seconds: u64,
    /// Blocks per event of the larger size.
    #[arg(long, value_name = "BLOCKS", default_value_t = 32, value_parser = value_parser!(u32).range(1..=i64::from(SEQUENCE_BLOCKS)))]
    event_blocks: u32,
}

/// What the shim's benchmark says. Rates are medians over rounds.
#[derive(Debug, Serialize)]
struct ShimReport {
    bench: &'static str,
    /// Blocks stored (each with one evicted), in events of `event_blocks`.
    blocks_per_s: u64,
    /// Messages that store a single block (and evict one).
    events_per_s_single: u64,
    event_blocks: u32,
    /// Bytes of frames per block stored and block evicted.
    bytes_per_block: f64,
    ns_per_block: f64,
    ns_per_single_event: f64,
}

/// One size of events.
struct Measured {
    ns_per_block: f64,
    bytes_per_block: f64,
}

/// Runs `bench`.
pub async fn run(args: BenchArgs) -> Result<ExitCode, Failure> {
    match &args.part {
        Part::Shim(args) => shim(args).map_err(Failure::run),
        Part::Recovery(args) => recovery::run(args).await,
        Part::Plan(args) => plan::run(args),
        Part::Cluster(args) => cluster::run(args).await,
    }
}

fn shim(args: &ShimArgs) -> Result<ExitCode, ShimBenchError> {
    let each = Duration::from_secs(args.seconds) / 2;
    let runs = measure_shim(args.event_blocks, each)?;
    let singles = measure_shim(1, each)?;
    let report = ShimReport {
        bench: "shim",
        blocks_per_s: per_second(runs.ns_per_block),
        events_per_s_single: per_second(singles.ns_per_block),
        event_blocks: args.event_blocks,
        bytes_per_block: tenths(runs.bytes_per_block),
        ns_per_block: tenths(runs.ns_per_block),
        ns_per_single_event: tenths(singles.ns_per_block),
    };
    if args.json {
        output::json(&report);
    } else {
        print(&report);
    }
    Ok(ExitCode::SUCCESS)
}

fn measure_shim(event_blocks: u32, time: Duration) -> Result<Measured, ShimBenchError> {
    let mut bench = ShimBench::new(event_blocks)?;
    let mut rounds = Vec::new();
    let (mut frame_bytes, mut blocks) = (0, 0);
    let started = Instant::now();
    while rounds.len() < MIN_ROUNDS || started.elapsed() < time {
        let round = Instant::now();
        let mut stored = 0;
        while round.elapsed() < ROUND {
            let work = bench.play(SLICE_MESSAGES)?;
            stored += work.blocks;
            frame_bytes += work.frame_bytes;
        }
        rounds.push(round.elapsed().as_nanos() as f64 / stored as f64);
        blocks += stored;
    }
    rounds.sort_by(f64::total_cmp);
    Ok(Measured {
        ns_per_block: rounds[rounds.len() / 2],
        bytes_per_block: frame_bytes as f64 / blocks as f64,
    })
}

fn per_second(ns_each: f64) -> u64 {
    (1e9 / ns_each) as u64
}

fn tenths(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

fn print(report: &ShimReport) {
    output::line(&format!(
        "shim, events of {} blocks: {} blocks/s ({} ns and {} frame bytes per block stored and one evicted)",
        report.event_blocks, report.blocks_per_s, report.ns_per_block, report.bytes_per_block,
    ));
    output::line(&format!(
        "shim, events of 1 block: {} events/s ({} ns per event)",
        report.events_per_s_single, report.ns_per_single_event,
    ));
}
