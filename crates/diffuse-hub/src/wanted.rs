//! Which files of a repository are wanted.

use std::collections::BTreeSet;
use std::error::Error;
use std::path::Path;

/// The paths of a repository's files, `unet/config.json` for example. None leads out of its folder.
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

/// What to fetch of a repository.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selection {
    /// The files, in the order to fetch them in.
    pub files: Vec<String>,
    /// Optional files that the repository does not have. The cache notes that, so that the next
    /// fetch need not ask.
    pub absent: Vec<String>,
}

/// Why nothing is fetched of a repository.
#[derive(Debug)]
#[non_exhaustive]
pub enum Refusal {
    /// It lacks a file.
    Missing {
        /// The file.
        file: String,
        /// The end of the message: what exists instead. May be empty.
        hint: String,
    },
    /// It is of another kind, or its first file is damaged.
    Unfit(Box<dyn Error + Send + Sync>),
}

impl Refusal {
    /// A file is missing, and there is nothing to add.
    pub fn missing(file: impl Into<String>) -> Self {
        Self::Missing {
            file: file.into(),
            hint: String::new(),
        }
    }
}

/// A choice of files. A slice of names wants these files.
pub trait Wanted {
    /// The file that decides about the others, and so is fetched first.
    fn first(&self) -> Option<&str> {
        None
    }

    /// Chooses files. `folder` holds the [first](Self::first) one.
    ///
    /// # Errors
    /// If the repository lacks a file, or is not what is wanted.
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
