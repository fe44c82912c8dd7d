//! The guard: whoever dies, what was frozen is thawed, and only its word makes a frozen point count.
//!
//! The runner is `hestner-window`, which has a window and does nothing else; guard and freezers are the
//! agent's own. Real filesystems, real FIFREEZE; what a freeze has to wait for is a real write in flight.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use hestner_tests::mounts::Mounted;
use hestner_tests::processes::{self, Process};
use hestner_tests::world::{bin, own_folder};
use hestner_tests::writer::{InFlight, Writer};
use hestner_tests::{Cmd, clock, files, is_root_or_skips, wait_for, wait_until};
use nix::sys::signal::Signal;

const KINDS: [&str; 3] = ["ext4", "xfs", "btrfs"];
const WINDOW: Duration = Duration::from_secs(1);
/// Whatever happens, the writer goes on so long after the window at the latest.
const PROMISE: Duration = Duration::from_secs(1);
/// A busy machine's slack for what should be there at once.
const SOON: Duration = Duration::from_secs(20);

/// A folder that the guard trusts, and what runs in it.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let place = Self(own_folder(&format!("guard-{name}")));
        files::write(place.settings(), "");
        place
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Stands for the settings; each start of `thaw` adds a line.
    fn settings(&self) -> PathBuf {
        self.at("settings")
    }

    fn thaws_started(&self) -> usize {
        files::lines(&self.settings()).len()
    }

    fn disk(&self, kind: &str) -> Mounted {
        Mounted::of_kind(kind, &self.at(kind))
    }

    /// Processes of one part of the agent that belong to this place.
    fn parts(&self, part: &str) -> Vec<Process> {
        // A freezer names no folder; its guard does.
        let guards: Vec<Process> = processes::all()
            .into_iter()
            .filter(|p| p.names(&self.settings().to_string_lossy()) && p.is_part("guard"))
            .collect();
        if part == "guard" {
            return guards;
        }
        let of_ours = |p: &Process| p.is_part(part) && guards.iter().any(|guard| guard.pid == p.parent);
        processes::all().into_iter().filter(of_ours).collect()
    }

    fn wait_no_guard(&self) {
        wait_until("the guard to end", SOON, || self.parts("guard").is_empty());
    }

    /// What recovery does by the record.
    fn left(&self, journal: &Path) -> String {
        Cmd::new(bin("hestner-window")).arg("left").arg(journal).ok()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        processes::kill_all_naming(&self.0);
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

/// A runner with a window.
struct Runner {
    child: Child,
    words: ChildStdin,
    said: Receiver<String>,
    journal: PathBuf,
}

impl Runner {
    fn start(place: &Place, name: &str, window: Duration, rest: &[&Path]) -> Self {
        let journal = place.at(&format!("{name}.journal"));
        let mut command = Cmd::new(bin("hestner-window")).arg(place.settings()).arg(&journal);
        command = command.arg(window.as_millis().to_string());
        let mut child = command.args(rest).spawn_conversed();
        let words = child.stdin.take().expect("a pipe");
        let (says, said) = channel();
        let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| drop(says.send(line))));
        Self { child, words, said, journal }
    }

    /// Armed for these filesystems.
    fn armed(place: &Place, name: &str, window: Duration, disks: &[&Mounted]) -> Self {
        let paths: Vec<&Path> = disks.iter().map(|disk| disk.path()).collect();
        let runner = Self::start(place, name, window, &paths);
        assert_eq!(runner.hear().0, "armed");
        runner
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid")
    }

    fn say(&mut self, word: &str) {
        writeln!(self.words, "{word}").expect("a runner that listens");
    }

    /// What it says next, and when it said so.
    fn hear(&self) -> (String, Duration) {
        let line = self.said.recv_timeout(SOON).expect("a word of the runner");
        let (word, at) = line.rsplit_once(' ').expect("a word and a time");
        (word.to_owned(), Duration::from_nanos(at.parse().expect("ns")))
    }

    fn ask(&mut self, word: &str) -> String {
        self.say(word);
        self.hear().0
    }

    fn kill(&mut self) -> Duration {
        let now = clock::monotonic();
        processes::kill(self.pid());
        now
    }

    /// How the record says that the window ended, and the letters of the filesystems.
    fn record(&self) -> (char, String) {
        let text = files::lines(&self.journal).pop().expect("a second line");
        let (end, states) = text.split_once(' ').expect("two fields");
        (end.chars().next().expect("a letter"), states.to_owned())
    }

    fn wait_outcome(&self, outcome: char) {
        wait_until("the record of the window's end", SOON, || self.record().0 == outcome);
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        processes::send(self.pid(), Signal::SIGCONT);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The writer goes on in time, and nothing is frozen any more.
fn assert_thawed(writer: &Writer, disk: &Mounted, from: Duration, within: Duration) -> Duration {
    let at = writer.wait_progress(from, SOON);
    let took = at.saturating_sub(from);
    assert!(took <= within, "the writer waited for {took:?}, more than {within:?}");
    assert!(!disk.is_frozen());
    took
}

/// The proof that it is frozen: nothing reaches the disk, and a second freeze answers EBUSY.
fn assert_frozen(writer: &Writer, disk: &Mounted) {
    writer.wait_stalled(SOON);
    assert!(disk.is_frozen(), "a second freeze is EBUSY");
}

#[test]
fn guard_freezes_and_thaws_by_order_and_gives_its_word() {
    if !is_root_or_skips("guard_freezes_and_thaws_by_order_and_gives_its_word") {
        return;
    }
    let place = Place::new("order");
    let disks = KINDS.map(|kind| place.disk(kind));
    let writers = disks.each_ref().map(|disk| Writer::start(disk.path()));
    let mut runner = Runner::armed(&place, "a", Duration::from_secs(5), &disks.each_ref());
    assert_eq!(runner.record(), ('-', "AAA".to_owned()), "the record stands before anything is frozen");
    assert_eq!(place.parts("freezer").len(), 3, "freezers are started before the window");
    assert_eq!(runner.ask("freeze"), "frozen");
    for (writer, disk) in writers.iter().zip(&disks) {
        assert_frozen(writer, disk);
    }
    let before = clock::monotonic();
    let thawed = runner.ask("thaw");
    let frozen = thawed.strip_prefix("thawed ").unwrap_or_else(|| panic!("{thawed}"));
    let frozen = Duration::from_nanos(frozen.parse().expect("ns"));
    assert!((Duration::from_millis(150)..Duration::from_secs(5)).contains(&frozen), "{frozen:?}");
    for (writer, disk) in writers.iter().zip(&disks) {
        assert_thawed(writer, disk, before, PROMISE);
    }
    place.wait_no_guard();
    assert_eq!(runner.record(), ('O', "TTT".to_owned()));
    assert_eq!(place.thaws_started(), 0, "nothing is owed");
}

#[test]
fn dead_runner_is_followed_by_a_thaw_within_200_ms() {
    if !is_root_or_skips("dead_runner_is_followed_by_a_thaw_within_200_ms") {
        return;
    }
    let place = Place::new("dead-runner");
    let disks = KINDS.map(|kind| place.disk(kind));
    let mut took = Vec::new();
    for i in 0..51 {
        let disk = &disks[i % KINDS.len()];
        let mut runner = Runner::armed(&place, &format!("{i}"), Duration::from_secs(20), &[disk]);
        assert_eq!(runner.ask("freeze"), "frozen");
        assert!(disk.is_frozen());
        let blocked = Blocked::start(disk.path());
        let killed = runner.kill();
        took.push(blocked.ended().saturating_sub(killed));
        runner.wait_outcome('G');
        assert_eq!(runner.record().1, "T");
    }
    took.sort();
    let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
    let (min, median, p99, max) = (took[0], took[25], took[49], took[50]);
    println!(
        "runner killed to thawed, 51 times: min {:.2} ms, median {:.2} ms, p99 {:.2} ms, max {:.2} ms",
        ms(min),
        ms(median),
        ms(p99),
        ms(max)
    );
    assert!(max < Duration::from_millis(200), "{took:?}");
    wait_until("what is owed to be started each time", SOON, || place.thaws_started() == 51);
}

/// A process that makes a file on a frozen filesystem and says when it could.
struct Blocked(Child);

impl Blocked {
    fn start(folder: &Path) -> Self {
        let child = Cmd::new(bin("hestner-writer")).arg("once").arg(folder.join("once")).spawn_heard();
        let pid = i32::try_from(child.id()).expect("a pid");
        let is_blocked = || processes::stat_fields(pid).is_some_and(|fields| fields[0] == "D");
        wait_until("the writer to be blocked", SOON, is_blocked);
        Self(child)
    }

    fn ended(mut self) -> Duration {
        let mut line = String::new();
        BufReader::new(self.0.stdout.take().expect("a pipe")).read_line(&mut line).expect("its word");
        let _ = self.0.wait();
        Duration::from_nanos(line.trim().parse().expect("ns"))
    }
}

#[test]
fn stopped_runner_meets_the_deadline_and_cannot_turn_it_into_success() {
    if !is_root_or_skips("stopped_runner_meets_the_deadline_and_cannot_turn_it_into_success") {
        return;
    }
    for kind in KINDS {
        let place = Place::new(&format!("stopped-runner-{kind}"));
        let disk = place.disk(kind);
        let writer = Writer::start(disk.path());
        let mut runner = Runner::armed(&place, "a", WINDOW, &[&disk]);
        let from = clock::monotonic();
        assert_eq!(runner.ask("freeze"), "frozen");
        processes::send(runner.pid(), Signal::SIGSTOP);
        assert_frozen(&writer, &disk);
        assert_thawed(&writer, &disk, clock::monotonic(), WINDOW + PROMISE);
        let late = clock::monotonic().saturating_sub(from);
        assert!(late >= WINDOW, "it was thawed {late:?} after the freeze");
        place.wait_no_guard();
        processes::send(runner.pid(), Signal::SIGCONT);
        let answer = runner.ask("thaw");
        assert!(answer.starts_with("error Deadline:"), "{answer}");
        assert_eq!(runner.record(), ('D', "T".to_owned()));
        wait_until("what is owed to be started", SOON, || place.thaws_started() == 1);
    }
}

#[test]
fn guard_that_is_told_to_stop_thaws_first() {
    if !is_root_or_skips("guard_that_is_told_to_stop_thaws_first") {
        return;
    }
    let place = Place::new("sigterm");
    let disk = place.disk("ext4");
    let writer = Writer::start(disk.path());
    let mut runner = Runner::armed(&place, "a", Duration::from_secs(20), &[&disk]);
    assert_eq!(runner.ask("freeze"), "frozen");
    assert_frozen(&writer, &disk);
    let from = clock::monotonic();
    processes::send(place.parts("guard")[0].pid, Signal::SIGTERM);
    assert_thawed(&writer, &disk, from, Duration::from_millis(500));
    assert_eq!(runner.ask("struck"), "struck", "the runner hears of it at once");
    assert!(runner.ask("thaw").starts_with("error Stopped:"));
    place.wait_no_guard();
    assert_eq!(runner.record(), ('S', "T".to_owned()));
    wait_until("what is owed to be started", SOON, || place.thaws_started() == 1);
}

#[test]
fn killed_guard_is_replaced_by_its_runner() {
    if !is_root_or_skips("killed_guard_is_replaced_by_its_runner") {
        return;
    }
    for kind in KINDS {
        let place = Place::new(&format!("killed-guard-{kind}"));
        let disk = place.disk(kind);
        let writer = Writer::start(disk.path());
        let mut runner = Runner::armed(&place, "a", Duration::from_secs(20), &[&disk]);
        assert_eq!(runner.ask("freeze"), "frozen");
        assert_frozen(&writer, &disk);
        runner.say("struck");
        let from = clock::monotonic();
        processes::kill(place.parts("guard")[0].pid);
        assert_thawed(&writer, &disk, from, Duration::from_millis(500));
        assert_eq!(runner.hear().0, "struck");
        let answer = runner.ask("thaw");
        assert!(answer.starts_with("error Lost:"), "{answer}");
        assert_eq!(runner.record(), ('R', "T".to_owned()));
    }
}

#[test]
fn stopped_guard_is_replaced_at_the_deadline_and_does_no_harm_later() {
    if !is_root_or_skips("stopped_guard_is_replaced_at_the_deadline_and_does_no_harm_later") {
        return;
    }
    for when in ["armed", "frozen"] {
        let place = Place::new(&format!("stopped-guard-{when}"));
        let disk = place.disk("ext4");
        let writer = Writer::start(disk.path());
        let mut runner = Runner::armed(&place, "a", WINDOW, &[&disk]);
        let guard = place.parts("guard")[0].pid;
        let from = clock::monotonic();
        if when == "frozen" {
            assert_eq!(runner.ask("freeze"), "frozen");
            processes::send(guard, Signal::SIGSTOP);
            assert_frozen(&writer, &disk);
        } else {
            processes::send(guard, Signal::SIGSTOP);
            let answer = runner.ask("freeze");
            assert!(answer.starts_with("error Lost:"), "{answer}");
        }
        assert_thawed(&writer, &disk, clock::monotonic(), WINDOW + PROMISE);
        assert!(clock::monotonic() >= from + WINDOW);
        if when == "frozen" {
            let answer = runner.ask("thaw");
            assert!(answer.starts_with("error Lost:"), "{answer}");
        }
        processes::send(guard, Signal::SIGCONT);
        place.wait_no_guard();
        let again = clock::monotonic();
        assert_thawed(&writer, &disk, again, PROMISE);
    }
}

#[test]
fn freeze_of_somebody_else_is_left_alone_and_the_rest_is_thawed() {
    if !is_root_or_skips("freeze_of_somebody_else_is_left_alone_and_the_rest_is_thawed") {
        return;
    }
    for kind in KINDS {
        let place = Place::new(&format!("foreign-{kind}"));
        let (ours, theirs) = (place.disk(kind), Mounted::of_kind(kind, &place.at("theirs")));
        let writer = Writer::start(ours.path());
        let mut runner = Runner::armed(&place, "a", Duration::from_secs(20), &[&ours, &theirs]);
        theirs.freeze();
        let from = clock::monotonic();
        let answer = runner.ask("freeze");
        assert!(answer.starts_with("error Busy:") && answer.contains("theirs"), "{answer}");
        assert_thawed(&writer, &ours, from, PROMISE);
        place.wait_no_guard();
        assert_eq!(runner.record().0, 'X');
        assert!(runner.record().1.ends_with('E'));
        let left = place.left(&runner.journal);
        assert!(left.contains("foreign: [") && left.contains("thawed: []"), "{left}");
        assert!(theirs.is_frozen(), "what somebody else froze stays frozen");
        assert!(theirs.thaw());
    }
}

#[test]
fn point_that_somebody_else_thawed_does_not_count() {
    if !is_root_or_skips("point_that_somebody_else_thawed_does_not_count") {
        return;
    }
    let place = Place::new("thawed-by-others");
    let disk = place.disk("xfs");
    let mut runner = Runner::armed(&place, "a", Duration::from_secs(20), &[&disk]);
    assert_eq!(runner.ask("freeze"), "frozen");
    assert!(disk.thaw());
    let answer = runner.ask("thaw");
    assert!(answer.starts_with("error ThawedByOthers:"), "{answer}");
    place.wait_no_guard();
    assert!(!disk.is_frozen());
}

#[test]
fn record_alone_thaws_what_two_dead_processes_left_frozen() {
    if !is_root_or_skips("record_alone_thaws_what_two_dead_processes_left_frozen") {
        return;
    }
    for kind in KINDS {
        let place = Place::new(&format!("record-{kind}"));
        let disk = place.disk(kind);
        let writer = Writer::start(disk.path());
        let mut runner = Runner::armed(&place, "a", Duration::from_secs(20), &[&disk]);
        let watched = place.left(&runner.journal);
        assert!(watched.contains("is_watched: true"), "{watched}");
        assert_eq!(runner.ask("freeze"), "frozen");
        // Stopped first, so that neither sees the other die.
        let guard = place.parts("guard")[0].pid;
        processes::send(runner.pid(), Signal::SIGSTOP);
        processes::send(guard, Signal::SIGSTOP);
        assert_frozen(&writer, &disk);
        let watched = place.left(&runner.journal);
        assert!(watched.contains("is_watched: true"), "nobody knows yet that it is stopped: {watched}");
        processes::kill(guard);
        runner.kill();
        wait_until("both to be gone", SOON, || !processes::is_alive(guard) && !processes::is_alive(runner.pid()));
        assert!(disk.is_frozen());
        // Another life of the machine is none of its business.
        let text = std::fs::read_to_string(&runner.journal).expect("the record");
        let other = place.at("other.journal");
        let (before, after) = text.split_once("\"boot_id\":\"").expect("a boot id");
        files::write(&other, format!("{before}\"boot_id\":\"00000000{}", &after[8..]));
        assert!(place.left(&other).contains("thawed: []"));
        assert!(disk.is_frozen());
        let from = clock::monotonic();
        let left = place.left(&runner.journal);
        assert!(left.contains("struck: true") && left.contains(disk.path().to_str().expect("UTF-8")), "{left}");
        assert_thawed(&writer, &disk, from, PROMISE);
        // Once is enough: from now on it may be somebody else's.
        disk.freeze();
        assert!(place.left(&runner.journal).contains("thawed: []"));
        assert!(disk.thaw());
    }
}

#[test]
fn record_says_which_freeze_is_ours_to_thaw() {
    if !is_root_or_skips("record_says_which_freeze_is_ours_to_thaw") {
        return;
    }
    let place = Place::new("letters");
    let disk = place.disk("ext4");
    let mut runner = Runner::armed(&place, "a", Duration::from_secs(20), &[&disk]);
    assert_eq!(runner.ask("freeze"), "frozen");
    assert!(runner.ask("thaw").starts_with("thawed "));
    place.wait_no_guard();
    let text = std::fs::read_to_string(&runner.journal).expect("the record");
    let (head, _) = text.rsplit_once(' ').expect("the letters");
    let (head, tail) = head.split_at(head.rfind('\n').expect("two lines") + 1);
    for (letter, is_ours) in [('A', false), ('B', true), ('F', true), ('E', false), ('N', false), ('T', false)] {
        let journal = files::write(place.at(&format!("{letter}.journal")), format!("{head}-{} {letter}\n", &tail[1..]));
        disk.freeze();
        let left = place.left(&journal);
        assert_eq!(disk.is_frozen(), !is_ours, "{letter}: {left}");
        assert_eq!(left.contains("foreign: [\""), letter == 'E', "{letter}: {left}");
        disk.thaw();
    }
    let torn = files::write(place.at("torn.journal"), &text.as_bytes()[..text.len() - 3]);
    assert!(place.left(&torn).starts_with("error"), "a torn record is not taken for an empty one");
    assert!(place.left(&place.at("none.journal")).contains("thawed: []"));
}

#[test]
fn filesystem_that_is_gone_keeps_no_other_frozen() {
    if !is_root_or_skips("filesystem_that_is_gone_keeps_no_other_frozen") {
        return;
    }
    let place = Place::new("gone");
    let (gone, disk) = (place.disk("xfs"), place.disk("ext4"));
    let mut runner = Runner::armed(&place, "a", Duration::from_secs(20), &[&gone, &disk]);
    assert_eq!(runner.ask("freeze"), "frozen");
    assert!(runner.ask("thaw").starts_with("thawed "));
    place.wait_no_guard();
    let text = std::fs::read_to_string(&runner.journal).expect("the record");
    let journal = files::write(place.at("b.journal"), text.replace("\nO", "\n-").replace(" TT", " FF"));
    drop(gone);
    disk.freeze();
    let left = place.left(&journal);
    assert!(left.starts_with("error Failed") && left.contains("xfs"), "{left}");
    assert!(!disk.is_frozen());
}

#[test]
fn full_state_disk_prevents_the_freeze_and_never_the_thaw() {
    if !is_root_or_skips("full_state_disk_prevents_the_freeze_and_never_the_thaw") {
        return;
    }
    let place = Place::new("full");
    let state = Mounted::ext4(&place.at("state"), 16);
    let disk = place.disk("ext4");
    let fill = || {
        let mut file = std::fs::File::create(state.path().join("fill")).expect("a file");
        for size in [64 * 1024, 1024] {
            let full = (0..).find_map(|_| file.write_all(&vec![0; size]).and_then(|()| file.sync_data()).err());
            assert_eq!(full.map(|error| error.kind()), Some(std::io::ErrorKind::StorageFull));
        }
        // Blocks that were kept for the file's own bookkeeping.
        for i in 0..50 {
            let file = std::fs::File::create(state.path().join(format!("fill-{i}")));
            let _ = file.and_then(|mut file| file.write_all(&[0; 1024]));
        }
    };
    let mut runner = Runner::armed(&place, "state/a", Duration::from_secs(20), &[&disk]);
    fill();
    assert_eq!(runner.ask("freeze"), "frozen");
    assert!(disk.is_frozen());
    runner.kill();
    runner.wait_outcome('G');
    assert_eq!(runner.record().1, "T");
    assert!(!disk.is_frozen());

    let runner = Runner::start(&place, "state/b", Duration::from_secs(20), &[disk.path()]);
    let answer = runner.hear().0;
    assert!(answer.starts_with("error NoRoom:") && answer.contains("record"), "{answer}");
    assert!(!disk.is_frozen());
}

#[test]
fn killed_freezer_fails_the_freeze() {
    if !is_root_or_skips("killed_freezer_fails_the_freeze") {
        return;
    }
    let place = Place::new("killed-freezer");
    let (disk, other) = (place.disk("ext4"), place.disk("xfs"));
    let mut runner = Runner::armed(&place, "a", Duration::from_secs(20), &[&disk, &other]);
    processes::kill(place.parts("freezer")[0].pid);
    let answer = runner.ask("freeze");
    assert!(answer.starts_with("error Failed:") && answer.contains("freezer"), "{answer}");
    place.wait_no_guard();
    assert!(!disk.is_frozen() && !other.is_frozen());
    assert_eq!(place.thaws_started(), 0, "the runner lives and was told");

    // One that is stopped holds up its freeze, and does not begin it any more after the deadline.
    let mut runner = Runner::armed(&place, "b", WINDOW, &[&disk]);
    processes::send(place.parts("freezer")[0].pid, Signal::SIGSTOP);
    let answer = runner.ask("freeze");
    assert!(answer.starts_with("error Deadline:"), "{answer}");
    place.wait_no_guard();
    assert!(!disk.is_frozen());
}

#[test]
fn stopped_guard_of_a_dead_runner_is_replaced_by_hand_after_the_deadline() {
    if !is_root_or_skips("stopped_guard_of_a_dead_runner_is_replaced_by_hand_after_the_deadline") {
        return;
    }
    let place = Place::new("by-hand");
    let disk = place.disk("ext4");
    let mut runner = Runner::armed(&place, "a", WINDOW, &[&disk]);
    assert_eq!(runner.ask("freeze"), "frozen");
    let guard = place.parts("guard")[0].pid;
    processes::send(guard, Signal::SIGSTOP);
    runner.kill();
    clock::let_pass(WINDOW * 2);
    assert!(disk.is_frozen());
    let left = place.left(&runner.journal);
    assert!(left.contains("struck: true") && left.contains("is_watched: false"), "{left}");
    assert!(!disk.is_frozen());
    processes::send(guard, Signal::SIGCONT);
    place.wait_no_guard();
    assert!(!disk.is_frozen());
}

#[test]
fn freeze_that_is_stuck_is_said_so_and_thawed_as_soon_as_it_lands() {
    if !is_root_or_skips("freeze_that_is_stuck_is_said_so_and_thawed_as_soon_as_it_lands") {
        return;
    }
    for (kind, who) in [("ext4", "nobody"), ("xfs", "runner"), ("btrfs", "guard"), ("ext4", "guard")] {
        let place = Place::new(&format!("stuck-{kind}-{who}"));
        let disk = place.disk(kind);
        let writer = Writer::start(disk.path());
        let mut runner = Runner::armed(&place, "a", WINDOW, &[&disk]);
        let in_flight = InFlight::begin(disk.path());
        let from = clock::monotonic();
        runner.say("freeze");
        // While it waits for the write, others wait already, and the kernel says that nothing is frozen.
        writer.wait_stalled(SOON);
        let guard = place.parts("guard")[0].pid;
        match who {
            "runner" => drop(runner.kill()),
            "guard" => processes::kill(guard),
            _ => {}
        }
        if who == "nobody" {
            let (answer, at) = runner.hear();
            assert!(answer.starts_with("error Stuck:"), "{answer}");
            assert!(at.saturating_sub(from) < WINDOW + PROMISE, "it is said in time");
            runner.wait_outcome('K');
        } else {
            clock::let_pass(WINDOW * 2);
        }
        if who != "guard" {
            wait_until("what is owed to be started", SOON, || place.thaws_started() == 1);
        }
        let landed = clock::monotonic();
        in_flight.end();
        assert_thawed(&writer, &disk, landed, PROMISE);
        place.wait_no_guard();
        wait_until("the record of the thaw", SOON, || runner.record().1 == "T");
        // Nothing is on its way any more.
        clock::let_pass(Duration::from_millis(300));
        assert_thawed(&writer, &disk, clock::monotonic(), PROMISE);
    }
}

#[test]
fn much_that_is_not_written_out_yet_does_not_lengthen_the_window() {
    if !is_root_or_skips("much_that_is_not_written_out_yet_does_not_lengthen_the_window") {
        return;
    }
    for kind in KINDS {
        let place = Place::new(&format!("dirty-{kind}"));
        let disk = place.disk(kind);
        files::write(disk.path().join("dirty"), vec![7; 100 * 1024 * 1024]);
        let paths = [disk.path()];
        let mut runner = Runner::start(&place, "a", WINDOW, &paths);
        let (word, _) = runner.hear();
        if word == "armed" {
            let from = clock::monotonic();
            assert_eq!(runner.ask("freeze"), "frozen");
            let took = clock::monotonic().saturating_sub(from);
            assert!(took < WINDOW, "the freeze took {took:?}");
            assert!(runner.ask("thaw").starts_with("thawed "));
        } else {
            // A disk that is too slow for the window is an answer as well; nothing was frozen then.
            assert!(word.starts_with("error SlowSync:"), "{word}");
        }
        assert!(!disk.is_frozen());
    }
}

#[test]
fn freeze_that_has_much_to_flush_ends_with_its_window_as_well() {
    if !is_root_or_skips("freeze_that_has_much_to_flush_ends_with_its_window_as_well") {
        return;
    }
    for kind in KINDS {
        let place = Place::new(&format!("flush-{kind}"));
        let disk = place.disk(kind);
        let writer = Writer::start(disk.path());
        let mut runner = Runner::armed(&place, "a", WINDOW, &[&disk]);
        // What was written out before the guard was armed is not all that is dirty now.
        files::write(disk.path().join("dirty"), vec![7; 120 * 1024 * 1024]);
        runner.say("freeze");
        let from = clock::monotonic();
        let frozen = runner.hear().0;
        assert!(["frozen", "error Stuck", "error Deadline"].iter().any(|word| frozen.starts_with(word)), "{frozen}");
        // Nobody thaws by order.
        place.wait_no_guard();
        assert_thawed(&writer, &disk, from, WINDOW + PROMISE);
        let answer = runner.ask("thaw");
        assert!(["error Stuck", "error Deadline"].iter().any(|word| answer.starts_with(word)), "{answer}");
        wait_until("what is owed to be started", SOON, || place.thaws_started() == 1);
    }
}

#[test]
fn what_cannot_be_frozen_safely_is_refused_before_the_window() {
    if !is_root_or_skips("what_cannot_be_frozen_safely_is_refused_before_the_window") {
        return;
    }
    let place = Place::new("refused");
    let refused = |name: &str, window: u64, mounts: &[&Path]| {
        let runner = Runner::start(&place, name, Duration::from_secs(window), mounts);
        let answer = runner.hear().0;
        place.wait_no_guard();
        answer
    };
    let answer = refused("kind", 1, &[Path::new("/dev/shm")]);
    assert!(answer.starts_with("error NotSupported:") && answer.contains("/dev/shm"), "{answer}");
    let disk = place.disk("ext4");
    let answer = refused("long", 31, &[disk.path()]);
    assert!(answer.starts_with("error TooLong:") && answer.contains("30 s"), "{answer}");
    let answer = refused("longer", 7201, &[]);
    assert!(answer.starts_with("error TooLong:"), "{answer}");
    files::set_mode(&place.0, 0o777);
    let answer = refused("open", 1, &[disk.path()]);
    assert!(answer.starts_with("error Failed:") && answer.contains("0777"), "{answer}");
    files::set_mode(&place.0, 0o755);
    std::fs::create_dir(disk.path().join("below")).expect("a folder");
    let answer = refused("twice", 1, &[disk.path(), &disk.path().join("below")]);
    assert!(answer.starts_with("error Failed:") && answer.contains("twice"), "{answer}");
    let answer = refused("nobody", 1, &[Path::new("--socket"), &place.at("none.sock"), disk.path()]);
    assert!(answer.starts_with("error Unreachable:") && answer.contains("none.sock"), "{answer}");
    assert!(!disk.is_frozen());
    assert_eq!(place.thaws_started(), 0);
}

#[test]
fn runner_that_waits_for_what_it_froze_is_freed_at_the_deadline() {
    if !is_root_or_skips("runner_that_waits_for_what_it_froze_is_freed_at_the_deadline") {
        return;
    }
    for killed in [false, true] {
        let place = Place::new(&format!("blocked-runner-{killed}"));
        let disk = place.disk("xfs");
        let writer = Writer::start(disk.path());
        let mut runner = Runner::armed(&place, "a", WINDOW, &[&disk]);
        assert_eq!(runner.ask("freeze"), "frozen");
        assert_eq!(runner.ask(&format!("block {}", disk.path().join("blocked").display())), "blocks");
        assert_frozen(&writer, &disk);
        if killed {
            runner.kill();
        }
        assert_thawed(&writer, &disk, clock::monotonic(), WINDOW + PROMISE);
        if !killed {
            assert!(runner.ask("thaw").starts_with("error Deadline:"));
        }
        place.wait_no_guard();
        wait_until("what is owed to be started", SOON, || place.thaws_started() == 1);
    }
}

#[test]
fn window_without_a_filesystem_is_kept_as_well() {
    let place = Place::new("no-filesystem");
    let mut runner = Runner::armed(&place, "order", Duration::from_secs(20), &[]);
    assert_eq!(runner.ask("begin"), "begun");
    assert!(runner.ask("thaw").starts_with("thawed "));
    place.wait_no_guard();
    assert_eq!(place.thaws_started(), 0);

    let mut runner = Runner::armed(&place, "deadline", Duration::from_millis(300), &[]);
    assert_eq!(runner.ask("begin"), "begun");
    assert_eq!(runner.ask("struck"), "struck");
    wait_until("what is owed at the deadline", SOON, || place.thaws_started() == 1);

    let mut runner = Runner::armed(&place, "killed", Duration::from_secs(20), &[]);
    runner.kill();
    wait_until("what is owed by a dead runner", SOON, || place.thaws_started() == 2);
    runner.wait_outcome('G');

    let mut runner = Runner::armed(&place, "dropped", Duration::from_secs(20), &[]);
    assert_eq!(runner.ask("begin"), "begun");
    assert_eq!(runner.ask("drop"), "dropped");
    wait_until("what is owed by a runner that lets go", SOON, || place.thaws_started() == 3);
}

/// What systemd does with `Accept=yes`: a guard for each connection.
fn serve_guard(listener: &UnixListener, thaw_socket: &Path) -> Child {
    let (connection, _) = listener.accept().expect("a connection");
    let command = Cmd::new(bin("hestner-agent")).args(["guard", "--thaw-socket"]).arg(thaw_socket);
    command.stdin_from(OwnedFd::from(connection)).spawn_heard()
}

#[test]
fn guard_of_a_socket_thaws_and_starts_the_thaw_unit_by_its_socket() {
    if !is_root_or_skips("guard_of_a_socket_thaws_and_starts_the_thaw_unit_by_its_socket") {
        return;
    }
    let place = Place::new("socket");
    let disk = place.disk("ext4");
    let (guard_at, thaw_at) = (place.at("guard.sock"), place.at("thaw.sock"));
    let guards = UnixListener::bind(&guard_at).expect("a socket");
    let thaws = UnixListener::bind(&thaw_at).expect("a socket");
    let mut runner =
        Runner::start(&place, "a", Duration::from_secs(20), &[Path::new("--socket"), &guard_at, disk.path()]);
    let mut guard = serve_guard(&guards, &thaw_at);
    assert_eq!(runner.hear().0, "armed");
    assert_eq!(runner.ask("freeze"), "frozen");
    assert!(disk.is_frozen());
    runner.kill();
    thaws.accept().expect("the thaw unit is started");
    assert!(!disk.is_frozen());
    assert!(wait_for("the guard to end", SOON, || guard.try_wait().ok().flatten()).success());
}

#[test]
fn stranger_gets_no_guard() {
    if !is_root_or_skips("stranger_gets_no_guard") {
        return;
    }
    let place = Place::new("stranger");
    let guard_at = place.at("guard.sock");
    let guards = UnixListener::bind(&guard_at).expect("a socket");
    files::set_mode(&guard_at, 0o666);
    let journal = place.at("a.journal");
    let stranger = Cmd::new("python3").args(["-c", "import socket,sys\ns=socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\ns.sendall(('{\"arm\":{\"run_uid\":\"x\",\"journal\":\"%s\",\"mounts\":[],\"window_ms\":1}}\\n'%sys.argv[2]).encode())\ntry: sys.exit(len(s.recv(100)))\nexcept ConnectionResetError: pass"]);
    let stranger = stranger.arg(&guard_at).arg(&journal).as_user(Some(65534)).start();
    let mut guard = serve_guard(&guards, &place.at("thaw.sock"));
    assert!(!wait_for("the guard to end", SOON, || guard.try_wait().ok().flatten()).success());
    stranger.ended().ok();
    assert!(!journal.exists(), "nothing was begun for a stranger");
}
