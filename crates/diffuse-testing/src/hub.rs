//! A local hub: a small HTTP server that responds like the Hugging Face hub, with failures on
//! demand.
//!
//! Large files are redirected to another host (`localhost` in place of `127.0.0.1`), like the hub's
//! storage; small ones are redirected within the hub first.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use serde_json::json;
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// Files that the hub redirects to its storage.
const LARGE: [&str; 3] = [".safetensors", ".bin", ".ckpt"];

/// The failures of the hub.
#[derive(Debug, Clone, Default)]
pub struct Behaviour {
    /// Requests without this token get 401.
    pub token: Option<String>,
    /// Every request gets the error of a gated repository.
    pub gated: bool,
    /// The connection closes after this number of bytes of a large file.
    pub break_after: Option<usize>,
    /// How many times it closes.
    pub breaks: usize,
    /// The file whose last byte is wrong.
    pub corrupt: Option<String>,
    /// Ranges are ignored: responses have the whole file.
    pub ignore_range: bool,
    /// Number of requests that get 503 first.
    pub busy: usize,
}

/// A received request.
#[derive(Debug, Clone)]
pub struct Request {
    /// The requested file; empty for the repository itself.
    pub file: String,
    /// The path in the URL.
    pub path: String,
    /// The host.
    pub host: String,
    /// The first requested byte, for requests of contents.
    pub from: Option<usize>,
    /// Whether it had a token.
    pub token: bool,
}

#[derive(Default)]
struct State {
    /// The files of each repository, by id.
    repositories: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    behaviour: Behaviour,
    requests: Vec<Request>,
}

/// A running hub, until the end of the process.
#[derive(Clone)]
pub struct HubServer {
    port: u16,
    state: Arc<Mutex<State>>,
}

impl HubServer {
    /// Starts a hub without repositories.
    ///
    /// # Panics
    /// If no port is available.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port on this machine");
        let port = listener.local_addr().expect("an address").port();
        let server = Self {
            port,
            state: Arc::default(),
        };
        let shared = server.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let server = shared.clone();
                thread::spawn(move || server.serve(stream));
            }
        });
        server
    }

    /// Its URL.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Publishes the files of a folder, one level deep.
    ///
    /// # Panics
    /// If the folder cannot be read.
    pub fn publish(&self, id: &str, folder: impl AsRef<Path>) {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().unwrap().to_str().unwrap().to_string();
            if path.is_dir() {
                for file in fs::read_dir(&path).expect("a folder") {
                    let file = file.expect("an entry");
                    let inner = file.file_name().into_string().unwrap();
                    self.publish_file(
                        id,
                        &format!("{name}/{inner}"),
                        fs::read(file.path()).unwrap(),
                    );
                }
            } else {
                self.publish_file(id, &name, fs::read(&path).unwrap());
            }
        }
    }

    /// Publishes or replaces one file.
    pub fn publish_file(&self, id: &str, file: &str, bytes: impl Into<Vec<u8>>) {
        let mut state = self.state();
        let files = state.repositories.entry(id.to_string()).or_default();
        files.insert(file.to_string(), bytes.into());
    }

    /// Removes a file from a repository.
    pub fn remove_file(&self, id: &str, file: &str) {
        let mut state = self.state();
        let files = state.repositories.get_mut(id).expect("a repository");
        files.remove(file).expect("a file");
    }

    /// The name of a file in the cache's `blobs`.
    pub fn etag(&self, id: &str, file: &str) -> String {
        etag(file, &self.state().repositories[id][file])
    }

    /// The commit of `main`.
    pub fn commit(&self, id: &str) -> String {
        commit(&self.state().repositories[id])
    }

    /// Changes its failures.
    pub fn behave(&self, behaviour: Behaviour) {
        self.state().behaviour = behaviour;
    }

    /// The requests since the last call.
    pub fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state().requests)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, stream: TcpStream) {
        // Errors of a client that disconnects are ignored.
        let _ = stream.set_read_timeout(Some(Duration::from_secs(20)));
        let Some(head) = Head::read(&stream) else {
            return;
        };
        let mut answer = self.answer(&head);
        let mut text = format!("HTTP/1.1 {}\r\nConnection: close\r\n", answer.status);
        let length = answer.body.len();
        let _ = write!(text, "Content-Length: {length}\r\n");
        for (name, value) in &answer.headers {
            let _ = write!(text, "{name}: {value}\r\n");
        }
        text.push_str("\r\n");
        if let Some(after) = answer.break_after {
            answer.body.truncate(after);
        }
        let mut stream = stream;
        let _ = stream.write_all(text.as_bytes());
        let _ = stream.write_all(&answer.body);
        let _ = stream.flush();
        let _ = stream.shutdown(Shutdown::Write);
    }

    fn answer(&self, head: &Head) -> Answer {
        let mut state = self.state();
        let state = &mut *state;
        let behaviour = &mut state.behaviour;
        let mut request = Request {
            file: String::new(),
            path: head.path.clone(),
            host: head.get("host").cloned().unwrap_or_default(),
            from: None,
            token: head.get("authorization").is_some(),
        };
        let place = place(&head.path);
        if let Some(Place { file, .. }) = &place {
            request.file = file.clone();
            // Clients request the first byte to get the headers.
            let range = head.range().filter(|range| *range != (0, Some(0)));
            request.from = range.map(|(from, _)| from);
        }
        let from = request.from;
        state.requests.push(request);

        if behaviour.busy > 0 {
            behaviour.busy -= 1;
            return Answer::status("503 Service Unavailable");
        }
        let Some(Place {
            kind,
            id,
            revision,
            file,
        }) = place
        else {
            return Answer::status("400 Bad Request");
        };
        let authorized = behaviour
            .token
            .as_ref()
            .is_none_or(|token| head.get("authorization") == Some(&format!("Bearer {token}")));
        if kind != Kind::Storage && !authorized {
            return Answer::status("401 Unauthorized");
        }
        if kind == Kind::Storage && head.get("authorization").is_some() {
            // Like the real storage, whose URLs are signed.
            return Answer::status("400 Bad Request");
        }
        let Some(files) = state.repositories.get(&id) else {
            return Answer::error("404 Not Found", "RepoNotFound");
        };
        let main = commit(files);
        if revision != "main" && revision != main {
            return Answer::error("404 Not Found", "RevisionNotFound");
        }
        if kind == Kind::Info {
            let siblings: Vec<_> = files
                .keys()
                .map(|file| json!({ "rfilename": file }))
                .collect();
            let body = json!({ "id": id, "sha": main, "siblings": siblings, "private": false });
            return Answer {
                body: body.to_string().into_bytes(),
                ..Answer::status("200 OK")
            };
        }
        if behaviour.gated {
            return Answer::error("401 Unauthorized", "GatedRepo");
        }
        let Some(bytes) = files.get(&file) else {
            return Answer::error("404 Not Found", "EntryNotFound");
        };
        let etag = etag(&file, bytes);
        let large = is_large(&file);
        let at = file.replace(' ', "%20").replace('#', "%23");
        match kind {
            Kind::Resolve if large => {
                let at = format!("http://localhost:{}/storage/{id}/{main}/{at}", self.port);
                Answer::redirect("302 Found", at)
                    .with("X-Linked-Size", bytes.len())
                    .with("X-Linked-Etag", format!("\"{etag}\""))
                    .with("ETag", "\"of-the-pointer\"")
                    .with("X-Repo-Commit", main)
            }
            Kind::Resolve => {
                let at = format!("/api/resolve-cache/models/{id}/{main}/{at}");
                Answer::redirect("307 Temporary Redirect", at)
                    .with("ETag", "\"of-the-redirect\"")
                    .with("X-Repo-Commit", main)
            }
            _ => {
                let mut bytes = bytes.clone();
                if behaviour.corrupt.as_ref() == Some(&file) {
                    *bytes.last_mut().expect("a byte") ^= 1;
                }
                let range = head.range().filter(|_| !behaviour.ignore_range);
                let mut answer = contents(bytes, range).with("ETag", format!("W/\"{etag}\""));
                if large && from.is_some() && behaviour.breaks > 0 {
                    behaviour.breaks -= 1;
                    answer.break_after = behaviour.break_after;
                }
                answer
            }
        }
    }
}

struct Answer {
    status: &'static str,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    break_after: Option<usize>,
}

impl Answer {
    fn status(status: &'static str) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: Vec::new(),
            break_after: None,
        }
    }

    fn error(status: &'static str, code: &str) -> Self {
        Self::status(status).with("X-Error-Code", code)
    }

    fn redirect(status: &'static str, to: String) -> Self {
        Self {
            body: b"redirecting".to_vec(),
            ..Self::status(status).with("Location", to)
        }
    }

    fn with(mut self, name: &'static str, value: impl ToString) -> Self {
        self.headers.push((name, value.to_string()));
        self
    }
}

fn contents(bytes: Vec<u8>, range: Option<(usize, Option<usize>)>) -> Answer {
    let length = bytes.len();
    match range {
        None => Answer {
            body: bytes,
            ..Answer::status("200 OK")
        },
        Some((from, _)) if from >= length => Answer::status("416 Range Not Satisfiable")
            .with("Content-Range", format!("bytes */{length}")),
        Some((from, to)) => {
            let end = to.map_or(length, |to| (to + 1).min(length));
            Answer {
                body: bytes[from..end].to_vec(),
                ..Answer::status("206 Partial Content").with(
                    "Content-Range",
                    format!("bytes {from}-{}/{length}", end - 1),
                )
            }
        }
    }
}

struct Head {
    path: String,
    headers: Vec<(String, String)>,
}

impl Head {
    fn read(stream: &TcpStream) -> Option<Self> {
        let mut lines = BufReader::new(stream).lines();
        let first = lines.next()?.ok()?;
        let path = first.strip_prefix("GET ")?.split(' ').next()?.to_string();
        let mut headers = Vec::new();
        for line in lines {
            let line = line.ok()?;
            let Some((name, value)) = line.split_once(':') else {
                break;
            };
            headers.push((name.to_lowercase(), value.trim().to_string()));
        }
        Some(Self { path, headers })
    }

    fn get(&self, name: &str) -> Option<&String> {
        let found = self.headers.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value)
    }

    fn range(&self) -> Option<(usize, Option<usize>)> {
        let range = self.get("range")?.strip_prefix("bytes=")?;
        let (from, to) = range.split_once('-')?;
        Some((from.parse().ok()?, to.parse().ok()))
    }
}

#[derive(PartialEq)]
enum Kind {
    Info,
    Resolve,
    Cache,
    Storage,
}

struct Place {
    kind: Kind,
    id: String,
    revision: String,
    file: String,
}

/// The parts of a URL.
fn place(path: &str) -> Option<Place> {
    let (kind, rest) = if let Some(rest) = path.strip_prefix("/api/models/") {
        (Kind::Info, rest.replace("/revision/", "/"))
    } else if let Some(rest) = path.strip_prefix("/api/resolve-cache/models/") {
        (Kind::Cache, rest.to_string())
    } else if let Some(rest) = path.strip_prefix("/storage/") {
        (Kind::Storage, rest.to_string())
    } else {
        let rest = path.strip_prefix('/')?;
        (Kind::Resolve, rest.replace("/resolve/", "/"))
    };
    let rest = decode(&rest)?;
    let mut parts = rest.splitn(4, '/');
    Some(Place {
        kind,
        id: format!("{}/{}", parts.next()?, parts.next()?),
        revision: parts.next()?.replace('\n', "/"),
        file: parts.next().unwrap_or_default().to_string(),
    })
}

/// A decoded URL path. An encoded slash, which is no separator, becomes a line break.
fn decode(path: &str) -> Option<String> {
    let mut parts = path.split('%');
    let mut bytes = parts.next()?.as_bytes().to_vec();
    for part in parts {
        let byte = u8::from_str_radix(part.get(..2)?, 16).ok()?;
        bytes.push(if byte == b'/' { b'\n' } else { byte });
        bytes.extend(part[2..].bytes());
    }
    String::from_utf8(bytes).ok()
}

fn is_large(file: &str) -> bool {
    LARGE.iter().any(|extension| file.ends_with(extension))
}

fn etag(file: &str, bytes: &[u8]) -> String {
    if is_large(file) {
        hex(&Sha256::digest(bytes))
    } else {
        let head = format!("blob {}\0", bytes.len());
        hex(&Sha1::new()
            .chain_update(head)
            .chain_update(bytes)
            .finalize())
    }
}

fn commit(files: &BTreeMap<String, Vec<u8>>) -> String {
    let mut hash = Sha1::new();
    for (file, bytes) in files {
        hash.update(file);
        hash.update(Sha1::digest(bytes));
    }
    hex(&hash.finalize())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
