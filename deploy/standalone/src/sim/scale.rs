//! `kvatlas sim scale`: how large a deployment can be.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, value_parser};
use kvatlas_loadtest::scale::{
    self, Cut, Division, HotRow, ScaleConfig, ScaleReport, SizingRow, WorkloadReport,
};
use serde::Serialize;

use crate::failure::Failure;
use crate::output;

/// Numbers of servers that the tables for people show.
const SHOWN_SERVERS: [u16; 2] = [16, 64];

/// Arguments of `sim scale`. What is not given is as in the study (`docs/scale.md`).
#[derive(Args)]
pub struct ScaleArgs {
    /// Some seconds instead of some minutes: a smaller fleet, fewer queries.
    #[arg(long)]
    quick: bool,
    /// Print one JSON object instead of tables for people; it has everything.
    #[arg(long)]
    json: bool,
    /// Where all chance comes from.
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    seed: u64,
    /// Pods that are simulated.
    #[arg(long, value_name = "PODS", value_parser = value_parser!(u16).range(i64::from(scale::MIN_PODS)..=i64::from(scale::MAX_PODS)))]
    pods: Option<u16>,
    /// Blocks that each pod can hold.
    #[arg(long, value_name = "BLOCKS")]
    blocks_per_pod: Option<usize>,
    /// Virtual shards of the simulated deployment.
    #[arg(long, value_name = "SHARDS")]
    shards: Option<u32>,
    /// Folder with public traces (mooncake-conversation.jsonl.zst, claude-code-v8-local.jsonl.zst). Default: requests that are
    /// made up after their statistics.
    #[arg(long, value_name = "FOLDER")]
    traces: Option<PathBuf>,
}

/// The study and how long it took.
#[derive(Serialize)]
struct Timed<'a> {
    #[serde(flatten)]
    report: &'a ScaleReport,
    wall_seconds: f64,
}

/// Runs `sim scale`.
pub fn run(args: &ScaleArgs) -> Result<ExitCode, Failure> {
    let started = Instant::now();
    let mut say = |what: &str| output::note(&format!("{:>4} s  {what}", started.elapsed().as_secs()));
    let report = scale::run(&args.config(), &mut say).map_err(Failure::run)?;
    if args.json {
        let wall_seconds = (started.elapsed().as_secs_f64() * 10.0).round() / 10.0;
        output::json(&Timed { report: &report, wall_seconds });
    } else {
        print(&report);
    }
    Ok(ExitCode::SUCCESS)
}

// === impl ScaleArgs ===

impl ScaleArgs {
    fn config(&self) -> ScaleConfig {
        let base = if self.quick { ScaleConfig::quick() } else { ScaleConfig::default() };
        ScaleConfig {
            seed: self.seed,
            pods: self.pods.unwrap_or(base.pods),
            blocks_per_pod: self.blocks_per_pod.unwrap_or(base.blocks_per_pod),
            shards: self.shards.unwrap_or(base.shards),
            traces: self.traces.clone(),
            ..base
        }
    }
}

fn print(report: &ScaleReport) {
    heading("What was simulated");
    workloads(&report.workloads);
    for workload in &report.workloads {
        heading(&format!("{}: {}", workload.name, workload.source));
        divisions(workload);
    }
    heading("Memory and look-ups by cut");
    memory(&report.workloads);
    heading("Bus, by number of shards");
    traffic(&report.workloads);
    heading("Queries through the real code");
    queries(&report.workloads);
    heading("A prompt that every pod holds");
    hot(&report.hot);
    heading("Deployments, extrapolated");
    sizing(&report.sizing);
}

fn heading(text: &str) {
    output::line(&format!("\n{text}"));
}

fn workloads(reports: &[WorkloadReport]) {
    let mut table = output::table(&[
        "workload",
        "prompt blocks",
        "hit",
        "ops/request",
        "blocks",
        "distinct",
        "B/block",
        "RSS/block",
        "ns/op",
        "ns/block filled",
        "ns/heartbeat",
        "state B/block",
        "fleet-wide holders",
    ]);
    for report in reports {
        table.add_row([
            report.name.to_owned(),
            format!("{:.0}", report.prompt_blocks),
            percent(report.hit_share),
            format!("{:.0}", report.operations_per_request),
            report.blocks.to_string(),
            report.distinct_blocks.to_string(),
            format!("{:.1}", report.bytes_per_block),
            report.resident_bytes_per_block.map_or_else(String::new, |bytes| format!("{bytes:.1}")),
            format!("{:.0}", report.ingest_ns_per_operation),
            format!("{:.0}", report.fill_ns_per_block),
            format!("{:.0}", report.ns_per_heartbeat),
            format!("{:.1}", report.state_bytes_per_block),
            format!("{:.0}", report.fleet_wide_holders),
        ]);
    }
    output::line(&table.to_string());
}

fn divisions(report: &WorkloadReport) {
    let mut table = output::table(&[
        "by",
        "shards",
        "servers",
        "ingest skew",
        "held skew",
        "question skew",
        "piece skew",
        "fan-out",
        "p99",
        "question B",
        "answer B",
    ]);
    let shown = |row: &&Division| {
        SHOWN_SERVERS.contains(&row.servers) && (row.cut != Cut::Worker || row.shards == report.shards)
    };
    for row in report.divisions.iter().filter(shown) {
        table.add_row([
            row.cut.name(),
            row.shards.to_string(),
            row.servers.to_string(),
            format!("{:.2}", row.ingest_skew),
            format!("{:.2}", row.held_skew),
            format!("{:.2}", row.question_skew),
            format!("{:.2}", row.piece_skew),
            format!("{:.1}", row.fan_out),
            row.fan_out_p99.to_string(),
            format!("{:.0}", row.question_bytes),
            format!("{:.0}", row.answer_bytes),
        ]);
    }
    output::line(&table.to_string());
}

fn memory(reports: &[WorkloadReport]) {
    let mut table = output::table(&[
        "workload",
        "by",
        "B/block",
        "B/distinct",
        "strands/distinct",
        "store ns",
        "find us/query",
    ]);
    for report in reports {
        for row in &report.memory {
            table.add_row([
                report.name.to_owned(),
                row.cut.name(),
                format!("{:.1}", row.bytes_per_block),
                format!("{:.1}", row.bytes_per_distinct_block),
                format!("{:.3}", row.strands_per_distinct_block),
                format!("{:.0}", row.store_ns_per_block),
                format!("{:.1}", row.find_us_per_query),
            ]);
        }
    }
    output::line(&table.to_string());
}

fn traffic(reports: &[WorkloadReport]) {
    let mut table = output::table(&[
        "workload",
        "shards",
        "ops/frame",
        "B/op",
        "frames/pod/s",
        "heartbeats/pod/s",
        "events kB/pod/s",
        "heartbeats kB/pod/s",
    ]);
    for report in reports {
        for (shards, traffic) in &report.traffic_by_shards {
            let per_pod = |sum: u64| sum as f64 / report.window_s / f64::from(report.pods);
            table.add_row([
                report.name.to_owned(),
                shards.to_string(),
                format!("{:.1}", traffic.operations as f64 / traffic.frames.max(1) as f64),
                format!("{:.1}", traffic.frame_bytes as f64 / traffic.operations.max(1) as f64),
                format!("{:.0}", per_pod(traffic.frames)),
                format!("{:.0}", per_pod(traffic.heartbeats)),
                format!("{:.1}", per_pod(traffic.frame_bytes) / 1e3),
                format!("{:.1}", per_pod(traffic.heartbeat_bytes) / 1e3),
            ]);
        }
    }
    output::line(&table.to_string());
}

fn queries(reports: &[WorkloadReport]) {
    let mut table = output::table(&[
        "workload",
        "servers",
        "candidates",
        "asked",
        "question B",
        "answer B",
        "largest answer",
        "refused",
        "look-up us",
        "asker us",
        "rows",
    ]);
    for report in reports {
        for row in &report.queries {
            table.add_row([
                report.name.to_owned(),
                row.servers.to_string(),
                asked_for(row.candidates),
                format!("{:.1}", row.fan_out),
                format!("{:.0}", row.question_bytes),
                format!("{:.0}", row.answer_bytes),
                row.largest_answer.to_string(),
                row.refused.to_string(),
                format!("{:.0}", row.look_up_us),
                format!("{:.0}", row.ask_us),
                format!("{:.0}", row.rows),
            ]);
        }
    }
    output::line(&table.to_string());
}

fn hot(rows: &[HotRow]) {
    let mut table = output::table(&[
        "pods",
        "shared blocks",
        "servers",
        "candidates",
        "asked",
        "question B",
        "answer B",
        "largest",
        "too large",
        "look-up us",
        "asker us",
    ]);
    for row in rows {
        table.add_row([
            row.pods.to_string(),
            row.shared_blocks.to_string(),
            row.servers.to_string(),
            asked_for(row.candidates),
            format!("{:.0}", row.fan_out),
            format!("{:.0}", row.question_bytes),
            format!("{:.0}", row.answer_bytes),
            row.largest_answer.to_string(),
            format!("{:.0}", row.refused),
            format!("{:.0}", row.look_up_us),
            format!("{:.0}", row.ask_us),
        ]);
    }
    output::line(&table.to_string());
}

fn sizing(rows: &[SizingRow]) {
    let mut table = output::table(&[
        "workload",
        "pods",
        "candidates",
        "servers",
        "limit",
        "memory GB",
        "lanes GB",
        "ingest cores",
        "heartbeat cores",
        "query cores",
        "queries/s",
        "events MB/s",
        "heartbeats MB/s",
        "queries MB/s",
        "M msg/s (ev/hb/q)",
        "server more GB",
    ]);
    for row in rows {
        let millions = |rate: f64| format!("{:.2}", rate / 1e6);
        table.add_row([
            row.workload.to_owned(),
            row.pods.to_string(),
            if row.is_named { "named" } else { "all" }.to_owned(),
            row.servers.map_or_else(|| "too many".to_owned(), |servers| servers.to_string()),
            row.limit.to_owned(),
            format!("{:.1}", row.memory_gb),
            format!("{:.1}", row.lanes_gb),
            format!("{:.2}", row.ingest_cores),
            format!("{:.2}", row.heartbeat_cores),
            format!("{:.1}", row.query_cores),
            format!("{:.0}", row.queries_per_s),
            format!("{:.0}", row.event_mb_per_s),
            format!("{:.0}", row.heartbeat_mb_per_s),
            format!("{:.0}", row.query_mb_per_s),
            format!(
                "{}/{}/{}",
                millions(row.event_messages_per_s),
                millions(row.heartbeat_messages_per_s),
                millions(row.query_messages_per_s)
            ),
            format!("{:.2}", row.one_more_gb),
        ]);
    }
    output::line(&table.to_string());
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

fn asked_for(candidates: usize) -> String {
    if candidates == 0 { "all".to_owned() } else { candidates.to_string() }
}
