//! The run as a pure state machine: `(state, event) -> (state, action)`.
//!
//! No I/O and no clock; the driver performs the one action that is returned and comes back with what
//! became of it. What the machine keeps, whatever happens: a `pre_freeze` that failed means that no point
//! is taken and nothing archived; every hook whose `pre_freeze` was begun is released exactly once, in
//! reverse order; a point that was taken is removed; a run with any failure ends as failed.

use std::fmt;

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// Nothing was done yet.
    Planned,
    /// The `pre_freeze` of this hook runs.
    Preparing(usize),
    /// All hooks have prepared; the point is being taken.
    Frozen,
    /// The `post_thaw` of this hook runs.
    Releasing(usize),
    /// The `freeze_failed` of this hook runs.
    Recovering(usize),
    /// Bytes are read and stored.
    Archiving,
    /// What was made for the point is being removed.
    Removing,
    /// Nothing is left to do.
    Ended,
}

/// What became of an action, or what came from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Begin.
    Begin,
    /// The hook that was running ended with 0.
    HookSucceeded,
    /// It ended otherwise.
    HookFailed,
    /// It was not begun at all: its claim could not be written.
    HookNotBegun,
    /// The point was taken.
    PointTaken,
    /// It was not.
    PointFailed,
    /// Everything was read, stored and read back.
    Archived,
    /// It was not.
    ArchiveFailed,
    /// What was made for the point is gone (or noted for recovery).
    PointRemoved,
    /// Somebody cancelled the run, or its time is over.
    Cancelled,
}

/// What the driver has to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Run the `pre_freeze` of a hook.
    Prepare(usize),
    /// Take the point.
    TakePoint,
    /// Run the `post_thaw` of a hook.
    Release(usize),
    /// Run the `freeze_failed` of a hook, or its `post_thaw` if it has none.
    Recover(usize),
    /// Archive and read back.
    Archive,
    /// Remove what was made for the point.
    RemovePoint,
    /// End what is going on; its own event still comes.
    Stop,
    /// Keep waiting for what is going on.
    Wait,
    /// The run has ended.
    Finish,
}

/// An event that cannot happen in a state: a mistake of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the run cannot take {event:?} while it is {state}")]
pub struct Illegal {
    state: State,
    event: Event,
}

/// A run's state, with what it has to remember.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    state: State,
    hooks: usize,
    failed: bool,
    point_taken: bool,
}

impl Machine {
    /// A run with so many hooks.
    pub fn new(hooks: usize) -> Self {
        Self { state: State::Planned, hooks, failed: false, point_taken: false }
    }

    /// Where it stands.
    pub fn state(&self) -> State {
        self.state
    }

    /// Whether anything has failed.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    /// Takes an event.
    ///
    /// # Errors
    /// [`Illegal`] for an event that the state does not know; nothing is changed then.
    pub fn take(&mut self, event: Event) -> Result<Action, Illegal> {
        let illegal = Illegal { state: self.state, event };
        let (state, action) = match (self.state, event) {
            (State::Planned, Event::Begin) => self.prepare(0),
            (State::Planned, Event::Cancelled) => self.fail_then(Self::end),
            (State::Preparing(i), Event::HookSucceeded) if self.failed => Self::recover(i),
            (State::Preparing(i), Event::HookSucceeded) => self.prepare(i + 1),
            (State::Preparing(i), Event::HookFailed) => self.fail_then(|_| Self::recover(i)),
            (State::Preparing(i), Event::HookNotBegun) => self.fail_then(|m| m.recover_below(i)),
            (State::Frozen, Event::PointTaken) => self.point_taken(),
            (State::Frozen, Event::PointFailed) => self.fail_then(Self::recover_last),
            (State::Releasing(i), Event::HookSucceeded) => self.release_below(i),
            (State::Releasing(i), Event::HookFailed) => self.fail_then(|m| m.release_below(i)),
            (State::Recovering(i), Event::HookSucceeded | Event::HookFailed) => self.recover_below(i),
            (State::Archiving, Event::Archived) => self.remove_point(),
            (State::Archiving, Event::ArchiveFailed) => self.fail_then(Self::remove_point),
            (State::Removing, Event::PointRemoved) => self.end(),
            // Preparing and archiving can be stopped; a release has to run to its end.
            (State::Preparing(_) | State::Frozen | State::Archiving, Event::Cancelled) => {
                self.fail_then(|m| (m.state, Action::Stop))
            }
            (State::Releasing(_) | State::Recovering(_) | State::Removing, Event::Cancelled) => {
                self.fail_then(|m| (m.state, Action::Wait))
            }
            _ => return Err(illegal),
        };
        self.state = state;
        Ok(action)
    }

    fn fail_then(&mut self, next: impl FnOnce(&mut Self) -> (State, Action)) -> (State, Action) {
        self.failed = true;
        next(self)
    }

    fn prepare(&mut self, hook: usize) -> (State, Action) {
        if hook < self.hooks {
            (State::Preparing(hook), Action::Prepare(hook))
        } else {
            (State::Frozen, Action::TakePoint)
        }
    }

    fn point_taken(&mut self) -> (State, Action) {
        self.point_taken = true;
        self.release_below(self.hooks)
    }

    fn release_below(&mut self, hook: usize) -> (State, Action) {
        match hook.checked_sub(1) {
            Some(next) => (State::Releasing(next), Action::Release(next)),
            None if self.failed => self.remove_point(),
            None => (State::Archiving, Action::Archive),
        }
    }

    fn recover(hook: usize) -> (State, Action) {
        (State::Recovering(hook), Action::Recover(hook))
    }

    fn recover_last(&mut self) -> (State, Action) {
        self.recover_below(self.hooks)
    }

    fn recover_below(&mut self, hook: usize) -> (State, Action) {
        match hook.checked_sub(1) {
            Some(next) => Self::recover(next),
            // A point that failed half-way may have left something.
            None => self.remove_point(),
        }
    }

    fn remove_point(&mut self) -> (State, Action) {
        (State::Removing, Action::RemovePoint)
    }

    fn end(&mut self) -> (State, Action) {
        (State::Ended, Action::Finish)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Planned => "planned",
            Self::Preparing(_) => "preparing",
            Self::Frozen => "frozen",
            Self::Releasing(_) => "releasing",
            Self::Recovering(_) => "recovering",
            Self::Archiving => "archiving",
            Self::Removing => "removing",
            Self::Ended => "ended",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeSet, VecDeque};
    use std::fmt::Write as _;

    const EVENTS: &[Event] = &[
        Event::Begin,
        Event::HookSucceeded,
        Event::HookFailed,
        Event::HookNotBegun,
        Event::PointTaken,
        Event::PointFailed,
        Event::Archived,
        Event::ArchiveFailed,
        Event::PointRemoved,
        Event::Cancelled,
    ];

    #[derive(Clone)]
    struct Path {
        machine: Machine,
        begun: Vec<usize>,
        released: Vec<usize>,
        archived: bool,
        removed: bool,
        cancels: usize,
        any_failure: bool,
    }

    /// Every path through the machine with `hooks` hooks and at most one cancellation, to its end.
    fn every_path(hooks: usize, mut at_end: impl FnMut(&Path), mut at_step: impl FnMut(State, Event, State)) {
        let start = Path {
            machine: Machine::new(hooks),
            begun: vec![],
            released: vec![],
            archived: false,
            removed: false,
            cancels: 0,
            any_failure: false,
        };
        let mut queue = VecDeque::from([start]);
        while let Some(path) = queue.pop_front() {
            if path.machine.state() == State::Ended {
                at_end(&path);
                continue;
            }
            for event in EVENTS.iter().copied().filter(|e| *e != Event::Cancelled || path.cancels == 0) {
                let mut next = path.clone();
                let before = next.machine.state();
                let Ok(action) = next.machine.take(event) else { continue };
                at_step(before, event, next.machine.state());
                next.cancels += usize::from(event == Event::Cancelled);
                if event == Event::HookNotBegun {
                    next.begun.pop();
                }
                let failure = matches!(
                    event,
                    Event::HookFailed
                        | Event::HookNotBegun
                        | Event::PointFailed
                        | Event::ArchiveFailed
                        | Event::Cancelled
                );
                next.any_failure |= failure && !matches!((before, event), (State::Recovering(_), Event::HookFailed));
                match action {
                    Action::Prepare(i) => next.begun.push(i),
                    Action::Release(i) | Action::Recover(i) => next.released.push(i),
                    Action::Archive => next.archived = true,
                    Action::RemovePoint => next.removed = true,
                    _ => {}
                }
                queue.push_back(next);
            }
        }
    }

    #[test]
    fn every_begun_hook_is_released_exactly_once_in_reverse_order_on_every_path() {
        for hooks in 0..4 {
            every_path(
                hooks,
                |path| {
                    let mut expected = path.begun.clone();
                    expected.reverse();
                    assert_eq!(path.released, expected);
                },
                |_, _, _| {},
            );
        }
    }

    #[test]
    fn run_with_any_failure_never_ends_well_and_one_without_always_does() {
        every_path(2, |path| assert_eq!(path.machine.has_failed(), path.any_failure), |_, _, _| {});
    }

    #[test]
    fn nothing_is_archived_unless_every_hook_had_prepared_and_released() {
        every_path(
            2,
            |path| {
                if path.archived {
                    assert_eq!((path.begun.len(), path.released.len()), (2, 2));
                }
                assert!(path.removed || path.begun.is_empty());
            },
            |_, _, _| {},
        );
    }

    /// The picture in the docs is drawn from the machine itself.
    #[test]
    fn picture_in_the_docs_is_the_machine() {
        let mut edges = BTreeSet::new();
        every_path(
            2,
            |_| {},
            |from, event, to| {
                edges.insert((from.to_string(), format!("{event:?}"), to.to_string()));
            },
        );
        let mut picture = String::from("stateDiagram-v2\n    [*] --> planned\n");
        for (from, event, to) in &edges {
            writeln!(picture, "    {from} --> {to}: {event}").unwrap();
        }
        picture.push_str("    ended --> [*]\n");
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/run-states.md");
        let page = std::fs::read_to_string(path).unwrap_or_default();
        assert!(page.contains(&picture), "docs/run-states.md must hold this picture:\n{picture}");
    }
}
