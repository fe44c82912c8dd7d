//! Ours: points as a run takes them, each in a folder of its own, with a guard where the plan needs one.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use anyhow::{Context as _, bail};
use hestner_agent::freeze::{self, Arming, PointPlan, Protected};
use hestner_agent::guard::client::{Guard, Start, Watch};
use hestner_agent::hook::{self, Spec};
use hestner_agent::policy::ServiceSettings;
use hestner_tests::clock::{let_pass, now};
use hestner_tests::{Cmd, files, processes, world};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use super::by_hand::Stamps;

/// Long enough for whoever creates a file on a frozen filesystem to wait for it.
const UNTIL_IT_WAITS: Duration = Duration::from_millis(20);

/// Takes points.
pub(super) struct Points {
    runtime: Runtime,
    settings: freeze::Settings,
    start: Start,
    folder: Folder,
    taken: std::cell::Cell<u32>,
}

/// Removed with all in it.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        processes::kill_all_naming(&self.0);
        // What is left is seen in it.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A runner that is to be killed.
struct Runner(Child);

impl Drop for Runner {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A service with the given `[service.point]`.
pub(super) fn service(point: Value, path: &Path) -> anyhow::Result<ServiceSettings> {
    let source = json!({"kind": "files", "paths": [path]});
    Ok(serde_json::from_value(json!({"name": "bench", "destination": "none", "source": source, "point": point}))?)
}

impl Points {
    pub(super) fn new() -> anyhow::Result<Self> {
        let folder = Folder(world::own_folder("bench-freeze"));
        // Guards that strike start `hestner-agent thaw` with it, which finds nothing to do.
        let at = |name: &str| folder.0.join(name);
        let text = format!("state_dir = \"{}\"\nsocket = \"{}\"\n", at("state").display(), at("socket").display());
        let config = files::write(at("agent.toml"), text);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let settings = freeze::Settings::default();
        Ok(Self { runtime, settings, start: Start::Process { config }, folder, taken: 0.into() })
    }

    /// A path in the folder of the benchmark.
    pub(super) fn at(&self, name: &str) -> PathBuf {
        self.folder.0.join(name)
    }

    /// One that was not given before.
    pub(super) fn fresh(&self, name: &str) -> PathBuf {
        self.taken.set(self.taken.get() + 1);
        self.at(&format!("{name}-{}", self.taken.get()))
    }

    pub(super) fn use_docker(&mut self, socket: PathBuf) {
        self.settings.docker_socket = socket;
    }

    /// An empty window.
    pub(super) fn freeze(&self, mount: &Path) -> anyhow::Result<Duration> {
        let watch = self.watch(mount)?;
        self.runtime.block_on(async {
            let mut guard = Guard::arm(&self.start, watch).await?;
            guard.freeze().await?;
            Ok(guard.thaw().await?.frozen)
        })
    }

    /// A point of a service: how long something was held, and how long it took between the hooks.
    pub(super) fn take(&self, service: &ServiceSettings) -> anyhow::Result<(Duration, Option<Duration>)> {
        let folder = self.run_folder()?;
        let uid = folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let alive = File::create(folder.join("alive"))?;
        let stop = CancellationToken::new();
        self.runtime.block_on(async {
            let plan = PointPlan::of(service, &uid, &self.settings, &Protected::default()).await?;
            let arming = Arming {
                run_uid: &uid,
                folder: &folder,
                alive: &alive,
                start: &self.start,
                hook_guard: None,
                stop: &stop,
            };
            let begin = now();
            let mut frozen = freeze::freeze(&plan, arming).await?;
            let taken = frozen.take(&self.settings, &stop).await;
            let point = frozen.thaw().await?;
            let between = begin.elapsed();
            taken?;
            let window = point.frozen();
            point.remove(&self.settings).await?;
            Ok((window.unwrap_or(between), window.map(|_| between)))
        })
    }

    /// Nothing but two hooks: from the end of the first to the begin of the second.
    pub(super) fn between_hooks(&self, service: &ServiceSettings, stamps: &Stamps) -> anyhow::Result<Duration> {
        let stop = CancellationToken::new();
        let run = |which: &str| {
            let spec = Spec {
                argv: stamps.argv(which),
                user: String::new(),
                timeout_ms: 30_000,
                output_bytes_max: 1024,
                environment: Vec::new(),
                stdout_fd: None,
            };
            let ended = self.runtime.block_on(hook::run(&spec, &stop, &[], &[]))?;
            if !ended.is_success() {
                bail!("a hook {}", ended.description());
            }
            Ok(())
        };
        run("pre")?;
        self.take(service)?;
        run("post")?;
        stamps.between()
    }

    /// Kills a runner inside its window: how long until somebody who waits for the filesystem goes on.
    pub(super) fn killed(&self, mount: &Path) -> anyhow::Result<Duration> {
        let Start::Process { config } = &self.start else { bail!("the guard is a process here") };
        let watch = self.watch(mount)?;
        let bench = std::env::current_exe()?;
        let command = Cmd::new(bench).arg("hold-frozen").arg(config).arg(&watch.journal).arg(mount);
        let mut runner = Runner(command.spawn_heard());
        let mut line = String::new();
        BufReader::new(runner.0.stdout.take().context("no pipe")?).read_line(&mut line)?;
        if line.trim() != "frozen" {
            bail!("the runner could not freeze");
        }
        let path = mount.join("waits");
        let waiting = std::thread::spawn(move || File::create(path).map(|_| now()));
        let_pass(UNTIL_IT_WAITS);
        if waiting.is_finished() {
            bail!("it is not frozen");
        }
        let killed = now();
        runner.0.kill()?;
        let thawed = waiting.join().map_err(|_| anyhow::anyhow!("nobody waited"))??;
        Ok(thawed.saturating_duration_since(killed))
    }

    fn watch(&self, mount: &Path) -> anyhow::Result<Watch> {
        let journal = self.run_folder()?.join("freeze.journal");
        Ok(watch(journal, mount))
    }

    fn run_folder(&self) -> anyhow::Result<PathBuf> {
        let folder = self.fresh("run");
        std::fs::create_dir_all(&folder)?;
        files::set_mode(&folder, 0o700);
        Ok(folder)
    }
}

fn watch(journal: PathBuf, mount: &Path) -> Watch {
    let window = freeze::Settings::default().window;
    Watch { run_uid: "bench".to_owned(), journal, mounts: vec![mount.to_owned()], window }
}

/// The runner that is killed: freezes, says so, and waits.
pub(crate) fn hold_frozen(config: PathBuf, journal: PathBuf, mount: &Path) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut guard = Guard::arm(&Start::Process { config }, watch(journal, mount)).await?;
        guard.freeze().await?;
        writeln!(std::io::stdout(), "frozen")?;
        guard.struck().await;
        bail!("the window ended before anybody killed its runner")
    })
}
