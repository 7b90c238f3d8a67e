//! Whole runs against `tools/reference`: from pictures to the picture.
#![cfg(feature = "stable-diffusion")]
#![allow(clippy::disallowed_methods)] // A test may panic.

mod common;

use attention_distillation::stable_diffusion::StableDiffusion;
use attention_distillation::{image, Adam, AdamConfig, Distiller, References, Style};
use common::{fixture, relative, Comparison, Expected, ACTIVATIONS};
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// The crate promises 2 grey levels of 255 on average. Adam's first step is about as large as the learning rate wherever the
/// gradient is not exactly 0, however small it is: where it is rounding noise its sign, and with it a whole step, is a
/// matter of chance, and L1 losses have such places by nature. So single latents part, and the picture is what counts.
/// Noise of 1e-6 on all inputs moves these pictures by 0.04 levels at most, other instruction sets of the processor by 0.07, but
/// a content weight or a learning rate that is off by a few tenths moves some by less than 2: the tests are stricter than
/// the promise.
///
/// One thing must be exact: the run starts at the very latents that the content loss looks at, where it and its gradient are 0.
/// Were the start off by a millionth, the signs of all its gradients would be drawn by lot (10 levels).
const GREY_LEVELS: f64 = 0.25;

/// Relative to the largest; the same noise makes 2e-4, the same slips some 1e-2.
const LOSSES: f64 = 1e-3;

fn transfer(model: &Path, name: &str) {
    let expected = Expected::read(&format!("transfer_{name}"));
    let model = StableDiffusion::open(model, Device::Cpu, Kind::Float).unwrap();
    let mut comparison = Comparison::default();
    let mut encode = |picture: &str| {
        let latents = model.encode(expected.get(picture)).unwrap();
        comparison.close(format!("{picture} encoded"), &latents, expected.get(&format!("{picture}.latents")), ACTIVATIONS);
        latents
    };
    let styles: Vec<Tensor> = ["style0", "style1"].into_iter().filter(|style| expected.find(style).is_some()).map(&mut encode).collect();
    let mut references = References::styles(styles.into_iter().map(Style::new));
    let picture = expected.get("picture");
    let extractor = model.extractor(image::size(picture).unwrap()).unwrap();
    let timesteps = model.timesteps(expected.number("steps") as usize).unwrap();
    let mut run = if expected.find("content").is_some() {
        references = references.with_content(encode("content"));
        Distiller::style_transfer(extractor, timesteps, references, expected.number("content_weight")).unwrap()
    } else {
        Distiller::new(extractor, timesteps, references, expected.get("start").copy())
    };
    if expected.find("adain").is_some() {
        run.adain = true;
        // Where no channel becomes four times as wide, as here, the start is what plain AdaIN makes of it.
        comparison.close("start", &run.references.adain(&run.latents).unwrap(), expected.get("start"), ACTIVATIONS);
        comparison.close("content", &run.targets().unwrap().content.unwrap(), expected.get("start"), ACTIVATIONS);
    }
    if expected.find("smoothing").is_some() {
        run.references.smoothing = expected.number("smoothing");
    }
    run.iterations = expected.number("iterations") as usize;
    run.optimizer = Adam::new(AdamConfig::with_learning_rate(expected.number("learning_rate")));

    let mut losses = vec![];
    while let Some(progress) = run.advance().unwrap() {
        losses.push(progress.loss().unwrap().unwrap());
    }
    let losses = Tensor::from_slice(&losses);
    comparison.close("losses", &losses, expected.get("losses"), LOSSES);
    println!("final latents off by {:.2e}", relative(&run.latents, expected.get("latents")));
    let ours = model.decode(&run.latents).unwrap();
    assert_eq!(ours.size(), picture.size());
    let levels = (ours - picture).abs().mean(Kind::Float).double_value(&[]) * 255.0;
    println!("{name}: off by {levels:.4} grey levels on average");
    if levels.is_nan() || levels > GREY_LEVELS {
        comparison.fail(format!("{name}: off by {levels:.3} grey levels on average, {GREY_LEVELS} are allowed"));
    }
    comparison.finish();
}

#[test]
fn one_style() {
    transfer(&fixture("sd15"), "one");
}

/// Of different sizes.
#[test]
fn two_styles() {
    transfer(&fixture("sd15"), "two");
}

/// From, and towards, the content with the mean and deviation of both styles.
#[test]
fn from_the_styles_statistics() {
    transfer(&fixture("sd15"), "adain");
}

/// Of queries, by the content.
#[test]
fn smoothed() {
    transfer(&fixture("sd15"), "smoothing");
}

/// Two steps of Adam per timestep, at another learning rate.
#[test]
fn several_iterations() {
    transfer(&fixture("sd15"), "iterations");
}

/// Two pictures from noise, no content.
#[test]
fn texture_from_noise() {
    transfer(&fixture("sd15"), "texture");
}

/// Two text encoders, pooled text and time ids in the null condition.
#[test]
fn like_stable_diffusion_xl() {
    transfer(&fixture("sdxl"), "sdxl");
}

/// Trained weights, and a folder without text encoder.
#[test]
fn bundled_model() {
    transfer(&fixture("../../assets/mini"), "bundled");
}
