//! Transfers of files: interrupted ones continue, and checksums are compared with the hub's.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::thread;
use std::time::Duration;

use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::HubError;
use crate::client::{Client, Remote};

/// The wait after a failure, times the number of failures in a row.
const PAUSE: Duration = Duration::from_millis(500);
const BUFFER: usize = 1 << 18;

/// Completes the partial file at `path`, which is kept after an error unless it is damaged.
pub fn transfer(
    client: &Client,
    remote: &Remote,
    path: &Path,
    retries: u32,
    on_bytes: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<(), HubError> {
    let mut part = Part::open(path, remote)?;
    let mut failures = 0;
    while part.done < remote.size {
        let before = part.done;
        let Err(error) = continue_part(client, remote, &mut part, on_bytes) else {
            continue;
        };
        match error {
            HubError::Interrupted { .. } | HubError::Unreachable { .. } | HubError::Busy { .. } => {
            }
            error => return Err(error),
        }
        failures = if part.done > before { 1 } else { failures + 1 };
        if failures > retries {
            return Err(match error {
                HubError::Unreachable { source, .. } => interrupted(remote, part.done, source),
                error => error,
            });
        }
        thread::sleep(PAUSE * failures);
    }
    part.file.sync_all().map_err(HubError::writing(path))?;
    part.check()
}

fn interrupted(
    remote: &Remote,
    done: u64,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> HubError {
    HubError::Interrupted {
        file: remote.file.clone(),
        done,
        size: remote.size,
        source: source.into(),
    }
}

/// Sends one request and appends the received bytes.
fn continue_part(
    client: &Client,
    remote: &Remote,
    part: &mut Part<'_>,
    on_bytes: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<(), HubError> {
    let response = client.read(remote, part.done)?;
    let start = match response.status().as_u16() {
        206 => {
            let range = response.headers().get("content-range");
            let range = range.and_then(|range| range.to_str().ok()?.strip_prefix("bytes "));
            range.and_then(|range| range.split('-').next()?.parse().ok())
        }
        200 => Some(0),
        _ => None,
    };
    if start != Some(part.done) {
        // Not the requested range. A response from 0 on is usable; after any other, the next
        // request is for the whole file.
        part.restart()?;
        if start != Some(0) {
            return Err(interrupted(remote, 0, "the hub sent another part of it"));
        }
    }
    let mut reader = response.into_body().into_reader();
    let mut buffer = vec![0; BUFFER];
    while part.done < remote.size {
        let room = buffer.len().min((remote.size - part.done) as usize);
        let read = match reader.read(&mut buffer[..room]) {
            Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            read => read,
        };
        let read = read.map_err(|error| interrupted(remote, part.done, error))?;
        part.append(&buffer[..read])?;
        if on_bytes(part.done).is_break() {
            return Err(HubError::Stopped(remote.file.clone()));
        }
    }
    Ok(())
}

/// A partial file.
struct Part<'a> {
    remote: &'a Remote,
    path: &'a Path,
    file: File,
    checksum: Checksum,
    done: u64,
}

impl<'a> Part<'a> {
    fn open(path: &'a Path, remote: &'a Remote) -> Result<Self, HubError> {
        let folder = path.parent().map_or(Ok(()), fs::create_dir_all);
        let mut options = OpenOptions::new();
        let file = folder
            .and_then(|()| options.create(true).read(true).append(true).open(path))
            .map_err(HubError::writing(path))?;
        let mut part = Self {
            remote,
            path,
            checksum: Checksum::new(remote),
            file,
            done: 0,
        };
        part.resume().map_err(HubError::writing(path))?;
        Ok(part)
    }

    /// Reads the bytes of an earlier transfer, for length and checksum.
    fn resume(&mut self) -> io::Result<()> {
        let length = self.file.metadata()?.len();
        if length > self.remote.size {
            return self.file.set_len(0);
        }
        let mut reader = (&self.file).take(length);
        let mut buffer = vec![0; BUFFER];
        loop {
            let read = reader.read(&mut buffer)?;
            if read == 0 {
                return Ok(());
            }
            self.checksum.update(&buffer[..read]);
            self.done += read as u64;
        }
    }

    fn restart(&mut self) -> Result<(), HubError> {
        self.file.set_len(0).map_err(HubError::writing(self.path))?;
        self.checksum = Checksum::new(self.remote);
        self.done = 0;
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), HubError> {
        self.file
            .write_all(bytes)
            .map_err(HubError::writing(self.path))?;
        self.checksum.update(bytes);
        self.done += bytes.len() as u64;
        Ok(())
    }

    /// Compares the checksum with the hub's.
    fn check(self) -> Result<(), HubError> {
        let found = self.checksum.finish();
        let Some(found) = found.filter(|found| !found.eq_ignore_ascii_case(&self.remote.etag))
        else {
            return Ok(());
        };
        drop(self.file);
        fs::remove_file(self.path).map_err(HubError::writing(self.path))?;
        Err(HubError::Checksum {
            file: self.remote.file.clone(),
            expected: self.remote.etag.clone(),
            found,
        })
    }
}

/// The checksum in an etag.
enum Checksum {
    /// SHA-256, of a large file.
    Sha256(Sha256),
    /// git's object id, of a small file.
    GitBlob(Sha1),
    /// No checksum, as with some mirrors.
    None,
}

impl Checksum {
    fn new(remote: &Remote) -> Self {
        let is_hex = remote.etag.chars().all(|c| c.is_ascii_hexdigit());
        match remote.etag.len() {
            64 if is_hex => Self::Sha256(Sha256::new()),
            40 if is_hex => {
                Self::GitBlob(Sha1::new().chain_update(format!("blob {}\0", remote.size)))
            }
            _ => Self::None,
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::GitBlob(hash) => hash.update(bytes),
            Self::None => {}
        }
    }

    fn finish(self) -> Option<String> {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        match self {
            Self::Sha256(hash) => Some(hex(&hash.finalize())),
            Self::GitBlob(hash) => Some(hex(&hash.finalize())),
            Self::None => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_by_the_form_of_the_etag() {
        let check = |etag_len: usize, expected: Option<&str>| {
            let remote = Remote {
                file: "a".into(),
                commit: "c".into(),
                etag: "0".repeat(etag_len),
                size: 6,
                url: String::new(),
            };
            let mut checksum = Checksum::new(&remote);
            checksum.update(b"hel");
            checksum.update(b"lo\n");
            assert_eq!(checksum.finish().as_deref(), expected);
        };
        // `printf 'hello\n' | sha256sum`, `printf 'hello\n' | git hash-object --stdin`
        let sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        check(64, Some(sha256));
        check(40, Some("ce013625030ba8dba906f756967f9e9ca394464a"));
        check(32, None);
    }
}
