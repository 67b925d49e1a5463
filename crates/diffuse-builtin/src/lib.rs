#![doc = include_str!("../README.md")]
#![deny(clippy::print_stdout, clippy::print_stderr)]

use std::path::Path;
use std::{fs, io};

/// A model in the program's memory: the files of a folder in Diffusers' format, and the settings
/// that it is best used with.
#[non_exhaustive]
pub struct BuiltinModel {
    /// Its name: `scenes` or `scenes-ddpm`.
    pub name: &'static str,
    /// Recommended number of denoising steps.
    pub num_inference_steps: usize,
    /// Recommended scale of classifier-free guidance; 1, which is none, for an unconditional model.
    pub guidance_scale: f64,
    /// A linear map from the latents to red, green and blue in `[-1, 1]`, for previews: a row for
    /// each latent channel, then the colors of latents that are 0. None for a model of pixels.
    pub latent_rgb: Option<[[f32; 3]; 5]>,
    /// Paths from the model's folder, with `/`, and what is in the files.
    pub files: &'static [(&'static str, &'static [u8])],
}

/// Pairs of a file's path in a model's folder and its bytes.
macro_rules! files {
    ($folder:literal: $($path:literal),+; $($other:expr),*) => {
        &[
            $(($path, include_bytes!(concat!("../", $folder, "/", $path))),)+
            $($other,)*
        ]
    };
}

/// Text to image: Stable Diffusion v1's architecture at small widths, 128 x 128 pixels.
pub static SCENES: BuiltinModel = BuiltinModel {
    name: "scenes",
    num_inference_steps: 25,
    guidance_scale: 2.0,
    latent_rgb: Some(LATENT_RGB),
    files: files!("scenes":
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors";
        ("unet/diffusion_pytorch_model.safetensors", diffuse_builtin_unet::SCENES_UNET)
    ),
};

/// Least squares over rendered scenes, by `crates/diffuse-training/src/latent_rgb.rs`.
const LATENT_RGB: [[f32; 3]; 5] = [
    [0.4296, 0.2374, 0.0694],
    [-2.0415, -1.1547, -0.1544],
    [0.7459, 0.3227, -0.1344],
    [0.7036, 0.5960, 0.4147],
    [0.2627, 0.1934, 0.1174],
];

/// Unconditional images: a DDPM for 64 x 64 pixels.
pub static SCENES_DDPM: BuiltinModel = BuiltinModel {
    name: "scenes-ddpm",
    num_inference_steps: 100,
    guidance_scale: 1.0,
    latent_rgb: None,
    files: files!("scenes-ddpm":
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors";
    ),
};

/// All built-in models.
pub static MODELS: [&BuiltinModel; 2] = [&SCENES, &SCENES_DDPM];

/// LoRAs of [`SCENES`]: a name, and a `.safetensors` file in Diffusers' format.
pub static ADAPTERS: [(&str, &[u8]); 1] = [(
    "dutch-angle",
    include_bytes!("../adapters/dutch-angle.safetensors"),
)];

impl BuiltinModel {
    /// Writes the model's files into `folder`, which is made if it does not exist. Files of the
    /// same names are replaced.
    ///
    /// # Errors
    ///
    /// A folder or a file that cannot be written; the message names it.
    pub fn unpack(&self, folder: impl AsRef<Path>) -> io::Result<()> {
        for (path, bytes) in self.files {
            let path = folder.as_ref().join(path);
            path.parent()
                .map_or(Ok(()), fs::create_dir_all)
                .and_then(|()| fs::write(&path, bytes))
                .map_err(|error| {
                    let message = format!("cannot write `{}`: {error}", path.display());
                    io::Error::new(error.kind(), message)
                })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::PathBuf;

    use super::*;

    /// All files below a folder, by their paths from it.
    fn files_below(folder: &Path) -> BTreeSet<PathBuf> {
        let mut files = BTreeSet::new();
        let mut folders = vec![folder.to_path_buf()];
        while let Some(next) = folders.pop() {
            for entry in fs::read_dir(next).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    files.insert(path.strip_prefix(folder).unwrap().to_path_buf());
                }
            }
        }
        files
    }

    #[test]
    fn unpacks_every_file_of_a_model() {
        for (model, count) in [(&SCENES, 12), (&SCENES_DDPM, 4)] {
            let folder = tempfile::tempdir().unwrap();
            let folder = folder.path().join("new");
            model.unpack(&folder).unwrap();
            let unpacked = files_below(&folder);
            assert_eq!(unpacked.len(), count);
            assert_eq!(
                unpacked,
                model.files.iter().map(|(path, _)| path.into()).collect()
            );
            for (path, bytes) in model.files {
                assert!(fs::read(folder.join(path)).unwrap() == *bytes, "{path}");
            }
            // None was forgotten.
            let mut sources = files_below(&Path::new(env!("CARGO_MANIFEST_DIR")).join(model.name));
            if model.name == "scenes" {
                sources.insert("unet/diffusion_pytorch_model.safetensors".into());
            }
            assert_eq!(unpacked, sources);
        }
    }

    #[test]
    fn the_error_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let blocked = folder.path().join("scheduler");
        fs::write(&blocked, "a file where a folder should be").unwrap();
        let error = SCENES.unpack(&folder).unwrap_err();
        let path = blocked.join("scheduler_config.json");
        let reason = fs::create_dir_all(&blocked).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("cannot write `{}`: {reason}", path.display())
        );
    }
}
