//! The one module with `unsafe`: memory that readers look at without a lock.
//!
//! What it promises to the modules around it:
//!
//! * An array that can be reached from a [`Slot`] is freed only after everybody who could have loaded it is gone.
//!   Readers announce themselves with a [`Pin`]; the writer, who alone unlinks and frees, has a [`Token`].
//! * A handle is one word (address and length), so that nobody ever sees the address of one array with the length of
//!   another.
//! * Everything shared is made of atomics: a reader may see an old value or a new one, never a torn one.
//!
//! Whether values that were read one after the other belong together is not decided here but by the version in a
//! strand's header.

#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering, fence};

/// Readers that can be inside a look-up of one engine at the same time. A look-up takes a microsecond and does not
/// wait, so more threads than this are rarely inside at once; one more waits for a place.
const PIN_SLOTS: usize = 64;
/// Things to free after which the writer looks whether it can: often enough that little is kept, seldom enough that
/// looking at all pins costs nothing.
const COLLECT_AFTER: usize = 64;
/// The same in bytes, for large arrays.
const COLLECT_AFTER_BYTES: usize = 32 << 10;
/// The first chunk of an arena; every further one is twice as large, so ids of 24 bits need 18.
const FIRST_CHUNK: usize = 64;
const CHUNKS: usize = 19;

const LENGTH_BITS: u32 = 16;
const LENGTH: u64 = (1 << LENGTH_BITS) - 1;

/// One cache line of words: a bucket of the table.
#[repr(C, align(64))]
#[derive(Default)]
pub(super) struct Line(pub(super) [AtomicU64; 8]);

/// What can be shared: all bits zero is a value of it, and it needs no drop.
///
/// # Safety
///
/// Exactly that.
pub(super) unsafe trait Plain: Sized + Sync {}

// SAFETY: an atomic integer may be zero and has no drop.
unsafe impl Plain for AtomicU64 {}
// SAFETY: made of atomic integers.
unsafe impl Plain for Line {}
// SAFETY: made of atomic integers and slots, which are one atomic integer each; zero is the empty slot. What a slot
// owns is freed by whoever drops the engine.
unsafe impl Plain for super::strand::Header {}
// SAFETY: as for the header.
unsafe impl Plain for super::sets::SetEntry {}

/// An array that nobody else can see yet. At most 65,535 elements.
pub(super) struct Owned<T: Plain>(u64, PhantomData<T>);

/// A place from which readers reach an array, or none.
#[repr(transparent)]
pub(super) struct Slot<T: Plain>(AtomicU64, PhantomData<T>);

/// An array that left its [`Slot`] but may still be looked at.
#[must_use = "what is not given to the limbo is never freed"]
pub(super) struct Unlinked<T: Plain>(u64, PhantomData<T>);

/// Whoever has one may look at shared arrays: nothing that it can reach is freed meanwhile.
pub(super) trait Guard {}

/// A reader that is inside.
pub(super) struct Pin<'e> {
    place: &'e AtomicU64,
}

/// The writer. There is one per engine, inside its lock.
pub(super) struct Token(());

#[repr(align(128))]
struct PinSlot(AtomicU64);

/// Who is inside, and since when.
pub(super) struct Pins {
    /// Grows whenever the writer wants to free something; never 0.
    epoch: AtomicU64,
    /// 0: free; else the epoch in which the reader came. One line pair each, so that readers do not disturb readers.
    slots: Box<[PinSlot]>,
}

/// What has to wait until its last reader is gone.
enum Waiting {
    Words(u64),
    Lines(u64),
    Strand(u32),
    Set(u32),
}

/// Ids that may be used again.
#[derive(Default)]
pub(super) struct Freed {
    pub(super) strands: Vec<u32>,
    pub(super) sets: Vec<u32>,
}

/// Things to free, oldest first, each with the epoch in which it left.
#[derive(Default)]
pub(super) struct Limbo {
    waiting: std::collections::VecDeque<(u64, Waiting)>,
    since_collect: usize,
    bytes_since_collect: usize,
    bytes: usize,
}

/// Elements by id, from 0. They never move and are never freed before the arena is.
pub(super) struct Arena<T: Plain> {
    chunks: [AtomicPtr<T>; CHUNKS],
    /// Where the chunks were allocated: each is aligned inside its allocation.
    bases: [AtomicPtr<u8>; CHUNKS],
}

// === impl Owned ===

impl<T: Plain> Owned<T> {
    /// All elements zero.
    pub(super) fn zeroed(length: usize) -> Self {
        assert!(
            length > 0 && length as u64 <= LENGTH,
            "array of {length} elements: 1 to 65,535 are possible"
        );
        let layout = Self::layout(length);
        // SAFETY: the layout is not of size zero.
        let at = unsafe { alloc_zeroed(layout) };
        if at.is_null() {
            handle_alloc_error(layout);
        }
        let address = at.expose_provenance() as u64;
        assert!(address >> 48 == 0, "user space addresses of this system have more than 48 bits");
        Self(address << LENGTH_BITS | length as u64, PhantomData)
    }

    pub(super) fn bytes_of(length: usize) -> usize {
        // Malloc keeps a word per block.
        length * size_of::<T>() + 8
    }

    fn layout(length: usize) -> Layout {
        Layout::array::<T>(length).expect("65,535 elements are few")
    }
}

impl<T: Plain> std::ops::Deref for Owned<T> {
    type Target = [T];
    #[inline]
    fn deref(&self) -> &[T] {
        // SAFETY: a live allocation of this type and length, freed only when `self` is gone.
        unsafe { slice(self.0) }
    }
}

impl<T: Plain> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: nobody else knows this array.
        unsafe { release::<T>(self.0) }
    }
}

/// # Safety
///
/// `handle` is of a live array of `T`, or 0.
#[inline]
unsafe fn slice<'a, T: Plain>(handle: u64) -> &'a [T] {
    if handle == 0 {
        return &[];
    }
    let at = std::ptr::with_exposed_provenance::<T>((handle >> LENGTH_BITS) as usize);
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(at, (handle & LENGTH) as usize) }
}

/// # Safety
///
/// `handle` is of a live array of `T` that nobody looks at any more.
unsafe fn release<T: Plain>(handle: u64) {
    let at = std::ptr::with_exposed_provenance_mut::<u8>((handle >> LENGTH_BITS) as usize);
    // SAFETY: allocated by `Owned::zeroed` with this layout, and the caller's promise.
    unsafe { dealloc(at, Owned::<T>::layout((handle & LENGTH) as usize)) }
}

// === impl Slot ===

impl<T: Plain> Default for Slot<T> {
    fn default() -> Self {
        Self(AtomicU64::new(0), PhantomData)
    }
}

impl<T: Plain> Slot<T> {
    /// The array, empty if there is none. The guard must be of the engine that the slot belongs to.
    #[inline]
    pub(super) fn load<'g>(&self, _guard: &'g impl Guard) -> &'g [T] {
        // SAFETY: whatever is in a slot is live, and stays so while the guard is there: it can only be freed through
        // `take` or `swap` and the limbo.
        unsafe { slice(self.0.load(Ordering::Acquire)) }
    }

    /// The array as a number, to see whether it is still the same one.
    #[inline]
    pub(super) fn identity(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// Writer only.
    pub(super) fn swap(&self, new: Option<Owned<T>>) -> Option<Unlinked<T>> {
        let handle = new.map_or(0, |new| std::mem::ManuallyDrop::new(new).0);
        let old = self.0.load(Ordering::Relaxed);
        self.0.store(handle, Ordering::Release);
        (old != 0).then_some(Unlinked(old, PhantomData))
    }

    /// Frees the array. For the end of an engine, when nobody can look any more.
    pub(super) fn clear(&mut self) {
        let old = std::mem::take(self.0.get_mut());
        if old != 0 {
            // SAFETY: exclusive access to the engine: no guard exists.
            unsafe { release::<T>(old) }
        }
    }
}

// === impl Pins ===

impl Guard for Pin<'_> {}
impl Guard for Token {}

impl Token {
    pub(super) fn new() -> Self {
        Self(())
    }
}

impl Default for Pins {
    fn default() -> Self {
        let slots = (0..PIN_SLOTS).map(|_| PinSlot(AtomicU64::new(0))).collect();
        Self { epoch: AtomicU64::new(1), slots }
    }
}

impl Pins {
    /// Comes in. `hint` is where the caller was last time, so that it mostly writes to a line of its own.
    #[inline]
    pub(super) fn pin(&self, hint: &mut usize) -> Pin<'_> {
        let mut tries = 0;
        loop {
            let place = &self.slots[*hint % PIN_SLOTS].0;
            let epoch = self.epoch.load(Ordering::SeqCst);
            if place.compare_exchange(0, epoch, Ordering::SeqCst, Ordering::Relaxed).is_ok() {
                // What is loaded from here on is not older than the announcement. On x86 the exchange is a full
                // barrier already.
                if cfg!(any(miri, not(target_arch = "x86_64"))) {
                    fence(Ordering::SeqCst);
                }
                return Pin { place };
            }
            *hint += 1;
            tries += 1;
            if tries % PIN_SLOTS == 0 {
                std::thread::yield_now();
            }
        }
    }

    /// Starts another epoch. Whatever left in an epoch below the result can be seen by nobody.
    fn advance(&self) -> u64 {
        fence(Ordering::SeqCst);
        let now = self.epoch.fetch_add(1, Ordering::SeqCst) + 1;
        let oldest =
            self.slots.iter().map(|slot| slot.0.load(Ordering::SeqCst)).filter(|epoch| *epoch != 0).min();
        oldest.unwrap_or(now)
    }

    pub(super) fn bytes(&self) -> usize {
        self.slots.len() * size_of::<PinSlot>()
    }
}

impl Drop for Pin<'_> {
    #[inline]
    fn drop(&mut self) {
        self.place.store(0, Ordering::Release);
    }
}

// === impl Limbo ===

impl Limbo {
    /// Takes an array that left its slot.
    pub(super) fn words(&mut self, pins: &Pins, gone: Option<Unlinked<AtomicU64>>) {
        if let Some(gone) = gone {
            self.count(Owned::<AtomicU64>::bytes_of((gone.0 & LENGTH) as usize));
            self.push(pins, Waiting::Words(gone.0));
        }
    }

    /// Takes a bucket array that left its slot.
    pub(super) fn lines(&mut self, pins: &Pins, gone: Option<Unlinked<Line>>) {
        if let Some(gone) = gone {
            self.count(Owned::<Line>::bytes_of((gone.0 & LENGTH) as usize));
            self.push(pins, Waiting::Lines(gone.0));
        }
    }

    pub(super) fn strand(&mut self, pins: &Pins, id: u32) {
        self.push(pins, Waiting::Strand(id));
    }

    pub(super) fn set(&mut self, pins: &Pins, id: u32) {
        self.push(pins, Waiting::Set(id));
    }

    /// Bytes that wait to be freed.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    fn count(&mut self, bytes: usize) {
        self.bytes += bytes;
        self.bytes_since_collect += bytes;
    }

    fn push(&mut self, pins: &Pins, what: Waiting) {
        self.waiting.push_back((pins.epoch.load(Ordering::SeqCst), what));
        self.since_collect += 1;
    }

    /// Frees what can be freed. The token says that the writer itself looks at nothing meanwhile.
    pub(super) fn collect(&mut self, _token: &mut Token, pins: &Pins, freed: &mut Freed) {
        if self.since_collect < COLLECT_AFTER && self.bytes_since_collect < COLLECT_AFTER_BYTES {
            return;
        }
        (self.since_collect, self.bytes_since_collect) = (0, 0);
        let safe = pins.advance();
        while let Some((epoch, _)) = self.waiting.front()
            && *epoch < safe
        {
            match self.waiting.pop_front() {
                Some((_, Waiting::Words(handle))) => {
                    self.bytes -= Owned::<AtomicU64>::bytes_of((handle & LENGTH) as usize);
                    // SAFETY: left its slot in an epoch that no reader is in any more, and is in the limbo once.
                    unsafe { release::<AtomicU64>(handle) }
                }
                Some((_, Waiting::Lines(handle))) => {
                    self.bytes -= Owned::<Line>::bytes_of((handle & LENGTH) as usize);
                    // SAFETY: as above.
                    unsafe { release::<Line>(handle) }
                }
                Some((_, Waiting::Strand(id))) => freed.strands.push(id),
                Some((_, Waiting::Set(id))) => freed.sets.push(id),
                None => {}
            }
        }
    }
}

impl Drop for Limbo {
    fn drop(&mut self) {
        for (_, what) in self.waiting.drain(..) {
            match what {
                // SAFETY: the limbo goes with its engine, which nobody can look at any more.
                Waiting::Words(handle) => unsafe { release::<AtomicU64>(handle) },
                // SAFETY: as above.
                Waiting::Lines(handle) => unsafe { release::<Line>(handle) },
                Waiting::Strand(_) | Waiting::Set(_) => {}
            }
        }
    }
}

// === impl Arena ===

impl<T: Plain> Default for Arena<T> {
    fn default() -> Self {
        Self {
            chunks: std::array::from_fn(|_| AtomicPtr::default()),
            bases: std::array::from_fn(|_| AtomicPtr::default()),
        }
    }
}

impl<T: Plain> Arena<T> {
    #[inline]
    fn place(id: u32) -> (usize, usize) {
        let at = id as usize + FIRST_CHUNK;
        let top = at.ilog2();
        ((top - FIRST_CHUNK.ilog2()) as usize, at - (1 << top))
    }

    /// The element. Its chunk was made by [`Self::grow_to`] before anybody could learn the id.
    #[inline]
    pub(super) fn get(&self, id: u32) -> &T {
        let (chunk, at) = Self::place(id);
        let start = self.chunks[chunk].load(Ordering::Acquire);
        assert!(!start.is_null(), "id {id} was never given out");
        // SAFETY: the chunk has `FIRST_CHUNK << chunk` elements, `at` is below that, and chunks stay until the arena
        // is dropped.
        unsafe { &*start.add(at) }
    }

    /// Makes ids up to and including `id` usable. Writer only.
    pub(super) fn grow_to(&self, id: u32) {
        let (chunk, _) = Self::place(id);
        if !self.chunks[chunk].load(Ordering::Relaxed).is_null() {
            return;
        }
        let layout = Self::layout(chunk);
        // SAFETY: the layout is not of size zero.
        let base = unsafe { alloc_zeroed(layout) };
        if base.is_null() {
            handle_alloc_error(layout);
        }
        let skip = base.align_offset(align_of::<T>());
        // SAFETY: the layout has room for one alignment more than the elements need.
        let start = unsafe { base.add(skip) };
        self.bases[chunk].store(base, Ordering::Relaxed);
        self.chunks[chunk].store(start.cast(), Ordering::Release);
    }

    /// Of a word's alignment only: such memory comes zeroed from the system, page by page as it is used, so that
    /// growing does not stop to clear it.
    fn layout(chunk: usize) -> Layout {
        let bytes = (FIRST_CHUNK << chunk) * size_of::<T>() + align_of::<T>();
        Layout::from_size_align(bytes, 8).expect("ids have 24 bits")
    }

    /// Prepares a look at the element.
    #[inline]
    pub(super) fn prefetch(&self, id: u32) {
        let (chunk, at) = Self::place(id);
        prefetch(self.chunks[chunk].load(Ordering::Relaxed).wrapping_add(at));
    }

    /// Runs over elements `0..end` with exclusive access. For the end of an engine.
    pub(super) fn each_mut(&mut self, end: u32, mut with: impl FnMut(&mut T)) {
        for id in 0..end {
            let (chunk, at) = Self::place(id);
            let start = *self.chunks[chunk].get_mut();
            if !start.is_null() {
                // SAFETY: as in `get`, with exclusive access to the arena.
                with(unsafe { &mut *start.add(at) });
            }
        }
    }
}

impl<T: Plain> Drop for Arena<T> {
    fn drop(&mut self) {
        for (chunk, base) in self.bases.iter_mut().enumerate() {
            let base = *base.get_mut();
            if !base.is_null() {
                // SAFETY: allocated with this layout in `grow_to`; elements need no drop.
                unsafe { dealloc(base, Self::layout(chunk)) }
            }
        }
    }
}

/// Asks the processor for the line at `at`, which need not be valid.
#[inline]
pub(super) fn prefetch<T>(at: *const T) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: a prefetch never faults, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = at;
}

/// Loads a `u32` that only the writer changes.
#[inline]
pub(super) fn own(value: &AtomicU32) -> u32 {
    value.load(Ordering::Relaxed)
}
