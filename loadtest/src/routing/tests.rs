//! The rules of the study: equal arguments, equal results; engines like the measured ones; policies in their order.

use std::path::PathBuf;

use serde::Deserialize;

use super::synthesis::synthesise;
use super::trace::read_trace;
use super::*;
use crate::stored::read_file;

/// The public traces, where they lie beside the repository or `KVATLAS_TRACES` says so. They are no part of it: tests of
/// them end at once where they are not.
pub(super) fn public_trace(name: &str) -> Option<PathBuf> {
    let beside = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/traces");
    let folder = std::env::var_os("KVATLAS_TRACES").map_or_else(beside, PathBuf::from);
    Some(folder.join(name)).filter(|path| path.exists())
}

const PACE: Pace = Pace { load: 1.0, conversation_gap_s: 10.0, lag_us: 5_000, seed: 1 };

fn rows(trace: &Trace, shape: Shape, policies: &[Policy], loads: &[f64]) -> Vec<Row> {
    let fleet = Fleet::new(shape, &HardwareConfig::default(), trace.block_tokens).unwrap();
    study(trace, &fleet, policies, loads, PACE, &mut |_| {}).unwrap().rows
}

fn small(name: &str) -> Trace {
    synthesise(name, TraceOptions { limit: Some(600), block_tokens: None }, 7).unwrap()
}

#[test]
fn equal_arguments_give_equal_results_and_another_seed_others() {
    let trace = small("chat");
    let run = |seed| {
        let fleet = Fleet::new(Shape::Together(3), &HardwareConfig::default(), trace.block_tokens).unwrap();
        study(&trace, &fleet, &Policy::ALL, &[1.0, 4.0], Pace { seed, ..PACE }, &mut |_| {}).unwrap().rows
    };
    let first = run(1);
    assert_eq!(first, run(1));
    assert_ne!(first, run(2));
    assert_eq!(first.len(), 22);
}

#[test]
fn every_request_is_answered_once_whatever_the_policy() {
    for name in ["zipf", "agents", "chat"] {
        let trace = small(name);
        for shape in [Shape::Together(3), Shape::Apart { prefill: 2, decode: 2 }] {
            for row in rows(&trace, shape, &Policy::ALL, &[2.0]) {
                assert_eq!((row.answered, row.refused), (trace.requests.len(), 0), "{name} {}", row.policy);
                assert!(row.hit_of_ideal <= 1.05 && row.ttft_mean_ms > 0.0, "{name} {row:?}");
                let handed = matches!(shape, Shape::Apart { .. });
                assert_eq!(row.handed_gb > 0.0, handed, "{name} {}", row.policy);
            }
        }
    }
}

#[test]
fn who_knows_the_caches_answers_sooner_than_who_knows_the_load() {
    for name in ["zipf", "agents"] {
        let trace = small(name);
        let rows =
            rows(&trace, Shape::Together(4), &[Policy::Random, Policy::LeastLoad, Policy::Ours], &[1.0, 2.0]);
        for policies in rows.chunks(3) {
            let [random, least, ours] = policies else { panic!("three policies") };
            assert!(ours.ttft_mean_ms < least.ttft_mean_ms, "{name}: {ours:?} {least:?}");
            assert!(ours.hit_share > random.hit_share, "{name}: {ours:?} {random:?}");
        }
    }
}

/// What vLLM measured of a request.
#[derive(Deserialize)]
struct Measured {
    queued_ms: f64,
    first_token_ms: f64,
    last_token_ms: f64,
    output_length: u32,
}

/// Means of the time to first token and per later token, simulated and measured, ms.
fn simulated_and_measured(name: &str, profile: &str, blocks: u64, max_seqs: u32) -> Option<[(f64, f64); 2]> {
    let path = public_trace(name)?;
    let trace = read_trace(&path, TraceOptions::default()).unwrap();
    let hardware = HardwareConfig {
        model: "meta-llama/Llama-3.1-8B".to_owned(),
        profile: profile.to_owned(),
        gpu_tokens: blocks * 16,
        cpu_tokens: 0,
        max_batched_tokens: 2_048,
        max_seqs,
        ..HardwareConfig::default()
    };
    let fleet = Fleet::new(Shape::Together(1), &hardware, trace.block_tokens).unwrap();
    let report = study(&trace, &fleet, &[Policy::RoundRobin], &[1.0], PACE, &mut |_| {}).unwrap();
    let content = read_file(&path, 1 << 24).unwrap();
    let lines = content.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let measured: Vec<Measured> = lines.map(|line| serde_json::from_slice(line).unwrap()).collect();
    let mean = |of: &dyn Fn(&Measured) -> f64| measured.iter().map(of).sum::<f64>() / measured.len() as f64;
    let ttft = mean(&|m| m.first_token_ms - m.queued_ms);
    let tpot = mean(&|m| (m.last_token_ms - m.first_token_ms) / f64::from(m.output_length.max(2) - 1));
    let row = &report.rows[0];
    Some([(row.ttft_mean_ms, ttft), (row.tpot_mean_ms, tpot)])
}

#[test]
fn simulated_engines_answer_when_measured_ones_did() {
    for (name, profile, blocks, max_seqs) in [
        // 96 GB less the weights; the run's file does not say.
        ("vllm-measured-rtxpro6000-llama-3.1-8b.jsonl.zst", "llama-3.1-8b/rtx-pro-6000", 33_000, 128),
        ("vllm-measured-rtx4090-llama-3.1-8b.jsonl.zst", "llama-3.1-8b/rtx-4090", 2_588, 256),
    ] {
        let Some([ttft, tpot]) = simulated_and_measured(name, profile, blocks, max_seqs) else { return };
        for (what, (simulated, measured)) in [("first", ttft), ("later", tpot)] {
            let error = simulated / measured - 1.0;
            assert!(error.abs() < 0.05, "{profile}, {what} tokens: {simulated} instead of {measured} ms");
        }
    }
}

#[test]
fn random_least_load_local_and_global_are_in_the_published_order() {
    let Some(path) = public_trace("mooncake-conversation.jsonl.zst") else { return };
    let trace = read_trace(&path, TraceOptions::default()).unwrap();
    let policies = [Policy::Random, Policy::LeastLoad, Policy::Local, Policy::Global, Policy::Ours];
    let rows = rows(&trace, Shape::Together(4), &policies, &[1.0]);
    let means: Vec<f64> = rows.iter().map(|row| row.ttft_mean_ms).collect();
    assert!(means.is_sorted_by(|a, b| a > b), "{means:?}");
}
