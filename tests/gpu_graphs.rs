//! Runs by CUDA graphs are the runs without. Where there is no GPU these tests say so and pass. A file of its own, and one test at a
//! time: memory is counted.
#![cfg(all(feature = "cuda-graphs", feature = "stable-diffusion"))]
#![allow(clippy::disallowed_methods, clippy::unwrap_used, missing_docs)]

use attention_distillation::cuda_graphs::CudaGraphs;
use attention_distillation::{
    image, ContentLoss, Distiller, Error, Guidance, GuidedSampler, LabelMap, Noise, References, StableDiffusion, Style, Windows,
};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::{io::Write, path::PathBuf};
use tch::{Device, Kind, Tensor};

/// The first GPU, for this test alone; none where graphs cannot be used, which is told.
fn gpu(test: &str) -> Option<(MutexGuard<'static, ()>, Device)> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    tch::set_num_threads(1);
    if let Err(reason) = CudaGraphs::new() {
        // Not by `eprintln!`, which is shown for failed tests only.
        std::io::stderr().write_all(format!("skipped: {test} needs a GPU and the library for graphs: {reason}\n").as_bytes()).unwrap();
        return None;
    }
    Some((ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner), Device::Cuda(0)))
}

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn model(device: Device, kind: Kind) -> StableDiffusion {
    StableDiffusion::open(folder("assets/mini"), device, kind).unwrap()
}

fn transfer(model: &StableDiffusion, steps: usize) -> Distiller<&StableDiffusion> {
    let latents = |name: &str| {
        let picture = image::load(folder("assets/pictures").join(name)).unwrap();
        model.encode(&image::resize(&picture, (64, 64)).unwrap()).unwrap()
    };
    let references = References::style(latents("style_harvest.png")).with_content(latents("content_astronaut.png"));
    Distiller::style_transfer(model.extractor((64, 64)).unwrap(), model.timesteps(steps).unwrap(), references, 0.2).unwrap()
}

fn levels(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().mean(Kind::Float).double_value(&[]) * 255.0
}

#[test]
fn a_run_by_graphs_ends_in_the_same_picture() {
    let Some((_alone, device)) = gpu("a_run_by_graphs_ends_in_the_same_picture") else { return };
    for (kind, checkpointing, adain, smoothing) in [
        (Kind::Float, false, false, 0.0),
        (Kind::Float, true, false, 0.0),
        (Kind::BFloat16, false, false, 0.0),
        (Kind::Half, false, false, 0.0),
        (Kind::Float, false, true, 0.0),
        (Kind::Float, false, true, 0.4),
        (Kind::BFloat16, false, true, 0.4),
    ] {
        let mut model = model(device, kind);
        model.set_gradient_checkpointing(checkpointing);
        let run = || {
            let mut run = transfer(&model, 8);
            (run.iterations, run.adain, run.references.smoothing) = (2, adain, smoothing);
            run
        };
        let eager = |noise: f64| {
            let mut run = run();
            run.latents = &run.latents + run.latents.sin() * noise;
            let first = run.advance().unwrap().unwrap().loss().unwrap().unwrap();
            (first, model.decode(&run.finish().unwrap()).unwrap())
        };
        let mut graphed = run().with_graphs(CudaGraphs::new().unwrap());
        let first = graphed.advance().unwrap().unwrap().loss().unwrap().unwrap();
        // Memory that the graph may not have taken for its own.
        let others: Vec<_> = (0..200).map(|i| Tensor::ones([i + 1, 4, 8, 8], (Kind::Float, device))).collect();
        let ours = model.decode(&graphed.finish().unwrap()).unwrap();
        // Noise on the last bits of the start shows what roundings come to: Adam turns them into steps where gradients are near 0. On a
        // CPU, in f32, that is 2 grey levels; a graph that keeps references or timestep of its capture is off by 13 and 14, one that
        // does half the iterations by 11.
        let ((wanted, theirs), (_, other)) = (eager(0.0), eager(1e-6));
        let (found, rounding) = (levels(&ours, &theirs), levels(&other, &theirs));
        println!(
            "{kind:?}, checkpointing {checkpointing}, AdaIN {adain}, smoothing {smoothing}: first loss {first} and {wanted}; {found} grey levels, roundings {rounding}"
        );
        assert!((first - wanted).abs() < if kind == Kind::Float { 1e-2 } else { 5e-2 } * wanted, "{kind:?}: {first} {wanted}");
        assert!(rounding < 4.0, "{kind:?}: roundings of {rounding} grey levels, among which no fault would be seen");
        assert!(found < 1.0 + 2.0 * rounding, "{kind:?}: {found} grey levels on average, roundings {rounding}");
        drop(others);
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Task {
    /// From noise towards one style.
    Plain,
    /// Over a canvas of twice the width, whose last batch of views is smaller.
    Windows,
    /// With prompt and negative in one pass, two styles of the content's size, one of which counts half, and the content: a bias by weights, and
    /// references that share passes. The bundled model has one text for all, so that guidance by it is none.
    Guided,
    /// The same of a network that reads texts, with two of them.
    Prompts,
    /// Towards a style of the same labels.
    Regions,
    /// Towards a style and a content, by which the queries are smoothed.
    Smoothed,
}

fn sampling(model: &StableDiffusion, steps: usize, task: Task) -> GuidedSampler<&StableDiffusion> {
    let latents = |name: &str| {
        let picture = image::load(folder("assets/pictures").join(name)).unwrap();
        model.encode(&image::resize(&picture, (64, 64)).unwrap()).unwrap()
    };
    let style = || Style::new(latents("style_harvest.png"));
    let mut noise = Noise::seeded(4);
    let start = model.noise(1, if task == Task::Windows { (64, 128) } else { (64, 64) }, &mut noise).unwrap();
    let condition = || model.prompts(&[""], (64, 64)).unwrap();
    let guidance = match task {
        Task::Guided => Guidance::new(condition(), condition(), 7.5).unwrap(),
        Task::Prompts => model.guidance(&["a house by the sea"], Some("a red square"), 7.5, (64, 64)).unwrap(),
        _ => Guidance::none(condition()),
    };
    let references = match task {
        Task::Plain | Task::Windows => References::styles([style()]),
        Task::Guided | Task::Prompts => {
            let styles = [style(), Style::new(latents("style_cafe_terrace.png")).with_weight(0.5)];
            References::styles(styles).with_content(latents("content_astronaut.png"))
        }
        Task::Smoothed => References::styles([style()]).with_content(latents("content_astronaut.png")).with_smoothing(0.4),
        Task::Regions => {
            let labels = |values: [i64; 2]| LabelMap::new(&Tensor::from_slice(&values).view([1, 1, 1, 2])).unwrap();
            References::styles([style().with_labels(labels([0, 1]))]).with_labels(labels([1, 0]))
        }
    };
    let mut run = GuidedSampler::new(model.extractor((64, 64)).unwrap(), model.ddim(steps).unwrap(), guidance, references, start, noise);
    (run.iterations, run.adain, run.optimizer.config.learning_rate) = (2, true, 0.015);
    if matches!(task, Task::Guided | Task::Prompts | Task::Smoothed) {
        run.loss = run.loss.plus(0.2, ContentLoss);
    }
    if task == Task::Windows {
        let views = Windows::new(16, 4).with_batch(3);
        assert_eq!(views.views((16, 32)).unwrap().count(), 5);
        run.windows = Some(views);
    }
    run
}

#[test]
fn guided_sampling_by_graphs_ends_in_the_same_picture() {
    let Some((_alone, device)) = gpu("guided_sampling_by_graphs_ends_in_the_same_picture") else { return };
    let in_f32 = [Task::Plain, Task::Windows, Task::Guided, Task::Prompts, Task::Regions, Task::Smoothed].map(|task| (Kind::Float, task));
    for (kind, task) in in_f32.into_iter().chain([(Kind::BFloat16, Task::Guided), (Kind::BFloat16, Task::Smoothed), (Kind::Half, Task::Windows)]) {
        let model = match task {
            Task::Prompts => StableDiffusion::open(folder("tests/fixtures/sd15"), device, kind).unwrap(),
            _ => model(device, kind),
        };
        let eager = |noise: f64| {
            let mut run = sampling(&model, 8, task);
            run.latents = &run.latents + run.latents.sin() * noise;
            model.decode(&run.finish().unwrap()).unwrap()
        };
        let mut graphed = sampling(&model, 8, task).with_graphs(CudaGraphs::new().unwrap());
        graphed.advance().unwrap();
        // Memory that the graphs may not have taken for their own.
        let others: Vec<_> = (0..200).map(|i| Tensor::ones([i + 1, 4, 8, 8], (Kind::Float, device))).collect();
        let ours = model.decode(&graphed.finish().unwrap()).unwrap();
        // On a CPU, in f32, plain and in windows: roundings come to 0.001 grey levels at most; references, latents or timesteps of the capture
        // in any of the graphs to 5.9 to 16, half the iterations to 2.7 and 4.0, an Adam that is not fresh to 3.1 and 4.9; of two prompts roundings to
        // 0.001, either of them alone to 32 and 34, one for the other to 38.
        let (theirs, other) = (eager(0.0), eager(1e-6));
        let (found, rounding) = (levels(&ours, &theirs), levels(&other, &theirs));
        println!("{kind:?}, {task:?}: {found} grey levels, roundings {rounding}");
        assert!(rounding < 4.0, "{kind:?}, {task:?}: roundings of {rounding} grey levels, among which no fault would be seen");
        assert!(found < 1.0 + 2.0 * rounding, "{kind:?}, {task:?}: {found} grey levels on average, roundings {rounding}");
        drop(others);
    }
}

#[test]
fn not_a_number_is_told_at_the_end() {
    let Some((_alone, device)) = gpu("not_a_number_is_told_at_the_end") else { return };
    let model = model(device, Kind::Float);
    let mut run = transfer(&model, 5).with_graphs(CudaGraphs::new().unwrap());
    run.advance().unwrap();
    run.advance().unwrap();
    run.change(|run| run.references.styles[0].of = run.references.styles[0].of.zeros_like() / 0.0);
    for step in [3, 4] {
        assert_eq!(run.advance().unwrap().unwrap().step, step);
    }
    let error = run.advance().unwrap_err();
    assert!(matches!(error, Error::NotFinite { what: "loss or latents", step: 3, .. }), "{error}");
    assert_eq!(run.run().step, 2);
    assert!(bool::try_from(run.run().latents.isfinite().all()).unwrap());
}

/// What cannot be captured is an error, and the GPU is of use afterwards.
#[test]
fn what_waits_for_the_gpu_cannot_be_captured() {
    use attention_distillation::{Features, Loss, Result, TotalLoss};
    struct Waits;
    impl Loss for Waits {
        fn evaluate(&self, picture: &Features, _: &References<Features>) -> Result<Tensor> {
            let query = picture.layers().next().unwrap().query.to_kind(Kind::Float).square().mean(Kind::Float);
            let value = query.f_double_value(&[])?;
            Ok(query * value)
        }
    }
    let Some((_alone, device)) = gpu("what_waits_for_the_gpu_cannot_be_captured") else { return };
    let model = model(device, Kind::Float);
    let mut run = transfer(&model, 3);
    run.loss = TotalLoss::default().plus(1.0, Waits);
    let mut run = run.with_graphs(CudaGraphs::new().unwrap());
    let error = run.advance().unwrap_err();
    println!("{error}");
    assert_eq!(run.run().step, 0);
    // Its own generator, too, which a capture makes part of itself.
    let drawn = Tensor::randn([64], (Kind::Float, device));
    assert!(drawn.std(true).double_value(&[]) > 0.1);
    let _ = run.into_run().finish().unwrap();
    let _ = transfer(&model, 3).with_graphs(CudaGraphs::new().unwrap()).finish().unwrap();
    // Into memory that earlier captures have a share in, by the same recorder.
    let wanted = model.decode(&sampling(&model, 4, Task::Plain).finish().unwrap()).unwrap();
    let mut run = sampling(&model, 4, Task::Plain).with_graphs(CudaGraphs::new().unwrap());
    let sound = run.change(|run| std::mem::replace(&mut run.loss, TotalLoss::default().plus(1.0, Waits)));
    assert!(run.advance().is_err());
    run.change(|run| run.loss = sound);
    let found = levels(&model.decode(&run.finish().unwrap()).unwrap(), &wanted);
    assert!(found < 1.0, "{found} grey levels");
}

/// Memory in use on the first GPU, in MiB, where there is an `nvidia-smi` to ask.
fn used() -> Option<i64> {
    // Where some GPUs are hidden, CUDA counts the others from 0.
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok().and_then(|list| list.split(',').next().map(|id| id.trim().to_owned()));
    let id = visible.filter(|id| !id.is_empty()).unwrap_or_else(|| "0".to_owned());
    let query = ["--id", &id, "--query-gpu=memory.used", "--format=csv,noheader,nounits"];
    let output = std::process::Command::new("nvidia-smi").args(query).output().ok()?;
    String::from_utf8(output.stdout).ok()?.lines().next()?.trim().parse().ok()
}

/// Each with a model and recorders of its own: one captures while another is at work, and while another drops what it had.
#[test]
fn two_threads_have_graphs_at_once() {
    let Some((_alone, device)) = gpu("two_threads_have_graphs_at_once") else { return };
    let wanted = model(device, Kind::Float).decode(&transfer(&model(device, Kind::Float), 4).finish().unwrap()).unwrap();
    let wanted = wanted.to_device(Device::Cpu);
    let runs = move || {
        tch::set_num_threads(1);
        let model = model(device, Kind::Float);
        let mut pictures = vec![];
        for _ in 0..4 {
            let latents = transfer(&model, 4).with_graphs(CudaGraphs::new().unwrap()).finish().unwrap();
            pictures.push(model.decode(&latents).unwrap().to_device(Device::Cpu));
        }
        pictures
    };
    let threads = [std::thread::spawn(runs), std::thread::spawn(runs)];
    for picture in threads.into_iter().flat_map(|thread| thread.join().unwrap()) {
        let found = levels(&picture, &wanted);
        assert!(found < 1.0, "{found} grey levels");
    }
}

#[test]
fn repetitions_take_no_memory() {
    let Some((_alone, device)) = gpu("repetitions_take_no_memory") else { return };
    if used().is_none() {
        std::io::stderr().write_all(b"skipped: repetitions_take_no_memory asks nvidia-smi, which is not there\n").unwrap();
        return;
    }
    let model = model(device, Kind::Float);
    let mut run = transfer(&model, 400).with_graphs(CudaGraphs::new().unwrap());
    for _ in 0..20 {
        run.advance().unwrap();
    }
    let before = used().unwrap();
    while run.run().step < 399 {
        run.advance().unwrap();
    }
    let after = used().unwrap();
    let _ = run.finish().unwrap();
    let without = used().unwrap();
    println!("{before} MiB after 20 timesteps, {after} MiB after 399, {without} MiB without the graphs");
    assert!(without < after, "the graphs' memory was not given back: {after} to {without} MiB");
    // The features of a timestep are 1.2 MiB at this size: if each left a set behind, this would be 460 MiB.
    assert!(after - before < 64, "{before} to {after} MiB");
    // Nor do runs, one after the other, each with a recorder of its own.
    let sampled = || {
        let _ = sampling(&model, 4, Task::Windows).with_graphs(CudaGraphs::new().unwrap()).finish().unwrap();
        used().unwrap()
    };
    let first = sampled();
    let last = (0..6).fold(first, |_, _| sampled());
    println!("{first} MiB after a run in windows, {last} MiB after six more");
    assert!(last - first < 64, "{first} to {last} MiB");
}
