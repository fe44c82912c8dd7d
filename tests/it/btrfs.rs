//! Sources on btrfs: a read-only snapshot is the point in time, and it never outlives its run.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hestner_tests::mounts::Mounted;
use hestner_tests::{Cmd, Hook, Moment, Service, World, files, is_root_or_skips, processes, tree, wait_until};

/// Subvolumes of a filesystem, by stock `btrfs`.
fn subvolumes(disk: &Mounted) -> Vec<String> {
    let list = Cmd::new("btrfs").args(["subvolume", "list"]).arg(disk.path()).ok();
    // "ID 257 gen 9 top level 5 path a/b": the generation changes with every write.
    list.lines().filter_map(|line| line.split_once(" path ")).map(|(_, path)| path.to_owned()).collect()
}

fn subvolume(path: &Path) -> PathBuf {
    Cmd::new("btrfs").args(["subvolume", "create"]).arg(path).ok();
    path.to_owned()
}

/// Taken apart with the world first: what is bound last goes first, so the mount goes before its folder.
struct OnBtrfs {
    world: World,
    disk: Mounted,
}

fn on_btrfs(name: &str) -> OnBtrfs {
    let world = World::new(name);
    OnBtrfs { disk: Mounted::btrfs(&world.at("disk")), world }
}

#[test]
fn snapshot_holds_one_moment_and_leaves_no_subvolume() {
    if !is_root_or_skips("snapshot_holds_one_moment_and_leaves_no_subvolume") {
        return;
    }
    let OnBtrfs { world, disk } = on_btrfs("btrfs-moment");
    for (name, source) in [("plain", disk.path().join("plain")), ("volume", subvolume(&disk.path().join("volume")))] {
        files::small_tree(&source, 20, 2_000);
        let before = tree::manifest(&source);
        let held = subvolumes(&disk).len();
        let agent = world.agent_named(name).allowed(Service::files("docs", [&source])).started();
        agent.archiver().hold_at(Moment::Store);
        let snapshot = agent.snapshot_started("docs");
        agent.archiver().wait_reached(Moment::Store);
        assert_eq!(subvolumes(&disk).len(), held + 1, "the archiver reads a snapshot");
        files::write(source.join("written-later.txt"), "later");
        files::write(source.join("part0/file0.txt"), "changed later");
        std::fs::remove_file(source.join("part1/file1.txt")).expect("a file to remove");
        agent.archiver().go_on();
        let run = snapshot.run();
        assert_eq!(run.text("status"), "success", "{run:?}");
        assert!(
            ["crash", "filesystem"].contains(&run.text("consistency_achieved")),
            "no hook, no application: {run:?}"
        );
        assert_eq!(subvolumes(&disk).len(), held, "the snapshot is gone");

        let target = world.at(&format!("restored-{name}"));
        agent.restore(run.uid(), &target).ok();
        tree::assert_same_manifest(&before, &tree::manifest(&tree::restored(&target, &source)));
        let stock = world.at(&format!("stock-{name}"));
        agent.repository("local").restore(&run.snapshot_id(), &stock);
    }
}

#[test]
fn hooks_around_the_snapshot_make_it_application_consistent() {
    if !is_root_or_skips("hooks_around_the_snapshot_make_it_application_consistent") {
        return;
    }
    let OnBtrfs { world, disk } = on_btrfs("btrfs-hooks");
    let source = disk.path().join("data");
    files::small_tree(&source, 5, 500);
    let notes = world.at("notes.txt");
    let note = files::write_script(world.at("hooks/note"), &format!("echo \"$*\" >> {}", notes.display()));
    let note = note.to_string_lossy().into_owned();
    let service = Service::files("docs", [&source]).consistency("application");
    let service = service.hook(Hook::new("db").pre(&[&note, "pre"]).post(&[&note, "post"]));
    let agent = world.agent().allowed(service).started();
    agent.archiver().hold_at(Moment::Store);
    let snapshot = agent.snapshot_started("docs");
    agent.archiver().wait_reached(Moment::Store);
    assert_eq!(files::lines(&notes), ["pre", "post"], "the service waits for the point, not for the archive");
    agent.archiver().go_on();
    let run = snapshot.run();
    assert_eq!(run.text("status"), "success", "{run:?}");
    assert_eq!(run.text("consistency_achieved"), "application", "{run:?}");
    assert_eq!(run.text("consistency_requested"), "application", "{run:?}");
    assert_eq!(files::lines(&notes), ["pre", "post"]);
}

#[test]
fn service_that_asks_for_more_than_its_place_can_give_is_not_stored() {
    let world = World::new("btrfs-not");
    let source = world.source("source");
    let agent = world.agent().allowed(Service::files("docs", [&source]).consistency("crash")).started();
    let run = agent.snapshot("docs");
    assert_eq!(run.text("status"), "failed", "a live tree is no point in time: {run:?}");
    assert!(run.text("error_message").contains("consistency"), "{run:?}");
    agent.assert_repository_holds(&[]);
}

#[test]
fn snapshot_of_a_killed_run_is_removed() {
    if !is_root_or_skips("snapshot_of_a_killed_run_is_removed") {
        return;
    }
    let OnBtrfs { world, disk } = on_btrfs("btrfs-killed");
    let source = subvolume(&disk.path().join("volume"));
    files::small_tree(&source, 5, 500);
    let held = subvolumes(&disk);
    let mut agent = world.agent().allowed(Service::files("docs", [&source])).started();
    for whole in [false, true] {
        agent.archiver().hold_at(Moment::Store);
        agent.cli(&["snapshot", "docs", "--detach"]).ok();
        agent.archiver().wait_reached(Moment::Store);
        assert_eq!(subvolumes(&disk).len(), held.len() + 1);
        if whole {
            let below = processes::descendants(agent.pid());
            agent.kill9();
            below.iter().for_each(|process| processes::kill(process.pid));
            agent.archiver().go_on();
            agent.start();
        } else {
            processes::kill(agent.wait_part("runner").pid);
            agent.archiver().go_on();
        }
        wait_until("the snapshot to be gone", Duration::from_secs(60), || subvolumes(&disk) == held);
        agent.wait_last_run_ended().assert_failed("interrupted");
    }
    let run = agent.snapshot_ok("docs");
    agent.assert_repository_holds(&[&run]);
    assert_eq!(subvolumes(&disk), held);
}

#[test]
fn nested_subvolume_is_named_instead_of_left_out() {
    if !is_root_or_skips("nested_subvolume_is_named_instead_of_left_out") {
        return;
    }
    let OnBtrfs { world, disk } = on_btrfs("btrfs-nested");
    let source = subvolume(&disk.path().join("volume"));
    files::small_tree(&source, 5, 500);
    let nested = subvolume(&source.join("nested"));
    files::write(nested.join("precious.txt"), "a snapshot of the parent does not hold this");
    let held = subvolumes(&disk);
    let agent = world.agent().allowed(Service::files("docs", [&source])).started();
    let run = agent.snapshot("docs");
    assert_eq!(run.text("status"), "failed", "{run:?}");
    assert!(run.text("error_message").contains("nested"), "{run:?}");
    assert_eq!(subvolumes(&disk), held);
    agent.assert_repository_holds(&[]);
}
