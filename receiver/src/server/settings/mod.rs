//! The settings file: what may stand in it, and every mistake of it at once.
//!
//! In: TOML. Out: [`Checked`] values, or all mistakes with their lines: unknown keys, wrong types and values
//! that break a rule. Each module declares its own section; this is only their sum. Nothing is opened here.

mod check;

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use toml_example::TomlExample;

use crate::model::cost::RateCard;
use crate::platform::files;
// Under names of their own: the derive of `TomlExample` sees only a path's last word.
use crate::agent_api::Settings as Session;
use crate::enrolment::Settings as Enrolment;
use crate::rest::Settings as Rest;

pub use check::parse;

/// Where the settings are looked for when nobody says otherwise.
pub const DEFAULT_PATH: &str = "/etc/hestner/receiver.toml";

/// Settings of hestner-receiver. Every value shown is the default; unknown keys are refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, TomlExample)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Folder of the store and of the certificate authority. Only the user of the service may read it.
    pub state_dir: String,
    /// First part of every agent's name, `spiffe://TRUST_DOMAIN/company/ID/server/ID`. Agents that were enrolled
    /// under another one have to enrol again.
    pub trust_domain: String,
    /// DNS names and IP addresses under which agents and people reach this receiver; they stand in its certificates.
    pub names: Vec<String>,
    /// Addresses to listen on. Port 0 takes a free one; the file addresses.json in state_dir names it.
    #[toml_example(nesting)]
    pub listen: Listen,
    /// The REST listener.
    #[toml_example(nesting)]
    pub rest: Rest,
    /// What things cost. Amounts are decimal strings.
    #[toml_example(nesting)]
    pub rate_card: Rates,
    /// Sessions of agents. Durations are a number and a unit, such as 30s, 15m, 12h or 7days.
    #[toml_example(nesting)]
    pub session: Session,
    /// Enrolment of new hosts.
    #[toml_example(nesting)]
    pub enrolment: Enrolment,
    /// The receiver's log, on standard error.
    #[toml_example(nesting)]
    pub log: Log,
}

/// Section `[listen]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, TomlExample)]
#[serde(default, deny_unknown_fields)]
pub struct Listen {
    /// Sessions of agents, over mutual TLS.
    pub agents: String,
    /// Enrolment of new hosts, over TLS.
    pub enrolment: String,
    /// REST, health and metrics, over TLS.
    pub rest: String,
}

/// Section `[rate_card]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, TomlExample)]
#[serde(default, deny_unknown_fields)]
pub struct Rates {
    /// ISO 4217 code of all amounts.
    pub currency: String,
    /// Price of one stored GB (10^9 bytes) for one month.
    pub storage_gb_month: String,
}

/// Section `[log]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, TomlExample)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// Either "text" or "json".
    pub format: String,
    /// What is logged: error, warn, info, debug, trace, or rules such as "info,hestner_receiver::ingest=debug".
    pub filter: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/hestner-receiver".into(),
            trust_domain: "hestner.internal".into(),
            names: vec!["localhost".into(), "127.0.0.1".into()],
            listen: Listen::default(),
            rest: Rest::default(),
            rate_card: Rates::default(),
            session: Session::default(),
            enrolment: Enrolment::default(),
            log: Log::default(),
        }
    }
}

impl Default for Listen {
    fn default() -> Self {
        Self { agents: "0.0.0.0:7443".into(), enrolment: "0.0.0.0:7444".into(), rest: "0.0.0.0:8443".into() }
    }
}

impl Default for Rates {
    fn default() -> Self {
        Self { currency: "EUR".into(), storage_gb_month: "0.0500".into() }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { format: "text".into(), filter: "info".into() }
    }
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines.
    Json,
}

/// Settings whose every value can be used.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "as in the settings file")]
pub struct Checked {
    pub state_dir: PathBuf,
    pub trust_domain: String,
    pub names: Vec<String>,
    pub agents: SocketAddr,
    pub enrolment: SocketAddr,
    pub rest: SocketAddr,
    pub plain_http: bool,
    pub card: RateCard,
    pub heartbeat_interval: Duration,
    pub flush_interval: Duration,
    pub certificate_life: Duration,
    pub attempts_per_minute: NonZeroU32,
    pub log_format: LogFormat,
    pub log_filter: String,
}

/// Settings that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error(transparent)]
    File(#[from] files::Error),
    /// A file was named that does not exist.
    #[error("there is no settings file {0}")]
    Missing(PathBuf),
    /// All mistakes, in the file's order.
    #[error("{path}: {} mistake(s)\n  - {}", .mistakes.len(), .mistakes.join("\n  - "))]
    Mistakes {
        /// The file.
        path: PathBuf,
        /// Each a sentence.
        mistakes: Vec<String>,
    },
}

/// Reads and checks the settings. A missing file at the default place means the defaults.
///
/// # Errors
/// See [`Error`].
pub fn load(path: Option<&Path>) -> Result<Checked, Error> {
    let shown = path.unwrap_or(Path::new(DEFAULT_PATH));
    let text = match (files::read_text(shown)?, path) {
        (Some(text), _) => text,
        (None, None) => String::new(),
        (None, Some(path)) => return Err(Error::Missing(path.to_owned())),
    };
    parse(&text).map_err(|mistakes| Error::Mistakes { path: shown.to_owned(), mistakes })
}

/// The commented default file, made from the doc comments of the sections.
pub fn example() -> String {
    let made = Settings::toml_example();
    // A section's struct says in Rust which section it is; in the file the next line says that.
    let lines = made.lines().filter(|line| !line.starts_with("# Section `["));
    let text = lines.collect::<Vec<_>>().join("\n");
    format!("{}\n", text.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mistake_is_named_at_once_with_its_line() {
        let text = r#"state_dir = "relative"
names = ["ok.example", "not a name"]
colour = "red"
[listen]
agents = "nowhere"
rest = "0.0.0.0:1"
[rest]
plain_http = true
[rate_card]
currency = "euro"
storage_gb_month = "-1"
[session]
heartbeat_interval = "soon"
flush_interval = 60
certificate_ttl = "5s"
[enrolment]
attempts_per_minute = 0
[log]
format = "xml"
level = "info"
"#;
        let mistakes = parse(text).expect_err("many").join("\n");
        for expected in [
            "line 1: state_dir",
            "line 2: names",
            "line 3: colour: unknown setting",
            "line 5: listen.agents",
            "line 8: rest.plain_http",
            "line 10: rate_card.currency",
            "line 11: rate_card.storage_gb_month",
            "line 13: session.heartbeat_interval",
            "line 14: session.flush_interval: must be a text",
            "line 15: session.certificate_ttl",
            "line 17: enrolment.attempts_per_minute",
            "line 19: log.format",
            "line 20: log.level: unknown setting",
        ] {
            assert!(mistakes.contains(expected), "`{expected}` is missing in\n{mistakes}");
        }
        assert_eq!(mistakes.lines().count(), 13, "{mistakes}");
    }

    #[test]
    fn a_file_that_is_no_toml_says_where() {
        assert!(parse("state_dir = \n").expect_err("broken")[0].contains("line 1"));
    }

    #[test]
    fn plain_http_is_for_loopback_only() {
        assert!(parse("[listen]\nrest = \"127.0.0.1:0\"\n[rest]\nplain_http = true\n").is_ok());
        assert!(parse("[rest]\nplain_http = true\n").is_err());
    }

    #[test]
    fn a_missing_file_is_an_error_only_when_it_was_named() {
        assert!(matches!(load(Some(Path::new("/nonexistent/receiver.toml"))), Err(Error::Missing(_))));
    }

    #[test]
    fn the_commented_default_file_is_up_to_date_and_means_the_defaults() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/receiver.toml");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            files::write_atomically(&path, example().as_bytes(), 0o644).expect("written");
        }
        let kept = files::read_text(&path).expect("readable").unwrap_or_default();
        assert_eq!(kept, example(), "run the tests with UPDATE_GOLDEN=1");
        let parsed: Settings = toml::from_str(&kept).expect("it parses");
        assert_eq!(parsed, Settings::default());
        assert!(parse(&kept).is_ok());
    }
}
