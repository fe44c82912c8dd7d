//! Runs that wait for a person: kept in memory for as long as they wait, and ended by one word.
//!
//! Whoever takes a run out of here decides on it, so that of a confirmation, a refusal and the end of its
//! time only one comes through. What outlives a restart is in the store; nothing here starts a run.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use tokio::sync::oneshot;

use crate::status::WaitingRun;

/// What a person says to a run that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Word {
    /// It may begin.
    Confirmed,
    /// It ends.
    Refused {
        /// Who says so.
        by: String,
    },
}

/// The runs that wait.
#[derive(Debug, Default)]
pub(super) struct Waiting(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    waiting: BTreeMap<String, (WaitingRun, oneshot::Sender<Word>)>,
    /// Confirmed, and not ended yet.
    confirmed: BTreeSet<String>,
}

impl Waiting {
    /// Enters a run; the word on it comes through what is returned.
    pub(super) fn enter(&self, run: WaitingRun) -> oneshot::Receiver<Word> {
        let (say, hear) = oneshot::channel();
        self.lock().waiting.insert(run.run_uid.clone(), (run, say));
        hear
    }

    /// Says the word on a run. `None`: it does not wait, or not any more.
    pub(super) fn say(&self, run_uid: &str, word: Word) -> Option<WaitingRun> {
        let mut state = self.lock();
        let (run, say) = state.waiting.remove(run_uid)?;
        if word == Word::Confirmed {
            state.confirmed.insert(run_uid.to_owned());
        }
        // Nobody hears it while the daemon stops; the run then waits again after the start.
        let _ = say.send(word);
        Some(run)
    }

    /// Takes out a run whose time is over. False: somebody was faster, and the word is on its way.
    pub(super) fn expire(&self, run_uid: &str) -> bool {
        self.lock().waiting.remove(run_uid).is_some()
    }

    /// Writes down that a run was confirmed before the daemon started.
    pub(super) fn was_confirmed(&self, run_uid: &str) {
        self.lock().confirmed.insert(run_uid.to_owned());
    }

    /// Forgets a run that has ended.
    pub(super) fn forget(&self, run_uid: &str) {
        self.lock().confirmed.remove(run_uid);
    }

    /// Whether a run was confirmed and has not ended yet.
    pub(super) fn is_confirmed(&self, run_uid: &str) -> bool {
        self.lock().confirmed.contains(run_uid)
    }

    /// The run of a service that waits.
    pub(super) fn of_service(&self, service: &str) -> Option<String> {
        self.lock().waiting.values().find(|(run, _)| run.service == service).map(|(run, _)| run.run_uid.clone())
    }

    /// All that wait, oldest first (a UUIDv7 begins with its time).
    pub(super) fn list(&self) -> Vec<WaitingRun> {
        self.lock().waiting.values().map(|(run, _)| run.clone()).collect()
    }

    /// How many wait.
    pub(super) fn count(&self) -> usize {
        self.lock().waiting.len()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hestner_proto::words::RunKind;

    fn run(uid: &str) -> WaitingRun {
        WaitingRun {
            run_uid: uid.into(),
            service: "docs".into(),
            verb: "snapshot".into(),
            kind: RunKind::Manual,
            directive_id: String::new(),
            since_ms: 0,
            expires_at_ms: 1,
        }
    }

    #[tokio::test]
    async fn one_word_decides_and_the_next_finds_nothing_that_waits() {
        let waiting = Waiting::default();
        let hear = waiting.enter(run("a"));
        assert_eq!(waiting.of_service("docs").as_deref(), Some("a"));
        assert!(waiting.say("a", Word::Confirmed).is_some());
        assert!(waiting.say("a", Word::Refused { by: "root".into() }).is_none());
        assert!(!waiting.expire("a"), "the time's end comes too late");
        assert_eq!(hear.await.unwrap(), Word::Confirmed);
        assert!(waiting.is_confirmed("a"));
        assert_eq!(waiting.count(), 0);
        waiting.forget("a");
        assert!(!waiting.is_confirmed("a"));
    }
}
