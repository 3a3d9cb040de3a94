//! Leases against real brokers: what the bucket decides, and what becomes of slots when servers or brokers go away.

use std::time::Duration;

use kvatlas_bus::leases::{FIRST_SLOT_MAX, LEASE_MS, LeaseConfig, LeaseError, LeaseStats, Slot, SlotLease};
use kvatlas_bus::test_server::{NatsCluster, NatsServer};
use kvatlas_bus::{Bus as _, NatsBus, NatsConfig};
use tokio::time::{sleep, timeout};

/// Longest wait for something that has to happen; reached only when it does not.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked for.
const POLL: Duration = Duration::from_millis(20);
const BUCKET: &str = "test-shards";

async fn connect(urls: &[String]) -> NatsBus {
    NatsBus::connect(NatsConfig::new(urls.to_vec())).await.expect("a running broker")
}

fn config(server: &str) -> LeaseConfig {
    LeaseConfig { bucket: BUCKET.into(), server: server.into(), initial_servers: 2, max_servers: 16 }
}

async fn lease(bus: &NatsBus, server: &str) -> SlotLease {
    bus.lease_slot(config(server)).await.expect("a slot")
}

fn slot(servers: u16, ordinal: u16, replica: u16) -> Slot {
    Slot::new(servers, ordinal, replica).unwrap()
}

/// What a server owns by now.
fn of(lease: &SlotLease) -> Slot {
    *lease.slot().borrow()
}

async fn until(what: &str, mut reached: impl AsyncFnMut() -> bool) {
    let waited = timeout(PATIENCE, async {
        while !reached().await {
            sleep(POLL).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("it never happened that {what}"));
}

async fn until_slot(lease: &SlotLease, expected: Slot) {
    let mut slot = lease.slot();
    let waited = timeout(PATIENCE, slot.wait_for(|slot| *slot == expected)).await;
    assert!(waited.is_ok(), "{} did not become {expected}", of(lease));
}

async fn until_stats(lease: &SlotLease, what: &str, reached: impl Fn(LeaseStats) -> bool) {
    let stats = lease.stats();
    until(what, async || reached(stats())).await;
}

#[tokio::test]
async fn servers_that_start_at_once_get_one_slot_each_and_a_resize_moves_only_who_must() {
    let Some(server) = NatsServer::start_jetstream() else { return };
    let bus = connect(&[server.url()]).await;
    let missing = bus.slots(BUCKET).await.unwrap_err();
    assert!(matches!(&missing, LeaseError::Missing { .. }), "{missing}");
    let (a, b) = tokio::join!(lease(&bus, "a"), lease(&bus, "b"));
    let mut ordinals = [of(&a).ordinal(), of(&b).ordinal()];
    ordinals.sort_unstable();
    assert_eq!((ordinals, of(&a).servers()), ([0, 1], 2));
    let slots = bus.slots(BUCKET).await.unwrap();
    let table = slots.table().await.unwrap();
    assert_eq!(table.division, Some(2));
    let holders: Vec<&str> = table.holders.iter().map(|(_, holder)| holder.as_str()).collect();
    assert!(holders == ["a", "b"] || holders == ["b", "a"], "{table:?}");

    slots.divide(3).await.unwrap();
    for lease in [&a, &b] {
        until_slot(lease, slot(3, of(lease).ordinal(), 0)).await;
    }
    let c = lease(&bus, "c").await;
    assert_eq!(of(&c), slot(3, 2, 0), "a slot that nobody has is not waited for");
    slots.divide(1).await.unwrap();
    for lease in [&a, &b, &c] {
        let mut now = lease.slot();
        timeout(PATIENCE, now.wait_for(|slot| slot.servers() == 1)).await.expect("in time").unwrap();
    }
    let mut replicas: Vec<u16> = [&a, &b, &c].map(|lease| of(lease).replica()).into();
    replicas.sort_unstable();
    assert_eq!(replicas, [0, 1, 2]);
    until("nothing of the old divisions is left", async || {
        slots.table().await.unwrap().holders.iter().all(|(slot, _)| slot.servers() == 1)
    })
    .await;
}

#[tokio::test]
async fn a_slot_given_up_is_free_at_once_and_one_of_a_dead_server_when_its_lease_is_over() {
    let Some(server) = NatsServer::start_jetstream() else { return };
    let bus = connect(&[server.url()]).await;
    let (a, b) = (lease(&bus, "a").await, lease(&bus, "b").await);
    let spare = lease(&bus, "spare").await;
    assert_eq!(of(&spare), slot(2, 0, 1));
    // Aborted, as with a process that is killed: nothing is given up.
    drop(b);
    let slots = bus.slots(BUCKET).await.unwrap();
    assert!(slots.table().await.unwrap().holders.iter().any(|(_, holder)| holder == "b"));
    until_slot(&spare, slot(2, 1, 0)).await;
    let stats = (spare.stats())();
    assert!(stats.held && stats.taken == 2 && stats.renewed > 0 && stats.lost == 0, "{stats:?}");

    a.shutdown().await;
    let holders = slots.table().await.unwrap().holders;
    assert_eq!(holders, [(slot(2, 1, 0), "spare".to_owned())]);
    let next = timeout(Duration::from_millis(LEASE_MS), lease(&bus, "next")).await;
    assert_eq!(of(&next.expect("without a wait for a lease")), slot(2, 0, 0));
}

#[tokio::test]
async fn a_broker_that_is_away_changes_nothing_and_one_that_lost_everything_is_told_again() {
    let Some(mut server) = NatsServer::start_jetstream() else { return };
    let bus = connect(&[server.url()]).await;
    let (a, b) = (lease(&bus, "a").await, lease(&bus, "b").await);
    let slots = bus.slots(BUCKET).await.unwrap();
    slots.divide(3).await.unwrap();
    for (lease, ordinal) in [(&a, 0), (&b, 1)] {
        until_slot(lease, slot(3, ordinal, 0)).await;
    }
    server.stop();
    for lease in [&a, &b] {
        until_stats(lease, "a look fails", |stats| stats.failed > 0).await;
    }
    // Longer than a lease, so that the broker has ended all of them when it is back.
    sleep(Duration::from_millis(LEASE_MS + 500)).await;
    assert_eq!([of(&a), of(&b)], [slot(3, 0, 0), slot(3, 1, 0)]);
    // Its folder is emptied: it comes back without the bucket.
    server.forget();
    server.restart();
    until("the bucket is what it was", async || {
        let Ok(slots) = bus.slots(BUCKET).await else { return false };
        let Ok(table) = slots.table().await else { return false };
        let holders = [(slot(3, 0, 0), "a".to_owned()), (slot(3, 1, 0), "b".to_owned())];
        table.division == Some(3) && table.holders == holders
    })
    .await;
    assert_eq!([of(&a), of(&b)], [slot(3, 0, 0), slot(3, 1, 0)]);
}

#[tokio::test]
async fn a_division_outlives_a_restart_of_everything() {
    let Some(mut server) = NatsServer::start_jetstream() else { return };
    let bus = connect(&[server.url()]).await;
    let a = lease(&bus, "a").await;
    bus.slots(BUCKET).await.unwrap().divide(5).await.unwrap();
    until_slot(&a, slot(5, 0, 0)).await;
    a.shutdown().await;
    server.restart();
    let bus = connect(&[server.url()]).await;
    assert_eq!(of(&lease(&bus, "a2").await), slot(5, 0, 0), "and not one of the configured 2");
}

#[tokio::test]
async fn what_cannot_work_is_said_at_once() {
    let Some(server) = NatsServer::start() else { return };
    let bus = connect(&[server.url()]).await;
    let without = timeout(FIRST_SLOT_MAX, bus.lease_slot(config("a"))).await.expect("not waited for");
    let text = without.unwrap_err().to_string();
    assert!(text.contains("-js") && text.contains("--shard-ordinal"), "{text}");
    for name in ["", "a b", "a.b"] {
        let refused = bus.lease_slot(config(name)).await.unwrap_err();
        assert!(matches!(refused, LeaseError::Name { what: "server", .. }), "{refused}");
        assert!(bus.slots(name).await.is_err());
    }
}

#[tokio::test]
async fn a_bucket_whose_entries_never_end_is_refused() {
    let Some(server) = NatsServer::start_jetstream() else { return };
    let client = async_nats::connect(server.url()).await.unwrap();
    let foreign = async_nats::jetstream::stream::Config {
        name: format!("KV_{BUCKET}"),
        subjects: vec![format!("$KV.{BUCKET}.>")],
        ..Default::default()
    };
    async_nats::jetstream::new(client).create_stream(foreign).await.unwrap();
    let bus = connect(&[server.url()]).await;
    let refused = bus.lease_slot(config("a")).await.unwrap_err();
    assert!(matches!(refused, LeaseError::NoExpiry { .. }), "{refused}");
}

#[tokio::test]
async fn a_cluster_of_brokers_keeps_the_leases_when_one_of_them_dies() {
    let Some(mut cluster) = NatsCluster::start(3) else { return };
    let urls = cluster.urls();
    assert_eq!(urls.len(), 3);
    let bus = connect(&urls).await;
    let (a, b) = (lease(&bus, "a").await, lease(&bus, "b").await);
    let client = async_nats::connect(urls[0].as_str()).await.unwrap();
    let stream = async_nats::jetstream::new(client).get_stream(format!("KV_{BUCKET}")).await.unwrap();
    assert_eq!(stream.cached_info().config.num_replicas, 3);
    for node in 0..3 {
        cluster.kill(node);
        let renewed = (a.stats())().renewed;
        until("the others take a division", async || {
            // A division of the same number of servers: nothing has to move.
            let Ok(slots) = bus.slots(BUCKET).await else { return false };
            slots.divide(2).await.is_ok()
        })
        .await;
        until_stats(&a, "leases are renewed without the broker", |stats| stats.renewed > renewed + 1).await;
        cluster.restart(node);
    }
    assert!(bus.stats().connected);
    cluster.restart_all();
    let renewed = (b.stats())().renewed;
    until_stats(&b, "leases are renewed after all restarted", |stats| stats.renewed > renewed).await;
    assert_eq!([of(&a), of(&b)], [slot(2, 0, 0), slot(2, 1, 0)], "nobody ever moved");
}
