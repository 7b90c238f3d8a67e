//! Colours of one picture for another.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, missing_docs)]

use attention_distillation::image::{match_chroma, match_colours};
use attention_distillation::Error;
use tch::{Device, Kind, Tensor};

/// Colours of no particular kind around 0.5, along all axes.
fn picture(seed: f64, batch: i64, (height, width): (i64, i64)) -> Tensor {
    tch::set_num_threads(1);
    let waves = (Tensor::arange(batch * 3 * height * width, (Kind::Double, Device::Cpu)).square() * (0.01 * seed)).sin();
    let mixer =
        (Tensor::arange(9, (Kind::Double, Device::Cpu)) * (2.1 * seed) + seed).sin().view([3, 3]) + Tensor::eye(3, (Kind::Double, Device::Cpu));
    (mixer.matmul(&waves.view([batch, 3, -1])) * 0.08 + 0.5).to_kind(Kind::Float).view([batch, 3, height, width])
}

fn mean(picture: &Tensor) -> Tensor {
    picture.to_kind(Kind::Double).mean_dim(Some([2, 3].as_slice()), true, Kind::Double)
}

fn covariance(picture: &Tensor) -> Tensor {
    let around = (picture.to_kind(Kind::Double) - mean(picture)).flatten(2, -1);
    around.matmul(&around.transpose(1, 2)) / around.size()[2] as f64
}

fn off(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a - b).abs().max().double_value(&[])
}

fn luminance(picture: &Tensor) -> Tensor {
    (picture * Tensor::from_slice(&[0.299f32, 0.587, 0.114]).view([1, 3, 1, 1])).sum_dim_intlist(1, true, Kind::Float)
}

/// Of all linear maps that reach mean and covariance the one that moves colours the least is symmetric and positive: who was moved by such
/// a one is found again.
#[test]
fn the_least_map_is_found_again() {
    let a = picture(1.0, 1, (20, 30));
    let map = Tensor::from_slice(&[1.5f32, 0.3, -0.2, 0.3, 0.7, 0.1, -0.2, 0.1, 1.1]).view([3, 3]);
    let moved = (map.matmul(&(&a - 0.5).flatten(2, -1)) * 0.6 + 0.45).view([1, 3, 20, 30]);
    assert!(moved.min().double_value(&[]) > 0.0 && moved.max().double_value(&[]) < 1.0, "nothing is cut off here");
    assert!(off(&moved, &a) > 0.1);
    assert!(off(&match_colours(&a, &moved).unwrap(), &moved) < 1e-4);
    // Beside the narrowest axis of `moved` the 1e-6 on the variances shows.
    assert!(off(&match_colours(&moved, &a).unwrap(), &a) < 1e-3);
    // Where colours lie does not matter, nor how many pixels there are.
    let elsewhere = Tensor::cat(&[&moved, &moved], 2).transpose(2, 3);
    assert!(off(&match_colours(&a, &elsewhere).unwrap(), &moved) < 1e-4);
}

#[test]
fn mean_and_covariance_are_reached() {
    let (a, b) = (picture(1.0, 1, (20, 30)), picture(1.7, 1, (16, 9)) * 0.4 + 0.3);
    assert!(off(&covariance(&a), &covariance(&b)) > 1e-3, "the two are nothing alike");
    let found = match_colours(&a, &b).unwrap();
    assert_eq!(found.size(), a.size());
    let (means, covariances) = (off(&mean(&found), &mean(&b)), off(&covariance(&found), &covariance(&b)));
    assert!(means < 1e-5 && covariances < 2e-5, "{means} {covariances}");
}

#[test]
fn a_picture_has_its_own_colours() {
    let a = picture(1.3, 2, (12, 10));
    assert!(off(&match_colours(&a, &a).unwrap(), &a) < 1e-5);
    assert!(off(&match_chroma(&a, &a).unwrap(), &a) < 1e-6);
}

/// One for all, or one for each.
#[test]
fn batches() {
    let (a, b) = (picture(1.0, 2, (12, 10)), picture(1.7, 2, (12, 10)));
    for change in [match_colours, match_chroma] {
        let each = change(&a, &b).unwrap();
        let one = change(&a, &b.narrow(0, 1, 1)).unwrap();
        for i in 0..2 {
            let single = change(&a.narrow(0, i, 1), &b.narrow(0, i, 1)).unwrap();
            assert!(off(&each.narrow(0, i, 1), &single) < 1e-5);
        }
        assert!(off(&one.narrow(0, 1, 1), &each.narrow(0, 1, 1)) < 1e-5);
    }
}

/// Noise of a grey picture is not spread out to colours; from a picture of one colour, and to one, nothing is divided by 0.
#[test]
fn grey_and_flat_pictures() {
    let colourful = picture(1.7, 1, (24, 24));
    let levels = picture(1.0, 1, (24, 24)).narrow(1, 0, 1);
    let noise = (picture(2.9, 1, (24, 24)) - 0.5) * 0.01;
    let grey = levels.expand([1, 3, -1, -1], false) + &noise;
    let found = match_colours(&grey, &colourful).unwrap();
    let chroma = |picture: &Tensor| (picture - luminance(picture)).std(false).double_value(&[]);
    assert!(chroma(&colourful) > 0.05 && chroma(&grey) < 2e-3, "{} {}", chroma(&colourful), chroma(&grey));
    // The axis of grey may turn to that of the other's colours; what stands across it grows by four at most.
    let across = |picture: &Tensor| covariance(picture).linalg_eigvalsh("L").get(0).get(1).double_value(&[]).sqrt();
    assert!(across(&found) < 4.0 * across(&grey) && across(&colourful) > 8.0 * across(&grey), "{} {}", across(&found), across(&grey));
    let flat = Tensor::full([1, 3, 8, 8], 0.25, (Kind::Float, Device::Cpu));
    let found = match_colours(&flat, &colourful).unwrap();
    assert!(off(&found, &mean(&colourful).to_kind(Kind::Float).expand_as(&found)) < 1e-5);
    let found = match_colours(&colourful, &flat).unwrap();
    assert!(off(&found, &flat.narrow(2, 0, 1).narrow(3, 0, 1).expand_as(&found)) < 0.02, "{}", found);
}

#[test]
fn luminance_of_one_and_chroma_of_the_other() {
    let (a, b) = (picture(1.0, 1, (12, 10)) * 0.5 + 0.25, picture(1.7, 1, (12, 10)) * 0.5 + 0.25);
    let found = match_chroma(&a, &b).unwrap();
    assert!(off(&luminance(&found), &luminance(&a)) < 1e-6);
    assert!(off(&(&found - luminance(&found)), &(&b - luminance(&b))) < 1e-6);
    // What is beyond black and white is cut off.
    let white = Tensor::ones([1, 3, 12, 10], (Kind::Float, Device::Cpu));
    let found = match_chroma(&white, &b).unwrap();
    assert_eq!(found.max().double_value(&[]), 1.0);
    assert!(found.min().double_value(&[]) > 0.5);
}

#[test]
fn what_does_not_fit_is_refused() {
    let a = picture(1.0, 2, (12, 10));
    for change in [match_colours, match_chroma] {
        for bad in [a.narrow(1, 0, 2), a.get(0), picture(1.0, 3, (12, 10)), a.narrow(3, 0, 0)] {
            let error = change(&a, &bad).unwrap_err();
            assert!(matches!(error, Error::Shape { name: "colours", .. }), "{error}");
        }
        let error = change(&a.get(0), &a).unwrap_err();
        assert!(matches!(error, Error::Shape { name: "picture", .. }), "{error}");
    }
    assert!(matches!(match_chroma(&a, &picture(1.0, 1, (10, 12))), Err(Error::Shape { name: "colours", .. })));
    for value in [f64::NAN, f64::INFINITY] {
        let bad = a.copy();
        let _ = bad.get(1).get(2).get(3).get(4).fill_(value);
        for (outcome, name) in [(match_colours(&a, &bad), "colours"), (match_colours(&bad, &a), "picture")] {
            assert!(matches!(&outcome, Err(Error::Argument { argument, .. }) if *argument == name), "{outcome:?}");
        }
    }
}
