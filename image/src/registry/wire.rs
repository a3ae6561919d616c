//! HTTP with one registry: which scheme it speaks, how it wants to be asked, bounded answers, and which failures may pass.
//!
//! Used by the pull. Requests are asynchronous inside and blocking outside: a pull has threads of its own, and each request ends at
//! once when the pull is cancelled. A password or token goes to the registry and to the token service it names, and nowhere else: redirects
//! to other hosts lose it.

use std::future::Future;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use reqwest::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, RANGE, RETRY_AFTER, WWW_AUTHENTICATE,
};
use reqwest::{Client, Response, StatusCode, Url};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::error::ImageError;
use crate::registry::challenge::{self, Challenge};
use crate::registry::retry::{RetryPolicy, is_passing, retry_after};
use crate::registry::{Credential, Trust};

/// Largest answer of a token service and largest error text, in bytes.
const SMALL_ANSWER_BYTES: u64 = 1 << 20;
/// Time to reach a registry.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Redirects followed for one request.
const REDIRECTS_MAX: usize = 5;

/// Why one try failed.
pub(crate) enum Attempt {
    /// It may go better next time.
    Again { reason: String, after: Option<Duration> },
    /// It will not.
    Final(ImageError),
}

impl From<ImageError> for Attempt {
    fn from(error: ImageError) -> Self {
        Self::Final(error)
    }
}

/// What a pull needs to wait for the network and to be told to stop.
#[derive(Clone)]
pub(crate) struct Waiter {
    pub(crate) runtime: Handle,
    pub(crate) cancelled: CancellationToken,
    pub(crate) retry: RetryPolicy,
}

impl Waiter {
    /// Runs a future on this thread, for as long as a silence may last.
    pub(crate) fn run<T>(&self, work: impl Future<Output = Result<T, Attempt>>) -> Result<T, Attempt> {
        let silence = self.retry.silence;
        self.runtime.block_on(async {
            tokio::select! {
                biased;
                () = self.cancelled.cancelled() => Err(Attempt::Final(ImageError::Cancelled)),
                done = tokio::time::timeout(silence, work) => done.unwrap_or_else(|_| {
                    Err(Attempt::Again { reason: format!("nothing came for {} s", silence.as_secs()), after: None })
                }),
            }
        })
    }

    /// Waits, unless the pull is cancelled meanwhile.
    pub(crate) fn pause(&self, time: Duration) -> Result<(), ImageError> {
        self.runtime.block_on(async {
            tokio::select! {
                () = self.cancelled.cancelled() => Err(ImageError::Cancelled),
                () = tokio::time::sleep(time) => Ok(()),
            }
        })
    }
}

/// One registry, for one repository.
pub(crate) struct Wire {
    waiter: Waiter,
    client: Client,
    /// Host with port, as people write it.
    pub(crate) host: String,
    /// `https://host:port`.
    base: String,
    repository: String,
    credential: Option<Credential>,
    plain_allowed: bool,
    /// The `Authorization` that worked last.
    authorization: Mutex<Option<HeaderValue>>,
}

impl Wire {
    /// Finds out how a registry speaks. `origin` is a host with port, or a URL.
    pub(crate) fn open(
        waiter: Waiter,
        origin: &str,
        repository: &str,
        trust: &Trust,
        credential: Option<Credential>,
    ) -> Result<Self, Attempt> {
        let (schemes, host) = match origin.split_once("://") {
            Some(("http", host)) => (&["http"][..], host),
            Some(("https", host)) => (&["https"][..], host),
            _ if trust.insecure || is_loopback(origin) => (&["https", "http"][..], origin),
            _ => (&["https"][..], origin),
        };
        let host = host.trim_end_matches('/').to_owned();
        let plain_allowed = schemes.contains(&"http");
        let client = client(trust, plain_allowed).map_err(|error| registry_error(&host, &error))?;
        // Docker Hub's registry has another name than the one people write.
        let address = if host == "docker.io" { "registry-1.docker.io" } else { &host };
        let mut wire = Self {
            waiter,
            client,
            host: host.clone(),
            base: String::new(),
            repository: repository.to_owned(),
            credential,
            plain_allowed,
            authorization: Mutex::default(),
        };
        let mut last = None;
        for scheme in schemes {
            wire.base = format!("{scheme}://{address}");
            match wire.ping() {
                Ok(()) => return Ok(wire),
                // A registry that refuses has been understood.
                Err(Attempt::Final(error @ (ImageError::Cancelled | ImageError::RegistryDenied { .. }))) => {
                    return Err(error.into());
                }
                // Of two failures the one of the safer way is told.
                Err(error) => last = last.or(Some(error)),
            }
        }
        Err(last.unwrap_or_else(|| registry_error(&host, &"it speaks no scheme").into()))
    }

    /// Asks whether there is a registry, and learns how it wants to be asked.
    fn ping(&self) -> Result<(), Attempt> {
        let url = self.url("/v2/")?;
        self.waiter.run(async {
            let response = self.client.get(url).send().await.map_err(|error| self.broken(&error))?;
            match response.status() {
                StatusCode::OK => Ok(()),
                StatusCode::UNAUTHORIZED => self.authorize(response.headers()).await,
                status if is_passing(status.as_u16()) => Err(self.passing(&response)),
                status => Err(registry_error(&self.host, &format!("it answers /v2/ with {status}")).into()),
            }
        })
    }

    fn url(&self, path: &str) -> Result<Url, Attempt> {
        Url::parse(&format!("{}{path}", self.base)).map_err(|error| registry_error(&self.host, &error).into())
    }

    /// Satisfies a challenge.
    async fn authorize(&self, headers: &HeaderMap) -> Result<(), Attempt> {
        let values = headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
        let value = match (challenge::parse(values), &self.credential) {
            (Some(Challenge::Basic), Some(credential)) => basic(credential),
            (Some(Challenge::Basic), None) => return Err(self.denied("it wants a name and a password").into()),
            (Some(Challenge::Bearer { realm, service, scope }), credential) => {
                self.token(&realm, service, scope, credential.as_ref()).await?
            }
            (None, _) => return Err(self.denied("it refuses, and does not say what it wants").into()),
        };
        let mut value = HeaderValue::from_str(&value).map_err(|_| self.denied("the credentials cannot be sent"))?;
        value.set_sensitive(true);
        *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
        Ok(())
    }

    /// Buys a token.
    async fn token(
        &self,
        realm: &str,
        service: Option<String>,
        scope: Option<String>,
        credential: Option<&Credential>,
    ) -> Result<String, Attempt> {
        let unusable = || registry_error(&self.host, &"the address of its token service cannot be used");
        let mut url = Url::parse(realm).map_err(|_| unusable())?;
        match url.scheme() {
            "https" => {}
            "http" if self.plain_allowed => {}
            _ => return Err(unusable().into()),
        }
        let scope = scope.unwrap_or_else(|| format!("repository:{}:pull", self.repository));
        let mut request = if let Some(Credential::IdentityToken { token }) = credential {
            // OAuth 2, as docker's identity tokens want it.
            let mut form = url::form(&[
                ("grant_type", "refresh_token"),
                ("refresh_token", token),
                ("client_id", "msb"),
                ("scope", &scope),
            ]);
            if let Some(service) = &service {
                form.push('&');
                form.push_str(&url::form(&[("service", service)]));
            }
            self.client.post(url).header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(form)
        } else {
            if !self.repository.is_empty() {
                url.query_pairs_mut().append_pair("scope", &scope);
            }
            if let Some(service) = &service {
                url.query_pairs_mut().append_pair("service", service);
            }
            self.client.get(url)
        };
        if let Some(credential @ Credential::Password { .. }) = credential {
            request = request.header(AUTHORIZATION, basic(credential));
        }
        let response = request.send().await.map_err(|error| self.broken(&error))?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST => {
                return Err(self.denied("its token service refuses the credentials").into());
            }
            status if is_passing(status.as_u16()) => return Err(self.passing(&response)),
            status => {
                return Err(registry_error(&self.host, &format!("its token service answers with {status}")).into());
            }
        }
        let body = collect(response, SMALL_ANSWER_BYTES).await.map_err(|error| self.broken_body(error))?;
        let token = challenge::token(&body)
            .map_err(|why| registry_error(&self.host, &format!("its token service cannot be used: {why}")))?;
        Ok(format!("Bearer {token}"))
    }

    /// Sends a request; a refusal for want of credentials is answered once.
    async fn get(&self, path: &str, accept: Option<&str>, from: u64) -> Result<Response, Attempt> {
        let url = self.url(path)?;
        for second in [false, true] {
            // What the store keeps is the bytes as they are, so nothing may be packed on the way.
            let mut request = self.client.get(url.clone()).header(ACCEPT_ENCODING, "identity");
            if let Some(accept) = accept {
                request = request.header(ACCEPT, accept);
            }
            if from > 0 {
                request = request.header(RANGE, format!("bytes={from}-"));
            }
            let authorization = self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if let Some(value) = authorization {
                request = request.header(AUTHORIZATION, value);
            }
            let response = request.send().await.map_err(|error| self.broken(&error))?;
            let status = response.status();
            match status {
                StatusCode::OK | StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
                    return Ok(response);
                }
                // A token lives for minutes, a pull may take longer.
                StatusCode::UNAUTHORIZED if !second => self.authorize(response.headers()).await?,
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                    return Err(self.denied("it refuses access").into());
                }
                StatusCode::NOT_FOUND => {
                    return Err(Attempt::Final(ImageError::RegistryNotFound {
                        registry: self.host.clone(),
                        what: self.repository.clone(),
                    }));
                }
                status if is_passing(status.as_u16()) => return Err(self.passing(&response)),
                status => {
                    let text = collect(response, SMALL_ANSWER_BYTES).await.unwrap_or_default();
                    let text: String = String::from_utf8_lossy(&text).chars().take(200).collect();
                    return Err(registry_error(&self.host, &format!("it answers with {status}: {text}")).into());
                }
            }
        }
        Err(self.denied("it refuses access").into())
    }

    /// A manifest or index with the type the registry gives it.
    pub(crate) fn manifest(&self, which: &str, accept: &str, limit: u64) -> Result<(Vec<u8>, String), Attempt> {
        self.waiter.run(async {
            let path = format!("/v2/{}/manifests/{which}", self.repository);
            let response = self.get(&path, Some(accept), 0).await?;
            let content_type = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
            let content_type = content_type.unwrap_or_default().to_owned();
            let bytes = collect(response, limit).await.map_err(|error| self.broken_body(error))?;
            Ok((bytes, content_type))
        })
    }

    /// A small blob.
    pub(crate) fn small_blob(&self, digest: crate::Digest, limit: u64) -> Result<Vec<u8>, Attempt> {
        self.waiter.run(async {
            let response = self.get(&format!("/v2/{}/blobs/{digest}", self.repository), None, 0).await?;
            collect(response, limit).await.map_err(|error| self.broken_body(error))
        })
    }

    /// A blob from an offset on, piece by piece. The registry may begin earlier than asked.
    pub(crate) fn blob(&self, digest: crate::Digest, from: u64) -> Result<BlobStream<'_>, Attempt> {
        let response = self.waiter.run(self.get(&format!("/v2/{}/blobs/{digest}", self.repository), None, from))?;
        let begins = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let range = response.headers().get("content-range").and_then(|value| value.to_str().ok());
                let begins = range
                    .and_then(|range| range.strip_prefix("bytes "))
                    .and_then(|range| range.split('-').next())
                    .and_then(|start| start.parse().ok());
                match begins {
                    Some(begins) if begins <= from => begins,
                    _ => return Err(registry_error(&self.host, &"its partial answer is of another part").into()),
                }
            }
            StatusCode::RANGE_NOT_SATISFIABLE => {
                return Err(registry_error(&self.host, &"the blob is shorter than its manifest says").into());
            }
            _ => 0,
        };
        Ok(BlobStream { wire: self, response, begins })
    }

    /// Whether the credentials are good: what `login` asks.
    pub(crate) fn check(&self) -> Result<(), Attempt> {
        let url = self.url("/v2/")?;
        self.waiter.run(async {
            let authorization = self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let mut request = self.client.get(url);
            if let Some(value) = authorization {
                request = request.header(AUTHORIZATION, value);
            }
            let response = request.send().await.map_err(|error| self.broken(&error))?;
            match response.status() {
                StatusCode::OK => Ok(()),
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                    Err(self.denied("it refuses the name or the password").into())
                }
                status if is_passing(status.as_u16()) => Err(self.passing(&response)),
                status => Err(registry_error(&self.host, &format!("it answers /v2/ with {status}")).into()),
            }
        })
    }

    fn denied(&self, reason: &str) -> ImageError {
        ImageError::RegistryDenied {
            registry: self.host.clone(),
            reason: reason.to_owned(),
            as_user: self.credential.as_ref().map(|credential| credential.user().to_owned()),
        }
    }

    fn passing(&self, response: &Response) -> Attempt {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let asked = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
        Attempt::Again {
            reason: format!("it answers with {}", response.status()),
            after: asked.and_then(|text| retry_after(text, now)),
        }
    }

    fn broken(&self, error: &reqwest::Error) -> Attempt {
        let reason = chain(error);
        // A certificate does not become better by waiting, nor does a redirect that is not followed.
        if error.is_builder() || error.is_redirect() || reason.contains("certificate") {
            return registry_error(&self.host, &reason).into();
        }
        Attempt::Again { reason, after: None }
    }

    fn broken_body(&self, error: BodyError) -> Attempt {
        match error {
            BodyError::Broken(error) => self.broken(&error),
            BodyError::Limit(limit) => {
                Attempt::Final(ImageError::Limit { what: format!("an answer of {}", self.host), limit, unit: " bytes" })
            }
        }
    }
}

/// The rest of a blob.
pub(crate) struct BlobStream<'w> {
    wire: &'w Wire,
    response: Response,
    /// Where in the blob the first byte is.
    pub(crate) begins: u64,
}

impl BlobStream<'_> {
    /// The next piece; `None` at the end of the answer.
    pub(crate) fn next(&mut self) -> Result<Option<bytes::Bytes>, Attempt> {
        let wire = self.wire;
        let response = &mut self.response;
        wire.waiter.run(async { response.chunk().await.map_err(|error| wire.broken(&error)) })
    }
}

enum BodyError {
    Broken(reqwest::Error),
    Limit(u64),
}

/// Reads an answer of at most `limit` bytes.
async fn collect(mut response: Response, limit: u64) -> Result<Vec<u8>, BodyError> {
    let mut body = Vec::new();
    while let Some(piece) = response.chunk().await.map_err(BodyError::Broken)? {
        if (body.len() + piece.len()) as u64 > limit {
            return Err(BodyError::Limit(limit));
        }
        body.extend_from_slice(&piece);
    }
    Ok(body)
}

fn client(trust: &Trust, plain_allowed: bool) -> Result<Client, String> {
    let redirects = reqwest::redirect::Policy::custom(move |attempt| {
        if attempt.previous().len() > REDIRECTS_MAX {
            attempt.error("too many redirects")
        } else if attempt.url().scheme() != "https" && !plain_allowed {
            attempt.error("a redirect to a connection that is not encrypted")
        } else {
            attempt.follow()
        }
    });
    let mut builder = Client::builder()
        .user_agent(concat!("msb/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        .no_gzip()
        .redirect(redirects)
        .tls_danger_accept_invalid_certs(trust.insecure);
    if let Some(pem) = &trust.ca_certs {
        let certificates = reqwest::Certificate::from_pem_bundle(pem.as_bytes())
            .map_err(|error| format!("the certificates to trust cannot be read: {}", chain(&error)))?;
        if certificates.is_empty() {
            return Err("the file of certificates to trust holds none".into());
        }
        builder = builder.tls_certs_merge(certificates);
    }
    builder.build().map_err(|error| chain(&error))
}

/// Docker, too, takes a registry on this machine for one that needs no certificate.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn basic(credential: &Credential) -> String {
    match credential {
        Credential::Password { username, password } => {
            format!("Basic {}", BASE64.encode(format!("{username}:{password}")))
        }
        Credential::IdentityToken { token } => format!("Bearer {token}"),
    }
}

fn registry_error(registry: &str, reason: &dyn std::fmt::Display) -> ImageError {
    ImageError::Registry { registry: registry.to_owned(), reason: reason.to_string() }
}

/// An error with its causes, without the URL (which may hold a signature).
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        let text = text.split(" for url (").next().unwrap_or_default().to_owned();
        if parts.last() != Some(&text) {
            parts.push(text);
        }
        next = error.source();
    }
    parts.join(": ")
}

mod url {
    //! The one thing of a URL that reqwest does not offer here.

    /// `application/x-www-form-urlencoded`.
    pub(super) fn form(pairs: &[(&str, &str)]) -> String {
        let mut url = match reqwest::Url::parse("http://form/") {
            Ok(url) => url,
            Err(_) => return String::new(),
        };
        url.query_pairs_mut().extend_pairs(pairs);
        url.query().unwrap_or_default().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_may_be_plain_by_itself() {
        for host in ["localhost", "localhost:5000", "127.0.0.1:5000", "127.9.9.9", "[::1]:5000"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["docker.io", "10.0.0.1:5000", "localhost.example.org", "[::2]:5000", "128.0.0.1"] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn forms_are_encoded() {
        assert_eq!(url::form(&[("a", "b c&d"), ("e", "ä")]), "a=b+c%26d&e=%C3%A4");
    }
}
