//! Blobs: pieces of data, and trees.

use serde::{Deserialize, Serialize};

/// What a blob holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlobKind {
    /// A piece of a file.
    Data,
    /// A folder's entries.
    Tree,
}

/// Longest blob in the clear: the format counts in 32 bits. restic cuts data at 8 MiB; a folder's tree is
/// never cut.
pub const BLOB_BYTES_MAX: u64 = u32::MAX as u64;
/// Longest piece of a file that restic (0.14) and we make.
pub const CHUNK_BYTES_MAX: usize = 8 * 1024 * 1024;
