//! `kvatlas bench cluster`: many servers as one index, with real processes on this machine.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum, value_parser};
use kvatlas_loadtest::cluster::faults::Fault;
use kvatlas_loadtest::cluster::{Case, CaseReport, ClusterConfig, run as run_case};
use kvatlas_loadtest::recovery::processes::find_nats_server;
use serde_json::Value;

use crate::failure::Failure;
use crate::output;

/// Arguments of `bench cluster`.
#[derive(Args)]
pub struct ClusterArgs {
    /// Print one JSON object a case instead of lines for people.
    #[arg(long)]
    json: bool,
    /// What to measure; may be given several times. Default: everything.
    #[arg(long = "case", value_enum, value_name = "CASE")]
    cases: Vec<CaseName>,
    /// The faults of the case of that name; may be given several times. Default: all.
    #[arg(long = "fault", value_enum, value_name = "FAULT")]
    faults: Vec<FaultName>,
    /// Smaller and shorter: for a look, not for figures.
    #[arg(long)]
    quick: bool,
    /// Virtual shards.
    #[arg(long, default_value_t = 64, value_name = "SHARDS", value_parser = value_parser!(u32).range(2..=1_024))]
    shards: u32,
    /// Servers that the shards are divided among.
    #[arg(long, default_value_t = 4, value_name = "SERVERS", value_parser = value_parser!(u32).range(1..=64))]
    servers: u32,
    /// Replicas of each server, where the case does not say otherwise.
    #[arg(long, default_value_t = 2, value_name = "REPLICAS", value_parser = value_parser!(u32).range(1..=8))]
    replicas: u32,
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
    /// All servers give the same bytes.
    Equal,
    /// Processes killed, brokers cut off and frozen, everything restarted in turn, under load.
    Faults,
    /// One server more, under load.
    Resize,
    /// How evenly servers share the work when all prompts begin alike.
    Skew,
    /// What each server has of the work, for several numbers of servers.
    Scaling,
    /// What an answer costs beside one server that has everything.
    Latency,
}

/// A fault as the command line names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum FaultName {
    /// kill -9 of a shard server.
    ServerKilled,
    /// kill -9 of a broker.
    BrokerKilled,
    /// kill -9 of a shim.
    ShimKilled,
    /// A broker cut off from everybody.
    BrokerCut,
    /// A broker that hangs.
    BrokerFrozen,
    /// Everything restarted in turn.
    Rolling,
}

/// Runs `bench cluster`. The exit code says whether every goal was met.
pub async fn run(args: &ClusterArgs) -> Result<ExitCode, Failure> {
    let kvatlas = std::env::current_exe().map_err(Failure::run)?;
    let nats_server = find_nats_server(args.nats_server.as_deref()).ok_or_else(|| {
        Failure::usage("there is no nats-server: run scripts/provision, or name one with --nats-server PATH")
    })?;
    let mut config = ClusterConfig::new(kvatlas, nats_server);
    if args.quick {
        config = config.quick();
    }
    if !args.faults.is_empty() {
        config.faults = args.faults.iter().map(|name| name.fault()).collect();
    }
    let (shards, servers, replicas, seed) = (args.shards, args.servers, args.replicas, args.seed);
    let config = ClusterConfig { shards, servers, replicas, seed, ..config };
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
    let verdict = if report.ok { "goals met" } else { "A GOAL IS MISSED" };
    output::line(&format!("{} ({verdict})", report.case));
    print_fields(&fields, 1);
}

/// A line a value; what is inside a value is set in.
fn print_fields(fields: &Value, depth: usize) {
    let indent = "  ".repeat(depth);
    for (name, value) in fields.as_object().into_iter().flatten() {
        match value {
            Value::Null => {}
            _ if depth == 1 && (name == "case" || name == "ok") => {}
            Value::Object(_) => {
                output::line(&format!("{indent}{name}"));
                print_fields(value, depth + 1);
            }
            Value::Array(items) if items.iter().any(Value::is_object) => {
                output::line(&format!("{indent}{name}"));
                for item in items {
                    print_fields(item, depth + 1);
                    output::line("");
                }
            }
            _ => output::line(&format!("{indent}{name:24} {value}")),
        }
    }
}

// === impl CaseName ===

impl CaseName {
    fn case(self) -> Case {
        match self {
            Self::Equal => Case::Equal,
            Self::Faults => Case::Faults,
            Self::Resize => Case::Resize,
            Self::Skew => Case::Skew,
            Self::Scaling => Case::Scaling,
            Self::Latency => Case::Latency,
        }
    }
}

// === impl FaultName ===

impl FaultName {
    fn fault(self) -> Fault {
        match self {
            Self::ServerKilled => Fault::ServerKilled,
            Self::BrokerKilled => Fault::BrokerKilled,
            Self::ShimKilled => Fault::ShimKilled,
            Self::BrokerCut => Fault::BrokerCut,
            Self::BrokerFrozen => Fault::BrokerFrozen,
            Self::Rolling => Fault::Rolling,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_names_every_case_and_fault_as_reports_do() {
        for (name, case) in CaseName::value_variants().iter().zip(Case::ALL) {
            assert_eq!(name.case(), case);
            assert_eq!(name.to_possible_value().unwrap().get_name(), case.name());
        }
        assert_eq!(CaseName::value_variants().len(), Case::ALL.len());
        for (name, fault) in FaultName::value_variants().iter().zip(Fault::ALL) {
            assert_eq!(name.fault(), fault);
            assert_eq!(name.to_possible_value().unwrap().get_name(), fault.name());
        }
        assert_eq!(FaultName::value_variants().len(), Fault::ALL.len());
    }
}
