//! What it would cost to serve a prompt where, and which blocks should move: the cost model and the planner.
//!
//! * [`profile`]: what a model, an engine, a tier and a link cost; TOML, with measured profiles shipped.
//! * [`topology`]: where instances and pools stand, so that a link has a class.
//! * [`cost`]: the terms of the cost as small functions, units in their names.
//! * [`query`]: what is asked: the prompt, who holds how much of it, how busy everybody is.
//! * [`plan`](mod@plan): the best (prefill, decode) pair, the source of each block, and why.
//! * [`score`](mod@score): every candidate for itself, by expected time or by the rule of another router.
//! * [`calibrate`]: prefill times from measurements.
//!
//! The objective is `E[TTFT] + lambda * GPU seconds + mu * later tokens' delay + nu * bytes on scarce links`; see
//! [`query::Objective`]. Units: milliseconds, bytes, tokens; GB = 10^9 bytes.
//!
//! There is no IO, no clock and no runtime here: whatever depends on time is an argument. Equal questions get equal
//! answers.

pub mod calibrate;
pub mod cost;
pub mod explain;
mod pattern;
pub mod plan;
pub mod profile;
mod puller;
pub mod query;
pub mod score;
mod sources;
pub mod topology;
mod walk;

pub use plan::{Plan, PlanError, Scratch, plan};
pub use profile::{CostProfile, Profiles};
pub use query::{Candidate, Held, LinkOverride, Load, Objective, PlanQuery, PoolCoverage, Role};
pub use score::{Preset, Scored, score};
pub use topology::{LinkClass, Location, Topology};
