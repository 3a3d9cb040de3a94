//! Requests to one source: bounded, answered one at a time, an answer in turns of a few frames.

use std::collections::VecDeque;

use bytes::Bytes;
use kvatlas_bus::BusMessage;
use kvatlas_proto::SourceId;
use kvatlas_proto::request::{Request, Want};
use kvatlas_proto::subject::{Subject, Subjects};

/// Requests that wait while an answer is being sent: one per server of a large deployment that lost the same frames. A server
/// whose request is dropped asks again.
const WAITING_REQUESTS: usize = 8;
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
}

/// The requests that wait, and the answer that is being sent.
#[derive(Default)]
pub(super) struct Desk {
    waiting: VecDeque<Asked>,
    sending: Option<(String, VecDeque<Bytes>)>,
    pub(super) counts: RequestCounts,
}

// === impl Desk ===

impl Desk {
    /// Takes a message from the control subject of `source`.
    pub(super) fn take(&mut self, message: BusMessage, subjects: &Subjects, source: &SourceId) {
        // Answers go where the source's answers go and nowhere else: else anybody could make it publish anywhere.
        let ours = |reply: &String| matches!(subjects.parse(reply), Ok(Subject::Reply { source: by, .. }) if by == *source);
        let request = Request::parse(&message.payload);
        let (Ok(request), Some(reply)) = (request, message.reply.filter(ours)) else {
            self.counts.malformed += 1;
            return;
        };
        match request.want {
            Want::Frames(_) => self.counts.frames += 1,
            Want::State(_) => self.counts.state += 1,
        }
        if self.waiting.len() == WAITING_REQUESTS {
            self.counts.overflow += 1;
            return;
        }
        self.waiting.push_back(Asked { request, reply });
    }

    /// Whether somebody waits for something.
    pub(super) fn is_busy(&self) -> bool {
        self.sending.is_some() || !self.waiting.is_empty()
    }

    /// The request to answer now; none while an answer is being sent.
    pub(super) fn next_request(&mut self) -> Option<Asked> {
        if self.sending.is_some() { None } else { self.waiting.pop_front() }
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
    use kvatlas_proto::{DpRank, Epoch, FrameSeq, InstanceId};

    use super::*;

    fn source() -> SourceId {
        SourceId { instance: InstanceId::new("a:1").unwrap(), rank: DpRank(0) }
    }

    fn message(reply: Option<String>) -> BusMessage {
        let want = Want::Frames(vec![(FrameSeq(1), FrameSeq(2))]);
        let payload = Request { id: RequestId(1), epoch: Epoch(1), want }.encode().unwrap().into();
        BusMessage { subject: Subjects::default().control(&source()), reply, payload }
    }

    fn reply() -> String {
        Subjects::default().reply(&Asker::new("index-1").unwrap(), &source())
    }

    #[test]
    fn a_request_without_a_place_for_the_answer_is_refused() {
        let mut desk = Desk::default();
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
        let mut desk = Desk::default();
        (0..WAITING_REQUESTS + 3)
            .for_each(|_| desk.take(message(Some(reply())), &Subjects::default(), &source()));
        assert_eq!((desk.counts.frames, desk.counts.overflow), (WAITING_REQUESTS as u64 + 3, 3));
    }

    #[test]
    fn one_answer_is_sent_at_a_time_in_turns() {
        let mut desk = Desk::default();
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
