//! Trees: what a folder holds, an entry a node, sorted by name.
//!
//! A tree is JSON with a newline after it. Names are quoted as Go quotes strings, so that any bytes can be one;
//! the target of a symlink that is not UTF-8 lies in `linktarget_raw` as well, which restic reads since 0.16
//! (0.14 restores such a target with U+FFFD in it). The bytes of a node depend on nothing but the node, so
//! that an unchanged folder has the same id again.

use std::borrow::Cow;
use std::fmt;
use std::io::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::text::{Timestamp, quote, unquote, write_json_string};
use super::{FormatError, Id};

const WHAT: &str = "tree";
/// Longest tree in the clear: a folder of some two million entries.
pub const TREE_BYTES_MAX: usize = 1024 * 1024 * 1024;
/// Before the first node.
pub const OPENING: &[u8] = b"{\"nodes\":[";
/// After the last.
pub const CLOSING: &[u8] = b"]}\n";

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeKind {
    /// A regular file.
    File {
        /// Bytes.
        size: u64,
        /// Its pieces in order.
        content: Vec<Id>,
    },
    /// A folder.
    Folder {
        /// Its own tree.
        subtree: Id,
    },
    /// A symlink.
    Symlink {
        /// Where to.
        target: Vec<u8>,
    },
    /// A block device.
    BlockDevice {
        /// Its number, as `st_rdev` has it.
        device: u64,
    },
    /// A character device.
    CharDevice {
        /// Its number, as `st_rdev` has it.
        device: u64,
    },
    /// A named pipe.
    Fifo,
    /// A socket; restic (0.14) writes none, and we write none.
    Socket,
}

/// An extended attribute; ACLs are some as well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attribute {
    /// Its name with its namespace.
    pub name: Vec<u8>,
    /// Its value.
    pub value: Vec<u8>,
}

/// An entry of a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// One component of a path, as the kernel has it: never empty, `.`, `..`, and without `/` and NUL.
    pub name: Vec<u8>,
    /// What it is.
    pub kind: NodeKind,
    /// Permissions with setuid, setgid and sticky, as `chmod` takes them.
    pub mode: u32,
    /// Changed.
    pub mtime: Timestamp,
    /// Read. Written as the time of the last change, as restic does by default.
    pub atime: Timestamp,
    /// The inode was changed.
    pub ctime: Timestamp,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// The owner's name, if it has one.
    pub user: String,
    /// The group's name, if it has one.
    pub group: String,
    /// The inode's number.
    pub inode: u64,
    /// The filesystem's number. Entries of one inode and device are hard links of each other.
    pub device_id: u64,
    /// How many names it has; 0 where that is not kept.
    pub links: u64,
    /// Extended attributes.
    pub attributes: Vec<Attribute>,
}

const GO_DIR: u32 = 1 << 31;
const GO_SYMLINK: u32 = 1 << 27;
const GO_DEVICE: u32 = 1 << 26;
const GO_FIFO: u32 = 1 << 25;
const GO_SOCKET: u32 = 1 << 24;
const GO_SETUID: u32 = 1 << 23;
const GO_SETGID: u32 = 1 << 22;
const GO_CHAR: u32 = 1 << 21;
const GO_STICKY: u32 = 1 << 20;
const SPECIAL: [(u32, u32); 3] = [(0o4000, GO_SETUID), (0o2000, GO_SETGID), (0o1000, GO_STICKY)];

impl NodeKind {
    fn word(&self) -> &'static str {
        match self {
            Self::File { .. } => "file",
            Self::Folder { .. } => "dir",
            Self::Symlink { .. } => "symlink",
            Self::BlockDevice { .. } => "dev",
            Self::CharDevice { .. } => "chardev",
            Self::Fifo => "fifo",
            Self::Socket => "socket",
        }
    }

    fn go_bits(&self) -> u32 {
        match self {
            Self::File { .. } => 0,
            Self::Folder { .. } => GO_DIR,
            Self::Symlink { .. } => GO_SYMLINK,
            Self::BlockDevice { .. } => GO_DEVICE,
            Self::CharDevice { .. } => GO_DEVICE | GO_CHAR,
            Self::Fifo => GO_FIFO,
            Self::Socket => GO_SOCKET,
        }
    }
}

impl Node {
    /// Appends its JSON.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"{\"name\":\"");
        write_json_string(&quote(&self.name), out);
        out.extend_from_slice(b"\",\"type\":\"");
        out.extend_from_slice(self.kind.word().as_bytes());
        out.push(b'"');
        let special: u32 = SPECIAL.iter().filter(|(unix, _)| self.mode & unix != 0).map(|(_, go)| go).sum();
        field_unless_zero(out, "mode", u64::from(self.mode & 0o777 | special | self.kind.go_bits()));
        for (key, time) in [("mtime", self.mtime), ("atime", self.atime), ("ctime", self.ctime)] {
            let _ = write!(out, ",\"{key}\":\"");
            time.write(out);
            out.push(b'"');
        }
        let _ = write!(out, ",\"uid\":{},\"gid\":{}", self.uid, self.gid);
        for (key, text) in [("user", &self.user), ("group", &self.group)] {
            if !text.is_empty() {
                string_field(out, key, text.as_bytes());
            }
        }
        field_unless_zero(out, "inode", self.inode);
        field_unless_zero(out, "device_id", self.device_id);
        if let NodeKind::File { size, .. } = self.kind {
            field_unless_zero(out, "size", size);
        }
        field_unless_zero(out, "links", self.links);
        if let NodeKind::Symlink { target } = &self.kind {
            string_field(out, "linktarget", target);
            if std::str::from_utf8(target).is_err() {
                string_field(out, "linktarget_raw", STANDARD.encode(target).as_bytes());
            }
        }
        self.write_attributes(out);
        if let NodeKind::BlockDevice { device } | NodeKind::CharDevice { device } = self.kind {
            field_unless_zero(out, "device", device);
        }
        self.write_content(out);
        out.push(b'}');
    }

    fn write_attributes(&self, out: &mut Vec<u8>) {
        if self.attributes.is_empty() {
            return;
        }
        out.extend_from_slice(b",\"extended_attributes\":[");
        for (i, attribute) in self.attributes.iter().enumerate() {
            out.extend_from_slice(if i == 0 { b"{\"name\":\"" } else { b",{\"name\":\"" });
            write_json_string(&attribute.name, out);
            out.extend_from_slice(b"\",\"value\":\"");
            out.extend_from_slice(STANDARD.encode(&attribute.value).as_bytes());
            out.extend_from_slice(b"\"}");
        }
        out.push(b']');
    }

    fn write_content(&self, out: &mut Vec<u8>) {
        match &self.kind {
            NodeKind::File { content, .. } => {
                out.extend_from_slice(b",\"content\":[");
                for (i, id) in content.iter().enumerate() {
                    out.extend_from_slice(if i == 0 { b"\"" } else { b",\"" });
                    id.write_hex(out);
                    out.push(b'"');
                }
                out.push(b']');
            }
            NodeKind::Folder { subtree } => {
                out.extend_from_slice(b",\"content\":null,\"subtree\":\"");
                subtree.write_hex(out);
                out.push(b'"');
            }
            _ => out.extend_from_slice(b",\"content\":null"),
        }
    }
}

fn field_unless_zero(out: &mut Vec<u8>, key: &str, number: u64) {
    if number != 0 {
        let _ = write!(out, ",\"{key}\":{number}");
    }
}

fn string_field(out: &mut Vec<u8>, key: &str, text: &[u8]) {
    let _ = write!(out, ",\"{key}\":\"");
    write_json_string(text, out);
    out.push(b'"');
}

/// A tree of nodes, which are sorted first.
pub fn to_bytes(mut nodes: Vec<Node>) -> Vec<u8> {
    nodes.sort_by(|a, b| a.name.cmp(&b.name));
    let mut out = OPENING.to_vec();
    for (i, node) in nodes.iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        node.write(&mut out);
    }
    out.extend_from_slice(CLOSING);
    out
}

/// All nodes of a tree.
///
/// # Errors
/// As [`each`].
pub fn parse(bytes: &[u8]) -> Result<Vec<Node>, FormatError> {
    let mut nodes = Vec::new();
    each(bytes, |node| {
        nodes.push(node);
        true
    })?;
    Ok(nodes)
}

/// Node after node of a tree, so that a folder with very many entries need not be in memory as a whole. `take`
/// returns whether it wants another; what follows is then not looked at.
///
/// # Errors
/// When the tree is damaged, or a node has a name that is no name, or is of an unknown type. Nodes before that
/// one were given to `take`.
pub fn each(bytes: &[u8], mut take: impl FnMut(Node) -> bool) -> Result<(), FormatError> {
    super::bounded(WHAT, bytes.len(), TREE_BYTES_MAX)?;
    let mut walk = Walk { take: &mut take, wants_more: true };
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let read = walk.deserialize(&mut json).and_then(|()| json.end());
    match read {
        Err(error) if walk.wants_more => Err(FormatError::damaged(WHAT, error)),
        _ => Ok(()),
    }
}

struct Walk<'t> {
    take: &'t mut dyn FnMut(Node) -> bool,
    wants_more: bool,
}

impl<'de> DeserializeSeed<'de> for &mut Walk<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &mut Walk<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a tree")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut found = false;
        while let Some(key) = map.next_key::<Cow<'de, str>>()? {
            if key == "nodes" && !found {
                found = true;
                map.next_value_seed(Nodes(self))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        if found { Ok(()) } else { Err(serde::de::Error::missing_field("nodes")) }
    }
}

struct Nodes<'w, 't>(&'w mut Walk<'t>);

impl<'de> DeserializeSeed<'de> for Nodes<'_, '_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Nodes<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nodes")
    }

    /// Go writes `null` for a list that was never made.
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        use serde::de::Error as _;
        while let Some(json) = seq.next_element::<NodeJson<'de>>()? {
            let node = json.node().map_err(A::Error::custom)?;
            if !(self.0.take)(node) {
                self.0.wants_more = false;
                return Err(A::Error::custom("enough"));
            }
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct AttributeJson<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(borrow, default)]
    value: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct NodeJson<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    #[serde(default)]
    mode: u32,
    #[serde(default)]
    mtime: Timestamp,
    #[serde(default)]
    atime: Timestamp,
    #[serde(default)]
    ctime: Timestamp,
    #[serde(default)]
    uid: u32,
    #[serde(default)]
    gid: u32,
    #[serde(borrow, default)]
    user: Cow<'a, str>,
    #[serde(borrow, default)]
    group: Cow<'a, str>,
    #[serde(default)]
    inode: u64,
    #[serde(default)]
    device_id: u64,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    links: u64,
    #[serde(borrow, default)]
    linktarget: Cow<'a, str>,
    #[serde(borrow, default)]
    linktarget_raw: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    extended_attributes: Option<Vec<AttributeJson<'a>>>,
    #[serde(default)]
    device: u64,
    #[serde(default)]
    content: Option<Vec<Id>>,
    #[serde(default)]
    subtree: Option<Id>,
}

impl NodeJson<'_> {
    fn node(self) -> Result<Node, String> {
        let name = unquote(&self.name).ok_or("a name is not quoted as it must be")?;
        if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') || name.contains(&0) {
            return Err(format!("{:?} is no name", self.name.chars().take(100).collect::<String>()));
        }
        let decode = |text: &str| STANDARD.decode(text).map_err(|error| format!("base64: {error}"));
        let kind = match &*self.kind {
            "file" => NodeKind::File { size: self.size, content: self.content.unwrap_or_default() },
            "dir" => NodeKind::Folder { subtree: self.subtree.ok_or("a folder has no subtree")? },
            "symlink" => NodeKind::Symlink {
                target: match &self.linktarget_raw {
                    Some(raw) => decode(raw)?,
                    None => self.linktarget.as_bytes().to_vec(),
                },
            },
            "dev" => NodeKind::BlockDevice { device: self.device },
            "chardev" => NodeKind::CharDevice { device: self.device },
            "fifo" => NodeKind::Fifo,
            "socket" => NodeKind::Socket,
            other => return Err(format!("unknown type {:?}", other.chars().take(40).collect::<String>())),
        };
        let attribute = |json: AttributeJson<'_>| {
            let value = decode(json.value.as_deref().unwrap_or_default())?;
            Ok::<_, String>(Attribute { name: json.name.as_bytes().to_vec(), value })
        };
        let attributes = self.extended_attributes.unwrap_or_default();
        let special: u32 = SPECIAL.iter().filter(|(_, go)| self.mode & go != 0).map(|(unix, _)| unix).sum();
        Ok(Node {
            name,
            kind,
            mode: self.mode & 0o777 | special,
            mtime: self.mtime,
            atime: self.atime,
            ctime: self.ctime,
            uid: self.uid,
            gid: self.gid,
            user: self.user.into_owned(),
            group: self.group.into_owned(),
            inode: self.inode,
            device_id: self.device_id,
            links: self.links,
            attributes: attributes.into_iter().map(attribute).collect::<Result<_, _>>()?,
        })
    }
}

#[cfg(test)]
mod tests;
