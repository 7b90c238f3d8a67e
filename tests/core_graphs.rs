//! Runs by graphs, without a GPU: a stand-in does the captured work again, on the same tensors, where a GPU would repeat it.
#![cfg(feature = "cuda-graphs")]
#![allow(clippy::disallowed_methods, missing_docs, unsafe_code)]

mod graphs;
mod toy;

use attention_distillation::cuda_graphs::{Capturable, CudaGraphs, GraphedDistiller};
use attention_distillation::{
    AdLoss, Adam, AdamConfig, AttentionHook, Distiller, Error, FeatureCache, FeatureExtractor, Features, LabelMap, Loss, Optimizer, References,
    Result, Style, TotalLoss,
};
use graphs::{Again, Noting, NotingLoss};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use tch::{Kind, Tensor};
use toy::{assert_same, latents, relative, Toy, Trouble};

fn times(steps: usize) -> Vec<f64> {
    (0..steps).rev().map(|i| 1.0 + (1000 / steps * i) as f64).collect()
}

fn references() -> References {
    References::style(latents(9, 8, 8)).with_content(latents(8, 6, 8))
}

fn transfer(net: &Noting, steps: usize, references: References) -> Distiller<&Noting> {
    tch::set_num_threads(1);
    Distiller::style_transfer(FeatureExtractor::new(net, 1.0, 2..4), times(steps), references, 0.25).unwrap()
}

fn graphed(run: Distiller<&Noting>) -> (GraphedDistiller<&Noting, Again>, Again) {
    let recorder = Again::default();
    (run.with_graphs(recorder.clone()), recorder)
}

/// Step, latents, optimizer.
type State = (usize, Tensor, Vec<(String, Tensor)>);

fn state(run: &Distiller<&Noting>) -> State {
    let optimizer = run.optimizer.state().unwrap().into_iter().map(|(name, tensor)| (name, tensor.copy()));
    (run.step, run.latents.copy(), optimizer.collect())
}

#[track_caller]
fn assert_untouched(run: &Distiller<&Noting>, before: &State) {
    let now = state(run);
    assert_eq!((now.0, now.2.len()), (before.0, before.2.len()));
    assert_same(&now.1, &before.1);
    now.2.iter().zip(&before.2).for_each(|((_, x), (_, y))| assert_same(x, y));
}

/// The corrections of Adam's moments are computed by another formula, in f64: in f32 that is a rounding in some of the steps, which
/// the following ones may magnify.
const ROUNDING: f64 = 1e-5;

#[track_caller]
fn assert_agree(ours: &Distiller<&Noting>, theirs: &Distiller<&Noting>) {
    let (ours, theirs) = (state(ours), state(theirs));
    assert_eq!(ours.0, theirs.0, "step");
    assert!(relative(&ours.1, &theirs.1) < ROUNDING, "latents: {:e}", relative(&ours.1, &theirs.1));
    assert_eq!(ours.2.len(), theirs.2.len());
    for ((name, x), (other, y)) in ours.2.iter().zip(&theirs.2) {
        assert_eq!((name, x.kind(), x.size()), (other, y.kind(), y.size()));
        assert!(relative(x, y) < ROUNDING, "{name}: {:e}", relative(x, y));
    }
}

fn both(references: impl Fn() -> References, change: impl Fn(&mut Distiller<&Noting>)) -> (usize, usize) {
    let net = Noting::new();
    let [mut eager, mut other] = [(), ()].map(|()| transfer(&net, 8, references()));
    change(&mut eager);
    change(&mut other);
    let start = eager.latents.copy();
    let (mut run, recorder) = graphed(other);
    while let Some(wanted) = eager.advance().unwrap() {
        let progress = run.advance().unwrap().unwrap();
        assert_eq!((progress.step, progress.steps, progress.timestep), (wanted.step, wanted.steps, wanted.timestep));
        let (ours, theirs) = (progress.loss().unwrap().unwrap(), wanted.loss().unwrap().unwrap());
        assert!((ours - theirs).abs() < ROUNDING * theirs, "{ours} {theirs}");
        assert_agree(run.run(), &eager);
    }
    assert!(run.advance().unwrap().is_none());
    assert!(relative(&eager.latents, &start) > 0.05, "the runs went nowhere");
    (recorder.captures.get(), recorder.replays.get())
}

#[test]
fn a_run_by_graphs_is_the_same_run() {
    // A look at the references and an iteration, for eight timesteps.
    assert_eq!(both(references, |_| {}), (2, 8 + 8));
    assert_eq!(both(references, |run| run.iterations = 3), (2, 8 + 24));
    assert_eq!(both(references, |run| run.adain = true), (2, 8 + 8));
    let slower = |run: &mut Distiller<&Noting>| {
        run.optimizer.config = AdamConfig::with_learning_rate(0.03);
        run.optimizer.config.beta1 = 0.5;
    };
    assert_eq!(both(references, slower), (2, 16));
    let several =
        || References::styles([Style::new(latents(9, 8, 8)), Style::new(latents(10, 4, 6)).with_weight(2.0)]).with_content(latents(8, 6, 8));
    assert_eq!(both(several, |_| {}), (2, 16));
    let unseen = || References::styles([Style::new(latents(9, 8, 8)), Style::new(latents(10, 4, 6)).with_weight(0.0)]).with_content(latents(8, 6, 8));
    assert_eq!(both(unseen, |_| {}), (2, 16));
    let labelled = || {
        let map = |values: [i64; 2]| LabelMap::new(&Tensor::from_slice(&values).view([1, 1, 1, 2])).unwrap();
        let style = Style::new(latents(9, 8, 8)).with_labels(map([1, 0])).with_area_weights([(1, 0.5)]);
        References::styles([style]).with_content(latents(8, 6, 8)).with_labels(map([0, 1]))
    };
    assert_eq!(both(labelled, |_| {}), (2, 16));
    assert_eq!(both(labelled, |run| run.adain = true), (2, 16));
    let with_draft = |run: &mut Distiller<&Noting>| {
        *run = transfer(run.extractor.denoiser, 8, references()).with_draft(&latents(4, 6, 8), 0.5).unwrap();
        run.adain = true;
    };
    assert_eq!(both(references, with_draft), (2, 4 + 4));
}

/// Where the losses see the graph's own features, which f64 would copy.
#[test]
fn so_is_a_run_in_f32() {
    let net = Noting::of(Kind::Float);
    let mut eager = transfer(&net, 8, references());
    let (mut run, _) = graphed(transfer(&net, 8, references()));
    let mut losses = vec![];
    while let Some(wanted) = eager.advance().unwrap() {
        losses.push((run.advance().unwrap().unwrap().loss().unwrap().unwrap(), wanted.loss().unwrap().unwrap()));
        // Steps of 0.05, and here and there one of a rounding.
        let apart = (&run.run().latents - &eager.latents).abs().mean(Kind::Double).double_value(&[]);
        assert!(apart < 1e-3, "{apart}");
    }
    assert!((losses[0].0 - losses[0].1).abs() < 1e-6 * losses[0].1, "{losses:?}");
    assert!(losses.iter().all(|(ours, theirs)| (ours - theirs).abs() < 1e-3 * theirs), "{losses:?}");
}

#[test]
fn a_run_may_have_begun() {
    let net = Noting::new();
    let [mut eager, mut other] = [(), ()].map(|()| transfer(&net, 6, references()));
    let _ = eager.finish().unwrap();
    other.advance().unwrap();
    other.advance().unwrap();
    let (mut run, _) = graphed(other);
    run.advance().unwrap();
    assert_eq!(run.run().step, 3);
    let checkpoint = run.checkpoint().unwrap();
    assert_same(&run.finish().unwrap(), &run.run().latents);
    assert_agree(run.run(), &eager);
    // From its checkpoint it goes on without graphs, and with those that are there.
    let mut resumed = transfer(&net, 6, references());
    resumed.resume(&checkpoint).unwrap();
    let _ = resumed.finish().unwrap();
    assert_agree(&resumed, &eager);
    run.resume(&checkpoint).unwrap();
    assert_eq!(run.run().step, 3);
    let _ = run.finish().unwrap();
    assert_agree(run.run(), &eager);
}

/// A GPU's graph reads addresses: so the work must find everything where it was, and nothing by number.
#[test]
fn all_that_changes_stays_in_its_place() {
    stays_in_its_place(false);
    stays_in_its_place(true);
}

fn stays_in_its_place(adain: bool) {
    let net = Noting::new();
    let mut run = transfer(&net, 5, references());
    run.adain = adain;
    let places = Arc::new(Mutex::new(vec![]));
    run.loss = TotalLoss::default().plus(1.0, NotingLoss(AdLoss::default(), Arc::clone(&places)));
    run.iterations = 2;
    let (mut run, recorder) = graphed(run);
    run.advance().unwrap();
    // Features to make tensors after their shapes, of the style and the content; then by the tensor alone.
    assert_eq!(net.by_number.replace(0), 2);
    // Memory that is given back may be given again: in between somebody else takes it.
    let mut others = vec![];
    while run.advance().unwrap().is_some() {
        others.extend((0..50).map(|i| latents(i, 6, 8)));
    }
    assert_eq!(net.by_number.get(), 0);
    assert_eq!(recorder.replays.get(), 5 + 10);
    let seen = net.places.borrow();
    let timestep = seen[0].1;
    assert!(seen.iter().all(|(_, at)| *at == timestep), "{seen:?}");
    // In an iteration autograd is given a handle of its own on the same memory.
    let mut looks = BTreeMap::new();
    seen.iter().for_each(|(latents, _)| *looks.entry(*latents).or_insert(0) += 1);
    let (given, content) = (&run.run().references.styles[0].of, run.run().references.content.as_ref().unwrap());
    assert!([given, content].iter().all(|tensor| !looks.contains_key(&(tensor.data_ptr() as usize))), "what others may replace is not read");
    let mut looks: Vec<_> = looks.into_values().collect();
    looks.sort_unstable();
    assert_eq!(looks, [3 + 5, 3 + 5, 3 + 10], "style, content, and the picture");
    let places = places.lock().unwrap();
    assert_eq!((places.len(), places[0].len()), (3 + 10, 2 * 2 + 2));
    assert!(places.windows(2).all(|pair| pair[0] == pair[1]), "{places:?}");
}

/// A graph reads copies, which follow the references: those may be written to, and the memory behind them go.
#[test]
fn references_may_be_replaced_between_steps() {
    let net = Noting::new();
    for adain in [false, true] {
        let [eager, graphs] = [false, true].map(|by_graphs| {
            let references = references();
            let (mut style, mut content) = (references.styles[0].of.shallow_clone(), references.content.as_ref().unwrap().shallow_clone());
            let mut run = transfer(&net, 6, references);
            run.adain = adain;
            let mut change = |step: usize| match step {
                2 => style.f_set_data(&latents(31, 8, 8)).unwrap(),
                4 => content.f_copy_(&latents(32, 6, 8)).map(drop).unwrap(),
                _ => (),
            };
            if by_graphs {
                let (mut run, recorder) = graphed(run);
                (0..6).for_each(|step| {
                    change(step);
                    run.advance().unwrap();
                });
                assert_eq!(recorder.captures.get(), 2, "nothing was captured anew");
                run.into_run()
            } else {
                (0..6).for_each(|step| {
                    change(step);
                    run.advance().unwrap();
                });
                run
            }
        });
        assert_agree(&graphs, &eager);
        let mut untouched = transfer(&net, 6, references());
        untouched.adain = adain;
        assert!(relative(&graphs.latents, &untouched.finish().unwrap()) > 0.01);
    }
}

/// Compares with the references' own outputs, which are computed when they are first asked for.
struct Outputs;

impl Loss for Outputs {
    fn evaluate(&self, picture: &Features, references: &References<Features>) -> Result<Tensor> {
        let content = references.content.as_ref().unwrap();
        let terms =
            picture.layers().zip(content.layers()).map(|(ours, theirs)| Ok(ours.output()?.f_l1_loss(theirs.output()?, tch::Reduction::Mean)?));
        Ok(Tensor::stack(&terms.collect::<Result<Vec<_>>>()?, 0).sum(Kind::Float))
    }
}

#[test]
fn outputs_of_references_are_those_of_the_timestep() {
    let loss = || TotalLoss::default().plus(1.0, AdLoss::default()).plus(1.0, Outputs);
    both(references, |run| run.loss = loss());
}

#[test]
fn an_error_leaves_the_run_at_its_last_step() {
    let net = Noting::new();
    let mut eager = transfer(&net, 6, references());
    eager.iterations = 2;
    let _ = eager.finish().unwrap();
    // Before anything was captured, while it is, and while it is repeated: at the references, the first and the second iteration.
    for (done, forward) in [(0, 1), (0, 4), (0, 10), (2, 1), (2, 3), (2, 4)] {
        let mut run = transfer(&net, 6, references());
        run.iterations = 2;
        let (mut run, _) = graphed(run);
        for _ in 0..done {
            run.advance().unwrap();
        }
        let before = state(run.run());
        net.toy.fail_at(forward, Trouble::Memory);
        let error = run.advance().unwrap_err();
        assert!(error.is_out_of_memory(), "{error}");
        assert_untouched(run.run(), &before);
        let _ = run.finish().unwrap();
        assert_agree(run.run(), &eager);
    }
}

#[test]
fn not_a_number_ends_the_run_before_the_step() {
    let net = Noting::new();
    let mut eager = transfer(&net, 5, references());
    let _ = eager.finish().unwrap();
    for bad in [0, 2, 4] {
        let (mut run, _) = graphed(transfer(&net, 5, references()));
        net.toy.nan_at.set(Some(times(5)[bad]));
        let error = run.finish().unwrap_err();
        assert!(matches!(error, Error::NotFinite { step, .. } if step == bad + 1), "{error}");
        assert_eq!(run.run().step, bad);
        let before = state(run.run());
        assert!(run.advance().is_err());
        assert_untouched(run.run(), &before);
        net.toy.nan_at.set(None);
        let _ = run.finish().unwrap();
        assert_agree(run.run(), &eager);
    }
}

/// Where a graph would take any number there is in its place.
#[test]
fn a_timestep_that_is_no_number_is_refused() {
    let net = Noting::new();
    for bad in [0, 1, 3] {
        let mut run = transfer(&net, 5, references());
        run.timesteps[bad] = f64::NAN;
        let (mut run, _) = graphed(run);
        let error = run.finish().unwrap_err();
        assert!(matches!(error, Error::Argument { argument: "timestep", .. }), "{error}");
        assert_eq!(run.run().step, bad);
    }
}

/// What comes then, such as decoding, needs their memory; and a run that goes back is captured anew.
#[test]
fn the_graphs_go_with_the_last_step() {
    let net = Noting::new();
    let (mut run, recorder) = graphed(transfer(&net, 3, references()));
    let begun = run.checkpoint().unwrap();
    let mut there = vec![];
    while run.advance().unwrap().is_some() {
        there.push(format!("{run:?}").contains("captured: true"));
    }
    assert_eq!(there, [true, true, false]);
    let first = run.run().latents.copy();
    run.resume(&begun).unwrap();
    assert!(run.finish().unwrap().allclose(&first, 1e-5, 1e-5, false));
    assert_eq!(recorder.captures.get(), 4);
}

#[test]
fn a_change_is_captured_anew() {
    let net = Noting::new();
    let changes: [fn(&mut Distiller<&Noting>); 6] = [
        |run| run.loss = TotalLoss::default().plus(1.0, AdLoss::default().with_sharpness(2.0)),
        |run| run.optimizer.config.learning_rate = 0.2,
        |run| run.adain = true,
        |run| run.references.smoothing = 0.5,
        |run| run.references = References::style(latents(30, 4, 4)).with_content(latents(8, 6, 8)),
        |run| (run.latents, run.optimizer) = (latents(31, 6, 8), Adam::default()),
    ];
    for change in changes {
        let [mut eager, other] = [(), ()].map(|()| transfer(&net, 6, references()));
        let (mut run, recorder) = graphed(other);
        for _ in 0..3 {
            eager.advance().unwrap();
            run.advance().unwrap();
        }
        change(&mut eager);
        run.change(change);
        let _ = eager.finish().unwrap();
        let _ = run.finish().unwrap();
        assert_agree(run.run(), &eager);
        assert_eq!(recorder.captures.get(), 4);
    }
}

#[test]
fn what_cannot_be_captured_leaves_a_run_to_go_on_without() {
    let net = Noting::new();
    let mut eager = transfer(&net, 4, references());
    let _ = eager.finish().unwrap();
    for refused in [1, 2] {
        let mut run = transfer(&net, 4, references()).with_graphs(Again { refused: Some(refused), ..Again::default() });
        let before = state(run.run());
        assert!(matches!(run.advance(), Err(Error::Torch(_))));
        assert_untouched(run.run(), &before);
        let mut run = run.into_run();
        let _ = run.finish().unwrap();
        assert_agree(&run, &eager);
        run.iterations = 0;
        run.step = 0;
        assert!(matches!(run.with_graphs(Again::default()).advance(), Err(Error::Argument { argument: "iterations", .. })));
    }
}

#[test]
fn styles_with_a_cache_are_not_captured() {
    let cache = FeatureCache::new(1 << 20);
    let cached = || References::styles([Style::new(latents(9, 8, 8)).with_cache(cache.clone())]).with_content(latents(8, 6, 8));
    for adain in [false, true] {
        assert_eq!(both(cached, |run| run.adain = adain), (1, 8));
        assert_eq!(cache.len(), 8);
        // What is in it by now is not made again, for the features' shapes neither.
        let net = Noting::new();
        let mut run = transfer(&net, 8, cached());
        run.adain = adain;
        let (mut run, _) = graphed(run);
        run.advance().unwrap();
        assert_eq!(net.by_number.get(), 2, "of the content, for the shapes and for the step");
        assert_eq!(cache.len(), 8);
        cache.clear();
    }
}

#[test]
fn a_content_that_no_loss_looks_at_is_not_captured() {
    let net = Noting::new();
    let [mut eager, other] =
        [(), ()].map(|()| Distiller::style_transfer(FeatureExtractor::new(&net, 1.0, 2..4), times(4), references(), 0.0).unwrap());
    let _ = eager.finish().unwrap();
    net.by_number.set(0);
    let (mut run, recorder) = graphed(other);
    let _ = run.finish().unwrap();
    assert_eq!(net.by_number.get(), 1, "the style, for the features' shapes");
    assert_eq!((recorder.captures.get(), recorder.replays.get()), (2, 4 + 4));
    assert_agree(run.run(), &eager);
}

/// Opens nothing before it is asked to; then says what is missing, or works.
#[test]
fn where_there_is_no_gpu_it_says_so() {
    tch::set_num_threads(1);
    match CudaGraphs::new() {
        Err(error) => {
            println!("{error}");
            assert!(matches!(&error, Error::Device { device, .. } if device == "cuda"), "{error:?}");
        }
        Ok(graphs) => {
            assert!(attention_distillation::device::best().is_cuda());
            // A run on the CPU has nothing that a GPU could repeat.
            let net = Noting::new();
            let mut run = transfer(&net, 4, references()).with_graphs(graphs);
            assert!(matches!(run.advance(), Err(Error::Device { .. })));
            assert_eq!(run.run().step, 0);
        }
    }
}

#[test]
fn runs_can_go_to_another_thread() {
    fn check<T: Send>() {}
    check::<CudaGraphs>();
    check::<GraphedDistiller<Box<Toy>, CudaGraphs>>();
}

// SAFETY: its tensors are its own, and nothing replaces them.
#[allow(unsafe_code)]
unsafe impl Capturable for Toy {
    fn forward_at(&self, latents: &Tensor, timestep: &Tensor, condition: &f64, hook: &mut dyn AttentionHook) -> Result<Tensor> {
        self.run_at(latents, timestep, *condition, hook).map_err(Error::denoiser)
    }
}

#[cfg(feature = "stable-diffusion")]
mod networks {
    use super::{relative, Again, Capturable, Distiller, Error, Kind, References, Tensor};
    use attention_distillation::stable_diffusion::ControlNet;
    use attention_distillation::{image, AdLoss, ContentLoss, Denoiser, FeatureRecorder, Loss, StableDiffusion, TotalLoss};
    use std::path::{Path, PathBuf};
    use tch::Device;

    fn folder(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
    }

    fn open(name: &str, kind: Kind) -> StableDiffusion {
        tch::set_num_threads(1);
        StableDiffusion::open(folder(name), Device::Cpu, kind).unwrap()
    }

    fn pictures(model: &StableDiffusion) -> [Tensor; 2] {
        ["content_astronaut.png", "style_harvest.png"].map(|name| {
            let picture = image::load(folder("assets/pictures").join(name)).unwrap();
            model.encode(&image::resize(&picture, (64, 64)).unwrap()).unwrap()
        })
    }

    /// To the bit: the tensor holds the number that the network would have made of it.
    #[test]
    fn a_timestep_as_a_tensor_is_the_same_timestep() {
        for name in ["tests/fixtures/sd15", "tests/fixtures/sdxl", "assets/mini"] {
            let mut model = open(name, Kind::Float);
            let [content, style] = pictures(&model);
            let loss = TotalLoss::default().plus(1.0, AdLoss::default()).plus(0.25, ContentLoss);
            for (timestep, checkpointing) in [(1.0, false), (501.0, true), (981.0, false)] {
                model.set_gradient_checkpointing(checkpointing);
                let extractor = model.extractor((64, 64)).unwrap();
                let at = Tensor::from_slice(&[timestep as f32]);
                let condition = &extractor.condition;
                let plain = || attention_distillation::PlainAttention;
                let [wanted, ours] = tch::no_grad(|| {
                    [
                        model.forward(&content, timestep, condition, &mut plain()),
                        Capturable::forward_at(&model, &content, &at, condition, &mut plain()),
                    ]
                })
                .map(Result::unwrap);
                assert!(ours.equal(&wanted), "{name} {timestep}");
                let unet = tch::no_grad(|| Capturable::forward_at(&model.unet(), &content, &at, condition, &mut plain())).unwrap();
                assert!(unet.equal(&wanted), "{name} {timestep}");
                let prompt = if name == "assets/mini" { "" } else { "a fox" };
                let guidance = model.guidance(&[prompt], Some(""), 7.0, (64, 64)).unwrap();
                let wanted = tch::no_grad(|| model.forward_guided(&content, timestep, &guidance)).unwrap();
                let ours = tch::no_grad(|| Capturable::forward_guided_at(&&model, &content, &at, &guidance)).unwrap();
                assert!(ours.equal(&wanted), "{name} {timestep}, guided");
                let unet = tch::no_grad(|| Capturable::forward_guided_at(&model.unet(), &content, &at, &guidance)).unwrap();
                assert!(unet.equal(&wanted), "{name} {timestep}, guided");
                // Stopped as ever.
                let mut recorder = FeatureRecorder::new(extractor.layers.clone());
                let outcome = tch::no_grad(|| Capturable::forward_at(&&model, &content, &at, condition, &mut recorder));
                assert!(matches!(outcome, Err(Error::Stopped)) && recorder.is_complete());
                let latents = content.lerp(&style, 0.3);
                let references = References::style(style.shallow_clone()).with_content(content.shallow_clone());
                let references = extractor.references(&references, timestep).unwrap();
                let mut value = |features: &_| loss.evaluate(features, &references);
                let wanted = model.gradient(&latents, timestep, condition, extractor.layers.clone(), &mut value).unwrap();
                let ours = model.gradient_at(&latents, &at, condition, extractor.layers.clone(), &mut value).unwrap();
                assert!(ours.0.equal(&wanted.0) && ours.1.equal(&wanted.1), "{name} {timestep} {checkpointing}");
                let another = model.gradient_at(&latents, &(&at + 10.0), condition, extractor.layers.clone(), &mut value).unwrap();
                assert!(!another.1.equal(&wanted.1), "the tensor is not looked at");
            }
        }
    }

    #[test]
    fn a_run_of_the_bundled_model_is_the_same_run() {
        let cases = [
            ("assets/mini", false, Kind::Double),
            ("assets/mini", true, Kind::Double),
            ("tests/fixtures/sdxl", false, Kind::Double),
            ("assets/mini", false, Kind::Float),
        ];
        for (name, checkpointing, kind) in cases {
            let mut model = open(name, kind);
            model.set_gradient_checkpointing(checkpointing);
            let [content, style] = pictures(&model);
            let run = || {
                let references = References::style(style.shallow_clone()).with_content(content.shallow_clone());
                let timesteps = model.timesteps(4).unwrap();
                let mut run = Distiller::style_transfer(model.extractor((64, 64)).unwrap(), timesteps, references, 0.2).unwrap();
                run.iterations = 2;
                run
            };
            let (mut eager, mut graphed) = (run(), run().with_graphs(Again::default()));
            let mut losses = vec![];
            while let Some(progress) = eager.advance().unwrap() {
                let ours = graphed.advance().unwrap().unwrap();
                losses.push((ours.loss().unwrap().unwrap(), progress.loss().unwrap().unwrap()));
            }
            assert!(graphed.advance().unwrap().is_none());
            let off = relative(&graphed.run().latents, &eager.latents);
            let mean = f64::try_from((&graphed.run().latents - &eager.latents).abs().mean(Kind::Double)).unwrap();
            println!("{name} {kind:?}: off by {off:.1e}, {mean:.1e} on average; losses {losses:?}");
            // In f32 roundings become steps of Adam where gradients are near 0, in f64 hardly ever; the first step moves all by 0.05.
            let (close, allowed) = if kind == Kind::Double { (off < 1e-6, 1e-6) } else { (mean < 1e-3, 1e-3) };
            assert!(close, "{name} {kind:?}: {off}, {mean}");
            assert!((losses[0].0 - losses[0].1).abs() < 1e-6 * losses[0].1, "{name} {kind:?}: {losses:?}");
            assert!(losses.iter().all(|(ours, theirs)| (ours - theirs).abs() < allowed * theirs), "{name} {kind:?}: {losses:?}");
        }
    }

    #[test]
    fn controls_are_refused() {
        let mut model = open("tests/fixtures/sd15", Kind::Float);
        let net = ControlNet::open(folder("tests/fixtures/controlnet_sd15"), Device::Cpu, Kind::Float).unwrap();
        let net = model.add_controlnet(net).unwrap();
        let picture = image::load(folder("assets/pictures/content_astronaut.png")).unwrap();
        let control = model.control(net, &image::resize(&picture, (64, 64)).unwrap(), (64, 64)).unwrap();
        let condition = model.prompts(&[""], (64, 64)).unwrap().with_control(control);
        let [content, _] = pictures(&model);
        let at = Tensor::from_slice(&[501.0_f32]);
        let refused = Capturable::forward_at(&model, &content, &at, &condition, &mut attention_distillation::PlainAttention);
        assert!(matches!(refused, Err(Error::Argument { argument: "condition", .. })));
        let refused = model.gradient_at(&content, &at, &condition, 10..16, &mut |_| unreachable!());
        assert!(matches!(refused, Err(Error::Argument { argument: "condition", .. })));
        assert!(!model.can_capture(&condition) && model.can_capture(&model.prompts(&[""], (64, 64)).unwrap()));
    }
}
