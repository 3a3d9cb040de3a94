//! A cluster of real brokers on loopback, every cable of which goes through a [`Proxy`].
//!
//! Clients know the brokers by the proxies in front of them, and each broker knows each other one by a proxy of that pair. So a
//! node can be cut off from everybody. Brokers tell nobody about addresses behind the proxies: what they would tell each other
//! is an address at which nothing is ever let through.

use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::ClusterError;
use super::proxy::Proxy;
use crate::recovery::processes::{Process, free_port, http_get, nats_greets};

/// What a broker of a deployment should be told beyond addresses: that it probes its clients and the other brokers often, so that
/// one that hangs is not sent messages for minutes.
const SETTINGS: &str = "ping_interval: \"2s\"\nping_max: 2\ncluster { ping_interval: \"2s\" }\n";
/// Longest wait for brokers to find each other.
const JOIN_TIMEOUT: Duration = Duration::from_secs(30);
/// Time between two looks meanwhile.
const JOIN_POLL: Duration = Duration::from_millis(50);

/// Some brokers as one.
pub struct Brokers {
    program: PathBuf,
    folder: PathBuf,
    nodes: Vec<Node>,
    /// Who shall not be reached by what brokers tell each other.
    nowhere: Proxy,
}

struct Node {
    process: Option<Process>,
    clients: SocketAddr,
    routes: SocketAddr,
    monitor: SocketAddr,
    /// In front of `clients`.
    door: Proxy,
    /// To the routes of each other node.
    cables: Vec<(usize, Proxy)>,
}

// === impl Brokers ===

impl Brokers {
    /// Starts `count` brokers and waits until all know each other.
    pub async fn start(program: &Path, folder: &Path, count: usize) -> Result<Self, ClusterError> {
        let mut ports = Vec::new();
        for _ in 0..count {
            ports.push([address().await?, address().await?, address().await?]);
        }
        let nowhere = proxy(ports[0][0]).await?;
        nowhere.set_open(false);
        let mut nodes = Vec::new();
        for (number, [clients, routes, monitor]) in ports.iter().copied().enumerate() {
            let mut cables = Vec::new();
            for (other, [_, routes, _]) in ports.iter().enumerate().filter(|(other, _)| *other != number) {
                cables.push((other, proxy(*routes).await?));
            }
            let door = proxy(clients).await?;
            nodes.push(Node { process: None, clients, routes, monitor, door, cables });
        }
        let mut brokers = Self { program: program.to_owned(), folder: folder.to_owned(), nodes, nowhere };
        for number in 0..count {
            brokers.start_node(number).await?;
        }
        brokers.wait_joined().await?;
        Ok(brokers)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.nodes.len()
    }

    /// Where clients connect to.
    pub fn urls(&self) -> Vec<String> {
        self.nodes.iter().map(|node| format!("nats://{}", node.door.address())).collect()
    }

    /// Starts a node (again), under its old address.
    pub async fn start_node(&mut self, number: usize) -> Result<(), ClusterError> {
        let node = &self.nodes[number];
        let routes: Vec<String> =
            node.cables.iter().map(|(_, cable)| format!("nats://{}", cable.address())).collect();
        let settings = self.folder.join(format!("broker-{number}.conf"));
        std::fs::write(&settings, SETTINGS).map_err(ClusterError::Folder)?;
        let mut arguments: Vec<OsString> = vec![
            "-c".into(),
            settings.into(),
            "-a".into(),
            "127.0.0.1".into(),
            "-p".into(),
            node.clients.port().to_string().into(),
            "-m".into(),
            node.monitor.port().to_string().into(),
            "--server_name".into(),
            format!("broker-{number}").into(),
        ];
        if !routes.is_empty() {
            arguments.extend([
                "--cluster_name".into(),
                "rig".into(),
                "--cluster".into(),
                format!("nats://{}", node.routes).into(),
                "--cluster_advertise".into(),
                self.nowhere.address().to_string().into(),
                "--no_advertise".into(),
                "--routes".into(),
                routes.join(",").into(),
            ]);
        }
        let log = self.folder.join(format!("broker-{number}.log"));
        let mut process = Process::start("nats-server", &self.program, &arguments, &log)?;
        let clients = node.clients;
        process.wait_until(async || nats_greets(clients).await).await?;
        self.nodes[number].process = Some(process);
        Ok(())
    }

    /// Kills a node as a crash does.
    pub async fn kill(&mut self, number: usize) -> Result<(), ClusterError> {
        if let Some(process) = self.nodes[number].process.take() {
            process.kill().await?;
        }
        Ok(())
    }

    /// Asks a node to stop, and waits until it has.
    pub async fn stop_node(&mut self, number: usize) -> Result<(), ClusterError> {
        if let Some(process) = self.nodes[number].process.take() {
            process.terminate().await?;
        }
        Ok(())
    }

    /// Cuts every cable of a node, or joins them again.
    pub fn set_cut(&self, number: usize, cut: bool) {
        for (at, node) in self.nodes.iter().enumerate() {
            if at == number {
                node.door.set_open(!cut);
            }
            for (_, cable) in node.cables.iter().filter(|(to, _)| at == number || *to == number) {
                cable.set_open(!cut);
            }
        }
    }

    /// Holds a node where it is: its connections stay, and nothing comes from it.
    pub async fn set_frozen(&self, number: usize, frozen: bool) -> Result<(), ClusterError> {
        if let Some(process) = &self.nodes[number].process {
            if frozen { process.freeze().await? } else { process.thaw().await? }
        }
        Ok(())
    }

    /// Waits until every node that runs knows all others.
    pub async fn wait_joined(&self) -> Result<(), ClusterError> {
        let deadline = Instant::now() + JOIN_TIMEOUT;
        loop {
            let mut joined = true;
            for node in self.nodes.iter().filter(|node| node.process.is_some()) {
                joined &= node.others().await + 1 == self.nodes.len();
            }
            if joined {
                return Ok(());
            }
            if Instant::now() > deadline {
                let (what, wait) = ("brokers that know each other", JOIN_TIMEOUT);
                return Err(ClusterError::NotInTime { what, wait, state: "some are alone".to_owned() });
            }
            sleep(JOIN_POLL).await;
        }
    }
}

// === impl Node ===

impl Node {
    /// Other nodes that it is connected to.
    async fn others(&self) -> usize {
        let Some((_, text)) = http_get(self.monitor, "/routez").await else { return 0 };
        let routes: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        let ids = routes["routes"].as_array().into_iter().flatten();
        let ids: std::collections::BTreeSet<&str> =
            ids.filter_map(|route| route["remote_id"].as_str()).collect();
        ids.len()
    }
}

async fn address() -> Result<SocketAddr, ClusterError> {
    Ok((Ipv4Addr::LOCALHOST, free_port().await.map_err(ClusterError::Port)?).into())
}

async fn proxy(target: SocketAddr) -> Result<Proxy, ClusterError> {
    Proxy::start(target).await.map_err(ClusterError::Port)
}
