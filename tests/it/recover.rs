//! The host is gone: on a machine with nothing but the program, repository and recovery key give everything back, and
//! without that key there is nothing, for the receiver's operator either.

use std::path::{Path, PathBuf};

use hestner_tests::elsewhere::{self, Elsewhere};
use hestner_tests::restic::Repository;
use hestner_tests::s3::S3Server;
use hestner_tests::sftp::SftpServer;
use hestner_tests::{Cmd, Ended, Run, Service, World, files, is_root_or_skips, tree, wait_until};
use serde_json::Value;

/// What a host left: its repository, and what was in it.
struct Left {
    world: World,
    /// The repository in the host's own folder, which is still there.
    repository: PathBuf,
    server_id: i64,
    sources: [(&'static str, PathBuf); 2],
    runs: Vec<Run>,
}

impl Left {
    /// A host with two services takes three snapshots and is gone; nobody else has its state.
    fn behind(name: &str) -> Self {
        let world = World::new(name);
        let (docs, site) = (world.source("docs"), world.source("site"));
        let agent =
            world.agent().allowed(Service::files("docs", [&docs])).allowed(Service::files("site", [&site])).started();
        let mut runs = vec![agent.snapshot_ok("docs"), agent.snapshot_ok("site")];
        files::write(docs.join("later.txt"), "written after the first snapshot");
        runs.push(agent.snapshot_ok("docs"));
        agent.wait_outbox_empty();
        let repository = world.at("left/repository");
        Cmd::new("cp").arg("-a").arg(agent.repository("local").path).arg(&repository).ok();
        let (folder, server_id) = (agent.folder().to_owned(), agent.server_id);
        drop(agent);
        std::fs::remove_dir_all(folder).expect("the host's folder");
        Self { world, repository, server_id, sources: [("docs", docs), ("site", site)], runs }
    }

    fn recovery_key(&self) -> &Path {
        &self.world.company.recovery_secret
    }

    fn key(&self) -> [&str; 2] {
        ["--recovery-key", self.recovery_key().to_str().expect("UTF-8")]
    }

    /// A recovery key of somebody else.
    fn foreign_key(&self) -> PathBuf {
        let key = self.world.at("stranger.secret");
        Cmd::new("age-keygen").arg("-o").arg(&key).ok();
        key
    }

    /// Everything is listed as it is, verified, and given back, by any of the names of a snapshot.
    fn assert_all_is_there(&self, elsewhere: &Elsewhere, opening: &[&str]) {
        let list = elsewhere.run(&["recover", "list", "--json"], opening).json();
        let listed = list["snapshots"].as_array().expect("snapshots");
        let ids: Vec<&str> = listed.iter().map(|s| s["id"].as_str().expect("an id")).collect();
        assert_eq!(ids, self.runs.iter().map(Run::snapshot_id).collect::<Vec<_>>(), "{list}");
        for (snapshot, run) in listed.iter().zip(&self.runs) {
            assert_eq!(snapshot["run_uid"], run.uid(), "{list}");
            assert_eq!(snapshot["service"], run.text("service"), "{list}");
            assert!(!snapshot["hostname"].as_str().expect("a name").is_empty(), "{list}");
        }
        let shown = elsewhere.run(&["recover", "list"], opening).ok();
        assert!(ids.iter().all(|id| shown.contains(&id[..8])), "{shown}");
        let verified = elsewhere.run(&["recover", "verify", "--json"], opening).json();
        assert_eq!((&verified["snapshots"], &verified["verified"]), (&3.into(), &true.into()), "{verified}");
        assert_eq!(verified["packs"], verified["packs_read"], "{verified}");
        let [first, site, last] = &self.runs[..] else { panic!("three runs") };
        for (name, of_service) in
            [(site.snapshot_id(), 1), (last.uid().to_owned(), 0), (first.snapshot_id()[..8].to_owned(), 0)]
        {
            let target = self.world.at("target");
            let _ = std::fs::remove_dir_all(&target);
            let text = target.to_str().expect("UTF-8");
            elsewhere.run(&["recover", "restore", &name, "--target", text], opening).ok();
            let source = &self.sources[of_service].1;
            if name == first.snapshot_id()[..8] {
                assert!(!tree::restored(&target, source).join("later.txt").exists(), "it came later");
            } else {
                tree::assert_same(source, &tree::restored(&target, source));
            }
        }
    }

    /// Nothing is told and nothing written.
    fn assert_nothing_is_there(&self, elsewhere: &Elsewhere, opening: &[&str], code: &str) {
        let target = self.world.at("refused");
        let restore = ["recover", "restore", &self.runs[0].snapshot_id(), "--target", target.to_str().expect("UTF-8")];
        for command in [&["recover", "list", "--json"][..], &["recover", "verify"], &restore] {
            let ended = elsewhere.run(command, opening);
            assert_refused(&ended, code);
            let said = ended.to_string().replace(&self.runs[0].snapshot_id(), "");
            for secret in ["docs", &self.runs[1].snapshot_id()[..8], self.runs[1].uid()] {
                assert!(!said.contains(secret), "{secret}: {said}");
            }
        }
        let written = std::fs::read_dir(&target).map(Iterator::count).unwrap_or_default();
        assert_eq!(written, 0, "files in {}", target.display());
    }
}

fn assert_refused(ended: &Ended, code: &str) {
    assert_eq!(ended.code, Some(64), "{ended}");
    assert!(ended.stderr.contains(&format!("code: {code}")) && ended.stderr.contains("next: "), "{ended}");
    assert!(ended.stdout.is_empty(), "{ended}");
}

#[test]
fn host_and_receiver_are_gone_and_the_recovery_key_gives_everything_back() {
    let mut left = Left::behind("recover-all");
    left.world.receiver.stop();
    let elsewhere = Elsewhere::folder(&left.repository, &left.world.at("elsewhere/repository"));
    left.assert_all_is_there(&elsewhere, &left.key());
    // restic says the same of what is listed, and nobody's lock is left.
    let password_file = elsewhere::password_file(left.recovery_key(), &left.repository, left.world.at("password"));
    let stock = Repository { path: left.world.at("elsewhere/repository"), password_file: password_file.clone() };
    assert_eq!(stock.snapshots().len(), 3);
    assert_eq!(stock.locks(), Vec::<String>::new());
    assert_eq!(stock.check().code, Some(0));
    // So does who has unwrapped the password before.
    let opening = ["--password-file", password_file.to_str().expect("UTF-8")];
    left.assert_all_is_there(&elsewhere, &opening);
}

#[test]
fn medium_that_takes_nothing_is_read_without_a_lock() {
    if !is_root_or_skips("medium_that_takes_nothing_is_read_without_a_lock") {
        return;
    }
    let left = Left::behind("recover-readonly");
    let mount = left.world.at("medium");
    std::fs::create_dir_all(&mount).expect("a folder");
    Cmd::new("mount").args(["--bind", "-o", "ro"]).arg(left.repository.parent().expect("a parent")).arg(&mount).ok();
    let folder = mount.join("repository").display().to_string();
    let text = left.world.at("target").display().to_string();
    let run = |command: &[&str]| elsewhere::agent(&[command, &["--folder", &folder], &left.key()].concat()).run();
    let (verified, restored) =
        (run(&["recover", "verify"]), run(&["recover", "restore", &left.runs[1].snapshot_id(), "--target", &text]));
    Cmd::new("umount").arg("-l").arg(&mount).ok();
    assert_eq!((verified.code, restored.code), (Some(0), Some(0)), "{verified}\n{restored}");
    tree::assert_same(&left.sources[1].1, &tree::restored(Path::new(&text), &left.sources[1].1));
}

#[test]
fn without_the_recovery_key_nothing_is_listed_and_nothing_written() {
    let left = Left::behind("recover-nothing");
    let elsewhere = Elsewhere::folder(&left.repository, &left.world.at("elsewhere/repository"));
    left.assert_nothing_is_there(&elsewhere, &[], "usage");
    let foreign = left.foreign_key().display().to_string();
    left.assert_nothing_is_there(&elsewhere, &["--recovery-key", &foreign], "recovery_key_wrong");
    // The public half is no key, and neither is what stands in no file.
    let public = left.world.at("acme-recovery.pub");
    files::set_mode(&public, 0o600);
    let public = public.display().to_string();
    left.assert_nothing_is_there(&elsewhere, &["--recovery-key", &public], "recovery_key_malformed");
    left.assert_nothing_is_there(&elsewhere, &["--recovery-key", "/nonexistent"], "secret_not_believed");
    // One that others could have read is none.
    let secret = std::fs::read_to_string(left.recovery_key()).expect("the key");
    let shown = files::write(left.world.at("shown.secret"), &secret).display().to_string();
    left.assert_nothing_is_there(&elsewhere, &["--recovery-key", &shown], "secret_not_believed");
    let guess = files::write(left.world.at("guess"), "0".repeat(64));
    files::set_mode(&guess, 0o600);
    let guess = guess.display().to_string();
    left.assert_nothing_is_there(&elsewhere, &["--password-file", &guess], "repository_wrong_key");
    // An encrypted key has to be decrypted first, and says so.
    let recipient = Cmd::new("age-keygen").arg("-y").arg(left.recovery_key()).ok();
    let protected = left.world.at("protected.secret");
    Cmd::new("age").args(["-r", recipient.trim(), "-o"]).arg(&protected).arg(left.recovery_key()).ok();
    files::set_mode(&protected, 0o600);
    let protected = protected.display().to_string();
    left.assert_nothing_is_there(&elsewhere, &["--recovery-key", &protected], "recovery_key_protected");
    // The right one stands in none of all that was said.
    let ended = elsewhere.run(&["recover", "list"], &["--recovery-key", &shown]);
    let secret = secret.lines().last().expect("a key");
    assert!(!ended.to_string().contains(secret), "the key was said");
}

#[test]
fn wrong_places_are_named_and_nothing_is_made_there() {
    let left = Left::behind("recover-places");
    let above = left.repository.parent().expect("a parent").display().to_string();
    let run = |place: [&str; 2]| elsewhere::agent(&[&["recover", "list"], &place[..], &left.key()].concat()).run();
    let ended = run(["--folder", &above]);
    assert_refused(&ended, "repository_missing");
    assert!(ended.stderr.contains("below it there are: repository"), "{ended}");
    let none = left.world.at("none").display().to_string();
    let ended = run(["--folder", &none]);
    assert_ne!(ended.code, Some(0), "{ended}");
    assert!(!Path::new(&none).exists(), "it was made");
    let file = files::write(left.world.at("place.toml"), "kind = \"s3\"\nendpoint = \"x\"\nrepository = \"../a\"\n");
    let ended = run(["--place", file.to_str().expect("UTF-8")]);
    assert_refused(&ended, "place_invalid");
    for part in ["`endpoint` must", "`bucket` must", "`credentials_file` must", "`repository` has"] {
        assert!(ended.stderr.contains(part), "{part}: {ended}");
    }
    files::set_mode(&file, 0o666);
    assert_refused(&run(["--place", file.to_str().expect("UTF-8")]), "secret_not_believed");
}

#[test]
fn hostile_wrapped_key_beside_the_repository_opens_nothing_and_the_receivers_copy_does() {
    let left = Left::behind("recover-hostile");
    let copy = left.world.at("elsewhere/repository");
    let elsewhere = Elsewhere::folder(&left.repository, &copy);
    let (wrapped, foreign) = (copy.join("hestner-key.age"), left.foreign_key());
    let recipient = |secret: &Path| Cmd::new("age-keygen").arg("-y").arg(secret).ok().trim().to_owned();
    let sealed = |secret: &Path, text: &str| {
        let path = left.world.at("sealed.age");
        Cmd::new("age").args(["-r", &recipient(secret), "-o"]).arg(&path).stdin(text).ok();
        std::fs::read(path).expect("a file")
    };
    for (bytes, code) in [
        (sealed(&foreign, "password"), "recovery_key_wrong"),
        // Anybody can wrap for a public key; what comes out has to open the repository.
        (sealed(left.recovery_key(), "password"), "repository_wrong_key"),
        (sealed(left.recovery_key(), "two\nlines"), "wrapped_key_damaged"),
        (sealed(left.recovery_key(), &"a".repeat(100_000)), "wrapped_key_damaged"),
        (b"nothing of age's".to_vec(), "wrapped_key_damaged"),
        (Vec::new(), "wrapped_key_damaged"),
        (files::random_bytes(1_000_000), "wrapped_key_damaged"),
    ] {
        files::write(&wrapped, bytes);
        left.assert_nothing_is_there(&elsewhere, &left.key(), code);
    }
    std::fs::remove_file(&wrapped).expect("a file");
    std::os::unix::fs::symlink(left.recovery_key(), &wrapped).expect("a link");
    let ended = elsewhere.run(&["recover", "list"], &left.key());
    assert_ne!(ended.code, Some(0), "a link was followed: {ended}");
    std::fs::remove_file(&wrapped).expect("a link");
    left.assert_nothing_is_there(&elsewhere, &left.key(), "wrapped_key_missing");
    let exported = exported(&left);
    let [flag, key] = left.key();
    let opening = [flag, key, "--wrapped-key", exported.to_str().expect("UTF-8")];
    left.assert_all_is_there(&elsewhere, &opening);
}

/// The wrapped key as the receiver's operator hands it out.
fn exported(left: &Left) -> PathBuf {
    let server = left.server_id.to_string();
    let list = left.world.receiver.cli(&["keys", "list", "--server", &server, "--json"]).json();
    let id = list[0]["repository_id"].as_str().unwrap_or_else(|| panic!("no key in {list}")).to_owned();
    let out = left.world.at("exported.age");
    let text = out.to_str().expect("UTF-8");
    left.world.receiver.cli(&["keys", "export", "--server", &server, "--repository", &id[..8], "--out", text]).ok();
    out
}

#[test]
fn receiver_hands_out_what_opens_nothing_for_its_operator() {
    use std::os::unix::fs::MetadataExt as _;
    let left = Left::behind("recover-operator");
    let receiver = &left.world.receiver;
    let exported = exported(&left);
    assert_eq!(std::fs::metadata(&exported).expect("a file").mode() & 0o777, 0o600);
    let beside = std::fs::read(left.repository.join("hestner-key.age")).expect("the wrapped key");
    assert_eq!(std::fs::read(&exported).expect("a file"), beside);
    let server = left.server_id.to_string();
    let twice = receiver.cli(&[
        "keys",
        "export",
        "--server",
        &server,
        "--repository",
        "00000000",
        "--out",
        exported.to_str().expect("UTF-8"),
    ]);
    assert!(twice.code == Some(64) && twice.stderr.contains("file_exists"), "{twice}");
    // Who took it stands in the audit log, whose chain holds.
    receiver.cli(&["audit", "verify"]).ok();
    assert_eq!(audited(&left.world, "repository_key_exported"), 1);
    // REST shows it to the company that it belongs to, and to nobody else.
    let page = format!("/v1/servers/{server}/repository-keys");
    let shown = receiver.get_json(&page);
    let keys: Vec<Value> = hestner_tests::receiver::rows(&shown);
    assert_eq!((keys.len(), keys[0]["form"].as_str()), (1, Some("wrapped")), "{shown}");
    let encoded = Cmd::new("base64").args(["-w", "0"]).arg(&exported).ok();
    assert_eq!(keys[0]["wrapped"], encoded.trim(), "{shown}");
    let stranger = receiver.api_key(Some(left.world.company("other").id));
    let bearer = format!("Bearer {stranger}");
    let reply = receiver.request("GET", &page, &[("authorization", &bearer)], None).expect("an answer");
    assert_eq!(reply.status, 404, "{reply:?}");
    // All that the operator has: the password stands in none of it, and what is there does not open the key.
    let password = elsewhere::unwrapped(left.recovery_key(), &exported).ok();
    let found = Cmd::new("grep").args(["-rlaF", "-e", password.trim()]).arg(receiver.state()).run();
    assert_eq!(found.stdout, "", "{found}");
    let elsewhere = Elsewhere::folder(&left.repository, &left.world.at("elsewhere/repository"));
    let ca = receiver.state().join("ca/key.pem").display().to_string();
    left.assert_nothing_is_there(&elsewhere, &["--recovery-key", &ca], "recovery_key_malformed");
    let as_password = ["--password-file", exported.to_str().expect("UTF-8")];
    left.assert_nothing_is_there(&elsewhere, &as_password, "secret_not_believed");
}

/// How many rows of that action the audit log has.
fn audited(world: &World, action: &str) -> i64 {
    let db = rusqlite::Connection::open(world.receiver.state().join("receiver.db")).expect("the store");
    db.query_row("SELECT count(*) FROM audit WHERE action = ?1", [action], |row| row.get(0)).expect("a count")
}

#[test]
fn open_repository_is_read_with_the_password_that_the_receiver_hands_out() {
    let world = World::new("recover-open");
    let source = world.source("docs");
    let agent =
        world.agent().allowed(Service::files("docs", [&source])).setting("floor", "allow_unencrypted = true").started();
    let path = format!("/v1/servers/{}/snapshot-policy", agent.server_id);
    let policy = serde_json::json!({
        "service": "docs", "cron": "", "retention_days": 1, "retention_count": 1, "destination": "local",
        "encryption_enabled": false,
    });
    assert_eq!(world.receiver.put(&path, &policy).status, 200);
    wait_until("the policy to be applied", std::time::Duration::from_secs(20), || {
        hestner_tests::receiver::rows(&world.receiver.get_json(&path))[0]["state"] == "applied"
    });
    let run = agent.snapshot_ok("docs");
    agent.wait_outbox_empty();
    let server = agent.server_id.to_string();
    let copy = world.at("elsewhere");
    let elsewhere = Elsewhere::folder(&agent.folder().join(format!("repository/server-{server}-open")), &copy);
    drop(agent);
    let listed = world.receiver.cli(&["keys", "list", "--server", &server, "--json"]).json();
    assert_eq!((&listed[0]["form"], &listed[0]["wrapped"]), (&"open".into(), &Value::Null), "{listed}");
    let (id, out) = (listed[0]["repository_id"].as_str().expect("an id"), world.at("open.password"));
    let text = out.to_str().expect("UTF-8");
    let export = ["keys", "export", "--server", &server, "--repository", id, "--out", text];
    let said = world.receiver.cli(&export).ok();
    let password = std::fs::read_to_string(&out).expect("the password");
    assert!(!said.contains(password.trim()) && !listed.to_string().contains(password.trim()), "it was printed");
    let list = elsewhere.run(&["recover", "list", "--json"], &["--password-file", text]).json();
    assert_eq!(list["snapshots"][0]["id"], run.snapshot_id(), "{list}");
}

#[test]
fn everything_comes_back_from_a_bucket_with_the_recovery_key_alone() {
    let mut left = Left::behind("recover-s3");
    left.world.receiver.stop();
    let server = S3Server::start(&left.world.at("s3"));
    let elsewhere =
        Elsewhere::bucket(&left.repository, &server, &server.put_only_credentials(), &left.world.at("place.toml"));
    // Those that a host stores with are enough.
    left.assert_all_is_there(&elsewhere, &left.key());
    let foreign = left.foreign_key().display().to_string();
    left.assert_nothing_is_there(&elsewhere, &["--recovery-key", &foreign], "recovery_key_wrong");
    // A secret that the server does not know is not said when it is refused.
    let wrong = files::write(
        left.world.at("wrong.toml"),
        "access_key_id = \"AKADMIN\"\nsecret_access_key = \"wrong-secret-of-s3\"\n",
    );
    files::set_mode(&wrong, 0o600);
    let refused = Elsewhere::opened_bucket(&server, &wrong, &left.world.at("wrong-place.toml"));
    let ended = refused.run(&["recover", "list"], &left.key());
    assert_ne!(ended.code, Some(0), "{ended}");
    assert!(!ended.to_string().contains("wrong-secret-of-s3"), "{ended}");
}

#[test]
fn everything_comes_back_from_another_server_with_the_recovery_key_alone() {
    if !is_root_or_skips("everything_comes_back_from_another_server_with_the_recovery_key_alone") {
        return;
    }
    let mut left = Left::behind("recover-sftp");
    left.world.receiver.stop();
    let server = SftpServer::start(&left.world.at("sshd"), "");
    let elsewhere = Elsewhere::server(&left.repository, &server, &left.world.at("place.toml"));
    left.assert_all_is_there(&elsewhere, &left.key());
    let foreign = left.foreign_key().display().to_string();
    left.assert_nothing_is_there(&elsewhere, &["--recovery-key", &foreign], "recovery_key_wrong");
}

#[test]
fn damage_is_found_and_named_and_what_is_damaged_is_not_restored_as_if_it_were_whole() {
    let left = Left::behind("recover-damage");
    let copy = left.world.at("elsewhere/repository");
    let elsewhere = Elsewhere::folder(&left.repository, &copy);
    let largest = "find data -type f -printf '%s %p\\n' | sort -n | tail -1 | cut -d' ' -f2-";
    let pack = Cmd::new("bash").args(["-c", largest]).in_folder(&copy).ok();
    let pack = copy.join(pack.trim());
    let mut bytes = std::fs::read(&pack).expect("a pack");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    files::set_mode(&pack, 0o600);
    files::write(&pack, bytes);
    let ended = elsewhere.run(&["recover", "verify"], &left.key());
    let name = pack.file_name().expect("a name").to_string_lossy().into_owned();
    assert!(ended.code != Some(0) && ended.stderr.contains(&name), "{ended}");
    assert!(ended.stderr.contains("code: verify_failed"), "{ended}");
}

#[test]
fn interrupted_restore_leaves_no_lock_and_goes_on_elsewhere() {
    let left = Left::behind("recover-interrupted");
    let copy = left.world.at("elsewhere/repository");
    let elsewhere = Elsewhere::folder(&left.repository, &copy);
    let target = left.world.at("target").display().to_string();
    let restore = ["recover", "restore", &left.runs[0].snapshot_id(), "--target", &target];
    // It may be faster than the signal: either way nothing of it is left in the repository.
    let started = elsewhere.command(&restore, &left.key()).start();
    wait_until("it to hold a lock or to end", std::time::Duration::from_secs(30), || {
        let locks = std::fs::read_dir(copy.join("locks")).map(Iterator::count).unwrap_or_default();
        locks > 0 || !hestner_tests::processes::is_alive(started.pid())
    });
    hestner_tests::processes::send(started.pid(), nix::sys::signal::Signal::SIGTERM);
    let ended = started.ended();
    assert!(ended.code.is_some(), "a signal ended it: {ended}");
    assert_eq!(std::fs::read_dir(copy.join("locks")).map(Iterator::count).unwrap_or_default(), 0, "{ended}");
}
