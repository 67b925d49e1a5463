//! Paths of models: on disk, or in memory.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::checkpoint::{FileSource, TensorSource};
use crate::files::{check_contents, check_regular, check_text_size, read_text};

/// A file or folder of a model: a path on disk, or one among files in memory.
///
/// Everything that converts to a [`Path`] converts to a path on disk, as in
/// `from_pretrained("folder")`. Files in memory have paths from a folder that does not exist:
///
/// ```
/// use diffuse_nn::ModelPath;
///
/// let folder = ModelPath::in_memory("tiny", [("unet/config.json", b"{}".as_slice())]);
/// let config = folder.join("unet").join("config.json");
/// assert_eq!(config.read_text()?, "{}");
/// assert_eq!(config.path().to_str(), Some("tiny/unet/config.json"));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct ModelPath {
    path: PathBuf,
    /// None for a path on disk.
    files: Option<Arc<BTreeMap<PathBuf, Arc<dyn TensorSource>>>>,
}

impl<P: AsRef<Path>> From<P> for ModelPath {
    fn from(path: P) -> Self {
        Self {
            path: path.as_ref().to_path_buf(),
            files: None,
        }
    }
}

impl From<&ModelPath> for ModelPath {
    fn from(path: &ModelPath) -> Self {
        path.clone()
    }
}

impl ModelPath {
    /// A folder of files in memory, by their paths from it. `name` stands for the folder in
    /// messages.
    pub fn in_memory<P: AsRef<Path>, S: TensorSource + 'static>(
        name: &str,
        files: impl IntoIterator<Item = (P, S)>,
    ) -> Self {
        let path = PathBuf::from(name);
        let files = files.into_iter().map(|(file, source)| {
            let source: Arc<dyn TensorSource> = Arc::new(source);
            (path.join(file), source)
        });
        let files = Some(Arc::new(files.collect()));
        Self { path, files }
    }

    /// The path, for messages and, if it is on disk, for opening.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is a path on disk.
    pub fn is_on_disk(&self) -> bool {
        self.files.is_none()
    }

    /// A path below this one, on disk or in memory as this one.
    pub fn join(&self, name: impl AsRef<Path>) -> Self {
        self.with_path(self.path.join(name))
    }

    /// A file or folder beside this one.
    pub fn with_file_name(&self, name: &str) -> Self {
        self.with_path(self.path.with_file_name(name))
    }

    /// The folder that this is in.
    pub fn parent(&self) -> Option<Self> {
        Some(self.with_path(self.path.parent()?.to_path_buf()))
    }

    fn with_path(&self, path: PathBuf) -> Self {
        let files = self.files.clone();
        Self { path, files }
    }

    /// Whether there is a file or a folder.
    pub fn exists(&self) -> bool {
        match &self.files {
            None => self.path.exists(),
            Some(_) => self.is_file() || self.is_dir(),
        }
    }

    /// Whether it is a file.
    pub fn is_file(&self) -> bool {
        match &self.files {
            None => self.path.is_file(),
            Some(files) => files.contains_key(&self.path),
        }
    }

    /// Whether it is a folder.
    pub fn is_dir(&self) -> bool {
        match &self.files {
            None => self.path.is_dir(),
            Some(files) => {
                let is_below = |file: &PathBuf| *file != self.path && file.starts_with(&self.path);
                files.keys().any(is_below)
            }
        }
    }

    /// Sorted names of what is in a folder; none if it cannot be read.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = match &self.files {
            None => {
                let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
                let names = entries.map(|entry| entry.file_name().into_string());
                names.filter_map(Result::ok).collect()
            }
            Some(files) => {
                let below = files.keys().filter_map(|file| {
                    let file = file.strip_prefix(&self.path).ok()?;
                    Some(file.iter().next()?.to_str()?.to_string())
                });
                below.collect()
            }
        };
        names.sort();
        names.dedup();
        names
    }

    /// Reads a text file, as [`read_text`].
    ///
    /// # Errors
    /// If it cannot be read, is something else, or is not UTF-8.
    pub fn read_text(&self) -> io::Result<String> {
        if self.is_on_disk() {
            return read_text(&self.path);
        }
        let source = self.open()?;
        let mut bytes = vec![0; check_text_size(source.len())?];
        source.read_at(&mut bytes, 0)?;
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        let text = String::from_utf8(bytes).map_err(invalid)?;
        check_contents(text.as_bytes())?;
        Ok(text)
    }

    /// Opens a file.
    ///
    /// # Errors
    /// If it does not exist, is something else, or cannot be opened.
    pub fn open(&self) -> io::Result<Arc<dyn TensorSource>> {
        match &self.files {
            None => {
                check_regular(&self.path)?;
                Ok(Arc::new(FileSource::new(File::open(&self.path)?)?))
            }
            Some(files) => match files.get(&self.path) {
                Some(source) => Ok(Arc::clone(source)),
                None if self.is_dir() => Err(io::ErrorKind::IsADirectory.into()),
                None => Err(io::ErrorKind::NotFound.into()),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILES: [(&str, &str); 4] = [
        ("model_index.json", "{}"),
        ("unet/config.json", "[1]"),
        ("unet/deep/file.bin", "abc"),
        ("vae.json", "<html>"),
    ];

    /// What a path says of itself.
    fn describe(path: &ModelPath) -> String {
        let text = match path.read_text() {
            Ok(text) => text,
            Err(error) => format!("{:?}", error.kind()),
        };
        let is = [path.exists(), path.is_file(), path.is_dir()];
        let length = path.open().map(|source| source.len()).ok();
        format!("{is:?} {text} {length:?} {:?}", path.names())
    }

    #[test]
    fn disk_and_memory_are_alike() {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in FILES {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let disk = ModelPath::from(folder.path());
        let files = FILES.map(|(name, text)| (name, text.as_bytes()));
        let memory = ModelPath::in_memory("model", files);
        for name in [
            "",
            "model_index.json",
            "unet",
            "unet/config.json",
            "unet/deep",
            "une",
            "vae",
            "vae.json",
        ] {
            let [on_disk, in_memory] = [&disk, &memory].map(|folder| folder.join(name));
            assert_eq!(describe(&in_memory), describe(&on_disk), "{name}");
        }
        let config = memory.join("unet/config.json");
        assert_eq!(config.parent().unwrap().names(), ["config.json", "deep"]);
        let beside = config.with_file_name("deep").join("file.bin");
        assert_eq!(beside.read_text().unwrap(), "abc");
        assert_eq!(beside.path(), Path::new("model/unet/deep/file.bin"));
    }
}
