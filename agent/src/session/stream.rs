//! One stream: hello, welcome, then both sides talk until it breaks.
//!
//! Every arm of the loop calls one method. All of them are cancel-safe, because what is received is
//! handled before the next wait, and what is sent stays in the outbox until it is acknowledged.

use std::time::Duration;

use chrono::{DateTime, Utc};
use hestner_proto::v1::agents_client::AgentsClient;
use hestner_proto::v1::from_agent::Body as Ours;
use hestner_proto::v1::from_receiver::Body as Theirs;
use hestner_proto::{MESSAGE_BYTES_MAX, PROTOCOL, REPORTS_IN_FLIGHT_MAX, sha256, v1};
use tokio::sync::mpsc;
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

use super::{Link, Session, SessionError};
use crate::identity::{Identity, Request};
use crate::platform::backoff::random_u64;
use crate::platform::command::printable;

/// Messages that wait for the network; reports wait in the outbox instead.
const MESSAGES_WAITING: usize = 16;
/// Longest heartbeat interval that a receiver may ask for.
const HEARTBEAT_MAX: Duration = Duration::from_secs(3600);
/// The outbox is looked at so often even if nobody rang.
const OUTBOX_LOOK: Duration = Duration::from_secs(30);
/// Whether the certificate is due for renewal is looked at so often.
const RENEWAL_LOOK: Duration = Duration::from_secs(60);
/// How long the receiver may take to say welcome.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(20);

pub(super) struct Stream<'a> {
    session: &'a mut Session,
    out: mpsc::Sender<v1::FromAgent>,
    incoming: Streaming<v1::FromReceiver>,
    identity: Identity,
    /// Number of the last report sent on this stream.
    sent: u64,
    /// Number of the last report that the receiver has acknowledged.
    acknowledged: u64,
    heartbeats: Interval,
    renew_at: DateTime<Utc>,
    renewal: Option<Request>,
}

impl<'a> Stream<'a> {
    /// Says hello and hears welcome. A renewed identity has carried a message then, and is put in force.
    pub(super) async fn open(
        session: &'a mut Session,
        channel: Channel,
        identity: Identity,
        is_next: bool,
    ) -> Result<Self, SessionError> {
        let (out, waiting) = mpsc::channel(MESSAGES_WAITING);
        let mut client = AgentsClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        // The first message goes before the call: a receiver may answer only after it has heard it.
        let hello = v1::Hello {
            protocol: PROTOCOL,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            epoch: session.store.epoch().to_owned(),
            inventory_hash: session.inventory.borrow_and_update().as_ref().map(|i| i.hash.clone()).unwrap_or_default(),
            now_ms: session.clock.now_ms(),
            separated: session.separated,
        };
        let _ = out.try_send(v1::FromAgent { body: Some(Ours::Hello(hello)) });
        let broke = |status| SessionError::Stream(Box::new(status));
        let begin = async {
            let mut incoming = client.session(ReceiverStream::new(waiting)).await.map_err(broke)?.into_inner();
            let first = incoming.message().await.map_err(broke)?;
            Ok::<_, SessionError>((incoming, first))
        };
        let (incoming, first) =
            tokio::time::timeout(WELCOME_TIMEOUT, begin).await.map_err(|_| SessionError::NoWelcome)??;
        let welcome = match first.and_then(|message| message.body) {
            Some(Theirs::Welcome(welcome)) => welcome,
            Some(Theirs::Goodbye(goodbye)) => return Err(ended_by(goodbye)),
            _ => return Err(SessionError::NoWelcome),
        };
        if is_next {
            session.keeper.promote_next(&identity)?;
            tracing::info!(event = "certificate_in_force", expires_at = %identity.not_after);
        }
        let renew_at = identity.renew_at(random_u64()?);
        let interval = Duration::from_secs(u64::from(welcome.heartbeat_seconds.max(1))).min(HEARTBEAT_MAX);
        let mut heartbeats = tokio::time::interval(interval);
        heartbeats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let skew_ms = session.clock.now_ms() - welcome.now_ms;
        tracing::info!(event = "session_open", server_id = identity.id.server_id, clock_skew_ms = skew_ms);
        let recovery_key_named = printable(welcome.recovery_fingerprint.as_bytes());
        refuse_recovery_key(session, &recovery_key_named);
        let because = String::new();
        session.link.send_replace(Link { connected: true, because, skew_ms: Some(skew_ms), recovery_key_named });
        let acknowledged = session.store.acknowledged().await?;
        let mut stream = Self {
            session,
            out,
            incoming,
            identity,
            sent: acknowledged,
            acknowledged,
            heartbeats,
            renew_at,
            renewal: None,
        };
        if welcome.inventory_wanted {
            stream.send_inventory().await;
        }
        Ok(stream)
    }

    /// Talks until the stream breaks, or until a renewed certificate is to be shown.
    pub(super) async fn talk(mut self) -> Result<(), SessionError> {
        let mut outbox_look = tokio::time::interval(OUTBOX_LOOK);
        let mut renewal_look = tokio::time::interval_at(Instant::now() + RENEWAL_LOOK, RENEWAL_LOOK);
        let grew = std::sync::Arc::clone(&self.session.outbox_grew);
        loop {
            tokio::select! {
                message = self.incoming.message() => {
                    if self.hear(message.map_err(|status| SessionError::Stream(Box::new(status)))?).await? == Heard::Renewed {
                        return Ok(());
                    }
                }
                () = self.session.pulse.called() => {}
                _ = self.heartbeats.tick() => self.send_heartbeat().await?,
                () = grew.notified() => self.send_reports().await?,
                _ = outbox_look.tick() => self.send_reports().await?,
                _ = renewal_look.tick() => self.renew_if_due().await?,
                changed = self.session.inventory.changed() => {
                    if changed.is_ok() {
                        self.send_inventory().await;
                    }
                }
                changed = self.session.progress.changed() => {
                    if changed.is_ok() {
                        self.send_progress();
                    }
                }
            }
        }
    }

    async fn hear(&mut self, message: Option<v1::FromReceiver>) -> Result<Heard, SessionError> {
        let Some(message) = message else {
            return Err(SessionError::Stream(Box::new(tonic::Status::unavailable("the receiver closed it"))));
        };
        match message.body {
            Some(Theirs::Ack(ack)) => self.take_ack(ack).await?,
            // The dispatcher writes it down before it acts; one that is lost here is delivered again.
            Some(Theirs::Directive(directive)) => {
                let _ = self.session.directives.send(directive).await;
            }
            Some(Theirs::Certificate(certificate)) => return self.take_certificate(certificate),
            Some(Theirs::InventoryWanted(_)) => self.send_inventory().await,
            Some(Theirs::Goodbye(goodbye)) => return Err(ended_by(goodbye)),
            // A newer receiver may say more than this agent knows.
            Some(Theirs::Welcome(_)) | None => {}
        }
        Ok(Heard::GoOn)
    }

    async fn take_ack(&mut self, ack: v1::Ack) -> Result<(), SessionError> {
        // Only what was sent on this stream can be acknowledged on it: a receiver that answers more than
        // that would have us forget what it never got.
        if ack.epoch != self.session.store.epoch() || ack.seq > self.sent || ack.seq <= self.acknowledged {
            return Ok(());
        }
        self.session.store.acknowledge(ack.seq).await?;
        self.acknowledged = ack.seq;
        self.send_reports().await
    }

    /// Sends what the outbox holds, up to the bound on what is under way.
    async fn send_reports(&mut self) -> Result<(), SessionError> {
        loop {
            let under_way = usize::try_from(self.sent - self.acknowledged).unwrap_or(usize::MAX);
            let room = REPORTS_IN_FLIGHT_MAX.saturating_sub(under_way);
            let entries = self.session.store.entries_after(self.sent, room).await?;
            if entries.is_empty() {
                return Ok(());
            }
            for entry in entries {
                let envelope = v1::Envelope {
                    epoch: self.session.store.epoch().to_owned(),
                    seq: entry.seq,
                    sha256: sha256::of(&entry.body).to_vec(),
                    body: entry.body,
                };
                self.sent = entry.seq;
                self.say(Ours::Report(envelope)).await?;
            }
        }
    }

    async fn send_heartbeat(&mut self) -> Result<(), SessionError> {
        let mut heartbeat = *self.session.heartbeat.borrow();
        heartbeat.now_ms = self.session.clock.now_ms();
        heartbeat.runs_active = u32::try_from(*self.session.runs_active.borrow()).unwrap_or(u32::MAX);
        heartbeat.outbox_reports = self.session.store.waiting().await?;
        self.say(Ours::Heartbeat(heartbeat)).await
    }

    async fn send_inventory(&mut self) {
        let inventory = self.session.inventory.borrow_and_update().clone();
        if let Some(inventory) = inventory {
            // A stream that is broken is noticed by the loop.
            let _ = self.say(Ours::Inventory((*inventory).clone())).await;
        }
    }

    fn send_progress(&mut self) {
        let progress = self.session.progress.borrow_and_update().clone();
        if let Some(progress) = progress {
            // Progress that finds no room is no loss.
            let _ = self.out.try_send(v1::FromAgent { body: Some(Ours::Progress(progress)) });
        }
    }

    async fn renew_if_due(&mut self) -> Result<(), SessionError> {
        if self.renewal.is_some() || self.session.clock.now() < self.renew_at {
            return Ok(());
        }
        let request = Request::new()?;
        let csr_der = request.csr_der.clone();
        self.renewal = Some(request);
        self.say(Ours::Renewal(v1::RenewalRequest { csr_der })).await
    }

    fn take_certificate(&mut self, certificate: v1::Certificate) -> Result<Heard, SessionError> {
        let Some(request) = self.renewal.take() else { return Ok(Heard::GoOn) };
        let renewed = request.complete(certificate.certificate_der, certificate.ca_der)?;
        if renewed.id != self.identity.id || renewed.ca != self.identity.ca {
            tracing::error!(event = "renewal_refused", error = "the certificate names another server or another CA");
            return Ok(Heard::GoOn);
        }
        self.session.keeper.keep_next(&renewed)?;
        Ok(Heard::Renewed)
    }

    async fn say(&mut self, body: Ours) -> Result<(), SessionError> {
        let closed = |_| SessionError::Stream(Box::new(tonic::Status::unavailable("the stream is closed")));
        self.out.send(v1::FromAgent { body: Some(body) }).await.map_err(closed)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Heard {
    GoOn,
    Renewed,
}

/// Says so when the receiver takes another key for the company's than the one that was typed on this host. Nobody follows
/// it: what keys are wrapped for stands in a file of root's.
fn refuse_recovery_key(session: &Session, named: &str) {
    let Some(typed) = session.keeper.recovery_fingerprint().filter(|typed| !named.is_empty() && typed != named) else {
        return;
    };
    tracing::error!(
        event = "recovery_key_refused",
        named,
        typed,
        "the receiver names another recovery key than the one typed here"
    );
}

fn ended_by(goodbye: v1::Goodbye) -> SessionError {
    SessionError::Goodbye {
        code: goodbye.code,
        message: goodbye.message,
        retry_after: Duration::from_secs(u64::from(goodbye.retry_after_seconds)),
    }
}
