//! Compiles `proto/kvatlas/v1/kvatlas.proto` with protox, so that a build needs no `protoc`.

use std::path::PathBuf;

use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let proto = "proto/kvatlas/v1/kvatlas.proto";
    println!("cargo:rerun-if-changed={proto}");
    let descriptors = protox::compile([proto], ["proto"])?;
    // The descriptor set also feeds gRPC server reflection.
    let out = PathBuf::from(std::env::var("OUT_DIR")?).join("kvatlas_descriptor.bin");
    std::fs::write(out, descriptors.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
