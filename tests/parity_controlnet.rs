//! ControlNets against diffusers: the residuals, and what a UNet makes of them.
#![cfg(feature = "stable-diffusion")]
#![allow(clippy::disallowed_methods)] // A test may panic.

mod common;

use attention_distillation::stable_diffusion::ControlNet;
use attention_distillation::PlainAttention;
use common::networks::{condition, unet};
use common::{fixture, Comparison, Expected, ACTIVATIONS};
use tch::{Device, Kind};

/// What the fixtures were made with.
const STRENGTH: f64 = 0.7;

fn case(name: &str) {
    let expected = Expected::read("controlnet");
    let get = |part: &str| expected.get(&format!("{name}.{part}"));
    let net = ControlNet::open(fixture(&format!("controlnet_{name}")), Device::Cpu, Kind::Float).unwrap();
    let unet = unet(&format!("{name}/unet"));
    let condition = condition(&expected, &format!("{name}."));

    let hint = net.embed(get("hint")).unwrap();
    let residuals = net.residuals(get("latents"), get("timestep"), &condition, &hint, STRENGTH).unwrap();
    let output = unet.forward_with(get("latents"), get("timestep"), &condition, Some(&residuals), &mut PlainAttention).unwrap();

    let mut comparison = Comparison::default();
    assert_eq!(residuals.down.len(), expected.names(&format!("{name}.down")).count());
    for (i, residual) in residuals.down.iter().enumerate() {
        comparison.close(format!("{name} down {i}"), residual, get(&format!("down{i}")), ACTIVATIONS);
    }
    comparison.close(format!("{name} mid"), &residuals.mid, get("mid"), ACTIVATIONS);
    comparison.close(format!("{name} output"), &output, get("output"), ACTIVATIONS);
    comparison.finish();
}

#[test]
fn like_stable_diffusion_15() {
    case("sd15");
}

/// Also a control picture in BGR.
#[test]
fn like_stable_diffusion_xl() {
    case("sdxl");
}
