//! `kvatlas sim faults` and `kvatlas sim scale` as people and scripts call it.

use std::process::{Command, Output};

use serde_json::{Value, json};

fn faults(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvatlas")).args(["sim", "faults"]).args(arguments).output().unwrap()
}

#[test]
fn seeds_are_summed_up_in_one_json_object_and_the_same_seeds_give_the_same_log_in_every_process() {
    let run = || {
        let output = faults(&["--seeds", "30", "--first-seed", "5", "--json"]);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let (first, second) = (run(), run());
    assert_eq!((&first["case"], &first["seeds"]), (&"faults".into(), &30.into()));
    assert!(first["operations"].as_u64() > Some(100) && first["failed_seed"].is_null(), "{first}");
    assert_eq!(first["log_hash"], second["log_hash"]);
}

#[test]
fn one_seed_prints_its_scenario_and_everything_that_happens() {
    let output = faults(&["--seed", "3", "--trace"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.starts_with("seed 3 engines "), "{text}");
    assert!(text.contains("shim 0 publishes") && text.contains("nothing wrong"), "{text}");
    assert_eq!(faults(&["--seed", "3", "--seeds", "4"]).status.code(), Some(2));
}

/// The division of a workload's blocks by `cut` among so many servers.
fn division<'a>(study: &'a Value, workload: &str, cut: &Value, servers: u64) -> &'a Value {
    let workloads = study["workloads"].as_array().unwrap();
    let workload = workloads.iter().find(|report| report["name"] == workload).unwrap();
    let rows = workload["divisions"].as_array().unwrap();
    rows.iter().find(|row| row["cut"] == *cut && row["shards"] == 256 && row["servers"] == servers).unwrap()
}

#[test]
fn a_quick_study_of_scale_says_what_is_even_and_what_is_not() {
    let output = Command::new(env!("CARGO_BIN_EXE_kvatlas"))
        .args(["sim", "scale", "--quick", "--json"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("queries"), "progress is on standard error");
    let study: Value = serde_json::from_slice(&output.stdout).unwrap();
    let (root, segments) = (json!("root"), json!({"segment": 16}));
    // With one prompt for all, one server has everything if the prompt's beginning decides.
    assert!(division(&study, "one-2000", &root, 16)["ingest_skew"].as_f64() > Some(15.0));
    assert!(division(&study, "one-2000", &segments, 16)["ingest_skew"].as_f64() <= Some(1.3));
    // Of short tails, what lies in the segment in which they branch off is much: the weakness of segments.
    assert!(division(&study, "one-16", &segments, 16)["ingest_skew"].as_f64() > Some(6.0));
    for workload in ["zipf", "mooncake", "agents"] {
        let ours = division(&study, workload, &segments, 8);
        assert!(
            ours["fan_out"].as_f64() <= division(&study, workload, &json!("worker"), 8)["fan_out"].as_f64()
        );
        assert!(ours["held_skew"].as_f64() < division(&study, workload, &root, 8)["held_skew"].as_f64());
    }
    let sizing = study["sizing"].as_array().unwrap();
    assert!(
        sizing.iter().any(|row| row["pods"] == 10_000 && row["memory_gb"].as_f64() > Some(1.0)),
        "{sizing:?}"
    );
}
