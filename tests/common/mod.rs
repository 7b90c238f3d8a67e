//! What the parity tests share: fixtures and how far from them is too far.
#![allow(dead_code, clippy::disallowed_methods)] // Each test file uses a part of it; a test may panic.

use std::collections::HashMap;
use std::path::PathBuf;
use tch::{Kind, Tensor};

/// Activations and gradients in f32, relative to the largest number of the tensor. Both sides run on libtorch 2.11, but
/// in another order of operations here and there (a fused kernel, a scale folded in): that costs some units in the last
/// place (6e-8), which up to sixty layers magnify by some hundreds. A wrong epsilon, scale or activation costs over 1e-3.
pub const ACTIVATIONS: f64 = 1e-4;

/// A file or folder beside `make_fixtures.py`. Also quiets libtorch: with more threads than cores, parallel tests
/// spend their time waiting for one another.
pub fn fixture(path: &str) -> PathBuf {
    tch::set_num_threads(1);
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(path)
}

/// The tensors of one file of `fixtures/expected`.
pub struct Expected {
    file: String,
    tensors: HashMap<String, Tensor>,
}

impl Expected {
    pub fn read(name: &str) -> Self {
        let file = fixture("expected").join(format!("{name}.safetensors"));
        let tensors = Tensor::read_safetensors(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        Self { file: name.to_owned(), tensors: tensors.into_iter().collect() }
    }

    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    pub fn get(&self, name: &str) -> &Tensor {
        self.find(name).unwrap_or_else(|| panic!("{} holds no `{name}`", self.file))
    }

    pub fn number(&self, name: &str) -> f64 {
        self.get(name).double_value(&[])
    }

    /// Names that start with `prefix`, without it.
    pub fn names<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> {
        self.tensors.keys().filter_map(move |name| name.strip_prefix(prefix))
    }
}

/// The largest difference over the largest expected number; infinite where a number is none.
pub fn relative(actual: &Tensor, expected: &Tensor) -> f64 {
    let (actual, expected) = (actual.detach().to_kind(Kind::Double), expected.to_kind(Kind::Double));
    let difference = (actual - &expected).abs().max().double_value(&[]);
    let largest = expected.abs().max().double_value(&[]);
    if difference.is_nan() {
        f64::INFINITY
    } else {
        difference / largest.max(f64::MIN_POSITIVE)
    }
}

/// Collects what is off, so that one run of a test tells all.
#[derive(Default)]
pub struct Comparison {
    failures: Vec<String>,
}

impl Comparison {
    pub fn close(&mut self, what: impl std::fmt::Display, actual: &Tensor, expected: &Tensor, tolerance: f64) {
        if actual.size() != expected.size() {
            self.failures.push(format!("{what}: shape {:?}, expected {:?}", actual.size(), expected.size()));
            return;
        }
        let off = relative(actual, expected);
        println!("{what}: off by {off:.2e}");
        if off > tolerance {
            self.failures.push(format!("{what}: off by {off:.2e} relative, {tolerance:.0e} is allowed"));
        }
    }

    pub fn fail(&mut self, what: impl Into<String>) {
        self.failures.push(what.into());
    }

    pub fn finish(self) {
        assert!(self.failures.is_empty(), "{} of the comparisons fail:\n{}", self.failures.len(), self.failures.join("\n"));
    }
}

#[cfg(feature = "stable-diffusion")]
pub mod networks {
    use super::{fixture, Expected};
    use attention_distillation::stable_diffusion::{Condition, UNet};
    use tch::{Device, Kind};

    pub fn unet(folder: &str) -> UNet {
        UNet::open(fixture(folder), Device::Cpu, Kind::Float).unwrap()
    }

    /// Text, and what SDXL has besides, from a fixture.
    pub fn condition(expected: &Expected, prefix: &str) -> Condition {
        let get = |name: &str| expected.find(&format!("{prefix}{name}")).map(tch::Tensor::shallow_clone);
        let condition = Condition::new(get("text").unwrap());
        match (get("pooled"), get("time_ids")) {
            (Some(pooled), Some(time_ids)) => condition.with_pooled(pooled, time_ids),
            _ => condition,
        }
    }
}
