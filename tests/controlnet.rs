//! ControlNets in a model: what they change, what they must not change, and what is refused.
#![cfg(feature = "stable-diffusion")]
#![allow(clippy::disallowed_methods, clippy::unwrap_used, missing_docs)]

mod common;
mod model_copy;

use attention_distillation::stable_diffusion::{Condition, Control, ControlNet, UNet};
use attention_distillation::{AttentionHook, AttentionSite, Denoiser, Error, Guidance, Noise, PlainAttention, Qkv, Result, StableDiffusion};
use common::{fixture, networks, relative};
use model_copy::ModelCopy;
use serde_json::json;
use std::path::Path;
use tch::{Device, Kind, Tensor};

const SIZE: (i64, i64) = (64, 64);
const TIMESTEP: f64 = 501.0;
const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";

fn random(seed: u64, shape: &[i64]) -> Tensor {
    Noise::seeded(seed).draw(&Tensor::zeros(shape, (Kind::Float, Device::Cpu))).unwrap()
}

fn open(folder: impl AsRef<Path>) -> Result<ControlNet> {
    ControlNet::open(folder, Device::Cpu, Kind::Float)
}

/// The tiny model with its ControlNet, number 0.
fn model() -> StableDiffusion {
    let mut model = StableDiffusion::open(fixture("sd15"), Device::Cpu, Kind::Float).unwrap();
    assert_eq!(model.add_controlnet(open(fixture("controlnet_sd15")).unwrap()).unwrap(), 0);
    model
}

/// Not smooth, and of one's own for each seed.
fn picture(seed: u64, (height, width): (i64, i64)) -> Tensor {
    random(seed, &[1, 3, height, width]).sigmoid()
}

fn control(model: &StableDiffusion, seed: u64) -> Control {
    model.control(0, &picture(seed, SIZE), SIZE).unwrap()
}

fn noise(batch: i64) -> Tensor {
    random(1, &[batch, 4, 8, 8])
}

fn text(seed: u64, batch: i64, tokens: i64) -> Condition {
    Condition::new(random(seed, &[batch, tokens, 16]))
}

fn predict(model: &StableDiffusion, condition: &Condition) -> Tensor {
    model.forward(&noise(2), TIMESTEP, condition, &mut PlainAttention).unwrap()
}

#[track_caller]
fn refused<T>(outcome: Result<T>, words: &[&str]) -> Error {
    let Err(error) = outcome else { panic!("was taken") };
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "does not name `{word}`: {message}");
    }
    error
}

// ---- effects

#[test]
fn strength_scales_the_effect() {
    let model = model();
    let none = predict(&model, &text(2, 1, 5));
    let with = |strength: f64| predict(&model, &text(2, 1, 5).with_control(control(&model, 3).with_strength(strength).unwrap()));
    assert!(none.equal(&with(0.0)));
    let (half, whole) = (relative(&with(0.5), &none), relative(&with(1.0), &none));
    assert!(half > 0.01 && whole > half, "{half} {whole}");
    assert!(predict(&model, &text(2, 1, 5).with_control(control(&model, 3))).equal(&with(1.0)));
}

#[test]
fn another_picture_has_another_effect() {
    let model = model();
    let with = |seed: u64| predict(&model, &text(2, 1, 5).with_control(control(&model, seed)));
    let off = relative(&with(3), &with(4));
    assert!(off > 1e-3, "{off}");
}

#[test]
fn outside_its_steps_it_changes_nothing() {
    let model = model();
    let timesteps = [801.0, 601.0, 401.0, 201.0, 1.0];
    let at = |start: f64, end: f64| {
        let condition = text(2, 1, 5).with_control(control(&model, 3).between(start, end, &timesteps).unwrap());
        let acts = |t: &f64| {
            let none = model.forward(&noise(1), *t, &text(2, 1, 5), &mut PlainAttention).unwrap();
            !model.forward(&noise(1), *t, &condition, &mut PlainAttention).unwrap().equal(&none)
        };
        timesteps.iter().map(acts).collect::<Vec<_>>()
    };
    assert_eq!(at(0.0, 1.0), [true; 5]);
    assert_eq!(at(0.0, 0.4), [true, true, false, false, false]);
    // A step that is not wholly inside does not count: 2 of 5 end at 0.4.
    assert_eq!(at(0.0, 0.39), [true, false, false, false, false]);
    assert_eq!(at(0.2, 0.6), [false, true, true, false, false]);
    assert_eq!(at(0.21, 1.0), [false, false, true, true, true]);
    assert_eq!(at(0.41, 0.59), [false; 5]);
}

/// A whole range acts at timesteps, too, that are none of the run's.
#[test]
fn open_ends_act_beyond_the_timesteps() {
    let model = model();
    let between = |start: f64, end: f64| control(&model, 3).between(start, end, &[800.0, 600.0, 400.0, 200.0]).unwrap();
    let acts = |control: Control| [999.0, 500.0, 0.0].map(|t| control.acts_at(t));
    assert_eq!(acts(control(&model, 3)), [true; 3]);
    assert_eq!(acts(between(0.0, 1.0)), [true; 3]);
    assert_eq!(acts(between(0.0, 0.75)), [true, true, false]);
    assert_eq!(acts(between(0.25, 1.0)), [false, true, true]);
    assert_eq!(acts(between(0.3, 0.4)), [false; 3]);
}

#[test]
fn stacked_controls_add_up() {
    let model = model();
    let twice =
        text(2, 1, 5).with_control(control(&model, 3).with_strength(0.25).unwrap()).with_control(control(&model, 3).with_strength(0.5).unwrap());
    let once = text(2, 1, 5).with_control(control(&model, 3).with_strength(0.75).unwrap());
    let off = relative(&predict(&model, &twice), &predict(&model, &once));
    assert!(off < 1e-5, "{off}");
}

/// Two ControlNets in one model, of which the second has all weights of the first with the other sign.
#[test]
fn each_control_is_by_its_own_net() {
    let copy = ModelCopy::of("controlnet_sd15");
    copy.weights(WEIGHTS, |file| {
        assert!(file.header.values().all(|info| info["dtype"].as_str().is_none_or(|kind| kind == "F16")), "other signs are elsewhere");
        file.data.iter_mut().skip(1).step_by(2).for_each(|byte| *byte ^= 0x80);
    });
    let (mut model, mut alone) = (model(), StableDiffusion::open(fixture("sd15"), Device::Cpu, Kind::Float).unwrap());
    assert_eq!(model.add_controlnet(open(copy.folder()).unwrap()).unwrap(), 1);
    assert_eq!(alone.add_controlnet(open(copy.folder()).unwrap()).unwrap(), 0);
    let by = |model: &StableDiffusion, nets: &[usize]| {
        let control = |net: usize| model.control(net, &picture(3, SIZE), SIZE).unwrap();
        assert!(nets.iter().all(|&net| control(net).net() == net));
        predict(model, &nets.iter().fold(text(2, 1, 5), |condition, &net| condition.with_control(control(net))))
    };
    let off = relative(&by(&model, &[1]), &by(&alone, &[0]));
    assert!(off < 1e-5, "{off}");
    // Neither stands in for the other, alone or beside it.
    for (nets, others) in [([0].as_slice(), [1].as_slice()), (&[0, 1], &[0, 0]), (&[0, 1], &[1, 1])] {
        let off = relative(&by(&model, nets), &by(&model, others));
        assert!(off > 0.01, "{nets:?} and {others:?}: {off}");
    }
}

#[test]
fn a_picture_of_another_size_is_scaled() {
    let model = model();
    let large = picture(3, (96, 128));
    let scaled = attention_distillation::image::resize(&large, SIZE).unwrap();
    let with = |picture: &Tensor| predict(&model, &text(2, 1, 5).with_control(model.control(0, picture, SIZE).unwrap()));
    assert!(with(&large).equal(&with(&scaled)));
}

#[test]
fn a_picture_each_for_a_batch() {
    let model = model();
    let both = Tensor::cat(&[picture(3, SIZE), picture(4, SIZE)], 0);
    let batch = predict(&model, &text(2, 1, 5).with_control(model.control(0, &both, SIZE).unwrap()));
    for (i, seed) in [3, 4].into_iter().enumerate() {
        let alone = predict(&model, &text(2, 1, 5).with_control(control(&model, seed)));
        let off = relative(&batch.get(i as i64), &alone.get(i as i64));
        assert!(off < 1e-5, "picture {i}: {off}");
    }
}

#[test]
fn of_another_kind_than_the_model() {
    let condition = |model: &StableDiffusion| text(2, 1, 5).with_control(control(model, 3));
    let same = model();
    let mut mixed = StableDiffusion::open(fixture("sd15"), Device::Cpu, Kind::Float).unwrap();
    mixed.add_controlnet(ControlNet::open(fixture("controlnet_sd15"), Device::Cpu, Kind::BFloat16).unwrap()).unwrap();
    let (wanted, found) = (predict(&same, &condition(&same)), predict(&mixed, &condition(&mixed)));
    let off = relative(&found, &wanted);
    assert!(found.kind() == Kind::Float && off < 0.05, "{:?} {off}", found.kind());
}

#[derive(Default)]
struct Sites(Vec<AttentionSite>);

impl AttentionHook for Sites {
    fn attend(&mut self, site: &AttentionSite, qkv: Qkv) -> Result<Tensor> {
        self.0.push(*site);
        qkv.attend()
    }
}

#[test]
fn the_hook_sees_the_unet_only() {
    let model = model();
    let sites = |condition: &Condition| {
        let mut sites = Sites::default();
        drop(model.forward(&noise(1), TIMESTEP, condition, &mut sites).unwrap());
        sites.0
    };
    let without = sites(&text(2, 1, 5));
    assert_eq!(without.len(), 32);
    assert_eq!(sites(&text(2, 1, 5).with_control(control(&model, 3))), without);
}

/// What is left keeps its number; what went is refused, also after another was added, and goes on in the model that it is given to.
#[test]
fn removed() {
    let mut model = model();
    let (none, text) = (predict(&model, &text(2, 1, 5)), text(2, 1, 5));
    assert_eq!(model.add_controlnet(open(fixture("controlnet_sd15")).unwrap()).unwrap(), 1);
    let first = text.shallow_clone().with_control(control(&model, 3));
    let second = || text.shallow_clone().with_control(model.control(1, &picture(3, SIZE), SIZE).unwrap());
    let (second, with) = (second(), predict(&model, &first));
    assert!(predict(&model, &second).equal(&with) && !with.equal(&none));

    let net = model.remove_controlnet(0).unwrap();
    assert!(predict(&model, &second).equal(&with));
    assert!(predict(&model, &text).equal(&none));
    let gone = |model: &StableDiffusion| {
        refused(model.forward(&noise(2), TIMESTEP, &first, &mut PlainAttention), &["ControlNet 0", "add_controlnet"]);
        refused(model.control(0, &picture(3, SIZE), SIZE), &["ControlNet 0"]);
    };
    gone(&model);
    for number in [0, 2] {
        refused(model.remove_controlnet(number), &["ControlNet", "add_controlnet"]);
    }
    assert_eq!(model.add_controlnet(net).unwrap(), 2);
    gone(&model);
    let third = text.shallow_clone().with_control(model.control(2, &picture(3, SIZE), SIZE).unwrap());
    assert!(predict(&model, &third).equal(&with));
}

// ---- guidance

/// With the trait's own guidance, in two passes.
struct TwoPasses<'m, D>(&'m D);

impl<D: Denoiser<Condition = Condition>> Denoiser for TwoPasses<'_, D> {
    type Condition = Condition;

    fn forward(&self, latents: &Tensor, timestep: f64, condition: &Condition, hook: &mut dyn AttentionHook) -> Result<Tensor> {
        self.0.forward(latents, timestep, condition, hook)
    }
}

#[track_caller]
fn as_in_two_passes<D: Denoiser<Condition = Condition>>(network: &D, prompt: Condition, negative: Condition, batch: i64) {
    let guidance = Guidance { prompt, negative: Some(negative), scale: 7.5 };
    let one = network.forward_guided(&noise(batch), TIMESTEP, &guidance).unwrap();
    let two = TwoPasses(network).forward_guided(&noise(batch), TIMESTEP, &guidance).unwrap();
    let off = relative(&one, &two);
    assert!(off < 1e-5, "{off}");
    let unguided = network.forward(&noise(batch), TIMESTEP, &guidance.prompt, &mut PlainAttention).unwrap();
    assert!(relative(&one, &unguided) > 1e-3);
    let without = Guidance { scale: 1.0, ..guidance };
    assert!(network.forward_guided(&noise(batch), TIMESTEP, &without).unwrap().equal(&unguided));
}

#[test]
fn guidance_in_one_batch() {
    let model = model();
    as_in_two_passes(&model, text(2, 1, 5), text(3, 1, 5), 1);
    as_in_two_passes(&model, text(2, 2, 5), text(3, 1, 5), 2);
    as_in_two_passes(model.unet(), text(2, 1, 5), text(3, 1, 5), 2);
}

#[test]
fn guidance_with_pooled_text() {
    let unet = networks::unet("sdxl/unet");
    let condition = |seed: u64, height: f32| {
        let text = random(seed, &[1, 5, 24]);
        let ids = Tensor::from_slice(&[height, 64.0, 0.0, 0.0, 64.0, 64.0]).unsqueeze(0);
        Condition::new(text).with_pooled(random(seed + 10, &[1, 16]), ids)
    };
    as_in_two_passes(&unet, condition(2, 64.0), condition(3, 32.0), 2);
}

#[test]
fn guidance_with_controls() {
    let model = model();
    let shared = control(&model, 3);
    let with = |condition: Condition, control: &Control| condition.with_control(control.shallow_clone());
    as_in_two_passes(&model, with(text(2, 1, 5), &shared), with(text(3, 1, 5), &shared), 2);
    let each = model.control(0, &Tensor::cat(&[picture(3, SIZE), picture(4, SIZE)], 0), SIZE).unwrap();
    as_in_two_passes(&model, with(text(2, 1, 5), &each), with(text(3, 1, 5), &each), 2);
    // Not alike: these go one by one.
    as_in_two_passes(&model, with(text(2, 1, 5), &shared), text(3, 1, 5), 2);
    as_in_two_passes(&model, with(text(2, 1, 5), &shared), with(text(3, 1, 5), &control(&model, 4)), 2);
    let weak = control(&model, 3).with_strength(0.5).unwrap();
    as_in_two_passes(&model, with(text(2, 1, 5), &shared), with(text(3, 1, 5), &weak), 2);
}

#[test]
fn guidance_by_prompts_of_other_lengths() {
    as_in_two_passes(&model(), text(2, 1, 5), text(3, 1, 9), 2);
}

// ---- what is refused

#[test]
fn a_controlnet_of_another_model() {
    let error = refused(model().add_controlnet(open(fixture("controlnet_sdxl")).unwrap()), &["controlnet_sdxl", "24", "16", "another kind"]);
    assert!(matches!(error, Error::Config { .. }));
}

#[test]
fn a_folder_of_another_class() {
    let error = refused(open(fixture("sd15/unet")), &["config.json", "_class_name", "UNet2DConditionModel"]);
    assert!(matches!(error, Error::Config { .. }));
    let copy = ModelCopy::of("controlnet_sd15");
    for class in ["T2IAdapter", "ControlNetUnionModel"] {
        copy.set("config.json", "_class_name", json!(class));
        refused(open(copy.folder()), &["_class_name", class]);
    }
    refused(open(copy.path("nowhere")), &["nowhere"]);
}

#[test]
fn settings_that_are_not_built() {
    let copy = ModelCopy::of("controlnet_sd15");
    let sound = copy.read("config.json");
    for (key, value) in [
        ("controlnet_conditioning_channel_order", json!("gbr")),
        ("encoder_hid_dim_type", json!("text_proj")),
        ("only_cross_attention", json!(true)),
        ("mid_block_type", json!("UNetMidBlock2DSimpleCrossAttn")),
        ("mid_block_type", json!(null)),
        ("down_block_types", json!(["DownBlock2D"])),
        ("conditioning_embedding_out_channels", json!([])),
        ("conditioning_embedding_out_channels", json!(vec![8; 40])),
        ("global_pool_conditions", json!("yes")),
    ] {
        copy.set("config.json", key, value);
        let error = refused(open(copy.folder()), &["config.json", key]);
        assert!(matches!(error, Error::Config { .. }));
        copy.write("config.json", &sound);
    }
}

#[test]
fn weights_that_are_missing() {
    let copy = ModelCopy::of("controlnet_sd15");
    let file = WEIGHTS;
    let tensors = ["controlnet_cond_embedding.blocks.5.weight", "controlnet_down_blocks.11.bias", "controlnet_mid_block.weight"];
    let sound = copy.read(file);
    for tensor in tensors {
        copy.weights(file, |weights| {
            let info = weights.header.remove(tensor).unwrap();
            weights.header.insert("another.name".to_owned(), info);
        });
        let error = refused(open(copy.folder()), &[file, tensor]);
        assert!(matches!(error, Error::MissingTensor { .. }));
        copy.write(file, &sound);
    }
    copy.remove(file);
    refused(open(copy.folder()), &[file, "missing"]);
}

#[test]
fn pictures_that_do_not_fit() {
    let model = model();
    let net = open(fixture("controlnet_sd15")).unwrap();
    for shape in [vec![1, 3, 60, 64], vec![1, 1, 64, 64], vec![3, 64, 64], vec![0, 3, 64, 64]] {
        refused(net.embed(&Tensor::zeros(&shape, (Kind::Float, Device::Cpu))), &["control picture", "multiples of 8"]);
    }
    refused(model.control(0, &Tensor::zeros([64, 64], (Kind::Float, Device::Cpu)), SIZE), &["picture"]);
    refused(model.control(1, &picture(3, SIZE), SIZE), &["ControlNet 1"]);
    refused(model.control(0, &picture(3, SIZE), (4, 64)), &["too small"]);
    // Made for another size than that of the latents, and a batch of another size.
    let wide = text(2, 1, 5).with_control(model.control(0, &picture(3, SIZE), (64, 96)).unwrap());
    let error = refused(model.forward(&noise(1), TIMESTEP, &wide, &mut PlainAttention), &["hint", "64x64"]);
    assert!(matches!(error, Error::Shape { .. }));
    let three = text(2, 1, 5).with_control(model.control(0, &picture(3, SIZE).repeat([3, 1, 1, 1]), SIZE).unwrap());
    refused(model.forward(&noise(2), TIMESTEP, &three, &mut PlainAttention), &["hint", "(1 or 2, "]);
}

#[test]
fn strengths_and_ranges_out_of_range() {
    let model = model();
    for strength in [f64::NAN, -0.1, f64::INFINITY] {
        refused(control(&model, 3).with_strength(strength), &["strength", &strength.to_string()]);
        let net = open(fixture("controlnet_sd15")).unwrap();
        let hint = net.embed(&picture(3, SIZE)).unwrap();
        refused(net.residuals(&noise(1), &Tensor::from(TIMESTEP), &text(2, 1, 5), &hint, strength), &["strength"]);
    }
    for (start, end) in [(0.5, 0.5), (0.6, 0.5), (-0.1, 0.5), (0.5, 1.1), (f64::NAN, 0.5), (0.5, f64::NAN)] {
        refused(control(&model, 3).between(start, end, &[1.0]), &["start", "end"]);
    }
    refused(control(&model, 3).between(0.0, 1.0, &[]), &["timesteps"]);
    refused(control(&model, 3).between(0.0, 1.0, &[1.0, f64::NAN]), &["timesteps"]);
}

#[test]
fn controls_of_another_network() {
    let model = model();
    let steered = text(2, 1, 5).with_control(control(&model, 3));
    let unet: &UNet = model.unet();
    refused(unet.forward(&noise(1), TIMESTEP, &steered, &mut PlainAttention), &["StableDiffusion"]);
    let without = StableDiffusion::open(fixture("sd15"), Device::Cpu, Kind::Float).unwrap();
    refused(without.forward(&noise(1), TIMESTEP, &steered, &mut PlainAttention), &["ControlNet 0", "has 0"]);
}
