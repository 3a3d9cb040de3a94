//! What an engine keeps outside its GPU: every block that is computed is written through to the first tier, and goes one
//! tier down when it was used longest ago there.

use kvatlas_planner::cost;
use kvatlas_proto::Tier;

use super::Change;
use crate::routing::lru::Lru;

/// One tier.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TierConfig {
    /// Which one.
    pub tier: Tier,
    /// Blocks that fit.
    pub blocks: u32,
    /// Start-up time of a read, ms.
    pub alpha_ms: f64,
    /// Speed of reads, GB/s.
    pub gb_per_s: f64,
}

/// All tiers below the GPU, fastest first.
#[derive(Clone, Debug)]
pub(super) struct Tiers {
    tiers: Vec<(TierConfig, Lru<u32>)>,
    /// When the copy engine has done what it was told, microseconds.
    lane_free_us: u64,
}

// === impl Tiers ===

impl Tiers {
    pub(super) fn new(configs: &[TierConfig]) -> Self {
        let tiers = configs.iter().map(|config| (*config, Lru::new(config.blocks as usize))).collect();
        Self { tiers, lane_free_us: 0 }
    }

    /// The fastest tier that has the block.
    pub(super) fn find(&self, block: u32) -> Option<usize> {
        self.tiers.iter().position(|(_, held)| held.contains(block))
    }

    pub(super) fn holds(&self, tier: Tier, block: u32) -> bool {
        self.tiers.iter().any(|(config, held)| config.tier == tier && held.contains(block))
    }

    /// Writes consecutive blocks of a prompt through; their parents stay newer.
    pub(super) fn write(&mut self, blocks: &[u32], changes: &mut Vec<Change>) {
        let mut coming: Vec<u32> = blocks.to_vec();
        for (config, held) in &mut self.tiers {
            let mut gone = Vec::new();
            let new: Vec<u32> = coming.iter().copied().filter(|block| !held.contains(*block)).collect();
            for block in coming.iter().rev() {
                gone.extend(held.insert(*block, ()).map(|(block, ())| block));
            }
            let tier = config.tier;
            let stays = |block: &&u32| held.contains(**block);
            changes.extend(new.iter().filter(stays).map(|block| Change {
                tier,
                block: *block,
                stored: true,
            }));
            gone.retain(|block| !held.contains(*block));
            let was_there = |block: &&u32| !new.contains(block);
            changes.extend(gone.iter().filter(was_there).map(|block| Change {
                tier,
                block: *block,
                stored: false,
            }));
            // The newest of what goes down comes last in this order, and is put in first there.
            gone.reverse();
            coming = gone;
            if coming.is_empty() {
                break;
            }
        }
    }

    /// Counts blocks as used, their parents as used later.
    pub(super) fn touch(&mut self, blocks: &[u32]) {
        for (_, held) in &mut self.tiers {
            blocks.iter().rev().for_each(|block| {
                held.touch(*block);
            });
        }
    }

    /// Reads so many bytes from each tier (by its position), one after the other. Returns when that is done, microseconds.
    pub(super) fn read(&mut self, bytes: &[f64], now_us: u64) -> u64 {
        let mut ms = 0.0;
        for ((config, _), bytes) in self.tiers.iter().zip(bytes).filter(|(_, bytes)| **bytes > 0.0) {
            ms += config.alpha_ms + cost::moving_ms(*bytes, config.gb_per_s);
        }
        if ms > 0.0 {
            self.lane_free_us = self.lane_free_us.max(now_us) + (ms * 1e3).round() as u64;
            return self.lane_free_us;
        }
        now_us
    }

    pub(super) fn len(&self) -> usize {
        self.tiers.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_longest_ago_goes_one_tier_down_and_is_told() {
        let tier = |tier, blocks| TierConfig { tier, blocks, alpha_ms: 1.0, gb_per_s: 1.0 };
        let mut tiers = Tiers::new(&[tier(Tier::Cpu, 2), tier(Tier::Ssd, 2)]);
        let told = |tiers: &mut Tiers, blocks: &[u32]| {
            let mut changes = Vec::new();
            tiers.write(blocks, &mut changes);
            changes.iter().map(|c| (c.tier as u8, c.block, c.stored)).collect::<Vec<_>>()
        };
        assert_eq!(told(&mut tiers, &[1, 2]), [(1, 1, true), (1, 2, true)]);
        // The leaf goes first.
        assert_eq!(told(&mut tiers, &[3]), [(1, 3, true), (1, 2, false), (2, 2, true)]);
        tiers.touch(&[1]);
        assert_eq!(told(&mut tiers, &[4]), [(1, 4, true), (1, 3, false), (2, 3, true)]);
        assert_eq!((tiers.find(1), tiers.find(3), tiers.find(9)), (Some(0), Some(1), None));
        // 1 ms to start and 1 ms for a megabyte, twice.
        assert_eq!(tiers.read(&[1e6, 1e6], 10), 4_010);
        assert_eq!(tiers.read(&[0.0, 0.0], 10), 10);
    }
}
