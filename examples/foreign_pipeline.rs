//! A network of your own joins: it hands its attention to a hook, and its pictures are optimised.
//!
//! `cargo run --release --example foreign_pipeline`
#![allow(clippy::disallowed_methods)] // `view` and its kin panic on shapes that do not fit, as usual in networks on tch

use attention_distillation::tch::{nn, nn::Module, Device, Kind, Tensor};
use attention_distillation::{
    AdLoss, AttentionHook, AttentionSite, ContentLoss, Denoiser, Distiller, FeatureExtractor, Qkv, References, Result, TotalLoss,
};
use std::{fmt::Display, io::Write};

const WIDTH: i64 = 64;
const HEADS: i64 = 4;

/// Stands for your U-Net or transformer, which has its weights already; these are random.
struct Network {
    inflow: nn::Linear,
    blocks: Vec<(nn::Linear, nn::Linear)>, // to queries, keys and values; back to the width
    outflow: nn::Linear,
}

impl Network {
    fn new(path: &nn::Path) -> Self {
        let linear = |name: &str, from, to| nn::linear(path / name, from, to, Default::default());
        let block = |i: usize| (linear(&format!("qkv{i}"), WIDTH, 3 * WIDTH), linear(&format!("out{i}"), WIDTH, WIDTH));
        Self { inflow: linear("inflow", 4, WIDTH), blocks: (0..6).map(block).collect(), outflow: linear("outflow", WIDTH, 4) }
    }

    /// Your forward pass, with the hook as one argument more.
    fn forward(&self, latents: &Tensor, timestep: f64, prompt: &Tensor, hook: &mut dyn AttentionHook) -> Result<Tensor> {
        let (batch, _, height, width) = latents.size4()?;
        let mut x = self.inflow.forward(&latents.flatten(2, 3).transpose(1, 2)) + prompt + timestep * 1e-4;
        for (index, (qkv, out)) in self.blocks.iter().enumerate() {
            let heads = qkv.forward(&x).view([batch, -1, 3, HEADS, WIDTH / HEADS]).permute([2, 0, 3, 1, 4]);
            let (q, k, v) = (heads.get(0), heads.get(1), heads.get(2));
            // Each is (batch, heads, tokens, head_dim). The one line that changes; it was `scaled_dot_product_attention(q, k, v)`:
            let attended = hook.attend(&AttentionSite::self_attention(index, (height, width)), Qkv::new(q, k, v))?;
            x = (x + out.forward(&attended.transpose(1, 2).flatten(2, 3))).tanh();
        }
        Ok(self.outflow.forward(&x).transpose(1, 2).reshape([batch, 4, height, width]))
    }
}

/// All that the crate asks for. An error type of your own becomes `Error::denoiser(error)`.
impl Denoiser for Network {
    type Condition = Tensor;

    fn forward(&self, latents: &Tensor, timestep: f64, prompt: &Tensor, hook: &mut dyn AttentionHook) -> Result<Tensor> {
        Network::forward(self, latents, timestep, prompt, hook)
    }
}

fn main() -> Result<()> {
    // For a GPU: `let device = attention_distillation::device::best();` here, before anything else is asked of tch.
    attention_distillation::tch::manual_seed(0);
    attention_distillation::tch::set_num_threads(1); // the network is too small for more
    let mut weights = nn::VarStore::new(Device::Cpu);
    let network = Network::new(&weights.root());
    weights.freeze(); // only latents get gradients

    // Your autoencoder's latents of two pictures, of any sizes.
    let style = Tensor::f_randn([1, 4, 24, 24], (Kind::Float, Device::Cpu))?;
    let content = Tensor::f_randn([1, 4, 16, 32], (Kind::Float, Device::Cpu))?;
    // Your text encoder's output for the empty prompt.
    let null_prompt = Tensor::f_zeros([WIDTH], (Kind::Float, Device::Cpu))?;

    // The last three of the six self-attention layers, at 50 timesteps from noise to picture.
    let extractor = FeatureExtractor::new(&network, null_prompt, 3..6);
    let timesteps = (0..50).rev().map(|i| f64::from(20 * i + 1)).collect();
    let mut run = Distiller::new(extractor, timesteps, References::style(style).with_content(content.shallow_clone()), content);
    run.optimizer.config.learning_rate = 0.03;
    run.loss = TotalLoss::default().plus(1.0, AdLoss::default()).plus(0.1, ContentLoss);

    while let Some(progress) = run.advance()? {
        if progress.step == 1 || progress.step % 10 == 0 {
            say(format_args!("step {:2} of {}: loss {:.4}", progress.step, progress.steps, progress.loss()?.unwrap_or_default()));
        }
    }
    say(format_args!("{:?} are the latents to decode", run.latents.size()));
    Ok(())
}

/// `println!` would panic where the reader has gone, as `head` does.
fn say(line: impl Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}
