//! What branches off inside a segment of a prompt that everybody shares lies in that segment's shard: how uneven that makes
//! the servers' work, as a formula.
//!
//! With `r` blocks left of the segment, tails of `t` blocks have `min(t, r) / t` of their blocks in the hot shard; the rest is
//! spread evenly over `n` servers. How far the shared prompt reaches into a segment is chance, so `r` is anything from 0 to one
//! less than the segment's length: mean and worst are over these.

use serde::Serialize;

use super::cut::SEGMENT_LENGTHS;
use super::tally::SERVERS;

/// Lengths of tails that are compared, blocks.
const TAILS: [u32; 4] = [16, 64, 200, 2_000];

/// The server with the hot segment against the mean, if all requests share one prompt.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BranchRow {
    /// Blocks of a segment.
    pub segment_blocks: u32,
    /// Blocks behind the shared prompt.
    pub tail_blocks: u32,
    /// Servers.
    pub servers: u16,
    /// Mean over the places at which the shared prompt can end.
    pub mean_skew: f64,
    /// The worst place.
    pub worst_skew: f64,
}

/// The skew if `rest` blocks are left of the segment in which the shared prompt ends.
pub(super) fn skew(tail: u32, rest: u32, servers: u16) -> f64 {
    let hot = f64::from(tail.min(rest)) / f64::from(tail.max(1));
    f64::from(servers) * hot + (1.0 - hot)
}

/// All combinations.
pub(super) fn rows() -> Vec<BranchRow> {
    let mut rows = Vec::new();
    for segment_blocks in SEGMENT_LENGTHS {
        for tail_blocks in TAILS {
            for servers in SERVERS {
                let skews = (0..segment_blocks).map(|rest| skew(tail_blocks, rest, servers));
                rows.push(BranchRow {
                    segment_blocks,
                    tail_blocks,
                    servers,
                    mean_skew: skews.clone().sum::<f64>() / f64::from(segment_blocks),
                    worst_skew: skews.fold(0.0, f64::max),
                });
            }
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use kvatlas_proto::Partition;

    use super::super::cut::{Cut, owners};
    use super::super::forest::Forest;
    use super::*;

    #[test]
    fn the_formula_is_what_the_cut_does() {
        let partition = Partition::new(256).unwrap();
        let mut forest = Forest::new();
        let mut shared = Vec::new();
        forest.extend(&mut shared, 840);
        for length in SEGMENT_LENGTHS {
            let owners = owners(partition, 16);
            let mut counts = [0u64; 16];
            for _ in 0..2_000 {
                let mut chain = shared.clone();
                forest.extend(&mut chain, 200);
                for block in &chain[840..] {
                    let shard = Cut::Segment(length).shard(&forest, partition, 0, *block);
                    counts[usize::from(owners[usize::from(shard)])] += 1;
                }
            }
            let found = *counts.iter().max().unwrap() as f64 * 16.0 / 400_000.0;
            let expected = skew(200, (length - 840 % length) % length, 16);
            assert!((found / expected - 1.0).abs() < 0.1, "{length}: {found} against {expected}");
        }
    }
}
