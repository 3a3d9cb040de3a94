//! Servers that come, go, stall and lose their broker, against a bucket that is a map.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// Many servers in virtual time, each looking every [`LOOK_MS`].
struct World {
    now_ms: u64,
    division: Option<u64>,
    /// Who holds a slot until when.
    slots: BTreeMap<Slot, (usize, u64)>,
    servers: Vec<Option<Server>>,
    initial: u16,
}

struct Server {
    tenant: Tenant,
    /// The last slot it took: what it takes in is this, whatever became of the lease.
    wanted: Option<Slot>,
    moves: usize,
}

fn slot(servers: u16, ordinal: u16, replica: u16) -> Slot {
    Slot::new(servers, ordinal, replica).unwrap()
}

// === impl World ===

impl World {
    fn new(initial: u16, servers: usize) -> Self {
        let mut world =
            Self { now_ms: 1_000, division: None, slots: BTreeMap::new(), servers: Vec::new(), initial };
        (0..servers).for_each(|_| world.start());
        world
    }

    fn start(&mut self) {
        let tenant = Tenant::new(self.initial, 64);
        self.servers.push(Some(Server { tenant, wanted: None, moves: 0 }));
    }

    fn kill(&mut self, server: usize) {
        self.servers[server] = None;
    }

    fn view(&mut self) -> View {
        let now_ms = self.now_ms;
        self.slots.retain(|_, (_, until_ms)| *until_ms > now_ms);
        View { division: self.division, taken: self.slots.keys().copied().collect() }
    }

    /// One look of one server, to its end.
    fn look(&mut self, number: usize) {
        for _ in 0..100 {
            let (view, now_ms) = (self.view(), self.now_ms);
            let Some(server) = self.servers[number].as_mut() else { return };
            match server.tenant.next(&view, now_ms) {
                Step::Rest | Step::Ignore(_) => return,
                Step::Found(servers) => self.division = Some(servers.into()),
                Step::Take(slot) => {
                    assert!(!self.slots.contains_key(&slot), "{slot} is free");
                    if let Some(before) = server.tenant.held() {
                        self.slots.remove(&before);
                    }
                    self.slots.insert(slot, (number, now_ms + LEASE_MS));
                    server.tenant.took(slot, now_ms);
                    server.wanted = Some(slot);
                    server.moves += 1;
                }
                Step::Renew => {
                    let held = server.tenant.held().expect("only who holds renews");
                    match self.slots.get_mut(&held) {
                        Some((holder, until_ms)) if *holder == number => {
                            *until_ms = now_ms + LEASE_MS;
                            server.tenant.took(held, now_ms);
                        }
                        _ => server.tenant.lost(),
                    }
                }
            }
        }
        panic!("server {number} does not come to rest");
    }

    /// Lets time pass; `order` rotates who looks first.
    fn pass(&mut self, ms: u64, order: usize) {
        for _ in 0..ms / LOOK_MS {
            for at in 0..self.servers.len() {
                self.look((at + order) % self.servers.len());
            }
            self.now_ms += LOOK_MS;
        }
    }

    fn wanted(&self) -> Vec<Option<Slot>> {
        self.servers.iter().flatten().map(|server| server.wanted).collect()
    }

    /// By ordinal, how many servers own it.
    fn counts(&self) -> Vec<usize> {
        let servers = self.division.unwrap() as u16;
        let owned: Vec<Slot> = self.wanted().into_iter().flatten().collect();
        (0..servers)
            .map(|ordinal| owned.iter().filter(|s| (s.servers, s.ordinal) == (servers, ordinal)).count())
            .collect()
    }
}

#[test]
fn keys_round_trip_and_nothing_else_is_a_slot() {
    let known = slot(30, 7, 1);
    assert_eq!(known.to_string(), "slot.30.7.1");
    assert_eq!(Slot::parse("slot.30.7.1"), Some(known));
    for other in
        ["division", "slot.30.7", "slot.30.7.1.1", "slot.30.30.0", "slot.30.07.1", "slot.0.0.0", "slot.a.0.0"]
    {
        assert_eq!(Slot::parse(other), None, "{other}");
    }
}

#[test]
fn servers_take_one_slot_each_in_order_and_then_replicas() {
    let mut world = World::new(2, 3);
    world.pass(LOOK_MS, 0);
    assert_eq!(world.wanted(), [Some(slot(2, 0, 0)), Some(slot(2, 1, 0)), None]);
    world.pass(LEASE_MS, 0);
    assert_eq!(world.wanted()[2], Some(slot(2, 0, 1)));
    assert!(world.servers.iter().flatten().all(|server| server.moves == 1));
}

#[test]
fn a_larger_division_moves_only_who_is_not_needed_where_it_is() {
    for order in 0..3 {
        let mut world = World::new(2, 3);
        world.pass(2 * LEASE_MS, 0);
        world.division = Some(3);
        world.pass(LOOK_MS, order);
        assert_eq!(
            world.wanted(),
            [Some(slot(3, 0, 0)), Some(slot(3, 1, 0)), Some(slot(3, 2, 0))],
            "server {order} notices first"
        );
    }
}

#[test]
fn a_server_that_starts_during_a_change_leaves_the_others_theirs() {
    let mut world = World::new(2, 2);
    world.pass(LEASE_MS, 0);
    world.division = Some(3);
    world.start();
    world.look(2);
    assert_eq!(world.wanted()[2], Some(slot(3, 2, 0)), "0 and 1 are promised to those who have them");
    world.pass(LOOK_MS, 0);
    assert_eq!(world.wanted()[..2], [Some(slot(3, 0, 0)), Some(slot(3, 1, 0))]);
}

#[test]
fn a_spare_takes_the_slot_of_a_server_that_died_when_its_lease_is_over() {
    let mut world = World::new(2, 3);
    world.pass(2 * LEASE_MS, 0);
    world.kill(1);
    world.pass(LEASE_MS - RENEW_MS - LOOK_MS, 0);
    assert_eq!(world.wanted(), [Some(slot(2, 0, 0)), Some(slot(2, 0, 1))], "its lease still holds");
    world.pass(RENEW_MS + 2 * LOOK_MS, 0);
    assert_eq!(world.wanted(), [Some(slot(2, 0, 0)), Some(slot(2, 1, 0))]);
}

#[test]
fn a_server_that_restarts_waits_for_its_own_slot_and_takes_nobody_elses() {
    let mut world = World::new(2, 2);
    world.pass(LEASE_MS, 0);
    world.kill(1);
    world.start();
    world.pass(LEASE_MS + LOOK_MS, 0);
    assert_eq!(world.wanted(), [Some(slot(2, 0, 0)), Some(slot(2, 1, 0))]);
    assert_eq!(world.servers[2].as_ref().unwrap().moves, 1);
}

#[test]
fn a_server_that_could_not_renew_takes_its_slot_back_and_changes_nothing() {
    let mut world = World::new(2, 2);
    world.pass(LEASE_MS, 0);
    // Nobody reaches the broker for a minute.
    world.now_ms += 60_000;
    world.pass(2 * RENEW_MS, 1);
    assert_eq!(world.wanted(), [Some(slot(2, 0, 0)), Some(slot(2, 1, 0))]);
}

#[test]
fn a_bucket_that_lost_everything_is_filled_from_what_servers_have() {
    let mut world = World::new(2, 3);
    world.pass(LEASE_MS, 0);
    world.division = Some(3);
    world.pass(LEASE_MS, 0);
    let before = world.wanted();
    (world.division, world.slots) = (None, BTreeMap::new());
    world.pass(2 * RENEW_MS, 2);
    assert_eq!(world.division, Some(3), "and not the 2 of the configuration");
    assert_eq!(world.wanted(), before);
}

#[test]
fn an_impossible_division_is_ignored_and_leases_go_on() {
    let mut world = World::new(2, 2);
    world.pass(LEASE_MS, 0);
    let before = world.wanted();
    for impossible in [0, 65, 70_000] {
        world.division = Some(impossible);
        world.pass(3 * LEASE_MS, 0);
        assert_eq!(world.wanted(), before);
        assert_eq!(world.slots.len(), 2);
    }
}

#[test]
fn who_finds_every_replica_taken_gets_none() {
    let taken = (0..MAX_REPLICAS).map(|replica| slot(1, 0, replica)).collect();
    let view = View { division: Some(1), taken };
    let mut tenant = Tenant::new(1, 64);
    assert_eq!([tenant.next(&view, 0), tenant.next(&view, LEASE_MS)], [Step::Rest, Step::Rest]);
}

#[derive(Clone, Debug)]
enum Event {
    Start,
    Kill(usize),
    Divide(u16),
    Pass {
        looks: u64,
        order: usize,
    },
    /// The broker is away for so long.
    Away(u64),
    Forget,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        2 => Just(Event::Start),
        2 => (0usize..12).prop_map(Event::Kill),
        2 => (1u16..7).prop_map(Event::Divide),
        4 => (1u64..20, 0usize..12).prop_map(|(looks, order)| Event::Pass { looks, order }),
        1 => (0u64..10_000).prop_map(Event::Away),
        1 => Just(Event::Forget),
    ]
}

proptest! {
    #[test]
    fn whatever_happened_the_shards_are_divided_evenly_soon_and_then_nobody_moves(
        events in proptest::collection::vec(event(), 0..30), initial in 1u16..5,
    ) {
        let mut world = World::new(initial, 1);
        for event in events {
            match event {
                Event::Start if world.servers.len() < 12 => world.start(),
                Event::Kill(server) if server < world.servers.len() => world.kill(server),
                Event::Start | Event::Kill(_) => {}
                Event::Divide(servers) => world.division = Some(servers.into()),
                Event::Pass { looks, order } => world.pass(looks * LOOK_MS, order),
                Event::Away(ms) => world.now_ms += ms,
                Event::Forget => (world.division, world.slots) = (None, BTreeMap::new()),
            }
        }
        world.start();
        world.pass(4 * LEASE_MS, 0);
        let counts = world.counts();
        let alive = world.servers.iter().flatten().count();
        prop_assert_eq!(counts.iter().sum::<usize>(), alive, "everybody has a slot of this division");
        let (most, least) = (counts.iter().max().unwrap(), counts.iter().min().unwrap());
        prop_assert!(most - least <= 1, "{:?}", counts);
        let settled = world.wanted();
        world.pass(4 * LEASE_MS, 1);
        prop_assert_eq!(world.wanted(), settled);
    }
}
