//! Live sessions, in memory: who is connected, what their heartbeats said, how far their runs are.
//!
//! One session a server; a newer one ends the older. In: sessions that open and what they hear. Out: wake-ups
//! and endings to sessions, and minute samples to whoever flushes them. Nothing here touches the store: a
//! restart loses at most the samples since the last flush.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hestner_proto::v1;
use tokio::sync::{Notify, watch};

use crate::model::ServerId;
use crate::model::run::{Progress, RUN_UID_BYTES_MAX};
use crate::model::server::Minute;

/// Runs of one server whose progress is kept; a host runs far fewer at once.
const PROGRESS_MAX: usize = 64;
/// Minutes of one server that wait for a flush; beyond it the oldest go, and are counted.
const MINUTES_MAX: usize = 60;

/// Why a session is ended from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The same identity opened a newer one.
    Replaced,
    /// The identity was taken back.
    Revoked,
    /// The server is kept out after a fork.
    Quarantined,
}

#[derive(Debug)]
struct Live {
    number: u64,
    wake: Arc<Notify>,
    end: watch::Sender<Option<End>>,
}

#[derive(Debug, Default)]
struct Heard {
    last_ms: i64,
    /// Whether `last_ms` is newer than the last flush.
    unflushed: bool,
    minutes: Vec<Minute>,
    progress: HashMap<String, Progress>,
}

#[derive(Debug, Default)]
struct State {
    live: HashMap<ServerId, Live>,
    heard: HashMap<ServerId, Heard>,
    opened: u64,
}

/// See the module. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Sessions(Arc<Mutex<State>>);

/// One session's end of the registry. Dropping it closes the session's entry.
#[derive(Debug)]
pub struct Ticket {
    sessions: Sessions,
    server: ServerId,
    number: u64,
    wake: Arc<Notify>,
    end: watch::Receiver<Option<End>>,
}

/// What is to be flushed of one server.
#[derive(Clone, Debug)]
pub struct Unflushed {
    /// The server.
    pub server: ServerId,
    /// When it was last heard of.
    pub last_seen_ms: i64,
    /// Its minutes, oldest first.
    pub minutes: Vec<Minute>,
}

impl Sessions {
    /// A panic elsewhere cannot leave the maps half changed, so a poisoned lock is taken all the same.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a session; one that the server has already is told that it was replaced.
    pub fn open(&self, server: ServerId) -> Ticket {
        let mut state = self.state();
        state.opened += 1;
        let number = state.opened;
        let wake = Arc::new(Notify::new());
        let (end, ended) = watch::channel(None);
        if let Some(older) = state.live.insert(server, Live { number, wake: Arc::clone(&wake), end }) {
            older.end.send_replace(Some(End::Replaced));
        }
        Ticket { sessions: self.clone(), server, number, wake, end: ended }
    }

    /// Has the server's session look for directives.
    pub fn wake(&self, server: ServerId) {
        if let Some(live) = self.state().live.get(&server) {
            live.wake.notify_one();
        }
    }

    /// Ends the server's session.
    pub fn end(&self, server: ServerId, why: End) {
        if let Some(live) = self.state().live.get(&server) {
            live.end.send_replace(Some(why));
        }
    }

    /// Servers with a session.
    pub fn online(&self) -> HashSet<ServerId> {
        self.state().live.keys().copied().collect()
    }

    /// Whether the server has a session.
    pub fn is_online(&self, server: ServerId) -> bool {
        self.state().live.contains_key(&server)
    }

    /// How many sessions there are.
    pub fn count(&self) -> usize {
        self.state().live.len()
    }

    /// When the server was last heard of since this process started.
    pub fn last_seen_ms(&self, server: ServerId) -> Option<i64> {
        self.state().heard.get(&server).map(|heard| heard.last_ms)
    }

    /// Takes in a heartbeat. Returns how many old minutes had to go.
    pub fn beat(&self, server: ServerId, beat: &v1::Heartbeat, now_ms: i64) -> u64 {
        let mut state = self.state();
        let heard = state.heard.entry(server).or_default();
        heard.last_ms = now_ms;
        heard.unflushed = true;
        let minute = now_ms.div_euclid(60_000);
        match heard.minutes.last_mut() {
            Some(last) if last.minute == minute => last.add(beat),
            _ => {
                let mut fresh = Minute::new(minute);
                fresh.add(beat);
                heard.minutes.push(fresh);
            }
        }
        bound(&mut heard.minutes)
    }

    /// Takes out everything that waits for a flush.
    pub fn take_unflushed(&self) -> Vec<Unflushed> {
        let mut state = self.state();
        let waiting = state.heard.iter_mut().filter(|(_, heard)| heard.unflushed);
        let taken = waiting.map(|(server, heard)| {
            heard.unflushed = false;
            let minutes = std::mem::take(&mut heard.minutes);
            Unflushed { server: *server, last_seen_ms: heard.last_ms, minutes }
        });
        taken.collect()
    }

    /// Puts back what could not be flushed. Returns how many old minutes had to go.
    pub fn put_back(&self, unflushed: Vec<Unflushed>) -> u64 {
        let mut state = self.state();
        let mut dropped = 0;
        for Unflushed { server, minutes, .. } in unflushed {
            let heard = state.heard.entry(server).or_default();
            heard.unflushed = true;
            heard.minutes.splice(0..0, minutes);
            dropped += bound(&mut heard.minutes);
        }
        dropped
    }

    /// Notes how far a run is; what names no run that can exist is passed over.
    pub fn progress(&self, server: ServerId, progress: v1::Progress) {
        if !(1..=RUN_UID_BYTES_MAX).contains(&progress.run_uid.len()) {
            return;
        }
        let mut state = self.state();
        let known = &mut state.heard.entry(server).or_default().progress;
        if known.len() < PROGRESS_MAX || known.contains_key(&progress.run_uid) {
            known.insert(progress.run_uid.clone(), Progress::from(progress));
        }
    }

    /// How far a run is, if its host has said so.
    pub fn progress_of(&self, server: ServerId, run_uid: &str) -> Option<Progress> {
        self.state().heard.get(&server)?.progress.get(run_uid).cloned()
    }

    /// Forgets the progress of a run that has ended.
    pub fn forget_progress(&self, server: ServerId, run_uid: &str) {
        if let Some(heard) = self.state().heard.get_mut(&server) {
            heard.progress.remove(run_uid);
        }
    }
}

/// Keeps the newest [`MINUTES_MAX`].
fn bound(minutes: &mut Vec<Minute>) -> u64 {
    let over = minutes.len().saturating_sub(MINUTES_MAX);
    minutes.drain(..over);
    over as u64
}

impl Ticket {
    /// Waits until there may be directives. Cancel-safe: a wake-up is kept until it is taken.
    pub async fn woken(&self) {
        self.wake.notified().await;
    }

    /// Waits until the session is ended from outside. Cancel-safe, and borrows nothing of the ticket.
    pub fn ended(&self) -> impl Future<Output = End> + Send + use<> {
        let mut end = self.end.clone();
        async move {
            match end.wait_for(Option::is_some).await {
                Ok(why) => why.unwrap_or(End::Replaced),
                // The entry is gone without a word: only a replacement does that.
                Err(_) => End::Replaced,
            }
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.sessions.state();
        // A replacement has its own entry under the same server, which must stay.
        if state.live.get(&self.server).is_some_and(|live| live.number == self.number) {
            state.live.remove(&self.server);
            if let Some(heard) = state.heard.get_mut(&self.server) {
                heard.progress.clear();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVER: ServerId = ServerId(1);

    #[tokio::test]
    async fn a_newer_session_ends_the_older_and_survives_its_closing() {
        let sessions = Sessions::default();
        let older = sessions.open(SERVER);
        let _newer = sessions.open(SERVER);
        assert_eq!(older.ended().await, End::Replaced);
        drop(older);
        assert!(sessions.is_online(SERVER));
    }

    #[tokio::test]
    async fn a_wake_up_before_the_wait_is_not_lost() {
        let sessions = Sessions::default();
        let ticket = sessions.open(SERVER);
        sessions.wake(SERVER);
        ticket.woken().await;
    }

    #[test]
    fn progress_of_a_run_without_an_id_or_with_an_endless_one_is_not_kept() {
        let sessions = Sessions::default();
        for run_uid in [String::new(), "u".repeat(65)] {
            sessions.progress(SERVER, v1::Progress { run_uid: run_uid.clone(), ..v1::Progress::default() });
            assert_eq!(sessions.progress_of(SERVER, &run_uid), None);
        }
    }

    #[test]
    fn minutes_that_cannot_be_flushed_are_kept_up_to_a_bound() {
        let sessions = Sessions::default();
        let mut dropped = 0;
        for minute in 0..200 {
            dropped += sessions.beat(SERVER, &v1::Heartbeat::default(), minute * 60_000);
            let taken = sessions.take_unflushed();
            dropped += sessions.put_back(taken);
        }
        let kept = sessions.take_unflushed();
        assert_eq!((kept[0].minutes.len(), dropped), (MINUTES_MAX, 200 - MINUTES_MAX as u64));
        assert_eq!(kept[0].minutes.last().map(|minute| minute.minute), Some(199));
        assert!(sessions.take_unflushed().is_empty());
    }
}
