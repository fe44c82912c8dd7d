//! Performs what the machine decides, one action at a time, and keeps the run's record.
//!
//! Nothing here decides what a failure leads to; that is [`super::machine`]. While an action goes on the
//! driver also listens for the reasons to cancel: the daemon is gone, the time is over, a signal.

use std::time::Duration;

use hestner_proto::words::{ErrorClass, Phase};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::archive::{Producer, Said, Worker};
use super::hook;
use super::ledger::{HookNote, RunFolder};
use super::log::{Tail, mask};
use super::machine::{self, Action, Machine};
use super::messages::{Event, Failure, Finished, Work, WorkerEvent};
use super::plan::{Host, Plan};
use crate::escrow::RepositoryKey;
use crate::freeze::{self, Point, PointError, PointPlan};
use crate::platform::clock::SharedClock;
use crate::platform::files::Lock;
use crate::policy::HookSettings;
use crate::report::RunRecord;
use crate::repository::{Input, Job, Progress, Stored};

/// A run at work.
pub(super) struct Driver<'a> {
    pub(super) host: &'a Host,
    pub(super) plan: &'a Plan,
    pub(super) folder: &'a RunFolder,
    pub(super) alive: &'a Lock,
    pub(super) clock: SharedClock,
    pub(super) says: mpsc::Sender<Event>,
    pub(super) record: RunRecord,
    tail: Tail,
    failure: Option<Failure>,
    point: Option<Point>,
    stored: Option<Stored>,
    key: Option<RepositoryKey>,
    last_prepared: Option<Instant>,
    archived_anything: bool,
    /// False: recovery has something left to do.
    settled: bool,
}

/// What became of a command of a hook.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Called {
    Succeeded,
    Failed,
    /// Its program did not run, or nobody knows how far it came.
    NotRun,
}

impl Called {
    fn event(self) -> machine::Event {
        if self == Self::Succeeded { machine::Event::HookSucceeded } else { machine::Event::HookFailed }
    }
}

/// How the driver left things.
pub(super) struct Left {
    /// The run's end.
    pub(super) finished: Finished,
    /// Whether recovery still has something to do.
    pub(super) settled: bool,
}

impl<'a> Driver<'a> {
    pub(super) fn new(
        (host, plan): (&'a Host, &'a Plan),
        (folder, alive): (&'a RunFolder, &'a Lock),
        clock: SharedClock,
        says: mpsc::Sender<Event>,
        record: RunRecord,
    ) -> Self {
        Self {
            host,
            plan,
            folder,
            alive,
            clock,
            says,
            record,
            tail: Tail::default(),
            failure: None,
            point: None,
            stored: None,
            key: None,
            last_prepared: None,
            archived_anything: false,
            settled: true,
        }
    }

    /// Runs to the end. `cancelled` gives the reason to stop, if there is one.
    pub(super) async fn run(mut self, cancelled: impl Future<Output = Failure>) -> Left {
        let mut machine = Machine::new(self.plan.service.hooks.len());
        let mut event = machine::Event::Begin;
        let mut reason = None;
        tokio::pin!(cancelled);
        loop {
            let action = match machine.take(event) {
                Ok(action) => action,
                Err(illegal) => {
                    self.fail(Failure::of(ErrorClass::Interrupted, &illegal));
                    self.settled = false;
                    break;
                }
            };
            if action == Action::Finish {
                break;
            }
            let stop = CancellationToken::new();
            let performing = self.perform(action, &stop, machine.has_failed());
            tokio::pin!(performing);
            event = loop {
                tokio::select! {
                    event = &mut performing => break event,
                    why = &mut cancelled, if reason.is_none() => {
                        reason = Some(why);
                        if machine.take(machine::Event::Cancelled) == Ok(Action::Stop) {
                            stop.cancel();
                        }
                    }
                }
            };
        }
        if let Some(reason) = reason {
            // What the cancelled action then stumbled over is only a consequence.
            self.failure = Some(reason);
        }
        if self.failure.is_some() && self.stored.take().is_some() {
            // It failed after the archive, with nobody left to remove what that stored.
            self.settled &= super::settle::forget(&self.plan.location, &self.record.run_uid, self.alive).await;
        }
        self.leave()
    }

    fn leave(mut self) -> Left {
        let now = self.clock.now_ms();
        self.record.log_tail = self.tail.text();
        match (self.failure.take(), self.stored.take()) {
            (None, Some(stored)) => {
                self.record.checksum.clone_from(&stored.snapshot_id);
                self.record.artifact_url = format!("restic:{}/{}", self.record.destination, stored.snapshot_id);
                self.record.verified_at_ms = now;
                self.record.status = hestner_proto::words::RunStatus::Success;
                self.record.end(now);
            }
            (failure, _) => {
                let failure =
                    failure.unwrap_or_else(|| Failure::new(ErrorClass::Interrupted, "the run ended without a result"));
                self.record.unreadable = failure.unreadable;
                self.record.unreadable_names = failure.unreadable_names;
                self.record.repository_bytes = 0;
                self.record.fail(failure.class, failure.message, now);
            }
        }
        Left { finished: Finished { record: self.record, repository_key: self.key }, settled: self.settled }
    }

    fn fail(&mut self, mut failure: Failure) {
        // Output of strangers gets into messages, and messages get to the log and to the centre.
        failure.message = mask(&failure.message);
        tracing::warn!(event = "run_step_failed", error_class = %failure.class, error = failure.message);
        self.failure.get_or_insert(failure);
    }

    async fn enter(&mut self, phase: Phase) {
        self.record.phase = Some(phase);
        // A daemon that is gone is noticed by its closed socket.
        let _ = self.says.send(Event::Progress { phase, progress: Progress::default() }).await;
    }

    async fn perform(&mut self, action: Action, stop: &CancellationToken, failed: bool) -> machine::Event {
        use machine::Event as E;
        match action {
            Action::Prepare(i) => self.prepare(i, stop).await,
            Action::TakePoint => self.take_point().await,
            Action::Release(i) => self.release(i, &self.plan.service.hooks[i].post_thaw, "post_thaw").await,
            Action::Recover(i) => {
                let hook = &self.plan.service.hooks[i];
                let (argv, name) = match hook.freeze_failed.is_empty() {
                    true => (&hook.post_thaw, "post_thaw"),
                    false => (&hook.freeze_failed, "freeze_failed"),
                };
                self.release(i, argv, name).await
            }
            Action::Archive => self.archive(stop).await,
            Action::RemovePoint => {
                self.settled &= self.remove_what_was_made(failed).await;
                E::PointRemoved
            }
            // Neither begins anything: what goes on has an event of its own.
            Action::Stop | Action::Wait | Action::Finish => std::future::pending().await,
        }
    }

    async fn prepare(&mut self, i: usize, stop: &CancellationToken) -> machine::Event {
        self.enter(Phase::PreFreeze).await;
        let hook = &self.plan.service.hooks[i];
        let unclaimed = match self.folder.claim_begin(i) {
            Ok(true) => None,
            Ok(false) => Some(Failure::new(ErrorClass::Interrupted, format!("hook `{}` was begun before", hook.name))),
            Err(error) => Some(super::runner::state_failure(&error)),
        };
        if let Some(failure) = unclaimed {
            self.fail(failure);
            return machine::Event::HookNotBegun;
        }
        let called = self.call(hook, &hook.pre_freeze, "pre_freeze", stop).await;
        self.last_prepared = Some(Instant::now());
        called.event()
    }

    async fn release(&mut self, i: usize, argv: &[String], name: &str) -> machine::Event {
        self.enter(Phase::PostThaw).await;
        // A claim that cannot be written must not keep a service from being released.
        match self.folder.claim_release(i) {
            Ok(true) => {}
            Ok(false) => return machine::Event::HookSucceeded,
            Err(error) => tracing::warn!(event = "release_not_claimed", error = %error),
        }
        let called = self.call(&self.plan.service.hooks[i], argv, name, &CancellationToken::new()).await;
        // One that did not run is owed, and one that cannot be noted counts as owed: recovery calls it once
        // more, and releases are idempotent by contract.
        let noted = called != Called::NotRun && self.folder.release_ended(i).is_ok();
        self.settled &= noted;
        called.event()
    }

    async fn call(&mut self, hook: &HookSettings, argv: &[String], name: &str, stop: &CancellationToken) -> Called {
        if argv.is_empty() {
            return Called::Succeeded;
        }
        let spec = HookNote::from(hook).spec(argv, &self.record.run_uid, &self.record.service);
        let (called, failure) = match hook::run(&spec, stop, &[&**self.alive], &[]).await {
            Ok(ended) => {
                self.tail.add(&format!("{} {name}", hook.name), &ended.output);
                if ended.is_success() {
                    return Called::Succeeded;
                }
                let class = if ended.timed_out { ErrorClass::HookTimeout } else { ErrorClass::HookFailed };
                let message = format!("{name} of hook `{}` {}", hook.name, ended.description());
                let called = if ended.was_started() { Called::Failed } else { Called::NotRun };
                (called, Failure::new(class, message))
            }
            Err(error) => (Called::NotRun, Failure::of(ErrorClass::HookFailed, &error)),
        };
        self.fail(failure);
        called
    }

    async fn take_point(&mut self) -> machine::Event {
        let begun = self.last_prepared.unwrap_or_else(Instant::now);
        self.enter(Phase::Frozen).await;
        let taken = freeze::freeze().take(&self.plan.point, &self.host.freeze).await;
        self.record.freeze_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        match taken {
            Ok(point) => {
                self.point = Some(point);
                self.record.consistency_achieved = self.plan.consistency;
                machine::Event::PointTaken
            }
            Err(error) => {
                // A command that was killed may still have its way inside the kernel, after we have looked.
                self.settled &= !matches!(error, PointError::Command(_));
                self.fail(Failure::of(ErrorClass::PointFailed, &error));
                machine::Event::PointFailed
            }
        }
    }

    async fn archive(&mut self, stop: &CancellationToken) -> machine::Event {
        self.enter(Phase::Archive).await;
        self.archived_anything = true;
        match self.store(stop).await {
            Ok((stored, repository_bytes)) => {
                self.record.bytes_read = stored.bytes_read;
                self.record.bytes_stored = stored.bytes_stored;
                self.record.size_bytes = stored.bytes_read;
                self.record.files = stored.files;
                self.record.vanished = stored.vanished;
                self.record.repository_bytes = repository_bytes;
                self.stored = Some(stored);
                machine::Event::Archived
            }
            Err(failure) => {
                self.tail.add("archive", failure.message.as_bytes());
                self.fail(failure);
                machine::Event::ArchiveFailed
            }
        }
    }

    async fn store(&mut self, stop: &CancellationToken) -> Result<(Stored, u64), Failure> {
        let plan = self.plan;
        let producer = match plan.input {
            Input::Stream { .. } => Some(Producer::new(&plan.service, self.host.run_time_max)?),
            Input::Files { .. } => None,
        };
        let job = Job {
            run_uid: self.record.run_uid.clone(),
            service: self.record.service.clone(),
            input: plan.input.clone(),
        };
        let binds = match &plan.point {
            PointPlan::Live => Vec::new(),
            PointPlan::Btrfs { binds, .. } => binds.clone(),
        };
        let keep = self.host.own_folders();
        let work = Work::Store { job, binds, keep, recovery_recipient: self.host.recovery_recipient.clone() };
        let worker = Worker::start(plan.location.clone(), work, self.alive, producer.as_ref()).await?;
        let (says, key, record) = (&self.says, &mut self.key, &mut self.record);
        let last = worker.finish(stop, producer, |said| match said {
            Said::Opened(opened) => {
                record.repository_id.clone_from(&opened.repository_id);
                *key = Some(opened);
            }
            Said::Progress(phase, progress) => {
                record.phase = Some(phase);
                // Progress that finds no room is no loss.
                let _ = says.try_send(Event::Progress { phase, progress });
            }
        });
        let WorkerEvent::Stored { stored, repository_bytes } = last.await? else {
            return Err(Failure::new(
                ErrorClass::WorkerKilled,
                "the worker ended with another result than was asked for",
            ));
        };
        // A snapshot is what it was; only a live tree can be replaced while it is read.
        if let (Some(paths), PointPlan::Live) = (&plan.paths, &plan.point) {
            paths.look_again().map_err(|e| Failure::of(ErrorClass::SourceMissing, &e))?;
        }
        Ok((stored, repository_bytes))
    }

    /// Removes the point, and whatever a failed run may have left in the repository. False: recovery has to.
    async fn remove_what_was_made(&mut self, failed: bool) -> bool {
        let mut clean = match &self.plan.point {
            PointPlan::Live => true,
            PointPlan::Btrfs { snapshots, .. } => {
                let removed = match self.point.take() {
                    Some(point) => point.remove(&self.host.freeze).await,
                    None => freeze::remove_snapshots(snapshots, &self.host.freeze).await,
                };
                if let Err(error) = &removed {
                    self.record.warnings.push(format!("{error}; it is tried again at the next start"));
                }
                removed.is_ok()
            }
        };
        if failed && self.archived_anything {
            clean &= super::settle::forget(&self.plan.location, &self.record.run_uid, self.alive).await;
        }
        clean
    }
}

/// Completes when the run has taken as long as it may.
pub(super) async fn time_is_over(run_time_max: Duration) -> Failure {
    tokio::time::sleep(run_time_max).await;
    Failure::new(ErrorClass::RunTimeout, format!("the run took longer than {} s", run_time_max.as_secs()))
}
