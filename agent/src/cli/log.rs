//! Where the log goes: standard error, as text or JSON.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::time::SystemTime;

use crate::daemon::settings::{Log, LogFormat};

/// For the daemon.
///
/// # Errors
/// When the filter cannot be understood.
pub(super) fn init(settings: &Log) -> Result<(), String> {
    let filter = EnvFilter::try_new(&settings.filter).map_err(|error| format!("`log.filter`: {error}"))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_timer(SystemTime);
    match settings.format {
        LogFormat::Text => builder.with_ansi(false).init(),
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).init(),
    }
    Ok(())
}

/// For runner and worker, which share the daemon's standard error: as text.
pub(super) fn init_child() {
    init_text("info");
}

/// For commands of people who wait for an answer: what is not as it should be, as text.
pub(super) fn init_command() {
    init_text("warn");
}

fn init_text(filter: &str) {
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter))
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
}
