//! The grant `confirm`: a run waits until a person on the host says a word, and nothing else lets it begin.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use hestner_tests::run::Run;
use hestner_tests::world::bin;
use hestner_tests::{Agent, AgentBuilder, Cmd, Moment, Service, files, wait_for, wait_until};
use serde_json::{Value, json};

use crate::grants::Watched;
use crate::separation::{DAEMON, Separated, class_of, run_request};

/// An agent whose service `docs` is confirmed each time.
fn confirming(watched: &Watched) -> AgentBuilder {
    watched.builder().grant("docs", "snapshot", "confirm")
}

/// What waits, as `confirm --list --json` prints it.
fn waiting(agent: &Agent) -> Vec<Value> {
    agent.cli(&["confirm", "--list", "--json"]).json().as_array().expect("a list").clone()
}

/// Waits until a run waits.
fn wait_waiting(agent: &Agent) -> Value {
    wait_for("a run to wait", Duration::from_secs(30), || waiting(agent).into_iter().next())
}

fn uid_of(run: &Value) -> String {
    run["run_uid"].as_str().expect("a run_uid").to_owned()
}

fn run_of(agent: &Agent, uid: &str) -> Run {
    agent.runs().into_iter().find(|run| run.uid() == uid).expect("the run is listed")
}

fn wait_ended(agent: &Agent, uid: &str) -> Run {
    wait_for("the run to end", Duration::from_secs(90), || {
        let run = run_of(agent, uid);
        ["success", "failed"].contains(&run.text("status")).then_some(run)
    })
}

/// Starts a snapshot on the host and gives the run that waits.
fn asked_on_host(agent: &Agent) -> Value {
    agent.cli(&["snapshot", "docs", "--detach"]).ok();
    wait_waiting(agent)
}

/// Says something to the daemon as its own user could, without the command line.
fn say(agent: &Agent, request: &Value) -> Value {
    let mut socket = UnixStream::connect(agent.socket()).expect("the daemon's socket");
    writeln!(socket, "{request}").expect("a request");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).expect("an answer");
    serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{e}: {answer}"))
}

#[test]
fn run_of_a_directive_waits_until_somebody_confirms_it_on_the_host() {
    let watched = Watched::new("confirm-directive");
    let builder = confirming(&watched).setting("limits", "waiting_runs = 0");
    let agent = builder.allowed(Service::files("other", [watched.world.source("other")])).started();
    let path = format!("/v1/servers/{}/snapshots", agent.server_id);
    let reply = watched.world.receiver.post(&path, &json!({"service": "docs"}));
    let id = reply.json()["id"].as_i64().expect("an id");

    let run = wait_waiting(&agent);
    let uid = uid_of(&run);
    assert_eq!((&run["service"], &run["verb"], &run["kind"]), (&json!("docs"), &json!("snapshot"), &json!("manual")));
    assert_ne!(run["directive_id"], "", "the person sees who asked: {run}");
    assert!(run["since_ms"].as_i64() > Some(0) && run["expires_at_ms"].as_i64() > run["since_ms"].as_i64(), "{run}");
    let shown = agent.cli(&["confirm", "--list"]).ok();
    for part in [&uid, "docs", "snapshot", "the centre, directive", "waits since", "until"] {
        assert!(shown.contains(part), "{part} is not in:\n{shown}");
    }
    assert_eq!(run_of(&agent, &uid).text("status"), "queued");
    assert_eq!((&agent.status()["runs_waiting"], &agent.status()["runs_active"]), (&json!(1), &json!(0)));
    let row = wait_for("the centre to see the run", Duration::from_secs(20), || {
        watched.world.receiver.run(agent.server_id, &uid)
    });
    assert_eq!(row["status"], "queued", "{row}");

    // It holds no place: with one place at a time another service's run goes through.
    let notes_before = files::lines(&watched.notes).len();
    agent.snapshot_ok("other");
    assert_eq!(files::lines(&watched.notes).len(), notes_before, "nothing of `docs` was started");
    let second = agent.cli(&["snapshot", "docs"]);
    assert!(second.stderr.contains("code: busy") && second.stderr.contains(&uid), "the wait is named: {second}");

    let confirmed = agent.cli(&["confirm", &uid]).ok();
    for part in [&uid, "service", "docs", "verb", "snapshot", "asked by", "is confirmed"] {
        assert!(confirmed.contains(part), "{part} is not in:\n{confirmed}");
    }
    assert_eq!(wait_ended(&agent, &uid).text("status"), "success");
    let row = watched.world.receiver.wait_row_ended(agent.server_id, id);
    assert_eq!((&row["status"], &row["run_uid"]), (&json!("success"), &json!(uid)), "{row}");
    assert!(waiting(&agent).is_empty());
    let runs = agent.state().join("runs");
    assert!(!runs.join(".confirmed").join(&uid).exists(), "a confirmation is good for once");
    let kept = std::fs::read_to_string(runs.join(&uid).join("confirmed.json")).expect("who confirmed stays on record");
    assert!(kept.contains("\"by\""), "{kept}");
    let again = agent.cli(&["confirm", &uid]);
    assert_eq!(again.code, Some(64), "{again}");
    assert!(again.stderr.contains("code: run_ended"), "{again}");
}

#[test]
fn wait_survives_a_restart_and_a_kill_of_the_daemon() {
    let watched = Watched::new("confirm-restart");
    let mut agent = confirming(&watched).started();
    let run = asked_on_host(&agent);
    let uid = uid_of(&run);
    agent.stop();
    agent.start();
    assert_eq!(wait_waiting(&agent), run, "the same wait, with its old end");
    agent.kill9();
    agent.start();
    assert_eq!(wait_waiting(&agent), run);
    assert_eq!(run_of(&agent, &uid).text("status"), "queued", "not `interrupted`");
    let busy = agent.cli(&["snapshot", "docs"]);
    assert!(busy.stderr.contains("code: busy"), "still one run a service: {busy}");
    agent.cli(&["confirm", &uid, "--json"]).json();
    assert_eq!(wait_ended(&agent, &uid).text("status"), "success");
    // What was confirmed and went through is not taken up again.
    agent.stop();
    agent.start();
    assert!(waiting(&agent).is_empty());
    assert_eq!(run_of(&agent, &uid).text("status"), "success");
}

#[test]
fn run_that_nobody_confirms_ends_as_not_confirmed_at_both_ends() {
    let watched = Watched::new("confirm-expires");
    let agent = confirming(&watched).setting("limits", "confirm_expires = \"2s\"").started();
    let row = watched.ask_centre(&agent, "docs");
    assert_eq!((&row["status"], &row["error_class"]), (&json!("failed"), &json!("not_confirmed")), "{row}");
    assert!(row["next_step"].to_string().contains("hestner-agent confirm"), "{row}");
    let own = agent.last_run();
    own.assert_failed("not_confirmed");
    watched.assert_untouched();
    let late = agent.cli(&["confirm", own.uid()]);
    assert!(late.stderr.contains("code: run_ended"), "{late}");
    assert!(!agent.state().join("runs/.confirmed").join(own.uid()).exists(), "a word that was too late leaves nothing");
    assert!(waiting(&agent).is_empty());
    // The service is free again.
    asked_on_host(&agent);
}

#[test]
fn time_of_a_wait_goes_on_while_the_daemon_is_down() {
    let watched = Watched::new("confirm-down");
    let mut agent = confirming(&watched).setting("limits", "confirm_expires = \"3s\"").started();
    let uid = uid_of(&asked_on_host(&agent));
    agent.stop();
    std::thread::sleep(Duration::from_secs(3));
    agent.start();
    wait_ended(&agent, &uid).assert_failed("not_confirmed");
    watched.assert_untouched();
}

#[test]
fn word_of_the_daemon_alone_lets_nothing_begin() {
    let watched = Watched::new("confirm-daemon");
    let agent = confirming(&watched).started();
    let folder = agent.state().join("runs/.confirmed");
    let forged = |uid: &str, service: &str, verb: &str, expires_at_ms: i64| {
        let text =
            json!({"run_uid": uid, "service": service, "verb": verb, "by": "root", "expires_at_ms": expires_at_ms});
        text.to_string()
    };
    let far = 4_000_000_000_000;
    type Forgery<'a> = &'a dyn Fn(&str) -> Option<(String, u32)>;
    let cases: [(&str, Forgery<'_>, &str); 6] = [
        ("no file at all", &|_| None, "not_confirmed"),
        ("another service", &|uid| Some((forged(uid, "other", "snapshot", far), 0o600)), "not_confirmed"),
        ("another verb", &|uid| Some((forged(uid, "docs", "restore", far), 0o600)), "not_confirmed"),
        ("another run", &|_| Some((forged("x", "docs", "snapshot", far), 0o600)), "not_confirmed"),
        ("one that expired", &|uid| Some((forged(uid, "docs", "snapshot", 1), 0o600)), "not_confirmed"),
        ("one that others can write", &|uid| Some((forged(uid, "docs", "snapshot", far), 0o666)), "unsafe_permissions"),
    ];
    for (what, forgery, class) in cases {
        let uid = uid_of(&asked_on_host(&agent));
        if let Some((text, mode)) = forgery(&uid) {
            let path = files::write(folder.join(&uid), text);
            files::set_mode(&folder, 0o700);
            files::set_mode(&path, mode);
        }
        let answer = say(&agent, &json!({"confirm": {"run_uid": uid}}));
        assert!(answer["waiting"].is_array(), "{what}: the daemon takes the word: {answer}");
        let run = wait_ended(&agent, &uid);
        assert_eq!(run.text("error_class"), class, "{what}: {run:?}");
        watched.assert_untouched();
    }
}

#[test]
fn refused_run_is_recorded_as_refused_at_both_ends() {
    let watched = Watched::new("confirm-refuse");
    let mut agent = confirming(&watched).started();
    let path = format!("/v1/servers/{}/snapshots", agent.server_id);
    let reply = watched.world.receiver.post(&path, &json!({"service": "docs"}));
    let id = reply.json()["id"].as_i64().expect("an id");
    let uid = uid_of(&wait_waiting(&agent));
    let said = agent.cli(&["confirm", &uid, "--refuse"]).ok();
    assert!(said.contains("is refused"), "{said}");
    // It is on disk as soon as the person is told.
    agent.kill9();
    agent.start();
    let run = run_of(&agent, &uid);
    run.assert_failed("refused");
    assert!(run.text("error_message").contains("refused it on the host"), "{run:?}");
    let row = watched.world.receiver.wait_row_ended(agent.server_id, id);
    assert_eq!((&row["status"], &row["error_class"]), (&json!("failed"), &json!("refused")), "{row}");
    watched.assert_untouched();
    let late = agent.cli(&["confirm", &uid]);
    assert!(late.stderr.contains("code: run_ended"), "{late}");
}

#[test]
fn grants_of_the_moment_decide_about_a_confirmed_run() {
    let watched = Watched::new("confirm-changed");
    let agent = confirming(&watched).started();
    let denied = uid_of(&asked_on_host(&agent));
    agent.cli(&["grants", "deny", "docs", "snapshot"]).ok();
    agent.cli(&["confirm", &denied]).ok();
    wait_ended(&agent, &denied).assert_failed("refused");
    watched.assert_untouched();

    agent.cli(&["grants", "confirm", "docs", "snapshot"]).ok();
    let allowed = uid_of(&asked_on_host(&agent));
    agent.cli(&["grants", "allow", "docs", "snapshot"]).ok();
    assert_eq!(waiting(&agent).len(), 1, "what waits goes on waiting");
    agent.cli(&["confirm", &allowed]).ok();
    assert_eq!(wait_ended(&agent, &allowed).text("status"), "success");
    let needless = agent.snapshot_ok("docs");
    let ended = agent.cli(&["confirm", needless.uid()]);
    assert!(ended.stderr.contains("code: run_ended"), "{ended}");
}

#[test]
fn run_that_cannot_be_confirmed_is_said_to_be_so_with_a_stable_code() {
    let watched = Watched::new("confirm-codes");
    let agent = confirming(&watched).allowed(Service::files("slow", [watched.world.source("slow")])).started();
    for (run, code) in [("nonsense", "unknown_run"), ("0198c0de-0000-7000-8000-000000000000", "unknown_run")] {
        for more in [&[][..], &["--refuse"]] {
            let ended = agent.cli(&[&["confirm", run], more].concat());
            assert_eq!(ended.code, Some(64), "{ended}");
            assert!(ended.stderr.contains(&format!("code: {code}")), "{ended}");
        }
    }
    assert_eq!(agent.cli(&["confirm"]).code, Some(64), "neither a run nor --list");
    assert!(agent.cli(&["confirm", "--list"]).ok().contains("no run waits"));

    // One place: while `slow` holds it, a confirmed run waits for its turn.
    watched.archiver.hold_at(Moment::Store);
    let slow = agent.snapshot_started("slow");
    watched.archiver.wait_reached(Moment::Store);
    let running = agent.last_run();
    let ended = agent.cli(&["confirm", running.uid()]);
    assert!(ended.stderr.contains("code: run_not_waiting"), "{ended}");
    let uid = uid_of(&asked_on_host(&agent));
    agent.cli(&["confirm", &uid]).ok();
    let again = agent.cli(&["confirm", &uid]);
    assert!(again.stderr.contains("code: run_confirmed"), "{again}");
    let too_late = agent.cli(&["confirm", &uid, "--refuse"]);
    assert!(too_late.stderr.contains("code: run_confirmed"), "{too_late}");
    watched.archiver.go_on();
    assert_eq!(slow.run().text("status"), "success");
    assert_eq!(wait_ended(&agent, &uid).text("status"), "success", "the second word did no harm");
}

#[test]
fn confirmed_run_that_had_not_begun_begins_after_a_restart() {
    let watched = Watched::new("confirm-turn");
    let mut agent = confirming(&watched).allowed(Service::files("slow", [watched.world.source("slow")])).started();
    watched.archiver.hold_at(Moment::Store);
    let slow = agent.snapshot_started("slow");
    watched.archiver.wait_reached(Moment::Store);
    let uid = uid_of(&asked_on_host(&agent));
    agent.cli(&["confirm", &uid]).ok();
    agent.stop();
    let _ = slow.ended();
    watched.archiver.go_on();
    agent.start();
    assert_eq!(wait_ended(&agent, &uid).text("status"), "success", "nobody has to say it twice");
}

#[test]
fn follower_hears_what_to_type_and_then_the_end() {
    let watched = Watched::new("confirm-follow");
    let agent = confirming(&watched).started();
    let plan = agent.cli(&["snapshot", "docs", "--dry-run"]).ok();
    assert!(plan.contains("wait until a person confirms it"), "{plan}");
    assert!(waiting(&agent).is_empty(), "a plan is no run");

    let snapshot = agent.snapshot_started("docs");
    let uid = uid_of(&wait_waiting(&agent));
    agent.cli(&["confirm", &uid]).ok();
    let ended = snapshot.ended();
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.stderr.contains(&format!("hestner-agent confirm {uid}")), "{ended}");
    let detached = agent.cli(&["snapshot", "docs", "--detach"]);
    assert!(detached.stderr.contains("hestner-agent confirm"), "{detached}");
}

#[test]
fn person_on_a_terminal_is_asked_after_seeing_what_it_is() {
    let watched = Watched::new("confirm-terminal");
    let agent = confirming(&watched).started();
    let uid = uid_of(&asked_on_host(&agent));
    let on_terminal = |answer: &str, more: &str| {
        let line =
            format!("{} --config {} confirm {uid} {more}", bin("hestner-agent").display(), agent.config.display());
        Cmd::new("script").args(["-qec", &line, "/dev/null"]).stdin(answer).run()
    };
    for answer in ["n\n", "\n", "yess\n"] {
        let ended = on_terminal(answer, "");
        assert_eq!(ended.code, Some(64), "{ended}");
        assert!(ended.stdout.contains("code: not_answered"), "{ended}");
        let (shown, asked) = (ended.stdout.find("asked by"), ended.stdout.find("Let it begin? [y/N]"));
        assert!(shown.is_some() && shown < asked, "first it is shown, then asked: {ended}");
        assert_eq!(waiting(&agent).len(), 1, "nothing was done");
    }
    assert!(!agent.state().join("runs/.confirmed").exists(), "nothing was written");
    let confirmed = on_terminal("y\n", "");
    assert_eq!(confirmed.code, Some(0), "{confirmed}");
    assert_eq!(wait_ended(&agent, &uid).text("status"), "success");
}

#[test]
fn scheduled_run_waits_as_well_and_is_skipped_while_another_one_does() {
    let watched = Watched::new("confirm-cron");
    let other = Service::files("other", [watched.world.source("other")]);
    let agent = confirming(&watched).service(other).grant("other", "snapshot", "confirm").started();
    agent.cli(&["snapshot", "other", "--detach"]).ok();
    let of = |service: &str| waiting(&agent).into_iter().filter(|run| run["service"] == service).collect::<Vec<_>>();
    let before = of("other");
    for service in ["docs", "other"] {
        let policy = json!({
            "service": service, "cron": "* * * * *", "retention_days": 30, "retention_count": 5,
            "destination": "local", "encryption_enabled": true,
        });
        let path = format!("/v1/servers/{}/snapshot-policy", agent.server_id);
        assert_eq!(watched.world.receiver.put(&path, &policy).status, 200);
    }
    let run = wait_for("the schedule's run to wait", Duration::from_secs(100), || of("docs").pop());
    assert_eq!((&run["kind"], &run["directive_id"]), (&json!("cron"), &json!("")), "{run}");
    assert!(agent.cli(&["confirm", "--list"]).ok().contains("the policy's schedule"));
    wait_until("the other service's time to be skipped", Duration::from_secs(100), || {
        files::lines(&agent.log).iter().any(|line| line.contains("schedule_skipped") && line.contains("\"other\""))
    });
    assert_eq!(of("other"), before, "one run waits, and it is the first one");
    watched.assert_untouched();
}

#[test]
fn daemon_that_is_separated_can_confirm_nothing_by_itself() {
    let Some(all) = Separated::started("confirm_separated") else { return };
    let agent = &all.agent;
    agent.cli(&["grants", "confirm", "docs", "snapshot"]).ok();
    let uid = "0198c0de-0000-7000-8000-000000000001";
    assert_eq!(class_of(&all.ask_as(DAEMON, &run_request(uid, "docs", "snapshot"))), "not_confirmed");

    // A root that confirms makes the folder; the daemon's user can neither write nor look into it.
    let refused = uid_of(&asked_on_host(agent));
    say(agent, &json!({"confirm": {"run_uid": refused}}));
    wait_ended(agent, &refused).assert_failed("not_confirmed");
    let run = uid_of(&asked_on_host(agent));
    let own = agent.command(&["confirm", &run]).as_user(Some(DAEMON)).run();
    assert_ne!(own.code, Some(0), "{own}");
    assert_eq!(waiting(agent).len(), 1, "it waits on");
    let folder = agent.state().join("runs/.confirmed");
    for program in ["touch", "ls", "mkdir"] {
        let ended = Cmd::new(program).arg(folder.join(&run)).as_user(Some(DAEMON)).run();
        assert_ne!(ended.code, Some(0), "{ended}");
    }
    assert_eq!(all.notes(), [] as [String; 0], "no hook was called");

    agent.cli(&["confirm", &run]).ok();
    assert_eq!(wait_ended(agent, &run).text("status"), "success");
    assert_eq!(all.notes(), ["pre", "post"]);

    let doctor = agent.cli(&["doctor", "--json"]).any_json();
    for check in doctor["checks"].as_array().expect("checks") {
        let is_units = check["check"] == "separation";
        assert!(
            is_units || check["level"] != "problem",
            "this machine has no units of ours, and else is well: {check}"
        );
    }
    let daemons = agent.command(&["doctor"]).as_user(Some(DAEMON)).run();
    assert!(daemons.stderr.contains("code: not_root"), "{daemons}");
}
