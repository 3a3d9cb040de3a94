//! Real Valkey (or Redis) servers for tests: one, one behind TLS, and a cluster, on free loopback ports, ended with their values.
//!
//! The binary is `$KVATLAS_VALKEY_SERVER` (which may be a redis-server, 7.0 or newer), else `target/tools/valkey-server` of this
//! workspace, else `valkey-server` in `PATH`. Without one a test skips itself and says so, unless `KVATLAS_REQUIRE_SERVERS=1`.
//!
//! Every server demands the password [`PASSWORD`]. For tests only: failures panic.

mod certificates;
mod cluster;
mod tls;

use std::ffi::OsString;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use kvatlas_bus::test_server::program::{PORT_ATTEMPTS, Process, Program, free_port, log_text};
use tempfile::TempDir;

pub use certificates::Certificates;
pub use cluster::ValkeyCluster;
pub use tls::{TlsFront, TlsServer};

/// The default user's password. Not a secret: the servers live for one test, on loopback.
pub const PASSWORD: &str = "a password for tests";

/// Names the binary to use.
const BINARY_VARIABLE: &str = "KVATLAS_VALKEY_SERVER";
/// Longest wait for an answer on an open connection.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// A running (or stopped) server. Dropping it ends the process and deletes its folder.
#[derive(Debug)]
pub struct ValkeyServer {
    program: Program,
    arguments: Vec<OsString>,
    port: u16,
    // Declared before the folder: fields drop in this order, so the process is gone before its files are.
    process: Option<Process>,
    folder: TempDir,
}

// === impl ValkeyServer ===

impl ValkeyServer {
    /// Starts a server; `None` (and a line on standard error) where there is no binary and none is required.
    pub fn start() -> Option<Self> {
        Self::start_with(&[])
    }

    /// Like [`Self::start`], with further settings, such as `["--maxmemory", "100mb"]`.
    pub fn start_with(arguments: &[&str]) -> Option<Self> {
        let mut server = Self::prepare(arguments)?;
        for _ in 0..PORT_ATTEMPTS {
            server.port = free_port();
            if server.launch() {
                return Some(server);
            }
        }
        panic!("valkey-server did not start on any of {PORT_ATTEMPTS} ports: {}", server.log());
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// A connection for the test itself.
    pub fn connect(&self) -> redis::Connection {
        let settings = redis::RedisConnectionInfo::default().set_password(PASSWORD);
        let info = redis::IntoConnectionInfo::into_connection_info(("127.0.0.1", self.port));
        let client = redis::Client::open(info.expect("an address").set_redis_settings(settings));
        client.and_then(|client| client.get_connection()).expect("a running server")
    }

    /// Ends the process at once, as a crash does; what it held is gone. A stopped server stays stopped until
    /// [`Self::restart`].
    pub fn stop(&mut self) {
        self.process = None;
    }

    /// Ends the process, if it runs, and starts a new one on the same port.
    pub fn restart(&mut self) {
        self.stop();
        for _ in 0..PORT_ATTEMPTS {
            if self.launch() {
                return;
            }
            // Whoever took the port meanwhile is most likely a short connection.
            thread::sleep(Duration::from_millis(200));
        }
        panic!("valkey-server did not start again on port {}: {}", self.port, self.log());
    }

    fn prepare(arguments: &[&str]) -> Option<Self> {
        let program = Program::find("valkey-server", BINARY_VARIABLE)?;
        let folder = tempfile::tempdir().expect("a folder for the server's files");
        let arguments = arguments.iter().map(OsString::from).collect();
        Some(Self { program, arguments, port: 0, process: None, folder })
    }

    /// Whether a server runs and answers; `false` if it ended, which is what a taken port makes it do.
    fn launch(&mut self) -> bool {
        let (address, log) = (self.address(), self.log_path());
        let mut command = self.program.command();
        command
            .args(["--bind", "127.0.0.1", "--port", &self.port.to_string(), "--requirepass", PASSWORD])
            // Nothing is written to disk: what a restarted server has was lost, as in a plain installation.
            .args(["--save", "", "--appendonly", "no"])
            .arg("--dir")
            .arg(self.folder.path())
            .arg("--logfile")
            .arg(&log)
            .args(&self.arguments);
        self.process = self.program.launch(command, &log, || answers(address));
        self.process.is_some()
    }

    fn log_path(&self) -> PathBuf {
        self.folder.path().join("valkey-server.log")
    }

    fn log(&self) -> String {
        log_text(&self.log_path())
    }
}

/// A server that demands a password says so when it is asked for a sign of life.
fn answers(address: SocketAddr) -> bool {
    let Ok(mut stream) = TcpStream::connect_timeout(&address, ANSWER_TIMEOUT) else {
        return false;
    };
    let mut answer = [0_u8; 7];
    stream.set_read_timeout(Some(ANSWER_TIMEOUT)).is_ok()
        && stream.write_all(b"PING\r\n").is_ok()
        && stream.read_exact(&mut answer).is_ok()
        && &answer == b"-NOAUTH"
}
