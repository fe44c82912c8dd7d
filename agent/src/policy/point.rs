//! The words of a service's point in time: its kind, the containers that are held for it, the operator's
//! own commands. Every mistake is named; nothing is looked at.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use toml_example::TomlExample;

use super::{SourceKind, program_mistake};

/// Containers may be stopped, and a copy may take, at most so long.
const DOWNTIME_CEILING: Duration = Duration::from_secs(3600);
/// Containers of one service.
const CONTAINERS_MAX: usize = 64;

/// The point in time of a service.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, TomlExample)]
#[serde(default, deny_unknown_fields)]
pub struct PointSettings {
    /// `auto`: a snapshot where the source lies on btrfs, else none. `none`: hooks and containers only.
    /// `btrfs`, `lvm`, `zfs`: a snapshot of that kind. `reflink`: a copy that shares blocks (xfs, btrfs).
    /// `fsfreeze`: your own `command`, run while the filesystem (ext4, xfs, btrfs) is frozen.
    #[toml_example(default = "auto")]
    pub kind: PointKind,
    /// Docker containers, by name, that are held for the point. One that is paused or stopped stays so.
    #[toml_example(default = [])]
    pub containers: Vec<String>,
    /// `pause`: containers are paused while the point is taken. `stop`: they are stopped; with nothing that
    /// takes a point they stay stopped until everything was read.
    #[toml_example(default = "pause")]
    pub hold: Hold,
    /// How long stopped containers may be down, and how long a `reflink` copy may take; 1 hour at most.
    #[serde(with = "humantime_serde")]
    #[toml_example(default = "5m")]
    pub downtime_max: Duration,
    /// For `fsfreeze`: program and arguments that take the point: of a SAN, a hypervisor, a cloud volume.
    #[toml_example(default = [])]
    pub command: Vec<String>,
    /// For `fsfreeze`: makes the copy readable, such as by mounting it. Runs after the thaw and the hooks.
    #[toml_example(default = [])]
    pub after_command: Vec<String>,
    /// For `fsfreeze`: removes the copy. Runs after every run, also after one that failed.
    #[toml_example(default = [])]
    pub remove_command: Vec<String>,
    /// For `fsfreeze`: where the copy of the filesystem can be read; it stands for the mount point.
    #[toml_example(default = "")]
    pub read_from: PathBuf,
    /// For `lvm`: room for what changes while the snapshot lives: `10%ORIGIN`, or a size such as `2G`.
    #[toml_example(default = "10%ORIGIN")]
    pub snapshot_size: String,
    /// For `lvm`: percent of that room; a snapshot that used more fails the run before it overflows.
    #[toml_example(default = 80)]
    pub cow_usage_max: u8,
}

/// The kinds of [`PointSettings`].
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum PointKind {
    /// A btrfs snapshot where that is possible.
    #[default]
    Auto,
    /// Hooks and containers only.
    None,
    /// Read-only btrfs snapshots.
    Btrfs,
    /// LVM snapshots.
    Lvm,
    /// ZFS snapshots.
    Zfs,
    /// The operator's command on a frozen filesystem.
    Fsfreeze,
    /// A copy that shares blocks.
    Reflink,
}

impl PointKind {
    /// Every kind.
    pub const ALL: &'static [Self] =
        &[Self::Auto, Self::None, Self::Btrfs, Self::Lvm, Self::Zfs, Self::Fsfreeze, Self::Reflink];

    /// As in the settings.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::None => "none",
            Self::Btrfs => "btrfs",
            Self::Lvm => "lvm",
            Self::Zfs => "zfs",
            Self::Fsfreeze => "fsfreeze",
            Self::Reflink => "reflink",
        }
    }
}

/// How containers are held.
#[derive(Clone, Copy, Debug, Default, Deserialize, serde::Serialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Hold {
    /// Their processes do not run, and nothing of them is lost.
    #[default]
    Pause,
    /// They end as at a shutdown.
    Stop,
}

impl Default for PointSettings {
    fn default() -> Self {
        Self {
            kind: PointKind::Auto,
            containers: Vec::new(),
            hold: Hold::Pause,
            downtime_max: Duration::from_secs(300),
            command: Vec::new(),
            after_command: Vec::new(),
            remove_command: Vec::new(),
            read_from: PathBuf::new(),
            snapshot_size: "10%ORIGIN".to_owned(),
            cow_usage_max: 80,
        }
    }
}

impl PointSettings {
    /// The operator's commands, those that are set.
    pub fn commands(&self) -> impl Iterator<Item = &Vec<String>> {
        [&self.command, &self.after_command, &self.remove_command].into_iter().filter(|argv| !argv.is_empty())
    }

    /// Every mistake, each as one sentence.
    pub(super) fn mistakes(&self, source: SourceKind) -> Vec<String> {
        let mut found = Vec::new();
        let mut say = |text: &str| found.push(format!("point: {text}"));
        if source == SourceKind::Command && !matches!(self.kind, PointKind::Auto | PointKind::None) {
            say("a source of kind `command` has no point of its own; leave `kind` out, or set `none`");
        }
        if self.downtime_max.is_zero() || self.downtime_max > DOWNTIME_CEILING {
            say("`downtime_max` must be longer than 0 and at most 1h");
        }
        self.container_mistakes(source).iter().for_each(|text| say(text));
        self.command_mistakes().iter().for_each(|text| say(text));
        if !is_snapshot_size(&self.snapshot_size) {
            say(&format!(
                "`snapshot_size` must read like `10%ORIGIN` (1 to 100), `10%FREE` or `2G`, not `{}`",
                self.snapshot_size
            ));
        }
        if !(1..=100).contains(&self.cow_usage_max) {
            say("`cow_usage_max` is a percentage, 1 to 100");
        }
        let unset = Self::default();
        let of_lvm = self.snapshot_size != unset.snapshot_size || self.cow_usage_max != unset.cow_usage_max;
        if of_lvm && self.kind != PointKind::Lvm {
            say("`snapshot_size` and `cow_usage_max` belong to a point of kind `lvm`");
        }
        found
    }

    fn container_mistakes(&self, source: SourceKind) -> Vec<String> {
        let mut found = Vec::new();
        for (i, name) in self.containers.iter().enumerate() {
            if !is_container_name(name) {
                found.push(format!("`{name}` is not the name of a container"));
            }
            if self.containers[..i].contains(name) {
                found.push(format!("container `{name}` is listed twice"));
            }
        }
        if self.containers.len() > CONTAINERS_MAX {
            found.push(format!("at most {CONTAINERS_MAX} containers can be held"));
        }
        if self.hold == Hold::Stop && self.containers.is_empty() {
            found.push("`hold = \"stop\"` needs `containers`".to_owned());
        }
        let reads_live = self.kind == PointKind::None || source == SourceKind::Command;
        if reads_live && self.hold == Hold::Pause && !self.containers.is_empty() {
            found.push(
                "paused containers run again before anything is read: set `hold = \"stop\"`, or a `kind` that takes a point"
                    .to_owned(),
            );
        }
        found
    }

    fn command_mistakes(&self) -> Vec<String> {
        let mut found = Vec::new();
        let commands = [
            ("command", &self.command),
            ("after_command", &self.after_command),
            ("remove_command", &self.remove_command),
        ];
        found.extend(commands.iter().filter_map(|(key, argv)| program_mistake(key, argv)));
        if self.kind != PointKind::Fsfreeze {
            if self.commands().next().is_some() || !self.read_from.as_os_str().is_empty() {
                found.push(
                    "`command`, `after_command`, `remove_command` and `read_from` belong to a point of kind `fsfreeze`"
                        .to_owned(),
                );
            }
            return found;
        }
        if self.command.is_empty() {
            found.push("a point of kind `fsfreeze` needs `command`, which takes it".to_owned());
        }
        if !self.read_from.is_absolute() {
            found.push(
                "a point of kind `fsfreeze` needs `read_from`, as an absolute path: what cannot be read back is not stored"
                    .to_owned(),
            );
        } else if self.read_from == Path::new("/") {
            found.push("`read_from` must be a folder of its own, not `/`".to_owned());
        }
        found
    }
}

/// As Docker has them.
fn is_container_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.len() <= 255 && name.chars().all(allowed)
}

/// What `lvcreate` takes for `--extents` or `--size` (lvcreate(8)).
fn is_snapshot_size(text: &str) -> bool {
    let whole = |digits: &str, most: u64| digits.parse::<u64>().is_ok_and(|n| (1..=most).contains(&n));
    if let Some((percent, of)) = text.split_once('%') {
        return matches!(of, "ORIGIN" | "FREE" | "VG") && whole(percent, 100);
    }
    text.strip_suffix(['M', 'm', 'G', 'g', 'T', 't']).is_some_and(|digits| whole(digits, 1 << 40))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mistakes(text: &str) -> String {
        let settings: PointSettings = toml::from_str(text).unwrap();
        settings.mistakes(SourceKind::Files).join("\n")
    }

    #[test]
    fn every_mistake_of_a_point_is_named_at_once() {
        let text = "kind = \"fsfreeze\"\ncontainers = [\"a b\", \"db\", \"db\"]\ndowntime_max = \"2h\"\n\
            command = [\"lvcreate\"]\nsnapshot_size = \"lots\"\ncow_usage_max = 0\n";
        let found = mistakes(text);
        for part in ["`a b` is not", "listed twice", "at most 1h", "absolute path, not `lvcreate`", "`read_from`"] {
            assert!(found.contains(part), "{part} is not in:\n{found}");
        }
        for part in ["`snapshot_size` must read like", "percentage", "belong to a point of kind `lvm`"] {
            assert!(found.contains(part), "{part} is not in:\n{found}");
        }
    }

    #[test]
    fn settings_that_would_hold_containers_for_nothing_are_refused() {
        assert!(mistakes("kind = \"none\"\ncontainers = [\"db\"]").contains("run again before anything is read"));
        assert_eq!(mistakes("kind = \"none\"\ncontainers = [\"db\"]\nhold = \"stop\""), "");
        assert_eq!(mistakes("kind = \"lvm\"\ncontainers = [\"db\"]\nsnapshot_size = \"2G\""), "");
        assert!(mistakes("hold = \"stop\"").contains("needs `containers`"));
        assert!(mistakes("read_from = \"/mnt\"").contains("belong to a point of kind `fsfreeze`"));
    }

    #[test]
    fn stream_has_no_point_but_its_containers_may_be_stopped() {
        let of = |text: &str| {
            let settings: PointSettings = toml::from_str(text).unwrap();
            settings.mistakes(SourceKind::Command)
        };
        assert_eq!(of("containers = [\"db\"]\nhold = \"stop\""), Vec::<String>::new());
        assert_eq!(of("kind = \"zfs\"").len(), 1);
        assert_eq!(of("containers = [\"db\"]").len(), 1);
    }

    #[test]
    fn sizes_are_those_that_lvcreate_takes() {
        assert!(["10%ORIGIN", "100%FREE", "2G", "512m", "5%VG"].iter().all(|s| is_snapshot_size(s)));
        assert!(
            ["", "0%ORIGIN", "101%ORIGIN", "10%", "2", "-1G", "2G; rm", "1.5G"].iter().all(|s| !is_snapshot_size(s))
        );
    }
}
