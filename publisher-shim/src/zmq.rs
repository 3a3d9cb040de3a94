//! The engine's sockets: a SUB that follows its events, and a DEALER that asks for past ones.
//!
//! Sockets are plain ZeroMQ (ZMTP 3) in pure Rust. Reconnecting is done here, not by the library: every new connection
//! gets a number, so that the reader knows which messages came over which.

use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use zeromq::{DealerSocket, Socket, SocketEvent, SocketRecv, SocketSend, SubSocket, ZmqError, ZmqMessage};

/// Longest wait for one connection attempt.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// First and longest pause between connection attempts. Short, because an engine's events are lost while nobody listens.
const BACKOFF_FIRST: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// Longest time for one whole replay, retries included. Shorter than the lease after which the index would call the
/// source gone, because nothing is published meanwhile.
const REPLAY_TIMEOUT: Duration = Duration::from_secs(6);
/// Longest silence inside a replay: old engines lose the end marker when the reply is long.
const REPLAY_IDLE: Duration = Duration::from_millis(1500);
/// Requests per replay: each continues after the last message received.
const REPLAY_TRIES: u32 = 4;
/// Most messages of one replay; ten times vLLM's default buffer.
const REPLAY_MAX_MESSAGES: usize = 100_000;
/// Most bytes of one replay.
const REPLAY_MAX_BYTES: usize = 512 << 20;
/// Sequence of a replay's end marker.
const END_MARKER: u64 = u64::MAX;

/// Whether the shim or the engine opens the connection: an engine whose endpoint names no wildcard connects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Attach {
    /// The engine binds, the shim connects (the usual way).
    #[default]
    Connect,
    /// The engine connects, the shim binds.
    Bind,
}

/// State of the event connection. The number grows with every connection made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Connection {
    /// Number of this connection; 0 before the first.
    pub number: u64,
    /// Whether it is up now.
    pub up: bool,
}

/// Past messages as the engine returned them.
#[derive(Debug, Default)]
pub struct Replay {
    /// (sequence, payload) in order of arrival.
    pub messages: Vec<(u64, Bytes)>,
    /// The engine answered: at least one message or the end marker came.
    pub answered: bool,
}

type Monitor = futures_util::stream::BoxStream<'static, SocketEvent>;

/// Follows the events of one endpoint until `token` is cancelled. `on_message` gets the connection's number and the frames;
/// it must not block.
pub async fn follow(
    endpoint: &str,
    attach: Attach,
    topic: &str,
    connection: &watch::Sender<Connection>,
    token: &CancellationToken,
    mut on_message: impl FnMut(u64, Vec<Bytes>),
) {
    let mut backoff = BACKOFF_FIRST;
    while !token.is_cancelled() {
        let opened = token.run_until_cancelled(open(endpoint, attach, topic)).await;
        match opened {
            None => return,
            Some(Ok((socket, monitor))) => {
                backoff = BACKOFF_FIRST;
                read(socket, monitor, attach, connection, token, &mut on_message).await;
                connection.send_modify(|connection| connection.up = false);
                if !token.is_cancelled() {
                    tracing::info!(endpoint, "connection to the engine's event socket ended, reconnecting");
                }
            }
            Some(Err(error)) => {
                tracing::debug!(endpoint, %error, "engine's event socket is not reachable yet");
            }
        }
        token.run_until_cancelled(sleep(backoff)).await;
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

async fn open(endpoint: &str, attach: Attach, topic: &str) -> Result<(SubSocket, Monitor), ZmqError> {
    let mut socket = SubSocket::new();
    // Before connecting: a connection that ends at once must not go unnoticed.
    let monitor = socket.monitor().boxed();
    let opening = async {
        // Subscribed first: the subscription then travels with the handshake.
        socket.subscribe(topic).await?;
        match attach {
            Attach::Connect => socket.connect(endpoint).await,
            Attach::Bind => socket.bind(&endpoint.replace("://*:", "://0.0.0.0:")).await.map(|_| ()),
        }
    };
    timeout(CONNECT_TIMEOUT, opening).await.map_err(|_| ZmqError::Other("no answer in time"))??;
    Ok((socket, monitor))
}

async fn read(
    mut socket: SubSocket,
    mut monitor: Monitor,
    attach: Attach,
    connection: &watch::Sender<Connection>,
    token: &CancellationToken,
    on_message: &mut impl FnMut(u64, Vec<Bytes>),
) {
    let mut number = 0;
    let mut renew = || {
        connection
            .send_modify(|connection| *connection = Connection { number: connection.number + 1, up: true });
        number = connection.borrow().number;
        number
    };
    let mut current = renew();
    loop {
        tokio::select! {
            () = token.cancelled() => return,
            received = socket.recv() => match received {
                Ok(message) => on_message(current, message.into_vec()),
                // A bound socket outlives its peers; a connected one is opened anew.
                Err(error) if attach == Attach::Bind => tracing::debug!(%error, "an engine's connection failed"),
                Err(error) => {
                    tracing::debug!(%error, "reading from the engine failed");
                    return;
                }
            },
            event = monitor.next() => match (event, attach) {
                (Some(SocketEvent::Accepted(..)), Attach::Bind) => current = renew(),
                (Some(SocketEvent::Disconnected(_)), Attach::Connect) | (None, _) => return,
                _ => {}
            },
        }
    }
}

/// Asks the engine for its messages from sequence `from` on.
pub async fn replay(endpoint: &str, from: u64) -> Replay {
    let mut replay = Replay::default();
    let deadline = Instant::now() + REPLAY_TIMEOUT;
    let mut next = from;
    for _ in 0..REPLAY_TRIES {
        match timeout_at(deadline, replay_once(endpoint, next, &mut replay)).await {
            Ok(Ok(true)) | Err(_) => break,
            // The reply stopped without its end marker: go on from what came.
            Ok(Ok(false)) => {}
            Ok(Err(error)) => {
                tracing::debug!(endpoint, %error, "replay failed");
                sleep(BACKOFF_FIRST).await;
            }
        }
        next = replay.messages.last().map_or(from, |(seq, _)| seq + 1);
    }
    replay
}

/// One request. Returns whether the end marker came.
async fn replay_once(endpoint: &str, from: u64, replay: &mut Replay) -> Result<bool, ZmqError> {
    let mut socket = DealerSocket::new();
    socket.connect(endpoint).await?;
    let request = vec![Bytes::new(), Bytes::copy_from_slice(&from.to_be_bytes())];
    socket
        .send(ZmqMessage::try_from(request).map_err(|_| ZmqError::Other("a request needs frames"))?)
        .await?;
    let mut bytes: usize = replay.messages.iter().map(|(_, payload)| payload.len()).sum();
    loop {
        let Ok(message) = timeout(REPLAY_IDLE, socket.recv()).await else { return Ok(false) };
        let frames = message?.into_vec();
        // Older engines leave the topic out: sequence and payload are the last two frames in both framings.
        let Some((seq, payload)) = sequence_and_payload(&frames) else { continue };
        replay.answered = true;
        if seq == END_MARKER {
            return Ok(true);
        }
        bytes += payload.len();
        if replay.messages.len() == REPLAY_MAX_MESSAGES || bytes > REPLAY_MAX_BYTES {
            tracing::warn!(
                endpoint,
                from,
                "replay is larger than any engine's buffer should be; the rest is left out"
            );
            return Ok(true);
        }
        replay.messages.push((seq, payload.clone()));
    }
}

/// The last two frames, if they are an 8-byte big-endian sequence and a payload.
fn sequence_and_payload(frames: &[Bytes]) -> Option<(u64, &Bytes)> {
    let [.., seq, payload] = frames else { return None };
    Some((u64::from_be_bytes(seq.as_ref().try_into().ok()?), payload))
}

/// Sequence and payload of a live message: exactly `[topic, sequence, payload]`.
pub fn parse_live(frames: &[Bytes]) -> Result<(u64, &Bytes), &'static str> {
    match frames {
        [_, _, _] => sequence_and_payload(frames).ok_or("sequence_frame"),
        _ => Err("frame_count"),
    }
}
