//! Many seeds, and what to say about them.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::op::Scenario;
use super::{Counts, EXACT_MS, Failure, Sabotage, generate, run, shrink};

/// What many simulations amounted to.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// Simulations.
    pub seeds: u64,
    /// What happened in them.
    pub counts: Counts,
    /// Longest virtual time from the end of faults until everything was exact, where no lease and no timeout had to be waited
    /// for.
    pub slowest: Slowest,
    /// The same where one had.
    pub slowest_with_lease: Slowest,
    /// All logs' hashes in one: equal wherever the same seeds were run.
    pub log_hash: u64,
    /// The first seed that failed.
    pub failed: Option<Report>,
}

/// The longest time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Slowest {
    /// Milliseconds.
    pub exact_ms: u64,
    /// The seed that took them.
    pub seed: u64,
}

/// A failing seed, for people.
#[derive(Clone, Debug)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// Into how many shards the key space was to be cut, where the seed was not to say it.
    pub shards: Option<u32>,
    /// What did not hold.
    pub failure: Failure,
    /// Everything that the seed made happen.
    pub scenario: Scenario,
    /// The smallest scenario found that fails in the same way.
    pub minimal: Scenario,
    /// What happened last.
    pub lines: Vec<String>,
}

/// Runs seeds from `first` on, with `shards` as in [`generate`], on some threads, as long as `go_on` says so for the number of seeds begun so far, and up to
/// the first that fails; that one is made small as long as `shrink_on` says so.
pub fn run_seeds(
    first: u64,
    shards: Option<u32>,
    threads: usize,
    sabotage: Sabotage,
    go_on: impl Fn(u64) -> bool + Sync,
    shrink_on: impl FnMut() -> bool,
) -> Totals {
    let (next, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let totals = Mutex::new(Totals::default());
    let work = || {
        while !stop.load(Ordering::Relaxed) {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if !go_on(number) {
                break;
            }
            let seed = first.wrapping_add(number);
            let outcome = run(&generate(seed, shards), sabotage, false);
            let mut totals = totals.lock();
            totals.seeds += 1;
            totals.counts.add(&outcome.counts);
            // Whatever the order in which threads are done.
            totals.log_hash = totals.log_hash.wrapping_add(outcome.log_hash);
            let slowest = if outcome.allowed_ms > EXACT_MS {
                &mut totals.slowest_with_lease
            } else {
                &mut totals.slowest
            };
            if let Some(exact_ms) = outcome.exact_after_ms.filter(|after_ms| *after_ms > slowest.exact_ms) {
                *slowest = Slowest { exact_ms, seed };
            }
            if let Some(failure) = outcome.failure {
                stop.store(true, Ordering::Relaxed);
                // Of several that fail at the same time the first counts, so that the report is always the same.
                if totals.failed.as_ref().is_none_or(|report| seed < report.seed) {
                    let scenario = generate(seed, shards);
                    let minimal = scenario.clone();
                    let lines = outcome.lines;
                    totals.failed = Some(Report { seed, shards, failure, scenario, minimal, lines });
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(work);
        }
    });
    let mut totals = totals.into_inner();
    if let Some(report) = &mut totals.failed {
        report.minimal = shrink(&report.scenario, sabotage, shrink_on);
    }
    totals
}

// === impl Report ===

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {} fails: {}", self.seed, self.failure)?;
        writeln!(f, "\nwhat happened up to then:")?;
        let before = |at_ms: u64| at_ms * 1_000 <= self.failure.at_us;
        writeln!(f, "  {}", self.scenario.world)?;
        for step in self.scenario.steps.iter().filter(|step| before(step.at_ms)) {
            writeln!(f, "  {step}")?;
        }
        writeln!(f, "\nthe smallest scenario found that fails by the same rule:")?;
        for line in self.minimal.to_string().lines() {
            writeln!(f, "  {line}")?;
        }
        writeln!(f, "\nthe log's last lines:")?;
        for line in &self.lines {
            writeln!(f, "  {line}")?;
        }
        write!(f, "\nreproduce it with: kvatlas sim faults --seed {} --trace", self.seed)?;
        self.shards.map_or(Ok(()), |shards| write!(f, " --shards {shards}"))
    }
}
