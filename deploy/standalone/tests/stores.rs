//! The binary with each checkpoint store behind a real server: stopped and started again, it goes on from what it held.

#[path = "../../../indexer/tests/common/frames.rs"]
#[allow(dead_code, unreachable_pub)]
mod frames;

use std::ffi::OsString;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use bytes::Bytes;
use frames::{Op, Publisher};
use kvatlas_bus::test_server::NatsServer;
use kvatlas_bus::{Bus, NatsBus, NatsConfig};
use kvatlas_proto::ShardId;
use kvatlas_proto::subject::Subjects;
use kvatlas_stores::test_server::{Certificates, PASSWORD, TlsServer, ValkeyCluster, ValkeyServer};
use serde_json::Value;

/// Longest wait for a process to say something; far above what it takes.
const PATIENCE: Duration = Duration::from_secs(30);
/// The promise: a signal ends the process within this time.
const STOP_WITHIN: Duration = Duration::from_secs(5);
/// Log lines that wait to be read; more than any test's process writes.
const LOG_LINES: usize = 10_000;

/// A started server, killed when dropped.
struct Running {
    child: Child,
    lines: Receiver<String>,
    /// Lines that were read already: what a test waits for may have been said before.
    seen: Vec<String>,
}

// === impl Running ===

impl Running {
    fn start(nats: &NatsServer, settings: &[(&str, OsString)]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvatlas"));
        // Settings of whoever runs the tests must not reach it.
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("KVATLAS_")) {
            command.env_remove(name);
        }
        command
            .args(["--log-format", "json", "serve", "--nats", &nats.url()])
            .args(["--grpc-listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0"])
            .envs(settings.iter().map(|(name, value)| (*name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        // A thread of its own, so that a silent process cannot hold the test up. It ends with the process.
        let (lines_in, lines) = sync_channel(LOG_LINES);
        std::thread::spawn(move || {
            stderr.lines().map_while(Result::ok).try_for_each(|line| lines_in.send(line))
        });
        Self { child, lines, seen: Vec::new() }
    }

    /// The fields of the message that contains `wanted`, whether it is in the log or yet to come.
    fn wait_for(&mut self, wanted: &str) -> Value {
        let fields = |line: &str| serde_json::from_str::<Value>(line).unwrap_or_default()["fields"].take();
        let is_wanted =
            |fields: &Value| fields["message"].as_str().is_some_and(|message| message.contains(wanted));
        if let Some(found) = self.seen.iter().map(|line| fields(line)).find(is_wanted) {
            return found;
        }
        let deadline = Instant::now() + PATIENCE;
        while let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            assert!(!line.contains(PASSWORD), "{line}");
            let found = fields(&line);
            self.seen.push(line);
            if is_wanted(&found) {
                return found;
            }
        }
        panic!("{wanted:?} did not appear in:\n{}", self.seen.join("\n"));
    }

    /// Waits until the metrics page has this line.
    fn wait_for_metric(&mut self, wanted: &str) {
        let http = self.wait_for("kvatlas is up")["http"].as_str().unwrap().to_owned();
        let asked = Instant::now();
        loop {
            let mut stream = TcpStream::connect(&http).unwrap();
            stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").unwrap();
            let mut page = String::new();
            stream.read_to_string(&mut page).unwrap();
            if page.lines().any(|line| line == wanted) {
                return;
            }
            assert!(asked.elapsed() < PATIENCE, "{wanted:?} did not appear in:\n{page}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends SIGTERM and waits for the end.
    fn terminate(mut self) {
        let asked = Instant::now();
        assert!(
            Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().unwrap().success()
        );
        while self.child.try_wait().unwrap().is_none_or(|status| status.code() != Some(0)) {
            assert!(asked.elapsed() < STOP_WITHIN, "still running {STOP_WITHIN:?} after SIGTERM");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Gone already, or to go now; both are fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Says to the index that an engine holds three blocks.
async fn publish(nats: &NatsServer, publisher: &mut Publisher) {
    let bus = NatsBus::connect(NatsConfig::new([nats.url()])).await.unwrap();
    let scope = publisher.header.scope.token();
    let subject = Subjects::default().events(scope, ShardId::WHOLE, &publisher.header.source);
    let frame = publisher.frame(&[Op::Stored(0, vec![1, 2, 3])]);
    bus.publish(subject, Bytes::from(frame)).await.unwrap();
    bus.flush().await.unwrap();
}

async fn goes_on_from_what_it_held(nats: &NatsServer, settings: &[(&str, OsString)]) {
    let mut server = Running::start(nats, settings);
    server.wait_for("there is no checkpoint yet");
    // What was sent before the server subscribed would be lost.
    server.wait_for("kvatlas is up");
    publish(nats, &mut Publisher::new("m", "10.0.0.7:8000")).await;
    server.wait_for_metric("kvatlas_index_blocks 3");
    server.terminate();

    let mut server = Running::start(nats, settings);
    let fields = server.wait_for("took in a checkpoint");
    assert_eq!((fields["blocks"].as_u64(), fields["sources"].as_u64()), (Some(3), Some(1)), "{fields}");
    assert_eq!(fields["place"].as_str().unwrap().split(':').next(), place(settings).split(':').next());
    server.wait_for("kvatlas is up");
    server.terminate();
}

fn place(settings: &[(&str, OsString)]) -> String {
    settings[0].1.clone().into_string().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_goes_on_from_what_it_held_in_a_file_and_in_its_broker() {
    let Some(nats) = NatsServer::start_with(&["--jetstream"]) else { return };
    let folder = tempfile::tempdir().unwrap();
    let file = format!("file:{}", folder.path().join("checkpoint").display());
    goes_on_from_what_it_held(&nats, &[("KVATLAS_CHECKPOINT_STORE", file.into())]).await;
    goes_on_from_what_it_held(&nats, &[("KVATLAS_CHECKPOINT_STORE", "nats://checkpoints/index-0".into())])
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_goes_on_from_what_it_held_in_redis() {
    let (Some(nats), Some(redis)) = (NatsServer::start(), ValkeyServer::start()) else { return };
    let url = format!("redis://{}/1?prefix=kvatlas&name=index-0&ttl-s=600", redis.address());
    let settings =
        [("KVATLAS_CHECKPOINT_STORE", url.into()), ("KVATLAS_CHECKPOINT_STORE_PASSWORD", PASSWORD.into())];
    goes_on_from_what_it_held(&nats, &settings).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_goes_on_from_what_it_held_in_an_encrypted_redis() {
    let certificates = Certificates::new();
    let (Some(nats), Some(redis)) = (NatsServer::start(), TlsServer::start(&certificates).await) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let password_file = folder.path().join("password");
    std::fs::write(&password_file, PASSWORD).unwrap();
    let (certificate, key) = certificates.client_files();
    let settings = [
        ("KVATLAS_CHECKPOINT_STORE", format!("rediss://{}", redis.address()).into()),
        ("KVATLAS_CHECKPOINT_STORE_PASSWORD_FILE", password_file.into()),
        ("KVATLAS_CHECKPOINT_STORE_CA_FILE", certificates.ca_file().into()),
        ("KVATLAS_CHECKPOINT_STORE_CERTIFICATE_FILE", certificate.into()),
        ("KVATLAS_CHECKPOINT_STORE_KEY_FILE", key.into()),
    ];
    goes_on_from_what_it_held(&nats, &settings).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_goes_on_from_what_it_held_in_a_cluster() {
    let (Some(nats), Some(cluster)) = (NatsServer::start(), ValkeyCluster::start()) else { return };
    let settings = [
        ("KVATLAS_CHECKPOINT_STORE", format!("redis-cluster://{}", cluster.hosts()).into()),
        ("KVATLAS_CHECKPOINT_STORE_PASSWORD", PASSWORD.into()),
    ];
    goes_on_from_what_it_held(&nats, &settings).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_store_is_away_starts_cold_and_ends_in_time() {
    let (Some(nats), Some(mut redis)) = (NatsServer::start(), ValkeyServer::start()) else { return };
    redis.stop();
    let url = format!("redis://{}", redis.address());
    let mut server = Running::start(&nats, &[("KVATLAS_CHECKPOINT_STORE", url.into())]);
    let fields = server.wait_for("the last checkpoint cannot be used");
    assert_eq!(fields["reason"], "unreachable", "{fields}");
    server.wait_for("kvatlas is up");
    publish(&nats, &mut Publisher::new("m", "10.0.0.7:8000")).await;
    server.wait_for_metric("kvatlas_index_blocks 3");
    server.terminate();
}
