//! Everything that the centre may ask of this host, in one exhaustive match.
//!
//! A security reviewer reads `Dispatcher::act` to know what a hostile centre can do: ask for a run of a
//! service by name and verb, which the runner's gate then allows or refuses, and offer a policy, which is
//! kept only if the host's own settings allow all of it. A directive is written down before it is acted
//! upon, is done once however often it is delivered, and is refused when it has expired.

use std::path::PathBuf;
use std::sync::Arc;

use hestner_proto::v1;
use hestner_proto::v1::directive::Ask;
use hestner_proto::words::{ErrorClass, RunKind, Verb};
use tokio::sync::{Notify, mpsc};

use super::runs::{Runs, Wish};
use super::settings::Settings;
use crate::gate::{self, Refusal};
use crate::lifecycle::{Drain, Pulse};
use crate::platform::chain;
use crate::platform::clock::SharedClock;
use crate::platform::command::printable;
use crate::policy::{Policies, Policy, check_name};
use crate::report::Report;
use crate::scheduler::Schedule;
use crate::store::{Outcome, Store, StoreError};

/// Longest id of a directive that is believed.
const DIRECTIVE_ID_CHARS_MAX: usize = 64;

/// Longest text in a policy.
const POLICY_TEXT_MAX: usize = 256;

/// The task.
pub struct Dispatcher {
    /// The settings file; read anew for every policy, so that a change of the host's mind counts at once.
    pub settings_path: PathBuf,
    /// Policies.
    pub policies: Policies,
    /// The inbox.
    pub store: Store,
    /// The clock.
    pub clock: SharedClock,
    /// Runs.
    pub runs: Runs,
    /// Rung when a policy has changed.
    pub policies_changed: Arc<Notify>,
    /// Rung when the outbox has grown.
    pub outbox_grew: Arc<Notify>,
    /// Directives as they come.
    pub directives: mpsc::Receiver<v1::Directive>,
}

impl Dispatcher {
    /// Runs until the drain.
    pub async fn run(mut self, mut pulse: Pulse, drain: Drain) {
        loop {
            let directive = tokio::select! {
                () = drain.cancelled() => return,
                directive = pulse.rest(self.directives.recv()) => directive,
            };
            let Some(directive) = directive else { return };
            let id = directive.id.clone();
            if let Err(error) = self.take(directive).await {
                // Not concluded, so the receiver delivers it again.
                tracing::error!(event = "directive_not_kept", directive_id = id, error = %error);
            }
        }
    }

    async fn take(&self, directive: v1::Directive) -> Result<(), StoreError> {
        let v1::Directive { id, expires_at_ms, ask } = directive;
        if id.is_empty() || id.len() > DIRECTIVE_ID_CHARS_MAX {
            tracing::warn!(event = "directive_refused", error = "its id is empty or too long");
            return Ok(());
        }
        let now = self.clock.now_ms();
        if !self.store.remember(id.clone(), now, expires_at_ms).await? {
            return Ok(());
        }
        let refusal = if expires_at_ms <= now {
            Some(Refusal {
                class: ErrorClass::Cancelled,
                message: "the directive had expired when it arrived".to_owned(),
            })
        } else {
            self.act(&id, ask).await?
        };
        self.conclude(id, refusal).await
    }

    /// Acts. `Some`: it is refused.
    async fn act(&self, id: &str, ask: Option<Ask>) -> Result<Option<Refusal>, StoreError> {
        match ask {
            Some(Ask::Run(v1::RunRequest { service, verb })) => Ok(self.start_run(id, service, verb).await),
            Some(Ask::Policy(policy)) => Ok(self.take_policy(policy.into()).await.err()),
            None => Ok(Some(Refusal {
                class: ErrorClass::UnknownVerb,
                message: "this agent does not know what is asked for".to_owned(),
            })),
        }
    }

    async fn start_run(&self, id: &str, service: String, verb: String) -> Option<Refusal> {
        // The runner's gate decides; only what is no verb or no name at all is refused here.
        if let Err(reason) = check_name(&service) {
            let shown = printable(service.as_bytes());
            return Some(Refusal {
                class: ErrorClass::UnknownService,
                message: format!("`{shown}` is no service: {reason}"),
            });
        }
        if let Err(unknown) = verb.parse::<Verb>() {
            return Some(Refusal { class: ErrorClass::UnknownVerb, message: unknown.to_string() });
        }
        let wish = Wish { service, verb, kind: RunKind::Manual, directive_id: id.to_owned() };
        let refused = self.runs.start(wish, None).await.err()?;
        Some(Refusal { class: refused.class, message: refused.message })
    }

    async fn take_policy(&self, policy: Policy) -> Result<(), Refusal> {
        let refuse = |class, message: String| Refusal { class, message };
        let longest = [&policy.service, &policy.cron, &policy.time_zone, &policy.destination, &policy.misfire];
        if longest.iter().any(|text| text.len() > POLICY_TEXT_MAX) {
            return Err(refuse(
                ErrorClass::SettingsInvalid,
                format!("a text of the policy is longer than {POLICY_TEXT_MAX} bytes"),
            ));
        }
        let settings = Settings::read(&self.settings_path).map_err(|e| refuse(e.class(), e.to_string()))?;
        if !settings.services.iter().any(|s| s.name == policy.service) {
            let message = format!("the host's settings name no service `{}`", policy.service);
            return Err(refuse(ErrorClass::UnknownService, message));
        }
        gate::check_policy(&policy, &settings.destinations, &settings.floor)?;
        Schedule::of(&policy, 0).map_err(|e| refuse(ErrorClass::SettingsInvalid, e.to_string()))?;
        self.policies.save(&policy).map_err(|e| {
            refuse(if e.is_full() { ErrorClass::StateFull } else { ErrorClass::StateUnusable }, chain(&e))
        })?;
        self.policies_changed.notify_one();
        tracing::info!(event = "policy_in_force", service = policy.service, cron = policy.cron);
        Ok(())
    }

    async fn conclude(&self, directive_id: String, refusal: Option<Refusal>) -> Result<(), StoreError> {
        let refusal = refusal.map(|r| (r.class.to_string(), r.message));
        if let Some((code, message)) = &refusal {
            tracing::warn!(event = "directive_refused", directive_id, code, error = message);
        }
        let outcome = match &refusal {
            None => Outcome { accepted: true, code: String::new(), message: String::new() },
            Some((code, message)) => Outcome { accepted: false, code: code.clone(), message: message.clone() },
        };
        let report = Report::DirectiveOutcome { directive_id: directive_id.clone(), refusal };
        self.store.conclude(directive_id, outcome, report.encode(self.clock.now_ms())).await?;
        self.outbox_grew.notify_one();
        Ok(())
    }
}
