//! The two sockets of one engine: events out (PUB) and replay (ROUTER), on loopback.
//!
//! The event socket is an XPUB, which looks the same from the other side but tells when a subscription is in place, so a
//! test need not guess. Nothing is dropped for a slow subscriber: sending waits until every subscriber's connection has
//! taken the message, and fails after [`SEND_TIMEOUT`]. (The library's PUB drops silently at 100,000 messages instead.)
//! What is sent before anybody subscribed is lost, as with every publisher that binds.
//!
//! Each socket has its own task, so a replay is answered while sending waits. The handle speaks to the event task
//! through a bounded queue. Dropping the handle ends the tasks and closes the sockets soon; [`StreamSockets::close`]
//! waits until they are closed.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{FutureExt as _, StreamExt as _};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use zeromq::{RouterSocket, Socket, SocketEvent, SocketRecv, SocketSend, XPubSocket, ZmqError, ZmqMessage};

use crate::replay::ReplayBuffer;

/// Longest wait for subscribers to take one message. They share a machine with the test, so this means "stuck".
pub const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// Commands that wait for the task. A sender awaits the result of each, so this only bounds concurrent senders.
const COMMAND_QUEUE: usize = 64;
/// Tries to bind a port that was just released, and the pause between them: another process may hold it for a moment.
const BIND_TRIES: u32 = 50;
const BIND_PAUSE: Duration = Duration::from_millis(20);
/// First byte of a message in which a peer subscribes.
const SUBSCRIBE: u8 = 1;

/// Ports to bind; 0 lets the system choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamPorts {
    /// Port of the event socket.
    pub events: u16,
    /// Port of the replay socket.
    pub replay: u16,
}

/// Where a stream can be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamEndpoints {
    /// Of the event socket, for example `tcp://127.0.0.1:5557`.
    pub events: String,
    /// Of the replay socket.
    pub replay: String,
    /// The ports in both.
    pub ports: StreamPorts,
}

/// What the sockets have done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketCounts {
    /// Subscriptions that arrived (less those withdrawn) since the sockets were bound. A subscriber that went away
    /// without withdrawing still counts; one that came back counts again.
    pub subscriptions: usize,
    /// Replay requests answered.
    pub replays: u64,
    /// Requests on the replay socket that were not understood.
    pub bad_requests: u64,
}

/// The sockets of one engine.
#[derive(Debug)]
pub struct StreamSockets {
    endpoints: StreamEndpoints,
    commands: mpsc::Sender<Command>,
    counts: watch::Receiver<SocketCounts>,
    /// Dropped to end the replay task.
    replay_stop: oneshot::Sender<()>,
    event_task: JoinHandle<()>,
    replay_task: JoinHandle<()>,
}

/// A socket could not be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot bind {address}: {source}; choose another port, or 0 for any")]
pub struct BindError {
    address: SocketAddr,
    source: ZmqError,
}

/// Why a message was not sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// A subscriber does not read.
    #[error("a subscriber of {endpoint} took no message for {SEND_TIMEOUT:?}; it is stuck, or stop it")]
    Stalled {
        /// The event socket.
        endpoint: String,
    },
    /// The socket failed.
    #[error("cannot send on {endpoint}: {source}")]
    Socket {
        /// The event socket.
        endpoint: String,
        /// What failed.
        source: ZmqError,
    },
    /// A message needs at least one frame.
    #[error("a message without frames cannot be sent")]
    NoFrames,
    /// The task is gone.
    #[error("the sockets of {endpoint} are closed; bind them again")]
    Closed {
        /// The event socket.
        endpoint: String,
    },
}

/// Fewer subscribers came than expected.
#[derive(Debug, thiserror::Error)]
#[error(
    "{present} of {expected} subscriptions reached {endpoint} within {waited:?}; check the subscriber's endpoint"
)]
pub struct NoSubscriberError {
    endpoint: String,
    present: usize,
    expected: usize,
    waited: Duration,
}

/// A message to send, and where the result goes.
struct Command {
    frames: Vec<Bytes>,
    done: oneshot::Sender<Result<(), SendError>>,
}

/// The event socket and its counters, as its task owns them.
struct EventSocket {
    socket: XPubSocket,
    /// Says who connected.
    monitor: BoxStream<'static, SocketEvent>,
    endpoint: String,
    counts: Arc<watch::Sender<SocketCounts>>,
}

/// The replay socket, what it answers from and its counters, as its task owns them.
struct ReplaySocket {
    socket: RouterSocket,
    buffer: Arc<Mutex<ReplayBuffer>>,
    counts: Arc<watch::Sender<SocketCounts>>,
}

// === impl StreamSockets ===

impl StreamSockets {
    /// Binds both sockets on 127.0.0.1. Replays are answered from `buffer`, which the caller keeps filled.
    pub async fn bind(ports: StreamPorts, buffer: Arc<Mutex<ReplayBuffer>>) -> Result<Self, BindError> {
        let (mut events, events_port) = bind::<XPubSocket>(ports.events).await?;
        let (router, replay_port) = bind::<RouterSocket>(ports.replay).await?;
        let monitor = events.monitor().boxed();
        let endpoints = StreamEndpoints {
            events: format!("tcp://127.0.0.1:{events_port}"),
            replay: format!("tcp://127.0.0.1:{replay_port}"),
            ports: StreamPorts { events: events_port, replay: replay_port },
        };
        let (commands, received) = mpsc::channel(COMMAND_QUEUE);
        let (replay_stop, replay_stopped) = oneshot::channel();
        let (counts, counted) = watch::channel(SocketCounts::default());
        let counts = Arc::new(counts);
        let events = EventSocket {
            socket: events,
            monitor,
            endpoint: endpoints.events.clone(),
            counts: Arc::clone(&counts),
        };
        let replay = ReplaySocket { socket: router, buffer, counts };
        Ok(Self {
            endpoints,
            commands,
            counts: counted,
            replay_stop,
            event_task: tokio::spawn(events.run(received)),
            replay_task: tokio::spawn(replay.run(replay_stopped)),
        })
    }

    /// Where the sockets are.
    pub fn endpoints(&self) -> &StreamEndpoints {
        &self.endpoints
    }

    /// What happened so far.
    pub fn counts(&self) -> SocketCounts {
        *self.counts.borrow()
    }

    /// Sends one message to every matching subscriber and returns when their connections have taken it.
    pub async fn send(&self, frames: Vec<Bytes>) -> Result<(), SendError> {
        let closed = || SendError::Closed { endpoint: self.endpoints.events.clone() };
        let (done, result) = oneshot::channel();
        self.commands.send(Command { frames, done }).await.map_err(|_| closed())?;
        result.await.map_err(|_| closed())?
    }

    /// Waits until `expected` subscriptions are in place; later messages reach them.
    pub async fn wait_for_subscribers(
        &self,
        expected: usize,
        wait: Duration,
    ) -> Result<(), NoSubscriberError> {
        let mut counts = self.counts.clone();
        let reached = counts.wait_for(|counts| counts.subscriptions >= expected);
        let is_reached = matches!(timeout(wait, reached).await, Ok(Ok(_)));
        is_reached.then_some(()).ok_or_else(|| NoSubscriberError {
            endpoint: self.endpoints.events.clone(),
            present: self.counts().subscriptions,
            expected,
            waited: wait,
        })
    }

    /// Closes both sockets and every connection, and returns when the ports are free.
    pub async fn close(self) {
        drop((self.commands, self.replay_stop));
        // A task that panicked is gone too, and so are its sockets.
        let _ = self.event_task.await;
        let _ = self.replay_task.await;
    }
}

/// Binds a socket on 127.0.0.1 and returns it with its port.
async fn bind<S: Socket>(port: u16) -> Result<(S, u16), BindError> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut tries = 1;
    loop {
        let mut socket = S::new();
        match socket.bind(&format!("tcp://{address}")).await {
            Ok(zeromq::Endpoint::Tcp(_, port)) => return Ok((socket, port)),
            Ok(_) => {
                return Err(BindError { address, source: ZmqError::Other("bound to another transport") });
            }
            Err(source) if port == 0 || tries >= BIND_TRIES => return Err(BindError { address, source }),
            Err(_) => {
                tries += 1;
                sleep(BIND_PAUSE).await;
            }
        }
    }
}

// === impl EventSocket ===

impl EventSocket {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            // `recv` is cancel-safe in both: they only poll a queue.
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command { frames, done }) => {
                        // The sender may have given up waiting; the message went out all the same.
                        let _ = done.send(self.send(frames).await);
                    }
                    None => break,
                },
                message = self.socket.recv() => match message {
                    Ok(message) => self.count_subscription(&message),
                    Err(error) => tracing::debug!(%error, "a subscriber's connection ended"),
                },
            }
        }
        self.disconnect_all();
        log_errors(&self.socket.close().await);
    }

    /// The library's XPUB socket leaves its connections open when it is dropped (their read halves hold each other), so
    /// each peer is dismissed by name.
    fn disconnect_all(&mut self) {
        let backend = self.socket.backend();
        while let Some(Some(event)) = self.monitor.next().now_or_never() {
            if let SocketEvent::Accepted(_, peer) = event {
                backend.peer_disconnected(&peer);
            }
        }
    }

    async fn send(&mut self, frames: Vec<Bytes>) -> Result<(), SendError> {
        let message = ZmqMessage::try_from(frames).map_err(|_| SendError::NoFrames)?;
        match timeout(SEND_TIMEOUT, self.socket.send(message)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(source)) => Err(SendError::Socket { endpoint: self.endpoint.clone(), source }),
            Err(_) => Err(SendError::Stalled { endpoint: self.endpoint.clone() }),
        }
    }

    fn count_subscription(&self, message: &ZmqMessage) {
        let is_subscribe = message.get(0).and_then(|frame| frame.first()) == Some(&SUBSCRIBE);
        self.counts.send_modify(|counts| {
            counts.subscriptions = if is_subscribe {
                counts.subscriptions.saturating_add(1)
            } else {
                counts.subscriptions.saturating_sub(1)
            };
        });
    }
}

// === impl ReplaySocket ===

impl ReplaySocket {
    async fn run(mut self, mut stopped: oneshot::Receiver<()>) {
        loop {
            tokio::select! {
                _ = &mut stopped => break,
                message = self.socket.recv() => match message {
                    Ok(request) => self.answer(request).await,
                    Err(error) => tracing::debug!(%error, "a replay connection ended"),
                },
            }
        }
        log_errors(&self.socket.close().await);
    }

    async fn answer(&mut self, request: ZmqMessage) {
        let request = request.into_vec();
        let start = match request.as_slice() {
            [_, empty, start] if empty.is_empty() => start.as_ref().try_into().ok().map(u64::from_be_bytes),
            _ => None,
        };
        let (Some(start), Some(identity)) = (start, request.first()) else {
            self.counts.send_modify(|counts| counts.bad_requests += 1);
            return;
        };
        let messages = self.buffer.lock().answer(start);
        for frames in messages {
            let mut message = ZmqMessage::from(identity.clone());
            for frame in frames {
                message.push_back(frame);
            }
            if let Err(error) = self.socket.send(message).await {
                tracing::debug!(%error, "a replay was not taken to its end");
                return;
            }
        }
        self.counts.send_modify(|counts| counts.replays += 1);
    }
}

fn log_errors(errors: &[ZmqError]) {
    for error in errors {
        tracing::warn!(%error, "a socket did not close cleanly");
    }
}
