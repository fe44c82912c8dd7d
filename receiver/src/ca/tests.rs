//! What the authority must never sign, and what its mutual listener must never forget.
//!
//! Handshakes run in memory between a real rustls client, with resumption on as it is by default, and our own
//! server settings; certificates are read back with another library than the one that made them.

use std::sync::Arc;

use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConnection};

use super::listener::{ListenerCertificates, mutual_tls};
use super::*;
use crate::platform::clock::{Clock as _, SystemClock};

const DAY: Duration = Duration::from_secs(86_400);

fn authority() -> (tempfile::TempDir, Arc<Authority>) {
    let folder = tempfile::tempdir().expect("a folder");
    let authority = Authority::open(folder.path(), "t.example", SystemClock.now_ms()).expect("made");
    (folder, Arc::new(authority))
}

fn agent() -> AgentId {
    AgentId { trust_domain: "t.example".into(), company_id: 1, server_id: 2 }
}

fn greedy_request(key: &KeyPair) -> Vec<u8> {
    let mut params = CertificateParams::new(vec!["receiver.example".to_owned()]).expect("params");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.serialize_request(key).expect("a request").der().to_vec()
}

#[test]
fn a_request_for_an_authority_and_a_foreign_name_gets_neither() {
    let (_folder, authority) = authority();
    let key = KeyPair::generate().expect("a key");
    let proven = ProvenKey::from_request(&greedy_request(&key)).expect("a good signature");
    let now_ms = SystemClock.now_ms();
    let der = authority.sign_agent(&proven, &agent(), now_ms, DAY).expect("signed");
    let (_, signed) = x509_parser::parse_x509_certificate(&der).expect("readable");
    assert!(!signed.is_ca());
    let usage = signed.extended_key_usage().expect("readable").expect("there").value;
    assert!(usage.client_auth && !usage.server_auth && !usage.any);
    assert!(!signed.key_usage().expect("readable").expect("there").value.key_cert_sign());
    assert_eq!(read_peer(&der, "t.example").expect("one name").agent, agent());
    let (from, until) = (signed.validity().not_before.timestamp(), signed.validity().not_after.timestamp());
    assert_eq!((from, until), (now_ms / 1000 - 300, now_ms / 1000 + 86_400));
}

#[test]
fn a_request_whose_signature_is_wrong_is_refused() {
    let key = KeyPair::generate().expect("a key");
    let mut der = greedy_request(&key);
    let last = der.len() - 1;
    der[last] ^= 1;
    assert!(matches!(ProvenKey::from_request(&der), Err(Error::BadRequest(_))));
    assert!(matches!(ProvenKey::from_request(b"junk"), Err(Error::BadRequest(_))));
}

#[test]
fn a_peer_of_another_trust_domain_is_nobody() {
    let (_folder, authority) = authority();
    let proven = ProvenKey::from_request(&greedy_request(&KeyPair::generate().expect("a key"))).expect("good");
    let der = authority.sign_agent(&proven, &agent(), SystemClock.now_ms(), DAY).expect("signed");
    assert!(read_peer(&der, "other.example").is_err());
    assert!(read_peer(authority.certificate(), "t.example").is_err());
}

#[test]
fn a_second_start_finds_the_same_authority_and_a_lost_certificate_is_not_a_lost_key() {
    let (folder, first) = authority();
    let again = Authority::open(folder.path(), "t.example", 0).expect("opened");
    assert_eq!(first.pin(), again.pin());
    std::fs::remove_file(folder.path().join("ca/cert.pem")).expect("removed");
    let healed = Authority::open(folder.path(), "t.example", 0).expect("signed anew");
    assert_eq!(key_name(first.issuer.key()), key_name(healed.issuer.key()));
}

#[test]
fn a_lost_key_is_an_error_and_not_a_new_authority() {
    let (folder, _) = authority();
    std::fs::remove_file(folder.path().join("ca/key.pem")).expect("removed");
    assert!(matches!(Authority::open(folder.path(), "t.example", 0), Err(Error::KeyMissing(_))));
}

#[test]
fn the_key_is_readable_by_its_owner_only() {
    use std::os::unix::fs::PermissionsExt as _;
    let (folder, _) = authority();
    let mode = std::fs::metadata(folder.path().join("ca/key.pem")).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

/// One full handshake in memory; returns the server's side when it is done.
fn handshake(
    client: &Arc<ClientConfig>,
    server: &Arc<rustls::ServerConfig>,
) -> Result<ServerConnection, rustls::Error> {
    let name = ServerName::try_from("localhost").expect("a name");
    let mut client = ClientConnection::new(Arc::clone(client), name).expect("a client");
    let mut server = ServerConnection::new(Arc::clone(server)).expect("a server");
    for _ in 0..10 {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).expect("memory");
        }
        let mut bytes = wire.as_slice();
        while !bytes.is_empty() {
            server.read_tls(&mut bytes).expect("memory");
            server.process_new_packets()?;
        }
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).expect("memory");
        }
        let mut bytes = wire.as_slice();
        while !bytes.is_empty() {
            client.read_tls(&mut bytes).expect("memory");
            client.process_new_packets()?;
        }
    }
    assert!(!server.is_handshaking());
    Ok(server)
}

fn client(authority: &Authority, identity: Option<(&KeyPair, Vec<u8>)>) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.certificate().clone()).expect("a root");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder =
        ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().expect("versions");
    let builder = builder.with_root_certificates(roots);
    // Resumption is on by default at a rustls client: it would take every ticket it is offered.
    Arc::new(match identity {
        None => builder.with_no_client_auth(),
        Some((key, der)) => {
            let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
            builder.with_client_auth_cert(vec![CertificateDer::from(der)], private).expect("an identity")
        }
    })
}

#[test]
fn a_second_handshake_is_a_full_one_and_shows_the_certificate_again() {
    let (_folder, authority) = authority();
    let certificates =
        ListenerCertificates::new(Arc::clone(&authority), vec!["localhost".into()], Arc::new(SystemClock))
            .expect("made");
    let server = mutual_tls(certificates).expect("settings");
    let key = KeyPair::generate().expect("a key");
    let proven = ProvenKey::from_request(&greedy_request(&key)).expect("good");
    let der = authority.sign_agent(&proven, &agent(), SystemClock.now_ms(), DAY).expect("signed");
    let client = client(&authority, Some((&key, der.clone())));
    for _ in 0..2 {
        let connection = handshake(&client, &server).expect("welcome");
        assert_eq!(connection.handshake_kind(), Some(rustls::HandshakeKind::Full));
        let shown = connection.peer_certificates().expect("verified anew");
        assert_eq!(shown[0].as_ref(), der);
    }
}

#[test]
fn a_client_without_a_certificate_or_with_anothers_authority_is_refused() {
    let (_folder, ours) = authority();
    let (_other_folder, theirs) = authority();
    let certificates =
        ListenerCertificates::new(Arc::clone(&ours), vec!["localhost".into()], Arc::new(SystemClock)).expect("made");
    let server = mutual_tls(certificates).expect("settings");
    assert!(handshake(&client(&ours, None), &server).is_err());
    let key = KeyPair::generate().expect("a key");
    let proven = ProvenKey::from_request(&greedy_request(&key)).expect("good");
    let der = theirs.sign_agent(&proven, &agent(), SystemClock.now_ms(), DAY).expect("signed");
    assert!(handshake(&client(&ours, Some((&key, der))), &server).is_err());
}

#[test]
fn a_listener_renews_its_certificate_past_half_its_life() {
    let (_folder, authority) = authority();
    let clock = crate::platform::clock::ManualClock::at(SystemClock.now_ms());
    let certificates = ListenerCertificates::new(authority, vec!["localhost".into()], clock.clone()).expect("made");
    let shown = |certificates: &ListenerCertificates| {
        certificates.current.lock().expect("free").as_ref().map(|(key, _)| key.cert[0].clone())
    };
    let first = shown(&certificates);
    let server = listener::server_tls(Arc::clone(&certificates), &[]).expect("settings");
    let client = client(&certificates.authority, None);
    handshake(&client, &server).expect("welcome");
    assert_eq!(shown(&certificates), first);
    clock.advance_ms(16 * 86_400_000);
    // The client's own clock has not moved, so it may refuse the new certificate; what counts is that it was made.
    let _ = handshake(&client, &server);
    assert_ne!(shown(&certificates), first);
}
