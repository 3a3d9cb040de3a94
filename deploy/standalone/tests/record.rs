//! `kvatlas record` as its users see it: a live engine, a signal, a file that plays.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use kvatlas_loadtest::kvrec::{Record, RecordKind, Recording};
use kvatlas_loadtest::publisher::{EnginePublisher, PublisherConfig};
use kvatlas_loadtest::wire::Batch;
use kvatlas_loadtest::wire::{BlockStored, EngineHash, Event};

/// Longest wait for anything; far above what it takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// A started process, killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Gone already, or to go now; both are fine.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    fn start(arguments: &[&str]) -> Self {
        Self(kvatlas(arguments).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap())
    }

    fn signal(&self, signal: &str) {
        let pid = self.0.id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    /// Exit code and standard output.
    fn wait(mut self) -> (Option<i32>, String) {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "still running");
            std::thread::sleep(Duration::from_millis(20));
        };
        let mut stdout = String::new();
        // One line: far less than a pipe holds, so the process never waited for this.
        std::io::Read::read_to_string(&mut self.0.stdout.take().unwrap(), &mut stdout).unwrap();
        (status.code(), stdout)
    }
}

fn kvatlas(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvatlas"));
    command.args(arguments).stdin(Stdio::null());
    // Settings of whoever runs the tests must not reach them.
    for (name, _) in std::env::vars() {
        if name.starts_with("KVATLAS_") {
            command.env_remove(name);
        }
    }
    command
}

fn run(arguments: &[&str]) -> Output {
    kvatlas(arguments).output().unwrap()
}

fn refuses(arguments: &[&str], expected: &str) {
    let output = run(arguments);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {stderr}");
    assert!(stderr.contains(expected), "{arguments:?}: {stderr}");
}

/// One block more of a chain.
fn batch(number: u64) -> Batch {
    let stored = BlockStored {
        block_hashes: vec![EngineHash::Int(1_000 + number)],
        parent_block_hash: number.checked_sub(1).map(|before| EngineHash::Int(1_000 + before)),
        token_ids: (0..16).map(|i| 20_000 + 16 * number as u32 + i).collect(),
        block_size: 16,
        ..BlockStored::default()
    };
    Batch { time_s: number as f64 + 1.0, events: vec![Event::Stored(stored)], rank: 0 }
}

/// Waits until the file holds so many live messages. A read may fall into the middle of a write.
async fn wait_for_live(path: &Path, messages: usize) {
    let deadline = Instant::now() + PATIENCE;
    let is_live = |record: &&Record| record.kind == RecordKind::Live;
    while Recording::read(path).map_or(0, |file| file.records.iter().filter(is_live).count()) < messages {
        assert!(Instant::now() < deadline, "the messages did not arrive in {}", path.display());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recording_ends_with_sigterm_and_exit_0_and_plays_redacted_or_not() {
    for redact in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("live.kvrec");
        let out = path.to_str().unwrap();
        let mut engine = EnginePublisher::bind(PublisherConfig::default()).await.unwrap();
        for number in 0..10 {
            engine.publish(&batch(number)).await.unwrap();
        }
        let endpoints = engine.endpoints().clone();
        let mut arguments =
            vec!["record", "--zmq", &endpoints.events, "--replay", &endpoints.replay, "--out", out];
        arguments.extend(redact.then_some("--redact"));
        let recorder = Running::start(&arguments);
        engine.wait_for_subscribers(1, PATIENCE).await.unwrap();
        for number in 10..40 {
            engine.publish(&batch(number)).await.unwrap();
        }
        wait_for_live(&path, 30).await;
        recorder.signal("-TERM");
        let (code, stdout) = tokio::task::spawn_blocking(|| recorder.wait()).await.unwrap();
        assert_eq!(code, Some(0), "{stdout}");
        assert_eq!(stdout.lines().count(), 1);
        assert!(stdout.contains("30 live") && stdout.contains("0 dropped; stopped by a signal"), "{stdout}");

        let played = run(&["replay", out]);
        assert!(played.status.success(), "{played:?}");
        assert!(String::from_utf8_lossy(&played.stdout).contains("30 messages"), "{played:?}");
        engine.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recorder_that_is_killed_leaves_a_recording() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("live.kvrec");
    let mut engine = EnginePublisher::bind(PublisherConfig::default()).await.unwrap();
    let recorder =
        Running::start(&["record", "--zmq", &engine.endpoints().events, "--out", path.to_str().unwrap()]);
    engine.wait_for_subscribers(1, PATIENCE).await.unwrap();
    for number in 0..5 {
        engine.publish(&batch(number)).await.unwrap();
    }
    wait_for_live(&path, 5).await;
    drop(recorder);
    assert_eq!(Recording::read(&path).unwrap().records.len(), 5);
    engine.close().await;
}

#[test]
fn a_limit_ends_the_recording_and_the_summary_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("live.kvrec");
    let out = path.to_str().unwrap();
    let output = run(&["record", "--zmq", "tcp://127.0.0.1:1", "--out", out, "--seconds", "1"]);
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{stdout}");
    assert!(stdout.contains("1 streams never connected; --seconds passed"), "{stdout}");
}

#[test]
fn wrong_arguments_say_what_to_change_and_nothing_is_overwritten_unasked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("live.kvrec");
    let out = path.to_str().unwrap();
    refuses(&["record", "--out", out], "--zmq");
    refuses(&["record", "--zmq", "udp://x", "--out", out], "udp://x");
    let two = ["record", "--zmq", "tcp://a:1", "--zmq", "tcp://a:2", "--replay", "tcp://a:3", "--out", out];
    refuses(&two, "1 --replay for 2 --zmq");
    refuses(&["record", "--zmq", "tcp://a:1", "--out", out, "--max-bytes", "2000000000"], "--max-bytes");
    assert!(!path.exists(), "a refused recording leaves no file");
    std::fs::write(&path, "precious").unwrap();
    refuses(&["record", "--zmq", "tcp://a:1", "--out", out], "--force");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    let forced = ["record", "--zmq", "tcp://127.0.0.1:1", "--out", out, "--force", "--seconds", "1"];
    assert!(run(&forced).status.success());
    assert!(Recording::read(&path).unwrap().records.is_empty());
}
