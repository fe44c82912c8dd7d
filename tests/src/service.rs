//! The parts of `agent.toml` that tests vary: services, their sources and their hooks.
//!
//! In: a story (`Service::files("docs", [..]).hook(..)`). Out: TOML text.

use std::fmt::Write as _;
use std::path::Path;

/// One `[[service]]`.
#[derive(Clone, Debug)]
pub struct Service {
    /// Its name.
    pub name: String,
    head: String,
    source: String,
    point: String,
    worker: String,
    hooks: Vec<Hook>,
}

impl Service {
    /// A tree of files.
    pub fn files<P: AsRef<Path>>(name: &str, paths: impl IntoIterator<Item = P>) -> Self {
        let paths: Vec<String> = paths.into_iter().map(|p| quoted(&p.as_ref().to_string_lossy())).collect();
        Self::new(name, format!("kind = \"files\"\npaths = [{}]\n", paths.join(", ")))
    }

    /// The output of a program.
    pub fn command(name: &str, argv: &[&str], file_name: &str) -> Self {
        let source = format!("kind = \"command\"\nargv = {}\nfile_name = {}\n", list(argv), quoted(file_name));
        Self::new(name, source)
    }

    fn new(name: &str, source: String) -> Self {
        let (head, point, worker) = (String::new(), String::new(), String::new());
        Self { name: name.to_owned(), head, source, point, worker, hooks: Vec::new() }
    }

    /// Stores it elsewhere than in the default destination.
    #[must_use]
    pub fn destination(mut self, name: &str) -> Self {
        let _ = writeln!(self.head, "destination = {}", quoted(name));
        self
    }

    /// The least consistency that a run must reach.
    #[must_use]
    pub fn consistency(mut self, least: &str) -> Self {
        let _ = writeln!(self.head, "consistency = {}", quoted(least));
        self
    }

    /// Adds a line to its source.
    #[must_use]
    pub fn source_line(mut self, line: &str) -> Self {
        let _ = writeln!(self.source, "{line}");
        self
    }

    /// Adds a line to its point, such as `kind = "fsfreeze"`.
    #[must_use]
    pub fn point_line(mut self, line: &str) -> Self {
        let _ = writeln!(self.point, "{line}");
        self
    }

    /// Adds a program to its point.
    #[must_use]
    pub fn point_program(self, key: &str, argv: &[&str]) -> Self {
        self.point_line(&format!("{key} = {}", list(argv)))
    }

    /// Adds a line to what its backups may cost, such as `nice = 19`.
    #[must_use]
    pub fn worker_line(mut self, line: &str) -> Self {
        let _ = writeln!(self.worker, "{line}");
        self
    }

    /// Adds a hook; pre hooks run in this order, post hooks in reverse.
    #[must_use]
    pub fn hook(mut self, hook: Hook) -> Self {
        self.hooks.push(hook);
        self
    }

    /// Its text in `agent.toml`; `destination` is the one used when none was named.
    pub fn toml(&self, destination: &str) -> String {
        let mut text = format!("[[service]]\nname = {}\n{}", quoted(&self.name), self.head);
        if !self.head.contains("destination = ") {
            let _ = writeln!(text, "destination = {}", quoted(destination));
        }
        let _ = write!(text, "[service.source]\n{}", self.source);
        if !self.point.is_empty() {
            let _ = write!(text, "[service.point]\n{}", self.point);
        }
        if !self.worker.is_empty() {
            let _ = write!(text, "[service.worker]\n{}", self.worker);
        }
        for hook in &self.hooks {
            text.push_str(&hook.toml());
        }
        text.push('\n');
        text
    }
}

/// One `[[service.hook]]`.
#[derive(Clone, Debug)]
pub struct Hook {
    lines: String,
}

impl Hook {
    /// A hook that does nothing yet.
    pub fn new(name: &str) -> Self {
        Self { lines: format!("name = {}\n", quoted(name)) }
    }

    /// What prepares the service.
    #[must_use]
    pub fn pre(self, argv: &[&str]) -> Self {
        self.line("pre_freeze", &list(argv))
    }

    /// What releases the service.
    #[must_use]
    pub fn post(self, argv: &[&str]) -> Self {
        self.line("post_thaw", &list(argv))
    }

    /// What runs when the point could not be taken.
    #[must_use]
    pub fn failed(self, argv: &[&str]) -> Self {
        self.line("freeze_failed", &list(argv))
    }

    /// How long each of its programs may take, such as `5s`.
    #[must_use]
    pub fn timeout(self, time: &str) -> Self {
        self.line("timeout", &quoted(time))
    }

    fn line(mut self, key: &str, value: &str) -> Self {
        let _ = writeln!(self.lines, "{key} = {value}");
        self
    }

    fn toml(&self) -> String {
        format!("[[service.hook]]\n{}", self.lines)
    }
}

/// A TOML string.
pub fn quoted(text: &str) -> String {
    serde_json::to_string(text).expect("a string")
}

fn list(words: &[&str]) -> String {
    let words: Vec<String> = words.iter().map(|w| quoted(w)).collect();
    format!("[{}]", words.join(", "))
}
