//! How things look to people.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use chrono::DateTime;
use hestner_proto::words::RunStatus;
use serde::Serialize;
use tokio::time::Instant;

use super::Complaint;
use crate::report::RunRecord;
use crate::status::WaitingRun;

/// Pause between two lines of progress where nothing can be replaced.
const LINE_PAUSE: Duration = Duration::from_secs(5);

/// An error, what to do, and its code.
pub(super) fn complain(Complaint { message, next_step, code, .. }: &Complaint) {
    eprintln!("{}", harmless(&format!("hestner-agent: {message}\n  next: {next_step}\n  code: {code}")));
}

/// Without what a terminal would obey: much of what is shown to root was said by the daemon, who is not root.
pub(super) fn harmless(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { ' ' } else { c }).collect()
}

/// Anything as JSON.
pub(super) fn json(value: &impl Serialize) {
    // Plain data: it can always be written. A reader that has left is no error of ours.
    let text = serde_json::to_string_pretty(value).unwrap_or_default();
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// A line of text.
pub(super) fn line(text: &str) {
    let _ = writeln!(std::io::stdout(), "{}", harmless(text));
}

/// A run, whole.
pub(super) fn run(run: &RunRecord) {
    line(&format!("run {}", run.run_uid));
    let mut rows = vec![
        ("service", run.service.clone()),
        (
            "status",
            match run.error_class {
                Some(class) => format!("{} ({class})", run.status),
                None => run.status.to_string(),
            },
        ),
        ("kind, scope", format!("{}, {}", run.kind, run.scope)),
        ("consistency", format!("{} (asked for: {})", run.consistency_achieved, run.consistency_requested)),
        ("started", time(run.started_at_ms)),
        ("took", format!("{:.1} s, frozen for {} ms", run.duration_ms as f64 / 1000.0, run.freeze_ms)),
    ];
    if run.status == RunStatus::Success {
        rows.push(("read", format!("{} in {} files", bytes(run.bytes_read), run.files)));
        rows.push(("stored", format!("{} new, repository {}", bytes(run.bytes_stored), bytes(run.repository_bytes))));
        rows.push(("artifact", run.artifact_url.clone()));
        rows.push(("checksum", format!("sha256 {}", run.checksum)));
        rows.push(("read back", time(run.verified_at_ms)));
    }
    if run.vanished > 0 {
        rows.push(("vanished", format!("{} entries went away while the live tree was read", run.vanished)));
    }
    if run.unreadable > 0 {
        rows.push(("unreadable", format!("{}: {}", run.unreadable, run.unreadable_names.join(", "))));
    }
    for (name, value) in rows {
        line(&format!("  {name:<12} {value}"));
    }
    for warning in &run.warnings {
        line(&format!("  warning      {warning}"));
    }
}

/// Runs, a line each.
pub(super) fn runs(runs: &[RunRecord]) {
    line(&format!("{:<36}  {:<16} {:<8} {:<20} {:>10} {:>8}", "RUN", "SERVICE", "STATUS", "STARTED", "READ", "TOOK"));
    for run in runs {
        let took = format!("{:.1} s", run.duration_ms as f64 / 1000.0);
        let class = run.error_class.map(|c| format!("  {c}")).unwrap_or_default();
        line(&format!(
            "{:<36}  {:<16} {:<8} {:<20} {:>10} {took:>8}{class}",
            run.run_uid,
            run.service,
            run.status,
            time(run.started_at_ms),
            bytes(run.bytes_read)
        ));
    }
}

/// How far a run is.
#[derive(Clone, Debug, Default)]
pub(super) struct Far {
    pub(super) phase: String,
    /// Done and whole; a whole of 0 is unknown.
    pub(super) bytes: (u64, u64),
    pub(super) files: (u64, u64),
    pub(super) seconds_remaining: u32,
    pub(super) bytes_per_second: u64,
}

impl Far {
    fn line(&self) -> String {
        let Self { phase, bytes: (done, total), files: (files, files_total), .. } = self;
        let mut text = format!("{phase:<10}");
        if *total > 0 {
            let percent = u128::from(*done) * 100 / u128::from(*total);
            text += &format!(" {percent:>3} %  {} of {}", bytes(*done), bytes(*total));
        } else if *done > 0 {
            text += &format!(" {}", bytes(*done));
        }
        // What is read back is objects and not files.
        let things = if phase == "verify" { "objects" } else { "files" };
        match (files, files_total) {
            (0, 0) => {}
            (files, 0) => text += &format!(", {files} {things}"),
            (files, total) => text += &format!(", {files} of {total} {things}"),
        }
        if self.bytes_per_second > 0 {
            text += &format!(", {}/s", bytes(self.bytes_per_second));
        }
        if self.seconds_remaining > 0 {
            text += &format!(", {} left", duration(self.seconds_remaining));
        }
        text.trim_end().to_owned()
    }
}

fn duration(seconds: u32) -> String {
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match (hours, minutes) {
        (0, 0) => format!("{seconds} s"),
        (0, minutes) => format!("{minutes}:{seconds:02} min"),
        (hours, minutes) => format!("{hours}:{minutes:02} h"),
    }
}

/// A line that replaces itself on a terminal; elsewhere one now and then, and one for each new phase.
pub(super) struct ProgressLine {
    is_wanted: bool,
    shown: bool,
    /// The phase, the line and the time of what was said last.
    said: Option<(String, String, Instant)>,
    /// What came too soon after that.
    unsaid: Option<String>,
}

impl ProgressLine {
    /// `is_wanted`: whether anything is said of progress at all.
    pub(super) fn new(is_wanted: bool) -> Self {
        Self { is_wanted, shown: false, said: None, unsaid: None }
    }

    pub(super) fn show(&mut self, far: &Far) {
        if !self.is_wanted {
            return;
        }
        let text = harmless(&far.line());
        if std::io::stderr().is_terminal() {
            eprint!("\r\x1b[K{text}");
            self.shown = true;
            return;
        }
        let is_due = |(phase, _, at): &(String, String, Instant)| *phase != far.phase || at.elapsed() >= LINE_PAUSE;
        if self.said.as_ref().is_none_or(is_due) {
            eprintln!("{text}");
            self.said = Some((far.phase.clone(), text, Instant::now()));
            self.unsaid = None;
        } else {
            self.unsaid = self.said.as_ref().is_none_or(|(_, said, _)| *said != text).then_some(text);
        }
    }

    /// Says that the run waits for a person, and what that person types.
    pub(super) fn wait(&mut self, runs: &[WaitingRun]) {
        self.end();
        for run in runs {
            let text = format!(
                "run {} waits until somebody confirms it on this host, at most until {}: hestner-agent confirm {}",
                run.run_uid,
                time(run.expires_at_ms),
                run.run_uid
            );
            eprintln!("{}", harmless(&text));
        }
    }

    /// Leaves what was shown last, so that a log tells how far it came in the end.
    pub(super) fn end(&mut self) {
        if std::mem::take(&mut self.shown) {
            eprintln!();
        }
        if let Some(text) = self.unsaid.take() {
            eprintln!("{text}");
        }
    }
}

/// A size in decimal units, as disks are sold.
pub(super) fn bytes(bytes: u64) -> String {
    const UNITS: [(&str, u64); 4] =
        [("TB", 1_000_000_000_000), ("GB", 1_000_000_000), ("MB", 1_000_000), ("kB", 1_000)];
    let unit = UNITS.iter().find(|(_, size)| bytes >= *size);
    unit.map_or_else(|| format!("{bytes} B"), |(name, size)| format!("{:.1} {name}", bytes as f64 / *size as f64))
}

/// A time of day in UTC.
pub(super) fn time(milliseconds: i64) -> String {
    match DateTime::from_timestamp_millis(milliseconds) {
        Some(time) if milliseconds > 0 => time.format("%Y-%m-%dT%H:%M:%SZ").to_string(),
        _ => "never".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_readable() {
        assert_eq!([bytes(0), bytes(999), bytes(1_500), bytes(2_000_000_000)], ["0 B", "999 B", "1.5 kB", "2.0 GB"]);
    }

    #[test]
    fn progress_says_what_is_known_and_no_more() {
        let far = Far { phase: "archive".to_owned(), ..Far::default() };
        assert_eq!(far.line(), "archive");
        let far = Far { bytes: (1_500, 0), files: (3, 0), bytes_per_second: 700, ..far };
        assert_eq!(far.line(), "archive    1.5 kB, 3 files, 700 B/s");
        let far = Far { bytes: (1_500, 6_000), files: (3, 9), seconds_remaining: 90, ..far };
        assert_eq!(far.line(), "archive     25 %  1.5 kB of 6.0 kB, 3 of 9 files, 700 B/s, 1:30 min left");
        assert_eq!([duration(59), duration(3_600), duration(7_265)], ["59 s", "1:00 h", "2:01 h"]);
    }

    #[test]
    fn time_that_never_came_says_so() {
        assert_eq!((time(0).as_str(), time(1_000).as_str()), ("never", "1970-01-01T00:00:01Z"));
    }

    #[test]
    fn terminal_is_given_no_orders() {
        assert_eq!(harmless("a\x1b[2J\x07b\u{9b}1m\r\nc\td"), "a [2J b 1m \nc\td");
    }
}
