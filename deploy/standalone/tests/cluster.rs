//! A deployment of many servers as its operator sees it: servers take their parts by lease, their number changes while they
//! answer, one dies and a spare takes its place. Real processes, a real broker, engines on real sockets.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use kvatlas_bus::test_server::NatsServer;
use kvatlas_client::{Client, ClientConfig};
use kvatlas_loadtest::publisher::{EnginePublisher, PublisherConfig};
use kvatlas_loadtest::wire::{Batch, BlockStored, EngineHash, Event};
use kvatlas_proto::grpc::{self, Prompt, ScoreRequest, TokenIds};
use serde_json::Value;

/// Longest wait for anything; far above what it takes.
const PATIENCE: Duration = Duration::from_secs(90);
/// Time between two looks.
const POLL: Duration = Duration::from_millis(100);
/// Log lines that wait to be read; more than any test's process writes.
const LOG_LINES: usize = 10_000;
const ENGINES: u32 = 3;
/// Prompts that each engine has; the first of them is all engines' own.
const PROMPTS: u32 = 12;
/// Blocks of a prompt: several segments, so that each lies on several servers.
const BLOCKS: u32 = 150;
const BLOCK_TOKENS: u32 = 16;
const SHARDS: &str = "16";

/// A started process, killed when dropped.
struct Running {
    child: Child,
    lines: Receiver<String>,
}

/// A server that is up.
struct Server {
    process: Running,
    client: Client,
}

/// Broker, engines and their shim.
struct Stage {
    nats: NatsServer,
    // Both only have to stay.
    _engines: Vec<EnginePublisher>,
    _shim: Running,
}

/// What an answer says, without its age.
type Rows = Vec<(String, u32, String)>;

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

/// The tokens of a prompt. All begin alike, and go apart in their third segment.
fn tokens(prompt: u32) -> Vec<u32> {
    let block = |at: u32| {
        let of = if at < 70 { 0 } else { prompt + 1 };
        (0..BLOCK_TOKENS).map(move |token| of * 100_000 + at * BLOCK_TOKENS + token)
    };
    (0..BLOCKS).flat_map(block).collect()
}

/// An engine stores the beginning of a prompt: engine n has a third more of each than engine n - 1.
fn stored(engine: u32, prompt: u32) -> Batch {
    let blocks = BLOCKS * (engine + 1) / ENGINES;
    let hash = |at: u32| {
        let of = if at < 70 { 0 } else { u64::from(prompt) + 1 };
        EngineHash::Int(of << 32 | u64::from(at + 1))
    };
    let stored = BlockStored {
        block_hashes: (0..blocks).map(hash).collect(),
        token_ids: tokens(prompt)[..(blocks * BLOCK_TOKENS) as usize].to_vec(),
        block_size: BLOCK_TOKENS,
        medium: Some("GPU".to_owned()),
        ..BlockStored::default()
    };
    Batch { time_s: f64::from(prompt) + 1.0, events: vec![Event::Stored(stored)], rank: 0 }
}

// === impl Running ===

impl Running {
    fn start(arguments: &[&str]) -> Self {
        let mut child = kvatlas(arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        // A thread of its own, so that a silent process cannot hold the test up. It ends with the process.
        let (lines_in, lines) = sync_channel(LOG_LINES);
        std::thread::spawn(move || {
            stderr.lines().map_while(Result::ok).try_for_each(|line| lines_in.send(line))
        });
        Self { child, lines }
    }

    /// Reads the log until a line is `wanted`.
    fn wait_for(&self, wanted: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = String::new();
        while let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            if line.contains(wanted) {
                return line;
            }
            seen.push_str(&line);
            seen.push('\n');
        }
        panic!("{wanted:?} did not appear in:\n{seen}");
    }

    fn terminate(mut self) -> Option<i32> {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(POLL);
        }
        panic!("still running after SIGTERM");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Gone already, or to go now; both are fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            #[allow(clippy::print_stderr, reason = "what the process said belongs to the failure")]
            self.lines.try_iter().for_each(|line| eprintln!("{line}"));
        }
    }
}

// === impl Stage ===

impl Stage {
    async fn start() -> Option<Self> {
        let nats = NatsServer::start_jetstream()?;
        let mut engines = Vec::new();
        let url = nats.url();
        let shim = ["--log", "warn", "shim", "--http-listen", "127.0.0.1:0"];
        let on = ["--shards", SHARDS, "--nats", &url];
        let mut arguments: Vec<String> = shim.into_iter().chain(on).map(str::to_owned).collect();
        for engine in 0..ENGINES {
            let publisher = EnginePublisher::bind(PublisherConfig::default()).await.unwrap();
            let at = publisher.endpoints();
            arguments.push("--engine".to_owned());
            arguments
                .push(format!("model=m,instance=pod-{engine}:8000,zmq={},replay={}", at.events, at.replay));
            engines.push(publisher);
        }
        let shim = Running::start(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        for (number, engine) in (0..).zip(&mut engines) {
            engine.wait_for_subscribers(1, PATIENCE).await.unwrap();
            for prompt in 0..PROMPTS {
                engine.publish(&stored(number, prompt)).await.unwrap();
            }
        }
        Some(Self { nats, _engines: engines, _shim: shim })
    }

    /// Starts a server without waiting for it.
    fn launch(&self, servers: &str) -> Running {
        let url = self.nats.url();
        let listen = ["--grpc-listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--nats", &url];
        let shards = ["--shards", SHARDS, "--shard-servers", servers, "--shard-lease"];
        Running::start(&[&["--log-format", "json", "serve"][..], &listen, &shards].concat())
    }

    fn serve(&self, servers: &str) -> Server {
        Server::of(self.launch(servers))
    }

    fn cluster(&self, arguments: &[&str]) -> Output {
        let url = self.nats.url();
        kvatlas(&[&["--log", "warn", "cluster"][..], arguments, &["--nats", &url]].concat()).output().unwrap()
    }

    fn status(&self) -> Value {
        let output = self.cluster(&["status", "--json"]);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Waits until the division is complete with as many servers, each with one set of it.
    fn wait_until_settled(&self, division: u64, servers: usize) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.status();
            let listed = status["servers"].as_array().unwrap();
            let is_settled = |server: &Value| {
                let sets = server["answers_for"].as_array().unwrap();
                let (slot, set) = (&server["slot"], sets.first().and_then(Value::as_str).unwrap_or_default());
                sets.len() == 1 && set == format!("{}of{division}", slot["ordinal"])
            };
            if status["division"] == division
                && status["complete"] == true
                && listed.len() == servers
                && listed.iter().all(is_settled)
            {
                return status;
            }
            assert!(Instant::now() < deadline, "{status}");
            std::thread::sleep(POLL);
        }
    }
}

// === impl Server ===

impl Server {
    fn of(process: Running) -> Self {
        let line = process.wait_for("kvatlas is up");
        let json: Value = serde_json::from_str(&line).unwrap();
        let grpc = json["fields"]["grpc"].as_str().unwrap().to_owned();
        let config = ClientConfig { deadline: Duration::from_secs(5), ..ClientConfig::new(grpc) };
        Self { process, client: Client::connect(config).unwrap() }
    }

    /// The answer about a prompt, and what it does not cover.
    async fn ask(&self, prompt: u32) -> (Rows, String) {
        let ids = TokenIds { ids: tokens(prompt) };
        let prompt = Prompt {
            model: "m".to_owned(),
            input: Some(grpc::prompt::Input::TokenIds(ids)),
            ..Prompt::default()
        };
        let request = ScoreRequest { prompt: Some(prompt), ..ScoreRequest::default() };
        let answer = self.client.score(request).await.unwrap();
        let rows = answer.instances.into_iter().map(|row| {
            let score = format!("{:.6}", row.score);
            (row.instance, row.matched_blocks, score)
        });
        let partial = if answer.coverage < 1.0 {
            format!("{}: {:?}", answer.coverage, answer.missing)
        } else {
            String::new()
        };
        (rows.collect(), partial)
    }

    /// Waits until every answer is whole and right.
    async fn wait_until_right(&self, expected: &[Rows]) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut right = 0;
            for (prompt, expected) in (0..).zip(expected) {
                let (rows, partial) = self.ask(prompt).await;
                right += usize::from(partial.is_empty() && rows == *expected);
            }
            if right == expected.len() {
                return;
            }
            assert!(Instant::now() < deadline, "{right} of {} answers are right", expected.len());
            tokio::time::sleep(POLL).await;
        }
    }

    /// Every answer is whole and right, now.
    async fn is_right(&self, expected: &[Rows], when: &str) {
        for (prompt, expected) in (0..).zip(expected) {
            let (rows, partial) = self.ask(prompt).await;
            assert_eq!((&rows, partial.as_str()), (expected, ""), "{when}, prompt {prompt}");
        }
    }

    /// Dies as in a crash.
    fn kill(self) {
        drop(self.process);
    }
}

/// What the answers have to be: an engine that has a third more of each prompt than the one before it.
fn expected() -> Vec<Rows> {
    let row = |engine: u32| {
        let blocks = BLOCKS * (engine + 1) / ENGINES;
        let score = f64::from(blocks) / f64::from(BLOCKS);
        (format!("pod-{engine}:8000"), blocks, format!("{score:.6}"))
    };
    let rows: Rows = (0..ENGINES).rev().map(row).collect();
    vec![rows; PROMPTS as usize]
}

/// Name of the server whose lease is for this ordinal.
fn with_ordinal(status: &Value, ordinal: u64) -> String {
    let listed = status["servers"].as_array().unwrap();
    let found = listed.iter().find(|server| server["slot"]["ordinal"] == ordinal);
    found.unwrap_or_else(|| panic!("nobody has {ordinal}: {status}"))["server"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_number_of_servers_changes_while_they_answer_and_a_spare_takes_the_place_of_a_dead_one() {
    let Some(stage) = Stage::start().await else { return };
    let expected = expected();
    let (first, second) = (stage.launch("2"), stage.launch("2"));
    let (first, second) = (Server::of(first), Server::of(second));
    let before = stage.wait_until_settled(2, 2);
    for server in [&first, &second] {
        server.wait_until_right(&expected).await;
    }

    // One more: the division is announced first, so that the third server takes the new part as soon as it starts.
    let url = stage.nats.url();
    let resize = ["--log", "warn", "cluster", "resize", "--servers", "3", "--wait", "--json", "--nats", &url];
    let resizing = kvatlas(&resize).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let resizing = tokio::task::spawn_blocking(move || resizing.wait_with_output().unwrap());
    let third = stage.serve("2");
    // Nobody who asks meanwhile notices: the old division answers until the new one is complete.
    let mut asked = 0;
    while !resizing.is_finished() {
        first.is_right(&expected, "during the change").await;
        second.is_right(&expected, "during the change").await;
        asked += 1;
    }
    assert!(asked > 0);
    let output = resizing.await.unwrap();
    let resized: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(resized["servers"] == 3 && resized["seconds"].is_number(), "{output:?}");
    let after = stage.wait_until_settled(3, 3);
    for ordinal in [0, 1] {
        assert_eq!(with_ordinal(&before, ordinal), with_ordinal(&after, ordinal), "these keep what they had");
    }
    for server in [&first, &second, &third] {
        server.is_right(&expected, "after the change").await;
    }

    // A spare, and then the third server dies without a word.
    let spare = stage.serve("2");
    let with_spare = stage.wait_until_settled(3, 4);
    let lost = with_ordinal(&with_spare, 2);
    third.kill();
    let deadline = Instant::now() + PATIENCE;
    let healed = loop {
        let status = stage.wait_until_settled(3, 3);
        if with_ordinal(&status, 2) != lost {
            break status;
        }
        assert!(Instant::now() < deadline, "{status}");
    };
    for ordinal in [0, 1] {
        assert_eq!(
            with_ordinal(&before, ordinal),
            with_ordinal(&healed, ordinal),
            "the spare was the one to move"
        );
    }
    for server in [&first, &second, &spare] {
        server.wait_until_right(&expected).await;
    }

    // Fewer again: who is not needed becomes a replica, and can go.
    let output = stage.cluster(&["resize", "--servers", "2", "--wait"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("divided among 2 servers after"), "{text}");
    assert_eq!(spare.process.terminate(), Some(0));
    stage.wait_until_settled(2, 2);
    for server in [&first, &second] {
        server.is_right(&expected, "at the end").await;
    }
    let output = stage.cluster(&["status"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("16 shards divided among 2 servers, by lease: complete"), "{text}");
    assert!(text.contains("part 1 of 2, replica 0"), "{text}");
}

#[tokio::test]
async fn what_a_division_cannot_be_is_refused_and_nothing_changes() {
    let Some(stage) = Stage::start().await else { return };
    let refuses = |arguments: &[&str], code: i32, expected: &str| {
        let output = stage.cluster(arguments);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        assert!(stderr.contains(expected), "{stderr}");
    };
    refuses(&["resize", "--servers", "2"], 1, "no bucket kvatlas-shards");
    let server = stage.serve("1");
    stage.wait_until_settled(1, 1);
    refuses(&["resize", "--servers", "17"], 2, "at most --servers 16");
    refuses(&["resize", "--servers", "0"], 2, "--servers");
    refuses(
        &["resize", "--servers", "2", "--wait", "--timeout-s", "1"],
        1,
        "not complete after 1 s: nobody answers",
    );
    let output = stage.cluster(&["resize", "--servers", "1", "--wait"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(server.process.terminate(), Some(0));
    refuses(&["resize", "--servers", "2"], 1, "no server says that it is there");
    assert_eq!(stage.status()["division"], 1);
}
