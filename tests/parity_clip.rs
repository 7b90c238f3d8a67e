//! CLIP's tokenizer and text encoder against transformers.
#![cfg(feature = "stable-diffusion")]
#![allow(clippy::disallowed_methods)] // A test may panic.

mod common;

use attention_distillation::stable_diffusion::{ClipTextModel, ClipTokenizer};
use common::{fixture, Comparison, Expected, ACTIVATIONS};
use tch::{Device, Kind};

fn hidden_states(folder: &str, name: &str) {
    let model = ClipTextModel::open(fixture(folder), Device::Cpu, Kind::Float).unwrap();
    let expected = Expected::read("clip");
    let mut comparison = Comparison::default();
    tch::no_grad(|| comparison.close(name, &model.forward(expected.get("ids")).unwrap().last, expected.get(name), ACTIVATIONS));
    comparison.finish();
}

/// With the `text_model.` prefix and a stray buffer.
#[test]
fn quick_gelu() {
    hidden_states("sd15/text_encoder", "quick_gelu");
}

/// Without the prefix, with a stray buffer.
#[test]
fn gelu_without_prefix() {
    hidden_states("clip_gelu", "gelu");
}

/// Ids are whole numbers: all 77 must be the same, on every prompt.
fn ids(folder: &str, column: &str) {
    let tokenizer = ClipTokenizer::open(fixture(folder)).unwrap();
    let text = std::fs::read_to_string(fixture("expected/prompts.json")).unwrap();
    let prompts: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    assert!(prompts.len() >= 36);
    let mut comparison = Comparison::default();
    for prompt in &prompts {
        let text = prompt["text"].as_str().unwrap();
        let expected: Vec<i64> = prompt[column].as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect();
        match tokenizer.encode(text) {
            Ok(actual) if actual == expected => (),
            Ok(actual) => {
                let at = actual.iter().zip(&expected).position(|(a, b)| a != b).unwrap_or(actual.len().min(expected.len()));
                let window = |ids: &[i64]| format!("{:?}", ids.iter().skip(at).take(6).collect::<Vec<_>>());
                let (n, actual, expected) = (actual.len(), window(&actual), window(&expected));
                comparison.fail(format!("{text:?}: {n} ids; from place {at} {actual}, expected {expected}"));
            }
            Err(error) => comparison.fail(format!("{text:?}: {error}")),
        }
    }
    comparison.finish();
}

/// `vocab.json` and `merges.txt`, as transformers' CLIPTokenizer without ftfy reads them.
#[test]
fn ids_of_vocabulary_and_merges() {
    ids("sd15/tokenizer", "ids");
}

/// `tokenizer.json`, as transformers' CLIPTokenizerFast reads it; on some prompts it differs from the other.
#[test]
fn ids_of_tokenizer_json() {
    ids("tokenizer_fast", "ids_fast");
}

/// Padding with `!`, which is then a token of its own within texts, too.
#[test]
fn ids_with_another_padding() {
    ids("tokenizer_pad", "ids_pad");
}
