//! Hooks under their supervisor: whatever a hook does, nothing of it survives, and each pre hook that was
//! started has exactly one post hook (at least one where the runner itself died inside the hook).

use std::path::{Path, PathBuf};
use std::time::Duration;

use hestner_tests::mounts::Mounted;
use hestner_tests::{
    Agent, Cmd, Hook, Service, World, clock, files, is_root_or_skips, processes, wait_for, wait_until,
};

/// What a pre hook of the matrix does, besides noting that it was started.
#[derive(Clone, Copy, Debug)]
struct Misdeed {
    exit: u8,
    hangs: bool,
    double_fork: bool,
    ignores_term: bool,
    holds_stdout: bool,
    floods: bool,
}

impl Misdeed {
    /// Every combination with that exit code and that way to end.
    fn all(exit: u8, hangs: bool) -> impl Iterator<Item = Self> {
        (0..16_u8).map(move |bits| Self {
            exit,
            hangs,
            double_fork: bits & 1 != 0,
            ignores_term: bits & 2 != 0,
            holds_stdout: bits & 4 != 0,
            floods: bits & 8 != 0,
        })
    }

    fn name(self) -> String {
        let bit = |set: bool| u8::from(set);
        let Self { exit, hangs, double_fork, ignores_term, holds_stdout, floods } = self;
        format!("h{exit}{}{}{}{}{}", bit(hangs), bit(double_fork), bit(ignores_term), bit(holds_stdout), bit(floods))
    }

    /// The hook; the misdeed's bits travel as arguments.
    fn hook(self, program: &str) -> Hook {
        let bit = |set: bool| if set { "1" } else { "0" };
        let (name, exit) = (self.name(), self.exit.to_string());
        let bits = [self.hangs, self.double_fork, self.ignores_term, self.holds_stdout, self.floods].map(bit);
        let mut pre = vec![program, "pre", &name, &exit];
        pre.extend(bits);
        let timeout = if self.hangs { "1s" } else { "60s" };
        Hook::new(&name).pre(&pre).post(&[program, "post", &name]).timeout(timeout)
    }
}

/// The program of the matrix, its notes, and the text that all of its offspring carry.
struct Program {
    path: String,
    notes: PathBuf,
    marker: String,
}

impl Program {
    fn new(world: &World) -> Self {
        let notes = world.at("notes.txt");
        let own = world.path().file_name().expect("a name").to_string_lossy().into_owned();
        let marker = format!("HESTNER-SURVIVOR-{own}");
        // In a pattern, so that the program that looks for the marker does not find itself.
        let pattern = marker.replace("SURVIVOR", "SURVIVO[R]");
        let body = format!(
            r#"phase=$1 name=$2 exit=$3 hangs=$4 forks=$5 ignores=$6 holds=$7 floods=$8
mark={marker}-$name-
export HESTNER_MARK=$mark
if [ "$phase" = post ]; then
  alive=$(grep -lsa "{pattern}-$name-" /proc/[0-9]*/cmdline | wc -l)
  echo "post $name alive=$alive" >> {notes}
  exit 0
fi
echo "pre $name" >> {notes}
[ "$ignores" = 1 ] && trap '' TERM INT HUP
[ "$forks" = 1 ] && (setsid bash -c "trap '' TERM HUP; exec -a $mark sleep 5000" </dev/null >/dev/null 2>&1 &)
[ "$holds" = 1 ] && bash -c "exec -a $mark sleep 5000" &
[ "$floods" = 1 ] && yes 'a line of a flood that nobody wants to keep in memory' | head -c 1G
[ "$hangs" = 1 ] && exec -a "$mark" sleep 5000
exit "$exit""#,
            notes = notes.display(),
        );
        let path = files::write_script(world.at("hooks/misdeed"), &body).to_string_lossy().into_owned();
        Self { path, notes, marker }
    }

    fn assert_no_survivor(&self, what: &str) {
        let left = processes::marked(&self.marker);
        assert!(left.is_empty(), "{what} left processes behind: {left:?}");
        let left = processes::marked(&self.path);
        assert!(left.is_empty(), "{what} left its own program running: {left:?}");
    }

    fn assert_one_post_a_pre(&self, name: &str) {
        let notes: Vec<String> =
            files::lines(&self.notes).into_iter().filter(|l| l.split(' ').nth(1) == Some(name)).collect();
        assert_eq!(notes, [format!("pre {name}"), format!("post {name} alive=0")], "hook {name}");
    }
}

fn all_in_one(hooks: impl Iterator<Item = Hook>, service: Service) -> Service {
    hooks.fold(service, Service::hook)
}

#[test]
fn matrix_of_hooks_that_exit_with_0_succeeds_without_survivors() {
    let world = World::new("hooks-zero");
    let program = Program::new(&world);
    let service = Service::files("docs", [world.source("source")]);
    let service = all_in_one(Misdeed::all(0, false).map(|m| m.hook(&program.path)), service);
    let agent = world.agent().allowed(service).started();
    let run = agent.snapshot_ok("docs");
    program.assert_no_survivor("the run");
    Misdeed::all(0, false).for_each(|m| program.assert_one_post_a_pre(&m.name()));
    assert!(run.text("log_tail").len() < 100_000, "the flood is bounded: {} bytes", run.text("log_tail").len());
    // Pre hooks in their order, post hooks in reverse.
    let order = |phase: &str| -> Vec<String> {
        let of_phase = files::lines(&program.notes).into_iter().filter(|line| line.starts_with(phase));
        of_phase.map(|line| line.split(' ').nth(1).expect("a name").to_owned()).collect()
    };
    let mut back = order("post");
    back.reverse();
    assert_eq!(order("pre"), back);
}

/// Takes one snapshot a misdeed; each must fail with `class`, without a worker and without survivors.
fn fails_each(world: &World, misdeeds: &[Misdeed], class: &str) {
    let program = Program::new(world);
    let source = world.source("source");
    let services = misdeeds.iter().map(|m| Service::files(&m.name(), [&source]).hook(m.hook(&program.path)));
    let builder = services.fold(world.agent(), hestner_tests::AgentBuilder::allowed);
    let archiver = builder.archiver();
    let agent = builder.started();
    for misdeed in misdeeds {
        let name = misdeed.name();
        let run = agent.snapshot(&name);
        run.assert_failed(class);
        program.assert_no_survivor(&format!("{misdeed:?}"));
        program.assert_one_post_a_pre(&name);
    }
    assert_eq!(archiver.stores_begun(), 0, "a failed pre hook means that no snapshot is taken");
    agent.assert_repository_holds(&[]);
}

#[test]
fn matrix_of_hooks_that_exit_with_1_fails_without_survivors() {
    let misdeeds: Vec<Misdeed> = Misdeed::all(1, false).collect();
    fails_each(&World::new("hooks-one"), &misdeeds, "hook_failed");
}

#[test]
fn matrix_of_hooks_that_hang_fails_without_survivors() {
    let misdeeds: Vec<Misdeed> = Misdeed::all(0, true).collect();
    fails_each(&World::new("hooks-hang"), &misdeeds, "hook_timeout");
}

/// A program that notes its arguments, and hangs where a file of the name of its first two says so.
fn noting_program(world: &World) -> (String, PathBuf) {
    let notes = world.at("notes.txt");
    let hang = world.at("hang-on");
    let body = format!(
        "echo \"$1 $2\" >> {notes}\nwhile [ -e {hang}-$1-$2 ]; do sleep 0.05; done\necho \"$1 $2 done\" >> {notes}\nexit ${{3:-0}}",
        notes = notes.display(),
        hang = hang.display()
    );
    (files::write_script(world.at("hooks/note"), &body).to_string_lossy().into_owned(), notes)
}

fn started_lines(notes: &Path) -> Vec<String> {
    files::lines(notes).into_iter().filter(|line| !line.ends_with(" done")).collect()
}

#[test]
fn failed_pre_hook_is_undone_together_with_those_before_it_and_none_after() {
    let world = World::new("hooks-order");
    let (note, notes) = noting_program(&world);
    let hook = |name: &str, exit: &str| {
        Hook::new(name).pre(&[&note, "pre", name, exit]).post(&[&note, "post", name]).timeout("20s")
    };
    let service = Service::files("docs", [world.source("source")]);
    let service = service.hook(hook("a", "0")).hook(hook("b", "7")).hook(hook("c", "0"));
    let agent = world.agent().allowed(service).started();
    let run = agent.snapshot("docs");
    run.assert_failed("hook_failed");
    assert!(run.text("error_message").contains('b'), "the message names the hook: {run:?}");
    assert_eq!(started_lines(&notes), ["pre a", "pre b", "post b", "post a"]);
}

#[test]
fn failed_pre_hook_keeps_every_kind_of_point_from_being_taken() {
    if !is_root_or_skips("failed_pre_hook_keeps_every_kind_of_point_from_being_taken") {
        return;
    }
    let world = World::new("hooks-kinds");
    let (note, notes) = noting_program(&world);
    let command = files::write_script(world.at("hooks/point"), &format!("echo \"point $1\" >> {}", notes.display()));
    let command = command.to_string_lossy().into_owned();
    let disk = Mounted::of_kind("btrfs", &world.at("disk"));
    files::small_tree(&disk.path().join("data"), 3, 100);
    let service = |kind: &str| {
        let bad = Hook::new("bad").pre(&[&note, "pre", kind, "7"]).post(&[&note, "post", kind]);
        let service = Service::files(kind, [disk.path().join("data")]).hook(bad);
        let service = service.point_line(&format!("kind = \"{kind}\""));
        if kind != "fsfreeze" {
            return service;
        }
        let service = service.point_line(&format!("read_from = {:?}", world.at("copy")));
        service.point_program("command", &[&command, "taken"]).point_program("remove_command", &[&command, "removed"])
    };
    let kinds = ["none", "btrfs", "reflink", "fsfreeze"];
    let builder = kinds.iter().fold(world.agent(), |agent, kind| agent.allowed(service(kind)));
    let archiver = builder.archiver();
    let agent = builder.started();
    let before = Cmd::new("ls").arg("-A").arg(disk.path()).ok();
    for kind in kinds {
        agent.snapshot(kind).assert_failed("hook_failed");
        let of_kind: Vec<String> = started_lines(&notes).into_iter().filter(|line| line.ends_with(kind)).collect();
        assert_eq!(of_kind, [format!("pre {kind}"), format!("post {kind}")]);
    }
    assert!(
        !files::lines(&notes).iter().any(|line| line == "point taken"),
        "no point is taken: {:?}",
        files::lines(&notes)
    );
    assert_eq!(Cmd::new("ls").arg("-A").arg(disk.path()).ok(), before, "nothing was made");
    assert_eq!(archiver.stores_begun(), 0);
    agent.assert_repository_holds(&[]);
}

#[test]
fn freeze_failed_stands_in_for_post_thaw_where_the_point_was_not_reached() {
    let world = World::new("hooks-freeze-failed");
    let (note, notes) = noting_program(&world);
    let hook = |name: &str, exit: &str| {
        let hook = Hook::new(name).pre(&[&note, "pre", name, exit]).post(&[&note, "post", name]);
        hook.failed(&[&note, "failed", name]).timeout("20s")
    };
    let source = world.source("source");
    let bad = Service::files("bad", [&source]).hook(hook("a", "0")).hook(hook("b", "7"));
    let good = Service::files("good", [&source]).hook(hook("a", "0")).hook(hook("b", "0"));
    let agent = world.agent().allowed(bad).allowed(good).started();
    agent.snapshot("bad").assert_failed("hook_failed");
    assert_eq!(started_lines(&notes), ["pre a", "pre b", "failed b", "failed a"]);
    std::fs::remove_file(&notes).expect("notes");
    agent.snapshot_ok("good");
    assert_eq!(started_lines(&notes), ["pre a", "pre b", "post b", "post a"]);
}

#[test]
fn failed_post_hook_fails_the_run_and_the_other_post_hooks_run_all_the_same() {
    let world = World::new("hooks-post-fails");
    let (note, notes) = noting_program(&world);
    let hook = |name: &str, exit: &str| {
        Hook::new(name).pre(&[&note, "pre", name]).post(&[&note, "post", name, exit]).timeout("20s")
    };
    let service = Service::files("docs", [world.source("source")]);
    let service = service.hook(hook("a", "0")).hook(hook("b", "7")).hook(hook("c", "0"));
    let agent = world.agent().allowed(service).started();
    let run = agent.snapshot("docs");
    run.assert_failed("hook_failed");
    assert_eq!(started_lines(&notes), ["pre a", "pre b", "pre c", "post c", "post b", "post a"]);
    agent.assert_repository_holds(&[]);
}

#[test]
fn hook_that_cannot_be_started_fails_the_run() {
    let world = World::new("hooks-unstartable");
    let (note, notes) = noting_program(&world);
    let broken = files::write(world.at("hooks/broken"), "#!/no/such/interpreter\n");
    files::set_mode(&broken, 0o755);
    let broken = broken.to_string_lossy().into_owned();
    let service = Service::files("docs", [world.source("source")])
        .hook(Hook::new("a").pre(&[&note, "pre", "a"]).post(&[&note, "post", "a"]))
        .hook(Hook::new("b").pre(&[&broken]).post(&[&note, "post", "b"]));
    let agent = world.agent().allowed(service).started();
    let run = agent.snapshot("docs");
    run.assert_failed("hook_failed");
    let lines = started_lines(&notes);
    assert_eq!(lines.first().map(String::as_str), Some("pre a"), "{lines:?}");
    assert_eq!(lines.last().map(String::as_str), Some("post a"), "{lines:?}");
    agent.assert_repository_holds(&[]);
}

/// An agent with one hook that hangs in `phase`; returns once it hangs.
fn agent_inside_hook(world: &World, phase: &str) -> (Agent, PathBuf, PathBuf, String) {
    let (note, notes) = noting_program(world);
    let hang = files::write(world.at(&format!("hang-on-{phase}-a")), "");
    let hook = Hook::new("a").pre(&[&note, "pre", "a"]).post(&[&note, "post", "a"]).timeout("100s");
    let service = Service::files("docs", [world.source("source")]).hook(hook);
    let agent = world.agent().allowed(service).started();
    let asked = agent.cli(&["snapshot", "docs", "--detach", "--json"]).json();
    let uid = asked["run_uid"].as_str().unwrap_or_else(|| panic!("no run_uid in {asked}")).to_owned();
    let line = format!("{phase} a");
    wait_until("the hook to hang", Duration::from_secs(30), || files::lines(&notes).contains(&line));
    (agent, notes, hang, uid)
}

/// Afterwards: the run has failed, a post hook ran to its end, and nothing is left of the first ones.
fn assert_released(agent: &Agent, notes: &Path, uid: &str, first: &[i32]) {
    wait_until("a post hook to run to its end", Duration::from_secs(60), || {
        files::lines(notes).iter().any(|line| line == "post a done")
    });
    let run = wait_for("the run to end", Duration::from_secs(60), || {
        agent.runs().into_iter().find(|run| run.uid() == uid && run.text("status") == "failed")
    });
    run.assert_failed("interrupted");
    let alive = || -> Vec<_> { first.iter().filter_map(|pid| processes::read(*pid)).collect() };
    let gone = clock::eventually(Duration::from_secs(10), || alive().is_empty());
    assert!(gone, "the first hook's processes are still there: {:?}", alive());
    let pre = started_lines(notes).iter().filter(|line| *line == "pre a").count();
    assert_eq!(pre, 1, "a pre hook is never started twice");
    agent.assert_repository_holds(&[]);
}

fn hook_pids(agent: &Agent) -> Vec<i32> {
    let hook = agent.wait_part("hook");
    let mut pids: Vec<i32> = processes::descendants(hook.pid).into_iter().map(|p| p.pid).collect();
    pids.push(hook.pid);
    pids
}

#[test]
fn runner_killed_inside_a_pre_hook_still_leads_to_its_post_hook() {
    let world = World::new("hooks-runner-pre");
    let (agent, notes, hang, uid) = agent_inside_hook(&world, "pre");
    let first = hook_pids(&agent);
    processes::kill(agent.wait_part("runner").pid);
    assert_released(&agent, &notes, &uid, &first);
    assert!(!files::lines(&notes).iter().any(|l| l == "pre a done"), "the pre hook died before its post hook began");
    drop(hang);
}

#[test]
fn runner_killed_inside_a_post_hook_still_leads_to_a_whole_one() {
    let world = World::new("hooks-runner-post");
    let (agent, notes, hang, uid) = agent_inside_hook(&world, "post");
    let first = hook_pids(&agent);
    processes::kill(agent.wait_part("runner").pid);
    std::fs::remove_file(&hang).expect("the file that makes it hang");
    assert_released(&agent, &notes, &uid, &first);
}

#[test]
fn daemon_and_all_below_killed_inside_a_pre_hook_lead_to_its_post_hook_at_the_next_start() {
    let world = World::new("hooks-daemon-pre");
    let (mut agent, notes, _hang, uid) = agent_inside_hook(&world, "pre");
    let below = processes::descendants(agent.pid());
    let first = hook_pids(&agent);
    agent.kill9();
    below.iter().for_each(|process| processes::kill(process.pid));
    agent.start();
    assert_released(&agent, &notes, &uid, &first);
}

#[test]
fn daemon_alone_killed_inside_a_pre_hook_leaves_no_hook_without_its_post() {
    let world = World::new("hooks-daemon-alone");
    let (mut agent, notes, _hang, uid) = agent_inside_hook(&world, "pre");
    let first = hook_pids(&agent);
    agent.kill9();
    agent.start();
    assert_released(&agent, &notes, &uid, &first);
}
