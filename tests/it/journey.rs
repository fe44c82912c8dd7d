//! The main job from end to end: enrol, stream, inventory, snapshot behind a grant, ledger, restore.

use std::time::Duration;

use hestner_tests::restic::FaultyRestic;
use hestner_tests::{Hook, Moment, Service, World, files, processes, tree, wait_for, wait_until};
use serde_json::json;

/// A hook program that adds its arguments to a file as one line.
fn noting_hook(world: &World, notes: &str) -> String {
    let notes = world.at(notes);
    let path = files::write_script(world.at("hooks/note"), &format!("echo \"$*\" >> {}", notes.display()));
    path.to_string_lossy().into_owned()
}

#[test]
fn enrolled_agent_shows_up_with_inventory_grants_and_series() {
    let world = World::new("journey-inventory");
    let agent = world
        .agent()
        .allowed(Service::files("docs", [world.source("source")]))
        .service(Service::files("silent", [world.source("other")]))
        .started();
    let status = agent.status();
    assert_eq!(status["enrolled"], true, "{status}");
    assert_eq!(status["separated"], false, "without units the daemon says that the separation is off: {status}");
    assert_eq!(status["company_id"], world.company.id, "{status}");

    let server = agent.server_id;
    let services = wait_for("the inventory", Duration::from_secs(20), || {
        let rows = hestner_tests::receiver::rows(&world.receiver.get_json(&format!("/v1/servers/{server}/services")));
        (rows.len() >= 2).then_some(rows)
    });
    for name in ["docs", "silent"] {
        let service = services.iter().find(|s| s["name"] == name).unwrap_or_else(|| panic!("no {name}: {services:?}"));
        assert_eq!(service["runtime"], "files", "{service}");
    }

    let servers = world.receiver.get_json(&format!("/v1/companies/{}/servers", world.company.id));
    let servers = hestner_tests::receiver::rows(&servers);
    assert_eq!(servers.len(), 1, "{servers:?}");
    assert_eq!(servers[0]["id"], server, "{servers:?}");

    wait_until("a heartbeat in the stored series", Duration::from_secs(30), || {
        let overview = world.receiver.get_json(&format!("/v1/servers/{server}/overview?range=1h"));
        overview["series"].as_array().is_some_and(|series| !series.is_empty())
    });
}

#[test]
fn snapshot_with_hooks_is_stored_recorded_booked_once_and_restores_the_same_tree() {
    let world = World::new("journey-cli");
    let note = noting_hook(&world, "notes.txt");
    let source = world.source("source");
    let agent = world
        .agent()
        .allowed(Service::files("docs", [&source]).hook(Hook::new("db").pre(&[&note, "pre"]).post(&[&note, "post"])))
        .started();

    let run = agent.snapshot_ok("docs");
    assert_eq!(files::lines(&world.at("notes.txt")), ["pre", "post"]);
    assert_eq!(run.number("files"), 20, "{run:?}");
    assert_eq!(run.text("consistency_achieved"), "none", "a live tree has no point in time: {run:?}");
    assert_eq!(run.text("checksum").len(), 64, "{run:?}");
    assert!(run.text("artifact_url").starts_with("restic:local/"), "{run:?}");
    assert!(run.number("verified_at_ms") > 0 && run.number("bytes_stored") > 0, "{run:?}");

    agent.assert_repository_holds(&[&run]);
    let check = agent.repository("local").check();
    assert_eq!(check.code, Some(0), "{check}");
    let target = world.at("restored");
    agent.restore(run.uid(), &target).ok();
    tree::assert_same(&source, &tree::restored(&target, &source));
    agent.cli(&["verify", run.uid()]).ok();

    let row = world.receiver.wait_run_ended(agent.server_id, run.uid());
    assert_eq!((&row["status"], &row["kind"]), (&json!("success"), &json!("manual")), "{row}");
    assert_eq!(row["checksum"], run.text("checksum"), "{row}");
    let ledger = world.receiver.ledger(agent.server_id);
    assert_eq!(ledger.len(), 1, "{ledger:?}");
    assert_eq!(ledger[0].0, run.uid());
}

#[test]
fn snapshot_asked_for_at_the_centre_runs_once_and_costs_show_it() {
    let world = World::new("journey-rest");
    let agent = world.agent().allowed(Service::files("docs", [world.source("source")])).started();
    let path = format!("/v1/servers/{}/snapshots", agent.server_id);

    let body = json!({"service": "docs"}).to_string();
    let ask = || {
        let headers = [("idempotency-key", "the-same-wish")];
        world.receiver.request("POST", &path, &headers, Some(&body)).expect("an answer")
    };
    let (first, second) = (ask(), ask());
    assert_eq!((first.status, second.status), (202, 202), "{first:?} {second:?}");
    assert!(first.header("location").is_some_and(|l| l.contains("/v1/servers/")), "{first:?}");
    let id = first.json()["id"].as_i64().expect("an id");
    assert_eq!(second.json()["id"], id, "the same key is the same run");

    let row = world.receiver.wait_row_ended(agent.server_id, id);
    assert_eq!((&row["status"], &row["kind"]), (&json!("success"), &json!("manual")), "{row}");
    assert_eq!(agent.runs().len(), 1, "done once");

    let day = row["finished_at"].as_str().map(|time| time[..7].to_owned());
    let month = day.unwrap_or_else(|| panic!("no finished_at in {row}"));
    let costs = world.receiver.get_json(&format!("/v1/servers/{}/costs?month={month}", agent.server_id));
    assert_eq!(costs["currency"], "EUR", "{costs}");
    assert!(costs.to_string().contains(row["run_uid"].as_str().expect("a uid")), "{costs}");
    assert_eq!(world.receiver.ledger(agent.server_id).len(), 1);
}

#[test]
fn policy_travels_to_the_host_and_its_schedule_fires() {
    let world = World::new("journey-cron");
    let agent = world.agent().allowed(Service::files("docs", [world.source("source")])).started();
    let path = format!("/v1/servers/{}/snapshot-policy", agent.server_id);
    let policy = json!({
        "service": "docs", "cron": "* * * * *", "time_zone": "America/Sao_Paulo", "retention_days": 7,
        "retention_count": 3, "destination": "local", "encryption_enabled": true,
    });
    let reply = world.receiver.put(&path, &policy);
    assert_eq!(reply.status, 200, "{reply:?}");
    wait_until("the host to apply the policy", Duration::from_secs(20), || {
        let policies = hestner_tests::receiver::rows(&world.receiver.get_json(&path));
        policies.len() == 1 && policies[0]["state"] == "applied"
    });
    let run = wait_for("the schedule to fire", Duration::from_secs(100), || {
        agent.runs().into_iter().find(|run| run.text("kind") == "cron" && run.text("status") == "success")
    });
    let row = world.receiver.wait_run_ended(agent.server_id, run.uid());
    assert_eq!((&row["kind"], &row["status"]), (&json!("cron"), &json!("success")), "{row}");
}

/// Applies a policy that keeps the newest two runs of `docs`.
fn keep_two(world: &World, server: i64) {
    let path = format!("/v1/servers/{server}/snapshot-policy");
    let policy = json!({
        "service": "docs", "cron": "", "retention_days": 0, "retention_count": 2, "destination": "local",
        "encryption_enabled": true,
    });
    let reply = world.receiver.put(&path, &policy);
    assert_eq!(reply.status, 200, "{reply:?}");
    wait_until("the policy to be applied", Duration::from_secs(20), || {
        let policies = hestner_tests::receiver::rows(&world.receiver.get_json(&path));
        assert_ne!(policies[0]["state"], "refused", "{policies:?}");
        policies[0]["state"] == "applied"
    });
}

#[test]
fn retention_keeps_the_newest_two_where_the_host_allows_pruning_and_all_where_not() {
    let world = World::new("journey-retention");
    let source = world.source("source");
    let builder = world.agent().allowed(Service::files("docs", [&source]));
    let mut agent = builder.started();
    keep_two(&world, agent.server_id);
    let take = |agent: &hestner_tests::Agent, number: usize| {
        files::write(source.join("changing.txt"), format!("version {number}"));
        agent.snapshot_ok("docs")
    };
    let first: Vec<_> = (0..3).map(|number| take(&agent, number)).collect();
    agent.assert_repository_holds(&first.iter().collect::<Vec<_>>());

    agent.stop();
    agent.change(|builder| builder.grant("docs", "prune", "allow"));
    agent.start();
    let fourth = take(&agent, 3);
    wait_until("retention to have removed the older ones", Duration::from_secs(60), || {
        agent.repository("local").snapshots().len() == 2
    });
    agent.wait_outbox_empty();
    agent.assert_repository_holds(&[&first[2], &fourth]);
    assert_ne!(agent.restore(first[0].uid(), &world.at("gone")).code, Some(0), "what is gone cannot be restored");
    let row = world.receiver.wait_run_ended(agent.server_id, first[0].uid());
    assert!(!row["expired_at"].is_null(), "the receiver knows that it is gone: {row}");
    assert_eq!(world.receiver.ledger(agent.server_id).len(), 4, "one row a run, also of those that expired");
}

#[test]
fn retention_that_fails_leaves_the_run_good_and_is_done_after_the_next_one() {
    let world = World::new("journey-retention-fails");
    let service = Service::files("docs", [world.source("source")]);
    let agent = world.agent().allowed(service).grant("docs", "prune", "allow").started();
    let archiver = agent.archiver();
    keep_two(&world, agent.server_id);
    let (first, second) = (agent.snapshot_ok("docs"), agent.snapshot_ok("docs"));
    archiver.fail_at(Moment::Expire);
    let third = agent.snapshot_ok("docs");
    assert!(third.0["warnings"].to_string().contains("retention"), "{third:?}");
    agent.assert_repository_holds(&[&first, &second, &third]);
    archiver.go_on();
    let fourth = agent.snapshot_ok("docs");
    agent.assert_repository_holds(&[&third, &fourth]);
}

#[test]
fn removal_of_data_is_called_off_when_the_agent_is_told_to_stop_and_done_after_the_next_run() {
    let world = World::new("journey-retention-stops");
    let folder = world.at("restic");
    let restic = FaultyRestic::new(&folder);
    let builder = world.agent().allowed(Service::files("docs", [world.source("source")])).restic(&restic);
    let mut agent = builder.grant("docs", "prune", "allow").started();
    keep_two(&world, agent.server_id);
    let (_, second) = (agent.snapshot_ok("docs"), agent.snapshot_ok("docs"));
    let asked = "trap 'touch \"$HERE/asked\"; exit 130' INT; touch \"$HERE/pruning\"; while :; do sleep 0.1; done";
    restic.on("prune", asked);
    let taking = agent.snapshot_started("docs");
    wait_until("restic to prune", Duration::from_secs(60), || folder.join("pruning").exists());
    let runner = agent.wait_part("runner");
    agent.stop();
    // One that is killed in the end lives for twenty seconds.
    wait_until("the runner to end", Duration::from_secs(15), || !processes::is_alive(runner.pid));
    assert!(folder.join("asked").exists(), "restic was asked to end, so that its lock goes");
    assert_ne!(taking.ended().code, Some(0), "nobody told it of an end");
    restic.heal("prune");
    agent.start();
    let third = agent.wait_last_run_ended();
    assert_eq!(third.text("status"), "success", "{third:?}");
    assert!(third.0["warnings"].to_string().contains("the data of removed artifacts stays"), "{third:?}");
    agent.assert_repository_holds(&[&second, &third]);
    let fourth = agent.snapshot_ok("docs");
    assert_eq!(fourth.0["warnings"], json!([]), "{fourth:?}");
    agent.assert_repository_holds(&[&third, &fourth]);
}

#[test]
fn second_snapshot_of_an_unchanged_tree_stores_next_to_nothing() {
    let world = World::new("journey-unchanged");
    let agent = world.agent().allowed(Service::files("docs", [world.bulky_source("source", 4_000_000)])).started();
    let first = agent.snapshot_ok("docs");
    assert!(first.number("bytes_stored") > 3_900_000, "{first:?}");
    let second = agent.snapshot_ok("docs");
    assert!(second.number("bytes_stored") < 20_000, "{second:?}");
    assert_eq!(second.number("size_bytes"), first.number("size_bytes"));
    assert_ne!(second.uid(), first.uid());
    agent.assert_repository_holds(&[&first, &second]);
}

#[test]
fn snapshots_of_stock_restic_lie_beside_ours_and_both_go_on() {
    let world = World::new("journey-beside");
    let source = world.bulky_source("source", 4_000_000);
    let before = tree::manifest(&source);
    let service = Service::files("docs", [&source]);
    let agent = world.agent().allowed(service).grant("docs", "prune", "allow").started();
    let first = agent.snapshot_ok("docs");
    let repository = agent.repository("local");
    let stored = || repository.stock(&["stats", "--mode", "raw-data", "--json"]).run().json()["total_size"].clone();
    let bytes = stored().as_u64().expect("bytes");
    let by_stock = || {
        repository.stock(&["backup", "--tag", "theirs", source.to_str().expect("UTF-8")]).ok();
        let theirs = |s: &&serde_json::Value| s["tags"] == json!(["theirs"]);
        repository.snapshots().iter().rfind(theirs).map(|s| s["id"].as_str().expect("an id").to_owned())
    };
    let theirs = by_stock().expect("a snapshot of stock restic");
    let second = agent.snapshot_ok("docs");
    assert!(stored().as_u64() < Some(bytes + 100_000), "nothing is stored twice");
    let difference = repository.stock(&["diff", "--metadata", &theirs, &second.snapshot_id()]).ok();
    assert!(difference.contains("Files:           0 new,     0 removed,     0 changed"), "{difference}");

    // Retention counts and removes ours only.
    keep_two(&world, agent.server_id);
    agent.snapshot_ok("docs");
    let third = by_stock().expect("a snapshot of stock restic");
    let held: Vec<String> = repository.snapshots().iter().map(|s| s["id"].as_str().expect("an id").into()).collect();
    assert!(!held.contains(&first.snapshot_id()), "{held:?}");
    for kept in [&theirs, &third, &second.snapshot_id()] {
        assert!(held.contains(kept), "{kept} of {held:?}");
        let target = world.at(&format!("by-restic-{kept}"));
        repository.restore(kept, &target);
        tree::assert_same_manifest(&before, &tree::manifest(&tree::restored(&target, &source)));
    }
    let target = world.at("by-hestner");
    agent.restore(second.uid(), &target).ok();
    tree::assert_same_manifest(&before, &tree::manifest(&tree::restored(&target, &source)));
    agent.cli(&["verify", second.uid()]).ok();
    let check = repository.check();
    assert_eq!(check.code, Some(0), "{check}");
}

#[test]
fn stream_of_a_program_is_stored_as_one_file() {
    let world = World::new("journey-stream");
    let argv = ["/bin/sh", "-c", "seq 1 200000"];
    let agent = world.agent().allowed(Service::command("dump", &argv, "numbers.sql")).started();
    let run = agent.snapshot_ok("dump");
    assert_eq!(run.text("scope"), "db", "{run:?}");
    let target = world.at("restored");
    agent.restore(run.uid(), &target).ok();
    let found = hestner_tests::Cmd::new("find").arg(&target).args(["-name", "numbers.sql"]).ok();
    let lines = files::lines(std::path::Path::new(found.trim()));
    assert_eq!((lines.len(), lines.last().map(String::as_str)), (200_000, Some("200000")));
}

#[test]
fn wrapped_key_in_the_repository_opens_it_with_the_recovery_key_alone() {
    let world = World::new("journey-recovery");
    let source = world.source("source");
    let agent = world.agent().allowed(Service::files("docs", [&source])).started();
    let run = agent.snapshot_ok("docs");
    // The host is gone: only the repository and the recovery key's secret half are left.
    let repository = agent.repository("local");
    let wrapped = repository.path.join("hestner-key.age");
    let password = hestner_tests::Cmd::new("age").arg("-d").arg("-i").arg(&world.company.recovery_secret).arg(wrapped);
    let password_file = files::write(world.at("recovered.password"), password.ok());
    drop(agent);
    let opened = hestner_tests::restic::Repository { path: repository.path, password_file };
    let target = world.at("restored");
    opened.restore(&run.snapshot_id(), &target);
    tree::assert_same(&source, &tree::restored(&target, &source));
}

#[test]
fn dry_run_prints_the_plan_and_does_nothing() {
    let world = World::new("journey-dry-run");
    let note = noting_hook(&world, "notes.txt");
    let service = Service::files("docs", [world.source("source")]).hook(Hook::new("db").pre(&[&note, "pre"]));
    let agent = world.agent().allowed(service).started();
    let plan = agent.cli(&["snapshot", "docs", "--dry-run"]).ok();
    assert!(plan.contains("pre_freeze") && plan.contains("archive"), "{plan}");
    assert!(!world.at("notes.txt").exists(), "no hook ran");
    assert_eq!(agent.runs().len(), 0);
}

#[test]
fn progress_of_a_running_archive_is_seen_at_the_centre() {
    let world = World::new("journey-progress");
    let source = world.at("source");
    for number in 0..120 {
        files::write(source.join(format!("part-{number}.bin")), files::random_bytes(1_000_000));
    }
    let agent = world.agent().allowed(Service::files("docs", [source]).worker_line("threads = 1")).started();
    let archiver = agent.archiver();
    archiver.hold_at(Moment::Pack(2));
    let snapshot = agent.snapshot_started("docs");
    let running = wait_for("progress at the receiver", Duration::from_secs(60), || {
        let run = world.receiver.runs(agent.server_id).into_iter().next()?;
        let progress = |what: &str| run["progress"][what].as_u64().unwrap_or(0);
        (progress("bytes_done") > 0 && progress("files_done") > 0).then_some(run)
    });
    assert_eq!(
        (&running["status"], &running["progress"]["phase"]),
        (&json!("running"), &json!("archive")),
        "{running}"
    );
    let done = running["progress"]["bytes_done"].as_u64();
    assert!(done.is_some_and(|done| done < 120_000_000), "it is under way: {running}");
    archiver.go_on();
    assert_eq!(snapshot.run().text("status"), "success");
}
