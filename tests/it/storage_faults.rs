//! The storage fails, the worker dies or nothing is answered at the first, the second, the third ... call of a run: each
//! time there is no snapshot of it, the repository is sound, and the next run succeeds by itself and uses what was
//! stored.

use std::path::PathBuf;

use hestner_tests::{Agent, Archiver, Cmd, Moment, Run, Service, World, files, processes};
use nix::sys::signal::Signal;

/// What each run has to store anew, in bytes that do not compress.
const NEW_BYTES: usize = 300_000;
/// A run does not call its storage so often.
const CALLS_MAX: usize = 60;

/// An agent with a repository that holds one good run.
struct Stand {
    agent: Agent,
    archiver: Archiver,
    source: PathBuf,
    /// As the repository was then: each case begins with it, so that each run calls the storage as often as the others.
    kept: PathBuf,
    good: Run,
}

impl Stand {
    fn new(world: &World, name: &str) -> Self {
        let source = world.source(&format!("{name}-source"));
        let agent = world.agent_named(name).allowed(Service::files("docs", [&source])).started();
        let (archiver, good, kept) = (agent.archiver(), agent.snapshot_ok("docs"), world.at(&format!("{name}-kept")));
        let stand = Self { agent, archiver, source, kept, good };
        Cmd::new("cp").arg("-a").arg(stand.repository()).arg(&stand.kept).ok();
        stand
    }

    fn repository(&self) -> PathBuf {
        self.agent.repository_path("local")
    }

    /// The repository as it was, and something new to store.
    fn begin(&self) {
        std::fs::remove_dir_all(self.repository()).expect("the repository");
        Cmd::new("cp").arg("-a").arg(&self.kept).arg(self.repository()).ok();
        files::write(self.source.join("changing.bin"), files::random_bytes(NEW_BYTES));
        self.archiver.forget_notes();
    }

    /// What lies in a folder of the repository.
    fn names(&self, folder: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.repository().join(folder)).expect("a folder of the repository").flatten();
        let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// Whether the pack with what is new is there; all others are smaller.
    fn has_new_data(&self) -> bool {
        let folders = std::fs::read_dir(self.repository().join("data")).expect("a folder of the repository").flatten();
        let mut packs = folders.filter_map(|folder| std::fs::read_dir(folder.path()).ok()).flatten().flatten();
        packs.any(|pack| pack.metadata().is_ok_and(|metadata| metadata.len() >= NEW_BYTES as u64))
    }

    /// The snapshots of these runs are there and nothing else is.
    fn assert_holds(&self, runs: &[&Run], what: &str) {
        let mut wanted: Vec<String> = runs.iter().map(|run| run.snapshot_id()).collect();
        wanted.sort();
        assert_eq!(self.names("snapshots"), wanted, "{what}");
        assert_eq!(self.names("locks"), Vec::<String>::new(), "{what}");
    }

    /// After a run that failed: nothing of it is there, and the next one needs nobody, uses what was stored and is known,
    /// and leaves a sound repository. Gives whether there was something to use.
    fn assert_goes_on(&self, what: &str) -> bool {
        self.assert_holds(&[&self.good], what);
        // An index says what lies in packs that were put before it.
        let is_known = self.names("index").len() > 1 && self.has_new_data();
        let next = self.agent.snapshot_ok("docs");
        if is_known {
            assert!(next.number("bytes_stored") < NEW_BYTES as u64 / 2, "{what}: what was stored is used: {next:?}");
        }
        self.assert_whole(&[&self.good, &next], what);
        is_known
    }

    fn assert_whole(&self, runs: &[&Run], what: &str) {
        self.assert_holds(runs, what);
        // Whatever the failed run had left would be found now as well: nothing but its snapshot is ever removed.
        let check = self.agent.repository("local").check();
        assert_eq!(check.code, Some(0), "{what}: {check}");
    }
}

/// Has the fault at every call of a run, until a run does not call so often.
fn fault_at_every_call(name: &str, fault: impl Fn(&Archiver, Moment)) {
    let world = World::new(name);
    let stand = Stand::new(&world, "agent");
    let (mut failed, mut used) = (0, 0);
    for number in 1.. {
        stand.begin();
        assert!(number < CALLS_MAX, "a run calls its storage so often");
        fault(&stand.archiver, Moment::Call(number));
        let run = stand.agent.snapshot("docs");
        let reached = stand.archiver.was_reached(Moment::Call(number));
        stand.archiver.go_on();
        let what = format!("call {number} of {:?}", stand.archiver.notes());
        if run.text("status") == "success" {
            stand.assert_whole(&[&stand.good, &run], &what);
        } else {
            assert!(reached, "it failed without a fault: {run:?}");
            assert!(!run.text("error_message").is_empty() && run.text("artifact_url").is_empty(), "{run:?}");
            failed += 1;
            used += usize::from(stand.assert_goes_on(&what));
        }
        if !reached {
            assert!(failed > 10 && used > 0, "{failed} of {number} runs failed, {used} left something to use: {what}");
            return;
        }
    }
}

#[test]
fn storage_that_fails_at_any_call_leaves_only_whole_snapshots() {
    fault_at_every_call("storage-fails", Archiver::fail_once_at);
}

#[test]
fn worker_that_is_killed_at_any_call_leaves_only_whole_snapshots() {
    fault_at_every_call("storage-killed", Archiver::kill_once_at);
}

/// Has the fault at each of the calls that make a new repository, and at the first ones of its first run.
fn fault_while_it_is_made(name: &str, fault: impl Fn(&Archiver, Moment)) {
    let world = World::new(name);
    let source = world.source("source");
    let places: Vec<(String, usize)> = (1..=8).map(|number| (format!("place-{number}"), number)).collect();
    let builder = places.iter().fold(world.agent(), |builder, (name, _)| {
        let service = Service::files(name, [&source]).destination(name);
        builder.destination(name, &world.at("places").join(name)).allowed(service)
    });
    let agent = builder.started();
    let archiver = agent.archiver();
    for (name, number) in &places {
        archiver.forget_notes();
        fault(&archiver, Moment::Call(*number));
        let run = agent.snapshot(name);
        assert!(archiver.was_reached(Moment::Call(*number)), "{name}: {run:?}");
        archiver.go_on();
        assert_eq!(run.text("status"), "failed", "{name} {:?}: {run:?}", archiver.notes());
        let good = agent.snapshot_ok(name);
        let repository = agent.repository(name);
        let held: Vec<String> = repository.snapshots().iter().map(|s| s["id"].as_str().unwrap_or("").into()).collect();
        assert_eq!(held, [good.snapshot_id()], "{name}");
        assert!(repository.locks().is_empty(), "{name}");
    }
}

#[test]
fn storage_that_fails_while_a_repository_is_made_hinders_no_later_run() {
    fault_while_it_is_made("storage-making-fails", Archiver::fail_once_at);
}

#[test]
fn worker_that_is_killed_while_it_makes_a_repository_hinders_no_later_run() {
    fault_while_it_is_made("storage-making-killed", Archiver::kill_once_at);
}

/// Lets a call of that kind never come back, until the run is called off.
fn hang_at(stand: &Stand, call: &str) {
    stand.begin();
    stand.agent.snapshot_ok("docs");
    let notes = stand.archiver.notes();
    let number = notes.iter().find_map(|note| {
        let (number, what) = note.strip_prefix("call-")?.split_once(' ')?;
        what.starts_with(call).then(|| number.parse::<usize>().expect("a number"))
    });
    let moment = Moment::Call(number.unwrap_or_else(|| panic!("no {call} in {notes:?}")));
    stand.begin();
    stand.archiver.hold_once_at(moment);
    let snapshot = stand.agent.snapshot_started("docs");
    stand.archiver.wait_reached(moment);
    processes::send(stand.agent.wait_part("runner").pid, Signal::SIGTERM);
    let run = snapshot.run();
    stand.archiver.go_on();
    run.assert_failed("interrupted");
    stand.assert_goes_on(call);
}

#[test]
fn storage_that_does_not_answer_ends_with_its_run_and_leaves_only_whole_snapshots() {
    let world = World::new("storage-hangs");
    // Side by side: a worker that hangs is given some seconds to end.
    let calls =
        ["get config", "list Index", "put locks/", "put data/", "put index/", "put snapshots/", "remove locks/"];
    let stands: Vec<_> = (0..calls.len()).map(|number| Stand::new(&world, &format!("agent-{number}"))).collect();
    std::thread::scope(|scope| {
        for (stand, call) in stands.iter().zip(calls) {
            scope.spawn(move || hang_at(stand, call));
        }
    });
}

#[test]
fn run_whose_storage_does_not_answer_ends_with_its_time() {
    let world = World::new("storage-time");
    let source = world.source("source");
    let builder = world.agent().setting("limits", "run_time_max = \"5s\"");
    let agent = builder.allowed(Service::files("docs", [&source])).started();
    let archiver = agent.archiver();
    archiver.hold_once_at(Moment::Put(1));
    let run = agent.snapshot("docs");
    run.assert_failed("run_timeout");
    archiver.go_on();
    agent.assert_repository_holds(&[]);
}
