//! API keys: who is calling, and what they may see.
//!
//! A key reads `hsk_<id>_<48 hex digits>`. It is stored as a hash, compared in constant time, and bound to
//! one company or to all. There is one decision here, [`Caller::may_see`], and its default is no.

use hestner_proto::sha256;
use subtle::ConstantTimeEq as _;

use crate::model::{Actor, CompanyId, Scope};
use crate::platform::random;
use crate::store::{self, Store};

const SECRET_DIGITS: usize = 48;

/// Why a caller is not let in.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No key was shown.
    #[error("no API key was shown")]
    Missing,
    /// A key that is malformed, unknown or taken back. Which of them is nobody's business.
    #[error("the API key is not valid")]
    Invalid,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// There is no randomness for a new key.
    #[error(transparent)]
    Random(#[from] random::NoRandomness),
}

/// Somebody with a valid key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The key's row.
    pub key_id: i64,
    /// What it opens.
    pub scope: Scope,
}

impl Caller {
    /// Whether the caller may see things of `company`.
    pub fn may_see(&self, company: CompanyId) -> bool {
        self.scope.covers(company)
    }

    /// The caller as the audit log names it.
    pub fn actor(&self) -> Actor {
        Actor::ApiKey(self.key_id)
    }
}

/// Checks and makes API keys. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Auth {
    store: Store,
}

/// A new key. It is shown once and kept nowhere.
pub struct NewKey {
    /// The row.
    pub id: i64,
    /// The whole text.
    pub key: String,
}

impl Auth {
    /// Keys of `store`.
    pub fn new(store: Store) -> Self {
        Self { store }
    }

    /// Finds out who is calling, from the text after `Bearer`.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Invalid`], or the store's.
    pub async fn authenticate(&self, shown: Option<&str>) -> Result<Caller, Error> {
        let (key_id, secret) = parse(shown.ok_or(Error::Missing)?).ok_or(Error::Invalid)?;
        let row = self.store.api_key(key_id).await?.ok_or(Error::Invalid)?;
        let same = sha256::hex(secret.as_bytes()).as_bytes().ct_eq(row.secret_sha256.as_bytes());
        if bool::from(same) { Ok(Caller { key_id, scope: row.scope }) } else { Err(Error::Invalid) }
    }

    /// Makes a key.
    ///
    /// # Errors
    /// The store's, or no randomness.
    pub async fn create(&self, actor: Actor, scope: Scope, label: &str, now_ms: i64) -> Result<NewKey, Error> {
        let secret = random::secret_hex()?;
        let mut change = self.store.change(actor, now_ms).await?;
        let id = change.add_api_key(scope, label, &sha256::hex(secret.as_bytes()), now_ms).await?;
        let company = match scope {
            Scope::All => None,
            Scope::Company(id) => Some(id),
        };
        let details = serde_json::json!({ "label": label, "all_companies": company.is_none() });
        change.commit(company, "apikey_created", format!("apikey:{id}"), details).await?;
        Ok(NewKey { id, key: format!("hsk_{id}_{secret}") })
    }
}

/// The key in the text of an `Authorization` header; the case of the word `Bearer` does not matter.
pub fn bearer(header: &str) -> Option<&str> {
    let (scheme, key) = header.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

fn parse(text: &str) -> Option<(i64, &str)> {
    let (id, secret) = text.strip_prefix("hsk_")?.split_once('_')?;
    let well_formed = secret.len() == SECRET_DIGITS && secret.bytes().all(|b| b.is_ascii_hexdigit());
    Some((id.parse().ok()?, secret)).filter(|_| well_formed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_whole_key_opens_and_only_its_hash_is_kept() {
        let folder = tempfile::tempdir().expect("a folder");
        let auth = Auth::new(Store::open(folder.path()).await.expect("opened"));
        let made = auth.create(Actor::Receiver, Scope::All, "test", 1).await.expect("made");
        assert_eq!(auth.authenticate(Some(&made.key)).await.expect("in").scope, Scope::All);
        let mut wrong = made.key.clone();
        wrong.replace_range(wrong.len() - 1.., if made.key.ends_with('0') { "1" } else { "0" });
        for text in ["", "hsk_", "hsk_1_", "hsk_99_", &wrong, &made.key[..made.key.len() - 1]] {
            assert!(matches!(auth.authenticate(Some(text)).await, Err(Error::Invalid)), "{text}");
        }
        assert!(matches!(auth.authenticate(None).await, Err(Error::Missing)));
        let secret = made.key.rsplit_once('_').expect("three parts").1;
        let kept = std::fs::read(folder.path().join("receiver.db-wal")).expect("the log");
        assert!(!kept.windows(secret.len()).any(|window| window == secret.as_bytes()));
    }
}
