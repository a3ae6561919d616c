//! Errors as answers, bodies as values.

use axum::Json;
use axum::body::Bytes;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use msb_protocol::error::{ApiError, ErrorCode};
use serde::de::DeserializeOwned;

/// An error with the status of its row in the table.
#[derive(Debug)]
pub(crate) struct Failure(pub(crate) ApiError);

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.code.entry().http_status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self.0)).into_response()
    }
}

/// A JSON body; an empty one is the default where the caller says that there is one.
pub(crate) fn body<T: DeserializeOwned>(bytes: &Bytes, empty: Option<T>) -> Result<T, Failure> {
    if bytes.is_empty()
        && let Some(empty) = empty
    {
        return Ok(empty);
    }
    serde_json::from_slice(bytes).map_err(|error| {
        Failure(ApiError::new(ErrorCode::InvalidRequest, format!("the body cannot be understood: {error}")))
    })
}

/// A query string's values.
pub(crate) fn query<T>(
    parsed: Result<axum::extract::Query<T>, axum::extract::rejection::QueryRejection>,
) -> Result<T, Failure> {
    match parsed {
        Ok(axum::extract::Query(query)) => Ok(query),
        Err(rejection) => Err(Failure(ApiError::new(
            ErrorCode::InvalidRequest,
            format!("the query cannot be understood: {}", rejection.body_text()),
        ))),
    }
}
