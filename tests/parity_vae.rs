//! The VAE against diffusers: scaled latents from pixels, and pixels from scaled latents.
#![cfg(feature = "stable-diffusion")]
#![allow(clippy::disallowed_methods)] // A test may panic.

mod common;
mod model_copy;

use attention_distillation::stable_diffusion::AutoencoderKl;
use common::{fixture, relative, Comparison, Expected, ACTIVATIONS};
use model_copy::ModelCopy;
use tch::{Device, Kind};

fn autoencoder(folder: &str, name: &str) {
    let vae = AutoencoderKl::open(fixture(folder), Device::Cpu, Kind::Float).unwrap();
    let expected = Expected::read("vae");
    let get = |part: &str| expected.get(&format!("{name}.{part}"));
    let mut comparison = Comparison::default();
    tch::no_grad(|| {
        comparison.close(format!("{name} encode"), &vae.encode(get("pixels")).unwrap(), get("encoded"), ACTIVATIONS);
        comparison.close(format!("{name} decode"), &vae.decode(get("latents")).unwrap(), get("decoded"), ACTIVATIONS);
    });
    comparison.finish();
}

#[test]
fn like_stable_diffusion_15() {
    autoencoder("sd15/vae", "sd15");
}

/// `query`, `key`, `value`, `proj_attn`, in f16, with a config that lacks the later settings.
#[test]
fn former_tensor_names() {
    autoencoder("vae_old_names", "old_names");
}

/// The same weights under both sets of names make the same picture, bit for bit.
#[test]
fn former_names_are_the_same_network() {
    let open = |folder| AutoencoderKl::open(fixture(folder), Device::Cpu, Kind::Float).unwrap();
    let expected = Expected::read("vae");
    let latents = expected.get("sd15.latents");
    let (new, former) = tch::no_grad(|| (open("sd15/vae").decode(latents).unwrap(), open("vae_old_names").decode(latents).unwrap()));
    assert!(new.equal(&former));
}

/// No attention, no quant convolutions, a shift.
#[test]
fn without_attention_and_quant_convolutions() {
    autoencoder("vae_plain", "plain");
}

/// SDXL's overflows in f16: unless the folder says `force_upcast: false` it computes in f32, whatever the rest does.
#[test]
fn half_precision_stops_at_the_autoencoder() {
    let pixels = Expected::read("vae").get("sd15.pixels").shallow_clone();
    let encode = |folder: &std::path::Path, kind: Kind| AutoencoderKl::open(folder, Device::Cpu, kind).unwrap().encode(&pixels).unwrap();
    let copy = ModelCopy::of("sdxl");
    let folder = copy.path("vae");
    let exact = encode(&folder, Kind::Float);
    for kind in [Kind::Half, Kind::BFloat16] {
        assert!(encode(&folder, kind).equal(&exact), "{kind:?}");
        copy.set("vae/config.json", "force_upcast", false.into());
        let rounded = encode(&folder, kind);
        assert!(!rounded.equal(&exact) && relative(&rounded, &exact) < 0.1, "{kind:?}: {}", relative(&rounded, &exact));
        copy.set("vae/config.json", "force_upcast", true.into());
        let asked = AutoencoderKl::open_in(&folder, Device::Cpu, kind).unwrap().encode(&pixels).unwrap();
        assert!(asked.equal(&rounded), "{kind:?}");
    }
}
