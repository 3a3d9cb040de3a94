//! Frames of one lane of the current epoch, kept to be sent again to whoever missed them.

use std::collections::VecDeque;

use bytes::Bytes;
use kvatlas_proto::FrameSeq;

use super::publish::PublishLimits;

/// Most bytes of frames that are kept of a source, over all lanes: about 1.5 million stored blocks, or half a minute of 50,000 blocks a second. Who missed
/// more asks for what differs instead.
pub const SENT_BYTES: usize = 16 << 20;
/// Most frames that are kept of a source, over all lanes: in one lane with a flush every 2 ms, half a minute.
pub const SENT_FRAMES: usize = 16_384;
/// Most frames of one answer; the asker asks for the rest. At full frames that is more than is kept.
pub const ANSWER_FRAMES: usize = 4_096;

/// The newest frames of the lane's epoch, without a hole up to the last one published.
#[derive(Default)]
pub(super) struct Sent {
    /// Sequence of the oldest frame kept, or of the next one if none is.
    first: u64,
    frames: VecDeque<Bytes>,
    bytes: usize,
}

// === impl Sent ===

impl Sent {
    /// Another epoch: its first frame is the next one.
    pub(super) fn restart(&mut self) {
        *self = Self::default();
    }

    /// Keeps the frame after the last one; the oldest go at the bounds.
    pub(super) fn push(&mut self, frame: Bytes, limits: &PublishLimits) {
        self.bytes += frame.len();
        self.frames.push_back(frame);
        while self.bytes > limits.sent_bytes || self.frames.len() > limits.sent_frames {
            let Some(oldest) = self.frames.pop_front() else { return };
            self.bytes -= oldest.len();
            self.first += 1;
        }
    }

    /// Sequence of the oldest frame kept.
    pub(super) fn first(&self) -> FrameSeq {
        FrameSeq(self.first)
    }

    /// The kept frames of these ranges in order, each once and at most [`ANSWER_FRAMES`], and whether some that were asked for
    /// are not kept any more. Frames that are yet to come are in no answer.
    pub(super) fn select(&self, ranges: &[(FrameSeq, FrameSeq)]) -> (Vec<Bytes>, bool) {
        let mut ranges = ranges.to_vec();
        ranges.sort_unstable();
        let end = self.first + self.frames.len() as u64;
        let gone = ranges.first().is_some_and(|(first, _)| first.0 < self.first);
        let (mut frames, mut next) = (Vec::new(), self.first);
        for (first, last) in ranges {
            let from = first.0.max(next);
            let to = last.0.saturating_add(1).min(end);
            for seq in from..to {
                if frames.len() == ANSWER_FRAMES {
                    return (frames, gone);
                }
                frames.push(self.frames[(seq - self.first) as usize].clone());
            }
            next = next.max(to);
        }
        (frames, gone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u64, last: u64) -> (FrameSeq, FrameSeq) {
        (FrameSeq(first), FrameSeq(last))
    }

    fn sent(frames: u64, bytes: usize) -> Sent {
        let mut sent = Sent::default();
        for seq in 0..frames {
            let mut frame = seq.to_le_bytes().to_vec();
            frame.resize(bytes, 0);
            sent.push(frame.into(), &PublishLimits::default());
        }
        sent
    }

    fn select(sent: &Sent, ranges: &[(FrameSeq, FrameSeq)]) -> (Vec<u64>, bool) {
        let (frames, gone) = sent.select(ranges);
        (frames.iter().map(|frame| u64::from_le_bytes(frame[..8].try_into().unwrap())).collect(), gone)
    }

    #[test]
    fn ranges_in_any_order_and_overlap_give_each_frame_once() {
        let sent = sent(10, 8);
        assert_eq!(select(&sent, &[range(7, 8), range(2, 4), range(3, 5)]), (vec![2, 3, 4, 5, 7, 8], false));
        assert_eq!(select(&sent, &[range(9, u64::MAX), range(20, 30)]), (vec![9], false));
        assert_eq!(select(&sent, &[]), (vec![], false));
    }

    #[test]
    fn the_oldest_frames_go_at_both_bounds_and_that_is_said() {
        let kept = (SENT_BYTES / (64 << 10)) as u64;
        let by_bytes = sent(kept + 5, 64 << 10);
        assert_eq!(by_bytes.first(), FrameSeq(5));
        assert_eq!(select(&by_bytes, &[range(3, 6)]), (vec![5, 6], true));
        assert_eq!(select(&by_bytes, &[range(0, 2)]), (vec![], true));
        assert_eq!(select(&by_bytes, &[range(5, 5)]), (vec![5], false));
        let by_number = sent(SENT_FRAMES as u64 + 1, 8);
        assert_eq!(by_number.first(), FrameSeq(1));
    }

    #[test]
    fn an_answer_is_bounded_and_starts_at_the_oldest() {
        let sent = sent(SENT_FRAMES as u64, 8);
        let (frames, gone) = select(&sent, &[range(0, u64::MAX)]);
        assert_eq!((frames.len(), frames[0], gone), (ANSWER_FRAMES, 0, false));
    }

    #[test]
    fn another_epoch_keeps_nothing_of_the_last() {
        let mut sent = sent(5, 8);
        sent.restart();
        assert_eq!((select(&sent, &[range(0, 9)]), sent.first()), ((vec![], false), FrameSeq(0)));
    }
}
