//! Trees read back, whatever they hold; and hostile ones are refused.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

fn id() -> impl Strategy<Value = Id> {
    any::<[u8; 32]>().prop_map(Id::from_bytes)
}

fn kind() -> impl Strategy<Value = NodeKind> {
    prop_oneof![
        (any::<u64>(), vec(id(), 0..4)).prop_map(|(size, content)| NodeKind::File { size, content }),
        id().prop_map(|subtree| NodeKind::Folder { subtree }),
        vec(1_u8.., 1..40).prop_map(|target| NodeKind::Symlink { target }),
        any::<u64>().prop_map(|device| NodeKind::BlockDevice { device }),
        any::<u64>().prop_map(|device| NodeKind::CharDevice { device }),
        Just(NodeKind::Fifo),
        Just(NodeKind::Socket),
    ]
}

fn time() -> impl Strategy<Value = Timestamp> {
    (-60_000_000_000_i64..250_000_000_000, 0_u32..1_000_000_000)
        .prop_map(|(seconds, nanos)| Timestamp { seconds, nanos })
}

fn attribute() -> impl Strategy<Value = Attribute> {
    ("[a-z]{1,5}\\.[a-z\"\\\\]{1,9}", vec(any::<u8>(), 0..50))
        .prop_map(|(name, value)| Attribute { name: name.into_bytes(), value })
}

prop_compose! {
    fn node()(
        name in vec(any::<u8>(), 1..20),
        kind in kind(),
        mode in 0_u32..0o10000,
        times in (time(), time(), time()),
        owner in (any::<u32>(), any::<u32>(), ".{0,8}", ".{0,8}"),
        numbers in (any::<u64>(), any::<u64>(), any::<u64>()),
        attributes in vec(attribute(), 0..3),
    ) -> Node {
        let mut name: Vec<u8> = name.into_iter().map(|b| if b == 0 || b == b'/' { b'_' } else { b }).collect();
        if name.iter().all(|b| *b == b'.') {
            name.push(b'x');
        }
        Node {
            name, kind, mode, mtime: times.0, atime: times.1, ctime: times.2,
            uid: owner.0, gid: owner.1, user: owner.2, group: owner.3,
            inode: numbers.0, device_id: numbers.1, links: numbers.2, attributes,
        }
    }
}

proptest! {
    #[test]
    fn every_tree_reads_back(mut nodes in vec(node(), 0..5)) {
        let bytes = to_bytes(nodes.clone());
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        prop_assert_eq!(parse(&bytes).unwrap(), nodes);
    }

    #[test]
    fn no_bytes_make_it_panic(random: Vec<u8>, nodes in vec(node(), 1..3), changes in vec((any::<usize>(), any::<u8>()), 1..4)) {
        let _ = parse(&random);
        let mut mutated = to_bytes(nodes);
        for (at, to) in changes {
            let length = mutated.len();
            mutated[at % length] = to;
        }
        let _ = parse(&mutated);
    }
}

fn tree_of(node: &str) -> Vec<u8> {
    format!("{{\"nodes\":[{node}]}}\n").into_bytes()
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    for name in ["", ".", "..", "a/b", "/", "\\\\x00", "\\\\x2e\\\\x2e", "a\\\\x2fb"] {
        let tree = tree_of(&format!(r#"{{"name":"{name}","type":"fifo"}}"#));
        assert!(parse(&tree).is_err(), "{name:?}");
    }
    assert!(parse(&tree_of(r#"{"name":"...","type":"fifo"}"#)).is_ok());
}

#[test]
fn what_is_no_tree_is_refused() {
    for text in ["", "{}", "[]", "{\"nodes\":1}", "{\"nodes\":[]}x", "null"] {
        assert!(parse(text.as_bytes()).is_err(), "{text}");
    }
    for node in [r#"{"name":"a","type":"odd"}"#, r#"{"name":"a","type":"dir"}"#, r#"{"type":"file"}"#] {
        assert!(parse(&tree_of(node)).is_err(), "{node}");
    }
    assert!(parse(b"{\"nodes\":null}").unwrap().is_empty());
}

#[test]
fn modes_are_gos() {
    let restics = r#"{"name":"a","type":"dir","mode":2150629887,"mtime":"2024-01-01T00:00:00+01:00","atime":"2024-01-01T00:00:00Z","ctime":"2024-01-01T00:00:00Z","uid":0,"gid":0,"user":"root","group":"root","inode":5,"device_id":6,"content":null,"subtree":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}"#;
    let nodes = parse(&tree_of(restics)).unwrap();
    // 1<<31 (folder), 1<<21 is no bit of a folder, 1<<20 (sticky), 0o777.
    assert_eq!(nodes[0].mode, 0o1777);
    let mut out = Vec::new();
    nodes[0].write(&mut out);
    assert!(String::from_utf8(out).unwrap().contains(&format!("\"mode\":{}", (1_u32 << 31) | (1 << 20) | 0o777)));
}

#[test]
fn each_stops_when_nobody_wants_more() {
    let tree = tree_of(r#"{"name":"a","type":"fifo"},{"name":"b","type":"odd"}"#);
    let mut seen = 0;
    each(&tree, |_| {
        seen += 1;
        false
    })
    .unwrap();
    assert_eq!(seen, 1);
}
