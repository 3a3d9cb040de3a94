//! The bus's side of a source: frames of the epoch, lane by lane, and answers to those who missed some.

use bytes::Bytes;
use kvatlas_proto::frame::{EncodeFrameError, FrameHeader, FramePart, OpBuffer, ReplyPart};
use kvatlas_proto::request::{OwnerBuckets, Request, RequestId, Want};
use kvatlas_proto::{Epoch, FrameSeq, Scope, ShardId};

use super::Source;
use super::lanes::{IDLE_HEARTBEAT_BEATS, Lane, Outgoing};
use super::sent::{SENT_BYTES, SENT_FRAMES};

/// Operations per frame, in bytes. A frame of this size is far below a broker's limit and takes the index well under
/// a millisecond, so that queries never wait long behind one.
pub const FRAME_OPS_BYTES: usize = 64 * 1024;

/// Bounds of what a source publishes and keeps. The defaults are right for every engine; a simulation lowers them, so that
/// small worlds reach them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublishLimits {
    /// Operations per frame and per piece of an answer, in bytes.
    pub frame_ops_bytes: usize,
    /// Frames that are kept to be sent again, over all shards.
    pub sent_frames: usize,
    /// Bytes of frames that are kept to be sent again, over all shards.
    pub sent_bytes: usize,
}

// === impl PublishLimits ===

impl Default for PublishLimits {
    fn default() -> Self {
        Self { frame_ops_bytes: FRAME_OPS_BYTES, sent_frames: SENT_FRAMES, sent_bytes: SENT_BYTES }
    }
}

// === impl Source ===

impl Source {
    /// Whether there is something to publish.
    pub fn has_frames(&self) -> bool {
        self.is_ready() && (self.new_epoch || !self.ops.is_empty())
    }

    /// Whether anything may be said at all.
    fn is_ready(&self) -> bool {
        self.scope.is_some() && !self.unproved
    }

    /// Whether enough is waiting for a full frame, in one shard or in all together: what waits is bounded as if the key space
    /// were in one piece.
    pub fn wants_flush(&self) -> bool {
        self.ops.encoded_bytes() >= self.config.publish.frame_ops_bytes
    }

    /// What was published may differ from the mirror: the next frame starts a new epoch with what the mirror holds now. A
    /// frame that was encoded and then lost needs no new epoch: who missed it asks for it.
    pub fn new_epoch(&mut self) {
        self.ops.clear();
        for (shard, lane) in self.config.partition.all().zip(&mut self.lanes) {
            lane.holds(self.mirror.digests(shard));
        }
        self.new_epoch = true;
    }

    /// Somebody waits for the next heartbeat of a shard: it is said although it may have nothing new.
    pub fn owe_heartbeat(&mut self, shard: ShardId) {
        if shard.of() == self.config.partition.shards() {
            self.lanes[usize::from(shard.number())].owe_heartbeat();
        }
    }

    /// The same for all shards.
    pub fn owe_heartbeats(&mut self) {
        self.lanes.iter_mut().for_each(Lane::owe_heartbeat);
    }

    /// Encodes what is waiting: the starts of an epoch if one is due, and changes, in order within each shard. With `heartbeat`,
    /// a shard's last frame is one without operations that says the mirror's digests there. Where the key space is cut, shards
    /// with nothing new say it only every [`IDLE_HEARTBEAT_BEATS`]th time, in turns, unless somebody waits for it
    /// ([`Self::owe_heartbeat`]). Nothing before the block size is known, nor while a restored state is not proved.
    ///
    /// An error takes the changes with it; the next call starts a new epoch.
    pub fn take_frames(&mut self, now_ns: u64, heartbeat: bool) -> Result<Vec<Outgoing>, EncodeFrameError> {
        self.mirror.expire(now_ns, &mut self.ops);
        let Some(scope) = self.scope.clone().filter(|_| self.is_ready()) else { return Ok(Vec::new()) };
        if self.new_epoch {
            // The very first epoch has its number already.
            let least = if self.named { self.epoch.0 + 1 } else { self.epoch.0 };
            self.epoch = Epoch(now_ns.max(least));
            self.named = true;
            self.lanes.iter_mut().for_each(Lane::restart);
        }
        let encoded = self.encode_waiting(scope, heartbeat);
        // After a failure the epoch's number is spent, in every lane.
        if encoded.is_err() {
            self.new_epoch();
        } else {
            self.new_epoch = false;
        }
        encoded
    }

    fn encode_waiting(&mut self, scope: Scope, heartbeat: bool) -> Result<Vec<Outgoing>, EncodeFrameError> {
        let (partition, mut frames) = (self.config.partition, Vec::new());
        let mut header = self.header(scope, partition.shard(0));
        let owners = header.owners.len();
        let engine_time_ns = if self.ops.is_empty() { 0 } else { std::mem::take(&mut self.engine_time_ns) };
        for (shard, lane) in partition.all().zip(&mut self.lanes) {
            let limits = &self.lane_limits;
            header.shard = shard;
            if self.new_epoch {
                header.part = FramePart::Start;
                header.digests = lane.base(owners);
                lane.push(&mut header, &mut OpBuffer::default(), limits, &mut frames)?;
                header.part = FramePart::Live;
                header.digests.clear();
            }
            if self.new_epoch || !self.ops.of(shard).is_empty() {
                header.engine_time_ns = engine_time_ns;
                let ops = self.ops.of_mut(shard);
                while !ops.is_empty() {
                    let mut chunk = ops.take_chunk(limits.frame_ops_bytes);
                    lane.push(&mut header, &mut chunk, limits, &mut frames)?;
                }
                header.engine_time_ns = 0;
                lane.holds(self.mirror.digests(shard));
            }
            let turn = (self.beat + u64::from(shard.number())).is_multiple_of(IDLE_HEARTBEAT_BEATS);
            if heartbeat && (turn || partition.shards() == 1 || !lane.is_idle()) {
                header.digests.extend_from_slice(self.mirror.digests(shard));
                lane.push(&mut header, &mut OpBuffer::default(), limits, &mut frames)?;
                lane.has_told();
                header.digests.clear();
            }
        }
        self.ops.clear();
        self.beat += u64::from(heartbeat);
        Ok(frames)
    }

    /// The frames that answer a request, for the asker alone. Everything that waits must have been published before
    /// ([`Self::take_frames`]): an answer says what is held after the last published frame of the request's shard. Until then,
    /// and to a request about another epoch, there is no answer; a heartbeat tells such an asker where the source is. To who
    /// cuts the key space otherwise there is nothing to say.
    pub fn answer(&self, request: &Request) -> Result<Vec<Bytes>, EncodeFrameError> {
        let Some(scope) = self.scope.clone().filter(|_| self.is_ready()) else { return Ok(Vec::new()) };
        let ours = request.shard.of() == self.config.partition.shards();
        if !ours || request.epoch != self.epoch || self.has_frames() {
            return Ok(Vec::new());
        }
        match &request.want {
            Want::Frames(ranges) => {
                let (mut frames, gone) = self.lane(request.shard).sent.select(ranges);
                if gone {
                    frames.push(self.unavailable(scope, request)?);
                }
                Ok(frames)
            }
            Want::State(theirs) => self.repair(scope, request.shard, request.id, theirs),
        }
    }

    /// Frames that were asked for are not kept any more: these are.
    fn unavailable(&self, scope: Scope, request: &Request) -> Result<Bytes, EncodeFrameError> {
        let header = FrameHeader {
            part: FramePart::Unavailable,
            seq: self.lane(request.shard).sent.first(),
            reply: Some(ReplyPart { request: request.id, piece: 0, pieces: 1 }),
            ..self.header(scope, request.shard)
        };
        Ok(Bytes::from(header.encode(&mut OpBuffer::default())?))
    }

    /// What makes an asker's state of a shard equal to the mirror's, in as many pieces as it takes; at least one, which has the digests.
    fn repair(
        &self,
        scope: Scope,
        shard: ShardId,
        request: RequestId,
        theirs: &[OwnerBuckets],
    ) -> Result<Vec<Bytes>, EncodeFrameError> {
        let mut header = self.header(scope, shard);
        let theirs: Vec<_> = header
            .owners
            .iter()
            .map(|owner| {
                let same = |their: &&OwnerBuckets| {
                    (their.tier, their.group) == (owner.tier, owner.group) && their.medium == owner.medium
                };
                theirs.iter().find(same).map(|their| &their.buckets)
            })
            .collect();
        let mut pieces = self.mirror.differences(shard, &theirs, self.config.publish.frame_ops_bytes);
        if pieces.is_empty() {
            pieces.push(OpBuffer::default());
        }
        header.part = FramePart::Repair;
        header.seq = FrameSeq(header.seq.0 - 1);
        header.digests = self.mirror.digests(shard).to_vec();
        let count = pieces.len() as u32;
        (0..count)
            .zip(&mut pieces)
            .map(|(piece, ops)| {
                header.reply = Some(ReplyPart { request, piece, pieces: count });
                Ok(Bytes::from(header.encode(ops)?))
            })
            .collect()
    }

    /// The lane of a shard of this partition.
    pub(super) fn lane(&self, shard: ShardId) -> &Lane {
        &self.lanes[usize::from(shard.number())]
    }

    pub(super) fn header(&self, scope: Scope, shard: ShardId) -> FrameHeader {
        FrameHeader {
            scope,
            source: self.id(),
            shard,
            variant: self.mirror.variant(),
            epoch: self.epoch,
            seq: self.lane(shard).next(),
            part: FramePart::Live,
            health: self.health,
            engine_time_ns: 0,
            owners: self.mirror.owners(),
            digests: Vec::new(),
            reply: None,
        }
    }
}
