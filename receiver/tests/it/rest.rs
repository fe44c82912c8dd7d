//! REST over the wire: tenants apart, mistakes named, the contract kept.

use hestner_receiver::model::{CompanyId, Scope};
use serde_json::{Value, json};

use crate::world::{World, run, wait_until};

fn policy() -> Value {
    json!({
        "service": "docs", "cron": "30 2 * * *", "time_zone": "America/Sao_Paulo", "retention_days": 7,
        "retention_count": 3, "destination": "local", "encryption_enabled": true,
    })
}

/// Every route that needs a key: method, path of server 1 of company 1, body.
fn routes() -> Vec<(&'static str, &'static str, Value)> {
    vec![
        ("GET", "/v1/companies/1/servers", Value::Null),
        ("GET", "/v1/servers/1/overview", Value::Null),
        ("GET", "/v1/servers/1/services", Value::Null),
        ("GET", "/v1/servers/1/snapshots", Value::Null),
        ("GET", "/v1/servers/1/snapshots/u1", Value::Null),
        ("GET", "/v1/servers/1/snapshots/1", Value::Null),
        ("GET", "/v1/servers/1/snapshot-policy", Value::Null),
        ("GET", "/v1/servers/1/repository-keys", Value::Null),
        ("GET", "/v1/servers/1/costs", Value::Null),
        ("POST", "/v1/servers/1/snapshots", json!({ "service": "docs" })),
        ("PUT", "/v1/servers/1/snapshot-policy", policy()),
    ]
}

async fn world_with_a_run() -> World {
    let world = World::new().await;
    let agent = world.agent(1).await;
    assert_eq!((agent.server, agent.company), (1, 1));
    let mut line = world.session(&agent).await;
    line.report(1, hestner_proto::v1::report::Body::Run(run("u1", "success"))).await;
    assert_eq!(line.acked().await, 1);
    world
}

#[tokio::test]
async fn another_companys_things_are_like_things_that_do_not_exist() {
    let world = world_with_a_run().await;
    let (own, foreign) = (world.key(Scope::Company(CompanyId(1))).await, world.key(Scope::Company(CompanyId(2))).await);
    for (method, path, body) in routes() {
        let refused = world.send(method, path, &foreign, &body).await;
        assert_eq!((refused.status, refused.code().as_str()), (404, "not_found"), "{method} {path}");
        let missing = world
            .send(
                method,
                &path.replace("servers/1", "servers/77").replace("companies/1", "companies/77"),
                &foreign,
                &body,
            )
            .await;
        assert_eq!(refused.body, missing.body, "{method} {path}");
        let allowed = world.send(method, path, &own, &body).await;
        assert!(allowed.status < 300, "{method} {path}: {} {}", allowed.status, allowed.body);
    }
    let seen = world.get("/v1/companies", &foreign).await.json();
    assert_eq!(
        seen["items"].as_array().map(|items| items.iter().map(|c| c["id"].clone()).collect()),
        Some(vec![json!(2)])
    );
}

#[tokio::test]
async fn without_a_valid_key_every_route_is_closed() {
    let world = World::new().await;
    for (method, path, body) in routes().into_iter().chain([("GET", "/v1/companies", Value::Null)]) {
        let missing = world.http(method, path, &[("Content-Type", "application/json")], &body.to_string()).await;
        assert_eq!((missing.status, missing.code().as_str()), (401, "key_missing"), "{method} {path}");
        assert!(missing.head.contains("content-type: application/problem+json"), "{}", missing.head);
        let wrong = world.send(method, path, "hsk_1_abc", &body).await;
        assert_eq!((wrong.status, wrong.code().as_str()), (401, "key_invalid"), "{method} {path}");
    }
}

#[tokio::test]
async fn input_that_breaks_a_rule_is_named_and_changes_nothing() {
    let world = world_with_a_run().await;
    let key = world.key(Scope::All).await;
    let snapshots = "/v1/servers/1/snapshots";
    let policies = "/v1/servers/1/snapshot-policy";
    let without = |field: &str| {
        let mut body = policy();
        body.as_object_mut().expect("an object").remove(field);
        body
    };
    let with = |field: &str, value: Value| {
        let mut body = policy();
        body[field] = value;
        body
    };
    for (method, path, body, named) in [
        ("POST", snapshots, json!({}), "service"),
        ("POST", snapshots, json!({ "service": "docs", "verb": "restore" }), "verb"),
        ("POST", snapshots, json!({ "service": "docs", "expires_in": "soon" }), "expires_in"),
        ("POST", snapshots, json!({ "service": "docs", "expires_in": "1000days" }), "expires_in"),
        ("POST", snapshots, json!({ "service": "" }), "service"),
        ("PUT", policies, without("destination"), "destination"),
        ("PUT", policies, with("cron", json!("* * * * * *")), "five fields"),
        ("PUT", policies, with("time_zone", json!("Nowhere")), "time_zone"),
        ("PUT", policies, with("retention_days", json!(-1)), "retention_days"),
        ("PUT", policies, with("command", json!("rm")), "command"),
        ("PUT", policies, with("compression_level", json!(0)), "compression_level"),
        ("PUT", policies, with("priority", json!("realtime")), "priority"),
        ("PUT", policies, with("force_read", json!("yes")), "force_read"),
        ("GET", "/v1/servers/1/overview?range=2h", Value::Null, "2h"),
        ("GET", "/v1/servers/1/overview?rnge=1h", Value::Null, "rnge"),
        ("GET", "/v1/servers/1/costs?month=2026-13", Value::Null, "month"),
        ("GET", "/v1/servers/1/snapshots?limit=0", Value::Null, "limit"),
        ("GET", "/v1/servers/1/snapshots?status=done", Value::Null, "queued, running"),
        ("GET", "/v1/companies/1/servers?status=asleep", Value::Null, "asleep"),
    ] {
        let refused = world.send(method, path, &key, &body).await;
        assert_eq!((refused.status, refused.code().as_str()), (422, "invalid_input"), "{method} {path} {body}");
        assert!(refused.body.contains(named), "{named} in {}", refused.body);
    }
    assert_eq!(world.get(snapshots, &key).await.json()["items"].as_array().map(Vec::len), Some(1));
}

#[tokio::test]
async fn a_listing_of_runs_is_small_and_one_run_shows_all() {
    let world = World::new().await;
    let agent = world.agent(1).await;
    let mut line = world.session(&agent).await;
    let told = hestner_proto::v1::Run {
        log_tail: "last words".into(),
        warnings: vec!["w".repeat(4096); 100],
        unreadable_names: vec!["n".repeat(4096); 100],
        ..run("u1", "failed")
    };
    line.report(1, hestner_proto::v1::report::Body::Run(told)).await;
    assert_eq!(line.acked().await, 1);
    let key = world.key(Scope::All).await;
    let listed = world.get("/v1/servers/1/snapshots", &key).await;
    assert!(listed.body.len() < 2_000, "{} bytes", listed.body.len());
    let one = world.get("/v1/servers/1/snapshots/u1", &key).await;
    assert_eq!(one.json()["log_tail"], "last words");
    assert!(one.body.contains("www") && one.body.contains("nnn"));
    assert!(one.body.len() < 40_000, "{} bytes", one.body.len());
}

#[tokio::test]
async fn requests_of_a_wrong_form_get_a_problem_document_too() {
    let world = World::new().await;
    let key = format!("Bearer {}", world.key(Scope::All).await);
    let auth = ("Authorization", key.as_str());
    let json = ("Content-Type", "application/json");
    let large = format!("{{\"service\": \"{}\"}}", "x".repeat(70_000));
    for (method, path, headers, body, expected) in [
        ("GET", "/v1/nothing", vec![auth], "", (404, "no_such_page")),
        ("DELETE", "/v1/companies", vec![auth], "", (405, "method_not_allowed")),
        ("GET", "/v1/servers/abc/overview", vec![auth], "", (404, "not_found")),
        ("POST", "/v1/servers/1/snapshots", vec![auth], "{}", (415, "not_json")),
        ("POST", "/v1/servers/1/snapshots", vec![auth, json], "{", (422, "invalid_input")),
        ("POST", "/v1/servers/1/snapshots", vec![auth, json], large.as_str(), (413, "body_too_large")),
    ] {
        let refused = world.http(method, path, &headers, body).await;
        assert_eq!((refused.status, refused.code().as_str()), expected, "{method} {path}");
        let problem = refused.json();
        for member in ["type", "title", "status", "detail", "code", "next_step", "retry"] {
            assert!(!problem[member].is_null(), "{member} in {problem}");
        }
    }
}

#[tokio::test]
async fn the_five_fields_of_a_policy_and_no_body_for_a_snapshot_are_enough_where_there_is_one_service() {
    let world = World::new().await;
    let agent = world.agent(1).await;
    let line = world.session(&agent).await;
    let service = hestner_proto::v1::Service { name: "docs".into(), consistency: "none".into(), ..Default::default() };
    let inventory = hestner_proto::v1::Inventory { services: vec![service], ..Default::default() };
    line.send(hestner_proto::v1::from_agent::Body::Inventory(inventory)).await;
    let key = world.key(Scope::All).await;
    wait_until("the service", async || {
        world.get("/v1/servers/1/services", &key).await.json()["items"][0]["name"] == "docs"
    })
    .await;
    let five = json!({
        "cron": "30 2 * * *", "retention_days": 7, "retention_count": 3, "destination": "local",
        "encryption_enabled": true,
    });
    let put = world.send("PUT", "/v1/servers/1/snapshot-policy", &key, &five).await;
    assert_eq!((put.status, put.json()["service"].as_str()), (200, Some("docs")), "{}", put.body);
    let bearer = format!("Bearer {key}");
    let asked = world.http("POST", "/v1/servers/1/snapshots", &[("Authorization", &bearer)], "").await;
    assert_eq!((asked.status, asked.json()["service"].as_str()), (202, Some("docs")), "{}", asked.body);
}

#[tokio::test]
async fn the_same_idempotency_key_queues_one_run() {
    let world = world_with_a_run().await;
    let key = format!("Bearer {}", world.key(Scope::All).await);
    let headers = [("Authorization", key.as_str()), ("Content-Type", "application/json"), ("Idempotency-Key", "k1")];
    let mut ids = Vec::new();
    for _ in 0..2 {
        let queued = world.http("POST", "/v1/servers/1/snapshots", &headers, "{\"service\":\"docs\"}").await;
        assert_eq!(queued.status, 202);
        ids.push(queued.json()["id"].clone());
    }
    assert_eq!(ids[0], ids[1]);
    let other = world.http("POST", "/v1/servers/1/snapshots", &headers, "{\"service\":\"other\"}").await;
    assert_eq!((other.status, other.code().as_str()), (422, "idempotency_mismatch"));
}

#[tokio::test]
async fn a_policy_comes_back_as_it_was_put_and_waits_for_the_host() {
    let world = world_with_a_run().await;
    let key = world.key(Scope::All).await;
    let put = world.send("PUT", "/v1/servers/1/snapshot-policy", &key, &policy()).await;
    assert_eq!(put.status, 200, "{}", put.body);
    let shown = &world.get("/v1/servers/1/snapshot-policy", &key).await.json()["items"][0];
    for (field, value) in policy().as_object().expect("an object") {
        assert_eq!(&shown[field], value, "{field}");
    }
    assert_eq!((&shown["state"], &shown["misfire"]), (&json!("pending"), &json!("skip")));
    assert!(shown["next_run_at"].as_str().expect("due").ends_with("05:30:00.000Z"), "{shown}");
    let overview = world.get("/v1/servers/1/overview", &key).await.json();
    assert_eq!(overview["next_policy"]["service"], "docs");
}

#[tokio::test]
async fn the_request_id_is_the_callers_if_it_is_plain() {
    let world = World::new().await;
    assert!(world.http("GET", "/health", &[("X-Request-Id", "abc-1")], "").await.head.contains("x-request-id: abc-1"));
    let made = world.http("GET", "/health", &[("X-Request-Id", "a b")], "").await;
    assert!(made.head.contains("x-request-id: ") && !made.head.contains("x-request-id: a b"));
}

#[tokio::test]
async fn the_kept_description_of_the_api_is_up_to_date() {
    let world = World::new().await;
    let served = world.http("GET", "/v1/openapi.json", &[], "").await.body;
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json");
    let text = format!("{served}\n");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        let path = std::path::Path::new(path);
        hestner_receiver::platform::files::write_atomically(path, text.as_bytes(), 0o644).expect("written");
    }
    let kept = std::fs::read_to_string(path).unwrap_or_default();
    assert!(kept == text, "run the tests with UPDATE_GOLDEN=1 and look at the difference");
    for (_, path, _) in routes() {
        let pattern = path.replace("companies/1", "companies/{company_id}").replace("servers/1", "servers/{server_id}");
        let pattern = pattern.replace("/u1", "/{run}").replace("snapshots/1", "snapshots/{run}");
        assert!(kept.contains(&format!("\"{pattern}\"")), "{pattern}");
    }
}
