//! Containers of a real Docker show up as services.

use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use hestner_tests::{Cmd, World, files, is_root_or_skips, processes, receiver, wait_for, wait_until};

/// A Docker daemon on a socket and folders of its own.
struct Docker {
    folder: PathBuf,
    child: Child,
}

impl Docker {
    fn start(folder: &Path) -> Self {
        std::fs::create_dir_all(folder).expect("a folder");
        let at = |name: &str| folder.join(name);
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
        let docker = Self { folder: folder.to_owned(), child };
        wait_until("dockerd to answer", Duration::from_secs(60), || docker.docker(&["info"]).run().code == Some(0));
        docker
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("docker.sock")
    }

    fn docker(&self, args: &[&str]) -> Cmd {
        Cmd::new("docker").arg("-H").arg(format!("unix://{}", self.socket().display())).args(args)
    }

    /// An image with nothing but `sleep` and its libraries: no registry is reached.
    fn import_sleep(&self) {
        let tree = self.folder.join("image");
        let needs = Cmd::new("ldd").arg("/bin/sleep").ok();
        let libraries = needs.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned);
        for path in std::iter::once("/bin/sleep".to_owned()).chain(libraries) {
            let inside = tree.join(path.trim_start_matches('/'));
            std::fs::create_dir_all(inside.parent().expect("a parent")).expect("a folder");
            std::fs::copy(&path, &inside).unwrap_or_else(|e| panic!("{path}: {e}"));
        }
        let archive = self.folder.join("image.tar");
        Cmd::new("tar").arg("-cf").arg(&archive).arg("-C").arg(&tree).arg(".").ok();
        self.docker(&["import", archive.to_str().expect("UTF-8"), "hestner-sleep"]).ok();
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let _ = self.docker(&["rm", "-f", "hestner-box"]).run();
        processes::send(i32::try_from(self.child.id()).expect("a pid"), nix::sys::signal::Signal::SIGTERM);
        let _ = self.child.wait();
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

#[test]
fn container_shows_up_as_a_service_with_its_health() {
    if !is_root_or_skips("container_shows_up_as_a_service_with_its_health") {
        return;
    }
    let world = World::new("inventory-docker");
    let docker = Docker::start(&world.at("docker"));
    docker.import_sleep();
    docker
        .docker(&["run", "-d", "--name", "hestner-box", "--network", "none", "hestner-sleep", "/bin/sleep", "5000"])
        .ok();
    let agent = world
        .agent()
        .setting("inventory", &format!("docker_socket = {:?}", docker.socket()))
        .setting("inventory", "interval = \"2s\"")
        .setting("inventory", "systemd = false")
        .started();
    let path = format!("/v1/servers/{}/services", agent.server_id);
    let container = || {
        let rows = receiver::rows(&world.receiver.get_json(&path));
        rows.into_iter()
            .find(|s| s["runtime"] == "docker" && s["name"].as_str().is_some_and(|n| n.contains("hestner-box")))
    };
    let service = wait_for("the container in the inventory", Duration::from_secs(30), container);
    assert_eq!(service["health"], "ok", "{service}");

    docker.docker(&["stop", "-t", "0", "hestner-box"]).ok();
    wait_until("the stopped container in the inventory", Duration::from_secs(30), || {
        container().is_some_and(|service| service["health"] == "stopped")
    });
}
