//! Conversion of images to tensors, and a grid of images.

use burn::tensor::{Tensor, TensorData, backend::Backend};
use image::{RgbImage, imageops};

/// Images in rows, with a gap between them.
///
/// # Panics
/// If there are no images.
pub fn grid(images: &[RgbImage], columns: usize) -> RgbImage {
    const GAP: u32 = 4;
    let (width, height) = images[0].dimensions();
    let rows = images.len().div_ceil(columns) as u32;
    let sheet = |count: u32, side: u32| count * (side + GAP) + GAP;
    let white = image::Rgb([255; 3]);
    let mut grid = RgbImage::from_pixel(sheet(columns as u32, width), sheet(rows, height), white);
    for (index, image) in images.iter().enumerate() {
        let (column, row) = ((index % columns) as u32, (index / columns) as u32);
        let place = [sheet(column, width), sheet(row, height)].map(i64::from);
        imageops::replace(&mut grid, image, place[0], place[1]);
    }
    grid
}

/// Images of one size as `[batch, 3, height, width]` in `[-1, 1]`.
///
/// # Panics
/// If there are no images.
pub fn to_tensor<B: Backend>(images: &[RgbImage], device: &B::Device) -> Tensor<B, 4> {
    let (width, height) = images[0].dimensions();
    let shape = [images.len(), height as usize, width as usize, 3];
    let levels: Vec<f32> = images
        .iter()
        .flat_map(|image| image.as_raw())
        .map(|level| f32::from(*level) / 127.5 - 1.0)
        .collect();
    Tensor::from_data(TensorData::new(levels, shape), device).permute([0, 3, 1, 2])
}
