//! A mirror as a record, and back.

use std::collections::VecDeque;

use hashbrown::HashMap;
use kvatlas_proto::frame::FrameHeader;
use kvatlas_proto::keys::LocalHash;
use kvatlas_proto::{BlockKey, KeyHasher, Tier};

use super::place::{Counts, Place, Removals};
use super::{HashEntry, KeyEntry, Link, Mirror, MirrorLimits, RemovalPolicy, Waiting};
use crate::event::EngineHash;
use crate::state::{RestoreStateError, wire};

// === impl Mirror ===

impl Mirror {
    /// Everything but what [`Self::owners`], [`Self::digests`] and [`Self::variant`] say.
    pub(crate) fn save(&self) -> wire::Mirror {
        let mut copies = Vec::with_capacity(self.hashes.len());
        let hashes = self.hashes.iter().map(|(hash, entry)| {
            copies.extend(entry.copies.0.iter().map(|&(place, copies)| wire::Copies { place, copies }));
            let link = entry.link.unwrap_or(Link { key: BlockKey(0), parent: BlockKey(0) });
            wire::Hash {
                name: hash.to_raw(),
                linked: entry.link.is_some(),
                key: link.key.0,
                parent: link.parent.0,
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

    /// The mirror of a saved record; `header` is the heartbeat that was saved with it. Everything is checked.
    pub(crate) fn restore(
        hasher: KeyHasher,
        limits: MirrorLimits,
        removal: RemovalPolicy,
        header: &FrameHeader,
        saved: &wire::ArchivedMirror,
    ) -> Result<Self, RestoreStateError> {
        let mut mirror = Self::new(hasher, limits, removal, Some(header.scope.block_size()));
        mirror.variant = header.variant;
        mirror.now_ns = saved.now_ns.to_native();
        mirror.restore_places(header, saved)?;
        mirror.restore_hashes(saved)?;
        mirror.restore_waiting(saved)?;
        mirror.restore_ghosts(saved)?;
        if mirror.digests() != header.digests {
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
            self.places.push(Place {
                owner: owner.clone(),
                remote: place.remote,
                chunk: place.chunk.to_native(),
                digest: kvatlas_proto::Digest::default(),
                removals: self.restore_removals(place)?,
            });
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
            let (key, parent) = (BlockKey(record.key.to_native()), BlockKey(record.parent.to_native()));
            let link = record.linked.then_some(Link { key, parent });
            match link {
                Some(link) => copies.places().into_iter().for_each(|place| self.hold(link, place)),
                None => self.unresolved += 1,
            }
            let hash = EngineHash::from_raw(record.name.to_native());
            if self.hashes.insert(hash, HashEntry { link, copies, ghost_stamp: 0 }).is_some() {
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

    /// One more hash of this key is held in `place`; nobody has to be told.
    fn hold(&mut self, link: Link, place: u8) {
        let entry = self
            .keys
            .entry(link.key)
            .or_insert_with(|| KeyEntry { parent: link.parent, holders: Counts::default() });
        if entry.holders.add(place) {
            self.places[usize::from(place)].digest.add(link.key);
        }
    }

    fn restore_waiting(&mut self, saved: &wire::ArchivedMirror) -> Result<(), RestoreStateError> {
        for record in saved.waiting.iter() {
            let hash = EngineHash::from_raw(record.hash.to_native());
            let parent = EngineHash::from_raw(record.parent.to_native());
            let waits = self.hashes.get(&hash).is_some_and(|entry| entry.link.is_none());
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
