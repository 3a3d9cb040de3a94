//! What an engine's replay socket answers: the last batches from a sequence number on, then an end marker.
//!
//! An engine keeps a fixed number of batches and does not say when its buffer starts later than asked. A batch that
//! could not be encoded has spent its sequence number and is in no buffer: the answer simply lacks it.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::kvrec::{END_OF_REPLAY, Header, RecordKind, Recording};

/// Batches that an engine keeps by default (vLLM's `buffer_steps`).
pub const DEFAULT_BUFFER_STEPS: usize = 10_000;

/// How replies are framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplayFraming {
    /// `["", sequence, payload]`: vLLM to 0.25, SGLang to 0.5.21.
    WithoutTopic,
    /// `["", topic, sequence, payload]`: later versions.
    WithTopic,
}

/// The replay buffer of one engine life. It never holds more than its number of steps up to the newest one, beside
/// batches that are foreseen.
#[derive(Clone, Debug)]
pub struct ReplayBuffer {
    topic: Bytes,
    framing: ReplayFraming,
    /// Batches kept.
    steps: u64,
    /// Sequence after the newest batch that the engine has published; nothing at or above it is answered.
    end: u64,
    batches: BTreeMap<u64, Bytes>,
}

// === impl ReplayFraming ===

impl ReplayFraming {
    /// How one stream of a recording is framed: as its replies are, else as the engine's version does it.
    pub fn of_stream(recording: &Recording, stream: u8) -> Self {
        let reply = recording
            .records
            .iter()
            .find(|record| record.stream == stream && record.kind == RecordKind::ReplayReply);
        match reply {
            Some(reply) if reply.frames.len() == 3 => Self::WithoutTopic,
            Some(_) => Self::WithTopic,
            None => Self::of_version(&recording.header),
        }
    }

    fn of_version(header: &Header) -> Self {
        let patch = header.engine_version.split('.').nth(2).and_then(|part| part.parse::<u32>().ok());
        let has_topic = match header.engine.as_str() {
            "sglang" => (header.version(), patch.unwrap_or(0)) >= ((0, 5), 22),
            _ => header.version() >= (0, 26),
        };
        if has_topic { Self::WithTopic } else { Self::WithoutTopic }
    }
}

// === impl ReplayBuffer ===

impl ReplayBuffer {
    /// An empty buffer that keeps `steps` batches.
    pub fn new(topic: Bytes, framing: ReplayFraming, steps: usize) -> Self {
        Self { topic, framing, steps: steps as u64, end: 0, batches: BTreeMap::new() }
    }

    /// A new engine life: nothing has been published.
    pub fn restart(&mut self) {
        self.end = 0;
        self.batches.clear();
    }

    /// A batch that the engine has published.
    pub fn push(&mut self, seq: u64, payload: Bytes) {
        self.batches.insert(seq, payload);
        self.advance_to(seq.saturating_add(1));
    }

    /// A batch that the engine will have published once it has come so far. It is not answered before.
    pub fn foresee(&mut self, seq: u64, payload: Bytes) {
        self.batches.insert(seq, payload);
    }

    /// The engine has published every sequence below `end`, whether or not the batches are known here.
    pub fn advance_to(&mut self, end: u64) {
        self.end = self.end.max(end);
        self.batches = self.batches.split_off(&self.start());
    }

    /// Batches that would be answered if all were asked for.
    pub fn len(&self) -> usize {
        self.batches.range(..self.end).count()
    }

    /// True if only the end marker would be answered.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The messages that answer "from `start` on", without the asker's identity, the end marker last.
    pub fn answer(&self, start: u64) -> Vec<Vec<Bytes>> {
        let batches = self.batches.range(start.min(self.end)..self.end);
        let mut messages: Vec<_> = batches.map(|(seq, payload)| self.frame(*seq, payload.clone())).collect();
        messages.push(self.frame(END_OF_REPLAY, Bytes::new()));
        messages
    }

    fn start(&self) -> u64 {
        self.end.saturating_sub(self.steps)
    }

    fn frame(&self, seq: u64, payload: Bytes) -> Vec<Bytes> {
        let seq_frame = Bytes::copy_from_slice(&seq.to_be_bytes());
        match self.framing {
            ReplayFraming::WithoutTopic => vec![Bytes::new(), seq_frame, payload],
            ReplayFraming::WithTopic => {
                // The end marker carries an empty topic.
                let topic = if seq == END_OF_REPLAY { Bytes::new() } else { self.topic.clone() };
                vec![Bytes::new(), topic, seq_frame, payload]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffer(steps: usize) -> ReplayBuffer {
        ReplayBuffer::new(Bytes::from_static(b"t"), ReplayFraming::WithTopic, steps)
    }

    fn seqs(buffer: &ReplayBuffer, start: u64) -> Vec<u64> {
        let answer = buffer.answer(start);
        answer.iter().map(|frames| u64::from_be_bytes(frames[2].as_ref().try_into().unwrap())).collect()
    }

    #[test]
    fn an_answer_starts_where_the_buffer_does_and_ends_with_the_marker() {
        let mut buffer = buffer(3);
        for seq in 0..10 {
            buffer.push(seq, Bytes::from_static(b"p"));
        }
        assert_eq!(buffer.len(), 3);
        assert_eq!(seqs(&buffer, 0), [7, 8, 9, END_OF_REPLAY]);
        assert_eq!(seqs(&buffer, 9), [9, END_OF_REPLAY]);
        assert_eq!(seqs(&buffer, 1_000), [END_OF_REPLAY]);
    }

    #[test]
    fn a_spent_sequence_is_simply_missing() {
        let mut buffer = buffer(10);
        buffer.push(0, Bytes::new());
        buffer.push(2, Bytes::new());
        assert_eq!(seqs(&buffer, 0), [0, 2, END_OF_REPLAY]);
    }

    #[test]
    fn foreseen_batches_are_answered_only_once_published() {
        let mut buffer = buffer(10);
        buffer.foresee(1, Bytes::new());
        buffer.push(0, Bytes::new());
        assert_eq!(seqs(&buffer, 0), [0, END_OF_REPLAY]);
        buffer.advance_to(2);
        assert_eq!(seqs(&buffer, 0), [0, 1, END_OF_REPLAY]);
        buffer.restart();
        assert!(buffer.is_empty());
    }

    #[test]
    fn both_framings_are_as_engines_write_them() {
        let marker = END_OF_REPLAY.to_be_bytes();
        let mut old = ReplayBuffer::new(Bytes::from_static(b"t"), ReplayFraming::WithoutTopic, 5);
        old.push(1, Bytes::from_static(b"p"));
        let seq = 1u64.to_be_bytes();
        assert_eq!(old.answer(0), [vec![&b""[..], &seq, b"p"], vec![&b""[..], &marker, b""]]);
        let mut new = buffer(5);
        new.push(1, Bytes::from_static(b"p"));
        assert_eq!(new.answer(0), [vec![&b""[..], b"t", &seq, b"p"], vec![&b""[..], b"", &marker, b""]]);
    }
}
