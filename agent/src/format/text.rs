//! Two ways of Go's to write things as text: times as RFC 3339, and names as quoted strings.

use std::fmt;
use std::io::Write as _;

use serde::de::{Deserialize, Deserializer, Visitor};
use serde::ser::{Serialize, Serializer};

use super::FormatError;

/// The years that Go writes as JSON.
const SECONDS_MIN: i64 = -62_167_219_200;
const SECONDS_MAX: i64 = 253_402_300_799;

/// A moment: seconds since the epoch, and nanoseconds of the second after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Timestamp {
    /// Since 1970, negative before.
    pub seconds: i64,
    /// Below 1,000,000,000.
    pub nanos: u32,
}

impl Timestamp {
    /// Appends it as RFC 3339 in UTC. Years that do not have four digits are written as the nearest that have,
    /// as restic does.
    pub fn write(self, out: &mut Vec<u8>) {
        let seconds = self.seconds.clamp(SECONDS_MIN, SECONDS_MAX);
        let (year, month, day) = civil(seconds.div_euclid(86_400));
        let of_day = seconds.rem_euclid(86_400);
        for (number, digits, after) in
            [(year, 4, b'-'), (month, 2, b'-'), (day, 2, b'T'), (of_day / 3600, 2, b':'), (of_day / 60 % 60, 2, b':')]
        {
            push_number(out, number, digits);
            out.push(after);
        }
        push_number(out, of_day % 60, 2);
        if self.nanos > 0 {
            out.push(b'.');
            push_number(out, self.nanos.into(), 9);
            while out.last() == Some(&b'0') {
                out.pop();
            }
        }
        out.push(b'Z');
    }

    /// From RFC 3339 with any offset.
    ///
    /// # Errors
    /// When it is none.
    pub fn parse(text: &str) -> Result<Self, FormatError> {
        parse_time(text.as_bytes())
            .ok_or_else(|| FormatError::damaged("time", format!("{:?}", text.chars().take(40).collect::<String>())))
    }
}

fn push_number(out: &mut Vec<u8>, number: i64, digits: u32) {
    for place in (0..digits).rev() {
        let digit = u8::try_from(number / 10_i64.pow(place) % 10).unwrap_or(0);
        out.push(b'0' + digit);
    }
}

/// Year, month and day of a day since the epoch. After Howard Hinnant's `civil_from_days`.
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let of_era = days.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

/// The inverse of [`civil`].
fn days_of(year: i64, month: i64, day: i64) -> i64 {
    let year = year - i64::from(month <= 2);
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + of_year;
    era * 146_097 + of_era - 719_468
}

fn parse_time(text: &[u8]) -> Option<Timestamp> {
    let number = |from: usize, to: usize| -> Option<i64> {
        let digits = text.get(from..to)?;
        digits.iter().try_fold(0_i64, |sum, digit| digit.is_ascii_digit().then(|| sum * 10 + i64::from(digit - b'0')))
    };
    let signs = [(4, b'-'), (7, b'-'), (10, b'T'), (13, b':'), (16, b':')];
    if signs.iter().any(|&(at, sign)| text.get(at) != Some(&sign)) {
        return None;
    }
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let mut at = 19;
    let mut nanos = 0_u32;
    if text.get(at) == Some(&b'.') {
        let digits = text.get(20..)?.iter().take_while(|digit| digit.is_ascii_digit()).count();
        if digits == 0 || digits > 9 {
            return None;
        }
        let missing = u32::try_from(9 - digits).ok()?;
        nanos = u32::try_from(number(20, 20 + digits)? * 10_i64.pow(missing)).ok()?;
        at = 20 + digits;
    }
    let offset = match (text.get(at)?, text.len() - at) {
        (b'Z', 1) => 0,
        (sign @ (b'+' | b'-'), 6) if text.get(at + 3) == Some(&b':') => {
            let seconds = number(at + 1, at + 3)? * 3600 + number(at + 4, at + 6)? * 60;
            if *sign == b'+' { seconds } else { -seconds }
        }
        _ => return None,
    };
    let seconds = days_of(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second - offset;
    Some(Timestamp { seconds, nanos })
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = Vec::with_capacity(32);
        self.write(&mut text);
        f.write_str(&String::from_utf8_lossy(&text))
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Timestamp;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a time as RFC 3339")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Timestamp, E> {
                Timestamp::parse(text).map_err(E::custom)
            }
        }
        deserializer.deserialize_str(Text)
    }
}

/// Appends a string of JSON, without the quotes around it. Bytes that are no UTF-8 become U+FFFD, as Go's
/// encoder has it.
pub(super) fn write_json_string(text: &[u8], out: &mut Vec<u8>) {
    if text.iter().all(|byte| (0x20..0x7f).contains(byte) && !matches!(byte, b'"' | b'\\')) {
        out.extend_from_slice(text);
        return;
    }
    for c in String::from_utf8_lossy(text).chars() {
        match c {
            '"' | '\\' => out.extend_from_slice(&[b'\\', c as u8]),
            '\0'..='\u{1f}' => {
                let _ = write!(out, "\\u{:04x}", c as u32);
            }
            _ => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}

/// A name as Go's `strconv.Quote` writes it, without the quotes around it: every byte that is no UTF-8 as
/// `\xhh`. Go also escapes what it does not call printable; its `Unquote` reads both.
pub(super) fn quote(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len() + 8);
    for chunk in name.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '"' | '\\' => out.extend_from_slice(&[b'\\', c as u8]),
                '\u{7}' => out.extend_from_slice(b"\\a"),
                '\u{8}' => out.extend_from_slice(b"\\b"),
                '\u{c}' => out.extend_from_slice(b"\\f"),
                '\n' => out.extend_from_slice(b"\\n"),
                '\r' => out.extend_from_slice(b"\\r"),
                '\t' => out.extend_from_slice(b"\\t"),
                '\u{b}' => out.extend_from_slice(b"\\v"),
                '\0'..='\u{1f}' | '\u{7f}' => {
                    let _ = write!(out, "\\x{:02x}", c as u32);
                }
                _ => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(out, "\\x{byte:02x}");
        }
    }
    out
}

/// The inverse of [`quote`], and of Go's. `None`: it is none.
pub(super) fn unquote(quoted: &str) -> Option<Vec<u8>> {
    if !quoted.contains(['\\', '"', '\n']) {
        return Some(quoted.as_bytes().to_vec());
    }
    let mut out = Vec::with_capacity(quoted.len());
    let mut rest = quoted;
    while let Some(at) = rest.find(['\\', '"', '\n']) {
        out.extend_from_slice(&rest.as_bytes()[..at]);
        rest = unescape(rest.get(at..)?.strip_prefix('\\')?, &mut out)?;
    }
    out.extend_from_slice(rest.as_bytes());
    Some(out)
}

/// One escape after its backslash; returns what follows it.
fn unescape<'a>(rest: &'a str, out: &mut Vec<u8>) -> Option<&'a str> {
    let kind = rest.chars().next()?;
    let after = rest.get(kind.len_utf8()..)?;
    let simple = match kind {
        'a' => 7,
        'b' => 8,
        'f' => 12,
        'n' => b'\n',
        'r' => b'\r',
        't' => b'\t',
        'v' => 11,
        '\\' | '"' => kind as u8,
        'x' => {
            let (digits, after) = after.split_at_checked(2)?;
            out.push(u8::try_from(number(digits, 16)?).ok()?);
            return Some(after);
        }
        '0'..='7' => {
            let (digits, after) = rest.split_at_checked(3)?;
            out.push(u8::try_from(number(digits, 8)?).ok()?);
            return Some(after);
        }
        'u' | 'U' => {
            let (digits, after) = after.split_at_checked(if kind == 'u' { 4 } else { 8 })?;
            let c = char::from_u32(number(digits, 16)?)?;
            out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
            return Some(after);
        }
        _ => return None,
    };
    out.push(simple);
    Some(after)
}

fn number(digits: &str, radix: u32) -> Option<u32> {
    // `from_str_radix` would take a sign.
    digits.chars().all(|c| c.is_digit(radix)).then(|| u32::from_str_radix(digits, radix).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn times_are_as_go_writes_them() {
        let cases = [
            (0, 0, "1970-01-01T00:00:00Z"),
            (1_709_210_096, 120_000_000, "2024-02-29T12:34:56.12Z"),
            (-1, 1, "1969-12-31T23:59:59.000000001Z"),
            (i64::MAX, 0, "9999-12-31T23:59:59Z"),
            (i64::MIN, 0, "0000-01-01T00:00:00Z"),
        ];
        for (seconds, nanos, text) in cases {
            assert_eq!(Timestamp { seconds, nanos }.to_string(), text);
        }
        let east = Timestamp::parse("2024-05-06T07:08:09.5+05:30").unwrap();
        assert_eq!(east.to_string(), "2024-05-06T01:38:09.5Z");
        for bad in ["", "2024-13-01T00:00:00Z", "2024-01-01T00:00:00", "2024-01-01T00:00:00.Z", "2024-01-01 00:00:00Z"]
        {
            assert!(Timestamp::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_are_quoted_as_go_does() {
        let cases: [(&[u8], &str); 4] = [
            (b"plain", "plain"),
            ("\u{e4}\u{1f600}".as_bytes(), "\u{e4}\u{1f600}"),
            (b"a\"b\\c\nd\x01\x7f", r#"a\"b\\c\nd\x01\x7f"#),
            (b"\xff\xc3", r"\xff\xc3"),
        ];
        for (name, quoted) in cases {
            assert_eq!(String::from_utf8(quote(name)).unwrap(), quoted);
            assert_eq!(unquote(quoted).unwrap(), name);
        }
        assert_eq!(unquote(r"\u00e4\U0001f600\101").unwrap(), "\u{e4}\u{1f600}A".as_bytes());
        for bad in ["\"", "\\", r"\q", r"\x1", r"\xg0", r"\u12", r"\ud800", "\n", r"\8", r"\777", r"\x+1"] {
            assert_eq!(unquote(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn every_time_of_four_digit_years_reads_back(seconds in SECONDS_MIN..=SECONDS_MAX, nanos in 0_u32..1_000_000_000) {
            let time = Timestamp { seconds, nanos };
            prop_assert_eq!(Timestamp::parse(&time.to_string()).unwrap(), time);
        }

        #[test]
        fn every_name_reads_back(name: Vec<u8>) {
            let quoted = String::from_utf8(quote(&name)).unwrap();
            prop_assert_eq!(unquote(&quoted).unwrap(), name);
        }

        #[test]
        fn no_text_makes_it_panic(text: String) {
            let _ = unquote(&text);
            let _ = Timestamp::parse(&text);
        }
    }
}
