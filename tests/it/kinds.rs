//! Kinds of point, each from the settings to the restored files: what is stored is one moment although
//! somebody writes all the time, and nothing stays mounted, frozen or snapshotted.
//!
//! LVM and ZFS need kernel parts that are not everywhere: their programs are played by scripts that keep
//! their command lines and answer as the real ones do (recorded from LVM 2.03 and OpenZFS 2.1).

use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use hestner_tests::mounts::Mounted;
use hestner_tests::{
    Agent, Cmd, Hook, Moment, Run, Service, World, clock, files, is_root_or_skips, processes, tree, wait_until,
};

/// Appends a numbered line to `log` in a folder, time and again, until its handle goes.
struct Appender {
    child: Child,
    log: PathBuf,
}

impl Appender {
    fn start(world: &World, folder: &Path) -> Self {
        let log = folder.join("log");
        let script = "i=0; while :; do i=$((i+1)); echo $i >>\"$0\"; sleep 0.005; done";
        let child = Cmd::new("sh").args(["-c", script]).arg(&log).spawn_logged(&world.at("appender.txt"));
        let appender = Self { child, log };
        wait_until("the first lines", Duration::from_secs(20), || files::lines(&appender.log).len() > 3);
        appender
    }

    fn lines(&self) -> usize {
        files::lines(&self.log).len()
    }
}

impl Drop for Appender {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Mounts below the world's folder, and folders of points: what a run must not leave behind.
fn mounts(world: &World) -> Vec<String> {
    let mounts = files::lines(Path::new("/proc/self/mounts"));
    let points = mounts.iter().filter_map(|line| line.split(' ').nth(1)).map(str::to_owned);
    points.filter(|point| Path::new(point).starts_with(world.path())).collect()
}

fn own_remains(folder: &Path) -> Vec<String> {
    let names = std::fs::read_dir(folder).expect("a folder").flatten().map(|entry| entry.file_name());
    names.map(|name| name.to_string_lossy().into_owned()).filter(|name| name.starts_with(".hestner-")).collect()
}

/// The log as it is stored by a run.
fn restored_log(world: &World, agent: &Agent, run: &Run, source: &Path) -> Vec<String> {
    let target = world.at(&format!("restored-{}", run.uid()));
    agent.restore(run.uid(), &target).ok();
    files::lines(&tree::restored(&target, source).join("log"))
}

/// Copies the filesystem as a storage would: the image that the loop device lies on.
struct Storage {
    world_at: PathBuf,
}

impl Storage {
    fn of(world: &World, disk: &Mounted, kind: &str) -> Self {
        let at = world.at("storage");
        std::fs::create_dir_all(at.join("copy")).expect("a folder");
        let (disk, folder) = (disk.path().display(), at.display());
        let image = format!("{}.image", disk);
        // A btrfs knows its devices by an id, and a second one of the same id is the first one.
        let (take, open, close) = match kind {
            "btrfs" => (format!("cp -a {disk}/. {folder}/copy/"), String::new(), format!("rm -rf {folder}/copy/*")),
            kind => {
                // An xfs replays its log when it is mounted, and a loop device that is asked for `ro` forbids it.
                let options = if kind == "xfs" { "loop,nouuid" } else { "loop" };
                (
                    format!("cp --sparse=always {image} {folder}/copy.image"),
                    format!("mount -o {options} {folder}/copy.image {folder}/copy"),
                    format!("! mountpoint -q {folder}/copy || umount {folder}/copy; rm -f {folder}/copy.image"),
                )
            }
        };
        let note =
            format!("env | grep ^HESTNER_ >{folder}/told; cat $HESTNER_MOUNT/data/log >{folder}/at-point || true");
        files::write_script(at.join("take"), &format!("set -e; echo take >>{folder}/calls; {note}; {take}"));
        files::write_script(at.join("open"), &format!("set -e; echo open >>{folder}/calls; {open}"));
        files::write_script(at.join("close"), &format!("echo close >>{folder}/calls; {close}"));
        Self { world_at: at }
    }

    fn program(&self, name: &str) -> String {
        self.world_at.join(name).display().to_string()
    }

    fn service(&self, source: &Path) -> Service {
        self.service_of("docs", source)
    }

    fn service_of(&self, name: &str, source: &Path) -> Service {
        Service::files(name, [source])
            .point_line("kind = \"fsfreeze\"")
            .point_program("command", &[&self.program("take")])
            .point_program("after_command", &[&self.program("open")])
            .point_program("remove_command", &[&self.program("close")])
            .point_line(&format!("read_from = {:?}", self.world_at.join("copy")))
    }

    fn calls(&self) -> Vec<String> {
        files::lines(&self.world_at.join("calls"))
    }
}

/// Taken apart with the world first: what is bound last goes first, so the mount goes before its folder.
struct OnDisk {
    world: World,
    disk: Mounted,
    source: PathBuf,
}

fn on_disk(name: &str, kind: &str) -> OnDisk {
    let world = World::new(name);
    let disk = Mounted::of_kind(kind, &world.at("disk"));
    let source = files::small_tree(&disk.path().join("data"), 10, 1_000);
    OnDisk { world, disk, source }
}

#[test]
fn command_on_a_frozen_filesystem_stores_the_moment_of_the_freeze() {
    if !is_root_or_skips("command_on_a_frozen_filesystem_stores_the_moment_of_the_freeze") {
        return;
    }
    for kind in ["ext4", "xfs", "btrfs"] {
        let OnDisk { world, disk, source } = on_disk(&format!("kinds-freeze-{kind}"), kind);
        let storage = Storage::of(&world, &disk, kind);
        let held = mounts(&world);
        let appender = Appender::start(&world, &source);
        let agent = world.agent().allowed(storage.service(&source).consistency("filesystem")).started();
        let run = agent.snapshot_ok("docs");
        assert_eq!(run.text("consistency_achieved"), "filesystem", "{kind}: {run:?}");
        assert!((1..7_000).contains(&run.number("freeze_ms")), "{kind}: {run:?}");
        assert_eq!(storage.calls(), ["take", "open", "close"], "{kind}");
        let told = files::lines(&world.at("storage/told")).join("\n");
        for part in ["HESTNER_SERVICE=docs", &format!("HESTNER_RUN_UID={}", run.uid()), "HESTNER_READ_FROM="] {
            assert!(told.contains(part), "{kind}: {part} is not in {told}");
        }
        // Everything that the frozen filesystem held, and not a line more.
        let at_point = files::lines(&world.at("storage/at-point"));
        assert_eq!(restored_log(&world, &agent, &run, &source), at_point, "{kind}");
        let lines = appender.lines();
        assert!(lines > at_point.len(), "{kind}: the writer went on");
        wait_until("the writer to go on", Duration::from_secs(5), || appender.lines() > lines);
        assert!(!disk.is_frozen(), "{kind}");
        assert_eq!(mounts(&world), held, "{kind}");
        drop(appender);
    }
}

#[test]
fn command_that_hangs_is_ended_with_all_it_started_and_the_filesystem_thaws() {
    if !is_root_or_skips("command_that_hangs_is_ended_with_all_it_started_and_the_filesystem_thaws") {
        return;
    }
    let OnDisk { world, disk, source } = on_disk("kinds-hangs", "ext4");
    let storage = Storage::of(&world, &disk, "ext4");
    let marks = world.at("marks");
    std::fs::create_dir_all(&marks).expect("a folder");
    let script = format!("touch {0}/frozen; setsid sh -c 'sleep 300; touch {0}/never' & sleep 300", marks.display());
    files::write_script(world.at("storage/take"), &script);
    let appender = Appender::start(&world, &source);
    let agent = world.agent().setting("freeze", "window = \"1s\"").allowed(storage.service(&source)).started();
    let snapshot = agent.snapshot_started("docs");
    wait_until("the command to be reached", Duration::from_secs(30), || marks.join("frozen").exists());
    let begun = clock::monotonic();
    assert!(disk.is_frozen(), "the command runs while it is frozen");
    let lines = appender.lines();
    wait_until("the writer to go on", Duration::from_secs(2), || appender.lines() > lines);
    assert!(clock::monotonic() - begun < Duration::from_secs(2), "thawed within the window and a second");
    let run = snapshot.run();
    run.assert_failed("freeze_timeout");
    let left = processes::all().into_iter().filter(|p| p.names(&marks.display().to_string())).count();
    assert_eq!(left, 0, "nothing of the command is left");
    assert_eq!(storage.calls(), ["close"], "what a failed command made is removed");
    assert!(!disk.is_frozen());
    agent.assert_repository_holds(&[]);
}

#[test]
fn freeze_of_somebody_else_fails_the_run_and_is_left_as_it_is() {
    if !is_root_or_skips("freeze_of_somebody_else_fails_the_run_and_is_left_as_it_is") {
        return;
    }
    for kind in ["ext4", "xfs", "btrfs"] {
        let OnDisk { world, disk, source } = on_disk(&format!("kinds-busy-{kind}"), kind);
        let storage = Storage::of(&world, &disk, kind);
        let agent = world.agent().allowed(storage.service(&source)).started();
        Cmd::new("sync").arg("-f").arg(&source).ok();
        disk.freeze();
        let run = agent.snapshot("docs");
        let still = disk.thaw();
        run.assert_failed("freeze_busy");
        assert!(still, "{kind}: it is not ours to thaw");
        assert!(!storage.calls().contains(&"take".to_owned()), "{kind}: no point was taken");
        agent.snapshot_ok("docs");
    }
}

#[test]
fn what_must_never_be_frozen_is_refused_by_name() {
    if !is_root_or_skips("what_must_never_be_frozen_is_refused_by_name") {
        return;
    }
    let OnDisk { world, disk, source } = on_disk("kinds-never", "ext4");
    let storage = Storage::of(&world, &disk, "ext4");
    // Behind a loop device, behind a file on that very disk.
    let inside = Mounted::ext4(&disk.path().join("inside"), 40);
    let service = || storage.service(&source);
    let builders = [
        ("state", world.agent_named("state").state(&disk.path().join("state")), "the agent's state"),
        ("loop", world.agent_named("loop").state(&inside.path().join("state")), "the agent's state"),
        (
            "local",
            world.agent_named("local").destination("local", &disk.path().join("repo")),
            "the destination `local`",
        ),
    ];
    for (name, builder, what) in builders {
        let agent = builder.allowed(service()).started();
        let run = agent.snapshot("docs");
        run.assert_failed("point_failed");
        let message = run.text("error_message");
        assert!(message.contains("cannot be frozen") && message.contains(what), "{name}: {run:?}");
        assert!(message.contains(&disk.path().display().to_string()), "{name}: {run:?}");
    }
    // A place that is no filesystem of its own.
    let elsewhere = storage.service_of("elsewhere", &world.source("elsewhere"));
    let agent = world.agent_named("others").allowed(elsewhere).started();
    let run = agent.snapshot("elsewhere");
    run.assert_failed("point_failed");
    assert!(run.text("error_message").contains("cannot be frozen"), "{run:?}");
    assert!(storage.calls().is_empty(), "nothing was frozen and no command run");
}

#[test]
fn copy_that_cannot_be_read_is_not_stored_as_if_it_were_one() {
    if !is_root_or_skips("copy_that_cannot_be_read_is_not_stored_as_if_it_were_one") {
        return;
    }
    let OnDisk { world, disk, source: _ } = on_disk("kinds-unread", "ext4");
    let storage = Storage::of(&world, &disk, "ext4");
    // The whole filesystem is the source, so that an empty mount point would do.
    files::write_script(world.at("storage/open"), "true");
    files::write(disk.path().join("data/log"), "one\n");
    let agent = world.agent().allowed(storage.service(disk.path())).started();
    let run = agent.snapshot("docs");
    run.assert_failed("point_failed");
    assert!(run.text("error_message").contains("was the copy mounted?"), "{run:?}");
    // And a command that fails, with what it said.
    files::write_script(world.at("storage/open"), "echo no such volume >&2; exit 3");
    let run = agent.snapshot("docs");
    run.assert_failed("point_failed");
    let message = run.text("error_message");
    assert!(message.contains("`after_command` ended with exit code 3: no such volume"), "{run:?}");
    assert_eq!(storage.calls().iter().filter(|call| *call == "close").count(), 2, "{:?}", storage.calls());
    agent.assert_repository_holds(&[]);
    assert!(!disk.is_frozen());
}

#[test]
fn copy_that_shares_blocks_is_one_moment_while_hooks_hold_the_writers() {
    if !is_root_or_skips("copy_that_shares_blocks_is_one_moment_while_hooks_hold_the_writers") {
        return;
    }
    for kind in ["xfs", "btrfs"] {
        let OnDisk { world, disk, source } = on_disk(&format!("kinds-reflink-{kind}"), kind);
        tree::odd(&disk.path().join("data/odd"));
        let appender = Appender::start(&world, &source);
        let pid = appender.child.id();
        let at_point = world.at("at-point");
        // `sleep` children of the writer end by themselves; the writer itself stands still.
        let pause = format!("kill -STOP {pid}; sleep 0.1; cat {}/log >{}", source.display(), at_point.display());
        let pause = files::write_script(world.at("hooks/pause"), &pause).display().to_string();
        let resume = files::write_script(world.at("hooks/resume"), &format!("kill -CONT {pid}"));
        let hook = Hook::new("app").pre(&[&pause]).post(&[&resume.display().to_string()]);
        // A folder on the filesystem, and the whole of it: there the copy has to lie inside.
        let service =
            |name: &str, path: &Path| Service::files(name, [path]).point_line("kind = \"reflink\"").hook(hook.clone());
        let agent = world
            .agent()
            .allowed(service("folder", &source).consistency("application"))
            .allowed(service("whole", disk.path()))
            .started();
        for (name, path) in [("folder", source.as_path()), ("whole", disk.path())] {
            let before = tree::manifest(&disk.path().join("data/odd"));
            let run = agent.snapshot_ok(name);
            assert_eq!(run.text("consistency_achieved"), "application", "{kind}: {run:?}");
            let held = files::lines(&at_point);
            let target = world.at(&format!("restored-{name}"));
            agent.restore(run.uid(), &target).ok();
            let restored = tree::restored(&target, path);
            let data = if name == "whole" { restored.join("data") } else { restored.clone() };
            assert_eq!(files::lines(&data.join("log")), held, "{kind} {name}");
            tree::assert_same_manifest(&before, &tree::manifest(&data.join("odd")));
            assert_eq!(own_remains(&restored), Vec::<String>::new(), "{kind} {name}: our own folder is not stored");
            assert!(appender.lines() > held.len(), "{kind}: the writer went on");
            assert_eq!(own_remains(disk.path()), Vec::<String>::new(), "{kind} {name}");
        }
        // Without hooks it is a copy, and no moment.
        let mut agent = agent;
        agent.change(|builder| builder.allowed(Service::files("bare", [&source]).point_line("kind = \"reflink\"")));
        assert_eq!(agent.snapshot_ok("bare").text("consistency_achieved"), "none", "{kind}");
        assert_eq!(own_remains(disk.path()), Vec::<String>::new(), "{kind}");
        // A run that dies while it reads its copy leaves none for long.
        let archiver = agent.archiver();
        archiver.hold_at(Moment::Store);
        agent.cli(&["snapshot", "bare", "--detach"]).ok();
        archiver.wait_reached(Moment::Store);
        assert_eq!(own_remains(disk.path()).len(), 1, "{kind}: the archiver reads the copy");
        processes::kill(agent.wait_part("runner").pid);
        archiver.go_on();
        wait_until("the copy to be gone", Duration::from_secs(60), || own_remains(disk.path()).is_empty());
        drop(appender);
    }
}

#[test]
fn kind_that_a_place_cannot_have_is_refused_with_the_reason() {
    if !is_root_or_skips("kind_that_a_place_cannot_have_is_refused_with_the_reason") {
        return;
    }
    let OnDisk { world, disk: _disk, source } = on_disk("kinds-unfit", "ext4");
    let of = |kind: &str| Service::files(kind, [&source]).point_line(&format!("kind = {kind:?}"));
    let agent = world.agent().allowed(of("btrfs")).allowed(of("reflink")).started();
    for (kind, reason) in [("btrfs", "not on btrfs"), ("reflink", "ext4 cannot share blocks")] {
        let run = agent.snapshot(kind);
        run.assert_failed("point_failed");
        let message = run.text("error_message");
        assert!(message.contains(reason) && message.contains(kind), "{run:?}");
    }
    assert_eq!(own_remains(&source), Vec::<String>::new());
}

#[test]
fn window_beyond_the_ceiling_and_points_that_make_no_sense_are_named_at_once() {
    let world = World::new("kinds-settings");
    let source = world.source("source");
    let service = Service::files("docs", [&source])
        .point_line("kind = \"fsfreeze\"")
        .point_line("containers = [\"db\", \"db\"]")
        .point_line("downtime_max = \"2h\"");
    let agent = world.agent().setting("freeze", "window = \"31s\"").allowed(service).written();
    let ended = agent.cli(&["run"]);
    assert_eq!(ended.code, Some(64), "{ended}");
    for part in
        ["`freeze.window`", "at most 30 s", "needs `command`", "needs `read_from`", "listed twice", "at most 1h"]
    {
        assert!(ended.stderr.contains(part), "{part} is not in {ended}");
    }
}

/// Scripts in the place of LVM's, ZFS's and `mount`'s programs. A snapshot is a copy of the disk's files,
/// mounting it binds that folder; what they were asked for stands in `calls`.
struct Played {
    folder: PathBuf,
}

impl Played {
    fn new(world: &World, disk: &Mounted) -> Self {
        let folder = world.at("played");
        std::fs::create_dir_all(&folder).expect("a folder");
        let played = Self { folder };
        let here = played.folder.display().to_string();
        let number = Cmd::new("stat").args(["-c", "%Hd %Ld"]).arg(disk.path()).ok();
        let (major, minor) = number.trim().split_once(' ').expect("two numbers");
        let row = |name: &str, attr: &str, (major, minor): (&str, &str), used: &str| {
            format!(
                "{{\"vg_name\":\"vg0\",\"lv_name\":\"{name}\",\"lv_path\":\"/dev/vg0/{name}\",\"lv_attr\":\"{attr}\",\"lv_layout\":\"linear\",\"lv_kernel_major\":\"{major}\",\"lv_kernel_minor\":\"{minor}\",\"pool_lv\":\"\",\"data_percent\":\"{used}\",\"metadata_percent\":\"\"}}"
            )
        };
        let origin = row("data", "owi-aos---", (major, minor), "");
        let snapshot = row("$(cat $HERE/name)", "$(cat $HERE/attr)", ("254", "9"), "$(cat $HERE/used)");
        files::write(played.folder.join("used"), "1.50");
        files::write(played.folder.join("attr"), "swi-aos---");
        let script = |name: &str, body: &str| {
            let all = format!("HERE={here}\necho \"{name} $*\" >>$HERE/calls\n{body}");
            files::write_script(played.folder.join(name), &all);
        };
        script(
            "lvs",
            &format!(
                "if [ -e $HERE/name ]; then more=\",{}\"; fi\necho \"{{\\\"report\\\":[{{\\\"lv\\\":[{}$more]}}]}}\"",
                snapshot.replace('"', "\\\""),
                origin.replace('"', "\\\"")
            ),
        );
        let copy = format!("cp -a {}/. $HERE/copy/", disk.path().display());
        script(
            "lvcreate",
            // As LVM does it: the volume, and the device below it, are suspended meanwhile.
            &format!(
                "touch $HERE/suspended-vg0-data $HERE/suspended-vg0-data-real\n\
                 mkdir $HERE/copy && {copy} && echo -n $3 >$HERE/name\n\
                 [ -e $HERE/hang ] && sleep 300\n\
                 rm -f $HERE/suspended-*\nexit 0"
            ),
        );
        script(
            "dmsetup",
            "for device; do :; done\n\
             case $1 in\n\
             info) if [ -e $HERE/suspended-$device ]; then echo Suspended; else echo Active; fi;;\n\
             resume) rm $HERE/suspended-$device;;\n\
             esac",
        );
        script("lvremove", "rm -rf $HERE/copy $HERE/name");
        script(
            "zfs",
            &format!(
                "case \"$1 $2 $4\" in\n\
                 'list -Hp filesystem') [ -e $HERE/away ] || if [ $6 = name ]; then echo {pool}; else printf '{}\\t{}\\tyes\\n'; fi;;\n\
                 'list -Hp snapshot') [ ! -e $HERE/name ] || cat $HERE/name;;\n\
                 snapshot*) mkdir $HERE/copy && {copy} && echo $2 >$HERE/name;;\n\
                 destroy*) rm -rf $HERE/copy $HERE/name;;\n\
                 esac",
                dataset(disk),
                disk.path().display(),
                pool = dataset(disk).split('/').next().unwrap_or_default(),
            ),
        );
        script("mount", "for last; do :; done; exec mount --bind -o ro $HERE/copy $last");
        script("umount", "exec umount \"$@\"");
        played
    }

    fn agent(&self, builder: hestner_tests::AgentBuilder) -> hestner_tests::AgentBuilder {
        ["lvs", "lvcreate", "lvremove", "dmsetup", "zfs", "mount", "umount"]
            .into_iter()
            .fold(builder, |builder, name| builder.setting("freeze", &format!("{name} = {:?}", self.folder.join(name))))
    }

    /// Calls that change something, with the run's id replaced.
    fn calls(&self, run: &Run) -> Vec<String> {
        let all = files::lines(&self.folder.join("calls")).into_iter();
        let looks = |line: &String| ["lvs ", "zfs list", "dmsetup info"].iter().any(|look| line.starts_with(look));
        all.filter(|line| !looks(line)).map(|line| line.replace(run.uid(), "RUN")).collect()
    }

    fn is_clean(&self) -> bool {
        !self.folder.join("copy").exists() && !self.folder.join("name").exists()
    }
}

/// What a disk is mounted from: that is how a dataset is known.
fn dataset(disk: &Mounted) -> String {
    Cmd::new("findmnt").args(["-n", "-o", "SOURCE", "--mountpoint"]).arg(disk.path()).ok().trim().to_owned()
}

#[test]
fn logical_volume_is_snapshotted_mounted_read_and_removed() {
    if !is_root_or_skips("logical_volume_is_snapshotted_mounted_read_and_removed") {
        return;
    }
    let OnDisk { world, disk, source } = on_disk("kinds-lvm", "ext4");
    let played = Played::new(&world, &disk);
    let service = Service::files("docs", [&source]).point_line("kind = \"lvm\"").point_line("snapshot_size = \"2G\"");
    let mut agent = played.agent(world.agent()).allowed(service.consistency("filesystem")).started();
    let archiver = agent.archiver();
    let held = mounts(&world);
    let before = tree::manifest(&source);
    let point = agent.state().join("points");

    archiver.hold_at(Moment::Store);
    let snapshot = agent.snapshot_started("docs");
    archiver.wait_reached(Moment::Store);
    assert_eq!(mounts(&world).len(), held.len() + 1, "the archiver reads the mounted snapshot");
    files::write(source.join("part0/file0.txt"), "changed later");
    files::write(source.join("written-later.txt"), "later");
    archiver.go_on();
    let run = snapshot.run();
    assert_eq!(run.text("status"), "success", "{run:?}");
    assert_eq!(run.text("consistency_achieved"), "filesystem", "{run:?}");
    let target = world.at("restored");
    agent.restore(run.uid(), &target).ok();
    tree::assert_same_manifest(&before, &tree::manifest(&tree::restored(&target, &source)));
    let at = format!("{}/RUN-0", point.display());
    let expected = [
        "lvcreate --snapshot --name hestner-RUN-0 --size 2G --yes -- vg0/data".to_owned(),
        format!("mount -t ext4 -o ro,nosuid,nodev,noexec -- /dev/vg0/hestner-RUN-0 {at}"),
        format!("umount -- {at}"),
        "lvremove --yes -- vg0/hestner-RUN-0".to_owned(),
    ];
    assert_eq!(played.calls(&run), expected);
    assert_eq!(mounts(&world), held);
    assert!(played.is_clean());

    // A snapshot that ran full is no point in time, whether the kernel or the limit says so.
    for (used, attr) in [("80.01", "swi-aos---"), ("100.00", "swi-Ios---")] {
        files::write(world.at("played/used"), used);
        files::write(world.at("played/attr"), attr);
        let run = agent.snapshot("docs");
        run.assert_failed("point_overflow");
        assert!(run.text("error_message").contains("vg0/hestner-"), "{run:?}");
        assert_eq!(mounts(&world), held);
        assert!(played.is_clean(), "{used}");
    }
    files::write(world.at("played/used"), "1.00");
    files::write(world.at("played/attr"), "swi-aos---");

    // Killed while it is made, and while it is read: the next start removes it by the note.
    for hang in ["lvcreate", "store"] {
        if hang == "store" {
            archiver.hold_at(Moment::Store);
        } else {
            drop(files::write(world.at("played/hang"), ""))
        }
        agent.cli(&["snapshot", "docs", "--detach"]).ok();
        wait_until("the snapshot to be made", Duration::from_secs(30), || world.at("played/name").exists());
        if hang == "store" {
            archiver.wait_reached(Moment::Store);
        }
        let below = processes::descendants(agent.pid());
        agent.kill9();
        below.iter().for_each(|process| processes::kill(process.pid));
        processes::kill_all_naming(&world.at("played/lvcreate"));
        archiver.go_on();
        let _ = std::fs::remove_file(world.at("played/hang"));
        assert!(!played.is_clean(), "{hang}");
        let suspended = || world.at("played/suspended-vg0-data").exists();
        assert_eq!(suspended(), hang == "lvcreate", "whoever writes to the volume waits");
        // Before anything else, and without the daemon.
        agent.cli(&["thaw"]).ok();
        assert!(!suspended() && !world.at("played/suspended-vg0-data-real").exists());
        agent.start();
        wait_until("the snapshot to be gone", Duration::from_secs(60), || played.is_clean() && mounts(&world) == held);
    }
    assert_eq!(std::fs::read_dir(&point).expect("a folder").count(), 0, "no folder of a point is left");
    agent.snapshot_ok("docs");
}

#[test]
fn dataset_is_snapshotted_mounted_read_and_destroyed() {
    if !is_root_or_skips("dataset_is_snapshotted_mounted_read_and_destroyed") {
        return;
    }
    let OnDisk { world, disk, source } = on_disk("kinds-zfs", "ext4");
    let played = Played::new(&world, &disk);
    let service = Service::files("docs", [&source]).point_line("kind = \"zfs\"").consistency("filesystem");
    let elsewhere = Service::files("elsewhere", [world.source("elsewhere")]).point_line("kind = \"zfs\"");
    let agent = played.agent(world.agent()).allowed(service).allowed(elsewhere).started();
    let held = mounts(&world);
    let before = tree::manifest(&source);
    let run = agent.snapshot_ok("docs");
    let target = world.at("restored");
    agent.restore(run.uid(), &target).ok();
    tree::assert_same_manifest(&before, &tree::manifest(&tree::restored(&target, &source)));
    let (name, at) = (dataset(&disk), format!("{}/RUN-0", agent.state().join("points").display()));
    let expected = [
        format!("zfs snapshot {name}@hestner-RUN"),
        format!("mount -t zfs -o ro,nosuid,nodev,noexec -- {name}@hestner-RUN {at}"),
        format!("umount -- {at}"),
        format!("zfs destroy {name}@hestner-RUN"),
    ];
    assert_eq!(played.calls(&run), expected);
    assert_eq!(mounts(&world), held);
    assert!(played.is_clean());
    let run = agent.snapshot("elsewhere");
    run.assert_failed("point_failed");
    assert!(run.text("error_message").contains("not a ZFS dataset"), "{run:?}");
}
