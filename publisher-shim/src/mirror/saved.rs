//! A mirror as a record, and back.

use std::collections::VecDeque;

use hashbrown::HashMap;
use kvatlas_proto::frame::FrameHeader;
use kvatlas_proto::keys::LocalHash;
use kvatlas_proto::{BlockKey, KeyHasher, Partition, Tier, shard};

use super::place::{Counts, Place, Removals};
use super::{HashEntry, Link, Mirror, MirrorLimits, RemovalPolicy, Waiting};
use crate::event::EngineHash;
use crate::state::{RestoreStateError, wire};

// === impl Mirror ===

impl Mirror {
    /// Everything but what [`Self::owners`], [`Self::digests`] and [`Self::variant`] say.
    pub(crate) fn save(&self) -> wire::Mirror {
        let mut copies = Vec::with_capacity(self.hashes.len());
        let hashes = self.hashes.iter().map(|(hash, entry)| {
            copies.extend(entry.copies.0.iter().map(|&(place, copies)| wire::Copies { place, copies }));
            let link = entry.link().unwrap_or(Link::UNKNOWN);
            wire::Hash {
                name: hash.to_raw(),
                linked: entry.is_linked(),
                key: link.key.0,
                parent: link.parent.0,
                shard: link.at.shard,
                step: link.at.step,
                places: entry.copies.0.len() as u16,
            }
        });
        let hashes = hashes.collect();
        let is_buried = |(hash, stamp): &&(EngineHash, u32)| {
            self.hashes.get(hash).is_some_and(|entry| entry.ghost_stamp == *stamp)
        };
        let waiting = |(hash, waiting): (&EngineHash, &Waiting)| wire::Waiting {
            hash: hash.to_raw(),
            parent: waiting.parent.to_raw(),
            local: waiting.local.0,
        };
        wire::Mirror {
            now_ns: self.now_ns,
            places: self.places.iter().map(Place::save).collect(),
            hashes,
            copies,
            waiting: self.waiting.iter().map(waiting).collect(),
            ghosts: self.ghosts.iter().filter(is_buried).map(|(hash, _)| hash.to_raw()).collect(),
        }
    }

    /// The mirror of a saved record; `heartbeats` were saved with it, one per shard. Everything is checked.
    pub(crate) fn restore(
        hasher: KeyHasher,
        partition: Partition,
        limits: MirrorLimits,
        removal: RemovalPolicy,
        heartbeats: &[FrameHeader],
        saved: &wire::ArchivedMirror,
    ) -> Result<Self, RestoreStateError> {
        let Some(first) = heartbeats.first() else {
            return Err(RestoreStateError::Inconsistent("it has no heartbeat"));
        };
        let mut mirror = Self::new(hasher, partition, limits, removal, Some(first.scope.block_size()));
        mirror.variant = first.variant;
        mirror.now_ns = saved.now_ns.to_native();
        mirror.restore_places(first, saved)?;
        mirror.restore_hashes(saved)?;
        mirror.restore_waiting(saved)?;
        mirror.restore_ghosts(saved)?;
        let said = heartbeats.iter().map(|heartbeat| &heartbeat.digests);
        if !mirror.lanes.iter().map(|lane| &lane.digests).eq(said) {
            return Err(RestoreStateError::Inconsistent("its blocks are not those that its digests say"));
        }
        Ok(mirror)
    }

    fn restore_places(
        &mut self,
        header: &FrameHeader,
        saved: &wire::ArchivedMirror,
    ) -> Result<(), RestoreStateError> {
        if saved.places.len() != header.owners.len() {
            return Err(RestoreStateError::Inconsistent("places and owners do not add up"));
        }
        for (owner, place) in header.owners.iter().zip(saved.places.iter()) {
            let same = |known: &Place| {
                (known.owner.tier, known.owner.group) == (owner.tier, owner.group)
                    && known.owner.medium == owner.medium
            };
            if self.places.iter().any(same) {
                return Err(RestoreStateError::Inconsistent("two owners have one name"));
            }
            let may_expire = owner.tier != Tier::Gpu && self.limits.store_only_ttl_ns > 0;
            if !(place.announced || may_expire) {
                return Err(RestoreStateError::Inconsistent("blocks expire where none do"));
            }
            let removals = self.restore_removals(place)?;
            let (remote, chunk) = (place.remote, place.chunk.to_native());
            self.add_place(Place { owner: owner.clone(), remote, chunk, removals });
        }
        Ok(())
    }

    fn restore_removals(&self, saved: &wire::ArchivedPlace) -> Result<Removals, RestoreStateError> {
        if saved.announced {
            return Ok(Removals::Announced);
        }
        if saved.deadlines.len() > self.limits.hashes {
            return Err(RestoreStateError::OverLimit { what: "deadlines", max: self.limits.hashes });
        }
        let mut order: Vec<(u64, EngineHash)> = saved
            .deadlines
            .iter()
            .map(|deadline| (deadline.at_ns.to_native(), EngineHash::from_raw(deadline.hash.to_native())))
            .collect();
        order.sort_unstable();
        let deadlines: HashMap<_, _, _> = order.iter().map(|(at, hash)| (*hash, *at)).collect();
        if deadlines.len() != order.len() {
            return Err(RestoreStateError::Inconsistent("a block expires twice"));
        }
        Ok(Removals::NeverSeen { deadlines, queue: VecDeque::from(order) })
    }

    fn restore_hashes(&mut self, saved: &wire::ArchivedMirror) -> Result<(), RestoreStateError> {
        if saved.hashes.len() > self.limits.hashes {
            return Err(RestoreStateError::OverLimit { what: "hashes", max: self.limits.hashes });
        }
        self.hashes.reserve(saved.hashes.len());
        let mut rest = saved.copies.as_slice();
        for record in saved.hashes.iter() {
            let Some((own, after)) = rest.split_at_checked(usize::from(record.places.to_native())) else {
                return Err(RestoreStateError::Inconsistent("copies are missing"));
            };
            rest = after;
            let mut copies = Counts::default();
            for count in own {
                let (place, number) = (count.place, count.copies.to_native());
                if usize::from(place) >= self.places.len() || number == 0 || !copies.add(place) {
                    return Err(RestoreStateError::Inconsistent(
                        "copies are nowhere, none, or counted twice",
                    ));
                }
                copies.set(place, number);
            }
            let link = record.linked.then(|| self.restore_link(record)).transpose()?;
            match link {
                Some(link) => copies.places().into_iter().for_each(|place| _ = self.hold(link, place)),
                None => self.unresolved += 1,
            }
            let hash = EngineHash::from_raw(record.name.to_native());
            if self.hashes.insert(hash, HashEntry::new(link, copies)).is_some() {
                return Err(RestoreStateError::Inconsistent("a hash is there twice"));
            }
        }
        if !rest.is_empty() {
            return Err(RestoreStateError::Inconsistent("copies are of no hash"));
        }
        if self.unresolved > self.limits.unresolved {
            let max = self.limits.unresolved;
            return Err(RestoreStateError::OverLimit { what: "hashes without a key", max });
        }
        Ok(())
    }

    fn restore_link(&self, saved: &wire::ArchivedHash) -> Result<Link, RestoreStateError> {
        let key = BlockKey(saved.key.to_native());
        let link = Link {
            key,
            parent: BlockKey(saved.parent.to_native()),
            at: shard::Place { shard: saved.shard.to_native(), step: saved.step },
        };
        let possible = if link.at.starts_segment() {
            link.at == self.partition.first(key) && link.parent == self.hasher.root()
        } else {
            let steps = if self.partition == Partition::WHOLE { 2 } else { shard::SEGMENT_BLOCKS };
            link.at.shard < self.partition.shards() && u32::from(link.at.step) < steps
        };
        if possible {
            Ok(link)
        } else {
            Err(RestoreStateError::Inconsistent("a block lies in the wrong shard"))
        }
    }

    fn restore_waiting(&mut self, saved: &wire::ArchivedMirror) -> Result<(), RestoreStateError> {
        for record in saved.waiting.iter() {
            let hash = EngineHash::from_raw(record.hash.to_native());
            let parent = EngineHash::from_raw(record.parent.to_native());
            let waits = self.hashes.get(&hash).is_some_and(|entry| !entry.is_linked());
            let waiting = Waiting { parent, local: LocalHash(record.local.to_native()) };
            if !waits || self.waiting.insert(hash, waiting).is_some() {
                return Err(RestoreStateError::Inconsistent("a hash waits for what it has"));
            }
            self.waiters.entry(parent).or_default().push(hash);
        }
        Ok(())
    }

    fn restore_ghosts(&mut self, saved: &wire::ArchivedMirror) -> Result<(), RestoreStateError> {
        let held_nowhere = self.hashes.values().filter(|entry| entry.copies.is_empty()).count();
        if saved.ghosts.len() != held_nowhere {
            return Err(RestoreStateError::Inconsistent("not every hash that is held nowhere is a ghost"));
        }
        if held_nowhere > self.limits.ghosts {
            return Err(RestoreStateError::OverLimit { what: "ghosts", max: self.limits.ghosts });
        }
        for raw in saved.ghosts.iter() {
            let hash = EngineHash::from_raw(raw.to_native());
            let unburied = |entry: &HashEntry| entry.copies.is_empty() && entry.ghost_stamp == 0;
            if !self.hashes.get(&hash).is_some_and(unburied) {
                return Err(RestoreStateError::Inconsistent("a ghost is held, or is not known"));
            }
            self.bury(hash);
        }
        Ok(())
    }
}

// === impl Place ===

impl Place {
    fn save(&self) -> wire::Place {
        let deadline =
            |(hash, at_ns): (&EngineHash, &u64)| wire::Deadline { hash: hash.to_raw(), at_ns: *at_ns };
        let (announced, deadlines) = match &self.removals {
            Removals::Announced => (true, Vec::new()),
            Removals::NeverSeen { deadlines, .. } => (false, deadlines.iter().map(deadline).collect()),
        };
        wire::Place { remote: self.remote, chunk: self.chunk, announced, deadlines }
    }
}
