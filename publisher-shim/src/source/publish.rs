//! The bus's side of a source: frames of the epoch, and answers to those who missed some.

use bytes::Bytes;
use kvatlas_proto::frame::{EncodeFrameError, FrameHeader, FramePart, OpBuffer, ReplyPart};
use kvatlas_proto::request::{OwnerBuckets, Request, RequestId, Want};
use kvatlas_proto::{Digest, Epoch, FrameSeq, Scope};

use super::Source;
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
    /// Frames that are kept to be sent again.
    pub sent_frames: usize,
    /// Bytes of frames that are kept to be sent again.
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

    /// Whether enough is waiting for a full frame.
    pub fn wants_flush(&self) -> bool {
        self.ops.encoded_bytes() >= self.config.publish.frame_ops_bytes
    }

    /// What was published may differ from the mirror: the next frame starts a new epoch with what the mirror holds now. A
    /// frame that was encoded and then lost needs no new epoch: who missed it asks for it.
    pub fn new_epoch(&mut self) {
        self.ops.clear();
        self.base = self.mirror.digests();
        self.new_epoch = true;
    }

    /// Encodes what is waiting: the start of an epoch if one is due, and changes. With `heartbeat`, the last frame is one
    /// without operations that says the mirror's digests. Nothing before the block size is known, nor while a restored state is
    /// not proved.
    ///
    /// An error takes the changes with it; the next call starts a new epoch.
    pub fn take_frames(&mut self, now_ns: u64, heartbeat: bool) -> Result<Vec<Bytes>, EncodeFrameError> {
        self.mirror.expire(now_ns, &mut self.ops);
        let Some(scope) = self.scope.clone().filter(|_| self.is_ready()) else { return Ok(Vec::new()) };
        if self.new_epoch {
            // The very first epoch has its number already.
            let least = if self.next_frame == FrameSeq(0) { self.epoch.0 } else { self.epoch.0 + 1 };
            self.epoch = Epoch(now_ns.max(least));
            self.next_frame = FrameSeq(0);
            self.sent.restart();
        }
        let encoded = self.encode_waiting(scope, heartbeat);
        let Ok(frames) = &encoded else {
            // The epoch's number is spent.
            self.next_frame = self.next_frame.next();
            self.new_epoch();
            return encoded;
        };
        self.new_epoch = false;
        self.base = self.mirror.digests();
        self.next_frame = FrameSeq(self.next_frame.0 + frames.len() as u64);
        frames.iter().for_each(|frame| self.sent.push(frame.clone(), &self.config.publish));
        encoded
    }

    fn encode_waiting(&mut self, scope: Scope, heartbeat: bool) -> Result<Vec<Bytes>, EncodeFrameError> {
        let mut header = self.header(scope);
        let mut frames = Vec::new();
        if self.new_epoch {
            header.part = FramePart::Start;
            header.digests.clone_from(&self.base);
            header.digests.resize(header.owners.len(), Digest::default());
            push_frame(&mut header, &mut OpBuffer::default(), &mut frames)?;
            header.part = FramePart::Live;
            header.digests.clear();
        }
        if !self.ops.is_empty() {
            header.engine_time_ns = std::mem::take(&mut self.engine_time_ns);
        }
        while !self.ops.is_empty() {
            push_frame(
                &mut header,
                &mut self.ops.take_chunk(self.config.publish.frame_ops_bytes),
                &mut frames,
            )?;
        }
        if heartbeat {
            header.engine_time_ns = 0;
            header.digests = self.mirror.digests();
            push_frame(&mut header, &mut OpBuffer::default(), &mut frames)?;
        }
        Ok(frames)
    }

    /// The frames that answer a request, for the asker alone. Everything that waits must have been published before
    /// ([`Self::take_frames`]): an answer says what is held after the last published frame. Until then, and to a request
    /// about another epoch, there is no answer; a heartbeat tells such an asker where the source is.
    pub fn answer(&self, request: &Request) -> Result<Vec<Bytes>, EncodeFrameError> {
        let Some(scope) = self.scope.clone().filter(|_| self.is_ready()) else { return Ok(Vec::new()) };
        if request.epoch != self.epoch || self.has_frames() {
            return Ok(Vec::new());
        }
        match &request.want {
            Want::Frames(ranges) => {
                let (mut frames, gone) = self.sent.select(ranges);
                if gone {
                    frames.push(self.unavailable(scope, request.id)?);
                }
                Ok(frames)
            }
            Want::State(theirs) => self.repair(scope, request.id, theirs),
        }
    }

    /// Frames that were asked for are not kept any more: these are.
    fn unavailable(&self, scope: Scope, request: RequestId) -> Result<Bytes, EncodeFrameError> {
        let header = FrameHeader {
            part: FramePart::Unavailable,
            seq: self.sent.first(),
            reply: Some(ReplyPart { request, piece: 0, pieces: 1 }),
            ..self.header(scope)
        };
        Ok(Bytes::from(header.encode(&mut OpBuffer::default())?))
    }

    /// What makes an asker's state equal to the mirror, in as many pieces as it takes; at least one, which has the digests.
    fn repair(
        &self,
        scope: Scope,
        request: RequestId,
        theirs: &[OwnerBuckets],
    ) -> Result<Vec<Bytes>, EncodeFrameError> {
        let mut header = self.header(scope);
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
        let mut pieces = self.mirror.differences(&theirs, self.config.publish.frame_ops_bytes);
        if pieces.is_empty() {
            pieces.push(OpBuffer::default());
        }
        header.part = FramePart::Repair;
        header.seq = FrameSeq(self.next_frame.0 - 1);
        header.digests = self.mirror.digests();
        let count = pieces.len() as u32;
        (0..count)
            .zip(&mut pieces)
            .map(|(piece, ops)| {
                header.reply = Some(ReplyPart { request, piece, pieces: count });
                Ok(Bytes::from(header.encode(ops)?))
            })
            .collect()
    }

    pub(super) fn header(&self, scope: Scope) -> FrameHeader {
        FrameHeader {
            scope,
            source: self.id(),
            variant: self.mirror.variant(),
            epoch: self.epoch,
            seq: self.next_frame,
            part: FramePart::Live,
            health: self.health,
            engine_time_ns: 0,
            owners: self.mirror.owners(),
            digests: Vec::new(),
            reply: None,
        }
    }
}

fn push_frame(
    header: &mut FrameHeader,
    ops: &mut OpBuffer,
    frames: &mut Vec<Bytes>,
) -> Result<(), EncodeFrameError> {
    frames.push(Bytes::from(header.encode(ops)?));
    header.seq = header.seq.next();
    Ok(())
}
