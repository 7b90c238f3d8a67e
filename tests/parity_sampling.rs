//! Whole samplings, from prompts and pictures to pictures: plain ones against diffusers' pipelines, guided ones against
//! `tools/reference`; and SDXL's text encoders against transformers.
#![cfg(feature = "stable-diffusion")]
#![allow(clippy::disallowed_methods, clippy::unwrap_used)] // A test may panic.

mod common;
mod model_copy;

use attention_distillation::stable_diffusion::{ClipTextModel, ClipTokenizer, Control, ControlNet, StableDiffusion};
use attention_distillation::{ContentLoss, GuidedSampler, Noise, References, Style};
use common::{fixture, relative, Comparison, Expected, ACTIVATIONS};
use model_copy::ModelCopy;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

/// The crate promises 2 grey levels of 255 on average. As in `parity_transfer`, Adam makes whole steps of roundings where
/// gradients are next to nothing, and guidance magnifies them; the fixtures' seeds are such that noise of 1e-6 on all
/// inputs moves these pictures by 0.002 levels at most. A biased deviation in AdaIN, a learning rate off by a tenth, features
/// a timestep off, or another null condition move them by 0.6 levels and more.
const GUIDED: f64 = 0.25;

/// Nothing here but roundings; a control's strength off by 0.05 moves its picture by 0.1.
const PLAIN: f64 = 0.02;

/// Relative to the largest; the same roundings.
const LOSSES: f64 = 1e-3;

fn texts(value: &Value) -> Vec<String> {
    value.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
}

fn case(name: &str) {
    let json = std::fs::read_to_string(fixture("expected/sampling.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&json).unwrap();
    let case = cases.iter().find(|case| case["name"] == name).unwrap();
    let number = |key: &str| case[key].as_f64().unwrap();
    let expected = Expected::read(&format!("sample_{name}"));
    let mut comparison = Comparison::default();

    let mut model = StableDiffusion::open(fixture(case["model"].as_str().unwrap()), Device::Cpu, Kind::Float).unwrap();
    let size = (case["size"][1].as_i64().unwrap(), case["size"][0].as_i64().unwrap());
    let ddim = model.ddim(number("steps") as usize).unwrap();
    let control: Option<Control> = case["control"].as_object().map(|control| {
        let copy = ModelCopy::of(control["model"].as_str().unwrap());
        if control.get("pooled").is_some_and(|pooled| pooled == true) {
            copy.set("config.json", "global_pool_conditions", true.into());
        }
        let folder = copy.folder();
        let net = model.add_controlnet(ControlNet::open(folder, Device::Cpu, Kind::Float).unwrap()).unwrap();
        let part = |key: &str| control[key].as_f64().unwrap();
        let control = model.control(net, expected.get("control"), size).unwrap().with_strength(part("strength")).unwrap();
        control.between(part("start"), part("end"), attention_distillation::Scheduler::timesteps(&ddim)).unwrap()
    });
    let mut encode = |picture: &str| {
        let latents = model.encode(expected.get(picture)).unwrap();
        comparison.close(format!("{picture} encoded"), &latents, expected.get(&format!("{picture}.latents")), ACTIVATIONS);
        latents
    };
    let styles: Vec<Tensor> = (0..case["styles"].as_i64().unwrap()).map(|i| encode(&format!("style{i}"))).collect();
    let mut references = References::styles(styles.into_iter().map(Style::new));
    references.content = case["content"].as_bool().unwrap().then(|| encode("content"));

    let prompts = texts(&case["prompts"]);
    let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
    let mut guidance = model.guidance(&prompts, case["negative"].as_str(), number("guidance"), size).unwrap();
    if let Some(control) = control {
        guidance = guidance.with_control(&control);
    }
    // What is encoded stays when the encoders are gone.
    model.drop_text_encoders().unwrap();
    let mut noise = Noise::seeded(case["seed"].as_u64().unwrap());
    let start = model.noise(prompts.len() as i64, size, &mut noise).unwrap();
    comparison.close("start", &start, expected.get("start"), 1e-5);
    let mut run = GuidedSampler::new(model.extractor(size).unwrap(), ddim, guidance, references, start, noise);
    run.loss = run.loss.plus(number("content_weight"), ContentLoss);
    run.iterations = number("iterations") as usize;
    run.adain = case["adain"].as_bool().unwrap();
    run.start_time = number("start_time");
    run.optimizer.config.learning_rate = number("learning_rate");

    let mut losses = vec![];
    while let Some(progress) = run.advance().unwrap() {
        losses.push(progress.loss().unwrap().unwrap_or(f64::NAN));
    }
    let (found, wanted) = (Tensor::from_slice(&losses), expected.get("losses").to_kind(Kind::Double));
    assert!(found.isnan().equal(&wanted.isnan()), "{name}: descents in other steps: {losses:?}");
    comparison.close("losses", &found.nan_to_num(0.0, None, None), &wanted.nan_to_num(0.0, None, None), LOSSES);
    println!("final latents off by {:.2e}", relative(&run.latents, expected.get("latents")));
    let (ours, picture) = (model.decode(&run.latents).unwrap(), expected.get("picture"));
    assert_eq!(ours.size(), picture.size());
    let levels = (ours - picture).abs().mean(Kind::Float).double_value(&[]) * 255.0;
    println!("{name}: off by {levels:.4} grey levels on average");
    let allowed = if run.iterations == 0 { PLAIN } else { GUIDED };
    if levels.is_nan() || levels > allowed {
        comparison.fail(format!("{name}: off by {levels:.3} grey levels on average, {allowed} are allowed"));
    }
    comparison.finish();
}

macro_rules! cases {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {$(
        $(#[$doc])*
        #[test]
        fn $name() {
            case(stringify!($name));
        }
    )*};
}
cases! {
    /// Two prompts at once and a negative prompt.
    plain_sd15,
    /// Without a negative prompt: zeros.
    plain_sdxl,
    /// An empty negative prompt is encoded; not square.
    plain_sdxl_negative,
    /// For the first part of the steps.
    plain_control_sd15,
    /// For the last part of the steps.
    plain_control_sdxl,
    /// A ControlNet that pools what it sees steers the prompt alone.
    plain_control_pooled,
    guided_adain,
    guided_content,
    /// Of different sizes.
    guided_styles,
    guided_pictures,
    guided_sdxl,
    /// The control steers the prediction, the features know nothing of it.
    guided_control,
    /// Descents in the later steps only.
    guided_late,
}

/// No case of the fixtures is forgotten here.
#[test]
fn all_cases_are_tests() {
    let json = std::fs::read_to_string(fixture("expected/sampling.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&json).unwrap();
    let source = include_str!("parity_sampling.rs");
    for case in &cases {
        let name = case["name"].as_str().unwrap();
        assert!(source.contains(&format!("\n    {name},\n")), "{name} is no test");
    }
}

#[test]
fn both_text_encoders_of_sdxl() {
    let expected = Expected::read("text_sdxl");
    let prompts: Vec<String> = texts(&serde_json::from_str(&std::fs::read_to_string(fixture("expected/text_sdxl.json")).unwrap()).unwrap());
    let mut comparison = Comparison::default();
    for (encoder, tokenizer, ids, hidden) in [("text_encoder", "tokenizer", "ids", "hidden"), ("text_encoder_2", "tokenizer_2", "ids_2", "hidden_2")]
    {
        let tokenizer = ClipTokenizer::open(fixture("sdxl").join(tokenizer)).unwrap();
        let rows: Vec<Tensor> = prompts.iter().map(|prompt| Tensor::from_slice(&tokenizer.encode(prompt).unwrap())).collect();
        let rows = Tensor::stack(&rows, 0);
        assert!(rows.equal(expected.get(ids)), "{ids} differ");
        let model = ClipTextModel::open(fixture("sdxl").join(encoder), Device::Cpu, Kind::Float).unwrap();
        let output = tch::no_grad(|| model.forward(&rows)).unwrap();
        comparison.close(hidden, &output.penultimate, expected.get(hidden), ACTIVATIONS);
        match output.pooled {
            Some(pooled) => comparison.close("pooled", &pooled, expected.get("pooled"), ACTIVATIONS),
            None => assert_eq!(encoder, "text_encoder", "only SDXL's second encoder pools"),
        }
    }
    let model = StableDiffusion::open(fixture("sdxl"), Device::Cpu, Kind::Float).unwrap();
    let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
    let condition = model.prompts(&prompts, (64, 80)).unwrap();
    let text = Tensor::cat(&[expected.get("hidden"), expected.get("hidden_2")], -1);
    comparison.close("text", &condition.text, &text, ACTIVATIONS);
    comparison.close("pooled", &condition.pooled.unwrap(), expected.get("pooled"), ACTIVATIONS);
    let ids = Tensor::from_slice(&[64.0_f32, 80.0, 0.0, 0.0, 64.0, 80.0]).unsqueeze(0).expand([prompts.len() as i64, -1], false);
    comparison.close("time ids", &condition.time_ids.unwrap(), &ids, 0.0);
    comparison.finish();
}
