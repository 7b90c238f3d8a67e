//! One step of a style transfer, whole and in its parts, with the bundled model at 256 px. An element is a pixel of the
//! picture, or for Adam one number of the latents.
#![allow(clippy::disallowed_methods, missing_docs)]

mod common;

use attention_distillation::tch::{self, Tensor};
use attention_distillation::{
    image, AdLoss, Adam, AttentionHook, AttentionKind, AttentionSite, ContentLoss, Denoiser, Distiller, FeatureExtractor, Loss, Optimizer,
    PlainAttention, Qkv, References, Result, StableDiffusion, TotalLoss,
};
use common::{device_and_kind, finished};
use criterion::{criterion_group, criterion_main, BatchSize, Criterion, Throughput};
use std::{ops::Range, path::Path};

const SIDE: i64 = 256;

/// Keeps what a recorder keeps, but lets the pass go on to its end.
struct Endless {
    layers: Range<usize>,
    kept: Vec<(Qkv, Tensor)>,
}

impl AttentionHook for Endless {
    fn attend(&mut self, site: &AttentionSite, qkv: Qkv) -> Result<Tensor> {
        if site.kind != AttentionKind::SelfAttention || !self.layers.contains(&site.index) {
            return PlainAttention.attend(site, qkv);
        }
        let output = qkv.attend()?;
        self.kept.push((qkv, output.shallow_clone()));
        Ok(output)
    }
}

/// The published package comes without the model and the pictures.
fn assets() -> Option<&'static Path> {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/assets"));
    if folder.join("mini").is_dir() {
        return Some(folder);
    }
    eprintln!("skipped: there is no {}", folder.display());
    None
}

fn step(c: &mut Criterion) {
    let Some(assets) = assets() else { return };
    let (device, kind) = device_and_kind();
    let model = StableDiffusion::open(assets.join("mini"), device, kind).unwrap();
    let latents = |name: &str| {
        let picture = image::load(assets.join("pictures").join(name)).unwrap();
        model.encode(&image::resize(&picture, (SIDE, SIDE)).unwrap()).unwrap()
    };
    let (content, style) = (latents("content_chelsea.png"), latents("style_cafe_terrace.png"));
    let targets = || References::style(style.shallow_clone()).with_content(content.shallow_clone());
    let extractor = model.extractor((SIDE, SIDE)).unwrap();
    let timesteps = model.timesteps(20).unwrap();
    // In the middle of a run; the network's work is the same at all.
    let timestep = timesteps[10];
    let references = extractor.references(&targets(), timestep).unwrap();
    let loss = || TotalLoss::default().plus(1.0, AdLoss::default()).plus(0.2, ContentLoss);

    let mut group = c.benchmark_group(format!("bundled model, {SIDE} px"));
    group.throughput(Throughput::Elements((SIDE * SIDE) as u64));
    // The end comes early where the layers do; behind the last ones little is left.
    for (name, layers) in [("first", 0..6), ("last", extractor.layers.clone())] {
        let extractor = FeatureExtractor::new(&model, model.prompts(&[""], (SIDE, SIDE)).unwrap(), layers);
        group.bench_function(format!("features, {name} six layers"), |b| {
            b.iter(|| finished(device, || tch::no_grad(|| extractor.extract(&content, timestep).unwrap())));
        });
    }
    group.bench_function("features, pass not ended", |b| {
        b.iter(|| {
            finished(device, || {
                let mut hook = Endless { layers: extractor.layers.clone(), kept: vec![] };
                let prediction = tch::no_grad(|| model.forward(&content, timestep, &extractor.condition, &mut hook).unwrap());
                assert_eq!(hook.kept.len(), extractor.layers.len());
                (hook, prediction)
            })
        });
    });
    group.bench_function("backward", |b| {
        let graph = || {
            let leaf = content.detach().set_requires_grad(true);
            let value = loss().evaluate(&extractor.extract(&leaf, timestep).unwrap(), &references).unwrap();
            finished(device, || (leaf, value))
        };
        let backward = |(leaf, value): (Tensor, Tensor)| finished(device, || Tensor::run_backward(&[value], &[leaf], false, false));
        b.iter_batched(graph, backward, BatchSize::PerIteration);
    });
    group.bench_function("forward and backward", |b| {
        let loss = loss();
        b.iter(|| finished(device, || extractor.gradient(&content, timestep, &references, &loss).unwrap()));
    });
    group.bench_function("whole step", |b| {
        let extractor = model.extractor((SIDE, SIDE)).unwrap();
        let mut run = Distiller::style_transfer(extractor, timesteps.clone(), targets(), 0.2).unwrap();
        b.iter(|| {
            run.step = 10;
            finished(device, || run.advance().unwrap())
        });
    });
    #[cfg(feature = "cuda-graphs")]
    if let (true, Ok(graphs)) = (device.is_cuda(), attention_distillation::cuda_graphs::CudaGraphs::new()) {
        let endless = vec![timestep; 1 << 20];
        let run = Distiller::style_transfer(model.extractor((SIDE, SIDE)).unwrap(), endless, targets(), 0.2).unwrap();
        let mut run = run.with_graphs(graphs);
        group.bench_function("whole step, CUDA graphs", |b| b.iter(|| finished(device, || run.advance().unwrap())));
    }
    group.finish();

    let mut group = c.benchmark_group("Adam");
    let mut parameter = content.copy();
    let gradient = parameter.randn_like();
    group.throughput(Throughput::Elements(parameter.numel() as u64));
    group.bench_function(format!("{:?}", parameter.size()), |b| {
        let mut adam = Adam::default();
        b.iter(|| finished(device, || adam.step(&mut parameter, &gradient).unwrap()));
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = common::criterion();
    targets = step
}
criterion_main!(benches);
