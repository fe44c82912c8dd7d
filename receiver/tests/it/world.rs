//! A receiver on loopback and agents that speak to it, as stories need them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hestner_proto::identity::recovery_fingerprint;
use hestner_proto::v1;
use hestner_proto::v1::agents_client::AgentsClient;
use hestner_proto::v1::enrolment_client::EnrolmentClient;
use hestner_receiver::lifecycle::Drain;
use hestner_receiver::model::{Actor, CompanyId, Scope};
use hestner_receiver::platform::clock::{Clock as _, SharedClock, SystemClock};
use hestner_receiver::server::{self, Addresses, Opened, Running, settings};
use hestner_receiver::store::Store;
use hyper_util::rt::TokioIo;
use prost::Message as _;
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

pub(crate) const RECIPIENT: &str = "age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p";
const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) struct World {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) addresses: Addresses,
    pub(crate) store: Store,
    pub(crate) drain: Drain,
    running: Option<Running>,
    enrolment: hestner_receiver::enrolment::Enrolment,
    auth: hestner_receiver::auth::Auth,
    ca: Vec<u8>,
}

impl World {
    /// A receiver with the companies 1 and 2.
    pub(crate) async fn new() -> Self {
        Self::with("").await
    }

    /// The same with REST over TLS.
    pub(crate) async fn with_tls_rest() -> Self {
        Self::of(false, "", Arc::new(SystemClock)).await
    }

    /// One GET over TLS; the whole answer.
    pub(crate) async fn https(&self, path: &str) -> String {
        let mut tls = self.tls(None);
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        let tcp = TcpStream::connect(self.addresses.rest).await.expect("connected");
        let name = ServerName::try_from("127.0.0.1").expect("a name");
        let mut stream = tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(name, tcp).await.expect("TLS");
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("written");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("read");
        answer
    }

    /// The same with more settings.
    pub(crate) async fn with(more: &str) -> Self {
        Self::at(Arc::new(SystemClock), more).await
    }

    /// The same with a clock of the test's own.
    pub(crate) async fn at(clock: SharedClock, more: &str) -> Self {
        Self::of(true, more, clock).await
    }

    async fn of(plain_http: bool, more: &str, clock: SharedClock) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let text = format!(
            "state_dir = \"{}\"\n[listen]\nagents = \"127.0.0.1:0\"\nenrolment = \"127.0.0.1:0\"\nrest = \"127.0.0.1:0\"\n\
             [rest]\nplain_http = {plain_http}\n{more}",
            folder.path().display()
        );
        let checked = settings::parse(&text).expect("good settings");
        let bound = server::build(checked, clock).await.expect("built");
        let Opened { store, fleet, enrolment, auth, authority, .. } = bound.opened();
        for name in ["acme", "beta"] {
            fleet.add_company(Actor::Cli("test".into()), name, RECIPIENT).await.expect("added");
        }
        let (store, enrolment, auth) = (store.clone(), enrolment.clone(), auth.clone());
        let ca = authority.certificate().to_vec();
        let addresses = bound.addresses();
        let drain = Drain::default();
        let running = Some(bound.start(drain.clone()).expect("started"));
        Self { folder, addresses, store, drain, running, enrolment, auth, ca }
    }

    pub(crate) async fn stop(&mut self) {
        self.drain.begin();
        let running = self.running.take().expect("running");
        assert_eq!(running.finish(std::future::pending()).await, Ok(()));
    }

    pub(crate) async fn key(&self, scope: Scope) -> String {
        self.auth.create(Actor::Receiver, scope, "test", 1).await.expect("made").key
    }

    pub(crate) async fn token(&self, company: i64) -> String {
        let life = Duration::from_secs(60);
        let made = self.enrolment.create_token(Actor::Receiver, CompanyId(company), None, life).await;
        made.expect("made").token.presented()
    }

    pub(crate) async fn enrolment_client(&self) -> EnrolmentClient<Channel> {
        EnrolmentClient::new(channel(self.addresses.enrolment, self.tls(None)).await.expect("connected"))
    }

    /// A new server of the company.
    pub(crate) async fn agent(&self, company: i64) -> Agent {
        let key = KeyPair::generate().expect("a key");
        let asked = enrol_request(&self.token(company).await, &key);
        let reply = self.enrolment_client().await.enroll(asked).await.expect("enrolled").into_inner();
        Agent { server: reply.server_id, company, key, certificate: reply.certificate_der }
    }

    fn tls(&self, agent: Option<&Agent>) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from(self.ca.clone())).expect("a root");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder =
            ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().expect("versions");
        let builder = builder.with_root_certificates(roots);
        let mut config = match agent {
            None => builder.with_no_client_auth(),
            Some(agent) => {
                let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(agent.key.serialize_der()));
                let chain = vec![CertificateDer::from(agent.certificate.clone())];
                builder.with_client_auth_cert(chain, key).expect("an identity")
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        config
    }

    /// Opens a stream and says hello; whatever comes first is left to be read.
    pub(crate) async fn greet(&self, agent: &Agent, inventory_hash: &str) -> Line {
        let line = self.line(agent).await;
        line.send(hello(inventory_hash)).await;
        line
    }

    /// A session that was welcomed.
    pub(crate) async fn session(&self, agent: &Agent) -> Line {
        let mut line = self.greet(agent, "").await;
        assert!(matches!(line.next().await, v1::from_receiver::Body::Welcome(_)));
        line
    }

    /// An open stream on which nothing was said.
    pub(crate) async fn line(&self, agent: &Agent) -> Line {
        Self::line_of(&mut self.agents_client(agent).await).await.expect("a stream")
    }

    pub(crate) async fn agents_client(&self, agent: &Agent) -> AgentsClient<Channel> {
        AgentsClient::new(channel(self.addresses.agents, self.tls(Some(agent))).await.expect("connected"))
    }

    /// Another stream on a connection.
    pub(crate) async fn line_of(client: &mut AgentsClient<Channel>) -> Result<Line, Status> {
        let (outbox, messages) = mpsc::channel(100);
        let inbound = client.session(ReceiverStream::new(messages)).await?;
        Ok(Line { outbox, inbound: inbound.into_inner() })
    }

    /// Whether the agent gets a stream on a connection of its own.
    pub(crate) async fn connects(&self, agent: &Agent) -> bool {
        match channel(self.addresses.agents, self.tls(Some(agent))).await {
            Ok(channel) => Self::line_of(&mut AgentsClient::new(channel)).await.is_ok(),
            Err(_) => false,
        }
    }

    /// A session without any certificate: what the client is told, if anything.
    pub(crate) async fn nobody(&self) -> Result<(), tonic::transport::Error> {
        let channel = channel(self.addresses.agents, self.tls(None)).await?;
        let (_outbox, messages) = mpsc::channel(1);
        let answered = AgentsClient::new(channel).session(ReceiverStream::new(messages)).await;
        assert!(answered.is_err(), "a stream without a certificate");
        Ok(())
    }

    pub(crate) async fn get(&self, path: &str, key: &str) -> Page {
        self.http("GET", path, &[("Authorization", &format!("Bearer {key}"))], "").await
    }

    pub(crate) async fn send(&self, method: &str, path: &str, key: &str, body: &serde_json::Value) -> Page {
        let key = format!("Bearer {key}");
        let headers = [("Authorization", key.as_str()), ("Content-Type", "application/json")];
        self.http(method, path, &headers, &body.to_string()).await
    }

    /// One request on a connection of its own.
    pub(crate) async fn http(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Page {
        let mut tcp = TcpStream::connect(self.addresses.rest).await.expect("connected");
        let mut request =
            format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
        for (name, value) in headers {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        request.push_str("\r\n");
        request.push_str(body);
        tcp.write_all(request.as_bytes()).await.expect("written");
        let mut answer = String::new();
        tcp.read_to_string(&mut answer).await.expect("read");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
        Page { status, head: head.to_lowercase(), body: body.to_owned() }
    }
}

pub(crate) struct Page {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Page {
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error} in {} {}", self.status, self.body))
    }

    pub(crate) fn code(&self) -> String {
        self.json()["code"].as_str().unwrap_or_default().to_owned()
    }
}

pub(crate) struct Agent {
    pub(crate) server: i64,
    pub(crate) company: i64,
    pub(crate) key: KeyPair,
    pub(crate) certificate: Vec<u8>,
}

/// Both directions of an agent's stream.
pub(crate) struct Line {
    pub(crate) outbox: mpsc::Sender<v1::FromAgent>,
    inbound: Streaming<v1::FromReceiver>,
}

impl Line {
    pub(crate) async fn send(&self, body: v1::from_agent::Body) {
        self.outbox.send(v1::FromAgent { body: Some(body) }).await.expect("an open stream");
    }

    pub(crate) async fn report(&self, seq: u64, body: v1::report::Body) {
        let body = v1::Report { recorded_at_ms: 1, body: Some(body) }.encode_to_vec();
        let sha256 = hex::decode(hestner_proto::sha256::hex(&body)).expect("hex");
        self.send(v1::from_agent::Body::Report(v1::Envelope { epoch: "e".into(), seq, sha256, body })).await;
    }

    pub(crate) async fn maybe_next(&mut self) -> Result<Option<v1::FromReceiver>, Status> {
        tokio::time::timeout(PATIENCE, self.inbound.message()).await.expect("an answer in time")
    }

    pub(crate) async fn next(&mut self) -> v1::from_receiver::Body {
        self.maybe_next().await.expect("a message").expect("an open stream").body.expect("a body")
    }

    /// The next acknowledgement; directives before it are passed over.
    pub(crate) async fn acked(&mut self) -> u64 {
        loop {
            match self.next().await {
                v1::from_receiver::Body::Ack(ack) => return ack.seq,
                v1::from_receiver::Body::Directive(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    pub(crate) async fn goodbye(&mut self) -> v1::Goodbye {
        loop {
            if let v1::from_receiver::Body::Goodbye(goodbye) = self.next().await {
                return goodbye;
            }
        }
    }

    pub(crate) async fn directive(&mut self) -> v1::Directive {
        match self.next().await {
            v1::from_receiver::Body::Directive(directive) => directive,
            other => panic!("{other:?}"),
        }
    }
}

pub(crate) fn hello(inventory_hash: &str) -> v1::from_agent::Body {
    v1::from_agent::Body::Hello(v1::Hello {
        protocol: hestner_proto::PROTOCOL,
        agent_version: "0.1.0".into(),
        epoch: "e".into(),
        inventory_hash: inventory_hash.into(),
        now_ms: SystemClock.now_ms(),
        separated: false,
    })
}

pub(crate) fn enrol_request(token: &str, key: &KeyPair) -> v1::EnrollRequest {
    v1::EnrollRequest {
        token: token.to_owned(),
        csr_der: CertificateParams::default().serialize_request(key).expect("a request").der().to_vec(),
        recovery_fingerprint: recovery_fingerprint(RECIPIENT),
        hostname: "web-1".into(),
        agent_version: "0.1.0".into(),
    }
}

pub(crate) fn run(run_uid: &str, status: &str) -> v1::Run {
    let now_ms = SystemClock.now_ms();
    let success = status == "success";
    v1::Run {
        run_uid: run_uid.into(),
        service: "docs".into(),
        kind: "manual".into(),
        scope: "volume".into(),
        status: status.into(),
        started_at_ms: now_ms,
        finished_at_ms: if success { now_ms } else { 0 },
        repository_id: if success { "r1".into() } else { String::new() },
        repository_bytes: if success { 30_000_000_000 } else { 0 },
        ..v1::Run::default()
    }
}

async fn channel(address: SocketAddr, tls: ClientConfig) -> Result<Channel, tonic::transport::Error> {
    let connector = tokio_rustls::TlsConnector::from(Arc::new(tls));
    // The URI is only a name here; the connector knows the address.
    Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_| {
            let connector = connector.clone();
            async move {
                let tcp = TcpStream::connect(address).await?;
                let name = ServerName::try_from("localhost").expect("a name");
                Ok::<_, std::io::Error>(TokioIo::new(connector.connect(name, tcp).await?))
            }
        }))
        .await
}

/// Waits until `done` says so; panics after ten seconds.
pub(crate) async fn wait_until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !done().await {
        assert!(tokio::time::Instant::now() < deadline, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
