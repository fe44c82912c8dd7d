//! Faults and edges of taking in reports: repetition, gaps, forks, bounds, heartbeats. Those of runs are in [`runs`].
//!
//! Everything runs on a real store in a temporary folder with a clock that stands still at a known noon. Faults are
//! made with triggers in the database, so that the code under test has no hooks for them.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hestner_proto::v1;
use proptest::prelude::*;
use prost::Message as _;
use sqlx::{Connection as _, SqliteConnection};

use super::heartbeats::Flusher;
use super::*;
use crate::lifecycle::{Drain, Tasks};
use crate::model::Actor;
use crate::model::counters::Counters;
use crate::platform::clock::ManualClock;
use crate::store::audit::Verdict as Audit;
use crate::store::directives::{Kind, NewDirective};

mod runs;

/// 2026-11-22 12:00 UTC, in a month of 30 days.
const NOON_MS: i64 = 1_795_348_800_000;

struct World {
    folder: tempfile::TempDir,
    store: Store,
    sessions: Sessions,
    clock: Arc<ManualClock>,
    counters: SharedCounters,
    inlet: Inlet,
    tasks: Tasks,
    /// What each server's session has shown.
    shown: Mutex<HashMap<i64, i64>>,
}

impl World {
    /// Two companies with one server each; the ingest task runs.
    async fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path()).await.expect("opened");
        let mut tx = store.begin().await.expect("begun");
        for (company, key) in [("acme", "k1"), ("beta", "k2")] {
            let id = tx.add_company(company, "age1x", "sha256:x", 1).await.expect("added").expect("new");
            tx.add_server(id, company, key, "0", 1).await.expect("added");
        }
        tx.commit().await.expect("committed");
        let sessions = Sessions::default();
        let clock = ManualClock::at(NOON_MS);
        let counters: SharedCounters = Arc::new(Counters::default());
        let card = RateCard { currency: "EUR".into(), storage_gb_month: "0.0500".parse().expect("a price") };
        let (inlet, worker) = new(store.clone(), sessions.clone(), card, clock.clone(), counters.clone());
        let tasks = Tasks::new(Drain::default());
        tasks.spawn("ingest", worker.run(tasks.pulse("ingest"), tasks.drain().clone()));
        Self { folder, store, sessions, clock, counters, inlet, tasks, shown: Mutex::default() }
    }

    async fn sql(&self, statement: &'static str) {
        sqlx::query(statement).execute(&mut self.raw().await).await.expect("executed");
    }

    async fn text(&self, query: &'static str) -> String {
        sqlx::query_scalar::<_, Option<String>>(query)
            .fetch_one(&mut self.raw().await)
            .await
            .expect("read")
            .unwrap_or_default()
    }

    async fn count(&self, query: &'static str) -> i64 {
        sqlx::query_scalar(query).fetch_one(&mut self.raw().await).await.expect("read")
    }

    async fn raw(&self) -> SqliteConnection {
        let path: PathBuf = self.folder.path().join(store::FILE_NAME);
        SqliteConnection::connect(&format!("sqlite://{}", path.display())).await.expect("opened")
    }

    /// In a session of its own.
    async fn submit(&self, server: i64, envelopes: Vec<v1::Envelope>) -> Result<(Verdict, Option<BadReport>), Error> {
        self.inlet.submit(origin(server), envelopes).await
    }

    /// What is acknowledged in the one session that a server has with this function.
    async fn acked(&self, server: i64, envelopes: Vec<v1::Envelope>) -> u64 {
        let shown = self.shown.lock().expect("no panic").get(&server).copied().unwrap_or(0);
        let submitted = self.inlet.submit(Origin { shown, ..origin(server) }, envelopes).await;
        let (verdict, bad) = submitted.expect("taken in");
        assert_eq!(bad, None);
        self.shown.lock().expect("no panic").insert(server, verdict.shown);
        verdict.ack.unwrap_or(0)
    }

    async fn add_directive(&self, server: i64, id: &str) {
        let mut tx = self.store.begin().await.expect("begun");
        let server = ServerId(server);
        let new = NewDirective {
            id,
            server,
            kind: Kind::Run,
            service: "docs",
            verb: "snapshot",
            created_at_ms: NOON_MS,
            expires_at_ms: NOON_MS + 1000,
        };
        tx.add_directive(&new).await.expect("added");
        tx.add_queued_run(server, "docs", id, NOON_MS).await.expect("added");
        tx.commit().await.expect("committed");
    }
}

fn origin(server: i64) -> Origin {
    Origin {
        server: ServerId(server),
        company: CompanyId(server),
        peer: format!("192.0.2.{server}:1"),
        epoch: "e".into(),
        shown: 0,
    }
}

fn envelope(seq: u64, body: v1::report::Body) -> v1::Envelope {
    let body = v1::Report { recorded_at_ms: 1, body: Some(body) }.encode_to_vec();
    let sha256 = hex::decode(hestner_proto::sha256::hex(&body)).expect("hex");
    v1::Envelope { epoch: "e".into(), seq, sha256, body }
}

fn run(run_uid: &str, status: &str) -> v1::Run {
    let done = status == "success" || status == "failed";
    v1::Run {
        run_uid: run_uid.into(),
        service: "docs".into(),
        kind: "manual".into(),
        status: status.into(),
        started_at_ms: NOON_MS - 1000,
        finished_at_ms: if done { NOON_MS } else { 0 },
        repository_id: if status == "success" { "r1".into() } else { String::new() },
        repository_bytes: if status == "success" { 3_000_000_000 } else { 0 },
        ..v1::Run::default()
    }
}

fn report(seq: u64, run: v1::Run) -> v1::Envelope {
    envelope(seq, v1::report::Body::Run(run))
}

fn usage(seq: u64) -> v1::Envelope {
    let hour_start_ms = i64::try_from(seq).expect("small") * 3_600_000;
    envelope(seq, v1::report::Body::Usage(v1::Usage { hour_start_ms, ..v1::Usage::default() }))
}

fn outcome(seq: u64, directive_id: &str, code: &str) -> v1::Envelope {
    envelope(
        seq,
        v1::report::Body::DirectiveOutcome(v1::DirectiveOutcome {
            directive_id: directive_id.into(),
            accepted: code.is_empty(),
            code: code.into(),
            message: "because".into(),
        }),
    )
}

#[tokio::test]
async fn a_report_that_comes_twice_is_stored_once_and_acknowledged_twice() {
    let world = World::new().await;
    for _ in 0..2 {
        assert_eq!(world.acked(1, vec![report(1, run("a", "success"))]).await, 1);
    }
    assert_eq!(world.count("SELECT count(*) FROM snapshot_runs").await, 1);
    assert_eq!(world.count("SELECT count(*) FROM cost_ledger").await, 1);
    assert_eq!((world.counters.reports_committed.total(), world.counters.reports_repeated.total()), (1, 1));
}

#[tokio::test]
async fn an_acknowledgement_never_passes_a_gap() {
    let world = World::new().await;
    assert_eq!(world.acked(1, vec![usage(2)]).await, 0);
    assert_eq!(world.acked(1, vec![usage(1), usage(5)]).await, 2);
    assert_eq!(world.acked(1, vec![usage(4)]).await, 2);
    assert_eq!(world.acked(1, vec![usage(3)]).await, 5);
}

#[tokio::test]
async fn a_number_with_another_content_quarantines_the_server_and_is_never_acknowledged() {
    let world = World::new().await;
    world.acked(1, vec![report(1, run("a", "success"))]).await;
    let clone = Origin { peer: "198.51.100.9:9".into(), ..origin(1) };
    let forged = vec![report(1, run("b", "success")), usage(2)];
    let (verdict, _) = world.inlet.submit(clone, forged).await.expect("answered");
    assert_eq!(verdict, Verdict { ack: None, shown: 0, forked: true });
    assert_eq!(world.text("SELECT status FROM servers WHERE id = 1").await, "quarantined");
    assert_eq!(world.count("SELECT count(*) FROM snapshot_runs").await, 1);
    let audit = world.text("SELECT details_json FROM audit WHERE action = 'server_quarantined'").await;
    for named in ["192.0.2.1:1", "198.51.100.9:9", "\"first\"", "\"second\"", "sha256"] {
        assert!(audit.contains(named), "{named} in {audit}");
    }
    assert!(matches!(world.store.verify_audit().await, Ok(Audit::Whole { .. })));
}

#[tokio::test]
async fn a_fork_behind_a_repeated_report_leaves_everything_of_it_unacknowledged() {
    let world = World::new().await;
    world.acked(1, (1..=10).map(usage).collect()).await;
    // A machine that was set back to its report 5 and has written others since.
    let (verdict, _) = world.submit(1, vec![usage(5), report(6, run("other", "success"))]).await.expect("answered");
    assert_eq!(verdict, Verdict { ack: None, shown: 5, forked: true });
}

#[tokio::test]
async fn an_acknowledgement_never_passes_what_the_session_has_shown() {
    let world = World::new().await;
    world.acked(1, (1..=10).map(usage).collect()).await;
    let (verdict, _) = world.submit(1, vec![usage(1), usage(2)]).await.expect("answered");
    assert_eq!(verdict.ack, Some(2));
}

#[tokio::test]
async fn an_inventory_beyond_its_bounds_is_refused_and_rows_of_gone_services_do_not_pile_up() {
    let world = World::new().await;
    let server = ServerId(1);
    let services = |count: usize| {
        (0..count).map(|n| v1::Service { name: format!("s{n}"), ..v1::Service::default() }).collect::<Vec<_>>()
    };
    let grant = |n: usize| v1::Grant { service: format!("s{n}"), ..v1::Grant::default() };
    for too_large in [
        v1::Inventory { services: services(5_001), ..v1::Inventory::default() },
        v1::Inventory { grants: (0..50_001).map(grant).collect(), ..v1::Inventory::default() },
        v1::Inventory { destinations: vec!["d".into(); 101], ..v1::Inventory::default() },
    ] {
        assert!(world.inlet.inventory(server, &too_large).await.is_err());
    }
    world.sql("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 12000) INSERT INTO services (server_id, name, runtime, version, health, consistency, gone_at_ms) SELECT 1, 'old' || i, '', '', '', '', i FROM n").await;
    world
        .inlet
        .inventory(server, &v1::Inventory { services: services(3), ..v1::Inventory::default() })
        .await
        .expect("fine");
    assert_eq!(world.count("SELECT count(*) FROM services WHERE server_id = 1").await, 5_003);
    assert_eq!(world.count("SELECT min(gone_at_ms) FROM services").await, 7_001);
    let hash = v1::Inventory { hash: "h".repeat(100_000), ..v1::Inventory::default() };
    world.inlet.inventory(server, &hash).await.expect("fine");
    assert_eq!(world.count("SELECT length(inventory_hash) FROM servers WHERE id = 1").await, 128);
}

#[tokio::test]
async fn a_ping_fails_when_nothing_can_be_written() {
    let world = World::new().await;
    assert!(world.inlet.ping().await);
    world.sql("CREATE TRIGGER full BEFORE UPDATE ON worker_pulse BEGIN SELECT RAISE(ABORT, 'disk full'); END").await;
    assert!(!world.inlet.ping().await);
}

#[tokio::test]
async fn a_body_that_cannot_be_read_is_kept_and_holds_up_nothing_behind_it() {
    let world = World::new().await;
    let garbage = vec![0xff, 0xff];
    let sha256 = hex::decode(hestner_proto::sha256::hex(&garbage)).expect("hex");
    let unreadable = v1::Envelope { epoch: "e".into(), seq: 2, sha256, body: garbage };
    let paused = report(4, run("newer", "paused"));
    assert_eq!(world.acked(1, vec![usage(1), unreadable.clone(), usage(3), paused, usage(5)]).await, 5);
    assert_eq!(world.acked(1, vec![unreadable]).await, 5);
    assert_eq!(world.text("SELECT group_concat(seq) FROM unreadable_reports").await, "2,4");
    assert_eq!(world.text("SELECT hex(body) FROM unreadable_reports WHERE seq = 2").await, "FFFF");
    assert!(world.text("SELECT why FROM unreadable_reports WHERE seq = 4").await.contains("`paused`"));
    assert_eq!(world.counters.reports_unreadable.total(), 2);
}

#[tokio::test]
async fn a_wrong_hash_or_another_outbox_stops_there_and_what_came_before_counts() {
    let world = World::new().await;
    let wrong_hash = v1::Envelope { sha256: vec![0; 32], ..usage(2) };
    let other_outbox = v1::Envelope { epoch: "other".into(), ..usage(2) };
    for bad in [wrong_hash, other_outbox] {
        let (verdict, refused) = world.submit(1, vec![usage(1), bad, usage(3)]).await.expect("answered");
        assert_eq!(verdict.ack, Some(1));
        assert_eq!(refused.expect("named").seq, 2);
    }
    assert_eq!(world.counters.messages_bad.total(), 2);
}

#[tokio::test]
async fn many_submissions_at_once_share_few_commits() {
    let world = World::new().await;
    let mut waiting = tokio::task::JoinSet::new();
    for n in 0..200_u64 {
        let inlet = world.inlet.clone();
        waiting.spawn(async move {
            let epoch = format!("e{n}");
            let envelope = v1::Envelope { epoch: epoch.clone(), ..usage(1) };
            inlet.submit(Origin { epoch, ..origin(1) }, vec![envelope]).await.expect("taken in").0.ack
        });
    }
    assert_eq!(waiting.join_all().await.into_iter().flatten().sum::<u64>(), 200);
    assert!(world.counters.report_commits.total() <= 50, "{} commits", world.counters.report_commits.total());
}

#[tokio::test]
async fn heartbeats_are_written_in_one_transaction_and_old_samples_go() {
    let world = World::new().await;
    world.sql("INSERT INTO server_samples SELECT 1, 5, 1, 0,0,0,0, 0,0,0,0,0,0,0,0,0").await;
    let (flusher, _pulse) = Flusher::new(
        world.store.clone(),
        world.sessions.clone(),
        Duration::from_secs(60),
        world.clock.clone(),
        world.counters.clone(),
    );
    for beat in 0..60 {
        for server in [1, 2] {
            let heard = v1::Heartbeat { load1: f64::from(beat), ..v1::Heartbeat::default() };
            world.sessions.beat(ServerId(server), &heard, NOON_MS + i64::from(beat) * 1000);
        }
    }
    flusher.flush().await;
    flusher.flush().await;
    assert_eq!(world.counters.heartbeat_flushes.total(), 1);
    assert_eq!(world.count("SELECT count(*) FROM server_samples").await, 2);
    assert_eq!(world.count("SELECT CAST(load1 * 10 AS INTEGER) FROM server_samples WHERE server_id = 2").await, 295);
    assert_eq!(world.count("SELECT count(*) FROM servers WHERE last_seen_ms IS NOT NULL").await, 2);
}

#[tokio::test]
async fn a_ping_makes_the_round_trip_while_the_task_lives_and_fails_after() {
    let world = World::new().await;
    assert!(world.inlet.ping().await);
    world.tasks.drain().begin();
    assert_eq!(world.tasks.finish(std::future::pending()).await, Ok(()));
    assert!(!world.inlet.ping().await);
    assert!(matches!(world.submit(1, vec![usage(1)]).await, Err(Error::Stopping)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// A model of ten lines: the set of numbers that came; the ack is the end of its first block.
    #[test]
    fn acknowledgements_follow_the_model(batches in prop::collection::vec(prop::collection::vec(1_u64..20, 1..8), 1..12)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let world = World::new().await;
            let mut came = std::collections::BTreeSet::new();
            for batch in batches {
                came.extend(batch.iter().copied());
                let acked = world.acked(1, batch.into_iter().map(usage).collect()).await;
                let expected = (1..).take_while(|seq| came.contains(seq)).last().unwrap_or(0);
                assert_eq!(acked, expected);
            }
        });
    }
}
