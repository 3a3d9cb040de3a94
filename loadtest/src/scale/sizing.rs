//! From what was measured on a sample to deployments: what is linear is multiplied, and what it is multiplied with is named.

use serde::Serialize;

use super::cut::Cut;
use super::hot::HolderCost;
use super::tally::Division;
use super::{QueryRow, WorkloadReport};

/// Pods of the deployments.
const FLEETS: [u64; 3] = [100, 1_000, 10_000];
/// Blocks of a pod: 1.6 million tokens of 16, a large GPU's cache.
pub const BLOCKS_PER_POD: u64 = 100_000;
/// Blocks that a pod stores and removes in a second.
pub const OPERATIONS_PER_POD: u64 = 1_000;
/// Memory of a server that the index may fill, bytes: three quarters of 64 GB. The rest is for growth and transfers.
pub const SERVER_BYTES: f64 = 48e9;
/// Processor time that a server may take, cores: half of eight.
pub const SERVER_CORES: f64 = 4.0;
/// Of these, what may go into taking frames in: one task of a server does that, on one core, and needs room for bursts.
pub const INGEST_CORES: f64 = 0.6;

/// What a deployment needs.
#[derive(Clone, Debug, Serialize)]
pub struct SizingRow {
    /// What it is asked.
    pub workload: &'static str,
    /// Pods.
    pub pods: u64,
    /// Whether queries name their candidates, as gateways can; else they are about all pods.
    pub is_named: bool,
    /// Blocks held, each counted for every pod that holds it.
    pub blocks: u64,
    /// Index servers; `None`: more than there are shards.
    pub servers: Option<u16>,
    /// What decides their number.
    pub limit: &'static str,
    /// Memory of all servers together, GB.
    pub memory_gb: f64,
    /// Of it, what is kept per pod and shard.
    pub lanes_gb: f64,
    /// Cores that take in changes.
    pub ingest_cores: f64,
    /// Cores that take in heartbeats.
    pub heartbeat_cores: f64,
    /// Cores that answer queries.
    pub query_cores: f64,
    /// Queries a second: one for each request.
    pub queries_per_s: f64,
    /// Changes on the bus, MB a second.
    pub event_mb_per_s: f64,
    /// Heartbeats on the bus, MB a second.
    pub heartbeat_mb_per_s: f64,
    /// Questions and answers between servers, MB a second.
    pub query_mb_per_s: f64,
    /// Frames with changes a second.
    pub event_messages_per_s: f64,
    /// Heartbeats a second.
    pub heartbeat_messages_per_s: f64,
    /// Questions and answers a second.
    pub query_messages_per_s: f64,
    /// What one server more takes over from publishers, GB.
    pub one_more_gb: f64,
}

/// What a deployment needs in all, however many servers it has.
struct Needs {
    memory: f64,
    lanes: f64,
    ingest: f64,
    heartbeats: f64,
    query: f64,
}

/// Deployments for this workload. Costs of a holder: of queries about all pods, and of those that name some.
pub(super) fn rows(report: &WorkloadReport, lane_bytes: f64, costs: [HolderCost; 2]) -> Vec<SizingRow> {
    let kinds = [false, true].into_iter().zip(costs);
    kinds
        .flat_map(|(is_named, cost)| FLEETS.map(|pods| row(report, lane_bytes, pods, is_named, cost)))
        .collect()
}

fn row(report: &WorkloadReport, lane_bytes: f64, pods: u64, is_named: bool, cost: HolderCost) -> SizingRow {
    let fleet = pods as f64;
    let operations = fleet * OPERATIONS_PER_POD as f64;
    let queries = operations / report.operations_per_request;
    let lanes = fleet * f64::from(report.shards) * lane_bytes;
    let more = fleet / f64::from(report.pods);
    // What the whole fleet meets has as many more holders as there are more pods; everything else has as many as before.
    let holders = report.fleet_wide_holders * (more - 1.0);
    let traffic = &report.traffic;
    let per_second = |sum: u64| sum as f64 / report.window_s * more;
    let per_operation = operations / (traffic.operations as f64 / report.window_s);
    let events = |sum: u64| sum as f64 / report.window_s * per_operation;
    let mut needs = Needs {
        memory: fleet * BLOCKS_PER_POD as f64 * report.bytes_per_block,
        lanes,
        ingest: operations * report.ingest_ns_per_operation / 1e9,
        heartbeats: per_second(traffic.heartbeats) * report.ns_per_heartbeat / 1e9,
        query: 0.0,
    };
    let mut fit = (None, "shards");
    for servers in 1..=report.shards {
        let us = report.query(servers, is_named).map_or(0.0, |row| row.look_up_us + row.ask_us);
        needs.query = queries * (us + holders * cost.ns / 1e3).max(0.0) / 1e6;
        let limit = needs.exceeds(servers, report.division(servers));
        if let Some(limit) = limit {
            fit.1 = limit;
        } else {
            fit.0 = Some(servers);
            break;
        }
    }
    let (servers, limit) = fit;
    let query = report.query(servers.unwrap_or(report.shards), is_named);
    let fan_out = query.map_or(1.0, |query| query.fan_out);
    let query_bytes = query.map_or(0.0, |query| query.question_bytes + query.answer_bytes);
    let query_bytes = (query_bytes + holders * cost.bytes).max(0.0);
    let alone = servers == Some(1);
    SizingRow {
        workload: report.name,
        pods,
        is_named,
        blocks: pods * BLOCKS_PER_POD,
        servers,
        limit: if alone { "none" } else { limit },
        memory_gb: (needs.memory + needs.lanes) / 1e9,
        lanes_gb: needs.lanes / 1e9,
        ingest_cores: needs.ingest,
        heartbeat_cores: needs.heartbeats,
        query_cores: needs.query,
        queries_per_s: queries,
        event_mb_per_s: events(traffic.frame_bytes) / 1e6,
        heartbeat_mb_per_s: per_second(traffic.heartbeat_bytes) / 1e6,
        query_mb_per_s: if alone { 0.0 } else { queries * query_bytes / 1e6 },
        event_messages_per_s: events(traffic.frames),
        heartbeat_messages_per_s: per_second(traffic.heartbeats),
        query_messages_per_s: if alone { 0.0 } else { 2.0 * queries * fan_out },
        one_more_gb: fleet * BLOCKS_PER_POD as f64 * report.state_bytes_per_block
            / (f64::from(servers.unwrap_or(report.shards)) + 1.0)
            / 1e9,
    }
}

// === impl Needs ===

impl Needs {
    /// What the fullest of so many servers has too much of.
    fn exceeds(&self, servers: u16, division: Option<&Division>) -> Option<&'static str> {
        let share = 1.0 / f64::from(servers);
        let skew = |of: fn(&Division) -> f64| division.map_or(1.0, of);
        let held = skew(|division| division.held_skew) * self.memory * share + self.lanes * share;
        let changes = skew(|division| division.ingest_skew) * self.ingest * share + self.heartbeats * share;
        let answers = skew(|division| division.piece_skew) * self.query * share;
        if held > SERVER_BYTES {
            Some("memory")
        } else if changes > INGEST_CORES {
            Some("ingest")
        } else if changes + answers > SERVER_CORES {
            Some("queries")
        } else {
            None
        }
    }
}

// === impl WorkloadReport ===

impl WorkloadReport {
    /// How the contract's cut divides blocks among so many servers, or the next larger number that was looked at; `None` for
    /// a server that is alone.
    fn division(&self, servers: u16) -> Option<&Division> {
        let ours = self.divisions.iter().filter(|division| {
            division.cut == Cut::Segment(kvatlas_proto::shard::SEGMENT_BLOCKS)
                && division.shards == self.shards
        });
        let mut ours = ours.filter(|_| servers > 1);
        let last = ours.clone().next_back();
        ours.find(|division| division.servers >= servers).or(last)
    }

    /// Queries over so many servers, or the next larger number that was looked at.
    fn query(&self, servers: u16, is_named: bool) -> Option<&QueryRow> {
        let mut rows = self.queries.iter().filter(|row| (row.candidates > 0) == is_named);
        let last = rows.clone().next_back();
        rows.find(|row| row.servers >= servers).or(last)
    }
}
