//! Sources that an archiver would take for whole although it stored something else, and folders that
//! others could have prepared: all are refused by name before anything is begun.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;

use hestner_tests::{Service, World, files};

#[test]
fn source_behind_a_symlink_is_refused_with_the_path_it_leads_to() {
    let world = World::new("green-symlink");
    let real = world.source("release");
    let link = world.at("current");
    symlink(&real, &link).expect("a symlink");
    let agent = world.agent().allowed(Service::files("docs", [&link])).started();
    let run = agent.snapshot("docs");
    run.assert_failed("settings_invalid");
    let message = run.text("error_message");
    assert!(message.contains(&format!("write {}", real.display())), "{message}");
    assert!(!agent.repository_path("local").exists(), "nothing may be begun");
}

#[test]
fn link_whose_target_cannot_be_stored_fails_the_run_by_name_unless_it_is_excluded() {
    let world = World::new("green-link");
    let source = world.source("source");
    let link = source.join("odd");
    symlink(OsStr::from_bytes(b"target-\xff"), &link).expect("a symlink");
    let without = Service::files("rest", [&source]).source_line(&format!("exclude = [\"{}\"]", link.display()));
    let agent = world.agent().allowed(Service::files("docs", [&source])).allowed(without).started();
    let run = agent.snapshot("docs");
    run.assert_failed("source_unreadable");
    assert!(run.text("error_message").contains(&link.display().to_string()), "{}", run.text("error_message"));
    agent.snapshot_ok("rest");
}

#[test]
fn state_folder_that_others_can_write_is_not_used() {
    let world = World::new("green-state");
    let agent = world.agent().allowed(Service::files("docs", [world.source("source")])).enrolled();
    files::set_mode(agent.state(), 0o777);
    let ended = agent.cli(&["run"]);
    assert_eq!(ended.code, Some(64), "{}", ended.stderr);
    assert!(ended.stderr.contains("unsafe_permissions") && ended.stderr.contains("0777"), "{}", ended.stderr);
}

#[test]
fn what_lies_in_the_place_of_the_socket_is_never_removed() {
    let world = World::new("green-socket");
    let agent = world.agent().allowed(Service::files("docs", [world.source("source")])).enrolled();
    let socket = agent.folder().join("control.sock");
    files::write(socket.join("precious"), "data");
    let ended = agent.cli(&["run"]);
    assert_eq!(ended.code, Some(64), "{}", ended.stderr);
    assert!(socket.join("precious").exists(), "a folder was erased: {}", ended.stderr);
}
