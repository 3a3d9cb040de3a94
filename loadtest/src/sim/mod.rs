//! A deterministic simulation of the protocol between engines, shims and indexes, with faults: the real
//! [`kvatlas_shim::source::Source`], [`kvatlas_index::Index`] and their files, in virtual time, on one thread, without
//! sockets or a clock.
//!
//! A [`Scenario`] is a readable list of what happens ([`Op`]); [`generate`] makes one from a seed. [`run`] plays it and
//! checks at every step what must hold ([`Outcome::failure`] says what did not); after the last step all faults stop,
//! every engine takes one more request, and within [`EXACT_MS`] every index must be what the engines hold in the shards that
//! it owns, and say so. Then, where the key space is cut, the indexes exchange what they own ([`owned`]).
//! The same scenario always gives the same log, byte for byte ([`Outcome::log_hash`]).
//!
//! What is simulated, and how:
//!
//! * engines ([`engine`]): caches with copies, two tiers, eviction, resets, restarts; messages are vLLM's own bytes;
//! * an engine's sockets: in order, lossy, with reconnects; a bounded replay buffer;
//! * the bus ([`bus`]): events of a shard for who owns it; per shim and index loss, duplicates, damage, delay (so reorder) and cuts; answers too;
//! * processes: killed and started again, standing still, clocks set back, files torn ([`disk`]); indexes that take in shards
//!   and give up others.
//!
//! Half of the worlds have the key space in one piece, the others cut it into a few shards: divided among the indexes, or on
//! all of them, or with a part that nobody has.
//!
//! Why every engine takes one more request at the end: a message that a PUB socket drops is noticed with the next one.
//! Nobody can notice it earlier, so without one there is nothing to converge to.
//!
//! A publisher that lost events of its engine for good says so. Its index then holds a part of the truth, never more, and
//! after a reset (or, where a tier beside the device may have kept blocks, a restart) of the engine again all of it.

mod bus;
mod checks;
mod disk;
mod engine;
mod generate;
mod index_side;
mod log;
mod op;
mod op_text;
mod owned;
mod prompts;
mod reference;
mod rng;
mod scores;
mod seeds;
mod shim_side;
mod shrink;
mod world;

use std::collections::BTreeMap;
use std::fmt;
use std::panic::AssertUnwindSafe;

use bytes::Bytes;
use kvatlas_proto::Partition;
use kvatlas_proto::frame::{Change, FrameHeader, FrameView, OpBuffer, SourceHealth};
use tracing::subscriber::NoSubscriber;

pub use generate::generate;
pub use op::{BusFault, DiskFault, Op, Process, Scenario, Step, WorldConfig};
pub use op_text::ParseScenarioError;
pub use seeds::{Report, Slowest, Totals, run_seeds};
pub use shrink::shrink;
use world::World;

/// Longest virtual time from the end of all faults until every index is exact and says so, milliseconds.
pub const EXACT_MS: u64 = 5_000;
/// Added where a publisher's clock was set back without its knowing: its new life looks older than the last one until that
/// one's lease has ended.
const LEASE_MS: u64 = kvatlas_index::sources::LEASE_MS + 1_000;
/// Added where a shim is waiting for a replay socket that does not answer when the faults end.
const REPLAY_MS: u64 = shim_side::REPLAY_TIMEOUT_US / 1_000;
/// From the last step to the end of all faults, milliseconds: so that the last one is in time to do something.
const LAST_MS: u64 = 250;
/// From the end of all faults to the request that every engine takes: connections are there again.
const RECONNECTED_MS: u64 = 150;
/// How long a world that is exact must stay so, milliseconds.
const STABLE_MS: u64 = 2_200;
/// Time between two looks whether everything is exact, milliseconds.
const LOOK_MS: u64 = 50;

/// A fault of the system itself, planted to show that the checks find it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sabotage {
    /// None: the system as it is.
    #[default]
    None,
    /// Indexes do not see what is removed.
    SkipRemovals,
    /// As [`Self::SkipRemovals`], but only until all faults stop, and nobody looks before everything is exact: what went
    /// wrong must be found and repaired by the system itself.
    SkipRemovalsUnseen,
    /// Indexes take some frames of a shard for the next shard's. Nothing where there is but one.
    MixLanes,
}

/// What must hold and did not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Which rule.
    pub rule: &'static str,
    /// When, virtual microseconds from the start.
    pub at_us: u64,
    /// What differs.
    pub what: String,
}

/// What happened in one or many simulations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Operations by kind.
    pub operations: BTreeMap<&'static str, u64>,
    /// Messages that engines published.
    pub engine_messages: u64,
    /// Frames that shims published.
    pub frames: u64,
    /// Bytes of frames and answers sent over the bus, once per receiver.
    pub bytes: u64,
    /// Messages that arrived damaged and were dropped.
    pub damaged: u64,
    /// Times an index noticed that frames are missing.
    pub gaps: u64,
    /// Times an index noticed that its content is not what the publisher says.
    pub divergences: u64,
    /// What was asked for and repaired, by kind.
    pub repairs: BTreeMap<&'static str, u64>,
    /// Files that were refused.
    pub files_refused: u64,
    /// Files that were loaded.
    pub files_loaded: u64,
    /// Comparisons of an index with its publisher.
    pub checks: u64,
    /// Comparisons of scores of prompts.
    pub score_checks: u64,
    /// Answers of several indexes in them that did not cover the whole prompt, because nobody owned a part of it.
    pub partial_scores: u64,
    /// Looks at indexes that had found out everything.
    pub found_out: u64,
}

/// What came of a simulation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Hash of everything that happened.
    pub log_hash: u64,
    /// What happened, in numbers.
    pub counts: Counts,
    /// Longest virtual time from the end of faults until everything was exact, milliseconds; `None` if it never was.
    pub exact_after_ms: Option<u64>,
    /// How much of it was allowed: [`EXACT_MS`], and leases and timeouts that were running.
    pub allowed_ms: u64,
    /// What did not hold.
    pub failure: Option<Failure>,
    /// The log: its last lines, or all of it if asked.
    pub lines: Vec<String>,
}

/// Plays a scenario.
pub fn run(scenario: &Scenario, sabotage: Sabotage, trace: bool) -> Outcome {
    let mut world = World::new(scenario, sabotage, trace);
    // What simulated processes would log would drown what the real one has to say.
    let quietly = || tracing::subscriber::with_default(NoSubscriber::new(), || drive(&mut world, scenario));
    let driven = std::panic::catch_unwind(AssertUnwindSafe(quietly));
    let (exact_after_ms, allowed_ms) = driven.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        world.fail("nothing panics", text.to_owned());
        (None, EXACT_MS)
    });
    Outcome {
        log_hash: world.log.hash(),
        counts: world.counts,
        exact_after_ms,
        allowed_ms,
        failure: world.failure,
        lines: world.log.into_lines(),
    }
}

/// Returns the time to exactness, if it came to that, and the one allowed.
fn drive(world: &mut World, scenario: &Scenario) -> (Option<u64>, u64) {
    let allowed_ms = disturb(world, scenario);
    (settle(world, allowed_ms), allowed_ms)
}

/// Plays the steps and ends all faults. Returns how long it may take from now until everything is exact.
fn disturb(world: &mut World, scenario: &Scenario) -> u64 {
    let last_ms = scenario.steps.iter().map(|step| step.at_ms).max().unwrap_or(0);
    world.run_until((last_ms + LAST_MS) * 1_000);
    world.calm();
    let mut allowed_ms = EXACT_MS;
    if world.clock_went_back {
        allowed_ms += LEASE_MS;
    }
    if world.shims.iter().any(shim_side::ShimProcess::is_replaying) {
        allowed_ms += REPLAY_MS;
    }
    allowed_ms
}

/// Waits until everything is exact, and looks that it stays so.
fn settle(world: &mut World, allowed_ms: u64) -> Option<u64> {
    let quiet_us = world.now_us;
    world.run_until(quiet_us + RECONNECTED_MS * 1_000);
    one_more_request(world);
    let exact_after_ms = until_exact(world, quiet_us, allowed_ms)?;
    if world.sabotage == Sabotage::SkipRemovalsUnseen {
        world.sabotage = Sabotage::None;
    }
    if heal(world) {
        let healed_us = world.now_us;
        world.run_until(healed_us + RECONNECTED_MS * 1_000);
        one_more_request(world);
        until_exact(world, healed_us, EXACT_MS)?;
        for shim in 0..world.shims.len() {
            if world.shims[shim].source().is_some_and(|source| source.health() != SourceHealth::Exact) {
                world.fail("an engine's reset makes its publisher exact again", format!("shim {shim}"));
            }
        }
    }
    if world.failure.is_none() && world.partition != Partition::WHOLE {
        world.hand_over();
    }
    world.run_until(world.now_us + STABLE_MS * 1_000);
    if let Some(what) = settled(world) {
        world.fail("what is exact stays exact", what);
    }
    world.failure.is_none().then_some(exact_after_ms)
}

/// Every engine takes a request, so that nothing that was lost stays unnoticed.
fn one_more_request(world: &mut World) {
    for engine in 0..world.engines.len() {
        let now_us = world.now_us;
        world.work(engine, |it| it.serve(engine, 4, now_us));
    }
}

/// Lets time pass until everything is exact, at most `allowed_ms` from `since_us`. Returns how long it took.
fn until_exact(world: &mut World, since_us: u64, allowed_ms: u64) -> Option<u64> {
    loop {
        world.run_until(world.now_us + LOOK_MS * 1_000);
        if world.failure.is_some() {
            return None;
        }
        let passed_ms = (world.now_us - since_us) / 1_000;
        match world.unlike_the_truth() {
            None => return Some(passed_ms),
            Some(what) if passed_ms >= allowed_ms => {
                world
                    .fail("everything is exact and verified in time", format!("after {passed_ms} ms {what}"));
                return None;
            }
            Some(_) => {}
        }
    }
}

/// As [`World::unlike_the_truth`], a moment later if a heartbeat is just on its way.
fn settled(world: &mut World) -> Option<String> {
    world.unlike_the_truth()?;
    world.run_until(world.now_us + LOOK_MS * 1_000);
    world.unlike_the_truth()
}

/// Resets or restarts the engines whose publishers say that they miss something. Returns whether there are any.
fn heal(world: &mut World) -> bool {
    let mut healed = false;
    for shim in 0..world.shims.len() {
        let Some(source) = world.shims[shim].source() else { continue };
        if source.health() == SourceHealth::Exact {
            continue;
        }
        healed = true;
        let only_device = source.mirror().owners().len() <= 1;
        let op = if only_device {
            Op::Reset { engine: shim }
        } else {
            Op::RestartEngine { engine: shim, for_ms: 1 }
        };
        world.step(&op);
    }
    healed
}

/// Name of a shim's instance.
fn name(shim: usize) -> String {
    format!("engine-{shim}:8000")
}

// === impl Sabotage ===

impl Sabotage {
    /// A frame as the index sees it.
    fn frame(self, bytes: &Bytes, quiet: bool) -> Bytes {
        let Ok(view) = FrameView::parse(bytes) else { return bytes.clone() };
        let header = view.header();
        let encoded = match self {
            Self::SkipRemovals => encode(header, &view, false),
            Self::SkipRemovalsUnseen if !quiet => encode(header, &view, false),
            Self::MixLanes if header.digests.is_empty() && header.seq.0 % 4 == 1 => {
                let partition = Partition::new(header.shard.of().into()).unwrap_or_default();
                let shard = partition.shard((header.shard.number() + 1) % partition.shards());
                encode(&FrameHeader { shard, ..header.clone() }, &view, true)
            }
            _ => return bytes.clone(),
        };
        encoded.unwrap_or_else(|| bytes.clone())
    }
}

/// A frame once more, with another header or without removals.
fn encode(header: &FrameHeader, view: &FrameView<'_>, removals: bool) -> Option<Bytes> {
    let mut ops = OpBuffer::default();
    for op in view.ops() {
        let owner = op.owner as u8;
        match op.change {
            Change::Stored { mut parent, keys } => {
                for key in keys.iter() {
                    ops.stored(owner, parent, key);
                    parent = key;
                }
            }
            Change::Removed(keys) if removals => keys.iter().for_each(|key| ops.removed(owner, key)),
            Change::Removed(_) => {}
            Change::Cleared => ops.cleared(owner),
            Change::Bucket { slice, blocks } => ops.bucket(owner, slice, blocks.iter()),
        }
    }
    header.encode(&mut ops).ok().map(Bytes::from)
}

// === impl Failure ===

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not so at t={:.6}s: {}. {}", self.at_us as f64 / 1e6, self.rule, self.what)
    }
}

// === impl Counts ===

impl Counts {
    /// Adds those of another simulation.
    pub fn add(&mut self, other: &Self) {
        for (kind, count) in &other.operations {
            *self.operations.entry(kind).or_default() += count;
        }
        for (kind, count) in &other.repairs {
            *self.repairs.entry(kind).or_default() += count;
        }
        self.engine_messages += other.engine_messages;
        self.frames += other.frames;
        self.bytes += other.bytes;
        self.damaged += other.damaged;
        self.gaps += other.gaps;
        self.divergences += other.divergences;
        self.files_refused += other.files_refused;
        self.files_loaded += other.files_loaded;
        self.checks += other.checks;
        self.score_checks += other.score_checks;
        self.partial_scores += other.partial_scores;
        self.found_out += other.found_out;
    }
}
