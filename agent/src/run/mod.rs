//! A run: hooks, the point in time, the archive, the result.
//!
//! | part | process | for what |
//! | --- | --- | --- |
//! | [`machine`] | | what follows what, as pure code; its picture is in `docs/run-states.md` |
//! | [`plan`] | runner | what a run will do, and every reason not to |
//! | [`privileges`] | runner | the capabilities that it keeps |
//! | [`runner`], `driver` | runner | performs it and keeps the record |
//! | [`confirmation`] | command line, runner | a person's word for a run that the grants want confirmed |
//! | [`hook`] | supervisor | runs one command and leaves no process behind |
//! | [`fence`] | runner | the bounds that the kernel keeps for workers |
//! | [`worker`], `archive` | worker | everything that touches a repository |
//! | [`ledger`], [`settle`] | runner | notes of what was made, and recovery by them |
//! | [`thaw`] | command line, runner | releases what a run left held, without its runner |
//! | [`launcher`] | daemon | starts a runner and passes on what it says |
//! | [`messages`] | | what these processes say to each other |
//!
//! The run never speaks to the centre, and it takes nothing from the daemon but a run id, a service and a
//! verb. What it stores goes through the repository's commit gate; what it tells goes into one record.

mod archive;
pub mod confirmation;
mod driver;
pub mod fence;
pub mod launcher;
pub mod ledger;
mod log;
pub mod machine;
pub mod messages;
pub mod plan;
pub mod privileges;
pub mod runner;
pub mod settle;
pub mod thaw;
pub mod worker;

pub use crate::hook;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    /// What holds two things apart, as the table in `docs/run-states.md` names it; where that is in the
    /// code, and how it is written there.
    const APART: &[(&str, &str, &str)] = &[
        (".services/<service>", include_str!("ledger.rs"), "self.0.join(\".services\")"),
        ("alive", include_str!("ledger.rs"), "try_lock(&self.0.join(\"alive\"))"),
        ("thawing", include_str!("ledger.rs"), "try_lock(&self.0.join(\"thawing\"))"),
        ("released-N", include_str!("ledger.rs"), "create_new(&self.0.join(format!(\"released-{hook}\"))"),
        ("result.json", include_str!("ledger.rs"), "\"result.json\""),
        ("expired", include_str!("ledger.rs"), "create_new(&self.0.join(\"expired\")"),
        ("container-N", include_str!("../freeze/containers.rs"), "container-{place}"),
        ("O_EXCL", include_str!("../platform/files.rs"), ".create_new(true)"),
        ("freeze.journal", include_str!("../freeze/mod.rs"), "\"freeze.journal\""),
        ("hold.journal", include_str!("../freeze/mod.rs"), "\"hold.journal\""),
        ("hook.journal", include_str!("../freeze/mod.rs"), "\"hook.journal\""),
        ("begun-N", include_str!("ledger.rs"), "try_lock(&self.0.join(format!(\"begun-{hook}\"))"),
        ("freeze_busy", include_str!("../freeze/error.rs"), "Busy { .. } => ErrorClass::FreezeBusy"),
        ("busy", include_str!("runner.rs"), "ErrorClass::Busy"),
        ("lock_wait", include_str!("../repository/own.rs"), "location.lock_wait_seconds"),
        (".confirmed/<run>", include_str!("confirmation.rs"), "runs.join(\".confirmed\")"),
        ("daemon/lock", include_str!("../daemon/mod.rs"), "try_lock(&own.join(\"lock\"))"),
        ("daemon/identity", include_str!("../identity.rs"), "\"identity\""),
        ("server.json", include_str!("../identity.rs"), "\"server.json\""),
        ("hestner-agent thaw --wait", include_str!("../../../packaging/agent/prerm"), "hestner-agent thaw --wait"),
        ("/proc/self/exe", include_str!("../platform/command.rs"), "\"/proc/self/exe\""),
    ];

    #[test]
    fn table_of_who_may_run_beside_whom_names_what_is_in_the_code() {
        let page = include_str!("../../../docs/run-states.md");
        let (_, table) = page.split_once("## Who may run beside whom").unwrap();
        let cells = table.lines().filter(|line| line.starts_with("| ")).skip(2);
        let last = cells.filter_map(|line| line.trim_end_matches(" |").rsplit(" | ").next());
        let named: BTreeSet<&str> = last.flat_map(|cell| cell.split('`').skip(1).step_by(2)).collect();
        let known: BTreeSet<&str> = APART.iter().map(|(name, ..)| *name).collect();
        assert_eq!(named, known, "the table and this list must name the same");
        for (name, source, text) in APART {
            assert!(source.contains(text), "`{name}`: the code does not hold `{text}` any more");
        }
    }
}
