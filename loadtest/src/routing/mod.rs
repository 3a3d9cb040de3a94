//! Which routing policy serves a trace best: a fleet of engines in virtual time, fed by recorded or made-up requests.
//!
//! * [`trace`], [`synthesis`]: what is asked when.
//! * [`fleet`], [`engine`]: who serves it. Engines have vLLM's scheduler, block pool and order of eviction; the time that
//!   their steps take is the planner's cost model.
//! * [`policy`], [`router`]: who decides. Policies that ask an index ask the real one, which is fed with the frames that
//!   the engines' publishers would send; those that plan ask the real planner.
//! * [`run`](mod@run): events in order.
//! * [`report`], [`plots`]: what came of it.
//!
//! Equal arguments give equal results, to the last digit: time is virtual, chance comes from the seed.

pub mod blocks;
pub mod engine;
pub mod feed;
pub mod fleet;
pub mod lru;
pub mod plots;
pub mod policy;
pub mod report;
pub mod router;
pub mod run;
pub mod synthesis;
pub mod trace;

pub use fleet::{Fleet, FleetError, HardwareConfig, Shape};
pub use plots::PlotError;
pub use policy::Policy;
pub use report::{Row, StudyReport};
pub use router::RouteError;
pub use run::{Outcomes, Pace, run};
pub use trace::{Trace, TraceOptions};

/// Where a study is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    /// Who routes now.
    pub policy: Policy,
    /// At which load.
    pub load: f64,
    /// Requests that have ended, over all runs.
    pub done: u64,
    /// Of so many.
    pub total: u64,
}

/// Requests between two words about progress: thousands of words a second help nobody.
const PROGRESS_REQUESTS: u64 = 256;

/// Runs every policy at every load, on the same arrivals.
pub fn study(
    trace: &Trace,
    fleet: &Fleet,
    policies: &[Policy],
    loads: &[f64],
    pace: Pace,
    on_progress: &mut dyn FnMut(Progress),
) -> Result<StudyReport, RouteError> {
    let mut report = StudyReport::new(trace, fleet, pace);
    let requests = trace.requests.len() as u64;
    let total = requests * policies.len() as u64 * loads.len() as u64;
    let mut before = 0;
    for load in loads {
        for policy in policies {
            let mut on_end = |ended: usize| {
                let done = before + ended as u64;
                if done.is_multiple_of(PROGRESS_REQUESTS) || ended as u64 == requests {
                    on_progress(Progress { policy: *policy, load: *load, done, total });
                }
            };
            let outcomes = run(trace, fleet, *policy, Pace { load: *load, ..pace }, &mut on_end)?;
            report.rows.push(Row::new(*policy, *load, trace, &outcomes, report.ideal_hit_share));
            before += requests;
        }
    }
    Ok(report)
}

#[cfg(test)]
mod tests;
