//! What blocks cost in memory and in look-ups when chains are cut in one way or another: the real engine, one per shard, filled
//! with what a fleet holds, by its own count of bytes.

use foldhash::HashMap;
use kvatlas_index::engine::{Engine, Holder, Match};
use kvatlas_proto::shard::InvalidPartitionError;
use kvatlas_proto::{BlockKey, Partition};
use serde::Serialize;

use super::cost::Stopwatch;
use super::cut::Cut;
use super::forest::{Block, Forest};
use super::pod::Pod;

/// Shards whose engines are measured: few, so that each is as full as in a large deployment and what an empty one takes does
/// not count.
const SHARDS: u32 = 8;
/// Queries that are timed together, because the clock is coarse.
const FINDS: usize = 4_000;

/// What a cut costs.
#[derive(Clone, Debug, Serialize)]
pub struct MemoryRow {
    /// Which one.
    pub cut: Cut,
    /// Bytes of the engines, for each block of each pod.
    pub bytes_per_block: f64,
    /// The same for each different block.
    pub bytes_per_distinct_block: f64,
    /// Strands, for each different block.
    pub strands_per_distinct_block: f64,
    /// Processor time to take a block in, pod after pod, nanoseconds.
    pub store_ns_per_block: f64,
    /// Processor time to find all stretches of a prompt, over all shards, microseconds.
    pub find_us_per_query: f64,
}

/// Fills engines with what the pods hold and asks them about prompts.
pub(super) fn measure(
    forest: &Forest,
    pods: &[Pod],
    prompts: &[Vec<Block>],
    cut: Cut,
) -> Result<MemoryRow, InvalidPartitionError> {
    let partition = Partition::new(SHARDS)?;
    let engines: Vec<Engine> = partition.all().map(|_| Engine::default()).collect();
    let (mut entries, mut ns) = (0usize, 0);
    for (number, pod) in pods.iter().enumerate() {
        let runs = runs(forest, partition, &pod.blocks(), cut);
        let watch = Stopwatch::start();
        for (shard, runs) in &runs {
            let mut writer = engines[usize::from(*shard)].write();
            for (parent, keys) in runs {
                entries += keys.len();
                writer.store(Holder(number as u32), *parent, keys);
            }
        }
        ns += watch.elapsed_ns();
    }
    let totals: Vec<_> = engines.iter().map(Engine::totals).collect();
    let sum =
        |of: fn(&kvatlas_index::engine::EngineTotals) -> usize| totals.iter().map(of).sum::<usize>() as f64;
    let distinct = sum(|totals| totals.distinct).max(1.0);
    let mut found = Match::default();
    let questions: Vec<Vec<(u16, Vec<BlockKey>)>> =
        prompts.iter().map(|prompt| pieces(forest, partition, prompt, cut)).collect();
    let watch = Stopwatch::start();
    for question in questions.iter().cycle().take(FINDS.max(questions.len())) {
        for (shard, keys) in question {
            engines[usize::from(*shard)].find(keys, &mut found);
        }
    }
    let find_ns = watch.elapsed_ns();
    Ok(MemoryRow {
        cut,
        bytes_per_block: sum(|totals| totals.bytes) / entries.max(1) as f64,
        bytes_per_distinct_block: sum(|totals| totals.bytes) / distinct,
        strands_per_distinct_block: sum(|totals| totals.strands) / distinct,
        store_ns_per_block: ns as f64 / entries.max(1) as f64,
        find_us_per_query: find_ns as f64 / 1e3 / FINDS.max(questions.len()) as f64,
    })
}

type Runs = Vec<(Option<BlockKey>, Vec<BlockKey>)>;

/// What a pod holds as runs of consecutive blocks of one shard.
fn runs(forest: &Forest, partition: Partition, blocks: &[Block], cut: Cut) -> HashMap<u16, Runs> {
    let mut runs: HashMap<u16, Runs> = HashMap::default();
    let mut before: Option<(Block, u16)> = None;
    for block in blocks {
        // By worker, a pod's blocks lie in one piece; which shard that is makes no difference here.
        let pod_shard = (forest.root(*block) % u32::from(partition.shards())) as u16;
        let shard = cut.shard(forest, partition, pod_shard, *block);
        let parent = forest.parent(*block).filter(|parent| match cut {
            Cut::Block => false,
            _ => cut.shard(forest, partition, pod_shard, *parent) == shard && !starts(forest, cut, *block),
        });
        let of_shard = runs.entry(shard).or_default();
        let continues = parent.is_some() && before == parent.map(|parent| (parent, shard));
        match of_shard.last_mut().filter(|_| continues) {
            Some((_, keys)) => keys.push(forest.key(*block)),
            None => of_shard.push((parent.map(|parent| forest.key(parent)), vec![forest.key(*block)])),
        }
        before = Some((*block, shard));
    }
    runs
}

/// Whether a chain is cut before this block.
fn starts(forest: &Forest, cut: Cut, block: Block) -> bool {
    match cut {
        Cut::Segment(length) => forest.depth(block).is_multiple_of(length),
        Cut::Block => true,
        Cut::Root | Cut::Worker => forest.depth(block) == 0,
    }
}

fn pieces(forest: &Forest, partition: Partition, prompt: &[Block], cut: Cut) -> Vec<(u16, Vec<BlockKey>)> {
    let keys = |blocks: &[Block]| blocks.iter().map(|block| forest.key(*block)).collect();
    let stretches = cut.stretches(forest, partition, prompt);
    stretches
        .iter()
        .map(|stretch| (stretch.shard, keys(&prompt[stretch.start as usize..stretch.end as usize])))
        .collect()
}
