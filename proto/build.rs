//! Compiles the .proto files with protox: no protoc is needed for ours.

use std::path::PathBuf;

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files =
        ["inference", "attention", "experts", "cluster", "admin"].map(|name| format!("moesaic/v1/{name}.proto"));
    println!("cargo::rerun-if-changed=moesaic");
    let descriptors = protox::compile(files, ["."])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    // Activations and results are passed on without a copy.
    tonic_prost_build::configure().bytes(".moesaic.v1.Frame").compile_fds(descriptors)?;
    Ok(())
}
