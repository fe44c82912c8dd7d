//! The daemon that was taken over: from inside its unit, as its user and behind its fences, every way to do
//! something as root but a granted run is tried, and refused. And what systemd says of the units.

use std::fmt::Write as _;
use std::time::Duration;

use hestner_tests::booted::Hierarchy;
use hestner_tests::{clock, files, is_root_or_skips, wait_until};

use crate::booted::Site;

/// What `systemd-analyze security` may give to what speaks to the network.
const EXPOSURE_MAX: f64 = 2.0;

/// Name of an attempt, and a command that succeeds only if it was not refused. Each leaves `/root/owned` behind where it can.
const ATTEMPTS: &[(&str, &str)] = &[
    // Sockets that are root's alone.
    ("guard socket", "connect /run/hestner/guard.sock"),
    ("thaw socket", "connect /run/hestner/thaw.sock"),
    ("systemd's private socket", "busctl --address=unix:path=/run/systemd/private list"),
    ("replace the socket of runs", "mv /run/hestner/run.sock /run/hestner/other.sock"),
    ("remove the socket of runs", "rm -f /run/hestner/run.sock && [ ! -e /run/hestner/run.sock ]"),
    // The manager of units.
    ("start a run's unit", "systemctl --no-ask-password start hestner-run@intruder.service"),
    ("start a thaw", "systemctl --no-ask-password start hestner-thaw@intruder.service"),
    ("stop the guards", "systemctl --no-ask-password stop hestner-guard.socket"),
    ("kill another unit", "systemctl --no-ask-password kill hestner-receiver.service"),
    ("transient unit", "systemd-run --no-ask-password --wait touch /root/owned"),
    ("transient scope", "systemd-run --no-ask-password --scope touch /root/owned"),
    (
        "transient unit over D-Bus",
        "busctl call org.freedesktop.systemd1 /org/freedesktop/systemd1 org.freedesktop.systemd1.Manager \
         StartTransientUnit 'ssa(sv)a(sa(sv))' owned.service replace 1 ExecStart 'a(sasb)' 1 /usr/bin/touch 2 touch /root/owned false 0",
    ),
    ("reload units", "systemctl --no-ask-password daemon-reload"),
    ("set the manager's environment", "systemctl --no-ask-password set-environment LD_PRELOAD=/x"),
    ("change a unit", "systemctl --no-ask-password set-property --runtime hestner-run@x.service TasksMax=1"),
    ("link a unit", "systemctl --no-ask-password link /var/lib/hestner-agent/daemon/owned.service"),
    ("power off", "systemctl --no-ask-password poweroff"),
    (
        "power off over D-Bus",
        "busctl call org.freedesktop.login1 /org/freedesktop/login1 org.freedesktop.login1.Manager PowerOff b false",
    ),
    // Files that root believes.
    ("unit file", "echo x >/etc/systemd/system/owned.service"),
    ("runtime unit file", "echo x >/run/systemd/system/owned.service"),
    ("unit file of the package", "echo x >>/lib/systemd/system/hestner-run@.service"),
    ("settings", "echo x >>/etc/hestner/agent.toml"),
    ("grants", "echo x >>/etc/hestner/grants.toml"),
    ("replace grants", "mv /etc/hestner/grants.toml /etc/hestner/x"),
    ("hook", "echo x >>/usr/local/lib/hestner/pre"),
    ("the program", "echo x >>/usr/bin/hestner-agent"),
    ("what the runner believes of the enrolment", "echo x >>/var/lib/hestner-agent/server.json"),
    ("notes of runs", "mkdir /var/lib/hestner-agent/runs/owned"),
    ("read notes of runs", "ls /var/lib/hestner-agent/runs"),
    ("read keys", "cat /var/lib/hestner-agent/keys/*"),
    ("move the daemon's folder", "mv /var/lib/hestner-agent/daemon /var/lib/hestner-agent/x"),
    ("make a folder beside the daemon's", "mkdir /var/lib/hestner-agent/x"),
    ("customers' data", "cat /data/private"),
    ("the repository", "ls /srv/hestner/*/keys"),
    ("preloaded libraries", "echo x >/etc/ld.so.preload"),
    ("users", "echo 'x::0:0::/:/bin/sh' >>/etc/passwd"),
    ("passwords", "cat /etc/shadow"),
    ("timed jobs", "mkdir -p /etc/cron.d && echo x >/etc/cron.d/owned"),
    ("core pattern", "echo '|/x' >/proc/sys/kernel/core_pattern"),
    ("system requests", "echo h >/proc/sysrq-trigger"),
    ("control groups", "mkdir /sys/fs/cgroup/owned"),
    // Becoming somebody else.
    ("su", "su -c 'touch /root/owned' </dev/null"),
    ("sudo", "sudo -n touch /root/owned"),
    ("pkexec", "pkexec touch /root/owned"),
    ("newgrp", "newgrp root -c true </dev/null"),
    ("set user id", "setpriv --reuid=0 --clear-groups touch /root/owned"),
    ("set-id program", "cp /usr/bin/id \"$HOME/id\" && chmod 4755 \"$HOME/id\""),
    ("user namespace", "unshare -Ur true"),
    ("mount namespace of init", "nsenter -t 1 -m true"),
    ("mount", "mount -t tmpfs x /mnt"),
    ("set-id mount", "umount /data"),
    ("freeze", "fsfreeze -f /data"),
    ("device", "mknod \"$HOME/d\" b 7 0"),
    ("signal to init", "kill -0 1"),
    (
        "signal to a guard",
        "pid=$(grep -lz guard /proc/[0-9]*/cmdline 2>/dev/null | head -n 1); kill -KILL \"${pid:-1}\"",
    ),
    ("environment of init", "cat /proc/1/environ"),
    ("root of init", "ls /proc/1/root/"),
];

/// What the socket of runs must refuse: the request, and a part of the answer.
const REQUESTS: &[(&str, &str)] = &[
    (r#"{"run":{"run_uid":"019aa000-0000-7000-8000-000000000001","service":"data","verb":"restore"}}"#, "failed"),
    (r#"{"run":{"run_uid":"019aa000-0000-7000-8000-000000000002","service":"../etc","verb":"snapshot"}}"#, "failed"),
    (r#"{"run":{"run_uid":"../../../root/owned","service":"data","verb":"snapshot"}}"#, ""),
    (r#"{"run":{"run_uid":"/root/owned","service":"data","verb":"snapshot"}}"#, ""),
    (
        r#"{"run":{"run_uid":"019aa000-0000-7000-8000-000000000003","service":"data","verb":"snapshot","command":"touch /root/owned"}}"#,
        "",
    ),
    ("touch /root/owned", ""),
];

fn intruder() -> String {
    let mut script = String::from(
        "export HOME=/var/lib/hestner-agent/daemon\n\
         connect() { perl -MSocket -e 'socket(my $s, PF_UNIX, SOCK_STREAM, 0) or exit 2; \
         connect($s, sockaddr_un($ARGV[0])) or exit 1; exit 0' \"$1\"; }\n\
         ask() { timeout 20 perl -MSocket -e 'socket(my $s, PF_UNIX, SOCK_STREAM, 0) or exit 2; \
         connect($s, sockaddr_un(\"/run/hestner/run.sock\")) or exit 1; syswrite($s, \"$ARGV[0]\\n\"); \
         while (sysread($s, my $b, 65536)) { print $b; }' \"$1\"; }\n\
         try() { if out=$(eval \"$2\" 2>&1 </dev/null); then echo \"WORKED: $1: $out\"; else echo \"refused: $1\"; fi; }\n\
         echo \"user $(id -un), capabilities $(grep CapEff /proc/self/status | cut -f2)\"\n\
         connect /run/hestner/run.sock && echo 'runs can be asked for'\n",
    );
    for (name, command) in ATTEMPTS {
        let _ = writeln!(script, "try '{}' '{}'", name.replace('\'', r"'\''"), command.replace('\'', r"'\''"));
    }
    for (i, (request, _)) in REQUESTS.iter().enumerate() {
        let _ = writeln!(script, "echo \"answer {i}: $(ask '{request}' 2>&1 | tr '\\n' ' ')\"");
    }
    script.push_str("echo done\n");
    script
}

#[test]
fn daemon_that_was_taken_over_can_do_nothing_as_root_but_a_granted_run() {
    if !is_root_or_skips("daemon_that_was_taken_over_can_do_nothing_as_root_but_a_granted_run") {
        return;
    }
    let site = Site::enrolled("privilege", Hierarchy::V2);
    let m = &site.machine;
    site.snapshot();
    files::write(m.at("/data/private"), "root's");
    m.sh("echo x >/data/private; chmod 600 /data/private");
    assert_eq!(site.status()["separated"], true);

    // The daemon's own unit with another program in it.
    files::write_script(m.at("/usr/local/lib/hestner/intruder"), &intruder());
    let unit = m.ok(&["cat", "/lib/systemd/system/hestner-agent.service"]);
    let mut inside = String::new();
    for line in unit.lines() {
        let key = line.split('=').next().unwrap_or_default();
        match key {
            "ExecStart" => {
                inside.push_str("ExecStart=/usr/local/lib/hestner/intruder\nStandardOutput=file:/srv/intruder.log\n")
            }
            "Type" => inside.push_str("Type=oneshot\n"),
            "RuntimeDirectory" => inside.push_str("RuntimeDirectory=hestner-intruder\n"),
            "WatchdogSec" | "NotifyAccess" | "Restart" | "RestartSec" | "RestartPreventExitStatus" => {}
            _ => {
                let _ = writeln!(inside, "{line}");
            }
        }
    }
    files::write(m.at("/etc/systemd/system/hestner-intruder.service"), inside);
    m.ok(&["systemctl", "daemon-reload"]);
    let _ = m.run(&["systemctl", "start", "hestner-intruder"]);
    let log = files::lines(&m.at("/srv/intruder.log"));
    println!("{}", log.join("\n"));
    assert_eq!(log.last().map(String::as_str), Some("done"), "the attempts did not come to their end: {log:?}");
    assert_eq!(log[0], "user hestner-agent, capabilities 0000000000000000");
    assert_eq!(log[1], "runs can be asked for");
    let worked: Vec<&String> = log.iter().filter(|line| line.starts_with("WORKED")).collect();
    assert!(worked.is_empty(), "not refused: {worked:#?}");
    assert_eq!(log.iter().filter(|line| line.starts_with("refused")).count(), ATTEMPTS.len());
    for (i, (request, expected)) in REQUESTS.iter().enumerate() {
        let answer = log.iter().find(|line| line.starts_with(&format!("answer {i}:"))).expect("an answer");
        assert!(answer.contains(expected) && !answer.contains(r#""status":"success""#), "{request} led to {answer}");
    }
    assert!(!m.at("/root/owned").exists());
    let runs = m.sh("ls /var/lib/hestner-agent/runs");
    assert!(!runs.contains("owned"), "{runs}");
    // All the same after it: the agent works.
    site.snapshot();
}

#[test]
fn units_are_as_fenced_as_their_work_allows() {
    if !is_root_or_skips("units_are_as_fenced_as_their_work_allows") {
        return;
    }
    let site = Site::enrolled("privilege-units", Hierarchy::V2);
    let m = &site.machine;
    // The last two run hooks and see what the host sees: there the number is only printed.
    let bounds = [
        ("hestner-agent.service", EXPOSURE_MAX),
        ("hestner-receiver.service", EXPOSURE_MAX),
        ("hestner-guard@.service", 3.0),
        ("hestner-run@.service", 10.0),
        ("hestner-thaw@.service", 10.0),
    ];
    for (unit, bound) in bounds {
        let text = m.run(&[
            "systemd-analyze",
            "security",
            "--no-pager",
            "--offline=true",
            &format!("/lib/systemd/system/{unit}"),
        ]);
        let line = text.stdout.lines().find(|line| line.contains("Overall exposure level")).unwrap_or_default();
        let score: f64 = line
            .split(':')
            .nth(1)
            .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
            .unwrap_or_else(|| panic!("no score: {text}"));
        println!("{unit}: {score}");
        assert!(score <= bound, "{unit} scores {score}, allowed is {bound}: {text}");
    }
}

#[test]
fn runner_keeps_what_the_configured_kinds_need_and_lays_down_the_rest() {
    if !is_root_or_skips("runner_keeps_what_the_configured_kinds_need_and_lays_down_the_rest") {
        return;
    }
    let site = Site::enrolled("privilege-kinds", Hierarchy::V2);
    let m = &site.machine;
    // No hook, no command, no point: files are read, and that is all.
    let settings = m.at("/etc/hestner/agent.toml");
    let text = std::fs::read_to_string(&settings).expect("settings");
    let head = text.split("[service.point]").next().expect("a beginning");
    files::write(&settings, format!("{head}[service.point]\nkind = \"none\"\n"));
    m.ok(&["systemctl", "restart", "hestner-agent"]);
    site.status();
    let run = m.command(&["hestner-agent", "snapshot", "data", "--json"]).start();
    // CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER and CAP_SYS_ADMIN, by their numbers in capability.h.
    const KEPT: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 21;
    wait_until("the runner to lay down the rest for good", Duration::from_secs(30), || {
        m.left_of_the_bounding_set("runner").contains(&KEPT)
    });
    let run = run.ended().any_json();
    assert_eq!(run["status"], "success", "{run}");
    // What it keeps is enough to see that systemd handed its group on, and to divide that where there is memory to divide:
    // on a machine whose controllers are bound to version 1 there is none in here, and that is said.
    let has_memory = m.sh("cat /sys/fs/cgroup/cgroup.controllers").split_whitespace().any(|word| word == "memory");
    let off = site.status()["worker_limits_off"].as_str().expect("a text").to_owned();
    let expected = "`memory_max` is not kept: the run's unit was handed no controller memory";
    assert_eq!(off, if has_memory { "" } else { expected });
}

#[test]
fn daemon_that_stands_still_is_restarted_by_its_watchdog() {
    if !is_root_or_skips("daemon_that_stands_still_is_restarted_by_its_watchdog") {
        return;
    }
    let site = Site::enrolled("privilege-watchdog", Hierarchy::V2);
    let m = &site.machine;
    assert_eq!(m.property("hestner-agent", "Type"), "notify");
    files::write(
        m.at("/etc/systemd/system/hestner-agent.service.d/test.conf"),
        "[Service]\nWatchdogSec=3s\nRestartSec=1s\n",
    );
    m.ok(&["systemctl", "daemon-reload"]);
    m.ok(&["systemctl", "restart", "hestner-agent"]);
    let first = m.property("hestner-agent", "MainPID");
    // Through several beats it lives.
    clock::let_pass(Duration::from_secs(7));
    assert_eq!(m.property("hestner-agent", "MainPID"), first, "{}", m.journal(30));
    m.ok(&["systemctl", "kill", "-s", "STOP", "hestner-agent"]);
    wait_until("the daemon to be restarted", Duration::from_secs(45), || {
        m.is_active("hestner-agent")
            && ![first.as_str(), "0"].contains(&m.property("hestner-agent", "MainPID").as_str())
    });
    site.status();
}
