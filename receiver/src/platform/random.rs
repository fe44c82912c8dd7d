//! Random numbers for secrets and serial numbers, from the system's generator.
//!
//! In: how many bytes. Out: the bytes. There is no other source of secrets in this crate, and a failing
//! generator is an error that the caller must handle: a predictable secret would be worse than none.

/// The system's generator did not answer.
#[derive(Debug, thiserror::Error)]
#[error("the system's random number generator failed: {0}")]
pub struct NoRandomness(getrandom::Error);

/// `N` random bytes.
///
/// # Errors
/// [`NoRandomness`].
pub fn bytes<const N: usize>() -> Result<[u8; N], NoRandomness> {
    let mut out = [0; N];
    getrandom::fill(&mut out).map_err(NoRandomness)?;
    Ok(out)
}

/// A secret of 192 bits as 48 hex digits.
///
/// # Errors
/// [`NoRandomness`].
pub fn secret_hex() -> Result<String, NoRandomness> {
    Ok(hex::encode(bytes::<24>()?))
}
