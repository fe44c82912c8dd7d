//! Keys of repositories, as hosts have told them: what is left when a host is gone.
//!
//! In: a server and a repository. Out: the key as it came. A wrapped one is encrypted for the company's recovery key,
//! which is not here: it opens nothing, and whoever sees it can restore nothing. An open one is a password, so that it
//! leaves only by [`Fleet::export_key`], which writes an audit row.

use super::{Error, Fleet};
use crate::auth::Caller;
use crate::model::report::{EscrowedKey, KeptKey, RepositoryKey};
use crate::model::{Actor, ServerId};

impl Fleet {
    /// Keys of a server's repositories, without what opens an open one.
    ///
    /// # Errors
    /// [`Error::NotFound`], or the store's.
    pub async fn repository_keys(&self, caller: Caller, server: ServerId) -> Result<Vec<KeptKey>, Error> {
        self.visible(caller, server).await?;
        Ok(self.store.repository_keys(Some(server)).await?)
    }

    /// A repository's key, to be carried to where its host is missed. Who took it stands in the audit log.
    ///
    /// # Errors
    /// [`Error::NotFound`], or the store's.
    pub async fn export_key(
        &self,
        actor: Actor,
        server: ServerId,
        repository_id: &str,
    ) -> Result<RepositoryKey, Error> {
        let company = self.store.company_of_server(server).await?.ok_or(Error::NotFound("server"))?;
        let mut change = self.store.change(actor, self.clock.now_ms()).await?;
        let key = change.repository_key(server, repository_id).await?.ok_or(Error::NotFound("repository key"))?;
        let form = if matches!(key.key, EscrowedKey::Open(_)) { "open" } else { "wrapped" };
        let details = serde_json::json!({ "repository_id": repository_id, "form": form });
        change.commit(Some(company), "repository_key_exported", format!("server:{server}"), details).await?;
        Ok(key)
    }
}
