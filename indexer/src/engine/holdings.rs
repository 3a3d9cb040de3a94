//! What one holder has: its list of strands, and what is done with all of it. Writer only.

use kvatlas_proto::BlockKey;

use super::strand::{Parent, Place, Step, StrandNo, prefetch};
use super::write::Writer;
use super::{Holder, Retired, Shared};

/// Cost of a strand in a slice of a removal, in blocks: what its header and sets cost beside the blocks.
const STRAND_COST: usize = 16;
/// Strands in a holder's list from which on it is tidied whenever it has doubled.
const TIDY_FROM: usize = 64;

impl Writer {
    /// The first half of a clear: the list of what is to be taken from the holder.
    pub(super) fn retire(&mut self, holder: Holder) -> Retired {
        let Some(state) = self.holders.get_mut(holder.0 as usize) else {
            return Retired { holder, strands: Vec::new(), blocks: 0 };
        };
        state.tidied = 0;
        let strands = std::mem::take(&mut state.strands);
        self.array_bytes -= strands.capacity() * 4;
        Retired { holder, blocks: state.blocks, strands }
    }

    /// The second half, a piece of it: about `blocks` blocks. True when nothing is left.
    pub(super) fn release(&mut self, shared: &Shared, retired: &mut Retired, blocks: usize) -> bool {
        let mut cost = 0;
        while cost < blocks
            && let Some(strand) = retired.strands.pop()
        {
            if let Some(ahead) = retired.strands.len().checked_sub(8) {
                prefetch(&shared.strands, Place::new(retired.strands[ahead], 0));
            }
            cost += STRAND_COST;
            // The strand may be gone, or be another one by now; then the holder has nothing in it.
            let length = shared.strands.get(strand).blocks();
            if length > 0 {
                cost += self.edit(shared, strand, 0, length, retired.holder, false) as usize;
                self.trim(shared, strand);
            }
            self.tidy(shared);
        }
        retired.strands.is_empty()
    }

    /// Calls with each stretch of consecutive blocks of a holder and the key that the stretch follows.
    pub(super) fn each_run(
        &self,
        shared: &Shared,
        holder: Holder,
        mut with: impl FnMut(Option<BlockKey>, &[BlockKey]),
    ) {
        let Some(state) = self.holders.get(holder.0 as usize) else { return };
        let mut strands = state.strands.clone();
        strands.sort_unstable();
        strands.dedup();
        let mut keys = Vec::new();
        for strand in strands {
            let header = shared.strands.get(strand);
            let length = header.blocks();
            let steps = header.steps(&self.token);
            let count = if length == 0 { 0 } else { steps.len() };
            let held = |at: usize| shared.sets.get(steps.at(at).set).contains(holder.0, &self.token);
            let mut at = 0;
            while at < count {
                if !held(at) {
                    at += 1;
                    continue;
                }
                let start = steps.at(at).start;
                while at < count && held(at) {
                    at += 1;
                }
                let end = if at < count { steps.at(at).start } else { length };
                keys.clear();
                keys.extend((start..end).map(|offset| header.key(offset, &self.token)));
                with(self.key_before(shared, strand, start), &keys);
            }
        }
    }

    pub(super) fn key_before(&self, shared: &Shared, strand: StrandNo, offset: u32) -> Option<BlockKey> {
        let header = shared.strands.get(strand);
        if offset > 0 {
            return Some(header.key(offset - 1, &self.token));
        }
        match header.parent() {
            Parent::At(place) => Some(shared.strands.get(place.strand()).key(place.offset(), &self.token)),
            Parent::Root | Parent::Unknown => None,
        }
    }

    pub(super) fn holds(&self, shared: &Shared, holder: Holder, key: BlockKey) -> bool {
        self.place_of(shared, key).is_some_and(|place| {
            let step = shared.strands.get(place.strand()).steps(&self.token).covering(place.offset());
            shared.sets.get(step.set).contains(holder.0, &self.token)
        })
    }

    /// The holder has something in this strand from now on.
    pub(super) fn note_strand(&mut self, shared: &Shared, holder: Holder, strand: StrandNo) {
        let Self { holders, token, .. } = self;
        let state = &mut holders[holder.0 as usize];
        let before = state.strands.capacity();
        if state.strands.len() == before && before >= TIDY_FROM.max(2 * state.tidied) {
            // What it held once and does not any more, and repeats, go; so the list stays in proportion.
            state.strands.sort_unstable();
            state.strands.dedup();
            state.strands.retain(|strand| {
                let header = shared.strands.get(*strand);
                let is_in = |step: Step| shared.sets.get(step.set).contains(holder.0, token);
                header.blocks() > 0 && header.steps(token).iter().any(is_in)
            });
            state.tidied = state.strands.len();
        }
        if state.strands.len() == before {
            // A quarter more: doubling would cost as much as the lists themselves.
            state.strands.reserve_exact((before / 4).max(8));
        }
        state.strands.push(strand);
        self.array_bytes += (state.strands.capacity() - before) * 4;
    }
}
