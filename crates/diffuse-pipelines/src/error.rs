use std::path::PathBuf;

use diffuse_clip::{PromptError, TextualInversionError, TokenizerError};
use diffuse_nn::checkpoint::CheckpointError;
use diffuse_nn::pretrained::{PretrainedError, no_folder};
use diffuse_schedulers::SchedulerError;
use thiserror::Error;

use crate::MODEL_INDEX_NAME;
use crate::adapters::AdapterError;
use crate::single_file::FileKind;

/// Why a pipeline could not be loaded or run.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PipelineError {
    /// A model could not be loaded.
    #[error(transparent)]
    Model(#[from] PretrainedError),
    /// A file of tensors could not be read or written.
    #[error(transparent)]
    Tensors(#[from] CheckpointError),
    /// An adapter cannot be used.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// The scheduler could not be built, scheduled or stepped.
    #[error(transparent)]
    Scheduler(#[from] SchedulerError),
    /// The tokenizer could not be loaded, or refuses a text.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A prompt cannot be read in the syntax that was chosen.
    #[error(transparent)]
    Prompt(#[from] PromptError),
    /// A textual inversion cannot be used.
    #[error(transparent)]
    TextualInversion(#[from] TextualInversionError),
    /// The model's folder does not exist.
    #[error("{}", no_folder(.0))]
    NoFolder(PathBuf),
    /// The folder is not a pipeline's.
    #[error("`{}` has no `{MODEL_INDEX_NAME}`: {hint}", folder.display())]
    NoIndex {
        /// The folder.
        folder: PathBuf,
        /// What it is instead.
        hint: String,
    },
    /// There is no such folder, and no repository of that name can be fetched from the hub.
    #[cfg(feature = "hub")]
    #[error("there is no folder `{id}`, and it cannot be fetched from the hub")]
    Hub {
        /// The folder, or the repository's name.
        id: String,
        /// Why it cannot be fetched.
        source: Box<crate::hub::HubError>,
    },
    /// A file of the model's folder cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// The model's index is damaged, or names something else than this pipeline needs.
    #[error("`{}`: {message}", path.display())]
    Index {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A weights file holds something else than is needed.
    #[error("`{}` is {kind}, which cannot be used here", path.display())]
    WrongFile {
        /// The file.
        path: PathBuf,
        /// What it holds.
        kind: FileKind,
    },
    /// Bytes are not an image that can be read.
    #[error("it is not a PNG, JPEG or WebP image, or it is damaged")]
    Image(#[from] image::ImageError),
    /// The parts of a pipeline do not fit together.
    #[error("these parts do not fit together: {0}")]
    Parts(String),
    /// An option has a value that makes no sense, or contradicts another.
    #[error("{0}")]
    Options(String),
    /// The result is not finite.
    #[error(
        "the {what} have values that are not finite; try another scheduler, or `f32` instead of \
         half precision"
    )]
    NotFinite {
        /// `latents` or `images`.
        what: &'static str,
    },
}
