//! Real nats-servers for tests, on free loopback ports, ended with their values: one alone, or a cluster.
//!
//! The binary is `$KVATLAS_NATS_SERVER`, else `target/tools/nats-server` of this workspace, else `nats-server` in
//! `PATH`. Without one a test skips itself and says so on standard error, unless `KVATLAS_REQUIRE_SERVERS=1`: then its
//! absence fails the test, so that continuous integration cannot skip by accident.
//!
//! For tests only: failures panic.

pub mod program;

use std::ffi::OsString;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use program::{PORT_ATTEMPTS, Process, Program, START_POLL, START_TIMEOUT, free_port, free_ports, log_text};

/// Names the binary to use.
const BINARY_VARIABLE: &str = "KVATLAS_NATS_SERVER";
/// Longest wait for the rest of a greeting on an open connection.
const GREETING_TIMEOUT: Duration = Duration::from_secs(1);

/// A running (or stopped) nats-server. Dropping it ends the process and deletes its folder.
#[derive(Debug)]
pub struct NatsServer {
    program: Program,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    port: u16,
    // Declared before the folder: fields drop in this order, so the process is gone before its files are.
    process: Option<Process>,
    folder: TempDir,
}

/// Several nats-servers that are one cluster with JetStream. Dropping it ends all of them and deletes their folders.
#[derive(Debug)]
pub struct NatsCluster {
    nodes: Vec<ClusterNode>,
}

#[derive(Debug)]
struct ClusterNode {
    server: NatsServer,
    /// Where it says whether it is in order.
    monitor: u16,
}

// === impl NatsServer ===

impl NatsServer {
    /// Starts a server; `None` (and a line on standard error) where there is no binary and none is required.
    pub fn start() -> Option<Self> {
        Self::start_with(&[])
    }

    /// Like [`Self::start`], with further command line arguments, such as `["--user", "u", "--pass", "p"]`.
    pub fn start_with(arguments: &[&str]) -> Option<Self> {
        Self::start_in(arguments, &[])
    }

    /// The same, with variables that a configuration file refers to.
    pub fn start_in(arguments: &[&str], environment: &[(&str, &str)]) -> Option<Self> {
        let arguments: Vec<OsString> = arguments.iter().map(OsString::from).collect();
        let mut server = Self::stopped(Program::find("nats-server", BINARY_VARIABLE)?, 0, arguments);
        server.environment = environment.iter().map(|(name, value)| (name.into(), value.into())).collect();
        for _ in 0..PORT_ATTEMPTS {
            server.port = free_port();
            if server.launch() {
                return Some(server);
            }
        }
        panic!("nats-server did not start on any of {PORT_ATTEMPTS} ports: {}", log_text(&server.log_path()));
    }

    /// Like [`Self::start`], with JetStream. What is stored survives [`Self::restart`].
    pub fn start_jetstream() -> Option<Self> {
        Self::start_with(&["-js"])
    }

    fn stopped(program: Program, port: u16, arguments: Vec<OsString>) -> Self {
        let folder = tempfile::tempdir().expect("a folder for the server's files");
        Self { program, arguments, environment: Vec::new(), port, process: None, folder }
    }

    /// Where clients connect, without credentials.
    pub fn url(&self) -> String {
        format!("nats://{}", self.address())
    }

    /// Ends the process at once, as a crash does. A stopped server stays stopped until [`Self::restart`].
    pub fn stop(&mut self) {
        self.process = None;
    }

    /// Ends the process, if it runs, and starts a new one on the same port.
    pub fn restart(&mut self) {
        self.stop();
        self.launch_again();
    }

    fn launch_again(&mut self) {
        for _ in 0..PORT_ATTEMPTS {
            if self.launch() {
                return;
            }
            // Whoever took the port meanwhile is most likely a short connection.
            thread::sleep(Duration::from_millis(200));
        }
        panic!("nats-server did not start again on port {}: {}", self.port, log_text(&self.log_path()));
    }

    /// Deletes what a stopped server has stored.
    pub fn forget(&mut self) {
        assert!(self.process.is_none(), "only a stopped server forgets");
        self.folder = tempfile::tempdir().expect("a folder for the server's files");
    }

    fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// Whether a server runs and greets; `false` if it ended, which is what a taken port makes it do.
    fn launch(&mut self) -> bool {
        let (address, log) = (self.address(), self.log_path());
        let mut command = self.program.command();
        command
            .args(["-a", "127.0.0.1", "-p", &self.port.to_string()])
            .arg("--store_dir")
            .arg(self.folder.path())
            .arg("--log")
            .arg(&log)
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        self.process = self.program.launch(command, &log, || greets(address));
        self.process.is_some()
    }

    fn log_path(&self) -> PathBuf {
        self.folder.path().join("nats-server.log")
    }
}

// === impl NatsCluster ===

impl NatsCluster {
    /// Starts a cluster of so many servers and waits until every one has found the others and keeps buckets; `None` (and a
    /// line on standard error) where there is no binary and none is required.
    pub fn start(servers: usize) -> Option<Self> {
        let program = Program::find("nats-server", BINARY_VARIABLE)?;
        for _ in 0..PORT_ATTEMPTS {
            let mut cluster = Self { nodes: nodes(&program, servers) };
            // The first server waits for nobody: those that come later find it.
            if cluster.nodes.iter_mut().all(|node| node.server.launch()) {
                (0..servers).for_each(|node| cluster.wait_until_well(node));
                return Some(cluster);
            }
        }
        panic!("a cluster of {servers} nats-servers did not start on any of {PORT_ATTEMPTS} sets of ports");
    }

    /// Where clients connect, by server. A client that is given one learns the others.
    pub fn urls(&self) -> Vec<String> {
        self.nodes.iter().map(|node| node.server.url()).collect()
    }

    /// Ends one server at once, as a crash does. It stays stopped until [`Self::restart`].
    pub fn kill(&mut self, node: usize) {
        self.nodes[node].server.stop();
    }

    /// Ends one server, if it runs, starts it again with what it had stored, and waits until it keeps buckets again. The
    /// others must be a majority, or nothing can be kept.
    pub fn restart(&mut self, node: usize) {
        self.start_again(node);
        self.wait_until_well(node);
    }

    /// The same for all of them at once.
    pub fn restart_all(&mut self) {
        let all = 0..self.nodes.len();
        all.clone().for_each(|node| self.kill(node));
        all.clone().for_each(|node| self.start_again(node));
        all.for_each(|node| self.wait_until_well(node));
    }

    fn start_again(&mut self, node: usize) {
        self.kill(node);
        self.nodes[node].server.launch_again();
    }

    fn wait_until_well(&self, node: usize) {
        let ClusterNode { server, monitor } = &self.nodes[node];
        let started = Instant::now();
        while !is_well(*monitor) {
            assert!(
                started.elapsed() < START_TIMEOUT,
                "nats-server {node} of the cluster is not well within {START_TIMEOUT:?}: {}",
                log_text(&server.log_path())
            );
            thread::sleep(START_POLL);
        }
    }
}

/// Servers that know each other's addresses, not started yet.
fn nodes(program: &Program, servers: usize) -> Vec<ClusterNode> {
    let ports = free_ports(3 * servers);
    let (clients, others) = ports.split_at(servers);
    let (monitors, routes) = others.split_at(servers);
    let url = |port: &u16| format!("nats://127.0.0.1:{port}");
    let all: Vec<String> = routes.iter().map(url).collect();
    let node = |number: usize| {
        let name = format!("n{number}");
        let monitor = monitors[number].to_string();
        let arguments = [
            ["--name", name.as_str()],
            ["--cluster_name", "kvatlas-test"],
            ["--cluster", all[number].as_str()],
            ["--routes", all.join(",").as_str()],
            ["--http_port", monitor.as_str()],
        ]
        .concat()
        .into_iter()
        .chain(["-js"])
        .map(OsString::from)
        .collect();
        let server = NatsServer::stopped(program.clone(), clients[number], arguments);
        ClusterNode { server, monitor: monitors[number] }
    };
    (0..servers).map(node).collect()
}

/// Whether the server calls itself in order, which with JetStream includes that the cluster has a leader.
fn is_well(monitor: u16) -> bool {
    let Ok(mut stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, monitor)) else {
        return false;
    };
    let mut status = [0_u8; 12];
    stream.set_read_timeout(Some(GREETING_TIMEOUT)).is_ok()
        && stream.write_all(b"GET /healthz HTTP/1.0\r\n\r\n").is_ok()
        && stream.read_exact(&mut status).is_ok()
        && status.ends_with(b" 200")
}

/// A NATS server speaks first, with `INFO`. Waiting for it (and not just for an open port) means that the server is
/// ready and that it is not somebody else's.
fn greets(address: SocketAddr) -> bool {
    let Ok(mut stream) = TcpStream::connect_timeout(&address, GREETING_TIMEOUT) else {
        return false;
    };
    let mut greeting = [0_u8; 4];
    stream.set_read_timeout(Some(GREETING_TIMEOUT)).is_ok()
        && stream.read_exact(&mut greeting).is_ok()
        && &greeting == b"INFO"
}
