//! `kvatlas sim`: the protocol under faults, how large a deployment can be, and which routing policy serves a trace best.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand, value_parser};
use kvatlas_loadtest::sim::{self, Counts, Sabotage, Totals, generate, run_seeds};
use serde::Serialize;

use crate::failure::Failure;
use crate::output;

mod routing;
mod scale;

/// How long a failing scenario is made smaller.
const SHRINK: Duration = Duration::from_secs(30);
/// Seeds that are run if nothing else is said.
const DEFAULT_SEEDS: u64 = 1_000;

/// Arguments of `sim`.
#[derive(Args)]
pub struct SimArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Engines, shims and indexes that lose messages, are killed and get torn files: at no moment may an index claim
    /// what is not so, and once faults stop, all of them must be exact. Where the key space is cut, indexes own parts of it,
    /// which change. Exit code 1 if a seed shows otherwise.
    Faults(FaultsArgs),
    /// A fleet's blocks, events and queries through the real code, on one machine, and what follows for 10,000 pods: servers,
    /// memory, bytes on the bus, and how evenly they are spread, against other ways of sharding.
    Scale(scale::ScaleArgs),
    /// A fleet of engines in virtual time: a recorded or made-up trace under several routing policies, with the real index and
    /// planner behind those that ask them. Equal arguments give equal results.
    Routing(Box<routing::RoutingArgs>),
}

#[derive(Args)]
struct FaultsArgs {
    /// How many seeds to run (default 1000, or without end where --seconds is given).
    #[arg(long, value_name = "COUNT", value_parser = value_parser!(u64).range(1..))]
    seeds: Option<u64>,
    /// The first seed.
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    first_seed: u64,
    /// Run only this seed and print its scenario.
    #[arg(long, value_name = "SEED", conflicts_with_all = ["seeds", "first_seed", "seconds"])]
    seed: Option<u64>,
    /// Cut the key space into this many shards; without it, the seeds say: half of them do not cut it.
    #[arg(long, value_name = "COUNT", value_parser = value_parser!(u32).range(1..=16))]
    shards: Option<u32>,
    /// With --seed: print everything that happens.
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Stop after this time, seconds.
    #[arg(long, value_name = "SECONDS", value_parser = value_parser!(u64).range(1..=86_400))]
    seconds: Option<u64>,
    /// Print one JSON object instead of lines for people.
    #[arg(long)]
    json: bool,
}

/// What one or many simulations amounted to.
#[derive(Debug, Serialize)]
struct FaultsReport<'a> {
    case: &'static str,
    seeds: u64,
    operations: u64,
    operations_by_kind: &'a BTreeMap<&'static str, u64>,
    engine_messages: u64,
    frames: u64,
    bytes: u64,
    damaged_messages: u64,
    gaps: u64,
    divergences: u64,
    repairs: &'a BTreeMap<&'static str, u64>,
    files_loaded: u64,
    files_refused: u64,
    checks: u64,
    score_checks: u64,
    partial_scores: u64,
    found_out: u64,
    /// From the end of all faults, where no lease and no timeout had to be waited for.
    max_virtual_seconds_to_exact: f64,
    slowest_seed: u64,
    /// The same where one had.
    max_virtual_seconds_to_exact_with_lease: f64,
    slowest_seed_with_lease: u64,
    wall_seconds: f64,
    /// Equal wherever the same seeds were run.
    log_hash: String,
    failed_seed: Option<u64>,
    failure: Option<String>,
}

/// Runs `sim`.
pub fn run(args: &SimArgs) -> Result<ExitCode, Failure> {
    match &args.what {
        What::Faults(args) => Ok(faults(args)),
        What::Scale(args) => scale::run(args),
        What::Routing(args) => routing::run(args),
    }
}

fn faults(args: &FaultsArgs) -> ExitCode {
    let started = Instant::now();
    let totals = match args.seed {
        Some(seed) => one(seed, args),
        None => many(args),
    };
    let report = FaultsReport::of(&totals, started.elapsed());
    if args.json {
        output::json(&report);
    } else {
        report.print();
    }
    let Some(failed) = &totals.failed else { return ExitCode::SUCCESS };
    output::note(&failed.to_string());
    ExitCode::FAILURE
}

fn many(args: &FaultsArgs) -> Totals {
    let started = Instant::now();
    let most = args.seeds.unwrap_or(if args.seconds.is_some() { u64::MAX } else { DEFAULT_SEEDS });
    let time = args.seconds.map(Duration::from_secs);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut shrinking = None;
    run_seeds(
        args.first_seed,
        args.shards,
        threads,
        Sabotage::None,
        |begun| begun < most && time.is_none_or(|time| started.elapsed() < time),
        || shrinking.get_or_insert_with(Instant::now).elapsed() < SHRINK,
    )
}

fn one(seed: u64, args: &FaultsArgs) -> Totals {
    let scenario = generate(seed, args.shards);
    // What is printed as JSON stays one object.
    let say = if args.json { output::note } else { output::line };
    say(scenario.to_string().trim_end());
    if args.trace {
        sim::run(&scenario, Sabotage::None, true).lines.iter().for_each(|line| say(line));
    }
    let mut shrinking = None;
    run_seeds(
        seed,
        args.shards,
        1,
        Sabotage::None,
        |begun| begun == 0,
        || shrinking.get_or_insert_with(Instant::now).elapsed() < SHRINK,
    )
}

// === impl FaultsReport ===

impl<'a> FaultsReport<'a> {
    fn of(totals: &'a Totals, wall: Duration) -> Self {
        let counts: &Counts = &totals.counts;
        Self {
            case: "faults",
            seeds: totals.seeds,
            operations: counts.operations.values().sum(),
            operations_by_kind: &counts.operations,
            engine_messages: counts.engine_messages,
            frames: counts.frames,
            bytes: counts.bytes,
            damaged_messages: counts.damaged,
            gaps: counts.gaps,
            divergences: counts.divergences,
            repairs: &counts.repairs,
            files_loaded: counts.files_loaded,
            files_refused: counts.files_refused,
            checks: counts.checks,
            score_checks: counts.score_checks,
            partial_scores: counts.partial_scores,
            found_out: counts.found_out,
            max_virtual_seconds_to_exact: totals.slowest.exact_ms as f64 / 1e3,
            slowest_seed: totals.slowest.seed,
            max_virtual_seconds_to_exact_with_lease: totals.slowest_with_lease.exact_ms as f64 / 1e3,
            slowest_seed_with_lease: totals.slowest_with_lease.seed,
            wall_seconds: (wall.as_secs_f64() * 1e3).round() / 1e3,
            log_hash: format!("{:016x}", totals.log_hash),
            failed_seed: totals.failed.as_ref().map(|report| report.seed),
            failure: totals.failed.as_ref().map(|report| report.failure.to_string()),
        }
    }

    fn print(&self) {
        let list = |entries: &BTreeMap<&str, u64>| {
            entries.iter().map(|(kind, count)| format!("{kind} {count}")).collect::<Vec<_>>().join(", ")
        };
        output::line(&format!(
            "{} seeds with {} operations in {} s, {} comparisons: {}",
            self.seeds,
            self.operations,
            self.wall_seconds,
            self.checks,
            if self.failure.is_none() { "nothing wrong" } else { "FAILED" }
        ));
        output::line(&format!("operations: {}", list(self.operations_by_kind)));
        output::line(&format!(
            "gaps {}, divergences {}, damaged messages {}, files loaded {} and refused {}; repairs: {}",
            self.gaps,
            self.divergences,
            self.damaged_messages,
            self.files_loaded,
            self.files_refused,
            list(self.repairs)
        ));
        output::line(&format!(
            "longest virtual time from the end of faults until exact: {} s (seed {}), with leases and timeouts {} s (seed {})",
            self.max_virtual_seconds_to_exact,
            self.slowest_seed,
            self.max_virtual_seconds_to_exact_with_lease,
            self.slowest_seed_with_lease
        ));
    }
}
