//! The tail of what hooks and the archiver said, bounded, printable and with secrets masked.
//!
//! Hooks belong to strangers: their output may hold control characters and, by mistake, passwords. What
//! looks like one is masked before it is stored anywhere; a mask too many is better than one too few.

use std::collections::VecDeque;

use crate::platform::command::printable;
use crate::report::LOG_TAIL_BYTES_MAX;

/// Words that a secret stands behind.
const KEYS: &[&str] = &["password", "passwd", "pwd", "secret", "token", "api_key", "apikey", "authorization", "bearer"];

/// The last lines of a run.
#[derive(Debug, Default)]
pub(super) struct Tail {
    lines: VecDeque<String>,
    bytes: usize,
}

impl Tail {
    /// Adds output under a name.
    pub(super) fn add(&mut self, who: &str, output: &[u8]) {
        for line in output.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
            let line = format!("{who}: {}", mask(&printable(line)));
            self.bytes += line.len() + 1;
            self.lines.push_back(line);
            while self.bytes > LOG_TAIL_BYTES_MAX {
                let Some(gone) = self.lines.pop_front() else { break };
                self.bytes -= gone.len() + 1;
            }
        }
    }

    /// All of it.
    pub(super) fn text(&self) -> String {
        self.lines.iter().cloned().collect::<Vec<_>>().join("\n")
    }
}

/// Masks what stands behind a word for a secret, and the password in a URL.
pub(super) fn mask(line: &str) -> String {
    mask_urls(&mask_keys(line))
}

fn mask_keys(line: &str) -> String {
    let lower = line.to_ascii_lowercase();
    let mut out = String::with_capacity(line.len());
    let mut at = 0;
    while at < line.len() {
        let key = KEYS.iter().find(|key| lower[at..].starts_with(**key));
        // A flag such as `--password x` has only a space before its value.
        let loose = key == Some(&"bearer") || line[..at].ends_with("--");
        let behind =
            |key: &&str| value_behind(&line[at + key.len()..], loose).map(|(skip, len)| (key.len() + skip, len));
        // `/keys/x.password: No such file` names a file; what follows is no secret.
        let names_file = is_path(&line[..at]) && key.is_some_and(|key| line[at + key.len()..].starts_with(": "));
        let Some(value) = key.filter(|_| !names_file).and_then(behind) else {
            let step = line[at..].chars().next().map_or(1, char::len_utf8);
            out.push_str(&line[at..at + step]);
            at += step;
            continue;
        };
        out.push_str(&line[at..at + value.0]);
        out.push_str("***");
        at += value.0 + value.1;
    }
    out
}

/// Whether a line ends within the path of a file.
fn is_path(before: &str) -> bool {
    before.rsplit(' ').next().is_some_and(|word| word.contains('/'))
}

/// Where a value begins behind its key, and how long it is. `loose`: a space is enough between the two.
fn value_behind(rest: &str, loose: bool) -> Option<(usize, usize)> {
    let trimmed = rest.trim_start_matches(['"', '\'']);
    let after = trimmed.trim_start_matches([' ', ':', '=']);
    let value = after.trim_start_matches(['"', '\'']);
    let between = &trimmed[..trimmed.len() - after.len()];
    let separated = between.contains([':', '=']) || (loose && !between.is_empty());
    if !separated || value.is_empty() {
        return None;
    }
    // "Authorization: Basic abc" and "Bearer abc": the scheme is not the secret, what follows is.
    let lower = value.to_ascii_lowercase();
    let scheme = ["basic ", "bearer "].iter().find(|s| lower.starts_with(**s)).map_or(0, |s| s.len());
    let len = value[scheme..].find([' ', '"', '\'', ',', ';', '&']).unwrap_or(value.len() - scheme);
    (len > 0).then_some((rest.len() - value.len() + scheme, len))
}

fn mask_urls(line: &str) -> String {
    let mut out = String::new();
    let mut rest = line;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + 3);
        out.push_str(before);
        rest = after;
        let end = after.find(['/', ' ', '"']).unwrap_or(after.len());
        if let Some((user, _)) = after[..end].rsplit_once('@').and_then(|(credentials, _)| credentials.split_once(':'))
        {
            out.push_str(user);
            out.push_str(":***");
            rest = &after[after[..end].rfind('@').unwrap_or(0)..];
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_masked_wherever_they_stand() {
        for (line, expected) in [
            ("PGPASSWORD=hunter2 pg_dump", "PGPASSWORD=*** pg_dump"),
            ("using password: 'hunter2', ok", "using password: '***', ok"),
            ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
            ("{\"token\": \"t0k\"}", "{\"token\": \"***\"}"),
            ("dial postgres://app:hunter2@db/x", "dial postgres://app:***@db/x"),
            ("the password in /k does not open it", "the password in /k does not open it"),
            ("dump --password hunter2 db", "dump --password *** db"),
            ("open /k/x.password: No such file", "open /k/x.password: No such file"),
            ("GET https://x/y?token=abc", "GET https://x/y?token=***"),
            ("nothing to hide: ümlaut", "nothing to hide: ümlaut"),
        ] {
            assert_eq!(mask(line), expected);
        }
    }

    #[test]
    fn tail_keeps_the_last_lines_within_its_bound() {
        let mut tail = Tail::default();
        for i in 0..10_000 {
            tail.add("hook", format!("line {i}").as_bytes());
        }
        assert!(tail.text().len() <= LOG_TAIL_BYTES_MAX);
        assert!(tail.text().ends_with("hook: line 9999"));
    }
}
