//! Finds the lives of a recorded engine: the stretches of records in which a sequence number names one batch.
//!
//! A life begins with the first record, after an exit, and where the live sequence goes back. A restart while the
//! subscriber was away need not show in the sequence: it is found by a later reply that has another batch under a
//! sequence that was live before. A life that began while the subscriber was away begins where it went away.

use std::collections::HashMap;

use bytes::Bytes;

use crate::kvrec::{Marker, Message, Record, RecordKind};

/// One life of a stream's engine.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Life {
    /// First record of the life.
    pub(super) first_record: usize,
    /// Batches of recorded replies, sequence and payload: they may be of any time in this life.
    pub(super) replies: Vec<(u64, Bytes)>,
}

/// What is known while reading one stream.
#[derive(Default)]
struct Reader<'a> {
    ended: Vec<Life>,
    life: Life,
    /// Live batches of this life.
    live: HashMap<u64, &'a Bytes>,
    last_live: Option<u64>,
    absence: Option<Absence>,
}

/// The last time in this life that the subscriber went away.
struct Absence {
    /// The record that says so.
    record: usize,
    /// Number of replies of this life before it.
    replies: usize,
    /// A live message has arrived since.
    is_over: bool,
}

/// The lives of a stream's engine, at least one.
pub(super) fn lives_of(records: &[Record], stream: u8) -> Vec<Life> {
    let mut reader = Reader::default();
    for (index, record) in records.iter().enumerate().filter(|(_, record)| record.stream == stream) {
        match (record.message(), record.marker()) {
            (Some(message), _) if record.kind == RecordKind::Live => reader.live(index, message),
            (Some(message), _) => reader.reply(message),
            (_, Some(Marker::SubscriberClosed { .. })) => {
                let replies = reader.life.replies.len();
                reader.absence = Some(Absence { record: index, replies, is_over: false });
            }
            (_, Some(Marker::EngineExit)) => reader.begin(index + 1),
            _ => {}
        }
    }
    reader.ended.push(reader.life);
    reader.ended
}

// === impl Reader ===

impl<'a> Reader<'a> {
    fn live(&mut self, index: usize, message: Message<'a>) {
        if self.last_live.is_some_and(|last| message.seq <= last) {
            let absent = self.absence.as_ref().filter(|absence| !absence.is_over);
            self.begin(absent.map_or(index, |absence| absence.record + 1));
        }
        if let Some(absence) = &mut self.absence {
            absence.is_over = true;
        }
        self.last_live = Some(message.seq);
        self.live.insert(message.seq, message.payload);
    }

    fn reply(&mut self, message: Message<'a>) {
        let differs = self.live.get(&message.seq).is_some_and(|payload| *payload != message.payload);
        if let (true, Some(absence)) = (differs, &self.absence) {
            // The live messages since then are of the new life; only the last one matters for what follows.
            let (record, last_live) = (absence.record, self.last_live);
            let replies = self.life.replies.split_off(absence.replies);
            self.begin(record + 1);
            self.life.replies = replies;
            self.last_live = last_live;
        }
        self.life.replies.push((message.seq, message.payload.clone()));
    }

    fn begin(&mut self, first_record: usize) {
        let life = Life { first_record, replies: Vec::new() };
        self.ended.push(std::mem::replace(&mut self.life, life));
        self.live.clear();
        self.last_live = None;
        self.absence = None;
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::kvrec::Recording;

    fn lives(name: &str) -> Vec<(usize, usize)> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fixtures/{name}.kvrec.zst"));
        let recording = Recording::read(&path).unwrap();
        lives_of(&recording.records, 0).iter().map(|life| (life.first_record, life.replies.len())).collect()
    }

    #[test]
    fn a_stream_without_restart_is_one_life_with_all_its_replies() {
        assert_eq!(lives("vllm0330_gap_replay"), [(0, 15 + 40 - 1)]);
        assert_eq!(lives("vllm0330_resets"), [(0, 0)]);
    }

    #[test]
    fn an_exit_begins_a_life() {
        let first_records: Vec<usize> = lives("vllm0330_restart").iter().map(|life| life.0).collect();
        assert_eq!(first_records, [0, 12, 18, 43]);
    }

    #[test]
    fn a_restart_that_no_sequence_shows_is_found_by_its_replay() {
        assert_eq!(lives("vllm0330_restart_hidden"), [(0, 0), (13, 19)]);
    }

    #[test]
    fn a_sequence_that_goes_back_begins_a_life() {
        let live = |seq: u64| Record {
            kind: RecordKind::Live,
            stream: 0,
            time_ns: 0,
            frames: vec![Bytes::new(), Bytes::copy_from_slice(&seq.to_be_bytes()), Bytes::new()],
        };
        let records: Vec<Record> = [0, 1, 2, 0, 1].into_iter().map(live).collect();
        let first_records: Vec<usize> = lives_of(&records, 0).iter().map(|life| life.first_record).collect();
        assert_eq!(first_records, [0, 3]);
    }
}
