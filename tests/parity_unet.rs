//! The UNet against diffusers: prediction, gradient by the latents, and what the recorded layers hold.
#![cfg(feature = "stable-diffusion")]
#![allow(clippy::disallowed_methods)] // A test may panic.

mod common;

use attention_distillation::stable_diffusion::{Condition, UNet};
use attention_distillation::{
    AdLoss, ContentLoss, Denoiser, FeatureExtractor, FeatureRecorder, Features, Loss, PlainAttention, References, Style, TotalLoss,
};
use common::networks::{condition, unet};
use common::{Comparison, Expected, ACTIVATIONS};
use tch::{Kind, Tensor};

/// One pass, forth and back.
fn case(unet: &UNet, condition: &Condition, expected: &Expected, name: &str, comparison: &mut Comparison) {
    let get = |part: &str| expected.get(&format!("{name}.{part}"));
    let timestep = get("timestep").double_value(&[]);
    let latents = get("latents").detach().set_requires_grad(true);

    let output = unet.forward(&latents, timestep, condition, &mut PlainAttention).unwrap();
    comparison.close(format!("{name} output"), &output, get("output"), ACTIVATIONS);
    let gradient = Tensor::run_backward(&[(output * get("weight")).sum(Kind::Float)], &[&latents], false, false).swap_remove(0);
    comparison.close(format!("{name} gradient"), &gradient, get("gradient"), ACTIVATIONS);

    let prefix = format!("{name}.layer");
    let mut layers: Vec<usize> = expected.names(&prefix).filter_map(|rest| rest.strip_suffix(".query")?.parse().ok()).collect();
    layers.sort_unstable();
    let (first, last) = (layers[0], layers[layers.len() - 1]);
    let features = Features::extract(unet, get("latents"), timestep, condition, first..last + 1).unwrap();
    assert_eq!(features.len(), layers.len());
    for layer in features.layers() {
        let index = layer.site.index;
        for (part, actual) in [("query", &layer.query), ("key", &layer.key), ("value", &layer.value), ("output", layer.output().unwrap())] {
            comparison.close(format!("{name} layer {index} {part}"), actual, get(&format!("layer{index}.{part}")), ACTIVATIONS);
        }
    }
    // The layers in the fixture are the network's last: there must not be one more.
    assert!(Features::extract(unet, get("latents"), timestep, condition, first..last + 2).is_err());
}

fn network(folder: &str, file: &str, cases: &[&str]) {
    let (unet, expected) = (unet(folder), Expected::read(file));
    let condition = condition(&expected, "");
    let mut comparison = Comparison::default();
    for name in cases {
        case(&unet, &condition, &expected, name, &mut comparison);
    }
    comparison.finish();
}

/// Also latents that do not halve evenly, where each level of the way up takes the size of the way down.
#[test]
fn like_stable_diffusion_15() {
    network("sd15/unet", "unet_sd15", &["even", "uneven", "odd"]);
}

/// Lists in the config, linear projections, pooled text and time ids; f16 on disk.
#[test]
fn like_stable_diffusion_xl() {
    network("sdxl/unet", "unet_sdxl", &["even", "odd"]);
}

/// Two shards in bf16; other channel counts in and out, and the rarer settings.
#[test]
fn sharded() {
    network("unet_sharded", "unet_sharded", &["even"]);
}

/// Looking on must not change what is seen.
#[test]
fn recording_changes_no_bit() {
    let (unet, expected) = (unet("sd15/unet"), Expected::read("unet_sd15"));
    let condition = condition(&expected, "");
    let latents = expected.get("odd.latents");
    let plain = unet.forward(latents, 333.5, &condition, &mut PlainAttention).unwrap();
    // One layer more than there is, so that the pass runs to its end.
    let mut recorder = FeatureRecorder::new(0..17);
    let recorded = unet.forward(latents, 333.5, &condition, &mut recorder).unwrap();
    assert!(plain.equal(&recorded));
}

fn losses(folder: &str, file: &str) {
    let (unet, expected) = (unet(folder), Expected::read(file));
    let network_layers = if folder == "sdxl/unet" { 28 } else { 16 };
    let extractor = FeatureExtractor::new(&unet, condition(&expected, "in."), network_layers - 6..network_layers);
    let input = |name: &str| expected.get(&format!("in.{name}")).shallow_clone();
    let timestep = expected.number("in.timestep");

    let one = || References::style(input("style"));
    let two = || References::styles([Style::new(input("style")), Style::new(input("style2"))]);
    let total = || TotalLoss::default().plus(1.0, AdLoss::default()).plus(0.25, ContentLoss);
    let cases: [(&str, References, Box<dyn Loss>); 5] = [
        ("ad_one", one(), Box::new(AdLoss::default())),
        ("ad_two", two(), Box::new(AdLoss::default())),
        ("ad_sharp", one(), Box::new(AdLoss::default().with_sharpness(1.5))),
        ("content", one().with_content(input("content")), Box::new(ContentLoss)),
        ("total", two().with_content(input("content")), Box::new(total())),
    ];
    let mut comparison = Comparison::default();
    for (name, references, loss) in cases {
        let references = extractor.references(&references, timestep).unwrap();
        let (value, gradient) = extractor.gradient(&input("latents"), timestep, &references, loss.as_ref()).unwrap();
        comparison.close(format!("{name} loss"), &value, expected.get(&format!("{name}.loss")), ACTIVATIONS);
        comparison.close(format!("{name} gradient"), &gradient, expected.get(&format!("{name}.gradient")), ACTIVATIONS);
    }
    comparison.finish();
}

/// Two pictures at once; styles of other sizes than theirs.
#[test]
fn losses_and_gradients() {
    losses("sd15/unet", "losses_sd15");
}

#[test]
fn losses_and_gradients_xl() {
    losses("sdxl/unet", "losses_sdxl");
}
