//! Steps of a run give back what they take: memory stands still, however many follow. The figures are the whole process's, so
//! this file has one test and a process of its own.
#![cfg(feature = "stable-diffusion")]
#![allow(clippy::disallowed_methods, clippy::unwrap_used, missing_docs)] // A test may panic.

mod memory;

use attention_distillation::{image, Distiller, FeatureCache, Features, GuidedSampler, Noise, References, Settings, StableDiffusion, Style};
use memory::{say, Memory};
use std::path::Path;
use tch::{Device, Kind, Tensor};

const SIZE: (i64, i64) = (64, 64);

/// Steps before the first look: kernels are made at first use, the allocator's pools fill, and so does the cache.
const WARM_UP: usize = 8;

/// Steps between the two looks.
const STEPS: usize = 40;

/// What may be resident in addition at the second look, in KiB: the allocator need not give back what is free.
const RESIDENT: i64 = 4 << 10;

/// What may be allocated in addition, in KiB. A step that kept nothing but its latents, 8 KiB, would be over it in all.
const ALLOCATED: i64 = 64;

/// From the end of the warm-up to the last step.
fn growth(mut step: impl FnMut()) -> Memory {
    (0..WARM_UP).for_each(|_| step());
    let before = Memory::now().unwrap();
    (0..STEPS).for_each(|_| step());
    Memory::now().unwrap().since(before)
}

/// In KiB.
fn weight(features: &Features) -> i64 {
    let of = |tensor: &Tensor| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as i64;
    features.layers().map(|layer| [&layer.query, &layer.key, &layer.value, layer.output().unwrap()].map(of).iter().sum::<i64>()).sum::<i64>() >> 10
}

#[test]
fn steps_leave_nothing_behind() {
    tch::set_num_threads(1);
    if Memory::now().is_none() {
        return say("skipped: steps_leave_nothing_behind reads /proc/self/status, which this system does not have");
    }
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets");
    let model = StableDiffusion::open(assets.join("mini"), Device::Cpu, Kind::Float).unwrap();
    let latents = |name: &str| {
        let picture = image::load(assets.join("pictures").join(name)).unwrap();
        model.encode(&image::resize(&picture, SIZE).unwrap()).unwrap()
    };
    let (content, style) = (latents("content_astronaut.png"), latents("style_harvest.png"));
    let references = || References::style(style.shallow_clone()).with_content(content.shallow_clone());

    // The same timesteps over and over, of which the cache has room for some.
    let cache = FeatureCache::new(2 << 20);
    let timesteps: Vec<f64> = model.timesteps(WARM_UP).unwrap().into_iter().cycle().take(WARM_UP + STEPS).collect();
    let transfer = || {
        let mut references = references();
        references.styles = vec![Style::new(style.shallow_clone()).with_cache(cache.clone())];
        Distiller::style_transfer(model.extractor(SIZE).unwrap(), timesteps.clone(), references, 0.2).unwrap()
    };
    let mut run = transfer();
    let transferred = growth(|| assert!(run.advance().unwrap().is_some()));
    assert!((1..WARM_UP).contains(&cache.len()), "{} timesteps of {WARM_UP} in the cache", cache.len());

    let mut noise = Noise::seeded(0);
    let start = model.noise(1, SIZE, &mut noise).unwrap();
    let (scheduler, guidance) = (model.ddim(WARM_UP + STEPS).unwrap(), model.guidance(&[""], None, 3.0, SIZE).unwrap());
    let run = GuidedSampler::new(model.extractor(SIZE).unwrap(), scheduler, guidance, references(), start, noise);
    let mut run = run.with_settings(&Settings::text_to_image()).unwrap();
    run.iterations = 1;
    let sampled = growth(|| assert!(run.advance().unwrap().is_some()));

    // What the same looks find where each step's features are kept, or no more than latents.
    let mut run = transfer();
    let mut features = vec![];
    let hoarded = growth(|| {
        let timestep = run.advance().unwrap().unwrap().timestep;
        features.push(tch::no_grad(|| run.extractor.extract(&run.latents, timestep).unwrap()));
    });
    let mut copies = vec![];
    let copied = growth(|| copies.push(content.copy()));

    say(&format!("{STEPS} steps, in KiB: transfer {transferred:?}, sampling {sampled:?}, with features kept {hoarded:?}, latents {copied:?}"));
    let features = weight(&features[0]) * STEPS as i64;
    assert!(features > 4 * RESIDENT && hoarded.resident > 4 * RESIDENT, "kept features of {features} KiB would not be found");
    // Where another allocator has taken glibc's place, that one hands out nothing and says so.
    let counted = hoarded.allocated.is_some_and(|grown| grown > features / 2);
    assert!(!counted || copied.allocated.is_some_and(|grown| grown > 4 * ALLOCATED), "kept latents would not be found");
    for (what, grown) in [("transfer", transferred), ("sampling", sampled)] {
        assert!(grown.resident < RESIDENT && (!counted || grown.allocated.is_some_and(|grown| grown < ALLOCATED)), "{what} grew: {grown:?}");
    }

    // What steps took and freed, the autoencoder need not go without. Pieces of 1 MiB among some that stay, which alone hold glibc's memory back:
    // those that follow a freed one of 16 MiB are no longer mappings of their own.
    drop(Tensor::ones([4 << 20], (Kind::Float, Device::Cpu)));
    let start = Memory::now().unwrap();
    let (kept, freed): (Vec<_>, Vec<_>) =
        (0..200).map(|i| (i % 8 == 0, Tensor::ones([1 << 18], (Kind::Float, Device::Cpu)))).partition(|(stays, _)| *stays);
    drop(freed);
    let before = Memory::now().unwrap();
    let held = before.since(start).resident - (kept.len() as i64) * 1024;
    let _picture = model.decode(&content).unwrap();
    let given_back = -Memory::now().unwrap().since(before).resident;
    say(&format!("{given_back} KiB given back of {held} held"));
    // An allocator that was told to hold nothing has nothing to give.
    assert!(!counted || held < 100 << 10 || given_back > held / 2, "{given_back} KiB given back of {held}");

    // Where freed memory is kept, it is not always taken again as it was: nor does that add up. (In the heap of the test's own thread. And at the
    // end, as it is for good.)
    attention_distillation::keep_freed_memory();
    let mut run = transfer();
    let grown = growth(|| assert!(run.advance().unwrap().is_some()));
    say(&format!("with freed memory kept {grown:?}"));
    assert!(grown.resident < RESIDENT && (!counted || grown.allocated.is_some_and(|grown| grown < ALLOCATED)), "it grew: {grown:?}");
}
