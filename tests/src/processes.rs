//! Looks at processes through `/proc`: who runs, whose child, what it uses.
//!
//! In: a pid or a text that only our own processes carry. Out: processes, and signals to them. A process
//! may vanish while it is looked at; then it is left out.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

/// One running process; zombies are left out.
#[derive(Clone, Debug)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// Its parent's number.
    pub parent: i32,
    /// Its command line.
    pub argv: Vec<String>,
}

impl Process {
    /// Whether one of its first arguments is `word`: how our binary names its parts (`runner`, `worker`).
    pub fn is_part(&self, word: &str) -> bool {
        self.argv.iter().skip(1).take(3).any(|arg| arg == word)
    }

    /// Whether any argument contains `text`.
    pub fn names(&self, text: &str) -> bool {
        self.argv.iter().any(|arg| arg.contains(text))
    }
}

/// Every process.
pub fn all() -> Vec<Process> {
    pids().filter_map(read).collect()
}

fn pids() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").expect("/proc");
    entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
}

/// One process.
pub fn read(pid: i32) -> Option<Process> {
    let stat = stat_fields(pid)?;
    if stat[0] == "Z" || stat[0] == "X" {
        return None;
    }
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let argv = line.split(|b| *b == 0).filter(|a| !a.is_empty()).map(|a| String::from_utf8_lossy(a).into_owned());
    Some(Process { pid, parent: stat[1].parse().ok()?, argv: argv.collect() })
}

/// Fields of `/proc/<pid>/stat` from the state (field 3) on.
pub fn stat_fields(pid: i32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let after_name = &text[text.rfind(')')? + 2..];
    Some(after_name.split_whitespace().map(str::to_owned).collect())
}

/// Number of the system call in which a process waits; `None` while it runs or is gone.
pub fn system_call(pid: i32) -> Option<i64> {
    let text = fs::read_to_string(format!("/proc/{pid}/syscall")).ok()?;
    text.split(' ').next()?.parse().ok()
}

/// Whether a process has a file open, or one below a folder.
pub fn has_open(pid: i32, path: &Path) -> bool {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    open.into_iter().any(|entry| fs::read_link(entry.path()).is_ok_and(|target| target.starts_with(path)))
}

/// Whether a process is stopped by a signal.
pub fn is_stopped(pid: i32) -> bool {
    stat_fields(pid).is_some_and(|fields| fields[0] == "T")
}

/// Whether a thread of a process is in a sleep that no signal ends.
pub fn has_blocked_thread(pid: i32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let is_blocked = |thread: fs::DirEntry| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, fields)| fields.starts_with('D'))
    };
    threads.into_iter().any(is_blocked)
}

/// Children of `pid`, their children and so on.
pub fn descendants(pid: i32) -> Vec<Process> {
    descendant_pids(pid).into_iter().filter_map(read).collect()
}

/// The same by number only, which is much cheaper; zombies are not left out.
pub fn descendant_pids(pid: i32) -> Vec<i32> {
    let mut by_parent: HashMap<i32, Vec<i32>> = HashMap::new();
    for child in pids() {
        let parent = stat_fields(child).and_then(|fields| fields[1].parse().ok());
        by_parent.entry(parent.unwrap_or(0)).or_default().push(child);
    }
    let mut found = Vec::new();
    let mut parents = vec![pid];
    while let Some(parent) = parents.pop() {
        let children = by_parent.remove(&parent).unwrap_or_default();
        parents.extend(&children);
        found.extend(children);
    }
    found
}

/// Processes whose command line or environment contains `marker`, ourselves left out.
pub fn marked(marker: &str) -> Vec<Process> {
    let own = i32::try_from(std::process::id()).expect("a pid");
    let in_environment = |pid: i32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        String::from_utf8_lossy(&environment).contains(marker)
    };
    all().into_iter().filter(|p| p.pid != own && (p.names(marker) || in_environment(p.pid))).collect()
}

/// Whether the process runs.
pub fn is_alive(pid: i32) -> bool {
    read(pid).is_some()
}

/// Sends a signal; a process that is gone already is fine.
pub fn send(pid: i32, which: Signal) {
    let _ = signal::kill(Pid::from_raw(pid), which);
}

/// SIGKILL.
pub fn kill(pid: i32) {
    send(pid, Signal::SIGKILL);
}

/// Kills what names `folder`, over and over until nothing is left: a dying parent may still start a child.
pub fn kill_all_naming(folder: &Path) {
    let marker = folder.to_string_lossy().into_owned();
    for _ in 0..50 {
        let left = marked(&marker);
        if left.is_empty() {
            return;
        }
        for process in left {
            kill(process.pid);
        }
        crate::clock::let_pass(std::time::Duration::from_millis(10));
    }
}

/// Clock ticks of user and system time of `pid` and of its children that it has waited for.
pub fn cpu_ticks(pid: i32) -> Option<u64> {
    let fields = stat_fields(pid)?;
    // utime, stime, cutime and cstime are fields 14 to 17; `fields` begins with field 3.
    (11..15).map(|i| fields.get(i)?.parse::<u64>().ok()).sum()
}

/// A number of kilobytes from `/proc/<pid>/<file>`, such as `VmRSS` of `status`, as bytes.
pub fn kilobytes(pid: i32, file: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).ok()?;
    let line = text.lines().find(|line| line.starts_with(name) && line[name.len()..].starts_with(':'))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kb| kb * 1024)
}
