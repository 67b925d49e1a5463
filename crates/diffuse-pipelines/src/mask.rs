//! Masks: the part of an image around the white of one, and an image over another by one. As
//! Diffusers' image processor and Pillow compute them, to the byte.

use image::imageops::crop_imm;
use image::{Rgb, RgbImage};

use crate::resize::{Filter, resize, resize_part};

/// The grey level of a pixel: Rec. 601 luma with 16 bits after the point.
pub(crate) fn level(pixel: &Rgb<u8>) -> u8 {
    let [red, green, blue] = pixel.0.map(u32::from);
    ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16) as u8
}

/// A part of an image: the first pixel, and the first that is no longer in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Region {
    pub start: [u32; 2],
    pub end: [u32; 2],
}

impl Region {
    /// The part of a mask that is not black, with a margin of `padding` pixels, grown to the shape
    /// of `size`, `[width, height]`, as far as the mask allows. None if the mask is black.
    pub fn around(mask: &RgbImage, size: [u32; 2], padding: u32) -> Option<Self> {
        let bounds = [mask.width(), mask.height()].map(i64::from);
        let padding = i64::from(padding);
        let (mut start, mut end) = (bounds, [0; 2]);
        for (x, y, pixel) in mask.enumerate_pixels() {
            if level(pixel) > 0 {
                for (axis, position) in [x, y].into_iter().enumerate() {
                    start[axis] = start[axis].min(i64::from(position));
                    end[axis] = end[axis].max(i64::from(position) + 1);
                }
            }
        }
        if end[0] == 0 {
            return None;
        }
        for axis in 0..2 {
            start[axis] = (start[axis] - padding).max(0);
            end[axis] = (end[axis] + padding).min(bounds[axis]);
        }
        let [width, height] = [end[0] - start[0], end[1] - start[1]];
        let shape = f64::from(size[0]) / f64::from(size[1]);
        let (axis, missing) = if width as f64 / height as f64 > shape {
            (1, width as f64 / shape - height as f64)
        } else {
            (0, height as f64 * shape - width as f64)
        };
        let (missing, bound) = (missing as i64, bounds[axis]);
        let mut from = start[axis] - missing.div_euclid(2);
        let mut to = end[axis] + missing - missing.div_euclid(2);
        if to >= bound {
            (from, to) = (from - (to - bound), bound);
        }
        if from < 0 {
            (from, to) = (0, to - from);
        }
        (start[axis], end[axis]) = (from, to.min(bound));
        Some(Self {
            start: start.map(|position| position as u32),
            end: end.map(|position| position as u32),
        })
    }

    fn size(&self) -> [u32; 2] {
        [0, 1].map(|axis| self.end[axis] - self.start[axis])
    }

    /// This part of an image.
    pub fn crop(&self, image: &RgbImage) -> RgbImage {
        let ([x, y], [width, height]) = (self.start, self.size());
        crop_imm(image, x, y, width, height).to_image()
    }

    /// A black image of this size with `part`, resized, in this place.
    pub fn paste(&self, part: &RgbImage, (width, height): (u32, u32)) -> RgbImage {
        let mut whole = RgbImage::new(width, height);
        let part = resize_and_crop(part, self.size());
        paste(&mut whole, &part, self.start.map(i64::from));
        whole
    }
}

/// Copies what fits of an image into another.
fn paste(whole: &mut RgbImage, part: &RgbImage, [x, y]: [i64; 2]) {
    image::imageops::replace(whole, part, x, y);
}

/// The size of an image with the width or the height of `size`, and the other by its own shape.
fn scaled(image: &RgbImage, [width, height]: [u32; 2], whole_width: bool) -> [u32; 2] {
    let by = |side: u32, to: u32, from: u32| {
        let side = u64::from(side) * u64::from(to) / u64::from(from);
        (side as u32).max(1)
    };
    if whole_width {
        [width, by(image.height(), width, image.width())]
    } else {
        [by(image.width(), height, image.height()), height]
    }
}

fn shape(width: u32, height: u32) -> f64 {
    f64::from(width) / f64::from(height)
}

/// Where a part is pasted into the middle.
fn middle(size: [u32; 2], part: [u32; 2]) -> [i64; 2] {
    [0, 1].map(|axis| i64::from(size[axis] / 2) - i64::from(part[axis] / 2))
}

/// Resizes an image to fit into `size`; its first and last line fill what is left.
pub(crate) fn resize_and_fill(image: &RgbImage, size: [u32; 2]) -> RgbImage {
    let [width, height] = size;
    let (ratio, own) = (shape(width, height), shape(image.width(), image.height()));
    let part = scaled(image, size, ratio < own);
    let resized = resize(image, part);
    let mut result = RgbImage::new(width, height);
    paste(&mut result, &resized, middle(size, part));
    let axis = if ratio < own { 1 } else { 0 };
    let margin = (size[axis] / 2).saturating_sub(part[axis] / 2);
    if ratio == own || margin == 0 {
        return result;
    }
    // A part without extent: Pillow extrapolates from the lines at the edge.
    for (edge, at) in [(0, 0), (part[axis], margin + part[axis])] {
        let mut from = part.map(|side| 0.0..f64::from(side));
        from[axis] = f64::from(edge)..f64::from(edge);
        let mut to = size;
        to[axis] = margin;
        let line = resize_part(&resized, from, to, Filter::Bicubic);
        let mut position = [0; 2];
        position[axis] = i64::from(at);
        paste(&mut result, &line, position);
    }
    result
}

/// Resizes an image to cover `size`, and takes the middle.
pub(crate) fn resize_and_crop(image: &RgbImage, size: [u32; 2]) -> RgbImage {
    let [width, height] = size;
    let wide = shape(width, height) > shape(image.width(), image.height());
    let part = scaled(image, size, wide);
    let mut result = RgbImage::new(width, height);
    paste(&mut result, &resize(image, part), middle(size, part));
    result
}

/// `image` over `below` where the mask is black.
pub(crate) fn overlay(image: &RgbImage, mask: &RgbImage, below: &RgbImage) -> RgbImage {
    RgbImage::from_fn(below.width(), below.height(), |x, y| {
        let alpha = 255 - u32::from(level(mask.get_pixel(x, y)));
        let (above, below) = (image.get_pixel(x, y), below.get_pixel(x, y));
        Rgb([0, 1, 2].map(|color| blend(above[color], below[color], alpha)))
    })
}

/// Pillow's `alpha_composite` of a premultiplied level over an opaque one.
fn blend(above: u8, below: u8, alpha: u32) -> u8 {
    /// Bits after the point of a coefficient.
    const PRECISION: u32 = 7;
    let divided_by_255 = |x: u32| ((x >> 8) + x) >> 8;
    let (above, below) = (u32::from(above), u32::from(below));
    let premultiplied = divided_by_255(above * alpha + 128);
    let above = match alpha {
        0 => return below as u8,
        255 => premultiplied,
        alpha => (255 * premultiplied / alpha).min(255),
    };
    let total = 255 * 255;
    let first = alpha * 255 * 255 * (1 << PRECISION) / total;
    let second = 255 * (1 << PRECISION) - first;
    let sum = above * first + below * second + (0x80 << PRECISION);
    (divided_by_255(sum) >> PRECISION) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resize::tests::{folder, open};
    use diffuse_testing::read_json;

    #[test]
    fn parts_and_overlays_are_those_of_diffusers_to_the_byte() {
        let odd = open("inputs/odd.png");
        let mut checked = [0; 4];
        for row in read_json(folder().join("resized.json")).as_array().unwrap() {
            let sides = |key: &str| {
                row[key].as_array().map(|sides| {
                    sides
                        .iter()
                        .map(|side| side.as_u64().unwrap() as u32)
                        .collect::<Vec<_>>()
                })
            };
            let size = sides("size").map(|size| [size[0], size[1]]);
            let mask = row["mask"]
                .as_str()
                .map(|mask| open(format!("inputs/{mask}.png")));
            let (index, result) = match row["kind"].as_str().unwrap() {
                "fill" => (0, resize_and_fill(&odd, size.unwrap())),
                "crop" => (1, resize_and_crop(&odd, size.unwrap())),
                "overlay" => {
                    let below = open("resized/overlay_input.png");
                    (2, overlay(&odd, &mask.unwrap(), &below))
                }
                "region" => {
                    let padding = row["padding"].as_u64().unwrap() as u32;
                    let region = Region::around(&mask.unwrap(), size.unwrap(), padding).unwrap();
                    let found = [region.start, region.end].concat();
                    assert_eq!(Some(found), sides("expected"), "{row}");
                    checked[3] += 1;
                    continue;
                }
                _ => continue,
            };
            assert!(result == open(row["expected"].as_str().unwrap()), "{row}");
            checked[index] += 1;
        }
        assert_eq!(checked, [5, 5, 1, 8]);
    }

    #[test]
    fn levels_of_blends() {
        assert_eq!(blend(200, 100, 0), 100);
        assert_eq!(blend(200, 100, 255), 200);
        assert_eq!(Region::around(&RgbImage::new(8, 8), [8, 8], 2), None);
    }
}
