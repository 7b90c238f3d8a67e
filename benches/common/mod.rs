//! What the benches share: the device, waiting for it, and settings that keep a run short.

use attention_distillation::{
    device,
    tch::{self, Cuda, Device, Kind},
};
use criterion::Criterion;
use std::time::Duration;

/// Few samples: calls take milliseconds to seconds, and `cargo bench` is to end within some six minutes on two idle cores.
pub fn criterion() -> Criterion {
    Criterion::default().sample_size(10).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(5)).without_plots()
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
