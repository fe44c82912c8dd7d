//! What S3 and SFTP have in common: a blocking face over one thread that speaks to the network.
//!
//! In: a [`Server`], which does each thing once. Out: a [`Storage`] that tries again, bounds what is under way,
//! and settles what a lost answer leaves open: a name that is taken by the same bytes was stored by an earlier
//! try. The thread ends with the value. Not to be called from a task of tokio.

use std::fmt;
use std::io;

use bytes::Bytes;
use hestner_proto::sha256::Hasher;
use tokio::runtime::{Builder, Handle};
use tokio::sync::{Semaphore, oneshot};

use super::retry::{Limits, Trouble, retry};
use super::{Kind, Object, Seen, Storage, StorageError, failed, too_short};

/// Bytes that are read back by one request.
const READ_BYTES: u64 = 4 * 1024 * 1024;

/// A server that holds objects; each call is one try.
pub(super) trait Server: fmt::Debug + Send + Sync + 'static {
    /// Where it is, without secrets.
    fn place(&self) -> String;

    /// What its users should know.
    fn remark(&self) -> Option<String>;

    /// Stores an object if its name is free; [`StorageError::Exists`] otherwise. Durable afterwards.
    fn put(&self, object: &Object, bytes: &Bytes) -> impl Future<Output = Result<(), Trouble>> + Send;

    /// Makes sure that an object which somebody stored is durable.
    fn settle(&self, object: &Object) -> impl Future<Output = Result<(), Trouble>> + Send;

    /// How many bytes an object has.
    fn size(&self, object: &Object) -> impl Future<Output = Result<u64, Trouble>> + Send;

    /// So many bytes from there on, or fewer where the object ends.
    fn read(&self, object: &Object, offset: u64, length: u64) -> impl Future<Output = Result<Vec<u8>, Trouble>> + Send;

    /// Paths below the root and sizes of all files in a kind's folder and the folders in it.
    fn list(&self, kind: Kind) -> impl Future<Output = Result<Vec<(String, u64)>, Trouble>> + Send;

    /// Removes an object; one that is not there is fine.
    fn remove(&self, object: &Object) -> impl Future<Output = Result<(), Trouble>> + Send;
}

/// A place behind a network.
#[derive(Debug)]
pub(super) struct Remote<S> {
    server: S,
    limits: Limits,
    turns: Semaphore,
    network: Network,
}

impl<S: Server> Remote<S> {
    /// Speaks to nobody yet. `connect` is called with the thread's runtime at hand.
    pub(super) fn new(
        limits: &Limits,
        connect: impl FnOnce() -> Result<S, StorageError>,
    ) -> Result<Self, StorageError> {
        let network = Network::start().map_err(|e| failed("start", "a thread for the network", e))?;
        let server = {
            let _inside = network.handle.enter();
            connect()?
        };
        // More than the semaphore can count is as good as no bound.
        let turns = limits.concurrent_calls.clamp(1, Semaphore::MAX_PERMITS);
        Ok(Self { server, limits: limits.clone(), turns: Semaphore::new(turns), network })
    }

    fn call<T, F>(&self, attempt: impl FnMut() -> F) -> Result<T, StorageError>
    where
        F: Future<Output = Result<T, Trouble>>,
    {
        self.network.handle.block_on(async {
            // The semaphore is never closed.
            let _turn = self.turns.acquire().await;
            retry(&self.limits, attempt).await
        })
    }

    async fn put_once(&self, object: &Object, bytes: &Bytes) -> Result<(), Trouble> {
        match self.server.put(object, bytes).await {
            Err(Trouble { error: StorageError::Exists(_), .. }) => {}
            other => return other,
        }
        let length = bytes.len() as u64;
        let is_same = self.server.size(object).await? == length
            && (length == 0 || self.server.read(object, 0, length).await? == *bytes);
        match is_same {
            true => self.server.settle(object).await,
            false => Err(StorageError::Exists(object.clone()).into()),
        }
    }
}

impl<S: Server> Storage for Remote<S> {
    fn place(&self) -> String {
        self.server.place()
    }

    fn remark(&self) -> Option<String> {
        self.server.remark()
    }

    fn put(&self, object: &Object, bytes: &[u8]) -> Result<(), StorageError> {
        object.check_name("store")?;
        let bytes = Bytes::copy_from_slice(bytes);
        self.call(|| self.put_once(object, &bytes))
    }

    fn get(&self, object: &Object, bytes_max: u64) -> Result<Vec<u8>, StorageError> {
        object.check_name("read")?;
        let bytes = self.call(|| self.server.size(object))?;
        if bytes > bytes_max {
            return Err(StorageError::TooBig { object: object.clone(), bytes, bytes_max });
        }
        self.get_range(object, 0, bytes)
    }

    fn read_back(&self, object: &Object, bytes_max: u64) -> Result<Seen, StorageError> {
        object.check_name("read")?;
        let bytes = self.call(|| self.server.size(object))?;
        if bytes > bytes_max {
            return Err(StorageError::TooBig { object: object.clone(), bytes, bytes_max });
        }
        let (mut hasher, mut offset) = (Hasher::default(), 0);
        while offset < bytes {
            let length = READ_BYTES.min(bytes - offset);
            hasher.update(&self.get_range(object, offset, length)?);
            offset += length;
        }
        Ok(Seen { bytes, sha256: hasher.finish() })
    }

    fn get_range(&self, object: &Object, offset: u64, length: u64) -> Result<Vec<u8>, StorageError> {
        object.check_name("read")?;
        // Servers refuse an empty range, and one that begins at the end.
        let size = |length: u64| match length {
            0 => self.call(|| self.server.size(object)).map(|size| (size, Vec::new())),
            _ => self.call(|| self.server.read(object, offset, length)).map(|b| (offset + b.len() as u64, b)),
        };
        let end = offset.checked_add(length).ok_or_else(|| too_short(object, offset, length, u64::MAX))?;
        let (there, bytes) = size(length)?;
        match there < end || bytes.len() as u64 != length {
            true => Err(too_short(object, offset, length, there)),
            false => Ok(bytes),
        }
    }

    fn list(&self, kind: Kind) -> Result<Vec<(String, u64)>, StorageError> {
        if let Some(only) = Object::only(kind) {
            return match self.call(|| self.server.size(&only)) {
                Ok(bytes) => Ok(vec![(only.name, bytes)]),
                Err(StorageError::Missing(_)) => Ok(Vec::new()),
                Err(error) => Err(error),
            };
        }
        let listed = self.call(|| self.server.list(kind))?;
        let named = listed.into_iter().filter_map(|(path, bytes)| {
            let object = Object::new(kind, path.rsplit('/').next().unwrap_or_default());
            (object.is_well_named() && object.path() == path).then_some((object.name, bytes))
        });
        Ok(named.collect())
    }

    fn remove(&self, object: &Object) -> Result<(), StorageError> {
        object.check_name("remove")?;
        self.call(|| self.server.remove(object))
    }
}

/// The thread on which sockets, timers and children live.
#[derive(Debug)]
struct Network {
    handle: Handle,
    /// Ends the thread when it is dropped.
    _alive: oneshot::Sender<()>,
}

impl Network {
    fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().thread_name("storage").build()?;
        let handle = runtime.handle().clone();
        let (alive, ended) = oneshot::channel::<()>();
        std::thread::Builder::new().name("storage".to_owned()).spawn(move || {
            let _ = runtime.block_on(ended);
            // A look-up of a name may hang; nobody waits for it any more.
            runtime.shutdown_background();
        })?;
        Ok(Self { handle, _alive: alive })
    }
}
