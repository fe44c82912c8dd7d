//! Runs, their directives and their ledger rows, as reports change them.
//!
//! The world and the reports are those of the parent; every test reads what is stored with plain SQL.

use hestner_proto::v1;
use rust_decimal::Decimal;

use super::*;

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
    assert_eq!(theirs.expect("taken in").0.ack, Some(1));
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
            destination: format!("of {repository}"),
            repository_bytes: bytes,
            ..run(&format!("run{seq}"), "success")
        };
        world.acked(1, vec![report(seq, run)]).await;
    }
    let (rows, _) = world.store.ledger(ServerId(1), "2026-11-22", "2026-11-23").await.expect("read");
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
async fn a_repository_that_was_replaced_is_no_longer_paid_for_and_one_of_another_mode_is() {
    let world = World::new().await;
    let key = |seq, repository_id: &str, key| {
        let told =
            v1::RepositoryKey { repository_id: repository_id.into(), destination: "local".into(), key: Some(key) };
        envelope(seq, v1::report::Body::RepositoryKey(told))
    };
    let wrapped = || v1::repository_key::Key::Wrapped(vec![1]);
    let open = || v1::repository_key::Key::Open("p".into());
    let success = |seq: u64, repository: &str, bytes| {
        let run = v1::Run {
            destination: "local".into(),
            repository_id: repository.into(),
            repository_bytes: bytes,
            ..run(&format!("run{seq}"), "success")
        };
        report(seq, run)
    };
    let reports = vec![
        key(1, "lost", wrapped()),
        success(2, "lost", 7),
        key(3, "open", open()),
        success(4, "open", 20),
        key(5, "fresh", wrapped()),
        success(6, "fresh", 300),
    ];
    assert_eq!(world.acked(1, reports).await, 6);
    assert_eq!(world.text("SELECT group_concat(repository_id) FROM repositories ORDER BY 1").await, "fresh,open");
    assert_eq!(world.count("SELECT sum(bytes) FROM repositories").await, 320);
}

#[tokio::test]
async fn an_agents_clock_reaches_neither_into_the_past_of_its_server_nor_keeps_a_repositorys_size() {
    let world = World::new().await;
    world.sql("UPDATE servers SET enrolled_at_ms = 1795262400000").await;
    let at = |seq: u64, finished_at_ms, repository_bytes| {
        report(seq, v1::Run { finished_at_ms, repository_bytes, ..run(&format!("run{seq}"), "success") })
    };
    world.acked(1, vec![at(1, NOON_MS + 86_400_000_000, 1), at(2, 1, 2), at(3, NOON_MS, 3)]).await;
    assert_eq!(
        world.text("SELECT group_concat(ref_date) FROM (SELECT ref_date FROM cost_ledger ORDER BY id)").await,
        "2026-11-22,2026-11-21,2026-11-22"
    );
    assert_eq!(world.count("SELECT bytes FROM repositories").await, 3);
}

#[tokio::test]
async fn a_change_of_currency_books_the_day_anew_and_mixes_nothing() {
    let world = World::new().await;
    world.acked(1, vec![report(1, run("a", "success"))]).await;
    let mut tx = world.store.begin().await.expect("begun");
    for (currency, expected) in [("EUR", "0.005000"), ("BRL", "0")] {
        let booked = tx.booked(ServerId(1), "2026-11-22", crate::model::cost::SNAPSHOT_STORAGE, currency).await;
        assert_eq!(booked.expect("read"), expected.parse().expect("decimal"), "{currency}");
    }
}

#[tokio::test]
async fn a_second_answer_to_a_directive_changes_nothing() {
    let world = World::new().await;
    let input = crate::model::policy::PolicyInput {
        service: "docs".into(),
        cron: String::new(),
        time_zone: "UTC".into(),
        retention_days: 1,
        retention_count: 1,
        destination: "local".into(),
        encryption_enabled: true,
        misfire: "skip".into(),
        ..crate::model::policy::PolicyInput::default()
    };
    let mut tx = world.store.begin().await.expect("begun");
    let new = NewDirective {
        id: "p",
        server: ServerId(1),
        kind: Kind::Policy,
        service: "docs",
        verb: "",
        created_at_ms: 1,
        expires_at_ms: i64::MAX,
    };
    tx.add_directive(&new).await.expect("added");
    tx.put_policy(ServerId(1), &input, "p", 1).await.expect("put");
    tx.commit().await.expect("committed");
    world.acked(1, vec![outcome(1, "p", ""), outcome(2, "p", "denied")]).await;
    assert_eq!(world.text("SELECT state FROM snapshot_policies").await, "applied");
}
