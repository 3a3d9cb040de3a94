//! The kvatlas bus: publish and subscribe behind one trait, so that the same shim and index run in one process or
//! over a broker.
//!
//! Two implementations: [`InProcessBus`] (bounded channels, for the embedded form and for tests) and [`NatsBus`].
//! Both pass the same behaviour tests.
//!
//! **What is promised.** At most once, and in order for each pair of publisher and subscription. Nothing is stored:
//! who subscribes later sees nothing of before. Messages can be lost (a full queue, a broker that went away), and the
//! bus counts what it knows to be lost in [`BusStats`], but only receivers see every loss: they detect it by the
//! contiguous sequence in each frame and repair it.
//!
//! **What it does not do.** No acknowledgement, no persistence, no meaning of subjects (the contract crate builds and
//! parses them). A message may name a subject for replies, as in NATS; any number of answers may come, or none, and who
//! asked decides how long to wait.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{FutureExt as _, Stream, StreamExt as _};

mod inprocess;
mod nats;
pub mod subject;
#[cfg(feature = "test-server")]
pub mod test_server;

pub use inprocess::{InProcessBus, InProcessConfig};
pub use nats::leases;
pub use nats::{ClientIdentity, ConnectError, NatsAuth, NatsBus, NatsConfig, NatsTls};
pub use subject::{InvalidFilterError, InvalidSubjectError};

/// Longest time a `publish` waits for room before the message is given up and counted. Long enough for a broker's
/// restart or a subscriber's pause, short enough that a publisher's own bounded queue overflows into a stated,
/// repaired gap instead of standing still.
pub const DEFAULT_PUBLISH_TIMEOUT: Duration = Duration::from_secs(5);

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BusMessage {
    /// Where it is published.
    pub subject: String,
    /// Where answers are expected, if any are.
    pub reply: Option<String>,
    /// What is published.
    pub payload: Bytes,
}

/// Publish and subscribe.
///
/// An error means that the call can never succeed as given: the message or filter is refused, or the bus is closed
/// for good. A broker that is away is not an error: the bus reconnects by itself for ever, and what is lost meanwhile
/// is counted. The two exceptions are named by their variants: [`SubscribeError::TimedOut`] and
/// [`FlushError::TimedOut`], which may be tried again.
#[async_trait]
pub trait Bus: Send + Sync + 'static {
    /// Hands one message over, to everybody subscribed to its subject now.
    ///
    /// Waits while a queue is full, but not longer than the configured publish timeout; then the message is lost for
    /// the queue that had no room, [`BusStats`] counts it, and the call succeeds. To keep one publisher's messages in
    /// order, await each call before the next.
    async fn send(&self, message: BusMessage) -> Result<(), PublishError>;

    /// [`Self::send`] of a message that expects no answer.
    async fn publish(&self, subject: String, payload: Bytes) -> Result<(), PublishError> {
        self.send(BusMessage { subject, reply: None, payload }).await
    }

    /// Subscribes to an exact subject, or with `*` for one word and a trailing `>` for the rest.
    ///
    /// What anybody publishes after this returned is delivered. (If a broker is away or too slow to confirm, that
    /// holds from the moment it is back: the subscription is renewed on every reconnect.)
    async fn subscribe(&self, filter: String) -> Result<Subscription, SubscribeError>;

    /// The same as one of a group: each message goes to one of those that subscribed to it under this group's name.
    async fn subscribe_group(&self, filter: String, group: String) -> Result<Subscription, SubscribeError>;

    /// Waits, for a bounded time, until everything published so far has left this process. Call it before exit.
    async fn flush(&self) -> Result<(), FlushError>;

    /// What the bus counted since it was made.
    fn stats(&self) -> BusStats;

    /// Which bus this is, for logs: `in-process` or the brokers' URLs. Never credentials.
    fn describe(&self) -> String;
}

/// Counters of one bus since it was made, at one moment. All but `connected` only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BusStats {
    /// Whether messages can pass now.
    pub connected: bool,
    /// Messages accepted by `publish`.
    pub published: u64,
    /// Messages for which `publish` returned an error.
    pub refused: u64,
    /// Messages given up because the broker's connection took none for the publish timeout. Nobody got them.
    pub abandoned: u64,
    /// Deliveries lost because a subscription's queue was full. A message lost to two subscriptions counts twice. Over
    /// NATS a burst is counted in part only (the client reports the first hundred or so of a burst).
    pub dropped: u64,
    /// Times the broker's connection was lost.
    pub disconnects: u64,
    /// Times it came back.
    pub reconnects: u64,
    /// Attempts to reconnect that failed.
    pub failed_reconnects: u64,
    /// Errors that the broker reported, such as a permission violation.
    pub broker_errors: u64,
}

/// The receiving end of one `subscribe`. Dropping it unsubscribes.
pub struct Subscription {
    messages: Pin<Box<dyn Stream<Item = BusMessage> + Send>>,
}

/// Why [`Subscription::try_recv`] has no message.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum TryRecvError {
    /// None has arrived yet.
    #[error("no message has arrived yet: wait with recv")]
    Empty,
    /// None will ever arrive.
    #[error("the bus is closed for good: no message will arrive")]
    Closed,
}

/// The bus is closed for good.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("the bus {bus} is closed for good: connect a new one")]
pub struct ClosedError {
    /// Which bus, as [`Bus::describe`] has it.
    pub bus: String,
}

/// The message is larger than the bus takes.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "message of {bytes} bytes for {subject} is too large: the bus takes {max_bytes}; split it or raise max_payload"
)]
pub struct TooLargeError {
    /// Where it was to go.
    pub subject: String,
    /// Its size.
    pub bytes: usize,
    /// The largest size taken.
    pub max_bytes: usize,
}

/// The failures of [`Bus::send`].
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum PublishError {
    /// The subject is not usable.
    #[error(transparent)]
    InvalidSubject(#[from] InvalidSubjectError),
    /// The payload is too large.
    #[error(transparent)]
    TooLarge(#[from] TooLargeError),
    /// No further message will pass.
    #[error(transparent)]
    Closed(#[from] ClosedError),
}

/// The failures of [`Bus::subscribe`].
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum SubscribeError {
    /// The filter is not usable.
    #[error(transparent)]
    InvalidFilter(#[from] InvalidFilterError),
    /// The bus has as many subscriptions as it takes.
    #[error(
        "{filter} cannot be subscribed to: the bus has {max} subscriptions already; drop some or subscribe to a wildcard"
    )]
    TooMany {
        /// What was to be subscribed to.
        filter: String,
        /// The most subscriptions one bus takes.
        max: usize,
    },
    /// The connection took no command for too long; nothing is subscribed. May be tried again.
    #[error(
        "{bus} took no subscription to {filter} for {waited_ms} ms: check that the broker is up, then try again"
    )]
    TimedOut {
        /// Which bus.
        bus: String,
        /// What was to be subscribed to.
        filter: String,
        /// How long was waited, in milliseconds.
        waited_ms: u128,
    },
    /// No message will ever arrive.
    #[error(transparent)]
    Closed(#[from] ClosedError),
}

/// The failures of [`Bus::flush`].
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum FlushError {
    /// Messages are still waiting in this process. May be tried again.
    #[error(
        "{bus} has not taken every message after {waited_ms} ms: check that the broker is up, then try again"
    )]
    TimedOut {
        /// Which bus.
        bus: String,
        /// How long was waited, in milliseconds.
        waited_ms: u128,
    },
    /// No further message will pass.
    #[error(transparent)]
    Closed(#[from] ClosedError),
}

// === impl Subscription ===

impl Subscription {
    /// A subscription that yields what `messages` yields. For implementations of [`Bus`], among them those of tests that
    /// lose or delay messages on purpose. Dropping the stream has to unsubscribe; its end means closed for good.
    pub fn new(messages: impl Stream<Item = BusMessage> + Send + 'static) -> Self {
        Self { messages: Box::pin(messages.fuse()) }
    }

    /// The next message; `None` once the bus is closed for good. Cancel-safe: a dropped call loses no message.
    pub async fn recv(&mut self) -> Option<BusMessage> {
        self.messages.next().await
    }

    /// The next message if one has arrived.
    pub fn try_recv(&mut self) -> Result<BusMessage, TryRecvError> {
        match self.messages.next().now_or_never() {
            Some(Some(message)) => Ok(message),
            Some(None) => Err(TryRecvError::Closed),
            None => Err(TryRecvError::Empty),
        }
    }
}

impl Stream for Subscription {
    type Item = BusMessage;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<BusMessage>> {
        self.messages.poll_next_unpin(cx)
    }
}

impl std::fmt::Debug for Subscription {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Subscription").finish_non_exhaustive()
    }
}
