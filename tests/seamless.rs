//! Pictures whose opposite borders meet: convolutions against `tools/reference`, and what they make of borders.
#![cfg(feature = "stable-diffusion")]
#![allow(clippy::disallowed_methods, clippy::unwrap_used, missing_docs)] // A test may panic.

mod common;

use attention_distillation::stable_diffusion::{AutoencoderKl, Condition, ControlNet, Seamless, Tiles, Tiling, UNet};
use attention_distillation::{
    image, metrics, Denoiser, Distiller, Error, GuidedSampler, Noise, PlainAttention, References, StableDiffusion, Windows,
};
use common::{fixture, relative, Comparison, Expected, ACTIVATIONS};
use tch::{Device, Kind, Tensor};

const ALL: [Seamless; 4] = [Seamless::None, Seamless::X, Seamless::Y, Seamless::Both];

/// What a shift may change, relative to the largest number: sums in another order.
const ROUNDINGS: f64 = 2e-5;
/// And what it changes where borders do not meet, at least.
const BORDERS: f64 = 1e-2;

/// What the bundled U-Net's deepest layer sees as one place, in pixels.
const DEEPEST: i64 = 16;

fn random(seed: u64, shape: &[i64]) -> Tensor {
    Noise::seeded(seed).draw(&Tensor::zeros(shape, (Kind::Float, Device::Cpu))).unwrap()
}

fn tiny() -> StableDiffusion {
    StableDiffusion::open(fixture("sd15"), Device::Cpu, Kind::Float).unwrap()
}

fn bundled(seamless: Seamless) -> StableDiffusion {
    StableDiffusion::open(fixture("../../assets/mini"), Device::Cpu, Kind::Float).unwrap().with_seamless(seamless)
}

fn vae(folder: &str, seamless: Seamless) -> AutoencoderKl {
    let mut vae = AutoencoderKl::open(fixture(folder), Device::Cpu, Kind::Float).unwrap();
    vae.set_seamless(seamless);
    vae
}

/// Whether a function of pictures goes along with shifts, on the axes that are circular, and only there. Axes 2 and 3 by so
/// many places of the input, which are so many of the output.
fn follows_shifts(name: &str, seamless: Seamless, input: &Tensor, (places, out): (i64, i64), function: &dyn Fn(&Tensor) -> Tensor) {
    let plain = function(input);
    for (axis, meets) in [(3, seamless.x()), (2, seamless.y())] {
        let off = relative(&function(&input.roll(places, axis)), &plain.roll(out, axis));
        println!("{name}, {seamless:?}, axis {axis}: {off:.1e}");
        assert!(if meets { off < ROUNDINGS } else { off > BORDERS }, "{name}, {seamless:?}, axis {axis}: {off:.1e}");
    }
}

#[test]
fn like_circular_padding_in_torch() {
    let expected = Expected::read("circular");
    let mut comparison = Comparison::default();
    let mut unet = UNet::open(fixture("sd15/unet"), Device::Cpu, Kind::Float).unwrap();
    let mut vae = vae("sd15/vae", Seamless::None);
    let condition = Condition::new(expected.get("in.text").shallow_clone());
    for (name, seamless) in [("x", Seamless::X), ("y", Seamless::Y), ("xy", Seamless::Both)] {
        unet.set_seamless(seamless);
        vae.set_seamless(seamless);
        let mut close =
            |part: &str, found: Tensor| comparison.close(format!("{name} {part}"), &found, expected.get(&format!("{name}.{part}")), ACTIVATIONS);
        tch::no_grad(|| {
            let timestep = expected.get("in.timestep").double_value(&[]);
            close("output", unet.forward(expected.get("in.latents"), timestep, &condition, &mut PlainAttention).unwrap());
            close("encoded", vae.encode(expected.get("in.pixels")).unwrap());
            close("decoded", vae.decode(expected.get("in.given")).unwrap());
        });
    }
    comparison.finish();
}

/// A whole texture, from the style to the picture.
#[test]
fn a_texture_like_the_references() {
    let expected = Expected::read("texture_tiled");
    let mut comparison = Comparison::default();
    let model = tiny().with_seamless(Seamless::Both);
    let style = model.encode(expected.get("style0")).unwrap();
    comparison.close("style encoded", &style, expected.get("style0.latents"), ACTIVATIONS);
    let (size, ddim) = ((64, 64), model.ddim(6).unwrap());
    let mut noise = Noise::seeded(5730);
    let start = model.noise(1, size, &mut noise).unwrap();
    comparison.close("start", &start, expected.get("start"), 1e-5);
    let guidance = model.guidance(&[""], None, 1.0, size).unwrap();
    let mut run = GuidedSampler::new(model.extractor(size).unwrap(), ddim, guidance, References::style(style), start, noise);
    let mut losses = vec![];
    while let Some(progress) = run.advance().unwrap() {
        losses.push(progress.loss().unwrap().unwrap_or(f64::NAN));
    }
    let wanted = expected.get("losses").to_kind(Kind::Double);
    comparison.close("losses", &Tensor::from_slice(&losses).nan_to_num(0.0, None, None), &wanted.nan_to_num(0.0, None, None), 1e-3);
    let levels = (model.decode(&run.latents).unwrap() - expected.get("picture")).abs().mean(Kind::Float).double_value(&[]) * 255.0;
    println!("off by {levels:.4} grey levels on average");
    if levels.is_nan() || levels > 0.1 {
        comparison.fail(format!("off by {levels:.3} grey levels on average, 0.1 are allowed"));
    }
    comparison.finish();
}

#[test]
fn autoencoders_go_along_with_shifts() {
    for (folder, channels) in [("sd15/vae", 4), ("vae_plain", 3), ("../../assets/mini/vae", 8)] {
        for seamless in ALL {
            let vae = vae(folder, seamless);
            let factor = vae.factor();
            let _guard = tch::no_grad_guard();
            follows_shifts(folder, seamless, &random(1, &[1, channels, 5, 6]), (1, factor), &|latents| vae.decode(latents).unwrap());
            // The bundled encoder takes patches that know nothing of one another.
            if folder.contains("mini") {
                continue;
            }
            let pixels = random(2, &[1, 3, 5 * factor, 6 * factor]);
            follows_shifts(folder, seamless, &pixels, (factor, 1), &|pixels| vae.encode(pixels).unwrap());
        }
    }
}

/// The border of the bundled model's pictures is a place like any other.
#[test]
fn the_bundled_unet_goes_along_with_shifts() {
    let _guard = tch::no_grad_guard();
    for seamless in ALL {
        let model = bundled(seamless);
        let condition = model.prompts(&[""], (32, 48)).unwrap();
        follows_shifts("bundled", seamless, &random(1, &[1, 8, 8, 12]), (4, 4), &|latents| {
            model.forward(latents, 501.0, &condition, &mut PlainAttention).unwrap()
        });
    }
}

/// By what the deepest layer sees as one place; with a ControlNet that was taken in before or after.
#[test]
fn the_unet_goes_along_with_shifts() {
    let size = (128, 128);
    let latents = random(1, &[1, 4, 16, 16]);
    let picture = random(2, &[1, 3, 128, 128]).sigmoid();
    let _guard = tch::no_grad_guard();
    for seamless in ALL {
        let model = tiny().with_seamless(seamless);
        let condition = model.prompts(&[""], size).unwrap();
        follows_shifts("unet", seamless, &latents, (8, 8), &|latents| model.forward(latents, 501.0, &condition, &mut PlainAttention).unwrap());
        for late in [false, true] {
            let mut model = tiny();
            let net = || ControlNet::open(fixture("controlnet_sd15"), Device::Cpu, Kind::Float).unwrap();
            if late {
                model.set_seamless(seamless);
                model.add_controlnet(net()).unwrap();
            } else {
                model.add_controlnet(net()).unwrap();
                model.set_seamless(seamless);
            }
            // What the ControlNet adds, of a picture that is shifted along.
            let both =
                Tensor::cat(&[latents.repeat_interleave_self_int(8, 2, None).repeat_interleave_self_int(8, 3, None), picture.shallow_clone()], 1);
            follows_shifts("controlnet", seamless, &both, (64, 8), &|both| {
                let latents = both.narrow(1, 0, 4).slice(2, 0, None, 8).slice(3, 0, None, 8).contiguous();
                let control = model.control(0, &both.narrow(1, 4, 3).contiguous(), size).unwrap();
                let condition = model.prompts(&[""], size).unwrap().with_control(control);
                model.forward(&latents, 501.0, &condition, &mut PlainAttention).unwrap()
            });
        }
    }
}

/// Models side by side do not know of one another, and a setting can be taken back.
#[test]
fn the_setting_is_the_models_own() {
    let (plain, mut other) = (tiny(), tiny().with_seamless(Seamless::Both));
    let latents = random(1, &[1, 4, 6, 7]);
    let pixels = random(2, &[1, 3, 48, 56]).sigmoid();
    let condition = plain.prompts(&[""], (48, 56)).unwrap();
    let all = |model: &StableDiffusion| {
        let predicted = tch::no_grad(|| model.forward(&latents, 501.0, &condition, &mut PlainAttention).unwrap());
        [model.decode(&latents).unwrap(), model.encode(&pixels).unwrap(), predicted]
    };
    let (first, second, again) = (all(&plain), all(&other), all(&plain));
    for ((a, b), c) in first.iter().zip(&second).zip(&again) {
        assert!(a.equal(c) && !a.equal(b));
    }
    assert_eq!((plain.seamless(), other.seamless()), (Seamless::None, Seamless::Both));
    // In tiles and back to the whole.
    other.set_tiling(Tiling::Always(Tiles { size: 4, overlap: 1 })).unwrap();
    assert!(!other.decode(&latents).unwrap().equal(&second[0]));
    other.set_tiling(Tiling::Off).unwrap();
    assert!(other.decode(&latents).unwrap().equal(&second[0]));
    other.set_seamless(Seamless::None);
    all(&other).iter().zip(&first).for_each(|(ours, theirs)| assert!(ours.equal(theirs)));
}

/// How much the last column differs from the first, over how much neighbouring ones do inside on average, at the borders of what the
/// bundled U-Net's deepest layer sees as one place: there they differ most.
fn seam(picture: &Tensor) -> f64 {
    let steps = (picture - picture.roll(-1, 3)).abs().mean_dim(&[0_i64, 1, 2][..], false, Kind::Float).slice(0, DEEPEST - 1, None, DEEPEST);
    let inside = steps.narrow(0, 0, steps.size()[0] - 1);
    steps.double_value(&[-1]) / inside.mean(Kind::Float).double_value(&[])
}

fn seams(picture: &Tensor) -> [f64; 2] {
    [seam(picture), seam(&picture.transpose(2, 3))]
}

/// None where borders meet, and else plain ones, `plain` times the average: or the former would say nothing. Of both axes on average, and
/// roughly of each.
fn check_seams(comparison: &mut Comparison, seamless: Seamless, seams: [f64; 2], plain: f64) {
    let average = (seams[0] + seams[1]) / 2.0;
    let all = |holds: fn(f64) -> bool| seams.iter().all(|&seam| holds(seam));
    if !(if seamless == Seamless::Both { average < 1.3 && all(|seam| seam < 2.0) } else { average > plain && all(|seam| seam > 2.5) }) {
        comparison.fail(format!("{seamless:?}: {seams:.2?} of the average"));
    }
}

/// Where copies of it meet, a texture changes as it does inside; the same texture with borders does not, nor one that is
/// decoded as if it had any. Single lines differ a lot by chance, thus four pictures and both axes together. Measured by five seeds: .84 to
/// 1.15 times the average with borders that meet, 4.4 to 4.9 without, and 1.46 to 1.67 where only the decoder has borders, which is 1.65 to
/// 1.76 times what the same latents show without. Noise of 1e-6 on the start, which is more than another processor's roundings, moves
/// these by .02 at most.
#[test]
fn a_texture_shows_no_seam() {
    let style = image::load(fixture("../../assets/pictures/style_harvest.png")).unwrap();
    let size = (96, 96);
    let style = image::resize(&style, size).unwrap();
    let texture = |seamless: Seamless| {
        let mut model = bundled(seamless);
        let mut noise = Noise::seeded(2);
        let start = model.noise(4, size, &mut noise).unwrap();
        let references = References::style(model.encode(&style).unwrap());
        let guidance = model.guidance(&[""; 4], None, 1.0, size).unwrap();
        let mut run = GuidedSampler::new(model.extractor(size).unwrap(), model.ddim(6).unwrap(), guidance, references, start, noise);
        run.iterations = 2;
        let latents = run.finish().unwrap();
        drop(run);
        let whole = model.decode(&latents).unwrap();
        model.set_tiling(Tiling::Always(Tiles { size: 16, overlap: 8 })).unwrap();
        let tiled = model.decode(&latents).unwrap();
        model.set_seamless(Seamless::None);
        [whole, tiled, model.decode(&latents).unwrap()].map(|picture| seams(&picture))
    };
    let mut comparison = Comparison::default();
    for seamless in [Seamless::None, Seamless::Both] {
        let [whole, tiled, with_borders] = texture(seamless);
        println!("{seamless:?}: seam over inside: whole {whole:.2?}, in tiles {tiled:.2?}, in tiles with borders {with_borders:.2?}");
        check_seams(&mut comparison, seamless, whole, 3.8);
        check_seams(&mut comparison, seamless, tiled, 3.8);
        if seamless == Seamless::Both && with_borders[0] + with_borders[1] < 1.3 * (tiled[0] + tiled[1]) {
            comparison.fail(format!("decoding with borders makes none: {with_borders:.2?} and {tiled:.2?}"));
        }
    }
    comparison.finish();
}

/// The same by optimisation, whose lines differ even more by chance, thus twelve. Measured by five seeds: .98 to 1.21 times the average
/// (by this one 1.02), 6.2 to 7.2 without; noise of 1e-6 moves them by less than .01.
#[test]
fn an_optimised_texture_shows_no_seam() {
    let style = image::load(fixture("../../assets/pictures/style_harvest.png")).unwrap();
    let size = (96, 96);
    let style = image::resize(&style, size).unwrap();
    let mut comparison = Comparison::default();
    for seamless in [Seamless::None, Seamless::Both] {
        let model = bundled(seamless);
        let start = model.noise(12, size, &mut Noise::seeded(2)).unwrap();
        let references = References::style(model.encode(&style).unwrap());
        let mut run = Distiller::new(model.extractor(size).unwrap(), model.timesteps(12).unwrap(), references, start);
        run.iterations = 2;
        let picture = model.decode(&run.finish().unwrap()).unwrap();
        println!("{seamless:?}: {:.2?}", seams(&picture));
        check_seams(&mut comparison, seamless, seams(&picture), 5.5);
    }
    comparison.finish();
}

/// And expanded by windows, none of which is closed: the canvas is. Where copies meet it changes as where windows end inside, on average: single
/// lines differ a lot by chance, thus three pictures. Measured, the one over the other: .8 to 1.02 with borders that meet, 1.9 to 3.3
/// without.
#[test]
fn an_expansion_shows_no_seam() {
    let style = image::load(fixture("../../assets/pictures/style_harvest.png")).unwrap();
    let style = image::resize(&style, (64, 64)).unwrap();
    let size = (128, 96);
    let expanded = |seamless: Seamless, seed: u64| {
        let mut model = bundled(seamless);
        let mut noise = Noise::seeded(seed);
        let start = model.noise(1, size, &mut noise).unwrap();
        let references = References::style(model.encode(&style).unwrap());
        let guidance = model.guidance(&[""], None, 1.0, size).unwrap();
        let run = GuidedSampler::new(model.extractor(size).unwrap(), model.ddim(6).unwrap(), guidance, references, start, noise);
        let mut run = run.with_windows(Windows::new(16, 8));
        run.iterations = 2;
        let latents = run.finish().unwrap();
        drop(run);
        let whole = model.decode(&latents).unwrap();
        model.set_tiling(Tiling::Always(Tiles { size: 16, overlap: 8 })).unwrap();
        [whole, model.decode(&latents).unwrap()]
    };
    let mut comparison = Comparison::default();
    for seamless in [Seamless::None, Seamless::X, Seamless::Both] {
        let pictures: Vec<_> = (2..5).map(|seed| expanded(seamless, seed)).collect();
        for tiled in [0, 1] {
            // Shifted by a stride, a border between views inside is where the picture's borders were.
            let lines = |axis: i64, count: i64, of: fn(metrics::SeamRatio) -> f64| -> f64 {
                let line = |i: i64| pictures.iter().map(|both| of(metrics::seam_ratio(&both[tiled].roll(32 * i, axis)).unwrap())).sum::<f64>();
                line(0) / ((1..count).map(line).sum::<f64>() / (count - 1) as f64)
            };
            let [x, y] = [lines(3, 3, |ratio| ratio.x), lines(2, 4, |ratio| ratio.y)];
            println!("{seamless:?}, {}: x {x:.2}, y {y:.2}", if tiled == 1 { "in tiles" } else { "whole" });
            for (axis, meets, over_inside) in [("x", seamless.x(), x), ("y", seamless.y(), y)] {
                if meets != (over_inside < 1.4) {
                    comparison.fail(format!("{seamless:?}, {axis}: {over_inside:.2}"));
                }
            }
        }
    }
    comparison.finish();
}

/// A seamless model's windows have borders where the canvas is cut, and none where they are as long as it: what a plain model
/// makes around the canvas, a seamless one does.
#[test]
fn windows_of_a_seamless_model_go_around() {
    let size = (64, 128);
    let open = || StableDiffusion::open(fixture("sd15"), Device::Cpu, Kind::Double).unwrap();
    let style = open().encode(&random(3, &[1, 3, 64, 64]).sigmoid()).unwrap();
    let made = |seamless: Seamless, wrap: Seamless, checkpointing: bool| {
        let mut model = open().with_seamless(seamless);
        model.set_gradient_checkpointing(checkpointing);
        let mut noise = Noise::seeded(2);
        let start = model.noise(1, size, &mut noise).unwrap();
        let (guidance, references) = (model.guidance(&[""], Some("no"), 2.0, size).unwrap(), References::style(style.shallow_clone()));
        let run = GuidedSampler::new(model.extractor(size).unwrap(), model.ddim(2).unwrap(), guidance, references, start, noise);
        let latents = run.with_windows(Windows::new(8, 4).with_wrap(wrap)).finish().unwrap();
        assert_eq!(model.seamless(), seamless);
        latents
    };
    let [bordered, ring, closed] = [(Seamless::None, Seamless::None), (Seamless::None, Seamless::X), (Seamless::Y, Seamless::X)]
        .map(|(seamless, wrap)| made(seamless, wrap, false));
    let off = [relative(&ring, &bordered), relative(&closed, &ring)];
    assert!(off.iter().all(|off| *off > BORDERS), "{off:?}");
    for (what, seamless, wrap, checkpointing, wanted) in [
        ("the ring is the model's own", Seamless::X, Seamless::None, false, &ring),
        ("closed along the other axis", Seamless::Both, Seamless::None, false, &closed),
        ("not twice", Seamless::Both, Seamless::Both, false, &closed),
        ("a ring with gradient checkpointing", Seamless::X, Seamless::None, true, &ring),
        ("closed with gradient checkpointing", Seamless::Both, Seamless::None, true, &closed),
    ] {
        // In f64, as in f32 Adam may make steps of roundings: measured 8e-8 with checkpointing, else nothing; other borders make .01 and more.
        let off = relative(&made(seamless, wrap, checkpointing), wanted);
        assert!(off < 1e-6, "{what}: off by {off:.1e}");
    }
    // Around a plain model, windows as long as the canvas begin at two places or more; a seamless model closes them.
    assert!(relative(&made(Seamless::None, Seamless::Both, false), &ring) > BORDERS);
}

/// Within parts of pictures the networks see borders, ControlNets too, and the autoencoder none; afterwards as before.
#[test]
fn parts_have_borders_in_the_networks_alone() {
    let size = (48, 56);
    let (latents, picture) = (random(1, &[1, 4, 6, 7]), random(2, &[1, 3, 48, 56]).sigmoid());
    let open = |seamless: Seamless| {
        let mut model = tiny().with_seamless(Seamless::Both);
        model.add_controlnet(ControlNet::open(fixture("controlnet_sd15"), Device::Cpu, Kind::Float).unwrap()).unwrap();
        // One and the same picture, embedded the same way.
        let condition = model.prompts(&[""], size).unwrap().with_control(model.control(0, &picture, size).unwrap());
        model.set_seamless(seamless);
        (model, condition)
    };
    let predicted =
        |model: &StableDiffusion, condition: &Condition| tch::no_grad(|| model.forward(&latents, 501.0, condition, &mut PlainAttention)).unwrap();
    let whole = ALL.map(|seamless| {
        let (model, condition) = open(seamless);
        predicted(&model, &condition)
    });
    for (meet, expected) in ALL.iter().zip(&whole) {
        let (model, condition) = open(Seamless::Both);
        let decoded = model.decode(&latents).unwrap();
        let mut ran = 0;
        let outcome = model.with_borders(*meet, &mut || {
            ran += 1;
            assert!(predicted(&model, &condition).equal(expected), "{meet:?}");
            assert!(model.decode(&latents).unwrap().equal(&decoded), "the autoencoder's pictures are whole");
            // Nothing is closed that was not.
            model.with_borders(Seamless::Both, &mut || {
                assert!(predicted(&model, &condition).equal(expected), "{meet:?}");
                Err(Error::denoiser("stop"))
            })
        });
        assert!(outcome.is_err() && ran == 1);
        assert!(predicted(&model, &condition).equal(&whole[3]), "{meet:?}: as before");
        // A bare U-Net the same.
        let mut unet = UNet::open(fixture("sd15/unet"), Device::Cpu, Kind::Float).unwrap();
        unet.set_seamless(Seamless::Both);
        let plain = model.prompts(&[""], size).unwrap();
        let of = |unet: &UNet| tch::no_grad(|| unet.forward(&latents, 501.0, &plain, &mut PlainAttention)).unwrap();
        let before = of(&unet);
        assert_eq!(Denoiser::seamless(&unet), Seamless::Both);
        unet.with_borders(*meet, &mut || {
            assert_eq!(of(&unet).equal(&before), *meet == Seamless::Both);
            Ok(())
        })
        .unwrap();
        assert!(of(&unet).equal(&before));
    }
}

/// Two prompts, or two control pictures, are no condition of one picture's views.
#[test]
fn conditions_of_several_pictures_know_it() {
    let mut model = tiny();
    model.add_controlnet(ControlNet::open(fixture("controlnet_sd15"), Device::Cpu, Kind::Float).unwrap()).unwrap();
    let size = (64, 64);
    let one = || model.prompts(&["a"], size).unwrap();
    assert_eq!(model.condition_batch(&one()), 1);
    assert_eq!(model.condition_batch(&model.prompts(&["a", "b"], size).unwrap()), 2);
    let controlled = |batch: i64| one().with_control(model.control(0, &random(2, &[batch, 3, 64, 64]).sigmoid(), size).unwrap());
    assert_eq!([1, 3].map(|batch| model.condition_batch(&controlled(batch))), [1, 3]);
    let ids = one().with_pooled(Tensor::zeros([1, 8], (Kind::Float, Device::Cpu)), Tensor::zeros([2, 6], (Kind::Float, Device::Cpu)));
    assert_eq!(model.unet().condition_batch(&ids), 2);
    let mut noise = Noise::seeded(2);
    let start = model.noise(1, (64, 128), &mut noise).unwrap();
    let guidance = model.guidance(&["a", "b"], None, 2.0, (64, 128)).unwrap();
    let references = References::style(random(3, &[1, 4, 8, 8]));
    let run = GuidedSampler::new(model.extractor((64, 128)).unwrap(), model.ddim(2).unwrap(), guidance, references, start, noise);
    // Two views go together, as many as there are prompts.
    let error = run.with_windows(Windows::new(8, 8)).advance().unwrap_err();
    assert!(matches!(error, Error::Argument { argument: "prompt", .. }), "{error}");
}

/// Tiles wrap around: what is decoded is near the whole also at the borders, and shifts by a tile's distance change nothing.
#[test]
fn tiles_overlap_across_the_borders() {
    for seamless in [Seamless::X, Seamless::Y, Seamless::Both] {
        let vae = vae("sd15/vae", seamless);
        let (tiles, latents) = (Tiles { size: 8, overlap: 4 }, random(1, &[1, 4, 16, 16]));
        let _guard = tch::no_grad_guard();
        // Four tiles at distances of 4, or three that do not go around.
        follows_shifts("decoded in tiles", seamless, &latents, (4, 32), &|latents| vae.decode_tiled(latents, tiles).unwrap());
        let pixels = random(2, &[1, 3, 128, 128]);
        follows_shifts("encoded in tiles", seamless, &pixels, (32, 4), &|pixels| vae.encode_tiled(pixels, tiles).unwrap());
        // One axis is not cut, and its borders meet within each tile.
        let strip = random(3, &[1, 4, 16, 8]);
        follows_shifts("a strip", seamless, &strip, (4, 32), &|latents| vae.decode_tiled(latents, tiles).unwrap());
    }
}

/// The least latents there are.
#[test]
fn a_single_latent_meets_itself() {
    let model = tiny().with_seamless(Seamless::Both);
    for (height, width) in [(1, 1), (1, 5), (3, 1)] {
        let latents = random(1, &[1, 4, height, width]);
        let picture = model.decode(&latents).unwrap();
        assert_eq!(picture.isfinite().all().int64_value(&[]), 1);
        assert_eq!(model.encode(&picture).unwrap().size(), latents.size());
        let condition = model.prompts(&[""], (8, 8)).unwrap();
        assert_eq!(tch::no_grad(|| model.forward(&latents, 1.0, &condition, &mut PlainAttention)).unwrap().size(), latents.size());
    }
}
