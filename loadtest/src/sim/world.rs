//! The simulated world: virtual time, engines, links, processes, and what happens next. One thread, no clock: the only
//! time is that of the event that is handled.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use bytes::Bytes;
use kvatlas_proto::Partition;

use super::bus::{Bus, Kind};
use super::engine::Engine;
use super::index_side::IndexProcess;
use super::log::Log;
use super::op::{Op, Process, Scenario};
use super::reference::Reference;
use super::rng::Rng;
use super::shim_side::ShimProcess;
use super::{Counts, Failure, Sabotage};

/// Least and most time until a broken engine link is there again once nothing is in the way, microseconds.
const RECONNECT_US: (u64, u64) = (20_000, 100_000);
/// Time of a message from an engine to its shim, microseconds.
const ENGINE_LATENCY_US: (u64, u64) = (50, 300);

/// Everything.
pub(super) struct World {
    pub(super) now_us: u64,
    pub(super) seed: u64,
    pub(super) log: Log,
    pub(super) counts: Counts,
    pub(super) failure: Option<Failure>,
    pub(super) sabotage: Sabotage,
    pub(super) files: bool,
    pub(super) small_buffers: bool,
    /// How the key space is cut.
    pub(super) partition: Partition,
    pub(super) engines: Vec<EngineSide>,
    pub(super) shims: Vec<ShimProcess>,
    pub(super) indexes: Vec<IndexProcess>,
    pub(super) bus: Bus,
    pub(super) reference: Reference,
    /// A clock was set back: a source may be taken for an older life until its lease has ended.
    pub(super) clock_went_back: bool,
    /// Since when there are no faults any more.
    pub(super) quiet_since_us: Option<u64>,
    rng: Rng,
    /// What happens to processes that stand still, once they go on.
    waiting: BTreeMap<Process, Vec<Event>>,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    events: BTreeMap<(u64, u64), Event>,
    scheduled: u64,
}

/// An engine with its sockets.
pub(super) struct EngineSide {
    pub(super) engine: Engine,
    alive: bool,
    link: Link,
    /// The replay socket does not answer until then.
    pub(super) replay_away_until_us: u64,
}

/// The event socket's connection.
#[derive(Default)]
struct Link {
    up: bool,
    /// Messages of an earlier connection do not arrive any more.
    connection: u64,
    cut_until_us: u64,
    /// Messages to drop.
    losing: usize,
    last_us: u64,
}

/// What can happen next. `life` is the life of the process it is meant for: it does not happen to another one.
pub(super) enum Event {
    /// A step of the scenario.
    Step(Op),
    /// The engine process begins another life.
    EngineStarts { engine: usize },
    /// An attempt to connect.
    LinkUp { engine: usize },
    /// The shim hears of its connection.
    EngineConnected { engine: usize, connection: u64 },
    /// A message arrives at the shim's socket.
    EngineMessage { engine: usize, connection: u64, seq: u64, payload: Bytes },
    /// A replay request arrives at the engine.
    ReplayAsked { shim: usize, life: u32, from: u64 },
    /// A replay ends; `None` if nothing answered.
    ReplayEnds { shim: usize, life: u32, from: u64, messages: Option<Vec<(u64, Bytes)>> },
    /// Waiting changes are to be published.
    Flush { shim: usize, life: u32 },
    /// A restored state is to be confirmed.
    Prove { shim: usize, life: u32 },
    /// A heartbeat is due.
    Heartbeat { shim: usize, life: u32, at_us: u64 },
    /// The bus delivers to a shim.
    ToShim { shim: usize, life: u32, index: usize, kind: Kind, payload: Bytes },
    /// The bus delivers to an index.
    ToIndex { index: usize, life: u32, shim: usize, kind: Kind, payload: Bytes },
    /// An index looks what it has to ask.
    Poll { index: usize, life: u32 },
    /// An index is to own what it is said to own.
    Own { index: usize, life: u32 },
    /// An index looks at its leases.
    Tick { index: usize, life: u32 },
    /// A process writes its file.
    Save { process: Process, life: u32 },
    /// A process that stood still goes on.
    GoesOn { process: Process },
    /// A killed process starts.
    Starts { process: Process, life: u32 },
}

// === impl EngineSide ===

impl EngineSide {
    pub(super) fn is_up(&self) -> bool {
        self.link.up
    }

    fn is_connected(&self, connection: u64) -> bool {
        self.link.up && self.link.connection == connection
    }
}

// === impl World ===

impl World {
    pub(super) fn new(scenario: &Scenario, sabotage: Sabotage, trace: bool) -> Self {
        let config = &scenario.world;
        let (seed, partition) = (config.seed, config.partition());
        let mut world = Self {
            now_us: 0,
            seed,
            log: Log::new(trace),
            counts: Counts::default(),
            failure: None,
            sabotage,
            files: config.files,
            small_buffers: config.small_buffers,
            partition,
            engines: (0..config.engines)
                .map(|_| EngineSide {
                    engine: Engine::new(config.device_blocks, config.host_blocks, config.replay_messages),
                    alive: true,
                    link: Link::default(),
                    replay_away_until_us: 0,
                })
                .collect(),
            shims: (0..config.engines).map(|_| ShimProcess::default()).collect(),
            indexes: (0..config.indexes).map(|_| IndexProcess::default()).collect(),
            bus: Bus::new(seed, config.engines, config.indexes),
            reference: Reference::new(config.engines, partition),
            clock_went_back: false,
            quiet_since_us: None,
            rng: Rng::new(seed, "world", 0),
            waiting: BTreeMap::new(),
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            scheduled: 0,
        };
        for shim in 0..config.engines {
            world.start_shim(shim);
        }
        for index in 0..config.indexes {
            world.indexes[index].wanted = config.first_set(index).shards(partition).into_iter().collect();
            world.start_index(index);
        }
        for step in &scenario.steps {
            world.at(step.at_ms * 1_000, Event::Step(step.op.clone()));
        }
        world
    }

    /// Lets something happen at a time, which is not past.
    pub(super) fn at(&mut self, at_us: u64, event: Event) {
        let key = (at_us.max(self.now_us), self.scheduled);
        self.scheduled += 1;
        self.queue.push(Reverse(key));
        self.events.insert(key, event);
    }

    /// Lets something happen after a while.
    pub(super) fn after(&mut self, wait_us: u64, event: Event) {
        self.at(self.now_us + wait_us, event);
    }

    /// Lets everything happen up to a time, or up to the first failure.
    pub(super) fn run_until(&mut self, until_us: u64) {
        while self.failure.is_none() {
            let Some(Reverse(key)) = self.queue.peek().copied().filter(|Reverse((at, _))| *at <= until_us)
            else {
                self.now_us = until_us;
                return;
            };
            self.queue.pop();
            let Some(event) = self.events.remove(&key) else { continue };
            self.now_us = key.0;
            self.handle(event);
        }
    }

    /// A number between two.
    pub(super) fn between(&mut self, (low, high): (u64, u64)) -> u64 {
        self.rng.between(low, high)
    }

    /// Something is not as it must be: the simulation ends here.
    pub(super) fn fail(&mut self, rule: &'static str, what: String) {
        if self.failure.is_none() {
            self.log.line(self.now_us, format_args!("FAILED {rule}: {what}"));
            self.failure = Some(Failure { rule, at_us: self.now_us, what });
        }
    }

    fn handle(&mut self, event: Event) {
        if let Some(process) = receiver(&event).filter(|process| self.stands_still(*process)) {
            self.waiting.entry(process).or_default().push(event);
            return;
        }
        match event {
            Event::GoesOn { process } => self.go_on(process),
            Event::Step(op) => self.step(&op),
            Event::EngineStarts { engine } => self.start_engine(engine),
            Event::LinkUp { engine } => self.link_up(engine),
            Event::EngineConnected { engine, connection }
                if self.engines[engine].is_connected(connection) =>
            {
                self.on_engine_connected(engine);
            }
            Event::EngineMessage { engine, connection, seq, payload }
                if self.engines[engine].is_connected(connection) =>
            {
                self.on_engine_message(engine, seq, payload);
            }
            Event::ReplayAsked { shim, life, from } => self.replay(shim, life, from),
            Event::ReplayEnds { shim, life, from, messages } if self.shims[shim].lives(life) => {
                self.on_replay_ends(shim, from, messages.as_deref());
            }
            Event::Flush { shim, life } if self.shims[shim].lives(life) => self.on_flush(shim),
            Event::Prove { shim, life } if self.shims[shim].lives(life) => self.on_prove(shim),
            Event::Heartbeat { shim, life, at_us } if self.shims[shim].lives(life) => {
                self.on_heartbeat(shim, at_us);
            }
            Event::ToShim { shim, life, index, kind, payload } if self.shims[shim].lives(life) => {
                self.on_shim_message(shim, index, kind, &payload);
            }
            Event::ToIndex { index, life, shim, kind, payload } if self.indexes[index].lives(life) => {
                self.on_index_message(index, shim, kind, &payload);
            }
            Event::Poll { index, life } if self.indexes[index].lives(life) => self.on_poll(index),
            Event::Tick { index, life } if self.indexes[index].lives(life) => self.on_tick(index),
            Event::Own { index, life } if self.indexes[index].lives(life) => self.on_own(index),
            Event::Save { process: Process::Shim(shim), life } if self.shims[shim].lives(life) => {
                self.save_shim(shim);
            }
            Event::Save { process: Process::Index(index), life } if self.indexes[index].lives(life) => {
                self.save_index(index);
            }
            Event::Starts { process: Process::Shim(shim), life } if self.shims[shim].awaits(life) => {
                self.start_shim(shim);
            }
            Event::Starts { process: Process::Index(index), life } if self.indexes[index].awaits(life) => {
                self.start_index(index);
            }
            // For a life that is over.
            _ => {}
        }
    }

    fn stands_still(&self, process: Process) -> bool {
        let until_us = match process {
            Process::Shim(shim) => self.shims[shim].stalled_until_us,
            Process::Index(index) => self.indexes[index].stalled_until_us,
        };
        until_us > self.now_us
    }

    /// What a process that stood still has missed happens to it now, in order.
    fn go_on(&mut self, process: Process) {
        if !self.stands_still(process) {
            for event in self.waiting.remove(&process).into_iter().flatten() {
                self.handle(event);
            }
        }
    }

    pub(super) fn step(&mut self, op: &Op) {
        self.log.line(self.now_us, format_args!("STEP {op}"));
        *self.counts.operations.entry(op.kind()).or_default() += 1;
        let ends_us = self.now_us + op.lasts_ms() * 1_000;
        // Choices inside a step depend on its time, not on the steps before it, so that leaving one out changes little.
        let mut rng = Rng::new(self.seed, "step", self.now_us);
        let now_us = self.now_us;
        match *op {
            Op::Serve { engine, prompt, blocks } => {
                self.work(engine, |engine| engine.serve(prompt, blocks, now_us));
            }
            Op::Evict { engine, blocks } => {
                self.work(engine, |engine| engine.evict(blocks, &mut rng, now_us));
            }
            Op::Offload { engine, blocks } => {
                self.work(engine, |engine| engine.offload(blocks, &mut rng, now_us));
            }
            Op::Reset { engine } => self.work(engine, |engine| engine.reset(now_us)),
            Op::RestartEngine { engine, .. } => {
                let side = &mut self.engines[engine];
                side.alive = false;
                side.link.up = false;
                side.engine.restart();
                self.at(ends_us, Event::EngineStarts { engine });
            }
            Op::LoseEvents { engine, messages } => self.engines[engine].link.losing += messages,
            Op::CutEvents { engine, .. } => {
                let link = &mut self.engines[engine].link;
                link.up = false;
                link.cut_until_us = link.cut_until_us.max(ends_us);
                self.reconnect(engine);
            }
            Op::HoldReplay { engine, .. } => {
                let until_us = &mut self.engines[engine].replay_away_until_us;
                *until_us = ends_us.max(*until_us);
            }
            Op::Kill { process, disk, .. } => {
                let killed = match process {
                    Process::Shim(shim) => self.shims[shim].kill(disk, &mut rng),
                    Process::Index(index) => self.indexes[index].kill(disk, &mut rng),
                };
                if let Some(life) = killed {
                    self.waiting.remove(&process);
                    self.at(ends_us, Event::Starts { process, life });
                }
                if let Process::Shim(shim) = process {
                    self.engines[shim].link.up = false;
                }
            }
            Op::Stall { process, .. } => {
                let until_us = match process {
                    Process::Shim(shim) => &mut self.shims[shim].stalled_until_us,
                    Process::Index(index) => &mut self.indexes[index].stalled_until_us,
                };
                *until_us = ends_us.max(*until_us);
                self.at(ends_us, Event::GoesOn { process });
            }
            Op::Own { index, set, beside } => self.want(index, set, beside),
            Op::SetBack { shim, by_ms } => {
                self.shims[shim].set_clock_back(by_ms);
                self.clock_went_back = true;
            }
            Op::Bus { pair, fault, .. } => self.bus.disturb(pair, fault, ends_us),
        }
    }

    /// Ends every fault: processes run, links and sockets are there. What was lost stays lost.
    pub(super) fn calm(&mut self) {
        self.log.line(self.now_us, format_args!("QUIET"));
        self.quiet_since_us = Some(self.now_us);
        self.bus.calm();
        for shim in 0..self.shims.len() {
            self.shims[shim].stalled_until_us = 0;
            self.go_on(Process::Shim(shim));
            if !self.shims[shim].is_up() {
                self.start_shim(shim);
            }
        }
        for index in 0..self.indexes.len() {
            self.indexes[index].stalled_until_us = 0;
            self.go_on(Process::Index(index));
            if !self.indexes[index].is_up() {
                self.start_index(index);
            }
        }
        for engine in 0..self.engines.len() {
            let side = &mut self.engines[engine];
            side.replay_away_until_us = 0;
            side.link.losing = 0;
            side.link.cut_until_us = 0;
            if !side.alive {
                self.start_engine(engine);
            }
            self.reconnect(engine);
        }
    }

    // --- engines and their sockets

    fn start_engine(&mut self, engine: usize) {
        if !self.engines[engine].alive {
            self.log.line(self.now_us, format_args!("engine {engine} starts"));
            self.engines[engine].alive = true;
            self.reconnect(engine);
        }
    }

    /// The engine does something and says so.
    pub(super) fn work(&mut self, engine: usize, work: impl FnOnce(&mut Engine) -> Vec<(u64, Bytes)>) {
        if !self.engines[engine].alive {
            return;
        }
        for (seq, payload) in work(&mut self.engines[engine].engine) {
            self.counts.engine_messages += 1;
            let latency_us = self.between(ENGINE_LATENCY_US);
            let link = &mut self.engines[engine].link;
            let lost = !link.up || link.losing > 0;
            if link.up {
                link.losing = link.losing.saturating_sub(1);
            }
            let fingerprint = xxhash_rust::xxh3::xxh3_64(&payload);
            let outcome = if lost { "lost" } else { "sent" };
            self.log.line(
                self.now_us,
                format_args!("engine {engine} message {seq} {fingerprint:016x} {outcome}"),
            );
            if !lost {
                let link = &mut self.engines[engine].link;
                link.last_us = (self.now_us + latency_us).max(link.last_us + 1);
                let (at_us, connection) = (link.last_us, link.connection);
                self.at(at_us, Event::EngineMessage { engine, connection, seq, payload });
            }
        }
    }

    /// Tries to connect a shim and its engine, as soon as nothing is in the way.
    pub(super) fn reconnect(&mut self, engine: usize) {
        let wait_us = self.between(RECONNECT_US);
        let cut_until_us = self.engines[engine].link.cut_until_us.max(self.now_us);
        self.at(cut_until_us + wait_us, Event::LinkUp { engine });
    }

    fn link_up(&mut self, engine: usize) {
        let side = &mut self.engines[engine];
        let link = &mut side.link;
        let possible = side.alive && link.cut_until_us <= self.now_us && self.shims[engine].is_up();
        // Whoever was in the way tries again.
        if link.up || !possible {
            return;
        }
        link.up = true;
        link.connection += 1;
        let connection = link.connection;
        self.log.line(self.now_us, format_args!("engine {engine} connection {connection}"));
        self.after(0, Event::EngineConnected { engine, connection });
    }

    fn replay(&mut self, shim: usize, life: u32, from: u64) {
        let side = &self.engines[shim];
        let away = side.replay_away_until_us > self.now_us || side.link.cut_until_us > self.now_us;
        let (wait_us, messages) = if !side.alive {
            // Nobody listens: refused at once, some tries long.
            (super::shim_side::REPLAY_REFUSED_US, None)
        } else if away {
            (super::shim_side::REPLAY_TIMEOUT_US, None)
        } else {
            (self.between(ENGINE_LATENCY_US), Some(self.engines[shim].engine.replay(from)))
        };
        self.after(wait_us, Event::ReplayEnds { shim, life, from, messages });
    }
}

/// The process that an event happens to, if it can stand still.
fn receiver(event: &Event) -> Option<Process> {
    match event {
        Event::EngineConnected { engine: shim, .. }
        | Event::EngineMessage { engine: shim, .. }
        | Event::ReplayEnds { shim, .. }
        | Event::Flush { shim, .. }
        | Event::Prove { shim, .. }
        | Event::Heartbeat { shim, .. }
        | Event::ToShim { shim, .. } => Some(Process::Shim(*shim)),
        Event::ToIndex { index, .. }
        | Event::Poll { index, .. }
        | Event::Tick { index, .. }
        | Event::Own { index, .. } => Some(Process::Index(*index)),
        Event::Save { process, .. } => Some(*process),
        _ => None,
    }
}
