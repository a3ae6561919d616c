//! What follows an attempt to export: the OTLP rules (OTLP 1.x, "Failures", "OTLP/HTTP Throttling") as pure functions.

use std::time::Duration;

/// Longest pause between two attempts.
pub(crate) const PAUSE_MAX: Duration = Duration::from_secs(60);

/// What became of one attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Taken; the backend rejected this many points of it and said why.
    Taken {
        /// Points rejected in a partial success.
        rejected: u64,
        /// The backend's reason, if it gave one.
        message: String,
    },
    /// Not taken, but the same may be taken later, not before this pause if the backend named one.
    Later {
        /// From Retry-After or RetryInfo.
        pause: Option<Duration>,
        /// For the log.
        message: String,
    },
    /// Refused for good: sending it again cannot help.
    Refused {
        /// For the log.
        message: String,
    },
}

/// The outcome of an HTTP status that is no success.
pub(crate) fn of_http_status(status: u16, retry_after: Option<&str>, path_is_bare: bool) -> Outcome {
    let message = format!("backend answered {status}");
    match status {
        429 | 502 | 503 | 504 => Outcome::Later { pause: retry_after.and_then(parse_retry_after), message },
        404 if path_is_bare => {
            Outcome::Refused { message: format!("{message}; the endpoint has no path, did you mean …/v1/metrics?") }
        }
        _ => Outcome::Refused { message },
    }
}

/// The outcome of a gRPC status code that is no success (OTLP, "Failures", the table of retryable codes).
pub(crate) fn of_grpc_code(code: tonic::Code, message: &str) -> Outcome {
    use tonic::Code;
    let message = format!("backend answered {code:?}: {message}");
    match code {
        Code::Cancelled
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unavailable
        | Code::DataLoss
        | Code::ResourceExhausted => Outcome::Later { pause: None, message },
        _ => Outcome::Refused { message },
    }
}

/// Seconds of a Retry-After header (RFC 9110, section 10.2.3). Its date form is not used by collectors and means the usual pause.
fn parse_retry_after(text: &str) -> Option<Duration> {
    text.trim().parse::<u64>().ok().map(|seconds| Duration::from_secs(seconds).min(PAUSE_MAX))
}

/// The pause before the next attempt after `failures` in a row: the flush interval doubled each time, at most 2^5 of it.
pub(crate) fn pause(flush_interval: Duration, failures: u32, asked: Option<Duration>) -> Duration {
    let usual = flush_interval.saturating_mul(1 << failures.min(5)).min(PAUSE_MAX.max(flush_interval));
    asked.map_or(usual, |asked| asked.max(flush_interval))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_that_may_pass_are_tried_again() {
        for status in [429, 502, 503, 504] {
            assert!(matches!(of_http_status(status, None, false), Outcome::Later { pause: None, .. }), "{status}");
        }
        for status in [400, 401, 404, 413, 500, 501] {
            assert!(matches!(of_http_status(status, None, false), Outcome::Refused { .. }), "{status}");
        }
        let asked = of_http_status(503, Some(" 7 "), false);
        assert!(matches!(asked, Outcome::Later { pause: Some(pause), .. } if pause == Duration::from_secs(7)));
        let absurd = of_http_status(503, Some("99999999"), false);
        assert!(matches!(absurd, Outcome::Later { pause: Some(PAUSE_MAX), .. }));
    }

    #[test]
    fn a_404_without_a_path_says_what_was_probably_meant() {
        let Outcome::Refused { message } = of_http_status(404, None, true) else { panic!("refused") };
        assert!(message.contains("/v1/metrics"));
        let Outcome::Refused { message } = of_http_status(404, None, false) else { panic!("refused") };
        assert!(!message.contains("/v1/metrics"));
    }

    #[test]
    fn pauses_double_up_to_a_limit_and_obey_the_backend() {
        let flush = Duration::from_secs(1);
        let seconds: Vec<_> = (0..8).map(|n| pause(flush, n, None).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 32, 32, 32]);
        assert_eq!(pause(Duration::from_secs(10), 5, None), PAUSE_MAX);
        assert_eq!(pause(flush, 0, Some(Duration::from_secs(9))).as_secs(), 9);
        assert_eq!(pause(flush, 0, Some(Duration::ZERO)).as_secs(), 1);
    }

    #[test]
    fn grpc_codes_follow_the_table() {
        assert!(matches!(of_grpc_code(tonic::Code::Unavailable, ""), Outcome::Later { .. }));
        assert!(matches!(of_grpc_code(tonic::Code::InvalidArgument, ""), Outcome::Refused { .. }));
    }
}
