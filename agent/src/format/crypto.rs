//! restic's authenticated encryption: AES-256 in counter mode, with Poly1305-AES over the ciphertext.
//!
//! What is sealed lies as `nonce (16) | ciphertext | MAC (16)`. The counter is the nonce as a big-endian number
//! of 128 bits; the MAC's one-time key is `r | AES-128(k, nonce)`. Nonces come in by argument and must never
//! repeat under one key: 16 random bytes each. Keys cannot be printed, and are wiped when they are dropped.

use std::fmt;

use aws_lc_rs::cipher::{AES_128, AES_256, EncryptingKey, EncryptionContext, UnboundCipherKey};
use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::error::Unspecified;
use aws_lc_rs::iv::FixedLength;
use poly1305::Poly1305;
use poly1305::universal_hash::KeyInit as _;
use zeroize::Zeroizing;

use super::FormatError;

/// Bytes of a nonce.
pub const NONCE_BYTES: usize = 16;
/// Bytes of a MAC.
pub const MAC_BYTES: usize = 16;
/// How much longer a sealed text is than it was in the clear.
pub const OVERHEAD_BYTES: usize = NONCE_BYTES + MAC_BYTES;
/// Bytes of a key: 32 to encrypt, 16 for the MAC's `k`, 16 for its `r`.
pub const KEY_BYTES: usize = 64;

/// Encrypts and authenticates.
pub struct Cipher {
    encryption: EncryptingKey,
    mac_nonce: EncryptingKey,
    mac_r: Zeroizing<[u8; 16]>,
}

impl fmt::Debug for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cipher(..)")
    }
}

impl Cipher {
    /// From the bytes of a key, in the order encrypt, `k`, `r`.
    ///
    /// # Errors
    /// Never, in truth: keys of this length are all good.
    pub fn new(key: &[u8; KEY_BYTES]) -> Result<Self, FormatError> {
        let mut mac_r = Zeroizing::new([0_u8; 16]);
        mac_r.copy_from_slice(&key[48..]);
        let encryption = UnboundCipherKey::new(&AES_256, &key[..32]).and_then(EncryptingKey::ctr);
        let mac_nonce = UnboundCipherKey::new(&AES_128, &key[32..48]).and_then(EncryptingKey::ecb);
        Ok(Self { encryption: encryption.map_err(broken)?, mac_nonce: mac_nonce.map_err(broken)?, mac_r })
    }

    /// Appends `plain`, sealed, to `out`.
    ///
    /// # Errors
    /// Never, in truth; then `out` is not to be used.
    pub fn seal_into(&self, nonce: &[u8; NONCE_BYTES], plain: &[u8], out: &mut Vec<u8>) -> Result<(), FormatError> {
        out.reserve(plain.len() + OVERHEAD_BYTES);
        out.extend_from_slice(nonce);
        let start = out.len();
        out.extend_from_slice(plain);
        let text = out.get_mut(start..).unwrap_or_default();
        self.apply(nonce, text)?;
        let mac = self.mac(nonce, text)?;
        out.extend_from_slice(&mac);
        Ok(())
    }

    /// `plain`, sealed.
    ///
    /// # Errors
    /// As [`Self::seal_into`].
    pub fn seal(&self, nonce: &[u8; NONCE_BYTES], plain: &[u8]) -> Result<Vec<u8>, FormatError> {
        let mut out = Vec::with_capacity(plain.len() + OVERHEAD_BYTES);
        self.seal_into(nonce, plain, &mut out)?;
        Ok(out)
    }

    /// What was sealed, in the clear; the bytes are changed in place and the result is a part of them.
    ///
    /// # Errors
    /// [`FormatError::Forged`] naming `what`; then nothing was decrypted.
    pub fn open_in_place<'a>(&self, what: &'static str, sealed: &'a mut [u8]) -> Result<&'a mut [u8], FormatError> {
        let forged = FormatError::Forged(what);
        let (nonce, rest) = sealed.split_first_chunk_mut::<NONCE_BYTES>().ok_or_else(|| forged.clone())?;
        let (text, mac) = rest.split_last_chunk_mut::<MAC_BYTES>().ok_or_else(|| forged.clone())?;
        verify_slices_are_equal(&self.mac(nonce, text)?, mac).map_err(|Unspecified| forged)?;
        self.apply(nonce, text)?;
        Ok(text)
    }

    /// What was sealed, in the clear.
    ///
    /// # Errors
    /// As [`Self::open_in_place`].
    pub fn open(&self, what: &'static str, mut sealed: Vec<u8>) -> Result<Vec<u8>, FormatError> {
        let length = self.open_in_place(what, &mut sealed)?.len();
        sealed.copy_within(NONCE_BYTES..NONCE_BYTES + length, 0);
        sealed.truncate(length);
        Ok(sealed)
    }

    /// Encrypts or decrypts, which is the same in counter mode.
    fn apply(&self, nonce: &[u8; NONCE_BYTES], text: &mut [u8]) -> Result<(), FormatError> {
        let counter = EncryptionContext::Iv128(FixedLength::from(nonce));
        self.encryption.less_safe_encrypt(text, counter).map(drop).map_err(broken)
    }

    fn mac(&self, nonce: &[u8; NONCE_BYTES], text: &[u8]) -> Result<[u8; MAC_BYTES], FormatError> {
        let mut key = Zeroizing::new([0_u8; 32]);
        key[..16].copy_from_slice(self.mac_r.as_slice());
        key[16..].copy_from_slice(nonce);
        let one_block = self.mac_nonce.less_safe_encrypt(&mut key[16..], EncryptionContext::None);
        one_block.map_err(broken)?;
        Ok(Poly1305::new(&(*key).into()).compute_unpadded(text).into())
    }
}

fn broken(error: Unspecified) -> FormatError {
    FormatError::damaged("cipher", error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> [u8; KEY_BYTES] {
        std::array::from_fn(|i| u8::try_from(i * 3 % 251).unwrap())
    }

    /// The first of the examples in Bernstein's paper on Poly1305-AES.
    #[test]
    fn mac_is_that_of_poly1305_aes() {
        let mut key = [0_u8; KEY_BYTES];
        key[32..48].copy_from_slice(&hex::decode("ec074c835580741701425b623235add6").unwrap());
        key[48..].copy_from_slice(&hex::decode("851fc40c3467ac0be05cc20404f3f700").unwrap());
        let nonce: [u8; 16] = hex::decode("fb447350c4e868c52ac3275cf9d4327e").unwrap().try_into().unwrap();
        let mac = Cipher::new(&key).unwrap().mac(&nonce, &[0xf3, 0xf6]).unwrap();
        assert_eq!(hex::encode(mac), "f4c633c3044fc145f84f335cb81953de");
    }

    /// AES-256 in counter mode, NIST SP 800-38A, F.5.5.
    #[test]
    fn text_is_encrypted_as_the_standard_has_it() {
        let mut key = [0_u8; KEY_BYTES];
        let bytes = |hex: &str| hex::decode(hex).unwrap();
        key[..32].copy_from_slice(&bytes("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"));
        let counter: [u8; 16] = bytes("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff").try_into().unwrap();
        let mut text = bytes("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51");
        Cipher::new(&key).unwrap().apply(&counter, &mut text).unwrap();
        assert_eq!(hex::encode(text), "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5");
    }

    #[test]
    fn counter_is_a_number_of_128_bits() {
        let cipher = Cipher::new(&key()).unwrap();
        let (mut across, mut after) = ([0_u8; 32], [0_u8; 16]);
        cipher.apply(&[0xff; 16], &mut across).unwrap();
        cipher.apply(&[0; 16], &mut after).unwrap();
        assert_eq!(across[16..], after);
    }

    #[test]
    fn what_was_sealed_opens_and_any_changed_bit_does_not() {
        let cipher = Cipher::new(&key()).unwrap();
        let sealed = cipher.seal(&[7; 16], b"some text").unwrap();
        assert_eq!(sealed.len(), 9 + OVERHEAD_BYTES);
        assert_eq!(cipher.open("text", sealed.clone()).unwrap(), b"some text");
        for bit in 0..sealed.len() * 8 {
            let mut changed = sealed.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(cipher.open("text", changed), Err(FormatError::Forged("text")));
        }
        for length in 0..sealed.len() {
            assert!(cipher.open("text", sealed[..length].to_vec()).is_err());
        }
    }

    #[test]
    fn nothing_is_printed() {
        assert_eq!(format!("{:?}", Cipher::new(&key()).unwrap()), "Cipher(..)");
    }
}
