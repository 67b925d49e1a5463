//! From an image to the input of CLIP's vision model, as the Pillow version of transformers'
//! `CLIPImageProcessor` (once `CLIPFeatureExtractor`) computes it, to the bit:
//!
//! ```text
//! resize the shorter side to `size` (bicubic), crop the middle to `crop_size`
//! y = (x · rescale_factor - image_mean) / image_std
//! ```

use burn::tensor::{DType, Tensor, TensorData, backend::Backend};
use diffuse_nn::ModelPath;
use diffuse_nn::config::{ConfigError, MAX_CHANNELS, ModelConfig, check_size};
use image::RgbImage;
use image::imageops::crop_imm;
use serde::{Deserialize, Serialize};

use crate::resize::{Filter, resize_part};

/// The file that an image processor is configured by.
pub(crate) const PREPROCESSOR_CONFIG_NAME: &str = "preprocessor_config.json";

/// What `preprocessor_config.json` holds; defaults are those of transformers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CLIPImageProcessor {
    /// The shorter side of a resized image, in pixels.
    pub size: ResizedSize,
    /// Height and width of the part that is taken of it.
    pub crop_size: CropSize,
    /// Levels, 0 to 255, are multiplied by it.
    pub rescale_factor: f64,
    /// Mean of red, green and blue.
    pub image_mean: [f32; 3],
    /// Standard deviation of red, green and blue.
    pub image_std: [f32; 3],
}

/// The size of a resized image: a number, or an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a number, or an object with `shortest_edge`"
)]
pub enum ResizedSize {
    /// The shorter side.
    Number(usize),
    /// The shorter side by its name.
    Named {
        /// The shorter side.
        shortest_edge: usize,
    },
}

impl ResizedSize {
    /// The shorter side in pixels.
    pub fn shortest_edge(self) -> usize {
        match self {
            Self::Number(size)
            | Self::Named {
                shortest_edge: size,
            } => size,
        }
    }
}

/// The size of a crop: a number for a square, or an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a number, or an object with `height` and `width`"
)]
pub enum CropSize {
    /// Height and width.
    Square(usize),
    /// Each by its name.
    Named {
        /// Height in pixels.
        height: usize,
        /// Width in pixels.
        width: usize,
    },
}

impl CropSize {
    /// `[height, width]`
    pub fn dims(self) -> [usize; 2] {
        match self {
            Self::Square(size) => [size; 2],
            Self::Named { height, width } => [height, width],
        }
    }
}

impl Default for CLIPImageProcessor {
    fn default() -> Self {
        Self {
            size: ResizedSize::Number(224),
            crop_size: CropSize::Square(224),
            rescale_factor: 1.0 / 255.0,
            image_mean: [0.48145466, 0.4578275, 0.40821073],
            image_std: [0.26862954, 0.261_302_6, 0.275_777_1],
        }
    }
}

impl ModelConfig for CLIPImageProcessor {
    const CLASS: &'static str = "CLIPImageProcessor";
    const ONLY: &'static [(&'static str, &'static [&'static str])] = &[
        ("do_convert_rgb", &["true"]),
        ("do_resize", &["true"]),
        // Pillow's number of its bicubic filter.
        ("resample", &["3"]),
        ("do_center_crop", &["true"]),
        ("do_rescale", &["true"]),
        ("do_normalize", &["true"]),
    ];

    fn validate(&self) -> Result<(), ConfigError> {
        let class = Self::CLASS;
        let size = self.size.shortest_edge();
        check_size(class, "size", size, MAX_CHANNELS)?;
        for side in self.crop_size.dims() {
            check_size(class, "crop_size", side, size)?;
        }
        if self.image_std.contains(&0.0) {
            let (key, value) = ("image_std", self.image_std);
            return Err(ConfigError::unsupported(class, key, value, "no zeros"));
        }
        Ok(())
    }
}

impl CLIPImageProcessor {
    /// Reads `preprocessor_config.json` of a folder.
    ///
    /// # Errors
    /// If it cannot be read, or asks for something that is not computed here.
    pub fn from_pretrained(folder: impl Into<ModelPath>) -> Result<Self, ConfigError> {
        Self::from_file(folder.into().join(PREPROCESSOR_CONFIG_NAME))
    }

    /// The pixel values of an image in `f32`: `[1, 3, height, width]`, with the height and width of
    /// `crop_size`.
    pub fn preprocess<B: Backend>(&self, image: &RgbImage, device: &B::Device) -> Tensor<B, 4> {
        let image = self.resize_and_crop(image);
        let scaled = |level: u8| (f64::from(level) * self.rescale_factor) as f32;
        let values: Vec<f32> = (0..3)
            .flat_map(|color| {
                let levels = image.as_raw().iter().skip(color).step_by(3);
                let (mean, std) = (self.image_mean[color], self.image_std[color]);
                levels.map(move |level| (scaled(*level) - mean) / std)
            })
            .collect();
        let [height, width] = self.crop_size.dims();
        Tensor::from_data(
            TensorData::new(values, [1, 3, height, width]),
            (device, DType::F32),
        )
    }

    fn resize_and_crop(&self, image: &RgbImage) -> RgbImage {
        let sides = [image.width(), image.height()];
        let shorter = u64::from(sides[0].min(sides[1]));
        let edge = self.size.shortest_edge();
        let size = sides.map(|side| (edge as u64 * u64::from(side) / shorter) as u32);
        let whole = sides.map(|side| 0.0..f64::from(side));
        let resized = resize_part(image, whole, size, Filter::Bicubic);
        let [height, width] = self.crop_size.dims().map(|side| side as u32);
        let [x, y] = [size[0] - width, size[1] - height].map(|rest| rest / 2);
        crop_imm(&resized, x, y, width, height).to_image()
    }
}
