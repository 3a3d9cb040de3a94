//! One prompt that every pod of a large fleet holds: what a question about it costs. Nothing here is extrapolated.

use kvatlas_proto::Partition;
use kvatlas_proto::shard::SEGMENT_BLOCKS;
use serde::Serialize;

use super::ScaleError;
use super::cut::Cut;
use super::fleet::Change;
use super::forest::Forest;
use super::servers::{Asked, Servers};
use super::wire::{Publishers, instance};

/// Lengths of the prompt that all hold, blocks.
const SHARED_BLOCKS: [u32; 3] = [16, 200, 2_000];
/// What each pod holds behind it that no other does.
const OWN_BLOCKS: u32 = 50;
/// Servers that are asked.
const SERVERS: [u16; 3] = [4, 16, 64];
/// Candidates that a gateway names, where it names some.
const CANDIDATES: usize = 64;

/// A question about a prompt of which every pod holds the beginning.
#[derive(Clone, Debug, Serialize)]
pub struct HotRow {
    /// Pods.
    pub pods: usize,
    /// Blocks that all of them hold.
    pub shared_blocks: u32,
    /// Servers.
    pub servers: u16,
    /// Candidates that the question names; 0: all pods.
    pub candidates: usize,
    /// Servers that were asked.
    pub fan_out: u32,
    /// Bytes of the questions together.
    pub question_bytes: u64,
    /// Bytes of the answers together.
    pub answer_bytes: u64,
    /// Bytes of the largest answer that could be sent.
    pub largest_answer: u64,
    /// Answers that were too large to be sent: their shards are missing in the result.
    pub refused: u32,
    /// Processor time of all who were asked, microseconds.
    pub look_up_us: f64,
    /// Processor time of who asked, microseconds.
    pub ask_us: f64,
}

/// Asks about a prompt that all of `pods` hold.
pub(super) fn measure(pods: usize, partition: Partition) -> Result<Vec<HotRow>, ScaleError> {
    let mut rows = Vec::new();
    for shared_blocks in SHARED_BLOCKS {
        let mut forest = Forest::new();
        let mut shared = Vec::new();
        forest.extend(&mut shared, shared_blocks);
        let servers = Servers::new(partition);
        let mut publishers = Publishers::new(pods, partition, forest.root_key())?;
        let mut prompt = Vec::new();
        let mut frames = Vec::new();
        for pod in 0..pods {
            let mut chain = shared.clone();
            forest.extend(&mut chain, OWN_BLOCKS);
            let mut concerned: Vec<u16> = Cut::Segment(SEGMENT_BLOCKS)
                .stretches(&forest, partition, &chain)
                .iter()
                .map(|stretch| stretch.shard)
                .collect();
            concerned.sort_unstable();
            concerned.dedup();
            for shard in concerned {
                publishers.start_lane(pod, partition.shard(shard), &mut frames)?;
            }
            publishers.publish(&forest, pod, chain.iter().copied().map(Change::Stored), &mut frames)?;
            servers.take(&frames)?;
            frames.clear();
            prompt = chain;
        }
        // The last pod of all is the one to find: others hold the beginning only.
        let named: Vec<String> =
            (0..CANDIDATES.min(pods)).map(|at| instance(pods - 1 - at).to_string()).collect();
        for number in SERVERS {
            for candidates in [&[][..], &named[..]] {
                // The first question warms caches.
                servers.ask(&forest, &prompt, number, candidates)?;
                let asked = servers.ask(&forest, &prompt, number, candidates)?;
                rows.push(HotRow::of(&asked, pods, shared_blocks, number, candidates.len()));
            }
        }
    }
    Ok(rows)
}

// === impl HotRow ===

impl HotRow {
    fn of(asked: &Asked, pods: usize, shared_blocks: u32, servers: u16, candidates: usize) -> Self {
        Self {
            pods,
            shared_blocks,
            servers,
            candidates,
            fan_out: asked.servers,
            question_bytes: asked.question_bytes,
            answer_bytes: asked.answer_bytes,
            largest_answer: asked.largest_answer,
            refused: asked.refused,
            look_up_us: asked.look_up_ns as f64 / 1e3,
            ask_us: asked.ask_ns as f64 / 1e3,
        }
    }
}
