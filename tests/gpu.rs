//! What a GPU computes is what the CPU computes. Where there is no GPU these tests say so and pass.
#![cfg(feature = "stable-diffusion")]
#![allow(clippy::disallowed_methods, clippy::unwrap_used, missing_docs)]

use attention_distillation::stable_diffusion::{AutoencoderKl, ControlNet, DecoderTuning, TuningConfig};
use attention_distillation::{
    device, image, AdLoss, ContentLoss, Distiller, Error, GuidedSampler, LabelMap, Noise, Qkv, References, Settings, StableDiffusion, Style,
    TotalLoss,
};
use std::{io::Write, path::PathBuf};
use tch::{Device, Kind, Tensor};

fn gpu(test: &str) -> Option<Device> {
    tch::set_num_threads(1);
    match device::parse("cuda") {
        Ok(device) => Some(device),
        Err(reason) => {
            // Not by `eprintln!`, which is shown for failed tests only.
            std::io::stderr().write_all(format!("skipped: {test} needs a GPU: {reason}\n").as_bytes()).unwrap();
            None
        }
    }
}

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn pictures(side: i64) -> (Tensor, Tensor) {
    let load = |name: &str| image::resize(&image::load(folder("assets/pictures").join(name)).unwrap(), (side, side)).unwrap();
    (load("content_astronaut.png"), load("style_harvest.png"))
}

fn relative(ours: &Tensor, theirs: &Tensor) -> f64 {
    let (ours, theirs) = (ours.to_device(Device::Cpu).to_kind(Kind::Double), theirs.to_device(Device::Cpu).to_kind(Kind::Double));
    (&ours - &theirs).norm().double_value(&[]) / theirs.norm().double_value(&[])
}

/// Folders besides those of the repository, such as networks of full size by `tools/reference/full_size_model.py`:
/// `ATTENTION_DISTILLATION_MODELS=models/sd15:models/sdxl`. Relative ones are the repository's.
fn models(own: &[&str]) -> Vec<String> {
    let given = std::env::var_os("ATTENTION_DISTILLATION_MODELS").unwrap_or_default();
    let given = std::env::split_paths(&given).filter(|path| !path.as_os_str().is_empty()).map(|path| path.to_str().unwrap().to_owned());
    own.iter().map(|&name| name.to_owned()).chain(given).collect()
}

/// Loss and gradient of one step of a transfer, with latents from the CPU.
fn gradient(name: &str, device: Device, kind: Kind, smoothing: f64) -> (Tensor, Tensor) {
    let (content, style) = pictures(64);
    // Closed at once: two of SDXL's size are more than many a machine holds.
    let cpu = StableDiffusion::open(folder(name), Device::Cpu, Kind::Float).unwrap();
    let [content, style] = [content, style].map(|picture| cpu.encode(&picture).unwrap().to_device(device));
    drop(cpu);
    let model = StableDiffusion::open(folder(name), device, kind).unwrap();
    let extractor = model.extractor((64, 64)).unwrap();
    let references = References::style(style.shallow_clone()).with_content(content.shallow_clone()).with_smoothing(smoothing);
    let references = extractor.references(&references, 501.0).unwrap();
    let loss = TotalLoss::default().plus(1.0, AdLoss::default()).plus(0.25, ContentLoss);
    // Between the two, so that neither loss is at its kink.
    let latents = content.lerp(&style, 0.3);
    extractor.gradient(&latents, 501.0, &references, &loss).unwrap()
}

/// TF32 and other orders of summation cost 1e-3 in f32; bf16 has 8 bits, f16 11, and the gradient of a mean absolute
/// difference is a sum of signs, which flip where the two sides are nearly equal.
#[test]
fn gradients_agree_with_the_cpu() {
    let Some(device) = gpu("gradients_agree_with_the_cpu") else { return };
    for (name, smoothing) in models(&["tests/fixtures/sd15", "assets/mini"]).iter().flat_map(|name| [(name, 0.0), (name, 0.4)]) {
        let (loss, wanted) = gradient(name, Device::Cpu, Kind::Float, smoothing);
        for (kind, of_loss, of_gradient) in [(Kind::Float, 1e-3, 2e-2), (Kind::Half, 1e-2, 0.1), (Kind::BFloat16, 3e-2, 0.4)] {
            let (ours, found) = gradient(name, device, kind, smoothing);
            let (loss, gradient) = (relative(&ours, &loss), relative(&found, &wanted));
            println!("{name} {kind:?}, smoothing {smoothing}: loss {loss:.1e}, gradient {gradient:.1e}");
            assert!(loss < of_loss && gradient < of_gradient, "{name} {kind:?}, smoothing {smoothing}: loss {loss}, gradient {gradient}");
        }
    }
}

/// Where the gradient of an output is laid out otherwise than the output: on H100 and H200 cuDNN's kernels, which libtorch 2.11 prefers,
/// then give gradients that have nothing to do with the right ones.
#[test]
fn attention_has_the_right_gradients_in_any_layout() {
    let Some(device) = gpu("attention_has_the_right_gradients_in_any_layout") else { return };
    let numbers = |pitch: f64| (Tensor::arange(64 * 2 * 40, (Kind::Double, Device::Cpu)).square() * pitch).sin();
    let gradients = |device: Device, kind: Kind| {
        let inputs = [0.013, 0.017, 0.019].map(|pitch| numbers(pitch).view([1, 64, 2, 40]).to_device(device).to_kind(kind).set_requires_grad(true));
        let [q, k, v] = inputs.each_ref().map(|x| x.transpose(1, 2));
        let output = Qkv::new(q, k, v).attend().unwrap();
        // A sum over a product with something contiguous has a contiguous gradient; the output is a transposed view.
        let weights = numbers(0.023).view([1, 2, 64, 40]).to_device(device).to_kind(kind);
        Tensor::run_backward(&[output.contiguous().view([-1]).dot(&weights.view([-1]))], &inputs, false, false)
    };
    let wanted = gradients(Device::Cpu, Kind::Double);
    for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
        for (ours, theirs) in gradients(device, kind).iter().zip(&wanted) {
            let found = relative(ours, theirs);
            assert!(found < 0.03, "{kind:?}: {found}");
        }
    }
}

/// libtorch's kernel counts the numbers of a mask modulo 2^32, and gives the rows behind those the mask's first ones.
#[test]
fn masks_of_more_scores_than_libtorch_counts() {
    let Some(device) = gpu("masks_of_more_scores_than_libtorch_counts") else { return };
    let (queries, keys) = (66_000, 65_600);
    let attend = || -> Result<[f64; 2], Error> {
        let none = |tokens: i64| Tensor::f_zeros([1, 1, tokens, 8], (Kind::BFloat16, device));
        let value = Tensor::f_cat(&[none(keys / 2)?, none(keys / 2)?.f_ones_like()?], 2)?;
        // The upper half of the queries sees the second half of the keys, whose values are 1; the lower one the first.
        let mask = Tensor::f_zeros([1, 1, queries, keys], (Kind::BFloat16, device))?;
        for (row, column) in [(0, 0), (queries / 2, keys / 2)] {
            let _ = mask.f_narrow(2, row, queries / 2)?.f_narrow(3, column, keys / 2)?.f_fill_(-1e4)?;
        }
        let mut qkv = Qkv::new(none(queries)?, none(keys)?, value);
        qkv.mask = Some(mask);
        let output = qkv.attend()?.f_to_kind(Kind::Float)?;
        let half = |start: i64| output.f_narrow(2, start, queries / 2);
        Ok([half(0)?.f_min()?.f_double_value(&[])?, half(queries / 2)?.f_max()?.f_double_value(&[])?])
    };
    match attend() {
        Ok([upper, lower]) => assert!(upper > 0.99 && lower < 0.01, "{upper} and {lower}"),
        Err(error) if error.is_out_of_memory() => {
            std::io::stderr().write_all(format!("skipped: it takes some 20 GB: {error}\n").as_bytes()).unwrap();
        }
        Err(error) => panic!("{error}"),
    }
}

/// Maps that stay on the CPU, and a weight: loss, gradient and AdaIN.
#[test]
fn regions_agree_with_the_cpu() {
    let Some(gpu) = gpu("regions_agree_with_the_cpu") else { return };
    let (content, style) = pictures(64);
    let stripes = |values: [i64; 3]| Tensor::from_slice(&values).view([1, 1, 1, 3]).expand([1, 1, 4, 3], false);
    let hard = |values| LabelMap::new(&stripes(values)).unwrap();
    let soft =
        |values| LabelMap::soft(&(stripes(values).eq_tensor(&Tensor::from_slice(&[0_i64, 1]).view([1, 2, 1, 1]))).to_kind(Kind::Float)).unwrap();
    for soft_target in [false, true] {
        let both = |device: Device| {
            let model = StableDiffusion::open(folder("assets/mini"), device, Kind::Float).unwrap();
            let cpu = StableDiffusion::open(folder("assets/mini"), Device::Cpu, Kind::Float).unwrap();
            let [content, style] = [&content, &style].map(|picture| cpu.encode(picture).unwrap().to_device(device));
            let target = if soft_target { soft([0, 1, 1]) } else { hard([0, 1, 1]) };
            let styles = [Style::new(style.shallow_clone()).with_labels(hard([1, 1, 0])), Style::new(content.shallow_clone()).with_weight(0.25)];
            let references = References::styles(styles).with_labels(target);
            let extractor = model.extractor((64, 64)).unwrap();
            let latents = content.lerp(&style, 0.3);
            let features = extractor.references(&references, 501.0).unwrap();
            let first = extractor.gradient(&latents, 501.0, &features, &AdLoss::default()).unwrap();
            // What was kept from the first time.
            let again = extractor.gradient(&latents, 501.0, &features, &AdLoss::default()).unwrap();
            assert!(relative(&again.0, &first.0) < 1e-5);
            (first, references.adain(&latents).unwrap())
        };
        let (((loss, gradient), moved), ((wanted_loss, wanted_gradient), wanted_moved)) = (both(gpu), both(Device::Cpu));
        assert!(relative(&loss, &wanted_loss) < 1e-3 && relative(&gradient, &wanted_gradient) < 2e-2, "soft: {soft_target}");
        assert!(relative(&moved, &wanted_moved) < 1e-5, "soft: {soft_target}");
    }
}

/// The layers hold the very tensors that are tuned.
#[test]
fn a_decoder_is_tuned_as_on_the_cpu() {
    let Some(device) = gpu("a_decoder_is_tuned_as_on_the_cpu") else { return };
    let (picture, _) = pictures(64);
    let tuned = |device: Device| {
        let vae = AutoencoderKl::open(folder("assets/mini/vae"), device, Kind::Float).unwrap();
        let mut config = TuningConfig::default();
        config.epochs = 8;
        let mut tuning = DecoderTuning::new(vae, &picture.to_device(device), config).unwrap();
        let before = tuning.psnr().unwrap();
        tuning.finish().unwrap();
        let saved = tempfile::tempdir().unwrap();
        tuning.vae().save(saved.path()).unwrap();
        let again = AutoencoderKl::open(saved.path(), device, Kind::Float).unwrap();
        let latents = Tensor::linspace(-1, 1, 8 * 16 * 16, (Kind::Float, Device::Cpu)).view([1, 8, 16, 16]).to_device(device);
        assert!(relative(&again.decode(&latents).unwrap(), &tuning.vae().decode(&latents).unwrap()) < 1e-4);
        (before, tuning.psnr().unwrap())
    };
    let ((before, after), (wanted_before, wanted_after)) = (tuned(device), tuned(Device::Cpu));
    println!("{before} to {after} dB, on the CPU {wanted_before} to {wanted_after}");
    assert!(after > before && (before - wanted_before).abs() < 0.05 && (after - wanted_after).abs() < 0.1);
}

/// Half precisions on the CPU, where every machine can look: the same bounds as above.
#[test]
fn half_precisions_agree_with_f32_on_the_cpu() {
    tch::set_num_threads(1);
    // The first backward pass of a process decides which devices there are; the other tests' is one of them.
    let _ = device::best();
    for name in models(&["tests/fixtures/sd15"]) {
        let (loss, wanted) = gradient(&name, Device::Cpu, Kind::Float, 0.0);
        for (kind, of_loss, of_gradient) in [(Kind::Half, 1e-2, 0.1), (Kind::BFloat16, 3e-2, 0.4)] {
            let (ours, found) = gradient(&name, Device::Cpu, kind, 0.0);
            let (loss, gradient) = (relative(&ours, &loss), relative(&found, &wanted));
            println!("{name}, CPU {kind:?}: loss {loss:.1e}, gradient {gradient:.1e}");
            assert!(loss < of_loss && gradient < of_gradient, "{name} {kind:?}: loss {loss}, gradient {gradient}");
            assert_eq!(found.kind(), Kind::Float);
        }
    }
}

#[test]
fn a_run_ends_in_the_same_picture() {
    let Some(device) = gpu("a_run_ends_in_the_same_picture") else { return };
    let (content, style) = pictures(64);
    let picture = |device: Device| {
        let model = StableDiffusion::open(folder("assets/mini"), device, Kind::Float).unwrap();
        let references = References::style(model.encode(&style).unwrap()).with_content(model.encode(&content).unwrap());
        let mut run = Distiller::style_transfer(model.extractor((64, 64)).unwrap(), model.timesteps(8).unwrap(), references, 0.2).unwrap();
        model.decode(&run.finish().unwrap()).unwrap().to_device(Device::Cpu)
    };
    let levels = (picture(device) - picture(Device::Cpu)).abs().mean(Kind::Float).double_value(&[]) * 255.0;
    // Adam turns rounding into steps where gradients are near 0: two CPU runs on one and two threads differ by 0.6.
    assert!(levels < 4.0, "{levels} grey levels on average");
}

/// Prompt, negative, control and style, from noise: the same numbers on both, for a seed draws them on the CPU.
#[test]
fn a_guided_sampling_ends_in_the_same_picture() {
    let Some(device) = gpu("a_guided_sampling_ends_in_the_same_picture") else { return };
    let (content, style) = pictures(64);
    for (name, control) in [("sd15", "controlnet_sd15"), ("sdxl", "controlnet_sdxl")] {
        let picture = |device: Device, seed: u64| {
            let fixture = |name: &str| folder("tests/fixtures").join(name);
            let mut model = StableDiffusion::open(fixture(name), device, Kind::Float).unwrap();
            let net = model.add_controlnet(ControlNet::open(fixture(control), device, Kind::Float).unwrap()).unwrap();
            let edges = image::canny(&content, image::CANNY_LOW, image::CANNY_HIGH).unwrap();
            let control = model.control(net, &edges, (64, 64)).unwrap();
            let mut guidance = model.guidance(&["a house by the sea"], Some("a red square"), 3.0, (64, 64)).unwrap();
            guidance = guidance.with_control(&control);
            model.drop_text_encoders().unwrap();
            let references = References::style(model.encode(&style).unwrap()).with_content(model.encode(&content).unwrap());
            let mut noise = Noise::seeded(seed);
            let start = model.noise(1, (64, 64), &mut noise).unwrap();
            let run = GuidedSampler::new(model.extractor((64, 64)).unwrap(), model.ddim(5).unwrap(), guidance, references, start, noise);
            let mut run = run.with_settings(&Settings::text_to_image()).unwrap();
            model.decode(&run.finish().unwrap()).unwrap().to_device(Device::Cpu)
        };
        let levels = |a: &Tensor, b: &Tensor| (a - b).abs().mean(Kind::Float).double_value(&[]) * 255.0;
        let (ours, wanted) = (picture(device, 1), picture(Device::Cpu, 1));
        let (found, other) = (levels(&ours, &wanted), levels(&picture(Device::Cpu, 2), &wanted));
        println!("{name}: {found} grey levels on average, {other} to another seed's");
        // Roundings as above, and TF32's: noise of 1e-4 on the start costs 1 grey level (SD 1.5) and 2.6 (SDXL). Another seed's
        // picture shows what another picture is.
        assert!(found < 6.0 && found < other / 4.0, "{name}: {found} grey levels on average, {other} to another seed's picture");
    }
}

/// On a GPU the answer waits until the last step; the run then stands before the step at fault.
#[test]
fn not_a_number_is_told_at_the_end() {
    let Some(device) = gpu("not_a_number_is_told_at_the_end") else { return };
    let (content, style) = pictures(64);
    let model = StableDiffusion::open(folder("assets/mini"), device, Kind::Float).unwrap();
    let references = References::style(model.encode(&style).unwrap()).with_content(model.encode(&content).unwrap());
    let mut run = Distiller::style_transfer(model.extractor((64, 64)).unwrap(), model.timesteps(5).unwrap(), references, 0.2).unwrap();
    run.advance().unwrap();
    run.advance().unwrap();
    run.references.styles[0].of = run.references.styles[0].of.zeros_like() / 0.0;
    // The third step and the fourth say nothing, which would make the GPU wait.
    for step in [3, 4] {
        assert_eq!(run.advance().unwrap().unwrap().step, step);
    }
    let error = run.advance().unwrap_err();
    assert!(matches!(error, Error::NotFinite { what: "loss or latents", step: 3, .. }), "{error}");
    assert_eq!(run.step, 2);
    assert!(bool::try_from(run.latents.isfinite().all()).unwrap());
}
