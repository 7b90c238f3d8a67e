//! Guided sampling by graphs, without a GPU: a stand-in does the captured work again, on the same tensors, where a GPU would repeat it.
#![cfg(feature = "cuda-graphs")]
#![allow(clippy::disallowed_methods, missing_docs)]

mod graphs;
mod toy;

use attention_distillation::cuda_graphs::{CudaGraphs, GraphedSampler};
use attention_distillation::{
    AdLoss, ContentLoss, Ddim, DdimConfig, Error, FeatureExtractor, Guidance, GuidedSampler, LabelMap, Noise, References, Scheduler, Style,
    TotalLoss, Windows,
};
use graphs::{Again, Noting, NotingLoss};
use std::sync::{Arc, Mutex};
use tch::{Kind, Tensor};
use toy::{assert_same, assert_same_run, latents, relative, Toy, Trouble};

type Run<'a> = GuidedSampler<&'a Noting>;

/// Two styles of other sizes than the picture, and a content.
fn references() -> References {
    References::styles([Style::new(latents(9, 8, 8)), Style::new(latents(7, 4, 6))]).with_content(latents(8, 6, 8))
}

fn sampler(net: &Noting, steps: usize) -> Run<'_> {
    tch::set_num_threads(1);
    let guidance = Guidance::new(1.5, 0.5, 3.0).unwrap();
    let schedule = Ddim::new(&DdimConfig::default(), steps).unwrap();
    let extractor = FeatureExtractor::new(net, 1.0, 2..4);
    let mut run = GuidedSampler::new(extractor, schedule, guidance, references(), latents(5, 6, 8), Noise::seeded(3));
    run.loss = run.loss.plus(0.2, ContentLoss);
    run.iterations = 2;
    run
}

fn graphed(run: Run<'_>) -> (GraphedSampler<&Noting, Again>, Again) {
    let recorder = Again::default();
    (run.with_graphs(recorder.clone()), recorder)
}

/// The corrections of Adam's moments are computed by another formula, in f64: in f32 that is a rounding in some of the steps, which
/// the following ones may magnify.
const ROUNDING: f64 = 1e-5;

/// With and without graphs; captures, repetitions, and passes that were made by number in all steps but the first two.
fn both(change: impl Fn(&mut Run)) -> (usize, usize, usize) {
    let net = Noting::new();
    both_on(&net, change)
}

fn both_on(net: &Noting, change: impl Fn(&mut Run)) -> (usize, usize, usize) {
    let [mut eager, mut other] = [(), ()].map(|()| sampler(net, 5));
    change(&mut eager);
    change(&mut other);
    let (mut run, recorder) = graphed(other);
    let mut wanted = vec![];
    while let Some(progress) = eager.advance().unwrap() {
        wanted.push((progress, eager.latents.copy()));
    }
    for (i, (theirs, latents)) in wanted.iter().enumerate() {
        if i == 2 {
            net.by_number.set(0);
        }
        let progress = run.advance().unwrap().unwrap();
        assert_eq!((progress.step, progress.steps, progress.timestep), (theirs.step, theirs.steps, theirs.timestep));
        match (progress.loss().unwrap(), theirs.loss().unwrap()) {
            (Some(ours), Some(theirs)) => assert!((ours - theirs).abs() < ROUNDING * theirs, "{ours} {theirs}"),
            (ours, theirs) => assert_eq!(ours, theirs),
        }
        let off = relative(&run.run().latents, latents);
        assert!(off < ROUNDING, "step {i}: {off:e}");
    }
    assert!(run.advance().unwrap().is_none());
    let noise = [&run.run().noise, &eager.noise].map(|noise| noise.state().unwrap().unwrap());
    assert_eq!(wanted.len(), 5);
    assert_same(&noise[0], &noise[1]);
    assert!(relative(&wanted[4].1, &wanted[1].1) > 0.05, "the run went nowhere");
    (recorder.captures.get(), recorder.replays.get(), net.by_number.get())
}

/// One of the prediction, one of the styles, one of the content, one of an iteration: by the first step, whose timestep is 801.
#[test]
fn a_run_by_graphs_is_the_same_run() {
    let each = |iterations: usize| 5 * (1 + 2 + iterations);
    assert_eq!(both(|_| {}), (4, each(2), 0));
    assert_eq!(both(|run| run.iterations = 3), (4, each(3), 0));
    assert_eq!(both(|run| run.adain = true), (4, each(2), 0));
    assert_eq!(both(|run| run.guidance = Guidance::none(1.5)), (4, each(2), 0));
    assert_eq!(both(|run| run.optimizer.config.learning_rate = 0.3), (4, each(2), 0));
    assert_eq!(both(|run| run.latents = toy::noise(5, &[3, 4, 6, 8])), (4, each(2), 0));
    // Captured late, for which each reference is looked at by number.
    assert_eq!(both(|run| run.start_time = 500.0), (4, 5 + 3 * 4, 3));
    assert_eq!(both(|run| (run.iterations, run.references) = (0, References::default())), (1, 5, 0));
    let content_alone = |run: &mut Run| {
        run.references.styles.clear();
        run.loss = TotalLoss::default().plus(1.0, ContentLoss);
    };
    assert_eq!(both(content_alone), (3, 5 * (1 + 1 + 2), 0));
    let style_alone = |run: &mut Run| {
        run.references = References::styles([Style::new(latents(9, 8, 8)), Style::new(latents(7, 4, 6)).with_weight(0.0)]);
        run.loss = TotalLoss::default().plus(1.0, AdLoss::default());
    };
    assert_eq!(both(style_alone), (3, 5 * (1 + 1 + 2), 0));
}

/// Where the losses see the graph's own features, which f64 would copy.
#[test]
fn so_is_a_run_in_f32() {
    let net = Noting::of(Kind::Float);
    let mut eager = sampler(&net, 5);
    let (mut run, _) = graphed(sampler(&net, 5));
    let mut losses = vec![];
    while let Some(wanted) = eager.advance().unwrap() {
        losses.push((run.advance().unwrap().unwrap().loss().unwrap().unwrap(), wanted.loss().unwrap().unwrap()));
        // Steps of 0.05, and here and there one of a rounding.
        let apart = (&run.run().latents - &eager.latents).abs().mean(Kind::Double).double_value(&[]);
        assert!(apart < 1e-3, "{apart}");
    }
    assert!((losses[0].0 - losses[0].1).abs() < 1e-5 * losses[0].1, "{losses:?}");
    assert!(losses.iter().all(|(ours, theirs)| (ours - theirs).abs() < 1e-3 * theirs), "{losses:?}");
}

/// A scheduler for networks that predict a variance, too.
struct Learned(Ddim);

impl Scheduler for Learned {
    fn timesteps(&self) -> &[f64] {
        self.0.timesteps()
    }
    fn next_timestep(&self, index: usize) -> f64 {
        self.0.next_timestep(index)
    }
    fn add_noise(&self, clean: &Tensor, noise: &Tensor, timestep: f64) -> attention_distillation::Result<Tensor> {
        self.0.add_noise(clean, noise, timestep)
    }
    fn step(&self, index: usize, prediction: &Tensor, latents: &Tensor) -> attention_distillation::Result<Tensor> {
        let parts = prediction.f_chunk(2, 1)?;
        let [noise, variance] = parts.as_slice() else { panic!("two parts") };
        self.0.step(index, &(noise + variance * 0.1), latents)
    }
}

#[test]
fn a_prediction_may_have_more_channels_than_the_latents() {
    let net = Noting::new();
    net.variance.set(true);
    let learned = |run: &mut Run| run.scheduler = Box::new(Learned(Ddim::new(&DdimConfig::default(), 5).unwrap()));
    assert_eq!(both_on(&net, learned), (4, 5 * (1 + 2 + 2), 0));
    let windows = |run: &mut Run| {
        learned(run);
        run.windows = Some(Windows::new(4, 2).with_batch(2));
    };
    // As of six views in windows_are_captured_by_shape.
    assert_eq!(both_on(&net, windows), (4, 5 * (3 + 1 + 3 + 3 * 2), 0));
}

fn labels(values: [i64; 4]) -> LabelMap {
    LabelMap::new(&Tensor::from_slice(&values).view([1, 1, 1, 4])).unwrap()
}

fn labelled() -> References {
    let style = Style::new(latents(9, 8, 8)).with_labels(labels([1, 0, 0, 1])).with_area_weights([(1, 0.5)]);
    References::styles([style]).with_content(latents(8, 6, 8)).with_labels(labels([0, 0, 1, 1]))
}

/// Styles of the content's size, and weights, whose bias is made once for each shape.
#[test]
fn weights_count_as_they_do_without() {
    let weighted = || {
        let styles = [(9, 8, 8, 2.0), (8, 6, 8, 0.5), (6, 6, 8, 0.0)];
        References::styles(styles.map(|(seed, h, w, weight)| Style::new(latents(seed, h, w)).with_weight(weight))).with_content(latents(8, 6, 8))
    };
    assert_eq!(both(|run| run.references = weighted()), (4, 5 * 5, 0));
    let windows = Windows::new(4, 2).with_batch(4);
    assert_eq!(both(|run| (run.references, run.windows) = (weighted(), Some(windows))), (7, 5 * (2 + 1 + 2 + 2 * 2), 0));
}

#[test]
fn regions_are_those_of_the_run() {
    assert_eq!(both(|run| run.references = labelled()), (4, 5 * 5, 0));
    assert_eq!(both(|run| (run.references, run.adain) = (labelled(), true)), (4, 5 * 5, 0));
}

/// Of 6 x 8 latents six views of 4 x 4.
#[test]
fn windows_are_captured_by_shape() {
    let windows = Windows::new(4, 2).with_batch(2);
    let in_windows = |run: &mut Run| run.windows = Some(windows);
    let views = windows.views((6, 8)).unwrap().count();
    assert_eq!(views, 6);
    // Three batches of two; the styles once a step, content and iterations for each batch.
    assert_eq!(both(in_windows), (4, 5 * (3 + 1 + 3 + 3 * 2), 0));
    let uneven = |run: &mut Run| run.windows = Some(windows.with_batch(4));
    // Batches of 4 and 2: two shapes of predictions, contents, and iterations.
    assert_eq!(both(uneven), (7, 5 * (2 + 1 + 2 + 2 * 2), 0));
    let anew = |run: &mut Run| run.windows = Some(windows.with_reference_per_batch(true));
    assert_eq!(both(anew), (4, 5 * (3 + 3 + 3 + 3 * 2), 0));
    let whole_content = |run: &mut Run| {
        run.windows = Some(windows);
        run.references.content = Some(latents(8, 4, 4));
    };
    assert_eq!(both(whole_content), (4, 5 * (3 + 1 + 3 + 3 * 2), 0));
}

/// Each view has labels of its own, so its iterations are made one by one, a pass each.
#[test]
fn windows_with_labels_descend_one_by_one() {
    let windows = |run: &mut Run| (run.windows, run.references) = (Some(Windows::new(4, 2).with_batch(2)), labelled());
    assert_eq!(both(windows), (3, 5 * (3 + 1 + 3), 3 * 3 * 2));
}

#[test]
fn conditions_that_cannot_be_captured_predict_one_by_one() {
    // The negative, the prompt, the null prompt, which is not asked about.
    for (not, expected) in [(0.5, (3, 5 * 4, 3 * 2)), (1.5, (3, 5 * 4, 3 * 2)), (1.0, (4, 5 * 5, 0))] {
        let net = Noting::new();
        net.not.set(Some(not));
        assert_eq!(both_on(&net, |_| {}), expected, "{not}");
    }
    // A negative without effect does not count.
    let net = Noting::new();
    net.not.set(Some(0.5));
    assert_eq!(both_on(&net, |run| run.guidance.scale = 1.0), (4, 5 * 5, 0));
}

/// A GPU's graph reads addresses: the latents, the timestep, the references' features.
#[test]
fn all_that_changes_stays_in_its_place() {
    let uneven = Windows::new(4, 2).with_batch(4);
    // Prompt and negative, two styles, the content, two iterations; in windows in batches of 4 and of 2 views.
    for (windows, captures, passes) in [(None, 4, 2 + 2 + 1 + 2), (Some(uneven), 7, 2 * (2 + 1 + 2) + 2)] {
        let net = Noting::new();
        let places = Arc::new(Mutex::new(vec![]));
        let mut run = sampler(&net, 6);
        run.loss = TotalLoss::default().plus(1.0, NotingLoss(AdLoss::default(), Arc::clone(&places)));
        run.windows = windows;
        let (mut run, recorder) = graphed(run);
        run.advance().unwrap();
        net.places.borrow_mut().clear();
        places.lock().unwrap().clear();
        let mut others = vec![];
        let mut steps = vec![];
        while run.advance().unwrap().is_some() {
            steps.push((net.places.take(), std::mem::take(&mut *places.lock().unwrap())));
            // Memory that is given back may be given again: in between somebody else takes it.
            others.extend((0..50).map(|i| latents(i, 6, 8)));
        }
        assert_eq!((recorder.captures.get(), steps.len()), (captures, 5));
        assert_eq!((steps[0].0.len(), steps[0].1.len()), (passes, if windows.is_some() { 4 } else { 2 }));
        // Of two styles keys and values in two layers, of the content queries.
        assert!(steps[0].1.iter().all(|found| found.len() == 2 * 2 * 2 + 2));
        assert!(steps.windows(2).all(|pair| pair[0] == pair[1]), "{steps:?}");
    }
}

#[test]
fn a_run_may_have_begun_and_goes_on_from_checkpoints() {
    let net = Noting::new();
    let [mut eager, mut other] = [(), ()].map(|()| sampler(&net, 6));
    let wanted = eager.finish().unwrap();
    other.advance().unwrap();
    other.advance().unwrap();
    let (mut run, _) = graphed(other);
    run.advance().unwrap();
    let checkpoint = run.checkpoint().unwrap();
    assert_same(&run.finish().unwrap(), &run.run().latents);
    assert!(relative(&run.run().latents, &wanted) < ROUNDING);
    let mut resumed = sampler(&net, 6);
    resumed.resume(&checkpoint).unwrap();
    assert!(relative(&resumed.finish().unwrap(), &wanted) < ROUNDING);
    run.resume(&checkpoint).unwrap();
    assert_eq!(run.run().step, 3);
    assert!(relative(&run.finish().unwrap(), &wanted) < ROUNDING);
}

/// The same noise is drawn again.
#[test]
fn an_error_leaves_the_run_at_its_last_step() {
    let net = Noting::new();
    let wanted = sampler(&net, 5).finish().unwrap();
    // While the prediction is captured and when it is repeated; at the styles, the content, the iterations; and then in a later step.
    for (done, forward) in [(0, 1), (0, 7), (0, 9), (0, 12), (0, 20), (0, 24), (0, 26), (2, 1), (2, 3), (2, 5), (2, 6), (2, 7)] {
        let (mut run, _) = graphed(sampler(&net, 5));
        for _ in 0..done {
            run.advance().unwrap();
        }
        let (step, before) = (run.run().step, run.run().latents.copy());
        net.toy.fail_at(forward, Trouble::Memory);
        let error = run.advance().unwrap_err();
        assert!(error.is_out_of_memory(), "{done} {forward}: {error}");
        assert_eq!(run.run().step, step);
        assert_same(&run.run().latents, &before);
        assert!(format!("{run:?}").contains("graphs: 0"), "their memory is wanted: {run:?}");
        assert!(relative(&run.finish().unwrap(), &wanted) < ROUNDING, "{done} {forward}");
    }
}

#[test]
fn not_a_number_ends_the_run_before_the_step() {
    let net = Noting::new();
    let wanted = sampler(&net, 5).finish().unwrap();
    let times = Ddim::new(&DdimConfig::default(), 5).unwrap().timesteps().to_vec();
    for (at, step) in [(times[0], 0), (times[2], 1), (times[4], 3)] {
        let (mut run, _) = graphed(sampler(&net, 5));
        // Of each but the first the descents of the step before are at fault.
        net.toy.nan_at.set(Some(at));
        let error = run.finish().unwrap_err();
        assert!(matches!(error, Error::NotFinite { .. }), "{error}");
        assert_eq!(run.run().step, step);
        net.toy.nan_at.set(None);
        assert!(relative(&run.finish().unwrap(), &wanted) < ROUNDING);
    }
}

#[test]
fn the_graphs_go_with_the_last_step() {
    let net = Noting::new();
    let (mut run, _) = graphed(sampler(&net, 3));
    let mut there = vec![];
    while run.advance().unwrap().is_some() {
        there.push(format!("{run:?}").contains("graphs: 4"));
    }
    assert_eq!(there, [true, true, false]);
}

#[test]
fn a_change_is_captured_anew() {
    let net = Noting::new();
    let changes: [fn(&mut Run); 6] = [
        |run| run.loss = TotalLoss::default().plus(1.0, AdLoss::default().with_sharpness(2.0)),
        |run| run.optimizer.config.learning_rate = 0.2,
        |run| run.references = References::style(latents(30, 4, 4)).with_content(latents(8, 6, 8)),
        |run| run.references.smoothing = 0.5,
        |run| run.guidance.scale = 7.0,
        |run| run.iterations = 1,
    ];
    for change in changes {
        let [mut eager, other] = [(), ()].map(|()| sampler(&net, 6));
        let (mut run, recorder) = graphed(other);
        for _ in 0..3 {
            eager.advance().unwrap();
            run.advance().unwrap();
        }
        change(&mut eager);
        run.change(change);
        assert!(relative(&run.finish().unwrap(), &eager.finish().unwrap()) < ROUNDING);
        assert_eq!(recorder.captures.get(), 8);
    }
}

#[test]
fn what_cannot_be_captured_leaves_a_run_to_go_on_without() {
    let net = Noting::new();
    let wanted = sampler(&net, 4).finish().unwrap();
    for refused in 1..=4 {
        let mut run = sampler(&net, 4).with_graphs(Again { refused: Some(refused), ..Again::default() });
        let before = run.run().latents.copy();
        assert!(matches!(run.advance(), Err(Error::Torch(_))));
        assert_same(&run.run().latents, &before);
        assert!(format!("{run:?}").contains("graphs: 0"));
        let mut run = run.into_run();
        assert_same_run(&run.finish().unwrap(), &wanted);
    }
}

#[test]
fn runs_can_go_to_another_thread() {
    fn check<T: Send>() {}
    check::<GraphedSampler<Box<Sent>, CudaGraphs>>();
}

/// The toy alone, which a thread may be given.
struct Sent(Toy);

impl attention_distillation::Denoiser for Sent {
    type Condition = f64;

    fn forward(
        &self,
        latents: &Tensor,
        timestep: f64,
        condition: &f64,
        hook: &mut dyn attention_distillation::AttentionHook,
    ) -> attention_distillation::Result<Tensor> {
        self.0.forward(latents, timestep, condition, hook)
    }
}

// SAFETY: its tensors are its own, and nothing replaces them.
#[allow(unsafe_code)]
unsafe impl attention_distillation::cuda_graphs::Capturable for Sent {
    fn forward_at(
        &self,
        latents: &Tensor,
        timestep: &Tensor,
        condition: &f64,
        hook: &mut dyn attention_distillation::AttentionHook,
    ) -> attention_distillation::Result<Tensor> {
        self.0.run_at(latents, timestep, *condition, hook).map_err(Error::denoiser)
    }
}

#[cfg(feature = "stable-diffusion")]
mod networks {
    use super::{relative, AdLoss, Again, GuidedSampler, Noise, References, TotalLoss, Windows};
    use attention_distillation::stable_diffusion::ControlNet;
    use attention_distillation::{image, ContentLoss, Guidance, Seamless, StableDiffusion};
    use std::path::{Path, PathBuf};
    use tch::{Device, Kind};

    type Run<'a> = GuidedSampler<&'a StableDiffusion>;

    fn folder(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
    }

    fn open(name: &str) -> StableDiffusion {
        tch::set_num_threads(1);
        StableDiffusion::open(folder(name), Device::Cpu, Kind::Double).unwrap()
    }

    fn run<'a>(model: &'a StableDiffusion, guidance: Guidance<attention_distillation::stable_diffusion::Condition>) -> Run<'a> {
        let [style, content] = ["style_harvest.png", "content_astronaut.png"].map(|name| {
            let picture = image::load(folder("assets/pictures").join(name)).unwrap();
            model.encode(&image::resize(&picture, (64, 64)).unwrap()).unwrap()
        });
        let mut noise = Noise::seeded(4);
        let start = model.noise(1, (64, 64), &mut noise).unwrap();
        let references = References::style(style).with_content(content);
        let mut run = GuidedSampler::new(model.extractor((64, 64)).unwrap(), model.ddim(4).unwrap(), guidance, references, start, noise);
        run.loss = run.loss.plus(0.2, ContentLoss);
        (run.iterations, run.adain) = (2, true);
        run
    }

    /// In f64, as in f32 roundings become steps of Adam where gradients are near 0.
    #[track_caller]
    fn assert_the_same(what: &str, run: impl Fn() -> Run<'static>, captures: usize) {
        let recorder = Again::default();
        let mut graphed = run().with_graphs(recorder.clone());
        let off = relative(&graphed.finish().unwrap(), &run().finish().unwrap());
        println!("{what}: off by {off:.1e}");
        assert!(off < 1e-6, "{what}: {off}");
        assert_eq!(recorder.captures.get(), captures, "{what}");
    }

    /// A model for the rest of the process.
    fn kept(model: StableDiffusion) -> &'static StableDiffusion {
        Box::leak(Box::new(model))
    }

    #[test]
    fn runs_of_networks_are_the_same_runs() {
        for (name, prompt) in [("tests/fixtures/sd15", "a fox"), ("tests/fixtures/sdxl", "a fox"), ("assets/mini", "")] {
            let model = kept(open(name));
            assert_the_same(name, || run(model, model.guidance(&[prompt], None, 7.0, (64, 64)).unwrap()), 4);
        }
    }

    /// Views of a seamless network's canvas: their borders meet along one axis alone, also when that is captured and repeated.
    #[test]
    fn borders_meet_as_they_do_without() {
        let mut model = open("assets/mini");
        model.set_seamless(Seamless::Both);
        let model = kept(model);
        let (height, width) = run(model, model.guidance(&[""], None, 1.0, (64, 64)).unwrap()).latents.size4().map(|size| (size.2, size.3)).unwrap();
        let windows = Windows::new(width, width / 2).with_batch(2);
        assert_eq!((height, width), (16, 16));
        let in_windows = || {
            let mut run = run(model, model.guidance(&[""], None, 1.0, (64, 64)).unwrap());
            run.latents = attention_distillation::tch::Tensor::cat(&[&run.latents, &run.latents.flip([3])], 3);
            (run.references.content, run.loss) = (None, TotalLoss::default().plus(1.0, AdLoss::default()));
            run.with_windows(windows)
        };
        assert_the_same("a ring", in_windows, 3);
    }

    #[test]
    fn controls_steer_runs_by_graphs_as_they_do_without() {
        let mut model = open("tests/fixtures/sd15");
        let net = ControlNet::open(folder("tests/fixtures/controlnet_sd15"), Device::Cpu, Kind::Double).unwrap();
        let net = model.add_controlnet(net).unwrap();
        let picture = image::load(folder("assets/pictures/content_astronaut.png")).unwrap();
        let control = model.control(net, &image::resize(&picture, (64, 64)).unwrap(), (64, 64)).unwrap();
        let model = kept(model);
        let guidance = || model.guidance(&["a fox"], None, 7.0, (64, 64)).unwrap();
        // The prediction is made one by one.
        assert_the_same("controlled", || run(model, guidance().with_control(&control)), 3);
        let [with, without] = [guidance().with_control(&control), guidance()].map(|guidance| run(model, guidance).finish().unwrap());
        assert!(relative(&with, &without) > 1e-2, "the control has no effect");
    }
}
