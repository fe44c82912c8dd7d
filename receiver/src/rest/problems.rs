//! How errors of the work below become problem documents.
//!
//! In: an error of `auth`, `fleet` or `costs`. Out: a status, a stable code, a sentence, the next step and whether
//! to try again. What failed inside goes into the log and never out: a caller learns that it failed, not how.
//! The codes are part of the contract; changing one breaks scripts.

use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};

use crate::model::problem::Problem;
use crate::platform::causes::chain;
use crate::{auth, costs, fleet};

/// A problem on its way out.
#[derive(Debug)]
pub(crate) struct Refused(pub(crate) Problem);

impl From<Problem> for Refused {
    fn from(problem: Problem) -> Self {
        Self(problem)
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let status =
            axum::http::StatusCode::from_u16(self.0.status).unwrap_or(axum::http::StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, axum::Json(&self.0)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if self.0.status == 401 {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// What failed inside goes into the log; outside it is only said that it failed.
pub(super) fn internal(error: &dyn std::error::Error) -> Refused {
    tracing::error!(event = "request_failed", component = "rest", error = chain(error), "a request failed");
    Refused(Problem::internal())
}

impl From<auth::Error> for Refused {
    fn from(error: auth::Error) -> Self {
        let next = "send the header `Authorization: Bearer hsk_...`; `hestner-receiver apikey create` makes a key";
        match error {
            auth::Error::Missing => Self(Problem::new(401, "key_missing", error.to_string(), next)),
            auth::Error::Invalid => Self(Problem::new(401, "key_invalid", error.to_string(), next)),
            auth::Error::Store(_) | auth::Error::Random(_) => internal(&error),
        }
    }
}

impl From<fleet::Error> for Refused {
    fn from(error: fleet::Error) -> Self {
        use fleet::Error;
        let detail = error.to_string();
        Self(match error {
            Error::NotFound(what) => Problem::not_found(what),
            Error::Invalid(_) | Error::RecoveryKey(_) => Problem::invalid(detail),
            Error::UnknownService(_) => {
                Problem::new(422, "unknown_service", detail, "name a service of GET /v1/servers/{id}/services")
            }
            Error::ServiceWanted(_) => {
                Problem::new(422, "service_wanted", detail, "name one service in the member `service`")
            }
            Error::TooManyDirectives(_) => {
                Problem::new(429, "too_many_directives", detail, "wait until the server has answered").retryable()
            }
            Error::IdempotencyMismatch => {
                Problem::new(422, "idempotency_mismatch", detail, "use a new key for a new request")
            }
            Error::NameTaken(_) => Problem::new(409, "name_taken", detail, "choose another name"),
            Error::Store(_) | Error::Random(_) => return internal(&error),
        })
    }
}

impl From<costs::Error> for Refused {
    fn from(error: costs::Error) -> Self {
        match error {
            costs::Error::NotFound => Self(Problem::not_found("server")),
            costs::Error::TooMuch | costs::Error::Store(_) => internal(&error),
        }
    }
}

pub(super) async fn no_such_page() -> Refused {
    Refused(Problem::new(404, "no_such_page", "there is no such page", "GET /v1/openapi.json lists them"))
}

pub(super) async fn no_such_method() -> Refused {
    Refused(Problem::new(
        405,
        "method_not_allowed",
        "the page does not know this method",
        "GET /v1/openapi.json lists them",
    ))
}
