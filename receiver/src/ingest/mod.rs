//! Taking in what hosts report, exactly once.
//!
//! Sessions submit numbered reports to one task, which commits whatever is waiting in one transaction (group
//! commit) and only then answers with the numbers to acknowledge. A number that came before with the same hash
//! is acknowledged and changes nothing; with another hash it is a fork: nothing that came with it is acknowledged,
//! the server is quarantined, and the audit log names both. An acknowledgement never passes what its own session
//! has shown with the stored content: a machine that was set back would throw away what it has written since.
//!
//! Every row is written for the server of the certificate; a report cannot name another one.
//! Inbox: [`Inlet`] (bounded). Outputs: rows, and one [`Verdict`] a submission.

pub mod heartbeats;
mod run;
mod task;

use tokio::sync::{mpsc, oneshot};

use hestner_proto::v1;

use crate::model::cost::RateCard;
use crate::model::counters::SharedCounters;
use crate::model::report::{BadReport, NumberedReport};
use crate::model::{CompanyId, ServerId, server};
use crate::platform::clock::SharedClock;
use crate::sessions::Sessions;
use crate::store::{self, Store};

pub use task::Worker;

/// Submissions that wait. A session submits one at a time, so this many sessions wait before others are held
/// back at their own stream.
const INBOX_MAX: usize = 256;

/// Why a submission was not taken in.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An inventory beyond its bounds.
    #[error("the inventory has {0}")]
    BadInventory(String),
    /// The task is gone: the receiver is stopping.
    #[error("the receiver is stopping")]
    Stopping,
    /// The transaction failed; nothing of it is stored, and the same reports may come again.
    #[error("the reports could not be stored")]
    NotStored,
    /// The inventory could not be stored.
    #[error(transparent)]
    Store(#[from] store::Error),
}

/// Whose reports they are.
#[derive(Clone, Debug)]
pub struct Origin {
    /// The server of the certificate.
    pub server: ServerId,
    /// Its company.
    pub company: CompanyId,
    /// Address of the session.
    pub peer: String,
    /// The outbox that the session named in its hello; it may report from no other.
    pub epoch: String,
    /// Highest number that the session has shown so far with the stored content, 0 for none.
    pub shown: i64,
}

/// What became of a submission.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Highest number to acknowledge, if there is one.
    pub ack: Option<u64>,
    /// What [`Origin::shown`] is from now on.
    pub shown: i64,
    /// Whether a number came with another content.
    pub forked: bool,
}

struct Submission {
    origin: Origin,
    reports: Vec<NumberedReport>,
    answer: oneshot::Sender<Result<Verdict, Error>>,
}

enum Message {
    Reports(Submission),
    /// Answered after a real write transaction.
    Ping(oneshot::Sender<bool>),
}

/// The task's front. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Inlet {
    inbox: mpsc::Sender<Message>,
    store: Store,
    clock: SharedClock,
    counters: SharedCounters,
}

/// Makes the task and its front; the task is not started.
pub fn new(
    store: Store,
    sessions: Sessions,
    card: RateCard,
    clock: SharedClock,
    counters: SharedCounters,
) -> (Inlet, Worker) {
    let (inbox, waiting) = mpsc::channel(INBOX_MAX);
    let inlet = Inlet { inbox, store: store.clone(), clock: clock.clone(), counters: counters.clone() };
    (inlet, Worker::new(waiting, store, sessions, card, clock, counters))
}

impl Inlet {
    /// Takes in envelopes in their order. Returns what to acknowledge, and the bad envelope if there was one:
    /// those before it are committed, it and those after it are not.
    ///
    /// # Errors
    /// [`Error::Stopping`] or [`Error::NotStored`].
    pub async fn submit(
        &self,
        origin: Origin,
        envelopes: Vec<v1::Envelope>,
    ) -> Result<(Verdict, Option<BadReport>), Error> {
        let mut reports = Vec::with_capacity(envelopes.len());
        let mut bad = None;
        for envelope in envelopes {
            match open(&origin, envelope) {
                Ok(report) => reports.push(report),
                Err(error) => {
                    self.counters.messages_bad.raise();
                    bad = Some(error);
                    break;
                }
            }
        }
        if reports.is_empty() {
            return Ok((Verdict { shown: origin.shown, ..Verdict::default() }, bad));
        }
        let (answer, answered) = oneshot::channel();
        let message = Message::Reports(Submission { origin, reports, answer });
        self.inbox.send(message).await.map_err(|_| Error::Stopping)?;
        let verdict = answered.await.map_err(|_| Error::Stopping)??;
        Ok((verdict, bad))
    }

    /// Replaces a server's inventory. Its hash is taken on trust: it only saves sending it again.
    ///
    /// # Errors
    /// [`Error::BadInventory`], or the store's.
    pub async fn inventory(&self, server: ServerId, inventory: &v1::Inventory) -> Result<(), Error> {
        if let Some(mistake) = server::inventory_mistake(inventory) {
            self.counters.messages_bad.raise();
            return Err(Error::BadInventory(mistake));
        }
        let mut tx = self.store.begin().await?;
        tx.replace_inventory(server, inventory, self.clock.now_ms()).await?;
        Ok(tx.commit().await?)
    }

    /// A round trip through the task and its writer. False when the write failed or the task is gone.
    pub async fn ping(&self) -> bool {
        let (answer, answered) = oneshot::channel();
        self.inbox.send(Message::Ping(answer)).await.is_ok() && answered.await.unwrap_or(false)
    }
}

fn open(origin: &Origin, envelope: v1::Envelope) -> Result<NumberedReport, BadReport> {
    if envelope.epoch != origin.epoch {
        let why = "it lies in another outbox than hello named".to_owned();
        return Err(BadReport { seq: envelope.seq, why });
    }
    NumberedReport::open(envelope)
}

#[cfg(test)]
mod tests;
