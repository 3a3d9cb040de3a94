//! `kvatlas demo`: the first command of the README.

use std::net::SocketAddr;
use std::process::ExitCode;

use clap::Args;
use kvatlas_loadtest::demo::{BLOCK_SIZE, Demo, DemoConfig, DemoProgress, DemoReport, MODEL};
use kvatlas_loadtest::workload::WorkloadConfig;

use crate::failure::Failure;
use crate::output::{self, note};
use crate::serve::stop_signal;
use crate::settings::{DEFAULT_GRPC, DEFAULT_HTTP};

/// Steps in which progress is shown.
const PROGRESS_STEPS: usize = 10;
/// Blocks of the example query.
const EXAMPLE_BLOCKS: usize = 4;

/// Arguments of `demo`.
#[derive(Args)]
pub struct DemoArgs {
    /// Broker to use, for example nats://127.0.0.1:4222. Default: the in-process bus.
    #[arg(long, value_name = "URL")]
    nats: Option<String>,
    /// Exit after the run instead of staying up for queries.
    #[arg(long)]
    once: bool,
    /// Print the result as one JSON object.
    #[arg(long)]
    json: bool,
    /// Simulated engines per policy.
    #[arg(long, default_value_t = 4, value_name = "N")]
    engines: usize,
    /// KV-cache blocks of each engine.
    #[arg(long, default_value_t = 2_000, value_name = "BLOCKS")]
    engine_blocks: u32,
    /// Conversations in all.
    #[arg(long, default_value_t = 250, value_name = "N")]
    conversations: u32,
    /// Seed of the workload; the same seed gives the same requests.
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// Address of the gRPC service. Default: 127.0.0.1:7460, or a free port with --once.
    #[arg(long, value_name = "IP:PORT")]
    grpc_listen: Option<SocketAddr>,
    /// Address of metrics and health checks. Default: 127.0.0.1:7461, or none with --once.
    #[arg(long, value_name = "IP:PORT")]
    http_listen: Option<SocketAddr>,
}

/// Runs `demo`.
pub async fn run(args: DemoArgs) -> Result<ExitCode, Failure> {
    let stop = stop_signal()?;
    tokio::pin!(stop);
    let address = |given: Option<SocketAddr>, default: &str| {
        given.or_else(|| (!args.once).then(|| default.parse().expect("a valid default")))
    };
    let config = DemoConfig {
        engines: args.engines,
        engine_blocks: args.engine_blocks,
        workload: WorkloadConfig {
            conversations: args.conversations,
            system_prompts: 24,
            ..WorkloadConfig::default()
        },
        seed: args.seed,
        nats: args.nats.clone(),
        grpc_listen: address(args.grpc_listen, DEFAULT_GRPC)
            .unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0))),
        http_listen: address(args.http_listen, DEFAULT_HTTP),
    };
    let mut demo = Demo::start(config).await.map_err(Failure::run)?;
    note(&format!(
        "{} simulated engines with {} blocks of {BLOCK_SIZE} tokens each, twice: routed by kvatlas and round robin",
        args.engines, args.engine_blocks
    ));
    let mut shown = 0;
    let report = tokio::select! {
        () = &mut stop => None,
        report = demo.run(|progress| show(progress, &mut shown)) => Some(report.map_err(Failure::run)?),
    };
    if let Some(report) = &report {
        if args.json {
            output::json(report);
        } else {
            print(report);
        }
        if !args.once {
            invite(&demo)?;
            stop.await;
        }
    }
    demo.shutdown().await;
    Ok(ExitCode::SUCCESS)
}

/// Progress goes to standard error, so that standard output is the result alone.
fn show(progress: DemoProgress, shown: &mut usize) {
    let step = progress.done * PROGRESS_STEPS / progress.total;
    if step > *shown {
        *shown = step;
        note(&format!(
            "{:>5} of {} requests: {:>3.0} % of prompt tokens cached with kvatlas, {:>3.0} % round robin",
            progress.done,
            progress.total,
            100.0 * progress.kvatlas_share,
            100.0 * progress.round_robin_share,
        ));
    }
}

fn print(report: &DemoReport) {
    let header = ["policy", "requests", "cached tokens", "blocks prefilled", "look-up p50", "look-up p99"];
    let mut table = output::table(&header);
    for policy in &report.policies {
        let look_up = |us: u64| if policy.name == "kvatlas" { format!("{us} us") } else { "-".to_owned() };
        table.add_row([
            policy.name.clone(),
            policy.requests.to_string(),
            format!("{:.1} %", 100.0 * policy.cached_share),
            policy.blocks_prefilled.to_string(),
            look_up(report.score_p50_us),
            look_up(report.score_p99_us),
        ]);
    }
    output::line(&table.to_string());
}

fn invite(demo: &Demo) -> Result<(), Failure> {
    let keys = demo.example_keys(EXAMPLE_BLOCKS).map_err(Failure::run)?;
    let keys: Vec<String> = keys.iter().map(|key| format!("{key:016x}")).collect();
    let server = demo.grpc_addr();
    output::line("The index stays up. Ask it from another terminal:");
    output::line(&format!("  kvatlas query --server {server} owners"));
    output::line(&format!(
        "  kvatlas query --server {server} score --model {MODEL} --block-size {BLOCK_SIZE} --keys {}",
        keys.join(",")
    ));
    if let Some(http) = demo.http_addr() {
        output::line(&format!("  curl http://{http}/metrics"));
    }
    output::line("Ctrl-C ends it.");
    Ok(())
}
