//! Moments of the work on a repository at which a debug build can be made to wait, to fail or to die, so that tests can
//! reach every one of them. Release builds hold none of this.
//!
//! What is to happen stands in `failpoint-worker/orders` in the state folder, beside the folder of keys; it counts only
//! if root, or the agent's one user, alone can write it. A line is `MOMENT ACTION`, and is looked for at each moment:
//!
//! - Moments: `store` (a run's repository is open, nothing is read yet), `commit` (everything was put but the snapshot),
//!   `stored` (the snapshot too; nobody has been told yet), `forget` (before a snapshot is removed), `expire` (before
//!   retention removes anything), and of each process the N-th call of its storage `call-N`, the N-th object that it
//!   puts `put-N`, the N-th pack of them `pack-N`.
//! - Actions: `hold` waits as long as the line is there, and so does every later call, put or pack; `fail` is an error of
//!   the storage; `kill` and `stop` are signals to the own process. With `once` behind it only whoever comes first does
//!   it.
//!
//! Whoever does one leaves the file `reached-MOMENT`, and every process writes its moments into `log`, where there is
//! the folder.

use std::path::Path;
use std::sync::Arc;

use super::RepositoryError;
use crate::storage::Storage;

#[cfg(debug_assertions)]
mod armed {
    use std::fs::OpenOptions;
    use std::io::Write as _;
    use std::path::{Path, PathBuf};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use nix::sys::signal::{Signal, raise};

    use crate::platform::trust;
    use crate::storage::{Kind, Object, Seen, Storage, StorageError};

    /// How often whoever waits looks whether it is still to wait.
    const PAUSE: Duration = Duration::from_millis(20);
    const ORDERS_BYTES_MAX: u64 = 4096;

    /// Calls of this process so far: all of them, what was put, packs.
    static CALLS: AtomicU64 = AtomicU64::new(0);
    static PUTS: AtomicU64 = AtomicU64::new(0);
    static PACKS: AtomicU64 = AtomicU64::new(0);

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Action {
        Hold,
        Fail,
        Kill,
        Stop,
    }

    #[derive(Clone, Debug, PartialEq, Eq)]
    struct Order {
        moment: String,
        action: Action,
        once: bool,
    }

    impl Order {
        fn parse(line: &str) -> Option<Self> {
            let mut words = line.split(' ');
            let (moment, action) = (words.next()?, words.next()?);
            let action = match action {
                "hold" => Action::Hold,
                "fail" => Action::Fail,
                "kill" => Action::Kill,
                "stop" => Action::Stop,
                _ => return None,
            };
            Some(Self { moment: moment.to_owned(), action, once: words.next() == Some("once") })
        }

        /// Whether it is for that moment; who waits at a number waits at all higher ones.
        fn is_for(&self, moment: &str) -> bool {
            let numbered = |text: &str| {
                let (name, number) = text.split_once('-')?;
                Some((name.to_owned(), number.parse::<u64>().ok()?))
            };
            match (self.action, numbered(&self.moment), numbered(moment)) {
                (Action::Hold, Some((name, from)), Some((other, number))) => name == other && number >= from,
                _ => self.moment == moment,
            }
        }
    }

    /// The folder of orders.
    #[derive(Clone, Debug)]
    pub(super) struct Orders(PathBuf);

    impl Orders {
        pub(super) fn beside(keys: &Path) -> Self {
            Self(keys.with_file_name("failpoint-worker"))
        }

        pub(super) fn are_watched(&self) -> bool {
            self.0.is_dir()
        }

        pub(super) fn note(&self, text: &str) {
            let line = format!("{} {text}\n", std::process::id());
            // At one stroke, so that lines of two processes do not mix. A test that misses it says so.
            let log = OpenOptions::new().append(true).create(true).open(self.0.join("log"));
            let _ = log.and_then(|mut log| log.write_all(line.as_bytes()));
        }

        fn find(&self, moment: &str) -> Option<Order> {
            let text = trust::read_text(&self.0.join("orders"), ORDERS_BYTES_MAX).ok()?;
            text.lines().filter_map(Order::parse).find(|order| order.is_for(moment))
        }

        /// What is to be done now. Each is asked for only once where it is to happen once.
        fn take(&self, moment: &str) -> Option<Order> {
            let order = self.find(moment)?;
            let mark = self.0.join(format!("reached-{}", order.moment));
            let is_first = OpenOptions::new().write(true).create_new(true).open(mark).is_ok();
            (is_first || !order.once).then_some(order)
        }

        fn act(&self, order: &Order, what: &str) -> Result<(), StorageError> {
            match order.action {
                Action::Hold => {}
                Action::Fail => {
                    let reason = format!("it was asked to fail at {}", order.moment);
                    return Err(StorageError::Failed { operation: "reach", what: what.to_owned(), reason });
                }
                // Neither can fail, and a test that waits for it would say so.
                Action::Kill => drop(raise(Signal::SIGKILL)),
                Action::Stop => drop(raise(Signal::SIGSTOP)),
            }
            Ok(())
        }

        fn holds(&self, order: &Order, moment: &str) -> bool {
            order.action == Action::Hold && self.find(moment).is_some_and(|still| still == *order)
        }

        /// On the way of a task: whoever cancels it need not wait.
        pub(super) async fn at(&self, moment: &str) -> Result<(), StorageError> {
            if !self.are_watched() {
                return Ok(());
            }
            self.note(moment);
            let Some(order) = self.take(moment) else { return Ok(()) };
            while self.holds(&order, moment) {
                tokio::time::sleep(PAUSE).await;
            }
            self.act(&order, moment)
        }

        fn at_blocking(&self, moment: &str, what: &str) -> Result<(), StorageError> {
            let Some(order) = self.take(moment) else { return Ok(()) };
            while self.holds(&order, moment) {
                std::thread::sleep(PAUSE);
            }
            self.act(&order, what)
        }
    }

    /// A place whose calls are moments.
    #[derive(Debug)]
    pub(super) struct Watched {
        pub(super) inner: Arc<dyn Storage>,
        pub(super) orders: Orders,
    }

    impl Watched {
        fn call(&self, operation: &str, what: &str) -> Result<(), StorageError> {
            let number = next(&CALLS);
            self.orders.note(&format!("call-{number} {operation} {what}"));
            self.orders.at_blocking(&format!("call-{number}"), &format!("{operation} {what}"))
        }

        fn step(&self, moment: &str, object: &Object) -> Result<(), StorageError> {
            self.orders.note(moment);
            self.orders.at_blocking(moment, &object.to_string())
        }
    }

    fn next(counter: &AtomicU64) -> u64 {
        counter.fetch_add(1, Ordering::SeqCst) + 1
    }

    impl Storage for Watched {
        fn place(&self) -> String {
            self.inner.place()
        }

        fn remark(&self) -> Option<String> {
            self.inner.remark()
        }

        fn put(&self, object: &Object, bytes: &[u8]) -> Result<(), StorageError> {
            self.call("put", &object.to_string())?;
            self.step(&format!("put-{}", next(&PUTS)), object)?;
            match object.kind {
                Kind::Pack => self.step(&format!("pack-{}", next(&PACKS)), object)?,
                Kind::Snapshot => self.step("commit", object)?,
                Kind::Config | Kind::WrappedKey | Kind::Key | Kind::Lock | Kind::Index => {}
            }
            self.inner.put(object, bytes)
        }

        fn get(&self, object: &Object, bytes_max: u64) -> Result<Vec<u8>, StorageError> {
            self.call("get", &object.to_string())?;
            self.inner.get(object, bytes_max)
        }

        fn read_back(&self, object: &Object, bytes_max: u64) -> Result<Seen, StorageError> {
            self.call("read back", &object.to_string())?;
            self.inner.read_back(object, bytes_max)
        }

        fn get_range(&self, object: &Object, offset: u64, length: u64) -> Result<Vec<u8>, StorageError> {
            self.call("get", &object.to_string())?;
            self.inner.get_range(object, offset, length)
        }

        fn list(&self, kind: Kind) -> Result<Vec<(String, u64)>, StorageError> {
            self.call("list", &format!("{kind:?}"))?;
            self.inner.list(kind)
        }

        fn remove(&self, object: &Object) -> Result<(), StorageError> {
            self.call("remove", &object.to_string())?;
            if object.kind == Kind::Snapshot {
                self.step("forget", object)?;
            }
            self.inner.remove(object)
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use crate::storage::Folder;

        fn with_orders(orders: &str) -> (tempfile::TempDir, Orders) {
            // Nobody but us may be able to write it; the folder for temporary files can be written by all.
            let temp = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
            let folder = Orders::beside(&temp.path().join("keys"));
            std::fs::create_dir(&folder.0).unwrap();
            crate::platform::files::write(&folder.0.join("orders"), orders.as_bytes(), 0o600).unwrap();
            (temp, folder)
        }

        #[test]
        fn order_is_for_its_moment_and_a_hold_for_all_after_it() {
            let order = |line: &str| Order::parse(line).unwrap();
            assert!(order("call-3 fail once").is_for("call-3"));
            assert!(!order("call-3 fail once").is_for("call-4"));
            assert!(order("call-3 hold").is_for("call-4"));
            assert!(!order("call-3 hold").is_for("call-2"));
            assert!(!order("call-3 hold").is_for("put-4"));
            assert!(order("store hold").is_for("store"));
            assert_eq!(Order::parse("store nothing"), None);
        }

        #[test]
        fn what_is_to_happen_once_happens_to_the_first_one() {
            let (_temp, orders) = with_orders("stored fail once\nforget fail\n");
            for (moment, again) in [("stored", false), ("forget", true)] {
                assert!(orders.at_blocking(moment, "x").is_err());
                assert_eq!(orders.at_blocking(moment, "x").is_err(), again, "{moment}");
            }
            assert!(orders.at_blocking("store", "x").is_ok());
        }

        #[test]
        fn snapshot_is_put_and_removed_at_moments_of_their_own() {
            let (temp, orders) = with_orders("commit fail\n");
            let folder = Folder::create(&temp.path().join("repository")).unwrap();
            let storage = Watched { inner: Arc::new(folder), orders: orders.clone() };
            let object = |kind| Object::new(kind, "0".repeat(64));
            assert!(storage.put(&object(Kind::Snapshot), b"x").is_err());
            assert!(storage.put(&object(Kind::Index), b"x").is_ok());
            assert!(storage.list(Kind::Snapshot).unwrap().is_empty());
            storage.remove(&object(Kind::Snapshot)).unwrap();
            let log = std::fs::read_to_string(orders.0.join("log")).unwrap();
            assert_eq!(log.lines().filter(|line| line.ends_with(" commit") || line.ends_with(" forget")).count(), 2);
        }
    }
}

/// Where the orders of a repository's processes are.
#[derive(Clone, Debug)]
pub struct Failpoints {
    #[cfg(debug_assertions)]
    orders: armed::Orders,
}

impl Failpoints {
    /// Of a repository whose password lies in the folder `keys`.
    pub fn beside(keys: &Path) -> Self {
        #[cfg(not(debug_assertions))]
        let _ = keys;
        Self {
            #[cfg(debug_assertions)]
            orders: armed::Orders::beside(keys),
        }
    }

    /// A worker begins this work.
    pub fn begin(&self, work: &str) {
        #[cfg(debug_assertions)]
        if self.orders.are_watched() {
            self.orders.note(&format!("begin {work}"));
        }
        #[cfg(not(debug_assertions))]
        let _ = work;
    }

    /// A moment. Nothing happens unless a debug build was told so.
    ///
    /// # Errors
    /// When it was told to fail.
    pub async fn at(&self, moment: &str) -> Result<(), RepositoryError> {
        #[cfg(debug_assertions)]
        self.orders.at(moment).await.map_err(|error| RepositoryError::from(super::open::ArchiveError::from(error)))?;
        #[cfg(not(debug_assertions))]
        let _ = moment;
        Ok(())
    }

    /// Makes the calls of a place moments.
    pub fn around(self, storage: Arc<dyn Storage>) -> Arc<dyn Storage> {
        #[cfg(debug_assertions)]
        if self.orders.are_watched() {
            return Arc::new(armed::Watched { inner: storage, orders: self.orders });
        }
        storage
    }
}
