//! The binary as its users see it: exit codes, one-line errors, signals, machine-readable output.

use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Longest wait for a process to say something; far above what it takes.
const PATIENCE: Duration = Duration::from_secs(30);
/// The promise: a signal ends the process within this time.
const STOP_WITHIN: Duration = Duration::from_secs(5);

/// Log lines that wait to be read; more than any test's process writes.
const LOG_LINES: usize = 10_000;

/// A started process, killed when dropped.
struct Running {
    child: Child,
    lines: Receiver<String>,
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

/// Fails with one line on standard error that contains `expected`.
fn refuses(arguments: &[&str], code: i32, expected: &str) {
    let output = run(arguments);
    let stderr = String::from_utf8(output.stderr).unwrap();
    let last: Vec<&str> = stderr.lines().filter(|line| line.starts_with("kvatlas: ")).collect();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
    assert_eq!(last.len(), 1, "{arguments:?}: {stderr}");
    assert!(last[0].contains(expected), "{arguments:?}: {stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
}

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
    fn wait_for(&mut self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = String::new();
        while let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            if wanted(&line) {
                return line;
            }
            seen.push_str(&line);
            seen.push('\n');
        }
        panic!("{what} did not appear in:\n{seen}");
    }

    /// Sends SIGTERM and returns the exit code.
    fn terminate(mut self) -> Option<i32> {
        let asked = Instant::now();
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
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

/// The address in a JSON log line's field.
fn field(line: &str, name: &str) -> String {
    let json: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"));
    json["fields"][name].as_str().unwrap_or_else(|| panic!("no {name} in {line}")).to_owned()
}

const ENGINE: &str = "model=m,instance=127.0.0.1:8000,zmq=tcp://127.0.0.1:1,replay=tcp://127.0.0.1:2";

fn serve_on_free_ports(extra: &[&str]) -> (Running, String, String) {
    let mut arguments =
        vec!["--log-format", "json", "serve", "--grpc-listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0"];
    arguments.extend_from_slice(extra);
    let mut server = Running::start(&arguments);
    let line = server.wait_for("the start", |line| line.contains("kvatlas is up"));
    let (grpc, http) = (field(&line, "grpc"), field(&line, "http"));
    (server, grpc, http)
}

#[test]
fn sigterm_drains_and_exits_0_in_time_even_while_engines_are_unreachable() {
    let (server, _, _) = serve_on_free_ports(&["--engine", ENGINE]);
    assert_eq!(server.terminate(), Some(0));
}

#[test]
fn a_running_server_answers_queries_in_both_forms() {
    let (server, grpc, _) = serve_on_free_ports(&["--engine", ENGINE]);
    let arguments = ["query", "--server", &grpc, "--json", "score", "--model", "m", "--tokens", "1,2,3"];
    let output = run(&arguments);
    assert!(output.status.success(), "{output:?}");
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["scope_known"], Value::Bool(false));
    let remembered = ["--request-id", "9"];
    assert!(run(&[&arguments[..], &remembered[..]].concat()).status.success());
    let report = ["query", "--server", &grpc, "--json", "outcome", "--instance", "a:1", "--cached", "2"];
    let output = run(&[&report[..], &remembered[..]].concat());
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&answer["prediction_source"], &answer["error_tokens"]), (&"remembered".into(), &(-2).into()));
    refuses(&report, 1, "request_id");
    let output = run(&["query", "--server", &grpc, "owners"]);
    assert!(String::from_utf8(output.stdout).unwrap().contains("instance"));
    refuses(&["query", "--server", &grpc, "score", "--model", "m"], 2, "--tokens");
    refuses(&["query", "--server", &grpc, "score", "--model", "m", "--keys", "1"], 1, "block_size");
    assert_eq!(server.terminate(), Some(0));
}

#[test]
fn metrics_of_server_and_shims_are_on_the_http_port() {
    let (server, _, http) = serve_on_free_ports(&["--engine", ENGINE]);
    let mut stream = std::net::TcpStream::connect(&http).unwrap();
    std::io::Write::write_all(&mut stream, b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut text = String::new();
    std::io::Read::read_to_string(&mut stream, &mut text).unwrap();
    for name in ["kvatlas_shim_connected", "kvatlas_shim_drops_total", "kvatlas_index_"] {
        assert!(text.contains(name), "{name} is not in:\n{text}");
    }
    assert_eq!(server.terminate(), Some(0));
}

#[test]
fn a_port_in_use_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    refuses(&["--log", "off", "serve", "--engine", ENGINE, "--grpc-listen", &address], 1, &address);
    let http = [
        "--log",
        "off",
        "serve",
        "--engine",
        ENGINE,
        "--grpc-listen",
        "127.0.0.1:0",
        "--http-listen",
        &address,
    ];
    refuses(&http, 1, &address);
    refuses(&["--log", "off", "demo", "--grpc-listen", &address], 1, &address);
}

#[test]
fn an_unreachable_broker_is_named() {
    // Bound and closed again: nobody listens there.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = format!("nats://{closed}");
    refuses(&["--log", "off", "serve", "--nats", &url], 1, &url);
    refuses(&["--log", "off", "shim", "--nats", &url, "--engine", ENGINE], 1, &url);
}

#[test]
fn files_that_cannot_be_used_are_named() {
    refuses(&["serve", "--config", "/nonexistent/kvatlas.toml"], 2, "/nonexistent/kvatlas.toml");
    refuses(&["replay", "/nonexistent/a.kvrec"], 2, "/nonexistent/a.kvrec");
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("kvatlas.toml");
    std::fs::write(&config, "[server]\ngrpc_listen = \"127.0.0.1:0\"\n").unwrap();
    refuses(&["serve", "--config", config.to_str().unwrap()], 2, "grpc_listen");
    let recording = folder.path().join("a.kvrec");
    std::fs::write(&recording, "not a recording").unwrap();
    refuses(&["replay", recording.to_str().unwrap()], 1, "a.kvrec");
    let seed = folder.path().join("seed");
    std::fs::write(&seed, "secret!").unwrap();
    refuses(&["serve", "--engine", ENGINE, "--key-seed-file", seed.to_str().unwrap()], 2, "16 hex digits");
}

#[test]
fn wrong_settings_say_what_to_change() {
    refuses(&["serve"], 2, "--engine");
    refuses(&["shim", "--engine", ENGINE], 2, "--nats");
    refuses(&["shim", "--nats", "nats://127.0.0.1:1"], 2, "--engine");
    refuses(&["serve", "--engine", "model=m,instance=a:1,zmq=udp://x"], 2, "udp://x");
    refuses(&["serve", "--engine", ENGINE, "--subject-prefix", "a b"], 2, "a b");
    refuses(&["query", "--server", "127.0.0.1:1", "owners"], 1, "127.0.0.1:1");
}

#[test]
fn a_lease_of_shards_is_refused_where_it_cannot_be() {
    let nats = ["--nats", "nats://127.0.0.1:1"];
    let lease = |extra: &[&'static str]| [&["serve", "--shard-lease"][..], &nats, extra].concat();
    refuses(&lease(&["--shards", "64", "--shard-ordinal", "0"]), 2, "--shard-ordinal are two ways");
    refuses(&lease(&[]), 2, "--shards, for example 64");
    refuses(&lease(&["--shards", "4", "--shard-servers", "8"]), 2, "each needs one");
    refuses(&["serve", "--shard-lease", "--shards", "64", "--engine", ENGINE], 2, "--nats");
    refuses(&["cluster", "status"], 2, "--nats");
    refuses(&["cluster", "resize", "--servers", "2", "--nats", "nats://127.0.0.1:1"], 1, "127.0.0.1:1");
    assert_eq!(run(&["cluster", "resize", "--nats", "nats://127.0.0.1:1"]).status.code(), Some(2));
}

#[test]
fn the_help_of_a_cluster_says_what_a_resize_needs() {
    let help = |arguments: &[&str]| String::from_utf8(run(arguments).stdout).unwrap();
    let resize = help(&["cluster", "resize", "--help"]);
    for word in ["--servers", "--wait", "--timeout-s", "--json", "--shard-lease", "old division answers"] {
        assert!(resize.contains(word), "{word} is not in:\n{resize}");
    }
    let serve = help(&["serve", "--help"]);
    assert!(serve.contains("kvatlas cluster resize") && serve.contains("nats-server 2.11"), "{serve}");
}

#[test]
fn the_demo_shows_cache_aware_routing_far_ahead() {
    let output = run(&["--log", "warn", "demo", "--once", "--json", "--conversations", "120"]);
    assert!(output.status.success(), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let policy = |at: usize, name: &str| {
        let policy = &report["policies"][at];
        assert_eq!(policy["name"], name);
        (policy["cached_share"].as_f64().unwrap(), policy["blocks_prefilled"].as_u64().unwrap())
    };
    let ((share, blocks), (rr_share, rr_blocks)) = (policy(0, "kvatlas"), policy(1, "round_robin"));
    assert!(share > rr_share + 0.15 && blocks * 2 < rr_blocks, "{report}");
    assert!(report["score_p50_us"].as_u64() <= report["score_p99_us"].as_u64());
}

#[test]
fn the_demo_stays_up_for_queries_until_it_is_told_to_stop() {
    let arguments = [
        "--log-format",
        "json",
        "demo",
        "--conversations",
        "10",
        "--grpc-listen",
        "127.0.0.1:0",
        "--http-listen",
        "127.0.0.1:0",
    ];
    let mut demo = Running::start(&arguments);
    let line = demo.wait_for("the address", |line| line.contains("the index server runs"));
    let grpc = field(&line, "grpc_addr");
    demo.wait_for("the last step of progress", |line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.get(3) == Some(&"requests:") && words[0] == words[2]
    });
    let output = run(&["query", "--server", &grpc, "--json", "owners", "--model", "demo"]);
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["sources"].as_array().unwrap().len(), 4, "{answer}");
    assert_eq!(demo.terminate(), Some(0));
}

#[test]
fn replay_check_prints_one_object_a_file_and_its_verdict_is_the_exit_code() {
    let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/../../loadtest/fixtures");
    let file = |name: &str| format!("{fixtures}/{name}");
    let output = run(&["replay", &file("vllm0330_duplicates.kvrec.zst"), "--check", "--json"]);
    assert!(output.status.success(), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let expected = [
        ("checkpoints", 8),
        ("checkpoints_exact", 8),
        ("probes", 16),
        ("equal", 16),
        ("over", 0),
        ("under", 0),
    ];
    for (name, value) in expected {
        assert_eq!(report[name], value, "{report}");
    }
    let folder = tempfile::tempdir().unwrap();
    let swapped = folder.path().join("a.kvrec.zst");
    std::fs::copy(file("vllm0300_mixed.kvrec.zst"), &swapped).unwrap();
    std::fs::copy(file("vllm0221_mixed.truth.json.zst"), folder.path().join("a.truth.json.zst")).unwrap();
    let output = run(&["replay", "--check", swapped.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}

#[test]
fn a_plan_is_a_table_for_a_person_or_one_object() {
    let folder = tempfile::tempdir().unwrap();
    let profiles = folder.path().join("costs.toml");
    let ours = "[[engine]]\nname = \"ours\"\nmodels = [\"m\"]\n\
                prefill = { c0_ms = 10.0, c1_ms_per_token = 0.1, c2_ms_per_token2 = 0.0 }\n\
                decode = { base_ms = 20.0, per_request_ms = 0.1 }\n";
    std::fs::write(&profiles, ours).unwrap();
    let (server, grpc, _) =
        serve_on_free_ports(&["--cost-profiles", profiles.to_str().unwrap(), "--engine", ENGINE]);
    let tokens = (0..1_000).map(|id| id.to_string()).collect::<Vec<_>>().join(",");
    let arguments = [
        "plan",
        "--server",
        &grpc,
        "--model",
        "m",
        "--tokens",
        &tokens,
        "--both",
        "10.0.0.1:8000,waiting-tokens=5000",
        "--both",
        "10.0.0.2:8000",
    ];
    let output = run(&arguments);
    let text = String::from_utf8(output.stdout).unwrap();
    for part in ["prefill and decode on 10.0.0.2:8000", "computed", "next best", "on ours", "assumed:"] {
        assert!(text.contains(part), "{part} is not in:\n{text}");
    }
    let output = run(&[&arguments[..], &["--json"]].concat());
    let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(plan["prefill_instance"], "10.0.0.2:8000");
    assert!((plan["expected_ttft_us"].as_f64().unwrap() - 110_000.0).abs() < 1.0, "{plan}");
    assert_eq!(plan["computed_tokens"], 1_000);
    refuses(&["plan", "--server", &grpc, "--model", "m", "--tokens", "1"], 1, "candidates are missing");
    let output = run(&["plan", "--model", "m", "--tokens", "1", "--both", "a,queue=2"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("waiting-tokens=TOKENS"), "{output:?}");
    assert_eq!(server.terminate(), Some(0));
}

#[test]
fn a_profile_is_fitted_from_measured_times_and_can_be_used_as_it_is_printed() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (csv, toml) = (path("rows.csv"), path("ours.toml"));
    let sizes = [128.0f64, 256.0, 512.0, 1_024.0, 2_048.0, 4_096.0, 8_192.0];
    let row = |tokens: f64| format!("{tokens},{}\n", 30.0 + 0.1 * tokens + 7e-6 * tokens * tokens);
    let rows: String = sizes.into_iter().map(row).collect();
    std::fs::write(&csv, format!("prompt_tokens,ttft_ms\n{rows}broken,1\n")).unwrap();
    let found = run(&["calibrate", "--csv", &csv, "--json"]);
    refuses(&["calibrate", "--csv", &csv], 2, "1 of 8 rows");
    assert_eq!(found.status.code(), Some(2));
    std::fs::write(&csv, format!("prompt_tokens,ttft_ms\n{rows}")).unwrap();
    let output = run(&["calibrate", "--csv", &csv, "--json"]);
    let fit: Value = serde_json::from_slice(&output.stdout).unwrap();
    let near = |name: &str, value: f64| (fit[name].as_f64().unwrap() / value - 1.0).abs() < 1e-6;
    assert!(near("c0_ms", 30.0) && near("c1_ms_per_token", 0.1) && near("c2_ms_per_token2", 7e-6), "{fit}");
    assert_eq!((&fit["rows"], &fit["skipped"]), (&7.into(), &0.into()));
    let output = run(&["calibrate", "--csv", &csv, "--name", "our h100", "--model", "m*"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("mean error 0.0 %"), "{output:?}");
    std::fs::write(&toml, output.stdout).unwrap();
    // As an operator would go on.
    let (server, grpc, _) = serve_on_free_ports(&["--cost-profiles", &toml, "--engine", ENGINE]);
    let output =
        run(&["plan", "--server", &grpc, "--model", "m", "--tokens", "1,2,3", "--both", "a:1", "--json"]);
    let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(plan["profile"].as_str().unwrap().contains("our h100"), "{plan}");
    assert_eq!(server.terminate(), Some(0));
    refuses(&["calibrate"], 2, "--csv");
    refuses(
        &["serve", "--cost-profiles", &csv, "--engine", ENGINE, "--grpc-listen", "127.0.0.1:0"],
        2,
        "rows.csv",
    );
}
