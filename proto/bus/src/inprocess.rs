//! The bus inside one process: a bounded channel per subscription, no broker, no serialisation.
//!
//! A slow subscriber holds its publishers back, which is what an embedded process wants: the publisher is a shim task
//! that is itself fed from a bounded queue, so the wait becomes a repaired gap there. It holds them back only once,
//! for at most the publish timeout: then the subscription counts as *stalled*, loses messages without anybody waiting,
//! and is trusted again when it takes one.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::Stream;
use futures_util::future::join_all;
use parking_lot::RwLock;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::{SendTimeoutError, TrySendError};

use crate::subject::{check_filter, check_subject, subject_matches};
use crate::{
    Bus, BusMessage, BusStats, DEFAULT_PUBLISH_TIMEOUT, FlushError, PublishError, SubscribeError,
    Subscription, TooLargeError,
};

/// Most subscriptions of one bus. Each publish looks at every filter, and an embedded process has a handful: a bus
/// with more has lost track of them.
const MAX_SUBSCRIPTIONS: usize = 4096;

/// The limits of an [`InProcessBus`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InProcessConfig {
    /// Messages that one subscription holds before publishers wait; at least 1.
    pub queue_messages: usize,
    /// Longest wait of a publisher for a full subscription.
    pub publish_timeout: Duration,
    /// Largest payload in bytes.
    pub max_payload_bytes: usize,
}

/// The bus of one process. Share it in an `Arc`; when it is dropped its subscriptions end.
pub struct InProcessBus {
    config: InProcessConfig,
    registry: Arc<Registry>,
    published: AtomicU64,
    refused: AtomicU64,
    dropped: AtomicU64,
}

#[derive(Default)]
struct Registry {
    subscribers: RwLock<Vec<Arc<Subscriber>>>,
    next_id: AtomicU64,
    /// Whose turn it is in a group.
    turn: AtomicUsize,
}

struct Subscriber {
    id: u64,
    filter: String,
    /// Of those with the same group and filter, one gets a message.
    group: Option<String>,
    sender: mpsc::Sender<BusMessage>,
    /// It had no room for a whole publish timeout and has taken nothing since: nobody waits for it.
    stalled: AtomicBool,
}

/// Takes its subscriber out of the registry when the subscription is dropped.
struct Inbox {
    id: u64,
    receiver: mpsc::Receiver<BusMessage>,
    // Weak, so that subscriptions end with the bus instead of keeping it.
    registry: Weak<Registry>,
}

// === impl InProcessConfig ===

impl InProcessConfig {
    /// At a few kilobytes a frame this is some tens of megabytes for a subscriber that stands still, and seconds of
    /// slack at thousands of frames a second.
    pub const DEFAULT_QUEUE_MESSAGES: usize = 8192;
    /// What a NATS server takes by default, so that what works embedded works over a broker.
    pub const DEFAULT_MAX_PAYLOAD_BYTES: usize = 1024 * 1024;
}

impl Default for InProcessConfig {
    fn default() -> Self {
        Self {
            queue_messages: Self::DEFAULT_QUEUE_MESSAGES,
            publish_timeout: DEFAULT_PUBLISH_TIMEOUT,
            max_payload_bytes: Self::DEFAULT_MAX_PAYLOAD_BYTES,
        }
    }
}

// === impl InProcessBus ===

impl InProcessBus {
    /// An empty bus.
    pub fn new(config: InProcessConfig) -> Self {
        // A channel cannot hold zero messages; one is the nearest thing that works.
        let config = InProcessConfig { queue_messages: config.queue_messages.max(1), ..config };
        Self {
            config,
            registry: Arc::default(),
            published: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
        }
    }

    fn check(&self, BusMessage { subject, reply, payload }: &BusMessage) -> Result<(), PublishError> {
        check_subject(subject)?;
        reply.as_deref().map_or(Ok(()), check_subject)?;
        if payload.len() > self.config.max_payload_bytes {
            let (bytes, max_bytes) = (payload.len(), self.config.max_payload_bytes);
            return Err(TooLargeError { subject: subject.clone(), bytes, max_bytes }.into());
        }
        Ok(())
    }

    fn join(&self, filter: String, group: Option<String>) -> Result<Subscription, SubscribeError> {
        check_filter(&filter)?;
        let (sender, receiver) = mpsc::channel(self.config.queue_messages);
        let id = self.registry.add(filter, group, sender)?;
        Ok(Subscription::new(Inbox { id, receiver, registry: Arc::downgrade(&self.registry) }))
    }

    fn count_drop(&self, subscriber: &Subscriber) {
        self.dropped.fetch_add(1, Relaxed);
        if !subscriber.stalled.swap(true, Relaxed) {
            tracing::warn!(
                filter = %subscriber.filter,
                queue_messages = self.config.queue_messages,
                waited_ms = self.config.publish_timeout.as_millis() as u64,
                "a subscriber takes no messages and loses them until it does"
            );
        }
    }
}

#[async_trait]
impl Bus for InProcessBus {
    async fn send(&self, message: BusMessage) -> Result<(), PublishError> {
        self.check(&message).inspect_err(|_| {
            self.refused.fetch_add(1, Relaxed);
        })?;
        self.published.fetch_add(1, Relaxed);
        let targets = self.registry.matching(&message.subject);
        let mut full = Vec::new();
        for subscriber in &targets {
            match subscriber.sender.try_send(message.clone()) {
                Ok(()) => subscriber.stalled.store(false, Relaxed),
                Err(TrySendError::Full(_)) if subscriber.stalled.load(Relaxed) => self.count_drop(subscriber),
                Err(TrySendError::Full(message)) => full.push((subscriber, message)),
                Err(TrySendError::Closed(_)) => {}
            }
        }
        // Together, so that two full subscribers cost one timeout and not two.
        join_all(full.into_iter().map(|(subscriber, message)| async move {
            match subscriber.sender.send_timeout(message, self.config.publish_timeout).await {
                Ok(()) | Err(SendTimeoutError::Closed(_)) => {}
                Err(SendTimeoutError::Timeout(_)) => self.count_drop(subscriber),
            }
        }))
        .await;
        Ok(())
    }

    async fn subscribe(&self, filter: String) -> Result<Subscription, SubscribeError> {
        self.join(filter, None)
    }

    async fn subscribe_group(&self, filter: String, group: String) -> Result<Subscription, SubscribeError> {
        check_filter(&group)?;
        self.join(filter, Some(group))
    }

    async fn flush(&self) -> Result<(), FlushError> {
        // `publish` returns when every subscriber has its copy.
        Ok(())
    }

    fn stats(&self) -> BusStats {
        BusStats {
            connected: true,
            published: self.published.load(Relaxed),
            refused: self.refused.load(Relaxed),
            dropped: self.dropped.load(Relaxed),
            ..BusStats::default()
        }
    }

    fn describe(&self) -> String {
        "in-process".to_owned()
    }
}

// === impl Registry ===

impl Registry {
    /// A copy of the list, so that the lock is not held while publishers wait.
    fn matching(&self, subject: &str) -> Vec<Arc<Subscriber>> {
        let subscribers = self.subscribers.read();
        let matching = || subscribers.iter().filter(|s| subject_matches(&s.filter, subject));
        let mut chosen: Vec<_> = matching().filter(|s| s.group.is_none()).cloned().collect();
        let mut groups: Vec<_> = matching().filter_map(|s| Some((s.group.as_ref()?, &s.filter))).collect();
        groups.sort_unstable();
        groups.dedup();
        for (group, filter) in groups {
            let members = || matching().filter(|s| s.group.as_ref() == Some(group) && s.filter == *filter);
            let turn = self.turn.fetch_add(1, Relaxed) % members().count().max(1);
            chosen.extend(members().nth(turn).cloned());
        }
        chosen
    }

    fn add(
        &self,
        filter: String,
        group: Option<String>,
        sender: mpsc::Sender<BusMessage>,
    ) -> Result<u64, SubscribeError> {
        let mut subscribers = self.subscribers.write();
        if subscribers.len() >= MAX_SUBSCRIPTIONS {
            return Err(SubscribeError::TooMany { filter, max: MAX_SUBSCRIPTIONS });
        }
        let id = self.next_id.fetch_add(1, Relaxed);
        subscribers.push(Arc::new(Subscriber { id, filter, group, sender, stalled: AtomicBool::new(false) }));
        Ok(id)
    }

    fn remove(&self, id: u64) {
        self.subscribers.write().retain(|subscriber| subscriber.id != id);
    }
}

// === impl Inbox ===

impl Stream for Inbox {
    type Item = BusMessage;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<BusMessage>> {
        self.receiver.poll_recv(cx)
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        if let Some(registry) = self.registry.upgrade() {
            registry.remove(self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use bytes::Bytes;

    use super::*;
    use crate::TryRecvError;

    fn tiny(publish_timeout: Duration) -> InProcessBus {
        InProcessBus::new(InProcessConfig {
            queue_messages: 2,
            publish_timeout,
            ..InProcessConfig::default()
        })
    }

    async fn publish(bus: &InProcessBus, number: u8) {
        bus.publish("a.b".to_owned(), Bytes::copy_from_slice(&[number])).await.unwrap();
    }

    async fn received(subscription: &mut Subscription) -> u8 {
        subscription.recv().await.unwrap().payload[0]
    }

    #[tokio::test(start_paused = true)]
    async fn a_stalled_subscriber_loses_messages_that_are_counted_and_the_others_lose_none() {
        let bus = tiny(Duration::from_secs(5));
        let mut stalled = bus.subscribe("a.*".to_owned()).await.unwrap();
        let mut healthy = bus.subscribe("a.>".to_owned()).await.unwrap();
        for number in 0..6 {
            publish(&bus, number).await;
            assert_eq!(received(&mut healthy).await, number);
        }
        // Two fitted into its queue; the third waited for the timeout, the rest for nothing.
        assert_eq!(bus.stats().dropped, 4);
        assert_eq!((received(&mut stalled).await, received(&mut stalled).await), (0, 1));
        publish(&bus, 6).await;
        assert_eq!(received(&mut stalled).await, 6);
        assert_eq!(bus.stats().dropped, 4);
    }

    #[tokio::test(start_paused = true)]
    async fn a_publisher_waits_for_a_full_subscriber_that_makes_room_in_time() {
        let bus = Arc::new(tiny(Duration::from_secs(5)));
        let mut slow = bus.subscribe("a.b".to_owned()).await.unwrap();
        let publisher = tokio::spawn({
            let bus = bus.clone();
            async move {
                for number in 0..20 {
                    publish(&bus, number).await;
                }
            }
        });
        for number in 0..20 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert_eq!(received(&mut slow).await, number);
        }
        publisher.await.unwrap();
        assert_eq!(bus.stats().dropped, 0);
    }

    #[tokio::test]
    async fn a_dropped_subscription_leaves_nothing_behind_and_holds_nobody_back() {
        let bus = tiny(Duration::MAX);
        let subscription = bus.subscribe("a.b".to_owned()).await.unwrap();
        assert_eq!(bus.registry.subscribers.read().len(), 1);
        drop(subscription);
        assert_eq!(bus.registry.subscribers.read().len(), 0);
        for number in 0..5 {
            publish(&bus, number).await;
        }
        assert_eq!(bus.stats().dropped, 0);
    }

    #[tokio::test]
    async fn a_subscription_that_goes_while_a_publisher_waits_for_it_releases_the_publisher() {
        let bus = Arc::new(tiny(Duration::from_secs(3600)));
        let subscription = bus.subscribe("a.b".to_owned()).await.unwrap();
        publish(&bus, 0).await;
        publish(&bus, 1).await;
        let mut waiting = std::pin::pin!(publish(&bus, 2));
        assert!(waiting.as_mut().now_or_never().is_none(), "there is no room for a third message");
        drop(subscription);
        waiting.await;
        assert_eq!(bus.stats().dropped, 0);
    }

    #[tokio::test]
    async fn subscriptions_drain_and_end_when_the_bus_is_dropped() {
        let bus = tiny(Duration::MAX);
        let mut subscription = bus.subscribe("a.b".to_owned()).await.unwrap();
        publish(&bus, 7).await;
        drop(bus);
        assert_eq!(received(&mut subscription).await, 7);
        assert_eq!(subscription.recv().await, None);
        assert_eq!(subscription.try_recv(), Err(TryRecvError::Closed));
    }

    #[tokio::test]
    async fn the_number_of_subscriptions_is_bounded() {
        let bus = tiny(Duration::MAX);
        let mut held = Vec::new();
        for _ in 0..MAX_SUBSCRIPTIONS {
            held.push(bus.subscribe("a".to_owned()).await.unwrap());
        }
        let refused = bus.subscribe("a".to_owned()).await;
        assert!(matches!(refused, Err(SubscribeError::TooMany { .. })));
        held.pop();
        assert!(bus.subscribe("a".to_owned()).await.is_ok());
    }
}
