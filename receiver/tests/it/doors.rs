//! The doors themselves: who gets through, and whether one client can hold up the others.

use std::sync::Arc;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use hestner_receiver::auth::Auth;
use hestner_receiver::fleet::Fleet;
use hestner_receiver::metrics::{self, Metrics};
use hestner_receiver::model::counters::Counters;
use hestner_receiver::model::{CompanyId, Scope};
use hestner_receiver::platform::clock::SystemClock;
use hestner_receiver::platform::tls::PeerAddr;
use hestner_receiver::sessions::Sessions;
use tokio::net::TcpStream;
use tower::ServiceExt as _;

use crate::world::World;

#[tokio::test]
async fn without_a_certificate_there_is_no_session() {
    let world = World::new().await;
    // In TLS 1.3 the client may believe itself connected until it reads; either way it gets no stream.
    let _ = world.nobody().await;
}

#[tokio::test]
async fn clients_that_say_nothing_delay_nobody() {
    let world = World::new().await;
    let mut silent = Vec::new();
    for address in [world.addresses.agents, world.addresses.enrolment, world.addresses.rest] {
        for _ in 0..50 {
            silent.push(TcpStream::connect(address).await.expect("connected"));
        }
    }
    let agent = world.agent(1).await;
    world.session(&agent).await;
    assert_eq!(world.get("/health", "").await.status, 200);
}

#[tokio::test]
async fn metrics_are_for_loopback_and_for_keys_of_all_companies() {
    let world = World::new().await;
    let page = world.http("GET", "/metrics", &[], "").await;
    assert_eq!(page.status, 200);
    assert!(page.body.contains("hestner_reports_committed_total") && page.body.trim_end().ends_with("# EOF"));
    let counters = Arc::new(Counters::default());
    let (sessions, clock) = (Sessions::default(), Arc::new(SystemClock));
    let app = metrics::router(Metrics {
        auth: Auth::new(world.store.clone()),
        fleet: Fleet::new(world.store.clone(), sessions.clone(), clock, counters.clone()),
        sessions,
        counters,
    });
    let (all, one) = (world.key(Scope::All).await, world.key(Scope::Company(CompanyId(1))).await);
    for (peer, key, expected) in [
        ("192.0.2.1:1", None, StatusCode::UNAUTHORIZED),
        ("192.0.2.1:1", Some("hsk_1_nonsense"), StatusCode::UNAUTHORIZED),
        ("192.0.2.1:1", Some(one.as_str()), StatusCode::FORBIDDEN),
        ("192.0.2.1:1", Some(all.as_str()), StatusCode::OK),
        ("[::ffff:127.0.0.1]:1", None, StatusCode::OK),
    ] {
        let mut request = Request::get("/metrics").extension(PeerAddr(peer.parse().expect("an address")));
        if let Some(key) = key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        let response = app.clone().oneshot(request.body(Body::empty()).expect("a request")).await.expect("answered");
        assert_eq!(response.status(), expected, "{peer} {key:?}");
    }
}

#[tokio::test]
async fn health_says_whether_the_writer_works() {
    let world = World::new().await;
    assert_eq!(world.http("GET", "/health", &[], "").await.json()["status"], "ok");
    assert_eq!(world.http("GET", "/health/worker", &[], "").await.status, 200);
    // Somebody else holds the write lock for longer than the page waits.
    let blocker = world.store.begin().await.expect("begun");
    let stuck = world.http("GET", "/health/worker", &[], "").await;
    assert_eq!((stuck.status, stuck.code().as_str()), (503, "worker_stuck"));
    drop(blocker);
}

#[tokio::test]
async fn a_second_receiver_on_the_same_state_does_not_start() {
    let world = World::new().await;
    let text = format!("state_dir = \"{}\"\n", world.folder.path().display());
    let settings = hestner_receiver::server::settings::parse(&text).expect("good settings");
    let second = hestner_receiver::server::build(settings, Arc::new(SystemClock)).await;
    let refused = second.err().expect("refused").to_string();
    assert!(refused.contains("already"), "{refused}");
}

#[tokio::test]
async fn rest_speaks_tls_with_the_pinned_authority_unless_told_otherwise() {
    let world = World::with_tls_rest().await;
    assert!(world.https("/health").await.contains("\"status\":\"ok\""));
}
