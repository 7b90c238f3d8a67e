//! Adam against libtorch's, and what optimizers refuse.
#![allow(clippy::disallowed_methods, missing_docs)]

mod toy;

use attention_distillation::{Adam, AdamConfig, Error, GradientDescent, Optimizer};
use tch::{COptimizer, Kind, Tensor};
use toy::{assert_same, difference, noise};

const SHAPE: [i64; 4] = [1, 4, 8, 8];

/// Gradients as of a run: noisy, of sizes far apart.
fn gradient(step: u64) -> Tensor {
    let sizes = (noise(77, &SHAPE) * 3.0).exp() * 1e-3;
    (noise(step, &SHAPE) + 0.3) * sizes
}

#[test]
fn adam_is_libtorchs_adam() {
    tch::set_num_threads(1);
    let settings = [(0.05, 0.9, 0.999, 1e-8), (0.015, 0.5, 0.9, 1e-4), (1e-4, 0.0, 0.99, 1e-8)];
    for (learning_rate, beta1, beta2, epsilon) in settings {
        let (mut ours, theirs) = (noise(1, &SHAPE), noise(1, &SHAPE).set_requires_grad(true));
        let mut config = AdamConfig::with_learning_rate(learning_rate);
        (config.beta1, config.beta2, config.epsilon) = (beta1, beta2, epsilon);
        let mut adam = Adam::new(config);
        let mut libtorch = COptimizer::adam(learning_rate, beta1, beta2, 0.0, epsilon, false).unwrap();
        libtorch.add_parameters(&theirs, 0).unwrap();
        for step in 0..200 {
            let gradient = gradient(step);
            adam.step(&mut ours, &gradient).unwrap();
            libtorch.zero_grad().unwrap();
            (&theirs * &gradient).sum(Kind::Float).backward();
            libtorch.step().unwrap();
        }
        let moved = difference(&ours, &noise(1, &SHAPE));
        assert!(moved > 10.0 * learning_rate, "it went somewhere: {moved}");
        // The same formula in f32; libtorch's C++ fuses a multiplication and an addition here and there. That is some
        // units in the last place (2.4e-7, for numbers from 2 to 4) after 200 steps; measured 1.9e-6.
        let off = difference(&ours, &theirs);
        assert!(off < 5e-6, "{off} of {moved} with {config:?}");
    }
}

#[test]
fn adam_finds_the_bottom() {
    tch::set_num_threads(1);
    let (target, mut z) = (noise(1, &SHAPE), noise(2, &SHAPE));
    let (mut adam, start) = (Adam::default(), difference(&z, &target));
    for _ in 0..400 {
        let gradient = (&z - &target) * 2.0;
        adam.step(&mut z, &gradient).unwrap();
    }
    // Adam circles the bottom at a fraction of its learning rate, 0.05.
    assert!(start > 1.0 && difference(&z, &target) < 0.02);
}

#[test]
fn adams_state_makes_the_round_trip() {
    tch::set_num_threads(1);
    let (mut z, mut adam) = (noise(1, &SHAPE), Adam::default());
    assert!(adam.state().unwrap().is_empty());
    for step in 0..7 {
        adam.step(&mut z, &gradient(step)).unwrap();
    }
    let copied = |state: &[(String, Tensor)]| -> Vec<_> { state.iter().map(|(name, tensor)| (name.clone(), tensor.copy())).collect() };
    let saved = copied(&adam.state().unwrap());
    let names: Vec<_> = saved.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["mean", "variance", "steps"]);
    let mut other = z.copy();
    let mut loaded = Adam::default();
    loaded.load_state(copied(&saved)).unwrap();
    for step in 7..12 {
        adam.step(&mut z, &gradient(step)).unwrap();
        loaded.step(&mut other, &gradient(step)).unwrap();
        assert_same(&z, &other);
    }
    let mut again = Adam::default();
    again.load_state(copied(&saved)).unwrap();
    for ((_, kept), (_, now)) in saved.iter().zip(again.state().unwrap()) {
        assert_same(kept, &now);
    }
    let mut fresh = Adam::default();
    let (mut a, mut b) = (noise(1, &SHAPE), noise(1, &SHAPE));
    again.reset();
    loaded.load_state(vec![]).unwrap();
    assert!(again.state().unwrap().is_empty() && loaded.state().unwrap().is_empty());
    fresh.step(&mut a, &gradient(3)).unwrap();
    again.step(&mut b, &gradient(3)).unwrap();
    assert_same(&a, &b);
}

#[test]
fn gradient_descent_is_one_subtraction() {
    tch::set_num_threads(1);
    let mut z = noise(1, &SHAPE);
    let mut descent = GradientDescent { learning_rate: 0.5 };
    descent.step(&mut z, &gradient(1)).unwrap();
    descent.reset();
    descent.step(&mut z, &gradient(2)).unwrap();
    assert_same(&z, &(noise(1, &SHAPE) - gradient(1) * 0.5 - gradient(2) * 0.5));
    assert!(descent.state().unwrap().is_empty());
    descent.load_state(vec![]).unwrap();
    // Adam's memory would be lost without a word.
    let mut adam = Adam::default();
    adam.step(&mut z, &gradient(3)).unwrap();
    let error = descent.load_state(adam.state().unwrap());
    assert!(matches!(error, Err(Error::Argument { .. })), "{error:?}");
}

/// A step that is refused leaves all as it was.
#[track_caller]
fn refused(optimizer: &mut impl Optimizer, gradient: &Tensor) -> String {
    let mut z = noise(1, &SHAPE);
    let before: Vec<_> = optimizer.state().unwrap().into_iter().map(|(name, tensor)| (name, tensor.copy())).collect();
    let error = optimizer.step(&mut z, gradient).unwrap_err();
    assert_same(&z, &noise(1, &SHAPE));
    let after = optimizer.state().unwrap();
    assert_eq!(before.len(), after.len());
    for ((_, x), (_, y)) in before.iter().zip(&after) {
        assert_same(x, y);
    }
    error.to_string()
}

#[test]
fn bad_settings_are_refused_and_nothing_moves() {
    tch::set_num_threads(1);
    let with = |change: &dyn Fn(&mut AdamConfig)| {
        let mut config = AdamConfig::default();
        change(&mut config);
        config
    };
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.1] {
        let configs = [
            ("learning rate", with(&|c| c.learning_rate = bad)),
            ("beta1", with(&|c| c.beta1 = bad)),
            ("beta2", with(&|c| c.beta2 = bad)),
            ("epsilon", with(&|c| c.epsilon = bad)),
        ];
        for (name, config) in configs {
            let message = refused(&mut Adam::new(config), &gradient(1));
            assert!(message.contains(name) && message.contains(&bad.to_string()), "{message}");
            // In the middle of a run, too.
            let mut adam = Adam::default();
            adam.step(&mut noise(5, &SHAPE), &gradient(2)).unwrap();
            adam.config = config;
            assert!(refused(&mut adam, &gradient(1)).contains(name));
        }
        assert!(refused(&mut GradientDescent { learning_rate: bad }, &gradient(1)).contains("learning rate"));
    }
    assert!(refused(&mut Adam::new(with(&|c| c.beta1 = 1.0)), &gradient(1)).contains("beta1"));
    assert!(refused(&mut Adam::new(with(&|c| c.beta2 = 1.0)), &gradient(1)).contains("beta2"));
}

#[test]
fn a_gradient_of_another_shape_is_refused_and_nothing_moves() {
    tch::set_num_threads(1);
    for wrong in [noise(1, &[1]), noise(1, &[1, 4, 8, 4]), noise(1, &[2, 4, 8, 8])] {
        refused(&mut Adam::default(), &wrong);
        refused(&mut GradientDescent { learning_rate: 0.1 }, &wrong);
    }
    // The memory of another picture.
    let mut adam = Adam::default();
    adam.step(&mut noise(1, &[1, 4, 4, 4]), &noise(2, &[1, 4, 4, 4])).unwrap();
    let message = refused(&mut adam, &gradient(1));
    assert!(message.contains("optimizer state") && message.contains("[1, 4, 4, 4]") && message.contains("reset the optimizer"), "{message}");
}

#[test]
fn a_step_leaves_no_graph() {
    tch::set_num_threads(1);
    let gradient = gradient(1).set_requires_grad(true) * 2.0;
    let mut z = noise(1, &SHAPE);
    Adam::default().step(&mut z, &gradient).unwrap();
    GradientDescent { learning_rate: 0.1 }.step(&mut z, &gradient).unwrap();
    assert!(!z.requires_grad());
}

#[test]
fn states_that_are_not_adams_are_refused() {
    tch::set_num_threads(1);
    let named = |list: Vec<(&str, Tensor)>| -> Vec<(String, Tensor)> { list.into_iter().map(|(name, tensor)| (name.into(), tensor)).collect() };
    let moment = || noise(3, &SHAPE).abs();
    let steps = |count: &[i64]| Tensor::from_slice(count);
    let bad = [
        ("mean", named(vec![("variance", moment()), ("steps", steps(&[1]))])),
        ("variance", named(vec![("mean", moment()), ("steps", steps(&[1]))])),
        ("steps", named(vec![("mean", moment()), ("variance", moment())])),
        ("mean", named(vec![("momentum", moment())])),
        ("", named(vec![("mean", moment()), ("variance", noise(1, &[4, 4])), ("steps", steps(&[1]))])),
        ("steps", named(vec![("mean", moment()), ("variance", moment()), ("steps", steps(&[1, 2]))])),
        ("steps", named(vec![("mean", moment()), ("variance", moment()), ("steps", steps(&[]))])),
        // A count below 1 would divide by 0 or turn the step around.
        ("steps", named(vec![("mean", moment()), ("variance", moment()), ("steps", steps(&[0]))])),
        ("steps", named(vec![("mean", moment()), ("variance", moment()), ("steps", steps(&[-1]))])),
    ];
    for (word, state) in bad {
        let mut adam = Adam::default();
        adam.step(&mut noise(1, &SHAPE), &gradient(1)).unwrap();
        let before: Vec<_> = adam.state().unwrap().into_iter().map(|(_, tensor)| tensor.copy()).collect();
        let shown = format!("{state:?}");
        match adam.load_state(state) {
            Ok(()) => panic!("taken up: {shown}"),
            Err(error) => assert!(error.to_string().contains(word), "{error}"),
        }
        for (was, (_, is)) in before.iter().zip(adam.state().unwrap()) {
            assert_same(was, &is);
        }
    }
    // A count as a scalar, as other programs may store it, is a count all the same.
    let mut adam = Adam::default();
    adam.load_state(named(vec![("mean", moment()), ("variance", moment()), ("steps", Tensor::from(3i64))])).unwrap();
}
