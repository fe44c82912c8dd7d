//! Words with a closed list, written one way on the wire, in REST, on the command line and in files.

use std::fmt;
use std::str::FromStr;

/// A text that is not in a word's list.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a {kind}; it must be one of {allowed}")]
pub struct UnknownWord {
    /// What was expected, such as `verb`.
    pub kind: &'static str,
    /// What was given, cut to 64 characters.
    pub text: String,
    /// The list.
    pub allowed: String,
}

macro_rules! words {
    ($(#[$doc:meta])* $name:ident ($kind:literal) { $($(#[$vdoc:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name { $($(#[$vdoc])* $variant,)+ }

        impl $name {
            /// Every word of the list, in its order.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The word as it is written everywhere.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { f.pad(self.as_str()) }
        }

        impl FromStr for $name {
            type Err = UnknownWord;
            fn from_str(text: &str) -> Result<Self, UnknownWord> {
                Self::ALL.iter().copied().find(|word| word.as_str() == text).ok_or_else(|| UnknownWord {
                    kind: $kind,
                    text: text.chars().take(64).collect(),
                    allowed: Self::ALL.iter().map(|word| word.as_str()).collect::<Vec<_>>().join(", "),
                })
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

words! {
    /// What the centre may ask of a service.
    Verb ("verb") {
        /// Take a snapshot and store it.
        Snapshot = "snapshot",
        /// Read a stored artifact back.
        Verify = "verify",
        /// Write a stored artifact to a folder.
        Restore = "restore",
        /// Remove what retention no longer keeps.
        Prune = "prune",
        /// Send log lines.
        Logs = "logs",
        /// Try connectivity and credentials.
        Probe = "probe",
        /// Have the provider make an image of `host`.
        Image = "image",
    }
}

words! {
    /// A grant's value: what the host allows for one service and one verb.
    GrantValue ("grant") {
        /// Refuse. What holds where nothing is written.
        Deny = "deny",
        /// Wait until somebody confirms on the host.
        Confirm = "confirm",
        /// Do it.
        Allow = "allow",
    }
}

words! {
    /// How a service's data relates to one moment; later is stronger.
    Consistency ("consistency") {
        /// A live tree without a point in time.
        None = "none",
        /// One moment, as after a power cut.
        Crash = "crash",
        /// One moment with the filesystem's own buffers written.
        Filesystem = "filesystem",
        /// One moment that the application had prepared for.
        Application = "application",
    }
}

words! {
    /// Where a run stands.
    RunStatus ("run status") {
        /// Asked for, not begun.
        Queued = "queued",
        /// Begun.
        Running = "running",
        /// Ended; everything was read, stored and read back.
        Success = "success",
        /// Ended otherwise.
        Failed = "failed",
    }
}

words! {
    /// Who asked for a run.
    RunKind ("run kind") {
        /// A person or a directive.
        Manual = "manual",
        /// The policy's schedule.
        Cron = "cron",
    }
}

words! {
    /// What a run covers.
    Scope ("scope") {
        /// Files.
        Volume = "volume",
        /// A database or another program's stream.
        Db = "db",
        /// The whole machine.
        Full = "full",
    }
}

words! {
    /// Where a running run is.
    Phase ("phase") {
        /// Hooks prepare the service.
        PreFreeze = "pre_freeze",
        /// The service is quiesced and the point is being taken.
        Frozen = "frozen",
        /// Hooks release the service.
        PostThaw = "post_thaw",
        /// Bytes are read and stored.
        Archive = "archive",
        /// Stored bytes are read back.
        Verify = "verify",
    }
}

words! {
    /// What a missed schedule leads to.
    Misfire ("misfire") {
        /// Wait for the next time.
        Skip = "skip",
        /// Run once, now.
        RunOnce = "run_once",
    }
}

words! {
    /// How far a backup goes behind what else the host does, as a policy may ask for.
    Priority ("priority") {
        /// As the host's settings have it.
        Normal = "normal",
        /// Behind most others.
        Low = "low",
        /// Only when nobody else wants CPU or disk.
        Idle = "idle",
    }
}

words! {
    /// Why a run failed.
    ErrorClass ("error class") {
        /// The host's grants or floors do not allow it.
        Refused = "refused",
        /// A person had to confirm it on the host, and nobody did in time.
        NotConfirmed = "not_confirmed",
        /// The verb is not in the list, or not one that a run can do.
        UnknownVerb = "unknown_verb",
        /// The host's settings name no such service.
        UnknownService = "unknown_service",
        /// The host's settings define no such destination.
        UnknownDestination = "unknown_destination",
        /// The policy switches encryption off and the host does not allow it.
        EncryptionRequired = "encryption_required",
        /// The policy keeps less than the host's floor.
        RetentionBelowFloor = "retention_below_floor",
        /// The policy asks for more effort than the host's floor lets a backup cost.
        EffortRefused = "effort_refused",
        /// Settings, grants or a program can be changed by others.
        UnsafePermissions = "unsafe_permissions",
        /// The host's settings cannot be used.
        SettingsInvalid = "settings_invalid",
        /// Another run of the service is going on, or the bound on concurrent runs is met.
        Busy = "busy",
        /// A hook ended with another code than 0 or could not be started.
        HookFailed = "hook_failed",
        /// A hook did not end in time.
        HookTimeout = "hook_timeout",
        /// The point in time could not be taken.
        PointFailed = "point_failed",
        /// The LVM snapshot ran out of room while it was read, so that it is no point in time any more.
        PointOverflow = "point_overflow",
        /// The service was frozen, or would have been, for longer than its window; the guard thawed it.
        FreezeTimeout = "freeze_timeout",
        /// The kernel did not end a freeze; nobody can cancel it, and it is thawed as soon as it has ended.
        FreezeStuck = "freeze_stuck",
        /// Somebody else had frozen the filesystem already.
        FreezeBusy = "freeze_busy",
        /// The guard died while it watched the point; the runner thawed by itself.
        GuardLost = "guard_lost",
        /// A path of the source does not exist.
        SourceMissing = "source_missing",
        /// An entry of the source could not be read or listed.
        SourceUnreadable = "source_unreadable",
        /// The program that produces the stream failed.
        ProducerFailed = "producer_failed",
        /// The archiver ended in a way that proves nothing.
        ArchiverFailed = "archiver_failed",
        /// Retired: older agents had an archiver beside the worker, which was killed.
        ArchiverKilled = "archiver_killed",
        /// The worker process was killed or ended without a result.
        WorkerKilled = "worker_killed",
        /// The repository's key does not open it.
        RepositoryWrongKey = "repository_wrong_key",
        /// The repository cannot be reached, opened or made.
        RepositoryUnavailable = "repository_unavailable",
        /// The destination has no room.
        DestinationFull = "destination_full",
        /// The agent's state folder has no room.
        StateFull = "state_full",
        /// The agent's state folder or store cannot be used.
        StateUnusable = "state_unusable",
        /// What was stored does not read back as it was written.
        VerifyFailed = "verify_failed",
        /// The run took longer than it may.
        RunTimeout = "run_timeout",
        /// Daemon, runner or machine stopped while the run went on.
        Interrupted = "interrupted",
        /// Somebody cancelled it.
        Cancelled = "cancelled",
    }
}

impl ErrorClass {
    /// Whether the cause is an input, a setting or a resource that an operator has to mend before the
    /// same request can work; commands then exit with 64.
    pub fn needs_operator(self) -> bool {
        !matches!(
            self,
            Self::Busy
                | Self::HookFailed
                | Self::HookTimeout
                | Self::PointFailed
                | Self::PointOverflow
                | Self::FreezeTimeout
                | Self::FreezeStuck
                | Self::FreezeBusy
                | Self::GuardLost
                | Self::ProducerFailed
                | Self::ArchiverFailed
                | Self::ArchiverKilled
                | Self::WorkerKilled
                | Self::VerifyFailed
                | Self::RunTimeout
                | Self::Interrupted
                | Self::Cancelled
        )
    }

    /// What a person should do next.
    pub fn next_step(self) -> &'static str {
        match self {
            Self::Refused => {
                "allow it on the host with `hestner-agent grants allow SERVICE VERB`, if it should be allowed"
            }
            Self::NotConfirmed => {
                "ask again, and have somebody run `hestner-agent confirm RUN` on the host; `hestner-agent confirm --list` shows what waits"
            }
            Self::UnknownVerb => "use one of the verbs that `hestner-agent grants list` shows",
            Self::UnknownService => "name a [[service]] of agent.toml; `hestner-agent status` lists them",
            Self::UnknownDestination => "name a [[destination]] of agent.toml",
            Self::EncryptionRequired => {
                "leave encryption on, or set `allow_unencrypted = true` under [floor] on the host"
            }
            Self::RetentionBelowFloor => "keep at least what [floor] in agent.toml demands",
            Self::EffortRefused => {
                "ask for less, or raise `compression_level_max` under [floor] in agent.toml on the host"
            }
            Self::UnsafePermissions => {
                "give the file and all folders above it to root and take write access from others"
            }
            Self::SettingsInvalid => "mend agent.toml; `hestner-agent status` names every mistake",
            Self::Busy => "wait for the run in progress to end",
            Self::HookFailed => "read the hook's output in the run's log tail and try the hook by hand",
            Self::HookTimeout => "find out why the hook hangs, or raise its `timeout` in agent.toml",
            Self::PointFailed => "read the message; the point command can be tried by hand",
            Self::PointOverflow => {
                "give the snapshot more room with `snapshot_size` in agent.toml, or run it when less is written"
            }
            Self::FreezeTimeout => {
                "find out why the point command, the disk or the runner was slow, or raise `window` under [freeze]"
            }
            Self::FreezeStuck => {
                "look for a disk that does not answer (`dmesg`); `hestner-agent thaw` says when nothing is frozen any more"
            }
            Self::FreezeBusy => {
                "wait until whoever froze it (a hypervisor's guest agent?) has thawed it, and run it again"
            }
            Self::GuardLost => "look for who killed the guard (out of memory?) and run it again",
            Self::SourceMissing => "mend the service's `paths` in agent.toml, or bring the path back",
            Self::SourceUnreadable => "make the named entries readable, or exclude them in agent.toml",
            Self::ProducerFailed => "read the program's output in the run's log tail and try it by hand",
            Self::ArchiverFailed => "read the archiver's output in the run's log tail",
            Self::ArchiverKilled | Self::WorkerKilled => "look for who killed it (out of memory?) and run again",
            Self::RepositoryWrongKey => {
                "bring back the repository's password file, or open the escrowed key with the recovery key"
            }
            Self::RepositoryUnavailable => "check that the destination's folder exists and can be written",
            Self::DestinationFull => "make room at the destination or shorten retention",
            Self::StateFull => "make room in the agent's state folder",
            Self::StateUnusable => "look at the state folder's permissions and disk",
            Self::VerifyFailed => "check the destination's disk; run `restic check --read-data` on the repository",
            Self::RunTimeout => "raise `run_time_max` in agent.toml or make the source smaller",
            Self::Interrupted => "run it again",
            Self::Cancelled => "run it again when it suits",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_survives_its_own_text() {
        for class in ErrorClass::ALL {
            assert_eq!(class.as_str().parse(), Ok(*class));
        }
    }

    #[test]
    fn unknown_word_is_named_with_the_words_that_exist() {
        let error = "format".parse::<Verb>().expect_err("not a verb").to_string();
        assert!(error.contains("`format` is not a verb") && error.contains("snapshot, verify"), "{error}");
    }

    #[test]
    fn consistency_grows_in_its_order() {
        assert!(Consistency::None < Consistency::Crash && Consistency::Filesystem < Consistency::Application);
    }
}
