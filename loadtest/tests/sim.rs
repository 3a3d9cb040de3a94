//! The protocol under faults, in virtual time. `KVATLAS_SIM_SECONDS` makes it longer.

use std::time::{Duration, Instant};

use kvatlas_loadtest::sim::{Sabotage, Scenario, generate, run, run_seeds};

/// Seeds that are run, however long they take.
const MIN_SEEDS: u64 = 200;
/// How long seeds are run, unless the environment says otherwise.
const SECONDS: u64 = 10;
/// How long a failing scenario is made smaller.
const SHRINK: Duration = Duration::from_secs(20);

#[test]
fn no_seed_finds_an_index_that_is_wrong() {
    let seconds = std::env::var("KVATLAS_SIM_SECONDS").ok().and_then(|text| text.parse().ok());
    let time = Duration::from_secs(seconds.unwrap_or(SECONDS));
    let started = Instant::now();
    let mut shrinking = None;
    let totals = run_seeds(
        0,
        2,
        Sabotage::None,
        |begun| begun < MIN_SEEDS || started.elapsed() < time,
        || shrinking.get_or_insert_with(Instant::now).elapsed() < SHRINK,
    );
    if let Some(report) = totals.failed {
        panic!("{report}");
    }
    assert!(totals.seeds >= MIN_SEEDS && totals.counts.gaps > 0 && totals.counts.checks > 0, "{totals:?}");
}

#[test]
fn a_seed_says_exactly_what_happens() {
    for seed in 0..20 {
        let scenario = generate(seed);
        let (first, second) = (run(&scenario, Sabotage::None, true), run(&scenario, Sabotage::None, true));
        let differ = first.lines.iter().zip(&second.lines).find(|(a, b)| a != b);
        assert_eq!(differ, None, "seed {seed}");
        assert_eq!(first.log_hash, second.log_hash, "seed {seed}");
        assert_eq!(
            run(&scenario.to_string().parse().unwrap(), Sabotage::None, false).log_hash,
            first.log_hash
        );
        assert_ne!(run(&generate(seed + 1), Sabotage::None, false).log_hash, first.log_hash);
    }
}

/// The checks must be able to fail, and what fails must be reproducible from what is printed.
#[test]
fn an_index_that_overlooks_removals_is_found_and_the_printed_seed_and_scenario_reproduce_it() {
    let totals = run_seeds(0, 1, Sabotage::SkipRemovals, |begun| begun < MIN_SEEDS, || true);
    let report = totals.failed.expect("an index that overlooks removals must be found");
    let again = run(&generate(report.seed), Sabotage::SkipRemovals, false);
    assert_eq!(again.failure.as_ref(), Some(&report.failure));
    assert_eq!(again.lines, report.lines);
    assert!(report.minimal.steps.len() < report.scenario.steps.len(), "{report}");
    let minimal: Scenario = report.minimal.to_string().parse().unwrap();
    let small = run(&minimal, Sabotage::SkipRemovals, false);
    assert_eq!(small.failure.map(|failure| failure.rule), Some(report.failure.rule), "{report}");
    assert!(run(&generate(report.seed), Sabotage::None, false).failure.is_none());
}
