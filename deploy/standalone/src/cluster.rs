//! `kvatlas cluster`: which servers own which shards, and among how many servers they are divided.
//!
//! Everything is learned over the broker: slots from the bucket that servers with `--shard-lease` keep, and what servers
//! really answer for from their announcements. No server is asked for anything.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand, value_parser};
use kvatlas_bus::leases::{LeaseError, Slot, SlotTable, Slots};
use kvatlas_bus::{Bus as _, NatsBus, Subscription};
use kvatlas_index::cluster::{ANNOUNCE_MS, Announcement};
use kvatlas_proto::ShardSet;
use kvatlas_proto::shard::MAX_SERVERS;
use kvatlas_proto::subject::Subjects;
use serde::Serialize;
use tokio::time::{Instant, timeout};

mod roll;

use crate::failure::Failure;
use crate::output;
use crate::settings::{NatsSettings, Settings};
use roll::Roll;

/// How long servers are listened to: each says what it has twice in this time, and once more.
const LISTEN: Duration = Duration::from_millis(3 * ANNOUNCE_MS);
/// Longest wait for a division to be complete if nothing else is said, seconds.
const DEFAULT_WAIT_S: u64 = 300;

/// Arguments of `cluster`.
#[derive(Args)]
pub struct ClusterArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Show who holds which part of the shards, and what each server answers for. Listens for a second and a half.
    Status(StatusArgs),
    /// Divide the shards among another number of servers, while they answer: only what moves is taken in anew, by who gets
    /// it, and the old division answers until the new one is complete. Needs servers with --shard-lease; start more of them
    /// before or after growing, and stop some after shrinking.
    Resize(ResizeArgs),
}

#[derive(Args)]
struct StatusArgs {
    #[command(flatten)]
    broker: BrokerArgs,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct ResizeArgs {
    #[command(flatten)]
    broker: BrokerArgs,
    /// Servers to divide the shards among, 1 to the number of shards.
    #[arg(long, value_name = "SERVERS", value_parser = value_parser!(u16).range(1..=i64::from(MAX_SERVERS)))]
    servers: u16,
    /// Wait until every part of the new division is answered for and the old one is given up, and print how long it took.
    #[arg(long)]
    wait: bool,
    /// Longest wait, seconds.
    #[arg(long, requires = "wait", default_value_t = DEFAULT_WAIT_S, value_name = "SECONDS")]
    timeout_s: u64,
    /// Print one JSON object instead of a sentence.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct BrokerArgs {
    /// TOML file with settings, of which [nats] is used; what the command line or the environment says wins over it.
    #[arg(long, env = "KVATLAS_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    nats: NatsSettings,
}

/// A deployment, seen from its broker.
struct Deployment {
    bus: NatsBus,
    subjects: Subjects,
    announcements: Subscription,
    roll: Roll,
    started: Instant,
}

/// What `status` says.
#[derive(Serialize)]
struct Status {
    /// Among how many servers the shards are divided, if that is clear.
    division: Option<u64>,
    /// Whether servers agree on that by leases, or each was told by its configuration.
    leased: bool,
    /// Whether every part of the division is answered for.
    complete: bool,
    /// Parts of the division that nobody answers for.
    missing: Vec<u16>,
    /// Into how many shards the key space is cut.
    shards: Option<u16>,
    servers: Vec<ServerStatus>,
}

#[derive(Serialize)]
struct ServerStatus {
    server: String,
    /// What it holds by lease.
    slot: Option<SlotStatus>,
    /// What it answers for.
    answers_for: Vec<String>,
    /// Whether it was heard; a server that is not heard and holds a slot has died lately.
    heard: bool,
}

#[derive(Serialize)]
struct SlotStatus {
    servers: u16,
    ordinal: u16,
    replica: u16,
}

/// What `resize` says.
#[derive(Serialize)]
struct Resized {
    servers: u16,
    /// How long it took; absent without --wait.
    #[serde(skip_serializing_if = "Option::is_none")]
    seconds: Option<f64>,
}

/// Runs the sub-command.
pub async fn run(args: ClusterArgs) -> Result<ExitCode, Failure> {
    match args.what {
        What::Status(args) => status(args).await,
        What::Resize(args) => resize(args).await,
    }
}

async fn status(args: StatusArgs) -> Result<ExitCode, Failure> {
    let mut deployment = Deployment::connect(args.broker).await?;
    deployment.listen_for(LISTEN).await?;
    let table = match deployment.slots().await {
        Ok(slots) => Some(slots.table().await.map_err(Failure::run)?),
        // Servers that were told their ordinals need neither.
        Err(LeaseError::Missing { .. } | LeaseError::NoJetStream { .. }) => None,
        Err(error) => return Err(Failure::run(error)),
    };
    let status = Status::of(table, &deployment.roll, deployment.now_ms());
    if args.json {
        output::json(&status);
    } else {
        status.print();
    }
    Ok(ExitCode::SUCCESS)
}

async fn resize(args: ResizeArgs) -> Result<ExitCode, Failure> {
    let ResizeArgs { broker, servers, wait, timeout_s, json } = args;
    let mut deployment = Deployment::connect(broker).await?;
    let slots = deployment.slots().await.map_err(Failure::run)?;
    deployment.listen_for(LISTEN).await?;
    let now_ms = deployment.now_ms();
    let Some(shards) = deployment.roll.shards(now_ms) else {
        return Err(Failure::run(
            "no server says that it is there, so nobody would follow: start servers with --shard-lease (and the same \
             --subject-prefix)",
        ));
    };
    if servers > shards {
        return Err(Failure::usage(format!(
            "{shards} shards cannot be divided among {servers} servers: give at most --servers {shards}"
        )));
    }
    let there = deployment.roll.servers(now_ms).count();
    if there < usize::from(servers) {
        output::note(&format!(
            "{there} of {servers} servers are there: until the others are, what is divided already answers"
        ));
    }
    slots.divide(servers).await.map_err(Failure::run)?;
    let seconds = if wait {
        Some(deployment.wait_for_division(servers, Duration::from_secs(timeout_s)).await?.as_secs_f64())
    } else {
        None
    };
    match seconds {
        _ if json => output::json(&Resized { servers, seconds }),
        None => output::line(&format!("the shards are being divided among {servers} servers")),
        Some(seconds) => {
            output::line(&format!("the shards are divided among {servers} servers after {seconds:.2} s"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

// === impl Deployment ===

impl Deployment {
    async fn connect(broker: BrokerArgs) -> Result<Self, Failure> {
        let given = Settings { config: broker.config, nats: broker.nats, ..Settings::default() };
        let nats = given.load()?.nats;
        let subjects = nats.subjects()?;
        let Some(config) = nats.config("cluster")? else {
            return Err(Failure::usage("servers are found over their broker: add --nats URL"));
        };
        let bus = NatsBus::connect(config).await.map_err(Failure::run)?;
        let announcements = bus.subscribe(subjects.servers()).await.map_err(Failure::run)?;
        Ok(Self { bus, subjects, announcements, roll: Roll::default(), started: Instant::now() })
    }

    async fn slots(&self) -> Result<Slots, LeaseError> {
        self.bus.slots(self.subjects.slot_bucket()).await
    }

    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Takes in what servers say in this time.
    async fn listen_for(&mut self, time: Duration) -> Result<(), Failure> {
        let until = Instant::now() + time;
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            self.listen(left).await?;
        }
        Ok(())
    }

    /// Takes in what is said next, if anything is in time.
    async fn listen(&mut self, longest: Duration) -> Result<(), Failure> {
        match timeout(longest, self.announcements.recv()).await {
            Err(_) => Ok(()),
            Ok(None) => Err(Failure::run("the connection to the broker is closed for good: try again")),
            Ok(Some(message)) => {
                match Announcement::parse(&message.payload) {
                    Ok(said) => self.roll.hear(said, self.now_ms()),
                    Err(error) => tracing::warn!(%error, "an announcement of a server is not usable"),
                }
                Ok(())
            }
        }
    }

    /// Waits until the division is all that is answered for, and says how long that took.
    async fn wait_for_division(&mut self, servers: u16, longest: Duration) -> Result<Duration, Failure> {
        let asked = Instant::now();
        loop {
            let now_ms = self.now_ms();
            let missing = self.roll.missing(servers, now_ms);
            let old = self.roll.of_other_divisions(servers, now_ms);
            if missing.is_empty() && old.is_empty() {
                return Ok(asked.elapsed());
            }
            let Some(left) = longest.checked_sub(asked.elapsed()) else {
                return Err(Failure::run(format!(
                    "the division among {servers} servers is not complete after {} s: {}; `kvatlas cluster status` shows who \
                     is there",
                    longest.as_secs(),
                    unfinished(&missing, &old)
                )));
            };
            // A server that has died is not heard of, so it is looked again without news, too.
            self.listen(left.min(Duration::from_millis(ANNOUNCE_MS))).await?;
        }
    }
}

// === impl Status ===

impl Status {
    fn of(table: Option<SlotTable>, roll: &Roll, now_ms: u64) -> Self {
        let leased = table.is_some();
        let table = table.unwrap_or_default();
        let division = if leased { table.division } else { roll.division(now_ms).map(u64::from) };
        let missing = division
            .and_then(|servers| u16::try_from(servers).ok())
            .map(|servers| roll.missing(servers, now_ms));
        let heard: BTreeMap<&str, &roll::Heard> = roll.servers(now_ms).collect();
        let slots: BTreeMap<&str, Slot> =
            table.holders.iter().map(|(slot, holder)| (holder.as_str(), *slot)).collect();
        let names: BTreeSet<&str> = heard.keys().chain(slots.keys()).copied().collect();
        let server = |name: &str| ServerStatus {
            server: name.to_owned(),
            slot: slots.get(name).map(|slot| SlotStatus {
                servers: slot.servers(),
                ordinal: slot.ordinal(),
                replica: slot.replica(),
            }),
            answers_for: heard
                .get(name)
                .map_or_else(Vec::new, |heard| heard.sets.iter().map(ShardSet::to_string).collect()),
            heard: heard.contains_key(name),
        };
        Self {
            division,
            leased,
            complete: missing.as_ref().is_some_and(Vec::is_empty),
            missing: missing.unwrap_or_default(),
            shards: roll.shards(now_ms),
            servers: names.into_iter().map(server).collect(),
        }
    }

    fn print(&self) {
        let mut table = output::table(&["server", "holds", "answers for"]);
        for server in &self.servers {
            let holds = server.slot.as_ref().map_or_else(String::new, |slot| {
                format!("part {} of {}, replica {}", slot.ordinal, slot.servers, slot.replica)
            });
            let answers = match (server.heard, server.answers_for.is_empty()) {
                (false, _) => "(not heard)".to_owned(),
                (true, true) => "(nothing yet)".to_owned(),
                (true, false) => server.answers_for.join(" "),
            };
            table.add_row([server.server.clone(), holds, answers]);
        }
        output::line(&table.to_string());
        let by = if self.leased { "by lease" } else { "by configuration" };
        output::line(&match (self.shards, self.division) {
            (None, _) => "no server says that it is there".to_owned(),
            (Some(shards), None) => format!("{shards} shards, {by}; the servers are not of one division"),
            (Some(shards), Some(division)) => {
                let is = if self.complete { "complete".to_owned() } else { unfinished(&self.missing, &[]) };
                format!("{shards} shards divided among {division} servers, {by}: {is}")
            }
        });
    }
}

fn unfinished(missing: &[u16], old: &[ShardSet]) -> String {
    let list = |words: Vec<String>| words.join(", ");
    let mut parts = Vec::new();
    if !missing.is_empty() {
        parts.push(format!(
            "nobody answers for part {}",
            list(missing.iter().map(ToString::to_string).collect())
        ));
    }
    if !old.is_empty() {
        parts.push(format!("still answered for: {}", list(old.iter().map(ToString::to_string).collect())));
    }
    parts.join("; ")
}
