//! Each look at the source takes a step here first, so that a test can make any of them fail, or act at just that
//! moment. Outside of tests it is nothing.

#[cfg(not(test))]
pub(super) use real::{of_this_thread, step};
#[cfg(test)]
pub(super) use tried::{Plan, of_this_thread, step};

#[cfg(not(test))]
mod real {
    use rustix::io::Errno;

    /// What threads that are started take over.
    #[derive(Clone, Copy, Debug)]
    pub(in super::super) struct Steps;

    /// Before a look.
    #[inline]
    #[expect(clippy::unnecessary_wraps, reason = "in tests it fails")]
    pub(in super::super) fn step() -> Result<(), Errno> {
        Ok(())
    }

    #[inline]
    pub(in super::super) fn of_this_thread() -> Steps {
        Steps
    }

    impl Steps {
        #[inline]
        #[expect(clippy::unused_self, reason = "in tests it is used")]
        pub(in super::super) fn go_on_here(self) {}
    }
}

#[cfg(test)]
mod tried {
    use std::cell::RefCell;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use rustix::io::Errno;

    /// What the chosen step does.
    type Action = Box<dyn Fn() -> Result<(), Errno> + Send + Sync>;

    /// Which step, counted from 1, does what.
    pub(in super::super) struct Plan {
        at: u64,
        action: Action,
        taken: AtomicU64,
    }

    thread_local! {
        static PLAN: RefCell<Option<Arc<Plan>>> = const { RefCell::new(None) };
    }

    #[derive(Clone)]
    pub(in super::super) struct Steps(Option<Arc<Plan>>);

    impl Plan {
        pub(in super::super) fn new(
            at: u64,
            action: impl Fn() -> Result<(), Errno> + Send + Sync + 'static,
        ) -> Arc<Self> {
            Arc::new(Self { at, action: Box::new(action), taken: AtomicU64::new(0) })
        }

        /// Of this thread and those that its store starts.
        pub(in super::super) fn during<T>(self: &Arc<Self>, work: impl FnOnce() -> T) -> T {
            Steps(Some(Arc::clone(self))).go_on_here();
            let done = work();
            Steps(None).go_on_here();
            done
        }

        pub(in super::super) fn was_reached(&self) -> bool {
            self.taken.load(Ordering::SeqCst) >= self.at
        }
    }

    pub(in super::super) fn step() -> Result<(), Errno> {
        let Some(plan) = PLAN.with_borrow(Clone::clone) else { return Ok(()) };
        match plan.taken.fetch_add(1, Ordering::SeqCst) + 1 == plan.at {
            true => (plan.action)(),
            false => Ok(()),
        }
    }

    pub(in super::super) fn of_this_thread() -> Steps {
        Steps(PLAN.with_borrow(Clone::clone))
    }

    impl Steps {
        pub(in super::super) fn go_on_here(self) {
            PLAN.set(self.0);
        }
    }
}
