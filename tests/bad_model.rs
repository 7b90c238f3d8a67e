//! Model folders that are damaged, hostile or of another kind, and tensors that do not fit: each gives an error that
//! names file and key or tensor, and none a panic.
#![cfg(feature = "stable-diffusion")]
#![allow(clippy::disallowed_methods, clippy::unwrap_used, missing_docs)]

mod listening;
mod model_copy;

use attention_distillation::stable_diffusion::{scheduler_config, AutoencoderKl, ClipTextModel, ClipTokenizer, Condition, ControlNet, UNet};
use attention_distillation::{
    Adam, AdamConfig, AttentionHook, AttentionKind, AttentionSite, Ddim, Denoiser, Distiller, Error, FeatureExtractor, PlainAttention, Qkv,
    References, Result, Scheduler, Settings, StableDiffusion, Task,
};
use listening::told;
use model_copy::{header_length, ModelCopy, Safetensors, TEXT, UNET, VAE};
use serde_json::{json, Value};
use std::fs;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::Path;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

const UNET_CONFIG: &str = "unet/config.json";
const VAE_CONFIG: &str = "vae/config.json";
const TEXT_CONFIG: &str = "text_encoder/config.json";
const SCHEDULER: &str = "scheduler/scheduler_config.json";
const OWN: &str = "attention_distillation.json";

/// Collects what is wrong, so that one run of a test tells all.
#[derive(Default)]
struct Check {
    cases: usize,
    failures: Vec<String>,
}

impl Check {
    /// An error of the right variant whose message is one short line with all of the words in it.
    fn refused<T>(&mut self, case: impl std::fmt::Display, outcome: Result<T>, variants: &[&str], words: &[&str]) {
        self.cases += 1;
        let Err(error) = outcome else {
            self.failures.push(format!("{case}: was taken"));
            return;
        };
        let (variant, message) = (variant(&error), error.to_string());
        if !variants.contains(&variant) {
            self.failures.push(format!("{case}: {variant} instead of {variants:?}: {message}"));
        }
        for word in words.iter().filter(|word| !message.contains(**word)) {
            self.failures.push(format!("{case}: does not name `{word}`: {message}"));
        }
        if message.lines().count() != 1 || message.len() > 1000 {
            self.failures.push(format!("{case}: is not one line of at most 1000 letters: {message}"));
        }
    }

    fn taken<T>(&mut self, case: impl std::fmt::Display, outcome: Result<T>) -> Option<T> {
        self.cases += 1;
        outcome.map_err(|error| self.failures.push(format!("{case}: was refused: {error}"))).ok()
    }

    #[track_caller]
    fn finish(self) {
        assert!(self.cases > 0, "nothing was tried");
        assert!(self.failures.is_empty(), "{} failures in {} cases:\n{}", self.failures.len(), self.cases, self.failures.join("\n"));
    }
}

fn variant(error: &Error) -> &'static str {
    match error {
        Error::Torch(_) => "Torch",
        Error::Io { .. } => "Io",
        Error::Config { .. } => "Config",
        Error::Weights { .. } => "Weights",
        Error::MissingTensor { .. } => "MissingTensor",
        Error::TensorShape { .. } => "TensorShape",
        Error::Shape { .. } => "Shape",
        Error::Argument { .. } => "Argument",
        Error::MissingLayers { .. } => "MissingLayers",
        Error::NotFinite { .. } => "NotFinite",
        Error::Device { .. } => "Device",
        _ => "another",
    }
}

fn unet(copy: &ModelCopy) -> Result<UNet> {
    UNet::open(copy.path("unet"), Device::Cpu, Kind::Float)
}

fn vae(copy: &ModelCopy) -> Result<AutoencoderKl> {
    AutoencoderKl::open(copy.path("vae"), Device::Cpu, Kind::Float)
}

fn text(copy: &ModelCopy) -> Result<ClipTextModel> {
    ClipTextModel::open(copy.path("text_encoder"), Device::Cpu, Kind::Float)
}

fn tokenizer(copy: &ModelCopy) -> Result<ClipTokenizer> {
    ClipTokenizer::open(copy.path("tokenizer"))
}

/// The part of a model that a file belongs to.
fn part(copy: &ModelCopy, file: &str) -> Result<()> {
    match file.split('/').next().unwrap() {
        "unet" => unet(copy).map(drop),
        "vae" => vae(copy).map(drop),
        "text_encoder" => text(copy).map(drop),
        "tokenizer" => tokenizer(copy).map(drop),
        "scheduler" => scheduler_config(copy.path(file)).map(drop),
        _ => copy.open().map(drop),
    }
}

/// A panic is an error of a kind that no test expects.
fn caught<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let words = panic.downcast_ref::<String>().cloned().unwrap_or_default();
        Err(Error::denoiser(format!("panicked: {words}")))
    })
}

fn zeros(shape: &[i64]) -> Tensor {
    Tensor::zeros(shape, (Kind::Float, Device::Cpu))
}

fn noise(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu))
}

// ---- weights files

#[test]
fn a_sound_copy_opens() {
    let copy = ModelCopy::new();
    let model = copy.open().unwrap();
    let latents = model.encode(&Tensor::rand([1, 3, 32, 32], (Kind::Float, Device::Cpu))).unwrap();
    assert_eq!(latents.size(), [1, 4, 4, 4]);
    assert_eq!(model.decode(&latents).unwrap().size(), [1, 3, 32, 32]);
}

#[test]
fn truncated_weights() {
    let copy = ModelCopy::new();
    let mut check = Check::default();
    for file in [UNET, VAE, TEXT] {
        let whole = copy.read(file);
        let (header, all) = (header_length(&whole), whole.len());
        for length in [0, 1, 7, 8, 9, 8 + header / 2, 8 + header - 1, 8 + header, 8 + header + 1, (8 + header + all) / 2, all - 4, all - 1] {
            copy.write(file, &whole[..length]);
            check.refused(format!("{file} cut to {length} of {all}"), part(&copy, file), &["Weights"], &[file, "safetensors", "truncated"]);
        }
        copy.write(file, [whole.as_slice(), &[0]].concat());
        check.refused(format!("{file} one byte longer"), part(&copy, file), &["Weights"], &[file]);
        copy.restore(file);
        check.taken(file, part(&copy, file));
    }
    check.finish();
}

#[test]
fn hostile_lengths_of_the_header() {
    let copy = ModelCopy::new();
    let mut check = Check::default();
    let whole = copy.read(VAE);
    let header = header_length(&whole) as u64;
    for length in [0, 1, header - 1, header + 1, whole.len() as u64, 100_000_000, 100_000_001, 100_000_000_000, 1 << 63, u64::MAX - 7, u64::MAX] {
        copy.write(VAE, [&length.to_le_bytes()[..], &whole[8..]].concat());
        let started = Instant::now();
        check.refused(format!("header of {length} bytes"), vae(&copy), &["Weights"], &[VAE]);
        assert!(started.elapsed() < Duration::from_secs(30), "a header of {length} bytes takes long");
    }
    check.finish();
}

#[test]
fn headers_that_are_not_what_they_should_be() {
    let copy = ModelCopy::new();
    let mut check = Check::default();
    let deep = "[".repeat(100_000);
    let deep_object = r#"{"a":"#.repeat(50_000);
    for header in
        ["", " ", "{", "null", "[]", "7", "\"x\"", "{\"a\": 1}", "{\"a\": {}}", "\u{0}\u{0}\u{0}\u{0}", "{}", deep.as_str(), deep_object.as_str()]
    {
        copy.write(VAE, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat());
        let shown: String = header.chars().take(20).collect();
        check.refused(format!("header `{shown}`"), vae(&copy), &["Weights", "MissingTensor"], &[VAE]);
    }
    // Not UTF-8.
    copy.write(VAE, [&4_u64.to_le_bytes()[..], &[b'{', 0xff, 0xfe, b'}']].concat());
    check.refused("header that is not UTF-8", vae(&copy), &["Weights"], &[VAE]);
    check.finish();
}

/// Each change of the header of the sound file, on the first tensor of the decoder.
#[test]
fn hostile_headers() {
    const NAME: &str = "decoder.conv_in.weight";
    let copy = ModelCopy::new();
    let mut check = Check::default();
    let sound = Safetensors::parse(&copy.read(VAE));
    let offsets = sound.header[NAME]["data_offsets"].clone();
    let (start, end) = (offsets[0].as_u64().unwrap(), offsets[1].as_u64().unwrap());
    let all = sound.data.len() as u64;
    let mut refused = |case: &str, key: &str, value: Value, variants: &[&str], words: &[&str]| {
        copy.restore(VAE);
        copy.weights(VAE, |file| file.set(NAME, key, value));
        check.refused(case, vae(&copy), variants, &[&[VAE], words].concat());
    };
    for (case, offsets) in [
        ("overlapping offsets", json!([start - 4, end])),
        ("a hole before", json!([start + 4, end])),
        ("swapped offsets", json!([end, start])),
        ("offsets beyond the file", json!([all, all + end - start])),
        ("an end beyond the file", json!([start, all + 4])),
        ("huge offsets", json!([u64::MAX - 8, u64::MAX])),
        ("an end that is huge", json!([start, u64::MAX])),
        ("negative offsets", json!([-8, 8])),
        ("one offset", json!([start])),
        ("three offsets", json!([start, end, end])),
        ("offsets in words", json!(["0", "64"])),
        ("no offsets", json!(null)),
    ] {
        refused(case, "data_offsets", offsets, &["Weights"], &[]);
    }
    for (case, shape) in [
        ("a shape with fewer numbers than bytes", json!([16, 4, 3, 2])),
        ("a product that overflows", json!([u64::MAX, u64::MAX, 3, 3])),
        ("a product that overflows to 0", json!([1_u64 << 32, 1_u64 << 32, 1, 1])),
        ("a product that overflows to the true one", json!([(1_u64 << 61) + 1, 16, 4, 9])),
        ("a negative side", json!([-16, -4, 3, 3])),
        ("a side that is not whole", json!([16.5, 4, 3, 3])),
        ("no shape", json!(null)),
        ("a shape in words", json!("16")),
    ] {
        refused(case, "shape", shape, &["Weights"], &[]);
    }
    for (case, shape) in
        [("as many numbers in another shape", json!([4, 16, 3, 3])), ("flat", json!([576])), ("an axis more", json!([16, 4, 3, 3, 1]))]
    {
        refused(case, "shape", shape, &["TensorShape"], &[NAME, "[16, 4, 3, 3]"]);
    }
    for dtype in ["F128", "", "f32", "float32", "F16", "F64", "BOOL"] {
        refused(&format!("dtype `{dtype}` of another size, or unknown"), "dtype", json!(dtype), &["Weights"], &[]);
    }
    for dtype in ["I32", "U32"] {
        refused(&format!("dtype {dtype}"), "dtype", json!(dtype), &["Weights"], &[NAME, dtype, "f32"]);
    }
    refused("dtype 7", "dtype", json!(7), &["Weights"], &[]);
    check.finish();
}

/// Whole numbers, and floating point numbers that libtorch reads but networks are not stored in.
#[test]
fn weights_of_another_kind() {
    let copy = ModelCopy::new();
    let mut check = Check::default();
    for (dtype, size) in [("I64", 8), ("I32", 4), ("I16", 2), ("U8", 1), ("I8", 1), ("BOOL", 1), ("F8_E4M3", 1), ("F8_E5M2", 1), ("U64", 8)] {
        copy.restore(VAE);
        copy.weights(VAE, |file| {
            file.header.remove("decoder.conv_norm_out.weight");
            // What is left must stay without holes: the bytes go to a stray tensor of f32.
            let taken = Safetensors::parse(&copy.read(VAE)).header["decoder.conv_norm_out.weight"].clone();
            file.header.insert("stray".into(), taken);
            file.add("decoder.conv_norm_out.weight", dtype, &[8], 8 * size);
        });
        check.refused(dtype, vae(&copy), &["Weights"], &[VAE, "decoder.conv_norm_out.weight", "f16, bf16 and f32"]);
    }
    copy.restore(VAE);
    copy.weights(VAE, |file| {
        let taken = file.header.remove("decoder.conv_norm_out.weight").unwrap();
        file.header.insert("stray".into(), taken);
        file.add("decoder.conv_norm_out.weight", "F64", &[8], 64);
    });
    check.taken("f64", vae(&copy));
    check.finish();
}

#[test]
fn missing_tensors() {
    let copy = ModelCopy::new();
    let mut check = Check::default();
    for (file, names) in [
        (
            UNET,
            ["conv_in.weight", "conv_out.bias", "time_embedding.linear_2.weight", "up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_k.weight"],
        ),
        (VAE, ["encoder.conv_in.bias", "decoder.mid_block.attentions.0.to_out.0.weight", "quant_conv.weight", "post_quant_conv.bias"]),
        (
            TEXT,
            [
                "text_model.final_layer_norm.bias",
                "text_model.embeddings.token_embedding.weight",
                "text_model.encoder.layers.1.mlp.fc2.weight",
                "text_model.encoder.layers.0.self_attn.q_proj.bias",
            ],
        ),
    ] {
        for name in names {
            copy.restore(file);
            copy.weights(file, |file| {
                let info = file.header.remove(name).unwrap_or_else(|| panic!("the fixture has no {name}"));
                file.header.insert("stray".into(), info);
            });
            let outcome = part(&copy, file);
            match &outcome {
                Err(Error::MissingTensor { file: path, name: missing }) => {
                    assert_eq!((path.as_path(), missing.as_str()), (copy.path(file).as_path(), name));
                }
                _ => check.refused(name, Ok(()), &[], &[]),
            }
            check.refused(name, outcome, &["MissingTensor"], &[file, name, "config.json"]);
        }
    }
    check.finish();
}

/// A header padded with spaces leaves the numbers at odd addresses.
#[test]
fn unaligned_data_is_read_all_the_same() {
    let copy = ModelCopy::new();
    let expected = vae(&copy).unwrap();
    let picture = Tensor::rand([1, 3, 32, 32], (Kind::Float, Device::Cpu));
    for pad in [1, 2, 3] {
        copy.restore(VAE);
        let file = Safetensors::parse(&copy.read(VAE));
        let mut header = serde_json::to_vec(&file.header).unwrap();
        while header.len() % 8 != pad {
            header.push(b' ');
        }
        copy.write(VAE, [&(header.len() as u64).to_le_bytes()[..], &header, &file.data].concat());
        let (ours, theirs) = tch::no_grad(|| (vae(&copy).unwrap().encode(&picture).unwrap(), expected.encode(&picture).unwrap()));
        assert_eq!(ours, theirs);
    }
}

#[test]
fn weights_that_are_no_files() {
    let mut check = Check::default();
    for file in [UNET, VAE, TEXT] {
        let copy = ModelCopy::new();
        copy.remove(file);
        check.refused(format!("without {file}"), copy.open(), &["Weights"], &[file, "weights.md"]);
        // A folder of that name, and an empty one in the place of the folder.
        fs::create_dir(copy.path(file)).unwrap();
        check.refused(format!("a folder {file}"), copy.open(), &["Weights"], &[file]);
        copy.remove(file);
        for pickle in ["bin", "pt", "ckpt"] {
            let name = file.replace("safetensors", pickle);
            copy.write(&name, "pickle");
            check.refused(&name, copy.open(), &["Weights"], &[file, "pickle", "safe_serialization"]);
            copy.remove(&name);
        }
        let folder = file.split('/').next().unwrap();
        copy.remove(folder);
        check.refused(format!("without the folder {folder} to {file}"), part(&copy, file), &["Weights", "Io"], &[folder]);
    }
    check.finish();
}

// ---- sharded weights

const INDEX: &str = "diffusion_pytorch_model.safetensors.index.json";

fn open_sharded(copy: &ModelCopy) -> Result<UNet> {
    UNet::open(copy.folder(), Device::Cpu, Kind::Float)
}

#[test]
fn hostile_indices() {
    let copy = ModelCopy::of("unet_sharded");
    let mut check = Check::default();
    check.taken("the fixture", open_sharded(&copy));
    let sound = copy.json(INDEX);
    // A sound file outside, for the names that lead there.
    let first = "diffusion_pytorch_model-00001-of-00002.safetensors";
    let outside = copy.folder().parent().unwrap().join(format!("{}.safetensors", copy.folder().file_name().unwrap().to_str().unwrap()));
    fs::copy(copy.path(first), &outside).unwrap();
    let outside_name = outside.file_name().unwrap().to_str().unwrap().to_owned();
    fs::create_dir(copy.path("sub")).unwrap();
    fs::copy(copy.path(first), copy.path("sub/x.safetensors")).unwrap();
    for name in [
        "../x".to_owned(),
        format!("../{outside_name}"),
        outside.to_str().unwrap().to_owned(),
        format!("sub/../../{outside_name}"),
        "sub/x.safetensors".to_owned(),
        "./../x.safetensors".to_owned(),
        "/etc/passwd".to_owned(),
        "..".to_owned(),
        ".".to_owned(),
        String::new(),
        "config.json".to_owned(),
        "weights.bin".to_owned(),
    ] {
        let mut map = sound["weight_map"].as_object().unwrap().clone();
        map.insert("conv_in.weight".into(), json!(name));
        copy.set(INDEX, "weight_map", Value::Object(map));
        check.refused(format!("a shard `{name}`"), open_sharded(&copy), &["Config"], &[INDEX, &name, "safetensors file beside it"]);
    }
    fs::remove_file(outside).unwrap();
    for (case, map, word) in [
        ("an empty map", json!({}), "no file"),
        ("no map", json!(null), "weight_map"),
        ("a list", json!([first]), "weight_map"),
        ("a text", json!(first), "weight_map"),
        ("numbers", json!({ "conv_in.weight": 1 }), "weight_map"),
        ("lists", json!({ "conv_in.weight": [first] }), "weight_map"),
    ] {
        copy.set(INDEX, "weight_map", map);
        check.refused(case, open_sharded(&copy), &["Config"], &[INDEX, word]);
    }
    for text in ["", "{", "[]", "null", "weight_map"] {
        copy.write(INDEX, text);
        check.refused(format!("an index `{text}`"), open_sharded(&copy), &["Config"], &[INDEX]);
    }
    copy.write(INDEX, serde_json::to_vec(&sound).unwrap());
    check.taken("the fixture again", open_sharded(&copy));

    copy.set(INDEX, "weight_map", json!({ "conv_in.weight": "absent.safetensors" }));
    check.refused("an absent shard", open_sharded(&copy), &["Io"], &["absent.safetensors"]);
    copy.set(INDEX, "weight_map", json!({ "conv_in.weight": first }));
    check.refused("half of the shards", open_sharded(&copy), &["MissingTensor"], &[first]);

    copy.write(INDEX, serde_json::to_vec(&sound).unwrap());
    let second = "diffusion_pytorch_model-00002-of-00002.safetensors";
    let whole = copy.read(second);
    copy.write(second, &whole[..whole.len() - 1]);
    check.refused("a truncated shard", open_sharded(&copy), &["Weights"], &[second, "truncated"]);
    copy.remove(second);
    check.refused("a shard less", open_sharded(&copy), &["Io"], &[second]);
    check.finish();
}

// ---- configurations

const CONFIGS: [&str; 4] = [UNET_CONFIG, VAE_CONFIG, TEXT_CONFIG, SCHEDULER];

#[test]
fn configs_that_are_no_json_objects() {
    let copy = ModelCopy::new();
    let mut check = Check::default();
    copy.write(OWN, "{}");
    let deep = "[".repeat(100_000);
    let deep_object = r#"{"a":"#.repeat(100_000);
    let deep_inside = format!(r#"{{"block_out_channels": {deep}}}"#);
    for file in CONFIGS.into_iter().chain([OWN]) {
        let sound = copy.read(file);
        for text in
            ["", " ", "\u{0}", "{", "}", "{\"in_channels\": 4,}", "in_channels: 4", "{\"steps\": NaM}", "{\"steps\": 1e999}", "{\"x\": \"\u{1}\"}"]
        {
            copy.write(file, text);
            check.refused(format!("{file} `{text}`"), part(&copy, file), &["Config"], &[file, "not JSON"]);
        }
        for (what, text) in [("brackets", &deep), ("braces", &deep_object), ("a deep value", &deep_inside)] {
            copy.write(file, text);
            check.refused(format!("{file} of {what}"), part(&copy, file), &["Config"], &[file, "not JSON"]);
        }
        for text in ["[]", "[{}]", "null", "4", "\"x\"", "true"] {
            copy.write(file, text);
            check.refused(format!("{file} `{text}`"), part(&copy, file), &["Config"], &[file, "not a JSON object"]);
        }
        copy.write(file, [b'{', 0xff, b'}']);
        check.refused(format!("{file} not UTF-8"), part(&copy, file), &["Config"], &[file, "not JSON"]);
        copy.write(file, sound);
    }
    check.finish();
}

/// Python writes numbers that JSON has not. They are as good as any value where nobody reads the key, and no number where somebody does.
#[test]
fn numbers_that_json_has_not() {
    let copy = ModelCopy::new();
    let mut check = Check::default();
    copy.write(OWN, "{}");
    for file in CONFIGS {
        let sound = copy.read(file);
        let text = String::from_utf8(sound.clone()).unwrap();
        // Words within texts are texts.
        let harmless = r#"{"a": -Infinity, "b": [NaN,Infinity], "NaN": "-Infinity \\", "c\"": "\" NaN", "#;
        copy.write(file, text.replacen('{', harmless, 1));
        check.taken(file, part(&copy, file));
        copy.write(file, sound);
    }
    for word in ["NaN", "Infinity", "-Infinity"] {
        for (file, key) in [(UNET_CONFIG, "in_channels"), (SCHEDULER, "beta_start"), (OWN, "steps"), (OWN, "learning_rate")] {
            let sound = copy.read(file);
            let text = String::from_utf8(sound.clone()).unwrap();
            // Of two equal keys the last one counts.
            let end = text.rfind('}').unwrap();
            let comma = if file == OWN { "" } else { "," };
            copy.write(file, format!("{}{comma} \"{key}\": {word}}}", &text[..end]));
            check.refused(format!("{file} {key} {word}"), part(&copy, file), &["Config"], &[file, key, word]);
            copy.write(file, sound);
        }
    }
    check.finish();
}

/// Of models that are trained otherwise: they have no betas, and DDIM's default ones would draw wrong pictures.
#[test]
fn schedules_of_another_kind_of_model() {
    let copy = ModelCopy::new();
    let mut check = Check::default();
    for class in ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"] {
        copy.write(SCHEDULER, json!({ "_class_name": class, "prediction_type": "epsilon", "sigma_data": 0.5 }).to_string());
        check.refused(class.to_owned(), part(&copy, SCHEDULER), &["Config"], &[SCHEDULER, "_class_name", class, "not supported"]);
    }
    check.finish();
}

#[test]
fn configs_beyond_all_length() {
    let copy = ModelCopy::new();
    let mut check = Check::default();
    for file in [UNET_CONFIG, SCHEDULER, OWN] {
        let length = 17 << 20;
        copy.write(file, vec![b' '; length]);
        let started = Instant::now();
        check.refused(format!("{file} of {length} bytes"), part(&copy, file), &["Config"], &[file, "longer"]);
        assert!(started.elapsed() < Duration::from_secs(30), "it takes long");
        copy.remove(file);
    }
    check.finish();
}

/// Values that no count is.
fn no_counts() -> Vec<Value> {
    let mut values =
        vec![json!(0), json!(-1), json!(-1e18), json!(1.5), json!(1e30), json!(1_u64 << 21), json!(i64::MAX), json!(u64::MAX), json!(i64::MIN)];
    values.extend([json!("4"), json!(true), json!({}), json!([]), json!([[]])]);
    values
}

#[test]
fn counts_of_every_config() {
    let copy = ModelCopy::new();
    let mut check = Check::default();
    for (file, keys) in [
        (
            UNET_CONFIG,
            vec![
                "in_channels",
                "out_channels",
                "layers_per_block",
                "norm_num_groups",
                "attention_head_dim",
                "num_attention_heads",
                "cross_attention_dim",
                "transformer_layers_per_block",
                "reverse_transformer_layers_per_block",
                "time_embedding_dim",
                "sample_size",
                "conv_in_kernel",
                "conv_out_kernel",
            ],
        ),
        (VAE_CONFIG, vec!["in_channels", "latent_channels", "layers_per_block", "norm_num_groups"]),
        (TEXT_CONFIG, vec!["hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings", "vocab_size", "num_hidden_layers"]),
        (SCHEDULER, vec!["num_train_timesteps"]),
    ] {
        let sound = copy.read(file);
        for key in keys {
            for value in no_counts() {
                copy.set(file, key, value.clone());
                check.refused(format!("{file} {key} {value}"), part(&copy, file), &["Config"], &[file, key]);
                copy.write(file, &sound);
            }
        }
        check.taken(file, part(&copy, file));
    }
    check.finish();
}

#[test]
fn lists_of_counts() {
    let copy = ModelCopy::new();
    let mut check = Check::default();
    for file in [UNET_CONFIG, VAE_CONFIG] {
        let sound = copy.read(file);
        let key = "block_out_channels";
        let mut lists: Vec<Value> = no_counts().into_iter().map(|value| json!([8, 8, value, 16])).collect();
        lists.extend([json!([]), json!(8), json!("8"), json!({}), json!([null, 8, 8, 8])]);
        for value in lists {
            copy.set(file, key, value.clone());
            check.refused(format!("{file} {key} {value}"), part(&copy, file), &["Config"], &[file, key]);
        }
        copy.write(file, &sound);
        copy.unset(file, key);
        check.refused(format!("{file} without {key}"), part(&copy, file), &["Config"], &[file, key]);
        copy.write(file, &sound);
        // One block more or less than there are types.
        for value in [json!([16, 16, 24]), json!([16]), json!([16, 16, 24, 24, 24]), json!(vec![16; 5000])] {
            copy.set(file, key, value.clone());
            check.refused(format!("{file} {key}, another number of blocks"), part(&copy, file), &["Config"], &[file, key, "blocks"]);
        }
        copy.write(file, &sound);
    }
    // More than any picture could be halved by.
    let sound = copy.read(UNET_CONFIG);
    for (key, value) in [
        ("block_out_channels", json!(vec![1; 70])),
        ("down_block_types", json!(vec!["DownBlock2D"; 70])),
        ("up_block_types", json!(vec!["UpBlock2D"; 70])),
    ] {
        copy.set(UNET_CONFIG, key, value);
    }
    check.refused("70 blocks", unet(&copy), &["Config"], &[UNET_CONFIG, "block_out_channels", "70", "16"]);
    copy.write(UNET_CONFIG, &sound);
    // One number per block.
    let sound = copy.read(UNET_CONFIG);
    for key in ["attention_head_dim", "num_attention_heads", "cross_attention_dim", "layers_per_block", "transformer_layers_per_block"] {
        for value in
            [json!([2, 2, 2]), json!([2, 2, 2, 2, 2]), json!([2, 2, 2, 0]), json!([2, 2, 2, "2"]), json!([2, 2, 2, null]), json!([2, 2, 2, [2, 2]])]
        {
            copy.set(UNET_CONFIG, key, value.clone());
            check.refused(format!("{key} {value}"), unet(&copy), &["Config"], &[UNET_CONFIG, key]);
            copy.write(UNET_CONFIG, &sound);
        }
    }
    // As many as there are, the same as the number.
    copy.set(UNET_CONFIG, "attention_head_dim", json!([2, 2, 2, 2]));
    copy.set(UNET_CONFIG, "layers_per_block", json!([2, 2, 2, 2]));
    check.taken("lists", unet(&copy));
    check.finish();
}

#[test]
fn block_types() {
    let copy = ModelCopy::new();
    let mut check = Check::default();
    for (file, keys, known) in [
        (UNET_CONFIG, ["down_block_types", "up_block_types"], ["CrossAttnDownBlock2D", "CrossAttnUpBlock2D"]),
        (VAE_CONFIG, ["down_block_types", "up_block_types"], ["DownEncoderBlock2D", "UpDecoderBlock2D"]),
    ] {
        let sound = copy.read(file);
        for (key, known) in keys.into_iter().zip(known) {
            for unknown in ["AttnDownBlock2D", "SimpleCrossAttnUpBlock2D", "", "ResnetUpsampleBlock2D"] {
                copy.set(file, key, json!([known, known, unknown, known]));
                let quoted = format!("`{unknown}`");
                check.refused(format!("{file} {key} {unknown}"), part(&copy, file), &["Config"], &[file, key, &quoted, known]);
            }
            for value in [json!([]), json!(known), json!(4), json!([1, 2, 3, 4]), json!([[known]]), json!(null), json!({})] {
                copy.set(file, key, value.clone());
                check.refused(format!("{file} {key} {value}"), part(&copy, file), &["Config"], &[file, key]);
            }
            for value in [vec![known; 3], vec![known; 5], vec![known; 1000]] {
                copy.set(file, key, json!(value));
                check.refused(format!("{} of {file} {key}", value.len()), part(&copy, file), &["Config"], &[file, "blocks"]);
            }
            copy.write(file, &sound);
        }
    }
    check.finish();
}

#[test]
fn numbers_texts_and_flags() {
    let copy = ModelCopy::new();
    let mut check = Check::default();
    let positive = vec![json!(0), json!(0.0), json!(-1e-5), json!("1e-5"), json!(true), json!([1]), json!({})];
    let number = vec![json!("0"), json!(false), json!([0]), json!({})];
    let flag = vec![json!(0), json!(1), json!("true"), json!([true]), json!({})];
    let word = vec![json!("unheard_of"), json!(""), json!(0), json!(true), json!(["silu"]), json!({})];
    for (file, key, values) in [
        (UNET_CONFIG, "norm_eps", &positive),
        (UNET_CONFIG, "mid_block_scale_factor", &positive),
        (UNET_CONFIG, "freq_shift", &number),
        (UNET_CONFIG, "flip_sin_to_cos", &flag),
        (UNET_CONFIG, "use_linear_projection", &flag),
        (UNET_CONFIG, "center_input_sample", &flag),
        (UNET_CONFIG, "act_fn", &word),
        (UNET_CONFIG, "addition_embed_type", &word),
        (VAE_CONFIG, "scaling_factor", &positive),
        (VAE_CONFIG, "shift_factor", &number),
        (VAE_CONFIG, "force_upcast", &flag),
        (VAE_CONFIG, "mid_block_add_attention", &flag),
        (VAE_CONFIG, "use_quant_conv", &flag),
        (VAE_CONFIG, "use_post_quant_conv", &flag),
        (VAE_CONFIG, "act_fn", &word),
        (TEXT_CONFIG, "layer_norm_eps", &positive),
        (TEXT_CONFIG, "hidden_act", &word),
        (SCHEDULER, "beta_start", &number),
        (SCHEDULER, "beta_end", &number),
        (SCHEDULER, "beta_schedule", &word),
        (SCHEDULER, "prediction_type", &word),
        (SCHEDULER, "timestep_spacing", &word),
        (SCHEDULER, "steps_offset", &number),
        (SCHEDULER, "set_alpha_to_one", &flag),
        (SCHEDULER, "clip_sample", &flag),
        (SCHEDULER, "rescale_betas_zero_snr", &flag),
    ] {
        let sound = copy.read(file);
        for value in values {
            copy.set(file, key, value.clone());
            check.refused(format!("{file} {key} {value}"), part(&copy, file), &["Config"], &[file, key]);
            copy.write(file, &sound);
        }
    }
    let sound = copy.read(UNET_CONFIG);
    for value in [json!(2), json!(-1), json!("1"), json!(0.5), json!(1_u64 << 40), json!([1])] {
        copy.set(UNET_CONFIG, "downsample_padding", value.clone());
        check.refused(format!("downsample_padding {value}"), unet(&copy), &["Config"], &[UNET_CONFIG, "downsample_padding"]);
    }
    for key in ["conv_in_kernel", "conv_out_kernel"] {
        for value in [2, 4, 17, 1 << 20] {
            copy.write(UNET_CONFIG, &sound);
            copy.set(UNET_CONFIG, key, json!(value));
            check.refused(format!("{key} {value}"), unet(&copy), &["Config"], &[UNET_CONFIG, key, &value.to_string(), "odd"]);
        }
    }
    // Half of the width of the sinusoids: every frequency would be 0 / 0.
    copy.write(UNET_CONFIG, &sound);
    copy.set(UNET_CONFIG, "freq_shift", json!(8));
    check.refused("freq_shift that divides by 0", unet(&copy), &["Config"], &[UNET_CONFIG, "freq_shift"]);
    check.finish();
}

/// Settings of other networks, which would give wrong pictures without a word.
#[test]
fn features_that_are_not_built_are_named() {
    let copy = ModelCopy::new();
    let mut check = Check::default();
    for (file, key, value) in [
        (UNET_CONFIG, "class_embed_type", json!("timestep")),
        (UNET_CONFIG, "num_class_embeds", json!(10)),
        (UNET_CONFIG, "class_embeddings_concat", json!(true)),
        (UNET_CONFIG, "encoder_hid_dim", json!(32)),
        (UNET_CONFIG, "encoder_hid_dim_type", json!("text_proj")),
        (UNET_CONFIG, "cross_attention_norm", json!("layer_norm")),
        (UNET_CONFIG, "mid_block_only_cross_attention", json!(true)),
        (UNET_CONFIG, "only_cross_attention", json!(true)),
        (UNET_CONFIG, "only_cross_attention", json!([true, true, true, false])),
        (UNET_CONFIG, "dual_cross_attention", json!(true)),
        (UNET_CONFIG, "attention_type", json!("gated")),
        (UNET_CONFIG, "resnet_time_scale_shift", json!("scale_shift")),
        (UNET_CONFIG, "resnet_skip_time_act", json!(true)),
        (UNET_CONFIG, "resnet_out_scale_factor", json!(1.5)),
        (UNET_CONFIG, "time_embedding_type", json!("fourier")),
        (UNET_CONFIG, "time_embedding_act_fn", json!("silu")),
        (UNET_CONFIG, "timestep_post_act", json!("silu")),
        (UNET_CONFIG, "mid_block_type", json!("UNetMidBlock2DSimpleCrossAttn")),
        (UNET_CONFIG, "addition_embed_type", json!("text_image")),
        (VAE_CONFIG, "latents_mean", json!([0.0, 0.0, 0.0, 0.0])),
        (VAE_CONFIG, "latents_std", json!([1.0, 1.0, 1.0, 1.0])),
        (VAE_CONFIG, "out_channels", json!(4)),
        (SCHEDULER, "thresholding", json!(true)),
    ] {
        let sound = copy.read(file);
        copy.set(file, key, value.clone());
        let value = value.as_str().map_or(value.to_string(), str::to_owned);
        check.refused(
            format!("{file} {key} {value}"),
            part(&copy, file),
            &["Config"],
            &[file, key, value.trim_matches(['[', ']']).split(',').next().unwrap()],
        );
        copy.write(file, &sound);
    }
    check.finish();
}

#[test]
fn groups_and_heads_that_do_not_divide() {
    let copy = ModelCopy::new();
    let mut check = Check::default();
    for (file, groups) in [(UNET_CONFIG, [3, 5, 16, 1000]), (VAE_CONFIG, [3, 5, 16, 1000])] {
        let sound = copy.read(file);
        for groups in groups {
            copy.set(file, "norm_num_groups", json!(groups));
            check.refused(format!("{file} {groups} groups"), part(&copy, file), &["Config"], &[file, "norm_num_groups", &groups.to_string()]);
        }
        copy.write(file, &sound);
    }
    for heads in [3, 5, 17, 1 << 20] {
        copy.set(TEXT_CONFIG, "num_attention_heads", json!(heads));
        check.refused(
            format!("{heads} heads of the text encoder"),
            text(&copy),
            &["Config"],
            &[TEXT_CONFIG, "num_attention_heads", &heads.to_string()],
        );
    }
    // There the width is cut to whole heads, as diffusers does, and does not fit the file any more.
    for heads in [3, 5, 17, 1 << 20] {
        copy.set(UNET_CONFIG, "attention_head_dim", json!(heads));
        check.refused(format!("{heads} heads of the U-Net"), unet(&copy), &["TensorShape", "Config"], &["unet", "attentions.0.proj_in.weight"]);
    }
    check.finish();
}

/// Sound in itself, but not what the file holds.
#[test]
fn sizes_that_do_not_fit_the_tensors() {
    let copy = ModelCopy::new();
    let mut check = Check::default();
    let misfits = ["MissingTensor", "TensorShape"];
    for (config, weights, key, value) in [
        (UNET_CONFIG, UNET, "in_channels", json!(5)),
        (UNET_CONFIG, UNET, "in_channels", json!(1 << 20)),
        (UNET_CONFIG, UNET, "out_channels", json!(8)),
        (UNET_CONFIG, UNET, "layers_per_block", json!(1)),
        (UNET_CONFIG, UNET, "layers_per_block", json!(3)),
        (UNET_CONFIG, UNET, "layers_per_block", json!(1 << 20)),
        (UNET_CONFIG, UNET, "transformer_layers_per_block", json!(2)),
        (UNET_CONFIG, UNET, "transformer_layers_per_block", json!(1 << 20)),
        (UNET_CONFIG, UNET, "cross_attention_dim", json!(17)),
        (UNET_CONFIG, UNET, "time_embedding_dim", json!(16)),
        (UNET_CONFIG, UNET, "use_linear_projection", json!(true)),
        (UNET_CONFIG, UNET, "addition_embed_type", json!("text_time")),
        (UNET_CONFIG, UNET, "conv_in_kernel", json!(5)),
        (UNET_CONFIG, UNET, "conv_out_kernel", json!(1)),
        (UNET_CONFIG, UNET, "block_out_channels", json!([16, 16, 24, 32])),
        (UNET_CONFIG, UNET, "block_out_channels", json!([1 << 20, 1 << 20, 1 << 20, 1 << 20])),
        (UNET_CONFIG, UNET, "down_block_types", json!(vec!["CrossAttnDownBlock2D"; 4])),
        (UNET_CONFIG, UNET, "up_block_types", json!(vec!["CrossAttnUpBlock2D"; 4])),
        (VAE_CONFIG, VAE, "latent_channels", json!(8)),
        (VAE_CONFIG, VAE, "layers_per_block", json!(2)),
        (VAE_CONFIG, VAE, "layers_per_block", json!(1 << 20)),
        (VAE_CONFIG, VAE, "block_out_channels", json!([8, 16, 16, 16])),
        (VAE_CONFIG, VAE, "block_out_channels", json!([1 << 20, 8, 8, 8])),
        (TEXT_CONFIG, TEXT, "hidden_size", json!(18)),
        (TEXT_CONFIG, TEXT, "intermediate_size", json!(33)),
        (TEXT_CONFIG, TEXT, "max_position_embeddings", json!(78)),
        (TEXT_CONFIG, TEXT, "vocab_size", json!(1513)),
        (TEXT_CONFIG, TEXT, "vocab_size", json!(1 << 20)),
        (TEXT_CONFIG, TEXT, "num_hidden_layers", json!(3)),
        (TEXT_CONFIG, TEXT, "num_hidden_layers", json!(1 << 20)),
    ] {
        let sound = copy.read(config);
        copy.set(config, key, value.clone());
        let started = Instant::now();
        check.refused(format!("{config} {key} {value}"), part(&copy, config), &misfits, &[weights, "tensor `", "config.json"]);
        if started.elapsed() > Duration::from_secs(30) {
            check.failures.push(format!("{config} {key} {value}: took {:?}", started.elapsed()));
        }
        copy.write(config, &sound);
    }
    // Blocks of one level less, in all lists alike.
    copy.set(UNET_CONFIG, "block_out_channels", json!([16, 16, 24]));
    copy.set(UNET_CONFIG, "down_block_types", json!(vec!["CrossAttnDownBlock2D"; 3]));
    copy.set(UNET_CONFIG, "up_block_types", json!(vec!["CrossAttnUpBlock2D"; 3]));
    check.refused("a level less", unet(&copy), &misfits, &[UNET]);
    check.finish();
}

// ---- the schedule

#[test]
fn schedules_out_of_range() {
    let copy = ModelCopy::new();
    let mut check = Check::default();
    let sound = copy.read(SCHEDULER);
    for (key, value) in [
        ("beta_start", json!(-0.1)),
        ("beta_start", json!(1.0)),
        ("beta_start", json!(1e300)),
        ("beta_end", json!(-1e-9)),
        ("beta_end", json!(1.5)),
        ("beta_end", json!(-1e300)),
        ("trained_betas", json!([0.1, 0.2])),
        ("trained_betas", json!(vec![-0.1; 1000])),
        ("trained_betas", json!(vec![1.0; 1000])),
        ("trained_betas", json!([])),
        ("trained_betas", json!(["0.1"])),
        ("trained_betas", json!(0.1)),
        ("steps_offset", json!(-1)),
        ("steps_offset", json!(0.5)),
        ("steps_offset", json!(1000)),
        ("steps_offset", json!(1e18)),
        ("num_train_timesteps", json!(1 << 20)),
    ] {
        for schedule in ["linear", "scaled_linear"] {
            copy.write(SCHEDULER, &sound);
            copy.set(SCHEDULER, "beta_schedule", json!(schedule));
            copy.set(SCHEDULER, key, value.clone());
            let shown: String = value.to_string().chars().take(20).collect();
            // A run would find out in its first second, but then without the file's name.
            check.refused(format!("{schedule} {key} {shown}"), caught(|| copy.open()), &["Config"], &[SCHEDULER]);
            let run = caught(|| scheduler_config(copy.path(SCHEDULER)).and_then(|config| Ddim::new(&config, 50)));
            check.refused(format!("{schedule} {key} {shown}, in a run"), run, &["Config", "Argument"], &[]);
        }
    }
    copy.write(SCHEDULER, &sound);
    copy.set(SCHEDULER, "clip_sample", json!(true));
    for range in [json!(0), json!(-1), json!("1")] {
        copy.set(SCHEDULER, "clip_sample_range", range.clone());
        check.refused(format!("clip_sample_range {range}"), scheduler_config(copy.path(SCHEDULER)), &["Config"], &[SCHEDULER, "clip_sample_range"]);
    }
    copy.remove(SCHEDULER);
    check.refused("no file", scheduler_config(copy.path(SCHEDULER)), &["Io"], &[SCHEDULER]);
    check.finish();
}

#[test]
fn steps_outside_of_the_schedule() {
    let copy = ModelCopy::new();
    let model = copy.open().unwrap();
    let mut check = Check::default();
    for steps in [0, 1001, 100_000, usize::MAX] {
        check.refused(steps, model.timesteps(steps), &["Argument"], &["steps", &steps.to_string(), "1000"]);
        check.refused(steps, model.ddim(steps), &["Argument"], &["steps", &steps.to_string(), "1000"]);
    }
    for steps in [1, 50, 999] {
        assert_eq!(check.taken(steps, model.timesteps(steps)).unwrap().len(), steps);
    }
    check.finish();
}

// ---- folders

#[test]
fn missing_folders_and_files() {
    let mut check = Check::default();
    let absent = Path::new("no-such-folder/model");
    check.refused("no folder", StableDiffusion::open(absent, Device::Cpu, Kind::Float), &["Config"], &["no-such-folder/model", "no such folder"]);
    let empty = tempfile::tempdir().unwrap();
    let shown = empty.path().to_str().unwrap();
    check.refused("an empty folder", StableDiffusion::open(empty.path(), Device::Cpu, Kind::Float), &["Config"], &[shown, "unet", "diffusers"]);
    for (name, variants, words) in [
        ("unet", ["Config", "Io"], vec!["unet"]),
        ("vae", ["Config", "Io"], vec!["vae"]),
        ("scheduler", ["Config", "Io"], vec!["scheduler"]),
        ("tokenizer", ["Config", "Io"], vec!["tokenizer", "vocab.json"]),
        (UNET_CONFIG, ["Config", "Io"], vec![UNET_CONFIG]),
        (VAE_CONFIG, ["Config", "Io"], vec![VAE_CONFIG]),
        (TEXT_CONFIG, ["Config", "Io"], vec![TEXT_CONFIG]),
        (SCHEDULER, ["Config", "Io"], vec![SCHEDULER]),
        ("tokenizer/vocab.json", ["Config", "Io"], vec!["tokenizer", "vocab.json"]),
        ("tokenizer/merges.txt", ["Config", "Io"], vec!["tokenizer", "merges.txt"]),
    ] {
        let copy = ModelCopy::new();
        copy.remove(name);
        check.refused(format!("without {name}"), copy.open(), &variants, &words);
        // Something else of the same name.
        if name.contains('.') {
            fs::create_dir(copy.path(name)).unwrap();
            check.refused(format!("a folder {name}"), copy.open(), &variants, &words);
        } else {
            copy.write(name, "not a folder");
            check.refused(format!("a file {name}"), copy.open(), &["Config", "Io"], &[name]);
        }
    }
    let copy = ModelCopy::new();
    let file = copy.path(UNET_CONFIG);
    check.refused("a file in place of a folder", StableDiffusion::open(&file, Device::Cpu, Kind::Float), &["Config"], &["config.json"]);
    check.finish();
}

#[test]
fn sdxl_folders_without_a_part() {
    let mut check = Check::default();
    let copy = ModelCopy::of("sdxl");
    let model = check.taken("the whole fixture", copy.open()).unwrap();
    assert!(model.is_xl());
    assert_eq!(model.prompts(&["a cat", ""], (64, 64)).unwrap().text.size(), [2, 77, 24]);
    for missing in ["text_encoder", "text_encoder_2"] {
        copy.remove(missing);
        // Once with a list of what belongs to it, once without.
        check.refused(format!("{missing} named, but missing"), copy.open(), &["Config"], &["model_index.json", missing, "no such folder", "fetch"]);
        copy.remove("model_index.json");
        check.refused(format!("without {missing}"), copy.open(), &["Config"], &[copy.folder().to_str().unwrap(), missing, "SDXL", "fetch"]);
        copy.restore("model_index.json");
        copy.restore(missing);
    }
    copy.remove("model_index.json");
    copy.remove("text_encoder");
    copy.remove("text_encoder_2");
    check.refused("without both", copy.open(), &["Config"], &["SDXL", "text_encoder and text_encoder_2", "fetch"]);
    for folder in ["model_index.json", "text_encoder", "text_encoder_2"] {
        copy.restore(folder);
    }
    for (missing, words) in [
        ("tokenizer", ["tokenizer", "vocab.json"]),
        ("tokenizer_2", ["tokenizer_2", "vocab.json"]),
        ("text_encoder_2/config.json", ["text_encoder_2", "config.json"]),
        ("text_encoder_2/model.safetensors", ["text_encoder_2", "model.safetensors"]),
    ] {
        copy.remove(missing);
        check.refused(format!("without {missing}"), copy.open(), &["Config", "Io", "Weights"], &words);
        copy.restore(missing);
    }
    check.taken("the whole fixture again", copy.open());
    // SDXL's refiner, and a Stable Diffusion 1.5 whose folder was mixed up with SDXL's.
    copy.set("model_index.json", "text_encoder", json!([null, null]));
    copy.remove("text_encoder");
    copy.remove("tokenizer");
    check.refused("the refiner", copy.open(), &["Config"], &["text_encoder_2 but no text_encoder", "refiner", "base"]);
    let copy = ModelCopy::new();
    let sdxl = model_copy::fixtures().join("sdxl");
    for part in ["text_encoder_2", "tokenizer_2"] {
        copy.put(&sdxl.join(part), part);
    }
    check.refused("two encoders beside SD 1.5's U-Net", copy.open(), &["Config"], &["text_encoder_2", "not SDXL's"]);
    let copy = ModelCopy::new();
    copy.put(&sdxl.join("unet"), "unet");
    assert!(unet(&copy).unwrap().wants_pooled_text());
    check.refused("SD 1.5's encoder beside SDXL's U-Net", copy.open(), &["Config"], &["SDXL", "text_encoder_2 and tokenizer_2", "fetch"]);
    check.finish();
}

#[test]
fn sdxl_encoders_that_do_not_fit() {
    const SECOND: &str = "text_encoder_2/model.safetensors";
    const SECOND_CONFIG: &str = "text_encoder_2/config.json";
    let mut check = Check::default();
    let copy = ModelCopy::of("sdxl");
    let folder = copy.folder().to_str().unwrap().to_owned();

    copy.weights(SECOND, |file| {
        let projection = file.header.remove("text_projection.weight").unwrap();
        file.header.insert("stray".into(), projection);
    });
    check.refused("no projection", copy.open(), &["Config"], &[&folder, "text_encoder_2", "text_projection", "16"]);
    copy.restore(SECOND);
    copy.set(SECOND_CONFIG, "projection_dim", json!(8));
    check.refused("a projection of another width", copy.open(), &["TensorShape"], &[SECOND, "text_projection.weight", "16", "8"]);
    // The same in its weights: sound in itself, but the U-Net wants 16.
    copy.weights(SECOND, |file| {
        let projection = file.header.remove("text_projection.weight").unwrap();
        file.header.insert("stray".into(), projection);
        file.add("text_projection.weight", "F16", &[8, 16], 2 * 8 * 16);
    });
    check.refused("pooled text of another width", copy.open(), &["Config"], &[&folder, "text_encoder_2", "width 8", "16"]);
    copy.restore(SECOND);
    copy.restore(SECOND_CONFIG);

    // The second encoder twice: 16 + 16 instead of 8 + 16.
    copy.put(&model_copy::fixtures().join("sdxl/text_encoder_2"), "text_encoder");
    check.refused("widths of text", copy.open(), &["Config"], &[&folder, "width 32", "24"]);
    copy.restore("text_encoder");
    // The two of them exchanged: the sum fits, but the second has no projection.
    copy.put(&model_copy::fixtures().join("sdxl/text_encoder"), "text_encoder_2");
    copy.put(&model_copy::fixtures().join("sdxl/text_encoder_2"), "text_encoder");
    check.refused("exchanged", copy.open(), &["Config"], &[&folder, "text_encoder_2", "text_projection"]);
    copy.restore("text_encoder");
    copy.restore("text_encoder_2");

    for tokenizer in ["tokenizer", "tokenizer_2"] {
        let config = format!("{tokenizer}/tokenizer_config.json");
        let special = format!("{tokenizer}/special_tokens_map.json");
        assert!(!copy.json(&special).contains_key("model_max_length"));
        copy.set(&config, "model_max_length", json!(40));
        check.refused(format!("a shorter {tokenizer}"), copy.open(), &["Config"], &[&folder, "tokenizers", "77", "40"]);
        copy.set(&config, "model_max_length", json!(80));
        check.refused(format!("a {tokenizer} beyond the positions"), copy.open(), &["Config"], &[&folder, "tokenizer", "80", "77"]);
        copy.restore(&config);
    }
    for value in [json!("yes"), json!(1), json!([true]), json!({})] {
        copy.set("model_index.json", "force_zeros_for_empty_prompt", value.clone());
        check.refused(format!("zeros {value}"), copy.open(), &["Config"], &["model_index.json", "force_zeros_for_empty_prompt", "true or false"]);
    }
    for value in [json!("2"), json!([2]), json!(true), json!(-1), json!(2.5), json!(1e300), json!(7)] {
        copy.restore("model_index.json");
        copy.set(SECOND_CONFIG, "eos_token_id", value.clone());
        check.refused(format!("an end {value}"), copy.open(), &["Config"], &[SECOND_CONFIG, "eos_token_id"]);
    }
    copy.restore(SECOND_CONFIG);
    check.taken("the whole fixture again", copy.open());
    check.finish();
}

/// SDXL's configs name 2 as the end of a text and mean the highest id; a config that names the true one says the same.
#[test]
fn where_texts_end() {
    const CONFIG: &str = "text_encoder_2/config.json";
    let copy = ModelCopy::of("sdxl");
    // Padded by another token than the end, which is in the text once.
    let vocabulary = copy.json("tokenizer_2/vocab.json");
    let end = vocabulary["<|endoftext|>"].as_i64().unwrap();
    let ids = Tensor::from_slice(&ClipTokenizer::open(copy.path("tokenizer_2")).unwrap().encode("a cat").unwrap()).unsqueeze(0);
    assert_eq!(i64::try_from(ids.max()).unwrap(), end);
    let pooled = |end: Option<i64>| {
        match end {
            Some(end) => copy.set(CONFIG, "eos_token_id", json!(end)),
            None => copy.unset(CONFIG, "eos_token_id"),
        }
        let model = ClipTextModel::open(copy.path("text_encoder_2"), Device::Cpu, Kind::Float).unwrap();
        tch::no_grad(|| model.forward(&ids)).map(|output| output.pooled.unwrap())
    };
    let legacy = pooled(Some(2)).unwrap();
    assert_eq!(pooled(Some(end)).unwrap(), legacy);
    // A token of the text itself.
    let second = ids.int64_value(&[0, 1]);
    assert!(!pooled(Some(second)).unwrap().allclose(&legacy, 1e-3, 1e-4, false));
    // The end of CLIP's own vocabulary does not occur in this one's texts.
    let error = pooled(None).unwrap_err().to_string();
    assert!(error.contains("49407") && error.contains("token ids"), "{error}");
}

#[test]
fn parts_of_different_models() {
    let mut check = Check::default();
    // 6 channels against 4: as an inpainting model's U-Net has more than its autoencoder makes.
    let copy = ModelCopy::new();
    copy.remove("unet");
    fs::create_dir(copy.path("unet")).unwrap();
    let other = ModelCopy::of("unet_sharded");
    for entry in fs::read_dir(other.folder()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        copy.write(&format!("unet/{name}"), other.read(&name));
    }
    check.refused("channels", copy.open(), &["Config"], &[copy.folder().to_str().unwrap(), "6 channels", "4"]);

    // An autoencoder with 3 latent channels.
    let copy = ModelCopy::new();
    let other = ModelCopy::of("vae_plain");
    for file in ["config.json", "diffusion_pytorch_model.safetensors"] {
        copy.write(&format!("vae/{file}"), other.read(file));
    }
    check.refused("channels", copy.open(), &["Config"], &[copy.folder().to_str().unwrap(), "4 channels", "3"]);

    // A text encoder of another width: refused when opened, or at the latest by the first pass.
    let copy = ModelCopy::new();
    copy.set(TEXT_CONFIG, "hidden_size", json!(8));
    copy.set(TEXT_CONFIG, "intermediate_size", json!(8));
    copy.set(TEXT_CONFIG, "num_hidden_layers", json!(1));
    copy.weights(TEXT, |file| {
        *file = Safetensors { header: serde_json::Map::new(), data: vec![] };
        let mut add = |name: &str, shape: &[usize]| file.add(name, "F32", shape, 4 * shape.iter().product::<usize>());
        add("embeddings.token_embedding.weight", &[1514, 8]);
        add("embeddings.position_embedding.weight", &[77, 8]);
        add("final_layer_norm.weight", &[8]);
        add("final_layer_norm.bias", &[8]);
        for norm in ["layer_norm1", "layer_norm2"] {
            add(&format!("encoder.layers.0.{norm}.weight"), &[8]);
            add(&format!("encoder.layers.0.{norm}.bias"), &[8]);
        }
        for linear in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"] {
            add(&format!("encoder.layers.0.{linear}.weight"), &[8, 8]);
            add(&format!("encoder.layers.0.{linear}.bias"), &[8]);
        }
    });
    text(&copy).unwrap();
    let first_pass = |model: StableDiffusion| {
        let condition = model.prompts(&[""], (32, 32))?;
        model.forward(&zeros(&[1, 4, 4, 4]), 1.0, &condition, &mut PlainAttention)
    };
    check.refused("widths of text", copy.open().and_then(first_pass), &["Config", "Shape"], &["16", "8"]);
    check.finish();
}

/// Not as weights are read, in libtorch's words for one operation of one backend.
#[test]
fn kinds_and_devices_that_are_none() {
    let mut check = Check::default();
    let copy = ModelCopy::new();
    for kind in [Kind::Int64, Kind::Bool, Kind::Uint8, Kind::ComplexFloat] {
        check.refused(format!("{kind:?}"), StableDiffusion::open(copy.path(""), Device::Cpu, kind), &["Argument"], &["kind", &format!("{kind:?}")]);
    }
    check.refused("no such GPU", StableDiffusion::open(copy.path(""), Device::Cuda(999), Kind::Float), &["Device"], &["cuda:999"]);
    check.refused("no such device", StableDiffusion::open(copy.path(""), Device::Vulkan, Kind::Float), &["Torch"], &["Vulkan"]);
    check.finish();
}

/// What goes in by the caller's hand: a picture in bytes, one that holds NaN.
#[test]
fn pictures_that_are_none() {
    let mut check = Check::default();
    let model = ModelCopy::new().open().unwrap();
    let picture = |value: f64| Tensor::full([1, 3, 16, 16], value, (Kind::Float, Device::Cpu));
    check.refused("bytes", model.encode(&picture(200.0)), &["Argument"], &["200", "0 to 1", "255"]);
    check.refused("bytes as they are", model.encode(&picture(200.0).to_kind(Kind::Uint8)), &["Argument"], &["200", "0 to 1", "255"]);
    check.refused("NaN", model.encode(&picture(f64::NAN)), &["Argument"], &["NaN"]);
    check.refused("from -1 to 1, twice", model.encode(&picture(-3.0)), &["Argument"], &["-3"]);
    // Resizing overshoots.
    check.taken("a little outside", model.encode(&picture(1.2)));
    check.finish();
}

/// One token for all would be spread over the layer without a word.
#[test]
fn hooks_that_return_another_shape() {
    struct Short(AttentionKind);
    impl AttentionHook for Short {
        fn attend(&mut self, site: &AttentionSite, qkv: Qkv) -> Result<Tensor> {
            let output = qkv.attend()?;
            Ok(if site.kind == self.0 { output.narrow(2, 0, 1) } else { output })
        }
    }
    let mut check = Check::default();
    let model = ModelCopy::new().open().unwrap();
    let condition = model.prompts(&[""], (32, 32)).unwrap();
    for (kind, word) in [(AttentionKind::SelfAttention, "SelfAttention layer 0"), (AttentionKind::CrossAttention, "CrossAttention layer 0")] {
        let output = model.forward(&zeros(&[1, 4, 4, 4]), 1.0, &condition, &mut Short(kind));
        check.refused(word, output, &["Shape"], &["attention hook", word]);
    }
    check.finish();
}

// ---- the tokenizer

#[test]
fn damaged_tokenizers() {
    let copy = ModelCopy::new();
    let mut check = Check::default();
    const VOCAB: &str = "tokenizer/vocab.json";
    const MERGES: &str = "tokenizer/merges.txt";
    let deep = "[".repeat(100_000);
    for text in ["", "{", "[]", "null", "7", "{}", "{\"a\": -1}", "{\"a\": 1.5}", "{\"a\": \"b\"}", deep.as_str()] {
        copy.write(VOCAB, text);
        let shown: String = text.chars().take(20).collect();
        check.refused(format!("{VOCAB} `{shown}`"), tokenizer(&copy), &["Config"], &["vocab.json"]);
    }
    copy.write(VOCAB, [b'{', 0xff, b'}']);
    check.refused("vocab.json that is not UTF-8", tokenizer(&copy), &["Config"], &["vocab.json"]);
    copy.restore(VOCAB);
    for text in ["one", "a b c", "#version: 0.2\nunheard of\n", "\u{e000} \u{e001}", "a b\nc"] {
        copy.write(MERGES, text);
        check.refused(format!("{MERGES} `{text}`"), tokenizer(&copy), &["Config"], &["tokenizer"]);
    }
    copy.write(MERGES, [0xff, 0xfe, b' ', 0xff]);
    check.refused("merges that are not UTF-8", tokenizer(&copy), &["Config"], &["tokenizer"]);
    copy.restore(MERGES);
    for token in ["<|startoftext|>", "<|endoftext|>"] {
        copy.unset(VOCAB, token);
        check.refused(format!("without {token}"), tokenizer(&copy), &["Config"], &["vocab.json", token]);
        copy.restore(VOCAB);
    }
    for file in ["tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json"] {
        for text in ["", "[]", "{", deep.as_str()] {
            copy.write(file, text);
            check.refused(format!("damaged {file}"), tokenizer(&copy), &["Config"], &[file]);
        }
        copy.restore(file);
    }
    copy.set("tokenizer/special_tokens_map.json", "bos_token", json!("<unheard of>"));
    check.refused("another special token", tokenizer(&copy), &["Config"], &["vocab.json", "<unheard of>"]);
    copy.restore("tokenizer/special_tokens_map.json");
    check.taken("the fixture", tokenizer(&copy));

    // Ids beyond the text encoder's vocabulary.
    copy.set(VOCAB, "<|endoftext|>", json!(40_000));
    let outcome = copy.open().and_then(|model| model.prompts(&[""], (32, 32)));
    check.refused("another model's tokenizer", outcome, &["Config", "Argument"], &["vocabulary", "1514", "tokenizer"]);
    copy.restore(VOCAB);
    // More tokens than the text encoder has positions.
    copy.set("tokenizer/special_tokens_map.json", "model_max_length", json!(100));
    let outcome = copy.open().and_then(|model| model.prompts(&[""], (32, 32)));
    check.refused("a tokenizer that is too long", outcome, &["Config", "Shape"], &["77", "100"]);
    check.finish();
}

#[test]
fn damaged_fast_tokenizers() {
    let copy = ModelCopy::of("tokenizer_fast");
    let mut check = Check::default();
    let file = "tokenizer.json";
    let open = || caught(|| ClipTokenizer::open(copy.folder()));
    check.taken("the fixture", open());
    // Cut and spoilt at many places: the parsers of the parts are not alike.
    let whole = String::from_utf8(copy.read(file)).unwrap();
    for part in ["added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "merges", "vocab"] {
        let at = whole.find(&format!("\"{part}\"")).unwrap() + part.len() + 2;
        for spoilt in [1, 5, 10, 20].map(|skip| format!("{}\u{1}{}", &whole[..at + skip], &whole[at + skip..])) {
            copy.write(file, spoilt);
            check.refused(format!("damage in {part}"), open(), &["Config"], &[file]);
        }
        copy.write(file, &whole[..at + 12]);
        check.refused(format!("cut in {part}"), open(), &["Config"], &[file]);
    }
    copy.write(file, &whole);
    let sound = copy.json(file);
    let with = |key: &str, value: Value| {
        let mut model = sound["model"].clone();
        model[key] = value;
        model
    };
    let deep = "[".repeat(100_000);
    for text in ["", "{", "[]", "null", "{}", "{\"model\": {}}", deep.as_str()] {
        copy.write(file, text);
        check.refused(format!("{file} `{}`", &text[..text.len().min(20)]), open(), &["Config"], &[file]);
    }
    for (key, value) in [
        ("model", json!(null)),
        ("model", json!({ "type": "Unheard" })),
        ("added_tokens", json!(7)),
        ("normalizer", json!({ "type": "Unheard" })),
        ("normalizer", json!({ "type": "Precompiled", "precompiled_charsmap": "no base 64!" })),
        ("normalizer", json!({ "type": "Precompiled", "precompiled_charsmap": "AAAA" })),
        ("normalizer", json!({ "type": "Sequence", "normalizers": [{ "type": "Precompiled", "precompiled_charsmap": 7 }] })),
        ("pre_tokenizer", json!(7)),
        // Each made the crate `tokenizers` panic, at once or at the first prompt.
        ("pre_tokenizer", json!({ "type": "FixedLength", "length": 0 })),
        ("pre_tokenizer", json!({ "type": "Split", "pattern": { "Regex": "(a|aa|aaa)+$" }, "behavior": "Removed", "invert": true })),
        (
            "pre_tokenizer",
            json!({ "type": "Sequence", "pretokenizers": [{ "type": "Split", "pattern": { "String": "" }, "behavior": "Removed", "invert": true }] }),
        ),
        ("normalizer", json!({ "type": "Replace", "pattern": { "Regex": "(a|aa|aaa)+$" }, "content": "" })),
        ("model", with("continuing_subword_prefix", json!("##"))),
        // The same prompt, other ids.
        ("model", with("dropout", json!(0.5))),
    ] {
        copy.write(file, serde_json::to_vec(&sound).unwrap());
        copy.set(file, key, value.clone());
        check.refused(format!("{key} {value}"), open(), &["Config"], &[file]);
    }
    copy.write(file, serde_json::to_vec(&sound).unwrap());
    copy.set(file, "model", json!({ "type": "BPE", "vocab": { "a": 0 }, "merges": [] }));
    copy.set(file, "added_tokens", json!([]));
    check.refused("no special tokens", open(), &["Config"], &[file, "<|startoftext|>"]);
    // One that would be found everywhere, for ever.
    copy.write(file, serde_json::to_vec(&sound).unwrap());
    copy.set(
        file,
        "model",
        with("vocab", {
            let mut vocab = sound["model"]["vocab"].clone();
            vocab[""] = json!(0);
            vocab
        }),
    );
    copy.write("special_tokens_map.json", r#"{ "bos_token": "" }"#);
    check.refused("an empty special token", open(), &["Config"], &["special token", "empty"]);
    copy.remove("special_tokens_map.json");
    copy.write(file, serde_json::to_vec(&sound).unwrap());
    check.taken("the fixture again", open());
    check.finish();
}

// ---- a folder's own settings

#[test]
fn bad_settings_of_a_folder() {
    let copy = ModelCopy::new();
    let mut check = Check::default();
    let mut refused = |key: &str, value: Value| {
        copy.write(OWN, serde_json::to_vec(&json!({ key: value })).unwrap());
        // The last of `learning_rate`'s words, as the check of all settings names it.
        let word = key.split('_').next().unwrap();
        check.refused(format!("{key} {value}"), copy.open(), &["Config"], &[OWN, word]);
    };
    for key in ["steps", "iterations"] {
        for value in no_counts() {
            refused(key, value);
        }
    }
    for key in ["learning_rate", "content_weight", "smoothing"] {
        for value in [json!(-1e-9), json!(-1), json!("0.05"), json!(true), json!([0.05]), json!({})] {
            refused(key, value);
        }
    }
    for value in [
        json!([]),
        json!([3]),
        json!([3, 3]),
        json!([9, 3]),
        json!([-1, 3]),
        json!([0.5, 3]),
        json!(["3", "9"]),
        json!([3, 9, 12]),
        json!([3, "x", 9]),
        json!([-1, 3, 9]),
        json!([1.5, 3, 9]),
        json!([3, 9, null]),
        json!([[3, 9], 3, 9]),
        json!([0, 1e30]),
        json!("3..9"),
        json!(3),
        json!({}),
        json!({ "start": 3, "end": 9 }),
    ] {
        refused("layers", value);
    }
    for value in
        [json!([]), json!([64]), json!([64, 64, 64]), json!([0, 64]), json!([64, -8]), json!([64.5, 64]), json!("64x64"), json!(64), json!({})]
    {
        refused("size", value);
    }
    refused("size", json!([40_000, 8]));
    refused("size", json!([32_768, 32_768]));
    refused("size", json!([i64::MAX, i64::MAX]));
    refused("smoothing", json!(1.01));
    for value in [json!(0), json!("no"), json!([false])] {
        refused("adain", value);
    }
    check.finish();
}

/// What holds for tasks by sampling, in an object of its own.
#[test]
fn bad_settings_of_a_folder_for_sampling() {
    let copy = ModelCopy::new();
    let mut check = Check::default();
    let mut refused = |sampling: Value, words: &[&str]| {
        copy.write(OWN, serde_json::to_vec(&json!({ "text_to_image": sampling })).unwrap());
        check.refused(&sampling, copy.open(), &["Config"], &[&[OWN, "`text_to_image`"], words].concat());
    };
    for value in [json!([]), json!(3), json!("fast"), json!(true), json!([{ "steps": 3 }])] {
        refused(value, &["object"]);
    }
    refused(json!({ "steps": 0 }), &["steps", "0"]);
    for key in ["steps", "iterations"] {
        for value in no_counts().into_iter().filter(|value| *value != json!(0)) {
            refused(json!({ key: value }), &[key]);
        }
    }
    for (key, word) in [("learning_rate", "learning"), ("content_weight", "content"), ("smoothing", "smoothing"), ("guidance", "guidance")] {
        for value in [json!(-1e-9), json!(-1), json!("0.05"), json!(true), json!([0.05]), json!({})] {
            refused(json!({ key: value }), &[word]);
        }
    }
    for value in [json!(0), json!("no"), json!([false])] {
        refused(json!({ "adain": value }), &["adain", "true or false"]);
    }
    check.finish();
}

/// Layers that the network does not have: refused when opened, or at the latest by the first pass.
#[test]
fn settings_of_a_folder_beyond_its_network() {
    let copy = ModelCopy::new();
    let mut check = Check::default();
    for layers in [[10, 17], [0, 999], [16, 20]] {
        copy.write(OWN, serde_json::to_vec(&json!({ "layers": layers })).unwrap());
        let outcome = copy.open().and_then(|model| model.extractor((32, 32))?.extract(&zeros(&[1, 4, 4, 4]), 1.0).map(drop));
        check.refused(format!("{layers:?}"), outcome, &["Config", "MissingLayers"], &["layers", &layers[1].to_string(), "16"]);
    }
    check.finish();
}

#[test]
fn good_settings_of_a_folder() {
    let copy = ModelCopy::new();
    let plain = copy.open().unwrap();
    let settings = plain.settings(Task::StyleTransfer);
    // The last six of 16, and the training size, 8 latents of 8 pixels; all else is the task's.
    assert_eq!(plain.unet().self_attention_layers(), 16);
    assert_eq!(plain.last_layers(), 10..16);
    let mut expected = Settings::style_transfer();
    (expected.layers, expected.size) = (Some(10..16), Some((64, 64)));
    assert_eq!(settings, expected);
    assert_eq!(plain.extractor((64, 64)).unwrap().layers, 10..16);
    for &task in Task::ALL {
        let mut expected = task.settings();
        (expected.layers, expected.size) = (Some(10..16), Some((64, 64)));
        assert_eq!(plain.settings(task), expected, "the authors'");
    }

    let own = json!({ "layers": [3, 9], "size": [48, 32], "steps": 20, "iterations": 3, "learning_rate": 0.1, "content_weight": 0.5, "adain": true });
    copy.write(OWN, serde_json::to_vec(&own).unwrap());
    let model = copy.open().unwrap();
    let settings = model.settings(Task::StyleTransfer);
    (expected.layers, expected.size, expected.steps, expected.iterations) = (Some(3..9), Some((32, 48)), 20, 3);
    (expected.learning_rate, expected.content_weight, expected.adain) = (0.1, 0.5, true);
    assert_eq!(settings, expected, "size is [width, height] in the file");
    assert_eq!(model.extractor((64, 64)).unwrap().layers, 3..9);
    assert_eq!(model.last_layers(), 10..16);

    // Some of them, null for none, whole numbers for numbers, the bounds.
    for (own, change) in [
        (json!({}), (|_| {}) as fn(&mut Settings)),
        (json!({ "steps": null, "layers": null, "size": null }), |_| {}),
        (json!({ "steps": 1 }), |s| s.steps = 1),
        (json!({ "learning_rate": 1, "content_weight": 0 }), |s| (s.learning_rate, s.content_weight) = (1.0, 0.0)),
        (json!({ "smoothing": 0.25 }), |s| s.smoothing = 0.25),
        (json!({ "smoothing": 1, "style_transfer": { "smoothing": 0 } }), |_| {}),
        (json!({ "layers": [0, 1] }), |s| s.layers = Some(0..1)),
        (json!({ "style_transfer": { "adain": true }, "texture_synthesis": { "adain": false } }), |s| s.adain = true),
        (json!({ "adain": true, "style_transfer": { "adain": false } }), |_| {}),
        (json!({ "layers": [15, 16] }), |s| s.layers = Some(15..16)),
    ] {
        copy.write(OWN, serde_json::to_vec(&own).unwrap());
        let mut expected = Settings::style_transfer();
        (expected.layers, expected.size) = (Some(10..16), Some((64, 64)));
        change(&mut expected);
        assert_eq!(copy.open().unwrap().settings(Task::StyleTransfer), expected, "{own}");
    }
}

#[test]
fn good_settings_of_a_folder_for_sampling() {
    let copy = ModelCopy::new();
    let own = json!({
        "layers": [3, 9], "steps": 20, "learning_rate": 0.1,
        "text_to_image": { "steps": 7, "iterations": 0, "learning_rate": 0.02, "content_weight": 0.5, "guidance": 3, "adain": false },
    });
    copy.write(OWN, serde_json::to_vec(&own).unwrap());
    let model = copy.open().unwrap();
    let mut expected = Settings::text_to_image();
    (expected.layers, expected.size, expected.steps, expected.iterations) = (Some(3..9), Some((64, 64)), 7, 0);
    (expected.learning_rate, expected.content_weight, expected.guidance, expected.adain) = (0.02, 0.5, 3.0, false);
    assert_eq!(model.settings(Task::TextToImage), expected);
    for task in [Task::StyleTransfer, Task::TextureSynthesis] {
        let mut expected = task.settings();
        (expected.layers, expected.size, expected.steps, expected.learning_rate) = (Some(3..9), Some((64, 64)), 20, 0.1);
        assert_eq!(model.settings(task), expected);
    }

    // Another task by sampling has settings of its own; an object comes before what stands outside.
    let mut expected = Settings::style_transfer_by_sampling();
    (expected.layers, expected.size) = (Some(3..9), Some((64, 64)));
    assert_eq!(model.settings(Task::StyleTransferBySampling), expected);
    copy.write(OWN, r#"{ "steps": 20, "iterations": 2, "style_transfer": { "steps": 30 } }"#);
    let model = copy.open().unwrap();
    let found = [Task::StyleTransfer, Task::TextureSynthesis].map(|task| model.settings(task));
    assert_eq!(found.map(|settings| (settings.steps, settings.iterations)), [(30, 2), (20, 2)]);

    // One of the two leaves the other as it was; null and an empty object are none.
    let mut plain = Settings::text_to_image();
    (plain.layers, plain.size) = (Some(10..16), Some((64, 64)));
    for own in [
        json!({ "steps": 20, "iterations": 9, "learning_rate": 0.1, "content_weight": 9, "adain": false }),
        json!({ "text_to_image": null }),
        json!({ "text_to_image": {} }),
    ] {
        copy.write(OWN, serde_json::to_vec(&own).unwrap());
        assert_eq!(copy.open().unwrap().settings(Task::TextToImage), plain, "{own}");
    }
    copy.write(OWN, r#"{ "text_to_image": { "adain": null, "guidance": 0, "steps": null } }"#);
    plain.guidance = 0.0;
    assert_eq!(copy.open().unwrap().settings(Task::TextToImage), plain);
}

/// Its own preset, under the name that all text-to-image has in a folder.
#[test]
fn good_settings_of_an_sdxl_folder() {
    let copy = ModelCopy::of("sdxl");
    let plain = copy.open().unwrap();
    let mut expected = Settings::text_to_image_xl();
    let (layers, size) = (plain.last_layers(), plain.settings(Task::StyleTransfer).size);
    (expected.layers, expected.size) = (Some(layers), size);
    assert_eq!(plain.settings(Task::TextToImage), expected);
    assert_ne!((expected.iterations, expected.guidance), (Settings::text_to_image().iterations, Settings::text_to_image().guidance));
    copy.write(OWN, r#"{ "text_to_image": { "steps": 7 } }"#);
    expected.steps = 7;
    assert_eq!(copy.open().unwrap().settings(Task::TextToImage), expected);
    copy.write(OWN, r#"{ "text_to_image": { "guidance": 3 } }"#);
    (expected.steps, expected.guidance) = (50, 3.0);
    assert_eq!(copy.open().unwrap().settings(Task::TextToImage), expected);
}

// ---- what is told through tracing

#[test]
fn unused_tensors_are_reported() {
    let copy = ModelCopy::new();
    // A sound model, its stray `position_ids` included, gives no warning, but a report for who listens.
    let (warnings, outcome) = told(tracing::Level::WARN, || copy.open());
    outcome.unwrap();
    assert_eq!(warnings, "");
    let (report, outcome) = told(tracing::Level::DEBUG, || copy.open());
    outcome.unwrap();
    for file in [UNET, VAE, TEXT] {
        assert!(report.lines().any(|line| line.contains(file) && line.contains("taken")), "{file}: {report}");
    }

    copy.weights(VAE, |file| {
        file.add("decoder.stray.weight", "F32", &[2], 8);
        file.add("loss.logvar", "I64", &[1], 8);
    });
    let (warnings, outcome) = told(tracing::Level::WARN, || copy.open());
    outcome.unwrap();
    let lines: Vec<_> = warnings.lines().collect();
    let [line] = lines.as_slice() else { panic!("one line expected: {warnings}") };
    for word in ["WARN", VAE, "decoder.stray.weight", "loss.logvar", "unused=2"] {
        assert!(line.contains(word), "{word}: {line}");
    }
    assert!(!line.contains("decoder.conv_in.weight"), "{line}");

    // Very many are counted, and the first of them named.
    copy.restore(VAE);
    copy.weights(VAE, |file| (0..500).for_each(|i| file.add(&format!("stray.{i:03}"), "F32", &[1], 4)));
    let (warnings, outcome) = told(tracing::Level::WARN, || copy.open());
    outcome.unwrap();
    assert!(warnings.contains("unused=500") && warnings.contains("stray.000") && !warnings.contains("stray.499"), "{warnings}");
    assert!(warnings.len() < 2000);
}

#[test]
fn unknown_settings_only_warn() {
    let copy = ModelCopy::new();
    copy.write(OWN, r#"{ "steps": 5, "stepps": 0, "layer": [9, 3] }"#);
    let (warnings, outcome) = told(tracing::Level::WARN, || copy.open());
    let model = outcome.unwrap();
    assert_eq!(model.settings(Task::StyleTransfer).steps, 5);
    for key in ["stepps", "layer"] {
        let quoted = format!("\"{key}\"");
        assert!(warnings.lines().any(|line| line.contains("WARN") && line.contains(OWN) && line.contains(&quoted)), "{key}: {warnings}");
    }
    assert_eq!(warnings.lines().count(), 2, "{warnings}");

    // What only sampling has is not known outside of it, nor in it what is said once for all tasks.
    copy.write(OWN, r#"{ "guidance": 3, "text_to_image": { "steps": 5, "stepps": 0, "layers": [3, 9] } }"#);
    let (warnings, outcome) = told(tracing::Level::WARN, || copy.open());
    let settings = outcome.unwrap().settings(Task::TextToImage);
    assert_eq!((settings.steps, settings.guidance, settings.layers), (5, 7.5, Some(10..16)));
    for key in ["guidance", "text_to_image.stepps", "text_to_image.layers"] {
        assert!(warnings.lines().any(|line| line.contains(OWN) && line.contains(&format!("\"{key}\""))), "{key}: {warnings}");
    }
    assert_eq!(warnings.lines().count(), 3, "{warnings}");
}

#[test]
fn overlong_prompts_warn() {
    let model = ModelCopy::new().open().unwrap();
    let prompt = "word ".repeat(100);
    let (warnings, outcome) = told(tracing::Level::WARN, || model.prompts(&[&prompt], (64, 64)));
    assert_eq!(outcome.unwrap().text.size(), [1, 77, 16]);
    assert!(warnings.contains("too long") && warnings.contains("room=75"), "{warnings}");
    let (warnings, outcome) = told(tracing::Level::WARN, || model.prompts(&["short"], (64, 64)));
    outcome.unwrap();
    assert_eq!(warnings, "");
}

// ---- without a text encoder

#[test]
fn controls_without_effect_or_of_another_size_warn() {
    let mut model = ModelCopy::new().open().unwrap();
    let folder = model_copy::fixtures().join("controlnet_sd15");
    let net = model.add_controlnet(ControlNet::open(folder, Device::Cpu, Kind::Float).unwrap()).unwrap();
    let (told_nothing, control) = told(tracing::Level::WARN, || model.control(net, &zeros(&[1, 3, 64, 96]), (64, 96)).unwrap());
    assert_eq!(told_nothing, "");
    let (warning, _) = told(tracing::Level::WARN, || model.control(net, &zeros(&[1, 3, 32, 48]), (64, 96)).unwrap());
    assert!(warning.contains("48x32") && warning.contains("96x64"), "{warning}");
    let (warning, _) = told(tracing::Level::WARN, || control.between(0.4, 0.5, &[3.0, 2.0, 1.0]).unwrap());
    assert!(warning.contains("no step"), "{warning}");
}

#[test]
fn without_a_text_encoder() {
    let copy = ModelCopy::new();
    copy.remove("text_encoder");
    copy.remove("tokenizer");
    // Half a download is not a model without one.
    let mut check = Check::default();
    check.refused("named, but missing", copy.open(), &["Config"], &["model_index.json", "text_encoder"]);
    copy.remove("model_index.json");
    let model = copy.open().unwrap();
    let null = model.prompts(&[""], (64, 64)).unwrap();
    assert_eq!(null.text, zeros(&[1, 1, 16]));
    assert_eq!(model.prompts(&["", "", ""], (64, 64)).unwrap().text, zeros(&[3, 1, 16]));
    let latents = noise(&[2, 4, 4, 4]);
    assert_eq!(model.forward(&latents, 1.0, &null, &mut PlainAttention).unwrap().size(), latents.size());
    assert_eq!(model.extractor((64, 64)).unwrap().extract(&latents, 1.0).unwrap().len(), 6);

    for prompts in [["a cat"].as_slice(), &["", "a cat"], &[" "]] {
        let prompt = format!("`{}`", prompts.last().unwrap());
        check.refused(format!("{prompts:?}"), model.prompts(prompts, (64, 64)), &["Argument"], &["prompt", &prompt, "text encoder"]);
    }
    check.refused("no prompt", model.prompts::<&str>(&[], (64, 64)), &["Argument"], &["prompts", "\"\""]);
    check.finish();
}

// ---- tensors that do not fit

#[test]
fn pictures_and_latents_that_do_not_fit() {
    let model = ModelCopy::new().open().unwrap();
    let mut check = Check::default();
    for shape in [
        [1, 4, 64, 64].as_slice(),
        &[1, 1, 64, 64],
        &[1, 0, 64, 64],
        &[0, 3, 64, 64],
        &[1, 3, 0, 64],
        &[1, 3, 64, 0],
        &[3, 64, 64],
        &[64, 64],
        &[1, 1, 3, 64, 64],
        &[],
        &[0],
        &[1, 3, 60, 64],
        &[1, 3, 64, 65],
        &[1, 3, 7, 7],
    ] {
        let size = format!("{shape:?}");
        check.refused(format!("encode {size}"), model.encode(&zeros(shape)), &["Shape"], &["picture", &size]);
        check.refused(format!("the autoencoder's encode {size}"), model.vae().encode(&zeros(shape)), &["Shape"], &["picture", &size, "of 8"]);
    }
    let condition = model.prompts(&[""], (64, 64)).unwrap();
    for shape in
        [[1, 3, 8, 8].as_slice(), &[1, 8, 8, 8], &[1, 0, 8, 8], &[0, 4, 8, 8], &[1, 4, 0, 8], &[1, 4, 8, 0], &[4, 8, 8], &[1, 1, 4, 8, 8], &[1], &[]]
    {
        let size = format!("{shape:?}");
        check.refused(format!("decode {size}"), model.decode(&zeros(shape)), &["Shape"], &["latents", &size, "(batch, 4, height, width)"]);
        let forward = model.forward(&zeros(shape), 1.0, &condition, &mut PlainAttention);
        check.refused(format!("forward {size}"), forward, &["Shape"], &["latents", &size, "(batch, 4, height, width)"]);
        let extract = model.extractor((64, 64)).unwrap().extract(&zeros(shape), 1.0);
        check.refused(format!("extract {size}"), extract, &["Shape"], &["latents", &size]);
    }
    // Sides that are no multiples of anything go through the U-Net all the same.
    check.taken("odd sides", model.forward(&zeros(&[1, 4, 5, 7]), 1.0, &condition, &mut PlainAttention));
    check.finish();
}

#[test]
fn conditions_that_do_not_fit() {
    let model = ModelCopy::new().open().unwrap();
    let mut check = Check::default();
    let latents = zeros(&[2, 4, 4, 4]);
    for shape in [[1, 77, 15].as_slice(), &[1, 77, 17], &[3, 77, 16], &[0, 77, 16], &[1, 0, 16], &[77, 16], &[16], &[], &[1, 1, 77, 16]] {
        let forward = model.forward(&latents, 1.0, &Condition::new(zeros(shape)), &mut PlainAttention);
        check.refused(format!("text {shape:?}"), forward, &["Shape"], &["condition", &format!("{shape:?}"), "1 or 2", "16"]);
    }
    for shape in [[1, 77, 16].as_slice(), &[2, 77, 16], &[2, 1, 16]] {
        check.taken(format!("text {shape:?}"), model.forward(&latents, 1.0, &Condition::new(zeros(shape)), &mut PlainAttention));
    }
    for (size, word) in [((0, 64), "64x0"), ((64, -1), "-1x64"), ((1 << 20, 64), "too large")] {
        check.refused(word, model.prompts(&[""], size), &["Argument"], &["size", word]);
    }
    check.finish();
}

/// What SDXL wants beside the text.
#[test]
fn pooled_conditions_that_do_not_fit() {
    let copy = ModelCopy::of("sdxl/unet");
    let unet = UNet::open(copy.folder(), Device::Cpu, Kind::Float).unwrap();
    let mut check = Check::default();
    // 64 numbers in all, 6 of them ids of 8 each.
    let (latents, text, pooled, ids) = (zeros(&[2, 4, 8, 8]), [1, 77, 24], [1, 16], [1, 6]);
    let forward = |pooled: &[i64], ids: &[i64]| {
        let condition = Condition::new(zeros(&text)).with_pooled(zeros(pooled), zeros(ids));
        unet.forward(&latents, 1.0, &condition, &mut PlainAttention)
    };
    check.taken("one for all", forward(&pooled, &ids));
    check.taken("one for each", forward(&[2, 16], &[2, 6]));
    for wrong in [[1, 15].as_slice(), &[1, 0], &[3, 16], &[0, 16], &[16], &[], &[1, 1, 16]] {
        check.refused(format!("pooled {wrong:?}"), forward(wrong, &ids), &["Shape"], &["pooled", &format!("{wrong:?}")]);
    }
    for wrong in [[1, 5].as_slice(), &[1, 7], &[1, 0], &[3, 6], &[0, 6], &[6], &[], &[1, 1, 6]] {
        check.refused(format!("time ids {wrong:?}"), forward(&pooled, wrong), &["Shape"], &["time ids", &format!("{wrong:?}")]);
    }
    check.refused(
        "without",
        unet.forward(&latents, 1.0, &Condition::new(zeros(&text)), &mut PlainAttention),
        &["Argument"],
        &["condition", "pooled"],
    );
    let condition = Condition::new(zeros(&text)).with_pooled(zeros(&pooled), zeros(&ids));
    for timesteps in [3, 0] {
        let outcome = unet.forward_at(&latents, &zeros(&[timesteps]), &condition, &mut PlainAttention);
        check.refused(format!("{timesteps} timesteps for 2"), outcome, &["Shape"], &["timestep"]);
    }
    check.finish();
}

/// More than any machine's addresses can hold; one number in truth.
#[test]
fn tensors_beyond_memory() {
    let model = ModelCopy::new().open().unwrap();
    let mut check = Check::default();
    let huge = |channels: i64| zeros(&[1]).expand([1, channels, 1 << 24, 1 << 24], false);
    let condition = model.prompts(&[""], (64, 64)).unwrap();
    for (case, outcome) in [
        ("encode", caught(|| model.encode(&huge(3)))),
        ("the autoencoder's encode", caught(|| tch::no_grad(|| model.vae().encode(&huge(3))))),
        ("decode", caught(|| model.decode(&huge(4)))),
        ("the autoencoder's decode", caught(|| tch::no_grad(|| model.vae().decode(&huge(4))))),
        ("forward", caught(|| tch::no_grad(|| model.forward(&huge(4), 1.0, &condition, &mut PlainAttention)))),
    ] {
        check.refused(case, outcome, &["Torch"], &["libtorch"]);
    }
    check.finish();
}

/// Sound for JSON, absurd for f32: taken or refused, used or refused, but never a panic.
#[test]
fn numbers_beyond_f32() {
    let copy = ModelCopy::new();
    let mut check = Check::default();
    let mut cases = 0;
    for (file, key) in [
        (UNET_CONFIG, "norm_eps"),
        (UNET_CONFIG, "mid_block_scale_factor"),
        (UNET_CONFIG, "freq_shift"),
        (VAE_CONFIG, "scaling_factor"),
        (VAE_CONFIG, "shift_factor"),
        (TEXT_CONFIG, "layer_norm_eps"),
        (SCHEDULER, "beta_start"),
        (SCHEDULER, "beta_end"),
        (SCHEDULER, "clip_sample_range"),
    ] {
        let sound = copy.read(file);
        for number in ["1e300", "1e39", "1e-300", "-1e300"] {
            cases += 1;
            copy.set(file, key, serde_json::from_str(number).unwrap());
            if key == "clip_sample_range" {
                copy.set(file, "clip_sample", json!(true));
            }
            let used = catch_unwind(AssertUnwindSafe(|| use_all(&copy, file)));
            if used.is_err() {
                check.failures.push(format!("{file} {key} {number}: panicked"));
            }
            copy.write(file, &sound);
        }
    }
    let model = copy.open().unwrap();
    for (weight, rate) in [(1e300, 0.05), (0.25, 1e300), (f64::MAX, f64::MAX), (1e-300, 1e-300)] {
        cases += 1;
        let run = caught(|| {
            let style = noise(&[1, 4, 4, 4]);
            let references = References::style(style.copy()).with_content(style);
            let mut run = Distiller::style_transfer(model.extractor((32, 32))?, model.timesteps(3)?, references, weight)?;
            run.optimizer = Adam::new(AdamConfig::with_learning_rate(rate));
            run.finish()
        });
        match run {
            Ok(latents) => assert_eq!(latents.isfinite().all().int64_value(&[]), 1),
            Err(error) => check.refused(format!("weight {weight}, rate {rate}"), Err::<(), _>(error), &["NotFinite", "Argument"], &[]),
        }
    }
    check.cases = cases;
    check.finish();
}

#[test]
fn token_ids_that_do_not_fit() {
    let copy = ModelCopy::new();
    let encoder = text(&copy).unwrap();
    let mut check = Check::default();
    let ids = |shape: &[i64], id: i64| Tensor::full(shape, id, (Kind::Int64, Device::Cpu));
    for shape in [[1, 78].as_slice(), &[1, 0], &[0, 77], &[77], &[], &[1, 1, 77]] {
        check.refused(format!("{shape:?}"), encoder.forward(&ids(shape, 1)), &["Shape"], &["token ids", "77"]);
    }
    for id in [1514, -1, i64::MAX, i64::MIN] {
        check.refused(id, encoder.forward(&ids(&[1, 77], id)), &["Argument"], &["token ids", "1514"]);
    }
    check.taken("the last id", encoder.forward(&ids(&[2, 5], 1513)));
    check.finish();
}

#[test]
fn numbers_that_are_none_end_a_run() {
    let model = ModelCopy::new().open().unwrap();
    let style = noise(&[1, 4, 4, 4]);
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let start = noise(&[1, 4, 4, 4]);
        let run = |latents: Tensor, style: &Tensor| {
            let extractor = model.extractor((32, 32)).unwrap();
            Distiller::new(extractor, model.timesteps(10).unwrap(), References::style(style.copy()), latents)
        };
        let mut sound = run(start.copy(), &style);
        for _ in 0..2 {
            sound.advance().unwrap().unwrap();
        }
        // The third step meets a number that is none; the run stands where it stood.
        let kept = sound.latents.copy();
        let _ = sound.latents.get(0).get(1).get(2).get(3).fill_(bad);
        let error = sound.advance().unwrap_err();
        assert!(matches!(error, Error::NotFinite { step: 3, what: "loss" | "latents", .. }), "{error:?}");
        let (message, timestep) = (error.to_string(), sound.timesteps[2].to_string());
        assert!(message.contains("step 3") && message.contains(&timestep) && message.contains("learning rate"), "{message}");
        assert_eq!(sound.step, 2);
        sound.latents = kept;
        assert_eq!(sound.advance().unwrap().unwrap().step, 3);

        let mut broken = run(start, &(&style + bad));
        let error = broken.advance().unwrap_err();
        assert!(matches!(error, Error::NotFinite { step: 1, .. }), "{error:?}");
    }
}

#[test]
fn layers_outside_of_the_network() {
    let model = ModelCopy::new().open().unwrap();
    let condition = || model.prompts(&[""], (32, 32)).unwrap();
    let mut check = Check::default();
    for layers in [0..17, 10..999, 16..17, usize::MAX - 1..usize::MAX] {
        let shown = format!("{}..{}", layers.start, layers.end);
        let extractor = FeatureExtractor::new(&model, condition(), layers);
        let mut run = Distiller::new(extractor, model.timesteps(5).unwrap(), References::style(zeros(&[1, 4, 4, 4])), zeros(&[1, 4, 4, 4]));
        check.refused(&shown, run.advance(), &["MissingLayers"], &["layers", &shown, "16"]);
    }
    check.finish();
}

// ---- at random

/// Marsaglia's xorshift.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end as u64) as usize
    }
}

/// Some bytes flipped in what a program parses: taken or refused, but never a panic, and what is taken can be used.
#[test]
fn random_damage_never_panics() {
    let copy = ModelCopy::new();
    copy.write(OWN, r#"{"layers": [3, 9], "size": [48, 32], "steps": 20, "iterations": 3, "learning_rate": 0.1, "content_weight": 0.5}"#);
    copy.write("tokenizer/tokenizer.json", ModelCopy::of("tokenizer_fast").read("tokenizer.json"));
    let files = [
        UNET,
        VAE,
        TEXT,
        UNET_CONFIG,
        VAE_CONFIG,
        TEXT_CONFIG,
        SCHEDULER,
        OWN,
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer.json",
    ];
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let (mut taken, mut refused, started) = (0, 0, Instant::now());
    for round in 0..100 {
        for file in files {
            let sound = copy.read(file);
            let parsed = if file.ends_with(".safetensors") { 8 + header_length(&sound) } else { sound.len() };
            let mut damaged = sound.clone();
            for _ in 0..=random.below(4) {
                let at = random.below(parsed);
                damaged[at] = match random.below(4) {
                    0 => random.below(256) as u8,
                    // Digits in place of digits keep the file well-formed.
                    1 | 2 if damaged[at].is_ascii_digit() => b'0' + random.below(10) as u8,
                    _ => damaged[at] ^ (1 << random.below(8)),
                };
            }
            copy.write(file, &damaged);
            let fast = file == "tokenizer/tokenizer.json";
            if fast {
                copy.remove("tokenizer/vocab.json");
            }
            match catch_unwind(AssertUnwindSafe(|| use_all(&copy, file))) {
                Ok(Ok(())) => taken += 1,
                Ok(Err(error)) => {
                    assert!(!error.to_string().is_empty());
                    refused += 1;
                }
                Err(_) => panic!("panic in round {round} for {file}: {}", String::from_utf8_lossy(&damaged[..parsed.min(2000)])),
            }
            if fast {
                copy.restore("tokenizer/vocab.json");
            }
            copy.write(file, sound);
        }
    }
    println!("{taken} taken, {refused} refused in {:?}", started.elapsed());
    assert!(taken > 20 && refused > 50, "{taken} taken, {refused} refused: the damage is too small or too large");
}

/// Opens and uses the part that a file belongs to.
fn use_all(copy: &ModelCopy, file: &str) -> Result<()> {
    match file.split('/').next().unwrap() {
        "unet" => {
            let unet = unet(copy)?;
            let condition = Condition::new(zeros(&[1, 2, unet.cross_attention_dim()]));
            unet.forward(&zeros(&[1, unet.in_channels(), 3, 2]), 1.0, &condition, &mut PlainAttention).map(drop)
        }
        "vae" => {
            let vae = vae(copy)?;
            let factor = vae.factor();
            let latents = tch::no_grad(|| vae.encode(&zeros(&[1, 3, factor, 2 * factor])))?;
            tch::no_grad(|| vae.decode(&latents)).map(drop)
        }
        "text_encoder" => text(copy)?.forward(&Tensor::ones([1, 3], (Kind::Int64, Device::Cpu))).map(drop),
        "tokenizer" => {
            let tokenizer = tokenizer(copy)?;
            for prompt in ["", "a painting of 12 cats", "\u{1f600}\u{301} <|endoftext|> \u{0}"] {
                assert_eq!(tokenizer.encode(prompt)?.len(), tokenizer.length());
            }
            Ok(())
        }
        "scheduler" => {
            let ddim = Ddim::new(&scheduler_config(copy.path(file))?, 10)?;
            assert_eq!(ddim.timesteps().len(), 10);
            ddim.step(5, &zeros(&[2]), &zeros(&[2])).map(drop)
        }
        _ => {
            let model = copy.open()?;
            let settings = model.settings(Task::StyleTransfer);
            settings.check()
        }
    }
}
