//! What went wrong, as a person or a script outside is told: RFC 9457 problem details.
//!
//! A problem has a stable code, a sentence, the next step, and says whether trying again can help. The
//! HTTP status is part of it, but nothing here knows HTTP beyond that number.

use serde::Serialize;
use utoipa::ToSchema;

/// A problem document (`application/problem+json`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Problem {
    /// URI that names the kind of problem.
    #[serde(rename = "type")]
    pub kind: String,
    /// The kind in a few words.
    pub title: String,
    /// HTTP status.
    pub status: u16,
    /// What happened, to what.
    pub detail: String,
    /// Stable code for scripts.
    pub code: &'static str,
    /// What to do next.
    pub next_step: String,
    /// Whether the same request can succeed later.
    pub retry: bool,
}

impl Problem {
    /// A problem that stays until somebody does something about it.
    pub fn new(status: u16, code: &'static str, detail: impl Into<String>, next_step: impl Into<String>) -> Self {
        Self {
            kind: format!("urn:hestner:problem:{code}"),
            title: code.replace('_', " "),
            status,
            detail: detail.into(),
            code,
            next_step: next_step.into(),
            retry: false,
        }
    }

    /// Says that the same request can succeed later.
    #[must_use]
    pub fn retryable(mut self) -> Self {
        self.retry = true;
        self
    }

    /// Nothing of that name that the caller may see. The same for what does not exist and for what belongs
    /// to another company, so that nobody can tell one from the other.
    pub fn not_found(what: &str) -> Self {
        Self::new(404, "not_found", format!("there is no such {what}"), "check the id; list what your key can see")
    }

    /// Input that breaks a rule.
    pub fn invalid(detail: impl Into<String>) -> Self {
        Self::new(422, "invalid_input", detail, "correct the request; GET /v1/openapi.json describes it")
    }

    /// The store or another part of the receiver failed. The details stand in the log only.
    pub fn internal() -> Self {
        Self::new(500, "internal", "the receiver could not do it", "look at the receiver's log, then try again")
            .retryable()
    }
}
