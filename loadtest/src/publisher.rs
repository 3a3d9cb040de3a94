//! Publishes a simulated engine's batches as vLLM's publisher does: `[topic, sequence, payload]`, the sequence counting
//! from 0 in each life, and a replay socket that answers from a bounded buffer.
//!
//! Losses that engines have can be asked for ([`Delivery`]), and a restart ([`EnginePublisher::restart`]).

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;

use crate::replay::{DEFAULT_BUFFER_STEPS, ReplayBuffer, ReplayFraming};
use crate::sockets::{
    BindError, NoSubscriberError, SendError, SocketCounts, StreamEndpoints, StreamPorts, StreamSockets,
};
use crate::wire::{Batch, MapVersion, WireForm};

/// How an engine publishes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublisherConfig {
    /// Topic of every message.
    pub topic: String,
    /// How events are written.
    pub form: WireForm,
    /// How replay replies are framed.
    pub framing: ReplayFraming,
    /// Batches that a replay can reach back.
    pub buffer_steps: usize,
    /// Ports to bind; 0 for any.
    pub ports: StreamPorts,
}

/// What becomes of a batch. Its sequence number is spent in every case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// It is sent and kept for replays.
    Sent,
    /// Subscribers miss it; a replay has it.
    Missed,
    /// It could not be encoded: neither the stream nor a replay ever has it.
    Lost,
}

/// Publishes for one engine.
#[derive(Debug)]
pub struct EnginePublisher {
    config: PublisherConfig,
    topic: Bytes,
    next_seq: u64,
    buffer: Arc<Mutex<ReplayBuffer>>,
    sockets: StreamSockets,
}

// === impl PublisherConfig ===

impl Default for PublisherConfig {
    /// As the newest vLLM does it, on any free ports.
    fn default() -> Self {
        Self {
            topic: String::new(),
            form: WireForm::Map(MapVersion::V0_33),
            framing: ReplayFraming::WithTopic,
            buffer_steps: DEFAULT_BUFFER_STEPS,
            ports: StreamPorts::default(),
        }
    }
}

// === impl EnginePublisher ===

impl EnginePublisher {
    /// Binds the sockets on 127.0.0.1.
    pub async fn bind(config: PublisherConfig) -> Result<Self, BindError> {
        let topic = Bytes::from(config.topic.clone());
        let buffer = ReplayBuffer::new(topic.clone(), config.framing, config.buffer_steps);
        let buffer = Arc::new(Mutex::new(buffer));
        let sockets = StreamSockets::bind(config.ports, Arc::clone(&buffer)).await?;
        Ok(Self { config, topic, next_seq: 0, buffer, sockets })
    }

    /// Where the sockets are.
    pub fn endpoints(&self) -> &StreamEndpoints {
        self.sockets.endpoints()
    }

    /// What the sockets did since they were last bound.
    pub fn counts(&self) -> SocketCounts {
        self.sockets.counts()
    }

    /// Sequence number of the next batch.
    pub fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// Waits until `expected` subscriptions have arrived since the sockets were last bound.
    pub async fn wait_for_subscribers(
        &self,
        expected: usize,
        wait: Duration,
    ) -> Result<(), NoSubscriberError> {
        self.sockets.wait_for_subscribers(expected, wait).await
    }

    /// Publishes a batch and returns its sequence number. Waits for slow subscribers instead of dropping.
    pub async fn publish(&mut self, batch: &Batch) -> Result<u64, SendError> {
        self.deliver(batch, Delivery::Sent).await
    }

    /// Publishes a batch, or pretends to.
    pub async fn deliver(&mut self, batch: &Batch, delivery: Delivery) -> Result<u64, SendError> {
        let seq = self.next_seq;
        self.next_seq += 1;
        if delivery == Delivery::Lost {
            return Ok(seq);
        }
        let payload = Bytes::from(batch.encode(self.config.form));
        self.buffer.lock().push(seq, payload.clone());
        if delivery == Delivery::Sent {
            let seq_frame = Bytes::copy_from_slice(&seq.to_be_bytes());
            self.sockets.send(vec![self.topic.clone(), seq_frame, payload]).await?;
        }
        Ok(seq)
    }

    /// Ends this life and starts another on the same ports: connections drop, the sequence is 0 again, the buffer empty.
    pub async fn restart(self) -> Result<Self, BindError> {
        let ports = self.sockets.endpoints().ports;
        self.sockets.close().await;
        Self::bind(PublisherConfig { ports, ..self.config }).await
    }

    /// Closes the sockets and waits until the ports are free.
    pub async fn close(self) {
        self.sockets.close().await;
    }
}

#[cfg(test)]
mod tests {
    use zeromq::{DealerSocket, Socket, SocketRecv, SocketSend, SubSocket, ZmqMessage};

    use super::*;
    use crate::kvrec::END_OF_REPLAY;
    use crate::wire::Event;

    /// Long enough for a busy machine; no test expects it to pass.
    const WAIT: Duration = Duration::from_secs(20);

    fn batch(number: u64) -> Batch {
        Batch { time_s: number as f64, events: vec![Event::Cleared], rank: 0 }
    }

    async fn subscriber(publisher: &EnginePublisher, topic: &str) -> SubSocket {
        let mut socket = SubSocket::new();
        socket.connect(&publisher.endpoints().events).await.unwrap();
        socket.subscribe(topic).await.unwrap();
        socket
    }

    async fn receive(socket: &mut SubSocket) -> (u64, Bytes) {
        let message = tokio::time::timeout(WAIT, socket.recv()).await.unwrap().unwrap();
        let frames = message.into_vec();
        assert_eq!(frames.len(), 3);
        (u64::from_be_bytes(frames[1].as_ref().try_into().unwrap()), frames[2].clone())
    }

    async fn replay(publisher: &EnginePublisher, start: u64) -> Vec<Vec<Bytes>> {
        let mut socket = DealerSocket::new();
        socket.connect(&publisher.endpoints().replay).await.unwrap();
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

    fn replayed_seqs(messages: &[Vec<Bytes>]) -> Vec<u64> {
        let seq =
            |frames: &Vec<Bytes>| u64::from_be_bytes(frames[frames.len() - 2].as_ref().try_into().unwrap());
        messages[..messages.len() - 1].iter().map(seq).collect()
    }

    #[tokio::test]
    async fn a_subscriber_that_was_waited_for_gets_every_batch_in_order() {
        let config = PublisherConfig { topic: "kv@pod@model".into(), ..Default::default() };
        let mut publisher = EnginePublisher::bind(config).await.unwrap();
        let mut socket = subscriber(&publisher, "kv@").await;
        publisher.wait_for_subscribers(1, WAIT).await.unwrap();
        for number in 0..300 {
            assert_eq!(publisher.publish(&batch(number)).await.unwrap(), number);
        }
        for number in 0..300 {
            let expected = batch(number).encode(WireForm::Map(MapVersion::V0_33));
            assert_eq!(receive(&mut socket).await, (number, Bytes::from(expected)));
        }
        publisher.close().await;
    }

    #[tokio::test]
    async fn nothing_is_dropped_for_a_subscriber_that_reads_late() {
        let mut publisher = EnginePublisher::bind(PublisherConfig::default()).await.unwrap();
        let mut socket = subscriber(&publisher, "").await;
        publisher.wait_for_subscribers(1, WAIT).await.unwrap();
        // 16 MB, more than the connection's buffers hold: the sender must wait for the reader.
        let events = vec![Event::Cleared; 4_000];
        let sender = tokio::spawn(async move {
            for number in 0..200 {
                let large = Batch { time_s: f64::from(number), events: events.clone(), rank: 0 };
                publisher.publish(&large).await.unwrap();
            }
            publisher
        });
        for number in 0..200 {
            assert_eq!(receive(&mut socket).await.0, number);
        }
        sender.await.unwrap().close().await;
    }

    #[tokio::test]
    async fn missed_batches_are_replayed_and_lost_ones_never_come() {
        for framing in [ReplayFraming::WithTopic, ReplayFraming::WithoutTopic] {
            let config = PublisherConfig { framing, topic: "t".into(), ..Default::default() };
            let mut publisher = EnginePublisher::bind(config).await.unwrap();
            let mut socket = subscriber(&publisher, "").await;
            publisher.wait_for_subscribers(1, WAIT).await.unwrap();
            let deliveries = [Delivery::Sent, Delivery::Missed, Delivery::Lost, Delivery::Sent];
            for (number, delivery) in (0..).zip(deliveries) {
                publisher.deliver(&batch(number), delivery).await.unwrap();
            }
            assert_eq!([receive(&mut socket).await.0, receive(&mut socket).await.0], [0, 3]);
            let messages = replay(&publisher, 1).await;
            assert_eq!(replayed_seqs(&messages), [1, 3]);
            let frames = if framing == ReplayFraming::WithTopic { 4 } else { 3 };
            assert!(messages.iter().all(|message| message.len() == frames && message[0].is_empty()));
            publisher.close().await;
        }
    }

    #[tokio::test]
    async fn a_replay_reaches_back_as_far_as_the_buffer() {
        let config = PublisherConfig { buffer_steps: 5, ..Default::default() };
        let mut publisher = EnginePublisher::bind(config).await.unwrap();
        for number in 0..20 {
            publisher.publish(&batch(number)).await.unwrap();
        }
        assert_eq!(replayed_seqs(&replay(&publisher, 0).await), [15, 16, 17, 18, 19]);
        assert_eq!(replayed_seqs(&replay(&publisher, 99).await), [0; 0]);
        assert_eq!(publisher.counts().replays, 2);
        publisher.close().await;
    }

    #[tokio::test]
    async fn a_request_that_is_no_replay_request_is_counted_and_not_answered() {
        let publisher = EnginePublisher::bind(PublisherConfig::default()).await.unwrap();
        let mut socket = DealerSocket::new();
        socket.connect(&publisher.endpoints().replay).await.unwrap();
        socket.send(ZmqMessage::from(Bytes::from_static(b"hello"))).await.unwrap();
        assert!(replay(&publisher, 0).await.len() == 1);
        let mut counts = publisher.counts();
        for _ in 0..1_000 {
            if counts.bad_requests == 1 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
            counts = publisher.counts();
        }
        assert_eq!((counts.replays, counts.bad_requests), (1, 1));
        publisher.close().await;
    }

    #[tokio::test]
    async fn a_restart_keeps_the_ports_and_begins_at_zero_with_an_empty_buffer() {
        let mut publisher = EnginePublisher::bind(PublisherConfig::default()).await.unwrap();
        publisher.publish(&batch(0)).await.unwrap();
        let before = publisher.endpoints().clone();
        let mut publisher = publisher.restart().await.unwrap();
        assert_eq!(publisher.endpoints(), &before);
        assert!(replayed_seqs(&replay(&publisher, 0).await).is_empty());
        assert_eq!(publisher.publish(&batch(0)).await.unwrap(), 0);
        publisher.close().await;
    }

    #[tokio::test]
    async fn a_subscriber_that_does_not_come_is_reported() {
        let publisher = EnginePublisher::bind(PublisherConfig::default()).await.unwrap();
        let error = publisher.wait_for_subscribers(1, Duration::from_millis(1)).await.unwrap_err();
        assert!(error.to_string().contains("0 of 1"), "{error}");
        publisher.close().await;
    }
}
