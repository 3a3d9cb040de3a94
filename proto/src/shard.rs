//! How a scope's key space is cut into virtual shards, and which server owns which of them.
//!
//! A chain is cut every [`SEGMENT_BLOCKS`] blocks, counted from the prompt's start. The first key of such a *segment* picks
//! its shard, so the blocks of a segment lie together, in one chain, and the next segment lies anywhere. Long prompts that
//! share a beginning therefore occupy all shards evenly, and not one shard for ever; a question about a prompt of any length
//! goes to each server at most once.
//!
//! Who computes keys knows how deep in the chain a block is, so publishers and servers agree without asking anybody. In a
//! shard, a segment is a chain of its own: what precedes it lies elsewhere.
//!
//! A shard is never split: the number of shards is the deployment's for life, and the number of servers is not.
//! [`ShardSet::contains`] says what belongs to each of N servers: as evenly as can be, and when N grows by one, the new
//! server takes its share from the others and nothing else moves.

use std::fmt;

use crate::keys::BlockKey;

/// Blocks of a segment. Longer ones cost fewer look-ups and less memory; shorter ones spread what follows a shared beginning
/// better: all that branches off inside a segment lies in that segment's shard. See `docs/scale.md` for figures.
pub const SEGMENT_BLOCKS: u32 = 16;
/// Most virtual shards of a deployment. Each costs a publisher a heartbeat a second.
pub const MAX_SHARDS: u16 = 1_024;
/// Most servers that shards are divided among.
pub const MAX_SERVERS: u16 = MAX_SHARDS;

/// One virtual shard of the key space, which is cut into [`ShardId::of`] of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ShardId {
    number: u16,
    of: u16,
}

/// How many virtual shards there are: the same in every process of a deployment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Partition(u16);

/// Where in the partition a block lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// Number of its shard.
    pub shard: u16,
    /// How many blocks of its segment come before it.
    pub step: u8,
}

/// The shards of one of several servers. Replicas have the same set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ShardSet {
    ordinal: u16,
    servers: u16,
}

/// The number of shards cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} shards cannot be: give 1 to {MAX_SHARDS}, the same for every shim and server of the deployment")]
pub struct InvalidPartitionError(pub u32);

/// The set cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "server {ordinal} of {servers} cannot be: servers are numbered from 0, and there are at most {MAX_SERVERS}"
)]
pub struct InvalidShardSetError {
    /// Which server.
    pub ordinal: u32,
    /// Of how many.
    pub servers: u32,
}

// === impl ShardId ===

impl ShardId {
    /// The whole key space: it is not cut.
    pub const WHOLE: Self = Self { number: 0, of: 1 };

    /// `None` if there is no such shard.
    pub fn new(number: u16, of: u16) -> Option<Self> {
        (number < of && of <= MAX_SHARDS).then_some(Self { number, of })
    }

    /// Which one, from 0.
    pub fn number(self) -> u16 {
        self.number
    }

    /// How many there are.
    pub fn of(self) -> u16 {
        self.of
    }
}

impl Default for ShardId {
    fn default() -> Self {
        Self::WHOLE
    }
}

/// `all`, or for example `17of64`: a word of a subject.
impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::WHOLE { f.write_str("all") } else { write!(f, "{}of{}", self.number, self.of) }
    }
}

// === impl Partition ===

impl Partition {
    /// The key space in one piece.
    pub const WHOLE: Self = Self(1);

    /// Cuts the key space into so many virtual shards.
    pub fn new(shards: u32) -> Result<Self, InvalidPartitionError> {
        match u16::try_from(shards) {
            Ok(number) if (1..=MAX_SHARDS).contains(&number) => Ok(Self(number)),
            _ => Err(InvalidPartitionError(shards)),
        }
    }

    /// How many shards there are.
    pub fn shards(self) -> u16 {
        self.0
    }

    /// The shard of this number; the last one for a number that is too large.
    pub fn shard(self, number: u16) -> ShardId {
        ShardId { number: number.min(self.0 - 1), of: self.0 }
    }

    /// All shards in order.
    pub fn all(self) -> impl ExactSizeIterator<Item = ShardId> {
        (0..self.0).map(move |number| ShardId { number, of: self.0 })
    }

    /// Where a prompt's first block lies.
    pub fn first(self, key: BlockKey) -> Place {
        Place { shard: self.shard_of(key), step: 0 }
    }

    /// Where the block lies that follows one at `before`.
    pub fn next(self, before: Place, key: BlockKey) -> Place {
        // In one piece there is nothing to cut.
        if self.0 == 1 {
            return Place { shard: 0, step: 1 };
        }
        if u32::from(before.step) + 1 < SEGMENT_BLOCKS {
            Place { step: before.step + 1, ..before }
        } else {
            self.first(key)
        }
    }

    /// The shard of the segment that begins with this key.
    pub fn shard_of(self, first: BlockKey) -> u16 {
        // Keys are spread well, but tables use their bits too: a multiply takes all of them. (2^64 / golden ratio)
        let spread = (first.0 ^ (first.0 >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((u128::from(spread) * u128::from(self.0)) >> 64) as u16
    }

    /// Blocks that lie together at most: a segment, or everything.
    pub fn segment_blocks(self) -> u32 {
        if self.0 == 1 { u32::MAX } else { SEGMENT_BLOCKS }
    }
}

impl Default for Partition {
    fn default() -> Self {
        Self::WHOLE
    }
}

// === impl Place ===

impl Place {
    /// Whether a segment begins here: in its shard, nothing precedes the block.
    pub fn starts_segment(self) -> bool {
        self.step == 0
    }
}

// === impl ShardSet ===

impl ShardSet {
    /// Everything, for a server that is alone (or one of some with the same content).
    pub const ALL: Self = Self { ordinal: 0, servers: 1 };

    /// What server `ordinal` of `servers` owns, from 0.
    pub fn new(ordinal: u32, servers: u32) -> Result<Self, InvalidShardSetError> {
        let error = InvalidShardSetError { ordinal, servers };
        let (Ok(ordinal), Ok(servers)) = (u16::try_from(ordinal), u16::try_from(servers)) else {
            return Err(error);
        };
        if ordinal >= servers || servers > MAX_SERVERS { Err(error) } else { Ok(Self { ordinal, servers }) }
    }

    /// Which server.
    pub fn ordinal(self) -> u16 {
        self.ordinal
    }

    /// Of how many.
    pub fn servers(self) -> u16 {
        self.servers
    }

    /// The sets of all servers of this division, in order.
    pub fn siblings(self) -> impl ExactSizeIterator<Item = Self> {
        (0..self.servers).map(move |ordinal| Self { ordinal, servers: self.servers })
    }

    /// The shards of this set, ascending. With fewer shards than servers, some sets are empty.
    pub fn shards(self, partition: Partition) -> Vec<ShardId> {
        let owners = owners(partition, self.servers);
        partition.all().filter(|shard| owners[usize::from(shard.number)] == self.ordinal).collect()
    }
}

/// For example `2of4`: a word of a subject.
impl fmt::Display for ShardSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}of{}", self.ordinal, self.servers)
    }
}

/// By shard, the server that owns it. Built from one server up: each new one takes its even share from those that have most.
fn owners(partition: Partition, servers: u16) -> Vec<u16> {
    let shards = partition.shards();
    let mut owners = vec![0; usize::from(shards)];
    let mut owned = vec![0u16; usize::from(servers)];
    owned[0] = shards;
    for newcomer in 1..servers {
        let share = shards / (newcomer + 1);
        for _ in 0..share {
            let (richest, _) = owned[..usize::from(newcomer)]
                .iter()
                .enumerate()
                .max_by_key(|(server, count)| (**count, std::cmp::Reverse(*server)))
                .expect("there is at least one server before a newcomer");
            let last = owners.iter().rposition(|owner| usize::from(*owner) == richest);
            let Some(last) = last else { break };
            owners[last] = newcomer;
            owned[richest] -= 1;
            owned[usize::from(newcomer)] += 1;
        }
    }
    owners
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn counts(shards: u32, servers: u32) -> Vec<usize> {
        let partition = Partition::new(shards).unwrap();
        (0..servers).map(|n| ShardSet::new(n, servers).unwrap().shards(partition).len()).collect()
    }

    #[test]
    fn shards_are_divided_evenly_and_each_has_one_owner() {
        for (shards, servers) in [(1, 1), (64, 4), (64, 7), (256, 30), (1_024, 1_024), (5, 9)] {
            let counts = counts(shards, servers);
            assert_eq!(counts.iter().sum::<usize>(), shards as usize);
            assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1, "{counts:?}");
        }
    }

    #[test]
    fn a_server_more_takes_its_share_and_moves_nothing_else() {
        let partition = Partition::new(256).unwrap();
        for servers in 1..40 {
            let (before, after) = (owners(partition, servers), owners(partition, servers + 1));
            let moved: Vec<_> = before.iter().zip(&after).filter(|(a, b)| a != b).collect();
            assert!(moved.iter().all(|(_, to)| **to == servers));
            assert_eq!(moved.len(), usize::from(256 / (servers + 1)));
        }
    }

    #[test]
    fn impossible_partitions_and_sets_are_refused_with_what_is_possible() {
        assert!(Partition::new(0).unwrap_err().to_string().contains("1 to 1024"));
        assert!(Partition::new(70_000).is_err());
        assert!(ShardSet::new(4, 4).unwrap_err().to_string().contains("numbered from 0"));
        assert!(ShardSet::new(0, 0).is_err());
        assert_eq!(ShardId::new(3, 3), None);
    }

    #[test]
    fn segments_of_one_prefix_spread_over_all_shards() {
        let partition = Partition::new(16).unwrap();
        let mut seen = std::collections::BTreeMap::new();
        for n in 0..16_000u64 {
            *seen
                .entry(partition.shard_of(BlockKey(n.wrapping_mul(0x2545_f491_4f6c_dd1d))))
                .or_insert(0u32) += 1;
        }
        assert_eq!(seen.len(), 16);
        assert!(seen.values().all(|count| (850..1_150).contains(count)), "{seen:?}");
    }

    proptest! {
        #[test]
        fn a_chain_is_cut_by_depth_alone(keys in proptest::collection::vec(any::<u64>(), 1..200), shards in 2u32..64) {
            let partition = Partition::new(shards).unwrap();
            let mut place = partition.first(BlockKey(keys[0]));
            for (depth, key) in keys.iter().enumerate() {
                if depth > 0 {
                    place = partition.next(place, BlockKey(*key));
                }
                let first = depth - depth % SEGMENT_BLOCKS as usize;
                prop_assert_eq!(place.shard, partition.shard_of(BlockKey(keys[first])));
                prop_assert_eq!(usize::from(place.step), depth - first);
                prop_assert!(place.shard < partition.shards());
            }
        }
    }
}
