//! Reading requests: the caller, ids, queries and bodies, each with a problem document when it cannot be read.
//!
//! In: what axum hands over. Out: typed values. The caller is read before the body, so that somebody without a key
//! learns nothing about what a body must look like.

use axum::body::HttpBody as _;
use axum::extract::rejection::JsonRejection;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::header;
use axum::http::request::Parts;
use serde::de::DeserializeOwned;
use serde::de::value::StrDeserializer;
use serde::{Deserialize as _, Deserializer};

use super::State;
use super::problems::Refused;
use crate::auth::{self, Caller};
use crate::model::problem::Problem;

/// Somebody with a valid key.
pub(super) struct Authenticated(pub(super) Caller);

impl FromRequestParts<State> for Authenticated {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, state: &State) -> Result<Self, Refused> {
        let shown = parts.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let caller = state.auth.authenticate(shown.and_then(auth::bearer)).await;
        if matches!(caller, Err(auth::Error::Missing | auth::Error::Invalid)) {
            state.counters.keys_refused.raise();
        }
        Ok(Self(caller?))
    }
}

/// The path's parameters. A text that is no id names nothing, so it is "not found".
pub(super) struct Path<T>(pub(super) T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refused> {
        let read = axum::extract::Path::<T>::from_request_parts(parts, state).await;
        read.map(|path| Self(path.0)).map_err(|_| Problem::not_found("thing").into())
    }
}

/// The query's parameters; unknown ones are refused by the type.
pub(super) struct Query<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refused> {
        let read = axum::extract::Query::<T>::from_request_parts(parts, state).await;
        read.map(|query| Self(query.0)).map_err(|error| Problem::invalid(error.body_text()).into())
    }
}

/// A JSON body; unknown fields are refused by the type.
pub(super) struct Body<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Refused;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refused> {
        let read = axum::Json::<T>::from_request(request, state).await;
        read.map(|body| Self(body.0)).map_err(|error| body_problem(&error).into())
    }
}

/// A JSON body that may be missing altogether.
pub(super) struct MaybeBody<T>(pub(super) Option<T>);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for MaybeBody<T> {
    type Rejection = Refused;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refused> {
        if request.body().size_hint().exact() == Some(0) {
            return Ok(Self(None));
        }
        Body::from_request(request, state).await.map(|Body(body)| Self(Some(body)))
    }
}

fn body_problem(error: &JsonRejection) -> Problem {
    let detail = error.body_text();
    match error {
        JsonRejection::MissingJsonContentType(_) => {
            Problem::new(415, "not_json", detail, "send the header `Content-Type: application/json`")
        }
        JsonRejection::BytesRejection(_) => Problem::new(413, "body_too_large", detail, "send at most 64 KiB"),
        _ => Problem::invalid(detail),
    }
}

/// Reads a word of the query; `?name=` means the same as leaving it out.
///
/// # Errors
/// When the word is not in the type's list.
pub(super) fn or_empty<'de, D: Deserializer<'de>, T: DeserializeOwned>(from: D) -> Result<Option<T>, D::Error> {
    let text = String::deserialize(from)?;
    if text.is_empty() {
        return Ok(None);
    }
    T::deserialize(StrDeserializer::<D::Error>::new(&text)).map(Some)
}
