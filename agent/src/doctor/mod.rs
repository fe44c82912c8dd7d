//! Looks at a host as a run, the daemon and the centre would find it, and says what is wrong and what to do.
//!
//! In: the settings as they were read, and a clock. Out: one [`Check`] a finding, each with a stable code. It
//! works without the daemon, asks it what only the daemon knows, and changes nothing: no repository is
//! opened, nothing is frozen, no hook runs. It prints nothing itself.

mod data;
mod link;
mod process;
mod rights;

use std::path::PathBuf;

use serde::Serialize;

use crate::platform::clock::Clock;
use crate::run::messages::Failure;
use crate::run::plan::Host;
use crate::session::Settings as SessionSettings;

/// What is looked at.
#[derive(Clone, Debug)]
pub struct Subject {
    /// What a run reads of the settings; server and recovery key may be missing.
    pub host: Host,
    /// The daemon's socket.
    pub socket: PathBuf,
    /// Where the receiver is.
    pub receiver: SessionSettings,
}

/// How bad it is; later is worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// It works, and less well than it could.
    Warning,
    /// Runs fail or nobody is told.
    Problem,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at, such as `destination`.
    pub check: &'static str,
    /// Which one, such as its name; empty where there is only one.
    pub subject: String,
    /// How bad it is.
    pub level: Level,
    /// Stable; `ok` where nothing is wrong.
    pub code: String,
    /// What was found.
    pub message: String,
    /// What to do; empty where nothing is wrong.
    pub next_step: String,
}

impl Check {
    /// Nothing is wrong.
    pub fn ok(check: &'static str, subject: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            check,
            subject: subject.into(),
            level: Level::Ok,
            code: "ok".to_owned(),
            message: message.into(),
            next_step: String::new(),
        }
    }

    /// Makes it as bad as `level`, with a code and what to do.
    #[must_use]
    fn but(self, level: Level, code: impl Into<String>, next_step: impl Into<String>) -> Self {
        Self { level, code: code.into(), next_step: next_step.into(), ..self }
    }

    /// A problem with the class and the next step that a run would fail with.
    pub fn failure(check: &'static str, subject: impl Into<String>, failure: &Failure) -> Self {
        let Failure { class, message, .. } = failure;
        Self::ok(check, subject, message).but(Level::Problem, class.as_str(), class.next_step())
    }
}

/// Looks at everything. Takes some seconds where the receiver or Docker do not answer.
pub async fn examine(subject: &Subject, clock: &dyn Clock) -> Vec<Check> {
    let host = &subject.host;
    let mut found = rights::checks(host);
    let status = process::ask(&subject.socket).await;
    found.extend(link::checks(subject, status.as_ref().ok(), clock).await);
    found.extend(process::checks(subject, &status).await);
    found.extend(data::checks(host).await);
    found
}

/// The worst of all findings.
pub fn worst(checks: &[Check]) -> Level {
    checks.iter().map(|check| check.level).max().unwrap_or(Level::Ok)
}
