//! DDIM against diffusers, made from the configs of several schedulers.
#![cfg(feature = "stable-diffusion")]
#![allow(clippy::disallowed_methods)] // A test may panic.

mod common;

use attention_distillation::{stable_diffusion, Ddim, Scheduler};
use common::{fixture, Comparison, Expected};
use tch::{Kind, Tensor};

/// Beside the network's 1e-4 a schedule must not count: both sides take the same table of f32 alphas, and differ by
/// whether the few factors after it are f32 or f64.
const STEP: f64 = 5e-6;

#[test]
fn timesteps_steps_and_noise() {
    let expected = Expected::read("ddim");
    let (sample, prediction, noise) = (expected.get("sample"), expected.get("prediction"), expected.get("noise"));
    let mut comparison = Comparison::default();
    let mut names: Vec<_> =
        std::fs::read_dir(fixture("schedulers")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert!(names.len() > 10);
    for name in &names {
        let config = stable_diffusion::scheduler_config(fixture(&format!("schedulers/{name}/scheduler_config.json"))).unwrap();
        let prefix = format!("{name}.");
        let mut cases: Vec<&str> = expected.names(&prefix).collect();
        cases.sort_unstable();
        assert!(!cases.is_empty(), "no expected numbers for {name}");
        for case in cases {
            let what = format!("{prefix}{case}");
            let wanted = expected.get(&what);
            if let Some(timestep) = case.strip_prefix("noised") {
                let ddim = Ddim::new(&config, 1).unwrap();
                let noised = ddim.add_noise(sample, noise, timestep.parse().unwrap()).unwrap();
                comparison.close(what, &noised, wanted, STEP);
                continue;
            }
            let (steps, case) = case.split_once('.').unwrap();
            let ddim = match Ddim::new(&config, steps.parse().unwrap()) {
                Ok(ddim) => ddim,
                Err(error) => {
                    comparison.fail(format!("{what}: {error}"));
                    continue;
                }
            };
            if let Some(index) = case.strip_prefix("step") {
                let after = ddim.step(index.parse().unwrap(), prediction, sample).unwrap();
                comparison.close(what, &after, wanted, STEP);
            } else {
                let timesteps = Tensor::from_slice(ddim.timesteps());
                comparison.close(what, &timesteps, &wanted.to_kind(Kind::Double), 0.0);
            }
        }
    }
    comparison.finish();
}
