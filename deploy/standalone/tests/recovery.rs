//! Faults against real parts: broker, shims and index as processes that are killed under load, engines that come back with
//! nothing. Every test ends with the same demand: block for block, the index holds what the engines hold, and every source is
//! verified.
//!
//! Figures are not asserted here (`kvatlas bench recovery` has them), and claims get a wider window than there, because test
//! machines pause. The recorded gaps with the engine's own replay are in `loadtest/tests/replay.rs`
//! (`every_recording_is_what_the_engine_held_over_nats` plays `*_gap_replay`).

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use kvatlas_loadtest::recovery::fleet::{Fleet, FleetConfig, ShimPlace};
use kvatlas_loadtest::recovery::processes::find_nats_server;
use kvatlas_loadtest::recovery::rig::{Rig, RigConfig};
use kvatlas_loadtest::recovery::sampler::{MAX_WINDOW, Sampler};
use kvatlas_loadtest::recovery::{Case, CaseReport, Details, RecoveryConfig, run};
use serde_json::Value;

const ENGINES: usize = 3;
const BLOCKS_EACH: usize = 6_000;
/// Blocks stored a second by all engines, with as many evicted.
const RATE: f64 = 3_000.0;
/// Longest wait for anything; far above what it takes.
const PATIENCE: Duration = Duration::from_secs(60);
/// Load between two faults.
const LOAD: Duration = Duration::from_millis(800);

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

fn kvatlas() -> PathBuf {
    env!("CARGO_BIN_EXE_kvatlas").into()
}

/// Small and quick; only the faults are those of the real cases.
fn case_config(nats_server: PathBuf) -> RecoveryConfig {
    RecoveryConfig {
        engines: ENGINES,
        blocks: ENGINES * BLOCKS_EACH,
        blocks_per_s: RATE,
        checkpoint_age: Duration::from_secs(2),
        loss_blocks_per_s: RATE,
        loss: 0.1,
        loss_time: Duration::from_secs(4),
        decisions: 80,
        patience: Duration::from_secs(20),
        window: MAX_WINDOW,
        ..RecoveryConfig::new(kvatlas(), nats_server)
    }
}

/// Broker, index and a filled fleet under load.
async fn loaded(nats_server: PathBuf, fleet: FleetConfig) -> (Rig, Fleet) {
    let config = RigConfig { kvatlas: kvatlas(), nats_server, checkpoint: None, seed: 1 };
    let mut rig = Rig::start(config).await.unwrap();
    rig.start_index().unwrap();
    rig.wait_ready().await.unwrap();
    let fleet = Fleet::start(&rig.site(), fleet).await.unwrap();
    fleet.fill().await.unwrap();
    rig.wait_verified(ENGINES, PATIENCE).await.unwrap();
    fleet.set_rate(RATE).await.unwrap();
    (rig, fleet)
}

fn fleet(shims: ShimPlace) -> FleetConfig {
    FleetConfig {
        engines: ENGINES,
        blocks_each: BLOCKS_EACH,
        fill_blocks: 100,
        replay_steps: 10_000,
        shims,
        seed: 1,
    }
}

/// The end of every test.
async fn ends_exact(mut rig: Rig, fleet: Fleet, sampler: Option<Sampler>) {
    fleet.settle(&mut rig).await.unwrap();
    if let Some(samples) = sampler.as_ref().map(Sampler::take) {
        assert!(samples.answers > 0, "questions were answered");
        let (wrong, all) = (samples.false_positives, samples.answers);
        assert_eq!(wrong, 0, "claims beyond what an engine held, of {all} answers");
    }
    assert_eq!(
        rig.bus().follower().lock().disagreements(),
        0,
        "heartbeats agree with the frames before them"
    );
    fleet.stop().await.unwrap();
}

async fn case(case: Case) -> Option<CaseReport> {
    // An error would mean that the index did not equal the engines at the end.
    let report = run(case, &case_config(nats_server()?)).await.unwrap();
    assert_eq!((report.case, report.false_positives), (case.name(), 0), "{report:?}");
    Some(report)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_killed_with_a_checkpoint_is_exact_again() {
    let Some(report) = case(Case::RestartWarm).await else { return };
    let Details::Restart(details) = report.details else { panic!("of a restart") };
    assert!(details.drift_blocks.unwrap() > 0 && details.checkpoint_bytes.unwrap() > 0, "{details:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_killed_without_a_checkpoint_is_exact_again() {
    let Some(report) = case(Case::RestartCold).await else { return };
    assert!(report.bytes >= 8 * (ENGINES * BLOCKS_EACH) as u64, "everything had to come again: {report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_loss_on_the_bus_is_noticed_and_what_is_sent_again_is_what_was_lost() {
    let Some(report) = case(Case::BusLoss).await else { return };
    let Details::Loss(details) = report.details else { panic!("of a loss") };
    assert!(details.counts.lost_frames > 0);
    assert_eq!(details.unnoticed, 0, "{details:?}");
    assert_eq!(details.counts.state_requests, 0, "no state had to be transferred: {details:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn routing_over_a_restart_is_never_wrong_and_waits_instead_of_being_blind() {
    let Some(report) = case(Case::RoutingRestart).await else { return };
    let Details::Routing(details) = report.details else { panic!("of routing") };
    assert_eq!((details.decisions, details.unanswered, details.wrong), (80, 0, 0), "{details:?}");
    assert!(details.with_prefix > 0 && details.retried > 0, "{details:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_killed_and_restarted_under_load_costs_nothing_for_good() {
    let Some(nats_server) = nats_server() else { return };
    let (mut rig, fleet) = loaded(nats_server, fleet(ShimPlace::Inside)).await;
    for _ in 0..2 {
        tokio::time::sleep(LOAD).await;
        rig.kill_broker().await.unwrap();
        tokio::time::sleep(LOAD).await;
        rig.restart_broker().await.unwrap();
    }
    // What an index could not hear of, it cannot be blamed for: claims are judged from here on, still under load.
    rig.wait_exact(ENGINES, PATIENCE).await.unwrap();
    let sampler = Sampler::start(&rig, &fleet, MAX_WINDOW, 1).unwrap();
    tokio::time::sleep(LOAD).await;
    ends_exact(rig, fleet, Some(sampler)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_shim_goes_on_from_its_saved_state_and_the_engines_replay() {
    let Some(nats_server) = nats_server() else { return };
    // The engine does not keep all that was said, so without the saved state something would be missing.
    let replay_steps = 800;
    let config = FleetConfig { fill_blocks: 6, replay_steps, ..fleet(ShimPlace::Processes) };
    assert!(config.blocks_each / config.fill_blocks > replay_steps);
    let (rig, mut fleet) = loaded(nats_server, config).await;
    // A first life ends in order and leaves its state behind; the second one is killed with that state out of date.
    fleet.stop_shim(0).await.unwrap();
    fleet.start_shim(&rig.site(), 0).unwrap();
    tokio::time::sleep(LOAD).await;
    fleet.kill_shim(0).await.unwrap();
    tokio::time::sleep(LOAD).await;
    fleet.start_shim(&rig.site(), 0).unwrap();
    tokio::time::sleep(LOAD).await;
    // Verified is more than equal: a source that had lost events would say so for ever. Nobody asks meanwhile: while no
    // shim speaks for an engine, what it drops cannot be known, and the lease alone bounds that.
    ends_exact(rig, fleet, None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_comes_back_with_nothing_never_inherits() {
    let Some(nats_server) = nats_server() else { return };
    let (rig, mut fleet) = loaded(nats_server, fleet(ShimPlace::Processes)).await;
    let sampler = Sampler::start(&rig, &fleet, MAX_WINDOW, 1).unwrap();
    // Only the engine: its shim has to notice by itself.
    fleet.restart_engine(0).await.unwrap();
    // Engine and shim, the shim with the saved state of another life of the engine.
    fleet.stop_shim(1).await.unwrap();
    fleet.restart_engine(1).await.unwrap();
    fleet.start_shim(&rig.site(), 1).unwrap();
    // The same with a shim that had no time to save anything.
    fleet.kill_shim(2).await.unwrap();
    fleet.restart_engine(2).await.unwrap();
    fleet.start_shim(&rig.site(), 2).unwrap();
    tokio::time::sleep(LOAD).await;
    ends_exact(rig, fleet, Some(sampler)).await;
}

#[test]
fn the_bench_prints_one_object_a_case() {
    let Some(nats_server) = nats_server() else { return };
    let output = Command::new(kvatlas())
        .args(["--log", "warn", "bench", "recovery", "--json", "--decisions", "40", "--patience-ms", "20000"])
        .args(["--case", "routing_restart_cold", "--case", "routing_restart", "--nats-server"])
        .arg(nats_server)
        .output()
        .unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    let reports: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let stderr = String::from_utf8_lossy(&output.stderr);
    let names: Vec<&str> = reports.iter().filter_map(|report| report["case"].as_str()).collect();
    assert_eq!(names, ["routing_restart", "routing_restart_cold"], "{stderr}");
    for report in &reports {
        assert!(report["seconds_to_exact"].is_number(), "{report}");
        assert!(report["bytes"].is_u64(), "{report}");
        assert_eq!(
            (&report["false_positives"], &report["wrong"]),
            (&Value::from(0), &Value::from(0)),
            "{report}"
        );
    }
}
