//! `kvatlas`: one binary, one sub-command per role.

#![allow(unreachable_pub, reason = "in a binary, pub between modules is the plain word")]

mod bench;
mod calibrate;
mod cluster;
mod connect;
mod demo;
mod engine;
mod failure;
mod lease;
mod nats_permissions;
mod output;
mod plan;
mod query;
mod record;
mod replay;
mod serve;
mod settings;
mod sim;

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::failure::Failure;
use crate::settings::{LogFormat, LogSettings, Settings};

/// The live map of where every KV-cache block of an LLM cluster is.
#[derive(Parser)]
#[command(version, max_term_width = 110)]
struct Cli {
    #[command(flatten)]
    log: LogSettings,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the index server: alone over NATS, or with the shims of some engines in one process.
    Serve(Box<Settings>),
    /// Run the publisher shim of one or more engines; needs --nats.
    Shim(Box<Settings>),
    /// Ask a running server.
    Query(query::QueryArgs),
    /// Ask a running server where a prompt would best be served: who prefills, who decodes, which blocks move, and why.
    Plan(Box<plan::PlanArgs>),
    /// Make an engine profile from measured prefill times, and say how well it fits.
    Calibrate(calibrate::CalibrateArgs),
    /// Print what a NATS server must allow a shim, an index server or an observer, for its configuration.
    NatsPermissions(nats_permissions::PermissionsArgs),
    /// See or change which servers own which shards of the key space.
    Cluster(cluster::ClusterArgs),
    /// Show kvatlas at work on simulated engines: no GPU, no broker, no cluster.
    Demo(demo::DemoArgs),
    /// Record what live engines publish into a file that `kvatlas replay` plays, for example for a bug report.
    Record(record::RecordArgs),
    /// Play recorded engine streams through the real path, and check the answers against the engine's own state.
    Replay(replay::ReplayArgs),
    /// Measure a part of kvatlas on this machine.
    Bench(bench::BenchArgs),
    /// Simulate the protocol under faults, or a fleet of thousands of pods, in virtual time.
    Sim(sim::SimArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = init_logs(&cli.log).and_then(|()| {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Failure::run)?;
        let outcome = runtime.block_on(run(cli.command));
        // Blocked system calls must not hold the exit up.
        runtime.shutdown_timeout(std::time::Duration::from_millis(200));
        outcome
    });
    match outcome {
        Ok(code) => code,
        Err(failure) => {
            // Standard error may be closed; there is nobody else to tell.
            let _ = writeln!(std::io::stderr(), "kvatlas: {failure}");
            ExitCode::from(failure.exit_code)
        }
    }
}

async fn run(command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Serve(settings) => serve::serve(settings.load()?).await,
        Command::Shim(settings) => serve::shim(settings.load()?).await,
        Command::Query(args) => query::run(args).await,
        Command::Plan(args) => plan::run(*args).await,
        Command::Calibrate(args) => calibrate::run(&args),
        Command::NatsPermissions(args) => nats_permissions::run(&args),
        Command::Cluster(args) => cluster::run(args).await,
        Command::Demo(args) => demo::run(args).await,
        Command::Record(args) => record::run(args).await,
        Command::Replay(args) => replay::run(args).await,
        Command::Bench(args) => bench::run(args).await,
        Command::Sim(args) => sim::run(&args),
    }
}

fn init_logs(settings: &LogSettings) -> Result<(), Failure> {
    let filter = EnvFilter::try_new(&settings.log)
        .map_err(|error| Failure::usage(format!("--log {:?}: {error}", settings.log)))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match settings.log_format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed_and_every_flag_is_documented() {
        let mut command = Cli::command();
        command.build();
        command.clone().debug_assert();
        let mut undocumented = Vec::new();
        let mut stack = vec![command];
        while let Some(command) = stack.pop() {
            stack.extend(command.get_subcommands().filter(|sub| sub.get_name() != "help").cloned());
            for argument in command.get_arguments() {
                if argument.get_help().is_none() {
                    undocumented.push(format!("{} {}", command.get_name(), argument.get_id()));
                }
            }
        }
        assert!(undocumented.is_empty(), "{undocumented:?}");
    }
}
