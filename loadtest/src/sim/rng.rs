//! Seeded choices. An own generator (splitmix64), so that a seed printed today means the same after an upgrade of a
//! dependency.

/// A stream of choices.
#[derive(Clone, Debug)]
pub(super) struct Rng(u64);

// === impl Rng ===

impl Rng {
    /// The stream of a seed and a purpose: streams of different purposes do not disturb one another, so that a step
    /// that is left out of a scenario changes as little as possible elsewhere.
    pub(super) fn new(seed: u64, purpose: &str, number: u64) -> Self {
        let name = xxhash_rust::xxh3::xxh3_64_with_seed(purpose.as_bytes(), seed);
        let mut rng = Self(name ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        rng.next();
        rng
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// A number below `bound`, which is above 0. The bias of the remainder is far below anything that matters here.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// A number from `low` to `high`, both included.
    pub(super) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True with a chance of `percent`.
    pub(super) fn chance(&mut self, percent: u32) -> bool {
        self.below(100) < u64::from(percent)
    }

    /// One of these.
    pub(super) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }
}
