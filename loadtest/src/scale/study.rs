//! The study itself: workload after workload, each on a fleet and an index of its own.

use kvatlas_proto::Partition;
use kvatlas_proto::shard::SEGMENT_BLOCKS;

use super::cost::resident_bytes;
use super::cut::Cut;
use super::fleet::{Change, Fleet, FleetConfig, STEPS_PER_SECOND};
use super::forest::{Block, Forest};
use super::hot::HolderCost;
use super::replay::Replay;
use super::requests::{ChatConfig, Chats, Requests};
use super::servers::{Asker, Servers};
use super::tally::{SERVERS, Sample, Tally};
use super::wire::{Publishers, Traffic, instance, state_bytes};
use super::{
    MIN_BLOCKS_PER_POD, MemoryRow, QueryRow, ScaleConfig, ScaleError, ScaleReport, WorkloadReport, branch,
    hot, memory, sizing, traces,
};

/// Numbers of shards that are compared.
const SHARDS: [u32; 2] = [64, 256];
/// A fleet is in its steady state when so many times its capacity was stored.
const FILL: f64 = 1.25;
/// Steps of filling at most, however little is stored in one: ten hours of virtual time.
const MAX_FILL_STEPS: u64 = 10 * 3_600 * STEPS_PER_SECOND;
/// Length of the system prompt that everybody shares, blocks: it ends in the middle of a segment, whatever its length.
const SHARED_BLOCKS: u32 = 840;
/// Conversations that are open for each pod.
const CHATS_PER_POD: usize = 4;
/// Pods for each copy of the Mooncake trace: it is of a small cluster.
const PODS_PER_TRACE: usize = 25;
/// A block that more than one in so many pods holds is held because all meet it: in a larger fleet, by as many more.
const FLEET_WIDE: u64 = 20;
/// Prompts that the real code is asked about: where everybody holds everything, each takes a hundredth of a second.
const ASKED_PROMPTS: usize = 100;
/// Pods whose state is encoded to see how large it is.
const STATE_PODS: usize = 4;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Workload {
    Zipf,
    OneShort,
    OneMiddle,
    OneLong,
    Mooncake,
    Agents,
}

/// What happens in the window in which everything is counted.
struct Window {
    frames_ns: u64,
    heartbeats_ns: u64,
    traffic: Traffic,
    by_shards: Vec<(u16, Traffic)>,
    requests: u64,
    prompt_blocks: u64,
    cached_blocks: u64,
}

/// Makes the study. `say` hears how far it is.
pub fn run(config: &ScaleConfig, say: &mut dyn FnMut(&str)) -> Result<ScaleReport, ScaleError> {
    config.check()?;
    let partition = Partition::new(config.shards)?;
    // First, because memory that was used before and is free again would be taken for no growth.
    say("memory of pods that hold nothing");
    let lane_bytes = lane_bytes(config, partition)?;
    let mut workloads = Vec::new();
    let mut askers = Vec::new();
    for servers in [1].into_iter().chain(SERVERS) {
        askers.push(Asker::new(config.pods.into(), partition, servers)?);
    }
    for workload in Workload::ALL {
        workloads.push(workload.study(config, partition, &askers, workloads.is_empty(), say)?);
    }
    let mut hot = Vec::new();
    for pods in &config.hot_pods {
        say(&format!("one prompt on {pods} pods"));
        hot.extend(hot::measure(*pods, partition)?);
    }
    let holder_costs = [false, true].map(|is_named| HolderCost::of(&hot, is_named));
    let deployments = [Workload::Zipf, Workload::Mooncake, Workload::Agents].map(Workload::name);
    let sizing = workloads
        .iter()
        .filter(|report| deployments.contains(&report.name))
        .flat_map(|report| sizing::rows(report, lane_bytes, holder_costs))
        .collect();
    Ok(ScaleReport {
        case: "scale",
        seed: config.seed,
        lane_bytes,
        workloads,
        hot,
        holder_cost_all: holder_costs[0],
        holder_cost_named: holder_costs[1],
        branch: branch::rows(),
        sizing,
    })
}

/// What an index keeps of each pod and shard beside blocks. The first half of the pods is for what a shard takes by itself.
fn lane_bytes(config: &ScaleConfig, partition: Partition) -> Result<f64, ScaleError> {
    let pods = usize::from(config.pods);
    let mut publishers = Publishers::new(pods, partition, Forest::new().root_key())?;
    let servers = Servers::new(partition);
    let (mut before, mut frames) = (0, Vec::new());
    for pod in 0..pods {
        if pod == pods / 2 {
            before = resident_bytes();
        }
        publishers.start(pod, &mut frames)?;
        servers.take(&frames)?;
        frames.clear();
    }
    let grown = resident_bytes().saturating_sub(before);
    Ok(grown as f64 / ((pods - pods / 2) * usize::from(partition.shards())) as f64)
}

// === impl Workload ===

impl Workload {
    const ALL: [Self; 6] =
        [Self::Zipf, Self::OneShort, Self::OneMiddle, Self::OneLong, Self::Mooncake, Self::Agents];

    fn name(self) -> &'static str {
        match self {
            Self::Zipf => "zipf",
            Self::OneShort => "one-16",
            Self::OneMiddle => "one-200",
            Self::OneLong => "one-2000",
            Self::Mooncake => "mooncake",
            Self::Agents => "agents",
        }
    }

    /// Tokens of a block, which is how many steps an answer takes to fill one.
    fn block_tokens(self) -> u64 {
        if self == Self::Agents { 64 } else { 16 }
    }

    fn tail(self) -> Option<u32> {
        match self {
            Self::OneShort => Some(16),
            Self::OneMiddle => Some(200),
            Self::OneLong => Some(2_000),
            Self::Zipf | Self::Mooncake | Self::Agents => None,
        }
    }

    /// Where all share one prompt, caches are smaller: all they hold beside it is alike, and the shorter its tails, the more
    /// requests it takes to fill them.
    fn blocks_per_pod(self, config: &ScaleConfig) -> usize {
        let share = match self {
            Self::OneShort => 8,
            Self::OneMiddle | Self::OneLong => 2,
            Self::Zipf | Self::Mooncake | Self::Agents => 1,
        };
        (config.blocks_per_pod / share).max(MIN_BLOCKS_PER_POD)
    }

    fn requests(
        self,
        config: &ScaleConfig,
        forest: &mut Forest,
    ) -> Result<(Box<dyn Requests>, String), ScaleError> {
        let (pods, seed) = (usize::from(config.pods), config.seed);
        let folder = config.traces.as_deref();
        let sourced = match self {
            Self::Mooncake => traces::mooncake(folder, (pods / PODS_PER_TRACE).max(1), seed)?,
            Self::Agents => traces::agents(folder, pods * CHATS_PER_POD, seed)?,
            Self::Zipf | Self::OneShort | Self::OneMiddle | Self::OneLong => {
                let (chats, source) = match self.tail() {
                    Some(tail) => (
                        ChatConfig::one_prompt(SHARED_BLOCKS, tail),
                        format!(
                            "one system prompt of {SHARED_BLOCKS} blocks for all, tails of {tail} blocks"
                        ),
                    ),
                    None => (
                        ChatConfig::zipf(pods * CHATS_PER_POD, seed),
                        "100 system prompts of 50 to 2,000 blocks (Zipf, s = 1), chats of 1 to 6 turns"
                            .to_owned(),
                    ),
                };
                return Ok((Box::new(Chats::new(chats, forest, seed)), source));
            }
        };
        Ok((Box::new(Replay::new(sourced.recording, seed)), sourced.source))
    }

    fn study(
        self,
        config: &ScaleConfig,
        partition: Partition,
        askers: &[Asker],
        is_first: bool,
        say: &mut dyn FnMut(&str),
    ) -> Result<WorkloadReport, ScaleError> {
        let name = self.name();
        let pods = usize::from(config.pods);
        let blocks_per_pod = self.blocks_per_pod(config);
        let mut forest = Forest::new();
        let (requests, source) = self.requests(config, &mut forest)?;
        let fleet_config = FleetConfig {
            pods: config.pods,
            blocks_per_pod,
            operations_per_pod: sizing::OPERATIONS_PER_POD,
            block_tokens: self.block_tokens(),
        };
        let mut fleet = Fleet::new(fleet_config, forest, requests, config.seed);
        say(&format!("{name}: {pods} pods fill up"));
        fill(&mut fleet, pods * blocks_per_pod);

        say(&format!("{name}: an index takes them in"));
        let servers = Servers::new(partition);
        let mut publishers = Publishers::new(pods, partition, fleet.forest.root_key())?;
        let before = resident_bytes();
        let (fill_ns, filled) = take_state(&fleet, &mut publishers, &servers)?;
        let grown = resident_bytes().saturating_sub(before);

        say(&format!("{name}: {} s of changes", config.window_s));
        let partitions =
            SHARDS.iter().map(|shards| Partition::new(*shards)).collect::<Result<Vec<_>, _>>()?;
        let mut tally = Tally::new(partitions, pods);
        let window = observe(&mut fleet, &mut publishers, &servers, &mut tally, config.window_s)?;
        tally.note_held(&fleet.forest, &fleet.pods);
        let (blocks, distinct_blocks) = servers.blocks();
        if !servers.is_verified() || blocks != fleet.pods.iter().map(super::pod::Pod::len).sum::<usize>() {
            return Err(ScaleError::Untrue(name));
        }

        say(&format!("{name}: queries"));
        let prompts: Vec<Vec<Block>> = (0..config.queries).map(|_| fleet.peek().prompt().to_vec()).collect();
        let mut queries = ask(&servers, askers, &fleet.forest, &prompts, &[])?;
        let named: Vec<String> =
            (0..pods.min(hot::CANDIDATES)).map(|pod| instance(pod).to_string()).collect();
        queries.extend(ask(&servers, askers, &fleet.forest, &prompts, &named)?);
        drop(servers);
        let samples: Vec<Sample> =
            prompts.iter().map(|prompt| Sample::new(&fleet.pods, prompt.clone())).collect();
        let divisions = tally.divisions(&fleet.forest, &samples);

        say(&format!("{name}: memory by cut"));
        let memory = self.memory(&fleet, &prompts)?;
        let ours = |row: &&MemoryRow| row.cut == Cut::Segment(SEGMENT_BLOCKS);
        let bytes_per_block = memory.iter().find(ours).map_or(0.0, |row| row.bytes_per_block);
        let mut state = (0, 0);
        for pod in fleet.pods.iter().take(STATE_PODS) {
            let (bytes, blocks) = state_bytes(&fleet.forest, partition, &pod.blocks())?;
            state = (state.0 + bytes, state.1 + blocks);
        }
        Ok(WorkloadReport {
            name,
            source,
            pods: config.pods,
            shards: partition.shards(),
            window_s: config.window_s as f64,
            requests: window.requests,
            prompt_blocks: window.prompt_blocks as f64 / window.requests.max(1) as f64,
            hit_share: window.cached_blocks as f64 / window.prompt_blocks.max(1) as f64,
            operations_per_request: window.traffic.operations as f64 / window.requests.max(1) as f64,
            blocks,
            distinct_blocks,
            ingest_ns_per_operation: window.frames_ns as f64 / window.traffic.operations.max(1) as f64,
            fill_ns_per_block: fill_ns as f64 / filled.max(1) as f64,
            ns_per_heartbeat: window.heartbeats_ns as f64 / window.traffic.heartbeats.max(1) as f64,
            traffic: window.traffic,
            traffic_by_shards: window.by_shards,
            state_bytes_per_block: state.0 as f64 / state.1.max(1) as f64,
            bytes_per_block,
            resident_bytes_per_block: is_first.then(|| grown as f64 / filled.max(1) as f64),
            fleet_wide_holders: fleet_wide_holders(&samples, pods as u64),
            memory,
            divisions,
            queries,
        })
    }

    /// Memory by cut; of workloads that are about skew, with the contract's cut only.
    fn memory(self, fleet: &Fleet, prompts: &[Vec<Block>]) -> Result<Vec<MemoryRow>, ScaleError> {
        let cuts = Cut::all().filter(|cut| match self.tail() {
            None => *cut != Cut::Worker,
            Some(_) => *cut == Cut::Segment(SEGMENT_BLOCKS),
        });
        let row = |cut| memory::measure(&fleet.forest, &fleet.pods, prompts, cut);
        Ok(cuts.map(row).collect::<Result<_, _>>()?)
    }
}

/// Lets the fleet run until it is full and blocks come and go.
fn fill(fleet: &mut Fleet, capacity: usize) {
    let enough = (capacity as f64 * FILL) as u64;
    for _ in 0..MAX_FILL_STEPS {
        if fleet.counts.stored >= enough {
            break;
        }
        fleet.step();
    }
}

/// The index takes in what the pods hold. Processor time, and how many blocks.
fn take_state(
    fleet: &Fleet,
    publishers: &mut Publishers,
    servers: &Servers,
) -> Result<(u64, u64), ScaleError> {
    let (mut ns, mut filled, mut frames) = (0, 0, Vec::new());
    for (number, pod) in fleet.pods.iter().enumerate() {
        publishers.start(number, &mut frames)?;
        servers.take(&frames)?;
        frames.clear();
        let blocks = pod.blocks();
        filled += blocks.len() as u64;
        publishers.publish(&fleet.forest, number, blocks.into_iter().map(Change::Stored), &mut frames)?;
        ns += servers.take(&frames)?;
        frames.clear();
    }
    publishers.traffic = Traffic::default();
    Ok((ns, filled))
}

/// Counts and measures everything for a while.
fn observe(
    fleet: &mut Fleet,
    publishers: &mut Publishers,
    servers: &Servers,
    tally: &mut Tally,
    seconds: u64,
) -> Result<Window, ScaleError> {
    let root = fleet.forest.root_key();
    let mut others = Vec::new();
    for shards in SHARDS {
        let partition = Partition::new(shards)?;
        others.push((partition.shards(), Publishers::counting(fleet.pods.len(), partition, root)?));
    }
    let before = fleet.counts;
    let (mut frames_ns, mut heartbeats_ns) = (0, 0);
    let (mut frames, mut heartbeats, mut unsent) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..seconds {
        for _ in 0..STEPS_PER_SECOND {
            fleet.step();
            for (pod, changes) in fleet.changes() {
                for change in changes {
                    if let Change::Stored(block) = change {
                        tally.note_stored(&fleet.forest, pod, *block);
                    }
                }
                let changes = || changes.iter().copied();
                publishers.publish(&fleet.forest, pod.into(), changes(), &mut frames)?;
                for (_, other) in &mut others {
                    other.publish(&fleet.forest, pod.into(), changes(), &mut unsent)?;
                    unsent.clear();
                }
            }
        }
        publishers.heartbeats(false, &mut heartbeats)?;
        for (_, other) in &mut others {
            other.heartbeats(false, &mut unsent)?;
            unsent.clear();
        }
        frames_ns += servers.take(&frames)?;
        heartbeats_ns += servers.take(&heartbeats)?;
        frames.clear();
        heartbeats.clear();
    }
    let traffic = publishers.traffic;
    // Once from everybody, to compare.
    publishers.heartbeats(true, &mut heartbeats)?;
    servers.take(&heartbeats)?;
    let now = fleet.counts;
    Ok(Window {
        frames_ns,
        heartbeats_ns,
        traffic,
        by_shards: others.into_iter().map(|(shards, other)| (shards, other.traffic)).collect(),
        requests: now.requests - before.requests,
        prompt_blocks: now.prompt_blocks - before.prompt_blocks,
        cached_blocks: now.cached_blocks - before.cached_blocks,
    })
}

/// Asks about prompts, with every number of servers.
fn ask(
    servers: &Servers,
    askers: &[Asker],
    forest: &Forest,
    prompts: &[Vec<Block>],
    candidates: &[String],
) -> Result<Vec<QueryRow>, ScaleError> {
    let mut rows = Vec::new();
    let prompts = &prompts[..prompts.len().min(ASKED_PROMPTS)];
    for asker in askers {
        let asked = servers.ask(forest, prompts, asker, candidates)?;
        rows.push(QueryRow {
            servers: asker.servers,
            candidates: candidates.len(),
            fan_out: asked.mean(asked.questions),
            question_bytes: asked.mean(asked.question_bytes),
            answer_bytes: asked.mean(asked.answer_bytes),
            largest_answer: asked.largest_answer,
            refused: asked.refused,
            look_up_us: asked.mean(asked.look_up_ns) / 1e3,
            ask_us: asked.mean(asked.ask_ns) / 1e3,
            rows: asked.mean(asked.rows as u64),
        });
    }
    Ok(rows)
}

/// Of a query, holders of segments that more than one in [`FLEET_WIDE`] pods holds.
fn fleet_wide_holders(samples: &[Sample], pods: u64) -> f64 {
    let mut sum = 0;
    for sample in samples {
        let starts = (0u32..).step_by(SEGMENT_BLOCKS as usize);
        let holders =
            starts.take_while(|at| (*at as usize) < sample.prompt.len()).map(|at| sample.holders(at));
        sum += holders.filter(|holders| FLEET_WIDE * holders > pods).sum::<u64>();
    }
    sum as f64 / samples.len().max(1) as f64
}
