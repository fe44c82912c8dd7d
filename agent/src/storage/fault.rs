//! Places that fail, for tests, around any other place: at a chosen call ([`Faulty`]), or by what they allow
//! (`Denying`).
//!
//! Calls are counted from 1, whatever they are. A call that fails can do so before or after its work, as a lost
//! answer would. Never part of a run.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use super::{Kind, Object, Seen, Storage, StorageError, failed};

/// What the chosen call does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails without an effect.
    Fail,
    /// It has its effect and fails.
    FailAfter,
    /// There is no room.
    Full,
    /// It waits until [`Faulty::release`], and then fails.
    Hang,
    /// It panics.
    Panic,
    /// The action of [`Faulty::doing`] comes first, and then the call goes on: something happens at just this moment.
    Act,
    /// The action comes when the call has had its effect.
    ActAfter,
}

/// What happens at the chosen call.
struct Action(Box<dyn Fn() + Send + Sync>);

impl std::fmt::Debug for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Action")
    }
}

/// A place with a fault.
#[derive(Debug)]
pub struct Faulty<S> {
    inner: S,
    at: u64,
    fault: Fault,
    /// Whether every call from the chosen one on does it.
    goes_on: bool,
    action: Action,
    calls: AtomicU64,
    has_hung: AtomicBool,
    released: (Mutex<bool>, Condvar),
}

impl<S: Storage> Faulty<S> {
    /// The `at`-th call has the fault, counted from 1; 0: none has.
    pub fn new(inner: S, at: u64, fault: Fault) -> Self {
        Self {
            inner,
            at,
            fault,
            goes_on: false,
            action: Action(Box::new(|| {})),
            calls: AtomicU64::new(0),
            has_hung: AtomicBool::new(false),
            released: (Mutex::new(false), Condvar::new()),
        }
    }

    /// All calls after it have the fault too, as when a disk is gone.
    #[must_use]
    pub fn and_all_after(mut self) -> Self {
        self.goes_on = true;
        self
    }

    /// What [`Fault::Act`] and [`Fault::ActAfter`] do.
    #[must_use]
    pub fn doing(mut self, action: impl Fn() + Send + Sync + 'static) -> Self {
        self.action = Action(Box::new(action));
        self
    }

    /// How many calls there were.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    /// Whether the chosen call came.
    pub fn was_reached(&self) -> bool {
        self.at != 0 && self.calls() >= self.at
    }

    /// Whether a call hangs or has hung.
    pub fn has_hung(&self) -> bool {
        self.has_hung.load(Ordering::SeqCst)
    }

    /// Ends the hanging of calls.
    pub fn release(&self) {
        *self.released.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.released.1.notify_all();
    }

    /// The place itself.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    fn call<T>(
        &self,
        operation: &'static str,
        object: Option<&Object>,
        work: impl FnOnce() -> Result<T, StorageError>,
    ) -> Result<T, StorageError> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let is_chosen = self.at != 0 && (call == self.at || self.goes_on && call > self.at);
        if !is_chosen {
            return work();
        }
        let what = object.map_or_else(|| "a folder".to_owned(), Object::to_string);
        let error = || failed(operation, &what, format!("call {call} was asked to fail"));
        match (self.fault, object) {
            (Fault::Full, Some(object)) => Err(StorageError::Full(object.clone())),
            (Fault::Fail | Fault::Full, _) => Err(error()),
            (Fault::FailAfter, _) => work().and_then(|_| Err(error())),
            (Fault::Hang, _) => {
                self.has_hung.store(true, Ordering::SeqCst);
                let mut released = self.released.0.lock().unwrap_or_else(PoisonError::into_inner);
                while !*released {
                    released = self.released.1.wait(released).unwrap_or_else(PoisonError::into_inner);
                }
                Err(error())
            }
            (Fault::Act, _) => {
                (self.action.0)();
                work()
            }
            (Fault::ActAfter, _) => {
                let done = work();
                (self.action.0)();
                done
            }
            (Fault::Panic, _) => panic!("call {call} was asked to panic: {operation} {what}"),
        }
    }
}

impl<S: Storage> Storage for Faulty<S> {
    fn place(&self) -> String {
        self.inner.place()
    }

    fn remark(&self) -> Option<String> {
        self.inner.remark()
    }

    fn put(&self, object: &Object, bytes: &[u8]) -> Result<(), StorageError> {
        self.call("store", Some(object), || self.inner.put(object, bytes))
    }

    fn get(&self, object: &Object, bytes_max: u64) -> Result<Vec<u8>, StorageError> {
        self.call("read", Some(object), || self.inner.get(object, bytes_max))
    }

    fn read_back(&self, object: &Object, bytes_max: u64) -> Result<Seen, StorageError> {
        self.call("read", Some(object), || self.inner.read_back(object, bytes_max))
    }

    fn get_range(&self, object: &Object, offset: u64, length: u64) -> Result<Vec<u8>, StorageError> {
        self.call("read", Some(object), || self.inner.get_range(object, offset, length))
    }

    fn list(&self, kind: Kind) -> Result<Vec<(String, u64)>, StorageError> {
        self.call("list", None, || self.inner.list(kind))
    }

    fn remove(&self, object: &Object) -> Result<(), StorageError> {
        self.call("remove", Some(object), || self.inner.remove(object))
    }
}

/// A place that denies some puts and removals, as a disk that is mounted read-only or credentials that only put do.
#[cfg(test)]
pub(crate) struct Denying<S> {
    pub(crate) inner: S,
    pub(crate) may_put: fn(&S, &Object) -> bool,
    pub(crate) may_remove: fn(&Object) -> bool,
}

#[cfg(test)]
impl<S> std::fmt::Debug for Denying<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Denying")
    }
}

#[cfg(test)]
impl<S: Storage> Storage for Denying<S> {
    fn place(&self) -> String {
        self.inner.place()
    }

    fn put(&self, object: &Object, bytes: &[u8]) -> Result<(), StorageError> {
        assert!(!bytes.is_empty(), "nobody puts nothing");
        match (self.may_put)(&self.inner, object) {
            true => self.inner.put(object, bytes),
            false => Err(failed("store", object, "access denied")),
        }
    }

    fn get(&self, object: &Object, bytes_max: u64) -> Result<Vec<u8>, StorageError> {
        self.inner.get(object, bytes_max)
    }

    fn get_range(&self, object: &Object, offset: u64, length: u64) -> Result<Vec<u8>, StorageError> {
        self.inner.get_range(object, offset, length)
    }

    fn list(&self, kind: Kind) -> Result<Vec<(String, u64)>, StorageError> {
        self.inner.list(kind)
    }

    fn remove(&self, object: &Object) -> Result<(), StorageError> {
        match (self.may_remove)(object) {
            true => self.inner.remove(object),
            false => Err(failed("remove", object, "access denied")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Folder;

    fn config() -> Object {
        Object::new(Kind::Config, "config")
    }

    fn faulty(at: u64, fault: Fault) -> (tempfile::TempDir, Faulty<Folder>) {
        let temp = tempfile::tempdir().unwrap();
        let folder = Folder::open(temp.path()).unwrap();
        (temp, Faulty::new(folder, at, fault))
    }

    #[test]
    fn only_the_chosen_call_fails() {
        let (_temp, storage) = faulty(2, Fault::Fail);
        assert!(storage.list(Kind::Key).is_ok());
        assert!(storage.put(&config(), b"x").is_err());
        assert!(storage.put(&config(), b"x").is_ok());
        assert!(storage.was_reached());
        assert_eq!(storage.calls(), 3);
    }

    #[test]
    fn lost_answer_leaves_the_object() {
        let (_temp, storage) = faulty(1, Fault::FailAfter);
        assert!(storage.put(&config(), b"x").is_err());
        assert_eq!(storage.get(&config(), 10).unwrap(), b"x");
    }

    #[test]
    fn hanging_call_ends_when_it_is_released() {
        let (_temp, storage) = faulty(1, Fault::Hang);
        std::thread::scope(|scope| {
            let call = scope.spawn(|| storage.put(&config(), b"x"));
            while !storage.has_hung() {
                std::thread::yield_now();
            }
            storage.release();
            assert!(call.join().unwrap().is_err());
        });
        assert!(storage.inner().list(Kind::Config).unwrap().is_empty());
    }
}
