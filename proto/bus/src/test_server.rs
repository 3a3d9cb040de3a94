//! A real nats-server for tests, on a free loopback port, ended with its value.
//!
//! The binary is `$KVATLAS_NATS_SERVER`, else `target/tools/nats-server` of this workspace, else `nats-server` in
//! `PATH`. Without one a test skips itself and says so on standard error, unless `KVATLAS_REQUIRE_SERVERS=1`: then its
//! absence fails the test, so that continuous integration cannot skip by accident.
//!
//! For tests only: failures panic.

use std::ffi::OsString;
use std::fs;
use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Names the binary to use.
const BINARY_VARIABLE: &str = "KVATLAS_NATS_SERVER";
/// Makes a missing binary a failure when set to `1`.
const REQUIRE_VARIABLE: &str = "KVATLAS_REQUIRE_SERVERS";
/// Longest wait for the server to greet. It takes about 50 ms; a loaded machine takes seconds.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// How often the port is tried meanwhile.
const START_POLL: Duration = Duration::from_millis(10);
/// Longest wait for the rest of a greeting on an open connection.
const GREETING_TIMEOUT: Duration = Duration::from_secs(1);
/// Ports tried: one can be taken between being found free and being used.
const PORT_ATTEMPTS: usize = 10;

/// A running (or stopped) nats-server. Dropping it ends the process and deletes its folder.
#[derive(Debug)]
pub struct NatsServer {
    binary: PathBuf,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    port: u16,
    // Declared before the folder: fields drop in this order, so the process is gone before its files are.
    process: Option<Process>,
    folder: TempDir,
}

/// A child that does not outlive its owner.
#[derive(Debug)]
struct Process(Child);

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
        let Some(binary) = find_binary() else {
            let test = thread::current().name().unwrap_or("a test").to_owned();
            assert!(
                std::env::var_os(REQUIRE_VARIABLE).is_none_or(|value| value != "1"),
                "{test} needs nats-server and {REQUIRE_VARIABLE}=1 forbids skipping: run scripts/provision"
            );
            #[allow(clippy::print_stderr, reason = "a skipped test has no other way to say so")]
            {
                eprintln!("skipped: {test} needs nats-server (run scripts/test to provision it)");
            }
            return None;
        };
        let folder = tempfile::tempdir().expect("a folder for the server's files");
        let arguments = arguments.iter().map(OsString::from).collect();
        let environment = environment.iter().map(|(name, value)| (name.into(), value.into())).collect();
        let mut server = Self { binary, arguments, environment, port: 0, process: None, folder };
        for _ in 0..PORT_ATTEMPTS {
            server.port = free_port();
            if server.launch() {
                return Some(server);
            }
        }
        panic!("nats-server did not start on any of {PORT_ATTEMPTS} ports: {}", server.log());
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
        panic!("nats-server did not start again on port {}: {}", self.port, self.log());
    }

    fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// Whether a server runs and greets; `false` if it ended, which is what a taken port makes it do.
    fn launch(&mut self) -> bool {
        let child = Command::new(&self.binary)
            .args(["-a", "127.0.0.1", "-p", &self.port.to_string()])
            .arg("--store_dir")
            .arg(self.folder.path())
            .arg("--log")
            .arg(self.log_path())
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run {}: {error}", self.binary.display()));
        let mut process = Process(child);
        let started = Instant::now();
        while started.elapsed() < START_TIMEOUT {
            if process.0.try_wait().expect("the state of our own child").is_some() {
                return false;
            }
            if greets(self.address()) {
                self.process = Some(process);
                return true;
            }
            thread::sleep(START_POLL);
        }
        panic!("nats-server on port {} did not greet within {START_TIMEOUT:?}: {}", self.port, self.log());
    }

    fn log_path(&self) -> PathBuf {
        self.folder.path().join("nats-server.log")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_else(|error| format!("no log ({error})"))
    }
}

// === impl Process ===

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if the process is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn find_binary() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os(BINARY_VARIABLE) {
        let path = PathBuf::from(path);
        assert!(path.is_file(), "{BINARY_VARIABLE} names {}, which is no file", path.display());
        return Some(path);
    }
    let name = format!("nats-server{}", std::env::consts::EXE_SUFFIX);
    let provisioned =
        Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().map(|d| d.join("target/tools").join(&name));
    let search = std::env::var_os("PATH").unwrap_or_default();
    let installed = std::env::split_paths(&search).map(|d| d.join(&name));
    provisioned.chain(installed).find(|path| path.is_file())
}

fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free loopback port");
    listener.local_addr().expect("the address of a bound socket").port()
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
