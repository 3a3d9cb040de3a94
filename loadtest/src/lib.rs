//! Recorded engine streams, simulated engines and workloads: everything that tests, the demo and benchmarks use in
//! place of a GPU.
//!
//! * [`stored`]: files that may be compressed.
//! * [`kvrec`]: recordings of an engine's event stream, read and written.
//! * [`truth`]: what the engine really held at the checkpoints of a recording.
//! * [`oracle`]: block keys of a recording by a second, deliberately simple reading of its events.
//! * [`replay`]: what an engine's replay buffer answers.
//! * [`sockets`]: one engine's event and replay sockets.
//! * [`player`]: plays a recording as its engines did.
//! * [`wire`]: vLLM's events, byte for byte.
//! * [`engine_sim`]: a simulated block manager that produces such events.
//! * [`publisher`]: publishes a simulated engine's events.
//! * [`record`]: records live engines.
//! * [`recovery`]: faults against real parts, and how fast the map is true again.
//! * [`cluster`]: many servers as one index, on one machine.
//! * [`redact`]: replaces what users said in recorded messages.
//! * [`check`]: plays a recording through the real path and compares with the engine's own state.
//! * [`demo`]: conversations over simulated engines, routed by the index and round robin.
//! * [`bench_shim`]: the shim's benchmark, from raw payloads to frames.
//! * [`routing`]: which routing policy serves a trace best.
//! * [`scale`]: how large a deployment can be.
//! * [`sim`]: the protocol under faults, in virtual time.
//! * [`workload`]: conversations, and what a routing policy made of them.
//!
//! Only [`sockets`], [`player`], [`publisher`], [`record`], [`check`], [`demo`] [`cluster`] and parts of [`recovery`] know tokio; everything else is a function of
//! its arguments (and of the files it is told to read).

pub mod bench_plan;
pub mod bench_shim;
pub mod check;
pub mod cluster;
pub mod demo;
pub mod engine_sim;
mod expectations;
pub mod kvrec;
pub mod oracle;
pub mod player;
pub mod publisher;
pub mod record;
pub mod recovery;
pub mod redact;
pub mod replay;
pub mod routing;
pub mod scale;
pub mod sim;
pub mod sockets;
pub mod stored;
pub mod truth;
pub mod wire;
pub mod workload;
