//! What prompts become: conditions, negatives, and what stays when the text encoders are gone.
#![cfg(feature = "stable-diffusion")]
#![allow(clippy::disallowed_methods, clippy::unwrap_used, missing_docs)]

mod common;

use attention_distillation::{Error, StableDiffusion};
use common::fixture;
use tch::{Device, Kind, Tensor};

const SIZE: (i64, i64) = (64, 80);

fn open(folder: &str) -> StableDiffusion {
    StableDiffusion::open(fixture(folder), Device::Cpu, Kind::Float).unwrap()
}

fn same(a: &Tensor, b: &Tensor) -> bool {
    a.size() == b.size() && a.equal(b)
}

#[test]
fn one_picture_for_each_prompt() {
    for (folder, xl) in [("sd15", false), ("sdxl", true)] {
        let model = open(folder);
        assert_eq!(model.is_xl(), xl);
        let both = model.prompts(&["a mill", "three geese"], SIZE).unwrap();
        for (i, prompt) in ["a mill", "three geese"].iter().enumerate() {
            let one = model.prompts(&[prompt], SIZE).unwrap();
            let row = both.text.narrow(0, i as i64, 1);
            assert!((&row - &one.text).abs().max().double_value(&[]) < 1e-5, "{folder} {prompt}");
            assert_eq!(one.pooled.is_some(), xl);
        }
        let ids = both.time_ids.map(|ids| Vec::<f32>::try_from(ids.flatten(0, 1)).unwrap());
        assert_eq!(ids, xl.then(|| [64.0, 80.0, 0.0, 0.0, 64.0, 80.0].repeat(2)));
    }
}

#[test]
fn a_long_prompt_is_cut() {
    let model = open("sdxl");
    let words = |count: usize| "one ".repeat(count);
    let (long, longer) = (model.prompts(&[words(90)], SIZE).unwrap(), model.prompts(&[words(200)], SIZE).unwrap());
    assert_eq!(long.text.size()[1], 77);
    assert!(same(&long.text, &longer.text) && same(&long.pooled.unwrap(), &longer.pooled.unwrap()));
}

#[test]
fn an_absent_negative_is_empty_or_zeros() {
    let (sd15, sdxl) = (open("sd15"), open("sdxl"));
    let negative = |model: &StableDiffusion, text: Option<&str>| model.guidance(&["a mill"], text, 7.0, SIZE).unwrap().negative.unwrap();
    let empty = |model: &StableDiffusion| model.prompts(&[""], SIZE).unwrap();
    assert!(same(&negative(&sd15, None).text, &empty(&sd15).text));
    let zeros = negative(&sdxl, None);
    assert_eq!(zeros.text.abs().max().double_value(&[]), 0.0);
    assert_eq!(zeros.pooled.unwrap().abs().max().double_value(&[]), 0.0);
    assert!(same(&zeros.time_ids.unwrap(), &empty(&sdxl).time_ids.unwrap()), "the size is told all the same");
    let said = negative(&sdxl, Some(""));
    assert!(same(&said.text, &empty(&sdxl).text) && same(&said.pooled.unwrap(), &empty(&sdxl).pooled.unwrap()));
    let frost = negative(&sdxl, Some("frost"));
    assert!(same(&frost.text, &sdxl.prompts(&["frost"], SIZE).unwrap().text));
}

/// It stays, whatever its effect: scale and controls may change later. Where it says what all prompts say it is their condition, and
/// one of them alone is not enough for that.
#[test]
fn there_is_always_a_negative() {
    let (sd15, sdxl) = (open("sd15"), open("sdxl"));
    for (model, prompts, negative, scale, shared) in [
        (&sd15, &["a mill"][..], Some("frost"), 1.0, false),
        (&sd15, &["a mill"], Some("frost"), 0.0, false),
        (&sd15, &["", ""], None, 7.5, true),
        (&sd15, &["", "a mill"], None, 7.5, false),
        (&sd15, &["frost", "frost"], Some("frost"), 7.5, true),
        (&sd15, &["frost", "a mill"], Some("frost"), 7.5, false),
        (&sd15, &["a mill", "frost"], Some("frost"), 7.5, false),
        (&sdxl, &[""], Some(""), 7.5, true),
        (&sdxl, &["", "a mill"], Some(""), 7.5, false),
    ] {
        let guidance = model.guidance(prompts, negative, scale, SIZE).unwrap();
        let (prompt, found) = (guidance.prompt, guidance.negative.unwrap());
        let case = format!("{prompts:?} {negative:?} {scale}");
        assert_eq!(found.text.data_ptr() == prompt.text.data_ptr(), shared, "{case}");
        if shared {
            assert_eq!(found.text.size(), prompt.text.size(), "{case}");
        }
        // One for all of them, or each its own copy.
        let wanted = model.prompts(&vec![negative.unwrap_or(""); if shared { prompts.len() } else { 1 }], SIZE).unwrap();
        assert!(same(&found.text, &wanted.text), "{case}");
        assert!(found.pooled.zip(wanted.pooled).is_none_or(|(found, wanted)| same(&found, &wanted)), "{case}");
    }
    // Zeros, which are not what the empty prompt says.
    let zeros = sdxl.guidance(&[""], None, 7.5, SIZE).unwrap();
    let found = zeros.negative.unwrap();
    assert!(found.text.abs().max().double_value(&[]) == 0.0 && !same(&found.text, &zeros.prompt.text));
    for scale in [f64::NAN, f64::INFINITY, -0.5] {
        assert!(matches!(sd15.guidance(&["a mill"], None, scale, SIZE), Err(Error::Argument { argument: "guidance", .. })));
    }
    assert!(matches!(sd15.guidance::<&str>(&[], None, 7.5, SIZE), Err(Error::Argument { argument: "prompts", .. })));
}

#[test]
fn the_null_prompt_outlives_the_encoders() {
    for folder in ["sd15", "sdxl"] {
        let mut model = open(folder);
        let before = model.extractor(SIZE).unwrap().condition;
        let negative = model.guidance(&["a mill"], None, 7.0, SIZE).unwrap().negative.unwrap();
        model.drop_text_encoders().unwrap();
        // Again is nothing new.
        model.drop_text_encoders().unwrap();
        let after = model.extractor(SIZE).unwrap().condition;
        assert!(same(&before.text, &after.text), "{folder}");
        assert_eq!(before.pooled.is_some(), after.pooled.is_some());
        assert!(before.pooled.zip(after.pooled).is_none_or(|(a, b)| same(&a, &b)));
        assert!(before.time_ids.zip(after.time_ids).is_none_or(|(a, b)| same(&a, &b)));
        let error = model.prompts(&["a mill"], SIZE).unwrap_err().to_string();
        assert!(error.contains("a mill") && error.contains("dropped"), "{error}");
        assert_eq!(model.prompts(&["", ""], SIZE).unwrap().text.size()[0], 2);
        let still = model.guidance(&[""], None, 7.0, SIZE).unwrap().negative.unwrap();
        assert!(same(&still.text, &negative.text));
    }
}

#[test]
fn a_model_without_encoders_knows_the_empty_prompt_only() {
    let mut model = open("../../assets/mini");
    assert_eq!(model.prompts(&["", ""], SIZE).unwrap().text.abs().max().double_value(&[]), 0.0);
    for refused in [model.prompts(&["", "a mill"], SIZE).map(drop), model.guidance(&[""], Some("frost"), 7.0, SIZE).map(drop)] {
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("no text encoder"), "{error}");
    }
    model.drop_text_encoders().unwrap();
    assert!(model.extractor(SIZE).is_ok());
}
