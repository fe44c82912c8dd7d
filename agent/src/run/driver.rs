//! Performs what the machine decides, one action at a time, and keeps the run's record.
//!
//! Nothing here decides what a failure leads to; that is [`super::machine`]. While an action goes on the
//! driver also listens for the reasons to cancel: the daemon is gone, the time is over, a signal.

use std::os::fd::AsFd;
use std::time::Duration;

use hestner_proto::words::{ErrorClass, Phase};
use nix::unistd::Pid;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::archive::{Producer, Said, Worker};
use super::hook::Waiting;
use super::ledger::{HookNote, RunFolder};
use super::log::{Tail, mask};
use super::machine::{self, Action, Machine, Span};
use super::messages::{Event, Failure, Finished, Work, WorkerEvent, WorkerTask};
use super::plan::{Host, Plan, point_failure};
use super::thaw;
use crate::escrow::RepositoryKey;
use crate::freeze::{self, Arming, Frozen, HookGuard, Point, PointError};
use crate::guard::GuardError;
use crate::platform::chain;
use crate::platform::clock::SharedClock;
use crate::platform::failpoint;
use crate::platform::files::Lock;
use crate::policy::HookSettings;
use crate::report::RunRecord;
use crate::repository::{Input, Job, Progress, Stored};

/// How much longer than its command a step with a hook may take: for its supervisor to end what did not end by
/// itself.
const HOOK_GRACE: Duration = Duration::from_secs(3);
/// How often to look whether the point that is being read still is one.
const POINT_CHECK_PAUSE: Duration = Duration::from_secs(5);

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
    /// Failures that are not in the log yet.
    unlogged: Vec<Failure>,
    frozen: Option<Frozen>,
    /// Watches what hooks hold, from before the first `pre_freeze` to after the last release.
    hook_guard: Option<HookGuard>,
    /// Held while hooks are released, so that `hestner-agent thaw` is not at it at the same time.
    releasing: Option<Lock>,
    point: Option<Point>,
    stored: Option<Stored>,
    key: Option<RepositoryKey>,
    archived_anything: bool,
    /// False: recovery has something left to do.
    settled: bool,
    /// Whether something may still be held or frozen: a container that Docker did not let go, a freeze that is
    /// stuck.
    may_still_hold: bool,
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
            unlogged: Vec::new(),
            frozen: None,
            hook_guard: None,
            releasing: None,
            point: None,
            stored: None,
            key: None,
            archived_anything: false,
            settled: true,
            may_still_hold: false,
        }
    }

    /// Runs to the end. `cancelled` gives the reason to stop, if there is one.
    pub(super) async fn run(mut self, cancelled: impl Future<Output = Failure>) -> Left {
        let span = if self.plan.point.spans_archive() { Span::Archive } else { Span::Point };
        let mut machine = Machine::new(self.plan.service.hooks.len(), span);
        let mut event = machine::Event::Begin;
        failpoint::at("planned");
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
                        // What failed before is why the run fails; what the cancelled action stumbles over from
                        // here on is only a consequence.
                        reason = Some((why, machine.has_failed()));
                        if machine.take(machine::Event::Cancelled) == Ok(Action::Stop) {
                            stop.cancel();
                        }
                    }
                }
            };
        }
        if let Some((reason, had_failed)) = reason
            && !had_failed
        {
            self.failure = Some(reason);
        }
        if self.failure.is_some() && self.stored.take().is_some() {
            // It failed after the archive, with nobody left to remove what that stored.
            self.settled &=
                super::settle::forget(self.host, &self.plan.location, &self.record.run_uid, self.alive).await;
        }
        self.leave()
    }

    fn leave(mut self) -> Left {
        let now = self.clock.now_ms();
        self.record.log_tail = self.tail.text();
        self.record.warnings.extend(self.folder.remarks());
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
        // A log may lie on what is frozen: whoever writes there waits for a thaw that he has to order himself.
        if self.frozen.is_none() {
            log_failure(&failure);
        } else {
            self.unlogged.push(failure.clone());
        }
        self.failure.get_or_insert(failure);
    }

    /// The window is over: what happened in it can be told.
    fn log_what_waited(&mut self) {
        self.unlogged.drain(..).for_each(|failure| log_failure(&failure));
    }

    fn enter(&mut self, phase: Phase) {
        self.record.phase = Some(phase);
        // Never waited for: a daemon that does not read must not keep a service from being released.
        let _ = self.says.try_send(Event::Progress { phase, progress: Progress::default() });
    }

    async fn perform(&mut self, action: Action, stop: &CancellationToken, failed: bool) -> machine::Event {
        use machine::Event as E;
        match action {
            Action::Prepare(i) => self.prepare(i, stop).await,
            Action::TakePoint => self.take_point(stop).await,
            Action::Release(i) => self.release(i, &self.plan.service.hooks[i].post_thaw, "post_thaw").await,
            Action::Recover(i) => {
                let hook = &self.plan.service.hooks[i];
                let (argv, name) = match hook.freeze_failed.is_empty() {
                    true => (&hook.post_thaw, "post_thaw"),
                    false => (&hook.freeze_failed, "freeze_failed"),
                };
                self.release(i, argv, name).await
            }
            Action::Thaw => self.thaw().await,
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
        self.enter(Phase::PreFreeze);
        let hook = &self.plan.service.hooks[i];
        let unclaimed = match self.watch_hook(hook).await {
            Err(error) => Some(point_failure(&error)),
            Ok(()) => match self.folder.claim_begin(i) {
                Ok(true) => None,
                Ok(false) => {
                    Some(Failure::new(ErrorClass::Interrupted, format!("hook `{}` was begun before", hook.name)))
                }
                Err(error) => Some(super::runner::state_failure(&error)),
            },
        };
        if let Some(failure) = unclaimed {
            self.fail(failure);
            return machine::Event::HookNotBegun;
        }
        let Some(lock) = self.lock_to_begin(i) else {
            let message = format!("hook `{}` was released before it had begun", hook.name);
            self.fail(Failure::new(ErrorClass::FreezeTimeout, message));
            return machine::Event::HookFailed;
        };
        let (called, struck) = self.call_unless_struck(hook, lock, &stop.child_token()).await;
        match struck {
            None => called.event(),
            Some(error) => {
                self.fail_thaw(point_failure(&error.into()));
                machine::Event::HookFailed
            }
        }
    }

    /// What was struck is being released: a `pre_freeze` that ended well after its release would hold for good.
    async fn call_unless_struck(
        &mut self,
        hook: &HookSettings,
        lock: Lock,
        stop: &CancellationToken,
    ) -> (Called, Option<GuardError>) {
        let struck = until_struck(self.hook_guard.as_ref());
        let calling = self.call(hook, &hook.pre_freeze, ("pre_freeze", Some(lock)), stop);
        tokio::pin!(calling);
        tokio::select! {
            called = &mut calling => (called, None),
            why = struck => {
                stop.cancel();
                (calling.await, Some(why))
            }
        }
    }

    /// The lock of a hook that was claimed, if it may still begin: a runner that stood still between claim and begin
    /// finds that it was released meanwhile.
    fn lock_to_begin(&self, i: usize) -> Option<Lock> {
        let lock = self.folder.lock_begun(i).ok().flatten()?;
        let is_struck = self.hook_guard.as_ref().is_some_and(HookGuard::has_struck);
        (!is_struck && !self.folder.was_released(i)).then_some(lock)
    }

    /// Nothing is held by a hook without a guard.
    async fn watch_hook(&mut self, hook: &HookSettings) -> Result<(), PointError> {
        let limit = hook.timeout + HOOK_GRACE;
        match &self.hook_guard {
            Some(guard) => guard.step(limit)?,
            None if self.plan.service.quiesces() => {
                let (uid, folder) = (&self.record.run_uid, self.folder.path());
                self.hook_guard = Some(HookGuard::arm(uid, folder, &self.host.guard, limit).await?);
            }
            None => {}
        }
        Ok(())
    }

    /// Another step of what hooks hold begins. False: the guard has struck, which keeps nothing from being released.
    fn step(&mut self, limit: Duration) -> bool {
        let Some(error) = self.hook_guard.as_ref().and_then(|guard| guard.step(limit).err()) else { return true };
        self.fail(point_failure(&error.into()));
        self.hook_guard = None;
        false
    }

    /// Hooks hold nothing any more.
    ///
    /// # Errors
    /// When the guard does not confirm that they have held it for as long as they may, and not longer.
    async fn end_hook_guard(&mut self) -> Result<(), Failure> {
        match self.hook_guard.take() {
            Some(guard) => guard.end().await.map_err(|error| point_failure(&error.into())),
            None => Ok(()),
        }
    }

    async fn release(&mut self, i: usize, argv: &[String], name: &str) -> machine::Event {
        self.enter(Phase::PostThaw);
        let is_in_time = self.step(self.plan.service.hooks[i].timeout + HOOK_GRACE);
        if self.releasing.is_none() {
            // Its error is no reason not to release; the claims still keep two from the same hook.
            self.releasing = thaw::lock_thawing(self.folder).await.unwrap_or_default();
        }
        match self.folder.claim_release(i) {
            Ok(true) => {}
            // `hestner-agent thaw` was faster, because the guard had struck; or it died inside the hook.
            Ok(false) if self.releasing.is_some() && self.folder.owes_release(i) => {}
            Ok(false) => {
                self.settled &= !self.folder.owes_release(i);
                // Nobody does that to a run that goes as it should.
                let message = format!("hook `{}` was released by somebody else", self.plan.service.hooks[i].name);
                self.fail(Failure::new(ErrorClass::FreezeTimeout, message));
                return machine::Event::HookFailed;
            }
            // A claim that cannot be written must not keep a service from being released.
            Err(error) => tracing::warn!(event = "release_not_claimed", error = %error),
        }
        let called = self.call(&self.plan.service.hooks[i], argv, (name, None), &CancellationToken::new()).await;
        // One that did not run is owed, and one that cannot be noted counts as owed: recovery calls it once
        // more, and releases are idempotent by contract.
        let noted = called != Called::NotRun && self.folder.release_ended(i).is_ok();
        self.settled &= noted;
        if is_in_time { called.event() } else { machine::Event::HookFailed }
    }

    /// `lock`: is the supervisor's alone from here on, so that whoever gets it knows that the supervisor has ended the
    /// hook, or has died itself.
    async fn call(
        &mut self,
        hook: &HookSettings,
        argv: &[String],
        (name, lock): (&str, Option<Lock>),
        stop: &CancellationToken,
    ) -> Called {
        if argv.is_empty() {
            return Called::Succeeded;
        }
        let spec = HookNote::from(hook).spec(argv, &self.record.run_uid, &self.record.service);
        let inherit: Vec<&dyn AsFd> =
            std::iter::once(self.alive).chain(&lock).map(|lock| &**lock as &dyn AsFd).collect();
        let started = Waiting::start(&inherit);
        drop(inherit);
        drop(lock);
        let spare: Vec<Pid> = self.hook_guard.iter().filter_map(HookGuard::pid).collect();
        let ended = match started {
            Ok(supervisor) => supervisor.run(&spec, stop, &spare).await,
            Err(error) => Err(error),
        };
        let (called, failure) = match ended {
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

    /// From here to [`Self::thaw`] this process touches no file and writes no log: both may lie on what is
    /// frozen, and whoever waits for a frozen filesystem cannot order its thaw.
    async fn take_point(&mut self, stop: &CancellationToken) -> machine::Event {
        self.enter(Phase::Frozen);
        if let Err(error) = self.folder.mark_held() {
            self.fail(super::runner::state_failure(&error));
            return machine::Event::PointFailed;
        }
        let taken = self.hold_and_take(&stop.child_token()).await;
        failpoint::at("taken");
        match taken {
            Ok(()) => machine::Event::PointTaken,
            Err(error) => {
                self.note_doubt(&error);
                self.fail(point_failure(&error));
                machine::Event::PointFailed
            }
        }
    }

    /// When hooks have held the service for as long as they may, this ends as if it was called off.
    async fn hold_and_take(&mut self, stop: &CancellationToken) -> Result<(), PointError> {
        let arming = Arming {
            run_uid: &self.record.run_uid,
            folder: self.folder.path(),
            alive: &**self.alive,
            start: &self.host.guard,
            hook_guard: self.hook_guard.as_ref(),
            stop,
        };
        let frozen = &mut self.frozen;
        let taking = async {
            let held = frozen.insert(freeze::freeze(&self.plan.point, arming).await?);
            failpoint::at("frozen");
            held.take(&self.host.freeze, stop).await
        };
        let hooks_struck = until_struck(self.hook_guard.as_ref());
        tokio::pin!(taking);
        tokio::select! {
            taken = &mut taking => taken,
            why = hooks_struck => {
                stop.cancel();
                match taking.await {
                    // Another guard's word; it knows more.
                    Err(error @ PointError::Guard(_)) => Err(error),
                    // Only a consequence; what it leaves behind matters all the same.
                    taken => {
                        self.settled &= !taken.is_err_and(|error| error.leaves_doubt());
                        Err(why.into())
                    }
                }
            }
        }
    }

    async fn thaw(&mut self) -> machine::Event {
        let is_in_time = self.step(self.plan.point.let_go_within());
        // Without it nothing was held, or everything was let go at once as far as could be done.
        let Some(frozen) = self.frozen.take() else { return self.resume(machine::Event::Thawed).await };
        let thawed = frozen.thaw().await;
        failpoint::at("thawing");
        self.log_what_waited();
        self.enter(Phase::PostThaw);
        match thawed {
            Ok(point) => {
                self.record.freeze_ms =
                    point.frozen().map_or(0, |frozen| u64::try_from(frozen.as_millis()).unwrap_or(u64::MAX));
                self.record.consistency_achieved = point.consistency();
                self.record.warnings.extend(point.remarks());
                self.point = Some(point);
                self.let_go(if is_in_time { machine::Event::Thawed } else { machine::Event::ThawFailed })
            }
            Err(error) => {
                self.note_doubt(&error);
                self.fail_thaw(point_failure(&error));
                self.resume(machine::Event::ThawFailed).await
            }
        }
    }

    /// What a failed step of the point leaves to recovery: something that may still be made, or be frozen.
    fn note_doubt(&mut self, error: &PointError) {
        self.settled &= !error.leaves_doubt();
        self.may_still_hold |= error.is_stuck();
    }

    /// Once more, by the notes: a container may have stayed held where letting go broke off.
    async fn resume(&mut self, event: machine::Event) -> machine::Event {
        if let Err(error) = freeze::resume_held(self.folder.path(), &self.plan.point.intent()).await {
            self.may_still_hold = true;
            self.record.warnings.push(format!("{}; `hestner-agent thaw` tries it again", chain(&error)));
        }
        self.let_go(event)
    }

    fn let_go(&mut self, event: machine::Event) -> machine::Event {
        self.settled &= !self.may_still_hold && self.folder.mark_let_go().is_ok();
        event
    }

    /// The guard's word explains what happened before it: a command that was killed at the deadline failed
    /// because of the deadline.
    fn fail_thaw(&mut self, failure: Failure) {
        let guards = |failure: &Failure| {
            use ErrorClass as C;
            matches!(failure.class, C::FreezeTimeout | C::FreezeStuck | C::FreezeBusy | C::GuardLost)
        };
        if guards(&failure) && self.failure.as_ref().is_some_and(|earlier| !guards(earlier)) {
            self.failure = None;
        }
        self.fail(failure);
    }

    async fn archive(&mut self, stop: &CancellationToken) -> machine::Event {
        self.enter(Phase::Archive);
        self.releasing = None;
        if !self.plan.point.spans_archive()
            && let Err(failure) = self.end_hook_guard().await
        {
            self.fail(failure);
            return machine::Event::ArchiveFailed;
        }
        failpoint::at("archiving");
        self.archived_anything = true;
        match self.store(stop).await {
            Ok(stored) => {
                self.record.bytes_read = stored.bytes_read;
                self.record.bytes_stored = stored.bytes_stored;
                self.record.size_bytes = stored.bytes_read;
                self.record.files = stored.files;
                self.record.vanished = stored.vanished;
                self.record.repository_bytes = stored.repository_bytes;
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

    async fn store(&mut self, stop: &CancellationToken) -> Result<Stored, Failure> {
        let plan = self.plan;
        let producer = match plan.input {
            Input::Stream { .. } => {
                let guards = self.frozen.as_ref().map(Frozen::guards).unwrap_or_default();
                Some(Producer::new(&plan.service, self.host.run_time_max, guards)?)
            }
            Input::Files { .. } => None,
        };
        let job = Job {
            run_uid: self.record.run_uid.clone(),
            service: self.record.service.clone(),
            input: plan.input.clone(),
            how: plan.effort.how.clone(),
        };
        let binds = plan.point.binds().to_vec();
        let keep = self.host.own_folders();
        let work = Work::Store { job, binds, keep, recovery_recipient: self.host.recovery_recipient.clone() };
        let task = WorkerTask { location: plan.location.clone(), effort: plan.effort.clone(), work };
        if let Some(point) = &self.point {
            // Here, and not with the thaw: a mount or a command takes its time, and no hook waits for it.
            point.open(&self.host.freeze, stop).await.map_err(|e| point_failure(&e))?;
        }
        let worker = Worker::start(&self.host.fence, task, self.alive, producer.as_ref()).await?;
        let (says, key, record) = (&self.says, &mut self.key, &mut self.record);
        // What is held for the archive ends with its window, and the archive with it.
        let stop = &stop.child_token();
        let frozen = self.frozen.as_mut();
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
        let last = async {
            tokio::pin!(last);
            tokio::select! {
                last = &mut last => last,
                failure = no_point_any_more(frozen, self.point.as_ref(), &self.host.freeze) => {
                    stop.cancel();
                    let _ = last.await;
                    Err(failure)
                }
            }
        };
        let last = last.await;
        let was_read = last.as_ref().map_or_else(|failure| failure.class == ErrorClass::SourceUnreadable, |_| true);
        // A snapshot is what it was; only a live tree can be replaced while it is read. One that is gone is also why
        // it could not be read.
        if let (Some(paths), true) = (&plan.paths, plan.point.is_live() && was_read) {
            paths.look_again().map_err(|e| Failure::of(ErrorClass::SourceMissing, &e))?;
        }
        let WorkerEvent::Stored(stored) = last? else {
            return Err(Failure::new(
                ErrorClass::WorkerKilled,
                "the worker ended with another result than was asked for",
            ));
        };
        if let Some(point) = &self.point {
            point.check(&self.host.freeze).await.map_err(|e| point_failure(&e))?;
        }
        Ok(stored)
    }

    /// Removes the point, and whatever a failed run may have left in the repository. False: recovery has to.
    async fn remove_what_was_made(&mut self, failed: bool) -> bool {
        self.releasing = None;
        if let Err(failure) = self.end_hook_guard().await {
            self.fail(failure);
        }
        let removed = match self.point.take() {
            Some(point) => point.remove(&self.host.freeze).await,
            // A point that failed half-way may have left something.
            None => freeze::remove_made(&self.plan.point.intent(), &self.host.freeze).await,
        };
        if let Err(error) = &removed {
            self.record.warnings.push(format!("{}; it is tried again at the next start", chain(error)));
        }
        let mut clean = removed.is_ok();
        if failed && self.archived_anything {
            clean &= super::settle::forget(self.host, &self.plan.location, &self.record.run_uid, self.alive).await;
        }
        clean
    }
}

/// Completes when a guard of hooks has struck; never without one.
fn until_struck(guard: Option<&HookGuard>) -> impl Future<Output = GuardError> + use<> {
    let struck = guard.map(HookGuard::struck);
    async move {
        match struck {
            Some(struck) => struck.await,
            None => std::future::pending().await,
        }
    }
}

/// Completes when what the archive reads is no point in time any more.
async fn no_point_any_more(frozen: Option<&mut Frozen>, point: Option<&Point>, settings: &freeze::Settings) -> Failure {
    let struck = async {
        match frozen {
            Some(frozen) => frozen.struck().await,
            None => std::future::pending().await,
        }
    };
    let spoilt = async {
        let Some(point) = point else { return std::future::pending().await };
        loop {
            tokio::time::sleep(POINT_CHECK_PAUSE).await;
            if let Err(error) = point.check(settings).await {
                return error;
            }
        }
    };
    tokio::select! {
        () = struck => Failure::new(
            ErrorClass::FreezeTimeout,
            "the service was held for as long as it may be, and was let go while it was being read",
        ),
        error = spoilt => point_failure(&error),
    }
}

fn log_failure(failure: &Failure) {
    tracing::warn!(event = "run_step_failed", error_class = %failure.class, error = failure.message);
}

/// Completes when the run has taken as long as it may.
pub(super) async fn time_is_over(run_time_max: Duration) -> Failure {
    tokio::time::sleep(run_time_max).await;
    Failure::new(ErrorClass::RunTimeout, format!("the run took longer than {} s", run_time_max.as_secs()))
}
