//! Digests of block sets: how two sides find out, in a few bytes, whether they hold the same blocks, and where they differ.
//!
//! A [`Digest`] is the number of keys and the 128-bit sum of their fingerprints. It does not depend on order, and adding
//! or taking away a key costs a few nanoseconds, so both sides keep one per owner all the time. [`Buckets`] are the same
//! by slices of the key space, made only when two digests differ: then only the slices that differ travel.
//!
//! A digest protects against loss, reorder and bugs, not against a publisher that lies: a publisher may claim anything of
//! itself anyway.

use crate::keys::BlockKey;

/// Keys that one bucket is meant to have: what travels for one differing key. Few enough that a repair follows the
/// drift, many enough that the sums are a small part of the state (an eighth of a byte a key).
const KEYS_PER_BUCKET: u64 = 64;
/// Most slices of one owner, as a power of two: 128 KiB of sums.
pub const MAX_BUCKET_BITS: u8 = 14;

/// What a set of keys looks like from far away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digest {
    /// Number of keys.
    pub count: u64,
    /// Sum of their fingerprints, wrapping.
    pub sum: u128,
}

/// Sums of a set of keys by slices of their space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buckets {
    bits: u8,
    sums: Vec<u64>,
}

/// The number of sums is not a power of two, or too large.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} bucket sums: a power of two up to 2^{MAX_BUCKET_BITS} is needed")]
pub struct InvalidBucketsError(pub usize);

/// What a key adds to a sum: the full product of two numbers made from the key. One multiplication, for every block that
/// comes or goes pays it; and not linear, so that sums differ also where the sums of keys do not.
#[inline]
pub fn fingerprint(key: BlockKey) -> u128 {
    u128::from(key.0 ^ 0x9e37_79b9_7f4a_7c15) * u128::from(key.0.rotate_left(32) ^ 0xd1b5_4a32_d192_ed03)
}

/// The finaliser of splitmix64: every input bit changes every output bit with a chance of about one half.
#[inline]
fn spread(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

// === impl Digest ===

impl Digest {
    /// A key that was not in the set is now.
    #[inline]
    pub fn add(&mut self, key: BlockKey) {
        self.count += 1;
        self.sum = self.sum.wrapping_add(fingerprint(key));
    }

    /// A key that was in the set is not any more.
    #[inline]
    pub fn remove(&mut self, key: BlockKey) {
        self.count -= 1;
        self.sum = self.sum.wrapping_sub(fingerprint(key));
    }

    /// The digest of two sets together that have no key in common.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self { count: self.count + other.count, sum: self.sum.wrapping_add(other.sum) }
    }

    /// True for the empty set.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The digest of these keys, each given once.
    pub fn of(keys: impl IntoIterator<Item = BlockKey>) -> Self {
        let mut digest = Self::default();
        keys.into_iter().for_each(|key| digest.add(key));
        digest
    }
}

// === impl Buckets ===

impl Buckets {
    /// How finely a set of this many keys is to be cut: the number of slices as a power of two.
    pub fn bits_for(keys: u64) -> u8 {
        let slices = keys.div_ceil(KEYS_PER_BUCKET).max(1).next_power_of_two();
        (slices.trailing_zeros() as u8).min(MAX_BUCKET_BITS)
    }

    /// The sums of these keys, each given once, in `2^bits` slices; `bits` at most [`MAX_BUCKET_BITS`].
    pub fn of(bits: u8, keys: impl IntoIterator<Item = BlockKey>) -> Self {
        let mut sums = vec![0u64; 1 << bits];
        for key in keys {
            let print = fingerprint(key);
            let sum = &mut sums[Self::slice(bits, key) as usize];
            *sum = sum.wrapping_add((print >> 64) as u64 ^ print as u64);
        }
        Self { bits, sums }
    }

    /// Takes sums as they came over the wire.
    pub fn from_sums(sums: Vec<u64>) -> Result<Self, InvalidBucketsError> {
        if !sums.len().is_power_of_two() || sums.len() > 1 << MAX_BUCKET_BITS {
            return Err(InvalidBucketsError(sums.len()));
        }
        Ok(Self { bits: sums.len().trailing_zeros() as u8, sums })
    }

    /// The number of slices as a power of two.
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// The sums in order.
    pub fn sums(&self) -> &[u64] {
        &self.sums
    }

    /// Numbers of the slices that differ from those of another set in as many slices.
    pub fn differing<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = u32> + 'a {
        debug_assert_eq!(self.bits, other.bits);
        (0..).zip(self.sums.iter().zip(&other.sums)).filter(|(_, (a, b))| a != b).map(|(at, _)| at)
    }

    /// Which of `2^bits` slices a key belongs to.
    #[inline]
    pub fn slice(bits: u8, key: BlockKey) -> u32 {
        // Shifting by all 64 bits is not defined, and no bits mean one slice.
        if bits == 0 { 0 } else { (spread(key.0) >> (64 - u32::from(bits))) as u32 }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn keys(numbers: &BTreeSet<u64>) -> impl Iterator<Item = BlockKey> + '_ {
        numbers.iter().map(|key| BlockKey(*key))
    }

    proptest! {
        #[test]
        fn digests_follow_the_set_whatever_the_order(
            before in proptest::collection::btree_set(0u64..200, 0..60),
            after in proptest::collection::btree_set(0u64..200, 0..60),
        ) {
            let mut digest = Digest::of(keys(&before));
            after.difference(&before).for_each(|key| digest.add(BlockKey(*key)));
            before.difference(&after).for_each(|key| digest.remove(BlockKey(*key)));
            prop_assert_eq!(digest, Digest::of(keys(&after)));
            prop_assert_eq!(digest.is_empty(), after.is_empty());
            prop_assert_eq!(digest == Digest::of(keys(&before)), before == after);
        }

        #[test]
        fn the_slices_that_differ_are_those_of_the_keys_that_differ(
            mine in proptest::collection::btree_set(any::<u64>(), 0..300),
            theirs in proptest::collection::btree_set(any::<u64>(), 0..300),
            bits in 0u8..=MAX_BUCKET_BITS,
        ) {
            let (a, b) = (Buckets::of(bits, keys(&mine)), Buckets::of(bits, keys(&theirs)));
            let expected: BTreeSet<u32> = mine
                .symmetric_difference(&theirs)
                .map(|key| Buckets::slice(bits, BlockKey(*key)))
                .collect();
            prop_assert_eq!(a.differing(&b).collect::<BTreeSet<_>>(), expected);
            prop_assert_eq!(Buckets::from_sums(a.sums().to_vec()), Ok(a));
        }
    }

    #[test]
    fn sets_are_cut_so_that_a_difference_costs_about_64_keys() {
        assert_eq!([0, 1, 64, 65, 100_000].map(Buckets::bits_for), [0, 0, 0, 1, 11]);
        assert_eq!(Buckets::bits_for(u64::MAX), MAX_BUCKET_BITS);
    }

    #[test]
    fn sums_in_a_number_that_is_no_power_of_two_are_refused() {
        for sums in [0, 3, (1 << MAX_BUCKET_BITS) * 2] {
            assert_eq!(Buckets::from_sums(vec![0; sums]), Err(InvalidBucketsError(sums)));
        }
    }
}
