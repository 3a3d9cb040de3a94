//! One prompt that every pod of a large fleet holds: what a question about it costs. Nothing here is extrapolated.

use kvatlas_proto::Partition;
use kvatlas_proto::shard::SEGMENT_BLOCKS;
use serde::Serialize;

use super::ScaleError;
use super::cut::Cut;
use super::fleet::Change;
use super::forest::Forest;
use super::servers::{Asked, Asker, Servers};
use super::wire::{Publishers, instance};

/// Lengths of the prompt that all hold, blocks.
const SHARED_BLOCKS: [u32; 3] = [16, 200, 2_000];
/// What each pod holds behind it that no other does.
const OWN_BLOCKS: u32 = 50;
/// Servers that are asked.
const SERVERS: [u16; 3] = [4, 16, 64];
/// A question is asked so often that this many holders are looked at for each block.
const REPEATED_HOLDERS: usize = 20_000;
/// Candidates that a gateway names, where it names some.
pub(super) const CANDIDATES: usize = 64;

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
    pub fan_out: f64,
    /// Bytes of the questions together.
    pub question_bytes: f64,
    /// Bytes of the answers together.
    pub answer_bytes: f64,
    /// Bytes of the largest answer that could be sent.
    pub largest_answer: u64,
    /// Answers that were too large to be sent: their shards are missing in the result.
    pub refused: f64,
    /// Processor time of all who were asked, microseconds.
    pub look_up_us: f64,
    /// Processor time of who asked, microseconds.
    pub ask_us: f64,
}

/// Asks about a prompt that all of `pods` hold.
pub(super) fn measure(pods: usize, partition: Partition) -> Result<Vec<HotRow>, ScaleError> {
    let mut rows = Vec::new();
    let askers = SERVERS.map(|servers| Asker::new(pods, partition, servers));
    let askers: Vec<Asker> = askers.into_iter().collect::<Result<_, _>>()?;
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
        // Several times, because the clock is coarse.
        let prompts = vec![prompt; (REPEATED_HOLDERS / pods).clamp(2, 32)];
        // The last pod of all is the one to find: others hold the beginning only.
        let named: Vec<String> =
            (0..CANDIDATES.min(pods)).map(|at| instance(pods - 1 - at).to_string()).collect();
        for asker in &askers {
            for candidates in [&[][..], &named[..]] {
                let asked = servers.ask(&forest, &prompts, asker, candidates)?;
                rows.push(HotRow::of(&asked, pods, shared_blocks, asker.servers, candidates.len()));
            }
        }
    }
    Ok(rows)
}

/// What each holder of each segment costs a query: between the smallest and the largest fleet that was looked at.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct HolderCost {
    /// Processor time of all who take part, nanoseconds.
    pub ns: f64,
    /// Bytes of answers.
    pub bytes: f64,
}

// === impl HolderCost ===

impl HolderCost {
    /// From questions about the longest prompt, for all pods or for named ones.
    pub(super) fn of(rows: &[HotRow], is_named: bool) -> Self {
        let alike = |row: &&HotRow| {
            row.shared_blocks == SHARED_BLOCKS[2]
                && row.servers == SERVERS[1]
                && (row.candidates > 0) == is_named
        };
        let of_pods = |row: &&HotRow| row.pods;
        let (Some(least), Some(most)) =
            (rows.iter().filter(alike).min_by_key(of_pods), rows.iter().filter(alike).max_by_key(of_pods))
        else {
            return Self::default();
        };
        let holders = |row: &HotRow| row.pods as f64 * f64::from(row.shared_blocks.div_ceil(SEGMENT_BLOCKS));
        let more = holders(most) - holders(least);
        if more <= 0.0 {
            return Self::default();
        }
        let us = |row: &HotRow| row.look_up_us + row.ask_us;
        // Answers that could not be sent are missing in the bytes; those of the smaller fleet tell enough.
        let bytes = if most.refused > 0.0 && !is_named {
            least.answer_bytes / holders(least)
        } else {
            (most.answer_bytes - least.answer_bytes) / more
        };
        Self { ns: ((us(most) - us(least)) * 1e3 / more).max(0.0), bytes: bytes.max(0.0) }
    }
}

// === impl HotRow ===

impl HotRow {
    fn of(asked: &Asked, pods: usize, shared_blocks: u32, servers: u16, candidates: usize) -> Self {
        Self {
            pods,
            shared_blocks,
            servers,
            candidates,
            fan_out: asked.mean(asked.questions),
            question_bytes: asked.mean(asked.question_bytes),
            answer_bytes: asked.mean(asked.answer_bytes),
            largest_answer: asked.largest_answer,
            refused: asked.mean(asked.refused.into()),
            look_up_us: asked.mean(asked.look_up_ns) / 1e3,
            ask_us: asked.mean(asked.ask_ns) / 1e3,
        }
    }
}
