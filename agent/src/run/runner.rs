//! The runner process: one run, from the request to the result.
//!
//! It takes a run id, a service and a verb from whoever holds the other end of its socket (root, its own user
//! or the daemon's, `SO_PEERCRED`), and reads settings, grants and policy itself. When the socket closes the run is
//! cancelled: what was begun is released, and the run ends as `interrupted`.

use std::collections::BTreeSet;
use std::io;
use std::time::Duration;

use hestner_proto::words::{ErrorClass, RunKind, RunStatus};
use nix::sys::socket::{getsockopt, sockopt};
use tokio::io::{AsyncReadExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::archive::Worker;
use super::confirmation::Confirmations;
use super::driver::{Driver, Left, time_is_over};
use super::ledger::{Ledger, RunFolder, is_run_id};
use super::messages::{Event, Failure, Finished, Request, Work, WorkerEvent, WorkerTask, receive, send};
use super::plan::{Admitted, Host, Plan};
use super::settle;
use super::thaw;
use crate::gate::Needs;
use crate::platform::chain;
use crate::platform::clock::SharedClock;
use crate::platform::failpoint;
use crate::platform::files::{self, FileError, Lock};
use crate::platform::{process, trust};
use crate::report::RunRecord;
use crate::repository::retention::{self, Candidate};
use crate::repository::{Repository, Snapshot};
use crate::status::Description;

/// Room that the state folder must have for a run to begin: its notes and its result have to fit.
pub const STATE_FREE_BYTES_MIN: u64 = 4 * 1024 * 1024;
/// How long the daemon may take to say what it wants.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a daemon may leave its end of the socket full before nothing more is said to it.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// Events that wait for the daemon.
const EVENTS_WAITING: usize = 64;

/// What a runner is told by the process that it is: nothing of this comes over the socket.
pub struct Told<D> {
    /// Settings and identity, or why there are none; then every request is answered with that.
    pub host: Result<Host, Failure>,
    /// Who may ask.
    pub askers: Askers,
    /// What the daemon may know of this host; looked up only when it asks.
    pub description: D,
    /// The clock.
    pub clock: SharedClock,
}

/// Who may ask besides root and the runner's own user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Askers {
    /// Nobody.
    NobodyElse,
    /// The user that the daemon runs as.
    Daemon(u32),
    /// Whoever the socket let through: there are no settings, so that nothing is done, and that is what they hear.
    Anybody,
}

/// What writing to a daemon says that is gone, or does not read.
const GONE: [io::ErrorKind; 3] = [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset, io::ErrorKind::TimedOut];

/// The runner process, on a socket that was handed down as standard input.
///
/// # Errors
/// When the socket cannot be used or its other end is somebody else's.
pub async fn run(socket: UnixStream, told: Told<impl Future<Output = Description>>) -> io::Result<()> {
    let peer = getsockopt(&socket, sockopt::PeerCredentials)?;
    if !told.askers.include(peer.uid()) {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("user {} may not start runs", peer.uid())));
    }
    process::become_subreaper()?;
    // Heard from here on, and heeded only where a run can be called off: a release of an earlier run that it cut
    // short would run once more.
    let told_to_stop = signal(SignalKind::terminate())?;
    let (read, write) = socket.into_split();
    let mut read = BufReader::new(read);
    // Whoever connects and says nothing would keep one of the few places.
    let request = tokio::time::timeout(REQUEST_TIMEOUT, receive::<Request>(&mut read)).await;
    let Some(request) = request.map_err(|_| io::ErrorKind::TimedOut)? else {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the request is not one"));
    };
    let (says, waiting) = mpsc::channel(EVENTS_WAITING);
    let work = answer(request, told, says, Asker { daemon: read, told_to_stop });
    let ((), written) = tokio::join!(work, forward(waiting, write));
    match written {
        // A daemon that is gone is no failure of ours: what it did not hear is in the ledger.
        Err(error) if GONE.contains(&error.kind()) => Ok(()),
        other => other,
    }
}

impl Askers {
    fn include(self, peer: u32) -> bool {
        match self {
            _ if trust::is_trusted_user(peer) => true,
            Self::NobodyElse => false,
            Self::Daemon(uid) => peer == uid,
            Self::Anybody => true,
        }
    }
}

/// Writes events until there are no more; goes on taking them when the daemon is gone, or does not read.
async fn forward(mut waiting: mpsc::Receiver<Event>, mut write: OwnedWriteHalf) -> io::Result<()> {
    let mut written = Ok(());
    while let Some(event) = waiting.recv().await {
        if written.is_ok() {
            let sent = tokio::time::timeout(WRITE_TIMEOUT, send(&mut write, &event)).await;
            written = sent.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        }
    }
    written
}

async fn answer(
    request: Request,
    Told { host, description, clock, .. }: Told<impl Future<Output = Description>>,
    says: mpsc::Sender<Event>,
    asker: Asker,
) {
    let last = match request {
        Request::Describe => Event::Described(Box::new(description.await)),
        Request::Settle { run_uids } => {
            let whom = settle::For::Daemon { run_uids: &run_uids };
            let settled = match &host {
                Ok(host) => settle::settle_all(host, whom, &*clock).await.map_err(|e| chain(&e)),
                Err(failure) => Err(failure.message.clone()),
            };
            if let Err(error) = settled {
                tracing::error!(event = "not_settled", error);
            }
            match host {
                Ok(host) => {
                    tell_ends(&host, run_uids, &says).await;
                    Event::Settled
                }
                // Nothing is known of any run then.
                Err(failure) => Event::Finished(Box::new(ended_early("", "", failure, &clock))),
            }
        }
        Request::Plan { service } => match plan_only(host, &service).await {
            Ok(plan) => Event::Planned(plan.lines()),
            Err(failure) => Event::Finished(Box::new(ended_early("", &service, failure, &clock))),
        },
        Request::Run { run_uid, service, verb } => {
            let asked = Asked { run_uid, service, verb };
            let finished = match host {
                Ok(host) => asked.run(&host, &clock, &says, asker).await,
                Err(failure) => ended_early(&asked.run_uid, &asked.service, failure, &clock),
            };
            Event::Finished(Box::new(finished))
        }
    };
    // A daemon that is gone reads the result from the ledger.
    let _ = says.send(last).await;
}

/// Tells how runs ended, or that they still live.
async fn tell_ends(host: &Host, run_uids: Vec<String>, says: &mpsc::Sender<Event>) {
    let ledger = Ledger::of(&host.state_dir);
    // An id becomes a path: what is no id is nobody's run.
    for run_uid in run_uids.into_iter().filter(|uid| is_run_id(uid)) {
        let folder = ledger.run(&run_uid);
        let event = match folder.result() {
            _ if folder.is_alive() => Event::Alive { run_uid },
            Ok(Some(finished)) => Event::Finished(Box::new(finished)),
            Ok(None) => continue,
            Err(error) => {
                tracing::error!(event = "result_not_read", run_id = run_uid, error = %error);
                continue;
            }
        };
        let _ = says.send(event).await;
    }
}

async fn plan_only(host: Result<Host, Failure>, service: &str) -> Result<Plan, Failure> {
    Plan::make(&host?, service, "snapshot", "dry-run").await
}

fn ended_early(run_uid: &str, service: &str, failure: Failure, clock: &SharedClock) -> Finished {
    let now = clock.now_ms();
    let mut record = RunRecord::queued(run_uid.to_owned(), String::new(), service.to_owned(), RunKind::Manual, now);
    record.unreadable = failure.unreadable;
    record.unreadable_names = failure.unreadable_names;
    record.fail(failure.class, failure.message, now);
    Finished { record, repository_key: None }
}

/// A failure of the agent's own files.
pub(super) fn state_failure(error: &FileError) -> Failure {
    Failure::of(if error.is_full() { ErrorClass::StateFull } else { ErrorClass::StateUnusable }, error)
}

struct Asked {
    run_uid: String,
    service: String,
    verb: String,
}

impl Asked {
    async fn run(&self, host: &Host, clock: &SharedClock, says: &mpsc::Sender<Event>, asker: Asker) -> Finished {
        failpoint::arm(&host.state_dir.join("failpoint"));
        // Held until the run is over.
        let (_service, folder, alive) = match self.begin(host, clock) {
            Ok(begun) => begun,
            Err(failure) => return self.early(failure, clock),
        };
        let mut left = match self.run_in(host, &folder, &alive, clock, says, asker).await {
            Ok(left) => left,
            // Nothing was begun, so that only its result has to be kept.
            Err(failure) => Left { finished: self.early(failure, clock), settled: true },
        };
        // After retention for the second time; the first one is what counts, and is never taken back.
        let written = folder.write_result(&left.finished);
        if let Err(error) = written.and_then(|()| if left.settled { folder.settle() } else { Ok(()) }) {
            tracing::error!(event = "run_not_settled", error = %error);
            left.finished.record.warnings.push(format!("{error}; what is left is done at the next start"));
        }
        left.finished
    }

    fn early(&self, failure: Failure, clock: &SharedClock) -> Finished {
        ended_early(&self.run_uid, &self.service, failure, clock)
    }

    /// Everything that can be refused without looking at the source is refused before there is a folder:
    /// whoever asks in vain leaves nothing behind.
    fn begin(&self, host: &Host, clock: &SharedClock) -> Result<(Lock, RunFolder, Lock), Failure> {
        if !is_run_id(&self.run_uid) {
            return Err(Failure::new(ErrorClass::Refused, "the run id is not a UUID"));
        }
        let free = files::free_bytes(&host.state_dir).map_err(|e| state_failure(&e))?;
        if free < STATE_FREE_BYTES_MIN {
            let message = format!(
                "the state folder {} has {free} bytes left; a run needs {STATE_FREE_BYTES_MIN}",
                host.state_dir.display()
            );
            return Err(Failure::new(ErrorClass::StateFull, message));
        }
        let admitted = Admitted::of(host, &self.service, &self.verb)?;
        if admitted.needs == Needs::Confirmation {
            let run = (self.run_uid.as_str(), self.service.as_str(), admitted.verb);
            Confirmations::of(&host.state_dir).look(run, clock.now_ms())?;
        }
        let ledger = Ledger::of(&host.state_dir);
        let service = ledger.lock_service(&self.service).map_err(|e| state_failure(&e))?;
        let busy = || Failure::new(ErrorClass::Busy, format!("another run of service `{}` goes on", self.service));
        let service = service.ok_or_else(busy)?;
        // One that cannot be removed now is removed later.
        if let Err(error) = ledger.tidy() {
            tracing::warn!(event = "ledger_not_tidied", error = %error);
        }
        let begun = ledger.begin(&self.run_uid).map_err(|e| state_failure(&e))?;
        let (folder, alive) = begun.ok_or_else(|| Failure::new(ErrorClass::Refused, "this run was begun before"))?;
        Ok((service, folder, alive))
    }

    /// Plans and runs. Only what has a plan can have left anything behind.
    async fn run_in(
        &self,
        host: &Host,
        folder: &RunFolder,
        alive: &Lock,
        clock: &SharedClock,
        says: &mpsc::Sender<Event>,
        mut asker: Asker,
    ) -> Result<Left, Failure> {
        let plan = Plan::make(host, &self.service, &self.verb, &self.run_uid).await?;
        if plan.needs == Needs::Confirmation {
            // The daemon's word is not enough: root's own file has to say the same.
            let run = (self.run_uid.as_str(), self.service.as_str(), plan.verb);
            let confirmed = Confirmations::of(&host.state_dir).take(run, clock.now_ms())?;
            tracing::info!(event = "run_confirmed", run_id = self.run_uid, by = confirmed.by);
        }
        if let Some(reason) = host.fence.off(&plan.effort) {
            tracing::warn!(event = "worker_limits_off", run_id = self.run_uid, reason);
        }
        let whom = settle::For::Run { run_uid: &self.run_uid, service: &self.service };
        settle::settle_all(host, whom, &**clock).await.map_err(|e| state_failure(&e))?;
        let held_before = self.earlier_one(host)?;
        folder.write_note(&plan.note()).map_err(|e| state_failure(&e))?;
        let mut record = self.record(&plan, clock);
        record.warnings.extend(held_before);
        let driver = Driver::new((host, &plan), (folder, alive), SharedClock::clone(clock), says.clone(), record);
        let left = driver.run(asker.reason_to_cancel(host)).await;
        let left = self.commit(host, &plan, folder, alive, left).await;
        Ok(self.retain(host, &plan, alive, left, &mut asker).await)
    }

    /// An earlier run of the service whose processes still live may be about to release it: in the middle of
    /// ours.
    /// One that is dead and could not be released even now is worth a remark.
    fn earlier_one(&self, host: &Host) -> Result<Option<String>, Failure> {
        let holding = thaw::holding(&host.state_dir).map_err(|e| state_failure(&e))?;
        let other = holding.into_iter().find(|other| other.service == self.service && other.run_uid != self.run_uid);
        let Some(other) = other else { return Ok(None) };
        if other.is_alive {
            let message = format!("run {} of service `{}` still holds it", other.run_uid, self.service);
            return Err(Failure::new(ErrorClass::Busy, message));
        }
        Ok(Some(format!("run {} could not be released; `hestner-agent thaw` says why", other.run_uid)))
    }

    /// Writes the result, which is the moment a success counts.
    async fn commit(&self, host: &Host, plan: &Plan, folder: &RunFolder, alive: &Lock, mut left: Left) -> Left {
        if let Err(error) = folder.write_result(&left.finished) {
            let failure = state_failure(&error);
            tracing::error!(event = "result_not_written", error = failure.message);
            let record = &mut left.finished.record;
            if record.snapshot_id().is_some() {
                // A success that is not on disk would be forgotten by recovery: it is none.
                let now = record.finished_at_ms;
                record.fail(failure.class, failure.message, now);
                left.settled &= settle::forget(host, &plan.location, &self.run_uid, alive).await;
            }
        }
        left
    }

    fn record(&self, plan: &Plan, clock: &SharedClock) -> RunRecord {
        let mut record = RunRecord::queued(
            self.run_uid.clone(),
            String::new(),
            self.service.clone(),
            RunKind::Manual,
            clock.now_ms(),
        );
        record.status = RunStatus::Running;
        record.scope = plan.service.scope();
        record.job_type = if plan.point.is_live() { "backup" } else { "snapshot" }.to_owned();
        record.consistency_requested = plan.service.consistency;
        record.destination.clone_from(&plan.location.destination.name);
        record.policy_id = plan.policy.as_ref().map_or(0, |p| p.policy_id);
        record.warnings.clone_from(&plan.warnings);
        record
    }

    /// Removes what retention no longer keeps, after the result of a good run is on disk. Whatever becomes
    /// of it, the run stays good.
    async fn retain(&self, host: &Host, plan: &Plan, alive: &Lock, mut left: Left, asker: &mut Asker) -> Left {
        let record = &mut left.finished.record;
        let Some(rules) = plan.retention().filter(|_| record.snapshot_id().is_some()) else { return left };
        match self.expire(host, plan, rules, alive, asker).await {
            Ok(Expired { runs, repository_bytes, warning }) => {
                record.expired_runs = runs;
                record.warnings.extend(warning);
                record.repository_bytes = repository_bytes.unwrap_or(record.repository_bytes);
            }
            Err(failure) => record.warnings.push(format!("retention: {}", failure.message)),
        }
        left
    }

    async fn expire(
        &self,
        host: &Host,
        plan: &Plan,
        rules: retention::Rules,
        alive: &Lock,
        asker: &mut Asker,
    ) -> Result<Expired, Failure> {
        if plan.location.destination.put_only {
            return Ok(Expired::default());
        }
        let ledger = Ledger::of(&host.state_dir);
        let gone = self.past_retention(&ledger, plan, rules).await?;
        if gone.is_empty() {
            return Ok(Expired::default());
        }
        if !plan.may_prune {
            let warning =
                format!("{} artifacts are past the policy's retention and stay: `prune` is not granted", gone.len());
            return Ok(Expired { warning: Some(warning), ..Expired::default() });
        }
        let work = Work::Expire { snapshot_ids: gone.iter().map(|c| c.snapshot_id.clone()).collect() };
        let task = WorkerTask { location: plan.location.clone(), effort: plan.effort.clone(), work };
        let worker = Worker::start(&host.fence, task, alive, None).await?;
        let stop = CancellationToken::new();
        let ended = {
            let work = worker.finish(&stop, None, |_| {});
            tokio::pin!(work);
            // What is removed has as much time as what is stored: nobody else can run meanwhile.
            let reason = tokio::select! {
                ended = &mut work => Ok(ended),
                failure = asker.called_off() => Err(failure.message),
                () = tokio::time::sleep(host.run_time_max) => Err("it took longer than a run may".to_owned()),
            };
            match reason {
                Ok(ended) => ended,
                Err(reason) => {
                    stop.cancel();
                    let told =
                        |failure: Failure| Failure { message: format!("{reason}; {}", failure.message), ..failure };
                    work.await.map_err(told)
                }
            }
        };
        let mut expired = Expired::default();
        match ended {
            Ok(WorkerEvent::Removed { repository_bytes, warning }) => {
                expired.repository_bytes = Some(repository_bytes);
                expired.warning = warning.map(|why| format!("retention: {why}"));
            }
            Ok(_) => expired.warning = Some("retention: the worker ended with another result".to_owned()),
            // Artifacts may be gone although their data could not be removed: look.
            Err(failure) => expired.warning = Some(format!("retention: {}", failure.message)),
        }
        let left: BTreeSet<String> = list(plan).await?.into_iter().map(|s| s.id).collect();
        for candidate in gone.into_iter().filter(|c| !left.contains(&c.snapshot_id)) {
            ledger.run(&candidate.run_uid).mark_expired().map_err(|e| state_failure(&e))?;
            expired.runs.push(candidate.run_uid);
        }
        Ok(expired)
    }

    /// Ages count from the newest artifact, not from the clock: one that jumps ahead ends nothing by itself.
    async fn past_retention(
        &self,
        ledger: &Ledger,
        plan: &Plan,
        rules: retention::Rules,
    ) -> Result<Vec<Candidate>, Failure> {
        let ours = list(plan).await?.into_iter().filter(|s| s.service == self.service);
        let good = ours.filter(|s| ledger.run(&s.run_uid).offers_artifact());
        let candidates: Vec<Candidate> =
            good.map(|s| Candidate { snapshot_id: s.id, run_uid: s.run_uid, time: s.time }).collect();
        let newest = candidates.iter().map(|c| c.time).max().unwrap_or_default();
        Ok(retention::expired(candidates, rules, newest))
    }
}

async fn list(plan: &Plan) -> Result<Vec<Snapshot>, Failure> {
    Repository::at(plan.location.clone()).snapshots().await.map_err(|e| Failure::of(e.class(), &e))
}

#[derive(Default)]
struct Expired {
    runs: Vec<String>,
    repository_bytes: Option<u64>,
    warning: Option<String>,
}

/// Whoever can call a run off.
struct Asker {
    /// Its end is the daemon's, or the daemon's wish.
    daemon: BufReader<OwnedReadHalf>,
    /// SIGTERM, as systemd sends it.
    told_to_stop: Signal,
}

impl Asker {
    /// Completes when somebody calls the work off.
    async fn called_off(&mut self) -> Failure {
        let mut byte = [0];
        tokio::select! {
            _ = self.daemon.read(&mut byte) => {
                Failure::new(ErrorClass::Interrupted, "the agent's daemon stopped while the run went on")
            }
            Some(()) = self.told_to_stop.recv() => {
                Failure::new(ErrorClass::Interrupted, "the runner was told to stop")
            }
        }
    }

    /// The same, or when the run has taken as long as it may.
    async fn reason_to_cancel(&mut self, host: &Host) -> Failure {
        tokio::select! {
            failure = self.called_off() => failure,
            failure = time_is_over(host.run_time_max) => failure,
        }
    }
}
