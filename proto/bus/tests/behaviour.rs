//! What every bus promises, run against each implementation; over NATS against a real server, with two connections.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kvatlas_bus::test_server::NatsServer;
use kvatlas_bus::{
    Bus, BusMessage, InProcessBus, InProcessConfig, NatsBus, NatsConfig, PublishError, SubscribeError,
    Subscription, TryRecvError,
};
use tokio::time::timeout;

/// Longest wait for something that has to happen; reached only when it does not.
const PATIENCE: Duration = Duration::from_secs(20);

/// One bus seen from two places.
struct Fixture {
    here: Arc<dyn Bus>,
    there: Arc<dyn Bus>,
    _server: Option<NatsServer>,
}

/// Runs each rule as a test of its own against each implementation, so that a failure names both.
macro_rules! every_bus_keeps {
    ($($rule:ident),+ $(,)?) => {
        mod in_process {
            $(#[tokio::test]
            async fn $rule() {
                super::$rule(super::in_process()).await;
            })+
        }
        mod nats {
            $(#[tokio::test]
            async fn $rule() {
                if let Some(fixture) = super::nats().await {
                    super::$rule(fixture).await;
                }
            })+
        }
    };
}

every_bus_keeps!(
    one_publishers_messages_arrive_in_order,
    a_request_carries_the_subject_for_its_answers,
    filters_select_by_words,
    every_subscriber_gets_every_message,
    each_message_goes_to_one_member_of_a_group,
    a_message_after_subscribe_returned_is_delivered,
    nothing_published_before_is_delivered,
    an_unsubscribed_filter_costs_the_others_nothing,
    messages_over_the_limit_are_refused_and_counted,
    unusable_subjects_and_filters_are_refused,
    empty_and_binary_payloads_arrive_unchanged,
    try_recv_tells_empty_from_message,
);

// === fixtures ===

fn in_process() -> Fixture {
    let bus: Arc<dyn Bus> = Arc::new(InProcessBus::new(InProcessConfig::default()));
    Fixture { here: bus.clone(), there: bus, _server: None }
}

async fn nats() -> Option<Fixture> {
    let server = NatsServer::start()?;
    let connect = || async {
        let bus = NatsBus::connect(NatsConfig::new([server.url()])).await.expect("a running server");
        Arc::new(bus) as Arc<dyn Bus>
    };
    Some(Fixture { here: connect().await, there: connect().await, _server: Some(server) })
}

async fn subscribe(bus: &Arc<dyn Bus>, filter: &str) -> Subscription {
    bus.subscribe(filter.to_owned()).await.expect("a usable filter")
}

async fn publish(bus: &Arc<dyn Bus>, subject: &str, payload: &str) {
    let payload = Bytes::copy_from_slice(payload.as_bytes());
    bus.publish(subject.to_owned(), payload).await.expect("a usable message");
}

async fn receive(subscription: &mut Subscription) -> BusMessage {
    let message = timeout(PATIENCE, subscription.recv()).await.expect("a message in time");
    message.expect("an open bus")
}

/// The payloads up to the message `end`: since order is kept, nothing that was to arrive before it is still on its way.
async fn payloads_until_end(subscription: &mut Subscription) -> Vec<String> {
    let mut seen = Vec::new();
    loop {
        let payload = String::from_utf8(receive(subscription).await.payload.to_vec()).expect("text");
        if payload == "end" {
            return seen;
        }
        seen.push(payload);
    }
}

// === rules ===

async fn one_publishers_messages_arrive_in_order(bus: Fixture) {
    const MESSAGES: usize = 3000;
    let mut subscription = subscribe(&bus.there, "order.*").await;
    let publishers = ["a", "b"].map(|name| {
        let bus = bus.here.clone();
        tokio::spawn(async move {
            for number in 0..MESSAGES {
                publish(&bus, &format!("order.{name}"), &number.to_string()).await;
            }
        })
    });
    let mut next = std::collections::HashMap::from([("order.a".to_owned(), 0), ("order.b".to_owned(), 0)]);
    for _ in 0..2 * MESSAGES {
        let message = receive(&mut subscription).await;
        let expected = next.get_mut(&message.subject).expect("one of the two publishers");
        assert_eq!(message.payload, expected.to_string(), "{}", message.subject);
        *expected += 1;
    }
    for publisher in publishers {
        publisher.await.unwrap();
    }
    assert_eq!(bus.here.stats().published, 2 * MESSAGES as u64);
    assert_eq!(bus.there.stats().dropped, 0);
}

async fn a_request_carries_the_subject_for_its_answers(bus: Fixture) {
    let mut requests = subscribe(&bus.there, "ask.*").await;
    let mut answers = subscribe(&bus.here, "answers.me.>").await;
    let request = BusMessage {
        subject: "ask.it".to_owned(),
        reply: Some("answers.me.7".to_owned()),
        payload: Bytes::from_static(b"?"),
    };
    bus.here.send(request.clone()).await.expect("a usable message");
    assert_eq!(receive(&mut requests).await, request);
    for answer in ["one", "two", "end"] {
        publish(&bus.there, request.reply.as_deref().unwrap(), answer).await;
    }
    assert_eq!(payloads_until_end(&mut answers).await, ["one", "two"]);
    let wild = BusMessage { reply: Some("answers.*".to_owned()), ..request };
    assert!(bus.here.send(wild).await.is_err(), "an answer needs one subject");
}

async fn filters_select_by_words(bus: Fixture) {
    let subjects = ["f.a", "f.a.b", "f.a.b.c", "f.x.b", "f", "g.a.b"];
    for (filter, expected) in [
        ("f.a", vec!["f.a"]),
        ("f.a.b", vec!["f.a.b"]),
        ("f.*", vec!["f.a"]),
        ("f.*.b", vec!["f.a.b", "f.x.b"]),
        ("*.a.*", vec!["f.a.b", "g.a.b"]),
        ("f.>", vec!["f.a", "f.a.b", "f.a.b.c", "f.x.b"]),
        (">", subjects.to_vec()),
    ] {
        let mut subscription = subscribe(&bus.there, filter).await;
        for subject in subjects {
            publish(&bus.here, subject, subject).await;
        }
        publish(&bus.here, expected[0], "end").await;
        assert_eq!(payloads_until_end(&mut subscription).await, expected, "{filter}");
    }
}

async fn every_subscriber_gets_every_message(bus: Fixture) {
    // The same filter twice on one connection, an overlapping one, and one on the publisher's own connection.
    let mut subscriptions = [
        subscribe(&bus.there, "all.a").await,
        subscribe(&bus.there, "all.a").await,
        subscribe(&bus.there, "all.>").await,
        subscribe(&bus.here, "all.*").await,
    ];
    for payload in ["1", "2", "3", "end"] {
        publish(&bus.here, "all.a", payload).await;
    }
    for subscription in &mut subscriptions {
        assert_eq!(payloads_until_end(subscription).await, ["1", "2", "3"]);
    }
}

async fn each_message_goes_to_one_member_of_a_group(fixture: Fixture) {
    let join = || async {
        let group = "group".to_owned();
        fixture.there.subscribe_group("a.b".to_owned(), group).await.expect("a usable filter")
    };
    let (mut first, mut second, mut outside) =
        (join().await, join().await, subscribe(&fixture.there, "a.b").await);
    for n in 0..100 {
        publish(&fixture.here, "a.b", &n.to_string()).await;
    }
    let mut seen = 0;
    for _ in 0..100 {
        let message = timeout(PATIENCE, async {
            tokio::select! {
                message = first.recv() => message,
                message = second.recv() => message,
            }
        });
        seen += usize::from(message.await.expect("a message for the group").is_some());
        timeout(PATIENCE, outside.recv()).await.expect("a message for who is outside").expect("an open bus");
    }
    assert_eq!(seen, 100);
    assert_eq!(first.try_recv(), Err(TryRecvError::Empty));
    assert_eq!(second.try_recv(), Err(TryRecvError::Empty));
}

async fn a_message_after_subscribe_returned_is_delivered(bus: Fixture) {
    for round in 0..100 {
        let mut subscription = subscribe(&bus.there, &format!("prompt.{round}")).await;
        publish(&bus.here, &format!("prompt.{round}"), "hello").await;
        assert_eq!(receive(&mut subscription).await.payload, "hello");
    }
}

async fn nothing_published_before_is_delivered(bus: Fixture) {
    // One connection, whose messages the broker handles in order: the first is handled before the subscription.
    publish(&bus.here, "before.a", "early").await;
    let mut subscription = subscribe(&bus.here, "before.a").await;
    publish(&bus.here, "before.a", "end").await;
    assert!(payloads_until_end(&mut subscription).await.is_empty());
}

async fn an_unsubscribed_filter_costs_the_others_nothing(bus: Fixture) {
    let gone = subscribe(&bus.there, "gone.>").await;
    let mut stays = subscribe(&bus.there, "gone.a").await;
    publish(&bus.here, "gone.a", "1").await;
    drop(gone);
    publish(&bus.here, "gone.a", "2").await;
    publish(&bus.here, "gone.a", "end").await;
    assert_eq!(payloads_until_end(&mut stays).await, ["1", "2"]);
    let mut again = subscribe(&bus.there, "gone.>").await;
    publish(&bus.here, "gone.b", "end").await;
    assert!(payloads_until_end(&mut again).await.is_empty(), "a new subscription is not the old one");
}

async fn messages_over_the_limit_are_refused_and_counted(bus: Fixture) {
    // Both have a limit of 1 MiB by default.
    const LIMIT: usize = 1024 * 1024;
    let mut subscription = subscribe(&bus.there, "large").await;
    let refused = bus.here.publish("large".to_owned(), vec![0; LIMIT + 1].into()).await;
    let Err(PublishError::TooLarge(error)) = refused else { panic!("{refused:?}") };
    assert_eq!((error.bytes, error.max_bytes), (LIMIT + 1, LIMIT));
    assert_eq!((bus.here.stats().refused, bus.here.stats().published), (1, 0));
    bus.here.publish("large".to_owned(), vec![7; LIMIT].into()).await.expect("the limit itself");
    assert_eq!(receive(&mut subscription).await.payload, vec![7; LIMIT]);
    assert!(bus.here.stats().connected, "a refused message does not cost the connection");
}

async fn unusable_subjects_and_filters_are_refused(bus: Fixture) {
    for subject in ["", "a b", "a..b", "a.*", "a.>", "a\r\nPUB b 0"] {
        let outcome = bus.here.publish(subject.to_owned(), Bytes::new()).await;
        assert!(matches!(outcome, Err(PublishError::InvalidSubject(_))), "{subject:?}");
    }
    for filter in ["", "a b", ".a", ">.a"] {
        let outcome = bus.here.subscribe(filter.to_owned()).await;
        assert!(matches!(outcome, Err(SubscribeError::InvalidFilter(_))), "{filter:?}");
    }
    assert_eq!(bus.here.stats().refused, 6);
}

async fn empty_and_binary_payloads_arrive_unchanged(bus: Fixture) {
    let mut subscription = subscribe(&bus.there, "bytes").await;
    let every_byte: Vec<u8> = (0..=255).collect();
    for payload in [Vec::new(), b"\r\nPUB x 3\r\nabc\r\n".to_vec(), every_byte] {
        bus.here.publish("bytes".to_owned(), payload.clone().into()).await.expect("a usable message");
        let message = receive(&mut subscription).await;
        assert_eq!((message.subject.as_str(), message.payload), ("bytes", payload.into()));
    }
}

async fn try_recv_tells_empty_from_message(bus: Fixture) {
    let mut subscription = subscribe(&bus.there, "try").await;
    assert_eq!(subscription.try_recv(), Err(TryRecvError::Empty));
    publish(&bus.here, "try", "1").await;
    bus.here.flush().await.expect("a running broker");
    let message = timeout(PATIENCE, async {
        loop {
            match subscription.try_recv() {
                Ok(message) => return message,
                Err(error) => assert_eq!(error, TryRecvError::Empty),
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    assert_eq!(message.await.expect("a message in time").payload, "1");
}
