//! Frames that arrived before one that goes before them: kept, bounded, until the missing ones were sent again.

use std::collections::BTreeMap;

use bytes::Bytes;
use kvatlas_proto::FrameSeq;
use kvatlas_proto::request::MAX_RANGES;

use crate::index::MAX_TRANSFERS;
use crate::session::STAGED_BYTES;

/// Frames that are held for one source. A source publishes some hundred a second, and a lost frame is back within
/// milliseconds; at the bound the newest is dropped and asked for later like a lost one.
pub const HELD_FRAMES: usize = 4_096;
/// Bytes that are held for one source.
pub const HELD_BYTES: usize = 8 << 20;

/// Bounds of what repairs of lost frames may take. The defaults are right for every index; a simulation lowers them, so
/// that small worlds reach them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecoveryLimits {
    /// Frames that are held for one source while frames before them are missing.
    pub held_frames: usize,
    /// Bytes of such frames.
    pub held_bytes: usize,
    /// Bytes of an answer that are kept to be applied together.
    pub staged_bytes: usize,
    /// State transfers that run at the same time.
    pub transfers: usize,
}

/// Frames of one source and epoch by sequence.
#[derive(Clone, Debug, Default)]
pub(crate) struct HeldFrames {
    frames: BTreeMap<FrameSeq, Bytes>,
    bytes: usize,
}

// === impl RecoveryLimits ===

impl Default for RecoveryLimits {
    fn default() -> Self {
        Self {
            held_frames: HELD_FRAMES,
            held_bytes: HELD_BYTES,
            staged_bytes: STAGED_BYTES,
            transfers: MAX_TRANSFERS,
        }
    }
}

// === impl HeldFrames ===

impl HeldFrames {
    /// Keeps a frame. False if there is no room.
    pub(crate) fn hold(&mut self, seq: FrameSeq, frame: &Bytes, limits: &RecoveryLimits) -> bool {
        if self.frames.contains_key(&seq) {
            return true;
        }
        if self.frames.len() >= limits.held_frames || self.bytes + frame.len() > limits.held_bytes {
            return false;
        }
        self.bytes += frame.len();
        self.frames.insert(seq, frame.clone());
        true
    }

    /// Takes the frame with this sequence out.
    pub(crate) fn take(&mut self, seq: FrameSeq) -> Option<Bytes> {
        let frame = self.frames.remove(&seq)?;
        self.bytes -= frame.len();
        Some(frame)
    }

    /// Drops the frames up to this sequence.
    pub(crate) fn drop_through(&mut self, seq: FrameSeq) {
        self.frames = self.frames.split_off(&seq.next());
        self.bytes = self.frames.values().map(Bytes::len).sum();
    }

    /// What is missing from `first` to `last`, as ranges with both ends included; at most [`MAX_RANGES`] of them and
    /// `max_frames` frames.
    pub(crate) fn missing(
        &self,
        first: FrameSeq,
        last: FrameSeq,
        mut max_frames: u64,
    ) -> Vec<(FrameSeq, FrameSeq)> {
        let (mut ranges, mut from) = (Vec::new(), first);
        let ends = self.frames.range(first..).map(|(seq, _)| *seq).chain([last.next()]);
        for held in ends {
            if held > from && ranges.len() < MAX_RANGES && max_frames > 0 && from <= last {
                let end = held.0.min(last.0 + 1).min(from.0 + max_frames);
                max_frames -= end - from.0;
                ranges.push((from, FrameSeq(end - 1)));
            }
            from = from.max(held.next());
        }
        ranges
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const LIMITS: RecoveryLimits =
        RecoveryLimits { held_frames: HELD_FRAMES, held_bytes: HELD_BYTES, staged_bytes: 1, transfers: 1 };

    proptest! {
        #[test]
        fn what_is_missing_is_what_is_not_held(
            held in proptest::collection::btree_set(0u64..60, 0..30),
            first in 0u64..50,
            length in 1u64..40,
            max_frames in 1u64..100,
        ) {
            let mut frames = HeldFrames::default();
            held.iter().for_each(|seq| assert!(frames.hold(FrameSeq(*seq), &Bytes::from_static(b"x"), &LIMITS)));
            let ranges = frames.missing(FrameSeq(first), FrameSeq(first + length - 1), max_frames);
            let asked: Vec<u64> = ranges.iter().flat_map(|(a, b)| a.0..=b.0).collect();
            let expected: Vec<u64> =
                (first..first + length).filter(|seq| !held.contains(seq)).take(max_frames as usize).collect();
            prop_assert_eq!(asked, expected);
            frames.drop_through(FrameSeq(first));
            let left: BTreeSet<u64> = held.into_iter().filter(|seq| *seq > first).collect();
            prop_assert_eq!(frames.bytes, left.len());
            prop_assert!((0..60).all(|seq| frames.take(FrameSeq(seq)).is_some() == left.contains(&seq)));
        }
    }

    #[test]
    fn at_the_bound_the_newest_is_dropped() {
        let mut frames = HeldFrames::default();
        let half = Bytes::from(vec![0; HELD_BYTES / 2]);
        assert!(frames.hold(FrameSeq(1), &half, &LIMITS) && frames.hold(FrameSeq(2), &half, &LIMITS));
        assert!(!frames.hold(FrameSeq(3), &half, &LIMITS));
        assert!(frames.hold(FrameSeq(2), &half, &LIMITS), "what is held already needs no room");
        frames.take(FrameSeq(1));
        assert!(frames.hold(FrameSeq(3), &half, &LIMITS));
    }
}
