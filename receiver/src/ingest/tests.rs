//! Faults and edges of taking in reports: repetition, gaps, forks, failing transactions, foreign directives.
//!
//! Everything runs on a real store in a temporary folder with a clock that stands still at a known noon. Faults are
//! made with triggers in the database, so that the code under test has no hooks for them.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hestner_proto::v1;
use proptest::prelude::*;
use prost::Message as _;
use rust_decimal::Decimal;
use sqlx::{Connection as _, SqliteConnection};

use super::heartbeats::Flusher;
use super::*;
use crate::lifecycle::{Drain, Tasks};
use crate::model::Actor;
use crate::model::counters::Counters;
use crate::platform::clock::ManualClock;
use crate::store::audit::Verdict as Audit;
use crate::store::directives::{Kind, NewDirective};

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
        tasks.spawn("ingest", worker.run(tasks.drain().clone()));
        Self { folder, store, sessions, clock, counters, inlet, tasks }
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

    async fn submit(&self, server: i64, envelopes: Vec<v1::Envelope>) -> Result<(Verdict, Option<BadReport>), Error> {
        self.inlet.submit(origin(server), envelopes).await
    }

    /// The number up to which everything of epoch `e` is acknowledged.
    async fn acked(&self, server: i64, envelopes: Vec<v1::Envelope>) -> u64 {
        let (verdict, bad) = self.submit(server, envelopes).await.expect("taken in");
        assert_eq!(bad, None);
        verdict.acks.first().map_or(0, |(_, seq)| *seq)
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
    Origin { server: ServerId(server), company: CompanyId(server), peer: format!("192.0.2.{server}:1") }
}

fn envelope(seq: u64, body: v1::report::Body) -> v1::Envelope {
    let body = v1::Report { recorded_at_ms: 1, body: Some(body) }.encode_to_vec();
    let sha256 = hex::decode(hestner_proto::sha256_hex(&body)).expect("hex");
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
    assert_eq!(verdict, Verdict { acks: vec![], forked: true });
    assert_eq!(world.text("SELECT status FROM servers WHERE id = 1").await, "quarantined");
    assert_eq!(world.count("SELECT count(*) FROM snapshot_runs").await, 1);
    let audit = world.text("SELECT details_json FROM audit WHERE action = 'server_quarantined'").await;
    for named in ["192.0.2.1:1", "198.51.100.9:9", "\"first\"", "\"second\"", "sha256"] {
        assert!(audit.contains(named), "{named} in {audit}");
    }
    assert!(matches!(world.store.verify_audit().await, Ok(Audit::Whole { .. })));
}

#[tokio::test]
async fn a_running_report_after_the_end_changes_nothing() {
    let world = World::new().await;
    world.acked(1, vec![report(1, run("a", "success")), report(2, run("a", "running"))]).await;
    world.acked(1, vec![report(3, v1::Run { bytes_read: 7, ..run("a", "failed") })]).await;
    assert_eq!(world.text("SELECT status FROM snapshot_runs").await, "success");
    assert_eq!(world.count("SELECT bytes_read FROM snapshot_runs").await, 0);
    assert_eq!(world.count("SELECT count(*) FROM cost_ledger").await, 1);
}

#[tokio::test]
async fn a_run_whose_ledger_row_fails_leaves_nothing_and_holds_up_nobody_else() {
    let world = World::new().await;
    world.sql("CREATE TRIGGER fault BEFORE INSERT ON cost_ledger WHEN NEW.server_id = 1 BEGIN SELECT RAISE(ABORT, 'fault'); END").await;
    let (ours, theirs) = tokio::join!(
        world.submit(1, vec![report(1, run("a", "success"))]),
        world.submit(2, vec![report(1, run("b", "success"))]),
    );
    assert!(matches!(ours, Err(Error::NotStored)));
    assert_eq!(theirs.expect("taken in").0.acks, [("e".to_owned(), 1)]);
    for table in [
        "SELECT count(*) FROM snapshot_runs WHERE server_id = 1",
        "SELECT count(*) FROM reports WHERE server_id = 1",
        "SELECT count(*) FROM repositories WHERE server_id = 1",
    ] {
        assert_eq!(world.count(table).await, 0, "{table}");
    }
    world.sql("DROP TRIGGER fault").await;
    assert_eq!(world.acked(1, vec![report(1, run("a", "success"))]).await, 1);
    assert_eq!(world.count("SELECT count(*) FROM cost_ledger WHERE server_id = 1").await, 1);
}

#[tokio::test]
async fn a_days_rows_sum_to_the_formula_over_all_repositories() {
    let world = World::new().await;
    let sizes = [("r1", 3_000_000_000_u64), ("r2", 1_500_000_000), ("r1", 2_000_000_000), ("r1", 2_000_000_000)];
    for (seq, (repository, bytes)) in (1_u64..).zip(sizes) {
        let run = v1::Run {
            repository_id: repository.into(),
            repository_bytes: bytes,
            ..run(&format!("run{seq}"), "success")
        };
        world.acked(1, vec![report(seq, run)]).await;
    }
    let rows = world.store.ledger(ServerId(1), "2026-11-22", "2026-11-23").await.expect("read");
    assert_eq!(rows.len(), 4);
    // (2 + 1.5) GB * 0.05 / 30 days, to six decimals.
    assert_eq!(rows.iter().map(|row| row.amount).sum::<Decimal>(), "0.005833".parse().expect("decimal"));
    assert_eq!(rows[3].amount, Decimal::ZERO);
    assert_eq!(rows[1].metadata["gb"], "4.5");
}

#[tokio::test]
async fn two_hosts_that_use_one_run_uid_do_not_meet() {
    let world = World::new().await;
    world.acked(1, vec![report(1, run("same", "success"))]).await;
    assert_eq!(world.acked(2, vec![report(1, run("same", "success"))]).await, 1);
    assert_eq!(world.count("SELECT count(*) FROM cost_ledger WHERE run_uid = 'same'").await, 2);
}

#[tokio::test]
async fn a_report_binds_the_queued_run_of_its_directive() {
    let world = World::new().await;
    world.add_directive(1, "d").await;
    world.acked(1, vec![report(1, v1::Run { directive_id: "d".into(), ..run("a", "running") })]).await;
    world.acked(1, vec![report(2, v1::Run { directive_id: "d".into(), ..run("a", "success") })]).await;
    assert_eq!(world.count("SELECT count(*) FROM snapshot_runs").await, 1);
    assert_eq!(world.text("SELECT status || run_uid || directive_id FROM snapshot_runs").await, "successad");
    assert_eq!(world.text("SELECT answer FROM directives").await, "accepted");
}

#[tokio::test]
async fn a_directive_of_another_server_is_left_alone() {
    let world = World::new().await;
    world.add_directive(1, "d").await;
    let stranger =
        vec![report(1, v1::Run { directive_id: "d".into(), ..run("a", "failed") }), outcome(2, "d", "refused")];
    assert_eq!(world.acked(2, stranger).await, 2);
    assert_eq!(world.text("SELECT status FROM snapshot_runs WHERE server_id = 1").await, "queued");
    assert_eq!(world.text("SELECT answer FROM directives").await, "");
    assert_eq!(world.counters.directives_ignored.total(), 2);
}

#[tokio::test]
async fn a_refusal_ends_the_run_and_only_its_own_failure_adds_to_it() {
    let world = World::new().await;
    world.add_directive(1, "d").await;
    world.acked(1, vec![outcome(1, "d", "unknown_verb")]).await;
    assert_eq!(world.text("SELECT status || ':' || error_class FROM snapshot_runs").await, "failed:unknown_verb");
    let told = v1::Run { directive_id: "d".into(), error_class: "unknown_verb".into(), ..run("a", "failed") };
    world.acked(1, vec![report(2, told)]).await;
    assert_eq!(world.text("SELECT run_uid FROM snapshot_runs").await, "a");
    world.add_directive(1, "d2").await;
    let lie = v1::Run { directive_id: "d2".into(), ..run("b", "success") };
    world.acked(1, vec![outcome(3, "d2", "refused"), report(4, lie)]).await;
    assert_eq!(world.count("SELECT count(*) FROM snapshot_runs").await, 3);
    assert_eq!(world.text("SELECT status FROM snapshot_runs WHERE directive_id = 'd2'").await, "failed");
}

#[tokio::test]
async fn a_run_that_had_begun_before_its_directive_expired_takes_the_cancelled_row() {
    let world = World::new().await;
    world.add_directive(1, "d").await;
    world.clock.advance_ms(2000);
    let fleet = crate::store::Store::clone(&world.store);
    let mut change = fleet.change(Actor::Receiver, NOON_MS + 2000).await.expect("begun");
    assert_eq!(change.expire_directives(NOON_MS + 2000).await.expect("expired").len(), 1);
    change.fail_queued_run("d", "cancelled", "late", NOON_MS + 2000).await.expect("ended");
    change.commit(None, "test", String::new(), serde_json::Value::Null).await.expect("committed");
    world.acked(1, vec![report(1, v1::Run { directive_id: "d".into(), ..run("a", "success") })]).await;
    assert_eq!(world.text("SELECT status FROM snapshot_runs").await, "success");
    assert_eq!(world.count("SELECT count(*) FROM cost_ledger").await, 1);
}

#[tokio::test]
async fn a_body_that_cannot_be_read_stops_there_and_what_came_before_counts() {
    let world = World::new().await;
    let garbage = vec![0xff, 0xff];
    let sha256 = hex::decode(hestner_proto::sha256_hex(&garbage)).expect("hex");
    let bad = v1::Envelope { epoch: "e".into(), seq: 2, sha256, body: garbage };
    let (verdict, refused) = world.submit(1, vec![usage(1), bad, usage(3)]).await.expect("answered");
    assert_eq!(verdict.acks, [("e".to_owned(), 1)]);
    assert_eq!(refused.expect("named").seq, 2);
    assert_eq!(world.counters.messages_bad.total(), 1);
}

#[tokio::test]
async fn runs_that_retention_removed_are_marked_and_stay() {
    let world = World::new().await;
    world.acked(1, vec![report(1, run("old", "success"))]).await;
    world
        .acked(
            1,
            vec![report(2, v1::Run { expired_runs: vec!["old".into(), "unknown".into()], ..run("new", "success") })],
        )
        .await;
    assert_eq!(
        world.text("SELECT group_concat(run_uid) FROM snapshot_runs WHERE expired_at_ms IS NOT NULL").await,
        "old"
    );
}

#[tokio::test]
async fn many_submissions_at_once_share_few_commits() {
    let world = World::new().await;
    let mut waiting = tokio::task::JoinSet::new();
    for n in 0..200_u64 {
        let inlet = world.inlet.clone();
        waiting.spawn(async move {
            let own_epoch = v1::Envelope { epoch: format!("e{n}"), ..usage(1) };
            inlet.submit(origin(1), vec![own_epoch]).await.expect("taken in").0.acks.len()
        });
    }
    assert_eq!(waiting.join_all().await.into_iter().sum::<usize>(), 200);
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
