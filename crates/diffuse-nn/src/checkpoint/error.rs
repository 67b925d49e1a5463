//! Why a weights file is refused.

use std::path::PathBuf;

use thiserror::Error;

/// Why a weights file could not be read, or does not fit a module.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The file cannot be opened or read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// The file cannot be written.
    #[error("cannot write `{}`: {message}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        message: String,
    },
    /// The file is not what its name says: truncated, with a lying header, or of another format.
    #[error("`{}` is not a valid {format} file: {message}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// `safetensors`, `PyTorch` or `index`.
        format: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// The module has parameters that the file does not have.
    #[error("`{}` lacks {}", path.display(), name_some(keys))]
    Missing {
        /// The file.
        path: PathBuf,
        /// The parameters' keys.
        keys: Vec<String>,
    },
    /// The file has tensors that the module does not have.
    #[error("`{}` has {} that this model does not have", path.display(), name_some(keys))]
    Unexpected {
        /// The file.
        path: PathBuf,
        /// The tensors' keys.
        keys: Vec<String>,
    },
    /// A tensor has another shape than its parameter.
    #[error("`{key}` in `{}` has shape {found:?}, but this model needs {expected:?}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor's key.
        key: String,
        /// The parameter's shape.
        expected: Vec<usize>,
        /// The tensor's shape.
        found: Vec<usize>,
    },
    /// A tensor is not of a floating point type.
    #[error("`{key}` in `{}` has type {found}, but weights are F64, F32, F16, BF16 or F8", path.display())]
    Type {
        /// The file.
        path: PathBuf,
        /// The tensor's key.
        key: String,
        /// The tensor's type.
        found: String,
    },
    /// Two tensors have the same key, perhaps after old names were translated.
    #[error("`{}` has `{key}` twice", path.display())]
    Twice {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
    },
}

/// The first few of `keys`, and how many there are.
pub fn name_some(keys: &[String]) -> String {
    const SHOWN: usize = 3;
    let shown = keys
        .iter()
        .take(SHOWN)
        .map(|key| format!("`{key}`"))
        .collect::<Vec<_>>()
        .join(", ");
    match keys.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}
