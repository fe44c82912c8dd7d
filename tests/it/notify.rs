//! What agent and receiver tell the service manager: ready when they are, alive while they work, stopping when
//! they stop; and nothing of it to what they start.

use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::Child;
use std::time::{Duration, Instant};

use hestner_tests::{Cmd, Hook, Service, World, clock, files, processes, wait_until};
use nix::sys::signal::Signal;

/// Longest wait for one word.
const WITHIN: Duration = Duration::from_secs(30);
/// What the manager grants between two signs of life.
const WATCHDOG: Duration = Duration::from_secs(1);

/// A service manager that listens.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Manager {
    fn new(world: &World) -> Self {
        let path = world.at("notify.sock");
        let socket = UnixDatagram::bind(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Self { socket, path }
    }

    /// Starts a program as a unit of type `notify` would be.
    fn start(&self, command: Cmd, log: &std::path::Path) -> Child {
        let usec = WATCHDOG.as_micros().to_string();
        command.env("NOTIFY_SOCKET", &self.path).env("WATCHDOG_USEC", usec).spawn_logged(log)
    }

    /// The next word, if one comes in time.
    fn next(&self, within: Duration) -> Option<String> {
        self.socket.set_read_timeout(Some(within)).expect("a timeout");
        let mut buffer = [0; 256];
        let length = self.socket.recv(&mut buffer).ok()?;
        Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
    }

    /// Waits for a word; returns those before it.
    fn wait(&self, word: &str) -> Vec<String> {
        let end = clock::now() + WITHIN;
        let mut before = Vec::new();
        while let Some(next) = self.next(end.saturating_duration_since(clock::now()).max(Duration::from_millis(1))) {
            if next == word {
                return before;
            }
            before.push(next);
        }
        panic!("{word} did not come; {before:?} did");
    }

    fn forget_all(&self) {
        while self.next(Duration::from_millis(1)).is_some() {}
    }

    /// Everything that is said of a living program: alive, silent while it stands still, alive again, stopping.
    fn follow_to_the_end(&self, mut child: Child) {
        let pid = i32::try_from(child.id()).expect("a pid");
        for _ in 0..4 {
            assert_eq!(self.wait("WATCHDOG=1"), [] as [&str; 0]);
        }
        processes::send(pid, Signal::SIGSTOP);
        clock::let_pass(Duration::from_millis(100));
        self.forget_all();
        let silent: Option<String> = self.next(3 * WATCHDOG);
        processes::send(pid, Signal::SIGCONT);
        assert_eq!(silent, None, "a process that stands still says nothing");
        self.wait("WATCHDOG=1");
        processes::send(pid, Signal::SIGTERM);
        assert!(self.wait("STOPPING=1").iter().all(|word| word == "WATCHDOG=1"));
        let began: Instant = clock::now();
        wait_until("the program to stop", WITHIN, || child.try_wait().expect("a child").is_some());
        assert!(child.wait().expect("a child").success(), "it stopped after {:?}", began.elapsed());
    }
}

#[test]
fn agent_is_ready_without_a_receiver_alive_while_it_works_and_says_when_it_stops() {
    let mut world = World::new("notify_agent");
    let manager = Manager::new(&world);
    let seen = world.at("environment.txt");
    let hook = files::write_script(world.at("hook"), &format!("env >{}", seen.display()));
    let hook = Hook::new("look").pre(&[hook.to_str().expect("UTF-8")]);
    let agent = world.agent().allowed(Service::files("docs", [world.source("source")]).hook(hook)).enrolled();
    // Ready means that it works, not that anybody can be reached.
    world.receiver.stop();
    let child = manager.start(agent.command(&["run"]), &agent.log);
    assert_eq!(manager.wait("READY=1"), [] as [&str; 0]);
    assert_eq!(agent.status()["connected"], false, "and its socket answers");
    agent.snapshot_ok("docs");
    let environment = files::lines(&seen);
    assert!(
        !environment.is_empty() && !environment.iter().any(|line| line.contains("NOTIFY_SOCKET")),
        "{environment:?}"
    );
    manager.wait("WATCHDOG=1");
    manager.forget_all();
    manager.follow_to_the_end(child);
}

#[test]
fn agent_that_cannot_start_is_never_ready() {
    let world = World::new("notify_unready");
    let manager = Manager::new(&world);
    let agent = world.agent().written();
    let mut child = manager.start(agent.command(&["run"]), &agent.log);
    assert_eq!(child.wait().expect("a child").code(), Some(64), "it is not enrolled");
    assert_eq!(manager.next(Duration::from_millis(100)), None);
}

#[test]
fn receiver_is_ready_when_it_listens_alive_while_it_works_and_says_when_it_stops() {
    let mut world = World::new("notify_receiver");
    let manager = Manager::new(&world);
    world.receiver.stop();
    let child = manager.start(world.receiver.command(&["serve"]), &world.at("receiver-again.log"));
    assert_eq!(manager.wait("READY=1"), [] as [&str; 0]);
    assert!(world.receiver.state().join("addresses.json").exists(), "whoever is told can connect");
    manager.follow_to_the_end(child);
}
