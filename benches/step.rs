//! One step of the optimisation with the bundled model at 256 px: of a style transfer, whole and in its parts, and of textures,
//! from noise and with masks. An element is a pixel of a picture, or for Adam one number of the latents.
#![allow(clippy::disallowed_methods, missing_docs)]

mod common;

use attention_distillation::tch::{self, Tensor};
use attention_distillation::{
    fill, AdLoss, Adam, AttentionHook, AttentionKind, AttentionSite, ContentLoss, Denoiser, Distiller, FeatureExtractor, LabelMap, Loss, Noise,
    Optimizer, PlainAttention, Qkv, References, Result, StableDiffusion, Style, TotalLoss,
};
use common::{device_and_kind, finished, memory};
use criterion::{criterion_group, criterion_main, BatchSize, Criterion, Throughput};
use std::ops::Range;

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

fn step(c: &mut Criterion) {
    let Some(folder) = common::model() else { return };
    let (device, kind) = device_and_kind();
    let model = StableDiffusion::open(folder, device, kind).unwrap();
    let latents = |name: &str| model.encode(&common::picture_of(name, (SIDE, SIDE))).unwrap();
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
        memory::bench(&mut group, device, &format!("features, {name} six layers"), |b| {
            b.iter(|| finished(device, || tch::no_grad(|| extractor.extract(&content, timestep).unwrap())));
        });
    }
    memory::bench(&mut group, device, "features, pass not ended", |b| {
        b.iter(|| {
            finished(device, || {
                let mut hook = Endless { layers: extractor.layers.clone(), kept: vec![] };
                let prediction = tch::no_grad(|| model.forward(&content, timestep, &extractor.condition, &mut hook).unwrap());
                assert_eq!(hook.kept.len(), extractor.layers.len());
                (hook, prediction)
            })
        });
    });
    memory::bench(&mut group, device, "backward", |b| {
        let graph = || {
            let leaf = content.detach().set_requires_grad(true);
            let value = loss().evaluate(&extractor.extract(&leaf, timestep).unwrap(), &references).unwrap();
            finished(device, || (leaf, value))
        };
        let backward = |(leaf, value): (Tensor, Tensor)| finished(device, || Tensor::run_backward(&[value], &[leaf], false, false));
        b.iter_batched(graph, backward, BatchSize::PerIteration);
    });
    memory::bench(&mut group, device, "forward and backward", |b| {
        let loss = loss();
        b.iter(|| finished(device, || extractor.gradient(&content, timestep, &references, &loss).unwrap()));
    });
    memory::bench(&mut group, device, "whole step", |b| {
        let extractor = model.extractor((SIDE, SIDE)).unwrap();
        let mut run = Distiller::style_transfer(extractor, timesteps.clone(), targets(), 0.2).unwrap();
        b.iter(|| {
            run.step = 10;
            finished(device, || run.advance().unwrap())
        });
    });
    #[cfg(feature = "cuda-graphs")]
    match attention_distillation::cuda_graphs::CudaGraphs::new() {
        Err(reason) => eprintln!("skipped: whole step, CUDA graphs: {reason}"),
        Ok(_) if !device.is_cuda() => {}
        Ok(graphs) => {
            let endless = vec![timestep; 1 << 20];
            let run = Distiller::style_transfer(model.extractor((SIDE, SIDE)).unwrap(), endless, targets(), 0.2).unwrap();
            let mut run = run.with_graphs(graphs);
            memory::bench(&mut group, device, "whole step, CUDA graphs", |b| b.iter(|| finished(device, || run.advance().unwrap())));
        }
    }
    group.finish();

    let mut group = c.benchmark_group("Adam");
    let mut parameter = content.copy();
    let gradient = parameter.randn_like();
    group.throughput(Throughput::Elements(parameter.numel() as u64));
    memory::bench(&mut group, device, &format!("{:?}", parameter.size()), |b| {
        let mut adam = Adam::default();
        b.iter(|| finished(device, || adam.step(&mut parameter, &gradient).unwrap()));
    });
    group.finish();
}

/// Without a content, from noise, one or two at once; and with the regions of masks, held to their filled layout.
fn textures(c: &mut Criterion) {
    let Some(folder) = common::model() else { return };
    let (device, kind) = device_and_kind();
    let size = (SIDE, SIDE);
    let model = StableDiffusion::open(folder, device, kind).unwrap();
    let pixels = (SIDE * SIDE) as u64;
    let timesteps = model.timesteps(20).unwrap();

    let mut group = c.benchmark_group(format!("textures, bundled model, {SIDE} px"));
    let gravel = model.encode(&common::picture_of("texture_gravel.png", size)).unwrap();
    for (name, count) in [("whole step, from noise", 1), ("whole step, two from noise", 2)] {
        let start = model.noise(count, size, &mut Noise::seeded(0)).unwrap();
        let references = References::style(gravel.shallow_clone());
        let mut run = Distiller::new(model.extractor(size).unwrap(), timesteps.clone(), references, start);
        group.throughput(Throughput::Elements(count as u64 * pixels));
        memory::bench(&mut group, device, name, |b| {
            b.iter(|| {
                run.step = 10;
                finished(device, || run.advance().unwrap())
            });
        });
    }

    let source = common::picture_of("style_harvest.png", size);
    let [ours, theirs] = ["labels_hill.png", "labels_harvest.png"].map(|name| LabelMap::from_picture(&common::picture(name)).unwrap());
    let filled = model.encode(&fill(&source, &theirs, &ours.resized(size).unwrap(), 0).unwrap()).unwrap();
    let style = Style::new(model.encode(&source).unwrap()).with_labels(theirs.to_device(device).unwrap());
    let references = References::styles([style]).with_labels(ours.to_device(device).unwrap()).with_content(filled);
    // One run for all samples: what the masks come to is made in its first step.
    let mut run = Distiller::style_transfer(model.extractor(size).unwrap(), timesteps, references, 0.2).unwrap();
    group.throughput(Throughput::Elements(pixels));
    memory::bench(&mut group, device, "whole step, masks", |b| {
        b.iter(|| {
            run.step = 10;
            finished(device, || run.advance().unwrap())
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = common::criterion();
    targets = step, textures, memory::peak
}
criterion_main!(benches);
