//! Which routing policy serves a trace best: a deterministic simulation of a fleet in virtual time.
pub mod blocks;
pub mod engine;
pub mod feed;
pub mod fleet;
pub mod lru;
pub mod policy;
pub mod router;
pub mod run;
pub mod trace;
