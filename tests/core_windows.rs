//! Pictures of any size from overlapping views, on a small network: which views, what a step makes of them, what it draws
//! and costs, and how runs end.
#![allow(clippy::disallowed_methods, missing_docs)]

mod toy;

use attention_distillation::{
    adain, AdLoss, Adam, AttentionHook, Checkpoint, ContentLoss, Ddim, DdimConfig, Denoiser, Error, FeatureExtractor, GradientDescent, Guidance,
    GuidedSampler, Noise, PlainAttention, References, Result, Scheduler, Style, TotalLoss, View, Windows,
};
use std::sync::{Arc, Mutex};
use tch::{Device, Kind, Tensor};
use toy::{assert_same, assert_same_run, difference, extractor, latents, noise, number, Toy, Trouble};

/// Of the canvas here: not square, and no multiple of the stride.
const CANVAS: (i64, i64) = (6, 21);
/// At columns 0, 4, 8, 12 and 13.
const VIEWS: usize = 5;

fn windows() -> Windows {
    Windows::new(8, 4).with_batch(2)
}

fn ddim(steps: usize) -> Ddim {
    Ddim::new(&DdimConfig::default(), steps).unwrap()
}

fn guidance() -> Guidance<f64> {
    Guidance::new(1.5, 0.5, 3.0).unwrap()
}

/// Two styles of sizes of their own, and a content of the canvas' size.
fn references() -> References {
    References::styles([Style::new(latents(9, 8, 8)), Style::new(latents(7, 4, 6))]).with_content(latents(8, CANVAS.0, CANVAS.1))
}

fn sampler_of<D: Denoiser<Condition = f64>>(denoiser: D, steps: usize, windows: Option<Windows>) -> GuidedSampler<D> {
    let extractor = FeatureExtractor::new(denoiser, 1.0, 2..4);
    let mut run = GuidedSampler::new(extractor, ddim(steps), guidance(), references(), latents(5, CANVAS.0, CANVAS.1), Noise::seeded(3));
    run.loss = run.loss.plus(0.2, ContentLoss);
    (run.iterations, run.adain, run.windows) = (2, true, windows);
    run
}

fn sampler(toy: &Toy, steps: usize, windows: Windows) -> GuidedSampler<&Toy> {
    sampler_of(toy, steps, Some(windows))
}

/// The latents after each step, and the losses.
fn steps(run: &mut GuidedSampler<&Toy>) -> Vec<(Tensor, Option<f64>)> {
    let mut all = vec![];
    while let Some(progress) = run.advance().unwrap() {
        all.push((run.latents.copy(), progress.loss().unwrap()));
    }
    all
}

fn cut(canvas: &Tensor, view: &View) -> Tensor {
    canvas.narrow(2, view.top, view.height).narrow(3, view.left, view.width)
}

fn cut_all(canvas: &Tensor, views: &[View]) -> Tensor {
    Tensor::cat(&views.iter().map(|view| cut(canvas, view)).collect::<Vec<_>>(), 0)
}

/// The mean of views, place by place.
fn averaged(canvas: (i64, i64), views: &[View], parts: &Tensor) -> Tensor {
    let mean = Tensor::zeros([1, toy::CHANNELS, canvas.0, canvas.1], (Kind::Float, Device::Cpu));
    for y in 0..canvas.0 {
        for x in 0..canvas.1 {
            let mut there = vec![];
            for (i, view) in (0..).zip(views) {
                if (view.top..view.top + view.height).contains(&y) && (view.left..view.left + view.width).contains(&x) {
                    there.push(parts.narrow(0, i, 1).narrow(2, y - view.top, 1).narrow(3, x - view.left, 1));
                }
            }
            mean.narrow(2, y, 1).narrow(3, x, 1).copy_(&Tensor::cat(&there, 0).mean_dim(&[0_i64][..], true, Kind::Float));
        }
    }
    mean
}

/// A scheduler whose step is any function of prediction and latents.
struct Made(Ddim, fn(&Tensor, &Tensor) -> Tensor);

impl Scheduler for Made {
    fn timesteps(&self) -> &[f64] {
        self.0.timesteps()
    }
    fn next_timestep(&self, index: usize) -> f64 {
        self.0.next_timestep(index)
    }
    fn add_noise(&self, clean: &Tensor, noise: &Tensor, timestep: f64) -> Result<Tensor> {
        self.0.add_noise(clean, noise, timestep)
    }
    fn step(&self, _: usize, prediction: &Tensor, latents: &Tensor) -> Result<Tensor> {
        Ok((self.1)(prediction, latents))
    }
}

fn with_scheduler(mut run: GuidedSampler<&Toy>, step: fn(&Tensor, &Tensor) -> Tensor) -> GuidedSampler<&Toy> {
    run.scheduler = Box::new(Made(ddim(4), step));
    run
}

#[test]
fn views_are_within_the_canvas_in_order_and_cover_it() {
    for height in [1_i64, 2, 7, 13] {
        for width in 1..=20_i64 {
            for size in 1..=9 {
                for stride in 1..=size {
                    let case = format!("{height}x{width}, {size} every {stride}");
                    let views: Vec<View> = Windows::new(size, stride).views((height, width)).unwrap().collect();
                    let mut covered = vec![0; (height * width) as usize];
                    for view in &views {
                        assert_eq!((view.height, view.width), (size.min(height), size.min(width)), "{case}");
                        assert!(view.top >= 0 && view.left >= 0, "{case}");
                        for y in view.top..view.top + view.height {
                            for x in view.left..view.left + view.width {
                                assert!(y < height && x < width, "{case}: {view:?}");
                                covered[(y * width + x) as usize] += 1;
                            }
                        }
                    }
                    assert!(covered.iter().all(|count| *count > 0), "{case}: {covered:?}");
                    let places: Vec<_> = views.iter().map(|view| (view.top, view.left)).collect();
                    assert!(places.windows(2).all(|pair| pair[0] < pair[1]), "row by row, none twice: {case}: {places:?}");
                    // All but the last of a row or column lie on the grid of strides.
                    let on_grid = |at: i64, last: i64| at % stride == 0 || at == last;
                    let (bottom, right) = ((height - size).max(0), (width - size).max(0));
                    assert!(places.iter().all(|&(top, left)| on_grid(top, bottom) && on_grid(left, right)), "{case}: {places:?}");
                    let along = |last: i64| (last + stride - 1) / stride + 1;
                    assert_eq!(views.len() as i64, along(bottom) * along(right), "{case}");
                }
            }
        }
    }
    // The paper's larger picture.
    let lefts: Vec<i64> = Windows::default().views((64, 512)).unwrap().map(|view| view.left).collect();
    assert_eq!(lefts, (0..=448).step_by(8).collect::<Vec<_>>());
    // They are made one after the other.
    assert_eq!(Windows::default().views((i64::MAX, i64::MAX)).unwrap().nth(3).unwrap().left, 24);
}

#[test]
fn one_window_is_no_window() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let expected = steps(&mut sampler_of(&toy, 4, None));
    for per_batch in [false, true] {
        for (size, stride) in [(21, 21), (21, 1), (64, 8), (i64::MAX, i64::MAX)] {
            let windows = Windows::new(size, stride).with_reference_per_batch(per_batch);
            for ((found, loss), (wanted, wanted_loss)) in steps(&mut sampler(&toy, 4, windows)).iter().zip(&expected) {
                assert_same_run(found, wanted);
                let (loss, wanted) = (loss.unwrap(), wanted_loss.unwrap());
                assert!((loss - wanted).abs() < 1e-6 * wanted, "{loss} {wanted}");
            }
        }
    }
}

#[test]
fn overlapping_views_are_averaged() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let start = latents(5, 4, 11);
    let predicted = |left: i64| {
        let part = start.narrow(3, left, 8);
        let prompt = toy.forward(&part, 751.0, &1.5, &mut PlainAttention).unwrap();
        let negative = toy.forward(&part, 751.0, &0.5, &mut PlainAttention).unwrap();
        &negative + (prompt - &negative) * 3.0
    };
    // Columns 0..8 and 3..11.
    let (left, right) = (predicted(0), predicted(3));
    let middle = (left.narrow(3, 3, 5) + right.narrow(3, 0, 5)) / 2.0;
    let expected = Tensor::cat(&[left.narrow(3, 0, 3), middle, right.narrow(3, 5, 3)], 3);

    let mut run = with_scheduler(sampler(&toy, 4, windows()), |prediction, _| prediction.shallow_clone());
    (run.iterations, run.latents) = (0, start.shallow_clone());
    assert_eq!(run.advance().unwrap().unwrap().loss().unwrap(), None);
    assert!(difference(&run.latents, &expected) < 1e-5);
    assert_same(&start, &latents(5, 4, 11));
}

/// Written out by hand, with the noise drawn once, and once for each batch.
#[test]
fn a_step_is_what_the_paper_says() {
    tch::set_num_threads(1);
    let (toy, schedule, start) = (Toy::new(Kind::Double), ddim(4), latents(5, CANVAS.0, CANVAS.1));
    let (index, t, next) = (1, 501.0, 251.0);
    let views: Vec<View> = windows().views(CANVAS).unwrap().collect();
    assert_eq!(views.iter().map(|view| view.left).collect::<Vec<_>>(), [0, 4, 8, 12, 13]);
    let sizes = [(8, 8), (4, 6), (8, 8), (4, 6), CANVAS];
    let draws = |batch: usize| sizes.iter().zip(100 * (batch as u64 + 1)..).map(|((h, w), seed)| latents(seed, *h, *w)).collect::<Vec<_>>();
    for (per_batch, smoothing) in [(false, 0.0), (true, 0.0), (false, 0.5), (true, 0.5)] {
        let clean = references();
        let (mut parts, mut losses) = (vec![], 0.0);
        for (batch, views) in views.chunks(2).enumerate() {
            let before = cut_all(&start, views);
            let prediction = toy.forward_guided(&before, t, &guidance()).unwrap();
            let mut z = schedule.step(index, &prediction, &before).unwrap();
            let draws = draws(if per_batch { batch } else { 0 });
            let noised = |clean: &Tensor, i: usize| schedule.add_noise(clean, &draws[i], next).unwrap();
            let styles = [noised(&clean.styles[0].of, 0), noised(&clean.styles[1].of, 1)];
            z = adain(&z, &styles).unwrap();
            let noisy = References::styles([Style::new(noised(&clean.styles[0].of, 2)), Style::new(noised(&clean.styles[1].of, 3))])
                .with_content(cut_all(&noised(clean.content.as_ref().unwrap(), 4), views))
                .with_smoothing(smoothing);
            let features = extractor(&toy).references(&noisy, next).unwrap();
            let loss = TotalLoss::default().plus(1.0, AdLoss::default()).plus(0.2, ContentLoss);
            let mut adam = Adam::default();
            let mut last = 0.0;
            for _ in 0..2 {
                last = number(&extractor(&toy).descend(&mut z, next, &features, &loss, &mut adam).unwrap());
            }
            losses += last * views.len() as f64;
            parts.push(z);
        }
        let expected = averaged(CANVAS, &views, &Tensor::cat(&parts, 0));

        let queue: Vec<Tensor> = (0..if per_batch { 3 } else { 1 }).flat_map(draws).collect();
        let queue = Mutex::new(queue);
        let mut run = sampler(&toy, 4, windows().with_reference_per_batch(per_batch));
        run.noise = Noise::from_fn(move |like| {
            let drawn = queue.lock().unwrap().remove(0);
            assert_eq!(drawn.size(), like.size());
            Ok(drawn)
        });
        run.references.smoothing = smoothing;
        run.step = index;
        let progress = run.advance().unwrap().unwrap();
        let mean = losses / VIEWS as f64;
        assert!((progress.loss().unwrap().unwrap() - mean).abs() < 1e-5, "the mean over all views");
        // A latent here and there may go another way where a gradient is next to nothing, a wrong column would make 2e-3.
        let apart = number(&(&run.latents - &expected).abs().mean(Kind::Double));
        assert!(apart < 1e-4, "{apart}");
        assert!(difference(&run.latents, &start) > 0.1);
    }
}

#[test]
fn how_many_views_go_together_does_not_matter() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let made = |batch: usize, iterations: usize| {
        let mut run = sampler(&toy, 3, windows().with_batch(batch));
        run.iterations = iterations;
        steps(&mut run)
    };
    // Without descents there are roundings alone. With them a few latents, of which a gradient is next to nothing, go another way by
    // Adam's steps of 0.05, because latents and AdaIN's means stay f32 where the network is f64: measured 9e-7, 1e-5 and 4e-4 on average
    // after each step. A column of a view's four that went wrong would be 1e-3 in the first.
    for (iterations, allowed) in [(0, [1e-6; 3]), (2, [3e-4, 3e-3, 3e-3])] {
        let expected = made(1, iterations);
        for batch in [2, 3, VIEWS, usize::MAX] {
            for (((found, loss), (wanted, wanted_loss)), allowed) in made(batch, iterations).iter().zip(&expected).zip(allowed) {
                let apart = number(&(found - wanted).abs().mean(Kind::Double));
                assert!(apart < allowed, "{batch}: {apart}");
                assert!((loss.unwrap_or(0.0) - wanted_loss.unwrap_or(0.0)).abs() < 1e-3, "{batch}: {loss:?}, {wanted_loss:?}");
            }
        }
    }
}

/// Each step from the latents of the run in f32, as roundings grow from step to step; and by plain gradient descent, as Adam makes whole
/// steps of them.
#[test]
fn steps_of_a_network_in_half_precision_are_nearly_those_in_f32() {
    tch::set_num_threads(1);
    let single = Toy::new(Kind::Float);
    // On average, measured without and with windows: latents off by 0.024 and 0.016 of a step's way in f16, by 0.11 and 0.08 in bf16,
    // losses by 1.6e-3 and 1.2e-2 of themselves at most. Other noise on the styles is 0.19 of the way and 3.4e-2 at least.
    for (kind, way_bound, loss_bound) in [(Kind::Half, 0.05, 4e-3), (Kind::BFloat16, 0.17, 3e-2)] {
        let toy = Toy::new(kind);
        for windows in [None, Some(windows())] {
            let (mut way_off, mut loss_off) = (0.0, 0.0);
            for seed in 3..6 {
                let made = |toy| {
                    let mut run = sampler_of(toy, 4, windows).with_optimizer(GradientDescent { learning_rate: 1.0 });
                    run.noise = Noise::seeded(seed);
                    run
                };
                let (mut exact, mut run) = (made(&single), made(&toy));
                for _ in 0..4 {
                    let before = exact.latents.copy();
                    run.latents = before.copy();
                    let [wanted, loss] = [&mut exact, &mut run].map(|run| run.advance().unwrap().unwrap().loss().unwrap().unwrap());
                    assert_eq!(run.latents.kind(), Kind::Float);
                    way_off += number(&(&run.latents - &exact.latents).norm()) / number(&(&exact.latents - before).norm()) / 12.0;
                    loss_off += (loss / wanted - 1.0).abs() / 12.0;
                }
            }
            assert!(way_off < way_bound && loss_off < loss_bound, "{kind:?}, {windows:?}: {way_off} of the way, losses {loss_off}");
        }
    }
}

/// Whatever the latents that it was given, a run's own arithmetic is in f32.
#[test]
fn latents_given_in_half_precision_are_sampled_in_f32() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    for kind in [Kind::Half, Kind::BFloat16] {
        let given = latents(5, CANVAS.0, CANVAS.1).to_kind(kind);
        for (windows, adain) in [(None, false), (None, true), (Some(windows()), false), (Some(windows()), true)] {
            let made = |start: Tensor| {
                let mut run = sampler_of(&toy, 2, windows);
                (run.latents, run.adain) = (start, adain);
                steps(&mut run)
            };
            for ((found, _), (wanted, _)) in made(given.shallow_clone()).iter().zip(made(given.to_kind(Kind::Float))) {
                assert_eq!(found.kind(), Kind::Float, "{windows:?}, AdaIN: {adain}");
                assert_same_run(found, &wanted);
            }
        }
    }
}

/// What happens, in order: passes with the number of latents in them, draws with their sizes.
type Log = Arc<Mutex<Vec<String>>>;

struct Watched<'a>(&'a Toy, Log);

impl Denoiser for Watched<'_> {
    type Condition = f64;
    fn forward(&self, latents: &Tensor, timestep: f64, condition: &f64, hook: &mut dyn AttentionHook) -> Result<Tensor> {
        self.1.lock().unwrap().push(format!("{}", latents.size()[0]));
        self.0.forward(latents, timestep, condition, hook)
    }
}

fn watched(toy: &Toy, windows: Windows, change: impl FnOnce(&mut GuidedSampler<Watched<'_>>)) -> Vec<String> {
    let log = Log::default();
    let mut run = sampler_of(Watched(toy, log.clone()), 4, Some(windows));
    let draws = log.clone();
    run.noise = Noise::from_fn(move |like| {
        draws.lock().unwrap().push(format!("{}x{}", like.size()[2], like.size()[3]));
        Ok(like.zeros_like())
    });
    change(&mut run);
    run.advance().unwrap();
    drop(run);
    Arc::try_unwrap(log).unwrap().into_inner().unwrap()
}

#[test]
fn passes_and_draws_in_their_order() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let passes = |log: &[String]| log.iter().filter(|entry| !entry.contains('x')).count();
    // Prompt and negative; AdaIN's noise, that of styles and content; styles and content; two iterations.
    let draws = "8x8 4x6 8x8 4x6 6x21";
    let first = |views: usize| format!("{views} {views} {draws} 1 1 {views} {views} {views}");
    let later = |views: usize| format!("{views} {views} {views} {views} {views}");
    let shared = watched(&toy, windows(), |_| ());
    assert_eq!(shared.join(" "), [first(2), later(2), later(1)].join(" "));
    assert_eq!(passes(&shared), 3 * 5 + 2);
    let own = watched(&toy, windows().with_reference_per_batch(true), |_| ());
    assert_eq!(own.join(" "), [first(2), first(2), first(1)].join(" "));
    assert_eq!(passes(&own), 3 * 7);
    // Plain MultiDiffusion: before the start time, or without iterations.
    for (iterations, start_time) in [(0, 999.0), (2, 751.0)] {
        let plain = watched(&toy, windows(), |run| (run.iterations, run.start_time) = (iterations, start_time));
        assert_eq!(plain.join(" "), "2 2 2 2 1 1");
    }
    let alone = watched(&toy, windows(), |run| (run.guidance.scale, run.adain, run.references.content) = (1.0, false, Some(latents(1, 6, 8))));
    assert_eq!(alone.join(" "), "2 8x8 4x6 6x8 1 1 1 2 2 2 1 2 2 1 1 1 1", "a content of a view's size is for all views");
}

#[test]
fn no_more_views_than_a_batch_are_on_the_way() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    for batch in 1..=6 {
        let log = watched(&toy, windows().with_batch(batch), |_| ());
        let most = log.iter().filter_map(|entry| entry.parse::<usize>().ok()).max();
        assert_eq!(most, Some(batch.min(VIEWS)));
    }
}

#[test]
fn an_error_leaves_the_run_where_it_was_and_the_step_is_made_again() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let custom = || {
        let mut seeded = Noise::seeded(3);
        Noise::from_fn(move |like| seeded.draw(like))
    };
    for (per_batch, passes) in [(false, 17), (true, 21)] {
        let windows = windows().with_reference_per_batch(per_batch);
        let expected = sampler(&toy, 2, windows).finish().unwrap();
        for fails in 1..=passes {
            for source in [Noise::seeded(3), custom()] {
                let mut run = sampler(&toy, 2, windows);
                run.noise = source;
                run.advance().unwrap();
                let before = run.latents.copy();
                for trouble in [Trouble::Memory, Trouble::Broken] {
                    toy.fail_at(fails, trouble);
                    let error = run.advance().unwrap_err();
                    assert_eq!(error.is_out_of_memory(), trouble == Trouble::Memory, "{error}");
                    assert_eq!(run.step, 1, "pass {fails}");
                    assert_same(&run.latents, &before);
                }
                assert_same_run(&run.finish().unwrap(), &expected);
            }
        }
        // There is no pass beyond these in a step.
        let before = toy.forwards.get();
        sampler(&toy, 2, windows).advance().unwrap();
        assert_eq!(toy.forwards.get() - before, passes);
    }
}

#[test]
fn a_saved_run_goes_on_to_the_same_picture() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let windows = windows().with_reference_per_batch(true);
    let expected = sampler(&toy, 4, windows).finish().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run.safetensors");
    for stop in 0..=4 {
        let mut run = sampler(&toy, 4, windows);
        for _ in 0..stop {
            run.advance().unwrap();
        }
        run.checkpoint().unwrap().save(&file).unwrap();
        let mut other = sampler(&toy, 4, windows);
        (other.noise, other.latents) = (Noise::seeded(99), noise(1, &[1, 4, CANVAS.0, CANVAS.1]));
        other.resume(&Checkpoint::load(&file).unwrap()).unwrap();
        assert_same_run(&other.finish().unwrap(), &expected);
    }
}

#[test]
fn a_view_that_is_not_finite_ends_the_run_and_names_the_step() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    for iterations in [0, 2] {
        let mut run = sampler(&toy, 4, windows());
        (run.iterations, run.adain) = (iterations, false);
        run.advance().unwrap();
        let before = run.latents.copy();
        toy.nan_at.set(Some(501.0));
        assert!(matches!(run.advance(), Err(Error::NotFinite { step: 2, .. })));
        assert_eq!(run.step, 1);
        assert_same(&run.latents, &before);
        toy.nan_at.set(None);
        assert!(run.finish().is_ok());
    }
}

#[test]
fn bad_settings_are_refused_and_the_run_stays() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let refused = |change: &dyn Fn(&mut GuidedSampler<&Toy>)| {
        let mut run = sampler(&toy, 4, windows());
        change(&mut run);
        let before = run.latents.copy();
        let error = run.advance().unwrap_err();
        assert_eq!(run.step, 0);
        assert!(run.latents.equal(&before));
        error
    };
    for (windows, name, value) in [
        (Windows::new(0, 1), "window size", "0"),
        (Windows::new(-3, 1), "window size", "-3"),
        (Windows::new(8, 0), "window stride", "0"),
        (Windows::new(8, i64::MIN), "window stride", "-9223372036854775808"),
        (Windows::new(8, 9), "window stride", "9 is not in 1..=8"),
        (Windows::new(8, 8).with_batch(0), "window batch", "0"),
    ] {
        for error in [windows.check().unwrap_err(), windows.views((8, 8)).err().unwrap(), refused(&|run| run.windows = Some(windows))] {
            assert!(matches!(error, Error::Argument { argument, .. } if argument == name), "{error}");
            assert!(error.to_string().contains(value), "{error}");
        }
    }
    for canvas in [(0, 8), (8, 0), (-1, 8), (8, i64::MIN)] {
        assert!(matches!(windows().views(canvas).err(), Some(Error::Argument { argument: "canvas", .. })));
    }
    // Packed tokens; several pictures; nothing.
    for shape in [&[1_i64, 24, 4][..], &[4, 24], &[2, 4, 6, 21]] {
        let error = refused(&|run| run.latents = noise(1, shape));
        assert!(matches!(&error, Error::Shape { name: "latents", found, .. } if found == shape), "{error}");
    }
    assert!(matches!(refused(&|run| run.latents = Tensor::zeros([1, 4, 0, 8], (Kind::Float, Device::Cpu))), Error::Argument { .. }));
    // As many as a batch has views: they must not be taken for one each.
    assert!(matches!(refused(&|run| run.references.styles[1].of = noise(1, &[2, 4, 8, 8])), Error::Shape { name: "style", .. }));
    assert!(matches!(refused(&|run| run.references.content = Some(noise(1, &[2, 4, 6, 21]))), Error::Shape { name: "content", .. }));
    // Neither of the canvas' size nor of a view's.
    assert!(matches!(refused(&|run| run.references.content = Some(latents(1, 6, 20))), Error::Shape { name: "content", .. }));
}
