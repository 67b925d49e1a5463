//! From files to images, from images to tensors and back.

use std::io::Cursor;

use burn::tensor::{DType, Tensor, TensorData, backend::Backend};
use image::{DynamicImage, ImageDecoder, ImageReader, RgbImage};

use crate::PipelineError;
use crate::generation::check_finite;
use crate::resize::resize;

/// Reads an image from the bytes of a file (PNG, JPEG or WebP). It is turned as its EXIF data says;
/// transparency is dropped, as by `load_image` of Diffusers.
///
/// # Errors
/// If the bytes are no image, or a damaged one.
pub fn load_image(bytes: &[u8]) -> Result<RgbImage, PipelineError> {
    let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format();
    let mut decoder = reader.map_err(image::ImageError::from)?.into_decoder()?;
    let orientation = decoder.orientation()?;
    let mut image = DynamicImage::from_decoder(decoder)?;
    image.apply_orientation(orientation);
    Ok(image.into_rgb8())
}

/// Rounds sides down to multiples of `multiple`.
pub(crate) fn round_down(sides: [u32; 2], multiple: usize) -> [u32; 2] {
    let multiple = multiple as u32;
    sides.map(|side| side - side % multiple)
}

/// Resizes all images to `[width, height]` with Lanczos's filter.
pub(crate) fn resize_all(images: &[RgbImage], size: [u32; 2]) -> Vec<RgbImage> {
    images.iter().map(|image| resize(image, size)).collect()
}

/// Images of one size as a tensor in `f32`: `[images, 3, height, width]` in `[-1, 1]`.
pub(crate) fn from_images<B: Backend>(images: &[RgbImage], device: &B::Device) -> Tensor<B, 4> {
    image_tensor(images, |unit| 2.0 * unit - 1.0, device)
}

/// [`from_images`] in `[0, 1]`.
pub(crate) fn unit_images<B: Backend>(images: &[RgbImage], device: &B::Device) -> Tensor<B, 4> {
    image_tensor(images, |unit| unit, device)
}

fn image_tensor<B: Backend>(
    images: &[RgbImage],
    scale: impl Fn(f32) -> f32,
    device: &B::Device,
) -> Tensor<B, 4> {
    let (width, height) = images[0].dimensions();
    let (width, height) = (width as usize, height as usize);
    let levels = images.iter().flat_map(|image| {
        (0..3).flat_map(|color| image.as_raw().iter().skip(color).step_by(3).copied())
    });
    let values: Vec<f32> = levels
        .map(|level| scale(f32::from(level) / 255.0))
        .collect();
    let data = TensorData::new(values, [images.len(), 3, height, width]);
    Tensor::from_data(data, (device, DType::F32))
}

/// `[-1, 1]` to `[0, 1]`, clamped.
pub fn to_unit_range<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    (x / 2.0 + 0.5).clamp(0.0, 1.0)
}

/// Images of a batch in `[-1, 1]`, `[batch, 3 or 1, height, width]`. Levels are rounded to the
/// nearest, halves to even, as numpy does for the reference.
///
/// # Errors
/// If a value is not finite, or the number of channels is neither 3 nor 1.
pub fn to_images<B: Backend>(x: Tensor<B, 4>) -> Result<Vec<RgbImage>, PipelineError> {
    let [batch, channels, height, width] = x.dims();
    if channels != 3 && channels != 1 {
        return Err(PipelineError::Parts(format!(
            "an image has 3 channels or 1, but the model gives {channels}"
        )));
    }
    check_finite("images", &x)?;
    let data = to_unit_range(x).into_data();
    let levels: Vec<u8> = data
        .iter::<f32>()
        .map(|value| (value * 255.0).round_ties_even() as u8)
        .collect();
    let plane = height * width;
    let image = |index: usize| {
        let planes = &levels[index * channels * plane..][..channels * plane];
        RgbImage::from_fn(width as u32, height as u32, |x, y| {
            let pixel = y as usize * width + x as usize;
            image::Rgb([0, 1, 2].map(|color| planes[color.min(channels - 1) * plane + pixel]))
        })
    };
    Ok((0..batch).map(image).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn_flex::Flex;

    fn images(values: &[f32], channels: usize) -> Result<Vec<RgbImage>, PipelineError> {
        let width = values.len() / channels;
        let data = burn::tensor::TensorData::new(values.to_vec(), [1, channels, 1, width]);
        to_images(Tensor::<Flex, 4>::from_data(data, &Default::default()))
    }

    #[test]
    fn levels_are_rounded_and_clamped() {
        // 0.5 · 255 = 127.5 is a half: it goes to the even 128.
        let row = images(&[-3.0, -1.0, 0.0, 1.0, 7.0], 1).unwrap().remove(0);
        let levels: Vec<u8> = row.pixels().map(|pixel| pixel.0[1]).collect();
        assert_eq!(levels, [0, 0, 128, 255, 255]);
    }

    #[test]
    fn channels_are_colors() {
        let pixel = images(&[-1.0, 0.0, 1.0], 3).unwrap().remove(0);
        assert_eq!(pixel.get_pixel(0, 0).0, [0, 128, 255]);
    }

    #[test]
    fn values_that_are_not_finite_are_an_error() {
        for values in [&[0.0, f32::NAN, 0.0][..], &[f32::INFINITY]] {
            assert_eq!(
                images(values, 1).unwrap_err().to_string(),
                "the images have values that are not finite; try another scheduler, or `f32` \
                 instead of half precision"
            );
        }
        assert_eq!(
            images(&[0.0; 4], 4).unwrap_err().to_string(),
            "these parts do not fit together: an image has 3 channels or 1, but the model gives 4"
        );
    }
}
