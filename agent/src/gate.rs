//! Whether the host lets something happen: grants and floors, and nothing else.
//!
//! Pure: it reads no file and no clock. The daemon asks it about policies as they arrive, the runner about
//! every run, each with what it has read itself. What is not allowed in so many words is refused; what has
//! to be confirmed is refused without a [`Confirmation`] of that very run.

use hestner_proto::words::{ErrorClass, GrantValue, Priority, Verb};
use serde::{Deserialize, Serialize};

use crate::policy::{DestinationSettings, Floor, Grants, Policy};

/// A refusal, as it is written down at both ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Stable code.
    pub class: ErrorClass,
    /// What was refused and by which rule.
    pub message: String,
}

fn refuse<T>(class: ErrorClass, message: String) -> Result<T, Refusal> {
    Err(Refusal { class, message })
}

/// What a run still needs although it is not denied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Nothing: it may begin.
    Nothing,
    /// A person who confirms it on the host.
    Confirmation,
}

/// A person's word for one run, as root's own file holds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confirmation {
    /// The run.
    pub run_uid: String,
    /// The service that the person was shown.
    pub service: String,
    /// The verb that the person was shown.
    pub verb: String,
    /// Who confirmed, for the log.
    pub by: String,
    /// When it stops to count, in milliseconds since the epoch.
    pub expires_at_ms: i64,
}

/// Decides on one run.
///
/// # Errors
/// The refusal.
pub fn decide(grants: &Grants, service: &str, verb: Verb) -> Result<Needs, Refusal> {
    match grants.get(service, verb) {
        GrantValue::Allow => Ok(Needs::Nothing),
        GrantValue::Confirm => Ok(Needs::Confirmation),
        GrantValue::Deny => {
            refuse(ErrorClass::Refused, format!("the host's grants deny `{verb}` for service `{service}`"))
        }
    }
}

/// Decides whether a confirmation lets a run begin: it must be there, be for this run, service and verb,
/// and still count.
///
/// # Errors
/// The refusal.
pub fn check_confirmation(
    confirmation: Option<&Confirmation>,
    run: (&str, &str, Verb),
    now_ms: i64,
) -> Result<(), Refusal> {
    let (run_uid, service, verb) = run;
    let Some(confirmation) = confirmation else {
        let message = format!("a person has to confirm `{verb}` for service `{service}` on the host, and nobody has");
        return refuse(ErrorClass::NotConfirmed, message);
    };
    let Confirmation { run_uid: of_run, service: of_service, verb: of_verb, by, expires_at_ms } = confirmation;
    if of_run != run_uid || of_service != service || of_verb != verb.as_str() {
        let message = format!(
            "`{by}` confirmed `{of_verb}` for service `{of_service}`, and run {run_uid} is `{verb}` for service `{service}`"
        );
        return refuse(ErrorClass::NotConfirmed, message);
    }
    if *expires_at_ms <= now_ms {
        let message = format!("the confirmation of `{verb}` for service `{service}` by `{by}` had expired");
        return refuse(ErrorClass::NotConfirmed, message);
    }
    Ok(())
}

/// Decides on a policy of the centre.
///
/// # Errors
/// The refusal.
pub fn check_policy(policy: &Policy, destinations: &[DestinationSettings], floor: &Floor) -> Result<(), Refusal> {
    let Policy { service, destination, retention_days: days, retention_count: count, .. } = policy;
    if !destinations.iter().any(|d| d.name == *destination) {
        return refuse(ErrorClass::UnknownDestination, format!("the host defines no destination `{destination}`"));
    }
    if !policy.encryption_enabled && !floor.allow_unencrypted {
        let message = format!("the policy of `{service}` switches encryption off and the host does not allow that");
        return refuse(ErrorClass::EncryptionRequired, message);
    }
    let keeps_all = *days == 0 && *count == 0;
    // Retention never removes the newest good artifact, so that a count of 0 keeps one as well.
    if !keeps_all && (*days < floor.retention_days || (*count).max(1) < floor.retention_count) {
        let message = format!(
            "the policy of `{service}` keeps {days} days and {count} artifacts; the host's floor is {} days and {} artifacts",
            floor.retention_days, floor.retention_count
        );
        return refuse(ErrorClass::RetentionBelowFloor, message);
    }
    check_wishes(policy, floor)
}

/// What a policy asks a backup to cost. Priority needs no floor: whatever is asked for can only lower it.
fn check_wishes(policy: &Policy, floor: &Floor) -> Result<(), Refusal> {
    let Policy { service, wishes, .. } = policy;
    if let Some(level) = wishes.compression_level
        && !(1..=floor.compression_level_max).contains(&level)
    {
        let message = format!(
            "the policy of `{service}` asks for compression level {level}; the host allows 1 to {}",
            floor.compression_level_max
        );
        return refuse(ErrorClass::EffortRefused, message);
    }
    if let Some(Err(error)) = wishes.priority.as_deref().map(str::parse::<Priority>) {
        return refuse(ErrorClass::EffortRefused, format!("the policy of `{service}`: {error}"));
    }
    Ok(())
}

/// Reads the text of a grants file: `[services.NAME]` with lines `verb = "value"`.
///
/// # Errors
/// A sentence that names the mistake. A file with a mistake grants nothing.
pub fn parse_grants(text: &str) -> Result<Grants, String> {
    type File = std::collections::BTreeMap<
        String,
        std::collections::BTreeMap<String, std::collections::BTreeMap<String, GrantValue>>,
    >;
    let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
    let mut grants = Grants::default();
    for (section, services) in file {
        if section != "services" {
            return Err(format!("unknown section `{section}`; grants stand under [services.NAME]"));
        }
        for (service, verbs) in services {
            for (verb, value) in verbs {
                let verb = verb.parse::<Verb>().map_err(|error| format!("service `{service}`: {error}"))?;
                grants.set(&service, verb, value);
            }
        }
    }
    Ok(grants)
}

/// The text of a grants file.
pub fn render_grants(grants: &Grants) -> String {
    let mut text = String::from(
        "# What the centre may ask of this host. Written by `hestner-agent grants`; `deny` where nothing stands.\n",
    );
    let mut last = None;
    for (service, verb, value) in grants.iter() {
        if last != Some(service) {
            text.push_str(&format!("\n[services.\"{service}\"]\n"));
            last = Some(service);
        }
        text.push_str(&format!("{verb} = \"{value}\"\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Wishes;

    fn policy() -> Policy {
        Policy {
            policy_id: 1,
            service: "docs".into(),
            cron: "0 3 * * *".into(),
            time_zone: "UTC".into(),
            retention_days: 7,
            retention_count: 3,
            destination: "local".into(),
            encryption_enabled: true,
            misfire: "skip".into(),
            wishes: Wishes::default(),
        }
    }

    fn wishing(compression_level: Option<i32>, priority: Option<&str>) -> Policy {
        let wishes = Wishes { compression_level, priority: priority.map(str::to_owned), ..Wishes::default() };
        Policy { wishes, ..policy() }
    }

    fn destinations() -> Vec<DestinationSettings> {
        vec![DestinationSettings { name: "local".into(), path: "/srv".into(), ..DestinationSettings::default() }]
    }

    #[test]
    fn nothing_is_allowed_that_is_not_written() {
        let grants = parse_grants("[services.docs]\nverify = \"allow\"\nprune = \"confirm\"").unwrap();
        for verb in Verb::ALL {
            let expected = match verb {
                Verb::Verify => Some(Needs::Nothing),
                Verb::Prune => Some(Needs::Confirmation),
                _ => None,
            };
            assert_eq!(decide(&grants, "docs", *verb).ok(), expected, "{verb}");
            assert!(decide(&grants, "other", *verb).is_err());
        }
    }

    #[test]
    fn confirmation_counts_for_its_own_run_service_verb_and_time_only() {
        let good = Confirmation {
            run_uid: "a".into(),
            service: "docs".into(),
            verb: "snapshot".into(),
            by: "root".into(),
            expires_at_ms: 1_000,
        };
        let check = |confirmation: &Confirmation, now| {
            check_confirmation(Some(confirmation), ("a", "docs", Verb::Snapshot), now).map_err(|r| r.class)
        };
        assert_eq!(check(&good, 999), Ok(()));
        let wrong = [
            Confirmation { run_uid: "b".into(), ..good.clone() },
            Confirmation { service: "other".into(), ..good.clone() },
            Confirmation { verb: "restore".into(), ..good.clone() },
        ];
        for confirmation in wrong {
            assert_eq!(check(&confirmation, 999), Err(ErrorClass::NotConfirmed), "{confirmation:?}");
        }
        assert_eq!(check(&good, 1_000), Err(ErrorClass::NotConfirmed), "it has expired");
        let none = check_confirmation(None, ("a", "docs", Verb::Snapshot), 0);
        assert_eq!(none.unwrap_err().class, ErrorClass::NotConfirmed);
    }

    #[test]
    fn grants_file_with_any_mistake_is_refused_whole() {
        for text in [
            "[services.docs]\nformat = \"allow\"",
            "[services.docs]\nsnapshot = \"yes\"",
            "[service.docs]\nsnapshot = \"allow\"",
            "x",
        ] {
            assert!(parse_grants(text).is_err(), "{text}");
        }
    }

    #[test]
    fn grants_survive_their_own_text() {
        let mut grants = Grants::default();
        grants.set("docs.v1", Verb::Snapshot, GrantValue::Allow);
        grants.set("docs.v1", Verb::Prune, GrantValue::Deny);
        grants.set("host", Verb::Image, GrantValue::Confirm);
        assert_eq!(parse_grants(&render_grants(&grants)).unwrap(), grants);
    }

    #[test]
    fn policy_within_the_floor_passes() {
        let floor = Floor { retention_days: 7, retention_count: 3, ..Floor::default() };
        assert_eq!(check_policy(&policy(), &destinations(), &floor), Ok(()));
        for wishes in [wishing(Some(9), Some("idle")), wishing(Some(1), Some("normal")), wishing(None, Some("low"))] {
            assert_eq!(check_policy(&wishes, &destinations(), &floor), Ok(()), "{wishes:?}");
        }
        let keeps_all = Policy { retention_days: 0, retention_count: 0, ..policy() };
        assert_eq!(check_policy(&keeps_all, &destinations(), &floor), Ok(()));
    }

    #[test]
    fn each_rule_refuses_with_its_own_code() {
        let floor = Floor { retention_days: 7, retention_count: 3, ..Floor::default() };
        let cases = [
            (Policy { destination: "elsewhere".into(), ..policy() }, ErrorClass::UnknownDestination),
            (Policy { encryption_enabled: false, ..policy() }, ErrorClass::EncryptionRequired),
            (Policy { retention_days: 6, ..policy() }, ErrorClass::RetentionBelowFloor),
            (Policy { retention_count: 2, ..policy() }, ErrorClass::RetentionBelowFloor),
            (Policy { retention_days: 0, ..policy() }, ErrorClass::RetentionBelowFloor),
            (wishing(Some(10), None), ErrorClass::EffortRefused),
            (wishing(Some(0), None), ErrorClass::EffortRefused),
            (wishing(None, Some("realtime")), ErrorClass::EffortRefused),
        ];
        for (policy, class) in cases {
            assert_eq!(check_policy(&policy, &destinations(), &floor).unwrap_err().class, class);
        }
    }
}
