//! Picture files.

use super::jpeg::is_whole;
use crate::tensor_file::{check_beside, write_whole};
use crate::{Error, Result};
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Rgb, RgbImage, RgbaImage};
use std::{
    io::{BufReader, Cursor},
    path::Path,
};
use tch::Tensor;

/// While a picture becomes a tensor it is there as bytes and as f32, some of them twice.
const BYTES_PER_PIXEL: i64 = 36;

/// Reads PNG, JPEG, WebP, BMP, TIFF or GIF (its first frame), told apart by their content; turned as the camera's
/// orientation tag says; transparency laid over white. Returns `(1, 3, height, width)`, values 0 to 1.
///
/// # Errors
/// [`Error::Io`] where it cannot be read, [`Error::Image`] where it is no picture, no file (a folder, a pipe), is damaged, or is larger than
/// [`LONGEST_SIDE`](super::LONGEST_SIDE), [`Error::Memory`] where it takes more memory than there is.
pub fn load(path: impl AsRef<Path>) -> Result<Tensor> {
    let path = path.as_ref();
    let bad = |reason: String| Error::Image { path: path.to_owned(), reason };
    match std::fs::metadata(path) {
        Ok(file) if file.is_dir() => return Err(bad("is a folder; name a file in it".into())),
        // A pipe would be waited for.
        Ok(file) if !file.is_file() => return Err(bad("is not a regular file".into())),
        Ok(file) if file.len() == 0 => return Err(bad("the file is empty".into())),
        _ => {}
    }
    let reader = ImageReader::open(path).and_then(ImageReader::with_guessed_format).map_err(Error::io(path))?;
    if reader.format().is_none() {
        return Err(bad("is not a picture of a known format; use PNG or JPEG".into()));
    }
    if reader.format() == Some(ImageFormat::Jpeg) && !std::fs::File::open(path).map(BufReader::new).and_then(is_whole).map_err(Error::io(path))? {
        return Err(bad("is cut short: the end of the JPEG is missing; fetch or make it again".into()));
    }
    let mut decoder = reader.into_decoder().map_err(|error| bad(unreadable(&error)))?;
    let (width, height) = decoder.dimensions();
    super::check_size((height.into(), width.into())).map_err(|error| bad(error.to_string()))?;
    let bytes = i64::from(width).saturating_mul(height.into()).saturating_mul(BYTES_PER_PIXEL);
    crate::memory::check(bytes, format!("{}: a picture of {width}x{height}", path.display()), "choose a smaller one")?;
    // A picture without the tag, or with a damaged one, is upright.
    let orientation = decoder.orientation().unwrap_or(image::metadata::Orientation::NoTransforms);
    let mut picture = DynamicImage::from_decoder(decoder).map_err(|error| bad(unreadable(&error)))?;
    picture.apply_orientation(orientation);
    let rgb = if picture.color().has_alpha() { over_white(&picture.into_rgba8()) } else { picture.into_rgb8() };
    let (width, height) = (rgb.width() as usize, rgb.height() as usize);
    let array = ndarray::Array3::from_shape_vec((height, width, 3), rgb.into_raw()).map_err(|error| bad(error.to_string()))?;
    super::from_rgb8(array.view())
}

fn unreadable(error: &image::ImageError) -> String {
    format!("cannot be read as a picture: {error}")
}

fn over_white(picture: &RgbaImage) -> RgbImage {
    let mix = |colour: u8, alpha: u8| ((u32::from(colour) * u32::from(alpha) + 255 * (255 - u32::from(alpha)) + 127) / 255) as u8;
    RgbImage::from_fn(picture.width(), picture.height(), |x, y| {
        let [r, g, b, a] = picture.get_pixel(x, y).0;
        Rgb([mix(r, a), mix(g, a), mix(b, a)])
    })
}

/// Writes one picture as PNG or JPEG (quality 95), by the extension; first under a temporary name, so that an older
/// file stays until the new one is whole. A link of that name is replaced, not followed. A process that is
/// killed may leave a `.NAME.*.part` beside it, which can be deleted.
///
/// # Errors
/// [`Error::Image`] for another extension, [`Error::Io`] where it cannot be written (the folder must exist),
/// [`Error::Shape`] if it is not one picture, [`Error::Argument`] if all of it is NaN; single ones become black.
pub fn save(picture: &Tensor, path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    let bad = |reason: String| Error::Image { path: path.to_owned(), reason };
    let format = format_of(path)?;
    let pixels = super::to_rgb8(picture)?;
    let (height, width, _) = pixels.dim();
    let side = |length: usize| u32::try_from(length).map_err(|_| bad(format!("a side of {length} pixels is too long")));
    let rgb = RgbImage::from_raw(side(width)?, side(height)?, pixels.into_raw_vec_and_offset().0).ok_or_else(|| bad("too few pixels".into()))?;
    let mut bytes = Cursor::new(vec![]);
    let written = match format {
        ImageFormat::Jpeg => image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, 95).encode_image(&rgb),
        other => rgb.write_to(&mut bytes, other),
    };
    written.map_err(|error| bad(format!("cannot be written: {error}")))?;
    write_whole(path, bytes.get_ref())
}

/// What [`save`] would write there.
pub(crate) fn format_of(path: &Path) -> Result<ImageFormat> {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    match extension.as_str() {
        "png" => Ok(ImageFormat::Png),
        "jpg" | "jpeg" => Ok(ImageFormat::Jpeg),
        other => Err(Error::Image { path: path.to_owned(), reason: format!("the extension `{other}` is not one that is written; use .png or .jpg") }),
    }
}

/// Whether [`save`] could write there, to learn of a mistyped name before a long run and not after it.
///
/// # Errors
/// As [`save`].
pub fn check_writable(path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    if !path.is_dir() {
        format_of(path)?;
    }
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    if folder.is_dir() && !path.is_dir() {
        return check_beside(path);
    }
    let reason = if path.is_dir() {
        "is a folder; name a file in it".into()
    } else if folder.exists() {
        format!("{} is not a folder", folder.display())
    } else {
        format!("the folder {} does not exist; make it first", folder.display())
    };
    Err(Error::Image { path: path.to_owned(), reason })
}
