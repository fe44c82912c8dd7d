//! The packages in a machine with systemd as its first process: installed, upgraded, removed, purged, killed and restarted, each while a
//! filesystem is frozen. The service always comes back, and what the administrator decided stays decided.
//!
//! A restart of such a machine is no reboot: the host's mounts survive it, and so would a freeze.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hestner_tests::booted::{Booted, Hierarchy, Packages};
use hestner_tests::command::{Cmd, Ended, Started};
use hestner_tests::mounts::Mounted;
use hestner_tests::{clock, files, is_root_or_skips, wait_for, wait_until, world};
use serde_json::Value;

/// The freeze window of these tests.
const WINDOW: Duration = Duration::from_secs(5);
/// What a busy machine may add to it.
const GRACE: Duration = Duration::from_secs(1);
const POINT: &str = "/usr/local/lib/hestner/point";
const RUN_WITHIN: Duration = Duration::from_secs(90);

/// A machine with both packages, an enrolled agent, and a service on a filesystem of its own that somebody writes to all the time.
pub(crate) struct Site {
    pub(crate) machine: Booted,
    data: Mounted,
    pub(crate) folder: OwnFolder,
}

/// Goes when its test ends well: after the machine and the filesystem in it, which are dropped before.
pub(crate) struct OwnFolder(PathBuf);

impl std::ops::Deref for OwnFolder {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for OwnFolder {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

/// How a step went that was taken while the service was frozen.
struct Frozen {
    /// From the freeze until the writer went on.
    thawed_after: Duration,
    /// The step.
    step: Ended,
    run_uid: String,
}

impl Site {
    pub(crate) fn new(name: &str, hierarchy: Hierarchy) -> Self {
        let folder = OwnFolder(world::own_folder(name));
        let data = Mounted::ext4(&folder.join("data"), 64);
        let machine = Booted::start(&folder, hierarchy, &[(data.path(), "/data")]);
        let site = Self { machine, data, folder };
        let packages = Packages::build(&site.folder, "0.1.0");
        for package in [&packages.receiver, &packages.agent] {
            let installed = site.machine.install(package);
            assert_eq!(installed.code, Some(0), "{installed}");
        }
        site.set_up_service();
        site
    }

    /// The same, enrolled and with a daemon that runs.
    pub(crate) fn enrolled(name: &str, hierarchy: Hierarchy) -> Self {
        let site = Self::new(name, hierarchy);
        site.enroll();
        site.machine.ok(&["hestner-agent", "grants", "allow", "data", "snapshot"]);
        site.machine.ok(&["systemctl", "start", "hestner-agent"]);
        site.start_writer();
        site
    }

    pub(crate) fn set_up_service(&self) {
        let m = &self.machine;
        let script = |path: &str, body: &str| files::write_script(m.at(path), body);
        script("/usr/local/lib/hestner/pre", "echo pre >>/srv/hooks");
        script("/usr/local/lib/hestner/post", "echo post >>/srv/hooks");
        // Takes a copy, or hangs for as long as it is let.
        script(
            POINT,
            "touch /srv/frozen\nif [ -e /srv/hang ]; then sleep 600; fi\nrm -rf /srv/point && cp -a /data /srv/point",
        );
        script("/usr/local/lib/hestner/writer", "n=0; while :; do n=$((n+1)); echo $n >/data/beat; sleep 0.01; done");
        std::fs::create_dir_all(m.at("/srv/hestner")).expect("a destination");
        files::write(self.data.path().join("customer.txt"), "what has to be kept\n");
        files::write(m.at("/etc/hestner/agent.toml"), settings());
    }

    pub(crate) fn enroll(&self) {
        let m = &self.machine;
        let secret = self.folder.join("recovery.secret");
        Cmd::new("age-keygen").arg("-o").arg(&secret).ok();
        let recipient = Cmd::new("age-keygen").arg("-y").arg(&secret).ok();
        files::write(m.at("/srv/recovery.pub"), &recipient);
        wait_until("the receiver to serve", RUN_WITHIN, || m.at("/var/lib/hestner-receiver/addresses.json").exists());
        let company: Value =
            self.receiver(&["company", "add", "acme", "--recovery-key", "/srv/recovery.pub", "--json"]).json();
        let token: Value =
            self.receiver(&["token", "create", "--company", &company["id"].to_string(), "--json"]).json();
        files::write(m.at("/root/token"), token["token"].as_str().expect("a token"));
        files::set_mode(&m.at("/root/token"), 0o600);
        let fingerprint = world::fingerprint(&recipient);
        m.ok(&["hestner-agent", "enroll", "--token-file", "/root/token", "--recovery-fingerprint", &fingerprint]);
    }

    pub(crate) fn receiver(&self, words: &[&str]) -> Ended {
        self.machine.run(&[&["runuser", "-u", "hestner-receiver", "--", "hestner-receiver"], words].concat())
    }

    fn start_writer(&self) {
        self.machine.ok(&["systemd-run", "--quiet", "--unit=writer", "/usr/local/lib/hestner/writer"]);
        self.wait_written("the writer to begin", RUN_WITHIN);
    }

    fn beat(&self) -> String {
        std::fs::read_to_string(self.data.path().join("beat")).unwrap_or_default()
    }

    fn wait_written(&self, what: &str, within: Duration) {
        let before = self.beat();
        wait_until(what, within, || self.beat() != before);
    }

    fn hang(&self, hangs: bool) {
        let path = self.machine.at("/srv/hang");
        if hangs {
            files::write(&path, "");
        } else {
            let _ = std::fs::remove_file(path);
        }
    }

    /// Begins a snapshot whose point command hangs, and returns once the filesystem is frozen, which is proved.
    fn freeze(&self) -> (std::time::Instant, String) {
        let marker = self.machine.at("/srv/frozen");
        let _ = std::fs::remove_file(&marker);
        self.hang(true);
        let run: Value = self.machine.run(&["hestner-agent", "snapshot", "data", "--detach", "--json"]).json();
        wait_until("the point command to be called", RUN_WITHIN, || marker.exists());
        let frozen_at = clock::now();
        // Busy: somebody has frozen it. The writer stands still.
        let again = Cmd::new("fsfreeze").arg("-f").arg(self.data.path()).run();
        if again.code == Some(0) {
            Cmd::new("fsfreeze").arg("-u").arg(self.data.path()).ok();
        }
        assert!(again.code != Some(0) && again.stderr.contains("busy"), "it is not frozen: {again}");
        let before = self.beat();
        clock::let_pass(Duration::from_millis(150));
        assert_eq!(self.beat(), before, "the writer goes on, so nothing is frozen");
        (frozen_at, run["run_uid"].as_str().expect("a run").to_owned())
    }

    /// Takes a step while the service is frozen, and proves that it comes back in time.
    fn while_frozen(&self, what: &str, step: &[&str]) -> Frozen {
        self.frozen_during(what, || self.machine.command(step).within(Duration::from_secs(240)).start())
    }

    fn frozen_during(&self, what: &str, step: impl FnOnce() -> Started) -> Frozen {
        let (frozen_at, run_uid) = self.freeze();
        let started = step();
        self.wait_written(&format!("the writer to go on after: {what}"), WINDOW + GRACE);
        let thawed_after = frozen_at.elapsed();
        self.hang(false);
        let step = started.ended();
        println!("{what}: writes went on {} ms after the freeze", thawed_after.as_millis());
        Frozen { thawed_after, step, run_uid }
    }

    /// What must hold after every such step: each pre hook has had its one post hook, and nothing is held.
    fn assert_released(&self, what: &str) {
        let hooks = self.machine.at("/srv/hooks");
        wait_until(&format!("the hooks to be released after: {what}"), Duration::from_secs(30), || {
            let lines = files::lines(&hooks);
            lines.len().is_multiple_of(2) && !lines.is_empty()
        });
        let lines = files::lines(&hooks);
        let paired = lines.chunks(2).all(|pair| pair == ["pre", "post"]);
        assert!(paired, "after {what} the hooks read {lines:?}");
        let again = Cmd::new("fsfreeze").arg("-u").arg(self.data.path()).run();
        assert!(again.code != Some(0), "something was still frozen after: {what}");
    }

    pub(crate) fn status(&self) -> Value {
        let m = &self.machine;
        wait_for("the daemon to answer", Duration::from_secs(30), || {
            let status = m.run(&["hestner-agent", "status", "--json"]);
            (status.code == Some(0)).then(|| status.any_json())
        })
    }

    /// The run's end, as the daemon tells it.
    fn ended(&self, run_uid: &str) -> Value {
        wait_for(&format!("run {run_uid} to have ended"), RUN_WITHIN, || {
            let runs = self.machine.run(&["hestner-agent", "runs", "--json"]);
            let runs = (runs.code == Some(0)).then(|| runs.any_json())?;
            let run = runs.as_array()?.iter().find(|run| run["run_uid"] == run_uid)?.clone();
            ["success", "failed"].contains(&run["status"].as_str()?).then_some(run)
        })
    }

    fn assert_failed(&self, run_uid: &str, classes: &[&str]) {
        let run = self.ended(run_uid);
        assert_eq!(run["status"], "failed", "{run}");
        let class = run["error_class"].as_str().unwrap_or_default();
        assert!(classes.contains(&class), "failed as {class}, not as one of {classes:?}: {run}");
    }

    /// A snapshot by hand that succeeds.
    pub(crate) fn snapshot(&self) -> Value {
        self.status();
        let run = self.machine.command(&["hestner-agent", "snapshot", "data", "--json"]).within(RUN_WITHIN).run();
        assert_eq!(run.code, Some(0), "{run}");
        let run = run.any_json();
        assert_eq!(run["status"], "success", "{run}");
        run
    }

    pub(crate) fn repositories(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.machine.at("/srv/hestner")).expect("the destination");
        entries.map(|e| e.expect("an entry").path()).filter(|p| p.join("config").exists()).collect()
    }
}

fn settings() -> String {
    format!(
        r#"# edited by the administrator
[receiver]
address = "localhost:7443"
enrolment_address = "localhost:7444"
retry_max = "1s"

[freeze]
window = "{window}s"

[[destination]]
name = "local"
kind = "folder"
path = "/srv/hestner"

[[service]]
name = "data"
destination = "local"

[service.source]
kind = "files"
paths = ["/data"]

[service.point]
kind = "fsfreeze"
command = ["{POINT}"]
read_from = "/srv/point"

[[service.hook]]
name = "application"
pre_freeze = ["/usr/local/lib/hestner/pre"]
post_thaw = ["/usr/local/lib/hestner/post"]
timeout = "30s"
"#,
        window = WINDOW.as_secs()
    )
}

fn unit_of(kind: &str) -> String {
    format!("hestner-{kind}@*.service")
}

/// Everything that an administrator, a package or a fault does to the units, each while frozen.
fn service_comes_back(hierarchy: Hierarchy) {
    let mut site = Site::enrolled(&format!("booted-frozen-{hierarchy:?}"), hierarchy);
    let settings = site.machine.at("/etc/hestner/agent.toml");
    if hierarchy == Hierarchy::V1 {
        // In a container nobody tells systemd that a control group of the first version is empty: whatever was not
        // gone with its main process is waited for until this is over.
        for kind in ["run", "guard"] {
            let place = format!("/etc/systemd/system/hestner-{kind}@.service.d/test.conf");
            files::write(site.machine.at(&place), "[Service]\nTimeoutStopSec=5s\n");
        }
        site.machine.ok(&["systemctl", "daemon-reload"]);
    }
    site.snapshot();

    let stop = site.while_frozen("systemctl stop", &["systemctl", "stop", "hestner-agent"]);
    assert_eq!(stop.step.code, Some(0), "{}", stop.step);
    assert!(stop.thawed_after < WINDOW, "stopping waits for the window to end");
    site.assert_released("systemctl stop");
    assert!(!site.machine.is_active("hestner-agent"));
    site.machine.ok(&["systemctl", "start", "hestner-agent"]);
    site.assert_failed(&stop.run_uid, &["interrupted", "cancelled"]);

    let restart = site.while_frozen("systemctl restart", &["systemctl", "restart", "hestner-agent"]);
    assert_eq!(restart.step.code, Some(0), "{}", restart.step);
    assert!(site.machine.is_active("hestner-agent"));
    site.assert_released("systemctl restart");
    site.assert_failed(&restart.run_uid, &["interrupted", "cancelled"]);

    for victims in [vec!["agent"], vec!["run"], vec!["guard"], vec!["run", "guard"]] {
        let what = format!("kill -s KILL of {}", victims.join(" and "));
        let units: Vec<String> = victims
            .iter()
            .map(|kind| if *kind == "agent" { "hestner-agent.service".to_owned() } else { unit_of(kind) })
            .collect();
        let mut words = vec!["systemctl", "kill", "-s", "KILL"];
        words.extend(units.iter().map(String::as_str));
        let killed = site.while_frozen(&what, &words);
        assert_eq!(killed.step.code, Some(0), "{}", killed.step);
        site.assert_released(&what);
        let classes = ["interrupted", "cancelled", "guard_lost", "freeze_timeout"];
        site.assert_failed(&killed.run_uid, &classes);
        wait_until("the daemon to be active", Duration::from_secs(30), || site.machine.is_active("hestner-agent"));
    }
    site.snapshot();

    // An upgrade waits for the thaw, keeps what was edited, and leaves active what was active.
    let newer = Packages::build(&site.folder.join("newer"), "0.1.1").agent;
    site.machine.offer(&newer);
    let upgrade = site.frozen_during("apt upgrade", || site.machine.apt(&["upgrade"]).start());
    assert_eq!(upgrade.step.code, Some(0), "{}", upgrade.step);
    assert_eq!(installed_version(&site.machine), "0.1.1");
    assert!(site.machine.is_active("hestner-agent") && site.machine.is_active("hestner-guard.socket"));
    assert!(std::fs::read_to_string(&settings).expect("settings").starts_with("# edited"), "settings were overwritten");
    site.assert_released("apt upgrade");
    // It was the window that ended, not the upgrade that ended the run.
    site.assert_failed(&upgrade.run_uid, &["freeze_timeout"]);
    site.snapshot();

    let power = site
        .frozen_during("container restart", || site.machine.command(&["systemctl", "--no-block", "poweroff"]).start());
    site.machine.wait_off();
    site.machine.boot();
    site.start_writer();
    assert!(site.machine.is_active("hestner-agent"), "enabled, so active after a restart");
    site.assert_released("container restart");
    site.assert_failed(&power.run_uid, &["interrupted", "cancelled", "guard_lost"]);
    site.snapshot();
    let runs = site.repositories();
    assert_eq!(runs.len(), 1);

    // The receiver knows every key by now; so removing leaves all of it, and purging leaves what is the customer's.
    wait_until("the key to be acknowledged", RUN_WITHIN, || {
        site.machine.run(&["hestner-agent", "keys", "--require-escrow"]).code == Some(0)
    });
    let remove = site.frozen_during("apt remove", || site.machine.apt(&["remove", "hestner-agent"]).start());
    assert_eq!(remove.step.code, Some(0), "{}", remove.step);
    site.assert_released("apt remove");
    assert!(settings.exists() && site.machine.at("/var/lib/hestner-agent/keys").exists());
    assert!(!site.machine.is_active("hestner-run.socket"));
    let again = site.machine.install(&newer);
    assert_eq!(again.code, Some(0), "{again}");
    assert!(site.machine.is_active("hestner-agent"), "installed anew, so started");
    site.assert_failed(&remove.run_uid, &["interrupted", "cancelled"]);
    site.snapshot();

    let purge = site.frozen_during("apt purge", || site.machine.apt(&["purge", "hestner-agent"]).start());
    assert_eq!(purge.step.code, Some(0), "{}", purge.step);
    site.assert_released("apt purge");
    // apt shows on one stream what the packages' scripts say on two.
    let said = [purge.step.stdout.as_str(), &purge.step.stderr].concat();
    assert!(said.contains("kept every repository"), "{}", purge.step);
    assert_eq!(site.repositories(), runs, "a repository was touched");
    assert!(!settings.exists() && !site.machine.at("/var/lib/hestner-agent").exists(), "{}", purge.step);
}

pub(crate) fn installed_version(machine: &Booted) -> String {
    machine.ok(&["dpkg-query", "-W", "-f", "${Version}", "hestner-agent"])
}

#[test]
fn service_comes_back_whatever_is_done_to_the_units_on_cgroup_v1() {
    if is_root_or_skips("service_comes_back_whatever_is_done_to_the_units_on_cgroup_v1") {
        service_comes_back(Hierarchy::V1);
    }
}

#[test]
fn service_comes_back_whatever_is_done_to_the_units_on_cgroup_v2() {
    if is_root_or_skips("service_comes_back_whatever_is_done_to_the_units_on_cgroup_v2") {
        service_comes_back(Hierarchy::V2);
    }
}
