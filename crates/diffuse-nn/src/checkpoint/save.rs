//! Writing a module as a checkpoint, through burn-store.

use std::path::Path;

use burn::module::Module;
use burn::tensor::backend::Backend;
use burn_store::{ModuleSnapshot, SafetensorsStore};

use super::CheckpointError;
use crate::files::replace_file;

/// Writes all parameters of `module`, in the types they have, as a safetensors file that the
/// reference loads. An existing file is replaced once the new one is complete.
///
/// # Errors
/// If the file cannot be written.
pub fn save_safetensors<B: Backend, M: Module<B>>(
    module: &M,
    path: impl AsRef<Path>,
) -> Result<(), CheckpointError> {
    let path = path.as_ref();
    replace_file(path, |temporary| {
        let mut store = SafetensorsStore::from_file(temporary)
            .clear_metadata()
            // transformers refuses files that do not say so.
            .metadata("format", "pt")
            .skip_enum_variants(true)
            .overwrite(true);
        module
            .save_into(&mut store)
            .map_err(|error| std::io::Error::other(error.to_string()))
    })
    .map_err(|error| CheckpointError::Write {
        path: path.to_path_buf(),
        message: error.to_string(),
    })
}
