//! The bus over NATS: core publish and subscribe of the NATS project's own client.
//!
//! Reconnection is the client's: for ever, with a delay that doubles up to [`RECONNECT_DELAY_MAX`], and every
//! subscription is renewed. Messages published meanwhile wait in the client's bounded queue; what does not fit within
//! the publish timeout is given up and counted. A subscriber that is slower than its queue loses messages at once and
//! nobody waits for it: the connection is shared.
//!
//! The client writes its own logs under `async_nats`, one line per event; `warn` is the useful level there.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use async_nats::connection::State;
use async_nats::{Client, Event, Message, PublishErrorKind, ServerAddr};
use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::time::timeout;

use crate::subject::{check_filter, check_subject};
use crate::{
    Bus, BusMessage, BusStats, ClosedError, FlushError, PublishError, SubscribeError, Subscription,
    TooLargeError,
};

mod config;
mod credentials;

pub use config::{ClientIdentity, ConnectError, NatsAuth, NatsConfig, NatsTls};

/// Longest wait of `flush`: a broker's restart fits in, a process that is asked to end still ends in time.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for the connection to take a subscription, in its bounded command queue.
const SUBSCRIBE_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for the broker to confirm that a subscription is in force. Not an error when it passes: the client
/// holds the subscription and renews it.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(2);
/// Where the client library receives what is meant for one connection only.
const INBOX_PREFIX: &str = "_INBOX.";
/// Delay before the second attempt to reconnect; the first is immediate.
const RECONNECT_DELAY_FIRST: Duration = Duration::from_millis(50);
/// Longest delay between attempts: how long a broker can be back before it is noticed.
const RECONNECT_DELAY_MAX: Duration = Duration::from_secs(2);

/// A connection to a NATS broker or cluster. Its subscriptions share the connection and keep it open after the bus
/// itself is dropped. A filter that starts with a wildcard does not see subjects under `_INBOX.`, which are replies
/// between other clients.
pub struct NatsBus {
    client: Client,
    servers: String,
    publish_timeout: Duration,
    counters: Arc<Counters>,
}

#[derive(Default)]
struct Counters {
    published: AtomicU64,
    refused: AtomicU64,
    abandoned: AtomicU64,
    dropped: AtomicU64,
    disconnects: AtomicU64,
    failed_reconnects: AtomicU64,
    broker_errors: AtomicU64,
    /// Failed reconnects since the connection was last up; only decides which of them are logged.
    attempts_now: AtomicU64,
}

// === impl NatsBus ===

impl NatsBus {
    async fn join(&self, filter: String, group: Option<String>) -> Result<Subscription, SubscribeError> {
        check_filter(&filter)?;
        let joining = async {
            match group {
                None => self.client.subscribe(filter.clone()).await,
                Some(group) => self.client.queue_subscribe(filter.clone(), group).await,
            }
        };
        let Ok(outcome) = timeout(SUBSCRIBE_TIMEOUT, joining).await else {
            let waited_ms = SUBSCRIBE_TIMEOUT.as_millis();
            return Err(SubscribeError::TimedOut { bus: self.servers.clone(), filter, waited_ms });
        };
        // The filter was checked more strictly above, so what is left is a connection that ended.
        let subscriber = outcome.map_err(|_| self.closed())?;
        self.confirm(&filter).await;
        // Whoever subscribes to everything means every message published on a bus, not the client's own echoes.
        let hides_inboxes = filter.starts_with(['*', '>']);
        let shown = move |m: &Message| !(hides_inboxes && m.subject.starts_with(INBOX_PREFIX));
        let messages = subscriber.filter_map(move |m| std::future::ready(shown(&m).then(|| bus_message(m))));
        Ok(Subscription::new(messages))
    }

    /// Connects once. A broker that cannot be reached now is an error, because at start it is nearly always a wrong
    /// address; one that goes away later is not.
    pub async fn connect(config: NatsConfig) -> Result<Self, ConnectError> {
        let servers = config.servers()?;
        let described = describe(&servers);
        let counters = Arc::new(Counters::default());
        let (on_event, broker) = (counters.clone(), described.clone());
        let seed = jitter_seed();
        let options = config
            .options()
            .await?
            .event_callback(move |event| {
                on_event.record(&event, &broker);
                std::future::ready(())
            })
            .reconnect_delay_callback(move |attempt| reconnect_delay(attempt, seed));
        // The client bounds each attempt to reach an address, but not the name look-up before it.
        let longest = config.connect_timeout.saturating_mul(servers.len() as u32);
        let client = match timeout(longest, options.connect(servers)).await {
            Ok(Ok(client)) => client,
            Ok(Err(error)) => return Err(ConnectError::explain(&error, described)),
            Err(_) => {
                let reason = format!("no answer within {} ms", longest.as_millis());
                return Err(ConnectError::Unreachable { servers: described, reason });
            }
        };
        tracing::info!(servers = %described, "connected to the broker");
        Ok(Self { client, servers: described, publish_timeout: config.publish_timeout, counters })
    }

    fn closed(&self) -> ClosedError {
        ClosedError { bus: self.servers.clone() }
    }

    async fn try_send(&self, message: BusMessage) -> Result<(), PublishError> {
        let BusMessage { subject, reply, payload } = message;
        check_subject(&subject)?;
        reply.as_deref().map_or(Ok(()), check_subject)?;
        let bytes = payload.len();
        let sending = async {
            match reply {
                Some(reply) => self.client.publish_with_reply(subject.clone(), reply, payload).await,
                None => self.client.publish(subject.clone(), payload).await,
            }
        };
        let Ok(outcome) = timeout(self.publish_timeout, sending).await else {
            let abandoned = self.counters.abandoned.fetch_add(1, Relaxed) + 1;
            if abandoned.is_power_of_two() {
                tracing::warn!(servers = %self.servers, abandoned, "messages are given up: the broker takes none");
            }
            return Ok(());
        };
        match outcome.map_err(|error| error.kind()) {
            Ok(()) => {
                self.counters.published.fetch_add(1, Relaxed);
                Ok(())
            }
            Err(PublishErrorKind::MaxPayloadExceeded) => {
                Err(TooLargeError { subject, bytes, max_bytes: self.client.max_payload() }.into())
            }
            // Subjects were checked more strictly above, so what is left is a connection that ended.
            Err(PublishErrorKind::InvalidSubject | PublishErrorKind::Send) => Err(self.closed().into()),
        }
    }

    /// A message to ourselves through the broker, which handles one connection's commands in order: when it is back,
    /// every subscription sent before is in force. (A request that nobody answers would be one message less, but
    /// anybody's subscription to `>` would swallow it.)
    async fn confirm(&self, filter: &str) {
        let echo = async {
            let inbox = self.client.new_inbox();
            let mut echo = self.client.subscribe(inbox.clone()).await.ok()?;
            self.client.publish(inbox, Bytes::new()).await.ok()?;
            echo.next().await
        };
        if timeout(CONFIRM_TIMEOUT, echo).await.ok().flatten().is_none() {
            tracing::warn!(
                servers = %self.servers, filter,
                "the broker has not confirmed a subscription; it will be in force when the broker is back"
            );
        }
    }
}

#[async_trait]
impl Bus for NatsBus {
    async fn send(&self, message: BusMessage) -> Result<(), PublishError> {
        self.try_send(message).await.inspect_err(|_| {
            self.counters.refused.fetch_add(1, Relaxed);
        })
    }

    async fn subscribe(&self, filter: String) -> Result<Subscription, SubscribeError> {
        self.join(filter, None).await
    }

    async fn subscribe_group(&self, filter: String, group: String) -> Result<Subscription, SubscribeError> {
        check_filter(&group)?;
        self.join(filter, Some(group)).await
    }

    async fn flush(&self) -> Result<(), FlushError> {
        match timeout(FLUSH_TIMEOUT, self.client.flush()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(self.closed().into()),
            Err(_) => {
                Err(FlushError::TimedOut { bus: self.servers.clone(), waited_ms: FLUSH_TIMEOUT.as_millis() })
            }
        }
    }

    fn stats(&self) -> BusStats {
        let counters = &self.counters;
        // The client counts the first connection too. Its count is exact, while events can be lost in a burst.
        let reconnects = self.client.statistics().connects.load(Relaxed).saturating_sub(1);
        BusStats {
            connected: self.client.connection_state() == State::Connected,
            published: counters.published.load(Relaxed),
            refused: counters.refused.load(Relaxed),
            abandoned: counters.abandoned.load(Relaxed),
            dropped: counters.dropped.load(Relaxed),
            disconnects: counters.disconnects.load(Relaxed).max(reconnects),
            reconnects,
            failed_reconnects: counters.failed_reconnects.load(Relaxed),
            broker_errors: counters.broker_errors.load(Relaxed),
        }
    }

    fn describe(&self) -> String {
        self.servers.clone()
    }
}

// === impl Counters ===

impl Counters {
    /// Counts an event of the client and says it in one sentence. What can repeat quickly is logged at every power of
    /// two, so that a log shows the order of magnitude and no flood.
    fn record(&self, event: &Event, servers: &str) {
        match event {
            Event::Connected => {
                self.attempts_now.store(0, Relaxed);
                if self.disconnects.load(Relaxed) > 0 {
                    tracing::info!(servers, "connected to the broker again; subscriptions are renewed");
                }
            }
            Event::Disconnected => {
                self.disconnects.fetch_add(1, Relaxed);
                tracing::warn!(servers, "the connection to the broker is lost; reconnecting");
            }
            Event::SlowConsumer(subscription) => {
                let dropped = self.dropped.fetch_add(1, Relaxed) + 1;
                if dropped.is_power_of_two() {
                    tracing::warn!(
                        servers,
                        subscription,
                        dropped,
                        "a subscriber is too slow and loses messages"
                    );
                }
            }
            Event::ServerError(error) => {
                let errors = self.broker_errors.fetch_add(1, Relaxed) + 1;
                if errors.is_power_of_two() {
                    tracing::warn!(servers, %error, errors, "the broker reports an error; check permissions and limits");
                }
            }
            Event::ClientError(error) => {
                self.failed_reconnects.fetch_add(1, Relaxed);
                let attempts = self.attempts_now.fetch_add(1, Relaxed) + 1;
                if attempts.is_power_of_two() {
                    tracing::warn!(servers, %error, attempts, "the broker could not be reached; trying again");
                }
            }
            Event::LameDuckMode => {
                tracing::info!(servers, "the broker is shutting down; another is looked for");
            }
            Event::Draining => {
                tracing::info!(servers, "the connection to the broker is draining");
            }
            Event::Closed => {
                tracing::info!(servers, "the connection to the broker is closed for good");
            }
        }
    }
}

fn bus_message(message: Message) -> BusMessage {
    BusMessage {
        subject: message.subject.into_string(),
        reply: message.reply.map(async_nats::Subject::into_string),
        payload: message.payload,
    }
}

/// Scheme, host and port of each: what is left of a URL without its credentials.
fn describe(servers: &[ServerAddr]) -> String {
    let one = |server: &ServerAddr| match server.host() {
        host if host.contains(':') => format!("{}://[{host}]:{}", server.scheme(), server.port()),
        host => format!("{}://{host}:{}", server.scheme(), server.port()),
    };
    servers.iter().map(one).collect::<Vec<_>>().join(",")
}

/// Doubles from [`RECONNECT_DELAY_FIRST`] to [`RECONNECT_DELAY_MAX`], and takes between half and all of that, so that
/// a fleet whose broker restarted does not come back in one instant. `attempt` counts from 1 after each connection.
fn reconnect_delay(attempt: usize, seed: u64) -> Duration {
    if attempt <= 1 {
        return Duration::ZERO;
    }
    let doublings = (attempt - 2).min(16) as u32;
    let full = RECONNECT_DELAY_FIRST.saturating_mul(1 << doublings).min(RECONNECT_DELAY_MAX);
    // One odd multiplication spreads consecutive attempts over the high bits.
    let mixed = (seed ^ attempt as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    full / 2 + (full / 2).mul_f64((mixed >> 32) as f64 / f64::from(u32::MAX))
}

/// Differs from process to process; std seeds its hashers so.
fn jitter_seed() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(0_u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reconnection_starts_at_once_and_then_waits_longer_up_to_the_maximum() {
        assert_eq!(reconnect_delay(1, 7), Duration::ZERO);
        for seed in 0..50 {
            for attempt in 2..200_usize {
                let full = RECONNECT_DELAY_FIRST
                    .saturating_mul(2_u32.saturating_pow(attempt as u32 - 2))
                    .min(RECONNECT_DELAY_MAX);
                let delay = reconnect_delay(attempt, seed);
                assert!(full / 2 <= delay && delay <= full, "attempt {attempt}: {delay:?}");
            }
        }
        let late = |seed| reconnect_delay(20, seed);
        assert_ne!(late(1), late(2), "processes spread");
    }

    #[test]
    fn descriptions_name_the_brokers_without_credentials() {
        let servers: Vec<ServerAddr> = ["nats://user:hunter2@broker.example:4333", "tls://[::1]", "10.0.0.7"]
            .map(|url| url.parse().unwrap())
            .into();
        assert_eq!(describe(&servers), "nats://broker.example:4333,tls://[::1]:4222,nats://10.0.0.7:4222");
    }
}
