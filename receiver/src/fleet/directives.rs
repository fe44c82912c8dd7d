//! Asking a host for something: manual runs and policies, as durable directives.
//!
//! The run's or policy's row, its directive and the audit row are one transaction; the session is woken after
//! its commit. Whether the host does it, the host decides.

use std::time::Duration;

use hestner_proto::words::Verb;
use hestner_proto::{sha256, v1};

use super::{Error, Fleet};
use crate::auth::Caller;
use crate::model::policy::{self, POLICY_WAITS_MS, Policy, PolicyInput};
use crate::model::report::Outcome;
use crate::model::run::Run;
use crate::model::{CompanyId, ServerId};
use crate::store::directives::{Kind, NewDirective};

/// Open run directives a server may have. A host that is away for long must not wake up to thousands.
pub const OPEN_RUNS_MAX: i64 = 100;
/// How long a run may wait for its host, unless the caller says otherwise.
pub const RUN_WAITS: Duration = Duration::from_secs(24 * 3600);
/// Bounds of what the caller may say.
const RUN_WAITS_MIN: Duration = Duration::from_secs(1);
const RUN_WAITS_MAX: Duration = Duration::from_secs(30 * 24 * 3600);
/// Services that a refusal names.
const SERVICES_NAMED_MAX: usize = 20;
const IDEMPOTENCY_KEPT_MS: i64 = 24 * 3_600_000;
const IDEMPOTENCY_KEY_BYTES_MAX: usize = 200;

/// A manual run that somebody asks for.
#[derive(Clone, Debug)]
pub struct SnapshotRequest {
    /// The service; the only one of the server that is set up for snapshots if none is named.
    pub service: Option<String>,
    /// How long it may wait for the host.
    pub expires_in: Duration,
    /// The same key and request give the same run.
    pub idempotency_key: Option<String>,
}

impl Fleet {
    /// Queues a manual run.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Invalid`], [`Error::UnknownService`], [`Error::ServiceWanted`],
    /// [`Error::TooManyDirectives`], [`Error::IdempotencyMismatch`], or the store's.
    pub async fn request_snapshot(
        &self,
        caller: Caller,
        server: ServerId,
        request: &SnapshotRequest,
    ) -> Result<Run, Error> {
        let company = self.visible(caller, server).await?;
        check_request(request)?;
        let now_ms = self.clock.now_ms();
        let body = sha256::hex(format!("{:?} {:?}", request.service, request.expires_in).as_bytes());
        let mut change = self.store.change(caller.actor(), now_ms).await?;
        if let Some(key) = &request.idempotency_key
            && let Some((run_id, known)) = change.run_of_key(server, key, now_ms - IDEMPOTENCY_KEPT_MS).await?
        {
            if known != body {
                return Err(Error::IdempotencyMismatch);
            }
            return change.run(server, run_id).await?.ok_or(Error::NotFound("run"));
        }
        // Only now: a repetition is answered even if the service has gone since.
        let service = self.service(server, request.service.as_deref()).await?;
        let open = change.open_runs(server).await?;
        if open >= OPEN_RUNS_MAX {
            return Err(Error::TooManyDirectives(open));
        }
        let directive = new_id();
        let waits_ms = i64::try_from(request.expires_in.as_millis()).unwrap_or(i64::MAX);
        change
            .add_directive(&NewDirective {
                id: &directive,
                server,
                kind: Kind::Run,
                service: &service,
                verb: Verb::Snapshot.as_str(),
                created_at_ms: now_ms,
                expires_at_ms: now_ms.saturating_add(waits_ms),
            })
            .await?;
        let run_id = change.add_queued_run(server, &service, &directive, now_ms).await?;
        if let Some(key) = &request.idempotency_key {
            change.keep_key(server, key, &body, run_id, now_ms, IDEMPOTENCY_KEPT_MS).await?;
        }
        let run = change.run(server, run_id).await?.ok_or(Error::NotFound("run"))?;
        let details = serde_json::json!({ "service": service, "directive": directive });
        change.commit(Some(company), "snapshot_requested", format!("server:{server}"), details).await?;
        self.sessions.wake(server);
        Ok(run)
    }

    /// Adds or replaces a service's policy.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Invalid`], [`Error::UnknownService`], [`Error::ServiceWanted`], or the store's.
    pub async fn put_policy(&self, caller: Caller, server: ServerId, input: PolicyInput) -> Result<Policy, Error> {
        let company = self.visible(caller, server).await?;
        let mistakes = policy::mistakes(&input);
        if !mistakes.is_empty() {
            return Err(Error::Invalid(mistakes));
        }
        let named = Some(input.service.as_str()).filter(|name| !name.is_empty());
        let input = PolicyInput { service: self.service(server, named).await?, ..input };
        let now_ms = self.clock.now_ms();
        let directive = new_id();
        let mut change = self.store.change(caller.actor(), now_ms).await?;
        change.supersede_policies(server, &input.service, now_ms).await?;
        change
            .add_directive(&NewDirective {
                id: &directive,
                server,
                kind: Kind::Policy,
                service: &input.service,
                verb: "",
                created_at_ms: now_ms,
                expires_at_ms: now_ms + POLICY_WAITS_MS,
            })
            .await?;
        let policy = change.put_policy(server, &input, &directive, now_ms).await?;
        let details = serde_json::json!({ "policy": input, "directive": directive });
        change.commit(Some(company), "policy_put", format!("server:{server}"), details).await?;
        self.sessions.wake(server);
        Ok(policy.due_after(now_ms))
    }

    /// The service that is meant. A server that has told its services is asked only for those; one that has not is
    /// taken on trust. None need be named where only one is set up for snapshots.
    async fn service(&self, server: ServerId, named: Option<&str>) -> Result<String, Error> {
        let known = self.store.services(server).await?;
        if let Some(name) = named {
            let fits = known.is_empty() || known.iter().any(|known| known.name == name);
            return if fits { Ok(name.to_owned()) } else { Err(Error::UnknownService(name.to_owned())) };
        }
        let set_up = known.into_iter().filter(|known| !known.consistency.is_empty()).map(|known| known.name);
        let mut names: Vec<String> = set_up.take(SERVICES_NAMED_MAX).collect();
        match names.pop() {
            Some(only) if names.is_empty() => Ok(only),
            last => Err(Error::ServiceWanted(names.into_iter().chain(last).collect())),
        }
    }

    /// Open directives of a server, for its session.
    ///
    /// # Errors
    /// The store's.
    pub async fn open_directives(&self, server: ServerId) -> Result<Vec<v1::Directive>, Error> {
        Ok(self.store.open_directives(server, self.clock.now_ms()).await?)
    }

    /// Notes that directives were handed to a session.
    ///
    /// # Errors
    /// The store's.
    pub async fn directives_delivered(&self, ids: &[String]) -> Result<(), Error> {
        let mut tx = self.store.begin().await?;
        tx.directives_delivered(ids, self.clock.now_ms()).await?;
        tx.commit().await?;
        self.counters.directives_delivered.add(ids.len() as u64);
        Ok(())
    }

    /// Ends directives whose time is over, and the runs that waited for them. Returns how many.
    ///
    /// # Errors
    /// The store's.
    pub async fn expire_directives(&self) -> Result<usize, Error> {
        use crate::model::Actor;
        use crate::store::runs::EXPIRED_CLASS;

        let now_ms = self.clock.now_ms();
        if !self.store.any_directive_expired(now_ms).await? {
            return Ok(0);
        }
        let mut change = self.store.change(Actor::Receiver, now_ms).await?;
        let expired = change.expire_directives(now_ms).await?;
        for directive in &expired {
            let message = "the directive expired before the server took it".to_owned();
            match directive.kind {
                Kind::Run => {
                    change.fail_queued_run(&directive.id, EXPIRED_CLASS.as_str(), &message, now_ms).await?;
                }
                // A policy that nobody will deliver any more must not look as if it still might come.
                Kind::Policy => {
                    let (directive_id, code) = (directive.id.clone(), "expired".to_owned());
                    let unanswered = Outcome { directive_id, accepted: false, code, message };
                    change.answer_policy(directive.server, &unanswered).await?;
                }
            }
        }
        let listed: Vec<_> = expired.iter().map(|d| serde_json::json!({ "id": d.id, "server": d.server })).collect();
        let companies: std::collections::BTreeSet<CompanyId> = expired.iter().map(|d| d.company).collect();
        let only = if companies.len() == 1 { companies.first().copied() } else { None };
        change.commit(only, "directives_expired", "directives".to_owned(), listed.into()).await?;
        self.counters.directives_expired.add(expired.len() as u64);
        Ok(expired.len())
    }
}

fn new_id() -> String {
    uuid::Uuid::now_v7().to_string()
}

fn check_request(request: &SnapshotRequest) -> Result<(), Error> {
    let mut mistakes = Vec::new();
    if let Some(Err(mistake)) = request.service.as_deref().map(policy::check_name) {
        mistakes.push(format!("service: {mistake}"));
    }
    if !(RUN_WAITS_MIN..=RUN_WAITS_MAX).contains(&request.expires_in) {
        mistakes.push("expires_in: from 1s to 30days".to_owned());
    }
    if let Some(key) = &request.idempotency_key
        && !(1..=IDEMPOTENCY_KEY_BYTES_MAX).contains(&key.len())
    {
        mistakes.push(format!("Idempotency-Key: 1 to {IDEMPOTENCY_KEY_BYTES_MAX} bytes"));
    }
    if mistakes.is_empty() { Ok(()) } else { Err(Error::Invalid(mistakes)) }
}
