//! Textures by sampling, expanded to any size, and edited, against `tools/reference`: from pictures to the picture.
#![cfg(feature = "stable-diffusion")]
#![allow(clippy::disallowed_methods, clippy::unwrap_used)] // A test may panic.

mod common;

use attention_distillation::stable_diffusion::StableDiffusion;
use attention_distillation::{ContentLoss, GuidedSampler, LabelMap, Noise, References, Windows};
use common::{fixture, relative, Comparison, Expected, ACTIVATIONS};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

/// The crate promises 2 grey levels of 255 on average. The fixtures' seeds are such that a millionth on the style and on
/// the weights moves these pictures by 0.02 levels at most.
const GREY_LEVELS: f64 = 0.1;

/// Relative to the largest; the same roundings.
const LOSSES: f64 = 1e-3;

/// An error is how many grey levels the picture is off, on average.
fn case(name: &str, change: impl FnOnce(&mut Value)) -> Result<(), f64> {
    let json = std::fs::read_to_string(fixture("expected/textures.json")).unwrap();
    let mut cases: Vec<Value> = serde_json::from_str(&json).unwrap();
    let case = cases.iter_mut().find(|case| case["name"] == name).unwrap();
    change(case);
    let number = |key: &str| case[key].as_f64().unwrap();
    let whole = |key: &str| case[key].as_i64().unwrap();
    let expected = Expected::read(name);
    let mut comparison = Comparison::default();

    let (kind, losses_off, levels_off) = match case["kind"].as_str() {
        Some("f16") => (Kind::Half, 4e-3, 1.0),
        Some("bf16") => (Kind::BFloat16, 1e-2, 2.0),
        _ => (Kind::Float, LOSSES, GREY_LEVELS),
    };
    let model = StableDiffusion::open(fixture("sd15"), Device::Cpu, kind).unwrap();
    let size = (case["size"][1].as_i64().unwrap(), case["size"][0].as_i64().unwrap());
    let mut encode = |picture: &str| {
        let latents = model.encode(expected.get(picture)).unwrap();
        comparison.close(format!("{picture} encoded"), &latents, expected.get(&format!("{picture}.latents")), ACTIVATIONS);
        latents
    };
    let mut references = References::style(encode("style0"));
    references.content = case["content"].as_str().map(&mut encode);
    let content = references.content.as_ref().map(Tensor::shallow_clone);
    if case["masked"] == true {
        let labels = |name| LabelMap::new(expected.get(name)).unwrap();
        references.styles[0].labels = Some(labels("style0.labels"));
        references = references.with_labels(labels("labels"));
    }

    let prompts = vec![""; whole("count") as usize];
    let guidance = model.guidance(&prompts, None, 1.0, size).unwrap();
    let mut noise = Noise::seeded(case["seed"].as_u64().unwrap());
    let start = model.noise(whole("count"), size, &mut noise).unwrap();
    let schedule = model.ddim(whole("steps") as usize).unwrap();
    let mut run = GuidedSampler::new(model.extractor(size).unwrap(), schedule, guidance, references, start, noise);
    if let Some(content) = content {
        run = run.edited(&content, number("strength")).unwrap();
        run.loss = run.loss.plus(number("content_weight"), ContentLoss);
    }
    run.iterations = whole("iterations") as usize;
    run.optimizer.config.learning_rate = number("learning_rate");
    let views: Option<Vec<usize>> = (case["task"] == "expand").then(|| {
        let windows = Windows::new(whole("window"), whole("stride")).with_batch(whole("view_batch") as usize);
        let windows = windows.with_reference_per_batch(case["reference_per_batch"].as_bool().unwrap());
        run.windows = Some(windows);
        let views: Vec<_> = windows.views((size.0 / 8, size.1 / 8)).unwrap().collect();
        views.chunks(windows.batch).map(<[_]>::len).collect()
    });
    comparison.close("start", &run.latents, expected.get("start"), 1e-5);

    let mut losses = vec![];
    while let Some(progress) = run.advance().unwrap() {
        losses.push(progress.loss().unwrap().unwrap());
        assert_eq!(run.latents.kind(), Kind::Float);
    }
    let mut wanted = expected.get("losses").to_kind(Kind::Double);
    if let Some(views) = views {
        // Of batches of views there; of all views here.
        let views = Tensor::from_slice(&views.iter().map(|&count| count as f64).collect::<Vec<_>>());
        wanted = wanted.matmul(&(&views / views.sum(Kind::Double)));
    }
    comparison.close("losses", &Tensor::from_slice(&losses), &wanted, losses_off);
    println!("final latents off by {:.2e}", relative(&run.latents, expected.get("latents")));
    let (ours, picture) = (model.decode(&run.latents).unwrap(), expected.get("picture"));
    assert_eq!(ours.size(), picture.size());
    let levels = (ours - picture).abs().mean(Kind::Float).double_value(&[]) * 255.0;
    println!("{name}: off by {levels:.4} grey levels on average");
    if levels.is_nan() || levels > levels_off {
        comparison.fail(format!("{name}: off by {levels:.3} grey levels on average, {levels_off} are allowed"));
    }
    std::panic::catch_unwind(|| comparison.finish()).map_err(|_| levels)
}

/// Two pictures at once.
#[test]
fn texture_by_sampling() {
    case("texture_sample", |_| ()).unwrap();
}

/// New noise on the style for each batch of views, as the authors do it.
#[test]
fn expansion() {
    case("texture_expansion", |_| ()).unwrap();
}

#[test]
fn expansion_with_one_reference_per_step() {
    case("texture_expansion_shared", |_| ()).unwrap();
}

/// Two rows of views, the last column clamped, and each view with its part of the labels.
#[test]
fn expansion_with_regions() {
    case("texture_expansion_masked", |_| ()).unwrap();
}

/// SDEdit: the layout is noised, and held to by the content loss.
#[test]
fn edited_layout() {
    case("texture_edit", |_| ()).unwrap();
}

/// Against the references of f32, whole and by views. Measured: losses off by 1.5e-3 in f16 and 4e-3 in bf16, pictures by 0.52 and 1.1
/// grey levels at most. In f16 a learning rate off by a fifth moves losses by 7.7e-3 and more, one iteration less pictures by 1.2 levels.
#[test]
fn half_precisions() {
    for name in ["texture_sample", "texture_expansion", "texture_expansion_masked"] {
        for kind in ["f16", "bf16"] {
            case(name, |case| case["kind"] = kind.into()).unwrap();
        }
    }
}

/// Each of these slips makes another picture, or the tests above would show nothing.
#[test]
fn slips_are_seen() {
    for (name, key, value) in [
        ("texture_expansion", "reference_per_batch", Value::from(false)),
        ("texture_expansion", "stride", Value::from(8)),
        ("texture_expansion_shared", "learning_rate", Value::from(0.045)),
        ("texture_expansion_shared", "iterations", Value::from(1)),
        ("texture_expansion_masked", "masked", Value::from(false)),
        ("texture_edit", "strength", Value::from(0.8)),
    ] {
        let outcome = case(name, |case| case[key] = value);
        println!("{name}, another {key}: {outcome:?}");
        assert!(outcome.is_err_and(|levels| levels > 3.0 * GREY_LEVELS), "{name}, another {key}");
    }
}
