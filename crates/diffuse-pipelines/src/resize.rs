//! Resampling of 8-bit images as by Pillow, to the byte.
//!
//! A value of the result is a weighted sum of the values around its centre:
//!
//! ```text
//! scale = in / out,  centre = (i + 1/2) scale,  reach = max(scale, 1)
//! weight(x) = filter((x + 1/2 - centre) / reach), divided by the sum of all
//! ```
//!
//! Rows are resampled first, then columns, with 8 bits between; or columns first, as in Pillow 13,
//! if the height is reduced by more than twice as much as the width. The weights are in fixed point
//! with 22 bits after the point, so that sums are exact integers.

use std::f64::consts::PI;
use std::ops::Range;

use image::{Rgb, RgbImage};

/// A resampling filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Filter {
    /// `sinc(x) sinc(x / 3)` for `|x| < 3`.
    Lanczos,
    /// Keys's cubic convolution with `a = -1/2`, for `|x| < 2`.
    Bicubic,
}

impl Filter {
    fn support(self) -> f64 {
        match self {
            Self::Lanczos => 3.0,
            Self::Bicubic => 2.0,
        }
    }

    fn value(self, x: f64) -> f64 {
        match self {
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Lanczos => 0.0,
            Self::Bicubic => {
                const A: f64 = -0.5;
                match x.abs() {
                    x if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
                    x if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
                    _ => 0.0,
                }
            }
        }
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 {
        1.0
    } else {
        (PI * x).sin() / (PI * x)
    }
}

/// Bits after the point of a weight.
const PRECISION: u32 = 22;

/// The weights of one value of the result.
struct Window {
    first: usize,
    weights: Vec<i32>,
}

/// The weights for `to` values from the part `from` of a line of `length` values.
fn windows(length: usize, from: &Range<f64>, to: usize, filter: Filter) -> Vec<Window> {
    let scale = (from.end - from.start) / to as f64;
    let reach = scale.max(1.0);
    let support = filter.support() * reach;
    let window = |index: usize| {
        let centre = from.start + (index as f64 + 0.5) * scale;
        // Truncated towards zero; negative numbers become 0.
        let first = (centre - support + 0.5) as usize;
        let end = ((centre + support + 0.5) as usize).min(length);
        let weight = |x: usize| filter.value((x as f64 - centre + 0.5) * (1.0 / reach));
        let weights: Vec<f64> = (first..end).map(weight).collect();
        let sum: f64 = weights.iter().sum();
        let fixed = |weight: f64| {
            let weight = if sum == 0.0 { weight } else { weight / sum };
            (weight * f64::from(1 << PRECISION)).round() as i32
        };
        Window {
            first,
            weights: weights.into_iter().map(fixed).collect(),
        }
    };
    (0..to).map(window).collect()
}

/// Resamples the part `x`, `y` of an image to `width` x `height`.
pub(crate) fn resize_part(
    image: &RgbImage,
    [x, y]: [Range<f64>; 2],
    [width, height]: [u32; 2],
    filter: Filter,
) -> RgbImage {
    let fewer = |from: u32, to: u32| i64::from(from) - i64::from(to);
    let rows = fewer(image.height(), height);
    if rows > 0 && rows > 2 * fewer(image.width(), width) {
        resize_rows(&resize_columns(image, y, height, filter), x, width, filter)
    } else {
        resize_columns(&resize_rows(image, x, width, filter), y, height, filter)
    }
}

fn is_whole(part: &Range<f64>, from: u32, to: u32) -> bool {
    *part == (0.0..f64::from(to)) && from == to
}

/// Resamples a part of each row to `width` pixels.
fn resize_rows(image: &RgbImage, x: Range<f64>, width: u32, filter: Filter) -> RgbImage {
    if is_whole(&x, image.width(), width) {
        return image.clone();
    }
    let windows = windows(image.width() as usize, &x, width as usize, filter);
    RgbImage::from_fn(width, image.height(), |column, row| {
        sum(&windows[column as usize], |x| image.get_pixel(x, row))
    })
}

/// Resamples a part of each column to `height` pixels.
fn resize_columns(image: &RgbImage, y: Range<f64>, height: u32, filter: Filter) -> RgbImage {
    if is_whole(&y, image.height(), height) {
        return image.clone();
    }
    let windows = windows(image.height() as usize, &y, height as usize, filter);
    RgbImage::from_fn(image.width(), height, |column, row| {
        sum(&windows[row as usize], |y| image.get_pixel(column, y))
    })
}

/// Resamples an image to `width` x `height` with Lanczos's filter.
pub(crate) fn resize(image: &RgbImage, size: [u32; 2]) -> RgbImage {
    let [width, height] = [image.width(), image.height()].map(f64::from);
    resize_part(image, [0.0..width, 0.0..height], size, Filter::Lanczos)
}

fn sum<'a>(window: &Window, pixel: impl Fn(u32) -> &'a Rgb<u8>) -> Rgb<u8> {
    // A half, so that the shift rounds.
    let mut sums = [1_i64 << (PRECISION - 1); 3];
    for (index, weight) in window.weights.iter().enumerate() {
        let pixel = pixel((window.first + index) as u32);
        for (sum, value) in sums.iter_mut().zip(pixel.0) {
            *sum += i64::from(*weight) * i64::from(value);
        }
    }
    Rgb(sums.map(|sum| (sum >> PRECISION).clamp(0, 255) as u8))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::{Path, PathBuf};

    use super::*;
    use diffuse_testing::read_json;

    pub(crate) fn folder() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/image_to_image")
    }

    pub(crate) fn open(path: impl AsRef<Path>) -> RgbImage {
        image::open(folder().join(path)).unwrap().to_rgb8()
    }

    #[test]
    fn resized_images_are_pillows_to_the_byte() {
        let odd = open("inputs/odd.png");
        let whole = [0.0..100.0, 0.0..70.0];
        let mut checked = 0;
        for row in read_json(folder().join("resized.json")).as_array().unwrap() {
            let filter = match row["kind"].as_str().unwrap() {
                "lanczos" => Filter::Lanczos,
                "bicubic" => Filter::Bicubic,
                _ => continue,
            };
            let size = [0, 1].map(|axis| row["size"][axis].as_u64().unwrap() as u32);
            let result = resize_part(&odd, whole.clone(), size, filter);
            assert!(result == open(row["expected"].as_str().unwrap()), "{row}");
            checked += 1;
        }
        assert_eq!(checked, 14);
    }
}
