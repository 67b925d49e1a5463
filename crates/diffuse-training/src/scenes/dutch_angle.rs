//! A style of the scenes: the Dutch angle, for which the camera is tilted.

use image::RgbImage;
use image::imageops::interpolate_bilinear;

/// Tilt of the style, in degrees: positive turns images clockwise.
pub const DUTCH_ANGLE: f32 = 12.0;

/// The image turned clockwise about its center by an angle in degrees; its borders continue outward
/// into the corners.
pub fn rotate(image: &RgbImage, degrees: f32) -> RgbImage {
    let (width, height) = image.dimensions();
    let [right, bottom] = [width, height].map(|side| (side - 1) as f32);
    let (sin, cos) = degrees.to_radians().sin_cos();
    RgbImage::from_fn(width, height, |x, y| {
        let (x, y) = (x as f32 - right / 2.0, y as f32 - bottom / 2.0);
        let from_x = cos * x + sin * y + right / 2.0;
        let from_y = cos * y - sin * x + bottom / 2.0;
        interpolate_bilinear(image, from_x.clamp(0.0, right), from_y.clamp(0.0, bottom))
            .expect("a place inside of the image")
    })
}

#[cfg(test)]
mod tests {
    use image::{Rgb, imageops};

    use super::*;

    #[test]
    fn turns_clockwise() {
        let image = RgbImage::from_fn(16, 16, |x, y| {
            Rgb([(x * 15) as u8, (y * 15) as u8, (x * y) as u8])
        });
        assert_eq!(rotate(&image, 0.0), image);
        let turned = rotate(&image, 90.0);
        for (ours, exact) in turned.iter().zip(imageops::rotate90(&image).iter()) {
            assert!(ours.abs_diff(*exact) <= 1);
        }
    }

    #[test]
    fn a_horizon_has_the_angle() {
        // Its row is 63.5, at the center.
        let image = RgbImage::from_fn(128, 128, |_, y| Rgb([if y < 64 { 255 } else { 0 }; 3]));
        let image = rotate(&image, DUTCH_ANGLE);
        let horizon = |x| (0..128).map(|y| f32::from(image[(x, y)][0])).sum::<f32>() / 255.0 - 0.5;
        let slope = (horizon(123) - horizon(4)) / 119.0;
        assert!(
            (slope - DUTCH_ANGLE.to_radians().tan()).abs() < 1e-3,
            "{slope}"
        );
    }
}
