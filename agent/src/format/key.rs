//! Key files: the repository's master key behind a password.
//!
//! scrypt makes a key of the password, and that key seals the master key, which is JSON itself. A file is
//! somebody else's bytes: what it asks of scrypt is bounded before anything is computed.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use super::crypto::{Cipher, KEY_BYTES, NONCE_BYTES};
use super::{FormatError, from_json, to_json};

const WHAT: &str = "key file";
const BYTES_MAX: usize = 64 * 1024;
const SALT_BYTES: usize = 64;
/// Most memory that scrypt may take: 128 * N * r bytes.
const MEMORY_BYTES_MAX: u64 = 512 * 1024 * 1024;
/// Most work: N * r * p. restic's default is 2^18 to 2^21; this is some ten seconds.
const WORK_MAX: u64 = 1 << 24;

/// What making a key of a password costs. restic's least is N = 2^15, r = 8, p = 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Logarithm of N to the base 2.
    pub log_n: u8,
    /// Size of a block.
    pub r: u32,
    /// How often.
    pub p: u32,
}

impl Default for Cost {
    fn default() -> Self {
        Self { log_n: 15, r: 8, p: 1 }
    }
}

/// A repository's master key. It cannot be printed, and is wiped when it is dropped.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct MasterKey([u8; KEY_BYTES]);

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MasterKey(..)")
    }
}

impl MasterKey {
    /// Of random bytes.
    pub fn new(mut random: [u8; KEY_BYTES]) -> Self {
        // Bits that Poly1305 ignores; restic stores them as zero.
        for (i, byte) in random[48..].iter_mut().enumerate() {
            match i % 4 {
                3 => *byte &= 0x0f,
                0 if i > 0 => *byte &= 0xfc,
                _ => {}
            }
        }
        Self(random)
    }

    /// What encrypts with it.
    ///
    /// # Errors
    /// As [`Cipher::new`].
    pub fn cipher(&self) -> Result<Cipher, FormatError> {
        Cipher::new(&self.0)
    }

    fn to_json(&self) -> Result<Zeroizing<Vec<u8>>, FormatError> {
        let keys = MasterJson {
            mac: MacJson { k: STANDARD.encode(&self.0[32..48]), r: STANDARD.encode(&self.0[48..]) },
            encrypt: STANDARD.encode(&self.0[..32]),
        };
        to_json("master key", &keys).map(Zeroizing::new)
    }

    fn from_json(bytes: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "master key";
        let keys: MasterJson = serde_json::from_slice(bytes)
            // serde's message may quote what it read.
            .map_err(|_| FormatError::damaged(WHAT, "it is not the JSON of a key"))?;
        let mut key = Self([0; KEY_BYTES]);
        for (text, place) in [(&keys.encrypt, 0..32), (&keys.mac.k, 32..48), (&keys.mac.r, 48..64)] {
            let bytes = STANDARD.decode(text).map(Zeroizing::new);
            let bytes = bytes.map_err(|_| FormatError::damaged(WHAT, "it is not base64"))?;
            if bytes.len() != place.len() {
                return Err(FormatError::damaged(WHAT, "a part has the wrong length"));
            }
            key.0[place].copy_from_slice(&bytes);
        }
        Ok(key)
    }
}

#[derive(Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
struct MacJson {
    k: String,
    r: String,
}

#[derive(Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
struct MasterJson {
    mac: MacJson,
    encrypt: String,
}

/// A key file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyFile {
    created: String,
    username: String,
    hostname: String,
    kdf: String,
    #[serde(rename = "N")]
    n: u64,
    r: u32,
    p: u32,
    salt: String,
    data: String,
}

/// Who makes a key file, and randomness for it.
#[derive(Clone, Debug)]
pub struct Maker {
    /// When, as RFC 3339.
    pub created: String,
    /// The user's name.
    pub username: String,
    /// The host's name.
    pub hostname: String,
    /// Random.
    pub salt: [u8; SALT_BYTES],
    /// Random.
    pub nonce: [u8; NONCE_BYTES],
}

impl KeyFile {
    /// From its JSON.
    ///
    /// # Errors
    /// When it is damaged.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        from_json(WHAT, bytes, BYTES_MAX)
    }

    /// As JSON.
    ///
    /// # Errors
    /// Never, in truth.
    pub fn to_bytes(&self) -> Result<Vec<u8>, FormatError> {
        to_json(WHAT, self)
    }

    /// Puts a master key behind a password.
    ///
    /// # Errors
    /// When the cost is out of bounds.
    pub fn make(master: &MasterKey, password: &[u8], cost: Cost, maker: Maker) -> Result<Self, FormatError> {
        let cipher = derive(password, &maker.salt, cost)?;
        Ok(Self {
            created: maker.created,
            username: maker.username,
            hostname: maker.hostname,
            kdf: "scrypt".to_owned(),
            n: 1 << cost.log_n,
            r: cost.r,
            p: cost.p,
            salt: STANDARD.encode(maker.salt),
            data: STANDARD.encode(cipher.seal(&maker.nonce, &master.to_json()?)?),
        })
    }

    /// The master key.
    ///
    /// # Errors
    /// [`FormatError::WrongPassword`]; otherwise when the file is damaged or asks for too much.
    pub fn open(&self, password: &[u8]) -> Result<MasterKey, FormatError> {
        if self.kdf != "scrypt" {
            return Err(FormatError::Unknown { what: WHAT, which: self.kdf.chars().take(40).collect() });
        }
        let cost = Cost { log_n: exact_log(self.n)?, r: self.r, p: self.p };
        let decode = |text: &str| STANDARD.decode(text).map_err(|error| FormatError::damaged(WHAT, error));
        let cipher = derive(password, &decode(&self.salt)?, cost)?;
        let mut data = Zeroizing::new(decode(&self.data)?);
        match cipher.open_in_place(WHAT, &mut data) {
            Ok(json) => MasterKey::from_json(json),
            Err(_) => Err(FormatError::WrongPassword),
        }
    }
}

fn exact_log(n: u64) -> Result<u8, FormatError> {
    if !n.is_power_of_two() || n < 2 {
        return Err(FormatError::damaged(WHAT, "N is no power of two"));
    }
    Ok(u8::try_from(n.trailing_zeros()).unwrap_or(u8::MAX))
}

fn derive(password: &[u8], salt: &[u8], cost: Cost) -> Result<Cipher, FormatError> {
    let n = 1_u64.checked_shl(cost.log_n.into()).unwrap_or(u64::MAX);
    let block = n.saturating_mul(cost.r.into());
    for (asked, allowed) in
        [(block.saturating_mul(128), MEMORY_BYTES_MAX), (block.saturating_mul(cost.p.into()), WORK_MAX)]
    {
        if asked > allowed {
            return Err(FormatError::TooMuch { what: WHAT, asked, allowed });
        }
    }
    let params = scrypt::Params::new(cost.log_n, cost.r, cost.p)
        .map_err(|_| FormatError::damaged(WHAT, "scrypt does not take its parameters"))?;
    let mut key = Zeroizing::new([0_u8; KEY_BYTES]);
    scrypt::scrypt(password, salt, &params, key.as_mut_slice()).map_err(|error| FormatError::damaged(WHAT, error))?;
    Cipher::new(&key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made() -> (MasterKey, KeyFile) {
        let master = MasterKey::new(std::array::from_fn(|i| u8::try_from(i + 100).unwrap()));
        let maker = Maker {
            created: "2024-01-01T00:00:00Z".into(),
            username: "root".into(),
            hostname: "here".into(),
            salt: [1; SALT_BYTES],
            nonce: [2; NONCE_BYTES],
        };
        let file = KeyFile::make(&master, b"secret", Cost { log_n: 4, r: 1, p: 1 }, maker).unwrap();
        (master, file)
    }

    #[test]
    fn password_opens_its_key_file_and_no_other_does() {
        let (master, file) = made();
        let file = KeyFile::parse(&file.to_bytes().unwrap()).unwrap();
        assert_eq!(file.open(b"secret").unwrap().0, master.0);
        assert_eq!(file.open(b"guess").unwrap_err(), FormatError::WrongPassword);
    }

    #[test]
    fn parameters_that_would_take_all_memory_or_hours_are_refused() {
        let (_, file) = made();
        let too_much = |file: KeyFile| matches!(file.open(b"secret"), Err(FormatError::TooMuch { .. }));
        assert!(too_much(KeyFile { n: 1 << 40, ..file.clone() }));
        assert!(too_much(KeyFile { r: u32::MAX, ..file.clone() }));
        assert!(too_much(KeyFile { p: u32::MAX, ..file.clone() }));
        for n in [0, 1, 3] {
            assert!(KeyFile { n, ..file.clone() }.open(b"secret").is_err());
        }
        assert!(KeyFile { r: 0, ..file.clone() }.open(b"secret").is_err());
        assert!(KeyFile { p: 0, ..file }.open(b"secret").is_err());
    }

    #[test]
    fn nothing_secret_is_printed() {
        assert_eq!(format!("{:?}", made().0), "MasterKey(..)");
    }
}
