//! Enrolment over the wire: what a host is told.

use rcgen::KeyPair;
use tonic::{Code, Status};

use crate::world::{World, enrol_request};

fn code(status: &Status) -> &str {
    status.metadata().get("hestner-code").and_then(|value| value.to_str().ok()).unwrap_or_default()
}

#[tokio::test]
async fn a_refusal_carries_a_stable_code_and_the_next_step() {
    let world = World::new().await;
    let mut client = world.enrolment_client().await;
    let token = world.token(1).await;
    let key = KeyPair::generate().expect("a key");
    let mut asked = enrol_request(&token, &key);
    asked.recovery_fingerprint = "sha256:0".into();
    let refused = client.enroll(asked).await.expect_err("refused");
    assert_eq!(code(&refused), "recovery_key_mismatch");
    assert!(refused.metadata().contains_key("hestner-next-step"));
    client.enroll(enrol_request(&token, &key)).await.expect("enrolled");
    let other = KeyPair::generate().expect("a key");
    let refused = client.enroll(enrol_request(&token, &other)).await.expect_err("used");
    assert_eq!(code(&refused), "token_used");
    assert!(!refused.message().contains("hjt_"), "the token is not repeated");
}

#[tokio::test]
async fn an_address_that_tries_too_often_is_told_to_wait() {
    let world = World::with("[enrolment]\nattempts_per_minute = 3\n").await;
    let mut client = world.enrolment_client().await;
    let key = KeyPair::generate().expect("a key");
    for _ in 0..3 {
        let refused = client.enroll(enrol_request("hjt_1_x", &key)).await.expect_err("unknown");
        assert_eq!(code(&refused), "token_unknown");
    }
    let refused = client.enroll(enrol_request("hjt_1_x", &key)).await.expect_err("limited");
    assert_eq!((refused.code(), code(&refused)), (Code::ResourceExhausted, "too_many_attempts"));
}
