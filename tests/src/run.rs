//! Runs as the agent's command line prints them, and `snapshot` commands on their way.
//!
//! In: the JSON of `snapshot`, `runs` and the like. Out: fields by name, and assertions that show the whole
//! run when they fail.

use serde_json::Value;

use crate::command::{Ended, Started};

/// A `snapshot` command on its way.
pub struct Snapshotting(pub(crate) Started);

impl Snapshotting {
    /// The command's end, whatever it is.
    pub fn ended(self) -> Ended {
        self.0.ended()
    }

    /// The run that it printed.
    pub fn run(self) -> Run {
        Run(self.0.ended().any_json())
    }
}

/// A run as `--json` prints it.
#[derive(Clone, Debug)]
pub struct Run(pub Value);

impl Run {
    /// A text field; empty when it is missing.
    pub fn text(&self, field: &str) -> &str {
        self.0[field].as_str().unwrap_or_default()
    }

    /// A number field.
    ///
    /// # Panics
    /// When it is missing.
    pub fn number(&self, field: &str) -> u64 {
        self.0[field].as_u64().unwrap_or_else(|| panic!("no {field} in {}", self.0))
    }

    /// Its uid.
    ///
    /// # Panics
    /// When it has none.
    pub fn uid(&self) -> &str {
        let uid = self.text("run_uid");
        assert!(!uid.is_empty(), "no run_uid in {}", self.0);
        uid
    }

    /// The restic snapshot that its `artifact_url` names.
    ///
    /// # Panics
    /// When it names none.
    pub fn snapshot_id(&self) -> String {
        let url = self.text("artifact_url");
        let (_, id) = url.rsplit_once('/').unwrap_or_else(|| panic!("no artifact in {}", self.0));
        id.to_owned()
    }

    /// Asserts that it failed, and why.
    ///
    /// # Panics
    /// When it did not, or for another reason.
    pub fn assert_failed(&self, class: &str) {
        assert_eq!((self.text("status"), self.text("error_class")), ("failed", class), "{}", self.0);
        assert!(!self.text("error_message").is_empty(), "a failed run says what happened: {}", self.0);
        assert_eq!(self.text("artifact_url"), "", "a failed run has no artifact: {}", self.0);
    }
}
