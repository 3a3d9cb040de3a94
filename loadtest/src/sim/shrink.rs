//! Makes a failing scenario small: steps are left out as long as it still fails by the same rule.

use super::op::Scenario;
use super::{Sabotage, run};

/// A scenario that fails as this one does, with as few steps as could be found while `go_on` said so.
pub fn shrink(scenario: &Scenario, sabotage: Sabotage, mut go_on: impl FnMut() -> bool) -> Scenario {
    let mut best = scenario.clone();
    let Some(failure) = run(&best, sabotage, false).failure else { return best };
    let fails = |candidate: &Scenario| {
        run(candidate, sabotage, false).failure.is_some_and(|found| found.rule == failure.rule)
    };
    // What comes after the failure did not cause it, unless it failed at the very end.
    let mut until = best.clone();
    until.steps.retain(|step| step.at_ms * 1_000 <= failure.at_us);
    if until != best && fails(&until) {
        best = until;
    }
    let mut size = best.steps.len().div_ceil(2).max(1);
    loop {
        let (mut at, mut smaller) = (0, false);
        while at < best.steps.len() {
            if !go_on() {
                return best;
            }
            let mut candidate = best.clone();
            candidate.steps.drain(at..(at + size).min(best.steps.len()));
            if fails(&candidate) {
                best = candidate;
                smaller = true;
            } else {
                at += size;
            }
        }
        if size == 1 && !smaller {
            return fewer_processes(best, &fails);
        }
        size = (size / 2).max(1);
    }
}

/// Leaves out the last engines and indexes where nothing happens to them, and cuts the key space into less.
fn fewer_processes(mut best: Scenario, fails: &impl Fn(&Scenario) -> bool) -> Scenario {
    loop {
        let mut candidates = Vec::new();
        for (engines, indexes, shards, parts) in
            [(0, 0, u32::MAX, u32::MAX), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
        {
            let mut candidate = best.clone();
            candidate.world.engines = candidate.world.engines.saturating_sub(engines).max(1);
            candidate.world.indexes = candidate.world.indexes.saturating_sub(indexes).max(1);
            candidate.world.shards = candidate.world.shards.saturating_sub(shards).max(1);
            candidate.world.parts = candidate.world.parts.saturating_sub(parts).max(1);
            if candidate != best && candidate.fits() {
                candidates.push(candidate);
            }
        }
        match candidates.into_iter().find(|candidate| fails(candidate)) {
            Some(smaller) => best = smaller,
            None => return best,
        }
    }
}
