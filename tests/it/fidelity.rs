//! What comes back is what was there: contents, modes, owners, times, links and attributes.

use hestner_tests::restic::{FaultyRestic, Repository};
use hestner_tests::{Service, World, files, is_root_or_skips, tree, world};

/// The judge judged: what stock restic alone cannot give back is not ours to promise.
#[test]
fn odd_tree_is_one_that_stock_restic_alone_gives_back() {
    if !is_root_or_skips("odd_tree_is_one_that_stock_restic_alone_gives_back") {
        return;
    }
    let folder = world::own_folder("fidelity-judge");
    let source = tree::odd(&folder.join("source"));
    let repository =
        Repository { path: folder.join("repository"), password_file: files::write(folder.join("password"), "x") };
    repository.stock(&["init"]).ok();
    repository.stock(&["backup", source.to_str().expect("UTF-8")]).ok();
    repository.restore("latest", &folder.join("restored"));
    tree::assert_same(&source, &tree::restored(&folder.join("restored"), &source));
    std::fs::remove_dir_all(folder).expect("our own folder");
}

#[test]
fn odd_tree_comes_back_the_same_by_stock_restic_and_by_hestner() {
    if !is_root_or_skips("odd_tree_comes_back_the_same_by_stock_restic_and_by_hestner") {
        return;
    }
    let world = World::new("fidelity");
    let source = tree::odd(&world.at("source"));
    let before = tree::manifest(&source);
    // Nothing that stores, lists, restores or verifies needs stock restic; only pruning does.
    let broken = FaultyRestic::new(&world.at("bin"));
    broken.on("any", "exit 9");
    let agent = world.agent().restic(&broken).allowed(Service::files("odd", [&source])).started();

    let run = agent.snapshot_ok("odd");
    tree::assert_same_manifest(&before, &tree::manifest(&source));
    let again = agent.snapshot_ok("odd");
    assert!(again.number("bytes_stored") < run.number("bytes_stored") / 10, "nothing has changed: {again:?}");
    let repository = agent.repository("local");
    let check = repository.check();
    assert_eq!(check.code, Some(0), "{check}");

    for (name, run) in [("first", &run), ("again", &again)] {
        let stock = world.at(&format!("{name}-by-restic"));
        repository.restore(&run.snapshot_id(), &stock);
        tree::assert_same_manifest(&before, &tree::manifest(&tree::restored(&stock, &source)));

        let ours = world.at(&format!("{name}-by-hestner"));
        agent.restore(run.uid(), &ours).ok();
        tree::assert_same_manifest(&before, &tree::manifest(&tree::restored(&ours, &source)));
    }
    agent.cli(&["verify", again.uid()]).ok();
    assert!(repository.locks().is_empty());
}
