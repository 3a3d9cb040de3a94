//! Child processes of a rig: the broker, and `kvatlas` in its roles. Killed as a crash kills, and gone with their owner.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

/// Longest wait for a process to do what it was started for. A loaded machine takes seconds.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// How often it is looked meanwhile.
const START_POLL: Duration = Duration::from_millis(5);
/// Longest time for one HTTP request on loopback.
const HTTP_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest answer to one.
const HTTP_MAX_BYTES: u64 = 4 << 20;
/// Lines of a log that an error shows.
const LOG_LINES: usize = 8;

/// A running child, killed when dropped.
#[derive(Debug)]
pub struct Process {
    name: &'static str,
    child: Child,
    log: PathBuf,
    started: Instant,
}

/// A child could not be started, or did not do what it was started for.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The program cannot be run.
    #[error("{name} cannot be started from {}: {source}", program.display())]
    Start {
        /// Which role.
        name: &'static str,
        /// Which program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It ended by itself.
    #[error("{name} ended ({status}); it said: {log}")]
    Ended {
        /// Which role.
        name: &'static str,
        /// How.
        status: String,
        /// The end of its log.
        log: String,
    },
    /// It does not answer.
    #[error("{name} did not answer within {START_TIMEOUT:?}; it said: {log}")]
    Silent {
        /// Which role.
        name: &'static str,
        /// The end of its log.
        log: String,
    },
    /// It cannot be killed, or its end not be waited for.
    #[error("{name} cannot be ended: {source}")]
    Kill {
        /// Which role.
        name: &'static str,
        /// Why.
        source: io::Error,
    },
}

// === impl Process ===

impl Process {
    /// Starts a program. What it writes is appended to `log`. Settings of whoever runs this do not reach it.
    pub fn start(
        name: &'static str,
        program: &Path,
        arguments: &[OsString],
        log: &Path,
    ) -> Result<Self, ProcessError> {
        let failed = |source| ProcessError::Start { name, program: program.to_owned(), source };
        let (out, err) = log_files(log).map_err(failed)?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(out).stderr(err).kill_on_drop(true);
        for (variable, _) in std::env::vars_os() {
            if variable.to_string_lossy().starts_with("KVATLAS_") {
                command.env_remove(variable);
            }
        }
        let started = Instant::now();
        let child = command.spawn().map_err(failed)?;
        Ok(Self { name, child, log: log.to_owned(), started })
    }

    /// When it was started.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Waits until `is_up` says so. An error if the process ends before, or takes too long.
    pub async fn wait_until(&mut self, mut is_up: impl AsyncFnMut() -> bool) -> Result<(), ProcessError> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            if is_up().await {
                return Ok(());
            }
            self.check()?;
            if Instant::now() > deadline {
                return Err(ProcessError::Silent { name: self.name, log: self.last_words() });
            }
            sleep(START_POLL).await;
        }
    }

    /// An error if it has ended by itself.
    pub fn check(&mut self) -> Result<(), ProcessError> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(ProcessError::Ended {
                name: self.name,
                status: status.to_string(),
                log: self.last_words(),
            }),
            Err(source) => Err(ProcessError::Kill { name: self.name, source }),
        }
    }

    /// Kills it as a crash does (SIGKILL) and waits until it is gone.
    pub async fn kill(mut self) -> Result<(), ProcessError> {
        self.child.kill().await.map_err(|source| ProcessError::Kill { name: self.name, source })
    }

    /// Asks it to stop (SIGTERM) and waits until it is gone.
    pub async fn terminate(mut self) -> Result<(), ProcessError> {
        self.signal("TERM").await?;
        let failed = |source| ProcessError::Kill { name: self.name, source };
        match timeout(START_TIMEOUT, self.child.wait()).await {
            Ok(ended) => ended.map(drop).map_err(failed),
            Err(_) => self.kill().await,
        }
    }

    /// Holds it where it is (SIGSTOP): it keeps its connections and says nothing.
    pub async fn freeze(&self) -> Result<(), ProcessError> {
        self.signal("STOP").await
    }

    /// Lets it go on (SIGCONT).
    pub async fn thaw(&self) -> Result<(), ProcessError> {
        self.signal("CONT").await
    }

    /// Its number while it runs.
    pub fn id(&self) -> Option<u32> {
        self.child.id()
    }

    async fn signal(&self, name: &str) -> Result<(), ProcessError> {
        let Some(pid) = self.child.id() else { return Ok(()) };
        let sent = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().await;
        sent.map(drop).map_err(|source| ProcessError::Kill { name: self.name, source })
    }

    fn last_words(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join(" | ")
    }
}

fn log_files(path: &Path) -> io::Result<(File, File)> {
    let out = OpenOptions::new().create(true).append(true).open(path)?;
    let err = out.try_clone()?;
    Ok((out, err))
}

/// A loopback port that was free just now.
pub async fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?.local_addr()?.port())
}

/// A NATS server speaks first. Waiting for that, and not only for an open port, means that it is ready.
pub async fn nats_greets(address: SocketAddr) -> bool {
    let greeting = async {
        let mut stream = TcpStream::connect(address).await.ok()?;
        let mut greeting = [0_u8; 4];
        stream.read_exact(&mut greeting).await.ok()?;
        Some(greeting)
    };
    matches!(timeout(HTTP_TIMEOUT, greeting).await, Ok(Some(greeting)) if &greeting == b"INFO")
}

/// The status and body of an HTTP GET on loopback; `None` without an answer.
pub async fn http_get(address: SocketAddr, path: &str) -> Option<(u16, String)> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await.ok()?;
        // Of version 1.0, so that the answer comes in one piece.
        let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = String::new();
        stream.take(HTTP_MAX_BYTES).read_to_string(&mut answer).await.ok()?;
        Some(answer)
    };
    let answer = timeout(HTTP_TIMEOUT, exchange).await.ok().flatten()?;
    let status = answer.split(' ').nth(1)?.parse().ok()?;
    let (_, body) = answer.split_once("\r\n\r\n")?;
    Some((status, body.to_owned()))
}

/// Where the broker's program is: as given, else `$KVATLAS_NATS_SERVER`, else `target/tools` of the workspace that this was
/// built in, else in `PATH`.
pub fn find_nats_server(given: Option<&Path>) -> Option<PathBuf> {
    if let Some(given) = given {
        return Some(given.to_owned());
    }
    if let Some(path) = std::env::var_os("KVATLAS_NATS_SERVER") {
        return Some(PathBuf::from(path));
    }
    let name = format!("nats-server{}", std::env::consts::EXE_SUFFIX);
    let workspaces =
        Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().map(|dir| dir.join("target/tools").join(&name));
    let search = std::env::var_os("PATH").unwrap_or_default();
    let installed = std::env::split_paths(&search).map(|dir| dir.join(&name));
    workspaces.chain(installed).find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Process {
        let folder = tempfile::tempdir().unwrap();
        let arguments = ["-c", script].map(OsString::from);
        Process::start("a shell", Path::new("/bin/sh"), &arguments, &folder.path().join("log")).unwrap()
    }

    #[tokio::test]
    async fn a_process_that_ends_by_itself_is_reported_with_its_last_words() {
        let folder = tempfile::tempdir().unwrap();
        let arguments = ["-c", "echo out of order; exit 3"].map(OsString::from);
        let mut process =
            Process::start("a shell", Path::new("/bin/sh"), &arguments, &folder.path().join("log")).unwrap();
        let error = process.wait_until(async || false).await.unwrap_err().to_string();
        assert!(error.contains("out of order") && error.contains('3'), "{error}");
    }

    #[tokio::test]
    async fn a_process_that_is_asked_to_stop_does_what_it_has_to() {
        let folder = tempfile::tempdir().unwrap();
        let done = folder.path().join("done");
        let script =
            format!("trap 'touch {}; exit' TERM; echo up; while :; do sleep 0.02; done", done.display());
        let log = folder.path().join("log");
        let mut process =
            Process::start("a shell", Path::new("/bin/sh"), &["-c".into(), script.into()], &log).unwrap();
        process.wait_until(async || fs::read(&log).is_ok_and(|said| !said.is_empty())).await.unwrap();
        process.terminate().await.unwrap();
        assert!(done.exists());
    }

    #[tokio::test]
    async fn a_killed_process_is_gone() {
        let mut process = shell("sleep 600");
        process.check().unwrap();
        process.kill().await.unwrap();
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = Process::start("it", Path::new("/nonexistent/it"), &[], &folder.path().join("log"));
        assert!(error.unwrap_err().to_string().contains("/nonexistent/it"));
    }

    #[tokio::test]
    async fn nobody_answers_where_nobody_listens() {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port().await.unwrap()));
        assert!(http_get(address, "/").await.is_none() && !nats_greets(address).await);
    }
}
