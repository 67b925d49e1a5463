//! Who may use the server.
//!
//! A page of any site may send requests to the visitor's own machine, under a name of its own that
//! it points there (DNS rebinding). So the `Host` and the `Origin` of a request have to be names of
//! this server.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::StreamExt;
use subtle::ConstantTimeEq;

use crate::App;

/// How long a body that is too large is read.
const DISCARD_TIME: Duration = Duration::from_secs(10);

/// Names and key of a server.
#[derive(Debug)]
pub struct Access {
    /// The address that it listens on.
    pub address: SocketAddr,
    /// Other names that it has.
    pub hosts: Vec<String>,
    /// The key that requests need.
    pub key: Option<String>,
}

impl Access {
    /// Whether a server has this name.
    fn is_own(&self, host: &str) -> bool {
        // `name`, `name:port`, `[::1]:port`
        let name = match host.strip_prefix('[') {
            Some(rest) => rest.split_once(']').map_or(rest, |(name, _)| name),
            None => host.rsplit_once(':').map_or(host, |(name, _)| name),
        };
        if name.eq_ignore_ascii_case("localhost")
            || self.hosts.iter().any(|own| own.eq_ignore_ascii_case(name))
        {
            return true;
        }
        // Names are what rebinding needs; an address is no name.
        match name.parse::<IpAddr>() {
            Ok(address) if self.address.ip().is_loopback() => address.is_loopback(),
            Ok(_) => true,
            Err(_) => false,
        }
    }

    fn check(
        &self,
        headers: &HeaderMap,
        needs_key: bool,
    ) -> Result<(), (StatusCode, &'static str)> {
        let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or(""));
        let host = text(header::HOST).unwrap_or_default();
        if !self.is_own(host) {
            let message = "this server does not have the name of the `Host` header; \
                           `--allow-host` gives it one";
            return Err((StatusCode::FORBIDDEN, message));
        }
        if let Some(origin) = text(header::ORIGIN) {
            let host = origin.split_once("://").map_or("", |(_, host)| host);
            if !self.is_own(host) {
                return Err((
                    StatusCode::FORBIDDEN,
                    "pages of other sites may not use this server",
                ));
            }
        }
        let Some(key) = self.key.as_deref().filter(|_| needs_key) else {
            return Ok(());
        };
        let given = text(header::AUTHORIZATION)
            .and_then(given_key)
            .unwrap_or_default();
        if bool::from(given.as_bytes().ct_eq(key.as_bytes())) {
            Ok(())
        } else {
            Err((StatusCode::UNAUTHORIZED, "the key is missing or wrong"))
        }
    }
}

/// The key of `Bearer KEY`, or of `Basic` with the key as the password.
fn given_key(authorization: &str) -> Option<String> {
    let (scheme, value) = authorization.split_once(' ')?;
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(value.trim().to_string());
    }
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = String::from_utf8(STANDARD.decode(value.trim()).ok()?).ok()?;
    Some(decoded.split_once(':')?.1.to_string())
}

/// Refuses requests that may not be answered.
pub async fn check(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let needs_key = path.starts_with("/v1/")
        || path.starts_with("/sdapi/")
        || path.starts_with("/internal/")
        || path == "/metrics";
    match app.access.check(request.headers(), needs_key) {
        Ok(()) if is_too_large(&request, app.limits.body) => {
            let path = path.to_string();
            discard(request.into_body()).await;
            let limit = app.limits.body;
            let message = format!("the body is too large: at most {limit} bytes here");
            crate::error(&path, StatusCode::PAYLOAD_TOO_LARGE, &message)
        }
        Ok(()) => next.run(request).await,
        Err((status, message)) => {
            let mut response = crate::error(path, status, message);
            if status == StatusCode::UNAUTHORIZED {
                let challenge = "Bearer".parse().expect("a header's value");
                response
                    .headers_mut()
                    .insert(header::WWW_AUTHENTICATE, challenge);
            }
            response
        }
    }
}

/// Whether a body says that it is larger than the limit; one that does not say it is read so far.
fn is_too_large(request: &Request, limit: usize) -> bool {
    let length = request.headers().get(header::CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    length.is_some_and(|length| length > limit as u64)
}

/// Reads a body without keeping it, for some seconds: a client that is answered while it sends
/// may take the end of the connection for the answer.
async fn discard(body: Body) {
    let mut chunks = body.into_data_stream();
    let read = async { while let Some(Ok(_)) = chunks.next().await {} };
    let _ = tokio::time::timeout(DISCARD_TIME, read).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(address: &str, key: Option<&str>) -> Access {
        Access {
            address: address.parse().unwrap(),
            hosts: vec!["images.example".into()],
            key: key.map(String::from),
        }
    }

    #[test]
    fn names_of_the_server() {
        let local = access("127.0.0.1:8080", None);
        for host in [
            "localhost",
            "LOCALHOST:8080",
            "127.0.0.1:8080",
            "[::1]:1",
            "images.example",
        ] {
            assert!(local.is_own(host), "{host}");
        }
        for host in [
            "",
            "evil.example",
            "evil.example:8080",
            "192.168.0.7",
            "localhost.evil.example",
        ] {
            assert!(!local.is_own(host), "{host}");
        }
        let open = access("0.0.0.0:8080", None);
        assert!(open.is_own("192.168.0.7:8080"));
        assert!(!open.is_own("evil.example"));
    }

    #[test]
    fn keys() {
        let access = access("127.0.0.1:8080", Some("secret"));
        let check = |authorization: Option<&str>, origin: Option<&str>, needs_key| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, "localhost".parse().unwrap());
            for (name, value) in [
                (header::AUTHORIZATION, authorization),
                (header::ORIGIN, origin),
            ] {
                if let Some(value) = value {
                    headers.insert(name, value.parse().unwrap());
                }
            }
            access
                .check(&headers, needs_key)
                .map_err(|(status, _)| status.as_u16())
        };
        assert_eq!(check(None, None, false), Ok(()));
        assert_eq!(check(None, None, true), Err(401));
        assert_eq!(check(Some("Bearer wrong"), None, true), Err(401));
        assert_eq!(check(Some("Bearer secret"), None, true), Ok(()));
        // `anyone:secret`
        assert_eq!(
            check(Some("Basic YW55b25lOnNlY3JldA=="), None, true),
            Ok(())
        );
        assert_eq!(check(None, Some("http://localhost:3000"), false), Ok(()));
        assert_eq!(check(None, Some("https://evil.example"), false), Err(403));
        assert_eq!(check(None, Some("null"), false), Err(403));
    }
}
