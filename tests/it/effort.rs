//! What a backup may cost: what the settings and a policy say is what the worker's process, its control group and the
//! repository show; where a bound is not kept, the agent says so; a worker without memory ends its run and nothing else.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hestner_tests::booted::Hierarchy;
use hestner_tests::cgroups::controller_root;
use hestner_tests::processes::{self, Process};
use hestner_tests::units::{Unit, Units};
use hestner_tests::{Agent, AgentBuilder, Cmd, Hook, Moment, Service, World, files, is_root_or_skips};
use hestner_tests::{wait_for, wait_until};
use serde_json::json;

const WITHIN: Duration = Duration::from_secs(60);

/// A service whose dump goes on until a file is there, so that its worker stands still.
fn waiting_dump(world: &World, name: &str) -> (Service, PathBuf) {
    let gate = world.at(&format!("{name}-goes-on"));
    let body = format!("echo begin; while [ ! -e {} ]; do sleep 0.05; done; echo end", gate.display());
    let program = files::write_script(world.at(&format!("programs/{name}")), &body).display().to_string();
    (Service::command(name, &[&program], "dump.txt"), gate)
}

/// Nice value and I/O priority (as `ionice` says it) of every thread of a process.
fn priorities(pid: i32) -> Vec<(String, String)> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("threads").flatten();
    let of = |thread: std::fs::DirEntry| {
        let id = thread.file_name().to_string_lossy().into_owned();
        let stat = std::fs::read_to_string(thread.path().join("stat")).expect("a thread");
        let (_, fields) = stat.rsplit_once(") ").expect("a name");
        // The 19th field of proc(5) is the 17th after the name.
        let nice = fields.split(' ').nth(16).expect("a nice value").to_owned();
        (nice, Cmd::new("ionice").args(["-p", &id]).ok().trim().to_owned())
    };
    threads.map(of).collect()
}

/// Where the service's worker stands, with several threads.
fn wait_worker(look: impl Fn() -> Option<Process>) -> i32 {
    let has_threads = |pid: i32| std::fs::read_dir(format!("/proc/{pid}/task")).is_ok_and(|tasks| tasks.count() > 2);
    wait_for("a worker with threads", WITHIN, || look().filter(|p| has_threads(p.pid))).pid
}

#[test]
fn worker_and_all_its_threads_stand_where_settings_and_service_put_them() {
    let world = World::new("effort-priority");
    let ((usual, usual_goes_on), (last, last_goes_on)) = (waiting_dump(&world, "usual"), waiting_dump(&world, "last"));
    let last = last.worker_line("nice = 19").worker_line("io_class = \"idle\"").worker_line("threads = 3");
    let agent = world.agent().setting("worker", "nice = 13\nio_level = 5").allowed(usual).allowed(last).started();
    // Not the default: whoever runs tests may be as far behind already.
    for (service, gate, nice, io) in
        [("usual", usual_goes_on, "13", "best-effort: prio 5"), ("last", last_goes_on, "19", "idle")]
    {
        let run = agent.snapshot_started(service);
        let worker = wait_worker(|| agent.part("worker"));
        for (thread_nice, thread_io) in priorities(worker) {
            assert_eq!((thread_nice.as_str(), thread_io.as_str()), (nice, io), "{service}");
        }
        files::write(gate, "");
        assert_eq!(run.run().text("status"), "success");
    }
    let plan = agent.cli(&["snapshot", "last", "--dry-run"]).ok();
    assert!(plan.contains("nice 19, I/O idle, at most 512 MiB of memory, 3 threads, compression level 2"), "{plan}");
}

#[test]
fn policy_lowers_the_priority_and_chooses_what_the_floor_allows() {
    let world = World::new("effort-policy");
    let (dump, goes_on) = waiting_dump(&world, "dump");
    let agent = world.agent().setting("worker", "nice = 12").allowed(dump).started();
    let path = format!("/v1/servers/{}/snapshot-policy", agent.server_id);
    let policy = json!({
        "service": "dump", "cron": "", "retention_days": 30, "retention_count": 5, "destination": "local",
        "encryption_enabled": true, "priority": "idle", "compression_level": 9, "skip_caches": true,
    });
    assert_eq!(world.receiver.put(&path, &policy).status, 200);
    let applied = wait_for("the host's answer", WITHIN, || {
        let policies = world.receiver.get_json(&path);
        policies["items"].as_array()?.iter().find(|p| p["state"] != "pending").cloned()
    });
    assert_eq!((&applied["state"], &applied["priority"]), (&json!("applied"), &json!("idle")), "{applied}");
    let plan = agent.cli(&["snapshot", "dump", "--dry-run"]).ok();
    assert!(
        plan.contains("nice 19, I/O idle, at most 512 MiB of memory, compression level 9, without folders"),
        "{plan}"
    );
    let run = agent.snapshot_started("dump");
    let worker = wait_worker(|| agent.part("worker"));
    assert!(priorities(worker).iter().all(|found| *found == ("19".to_owned(), "idle".to_owned())));
    files::write(goes_on, "");
    assert_eq!(run.run().text("status"), "success");
}

#[test]
fn level_is_seen_in_what_is_stored_and_force_read_in_what_it_is_compared_with() {
    let world = World::new("effort-level");
    let words = |i: usize| format!("{} {} the same again and again {}\n", i * i, i % 97, i.wrapping_mul(2_654_435_761));
    let source = world.at("source");
    files::write(source.join("words.txt"), (0..20_000).map(words).collect::<String>());
    let service = |name: &str| Service::files(name, [&source]).destination(name);
    let agent = world
        .agent()
        .destination("fast", &world.at("fast"))
        .destination("small", &world.at("small"))
        .allowed(service("fast").worker_line("compression_level = 1"))
        .allowed(service("small").worker_line("compression_level = 19").worker_line("force_read = true"))
        .started();
    let [fast, small] = ["fast", "small"].map(|name| agent.snapshot_ok(name));
    let [fast_bytes, small_bytes] = [&fast, &small].map(|run| run.number("bytes_stored"));
    assert!(small_bytes * 100 < fast_bytes * 95, "level 19 stores {small_bytes}, level 1 {fast_bytes}");
    for (name, has_parent) in [("fast", true), ("small", false)] {
        let again = agent.snapshot_ok(name);
        let snapshots = agent.repository(name).snapshots();
        let newest = snapshots.iter().find(|s| s["id"] == again.snapshot_id()).expect("the snapshot");
        assert_eq!(newest["parent"].is_string(), has_parent, "whoever reads everything compares with none: {newest}");
    }
}

#[test]
fn mistakes_in_what_a_backup_may_cost_are_named_at_once() {
    let world = World::new("effort-mistakes");
    let agent = world
        .agent()
        .setting("worker", "nice = 20\nio_class = \"realtime\"\nmemory_max = \"12 parsecs\"")
        .setting("storage", "tries_max = \"many\"")
        .service(Service::files("docs", [world.source("source")]).worker_line("compression = 3"))
        .written();
    let ended = agent.cli(&["run"]);
    assert_eq!(ended.code, Some(64), "{ended}");
    for word in ["realtime", "12 parsecs", "expected u32", "`compression`"] {
        assert!(ended.stderr.contains(word), "{word} is not named: {ended}");
    }
    assert!(ended.stderr.contains("code: settings_invalid"), "{ended}");
}

#[test]
fn bound_that_nobody_keeps_is_said_by_status_doctor_and_log() {
    let world = World::new("effort-off");
    let mut agent = world.agent().allowed(Service::files("docs", [world.source("source")])).started();
    agent.snapshot_ok("docs");
    let said = agent.status()["worker_limits_off"].as_str().unwrap_or_default().to_owned();
    assert_eq!(said, "`memory_max` is not kept: runs are no units of systemd here");
    assert!(agent.cli(&["status"]).ok().contains(&said));
    let doctor = agent.cli(&["doctor", "--json"]).ok();
    assert!(doctor.contains("\"worker_limits_off\"") && doctor.contains("`memory_max` is not kept"), "{doctor}");
    assert!(files::lines(&agent.log).iter().any(|line| line.contains("worker_limits_off")));
    // Who asks for no bound misses none.
    agent.change(|builder| builder.setting("worker", "memory_max = 0"));
    assert_eq!(agent.status()["worker_limits_off"], "");
    assert!(!agent.cli(&["doctor", "--json"]).ok().contains("worker_limits_off"));
}

/// An agent whose runs are units that were handed controllers to divide.
struct Divided {
    // Dropped in this order.
    agent: Agent,
    units: Units,
    world: World,
}

const HANDED_ON: &[&str] = &["memory", "cpu"];

impl Divided {
    fn started(
        name: &str,
        hierarchy: Hierarchy,
        build: impl FnOnce(&World, AgentBuilder) -> AgentBuilder,
    ) -> Option<Self> {
        if !is_root_or_skips(name) {
            return None;
        }
        let world = World::new(name);
        let config = world.at("agent").join("agent.toml");
        let units = Units::start_handing_on(&world.at("units"), &config, hierarchy, HANDED_ON);
        let units = units.unwrap_or_else(|| panic!("this machine has no control groups of {hierarchy:?}"));
        let builder = world.agent().runner_socket(&units.runner_socket());
        let agent = build(&world, builder).started();
        Some(Self { agent, units, world })
    }

    fn worker(&self) -> Option<Process> {
        self.units.pids(Unit::Run).into_iter().filter_map(processes::read).find(|p| p.is_part("worker"))
    }
}

/// The group of a process in the hierarchy of version 1 that has a controller.
fn group_of(pid: i32, controller: &str) -> PathBuf {
    let of_process = files::lines(Path::new(&format!("/proc/{pid}/cgroup")));
    let path = of_process.iter().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        controllers.split(',').any(|name| name == controller).then(|| path.trim_start_matches('/').to_owned())
    });
    let path = path.unwrap_or_else(|| panic!("{controller} is not in {of_process:?}"));
    controller_root(controller).expect("a hierarchy").join(path)
}

fn number(file: PathBuf) -> u64 {
    let text = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    text.trim().parse().unwrap_or_else(|e| panic!("{}: {e}: {text}", file.display()))
}

fn worker_is_inside_its_bounds(name: &str, hierarchy: Hierarchy) {
    let mut gate = PathBuf::new();
    let all = Divided::started(name, hierarchy, |world, builder| {
        let (dump, goes_on) = waiting_dump(world, "dump");
        gate = goes_on;
        builder.setting("worker", "memory_max = \"96 MiB\"\ncpu_percent_max = 150").allowed(dump)
    });
    let Some(all) = all else { return };
    let run = all.agent.snapshot_started("dump");
    let worker = wait_worker(|| all.worker());
    let (memory, cpu) = (group_of(worker, "memory"), group_of(worker, "cpu"));
    assert_eq!(number(memory.join("memory.limit_in_bytes")), 96 << 20);
    assert_eq!(number(cpu.join("cpu.cfs_quota_us")) * 100, number(cpu.join("cpu.cfs_period_us")) * 150);
    let inside = files::lines(&memory.join("cgroup.procs"));
    assert_eq!(inside, [worker.to_string()], "the worker alone: the runner must live when it dies");
    files::write(&gate, "");
    assert_eq!(run.run().text("status"), "success");
    wait_until("the worker's groups to be gone", WITHIN, || !memory.exists() && !cpu.exists());
    assert_eq!(all.agent.status()["worker_limits_off"], "");
    let log = files::lines(&all.world.at("units/units.log")).join("\n");
    assert!(!log.contains("worker_limits_off"), "{log}");
}

#[test]
fn worker_is_inside_its_bounds_where_systemd_uses_version_1() {
    worker_is_inside_its_bounds("effort-v1", Hierarchy::V1);
}

#[test]
fn worker_is_inside_its_bounds_where_systemd_uses_version_2_beside_controllers_of_version_1() {
    worker_is_inside_its_bounds("effort-hybrid", Hierarchy::V2);
}

#[test]
fn worker_without_memory_ends_its_run_by_name_and_nothing_else() {
    const NAME: &str = "effort-memory";
    let mut notes = PathBuf::new();
    let all = Divided::started(NAME, Hierarchy::V1, |world, builder| {
        notes = world.at("notes.txt");
        let hook = files::write_script(world.at("hook"), &format!("echo \"$1\" >>{}", notes.display()));
        let hook = hook.to_str().expect("UTF-8");
        let source = world.bulky_source("source", 96 << 20);
        let service = Service::files("docs", [source])
            .worker_line("threads = 24")
            .hook(Hook::new("app").pre(&[hook, "pre"]).post(&[hook, "post"]));
        builder.setting("worker", "memory_max = \"64 MiB\"").allowed(service)
    });
    let Some(mut all) = all else { return };
    let run = all.agent.snapshot("docs");
    run.assert_failed("worker_killed");
    let message = run.text("error_message");
    for word in ["out of memory", "64 MiB", "memory_max"] {
        assert!(message.contains(word), "{word} is not in: {message}");
    }
    assert_eq!(files::lines(&notes), ["pre", "post"], "hooks were released");
    assert!(all.agent.daemon_is_alive());
    all.agent.wait_repository_holds(&[]);
    assert_eq!(all.agent.repository("local").check().code, Some(0));
    let row = all.world.receiver.wait_run_ended(all.agent.server_id, run.uid());
    assert_eq!(row["error_class"], "worker_killed", "{row}");
    // With what it needs it goes on, and nobody has to do anything else.
    let text = std::fs::read_to_string(&all.agent.config).expect("settings");
    files::write(&all.agent.config, text.replace("64 MiB", "2 GiB"));
    let good = all.agent.snapshot_ok("docs");
    all.agent.assert_repository_holds(&[&good]);
    all.agent.stop();
}

#[test]
fn run_in_the_making_has_a_rate_a_whole_and_an_estimate() {
    let world = World::new("effort-progress");
    let source = world.bulky_source("source", 128 << 20);
    files::small_tree(&source, 40, 2_000);
    let agent = world.agent().allowed(Service::files("docs", [&source]).worker_line("threads = 1")).started();
    let archiver = agent.archiver();
    archiver.hold_at(Moment::Pack(2));
    let run = agent.command(&["snapshot", "docs"]).start();
    let path = format!("/v1/servers/{}/snapshots", agent.server_id);
    let progress = wait_for("progress with all of it", WITHIN, || {
        let rows = world.receiver.get_json(&path);
        let progress = rows["items"].as_array()?.first()?["progress"].clone();
        (progress["phase"] == "archive" && progress["seconds_remaining"].as_u64()? > 0).then_some(progress)
    });
    assert_eq!(progress["files_total"], 41, "{progress}");
    let (done, total) = (progress["bytes_done"].as_u64(), progress["bytes_total"].as_u64());
    assert!(total > Some(128 << 20) && done < total && progress["bytes_per_second"].as_u64() > Some(0), "{progress}");
    archiver.go_on();
    let ended = run.ended();
    assert_eq!(ended.code, Some(0), "{ended}");
    let phases: Vec<&str> = ended.stderr.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert!(phases.contains(&"archive"), "{ended}");
    // Not one for each half second: at most one in five seconds, and one a phase.
    assert!(phases.len() < 25, "{ended}");
    let silent = agent.cli(&["snapshot", "docs", "--json"]);
    assert_eq!((silent.code, silent.stderr.as_str()), (Some(0), ""), "{silent}");
}
