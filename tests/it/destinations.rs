//! Runs at every kind of destination: a folder, a real S3 server and a real `sshd`, with stock restic as the judge.

use std::path::Path;

use hestner_tests::proxy::Proxy;
use hestner_tests::s3::{BUCKET, PREFIX, S3Server};
use hestner_tests::sftp::SftpServer;
use hestner_tests::{Agent, Cmd, Service, World, files, tree};

/// Lines of a destination of the kind `s3`.
fn bucket(port: u16, credentials: &Path) -> String {
    format!(
        "kind = \"s3\"\nendpoint = \"http://127.0.0.1:{port}\"\nbucket = \"{BUCKET}\"\nprefix = \"{PREFIX}\"\n\
         credentials_file = {credentials:?}"
    )
}

/// Lines of a destination of the kind `sftp`.
fn server(sftp: &SftpServer) -> String {
    format!(
        "kind = \"sftp\"\nhost = \"127.0.0.1\"\nport = {}\nuser = {:?}\npath = {:?}\nidentity_file = {:?}\n\
         known_hosts = {:?}",
        sftp.port(),
        sftp.user(),
        sftp.files(),
        sftp.identity_file(),
        sftp.known_hosts()
    )
}

/// What any destination must do for runs; `restic` is stock restic on the repository there.
fn goes_its_way(world: &World, destination: &str, put_only: bool, restic: &dyn Fn(&Agent) -> Cmd) {
    let source = world.source("source");
    files::write(source.join("noise"), files::random_bytes(1 << 20));
    let gate = world.at("fails");
    let body = format!("seq 1 100000; [ ! -e {} ]", gate.display());
    let dump = files::write_script(world.at("programs/dump"), &body).display().to_string();
    let put_only = if put_only { "\nput_only = true" } else { "" };
    let agent = world
        .agent()
        .destination_of("elsewhere", &format!("{destination}{put_only}"))
        .allowed(Service::files("docs", [&source]).destination("elsewhere"))
        .allowed(Service::command("dump", &[&dump], "dump.txt").destination("elsewhere"))
        .started();

    let first = agent.snapshot_ok("docs");
    let before = tree::manifest(&source);
    files::write(source.join("added.txt"), "added later");
    let second = agent.snapshot_ok("docs");
    assert!(second.number("bytes_stored") < first.number("bytes_stored") / 4, "{first:?} {second:?}");
    files::write(&gate, "");
    agent.snapshot("dump").assert_failed("producer_failed");
    std::fs::remove_file(&gate).expect("a file");
    let dumped = agent.snapshot_ok("dump");

    let held = restic(&agent).args(["snapshots", "--json", "--no-lock"]).run().json();
    let mut held: Vec<&str> = held.as_array().into_iter().flatten().filter_map(|s| s["id"].as_str()).collect();
    let mut expected = [&first, &second, &dumped].map(|run| run.snapshot_id());
    held.sort_unstable();
    expected.sort();
    assert_eq!(held, expected, "a failed run leaves no snapshot");
    assert_eq!(restic(&agent).args(["list", "locks", "--no-lock"]).ok(), "", "locks are gone");
    restic(&agent).args(["check", "--read-data"]).ok();

    let ours = world.at("ours");
    agent.restore(first.uid(), &ours).ok();
    tree::assert_same_manifest(&before, &tree::manifest(&tree::restored(&ours, &source)));
    let theirs = world.at("theirs");
    restic(&agent).args(["restore", &second.snapshot_id(), "--target"]).arg(&theirs).ok();
    tree::assert_same_manifest(&tree::manifest(&source), &tree::manifest(&tree::restored(&theirs, &source)));
    agent.cli(&["verify", dumped.uid()]).ok();
    let doctor = agent.cli(&["doctor", "--json"]).stdout;
    assert!(doctor.contains("holds this server's repository") || doctor.contains("can be written"), "{doctor}");
}

fn restic_with_password(agent: &Agent) -> Cmd {
    Cmd::new(hestner_tests::restic::STOCK)
        .arg("--no-cache")
        .arg("--password-file")
        .arg(agent.password_file("elsewhere"))
}

/// Stock restic in a bucket, as the user who may do all.
fn restic_in_bucket(agent: &Agent, s3: &S3Server) -> Cmd {
    let (id, secret) = s3.keys();
    let place = format!("s3:http://127.0.0.1:{}/{BUCKET}/{PREFIX}/{}", s3.port(), agent.repository_name());
    restic_with_password(agent).env("AWS_ACCESS_KEY_ID", id).env("AWS_SECRET_ACCESS_KEY", secret).args(["-r", &place])
}

#[test]
fn runs_store_in_a_folder() {
    let world = World::new("destination-folder");
    let folder = world.at("elsewhere");
    std::fs::create_dir_all(&folder).expect("a folder");
    let lines = format!("kind = \"folder\"\npath = {folder:?}");
    goes_its_way(&world, &lines, false, &|agent| {
        restic_with_password(agent).arg("-r").arg(folder.join(agent.repository_name()))
    });
}

#[test]
fn runs_store_in_a_bucket() {
    let world = World::new("destination-s3");
    let s3 = S3Server::start(&world.at("s3"));
    let lines = bucket(s3.port(), &s3.credentials());
    goes_its_way(&world, &lines, false, &|agent| restic_in_bucket(agent, &s3));
}

#[test]
fn runs_store_in_a_bucket_with_credentials_that_can_only_put_get_and_list() {
    let world = World::new("destination-put-only");
    let s3 = S3Server::start(&world.at("s3"));
    // Beside the server's own policy the line refuses what deletes or overwrites.
    let proxy = Proxy::start(s3.port());
    proxy.refuse();
    let lines = bucket(proxy.port(), &s3.put_only_credentials());
    goes_its_way(&world, &lines, true, &|agent| restic_in_bucket(agent, &s3));
    let deleted: Vec<String> = proxy.requests().into_iter().filter(|line| line.starts_with("DELETE")).collect();
    assert!(!deleted.is_empty() && deleted.iter().all(|line| line.contains("/locks/")), "{deleted:?}");
}

#[test]
fn runs_store_in_a_folder_of_another_server() {
    let world = World::new("destination-sftp");
    let sftp = SftpServer::start(&world.at("sftp"), "");
    let files = sftp.files();
    goes_its_way(&world, &server(&sftp), false, &|agent| {
        restic_with_password(agent).arg("-r").arg(files.join(agent.repository_name()))
    });
}
