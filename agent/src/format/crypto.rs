//! restic's authenticated encryption: AES-256 in counter mode, with Poly1305-AES over the ciphertext.
//!
//! What is sealed lies as `nonce (16) | ciphertext | MAC (16)`. The counter is the nonce as a big-endian number
//! of 128 bits; the MAC's one-time key is `r | AES-128(k, nonce)`. Nonces come in by argument and must never
//! repeat under one key: 16 random bytes each. Keys cannot be printed, and are wiped when they are dropped.

use std::fmt;

use aes::cipher::{
    BlockCipherEncrypt as _, InnerIvInit as _, KeyInit as _, StreamCipher as _, StreamCipherCoreWrapper,
};
use aes::{Aes128, Aes256, Block};
use ctr::CtrCore;
use ctr::flavors::Ctr128BE;
use poly1305::Poly1305;
use zeroize::{Zeroize as _, Zeroizing};

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
    encryption: Aes256,
    mac_nonce: Aes128,
    mac_r: Zeroizing<[u8; 16]>,
}

impl fmt::Debug for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cipher(..)")
    }
}

impl Cipher {
    /// From the bytes of a key, in the order encrypt, `k`, `r`.
    pub fn new(key: &[u8; KEY_BYTES]) -> Self {
        let (mut encrypt, mut k, mut r) = ([0_u8; 32], [0_u8; 16], [0_u8; 16]);
        encrypt.copy_from_slice(&key[..32]);
        k.copy_from_slice(&key[32..48]);
        r.copy_from_slice(&key[48..]);
        let made = Self {
            encryption: Aes256::new(&encrypt.into()),
            mac_nonce: Aes128::new(&k.into()),
            mac_r: Zeroizing::new(r),
        };
        encrypt.zeroize();
        k.zeroize();
        r.zeroize();
        made
    }

    /// Appends `plain`, sealed, to `out`.
    pub fn seal_into(&self, nonce: &[u8; NONCE_BYTES], plain: &[u8], out: &mut Vec<u8>) {
        out.reserve(plain.len() + OVERHEAD_BYTES);
        out.extend_from_slice(nonce);
        let start = out.len();
        out.extend_from_slice(plain);
        let Some(text) = out.get_mut(start..) else { return };
        self.apply(nonce, text);
        let mac = self.mac(nonce, text);
        out.extend_from_slice(&mac);
    }

    /// `plain`, sealed.
    pub fn seal(&self, nonce: &[u8; NONCE_BYTES], plain: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(plain.len() + OVERHEAD_BYTES);
        self.seal_into(nonce, plain, &mut out);
        out
    }

    /// What was sealed, in the clear; the bytes are changed in place and the result is a part of them.
    ///
    /// # Errors
    /// [`FormatError::Forged`] naming `what`; then nothing was decrypted.
    pub fn open_in_place<'a>(&self, what: &'static str, sealed: &'a mut [u8]) -> Result<&'a mut [u8], FormatError> {
        let forged = FormatError::Forged(what);
        let (nonce, rest) = sealed.split_first_chunk_mut::<NONCE_BYTES>().ok_or_else(|| forged.clone())?;
        let (text, mac) = rest.split_last_chunk_mut::<MAC_BYTES>().ok_or_else(|| forged.clone())?;
        if !equal(&self.mac(nonce, text), mac) {
            return Err(forged);
        }
        self.apply(nonce, text);
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

    fn apply(&self, nonce: &[u8; NONCE_BYTES], text: &mut [u8]) {
        let core = CtrCore::<&Aes256, Ctr128BE>::inner_iv_init(&self.encryption, &(*nonce).into());
        StreamCipherCoreWrapper::from_core(core).apply_keystream(text);
    }

    fn mac(&self, nonce: &[u8; NONCE_BYTES], text: &[u8]) -> [u8; MAC_BYTES] {
        let mut pad = Block::from(*nonce);
        self.mac_nonce.encrypt_block(&mut pad);
        let mut key = Zeroizing::new([0_u8; 32]);
        key[..16].copy_from_slice(self.mac_r.as_slice());
        key[16..].copy_from_slice(pad.as_slice());
        Poly1305::new(&(*key).into()).compute_unpadded(text).into()
    }
}

/// Compares without telling by its time where the difference lies.
fn equal(a: &[u8; MAC_BYTES], b: &[u8; MAC_BYTES]) -> bool {
    a.iter().zip(b).fold(0_u8, |difference, (a, b)| difference | (a ^ b)) == 0
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
        let mac = Cipher::new(&key).mac(&nonce, &[0xf3, 0xf6]);
        assert_eq!(hex::encode(mac), "f4c633c3044fc145f84f335cb81953de");
    }

    #[test]
    fn what_was_sealed_opens_and_any_changed_bit_does_not() {
        let cipher = Cipher::new(&key());
        let sealed = cipher.seal(&[7; 16], b"some text");
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
        assert_eq!(format!("{:?}", Cipher::new(&key())), "Cipher(..)");
    }
}
