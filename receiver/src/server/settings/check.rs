//! Checking a settings file: unknown keys, wrong types and values that break a rule, all at once.
//!
//! In: the text. Out: [`Checked`], or every mistake with its line. What is left after unknown keys and wrong
//! types were noted deserialises for certain, so that the values can be checked in the same pass.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use rust_decimal::Decimal;
use serde::Deserialize as _;
use toml::de::{DeTable, DeValue};

use super::{Checked, LogFormat, Rates, Settings};
use crate::model::cost::RateCard;
use crate::platform::span;

/// Checks the text of a settings file.
///
/// # Errors
/// All mistakes, each a sentence.
pub fn parse(text: &str) -> Result<Checked, Vec<String>> {
    let mut found = Mistakes { text, lines: BTreeMap::new(), sentences: Vec::new() };
    let table = match DeTable::parse(text) {
        Ok(table) => table.into_inner(),
        Err(error) => return Err(vec![error.to_string().trim_end().to_owned()]),
    };
    let known = toml::Table::try_from(Settings::default()).map_err(|error| vec![error.to_string()])?;
    let usable = found.filter(&table, &known, "");
    let settings = Settings::deserialize(toml::Value::Table(usable)).map_err(|error| vec![error.to_string()])?;
    let checked = found.check(&settings);
    match checked {
        Some(checked) if found.sentences.is_empty() => Ok(checked),
        _ => {
            found.sentences.sort();
            Err(found.sentences.into_iter().map(|(_, sentence)| sentence).collect())
        }
    }
}

struct Mistakes<'t> {
    text: &'t str,
    /// Line of each key that stands in the file.
    lines: BTreeMap<String, usize>,
    /// With the line, so that they can be put into the file's order.
    sentences: Vec<(usize, String)>,
}

impl Mistakes<'_> {
    fn add(&mut self, key: &str, what: impl std::fmt::Display) {
        let line = self.lines.get(key).copied().unwrap_or(0);
        let place = if line == 0 { String::new() } else { format!("line {line}: ") };
        self.sentences.push((line, format!("{place}{key}: {what}")));
    }

    /// Notes unknown keys and wrong types, and returns what is left: a table that deserialises for certain.
    fn filter(&mut self, given: &DeTable<'_>, known: &toml::Table, prefix: &str) -> toml::Table {
        let mut usable = toml::Table::new();
        for (name, value) in given {
            let key = format!("{prefix}{}", name.get_ref());
            let line = self.text[..name.span().start].lines().count().max(1);
            // `lines` does not count a line that has just begun.
            let begun = self.text[..name.span().start].ends_with('\n');
            self.lines.insert(key.clone(), if begun { line + 1 } else { line });
            match (value.get_ref(), known.get(name.get_ref().as_ref())) {
                (_, None) => {
                    let names = known.keys().cloned().collect::<Vec<_>>().join(", ");
                    self.add(&key, format_args!("unknown setting; here may stand {names}"));
                }
                (DeValue::Table(inner), Some(toml::Value::Table(section))) => {
                    let inner = self.filter(inner, section, &format!("{key}."));
                    usable.insert(name.get_ref().to_string(), toml::Value::Table(inner));
                }
                (value, Some(default)) => match plain(value, default) {
                    Some(value) => {
                        usable.insert(name.get_ref().to_string(), value);
                    }
                    None => self.add(&key, format_args!("must be a {}, such as {default}", kind(default))),
                },
            }
        }
        usable
    }

    fn or_mistake<T, E: std::fmt::Display>(&mut self, key: &str, value: Result<T, E>) -> Option<T> {
        value.map_err(|error| self.add(key, error)).ok()
    }

    fn span(&mut self, key: &str, text: &str, min: Duration, max: Duration) -> Option<Duration> {
        let value = self.or_mistake(key, span::parse(text))?;
        if (min..=max).contains(&value) {
            return Some(value);
        }
        self.add(key, format_args!("must be from {} s to {} s", min.as_secs(), max.as_secs()));
        None
    }

    fn address(&mut self, key: &str, text: &str) -> Option<SocketAddr> {
        let parsed = text.parse().map_err(|_| format!("`{text}` is not an address and port, such as 0.0.0.0:7443"));
        self.or_mistake(key, parsed)
    }

    /// Checks every value, also after the first mistake.
    fn check(&mut self, settings: &Settings) -> Option<Checked> {
        const HOUR: Duration = Duration::from_secs(3600);
        const SECOND: Duration = Duration::from_secs(1);
        let session = &settings.session;
        let state_dir = PathBuf::from(&settings.state_dir);
        if !state_dir.is_absolute() {
            self.add("state_dir", "must be an absolute path");
        }
        self.check_names(settings);
        let agents = self.address("listen.agents", &settings.listen.agents);
        let enrolment = self.address("listen.enrolment", &settings.listen.enrolment);
        let rest = self.address("listen.rest", &settings.listen.rest);
        if settings.rest.plain_http && rest.is_some_and(|address| !address.ip().is_loopback()) {
            self.add(
                "rest.plain_http",
                "plain HTTP is allowed only with a loopback address in listen.rest, such as 127.0.0.1:8443",
            );
        }
        let card = self.card(&settings.rate_card);
        let heartbeat_interval = self.span("session.heartbeat_interval", &session.heartbeat_interval, SECOND, HOUR);
        let flush_interval = self.span("session.flush_interval", &session.flush_interval, SECOND, HOUR);
        let year = HOUR * 24 * 397;
        let certificate_life = self.span("session.certificate_ttl", &session.certificate_ttl, SECOND * 60, year);
        let attempts = NonZeroU32::new(settings.enrolment.attempts_per_minute);
        let attempts_per_minute = self.or_mistake("enrolment.attempts_per_minute", attempts.ok_or("must be above 0"));
        let log_format = match settings.log.format.as_str() {
            "text" => Ok(LogFormat::Text),
            "json" => Ok(LogFormat::Json),
            other => Err(format!("`{other}` is neither text nor json")),
        };
        let log_format = self.or_mistake("log.format", log_format);
        self.or_mistake("log.filter", settings.log.filter.parse::<tracing_subscriber::filter::Targets>());
        Some(Checked {
            state_dir,
            trust_domain: settings.trust_domain.clone(),
            names: settings.names.clone(),
            agents: agents?,
            enrolment: enrolment?,
            rest: rest?,
            plain_http: settings.rest.plain_http,
            card: card?,
            heartbeat_interval: heartbeat_interval?,
            flush_interval: flush_interval?,
            certificate_life: certificate_life?,
            attempts_per_minute: attempts_per_minute?,
            log_format: log_format?,
            log_filter: settings.log.filter.clone(),
        })
    }

    fn check_names(&mut self, settings: &Settings) {
        if !is_dns_name(&settings.trust_domain) {
            self.add("trust_domain", "must be lower-case letters, digits, dots and hyphens, such as hestner.internal");
        }
        if settings.names.is_empty() {
            self.add("names", "must name at least one DNS name or IP address");
        }
        for name in &settings.names {
            if name.parse::<IpAddr>().is_err() && !is_dns_name(&name.to_ascii_lowercase()) {
                self.add("names", format_args!("`{name}` is neither a DNS name nor an IP address"));
            }
        }
    }

    fn card(&mut self, rates: &Rates) -> Option<RateCard> {
        let currency = &rates.currency;
        if currency.len() != 3 || !currency.bytes().all(|b| b.is_ascii_uppercase()) {
            self.add("rate_card.currency", "must be three capital letters, such as EUR");
        }
        let price: Option<Decimal> = rates.storage_gb_month.parse().ok();
        // The upper bound keeps every sum far from the largest decimal.
        let price = price.filter(|price| (Decimal::ZERO..=Decimal::from(1_000_000)).contains(price));
        let price = self.or_mistake(
            "rate_card.storage_gb_month",
            price.ok_or("must be a decimal string from 0 to 1000000, such as \"0.0500\""),
        )?;
        Some(RateCard { currency: currency.clone(), storage_gb_month: price })
    }
}

/// The value, if it is of the default's kind.
fn plain(value: &DeValue<'_>, default: &toml::Value) -> Option<toml::Value> {
    match (value, default) {
        (DeValue::String(text), toml::Value::String(_)) => Some(toml::Value::String(text.to_string())),
        (DeValue::Boolean(flag), toml::Value::Boolean(_)) => Some(toml::Value::Boolean(*flag)),
        (DeValue::Integer(number), toml::Value::Integer(_)) => {
            let number = i64::from_str_radix(number.as_str(), number.radix()).ok()?;
            // All our numbers are unsigned 32-bit ones.
            u32::try_from(number).ok().map(|number| toml::Value::Integer(number.into()))
        }
        (DeValue::Array(items), toml::Value::Array(defaults)) => {
            let example = defaults.first()?;
            let items = items.iter().map(|item| plain(item.get_ref(), example));
            items.collect::<Option<Vec<_>>>().map(toml::Value::Array)
        }
        _ => None,
    }
}

fn kind(default: &toml::Value) -> &'static str {
    match default {
        toml::Value::String(_) => "text in quotes",
        toml::Value::Integer(_) => "whole number from 0 to 4294967295",
        toml::Value::Boolean(_) => "truth value (true or false)",
        toml::Value::Array(_) => "list of texts",
        _ => "section",
    }
}

fn is_dns_name(text: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    text.len() <= 253 && text.split('.').all(label)
}
