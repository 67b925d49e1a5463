//! Reading small files and replacing files, safely.

use std::fs;
use std::io;
use std::path::Path;

/// No configuration, index or vocabulary comes near it.
const MAX_TEXT_BYTES: u64 = 64 << 20;

/// Reads a text file: a regular one, since a pipe or a device may never end, and of a size that a
/// text may have.
///
/// # Errors
/// If it cannot be read, is something else, or is not UTF-8.
pub fn read_text(path: &Path) -> io::Result<String> {
    check_regular(path)?;
    check_text_size(fs::metadata(path)?.len())?;
    let text = fs::read_to_string(path)?;
    check_contents(text.as_bytes())?;
    Ok(text)
}

/// The size of a text file, if it is not absurd.
pub(crate) fn check_text_size(size: u64) -> io::Result<usize> {
    if size > MAX_TEXT_BYTES {
        let message = format!("it has {size} bytes, far more than such a file needs");
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(size as usize)
}

/// Checks that a path is a regular file, or leads to one.
///
/// # Errors
/// If it does not exist or is a folder, a pipe or a device.
pub fn check_regular(path: &Path) -> io::Result<()> {
    let metadata = fs::metadata(path)?;
    if metadata.is_dir() {
        Err(io::ErrorKind::IsADirectory.into())
    } else if metadata.is_file() {
        Ok(())
    } else {
        let message = "it is not a regular file";
        Err(io::Error::new(io::ErrorKind::InvalidInput, message))
    }
}

/// Refuses what is often found under a file's name in its place: the pointer that git leaves
/// without git-lfs, and the web page that a browser or `curl` saves.
///
/// # Errors
/// If the contents begin as one of them.
pub fn check_contents(contents: &[u8]) -> io::Result<()> {
    let start = contents.trim_ascii_start();
    let starts_with = |text: &str| {
        let start = start.get(..text.len());
        start.is_some_and(|start| start.eq_ignore_ascii_case(text.as_bytes()))
    };
    let message = if starts_with("version https://git-lfs.github.com/spec/") {
        "it is a git-lfs pointer, which stands for the file: install git-lfs and run `git lfs \
         pull` in the folder that was cloned"
    } else if starts_with("<!doctype html") || starts_with("<html") {
        "it is a web page, perhaps of a login or an error, and not the file: fetch the file again"
    } else {
        return Ok(());
    };
    Err(io::Error::new(io::ErrorKind::InvalidData, message))
}

/// Writes a file under a temporary name beside `path`, then renames it, so that `path` is never
/// half-written. A link is followed.
///
/// # Errors
/// If `path` is something else than a regular file, `write` fails, or the file cannot be renamed;
/// the temporary file is removed.
pub fn replace_file(path: &Path, write: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    let target = match path.canonicalize() {
        Ok(target) => {
            check_regular(&target)?;
            target
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => path.to_path_buf(),
        Err(error) => return Err(error),
    };
    let Some(name) = target.file_name() else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it names no file",
        ));
    };
    let mut temporary = name.to_os_string();
    temporary.push(format!(".{}.part", std::process::id()));
    let temporary = target.with_file_name(temporary);
    write(&temporary)
        .and_then(|()| fs::rename(&temporary, &target))
        .inspect_err(|_| {
            let _ = fs::remove_file(&temporary);
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_writes_leave_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        replace_file(&path, |path| fs::write(path, "old")).unwrap();
        let failed = replace_file(&path, |path| {
            fs::write(path, "half")?;
            Err(io::Error::other("the disk is full"))
        });
        assert_eq!(failed.unwrap_err().to_string(), "the disk is full");
        assert_eq!(read_text(&path).unwrap(), "old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn pointers_and_web_pages_are_refused() {
        let message = |contents: &str| {
            let checked = check_contents(contents.as_bytes());
            checked
                .err()
                .map(|error| error.to_string())
                .unwrap_or_default()
        };
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n";
        assert_eq!(
            message(pointer),
            "it is a git-lfs pointer, which stands for the file: install git-lfs and run `git lfs \
             pull` in the folder that was cloned"
        );
        for page in ["<!DOCTYPE html>\n<html>", "\n <html lang=\"en\">", "<HTML>"] {
            assert_eq!(
                message(page),
                "it is a web page, perhaps of a login or an error, and not the file: fetch the \
                 file again",
                "{page}"
            );
        }
        for other in ["", "<", "{}", "version 2", "#version: 0.2\n"] {
            assert_eq!(message(other), "");
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_and_devices_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        fs::write(&file, "old").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        replace_file(&link, |path| fs::write(path, "new")).unwrap();
        assert_eq!(read_text(&file).unwrap(), "new");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());

        let device = Path::new("/dev/zero");
        let written = replace_file(device, |_| Ok(())).unwrap_err();
        assert_eq!(written.to_string(), "it is not a regular file");
        for (path, expected) in [
            (device, "it is not a regular file"),
            (folder.path(), "is a directory"),
        ] {
            assert_eq!(read_text(path).unwrap_err().to_string(), expected);
        }
    }
}
