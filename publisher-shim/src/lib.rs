//! The publisher shim: one per engine, it reads KV-cache events and publishes them as kvatlas frames.
//!
//! Pure parts: [`msgpack`] and [`adapter`] decode, [`event`] is the neutral form, [`mirror`] holds what the engine holds,
//! [`source`] orders, repairs and frames, [`state`] is how it survives its own restart. Shell: [`zmq`] reads the sockets, [`shim`] runs it all.

pub mod adapter;
mod burst;
pub mod event;
pub mod metrics;
pub mod mirror;
pub mod msgpack;
pub mod repage;
pub mod shim;
pub mod source;
pub mod state;
pub mod zmq;
