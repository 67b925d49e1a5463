//! Edges of images, which ControlNets take (Canny 1986, "A Computational Approach to Edge
//! Detection").

use image::{Rgb, RgbImage};

/// What a pixel is on the way to an edge.
#[derive(Clone, Copy, PartialEq)]
enum Edge {
    No,
    /// An edge, if it is connected to a strong one.
    Weak,
    Strong,
}

/// The edges of an image, white on black. `low` and `high` are thresholds of the gradient
/// `|dx| + |dy|` of Sobel's filter: edges begin above `high`, and go on above `low`. ControlNets
/// were trained with 100 and 200. Equal to `Canny` of OpenCV for an image of three channels: of
/// each pixel the channel with the largest gradient counts, and nothing is blurred.
pub fn canny(image: &RgbImage, low: u32, high: u32) -> RgbImage {
    let (low, high) = (low.min(high), low.max(high));
    let (width, height) = image.dimensions();
    let gradients = sobel(image);
    let at = |x: i64, y: i64| {
        let inside = (0..i64::from(width)).contains(&x) && (0..i64::from(height)).contains(&y);
        inside.then(|| gradients[(y * i64::from(width) + x) as usize])
    };
    let magnitude = |x, y| at(x, y).map_or(0, |[dx, dy]| dx.abs() + dy.abs());

    let mut edges = vec![Edge::No; gradients.len()];
    let mut strong = Vec::new();
    for (index, &[dx, dy]) in gradients.iter().enumerate() {
        let (x, y) = (
            index as i64 % i64::from(width),
            index as i64 / i64::from(width),
        );
        let own = dx.abs() + dy.abs();
        if own <= low as i32 {
            continue;
        }
        // The direction of the gradient by the tangents of 22.5 and 67.5 degrees, as numbers of 15
        // bits.
        const TANGENT: i64 = 13573;
        let (flat, steep) = (i64::from(dx.abs()) * TANGENT, i64::from(dy.abs()) << 15);
        let is_largest = if steep < flat {
            own > magnitude(x - 1, y) && own >= magnitude(x + 1, y)
        } else if steep > flat + (i64::from(dx.abs()) << 16) {
            own > magnitude(x, y - 1) && own >= magnitude(x, y + 1)
        } else {
            let side = if (dx ^ dy) < 0 { -1 } else { 1 };
            own > magnitude(x - side, y - 1) && own > magnitude(x + side, y + 1)
        };
        if is_largest {
            edges[index] = if own > high as i32 {
                strong.push((x, y));
                Edge::Strong
            } else {
                Edge::Weak
            };
        }
    }
    while let Some((x, y)) = strong.pop() {
        let around = (-1..=1).flat_map(|dy| (-1..=1).map(move |dx| (x + dx, y + dy)));
        for (x, y) in around.filter(|&(x, y)| at(x, y).is_some()) {
            let edge = &mut edges[(y * i64::from(width) + x) as usize];
            if *edge == Edge::Weak {
                *edge = Edge::Strong;
                strong.push((x, y));
            }
        }
    }
    RgbImage::from_fn(width, height, |x, y| {
        let edge = edges[(y * width + x) as usize];
        Rgb([if edge == Edge::Strong { 255 } else { 0 }; 3])
    })
}

/// For each pixel `[dx, dy]` of the channel with the largest gradient. Borders are repeated.
fn sobel(image: &RgbImage) -> Vec<[i32; 2]> {
    let (width, height) = image.dimensions();
    let column =
        |x: u32, offset: i64| (i64::from(x) + offset).clamp(0, i64::from(width) - 1) as u32;
    let row = |y: u32, offset: i64| (i64::from(y) + offset).clamp(0, i64::from(height) - 1) as u32;
    let gradient = |x: u32, y: u32, channel: usize| {
        let level = |dx, dy| i32::from(image.get_pixel(column(x, dx), row(y, dy))[channel]);
        let sides = |side| level(side, -1) + 2 * level(side, 0) + level(side, 1);
        let rows = |side| level(-1, side) + 2 * level(0, side) + level(1, side);
        [sides(1) - sides(-1), rows(1) - rows(-1)]
    };
    let strongest = |x, y| {
        let gradients = [0, 1, 2].map(|channel| gradient(x, y, channel));
        let size = |[dx, dy]: [i32; 2]| dx.abs() + dy.abs();
        // The first of equals.
        gradients
            .into_iter()
            .reduce(|best, next| if size(next) > size(best) { next } else { best })
            .expect("there are three channels")
    };
    let pixels = (0..height).flat_map(|y| (0..width).map(move |x| (x, y)));
    pixels.map(|(x, y)| strongest(x, y)).collect()
}
