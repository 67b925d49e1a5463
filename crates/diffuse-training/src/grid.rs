//! Between pictures and tensors, and many pictures on one sheet.

use burn::tensor::{Tensor, TensorData, backend::Backend};
use image::{RgbImage, imageops};

/// Pictures in rows, with a gap between them.
///
/// # Panics
/// If there are no pictures.
pub fn grid(pictures: &[RgbImage], columns: usize) -> RgbImage {
    const GAP: u32 = 4;
    let (width, height) = pictures[0].dimensions();
    let rows = pictures.len().div_ceil(columns) as u32;
    let sheet = |count: u32, side: u32| count * (side + GAP) + GAP;
    let white = image::Rgb([255; 3]);
    let mut grid = RgbImage::from_pixel(sheet(columns as u32, width), sheet(rows, height), white);
    for (index, picture) in pictures.iter().enumerate() {
        let (column, row) = ((index % columns) as u32, (index / columns) as u32);
        let place = [sheet(column, width), sheet(row, height)].map(i64::from);
        imageops::replace(&mut grid, picture, place[0], place[1]);
    }
    grid
}

/// Pictures of one size as `[batch, 3, height, width]` in `[-1, 1]`.
///
/// # Panics
/// If there are no pictures.
pub fn to_tensor<B: Backend>(pictures: &[RgbImage], device: &B::Device) -> Tensor<B, 4> {
    let (width, height) = pictures[0].dimensions();
    let shape = [pictures.len(), height as usize, width as usize, 3];
    let levels: Vec<f32> = pictures
        .iter()
        .flat_map(|picture| picture.as_raw())
        .map(|level| f32::from(*level) / 127.5 - 1.0)
        .collect();
    Tensor::from_data(TensorData::new(levels, shape), device).permute([0, 3, 1, 2])
}
