//! What test servers have in common: finding the program, a free port, and a process that ends with its value.
//!
//! For tests only: failures panic.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Makes a missing program a failure when set to `1`.
const REQUIRE_VARIABLE: &str = "KVATLAS_REQUIRE_SERVERS";
/// Longest wait for a server to greet. It takes about 50 ms; a loaded machine takes seconds.
pub const START_TIMEOUT: Duration = Duration::from_secs(30);
/// How often it is tried meanwhile.
pub const START_POLL: Duration = Duration::from_millis(10);
/// Ports tried: one can be taken between being found free and being used.
pub const PORT_ATTEMPTS: usize = 10;

/// A server's program.
#[derive(Clone, Debug)]
pub struct Program {
    name: &'static str,
    path: PathBuf,
}

/// A child that does not outlive its owner.
#[derive(Debug)]
pub struct Process(Child);

// === impl Program ===

impl Program {
    /// The program that the environment variable names, else `target/tools/NAME` of this workspace, else `NAME` in `PATH`.
    /// `None` (and a line on standard error that names the test) where there is none and none is required.
    pub fn find(name: &'static str, variable: &str) -> Option<Self> {
        if let Some(path) = find_binary(name, variable) {
            return Some(Self { name, path });
        }
        let test = thread::current().name().unwrap_or("a test").to_owned();
        assert!(
            std::env::var_os(REQUIRE_VARIABLE).is_none_or(|value| value != "1"),
            "{test} needs {name} and {REQUIRE_VARIABLE}=1 forbids skipping: run scripts/provision"
        );
        #[allow(clippy::print_stderr, reason = "a skipped test has no other way to say so")]
        {
            eprintln!("skipped: {test} needs {name} (run scripts/test to provision it)");
        }
        None
    }

    /// A command that runs it, without input or output.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.path);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// Runs the command until it `greets`. `None` if it ended first, which is what a taken port makes servers do. `log` is
    /// shown when it neither greets nor ends.
    pub fn launch(
        &self,
        mut command: Command,
        log: &Path,
        mut greets: impl FnMut() -> bool,
    ) -> Option<Process> {
        let child =
            command.spawn().unwrap_or_else(|error| panic!("cannot run {}: {error}", self.path.display()));
        let mut process = Process(child);
        let started = Instant::now();
        while started.elapsed() < START_TIMEOUT {
            if process.0.try_wait().expect("the state of our own child").is_some() {
                return None;
            }
            if greets() {
                return Some(process);
            }
            thread::sleep(START_POLL);
        }
        panic!("{} did not greet within {START_TIMEOUT:?}: {}", self.name, log_text(log));
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

/// A server's log, for messages.
pub fn log_text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| format!("no log ({error})"))
}

/// A loopback port that nobody used a moment ago.
pub fn free_port() -> u16 {
    free_ports(1)[0]
}

/// Different ports: each is held until all are found.
pub fn free_ports(count: usize) -> Vec<u16> {
    let bind = |_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free loopback port");
    let listeners: Vec<TcpListener> = (0..count).map(bind).collect();
    let port = |listener: &TcpListener| listener.local_addr().expect("the address of a bound socket").port();
    listeners.iter().map(port).collect()
}

fn find_binary(name: &str, variable: &str) -> Option<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        let path = PathBuf::from(path);
        assert!(path.is_file(), "{variable} names {}, which is no file", path.display());
        return Some(path);
    }
    let name = format!("{name}{}", std::env::consts::EXE_SUFFIX);
    let provisioned =
        Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().map(|d| d.join("target/tools").join(&name));
    let search = std::env::var_os("PATH").unwrap_or_default();
    let installed = std::env::split_paths(&search).map(|d| d.join(&name));
    provisioned.chain(installed).find(|path| path.is_file())
}
