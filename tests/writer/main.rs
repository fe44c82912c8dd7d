//! The neighbour that a frozen filesystem must not hurt: a process that writes and syncs all the time.
//!
//! A process of its own, because whoever writes to a frozen filesystem can be neither stopped nor killed
//! before the thaw. In: what to do, and a file on the filesystem. Out: after each write that is on the disk
//! the time of `CLOCK_MONOTONIC` in ns, a line on standard output: a pipe, so that nothing but the
//! filesystem itself can hold it up. It ends when nobody reads any more.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use nix::fcntl::SpliceFFlags;
use nix::time::{ClockId, clock_gettime};

/// Room that it writes over and over: small enough for every test disk.
const BLOCKS: u64 = 256;
const BLOCK_BYTES: usize = 4096;
/// It is to be stopped by nothing, not to use up the disk.
const PAUSE: Duration = Duration::from_millis(2);

fn main() -> io::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["write", file] => write(Path::new(file)),
        ["hold", file] => hold(Path::new(file)),
        ["once", file] => once(Path::new(file)),
        _ => Err(io::Error::other("usage: hestner-writer write|hold|once FILE")),
    }
}

/// Data and metadata in turns, each time until it is on the disk.
fn write(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
    let beside = path.with_extension("beside");
    let mut said = io::stdout().lock();
    for i in 0_u64.. {
        file.write_all_at(&[i.to_ne_bytes()[0]; BLOCK_BYTES], (i % BLOCKS) * BLOCK_BYTES as u64)?;
        if i % 8 == 0 {
            File::create(&beside)?;
            std::fs::remove_file(&beside)?;
        }
        file.sync_all()?;
        let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
        writeln!(said, "{}", now.as_nanos())?;
        said.flush()?;
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

/// One new file, and when it could be made.
fn once(path: &Path) -> io::Result<()> {
    File::create(path)?;
    println!("{}", Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?).as_nanos());
    Ok(())
}

/// A write in flight: the kernel counts a splice as a writer of the filesystem from its begin, and it waits
/// for what comes through the pipe on standard input. A freeze waits for it.
fn hold(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().create(true).truncate(true).write(true).open(path)?;
    println!("{}", Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?).as_nanos());
    while nix::fcntl::splice(io::stdin(), None, &file, None, BLOCK_BYTES, SpliceFFlags::empty())? > 0 {}
    Ok(())
}
