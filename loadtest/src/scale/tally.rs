//! Who gets how much: blocks and questions by server, for every way of dividing blocks.

use kvatlas_proto::Partition;
use serde::Serialize;

use super::cut::{Cut, owners};
use super::forest::{Block, Forest};
use super::pod::Pod;
use super::wire::instance;

/// Numbers of servers that are compared.
pub(super) const SERVERS: [u16; 5] = [4, 8, 16, 32, 64];
/// Bytes of a question beside pieces and keys; of a piece; of a key. A test compares with real questions.
const QUESTION_BYTES: u64 = 117;
const PIECE_BYTES: u64 = 19;
const KEY_BYTES: u64 = 8;
/// Bytes of an answer without anything; of the one kind of owner, in answers with something; of a source in a shard and its
/// owner, beside the name; of a stretch.
const ANSWER_BYTES: u64 = 63;
const KIND_BYTES: u64 = 24;
const RECORD_BYTES: u64 = 27;
const RANGE_BYTES: u64 = 8;

/// One way of dividing blocks among some servers.
#[derive(Clone, Debug, Serialize)]
pub struct Division {
    /// By what.
    pub cut: Cut,
    /// Virtual shards; for [`Cut::Worker`] they make no difference.
    pub shards: u16,
    /// Servers.
    pub servers: u16,
    /// Block operations of the server that gets most, against the mean.
    pub ingest_skew: f64,
    /// Blocks held by the server that holds most, against the mean.
    pub held_skew: f64,
    /// Questions of the server that gets most, against the mean.
    pub question_skew: f64,
    /// Stretches looked up by the server that looks up most, against the mean.
    pub piece_skew: f64,
    /// Servers that a query goes to, mean.
    pub fan_out: f64,
    /// The same, 99th percentile.
    pub fan_out_p99: u32,
    /// Bytes of a query's questions together, mean.
    pub question_bytes: f64,
    /// Bytes of a query's answers together, mean.
    pub answer_bytes: f64,
}

/// Counts blocks by shard.
pub(super) struct Tally {
    partitions: Vec<Partition>,
    pods: usize,
    /// By cut and partition, by shard (or pod).
    stored: Vec<Vec<u64>>,
    held: Vec<Vec<u64>>,
}

/// A query and how much of it each pod holds, most first: pod and depth.
pub(super) struct Sample {
    pub(super) prompt: Vec<Block>,
    pub(super) depths: Vec<(u16, u32)>,
    /// By position in `depths`, bytes of the names up to there.
    names: Vec<u64>,
}

/// What a query costs one server.
#[derive(Clone, Copy, Default)]
struct Share {
    pieces: u64,
    keys: u64,
    records: u64,
    names: u64,
    ranges: u64,
}

// === impl Sample ===

impl Sample {
    /// Looks at all pods. Their prefixes have no holes, so the depth is found by halving.
    pub(super) fn new(pods: &[Pod], prompt: Vec<Block>) -> Self {
        let depth = |pod: &Pod| prompt.partition_point(|block| pod.holds(*block)) as u32;
        let mut depths: Vec<(u16, u32)> =
            pods.iter().enumerate().map(|(number, pod)| (number as u16, depth(pod))).collect();
        depths.retain(|(_, depth)| *depth > 0);
        Self::of(prompt, depths)
    }

    fn of(prompt: Vec<Block>, mut depths: Vec<(u16, u32)>) -> Self {
        depths.sort_unstable_by_key(|(pod, depth)| (std::cmp::Reverse(*depth), *pod));
        let mut sum = 0;
        let mut names = vec![0];
        names.extend(depths.iter().map(|(pod, _)| {
            sum += instance(usize::from(*pod)).as_str().len() as u64;
            sum
        }));
        Self { prompt, depths, names }
    }

    /// Pods that hold the block at this position.
    pub(super) fn holders(&self, position: u32) -> u64 {
        self.depths.partition_point(|(_, depth)| *depth > position) as u64
    }
}

// === impl Tally ===

impl Tally {
    /// Nothing counted.
    pub(super) fn new(partitions: Vec<Partition>, pods: usize) -> Self {
        let combinations = Cut::all().count() * partitions.len();
        let most = partitions.iter().map(|partition| usize::from(partition.shards())).max().unwrap_or(1);
        let zeros = vec![vec![0; most.max(pods)]; combinations];
        Self { partitions, pods, stored: zeros.clone(), held: zeros }
    }

    /// A pod stored a block. Removals are not counted: sooner or later, there is one for each.
    pub(super) fn note_stored(&mut self, forest: &Forest, pod: u16, block: Block) {
        count(&mut self.stored, &self.partitions, forest, pod, block);
    }

    /// Counts what the pods hold.
    pub(super) fn note_held(&mut self, forest: &Forest, pods: &[Pod]) {
        for (number, pod) in pods.iter().enumerate() {
            for block in pod.blocks() {
                count(&mut self.held, &self.partitions, forest, number as u16, block);
            }
        }
    }

    /// All ways of dividing, with these queries.
    pub(super) fn divisions(&self, forest: &Forest, samples: &[Sample]) -> Vec<Division> {
        let mut divisions = Vec::new();
        let mut at = 0;
        for cut in Cut::all() {
            for partition in &self.partitions {
                for servers in SERVERS {
                    let owners = match cut {
                        Cut::Worker => {
                            (0..self.pods).map(|pod| (pod % usize::from(servers)) as u16).collect()
                        }
                        _ => owners(*partition, servers),
                    };
                    let asked = asked(cut, *partition, &owners, servers, forest, samples);
                    divisions.push(Division {
                        ingest_skew: skew(&by_server(&self.stored[at], &owners, servers)),
                        held_skew: skew(&by_server(&self.held[at], &owners, servers)),
                        ..asked
                    });
                }
                at += 1;
            }
        }
        divisions
    }
}

fn count(counts: &mut [Vec<u64>], partitions: &[Partition], forest: &Forest, pod: u16, block: Block) {
    let mut at = 0;
    for cut in Cut::all() {
        for partition in partitions {
            counts[at][usize::from(cut.shard(forest, *partition, pod, block))] += 1;
            at += 1;
        }
    }
}

fn by_server(counts: &[u64], owners: &[u16], servers: u16) -> Vec<u64> {
    let mut sums = vec![0; usize::from(servers)];
    counts.iter().zip(owners).for_each(|(count, owner)| sums[usize::from(*owner)] += count);
    sums
}

/// The largest against the mean.
fn skew(counts: &[u64]) -> f64 {
    let sum: u64 = counts.iter().sum();
    let most = counts.iter().copied().max().unwrap_or(0);
    if sum == 0 { 1.0 } else { most as f64 * counts.len() as f64 / sum as f64 }
}

/// What the queries cost, were blocks divided like this: sizes as the cluster's messages have them.
fn asked(
    cut: Cut,
    partition: Partition,
    owners: &[u16],
    servers: u16,
    forest: &Forest,
    samples: &[Sample],
) -> Division {
    let (mut questions, mut pieces) = (vec![0u64; usize::from(servers)], vec![0u64; usize::from(servers)]);
    let (mut fan_outs, mut question_bytes, mut answer_bytes) = (Vec::new(), 0, 0);
    for sample in samples {
        let mut fan_out = 0;
        for (server, share) in shares(cut, partition, owners, servers, forest, sample).iter().enumerate() {
            if share.pieces == 0 {
                continue;
            }
            fan_out += 1;
            questions[server] += 1;
            pieces[server] += share.pieces;
            question_bytes += QUESTION_BYTES + share.pieces * PIECE_BYTES + share.keys * KEY_BYTES;
            answer_bytes += ANSWER_BYTES
                + if share.records > 0 { KIND_BYTES } else { 0 }
                + share.records * RECORD_BYTES
                + share.names
                + share.ranges * RANGE_BYTES;
        }
        fan_outs.push(fan_out);
    }
    fan_outs.sort_unstable();
    let mean = |sum: u64| sum as f64 / samples.len().max(1) as f64;
    let p99 = (fan_outs.len() * 99 / 100).min(fan_outs.len().saturating_sub(1));
    Division {
        cut,
        shards: partition.shards(),
        servers,
        ingest_skew: 1.0,
        held_skew: 1.0,
        question_skew: skew(&questions),
        piece_skew: skew(&pieces),
        fan_out: mean(fan_outs.iter().map(|servers| u64::from(*servers)).sum()),
        fan_out_p99: fan_outs.get(p99).copied().unwrap_or(0),
        question_bytes: mean(question_bytes),
        answer_bytes: mean(answer_bytes),
    }
}

/// What a query costs each server.
fn shares(
    cut: Cut,
    partition: Partition,
    owners: &[u16],
    servers: u16,
    forest: &Forest,
    sample: &Sample,
) -> Vec<Share> {
    let mut shares = vec![Share::default(); usize::from(servers)];
    if cut == Cut::Worker {
        for (pod, _) in &sample.depths {
            let share = &mut shares[usize::from(owners[usize::from(*pod)])];
            (share.records, share.ranges) = (share.records + 1, share.ranges + 1);
            share.names += instance(usize::from(*pod)).as_str().len() as u64;
        }
        // Nobody knows beforehand who has something: everybody is asked everything.
        shares.iter_mut().for_each(|share| (share.pieces, share.keys) = (1, sample.prompt.len() as u64));
        return shares;
    }
    let mut met = vec![false; usize::from(servers)];
    for stretch in cut.stretches(forest, partition, &sample.prompt) {
        let server = usize::from(owners[usize::from(stretch.shard)]);
        let share = &mut shares[server];
        share.pieces += 1;
        share.keys += u64::from(stretch.end - stretch.start);
        // Prefixes have no holes: whoever holds something of a later stretch held something of the first one, and all that it
        // holds there is one range of places.
        if !std::mem::replace(&mut met[server], true) {
            let holders = sample.holders(stretch.start);
            share.records = holders;
            share.ranges = holders;
            share.names = sample.names[holders as usize];
        }
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skew_is_how_many_times_the_mean_the_largest_is() {
        assert_eq!(skew(&[5, 5, 5, 5]), 1.0);
        assert_eq!(skew(&[20, 0, 0, 0]), 4.0);
        assert_eq!(skew(&[0, 0]), 1.0);
    }

    #[test]
    fn by_worker_everybody_is_asked_and_by_root_one_server() {
        let mut forest = Forest::new();
        let mut prompt = Vec::new();
        forest.extend(&mut prompt, 100);
        let partition = Partition::new(64).unwrap();
        let sample = Sample::of(prompt, vec![(3, 100), (1, 40)]);
        assert_eq!([0, 39, 40, 99].map(|position| sample.holders(position)), [2, 2, 1, 1]);
        let owners_of = owners(partition, 8);
        let of = |cut, owners: &[u16]| {
            asked(cut, partition, owners, 8, &forest, std::slice::from_ref(&sample)).fan_out
        };
        assert_eq!(of(Cut::Worker, &[0, 1, 2, 3]), 8.0);
        assert_eq!(of(Cut::Root, &owners_of), 1.0);
        assert!(of(Cut::Segment(32), &owners_of) <= 4.0 && of(Cut::Block, &owners_of) > 6.0);
    }
}
