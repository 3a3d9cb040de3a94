//! A strand: an unforked stretch of consecutive blocks, and who holds which part of it.
//!
//! Its header is one cache line. Everything in it that a reader needs is covered by `version`: odd while the writer
//! changes it, another number afterwards. A reader copies the fields, looks at the version again, and at the end of
//! its walk looks at the versions of all strands it used: if none changed, what it read existed at one moment.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use kvatlas_proto::BlockKey;

use super::raw::{Arena, Guard, Slot, own};
use super::sets::SetNo;

/// Bits of an offset inside a strand.
const OFFSET_BITS: u32 = 12;
/// Bits of a strand's number.
const NUMBER_BITS: u32 = 24;
/// Blocks in one strand at most: the longest prompts make a few strands, and a place stays within 36 bits.
pub(super) const MAX_BLOCKS: u32 = 1 << OFFSET_BITS;
/// Strands of one engine at most, number 0 (nobody) included.
pub(super) const MAX_STRANDS: u32 = 1 << NUMBER_BITS;
/// Bits of a place as the table stores it.
pub(super) const PLACE_BITS: u32 = NUMBER_BITS + OFFSET_BITS;

/// Steps that fit into the header. Nearly all strands have one to three; the others have an array.
const INLINE: usize = 3;
/// Count that says "in the array".
const SPILLED: u64 = 15;
/// Looks at a header before a reader gives the whole walk up. The writer needs well under a microsecond for one.
const VIEW_TRIES: usize = 64;

const NUMBER: u64 = (1 << NUMBER_BITS) - 1;
const OFFSET: u64 = (1 << OFFSET_BITS) - 1;

/// Number of a strand; 0 is none.
pub(super) type StrandNo = u32;

/// Where a block is: a strand and an offset in it. It stays so as long as the block is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place(u64);

/// What the first block of a strand follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Parent {
    /// Nothing: it is a prompt's first block.
    Root,
    /// The block there.
    At(Place),
    /// Nobody said so far. Nobody holds such a block: it is known only because another one follows it.
    Unknown,
}

/// Blocks from `start` up to the next step (or the end) are held by `set`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) start: u32,
    pub(super) set: SetNo,
}

/// The shared state of a strand. A strand without blocks does not exist.
#[repr(C, align(64))]
#[derive(Default)]
pub(super) struct Header {
    /// Odd while the writer changes something that readers use.
    version: AtomicU32,
    /// Blocks (13 bits), and one past the highest offset that a child follows (13 bits).
    shape: AtomicU32,
    /// The keys by offset; the array may be longer than the strand.
    pub(super) keys: Slot<AtomicU64>,
    /// [`Parent`] (place and two bits for the kind) and the first child.
    parent: AtomicU64,
    /// Bit `offset % 32` is set if a child may follow that block.
    kids: AtomicU32,
    /// When the strand was last stored to or matched.
    stamp: AtomicU32,
    /// Previous and next child of the same parent. Writer only.
    siblings: AtomicU64,
    /// The steps if there are more than [`INLINE`]: first their number, then `start << 32 | set` each.
    spill: Slot<AtomicU64>,
    /// Set 0 (24 bits), set 1 (24), start 1 (12), number of steps (4); set 2 (24), start 2 (12).
    inline: [AtomicU64; 2],
}

/// A copy of a header that was whole.
#[derive(Clone, Copy)]
pub(super) struct View<'g> {
    pub(super) id: StrandNo,
    pub(super) version: u32,
    pub(super) blocks: u32,
    kids: u32,
    parent: u64,
    keys: &'g [AtomicU64],
    pub(super) steps: Steps<'g>,
}

/// A copy of the steps.
#[derive(Clone, Copy)]
pub(super) struct Steps<'g> {
    pub(super) inline: [u64; 2],
    pub(super) spill: &'g [AtomicU64],
}

/// Something changed while it was read: start again.
#[derive(Debug)]
pub(super) struct Changed;

// === impl Place ===

impl Place {
    #[inline]
    pub(super) fn new(strand: StrandNo, offset: u32) -> Self {
        Self(u64::from(strand) << OFFSET_BITS | u64::from(offset))
    }

    #[inline]
    pub(super) fn from_bits(bits: u64) -> Self {
        Self(bits & ((1 << PLACE_BITS) - 1))
    }

    #[inline]
    pub(super) fn bits(self) -> u64 {
        self.0
    }

    #[inline]
    pub(super) fn strand(self) -> StrandNo {
        (self.0 >> OFFSET_BITS) as u32
    }

    #[inline]
    pub(super) fn offset(self) -> u32 {
        (self.0 & OFFSET) as u32
    }

    /// The place `by` blocks further on in the same strand.
    #[inline]
    pub(super) fn forward(self, by: u32) -> Self {
        debug_assert!(self.offset() + by < MAX_BLOCKS);
        Self(self.0 + u64::from(by))
    }
}

// === impl Parent ===

const KIND_SHIFT: u32 = PLACE_BITS;
const FIRST_KID_SHIFT: u32 = PLACE_BITS + 2;
const PARENT_MASK: u64 = (1 << FIRST_KID_SHIFT) - 1;

impl Parent {
    fn to_bits(self) -> u64 {
        match self {
            Self::Root => 0,
            Self::At(place) => 1 << KIND_SHIFT | place.bits(),
            Self::Unknown => 2 << KIND_SHIFT,
        }
    }

    #[inline]
    fn from_bits(bits: u64) -> Self {
        match bits >> KIND_SHIFT & 3 {
            0 => Self::Root,
            1 => Self::At(Place::from_bits(bits)),
            _ => Self::Unknown,
        }
    }
}

// === impl Header ===

impl Header {
    /// A copy that is whole. Fails if the writer does not leave the header alone.
    #[inline]
    pub(super) fn view<'g>(&self, id: StrandNo, guard: &'g impl Guard) -> Result<View<'g>, Changed> {
        for _ in 0..VIEW_TRIES {
            let version = self.version.load(Ordering::Acquire);
            if version & 1 == 1 {
                std::hint::spin_loop();
                continue;
            }
            let view = View {
                id,
                version,
                blocks: own(&self.shape) & 0x1fff,
                kids: own(&self.kids),
                parent: self.parent.load(Ordering::Relaxed),
                keys: self.keys.load(guard),
                steps: self.steps(guard),
            };
            fence(Ordering::Acquire);
            if self.version.load(Ordering::Relaxed) == version {
                return Ok(view);
            }
        }
        Err(Changed)
    }

    /// True if nothing changed since the copy with that version. Call after a fence.
    #[inline]
    pub(super) fn unchanged(&self, version: u32) -> bool {
        self.version.load(Ordering::Relaxed) == version
    }

    /// Only for the writer, or where the version is looked at again.
    #[inline]
    pub(super) fn steps<'g>(&self, guard: &'g impl Guard) -> Steps<'g> {
        let inline = [self.inline[0].load(Ordering::Relaxed), self.inline[1].load(Ordering::Relaxed)];
        let spill = if inline[0] >> 60 == SPILLED { self.spill.load(guard) } else { &[] };
        Steps { inline, spill }
    }

    // --- Writer only from here. ---

    /// Readers that look from here on start again.
    #[inline]
    pub(super) fn begin(&self) {
        let version = own(&self.version);
        debug_assert!(version & 1 == 0, "a change inside a change");
        self.version.store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
    }

    #[inline]
    pub(super) fn end(&self) {
        self.version.store(own(&self.version).wrapping_add(1), Ordering::Release);
    }

    #[inline]
    pub(super) fn blocks(&self) -> u32 {
        own(&self.shape) & 0x1fff
    }

    pub(super) fn set_blocks(&self, blocks: u32) {
        debug_assert!(blocks <= MAX_BLOCKS);
        self.shape.store(own(&self.shape) & !0x1fff | blocks, Ordering::Relaxed);
    }

    /// One past the highest offset that a child follows; 0 without children. May be too high for a while.
    #[inline]
    pub(super) fn kids_end(&self) -> u32 {
        own(&self.shape) >> 13
    }

    pub(super) fn set_kids(&self, end: u32, filter: u32) {
        self.shape.store(own(&self.shape) & 0x1fff | end << 13, Ordering::Relaxed);
        self.kids.store(filter, Ordering::Relaxed);
    }

    pub(super) fn kids_filter(&self) -> u32 {
        own(&self.kids)
    }

    #[inline]
    pub(super) fn parent(&self) -> Parent {
        Parent::from_bits(self.parent.load(Ordering::Relaxed))
    }

    pub(super) fn set_parent(&self, parent: Parent) {
        let kid = self.parent.load(Ordering::Relaxed) & !PARENT_MASK;
        self.parent.store(kid | parent.to_bits(), Ordering::Relaxed);
    }

    pub(super) fn first_kid(&self) -> StrandNo {
        (self.parent.load(Ordering::Relaxed) >> FIRST_KID_SHIFT) as u32
    }

    pub(super) fn set_first_kid(&self, kid: StrandNo) {
        let parent = self.parent.load(Ordering::Relaxed) & PARENT_MASK;
        self.parent.store(parent | u64::from(kid) << FIRST_KID_SHIFT, Ordering::Relaxed);
    }

    /// Previous and next child of the same parent.
    pub(super) fn siblings(&self) -> (StrandNo, StrandNo) {
        let both = self.siblings.load(Ordering::Relaxed);
        ((both & NUMBER) as u32, (both >> NUMBER_BITS & NUMBER) as u32)
    }

    pub(super) fn set_siblings(&self, previous: StrandNo, next: StrandNo) {
        self.siblings.store(u64::from(next) << NUMBER_BITS | u64::from(previous), Ordering::Relaxed);
    }

    #[inline]
    pub(super) fn stamp(&self) -> u32 {
        own(&self.stamp)
    }

    #[inline]
    pub(super) fn set_stamp(&self, stamp: u32) {
        self.stamp.store(stamp, Ordering::Relaxed);
    }

    /// Key at an offset; the caller knows that it is there.
    #[inline]
    pub(super) fn key(&self, offset: u32, guard: &impl Guard) -> BlockKey {
        BlockKey(self.keys.load(guard)[offset as usize].load(Ordering::Relaxed))
    }

    /// Writes the steps; `false` if they do not fit and nothing was written: give [`Self::spill`] an array of at
    /// least [`spill_words`] first. Between [`Self::begin`] and [`Self::end`].
    pub(super) fn set_steps(&self, steps: &[Step], guard: &impl Guard) -> bool {
        let inline = if steps.len() <= INLINE {
            let at = |i: usize| steps.get(i).copied().unwrap_or(Step { start: 0, set: 0 });
            [
                u64::from(at(0).set)
                    | u64::from(at(1).set) << 24
                    | u64::from(at(1).start) << 48
                    | (steps.len() as u64) << 60,
                u64::from(at(2).set) | u64::from(at(2).start) << 24,
            ]
        } else {
            let array = self.spill.load(guard);
            if array.len() < spill_words(steps) {
                return false;
            }
            array[0].store(steps.len() as u64, Ordering::Relaxed);
            for (word, step) in array[1..].iter().zip(steps) {
                word.store(u64::from(step.start) << 32 | u64::from(step.set), Ordering::Relaxed);
            }
            [SPILLED << 60, 0]
        };
        self.inline[0].store(inline[0], Ordering::Relaxed);
        self.inline[1].store(inline[1], Ordering::Relaxed);
        true
    }

    pub(super) fn spill(&self) -> &Slot<AtomicU64> {
        &self.spill
    }

    /// Frees what the header owns; for the end of an engine.
    pub(super) fn clear(&mut self) {
        self.keys.clear();
        self.spill.clear();
    }
}

/// Words that the array of these steps needs; 0 if they fit into the header.
pub(super) fn spill_words(steps: &[Step]) -> usize {
    if steps.len() <= INLINE { 0 } else { steps.len() + 1 }
}

// === impl View ===

impl View<'_> {
    #[inline]
    pub(super) fn parent(&self) -> Parent {
        Parent::from_bits(self.parent)
    }

    /// True if a child may follow the block there.
    #[inline]
    pub(super) fn may_have_kid(&self, offset: u32) -> bool {
        self.kids >> (offset % 32) & 1 == 1
    }

    /// The key there, or 0 past the end.
    #[inline]
    pub(super) fn key(&self, offset: u32) -> BlockKey {
        BlockKey(self.keys.get(offset as usize).map_or(0, |key| key.load(Ordering::Relaxed)))
    }

    /// True if `key` is the block at `offset`.
    #[inline]
    pub(super) fn is_at(&self, offset: u32, key: BlockKey) -> bool {
        offset < self.blocks && self.key(offset) == key
    }

    /// How many of `keys` follow one another in the strand from `offset` on. The keys are chained: where one fits,
    /// all before it do.
    #[inline]
    pub(super) fn common(&self, offset: u32, keys: &[BlockKey]) -> u32 {
        let all = keys.len().min(self.blocks.saturating_sub(offset) as usize);
        let start = (offset as usize).min(self.keys.len());
        let mine = &self.keys[start..];
        let all = all.min(mine.len());
        let fits = |at: usize| mine[at].load(Ordering::Relaxed) == keys[at].0;
        let (mut low, mut high) = (0, all);
        // Far ends are looked at several at a time: their lines come from memory side by side.
        while high - low > LINEAR {
            let width = (high - low) / FAN;
            let mut hits = 0;
            for i in 1..=FAN {
                hits += usize::from(fits(low + i * width - 1));
            }
            // Of a chain that fits, all parts before the last fitting one fit.
            let base = low;
            low = base + hits * width;
            high = if hits == FAN { high } else { base + (hits + 1) * width - 1 };
        }
        while low + STRIDE <= high && fits(low + STRIDE - 1) {
            low += STRIDE;
        }
        while low < high && fits(low) {
            low += 1;
        }
        low as u32
    }
}

/// Places looked at side by side where a long stretch is compared.
const FAN: usize = 6;
/// Keys of one cache line.
const STRIDE: usize = 8;
/// Stretches up to this length are gone along line by line: the processor fetches ahead by itself.
const LINEAR: usize = 160;

// === impl Steps ===

impl Steps<'_> {
    /// Number of steps; 0 only for a strand without blocks.
    #[inline]
    pub(super) fn len(&self) -> usize {
        match self.inline[0] >> 60 {
            SPILLED => self
                .spill
                .first()
                .map_or(0, |count| (count.load(Ordering::Relaxed) as usize).min(self.spill.len() - 1)),
            count => count as usize,
        }
    }

    #[inline]
    pub(super) fn at(&self, index: usize) -> Step {
        let [first, second] = self.inline;
        if first >> 60 == SPILLED {
            let word = self.spill[index + 1].load(Ordering::Relaxed);
            return Step { start: (word >> 32) as u32, set: word as u32 & NUMBER as u32 };
        }
        match index {
            0 => Step { start: 0, set: (first & NUMBER) as u32 },
            1 => Step { start: (first >> 48 & OFFSET) as u32, set: (first >> 24 & NUMBER) as u32 },
            _ => Step { start: (second >> 24 & OFFSET) as u32, set: (second & NUMBER) as u32 },
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Step> + '_ {
        (0..self.len()).map(|index| self.at(index))
    }

    /// The step that covers an offset.
    pub(super) fn covering(&self, offset: u32) -> Step {
        let mut low = 0;
        let mut high = self.len();
        while high - low > 1 {
            let middle = usize::midpoint(low, high);
            if self.at(middle).start <= offset { low = middle } else { high = middle }
        }
        self.at(low)
    }
}

/// The header's address is asked for ahead of use.
#[inline]
pub(super) fn prefetch(strands: &Arena<Header>, place: Place) {
    strands.prefetch(place.strand());
}
