//! One step of guided sampling with the bundled model at 256 px: noise prediction with classifier-free guidance, DDIM, AdaIN,
//! reference pass, descents; without and with a ControlNet, and with gradient checkpointing. One step of a style transfer by
//! sampling, and of an expansion. An element is a pixel.
#![allow(clippy::disallowed_methods, missing_docs)]

mod common;

use attention_distillation::stable_diffusion::{Condition, ControlNet};
use attention_distillation::tch::{Device, Kind, Tensor};
use attention_distillation::{image, Guidance, GuidedSampler, Noise, References, Settings, StableDiffusion, Task, Windows};
use common::{device_and_kind, finished, memory};
use criterion::{criterion_group, criterion_main, Criterion, Throughput};
use std::{collections::BTreeSet, fs, path::Path};

type Group<'a> = criterion::BenchmarkGroup<'a, criterion::measurement::WallTime>;

const SIZE: (i64, i64) = (256, 256);

/// Seven windows side by side, for the expansion.
const CANVAS: (i64, i64) = (128, 320);
const WINDOWS: (i64, i64) = (32, 8);

/// A ControlNet for the bundled model with its own first half, and random weights between picture and network: there is
/// none that was trained.
fn controlnet(model: &Path, folder: &Path) {
    let text = fs::read_to_string(model.join("unet/config.json")).unwrap();
    let mut config: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text).unwrap();
    config.insert("_class_name".into(), "ControlNetModel".into());
    config.insert("conditioning_embedding_out_channels".into(), serde_json::json!([16, 32, 64]));
    fs::write(folder.join("config.json"), serde_json::to_vec(&config).unwrap()).unwrap();

    let halves = ["conv_in.", "time_embedding.", "down_blocks.", "mid_block."];
    let unet = Tensor::read_safetensors(model.join("unet/diffusion_pytorch_model.safetensors")).unwrap();
    let mut tensors: Vec<(String, Tensor)> = unet.into_iter().filter(|(name, _)| halves.iter().any(|half| name.starts_with(half))).collect();
    let widths = |key: &str| config[key].as_array().unwrap().iter().map(|n| n.as_i64().unwrap()).collect::<Vec<_>>();
    let levels = widths("block_out_channels");
    let layers = config["layers_per_block"].as_i64().unwrap();
    let mut skips = vec![levels[0]];
    for (level, &width) in levels.iter().enumerate() {
        let halved = i64::from(level + 1 < levels.len());
        skips.extend((0..layers + halved).map(|_| width));
    }
    let mut conv = |name: String, from: i64, to: i64, kernel: i64| {
        tensors.push((format!("{name}.weight"), Tensor::randn([to, from, kernel, kernel], (Kind::Float, Device::Cpu)) * 0.02));
        tensors.push((format!("{name}.bias"), Tensor::zeros([to], (Kind::Float, Device::Cpu))));
    };
    let embedding = |name: &str| format!("controlnet_cond_embedding.{name}");
    let steps = widths("conditioning_embedding_out_channels");
    conv(embedding("conv_in"), 3, steps[0], 3);
    for (i, pair) in steps.windows(2).enumerate() {
        conv(embedding(&format!("blocks.{}", 2 * i)), pair[0], pair[0], 3);
        conv(embedding(&format!("blocks.{}", 2 * i + 1)), pair[0], pair[1], 3);
    }
    conv(embedding("conv_out"), steps[steps.len() - 1], levels[0], 3);
    skips.iter().enumerate().for_each(|(i, &width)| conv(format!("controlnet_down_blocks.{i}"), width, width, 1));
    let last = skips[skips.len() - 1];
    conv("controlnet_mid_block".into(), last, last, 1);
    let names: BTreeSet<&String> = tensors.iter().map(|(name, _)| name).collect();
    assert_eq!(names.len(), tensors.len());
    Tensor::write_safetensors(&tensors, folder.join("diffusion_pytorch_model.safetensors")).unwrap();
}

fn guided(c: &mut Criterion) {
    let Some(folder) = common::model() else { return };
    let (device, kind) = device_and_kind();
    let mut model = StableDiffusion::open(folder, device, kind).unwrap();
    let trained_by_none = tempfile::tempdir().unwrap();
    controlnet(folder, trained_by_none.path());
    let net = model.add_controlnet(ControlNet::open(trained_by_none.path(), device, kind).unwrap()).unwrap();

    let style = model.encode(&common::picture_of("style_cafe_terrace.png", SIZE)).unwrap();
    let photograph = common::picture_of("content_chelsea.png", SIZE);
    let edges = image::canny(&photograph, image::CANNY_LOW, image::CANNY_HIGH).unwrap();
    let control = model.control(net, &edges, SIZE).unwrap();

    let mut group = c.benchmark_group(format!("guided sampling, bundled model, {} px", SIZE.0));
    group.throughput(Throughput::Elements((SIZE.0 * SIZE.1) as u64));
    for (name, control, iterations, checkpointing) in [
        ("plain step", None, 0, false),
        ("guided step", None, 3, false),
        ("guided step, control", Some(control), 3, false),
        ("guided step, checkpointing", None, 3, true),
    ] {
        model.set_gradient_checkpointing(checkpointing);
        // Both halves of the guidance, though this model knows no prompts.
        let condition = || -> Condition {
            let condition = model.prompts(&[""], SIZE).unwrap();
            match &control {
                Some(control) => condition.with_control(control.shallow_clone()),
                None => condition,
            }
        };
        let guidance = Guidance::new(condition(), condition(), 7.5).unwrap();
        let mut noise = Noise::seeded(0);
        let start = model.noise(1, SIZE, &mut noise).unwrap();
        let references = References::style(style.shallow_clone());
        let schedule = model.ddim(50).unwrap();
        let mut run = GuidedSampler::new(model.extractor(SIZE).unwrap(), schedule, guidance, references, start.shallow_clone(), noise);
        (run.iterations, run.adain) = (iterations, true);
        memory::bench(&mut group, device, name, |b| {
            b.iter(|| {
                (run.step, run.latents) = (25, start.shallow_clone());
                finished(device, || run.advance().unwrap())
            });
        });
    }
    model.set_gradient_checkpointing(false);

    let condition = || model.prompts(&[""], SIZE).unwrap();
    let guidance = Guidance::new(condition(), condition(), 7.5).unwrap();
    by_graphs(&mut group, device, "guided step", || {
        let mut noise = Noise::seeded(0);
        let start = model.noise(1, SIZE, &mut noise).unwrap();
        let (references, schedule) = (References::style(style.shallow_clone()), model.ddim(50).unwrap());
        let mut run = GuidedSampler::new(model.extractor(SIZE).unwrap(), schedule, guidance, references, start, noise);
        (run.iterations, run.adain) = (3, true);
        run
    });

    // Of a style transfer by sampling: from noise without guidance, held to the photograph by the content loss.
    let settings = model.settings(Task::StyleTransferBySampling);
    let mut noise = Noise::seeded(0);
    let start = model.noise(1, SIZE, &mut noise).unwrap();
    let guidance = model.guidance(&[""], None, settings.guidance, SIZE).unwrap();
    let references = References::style(style).with_content(model.encode(&photograph).unwrap());
    let run = GuidedSampler::new(model.extractor(SIZE).unwrap(), model.ddim(50).unwrap(), guidance, references, start.shallow_clone(), noise);
    let mut run = run.with_settings(&settings).unwrap();
    memory::bench(&mut group, device, "step towards style and content", |b| {
        b.iter(|| {
            (run.step, run.latents) = (25, start.shallow_clone());
            finished(device, || run.advance().unwrap())
        });
    });
    group.finish();
}

/// A step that is captured once and repeated, on a GPU.
fn by_graphs<'m>(group: &mut Group, device: Device, name: &str, run: impl FnOnce() -> GuidedSampler<&'m StableDiffusion>) {
    #[cfg(feature = "cuda-graphs")]
    match attention_distillation::cuda_graphs::CudaGraphs::new() {
        Err(reason) => eprintln!("skipped: {name}, CUDA graphs: {reason}"),
        Ok(_) if !device.is_cuda() => {}
        Ok(graphs) => {
            let mut run = run();
            run.step = 25;
            let mut run = run.with_graphs(graphs);
            let begun = run.checkpoint().unwrap();
            memory::bench(group, device, &format!("{name}, CUDA graphs"), |b| {
                b.iter(|| {
                    // The same step each time, and not the last, with which the graphs go.
                    run.resume(&begun).unwrap();
                    finished(device, || run.advance().unwrap())
                });
            });
        }
    }
    #[cfg(not(feature = "cuda-graphs"))]
    let _ = (group, device, name, run);
}

/// The style's noise and features once in a step, or for each batch of views as the authors do.
fn expansion(c: &mut Criterion) {
    let Some(folder) = common::model() else { return };
    let (device, kind) = device_and_kind();
    let model = StableDiffusion::open(folder, device, kind).unwrap();
    let style = model.encode(&common::picture_of("style_cafe_terrace.png", (128, 128))).unwrap();
    let mut group = c.benchmark_group(format!("expansion, bundled model, {}x{} px", CANVAS.1, CANVAS.0));
    group.throughput(Throughput::Elements((CANVAS.0 * CANVAS.1) as u64));
    for (name, batch, per_batch) in [("views in batches of 4", 4, false), ("references per batch", 4, true), ("views one by one", 1, false)] {
        let mut noise = Noise::seeded(0);
        let start = model.noise(1, CANVAS, &mut noise).unwrap();
        let (guidance, references) = (model.guidance(&[""], None, 1.0, CANVAS).unwrap(), References::style(style.shallow_clone()));
        let run = GuidedSampler::new(model.extractor(CANVAS).unwrap(), model.ddim(50).unwrap(), guidance, references, start.shallow_clone(), noise);
        let windows = Windows::new(WINDOWS.0, WINDOWS.1).with_batch(batch).with_reference_per_batch(per_batch);
        let mut run = run.with_settings(&Settings::texture_expansion()).unwrap().with_windows(windows);
        memory::bench(&mut group, device, name, |b| {
            b.iter(|| {
                (run.step, run.latents) = (25, start.shallow_clone());
                finished(device, || run.advance().unwrap())
            });
        });
    }
    by_graphs(&mut group, device, "views in batches of 4", || {
        let mut noise = Noise::seeded(0);
        let start = model.noise(1, CANVAS, &mut noise).unwrap();
        let (guidance, references) = (model.guidance(&[""], None, 1.0, CANVAS).unwrap(), References::style(style));
        let run = GuidedSampler::new(model.extractor(CANVAS).unwrap(), model.ddim(50).unwrap(), guidance, references, start, noise);
        run.with_settings(&Settings::texture_expansion()).unwrap().with_windows(Windows::new(WINDOWS.0, WINDOWS.1).with_batch(4))
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = common::criterion();
    targets = guided, expansion, memory::peak
}
criterion_main!(benches);
