//! `hestner-agent prune`: what is no longer wanted goes, with credentials that the host never holds, and stock restic
//! says afterwards that the rest is whole.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hestner_tests::elsewhere::{self, Elsewhere};
use hestner_tests::restic::{FaultyRestic, Repository};
use hestner_tests::s3::S3Server;
use hestner_tests::sftp::SftpServer;
use hestner_tests::{Agent, Run, Service, World, files, is_root_or_skips, tree, wait_until};
use serde_json::Value;

const BULK: usize = 12_000_000;

/// A repository with three snapshots of a service whose bulk is another each time, and one of a small service.
struct Stored {
    world: World,
    agent: Agent,
    source: PathBuf,
    runs: Vec<Run>,
    password: String,
}

impl Stored {
    fn new(name: &str) -> Self {
        let world = World::new(name);
        let source = world.bulky_source("bulky", BULK);
        let agent = world
            .agent()
            .allowed(Service::files("bulky", [&source]))
            .allowed(Service::files("docs", [world.source("docs")]))
            .started();
        let mut runs = vec![agent.snapshot_ok("docs")];
        for number in 0..4 {
            if number > 0 {
                files::write(source.join("bulk.bin"), files::random_bytes(BULK));
            }
            runs.push(agent.snapshot_ok("bulky"));
        }
        let repository = agent.repository("local").path;
        let file = world.at("password");
        let password = elsewhere::password_file(&world.company.recovery_secret, &repository, file);
        Self { world, agent, source, runs, password: password.display().to_string() }
    }

    fn repository(&self) -> PathBuf {
        self.agent.repository("local").path
    }

    fn opening(&self) -> [&str; 2] {
        ["--password-file", &self.password]
    }

    /// Two of the bulky ones go, the newest two of each service stay; restic and we agree on the rest.
    fn assert_prunes(&self, elsewhere: &Elsewhere) {
        let keep = ["prune", "--keep-count", "1", "--json"];
        let dry = elsewhere.run(&[&keep[..], &["--dry-run"]].concat(), &self.opening()).json();
        assert_eq!((ids(&dry["forgotten"]), &dry["kept"]), (self.ids(&[1, 2]), &3.into()), "{dry}");
        assert_eq!(self.listed(elsewhere).len(), 5, "a dry run changes nothing");
        let ended = elsewhere.run(&keep, &self.opening());
        assert!(ended.stderr.contains("restic: "), "its progress is shown: {ended}");
        let pruned = ended.json();
        assert_eq!(ids(&pruned["forgotten"]), self.ids(&[1, 2]), "{pruned}");
        let freed = pruned["bytes_freed"].as_u64().expect("a number");
        assert!(freed > 2 * BULK as u64 - 1_000_000, "{pruned}");
        let (before, after) = (pruned["bytes_before"].as_u64(), pruned["bytes_after"].as_u64());
        assert_eq!(before.and_then(|b| Some(b - after?)), Some(freed), "{pruned}");
        assert_eq!(self.listed(elsewhere), self.ids(&[0, 3, 4]));
        elsewhere.run(&["recover", "verify"], &self.opening()).ok();
        let target = self.world.at("target");
        let text = target.to_str().expect("UTF-8");
        elsewhere.run(&["recover", "restore", self.runs[4].uid(), "--target", text], &self.opening()).ok();
        tree::assert_same(&self.source, &tree::restored(&target, &self.source));
        // Nothing is left to do.
        let again = elsewhere.run(&keep, &self.opening()).json();
        assert_eq!((&again["forgotten"], &again["bytes_freed"]), (&serde_json::json!([]), &0.into()), "{again}");
    }

    fn ids(&self, numbers: &[usize]) -> Vec<String> {
        numbers.iter().map(|number| self.runs[*number].snapshot_id()).collect()
    }

    fn listed(&self, elsewhere: &Elsewhere) -> Vec<String> {
        ids(&elsewhere.run(&["recover", "list", "--json"], &self.opening()).json()["snapshots"])
    }

    fn stock(&self, path: &Path) -> Repository {
        Repository { path: path.to_owned(), password_file: PathBuf::from(&self.password) }
    }
}

fn ids(snapshots: &Value) -> Vec<String> {
    let all = snapshots.as_array().unwrap_or_else(|| panic!("no list in {snapshots}"));
    all.iter().map(|s| s["id"].as_str().expect("an id").to_owned()).collect()
}

#[test]
fn data_that_nothing_wants_goes_from_a_folder_and_restic_finds_the_rest_whole() {
    let stored = Stored::new("prune-folder");
    let copy = stored.world.at("elsewhere/repository");
    let elsewhere = Elsewhere::folder(&stored.repository(), &copy);
    // What goes to restic is looked at by a program in its place.
    let faulty = FaultyRestic::new(&stored.world.at("bin"));
    faulty.on("prune", "cat /proc/$$/environ | tr '\\0' '\\n' > \"$HERE/environment\"");
    let program = faulty.program().display().to_string();
    let unknown = elsewhere.run(&["prune", "--forget", "ffffffff"], &stored.opening());
    assert!(unknown.code == Some(64) && unknown.stderr.contains("code: unknown_snapshot"), "{unknown}");
    let newest = elsewhere.run(&["prune", "--forget", &stored.runs[3].snapshot_id()], &stored.opening());
    assert!(newest.code == Some(64) && newest.stderr.contains("code: newest_snapshot"), "{newest}");
    let [gone] = [stored.runs[1].snapshot_id()];
    elsewhere.run(&["prune", "--restic", &program, "--forget", &gone[..8]], &stored.opening()).ok();
    assert_eq!(stored.listed(&elsewhere), stored.ids(&[0, 2, 3, 4]));
    let secret = std::fs::read_to_string(&stored.password).expect("the password");
    let said = faulty.calls().join("\n") + &files::lines(&stored.world.at("bin/environment")).join("\n");
    assert!(said.contains("prune") && said.contains("PATH="), "{said}");
    assert!(!said.contains(secret.trim()), "the password was said");
    let elsewhere = Elsewhere::folder(&stored.repository(), &stored.world.at("elsewhere/again"));
    stored.assert_prunes(&elsewhere);
    for path in [copy, stored.world.at("elsewhere/again")] {
        let stock = stored.stock(&path);
        assert_eq!(stock.check().code, Some(0));
        assert_eq!(stock.locks(), Vec::<String>::new());
    }
    // The host goes on with what is left of it, whoever pruned.
    assert_eq!(stored.agent.repository("local").snapshots().len(), 5, "its own is another");
}

#[test]
fn without_restic_nothing_is_forgotten() {
    let stored = Stored::new("prune-missing");
    let elsewhere = Elsewhere::folder(&stored.repository(), &stored.world.at("elsewhere"));
    let none = stored.world.at("no-restic").display().to_string();
    let ended = elsewhere.run(&["prune", "--keep-count", "1", "--restic", &none], &stored.opening());
    assert!(ended.code == Some(64) && ended.stderr.contains("code: restic_missing"), "{ended}");
    assert!(ended.stderr.contains("package `restic`"), "{ended}");
    // One that fails has removed nothing that is needed.
    let faulty = FaultyRestic::new(&stored.world.at("bin"));
    faulty.on("prune", "echo 'Fatal: no luck' >&2; exit 1");
    let program = faulty.program().display().to_string();
    assert_eq!(stored.listed(&elsewhere).len(), 5);
    let ended = elsewhere.run(&["prune", "--restic", &program], &stored.opening());
    assert!(ended.code == Some(1) && ended.stderr.contains("no luck"), "{ended}");
    assert!(ended.stderr.contains("code: prune_failed"), "{ended}");
    assert_eq!(stored.listed(&elsewhere).len(), 5);
    let foreign = files::write(stored.world.at("guess"), "0".repeat(64));
    files::set_mode(&foreign, 0o600);
    let opening = ["--password-file", foreign.to_str().expect("UTF-8")];
    let ended = elsewhere.run(&["prune", "--keep-count", "1"], &opening);
    assert!(ended.code == Some(64) && ended.stderr.contains("code: repository_wrong_key"), "{ended}");
}

#[test]
fn bucket_is_pruned_with_credentials_that_the_host_does_not_have_and_not_with_its_own() {
    let stored = Stored::new("prune-s3");
    let server = S3Server::start(&stored.world.at("s3"));
    let file = stored.world.at("put-only.toml");
    let host = Elsewhere::bucket(&stored.repository(), &server, &server.put_only_credentials(), &file);
    let ended = host.run(&["prune", "--keep-count", "1"], &stored.opening());
    assert_ne!(ended.code, Some(0), "{ended}");
    assert!(ended.stderr.contains("cannot remove snapshots/"), "{ended}");
    assert_eq!(stored.listed(&host).len(), 5, "what a host may do removes nothing");
    host.run(&["recover", "verify"], &stored.opening()).ok();
    let other = Elsewhere::opened_bucket(&server, &server.credentials(), &stored.world.at("admin.toml"));
    stored.assert_prunes(&other);
    assert_eq!(stored.listed(&host), stored.ids(&[0, 3, 4]), "and the host sees the same");
}

#[test]
fn folder_of_another_server_is_pruned_over_ssh() {
    if !is_root_or_skips("folder_of_another_server_is_pruned_over_ssh") {
        return;
    }
    let stored = Stored::new("prune-sftp");
    let server = SftpServer::start(&stored.world.at("sshd"), "");
    let elsewhere = Elsewhere::server(&stored.repository(), &server, &stored.world.at("place.toml"));
    stored.assert_prunes(&elsewhere);
    assert_eq!(stored.stock(&server.files().join("repository")).check().code, Some(0));
}

#[test]
fn destination_of_the_host_is_pruned_and_its_ledger_knows_what_went() {
    let stored = Stored::new("prune-destination");
    let agent = &stored.agent;
    let unknown = agent.cli(&["prune", "--destination", "nowhere"]);
    assert!(unknown.code == Some(64) && unknown.stderr.contains("code: unknown_destination"), "{unknown}");
    let pruned = agent.cli(&["prune", "--destination", "local", "--keep-count", "2", "--json"]).json();
    assert_eq!(ids(&pruned["forgotten"]), stored.ids(&[1, 2]), "{pruned}");
    assert!(pruned["bytes_freed"].as_u64().expect("a number") > BULK as u64 - 1_000_000, "{pruned}");
    let ended = agent.restore(stored.runs[1].uid(), &stored.world.at("gone"));
    assert!(ended.code == Some(64) && ended.stderr.contains("code: artifact_expired"), "{ended}");
    let target = stored.world.at("target");
    agent.restore(stored.runs[4].uid(), &target).ok();
    tree::assert_same(&stored.source, &tree::restored(&target, &stored.source));
    let next = agent.snapshot_ok("bulky");
    agent.assert_repository_holds(&[&stored.runs[0], &stored.runs[3], &stored.runs[4], &next]);
    assert_eq!(agent.repository("local").check().code, Some(0));
}

#[test]
fn prune_waits_for_who_reads_or_writes_and_says_who_it_is() {
    let stored = Stored::new("prune-locked");
    let copy = stored.world.at("elsewhere");
    let elsewhere = Elsewhere::folder(&stored.repository(), &copy);
    let stock = stored.stock(&copy);
    // restic holds its lock as long as its input is open.
    let mut writer = stock.stock(&["backup", "--stdin", "--stdin-filename", "slow"]).spawn_told();
    wait_until("a lock", Duration::from_secs(30), || {
        std::fs::read_dir(copy.join("locks")).map(Iterator::count).unwrap_or_default() > 0
    });
    let ended = elsewhere.run(&["prune", "--lock-wait", "1"], &stored.opening());
    assert!(ended.code == Some(1) && ended.stderr.contains("code: repository_locked"), "{ended}");
    assert!(ended.stderr.contains(&format!("PID {}", writer.id())), "{ended}");
    let waiting = elsewhere.command(&["prune", "--lock-wait", "60"], &stored.opening()).start();
    let mut input = writer.stdin.take().expect("a pipe");
    std::io::Write::write_all(&mut input, b"what came late").expect("a reader");
    drop(input);
    assert!(writer.wait().expect("an end").success());
    assert_eq!(waiting.ended().code, Some(0));
    assert_eq!(stock.check().code, Some(0));
}

#[test]
fn prune_that_is_stopped_ends_restic_in_good_order() {
    let stored = Stored::new("prune-stopped");
    let copy = stored.world.at("elsewhere");
    let elsewhere = Elsewhere::folder(&stored.repository(), &copy);
    let faulty = FaultyRestic::new(&stored.world.at("bin"));
    faulty
        .on("prune", "touch \"$HERE/begun\"; trap 'touch \"$HERE/asked\"; exit 130' INT; while :; do sleep 0.05; done");
    let program = faulty.program().display().to_string();
    let started = elsewhere.command(&["prune", "--restic", &program], &stored.opening()).start();
    wait_until("restic to prune", Duration::from_secs(60), || stored.world.at("bin/begun").exists());
    hestner_tests::processes::send(started.pid(), nix::sys::signal::Signal::SIGTERM);
    let ended = started.ended();
    assert!(ended.code == Some(1) && ended.stderr.contains("code: cancelled"), "{ended}");
    assert!(stored.world.at("bin/asked").exists(), "it was not asked to end");
    assert_eq!(stored.listed(&elsewhere).len(), 5);
}
