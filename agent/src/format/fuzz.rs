//! A fuzzer of the parsers, for a stable toolchain: valid bytes are changed again and again by a generator that a
//! seed replays. No parser may panic, take more memory than its bound, or be slow.
//!
//! A second each with the unit tests, a minute each by `scripts/check --long`: `HESTNER_FUZZ_SECONDS=60 cargo nextest
//! run -p hestner-agent -E 'test(format::fuzz)'`. Another `HESTNER_FUZZ_SEED` takes another way.

use std::time::{Duration, SystemTime};

use super::crypto::{Cipher, KEY_BYTES, NONCE_BYTES};
use super::index::{Index, IndexedPack};
use super::key::{Cost, KeyFile, Maker, MasterKey};
use super::pack::{self, PackedBlob};
use super::snapshot::Snapshot;
use super::tree::{self, Attribute, Node, NodeKind};
use super::{BlobKind, Id, Timestamp, compress, config, lock};

/// What the test itself may take: its program, its samples and its input.
const OWN_MIB: u64 = 48;
/// Addresses that threads of the C library set aside and do not use.
const SET_ASIDE_MIB: u64 = 192;
/// Longest input that is made.
const INPUT_BYTES_MAX: usize = 256 * 1024;
/// What parsers of numbers, lengths and JSON stumble over.
const WORDS: [&[u8]; 18] = [
    b"null",
    b"-1",
    b"4294967295",
    b"4294967296",
    b"18446744073709551616",
    b"1e999",
    b"\"\"",
    b"[]",
    b"{}",
    b"[[[[[[[[",
    b"\\u0000",
    b"\\ud800",
    b"\\\\xff",
    b"..",
    b"/",
    b"\xff\xff\xff\xff",
    b"\0\0\0\0",
    b"9999-12-31T23:59:59Z",
];

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound.max(1) as u64).unwrap()
    }
}

fn change(input: &mut Vec<u8>, random: &mut Random) {
    let at = random.below(input.len() + 1);
    let end = (at + 1 + random.below(24)).min(input.len());
    match random.below(7) {
        0 if at < input.len() => input[at] ^= 1 << random.below(8),
        1 if at < input.len() => input[at] = u8::try_from(random.below(256)).unwrap(),
        2 => drop(input.drain(at.min(end)..end)),
        3 => {
            let copy = input[at.min(end)..end].to_vec();
            let times = 1 + random.below(40);
            input.splice(at..at, copy.repeat(times));
        }
        4 => drop(input.splice(at..at, WORDS[random.below(WORDS.len())].iter().copied())),
        5 => drop(input.splice(at.min(end)..end, WORDS[random.below(WORDS.len())].iter().copied())),
        _ => input.truncate(at),
    }
    input.truncate(INPUT_BYTES_MAX);
}

fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Whoever asks for more than a parser may have is refused, and ends the process. Only in one of our own, as nextest
/// starts them: others would share the limit.
fn limit_memory(mib_max: u64) {
    use nix::sys::resource::{Resource, setrlimit};
    if std::env::var_os("NEXTEST").is_some() {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        let taken: u64 = pages.split(' ').next().unwrap().parse().unwrap();
        let most = taken * 4096 + (mib_max + OWN_MIB + SET_ASIDE_MIB) * 1024 * 1024;
        setrlimit(Resource::RLIMIT_AS, most, most).unwrap();
    }
}

/// Feeds changed samples to a parser until the time is over. It may take so much memory, whatever it is given: some
/// hundred times the longest input, or what its own bound says.
#[expect(clippy::disallowed_methods, reason = "it measures itself")]
fn fuzz(name: &str, mib_max: u64, samples: &[Vec<u8>], parse: impl Fn(&[u8])) {
    limit_memory(mib_max);
    let number = |key: &str| std::env::var(key).ok().and_then(|text| text.parse().ok());
    let seconds = number("HESTNER_FUZZ_SECONDS").unwrap_or(1);
    let seed = number("HESTNER_FUZZ_SEED").unwrap_or(0x9E37_79B9_7F4A_7C15);
    println!("{name}: seed {seed}");
    let mut random = Random(seed | 1);
    let end = SystemTime::now() + Duration::from_secs(seconds);
    let mut inputs = 0_u64;
    let mut input = Vec::new();
    loop {
        let began = SystemTime::now();
        if began >= end {
            break;
        }
        for _ in 0..200 {
            // Mostly few changes, so that what is behind the first check is reached.
            if random.below(8) == 0 || input.is_empty() {
                input = samples[random.below(samples.len())].clone();
            }
            for _ in 0..=random.below(3) {
                change(&mut input, &mut random);
            }
            parse(&input);
            inputs += 1;
        }
        // Two hundred take milliseconds, and a second with a bomb among them.
        assert!(began.elapsed().is_ok_and(|took| took < Duration::from_secs(10)), "{name} became slow at {inputs}");
        let peak = peak_kib();
        assert!(peak < (mib_max + OWN_MIB) * 1024, "{name} took {peak} KiB at {inputs}");
    }
    println!("{name}: {inputs} inputs, peak {} KiB", peak_kib());
}

fn cipher() -> Cipher {
    Cipher::new(&[5; KEY_BYTES]).unwrap()
}

fn node(kind: NodeKind) -> Node {
    Node {
        name: b"name \xff\n\"".to_vec(),
        kind,
        mode: 0o4755,
        mtime: Timestamp { seconds: 1, nanos: 2 },
        atime: Timestamp::default(),
        ctime: Timestamp { seconds: -3, nanos: 4 },
        uid: 1,
        gid: 2,
        user: "user".into(),
        group: "group".into(),
        inode: 3,
        device_id: 4,
        links: 2,
        attributes: vec![Attribute { name: b"user.a".to_vec(), value: b"value".to_vec() }],
    }
}

#[test]
fn trees() {
    let id = Id::of(b"x");
    let kinds = [
        NodeKind::File { size: 7, content: vec![id, id] },
        NodeKind::Folder { subtree: id },
        NodeKind::Symlink { target: b"\xff/to".to_vec() },
        NodeKind::CharDevice { device: 259 },
        NodeKind::Fifo,
    ];
    let samples: Vec<_> = kinds.into_iter().map(|kind| tree::to_bytes(vec![node(kind)])).collect();
    fuzz("tree", 64, &samples, |input| {
        let Ok(nodes) = tree::parse(input) else { return };
        for node in &nodes {
            assert!(!node.name.is_empty() && !node.name.contains(&b'/') && !node.name.contains(&0));
            assert!(node.name != b"." && node.name != b"..");
        }
        // What was understood is understood again.
        assert_eq!(tree::parse(&tree::to_bytes(nodes.clone())).map(|again| again.len()), Ok(nodes.len()));
    });
}

#[test]
fn indexes() {
    let blob = |kind, raw_length| PackedBlob { kind, id: Id::of(b"b"), offset: 7, length: 50, raw_length };
    let blobs = vec![blob(BlobKind::Data, None), blob(BlobKind::Tree, Some(99))];
    let index = Index { supersedes: vec![Id::of(b"o")], packs: vec![IndexedPack { id: Id::of(b"p"), blobs }] };
    fuzz("index", 64, &[index.to_bytes().unwrap()], |input| {
        if let Ok(index) = Index::parse(input) {
            assert_eq!(Index::parse(&index.to_bytes().unwrap()), Ok(index));
        }
    });
}

#[test]
fn pack_headers() {
    let cipher = cipher();
    let blob = |kind, raw_length| PackedBlob { kind, id: Id::of(b"b"), offset: 0, length: 50, raw_length };
    let blobs = [blob(BlobKind::Data, None), blob(BlobKind::Tree, Some(9)), blob(BlobKind::Data, Some(70))];
    let footer = pack::footer(&cipher, &[1; NONCE_BYTES], &blobs).unwrap();
    let sealed = footer[..footer.len() - pack::LENGTH_BYTES].to_vec();
    let plain = cipher.open("x", sealed).unwrap();
    fuzz("pack header", 16, &[plain], |input| {
        let sealed = cipher.seal(&[2; NONCE_BYTES], input).unwrap();
        let bytes = 150 + sealed.len() as u64 + 4;
        if let Ok(blobs) = pack::parse(&cipher, sealed, bytes) {
            assert_eq!(blobs.iter().map(|blob| u64::from(blob.length)).sum::<u64>(), 150);
        }
        // As it comes from a place: not sealed by us.
        let _ = pack::parse(&cipher, input.to_vec(), bytes);
        if let Some(last) = input.last_chunk() {
            let _ = pack::header_length(*last, bytes);
        }
    });
}

#[test]
fn snapshots_and_locks() {
    let snapshot = br#"{"time":"2024-05-06T07:08:09.123456789+02:00","parent":null,"tree":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","paths":["/srv"],"hostname":"h","username":"root","uid":5,"excludes":["a"],"tags":["run=1"]}"#;
    let lock = br#"{"time":"2024-05-06T07:08:09Z","exclusive":false,"hostname":"h","username":"root","pid":7,"uid":1,"gid":2}"#;
    fuzz("snapshot", 32, &[snapshot.to_vec(), lock.to_vec()], |input| {
        if let Ok(snapshot) = Snapshot::parse(input) {
            assert_eq!(Snapshot::parse(&snapshot.to_bytes().unwrap()), Ok(snapshot));
        }
        let _ = lock::Lock::parse(input);
    });
}

#[test]
fn configs() {
    let config = br#"{"version":2,"id":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","chunker_polynomial":"25b468838dcb75"}"#;
    fuzz("config", 16, &[config.to_vec()], |input| {
        if let Ok(config) = config::Config::parse(input) {
            assert_eq!(config::Config::parse(&config.to_bytes().unwrap()), Ok(config));
        }
    });
}

#[test]
fn keys() {
    let maker = Maker {
        created: "2024-01-01T00:00:00Z".into(),
        username: "root".into(),
        hostname: "here".into(),
        salt: [1; 64],
        nonce: [2; NONCE_BYTES],
    };
    let master = MasterKey::new([7; KEY_BYTES]);
    let file = KeyFile::make(&master, b"secret", Cost { log_n: 4, r: 1, p: 1 }, maker).unwrap().to_bytes().unwrap();
    // Costs within the bounds may take seconds each; here only cheap ones are paid.
    let cheap = "\"N\":16,\"r\":1,\"p\":1";
    fuzz("key", 16, &[file], |input| {
        let Ok(key) = KeyFile::parse(input) else { return };
        if String::from_utf8_lossy(&key.to_bytes().unwrap()).contains(cheap) {
            let _ = key.open(b"secret");
        }
    });
}

#[test]
fn compressed_files() {
    let mut squeezed = Vec::new();
    let mut samples = Vec::new();
    for plain in [vec![0; 1 << 20], b"{\"packs\":[]}".repeat(100), (0..=255).cycle().take(5000).collect()] {
        compress::Squeeze::new(3).unwrap().squeeze(&plain, &mut squeezed).unwrap();
        samples.push(squeezed.clone());
    }
    fuzz("compressed file", 544, &samples, |input| {
        let _ = compress::expand("x", input, 1 << 20);
        let _ = compress::unwrap_file("x", [&[2], input].concat());
    });
}
