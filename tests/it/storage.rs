//! Places for objects: one suite of behaviour, run on a folder, a real S3 server and a real `sshd`, and what each
//! of them does when the server fails, refuses or is cut off.

#![expect(clippy::unwrap_used, reason = "a place that does not answer fails the test, in one suite of many calls")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use hestner_agent::storage::{
    Folder, Kind, Limits, Object, S3Place, SftpPlace, Storage, StorageError, s3 as open_s3, sftp as open_sftp,
};
use hestner_tests::clock::{now, wait_until};
use hestner_tests::proxy::{Fault, Proxy};
use hestner_tests::s3::{BUCKET, PREFIX, S3Server};
use hestner_tests::sftp::SftpServer;
use hestner_tests::{files, is_root_or_skips};
use nix::sys::signal::Signal;

/// Those with many objects.
const KINDS: [Kind; 5] = [Kind::Key, Kind::Lock, Kind::Snapshot, Kind::Index, Kind::Pack];
const MIB: usize = 1024 * 1024;

/// A folder whose parents nobody else can write, as credentials need.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder")
}

fn limits() -> Limits {
    Limits {
        tries_max: 5,
        delay_base: Duration::from_millis(10),
        delay_max: Duration::from_millis(100),
        stall_max: Duration::from_secs(20),
        concurrent_calls: 8,
        ..Limits::default()
    }
}

fn once() -> Limits {
    Limits { tries_max: 1, ..limits() }
}

fn object(kind: Kind, number: u64) -> Object {
    // The first digits differ, so that packs lie in several folders.
    Object::new(kind, format!("{:02x}{number:062x}", number % 256))
}

fn config() -> Object {
    Object::new(Kind::Config, "config")
}

fn s3_at(port: u16, credentials: PathBuf, limits: &Limits) -> Box<dyn Storage> {
    let place = S3Place {
        endpoint: format!("http://127.0.0.1:{port}"),
        bucket: BUCKET.to_owned(),
        prefix: PREFIX.to_owned(),
        region: "us-east-1".to_owned(),
        path_style: true,
        credentials_file: credentials,
    };
    open_s3(&place, limits).expect("a bucket")
}

fn sftp_place(server: &SftpServer) -> SftpPlace {
    SftpPlace {
        host: "127.0.0.1".to_owned(),
        port: server.port(),
        user: server.user(),
        path: server.files().join("repository").display().to_string(),
        identity_file: server.identity_file(),
        known_hosts: server.known_hosts(),
    }
}

fn sftp_at(server: &SftpServer, limits: &Limits) -> Box<dyn Storage> {
    open_sftp(&sftp_place(server), limits).expect("a folder of the server")
}

/// Everything that any place must do; `plant` stores a file at a path past the tested one.
fn behaves(storage: &dyn Storage, plant: &dyn Fn(&str, &[u8])) {
    new_place_is_empty(storage);
    wrapped_key_lies_at_the_root(storage, plant);
    objects_are_written_once(storage);
    parts_and_bounds_hold(storage);
    listings_name_objects_only(storage, plant);
    names_that_lead_elsewhere_are_refused(storage);
    one_of_many_writers_wins(storage);
    big_and_many(storage);
}

fn new_place_is_empty(storage: &dyn Storage) {
    assert!(matches!(storage.get(&config(), 10), Err(StorageError::Missing(_))));
    storage.put(&config(), b"config").unwrap();
    assert_eq!(storage.list(Kind::Config).unwrap(), [("config".to_owned(), 6)]);
    for kind in &KINDS {
        assert!(storage.list(*kind).unwrap().is_empty(), "{kind:?}");
        let missing = object(*kind, 1);
        assert!(matches!(storage.get(&missing, 10), Err(StorageError::Missing(_))), "{kind:?}");
        assert!(matches!(storage.get_range(&missing, 0, 1), Err(StorageError::Missing(_))), "{kind:?}");
        storage.remove(&missing).unwrap();
    }
}

fn wrapped_key_lies_at_the_root(storage: &dyn Storage, plant: &dyn Fn(&str, &[u8])) {
    let key = Object::only(Kind::WrappedKey).unwrap();
    assert_eq!(key.path(), "hestner-key.age");
    assert!(storage.list(Kind::WrappedKey).unwrap().is_empty());
    assert!(matches!(storage.get(&key, 10), Err(StorageError::Missing(_))));
    storage.put(&key, b"wrapped").unwrap();
    storage.put(&key, b"wrapped").unwrap();
    assert!(matches!(storage.put(&key, b"another"), Err(StorageError::Exists(_))));
    assert!(matches!(storage.get(&key, 6), Err(StorageError::TooBig { bytes: 7, .. })));
    assert_eq!(storage.get(&key, 7).unwrap(), b"wrapped");
    assert_eq!(storage.list(Kind::WrappedKey).unwrap(), [("hestner-key.age".to_owned(), 7)]);
    // Its neighbours at the root are others.
    assert_eq!(storage.list(Kind::Config).unwrap(), [("config".to_owned(), 6)]);
    storage.remove(&key).unwrap();
    storage.remove(&key).unwrap();
    assert!(storage.list(Kind::WrappedKey).unwrap().is_empty());
    plant("hestner-key.age", b"planted");
    assert_eq!(storage.get(&key, 10).unwrap(), b"planted");
    storage.remove(&key).unwrap();
    for name in ["config", "hestner-key.age2", "../hestner-key.age", ""] {
        assert!(storage.put(&Object::new(Kind::WrappedKey, name), b"x").is_err(), "{name:?}");
    }
}

fn objects_are_written_once(storage: &dyn Storage) {
    for kind in &KINDS {
        let object = object(*kind, 7);
        storage.put(&object, b"first").unwrap();
        // Whoever died after it was stored puts it again.
        storage.put(&object, b"first").unwrap();
        for other in [&b"other"[..], b"longer than the first", b""] {
            assert!(matches!(storage.put(&object, other), Err(StorageError::Exists(_))), "{kind:?}");
        }
        assert_eq!(storage.get(&object, 5).unwrap(), b"first");
        assert_eq!(storage.list(*kind).unwrap(), [(object.name.clone(), 5)]);
        storage.remove(&object).unwrap();
        assert!(storage.list(*kind).unwrap().is_empty(), "{kind:?}");
    }
    let empty = object(Kind::Index, 8);
    storage.put(&empty, b"").unwrap();
    storage.put(&empty, b"").unwrap();
    assert_eq!(storage.get(&empty, 0).unwrap(), b"");
    storage.remove(&empty).unwrap();
}

fn parts_and_bounds_hold(storage: &dyn Storage) {
    let object = object(Kind::Pack, 9);
    storage.put(&object, b"0123456789").unwrap();
    assert!(matches!(storage.get(&object, 9), Err(StorageError::TooBig { bytes: 10, bytes_max: 9, .. })));
    assert_eq!(storage.get_range(&object, 3, 4).unwrap(), b"3456");
    assert_eq!(storage.get_range(&object, 0, 10).unwrap(), b"0123456789");
    assert_eq!(storage.get_range(&object, 10, 0).unwrap(), b"");
    for (offset, length) in [(3, 8), (10, 1), (11, 0), (100, 5), (u64::MAX, 2), (0, u64::MAX)] {
        assert!(storage.get_range(&object, offset, length).is_err(), "{length} bytes from {offset} on");
    }
    storage.remove(&object).unwrap();
}

fn listings_name_objects_only(storage: &dyn Storage, plant: &dyn Fn(&str, &[u8])) {
    let good = object(Kind::Pack, 3);
    let snapshot = object(Kind::Snapshot, 3);
    storage.put(&good, b"good").unwrap();
    storage.put(&snapshot, b"good").unwrap();
    let name = &good.name;
    let upper = object(Kind::Pack, 0xab).name.to_uppercase();
    for hostile in [
        // In a folder that its name does not lead to, too deep, too short, of other letters, half-written.
        format!("data/ff/{name}"),
        format!("data/03/deeper/{name}"),
        format!("data/{name}"),
        "data/03/03ab".to_owned(),
        format!("data/AB/{upper}"),
        format!("data/03/{name}-tmp-0123456789abcdef"),
        format!("snapshots/{name}.txt"),
        "snapshots/readme".to_owned(),
        format!("snapshots/deeper/{name}"),
    ] {
        plant(&hostile, b"hostile");
    }
    assert_eq!(storage.list(Kind::Pack).unwrap(), [(good.name.clone(), 4)]);
    assert_eq!(storage.list(Kind::Snapshot).unwrap(), [(snapshot.name.clone(), 4)]);
    storage.remove(&good).unwrap();
    storage.remove(&snapshot).unwrap();
}

fn names_that_lead_elsewhere_are_refused(storage: &dyn Storage) {
    let long = "a".repeat(64);
    for name in ["", "..", "../../etc/passwd", "config", &long[1..], &long.to_uppercase(), &format!("{long}\0")] {
        let object = Object::new(Kind::Key, name);
        assert!(matches!(storage.put(&object, b"x"), Err(StorageError::Failed { .. })), "{name:?}");
        assert!(matches!(storage.get(&object, 10), Err(StorageError::Failed { .. })), "{name:?}");
        assert!(matches!(storage.get_range(&object, 0, 1), Err(StorageError::Failed { .. })), "{name:?}");
        assert!(matches!(storage.remove(&object), Err(StorageError::Failed { .. })), "{name:?}");
    }
    assert!(storage.put(&Object::new(Kind::Config, "../config"), b"x").is_err());
}

fn one_of_many_writers_wins(storage: &dyn Storage) {
    for round in 0..5 {
        let object = object(Kind::Key, 1000 + round);
        let stored: Vec<String> = std::thread::scope(|scope| {
            let writers: Vec<_> = (0..8)
                .map(|writer| {
                    let object = &object;
                    scope.spawn(move || {
                        let text = format!("writer {writer}");
                        match storage.put(object, text.as_bytes()) {
                            Ok(()) => Some(text),
                            Err(StorageError::Exists(_)) => None,
                            Err(error) => panic!("{error}"),
                        }
                    })
                })
                .collect();
            writers.into_iter().filter_map(|writer| writer.join().expect("a writer")).collect()
        });
        assert_eq!(stored.len(), 1, "round {round}: {stored:?}");
        assert_eq!(storage.get(&object, 100).unwrap(), stored[0].as_bytes());
        storage.remove(&object).unwrap();
    }
}

fn big_and_many(storage: &dyn Storage) {
    let big = object(Kind::Pack, 4);
    let bytes = files::random_bytes(20 * MIB);
    storage.put(&big, &bytes).unwrap();
    assert!(storage.get(&big, bytes.len() as u64).unwrap() == bytes);
    let part = storage.get_range(&big, 11 * MIB as u64 + 3, 2 * MIB as u64).unwrap();
    assert!(part == bytes[11 * MIB + 3..13 * MIB + 3]);
    storage.remove(&big).unwrap();
    // More than one page of S3's listing has.
    let numbers: Vec<u64> = (0..1100).collect();
    std::thread::scope(|scope| {
        for part in numbers.chunks(275) {
            scope.spawn(move || part.iter().for_each(|n| storage.put(&object(Kind::Index, *n), b"x").unwrap()));
        }
    });
    let mut listed = storage.list(Kind::Index).unwrap();
    listed.sort();
    let mut wanted: Vec<_> = numbers.iter().map(|n| (object(Kind::Index, *n).name, 1)).collect();
    wanted.sort();
    assert!(listed == wanted, "{} of {}", listed.len(), wanted.len());
}

#[test]
fn folder_behaves_as_a_place_for_objects() {
    let temp = folder();
    let root = temp.path().join("repository");
    let storage = Folder::create(&root).unwrap();
    behaves(&storage, &|path, bytes| drop(files::write(root.join(path), bytes)));
    assert_eq!(storage.remark(), None);
}

#[test]
fn s3_behaves_as_a_place_for_objects() {
    let temp = folder();
    let server = S3Server::start(temp.path());
    let storage = s3_at(server.port(), server.credentials(), &limits());
    behaves(&*storage, &|path, bytes| server.plant(path, bytes));
    assert_eq!(storage.remark(), None);
}

#[test]
fn sftp_behaves_as_a_place_for_objects() {
    if !is_root_or_skips("sftp_behaves_as_a_place_for_objects") {
        return;
    }
    let temp = folder();
    let server = SftpServer::start(temp.path(), "");
    let storage = sftp_at(&server, &limits());
    let root = server.files().join("repository");
    behaves(&*storage, &|path, bytes| drop(files::write(root.join(path), bytes)));
    assert_eq!(storage.remark(), None);
    // All of it over one connection.
    assert!(server.sessions() <= 2, "{} processes", server.sessions());
}

#[test]
fn folder_without_room_says_so_and_keeps_nothing_of_the_object() {
    if !is_root_or_skips("folder_without_room_says_so_and_keeps_nothing_of_the_object") {
        return;
    }
    let temp = folder();
    let mount = hestner_tests::Cmd::new("mount").args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"]).arg(temp.path());
    mount.ok();
    let storage = Folder::open(temp.path()).unwrap();
    let put = storage.put(&object(Kind::Pack, 1), &files::random_bytes(4 * MIB));
    let left = files_below(temp.path());
    let small = storage.put(&object(Kind::Pack, 2), b"small");
    hestner_tests::Cmd::new("umount").arg("-l").arg(temp.path()).ok();
    assert!(matches!(put, Err(StorageError::Full(_))), "{put:?}");
    assert!(left.is_empty(), "{left:?}");
    small.unwrap();
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.path() {
            path if path.is_dir() => found.extend(files_below(&path)),
            path => found.push(path),
        }
    }
    found
}

#[test]
fn put_only_credentials_of_s3_are_enough_for_backups() {
    let temp = folder();
    let server = S3Server::start(temp.path());
    let proxy = Proxy::start(server.port());
    proxy.refuse();
    let storage = s3_at(proxy.port(), server.put_only_credentials(), &limits());
    storage.put(&config(), b"config").unwrap();
    for kind in [Kind::Key, Kind::Snapshot, Kind::Index, Kind::Pack] {
        let object = object(kind, 1);
        storage.put(&object, b"bytes").unwrap();
        storage.put(&object, b"bytes").unwrap();
        assert!(matches!(storage.put(&object, b"other"), Err(StorageError::Exists(_))));
        let before = proxy.requests().len();
        assert!(matches!(storage.remove(&object), Err(StorageError::Failed { .. })), "{kind:?} was removed");
        assert_eq!(proxy.requests().len(), before + 1, "a denial was tried again");
        assert_eq!(storage.get(&object, 5).unwrap(), b"bytes");
        assert_eq!(storage.list(kind).unwrap().len(), 1);
    }
    // The server itself refuses too, and lets locks go.
    let direct = s3_at(server.port(), server.put_only_credentials(), &limits());
    assert!(direct.remove(&object(Kind::Pack, 1)).is_err());
    let lock = object(Kind::Lock, 1);
    storage.put(&lock, b"lock").unwrap();
    storage.remove(&lock).unwrap();
    assert!(storage.list(Kind::Lock).unwrap().is_empty());
}

#[test]
fn s3_object_is_stored_once_and_whole_whatever_the_line_does() {
    let temp = folder();
    let server = S3Server::start(temp.path());
    let proxy = Proxy::start(server.port());
    let storage = s3_at(proxy.port(), server.credentials(), &limits());
    let bytes = files::random_bytes(3 * MIB);
    for (number, fault) in [(1, Fault::Cut), (2, Fault::Overloaded), (3, Fault::LostAnswer)] {
        let object = object(Kind::Pack, number);
        proxy.next("PUT", fault);
        storage.put(&object, &bytes).unwrap_or_else(|e| panic!("{fault:?}: {e}"));
        assert!(storage.get(&object, bytes.len() as u64).unwrap() == bytes, "{fault:?}");
        proxy.next("GET", fault);
        assert!(storage.get(&object, bytes.len() as u64).unwrap() == bytes, "{fault:?}");
    }
    // One that is cut off for good leaves nothing.
    let storage = s3_at(proxy.port(), server.credentials(), &once());
    let cut = object(Kind::Pack, 4);
    proxy.next("PUT", Fault::Cut);
    let error = storage.put(&cut, &bytes).unwrap_err();
    assert!(error.to_string().contains(&cut.name), "{error}");
    assert!(matches!(storage.get(&cut, 10), Err(StorageError::Missing(_))));
    assert_eq!(storage.list(Kind::Pack).unwrap().len(), 3);
}

#[test]
fn s3_request_without_progress_ends_and_is_tried_again() {
    let temp = folder();
    let server = S3Server::start(temp.path());
    let proxy = Proxy::start(server.port());
    let short = Limits { stall_max: Duration::from_secs(1), ..limits() };
    let storage = s3_at(proxy.port(), server.credentials(), &short);
    let bytes = files::random_bytes(8 * MIB);
    proxy.next("PUT", Fault::Stall);
    storage.put(&object(Kind::Pack, 1), &bytes).unwrap();
    let storage = s3_at(proxy.port(), server.credentials(), &Limits { tries_max: 1, ..short });
    proxy.next("PUT", Fault::Stall);
    let error = storage.put(&object(Kind::Pack, 2), &bytes).unwrap_err().to_string();
    assert!(error.contains("for 1 s"), "{error}");
}

#[test]
fn s3_listing_that_is_not_whole_is_an_error() {
    let temp = folder();
    let server = S3Server::start(temp.path());
    let proxy = Proxy::start(server.port());
    let storage = s3_at(proxy.port(), server.credentials(), &limits());
    std::thread::scope(|scope| {
        for part in 0..4 {
            let storage = &storage;
            scope.spawn(move || {
                (0..260).for_each(|n| storage.put(&object(Kind::Key, part * 260 + n), b"x").unwrap());
            });
        }
    });
    assert_eq!(storage.list(Kind::Key).unwrap().len(), 1040);
    proxy.break_pages();
    assert!(storage.list(Kind::Key).is_err());
}

#[test]
fn s3_credentials_that_are_refused_are_not_tried_again() {
    let temp = folder();
    let server = S3Server::start(temp.path());
    let proxy = Proxy::start(server.port());
    let wrong = files::write(temp.path().join("wrong.toml"), "access_key_id = \"A\"\nsecret_access_key = \"hidden\"\n");
    files::set_mode(&wrong, 0o600);
    let storage = s3_at(proxy.port(), wrong, &limits());
    let error = storage.put(&config(), b"x").unwrap_err().to_string();
    assert_eq!(proxy.requests().len(), 1);
    assert!(error.contains("config") && !error.contains("hidden"), "{error}");
}

#[test]
fn upload_keeps_below_its_bandwidth() {
    let temp = folder();
    let server = S3Server::start(temp.path());
    let slow = Limits { upload_bytes_per_second: 2 * MIB as u64, ..limits() };
    let storage = s3_at(server.port(), server.credentials(), &slow);
    let begun = now();
    storage.put(&object(Kind::Pack, 1), &files::random_bytes(4 * MIB)).unwrap();
    // The last piece of 64 KiB goes when the others have had their time.
    assert!(begun.elapsed() >= Duration::from_millis(1950), "{:?}", begun.elapsed());
}

#[test]
fn sftp_says_when_it_cannot_know_durability() {
    if !is_root_or_skips("sftp_says_when_it_cannot_know_durability") {
        return;
    }
    let temp = folder();
    let server = SftpServer::start(temp.path(), "-P fsync");
    let storage = sftp_at(&server, &limits());
    storage.put(&config(), b"config").unwrap();
    let remark = storage.remark().unwrap_or_default();
    assert!(remark.contains("fsync@openssh.com"), "{remark}");
    assert_eq!(storage.get(&config(), 10).unwrap(), b"config");
}

#[test]
fn sftp_never_overwrites_whatever_the_server_offers() {
    if !is_root_or_skips("sftp_never_overwrites_whatever_the_server_offers") {
        return;
    }
    for options in ["-P hardlink", "-P posix-rename", "-P hardlink,posix-rename", "-P remove,rmdir"] {
        let temp = folder();
        let server = SftpServer::start(temp.path(), options);
        let storage = sftp_at(&server, &limits());
        storage.put(&config(), b"config").unwrap();
        let object = object(Kind::Pack, 1);
        storage.put(&object, b"first").unwrap_or_else(|e| panic!("{options}: {e}"));
        storage.put(&object, b"first").unwrap_or_else(|e| panic!("{options}: {e}"));
        assert!(matches!(storage.put(&object, b"other"), Err(StorageError::Exists(_))), "{options}");
        assert_eq!(storage.list(Kind::Pack).unwrap(), [(object.name.clone(), 5)], "{options}");
        let removes = !options.contains("remove");
        assert_eq!(storage.remove(&object).is_ok(), removes, "{options}");
    }
}

#[test]
fn sftp_connection_that_is_cut_leaves_no_object_and_is_made_anew() {
    if !is_root_or_skips("sftp_connection_that_is_cut_leaves_no_object_and_is_made_anew") {
        return;
    }
    let temp = folder();
    let mut server = SftpServer::start(temp.path(), "");
    let slow = Limits { upload_bytes_per_second: MIB as u64, ..once() };
    let storage = sftp_at(&server, &slow);
    storage.put(&config(), b"config").unwrap();
    let cut = object(Kind::Pack, 1);
    let bytes = files::random_bytes(8 * MIB);
    let error = std::thread::scope(|scope| {
        let put = scope.spawn(|| storage.put(&cut, &bytes).unwrap_err());
        let data = server.files().join("repository/data");
        wait_until("half of it to be there", Duration::from_secs(30), || {
            files_below(&data).iter().any(|file| file.metadata().is_ok_and(|m| m.len() > 0))
        });
        server.signal_sessions(Signal::SIGKILL);
        put.join().expect("a put")
    });
    assert!(error.to_string().contains(&cut.name), "{error}");
    assert!(storage.list(Kind::Pack).unwrap().is_empty());
    // The server goes away and comes back between two calls: with tries left nobody notices.
    let storage = sftp_at(&server, &limits());
    storage.put(&cut, b"bytes").unwrap();
    server.stop();
    server.start_again();
    assert_eq!(storage.get(&cut, 10).unwrap(), b"bytes");
}

#[test]
fn sftp_server_that_stops_is_not_waited_for_for_ever() {
    if !is_root_or_skips("sftp_server_that_stops_is_not_waited_for_for_ever") {
        return;
    }
    let temp = folder();
    let server = SftpServer::start(temp.path(), "");
    let short = Limits { stall_max: Duration::from_secs(1), ..once() };
    let storage = sftp_at(&server, &short);
    storage.put(&config(), b"config").unwrap();
    server.signal_sessions(Signal::SIGSTOP);
    let error = storage.put(&object(Kind::Pack, 1), b"x").unwrap_err().to_string();
    assert!(error.contains("for 1 s"), "{error}");
    // A new connection is a new session.
    assert!(storage.list(Kind::Pack).unwrap().is_empty());
}

#[test]
fn sftp_speaks_to_known_servers_with_the_named_key_only() {
    if !is_root_or_skips("sftp_speaks_to_known_servers_with_the_named_key_only") {
        return;
    }
    let temp = folder();
    let server = SftpServer::start(temp.path(), "");
    let unknown = files::write(temp.path().join("nobody"), "");
    // Many tries with long delays: one that was tried again would take minutes.
    let patient = Limits { tries_max: 8, delay_base: Duration::from_secs(600), ..Limits::default() };
    for place in [
        SftpPlace { known_hosts: unknown, ..sftp_place(&server) },
        SftpPlace { identity_file: server.other_identity_file(), ..sftp_place(&server) },
    ] {
        let error = open_sftp(&place, &patient).unwrap().list(Kind::Key).unwrap_err().to_string();
        assert!(error.contains("ssh: "), "{error}");
    }
}
