//! Enrolment's faults: lost replies, wrong, used and expired tokens, clones, revoked and quarantined servers.
//!
//! Hosts are made of a key and a request as an agent would send them; the clock stands still until a test moves it.

use hestner_proto::PROTOCOL;
use hestner_proto::v1;
use rcgen::{CertificateParams, KeyPair};
use sqlx::{Connection as _, SqliteConnection};

use super::admission::{Identity, Refusal};
use super::*;
use crate::model::counters::Counters;
use crate::platform::clock::ManualClock;

const NOW_MS: i64 = 1_795_348_800_000;
const HOUR: Duration = Duration::from_secs(3600);

struct World {
    folder: tempfile::TempDir,
    store: Store,
    clock: Arc<ManualClock>,
    enrolment: Enrolment,
}

impl World {
    async fn audited(&self, action: &str) -> String {
        let path = self.folder.path().join(store::FILE_NAME);
        let mut raw = SqliteConnection::connect(&format!("sqlite://{}", path.display())).await.expect("opened");
        let query = "SELECT coalesce(group_concat(details_json), '') FROM audit WHERE action = ?1";
        sqlx::query_scalar(query).bind(action).fetch_one(&mut raw).await.expect("read")
    }

    /// Two companies, `sha256:one` and `sha256:two`.
    async fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path()).await.expect("opened");
        let mut tx = store.begin().await.expect("begun");
        for name in ["one", "two"] {
            tx.add_company(name, &format!("age1{name}"), &format!("sha256:{name}"), 1).await.expect("added");
        }
        tx.commit().await.expect("committed");
        let authority = Arc::new(Authority::open(folder.path(), "t.example", NOW_MS).expect("made"));
        let clock = ManualClock::at(NOW_MS);
        let rules = Rules { trust_domain: "t.example".into(), certificate_life: HOUR };
        let counters = Arc::new(Counters::default());
        let enrolment = Enrolment::new(store.clone(), authority, Sessions::default(), rules, clock.clone(), counters);
        Self { folder, store, clock, enrolment }
    }

    async fn token(&self, company: i64, server: Option<ServerId>) -> String {
        let made = self.enrolment.create_token(Actor::Receiver, CompanyId(company), server, HOUR).await.expect("made");
        made.token.presented()
    }

    async fn enrol(&self, token: &str, key: &KeyPair) -> Result<Enrolled, Error> {
        self.enrol_typing(token, key, "sha256:one").await
    }

    async fn enrol_typing(&self, token: &str, key: &KeyPair, fingerprint: &str) -> Result<Enrolled, Error> {
        let request = Request {
            token: token.to_owned(),
            csr_der: CertificateParams::default().serialize_request(key).expect("a request").der().to_vec(),
            recovery_fingerprint: fingerprint.to_owned(),
            hostname: "host".into(),
            agent_version: "0".into(),
        };
        self.enrolment.enrol(request).await
    }

    async fn set_status(&self, server: ServerId, status: &'static str) {
        let mut tx = self.store.begin().await.expect("begun");
        tx.set_server_status(server, status).await.expect("set");
        tx.commit().await.expect("committed");
    }

    async fn admit(&self, enrolled: &Enrolled) -> Result<super::admission::Admitted, Refusal> {
        self.enrolment.admit(&self.identity(enrolled), &hello()).await
    }

    fn identity(&self, enrolled: &Enrolled) -> Identity {
        self.enrolment.recognise(&enrolled.certificate_der).expect("ours")
    }
}

fn hello() -> v1::Hello {
    v1::Hello { protocol: PROTOCOL, epoch: "e".into(), now_ms: NOW_MS + 500, ..v1::Hello::default() }
}

fn key() -> KeyPair {
    KeyPair::generate().expect("a key")
}

fn code(result: Result<Enrolled, Error>) -> &'static str {
    result.err().map_or("enrolled", |error| error.code())
}

#[tokio::test]
async fn a_host_whose_reply_was_lost_asks_again_and_is_the_same_server() {
    let world = World::new().await;
    let (token, key) = (world.token(1, None).await, key());
    let first = world.enrol(&token, &key).await.expect("enrolled");
    let again = world.enrol(&token, &key).await.expect("enrolled again");
    assert_eq!((first.server, first.company), (again.server, again.company));
    world.clock.advance_ms(3_600_000 + 60_000);
    assert_eq!(world.enrol(&token, &key).await.expect("within the grace").server, first.server);
    world.clock.advance_ms(RETRY_GRACE_MS);
    assert_eq!(code(world.enrol(&token, &key).await), "token_expired");
}

#[tokio::test]
async fn a_host_that_lost_its_reply_and_comes_with_a_new_token_is_the_same_server() {
    let world = World::new().await;
    let key = key();
    let first = world.enrol(&world.token(1, None).await, &key).await.expect("enrolled");
    let again = world.enrol(&world.token(1, None).await, &key).await.expect("enrolled");
    assert_eq!(first.server, again.server);
}

#[tokio::test]
async fn unknown_used_and_expired_tokens_have_distinct_codes() {
    let world = World::new().await;
    let token = world.token(1, None).await;
    let wrong = format!("{}{}", &token[..token.len() - 48], "0".repeat(48));
    for text in ["", "junk", "hjt_999_000000000000000000000000000000000000000000000000", &wrong] {
        assert_eq!(code(world.enrol(text, &key()).await), "token_unknown", "{text}");
    }
    world.enrol(&token, &key()).await.expect("enrolled");
    assert_eq!(code(world.enrol(&token, &key()).await), "token_used");
    let late = world.token(1, None).await;
    world.clock.advance_ms(3_600_000);
    assert_eq!(code(world.enrol(&late, &key()).await), "token_expired");
}

#[tokio::test]
async fn a_wrong_fingerprint_consumes_nothing() {
    let world = World::new().await;
    let (token, key) = (world.token(1, None).await, key());
    assert_eq!(code(world.enrol_typing(&token, &key, "sha256:two").await), "recovery_key_mismatch");
    let enrolled = world.enrol(&token, &key).await.expect("the token is still good");
    assert_eq!(enrolled.recovery_recipient, "age1one");
}

#[tokio::test]
async fn a_request_that_proves_no_key_is_refused() {
    let world = World::new().await;
    let token = world.token(1, None).await;
    let request = Request {
        token,
        csr_der: b"junk".to_vec(),
        recovery_fingerprint: "sha256:one".into(),
        hostname: String::new(),
        agent_version: String::new(),
    };
    assert_eq!(code(world.enrolment.enrol(request).await), "csr_invalid");
}

#[tokio::test]
async fn a_clones_key_does_not_enter_another_company_or_server() {
    let world = World::new().await;
    let key = key();
    let first = world.enrol(&world.token(1, None).await, &key).await.expect("enrolled");
    let foreign = world.token(2, None).await;
    assert_eq!(code(world.enrol_typing(&foreign, &key, "sha256:two").await), "key_in_use");
    let other = world.enrol(&world.token(1, None).await, &super::tests::key()).await.expect("another server");
    assert_ne!(first.server, other.server);
    let bound = world.token(1, Some(other.server)).await;
    assert_eq!(code(world.enrol(&bound, &key).await), "key_in_use");
}

#[tokio::test]
async fn a_token_for_a_server_of_another_company_is_not_made() {
    let world = World::new().await;
    let server = world.enrol(&world.token(1, None).await, &key()).await.expect("enrolled").server;
    let made = world.enrolment.create_token(Actor::Receiver, CompanyId(2), Some(server), HOUR).await;
    assert!(matches!(made, Err(Error::NoSuch(_))));
}

#[tokio::test]
async fn a_server_enrolled_anew_keeps_its_row_and_its_old_key_is_out() {
    let world = World::new().await;
    let old = world.enrol(&world.token(1, None).await, &key()).await.expect("enrolled");
    world.set_status(old.server, "quarantined").await;
    assert!(matches!(world.admit(&old).await, Err(Refusal::Fork)));
    let new = world.enrol(&world.token(1, Some(old.server)).await, &key()).await.expect("enrolled anew");
    assert_eq!(old.server, new.server);
    assert!(world.admit(&new).await.is_ok());
    assert!(matches!(world.admit(&old).await, Err(Refusal::Unknown)));
}

#[tokio::test]
async fn a_server_enrolled_anew_gets_its_policies_again() {
    use crate::model::policy::{PolicyInput, PolicyState};
    let world = World::new().await;
    let server = world.enrol(&world.token(1, None).await, &key()).await.expect("enrolled").server;
    let input = PolicyInput {
        service: "docs".into(),
        cron: "0 1 * * *".into(),
        time_zone: "UTC".into(),
        retention_days: 1,
        retention_count: 1,
        destination: "local".into(),
        encryption_enabled: true,
        misfire: "skip".into(),
        ..PolicyInput::default()
    };
    let mut tx = world.store.begin().await.expect("begun");
    tx.put_policy(server, &input, "old", NOW_MS).await.expect("put");
    let taken = crate::model::report::Outcome {
        directive_id: "old".into(),
        accepted: true,
        code: String::new(),
        message: String::new(),
    };
    tx.answer_policy(server, &taken).await.expect("applied");
    tx.commit().await.expect("committed");
    assert!(world.store.open_directives(server, NOW_MS).await.expect("read").is_empty());
    world.enrol(&world.token(1, Some(server)).await, &key()).await.expect("enrolled anew");
    assert_eq!(world.store.open_directives(server, NOW_MS).await.expect("read").len(), 1);
    assert_eq!(world.store.policies(server).await.expect("read")[0].state, PolicyState::Pending);
}

#[tokio::test]
async fn a_repeated_enrolment_does_not_lift_a_quarantine() {
    let world = World::new().await;
    let (token, key) = (world.token(1, None).await, key());
    let enrolled = world.enrol(&token, &key).await.expect("enrolled");
    world.set_status(enrolled.server, "quarantined").await;
    let again = world.enrol(&token, &key).await.expect("answered");
    assert!(matches!(world.admit(&again).await, Err(Refusal::Fork)));
}

#[tokio::test]
async fn a_revoked_server_gets_neither_a_session_nor_a_new_certificate() {
    let world = World::new().await;
    let (token, key) = (world.token(1, None).await, key());
    let enrolled = world.enrol(&token, &key).await.expect("enrolled");
    world.set_status(enrolled.server, "revoked").await;
    assert!(matches!(world.admit(&enrolled).await, Err(Refusal::Revoked)));
    assert_eq!(code(world.enrol(&token, &key).await), "server_revoked");
    let bound = world.token(1, Some(enrolled.server)).await;
    assert_eq!(code(world.enrol(&bound, &super::tests::key()).await), "server_revoked");
}

#[tokio::test]
async fn another_protocol_is_refused_by_its_number() {
    let world = World::new().await;
    let enrolled = world.enrol(&world.token(1, None).await, &key()).await.expect("enrolled");
    let newer = v1::Hello { protocol: PROTOCOL + 1, ..hello() };
    let refused = world.enrolment.admit(&world.identity(&enrolled), &newer).await.expect_err("refused");
    assert_eq!(refused.code(), "protocol");
}

#[tokio::test]
async fn a_renewed_key_takes_over_with_its_first_hello_and_not_before() {
    let world = World::new().await;
    let old = world.enrol(&world.token(1, None).await, &key()).await.expect("enrolled");
    let next = key();
    let csr = CertificateParams::default().serialize_request(&next).expect("a request");
    let renewed = world.enrolment.renew(&world.identity(&old), csr.der()).await.expect("renewed");
    let new = Enrolled { certificate_der: renewed.certificate_der, ..old.clone() };
    assert!(world.admit(&old).await.is_ok(), "the old key holds until the new one has spoken");
    assert!(world.admit(&new).await.is_ok());
    assert!(matches!(world.admit(&old).await, Err(Refusal::Unknown)));
    let promoted = world.audited("server_key_promoted").await;
    for peer in [&old, &new] {
        assert!(promoted.contains(&world.identity(peer).spki_sha256), "{promoted}");
    }
}

#[tokio::test]
async fn a_key_that_another_server_has_is_not_signed_in_a_renewal() {
    let world = World::new().await;
    let victim = key();
    world.enrol(&world.token(1, None).await, &victim).await.expect("enrolled");
    let thief = world.enrol(&world.token(1, None).await, &key()).await.expect("enrolled");
    let csr = CertificateParams::default().serialize_request(&victim).expect("a request");
    let refused = world.enrolment.renew(&world.identity(&thief), csr.der()).await.expect_err("refused");
    assert!(matches!(refused, Refusal::Failed(Error::KeyInUse)), "{refused}");
}

#[tokio::test]
async fn a_key_that_was_replaced_or_shut_out_announces_no_other() {
    let world = World::new().await;
    let old = world.enrol(&world.token(1, None).await, &key()).await.expect("enrolled");
    let renew = async |peer: &Enrolled, next: &KeyPair| {
        let csr = CertificateParams::default().serialize_request(next).expect("a request");
        world.enrolment.renew(&world.identity(peer), csr.der()).await
    };
    let announced = async || {
        let mut tx = world.store.begin().await.expect("begun");
        tx.standing(old.server).await.expect("read").expect("there").next_spki_sha256
    };
    // The thief's request waited while an operator enrolled the server anew.
    let new = world.enrol(&world.token(1, Some(old.server)).await, &key()).await.expect("enrolled anew");
    assert!(renew(&old, &key()).await.is_err());
    assert_eq!(announced().await, None);
    for status in ["quarantined", "revoked"] {
        world.set_status(old.server, status).await;
        assert!(renew(&new, &key()).await.is_err(), "{status}");
        assert_eq!(announced().await, None, "{status}");
    }
}

#[tokio::test]
async fn a_certificate_that_expires_after_the_handshake_opens_and_renews_nothing() {
    let world = World::new().await;
    let enrolled = world.enrol(&world.token(1, None).await, &key()).await.expect("enrolled");
    let csr = CertificateParams::default().serialize_request(&key()).expect("a request");
    world.clock.advance_ms(3_600_000);
    assert!(matches!(world.admit(&enrolled).await, Err(Refusal::Expired)));
    let renewed = world.enrolment.renew(&world.identity(&enrolled), csr.der()).await;
    assert!(matches!(renewed, Err(Refusal::Expired)));
}

#[tokio::test]
async fn whoever_is_shut_out_right_after_hello_is_not_admitted_any_more() {
    let world = World::new().await;
    let enrolled = world.enrol(&world.token(1, None).await, &key()).await.expect("enrolled");
    world.admit(&enrolled).await.expect("admitted");
    let peer = world.identity(&enrolled);
    assert!(world.enrolment.still_admits(&peer).await.is_ok());
    world.set_status(enrolled.server, "revoked").await;
    assert!(matches!(world.enrolment.still_admits(&peer).await, Err(Refusal::Revoked)));
}

#[tokio::test]
async fn a_wrong_token_does_not_wait_for_the_writer() {
    let world = World::new().await;
    let token = world.token(1, None).await;
    let wrong = format!("{}{}", &token[..token.len() - 48], "0".repeat(48));
    let _held = world.store.begin().await.expect("begun");
    let refused = tokio::time::timeout(Duration::from_secs(2), world.enrol(&wrong, &key())).await;
    assert_eq!(code(refused.expect("at once")), "token_unknown");
}

#[tokio::test]
async fn a_new_token_lifts_a_quarantine_for_another_key_only_and_the_log_tells_both() {
    let world = World::new().await;
    let forked = key();
    let enrolled = world.enrol(&world.token(1, None).await, &forked).await.expect("enrolled");
    world.set_status(enrolled.server, "quarantined").await;
    for server in [None, Some(enrolled.server)] {
        assert_eq!(code(world.enrol(&world.token(1, server).await, &forked).await), "key_in_use");
    }
    world.enrol(&world.token(1, Some(enrolled.server)).await, &key()).await.expect("enrolled anew");
    let audit = world.audited("server_enrolled").await;
    assert!(audit.contains("\"status_before\":\"quarantined\""), "{audit}");
    let key_before = format!("\"key_before\":\"{}\"", world.identity(&enrolled).spki_sha256);
    assert!(audit.contains(&key_before), "{audit}");
}

#[tokio::test]
async fn runs_that_a_former_agent_had_taken_fail_and_those_that_still_wait_go_on() {
    use crate::store::directives::{Kind, NewDirective};
    use crate::store::runs::RunFilter;
    let world = World::new().await;
    let server = world.enrol(&world.token(1, None).await, &key()).await.expect("enrolled").server;
    let mut tx = world.store.begin().await.expect("begun");
    for id in ["taken", "waits"] {
        let new = NewDirective {
            id,
            server,
            kind: Kind::Run,
            service: id,
            verb: "snapshot",
            created_at_ms: NOW_MS,
            expires_at_ms: i64::MAX,
        };
        tx.add_directive(&new).await.expect("added");
        tx.add_queued_run(server, id, id, NOW_MS).await.expect("queued");
    }
    tx.directive_became_run(server, "taken", NOW_MS).await.expect("answered");
    let running = v1::Run { run_uid: "u".into(), status: "running".into(), ..v1::Run::default() };
    let running = crate::model::run::ReportedRun::from_wire(running).expect("a run");
    tx.add_reported_run(server, &running, NOW_MS).await.expect("added");
    tx.commit().await.expect("committed");
    world.enrol(&world.token(1, Some(server)).await, &key()).await.expect("enrolled anew");
    let runs = world.store.runs(server, &RunFilter { limit: 9, ..RunFilter::default() }).await.expect("read");
    let shown: Vec<_> = runs.iter().map(|run| (run.status.as_str(), run.error_class.as_str())).collect();
    assert_eq!(shown, [("failed", "interrupted"), ("queued", ""), ("failed", "interrupted")]);
}
