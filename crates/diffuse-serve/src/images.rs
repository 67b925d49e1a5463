//! Images as clients send and get them.

use std::io::Cursor;

use base64::Engine;
use base64::alphabet;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, STANDARD};
use diffuse_pipelines::load_image;
use image::codecs::jpeg::JpegEncoder;
use image::{DynamicImage, ImageFormat, ImageReader, Rgb, RgbImage};

/// The most pixels of an image that a client sends.
const MAX_PIXELS: u64 = 1 << 24;

/// The format of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Png,
    Jpeg { quality: u8 },
    Webp,
}

impl Format {
    pub fn name(self) -> &'static str {
        match self {
            Self::Png => "png",
            Self::Jpeg { .. } => "jpeg",
            Self::Webp => "webp",
        }
    }

    /// Checks that images of this size can be written.
    ///
    /// # Errors
    /// If a side is too long for the format.
    pub fn check_size(self, [width, height]: [u32; 2]) -> Result<(), String> {
        let most = match self {
            Self::Png => return Ok(()),
            Self::Jpeg { .. } => 65_535,
            Self::Webp => 16_383,
        };
        if width.max(height) <= most {
            return Ok(());
        }
        let name = self.name();
        Err(format!(
            "an image of {width} x {height} is too large for `{name}`: {most} on each side at most"
        ))
    }

    pub fn mime(self) -> &'static str {
        match self {
            Self::Png => "image/png",
            Self::Jpeg { .. } => "image/jpeg",
            Self::Webp => "image/webp",
        }
    }
}

/// An image as a file. `parameters` is a PNG's text chunk of that name.
pub fn encode(image: &RgbImage, format: Format, parameters: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    match format {
        Format::Png => encode_png(image, parameters, &mut bytes).map_err(|error| error.to_string()),
        Format::Jpeg { quality } => JpegEncoder::new_with_quality(&mut bytes, quality)
            .encode_image(image)
            .map_err(|error| error.to_string()),
        Format::Webp => image
            .write_to(&mut Cursor::new(&mut bytes), ImageFormat::WebP)
            .map_err(|error| error.to_string()),
    }
    .expect("an image can be written to memory");
    bytes
}

fn encode_png(
    image: &RgbImage,
    parameters: &str,
    bytes: &mut Vec<u8>,
) -> Result<(), png::EncodingError> {
    let mut encoder = png::Encoder::new(bytes, image.width(), image.height());
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    if !parameters.is_empty() {
        encoder.add_itxt_chunk("parameters".into(), parameters.into())?;
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(image.as_raw())?;
    writer.finish()
}

pub fn to_base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// With or without padding.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The bytes of an image that is base64, also in lines, or a `data:` URL of it.
pub fn from_base64(text: &str) -> Result<Vec<u8>, String> {
    let text = text.trim();
    let data = match text.strip_prefix("data:") {
        Some(url) => match url.split_once(";base64,") {
            Some((_, data)) => data,
            None => return Err("a `data:` URL has to be base64".into()),
        },
        None => text,
    };
    let data: Vec<u8> = data
        .bytes()
        .filter(|byte| !byte.is_ascii_whitespace())
        .collect();
    LENIENT
        .decode(data)
        .map_err(|error| format!("it is not base64: {error}"))
}

/// Reads an image without its transparency.
pub fn read(bytes: &[u8]) -> Result<RgbImage, String> {
    check_size(bytes)?;
    load_image(bytes).map_err(|error| error.to_string())
}

/// Reads a mask whose transparent pixels are to be repainted: white where they are.
pub fn read_transparency(bytes: &[u8]) -> Result<RgbImage, String> {
    check_size(bytes)?;
    let image = image::load_from_memory(bytes).map_err(|error| error.to_string())?;
    if !image.color().has_alpha() {
        return Err("a mask has transparent pixels where the image is to be repainted".into());
    }
    let alpha = image.into_rgba8();
    Ok(RgbImage::from_fn(alpha.width(), alpha.height(), |x, y| {
        Rgb([255 - alpha.get_pixel(x, y)[3]; 3])
    }))
}

/// Looks at the size before anything is decoded.
fn check_size(bytes: &[u8]) -> Result<(), String> {
    let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format();
    let dimensions = reader
        .map_err(image::ImageError::from)
        .and_then(ImageReader::into_dimensions);
    let (width, height) =
        dimensions.map_err(|_| "it is not a PNG, JPEG or WebP image, or it is damaged")?;
    if u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(format!(
            "an image of {width} x {height} is too large: {MAX_PIXELS} pixels at most"
        ));
    }
    Ok(())
}

/// A preview in the size of the result.
pub fn enlarge(image: &RgbImage, [width, height]: [u32; 2]) -> RgbImage {
    let filter = image::imageops::FilterType::Triangle;
    DynamicImage::from(image.clone())
        .resize_exact(width, height, filter)
        .into_rgb8()
}
