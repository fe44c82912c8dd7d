//! A reported run and its ledger row, in the transaction that acknowledges them.
//!
//! The first success of a run books exactly one row, which brings the day to the formula's value; the store
//! refuses a second one. A row without `run_uid` holds only the centre's guess (queued, refused, expired), so
//! the host's first report of the run takes its place.

use hestner_proto::words::RunStatus;

use crate::model::ServerId;
use crate::model::cost::{self, Booking, RateCard};
use crate::model::run::{Merge, ReportedRun, merge};
use crate::store::runs::{EXPIRED_CLASS, StoredRun};
use crate::store::{self, Tx};

/// What a reported run changed.
pub(super) struct Effect {
    /// The run has ended with this report.
    pub(super) ended: bool,
    /// It named a directive that is not this server's.
    pub(super) ignored_directive: bool,
}

/// Where a report belongs.
enum Place {
    Row(StoredRun),
    /// No row yet; whether the directive it names has none either.
    New {
        stray_directive: bool,
    },
}

pub(super) async fn take(
    tx: &mut Tx,
    server: ServerId,
    reported: &ReportedRun,
    card: &RateCard,
    now_ms: i64,
) -> store::Result<Effect> {
    let place = place(tx, server, reported).await?;
    let ignored_directive = matches!(place, Place::New { stray_directive: true });
    let id = match place {
        Place::Row(stored) if stored.run_uid.is_some() && merge(stored.status, reported.status) == Merge::Keep => {
            return Ok(Effect { ended: false, ignored_directive });
        }
        Place::Row(stored) => stored.id,
        Place::New { .. } => tx.add_reported_run(server, reported, now_ms).await?,
    };
    tx.write_run(id, reported, now_ms).await?;
    if let Some(directive) = reported.directive_id.as_deref().filter(|_| !ignored_directive) {
        tx.directive_became_run(server, directive, now_ms).await?;
    }
    if reported.status == RunStatus::Success {
        book(tx, server, reported, card, now_ms).await?;
    }
    for run_uid in &reported.expired_runs {
        tx.expire_run(server, run_uid, now_ms).await?;
    }
    let ended = matches!(reported.status, RunStatus::Success | RunStatus::Failed);
    Ok(Effect { ended, ignored_directive })
}

async fn place(tx: &mut Tx, server: ServerId, reported: &ReportedRun) -> store::Result<Place> {
    if let Some(stored) = tx.run_by_uid(server, &reported.run_uid).await? {
        return Ok(Place::Row(stored));
    }
    let Some(directive) = &reported.directive_id else { return Ok(Place::New { stray_directive: false }) };
    Ok(match tx.run_by_directive(server, directive).await? {
        Some(stored) if is_guess_about(&stored, reported.status) => Place::Row(stored),
        _ => Place::New { stray_directive: true },
    })
}

/// Whether a row holds only what the centre guessed of this run.
fn is_guess_about(stored: &StoredRun, reported: RunStatus) -> bool {
    let refused = stored.status == RunStatus::Failed && stored.error_class != EXPIRED_CLASS.as_str();
    // A refusal stands: only the same failure told in full may take its place.
    stored.run_uid.is_none() && (!refused || reported == RunStatus::Failed)
}

async fn book(
    tx: &mut Tx,
    server: ServerId,
    reported: &ReportedRun,
    card: &RateCard,
    now_ms: i64,
) -> store::Result<()> {
    let run = &reported.run;
    if !run.repository_id.is_empty() {
        tx.put_repository(server, &run.repository_id, &run.destination, run.repository_bytes, now_ms).await?;
    }
    let stored_bytes = tx.stored_bytes(server).await?;
    let enrolled_at_ms = tx.standing(server).await?.map_or(0, |standing| standing.enrolled_at_ms);
    let date = cost::ref_date(reported.finished_at_ms, enrolled_at_ms, now_ms);
    let booked = tx.booked(server, &date.to_string(), cost::SNAPSHOT_STORAGE, &card.currency).await?;
    let booking = cost::storage_booking(card, date, stored_bytes, booked).ok_or_else(|| store::Error::Unreadable {
        what: "rate or amount",
        text: format!("{} for {stored_bytes} bytes", card.storage_gb_month),
    })?;
    let metadata = metadata(&booking, &reported.run_uid, card);
    tx.book(server, &reported.run_uid, cost::SNAPSHOT_STORAGE, &booking, &metadata, now_ms).await
}

/// The numbers that the amount was computed from, so that a person can check it.
fn metadata(booking: &Booking, run_uid: &str, card: &RateCard) -> serde_json::Value {
    serde_json::json!({
        "run_uid": run_uid,
        "gb": booking.gb,
        "price": card.storage_gb_month,
        "days": booking.days,
        "currency": booking.currency,
        "booked_before": booking.booked_before,
    })
}
