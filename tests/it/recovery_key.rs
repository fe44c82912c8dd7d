//! Who may open a host's repositories is decided on the host: a receiver that names another recovery key is refused and
//! said so, and a change counts when root has typed the new fingerprint.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hestner_tests::elsewhere::{self, Elsewhere};
use hestner_tests::world::fingerprint;
use hestner_tests::{Agent, Cmd, Ended, Service, World, files, wait_until};

/// Another recovery key: the secret half, the file with the public one, and its fingerprint.
struct Key {
    secret: PathBuf,
    public: PathBuf,
    fingerprint: String,
}

impl Key {
    fn new(world: &World, name: &str) -> Self {
        let (secret, public) = (world.at(&format!("{name}.secret")), world.at(&format!("{name}.pub")));
        Cmd::new("age-keygen").arg("-o").arg(&secret).ok();
        let recipient = Cmd::new("age-keygen").arg("-y").arg(&secret).ok();
        files::write(&public, &recipient);
        Self { secret, public, fingerprint: fingerprint(&recipient) }
    }

    fn recipient(&self) -> String {
        std::fs::read_to_string(&self.public).expect("a key").trim().to_owned()
    }
}

/// Writes into the receiver's store what its operator should not.
fn tampered(world: &World, statement: &str, values: &[&str]) {
    let db = rusqlite::Connection::open(world.receiver.state().join("receiver.db")).expect("the store");
    db.busy_timeout(Duration::from_secs(10)).expect("a busy timeout");
    let changed = db.execute(statement, rusqlite::params_from_iter(values)).expect("a statement");
    assert_eq!(changed, 1, "{statement}");
}

fn wrapped(agent: &Agent) -> PathBuf {
    agent.repository("local").path.join("hestner-key.age")
}

/// Who can open the wrapped key beside the repository now.
fn opens(secret: &Path, agent: &Agent) -> bool {
    elsewhere::unwrapped(secret, &wrapped(agent)).code == Some(0)
}

fn doctor(agent: &Agent) -> serde_json::Value {
    let checks = agent.cli(&["doctor", "--json"]).any_json();
    let found = checks.as_array().or_else(|| checks["checks"].as_array()).expect("checks").clone();
    found.into_iter().find(|check| check["check"] == "recovery_key").unwrap_or_else(|| panic!("no check in {checks}"))
}

fn assert_code(ended: &Ended, code: &str) {
    assert!(ended.code == Some(64) && ended.stderr.contains(&format!("code: {code}")), "{ended}");
}

#[test]
fn receiver_that_names_another_recovery_key_in_a_session_is_refused_and_said_so() {
    let mut world = World::new("recovery-session");
    let agent = world.agent().allowed(Service::files("docs", [world.source("docs")])).started();
    agent.snapshot_ok("docs");
    let typed = world.company.fingerprint.clone();
    let status = agent.status();
    assert_eq!(status["recovery_fingerprint"], typed.as_str(), "{status}");
    assert_eq!(status["recovery_fingerprint_named"], typed.as_str(), "{status}");
    assert_eq!((doctor(&agent)["code"].as_str(), &status["problems"]), (Some("ok"), &serde_json::json!([])));

    let theirs = Key::new(&world, "theirs");
    let statement = "UPDATE companies SET recovery_recipient = ?1, recovery_fingerprint = ?2";
    tampered(&world, statement, &[&theirs.recipient(), &theirs.fingerprint]);
    world.receiver.stop();
    world.receiver.start();
    wait_until("the host to hear it", Duration::from_secs(30), || {
        agent.status()["recovery_fingerprint_named"] == theirs.fingerprint.as_str()
    });
    let status = agent.status();
    assert_eq!(status["connected"], true, "it goes on telling what happens: {status}");
    let problems = status["problems"].to_string();
    assert!(problems.contains("recovery_key_refused") && problems.contains(&theirs.fingerprint), "{status}");
    let check = doctor(&agent);
    assert_eq!((check["level"].as_str(), check["code"].as_str()), (Some("problem"), Some("recovery_key_refused")));
    let message = check["message"].to_string();
    assert!(message.contains(&theirs.fingerprint) && message.contains(&typed), "{check}");
    let log = files::lines(&agent.log).join("\n");
    assert!(log.contains("recovery_key_refused") && log.contains(&theirs.fingerprint), "{log}");

    agent.snapshot_ok("docs");
    assert!(opens(&world.company.recovery_secret, &agent), "the company's key opens it");
    assert!(!opens(&theirs.secret, &agent), "and theirs does not");
    let shown = agent.cli(&["recovery-key", "show"]).ok();
    assert!(shown.contains(&typed), "{shown}");
}

#[test]
fn renewed_certificate_brings_no_other_recovery_key_with_it() {
    let world = World::with_session("recovery-renewal", "heartbeat_interval = \"1s\"\ncertificate_ttl = \"150s\"\n");
    let agent = world.agent().allowed(Service::files("docs", [world.source("docs")])).started();
    agent.snapshot_ok("docs");
    let theirs = Key::new(&world, "theirs");
    let statement = "UPDATE companies SET recovery_recipient = ?1, recovery_fingerprint = ?2";
    tampered(&world, statement, &[&theirs.recipient(), &theirs.fingerprint]);
    // Due at half of its validity; looked at once a minute.
    wait_until("the certificate to be renewed", Duration::from_secs(150), || {
        files::lines(&agent.log).iter().any(|line| line.contains("certificate_in_force"))
    });
    wait_until("the host to say so", Duration::from_secs(30), || {
        agent.status()["recovery_fingerprint_named"] == theirs.fingerprint.as_str()
    });
    agent.snapshot_ok("docs");
    assert!(opens(&world.company.recovery_secret, &agent) && !opens(&theirs.secret, &agent));
}

#[test]
fn host_that_enrols_anew_with_the_old_fingerprint_takes_no_other_key() {
    let world = World::new("recovery-enrol");
    let mut agent = world.agent().allowed(Service::files("docs", [world.source("docs")])).started();
    agent.snapshot_ok("docs");
    agent.stop();
    let server = agent.server_id.to_string();
    let identity = agent.state().join("daemon/identity");
    Cmd::new("mv").arg(&identity).arg(world.at("identity.old")).ok();
    let before = std::fs::read(agent.state().join("server.json")).expect("server.json");
    let theirs = Key::new(&world, "theirs");
    // One that lies about the key only where nobody compares: the fingerprint is the old one, the key is not.
    tampered(&world, "UPDATE companies SET recovery_recipient = ?1", &[&theirs.recipient()]);
    let token = world.receiver.token(world.company.id, &["--server", &server]);
    let refused = agent.enrol_with(&token, &world.company.fingerprint, &[]);
    assert_code(&refused, "recovery_key_mismatch");
    assert!(refused.stderr.contains(&theirs.fingerprint) && !agent.is_enrolled(), "{refused}");
    // One that has really changed it refuses the old fingerprint before it takes the token.
    let old = Key { public: world.at("acme-recovery.pub"), ..Key::new(&world, "unused") };
    tampered(&world, "UPDATE companies SET recovery_recipient = ?1", &[&old.recipient()]);
    let id = world.company.id.to_string();
    let public = theirs.public.display().to_string();
    world.receiver.cli(&["company", "set-recovery-key", &id, "--recovery-key", &public]).ok();
    let token = world.receiver.token(world.company.id, &["--server", &server]);
    let refused = agent.enrol_with(&token, &world.company.fingerprint, &[]);
    assert_code(&refused, "recovery_key_mismatch");
    assert!(!agent.is_enrolled());
    assert_eq!(std::fs::read(agent.state().join("server.json")).expect("server.json"), before, "runs believe the old");
    assert!(opens(&world.company.recovery_secret, &agent) && !opens(&theirs.secret, &agent));

    // The new fingerprint, typed by root, counts; the next run wraps for it.
    agent.enrol_with(&token, &theirs.fingerprint, &[]).ok();
    agent.start();
    agent.snapshot_ok("docs");
    assert!(opens(&theirs.secret, &agent) && !opens(&world.company.recovery_secret, &agent));
    assert_eq!(doctor(&agent)["code"], "ok");
}

#[test]
fn change_that_root_types_is_wrapped_for_laid_beside_and_told() {
    let world = World::new("recovery-change");
    let mut agent = world.agent().allowed(Service::files("docs", [world.source("docs")])).started();
    let first = agent.snapshot_ok("docs");
    agent.wait_outbox_empty();
    let old_wrapped = world.at("old.age");
    std::fs::copy(wrapped(&agent), &old_wrapped).expect("a copy");
    agent.cli(&["keys", "--require-escrow"]).ok();
    let new = Key::new(&world, "new");
    let public = new.public.display().to_string();
    let set = |key: &str, typed: &str| {
        agent.cli(&["recovery-key", "set", "--recovery-key", key, "--recovery-fingerprint", typed])
    };
    assert_code(&set(&public, &world.company.fingerprint), "recovery_key_mismatch");
    assert_code(&set(&public, "sha256:12"), "recovery_fingerprint_malformed");
    assert_code(&set(new.secret.to_str().expect("UTF-8"), &new.fingerprint), "recovery_key_secret");
    assert_code(&set(agent.config.to_str().expect("UTF-8"), &new.fingerprint), "recovery_key_malformed");
    agent.cli(&["keys", "--require-escrow"]).ok();
    agent.snapshot_ok("docs");
    assert!(opens(&world.company.recovery_secret, &agent), "nothing was changed by what was refused");

    set(&public, &new.fingerprint).ok();
    let waiting = agent.cli(&["keys", "--require-escrow"]);
    assert!(waiting.code == Some(1) && waiting.stderr.contains("code: escrow_waiting"), "{waiting}");
    agent.snapshot_ok("docs");
    agent.wait_outbox_empty();
    agent.cli(&["keys", "--require-escrow"]).ok();
    assert!(opens(&new.secret, &agent) && !opens(&world.company.recovery_secret, &agent));
    let keys = world.receiver.get_json(&format!("/v1/servers/{}/repository-keys", agent.server_id));
    let keys = hestner_tests::receiver::rows(&keys);
    let sha256 = Cmd::new("sha256sum").arg(wrapped(&agent)).ok();
    assert_eq!((keys.len(), keys[0]["sha256"].as_str()), (1, sha256.split(' ').next()), "the receiver has the same");
    // The centre is behind until it is told as well, and the host says so: both ways, as it does with a hostile one.
    assert_eq!(doctor(&agent)["code"], "recovery_key_refused");
    let id = world.company.id.to_string();
    world.receiver.cli(&["company", "set-recovery-key", &id, "--recovery-key", &public]).ok();
    world.receiver.cli(&["audit", "verify"]).ok();
    agent.stop();
    agent.start();
    assert_eq!(doctor(&agent)["code"], "ok", "from the next session on");

    // Whoever kept an old copy and the old key opens it still: the password is the same, and the docs say so.
    let elsewhere = Elsewhere::folder(&agent.repository("local").path, &world.at("elsewhere"));
    let list = |opening: &[&str]| elsewhere.run(&["recover", "list", "--json"], opening);
    let new_key = ["--recovery-key", new.secret.to_str().expect("UTF-8")];
    assert_eq!(list(&new_key).json()["snapshots"][0]["id"], first.snapshot_id());
    let old_key = ["--recovery-key", world.company.recovery_secret.to_str().expect("UTF-8")];
    assert_code(&list(&old_key), "recovery_key_wrong");
    let with_copy = [&old_key[..], &["--wrapped-key", old_wrapped.to_str().expect("UTF-8")]].concat();
    list(&with_copy).ok();
}
