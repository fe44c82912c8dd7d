//! Capabilities that a process gives up (capabilities(7)).
//!
//! They belong to a thread and are inherited by what it starts: whoever gives some up does so before there is a
//! second thread. Nothing here knows what they are for.

use std::collections::HashSet;

use caps::errors::CapsError;
use caps::{CapSet, Capability, CapsHashSet};

/// Lays down every capability of this thread but these. A program that it starts as root has all of the bounding
/// set again, unless it may gain no privileges.
///
/// # Errors
/// When the kernel refuses.
pub fn keep(kept: &HashSet<Capability>) -> Result<(), CapsError> {
    let left: CapsHashSet = caps::read(None, CapSet::Permitted)?.intersection(kept).copied().collect();
    caps::set(None, CapSet::Inheritable, &CapsHashSet::new())?;
    caps::set(None, CapSet::Effective, &left)?;
    caps::set(None, CapSet::Permitted, &left)
}

/// The same for good: what it starts cannot have them back either, as far as `CAP_SETPCAP` is there to say so.
///
/// # Errors
/// When the kernel refuses.
pub fn keep_for_good(kept: &HashSet<Capability>) -> Result<(), CapsError> {
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        for gone in caps::read(None, CapSet::Bounding)?.difference(kept) {
            caps::drop(None, CapSet::Bounding, *gone)?;
        }
    }
    keep(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_up_is_gone_for_this_thread_and_what_it_starts() {
        let kept = HashSet::from([Capability::CAP_DAC_OVERRIDE]);
        let is_root = nix::unistd::geteuid().is_root();
        // A thread of its own: the others of this process keep theirs.
        let left = std::thread::spawn(move || {
            keep_for_good(&kept).unwrap();
            [CapSet::Permitted, CapSet::Effective, CapSet::Bounding].map(|set| caps::read(None, set).unwrap())
        });
        let [permitted, effective, bounding] = left.join().unwrap();
        assert!(permitted.is_subset(&HashSet::from([Capability::CAP_DAC_OVERRIDE])), "{permitted:?}");
        assert_eq!(permitted, effective);
        assert!(!is_root || bounding == permitted, "{bounding:?}");
    }
}
