//! The generated gRPC service `kvatlas.v1.Atlas` and its messages.
//!
//! The meaning, unit and range of every field is in `proto/kvatlas/v1/kvatlas.proto`.

#[allow(missing_docs, unreachable_pub, clippy::pedantic)]
mod generated {
    tonic::include_proto!("kvatlas.v1");
}

pub use generated::*;

/// The encoded `FileDescriptorSet` of the service, for gRPC server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kvatlas_descriptor.bin"));
