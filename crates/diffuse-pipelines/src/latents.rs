//! Latents in files: safetensors with one tensor named `latents`, `[batch, channels, height,
//! width]`.

use std::fs;
use std::path::Path;

use burn::tensor::{Tensor, backend::Backend};
use diffuse_nn::checkpoint::{Checkpoint, CheckpointError};
use diffuse_nn::files::replace_file;
use safetensors::{Dtype, tensor::TensorView};

use crate::PipelineError;

const NAME: &str = "latents";

/// Reads latents as `f32`.
///
/// # Errors
/// If the file cannot be read, or has no tensor `latents` with four dimensions.
pub fn read<B: Backend>(
    path: impl AsRef<Path>,
    device: &B::Device,
) -> Result<Tensor<B, 4>, PipelineError> {
    let checkpoint = Checkpoint::open(path)?;
    let data = checkpoint.read_f32(NAME)?;
    if data.shape.num_dims() != 4 {
        return Err(PipelineError::Options(format!(
            "`{NAME}` in `{}` has shape {:?}, not [batch, channels, height, width]",
            checkpoint.path().display(),
            data.shape.to_vec(),
        )));
    }
    Ok(Tensor::from_data(data, (device, burn::tensor::DType::F32)))
}

/// Writes latents as `f32`; an existing file is replaced once the new one is complete.
///
/// # Errors
/// If the file cannot be written.
pub fn write<B: Backend>(
    path: impl AsRef<Path>,
    latents: &Tensor<B, 4>,
) -> Result<(), PipelineError> {
    let path = path.as_ref();
    let bytes: Vec<u8> = latents
        .to_data()
        .iter::<f32>()
        .flat_map(f32::to_le_bytes)
        .collect();
    let failed = |message: String| CheckpointError::Write {
        path: path.to_path_buf(),
        message,
    };
    let view = TensorView::new(Dtype::F32, latents.dims().to_vec(), &bytes);
    let file = view
        .and_then(|view| safetensors::serialize([(NAME, view)], None))
        .map_err(|error| failed(error.to_string()))?;
    replace_file(path, |temporary| fs::write(temporary, &file))
        .map_err(|error| failed(error.to_string()))?;
    Ok(())
}
