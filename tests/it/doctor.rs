//! `hestner-agent doctor`: names what is wrong by its own code, says what to do, and changes nothing.

use std::path::Path;

use hestner_tests::mounts::Mounted;
use hestner_tests::restic::FaultyRestic;
use hestner_tests::{Agent, Cmd, Ended, Hook, Service, World, files, is_root_or_skips, processes, tree, wait_until};
use serde_json::{Value, json};

use crate::grants::Watched;

/// What `doctor --json` found.
struct Findings {
    ended: Ended,
    all: Value,
}

fn doctor(agent: &Agent) -> Findings {
    let ended = agent.cli(&["doctor", "--json"]);
    let all = serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("{e}: {ended}"));
    Findings { ended, all }
}

impl Findings {
    fn checks(&self) -> &Vec<Value> {
        self.all["checks"].as_array().expect("a list of checks")
    }

    /// The finding with that code.
    fn find(&self, code: &str) -> Option<&Value> {
        self.checks().iter().find(|check| check["code"] == code)
    }

    fn named(&self, check: &str) -> Vec<&Value> {
        self.checks().iter().filter(|found| found["check"] == check).collect()
    }

    /// Asserts that the only problem is this one, and that it says about what it is and what to do.
    fn assert_problem(&self, check: &str, code: &str, about: &str) {
        let problems: Vec<&Value> = self.checks().iter().filter(|found| found["level"] == "problem").collect();
        assert_eq!(problems.len(), 1, "one problem was made, looking for {code}: {problems:#?}");
        let found = problems[0];
        assert_eq!((&found["check"], &found["code"]), (&json!(check), &json!(code)), "{found}");
        let text = format!("{} {}", found["subject"], found["message"]);
        assert!(text.contains(about), "{about} is not named: {found}");
        assert_ne!(found["next_step"], "", "{found}");
        assert_eq!(self.ended.code, Some(1), "{}", self.ended);
        assert!(self.ended.stderr.contains("code: problems_found"), "{}", self.ended);
    }

    fn assert_warning(&self, check: &str, code: &str) {
        assert_eq!(self.ended.code, Some(0), "a warning is no problem: {}", self.ended);
        let found = self.find(code).unwrap_or_else(|| panic!("no {code} in {}", self.all));
        assert_eq!((&found["check"], &found["level"]), (&json!(check), &json!("warning")), "{found}");
        assert_ne!(found["next_step"], "", "{found}");
    }
}

#[test]
fn host_that_is_well_has_no_problem_and_nothing_is_changed() {
    let watched = Watched::new("doctor-well");
    let restic = FaultyRestic::new(&watched.world.at("bin"));
    let agent = watched.builder().restic(&restic).grant("docs", "snapshot", "allow").started();
    agent.snapshot_ok("docs");
    agent.wait_outbox_empty();
    let runs = agent.state().join("runs");
    let before = tree::manifest(&runs);
    let calls = (restic.calls().len(), watched.archiver.notes().len());
    assert!(calls.1 > 0, "whoever opens a repository leaves notes");
    let findings = doctor(&agent);
    assert_eq!((findings.ended.code, &findings.all["problems"]), (Some(0), &json!(0)), "{}", findings.ended);
    let looked_at = [
        "settings",
        "grants",
        "programs",
        "state",
        "identity",
        "receiver",
        "clock",
        "daemon",
        "separation",
        "limits",
        "left",
        "destination",
        "restic",
        "service",
    ];
    for check in looked_at {
        assert!(!findings.named(check).is_empty(), "{check} was looked at: {}", findings.all);
    }
    for check in findings.checks() {
        assert_eq!(check["code"] == "ok", check["level"] == "ok", "{check}");
        assert_ne!(check["message"], "", "{check}");
    }
    findings.assert_warning("separation", "separation_off");
    let service = findings.named("service")[0].to_string();
    assert!(service.contains("consistency `"), "{service}");
    assert!(findings.named("receiver")[0]["message"].to_string().contains("session is open"), "{}", findings.all);
    assert_eq!(tree::manifest(&runs), before, "it only looks");
    let later = restic.calls();
    assert!(later[calls.0..].iter().all(|call| call.starts_with("version ")), "no repository is opened: {later:?}");
    let later = watched.archiver.notes();
    assert_eq!(later.len(), calls.1, "no repository is opened: {later:?}");

    let text = agent.cli(&["doctor"]).ok();
    assert!(text.contains("ok       daemon") && text.contains("warning  separation"), "{text}");
    assert!(
        text.contains("next: ") && text.contains("code: separation_off") && text.contains("problems: 0, "),
        "{text}"
    );
}

#[test]
fn doctor_works_without_daemon_receiver_or_identity() {
    let mut world = World::new("doctor-alone");
    let source = world.source("source");
    let mut agent = world.agent().allowed(Service::files("docs", [source])).written();
    let findings = doctor(&agent);
    let codes = ["not_enrolled", "daemon_unreachable"];
    for code in codes {
        assert!(findings.find(code).is_some_and(|found| found["level"] == "problem"), "{code}: {}", findings.all);
    }
    assert_eq!(findings.named("service")[0]["level"], "ok", "what can be looked at is: {}", findings.all);

    agent.enrol_again();
    doctor(&agent).assert_problem("daemon", "daemon_unreachable", "control.sock");
    agent.start();
    world.receiver.stop();
    wait_until("the session to end", std::time::Duration::from_secs(20), || agent.status()["connected"] == false);
    doctor(&agent).assert_warning("receiver", "receiver_unreachable");
}

#[test]
fn settings_that_cannot_be_used_are_the_finding() {
    let watched = Watched::new("doctor-settings");
    let agent = watched.builder().grant("docs", "snapshot", "allow").enrolled();
    let good = std::fs::read_to_string(&agent.config).expect("settings");
    files::write(&agent.config, format!("no_such_key = 1\n{good}"));
    doctor(&agent).assert_problem("settings", "settings_invalid", "no_such_key");
    files::write(&agent.config, good);
    files::set_mode(&agent.config, 0o666);
    doctor(&agent).assert_problem("settings", "unsafe_permissions", agent.config.to_str().expect("UTF-8"));
}

#[test]
fn each_thing_that_is_wrong_is_named_by_its_code() {
    let watched = Watched::new("doctor-wrong");
    let hook = watched.world.at("hooks/note");
    let restic = FaultyRestic::new(&watched.world.at("bin"));
    let agent = watched.builder().restic(&restic).grant("docs", "snapshot", "allow").started();
    agent.snapshot_ok("docs");
    let mode = |path: &Path, open: u32, closed: u32, check: &str, code: &str| {
        files::set_mode(path, open);
        doctor(&agent).assert_problem(check, code, path.to_str().expect("UTF-8"));
        files::set_mode(path, closed);
    };
    mode(&agent.grants_file(), 0o646, 0o644, "grants", "unsafe_permissions");
    mode(&hook, 0o757, 0o755, "programs", "unsafe_permissions");
    mode(hook.parent().expect("a folder"), 0o777, 0o755, "programs", "unsafe_permissions");
    mode(&agent.state().join("keys"), 0o755, 0o700, "state", "unsafe_permissions");

    let moved = |path: &Path, check: &str, code: &str, about: &str| {
        let away = path.with_extension("away");
        Cmd::new("mv").arg(path).arg(&away).ok();
        doctor(&agent).assert_problem(check, code, about);
        Cmd::new("mv").arg(&away).arg(path).ok();
    };
    moved(&watched.world.at("source"), "service", "source_missing", "docs");
    moved(&agent.folder().join("repository"), "destination", "destination_missing", "local");

    let grants = std::fs::read_to_string(agent.grants_file()).expect("grants");
    files::write(agent.grants_file(), "[services.docs]\nsnapshot = \"yes\"\n");
    doctor(&agent).assert_problem("grants", "settings_invalid", "yes");
    files::write(agent.grants_file(), "[services.dosc]\nsnapshot = \"allow\"\n");
    let findings = doctor(&agent);
    findings.assert_warning("grants", "grants_for_nothing");
    findings.assert_warning("grants", "snapshot_denied");
    files::write(agent.grants_file(), grants);

    restic.on("version", "echo 'restic 0.9.6 compiled with go1.12'; exit 0");
    doctor(&agent).assert_warning("restic", "restic_unusable");
    restic.on("version", "exit 1");
    doctor(&agent).assert_warning("restic", "restic_unusable");
    restic.heal("version");
    assert_eq!(doctor(&agent).all["problems"], 0, "everything is as it was");
}

#[test]
fn program_that_is_missing_is_named_with_the_services_that_use_it() {
    let world = World::new("doctor-programs");
    let gone = world.at("hooks/gone");
    let hook = Hook::new("db").pre(&[gone.to_str().expect("UTF-8")]);
    let agent = world.agent().allowed(Service::files("docs", [world.source("source")]).hook(hook)).started();
    let findings = doctor(&agent);
    let found = findings.find("program_missing").unwrap_or_else(|| panic!("{}", findings.all));
    assert_eq!((&found["check"], &found["subject"]), (&json!("programs"), &json!(gone)), "{found}");
    assert!(found["message"].to_string().contains("used by docs"), "{found}");
    assert_eq!(findings.ended.code, Some(1), "{}", findings.ended);
}

#[test]
fn consistency_that_cannot_be_had_here_is_a_problem_with_its_reason() {
    let world = World::new("doctor-consistency");
    let builder = world.agent();
    let builder = builder.allowed(Service::files("plain", [world.source("plain")]));
    let agent = builder.allowed(Service::files("strict", [world.source("strict")]).consistency("filesystem")).started();
    let findings = doctor(&agent);
    findings.assert_problem("service", "point_failed", "strict");
    let strict = findings.find("point_failed").expect("found").to_string();
    assert!(strict.contains("`filesystem`") && strict.contains("`none`"), "{strict}");
    let plain = findings.named("service").into_iter().find(|found| found["subject"] == "plain").expect("plain");
    assert_eq!(plain["level"], "ok", "it asks for nothing more: {plain}");
}

#[test]
fn inventory_tells_the_consistency_that_each_service_reaches() {
    let world = World::new("doctor-inventory");
    let dump = Service::command("dump", &["/bin/echo", "data"], "dump.sql");
    let agent = world.agent().allowed(Service::files("plain", [world.source("plain")])).allowed(dump).started();
    let path = format!("/v1/servers/{}/services", agent.server_id);
    wait_until("the inventory to say what is reached", std::time::Duration::from_secs(30), || {
        let services = hestner_tests::receiver::rows(&world.receiver.get_json(&path));
        let reaches = |name: &str, word: &str| services.iter().any(|s| s["name"] == name && s["consistency"] == word);
        reaches("plain", "none") && reaches("dump", "application")
    });
}

#[test]
fn what_a_dead_run_left_is_named_until_it_is_settled() {
    let world = World::new("doctor-left");
    let mark = world.at("in-hook");
    let script = format!("[ \"$1\" = pre ] || exit 0; touch {}; exec sleep 600", mark.display());
    let hook = files::write_script(world.at("hooks/hang"), &script);
    let hook = hook.to_str().expect("UTF-8");
    let service = Service::files("docs", [world.source("source")])
        .hook(Hook::new("db").pre(&[hook, "pre"]).post(&[hook, "post"]));
    let mut agent = world.agent().allowed(service).started();
    agent.cli(&["snapshot", "docs", "--detach"]).ok();
    wait_until("the hook to hang", std::time::Duration::from_secs(30), || mark.exists());
    let uid = agent.last_run().uid().to_owned();
    let findings = doctor(&agent);
    let found = findings.named("left");
    assert_eq!((&found[0]["subject"], &found[0]["level"]), (&json!(uid), &json!("ok")), "it goes on: {found:?}");

    let parts: Vec<i32> = processes::descendants(agent.pid()).iter().map(|process| process.pid).collect();
    agent.kill9();
    parts.iter().for_each(|pid| processes::kill(*pid));
    wait_until("every process of the run to be gone", std::time::Duration::from_secs(30), || {
        doctor(&agent).find("left_held").is_some()
    });
    let findings = doctor(&agent);
    let found = findings.find("left_held").expect("found");
    assert_eq!((&found["subject"], &found["level"]), (&json!(uid), &json!("problem")), "{found}");
    assert!(found["message"].to_string().contains("docs"), "{found}");
    assert!(found["next_step"].to_string().contains("hestner-agent thaw"), "{found}");
    agent.cli(&["thaw"]).ok();
    let findings = doctor(&agent);
    assert!(findings.find("left_held").is_none(), "it is released: {}", findings.all);
    assert!(findings.find("left_unsettled").is_some_and(|found| found["level"] == "warning"), "{}", findings.all);
    agent.start();
    wait_until("the run to be settled", std::time::Duration::from_secs(60), || {
        doctor(&agent).find("left_unsettled").is_none()
    });
}

#[test]
fn destination_that_has_no_room_is_a_problem() {
    if !is_root_or_skips("destination_that_has_no_room_is_a_problem") {
        return;
    }
    let world = World::new("doctor-full");
    let disk = Mounted::ext4(&world.at("disk"), 64);
    let builder = world.agent().destination("local", &disk.path().join("repository"));
    let agent = builder.allowed(Service::files("docs", [world.source("source")])).started();
    doctor(&agent).assert_warning("destination", "destination_nearly_full");
    let _ = Cmd::new("dd")
        .args(["if=/dev/zero", "bs=1M", "count=128", &format!("of={}", disk.path().join("fill").display())])
        .run();
    doctor(&agent).assert_problem("destination", "destination_full", "local");
}

#[test]
fn runs_that_wait_to_be_confirmed_are_a_warning() {
    let watched = Watched::new("doctor-waiting");
    let agent = watched.builder().grant("docs", "snapshot", "confirm").started();
    agent.cli(&["snapshot", "docs", "--detach"]).ok();
    doctor(&agent).assert_warning("confirmations", "runs_waiting");
}

/// A service of files with lines of its own under [service.point].
fn with_point(world: &World, name: &str, lines: &[&str]) -> Service {
    Service::files(name, [world.source(name)]).source_line(&format!("[service.point]\n{}", lines.join("\n")))
}

#[test]
fn point_that_cannot_be_had_here_is_a_problem_that_says_why() {
    let world = World::new("doctor-points");
    let command = [
        "kind = \"fsfreeze\"",
        "command = [\"/bin/true\"]",
        "remove_command = [\"/bin/true\"]",
        "read_from = \"/mnt\"",
    ];
    let agent = world
        .agent()
        .setting("freeze", "lvs = \"/nonexistent/lvs\"")
        .allowed(with_point(&world, "frozen", &command))
        .allowed(with_point(&world, "held", &["containers = [\"db\"]", "hold = \"stop\""]))
        .allowed(with_point(&world, "volume", &["kind = \"lvm\""]))
        .allowed(Service::files("plain", [world.source("plain")]))
        .started();
    let findings = doctor(&agent);
    let of = |subject: &str| {
        let found = findings.checks().iter().find(|found| found["subject"] == subject);
        found.unwrap_or_else(|| panic!("nothing about {subject}: {}", findings.all)).clone()
    };
    // Its filesystem holds our own state and more: whatever is named first, it is named.
    let frozen = of("frozen");
    assert_eq!((&frozen["check"], &frozen["level"]), (&json!("service"), &json!("problem")), "{frozen}");
    let message = frozen["message"].to_string();
    assert!(message.contains("cannot be frozen") || message.contains("must never be frozen"), "{frozen}");
    let held = of("held");
    assert_eq!(held["level"], "problem", "{held}");
    assert!(held["message"].to_string().contains("/nonexistent"), "Docker's socket is named: {held}");
    let lvs = of("/nonexistent/lvs");
    assert_eq!((&lvs["code"], &lvs["check"]), (&json!("program_missing"), &json!("programs")), "{lvs}");
    assert!(lvs["message"].to_string().contains("volume"), "{lvs}");
    let plain = of("plain");
    assert_eq!(plain["level"], "ok", "{plain}");
    assert!(plain["message"].to_string().contains("has no snapshots of its own"), "why not better: {plain}");
    assert_eq!(findings.ended.code, Some(1), "{}", findings.ended);
}
