//! The one error of this library. Every kind carries an [`ApiError`] with a stable code, so that callers decide on codes and
//! people read messages.

use msb_protocol::error::{ApiError, ErrorCode};

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Refused by this library before any request was made.
    #[error("{0}")]
    InvalidConfig(ApiError),
    /// The service's own answer.
    #[error("{0}")]
    Api(ApiError),
    /// Raised on this side: no service could be reached or started, the connection to it was lost, an answer was too large.
    #[error("{0}")]
    Client(ApiError),
}

impl Error {
    /// The error as the table of errors knows it.
    #[must_use]
    pub fn api(&self) -> &ApiError {
        match self {
            Self::InvalidConfig(error) | Self::Api(error) | Self::Client(error) => error,
        }
    }

    /// Its stable code.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        self.api().code
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> &str {
        &self.api().hint
    }

    /// Whether the same call can succeed later without a change.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        self.api().retryable
    }

    /// Whether what was named does not exist (sandbox, image, path).
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self.code(), ErrorCode::SandboxNotFound | ErrorCode::ImageNotFound | ErrorCode::PathNotFound)
    }

    /// Who uses the image, if that is why it was not removed.
    #[must_use]
    pub fn image_users(&self) -> Option<&[String]> {
        (self.code() == ErrorCode::ImageInUse).then_some(self.api().details.as_slice())
    }

    /// Whether the service went away under a request, or was not there.
    pub(crate) fn is_lost(&self) -> bool {
        matches!(self, Self::Client(error) if error.code == ErrorCode::DaemonUnavailable)
    }

    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self::Client(ApiError::new(ErrorCode::DaemonUnavailable, message))
    }

    /// An answer that breaks the protocol: a defect of the service or of this library.
    pub(crate) fn protocol(message: impl std::fmt::Display) -> Self {
        Self::Client(ApiError::internal(format!("the service's answer cannot be understood: {message}")))
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        match error {
            Error::InvalidConfig(error) | Error::Api(error) | Error::Client(error) => error,
        }
    }
}

/// Reads the body of a failed request. A newer service may use codes this library does not know: then the message and hint are
/// kept and the code is the nearest this library has for the HTTP status.
pub(crate) fn from_body(status: u16, body: &[u8]) -> Error {
    if let Ok(error) = serde_json::from_slice::<ApiError>(body) {
        return Error::Api(error);
    }
    let code = match status {
        400..=403 | 405..=499 => ErrorCode::InvalidRequest,
        501 => ErrorCode::NotImplemented,
        _ => ErrorCode::Internal,
    };
    let text = |value: &serde_json::Value, key: &str| value.get(key).and_then(|v| v.as_str()).map(str::to_owned);
    let Ok(value) = serde_json::from_slice::<serde_json::Value>(body) else {
        return Error::Api(ApiError::new(code, format!("the service answered with status {status}")));
    };
    let message = match (text(&value, "code"), text(&value, "message")) {
        (Some(unknown), Some(message)) => format!("{message} ({unknown})"),
        (_, Some(message)) => message,
        _ => format!("the service answered with status {status}"),
    };
    let error = ApiError::new(code, message);
    Error::Api(match text(&value, "hint") {
        Some(hint) => error.with_hint(hint),
        None => error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_error_comes_back_whole() {
        let error = ApiError::new(ErrorCode::ImageInUse, "in use").with_details(["web".to_owned()]);
        let body = serde_json::to_vec(&error).unwrap();
        assert_eq!(from_body(409, &body), Error::Api(error));
    }

    #[test]
    fn an_unknown_code_keeps_its_message_and_hint() {
        let body = br#"{"code":"moon_phase","message":"not tonight","hint":"wait","retryable":true}"#;
        let error = from_body(409, body);
        assert_eq!(error.code(), ErrorCode::InvalidRequest);
        assert_eq!((error.to_string().as_str(), error.hint()), ("not tonight (moon_phase)", "wait"));
    }

    #[test]
    fn a_body_that_is_no_error_still_names_the_status() {
        for body in [&b""[..], b"<html>", b"[]", b"{}"] {
            assert!(from_body(502, body).to_string().contains("502"), "{body:?}");
        }
    }
}
