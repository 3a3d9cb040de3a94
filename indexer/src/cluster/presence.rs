//! Which servers there are, as far as they have said so, and whom to ask. Pure.
//!
//! A server says every [`ANNOUNCE_MS`] which sets of shards it can answer for, and goes by saying that it has none. Who has not
//! been heard for [`PRESENCE_MS`] is not counted on. Which of several servers with the same set gets a question is the
//! broker's business; this table only says which sets there are.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kvatlas_proto::sealed::{OpenError, Seal};
use kvatlas_proto::{Partition, ShardSet};

/// Time between two announcements, milliseconds.
pub const ANNOUNCE_MS: u64 = 500;
/// How long an announcement counts, milliseconds: three may be lost.
pub const PRESENCE_MS: u64 = 2_000;
/// Most servers that are remembered; a deployment has tens.
pub(crate) const MAX_SERVERS_KNOWN: usize = 4_096;
/// Most sets of one server: its own, and those it is about to have or to give up.
pub(crate) const MAX_SETS: usize = 8;
const SEAL: Seal = Seal { what: "an announcement of a server", magic: *b"KVAP", version: 1 };

/// What a server says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// Its name, for this life.
    pub server: String,
    /// Shards of the deployment, as it was told.
    pub shards: u16,
    /// What it can answer for.
    pub sets: Vec<ShardSet>,
}

/// A received announcement is not usable.
#[derive(Debug, thiserror::Error)]
pub enum ParseAnnouncementError {
    /// It is damaged, or of another version.
    #[error(transparent)]
    Sealed(#[from] OpenError),
    /// It is whole, and says something else.
    #[error("announcement is not of this layout: run servers of one version")]
    Layout,
}

/// Who is there.
#[derive(Debug)]
pub(crate) struct Presence {
    partition: Partition,
    servers: BTreeMap<String, Known>,
    /// The shards of every set that was ever announced, so that they are worked out once.
    contents: BTreeMap<ShardSet, Content>,
    /// What [`Self::cover`] chooses from, until then.
    available: (Vec<(ShardSet, Content)>, u64),
}

/// By number, the shards of a set.
type Content = Arc<[bool]>;

#[derive(Debug)]
struct Known {
    sets: Vec<ShardSet>,
    heard_ms: u64,
}

/// Who is to be asked about which shards.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cover {
    /// Shards that are here.
    pub(crate) local: Vec<u16>,
    /// Shards to ask for, by the set whose servers have them.
    pub(crate) remote: Vec<(ShardSet, Vec<u16>)>,
    /// Shards that nobody is known to have.
    pub(crate) nobody: Vec<u16>,
}

// === impl Announcement ===

impl Announcement {
    /// What is published.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = SEAL.start(64);
        out.extend(self.shards.to_le_bytes());
        out.push(self.sets.len().min(MAX_SETS) as u8);
        for set in self.sets.iter().take(MAX_SETS) {
            out.extend(set.ordinal().to_le_bytes());
            out.extend(set.servers().to_le_bytes());
        }
        out.extend(self.server.as_bytes());
        Seal::finish(&mut out);
        out
    }

    /// The inverse of [`Self::encode`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ParseAnnouncementError> {
        let layout = || ParseAnnouncementError::Layout;
        let body = SEAL.open(bytes)?;
        let (shards, rest) = body.split_first_chunk::<2>().ok_or_else(layout)?;
        let (count, mut rest) = rest.split_first().ok_or_else(layout)?;
        let mut sets = Vec::new();
        for _ in 0..*count {
            let (set, after) = rest.split_first_chunk::<4>().ok_or_else(layout)?;
            rest = after;
            let [ordinal, servers] = [[set[0], set[1]], [set[2], set[3]]].map(u16::from_le_bytes);
            sets.push(ShardSet::new(ordinal.into(), servers.into()).map_err(|_| layout())?);
        }
        let server = std::str::from_utf8(rest).map_err(|_| layout())?.to_owned();
        if server.is_empty() || server.len() > 128 || sets.len() > MAX_SETS {
            return Err(layout());
        }
        Ok(Self { server, shards: u16::from_le_bytes(*shards), sets })
    }
}

// === impl Presence ===

impl Presence {
    pub(crate) fn new(partition: Partition) -> Self {
        Self { partition, servers: BTreeMap::new(), contents: BTreeMap::new(), available: (Vec::new(), 0) }
    }

    /// Takes an announcement in; false if it is of another partition, or there are too many servers.
    pub(crate) fn hear(&mut self, said: Announcement, now_ms: u64) -> bool {
        if said.shards != self.partition.shards() {
            return false;
        }
        self.available.1 = 0;
        if said.sets.is_empty() {
            self.servers.remove(&said.server);
            return true;
        }
        self.servers.retain(|_, known| now_ms.saturating_sub(known.heard_ms) <= PRESENCE_MS);
        if self.servers.len() >= MAX_SERVERS_KNOWN && !self.servers.contains_key(&said.server) {
            return false;
        }
        for set in &said.sets {
            self.note(*set);
        }
        self.servers.insert(said.server, Known { sets: said.sets, heard_ms: now_ms });
        true
    }

    fn note(&mut self, set: ShardSet) {
        let shards = usize::from(self.partition.shards());
        self.contents.entry(set).or_insert_with(|| {
            let mut content = vec![false; shards];
            set.shards(self.partition).iter().for_each(|shard| content[usize::from(shard.number())] = true);
            content.into()
        });
    }

    /// The sets that somebody can answer for, with the number of servers that do.
    pub(crate) fn sets(&self, now_ms: u64) -> BTreeMap<ShardSet, usize> {
        let mut sets = BTreeMap::new();
        for known in
            self.servers.values().filter(|known| now_ms.saturating_sub(known.heard_ms) <= PRESENCE_MS)
        {
            for set in &known.sets {
                *sets.entry(*set).or_default() += 1;
            }
        }
        sets
    }

    /// Whether somebody can answer for every set of a division into so many servers.
    pub(crate) fn is_complete(&self, servers: u16, now_ms: u64) -> bool {
        let there: BTreeSet<u16> = self
            .sets(now_ms)
            .into_keys()
            .filter(|set| set.servers() == servers)
            .map(ShardSet::ordinal)
            .collect();
        there.len() == usize::from(servers)
    }

    /// Whom to ask about these shards, with as few questions as can be. `is_local` says which are here; sets in `avoid`
    /// are not asked.
    pub(crate) fn cover(
        &mut self,
        shards: &[u16],
        is_local: impl Fn(u16) -> bool,
        avoid: &[ShardSet],
        now_ms: u64,
    ) -> Cover {
        let (local, mut rest): (Vec<u16>, Vec<u16>) = shards.iter().partition(|shard| is_local(**shard));
        let mut cover = Cover { local, ..Cover::default() };
        if rest.is_empty() {
            return cover;
        }
        self.renew_available(now_ms);
        let mut sets: Vec<_> = self.available.0.iter().filter(|(set, _)| !avoid.contains(set)).collect();
        while !rest.is_empty() {
            let gain = |content: &[bool]| rest.iter().filter(|shard| content[usize::from(**shard)]).count();
            // Of sets that have as much, the first: so all servers ask alike.
            let best = (0..sets.len()).max_by_key(|at| (gain(&sets[*at].1), std::cmp::Reverse(*at)));
            let Some((set, content)) = best.filter(|at| gain(&sets[*at].1) > 0).map(|at| sets.remove(at))
            else {
                break;
            };
            let (has, others) = rest.iter().partition(|shard| content[usize::from(**shard)]);
            cover.remote.push((*set, has));
            rest = others;
        }
        cover.nobody = rest;
        cover
    }

    /// Works out who is there, when somebody has said something or may have gone.
    fn renew_available(&mut self, now_ms: u64) {
        let until = self.available.1;
        if now_ms < until {
            return;
        }
        let sets = self.sets(now_ms).into_keys();
        let sets = sets.filter_map(|set| Some((set, Arc::clone(self.contents.get(&set)?)))).collect();
        let ends = self.servers.values().map(|known| known.heard_ms + PRESENCE_MS + 1);
        let until = ends.filter(|end| *end > now_ms).min().unwrap_or(now_ms + PRESENCE_MS);
        self.available = (sets, until);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(ordinal: u32, servers: u32) -> ShardSet {
        ShardSet::new(ordinal, servers).unwrap()
    }

    fn presence(sets: &[ShardSet]) -> Presence {
        let mut presence = Presence::new(Partition::new(16).unwrap());
        for (n, set) in sets.iter().enumerate() {
            assert!(presence.hear(Announcement { server: format!("s{n}"), shards: 16, sets: vec![*set] }, 0));
        }
        presence
    }

    fn all() -> Vec<u16> {
        (0..16).collect()
    }

    #[test]
    fn announcements_round_trip_and_damage_is_refused() {
        let said = Announcement { server: "a-1".into(), shards: 64, sets: vec![set(1, 4), set(0, 5)] };
        let bytes = said.encode();
        assert_eq!(Announcement::parse(&bytes).unwrap(), said);
        for cut in 0..bytes.len() {
            assert!(Announcement::parse(&bytes[..cut]).is_err());
        }
    }

    #[test]
    fn each_server_is_asked_once_and_what_is_here_is_not_asked_for() {
        let mut presence = presence(&[set(0, 4), set(1, 4), set(2, 4), set(3, 4), set(2, 4)]);
        let own = set(1, 4).shards(Partition::new(16).unwrap());
        let cover = presence.cover(&all(), |shard| own.iter().any(|own| own.number() == shard), &[], 10);
        assert_eq!((cover.local.len(), cover.remote.len(), cover.nobody.len()), (4, 3, 0));
        assert_eq!(presence.sets(10)[&set(2, 4)], 2);
    }

    #[test]
    fn during_a_change_of_division_the_sets_of_both_are_used() {
        // Of the old division, server 0 is gone; of the new one, three are ready.
        let mut presence = presence(&[set(1, 2), set(0, 4), set(2, 4), set(3, 4)]);
        let cover = presence.cover(&all(), |_| false, &[], 10);
        assert!(cover.nobody.is_empty(), "{cover:?}");
        assert!(!presence.is_complete(4, 10) && !presence.is_complete(2, 10));
        let without = presence.cover(&all(), |_| false, &[set(1, 2)], 10);
        assert!(!without.nobody.is_empty() && without.remote.iter().all(|(asked, _)| *asked != set(1, 2)));
    }

    #[test]
    fn who_says_nothing_is_soon_not_counted_on_and_who_leaves_at_once() {
        let mut presence = presence(&[set(0, 2), set(1, 2)]);
        assert!(presence.is_complete(2, PRESENCE_MS));
        assert!(!presence.is_complete(2, PRESENCE_MS + 1));
        assert_eq!(presence.cover(&all(), |_| false, &[], PRESENCE_MS + 1).nobody, all());
        presence.hear(Announcement { server: "s1".into(), shards: 16, sets: vec![] }, 5);
        assert_eq!(presence.cover(&all(), |_| false, &[], 6).nobody.len(), 8);
    }

    #[test]
    fn a_server_of_another_partition_is_not_listened_to() {
        let mut presence = presence(&[]);
        assert!(!presence.hear(Announcement { server: "x".into(), shards: 32, sets: vec![set(0, 1)] }, 0));
        assert!(presence.sets(0).is_empty());
    }
}
