//! What restic wrote is restored as it was.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::fs::PermissionsExt as _;

use proptest::collection::vec;
use proptest::prelude::*;

use super::tree::{assert_same, fill, noise};
use super::*;

#[test]
fn every_kind_of_file_that_restic_stored_is_restored_as_it_was() {
    let (source, target, stock) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), Stock::new());
    // Several backups, so that blobs lie in several packs and indexes.
    write(&source.path().join("early"), &noise(3_000_000, 9));
    stock.backup(source.path());
    fill(source.path());
    stock.backup(source.path());
    let restored = stock.restore(target.path()).unwrap();
    assert_same(source.path(), target.path());
    if rustix::process::geteuid().is_root() {
        assert_eq!(restored.warnings, Notes::default());
    }
    let blocks = |folder: &Path| folder.join("sparse").metadata().unwrap().blocks();
    assert!(blocks(target.path()) <= blocks(source.path()), "holes are holes again");
}

#[test]
fn second_restore_writes_nothing_and_a_change_writes_only_what_differs() {
    let (source, target, stock) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), Stock::new());
    fill(source.path());
    stock.backup(source.path());
    let first = stock.restore(target.path()).unwrap();
    let big = target.path().join("a/b/c/text");
    let before = big.metadata().unwrap();
    let again = stock.restore(target.path()).unwrap();
    assert_eq!((again.bytes, again.bytes_kept), (first.bytes, first.bytes));
    let after = big.metadata().unwrap();
    assert_eq!((before.ino(), before.ctime_nsec()), (after.ino(), after.ctime_nsec()), "it was not touched");

    // Other bytes, longer, shorter, another mode, an attribute too many, a hard link of somebody else's.
    let at = |name: &str| target.path().join(name);
    {
        use std::os::unix::fs::FileExt as _;
        let file = File::options().write(true).open(at("sparse")).unwrap();
        file.write_all_at(b"changed", 30_000_000).unwrap();
    }
    write(&at("a/b/half"), b"short");
    File::options().append(true).open(&big).unwrap().write_all(b"more").unwrap();
    fs::set_permissions(at("modes/0"), fs::Permissions::from_mode(0o777)).unwrap();
    rustix::fs::lsetxattr(at("modes/1"), "user.new", b"x", rustix::fs::XattrFlags::empty()).unwrap();
    let outside = tempfile::tempdir().unwrap();
    fs::hard_link(at("modes/3"), outside.path().join("shared")).unwrap();
    write(&at("modes/3"), b"mode X");
    fs::remove_file(at("links/one")).unwrap();
    fs::remove_file(at("links/folder")).unwrap();
    fs::create_dir(at("links/folder")).unwrap();
    let mended = stock.restore(target.path()).unwrap();
    assert_same(source.path(), target.path());
    assert!(mended.bytes - mended.bytes_kept < 9_000_000, "{mended:?}");
    assert_eq!(fs::read(outside.path().join("shared")).unwrap(), b"mode X", "what others share is not written to");
}

#[test]
fn only_what_is_included_is_restored() {
    let (source, stock) = (tempfile::tempdir().unwrap(), Stock::new());
    fill(source.path());
    stock.backup(source.path());
    let target = tempfile::tempdir().unwrap();
    stock.restore_some(target.path(), &["/a/b/c", "links/one"]).unwrap();
    let names = |folder: &str| {
        let entries = fs::read_dir(target.path().join(folder)).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(names(""), ["a", "links"]);
    assert_eq!((names("a"), names("a/b"), names("links")), (vec!["b".into()], vec!["c".into()], vec!["one".into()]));
    assert_eq!(names("a/b/c"), ["big", "d", "text"]);
    for wrong in ["/a/none", "/../etc", "/a/one/below"] {
        let target = tempfile::tempdir().unwrap();
        let error = stock.restore_some(target.path(), &[wrong]).unwrap_err();
        assert!(matches!(error, RestoreError::NotFound(_)), "{wrong}: {error}");
    }
}

#[test]
fn who_is_not_root_is_told_what_could_not_be_set() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: it needs root to begin with");
        return;
    }
    let (source, target, stock) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), Stock::new());
    let at = |name: &str| source.path().join(name);
    let device = rustix::fs::makedev(1, 3);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        at("null"),
        rustix::fs::FileType::CharacterDevice,
        rustix::fs::Mode::from_raw_mode(0o666),
        device,
    )
    .unwrap();
    fs::create_dir(at("closed")).unwrap();
    for (name, mode) in [("closed/plain", 0o644), ("closed/hidden", 0), ("program", 0o4755), ("read-only", 0o444)] {
        write(&at(name), name.as_bytes());
        fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    fs::hard_link(at("closed/plain"), at("name")).unwrap();
    rustix::fs::lsetxattr(at("read-only"), "user.a", b"x", rustix::fs::XattrFlags::empty()).unwrap();
    rustix::fs::lsetxattr(at("read-only"), "trusted.a", b"x", rustix::fs::XattrFlags::empty()).unwrap();
    fs::set_permissions(at("closed"), fs::Permissions::from_mode(0o500)).unwrap();
    stock.backup(source.path());
    // Who restores may read the repository.
    let open = Program::new("/bin/chmod").args(["-R", "a+rX"]).arg(stock.folder.path());
    assert!(open.prepare().status().unwrap().success());
    let (archive, index, tree) = stock.last_tree();
    let nobody = (rustix::fs::Uid::from_raw(65_534), rustix::fs::Gid::from_raw(65_534));
    std::os::unix::fs::chown(target.path(), Some(65_534), Some(65_534)).unwrap();
    let as_nobody = || {
        rustix::thread::set_thread_groups(&[]).unwrap();
        rustix::thread::set_thread_res_gid(nobody.1, nobody.1, nobody.1).unwrap();
        rustix::thread::set_thread_res_uid(nobody.0, nobody.0, nobody.0).unwrap();
        let never = AtomicBool::new(false);
        // Twice: modes that keep the owner out must not keep the second one from its work.
        let again = || {
            let (blobs, options) = (Reader::new(&archive, &index), Options { threads: 2, ..Options::default() });
            restore(&blobs, tree, target.path(), &options, &Counters::default(), &never).unwrap()
        };
        let first = again();
        assert_eq!(again().files, first.files);
        first
    };
    let restored = std::thread::scope(|scope| scope.spawn(as_nobody).join().unwrap());
    let told = restored.warnings.first.join("\n");
    for part in [
        "/null: this user may not make",
        "/program: its owner and group (0:0) could not be set",
        "/program: no set-id bits",
        "/closed: its owner",
        "/read-only: cannot set its attribute trusted.a",
    ] {
        assert!(told.contains(part), "{part} in {told}");
    }
    let metadata = |name: &str| target.path().join(name).symlink_metadata().unwrap();
    let mode = |name: &str| metadata(name).mode() & 0o7777;
    assert_eq!((mode("program"), mode("closed/hidden"), mode("closed"), mode("read-only")), (0o755, 0, 0o500, 0o444));
    assert_eq!(fs::read(target.path().join("name")).unwrap(), b"closed/plain");
    assert_eq!(metadata("name").ino(), metadata("closed/plain").ino());
    assert_eq!(metadata("closed").mtime_nsec(), at("closed").metadata().unwrap().mtime_nsec());
}

/// A path of a few short names, and what stands there.
fn entry() -> impl Strategy<Value = (Vec<u8>, u8, usize, u32)> {
    let name = vec(prop_oneof![Just(b'a'), Just(b'.'), Just(b'\n'), Just(0xff), Just(b'"')], 1..3);
    // These two are no names.
    let name = name.prop_filter("a name", |name| !matches!(&name[..], b"." | b".."));
    (name, 0_u8..4, 0_usize..5000, 0_u32..0o1000)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, max_shrink_iters: 20, ..ProptestConfig::default() })]
    #[test]
    fn any_tree_is_restored_as_restic_stored_it(entries in vec((entry(), any::<u8>()), 1..25)) {
        use std::os::unix::ffi::OsStrExt as _;
        let (source, target, stock) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), Stock::new());
        let mut folders = vec![source.path().to_owned()];
        let mut files = Vec::new();
        for ((name, kind, size, mode), place) in entries {
            let path = folders[usize::from(place) % folders.len()].join(std::ffi::OsStr::from_bytes(&name));
            if path.symlink_metadata().is_ok() {
                continue;
            }
            match (kind, files.is_empty()) {
                (0, _) => {
                    fs::create_dir(&path).unwrap();
                    folders.push(path);
                }
                (1, false) => fs::hard_link(&files[size % files.len()], &path).unwrap(),
                (2, _) => std::os::unix::fs::symlink(format!("to {size}"), &path).unwrap(),
                _ => {
                    write(&path, &noise(size, mode.into()));
                    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
                    files.push(path);
                }
            }
        }
        stock.backup(source.path());
        stock.restore(target.path()).unwrap();
        assert_same(source.path(), target.path());
    }
}
