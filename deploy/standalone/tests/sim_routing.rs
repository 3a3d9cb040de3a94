//! `kvatlas sim routing` as people and scripts call it.

use std::process::{Command, Output};

use serde_json::Value;

fn routing(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvatlas")).args(["sim", "routing"]).args(arguments).output().unwrap()
}

fn study(arguments: &[&str]) -> Value {
    let output = routing(&[&["--json"], arguments].concat());
    assert!(output.status.success(), "{output:?}");
    let mut study: Value = serde_json::from_slice(&output.stdout).unwrap();
    study.as_object_mut().unwrap().remove("wall_seconds").unwrap();
    study
}

#[test]
fn every_policy_and_load_is_a_row_and_equal_calls_give_equal_rows() {
    let arguments = ["--trace", "synth:agents", "--limit", "300", "--load", "1,4", "--engines", "3"];
    let first = study(&arguments);
    assert_eq!(first["case"], "routing");
    let rows = first["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 22);
    assert!(rows.iter().all(|row| row["ttft_mean_ms"].as_f64() > Some(0.0)), "{rows:?}");
    assert_eq!(first, study(&arguments));
}

#[test]
fn charts_are_written_where_they_are_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let plots = folder.path().join("new");
    let output = routing(&[
        "--trace",
        "synth:chat",
        "--limit",
        "200",
        "--policy",
        "ours,random",
        "--load",
        "1,2,4",
        "--plots",
        plots.to_str().unwrap(),
    ]);
    assert!(output.status.success(), "{output:?}");
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("TTFT mean s") && table.contains("ours") && !table.contains("dynamo"), "{table}");
    for name in ["ttft-mean.svg", "ttft-p99.svg", "hit-rate.svg"] {
        let svg = std::fs::read_to_string(plots.join(name)).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("ours") && svg.ends_with("</svg>\n"), "{name}");
    }
}

#[test]
fn prefill_and_decode_engines_can_be_apart() {
    let study = study(&[
        "--trace",
        "synth:zipf",
        "--limit",
        "200",
        "--policy",
        "least-load,ours",
        "--prefill",
        "2",
        "--decode",
        "2",
    ]);
    let rows = study["rows"].as_array().unwrap();
    assert!(rows.iter().all(|row| row["handed_gb"].as_f64() > Some(0.0)), "{rows:?}");
}

#[test]
fn what_cannot_be_simulated_is_refused_with_a_reason() {
    for (arguments, code, reason) in [
        (vec!["--trace", "/nowhere"], 1, "/nowhere"),
        (vec!["--trace", "synth:none"], 1, "synth:zipf"),
        (vec!["--trace", "synth:zipf", "--profile", "none"], 1, "profile"),
        (vec!["--trace", "synth:zipf", "--engines", "0"], 1, "engines"),
        (vec!["--trace", "synth:zipf", "--policy", "best"], 2, "round-robin"),
        (vec!["--trace", "synth:zipf", "--load", "0"], 2, "above 0"),
    ] {
        let output = routing(&arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(code) && said.contains(reason), "{arguments:?}: {output:?}");
    }
}
