//! A Docker daemon of a test's own, and containers that do next to nothing: no registry is reached.
//!
//! In: a folder. Out: containers by name, and what Docker says of them. They and the daemon end with the
//! handle. Needs root and Debian's `docker.io`.

use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use crate::clock::wait_until;
use crate::command::Cmd;
use crate::{files, processes};

/// Programs of the only image.
const PROGRAMS: &[&str] = &["/bin/sleep", "/bin/sh"];
const IMAGE: &str = "hestner-image";

/// A Docker daemon on a socket and folders of its own.
pub struct Docker {
    folder: PathBuf,
    child: Option<Child>,
}

impl Docker {
    /// Starts one, with an image that holds a shell and `sleep`.
    pub fn start(folder: &Path) -> Self {
        std::fs::create_dir_all(folder).expect("a folder");
        let mut docker = Self { folder: folder.to_owned(), child: None };
        docker.start_again();
        docker.import();
        docker
    }

    /// Starts the daemon, also once more.
    pub fn start_again(&mut self) {
        let at = |name: &str| self.folder.join(name);
        let child = Cmd::new("dockerd")
            .arg("-H")
            .arg(format!("unix://{}", at("docker.sock").display()))
            .arg("--data-root")
            .arg(at("data"))
            .arg("--exec-root")
            .arg(at("exec"))
            .arg("-p")
            .arg(at("docker.pid"))
            .args(["--iptables=false", "--bridge=none"])
            .spawn_logged(&at("dockerd.log"));
        self.child = Some(child);
        wait_until("dockerd to answer", Duration::from_secs(60), || self.docker(&["info"]).run().code == Some(0));
    }

    /// The socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.join("docker.sock")
    }

    /// A command line of Docker.
    pub fn docker(&self, args: &[&str]) -> Cmd {
        Cmd::new("docker").arg("-H").arg(format!("unix://{}", self.socket().display())).args(args)
    }

    /// Starts a container without a network.
    pub fn run(&self, name: &str, options: &[&str], argv: &[&str]) {
        let base = self.docker(&["run", "-d", "--name", name, "--network", "none"]);
        base.args(options).arg(IMAGE).args(argv).ok();
    }

    /// Starts one that appends a line to `log` in a folder of the host, time and again, and ends at once and
    /// well when it is told to. A last line says so.
    pub fn run_writer(&self, name: &str, folder: &Path) {
        let script = "trap 'echo end >>/data/log; exit 0' TERM; i=0; \
            while :; do i=$((i+1)); echo \"$i\" >>/data/log; sleep 0.02; done";
        self.run(name, &["-v", &format!("{}:/data", folder.display())], &["/bin/sh", "-c", script]);
        let log = folder.join("log");
        wait_until("the container to write", Duration::from_secs(30), || files::lines(&log).len() > 2);
    }

    /// `running`, `paused`, `exited`, as Docker says.
    pub fn status(&self, name: &str) -> String {
        self.docker(&["inspect", "-f", "{{.State.Status}}", name]).ok().trim().to_owned()
    }

    /// When it was last started: another time means that it was stopped in between.
    pub fn started_at(&self, name: &str) -> String {
        self.docker(&["inspect", "-f", "{{.State.StartedAt}}", name]).ok().trim().to_owned()
    }

    /// The daemon's process.
    ///
    /// # Panics
    /// When it does not run.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.as_ref().expect("a running dockerd").id()).expect("a pid")
    }

    fn import(&self) {
        let tree = self.folder.join("image");
        for program in PROGRAMS {
            let needs = Cmd::new("ldd").arg(program).ok();
            let libraries = needs.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned);
            for path in std::iter::once((*program).to_owned()).chain(libraries) {
                let inside = tree.join(path.trim_start_matches('/'));
                std::fs::create_dir_all(inside.parent().expect("a parent")).expect("a folder");
                std::fs::copy(&path, &inside).unwrap_or_else(|e| panic!("{path}: {e}"));
            }
        }
        let archive = self.folder.join("image.tar");
        Cmd::new("tar").arg("-cf").arg(&archive).arg("-C").arg(&tree).arg(".").ok();
        self.docker(&["import", archive.to_str().expect("UTF-8"), IMAGE]).ok();
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        // A test may have stopped it, and stopped ones do not end.
        processes::send(self.pid(), nix::sys::signal::Signal::SIGCONT);
        let ids = self.docker(&["ps", "-aq"]).run().stdout;
        for id in ids.split_whitespace() {
            let _ = self.docker(&["unpause", id]).run();
            let _ = self.docker(&["rm", "-f", id]).run();
        }
        if let Some(child) = &mut self.child {
            processes::send(i32::try_from(child.id()).expect("a pid"), nix::sys::signal::Signal::SIGTERM);
            let _ = child.wait();
        }
        processes::kill_all_naming(&self.folder);
        // Docker leaves mounts below its data root when it is ended in a hurry.
        let mounts = files::lines(Path::new("/proc/self/mounts"));
        for mount in
            mounts.iter().filter_map(|l| l.split(' ').nth(1)).filter(|m| Path::new(m).starts_with(&self.folder))
        {
            let _ = Cmd::new("umount").args(["-l", mount]).run();
        }
    }
}
