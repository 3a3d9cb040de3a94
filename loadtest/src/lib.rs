//! Recorded engine streams, simulated engines and workloads: everything that tests, the demo and benchmarks use in
//! place of a GPU.
//!
//! * [`stored`]: files that may be compressed.
//! * [`kvrec`]: recordings of an engine's event stream, read and written.
//! * [`truth`]: what the engine really held at the checkpoints of a recording.
//! * [`oracle`]: block keys of a recording by a second, deliberately simple reading of its events.
//! * [`wire`]: vLLM's events, byte for byte.
//! * [`engine_sim`]: a simulated block manager that produces such events.
//!
//! Everything here is a function of its arguments (and of the files it is told to read).

pub mod engine_sim;
pub mod kvrec;
pub mod oracle;
pub mod stored;
pub mod truth;
pub mod wire;
