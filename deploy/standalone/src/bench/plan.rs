//! `kvatlas bench plan`: how long it takes to choose a prefill pod, a decode pod and a source of every block.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, value_parser};
use kvatlas_loadtest::bench_plan::{PlanBench, PlanBenchConfig};
use serde::Serialize;

use crate::failure::Failure;
use crate::output;

/// Arguments of `bench plan`.
#[derive(Args)]
pub struct PlanArgs {
    /// Print one JSON object a line instead of a table.
    #[arg(long)]
    json: bool,
    /// Pods that prefill, and as many that decode.
    #[arg(long, default_value_t = 200, value_parser = value_parser!(u32).range(1..=2_048))]
    pods: u32,
    /// Blocks of the prompt.
    #[arg(long, default_value_t = 2_000, value_parser = value_parser!(u32).range(1..=65_536))]
    blocks: u32,
    /// Plans of each fleet.
    #[arg(long, default_value_t = 1_000, value_parser = value_parser!(u32).range(10..=1_000_000))]
    plans: u32,
    /// Decides who holds how much and who is how busy.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// One fleet.
#[derive(Serialize)]
struct PlanReport {
    bench: &'static str,
    /// Whether pods send and receive differently much: then no two are alike.
    transfers: &'static str,
    prefill: u32,
    decode: u32,
    blocks: u32,
    plans: u32,
    median_us: f64,
    p99_us: f64,
    least_us: f64,
}

/// Runs `bench plan`.
pub fn run(args: &PlanArgs) -> Result<ExitCode, Failure> {
    let mut table = output::table(&["transfers", "prefill x decode", "blocks", "least", "median", "p99"]);
    for varied in [false, true] {
        let report = measure(args, varied)?;
        if args.json {
            output::json(&report);
        } else {
            let us = |us: f64| format!("{us:.0} us");
            table.add_row([
                report.transfers.to_owned(),
                format!("{} x {}", report.prefill, report.decode),
                report.blocks.to_string(),
                us(report.least_us),
                us(report.median_us),
                us(report.p99_us),
            ]);
        }
    }
    if !args.json {
        output::line(&table.to_string());
    }
    Ok(ExitCode::SUCCESS)
}

fn measure(args: &PlanArgs, varied: bool) -> Result<PlanReport, Failure> {
    let pods = args.pods as usize;
    let config =
        PlanBenchConfig { prefill: pods, decode: pods, blocks: args.blocks, varied, seed: args.seed };
    let mut bench = PlanBench::new(config).map_err(Failure::run)?;
    let mut times: Vec<Duration> = Vec::with_capacity(args.plans as usize);
    for _ in 0..args.plans {
        let start = Instant::now();
        std::hint::black_box(bench.plan().map_err(Failure::run)?);
        times.push(start.elapsed());
    }
    times.sort_unstable();
    let at = |share: f64| {
        let time = times[((times.len() - 1) as f64 * share) as usize];
        (time.as_secs_f64() * 1e7).round() / 10.0
    };
    Ok(PlanReport {
        bench: "plan",
        transfers: if varied { "different" } else { "equal" },
        prefill: args.pods,
        decode: args.pods,
        blocks: args.blocks,
        plans: args.plans,
        median_us: at(0.5),
        p99_us: at(0.99),
        least_us: at(0.0),
    })
}
