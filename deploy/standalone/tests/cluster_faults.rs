//! Many servers as one index, with everything a process of its own: brokers that are killed, cut off and hang, servers and shims
//! that are killed, everything restarted in turn, another number of servers. Every test ends with the same demand: block for
//! block, the servers hold what the engines hold, and every source is verified.
//!
//! Times are not asserted here (`kvatlas bench cluster` has them), and claims get a wider window than there, because test machines
//! pause.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use kvatlas_loadtest::cluster::faults::Fault;
use kvatlas_loadtest::cluster::{Case, CaseReport, ClusterConfig, Details, run};
use kvatlas_loadtest::recovery::processes::find_nats_server;
use kvatlas_loadtest::recovery::sampler::MAX_WINDOW;
use serde_json::Value;

/// The broker's program, or `None` (said on standard error) where there is none and none is required.
fn nats_server() -> Option<PathBuf> {
    let found = find_nats_server(None);
    if found.is_none() {
        let test = std::thread::current().name().unwrap_or("a test").to_owned();
        let required = std::env::var_os("KVATLAS_REQUIRE_SERVERS").is_some_and(|value| value == "1");
        assert!(
            !required,
            "{test} needs nats-server and KVATLAS_REQUIRE_SERVERS=1 forbids skipping: run scripts/provision"
        );
        #[allow(clippy::print_stderr, reason = "a skipped test has no other way to say so")]
        {
            eprintln!("skipped: {test} needs nats-server (run scripts/test to provision it)");
        }
    }
    found
}

/// Small and quick; only the faults are those of the real cases.
fn config() -> Option<ClusterConfig> {
    let config = ClusterConfig::new(env!("CARGO_BIN_EXE_kvatlas").into(), nats_server()?).quick();
    Some(ClusterConfig {
        shards: 16,
        servers: 2,
        fault_time: Duration::from_secs(1),
        watch: Duration::from_secs(1),
        window: MAX_WINDOW,
        ..config
    })
}

/// What every answer has to be, whatever happens.
fn is_right(report: &CaseReport) {
    let Details::Faults(details) = &report.details else { panic!("of faults") };
    assert!(details.equal_at_the_end && details.quiet.answers > 0, "{details:?}");
    for fault in &details.faults {
        let answers = &fault.answers;
        assert!(answers.answers > 0, "questions were answered: {fault:?}");
        assert_eq!((answers.false_positives, answers.missed), (0, 0), "{fault:?}");
    }
}

async fn faults(faults: &[Fault]) {
    let Some(config) = config() else { return };
    let config = ClusterConfig { faults: faults.to_vec(), ..config };
    is_right(&run(Case::Faults, &config).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn whichever_process_is_killed_no_answer_is_wrong_and_all_is_well_again() {
    faults(&[Fault::ServerKilled, Fault::BrokerKilled, Fault::ShimKilled]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_is_cut_off_or_hangs_makes_no_answer_wrong() {
    faults(&[Fault::BrokerCut, Fault::BrokerFrozen]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_can_be_restarted_in_turn() {
    faults(&[Fault::Rolling]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_servers_give_the_same_bytes() {
    let Some(config) = config() else { return };
    let report = run(Case::Equal, &config).await.unwrap();
    let Details::Equal(details) = report.details else { panic!("of equal answers") };
    assert_eq!((details.servers, details.different, details.partial), (4, 0, 0), "{:?}", details.shown);
    assert!(details.rows > 0, "{details:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_server_more_costs_no_right_answer() {
    let Some(config) = config() else { return };
    let report = run(Case::Resize, &config).await.unwrap();
    let Details::Resize(details) = report.details else { panic!("of another number of servers") };
    let answers = &details.answers;
    assert_eq!((details.from, details.to), (2, 3));
    assert!(answers.answers > 0 && details.equal_at_the_end, "{details:?}");
    assert_eq!((answers.false_positives, answers.missed), (0, 0), "{details:?}");
    assert!(details.state_bytes > 0, "the new servers took everything in: {details:?}");
}

#[test]
fn the_bench_prints_one_object_a_case() {
    let Some(nats_server) = nats_server() else { return };
    let output = Command::new(env!("CARGO_BIN_EXE_kvatlas"))
        .args(["--log", "warn", "bench", "cluster", "--json", "--quick", "--case", "equal", "--servers", "2"])
        .args(["--replicas", "1", "--nats-server"])
        .arg(nats_server)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["case"], &report["servers"]), (&Value::from("equal"), &Value::from(2)), "{stderr}");
}
