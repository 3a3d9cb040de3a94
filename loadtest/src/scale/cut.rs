//! The ways of dividing blocks among servers that the study compares.

use kvatlas_proto::{Partition, ShardSet};
use serde::Serialize;

use super::forest::{Block, Forest};

/// Segment lengths that are compared, blocks. The contract's is [`kvatlas_proto::shard::SEGMENT_BLOCKS`].
pub(super) const SEGMENT_LENGTHS: [u32; 4] = [8, 16, 32, 64];

/// By what blocks are divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cut {
    /// By the first key of the segment of so many blocks that a block lies in: kvatlas's way.
    Segment(u32),
    /// By the first key of the prompt.
    Root,
    /// By the block's own key.
    Block,
    /// By the pod that holds it. Pods are dealt out in turns, the most even division there is.
    Worker,
}

/// Consecutive blocks of a prompt that lie in one shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stretch {
    pub(super) shard: u16,
    /// Position of the first block.
    pub(super) start: u32,
    /// Position after the last one.
    pub(super) end: u32,
}

// === impl Cut ===

impl Cut {
    /// All of them, kvatlas's first.
    pub(super) fn all() -> impl Iterator<Item = Self> {
        SEGMENT_LENGTHS.into_iter().map(Self::Segment).chain([Self::Root, Self::Block, Self::Worker])
    }

    /// Name for tables.
    pub fn name(self) -> String {
        match self {
            Self::Segment(length) => format!("segments of {length}"),
            Self::Root => "prompt root".to_owned(),
            Self::Block => "single block".to_owned(),
            Self::Worker => "worker".to_owned(),
        }
    }

    /// The shard of a block that `pod` holds. For [`Cut::Worker`] it is the pod's number.
    pub(super) fn shard(self, forest: &Forest, partition: Partition, pod: u16, block: Block) -> u16 {
        let deciding = match self {
            Self::Segment(length) => forest.segment(block, length),
            Self::Root => forest.root(block),
            Self::Block => block,
            Self::Worker => return pod,
        };
        partition.shard_of(forest.key(deciding))
    }

    /// A prompt as the stretches that lie together; none for [`Cut::Worker`], where all of it lies everywhere.
    pub(super) fn stretches(self, forest: &Forest, partition: Partition, prompt: &[Block]) -> Vec<Stretch> {
        let length = match self {
            Self::Segment(length) => length as usize,
            Self::Root => prompt.len().max(1),
            Self::Block => 1,
            Self::Worker => return Vec::new(),
        };
        let starts = (0u32..).step_by(length);
        let stretch = |(start, blocks): (u32, &[Block])| Stretch {
            shard: partition.shard_of(forest.key(blocks[0])),
            start,
            end: start + blocks.len() as u32,
        };
        starts.zip(prompt.chunks(length)).map(stretch).collect()
    }
}

/// By shard, the number of the server that owns it.
pub(super) fn owners(partition: Partition, servers: u16) -> Vec<u16> {
    let mut owners = vec![0; usize::from(partition.shards())];
    let all = ShardSet::new(0, servers.into()).expect("the study divides among fewer servers than the most");
    for set in all.siblings() {
        for shard in set.shards(partition) {
            owners[usize::from(shard.number())] = set.ordinal();
        }
    }
    owners
}

#[cfg(test)]
mod tests {
    use kvatlas_proto::shard::SEGMENT_BLOCKS;

    use super::*;

    #[test]
    fn the_cut_of_the_study_is_the_contracts() {
        let mut forest = Forest::new();
        let mut chains = vec![Vec::new()];
        forest.extend(&mut chains[0], 500);
        for shared in [1, 31, 32, 33, 200] {
            let mut chain = chains[0][..shared].to_vec();
            forest.extend(&mut chain, 170);
            chains.push(chain);
        }
        for partition in [2, 64, 256, 1_024].map(|shards| Partition::new(shards).unwrap()) {
            let cut = Cut::Segment(SEGMENT_BLOCKS);
            for chain in &chains {
                let mut place = partition.first(forest.key(chain[0]));
                let stretches = cut.stretches(&forest, partition, chain);
                for (at, block) in chain.iter().enumerate() {
                    if at > 0 {
                        place = partition.next(place, forest.key(*block));
                    }
                    assert_eq!(cut.shard(&forest, partition, 0, *block), place.shard);
                    let stretch = stretches[at / SEGMENT_BLOCKS as usize];
                    assert_eq!(stretch.shard, place.shard);
                    assert_eq!(at as u32 - stretch.start, u32::from(place.step));
                }
            }
        }
    }

    #[test]
    fn a_shard_belongs_to_the_server_that_the_contract_says() {
        let partition = Partition::new(64).unwrap();
        let owners = owners(partition, 5);
        let set = ShardSet::new(3, 5).unwrap();
        let of_three = set.shards(partition);
        assert_eq!(owners.iter().filter(|owner| **owner == 3).count(), of_three.len());
        assert!(of_three.iter().all(|shard| owners[usize::from(shard.number())] == 3));
    }
}
