//! What to leave out: patterns as `restic backup --exclude` takes them.
//!
//! A pattern that begins with `/` matches from the root; another matches any run of components. `*`, `?` and
//! `[...]` match within a component, `**` any number of components. What lies below a match is left out as well.
//! A pattern that begins with `!` takes back what an earlier one left out.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// A list of patterns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Patterns(Vec<Pattern>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Pattern {
    takes_back: bool,
    rooted: bool,
    parts: Vec<Vec<u8>>,
}

impl Patterns {
    /// From their texts. Empty ones match nothing.
    pub fn new<'t>(texts: impl IntoIterator<Item = &'t String>) -> Self {
        let pattern = |text: &'t String| {
            let (takes_back, text) = match text.strip_prefix('!') {
                Some(rest) => (true, rest),
                None => (false, text.as_str()),
            };
            let parts = text.split('/').filter(|part| !part.is_empty() && *part != ".");
            let parts: Vec<_> = parts.map(|part| part.as_bytes().to_vec()).collect();
            (!parts.is_empty()).then_some(Pattern { takes_back, rooted: text.starts_with('/'), parts })
        };
        Self(texts.into_iter().filter_map(pattern).collect())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether an absolute path is left out.
    pub fn leave_out(&self, path: &Path) -> bool {
        if self.0.is_empty() {
            return false;
        }
        let parts: Vec<&[u8]> = path.iter().filter(|part| *part != OsStr::new("/")).map(OsStr::as_bytes).collect();
        self.0.iter().rev().find(|pattern| pattern.matches(&parts)).is_some_and(|pattern| !pattern.takes_back)
    }
}

impl Pattern {
    fn matches(&self, path: &[&[u8]]) -> bool {
        let starts = if self.rooted { 0..1 } else { 0..path.len().max(1) };
        starts.into_iter().any(|start| begins(&self.parts, path.get(start..).unwrap_or_default()))
    }
}

/// Whether the path begins with what the pattern's parts say.
fn begins(pattern: &[Vec<u8>], path: &[&[u8]]) -> bool {
    match pattern.split_first() {
        None => true,
        Some((part, rest)) if part == b"**" => (0..=path.len()).any(|skipped| begins(rest, &path[skipped..])),
        Some((part, rest)) => match path.split_first() {
            Some((name, below)) => glob(part, name) && begins(rest, below),
            None => false,
        },
    }
}

/// Go's `filepath.Match` within a component. A pattern that is malformed matches nothing.
fn glob(pattern: &[u8], name: &[u8]) -> bool {
    // Where to go on after the last star: the pattern behind it, and the name it has swallowed so far.
    let mut retry: Option<(&[u8], &[u8])> = None;
    let (mut pattern, mut name) = (pattern, name);
    loop {
        if let Some(rest) = pattern.strip_prefix(b"*") {
            retry = Some((rest, name));
            pattern = rest;
            continue;
        }
        if pattern.is_empty() && name.is_empty() {
            return true;
        }
        if let Some((after_pattern, after_name)) = one(pattern, name) {
            (pattern, name) = (after_pattern, after_name);
            continue;
        }
        let Some((behind, swallowed)) = retry else { return false };
        let Some((_, rest)) = swallowed.split_first() else { return false };
        retry = Some((behind, rest));
        (pattern, name) = (behind, rest);
    }
}

/// Matches one character of a name; returns what is left of both.
fn one<'p, 'n>(pattern: &'p [u8], name: &'n [u8]) -> Option<(&'p [u8], &'n [u8])> {
    let (c, after_name) = character(name)?;
    let (&first, rest) = pattern.split_first()?;
    match first {
        b'?' => Some((rest, after_name)),
        b'[' => class(rest, c).map(|after| (after, after_name)),
        b'\\' => {
            let (literal, after) = character(rest)?;
            (literal == c).then_some((after, after_name))
        }
        _ => {
            let (literal, after) = character(pattern)?;
            (literal == c).then_some((after, after_name))
        }
    }
}

/// A class after its `[`: what follows it if the character is in it.
fn class(pattern: &[u8], c: u32) -> Option<&[u8]> {
    let (negated, mut rest) = match pattern.strip_prefix(b"^") {
        Some(rest) => (true, rest),
        None => (false, pattern),
    };
    let mut found = false;
    let mut ranges = 0;
    loop {
        if let (Some(after), true) = (rest.strip_prefix(b"]"), ranges > 0) {
            return (found != negated).then_some(after);
        }
        let (low, after) = class_character(rest)?;
        rest = after;
        let mut high = low;
        if let Some(after) = rest.strip_prefix(b"-") {
            (high, rest) = class_character(after)?;
        }
        found |= (low..=high).contains(&c);
        ranges += 1;
    }
}

fn class_character(text: &[u8]) -> Option<(u32, &[u8])> {
    match text.strip_prefix(b"\\") {
        Some(rest) => character(rest),
        None => character(text),
    }
}

/// The first character: UTF-8, or a byte that is none.
fn character(text: &[u8]) -> Option<(u32, &[u8])> {
    let length = match text.first()? {
        0xc2..=0xdf => 2,
        0xe0..=0xef => 3,
        0xf0..=0xf4 => 4,
        _ => 1,
    };
    let parsed = text.get(..length).and_then(|bytes| std::str::from_utf8(bytes).ok()).and_then(|s| s.chars().next());
    match parsed {
        Some(c) => Some((c as u32, text.get(length..)?)),
        None => Some((0x11_0000 + u32::from(*text.first()?), text.get(1..)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaves_out(patterns: &[&str], path: &str) -> bool {
        let texts: Vec<String> = patterns.iter().map(ToString::to_string).collect();
        Patterns::new(&texts).leave_out(Path::new(path))
    }

    #[test]
    fn patterns_match_as_restics_do() {
        let cases = [
            ("*.o", "/srv/a/b.o", true),
            ("*.o", "/srv/a/b.oo", false),
            ("/srv/a", "/srv/a", true),
            ("/srv/a", "/srv/a/b", true),
            ("/srv/a", "/srv/ab", false),
            ("/a", "/srv/a", false),
            ("a/b", "/srv/a/b/c", true),
            ("a/c", "/srv/a/b/c", false),
            ("/srv/**/c", "/srv/a/b/c", true),
            ("/srv/**/c", "/srv/c", true),
            ("/srv/*/c", "/srv/a/b/c", false),
            ("a?c", "/a\u{e4}c", true),
            ("[a-c]x", "/bx", true),
            ("[^a-c]x", "/bx", false),
            ("[a", "/a", false),
            ("a\\*", "/a*", true),
            ("a\\*", "/ab", false),
            ("*a*b*", "/xxaxxbxx", true),
            ("", "/a", false),
            ("/", "/a", false),
        ];
        for (pattern, path, expected) in cases {
            assert_eq!(leaves_out(&[pattern], path), expected, "{pattern} on {path}");
        }
        assert!(!leaves_out(&["*.o", "!keep.o"], "/keep.o"));
        assert!(leaves_out(&["!keep.o", "*.o"], "/keep.o"));
    }
}
