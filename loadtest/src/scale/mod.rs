//! How large a deployment can be: a fleet is simulated, its blocks and requests go through the real code that cuts, publishes,
//! takes in and asks, and what is linear is multiplied up to 10,000 pods. `docs/scale.md` is the study made with it.
//!
//! * `forest`, `pod`, `fleet`: blocks, caches, time and routing; `requests`, `replay`, `traces`: what is asked.
//! * `cut`, `tally`: ways of dividing blocks among servers, and who gets how much.
//! * `wire`, `servers`: real frames, and real indexes that take them in and answer. `memory`: real engines, by cut.
//! * `hot`: one prompt that ten thousand pods hold. `branch`: what a hot segment does, as a formula.
//! * `sizing`: from there to deployments.
//!
//! Everything that is counted is a function of the configuration and its seed; what is measured in nanoseconds and bytes of
//! memory is of the machine it runs on.
//!
//! Deliberately absent: a broker and a network. What they carry is counted, not sent.

mod branch;
mod cost;
mod cut;
mod fleet;
mod forest;
mod hot;
mod memory;
mod pod;
mod replay;
mod requests;
mod servers;
mod sizing;
mod study;
mod tally;
mod traces;
mod wire;

use std::path::PathBuf;

use kvatlas_index::cluster::{EncodeQuestionError, ParseAnswerError, ParseQuestionError};
use kvatlas_index::{BlockSizeMismatch, LimitReached};
use kvatlas_proto::frame::{EncodeFrameError, ParseFrameError};
use kvatlas_proto::scope::InvalidScopeError;
use kvatlas_proto::shard::InvalidPartitionError;
use serde::Serialize;

pub use branch::BranchRow;
pub use cut::Cut;
pub use hot::{HolderCost, HotRow};
pub use memory::MemoryRow;
pub use sizing::{BLOCKS_PER_POD, INGEST_CORES, OPERATIONS_PER_POD, SERVER_BYTES, SERVER_CORES, SizingRow};
pub use study::run;
pub use tally::Division;
pub use traces::ReadTraceError;
pub use wire::Traffic;

/// Fewest pods of a simulated fleet: with fewer, hot and cold are the same.
pub const MIN_PODS: u16 = 20;
/// Most pods of a simulated fleet: the study is to fit into 6 GB.
pub const MAX_PODS: u16 = 2_000;
/// Fewest blocks of a pod: a few requests.
pub const MIN_BLOCKS_PER_POD: usize = 4_000;
/// Most blocks of all pods together: about 300 bytes each, over all parts of the study.
pub const MAX_BLOCKS: usize = 16_000_000;

/// What is studied.
#[derive(Clone, Debug, PartialEq)]
pub struct ScaleConfig {
    /// Where all chance comes from.
    pub seed: u64,
    /// Pods that are simulated, [`MIN_PODS`] to [`MAX_PODS`].
    pub pods: u16,
    /// Blocks that each can hold, at least [`MIN_BLOCKS_PER_POD`]; [`MAX_BLOCKS`] in all.
    pub blocks_per_pod: usize,
    /// Virtual shards of the simulated deployment.
    pub shards: u32,
    /// Virtual time in which everything is counted, after the fleet is full, seconds.
    pub window_s: u64,
    /// Queries that are looked at, of each workload.
    pub queries: usize,
    /// Sizes of the fleets of which every pod holds the same prompt.
    pub hot_pods: Vec<usize>,
    /// Folder with public traces; without one, made-up ones are used.
    pub traces: Option<PathBuf>,
}

/// The study cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ScaleError {
    /// The configuration is out of bounds.
    #[error("{0}")]
    Config(String),
    /// The number of shards cannot be used.
    #[error(transparent)]
    Partition(#[from] InvalidPartitionError),
    /// A trace cannot be used.
    #[error(transparent)]
    Trace(#[from] ReadTraceError),
    /// The scope of the simulated fleet is not valid.
    #[error(transparent)]
    Scope(#[from] InvalidScopeError),
    /// A frame could not be made.
    #[error(transparent)]
    EncodeFrame(#[from] EncodeFrameError),
    /// A frame was not understood.
    #[error(transparent)]
    ParseFrame(#[from] ParseFrameError),
    /// A frame was refused.
    #[error(transparent)]
    Limit(Box<LimitReached>),
    /// A question could not be made.
    #[error(transparent)]
    EncodeQuestion(#[from] EncodeQuestionError),
    /// A question was not understood.
    #[error(transparent)]
    ParseQuestion(#[from] ParseQuestionError),
    /// An answer was not understood.
    #[error(transparent)]
    ParseAnswer(#[from] ParseAnswerError),
    /// A query was refused.
    #[error(transparent)]
    BlockSize(BlockSizeMismatch),
    /// The index does not hold what its publishers hold: the figures would mean nothing.
    #[error(
        "workload {0}: the index is not what the pods hold; this is a bug, please report it with the seed"
    )]
    Untrue(&'static str),
}

/// The study.
#[derive(Clone, Debug, Serialize)]
pub struct ScaleReport {
    /// Which simulation this is.
    pub case: &'static str,
    /// Where all chance came from.
    pub seed: u64,
    /// Bytes of memory for each pod and shard in an index, holding nothing; 0 where the system does not tell.
    pub lane_bytes: f64,
    /// By what is asked.
    pub workloads: Vec<WorkloadReport>,
    /// What a prompt costs that all pods hold.
    pub hot: Vec<HotRow>,
    /// What each holder of each segment adds to a query that is about all pods.
    pub holder_cost_all: HolderCost,
    /// The same for a query that names its candidates.
    pub holder_cost_named: HolderCost,
    /// What branches off a prompt that all share.
    pub branch: Vec<BranchRow>,
    /// Deployments.
    pub sizing: Vec<SizingRow>,
}

/// One workload on the simulated fleet.
#[derive(Clone, Debug, Serialize)]
pub struct WorkloadReport {
    /// Short name.
    pub name: &'static str,
    /// What it is, and where it is from.
    pub source: String,
    /// Pods.
    pub pods: u16,
    /// Virtual shards.
    pub shards: u16,
    /// Virtual seconds in which everything was counted.
    pub window_s: f64,
    /// Requests served in the window.
    pub requests: u64,
    /// Mean blocks of their prompts.
    pub prompt_blocks: f64,
    /// Share of these that the chosen pod held.
    pub hit_share: f64,
    /// Blocks stored and removed for each request.
    pub operations_per_request: f64,
    /// Blocks held in the end, each counted for every pod that holds it.
    pub blocks: usize,
    /// Different ones of them.
    pub distinct_blocks: usize,
    /// What went over the bus in the window, with [`WorkloadReport::shards`].
    pub traffic: Traffic,
    /// The same with other numbers of shards.
    pub traffic_by_shards: Vec<(u16, Traffic)>,
    /// Processor time of an index for each block stored or removed, frames included, nanoseconds.
    pub ingest_ns_per_operation: f64,
    /// The same while a pod's whole state is taken in.
    pub fill_ns_per_block: f64,
    /// Processor time of an index for a heartbeat.
    pub ns_per_heartbeat: f64,
    /// Bytes that a block has in the messages with which a server takes over a shard.
    pub state_bytes_per_block: f64,
    /// Memory of the engines for each block of each pod, with the contract's segments.
    pub bytes_per_block: f64,
    /// Growth of the whole process while an index took in the fleet's state, for each block; measured for the first workload
    /// only, because memory that others left behind is used again.
    pub resident_bytes_per_block: Option<f64>,
    /// Holders of a query's segments, as far as more than one in twenty pods holds them: in a larger fleet they are as many
    /// more, everything else is not.
    pub fleet_wide_holders: f64,
    /// Memory and look-ups by cut; empty where it was not looked at.
    pub memory: Vec<MemoryRow>,
    /// Who gets how much, by cut, shards and servers.
    pub divisions: Vec<Division>,
    /// Real queries by number of servers.
    pub queries: Vec<QueryRow>,
}

/// Real questions and answers about a workload's prompts. Means over queries.
#[derive(Clone, Debug, Serialize)]
pub struct QueryRow {
    /// Servers.
    pub servers: u16,
    /// Candidates that the query names; 0: all pods.
    pub candidates: usize,
    /// Servers that were asked.
    pub fan_out: f64,
    /// Bytes of all questions of a query.
    pub question_bytes: f64,
    /// Bytes of all its answers.
    pub answer_bytes: f64,
    /// Bytes of the largest answer of all queries.
    pub largest_answer: u64,
    /// Answers that were too large to be sent, of all queries.
    pub refused: u32,
    /// Processor time of all who were asked, microseconds.
    pub look_up_us: f64,
    /// Processor time of who asked, microseconds.
    pub ask_us: f64,
    /// Pods in the whole answer.
    pub rows: f64,
}

// === impl ScaleConfig ===

impl Default for ScaleConfig {
    /// Ten million blocks on 200 pods: some minutes.
    fn default() -> Self {
        Self {
            seed: 1,
            pods: 200,
            blocks_per_pod: 50_000,
            shards: 256,
            window_s: 10,
            queries: 300,
            hot_pods: vec![1_000, 10_000],
            traces: None,
        }
    }
}

impl ScaleConfig {
    /// Less of everything: some seconds.
    pub fn quick() -> Self {
        Self {
            pods: 40,
            blocks_per_pod: 8_000,
            window_s: 3,
            queries: 40,
            hot_pods: vec![100, 300],
            ..Self::default()
        }
    }

    fn check(&self) -> Result<(), ScaleError> {
        let problem = if !(MIN_PODS..=MAX_PODS).contains(&self.pods) {
            format!("{} pods cannot be simulated: give {MIN_PODS} to {MAX_PODS}", self.pods)
        } else if self.blocks_per_pod < MIN_BLOCKS_PER_POD {
            format!("{} blocks per pod are too few: give at least {MIN_BLOCKS_PER_POD}", self.blocks_per_pod)
        } else if usize::from(self.pods) * self.blocks_per_pod > MAX_BLOCKS {
            format!(
                "{} pods with {} blocks each are too many: at most {MAX_BLOCKS} blocks in all",
                self.pods, self.blocks_per_pod
            )
        } else if self.window_s == 0 || self.queries == 0 {
            "a window and queries are needed: give at least 1 of each".to_owned()
        } else {
            return Ok(());
        };
        Err(ScaleError::Config(problem))
    }
}

// === impl ScaleError ===

impl From<LimitReached> for ScaleError {
    fn from(limit: LimitReached) -> Self {
        Self::Limit(Box::new(limit))
    }
}

#[cfg(test)]
mod tests;
