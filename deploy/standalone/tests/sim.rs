//! `kvatlas sim faults` as people and scripts call it.

use std::process::{Command, Output};

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
