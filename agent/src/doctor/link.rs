//! Who this host is and whether it reaches its receiver, with the time of day that both need.

use chrono::{DateTime, TimeDelta, Utc};

use super::{Check, Level, Subject};
use crate::identity::{Identity, IdentityError, Keeper, Server};
use crate::platform::chain;
use crate::platform::clock::Clock;
use crate::status::Status;
use crate::tls::{self, Dialer};

/// Clocks further apart than this make schedules and log lines hard to compare.
const SKEW_MS_MAX: i64 = 60_000;

pub(super) async fn checks(subject: &Subject, status: Option<&Status>, clock: &dyn Clock) -> Vec<Check> {
    let identity = match Keeper::of(&subject.host.state_dir).load() {
        Ok(identity) => identity,
        Err(error) => return vec![unusable(&error)],
    };
    let now = clock.now();
    let mut found = vec![validity(&identity, now), receiver(subject, &identity, status).await];
    found.push(time(&identity, status, now));
    found.extend(recovery_key(subject, status));
    found
}

fn unusable(error: &IdentityError) -> Check {
    let (code, next_step) = match error {
        IdentityError::NotEnrolled => ("not_enrolled", "enrol it with `hestner-agent enroll`"),
        _ => ("identity_unusable", "bring the file back from a backup, or enrol the host anew"),
    };
    Check::ok("identity", "", chain(error)).but(Level::Problem, code, next_step)
}

fn validity(identity: &Identity, now: DateTime<Utc>) -> Check {
    let (id, until) = (&identity.id, identity.not_after.format("%Y-%m-%dT%H:%M:%SZ"));
    let message = format!("server {} of company {}, certified until {until}", id.server_id, id.company_id);
    let check = Check::ok("identity", "", message);
    // It is renewed at half of its validity at the earliest.
    let late = identity.not_after - (identity.not_after - identity.not_before) / 5;
    if identity.not_after <= now {
        return check.but(Level::Problem, "certificate_expired", "enrol the host anew with a fresh token");
    }
    if late <= now {
        let next_step = "look why it is not renewed: the daemon has to reach the receiver before it expires";
        return check.but(Level::Warning, "certificate_expires", next_step);
    }
    check
}

async fn receiver(subject: &Subject, identity: &Identity, status: Option<&Status>) -> Check {
    let address = &subject.receiver.address;
    let check = |message: String| Check::ok("receiver", address, message);
    if status.is_some_and(|status| status.connected) {
        return check("a session is open".to_owned());
    }
    let (ca, own, key) = identity.for_tls();
    let dialer = tls::mutual(ca, own, key).and_then(|config| Dialer::new(address, config));
    let dialled = match dialer {
        Ok(dialer) => dialer.connect().await.map(drop).map_err(|error| chain(&error)),
        Err(error) => Err(chain(&error)),
    };
    // Backups go on without it, so that this is no problem of theirs.
    match (dialled, status) {
        (Ok(()), Some(status)) => {
            let message = format!("it answers, and no session is open: {}", status.disconnected_because);
            let next_step = "wait a minute; then read the agent's log and the receiver's";
            check(message).but(Level::Warning, "not_connected", next_step)
        }
        (Ok(()), None) => check("it answers with a certificate of the kept CA".to_owned()),
        (Err(error), _) => {
            let next_step = "check the address, the network and the receiver; backups go on, and are told later";
            check(format!("it cannot be reached: {error}")).but(Level::Warning, "receiver_unreachable", next_step)
        }
    }
}

/// Runs wrap keys for what was typed on this host, whatever the receiver says; that it says something else has to be
/// known. What was typed stands in a file of root's.
fn recovery_key(subject: &Subject, status: Option<&Status>) -> Option<Check> {
    let typed = match Server::read(&subject.host.state_dir) {
        Ok(server) => server.recovery_fingerprint(),
        // Runs fail, and the check of rights says why.
        Err(_) => return None,
    };
    let check = |message: String| Check::ok("recovery_key", "", message);
    let named = status.map(|status| status.recovery_fingerprint_named.as_str()).unwrap_or_default();
    if named.is_empty() || named == typed {
        return Some(check(format!("repositories' keys are wrapped for {typed}, which was typed on this host")));
    }
    let next_step = "ask the company, and not by way of the receiver: if it has changed its key, type the new \
                     fingerprint with `hestner-agent recovery-key set`; if not, somebody else answers at the centre";
    let message = format!("the receiver names {named}; keys go on being wrapped for {typed}, which was typed here");
    Some(check(message).but(Level::Problem, "recovery_key_refused", next_step))
}

fn time(identity: &Identity, status: Option<&Status>, now: DateTime<Utc>) -> Check {
    let check = |message: String| Check::ok("clock", "", message);
    let next_step = "set this host's clock, and keep it right with NTP";
    if identity.not_before - TimeDelta::minutes(5) > now {
        let message = format!("it is {}, before this host was certified", now.format("%Y-%m-%dT%H:%M:%SZ"));
        return check(message).but(Level::Problem, "clock_wrong", next_step);
    }
    match status.and_then(|status| status.clock_skew_ms) {
        Some(skew) if skew.abs() > SKEW_MS_MAX => {
            check(format!("it is {} s off the receiver's", skew / 1000)).but(Level::Warning, "clock_skewed", next_step)
        }
        Some(skew) => check(format!("it is {skew} ms off the receiver's")),
        None => check("nothing speaks against it; the receiver's was not compared".to_owned()),
    }
}
