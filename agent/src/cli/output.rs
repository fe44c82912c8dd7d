//! How things look to people.

use std::io::{IsTerminal as _, Write as _};

use chrono::DateTime;
use hestner_proto::words::RunStatus;
use serde::Serialize;

use super::Complaint;
use crate::report::RunRecord;
use crate::status::WaitingRun;

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

/// A line that replaces itself on a terminal, and is left out elsewhere.
pub(super) struct ProgressLine {
    shown: bool,
}

impl ProgressLine {
    pub(super) fn new() -> Self {
        Self { shown: false }
    }

    pub(super) fn show(&mut self, phase: &str, bytes_done: (u64, u64), files: (u64, u64), seconds_remaining: u32) {
        let percent = (bytes_done.0 * 100).checked_div(bytes_done.1).map(|p| format!("{p:>3} %  ")).unwrap_or_default();
        let left = if seconds_remaining > 0 { format!(", {seconds_remaining} s left") } else { String::new() };
        let text = format!(
            "{phase:<10} {percent}{} of {}, {} of {} files{left}",
            bytes(bytes_done.0),
            bytes(bytes_done.1),
            files.0,
            files.1
        );
        let text = harmless(if bytes_done.1 == 0 { phase } else { &text });
        if std::io::stderr().is_terminal() {
            eprint!("\r\x1b[K{text}");
            self.shown = true;
        } else {
            eprintln!("{text}");
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

    pub(super) fn end(&mut self) {
        if self.shown {
            eprintln!();
            self.shown = false;
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
    fn time_that_never_came_says_so() {
        assert_eq!((time(0).as_str(), time(1_000).as_str()), ("never", "1970-01-01T00:00:01Z"));
    }

    #[test]
    fn terminal_is_given_no_orders() {
        assert_eq!(harmless("a\x1b[2J\x07b\u{9b}1m\r\nc\td"), "a [2J b 1m \nc\td");
    }
}
