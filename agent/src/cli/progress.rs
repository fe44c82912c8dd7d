//! How far a long command is, on standard error: a line that replaces itself on a terminal, a line now and then
//! elsewhere.

use std::io::IsTerminal as _;
use std::time::Duration;

use tokio::time::Instant;

use super::output;
use crate::repository::Progress;

/// Pause between two lines where they do not replace each other.
const LINE_PAUSE: Duration = Duration::from_secs(5);
/// Before that a rate says nothing.
const RATE_FROM: Duration = Duration::from_secs(1);

/// Follows one command.
pub(super) struct Following {
    what: &'static str,
    began: Instant,
    said: Option<Instant>,
    /// On a terminal, a line stands there that has no end yet.
    is_open: bool,
}

impl Following {
    pub(super) fn new(what: &'static str) -> Self {
        Self { what, began: Instant::now(), said: None, is_open: false }
    }

    pub(super) fn tell(&mut self, progress: Progress) {
        let now = Instant::now();
        let text = text(self.what, progress, now.duration_since(self.began));
        if std::io::stderr().is_terminal() {
            eprint!("\r\x1b[K{text}");
            self.is_open = true;
        } else if self.said.is_none_or(|said| now.duration_since(said) >= LINE_PAUSE) {
            self.said = Some(now);
            eprintln!("{text}");
        }
    }

    pub(super) fn end(&mut self) {
        if std::mem::take(&mut self.is_open) {
            eprintln!();
        }
    }
}

/// Totals that are unknown, or were wrong, are left out, and with them the estimate.
fn text(what: &str, progress: Progress, elapsed: Duration) -> String {
    let Progress { bytes_done, bytes_total, files_done, files_total, .. } = progress;
    let is_known = bytes_total > 0 && bytes_done <= bytes_total;
    let mut text = format!("{what}: ");
    if is_known {
        text += &format!("{} %, ", (u128::from(bytes_done) * 100) / u128::from(bytes_total));
    }
    text += &output::bytes(bytes_done);
    if is_known {
        text += &format!(" of {}", output::bytes(bytes_total));
    }
    match (files_done, files_total) {
        (0, 0) => {}
        (done, total) if total >= done => text += &format!(", {done} of {total} files"),
        (done, _) => text += &format!(", {done} files"),
    }
    let rate = bytes_done as f64 / elapsed.as_secs_f64();
    if elapsed >= RATE_FROM && rate >= 1.0 {
        text += &format!(", {}/s", output::bytes(rate as u64));
        if is_known {
            text += &format!(", {} s left", ((bytes_total - bytes_done) as f64 / rate).ceil() as u64);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(bytes_done: u64, bytes_total: u64, files_done: u64, files_total: u64, seconds: u64) -> String {
        let progress = Progress { bytes_done, bytes_total, files_done, files_total, ..Progress::default() };
        text("restoring", progress, Duration::from_secs(seconds))
    }

    #[test]
    fn rate_and_estimate_are_told_as_far_as_they_are_known() {
        assert_eq!(
            at(50_000_000, 200_000_000, 7, 20, 10),
            "restoring: 25 %, 50.0 MB of 200.0 MB, 7 of 20 files, 5.0 MB/s, 30 s left"
        );
        assert_eq!(at(3_000, 0, 2, 0, 0), "restoring: 3.0 kB, 2 files");
        // The source has grown since it was counted.
        assert_eq!(at(300, 200, 0, 0, 1), "restoring: 300 B, 300 B/s");
        assert_eq!(at(0, 100, 0, 0, 60), "restoring: 0 %, 0 B of 100 B");
    }
}
