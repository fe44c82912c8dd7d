//! LVM snapshots: atomic by themselves (the kernel freezes the filesystem while the volume is suspended), so
//! nothing else may be frozen around them.
//!
//! In: volumes that hold the source. Out: snapshots `hestner-<run id>-<n>`, mounted read-only for the
//! archive. A snapshot of an ordinary volume has room for changes only up to a size; one that used more than
//! its limit fails the run, and so does one that the kernel has made invalid.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::view::{self, View};
use super::{Bind, PointError, Settings};
use crate::platform::command::{Limits, Program};
use crate::platform::mounts::{self, Device, Mounts};
use crate::policy::PointSettings;

/// How long one command may take; suspending a volume waits for its writes.
const COMMAND_SECONDS: u64 = 60;
/// What is asked of `lvs`, always the same.
const FIELDS: &str =
    "vg_name,lv_name,lv_path,lv_attr,lv_layout,lv_kernel_major,lv_kernel_minor,pool_lv,data_percent,metadata_percent";

/// A snapshot, made or to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LvmSnapshot {
    /// The volume group.
    pub group: String,
    /// The volume that is snapshotted.
    pub volume: String,
    /// The snapshot's name.
    pub name: String,
    /// The thin pool, whose room it shares; empty: it has room of its own.
    pub pool: String,
    /// As `lvcreate` takes it.
    pub size: String,
    /// Percent of its room that it may use.
    pub usage_max: u8,
    /// The program that resumes the volume; in the note, because whoever thaws reads no settings.
    #[serde(default = "dmsetup")]
    pub dmsetup: PathBuf,
    /// Where and how it is mounted to be read.
    pub view: View,
}

/// Plans a snapshot of each volume that holds a path.
pub(super) async fn plan(
    paths: &[PathBuf],
    run_uid: &str,
    point: &PointSettings,
    settings: &Settings,
) -> Result<(Vec<LvmSnapshot>, Vec<Bind>), PointError> {
    let mounts = Mounts::read()?;
    let volumes = list(settings).await?;
    let mut snapshots: Vec<LvmSnapshot> = Vec::new();
    let mut binds = Vec::new();
    for path in paths {
        let unfit = |reason: String| PointError::Unfit { kind: "lvm", path: path.clone(), reason };
        let (mount, inside) = view::place_of(path, &mounts)?;
        let device = match mount.device.major {
            0 => mounts::block_device(Path::new(&mount.source)),
            _ => Some(mount.device),
        };
        let found = volumes.iter().find(|volume| volume.device().is_some() && volume.device() == device);
        let Some(found) = found else {
            return Err(unfit(format!("{} ({}) is not a logical volume", mount.point.display(), mount.source)));
        };
        let known = snapshots.iter().find(|s| s.group == found.vg_name && s.volume == found.lv_name);
        let view = match known {
            Some(known) => known.view.clone(),
            None => {
                let n = snapshots.len();
                let name = format!("hestner-{run_uid}-{n}");
                let view = View {
                    what: format!("/dev/{}/{name}", found.vg_name),
                    kind: mount.kind.clone(),
                    point: settings.points.join(format!("{run_uid}-{n}")),
                };
                snapshots.push(LvmSnapshot {
                    group: found.vg_name.clone(),
                    volume: found.lv_name.clone(),
                    name,
                    pool: if found.is_thin() { found.pool_lv.clone() } else { String::new() },
                    size: point.snapshot_size.clone(),
                    usage_max: point.cow_usage_max,
                    dmsetup: settings.dmsetup.clone(),
                    view: view.clone(),
                });
                view
            }
        };
        binds.push(Bind { from: view::below(&view.point, &inside), to: path.clone() });
    }
    Ok((snapshots, binds))
}

impl LvmSnapshot {
    fn full_name(&self) -> String {
        format!("{}/{}", self.group, self.name)
    }

    fn program(&self, settings: &Settings) -> Program {
        let program = Program::new(&settings.lvcreate).args(["--snapshot", "--name", &self.name]);
        let program = match (self.pool.is_empty(), self.size.contains('%')) {
            // A thin snapshot takes its room from the pool, and is not activated unless it is told so.
            (false, _) => program.args(["--setactivationskip", "n"]),
            (true, true) => program.args(["--extents", &self.size]),
            (true, false) => program.args(["--size", &self.size]),
        };
        program.args(["--yes", "--", &format!("{}/{}", self.group, self.volume)])
    }

    /// Makes it.
    pub(super) async fn take(&self, settings: &Settings) -> Result<(), PointError> {
        run("lvcreate", "snapshot", &format!("{}/{}", self.group, self.volume), self.program(settings)).await.map(drop)
    }

    /// Whether it still holds what it held.
    pub(super) async fn check(&self, settings: &Settings) -> Result<(), PointError> {
        let volumes = list(settings).await?;
        let named = |name: &str| volumes.iter().find(|v| v.vg_name == self.group && v.lv_name == name);
        let overflow = |used| PointError::Overflow { snapshot: self.full_name(), used, limit: self.usage_max };
        let Some(snapshot) = named(&self.name).filter(|snapshot| !snapshot.is_invalid()) else {
            return Err(overflow(100));
        };
        let room = if self.pool.is_empty() { Some(snapshot) } else { named(&self.pool) };
        // One that says nothing is one that nobody can vouch for.
        let used = room.and_then(Volume::used_percent).ok_or_else(|| overflow(100))?;
        if used > u32::from(self.usage_max) { Err(overflow(used)) } else { Ok(()) }
    }

    /// Lets the volume itself go on, if an `lvcreate` that was killed half-way has left it suspended: whoever writes
    /// to it waits. Asks the device mapper, because LVM's own programs may wait for what is suspended.
    ///
    /// # Errors
    /// When it is suspended and cannot be resumed.
    pub(super) async fn resume(&self) -> Result<(), PointError> {
        let origin = mapped_name(&self.group, &self.volume);
        // With a snapshot, the volume is one device over another, and both are suspended.
        for device in [format!("{origin}-real"), origin] {
            let program = Program::new(&self.dmsetup).args(["info", "-c", "--noheadings", "-o", "suspended"]);
            let output = program.arg(&device).env("LC_ALL", "C").run(b"", Limits::seconds(COMMAND_SECONDS)).await?;
            // A device that is not there is not suspended.
            if output.status.success() && String::from_utf8_lossy(&output.stdout).trim() == "Suspended" {
                run("dmsetup", "resume", &device, Program::new(&self.dmsetup).args(["resume", &device])).await?;
            }
        }
        Ok(())
    }

    /// Unmounts and removes it; what is not there is fine.
    pub(super) async fn remove(&self, settings: &Settings) -> Result<(), PointError> {
        self.view.close(settings).await?;
        let volumes = list(settings).await?;
        if !volumes.iter().any(|v| v.vg_name == self.group) {
            return Err(PointError::Away(format!("/dev/{}", self.group).into()));
        }
        if !volumes.iter().any(|v| v.vg_name == self.group && v.lv_name == self.name) {
            return Ok(());
        }
        let program = Program::new(&settings.lvremove).args(["--yes", "--", &self.full_name()]);
        run("lvremove", "remove", &self.full_name(), program).await.map(drop)
    }
}

/// For notes of runs that did not name it.
fn dmsetup() -> PathBuf {
    "/usr/sbin/dmsetup".into()
}

/// As the device mapper calls a logical volume (lvm(8)): hyphens inside the names are doubled.
fn mapped_name(group: &str, volume: &str) -> String {
    let escaped = |name: &str| name.replace('-', "--");
    format!("{}-{}", escaped(group), escaped(volume))
}

/// One row of `lvs --reportformat json`: every value is a text.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Volume {
    vg_name: String,
    lv_name: String,
    lv_attr: String,
    lv_layout: String,
    lv_kernel_major: String,
    lv_kernel_minor: String,
    pool_lv: String,
    data_percent: String,
    metadata_percent: String,
}

impl Volume {
    fn device(&self) -> Option<Device> {
        Some(Device { major: self.lv_kernel_major.parse().ok()?, minor: self.lv_kernel_minor.parse().ok()? })
    }

    fn is_thin(&self) -> bool {
        self.lv_layout.split(',').any(|layout| layout == "thin") && !self.pool_lv.is_empty()
    }

    /// The fifth letter of `lv_attr` is the state: `I` is an invalid snapshot, `S` an invalid one that is
    /// suspended (lvs(8)).
    fn is_invalid(&self) -> bool {
        matches!(self.lv_attr.chars().nth(4), Some('I' | 'S'))
    }

    /// The fuller of data and metadata, rounded up.
    fn used_percent(&self) -> Option<u32> {
        let percent = |text: &str| {
            let (whole, part) = text.split_once(['.', ',']).unwrap_or((text, ""));
            let more = u32::from(part.bytes().any(|digit| digit != b'0'));
            Some(whole.parse::<u32>().ok()? + more)
        };
        Some(percent(&self.data_percent)?.max(percent(&self.metadata_percent).unwrap_or(0)))
    }
}

/// Every volume of the host.
async fn list(settings: &Settings) -> Result<Vec<Volume>, PointError> {
    let program = Program::new(&settings.lvs).args(["--all", "--reportformat", "json", "--options", FIELDS]);
    let text = run("lvs", "list", "the logical volumes", program).await?;
    parse(&text).map_err(|error| PointError::Refused {
        program: "lvs",
        operation: "list",
        object: "the logical volumes".to_owned(),
        complaint: format!("its answer cannot be understood: {error}"),
    })
}

fn parse(text: &[u8]) -> Result<Vec<Volume>, serde_json::Error> {
    #[derive(Deserialize)]
    struct Answer {
        report: Vec<Report>,
    }
    #[derive(Deserialize)]
    struct Report {
        #[serde(default)]
        lv: Vec<Volume>,
    }
    let answer: Answer = serde_json::from_slice(text)?;
    let brackets: &[char] = &['[', ']'];
    let rows = answer.report.into_iter().flat_map(|report| report.lv);
    // With `--all`, hidden volumes such as a pool's parts come in brackets.
    Ok(rows.map(|row| Volume { lv_name: row.lv_name.trim_matches(brackets).to_owned(), ..row }).collect())
}

async fn run(
    program: &'static str,
    operation: &'static str,
    object: &str,
    command: Program,
) -> Result<Vec<u8>, PointError> {
    let output = command.env("LC_ALL", "C").run(b"", Limits::seconds(COMMAND_SECONDS)).await?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(PointError::Refused { program, operation, object: object.to_owned(), complaint: output.complaint() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As LVM 2.03 answers on Debian 12: a linear volume with a snapshot, one that ran full, and a thin one.
    const LVS: &[u8] = br#"{"report":[{"lv":[
      {"vg_name":"vg0","lv_name":"data","lv_path":"/dev/vg0/data","lv_attr":"owi-aos---","lv_layout":"linear","lv_kernel_major":"254","lv_kernel_minor":"0","pool_lv":"","data_percent":"","metadata_percent":""},
      {"vg_name":"vg0","lv_name":"snap","lv_path":"/dev/vg0/snap","lv_attr":"swi-aos---","lv_layout":"linear","lv_kernel_major":"254","lv_kernel_minor":"3","pool_lv":"","data_percent":"12.01","metadata_percent":""},
      {"vg_name":"vg0","lv_name":"full","lv_path":"/dev/vg0/full","lv_attr":"swi-Ios---","lv_layout":"linear","lv_kernel_major":"254","lv_kernel_minor":"4","pool_lv":"","data_percent":"100.00","metadata_percent":""},
      {"vg_name":"vg1","lv_name":"thin","lv_path":"/dev/vg1/thin","lv_attr":"Vwi-aotz--","lv_layout":"thin,sparse","lv_kernel_major":"254","lv_kernel_minor":"9","pool_lv":"pool","data_percent":"45.00","metadata_percent":""},
      {"vg_name":"vg1","lv_name":"[pool_tdata]","lv_path":"","lv_attr":"Twi-ao----","lv_layout":"linear","lv_kernel_major":"254","lv_kernel_minor":"7","pool_lv":"","data_percent":"","metadata_percent":""}
    ]}]}"#;

    #[test]
    fn recorded_answer_of_lvs_is_understood() {
        let volumes = parse(LVS).unwrap();
        let facts: Vec<_> =
            volumes.iter().map(|v| (v.lv_name.as_str(), v.is_invalid(), v.is_thin(), v.used_percent())).collect();
        let expected = [
            ("data", false, false, None),
            ("snap", false, false, Some(13)),
            ("full", true, false, Some(100)),
            ("thin", false, true, Some(45)),
            ("pool_tdata", false, false, None),
        ];
        assert_eq!(facts, expected);
        assert_eq!(volumes[0].device(), Some(Device { major: 254, minor: 0 }));
        assert!(parse(b"  WARNING: no JSON").is_err());
    }

    #[test]
    fn note_of_an_earlier_version_is_understood() {
        let note = r#"{"group":"vg0","volume":"data","name":"n","pool":"","size":"2G","usage_max":80,
            "view":{"what":"/dev/vg0/n","kind":"ext4","point":"/points/n"}}"#;
        assert_eq!(serde_json::from_str::<LvmSnapshot>(note).unwrap().dmsetup, dmsetup());
    }

    #[test]
    fn volume_is_named_as_the_device_mapper_names_it() {
        assert_eq!(mapped_name("vg-data", "my-db"), "vg--data-my--db");
    }

    #[test]
    fn size_is_asked_for_in_extents_or_bytes_and_not_at_all_in_a_pool() {
        let view = View { what: String::new(), kind: "ext4".into(), point: PathBuf::new() };
        let snapshot = |size: &str, pool: &str| LvmSnapshot {
            group: "vg0".into(),
            volume: "data".into(),
            name: "hestner-u-0".into(),
            pool: pool.into(),
            size: size.into(),
            usage_max: 80,
            dmsetup: PathBuf::new(),
            view: view.clone(),
        };
        let words = |snapshot: LvmSnapshot| format!("{:?}", snapshot.program(&Settings::default()));
        assert!(words(snapshot("10%ORIGIN", "")).contains(r#""--extents", "10%ORIGIN""#));
        assert!(words(snapshot("2G", "")).contains(r#""--size", "2G""#));
        let thin = words(snapshot("2G", "pool"));
        assert!(thin.contains("--setactivationskip") && !thin.contains("2G"), "{thin}");
    }
}
