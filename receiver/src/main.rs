//! Entry of `hestner-receiver`: installs the one cryptographic provider, then hands over to the command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    // First of all: two providers in one process make rustls panic at first use.
    if rustls::crypto::aws_lc_rs::default_provider().install_default().is_err() {
        eprintln!("hestner-receiver: another cryptographic provider is installed already");
        return ExitCode::FAILURE;
    }
    hestner_receiver::cli::main()
}
