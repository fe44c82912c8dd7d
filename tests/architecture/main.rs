//! Keeps the floors: every top-level module of `agent` and `receiver` stands on one floor and imports
//! only from lower ones. The tables below are the law; `ARCHITECTURE.md` explains it.
//!
//! The imports are read from the source text: every `crate::<module>` outside comments counts, whether
//! it stands in a `use` or in a path. A violation is named with file, line and rule.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// One floor: its height is its place in the list.
struct Floor {
    modules: &'static [&'static str],
    /// Crates that this floor must not name.
    never: &'static [&'static str],
}

const fn floor(modules: &'static [&'static str], never: &'static [&'static str]) -> Floor {
    Floor { modules, never }
}

/// Crates that speak to the centre.
const NETWORK: &[&str] = &["tonic", "hyper_util", "tokio_rustls"];
/// Crates of the doors.
const DOORS: &[&str] = &["axum", "tonic", "http"];

const AGENT: &[Floor] = &[
    floor(&["platform", "lifecycle"], &["tonic", "rusqlite", "hestner_proto"]),
    floor(&["escrow", "format", "guard", "hook", "policy", "status", "storage", "store", "tls"], &["tonic"]),
    floor(&["identity", "report", "gate", "source", "repository", "freeze"], &["rusqlite"]),
    floor(&["scheduler", "run", "inventory", "heartbeat"], NETWORK),
    floor(&["enrolment", "session", "control"], &["rusqlite"]),
    floor(&["daemon", "doctor"], &["rusqlite"]),
    floor(&["cli", "main"], &["rusqlite"]),
];

const RECEIVER: &[Floor] = &[
    floor(&["platform", "lifecycle"], &["sqlx", "axum", "tonic", "hestner_proto"]),
    floor(&["model"], &["sqlx", "axum", "tonic", "tokio"]),
    floor(&["store", "ca", "sessions"], DOORS),
    floor(&["auth"], DOORS),
    floor(&["enrolment", "ingest", "fleet", "costs"], DOORS),
    floor(&["agent_api", "rest", "metrics"], &["sqlx", "rcgen"]),
    floor(&["server"], &["sqlx", "rcgen"]),
    floor(&["cli", "main"], &["sqlx", "rcgen"]),
];

/// A door calls work, never data: module, and what it must not import although it stands lower.
const NEVER_IMPORTS: &[(&str, &str, &[&str])] = &[
    ("receiver", "agent_api", &["store", "ca"]),
    ("receiver", "rest", &["store", "ca"]),
    ("receiver", "metrics", &["store", "ca"]),
    ("agent", "session", &["source", "repository", "freeze", "run"]),
    ("agent", "control", &["source", "repository", "freeze", "run"]),
];

struct Source {
    path: PathBuf,
    /// The top-level module it belongs to.
    module: String,
    text: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace's root").to_owned()
}

fn sources(krate: &str) -> Vec<Source> {
    let base = root().join(krate).join("src");
    let mut found = Vec::new();
    let mut folders = vec![base.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a readable folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let relative = path.strip_prefix(&base).expect("below the base");
                let first = relative.components().next().expect("a component").as_os_str().to_string_lossy();
                let module = first.trim_end_matches(".rs").to_owned();
                let text = fs::read_to_string(&path).expect("UTF-8");
                found.push(Source { path, module, text });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

/// Lines with comments taken out, numbered from 1.
fn code_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(i, line)| (i + 1, line.split("//").next().unwrap_or_default()))
}

fn names_crate(line: &str, krate: &str) -> bool {
    line.match_indices(krate).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = &line[at + krate.len()..];
        !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') && after.starts_with("::")
    })
}

/// Modules named as `crate::<module>` or `crate::{<module>, ...}`, with their line.
fn imports(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (number, line) in code_lines(text) {
        for (at, _) in line.match_indices("crate::") {
            let rest = &line[at + "crate::".len()..];
            let names: Vec<&str> = match rest.strip_prefix('{') {
                Some(group) => group.split(['{', '}', ',']).map(str::trim).collect(),
                None => vec![rest],
            };
            for name in names {
                let name: String = name.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                if !name.is_empty() {
                    found.push((number, name));
                }
            }
        }
    }
    found
}

fn check(krate: &str, floors: &[Floor]) -> String {
    let height = |module: &str| floors.iter().position(|f| f.modules.contains(&module));
    let mut report = String::new();
    for Source { path, module, text } in sources(krate) {
        let shown = path.strip_prefix(root()).expect("below the root").display();
        if !text.starts_with("//!") {
            let _ = writeln!(report, "{shown}:1: a module opens with `//!`: what it is for and what it never does");
        }
        if module == "lib" {
            continue;
        }
        let Some(own) = height(&module) else {
            let _ = writeln!(report, "{shown}:1: module `{module}` stands on no floor; add it to the table");
            continue;
        };
        for (number, import) in imports(&text) {
            if import == module || height(&import).is_none() {
                continue;
            }
            let other = height(&import).expect("checked");
            if other >= own {
                let _ = writeln!(
                    report,
                    "{shown}:{number}: `{module}` (floor {own}) imports `{import}` (floor {other}); imports go down only"
                );
            }
            let forbidden = NEVER_IMPORTS
                .iter()
                .any(|(k, m, never)| *k == krate && *m == module && never.contains(&import.as_str()));
            if forbidden {
                let _ = writeln!(report, "{shown}:{number}: `{module}` must never import `{import}`");
            }
        }
        for never in floors[own].never {
            for (number, line) in code_lines(&text) {
                if names_crate(line, never) {
                    let _ = writeln!(
                        report,
                        "{shown}:{number}: floor {own} (`{module}`) must not name the crate `{never}`"
                    );
                }
            }
        }
        let other = if krate == "agent" { "hestner_receiver" } else { "hestner_agent" };
        for (number, line) in code_lines(&text) {
            if names_crate(line, other) {
                let _ = writeln!(report, "{shown}:{number}: agent and receiver never import each other");
            }
        }
    }
    report
}

#[test]
fn agent_imports_go_down_only() {
    let report = check("agent", AGENT);
    assert!(report.is_empty(), "\n{report}");
}

#[test]
fn receiver_imports_go_down_only() {
    let report = check("receiver", RECEIVER);
    assert!(report.is_empty(), "\n{report}");
}

#[test]
fn proto_imports_nothing_of_ours() {
    for Source { path, text, .. } in sources("proto") {
        for (number, line) in code_lines(&text) {
            for ours in ["hestner_agent", "hestner_receiver"] {
                assert!(!names_crate(line, ours), "{}:{number}: proto imports nothing of ours", path.display());
            }
        }
    }
}

#[test]
fn packaging_takes_only_the_command_lines_from_the_programs() {
    const ALLOWED: &[&str] =
        &["hestner_agent::cli::command", "hestner_agent::platform::", "hestner_receiver::cli::command"];
    for Source { path, text, .. } in sources("packaging") {
        for (number, line) in code_lines(&text) {
            let allowed = ALLOWED.iter().map(|name| line.matches(name).count()).sum::<usize>();
            let named = line.matches("hestner_agent::").count() + line.matches("hestner_receiver::").count();
            assert_eq!(allowed, named, "{}:{number}: packaging uses {ALLOWED:?} only", path.display());
        }
    }
}

#[test]
fn every_module_is_named_once_in_the_code_map() {
    let map = fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    let mut missing = String::new();
    for (krate, floors) in [("agent", AGENT), ("receiver", RECEIVER)] {
        for module in floors.iter().flat_map(|f| f.modules) {
            let entry = format!("| `{krate}::{module}` |");
            if map.matches(&entry).count() != 1 {
                let _ = writeln!(missing, "ARCHITECTURE.md must have exactly one line that begins `{entry}`");
            }
        }
    }
    assert!(missing.is_empty(), "\n{missing}");
}

#[test]
fn only_the_named_modules_hold_unsafe_code() {
    const ALLOWED: &[&str] = &["agent/src/platform/fsfreeze.rs", "agent/src/platform/process.rs"];
    for krate in ["agent", "receiver", "proto"] {
        for Source { path, text, .. } in sources(krate) {
            let shown = path.strip_prefix(root()).expect("below the root").display().to_string();
            let holds = code_lines(&text).any(|(_, line)| line.contains("unsafe {") || line.contains("unsafe fn"));
            assert!(!holds || ALLOWED.contains(&shown.as_str()), "{shown} holds unsafe code");
        }
    }
}

mod the_scanner {
    use super::{imports, names_crate};

    #[test]
    fn sees_paths_groups_and_nothing_in_comments() {
        let text = "use crate::{store, tls::Chain};\nlet x = crate::run::plan(); // crate::control\n";
        let names: Vec<String> = imports(text).into_iter().map(|(_, name)| name).collect();
        assert_eq!(names, ["store", "tls", "run"]);
    }

    #[test]
    fn tells_a_crate_from_a_longer_name() {
        assert!(names_crate("use axum::Router;", "axum"));
        assert!(!names_crate("use my_axum::Router;", "axum"));
        assert!(!names_crate("let axum = 1;", "axum"));
    }
}
