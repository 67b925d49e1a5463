//! The choice of files of a repository.

use std::collections::BTreeSet;
use std::error::Error;
use std::path::Path;

/// The paths of a repository's files, such as `unet/config.json`; none leaves the folder.
#[derive(Debug, Clone, Default)]
pub struct Listing(BTreeSet<String>);

impl Listing {
    /// Whether the repository has a file.
    pub fn has(&self, file: &str) -> bool {
        self.0.contains(file)
    }

    /// The paths in order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

impl FromIterator<String> for Listing {
    fn from_iter<I: IntoIterator<Item = String>>(files: I) -> Self {
        Self(files.into_iter().collect())
    }
}

/// The files to fetch of a repository.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selection {
    /// The files in the order of their transfers.
    pub files: Vec<String>,
    /// Optional files that the repository lacks. The cache records that, so that the next fetch
    /// needs no request.
    pub absent: Vec<String>,
}

/// The reason why a repository is not fetched.
#[derive(Debug)]
#[non_exhaustive]
pub enum Refusal {
    /// A file is missing.
    Missing {
        /// The file.
        file: String,
        /// The end of the message: the available files. May be empty.
        hint: String,
    },
    /// The repository is of another kind, or its first file is damaged.
    Unfit(Box<dyn Error + Send + Sync>),
}

impl Refusal {
    /// A missing file, without a hint.
    pub fn missing(file: impl Into<String>) -> Self {
        Self::Missing {
            file: file.into(),
            hint: String::new(),
        }
    }
}

/// A choice of files. A slice of names chooses these files.
pub trait Wanted {
    /// The file that determines the others, and is fetched first.
    fn first(&self) -> Option<&str> {
        None
    }

    /// Chooses files. `folder` holds the [first](Self::first) one.
    ///
    /// # Errors
    /// If the repository lacks a file, or is of another kind.
    fn select(&self, folder: &Path, listing: &Listing) -> Result<Selection, Refusal>;
}

impl<S: AsRef<str>> Wanted for [S] {
    fn select(&self, _folder: &Path, listing: &Listing) -> Result<Selection, Refusal> {
        let names = || self.iter().map(AsRef::as_ref);
        match names().find(|file| !listing.has(file)) {
            Some(file) => Err(Refusal::missing(file)),
            None => Ok(Selection {
                files: names().map(String::from).collect(),
                absent: Vec::new(),
            }),
        }
    }
}
