//! Pictures in and out, sound and hostile.
#![allow(clippy::disallowed_methods, missing_docs)]

use ::image::{codecs::jpeg::JpegEncoder, DynamicImage, GrayImage, ImageBuffer, ImageFormat, Luma, LumaA, Rgb, RgbImage, Rgba, RgbaImage};
use attention_distillation::{image, Error};
use ndarray::{s, Array3, Array4};
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// One grey level.
const LEVEL: f64 = 1.0 / 255.0;

fn difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a - b).abs().max().double_value(&[])
}

/// Every pixel its own colour, each of them a whole number of 255ths.
fn chequered(height: i64, width: i64) -> Tensor {
    let count = 3 * height * width;
    (Tensor::arange(count, (Kind::Float, Device::Cpu)) * 37.0).remainder(256.0).view([1, 3, height, width]) / 255.0
}

/// Soft colours, which JPEG keeps.
fn soft(height: i64, width: i64) -> Tensor {
    let ramp = |n: i64| Tensor::linspace(0.1, 0.9, n, (Kind::Float, Device::Cpu));
    let (y, x) = (ramp(height).view([1, 1, height, 1]), ramp(width).view([1, 1, 1, width]));
    Tensor::cat(&[&y + &x * 0.0, &y * 0.0 + &x, (&y + &x) * 0.5], 1)
}

fn folder() -> tempfile::TempDir {
    tch::set_num_threads(1);
    tempfile::tempdir().unwrap()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn pixel(picture: &Tensor, y: i64, x: i64) -> [u8; 3] {
    let rgb = image::to_rgb8(picture).unwrap();
    [0, 1, 2].map(|c| rgb[[y as usize, x as usize, c]])
}

/// Not a picture: the error says which file, and nothing was left of memory or of the process.
#[track_caller]
fn unreadable(path: &Path) -> String {
    let error = image::load(path).unwrap_err();
    assert!(matches!(error, Error::Image { .. }), "{error:?}");
    let message = error.to_string();
    assert!(message.contains(path.file_name().unwrap().to_str().unwrap()), "{message}");
    message
}

fn write(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn a_png_keeps_every_level() {
    tch::set_num_threads(1);
    let folder = folder();
    let path = folder.path().join("a.PNG");
    for (height, width) in [(1, 1), (5, 9), (64, 31)] {
        let picture = chequered(height, width);
        image::save(&picture, &path).unwrap();
        let back = image::load(&path).unwrap();
        assert_eq!(back.kind(), Kind::Float);
        // Division by 255 twice, once here and once there.
        assert!(difference(&back, &picture) < 1e-6);
    }
    assert_eq!(names(folder.path()), ["a.PNG"], "no temporary file is left");
}

#[test]
fn a_jpeg_is_close() {
    tch::set_num_threads(1);
    let folder = folder();
    for name in ["a.jpg", "b.JPEG"] {
        let path = folder.path().join(name);
        image::save(&soft(40, 56), &path).unwrap();
        // Quality 95 moves soft colours by a few levels (a channel swap or a shift would by dozens).
        assert!(difference(&image::load(&path).unwrap(), &soft(40, 56)) < 6.0 * LEVEL);
        assert_eq!(&std::fs::read(&path).unwrap()[..3], [0xff, 0xd8, 0xff]);
    }
}

#[test]
fn what_is_saved_is_rounded_and_clamped() {
    tch::set_num_threads(1);
    let folder = folder();
    let path = folder.path().join("a.png");
    let values = [-0.5f32, 0.0, 0.49 / 255.0, 0.51 / 255.0, 127.4 / 255.0, 1.0, 7.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
    let picture = Tensor::from_slice(&values).view([1, 1, 1, 10]).expand([1, 3, 1, 10], false);
    image::save(&picture, &path).unwrap();
    let back = image::to_rgb8(&image::load(&path).unwrap()).unwrap();
    assert_eq!(back.slice(s![0, .., 1]).to_vec(), [0, 0, 0, 1, 127, 255, 255, 255, 0, 0]);
    // In any kind, with a graph or without.
    image::save(&soft(4, 4).to_kind(Kind::Double).set_requires_grad(true), &path).unwrap();
    assert!(difference(&image::load(&path).unwrap(), &soft(4, 4)) <= 0.5 * LEVEL + 1e-6);
    image::save(&soft(4, 4).to_kind(Kind::BFloat16), &path).unwrap();
    // bf16 has 8 bits: half a level of 1/256 on top of half a level.
    assert!(difference(&image::load(&path).unwrap(), &soft(4, 4)) < 1.1 * LEVEL);
}

#[test]
fn arrays_go_both_ways() {
    tch::set_num_threads(1);
    let array = Array4::from_shape_fn((2, 3, 4, 5), |(b, c, y, x)| (b * 60 + c * 20 + y * 5 + x) as f32 / 120.0);
    let picture = image::from_array(array.view()).unwrap();
    assert_eq!(picture.size(), [2, 3, 4, 5]);
    assert_eq!(picture.double_value(&[1, 2, 3, 4]), f64::from(array[[1, 2, 3, 4]]));
    assert_eq!(image::to_array(&picture).unwrap(), array);
    // Views in other orders and with steps, and tensors in theirs.
    let turned = array.slice(s![..;-1, .., 1..;2, ..;-2]);
    let picture = image::from_array(turned).unwrap();
    assert_eq!(picture.size(), [2, 3, 2, 3]);
    assert_eq!(image::to_array(&picture).unwrap(), turned);
    let permuted = array.view().permuted_axes([0, 1, 3, 2]);
    assert_eq!(image::to_array(&image::from_array(permuted).unwrap()).unwrap(), permuted);
    let transposed = image::from_array(array.view()).unwrap().transpose(2, 3).set_requires_grad(true);
    assert_eq!(image::to_array(&transposed).unwrap(), permuted);
    // The tensor is its own: the array may go.
    let kept = image::from_array(Array4::from_elem((1, 3, 2, 2), 0.25f32).view()).unwrap();
    assert_eq!(kept.sum(Kind::Float).double_value(&[]), 3.0);
}

#[test]
fn bytes_go_both_ways() {
    tch::set_num_threads(1);
    let array = Array3::from_shape_fn((4, 6, 3), |(y, x, c)| (y * 18 + x * 3 + c) as u8 * 3);
    let picture = image::from_rgb8(array.view()).unwrap();
    assert_eq!((picture.size(), picture.kind()), (vec![1, 3, 4, 6], Kind::Float));
    assert!((picture.double_value(&[0, 2, 3, 5]) - f64::from(array[[3, 5, 2]]) * LEVEL).abs() < 1e-6);
    assert_eq!(image::to_rgb8(&picture).unwrap(), array);
    let bgr = array.slice(s![..;2, 1..4, ..;-1]);
    assert_eq!(image::to_rgb8(&image::from_rgb8(bgr).unwrap()).unwrap(), bgr);
    assert_eq!(image::to_rgb8(&picture.flip([3])).unwrap(), array.slice(s![.., ..;-1, ..]));
    // All levels survive.
    let levels = Array3::from_shape_fn((16, 16, 3), |(y, x, _)| (y * 16 + x) as u8);
    assert_eq!(image::to_rgb8(&image::from_rgb8(levels.view()).unwrap()).unwrap(), levels);
}

#[test]
fn what_is_no_picture_is_refused() {
    tch::set_num_threads(1);
    let folder = folder();
    for shape in [vec![3, 8, 8], vec![1, 1, 8, 8], vec![1, 4, 8, 8], vec![0, 3, 8, 8], vec![1, 3, 0, 8], vec![1, 3, 8, 0], vec![]] {
        let tensor = Tensor::zeros(&shape, (Kind::Float, Device::Cpu));
        assert!(matches!(image::size(&tensor), Err(Error::Shape { .. })), "{shape:?}");
        assert!(image::resize(&tensor, (4, 4)).is_err());
        assert!(image::to_array(&tensor).is_err() && image::to_rgb8(&tensor).is_err());
        assert!(image::sheet(&[&tensor]).is_err() && image::sheet(&[&tensor, &soft(4, 4)]).is_err());
        assert!(matches!(image::save(&tensor, folder.path().join("a.png")), Err(Error::Shape { .. })));
    }
    let two = Tensor::zeros([2, 3, 4, 4], (Kind::Float, Device::Cpu));
    assert!(matches!(image::save(&two, folder.path().join("a.png")), Err(Error::Shape { .. })));
    assert!(image::to_rgb8(&two).is_err() && image::to_array(&two).is_ok());
    for shape in [(0, 3, 4, 4), (1, 3, 0, 4), (1, 4, 4, 4)] {
        assert!(matches!(image::from_array(Array4::zeros(shape).view()), Err(Error::Shape { .. })), "{shape:?}");
    }
    for shape in [(0, 4, 3), (4, 0, 3), (4, 4, 4), (4, 4, 0)] {
        assert!(matches!(image::from_rgb8(Array3::zeros(shape).view()), Err(Error::Shape { .. })), "{shape:?}");
    }
    assert!(names(folder.path()).is_empty());
}

#[test]
fn resizing_to_the_same_size_touches_nothing() {
    tch::set_num_threads(1);
    let picture = chequered(7, 11) * 3.0 - 1.0; // outside of 0 to 1, too
    let same = image::resize(&picture, (7, 11)).unwrap();
    assert_eq!(difference(&same, &picture), 0.0);
    assert_eq!(image::size(&picture).unwrap(), (7, 11));
}

#[test]
fn resizing_is_bicubic_and_antialiased() {
    tch::set_num_threads(1);
    for (height, width) in [(3, 5), (64, 40), (9, 100)] {
        // Weights add up to 1, in f32.
        let grey = image::resize(&(chequered(20, 30) * 0.0 + 0.3), (height, width)).unwrap();
        assert_eq!(grey.size(), [1, 3, height, width]);
        assert!(difference(&grey, &(grey.ones_like() * 0.3)) < 1e-6);
        let harsh = image::resize(&chequered(20, 30), (height, width)).unwrap();
        assert!(harsh.min().double_value(&[]) >= 0.0 && harsh.max().double_value(&[]) <= 1.0, "what overshoots is clamped");
    }
    // A ramp stays one away from its ends.
    let small = image::resize(&soft(64, 64), (32, 32)).unwrap();
    let expected = soft(64, 64).avg_pool2d([2, 2], [2, 2], [0, 0], false, true, None);
    let inner = |t: &Tensor| t.narrow(2, 4, 24).narrow(3, 4, 24);
    assert!(difference(&inner(&small), &inner(&expected)) < 1e-5);
    // Single lines between others fade to grey instead of flickering.
    let lines = Tensor::from_slice(&[0.0f32, 1.0]).repeat([32]).view([1, 1, 1, 64]).expand([1, 3, 64, 64], false);
    let fine = image::resize(&lines, (16, 16)).unwrap();
    let middle = fine.narrow(3, 4, 8);
    assert!(difference(&middle, &(middle.ones_like() * 0.5)) < 0.05);
    // Batches and other kinds are taken as well.
    let batch = Tensor::cat(&[soft(8, 8), chequered(8, 8)], 0);
    let both = image::resize(&batch, (4, 6)).unwrap();
    assert!(difference(&both.narrow(0, 1, 1), &image::resize(&chequered(8, 8), (4, 6)).unwrap()) < 1e-6);
    assert!(difference(&image::resize(&soft(8, 8).to_kind(Kind::Double), (4, 6)).unwrap(), &both.narrow(0, 0, 1)) < 1e-6);
}

#[test]
fn sizes_of_nothing_and_absurd_ones_are_refused() {
    tch::set_num_threads(1);
    let picture = soft(4, 4);
    for size in [(0, 4), (4, 0), (0, 0), (-1, 4), (i64::MIN, 4), (i64::MAX, i64::MAX), (image::LONGEST_SIDE + 1, 1), (16_385, 16_385)] {
        assert!(matches!(image::check_size(size), Err(Error::Argument { argument: "size", .. })), "{size:?}");
        assert!(matches!(image::resize(&picture, size), Err(Error::Argument { argument: "size", .. })), "{size:?}");
        assert!(image::size_of_area(size, 100, 8).is_err());
    }
    for size in [(1, 1), (image::LONGEST_SIDE, 1), (16_384, 16_384)] {
        image::check_size(size).unwrap();
    }
    for area in [0, -5, i64::MIN, i64::MAX] {
        assert!(image::size_of_area((4, 4), area, 8).is_err(), "{area}");
    }
    for multiple in [0, -8, i64::MIN, i64::MAX] {
        assert!(image::size_of_area((4, 4), 64, multiple).is_err(), "{multiple}");
    }
}

#[test]
fn an_area_keeps_the_aspect_ratio() {
    tch::set_num_threads(1);
    assert_eq!(image::size_of_area((600, 600), 512 * 512, 8).unwrap(), (512, 512));
    assert_eq!(image::size_of_area((500, 1000), 512 * 512, 8).unwrap(), (360, 728));
    assert_eq!(image::size_of_area((1000, 500), 512 * 512, 8).unwrap(), (728, 360));
    assert_eq!(image::size_of_area((1, 1000), 64, 8).unwrap(), (8, 256), "no side vanishes");
    assert_eq!(image::size_of_area((30, 20), 600, 1).unwrap(), (30, 20));
    let folder = folder();
    let path = folder.path().join("a.png");
    image::save(&soft(50, 100), &path).unwrap();
    assert_eq!(image::size(&image::load_to_area(&path, 64 * 64).unwrap()).unwrap(), (48, 88));
    assert!(image::load_to_area(&path, 0).is_err());
}

#[test]
fn a_sheet_lays_pictures_side_by_side() {
    tch::set_num_threads(1);
    let (a, b) = (soft(16, 24), chequered(8, 6));
    let sheet = image::sheet(&[&a, &b]).unwrap();
    // The first is scaled to the height of the last, 8 x 12; 8 pixels of white between.
    assert_eq!(sheet.size(), [1, 3, 8, 12 + 8 + 6]);
    assert_eq!(difference(&sheet.narrow(3, 0, 12), &image::resize(&a, (8, 12)).unwrap()), 0.0);
    assert_eq!(sheet.narrow(3, 12, 8).min().double_value(&[]), 1.0);
    assert_eq!(difference(&sheet.narrow(3, 20, 6), &b), 0.0);
    assert_eq!(difference(&image::sheet(&[&b]).unwrap(), &b), 0.0);
    let batch = Tensor::cat(&[&b, &(&b * 0.5)], 0);
    let sheet = image::sheet(&[&batch]).unwrap();
    assert_eq!(sheet.size(), [1, 3, 8, 6 + 8 + 6]);
    assert_eq!(difference(&sheet.narrow(3, 14, 6), &(&b * 0.5)), 0.0);
    assert!(matches!(image::sheet(&[]), Err(Error::Argument { argument: "pictures", .. })));
    // A sliver does not vanish beside a low picture.
    assert_eq!(image::sheet(&[&soft(100, 1), &soft(2, 2)]).unwrap().size(), [1, 3, 2, 1 + 8 + 2]);
    // A strip that would be 65536 wide lies above white; strips like the last are as they are.
    let (strip, square) = (soft(16, 1024), soft(1024, 1024));
    let sheet = image::sheet(&[&strip, &square]).unwrap();
    assert_eq!(sheet.size(), [1, 3, 1024, 4096 + 8 + 1024]);
    assert_eq!(difference(&sheet.narrow(2, 0, 64).narrow(3, 0, 4096), &image::resize(&strip, (64, 4096)).unwrap()), 0.0);
    assert_eq!(sheet.narrow(2, 64, 960).narrow(3, 0, 4104).min().double_value(&[]), 1.0);
    assert_eq!(difference(&sheet.narrow(3, 4104, 1024), &square), 0.0);
    let (one, other) = (soft(16, 128), soft(16, 128).flip([3]));
    let sheet = image::sheet(&[&Tensor::cat(&[&strip, &strip.flip([3])], 0), &one, &other]).unwrap();
    assert_eq!(sheet.size(), [1, 3, 16, 2 * (128 + 8) + 128 + 8 + 128]);
    assert_eq!(difference(&sheet.narrow(3, 2 * 136, 128), &one), 0.0);
}

#[test]
fn transparency_lies_over_white() {
    tch::set_num_threads(1);
    let folder = folder();
    let path = folder.path().join("a.png");
    let colours = [[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51], [0, 0, 0, 128]];
    RgbaImage::from_fn(4, 1, |x, _| Rgba(colours[x as usize])).save(&path).unwrap();
    let picture = image::load(&path).unwrap();
    let found = [0, 1, 2, 3].map(|x| pixel(&picture, 0, x));
    // c a + 255 (1 - a), rounded: 200 * 0.2 + 255 * 0.8 = 244.
    assert_eq!(found, [[200, 100, 0], [255, 255, 255], [244, 224, 204], [127, 127, 127]]);
    ImageBuffer::<LumaA<u8>, _>::from_fn(2, 1, |x, _| LumaA([100, [255, 51][x as usize]])).save(&path).unwrap();
    let picture = image::load(&path).unwrap();
    assert_eq!([pixel(&picture, 0, 0), pixel(&picture, 0, 1)], [[100; 3], [224; 3]]);
}

#[test]
fn deep_and_grey_pictures_are_read() {
    tch::set_num_threads(1);
    let folder = folder();
    let path = folder.path().join("a.png");
    GrayImage::from_fn(3, 2, |x, y| Luma([(y * 3 + x) as u8 * 40])).save(&path).unwrap();
    let picture = image::load(&path).unwrap();
    assert_eq!(image::size(&picture).unwrap(), (2, 3));
    assert_eq!([pixel(&picture, 0, 1), pixel(&picture, 1, 2)], [[40; 3], [200; 3]]);
    // 16 bits become 8: 257 to the level.
    ImageBuffer::<Rgb<u16>, _>::from_fn(2, 1, |x, _| Rgb([257 * 10, 257 * 100 * x as u16, 65_535])).save(&path).unwrap();
    let picture = image::load(&path).unwrap();
    assert_eq!([pixel(&picture, 0, 0), pixel(&picture, 0, 1)], [[10, 0, 255], [10, 100, 255]]);
    ImageBuffer::<Luma<u16>, _>::from_fn(1, 1, |_, _| Luma([257 * 77])).save(&path).unwrap();
    assert_eq!(pixel(&image::load(&path).unwrap(), 0, 0), [77; 3]);
    ImageBuffer::<Rgba<u16>, _>::from_fn(1, 1, |_, _| Rgba([0, 0, 0, 0])).save(&path).unwrap();
    assert_eq!(pixel(&image::load(&path).unwrap(), 0, 0), [255; 3]);
}

#[test]
fn the_content_tells_the_format_and_not_the_name() {
    tch::set_num_threads(1);
    let folder = folder();
    let picture = RgbImage::from_fn(6, 4, |x, y| Rgb([x as u8 * 40, y as u8 * 60, 128]));
    for (format, name) in [
        (ImageFormat::Png, "a.jpg"),
        (ImageFormat::Bmp, "a.png"),
        (ImageFormat::Tiff, "a"),
        (ImageFormat::WebP, "a.txt"),
        (ImageFormat::Gif, "a.tiff"),
    ] {
        let path = folder.path().join(name);
        DynamicImage::from(picture.clone()).save_with_format(&path, format).unwrap();
        let loaded = image::load(&path).unwrap();
        let expected: Vec<u8> = picture.pixels().flat_map(|p| p.0).collect();
        let found = image::to_rgb8(&loaded).unwrap().into_raw_vec_and_offset().0;
        // GIF has a palette of 256, enough for these 24 colours up to a level or two.
        let most = expected.iter().zip(&found).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(most <= if format == ImageFormat::Gif { 2 } else { 0 }, "{format:?}: {most}");
    }
}

/// A JPEG with an orientation tag: an APP1 segment behind the first two bytes, with a TIFF header and one entry.
fn tagged(picture: &RgbImage, orientation: u16) -> Vec<u8> {
    let mut jpeg = vec![];
    JpegEncoder::new_with_quality(&mut jpeg, 100).encode_image(picture).unwrap();
    let mut exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0".to_vec();
    exif.extend(0x0112u16.to_le_bytes()); // orientation
    exif.extend(3u16.to_le_bytes()); // a short
    exif.extend(1u32.to_le_bytes()); // one of them
    exif.extend(orientation.to_le_bytes());
    exif.extend([0; 6]); // the entry's padding, and no further directory
    let mut segment = vec![0xff, 0xe1];
    segment.extend((exif.len() as u16 + 2).to_be_bytes());
    segment.extend(exif);
    jpeg.splice(2..2, segment);
    jpeg
}

#[test]
fn the_cameras_orientation_is_followed() {
    tch::set_num_threads(1);
    let folder = folder();
    // Four flat quarters, 16 x 32: red, green / blue, white.
    let colours = [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]];
    let upright = RgbImage::from_fn(32, 16, |x, y| Rgb(colours[y as usize / 8][x as usize / 16]));
    let name = |rgb: [u8; 3]| match rgb.map(|c| c > 127) {
        [true, false, false] => 'r',
        [false, true, false] => 'g',
        [false, false, true] => 'b',
        [true, true, true] => 'w',
        _ => '?',
    };
    // Read row by row: as the standard has the eight cases; 0 and 9 are no orientations, so upright.
    let expected = ["rgbw", "rgbw", "grwb", "wbgr", "bwrg", "rbgw", "brwg", "wgbr", "gwrb", "rgbw"];
    for (orientation, expected) in expected.iter().enumerate() {
        let path = write(folder.path(), "a.jpg", &tagged(&upright, orientation as u16));
        let picture = image::load(&path).unwrap();
        let (height, width) = image::size(&picture).unwrap();
        assert_eq!((height, width), if (5..=8).contains(&orientation) { (32, 16) } else { (16, 32) }, "orientation {orientation}");
        let at = |y: i64, x: i64| name(pixel(&picture, (2 * y + 1) * height / 4, (2 * x + 1) * width / 4));
        let found: String = [at(0, 0), at(0, 1), at(1, 0), at(1, 1)].into_iter().collect();
        assert_eq!(found, *expected, "orientation {orientation}");
    }
    // A damaged tag is no reason to refuse the picture.
    let mut damaged = tagged(&upright, 6);
    damaged[12..20].fill(0xee);
    assert_eq!(image::size(&image::load(write(folder.path(), "a.jpg", &damaged)).unwrap()).unwrap(), (16, 32));
}

#[test]
fn an_empty_file_is_said_to_be_empty() {
    tch::set_num_threads(1);
    let folder = folder();
    for name in ["empty", "empty.png", "empty.jpg"] {
        let message = unreadable(&write(folder.path(), name, b""));
        assert!(message.contains("file is empty"), "{message}");
    }
}

#[test]
fn damaged_files_are_errors_that_name_them() {
    tch::set_num_threads(1);
    let folder = folder();
    let garbage: Vec<u8> = (0..5000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    for name in ["garbage", "garbage.png", "garbage.jpg", "garbage.tiff"] {
        unreadable(&write(folder.path(), name, &garbage));
        unreadable(&write(folder.path(), name, b"<html>Not found</html>"));
        unreadable(&write(folder.path(), name, b"x"));
    }
    let path = folder.path().join("whole.png");
    image::save(&chequered(40, 40), &path).unwrap();
    let whole = std::fs::read(&path).unwrap();
    for length in [1, 8, 20, 33, 40, whole.len() / 2, whole.len() - 40] {
        unreadable(&write(folder.path(), "truncated.png", &whole[..length]));
    }
    // A byte of the pixels flipped: the checksum tells.
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 0xff;
    unreadable(&write(folder.path(), "flipped.png", &flipped));
    for length in [2, 3, 20, 200] {
        let path = folder.path().join("whole.jpg");
        image::save(&chequered(40, 40), &path).unwrap();
        unreadable(&write(folder.path(), "truncated.jpg", &std::fs::read(&path).unwrap()[..length]));
    }
}

/// Wherever the file stops; what lies behind its end, as some cameras' second picture, does no harm.
#[test]
fn cut_short() {
    let folder = folder();
    let pixels = RgbImage::from_fn(150, 90, |x, y| Rgb([(x * y % 251) as u8, (x * 7 % 256) as u8, (y * 13 % 256) as u8]));
    // A thumbnail has an end marker of its own, and tables may hold the two bytes.
    let mut exif = b"Exif\0\0".to_vec();
    exif.extend([0xff, 0xd8, 0xff, 0xda, 0xff, 0xd9]);
    let with_thumbnail = |jpeg: &[u8]| {
        let length = (exif.len() as u16 + 2).to_be_bytes();
        [&jpeg[..2], &[0xff, 0xe1], &length, &exif, &jpeg[2..]].concat()
    };
    for format in [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::WebP, ImageFormat::Bmp, ImageFormat::Tiff, ImageFormat::Gif] {
        let mut whole = std::io::Cursor::new(vec![]);
        DynamicImage::from(pixels.clone()).write_to(&mut whole, format).unwrap();
        let whole = whole.into_inner();
        let mut files = vec![whole.clone()];
        if format == ImageFormat::Jpeg {
            files.push(with_thumbnail(&whole));
        }
        for whole in files {
            for tenths in [4, 5, 7, 9] {
                unreadable(&write(folder.path(), "cut", &whole[..whole.len() * tenths / 10]));
            }
            let path = write(folder.path(), "whole", &whole);
            let picture = image::load(&path).unwrap();
            if format == ImageFormat::Jpeg {
                let behind = write(folder.path(), "behind", &[&whole[..], b"more", &whole].concat());
                assert_eq!(difference(&picture, &image::load(&behind).unwrap()), 0.0);
                unreadable(&write(folder.path(), "cut", &whole[..whole.len() - 1]));
            }
        }
    }
}

/// A progressive picture of several scans, whichever of them is the last to be there.
#[test]
fn cut_short_progressive() {
    let folder = folder();
    let whole = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/expected/progressive.jpg")).unwrap();
    drop(image::load(write(folder.path(), "whole.jpg", &whole)).unwrap());
    for length in (whole.len() / 3..whole.len()).step_by(7) {
        unreadable(&write(folder.path(), "cut.jpg", &whole[..length]));
    }
}

/// A PNG's beginning that claims a size, with a few bytes of pixels behind it.
fn claiming(width: u32, height: u32, depth: u8, colour: u8) -> Vec<u8> {
    fn chunk(png: &mut Vec<u8>, kind: &[u8; 4], data: &[u8]) {
        png.extend((data.len() as u32).to_be_bytes());
        let body = [kind.as_slice(), data].concat();
        let mut crc = !0u32;
        for byte in &body {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
            }
        }
        png.extend(body);
        png.extend((!crc).to_be_bytes());
    }
    let mut png = b"\x89PNG\r\n\x1a\n".to_vec();
    let header = [width.to_be_bytes().as_slice(), &height.to_be_bytes(), &[depth, colour, 0, 0, 0]].concat();
    chunk(&mut png, b"IHDR", &header);
    chunk(&mut png, b"IDAT", &[0x78, 0x9c, 0x63, 0x00, 0x00]);
    chunk(&mut png, b"IEND", &[]);
    png
}

#[test]
fn a_header_that_claims_too_much_is_refused_at_once() {
    tch::set_num_threads(1);
    let folder = folder();
    let begin = std::time::Instant::now();
    for (width, height) in [(2_000_000_000, 2_000_000_000), (100_000, 100_000), (40_000, 10), (10, 40_000), (20_000, 20_000)] {
        let message = unreadable(&write(folder.path(), "huge.png", &claiming(width, height, 8, 2)));
        assert!(message.contains("too large") || message.contains("limit"), "{message}");
    }
    // Sizes that are allowed, but the pixels are missing.
    for (width, height, depth, colour) in [(16_384, 16_384, 16, 6), (30_000, 8_000, 8, 2), (5, 5, 8, 2)] {
        // Whatever is wrong with it, a large one may be more than the machine has left.
        match image::load(write(folder.path(), "hollow.png", &claiming(width, height, depth, colour))).unwrap_err() {
            Error::Memory { what, .. } => assert!(what.contains("hollow.png") && width > 5, "{what}"),
            error => assert!(matches!(error, Error::Image { .. }) && error.to_string().contains("hollow.png"), "{error:?}"),
        }
    }
    for (width, height) in [(0, 5), (5, 0)] {
        unreadable(&write(folder.path(), "nothing.png", &claiming(width, height, 8, 2)));
    }
    // Nobody decodes, or writes, gigabytes for a file of a hundred bytes.
    assert!(begin.elapsed().as_secs() < 30, "{:?}", begin.elapsed());
}

#[test]
fn missing_files_and_folders_are_named() {
    tch::set_num_threads(1);
    let folder = folder();
    let missing = folder.path().join("missing.png");
    let error = image::load(&missing).unwrap_err();
    assert!(matches!(&error, Error::Io { path, .. } if *path == missing), "{error:?}");
    assert!(error.to_string().contains("missing.png"));
    assert!(unreadable(folder.path()).contains("is a folder"));
    let nowhere = folder.path().join("nowhere/a.png");
    let error = image::save(&soft(4, 4), &nowhere).unwrap_err();
    assert!(matches!(&error, Error::Io { path, .. } if *path == nowhere), "{error:?}");
    assert!(error.to_string().contains("there is no folder"), "{error}");
    let error = image::check_writable(&nowhere).unwrap_err();
    assert!(error.to_string().contains("nowhere") && error.to_string().contains("does not exist"), "{error}");
    assert!(names(folder.path()).is_empty(), "no folder is made, no file left");
}

#[test]
fn other_extensions_are_refused_before_anything_is_written() {
    tch::set_num_threads(1);
    let folder = folder();
    for name in ["a", "a.gif", "a.webp", "a.png.txt", ".png", "a."] {
        let path = folder.path().join(name);
        assert!(matches!(image::save(&soft(4, 4), &path), Err(Error::Image { .. })), "{name}");
        assert!(matches!(image::check_writable(&path), Err(Error::Image { .. })), "{name}");
    }
    for empty in ["", "/", ".."] {
        assert!(image::save(&soft(4, 4), empty).is_err() && image::check_writable(empty).is_err());
    }
    assert!(names(folder.path()).is_empty());
    for name in ["a.png", "a.jpg", "a.JPEG"] {
        image::check_writable(folder.path().join(name)).unwrap();
    }
    assert!(names(folder.path()).is_empty(), "looking writes nothing");
}

/// Whoever looks while others write finds one of their pictures, never a part of one.
#[test]
fn threads_that_save_under_one_name_do_not_meet() {
    tch::set_num_threads(1);
    let folder = folder();
    let path = folder.path().join("race.png");
    let sides = [40, 90, 160];
    image::save(&chequered(sides[0], sides[0]), &path).unwrap();
    std::thread::scope(|scope| {
        let writers = sides.map(|side| {
            let path = &path;
            scope.spawn(move || {
                let picture = chequered(side, side);
                (0..30).for_each(|_| image::save(&picture, path).unwrap());
            })
        });
        while writers.iter().any(|writer| !writer.is_finished()) {
            let (height, width) = image::size(&image::load(&path).unwrap()).unwrap();
            assert!(height == width && sides.contains(&height), "{width}x{height}");
        }
    });
    assert_eq!(names(folder.path()), ["race.png"]);
    // As long as names may be.
    let name = format!("{}.png", "n".repeat(251));
    image::save(&soft(4, 4), folder.path().join(&name)).unwrap();
    assert_eq!(names(folder.path()), [name, "race.png".into()]);
}

/// Single ones become black, see above; a picture of nothing else is a failure that nobody should take for one.
#[test]
fn a_picture_of_nan_is_not_saved() {
    let folder = folder();
    let path = folder.path().join("a.png");
    let error = image::save(&Tensor::full([1, 3, 4, 4], f64::NAN, (Kind::Float, Device::Cpu)), &path).unwrap_err();
    assert!(matches!(error, Error::Argument { .. }) && error.to_string().contains("NaN"), "{error}");
    assert!(names(folder.path()).is_empty());
}

/// A pipe has no end until somebody writes to it.
#[cfg(unix)]
#[test]
fn a_pipe_is_not_waited_for() {
    let folder = folder();
    let pipe = folder.path().join("pipe.png");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    assert!(unreadable(&pipe).contains("not a regular file"));
}

#[test]
fn an_older_file_stays_when_saving_fails() {
    tch::set_num_threads(1);
    let folder = folder();
    let path = folder.path().join("a.png");
    image::save(&soft(4, 4), &path).unwrap();
    let before = std::fs::read(&path).unwrap();
    // What is no picture, and one that JPEG cannot hold (65535 pixels a side at most).
    assert!(image::save(&Tensor::zeros([2, 3, 4, 4], (Kind::Float, Device::Cpu)), &path).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), before);
    let jpeg = write(folder.path(), "a.jpg", b"older");
    assert!(matches!(image::save(&Tensor::zeros([1, 3, 1, 70_000], (Kind::Float, Device::Cpu)), &jpeg), Err(Error::Image { .. })));
    assert_eq!(std::fs::read(&jpeg).unwrap(), b"older");
    // A folder where the file should be: the last step, the renaming, fails.
    let occupied = folder.path().join("folder.png");
    std::fs::create_dir(&occupied).unwrap();
    assert!(matches!(image::save(&soft(4, 4), &occupied), Err(Error::Io { .. })));
    assert!(image::check_writable(&occupied).unwrap_err().to_string().contains("is a folder"));
    assert_eq!(names(folder.path()), ["a.jpg", "a.png", "folder.png"], "no temporary file is left");
    // And a sound picture replaces the older one.
    image::save(&chequered(4, 4), &path).unwrap();
    assert_ne!(std::fs::read(&path).unwrap(), before);
    assert_eq!(names(folder.path()), ["a.jpg", "a.png", "folder.png"]);
}
