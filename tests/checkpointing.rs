//! Gradient checkpointing gives the gradients of the plain backward pass.
#![cfg(feature = "stable-diffusion")]
#![allow(clippy::disallowed_methods, clippy::unwrap_used, missing_docs)]

mod common;

use attention_distillation::{
    AdLoss, ContentLoss, Denoiser, Error, FeatureExtractor, Features, GuidedSampler, Loss, Noise, References, Result, StableDiffusion, Style,
    TotalLoss,
};
use common::{fixture, relative};
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// The same operations on the same numbers; only sums of two or three gradients may be taken in another order, some units
/// in the last place.
const ROUNDING: f64 = 1e-5;

fn open(folder: &str, kind: Kind) -> StableDiffusion {
    StableDiffusion::open(fixture(folder), Device::Cpu, kind).unwrap()
}

fn random(seed: u64, shape: &[i64]) -> Tensor {
    Noise::seeded(seed).draw(&Tensor::zeros(shape, (Kind::Float, Device::Cpu))).unwrap()
}

fn loss() -> TotalLoss {
    TotalLoss::default().plus(1.0, AdLoss::default()).plus(0.25, ContentLoss)
}

/// Loss and gradient, plain and checkpointed.
fn both(model: &mut StableDiffusion, shape: &[i64], layers: Range<usize>, loss: &dyn Loss) -> [(Tensor, Tensor); 2] {
    let (channels, height, width) = (shape[1], shape[2], shape[3]);
    let size = (8 * height, 8 * width);
    let latents = random(1, shape);
    [false, true].map(|on| {
        model.set_gradient_checkpointing(on);
        let extractor = FeatureExtractor::new(&*model, model.prompts(&[""], size).unwrap(), layers.clone());
        let references = References::styles([Style::new(random(2, &[1, channels, 8, 12])), Style::new(random(3, &[1, channels, 6, 8]))])
            .with_content(random(4, &[1, channels, height, width]));
        let references = extractor.references(&references, 301.0).unwrap();
        extractor.gradient(&latents, 301.0, &references, loss).unwrap()
    })
}

#[test]
fn the_same_gradients() {
    for (folder, layers) in [("sd15", 16), ("sdxl", 28), ("../../assets/mini", 9)] {
        let mut model = open(folder, Kind::Float);
        let channels = model.unet().in_channels();
        // The last six; some of the middle, where the pass ends early; only the first; all.
        for layers in [layers - 6..layers, 2..5, 0..1, 0..layers] {
            for shape in [[1, channels, 8, 8], [2, channels, 9, 13]] {
                let [(plain, wanted), (value, gradient)] = both(&mut model, &shape, layers.clone(), &loss());
                assert_eq!((gradient.size(), gradient.kind()), (wanted.size(), Kind::Float));
                let (of_value, of_gradient) = (relative(&value, &plain), relative(&gradient, &wanted));
                assert!(of_value < 1e-6 && of_gradient < ROUNDING, "{folder} {layers:?} {shape:?}: loss {of_value:.1e}, gradient {of_gradient:.1e}");
            }
        }
    }
}

/// Half precisions round what is summed up in another order, f16's small gradients are scaled on both ways. Measured 1.6e-3 and 9.3e-3, where
/// either way is 2.4e-2 and 7.2e-2 from f32's; the last of the six layers left out makes .17.
#[test]
fn the_same_gradients_in_half_precisions() {
    for (kind, bound) in [(Kind::Half, 1e-2), (Kind::BFloat16, 5e-2)] {
        let [(_, wanted), (_, gradient)] = both(&mut open("sd15", kind), &[1, 4, 8, 8], 10..16, &loss());
        let off = f64::try_from((&gradient - &wanted).norm() / wanted.norm()).unwrap();
        assert!(off < bound, "{kind:?}: {off:.1e}");
    }
}

/// Looks at one tensor of one layer alone, so that other layers and tensors have no gradient.
struct Only(usize, fn(&attention_distillation::LayerFeatures) -> &Tensor);

impl Loss for Only {
    fn evaluate(&self, picture: &Features, _: &References<Features>) -> Result<Tensor> {
        let layer = picture.layers().nth(self.0).unwrap();
        Ok(self.1(layer).to_kind(Kind::Float).square().mean(Kind::Float))
    }
}

#[test]
fn a_loss_may_look_at_a_part_of_the_features() {
    let mut model = open("sd15", Kind::Float);
    let looks: [fn(&attention_distillation::LayerFeatures) -> &Tensor; 4] = [|l| &l.query, |l| &l.key, |l| &l.value, |l| l.output().unwrap()];
    for look in looks {
        for layer in [0, 3, 5] {
            let [(_, wanted), (_, gradient)] = both(&mut model, &[1, 4, 8, 8], 10..16, &Only(layer, look));
            assert!(relative(&gradient, &wanted) < ROUNDING, "layer {layer}");
        }
    }
}

/// Of nothing that the network computed.
struct Constant;

impl Loss for Constant {
    fn evaluate(&self, _: &Features, _: &References<Features>) -> Result<Tensor> {
        Ok(Tensor::from(1.0_f32))
    }
}

#[test]
fn the_same_errors() {
    let mut model = open("sd15", Kind::Float);
    model.set_gradient_checkpointing(true);
    let gradient = |layers: Range<usize>, latents: &Tensor, loss: &dyn Loss| {
        let extractor = FeatureExtractor::new(&model, model.prompts(&[""], (64, 64)).unwrap(), layers);
        extractor.gradient(latents, 1.0, &References::default(), loss).map(drop)
    };
    let latents = random(1, &[1, 4, 8, 8]);
    assert!(matches!(gradient(10..16, &latents, &Constant), Err(Error::Argument { argument: "loss", .. })));
    assert!(matches!(gradient(10..17, &latents, &Constant), Err(Error::MissingLayers { network: 16, .. })));
    assert!(matches!(gradient(3..3, &latents, &Constant), Err(Error::Argument { argument: "layers", .. })));
    assert!(matches!(gradient(10..16, &random(1, &[1, 3, 8, 8]), &Constant), Err(Error::Shape { name: "latents", .. })));
    assert!(matches!(gradient(10..16, &latents, &AdLoss::default()), Err(Error::Argument { argument: "styles", .. })));
}

/// A run in which each step is checkpointed; the network's prediction is as ever.
#[test]
fn a_guided_sampling_ends_in_the_same_picture() {
    let mut model = open("sdxl", Kind::Float);
    let pictures = [false, true].map(|on| {
        model.set_gradient_checkpointing(on);
        let guidance = model.guidance(&["a mill"], None, 5.0, (64, 64)).unwrap();
        let mut noise = Noise::seeded(1);
        let start = model.noise(1, (64, 64), &mut noise).unwrap();
        let styles = References::style(random(5, &[1, 4, 8, 8]));
        let mut run = GuidedSampler::new(model.extractor((64, 64)).unwrap(), model.ddim(4).unwrap(), guidance, styles, start, noise);
        (run.iterations, run.adain) = (1, true);
        model.decode(&run.finish().unwrap()).unwrap()
    });
    let levels = (&pictures[0] - &pictures[1]).abs().mean(Kind::Float).double_value(&[]) * 255.0;
    // Measured 4e-5; the first of the six layers left out makes 4, descents left out 31.
    assert!(levels < 0.5, "{levels} grey levels on average");
}

/// Where the graph is held, one may ask for its gradient.
#[test]
fn it_serves_a_foreign_caller_too() {
    let mut model = open("sd15", Kind::Float);
    model.set_gradient_checkpointing(true);
    let condition = model.prompts(&[""], (64, 64)).unwrap();
    let mut calls = 0;
    let (value, gradient) = tch::no_grad(|| {
        model.gradient(&random(1, &[1, 4, 8, 8]), 1.0, &condition, 14..16, &mut |features| {
            calls += 1;
            // Their graph is not the network's: it was not kept.
            assert!(features.layers().all(|layer| layer.output().unwrap().is_leaf()));
            Ok(features.layers().last().unwrap().output().unwrap().mean(Kind::Float))
        })
    })
    .unwrap();
    assert_eq!(calls, 1);
    assert!(!value.requires_grad() && gradient.abs().max().double_value(&[]) > 0.0);
}
