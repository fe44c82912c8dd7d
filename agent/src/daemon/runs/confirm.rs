//! Runs that wait for a person's word, from the daemon's side: who has to wait, what ends a wait, and how a
//! restart lets it go on.
//!
//! Nothing here lets a run begin that the runner would not: whether it was confirmed is for the runner to
//! believe or not, by root's own file.

use std::time::Duration;

use hestner_proto::words::{ErrorClass, RunStatus, Verb};
use tokio::sync::oneshot;

use super::{Runs, Wish};
use crate::daemon::settings::Settings;
use crate::daemon::waiting::Word;
use crate::gate::{self, Needs};
use crate::report::RunRecord;
use crate::run::messages::Failure;
use crate::run::plan::read_grants;
use crate::status::WaitingRun;
use crate::store::{StoreError, Wait};

/// How often to look whether a wait is over: the machine may have slept, or its clock been set.
const WAIT_LOOK: Duration = Duration::from_secs(30);

/// How often to look whether the end of a refused run is kept, and for how long.
const END_LOOK: Duration = Duration::from_millis(10);
const END_KEPT_WITHIN: Duration = Duration::from_secs(10);

/// Why a word on a run leads to nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotWaiting {
    /// There is no such run.
    Unknown,
    /// It has ended.
    Ended,
    /// It was confirmed already.
    Confirmed,
    /// It needs no confirmation.
    Needless,
}

/// A run that waits, from its own task's side.
pub(super) struct Entered {
    since_ms: i64,
    expires_at_ms: i64,
    word: oneshot::Receiver<Word>,
}

pub(super) fn waiting_run(wish: &Wish, run_uid: &str, wait: Wait) -> WaitingRun {
    WaitingRun {
        run_uid: run_uid.to_owned(),
        service: wish.service.clone(),
        verb: wait.verb,
        kind: wish.kind,
        directive_id: wish.directive_id.clone(),
        since_ms: wait.since_ms,
        expires_at_ms: wait.expires_at_ms,
    }
}

impl Runs {
    /// Lets the runs wait on that waited when the daemon stopped.
    pub async fn resume_waiting(&self) {
        let rows = self.shared.parts.store.waits().await.unwrap_or_else(|error| {
            tracing::error!(event = "waiting_runs_not_read", error = %error);
            Vec::new()
        });
        for row in rows {
            let Ok(record) = serde_json::from_str::<RunRecord>(&row.record) else { continue };
            let RunRecord { service, kind, directive_id, .. } = record;
            self.lock_busy().insert(service.clone());
            let wish = Wish { service, verb: row.wait.verb.clone(), kind, directive_id };
            let entered = if row.confirmed {
                self.shared.waiting.was_confirmed(&row.run_uid);
                None
            } else {
                Some(self.enter(waiting_run(&wish, &row.run_uid, row.wait)))
            };
            let runs = self.clone();
            self.shared.parts.tasks.spawn_ending(async move { runs.work(wish, row.run_uid, entered).await });
        }
    }

    /// Runs that wait for a person, oldest first.
    pub fn waiting(&self) -> Vec<WaitingRun> {
        self.shared.waiting.list()
    }

    /// Why a run does not wait for a person.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn why_not_waiting(&self, run_uid: &str) -> Result<NotWaiting, StoreError> {
        let Some(row) = self.shared.parts.store.run(run_uid.to_owned()).await? else { return Ok(NotWaiting::Unknown) };
        let status = serde_json::from_str::<RunRecord>(&row.record).map_or(RunStatus::Failed, |record| record.status);
        Ok(match status {
            RunStatus::Success | RunStatus::Failed => NotWaiting::Ended,
            _ if self.shared.waiting.is_confirmed(run_uid) => NotWaiting::Confirmed,
            _ => NotWaiting::Needless,
        })
    }

    /// Says a word on a run that waits; what was said is on disk when this returns. `None`: it does not wait.
    pub async fn say(&self, run_uid: &str, word: Word) -> Option<WaitingRun> {
        let confirmed = word == Word::Confirmed;
        let run = self.shared.waiting.say(run_uid, word)?;
        if !confirmed {
            self.wait_ended(run_uid).await;
        } else if let Err(error) = self.shared.parts.store.confirm_wait(run_uid.to_owned()).await {
            // The run goes on all the same; only a restart before its turn would ask once more.
            tracing::warn!(event = "confirmation_not_kept", run_id = run_uid, error = %error);
        }
        Some(run)
    }

    /// Waits until the end of a refused run is kept, which takes a moment, or until there is no use in it.
    async fn wait_ended(&self, run_uid: &str) {
        let kept = async {
            while !matches!(self.why_not_waiting(run_uid).await, Ok(NotWaiting::Ended)) {
                tokio::time::sleep(END_LOOK).await;
            }
        };
        // A full disk keeps it from being kept; its own task goes on trying.
        let _ = tokio::time::timeout(END_KEPT_WITHIN, kept).await;
    }

    pub(super) fn enter(&self, run: WaitingRun) -> Entered {
        Entered { since_ms: run.since_ms, expires_at_ms: run.expires_at_ms, word: self.shared.waiting.enter(run) }
    }

    /// Whether the grants want a person's word first. Only a hint: the runner reads them again, and refuses.
    pub(super) fn wait_of(&self, wish: &Wish) -> Option<Wait> {
        let verb: Verb = wish.verb.parse().ok()?;
        let settings = Settings::read(&self.shared.parts.settings_path).ok()?;
        let known = settings.services.iter().any(|service| service.name == wish.service);
        let grants = read_grants(&settings.grants).ok()?;
        let needs = gate::decide(&grants, &wish.service, verb).ok()?;
        if !known || verb != Verb::Snapshot || needs != Needs::Confirmation {
            return None;
        }
        let since_ms = self.shared.parts.clock.now_ms();
        let expires = i64::try_from(settings.limits.confirm_expires.as_millis()).unwrap_or(i64::MAX);
        Some(Wait { verb: wish.verb.clone(), since_ms, expires_at_ms: since_ms.saturating_add(expires) })
    }

    /// Waits for the word on a run. `Ok(false)`: the daemon stops, and the run waits on after the next start.
    async fn hear(&self, run_uid: &str, wish: &Wish, entered: &mut Entered) -> Result<bool, Failure> {
        let drain = self.shared.parts.tasks.drain();
        loop {
            let left_ms = u64::try_from(entered.expires_at_ms - self.shared.parts.clock.now_ms()).unwrap_or(0);
            if left_ms == 0 && self.shared.waiting.expire(run_uid) {
                let Wish { service, verb, .. } = wish;
                let message = format!("nobody confirmed `{verb}` for service `{service}` on the host in time");
                return Err(Failure::new(ErrorClass::NotConfirmed, message));
            }
            let look = Duration::from_millis(left_ms).min(WAIT_LOOK);
            tokio::select! {
                // First: a word that was said counts, whatever else happens now.
                biased;
                word = &mut entered.word => return match word {
                    Ok(Word::Confirmed) => Ok(true),
                    Ok(Word::Refused { by }) => {
                        Err(Failure::new(ErrorClass::Refused, format!("`{by}` refused it on the host")))
                    }
                    // Nobody is left who could say it.
                    Err(_) => Ok(false),
                },
                () = drain.cancelled() => return Ok(false),
                () = tokio::time::sleep(look) => {}
            }
        }
    }

    /// Waits for a person's word, if one is needed. False: the run has ended, or waits on after a restart.
    pub(super) async fn may_begin(&self, wish: &Wish, run_uid: &str, entered: Option<Entered>) -> bool {
        let Some(mut entered) = entered else { return true };
        match self.hear(run_uid, wish, &mut entered).await {
            Ok(confirmed) => confirmed,
            Err(failure) => {
                self.finish_unbegun(wish, run_uid, entered.since_ms, failure).await;
                false
            }
        }
    }
}
