//! Recordings of an engine's event stream (KVREC01): every ZMQ frame as it was received, in order.
//!
//! The byte layout is in `fixtures/README.md`. Reading checks every length against a named limit and the rest of the
//! file; a foreign or cut file is an error that names the file and the byte offset. Frames share one buffer, so a
//! recording is read without copying payloads.
//!
//! This file does not decode payloads: they are whatever an engine sent, malformed ones included.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::stored::{ReadFileError, read_file};

/// First bytes of every recording.
pub const MAGIC: [u8; 8] = *b"KVREC01\n";
/// Largest recording that is read, decompressed bytes. The largest of ours is 18 MB; the whole file is kept in memory.
pub const MAX_RECORDING_BYTES: u64 = 1 << 30;
/// Largest header, bytes. Ours are about 1 kB.
pub const MAX_HEADER_BYTES: usize = 1 << 20;
/// Most frames in one record. The engines' messages have three or four.
pub const MAX_FRAMES: usize = 16;
/// Largest frame, bytes. A step of an engine is some 16 kB; connectors list more.
pub const MAX_FRAME_BYTES: usize = 64 << 20;
/// Most streams in one recording (the record's stream index is one byte).
pub const MAX_STREAMS: usize = 256;
/// Sequence number of the message that ends a replay.
pub const END_OF_REPLAY: u64 = u64::MAX;

/// Bytes of a record before its frames: kind, stream, frame count, time.
const RECORD_HEAD_BYTES: usize = 12;

/// A recording in memory.
#[derive(Clone, Debug)]
pub struct Recording {
    /// What was recorded.
    pub header: Header,
    /// Everything that was received, in order of receipt.
    pub records: Vec<Record>,
}

/// What a recording says about itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// Format name, `KVREC01`.
    pub format: String,
    /// Engine: `vllm`, `sglang` or `synthetic`.
    pub engine: String,
    /// Version of the engine, for example `0.33.0`.
    pub engine_version: String,
    /// One entry per publisher, in the order of the records' stream index.
    pub streams: Vec<StreamHeader>,
    /// How the engine was configured, where it differs from the defaults in `fixtures/README.md`.
    #[serde(default)]
    pub config: Value,
    /// How the engine wrote block hashes. Absent where streams differ.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash_encoding: Option<HashEncoding>,
    /// Everything else, unchanged.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// One publisher of a recording.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StreamHeader {
    /// Index, equal to the position in [`Header::streams`].
    pub stream: u8,
    /// Data-parallel rank.
    #[serde(default)]
    pub dp_rank: u32,
    /// Topic of its messages.
    #[serde(default)]
    pub topic: String,
    /// Name of the engine process, where there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<String>,
    /// Everything else, unchanged.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// How an engine writes block hashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HashEncoding {
    /// Unsigned 64-bit integers.
    U64,
    /// Signed 64-bit integers.
    I64,
    /// Byte strings.
    Bytes,
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// What it is.
    pub kind: RecordKind,
    /// Which publisher; below the number of streams.
    pub stream: u8,
    /// Wall clock at receipt, nanoseconds since the Unix epoch.
    pub time_ns: u64,
    /// The ZMQ frames, unchanged.
    pub frames: Vec<Bytes>,
}

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RecordKind {
    /// A message of the event stream, as the subscriber got it.
    Live = 0,
    /// A replay request, as the recorder sent it.
    ReplayRequest = 1,
    /// A message that answers one, as the recorder got it.
    ReplayReply = 2,
    /// A remark of the recorder, one frame of JSON.
    Marker = 3,
}

/// The parts of a live message or a replay reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// Topic; replay replies of older engines carry none.
    pub topic: Option<&'a Bytes>,
    /// Sequence number of the batch.
    pub seq: u64,
    /// The batch, MessagePack.
    pub payload: &'a Bytes,
}

/// A remark of the recorder. It is for the test that plays the recording, not for the consumer under test; only
/// closed and open correspond to something a consumer sees (its connection).
#[derive(Clone, Debug, PartialEq)]
pub enum Marker {
    /// The truth file's checkpoint holds at this point.
    Checkpoint {
        /// Index in the truth file's `checkpoints`.
        index: usize,
        /// Last sequence number before it.
        after_seq: u64,
        /// What happened, for a person.
        note: String,
    },
    /// The subscriber went away.
    SubscriberClosed {
        /// Batches the engine had published in its life, if the recorder knew.
        published: Option<u64>,
    },
    /// The subscriber came back.
    SubscriberOpen {
        /// Batches the engine had published in its life, if the recorder knew.
        published: Option<u64>,
    },
    /// The engine process ended.
    EngineExit,
    /// Anything else.
    Other(Value),
}

/// Writes a recording, uncompressed.
#[derive(Debug)]
pub struct Writer<W: Write> {
    out: W,
    streams: usize,
}

/// Why a recording could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadRecordingError {
    /// The file could not be read at all.
    #[error(transparent)]
    File(#[from] ReadFileError),
    /// The file is not a recording, or is damaged.
    #[error("{path} at byte {offset}: {problem}", path = path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Where in the (decompressed) file.
        offset: usize,
        /// What is wrong there.
        problem: RecordingProblem,
    },
}

/// What is wrong at one place of a recording.
#[derive(Debug, thiserror::Error)]
pub enum RecordingProblem {
    /// The magic is missing.
    #[error("this is not a KVREC01 recording; name a .kvrec file")]
    Foreign,
    /// The file ends too early.
    #[error("the file ends within {what} ({needed} bytes needed, {left} left); fetch or record it again")]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// Bytes it needs.
        needed: usize,
        /// Bytes left in the file.
        left: usize,
    },
    /// A length or count is over its limit.
    #[error("{what} of {value} is over the limit of {max}; the file is damaged or not a recording")]
    OverLimit {
        /// What has that size.
        what: &'static str,
        /// Its size.
        value: usize,
        /// The limit.
        max: usize,
    },
    /// The header is not the JSON it must be.
    #[error("the header is not usable: {0}")]
    Header(serde_json::Error),
    /// A record has an unknown kind.
    #[error("record kind {0} is unknown (0 to 3 are defined); the file is damaged or of a newer version")]
    UnknownKind(u8),
    /// A record names a stream that the header does not.
    #[error("stream {stream} is not in the header, which has {streams}; the file is damaged")]
    UnknownStream {
        /// The record's stream index.
        stream: u8,
        /// Number of streams in the header.
        streams: usize,
    },
    /// A marker is not one frame of JSON.
    #[error("a marker is not one frame of JSON; the file is damaged")]
    BadMarker,
}

/// Why a record or header could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteRecordingError {
    /// The output failed.
    #[error("cannot write the recording: {0}; check the disk")]
    Io(#[from] io::Error),
    /// The header cannot be expressed as JSON.
    #[error("cannot write the recording's header: {0}")]
    Header(#[from] serde_json::Error),
    /// A reader would refuse it.
    #[error(
        "{what} of {value} is over the limit of {max}; readers would refuse the recording, so it is not written"
    )]
    OverLimit {
        /// What has that size.
        what: &'static str,
        /// Its size.
        value: usize,
        /// The limit.
        max: usize,
    },
}

/// Reads from a buffer and knows where it is.
struct Cursor<'a> {
    data: &'a Bytes,
    offset: usize,
}

// === impl Recording ===

impl Recording {
    /// Reads a recording: plain, gzip or zstd.
    pub fn read(path: &Path) -> Result<Self, ReadRecordingError> {
        let data = Bytes::from(read_file(path, MAX_RECORDING_BYTES)?);
        Self::parse(&data).map_err(|(offset, problem)| ReadRecordingError::Format {
            path: path.to_owned(),
            offset,
            problem,
        })
    }

    /// Reads a recording from memory. Frames share `data`. An error says at which byte.
    pub fn parse(data: &Bytes) -> Result<Self, (usize, RecordingProblem)> {
        if !data.starts_with(&MAGIC) {
            return Err((0, RecordingProblem::Foreign));
        }
        let mut cursor = Cursor { data, offset: MAGIC.len() };
        let header_bytes = cursor.u32("the header's length")? as usize;
        cursor.within("header length", header_bytes, MAX_HEADER_BYTES)?;
        let at = cursor.offset;
        let header: Header = serde_json::from_slice(&cursor.take("the header", header_bytes)?)
            .map_err(|error| (at, RecordingProblem::Header(error)))?;
        cursor.within("number of streams", header.streams.len(), MAX_STREAMS)?;

        let mut records = Vec::new();
        while cursor.offset < data.len() {
            records.push(cursor.record(header.streams.len())?);
        }
        Ok(Self { header, records })
    }
}

// === impl Header ===

impl Header {
    /// The engine's major and minor version; zeros where it does not say.
    pub fn version(&self) -> (u32, u32) {
        let mut parts = self.engine_version.split('.').map(|part| part.parse().unwrap_or(0));
        (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
    }
}

// === impl Record ===

impl Record {
    /// Topic, sequence and payload of a live message or a replay reply. `None` for other kinds, for the end of a
    /// replay, and for a message that does not have the shape `[..., 8-byte sequence, payload]`.
    pub fn message(&self) -> Option<Message<'_>> {
        let (topic, seq, payload) = match (self.kind, self.frames.as_slice()) {
            (RecordKind::Live, [topic, seq, payload])
            | (RecordKind::ReplayReply, [_, topic, seq, payload]) => (Some(topic), seq, payload),
            (RecordKind::ReplayReply, [_, seq, payload]) => (None, seq, payload),
            _ => return None,
        };
        let seq = u64::from_be_bytes(seq.as_ref().try_into().ok()?);
        (seq != END_OF_REPLAY).then_some(Message { topic, seq, payload })
    }

    /// The remark that a marker record holds; `None` for other kinds.
    pub fn marker(&self) -> Option<Marker> {
        match (self.kind, self.frames.as_slice()) {
            (RecordKind::Marker, [json]) => Some(Marker::from_json(serde_json::from_slice(json).ok()?)),
            _ => None,
        }
    }
}

// === impl RecordKind ===

impl RecordKind {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Live, Self::ReplayRequest, Self::ReplayReply, Self::Marker].get(usize::from(byte)).copied()
    }
}

// === impl Marker ===

impl Marker {
    fn from_json(json: Value) -> Self {
        let published = || json["n_pub"].as_u64();
        if let (Some(index), Some(after_seq)) = (json["checkpoint"].as_u64(), json["after_seq"].as_u64()) {
            let note = json["note"].as_str().unwrap_or_default().to_owned();
            return Self::Checkpoint { index: index as usize, after_seq, note };
        }
        match (json["subscriber"].as_str(), json["engine"].as_str()) {
            (Some("closed"), _) => Self::SubscriberClosed { published: published() },
            (Some("open"), _) => Self::SubscriberOpen { published: published() },
            (_, Some("exit")) => Self::EngineExit,
            _ => Self::Other(json),
        }
    }
}

// === impl Writer ===

impl<W: Write> Writer<W> {
    /// Writes the magic and the header. Wrap a file in a `BufWriter`: every record is several small writes.
    pub fn new(mut out: W, header: &Header) -> Result<Self, WriteRecordingError> {
        let json = serde_json::to_vec(header)?;
        check("header length", json.len(), MAX_HEADER_BYTES)?;
        check("number of streams", header.streams.len(), MAX_STREAMS)?;
        out.write_all(&MAGIC)?;
        out.write_all(&(json.len() as u32).to_le_bytes())?;
        out.write_all(&json)?;
        Ok(Self { out, streams: header.streams.len() })
    }

    /// Appends a record. A record that a reader would refuse is not written.
    pub fn write(&mut self, record: &Record) -> Result<(), WriteRecordingError> {
        check("stream index", usize::from(record.stream) + 1, self.streams)?;
        check("number of frames", record.frames.len(), MAX_FRAMES)?;
        for frame in &record.frames {
            check("frame length", frame.len(), MAX_FRAME_BYTES)?;
        }
        self.out.write_all(&[record.kind as u8, record.stream])?;
        self.out.write_all(&(record.frames.len() as u16).to_le_bytes())?;
        self.out.write_all(&record.time_ns.to_le_bytes())?;
        for frame in &record.frames {
            self.out.write_all(&(frame.len() as u32).to_le_bytes())?;
            self.out.write_all(frame)?;
        }
        Ok(())
    }

    /// Flushes and hands back the output.
    pub fn finish(mut self) -> Result<W, WriteRecordingError> {
        self.out.flush()?;
        Ok(self.out)
    }
}

fn check(what: &'static str, value: usize, max: usize) -> Result<(), WriteRecordingError> {
    if value > max { Err(WriteRecordingError::OverLimit { what, value, max }) } else { Ok(()) }
}

// === impl Cursor ===

impl Cursor<'_> {
    fn take(&mut self, what: &'static str, needed: usize) -> Result<Bytes, (usize, RecordingProblem)> {
        let left = self.data.len() - self.offset;
        if needed > left {
            return Err((self.offset, RecordingProblem::Truncated { what, needed, left }));
        }
        let bytes = self.data.slice(self.offset..self.offset + needed);
        self.offset += needed;
        Ok(bytes)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, (usize, RecordingProblem)> {
        let bytes = self.take(what, 4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn within(&self, what: &'static str, value: usize, max: usize) -> Result<(), (usize, RecordingProblem)> {
        if value > max {
            return Err((self.offset, RecordingProblem::OverLimit { what, value, max }));
        }
        Ok(())
    }

    fn record(&mut self, streams: usize) -> Result<Record, (usize, RecordingProblem)> {
        let start = self.offset;
        let head = self.take("a record's head", RECORD_HEAD_BYTES)?;
        let kind = RecordKind::from_byte(head[0]).ok_or((start, RecordingProblem::UnknownKind(head[0])))?;
        let stream = head[1];
        if usize::from(stream) >= streams {
            return Err((start, RecordingProblem::UnknownStream { stream, streams }));
        }
        let count = usize::from(u16::from_le_bytes([head[2], head[3]]));
        self.within("number of frames", count, MAX_FRAMES)?;
        let mut time = [0; 8];
        time.copy_from_slice(&head[4..]);

        let mut frames = Vec::with_capacity(count);
        for _ in 0..count {
            let length = self.u32("a frame's length")? as usize;
            self.within("frame length", length, MAX_FRAME_BYTES)?;
            frames.push(self.take("a frame", length)?);
        }
        let record = Record { kind, stream, time_ns: u64::from_le_bytes(time), frames };
        if kind == RecordKind::Marker && record.marker().is_none() {
            return Err((start, RecordingProblem::BadMarker));
        }
        Ok(record)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn header(streams: u8) -> Header {
        Header {
            format: "KVREC01".into(),
            engine: "vllm".into(),
            engine_version: "0.33.0".into(),
            streams: (0..streams)
                .map(|stream| StreamHeader { stream, topic: "t".into(), ..Default::default() })
                .collect(),
            config: json!({"num_blocks": 65}),
            hash_encoding: Some(HashEncoding::U64),
            other: Map::from_iter([("seed".to_owned(), json!(7))]),
        }
    }

    fn encode(header: &Header, records: &[Record]) -> Bytes {
        let mut writer = Writer::new(Vec::new(), header).unwrap();
        for record in records {
            writer.write(record).unwrap();
        }
        writer.finish().unwrap().into()
    }

    fn live(frames: &[&'static [u8]]) -> Record {
        let frames = frames.iter().map(|frame| Bytes::from_static(frame)).collect();
        Record { kind: RecordKind::Live, stream: 0, time_ns: 1, frames }
    }

    fn marker(json: &Value) -> Record {
        let frames = vec![Bytes::from(json.to_string())];
        Record { kind: RecordKind::Marker, stream: 0, time_ns: 1, frames }
    }

    #[test]
    fn sequence_and_payload_are_read_from_the_back_in_both_replay_framings() {
        let seq = 7u64.to_be_bytes().to_vec();
        let reply = |frames: Vec<Vec<u8>>| Record {
            kind: RecordKind::ReplayReply,
            stream: 0,
            time_ns: 0,
            frames: frames.into_iter().map(Bytes::from).collect(),
        };
        let two_part = reply(vec![vec![], seq.clone(), b"p".to_vec()]);
        let three_part = reply(vec![vec![], b"topic".to_vec(), seq, b"p".to_vec()]);
        assert_eq!(two_part.message().map(|m| (m.topic.is_some(), m.seq)), Some((false, 7)));
        assert_eq!(three_part.message().map(|m| (m.topic.is_some(), m.seq)), Some((true, 7)));
        let end = reply(vec![vec![], vec![0xff; 8], vec![]]);
        assert_eq!(end.message(), None);
    }

    #[test]
    fn malformed_live_messages_are_kept_but_have_no_parts() {
        let data = encode(&header(1), &[live(&[b"only"]), live(&[b"", b"short", b""])]);
        let recording = Recording::parse(&data).unwrap();
        assert_eq!(recording.records.len(), 2);
        assert!(recording.records.iter().all(|record| record.message().is_none()));
    }

    #[test]
    fn markers_are_typed_and_unknown_ones_are_kept() {
        let of = |json: Value| marker(&json).marker().unwrap();
        assert_eq!(
            of(json!({"checkpoint": 2, "after_seq": 9, "note": "n"})),
            Marker::Checkpoint { index: 2, after_seq: 9, note: "n".into() }
        );
        assert_eq!(
            of(json!({"subscriber": "closed", "n_pub": 3})),
            Marker::SubscriberClosed { published: Some(3) }
        );
        assert_eq!(of(json!({"subscriber": "open"})), Marker::SubscriberOpen { published: None });
        assert_eq!(of(json!({"engine": "exit", "life": 0})), Marker::EngineExit);
        assert!(matches!(of(json!({"reset_prefix_cache": true})), Marker::Other(_)));
    }

    #[test]
    fn a_foreign_file_is_named_with_its_offset() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("other.kvrec");
        std::fs::write(&path, b"something else").unwrap();
        let error = Recording::read(&path).unwrap_err().to_string();
        assert!(error.contains("other.kvrec") && error.contains("byte 0"), "{error}");
    }

    #[test]
    fn a_file_cut_anywhere_inside_a_record_is_an_error_that_says_where() {
        let records = [live(&[b"t", b"12345678", b"payload"]), marker(&json!({"engine": "exit"}))];
        let data = encode(&header(1), &records);
        let starts = [encode(&header(1), &[]).len(), encode(&header(1), &records[..1]).len()];
        for cut in 0..data.len() {
            let result = Recording::parse(&data.slice(..cut));
            assert_eq!(result.is_ok(), starts.contains(&cut), "cut at {cut}");
            if let Err((offset, _)) = result {
                assert!(offset <= cut);
            }
        }
    }

    #[test]
    fn lengths_over_their_limits_are_refused_before_anything_is_allocated() {
        let start = encode(&header(1), &[]);
        let with = |tail: &[u8]| {
            let data = Bytes::from([&start, tail].concat());
            Recording::parse(&data).unwrap_err().1
        };
        let head = |kind: u8, stream: u8, frames: u16| {
            [&[kind, stream][..], &frames.to_le_bytes(), &[0; 8]].concat()
        };
        assert!(matches!(with(&head(9, 0, 0)), RecordingProblem::UnknownKind(9)));
        assert!(matches!(with(&head(0, 1, 0)), RecordingProblem::UnknownStream { stream: 1, streams: 1 }));
        assert!(matches!(with(&head(0, 0, 999)), RecordingProblem::OverLimit { value: 999, .. }));
        let huge = [head(0, 0, 1), u32::MAX.to_le_bytes().to_vec()].concat();
        assert!(matches!(with(&huge), RecordingProblem::OverLimit { .. }));
        assert!(matches!(with(&head(3, 0, 0)), RecordingProblem::BadMarker));

        let mut long_header = MAGIC.to_vec();
        long_header.extend_from_slice(&u32::MAX.to_le_bytes());
        let problem = Recording::parse(&long_header.into()).unwrap_err().1;
        assert!(matches!(problem, RecordingProblem::OverLimit { .. }));
    }

    #[test]
    fn a_writer_refuses_what_a_reader_would_refuse() {
        let mut writer = Writer::new(Vec::new(), &header(1)).unwrap();
        let mut record = live(&[b"t"]);
        record.stream = 1;
        assert!(matches!(writer.write(&record), Err(WriteRecordingError::OverLimit { .. })));
        record.stream = 0;
        record.frames = vec![Bytes::new(); MAX_FRAMES + 1];
        assert!(matches!(writer.write(&record), Err(WriteRecordingError::OverLimit { .. })));
    }

    proptest! {
        #[test]
        fn recordings_round_trip(
            script in proptest::collection::vec(
                (0u8..3, 0u8..3, any::<u64>(), proptest::collection::vec(
                    proptest::collection::vec(any::<u8>(), 0..20), 0..5)),
                0..20),
        ) {
            let records: Vec<Record> = script
                .into_iter()
                .map(|(kind, stream, time_ns, frames)| Record {
                    kind: RecordKind::from_byte(kind).unwrap(),
                    stream,
                    time_ns,
                    frames: frames.into_iter().map(Bytes::from).collect(),
                })
                .collect();
            let recording = Recording::parse(&encode(&header(3), &records)).unwrap();
            prop_assert_eq!(recording.header, header(3));
            prop_assert_eq!(recording.records, records);
        }

        #[test]
        fn any_bytes_after_a_correct_start_are_read_or_refused_without_panic(
            tail in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let data = Bytes::from([encode(&header(2), &[]).to_vec(), tail].concat());
            let _ = Recording::parse(&data);
        }
    }
}
