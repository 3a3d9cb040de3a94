//! Turns what the sockets of a recording said into its bytes: order, remarks, bounds, redaction.
//!
//! Pure: times are arguments, and bytes are handed out in whole records. [`super`] has the sockets and the file.

use std::io::{self, Write};
use std::sync::Arc;

use bytes::Bytes;
use kvatlas_shim::zmq::{Connection, Replay};
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::kvrec::{END_OF_REPLAY, Header, Record, RecordKind, WriteRecordingError, Writer};
use crate::redact::Redactor;

/// Where a recording ends by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordLimits {
    /// Live and replayed messages.
    pub messages: u64,
    /// Bytes of the file.
    pub bytes: u64,
}

/// A limit that was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bound {
    Messages,
    Bytes,
}

/// Something that one stream's sockets said.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) stream: u8,
    /// Wall clock, nanoseconds since the Unix epoch.
    pub(super) time_ns: u64,
    pub(super) what: What,
}

#[derive(Debug)]
pub(super) enum What {
    Message {
        /// Number of the connection it came over.
        connection: u64,
        /// Messages of the stream that were dropped before it, since the start.
        dropped: u64,
        frames: Vec<Bytes>,
    },
    /// The event connection changed.
    Connection(Connection),
    Replay {
        /// Number of the connection that was the reason to ask.
        connection: u64,
        asked_ns: u64,
        replay: Replay,
    },
}

/// What was written. Counters since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct TapeCounts {
    /// Live messages.
    pub(super) messages: u64,
    /// Messages of replays.
    pub(super) replayed: u64,
    /// Messages that the format has no room for.
    pub(super) refused: u64,
    /// Bytes of the whole file.
    pub(super) bytes: u64,
}

/// A recording in the making.
pub(super) struct Tape {
    writer: Writer<Pending>,
    pending: Pending,
    limits: RecordLimits,
    redactor: Option<Redactor>,
    streams: Vec<StreamState>,
    counts: TapeCounts,
}

#[derive(Clone, Copy, Default)]
struct StreamState {
    /// The connection as the records so far tell it.
    connection: Connection,
    /// Dropped messages as the records so far tell it.
    dropped: u64,
}

/// Bytes of whole records on their way to the file; the writer fills it, the tape empties it.
#[derive(Clone, Default)]
struct Pending(Arc<Mutex<Vec<u8>>>);

// === impl Pending ===

impl Write for Pending {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

// === impl Tape ===

impl Tape {
    /// Begins with the header.
    pub(super) fn new(
        header: &Header,
        limits: RecordLimits,
        redactor: Option<Redactor>,
    ) -> Result<Self, WriteRecordingError> {
        let pending = Pending::default();
        let writer = Writer::new(pending.clone(), header)?;
        let counts = TapeCounts { bytes: pending.0.lock().len() as u64, ..TapeCounts::default() };
        let streams = vec![StreamState::default(); header.streams.len()];
        Ok(Self { writer, pending, limits, redactor, streams, counts })
    }

    /// What was written.
    pub(super) fn counts(&self) -> TapeCounts {
        self.counts
    }

    /// Payloads and messages that redaction had to blank.
    pub(super) fn blanked(&self) -> u64 {
        let counts = self.redactor.as_ref().map(Redactor::counts).unwrap_or_default();
        counts.unreadable_payloads + counts.malformed_messages
    }

    /// Streams that were ever connected.
    pub(super) fn connected(&self) -> usize {
        self.streams.iter().filter(|stream| stream.connection.number > 0).count()
    }

    /// Bytes that wait to be taken.
    pub(super) fn pending_bytes(&self) -> usize {
        self.pending.0.lock().len()
    }

    /// Takes the bytes so far: whole records, so that a file that ends here is a recording.
    pub(super) fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut *self.pending.0.lock())
    }

    /// Writes what happened. At a limit nothing more may be added.
    pub(super) fn add(&mut self, entry: Entry) -> Result<(), Bound> {
        let Entry { stream, time_ns, what } = entry;
        match what {
            What::Connection(connection) => self.note_connection(stream, time_ns, connection),
            What::Message { connection, dropped, frames } => {
                self.note_connection(stream, time_ns, Connection { number: connection, up: true })?;
                self.note_dropped(stream, time_ns, dropped)?;
                self.live(stream, time_ns, frames)
            }
            What::Replay { connection, asked_ns, replay } => {
                // Another connection may be another life of the engine, to which this reply does not belong.
                if self.streams[usize::from(stream)].connection.number != connection {
                    return Ok(());
                }
                self.replay(stream, asked_ns, time_ns, replay)
            }
        }
    }

    /// Says what was dropped after the last message of a stream.
    pub(super) fn note_dropped(&mut self, stream: u8, time_ns: u64, dropped: u64) -> Result<(), Bound> {
        let said = &mut self.streams[usize::from(stream)].dropped;
        let new = dropped.saturating_sub(*said);
        if new == 0 {
            return Ok(());
        }
        *said = dropped;
        self.mark(stream, time_ns, &json!({ "recorder": "dropped", "messages": new }))
    }

    /// A message may arrive before the news of its connection, and that news late or not at all: numbers tell.
    fn note_connection(&mut self, stream: u8, time_ns: u64, now: Connection) -> Result<(), Bound> {
        let state = &mut self.streams[usize::from(stream)];
        let before = state.connection;
        let is_new = now.number > before.number;
        // Old news; or up again under the number that went down, which cannot be.
        if !is_new && (now.number < before.number || now.up || !before.up) {
            return Ok(());
        }
        state.connection = now;
        if before.up {
            self.mark(stream, time_ns, &json!({ "subscriber": "closed" }))?;
        }
        // The first connection is the beginning, not a return.
        if is_new && before.number > 0 {
            self.mark(stream, time_ns, &json!({ "subscriber": "open" }))?;
        }
        if is_new && !now.up {
            self.mark(stream, time_ns, &json!({ "subscriber": "closed" }))?;
        }
        Ok(())
    }

    fn live(&mut self, stream: u8, time_ns: u64, frames: Vec<Bytes>) -> Result<(), Bound> {
        let frames = match &mut self.redactor {
            Some(redactor) => redactor.live(&frames),
            None => frames,
        };
        if self.write(&Record { kind: RecordKind::Live, stream, time_ns, frames })? {
            self.counts.messages += 1;
        }
        self.check_messages()
    }

    /// The reader of replies keeps sequence and payload, so the frames around them are those of the older engines,
    /// which every consumer must understand.
    fn replay(&mut self, stream: u8, asked_ns: u64, time_ns: u64, replay: Replay) -> Result<(), Bound> {
        let from = Bytes::copy_from_slice(&0u64.to_be_bytes());
        let frames = vec![Bytes::new(), from];
        self.write(&Record { kind: RecordKind::ReplayRequest, stream, time_ns: asked_ns, frames })?;
        let reply = |seq: u64, payload: Bytes| Record {
            kind: RecordKind::ReplayReply,
            stream,
            time_ns,
            frames: vec![Bytes::new(), Bytes::copy_from_slice(&seq.to_be_bytes()), payload],
        };
        for (seq, payload) in replay.messages {
            let payload = match &mut self.redactor {
                Some(redactor) => redactor.payload(&payload),
                None => payload,
            };
            if self.write(&reply(seq, payload))? {
                self.counts.replayed += 1;
            }
            self.check_messages()?;
        }
        if replay.answered {
            self.write(&reply(END_OF_REPLAY, Bytes::new()))?;
        }
        Ok(())
    }

    fn check_messages(&self) -> Result<(), Bound> {
        let messages = self.counts.messages + self.counts.replayed;
        if messages >= self.limits.messages { Err(Bound::Messages) } else { Ok(()) }
    }

    fn mark(&mut self, stream: u8, time_ns: u64, remark: &Value) -> Result<(), Bound> {
        let frames = vec![Bytes::from(remark.to_string())];
        self.write(&Record { kind: RecordKind::Marker, stream, time_ns, frames })?;
        Ok(())
    }

    /// Returns whether the record was written; one that no reader would accept is counted instead.
    fn write(&mut self, record: &Record) -> Result<bool, Bound> {
        let before = self.pending_bytes();
        if self.writer.write(record).is_err() {
            self.pending.0.lock().truncate(before);
            self.counts.refused += 1;
            return Ok(false);
        }
        let bytes = self.counts.bytes + (self.pending_bytes() - before) as u64;
        if bytes > self.limits.bytes {
            self.pending.0.lock().truncate(before);
            return Err(Bound::Bytes);
        }
        self.counts.bytes = bytes;
        Ok(true)
    }
}

#[cfg(test)]
#[path = "tape_tests.rs"]
mod tests;
