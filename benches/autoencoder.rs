//! The bundled model's autoencoder at 256 px: what a run begins and ends with, and one epoch of a decoder's tuning. An element
//! is a pixel.
#![allow(clippy::disallowed_methods, missing_docs)]

mod common;

use attention_distillation::stable_diffusion::{AutoencoderKl, DecoderTuning, TuningConfig};
use attention_distillation::{tch::Kind, StableDiffusion};
use common::{device_and_kind, finished, memory};
use criterion::{criterion_group, criterion_main, Criterion, Throughput};

const SIZE: (i64, i64) = (256, 256);

fn autoencoder(c: &mut Criterion) {
    let Some(folder) = common::model() else { return };
    let (device, kind) = device_and_kind();
    let model = StableDiffusion::open(folder, device, kind).unwrap();
    let picture = common::picture_of("style_harvest.png", SIZE).to_device(device);
    let latents = model.encode(&picture).unwrap();

    let mut group = c.benchmark_group(format!("autoencoder, bundled model, {} px", SIZE.0));
    group.throughput(Throughput::Elements((SIZE.0 * SIZE.1) as u64));
    memory::bench(&mut group, device, "encode", |b| b.iter(|| finished(device, || model.encode(&picture).unwrap())));
    memory::bench(&mut group, device, "decode", |b| b.iter(|| finished(device, || model.decode(&latents).unwrap())));

    let vae = AutoencoderKl::open(folder.join("vae"), device, Kind::Float).unwrap();
    let mut config = TuningConfig::default();
    config.epochs = usize::MAX;
    let mut tuning = DecoderTuning::new(vae, &picture, config).unwrap();
    memory::bench(&mut group, device, "epoch of tuning", |b| b.iter(|| finished(device, || tuning.advance().unwrap())));
    group.finish();
}

criterion_group! {
    name = benches;
    config = common::criterion();
    targets = autoencoder, memory::peak
}
criterion_main!(benches);
