//! Requests to the hub: the files of a revision, and a file's checksum, size and contents.

use std::time::Duration;

use hf_hub::api::RepoInfo;
use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Repo, RepoType};
use ureq::Body;
use ureq::http::{HeaderMap, Response};

use crate::cache::is_file_name;
use crate::{FetchOptions, HubError};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// Timeout for the next bytes.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
const MAX_REDIRECTS: u32 = 10;

/// A file on the hub.
#[derive(Debug)]
pub struct Remote {
    /// Its path in the repository.
    pub file: String,
    /// Its commit.
    pub commit: String,
    /// Its name in `blobs`: a SHA-256 or, for small files, git's SHA-1.
    pub etag: String,
    /// Size in bytes.
    pub size: u64,
    /// Its URL.
    pub url: String,
}

/// The subject of a request, which determines the meaning of a 404.
#[derive(Clone, Copy)]
enum About<'a> {
    Revision,
    File(&'a str),
}

/// The hub's client for one revision of one repository.
pub struct Client {
    api: ApiRepo,
    id: String,
    revision: String,
    /// The URL of the repository.
    page: String,
    endpoint: String,
}

impl Client {
    pub fn new(id: &str, revision: &str, options: &FetchOptions) -> Result<Self, HubError> {
        let mut builder = ApiBuilder::from_cache(hf_hub::Cache::new(options.cache_folder()?))
            .with_token(options.token.clone())
            .with_user_agent("diffuse", env!("CARGO_PKG_VERSION"));
        if let Some(endpoint) = &options.endpoint {
            builder = builder.with_endpoint(endpoint.clone());
        }
        let repo = Repo::with_revision(id.into(), RepoType::Model, revision.into());
        let api = builder.build().map_err(|error| HubError::Unreachable {
            endpoint: options.endpoint.clone().unwrap_or_default(),
            source: error.into(),
        })?;
        let api = api.repo(repo);
        let any_file = api.url("");
        let (page, _) = any_file.split_once("/resolve/").unwrap_or_default();
        Ok(Self {
            id: id.to_string(),
            revision: revision.to_string(),
            page: page.to_string(),
            endpoint: page.trim_end_matches(id).trim_end_matches('/').to_string(),
            api,
        })
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// The commit of the revision, and the paths of its files.
    pub fn listing(&self) -> Result<(String, Vec<String>), HubError> {
        let url = self.api.info_request().uri_ref().map(ToString::to_string);
        let url = url.unwrap_or_default();
        let response = self.get(&url, None, MAX_REDIRECTS)?;
        let mut response = self.accept(response, &url, About::Revision)?;
        let wrong = |message: String| HubError::Protocol {
            url: url.clone(),
            message,
        };
        let info: RepoInfo = response
            .body_mut()
            .read_json()
            .map_err(|error| wrong(error.to_string()))?;
        if !is_file_name(&info.sha) {
            return Err(wrong(format!("`{}` is not a commit", info.sha)));
        }
        let files = info.siblings.into_iter().map(|file| file.rfilename);
        Ok((info.sha, files.filter(|file| is_plain(file)).collect()))
    }

    /// The checksum, size and URL of a file.
    pub fn remote(&self, commit: &str, file: &str) -> Result<Remote, HubError> {
        let mut url = format!("{}/resolve/{commit}/{}", self.page, encode(file));
        // Follows redirects within the hub only. The redirect to the storage of large files has the
        // checksum in its headers; later responses have not.
        for _ in 0..MAX_REDIRECTS {
            let response = self.get(&url, Some(0..=0), 0)?;
            let response = self.accept(response, &url, About::File(file))?;
            let headers = response.headers();
            if response.status().is_redirection()
                && let Some(path) = text(headers, "location").filter(|to| to.starts_with('/'))
                && !path.starts_with("//")
            {
                url = format!("{}{path}", origin(&url));
                continue;
            }
            let wrong = |message: &str| HubError::Protocol {
                url: url.clone(),
                message: message.to_string(),
            };
            let etag = text(headers, "x-linked-etag").or_else(|| text(headers, "etag"));
            let etag = etag.map(|etag| etag.trim_start_matches("W/").trim_matches('"'));
            let etag = etag.filter(|etag| is_file_name(etag));
            let size = if response.status().is_redirection() {
                text(headers, "x-linked-size")
            } else {
                let range =
                    text(headers, "content-range").and_then(|range| range.split('/').nth(1));
                range.or_else(|| text(headers, "content-length"))
            };
            return Ok(Remote {
                file: file.to_string(),
                commit: commit.to_string(),
                etag: etag
                    .ok_or_else(|| wrong("it has no usable `ETag`"))?
                    .to_string(),
                size: size
                    .and_then(|size| size.parse().ok())
                    .ok_or_else(|| wrong("it does not say the file's size"))?,
                url,
            });
        }
        Err(HubError::Protocol {
            url,
            message: "it redirects without end".into(),
        })
    }

    /// The bytes of a file from an offset on.
    pub fn read(&self, remote: &Remote, from: u64) -> Result<Response<Body>, HubError> {
        let range = from..=remote.size.saturating_sub(1).max(from);
        let response = self.get(&remote.url, Some(range), MAX_REDIRECTS)?;
        // Out of range: the caller starts from the beginning.
        if response.status() == 416 {
            return Ok(response);
        }
        self.accept(response, &remote.url, About::File(&remote.file))
    }

    /// Sends a request. Redirects get the token only on the same host.
    fn get(
        &self,
        url: &str,
        range: Option<std::ops::RangeInclusive<u64>>,
        redirects: u32,
    ) -> Result<Response<Body>, HubError> {
        let mut request = self.api.info_request().uri(url);
        if let Some(range) = range {
            let range = format!("bytes={}-{}", range.start(), range.end());
            request = request.header("Range", range);
        }
        let mut config = request
            .config()
            .http_status_as_error(false)
            .max_redirects(redirects)
            // A compressed response has other offsets.
            .accept_encoding("identity")
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(READ_TIMEOUT))
            .timeout_per_read(Some(READ_TIMEOUT));
        if is_loopback(url) {
            // No proxy for a local server.
            config = config.proxy(None);
        }
        config
            .build()
            .call()
            .map_err(|error| HubError::Unreachable {
                endpoint: self.endpoint.clone(),
                source: error.into(),
            })
    }

    /// The response, or the error of its status.
    fn accept(
        &self,
        response: Response<Body>,
        url: &str,
        about: About<'_>,
    ) -> Result<Response<Body>, HubError> {
        let status = response.status().as_u16();
        let code = text(response.headers(), "x-error-code").unwrap_or_default();
        let id = self.id.clone();
        let revision = self.revision.clone();
        Err(match (status, code, about) {
            (200..=399, ..) => return Ok(response),
            (401 | 403, "GatedRepo", _) => HubError::Gated {
                id,
                page: self.page.clone(),
            },
            (401 | 403 | 404, "RepoNotFound", _) => HubError::NoRepository { id },
            (404, "RevisionNotFound", _) => HubError::NoRevision { id, revision },
            (401 | 403, ..) => HubError::Unauthorized { id },
            (404, "", About::Revision) => HubError::NoRepository { id },
            (404, _, About::File(file)) => HubError::NoFile {
                id,
                revision,
                file: file.to_string(),
                hint: String::new(),
            },
            (429 | 500.., ..) => HubError::Busy {
                status,
                url: url.to_string(),
            },
            _ => HubError::Protocol {
                url: url.to_string(),
                message: format!("status {status} {code}").trim_end().to_string(),
            },
        })
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn is_loopback(url: &str) -> bool {
    let host = origin(url).split("://").nth(1).unwrap_or_default();
    ["localhost", "127.0.0.1", "[::1]"].iter().any(|name| {
        host.strip_prefix(name)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(':'))
    })
}

/// Whether a path stays in the folder that it is joined to, on any operating system.
fn is_plain(file: &str) -> bool {
    let is_name =
        |part: &str| !matches!(part, "" | "." | "..") && !part.contains(['\\', ':', '\0']);
    file.split('/').all(is_name)
}

/// A path, encoded for a URL.
fn encode(file: &str) -> String {
    let mut encoded = String::new();
    for byte in file.bytes() {
        match byte {
            b'/' | b'-' | b'.' | b'_' | b'~' => encoded.push(byte.into()),
            _ if byte.is_ascii_alphanumeric() => encoded.push(byte.into()),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

/// `https://host:port` of a URL.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    let end = url[host..].find('/').map_or(url.len(), |at| host + at);
    &url[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_leave_the_folder_are_not_listed() {
        for file in ["a", "a/b.json", "a/b/c d#e?.json", "..a", "a.."] {
            assert!(is_plain(file), "{file}");
        }
        for file in [
            "", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a\\b", "C:a", "a\0",
        ] {
            assert!(!is_plain(file), "{file:?}");
        }
    }

    #[test]
    fn addresses_are_those_of_hf_hub() {
        let folder = tempfile::tempdir().unwrap();
        let options = FetchOptions {
            endpoint: Some("http://mirror.example:81/hub".into()),
            cache: Some(folder.path().into()),
            ..FetchOptions::default()
        };
        let client = Client::new("a/b", "refs/pr/1", &options).unwrap();
        assert_eq!(client.page, "http://mirror.example:81/hub/a/b");
        assert_eq!(client.endpoint, "http://mirror.example:81/hub");
        assert_eq!(
            client.api.info_request().uri_ref().unwrap(),
            "http://mirror.example:81/hub/api/models/a/b/revision/refs%2Fpr%2F1"
        );
        assert_eq!(
            origin("http://mirror.example:81/hub"),
            "http://mirror.example:81"
        );
        assert_eq!(origin("http://mirror.example"), "http://mirror.example");
    }
}
