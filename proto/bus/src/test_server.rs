//! A real nats-server for tests, on a free loopback port, ended with its value.
//!
//! The binary is `$KVATLAS_NATS_SERVER`, else `target/tools/nats-server` of this workspace, else `nats-server` in
//! `PATH`. Without one a test skips itself and says so on standard error, unless `KVATLAS_REQUIRE_SERVERS=1`: then its
//! absence fails the test, so that continuous integration cannot skip by accident.
//!
//! For tests only: failures panic.

pub mod program;

use std::ffi::OsString;
use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use program::{PORT_ATTEMPTS, Process, Program, free_port, log_text};

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
        let program = Program::find("nats-server", BINARY_VARIABLE)?;
        let folder = tempfile::tempdir().expect("a folder for the server's files");
        let arguments = arguments.iter().map(OsString::from).collect();
        let environment = environment.iter().map(|(name, value)| (name.into(), value.into())).collect();
        let mut server = Self { program, arguments, environment, port: 0, process: None, folder };
        for _ in 0..PORT_ATTEMPTS {
            server.port = free_port();
            if server.launch() {
                return Some(server);
            }
        }
        panic!("nats-server did not start on any of {PORT_ATTEMPTS} ports: {}", log_text(&server.log_path()));
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
        for _ in 0..PORT_ATTEMPTS {
            if self.launch() {
                return;
            }
            // Whoever took the port meanwhile is most likely a short connection.
            thread::sleep(Duration::from_millis(200));
        }
        panic!("nats-server did not start again on port {}: {}", self.port, log_text(&self.log_path()));
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
