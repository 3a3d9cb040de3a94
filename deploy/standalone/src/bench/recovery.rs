//! `kvatlas bench recovery`: how fast the map is true again after restarts and losses, with real parts.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum, value_parser};
use kvatlas_loadtest::recovery::processes::find_nats_server;
use kvatlas_loadtest::recovery::{Case, CaseReport, RecoveryConfig, run as run_case};

use crate::failure::Failure;
use crate::output;

/// Arguments of `bench recovery`.
#[derive(Args)]
pub struct RecoveryArgs {
    /// Print one JSON object a case instead of lines for people.
    #[arg(long)]
    json: bool,
    /// What to measure; may be given several times. Default: everything (about five minutes).
    #[arg(long = "case", value_enum, value_name = "CASE")]
    cases: Vec<CaseName>,
    /// Blocks that the simulated fleet holds.
    #[arg(long, default_value_t = 1_000_000, value_name = "BLOCKS", value_parser = value_parser!(u32).range(100_000..=100_000_000))]
    blocks: u32,
    /// Simulated engines.
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = value_parser!(u16).range(1..=1_000))]
    engines: u16,
    /// Traffic of the restart cases: blocks stored a second by the fleet, with as many evicted.
    #[arg(long, default_value_t = 5_000, value_name = "BLOCKS")]
    rate: u32,
    /// Age of the checkpoint when the index is killed, seconds.
    #[arg(long, default_value_t = 55, value_name = "SECONDS", value_parser = value_parser!(u16).range(1..=600))]
    checkpoint_age_s: u16,
    /// Traffic of the loss case: blocks stored a second by the fleet, with as many evicted.
    #[arg(long, default_value_t = 50_000, value_name = "BLOCKS")]
    loss_rate: u32,
    /// Share of messages that the loss case loses, percent.
    #[arg(long, default_value_t = 5.0, value_name = "PERCENT")]
    loss_percent: f64,
    /// How long it loses them, seconds.
    #[arg(long, default_value_t = 60, value_name = "SECONDS", value_parser = value_parser!(u16).range(1..=3_600))]
    seconds: u16,
    /// Routing decisions; the index is killed in the middle.
    #[arg(long, default_value_t = 1_958, value_name = "N", value_parser = value_parser!(u32).range(10..=100_000))]
    decisions: u32,
    /// Seed of everything that is random.
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// The nats-server program. Default: $KVATLAS_NATS_SERVER, else target/tools/nats-server, else the one in PATH.
    #[arg(long, value_name = "PATH")]
    nats_server: Option<PathBuf>,
}

/// A case as the command line names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum CaseName {
    /// kill -9 of the index under load, then a start with a checkpoint.
    RestartWarm,
    /// The same without a checkpoint.
    RestartCold,
    /// Random loss of messages on the bus under load.
    BusLoss,
    /// Routing decisions with a kill -9 of the index in the middle, with a checkpoint.
    RoutingRestart,
    /// The same without a checkpoint.
    RoutingRestartCold,
    /// What digests cost at shim and index.
    DigestUpkeep,
}

/// Runs `bench recovery`. The exit code says whether every goal was met.
pub async fn run(args: &RecoveryArgs) -> Result<ExitCode, Failure> {
    let kvatlas = std::env::current_exe().map_err(Failure::run)?;
    let nats_server = find_nats_server(args.nats_server.as_deref()).ok_or_else(|| {
        Failure::usage("there is no nats-server: run scripts/provision, or name one with --nats-server PATH")
    })?;
    let config = RecoveryConfig {
        engines: args.engines.into(),
        blocks: args.blocks as usize,
        blocks_per_s: args.rate.into(),
        checkpoint_age: Duration::from_secs(args.checkpoint_age_s.into()),
        loss_blocks_per_s: args.loss_rate.into(),
        loss: args.loss_percent / 100.0,
        loss_time: Duration::from_secs(args.seconds.into()),
        decisions: args.decisions as usize,
        seed: args.seed,
        ..RecoveryConfig::new(kvatlas, nats_server)
    };
    let mut ok = true;
    for case in Case::ALL {
        if !args.cases.is_empty() && !args.cases.iter().any(|name| name.case() == case) {
            continue;
        }
        let report = run_case(case, &config).await.map_err(Failure::run)?;
        ok &= report.ok;
        if args.json { output::json(&report) } else { print(&report) }
    }
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(report: &CaseReport) {
    let fields = serde_json::to_value(report).expect("plain data serialises");
    let verdict = if report.ok { "goal met" } else { "GOAL MISSED" };
    output::line(&format!("{} ({verdict})", report.case));
    for (name, value) in fields.as_object().into_iter().flatten() {
        if !value.is_null() && name != "case" && name != "ok" {
            output::line(&format!("  {name:24} {value}"));
        }
    }
}

// === impl CaseName ===

impl CaseName {
    fn case(self) -> Case {
        match self {
            Self::RestartWarm => Case::RestartWarm,
            Self::RestartCold => Case::RestartCold,
            Self::BusLoss => Case::BusLoss,
            Self::RoutingRestart => Case::RoutingRestart,
            Self::RoutingRestartCold => Case::RoutingRestartCold,
            Self::DigestUpkeep => Case::DigestUpkeep,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_names_every_case_as_reports_do() {
        for (name, case) in CaseName::value_variants().iter().zip(Case::ALL) {
            assert_eq!(name.case(), case);
            assert_eq!(name.to_possible_value().unwrap().get_name(), case.name());
        }
        assert_eq!(CaseName::value_variants().len(), Case::ALL.len());
    }
}
