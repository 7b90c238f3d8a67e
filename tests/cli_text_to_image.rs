//! The example program `text_to_image` from its command line, on tiny models: what it writes, prints and refuses.
#![cfg(feature = "stable-diffusion")]
#![allow(clippy::disallowed_methods, clippy::unwrap_used, missing_docs)]

mod example;
mod model_copy;

use attention_distillation::image;
use example::{differ, finished, fixture, size, texts, Place};
use model_copy::ModelCopy;
use std::fs;
use std::path::{Path, PathBuf};
use tch::Tensor;

fn place() -> Place {
    Place::of("text_to_image")
}

fn bundled() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/mini")
}

/// Two steps at 32 x 32 pixels.
const QUICK: [&str; 4] = ["--steps", "2", "--size", "32x32"];
const FOX: [&str; 6] = ["--steps", "2", "--size", "32x32", "--prompt", "a fox in the snow"];
const STYLE: [&str; 2] = ["--style", "style.png"];

/// `(name, expected to be equal, flags more)`: each compared with the picture without them.
#[track_caller]
fn compare(place: &Place, model: &Path, flags: &[&str], cases: &[(&str, bool, &[&str])]) {
    let draw = |more: &[&str], name: &str| place.draw_with(model, &[flags, more].concat(), name, &[name]).remove(0);
    let picture = draw(&[], "picture.png");
    for (name, same, more) in cases {
        let other = draw(more, &format!("{name}.png"));
        assert_eq!(differ(&other, &picture) == 0.0, *same, "{name}: {more:?}");
    }
}

/// A run that must succeed with a warning: the one line of it.
#[track_caller]
fn warned(place: &Place, model: &Path, flags: &[&str], output: &str) -> String {
    let outcome = place.run_with(model, &[flags, &["--device", "cpu", "--output", output]].concat());
    let (stdout, stderr) = texts(&outcome);
    assert_eq!(outcome.status.code(), Some(0), "{stderr}");
    assert_eq!(stdout, format!("{output}\n"));
    let warnings: Vec<_> = stderr.lines().filter(|line| !line.starts_with("step ")).collect();
    let [warning] = warnings.as_slice() else { panic!("one warning expected: {stderr}") };
    assert!(warning.contains("WARN"), "{warning}");
    warning.to_string()
}

// ---- prompts, styles, settings

#[test]
fn writes_a_picture_and_prints_its_path() {
    let place = place();
    for (style, name) in [(true, "styled.png"), (false, "plain.png")] {
        let flags = [&FOX[..], if style { &STYLE } else { &[] }, &["--device", "cpu", "--output", name]].concat();
        let outcome = place.run(&flags);
        finished(&outcome, name);
        let (_, stderr) = texts(&outcome);
        // Without a style there is no descent, and no loss.
        let last = if style { "step 2/2 loss " } else { "step 2/2, " };
        assert!(stderr.lines().any(|line| line.starts_with(last)), "{stderr}");
        assert_eq!(size(&image::load(place.path(name)).unwrap()), (32, 32));
    }
    // Each of the flags that say how to descend.
    for flags in [&["--adain"][..], &["--iterations", "2"], &["--lr", "0.1"], &["--layers", "0..3"]] {
        let warning = warned(&place, &fixture("sd15"), &[&FOX[..], flags].concat(), "warned.png");
        assert!(warning.contains(&format!("{} is without effect", flags[0])), "{warning}");
    }
    // The model's own size, and no prompt at all.
    assert_eq!(size(&place.draw(&["--steps", "1"], "square.png")), (64, 64));
}

#[test]
fn flags_of_plain_sampling_have_their_effect() {
    let cases: [(&str, bool, &[&str]); 7] = [
        ("seed_same", true, &["--seed", "42"]),
        ("guidance_same", true, &["--guidance", "7.5"]),
        ("negative_same", true, &["--negative", ""]),
        ("batch_same", true, &["--batch", "1"]),
        ("seed", false, &["--seed", "43"]),
        ("guidance", false, &["--guidance", "1"]),
        ("negative", false, &["--negative", "a red square"]),
    ];
    compare(&place(), &fixture("sd15"), &FOX, &cases);
}

#[test]
fn flags_of_guided_sampling_have_their_effect() {
    let flags = [&FOX[..], &STYLE].concat();
    let cases: [(&str, bool, &[&str]); 9] = [
        ("iterations_same", true, &["--iterations", "3"]),
        ("lr_same", true, &["--lr", "0.015"]),
        ("layers_same", true, &["--layers", "10..16"]),
        ("iterations", false, &["--iterations", "1"]),
        ("lr", false, &["--lr", "0.5"]),
        ("layers", false, &["--layers", "0..3"]),
        ("adain", false, &["--no-adain"]),
        ("styles", false, &["--style", "other.png"]),
        ("with_content", false, &["--content", "content.png"]),
    ];
    compare(&place(), &fixture("sd15"), &flags, &cases);
}

/// At a guidance of 1 the negative has no part in the picture; with zeros as the negative, another picture.
#[test]
fn negatives() {
    let place = place();
    let flags = [&FOX[..], &["--guidance", "1"]].concat();
    compare(&place, &fixture("sd15"), &flags, &[("unused", true, &["--negative", "a red square"])]);
    let cases: [(&str, bool, &[&str]); 3] =
        [("guidance_same", true, &["--guidance", "7"]), ("empty", false, &["--negative", ""]), ("guidance", false, &["--guidance", "7.5"])];
    compare(&place, &fixture("sdxl"), &FOX, &cases);
    // Where a folder says that it wants no zeros, an absent negative is the empty one.
    let copy = ModelCopy::of("sdxl");
    copy.set("model_index.json", "force_zeros_for_empty_prompt", false.into());
    compare(&place, copy.folder(), &FOX, &[("empty_same", true, &["--negative", ""])]);
}

#[test]
fn content_weighs() {
    let place = place();
    let flags = [&QUICK[..], &["--prompt", "a fox", "--style", "style.png", "--content", "content.png"]].concat();
    let cases: [(&str, bool, &[&str]); 2] = [("same", true, &["--content-weight", "0.25"]), ("more", false, &["--content-weight", "5"])];
    compare(&place, &fixture("sd15"), &flags, &cases);
}

#[test]
fn several_pictures() {
    let place = place();
    let (model, names) = (fixture("sd15"), ["a-0.png", "a-1.png", "a-2.png"]);
    let base = [&QUICK[..], &["--style", "style.png", "--iterations", "1"]].concat();
    let draw = |flags: &[&str], output: &str, names: &[&str]| place.draw_with(&model, &[&base[..], flags].concat(), output, names);
    let prompts = ["--prompt", "a fox", "--prompt", "a house by the sea", "--prompt", "two boats"];
    let pictures = draw(&prompts, "a.png", &names);
    assert!(differ(&pictures[0], &pictures[1]) > 0.0 && differ(&pictures[1], &pictures[2]) > 0.0);

    // From a file, among lines that say nothing.
    fs::write(place.path("prompts.txt"), "\u{feff}# boats and houses\n\na fox\r\n  a house by the sea  \n\n#\ntwo boats").unwrap();
    for (ours, theirs) in draw(&["--prompts", "prompts.txt"], "b.png", &["b-0.png", "b-1.png", "b-2.png"]).iter().zip(&pictures) {
        assert_eq!(differ(ours, theirs), 0.0);
    }
    // From both, the flags' first.
    fs::write(place.path("prompts.txt"), "two boats\n").unwrap();
    let both =
        draw(&["--prompts", "prompts.txt", "--prompt", "a fox", "--prompt", "a house by the sea"], "c.jpg", &["c-0.jpg", "c-1.jpg", "c-2.jpg"]);
    assert!(differ(&both[2], &pictures[2]) < 0.2, "JPEG loses little");
    // One line is one picture, and keeps its name.
    drop(draw(&["--prompts", "prompts.txt"], "d.png", &["d.png"]));
}

/// A batch of its own is a run of its own, from the seed of its first picture on.
#[test]
fn batches() {
    let place = place();
    let base = [&QUICK[..], &["--style", "style.png", "--iterations", "1", "--prompt", "a fox"]].concat();
    let draw = |flags: &[&str], name: &str, count: usize| -> Vec<Tensor> {
        let names: Vec<_> = if count == 1 { vec![format!("{name}.png")] } else { (0..count).map(|i| format!("{name}-{i}.png")).collect() };
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        place.draw_with(&fixture("sd15"), &[&base[..], flags].concat(), &format!("{name}.png"), &names)
    };
    let same = |ours: &[Tensor], theirs: &[Tensor]| ours.len() == theirs.len() && ours.iter().zip(theirs).all(|(a, b)| differ(a, b) == 0.0);
    let three = draw(&["--count", "3", "--batch", "2"], "three", 3);
    assert!(differ(&three[0], &three[1]) > 0.0 && differ(&three[0], &three[2]) > 0.0 && differ(&three[1], &three[2]) > 0.0);
    assert!(same(&three[..2], &draw(&["--count", "2"], "two", 2)), "the first batch");
    assert!(same(&three[2..], &draw(&["--seed", "44"], "last", 1)), "the second batch");
    assert!(!same(&three, &draw(&["--count", "3"], "whole", 3)), "one batch of three is another");
    // Each prompt as often as the count says.
    let twice = draw(&["--prompt", "a house", "--count", "2", "--batch", "9"], "twice", 4);
    assert!((0..4).all(|i| (0..i).all(|j| differ(&twice[i], &twice[j]) > 0.0)));
}

#[test]
fn sheets_and_previews() {
    let place = place();
    let flags = [&FOX[..], &["--style", "style.png", "--content", "content.png", "--count", "2", "--sheet", "sheet.png", "--preview", "1"]].concat();
    let pictures = place.draw_with(&fixture("sd15"), &flags, "a.png", &["a-0.png", "a-1.png"]);
    let sheet = image::load(place.path("sheet.png")).unwrap();
    // Content, style, and both pictures, with 8 pixels between each two.
    let (height, width) = size(&sheet);
    assert_eq!(height, 32);
    assert_eq!(differ(&sheet.narrow(3, width - 32, 32), &pictures[1]), 0.0);
    assert_eq!(differ(&sheet.narrow(3, width - 72, 32), &pictures[0]), 0.0);
    assert!(width > 3 * 32 + 3 * 8 + 32, "{width}");
    // A preview changes nothing.
    let plain = place.draw_with(
        &fixture("sd15"),
        &[&FOX[..], &["--style", "style.png", "--content", "content.png", "--count", "2"]].concat(),
        "b.png",
        &["b-0.png", "b-1.png"],
    );
    assert_eq!(differ(&plain[0], &pictures[0]), 0.0);
}

/// Ctrl-C ends a run of several batches: what is there is written, the rest is not begun.
#[cfg(unix)]
#[test]
fn ctrl_c_ends_all_batches() {
    let place = place();
    let flags = ["--steps", "300", "--size", "32x32", "--count", "3", "--batch", "1", "--preview", "30", "--output", "a.png", "--device", "cpu"];
    let mut run = place.watch(&fixture("sd15"), &flags);
    run.until("step 30/300");
    run.ctrl_c();
    let (status, stdout, rest) = run.end();
    assert_eq!(status, Some(0), "{rest}");
    assert_eq!(stdout, "a-0.png\n");
    assert!(rest.contains("stopped after step "), "{rest}");
    assert!(place.files().contains_key("a-0.png") && !place.files().contains_key("a-1.png"));
}

#[test]
fn overlong_prompts_warn() {
    let place = place();
    let long = "word ".repeat(100);
    for model in ["sd15", "sdxl"] {
        let flags = [&QUICK[..], &["--prompt", &long]].concat();
        let outcome = place.run_with(&fixture(model), &[&flags[..], &["--device", "cpu", "--output", "a.png"]].concat());
        let (stdout, stderr) = texts(&outcome);
        assert_eq!((outcome.status.code(), stdout.as_str()), (Some(0), "a.png\n"), "{stderr}");
        assert!(stderr.lines().any(|line| line.contains("WARN") && line.contains("too long")), "{stderr}");
        assert!(image::load(place.path("a.png")).is_ok());
    }
}

// ---- models

#[test]
fn the_bundled_model_takes_the_empty_prompt_only() {
    let place = place();
    let model = bundled();
    for (flags, name) in [(&["--prompt", "", "--style", "style.png"][..], "a.png"), (&["--style", "style.png"], "b.png"), (&[], "c.png")] {
        let flags = [&QUICK[..], flags].concat();
        assert_eq!(size(&place.draw_with(&model, &flags, name, &[name])[0]), (32, 32));
    }
    let refuse = |flags: &[&str], words: &[&str]| place.refused_with(&model, &[&QUICK[..], flags].concat(), words);
    refuse(&["--prompt", "a fox"], &["prompt", "`a fox`", "no text encoder", "only the empty prompt"]);
    refuse(&["--prompt", "", "--prompt", "a fox", "--style", "style.png"], &["`a fox`", "no text encoder"]);
    refuse(&["--negative", "a fox"], &["`a fox`", "no text encoder"]);
}

#[test]
fn sdxl() {
    let place = place();
    let flags = [&FOX[..], &STYLE].concat();
    let cases: [(&str, bool, &[&str]); 6] = [
        // Its own task settings: 2 descents, a guidance of 7.
        ("iterations_same", true, &["--iterations", "2"]),
        ("guidance_same", true, &["--guidance", "7"]),
        ("layers_same", true, &["--layers", "22..28"]),
        ("iterations", false, &["--iterations", "3"]),
        ("dtype", false, &["--dtype", "bf16"]),
        ("adain", false, &["--no-adain"]),
    ];
    compare(&place, &fixture("sdxl"), &flags, &cases);
    let model = fixture("sdxl");
    let other = [&QUICK[..], &STYLE, &["--prompt", "a house"]].concat();
    let picture = place.draw_with(&model, &other, "house.png", &["house.png"]).remove(0);
    assert!(differ(&picture, &image::load(place.path("picture.png")).unwrap()) > 0.0);
    let wide = [&FOX[..2], &["--size", "64x32", "--prompt", "a fox"]].concat();
    assert_eq!(size(&place.draw_with(&model, &wide, "wide.png", &["wide.png"])[0]), (32, 64));
}

#[test]
fn a_folders_own_settings_hold() {
    let place = place();
    let copy = ModelCopy::new();
    copy.write("attention_distillation.json", r#"{ "steps": 9, "size": [48, 32], "text_to_image": { "steps": 3, "guidance": 2, "adain": false } }"#);
    let flags = ["--prompt", "a fox", "--style", "style.png"];
    let cases: [(&str, bool, &[&str]); 3] = [
        ("same", true, &["--steps", "3", "--size", "48x32", "--guidance", "2", "--no-adain"]),
        ("guidance", false, &["--guidance", "3"]),
        ("steps", false, &["--steps", "2"]),
    ];
    compare(&place, copy.folder(), &flags, &cases);
    assert_eq!(size(&image::load(place.path("picture.png")).unwrap()), (32, 48));
}

// ---- controls

#[test]
fn controls() {
    let place = place();
    place.picture("control.png", 32, 32, 5);
    let net = fixture("controlnet_sd15");
    let net = net.to_str().unwrap();
    let control = ["--control", "control.png", "--controlnet", net];
    let with = |more: &[&'static str]| [&control[..], more].concat();
    let (strong, none, half, all, late) = (
        with(&["--control-strength", "1"]),
        with(&["--control-strength", "0"]),
        with(&["--control-strength", "0.5"]),
        with(&["--control-start", "0", "--control-end", "1"]),
        with(&["--control-start", "0.5"]),
    );
    let early = with(&["--control-end", "0.5"]);
    let draw = |flags: &[&str], name: &str| place.draw(&[&FOX[..], flags].concat(), name);
    let [plain, full] = [draw(&[], "plain.png"), draw(&control, "full.png")];
    assert!(differ(&plain, &full) > 0.0);
    assert_eq!(differ(&draw(&none, "none.png"), &plain), 0.0, "a strength of 0 is without effect");
    assert_eq!(differ(&draw(&strong, "strong.png"), &full), 0.0);
    assert_eq!(differ(&draw(&all, "all.png"), &full), 0.0);
    for (flags, name) in [(half, "half.png"), (early, "early.png"), (late, "late.png")] {
        let picture = draw(&flags, name);
        assert!(differ(&picture, &full) > 0.0 && differ(&picture, &plain) > 0.0, "{name}");
    }
    // With styles and in batches, as a flag among others, and in the sheet.
    let styled = [&FOX[..], &STYLE, &control, &["--count", "3", "--batch", "2", "--iterations", "1", "--sheet", "sheet.png"]].concat();
    let pictures = place.draw_with(&fixture("sd15"), &styled, "s.png", &["s-0.png", "s-1.png", "s-2.png"]);
    let sheet = image::load(place.path("sheet.png")).unwrap();
    assert_eq!(differ(&sheet.narrow(3, 0, 32), &image::load(place.path("control.png")).unwrap()), 0.0, "the control picture stands first");
    assert!(differ(&pictures[0], &full) > 0.0);
}

/// A photo becomes edges of the output's size, without a warning about its own.
#[test]
fn controls_from_photos() {
    let place = place();
    let net = fixture("controlnet_sd15");
    let flags = [&FOX[..], &["--control-from", "photo.png", "--canny", "--controlnet", net.to_str().unwrap()]].concat();
    place.picture("flat.png", 64, 64, 1);
    // A square on a ground, twice the output's size.
    let square = Tensor::zeros([1, 3, 64, 64], (tch::Kind::Float, tch::Device::Cpu));
    drop(square.narrow(2, 16, 32).narrow(3, 16, 32).fill_(1.0));
    image::save(&square, place.path("photo.png")).unwrap();
    let photo = place.draw(&[&flags[..], &["--sheet", "sheet.png"]].concat(), "a.png");
    let edges = image::canny(&image::resize(&square, (32, 32)).unwrap(), image::CANNY_LOW, image::CANNY_HIGH).unwrap();
    assert!(edges.sum(tch::Kind::Float).double_value(&[]) > 0.0);
    let sheet = image::load(place.path("sheet.png")).unwrap();
    assert_eq!(differ(&sheet.narrow(3, 0, 32), &edges), 0.0, "the edges stand first");
    // The same by the edges themselves.
    image::save(&edges, place.path("edges.png")).unwrap();
    let by_edges = [&FOX[..], &["--control", "edges.png", "--controlnet", net.to_str().unwrap()]].concat();
    assert_eq!(differ(&place.draw(&by_edges, "b.png"), &photo), 0.0);
    assert!(differ(&place.draw(&FOX, "c.png"), &photo) > 0.0);
}

#[test]
fn controls_of_another_size_warn() {
    let place = place();
    let net = fixture("controlnet_sd15");
    let flags = [&FOX[..], &["--control", "content.png", "--controlnet", net.to_str().unwrap()]].concat();
    let warning = warned(&place, &fixture("sd15"), &flags, "a.png");
    assert!(warning.contains("40x48") && warning.contains("32x32") && warning.contains("scaled"), "{warning}");
    // A part of the run in which no step lies.
    place.picture("control.png", 32, 32, 5);
    let flags = [&FOX[..], &["--control", "control.png", "--controlnet", net.to_str().unwrap(), "--control-start", "0.6", "--control-end", "0.7"]];
    let warning = warned(&place, &fixture("sd15"), &flags.concat(), "b.png");
    assert!(warning.contains("no step"), "{warning}");
}

#[test]
fn controls_of_sdxl() {
    let place = place();
    place.picture("control.png", 32, 32, 5);
    let net = fixture("controlnet_sdxl");
    let control = ["--control", "control.png", "--controlnet", net.to_str().unwrap()];
    compare(&place, &fixture("sdxl"), &[&FOX[..], &STYLE].concat(), &[("controlled", false, &control)]);
}

// ---- what it refuses

#[test]
fn bad_numbers() {
    let place = place();
    let refuse = |flags: &[&str], words: &[&str]| drop(place.refused(&[&FOX[..], flags].concat(), words));
    for number in ["NaN", "inf", "-1", "1e999"] {
        refuse(&["--guidance", number], &["guidance", "at least 0"]);
        refuse(&["--lr", number], &["learning rate", "at least 0"]);
    }
    refuse(&["--style", "style.png", "--layers", "0..999"], &["layers", "0..999", "16"]);
    let refuse = |flags: &[&str], words: &[&str]| drop(place.refused(&[&FOX[4..], flags].concat(), words));
    refuse(&["--steps", "0"], &["steps", "0"]);
    refuse(&["--steps", "1001"], &["steps", "1000"]);
    refuse(&["--size", "7x7"], &["size", "7x7"]);
}

#[test]
fn bad_prompts() {
    let place = place();
    let refuse = |flags: &[&str], words: &[&str]| drop(place.refused(&[&QUICK[..], flags].concat(), words));
    refuse(&["--prompts", "missing.txt"], &["missing.txt", "No such file"]);
    for (name, text) in [("empty.txt", ""), ("comments.txt", "# a fox\n\n   \n#\n")] {
        fs::write(place.path(name), text).unwrap();
        refuse(&["--prompts", name], &[name, "no prompt"]);
    }
    fs::write(place.path("latin.txt"), b"caf\xe9 au lait").unwrap();
    refuse(&["--prompts", "latin.txt"], &["latin.txt", "UTF-8"]);
    fs::create_dir(place.path("folder.txt")).unwrap();
    refuse(&["--prompts", "folder.txt"], &["folder.txt"]);
}

#[test]
fn bad_pictures_and_outputs() {
    let place = place();
    fs::write(place.path("text.png"), "This is no picture.").unwrap();
    let net = fixture("controlnet_sd15");
    let net = net.to_str().unwrap();
    for bad in ["missing.png", "text.png"] {
        for flags in [
            &["--style", bad][..],
            &["--style", "style.png", "--content", bad],
            &["--control", bad, "--controlnet", net],
            &["--control-from", bad, "--canny", "--controlnet", net],
        ] {
            place.refused(&[&FOX[..], flags].concat(), &[bad]);
        }
    }
    for flags in [
        &["--style", "style.png"][..],
        &["--content", "content.png", "--style", "style.png"],
        &["--control", "content.png", "--controlnet", net],
        &["--control-from", "content.png", "--canny", "--controlnet", net],
    ] {
        place.refused(&[&FOX[..], flags, &["--output", flags[1]]].concat(), &[flags[1], "is read by this run"]);
    }
    // The second of several pictures.
    place.picture("b-1.png", 32, 32, 5);
    place.refused(&[&FOX[..], &["--style", "b-1.png", "--count", "2", "--output", "b.png"]].concat(), &["b-1.png", "is read by this run"]);
    // A name of the second picture that is taken, found before the run.
    fs::create_dir(place.path("a-1.png")).unwrap();
    place.refused(&[&FOX[..], &["--count", "2", "--output", "a.png"]].concat(), &["a-1.png", "folder"]);
    for count in ["1", "2"] {
        for bad in ["out", "out.gif", "no/such/out.png"] {
            let word = Path::new(bad).file_stem().unwrap().to_str().unwrap();
            place.refused(&[&FOX[..], &["--count", count, "--output", bad]].concat(), &[word]);
        }
    }
}

#[test]
fn bad_controls() {
    let place = place();
    place.picture("control.png", 32, 32, 5);
    let [net, xl] = ["controlnet_sd15", "controlnet_sdxl"].map(|name| fixture(name).to_str().unwrap().to_owned());
    let refuse_with = |model: &Path, net: &str, more: &[&str], words: &[&str]| {
        let flags = [&FOX[..], &["--control", "control.png", "--controlnet", net], more].concat();
        place.refused_with(model, &flags, words);
    };
    refuse_with(&fixture("sd15"), &xl, &[], &["controlnet_sdxl", "another kind of model"]);
    refuse_with(&fixture("sdxl"), &net, &[], &["controlnet_sd15", "another kind of model"]);
    // Before a model is opened.
    let none = place.path("no_model");
    let refuse = |net: &str, more: &[&str], words: &[&str]| refuse_with(&none, net, more, words);
    refuse("no-such-net", &[], &["no-such-net", "ControlNet"]);
    fs::create_dir(place.path("empty")).unwrap();
    refuse("empty", &[], &["empty", "ControlNet"]);
    refuse("style.png", &[], &["style.png"]);
    // A U-Net is none.
    let unet = fixture("sd15/unet");
    refuse(unet.to_str().unwrap(), &[], &["UNet2DConditionModel", "ControlNetModel"]);
    for (start, end) in [("0.5", "0.5"), ("0.8", "0.2"), ("-0.1", "1"), ("0", "1.1"), ("NaN", "1"), ("0", "NaN")] {
        refuse(&net, &["--control-start", start, "--control-end", end], &["control", start, end, "0 <= start < end <= 1"]);
    }
    for strength in ["-1", "NaN", "inf"] {
        refuse(&net, &["--control-strength", strength], &["strength", strength, "at least 0"]);
    }
}

#[test]
fn wrong_arguments() {
    let place = place();
    let misuse = |more: &[&str], words: &[&str]| place.misused(&[&FOX[..], more].concat(), words);
    misuse(&["--control", "style.png"], &["--controlnet"]);
    misuse(&["--controlnet", "net"], &["--control"]);
    misuse(&["--control-from", "style.png", "--controlnet", "net"], &["--canny"]);
    misuse(&["--canny"], &["--control-from"]);
    misuse(&["--canny", "--control", "style.png", "--controlnet", "net"], &["--control-from"]);
    misuse(&["--control", "style.png", "--control-from", "style.png", "--canny", "--controlnet", "net"], &["--control-from"]);
    for flag in ["--control-strength", "--control-start", "--control-end"] {
        misuse(&[flag, "0.5"], &["--controlnet"]);
        misuse(&[flag, "much", "--control", "style.png", "--controlnet", "net"], &[flag]);
    }
    misuse(&["--content", "content.png"], &["--style"]);
    for flag in ["--count", "--batch"] {
        for bad in ["0", "1.5", "many"] {
            misuse(&[flag, bad], &[flag, bad]);
        }
    }
    misuse(&["--count", "65536"], &["--count", "65535"]);
    misuse(&["--count", "18446744073709551615"], &["--count", "too large"]);
    misuse(&["--guidance", "much"], &["--guidance"]);
    misuse(&["--negative", "a", "--negative", "b"], &["--negative"]);
    misuse(&["a stray prompt"], &["a stray prompt"]);
}
