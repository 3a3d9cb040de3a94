//! What can happen in a simulation: the operations, and scenarios made of them. [`super::op_text`] has their text.

use kvatlas_proto::{Partition, ShardSet};

use super::prompts::PROMPTS;

/// Most engines, indexes, and blocks per engine and tier: worlds are small, so that there can be many.
const MAX_ENGINES: usize = 16;
const MAX_INDEXES: usize = 4;
const MAX_BLOCKS: usize = 4_096;
/// Most shards, and most parts that they are divided into.
const MAX_SHARDS: u32 = 16;
const MAX_PARTS: u32 = 8;

/// A simulation from beginning to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scenario {
    /// The world that it happens in.
    pub world: WorldConfig,
    /// What happens, in order of time.
    pub steps: Vec<Step>,
}

/// The size of a simulated world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorldConfig {
    /// Seed of every choice that the steps leave open (which messages get lost).
    pub seed: u64,
    /// Engines, each with its shim.
    pub engines: usize,
    /// Blocks of each engine's device memory.
    pub device_blocks: usize,
    /// Blocks of each engine's host memory; 0: none.
    pub host_blocks: usize,
    /// Messages in each engine's replay buffer; 0: no replay socket.
    pub replay_messages: usize,
    /// Indexes.
    pub indexes: usize,
    /// Virtual shards of the key space.
    pub shards: u32,
    /// The shards are divided into so many parts; index n begins with part n (modulo their number), so that indexes with the
    /// same part are replicas, and parts beyond the number of indexes are nobody's.
    pub parts: u32,
    /// Shims and indexes keep their state in files.
    pub files: bool,
    /// Buffers of shims and indexes are as small as can be, so that their bounds are reached.
    pub small_buffers: bool,
}

/// One thing that happens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// When, milliseconds from the start.
    pub at_ms: u64,
    /// What.
    pub op: Op,
}

/// What happens. Durations are in milliseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// A request: the first blocks of a prompt; those not held yet are stored, others evicted for them.
    Serve {
        /// Which engine.
        engine: usize,
        /// Which prompt.
        prompt: usize,
        /// How much of it.
        blocks: usize,
    },
    /// The engine evicts blocks from its device, any.
    Evict {
        /// Which engine.
        engine: usize,
        /// How many.
        blocks: usize,
    },
    /// The engine copies blocks of its device to its host memory.
    Offload {
        /// Which engine.
        engine: usize,
        /// How many.
        blocks: usize,
    },
    /// The engine resets its cache.
    Reset {
        /// Which engine.
        engine: usize,
    },
    /// The engine dies and another life begins after a while.
    RestartEngine {
        /// Which engine.
        engine: usize,
        /// How long it is away.
        for_ms: u64,
    },
    /// The event socket drops messages without a reconnect.
    LoseEvents {
        /// Which engine.
        engine: usize,
        /// How many.
        messages: usize,
    },
    /// The event socket is disconnected for a while.
    CutEvents {
        /// Which engine.
        engine: usize,
        /// How long.
        for_ms: u64,
    },
    /// The replay socket does not answer for a while.
    HoldReplay {
        /// Which engine.
        engine: usize,
        /// How long.
        for_ms: u64,
    },
    /// A process is killed and started again after a while.
    Kill {
        /// Which.
        process: Process,
        /// How long it is away.
        for_ms: u64,
        /// What is left of its file.
        disk: DiskFault,
    },
    /// A process does nothing for a while; messages wait for it.
    Stall {
        /// Which.
        process: Process,
        /// How long.
        for_ms: u64,
    },
    /// An index is to own other shards from now on, also in its next lives.
    Own {
        /// Which index.
        index: usize,
        /// These.
        set: ShardSet,
        /// Beside those that it owns already.
        beside: bool,
    },
    /// The clock of a shim's host is set back; the shim notices when it starts again.
    SetBack {
        /// Which shim.
        shim: usize,
        /// How far.
        by_ms: u64,
    },
    /// Something is wrong with the bus for a while.
    Bus {
        /// Between which shim and index; `None`: everywhere.
        pair: Option<(usize, usize)>,
        /// What.
        fault: BusFault,
        /// How long.
        for_ms: u64,
    },
}

/// A process of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Process {
    /// A shim, by the number of its engine.
    Shim(usize),
    /// An index replica.
    Index(usize),
}

/// What a kill does to a process's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFault {
    /// Nothing: the last content that was written is there.
    None,
    /// The last write did not reach the disk; the content before it is there.
    Old,
    /// The file ends early.
    Torn,
    /// One byte is another one.
    Flipped,
    /// The file is gone.
    Lost,
}

/// What is wrong with the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BusFault {
    /// A share of the messages is lost.
    Loss {
        /// Percent.
        percent: u32,
    },
    /// A share of the messages arrives twice.
    Duplicates {
        /// Percent.
        percent: u32,
    },
    /// A share of the messages arrives damaged.
    Damage {
        /// Percent.
        percent: u32,
    },
    /// Each message takes its own time, so that the order changes.
    Delay {
        /// Longest delay.
        up_to_ms: u64,
    },
    /// Nothing passes.
    Cut,
}

// === impl Op ===

impl Op {
    /// Kinds of operations, for counters: what people call the fault.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Serve { .. } => "serve",
            Self::Evict { .. } => "evict",
            Self::Offload { .. } => "offload",
            Self::Reset { .. } => "engine_reset",
            Self::RestartEngine { .. } => "engine_restart",
            Self::LoseEvents { .. } => "engine_events_lost",
            Self::CutEvents { .. } => "engine_link_cut",
            Self::HoldReplay { .. } => "engine_replay_away",
            Self::Kill { process: Process::Shim(_), .. } => "shim_kill",
            Self::Kill { process: Process::Index(_), .. } => "index_kill",
            Self::Stall { process: Process::Shim(_), .. } => "shim_stall",
            Self::Stall { process: Process::Index(_), .. } => "index_stall",
            Self::Own { .. } => "index_owns",
            Self::SetBack { .. } => "clock_set_back",
            Self::Bus { fault, .. } => match fault {
                BusFault::Loss { .. } => "bus_loss",
                BusFault::Duplicates { .. } => "bus_duplicates",
                BusFault::Damage { .. } => "bus_damage",
                BusFault::Delay { .. } => "bus_delay",
                BusFault::Cut => "bus_cut",
            },
        }
    }

    /// True if the world has what this is about.
    fn fits(&self, world: &WorldConfig) -> bool {
        let has = |process: &Process| match process {
            Process::Shim(shim) => *shim < world.engines,
            Process::Index(index) => *index < world.indexes,
        };
        match self {
            Self::Serve { engine, prompt, .. } => *engine < world.engines && *prompt < PROMPTS,
            Self::Evict { engine, .. }
            | Self::Offload { engine, .. }
            | Self::Reset { engine }
            | Self::RestartEngine { engine, .. }
            | Self::LoseEvents { engine, .. }
            | Self::CutEvents { engine, .. }
            | Self::HoldReplay { engine, .. } => *engine < world.engines,
            Self::Kill { process, .. } | Self::Stall { process, .. } => has(process),
            Self::Own { index, set, .. } => *index < world.indexes && u32::from(set.servers()) <= MAX_PARTS,
            Self::SetBack { shim, .. } => *shim < world.engines,
            Self::Bus { pair, .. } => {
                pair.is_none_or(|(shim, index)| has(&Process::Shim(shim)) && has(&Process::Index(index)))
            }
        }
    }

    /// How long its effect lasts, milliseconds.
    pub fn lasts_ms(&self) -> u64 {
        match self {
            Self::RestartEngine { for_ms, .. }
            | Self::CutEvents { for_ms, .. }
            | Self::HoldReplay { for_ms, .. }
            | Self::Kill { for_ms, .. }
            | Self::Stall { for_ms, .. }
            | Self::Bus { for_ms, .. } => *for_ms,
            _ => 0,
        }
    }
}

// === impl WorldConfig ===

impl WorldConfig {
    /// How the key space is cut.
    pub(super) fn partition(&self) -> Partition {
        Partition::new(self.shards).expect("a scenario that fits has few shards")
    }

    /// What an index owns at the beginning.
    pub(super) fn first_set(&self, index: usize) -> ShardSet {
        ShardSet::new(index as u32 % self.parts, self.parts).expect("a remainder is below its divisor")
    }
}

// === impl DiskFault ===

impl DiskFault {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::None, Self::Old, Self::Torn, Self::Flipped, Self::Lost];
}

// === impl Scenario ===

impl Scenario {
    /// True if every step is about something that the world has, and the world is not larger than it may be.
    pub fn fits(&self) -> bool {
        let WorldConfig { engines, indexes, device_blocks, host_blocks, shards, parts, .. } = self.world;
        (1..=MAX_ENGINES).contains(&engines)
            && (1..=MAX_INDEXES).contains(&indexes)
            && (1..=MAX_SHARDS).contains(&shards)
            && (1..=MAX_PARTS).contains(&parts)
            && (1..=MAX_BLOCKS).contains(&device_blocks)
            && host_blocks <= MAX_BLOCKS
            && self.steps.iter().all(|step| step.op.fits(&self.world))
    }
}
