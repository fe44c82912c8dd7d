//! Sessions over the wire: welcome and goodbye, exactly-once reports, directives until they are answered.

use hestner_proto::v1;
use hestner_proto::v1::from_receiver::Body;
use hestner_receiver::model::{Scope, ServerId};
use hestner_receiver::platform::clock::{Clock as _, ManualClock, SystemClock};
use hestner_receiver::store::directives::{Kind, NewDirective};
use serde_json::json;

use crate::world::{World, run, wait_until};

fn report(run: v1::Run) -> v1::report::Body {
    v1::report::Body::Run(run)
}

#[tokio::test]
async fn a_run_that_is_reported_is_acknowledged_and_stands_with_its_costs_in_rest() {
    let world = World::new().await;
    let agent = world.agent(1).await;
    let mut line = world.session(&agent).await;
    line.report(1, report(run("u1", "running"))).await;
    assert_eq!(line.acked().await, 1);
    let progress = v1::Progress { run_uid: "u1".into(), phase: "archive".into(), bytes_done: 5, ..Default::default() };
    line.send(v1::from_agent::Body::Progress(progress)).await;
    let key = world.key(Scope::All).await;
    let path = format!("/v1/servers/{}/snapshots/u1", agent.server);
    wait_until("progress", async || world.get(&path, &key).await.json()["progress"]["bytes_done"] == 5).await;
    line.report(2, report(run("u1", "success"))).await;
    line.report(2, report(run("u1", "success"))).await;
    assert_eq!(line.acked().await, 2);
    let shown = world.get(&path, &key).await.json();
    assert_eq!((shown["status"].as_str(), shown["progress"].is_null()), (Some("success"), true));
    let costs = world.get(&format!("/v1/servers/{}/costs", agent.server), &key).await.json();
    assert_eq!(costs["rows"].as_array().map(Vec::len), Some(1));
    assert_eq!(costs["total"], costs["rows"][0]["amount"]);
}

#[tokio::test]
async fn an_inventory_is_wanted_once_and_shown() {
    let world = World::new().await;
    let agent = world.agent(1).await;
    let mut line = world.greet(&agent, "h1").await;
    let Body::Welcome(welcome) = line.next().await else { panic!("no welcome") };
    assert!(welcome.inventory_wanted && welcome.heartbeat_seconds == 30);
    let service = v1::Service { name: "docs".into(), runtime: "files".into(), ..Default::default() };
    let grant = v1::Grant { service: "docs".into(), verb: "snapshot".into(), value: "allow".into() };
    let inventory =
        v1::Inventory { hash: "h1".into(), services: vec![service], grants: vec![grant], ..Default::default() };
    line.send(v1::from_agent::Body::Inventory(inventory)).await;
    let key = world.key(Scope::All).await;
    let path = format!("/v1/servers/{}/services", agent.server);
    wait_until("the service", async || {
        world.get(&path, &key).await.json()["items"][0]["grants"][0]["value"] == "allow"
    })
    .await;
    let mut again = world.greet(&agent, "h1").await;
    let Body::Welcome(welcome) = again.next().await else { panic!("no welcome") };
    assert!(!welcome.inventory_wanted);
}

#[tokio::test]
async fn a_directive_comes_at_once_and_again_after_a_reconnect_until_it_is_answered() {
    let world = World::new().await;
    let agent = world.agent(1).await;
    let key = world.key(Scope::All).await;
    let mut line = world.session(&agent).await;
    let path = format!("/v1/servers/{}/snapshots", agent.server);
    let queued = world.send("POST", &path, &key, &json!({ "service": "docs" })).await;
    assert_eq!((queued.status, queued.json()["status"].as_str()), (202, Some("queued")));
    assert!(queued.head.contains("location: /v1/servers/1/snapshots/1"), "{}", queued.head);
    let first = line.directive().await;
    drop(line);
    let mut line = world.session(&agent).await;
    let again = line.directive().await;
    assert_eq!(first, again);
    line.report(1, report(v1::Run { directive_id: again.id, ..run("u1", "success") })).await;
    assert_eq!(line.acked().await, 1);
    assert_eq!(world.get(&format!("{path}/1"), &key).await.json()["run_uid"], "u1");
    let mut line = world.session(&agent).await;
    line.report(2, report(run("u2", "success"))).await;
    assert!(matches!(line.next().await, Body::Ack(_)), "nothing is delivered a third time");
}

#[tokio::test]
async fn a_directive_that_another_process_wrote_reaches_an_open_session() {
    let world = World::new().await;
    let agent = world.agent(1).await;
    let mut line = world.session(&agent).await;
    let mut tx = world.store.begin().await.expect("begun");
    let new = NewDirective {
        id: "d",
        server: ServerId(agent.server),
        kind: Kind::Run,
        service: "docs",
        verb: "format",
        created_at_ms: 1,
        expires_at_ms: i64::MAX,
    };
    tx.add_directive(&new).await.expect("added");
    tx.commit().await.expect("committed");
    let Some(v1::directive::Ask::Run(asked)) = line.directive().await.ask else { panic!("no run") };
    assert_eq!(asked.verb, "format");
}

#[tokio::test]
async fn a_newer_session_replaces_the_older() {
    let world = World::new().await;
    let agent = world.agent(1).await;
    let mut older = world.session(&agent).await;
    let mut newer = world.session(&agent).await;
    assert_eq!(older.goodbye().await.code, "replaced");
    newer.report(1, report(run("u1", "success"))).await;
    assert_eq!(newer.acked().await, 1);
}

#[tokio::test]
async fn a_revoked_server_loses_its_open_session_and_gets_no_other() {
    let world = World::new().await;
    let agent = world.agent(1).await;
    let mut line = world.session(&agent).await;
    let mut tx = world.store.begin().await.expect("begun");
    tx.set_server_status(ServerId(agent.server), "revoked").await.expect("set");
    tx.commit().await.expect("committed");
    assert_eq!(line.goodbye().await.code, "revoked");
    for _ in 0..2 {
        // The client would resume a TLS session if it were offered one.
        assert_eq!(world.greet(&agent, "").await.goodbye().await.code, "revoked");
    }
}

#[tokio::test]
async fn a_fork_ends_the_session_unacknowledged_and_keeps_the_server_out() {
    let world = World::new().await;
    let agent = world.agent(1).await;
    let mut line = world.session(&agent).await;
    line.report(1, report(run("u1", "success"))).await;
    assert_eq!(line.acked().await, 1);
    line.report(1, report(run("other", "success"))).await;
    let Body::Goodbye(goodbye) = line.next().await else { panic!("no goodbye") };
    assert_eq!(goodbye.code, "fork");
    assert_eq!(world.greet(&agent, "").await.goodbye().await.code, "fork");
}

#[tokio::test]
async fn messages_that_mean_nothing_end_the_session_with_a_reason() {
    let world = World::new().await;
    let agent = world.agent(1).await;
    let mut unannounced = world.line(&agent).await;
    unannounced.send(v1::from_agent::Body::Heartbeat(v1::Heartbeat::default())).await;
    assert_eq!(unannounced.goodbye().await.code, "bad_message");
    let mut line = world.session(&agent).await;
    let bad = v1::Envelope { epoch: "e".into(), seq: 1, sha256: vec![0; 32], body: vec![1] };
    line.send(v1::from_agent::Body::Report(bad)).await;
    let goodbye = line.goodbye().await;
    assert_eq!(goodbye.code, "bad_message");
    assert!(goodbye.message.contains("hash"), "{}", goodbye.message);
}

#[tokio::test]
async fn a_renewal_is_answered_inside_the_session_and_the_new_key_opens_the_next() {
    let world = World::new().await;
    let mut agent = world.agent(1).await;
    let mut line = world.session(&agent).await;
    let key = rcgen::KeyPair::generate().expect("a key");
    let csr_der = rcgen::CertificateParams::default().serialize_request(&key).expect("a request").der().to_vec();
    line.send(v1::from_agent::Body::Renewal(v1::RenewalRequest { csr_der })).await;
    let Body::Certificate(renewed) = line.next().await else { panic!("no certificate") };
    (agent.key, agent.certificate) = (key, renewed.certificate_der);
    let mut line = world.session(&agent).await;
    line.report(1, report(run("u1", "success"))).await;
    assert_eq!(line.acked().await, 1);
}

#[tokio::test]
async fn heartbeats_make_a_series_and_the_server_is_online_while_it_has_a_session() {
    let world = World::with("[session]\nflush_interval = \"1s\"\n").await;
    let agent = world.agent(1).await;
    let key = world.key(Scope::All).await;
    let path = format!("/v1/servers/{}/overview?range=24h", agent.server);
    assert_eq!(world.get(&path, &key).await.json()["server"]["status"], "offline");
    let line = world.session(&agent).await;
    line.send(v1::from_agent::Body::Heartbeat(v1::Heartbeat { load1: 1.5, ..Default::default() })).await;
    wait_until("a point", async || world.get(&path, &key).await.json()["series"][0]["load1"] == 1.5).await;
    assert_eq!(world.get(&path, &key).await.json()["server"]["status"], "online");
    drop(line);
    wait_until("offline", async || world.get(&path, &key).await.json()["server"]["status"] == "offline").await;
}

#[tokio::test]
async fn stopping_says_goodbye_and_takes_the_address_file_away() {
    let mut world = World::new().await;
    let agent = world.agent(1).await;
    let mut line = world.session(&agent).await;
    let file = world.folder.path().join("addresses.json");
    let told: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).expect("there")).expect("JSON");
    assert_eq!(told["agents"], world.addresses.agents.to_string());
    world.drain.begin();
    assert_eq!(line.goodbye().await.code, "draining");
    world.stop().await;
    assert!(!file.exists());
}

#[tokio::test]
async fn a_machine_that_was_set_back_is_acknowledged_nothing_of_what_it_wrote_since() {
    let world = World::new().await;
    let agent = world.agent(1).await;
    let mut line = world.session(&agent).await;
    let told: Vec<_> = (1..=10).map(|n| report(run(&format!("u{n}"), "success"))).collect();
    for (seq, body) in (1..).zip(told.clone()) {
        line.report(seq, body).await;
        assert_eq!(line.acked().await, seq);
    }
    drop(line);
    let mut back = world.session(&agent).await;
    back.report(5, told[4].clone()).await;
    back.report(6, report(run("other", "success"))).await;
    loop {
        match back.next().await {
            Body::Ack(ack) => assert_eq!(ack.seq, 5, "it showed nothing later that is the same"),
            Body::Goodbye(goodbye) => break assert_eq!(goodbye.code, "fork"),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn inventories_that_come_fast_are_held_back_and_the_newest_counts() {
    let world = World::new().await;
    let agent = world.agent(1).await;
    let line = world.session(&agent).await;
    for name in ["first", "second", "newest"] {
        let service = v1::Service { name: name.into(), ..Default::default() };
        let inventory = v1::Inventory { services: vec![service], ..Default::default() };
        line.send(v1::from_agent::Body::Inventory(inventory)).await;
    }
    let key = world.key(Scope::All).await;
    let path = format!("/v1/servers/{}/services", agent.server);
    let shown = async || world.get(&path, &key).await.json()["items"][0]["name"].clone();
    wait_until("the first", async || shown().await == "first").await;
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    assert_eq!(shown().await, "first");
    wait_until("the newest", async || shown().await == "newest").await;
}

#[tokio::test]
async fn a_second_renewal_at_once_ends_the_session() {
    let world = World::new().await;
    let agent = world.agent(1).await;
    let mut line = world.session(&agent).await;
    for _ in 0..2 {
        let key = rcgen::KeyPair::generate().expect("a key");
        let csr_der = rcgen::CertificateParams::default().serialize_request(&key).expect("a request").der().to_vec();
        line.send(v1::from_agent::Body::Renewal(v1::RenewalRequest { csr_der })).await;
    }
    assert_eq!(line.goodbye().await.code, "bad_message");
}

#[tokio::test]
async fn a_session_ends_with_its_certificate() {
    let clock = ManualClock::at(SystemClock.now_ms());
    let world = World::at(clock.clone(), "[session]\ncertificate_ttl = \"60s\"\n").await;
    let agent = world.agent(1).await;
    clock.advance_ms(58_000);
    let mut line = world.session(&agent).await;
    let goodbye = line.goodbye().await;
    assert_eq!(goodbye.code, "unknown");
    assert!(goodbye.message.contains("expired"), "{}", goodbye.message);
}

#[tokio::test]
async fn a_session_whose_agent_reads_nothing_ends_within_moments_when_it_is_revoked() {
    let world = World::new().await;
    let agent = world.agent(1).await;
    let mut tx = world.store.begin().await.expect("begun");
    // More than the windows and buffers between the receiver and an agent that does not read can hold.
    let service = "s".repeat(100_000);
    for n in 0..200 {
        let id = format!("d{n}");
        let new = NewDirective {
            id: &id,
            server: ServerId(agent.server),
            kind: Kind::Run,
            service: &service,
            verb: "snapshot",
            created_at_ms: 1,
            expires_at_ms: i64::MAX,
        };
        tx.add_directive(&new).await.expect("added");
    }
    tx.commit().await.expect("committed");
    let _deaf = world.session(&agent).await;
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    let sessions = async || {
        let page = world.http("GET", "/metrics", &[], "").await.body;
        page.lines().find_map(|line| line.strip_prefix("hestner_sessions ").map(str::to_owned))
    };
    assert_eq!(sessions().await.as_deref(), Some("1"));
    let mut tx = world.store.begin().await.expect("begun");
    tx.set_server_status(ServerId(agent.server), "revoked").await.expect("set");
    tx.commit().await.expect("committed");
    wait_until("the end", async || sessions().await.as_deref() == Some("0")).await;
}

#[tokio::test]
async fn a_peer_that_was_turned_away_loses_its_connection() {
    let world = World::new().await;
    let agent = world.agent(1).await;
    let mut tx = world.store.begin().await.expect("begun");
    tx.set_server_status(ServerId(agent.server), "revoked").await.expect("set");
    tx.commit().await.expect("committed");
    let mut client = world.agents_client(&agent).await;
    let mut silent = World::line_of(&mut client).await.expect("a stream");
    let mut first = World::line_of(&mut client).await.expect("a stream");
    first.send(crate::world::hello("")).await;
    assert_eq!(first.goodbye().await.code, "revoked");
    // Nobody said goodbye to the other stream: it ended with the connection.
    assert!(!matches!(silent.maybe_next().await, Ok(Some(_))));
}

#[tokio::test]
async fn one_key_has_a_bounded_number_of_connections() {
    let world = World::new().await;
    let (agent, other) = (world.agent(1).await, world.agent(1).await);
    let mut kept = Vec::new();
    for _ in 0..8 {
        let mut client = world.agents_client(&agent).await;
        kept.push((World::line_of(&mut client).await.expect("a stream"), client));
    }
    assert!(!world.connects(&agent).await);
    world.session(&other).await;
    drop(kept);
    wait_until("a free place", async || world.connects(&agent).await).await;
}
