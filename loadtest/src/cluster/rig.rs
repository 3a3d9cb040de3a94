//! A cluster on one machine: brokers, and servers that each own a part of the key space, every one a process of its own.
//!
//! A server is started again under its address, as a supervisor does it. Everything is on loopback and gone with the rig.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use kvatlas_bus::{Bus, NatsBus, NatsConfig};
use kvatlas_client::{CallError, Client, ClientConfig};
use kvatlas_proto::shard::SEGMENT_BLOCKS;
use kvatlas_proto::subject::Subjects;
use kvatlas_proto::{BlockKey, Partition, grpc};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use super::ClusterError;
use super::brokers::Brokers;
use super::scrape::Scrape;
use crate::recovery::clock::Clock;
use crate::recovery::fleet::Fleet;
use crate::recovery::judge::question;
use crate::recovery::processes::{Process, free_port, http_get};
use crate::recovery::rig::{Blocks, MODEL};
use crate::recovery::site::Site;

/// Deployment of the rig.
const PREFIX: &str = "kvatlas-cluster";
/// Deadline of calls that look at everything.
const LOOK_DEADLINE: Duration = Duration::from_secs(30);
/// Time between two looks at all servers: what figures are rounded to.
pub const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// Longest wait for everything that was said to arrive, once nothing more is said.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(60);

/// Which programs, and how many of each.
#[derive(Clone, Debug)]
pub struct RigConfig {
    /// The `kvatlas` program.
    pub kvatlas: PathBuf,
    /// The broker's program.
    pub nats_server: PathBuf,
    /// Brokers, which form a cluster.
    pub brokers: usize,
    /// Virtual shards; 1 is a key space in one piece.
    pub shards: u32,
    /// Servers that the shards are divided among.
    pub servers: u32,
    /// Replicas of each.
    pub replicas: u32,
}

/// Brokers and servers.
pub struct Rig {
    // Processes drop before the folder with their files.
    servers: Vec<Server>,
    brokers: Brokers,
    site: Site,
    started: usize,
    _folder: TempDir,
}

/// One server, running or not.
pub struct Server {
    number: usize,
    ordinal: u32,
    of: u32,
    replica: u32,
    grpc: SocketAddr,
    http: SocketAddr,
    client: Client,
    process: Option<Process>,
}

// === impl Rig ===

impl Rig {
    /// Starts everything and waits until every server is ready.
    pub async fn start(config: &RigConfig) -> Result<Self, ClusterError> {
        let folder = tempfile::tempdir().map_err(ClusterError::Folder)?;
        let brokers = Brokers::start(&config.nats_server, folder.path(), config.brokers).await?;
        let bus = NatsBus::connect(NatsConfig::new(brokers.urls())).await?;
        let site = Site {
            kvatlas: config.kvatlas.clone(),
            folder: folder.path().to_owned(),
            brokers: brokers.urls(),
            partition: Partition::new(config.shards).map_err(ClusterError::Partition)?,
            prefix: PREFIX,
            subjects: Subjects::new(PREFIX).expect("letters and a hyphen"),
            bus: Arc::new(bus) as Arc<dyn Bus>,
            clock: Clock::start(),
        };
        let mut rig = Self { servers: Vec::new(), brokers, site, started: 0, _folder: folder };
        for replica in 0..config.replicas {
            rig.add_servers(config.servers, replica).await?;
        }
        for at in 0..rig.servers.len() {
            rig.wait_ready(at).await?;
        }
        Ok(rig)
    }

    /// Starts one replica of every server of a division, beside those that run.
    pub async fn add_servers(&mut self, of: u32, replica: u32) -> Result<(), ClusterError> {
        for ordinal in 0..of {
            let (grpc, http) = (loopback().await?, loopback().await?);
            let config = ClientConfig { deadline: LOOK_DEADLINE, ..ClientConfig::new(grpc.to_string()) };
            let client = Client::connect(config)?;
            let number = self.started;
            self.started += 1;
            self.servers.push(Server { number, ordinal, of, replica, grpc, http, client, process: None });
            self.start_server(self.servers.len() - 1)?;
        }
        Ok(())
    }

    /// Starts a server (again). Returns as soon as the process runs; see [`Self::wait_ready`].
    pub fn start_server(&mut self, at: usize) -> Result<(), ClusterError> {
        let server = &mut self.servers[at];
        let mut arguments: Vec<OsString> =
            ["--log", "warn,kvatlas_index=info", "serve"].map(OsString::from).into();
        arguments.extend(self.site.deployment());
        arguments.extend(["--grpc-listen".into(), server.grpc.to_string().into()]);
        arguments.extend(["--http-listen".into(), server.http.to_string().into()]);
        if self.site.partition != Partition::WHOLE {
            arguments.extend(["--shard-servers".into(), server.of.to_string().into()]);
            arguments.extend(["--shard-ordinal".into(), server.ordinal.to_string().into()]);
        }
        let log = self.site.folder.join(format!("server-{}.log", server.number));
        server.process = Some(Process::start("a server", &self.site.kvatlas, &arguments, &log)?);
        Ok(())
    }

    /// Waits until a server says that its answers can be relied on.
    pub async fn wait_ready(&mut self, at: usize) -> Result<(), ClusterError> {
        let server = &mut self.servers[at];
        let http = server.http;
        if let Some(process) = &mut server.process {
            process.wait_until(async || matches!(http_get(http, "/readyz").await, Some((200, _)))).await?;
        }
        Ok(())
    }

    /// Kills a server as a crash does.
    pub async fn kill_server(&mut self, at: usize) -> Result<(), ClusterError> {
        if let Some(process) = self.servers[at].process.take() {
            process.kill().await?;
        }
        Ok(())
    }

    /// Asks a server to stop, and waits until it has.
    pub async fn stop_server(&mut self, at: usize) -> Result<(), ClusterError> {
        if let Some(process) = self.servers[at].process.take() {
            process.terminate().await?;
        }
        Ok(())
    }

    /// All servers of the rig, running or not.
    pub fn servers(&self) -> &[Server] {
        &self.servers
    }

    /// The brokers.
    pub fn brokers(&mut self) -> &mut Brokers {
        &mut self.brokers
    }

    /// What shims need to be part of the rig's deployment.
    pub fn site(&self) -> &Site {
        &self.site
    }

    /// Waits until every running server covers everything and has every one of `sources` sources verified, and says when that was.
    pub async fn wait_full(&mut self, sources: usize, wait: Duration) -> Result<Instant, ClusterError> {
        let sweep = sweep(self.site.partition);
        let deadline = Instant::now() + wait;
        loop {
            let looks = self.servers.iter().filter(|server| server.process.is_some());
            let lacking: Vec<String> = join_all(looks.map(|server| server.lacks(&sweep, sources)))
                .await
                .into_iter()
                .flatten()
                .collect();
            if lacking.is_empty() {
                return Ok(Instant::now());
            }
            for server in &mut self.servers {
                server.process.as_mut().map_or(Ok(()), Process::check)?;
            }
            if Instant::now() > deadline {
                let state = lacking.join("; ");
                return Err(ClusterError::NotInTime { what: "full coverage, all verified", wait, state });
            }
            sleep(LOOK_INTERVAL).await;
        }
    }

    /// Stops the traffic and waits until every server has exactly its part of what the engines hold: together, the servers of a
    /// replica have it block for block. The error says what was still different.
    pub async fn settle(&mut self, fleet: &Fleet) -> Result<(), ClusterError> {
        fleet.set_rate(0.0).await?;
        let deadline = Instant::now() + SETTLE_TIMEOUT;
        loop {
            self.wait_full(fleet.engines().len(), SETTLE_TIMEOUT).await?;
            match self.compare(&fleet.truth()).await {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => sleep(LOOK_INTERVAL).await,
            }
        }
    }

    async fn compare(&self, truth: &Blocks) -> Result<(), ClusterError> {
        let mut held: BTreeMap<(u32, u32), Blocks> = BTreeMap::new();
        let mut twice = 0;
        for server in self.servers.iter().filter(|server| server.process.is_some()) {
            let together = held.entry((server.of, server.replica)).or_default();
            for (instance, keys) in server.dump().await? {
                let known = together.entry(instance).or_default();
                // What two servers of one division have is what one of them should have let go.
                twice += keys.intersection(known).count();
                known.extend(keys);
            }
        }
        let nothing = BTreeSet::new();
        for together in held.values() {
            let names: BTreeSet<&String> = truth.keys().chain(together.keys()).collect();
            let (mut wrong, mut missing) = (twice, 0);
            for name in names {
                let ours = together.get(name).unwrap_or(&nothing);
                let theirs = truth.get(name).unwrap_or(&nothing);
                wrong += ours.difference(theirs).count();
                missing += theirs.difference(ours).count();
            }
            if wrong + missing > 0 {
                return Err(ClusterError::NotEqual { wrong, missing });
            }
        }
        Ok(())
    }
}

// === impl Server ===

impl Server {
    /// For people.
    pub fn name(&self) -> String {
        format!("server {}of{}/{}", self.ordinal, self.of, self.replica)
    }

    /// How many servers the shards are divided among, as it was told.
    pub fn of(&self) -> u32 {
        self.of
    }

    /// Which of several servers with the same part.
    pub fn replica(&self) -> u32 {
        self.replica
    }

    /// Where gRPC is served.
    pub fn grpc(&self) -> SocketAddr {
        self.grpc
    }

    /// Where metrics and health are served.
    pub fn http(&self) -> SocketAddr {
        self.http
    }

    /// A client for looking at it; its connection is not those of the load.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Whether its process was started and not ended by the rig.
    pub fn is_running(&self) -> bool {
        self.process.is_some()
    }

    /// The process's number.
    pub fn process_id(&self) -> Option<u32> {
        self.process.as_ref().and_then(Process::id)
    }

    /// Its metrics now; empty if it does not answer.
    pub async fn scrape(&self) -> Scrape {
        Scrape::of(self.http).await
    }

    /// What it lacks of being well, for people; `None` if nothing.
    async fn lacks(&self, sweep: &[u64], sources: usize) -> Option<String> {
        let lacks = |what: String| Some(format!("{}: {what}", self.name()));
        match http_get(self.http, "/readyz").await {
            Some((200, _)) => {}
            _ => return lacks("not ready".to_owned()),
        }
        let answer = match self.client.score(question(sweep)).await {
            Ok(answer) => answer,
            Err(error) => return lacks(error.to_string()),
        };
        if answer.coverage < 1.0 {
            return lacks(format!("coverage {} ({})", answer.coverage, answer.missing.join(", ")));
        }
        let request = grpc::ListOwnersRequest { model: MODEL.to_owned(), ..Default::default() };
        let known = match self.client.list_owners(request).await {
            Ok(answer) => answer.sources,
            Err(error) => return lacks(error.to_string()),
        };
        let doubtful = known.iter().filter(|source| source.state() != grpc::SourceState::Verified);
        let doubts: Vec<String> = doubtful
            .map(|source| format!("{} is {:?} {}", source.instance, source.state(), source.degraded_reason))
            .collect();
        if known.len() != sources || !doubts.is_empty() {
            return lacks(format!("{} of {sources} sources; {}", known.len(), doubts.join(", ")));
        }
        None
    }

    async fn dump(&self) -> Result<Blocks, CallError> {
        let mut blocks = Blocks::new();
        let request = grpc::DumpRequest { model: MODEL.to_owned(), ..Default::default() };
        let mut dump = self.client.dump(request).await?;
        while let Some(chunk) = dump.next().await? {
            blocks.entry(chunk.instance).or_default().extend(chunk.keys);
        }
        Ok(blocks)
    }
}

/// A prompt that nobody has and that lies in every shard: whoever answers it fully reaches all of them.
pub fn sweep(partition: Partition) -> Vec<u64> {
    let mut keys = Vec::new();
    for shard in 0..partition.shards() {
        let lies_here = |key: &u64| partition.shard_of(BlockKey(*key)) == shard;
        let first = (1..u64::MAX).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15)).find(lies_here);
        let first = first.expect("every shard has keys");
        keys.extend((0..u64::from(SEGMENT_BLOCKS)).map(|step| first ^ (step << 1)));
    }
    keys
}

async fn loopback() -> Result<SocketAddr, ClusterError> {
    Ok((Ipv4Addr::LOCALHOST, free_port().await.map_err(ClusterError::Port)?).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sweep_has_a_segment_in_every_shard() {
        let partition = Partition::new(64).unwrap();
        let keys = sweep(partition);
        let firsts = keys.chunks(SEGMENT_BLOCKS as usize).map(|segment| BlockKey(segment[0]));
        let shards: Vec<u16> = firsts.map(|key| partition.shard_of(key)).collect();
        assert_eq!(shards, (0..64).collect::<Vec<u16>>());
    }
}
