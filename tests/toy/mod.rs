//! A network small enough to check by hand, as a foreign program might have it: its own error type around the hook's, a
//! cross-attention after each self-attention, and counters. It fails, miscounts or turns NaN when told to.
#![allow(dead_code, clippy::disallowed_methods, missing_docs)] // Each test file uses a part of it; a test may panic.

use attention_distillation::{AttentionHook, AttentionSite, Denoiser, Error, FeatureExtractor, Features, Qkv, References};
use std::cell::Cell;
use tch::{Kind, Tensor};

/// Self-attention layers of the network.
pub const LAYERS: usize = 5;
pub const CHANNELS: i64 = 4;
const HEADS: i64 = 2;
const WIDTH: i64 = 16;
const WORDS: i64 = 5;

/// Normal numbers from a generator of their own: libtorch's is shared by tests that run side by side.
pub fn noise(seed: u64, shape: &[i64]) -> Tensor {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut uniform = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (((z ^ (z >> 31)) >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    let count = shape.iter().product::<i64>();
    let values: Vec<f32> = (0..count).map(|_| ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32).collect();
    Tensor::from_slice(&values).view(shape)
}

/// Latents `(1, 4, h, w)`.
pub fn latents(seed: u64, h: i64, w: i64) -> Tensor {
    noise(seed, &[1, CHANNELS, h, w])
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Trouble {
    Memory,
    Broken,
}

/// The error type of another program; what the hook said is only in its words.
#[derive(Debug)]
pub enum ToyError {
    Hook(String),
    Own(Trouble),
}

impl std::fmt::Display for ToyError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Hook(words) => write!(f, "a layer failed: {words}"),
            Self::Own(Trouble::Memory) => write!(f, "CUDA out of memory. Tried to allocate 2.00 GiB"),
            Self::Own(Trouble::Broken) => write!(f, "a wire came loose"),
        }
    }
}

impl std::error::Error for ToyError {}

impl From<Error> for ToyError {
    fn from(error: Error) -> Self {
        Self::Hook(error.to_string())
    }
}

struct Block {
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    text_query: Tensor,
    text_key: Tensor,
    text_value: Tensor,
}

pub struct Toy {
    pub kind: Kind,
    inflow: Tensor,
    clock: Tensor,
    text: Tensor,
    outflow: Tensor,
    blocks: Vec<Block>,
    /// Forward passes so far.
    pub forwards: Cell<usize>,
    /// Self-attention layers entered by the last pass.
    pub entered: Cell<usize>,
    /// The deepest of all passes.
    pub deepest: Cell<usize>,
    trouble: Cell<Option<(usize, Trouble)>>,
    /// At this timestep everything is NaN.
    pub nan_at: Cell<Option<f64>>,
    /// What it calls its layers; a wrong one is for tests of that.
    pub number: fn(usize) -> usize,
    /// What it says of its grid.
    pub grid: fn((i64, i64)) -> (i64, i64),
}

impl Toy {
    /// The same weights in every kind, up to rounding.
    ///
    /// Runs that take two ways to the same latents are compared with `Kind::Double`. With f32 the ways differ by roundings, which
    /// Adam turns into steps of whole learning rates wherever a gradient is next to nothing; how many depends on the processor.
    pub fn new(kind: Kind) -> Self {
        let seed = Cell::new(1000);
        let weight = |shape: &[i64], scale: f64| {
            seed.set(seed.get() + 1);
            (noise(seed.get(), shape) * scale).to_kind(kind)
        };
        let square = |scale| weight(&[WIDTH, WIDTH], scale);
        let blocks = (0..LAYERS).map(|_| Block {
            query: square(0.5),
            key: square(0.5),
            value: square(0.3),
            out: square(0.3),
            text_query: square(0.3),
            text_key: square(0.3),
            text_value: square(0.1),
        });
        Self {
            kind,
            blocks: blocks.collect(),
            inflow: weight(&[CHANNELS, WIDTH], 0.5),
            clock: weight(&[WIDTH], 0.5),
            text: weight(&[1, WORDS, WIDTH], 1.0),
            outflow: weight(&[WIDTH, CHANNELS], 0.3),
            forwards: Cell::new(0),
            entered: Cell::new(0),
            deepest: Cell::new(0),
            trouble: Cell::new(None),
            nan_at: Cell::new(None),
            number: |i| i,
            grid: |grid| grid,
        }
    }

    /// With weights that ask for gradients, as those of a network that somebody forgot to freeze.
    pub fn trainable(kind: Kind) -> Self {
        let mut toy = Self::new(kind);
        for weight in toy.weights_mut() {
            *weight = weight.set_requires_grad(true);
        }
        toy
    }

    fn weights_mut(&mut self) -> Vec<&mut Tensor> {
        let mut all = vec![&mut self.inflow, &mut self.clock, &mut self.text, &mut self.outflow];
        for block in &mut self.blocks {
            all.extend([&mut block.query, &mut block.key, &mut block.value, &mut block.out]);
            all.extend([&mut block.text_query, &mut block.text_key, &mut block.text_value]);
        }
        all
    }

    /// Whether any weight has got a gradient.
    pub fn weights_have_gradients(&mut self) -> bool {
        self.weights_mut().iter().any(|weight| weight.grad().defined())
    }

    /// The `n`th forward pass from now on (from 1) fails, once.
    pub fn fail_at(&self, n: usize, trouble: Trouble) {
        self.trouble.set(Some((self.forwards.get() + n, trouble)));
    }

    fn heads(x: &Tensor) -> Tensor {
        let (batch, tokens, width) = x.size3().unwrap();
        x.view([batch, tokens, HEADS, width / HEADS]).transpose(1, 2)
    }

    fn join(x: &Tensor) -> Tensor {
        x.transpose(1, 2).flatten(2, 3)
    }

    /// `condition` scales the text.
    pub fn run(&self, latents: &Tensor, timestep: f64, condition: f64, hook: &mut dyn AttentionHook) -> Result<Tensor, ToyError> {
        let mut time = &self.clock * (timestep / 1000.0);
        if self.nan_at.get() == Some(timestep) {
            time *= f64::NAN;
        }
        self.pass(latents, &time, condition, hook)
    }

    /// The same with the timestep as a tensor, `(1)`.
    pub fn run_at(&self, latents: &Tensor, timestep: &Tensor, condition: f64, hook: &mut dyn AttentionHook) -> Result<Tensor, ToyError> {
        // In double precision first, as the number above: otherwise the two would be a rounding of f32 apart.
        let time = &self.clock * (timestep.to_kind(Kind::Double) / 1000.0).to_kind(self.kind);
        let spoilt = timestep.eq(self.nan_at.get().unwrap_or(f64::NAN));
        self.pass(latents, &time.masked_fill(&spoilt, f64::NAN), condition, hook)
    }

    fn pass(&self, latents: &Tensor, time: &Tensor, condition: f64, hook: &mut dyn AttentionHook) -> Result<Tensor, ToyError> {
        self.forwards.set(self.forwards.get() + 1);
        self.entered.set(0);
        if let Some((_, trouble)) = self.trouble.get().filter(|(at, _)| *at == self.forwards.get()) {
            return Err(ToyError::Own(trouble));
        }
        let (batch, _, h, w) = latents.size4().map_err(Error::from)?;
        let mut x = latents.to_kind(self.kind).flatten(2, 3).transpose(1, 2).matmul(&self.inflow) + time;
        let text = (&self.text * condition).expand([batch, -1, -1], false);
        for (i, block) in self.blocks.iter().enumerate() {
            self.entered.set(i + 1);
            self.deepest.set(self.deepest.get().max(i + 1));
            let project = |from: &Tensor, weight: &Tensor| Self::heads(&from.matmul(weight));
            let (index, grid) = ((self.number)(i), (self.grid)((h, w)));
            let own = Qkv::new(project(&x, &block.query), project(&x, &block.key), project(&x, &block.value));
            x = &x + Self::join(&hook.attend(&AttentionSite::self_attention(index, grid), own)?).matmul(&block.out);
            let cross = Qkv::new(project(&x, &block.text_query), project(&text, &block.text_key), project(&text, &block.text_value));
            x = (&x + Self::join(&hook.attend(&AttentionSite::cross_attention(index, grid), cross)?)).tanh();
        }
        Ok(x.matmul(&self.outflow).transpose(1, 2).reshape([batch, CHANNELS, h, w]).to_kind(latents.kind()))
    }
}

impl Denoiser for Toy {
    type Condition = f64;

    fn forward(&self, latents: &Tensor, timestep: f64, condition: &f64, hook: &mut dyn AttentionHook) -> attention_distillation::Result<Tensor> {
        self.run(latents, timestep, *condition, hook).map_err(Error::denoiser)
    }
}

/// Layers 2 and 3 of the five.
pub fn extractor(toy: &Toy) -> FeatureExtractor<&Toy> {
    FeatureExtractor::new(toy, 1.0, 2..4)
}

/// Features of layers 2 and 3 at timestep 500, without a graph.
pub fn features(toy: &Toy, latents: &Tensor) -> Features {
    tch::no_grad(|| extractor(toy).extract(latents, 500.0)).unwrap()
}

/// One style's features.
pub fn style(toy: &Toy, latents: &Tensor) -> References<Features> {
    References::style(features(toy, latents))
}

/// The largest difference; infinite where a number is NaN.
pub fn difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size(), "shapes");
    let largest = (a.detach().to_kind(Kind::Double) - b.detach().to_kind(Kind::Double)).abs().max().double_value(&[]);
    if largest.is_nan() {
        f64::INFINITY
    } else {
        largest
    }
}

/// The largest difference over the largest number of `b`.
pub fn relative(a: &Tensor, b: &Tensor) -> f64 {
    difference(a, b) / b.detach().to_kind(Kind::Double).abs().max().double_value(&[]).max(f64::MIN_POSITIVE)
}

/// Equal to the last bit.
#[track_caller]
pub fn assert_same(a: &Tensor, b: &Tensor) {
    assert_eq!(a.kind(), b.kind());
    assert_eq!(difference(a, b), 0.0);
}

/// The latents, in f32, of two runs of a network in f64 that do the same work.
///
/// They are the same to the last bit wherever libtorch computes the same operation twice alike, which it promises nowhere: one run in
/// f32 came out .00005 from its twin. What a run must not do, a step made twice or with other noise, moves latents by .01 and more.
#[track_caller]
pub fn assert_same_run(a: &Tensor, b: &Tensor) {
    assert_eq!(a.kind(), b.kind());
    let apart = difference(a, b);
    assert!(apart < 1e-5, "{apart:e} apart");
}

pub fn number(t: &Tensor) -> f64 {
    t.double_value(&[])
}
