//! The example programs `texture_synthesis`, `edit_texture` and `texture_expansion` from their command lines, on a tiny model:
//! what they write, print and refuse.
#![cfg(feature = "stable-diffusion")]
#![allow(clippy::disallowed_methods, clippy::unwrap_used, missing_docs)]

mod example;

use attention_distillation::image;
use example::{differ, finished, size, texts, tiny, Place};
use std::fs;
use tch::{Kind, Tensor};

const STYLE: [&str; 2] = ["--style", "style.png"];
/// Two steps at 32 x 32 pixels.
const QUICK: [&str; 6] = ["--steps", "2", "--size", "32x32", "--style", "style.png"];
const EDIT: [&str; 8] = ["--steps", "4", "--size", "32x32", "--style", "style.png", "--layout", "content.png"];
/// Four windows of 8 x 8 latents in two batches, on a canvas larger than the model's 64 x 64 pixels.
const EXPANSION: [&str; 12] = ["--steps", "1", "--size", "96x96", "--style", "style.png", "--window", "8", "--stride", "4", "--view-batch", "2"];

const RED: [f32; 3] = [1.0, 0.0, 0.0];
const GREEN: [f32; 3] = [0.0, 1.0, 0.0];
const BLUE: [f32; 3] = [0.0, 0.0, 1.0];

/// Each with flags for a quick run.
fn all() -> [(Place, &'static [&'static str]); 3] {
    [("texture_synthesis", &QUICK[..]), ("edit_texture", &EDIT), ("texture_expansion", &EXPANSION)]
        .map(|(example, flags)| (Place::of(example), flags))
}

/// A picture of 32 x 32 pixels whose halves have these colours.
fn halves(left: [f32; 3], right: [f32; 3]) -> Tensor {
    let half = |colour: [f32; 3]| Tensor::from_slice(&colour).view([1, 3, 1, 1]).expand([1, 3, 32, 16], false);
    Tensor::cat(&[half(left), half(right)], 3)
}

/// With masks in it, and `halves.png`, a style that looks as `red_blue.png` does.
fn place_with_masks(example: &str) -> Place {
    let place = Place::of(example);
    for (name, left, right) in [
        ("halves.png", RED, BLUE),
        ("red_blue.png", RED, BLUE),
        ("blue_red.png", BLUE, RED),
        ("red_green.png", RED, GREEN),
        ("green.png", GREEN, GREEN),
        ("grey.png", [0.2; 3], [0.2; 3]),
        ("red_grey.png", RED, [0.4; 3]),
    ] {
        image::save(&halves(left, right), place.path(name)).unwrap();
    }
    // Waves have many colours, as soft edges in a JPEG do.
    place.picture("mask.jpg", 64, 64, 5);
    place
}

/// `(name, expected to be equal, flags more)`: each compared with the picture without them.
#[track_caller]
fn compare(place: &Place, flags: &[&str], cases: &[(&str, bool, &[&str])]) {
    let picture = place.draw(flags, "picture.png");
    for (name, same, more) in cases {
        let other = place.draw(&[flags, more].concat(), &format!("{name}.png"));
        assert_eq!(differ(&other, &picture) == 0.0, *same, "{name}: {more:?}");
    }
}

// ---- all three

#[test]
fn each_writes_its_picture_and_prints_the_path_last() {
    for (place, flags) in all() {
        let outcome = place.run(&[flags, &["--device", "cpu", "--output", "picture.png"]].concat());
        finished(&outcome, "picture.png");
        let (stdout, stderr) = texts(&outcome);
        assert_eq!(stdout, "picture.png\n");
        let steps = flags[1];
        assert!(stderr.lines().any(|line| line.starts_with(&format!("step {steps}/{steps} loss "))), "{stderr}");
        let side = if flags[3] == "96x96" { 96 } else { 32 };
        assert_eq!(size(&image::load(place.path("picture.png")).unwrap()), (side, side));
        // The same seed, the same bytes; another, another picture; and a sheet changes nothing.
        drop(place.draw(&[flags, &["--seed", "42", "--sheet", "sheet.png"]].concat(), "same.png"));
        drop(place.draw(&[flags, &["--seed", "43"]].concat(), "other_seed.png"));
        let files = place.files();
        assert!(files["picture.png"] == files["same.png"], "{flags:?}: the same seed, another picture");
        assert!(files["picture.png"] != files["other_seed.png"], "{flags:?}: another seed, the same picture");
        let (height, width) = size(&image::load(place.path("sheet.png")).unwrap());
        assert!(height == side && width > side + 8, "{width}x{height}");
    }
}

#[test]
fn each_refuses_bad_files_and_numbers() {
    for (place, flags) in all() {
        fs::write(place.path("text.png"), "This is no picture.").unwrap();
        let refuse = |more: &[&str], words: &[&str]| drop(place.refused(&[flags, more].concat(), words));
        for bad in ["missing.png", "text.png"] {
            refuse(&["--style", bad], &[bad]);
        }
        refuse(&["--output", "out.gif"], &["out.gif", ".png or .jpg"]);
        refuse(&["--sheet", "no/such/sheet.png"], &["sheet.png"]);
        refuse(&["--output", "style.png"], &["style.png", "is read by this run"]);
        refuse(&["--lr", "NaN"], &["learning rate"]);
        place.refused_with(&place.path("no_model"), flags, &["no_model"]);
        place.misused(&flags[..4], &["--style"]);
        place.misused(&[&flags[4..], &["--size", "32"]].concat(), &["--size", "WIDTHxHEIGHT"]);
    }
    let place = Place::of("edit_texture");
    place.refused(&[&QUICK[..], &["--layout", "missing.png"]].concat(), &["missing.png"]);
    place.refused(&[&QUICK[..], &["--layout", "other.png", "--output", "other.png"]].concat(), &["other.png", "is read by this run"]);
}

#[test]
fn wrong_arguments() {
    for (example, flags) in [("texture_synthesis", &QUICK[..]), ("texture_expansion", &EXPANSION)] {
        let place = Place::of(example);
        let misuse = |more: &[&str], words: &[&str]| place.misused(&[flags, more].concat(), words);
        misuse(&["--style-mask", "style.png"], &["--target-mask"]);
        misuse(&["--target-mask", "style.png"], &["--style-mask"]);
        misuse(&["--allow-missing-labels"], &["--target-mask"]);
    }
    let place = Place::of("texture_synthesis");
    let misuse = |more: &[&str], words: &[&str]| place.misused(&[&QUICK[..], more].concat(), words);
    misuse(&["--no-fill"], &["--target-mask"]);
    misuse(&["--method", "guess"], &["--method", "optimise", "sample"]);
    misuse(&["--tile", "diagonal"], &["--tile", "both"]);
    misuse(&["--count", "0"], &["--count"]);
    let place = Place::of("edit_texture");
    place.misused(&QUICK, &["--layout"]);
    place.misused(&[&EDIT[..], &["--strength", "much"]].concat(), &["--strength"]);
    let place = Place::of("texture_expansion");
    for flag in ["--window", "--stride", "--view-batch"] {
        place.misused(&[&QUICK[..], &[flag, "1.5"]].concat(), &[flag]);
    }
}

/// What does nothing, or not quite what it should, says so; the picture is as without.
#[test]
fn flags_that_warn() {
    let (synthesis, expansion) = (place_with_masks("texture_synthesis"), place_with_masks("texture_expansion"));
    let masks = ["--style-mask", "red_blue.png", "--target-mask", "blue_red.png"];
    let no_fill = [&masks[..], &["--no-fill"]].concat();
    for (place, flags, more) in [
        (&synthesis, &QUICK[..], [].as_slice()),
        (&synthesis, &QUICK, &["--method", "sample"]),
        (&synthesis, &QUICK, &no_fill),
        (&expansion, &EXPANSION, &[]),
        (&expansion, &EXPANSION, &masks),
    ] {
        let flags = [flags, more].concat();
        let plain = place.draw(&[&flags[..], &["--content-weight", "0"]].concat(), "plain.png");
        let given = ["--content-weight", "0.5", "--smoothing", "0.5", "--device", "cpu", "--output", "warned.png"];
        let stderr = texts(&place.run(&[&flags[..], &given].concat())).1;
        for flag in ["--content-weight", "--smoothing"] {
            assert_eq!(stderr.matches(&format!("WARN {flag} is without effect")).count(), 1, "{flags:?}: {stderr}");
        }
        assert_eq!(differ(&image::load(place.path("warned.png")).unwrap(), &plain), 0.0, "{flags:?}");
    }
    for (size, tile, warns) in [("64x32", "x", false), ("32x64", "x", true), ("64x32", "y", true), ("64x96", "both", true), ("40x48", "none", false)]
    {
        let flags = ["--steps", "1", "--style", "style.png", "--size", size, "--tile", tile, "--device", "cpu", "--output", "tile.png"];
        let outcome = synthesis.run(&flags);
        let (stdout, stderr) = texts(&outcome);
        assert_eq!(stdout, "tile.png\n", "{stderr}");
        let words = format!("WARN {size} may show a slight seam: borders meet best where sides are multiples of 64 pixels");
        assert_eq!((stderr.contains(&words), stderr.contains("WARN")), (warns, warns), "{flags:?}: {stderr}");
    }
}

// ---- synthesis

#[test]
fn methods_and_counts() {
    let place = Place::of("texture_synthesis");
    let cases: [(&str, bool, &[&str]); 5] = [
        ("optimise", true, &["--method", "optimise"]),
        ("sample", false, &["--method", "sample"]),
        ("two_styles", false, &["--style", "other.png"]),
        ("adain", false, &["--adain"]),
        ("no_adain", true, &["--no-adain"]),
    ];
    compare(&place, &QUICK, &cases);
    let names = ["a-0.png", "a-1.png", "a-2.png"];
    for method in ["optimise", "sample"] {
        let pictures = place.draw_with(&tiny(), &[&QUICK[..], &["--count", "3", "--method", method]].concat(), "a.png", &names);
        assert!((0..3).all(|i| (0..i).all(|j| differ(&pictures[i], &pictures[j]) > 0.0)), "{method}");
    }
    // The model's own size.
    assert_eq!(size(&place.draw(&[&STYLE[..], &["--steps", "1"]].concat(), "square.png")), (64, 64));
}

#[test]
fn tiles() {
    let place = Place::of("texture_synthesis");
    for method in ["optimise", "sample"] {
        // The least side of which its network's deepest layer sees a whole place.
        let flags = ["--steps", "2", "--size", "64x64", "--style", "style.png", "--method", method, "--sheet", "sheet.png"];
        let mut pictures = vec![];
        for tile in ["none", "x", "y", "both"] {
            pictures.push(place.draw(&[&flags[..], &["--tile", tile]].concat(), &format!("{method}_{tile}.png")));
        }
        assert!((0..4).all(|i| (0..i).all(|j| differ(&pictures[i], &pictures[j]) > 0.0)), "{method}");
        // The style, and the result twice in each direction.
        let sheet = image::load(place.path("sheet.png")).unwrap();
        let (height, width) = size(&sheet);
        assert_eq!(height, 128);
        assert_eq!(differ(&sheet.narrow(3, width - 128, 128), &pictures[3].repeat([1, 1, 2, 2])), 0.0, "{method}");
    }
}

/// The layout stands between styles and result in the sheet.
#[track_caller]
fn layout(place: &Place, flags: &[&str], styles: i64) -> Tensor {
    let picture = place.draw(&[&["--steps", "1", "--size", "32x32", "--sheet", "sheet.png"], flags].concat(), "laid_out.png");
    let sheet = image::load(place.path("sheet.png")).unwrap();
    assert_eq!(size(&sheet), (32, (styles + 2) * 40 - 8));
    assert_eq!(differ(&sheet.narrow(3, (styles + 1) * 40, 32), &picture), 0.0);
    sheet.narrow(3, styles * 40, 32)
}

#[test]
fn masks() {
    let place = place_with_masks("texture_synthesis");
    let masks = ["--style-mask", "red_blue.png", "--target-mask", "blue_red.png"];
    let flags = [&QUICK[..], &masks].concat();
    let cases: [(&str, bool, &[&str]); 5] = [
        ("allowed", true, &["--allow-missing-labels"]),
        // Of style transfer, as a layout has to hold.
        ("content_weight_same", true, &["--content-weight", "0.25"]),
        ("content_weight", false, &["--content-weight", "0"]),
        ("no_fill", false, &["--no-fill"]),
        ("sample", false, &["--method", "sample"]),
    ];
    compare(&place, &flags, &cases);
    let sampled = image::load(place.path("sample.png")).unwrap();
    let no_fill = image::load(place.path("no_fill.png")).unwrap();
    assert!(differ(&place.draw(&QUICK, "plain.png"), &no_fill) > 0.0, "masks without a filled layout have no effect");
    let sampled_no_fill = place.draw(&[&flags[..], &["--method", "sample", "--no-fill"]].concat(), "sampled_no_fill.png");
    assert!(differ(&sampled, &sampled_no_fill) > 0.0);
    // One layout, several pictures.
    let pictures = place.draw_with(&tiny(), &[&flags[..], &["--count", "2"]].concat(), "a.png", &["a-0.png", "a-1.png"]);
    assert!(differ(&pictures[0], &pictures[1]) > 0.0);
    // Swapped regions, swapped colours.
    assert_eq!(differ(&layout(&place, &[&["--style", "halves.png"], &masks[..]].concat(), 1), &halves(BLUE, RED)), 0.0);
}

#[test]
fn colours_that_no_style_mask_has() {
    let place = place_with_masks("texture_synthesis");
    let refuse = |more: &[&str], words: &[&str]| drop(place.refused(&[&QUICK[..], more].concat(), words));
    for (target, colour) in [("red_green.png", "#00ff00"), ("red_grey.png", "#666666")] {
        let flags = ["--style-mask", "red_blue.png", "--target-mask", target];
        refuse(&flags, &[target, colour, "--allow-missing-labels"]);
        refuse(&[&flags[..], &["--no-fill"]].concat(), &[target, colour]);
        drop(place.draw(&[&QUICK[..], &flags, &["--no-fill", "--allow-missing-labels"]].concat(), &format!("no_fill_{target}")));
        // Filled from the whole of the style.
        let filled = layout(&place, &[&["--style", "halves.png", "--allow-missing-labels"], &flags[..]].concat(), 1);
        assert_eq!(differ(&filled.narrow(3, 0, 16), &halves(RED, RED).narrow(3, 0, 16)), 0.0);
        let share = |channel: i64| filled.narrow(3, 16, 16).narrow(1, channel, 1).mean(Kind::Float).double_value(&[]);
        assert!((0.3..0.7).contains(&share(0)) && share(1) == 0.0 && (0.3..0.7).contains(&share(2)), "{} {}", share(0), share(2));
    }
}

/// Each region is of those styles that have its colour.
#[test]
fn masks_of_several_styles() {
    let place = place_with_masks("texture_synthesis");
    let styles = ["--style", "halves.png", "--style", "grey.png"];
    let flags = ["--style-mask", "red_blue.png", "--style-mask", "green.png", "--target-mask", "red_green.png"];
    let filled = layout(&place, &[&styles[..], &flags].concat(), 2);
    assert_eq!(differ(&filled, &halves(RED, [0.2; 3])), 0.0);
    let refuse = |more: &[&str], words: &[&str]| drop(place.refused(&[&QUICK[..4], more].concat(), words));
    refuse(&[&styles[..], &flags[..2], &flags[4..]].concat(), &["style masks", "1 are given", "2 styles"]);
    refuse(&[&styles[..2], &flags].concat(), &["style masks", "2 are given", "1 style"]);
}

#[test]
fn masks_that_are_none() {
    for (example, flags) in [("texture_synthesis", &QUICK[..]), ("texture_expansion", &EXPANSION)] {
        let place = place_with_masks(example);
        for (bad, words) in [("mask.jpg", &["mask.jpg", "colours are too many", "PNG"][..]), ("missing.png", &["missing.png"])] {
            for (style, target) in [(bad, "red_blue.png"), ("red_blue.png", bad)] {
                place.refused(&[flags, &["--style-mask", style, "--target-mask", target]].concat(), words);
            }
        }
        let masks = ["--style-mask", "red_blue.png", "--target-mask", "blue_red.png"];
        for (flag, mask) in [("--output", "red_blue.png"), ("--sheet", "blue_red.png")] {
            place.refused(&[flags, &masks, &[flag, mask]].concat(), &[mask, "is read by this run"]);
        }
    }
}

// ---- edits

#[test]
fn edits() {
    let place = Place::of("edit_texture");
    let cases: [(&str, bool, &[&str]); 6] = [
        ("same", true, &["--strength", "0.6"]),
        ("little", false, &["--strength", "0.25"]),
        ("all", false, &["--strength", "1"]),
        ("content_weight", false, &["--content-weight", "0"]),
        ("of_another_style", false, &["--style", "other.png"]),
        ("iterations", false, &["--iterations", "1"]),
    ];
    compare(&place, &EDIT, &cases);
    let load = |name: &str| image::load(place.path(name)).unwrap();
    assert!(differ(&load("little.png"), &load("all.png")) > 0.0);
    // The last quarter of four steps is one.
    let outcome = place.run(&[&EDIT[..], &["--strength", "0.25", "--device", "cpu", "--output", "again.png"]].concat());
    let steps: Vec<String> = texts(&outcome).1.lines().map(|line| line.chars().take(8).collect()).collect();
    assert_eq!(steps, ["step 3/4", "step 4/4"]);
    // Another layout, and its size.
    let own = place.draw(&["--steps", "2", "--style", "style.png", "--layout", "content.png"], "own.png");
    assert_eq!(size(&own), (48, 40));
    let flags = [&QUICK[..], &["--layout", "other.png"]].concat();
    assert!(differ(&place.draw(&[&QUICK[..], &["--layout", "content.png"]].concat(), "c.png"), &place.draw(&flags, "o.png")) > 0.0);

    for bad in ["0", "1.5", "NaN", "-1", "inf"] {
        // Before a model is opened.
        place.refused_with(&place.path("no_model"), &[&EDIT[..], &["--strength", bad]].concat(), &["strength", bad]);
    }
}

// ---- expansions

#[test]
fn expansions() {
    let place = Place::of("texture_expansion");
    let cases: [(&str, bool, &[&str]); 6] = [
        ("iterations_same", true, &["--iterations", "2"]),
        ("reference_per_batch", false, &["--reference-per-batch"]),
        ("stride", false, &["--stride", "2"]),
        // One window is larger than the canvas.
        ("window", false, &["--window", "64"]),
        ("of_another_style", false, &["--style", "other.png"]),
        ("iterations", false, &["--iterations", "1"]),
    ];
    // A flag takes one value, so those that change are left out of the others.
    let bare = &EXPANSION[..6];
    let picture = place.draw(&EXPANSION, "expanded.png");
    for (name, same, more) in cases {
        let usual = [("--window", "8"), ("--stride", "4"), ("--view-batch", "2")].into_iter().filter(|(flag, _)| !more.contains(flag));
        let usual: Vec<&str> = usual.flat_map(|(flag, value)| [flag, value]).collect();
        let other = place.draw(&[bare, &usual, more].concat(), &format!("{name}.png"));
        assert_eq!(size(&other), (96, 96));
        assert_eq!(differ(&other, &picture) == 0.0, same, "{name}: {more:?}");
    }
    // How many windows go together is without effect, but for roundings.
    let single = place.draw(&[&EXPANSION[..10], &["--view-batch", "1"]].concat(), "single.png");
    assert!((single - picture).abs().mean(Kind::Float).double_value(&[]) < 0.02);
    // A canvas of a shape of its own; one that no whole number of windows covers.
    let windows = ["--steps", "1", "--style", "style.png", "--window", "8", "--stride", "4"];
    for (wanted, expected) in [("120x40", (40, 120)), ("75x66", (64, 72)), ("32x32", (32, 32))] {
        assert_eq!(size(&place.draw(&[&windows[..], &["--size", wanted]].concat(), &format!("{wanted}.png"))), expected);
    }
    let refuse = |flags: &[&str], words: &[&str]| drop(place.refused(&[bare, flags].concat(), words));
    if fs::exists("/proc/meminfo").unwrap() {
        // Each window at once: 130 TiB.
        let flags = ["--steps", "1", "--style", "style.png", "--size", "8192x8192", "--stride", "1", "--view-batch", "1000000", "--window", "64"];
        place.refused(&[&flags[..], &["--device", "cpu"]].concat(), &["8192x8192", "923521 windows", "GiB"]);
    }
    refuse(&["--window", "8", "--stride", "9"], &["stride", "9", "1..=8"]);
    refuse(&["--window", "8", "--stride", "0"], &["stride", "0", "1..=8"]);
    // Before the model is known, up to what is usual.
    refuse(&["--stride", "0"], &["stride", "0", "1..=64"]);
    // The model's own window, which may be larger than what is usual.
    refuse(&["--stride", "96"], &["stride", "96", "1..=8"]);
    refuse(&["--window", "0", "--stride", "1"], &["window size", "0"]);
    refuse(&["--view-batch", "0"], &["window batch", "0"]);
}

/// One border after the other: each flag another picture, and its sheet shows it laid 2x2.
#[test]
fn expansions_that_tile() {
    let place = Place::of("texture_expansion");
    let draw = |tile: &str, name: &str| place.draw(&[&EXPANSION[..], &["--tile", tile, "--sheet", "sheet.png"]].concat(), name);
    let pictures = ["none", "x", "y", "both"].map(|tile| (tile, draw(tile, &format!("{tile}.png")), image::load(place.path("sheet.png")).unwrap()));
    for (i, (tile, picture, sheet)) in pictures.iter().enumerate() {
        assert!(pictures[..i].iter().all(|(_, other, _)| differ(picture, other) > 0.0), "{tile}");
        assert_eq!(size(sheet).0, if *tile == "none" { 96 } else { 192 }, "{tile}");
    }
    assert_eq!(differ(&pictures[0].1, &place.draw(&EXPANSION, "plain.png")), 0.0);
    assert_eq!(differ(&pictures[1].1, &place.draw(&[&EXPANSION[..], &["--seamless", "x"]].concat(), "seamless.png")), 0.0);
    place.misused(&[&EXPANSION[..], &["--tile", "diagonal"]].concat(), &["--tile", "both"]);
}

#[test]
fn masks_in_an_expansion() {
    let place = place_with_masks("texture_expansion");
    let mask = ["--style-mask", "red_blue.png"];
    let draw = |flags: &[&str], name: &str| place.draw(&[&EXPANSION[..], flags].concat(), name);
    let with = |target: &'static str, name: &str| draw(&[&mask[..], &["--target-mask", target]].concat(), name);
    let [plain, ours, swapped] = [draw(&[], "plain.png"), with("red_blue.png", "ours.png"), with("blue_red.png", "swapped.png")];
    assert!(differ(&plain, &ours) > 0.0 && differ(&ours, &swapped) > 0.0 && differ(&plain, &swapped) > 0.0);
    // The layout's own size, where no flag says another.
    let windows = ["--steps", "1", "--style", "style.png", "--window", "8", "--stride", "4"];
    image::save(&halves(RED, BLUE).repeat([1, 1, 1, 3]), place.path("wide.png")).unwrap();
    let wide = place.draw(&[&windows[..], &mask, &["--target-mask", "wide.png"]].concat(), "of_wide.png");
    assert_eq!(size(&wide), (32, 96));
    let flags = [&mask[..], &["--target-mask", "red_green.png"]].concat();
    place.refused(&[&EXPANSION[..], &flags].concat(), &["red_green.png", "#00ff00"]);
    assert!(differ(&draw(&[&flags[..], &["--allow-missing-labels"]].concat(), "allowed.png"), &ours) > 0.0);
    place.refused(&[&EXPANSION[..], &["--style", "other.png"], &flags[..]].concat(), &["style masks", "1 are given", "2 styles"]);
}
