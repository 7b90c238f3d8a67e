//! Tuning a decoder to a picture: the numbers of `tools/reference`, what it keeps, what it writes, what it refuses.
#![cfg(feature = "stable-diffusion")]
#![allow(clippy::disallowed_methods, clippy::unwrap_used, missing_docs)] // A test may panic.

mod common;
mod example;
mod model_copy;

use attention_distillation::stable_diffusion::{AutoencoderKl, DecoderTuning, Seamless, TuningConfig};
use attention_distillation::{image, Error, Noise, Result, StableDiffusion};
use common::{fixture, Comparison, Expected, ACTIVATIONS};
use example::{differ, finished, texts, Place};
use model_copy::{ModelCopy, Safetensors};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use tch::{Device, Kind, Tensor};

fn open(folder: impl AsRef<Path>) -> AutoencoderKl {
    tch::set_num_threads(1);
    AutoencoderKl::open(folder, Device::Cpu, Kind::Float).unwrap()
}

fn tiny() -> AutoencoderKl {
    open(fixture("sd15/vae"))
}

fn random(seed: u64, shape: &[i64]) -> Tensor {
    Noise::seeded(seed).draw(&Tensor::zeros(shape, (Kind::Float, Device::Cpu))).unwrap()
}

fn picture() -> Tensor {
    random(5, &[1, 3, 32, 40]).sigmoid()
}

fn epochs(epochs: usize) -> TuningConfig {
    let mut config = TuningConfig::default();
    config.epochs = epochs;
    config
}

fn rate(rate: f64) -> TuningConfig {
    tuned_at(rate, 3)
}

fn tuned_at(rate: f64, count: usize) -> TuningConfig {
    let mut config = epochs(count);
    config.learning_rate = rate;
    config
}

fn decoded(vae: &AutoencoderKl) -> Tensor {
    vae.decode(&random(6, &[1, 4, 3, 5])).unwrap()
}

/// All files with their bytes.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap_or_default())).collect()
}

fn weights(folder: &Path) -> BTreeMap<String, Tensor> {
    Tensor::read_safetensors(folder.join("diffusion_pytorch_model.safetensors")).unwrap().into_iter().collect()
}

/// The weights themselves, of a decoder whose pictures may no longer be numbers.
fn learnt(vae: &AutoencoderKl) -> BTreeMap<String, Tensor> {
    let folder = tempfile::tempdir().unwrap();
    vae.save(folder.path()).unwrap();
    weights(folder.path())
}

#[track_caller]
fn refused<T>(outcome: Result<T>, words: &[&str]) -> Error {
    let Err(error) = outcome else { panic!("was taken") };
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "does not name `{word}`: {message}");
    }
    error
}

#[test]
fn like_torch() {
    let expected = Expected::read("vae_tuning");
    let mut comparison = Comparison::default();
    let mut vae = tiny();
    let mut tuning = DecoderTuning::new(&mut vae, expected.get("picture"), epochs(5)).unwrap();
    let mut losses = vec![];
    while let Some(progress) = tuning.advance().unwrap() {
        losses.push(progress.loss);
    }
    comparison.close("losses", &Tensor::from_slice(&losses), &expected.get("losses").to_kind(Kind::Double), 1e-4);
    comparison.close("decoded", &vae.decode(expected.get("latents")).unwrap(), expected.get("decoded"), ACTIVATIONS);
    let folder = tempfile::tempdir().unwrap();
    vae.save(folder.path()).unwrap();
    comparison.close("weight", &weights(folder.path())["decoder.conv_out.weight"], expected.get("weight"), ACTIVATIONS);
    comparison.finish();
}

/// A real picture and the bundled model, in a few epochs.
#[test]
fn a_picture_becomes_clearer() {
    let vae = open(fixture("../../assets/mini/vae"));
    let picture = image::load(fixture("../../assets/pictures/style_harvest.png")).unwrap();
    let picture = image::resize(&picture, (128, 128)).unwrap();
    let mut config = epochs(12);
    config.learning_rate = 2e-4;
    let mut tuning = DecoderTuning::new(vae, &picture, config).unwrap();
    let before = tuning.psnr().unwrap();
    let first = tuning.advance().unwrap().unwrap();
    assert_eq!((first.epoch, first.epochs, tuning.epoch()), (1, 12, 1));
    assert!((first.psnr - before).abs() < 1e-4, "an epoch tells what was before it");
    tuning.finish().unwrap();
    assert!(tuning.advance().unwrap().is_none());
    let after = tuning.psnr().unwrap();
    println!("{before:.2} dB before, {after:.2} dB after");
    assert!(after > before + 0.3, "{before} {after}");
    let shown = tuning.decoded().unwrap();
    let error = (shown - picture).square().mean(Kind::Float).double_value(&[]);
    assert!((after + 10.0 * error.log10()).abs() < 1e-3);
}

/// Its attention has one place, where queries and keys have gradients of 0.
#[test]
fn a_picture_of_one_latent() {
    let mut tuning = DecoderTuning::new(tiny(), &picture().narrow(2, 0, 8).narrow(3, 0, 8), epochs(2)).unwrap();
    tuning.finish().unwrap();
    assert_eq!(tuning.epoch(), 2);
}

/// The decoder alone moves, and nothing of it requires a gradient afterwards.
#[test]
fn only_the_decoder_learns() {
    let (mut vae, original) = (tiny(), tiny());
    let folder = tempfile::tempdir().unwrap();
    let mut tuning = DecoderTuning::new(&mut vae, &picture(), epochs(2)).unwrap();
    tuning.finish().unwrap();
    assert!(!decoded(tuning.vae()).requires_grad());
    assert!(!decoded(&vae).equal(&decoded(&original)));
    assert!(vae.encode(&(picture() * 2.0 - 1.0)).unwrap().equal(&original.encode(&(picture() * 2.0 - 1.0)).unwrap()));
    vae.save(folder.path()).unwrap();
    let (tuned, original) = (weights(folder.path()), weights(&fixture("sd15/vae")));
    assert_eq!(tuned.keys().collect::<Vec<_>>(), original.keys().collect::<Vec<_>>());
    for (name, tensor) in &tuned {
        assert_eq!(!tensor.equal(&original[name]), name.starts_with("decoder."), "{name}");
    }
}

/// Stopped after some epochs it is as far as a shorter tuning comes; nobody else's decoder has moved.
#[test]
fn stopped_tunings_keep_what_they_have() {
    let (mut stopped, mut short, untouched) = (tiny(), tiny(), decoded(&tiny()));
    let other = tiny();
    let mut tuning = DecoderTuning::new(&mut stopped, &picture(), epochs(50)).unwrap();
    assert!(decoded(tuning.vae()).equal(&untouched));
    for _ in 0..2 {
        tuning.advance().unwrap().unwrap();
    }
    drop(tuning);
    DecoderTuning::new(&mut short, &picture(), epochs(2)).unwrap().finish().unwrap();
    // Two runs of the same work, the same but for roundings (none measured); of what two epochs move, .2, one more makes a third.
    let (off, moved) = (differ(&decoded(&stopped), &decoded(&short)), differ(&decoded(&stopped), &untouched));
    assert!(off < 0.1 * moved, "{off} of {moved}");
    assert!(decoded(&other).equal(&untouched));
}

#[test]
fn an_epoch_that_fails_changes_nothing() {
    let before = decoded(&tiny());
    // Beyond f32, weights become infinite at once.
    let mut tuning = DecoderTuning::new(tiny(), &picture(), rate(1e300)).unwrap();
    for _ in 0..2 {
        let error = refused(tuning.advance(), &["the decoder became infinite or NaN in step 1;", "lower learning rate"]);
        assert!(matches!(error, Error::NotFinite { what: "decoder", step: 1, .. }));
        assert_eq!(tuning.epoch(), 0);
        assert!(decoded(tuning.vae()).equal(&before) && !decoded(tuning.vae()).requires_grad());
    }
    // A picture that is no number.
    let mut tuning = DecoderTuning::new(tiny(), &(picture() * f64::NAN), epochs(1)).unwrap();
    assert!(matches!(tuning.advance(), Err(Error::NotFinite { what: "loss", step: 1, .. })));
    assert!(decoded(tuning.vae()).equal(&before));
}

/// A learning rate with which this picture's loss is finite for more than two epochs, and then no more. How many those are is as
/// roundings want, which such a rate magnifies: another run may well end elsewhere.
fn too_high(picture: &Tensor) -> f64 {
    let fails_late = |lr: &f64| {
        let mut tuning = DecoderTuning::new(tiny(), picture, tuned_at(*lr, EPOCHS)).unwrap();
        let mut losses = 0;
        loop {
            match tuning.advance() {
                Ok(Some(_)) => losses += 1,
                Ok(None) => return false,
                Err(error) => {
                    assert!(matches!(error, Error::NotFinite { step, .. } if step == losses + 1), "{error}");
                    println!("{lr:e}: {losses} losses");
                    return losses > 3;
                }
            }
        }
    };
    (0..48).map(|i| 2e3 / 1.25_f64.powi(i)).find(fails_late).unwrap()
}

/// Of a tuning by such a rate. The program tells of each of so many.
const EPOCHS: usize = 19;

/// Too large a step, of which the next epoch learns: the decoder is not left with it.
#[test]
fn an_epoch_that_leads_to_no_number_is_taken_back() {
    let before = decoded(&tiny());
    let mut tuning = DecoderTuning::new(tiny(), &picture(), rate(1e20)).unwrap();
    for _ in 0..2 {
        tuning.advance().unwrap();
        assert_eq!(tuning.epoch(), 1);
        assert!(matches!(tuning.advance(), Err(Error::NotFinite { what: "loss", step: 2, .. })));
        assert_eq!(tuning.epoch(), 0);
        assert!(decoded(tuning.vae()).equal(&before) && !decoded(tuning.vae()).requires_grad());
    }
    // Where no further epoch would tell.
    let mut tuning = DecoderTuning::new(tiny(), &picture(), tuned_at(1e20, 1)).unwrap();
    assert!(matches!(tuning.finish(), Err(Error::NotFinite { what: "loss", step: 1, .. })));
    assert!(tuning.epoch() == 0 && decoded(tuning.vae()).equal(&before));
    // Later, after epochs that are worth keeping: told by the next one, or by who asks after each.
    let lr = too_high(&picture());
    for asks in [false, true] {
        let mut tuning = DecoderTuning::new(tiny(), &picture(), tuned_at(lr, EPOCHS)).unwrap();
        let mut after = vec![learnt(tuning.vae())];
        let error = loop {
            match tuning.advance() {
                Ok(progress) => assert_eq!(progress.unwrap().epoch, after.len()),
                Err(error) => break error,
            }
            after.push(learnt(tuning.vae()));
            match if asks { tuning.check() } else { Ok(()) } {
                Ok(()) => {}
                Err(error) => break error,
            }
        };
        let last = after.len() - 1;
        let told_in = if asks { last } else { last + 1 };
        assert!(matches!(error, Error::NotFinite { what: "loss", step, .. } if step == told_in), "{error} after {last} epochs");
        assert!(last > 1 && tuning.epoch() == last - 1, "{} epochs of {last}", tuning.epoch());
        tuning.check().unwrap();
        let found = learnt(tuning.vae());
        assert!(found == after[last - 1] && found != after[last - 2] && found != after[last]);
    }
}

#[test]
fn what_is_refused() {
    for shape in [vec![1, 3, 32, 36], vec![1, 1, 32, 32], vec![3, 32, 32], vec![1, 3, 0, 32], vec![0, 3, 32, 32]] {
        let picture = Tensor::zeros(&shape, (Kind::Float, Device::Cpu));
        assert!(matches!(DecoderTuning::new(tiny(), &picture, epochs(1)), Err(Error::Shape { name: "picture", .. })), "{shape:?}");
    }
    refused(DecoderTuning::new(tiny(), &picture(), epochs(0)), &["epochs", "at least 1"]);
    for bad in [f64::NAN, f64::INFINITY, -1e-4] {
        refused(DecoderTuning::new(tiny(), &picture(), rate(bad)), &["learning rate"]);
    }
    // Other kinds lose small steps.
    let copy = ModelCopy::new();
    copy.set("vae/config.json", "force_upcast", json!(false));
    let half = AutoencoderKl::open(copy.path("vae"), Device::Cpu, Kind::BFloat16).unwrap();
    refused(DecoderTuning::new(half, &picture(), epochs(1)), &["BFloat16", "Kind::Float"]);
}

/// What is written opens to the same numbers; the folder that it came from is as it was.
#[test]
fn saved_and_opened() {
    for (model, old_names) in [("sd15/vae", false), ("vae_old_names", true), ("vae_plain", false)] {
        let before = files(&fixture(model));
        let mut vae = open(fixture(model));
        let factor = vae.factor();
        let picture = random(5, &[1, 3, 4 * factor, 5 * factor]).sigmoid();
        DecoderTuning::new(&mut vae, &picture, epochs(1)).unwrap().finish().unwrap();
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("tuned");
        vae.save(&folder).unwrap();
        assert_eq!(files(place.path()).len(), 1, "nothing else is left");
        assert_eq!(files(&folder).keys().collect::<Vec<_>>(), ["config.json", "diffusion_pytorch_model.safetensors"]);
        assert_eq!(files(&fixture(model)), before);
        let again = open(&folder);
        let latents = random(6, &[1, vae.latent_channels(), 3, 5]);
        assert!(again.decode(&latents).unwrap().equal(&vae.decode(&latents).unwrap()), "{model}");
        assert!(again.encode(&picture).unwrap().equal(&vae.encode(&picture).unwrap()), "{model}");
        assert_eq!(weights(&folder).keys().any(|name| name.ends_with("proj_attn.weight")), old_names);
        let json = |folder: &Path| serde_json::from_slice::<serde_json::Value>(&fs::read(folder.join("config.json")).unwrap()).unwrap();
        assert_eq!(json(&folder), json(&fixture(model)));
        // Over itself.
        again.save(&folder).unwrap();
        assert!(open(&folder).decode(&latents).unwrap().equal(&vae.decode(&latents).unwrap()), "{model}");
        assert_eq!(files(&folder).len(), 2);
    }
}

/// As diffusers wrote the fixtures: names, shapes and the mark of the format, with f32 for what was computed in it.
#[test]
fn names_and_shapes_are_those_of_diffusers() {
    for model in ["sd15/vae", "vae_old_names", "vae_plain"] {
        let place = tempfile::tempdir().unwrap();
        open(fixture(model)).save(place.path()).unwrap();
        let header = |folder: &Path| Safetensors::parse(&fs::read(folder.join("diffusion_pytorch_model.safetensors")).unwrap()).header;
        let (saved, original) = (header(place.path()), header(&fixture(model)));
        assert_eq!(saved.keys().collect::<BTreeSet<_>>(), original.keys().collect(), "{model}");
        for (name, tensor) in saved.iter().filter(|(name, _)| *name != "__metadata__") {
            assert_eq!((&tensor["shape"], &tensor["dtype"]), (&original[name]["shape"], &json!("F32")), "{model}: {name}");
        }
        assert_eq!(saved["__metadata__"], json!({ "format": "pt" }), "{model}");
    }
}

#[test]
fn folders_that_are_not_written() {
    let vae = tiny();
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name);
    fs::write(path("file"), "text").unwrap();
    refused(vae.save(path("file")), &["is a file", "file"]);
    refused(vae.save(path("missing/tuned")), &["missing does not exist"]);
    refused(vae.save(""), &["names no folder"]);
    // Nobody may write there, whatever its permissions say.
    #[cfg(target_os = "linux")]
    for folder in ["/proc/tuned", "/proc/self"] {
        assert!(matches!(AutoencoderKl::check_writable(folder), Err(Error::Io { .. })), "{folder}");
        refused(vae.save(folder), &[folder]);
    }
    let copy = ModelCopy::new();
    let before = files(&copy.path("unet"));
    refused(vae.save(copy.path("unet")), &["UNet2DConditionModel", "another folder"]);
    assert_eq!(files(&copy.path("unet")), before);
    fs::create_dir(path("weights")).unwrap();
    fs::write(path("weights/diffusion_pytorch_model.safetensors"), "").unwrap();
    refused(vae.save(path("weights")), &["config.json"]);
    for name in ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors.index.json"] {
        copy.write(&format!("vae/{name}"), "");
        refused(vae.save(copy.path("vae")), &[name]);
        copy.remove(&format!("vae/{name}"));
    }
    // An autoencoder's own folder, and one with something else in it.
    vae.save(copy.path("vae")).unwrap();
    fs::create_dir(path("notes")).unwrap();
    fs::write(path("notes/notes.txt"), "text").unwrap();
    vae.save(path("notes")).unwrap();
    assert_eq!(files(&path("notes")).len(), 3);
    assert_eq!(files(place.path()).keys().collect::<Vec<_>>(), ["file", "notes", "weights"]);
}

#[test]
fn a_model_takes_it_in() {
    let mut model = StableDiffusion::open(fixture("sd15"), Device::Cpu, Kind::Float).unwrap().with_seamless(Seamless::Both);
    let latents = random(6, &[1, 4, 3, 5]);
    let before = model.decode(&latents).unwrap();
    model.set_vae(tiny()).unwrap();
    assert!(model.decode(&latents).unwrap().equal(&before), "seamless as the model is");
    let mut tuning = DecoderTuning::new(tiny(), &picture(), epochs(2)).unwrap();
    tuning.finish().unwrap();
    model.set_vae(tuning.into_inner()).unwrap();
    let after = model.decode(&latents).unwrap();
    assert!(!after.equal(&before));
    refused(model.set_vae(open(fixture("vae_plain"))), &["config.json", "factor 2", "factor 8"]);
    assert!(model.decode(&latents).unwrap().equal(&after), "as it was");
}

// ---- the example program

fn place() -> Place {
    Place::of("finetune_vae")
}

const QUICK: [&str; 6] = ["--image", "style.png", "--epochs", "2", "--device", "cpu"];

#[test]
fn the_program_writes_a_folder_for_the_others() {
    let place = place();
    let outcome = place.run(&[&QUICK[..], &["--lr", "1e-3", "--output", "tuned", "--sheet", "sheet.png"]].concat());
    finished(&outcome, "tuned");
    let (stdout, stderr) = texts(&outcome);
    assert!(stdout.starts_with("PSNR ") && stdout.lines().count() == 2, "{stdout}");
    assert!(stderr.lines().any(|line| line.starts_with("epoch 2/2 loss ")), "{stderr}");
    assert_eq!(example::size(&image::load(place.path("sheet.png")).unwrap()), (32, 3 * 64 + 2 * 8));
    drop(open(place.path("tuned")));

    let transfer = Place::of("style_transfer");
    let flags = ["--content", "content.png", "--style", "style.png", "--steps", "1"];
    let plain = transfer.draw(&flags, "plain.png");
    let own = fixture("sd15/vae");
    let same = transfer.draw(&[&flags[..], &["--vae", own.to_str().unwrap()]].concat(), "same.png");
    let tuned = place.path("tuned");
    let tuned = transfer.draw(&[&flags[..], &["--vae", tuned.to_str().unwrap()]].concat(), "tuned.png");
    assert_eq!(differ(&plain, &same), 0.0);
    assert!(differ(&plain, &tuned) > 0.0);
    transfer.refused(&[&flags[..], &["--vae", fixture("vae_plain").to_str().unwrap()]].concat(), &["vae_plain", "factor"]);
    transfer.refused(&[&flags[..], &["--vae", "missing"]].concat(), &["missing"]);

    // Further, from what there is.
    let outcome = place.run(&[&QUICK[..], &["--vae", "tuned", "--output", "tuned", "--size", "16x24"]].concat());
    finished(&outcome, "tuned");
}

#[test]
fn the_program_refuses() {
    let place = place();
    for (flags, words) in [
        (["--image", "style.png", "--epochs", "0", "--output", "tuned"].as_slice(), ["epochs", "at least 1"].as_slice()),
        (&["--image", "style.png", "--lr", "nan", "--output", "tuned"], &["learning rate"]),
        (&["--image", "missing.png", "--output", "tuned"], &["missing.png"]),
        (&["--image", "style.png", "--output", "other.png"], &["other.png", "is a file"]),
        (&["--image", "style.png", "--output", "no/tuned"], &["no does not exist"]),
        (&["--image", "style.png", "--size", "4x4", "--output", "tuned"], &["4x4"]),
        (&["--image", "style.png", "--size", "0x4", "--output", "tuned"], &["0x4"]),
        (&["--image", "style.png", "--vae", "missing", "--output", "tuned"], &["missing"]),
    ] {
        place.refused(flags, words);
    }
    // Before a model is opened, or fetched.
    let none = place.path("no_model");
    for (flags, word) in [
        (["--size", "0x4", "--output", "tuned"], "0x4"),
        (["--vae", "missing", "--output", "tuned"], "missing"),
        #[cfg(target_os = "linux")]
        (["--size", "32x32", "--output", "/proc/tuned"], "/proc/tuned"),
        #[cfg(target_os = "linux")]
        (["--output", "tuned", "--sheet", "/proc/sheet.png"], "/proc/sheet.png"),
    ] {
        place.refused_with(&none, &[&["--image", "style.png"], &flags[..]].concat(), &[word]);
    }
    place.refused(&["--image", "style.png", "--output", "tuned", "--sheet", "style.png"], &["style.png", "is read by this run"]);
    // The model that is read keeps its own.
    let copy = ModelCopy::new();
    let vae = copy.path("vae");
    let before = copy.read(model_copy::VAE);
    for output in [vae.clone(), copy.path("unet/../vae")] {
        let flags = ["--image", "style.png", "--output", output.to_str().unwrap()];
        place.refused_with(copy.folder(), &flags, &["vae", "model's own", "--vae"]);
        // Another model's likewise.
        place.refused(&[&flags[..], &["--vae", vae.to_str().unwrap()]].concat(), &["vae", "model's own"]);
    }
    assert_eq!(copy.read(model_copy::VAE), before);
    place.misused(&["--output", "tuned"], &["--image"]);
    place.misused(&["--image", "style.png"], &["--output"]);
}

/// A run that fails midway keeps the epochs before, and one that has none to keep writes nothing.
#[test]
fn the_program_keeps_what_was_sound() {
    let place = place();
    let run = |lr: f64, output: &str| {
        let (epochs, lr) = (EPOCHS.to_string(), lr.to_string());
        let outcome = place.run(&["--image", "style.png", "--epochs", &epochs, "--device", "cpu", "--lr", &lr, "--output", output]);
        let (stdout, stderr) = texts(&outcome);
        assert_eq!((outcome.status.code(), stdout.as_str()), (Some(1), ""), "{stderr}");
        assert!(stderr.lines().last().unwrap().starts_with("error: the loss became infinite or NaN in step "), "{stderr}");
        stderr
    };
    let picture = image::load(place.path("style.png")).unwrap();
    let before = place.files();
    assert!(!run(1e20, "nothing").contains("kept"));
    assert!(place.files() == before, "something was written");

    let stderr = run(too_high(&picture), "tuned");
    // Which epoch fails is this run's own affair. The last line of progress tells the loss after the epoch before, which is the one to keep.
    let told = stderr.lines().filter_map(|line| line.strip_prefix("epoch ")?.split_once(&format!("/{EPOCHS} loss "))).collect::<Vec<_>>();
    let (last, loss) = told.last().unwrap();
    let (last, loss) = (last.parse::<usize>().unwrap(), loss.split(' ').next().unwrap().parse::<f64>().unwrap());
    assert!(last > 1 && told.len() == last, "{stderr}");
    assert!(stderr.lines().last().unwrap().contains(&format!(" in step {};", last + 1)), "{stderr}");
    let kept = format!("epoch {} of {EPOCHS} is kept in tuned", last - 1);
    assert!(stderr.lines().any(|line| line == kept), "{kept}: {stderr}");
    let found = DecoderTuning::new(open(place.path("tuned")), &picture, epochs(1)).unwrap().advance().unwrap().unwrap().loss;
    assert!((found - loss).abs() < 1e-3 * loss, "a loss of {found} is kept: {stderr}");
    assert_eq!(place.files().len(), before.len() + 1);
}

/// A run that can write no file of more than so many blocks of 512 bytes: to try is an error instead of a signal.
#[cfg(unix)]
fn limited(place: &Place, blocks: u32, flags: &[&str]) -> Output {
    let command = place.command(&example::tiny(), flags);
    let mut limited = Command::new("sh");
    limited.args(["-c", &format!(r#"trap "" XFSZ; ulimit -f {blocks}; exec "$0" "$@""#)]).arg(command.get_program()).args(command.get_args());
    limited.current_dir(place.path("")).envs(command.get_envs().filter_map(|(name, value)| Some((name, value?)))).stdin(Stdio::null());
    limited.output().unwrap()
}

/// As on a full disk: an older folder stays as it was, and no part of a new one is left.
#[cfg(unix)]
#[test]
fn a_folder_that_cannot_be_written_whole() {
    let place = place();
    finished(&place.run(&[&QUICK[..], &["--output", "old"]].concat()), "old");
    let before = (place.files(), files(&place.path("old")));
    for output in ["old", "new"] {
        // Some kilobytes.
        let outcome = limited(&place, 8, &[&QUICK[..], &["--lr", "1e-3", "--output", output]].concat());
        let (stdout, stderr) = texts(&outcome);
        assert_eq!((outcome.status.code(), stdout.as_str()), (Some(1), ""), "{stderr}");
        let last = stderr.lines().last().unwrap();
        assert!(last.starts_with("error: ") && last.contains(output) && stderr.contains("epoch 2/2"), "{stderr}");
        assert!((place.files(), files(&place.path("old"))) == before, "{output}: something was left: {:?}", place.files().keys());
    }
}

/// What is only looked at may fail, without harm to what was learnt.
#[cfg(unix)]
#[test]
fn a_sheet_that_cannot_be_written() {
    let place = place();
    fs::create_dir(place.path("sheets")).unwrap();
    // Of noise, which no PNG makes small: by itself it is longer than the folder's weights, and the limit lies between them.
    image::save(&random(7, &[1, 3, 512, 768]).sigmoid(), place.path("noise.png")).unwrap();
    let flags = ["--image", "noise.png", "--epochs", "1", "--device", "cpu", "--output", "tuned", "--sheet", "sheets/sheet.png"];
    let outcome = limited(&place, 1536, &flags);
    let (stdout, stderr) = texts(&outcome);
    assert_eq!(outcome.status.code(), Some(1), "{stdout}{stderr}");
    let last = stderr.lines().last().unwrap();
    assert!(last.starts_with("error: ") && last.contains("sheets/sheet.png"), "{stderr}");
    assert!(files(&place.path("sheets")).is_empty());
    drop(open(place.path("tuned")));
}

/// Ctrl-C keeps what there is.
#[cfg(unix)]
#[test]
fn the_program_stops() {
    let place = place();
    let flags = ["--image", "style.png", "--epochs", "800", "--device", "cpu", "--output", "tuned"];
    let mut run = place.watch(&example::tiny(), &flags);
    assert!(run.until("epoch 80/800 loss ").is_empty());
    run.ctrl_c();
    let (status, stdout, rest) = run.end();
    assert_eq!((status, stdout.lines().last()), (Some(0), Some("tuned")), "{rest}");
    let last = rest.lines().last().unwrap();
    assert!(last.starts_with("stopped after epoch ") && last.ends_with(" of 800"), "{rest}");
    drop(open(place.path("tuned")));
}
