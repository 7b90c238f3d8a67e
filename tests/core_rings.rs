//! Windows that go around the canvas, on a small network: which views, what they cut and add across the border, and what a
//! network hears of it.
#![allow(clippy::disallowed_methods, missing_docs)] // A test may panic.

mod toy;

use attention_distillation::{
    adain, AdLoss, Adam, AttentionHook, ContentLoss, Ddim, DdimConfig, Denoiser, Error, FeatureExtractor, Guidance, GuidedSampler, LabelMap, Noise,
    References, Result, Scheduler, Seamless, Style, TotalLoss, View, Windows,
};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use tch::{Device, Kind, Tensor};
use toy::{assert_same_run, difference, extractor, latents, Toy, Trouble};

const ALL: [Seamless; 4] = [Seamless::None, Seamless::X, Seamless::Y, Seamless::Both];
/// Of no whole number of strides: the windows around it are closer.
const CANVAS: (i64, i64) = (11, 21);
/// Of whole ones, and lower than a window.
const EVEN: (i64, i64) = (6, 20);

fn windows(wrap: Seamless) -> Windows {
    Windows::new(8, 4).with_batch(2).with_wrap(wrap)
}

fn guidance() -> Guidance<f64> {
    Guidance::new(1.5, 0.5, 3.0).unwrap()
}

fn ddim() -> Ddim {
    Ddim::new(&DdimConfig::default(), 4).unwrap()
}

fn references(canvas: (i64, i64)) -> References {
    References::styles([Style::new(latents(9, 8, 8)), Style::new(latents(7, 4, 6))]).with_content(latents(8, canvas.0, canvas.1))
}

fn sampler<D: Denoiser<Condition = f64>>(denoiser: D, canvas: (i64, i64), windows: Windows) -> GuidedSampler<D> {
    let extractor = FeatureExtractor::new(denoiser, 1.0, 2..4);
    let noise = Noise::from_fn(|like| Ok(like.ones_like() * 0.3));
    let mut run = GuidedSampler::new(extractor, ddim(), guidance(), references(canvas), latents(5, canvas.0, canvas.1), noise).with_windows(windows);
    run.loss = run.loss.plus(0.2, ContentLoss);
    (run.iterations, run.adain) = (2, true);
    run
}

/// `length` places of an axis from `start` on, around it.
fn around(canvas: &Tensor, axis: i64, start: i64, length: i64) -> Tensor {
    let side = canvas.size()[axis as usize];
    let places: Vec<i64> = (start..start + length).map(|place| place % side).collect();
    canvas.index_select(axis, &Tensor::from_slice(&places))
}

fn cut_all(canvas: &Tensor, views: &[View]) -> Tensor {
    let cut = |view: &View| around(&around(canvas, 2, view.top, view.height), 3, view.left, view.width);
    Tensor::cat(&views.iter().map(cut).collect::<Vec<_>>(), 0)
}

/// The mean of views, place by place.
fn averaged((height, width): (i64, i64), views: &[View], parts: &Tensor) -> Tensor {
    let mean = Tensor::zeros([1, toy::CHANNELS, height, width], (Kind::Float, Device::Cpu));
    for y in 0..height {
        for x in 0..width {
            let mut there = vec![];
            for (i, view) in (0..).zip(views) {
                let (row, column) = ((y - view.top).rem_euclid(height), (x - view.left).rem_euclid(width));
                if row < view.height && column < view.width {
                    there.push(parts.narrow(0, i, 1).narrow(2, row, 1).narrow(3, column, 1));
                }
            }
            mean.narrow(2, y, 1).narrow(3, x, 1).copy_(&Tensor::cat(&there, 0).mean_dim(&[0_i64][..], true, Kind::Float));
        }
    }
    mean
}

/// How many of the windows that begin at `starts` have each place of a side.
fn covered(starts: &BTreeSet<i64>, length: i64, side: i64) -> Vec<usize> {
    (0..side).map(|place| starts.iter().filter(|start| (place - *start).rem_euclid(side) < length).count()).collect()
}

#[test]
fn rings_cover_the_canvas_evenly() {
    for (height, width) in [(1_i64, 1_i64), (2, 7), (7, 2), (13, 20), (16, 21)] {
        for size in 1..=9_i64 {
            for stride in 1..=size {
                for wrap in ALL {
                    let case = format!("{height}x{width}, {size} every {stride}, {wrap:?}");
                    let windows = Windows::new(size, stride).with_wrap(wrap);
                    let views: Vec<View> = windows.views((height, width)).unwrap().collect();
                    let plain: Vec<View> = Windows::new(size, stride).views((height, width)).unwrap().collect();
                    for (side, wraps, start, length) in [
                        (height, wrap.y(), (|view: &View| view.top) as fn(&View) -> i64, size.min(height)),
                        (width, wrap.x(), |view: &View| view.left, size.min(width)),
                    ] {
                        let starts: BTreeSet<i64> = views.iter().map(start).collect();
                        if !wraps {
                            assert_eq!(starts, plain.iter().map(start).collect(), "{case}");
                            continue;
                        }
                        // From one to the next, also from the last to the first.
                        let gaps: Vec<i64> = starts.iter().zip(starts.iter().skip(1).copied().chain([side])).map(|(a, b)| b - a).collect();
                        assert!(gaps.iter().all(|gap| (1..=stride).contains(gap) || length == side), "{case}: {gaps:?}");
                        assert!(gaps.iter().max().unwrap() - gaps.iter().min().unwrap() <= 1, "{case}: {gaps:?}");
                        assert!(side == 1 || starts.len() >= 2, "{case}: a single window has borders");
                        let covered = covered(&starts, length, side);
                        let (least, most) = (covered.iter().min().unwrap(), covered.iter().max().unwrap());
                        assert!(*least >= 1 && most - least <= 1, "{case}: {covered:?}");
                        if side % stride == 0 && length % stride == 0 && side > stride {
                            assert!(covered.iter().all(|count| *count as i64 == length / stride), "{case}: {covered:?}");
                        }
                    }
                    let places: BTreeSet<_> = views.iter().map(|view| (view.top, view.left)).collect();
                    assert_eq!(places.len(), views.len(), "{case}: one twice");
                    assert!(views.iter().all(|view| (view.height, view.width) == (size.min(height), size.min(width))), "{case}");
                    assert!(views.iter().all(|view| (0..height).contains(&view.top) && (0..width).contains(&view.left)), "{case}");
                }
            }
        }
    }
    // They are made one after the other.
    let endless = Windows::default().with_wrap(Seamless::Both).views((i64::MAX, i64::MAX)).unwrap().nth(3).unwrap();
    assert_eq!((endless.top, endless.left, endless.height, endless.width), (0, 23, 64, 64));
}

/// Were any latent counted or placed wrongly, it would not stay what it is.
#[test]
fn what_no_view_changes_stays() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    /// Predicts nothing, and steps nowhere.
    struct Still(Ddim);
    impl Scheduler for Still {
        fn timesteps(&self) -> &[f64] {
            self.0.timesteps()
        }
        fn next_timestep(&self, index: usize) -> f64 {
            self.0.next_timestep(index)
        }
        fn add_noise(&self, clean: &Tensor, noise: &Tensor, timestep: f64) -> Result<Tensor> {
            self.0.add_noise(clean, noise, timestep)
        }
        fn step(&self, _: usize, _: &Tensor, latents: &Tensor) -> Result<Tensor> {
            Ok(latents.shallow_clone())
        }
    }
    for wrap in ALL {
        for (height, width) in [(1, 1), (3, 17), (9, 9), (17, 3), (10, 13), (8, 8)] {
            for (size, stride, batch) in [(8, 3, 4), (5, 5, 1), (4, 1, 100), (1, 1, 7)] {
                let mut run = sampler(&toy, (height, width), Windows::new(size, stride).with_batch(batch).with_wrap(wrap));
                (run.iterations, run.scheduler) = (0, Box::new(Still(ddim())));
                run.advance().unwrap();
                let apart = difference(&run.latents, &latents(5, height, width));
                assert!(apart < 1e-6, "{height}x{width}, {size} every {stride}, {wrap:?}: {apart}");
            }
        }
    }
}

/// Written out by hand: what is cut, the content too, goes on at the other border; so does what is averaged.
#[test]
fn a_step_around_the_canvas() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    let (schedule, start, clean) = (ddim(), latents(5, CANVAS.0, CANVAS.1), references(CANVAS));
    let (index, t, next) = (1, 501.0, 251.0);
    let mut made = vec![];
    for (wrap, tops, lefts) in [
        (Seamless::None, &[0, 3][..], &[0, 4, 8, 12, 13][..]),
        (Seamless::X, &[0, 3], &[0, 3, 7, 10, 14, 17]),
        (Seamless::Y, &[0, 3, 7], &[0, 4, 8, 12, 13]),
        (Seamless::Both, &[0, 3, 7], &[0, 3, 7, 10, 14, 17]),
    ] {
        let view = |top: i64, left: i64| View { top, left, height: 8, width: 8 };
        let views: Vec<View> = tops.iter().flat_map(|&top| lefts.iter().map(move |&left| view(top, left))).collect();
        assert_eq!(windows(wrap).views(CANVAS).unwrap().collect::<Vec<_>>(), views);
        let noised = |clean: &Tensor| schedule.add_noise(clean, &(clean.ones_like() * 0.3), next).unwrap();
        let styles = [noised(&clean.styles[0].of), noised(&clean.styles[1].of)];
        let mut parts = vec![];
        for views in views.chunks(2) {
            let before = cut_all(&start, views);
            let prediction = toy.forward_guided(&before, t, &guidance()).unwrap();
            let mut z = adain(&schedule.step(index, &prediction, &before).unwrap(), &styles).unwrap();
            let noisy = References::styles(styles.iter().map(|style| Style::new(style.shallow_clone())));
            let noisy = noisy.with_content(cut_all(&noised(clean.content.as_ref().unwrap()), views));
            let features = extractor(&toy).references(&noisy, next).unwrap();
            let (loss, mut adam) = (TotalLoss::default().plus(1.0, AdLoss::default()).plus(0.2, ContentLoss), Adam::default());
            for _ in 0..2 {
                let _ = extractor(&toy).descend(&mut z, next, &features, &loss, &mut adam).unwrap();
            }
            parts.push(z);
        }
        let expected = averaged(CANVAS, &views, &Tensor::cat(&parts, 0));
        let mut run = sampler(&toy, CANVAS, windows(wrap));
        run.step = index;
        run.advance().unwrap();
        // A latent here and there may go another way where a gradient is next to nothing, by 0.05 in one view; one column that was cut
        // or placed wrongly would make 2e-3.
        let apart = (&run.latents - &expected).abs().mean(Kind::Double).double_value(&[]);
        assert!(apart < 1e-4, "{wrap:?}: {apart}");
        made.push(expected);
    }
    for (i, one) in made.iter().enumerate() {
        assert!(made[..i].iter().all(|other| difference(one, other) > 0.05), "{i}: another ring, another picture");
    }
}

/// A canvas shifted by a stride along the ring, with its content and its labels, gives the picture shifted: no place knows of a
/// border. Without the ring, and with labels that stay where they are, it does not.
#[test]
fn labels_go_around_too() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    // Regions of 3 latents, in a map of two pixels for each; the first and the last column have other labels.
    let striped = |height: i64, width: i64| {
        let row: Vec<i64> = (0..2 * width).map(|x| i64::from(x / 6 % 2 == 1 || x > 2 * width - 3)).collect();
        Tensor::from_slice(&row).view([1, 1, 1, -1]).expand([1, 1, 2 * height, -1], false).contiguous()
    };
    let soft = |labels: &Tensor| LabelMap::soft(&Tensor::cat(&[labels.eq(0), labels.eq(1)], 1).to_kind(Kind::Float)).unwrap();
    let hard = |labels: &Tensor| LabelMap::new(labels).unwrap();
    let made = |wrap: Seamless, map: &dyn Fn(&Tensor) -> LabelMap, shift: i64, labels_shift: i64| {
        let mut run = sampler(&toy, EVEN, windows(wrap).with_batch(1));
        run.adain = false;
        run.latents = run.latents.roll(shift, 3);
        run.references.styles.truncate(1);
        run.references.styles[0].labels = Some(map(&striped(8, 8)));
        run.references.content = run.references.content.map(|content| content.roll(shift, 3));
        run.references.labels = Some(map(&striped(EVEN.0, EVEN.1).roll(2 * labels_shift, 3)));
        run.advance().unwrap();
        run.latents
    };
    for map in [&hard as &dyn Fn(&Tensor) -> LabelMap, &soft] {
        for wrap in [Seamless::X, Seamless::Both] {
            let picture = made(wrap, map, 0, 0);
            for places in [4, 12] {
                let off = difference(&made(wrap, map, places, places), &picture.roll(places, 3));
                assert!(off < 1e-5, "{wrap:?}, by {places}: {off}");
                assert!(difference(&made(wrap, map, places, 0), &picture.roll(places, 3)) > 0.01, "labels without effect");
            }
        }
        assert!(difference(&made(Seamless::None, map, 4, 4), &made(Seamless::None, map, 0, 0).roll(4, 3)) > 0.01);
    }
}

/// A network that could close its pictures, and notes which of their borders meet in each pass.
struct Closing<'a> {
    toy: &'a Toy,
    meets: Cell<Seamless>,
    passes: RefCell<Vec<Seamless>>,
    /// How often its passes are run.
    runs: usize,
}

impl<'a> Closing<'a> {
    fn new(toy: &'a Toy, seamless: Seamless) -> Self {
        Self { toy, meets: Cell::new(seamless), passes: RefCell::default(), runs: 1 }
    }
}

impl Denoiser for Closing<'_> {
    type Condition = f64;

    fn forward(&self, latents: &Tensor, timestep: f64, condition: &f64, hook: &mut dyn AttentionHook) -> Result<Tensor> {
        self.passes.borrow_mut().push(self.meets.get());
        self.toy.forward(latents, timestep, condition, hook)
    }

    fn seamless(&self) -> Seamless {
        self.meets.get()
    }

    fn with_borders(&self, meet: Seamless, passes: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let before = self.meets.replace(meet);
        let outcome = (0..self.runs).try_for_each(|_| passes());
        self.meets.set(before);
        outcome
    }

    /// Numbers above 100 stand for several prompts.
    fn condition_batch(&self, condition: &f64) -> i64 {
        if *condition > 100.0 {
            2
        } else {
            1
        }
    }
}

/// The ring is the network's own, without being asked for; within it, borders meet only where a window is as long as the canvas.
#[test]
fn a_seamless_network_is_told_what_is_cut() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Double);
    for (canvas, network, asked, ring, within) in [
        // Windows of 8: both sides are cut, one, none.
        ((9, 20), Seamless::Both, Seamless::None, Seamless::Both, Seamless::None),
        ((6, 20), Seamless::Both, Seamless::None, Seamless::X, Seamless::Y),
        ((20, 8), Seamless::Both, Seamless::None, Seamless::Y, Seamless::X),
        ((6, 8), Seamless::Both, Seamless::None, Seamless::None, Seamless::Both),
        ((9, 20), Seamless::X, Seamless::None, Seamless::X, Seamless::None),
        ((6, 20), Seamless::Y, Seamless::X, Seamless::X, Seamless::Y),
        ((6, 20), Seamless::X, Seamless::Y, Seamless::Both, Seamless::None),
        ((6, 20), Seamless::Both, Seamless::Both, Seamless::X, Seamless::Y),
        ((6, 20), Seamless::None, Seamless::Both, Seamless::Both, Seamless::None),
    ] {
        let case = format!("{canvas:?}, {network:?}, {asked:?}");
        let mut expected = sampler(&toy, canvas, windows(ring));
        expected.advance().unwrap();
        let mut run = sampler(Closing::new(&toy, network), canvas, windows(asked));
        run.advance().unwrap();
        assert_same_run(&run.latents, &expected.latents);
        let closing = &run.extractor.denoiser;
        assert!(closing.passes.borrow().len() > 5 && closing.passes.borrow().iter().all(|meet| *meet == within), "{case}");
        assert_eq!(closing.seamless(), network, "{case}: as before");
        // Also after an error, and through any pointer.
        let closing = Closing::new(&toy, network);
        let mut run = sampler(Box::new(&closing), canvas, windows(asked));
        toy.fail_at(3, Trouble::Broken);
        assert!(run.advance().is_err());
        assert_eq!(closing.seamless(), network, "{case}: as before");
        assert!(closing.passes.take().iter().all(|meet| *meet == within), "{case}");
        // Whole pictures are the network's alone.
        let mut run = sampler(&closing, canvas, windows(asked));
        run.windows = None;
        run.advance().unwrap();
        assert!(closing.passes.take().iter().all(|meet| *meet == network), "{case}");
    }
    // One that runs nothing is found out; one that runs all twice adds nothing.
    let mut lazy = sampler(Closing { runs: 0, ..Closing::new(&toy, Seamless::X) }, EVEN, windows(Seamless::None));
    assert!(matches!(lazy.advance(), Err(Error::Argument { argument: "denoiser", .. })));
    assert_eq!(lazy.step, 0);
    let mut eager = sampler(Closing { runs: 2, ..Closing::new(&toy, Seamless::X) }, EVEN, windows(Seamless::None));
    eager.advance().unwrap();
    let mut once = sampler(&toy, EVEN, windows(Seamless::X));
    once.advance().unwrap();
    assert_same_run(&eager.latents, &once.latents);
}

/// In a batch of as many views they would be taken for one each.
#[test]
fn several_prompts_and_maps_are_refused() {
    tch::set_num_threads(1);
    let toy = Toy::new(Kind::Float);
    type Run<'a> = GuidedSampler<Closing<'a>>;
    let advanced = |change: &dyn Fn(&mut Run<'_>)| {
        let mut run = sampler(Closing::new(&toy, Seamless::None), EVEN, windows(Seamless::None));
        change(&mut run);
        let before = run.latents.copy();
        let outcome = run.advance();
        if outcome.is_err() {
            assert_eq!(run.step, 0);
            assert!(run.latents.equal(&before) && run.extractor.denoiser.passes.borrow().is_empty(), "before the first pass");
        }
        outcome.map(|_| ())
    };
    let labels = |batch: i64, height: i64, width: i64| LabelMap::new(&Tensor::zeros([batch, 1, height, width], (Kind::Int64, Device::Cpu))).unwrap();
    let maps = |run: &mut Run<'_>, ours: i64, theirs: i64| {
        run.references.labels = Some(labels(ours, EVEN.0, EVEN.1));
        run.references.styles[1].labels = Some(labels(theirs, 4, 6));
    };
    let refused = |change: &dyn Fn(&mut Run<'_>), name: &str, words: &str| {
        let error = advanced(change).unwrap_err();
        assert!(matches!(error, Error::Argument { argument, .. } if argument == name), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    };
    refused(&|run| run.guidance.prompt = 101.0, "prompt", "a batch of 2");
    refused(&|run| run.guidance.negative = Some(101.0), "negative prompt", "a batch of 2");
    refused(&|run| run.extractor.condition = 101.0, "null prompt", "a batch of 2");
    refused(&|run| maps(run, 1, 2), "labels", "2 maps");
    refused(&|run| maps(run, 2, 1), "labels", "2 maps");
    advanced(&|_| ()).unwrap();
    advanced(&|run| maps(run, 1, 1)).unwrap();
    // A negative that is not looked at; and whole pictures, one for each prompt.
    advanced(&|run| (run.guidance.negative, run.guidance.scale) = (Some(101.0), 1.0)).unwrap();
    advanced(&|run| (run.guidance.prompt, run.windows) = (101.0, None)).unwrap();
}
