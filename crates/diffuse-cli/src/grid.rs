//! Many images in one: a plain grid, and a contact sheet with labels.

use image::{Rgb, RgbImage, imageops};
use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster, get_raster_width};

/// Number of columns of a grid that is about as wide as high; up to three images are one row.
pub fn columns(images: usize) -> usize {
    match images {
        0..=3 => images.max(1),
        _ => images.isqrt() + usize::from(images.isqrt().pow(2) < images),
    }
}

/// Images of one size row by row, without gaps, as `make_image_grid` of Diffusers. What is left of
/// the last row is black.
///
/// # Panics
/// If there are no images.
pub fn grid(images: &[RgbImage], columns: usize) -> RgbImage {
    let (width, height) = images[0].dimensions();
    let rows = images.len().div_ceil(columns);
    let mut grid = RgbImage::new(columns as u32 * width, rows as u32 * height);
    for (index, image) in images.iter().enumerate() {
        let (x, y) = (index % columns, index / columns);
        let (x, y) = (x as u32 * width, y as u32 * height);
        imageops::replace(&mut grid, image, x.into(), y.into());
    }
    grid
}

/// A contact sheet: images of one size with labels of rows and columns.
pub struct Sheet<'a> {
    /// Paragraphs above all.
    pub title: Vec<String>,
    /// Labels of the columns, of which at least one.
    pub columns: Vec<String>,
    /// Labels of the rows. Without any there is one row, which is broken into several if it is
    /// long.
    pub rows: Vec<String>,
    /// The images row by row.
    pub images: &'a [RgbImage],
}

/// The longest row without labels that is not broken into several.
const LONGEST_ROW: usize = 6;
/// Pixels between images, and around the sheet.
const GAP: u32 = 12;
/// The least width of a column, and the largest of the labels of rows, in characters.
const NARROWEST: u32 = 12;
const WIDEST_LABEL: usize = 24;

impl Sheet<'_> {
    /// Draws the sheet.
    ///
    /// # Panics
    /// If there are no images.
    pub fn draw(&self) -> RgbImage {
        let (width, height) = self.images[0].dimensions();
        let font = Font::for_images_of(width);
        let column = width.max(NARROWEST * font.width());
        let per_row = match (self.rows.len(), self.columns.len()) {
            (0, count) if count > LONGEST_ROW => columns(count),
            (_, count) => count,
        };

        let rows = self.rows.iter().flat_map(|row| wrap(row, WIDEST_LABEL));
        let label = rows.map(|line| line.chars().count()).max();
        let label = label.map(|characters| characters as u32 * font.width());
        let left = GAP + label.map_or(0, |label| label + GAP);
        let whole = left + per_row as u32 * (column + GAP);

        let mut texts = Vec::new();
        let mut images = Vec::new();
        let mut y = GAP;
        for paragraph in &self.title {
            let lines = font.wrap(paragraph, whole - 2 * GAP);
            y += font.place(&mut texts, lines, GAP, y) + GAP / 2;
        }
        let x = |index: usize| left + index as u32 * (column + GAP);
        for (row, part) in self.images.chunks(per_row).enumerate() {
            // Columns are labelled once, or above each part of a row that is broken.
            if row == 0 || self.rows.is_empty() {
                let first = if self.rows.is_empty() {
                    row * per_row
                } else {
                    0
                };
                let labels = self.columns[first..].iter().take(per_row).enumerate();
                let heights = labels.map(|(index, label)| {
                    let lines = font.wrap(label, column);
                    font.place(&mut texts, lines, x(index), y)
                });
                y += heights.max().unwrap_or_default() + GAP / 2;
            }
            let label = self.rows.get(row).map(|label| wrap(label, WIDEST_LABEL));
            let label = font.place(&mut texts, label.unwrap_or_default(), GAP, y);
            images.extend(
                part.iter()
                    .enumerate()
                    .map(|(index, image)| (x(index), y, image)),
            );
            y += height.max(label) + GAP;
        }

        let mut sheet = RgbImage::from_pixel(whole, y, PAPER);
        for (x, y, image) in images {
            imageops::replace(&mut sheet, image, x.into(), y.into());
        }
        for text in texts {
            font.draw(&mut sheet, &text);
        }
        sheet
    }
}

const PAPER: Rgb<u8> = Rgb([255; 3]);
/// The level of a character's darkest pixel.
const INK: u32 = 20;

/// A line of text, and where it is.
struct Line {
    text: String,
    x: u32,
    y: u32,
}

/// A size of the font.
#[derive(Clone, Copy)]
struct Font(RasterHeight);

impl Font {
    /// Larger for larger images: sheets are shrunk to fit the screen.
    fn for_images_of(width: u32) -> Self {
        Self(match width {
            0..192 => RasterHeight::Size16,
            192..320 => RasterHeight::Size20,
            320..480 => RasterHeight::Size24,
            _ => RasterHeight::Size32,
        })
    }

    /// Width of a character in pixels.
    fn width(self) -> u32 {
        get_raster_width(FontWeight::Regular, self.0) as u32
    }

    fn wrap(self, text: &str, pixels: u32) -> Vec<String> {
        wrap(text, (pixels / self.width()) as usize)
    }

    /// Places lines below one another, and returns the height of all.
    fn place(self, texts: &mut Vec<Line>, lines: Vec<String>, x: u32, y: u32) -> u32 {
        let height = self.0.val() as u32;
        let count = lines.len() as u32;
        let lines = lines.into_iter().zip(0..);
        texts.extend(lines.map(|(text, index)| Line {
            text,
            x,
            y: y + index * height,
        }));
        count * height
    }

    fn draw(self, sheet: &mut RgbImage, line: &Line) {
        let mut left = line.x;
        for character in line.text.chars() {
            let raster = get_raster(character, FontWeight::Regular, self.0)
                .or_else(|| get_raster('\u{fffd}', FontWeight::Regular, self.0));
            for (row, y) in raster.iter().flat_map(|raster| raster.rows()).zip(line.y..) {
                for (intensity, x) in row.iter().zip(left..) {
                    let level = 255 - u32::from(*intensity) * (255 - INK) / 255;
                    if x < sheet.width() && y < sheet.height() {
                        sheet.put_pixel(x, y, Rgb([level as u8; 3]));
                    }
                }
            }
            left += self.width();
        }
    }
}

/// Breaks a text into lines of at most `width` characters: after spaces, `_` and `-` if possible.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let width = width.max(1);
    let mut lines = Vec::new();
    for paragraph in plain(text).lines() {
        let mut line = String::new();
        for word in paragraph.split_inclusive([' ', '_', '-']) {
            let mut word = word.to_string();
            if !line.is_empty() && line.chars().count() + word.trim_end().chars().count() > width {
                lines.push(std::mem::take(&mut line));
            }
            while word.trim_end().chars().count() > width {
                let rest = word.chars().skip(width).collect();
                lines.push(word.chars().take(width).collect());
                word = rest;
            }
            line.push_str(&word);
        }
        if !line.trim().is_empty() {
            lines.push(line);
        }
    }
    for line in &mut lines {
        line.truncate(line.trim_end().len());
    }
    lines
}

/// Punctuation that the font lacks, as it is typed.
fn plain(text: &str) -> String {
    let mut plain = String::new();
    for character in text.chars() {
        match character {
            '\u{2018}' | '\u{2019}' => plain.push('\''),
            '\u{201c}' | '\u{201d}' => plain.push('"'),
            '\u{2010}'..='\u{2015}' => plain.push('-'),
            '\u{2026}' => plain.push_str("..."),
            '\t' | '\u{a0}' => plain.push(' '),
            character => plain.push(character),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn images(count: usize) -> Vec<RgbImage> {
        let image = |index: usize| RgbImage::from_pixel(8, 4, Rgb([index as u8 + 1; 3]));
        (0..count).map(image).collect()
    }

    #[test]
    fn grids_are_about_as_wide_as_high() {
        let found: Vec<usize> = [0, 1, 2, 3, 4, 5, 6, 9, 10, 16, 17]
            .into_iter()
            .map(columns)
            .collect();
        assert_eq!(found, [1, 1, 2, 3, 2, 3, 3, 3, 4, 4, 5]);
    }

    #[test]
    fn images_are_side_by_side() {
        let grid = grid(&images(5), 3);
        assert_eq!(grid.dimensions(), (24, 8));
        let levels = [(0, 0), (8, 0), (23, 3), (0, 4), (15, 7), (16, 4)];
        let levels = levels.map(|(x, y)| grid.get_pixel(x, y).0[0]);
        assert_eq!(levels, [1, 2, 3, 4, 5, 0]);
    }

    #[test]
    fn long_labels_are_broken() {
        let check = |text: &str, width, expected: &[&str]| {
            assert_eq!(wrap(text, width), expected, "{text}");
        };
        check("a small red house", 9, &["a small", "red house"]);
        check("dpm++_2m_sde_karras", 10, &["dpm++_2m_", "sde_karras"]);
        check("incomprehensible", 6, &["incomp", "rehens", "ible"]);
        check("seed 1\n20 steps", 40, &["seed 1", "20 steps"]);
        check("“so” – it’s…", 40, &["\"so\" - it's..."]);
        check("", 5, &[]);
        check("äöü ß", 3, &["äöü", "ß"]);
    }

    /// Whether there is text in a part of a sheet.
    fn has_text(sheet: &RgbImage, [x, y]: [u32; 2], width: u32) -> bool {
        let part = imageops::crop_imm(sheet, x, y, width, 16).to_image();
        part.iter().any(|level| *level < 100)
    }

    #[test]
    fn rows_and_columns_have_labels() {
        let images = images(6);
        let sheet = Sheet {
            title: vec!["a boat".into()],
            columns: vec!["seed 0".into(), "seed 1".into(), "seed 2".into()],
            rows: vec!["euler".into(), "ddim".into()],
            images: &images,
        };
        let drawn = sheet.draw();
        let font = Font(RasterHeight::Size16);
        let column = NARROWEST * font.width();
        let left = GAP + 5 * font.width() + GAP;
        // Title, labels of the columns, and rows as high as their labels.
        let top = GAP + 16 + GAP / 2 + 16 + GAP / 2;
        assert_eq!(drawn.width(), left + 3 * (column + GAP));
        assert_eq!(drawn.height(), top + 2 * (16 + GAP));
        for (index, image) in images.iter().enumerate() {
            let (x, y) = (index as u32 % 3, index as u32 / 3);
            let (x, y) = (left + x * (column + GAP), top + y * (16 + GAP));
            let part = imageops::crop_imm(&drawn, x, y, 8, 4).to_image();
            assert_eq!(part, *image, "{index}");
        }
        assert!(has_text(&drawn, [GAP, GAP], 40));
        for row in 0..2 {
            let y = top + row * (16 + GAP);
            assert!(has_text(&drawn, [GAP, y], 40), "{row}");
        }
        for column_index in 0..3 {
            let x = left + column_index * (column + GAP);
            assert!(has_text(&drawn, [x, top - 16 - GAP / 2], 40));
            // Nothing but the image, which is 8 pixels wide.
            assert!(!has_text(&drawn, [x + 8, top], column - 8));
        }
    }

    #[test]
    fn a_long_row_is_broken() {
        let images = images(7);
        let sheet = Sheet {
            title: Vec::new(),
            columns: (0..7).map(|seed| format!("seed {seed}")).collect(),
            rows: Vec::new(),
            images: &images,
        };
        let drawn = sheet.draw();
        let column = NARROWEST * Font(RasterHeight::Size16).width();
        let row = 16 + GAP / 2 + 4 + GAP;
        assert_eq!(
            drawn.dimensions(),
            (GAP + 3 * (column + GAP), GAP + 3 * row)
        );
        let last = imageops::crop_imm(&drawn, GAP, GAP + 2 * row + 16 + GAP / 2, 8, 4);
        assert_eq!(last.to_image(), images[6]);
    }
}
