//! A stream as the one file of a snapshot.

use std::io::{self, Read};
use std::path::PathBuf;

use crate::format::tree::{Node, NodeKind};

use super::super::open::ArchiveError;
use super::folder::Folder;
use super::pipeline::{Pipeline, Stop};
use super::read::{Bytes, pieces};
use super::tools::Tools;
use super::work::{BigFile, Queues};

const MODE: u32 = 0o600;

struct Reader<'r>(Box<dyn Read + Send + 'r>);

impl Bytes for Reader<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(into) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => return read,
            }
        }
    }
}

/// Reads a stream to its end.
pub(super) fn read(
    pipeline: &Pipeline<'_>,
    tools: &mut Tools,
    queues: &Queues,
    name: &str,
    bytes: Box<dyn Read + Send + '_>,
) -> Result<(), Stop> {
    if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
        return Err(pipeline.fail(ArchiveError::Stream(format!("{name:?} is no name of a file"))));
    }
    let root = Folder::new(PathBuf::from("/"), None, 1);
    let file = BigFile::new(root, 0);
    let read = pieces(pipeline, tools, queues, &file, &mut Reader(bytes))?;
    // A read that was called off is no fault of the stream's.
    pipeline.check()?;
    let size = read.map_err(|error| pipeline.fail(ArchiveError::Stream(format!("cannot be read: {error}"))))?;
    file.end(pipeline, tools, node(pipeline, name, size))
}

fn node(pipeline: &Pipeline<'_>, name: &str, size: u64) -> Node {
    let (uid, gid) = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
    let now = pipeline.started;
    Node {
        name: name.as_bytes().to_vec(),
        kind: NodeKind::File { size, content: Vec::new() },
        mode: MODE,
        mtime: now,
        atime: now,
        ctime: now,
        uid,
        gid,
        user: pipeline.names.user(uid),
        group: pipeline.names.group(gid),
        inode: 0,
        device_id: 0,
        links: 1,
        attributes: Vec::new(),
    }
}
