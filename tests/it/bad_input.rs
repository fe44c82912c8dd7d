//! Bad input of every kind: a message that says what to do, exit 64 or a problem document, nothing
//! half-written, and the same command works once the cause is mended.

use std::path::Path;
use std::time::Duration;

use hestner_tests::clock::{let_pass, unix_ms};
use hestner_tests::mounts::Mounted;
use hestner_tests::{Ended, Service, World, files, is_root_or_skips, wait_until};
use serde_json::json;

/// Exit 64, and an error in the three lines that people and scripts rely on.
fn assert_tells(ended: &Ended, code: &str, words: &[&str]) {
    assert_eq!(ended.code, Some(64), "{ended}");
    assert!(ended.stderr.contains("next: "), "no next step: {ended}");
    assert!(ended.stderr.contains(&format!("code: {code}")), "expected code {code}: {ended}");
    for word in words {
        assert!(ended.stderr.contains(word), "the message does not name {word:?}: {ended}");
    }
    assert!(!ended.stderr.contains("panicked"), "{ended}");
}

#[test]
fn settings_with_several_mistakes_have_all_of_them_named_at_once() {
    let world = World::new("bad-settings");
    let mut agent = world.agent().allowed(Service::files("docs", [world.source("source")])).enrolled();
    let good = std::fs::read_to_string(&agent.config).expect("settings");
    files::write(
        &agent.config,
        good.replace("kind = \"folder\"", "kind = \"floppy\"") + "\n[floor]\nretention_count = 0\nno_such_key = 1\n",
    );
    let ended = agent.cli(&["run"]);
    assert_eq!(ended.code, Some(64), "{ended}");
    for word in ["no_such_key", "floppy"] {
        assert!(ended.stderr.contains(word), "not named: {word}: {ended}");
    }
    files::write(&agent.config, &good);
    agent.start();

    let config = world.at("other/receiver.toml");
    files::write(
        &config,
        format!(
            "state_dir = {:?}\nunheard_of = 1\n[listen]\nrest = \"nonsense\"\n[rate_card]\nstorage_gb_month = \"-x\"\n",
            world.at("other/state")
        ),
    );
    let ended = hestner_tests::Cmd::new(hestner_tests::world::bin("hestner-receiver"))
        .arg("--config")
        .arg(&config)
        .arg("serve")
        .run();
    assert_eq!(ended.code, Some(64), "{ended}");
    for word in ["unheard_of", "nonsense", "storage_gb_month"] {
        assert!(ended.stderr.contains(word), "not named: {word}: {ended}");
    }
    assert!(!world.at("other/state/receiver.db").exists(), "mistakes are reported before any effect");
}

#[test]
fn bad_command_lines_exit_with_64_and_say_what_would_be_right() {
    let world = World::new("bad-usage");
    let agent = world.agent().written();
    for args in [&["frobnicate"][..], &["snapshot"], &["runs", "--limit", "many"], &["grants", "allow", "docs"]] {
        let ended = agent.cli(args);
        assert_eq!(ended.code, Some(64), "{ended}");
    }
    for args in [&["frobnicate"][..], &["token", "create"], &["company", "add"], &["apikey", "create", "--label", "x"]]
    {
        let ended = world.receiver.cli(args);
        assert_eq!(ended.code, Some(64), "{ended}");
    }
    for program in ["hestner-agent", "hestner-receiver"] {
        let binary = hestner_tests::world::bin(program);
        let ended = hestner_tests::Cmd::new(&binary).args(["--config", "/no/such/file.toml", "status"]).run();
        assert_eq!(ended.code, Some(64), "{ended}");
        let help = hestner_tests::Cmd::new(&binary).arg("--help").ok();
        assert!(help.contains("Usage"), "{help}");
    }
    let ended = agent.cli(&["snapshot", "docs"]);
    assert_ne!(ended.code, Some(0), "no daemon runs: {ended}");
    assert!(ended.stderr.contains("next: "), "{ended}");
}

#[test]
fn enrolment_with_a_wrong_token_pin_or_fingerprint_leaves_nothing_and_then_works() {
    let world = World::new("bad-enrolment");
    let agent = world.agent().written();
    let token = world.receiver.token(world.company.id, &[]);
    let fingerprint = world.company.fingerprint.as_str();
    let (presented, pin) = token.rsplit_once('_').expect("a pin in the token");
    let flipped = |text: &str| text.chars().map(|c| if c == '0' { '1' } else { '0' }).collect::<String>();

    assert_tells(&agent.enrol_with("nonsense", fingerprint, &[]), "token_malformed", &["hjt_"]);
    let (head, secret) = presented.rsplit_once('_').expect("a secret in the token");
    let wrong_secret = format!("{head}_{}_{pin}", flipped(secret));
    assert_tells(&agent.enrol_with(&wrong_secret, fingerprint, &[]), "token_unknown", &[]);
    let unknown_row = format!("hjt_99999_{secret}_{pin}");
    assert_tells(&agent.enrol_with(&unknown_row, fingerprint, &[]), "token_unknown", &[]);
    let wrong_pin = format!("{presented}_{}", flipped(pin));
    assert_tells(&agent.enrol_with(&wrong_pin, fingerprint, &[]), "ca_pin_mismatch", &[]);
    let other_pin = agent.enrol_with(&token, fingerprint, &["--ca-pin", &flipped(pin)]);
    assert_tells(&other_pin, "ca_pin_mismatch", &[]);
    let wrong_fingerprint = format!("sha256:{}", "0".repeat(32));
    assert_tells(&agent.enrol_with(&token, &wrong_fingerprint, &[]), "recovery_key_mismatch", &[]);
    assert_tells(&agent.enrol_with(&token, "md5:nonsense", &[]), "recovery_fingerprint_malformed", &["md5:nonsense"]);

    assert!(!agent.is_enrolled(), "nothing of an identity is left");
    assert_ne!(agent.cli(&["run"]).code, Some(0), "a daemon without an identity does not start");
    // None of it used the token up.
    agent.enrol_with(&token, fingerprint, &["--ca-pin", pin]).ok();
    assert!(agent.is_enrolled());
}

#[test]
fn used_and_expired_tokens_are_told_apart() {
    let world = World::new("bad-token");
    let token = world.receiver.token(world.company.id, &[]);
    let first = world.agent_named("first").token(&token).enrolled();
    let second = world.agent_named("second").token(&token).written();
    assert_tells(&second.enrol(&[]), "token_used", &[]);

    let created = world
        .receiver
        .cli(&["token", "create", "--company", &world.company.id.to_string(), "--ttl", "1s", "--json"])
        .json();
    let short = created["token"].as_str().expect("a token").to_owned();
    let made = unix_ms();
    wait_until("the token to expire", Duration::from_secs(5), || unix_ms() > made + 1_500);
    assert_tells(&second.enrol_with(&short, &world.company.fingerprint, &[]), "token_expired", &[]);

    assert_tells(&first.enrol(&[]), "already_enrolled", &["server 1"]);
    let servers = world.receiver.get_json(&format!("/v1/companies/{}/servers", world.company.id));
    assert_eq!(hestner_tests::receiver::rows(&servers).len(), 1, "{servers}");
}

#[test]
fn receiver_out_of_reach_is_named_and_enrolment_works_once_it_is_back() {
    let mut world = World::new("bad-unreachable");
    let agent = world.agent().written();
    let address = world.receiver.enrolment().to_string();
    world.receiver.stop();
    assert_tells(&agent.enrol(&[]), "receiver_unreachable", &[&address]);
    assert!(!agent.is_enrolled());
    world.receiver.start();
    agent.enrol(&[]).ok();
    assert!(agent.is_enrolled());
}

#[test]
fn recovery_key_that_is_secret_or_nonsense_is_not_accepted() {
    let world = World::new("bad-recovery");
    let secret = world.company.recovery_secret.to_string_lossy().into_owned();
    let nonsense = files::write(world.at("nonsense.pub"), "age1nonsense").to_string_lossy().into_owned();
    let missing = world.at("missing.pub").to_string_lossy().into_owned();
    for (file, word) in [(&secret, "offline"), (&nonsense, "age1"), (&missing, "missing.pub")] {
        let ended = world.receiver.cli(&["company", "add", "second", "--recovery-key", file]);
        assert_eq!(ended.code, Some(64), "{ended}");
        assert!(ended.stderr.contains("next: ") && ended.stderr.contains(word), "{word}: {ended}");
        let key = std::fs::read_to_string(&secret).expect("a key");
        let key = key.lines().find(|l| l.starts_with("AGE-SECRET-KEY")).expect("a key");
        assert!(!ended.stderr.contains(key), "the secret was printed");
    }
    let companies = world.receiver.get_json("/v1/companies");
    assert_eq!(hestner_tests::receiver::rows(&companies).len(), 1, "{companies}");
}

#[test]
fn unknown_service_and_missing_path_are_named_and_then_work() {
    let world = World::new("bad-service");
    let missing = world.at("not-there");
    let agent = world.agent().allowed(Service::files("docs", [&missing])).started();
    assert_tells(&agent.cli(&["snapshot", "dosc"]), "unknown_service", &["dosc"]);
    assert_tells(&agent.cli(&["snapshot", "docs"]), "source_missing", &["not-there"]);
    assert_tells(&agent.cli(&["restore", "no-such-run", "--target", "/nonexistent"]), "unknown_run", &["no-such-run"]);
    files::write(missing.join("file.txt"), "here now");
    agent.snapshot_ok("docs");

    let path = format!("/v1/servers/{}/snapshots", agent.server_id);
    let reply = world.receiver.post(&path, &json!({"service": "dosc"}));
    if reply.status == 202 {
        let id = reply.json()["id"].as_i64().expect("an id");
        let row = world.receiver.wait_row_ended(agent.server_id, id);
        assert_eq!(row["error_class"], "unknown_service", "{row}");
    } else {
        assert!(reply.status == 404 || reply.status == 422, "{reply:?}");
        assert!(reply.problem().contains("service"), "{reply:?}");
    }
}

#[test]
fn repository_with_a_wrong_key_is_left_alone_and_works_with_the_right_one() {
    let world = World::new("bad-key");
    let agent = world.agent().allowed(Service::files("docs", [world.source("source")])).started();
    let first = agent.snapshot_ok("docs");
    let file = agent.repository("local").password_file;
    let right = std::fs::read_to_string(&file).expect("a password");
    files::write(&file, "0".repeat(right.trim().len()));
    files::set_mode(&file, 0o600);
    assert_tells(&agent.cli(&["snapshot", "docs"]), "repository_wrong_key", &[]);
    files::write(&file, &right);
    files::set_mode(&file, 0o600);
    agent.assert_repository_holds(&[&first]);
    let second = agent.snapshot_ok("docs");
    agent.assert_repository_holds(&[&first, &second]);
}

#[test]
fn lost_password_file_does_not_lead_to_a_second_repository() {
    let world = World::new("bad-lost-key");
    let agent = world.agent().allowed(Service::files("docs", [world.source("source")])).started();
    let first = agent.snapshot_ok("docs");
    let file = agent.repository("local").password_file;
    let right = std::fs::read_to_string(&file).expect("a password");
    std::fs::remove_file(&file).expect("a file");
    let ended = agent.cli(&["snapshot", "docs"]);
    assert_eq!(ended.code, Some(64), "{ended}");
    files::write(&file, &right);
    files::set_mode(&file, 0o600);
    let second = agent.snapshot_ok("docs");
    agent.assert_repository_holds(&[&first, &second]);
}

#[test]
fn repository_that_went_away_is_not_made_anew() {
    let world = World::new("bad-unmounted");
    let agent = world.agent().allowed(Service::files("docs", [world.source("source")])).started();
    let first = agent.snapshot_ok("docs");
    let here = agent.repository_path("local");
    let destination = here.parent().expect("the destination").to_owned();
    let away = world.at("unmounted");
    // As when the destination's disk is not mounted: the folder is gone.
    hestner_tests::Cmd::new("mv").arg(&destination).arg(&away).ok();
    assert_tells(&agent.cli(&["snapshot", "docs"]), "repository_unavailable", &[]);
    hestner_tests::Cmd::new("mv").arg(&away).arg(&destination).ok();
    let second = agent.snapshot_ok("docs");
    agent.assert_repository_holds(&[&first, &second]);
}

#[test]
fn full_destination_fails_the_run_and_the_same_command_works_with_room() {
    if !is_root_or_skips("full_destination_fails_the_run_and_the_same_command_works_with_room") {
        return;
    }
    let world = World::new("bad-full-destination");
    let disk = Mounted::ext4(&world.at("disk"), 128);
    let small = world.source("small");
    let large = world.bulky_source("large", 60_000_000);
    let agent = world
        .agent()
        .destination("local", &disk.path().join("repository"))
        .allowed(Service::files("small", [&small]))
        .allowed(Service::files("large", [&large]))
        .started();
    let first = agent.snapshot_ok("small");
    // Room for a third of it.
    let filler = disk.path().join("filler");
    hestner_tests::Cmd::new("fallocate").args(["-l", "90M"]).arg(&filler).ok();
    assert_tells(&agent.cli(&["snapshot", "large"]), "destination_full", &[]);
    let failed = agent.last_run();
    failed.assert_failed("destination_full");
    agent.assert_repository_holds(&[&first]);

    std::fs::remove_file(&filler).expect("the filler");
    let second = agent.snapshot_ok("large");
    agent.assert_repository_holds(&[&first, &second]);
    let check = agent.repository("local").check();
    assert_eq!(check.code, Some(0), "{check}");
}

/// Fills a filesystem to its last block.
fn fill(folder: &Path) -> std::path::PathBuf {
    let filler = folder.join("filler");
    let of = format!("of={}", filler.display());
    // Ends with an error: that is the point.
    let _ = hestner_tests::Cmd::new("dd").args(["if=/dev/zero", &of, "bs=4k"]).run();
    let of = format!("of={}.last", filler.display());
    let _ = hestner_tests::Cmd::new("dd").args(["if=/dev/zero", &of, "bs=1"]).run();
    filler
}

#[test]
fn full_state_folder_loses_no_report_and_takes_runs_again_with_room() {
    if !is_root_or_skips("full_state_folder_loses_no_report_and_takes_runs_again_with_room") {
        return;
    }
    let mut world = World::new("bad-full-state");
    let disk = Mounted::ext4(&world.at("disk"), 32);
    let source = world.source("source");
    let mut agent =
        world.agent().state(&disk.path().join("state")).allowed(Service::files("docs", [&source])).started();
    world.receiver.stop();
    let first = agent.snapshot_ok("docs");
    let filler = fill(disk.path());
    let ended = agent.cli(&["snapshot", "docs"]);
    assert_tells(&ended, "state_full", &[]);
    assert!(agent.daemon_is_alive(), "a full disk does not end the daemon");

    std::fs::remove_file(&filler).expect("the filler");
    std::fs::remove_file(filler.with_extension("last")).expect("the filler");
    let second = agent.snapshot_ok("docs");
    agent.stop();
    agent.start_alone();
    world.receiver.start();
    agent.wait_connected();
    agent.wait_outbox_empty();
    for run in [&first, &second] {
        let row = world.receiver.wait_run_ended(agent.server_id, run.uid());
        assert_eq!(row["status"], "success", "{row}");
    }
    let booked: Vec<String> = world.receiver.ledger(agent.server_id).into_iter().map(|(uid, _)| uid).collect();
    assert_eq!(booked, [first.uid(), second.uid()]);
    let repository = agent.repository("local");
    assert_eq!(repository.snapshots().len(), 2, "nothing of the run that found no room");
    assert_eq!(repository.locks(), Vec::<String>::new());
}

#[test]
fn rest_answers_bad_requests_with_problem_documents() {
    let world = World::new("bad-rest");
    let agent = world.agent().allowed(Service::files("docs", [world.source("source")])).started();
    let server = agent.server_id;
    let policy = json!({
        "service": "docs", "cron": "0 3 * * *", "retention_days": 7, "retention_count": 3, "destination": "local",
        "encryption_enabled": true,
    });
    let with = |key: &str, value: serde_json::Value| {
        let mut changed = policy.clone();
        changed[key] = value;
        changed.to_string()
    };
    let put = |body: String| ("PUT", format!("/v1/servers/{server}/snapshot-policy"), Some(body));
    let cases = [
        put("{".to_owned()),
        put(with("cron", json!("not a cron"))),
        put(with("cron", json!("99 3 * * *"))),
        put(with("time_zone", json!("Mars/Olympus"))),
        put(with("retention_count", json!(-1))),
        put(with("unheard_of", json!(1))),
        put(json!({"service": "docs"}).to_string()),
        ("POST", format!("/v1/servers/{server}/snapshots"), Some("{}".to_owned())),
        (
            "POST",
            format!("/v1/servers/{server}/snapshots"),
            Some(json!({"service": "docs", "verb": "format"}).to_string()),
        ),
        ("POST", format!("/v1/servers/{server}/snapshots"), Some(json!({"service": "x".repeat(100_000)}).to_string())),
        ("GET", format!("/v1/servers/{server}/overview?range=2h"), None),
        ("GET", format!("/v1/servers/{server}/costs?month=2026-13"), None),
        ("GET", format!("/v1/servers/{server}/snapshots?limit=lots"), None),
        ("GET", "/v1/servers/999999/overview?range=1h".to_owned(), None),
        ("GET", "/v1/nothing/here".to_owned(), None),
        ("DELETE", format!("/v1/servers/{server}/snapshots"), None),
    ];
    for (method, path, body) in cases {
        let reply = world.receiver.request(method, &path, &[], body.as_deref()).expect("an answer");
        let shown = body.unwrap_or_default().chars().take(80).collect::<String>();
        assert!((400..500).contains(&reply.status), "{method} {path} {shown}: {reply:?}");
        reply.problem();
    }
    assert_eq!(world.receiver.runs(server).len(), 0, "nothing was queued");
}

#[test]
fn second_daemon_on_the_same_state_is_refused() {
    let world = World::new("bad-second-daemon");
    let agent = world.agent().allowed(Service::files("docs", [world.source("source")])).started();
    let second = agent.command(&["run"]).within(Duration::from_secs(20)).run();
    assert_ne!(second.code, Some(0), "{second}");
    assert!(second.stderr.contains("next: "), "{second}");
    let_pass(Duration::from_millis(200));
    agent.snapshot_ok("docs");
}
