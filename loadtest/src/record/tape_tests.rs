//! What happened, told to a tape, reads back as the recording that it should be.

use super::*;
use crate::kvrec::{Marker, Recording, StreamHeader};

const UNLIMITED: RecordLimits = RecordLimits { messages: u64::MAX, bytes: u64::MAX };

fn tape(limits: RecordLimits) -> Tape {
    let header = Header {
        format: "KVREC01".into(),
        engine: "vllm".into(),
        engine_version: "unknown".into(),
        streams: vec![StreamHeader::default(), StreamHeader { stream: 1, ..StreamHeader::default() }],
        config: Value::Null,
        hash_encoding: None,
        other: serde_json::Map::new(),
    };
    Tape::new(&header, limits, None).unwrap()
}

fn message(connection: u64, dropped: u64, seq: u64) -> What {
    let frames =
        vec![Bytes::from_static(b"t"), Bytes::copy_from_slice(&seq.to_be_bytes()), Bytes::from_static(b"p")];
    What::Message { connection, dropped, frames }
}

fn connection(number: u64, up: bool) -> What {
    What::Connection(Connection { number, up })
}

fn replay(connection: u64, seqs: &[u64], answered: bool) -> What {
    let messages = seqs.iter().map(|seq| (*seq, Bytes::from_static(b"r"))).collect();
    What::Replay { connection, asked_ns: 1, replay: Replay { messages, answered } }
}

fn add(tape: &mut Tape, what: What) -> Result<(), Bound> {
    tape.add(Entry { stream: 0, time_ns: 7, what })
}

/// One word per record.
fn story(tape: &mut Tape) -> Vec<String> {
    let recording = Recording::parse(&Bytes::from(tape.take())).unwrap();
    let word = |record: &Record| match record.marker() {
        Some(Marker::SubscriberClosed { .. }) => "closed".to_owned(),
        Some(Marker::SubscriberOpen { .. }) => "open".to_owned(),
        Some(Marker::Other(remark)) => format!("dropped {}", remark["messages"]),
        Some(marker) => format!("{marker:?}"),
        None => match (record.kind, record.message()) {
            (RecordKind::Live, Some(message)) => format!("live {}", message.seq),
            (RecordKind::Live, None) => "malformed".to_owned(),
            (RecordKind::ReplayRequest, _) => "ask".to_owned(),
            (_, Some(message)) => format!("reply {}", message.seq),
            (_, None) => "end".to_owned(),
        },
    };
    recording.records.iter().map(word).collect()
}

#[test]
fn only_losses_and_returns_of_a_connection_are_remarked() {
    let mut tape = tape(UNLIMITED);
    for what in
        [connection(1, true), message(1, 0, 0), connection(1, false), connection(2, true), message(2, 0, 1)]
    {
        add(&mut tape, what).unwrap();
    }
    assert_eq!(story(&mut tape), ["live 0", "closed", "open", "live 1"]);
    assert_eq!(tape.connected(), 1);
}

#[test]
fn a_message_tells_of_its_connection_before_the_news_does_and_old_news_changes_nothing() {
    let mut tape = tape(UNLIMITED);
    for what in [
        message(1, 0, 0),
        connection(1, true),
        message(2, 0, 1),
        connection(1, false),
        connection(2, true),
        message(2, 0, 2),
    ] {
        add(&mut tape, what).unwrap();
    }
    assert_eq!(story(&mut tape), ["live 0", "closed", "open", "live 1", "live 2"]);
}

#[test]
fn a_connection_that_came_and_went_unheard_is_still_told() {
    let mut tape = tape(UNLIMITED);
    add(&mut tape, connection(1, false)).unwrap();
    add(&mut tape, connection(3, true)).unwrap();
    assert_eq!(story(&mut tape), ["closed", "open"]);
}

#[test]
fn dropped_messages_are_remarked_where_they_are_missing() {
    let mut tape = tape(UNLIMITED);
    for what in [message(1, 0, 0), message(1, 3, 4), message(1, 3, 5)] {
        add(&mut tape, what).unwrap();
    }
    tape.note_dropped(0, 7, 5).unwrap();
    tape.note_dropped(0, 7, 5).unwrap();
    assert_eq!(story(&mut tape), ["live 0", "dropped 3", "live 4", "live 5", "dropped 2"]);
}

#[test]
fn a_replay_is_a_request_its_messages_and_the_end_if_one_came() {
    let mut tape = tape(UNLIMITED);
    for what in [connection(1, true), replay(1, &[4, 5], true), replay(1, &[], false)] {
        add(&mut tape, what).unwrap();
    }
    assert_eq!(story(&mut tape), ["ask", "reply 4", "reply 5", "end", "ask"]);
    assert_eq!(tape.counts().replayed, 2);
}

#[test]
fn a_replay_that_a_reconnect_overtook_is_left_out() {
    let mut tape = tape(UNLIMITED);
    for what in [connection(1, true), message(2, 0, 0), replay(1, &[8], true)] {
        add(&mut tape, what).unwrap();
    }
    assert_eq!(story(&mut tape), ["closed", "open", "live 0"]);
}

#[test]
fn malformed_messages_are_recorded_and_only_those_without_room_are_refused() {
    let mut tape = tape(UNLIMITED);
    let of = |frames: usize| What::Message { connection: 1, dropped: 0, frames: vec![Bytes::new(); frames] };
    add(&mut tape, of(1)).unwrap();
    add(&mut tape, of(crate::kvrec::MAX_FRAMES + 1)).unwrap();
    assert_eq!(story(&mut tape), ["malformed"]);
    assert_eq!((tape.counts().messages, tape.counts().refused), (1, 1));
}

#[test]
fn the_last_message_within_the_limit_is_written() {
    let mut tape = tape(RecordLimits { messages: 2, ..UNLIMITED });
    assert_eq!(add(&mut tape, message(1, 0, 0)), Ok(()));
    assert_eq!(add(&mut tape, message(1, 0, 1)), Err(Bound::Messages));
    assert_eq!(story(&mut tape), ["live 0", "live 1"]);
}

#[test]
fn the_file_never_exceeds_its_limit_and_ends_with_a_whole_record() {
    let limit = tape(UNLIMITED).counts().bytes + 100;
    let mut tape = tape(RecordLimits { bytes: limit, ..UNLIMITED });
    let mut added = 0;
    while add(&mut tape, message(1, 0, added)).is_ok() {
        added += 1;
    }
    assert!(added > 0 && tape.counts().bytes <= limit && tape.pending_bytes() as u64 == tape.counts().bytes);
    assert_eq!(story(&mut tape).len() as u64, added);
}
