//! A cluster of three servers without replicas, each with a third of the slots.

use std::thread;
use std::time::{Duration, Instant};

use kvatlas_bus::test_server::program::free_port;
use redis::cmd;

use super::{Certificates, PASSWORD, TlsFront, ValkeyServer};

const NODES: usize = 3;
/// Slots of every cluster.
const SLOTS: usize = 16_384;
/// Longest wait for the nodes to agree; they take a second or two.
const AGREE_TIMEOUT: Duration = Duration::from_secs(60);
const AGREE_POLL: Duration = Duration::from_millis(50);

/// A running cluster. Dropping it ends its servers.
#[derive(Debug)]
pub struct ValkeyCluster {
    // Declared before the nodes, so that nobody connects to what is gone.
    fronts: Vec<TlsFront>,
    nodes: Vec<ValkeyServer>,
}

// === impl ValkeyCluster ===

impl ValkeyCluster {
    /// Starts a cluster; `None` (and a line on standard error) where there is no binary and none is required.
    pub fn start() -> Option<Self> {
        let nodes = (0..NODES).map(|_| start_node(&[])).collect::<Option<Vec<_>>>()?;
        let cluster = Self { fronts: Vec::new(), nodes };
        cluster.unite();
        Some(cluster)
    }

    /// Starts a cluster whose nodes name ports that speak TLS and demand a client certificate.
    pub async fn start_tls(certificates: &Certificates) -> Option<Self> {
        let mut cluster = Self::start()?;
        for node in &cluster.nodes {
            let front = TlsFront::start(node.address(), certificates).await;
            let port = front.address().port();
            let named: redis::RedisResult<()> = cmd("CONFIG")
                .arg(&["SET", "cluster-announce-port", &port.to_string()])
                .query(&mut node.connect());
            named.expect("a setting that can be changed");
            cluster.fronts.push(front);
        }
        // The other nodes learn it with the next gossip; until then they would send clients to ports without TLS.
        cluster.wait_until("every node names every port", |cluster| {
            cluster.nodes.iter().all(|node| {
                let shards: redis::Value =
                    cmd("CLUSTER").arg("SLOTS").query(&mut node.connect()).expect("slots");
                let text = format!("{shards:?}");
                cluster.fronts.iter().all(|front| text.contains(&format!("int({})", front.address().port())))
            })
        });
        Some(cluster)
    }

    /// Where clients start, as `HOST:PORT,HOST:PORT`: two of the nodes, so that the third has to be learned.
    pub fn hosts(&self) -> String {
        let own = self.nodes.iter().map(|node| node.address().to_string());
        let fronts = self.fronts.iter().map(|front| front.address().to_string());
        let hosts: Vec<String> = if self.fronts.is_empty() { own.collect() } else { fronts.collect() };
        hosts[..2].join(",")
    }

    /// The servers.
    pub fn nodes(&self) -> &[ValkeyServer] {
        &self.nodes
    }

    /// Ends all servers at once.
    pub fn stop(&mut self) {
        self.nodes.iter_mut().for_each(ValkeyServer::stop);
    }

    /// Starts them again on the same ports, empty; they remember each other.
    pub fn restart(&mut self) {
        self.nodes.iter_mut().for_each(ValkeyServer::restart);
        self.wait_until_complete();
    }

    fn unite(&self) {
        for (at, node) in self.nodes.iter().enumerate() {
            let mut connection = node.connect();
            let (first, last) = (SLOTS * at / NODES, SLOTS * (at + 1) / NODES - 1);
            let given: redis::RedisResult<()> =
                cmd("CLUSTER").arg("ADDSLOTSRANGE").arg(first).arg(last).query(&mut connection);
            given.expect("slots that nobody has");
            for other in &self.nodes {
                let bus: u16 = cluster_port(other);
                let met: redis::RedisResult<()> = cmd("CLUSTER")
                    .arg("MEET")
                    .arg("127.0.0.1")
                    .arg(other.port)
                    .arg(bus)
                    .query(&mut connection);
                met.expect("a node that listens");
            }
        }
        self.wait_until_complete();
    }

    fn wait_until_complete(&self) {
        self.wait_until("the cluster is complete", |cluster| {
            cluster.nodes.iter().all(|node| {
                let info: String = cmd("CLUSTER").arg("INFO").query(&mut node.connect()).expect("a state");
                info.contains("cluster_state:ok") && info.contains(&format!("cluster_known_nodes:{NODES}"))
            })
        });
    }

    fn wait_until(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let started = Instant::now();
        while !done(self) {
            assert!(started.elapsed() < AGREE_TIMEOUT, "it did not happen that {what}");
            thread::sleep(AGREE_POLL);
        }
    }
}

fn start_node(arguments: &[&str]) -> Option<ValkeyServer> {
    // The usual bus port, 10,000 above, may be beyond the last one.
    let bus = free_port().to_string();
    let cluster = [
        "--cluster-enabled",
        "yes",
        "--cluster-port",
        &bus,
        "--masterauth",
        PASSWORD,
        "--cluster-require-full-coverage",
        "no",
    ];
    ValkeyServer::start_with(&[&cluster[..], arguments].concat())
}

fn cluster_port(node: &ValkeyServer) -> u16 {
    let (_, port): (String, String) =
        cmd("CONFIG").arg(&["GET", "cluster-port"]).query(&mut node.connect()).expect("a setting");
    port.parse().expect("a port")
}
