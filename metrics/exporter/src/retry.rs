//! What follows an attempt to export: the OTLP rules (OTLP 1.x, "Failures", "OTLP/HTTP Throttling") as pure functions.

use std::time::Duration;

use prost::Message as _;

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

/// The outcome of an HTTP status that is no success; `now` is the wall clock, for dates in Retry-After.
pub(crate) fn of_http_status(
    status: u16,
    retry_after: Option<&str>,
    path_is_bare: bool,
    now: jiff::Timestamp,
) -> Outcome {
    let message = format!("backend answered {status}");
    match status {
        429 | 502 | 503 | 504 => {
            Outcome::Later { pause: retry_after.and_then(|text| parse_retry_after(text, now)), message }
        }
        404 if path_is_bare => {
            Outcome::Refused { message: format!("{message}; the endpoint has no path, did you mean …/v1/metrics?") }
        }
        _ => Outcome::Refused { message },
    }
}

/// The outcome of a gRPC status that is no success (OTLP, "Failures", the table of retryable codes). `details` is what came as
/// `grpc-status-details-bin`, where a backend says when to come again.
pub(crate) fn of_grpc_status(code: tonic::Code, message: &str, details: &[u8]) -> Outcome {
    use tonic::Code;
    let message = format!("backend answered {code:?}: {message}");
    let pause = retry_delay(details);
    match code {
        Code::Cancelled
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unavailable
        | Code::DataLoss
        | Code::ResourceExhausted => Outcome::Later { pause, message },
        _ => Outcome::Refused { message },
    }
}

/// A Retry-After header: seconds or a date (RFC 9110, section 10.2.3).
fn parse_retry_after(text: &str, now: jiff::Timestamp) -> Option<Duration> {
    let text = text.trim();
    let pause = match text.parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => {
            let at = jiff::fmt::rfc2822::parse(text).ok()?.timestamp();
            Duration::from_secs(u64::try_from(at.as_second() - now.as_second()).unwrap_or_default())
        }
    };
    Some(pause.min(PAUSE_MAX))
}

/// The delay of the first `google.rpc.RetryInfo` among the details of a `google.rpc.Status`.
fn retry_delay(details: &[u8]) -> Option<Duration> {
    /// `google.rpc.Status`, the field that matters.
    #[derive(Clone, PartialEq, prost::Message)]
    struct Status {
        #[prost(message, repeated, tag = "3")]
        details: Vec<Any>,
    }
    /// `google.protobuf.Any`.
    #[derive(Clone, PartialEq, prost::Message)]
    struct Any {
        #[prost(string, tag = "1")]
        type_url: String,
        #[prost(bytes = "vec", tag = "2")]
        value: Vec<u8>,
    }
    /// `google.rpc.RetryInfo`.
    #[derive(Clone, PartialEq, prost::Message)]
    struct RetryInfo {
        #[prost(message, optional, tag = "1")]
        delay: Option<Delay>,
    }
    /// `google.protobuf.Duration`.
    #[derive(Clone, PartialEq, prost::Message)]
    struct Delay {
        #[prost(int64, tag = "1")]
        seconds: i64,
        #[prost(int32, tag = "2")]
        nanos: i32,
    }
    let status = Status::decode(details).ok()?;
    let info = status.details.iter().find(|detail| detail.type_url.ends_with("/google.rpc.RetryInfo"))?;
    let delay = RetryInfo::decode(info.value.as_slice()).ok()?.delay?;
    let (seconds, nanos) = (u64::try_from(delay.seconds).ok()?, u32::try_from(delay.nanos).ok()?);
    Some(Duration::from_secs(seconds).saturating_add(Duration::from_nanos(nanos.into())).min(PAUSE_MAX))
}

/// The pause before the next attempt after `failures` in a row: the flush interval doubled each time, at most 2^5 of it.
pub(crate) fn pause(flush_interval: Duration, failures: u32, asked: Option<Duration>) -> Duration {
    let usual = flush_interval.saturating_mul(1 << failures.min(5)).min(PAUSE_MAX.max(flush_interval));
    asked.map_or(usual, |asked| asked.max(flush_interval))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_http(status: u16, retry_after: Option<&str>, path_is_bare: bool) -> Outcome {
        of_http_status(status, retry_after, path_is_bare, jiff::Timestamp::from_second(784_111_770).unwrap())
    }

    #[test]
    fn statuses_that_may_pass_are_tried_again() {
        for status in [429, 502, 503, 504] {
            assert!(matches!(of_http(status, None, false), Outcome::Later { pause: None, .. }), "{status}");
        }
        for status in [400, 401, 404, 413, 500, 501] {
            assert!(matches!(of_http(status, None, false), Outcome::Refused { .. }), "{status}");
        }
        for (text, seconds) in [
            (" 7 ", Some(7)),
            ("99999999", Some(60)),
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(7)),
            ("Sat, 05 Nov 1994 08:49:37 GMT", Some(0)),
            ("soon", None),
            ("-1", None),
        ] {
            let Outcome::Later { pause, .. } = of_http(503, Some(text), false) else { panic!("{text}") };
            assert_eq!(pause, seconds.map(Duration::from_secs), "{text}");
        }
    }

    #[test]
    fn a_404_without_a_path_says_what_was_probably_meant() {
        let Outcome::Refused { message } = of_http(404, None, true) else { panic!("refused") };
        assert!(message.contains("/v1/metrics"));
        let Outcome::Refused { message } = of_http(404, None, false) else { panic!("refused") };
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
    fn grpc_codes_follow_the_table_and_a_backend_may_name_the_pause() {
        let later = of_grpc_status(tonic::Code::Unavailable, "", &[]);
        assert!(matches!(later, Outcome::Later { pause: None, .. }));
        assert!(matches!(of_grpc_status(tonic::Code::InvalidArgument, "", &[]), Outcome::Refused { .. }));
        // google.rpc.Status { details: [Any { "type.googleapis.com/google.rpc.RetryInfo", RetryInfo { 3.5 s } }] }
        let info = [0x0a, 8, 0x08, 3, 0x10, 0x80, 0xca, 0xb5, 0xee, 1];
        let url = b"type.googleapis.com/google.rpc.RetryInfo";
        let mut any = vec![0x0a, 40];
        any.extend(url);
        any.extend([0x12, 10]);
        any.extend(info);
        let mut details = vec![0x1a, any.len() as u8];
        details.extend(any);
        let told = of_grpc_status(tonic::Code::ResourceExhausted, "", &details);
        assert!(
            matches!(told, Outcome::Later { pause: Some(pause), .. } if pause == Duration::from_millis(3_500)),
            "{told:?}"
        );
        assert!(matches!(
            of_grpc_status(tonic::Code::Unavailable, "", &details[..9]),
            Outcome::Later { pause: None, .. }
        ));
    }
}
