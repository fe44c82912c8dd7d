//! Companies, servers, services, runs and policies, as people see and ask for them.
//!
//! Every question comes with the caller; what another company owns is the same as what does not exist. What is
//! asked of a host becomes a directive in [`directives`]; [`housekeeping`] ends those whose time is over.
//! It decides nothing that the host decides: grants, destinations and floors are not checked here.

pub mod companies;
pub mod directives;
pub mod housekeeping;
pub mod keys;
pub mod overview;

use crate::auth::Caller;
use crate::model::counters::SharedCounters;
use crate::model::policy::Policy;
use crate::model::run::Run;
use crate::model::server::{Company, Server, ServerStatus, Service};
use crate::model::{CompanyId, Scope, ServerId, times};
use crate::platform::clock::SharedClock;
use crate::platform::random;
use crate::sessions::Sessions;
use crate::store::{self, Store};

pub use crate::store::runs::RunFilter;
pub use crate::store::servers::ServerFilter;

/// Why something was not answered or done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It does not exist, or the caller may not see it.
    #[error("there is no such {0}")]
    NotFound(&'static str),
    /// The input breaks rules; all of them are named.
    #[error("{}", .0.join("; "))]
    Invalid(Vec<String>),
    /// The last inventory names no such service.
    #[error("the server has no service `{0}`")]
    UnknownService(String),
    /// No service was named, and not exactly one is set up for snapshots.
    #[error("{}", service_wanted(.0))]
    ServiceWanted(Vec<String>),
    /// Too many directives wait for the host.
    #[error("{0} directives wait for the server already")]
    TooManyDirectives(i64),
    /// An idempotency key came with another request before.
    #[error("the idempotency key was used for another request")]
    IdempotencyMismatch,
    /// The name is taken.
    #[error("there is a company `{0}` already")]
    NameTaken(String),
    /// The recovery key cannot be used.
    #[error("the recovery key cannot be used: {0}")]
    RecoveryKey(&'static str),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// No randomness for an id.
    #[error(transparent)]
    Random(#[from] random::NoRandomness),
}

fn service_wanted(names: &[String]) -> String {
    if names.is_empty() {
        return "service: none was named, and the server has told of none that is set up for snapshots".to_owned();
    }
    format!("service: none was named, and the server has several that are set up for snapshots: {}", names.join(", "))
}

/// See the module. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Fleet {
    store: Store,
    sessions: Sessions,
    clock: SharedClock,
    counters: SharedCounters,
}

impl Fleet {
    /// The fleet in `store`.
    pub fn new(store: Store, sessions: Sessions, clock: SharedClock, counters: SharedCounters) -> Self {
        Self { store, sessions, clock, counters }
    }

    /// Checks that the caller may see the server.
    ///
    /// # Errors
    /// [`Error::NotFound`] otherwise.
    async fn visible(&self, caller: Caller, server: ServerId) -> Result<CompanyId, Error> {
        let company = self.store.company_of_server(server).await?;
        company.filter(|company| caller.may_see(*company)).ok_or(Error::NotFound("server"))
    }

    /// Companies that the caller may see.
    ///
    /// # Errors
    /// The store's.
    pub async fn companies(&self, caller: Caller) -> Result<Vec<Company>, Error> {
        Ok(self.store.companies(caller.scope).await?)
    }

    /// Servers of a company, by id.
    ///
    /// # Errors
    /// [`Error::NotFound`], or the store's.
    pub async fn servers(
        &self,
        caller: Caller,
        company: CompanyId,
        filter: &ServerFilter,
        status: Option<ServerStatus>,
    ) -> Result<Vec<Server>, Error> {
        let known = caller.may_see(company) && !self.store.companies(Scope::Company(company)).await?.is_empty();
        if !known {
            return Err(Error::NotFound("company"));
        }
        let servers = self.all_servers(Some(company), filter).await?;
        Ok(servers.into_iter().filter(|server| status.is_none_or(|wanted| wanted == server.status)).collect())
    }

    /// Servers of one company or of all, without a caller: for the command line.
    ///
    /// # Errors
    /// The store's.
    pub async fn all_servers(&self, company: Option<CompanyId>, filter: &ServerFilter) -> Result<Vec<Server>, Error> {
        let servers = self.store.servers(company, filter).await?;
        Ok(servers.into_iter().map(|server| self.with_session(server)).collect())
    }

    /// Adds what only the sessions know.
    fn with_session(&self, mut server: Server) -> Server {
        let id = ServerId(server.id);
        if server.status == ServerStatus::Offline && self.sessions.is_online(id) {
            server.status = ServerStatus::Online;
        }
        if let Some(seen) = self.sessions.last_seen_ms(id) {
            server.last_seen_at = Some(times::rfc3339(seen));
        }
        server
    }

    /// Services of a server, by name.
    ///
    /// # Errors
    /// [`Error::NotFound`], or the store's.
    pub async fn services(&self, caller: Caller, server: ServerId) -> Result<Vec<Service>, Error> {
        self.visible(caller, server).await?;
        Ok(self.store.services(server).await?)
    }

    /// Runs of a server, newest first.
    ///
    /// # Errors
    /// [`Error::NotFound`], or the store's.
    pub async fn runs(&self, caller: Caller, server: ServerId, filter: &RunFilter) -> Result<Vec<Run>, Error> {
        self.visible(caller, server).await?;
        let runs = self.store.runs(server, filter).await?;
        Ok(runs.into_iter().map(|run| self.with_progress(run)).collect())
    }

    /// A run of a server by `run_uid` or row.
    ///
    /// # Errors
    /// [`Error::NotFound`], or the store's.
    pub async fn run(&self, caller: Caller, server: ServerId, reference: &str) -> Result<Run, Error> {
        self.visible(caller, server).await?;
        let run = self.store.run(server, reference).await?.ok_or(Error::NotFound("run"))?;
        Ok(self.with_progress(run))
    }

    fn with_progress(&self, mut run: Run) -> Run {
        if run.status == "running"
            && let Some(run_uid) = &run.run_uid
        {
            run.progress = self.sessions.progress_of(ServerId(run.server_id), run_uid);
        }
        run
    }

    /// Policies of a server, by service.
    ///
    /// # Errors
    /// [`Error::NotFound`], or the store's.
    pub async fn policies(&self, caller: Caller, server: ServerId) -> Result<Vec<Policy>, Error> {
        self.visible(caller, server).await?;
        let now_ms = self.clock.now_ms();
        let policies = self.store.policies(server).await?;
        Ok(policies.into_iter().map(|policy| policy.due_after(now_ms)).collect())
    }

    /// How many runs stand where, over all companies: for metrics.
    ///
    /// # Errors
    /// The store's.
    pub async fn runs_by_status(&self) -> Result<Vec<(String, i64)>, Error> {
        Ok(self.store.runs_by_status().await?)
    }
}

#[cfg(test)]
mod tests;
