//! A plain ZeroMQ client sees what the recorder saw.

use std::path::Path;

use zeromq::{DealerSocket, Socket, SocketRecv, SocketSend, SubSocket, ZmqMessage};

use super::*;
use crate::kvrec::END_OF_REPLAY;

/// Long enough for a busy machine; no test expects it to pass.
const WAIT: Duration = Duration::from_secs(20);

fn recording(name: &str) -> Recording {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fixtures/{name}.kvrec.zst"));
    Recording::read(&path).unwrap()
}

fn live_frames(recording: &Recording, stream: u8) -> Vec<Vec<Bytes>> {
    let records = recording.records.iter();
    let live = records.filter(|record| record.kind == RecordKind::Live && record.stream == stream);
    live.map(|record| record.frames.clone()).collect()
}

async fn subscribe(player: &Player, stream: u8) -> SubSocket {
    let mut socket = SubSocket::new();
    socket.connect(&player.endpoints()[usize::from(stream)].events).await.unwrap();
    socket.subscribe("").await.unwrap();
    player.wait_for_subscribers(stream, 1, WAIT).await.unwrap();
    socket
}

async fn receive(socket: &mut SubSocket) -> Vec<Bytes> {
    tokio::time::timeout(WAIT, socket.recv()).await.unwrap().unwrap().into_vec()
}

async fn replay(player: &Player, start: u64) -> Vec<Vec<Bytes>> {
    let mut socket = DealerSocket::new();
    socket.connect(&player.endpoints()[0].replay).await.unwrap();
    let mut request = ZmqMessage::from(Bytes::new());
    request.push_back(Bytes::copy_from_slice(&start.to_be_bytes()));
    socket.send(request).await.unwrap();
    let mut messages = Vec::new();
    loop {
        let message = tokio::time::timeout(WAIT, socket.recv()).await.unwrap().unwrap().into_vec();
        let is_end = message[message.len() - 2] == END_OF_REPLAY.to_be_bytes()[..];
        messages.push(message);
        if is_end {
            return messages;
        }
    }
}

fn seqs(messages: &[Vec<Bytes>]) -> Vec<u64> {
    let seq = |frames: &Vec<Bytes>| u64::from_be_bytes(frames[frames.len() - 2].as_ref().try_into().unwrap());
    messages[..messages.len() - 1].iter().map(seq).collect()
}

/// Plays up to the `count`-th marker from here and returns it.
async fn markers(player: &mut Player, count: usize) -> Marker {
    let mut last = None;
    for _ in 0..count {
        last = player.play_until_marker().await.unwrap();
    }
    last.unwrap().1
}

/// Frames of the replies that the recorder got for its `request`-th request.
fn recorded_replies(recording: &Recording, request: usize) -> Vec<Vec<Bytes>> {
    let mut requests = 0;
    let mut replies = Vec::new();
    for record in &recording.records {
        requests += usize::from(record.kind == RecordKind::ReplayRequest);
        if record.kind == RecordKind::ReplayReply && requests == request + 1 {
            replies.push(record.frames.clone());
        }
    }
    replies
}

#[tokio::test]
async fn every_live_message_of_every_stream_arrives_unchanged() {
    for name in ["vllm0330_fleet4", "synthetic_wire_formats"] {
        let recording = recording(name);
        let streams: Vec<u8> = (0..recording.header.streams.len() as u8).collect();
        let expected: Vec<_> = streams.iter().map(|stream| live_frames(&recording, *stream)).collect();
        let mut player = Player::bind(recording).await.unwrap();
        let mut readers = Vec::new();
        for (stream, frames) in streams.iter().zip(expected) {
            let mut socket = subscribe(&player, *stream).await;
            readers.push(tokio::spawn(async move {
                for expected in frames {
                    assert_eq!(receive(&mut socket).await, expected);
                }
            }));
        }
        while player.play_until_marker().await.unwrap().is_some() {}
        for reader in readers {
            reader.await.unwrap();
        }
        assert_eq!(player.unsent(), 0);
        player.close().await;
    }
}

#[tokio::test]
async fn markers_stop_the_player_in_the_order_of_the_recording() {
    let recording = recording("vllm0330_restart");
    let expected: Vec<Marker> = recording.records.iter().filter_map(Record::marker).collect();
    let mut player = Player::bind(recording).await.unwrap();
    let mut played = Vec::new();
    while let Some((0, marker)) = player.play_until_marker().await.unwrap() {
        played.push(marker);
    }
    assert_eq!(played, expected);
    assert_eq!(player.play_next().await.unwrap(), None);
    player.close().await;
}

#[tokio::test]
async fn replays_are_answered_as_the_engine_did_in_both_framings() {
    for name in ["vllm0330_gap_replay", "vllm0280_gap_replay", "vllm0221_gap_replay", "vllm0112_gap_replay"] {
        let recording = recording(name);
        let start = |request: usize| {
            let mut requests =
                recording.records.iter().filter(|record| record.kind == RecordKind::ReplayRequest);
            let frames = &requests.nth(request).unwrap().frames;
            u64::from_be_bytes(frames[1].as_ref().try_into().unwrap())
        };
        let starts = [start(0), start(1), start(2)];
        let expected: Vec<_> = (0..3).map(|request| recorded_replies(&recording, request)).collect();
        let mut player = Player::bind(recording).await.unwrap();
        // Checkpoint A, closed, open, checkpoint B: the recorder then asked for the first gap.
        markers(&mut player, 4).await;
        assert_eq!(replay(&player, starts[0]).await, expected[0], "{name}");
        // Checkpoint C, closed, open: the buffer no longer reaches back to the second gap, and does not hold yet what
        // the engine published after this moment.
        markers(&mut player, 3).await;
        let early = replay(&player, starts[1]).await;
        assert!(expected[1].starts_with(&early[..early.len() - 1]), "{name}");
        // Checkpoint D is behind the recorded replay.
        markers(&mut player, 1).await;
        assert_eq!(replay(&player, starts[1]).await, expected[1], "{name}");
        assert_eq!(replay(&player, starts[2]).await, expected[2], "{name}");
        player.close().await;
    }
}

#[tokio::test]
async fn a_full_replay_reaches_messages_that_were_live_before_the_gap() {
    let mut player = Player::bind(recording("vllm0330_gap_replay")).await.unwrap();
    markers(&mut player, 4).await;
    assert_eq!(seqs(&replay(&player, 0).await), (0..=24).collect::<Vec<_>>());
    player.close().await;
}

#[tokio::test]
async fn nothing_is_replayed_before_it_was_published() {
    let mut player = Player::bind(recording("vllm0330_gap_replay")).await.unwrap();
    assert!(seqs(&replay(&player, 0).await).is_empty());
    for _ in 0..3 {
        player.play_next().await.unwrap();
    }
    assert_eq!(seqs(&replay(&player, 0).await), [0, 1, 2]);
    player.close().await;
}

#[tokio::test]
async fn a_batch_that_nobody_received_stays_missing() {
    let mut player = Player::bind(recording("vllm0330_poison_gap")).await.unwrap();
    markers(&mut player, 3).await;
    assert_eq!(seqs(&replay(&player, 9).await), [10, 11, 12, 13]);
    assert!(!seqs(&replay(&player, 0).await).contains(&9));
    player.close().await;
}

#[tokio::test]
async fn after_a_hidden_restart_only_the_new_life_is_replayed() {
    let recording = recording("vllm0330_restart_hidden");
    let expected = recorded_replies(&recording, 0);
    let mut player = Player::bind(recording).await.unwrap();
    markers(&mut player, 1).await;
    let first_life = replay(&player, 0).await;
    assert_eq!(seqs(&first_life), (0..=10).collect::<Vec<_>>());
    // Closed, then open: eleven batches of the second life were published meanwhile.
    markers(&mut player, 2).await;
    let at_open = replay(&player, 0).await;
    assert_eq!(at_open[..11], expected[..11]);
    assert_ne!(at_open[0], first_life[0]);
    markers(&mut player, 1).await;
    assert_eq!(replay(&player, 0).await, expected);
    player.close().await;
}

#[tokio::test]
async fn a_closed_stream_drops_its_subscribers_and_opens_on_the_same_ports() {
    let mut player = Player::bind(recording("vllm0330_restart")).await.unwrap();
    let endpoints = player.endpoints();
    let mut socket = subscribe(&player, 0).await;
    // The first life, then its exit.
    assert_eq!(markers(&mut player, 2).await, Marker::EngineExit);
    for _ in 0..10 {
        receive(&mut socket).await;
    }
    drop(socket);
    player.close_stream(0).await.unwrap();
    assert!(matches!(player.wait_for_subscribers(0, 1, WAIT).await, Err(WaitError::StreamClosed(0))));
    let unsent = player.play_next().await.unwrap();
    assert_eq!(unsent, Some(Played::Live { stream: 0, seq: Some(0), is_sent: false }));
    assert_eq!(player.unsent(), 1);

    player.open_stream(0).await.unwrap();
    assert_eq!(player.endpoints(), endpoints);
    let mut socket = subscribe(&player, 0).await;
    let sent = player.play_next().await.unwrap();
    assert_eq!(sent, Some(Played::Live { stream: 0, seq: Some(1), is_sent: true }));
    assert_eq!(receive(&mut socket).await[1], 1u64.to_be_bytes()[..]);
    assert_eq!(seqs(&replay(&player, 0).await), [0, 1], "the engine kept what nobody was there to receive");
    player.close().await;
}

#[tokio::test]
async fn a_stream_that_is_not_there_is_named() {
    let mut player = Player::bind(recording("vllm0330_resets")).await.unwrap();
    let error = player.close_stream(3).await.unwrap_err();
    assert!(error.to_string().contains("no stream 3"), "{error}");
    assert!(player.open_stream(3).await.is_err());
    player.close().await;
}
