//! What the packages hold, and what their scripts leave as the administrator has decided it.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::time::Duration;

use hestner_tests::booted::{Booted, Hierarchy, Packages};
use hestner_tests::command::Cmd;
use hestner_tests::{files, is_root_or_skips, wait_until, world};

use crate::booted::{Site, installed_version};

const AGENT_UNITS: [&str; 4] =
    ["hestner-agent.service", "hestner-run.socket", "hestner-guard.socket", "hestner-thaw.socket"];

#[test]
fn package_holds_what_it_says_and_nothing_that_others_could_write() {
    let folder = world::own_folder("packages-contents");
    let packages = Packages::build(&folder, "0.1.0");
    for (name, package) in [("hestner-agent", &packages.agent), ("hestner-receiver", &packages.receiver)] {
        let control = Cmd::new("dpkg-deb").arg("--info").arg(package).ok();
        assert!(control.contains("Version: 0.1.0") && control.contains("systemd"), "{control}");
        let contents = Cmd::new("dpkg-deb").arg("--contents").arg(package).ok();
        let wanted = [
            format!("/usr/bin/{name}"),
            format!("/lib/systemd/system/{name}.service"),
            format!("/usr/lib/sysusers.d/{name}.conf"),
            format!("/usr/lib/tmpfiles.d/{name}.conf"),
            format!("/etc/hestner/{}.toml", &name["hestner-".len()..]),
            format!("/usr/share/man/man1/{name}.1.gz"),
            format!("/usr/share/bash-completion/completions/{name}"),
            format!("/usr/share/zsh/vendor-completions/_{name}"),
            format!("/usr/share/fish/vendor_completions.d/{name}.fish"),
            format!("/usr/share/doc/{name}/copyright"),
            format!("/usr/share/doc/{name}/changelog.gz"),
            format!("/usr/share/doc/{name}/operations.md"),
        ];
        for path in wanted {
            assert!(contents.lines().any(|line| line.ends_with(&format!(".{path}"))), "no {path} in\n{contents}");
        }
        assert!(!contents.contains("grants.toml"), "grants that are not there are denied: none may be shipped");
        for line in contents.lines() {
            let (mode, owner) = line.split_once(' ').expect("a line of tar");
            assert!(owner.trim_start().starts_with("root/root"), "{line}");
            // `-rwxr-xr-x`: neither the group nor others write; no set-id bit.
            assert!(mode.as_bytes()[5] != b'w' && mode.as_bytes()[8] != b'w' && !mode.contains('s'), "{line}");
        }
    }
    let _ = std::fs::remove_dir_all(folder);
}

#[test]
fn fresh_package_waits_for_the_enrolment_and_does_not_fail() {
    if !is_root_or_skips("fresh_package_waits_for_the_enrolment_and_does_not_fail") {
        return;
    }
    let folder = world::own_folder("packages-fresh");
    let machine = Booted::start(&folder, Hierarchy::V2, &[]);
    let packages = Packages::build(&folder, "0.1.0");
    for package in [&packages.receiver, &packages.agent] {
        let installed = machine.install(package);
        assert_eq!(installed.code, Some(0), "{installed}");
    }
    // Nobody has touched the settings: they are valid, and nothing runs that could fail over and over.
    let asked = machine.run(&["hestner-agent", "grants", "list", "--json"]);
    assert_eq!(asked.code, Some(0), "{asked}");
    machine.ok(&["systemctl", "start", "hestner-agent"]);
    assert_eq!(machine.property("hestner-agent", "ActiveState"), "inactive");
    assert_eq!(machine.property("hestner-agent", "ConditionResult"), "no");
    assert!(AGENT_UNITS[1..].iter().all(|unit| machine.is_active(unit)));
    wait_until("the receiver to be ready", Duration::from_secs(30), || machine.is_active("hestner-receiver"));
    let failed = machine.ok(&["systemctl", "--failed", "--plain", "--no-legend"]);
    assert!(!failed.contains("hestner"), "{failed}");
    for unit in ["hestner-agent.service", "hestner-receiver.service", "hestner-run.socket", "hestner-guard.socket"] {
        let verified = machine.run(&["systemd-analyze", "verify", "--man=no", &format!("/lib/systemd/system/{unit}")]);
        assert!(verified.code == Some(0) && !verified.stderr.contains("hestner"), "{verified}");
    }
    // The state folder is root's, one folder in it the daemon's.
    let daemon = machine.sh("id -u hestner-agent");
    let owners = machine.sh("cd /var/lib/hestner-agent && stat -c '%n %u %a' . daemon runs keys");
    assert_eq!(owners, format!(". 0 755\ndaemon {} 700\nruns 0 700\nkeys 0 700\n", daemon.trim()));
    drop(machine);
    let _ = std::fs::remove_dir_all(folder);
}

#[test]
fn upgrade_leaves_stopped_disabled_and_masked_units_as_they_are() {
    if !is_root_or_skips("upgrade_leaves_stopped_disabled_and_masked_units_as_they_are") {
        return;
    }
    let site = Site::enrolled("packages-decided", Hierarchy::V2);
    let m = &site.machine;
    m.ok(&["systemctl", "disable", "--now", "hestner-agent"]);
    m.ok(&["systemctl", "stop", "hestner-receiver"]);
    m.ok(&["systemctl", "mask", "--now", "hestner-thaw.socket"]);
    files::write(m.at("/etc/hestner/receiver.toml"), "# edited\n");
    let newer = Packages::build(&site.folder.join("newer"), "0.1.1");
    for package in [&newer.receiver, &newer.agent] {
        let upgraded = m.install(package);
        assert_eq!(upgraded.code, Some(0), "{upgraded}");
    }
    assert_eq!(installed_version(m), "0.1.1");
    for unit in ["hestner-agent", "hestner-receiver", "hestner-thaw.socket"] {
        assert!(!m.is_active(unit), "{unit} was started by an upgrade");
    }
    let word = |unit: &str| m.run(&["systemctl", "is-enabled", unit]).stdout.trim().to_owned();
    assert_eq!(
        ["hestner-agent", "hestner-receiver", "hestner-thaw.socket"].map(word),
        ["disabled", "enabled", "masked"]
    );
    assert_eq!(files::lines(&m.at("/etc/hestner/receiver.toml")), ["# edited"]);
}

#[test]
fn purge_keeps_keys_until_their_escrow_is_acknowledged() {
    if !is_root_or_skips("purge_keeps_keys_until_their_escrow_is_acknowledged") {
        return;
    }
    let site = Site::enrolled("packages-purge", Hierarchy::V2);
    let m = &site.machine;
    m.ok(&["systemctl", "stop", "hestner-receiver"]);
    site.snapshot();
    let asked = m.run(&["hestner-agent", "keys", "--require-escrow"]);
    assert!(asked.code == Some(1) && asked.stderr.contains("escrow_waiting"), "{asked}");
    assert_eq!(m.run(&["hestner-agent", "keys", "--json"]).json()[0]["escrow"], "waiting");

    let purged = m.command(&["dpkg", "--purge", "hestner-agent"]).within(Duration::from_secs(180)).run();
    assert_eq!(purged.code, Some(0), "{purged}");
    let kept = |what: &str| purged.stderr.lines().any(|line| line.contains("kept") && line.contains(what));
    assert!(kept("/var/lib/hestner-agent/keys") && kept("every repository"), "{purged}");
    for gone in ["daemon", "runs", "server.json"] {
        assert!(!m.at(&format!("/var/lib/hestner-agent/{gone}")).exists(), "{gone} is still there");
    }
    assert!(!m.at("/etc/hestner/agent.toml").exists() && !m.at("/etc/hestner/grants.toml").exists());
    // What was kept opens what was kept.
    let [repository] = site.repositories().try_into().expect("one repository");
    let password = m.at("/var/lib/hestner-agent/keys/local-encrypted.password");
    assert_eq!(mode_and_owner(&password), (0o600, 0));
    let snapshots = Cmd::new("restic")
        .args(["--no-cache", "snapshots", "--json", "-r"])
        .arg(&repository)
        .arg("--password-file")
        .arg(&password)
        .run();
    assert_eq!(snapshots.json().as_array().map(Vec::len), Some(1));

    // The receiver's store outlives its package: it holds the authority, and everybody's wrapped keys.
    let purged = m.run(&["dpkg", "--purge", "hestner-receiver"]);
    assert!(purged.code == Some(0) && purged.stderr.contains("kept /var/lib/hestner-receiver"), "{purged}");
    assert!(m.at("/var/lib/hestner-receiver/receiver.db").exists() && !m.at("/etc/hestner/receiver.toml").exists());
}

fn mode_and_owner(path: &Path) -> (u32, u32) {
    let metadata = path.symlink_metadata().unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    (metadata.permissions().mode() & 0o7777, metadata.uid())
}
