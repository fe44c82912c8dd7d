//! A receiver that serves on loopback, and its REST.
//!
//! Its ports are chosen below the kernel's own range and stay the same over a restart: an agent must
//! find it again, and no outgoing connection of a neighbouring test can take them in between.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::clock::{wait_for, wait_until};
use crate::command::{Cmd, Ended};
use crate::http::{self, Reply};
use crate::{files, processes};

/// How long a start may take on a busy machine.
const START_WITHIN: Duration = Duration::from_secs(30);

/// A running (or killed) receiver. Ends with its handle.
pub struct Receiver {
    folder: PathBuf,
    binary: PathBuf,
    ports: [u16; 3],
    child: Option<Child>,
    key: Option<String>,
}

impl Receiver {
    /// Starts one whose state and settings lie in `folder`, with beats fast enough for tests.
    pub fn start_in(folder: &Path) -> Self {
        Self::start_with(folder, "heartbeat_interval = \"1s\"\nflush_interval = \"2s\"\n")
    }

    /// Starts one with these lines in its section `[session]`; none are the product's defaults.
    pub fn start_with(folder: &Path, session: &str) -> Self {
        let ports = free_ports();
        let mut receiver = Self {
            folder: folder.to_owned(),
            binary: crate::world::bin("hestner-receiver"),
            ports,
            child: None,
            key: None,
        };
        files::write(receiver.config(), receiver.settings(session));
        receiver.start();
        receiver
    }

    /// Its settings file.
    pub fn config(&self) -> PathBuf {
        self.folder.join("receiver.toml")
    }

    /// Its state folder.
    pub fn state(&self) -> PathBuf {
        self.folder.join("state")
    }

    /// Its log.
    pub fn log(&self) -> PathBuf {
        self.folder.join("receiver.log")
    }

    fn settings(&self, session: &str) -> String {
        let [agents, enrolment, rest] = self.ports;
        format!(
            "state_dir = {state:?}\n\
             [listen]\nagents = \"127.0.0.1:{agents}\"\nenrolment = \"127.0.0.1:{enrolment}\"\nrest = \"127.0.0.1:{rest}\"\n\
             [rest]\nplain_http = true\n\
             [enrolment]\nattempts_per_minute = 1000\n\
             [session]\n{session}",
            state = self.state(),
        )
    }

    /// Starts it and waits until it serves.
    pub fn start(&mut self) {
        let addresses = self.state().join("addresses.json");
        let _ = std::fs::remove_file(&addresses);
        let log = self.log();
        self.child = Some(self.command(&["serve"]).spawn_logged(&log));
        wait_until(&format!("the receiver to serve, see {}", log.display()), START_WITHIN, || {
            if let Some(Ok(Some(status))) = self.child.as_mut().map(Child::try_wait) {
                panic!("the receiver ended at once ({status}):\n{}", files::lines(&log).join("\n"));
            }
            addresses.exists() && self.request("GET", "/health", &[], None).is_ok_and(|reply| reply.status == 200)
        });
    }

    /// SIGKILL.
    pub fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM, and waits for a clean end.
    pub fn stop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        processes::send(i32::try_from(child.id()).expect("a pid"), Signal::SIGTERM);
        let status = wait_for("the receiver to stop", Duration::from_secs(20), || child.try_wait().ok().flatten());
        assert!(status.success(), "the receiver stopped with {status}");
    }

    /// A command line of it.
    pub fn command(&self, args: &[&str]) -> Cmd {
        Cmd::new(&self.binary).arg("--config").arg(self.config()).args(args)
    }

    /// Runs a command line of it.
    pub fn cli(&self, args: &[&str]) -> Ended {
        self.command(args).run()
    }

    /// Where agents connect.
    pub fn agents(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.ports[0]))
    }

    /// Where agents enrol.
    pub fn enrolment(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.ports[1]))
    }

    /// Where REST answers.
    pub fn rest(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.ports[2]))
    }

    /// Adds a company with a recovery key; gives its id.
    pub fn add_company(&self, name: &str, recovery_key: &Path) -> i64 {
        let key = recovery_key.to_str().expect("a path in UTF-8");
        let company = self.cli(&["company", "add", name, "--recovery-key", key, "--json"]).json();
        company["id"].as_i64().unwrap_or_else(|| panic!("no company id in {company}"))
    }

    /// Makes a join token.
    pub fn token(&self, company: i64, more: &[&str]) -> String {
        let company = company.to_string();
        let mut args = vec!["token", "create", "--company", &company, "--json"];
        args.extend(more);
        let token = self.cli(&args).json();
        token["token"].as_str().unwrap_or_else(|| panic!("no token in {token}")).to_owned()
    }

    /// Makes an API key for a company, or for all.
    pub fn api_key(&self, company: Option<i64>) -> String {
        let id = company.map(|c| c.to_string());
        let mut args = vec!["apikey", "create", "--label", "test", "--json"];
        match &id {
            Some(id) => args.extend(["--company", id]),
            None => args.push("--all-companies"),
        }
        let key = self.cli(&args).json();
        key["key"].as_str().unwrap_or_else(|| panic!("no key in {key}")).to_owned()
    }

    /// The key that REST calls carry from now on.
    pub fn use_key(&mut self, key: String) {
        self.key = Some(key);
    }

    /// One REST request with that key.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&str>,
    ) -> std::io::Result<Reply> {
        let bearer = self.key.as_ref().map(|key| format!("Bearer {key}"));
        let mut all: Vec<(&str, &str)> = headers.to_vec();
        if let Some(bearer) = &bearer
            && !headers.iter().any(|(name, _)| *name == "authorization")
        {
            all.push(("authorization", bearer));
        }
        if body.is_some() {
            all.push(("content-type", "application/json"));
        }
        http::request(self.rest(), method, path, &all, body)
    }

    /// GET, whatever the answer.
    pub fn get(&self, path: &str) -> Reply {
        self.request("GET", path, &[], None).unwrap_or_else(|e| panic!("GET {path}: {e}"))
    }

    /// GET of something that must be there.
    pub fn get_json(&self, path: &str) -> Value {
        let reply = self.get(path);
        assert_eq!(reply.status, 200, "GET {path}: {reply:?}");
        reply.json()
    }

    /// POST of a JSON body.
    pub fn post(&self, path: &str, body: &Value) -> Reply {
        self.request("POST", path, &[], Some(&body.to_string())).unwrap_or_else(|e| panic!("POST {path}: {e}"))
    }

    /// PUT of a JSON body.
    pub fn put(&self, path: &str, body: &Value) -> Reply {
        self.request("PUT", path, &[], Some(&body.to_string())).unwrap_or_else(|e| panic!("PUT {path}: {e}"))
    }

    /// Runs of a server, newest first, as REST shows them.
    pub fn runs(&self, server: i64) -> Vec<Value> {
        rows(&self.get_json(&format!("/v1/servers/{server}/snapshots?limit=200")))
    }

    /// The run with that uid.
    ///
    /// # Panics
    /// When there is more than one.
    pub fn run(&self, server: i64, run_uid: &str) -> Option<Value> {
        let mut found: Vec<Value> = self.runs(server).into_iter().filter(|run| run["run_uid"] == run_uid).collect();
        assert!(found.len() <= 1, "run {run_uid} is there {} times: {found:?}", found.len());
        found.pop()
    }

    /// Waits until the run with that uid has ended at the receiver as well.
    pub fn wait_run_ended(&self, server: i64, run_uid: &str) -> Value {
        wait_for(&format!("run {run_uid} to have ended at the receiver"), Duration::from_secs(60), || {
            self.run(server, run_uid).filter(|run| run["status"] == "success" || run["status"] == "failed")
        })
    }

    /// Waits until the run with that row id has ended.
    pub fn wait_row_ended(&self, server: i64, id: i64) -> Value {
        wait_for(&format!("run row {id} to have ended"), Duration::from_secs(90), || {
            let run = self.get_json(&format!("/v1/servers/{server}/snapshots/{id}"));
            (run["status"] == "success" || run["status"] == "failed").then_some(run)
        })
    }

    /// Ledger rows of this month, straight from the store: `(run_uid, amount)`.
    pub fn ledger(&self, server: i64) -> Vec<(String, String)> {
        let path = self.state().join("receiver.db");
        let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY;
        let db =
            rusqlite::Connection::open_with_flags(&path, flags).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        db.busy_timeout(Duration::from_secs(10)).expect("a busy timeout");
        let mut query =
            db.prepare("SELECT run_uid, amount FROM cost_ledger WHERE server_id = ?1 ORDER BY rowid").expect("a query");
        let rows = query.query_map([server], |row| Ok((row.get(0)?, row.get(1)?))).expect("rows");
        rows.map(|row| row.expect("a row")).collect()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.kill9();
    }
}

/// The rows of a list that REST gave, bare or inside an object.
pub fn rows(list: &Value) -> Vec<Value> {
    let inside = || list.as_object().and_then(|o| o.values().find_map(Value::as_array));
    list.as_array().or_else(inside).unwrap_or_else(|| panic!("no list in {list}")).clone()
}

/// Three free ports below the kernel's range for outgoing connections, apart for processes side by side.
fn free_ports() -> [u16; 3] {
    use std::sync::atomic::{AtomicU32, Ordering};
    static CALLS: AtomicU32 = AtomicU32::new(0);
    loop {
        let slot = (std::process::id() + CALLS.fetch_add(1, Ordering::Relaxed) * 1999) % 4000;
        let base = 20_000 + u16::try_from(slot).expect("below 4000") * 3;
        let ports = [base, base + 1, base + 2];
        if ports.iter().all(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()) {
            return ports;
        }
    }
}
