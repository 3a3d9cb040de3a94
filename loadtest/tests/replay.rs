//! Every recorded stream through the real path, over both buses, against the engine's own state.

use std::path::{Path, PathBuf};

use kvatlas_bus::test_server::NatsServer;
use kvatlas_loadtest::check::{CheckConfig, FileReport, check, recordings};

/// Recordings that must be exact without any excuse: sets of blocks at every checkpoint and every probe.
const EXACT: [&str; 13] = [
    "vllm0330_long",
    "vllm0330_fleet4",
    "vllm0330_dp2_bytes",
    "vllm0330_async",
    "vllm0330_duplicates",
    "vllm0102_mixed",
    "vllm0112_mixed",
    "vllm0141_mixed",
    "vllm0181_mixed",
    "vllm0221_mixed",
    "vllm0240_mixed",
    "vllm0280_mixed",
    "vllm0300_mixed",
];

fn fixtures() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    recordings(&folder).unwrap()
}

async fn check_all(config: &CheckConfig) {
    let files = fixtures();
    assert!(files.len() >= 38, "{} recordings", files.len());
    let mut exact = Vec::new();
    for file in files {
        let report = check(&file, config).await.unwrap();
        assert!(report.ok, "{}: {:#?}", report.file, report.notes);
        if is_exact(&report) {
            exact.push(file.file_name().unwrap().to_string_lossy().split('.').next().unwrap().to_owned());
        }
    }
    for name in EXACT {
        assert!(exact.iter().any(|found| found == name), "{name} is not exact; exact are {exact:?}");
    }
}

fn is_exact(report: &FileReport) -> bool {
    report.checkpoints > 0 && report.checkpoints == report.checkpoints_exact && report.probes == report.equal
}

#[tokio::test(flavor = "multi_thread")]
async fn every_recording_is_what_the_engine_held_over_the_in_process_bus() {
    check_all(&CheckConfig::default()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_recording_is_what_the_engine_held_over_nats() {
    let Some(broker) = NatsServer::start() else { return };
    check_all(&CheckConfig { nats: Some(broker.url()) }).await;
}

/// The check must be able to fail.
#[tokio::test(flavor = "multi_thread")]
async fn a_truth_of_another_recording_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let copy = |from: &str, to: &str| std::fs::copy(fixtures.join(from), folder.path().join(to)).unwrap();
    copy("vllm0300_mixed.kvrec.zst", "swapped.kvrec.zst");
    copy("vllm0221_mixed.truth.json.zst", "swapped.truth.json.zst");
    let report = check(&folder.path().join("swapped.kvrec.zst"), &CheckConfig::default()).await.unwrap();
    assert!(!report.ok && report.checkpoints_exact < report.checkpoints, "{report:?}");
}
