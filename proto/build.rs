//! Compiles the protocol without a `protoc` on the machine: `protox` parses it in Rust.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let file = "proto/hestner/v1/hestner.proto";
    println!("cargo:rerun-if-changed={file}");
    let descriptors = protox::compile([file], ["proto"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
