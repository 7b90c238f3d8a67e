//! Guided sampling on a small network: what a step is, what it draws and costs, and how runs end.
#![allow(clippy::disallowed_methods, missing_docs)]

mod toy;

use attention_distillation::{
    adain, AdLoss, Adam, AdamConfig, Checkpoint, ContentLoss, Ddim, DdimConfig, Denoiser, Distiller, Error, Guidance, GuidedSampler, Loss, Noise,
    Optimizer, OptimizerState, PlainAttention, References, Result, Scheduler, Settings, Style, TotalLoss,
};
use std::sync::{
    atomic::{AtomicUsize, Ordering},
    Arc, Mutex,
};
use tch::{Device, Kind, Tensor};
use toy::{assert_same, assert_same_run, difference, extractor, features, latents, noise, number, Toy, Trouble};

fn ddim(steps: usize) -> Ddim {
    Ddim::new(&DdimConfig::default(), steps).unwrap()
}

fn guidance() -> Guidance<f64> {
    Guidance::new(1.5, 0.5, 3.0).unwrap()
}

/// Two styles of other sizes than the picture, and a content.
fn references() -> References {
    References::styles([Style::new(latents(9, 8, 8)), Style::new(latents(7, 4, 6))]).with_content(latents(8, 6, 8))
}

fn sampler(toy: &Toy, steps: usize) -> GuidedSampler<&Toy> {
    let mut run = GuidedSampler::new(extractor(toy), ddim(steps), guidance(), references(), latents(5, 6, 8), Noise::seeded(3));
    run.loss = run.loss.plus(0.2, ContentLoss);
    (run.iterations, run.adain) = (2, true);
    run
}

/// From another source of noise.
fn with_noise(mut run: GuidedSampler<&Toy>, noise: Noise) -> GuidedSampler<&Toy> {
    run.noise = noise;
    run
}

fn pictures(run: &mut GuidedSampler<&Toy, impl Optimizer>) -> Vec<Tensor> {
    let mut all = vec![];
    while run.advance().unwrap().is_some() {
        all.push(run.latents.copy());
    }
    all
}

/// The formula of classifier-free guidance, by two passes.
fn guided(toy: &Toy, z: &Tensor, t: f64, guidance: &Guidance<f64>) -> Tensor {
    let prompt = toy.forward(z, t, &guidance.prompt, &mut PlainAttention).unwrap();
    let negative = toy.forward(z, t, &guidance.negative.unwrap(), &mut PlainAttention).unwrap();
    &negative + (prompt - &negative) * guidance.scale
}

#[test]
fn without_iterations_it_is_plain_sampling() {
    tch::set_num_threads(1);
    let (toy, schedule, start) = (Toy::new(Kind::Float), ddim(5), latents(5, 6, 8));
    let mut z = start.copy();
    let drawn = Arc::new(AtomicUsize::new(0));
    let counter = drawn.clone();
    let counting = Noise::from_fn(move |like| {
        counter.fetch_add(1, Ordering::Relaxed);
        Ok(like.zeros_like())
    });
    let mut run = GuidedSampler::new(extractor(&toy), ddim(5), guidance(), References::default(), start.shallow_clone(), counting);
    (run.iterations, run.adain) = (0, true);
    for (index, &t) in schedule.timesteps().iter().enumerate() {
        z = schedule.step(index, &guided(&toy, &z, t, &guidance()), &z).unwrap();
        let progress = run.advance().unwrap().unwrap();
        assert_eq!((progress.step, progress.steps, progress.timestep), (index + 1, 5, t));
        assert_eq!(progress.loss().unwrap(), None);
        assert!(difference(&run.latents, &z) < 1e-5);
    }
    assert!(run.advance().unwrap().is_none());
    assert_eq!(drawn.load(Ordering::Relaxed), 0, "nothing needs noise");
    assert_same(&start, &latents(5, 6, 8));
}

/// Written out by hand, with the draws in the authors' order: AdaIN's for each style, each style, the content.
#[test]
fn a_step_is_what_the_paper_says() {
    tch::set_num_threads(1);
    let (toy, schedule) = (Toy::new(Kind::Double), ddim(4));
    let (index, start) = (1, latents(5, 6, 8));
    let (t, next) = (schedule.timesteps()[index], schedule.next_timestep(index));
    assert_eq!((t, next), (501.0, 251.0));
    let draws: Vec<Tensor> =
        [(9, 8, 8), (7, 4, 6), (9, 8, 8), (7, 4, 6), (8, 6, 8)].iter().zip(100..).map(|((_, h, w), seed)| latents(seed, *h, *w)).collect();

    let mut z = schedule.step(index, &guided(&toy, &start, t, &guidance()), &start).unwrap();
    let noised = |clean: &Tensor, i: usize| schedule.add_noise(clean, &draws[i], next).unwrap();
    let clean = references();
    let styles = [noised(&clean.styles[0].of, 0), noised(&clean.styles[1].of, 1)];
    z = adain(&z, &styles).unwrap();
    let noisy = References::styles([Style::new(noised(&clean.styles[0].of, 2)), Style::new(noised(&clean.styles[1].of, 3))])
        .with_content(noised(clean.content.as_ref().unwrap(), 4));
    let features = extractor(&toy).references(&noisy, next).unwrap();
    let loss = TotalLoss::default().plus(1.0, AdLoss::default()).plus(0.2, ContentLoss);
    let mut adam = Adam::new(AdamConfig::with_learning_rate(0.03));
    let mut last = 0.0;
    for _ in 0..2 {
        last = number(&extractor(&toy).descend(&mut z, next, &features, &loss, &mut adam).unwrap());
    }

    let queue = Mutex::new(draws.iter().map(Tensor::copy).collect::<Vec<_>>());
    let mut run = sampler(&toy, 4);
    run.noise = Noise::from_fn(move |like| {
        let drawn = queue.lock().unwrap().remove(0);
        assert_eq!(drawn.size(), like.size());
        Ok(drawn)
    });
    run.optimizer.config.learning_rate = 0.03;
    run.step = index;
    let progress = run.advance().unwrap().unwrap();
    assert!((progress.loss().unwrap().unwrap() - last).abs() < 1e-5);
    assert!(difference(&run.latents, &z) < 1e-5, "{}", difference(&run.latents, &z));
}

/// A descent that only remembers.
struct Counting {
    steps: Arc<Mutex<Vec<&'static str>>>,
}

impl Optimizer for Counting {
    fn step(&mut self, _: &mut Tensor, _: &Tensor) -> Result<()> {
        self.steps.lock().unwrap().push("step");
        Ok(())
    }
    fn reset(&mut self) {
        self.steps.lock().unwrap().push("reset");
    }
    fn state(&self) -> Result<OptimizerState> {
        Ok(vec![])
    }
    fn load_state(&mut self, _: OptimizerState) -> Result<()> {
        Ok(())
    }
}

#[test]
fn each_timestep_below_the_start_time_has_a_fresh_optimizer() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let steps = Arc::new(Mutex::new(vec![]));
    let mut run = sampler(&toy, 4).with_optimizer(Counting { steps: steps.clone() });
    (run.adain, run.start_time) = (false, 501.0);
    let mut losses = vec![];
    while let Some(progress) = run.advance().unwrap() {
        losses.push(progress.loss().unwrap().is_some());
    }
    // At 751, 501, 251 and 1: below 501 are two.
    assert_eq!(losses, [false, false, true, true]);
    assert_eq!(*steps.lock().unwrap(), ["reset", "step", "step"].repeat(2));
}

/// With fewer than 500 steps every timestep is below it.
#[test]
fn descents_begin_with_the_first_step_unless_told_otherwise() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let mut run = sampler(&toy, 20);
    assert_eq!(run.start_time, 999.0);
    let first = run.advance().unwrap().unwrap();
    assert_eq!((first.timestep, first.loss().unwrap().is_some()), (951.0, true));
}

#[test]
fn it_comes_nearer_to_the_styles_than_plain_sampling() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    // A few runs: each is a chaotic descent, which goes another way on another kind of processor, and comes down to .6 to .8 of
    // plain sampling's distance.
    let apart = |iterations: usize, adain: bool| -> Vec<f64> {
        let of = |seed: u64| {
            let mut run = with_noise(sampler(&toy, 8), Noise::seeded(seed));
            (run.iterations, run.adain) = (iterations, adain);
            let z = run.finish().unwrap();
            let clean = extractor(&toy).references(&references(), 1.0).unwrap();
            number(&tch::no_grad(|| AdLoss::default().evaluate(&extractor(&toy).extract(&z, 1.0).unwrap(), &clean)).unwrap())
        };
        let seeds = if iterations == 0 { 1..=1 } else { 1..=6 }; // Without descents nothing is drawn.
        seeds.map(of).collect()
    };
    let (plain, guided) = (apart(0, false)[0], apart(5, false));
    let mean = guided.iter().sum::<f64>() / guided.len() as f64;
    assert!(mean < 0.8 * plain && guided.iter().all(|guided| guided < &plain), "{plain} to {guided:?}");
    assert!(guided.iter().zip(apart(5, true)).all(|(guided, adain)| (adain - guided).abs() > 1e-3), "AdaIN makes a difference");
}

#[test]
fn a_step_costs_what_it_must_and_no_more() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let cost = |run: &mut GuidedSampler<&Toy>| {
        let before = toy.forwards.get();
        run.advance().unwrap();
        toy.forwards.get() - before
    };
    // Prompt and negative, two styles and a content, two iterations.
    assert_eq!(cost(&mut sampler(&toy, 4)), 2 + 3 + 2);
    let mut alone = sampler(&toy, 4);
    alone.guidance.scale = 1.0;
    assert_eq!(cost(&mut alone), 1 + 3 + 2);
    alone.iterations = 0;
    assert_eq!(cost(&mut alone), 1);
}

#[test]
fn the_same_seed_gives_the_same_picture_and_another_another() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let made = |seed: u64| with_noise(sampler(&toy, 3), Noise::seeded(seed)).finish().unwrap();
    assert_same_run(&made(1), &made(1));
    assert!(difference(&made(1), &made(2)) > 1e-2);
}

#[test]
fn an_error_leaves_the_run_where_it_was_and_the_step_is_made_again() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let expected = sampler(&toy, 3).finish().unwrap();
    // A source without a state of its own is rewound as well; it gives what the seeded one gives.
    let custom = || {
        let mut seeded = Noise::seeded(3);
        Noise::from_fn(move |like| seeded.draw(like))
    };
    for fails in 1..=7 {
        for source in [Noise::seeded(3), custom()] {
            let mut run = with_noise(sampler(&toy, 3), source);
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
}

#[test]
fn a_saved_run_goes_on_to_the_same_picture() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let expected = pictures(&mut sampler(&toy, 4));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run.safetensors");
    for stop in 0..=4 {
        let mut run = sampler(&toy, 4);
        for _ in 0..stop {
            run.advance().unwrap();
        }
        run.checkpoint().unwrap().save(&file).unwrap();
        let mut other = with_noise(sampler(&toy, 4), Noise::seeded(99));
        other.latents = noise(1, &[1, 4, 6, 8]);
        other.resume(&Checkpoint::load(&file).unwrap()).unwrap();
        assert_eq!(other.step, stop);
        assert_same_run(&other.finish().unwrap(), &expected[3]);
    }
    // A run of the other procedure, or with another kind of noise, is another run.
    let times: Vec<f64> = ddim(4).timesteps().to_vec();
    let mut other = Distiller::new(extractor(&toy), times, references(), latents(5, 6, 8));
    assert!(matches!(other.resume(&Checkpoint::load(&file).unwrap()), Err(Error::Argument { argument: "checkpoint", .. })));
    assert!(sampler(&toy, 4).resume(&other.checkpoint().unwrap()).is_err());
    let mut own = with_noise(sampler(&toy, 4), Noise::from_fn(|like| Ok(like.zeros_like())));
    assert!(matches!(own.resume(&Checkpoint::load(&file).unwrap()), Err(Error::Argument { argument: "noise state", .. })));
    own.checkpoint().unwrap().save(folder.path().join("own")).unwrap();
    let saved = Checkpoint::load(folder.path().join("own")).unwrap();
    assert!(own.resume(&saved).is_ok() && sampler(&toy, 4).resume(&saved).is_err());
    let mut damaged = Checkpoint::load(&file).unwrap();
    damaged.noise = Some(Tensor::from_slice(&[1_i64, 2]));
    let mut run = sampler(&toy, 4);
    assert!(matches!(run.resume(&damaged), Err(Error::Argument { argument: "noise state", .. })));
    assert_eq!(run.step, 0, "the run is as it was");
    assert_same_run(&run.finish().unwrap(), &expected[3]);
    let mut shifted = Checkpoint::load(&file).unwrap();
    shifted.timesteps[1] += 1.0;
    assert!(matches!(sampler(&toy, 4).resume(&shifted), Err(Error::Argument { argument: "checkpoint", .. })));
    let mut longer = sampler(&toy, 5);
    assert!(matches!(longer.resume(&Checkpoint::load(&file).unwrap()), Err(Error::Argument { argument: "checkpoint", .. })));
}

/// Another program's: it hands the latents on as they are.
struct Still([f64; 3]);

impl Scheduler for Still {
    fn timesteps(&self) -> &[f64] {
        &self.0
    }
    fn next_timestep(&self, index: usize) -> f64 {
        self.0.get(index + 1).copied().unwrap_or(0.0)
    }
    fn add_noise(&self, clean: &Tensor, _: &Tensor, _: f64) -> Result<Tensor> {
        Ok(clean.shallow_clone())
    }
    fn step(&self, _: usize, _: &Tensor, latents: &Tensor) -> Result<Tensor> {
        Ok(latents.shallow_clone())
    }
}

#[test]
fn a_scheduler_of_ones_own_keeps_its_latents() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let start = latents(5, 6, 8);
    let still = Still([900.0, 600.0, 300.0]);
    let mut run = GuidedSampler::new(extractor(&toy), still, guidance(), references(), start.shallow_clone(), Noise::seeded(3));
    run.advance().unwrap();
    assert_same(&start, &latents(5, 6, 8));
    let between = run.latents.copy();
    let held = run.latents.shallow_clone();
    assert!(difference(&between, &start) > 1e-3, "the descents moved it");
    // A failure in the second iteration, after the first has moved the latents.
    toy.fail_at(2 + 3 + 2, Trouble::Memory);
    assert!(run.advance().is_err());
    assert_same(&run.latents, &between);
    run.finish().map(drop).unwrap();
    assert_same(&held, &between);
}

/// SDEdit: an edited picture, noised to a step's timestep, is sampled from there.
#[test]
fn a_run_may_begin_at_a_later_step() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let schedule = ddim(4);
    let mut run = sampler(&toy, 4);
    run.latents = schedule.add_noise(&latents(11, 6, 8), &latents(12, 6, 8), schedule.timesteps()[2]).unwrap();
    run.step = 2;
    assert_eq!(run.advance().unwrap().unwrap().step, 3);
    assert!(run.finish().is_ok());
    assert_eq!(run.step, 4);
}

/// By hand above, in one call here.
#[test]
fn an_edit_takes_the_last_steps_from_the_noised_picture() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let (schedule, picture) = (ddim(8), latents(11, 6, 8));
    for (strength, step) in [(1.0, 0), (0.6, 3), (0.5, 4), (0.01, 7)] {
        let run = sampler(&toy, 8).edited(&picture, strength).unwrap();
        assert_eq!(run.step, step, "{strength}");
        assert_same(&run.latents, &schedule.add_noise(&picture, &latents(5, 6, 8), schedule.timesteps()[step]).unwrap());
    }
    // One picture for several of the batch.
    let mut several = sampler(&toy, 8);
    several.latents = noise(4, &[2, 4, 6, 8]);
    assert_eq!(several.edited(&picture, 0.5).unwrap().latents.size(), [2, 4, 6, 8]);
    for (strength, step) in [(0.8, 4), (0.9, 2), (0.3, 14), (0.7, 6)] {
        assert_eq!(sampler(&toy, 20).edited(&picture, strength).unwrap().step, step, "{strength} of 20");
    }
    for strength in [0.0, -0.5, 1.01, 1e-20, f64::NAN, f64::INFINITY] {
        assert!(matches!(sampler(&toy, 8).edited(&picture, strength), Err(Error::Argument { argument: "strength", .. })), "{strength}");
    }
    for bad in [latents(1, 8, 6), noise(1, &[2, 4, 6, 8]), noise(1, &[4, 6, 8]), noise(1, &[1, 3, 6, 8])] {
        assert!(matches!(sampler(&toy, 8).edited(&bad, 0.5), Err(Error::Shape { name: "edited picture", .. })));
    }
    let mut begun = sampler(&toy, 8);
    begun.advance().unwrap();
    assert!(matches!(begun.edited(&picture, 0.5), Err(Error::Argument { argument: "step", .. })));
    // With strength 1 no step is left out; a second edit would still take the noised picture for noise.
    for strength in [1.0, 0.5] {
        let edited = sampler(&toy, 8).edited(&picture, strength).unwrap();
        assert!(matches!(edited.edited(&picture, 1.0), Err(Error::Argument { argument: "step", .. })));
    }
}

#[test]
fn several_pictures_at_once_are_each_their_own() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let (one, other) = (latents(5, 6, 8), latents(6, 6, 8));
    let made = |start: &Tensor| {
        let mut run = sampler(&toy, 3);
        run.latents = start.shallow_clone();
        run.finish().unwrap()
    };
    let both = made(&Tensor::cat(&[&one, &other], 0));
    for (i, start) in [&one, &other].into_iter().enumerate() {
        // The mean over two pictures halves each one's gradient, which Adam hardly sees.
        assert!(difference(&both.narrow(0, i as i64, 1), &made(start)) < 1e-2);
    }
}

#[test]
fn a_picture_that_is_not_finite_ends_the_run_and_names_the_step() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    for iterations in [0, 2] {
        let mut run = sampler(&toy, 4);
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
    let refused = |change: fn(&mut GuidedSampler<&Toy>)| {
        let mut run = sampler(&toy, 4);
        change(&mut run);
        let before = run.latents.copy();
        let error = run.advance().unwrap_err().to_string();
        assert_eq!(run.step, 0);
        assert_same(&run.latents, &before);
        error
    };
    for scale in [f64::NAN, -0.1, f64::INFINITY] {
        assert!(matches!(Guidance::new(1.0, 1.0, scale), Err(Error::Argument { argument: "guidance", .. })));
    }
    assert!(refused(|run| run.guidance.scale = f64::NAN).contains("guidance"));
    assert!(refused(|run| run.guidance.scale = -1.0).contains("guidance"));
    assert!(refused(|run| run.start_time = f64::NAN).contains("start time"));
    assert!(refused(|run| run.references = References::default()).contains("styles"));
    assert!(refused(|run| run.references.content = None).contains("content"));
    assert!(refused(|run| run.references.styles[0].of = noise(1, &[1, 3, 8, 8])).contains("style"));
    assert!(refused(|run| run.optimizer.config.learning_rate = f64::NAN).contains("learning rate"));
    assert!(refused(|run| run.noise = Noise::from_fn(|_| Ok(Tensor::zeros([1], (Kind::Float, Device::Cpu))))).contains("noise"));
    assert!(refused(|run| run.noise = Noise::from_fn(|_| Err(Error::denoiser("no dice")))).contains("no dice"));
}

#[test]
fn settings_are_taken_over() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let run = sampler(&toy, 4).with_settings(&Settings::text_to_image()).unwrap();
    assert_eq!((run.iterations, run.adain, run.optimizer.config.learning_rate), (3, true, 0.015));
    assert_eq!((run.guidance.scale, run.references.smoothing), (7.5, 0.0));
    let mut smooth = Settings::text_to_image();
    smooth.smoothing = 0.6;
    let picture = |settings: &Settings| sampler(&toy, 4).with_settings(settings).unwrap().finish().unwrap();
    assert!(difference(&picture(&smooth), &picture(&Settings::text_to_image())) > 1e-3);
    // The losses are set, not added to those that are there; without a content there is no content loss.
    let (picture, references) = (features(&toy, &run.latents), extractor(&toy).references(&references(), 500.0).unwrap());
    let value = |loss: &dyn Loss| number(&loss.evaluate(&picture, &references).unwrap());
    let (ad, content) = (value(&AdLoss::default()), value(&ContentLoss));
    let (found, wanted) = (value(&run.loss), ad + 0.25 * content);
    assert!((found - wanted).abs() < 1e-5 * wanted, "{found} of {ad} and {content}");
    let mut alone = sampler(&toy, 4);
    alone.references.content = None;
    assert_eq!(value(&alone.with_settings(&Settings::text_to_image()).unwrap().loss), ad);
    let mut settings = Settings::style_transfer_by_sampling();
    settings.iterations = 0;
    assert_eq!(sampler(&toy, 4).with_settings(&settings).unwrap().iterations, 0);
    settings.guidance = f64::NAN;
    assert!(sampler(&toy, 4).with_settings(&settings).is_err());
}

#[test]
fn runs_cross_threads() {
    fn sendable<T: Send>() {}
    sendable::<GuidedSampler<Box<dyn Denoiser<Condition = f64> + Send>>>();
    sendable::<Noise>();
}

#[test]
fn adain_gives_mean_and_deviation_of_the_styles() {
    tch::set_num_threads(1);
    let z = noise(1, &[2, 4, 5, 6]);
    let styles = [noise(2, &[1, 4, 8, 8]) * 3.0 + 1.0, noise(3, &[1, 4, 3, 7]) * 0.5 - 2.0];
    let moved = adain(&z, &styles).unwrap();
    let pixels = Tensor::cat(&[styles[0].flatten(2, 3), styles[1].flatten(2, 3)], 2);
    let over = |x: &Tensor| (x.mean_dim(&[-1_i64][..], false, Kind::Float), x.std_dim(&[-1_i64][..], true, false));
    let ((mean, deviation), (to_mean, to_deviation)) = (over(&moved.flatten(2, 3)), over(&pixels));
    for i in 0..2 {
        assert!(difference(&mean.narrow(0, i, 1), &to_mean) < 1e-5);
        assert!(difference(&deviation.narrow(0, i, 1), &to_deviation) < 1e-4);
    }
    // What has the styles' statistics stays.
    assert!(difference(&adain(&styles[0], &styles[..1]).unwrap(), &styles[0]) < 1e-4);
    // One style for each picture: each is its own.
    let each = Tensor::cat(&[&styles[0], &(&styles[0] * 2.0)], 0);
    let own = adain(&z, &[each]).unwrap();
    assert!(difference(&own.narrow(0, 0, 1), &adain(&z.narrow(0, 0, 1), &styles[..1]).unwrap()) < 1e-5);
    // Tokens before channels give the same numbers.
    let packed = |x: &Tensor| x.flatten(2, 3).transpose(1, 2);
    let tokens = adain(&packed(&z), &[packed(&styles[0]), packed(&styles[1])]).unwrap();
    assert!(difference(&tokens, &packed(&moved)) < 1e-5);
    // A flat picture becomes the mean; nothing is divided by 0.
    assert!(difference(&adain(&z.zeros_like(), &styles).unwrap(), &(to_mean.view([1, 4, 1, 1]) + z.zeros_like())) < 1e-5);
}

#[test]
fn adain_refuses_what_does_not_fit() {
    tch::set_num_threads(1);
    let z = noise(1, &[2, 4, 5, 6]);
    assert!(matches!(adain(&z, &[]), Err(Error::Argument { argument: "styles", .. })));
    for bad in [noise(2, &[1, 3, 5, 6]), noise(2, &[3, 4, 5, 6]), noise(2, &[1, 4, 30]), noise(2, &[4, 30]), noise(2, &[1, 4, 1, 1])] {
        assert!(matches!(adain(&z, &[bad]), Err(Error::Shape { name: "style", .. })));
    }
    assert!(matches!(adain(&noise(1, &[1, 4, 1, 1]), &[noise(2, &[1, 4, 5, 6])]), Err(Error::Shape { name: "latents", .. })));
}
