//! The run as a pure state machine: `(state, event) -> (state, action)`.
//!
//! No I/O and no clock; the driver performs the one action that is returned and comes back with what
//! became of it. What the machine keeps, whatever happens: a `pre_freeze` that failed means that no point
//! is taken and nothing archived; whatever is held or frozen for the point is thawed exactly once, before
//! any hook is released, and nothing is archived after a thaw that was not confirmed; every hook whose
//! `pre_freeze` was begun is released exactly once, in reverse order; a point that was taken is removed; a
//! run with any failure ends as failed.

use std::fmt;

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// Nothing was done yet.
    Planned,
    /// The `pre_freeze` of this hook runs.
    Preparing(usize),
    /// All hooks have prepared; containers are being held, filesystems frozen, and the point is taken.
    Frozen,
    /// Filesystems are being thawed, containers let go.
    Thawing,
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
    /// Nothing is held any more, and the guard has confirmed that everything was until now.
    Thawed,
    /// Nothing is held any more as far as can be done now, and the point does not count.
    ThawFailed,
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
    /// Hold, freeze and take the point.
    TakePoint,
    /// Thaw and let go; also what was only begun to be held.
    Thaw,
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
    span: Span,
    failed: bool,
    point_taken: bool,
}

/// How long the service is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Span {
    /// Until the point was taken; the archive reads the point.
    Point,
    /// Until everything was read: there is no point apart from the held tree itself.
    Archive,
}

impl Machine {
    /// A run with so many hooks.
    pub fn new(hooks: usize, span: Span) -> Self {
        Self { state: State::Planned, hooks, span, failed: false, point_taken: false }
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
            // What was begun to be held or frozen is let go in any case.
            (State::Frozen, Event::PointFailed) => self.fail_then(Self::thaw),
            (State::Thawing, Event::Thawed) if self.point_taken => self.release_below(self.hooks),
            (State::Thawing, Event::Thawed) => self.recover_below(self.hooks),
            // A point that the guard does not confirm was not reached.
            (State::Thawing, Event::ThawFailed) => self.fail_then(|m| m.recover_below(m.hooks)),
            (State::Releasing(i), Event::HookSucceeded) => self.release_below(i),
            (State::Releasing(i), Event::HookFailed) => self.fail_then(|m| m.release_below(i)),
            (State::Recovering(i), Event::HookSucceeded | Event::HookFailed) => self.recover_below(i),
            (State::Archiving, Event::Archived) => self.archived(),
            (State::Archiving, Event::ArchiveFailed) => self.fail_then(Self::archived),
            (State::Removing, Event::PointRemoved) => self.end(),
            // Preparing and archiving can be stopped; a release has to run to its end.
            (State::Preparing(_) | State::Frozen | State::Archiving, Event::Cancelled) => {
                self.fail_then(|m| (m.state, Action::Stop))
            }
            (State::Thawing | State::Releasing(_) | State::Recovering(_) | State::Removing, Event::Cancelled) => {
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
        match self.span {
            // A run that was cancelled meanwhile keeps nobody waiting for an archive.
            Span::Archive if !self.failed => (State::Archiving, Action::Archive),
            _ => self.thaw(),
        }
    }

    fn thaw(&mut self) -> (State, Action) {
        (State::Thawing, Action::Thaw)
    }

    fn archived(&mut self) -> (State, Action) {
        match self.span {
            Span::Archive => self.thaw(),
            Span::Point => self.remove_point(),
        }
    }

    fn release_below(&mut self, hook: usize) -> (State, Action) {
        match hook.checked_sub(1) {
            Some(next) => (State::Releasing(next), Action::Release(next)),
            None if self.failed || self.span == Span::Archive => self.remove_point(),
            None => (State::Archiving, Action::Archive),
        }
    }

    fn recover(hook: usize) -> (State, Action) {
        (State::Recovering(hook), Action::Recover(hook))
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
            Self::Thawing => "thawing",
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
    use std::collections::{BTreeMap, BTreeSet, VecDeque};
    use std::fmt::Write as _;

    const EVENTS: &[Event] = &[
        Event::Begin,
        Event::HookSucceeded,
        Event::HookFailed,
        Event::HookNotBegun,
        Event::PointTaken,
        Event::PointFailed,
        Event::Thawed,
        Event::ThawFailed,
        Event::Archived,
        Event::ArchiveFailed,
        Event::PointRemoved,
        Event::Cancelled,
    ];
    const SPANS: [Span; 2] = [Span::Point, Span::Archive];

    #[derive(Clone)]
    struct Path {
        machine: Machine,
        actions: Vec<Action>,
        begun: Vec<usize>,
        released: Vec<usize>,
        removed: bool,
        cancels: usize,
        any_failure: bool,
        thaw_failed: bool,
    }

    impl Path {
        fn count(&self, action: Action) -> usize {
            self.actions.iter().filter(|a| **a == action).count()
        }

        fn first(&self, wanted: impl Fn(&Action) -> bool) -> Option<usize> {
            self.actions.iter().position(wanted)
        }

        fn archived(&self) -> bool {
            self.count(Action::Archive) > 0
        }
    }

    /// A step of a path: from, event, action, to.
    type Step = (State, Event, Action, State);

    /// Every path through the machine with `hooks` hooks and at most one cancellation, to its end.
    fn every_path(hooks: usize, span: Span, mut at_end: impl FnMut(&Path), mut at_step: impl FnMut(Step)) {
        let start = Path {
            machine: Machine::new(hooks, span),
            actions: vec![],
            begun: vec![],
            released: vec![],
            removed: false,
            cancels: 0,
            any_failure: false,
            thaw_failed: false,
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
                at_step((before, event, action, next.machine.state()));
                next.cancels += usize::from(event == Event::Cancelled);
                if event == Event::HookNotBegun {
                    next.begun.pop();
                }
                let failure = matches!(
                    event,
                    Event::HookFailed
                        | Event::HookNotBegun
                        | Event::PointFailed
                        | Event::ThawFailed
                        | Event::ArchiveFailed
                        | Event::Cancelled
                );
                next.any_failure |= failure && !matches!((before, event), (State::Recovering(_), Event::HookFailed));
                next.thaw_failed |= event == Event::ThawFailed;
                next.actions.push(action);
                match action {
                    Action::Prepare(i) => next.begun.push(i),
                    Action::Release(i) | Action::Recover(i) => next.released.push(i),
                    Action::RemovePoint => next.removed = true,
                    _ => {}
                }
                queue.push_back(next);
            }
        }
    }

    #[test]
    fn every_begun_hook_is_released_exactly_once_in_reverse_order_on_every_path() {
        for (hooks, span) in (0..4).flat_map(|hooks| SPANS.map(|span| (hooks, span))) {
            every_path(
                hooks,
                span,
                |path| {
                    let mut expected = path.begun.clone();
                    expected.reverse();
                    assert_eq!(path.released, expected);
                },
                |_| {},
            );
        }
    }

    #[test]
    fn whatever_is_frozen_is_thawed_exactly_once_and_before_any_hook_is_released() {
        for (hooks, span) in (0..3).flat_map(|hooks| SPANS.map(|span| (hooks, span))) {
            every_path(
                hooks,
                span,
                |path| {
                    assert_eq!(path.count(Action::Thaw), path.count(Action::TakePoint), "{:?}", path.actions);
                    let thawed = path.first(|a| *a == Action::Thaw);
                    let released = path.first(|a| matches!(a, Action::Release(_) | Action::Recover(_)));
                    assert!(thawed.is_none() || released.is_none() || thawed < released, "{:?}", path.actions);
                    let frozen = path.first(|a| *a == Action::TakePoint);
                    assert!(frozen.is_none() || frozen < thawed, "{:?}", path.actions);
                },
                |_| {},
            );
        }
    }

    #[test]
    fn nothing_is_archived_after_a_thaw_that_was_not_confirmed() {
        for span in SPANS {
            every_path(
                2,
                span,
                |path| {
                    let (thaw, archive) = (path.first(|a| *a == Action::Thaw), path.first(|a| *a == Action::Archive));
                    if path.thaw_failed {
                        assert!(archive.is_none() || archive < thaw, "{:?}", path.actions);
                        assert!(path.machine.has_failed());
                        let late = path.first(|a| matches!(a, Action::Release(_)));
                        assert_eq!(late, None, "the point was not reached: {:?}", path.actions);
                    }
                },
                |_| {},
            );
        }
    }

    #[test]
    fn run_with_any_failure_never_ends_well_and_one_without_always_does() {
        for span in SPANS {
            every_path(2, span, |path| assert_eq!(path.machine.has_failed(), path.any_failure), |_| {});
        }
    }

    #[test]
    fn nothing_is_archived_unless_every_hook_had_prepared_and_released() {
        let check = |path: &Path| {
            if path.archived() {
                assert_eq!((path.begun.len(), path.released.len()), (2, 2));
                assert_eq!(path.count(Action::Archive), 1);
            }
            assert!(path.removed || path.begun.is_empty());
        };
        every_path(2, Span::Archive, check, |_| {});
        let in_order = |path: &Path| {
            check(path);
            let (last_release, archive) = (
                path.actions.iter().rposition(|a| matches!(a, Action::Release(_))),
                path.first(|a| *a == Action::Archive),
            );
            assert!(archive.is_none() || last_release < archive, "{:?}", path.actions);
        };
        every_path(2, Span::Point, in_order, |_| {});
    }

    /// What the states do without their numbers: `preparing(1)` is `preparing`.
    fn action_name(action: Action) -> &'static str {
        match action {
            Action::Prepare(_) => "`pre_freeze` of the next hook",
            Action::TakePoint => "hold, freeze, take the point",
            Action::Thaw => "thaw and let go",
            Action::Release(_) => "`post_thaw` of the hook before",
            Action::Recover(_) => "`freeze_failed` (or `post_thaw`) of the hook, or of the one before",
            Action::Archive => "archive and read back",
            Action::RemovePoint => "remove what was made",
            Action::Stop => "end what goes on",
            Action::Wait => "nothing: what goes on runs to its end",
            Action::Finish => "nothing more",
        }
    }

    fn page() -> String {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/run-states.md");
        std::fs::read_to_string(path).unwrap_or_default()
    }

    /// Puts the drawn block into the page when it is asked for, and compares.
    fn compare_with_the_page(what: &str, block: &str) {
        let (begin, end) = (format!("<!-- {what} -->\n"), format!("<!-- end of {what} -->"));
        let page = page();
        let (before, rest) = page.split_once(&begin).unwrap_or_else(|| panic!("docs/run-states.md has no `{begin}`"));
        let (held, after) = rest.split_once(&end).unwrap_or_else(|| panic!("docs/run-states.md has no `{end}`"));
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/run-states.md");
            let text = format!("{before}{begin}{block}{end}{after}");
            crate::platform::files::write(std::path::Path::new(path), text.as_bytes(), 0o644).unwrap();
            return;
        }
        assert_eq!(held, block, "docs/run-states.md: run with UPDATE_GOLDEN=1");
    }

    /// One page, so one test writes it: two would overwrite each other's work.
    #[test]
    fn picture_and_table_in_the_docs_are_the_machine() {
        let mut edges = BTreeSet::new();
        let mut rows = BTreeMap::new();
        for span in SPANS {
            every_path(
                2,
                span,
                |_| {},
                |(from, event, action, to)| {
                    edges.insert((from.to_string(), format!("{event:?}"), to.to_string()));
                    let row = (from.to_string(), format!("{event:?}"), to.to_string(), action_name(action));
                    let spans: &mut BTreeSet<_> = rows.entry(row).or_default();
                    spans.insert(if span == Span::Point { "the point" } else { "the archive" });
                },
            );
        }
        let mut picture = String::from("```mermaid\nstateDiagram-v2\n    [*] --> planned\n");
        for (from, event, to) in &edges {
            writeln!(picture, "    {from} --> {to}: {event}").unwrap();
        }
        picture.push_str("    ended --> [*]\n```\n");
        let mut table = String::from(
            "| state | event | then | what is done | where the service is held for |\n| --- | --- | --- | --- | --- |\n",
        );
        for ((from, event, to, action), spans) in rows {
            let spans: Vec<_> = spans.into_iter().rev().collect();
            writeln!(table, "| {from} | {event} | {to} | {action} | {} |", spans.join(", ")).unwrap();
        }
        compare_with_the_page("transitions", &table);
        compare_with_the_page("picture", &picture);
    }
}
