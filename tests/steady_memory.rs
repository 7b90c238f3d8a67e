//! Steps of a run give back what they take: memory stands still, however many follow. The figure is the whole process's, so this
//! file has one test and a process of its own.
#![cfg(feature = "stable-diffusion")]
#![allow(clippy::disallowed_methods, clippy::unwrap_used, missing_docs)] // A test may panic.

use attention_distillation::{
    image, Distiller, FeatureCache, FeatureExtractor, Features, GuidedSampler, Noise, References, Scheduler, Settings, StableDiffusion, Style,
};
use std::{fs, io::Write, path::Path};
use tch::{Device, Kind, Tensor};

const SIZE: (i64, i64) = (64, 64);

/// Timesteps of a run.
const STEPS: usize = 10;

/// Runs before the first look: the allocator's pools fill, and kernels are made at first use.
const WARM_UP: usize = 2;

/// Runs between the two looks.
const RUNS: usize = 8;

/// What the allocator may keep in the meantime, in KiB.
const BOUND: i64 = 8 << 10;

/// In KiB; none where the system does not tell.
fn resident() -> Option<i64> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// In KiB.
fn growth(mut run: impl FnMut()) -> i64 {
    (0..WARM_UP).for_each(|_| run());
    let before = resident().unwrap();
    (0..RUNS).for_each(|_| run());
    resident().unwrap() - before
}

/// In KiB.
fn weight(features: &Features) -> i64 {
    let of = |tensor: &Tensor| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as i64;
    features.layers().map(|layer| [&layer.query, &layer.key, &layer.value, layer.output().unwrap()].map(of).iter().sum::<i64>()).sum::<i64>() >> 10
}

/// Not by `eprintln!`, which is shown for failed tests only.
fn say(text: &str) {
    std::io::stderr().write_all(format!("{text}\n").as_bytes()).unwrap();
}

#[test]
fn steps_leave_nothing_behind() {
    tch::set_num_threads(1);
    if resident().is_none() {
        return say("skipped: steps_leave_nothing_behind reads /proc/self/status, which this system does not have");
    }
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets");
    let model = StableDiffusion::open(assets.join("mini"), Device::Cpu, Kind::Float).unwrap();
    let latents = |name: &str| {
        let picture = image::load(assets.join("pictures").join(name)).unwrap();
        model.encode(&image::resize(&picture, SIZE).unwrap()).unwrap()
    };
    let (content, style) = (latents("content_astronaut.png"), latents("style_harvest.png"));
    let extractor = || model.extractor(SIZE).unwrap();

    // One run after the other, all with one cache, which is full after the first.
    let cache = FeatureCache::new(64 << 20);
    let timesteps = model.timesteps(STEPS).unwrap();
    let transfer = |each: &mut dyn FnMut(&FeatureExtractor<&StableDiffusion>, &Tensor, f64)| {
        let style = Style::new(style.shallow_clone()).with_cache(cache.clone());
        let references = References::styles([style]).with_content(content.shallow_clone());
        let mut run = Distiller::style_transfer(extractor(), timesteps.clone(), references, 0.2).unwrap();
        while let Some(progress) = run.advance().unwrap() {
            each(&run.extractor, &run.latents, progress.timestep);
        }
    };
    let transfers = growth(|| transfer(&mut |_, _, _| ()));
    assert_eq!(cache.len(), STEPS);

    let guidance = || model.guidance(&[""], None, 3.0, SIZE).unwrap();
    let samplings = growth(|| {
        let mut noise = Noise::seeded(0);
        let start = model.noise(1, SIZE, &mut noise).unwrap();
        let references = References::style(style.shallow_clone()).with_content(content.shallow_clone());
        let run = GuidedSampler::new(extractor(), model.ddim(STEPS).unwrap(), guidance(), references, start, noise);
        run.with_settings(&Settings::text_to_image()).unwrap().finish().unwrap();
    });

    // What the same looks find where each step's features are kept.
    let mut kept: Vec<Features> = vec![];
    let hoarded = growth(|| {
        transfer(&mut |extractor, latents, timestep| kept.push(tch::no_grad(|| extractor.extract(latents, timestep).unwrap())));
    });
    let each = weight(&kept[0]);
    say(&format!("{} steps: transfers {transfers} KiB, samplings {samplings} KiB; with features of {each} KiB kept, {hoarded} KiB", RUNS * STEPS));
    assert!(each * (RUNS * STEPS) as i64 > 4 * BOUND && hoarded > 4 * BOUND, "the looks would not find a leak: {hoarded} KiB, {each} KiB a step");
    assert!(transfers < BOUND, "transfers grew by {transfers} KiB");
    assert!(samplings < BOUND, "samplings grew by {samplings} KiB");
}
