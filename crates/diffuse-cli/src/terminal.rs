//! Images as text, for terminals with colors.

use console::Term;
use image::imageops::{self, FilterType};
use image::{Rgb, RgbImage};

/// Whether this is a terminal that can show images.
pub fn has_colors(terminal: &Term) -> bool {
    terminal.is_term() && terminal.features().colors_supported()
}

/// An image as lines of text, of a size that leaves room for what was there before.
pub fn text(image: &RgbImage, terminal: &Term) -> String {
    let (lines, columns) = terminal.size();
    let size = [
        u32::from(columns).saturating_sub(1).clamp(8, 48),
        u32::from(lines).saturating_sub(3).clamp(4, 24),
    ];
    letters(
        &fit(image, size),
        terminal.features().true_colors_supported(),
    )
}

/// An image that fits into so many columns of one pixel and lines of two.
fn fit(image: &RgbImage, [columns, lines]: [u32; 2]) -> RgbImage {
    let [width, height] = [image.width(), image.height()].map(|side| side.max(1) as f32);
    let scale = (columns as f32 / width).min(2.0 * lines as f32 / height);
    let [width, height] = [width, height].map(|side| ((side * scale).round() as u32).max(1));
    imageops::resize(image, width, height, FilterType::Triangle)
}

/// Lines with an image. A letter is two pixels: `▀` in the color of the upper one, on that of the
/// lower one.
fn letters(image: &RgbImage, true_color: bool) -> String {
    let color = |ground: u8, Rgb([r, g, b]): Rgb<u8>| {
        if true_color {
            return format!("\x1b[{ground}8;2;{r};{g};{b}m");
        }
        // The cube of 6 x 6 x 6 colors.
        let [r, g, b] = [r, g, b].map(|level| (u16::from(level) * 5 + 127) / 255);
        format!("\x1b[{ground}8;5;{}m", 16 + 36 * r + 6 * g + b)
    };
    let mut text = String::new();
    for y in (0..image.height()).step_by(2) {
        for x in 0..image.width() {
            text += &color(3, *image.get_pixel(x, y));
            if y + 1 < image.height() {
                text += &color(4, *image.get_pixel(x, y + 1));
            }
            text.push('▀');
        }
        text += "\x1b[0m\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_letter_is_two_pixels() {
        let colors = [[255, 0, 0], [1, 2, 3], [0, 90, 250]];
        let image = RgbImage::from_fn(1, 3, |_, y| Rgb(colors[y as usize]));
        assert_eq!(
            letters(&image, true),
            "\x1b[38;2;255;0;0m\x1b[48;2;1;2;3m▀\x1b[0m\n\x1b[38;2;0;90;250m▀\x1b[0m\n"
        );
        assert_eq!(
            letters(&image, false),
            "\x1b[38;5;196m\x1b[48;5;16m▀\x1b[0m\n\x1b[38;5;33m▀\x1b[0m\n"
        );
    }

    #[test]
    fn images_fit_and_keep_their_proportions() {
        let check = |size: [u32; 2], expected: [u32; 2]| {
            let image = fit(&RgbImage::new(size[0], size[1]), [48, 10]);
            assert_eq!([image.width(), image.height()], expected);
        };
        check([512, 512], [20, 20]);
        check([768, 128], [48, 8]);
        check([8, 512], [1, 20]);
    }
}
