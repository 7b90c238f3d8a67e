//! Regions, soft maps and weights of styles, filled layouts, and whole runs with them, against `tools/reference/textures.py`.
#![cfg(feature = "stable-diffusion")]
#![allow(clippy::disallowed_methods, clippy::unwrap_used)] // A test may panic.

mod common;

use attention_distillation::stable_diffusion::StableDiffusion;
use attention_distillation::{fill, AdLoss, Distiller, FeatureExtractor, GuidedSampler, LabelMap, Noise, Progress, References, Result, Style};
use common::networks::{condition, unet};
use common::{fixture, relative, Comparison, Expected, ACTIVATIONS};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

/// Of single losses, relative; without the mask, or with the bias of other labels, they are off by half a percent and more.
const LOSS: f64 = 1e-3;

/// Of gradients, relative to the largest: where an L1 norm is near 0, roundings decide its sign.
const GRADIENT: f64 = 1e-4;

/// Of pictures, on average. Rounding errors move these by 0.02 at most.
const GREY_LEVELS: f64 = 0.1;

fn cases() -> Vec<Value> {
    serde_json::from_str(&std::fs::read_to_string(fixture("expected/textures.json")).unwrap()).unwrap()
}

fn case(name: &str) -> Value {
    cases().into_iter().find(|case| case["name"] == name).unwrap()
}

/// The labels of a soft map are 0, 1, 2.
fn map(name: &str, expected: &Expected) -> LabelMap {
    let tensor = expected.get(&format!("in.{name}"));
    match tensor.dim() {
        3 => LabelMap::soft(&tensor.unsqueeze(0)).unwrap(),
        _ => LabelMap::new(tensor).unwrap(),
    }
}

#[test]
fn masked_losses() {
    let (expected, network) = (Expected::read("masked_loss"), unet("sd15/unet"));
    let extractor =
        FeatureExtractor::new(&network, condition(&expected, "in."), network.self_attention_layers() - 6..network.self_attention_layers());
    let timestep = expected.number("in.timestep");
    let latents = |name: &Value| expected.get(&format!("in.{}", name.as_str().unwrap()));
    let mut comparison = Comparison::default();
    let cases = case("masked_loss");
    let cases = cases["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 9);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let target = case["target"].as_str();
        let style = |style: &Value| {
            let mut made = Style::new(latents(&style["latents"]).shallow_clone());
            let labels = style["map"].as_str().map(|name| map(name, &expected));
            let weights: Vec<Vec<f64>> = serde_json::from_value(style["weights"].clone()).unwrap_or_default();
            match (&labels, target) {
                (None, None) => made = made.with_weight(weights[0][0]),
                (None, Some(_)) => made = made.with_area_weights((0..).zip(&weights).map(|(label, row)| (label, row[0]))),
                (Some(_), _) if !weights.is_empty() => {
                    let pairs = (0..).zip(&weights).flat_map(|(l, row)| (0..).zip(row).map(move |(m, &weight)| (l, m, weight)));
                    made = made.with_matches(pairs);
                }
                _ => {}
            }
            made.labels = labels;
            made
        };
        let mut references = References::styles(case["styles"].as_array().unwrap().iter().map(style));
        references.labels = target.map(|name| map(name, &expected));
        references.allow_missing_labels = case["fallback"].as_bool().unwrap_or(false);
        let features = extractor.references(&references, timestep).unwrap();
        let (loss, gradient) = extractor.gradient(latents(&case["latents"]), timestep, &features, &AdLoss::default()).unwrap();
        comparison.close(format!("{name}.loss"), &loss, expected.get(&format!("{name}.loss")), LOSS);
        comparison.close(format!("{name}.gradient"), &gradient, expected.get(&format!("{name}.gradient")), GRADIENT);
    }
    comparison.finish();
}

#[test]
fn filled_layout() {
    let expected = Expected::read("texture_fill");
    let labels = |name| LabelMap::new(expected.get(name)).unwrap();
    let seed = case("texture_fill")["seed"].as_u64().unwrap();
    let filled = fill(expected.get("source"), &labels("source.labels"), &labels("labels"), seed).unwrap();
    assert!(filled.equal(expected.get("filled")));
    assert!(!fill(expected.get("source"), &labels("source.labels"), &labels("labels"), seed + 1).unwrap().equal(&filled));
    // Painted in greys it is the same map.
    let painted = |name| LabelMap::from_picture(&(expected.get(name).to_kind(Kind::Float) / 255.0).expand([1, 3, -1, -1], false)).unwrap();
    assert!(fill(expected.get("source"), &painted("source.labels"), &labels("labels"), seed).unwrap().equal(&filled));
    assert!(fill(expected.get("source"), &painted("source.labels"), &painted("labels"), seed).unwrap().equal(&filled));
}

/// All steps, and their losses.
fn losses(mut advance: impl FnMut() -> Result<Option<Progress>>) -> Tensor {
    let mut losses = vec![];
    while let Some(progress) = advance().unwrap() {
        losses.push(progress.loss().unwrap().unwrap_or(f64::NAN));
    }
    Tensor::from_slice(&losses)
}

fn texture(name: &str) {
    let (case, expected) = (case(name), Expected::read(name));
    let number = |key: &str| case[key].as_f64().unwrap();
    let mut comparison = Comparison::default();
    let model = StableDiffusion::open(fixture("sd15"), Device::Cpu, Kind::Float).unwrap();
    let size = (case["size"][1].as_i64().unwrap(), case["size"][0].as_i64().unwrap());
    let mut encode = |picture: &Tensor, latents: &str| {
        let encoded = model.encode(picture).unwrap();
        comparison.close(format!("{latents} encoded"), &encoded, expected.get(latents), ACTIVATIONS);
        encoded
    };
    let labels = |name| LabelMap::new(expected.get(name)).unwrap();
    let style = Style::new(encode(expected.get("style0"), "style0.latents")).with_labels(labels("style0.labels"));
    let mut references = References::styles([style]).with_labels(labels("labels"));
    let seed = case["seed"].as_u64().unwrap();
    if case["content"] == "fill" {
        let filled = fill(expected.get("style0"), &labels("style0.labels"), &labels("labels"), seed).unwrap();
        assert!(filled.equal(expected.get("fill")));
        references = references.with_content(encode(&filled, "fill.latents"));
    }
    let extractor = model.extractor(size).unwrap();
    let (steps, iterations) = (number("steps") as usize, number("iterations") as usize);
    let (found, latents) = if case["task"] == "sample" {
        let mut noise = Noise::seeded(seed);
        let start = model.noise(1, size, &mut noise).unwrap();
        comparison.close("start", &start, expected.get("start"), 1e-5);
        let guidance = model.guidance(&[""], None, 1.0, size).unwrap();
        let mut run = GuidedSampler::new(extractor, model.ddim(steps).unwrap(), guidance, references, start, noise);
        run.iterations = iterations;
        run.optimizer.config.learning_rate = number("learning_rate");
        (losses(|| run.advance()), run.latents)
    } else {
        let start = expected.get("start").copy();
        let mut run = match references.content {
            // The start is the content's latents to the last bit: there the content loss has its corner.
            Some(_) => Distiller::style_transfer(extractor, model.timesteps(steps).unwrap(), references, number("content_weight")).unwrap(),
            None => Distiller::new(extractor, model.timesteps(steps).unwrap(), references, start),
        };
        run.iterations = iterations;
        run.optimizer.config.learning_rate = number("learning_rate");
        (losses(|| run.advance()), run.latents)
    };
    let wanted = expected.get("losses").to_kind(Kind::Double);
    assert!(found.isnan().equal(&wanted.isnan()), "{name}: descents in other steps: {found}");
    comparison.close("losses", &found.nan_to_num(0.0, None, None), &wanted.nan_to_num(0.0, None, None), LOSS);
    println!("final latents off by {:.2e}", relative(&latents, expected.get("latents")));
    let picture = expected.get("picture");
    let levels = (model.decode(&latents).unwrap() - picture).abs().mean(Kind::Float).double_value(&[]) * 255.0;
    println!("{name}: off by {levels:.4} grey levels on average");
    if levels.is_nan() || levels > GREY_LEVELS {
        comparison.fail(format!("{name}: off by {levels:.3} grey levels on average, {GREY_LEVELS} are allowed"));
    }
    comparison.finish();
}

/// By optimisation, from noise.
#[test]
fn masked_texture() {
    texture("texture_masked");
}

/// By sampling; the style is of another size.
#[test]
fn masked_texture_by_sampling() {
    texture("texture_masked_sample");
}

/// From the filled layout, which is the content as well.
#[test]
fn controlled_texture() {
    texture("texture_controlled");
}
