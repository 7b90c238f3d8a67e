//! Edges of pictures, as ControlNets take them.
#![cfg(feature = "stable-diffusion")]
#![allow(clippy::disallowed_methods)] // A test may panic.

use attention_distillation::{image, Error};
use std::path::PathBuf;
use tch::{Device, Kind, Tensor};

fn blank(shape: &[i64]) -> Tensor {
    tch::set_num_threads(1);
    Tensor::zeros(shape, (Kind::Float, Device::Cpu))
}

fn canny(picture: &Tensor) -> Tensor {
    image::canny(picture, image::CANNY_LOW, image::CANNY_HIGH).unwrap()
}

/// A white square on black has a thin white outline, and nothing else.
#[test]
fn the_outline_of_a_square() {
    let picture = blank(&[1, 3, 40, 48]);
    let _ = picture.narrow(2, 10, 20).narrow(3, 12, 24).fill_(1.0);
    let edges = canny(&picture);
    assert_eq!((edges.size(), edges.kind()), (picture.size(), Kind::Float));
    assert_eq!(edges.eq(0.0).logical_or(&edges.eq(1.0)).sum(Kind::Int64).int64_value(&[]), edges.numel() as i64);
    let red = edges.get(0).get(0);
    assert!(red.equal(&edges.get(0).get(1)) && red.equal(&edges.get(0).get(2)));
    let lit = red.sum(Kind::Float).double_value(&[]);
    // About the circumference of 88 pixels, which lies between two pixels that are equally steep: at most twice.
    assert!((60.0..=176.0).contains(&lit), "{lit}");
    let inside = red.narrow(0, 14, 12).narrow(1, 16, 16).sum(Kind::Float).double_value(&[]);
    let beyond = red.narrow(0, 0, 7).sum(Kind::Float).double_value(&[]);
    assert_eq!((inside, beyond), (0.0, 0.0));
}

#[test]
fn higher_thresholds_leave_less() {
    tch::set_num_threads(1);
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("assets/pictures/content_astronaut.png");
    let photo = image::resize(&image::load(file).unwrap(), (256, 256)).unwrap();
    let share = |low: f32, high: f32| image::canny(&photo, low, high).unwrap().mean(Kind::Float).double_value(&[]);
    let (all, usual, few) = (share(0.0, 0.0), share(image::CANNY_LOW, image::CANNY_HIGH), share(300.0, 400.0));
    assert!(all > 1.5 * usual && usual > 2.0 * few && few > 0.0, "{all} {usual} {few}");
    assert!((0.03..0.25).contains(&usual), "{usual}");
}

#[test]
fn the_smallest_pictures() {
    for (height, width) in [(1, 1), (1, 9), (9, 1), (2, 2), (3, 3)] {
        assert_eq!(canny(&blank(&[1, 3, height, width])).size(), [1, 3, height, width]);
    }
}

#[test]
fn what_is_refused() {
    for shape in [[2, 3, 8, 8], [1, 1, 8, 8], [1, 3, 0, 8]] {
        assert!(matches!(image::canny(&blank(&shape), 1.0, 2.0), Err(Error::Shape { .. })), "{shape:?}");
    }
    for (low, high) in [(2.0, 1.0), (-1.0, 1.0), (f32::NAN, 1.0), (1.0, f32::NAN), (1.0, f32::INFINITY)] {
        let outcome = image::canny(&blank(&[1, 3, 8, 8]), low, high);
        assert!(matches!(outcome, Err(Error::Argument { argument: "thresholds", .. })), "{low} {high}");
    }
}
