//! `recover`: the server is gone, and here are its repository and the company's recovery key.
//!
//! Works on a machine that has nothing but this program: no settings, no enrolment, no state. What root types is
//! root's decision, and who has the recovery key is the company; nobody else is asked.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use clap::Subcommand;
use serde_json::json;

use super::extent::HowMuch;
use super::place::{KeyArguments, PlaceArguments, no_key, no_place, watched};
use super::progress::Following;
use super::{Complaint, output, target};
use crate::repository::Progress;
use crate::repository::recovery::{Counters, Key, Place, Recovered, RecoveryError};
use crate::repository::snapshots::Listed;
use crate::repository::verify::Extent;

/// Somebody who prunes is waited for so long.
const LOCK_WAIT: Duration = Duration::from_secs(60);
/// Digits of an id that are shown.
const SHOWN_DIGITS: usize = 8;

#[derive(Subcommand)]
pub(super) enum Recover {
    /// List what a repository holds.
    #[command(
        after_help = "Example:\n  hestner-agent recover list --folder /mnt/backup/server-12-encrypted --recovery-key /root/recovery.key"
    )]
    List {
        #[command(flatten)]
        opening: Opening,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Write a snapshot to a folder.
    #[command(
        after_help = "Example:\n  hestner-agent recover restore 1f0c5a2e --place /root/place.toml --recovery-key /root/recovery.key --target /srv/restored\n\nThe tree appears below the folder under its original path. Every byte is checked before it is written."
    )]
    Restore {
        /// The snapshot: its id, the first eight or more digits of it, or its run.
        snapshot: String,
        #[command(flatten)]
        opening: Opening,
        /// An empty or new folder.
        #[arg(long, value_name = "DIR")]
        target: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Read a repository back: its structure, and all of its data unless less is asked for.
    #[command(
        after_help = "Example:\n  hestner-agent recover verify --place /root/place.toml --recovery-key /root/recovery.key\n\nExit code 0: everything that was read is right; anything else: it is not, or could not be read."
    )]
    Verify {
        #[command(flatten)]
        opening: Opening,
        #[command(flatten)]
        how_much: HowMuch,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

#[derive(clap::Args)]
pub(super) struct Opening {
    #[command(flatten)]
    place: PlaceArguments,
    #[command(flatten)]
    key: KeyArguments,
}

impl Opening {
    fn read(&self) -> Result<(Place, Key), Complaint> {
        let place = self.place.read()?.ok_or_else(|| no_place(""))?;
        Ok((place, self.key.read()?.ok_or_else(no_key)?))
    }
}

pub(super) async fn run(command: &Recover) -> Result<(), Complaint> {
    match command {
        Recover::List { opening, json } => list(opening, *json).await,
        Recover::Restore { snapshot, opening, target, json } => {
            restore(snapshot.clone(), opening, target.clone(), *json).await
        }
        Recover::Verify { opening, how_much, json } => verify(opening, how_much.extent(), *json).await,
    }
}

/// A snapshot as it is printed.
pub(super) fn as_json(listed: &Listed) -> serde_json::Value {
    json!({
        "id": listed.id.to_hex(),
        "time": listed.time().to_rfc3339(),
        "hostname": listed.snapshot.hostname,
        "service": listed.service(),
        "run_uid": listed.run_uid(),
        "paths": listed.snapshot.paths,
    })
}

/// Snapshots, a line each.
pub(super) fn table(snapshots: &[Listed]) {
    output::line(&format!("{:<20}  {:<20} {:<16} {:<36}  ID", "TIME", "HOST", "SERVICE", "RUN"));
    for listed in snapshots {
        let id = &listed.id.to_hex()[..SHOWN_DIGITS];
        output::line(&format!(
            "{:<20}  {:<20} {:<16} {:<36}  {id}",
            output::time(listed.time().timestamp_millis()),
            listed.snapshot.hostname,
            listed.service(),
            listed.run_uid()
        ));
    }
}

async fn list(opening: &Opening, as_json_text: bool) -> Result<(), Complaint> {
    let (place, key) = opening.read()?;
    let listed = watched(
        move |_| {
            let repository = Recovered::open(&place, &key, LOCK_WAIT)?;
            let snapshots = repository.list()?;
            Ok::<_, RecoveryError>((repository.id().to_owned(), repository.shown_place(), snapshots))
        },
        || {},
    );
    let (id, shown, snapshots) = listed.await??;
    if as_json_text {
        let snapshots: Vec<_> = snapshots.iter().map(as_json).collect();
        output::json(&json!({"repository_id": id, "place": shown, "snapshots": snapshots}));
        return Ok(());
    }
    output::line(&format!("repository {id} at {shown}: {} snapshots", snapshots.len()));
    table(&snapshots);
    Ok(())
}

/// What the work is at, for whoever watches it.
struct Watch {
    phase: Mutex<String>,
    counters: Counters,
}

impl Watch {
    fn new() -> Arc<Self> {
        Arc::new(Self { phase: Mutex::new("opening".to_owned()), counters: Counters::default() })
    }

    fn enter(&self, phase: &str) {
        phase.clone_into(&mut self.phase.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    }

    fn shown(&self, line: &mut Following) {
        let phase = self.phase.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Counters { restore, verify } = &self.counters;
        // Only one of the two counts.
        let bytes = count(&restore.bytes_done) + count(&verify.bytes_done);
        let bytes_total = count(&restore.bytes_found) + count(&verify.bytes_total);
        let (files_done, files_total) = (count(&restore.files_done), count(&restore.files_found));
        let progress = Progress { bytes_done: bytes, bytes_total, files_done, files_total, ..Progress::default() };
        line.tell(&phase, progress);
    }
}

async fn restore(text: String, opening: &Opening, target: PathBuf, as_json_text: bool) -> Result<(), Complaint> {
    let (place, key) = opening.read()?;
    let watch = Watch::new();
    let (at_work, folder) = (Arc::clone(&watch), target.clone());
    let mut line = Following::new();
    let restored = watched(
        move |cancel| {
            let repository = Recovered::open(&place, &key, LOCK_WAIT)?;
            let snapshot = repository.find(&text)?;
            let ours = target::begin(&folder, &snapshot.id.to_hex())?;
            at_work.enter("restoring");
            let warnings = repository.restore(&snapshot, &folder, &at_work.counters, cancel)?;
            ours.finish().map_err(|e| Complaint::broken("target_unfinished", &e, "remove the mark by hand"))?;
            Ok::<_, Complaint>((snapshot, warnings))
        },
        || watch.shown(&mut line),
    )
    .await;
    line.end();
    let (snapshot, warnings) = restored??;
    warnings.iter().for_each(|warning| eprintln!("warning: {}", output::harmless(warning)));
    if as_json_text {
        let mut told = as_json(&snapshot);
        told["target"] = json!(target);
        told["verified"] = json!(true);
        told["warnings"] = json!(warnings);
        output::json(&told);
        return Ok(());
    }
    output::line(&format!(
        "restored snapshot {} of service {} to {}; every byte was checked before it was written",
        &snapshot.id.to_hex()[..SHOWN_DIGITS],
        snapshot.service(),
        target.display()
    ));
    Ok(())
}

async fn verify(opening: &Opening, extent: Extent, as_json_text: bool) -> Result<(), Complaint> {
    let (place, key) = opening.read()?;
    let watch = Watch::new();
    let at_work = Arc::clone(&watch);
    let mut line = Following::new();
    let verified = watched(
        move |cancel| {
            let repository = Recovered::open(&place, &key, LOCK_WAIT)?;
            at_work.enter("verifying");
            let verified = repository.verify(extent, &at_work.counters, cancel)?;
            Ok::<_, RecoveryError>((repository.id().to_owned(), verified))
        },
        || watch.shown(&mut line),
    )
    .await;
    line.end();
    let (id, verified) = verified??;
    if as_json_text {
        output::json(&json!({
            "repository_id": id,
            "snapshots": verified.snapshots,
            "trees": verified.trees,
            "packs": verified.packs,
            "packs_read": verified.packs_read,
            "bytes_read": verified.bytes_read,
            "verified": true,
        }));
        return Ok(());
    }
    output::line(&format!(
        "repository {id} is whole: {} snapshots, {} of {} packs read, {}",
        verified.snapshots,
        verified.packs_read,
        verified.packs,
        output::bytes(verified.bytes_read)
    ));
    Ok(())
}
