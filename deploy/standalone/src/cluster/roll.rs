//! What servers have said of themselves lately, and what that says of a division. Pure.

use std::collections::{BTreeMap, BTreeSet};

use kvatlas_index::cluster::{Announcement, PRESENCE_MS};
use kvatlas_proto::ShardSet;

/// Most servers listed; a deployment has tens.
pub const MAX_SERVERS_LISTED: usize = 4_096;

/// The servers by name.
#[derive(Debug, Default)]
pub struct Roll(BTreeMap<String, Heard>);

/// One server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heard {
    /// Into how many shards it cuts the key space.
    pub shards: u16,
    /// What it answers for; nothing while it starts or stops.
    pub sets: Vec<ShardSet>,
    at_ms: u64,
}

// === impl Roll ===

impl Roll {
    /// Takes an announcement in. One too many is not listed.
    pub fn hear(&mut self, said: Announcement, now_ms: u64) {
        self.0.retain(|_, heard| now_ms.saturating_sub(heard.at_ms) <= PRESENCE_MS);
        if self.0.len() < MAX_SERVERS_LISTED || self.0.contains_key(&said.server) {
            let heard = Heard { shards: said.shards, sets: said.sets, at_ms: now_ms };
            self.0.insert(said.server, heard);
        }
    }

    /// Who is there.
    pub fn servers(&self, now_ms: u64) -> impl Iterator<Item = (&str, &Heard)> {
        let is_there = move |heard: &Heard| now_ms.saturating_sub(heard.at_ms) <= PRESENCE_MS;
        self.0.iter().filter(move |(_, heard)| is_there(heard)).map(|(name, heard)| (name.as_str(), heard))
    }

    /// Into how many shards the key space is cut; where servers differ, the least that any of them says.
    pub fn shards(&self, now_ms: u64) -> Option<u16> {
        self.servers(now_ms).map(|(_, heard)| heard.shards).min()
    }

    /// Every set that somebody answers for.
    pub fn sets(&self, now_ms: u64) -> BTreeSet<ShardSet> {
        self.servers(now_ms).flat_map(|(_, heard)| heard.sets.iter().copied()).collect()
    }

    /// The parts of a division that nobody answers for.
    pub fn missing(&self, servers: u16, now_ms: u64) -> Vec<u16> {
        let there: BTreeSet<u16> = self
            .sets(now_ms)
            .into_iter()
            .filter(|set| set.servers() == servers)
            .map(ShardSet::ordinal)
            .collect();
        (0..servers).filter(|ordinal| !there.contains(ordinal)).collect()
    }

    /// Sets of other divisions that somebody still answers for.
    pub fn of_other_divisions(&self, servers: u16, now_ms: u64) -> Vec<ShardSet> {
        self.sets(now_ms).into_iter().filter(|set| set.servers() != servers).collect()
    }

    /// The division that all sets are of, if they are of one.
    pub fn division(&self, now_ms: u64) -> Option<u16> {
        let divisions: BTreeSet<u16> = self.sets(now_ms).into_iter().map(ShardSet::servers).collect();
        if divisions.len() == 1 { divisions.first().copied() } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(server: &str, sets: &[(u32, u32)]) -> Announcement {
        let sets = sets.iter().map(|(ordinal, servers)| ShardSet::new(*ordinal, *servers).unwrap()).collect();
        Announcement { server: server.into(), shards: 16, sets }
    }

    #[test]
    fn a_division_is_complete_when_somebody_answers_for_each_part_and_nobody_for_old_ones() {
        let mut roll = Roll::default();
        roll.hear(said("a", &[(0, 2), (0, 3)]), 0);
        roll.hear(said("b", &[(1, 3)]), 0);
        assert_eq!((roll.missing(3, 0), roll.division(0)), (vec![2], None));
        roll.hear(said("c", &[(2, 3)]), 0);
        assert_eq!(roll.missing(3, 0), [0; 0]);
        assert_eq!(roll.of_other_divisions(3, 0), [ShardSet::new(0, 2).unwrap()]);
        roll.hear(said("a", &[(0, 3)]), 0);
        assert!(roll.of_other_divisions(3, 0).is_empty());
        assert_eq!((roll.division(0), roll.shards(0)), (Some(3), Some(16)));
    }

    #[test]
    fn who_says_nothing_any_more_is_not_counted() {
        let mut roll = Roll::default();
        roll.hear(said("a", &[(0, 1)]), 0);
        assert!(roll.missing(1, PRESENCE_MS).is_empty());
        assert_eq!(roll.missing(1, PRESENCE_MS + 1), [0]);
        assert_eq!((roll.shards(PRESENCE_MS + 1), roll.servers(PRESENCE_MS + 1).count()), (None, 0));
    }
}
