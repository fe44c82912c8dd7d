//! What a runner may do: the capabilities that the configured kinds need, and no others.
//!
//! In: the services of the settings. Out: capabilities, each for a reason. The unit's own list
//! (`systemd/hestner-run@.service`) is the most that can be needed; a runner lays down the rest for good before it
//! does anything else. Whether it may be asked to do something is not decided here.

use std::collections::HashSet;

use caps::Capability::{self, *};

use super::ledger::Ledger;
use super::plan::Host;
use crate::platform::capabilities;
use crate::policy::{PointKind, ServiceSettings, SourceKind};

/// Customers' files are read whoever owns them, without changing when they were last read (`O_NOATIME`), and with their
/// `trusted.*` attributes, which the kernel shows to nobody else; the state and repositories are written in folders
/// of other owners. The last one also mounts: the view that the archiver has, snapshots, the runner's own thaw.
const ALWAYS: &[Capability] = &[CAP_DAC_READ_SEARCH, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_SYS_ADMIN];
/// Copies keep owner, mode, set-id bits, file capabilities, and devices.
const COPIES: &[Capability] = &[CAP_CHOWN, CAP_FSETID, CAP_SETFCAP, CAP_MKNOD];
/// LVM locks its memory and raises its priority while a volume is suspended.
const VOLUMES: &[Capability] = &[CAP_IPC_LOCK, CAP_SYS_NICE, CAP_SYS_RESOURCE];
/// The host's own programs run as the user that is named, are killed as such, and may write to the audit log
/// (`runuser`).
const PROGRAMS: &[Capability] = &[CAP_SETUID, CAP_SETGID, CAP_KILL, CAP_AUDIT_WRITE];

/// Lays down what nothing in the settings needs. Before there is a second thread.
///
/// # Errors
/// As a sentence, when the kernel refuses.
pub fn lay_down_what_is_not_needed(host: &Host) -> Result<(), String> {
    // What an earlier run has left may be of a kind that the settings do not name any more.
    let is_settled = Ledger::of(&host.state_dir).unsettled().is_ok_and(|runs| runs.is_empty());
    if !is_settled {
        return Ok(());
    }
    let needed = host.services.iter().flat_map(needed_by).chain(ALWAYS.iter().copied()).collect();
    capabilities::keep_for_good(&needed).map_err(|error| format!("cannot lay down capabilities: {error}"))
}

fn needed_by(service: &ServiceSettings) -> HashSet<Capability> {
    let has_programs = service.hooks.iter().any(|hook| !hook.pre_freeze.is_empty() || !hook.post_thaw.is_empty())
        || service.source.kind == SourceKind::Command
        || service.point.commands().next().is_some();
    // Programs of the host's own may do whatever a copy or LVM does: nobody here knows them.
    let kinds: &[&[Capability]] = match service.point.kind {
        _ if has_programs => &[COPIES, VOLUMES, PROGRAMS],
        PointKind::None | PointKind::Auto | PointKind::Btrfs | PointKind::Zfs | PointKind::Fsfreeze => &[],
        PointKind::Reflink => &[COPIES],
        PointKind::Lvm => &[VOLUMES],
    };
    kinds.iter().copied().flatten().copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(text: &str) -> ServiceSettings {
        let head = "name = \"docs\"\ndestination = \"local\"\n[source]\nkind = \"files\"\npaths = [\"/srv\"]\n";
        toml::from_str(&format!("{head}{text}")).unwrap()
    }

    fn needed(text: &str) -> HashSet<Capability> {
        needed_by(&service(text))
    }

    #[test]
    fn kind_has_what_it_needs_and_no_more() {
        let all = |parts: &[&[Capability]]| parts.iter().copied().flatten().copied().collect::<HashSet<_>>();
        assert_eq!(needed("[point]\nkind = \"none\""), all(&[]));
        assert_eq!(needed("[point]\nkind = \"btrfs\""), all(&[]));
        assert_eq!(needed("[point]\nkind = \"reflink\""), all(&[COPIES]));
        assert_eq!(needed("[point]\nkind = \"lvm\""), all(&[VOLUMES]));
        let hook = "[[hook]]\nname = \"db\"\npre_freeze = [\"/bin/true\"]";
        assert_eq!(needed(hook), all(&[COPIES, VOLUMES, PROGRAMS]));
    }

    #[test]
    fn unit_allows_all_that_can_be_needed_and_nothing_else() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../systemd/hestner-run@.service");
        let unit = std::fs::read_to_string(path).unwrap();
        let lines = unit.lines().filter_map(|line| line.strip_prefix("CapabilityBoundingSet="));
        let allowed: HashSet<Capability> =
            lines.flat_map(str::split_whitespace).map(|word| word.parse().unwrap()).collect();
        let most = [ALWAYS, COPIES, VOLUMES, PROGRAMS, &[CAP_SETPCAP]];
        assert_eq!(allowed, most.iter().copied().flatten().copied().collect());
    }
}
