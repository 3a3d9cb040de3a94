//! How far into a list of chained keys the engine knows them.
//!
//! A key names everything before it, so of a chain that hangs together what is known is a beginning. A look-up probes
//! a few positions at once (their cache misses overlap), goes on from the deepest one that is known along its strand
//! and into children, and so touches lines per strand and not per block.
//!
//! Where strands with an unknown beginning exist, a known key need not have its beginning known; then only keys whose
//! strands lead up to the chain's start count.

use std::sync::atomic::Ordering;

use kvatlas_proto::BlockKey;

use super::Shared;
use super::raw::Guard;
use super::strand::{Changed, Parent, Place, StrandNo, View, prefetch};
use super::table::Hash;

/// Where a list of keys starts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Base {
    /// At the beginning of a prompt.
    Root,
    /// After the block at this place.
    After(Place),
}

/// The deepest known key of a list.
pub(super) struct Deepest<'g> {
    /// Index in the list.
    pub(super) at: usize,
    pub(super) place: Place,
    /// Its strand, as it was before the key after it was looked for.
    pub(super) view: View<'g>,
}

/// Positions probed at once where a walk leaves a strand with many keys to go.
const FAN: usize = 6;
/// Keys from which on looking ahead pays; fewer are walked strand by strand.
const JUMP_FROM: usize = 64;
/// Keys from which on the first positions to probe are asked for before the walk begins.
const ASK_FROM: usize = 256;

impl Shared {
    /// A whole copy of a strand's header.
    #[inline]
    pub(super) fn view<'g>(&self, id: StrandNo, guard: &'g impl Guard) -> Result<View<'g>, Changed> {
        self.strands.get(id).view(id, guard)
    }

    /// The place of `key`, if it is known.
    #[inline]
    pub(super) fn find(&self, key: BlockKey, guard: &impl Guard) -> Result<Option<Place>, Changed> {
        let mut changed = false;
        let found = self.table.find(self.table.hash(key), guard, |place| {
            let Ok(view) = self.view(place.strand(), guard) else {
                changed = true;
                return true;
            };
            view.is_at(place.offset(), key)
        });
        if changed { Err(Changed) } else { Ok(found) }
    }

    /// The deepest key of `keys` that is known and hangs together with `base`.
    #[inline]
    pub(super) fn deepest<'g>(
        &self,
        base: Base,
        keys: &[BlockKey],
        guard: &'g impl Guard,
    ) -> Result<Option<Deepest<'g>>, Changed> {
        let Some(first) = keys.first() else { return Ok(None) };
        let mut ahead = Ahead::new(keys.len());
        if keys.len() >= ASK_FROM {
            ahead.ask(self, keys, 0, guard);
        }
        let Some(hint) = self.table.hint(self.table.hash(*first), guard) else { return Ok(None) };
        let mut view = self.view(hint.strand(), guard)?;
        let mut place = hint;
        if !view.is_at(place.offset(), *first) {
            let Some(found) = self.find(*first, guard)? else { return Ok(None) };
            place = found;
            view = self.view(found.strand(), guard)?;
            if !view.is_at(found.offset(), *first) {
                return Err(Changed);
            }
        }
        let floating = self.floating.load(Ordering::Relaxed) > 0;
        if floating && !self.hangs_together(base, 0, place, guard)? {
            return Ok(None);
        }
        let mut at = 0;
        loop {
            let more = view.common(place.offset() + 1, &keys[at + 1..]);
            at += more as usize;
            place = place.forward(more);
            if at + 1 == keys.len() || !view.may_have_kid(place.offset()) {
                return Ok(Some(Deepest { at, place, view }));
            }
            if ahead.end.saturating_sub(at + 1) >= JUMP_FROM
                && let Some((to, found, its_view)) = self.jump(base, keys, at, floating, &mut ahead, guard)?
            {
                (at, place, view) = (to, found, its_view);
                continue;
            }
            let Some(kid) = self.find(keys[at + 1], guard)? else {
                return Ok(Some(Deepest { at, place, view }));
            };
            let kid_view = self.view(kid.strand(), guard)?;
            if kid.offset() != 0 || kid_view.parent() != Parent::At(place) || !kid_view.is_at(0, keys[at + 1])
            {
                return Ok(Some(Deepest { at, place, view }));
            }
            (at, place, view) = (at + 1, kid, kid_view);
        }
    }

    /// Looks for a known key behind the one at index `at`, some positions at once, the furthest first.
    #[inline]
    fn jump<'g>(
        &self,
        base: Base,
        keys: &[BlockKey],
        at: usize,
        floating: bool,
        ahead: &mut Ahead,
        guard: &'g impl Guard,
    ) -> Result<Option<(usize, Place, View<'g>)>, Changed> {
        if !ahead.asked {
            ahead.ask(self, keys, at + 1, guard);
        }
        self.table.prefetch(self.table.hash(keys[at + 1]), guard);
        ahead.asked = false;
        let mut places = [None; FAN];
        for ((place, position), hash) in places.iter_mut().zip(&ahead.positions).zip(&ahead.hashes) {
            if *position > at {
                *place = self.table.hint(*hash, guard);
                // The strands on the way are needed later: have them all come at once.
                match place {
                    Some(place) => prefetch(&self.strands, *place),
                    None => break,
                }
            }
        }
        for i in (0..FAN).rev() {
            let to = ahead.positions[i];
            if to <= at {
                break;
            }
            if let Some(place) = places[i] {
                let view = self.view(place.strand(), guard)?;
                if view.is_at(place.offset(), keys[to])
                    && (!floating || self.hangs_together(base, to, place, guard)?)
                {
                    return Ok(Some((to, place, view)));
                }
            }
            ahead.end = to;
        }
        Ok(None)
    }

    /// True if the strands above the key at index `at` lead to `base`.
    #[cold]
    fn hangs_together(
        &self,
        base: Base,
        at: usize,
        place: Place,
        guard: &impl Guard,
    ) -> Result<bool, Changed> {
        let (mut at, mut place) = (at, place);
        loop {
            if let Base::After(base) = base
                && base.strand() == place.strand()
            {
                return Ok(base.offset() + at as u32 + 1 == place.offset());
            }
            let view = self.view(place.strand(), guard)?;
            let start = place.offset() as usize;
            match view.parent() {
                Parent::Root => return Ok(base == Base::Root && at == start),
                Parent::Unknown => return Ok(false),
                Parent::At(parent) if at > start => (at, place) = (at - start - 1, parent),
                Parent::At(parent) => return Ok(at == start && base == Base::After(parent)),
            }
        }
    }
}

/// Positions to probe.
struct Ahead {
    /// Keys from this index on were not known a moment ago, so looking at them again is not worth it.
    end: usize,
    positions: [usize; FAN],
    hashes: [Hash; FAN],
    /// The positions are of use: their lines are on the way.
    asked: bool,
}

impl Ahead {
    #[inline]
    fn new(keys: usize) -> Self {
        Self { end: keys, positions: [0; FAN], hashes: [Hash::default(); FAN], asked: false }
    }

    /// Spreads the positions over `from..end` and asks for their lines in the table.
    #[inline]
    fn ask(&mut self, shared: &Shared, keys: &[BlockKey], from: usize, guard: &impl Guard) {
        let width = self.end - from;
        for i in 0..FAN {
            let position = from + (width * (i + 1)) / FAN - 1;
            self.positions[i] = position;
            self.hashes[i] = shared.table.hash(keys[position]);
            shared.table.prefetch(self.hashes[i], guard);
        }
        self.asked = true;
    }
}
