//! The daemon as a user that can do nothing, and runs as root behind a socket: what the daemon can have done,
//! what it cannot, and what it can neither read nor change of what a run believes.

use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};

use hestner_tests::booted::Hierarchy;
use hestner_tests::units::{Unit, Units};
use hestner_tests::{Agent, Cmd, Hook, Service, World, files, is_root_or_skips, wait_until};
use serde_json::{Value, json};

/// The daemon's user; no account has this number.
pub(crate) const DAEMON: u32 = 61_234;
/// Somebody else.
const STRANGER: u32 = 61_235;

pub(crate) struct Separated {
    // Dropped in this order.
    pub(crate) agent: Agent,
    units: Units,
    world: World,
}

impl Separated {
    /// An agent whose service `docs` has a hook, and whose service `more` nobody has allowed; enrolled.
    fn enrolled(name: &str) -> Option<Self> {
        if !is_root_or_skips(name) {
            return None;
        }
        let world = World::new(name);
        let config = world.at("agent").join("agent.toml");
        let units =
            [Hierarchy::V2, Hierarchy::V1].into_iter().find_map(|h| Units::start(&world.at("units"), &config, h));
        let units = units.expect("a hierarchy of control groups");
        let socket = units.runner_socket();
        // For the daemon's group in the units; this machine has no such group.
        files::set_mode(&socket, 0o666);
        let notes = world.at("notes.txt");
        let hook = files::write_script(world.at("hook"), &format!("echo \"$1\" >>{}", notes.display()));
        let hook = hook.to_str().expect("UTF-8");
        let docs = Service::files("docs", [world.source("source")])
            .hook(Hook::new("quiesce").pre(&[hook, "pre"]).post(&[hook, "post"]));
        let agent = world
            .agent()
            .daemon_as_user(DAEMON)
            .runner_socket(&socket)
            .allowed(docs)
            .service(Service::files("more", [world.source("more")]))
            .enrolled();
        Some(Self { agent, units, world })
    }

    pub(crate) fn started(name: &str) -> Option<Self> {
        let mut all = Self::enrolled(name)?;
        all.agent.start();
        Some(all)
    }

    fn daemons(&self, name: &str) -> PathBuf {
        self.agent.state().join("daemon").join(name)
    }

    pub(crate) fn notes(&self) -> Vec<String> {
        files::lines(&self.world.at("notes.txt"))
    }

    /// Says one line to the runners' socket as this user; everything that is answered.
    pub(crate) fn ask_as(&self, uid: u32, request: &Value) -> Vec<Value> {
        let talk = "use IO::Socket::UNIX; my $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or die $!; \
                    print $s \"$ARGV[1]\\n\"; $s->flush; print while <$s>;";
        let perl = Cmd::new("perl").args(["-e", talk]).arg(self.units.runner_socket()).arg(request.to_string());
        let said = perl.as_user(Some(uid)).run().stdout;
        said.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
    }

    fn begun_runs(&self) -> usize {
        let entries = std::fs::read_dir(self.agent.state().join("runs")).into_iter().flatten().flatten();
        entries.filter(|entry| !entry.file_name().to_string_lossy().starts_with('.')).count()
    }
}

/// The error class of the run that an answer ends.
pub(crate) fn class_of(answers: &[Value]) -> &str {
    let last = answers.last().unwrap_or_else(|| panic!("no answer"));
    last["finished"]["record"]["error_class"].as_str().unwrap_or_else(|| panic!("no failure in {last}"))
}

pub(crate) fn run_request(uid: &str, service: &str, verb: &str) -> Value {
    json!({"run": {"run_uid": uid, "service": service, "verb": verb}})
}

#[test]
fn daemon_without_privileges_has_its_runs_made_by_root() {
    let Some(all) = Separated::started("separation_runs") else { return };
    let run = all.agent.snapshot_ok("docs");
    assert_eq!(all.notes(), ["pre", "post"]);
    let row = all.world.receiver.wait_run_ended(all.agent.server_id, run.uid());
    assert_eq!(row["status"], "success", "{row}");

    let status = all.agent.status();
    assert_eq!(status["separated"], true, "{status}");
    assert_eq!(status["services"][0]["consistency"], "none", "a runner looked: {status}");
    assert_eq!(status["repositories"][0]["destination"], "local", "{status}");
    assert_eq!(status["problems"], json!([]), "{status}");
    let log = files::lines(&all.agent.log).join("\n");
    assert!(!log.contains("separation_off"), "{log}");
    let overview = all.world.receiver.get_json(&format!("/v1/servers/{}/overview", all.agent.server_id));
    assert_eq!(overview["server"]["separated"], true, "{overview}");

    // What a run keeps is not the daemon's to read, and what the daemon keeps is the daemon's.
    for name in ["keys", "runs", "server.json"] {
        let metadata = std::fs::metadata(all.agent.state().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!((metadata.uid(), metadata.mode() & 0o077), (0, 0), "{name}");
    }
    for name in ["agent.db", "identity/agent.pem"] {
        let metadata = std::fs::metadata(all.daemons(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!((metadata.uid(), metadata.mode() & 0o077), (DAEMON, 0), "{name}");
    }
    // Stock restore needs nothing of the daemon's: not even that it tells the truth about its runs.
    let mut all = all;
    all.agent.stop();
    std::fs::remove_dir_all(all.agent.state().join("daemon")).expect("the daemon's folder");
    all.agent.restore(run.uid(), &all.world.at("restored")).ok();
}

#[test]
fn stranger_hears_nothing_and_the_daemon_gets_what_is_granted_and_no_more() {
    let Some(all) = Separated::enrolled("separation_asks") else { return };
    let id = |n: u8| format!("0198c0de-0000-7000-8000-0000000000{n:02}");
    // Somebody who got at the socket all the same is told apart by the kernel.
    for request in [run_request(&id(1), "docs", "snapshot"), json!({"settle": {"run_uids": []}}), json!("describe")] {
        assert_eq!(all.ask_as(STRANGER, &request), [] as [Value; 0], "{request}");
    }
    for (n, service, verb, class) in [
        (2, "more", "snapshot", "refused"),
        (3, "docs", "restore", "refused"),
        (4, "docs", "rm -rf /", "unknown_verb"),
        (5, "nothing", "snapshot", "unknown_service"),
    ] {
        assert_eq!(class_of(&all.ask_as(DAEMON, &run_request(&id(n), service, verb))), class, "{service}: {verb}");
    }
    // An id is no path, in no request.
    for uid in ["../../../etc", "..", "", "../keys"] {
        assert_eq!(class_of(&all.ask_as(DAEMON, &run_request(uid, "docs", "snapshot"))), "refused", "{uid}");
        assert_eq!(all.ask_as(DAEMON, &json!({"settle": {"run_uids": [uid]}})), [json!("settled")], "{uid}");
    }
    assert!(!all.agent.state().join("alive").exists(), "nothing was touched beside the runs");
    // Nothing but id, service and verb can be said.
    for more in [json!({"settings": "/tmp/agent.toml"}), json!({"hooks": []}), json!({"result": "success"})] {
        let mut request = run_request(&id(6), "docs", "snapshot");
        let fields = request["run"].as_object_mut().expect("fields");
        fields.extend(more.as_object().expect("a field").clone());
        assert_eq!(all.ask_as(DAEMON, &request), [] as [Value; 0], "{request}");
    }
    assert_eq!(all.notes(), [] as [String; 0], "no hook was called");
    // An ended run is not made again under its old name.
    assert_eq!(
        all.ask_as(DAEMON, &run_request(&id(7), "docs", "snapshot")).last().expect("an end")["finished"]["record"]["status"],
        "success"
    );
    assert_eq!(class_of(&all.ask_as(DAEMON, &run_request(&id(7), "docs", "snapshot"))), "refused");
    assert_eq!(all.notes(), ["pre", "post"]);
    assert!(all.begun_runs() >= 1);
}

#[test]
fn what_the_daemon_plants_as_a_policy_is_taken_for_a_strangers() {
    let Some(all) = Separated::started("separation_policy") else { return };
    let policies = all.daemons("policies");
    std::fs::create_dir_all(&policies).expect("a folder");
    let policy = policies.join("docs.json");
    let shadow = all.agent.state().join("server.json");
    let loose = json!({
        "policy_id": 1, "service": "docs", "cron": "", "time_zone": "UTC", "destination": "elsewhere",
        "retention_days": 1, "retention_count": 1, "encryption_enabled": true, "misfire": "skip",
    });
    let plant = |how: &str, path: &Path| match how {
        "a link to root's file" => symlink(&shadow, path).expect("a link"),
        "a pipe" => drop(Cmd::new("mkfifo").arg(path).ok()),
        "a folder" => std::fs::create_dir(path).expect("a folder"),
        "another destination" => drop(files::write(path, loose.to_string())),
        _ => drop(files::write(path, "x".repeat(1 << 20))),
    };
    for (how, class) in [
        ("a link to root's file", "settings_invalid"),
        ("a pipe", "settings_invalid"),
        ("a folder", "settings_invalid"),
        ("far too much", "settings_invalid"),
        ("another destination", "unknown_destination"),
    ] {
        plant(how, &policy);
        files::give_to(&policies, DAEMON);
        let run = all.agent.snapshot_started("docs").run();
        assert_eq!(run.text("error_class"), class, "{how}: {run:?}");
        assert!(!run.text("error_message").contains("recovery_recipient"), "{how}: {run:?}");
        if policy.is_dir() && !policy.is_symlink() {
            std::fs::remove_dir(&policy).expect("gone");
        } else {
            std::fs::remove_file(&policy).expect("gone");
        }
    }
    // The folder itself may lead elsewhere.
    std::fs::remove_dir(&policies).expect("an empty folder");
    symlink(all.world.at("elsewhere").join(".."), &policies).expect("a link");
    let run = all.agent.snapshot_started("docs").run();
    assert_eq!(run.text("error_class"), "settings_invalid", "{run:?}");
    assert_eq!(all.notes(), [] as [String; 0], "nothing was begun");
}

#[test]
fn what_a_run_believes_is_believed_only_while_it_is_roots() {
    let Some(all) = Separated::started("separation_trust") else { return };
    let server = all.agent.state().join("server.json");
    files::give_to(&server, DAEMON);
    let run = all.agent.snapshot_started("docs").run();
    run.assert_failed("unsafe_permissions");
    files::give_to(&server, 0);
    // The whole folder the daemon's: it could put anything in root's place.
    Cmd::new("chown").arg(DAEMON.to_string()).arg(all.agent.state()).ok();
    let refused = all.ask_as(DAEMON, &run_request("0198c0de-0000-7000-8000-000000000001", "docs", "snapshot"));
    assert_eq!(refused, [] as [Value; 0], "nobody knows whose the daemon's folder is");
    Cmd::new("chown").arg("0").arg(all.agent.state()).ok();
    all.agent.snapshot_ok("docs");
}

#[test]
fn settings_that_broke_are_named_through_the_socket() {
    let Some(all) = Separated::started("separation_settings") else { return };
    let text = std::fs::read_to_string(&all.agent.config).expect("settings");
    files::write(&all.agent.config, format!("no_such_key = 1\n{text}"));
    let run = all.agent.command(&["snapshot", "docs", "--json"]).run();
    assert!(run.stderr.contains("settings_invalid") && run.stderr.contains("no_such_key"), "{run}");
    files::write(&all.agent.config, text);
    all.agent.snapshot_ok("docs");
}

#[test]
fn root_that_starts_the_daemon_by_hand_is_told_whose_folder_it_is() {
    let Some(all) = Separated::enrolled("separation_by_hand") else { return };
    let by_hand = all.agent.cli(&["run"]);
    assert_eq!(by_hand.code, Some(64), "{by_hand}");
    assert!(by_hand.stderr.contains(&DAEMON.to_string()) && by_hand.stderr.contains("unsafe_permissions"), "{by_hand}");
    assert_eq!(std::fs::read_dir(all.agent.state().join("daemon")).expect("a folder").count(), 1, "only the identity");
}

#[test]
fn killed_daemon_hears_the_end_of_its_run_from_a_runner() {
    let Some(mut all) = Separated::started("separation_killed") else { return };
    let slow = files::write_script(all.world.at("slow"), "sleep 2");
    let (source, notes) = (all.world.at("source"), all.world.at("notes.txt"));
    let hook = files::write_script(all.world.at("hook"), &format!("echo \"$1\" >>{}", notes.display()));
    let (hook, slow) = (hook.to_str().expect("UTF-8").to_owned(), slow.to_str().expect("UTF-8").to_owned());
    all.agent.change(|builder| {
        let hook = Hook::new("slow").pre(&[&slow]).post(&[&hook, "released"]);
        builder.allowed(Service::files("slow", [&source]).hook(hook))
    });
    all.agent.command(&["snapshot", "slow", "--detach"]).ok();
    wait_until("the run to have begun", std::time::Duration::from_secs(20), || !all.units.pids(Unit::Run).is_empty());
    wait_until("its hook to have begun", std::time::Duration::from_secs(20), || {
        let runs = all.agent.state().join("runs");
        let entries = std::fs::read_dir(runs).into_iter().flatten().flatten();
        entries.into_iter().any(|entry| entry.path().join("begun-0").exists())
    });
    all.agent.kill9();
    all.agent.start();
    let run = all.agent.wait_last_run_ended();
    assert_eq!((run.text("service"), run.text("error_class")), ("slow", "interrupted"), "{run:?}");
    assert_eq!(all.notes(), ["released"], "once, by the runner that was left alone");
    let row = all.world.receiver.wait_run_ended(all.agent.server_id, run.uid());
    assert_eq!(row["error_class"], "interrupted", "{row}");
}

#[test]
fn socket_without_runners_ends_a_run_by_name() {
    let Some(all) = Separated::started("separation_no_socket") else { return };
    std::fs::remove_file(all.units.runner_socket()).expect("the socket");
    let run = all.agent.snapshot_started("docs").run();
    assert_eq!(run.text("status"), "failed", "{run:?}");
    assert!(run.text("error_message").contains("socket unit"), "{run:?}");
    assert_eq!(all.notes(), [] as [String; 0]);
}
