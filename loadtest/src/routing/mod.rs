//! Which routing policy serves a trace best: a deterministic simulation of a fleet in virtual time.
pub mod blocks;
pub mod lru;
pub mod trace;
