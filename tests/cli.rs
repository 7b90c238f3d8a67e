//! The example program `style_transfer` from its command line, on a tiny model: what it writes, prints and refuses.
#![cfg(feature = "stable-diffusion")]
#![allow(clippy::disallowed_methods, clippy::unwrap_used, missing_docs)]

mod example;
mod model_copy;

use attention_distillation::{device, image, Distiller, Noise, References, StableDiffusion};
use example::{differ, finished, size, texts, tiny, Place};
use model_copy::ModelCopy;
use std::fs;
use std::io::Write;
use std::path::Path;
use tch::{Device, Kind, Tensor};

fn place() -> Place {
    Place::of("style_transfer")
}

const QUICK: [&str; 6] = ["--content", "content.png", "--style", "style.png", "--steps", "2"];

/// Of the loss that a line of progress goes on with, up to its comma.
#[track_caller]
fn significant_digits(line: &str) -> usize {
    let (loss, _) = line.split_once(", ").unwrap();
    assert!(loss.parse::<f64>().unwrap() > 0.0, "{line}");
    loss.replace('.', "").trim_start_matches('0').len()
}

// ---- what it does

#[test]
fn writes_a_picture_and_prints_its_path_last() {
    let place = place();
    let outcome = place.run(&[&QUICK[..], &["--device", "cpu", "--output", "a.png"]].concat());
    finished(&outcome, "a.png");
    let (_, stderr) = texts(&outcome);
    let [begun, first, last] = stderr.lines().collect::<Vec<_>>()[..] else { panic!("three lines of progress expected: {stderr}") };
    assert_eq!(begun, "step 0/2");
    for (line, step) in [(first, "step 1/2 loss "), (last, "step 2/2 loss ")] {
        assert_eq!(significant_digits(line.strip_prefix(step).unwrap()), 6, "{line}");
    }
    assert!(fs::read(place.path("a.png")).unwrap().starts_with(b"\x89PNG"));
    // The content's own size.
    assert_eq!(size(&image::load(place.path("a.png")).unwrap()), (48, 40));
    // An absolute path is printed as it was given, and an older file is replaced.
    let path = place.path("b.png");
    fs::write(&path, "older").unwrap();
    let outcome = place.run(&[&QUICK[..], &["--device", "cpu", "--output", path.to_str().unwrap()]].concat());
    finished(&outcome, path.to_str().unwrap());
    assert_eq!(place.files()["b.png"], place.files()["a.png"]);
}

#[test]
fn writes_to_out_png_by_itself() {
    let place = place();
    finished(&place.run(&[&QUICK[..], &["--device", "cpu"]].concat()), "out.png");
    assert!(place.files().contains_key("out.png"));
}

#[test]
fn sizes() {
    let place = place();
    let draw = |flags: &[&str], output: &str| size(&place.draw(&[&QUICK[..], flags].concat(), output));
    assert_eq!(draw(&["--size", "64x32"], "wide.png"), (32, 64));
    assert_eq!(draw(&["--size", "32X64"], "tall.png"), (64, 32));
    assert_eq!(draw(&["--size", "39x47"], "rounded.png"), (40, 32));
    assert_eq!(draw(&["--size", "8x8"], "least.png"), (8, 8));
    // The content's, rounded down.
    place.picture("odd.png", 35, 53, 4);
    assert_eq!(size(&place.draw(&["--content", "odd.png", "--style", "style.png", "--steps", "1"], "odd_out.png")), (32, 48));
    // The model's.
    assert_eq!(size(&place.draw(&["--style", "style.png", "--steps", "1"], "square.png")), (64, 64));
}

#[test]
fn sheets_and_jpeg() {
    let place = place();
    let flags = [&QUICK[..], &["--style", "other.png", "--size", "64x48"]].concat();
    let picture = place.draw(&[&flags[..], &["--sheet", "sheet.png"]].concat(), "a.png");
    let sheet = image::load(place.path("sheet.png")).unwrap();
    // Content, two styles (of about the output's area, and its height in the sheet), result, with 8 pixels between each two.
    assert_eq!(size(&picture), (48, 64));
    let (height, width) = size(&sheet);
    assert_eq!(height, 48);
    assert!(width > 64 + 64 + 2 * 40 + 3 * 8, "{width}");
    let last = sheet.narrow(3, width - 64, 64);
    assert_eq!(differ(&last, &picture), 0.0, "the result stands last");
    assert_eq!(sheet.narrow(3, 64, 8).min().double_value(&[]), 1.0, "white after the content");

    let jpeg = place.draw(&[&flags[..], &["--sheet", "sheet.jpg"]].concat(), "a.jpg");
    assert!(fs::read(place.path("a.jpg")).unwrap().starts_with(&[0xff, 0xd8, 0xff]));
    assert!(fs::read(place.path("sheet.jpg")).unwrap().starts_with(&[0xff, 0xd8, 0xff]));
    let upper = place.draw(&flags, "a.JPEG");
    assert_eq!(size(&jpeg), (48, 64));
    assert_eq!(differ(&jpeg, &upper), 0.0);
    assert!((jpeg - picture).abs().mean(Kind::Float).double_value(&[]) < 0.05, "JPEG loses little");
}

#[test]
fn the_same_run_twice() {
    let place = place();
    for (content, name) in [(true, "content"), (false, "noise")] {
        let flags = if content { &QUICK[..] } else { &["--style", "style.png", "--steps", "2", "--size", "32x32"] };
        let [a, b, c] = ["a", "b", "c"].map(|run| format!("{name}_{run}.png"));
        drop(place.draw(flags, &a));
        drop(place.draw(&[flags, &["--seed", "42"]].concat(), &b));
        drop(place.draw(&[flags, &["--seed", "43"]].concat(), &c));
        let files = place.files();
        assert!(files[&a] == files[&b], "{name}: the same seed, another picture");
        if !content {
            assert!(files[&a] != files[&c], "another seed, the same noise");
        }
    }
}

#[test]
fn flags_have_their_effect() {
    let place = place();
    let flags = [&QUICK[..], &["--size", "32x32"]].concat();
    let plain = place.draw(&flags, "plain.png");
    for (name, same, more) in [
        // The last six of sixteen.
        ("layers_same", true, ["--layers", "10..16"].as_slice()),
        ("iterations_same", true, &["--iterations", "1"]),
        ("lr_same", true, &["--lr", "0.05"]),
        ("weight_same", true, &["--content-weight", "0.25"]),
        ("dtype_same", true, &["--dtype", "f32"]),
        ("vae_dtype_same", true, &["--vae-dtype", "f32"]),
        ("method_same", true, &["--method", "optimise"]),
        ("preview_same", true, &["--preview", "1"]),
        ("smoothing_same", true, &["--smoothing", "0"]),
        ("smoothing", false, &["--smoothing", "1"]),
        ("layers", false, &["--layers", "0..3"]),
        ("iterations", false, &["--iterations", "3"]),
        ("lr", false, &["--lr", "0.5"]),
        ("styles", false, &["--style", "other.png", "--lr", "0.5"]),
        ("dtype", false, &["--dtype", "bf16", "--lr", "0.5"]),
        ("vae_dtype", false, &["--vae-dtype", "bf16"]),
    ] {
        let picture = place.draw(&[&flags[..], more].concat(), &format!("{name}.png"));
        assert_eq!(differ(&picture, &plain) == 0.0, same, "{more:?}");
    }
    // Several styles are more than the first or the last of them.
    let draw = |styles: &[&str], name: &str| {
        let styles: Vec<&str> = styles.iter().flat_map(|style| ["--style", style]).collect();
        place.draw(&[&["--content", "content.png", "--steps", "3", "--lr", "0.5", "--size", "32x32"], &styles[..]].concat(), name)
    };
    let (first, second) = (draw(&["style.png"], "first.png"), draw(&["other.png"], "second.png"));
    let both = draw(&["style.png", "other.png"], "both.png");
    assert!(differ(&first, &second) > 0.0 && differ(&both, &first) > 0.0 && differ(&both, &second) > 0.0);
}

/// By the bundled model, whose pictures are pictures: those of the tiny one's random numbers come near nothing.
#[test]
fn the_content_loss_keeps_a_picture_near_its_content() {
    let place = place();
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets");
    let [content, style] = ["content_astronaut.png", "style_harvest.png"].map(|name| assets.join("pictures").join(name).display().to_string());
    let weight = |weight: &str| {
        let flags = ["--content", &content, "--style", &style, "--size", "64x64", "--steps", "10", "--content-weight", weight];
        let name = format!("weight_{weight}.png");
        place.draw_with(&assets.join("mini"), &flags, &name, &[&name]).remove(0)
    };
    let content = image::resize(&image::load(&content).unwrap(), (64, 64)).unwrap();
    let [without, with] = ["0", "1"].map(|of| (weight(of) - &content).abs().mean(Kind::Double).double_value(&[]) * 255.0);
    // Measured 59 and 39 grey levels on average, and 49 with the default .25.
    assert!(with < 0.8 * without, "{with} grey levels with the loss, {without} without");
}

#[test]
fn colours() {
    let place = place();
    let draw = |more: &[&str], name: &str| place.draw(&[&QUICK[..], more].concat(), name);
    let content = image::load(place.path("content.png")).unwrap();
    let plain = draw(&[], "plain.png");
    assert_eq!(differ(&draw(&["--colours", "style"], "by_style.png"), &plain), 0.0);
    // In place: the same run, of which the luminance is kept. Two levels, as both files were rounded.
    let in_place = draw(&["--colours", "in-place"], "in_place.png");
    let wanted = image::match_chroma(&plain, &content).unwrap();
    assert!((&in_place - &wanted).abs().max().double_value(&[]) < 2.0 / 255.0 && differ(&in_place, &plain) > 0.0);
    // The content's for the style, which stands second in the sheet.
    let by_content = draw(&["--colours", "content", "--sheet", "sheet.png"], "by_content.png");
    assert!(differ(&by_content, &plain) > 0.0);
    let sheet = image::load(place.path("sheet.png")).unwrap();
    let ((_, width), all) = (size(&content), size(&sheet).1);
    let style = sheet.narrow(3, width + 8, all - 2 * (width + 8));
    let mean = |picture: &Tensor| picture.mean_dim(Some([0, 2, 3].as_slice()), false, Kind::Float);
    let off = |picture: &Tensor| (mean(picture) - mean(&content)).abs().max().double_value(&[]);
    let own = image::load(place.path("style.png")).unwrap();
    assert!(off(&style) < 0.01 && off(&own) > 0.03, "{} {}", off(&style), off(&own));
    place.refused(&["--style", "style.png", "--colours", "content"], &["colours", "--content"]);
    place.refused(&["--style", "style.png", "--colours", "in-place"], &["colours", "--content"]);
    place.misused(&[&QUICK[..], &["--colours", "mine"]].concat(), &["--colours", "in-place"]);
}

/// A draft of half the size, which stands for the early timesteps.
#[test]
fn from_coarse_to_fine() {
    let place = place();
    let model = StableDiffusion::open(tiny(), Device::Cpu, Kind::Float).unwrap();
    for (name, flags) in [
        ("content", &["--content", "content.png", "--style", "style.png", "--steps", "5", "--lr", "0.3"][..]),
        ("noise", &["--style", "style.png", "--steps", "5", "--lr", "0.3", "--size", "40x48"]),
    ] {
        let draw = |more: &[&str], run: &str| place.draw(&[flags, more].concat(), &format!("{name}_{run}.png"));
        let plain = draw(&[], "plain");
        let output = format!("{name}_fine.png");
        let outcome = place.run(&[flags, &["--coarse-to-fine", "0.4", "--device", "cpu", "--output", &output]].concat());
        finished(&outcome, &output);
        let said = texts(&outcome).1;
        let told: Vec<&str> =
            said.lines().map(|line| line.split([',', ' ']).find(|word| word.contains(['/', 'x']) && word.len() < 6).unwrap()).collect();
        assert!(said.contains(&format!("the draft is in {output}; the last steps")), "{said}");
        let steps = ["24x24", "0/5", "1/5", "2/5", "3/5", "4/5", "5/5", "40x48", "3/5", "4/5", "5/5"];
        assert_eq!(told, steps, "the draft, then the last two steps: {said}");
        let fine = image::load(place.path(&output)).unwrap();

        // The same by the library.
        let load = |picture: &str| image::load(place.path(picture)).unwrap();
        let run = |size: (i64, i64)| {
            let area = image::size_of_area((32, 64), size.0 * size.1, model.vae().factor()).unwrap();
            let style = model.encode(&image::resize(&load("style.png"), area).unwrap()).unwrap();
            let (extractor, timesteps) = (model.extractor(size).unwrap(), model.timesteps(5).unwrap());
            let mut run = if name == "content" {
                let content = model.encode(&image::resize(&load("content.png"), size).unwrap()).unwrap();
                Distiller::style_transfer(extractor, timesteps, References::style(style).with_content(content), 0.25).unwrap()
            } else {
                Distiller::new(extractor, timesteps, References::style(style), model.noise(1, size, &mut Noise::seeded(42)).unwrap())
            };
            run.optimizer.config.learning_rate = 0.3;
            run
        };
        let enlarge = |draft: &Tensor| image::resize(&model.decode(draft).unwrap(), (48, 40)).unwrap();
        let draft = enlarge(&run((24, 24)).finish().unwrap());
        let wanted = model.decode(&run((48, 40)).with_draft(&model.encode(&draft).unwrap(), 0.4).unwrap().finish().unwrap()).unwrap();
        let apart = |a: &Tensor, b: &Tensor| (a - b).abs().mean(Kind::Double).double_value(&[]) * 255.0;
        // The file is rounded to whole levels.
        assert!(apart(&fine, &wanted) < 0.5, "{name}: {}", apart(&fine, &wanted));
        assert!(apart(&plain, &wanted) > 2.0 && apart(&draft, &wanted) > 2.0, "{name}: {} {}", apart(&plain, &wanted), apart(&draft, &wanted));

        // Previews change nothing; all steps again are another picture.
        assert_eq!(differ(&draw(&["--coarse-to-fine", "0.4", "--preview", "1"], "preview"), &fine), 0.0);
        assert!(differ(&draw(&["--coarse-to-fine", "1"], "all"), &fine) > 0.0);
    }
    // So small that half of it would be nothing.
    assert_eq!(size(&place.draw(&[&QUICK[..], &["--coarse-to-fine", "0.5", "--size", "8x8"]].concat(), "least.png")), (8, 8));
    for (bad, told) in [("0", "0 of"), ("-0.4", "-0.4"), ("1.5", "1.5"), ("NaN", "NaN"), ("inf", "inf"), ("1e-10", "0.0000000001")] {
        // Before a model is opened.
        let flags = [&QUICK[..], &["--coarse-to-fine", bad]].concat();
        place.refused_with(&place.path("no_model"), &flags, &["coarse-to-fine", told, "use 0.4 or so"]);
    }
    let sampling = [&QUICK[..], &["--coarse-to-fine", "0.4", "--method", "sample"]].concat();
    place.refused_with(&place.path("no_model"), &sampling, &["coarse-to-fine", "leave out --method sample"]);
}

/// It is in the output file while the rest is made, should that fail.
#[cfg(unix)]
#[test]
fn the_draft_is_kept() {
    let place = place();
    let flags =
        ["--content", "content.png", "--style", "style.png", "--steps", "200", "--coarse-to-fine", "1", "--output", "a.png", "--device", "cpu"];
    let mut run = place.watch(&tiny(), &flags);
    run.until("the draft is in a.png");
    let draft = image::load(place.path("a.png")).unwrap();
    run.kill();
    assert_eq!(size(&draft), (48, 40));
    assert_eq!(differ(&image::load(place.path("a.png")).unwrap(), &draft), 0.0);
}

/// Ctrl-C in the draft: it is the picture.
#[cfg(unix)]
#[test]
fn ctrl_c_leaves_the_draft() {
    let place = place();
    let flags =
        ["--content", "content.png", "--style", "style.png", "--steps", "400", "--coarse-to-fine", "0.4", "--output", "a.png", "--device", "cpu"];
    let mut run = place.watch(&tiny(), &flags);
    run.until("step 40/400");
    run.ctrl_c();
    let (status, stdout, rest) = run.end();
    assert_eq!((status, stdout.as_str()), (Some(0), "a.png\n"), "{rest}");
    let lines: Vec<&str> = rest.lines().collect();
    let [.., stopped, last] = lines.as_slice() else { panic!("{rest}") };
    assert!(stopped.starts_with("stopped after step ") && stopped.ends_with(" of 400"), "{rest}");
    assert_eq!(*last, "the picture is the draft, enlarged");
    assert_eq!(size(&image::load(place.path("a.png")).unwrap()), (48, 40));
}

/// The paper's second procedure, with a content and without.
#[test]
fn by_sampling() {
    let place = place();
    for (content, name) in [(true, "content"), (false, "noise")] {
        let flags =
            [&["--style", "style.png", "--steps", "3", "--size", "24x32"][..], if content { &["--content", "content.png"] } else { &[] }].concat();
        let sampling = [&flags[..], &["--method", "sample"]].concat();
        let draw = |flags: &[&str], more: &[&str], run: &str| place.draw(&[flags, more].concat(), &format!("{name}_{run}.png"));
        let picture = draw(&sampling, &[], "a");
        assert_eq!(size(&picture), (32, 24));
        drop(draw(&sampling, &["--seed", "42"], "b"));
        // The task's own settings.
        let weight: &[&str] = if content { &["--content-weight", "0.25"] } else { &["--content-weight", "0"] };
        drop(draw(&sampling, &[&["--iterations", "3", "--lr", "0.05"], weight].concat(), "same"));
        let files = place.files();
        for same in ["b", "same"] {
            assert!(files[&format!("{name}_a.png")] == files[&format!("{name}_{same}.png")], "{name}: {same} is another picture");
        }
        for (run, flags, more) in [
            ("optimised", &flags, ["--method", "optimise"].as_slice()),
            ("seed", &sampling, &["--seed", "43"]),
            ("iterations", &sampling, &["--iterations", "1"]),
            ("plain", &sampling, &["--iterations", "0"]),
            ("lr", &sampling, &["--lr", "0.5"]),
            ("style", &sampling, &["--style", "other.png"]),
        ] {
            assert!(differ(&draw(flags, more, run), &picture) > 0.0, "{name}: {run} is the same picture");
        }
        let outcome = place.run(&[&sampling[..], &["--content-weight", "5", "--device", "cpu", "--output", "weight.png"]].concat());
        assert_eq!(outcome.status.code(), Some(0));
        let weighted = image::load(place.path("weight.png")).unwrap();
        assert_eq!(differ(&weighted, &picture) > 0.0, content, "the content loss acts where there is a content, and only there");
        assert_eq!(texts(&outcome).1.contains("WARN --content-weight is without effect"), !content, "{}", texts(&outcome).1);
        let outcome = place.run(&[&sampling[..], weight, &["--smoothing", "1", "--device", "cpu", "--output", "smooth.png"]].concat());
        assert_eq!(outcome.status.code(), Some(0));
        let smooth = image::load(place.path("smooth.png")).unwrap();
        assert_eq!(differ(&smooth, &picture) > 0.0, content);
        assert_eq!(texts(&outcome).1.contains("WARN --smoothing is without effect"), !content, "{}", texts(&outcome).1);
    }
    // 50 steps by itself, where the folder says nothing.
    let outcome = place.run(&["--style", "style.png", "--method", "sample", "--iterations", "0", "--size", "8x8", "--device", "cpu"]);
    finished(&outcome, "out.png");
    assert!(texts(&outcome).1.contains("step 50/50, "), "no loss without a descent");
}

/// A model without a text encoder, and SDXL, whose size and null prompt it is told.
#[test]
fn by_sampling_with_other_models() {
    let place = place();
    let flags = ["--content", "content.png", "--style", "style.png", "--method", "sample", "--steps", "2"];
    let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/mini");
    for (model, name) in [(bundled, "mini.png"), (example::fixture("sdxl"), "sdxl.png")] {
        let picture = place.draw_with(&model, &flags, name, &[name]).remove(0);
        assert_eq!(size(&picture), (48, 40));
    }
}

#[test]
fn a_folders_own_settings_hold() {
    let place = place();
    let copy = ModelCopy::new();
    copy.write("attention_distillation.json", r#"{ "steps": 3, "size": [48, 32], "layers": [12, 16] }"#);
    let outcome = place.run_with(copy.folder(), &["--style", "style.png", "--output", "a.png", "--device", "cpu"]);
    finished(&outcome, "a.png");
    assert!(texts(&outcome).1.contains("step 3/3"));
    assert_eq!(size(&image::load(place.path("a.png")).unwrap()), (32, 48));
    // Flags overrule them.
    let flags = ["--style", "style.png", "--output", "b.png", "--device", "cpu", "--steps", "1", "--size", "16x16"];
    let outcome = place.run_with(copy.folder(), &flags);
    finished(&outcome, "b.png");
    assert!(texts(&outcome).1.contains("step 1/1"));
    assert_eq!(size(&image::load(place.path("b.png")).unwrap()), (16, 16));
    // Sampling has its own.
    copy.write("attention_distillation.json", r#"{ "steps": 3, "size": [48, 32], "style_transfer_by_sampling": { "steps": 4, "iterations": 1 } }"#);
    let flags = ["--style", "style.png", "--output", "c.png", "--device", "cpu"];
    for (method, step) in [("optimise", "step 3/3"), ("sample", "step 4/4")] {
        let outcome = place.run_with(copy.folder(), &[&flags[..], &["--method", method]].concat());
        finished(&outcome, "c.png");
        assert!(texts(&outcome).1.contains(step), "{method}");
    }
}

/// Off unless asked for, by both methods; the flag given last wins over the other and over the folder.
#[test]
fn with_the_styles_statistics() {
    let place = place();
    let copy = ModelCopy::new();
    let draw = |more: &[&str]| {
        let flags = ["--content", "content.png", "--style", "style.png", "--steps", "1", "--iterations", "1", "--size", "32x32"];
        place.draw_with(copy.folder(), &[&flags[..], more].concat(), "out.png", &["out.png"]).remove(0)
    };
    for method in ["optimise", "sample"] {
        let draw = |more: &[&str]| draw(&[&["--method", method], more].concat());
        copy.write("attention_distillation.json", "{}");
        let (plain, moved) = (draw(&[]), draw(&["--adain"]));
        assert!(differ(&plain, &moved) > 0.0, "{method}");
        assert_eq!(differ(&draw(&["--adain", "--no-adain"]), &plain), 0.0, "{method}");
        let task = if method == "optimise" { "style_transfer" } else { "style_transfer_by_sampling" };
        copy.write("attention_distillation.json", format!(r#"{{ "{task}": {{ "adain": true }} }}"#));
        assert_eq!(differ(&draw(&[]), &moved), 0.0, "{method}");
        assert_eq!(differ(&draw(&["--no-adain"]), &plain), 0.0, "{method}");
    }
}

/// Ctrl-C after the first line of progress; by then previews have been written, each of them whole.
#[cfg(unix)]
#[test]
fn ctrl_c_writes_what_there_is() {
    let place = place();
    let flags = ["--content", "content.png", "--style", "style.png", "--steps", "400", "--preview", "3", "--output", "a.png", "--device", "cpu"];
    let mut run = place.watch(&tiny(), &flags);
    assert_eq!(run.until("step 40/400 loss "), ["step 0/400"]);
    let preview = image::load(place.path("a.png")).unwrap();
    assert_eq!(size(&preview), (48, 40));
    run.ctrl_c();
    let (status, stdout, rest) = run.end();
    assert_eq!((status, stdout.as_str()), (Some(0), "a.png\n"), "{rest}");
    let stopped = rest.lines().find_map(|line| line.strip_prefix("stopped after step ")?.strip_suffix(" of 400"));
    let stopped: usize = stopped.unwrap_or_else(|| panic!("it does not say that it was stopped: {rest}")).parse().unwrap();
    assert!((40..400).contains(&stopped), "{stopped}");
    assert_eq!(size(&image::load(place.path("a.png")).unwrap()), (48, 40));
    assert!(place.files().keys().all(|name| !name.contains(".part")));
}

/// As where the output goes to `head`, or to a `tee` that Ctrl-C ends first.
#[cfg(unix)]
#[test]
fn a_reader_of_progress_that_goes_away() {
    let place = place();
    for interrupted in [false, true] {
        // All steps of the second would take many minutes.
        let (steps, iterations) = if interrupted { ("900", "100") } else { ("20", "1") };
        let flags = ["--content", "content.png", "--style", "style.png", "--output", "a.png", "--device", "cpu"];
        let flags = [&flags[..], &["--steps", steps, "--iterations", iterations]].concat();
        let started = std::time::Instant::now();
        let mut run = place.watch(&tiny(), &flags);
        run.until("step ");
        run.turn_away();
        if interrupted {
            run.ctrl_c();
        }
        let (status, stdout, _) = run.end();
        assert_eq!((status, stdout.as_str()), (Some(0), "a.png\n"));
        assert!(started.elapsed().as_secs() < 120, "it went on");
        assert_eq!(size(&image::load(place.path("a.png")).unwrap()), (48, 40));
        fs::remove_file(place.path("a.png")).unwrap();
    }
    // An error, too, ends as an error.
    let mut run = place.watch(&tiny(), &["--style", "no.png"]);
    run.turn_away();
    assert_eq!(run.end().0, Some(1));
}

/// A look at the run is not worth the run.
#[cfg(unix)]
#[test]
fn a_preview_that_cannot_be_written() {
    let place = place();
    fs::create_dir(place.path("folder")).unwrap();
    let flags =
        ["--content", "content.png", "--style", "style.png", "--steps", "900", "--preview", "1", "--output", "folder/a.png", "--device", "cpu"];
    let mut run = place.watch(&tiny(), &flags);
    run.until("step 90/900 ");
    fs::rename(place.path("folder"), place.path("elsewhere")).unwrap();
    run.until("WARN no preview of step ");
    fs::create_dir(place.path("folder")).unwrap();
    run.ctrl_c();
    let (status, stdout, rest) = run.end();
    assert_eq!((status, stdout.as_str()), (Some(0), "folder/a.png\n"), "{rest}");
    assert!(rest.contains("stopped after step "), "{rest}");
    assert_eq!(size(&image::load(place.path("folder/a.png")).unwrap()), (48, 40));
}

/// A loss that is not finite ends the run with its step named, and without a picture.
#[test]
fn a_run_that_explodes() {
    let place = place();
    for lr in ["1e38", "1e300"] {
        let outcome = place.run(&[&QUICK[..4], &["--steps", "5", "--lr", lr, "--output", "a.png", "--device", "cpu"]].concat());
        let (stdout, stderr) = texts(&outcome);
        assert_eq!(outcome.status.code(), Some(1), "{stderr}");
        assert_eq!(stdout, "");
        let (last, progress) = stderr.lines().collect::<Vec<_>>().split_last().map(|(last, rest)| (last.to_string(), rest.join("\n"))).unwrap();
        assert!(last.starts_with("error: ") && last.contains("NaN in step ") && last.contains("learning rate"), "{stderr}");
        assert!(progress.lines().all(|line| line.starts_with("step ")), "{stderr}");
        assert!(place.files().keys().all(|name| name != "a.png" && !name.contains(".part")));
    }
}

// ---- what it refuses

#[test]
fn pictures() {
    let place = place();
    fs::write(place.path("empty.png"), "").unwrap();
    fs::write(place.path("text.png"), "This is no picture.").unwrap();
    let whole = fs::read(place.path("content.png")).unwrap();
    fs::write(place.path("cut.png"), &whole[..whole.len() / 2]).unwrap();
    fs::create_dir(place.path("folder.png")).unwrap();
    for (bad, word) in [
        ("missing.png", "No such file"),
        ("empty.png", "empty"),
        ("text.png", "as a picture"),
        ("cut.png", "picture"),
        ("folder.png", ""),
        ("no/such/folder.png", "No such file"),
    ] {
        place.refused(&["--content", bad, "--style", "style.png", "--steps", "1"], &[bad, word]);
        place.refused(&["--content", "content.png", "--style", "style.png", "--style", bad, "--steps", "1"], &[bad, word]);
    }
    // Sound, but smaller than one latent.
    place.picture("thin.png", 4, 64, 1);
    place.refused(&["--content", "thin.png", "--style", "style.png", "--steps", "1"], &["size", "64x4", "8x8"]);
}

#[test]
fn models() {
    let place = place();
    let refuse = |model: &Path, words: &[&str]| place.refused_with(model, &QUICK, words);
    refuse(&place.path("no-such-model"), &["no-such-model", "no such folder"]);
    fs::create_dir(place.path("empty")).unwrap();
    refuse(&place.path("empty"), &["empty", "unet", "diffusers"]);
    refuse(&place.path("style.png"), &["style.png"]);

    // From the cache alone, which has nothing; a server would not be found.
    #[cfg(feature = "hub")]
    for yes in ["1", "true"] {
        let mut command = place.command(Path::new("owner/name"), &QUICK);
        command.env("HF_HOME", place.path("cache")).env_remove("HF_HUB_CACHE").env_remove("HUGGINGFACE_HUB_CACHE");
        let outcome = command.env("HF_HUB_OFFLINE", yes).env("HF_ENDPOINT", "http://127.0.0.1:1").output().unwrap();
        let (_, stderr) = texts(&outcome);
        assert_eq!(outcome.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("owner/name") && stderr.contains("not cached") && stderr.contains("HF_HUB_OFFLINE"), "{stderr}");
    }

    let copy = ModelCopy::new();
    copy.write("unet/config.json", "[".repeat(100_000));
    refuse(copy.folder(), &["unet/config.json", "not JSON"]);
    copy.restore("unet/config.json");
    let weights = copy.read(model_copy::VAE);
    copy.write(model_copy::VAE, &weights[..weights.len() / 2]);
    refuse(copy.folder(), &[model_copy::VAE, "truncated"]);
    copy.restore(model_copy::VAE);
    copy.write("attention_distillation.json", r#"{ "steps": 0 }"#);
    refuse(copy.folder(), &["attention_distillation.json", "steps"]);
    copy.write("attention_distillation.json", r#"{ "style_transfer_by_sampling": { "steps": 0 } }"#);
    refuse(copy.folder(), &["attention_distillation.json", "style_transfer_by_sampling", "steps"]);
    copy.remove("attention_distillation.json");
    // What an interrupted copy leaves, and another model's encoder.
    fs::create_dir(copy.path("text_encoder_2")).unwrap();
    refuse(copy.folder(), &["tokenizer_2"]);
    copy.put(&example::fixture("sd15/text_encoder"), "text_encoder_2");
    copy.put(&example::fixture("sd15/tokenizer"), "tokenizer_2");
    refuse(copy.folder(), &["text_encoder_2", "SDXL"]);
}

#[test]
fn outputs() {
    let place = place();
    fs::create_dir(place.path("folder.png")).unwrap();
    fs::create_dir(place.path("folder")).unwrap();
    // The sheet over the picture.
    place.refused(&[&QUICK[..], &["--output", "same.png", "--sheet", "./same.png"]].concat(), &["same.png", "--sheet"]);
    // Either over a picture that is read: by its name, by another way there, by a link's name and by what that stands for.
    let mut inputs = vec!["content.png", "style.png", "./style.png", "folder/../content.png"];
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("content.png", place.path("link.png")).unwrap();
        inputs.push("link.png");
    }
    for flag in ["--output", "--sheet"] {
        for input in &inputs {
            let content = if *input == "link.png" { input } else { "content.png" };
            place.refused(&["--content", content, "--style", "style.png", flag, input], &[input, "is read by this run"]);
        }
        #[cfg(unix)]
        place.refused(&["--content", "link.png", "--style", "style.png", flag, "content.png"], &["content.png", "is read by this run"]);
        for (bad, word) in [
            ("no/such/folder/out.png", "does not exist"),
            ("out.gif", "gif"),
            ("out.webp", ".png or .jpg"),
            ("out", ".png or .jpg"),
            (".png", ".png or .jpg"),
            ("folder.png", "name a file in it"),
            ("folder", "name a file in it"),
            ("style.png/out.png", "style.png"),
        ] {
            place.refused(&[&QUICK[..], &[flag, bad]].concat(), &[bad, word]);
        }
        // Nobody may write there, whatever its permissions say; known before a model is opened.
        #[cfg(target_os = "linux")]
        place.refused_with(&place.path("no_model"), &[&QUICK[..], &[flag, "/proc/out.png"]].concat(), &["/proc/out.png"]);
    }
    place.refused_with(&place.path("no_model"), &[&QUICK[..], &["--vae", "no_vae"]].concat(), &["no_vae"]);
}

#[test]
fn settings() {
    let place = place();
    let refuse = |more: &[&str], words: &[&str]| {
        place.refused(&[&QUICK[..4], more].concat(), words);
    };
    refuse(&["--size", "0x0"], &["size", "0x0"]);
    refuse(&["--size", "64x0"], &["size", "64x0"]);
    refuse(&["--size", "99999x99999"], &["size", "99999x99999", "too large"]);
    refuse(&["--size", "9223372036854775807x9223372036854775807"], &["size", "too large"]);
    refuse(&["--size", "7x7"], &["size", "7x7", "8x8"]);
    refuse(&["--steps", "0"], &["steps", "0"]);
    refuse(&["--steps", "1001"], &["steps", "1001", "1000"]);
    refuse(&["--steps", "18446744073709551615"], &["steps", "18446744073709551615"]);
    refuse(&["--iterations", "0"], &["iterations", "0"]);
    for number in ["NaN", "inf", "-0.5", "1e999"] {
        refuse(&["--lr", number], &["learning rate", "at least 0"]);
        refuse(&["--content-weight", number], &["content weight", "at least 0"]);
        refuse(&["--smoothing", number], &["smoothing", "from 0 to 1"]);
    }
    refuse(&["--lr=-inf"], &["learning rate", "-inf"]);
    refuse(&["--layers", "5..3"], &["layers", "5..3"]);
    refuse(&["--layers", "3..3"], &["layers", "3..3"]);
    refuse(&["--layers", "0..999", "--steps", "2"], &["layers", "0..999", "16"]);
    refuse(&["--layers", "16..17", "--steps", "2"], &["layers", "16..17", "16"]);
    refuse(&["--dtype", "f64"], &["dtype", "f64", "bf16"]);
    refuse(&["--dtype", ""], &["dtype", "f32"]);
    refuse(&["--vae-dtype", "f64"], &["dtype", "f64", "bf16"]);
    refuse(&["--device", "foo"], &["device", "foo", "cuda:N"]);
    refuse(&["--device", "cuda:x"], &["device", "cuda:x"]);
    refuse(&["--method", "sample", "--steps", "0"], &["steps", "0"]);
    refuse(&["--method", "sample", "--lr", "NaN"], &["learning rate", "at least 0"]);
}

#[test]
fn cuda_where_there_is_none() {
    let place = place();
    match device::parse("cuda") {
        Ok(_) => {
            // Not by `eprintln!`, which is shown for failed tests only.
            std::io::stderr().write_all(b"partly skipped: there is a GPU here\n").unwrap();
            place.refused(&[&QUICK[..], &["--device", "cuda:4095"]].concat(), &["device", "cuda:4095"]);
        }
        Err(_) => {
            for name in ["cuda", "cuda:0", "cuda:1"] {
                let line = place.refused(&[&QUICK[..], &["--device", name]].concat(), &["device", name]);
                assert!(line.contains("--device cpu") || line.contains("driver"), "what to do: {line}");
            }
        }
    }
}

#[test]
fn wrong_arguments() {
    let place = place();
    let misuse = |more: &[&str], words: &[&str]| place.misused(&[&QUICK[..4], more].concat(), words);
    for bad in ["abc", "64", "64x", "64x64x64", "64.5x64"] {
        misuse(&["--size", bad], &["--size", "512x384"]);
    }
    for bad in ["abc", "3", "3..", "3..=9", "-1..3"] {
        misuse(&[&format!("--layers={bad}")], &["--layers", "10..16"]);
    }
    for flag in ["--steps", "--iterations", "--preview", "--seed"] {
        misuse(&[flag, "1.5"], &[flag, "1.5"]);
    }
    misuse(&["--steps=-1"], &["--steps", "-1"]);
    misuse(&["--preview", "0"], &["--preview", "0"]);
    misuse(&["--preview=-1"], &["--preview", "-1"]);
    misuse(&["--lr", "fast"], &["--lr", "fast"]);
    misuse(&["--method", "other"], &["--method", "optimise", "sample"]);
    misuse(&["--unheard-of"], &["--unheard-of"]);
    misuse(&["--content", "content.png"], &["--content"]);
    misuse(&["--output", ""], &["--output"]);
    misuse(&["stray"], &["stray"]);
    place.misused(&["--content", "content.png"], &["--style"]);
    place.misused(&["--content", "content.png", "--style"], &["--style"]);
}
