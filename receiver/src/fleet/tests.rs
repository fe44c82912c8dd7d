//! Directives' edges: idempotency, bounds, expiry, superseded policies, services that come and go.
//!
//! On a real store with a clock that stands still; whoever answers for the host does so by the store's own calls.

use std::sync::Arc;
use std::time::Duration;

use hestner_proto::v1;

use super::directives::{OPEN_RUNS_MAX, SnapshotRequest};
use super::*;
use crate::model::counters::Counters;
use crate::model::policy::{PolicyInput, PolicyState};
use crate::model::report::Outcome;
use crate::platform::clock::ManualClock;

const NOW_MS: i64 = 1_795_348_800_000;
const SERVER: ServerId = ServerId(1);

struct World {
    _folder: tempfile::TempDir,
    store: Store,
    clock: Arc<ManualClock>,
    fleet: Fleet,
}

impl World {
    async fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path()).await.expect("opened");
        let mut tx = store.begin().await.expect("begun");
        let company = tx.add_company("acme", "age1x", "sha256:x", 1).await.expect("added").expect("new");
        tx.add_server(company, "host", "k", "0", 1).await.expect("added");
        tx.commit().await.expect("committed");
        let clock = ManualClock::at(NOW_MS);
        let fleet = Fleet::new(store.clone(), Sessions::default(), clock.clone(), Arc::new(Counters::default()));
        Self { _folder: folder, store, clock, fleet }
    }

    async fn ask(&self, key: Option<&str>, service: &str) -> Result<Run, Error> {
        let request = SnapshotRequest {
            service: Some(service.into()),
            expires_in: Duration::from_secs(60),
            idempotency_key: key.map(str::to_owned),
        };
        self.fleet.request_snapshot(all(), SERVER, &request).await
    }

    async fn put(&self, cron: &str) -> Policy {
        self.fleet.put_policy(all(), SERVER, policy(cron)).await.expect("put")
    }
}

fn all() -> Caller {
    Caller { key_id: 1, scope: Scope::All }
}

fn policy(cron: &str) -> PolicyInput {
    PolicyInput {
        service: "docs".into(),
        cron: cron.into(),
        time_zone: "UTC".into(),
        retention_days: 7,
        retention_count: 1,
        destination: "local".into(),
        encryption_enabled: true,
        misfire: "skip".into(),
        ..PolicyInput::default()
    }
}

#[tokio::test]
async fn the_same_idempotency_key_gives_the_same_run_and_another_body_is_refused() {
    let world = World::new().await;
    let first = world.ask(Some("k"), "docs").await.expect("queued");
    assert_eq!(world.ask(Some("k"), "docs").await.expect("repeated").id, first.id);
    assert!(matches!(world.ask(Some("k"), "other").await, Err(Error::IdempotencyMismatch)));
    assert_ne!(world.ask(None, "docs").await.expect("queued").id, first.id);
}

#[tokio::test]
async fn no_more_than_the_bound_waits_for_one_server() {
    let world = World::new().await;
    for _ in 0..OPEN_RUNS_MAX {
        world.ask(None, "docs").await.expect("queued");
    }
    assert!(matches!(world.ask(None, "docs").await, Err(Error::TooManyDirectives(OPEN_RUNS_MAX))));
}

#[tokio::test]
async fn a_directive_that_nobody_took_expires_and_its_run_says_why() {
    let world = World::new().await;
    world.ask(None, "docs").await.expect("queued");
    assert_eq!(world.fleet.expire_directives().await.expect("looked"), 0);
    world.clock.advance_ms(60_000);
    assert_eq!(world.fleet.expire_directives().await.expect("expired"), 1);
    assert!(world.fleet.open_directives(SERVER).await.expect("read").is_empty());
    let run = world.fleet.run(all(), SERVER, "1").await.expect("there");
    assert_eq!((run.status.as_str(), run.error_class.as_str()), ("failed", "cancelled"));
    assert!(run.error_message.contains("expired") && !run.next_step.is_empty());
}

#[tokio::test]
async fn only_the_newest_policy_is_delivered_and_an_answer_to_an_older_one_changes_nothing() {
    let world = World::new().await;
    let older = world.put("0 1 * * *").await;
    let newer = world.put("0 2 * * *").await;
    assert_eq!(older.id, newer.id);
    let open = world.fleet.open_directives(SERVER).await.expect("read");
    let [v1::Directive { ask: Some(v1::directive::Ask::Policy(sent)), .. }] = &open[..] else { panic!("{open:?}") };
    assert_eq!((sent.cron.as_str(), sent.policy_id), ("0 2 * * *", newer.id));
    for (directive_id, expected) in
        [(older.directive_id, PolicyState::Pending), (newer.directive_id, PolicyState::Refused)]
    {
        let outcome =
            Outcome { directive_id, accepted: false, code: "unknown_destination".into(), message: "no".into() };
        let mut tx = world.store.begin().await.expect("begun");
        tx.answer_directive(SERVER, &outcome, NOW_MS).await.expect("answered");
        tx.answer_policy(SERVER, &outcome).await.expect("answered");
        tx.commit().await.expect("committed");
        let shown = world.fleet.policies(all(), SERVER).await.expect("read");
        assert_eq!(shown[0].state, expected);
    }
    let refused = &world.fleet.policies(all(), SERVER).await.expect("read")[0];
    assert_eq!(refused.refusal_code.as_deref(), Some("unknown_destination"));
    assert_eq!(refused.next_run_at, None);
}

#[tokio::test]
async fn a_service_that_the_inventory_does_not_name_is_refused_and_ids_stay_when_one_comes_back() {
    let world = World::new().await;
    let inventory = |names: &[&str]| v1::Inventory {
        hash: names.join(","),
        services: names.iter().map(|name| v1::Service { name: (*name).into(), ..Default::default() }).collect(),
        ..Default::default()
    };
    let mut ids = Vec::new();
    for names in [&["docs", "db"][..], &["docs"], &["docs", "db"]] {
        let mut tx = world.store.begin().await.expect("begun");
        tx.replace_inventory(SERVER, &inventory(names), NOW_MS).await.expect("replaced");
        tx.commit().await.expect("committed");
        let services = world.fleet.services(all(), SERVER).await.expect("read");
        assert_eq!(services.len(), names.len());
        ids.push(services.into_iter().find(|service| service.name == "docs").expect("there").id);
    }
    assert!(ids.windows(2).all(|pair| pair[0] == pair[1]));
    assert!(matches!(world.ask(None, "nothing").await, Err(Error::UnknownService(_))));
    assert!(matches!(
        world.fleet.put_policy(all(), SERVER, PolicyInput { service: "x".into(), ..policy("") }).await,
        Err(Error::UnknownService(_))
    ));
}

#[tokio::test]
async fn the_service_may_be_left_out_where_only_one_is_set_up_for_snapshots() {
    let world = World::new().await;
    let unnamed = SnapshotRequest { service: None, expires_in: Duration::from_secs(60), idempotency_key: None };
    let ask = async || world.fleet.request_snapshot(all(), SERVER, &unnamed).await;
    let tell = async |set_up: &[&str]| {
        let known = [("docs", "none"), ("db", "application"), ("sshd", "")];
        let known = known.map(|(name, consistency)| v1::Service {
            name: name.into(),
            consistency: if set_up.contains(&name) { consistency.into() } else { String::new() },
            ..Default::default()
        });
        let inventory = v1::Inventory { services: known.into(), ..Default::default() };
        let mut tx = world.store.begin().await.expect("begun");
        tx.replace_inventory(SERVER, &inventory, NOW_MS).await.expect("replaced");
        tx.commit().await.expect("committed");
    };
    assert!(matches!(ask().await, Err(Error::ServiceWanted(names)) if names.is_empty()));
    tell(&["docs", "db"]).await;
    let refused = ask().await.expect_err("two").to_string();
    assert!(refused.contains("db, docs") && !refused.contains("sshd"), "{refused}");
    tell(&["docs"]).await;
    assert_eq!(ask().await.expect("queued").service, "docs");
    let put = world.fleet.put_policy(all(), SERVER, PolicyInput { service: String::new(), ..policy("") }).await;
    assert_eq!(put.expect("put").input.service, "docs");
}

#[tokio::test]
async fn an_idempotency_key_that_is_older_than_a_day_is_forgotten() {
    let world = World::new().await;
    let first = world.ask(Some("k"), "docs").await.expect("queued");
    world.clock.advance_ms(24 * 3_600_000 + 1);
    assert_ne!(world.ask(Some("k"), "docs").await.expect("queued").id, first.id);
}

#[tokio::test]
async fn a_company_with_a_name_that_is_taken_is_refused() {
    let world = World::new().await;
    let key = age::x25519::Identity::generate().to_public().to_string();
    let actor = || crate::model::Actor::Cli("test".into());
    assert!(matches!(world.fleet.add_company(actor(), "acme", &key).await, Err(Error::NameTaken(_))));
    assert!(world.fleet.add_company(actor(), "new", &key).await.is_ok());
}

#[tokio::test]
async fn what_a_policy_wants_a_backup_to_cost_reaches_the_host_and_what_it_leaves_open_stays_open() {
    use hestner_proto::v1::directive::Ask;
    let world = World::new().await;
    let wishes = PolicyInput {
        compression_level: Some(7),
        priority: Some("idle".into()),
        force_read: Some(false),
        ..policy("")
    };
    for (input, expected) in
        [(wishes, (Some(7), Some("idle"), Some(false), None)), (policy(""), (None, None, None, None))]
    {
        let put = world.fleet.put_policy(all(), SERVER, input).await.expect("put").input;
        assert_eq!((put.compression_level, put.priority.as_deref(), put.force_read, put.skip_caches), expected);
        let mut sent = world.store.open_directives(SERVER, NOW_MS).await.expect("read");
        assert_eq!(sent.len(), 1, "the newer one takes the older one's place");
        let Some(Ask::Policy(sent)) = sent.remove(0).ask else { panic!("no policy") };
        assert_eq!((sent.compression_level, sent.priority.as_deref(), sent.force_read, sent.skip_caches), expected);
    }
    let bad = PolicyInput { compression_level: Some(0), priority: Some("now".into()), ..policy("") };
    let refused = world.fleet.put_policy(all(), SERVER, bad).await;
    assert!(matches!(refused, Err(Error::Invalid(mistakes)) if mistakes.len() == 2));
}
