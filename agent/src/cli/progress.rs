//! How far a long command is, with a rate and an estimate of its own.
//!
//! In: what the engine has counted. Out: a [`ProgressLine`] on standard error.

use tokio::time::Instant;

use super::output::{Far, ProgressLine};
use crate::repository::Progress;
use crate::repository::progress::Rate;

/// Follows one command.
pub(super) struct Following {
    began: Instant,
    rate: Rate,
    line: ProgressLine,
}

impl Following {
    pub(super) fn new() -> Self {
        Self { began: Instant::now(), rate: Rate::default(), line: ProgressLine::new(true) }
    }

    /// `what` is done, and so far.
    pub(super) fn tell(&mut self, what: &str, progress: Progress) {
        let progress = self.rate.estimate(progress, self.began.elapsed());
        self.line.show(&Far {
            phase: what.to_owned(),
            bytes: (progress.bytes_done, progress.bytes_total),
            files: (progress.files_done, progress.files_total),
            seconds_remaining: progress.seconds_remaining,
            bytes_per_second: progress.bytes_per_second,
        });
    }

    pub(super) fn end(&mut self) {
        self.line.end();
    }
}
