//! The join token: what an operator carries from the receiver to a new host.
//!
//! Text form `hjt_<id>_<secret>_<pin>`: the row at the receiver, 192 random bits as hex, and the pin of
//! the CA as hex. The pin lets the host check the receiver before it sends anything, so that there is no
//! trust on first use; it is not sent back.

use std::fmt;
use std::str::FromStr;

/// A join token. Its `Debug` shows no secret.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// The token's row at the receiver.
    pub id: i64,
    /// 48 hex digits.
    pub secret: String,
    /// Pin of the CA, see [`crate::identity::ca_pin`].
    pub ca_pin: String,
}

/// A text that is not a join token. It does not repeat the text: it may hold most of a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the join token is malformed: it must read hjt_<number>_<48 hex digits>_<64 hex digits>")]
pub struct MalformedToken;

/// Digits of the secret.
pub const SECRET_DIGITS: usize = 48;
const PIN_DIGITS: usize = 64;

impl JoinToken {
    /// The part that is sent to the receiver.
    pub fn presented(&self) -> String {
        format!("hjt_{}_{}", self.id, self.secret)
    }

    /// Takes apart what [`JoinToken::presented`] made: id and secret.
    ///
    /// # Errors
    /// [`MalformedToken`] for every other text.
    pub fn parse_presented(text: &str) -> Result<(i64, String), MalformedToken> {
        let rest = text.strip_prefix("hjt_").ok_or(MalformedToken)?;
        let (id, secret) = rest.split_once('_').ok_or(MalformedToken)?;
        let id = id.parse().map_err(|_| MalformedToken)?;
        is_hex(secret, SECRET_DIGITS).then(|| (id, secret.to_owned())).ok_or(MalformedToken)
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken {{ id: {}, .. }}", self.id)
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}_{}", self.presented(), self.ca_pin)
    }
}

impl FromStr for JoinToken {
    type Err = MalformedToken;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (presented, ca_pin) = text.trim().rsplit_once('_').ok_or(MalformedToken)?;
        let (id, secret) = Self::parse_presented(presented)?;
        is_hex(ca_pin, PIN_DIGITS).then(|| Self { id, secret, ca_pin: ca_pin.to_owned() }).ok_or(MalformedToken)
    }
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        JoinToken { id: 3, secret: "ab".repeat(24), ca_pin: "0f".repeat(32) }
    }

    #[test]
    fn token_survives_its_own_text() {
        assert_eq!(format!("{}\n", token()).parse(), Ok(token()));
        assert_eq!(JoinToken::parse_presented(&token().presented()), Ok((3, token().secret)));
    }

    #[test]
    fn token_refuses_what_is_cut_or_changed() {
        let whole = token().to_string();
        for cut in 0..whole.len() {
            assert_eq!(whole[..cut].parse::<JoinToken>(), Err(MalformedToken), "first {cut} characters");
        }
        assert!(whole.to_uppercase().parse::<JoinToken>().is_err());
    }

    #[test]
    fn token_does_not_print_its_secret_when_debugged() {
        assert!(!format!("{:?}", token()).contains("abab"));
    }
}
