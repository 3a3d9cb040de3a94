//! Requests to one source: bounded, answered one at a time, an answer in turns of a few frames.

use std::collections::VecDeque;

use bytes::Bytes;
use kvatlas_bus::BusMessage;
use kvatlas_proto::frame::MAX_FRAME_BYTES;
use kvatlas_proto::request::{Request, Want};
use kvatlas_proto::subject::{Subject, Subjects};
use kvatlas_proto::{Partition, SourceId};

/// Requests that wait while an answer is being sent, and one more for each further shard: one per server of a large deployment
/// that lost the same frames, or all shards of one server. A server whose request is dropped asks again.
const WAITING_REQUESTS: usize = 8;
/// Most bytes of them: that many of the largest.
const WAITING_BYTES: usize = WAITING_REQUESTS * MAX_FRAME_BYTES;
/// Frames of an answer that are sent before other work gets a turn: half a megabyte.
const TURN_FRAMES: usize = 8;

/// What was asked of a source and what became of it. Counters since the shim was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestCounts {
    /// Requests for frames that were missed.
    pub frames: u64,
    /// Requests for what differs.
    pub state: u64,
    /// Calls for a sign of life.
    pub hello: u64,
    /// Requests about another epoch; a heartbeat is what they get.
    pub other_epoch: u64,
    /// Requests and calls of those who cut the key space into another number of shards. Such a request has no answer.
    pub other_shards: u64,
    /// Requests dropped because they are not valid, or name no subject of this source for the answer.
    pub malformed: u64,
    /// Requests dropped because too many were waiting.
    pub overflow: u64,
    /// Frames sent in answers.
    pub answer_frames: u64,
    /// Bytes sent in answers.
    pub answer_bytes: u64,
}

/// A valid request and where its answer goes.
pub(super) struct Asked {
    pub(super) request: Request,
    pub(super) reply: String,
    /// Size of the message.
    bytes: usize,
}

/// The requests that wait, and the answer that is being sent.
pub(super) struct Desk {
    partition: Partition,
    waiting: VecDeque<Asked>,
    waiting_bytes: usize,
    sending: Option<(String, VecDeque<Bytes>)>,
    pub(super) counts: RequestCounts,
    /// Into how many shards somebody else cuts the key space, as far as it was ever seen.
    pub(super) other_shards: Option<u16>,
}

// === impl Desk ===

impl Desk {
    /// Nobody has asked yet.
    pub(super) fn new(partition: Partition) -> Self {
        Self {
            partition,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            sending: None,
            counts: RequestCounts::default(),
            other_shards: None,
        }
    }

    /// Takes a call to everybody. It may say into how many shards the caller cuts the key space.
    pub(super) fn take_hello(&mut self, payload: &[u8]) {
        self.counts.hello += 1;
        if let Some(shards) = payload.first_chunk() {
            self.compare_shards(u16::from_le_bytes(*shards));
        }
    }

    /// Whether somebody cuts the key space as we do.
    fn compare_shards(&mut self, theirs: u16) -> bool {
        let same = theirs == self.partition.shards();
        if !same {
            self.counts.other_shards += 1;
            self.other_shards = Some(theirs);
        }
        same
    }

    /// Takes a message from the control subject of `source`.
    pub(super) fn take(&mut self, message: BusMessage, subjects: &Subjects, source: &SourceId) {
        // Answers go where the source's answers go and nowhere else: else anybody could make it publish anywhere.
        let ours = |reply: &String| matches!(subjects.parse(reply), Ok(Subject::Reply { source: by, .. }) if by == *source);
        let (request, bytes) = (Request::parse(&message.payload), message.payload.len());
        let (Ok(request), Some(reply)) = (request, message.reply.filter(ours)) else {
            self.counts.malformed += 1;
            return;
        };
        if !self.compare_shards(request.shard.of()) {
            return;
        }
        match request.want {
            Want::Frames(_) => self.counts.frames += 1,
            Want::State(_) => self.counts.state += 1,
        }
        let most = WAITING_REQUESTS + usize::from(self.partition.shards()) - 1;
        if self.waiting.len() == most || self.waiting_bytes + bytes > WAITING_BYTES {
            self.counts.overflow += 1;
            return;
        }
        self.waiting_bytes += bytes;
        self.waiting.push_back(Asked { request, reply, bytes });
    }

    /// Whether somebody waits for something.
    pub(super) fn is_busy(&self) -> bool {
        self.sending.is_some() || !self.waiting.is_empty()
    }

    /// The request to answer now; none while an answer is being sent.
    pub(super) fn next_request(&mut self) -> Option<Asked> {
        if self.sending.is_some() {
            return None;
        }
        let asked = self.waiting.pop_front()?;
        self.waiting_bytes -= asked.bytes;
        Some(asked)
    }

    /// Begins to send an answer.
    pub(super) fn begin(&mut self, reply: String, frames: Vec<Bytes>) {
        if !frames.is_empty() {
            self.sending = Some((reply, frames.into()));
        }
    }

    /// The next few frames of the answer that is being sent, and where they go.
    pub(super) fn next_turn(&mut self) -> Option<(String, Vec<Bytes>)> {
        let (reply, frames) = self.sending.as_mut()?;
        let turn: Vec<Bytes> = frames.drain(..frames.len().min(TURN_FRAMES)).collect();
        let reply = reply.clone();
        if frames.is_empty() {
            self.sending = None;
        }
        self.counts.answer_frames += turn.len() as u64;
        self.counts.answer_bytes += turn.iter().map(|frame| frame.len() as u64).sum::<u64>();
        Some((reply, turn))
    }
}

#[cfg(test)]
mod tests {
    use kvatlas_proto::request::RequestId;
    use kvatlas_proto::subject::Asker;
    use kvatlas_proto::{DpRank, Epoch, FrameSeq, InstanceId, ShardId};

    use super::*;

    fn source() -> SourceId {
        SourceId { instance: InstanceId::new("a:1").unwrap(), rank: DpRank(0) }
    }

    fn message(reply: Option<String>) -> BusMessage {
        about(ShardId::WHOLE, reply)
    }

    fn about(shard: ShardId, reply: Option<String>) -> BusMessage {
        let want = Want::Frames(vec![(FrameSeq(1), FrameSeq(2))]);
        let payload = Request { id: RequestId(1), epoch: Epoch(1), shard, want }.encode().unwrap().into();
        BusMessage { subject: Subjects::default().control(&source()), reply, payload }
    }

    fn reply() -> String {
        Subjects::default().reply(&Asker::new("index-1").unwrap(), &source())
    }

    #[test]
    fn a_request_without_a_place_for_the_answer_is_refused() {
        let mut desk = Desk::new(Partition::WHOLE);
        let elsewhere = SourceId { rank: DpRank(1), ..source() };
        let foreign = Subjects::default().reply(&Asker::new("index-1").unwrap(), &elsewhere);
        let events = Subjects::default().all_events();
        for reply in [None, Some(foreign), Some(events), Some("inbox".to_owned())] {
            desk.take(message(reply), &Subjects::default(), &source());
        }
        desk.take(
            BusMessage { payload: Bytes::from_static(b"KVAQ"), ..message(Some(reply())) },
            &Subjects::default(),
            &source(),
        );
        assert_eq!((desk.counts.malformed, desk.is_busy()), (5, false));
    }

    #[test]
    fn requests_wait_up_to_the_bound_and_are_counted_beyond() {
        let mut desk = Desk::new(Partition::WHOLE);
        (0..WAITING_REQUESTS + 3)
            .for_each(|_| desk.take(message(Some(reply())), &Subjects::default(), &source()));
        assert_eq!((desk.counts.frames, desk.counts.overflow), (WAITING_REQUESTS as u64 + 3, 3));
    }

    #[test]
    fn all_shards_of_one_server_can_wait_at_once() {
        let partition = Partition::new(100).unwrap();
        let mut desk = Desk::new(partition);
        partition
            .all()
            .for_each(|shard| desk.take(about(shard, Some(reply())), &Subjects::default(), &source()));
        assert_eq!((desk.counts.frames, desk.counts.overflow), (100, 0));
    }

    #[test]
    fn waiting_requests_are_bounded_in_bytes_too() {
        let mut desk = Desk::new(Partition::WHOLE);
        let bytes = message(None).payload.len();
        desk.waiting_bytes = WAITING_BYTES - bytes;
        (0..2).for_each(|_| desk.take(message(Some(reply())), &Subjects::default(), &source()));
        assert_eq!((desk.waiting.len(), desk.counts.overflow), (1, 1));
        desk.next_request().unwrap();
        assert_eq!(desk.waiting_bytes, WAITING_BYTES - bytes);
    }

    #[test]
    fn who_cuts_the_key_space_otherwise_is_counted_and_gets_no_answer() {
        let mut desk = Desk::new(Partition::new(64).unwrap());
        desk.take(message(Some(reply())), &Subjects::default(), &source());
        assert_eq!((desk.counts.other_shards, desk.other_shards, desk.is_busy()), (1, Some(1), false));
        for payload in [&[][..], &64u16.to_le_bytes(), &[7]] {
            desk.take_hello(payload);
        }
        assert_eq!((desk.counts.hello, desk.counts.other_shards), (3, 1));
        desk.take_hello(&256u16.to_le_bytes());
        assert_eq!((desk.counts.hello, desk.counts.other_shards, desk.other_shards), (4, 2, Some(256)));
    }

    #[test]
    fn one_answer_is_sent_at_a_time_in_turns() {
        let mut desk = Desk::new(Partition::WHOLE);
        (0..2).for_each(|_| desk.take(message(Some(reply())), &Subjects::default(), &source()));
        let asked = desk.next_request().unwrap();
        let frames: Vec<Bytes> = (0..=TURN_FRAMES).map(|_| Bytes::from_static(b"1234")).collect();
        desk.begin(asked.reply, frames);
        assert!(desk.next_request().is_none());
        assert_eq!(desk.next_turn().unwrap().1.len(), TURN_FRAMES);
        assert_eq!(desk.next_turn().unwrap().1.len(), 1);
        assert!(desk.next_turn().is_none() && desk.is_busy());
        assert_eq!((desk.counts.answer_frames, desk.counts.answer_bytes), (9, 36));
        // An empty answer is none.
        let asked = desk.next_request().unwrap();
        desk.begin(asked.reply, Vec::new());
        assert!(!desk.is_busy());
    }
}
