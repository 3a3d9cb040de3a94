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
        None,
        2,
        Sabotage::None,
        |begun| begun < MIN_SEEDS || started.elapsed() < time,
        || shrinking.get_or_insert_with(Instant::now).elapsed() < SHRINK,
    );
    if let Some(report) = totals.failed {
        panic!("{report}");
    }
    let counts = &totals.counts;
    assert!(totals.seeds >= MIN_SEEDS && counts.gaps > 0 && counts.checks > 0, "{totals:?}");
    assert!(counts.partial_scores > 0 && counts.found_out > 0, "{totals:?}");
}

#[test]
fn a_seed_says_exactly_what_happens() {
    for seed in 0..20 {
        let scenario = generate(seed, None);
        let (first, second) = (run(&scenario, Sabotage::None, true), run(&scenario, Sabotage::None, true));
        let differ = first.lines.iter().zip(&second.lines).find(|(a, b)| a != b);
        assert_eq!(differ, None, "seed {seed}");
        assert_eq!(first.log_hash, second.log_hash, "seed {seed}");
        assert_eq!(
            run(&scenario.to_string().parse().unwrap(), Sabotage::None, false).log_hash,
            first.log_hash
        );
        assert_ne!(run(&generate(seed + 1, None), Sabotage::None, false).log_hash, first.log_hash);
    }
}

/// What was once wrong, or is too rare for a seed to meet. Each must be exact in the end like every other.
const SCENARIOS: [(&str, &str); 4] = [
    (
        "without a replay socket, the first message of an engine's new life is the beginning of an exact one",
        "seed 38 engines 1 device 14 host 8 replay 0 indexes 1
         t=0.079s engine 0 serves 9 blocks of #6
         t=0.500s engine 0 restarts after 0.050s
         t=0.800s engine 0 serves 9 blocks of #6
         t=0.900s engine 0 offloads 2 blocks",
    ),
    (
        "two lives that begin with the same file do not share an epoch, though the clock was set back",
        "seed 2077 engines 1 device 37 host 0 replay 20 indexes 1 files
         t=2.092s engine 0 serves 2 blocks of #5
         t=3.168s shim 0 clock is set back by 11.231s
         t=4.136s shim 0 is killed for 0.215s
         t=6.267s shim 0 is killed for 1.168s (disk old)",
    ),
    (
        "a life that has lost its file does not look older than one before it that had it",
        "seed 1055302 engines 2 device 1000 host 0 replay 4 indexes 1 files small-buffers
         t=0.042s engine 0 serves 31 blocks of #1
         t=0.085s engine 0 serves 10 blocks of #8
         t=0.092s engine 0 serves 9 blocks of #0
         t=0.158s shim 0 is killed for 0.088s (disk flipped)
         t=0.201s engine 0 link loses 1 messages
         t=0.376s engine 1 serves 16 blocks of #14
         t=0.389s engine 0 serves 9 blocks of #31
         t=0.409s engine 0 serves 31 blocks of #16
         t=0.629s shim 0 is killed for 0.015s
         t=0.699s shim 0 is killed for 0.041s (disk flipped)",
    ),
    (
        "a tier that the new epoch does not know is empty, even if the other tier is what it was",
        "seed 1 engines 1 device 20 host 8 replay 100 indexes 1
         t=0.100s engine 0 serves 4 blocks of #0
         t=0.300s engine 0 offloads 3 blocks
         t=0.500s bus is cut for 2.000s
         t=0.600s engine 0 restarts after 0.050s
         t=0.900s engine 0 serves 4 blocks of #0
         t=3.600s engine 0 serves 4 blocks of #0",
    ),
];

#[test]
fn scenarios_that_were_once_wrong_are_exact() {
    for (rule, scenario) in SCENARIOS {
        let outcome = run(&scenario.parse().unwrap(), Sabotage::None, false);
        assert_eq!(outcome.failure, None, "{rule}: {:#?}", outcome.lines);
    }
}

/// How the key space is cut where a planted fault must be found whatever it is.
const CUTS: [Option<u32>; 2] = [Some(1), Some(4)];

/// With the checks away: an index that went wrong finds out by itself, and what differs is repaired.
#[test]
fn what_went_wrong_unseen_is_found_by_digests_and_repaired() {
    for shards in CUTS {
        let sabotage = Sabotage::SkipRemovalsUnseen;
        let totals = run_seeds(0, shards, 2, sabotage, |begun| begun < MIN_SEEDS, || true);
        if let Some(report) = totals.failed {
            panic!("{report}");
        }
        let counts = &totals.counts;
        assert!(counts.divergences > 0 && counts.repairs["state_transferred"] > 0, "{totals:?}");
    }
}

/// The checks must be able to fail, and what fails must be reproducible from what is printed.
fn is_found_and_reproduced(sabotage: Sabotage, shards: Option<u32>) {
    let totals = run_seeds(0, shards, 1, sabotage, |begun| begun < MIN_SEEDS, || true);
    let report = totals.failed.expect("what is planted must be found");
    let again = run(&generate(report.seed, shards), sabotage, false);
    assert_eq!(again.failure.as_ref(), Some(&report.failure));
    assert_eq!(again.lines, report.lines);
    assert!(report.minimal.steps.len() < report.scenario.steps.len(), "{report}");
    let minimal: Scenario = report.minimal.to_string().parse().unwrap();
    let small = run(&minimal, sabotage, false);
    assert_eq!(small.failure.map(|failure| failure.rule), Some(report.failure.rule), "{report}");
    assert!(run(&generate(report.seed, shards), Sabotage::None, false).failure.is_none());
}

#[test]
fn an_index_that_overlooks_removals_is_found_and_the_printed_seed_and_scenario_reproduce_it() {
    CUTS.into_iter().for_each(|shards| is_found_and_reproduced(Sabotage::SkipRemovals, shards));
}

#[test]
fn an_index_that_mixes_the_sequences_of_two_shards_is_found_where_there_are_two() {
    is_found_and_reproduced(Sabotage::MixLanes, Some(3));
    let whole = run_seeds(0, Some(1), 2, Sabotage::MixLanes, |begun| begun < 20, || true);
    assert!(whole.failed.is_none(), "{whole:?}");
}
