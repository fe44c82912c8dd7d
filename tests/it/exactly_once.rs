//! Nothing is lost and nothing is doubled: kill either end at any moment, and each run is there once.

use std::collections::BTreeSet;
use std::time::Duration;

use hestner_tests::clock::let_pass;
use hestner_tests::{Agent, Moment, Service, World, processes, wait_for, wait_until};

/// Every run of the host is at the receiver exactly once and ended the same way; each success has one
/// ledger row, nothing else has any.
fn assert_each_run_once(world: &World, agent: &Agent) {
    agent.wait_outbox_empty();
    let runs = agent.runs();
    let rows = world.receiver.runs(agent.server_id);
    let uids: Vec<&str> = rows.iter().filter_map(|row| row["run_uid"].as_str()).collect();
    let unique: BTreeSet<&str> = uids.iter().copied().collect();
    assert_eq!(uids.len(), unique.len(), "doubled: {uids:?}");
    assert_eq!(unique, runs.iter().map(hestner_tests::Run::uid).collect(), "lost or invented");
    for run in &runs {
        let row = rows.iter().find(|row| row["run_uid"] == run.uid()).expect("checked above");
        assert_eq!(row["status"], run.text("status"), "{row}");
        assert_eq!(row["error_class"].as_str().unwrap_or_default(), run.text("error_class"), "{row}");
    }
    let booked: Vec<String> = world.receiver.ledger(agent.server_id).into_iter().map(|(uid, _)| uid).collect();
    let successes = runs.iter().filter(|run| run.text("status") == "success");
    let mut expected: Vec<String> = successes.map(|run| run.uid().to_owned()).collect();
    let mut sorted = booked.clone();
    expected.sort();
    sorted.sort();
    assert_eq!(sorted, expected, "one ledger row a success");
}

fn started_agent(world: &World) -> Agent {
    world.agent().allowed(Service::files("docs", [world.source("source")])).started()
}

#[test]
fn receiver_killed_at_varying_moments_while_runs_stream_has_each_run_once() {
    let mut world = World::new("once-receiver");
    let agent = started_agent(&world);
    for round in 0..6_u64 {
        let snapshot = agent.snapshot_started("docs");
        // From before the run's first report to after its last one.
        let_pass(Duration::from_millis(round * 450));
        world.receiver.kill9();
        let ended = snapshot.ended();
        assert_eq!(ended.code, Some(0), "backups go on while the centre is away: {ended}");
        world.receiver.start();
        agent.wait_connected();
    }
    assert_eq!(agent.runs().len(), 6);
    assert_each_run_once(&world, &agent);
}

#[test]
fn receiver_killed_over_and_over_while_a_backlog_streams_has_each_run_once() {
    let mut world = World::new("once-backlog");
    let agent = started_agent(&world);
    // Runs that fail at once make many reports in little time.
    agent.archiver().fail_at(Moment::Store);
    world.receiver.kill9();
    for _ in 0..12 {
        assert_eq!(agent.snapshot("docs").text("status"), "failed");
    }
    let backlog = agent.status()["outbox_reports"].as_u64().expect("a number");
    assert!(backlog >= 12, "{backlog} reports wait");
    for round in 0..5_u64 {
        world.receiver.start();
        let_pass(Duration::from_millis(round * 120));
        world.receiver.kill9();
    }
    world.receiver.start();
    agent.wait_connected();
    assert_each_run_once(&world, &agent);
}

#[test]
fn agent_killed_with_undelivered_reports_delivers_each_once() {
    let mut world = World::new("once-outbox");
    let mut agent = started_agent(&world);
    world.receiver.kill9();
    agent.snapshot_ok("docs");
    agent.snapshot_ok("docs");
    agent.kill9();
    agent.start_alone();
    assert!(agent.status()["outbox_reports"].as_u64().is_some_and(|waiting| waiting >= 2), "{}", agent.status());
    world.receiver.start();
    agent.wait_connected();
    assert_eq!(agent.runs().len(), 2);
    assert_each_run_once(&world, &agent);
}

#[test]
fn agent_killed_at_varying_moments_of_a_run_ends_it_once() {
    let world = World::new("once-agent");
    let mut agent = started_agent(&world);
    agent.snapshot_ok("docs");
    let mut interrupted = 0;
    for round in 0..6_u64 {
        let asked = agent.cli(&["snapshot", "docs", "--detach", "--json"]).json();
        let_pass(Duration::from_millis(round * 350));
        let below = processes::descendants(agent.pid());
        agent.kill9();
        below.iter().for_each(|process| processes::kill(process.pid));
        agent.start();
        let uid = asked["run_uid"].as_str().unwrap_or_else(|| panic!("no run_uid in {asked}"));
        let run = wait_for("the run to have ended", Duration::from_secs(60), || {
            let run = agent.runs().into_iter().find(|run| run.uid() == uid)?;
            (run.text("status") != "running" && run.text("status") != "queued").then_some(run)
        });
        if run.text("status") == "failed" {
            run.assert_failed("interrupted");
            interrupted += 1;
        }
    }
    assert!(interrupted >= 1, "no kill fell into a run; the moments are badly chosen");
    assert_each_run_once(&world, &agent);
    let good: Vec<_> = agent.runs().into_iter().filter(|run| run.text("status") == "success").collect();
    agent.wait_repository_holds(&good.iter().collect::<Vec<_>>());
}

#[test]
fn agent_takes_runs_and_catches_up_while_the_receiver_is_away() {
    let mut world = World::new("once-away");
    let mut agent = started_agent(&world);
    world.receiver.stop();
    agent.stop();
    // A start without a receiver is a start.
    agent.start_alone();
    assert_eq!(agent.status()["connected"], false);
    let run = agent.snapshot_ok("docs");
    agent.assert_repository_holds(&[&run]);
    world.receiver.start();
    wait_until("the agent to find the receiver again", Duration::from_secs(60), || agent.status()["connected"] == true);
    assert_each_run_once(&world, &agent);
}

#[test]
fn directive_given_while_the_agent_was_away_is_done_once() {
    let mut world = World::new("once-directive");
    let mut agent = started_agent(&world);
    agent.stop();
    let path = format!("/v1/servers/{}/snapshots", agent.server_id);
    let reply = world.receiver.post(&path, &serde_json::json!({"service": "docs"}));
    assert_eq!(reply.status, 202, "{reply:?}");
    let id = reply.json()["id"].as_i64().expect("an id");
    world.receiver.kill9();
    world.receiver.start();
    agent.start();
    let row = world.receiver.wait_row_ended(agent.server_id, id);
    assert_eq!(row["status"], "success", "{row}");
    // Delivered again after a reconnect, it must not run again.
    world.receiver.kill9();
    world.receiver.start();
    agent.wait_connected();
    agent.stop();
    agent.start();
    assert_each_run_once(&world, &agent);
    assert_eq!(agent.runs().len(), 1);
}
