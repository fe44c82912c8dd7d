//! The trees that are backed up, how each is made, and how one hundredth of it changes.

use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use hestner_tests::{Cmd, files};

use crate::measure::LONGEST;
use crate::{disk, generate};

/// Where real files are taken from, in this order.
const REAL_FROM: [&str; 2] = ["/usr/lib", "/usr/share"];
const REAL_FILES: usize = 45_000;
const REAL_BYTES: u64 = 1_700_000_000;
/// Longer ones are left out, so that a few do not take the place of many.
const REAL_FILE_BYTES_MAX: u64 = 64_000_000;
const SMALL_FILES: u64 = 150_000;
const SMALL_SIZES: std::ops::Range<u64> = 200..6_000;
const DATABASE_BYTES: u64 = 4_000_000_000 / generate::PAGE_BYTES * generate::PAGE_BYTES;
const NOISE_FILES: u64 = 20;
const NOISE_BYTES: u64 = 100_000_000;

/// A tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Tree {
    /// Files of this machine.
    Real,
    /// Many small text files.
    Small,
    /// One file of pages.
    Database,
    /// What nothing compresses.
    Random,
    /// A copy of somebody's folder.
    Copy(PathBuf),
}

impl Tree {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Real => "real",
            Self::Small => "small",
            Self::Database => "database",
            Self::Random => "random",
            Self::Copy(_) => "copy",
        }
    }

    /// What it is, for people.
    pub(crate) fn told(&self) -> String {
        match self {
            Self::Real => {
                "real: files of /usr/lib and /usr/share in the order of their names, as many as fit".to_owned()
            }
            Self::Small => "small: text files of 0.2 to 6 kB".to_owned(),
            Self::Database => {
                format!(
                    "database: one file of 8 KiB pages; changed pages lie in groups of {}",
                    generate::PAGES_TOGETHER
                )
            }
            Self::Random => "random: 20 files of noise; a fifth of one is changed".to_owned(),
            Self::Copy(from) => format!("copy of {}", from.display()),
        }
    }

    /// Bytes that it takes at most on the disk.
    pub(crate) fn bytes(&self) -> anyhow::Result<u64> {
        Ok(match self {
            Self::Real => REAL_BYTES + 200_000_000,
            Self::Small => SMALL_FILES * 8192,
            Self::Database => DATABASE_BYTES,
            Self::Random => NOISE_FILES * NOISE_BYTES,
            Self::Copy(from) => {
                let holds = disk::holds(from).with_context(|| format!("{} cannot be read", from.display()))?;
                holds.bytes + holds.files * 4096
            }
        })
    }

    /// Makes it.
    pub(crate) fn make(&self, at: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(at)?;
        match self {
            Self::Real => copy_real(at)?,
            Self::Small => drop(generate::small_files(at, SMALL_FILES, SMALL_SIZES)?),
            Self::Database => generate::database(&at.join("base.pages"), DATABASE_BYTES)?,
            Self::Random => {
                for file in 0..NOISE_FILES {
                    generate::noise(&at.join(format!("noise{file:02}.bin")), file << 40, NOISE_BYTES)?;
                }
            }
            Self::Copy(from) => {
                Cmd::new("cp").arg("-a").arg(from.join(".")).arg(at).within(LONGEST).ok();
                if disk::holds(at)?.files == 0 {
                    bail!("{} holds no files", from.display());
                }
            }
        }
        Ok(())
    }

    /// Changes one hundredth of it, another one each round.
    pub(crate) fn change(&self, at: &Path, round: u32) -> anyhow::Result<()> {
        match self {
            Self::Database => generate::change_database(&at.join("base.pages"), round)?,
            Self::Random => {
                let name = format!("noise{:02}.bin", u64::from(round) % NOISE_FILES);
                let bytes = NOISE_FILES * NOISE_BYTES / 100;
                generate::change_noise(&at.join(name), u64::from(round) << 50, 40_000_000, bytes)?;
            }
            _ => change_one_file_in_a_hundred(at, round)?,
        }
        Ok(())
    }
}

/// Copies files of this machine, with the folders, links and modes that they have.
fn copy_real(at: &Path) -> anyhow::Result<()> {
    let mut chosen = Vec::new();
    let (mut files, mut bytes) = (0, 0);
    for root in REAL_FROM {
        real_entries(Path::new(root), &mut |path, meta| {
            if meta.is_file() {
                if files >= REAL_FILES || bytes + meta.len() > REAL_BYTES || meta.len() > REAL_FILE_BYTES_MAX {
                    return;
                }
                files += 1;
                bytes += meta.len();
            }
            chosen.extend_from_slice(path.as_os_str().as_bytes().strip_prefix(b"/").unwrap_or_default());
            chosen.push(0);
        })?;
    }
    let args = ["-0", "cp", "--archive", "--parents", "--target-directory"];
    Cmd::new("xargs").args(args).arg(at).in_folder(Path::new("/")).stdin(chosen).within(LONGEST).ok();
    Ok(())
}

/// Files and symlinks in the order of their names, on one filesystem.
fn real_entries(folder: &Path, take: &mut dyn FnMut(&Path, &std::fs::Metadata)) -> anyhow::Result<()> {
    let mut entries: Vec<_> =
        std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<_, std::io::Error>>()?;
    entries.sort();
    let device = std::fs::symlink_metadata(folder)?.dev();
    for path in entries {
        let meta = std::fs::symlink_metadata(&path)?;
        if meta.is_dir() && meta.dev() == device {
            real_entries(&path, take)?;
        } else if meta.is_file() || meta.is_symlink() {
            take(&path, &meta);
        }
    }
    Ok(())
}

/// Rewrites another hundredth of the files each round: same size class, other content.
fn change_one_file_in_a_hundred(tree: &Path, round: u32) -> anyhow::Result<()> {
    let names = disk::regular_files(tree)?;
    // A small tree has a changed file as well.
    let step = names.len().clamp(1, 100);
    for name in names.iter().skip(round as usize % step).step_by(step) {
        let meta = std::fs::metadata(name)?;
        files::write(name, files::random_bytes(usize::try_from(meta.len())?.max(16)));
        files::set_mode(name, meta.permissions().mode() & 0o7777);
    }
    Ok(())
}
