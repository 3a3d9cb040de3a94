//! A source's sequence of frames in one virtual shard: its *lane*.

use bytes::Bytes;
use kvatlas_proto::frame::{EncodeFrameError, FrameHeader, OpBuffer};
use kvatlas_proto::{Digest, FrameSeq, Partition, ShardId};

use super::publish::PublishLimits;
use super::sent::Sent;

/// Heartbeats of the source of which a lane that has nothing new says one. Where the key space is cut, most lanes of an idle
/// source say the same every time; an index takes three silent seconds for a sign of trouble.
pub const IDLE_HEARTBEAT_BEATS: u64 = 2;
/// Least frames of a lane that are kept to be sent again, however many lanes there are: a minute of heartbeats.
pub const MIN_SENT_FRAMES: usize = 64;
/// Least bytes of them: as many frames with a few dozen blocks each. At 1,024 lanes that is 32 MiB a source.
pub const MIN_SENT_BYTES: usize = 32 << 10;

/// A frame to be published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// Its lane.
    pub shard: ShardId,
    /// The frame as it travels.
    pub frame: Bytes,
}

/// What a source publishes in one shard. Its frames are contiguous from the epoch's start.
pub(super) struct Lane {
    next: FrameSeq,
    /// What the mirror held here before the operations that wait, by owner; owners beyond its end held nothing.
    base: Vec<Digest>,
    pub(super) sent: Sent,
    /// The sequence after the last heartbeat; `None`: somebody waits for one.
    told: Option<FrameSeq>,
}

// === impl Lane ===

impl Lane {
    /// Nothing was published, and nothing is held.
    pub(super) fn new() -> Self {
        Self { next: FrameSeq(0), base: Vec::new(), sent: Sent::default(), told: None }
    }

    /// Sequence of the next frame.
    pub(super) fn next(&self) -> FrameSeq {
        self.next
    }

    /// What the epoch begins with, of `owners` owners.
    pub(super) fn base(&self, owners: usize) -> Vec<Digest> {
        let mut base = self.base.clone();
        base.resize(owners, Digest::default());
        base
    }

    /// Everything is published of what the mirror holds here.
    pub(super) fn holds(&mut self, digests: &[Digest]) {
        self.base.clear();
        self.base.extend_from_slice(digests);
    }

    /// The next epoch begins with nothing.
    pub(super) fn held_nothing(&mut self) {
        self.base.clear();
    }

    /// Another epoch: its first frame is the next one.
    pub(super) fn restart(&mut self) {
        self.next = FrameSeq(0);
        self.sent.restart();
        self.told = None;
    }

    /// Somebody waits for a heartbeat: the next one is not left out.
    pub(super) fn owe_heartbeat(&mut self) {
        self.told = None;
    }

    /// Whether nothing was published since the last heartbeat, and nobody waits for one.
    pub(super) fn is_idle(&self) -> bool {
        self.told == Some(self.next)
    }

    /// The newest frame was a heartbeat.
    pub(super) fn has_told(&mut self) {
        self.told = Some(self.next);
    }

    /// Encodes the next frame, keeps it to be sent again, and appends it to `frames`.
    pub(super) fn push(
        &mut self,
        header: &mut FrameHeader,
        ops: &mut OpBuffer,
        limits: &PublishLimits,
        frames: &mut Vec<Outgoing>,
    ) -> Result<(), EncodeFrameError> {
        header.seq = self.next;
        let frame = Bytes::from(header.encode(ops)?);
        self.next = self.next.next();
        self.sent.push(frame.clone(), limits);
        frames.push(Outgoing { shard: header.shard, frame });
        Ok(())
    }
}

// === impl PublishLimits ===

impl PublishLimits {
    /// The bounds of one lane: what is kept is divided evenly, down to a minimum.
    pub(super) fn of_lane(self, partition: Partition) -> Self {
        let share =
            |total: usize, least: usize| (total / usize::from(partition.shards())).max(least.min(total));
        Self {
            sent_frames: share(self.sent_frames, MIN_SENT_FRAMES),
            sent_bytes: share(self.sent_bytes, MIN_SENT_BYTES),
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::sent::{SENT_BYTES, SENT_FRAMES};
    use super::*;

    #[test]
    fn what_is_kept_is_divided_among_lanes_down_to_a_minimum() {
        let kept = |limits: PublishLimits, shards: u32| {
            let lane = limits.of_lane(Partition::new(shards).unwrap());
            (lane.sent_frames, lane.sent_bytes)
        };
        let defaults = PublishLimits::default();
        assert_eq!(kept(defaults, 1), (SENT_FRAMES, SENT_BYTES));
        assert_eq!(kept(defaults, 64), (SENT_FRAMES / 64, SENT_BYTES / 64));
        assert_eq!(kept(defaults, 1_024), (MIN_SENT_FRAMES, MIN_SENT_BYTES));
        // What is less than the minimum in all is so in each.
        let small = PublishLimits { sent_frames: 12, sent_bytes: 4_096, ..defaults };
        assert_eq!((kept(small, 1), kept(small, 64)), ((12, 4_096), (12, 4_096)));
    }
}
