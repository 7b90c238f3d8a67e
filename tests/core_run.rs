//! Whole runs on a small network: what they do, what they cost, and how they end.
#![allow(clippy::disallowed_methods, missing_docs)]

mod toy;

use attention_distillation::{
    adain, AdLoss, Adam, AdamConfig, BetaSchedule, Checkpoint, ContentLoss, Ddim, DdimConfig, Distiller, Error, FeatureCache, FeatureExtractor,
    Features, GradientDescent, Loss, Optimizer, Procedure, Progress, References, Result, Scheduler, Settings, Spacing, Style, TotalLoss,
};
use tch::{Device, Kind, Tensor};
use toy::{assert_same, assert_same_run, difference, extractor, latents, number, Toy, Trouble};

fn times(steps: usize) -> Vec<f64> {
    (0..steps).rev().map(|i| 1.0 + (1000 / steps * i) as f64).collect()
}

fn references() -> References {
    References::style(latents(9, 8, 8)).with_content(latents(8, 6, 8))
}

fn transfer(toy: &Toy, steps: usize) -> Distiller<&Toy> {
    Distiller::style_transfer(extractor(toy), times(steps), references(), 0.25).unwrap()
}

/// All that a run's error must leave alone.
fn state(run: &Distiller<&Toy, impl Optimizer>) -> (usize, Tensor, Vec<(String, Tensor)>) {
    let optimizer = run.optimizer.state().unwrap().into_iter().map(|(name, tensor)| (name, tensor.copy()));
    (run.step, run.latents.copy(), optimizer.collect())
}

#[track_caller]
fn assert_untouched(run: &Distiller<&Toy, impl Optimizer>, before: &(usize, Tensor, Vec<(String, Tensor)>)) {
    let now = state(run);
    assert_eq!(now.0, before.0, "step");
    assert_same(&now.1, &before.1);
    assert_eq!(now.2.len(), before.2.len(), "optimizer");
    for ((name, x), (other, y)) in now.2.iter().zip(&before.2) {
        assert_eq!(name, other);
        assert_same(x, y);
    }
}

fn losses(run: &mut Distiller<&Toy, impl Optimizer>) -> Vec<f64> {
    let mut all = vec![];
    while let Some(progress) = run.advance().unwrap() {
        all.push(progress.loss().unwrap().unwrap());
    }
    all
}

#[test]
fn a_run_lowers_the_loss() {
    tch::set_num_threads(1);
    for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
        let toy = Toy::new(kind);
        let mut run = transfer(&toy, 50);
        assert_same(&run.latents, &latents(8, 6, 8));
        let found = losses(&mut run);
        assert_eq!((found.len(), run.step), (50, 50));
        assert!(found[49] < 0.8 * found[0], "{kind:?}: {} to {}", found[0], found[49]);
        assert_eq!((run.latents.kind(), run.latents.requires_grad()), (Kind::Float, false));
        assert!(run.advance().unwrap().is_none(), "it stays finished");
    }
}

#[test]
fn texture_starts_from_noise_and_leaves_it_to_its_owner() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let start = latents(5, 8, 6);
    let mut run = Distiller::new(extractor(&toy), times(40), References::style(latents(9, 8, 8)), start.shallow_clone());
    let found = losses(&mut run);
    assert!(found[39] < 0.8 * found[0], "{} to {}", found[0], found[39]);
    assert_same(&start, &latents(5, 8, 6));
    assert!(difference(&run.latents, &start) > 0.1);
    let given = references();
    let mut run = Distiller::style_transfer(extractor(&toy), times(3), given, 0.25).unwrap();
    losses(&mut run);
    assert_same(run.references.content.as_ref().unwrap(), &latents(8, 6, 8));
}

/// By the settings as by the references, at every step, and by the content that AdaIN made.
#[test]
fn a_run_may_smooth_its_queries() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let mut settings = Settings::style_transfer();
    let run = |settings: &Settings| transfer(&toy, 3).with_settings(settings).unwrap().finish().unwrap();
    let plain = run(&settings);
    settings.smoothing = 0.6;
    let picture = run(&settings);
    assert!(difference(&picture, &plain) > 1e-3);
    let mut by_field = transfer(&toy, 3);
    by_field.references.smoothing = 0.6;
    assert_eq!(by_field.targets().unwrap().smoothing, 0.6);
    assert_same_run(&by_field.finish().unwrap(), &picture);
    let mut late = transfer(&toy, 3);
    let _ = late.advance().unwrap();
    late.references.smoothing = 0.6;
    let late = late.finish().unwrap();
    assert!(difference(&late, &plain) > 1e-3 && difference(&late, &picture) > 1e-3);
    (settings.adain, settings.smoothing) = (true, 0.0);
    let moved = run(&settings);
    settings.smoothing = 0.6;
    assert!(difference(&run(&settings), &moved) > 1e-3);
    settings.smoothing = 1.5;
    assert!(matches!(transfer(&toy, 3).with_settings(&settings), Err(Error::Argument { argument: "smoothing", .. })));
}

/// A loss of one's own that does not say whether it looks at the content.
struct Silent;

impl Loss for Silent {
    fn evaluate(&self, picture: &Features, references: &References<Features>) -> Result<Tensor> {
        AdLoss::default().evaluate(picture, references)
    }
}

#[test]
fn no_pass_is_made_for_a_content_that_no_loss_looks_at() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let made = |mut run: Distiller<&Toy>| {
        let before = toy.forwards.get();
        let picture = run.finish().unwrap();
        (picture, toy.forwards.get() - before)
    };
    let of_weight = |weight: f64| Distiller::style_transfer(extractor(&toy), times(3), references(), weight).unwrap();
    let alone = Distiller::new(extractor(&toy), times(3), References::style(latents(9, 8, 8)), latents(8, 6, 8));
    let ((picture, passes), (wanted, _)) = (made(of_weight(0.0)), made(alone));
    assert_eq!(passes, 3 * 2);
    assert_same_run(&picture, &wanted);
    assert!(of_weight(0.0).targets().unwrap().content.is_none());
    assert_eq!(made(of_weight(0.25)).1, 3 * 3);
    let mut smooth = of_weight(0.0);
    smooth.references.smoothing = 0.5;
    let (smooth, passes) = made(smooth);
    assert_eq!(passes, 3 * 3);
    assert!(difference(&smooth, &picture) > 1e-3);
    let mut start_moved = of_weight(0.0);
    start_moved.adain = true;
    assert_eq!(made(start_moved).1, 3 * 2);
    for loss in [TotalLoss::default().plus(1.0, Silent), TotalLoss::default().plus(1.0, Box::new(Silent) as Box<dyn Loss + Send>)] {
        let mut own = of_weight(0.0);
        own.loss = loss;
        let (own, passes) = made(own);
        assert_eq!(passes, 3 * 3);
        assert_same_run(&own, &picture);
    }
}

/// Start and content are moved, from what they were given; the references stay, and a run that has begun goes on from where it is.
#[test]
fn a_run_may_take_the_styles_statistics_first() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let moved = adain(&latents(8, 6, 8), &[latents(9, 8, 8)]).unwrap();
    assert!(difference(&moved, &latents(8, 6, 8)) > 0.05);
    let by_hand = || Distiller::style_transfer(extractor(&toy), times(3), references().with_content(moved.copy()), 0.25).unwrap();
    let mut settings = Settings::style_transfer();
    assert!(!transfer(&toy, 3).with_settings(&settings).unwrap().adain);
    settings.adain = true;
    let run = || transfer(&toy, 3).with_settings(&settings).unwrap();
    let picture = by_hand().finish().unwrap();
    assert_same_run(&run().finish().unwrap(), &picture);
    assert!(difference(&transfer(&toy, 3).finish().unwrap(), &picture) > 1e-3);
    // Not of the start alone.
    let mut start = transfer(&toy, 3);
    start.latents = moved.copy();
    assert!(difference(&start.finish().unwrap(), &picture) > 1e-3);
    assert_same_run(&run().targets().unwrap().content.unwrap(), &moved);
    assert_same(&transfer(&toy, 3).targets().unwrap().content.unwrap(), &latents(8, 6, 8));
    // Asked for twice it is done once; another optimizer changes nothing of it; a start that is put in afterwards counts.
    assert_same_run(&run().with_settings(&settings).unwrap().finish().unwrap(), &picture);
    let descent = || GradientDescent { learning_rate: 0.1 };
    assert_same_run(&run().with_optimizer(descent()).finish().unwrap(), &by_hand().with_optimizer(descent()).finish().unwrap());
    let mut late = run();
    late.latents = latents(5, 6, 8);
    let mut other = by_hand();
    other.latents = adain(&latents(5, 6, 8), &[latents(9, 8, 8)]).unwrap();
    assert_same_run(&late.finish().unwrap(), &other.finish().unwrap());

    // What hardly differs is made four times as wide, no more: what a grey picture has of colours is noise.
    let grey = || {
        let grey = latents(8, 6, 8);
        let _ = grey.narrow(1, 1, 1).g_mul_scalar_(0.01);
        grey
    };
    let mut run_of_grey = run();
    run_of_grey.latents = grey();
    let style = adain(&grey(), &[latents(9, 8, 8)]).unwrap();
    let deviation = |z: &Tensor| z.narrow(1, 1, 1).std(true).double_value(&[]);
    assert!(deviation(&style) > 8.0 * deviation(&grey()));
    let (middle, mean) = (grey().narrow(1, 1, 1).mean(Kind::Float), style.narrow(1, 1, 1).mean(Kind::Float));
    let wider = (grey().narrow(1, 1, 1) - middle) * 4.0 + mean;
    let mut other = by_hand();
    other.latents = Tensor::cat(&[style.narrow(1, 0, 1), wider, style.narrow(1, 2, 2)], 1);
    run_of_grey.references.content = Some(grey());
    assert!(difference(&run_of_grey.targets().unwrap().content.unwrap(), &other.latents) < 1e-5);
    other.references.content = Some(other.latents.copy());
    assert!(difference(&run_of_grey.finish().unwrap(), &other.finish().unwrap()) < 1e-3);

    // Saved before or after its first step, it goes on to the same picture.
    for steps in [0, 1] {
        let mut first = run();
        (0..steps).for_each(|_| drop(first.advance().unwrap()));
        assert_same(first.references.content.as_ref().unwrap(), &latents(8, 6, 8));
        let mut resumed = run();
        resumed.resume(&first.checkpoint().unwrap()).unwrap();
        assert_same_run(&resumed.finish().unwrap(), &picture);
    }
    // Begun without it, it is too late for the start.
    let [mut begun, mut other] = [(); 2].map(|()| transfer(&toy, 3));
    for run in [&mut begun, &mut other] {
        run.advance().unwrap();
    }
    begun.adain = true;
    other.references.content = Some(moved.copy());
    assert_same_run(&begun.finish().unwrap(), &other.finish().unwrap());

    // One content for two pictures, each with a style of its own.
    let pair = |a: Tensor, b: Tensor| Tensor::cat(&[a, b], 0);
    let two = References::style(pair(latents(9, 8, 8), latents(10, 8, 8))).with_content(latents(8, 6, 8));
    let mut batch = Distiller::style_transfer(extractor(&toy), times(2), two, 0.25).unwrap();
    (batch.latents, batch.adain) = (pair(latents(8, 6, 8), latents(8, 6, 8)), true);
    let other = adain(&latents(8, 6, 8), &[latents(10, 8, 8)]).unwrap();
    let by_hand = pair(moved.copy(), other);
    assert!(difference(&batch.targets().unwrap().content.unwrap(), &by_hand) < 1e-5);
    let styles = || References::style(pair(latents(9, 8, 8), latents(10, 8, 8)));
    let mut given = Distiller::style_transfer(extractor(&toy), times(2), styles().with_content(by_hand), 0.25).unwrap();
    assert!(difference(&batch.finish().unwrap(), &given.finish().unwrap()) < 1e-3);
    // Of one style they see one content, which then takes one pass.
    batch.references = references();
    assert_same_run(&batch.targets().unwrap().content.unwrap(), &moved);

    let mut half = transfer(&toy, 3);
    (half.latents, half.adain) = (half.latents.to_kind(Kind::Half), true);
    half.references.content = half.references.content.map(|content| content.to_kind(Kind::Half));
    assert_eq!(half.targets().unwrap().content.unwrap().kind(), Kind::Float);
    half.advance().unwrap();
    assert_eq!((half.latents.kind(), half.latents.requires_grad()), (Kind::Float, false));
    let mut none = Distiller::new(extractor(&toy), times(3), References::default(), latents(8, 6, 8));
    none.adain = true;
    assert!(matches!(none.advance(), Err(Error::Argument { argument: "styles", .. })));
    assert_same(&none.latents, &latents(8, 6, 8));
}

#[test]
fn from_coarse_to_fine_a_run_takes_its_last_steps_from_a_draft() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let draft = latents(4, 6, 8);
    let by_hand = |first: usize| {
        let mut run = transfer(&toy, 5);
        run.timesteps.drain(..first);
        run.latents = draft.copy();
        run
    };
    for (strength, first) in [(1.0, 0), (0.6, 2), (0.41, 2), (0.4, 3), (1e-3, 4)] {
        let mut run = transfer(&toy, 5).with_draft(&draft, strength).unwrap();
        assert_eq!(run.step, first, "{strength}");
        assert_same(&run.latents, &draft);
        assert_same_run(&run.finish().unwrap(), &by_hand(first).finish().unwrap());
    }
    assert_same(&draft, &latents(4, 6, 8));

    // AdaIN concerns the content alone, also with a draft for all steps, after another optimizer, and when such a run goes on from a file.
    let adain_run = |strength: f64| {
        let mut run = transfer(&toy, 5).with_draft(&draft, strength).unwrap().with_optimizer(Adam::default());
        run.adain = true;
        run
    };
    for (strength, first) in [(1.0, 0), (0.4, 3)] {
        let mut other = by_hand(first);
        other.references.content = Some(adain(&latents(8, 6, 8), &[latents(9, 8, 8)]).unwrap());
        let picture = other.finish().unwrap();
        assert_same_run(&adain_run(strength).finish().unwrap(), &picture);
        let mut resumed = transfer(&toy, 5);
        resumed.adain = true;
        let mut begun = adain_run(strength);
        begun.advance().unwrap();
        resumed.resume(&begun.checkpoint().unwrap()).unwrap();
        assert_same_run(&resumed.finish().unwrap(), &picture);
    }

    let mut resumed = transfer(&toy, 5);
    resumed.adain = true;
    resumed.resume(&adain_run(0.4).checkpoint().unwrap()).unwrap();
    assert_same_run(&resumed.finish().unwrap(), &adain_run(0.4).finish().unwrap());

    // One draft for a batch, in any precision.
    let mut pair = transfer(&toy, 5);
    pair.latents = Tensor::cat(&[latents(8, 6, 8), latents(8, 6, 8)], 0);
    let mut pair = pair.with_draft(&draft.to_kind(Kind::Half), 0.4).unwrap();
    assert_eq!((pair.latents.kind(), pair.latents.size()), (Kind::Float, vec![2, 4, 6, 8]));
    let both = pair.finish().unwrap();
    assert!(difference(&both.narrow(0, 0, 1), &both.narrow(0, 1, 1)) < 1e-5);

    for strength in [0.0, -0.4, 1.1, f64::NAN, f64::INFINITY] {
        let error = transfer(&toy, 5).with_draft(&draft, strength).unwrap_err();
        assert!(matches!(error, Error::Argument { argument: "strength", .. }), "{strength}: {error}");
    }
    for wrong in [latents(4, 6, 6), latents(4, 8, 6), Tensor::cat(&[draft.copy(), draft.copy()], 0), draft.squeeze_dim(0)] {
        let error = transfer(&toy, 5).with_draft(&wrong, 0.4).unwrap_err();
        assert!(matches!(error, Error::Shape { name: "draft", .. }), "{error}");
    }
    let mut begun = transfer(&toy, 5);
    begun.advance().unwrap();
    for run in [begun, transfer(&toy, 5).with_draft(&draft, 1.0).unwrap()] {
        assert!(matches!(run.with_draft(&draft, 0.4), Err(Error::Argument { argument: "step", .. })));
    }
    let none = Distiller::new(extractor(&toy), vec![], references(), latents(8, 6, 8));
    assert!(matches!(none.with_draft(&draft, 0.4), Err(Error::Argument { argument: "strength", .. })));
}

#[test]
fn progress_says_where_the_run_is() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let mut run = transfer(&toy, 3);
    for (step, timestep) in [(1, 667.0), (2, 334.0), (3, 1.0)] {
        let before = run.latents.copy();
        let progress: Progress = run.advance().unwrap().unwrap();
        assert_eq!((progress.step, progress.steps, progress.timestep, run.step), (step, 3, timestep, step));
        // The loss is that of the latents before the step.
        let features = run.extractor.references(&run.references, timestep).unwrap();
        let (loss, _) = run.extractor.gradient(&before, timestep, &features, &run.loss).unwrap();
        let told = progress.loss().unwrap().unwrap();
        assert!((told - number(&loss)).abs() < 1e-6 * told, "{told} and {}", number(&loss));
    }
}

#[test]
fn the_first_step_is_one_step_of_adam_on_the_gradient() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let mut run = transfer(&toy, 10);
    run.advance().unwrap();
    let ex = extractor(&toy);
    let features = ex.references(&references(), 901.0).unwrap();
    let total = TotalLoss::default().plus(1.0, AdLoss::default()).plus(0.25, ContentLoss);
    let mut z = latents(8, 6, 8);
    let (_, gradient) = ex.gradient(&z, 901.0, &features, &total).unwrap();
    Adam::new(AdamConfig::with_learning_rate(0.05)).step(&mut z, &gradient).unwrap();
    assert_same_run(&run.latents, &z);
}

#[test]
fn a_step_costs_what_it_must_and_no_more() {
    tch::set_num_threads(1);
    for (iterations, styles) in [(1, 1), (3, 1), (2, 3)] {
        let mut toy = Toy::trainable(Kind::Float);
        let mut run = transfer(&toy, 4);
        run.iterations = iterations;
        run.references = References::styles((0..styles).map(|i| Style::new(latents(20 + i, 4, 4)))).with_content(latents(8, 6, 8));
        for step in 1..=4 {
            run.advance().unwrap();
            assert_eq!(toy.forwards.get(), step * (styles as usize + 1 + iterations));
        }
        assert!(run.advance().unwrap().is_none());
        assert_eq!(toy.forwards.get(), 4 * (styles as usize + 1 + iterations), "nothing more to do costs nothing");
        assert_eq!(toy.deepest.get(), 4, "layers 2 and 3 are wanted: no pass enters layer 4");
        drop(run);
        assert!(!toy.weights_have_gradients(), "not even where they ask for one");
    }
}

#[test]
fn kept_features_of_references_give_the_same_run_without_their_passes() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    for adain in [false, true] {
        let [mut expected, mut run] = [(); 2].map(|()| transfer(&toy, 5));
        (expected.adain, run.adain) = (adain, adain);
        let expected = expected.finish().unwrap();
        let targets = run.targets().unwrap();
        let kept: Vec<References<Features>> = times(5).into_iter().map(|t| run.extractor.references(&targets, t).unwrap()).collect();
        let before = toy.forwards.get();
        for features in &kept {
            assert!(run.advance_towards(features).unwrap().is_some());
        }
        assert!(run.advance_towards(&kept[0]).unwrap().is_none());
        assert_eq!(toy.forwards.get() - before, 5);
        assert_same_run(&run.latents, &expected);
    }
}

#[test]
fn runs_with_one_style_share_its_features() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let contents = [latents(30, 6, 8), latents(31, 6, 8), latents(32, 4, 4)];
    let finish = |style: Style, content: &Tensor| {
        let before = toy.forwards.get();
        let references = References::styles([style]).with_content(content.shallow_clone());
        let picture = Distiller::style_transfer(extractor(&toy), times(3), references, 0.25).unwrap().finish().unwrap();
        (picture, toy.forwards.get() - before)
    };
    let cache = FeatureCache::new(usize::MAX);
    let style = Style::new(latents(20, 4, 4)).with_cache(cache.clone());
    for (i, content) in contents.iter().enumerate() {
        let (expected, _) = finish(Style::new(style.of.shallow_clone()), content);
        let (picture, passes) = finish(style.shallow_clone(), content);
        assert_same_run(&picture, &expected);
        assert_eq!(passes, if i == 0 { 9 } else { 6 }, "the style's passes are made once");
        assert_eq!(cache.len(), 3);
    }

    // What does not fit is made each time, to the same picture; what is there stays.
    let small = FeatureCache::new(cache.bytes() * 2 / 3);
    for passes in [9, 7, 7] {
        let (picture, made) = finish(Style::new(style.of.shallow_clone()).with_cache(small.clone()), &contents[0]);
        assert_same_run(&picture, &finish(style.shallow_clone(), &contents[0]).0);
        assert_eq!((made, small.len()), (passes, 2));
        assert!(small.bytes() <= cache.bytes() * 2 / 3);
    }
    small.clear();
    assert!(small.is_empty() && small.bytes() == 0);
}

/// A picture in the style of another would look sound.
#[test]
fn a_cache_is_of_one_style() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let cache = FeatureCache::new(usize::MAX);
    let of = |style: Tensor| References::styles([Style::new(style).with_cache(cache.clone())]).with_content(latents(31, 6, 8));
    let run = |references: References| Distiller::style_transfer(extractor(&toy), times(3), references, 0.25).unwrap().finish();
    let expected = run(of(latents(20, 4, 4))).unwrap();
    // The same picture in a tensor of its own, as who encodes it once more has it.
    let before = toy.forwards.get();
    assert_same_run(&run(of(latents(20, 4, 4))).unwrap(), &expected);
    assert_eq!(toy.forwards.get() - before, 6, "the style's passes are not made again");
    for other in [latents(21, 4, 4), latents(20, 4, 6), latents(20, 4, 4).to_kind(Kind::Double)] {
        let error = run(of(other.shallow_clone())).unwrap_err();
        assert!(matches!(error, Error::Argument { argument: "style cache", .. }), "{error}");
        // Also beside the style that it is of.
        let both = of(latents(20, 4, 4)).styles.into_iter().chain(of(other).styles);
        assert!(run(References::styles(both).with_content(latents(31, 6, 8))).is_err());
    }
    // Nor when a run changes its style on the way.
    let mut changing = Distiller::style_transfer(extractor(&toy), times(3), of(latents(20, 4, 4)), 0.25).unwrap();
    changing.advance().unwrap();
    changing.references.styles[0].of = latents(21, 4, 4);
    assert!(changing.advance().is_err());
    changing.references.styles[0].of = latents(20, 4, 4);
    assert_same_run(&changing.finish().unwrap(), &expected);
    // The same memory, read in another order.
    let square = latents(20, 4, 4);
    assert_same_run(&run(of(square.shallow_clone())).unwrap(), &expected);
    assert!(run(of(square.transpose(2, 3))).is_err());
    cache.clear();
    // Nothing was kept of a first pass that failed.
    toy.fail_at(1, Trouble::Memory);
    assert!(run(of(latents(22, 6, 6))).is_err());
    assert!(cache.is_empty());
    let other = run(of(latents(21, 4, 4))).unwrap();
    assert!(difference(&other, &expected) > 1e-2);
    assert_eq!(cache.len(), 3);
}

#[test]
fn a_cache_is_of_a_range_of_layers_and_of_clean_latents() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let cache = FeatureCache::new(usize::MAX);
    let references = References::styles([Style::new(latents(20, 4, 4)).with_cache(cache.clone())]);
    let layers = |range: std::ops::Range<usize>, references: &References| {
        let found = FeatureExtractor::new(&toy, 1.0, range).references(references, 500.0).unwrap();
        found.styles[0].of.layers().map(|layer| layer.site.index).collect::<Vec<_>>()
    };
    assert_eq!((layers(1..3, &references), layers(2..4, &references), layers(1..3, &references)), (vec![1, 2], vec![2, 3], vec![1, 2]));
    assert_eq!(cache.len(), 2);
    // Other latents made from these, such as noised ones, are none of its business.
    let noised = references.try_map(|z| Ok(z + 1.0)).unwrap();
    assert_eq!(layers(0..2, &noised), [0, 1]);
    assert_eq!(cache.len(), 2);
    assert_eq!(layers(0..2, &references.shallow_clone()), [0, 1]);
    assert_eq!(cache.len(), 3, "a second handle on the references has it, too");
}

/// The step that did it is told, not the next one, which would blame the content.
#[test]
fn an_optimizer_that_changes_the_latents_shape_is_told() {
    tch::set_num_threads(1);
    struct Reshaping(fn(&mut Tensor));
    impl Optimizer for Reshaping {
        fn step(&mut self, parameter: &mut Tensor, _: &Tensor) -> Result<()> {
            self.0(parameter);
            Ok(())
        }
        fn reset(&mut self) {}
        fn state(&self) -> Result<Vec<(String, Tensor)>> {
            Ok(vec![])
        }
        fn load_state(&mut self, _: Vec<(String, Tensor)>) -> Result<()> {
            Ok(())
        }
    }
    let cutting = || Reshaping(|z| *z = z.narrow(3, 0, 3).copy());
    // The same tensor, of another shape from now on.
    let squeezing = || Reshaping(|z| drop(z.squeeze_()));
    let toy = Toy::new(Kind::Double);
    let mut run = transfer(&toy, 4).with_optimizer(cutting());
    let before = state(&run);
    let error = run.advance().unwrap_err();
    assert!(matches!(error, Error::Shape { .. }) && error.to_string().contains("after the optimizer's step"), "{error}");
    assert_untouched(&run, &before);
    // Without a run, which works on a copy: the shape is what it was.
    let features = run.extractor.references(&run.references, 500.0).unwrap();
    for mut optimizer in [cutting(), squeezing()] {
        let mut z = latents(8, 6, 8);
        run.extractor.descend(&mut z, 500.0, &features, &run.loss, &mut optimizer).unwrap_err();
        assert_eq!(z.size(), latents(8, 6, 8).size());
    }
}

#[test]
fn a_saved_run_goes_on_to_the_same_picture() {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run.safetensors");
    let toy = Toy::new(Kind::Double);
    let make = || {
        let mut run = transfer(&toy, 20);
        run.iterations = 2;
        run
    };
    let expected = make().finish().unwrap();
    for stop in [0, 1, 8, 20] {
        let mut run = make();
        for _ in 0..stop {
            run.advance().unwrap();
        }
        let checkpoint = run.checkpoint().unwrap();
        // It holds storage of its own: the run may go on.
        while run.advance().unwrap().is_some() {}
        checkpoint.save(&file).unwrap();
        let loaded = Checkpoint::load(&file).unwrap();
        assert_eq!((loaded.step, loaded.timesteps.as_slice()), (stop, run.timesteps.as_slice()));
        // In a process of its own nothing is left of the network's counters, and nothing of another optimizer's past.
        let other = Toy::new(Kind::Double);
        let mut next = Distiller::style_transfer(extractor(&other), times(20), references(), 0.25).unwrap();
        next.iterations = 2;
        next.advance().unwrap();
        next.resume(&loaded).unwrap();
        assert_eq!(next.step, stop);
        assert_same_run(&next.finish().unwrap(), &expected);
    }
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["run.safetensors"], "no temporary file is left");
}

#[test]
fn resuming_without_a_file_shares_nothing() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let mut run = transfer(&toy, 6);
    run.advance().unwrap();
    let checkpoint = run.checkpoint().unwrap();
    let mut ends = vec![];
    for _ in 0..2 {
        let mut next = transfer(&toy, 6);
        next.resume(&checkpoint).unwrap();
        ends.push(next.finish().unwrap());
    }
    assert_same_run(&ends[0], &ends[1]);
    assert_same_run(&ends[0], &run.finish().unwrap());
}

#[test]
fn an_error_leaves_the_run_at_its_last_finished_step() {
    tch::set_num_threads(1);
    fn thrice(toy: &Toy, adain: bool) -> Distiller<&Toy> {
        let mut run = transfer(toy, 6);
        (run.iterations, run.adain) = (3, adain);
        run
    }
    // A step is two passes of references and three of the picture: each may fail, in the first step and later.
    for (trouble, adain) in [(Trouble::Memory, false), (Trouble::Broken, false), (Trouble::Broken, true)] {
        let undisturbed = thrice(&Toy::new(Kind::Double), adain).finish().unwrap();
        for at in 1..=15 {
            let toy = Toy::new(Kind::Double);
            let mut run = thrice(&toy, adain);
            toy.fail_at(at, trouble);
            let mut before = state(&run);
            let error = loop {
                match run.advance() {
                    Ok(_) => before = state(&run),
                    Err(error) => break error,
                }
            };
            assert_eq!(run.step, (at - 1) / 5, "the pass {at} is of this step");
            assert!(matches!(error, Error::Denoiser(_)), "{error}");
            assert_eq!(error.is_out_of_memory(), trouble == Trouble::Memory);
            assert_untouched(&run, &before);
            // The same call again, to the same picture.
            assert_same_run(&run.finish().unwrap(), &undisturbed);
        }
    }
}

#[test]
fn a_run_may_be_saved_after_an_error() {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run.safetensors");
    let toy = Toy::new(Kind::Double);
    let expected = transfer(&toy, 6).finish().unwrap();
    let mut run = transfer(&toy, 6);
    toy.fail_at(9, Trouble::Memory); // the third step's last pass
    while run.advance().is_ok() {}
    run.checkpoint().unwrap().save(&file).unwrap();
    let mut next = transfer(&toy, 6);
    next.resume(&Checkpoint::load(&file).unwrap()).unwrap();
    assert_eq!(next.step, 2);
    assert_same_run(&next.finish().unwrap(), &expected);
}

#[test]
fn a_loss_that_is_not_finite_ends_the_run_and_names_the_step() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let expected = transfer(&toy, 5).finish().unwrap();
    for iterations in [1, 2] {
        let mut run = transfer(&toy, 5);
        toy.nan_at.set(Some(401.0));
        run.advance().unwrap();
        run.advance().unwrap();
        let before = state(&run);
        run.iterations = iterations;
        let error = run.advance().unwrap_err();
        assert!(matches!(error, Error::NotFinite { what: "loss", step: 3, timestep } if timestep == 401.0), "{error}");
        assert!(error.to_string().contains("loss") && error.to_string().contains("step 3 (timestep 401)"), "{error}");
        assert_untouched(&run, &before);
        toy.nan_at.set(None);
        run.iterations = 1;
        assert_same_run(&run.finish().unwrap(), &expected);
    }
}

#[test]
fn latents_that_are_not_finite_end_the_run_and_name_the_step() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let expected = transfer(&toy, 5).finish().unwrap();
    let mut run = transfer(&toy, 5);
    run.advance().unwrap();
    let before = state(&run);
    // A number, but not one of f32: the loss is sound, the step is not.
    run.optimizer.config.learning_rate = 1e300;
    let error = run.advance().unwrap_err();
    assert!(matches!(error, Error::NotFinite { what: "latents", step: 2, .. }), "{error}");
    assert!(error.to_string().contains("step 2 (timestep 601)"), "{error}");
    assert_untouched(&run, &before);
    run.optimizer.config.learning_rate = 0.05;
    assert_same_run(&run.finish().unwrap(), &expected);
    // Latents that were so from the beginning.
    let mut run = transfer(&toy, 5);
    run.latents = &run.latents * f64::NAN;
    assert!(matches!(run.advance(), Err(Error::NotFinite { step: 1, .. })));
    // And references.
    let mut run = transfer(&toy, 5);
    run.references.styles[0].of = latents(9, 8, 8) * f64::INFINITY;
    assert!(matches!(run.advance(), Err(Error::NotFinite { what: "loss", step: 1, timestep }) if timestep == 801.0));
}

#[test]
fn the_last_step_is_looked_at_too() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let mut run = transfer(&toy, 2);
    run.advance().unwrap();
    run.optimizer.config.learning_rate = 1e300;
    assert!(matches!(run.advance(), Err(Error::NotFinite { what: "latents", step: 2, .. })));
    assert_eq!(run.step, 1);
    run.check().unwrap();
}

#[test]
fn bad_settings_are_refused_and_the_run_stays() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let expected = transfer(&toy, 4).finish().unwrap();
    type Spoil = fn(&mut Distiller<&Toy>);
    let spoiled: [(&str, Spoil); 9] = [
        ("iterations", |run| run.iterations = 0),
        ("learning rate", |run| run.optimizer.config.learning_rate = f64::NAN),
        ("learning rate", |run| run.optimizer.config.learning_rate = -0.05),
        ("beta1", |run| run.optimizer.config.beta1 = 1.0),
        ("timestep", |run| run.timesteps[1] = f64::NAN),
        ("timestep", |run| run.timesteps[1] = f64::INFINITY),
        ("only 5", |run| run.extractor.layers = 3..6),
        ("layers", |run| run.extractor.layers = 3..3),
        ("weight", |run| run.loss = TotalLoss::default().plus(f64::NAN, AdLoss::default())),
    ];
    for (word, spoil) in spoiled {
        let mut run = transfer(&toy, 4);
        run.advance().unwrap();
        let before = state(&run);
        spoil(&mut run);
        let error = run.advance().unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
        assert_untouched(&run, &before);
        // Put right, it goes on.
        let sound = transfer(&toy, 4);
        (run.iterations, run.optimizer.config, run.timesteps, run.extractor, run.loss) =
            (1, sound.optimizer.config, sound.timesteps, sound.extractor, sound.loss);
        assert_same_run(&run.finish().unwrap(), &expected);
    }
}

#[test]
fn style_transfer_needs_a_content_and_a_sound_weight() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let make = |references, weight| Distiller::style_transfer(extractor(&toy), times(2), references, weight);
    assert!(matches!(make(References::style(latents(9, 8, 8)), 0.25), Err(Error::Argument { argument: "references", .. })));
    for weight in [f64::NAN, -0.25, f64::INFINITY] {
        assert!(matches!(make(references(), weight), Err(Error::Argument { argument: "content weight", .. })), "{weight}");
    }
    // 0 is the AD loss alone.
    let mut alone = Distiller::new(extractor(&toy), times(2), references(), latents(8, 6, 8));
    assert_same_run(&make(references(), 0.0).unwrap().finish().unwrap(), &alone.finish().unwrap());
    // Without any style there is nothing to do.
    let none = References::styles([]).with_content(latents(8, 6, 8));
    assert!(make(none, 0.25).unwrap().finish().is_err());
}

#[test]
fn references_and_latents_that_do_not_fit_are_refused() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let attempt = |change: &dyn Fn(&mut Distiller<&Toy>)| {
        let mut run = transfer(&toy, 3);
        change(&mut run);
        let before = state(&run);
        let error = run.advance().unwrap_err();
        assert_untouched(&run, &before);
        error
    };
    let error = attempt(&|run| run.references.content = Some(latents(8, 8, 8)));
    assert!(matches!(error, Error::Shape { name: "content", .. }), "{error}");
    // How many sides there must be is for the network to say.
    let error = attempt(&|run| run.references.styles[0].of = Tensor::zeros([1, 4, 8], tch::kind::FLOAT_CPU));
    assert!(matches!(error, Error::Denoiser(_)) && error.to_string().contains("four dims, got [1, 4, 8]"), "{error:?}");
    let error = attempt(&|run| run.latents = Tensor::zeros([4, 6, 8], tch::kind::FLOAT_CPU));
    assert!(matches!(error, Error::Denoiser(_)) && error.to_string().contains("four dims, got [4, 6, 8]"), "{error:?}");
    // Three styles for two pictures.
    let error = attempt(&|run| {
        run.latents = Tensor::cat(&[latents(1, 6, 8), latents(2, 6, 8)], 0);
        run.references.styles[0].of = Tensor::cat(&[latents(1, 6, 8), latents(2, 6, 8), latents(3, 6, 8)], 0);
    });
    assert!(matches!(error, Error::Shape { name: "style", .. }) && error.to_string().contains("[3, 2, 48, 8]"), "{error:?}");
    // The memory of a picture of another size.
    let error = attempt(&|run| {
        run.advance().unwrap();
        run.latents = latents(1, 4, 4);
        run.references.content = Some(latents(2, 4, 4));
    });
    assert!(matches!(error, Error::Shape { name: "optimizer state `mean`", .. }), "{error:?}");
}

#[test]
fn latents_of_half_precision_are_optimised_in_f32() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let half = References::style(latents(9, 8, 8).to_kind(Kind::Half)).with_content(latents(8, 6, 8).to_kind(Kind::Half));
    let mut run = Distiller::style_transfer(extractor(&toy), times(20), half, 0.25).unwrap();
    assert_eq!(run.latents.kind(), Kind::Float, "`latents` says f32");
    let found = losses(&mut run);
    assert!(found[19] < found[0]);
}

#[test]
fn a_batch_is_its_pictures() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let starts = [latents(1, 6, 8), latents(2, 6, 8)];
    let make = |z: Tensor| Distiller::new(extractor(&toy), times(8), references(), z);
    let batch = || Tensor::cat(&starts, 0);
    let parts = |z: Tensor| [z.narrow(0, 0, 1), z.narrow(0, 1, 1)];

    // The loss is a mean over the batch, so gradients are half of those of a picture alone: twice the rate makes up for
    // it in gradient descent. Left are roundings, as a batch goes through other matrix kernels (none measured here).
    let together = make(batch()).with_optimizer(GradientDescent { learning_rate: 1.0 }).finish().unwrap();
    for (ours, start) in parts(together).iter().zip(&starts) {
        let alone = make(start.shallow_clone()).with_optimizer(GradientDescent { learning_rate: 0.5 }).finish().unwrap();
        let (off, moved) = (number(&(ours - &alone).norm()), number(&(&alone - start).norm()));
        assert!(moved > 0.5 && off < 1e-4 * moved, "{off} of {moved}");
    }
    // Adam divides by the gradient's size, so that only epsilon, 1e-8 beside gradients from 1e-4, knows of the half;
    // measured 5e-6 of the way (in f64, as in f32 Adam may make steps of roundings).
    let together = make(batch()).finish().unwrap();
    for (ours, start) in parts(together).iter().zip(&starts) {
        let alone = make(start.shallow_clone()).finish().unwrap();
        let (off, moved) = (number(&(ours - &alone).norm()), number(&(&alone - start).norm()));
        assert!(moved > 0.5 && off < 1e-3 * moved, "{off} of {moved}");
    }
}

#[test]
fn any_shape_and_any_number_of_styles_will_do() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    for (size, styles) in [((3, 11), vec![(8, 8)]), ((11, 3), vec![(4, 6), (9, 2)]), ((1, 1), vec![(1, 1), (7, 5), (2, 2)]), ((8, 8), vec![(1, 1)])] {
        let styles = styles.iter().zip(30..).map(|(&(h, w), seed)| Style::new(latents(seed, h, w)));
        let references = References::styles(styles).with_content(latents(40, size.0, size.1));
        let mut run = Distiller::style_transfer(extractor(&toy), times(30), references, 0.1).unwrap();
        let found = losses(&mut run);
        assert_eq!(run.latents.size(), [1, 4, size.0, size.1]);
        assert!(found[29] < found[0], "{size:?}: {} to {}", found[0], found[29]);
    }
    for layers in [0..1, 0..5, 4..5, 1..4] {
        let mut run = transfer(&toy, 30);
        run.extractor = FeatureExtractor::new(&toy, 1.0, layers.clone());
        let found = losses(&mut run);
        assert!(found[29] < found[0], "{layers:?}: {} to {}", found[0], found[29]);
    }
}

#[test]
fn gradient_descent_runs_and_resumes() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let make = || transfer(&toy, 30).with_optimizer(GradientDescent { learning_rate: 0.3 });
    let mut run = make();
    let found = losses(&mut run);
    assert!(found[29] < found[0], "{} to {}", found[0], found[29]);
    let mut half = make();
    for _ in 0..11 {
        half.advance().unwrap();
    }
    let checkpoint = half.checkpoint().unwrap();
    assert!(checkpoint.optimizer.is_empty());
    let mut next = make();
    next.resume(&checkpoint).unwrap();
    assert_same_run(&next.finish().unwrap(), &run.latents);
    // Chosen while the program runs.
    let optimizer: Box<dyn Optimizer> = Box::new(GradientDescent { learning_rate: 0.3 });
    let mut boxed = transfer(&toy, 30).with_optimizer(optimizer);
    boxed.loss =
        TotalLoss::default().plus(1.0, Box::new(AdLoss::default()) as Box<dyn attention_distillation::Loss + Send + Sync>).plus(0.25, ContentLoss);
    boxed.resume(&checkpoint).unwrap();
    assert_same_run(&boxed.finish().unwrap(), &run.latents);
    // Changing the optimizer keeps where the run is.
    let (step, z) = (half.step, half.latents.copy());
    let swapped = half.with_optimizer(Adam::default());
    assert_eq!(swapped.step, step);
    assert_same(&swapped.latents, &z);
}

#[test]
fn a_checkpoint_of_another_run_is_refused_and_the_run_unchanged() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let advanced = |mut run: Distiller<&Toy>| {
        run.advance().unwrap();
        run.checkpoint().unwrap()
    };
    let own = || advanced(transfer(&toy, 4));
    let of = |reason: &str| ("checkpoint", reason.to_owned());
    let of_state = |reason: &str| ("optimizer state", reason.to_owned());
    let mut others = vec![(of("is at step 1 of 5, this run has 4 steps"), advanced(transfer(&toy, 5)))];
    let mut shifted = times(4);
    shifted[2] += 1.0;
    let shifted = Distiller::style_transfer(extractor(&toy), shifted, references(), 0.25).unwrap();
    others.push((of("other timesteps: 252 where this one has 251"), advanced(shifted)));
    let content = References::style(latents(9, 8, 8)).with_content(latents(8, 8, 6));
    let other_size = Distiller::style_transfer(extractor(&toy), times(4), content, 0.25).unwrap();
    others.push((of("[1, 4, 6, 8], this run's, found [1, 4, 8, 6]"), advanced(other_size)));
    for (reason, spoil) in [
        (of("is at step 5 of 4, this run has 4 steps"), (|c| c.step = 5) as fn(&mut Checkpoint)),
        (of("its latents are infinite or NaN"), |c| c.latents = &c.latents / 0.0),
        (of("is of a run by Sampling"), |c| c.procedure = Procedure::Sampling),
        // Another optimizer's, and half of one.
        (of_state("has no `mean`"), |c| c.optimizer[0].0 = "momentum".into()),
        (of_state("has no `variance`"), |c| c.optimizer.truncate(1)),
        // Of other latents.
        (("optimizer state `mean`", "[1, 4, 6, 8], that of the latents".into()), |c| {
            for (_, moment) in &mut c.optimizer[..2] {
                *moment = latents(1, 3, 3);
            }
        }),
        (of_state("its `variance` has numbers that no step can go on from"), |c| c.optimizer[1].1 = &c.optimizer[1].1 * f64::NAN),
        // Squares below 0.
        (of_state("its `variance` has numbers that no step can go on from"), |c| c.optimizer[1].1 = c.optimizer[1].1.zeros_like() - 1.0),
    ] {
        let mut checkpoint = own();
        spoil(&mut checkpoint);
        others.push((reason, checkpoint));
    }
    let assert_told = |error: Error, (input, reason): &(&str, String)| {
        let named = match &error {
            Error::Argument { argument, .. } => *argument,
            Error::Shape { name, .. } => *name,
            other => panic!("{reason}: {other:?}"),
        };
        assert_eq!(named, *input, "{error}");
        assert!(error.to_string().contains(reason.as_str()), "does not say `{reason}`: {error}");
    };
    for (what, other) in others {
        let mut run = transfer(&toy, 4);
        run.advance().unwrap();
        run.advance().unwrap();
        let before = state(&run);
        assert_told(run.resume(&other).unwrap_err(), &what);
        assert_untouched(&run, &before);
        run.resume(&own()).unwrap();
    }
    // Adam's memory is nothing to gradient descent.
    let mut run = transfer(&toy, 4).with_optimizer(GradientDescent { learning_rate: 1.0 });
    let before = state(&run);
    assert_told(run.resume(&own()).unwrap_err(), &of_state("has `mean`; gradient descent has none"));
    assert_untouched(&run, &before);
}

#[test]
fn a_damaged_checkpoint_file_is_an_error() {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run.safetensors");
    let toy = Toy::new(Kind::Float);
    let mut run = transfer(&toy, 3);
    run.advance().unwrap();
    run.checkpoint().unwrap().save(&file).unwrap();
    let whole = std::fs::read(&file).unwrap();
    let damaged = |bytes: &[u8]| {
        let other = folder.path().join("damaged.safetensors");
        std::fs::write(&other, bytes).unwrap();
        let error = Checkpoint::load(&other).unwrap_err();
        assert!(matches!(error, Error::Weights { .. }) && error.to_string().contains("damaged.safetensors"), "{error}");
    };
    for length in [0, 4, 8, 100, whole.len() / 2, whole.len() - 1] {
        damaged(&whole[..length]);
    }
    damaged(&[0xff; 64]);
    damaged(b"not a checkpoint, just a text that somebody wrote");
    let mut longer = whole.clone();
    longer[0] ^= 0x40;
    damaged(&longer);
    // A sound file of something else.
    let other = folder.path().join("other.safetensors");
    let one = |name: &str, tensor: Tensor| (name.to_owned(), tensor);
    let z = || latents(1, 2, 2);
    for tensors in [
        vec![one("weight", z())],
        vec![one("latents", z()), one("step", Tensor::from(1i64))],
        vec![one("latents", z()), one("step", Tensor::from_slice(&[-1i64])), one("timesteps", Tensor::from_slice(&[9.0f64, 5.0, 1.0]))],
        vec![one("latents", z()), one("step", Tensor::from_slice(&[1i64, 2])), one("timesteps", Tensor::from_slice(&[9.0f64, 5.0, 1.0]))],
        vec![one("latents", z()), one("step", Tensor::from_slice(&[0.5f32])), one("timesteps", Tensor::from_slice(&[9.0f64, 5.0, 1.0]))],
        vec![one("latents", z()), one("step", Tensor::from_slice(&[1i64])), one("timesteps", Tensor::from_slice(&[9i64, 5, 1]))],
        vec![one("latents", z()), one("step", Tensor::from_slice(&[1i64])), one("timesteps", Tensor::from_slice(&[9.0f64, 5.0]).view([1, 2]))],
    ] {
        Tensor::write_safetensors(&tensors, &other).unwrap();
        let error = Checkpoint::load(&other).unwrap_err();
        assert!(matches!(error, Error::Weights { .. }), "{error}");
    }
    // No numbers at all, of a shape that no two sides can be multiplied of.
    let header = format!(r#"{{"step":{{"dtype":"I64","shape":[{},2,0],"data_offsets":[0,0]}}}}"#, i64::MAX);
    damaged(&[&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat());
    assert!(matches!(Checkpoint::load(folder.path().join("none.safetensors")), Err(Error::Io { .. })));
    assert!(matches!(Checkpoint::load(folder.path()), Err(Error::Io { .. })));
    // An older file stays where the new one cannot be written.
    let error = run.checkpoint().unwrap().save(folder.path().join("none/run.safetensors")).unwrap_err();
    assert!(matches!(error, Error::Io { .. }) && error.to_string().contains("none/run.safetensors"), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), whole);
}

#[test]
fn no_timesteps_are_a_finished_run() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    let mut run = Distiller::new(extractor(&toy), vec![], references(), latents(1, 4, 4));
    assert!(run.advance().unwrap().is_none());
    assert_eq!(toy.forwards.get(), 0);
    assert_same(&run.finish().unwrap(), &latents(1, 4, 4));
}

#[test]
fn everything_crosses_threads() {
    tch::set_num_threads(1);
    fn sendable<T: Send>() {}
    fn shareable<T: Sync>() {}
    sendable::<Distiller<Toy>>();
    sendable::<Distiller<Toy, GradientDescent>>();
    sendable::<FeatureExtractor<Toy>>();
    sendable::<Features>();
    sendable::<References>();
    sendable::<References<Features>>();
    sendable::<TotalLoss>();
    sendable::<Adam>();
    sendable::<Checkpoint>();
    sendable::<Progress>();
    sendable::<Ddim>();
    sendable::<Error>();
    shareable::<Error>();
    // In practice, too: half of the steps there, half here.
    let run = |toy| Distiller::style_transfer(FeatureExtractor::new(toy, 1.0, 2..4), times(4), references(), 0.25).unwrap();
    let expected = run(Toy::new(Kind::Double)).finish().unwrap();
    let mut moved = run(Toy::new(Kind::Double));
    moved.advance().unwrap();
    let there = std::thread::spawn(move || {
        moved.advance().unwrap();
        moved
    });
    assert_same_run(&there.join().unwrap().finish().unwrap(), &expected);
}

#[test]
fn out_of_memory_is_told_from_other_errors() {
    tch::set_num_threads(1);
    // The real one: no machine has 2^50 numbers of memory.
    let real = || Error::from(Tensor::f_zeros([1 << 25, 1 << 25], (Kind::Float, Device::Cpu)).unwrap_err());
    assert!(real().is_out_of_memory(), "{}", real());
    assert!(Error::denoiser(real()).is_out_of_memory(), "wrapped by a foreign network");
    assert!(Error::denoiser(Error::denoiser(real())).is_out_of_memory(), "twice");
    assert!(Error::denoiser("CUDA out of memory. Tried to allocate 2.00 GiB").is_out_of_memory());
    // A foreign error that says where and leaves why to its source.
    #[derive(Debug)]
    struct Block(Error);
    impl std::fmt::Display for Block {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "block 3 failed")
        }
    }
    impl std::error::Error for Block {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            Some(&self.0)
        }
    }
    assert!(Error::denoiser(Block(real())).is_out_of_memory(), "the source of a foreign error");
    let shapes = Error::from(Tensor::zeros([2], tch::kind::FLOAT_CPU).f_add(&Tensor::zeros([3], tch::kind::FLOAT_CPU)).unwrap_err());
    assert!(!shapes.to_string().contains("Exception raised from"), "libtorch's message without its stack: {shapes}");
    for other in [shapes, Error::Stopped, Error::denoiser("a wire came loose"), Error::denoiser(Block(Error::Stopped))] {
        assert!(!other.is_out_of_memory(), "{other}");
    }
}

#[test]
fn a_schedule_of_bad_settings_is_refused() {
    tch::set_num_threads(1);
    fn change(f: impl FnOnce(&mut DdimConfig)) -> DdimConfig {
        let mut config = DdimConfig::default();
        f(&mut config);
        config
    }
    let refused = |config: &DdimConfig, steps: usize| {
        let error = Ddim::new(config, steps).map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::Argument { .. }), "{error}");
        error.to_string()
    };
    for spacing in [Spacing::Leading, Spacing::Trailing, Spacing::Linspace] {
        let config = change(|c| c.spacing = spacing);
        for steps in [0, 1001, usize::MAX] {
            assert!(refused(&config, steps).contains("steps"));
        }
        for steps in [1, 2, 7, 999] {
            let schedule = Ddim::new(&config, steps).unwrap();
            assert_eq!(schedule.timesteps().len(), steps);
            assert!(schedule.timesteps().windows(2).all(|pair| pair[0] > pair[1]), "downwards");
        }
    }
    for bad in [f64::NAN, f64::INFINITY, -0.1, 1.0] {
        for schedule in [BetaSchedule::Linear, BetaSchedule::ScaledLinear] {
            refused(&change(|c| (c.beta_end, c.beta_schedule) = (bad, schedule.clone())), 10);
            refused(&change(|c| (c.beta_start, c.beta_schedule) = (bad, schedule)), 10);
        }
        refused(&change(|c| c.beta_schedule = BetaSchedule::Trained([vec![0.1; 999], vec![bad]].concat())), 10);
    }
    refused(&change(|c| c.beta_schedule = BetaSchedule::Trained(vec![0.1; 10])), 10);
    refused(&change(|c| c.beta_schedule = BetaSchedule::Trained(vec![])), 10);
    for timesteps in [0, usize::MAX] {
        refused(&change(|c| c.train_timesteps = timesteps), 1);
    }
    for offset in [1000, usize::MAX] {
        refused(&change(|c| c.steps_offset = offset), 10);
    }
    for limit in [f64::NAN, -1.0] {
        refused(&change(|c| c.clip_sample = Some(limit)), 10);
    }
    // Of one timestep first and last are the same: the one cannot stay and the other become 0.
    let short = |rescaled: bool| change(|c| (c.train_timesteps, c.steps_offset, c.rescale_zero_snr) = (1, 0, rescaled));
    assert!(refused(&short(true), 1).contains("betas: lead to no number"));
    Ddim::new(&short(false), 1).unwrap();
}

#[test]
fn a_schedule_refuses_what_lies_beyond_it() {
    tch::set_num_threads(1);
    let schedule = Ddim::new(&DdimConfig::default(), 10).unwrap();
    assert_eq!(schedule.timesteps()[0], 901.0);
    let (z, e) = (latents(1, 2, 2), latents(2, 2, 2));
    for timestep in [1000.0, 1e30, -1.0, -0.5, f64::NAN, f64::INFINITY] {
        assert!(matches!(schedule.add_noise(&z, &e, timestep), Err(Error::Argument { argument: "timestep", .. })), "{timestep}");
    }
    for index in [10, usize::MAX] {
        assert!(matches!(schedule.step(index, &e, &z), Err(Error::Argument { argument: "step", .. })), "{index}");
    }
    assert!(schedule.add_noise(&z, &latents(2, 3, 2), 500.0).is_err());
    assert!(schedule.step(0, &latents(2, 3, 2), &z).is_err());
    assert!(schedule.add_noise(&z, &e, 999.0).is_ok() && schedule.add_noise(&z, &e, 0.0).is_ok());
    // The last of its steps is within it.
    let next = schedule.step(9, &e, &z).unwrap();
    assert!(difference(&next, &z).is_finite() && difference(&next, &z) > 0.0);
}
