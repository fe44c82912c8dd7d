//! Runs from the daemon's side: begun in the store, done by a runner, ended in the store.
//!
//! A run is in the store before anything of it happens, and its end is written there together with the
//! report of it. Whatever dies in between, the next start finds the run unfinished, lets a runner settle
//! what is left, and takes the end from the runner's ledger; one without an end was interrupted.
//!
//! A run that the grants want confirmed stays `queued` until a person has said a word or its time is over;
//! meanwhile it holds no place, and a restart lets it wait on. Whether it was confirmed is for the runner
//! to believe or not.

mod confirm;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hestner_proto::v1;
use hestner_proto::words::{ErrorClass, RunKind, RunStatus};
use tokio::sync::{Notify, Semaphore, mpsc, watch};

use super::settings::Limits;
use super::waiting::Waiting;
use crate::lifecycle::Tasks;
use crate::platform::backoff::{Backoff, random_u64};
use crate::platform::chain;
use crate::platform::clock::SharedClock;
use crate::report::{Report, RunRecord};
use crate::run::launcher::{Launch, LaunchError, Runner};
use crate::run::messages::{Event, Failure, Finished, Request};
use crate::run::settle::interrupted;
use crate::status::WaitingRun;
use crate::store::{RunRow, Store, StoreError, Wait};
pub use confirm::NotWaiting;
use confirm::{Entered, waiting_run};

/// How often to look whether a run of an earlier daemon still lives.
const ALIVE_LOOK: Duration = Duration::from_secs(30);

/// Who asks for a run of which service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// The service.
    pub service: String,
    /// The verb, as it was asked for.
    pub verb: String,
    /// Who asks.
    pub kind: RunKind,
    /// The directive, if the centre asks.
    pub directive_id: String,
}

/// What a follower of a run hears.
#[derive(Clone, Debug)]
pub enum Heard {
    /// Where it is.
    Progress(v1::Progress),
    /// It waits for a person.
    Waits(WaitingRun),
    /// Its end.
    Ended(Box<RunRecord>),
}

/// What runs share.
#[derive(Clone)]
pub struct Runs {
    shared: Arc<Shared>,
}

/// What [`Runs`] is made of.
pub struct Parts {
    /// The settings file.
    pub settings_path: PathBuf,
    /// How runners come to be.
    pub launch: Launch,
    /// Bounds.
    pub limits: Limits,
    /// The store.
    pub store: Store,
    /// The clock.
    pub clock: SharedClock,
    /// Where runs are spawned.
    pub tasks: Tasks,
    /// Rung when the outbox has grown.
    pub outbox_grew: Arc<Notify>,
    /// Progress of the moment.
    pub progress: watch::Sender<Option<v1::Progress>>,
    /// How many runs go on.
    pub active: watch::Sender<usize>,
}

struct Shared {
    parts: Parts,
    /// Services with a run that is queued or running.
    busy: Mutex<BTreeSet<String>>,
    waiting: Waiting,
    followers: Mutex<BTreeMap<String, mpsc::Sender<Heard>>>,
    places: Semaphore,
    settled: watch::Sender<bool>,
}

impl Runs {
    /// Nothing runs yet; [`Runs::recover`] has to be called first.
    pub fn new(parts: Parts) -> Self {
        let places = Semaphore::new(parts.limits.concurrent_runs);
        let (settled, _) = watch::channel(false);
        let waiting = Waiting::default();
        let shared = Shared { parts, busy: Mutex::default(), waiting, followers: Mutex::default(), places, settled };
        Self { shared: Arc::new(shared) }
    }

    /// Brings to an end what an earlier daemon left: first everything is settled, then every unfinished run
    /// gets its end. New runs wait for the first round of this.
    pub async fn recover(&self) {
        let left_by_another = match self.shared.parts.store.unfinished_runs().await {
            Ok(rows) => rows.into_iter().map(|row| row.run_uid).collect(),
            Err(error) => {
                tracing::error!(event = "runs_not_recovered", error = %error);
                BTreeSet::new()
            }
        };
        self.settle_until_ended(left_by_another).await;
    }

    /// Settles, and again from time to time, until each of the given runs has its end.
    async fn settle_until_ended(&self, mut open: BTreeSet<String>) {
        let drain = self.shared.parts.tasks.drain();
        loop {
            open = self.settle(open).await;
            self.shared.settled.send_replace(true);
            if open.is_empty() {
                return;
            }
            // A process of theirs still lives, perhaps blocked in the kernel: their end is not known yet.
            tracing::warn!(event = "runs_still_alive", runs = ?open);
            tokio::select! {
                () = drain.cancelled() => return,
                () = tokio::time::sleep(ALIVE_LOOK) => {}
            }
        }
    }

    /// Has everything settled that can be, and ends those of the given runs of which no process lives.
    /// Returns the others.
    async fn settle(&self, mut open: BTreeSet<String>) -> BTreeSet<String> {
        let mut alive = BTreeSet::new();
        let mut ended = Vec::new();
        let conversation = async {
            let request = Request::Settle { run_uids: open.iter().cloned().collect() };
            let mut runner = Runner::launch(&self.shared.parts.launch, &request).await?;
            let mut settled = false;
            while let Some(event) = runner.next().await {
                match event {
                    Event::Alive { run_uid } => drop(alive.insert(run_uid)),
                    Event::Finished(end) => ended.push(*end),
                    Event::Settled => settled = true,
                    _ => {}
                }
            }
            Ok::<bool, LaunchError>(settled)
        };
        let settled = match conversation.await {
            Ok(settled) => settled,
            Err(error) => {
                // Every runner settles before it begins, so that this is made good at the next run.
                tracing::error!(event = "not_settled", error = chain(&error));
                false
            }
        };
        for finished in ended {
            let run_uid = finished.record.run_uid.clone();
            if open.remove(&run_uid) {
                self.finish_of_another(&run_uid, finished).await;
            }
        }
        if settled {
            // No process and no result: it was never begun, or never came so far.
            for run_uid in open.iter().filter(|uid| !alive.contains(*uid)) {
                self.finish_of_another(run_uid, interrupted(run_uid, None, &*self.shared.parts.clock)).await;
            }
            open.retain(|uid| alive.contains(uid));
        }
        open
    }

    /// Begins a run and returns its id. `follower` hears of it until its end.
    ///
    /// # Errors
    /// When another run of the service goes on, too many wait, or its end could not be kept.
    pub async fn start(&self, wish: Wish, follower: Option<mpsc::Sender<Heard>>) -> Result<String, Failure> {
        let run_uid = uuid::Uuid::now_v7().to_string();
        let wait = self.wait_of(&wish);
        self.occupy(&wish.service, wait.is_some())?;
        if let Err(error) = self.begin(&wish, &run_uid, wait.clone()).await {
            self.lock_busy().remove(&wish.service);
            let class = if error.is_full() { ErrorClass::StateFull } else { ErrorClass::StateUnusable };
            return Err(Failure::of(class, &error));
        }
        self.shared.parts.outbox_grew.notify_one();
        let entered = wait.map(|wait| {
            let run = waiting_run(&wish, &run_uid, wait);
            tracing::info!(event = "run_waits_for_confirmation", run_id = run_uid, service = run.service);
            if let Some(follower) = &follower {
                // Its first message: there is room.
                let _ = follower.try_send(Heard::Waits(run.clone()));
            }
            self.enter(run)
        });
        if let Some(follower) = follower {
            self.lock_followers().insert(run_uid.clone(), follower);
        }
        let (runs, uid) = (self.clone(), run_uid.clone());
        self.shared.parts.tasks.spawn_ending(async move { runs.work(wish, uid, entered).await });
        Ok(run_uid)
    }

    /// Ends a run of which nothing was begun.
    async fn finish_unbegun(&self, wish: &Wish, run_uid: &str, started_at_ms: i64, failure: Failure) {
        let mut record = RunRecord::queued(
            run_uid.to_owned(),
            wish.directive_id.clone(),
            wish.service.clone(),
            wish.kind,
            started_at_ms,
        );
        record.fail(failure.class, failure.message, self.shared.parts.clock.now_ms());
        self.finish(wish, Finished { record, repository_key: None }).await;
    }

    fn occupy(&self, service: &str, waits: bool) -> Result<(), Failure> {
        let limits = &self.shared.parts.limits;
        let mut busy = self.lock_busy();
        // What waits for a person holds no place; of each service there is one at most.
        let taken = busy.len().saturating_sub(self.shared.waiting.count());
        if !waits && taken >= limits.concurrent_runs + limits.waiting_runs {
            return Err(Failure::new(ErrorClass::Busy, format!("{taken} runs go on or wait; no more are taken")));
        }
        if !busy.insert(service.to_owned()) {
            let message = match self.shared.waiting.of_service(service) {
                Some(run_uid) => format!(
                    "run {run_uid} of service `{service}` waits to be confirmed; `hestner-agent confirm {run_uid}` lets it begin, and with `--refuse` ends it"
                ),
                None => format!("another run of service `{service}` goes on"),
            };
            return Err(Failure::new(ErrorClass::Busy, message));
        }
        Ok(())
    }

    async fn begin(&self, wish: &Wish, run_uid: &str, wait: Option<Wait>) -> Result<(), StoreError> {
        let Parts { store, clock, .. } = &self.shared.parts;
        store.check_room().await?;
        let now = clock.now_ms();
        let record =
            RunRecord::queued(run_uid.to_owned(), wish.directive_id.clone(), wish.service.clone(), wish.kind, now);
        let row = RunRow { run_uid: run_uid.to_owned(), service: wish.service.clone(), record: to_text(&record) };
        let directive = (!wish.directive_id.is_empty()).then(|| wish.directive_id.clone());
        store.begin_run(row, Report::Run(Box::new(record)).encode(now), directive, wait).await
    }

    async fn work(&self, wish: Wish, run_uid: String, entered: Option<Entered>) {
        if self.may_begin(&wish, &run_uid, entered).await {
            self.work_in_turn(&wish, &run_uid).await;
        }
        self.shared.waiting.forget(&run_uid);
        self.lock_busy().remove(&wish.service);
        self.lock_followers().remove(&run_uid);
    }

    async fn work_in_turn(&self, wish: &Wish, run_uid: &str) {
        let drain = self.shared.parts.tasks.drain();
        let mut settled = self.shared.settled.subscribe();
        let ready = async {
            // The sender lives as long as this does.
            let _ = settled.wait_for(|done| *done).await;
            self.shared.places.acquire().await
        };
        let place = tokio::select! {
            // First: the drain ends other runs, and the place that they leave is nobody's any more.
            biased;
            // The run stays unfinished in the store: the next start calls it interrupted, or lets it begin if a
            // person had confirmed it.
            () = drain.cancelled() => return,
            place = ready => place,
        };
        // From here on a restart would have to bring it to an end, and must not let it begin again.
        if let Err(error) = self.shared.parts.store.end_wait(run_uid.to_owned()).await {
            let class = if error.is_full() { ErrorClass::StateFull } else { ErrorClass::StateUnusable };
            let now = self.shared.parts.clock.now_ms();
            self.finish_unbegun(wish, run_uid, now, Failure::of(class, &error)).await;
            return;
        }
        self.shared.parts.active.send_modify(|active| *active += 1);
        let finished = tokio::select! {
            finished = self.follow_runner(wish, run_uid) => finished,
            // Dropping the conversation cancels the run; its runner writes the end into its ledger.
            () = drain.cancelled() => None,
        };
        match finished {
            Some(finished) => self.finish(wish, finished).await,
            None if drain.is_cancelled() => {}
            // The runner died without a word: settle what it left, and hear from its ledger.
            None => self.settle_until_ended(BTreeSet::from([run_uid.to_owned()])).await,
        }
        drop(place);
        self.shared.parts.active.send_modify(|active| *active -= 1);
        self.shared.parts.progress.send_replace(None);
    }

    async fn follow_runner(&self, wish: &Wish, run_uid: &str) -> Option<Finished> {
        let request =
            Request::Run { run_uid: run_uid.to_owned(), service: wish.service.clone(), verb: wish.verb.clone() };
        let mut runner = match Runner::launch(&self.shared.parts.launch, &request).await {
            Ok(runner) => runner,
            Err(error) => {
                tracing::error!(event = "runner_not_started", run_id = run_uid, error = chain(&error));
                // It never heard what it should do.
                let mut finished = interrupted(run_uid, None, &*self.shared.parts.clock);
                finished.record.error_message = chain(&error);
                return Some(finished);
            }
        };
        self.report_running(wish, run_uid).await;
        let mut finished = None;
        while let Some(event) = runner.next().await {
            match event {
                Event::Progress { phase, progress } => self.tell_progress(v1::Progress {
                    run_uid: run_uid.to_owned(),
                    phase: phase.to_string(),
                    bytes_done: progress.bytes_done,
                    bytes_total: progress.bytes_total,
                    files_done: progress.files_done,
                    files_total: progress.files_total,
                    seconds_remaining: progress.seconds_remaining,
                    bytes_per_second: progress.bytes_per_second,
                }),
                Event::Finished(end) => finished = Some(*end),
                _ => {}
            }
        }
        finished
    }

    async fn report_running(&self, wish: &Wish, run_uid: &str) {
        let Parts { store, clock, outbox_grew, .. } = &self.shared.parts;
        let now = clock.now_ms();
        let mut record =
            RunRecord::queued(run_uid.to_owned(), wish.directive_id.clone(), wish.service.clone(), wish.kind, now);
        record.status = RunStatus::Running;
        // The report of the end says all that this one does.
        match store.append(Report::Run(Box::new(record)).encode(now)).await {
            Ok(_) => outbox_grew.notify_one(),
            Err(error) => tracing::warn!(event = "running_not_reported", run_id = run_uid, error = %error),
        }
    }

    fn tell_progress(&self, progress: v1::Progress) {
        if let Some(follower) = self.lock_followers().get(&progress.run_uid) {
            // One place is kept for the end: a follower that does not read misses progress only.
            if follower.capacity() > 1 {
                let _ = follower.try_send(Heard::Progress(progress.clone()));
            }
        }
        self.shared.parts.progress.send_replace(Some(progress));
    }

    /// Ends a run that another daemon, or an earlier moment of this one, began.
    async fn finish_of_another(&self, run_uid: &str, finished: Finished) {
        let known = match self.shared.parts.store.run(run_uid.to_owned()).await {
            Ok(Some(row)) => serde_json::from_str::<RunRecord>(&row.record).ok(),
            _ => None,
        };
        let wish = match known {
            Some(known) => {
                Wish { service: known.service, verb: String::new(), kind: known.kind, directive_id: known.directive_id }
            }
            None => Wish {
                service: finished.record.service.clone(),
                verb: String::new(),
                kind: RunKind::Manual,
                directive_id: String::new(),
            },
        };
        self.finish(&wish, finished).await;
    }

    /// Writes the end into the store; tries until it is there, because a result that is not kept is lost.
    async fn finish(&self, wish: &Wish, finished: Finished) {
        let Parts { store, clock, outbox_grew, tasks, .. } = &self.shared.parts;
        let Finished { mut record, repository_key } = finished;
        record.service.clone_from(&wish.service);
        record.kind = wish.kind;
        record.directive_id.clone_from(&wish.directive_id);
        log_end(&record);
        let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(30));
        let drain = tasks.drain();
        let key = repository_key.map(|key| (key.key.mark(), Report::RepositoryKey(key)));
        loop {
            let now = clock.now_ms();
            let report = Report::Run(Box::new(record.clone())).encode(now);
            let mut written = store.finish_run(record.run_uid.clone(), to_text(&record), report).await.map(drop);
            if let (Ok(()), Some((mark, report))) = (&written, &key) {
                written = store.append_once(mark.clone(), report.encode(now)).await;
            }
            let Err(error) = written else { break };
            tracing::error!(event = "end_not_kept", run_id = record.run_uid, error = %error);
            let pause = random_u64().map_or(Duration::from_secs(1), |random| backoff.next_delay(random));
            tokio::select! {
                // The runner's ledger has the end; the next start reads it from there.
                () = drain.cancelled() => break,
                () = tokio::time::sleep(pause) => {}
            }
        }
        outbox_grew.notify_one();
        let follower = self.lock_followers().remove(&record.run_uid);
        if let Some(follower) = follower {
            // There is room for it, and a follower that has left does not need to know.
            let _ = follower.try_send(Heard::Ended(Box::new(record)));
        }
    }

    fn lock_busy(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        self.shared.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_followers(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, mpsc::Sender<Heard>>> {
        self.shared.followers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn to_text(record: &RunRecord) -> String {
    // Plain data: it can always be written.
    serde_json::to_string(record).unwrap_or_default()
}

fn log_end(record: &RunRecord) {
    let RunRecord { run_uid, service, status, duration_ms, .. } = record;
    match record.error_class {
        None => tracing::info!(event = "run_ended", run_id = run_uid, service, status = %status, duration_ms),
        Some(class) => {
            tracing::error!(event = "run_ended", run_id = run_uid, service, status = %status, error_class = %class, error = record.error_message);
        }
    }
}
