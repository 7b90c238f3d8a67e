//! What the benches share: the device, waiting for it, the bundled model's folder, and settings that keep a run short.
#![allow(dead_code)] // Each bench uses a part of it.

pub mod memory;

use attention_distillation::{
    device, image,
    tch::{self, Cuda, Device, Kind, Tensor},
};
use criterion::Criterion;
use std::{path::Path, time::Duration};

/// Few samples: calls take milliseconds to seconds, and `cargo bench` is to end within some nine minutes on two idle cores. By the
/// number of calls and the time of one: attention 1.3 minutes, losses 2, steps and textures 1.5, autoencoder 0.3, sampling 4.
pub fn criterion() -> Criterion {
    // As the examples do before all else.
    attention_distillation::keep_freed_memory();
    Criterion::default().sample_size(10).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(4)).without_plots()
}

/// The GPU where there is one, and what networks run in there; says so once, since the numbers mean nothing without.
pub fn device_and_kind() -> (Device, Kind) {
    static SAID: std::sync::Once = std::sync::Once::new();
    let device = device::best();
    let kind = device::kind(device);
    SAID.call_once(|| eprintln!("on {device:?} in {kind:?}, {} threads", tch::get_num_threads()));
    (device, kind)
}

/// Runs `f` and waits for its end: on a GPU, a call only queues its work.
pub fn finished<T>(device: Device, f: impl FnOnce() -> T) -> T {
    let result = f();
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
    result
}

/// The bundled model. The published package comes without it and the pictures.
pub fn model() -> Option<&'static Path> {
    static SAID: std::sync::Once = std::sync::Once::new();
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/mini"));
    if folder.is_dir() {
        return Some(folder);
    }
    SAID.call_once(|| eprintln!("skipped: there is no {}, the published package comes without it", folder.display()));
    None
}

/// One of the repository's pictures.
pub fn picture(name: &str) -> Tensor {
    image::load(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/pictures")).join(name)).unwrap()
}

/// The same in another size.
pub fn picture_of(name: &str, size: (i64, i64)) -> Tensor {
    image::resize(&picture(name), size).unwrap()
}
