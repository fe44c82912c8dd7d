//! Tests of the store, with a ten-line model of the outbox.

use proptest::prelude::*;

use super::*;

fn open(folder: &Path) -> Store {
    Store::open(&folder.join("agent.db"), "epoch-1").unwrap()
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

#[derive(Clone, Debug)]
enum Action {
    Append(u8),
    AcknowledgeFirst(u8),
    Reopen,
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        any::<u8>().prop_map(Action::Append),
        (0..8_u8).prop_map(Action::AcknowledgeFirst),
        Just(Action::Reopen)
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// The outbox behaves like a queue that numbers what goes in and never re-uses a number.
    #[test]
    fn outbox_is_a_numbered_queue(actions in prop::collection::vec(action(), 1..40)) {
        let folder = tempfile::tempdir().unwrap();
        let mut store = open(folder.path());
        let mut model: Vec<(u64, Vec<u8>)> = Vec::new();
        let mut next = 1;
        for action in actions {
            match action {
                Action::Append(byte) => {
                    prop_assert_eq!(block_on(store.append(vec![byte])).unwrap(), next);
                    model.push((next, vec![byte]));
                    next += 1;
                }
                Action::AcknowledgeFirst(n) => {
                    if let Some(seq) = model.iter().map(|(seq, _)| *seq).take(usize::from(n)).next_back() {
                        block_on(store.acknowledge(seq)).unwrap();
                        model.retain(|(s, _)| *s > seq);
                    }
                }
                Action::Reopen => {
                    drop(store);
                    store = open(folder.path());
                }
            }
            let seen = block_on(store.entries_after(0, 1000)).unwrap();
            let seen: Vec<_> = seen.into_iter().map(|e| (e.seq, e.body)).collect();
            prop_assert_eq!(&seen, &model);
        }
    }
}

#[tokio::test]
async fn last_acknowledged_number_is_known_however_the_outbox_stands() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    assert_eq!(store.acknowledged().await.unwrap(), 0);
    for _ in 0..3 {
        store.append(vec![1]).await.unwrap();
    }
    assert_eq!(store.acknowledged().await.unwrap(), 0);
    store.acknowledge(2).await.unwrap();
    assert_eq!(store.acknowledged().await.unwrap(), 2);
    store.acknowledge(3).await.unwrap();
    assert_eq!(store.acknowledged().await.unwrap(), 3);
}

#[tokio::test]
async fn report_with_a_mark_is_appended_once_even_after_its_acknowledgement() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    store.append_once("key".into(), vec![1]).await.unwrap();
    store.acknowledge(1).await.unwrap();
    store.append_once("key".into(), vec![1]).await.unwrap();
    assert_eq!(store.waiting().await.unwrap(), 0);
}

fn row(uid: &str) -> RunRow {
    RunRow { run_uid: uid.into(), service: "docs".into(), record: "{}".into() }
}

#[tokio::test]
async fn run_is_finished_and_reported_once() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    store.begin_run(row("a"), b"begun".to_vec(), None, None).await.unwrap();
    let finish = || store.finish_run("a".into(), "{\"status\":\"failed\"}".into(), b"ended".to_vec());
    assert_eq!(finish().await.unwrap(), Unfinished::WasUnfinished);
    assert_eq!(finish().await.unwrap(), Unfinished::WasFinished);
    assert_eq!(store.waiting().await.unwrap(), 2);
    assert!(store.unfinished_runs().await.unwrap().is_empty());
}

#[tokio::test]
async fn wait_outlives_a_restart_and_ends_with_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let wait = || Wait { verb: "snapshot".into(), since_ms: 1, expires_at_ms: 9 };
    for uid in ["a", "b", "c"] {
        store.begin_run(row(uid), b"begun".to_vec(), None, Some(wait())).await.unwrap();
    }
    store.begin_run(row("d"), b"begun".to_vec(), None, None).await.unwrap();
    store.confirm_wait("b".into()).await.unwrap();
    store.end_wait("c".into()).await.unwrap();
    drop(store);
    let store = open(folder.path());
    let waits = store.waits().await.unwrap();
    let shown: Vec<_> = waits.iter().map(|w| (w.run_uid.as_str(), w.confirmed, &w.wait)).collect();
    assert_eq!(shown, [("a", false, &wait()), ("b", true, &wait())]);
    let unfinished: Vec<_> = store.unfinished_runs().await.unwrap().into_iter().map(|r| r.run_uid).collect();
    assert_eq!(unfinished, ["c", "d"], "what waits has begun nothing that a restart would have to end");
    store.finish_run("a".into(), "{}".into(), b"ended".to_vec()).await.unwrap();
    assert_eq!(store.waits().await.unwrap().len(), 1);
}

#[tokio::test]
async fn directive_is_done_once_however_often_it_is_delivered() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    assert!(store.remember("d".into(), 1, 100).await.unwrap());
    let refused = Outcome { accepted: false, code: "refused".into(), message: "no".into() };
    store.conclude("d".into(), refused.clone(), b"r".to_vec()).await.unwrap();
    store.conclude("d".into(), refused, b"r".to_vec()).await.unwrap();
    assert_eq!(store.waiting().await.unwrap(), 1);
    assert!(!store.remember("d".into(), 2, 100).await.unwrap());
}

#[tokio::test]
async fn directive_that_a_crash_left_open_is_taken_again() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    assert!(store.remember("d".into(), 1, 100).await.unwrap());
    assert!(store.remember("d".into(), 2, 100).await.unwrap());
}

#[test]
fn epoch_stays_with_the_file() {
    let folder = tempfile::tempdir().unwrap();
    drop(open(folder.path()));
    let again = Store::open(&folder.path().join("agent.db"), "epoch-2").unwrap();
    assert_eq!(again.epoch(), "epoch-1");
}

#[tokio::test]
async fn file_of_the_first_format_is_migrated_with_its_runs() {
    let folder = tempfile::tempdir().unwrap();
    let connection = Connection::open(folder.path().join("agent.db")).unwrap();
    connection.execute_batch(MIGRATIONS[0]).unwrap();
    connection.pragma_update(None, "user_version", 1).unwrap();
    connection.execute("INSERT INTO runs (run_uid, service, record) VALUES ('a', 'docs', '{}')", []).unwrap();
    drop(connection);
    let store = open(folder.path());
    assert_eq!(store.unfinished_runs().await.unwrap(), [row("a")]);
    let wait = Wait { verb: "snapshot".into(), since_ms: 1, expires_at_ms: 9 };
    store.begin_run(row("b"), b"begun".to_vec(), None, Some(wait)).await.unwrap();
    assert_eq!(store.waits().await.unwrap().len(), 1);
}

#[test]
fn file_of_a_newer_agent_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.db");
    drop(open(folder.path()));
    Connection::open(&path).unwrap().pragma_update(None, "user_version", 999).unwrap();
    let error = Store::open(&path, "x").unwrap_err().to_string();
    assert!(error.contains("newer agent"), "{error}");
}

#[test]
fn damaged_file_is_refused_and_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.db");
    crate::platform::files::write(&path, &[7; 8192], 0o600).unwrap();
    assert!(Store::open(&path, "x").is_err());
    assert!(path.exists());
}
