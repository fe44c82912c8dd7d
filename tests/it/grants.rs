//! The host decides: what its grants, floors and file permissions do not allow is refused before anything
//! is started, and the refusal stands at both ends.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hestner_tests::receiver::rows;
use hestner_tests::{Agent, AgentBuilder, Archiver, Hook, Moment, Service, World, files, is_root_or_skips, wait_for};
use serde_json::{Value, json};

/// An agent whose hook and archiver leave marks, with service `docs`.
pub(crate) struct Watched {
    pub(crate) world: World,
    pub(crate) archiver: Archiver,
    pub(crate) notes: PathBuf,
    hook: PathBuf,
}

impl Watched {
    pub(crate) fn new(name: &str) -> Self {
        let world = World::new(name);
        let notes = world.at("notes.txt");
        let hook = files::write_script(world.at("hooks/note"), &format!("echo \"$*\" >> {}", notes.display()));
        let archiver = world.agent().archiver();
        Self { world, archiver, notes, hook }
    }

    pub(crate) fn builder(&self) -> AgentBuilder {
        let hook = self.hook.to_string_lossy().into_owned();
        let service = Service::files("docs", [self.world.source("source")])
            .hook(Hook::new("db").pre(&[&hook, "pre"]).post(&[&hook, "post"]));
        self.world.agent().service(service)
    }

    /// Neither a hook nor an archiver was started.
    pub(crate) fn assert_untouched(&self) {
        assert!(!self.notes.exists(), "a hook was started: {:?}", files::lines(&self.notes));
        assert_eq!(self.archiver.stores_begun(), 0, "an archiver was started: {:?}", self.archiver.notes());
    }

    /// Asks the centre for a snapshot of `service` and waits for what becomes of it.
    pub(crate) fn ask_centre(&self, agent: &Agent, service: &str) -> Value {
        let path = format!("/v1/servers/{}/snapshots", agent.server_id);
        let reply = self.world.receiver.post(&path, &json!({"service": service}));
        assert_eq!(reply.status, 202, "{reply:?}");
        let id = reply.json()["id"].as_i64().expect("an id");
        self.world.receiver.wait_row_ended(agent.server_id, id)
    }
}

#[test]
fn directive_for_a_denied_service_is_refused_at_both_ends_and_starts_nothing() {
    for (name, value) in [("grants-absent", None), ("grants-deny", Some("deny"))] {
        let watched = Watched::new(name);
        let builder = watched.builder();
        let builder = value.map_or(builder.clone(), |value| builder.grant("docs", "snapshot", value));
        let agent = builder.started();
        let row = watched.ask_centre(&agent, "docs");
        assert_eq!((&row["status"], &row["error_class"]), (&json!("failed"), &json!("refused")), "{row}");
        let own = agent.last_run();
        own.assert_failed("refused");
        watched.assert_untouched();
        assert!(watched.world.receiver.ledger(agent.server_id).is_empty());

        let by_hand = agent.cli(&["snapshot", "docs"]);
        assert_eq!(by_hand.code, Some(64), "{by_hand}");
        assert!(by_hand.stderr.contains("grants allow") && by_hand.stderr.contains("code: refused"), "{by_hand}");
        watched.assert_untouched();
    }
}

#[test]
fn grant_changed_on_the_command_line_holds_for_the_next_run() {
    let watched = Watched::new("grants-cli");
    let agent = watched.builder().started();
    agent.snapshot("docs").assert_failed("refused");
    agent.cli(&["grants", "allow", "docs", "snapshot"]).ok();
    let listed = agent.cli(&["grants", "list", "--json"]).json().to_string();
    assert!(listed.contains("allow"), "{listed}");
    agent.snapshot_ok("docs");
    agent.cli(&["grants", "deny", "docs", "snapshot"]).ok();
    agent.snapshot("docs").assert_failed("refused");
    for wrong in [["allow", "docs", "format"], ["allow", "nothing", "snapshot"]] {
        let ended = agent.cli(&[&["grants"], &wrong[..]].concat());
        assert_eq!(ended.code, Some(64), "{ended}");
    }
}

/// A policy for `docs` with some fields changed.
fn policy_with(change: &Value) -> Value {
    let mut policy = json!({
        "service": "docs", "cron": "0 3 * * *", "retention_days": 30, "retention_count": 5,
        "destination": "local", "encryption_enabled": true,
    });
    for (key, value) in change.as_object().expect("an object") {
        policy[key] = value.clone();
    }
    policy
}

/// Puts a policy, and gives it as it stands once the host has answered.
fn answered_policy(world: &World, server: i64, change: &Value) -> Value {
    let policy = policy_with(change);
    let path = format!("/v1/servers/{server}/snapshot-policy");
    let reply = world.receiver.put(&path, &policy);
    assert_eq!(reply.status, 200, "{reply:?}");
    wait_for("the host to answer the policy", Duration::from_secs(20), || {
        let policies = rows(&world.receiver.get_json(&path));
        policies.into_iter().find(|p| p["service"] == policy["service"] && p["state"] != "pending")
    })
}

#[test]
fn policy_that_the_host_does_not_allow_is_refused_with_its_reason() {
    let watched = Watched::new("grants-policy");
    let builder = watched.builder().grant("docs", "snapshot", "allow");
    let builder = builder.setting("floor", "retention_days = 7").setting("floor", "retention_count = 2");
    let agent = builder.started();
    let refusals = [
        (json!({"destination": "elsewhere"}), "unknown_destination"),
        (json!({"encryption_enabled": false}), "encryption_required"),
        (json!({"retention_days": 6}), "retention_below_floor"),
        (json!({"retention_count": 1}), "retention_below_floor"),
        (json!({"compression_level": 10}), "effort_refused"),
    ];
    for (change, code) in refusals {
        let policy = answered_policy(&watched.world, agent.server_id, &change);
        assert_eq!(policy["state"], "refused", "{policy}");
        assert!(policy.to_string().contains(code), "expected {code}: {policy}");
    }
    let path = format!("/v1/servers/{}/snapshot-policy", agent.server_id);
    let reply = watched.world.receiver.put(&path, &policy_with(&json!({"service": "unheard-of"})));
    assert_eq!((reply.status, reply.problem().as_str()), (422, "unknown_service"));
    let at_the_floor = json!({"retention_days": 7, "retention_count": 2});
    let policy = answered_policy(&watched.world, agent.server_id, &at_the_floor);
    assert_eq!(policy["state"], "applied", "at the floor itself it is fine: {policy}");
    // What was refused changed nothing: a run goes where the applied policy says.
    let run = agent.snapshot_ok("docs");
    assert!(run.text("artifact_url").starts_with("restic:local/"), "{run:?}");
    assert!(agent.repository_path("local").exists(), "encrypted");
}

#[test]
fn encryption_is_off_only_where_host_and_policy_agree() {
    let watched = Watched::new("grants-open");
    let builder = watched.builder().grant("docs", "snapshot", "allow").setting("floor", "allow_unencrypted = true");
    let agent = builder.started();
    let policy = answered_policy(&watched.world, agent.server_id, &json!({"encryption_enabled": false}));
    assert_eq!(policy["state"], "applied", "{policy}");
    agent.snapshot_ok("docs");
    let open = agent.folder().join(format!("repository/server-{}-open", agent.server_id));
    assert!(open.exists(), "a repository of its own for the other key");
    assert!(!agent.repository_path("local").exists(), "the encrypted one was not touched");
}

#[test]
fn unknown_verb_is_refused_by_name_at_both_ends() {
    let watched = Watched::new("grants-verb");
    let mut agent = watched.builder().grant("docs", "snapshot", "allow").started();
    // No receiver of this version sends such a verb; a newer or a hostile one might.
    agent.stop();
    let path = format!("/v1/servers/{}/snapshots", agent.server_id);
    let reply = watched.world.receiver.post(&path, &json!({"service": "docs"}));
    let id = reply.json()["id"].as_i64().expect("an id");
    let changed = replace_verb(&watched.world, "format_disk");
    assert_eq!(changed, 1, "the directive that waits was changed");
    agent.start();
    let row = watched.world.receiver.wait_row_ended(agent.server_id, id);
    assert_eq!((&row["status"], &row["error_class"]), (&json!("failed"), &json!("unknown_verb")), "{row}");
    assert!(row["error_message"].to_string().contains("format_disk"), "refused by name: {row}");
    watched.assert_untouched();
}

/// Changes the verb of the directive that waits, in the receiver's store.
fn replace_verb(world: &World, verb: &str) -> usize {
    let path = world.receiver.state().join("receiver.db");
    let db = rusqlite::Connection::open(path).expect("the receiver's store");
    db.busy_timeout(Duration::from_secs(10)).expect("a busy timeout");
    db.execute("UPDATE directives SET verb = ?1 WHERE verb = 'snapshot'", [verb]).expect("an update")
}

/// Puts `path` behind a symlink in a folder that everybody may write, and gives that folder.
fn behind_open_link(world: &World, name: &str, path: &Path) -> PathBuf {
    let real = world.at(&format!("{name}/real")).join(path.file_name().expect("a name"));
    let open = world.at(&format!("{name}/open/x")).parent().expect("a folder").to_owned();
    std::fs::create_dir_all(real.parent().expect("a folder")).expect("a folder");
    hestner_tests::Cmd::new("mv").arg(path).arg(&real).ok();
    std::os::unix::fs::symlink(&real, open.join("link")).expect("a link");
    std::os::unix::fs::symlink(open.join("link"), path).expect("a link");
    open
}

/// Everything is denied: on the host, for the centre, and `doctor` and the log say by which path.
fn assert_denied_because_of(watched: &Watched, agent: &Agent, what: &str, path: &Path) {
    let named = path.to_str().expect("UTF-8");
    let by_hand = agent.cli(&["snapshot", "docs"]);
    assert_eq!(by_hand.code, Some(64), "{what}: {by_hand}");
    assert!(by_hand.stderr.contains("code: unsafe_permissions"), "{what}: {by_hand}");
    assert!(by_hand.stderr.contains(named), "the message names {what}: {by_hand}");
    let row = watched.ask_centre(agent, "docs");
    assert_eq!(
        (&row["status"], &row["error_class"]),
        (&json!("failed"), &json!("unsafe_permissions")),
        "{what}: {row}"
    );
    let log = files::lines(&agent.log);
    let said = log.iter().any(|line| line.contains("unsafe_permissions") && line.contains(named));
    assert!(said, "the log says why, {what}");
    let doctor = agent.cli(&["doctor"]);
    assert_eq!(doctor.code, Some(1), "{what}: {doctor}");
    assert!(doctor.stdout.contains("code: unsafe_permissions") && doctor.stdout.contains(named), "{what}: {doctor}");
    watched.assert_untouched();
}

#[test]
fn whatever_others_can_write_denies_everything() {
    let watched = Watched::new("grants-writable");
    let agent = watched.builder().grant("docs", "snapshot", "allow").started();
    let hooks_folder = watched.hook.parent().expect("a folder").to_owned();
    let cases: [(&str, PathBuf, u32, u32); 7] = [
        ("settings", agent.config.clone(), 0o646, 0o644),
        ("settings, by their group", agent.config.clone(), 0o664, 0o644),
        ("grants", agent.grants_file(), 0o646, 0o644),
        ("hook program", watched.hook.clone(), 0o757, 0o755),
        ("folder of the hook program", hooks_folder, 0o1777, 0o755),
        ("folder of settings and grants", agent.folder().to_owned(), 0o775, 0o755),
        ("folder of all of it", watched.world.path().to_owned(), 0o777, 0o755),
    ];
    for (what, path, open, closed) in cases {
        files::set_mode(&path, open);
        assert_denied_because_of(&watched, &agent, what, &path);
        files::set_mode(&path, closed);
    }
    agent.snapshot_ok("docs");
}

#[test]
fn link_in_a_folder_that_others_can_write_denies_everything() {
    let watched = Watched::new("grants-links");
    let agent = watched.builder().grant("docs", "snapshot", "allow").started();
    let cases = [("settings", agent.config.clone()), ("grants", agent.grants_file()), ("hook", watched.hook.clone())];
    for (what, path) in cases {
        let open = behind_open_link(&watched.world, what, &path);
        // Who could swap the link decides; while only root can, a link is as good as a file.
        assert_eq!(agent.cli(&["snapshot", "docs", "--dry-run"]).code, Some(0), "{what}");
        files::set_mode(&open, 0o777);
        assert_denied_because_of(&watched, &agent, what, &open);
        files::set_mode(&open, 0o755);
    }
    agent.snapshot_ok("docs");
}

#[test]
fn program_of_a_point_that_others_can_write_is_not_started() {
    let watched = Watched::new("grants-point");
    let started = watched.world.at("started.txt");
    let point = |key: &str, program: &Path| {
        let mut commands: Vec<String> = Vec::new();
        for name in ["command", "after_command", "remove_command"] {
            let program = if name == key { program.to_str().expect("UTF-8") } else { "/bin/true" };
            commands.push(format!("{name} = [{program:?}]"));
        }
        let lines = ["[service.point]", "kind = \"fsfreeze\"", "read_from = \"/srv\""].map(str::to_owned);
        lines.into_iter().chain(commands).collect::<Vec<_>>().join("\n")
    };
    for key in ["command", "after_command", "remove_command"] {
        let program = files::write_script(watched.world.at(key).join("san"), &format!("touch {}", started.display()));
        let service = Service::files("docs", [watched.world.source("source")]).source_line(&point(key, &program));
        let agent = watched.world.agent_named(&format!("agent-{key}")).allowed(service).started();
        for (what, path, open, closed) in [
            ("program", program.clone(), 0o757, 0o755),
            ("folder", program.parent().expect("one").to_owned(), 0o777, 0o755),
        ] {
            files::set_mode(&path, open);
            let ended = agent.cli(&["snapshot", "docs"]);
            assert_eq!(ended.code, Some(64), "{what} of {key}: {ended}");
            let named = path.to_str().expect("UTF-8");
            assert!(
                ended.stderr.contains("unsafe_permissions") && ended.stderr.contains(named),
                "{what} of {key}: {ended}"
            );
            files::set_mode(&path, closed);
        }
        assert!(!started.exists(), "{key} was started");
    }
}

#[test]
fn program_of_another_owner_is_not_trusted() {
    if !is_root_or_skips("program_of_another_owner_is_not_trusted") {
        return;
    }
    let watched = Watched::new("grants-owner");
    let agent = watched.builder().grant("docs", "snapshot", "allow").started();
    files::give_to(&watched.hook, 65_534);
    let run = agent.snapshot("docs");
    run.assert_failed("unsafe_permissions");
    watched.assert_untouched();
    files::give_to(&watched.hook, 0);

    for (what, path) in [("grants", agent.grants_file()), ("settings", agent.config.clone())] {
        files::give_to(&path, 65_534);
        assert_denied_because_of(&watched, &agent, what, &path);
        files::give_to(&path, 0);
    }
}

#[test]
fn control_socket_admits_no_other_user() {
    if !is_root_or_skips("control_socket_admits_no_other_user") {
        return;
    }
    let watched = Watched::new("grants-socket");
    let agent = watched.builder().grant("docs", "snapshot", "allow").started();
    let socket = agent.folder().join("control.sock");
    // Even where the file's mode would let them in.
    files::set_mode(&socket, 0o777);
    let program = files::write_script(watched.world.at("bin/anyone"), "exec \"$@\"");
    let copy = copy_for_others(&watched.world);
    let ended = hestner_tests::Cmd::new(program)
        .as_user(Some(65_534))
        .arg(copy)
        .arg("--config")
        .arg(&agent.config)
        .args(["snapshot", "docs", "--json"])
        .run();
    assert_ne!(ended.code, Some(0), "{ended}");
    watched.assert_untouched();
    assert_eq!(agent.runs().len(), 0, "nothing was even recorded");
}

/// The agent's program where every user can reach it.
fn copy_for_others(world: &World) -> PathBuf {
    let copy = world.at("bin/hestner-agent");
    std::fs::copy(hestner_tests::world::bin("hestner-agent"), &copy).expect("a copy");
    copy
}

#[test]
fn rest_answers_only_whom_it_may() {
    let world = World::new("grants-rest");
    let agent = world.agent().allowed(Service::files("docs", [world.source("source")])).started();
    let other = world.company("other");
    let foreign = format!("Bearer {}", world.receiver.api_key(Some(other.id)));
    let all = format!("Bearer {}", world.receiver.api_key(None));
    let server = agent.server_id;
    let company = world.company.id;
    let get = |path: &str, key: Option<&str>| {
        let key = key.map(|key| ("authorization", key));
        let headers: Vec<(&str, &str)> = key.into_iter().collect();
        hestner_tests::http::request(world.receiver.rest(), "GET", path, &headers, None).expect("an answer")
    };
    let paths = [
        format!("/v1/companies/{company}/servers"),
        format!("/v1/servers/{server}/overview?range=1h"),
        format!("/v1/servers/{server}/services"),
        format!("/v1/servers/{server}/snapshots"),
        format!("/v1/servers/{server}/snapshot-policy"),
        format!("/v1/servers/{server}/costs?month=2026-01"),
    ];
    for path in &paths {
        let missing = get(path, None);
        assert_eq!((missing.status, missing.problem().as_str()), (401, "key_missing"), "{path}");
        let invalid = get(path, Some("Bearer hsk_1_000000000000000000000000000000000000000000000000"));
        assert_eq!((invalid.status, invalid.problem().as_str()), (401, "key_invalid"), "{path}");
        let of_others = get(path, Some(&foreign));
        assert_eq!(of_others.status, 404, "another company's things are not there: {path} {of_others:?}");
        of_others.problem();
        assert_eq!(get(path, Some(&all)).status, 200, "{path}");
    }
    let metrics = get("/metrics", None);
    assert_eq!(metrics.status, 200, "loopback may read metrics: {metrics:?}");
    assert!(metrics.body.contains("hestner_"), "{}", metrics.body);
    assert_eq!(get("/metrics", Some(&all)).status, 200);
    for path in ["/health", "/health/worker"] {
        assert_eq!(get(path, None).status, 200, "{path}");
    }
}

#[test]
fn secrets_appear_in_no_log_no_command_line_and_no_environment() {
    let watched = Watched::new("grants-secrets");
    let agent = watched.builder().grant("docs", "snapshot", "allow").started();
    // With the repository open, so that all its secrets are in use.
    watched.archiver.hold_at(Moment::Commit);
    let snapshot = agent.snapshot_started("docs");
    watched.archiver.wait_reached(Moment::Commit);
    assert!(agent.part("worker").is_some(), "the archiver is looked at");
    let password = secret_of(&agent.repository("local").password_file);
    for process in hestner_tests::processes::descendants(agent.pid()) {
        let environment = std::fs::read(format!("/proc/{}/environ", process.pid)).unwrap_or_default();
        assert!(!process.names(&password), "in the command line of {process:?}");
        assert!(!String::from_utf8_lossy(&environment).contains(&password), "in the environment of {process:?}");
    }
    watched.archiver.go_on();
    assert_eq!(snapshot.run().text("status"), "success");
    use std::os::unix::fs::MetadataExt as _;
    let mode = std::fs::metadata(&agent.repository("local").password_file).expect("a file").mode() & 0o7777;
    assert_eq!(mode, 0o600, "{mode:o}");
    let key = secret_of(&agent.state().join("daemon/identity/agent.pem"));
    for log in [agent.log.clone(), watched.world.receiver.log()] {
        let text = std::fs::read_to_string(&log).expect("a log");
        for (what, secret) in [("password", &password), ("key", &key)] {
            assert!(!text.contains(secret.as_str()), "the {what} stands in {}", log.display());
        }
    }
}

/// The longest line of a file that holds a secret.
fn secret_of(path: &Path) -> String {
    let lines = files::lines(path);
    let secret = lines.into_iter().filter(|line| !line.contains("---")).max_by_key(String::len);
    secret.unwrap_or_else(|| panic!("nothing in {}", path.display()))
}
