//! Neighbours on a filesystem that gets frozen: one that writes and syncs all the time, and a write in flight.
//!
//! In: where to write. Out: when each write reached the disk, by the writer's own monotonic clock, so that a
//! busy test measures nothing of itself. The program is `hestner-writer`; it ends with its handle.

use std::io::{BufRead as _, BufReader};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Child;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::clock::{self, wait_for, wait_until};
use crate::command::Cmd;
use crate::world::bin;

/// What a first write may take on a busy machine.
const START_WITHIN: Duration = Duration::from_secs(20);
/// Longer than any pause of a writer on a disk that is busy and not frozen.
const IS_STALLED: Duration = Duration::from_millis(150);

/// A process that writes and syncs all the time.
pub struct Writer {
    child: Child,
    stamps: Arc<Mutex<Vec<Duration>>>,
}

impl Writer {
    /// Starts it in a folder of the filesystem, and waits for its first writes.
    pub fn start(folder: &Path) -> Self {
        let mut child = Cmd::new(bin("hestner-writer")).arg("write").arg(folder.join("writer.data")).spawn_heard();
        let stamps: Arc<Mutex<Vec<Duration>>> = Arc::default();
        let (kept, said) = (Arc::clone(&stamps), child.stdout.take().expect("a pipe"));
        std::thread::spawn(move || {
            let nanos = |line: String| line.parse().ok().map(Duration::from_nanos);
            for stamp in BufReader::new(said).lines().map_while(Result::ok).filter_map(nanos) {
                kept.lock().expect("the stamps").push(stamp);
            }
        });
        let writer = Self { child, stamps };
        wait_until("the writer's first writes", START_WITHIN, || writer.last().is_some());
        writer
    }

    /// When its last write was on the disk; `None` before the first.
    pub fn last(&self) -> Option<Duration> {
        self.stamps.lock().expect("the stamps").last().copied()
    }

    /// When the first write after `moment` was on the disk.
    pub fn first_after(&self, moment: Duration) -> Option<Duration> {
        let stamps = self.stamps.lock().expect("the stamps");
        stamps.get(stamps.partition_point(|stamp| *stamp <= moment)).copied()
    }

    /// Waits until nothing has reached the disk for longer than a busy disk explains, and gives the time of
    /// its last write.
    ///
    /// # Panics
    /// When it goes on writing.
    pub fn wait_stalled(&self, within: Duration) -> Duration {
        wait_for("the writer to stall", within, || {
            self.last().filter(|last| clock::monotonic().saturating_sub(*last) > IS_STALLED)
        })
    }

    /// Waits until something that was written after `moment` is on the disk, and says when it was.
    ///
    /// # Panics
    /// When nothing is `within` that time.
    pub fn wait_progress(&self, moment: Duration, within: Duration) -> Duration {
        wait_for("the writer to make progress", within, || self.first_after(moment))
    }

    /// The longest time between two writes since `moment`; the time since the last one counts as well.
    pub fn longest_stall(&self, moment: Duration) -> Duration {
        let stamps = self.stamps.lock().expect("the stamps");
        // The one before is where a stall may have begun.
        let first = stamps.partition_point(|stamp| *stamp <= moment).saturating_sub(1);
        let ends = stamps[first..].iter().copied().chain([clock::monotonic()]);
        ends.clone().zip(ends.skip(1)).map(|(from, to)| to.saturating_sub(from)).max().unwrap_or_default()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A write that has begun and does not end before it is told to: a freeze has to wait for it.
pub struct InFlight {
    child: Child,
    // Its end ends the write.
    pipe: Option<OwnedFd>,
}

impl InFlight {
    /// Begins a write to a file of the filesystem.
    ///
    /// # Panics
    /// When it cannot be begun.
    pub fn begin(folder: &Path) -> Self {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).expect("a pipe");
        let command = Cmd::new(bin("hestner-writer")).arg("hold").arg(folder.join("in-flight.data"));
        let mut child = command.stdin_from(read).spawn_heard();
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut line).expect("its word");
        let pid = i32::try_from(child.id()).expect("a pid");
        wait_until("the write to be in flight", START_WITHIN, || crate::processes::system_call(pid) == SPLICE);
        Self { child, pipe: Some(write) }
    }

    /// Lets it end, and waits for that.
    pub fn end(mut self) {
        self.end_now();
    }

    fn end_now(&mut self) {
        self.pipe = None;
        let _ = self.child.wait();
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.end_now();
    }
}

/// Number of splice(2), as `/proc/<pid>/syscall` shows it.
#[cfg(target_arch = "x86_64")]
const SPLICE: Option<i64> = Some(275);
#[cfg(not(target_arch = "x86_64"))]
const SPLICE: Option<i64> = Some(76);
