//! Which of a repository's files a model needs.

use super::is_plain;
use crate::stable_diffusion::weights;
use std::path::Path;

/// The files to fetch of a repository that has those for which `has` is true, in the order of use; of weights in several
/// files the index, which leads to the others (see [`shards`]). An error says what the repository lacks.
pub(super) fn needed(has: &dyn Fn(&str) -> bool, half: bool) -> Result<Vec<String>, String> {
    let mut files = ["model_index.json", "attention_distillation.json"].into_iter().filter(|file| has(file)).map(str::to_owned).collect::<Vec<_>>();
    let mut networks = vec![("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")];
    // SDXL has two.
    let pairs = [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")];
    let encoders = pairs.into_iter().filter(|(encoder, _)| has(&format!("{encoder}/config.json"))).collect::<Vec<_>>();
    if let [("text_encoder_2", _)] = encoders.as_slice() {
        return Err("has a text_encoder_2 but no text_encoder; if it is SDXL's refiner, use the base model".into());
    }
    networks.extend(encoders.iter().map(|(encoder, _)| (*encoder, "model")));
    let configs = networks.iter().map(|(folder, _)| format!("{folder}/config.json"));
    for config in std::iter::once("scheduler/scheduler_config.json".to_owned()).chain(configs) {
        if !has(&config) {
            return Err(format!("has no {config}, so it is no Stable Diffusion model in diffusers layout"));
        }
        files.push(config);
    }
    for (_, folder) in encoders {
        let tokenizer = |name: &&str| has(&format!("{folder}/{name}"));
        if !["vocab.json", "merges.txt"].iter().all(tokenizer) && !tokenizer(&"tokenizer.json") {
            return Err(format!("has neither {folder}/vocab.json and merges.txt nor {folder}/tokenizer.json"));
        }
        let names = ["vocab.json", "merges.txt", "tokenizer.json", "special_tokens_map.json", "tokenizer_config.json", "added_tokens.json"];
        files.extend(names.iter().filter(|name| tokenizer(name)).map(|name| format!("{folder}/{name}")));
    }
    for (folder, stem) in networks {
        let Some(file) = weights::file_names(stem, half).map(|name| format!("{folder}/{name}")).find(|file| has(file)) else {
            return Err(format!("has no safetensors weights of the {folder} ({folder}/{stem}.safetensors); pickles (.bin, .ckpt) are not read"));
        };
        files.push(file);
    }
    Ok(files)
}

/// The files of weights that a file at `path` names, if it is an index of such.
pub(super) fn shards(file: &str, path: &Path) -> Result<Vec<String>, String> {
    let Some((folder, _)) = file.split_once('/').filter(|(_, name)| name.contains(".safetensors.index")) else { return Ok(vec![]) };
    let shards = weights::shards(path).map_err(|error| error.to_string())?;
    let names = shards.iter().map(|shard| shard.file_name().and_then(|name| name.to_str()).unwrap_or_default());
    let checked = names.map(|name| match is_plain(name) {
        true => Ok(format!("{folder}/{name}")),
        false => Err(format!("refused: {file} names {name:?}, which cannot be fetched")),
    });
    checked.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::BTreeSet, fs};

    /// As of the oldest repositories, with every kind of file that one of them has.
    const SD15: &str = "
        .gitattributes README.md model_index.json v1-5-pruned.ckpt v1-5-pruned-emaonly.safetensors v1-inference.yaml
        feature_extractor/preprocessor_config.json scheduler/scheduler_config.json
        safety_checker/config.json safety_checker/model.safetensors safety_checker/model.fp16.safetensors safety_checker/pytorch_model.bin
        text_encoder/config.json text_encoder/model.safetensors text_encoder/model.fp16.safetensors
        text_encoder/pytorch_model.bin text_encoder/pytorch_model.fp16.bin text_encoder/flax_model.msgpack
        text_encoder/openvino_model.bin text_encoder/openvino_model.xml text_encoder/model.onnx
        tokenizer/merges.txt tokenizer/special_tokens_map.json tokenizer/tokenizer_config.json tokenizer/vocab.json tokenizer/added_tokens.json
        unet/config.json unet/diffusion_pytorch_model.bin unet/diffusion_pytorch_model.fp16.bin
        unet/diffusion_pytorch_model.safetensors unet/diffusion_pytorch_model.fp16.safetensors
        unet/diffusion_pytorch_model.non_ema.bin unet/diffusion_pytorch_model.non_ema.safetensors
        unet/diffusion_flax_model.msgpack unet/openvino_model.bin unet/openvino_model.xml unet/model.onnx unet/weights.pb
        vae/config.json vae/diffusion_pytorch_model.bin vae/diffusion_pytorch_model.safetensors vae/diffusion_pytorch_model.fp16.bin
        vae_decoder/model.onnx vae_encoder/model.onnx vae_decoder/openvino_model.bin";

    /// As of SDXL's base model.
    const SDXL: &str = "
        .gitattributes LICENSE.md README.md model_index.json pipeline.png
        sd_xl_base_1.0.safetensors sd_xl_base_1.0_0.9vae.safetensors sd_xl_offset_example-lora_1.0.safetensors
        scheduler/scheduler_config.json
        text_encoder/config.json text_encoder/model.safetensors text_encoder/model.fp16.safetensors
        text_encoder/flax_model.msgpack text_encoder/model.onnx text_encoder/openvino_model.bin text_encoder/openvino_model.xml
        text_encoder_2/config.json text_encoder_2/model.safetensors text_encoder_2/model.fp16.safetensors
        text_encoder_2/flax_model.msgpack text_encoder_2/model.onnx text_encoder_2/model.onnx_data text_encoder_2/openvino_model.bin
        tokenizer/merges.txt tokenizer/special_tokens_map.json tokenizer/tokenizer_config.json tokenizer/vocab.json
        tokenizer_2/merges.txt tokenizer_2/special_tokens_map.json tokenizer_2/tokenizer_config.json tokenizer_2/vocab.json
        unet/config.json unet/diffusion_pytorch_model.safetensors unet/diffusion_pytorch_model.fp16.safetensors
        unet/diffusion_flax_model.msgpack unet/model.onnx unet/model.onnx_data unet/openvino_model.bin unet/openvino_model.xml
        vae/config.json vae/diffusion_pytorch_model.safetensors vae/diffusion_pytorch_model.fp16.safetensors vae/diffusion_flax_model.msgpack
        vae_1_0/config.json vae_1_0/diffusion_pytorch_model.safetensors vae_1_0/diffusion_pytorch_model.fp16.safetensors
        vae_decoder/config.json vae_decoder/model.onnx vae_encoder/config.json vae_encoder/model.onnx vae_encoder/openvino_model.bin";

    fn select(listing: &str, half: bool) -> Result<Vec<String>, String> {
        let names = listing.split_whitespace().collect::<BTreeSet<_>>();
        needed(&|file| names.contains(file), half)
    }

    #[test]
    fn only_what_is_read() {
        let files = select(SD15, false).unwrap();
        let expected = "model_index.json scheduler/scheduler_config.json unet/config.json vae/config.json text_encoder/config.json
            tokenizer/vocab.json tokenizer/merges.txt tokenizer/special_tokens_map.json tokenizer/tokenizer_config.json tokenizer/added_tokens.json
            unet/diffusion_pytorch_model.safetensors vae/diffusion_pytorch_model.safetensors text_encoder/model.safetensors";
        assert_eq!(files, expected.split_whitespace().collect::<Vec<_>>());
    }

    #[test]
    fn both_text_encoders_of_sdxl() {
        let expected = "model_index.json scheduler/scheduler_config.json unet/config.json vae/config.json text_encoder/config.json
            text_encoder_2/config.json
            tokenizer/vocab.json tokenizer/merges.txt tokenizer/special_tokens_map.json tokenizer/tokenizer_config.json
            tokenizer_2/vocab.json tokenizer_2/merges.txt tokenizer_2/special_tokens_map.json tokenizer_2/tokenizer_config.json
            unet/diffusion_pytorch_model.safetensors vae/diffusion_pytorch_model.safetensors text_encoder/model.safetensors
            text_encoder_2/model.safetensors";
        assert_eq!(select(SDXL, false).unwrap(), expected.split_whitespace().collect::<Vec<_>>());
        // Any network may be there in half precision, or in several files.
        let half = expected.replace("model.safetensors", "model.fp16.safetensors");
        assert_eq!(select(SDXL, true).unwrap(), half.split_whitespace().collect::<Vec<_>>());
        let sharded = SDXL.replace("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors.index.json");
        let sharded = sharded.replace("text_encoder_2/model.safetensors", "text_encoder_2/model.safetensors.index.json");
        let files = select(&sharded, false).unwrap();
        for index in ["unet/diffusion_pytorch_model.safetensors.index.json", "text_encoder_2/model.safetensors.index.json"] {
            assert!(files.iter().any(|file| file == index), "{index}: {files:?}");
        }
    }

    #[test]
    fn half_where_there_is_one() {
        let files = select(SD15, true).unwrap();
        let weights = files.iter().filter(|file| file.ends_with(".safetensors")).collect::<Vec<_>>();
        let expected =
            ["unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.fp16.safetensors"];
        assert_eq!(weights, expected.iter().collect::<Vec<_>>());
        let only_half = SD15.replace("unet/diffusion_pytorch_model.safetensors", "");
        assert!(select(&only_half, false).unwrap().contains(&"unet/diffusion_pytorch_model.fp16.safetensors".to_owned()));
    }

    #[test]
    fn weights_in_several_files() {
        let sharded = SD15.replace("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors.index.json");
        assert!(select(&sharded, false).unwrap().contains(&"unet/diffusion_pytorch_model.safetensors.index.json".to_owned()));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("index.json");
        let named = |name: &str| {
            fs::write(&path, format!(r#"{{"metadata": {{"total_size": 3}}, "weight_map": {{"a": "b-1.safetensors", "c": {name:?}}}}}"#)).unwrap();
            shards("unet/m.safetensors.index.fp16.json", &path)
        };
        assert_eq!(named("b-2.safetensors").unwrap(), ["unet/b-1.safetensors", "unet/b-2.safetensors"]);
        for hostile in ["../c.safetensors", "/c.safetensors", "d/c.safetensors", "c.bin", "", "c?.safetensors", "c%2F.safetensors"] {
            assert!(named(hostile).unwrap_err().contains("refused"), "{hostile}");
        }
        fs::write(&path, "{}").unwrap();
        assert!(shards("unet/m.safetensors.index.json", &path).unwrap_err().contains("weight_map"));
        assert_eq!(shards("unet/config.json", &path).unwrap(), [""; 0]);
    }

    #[test]
    fn what_a_repository_lacks() {
        let lacks = |name: &str| select(&SD15.replace(name, " "), false).unwrap_err();
        let pickles = SD15.replace("unet/diffusion_pytorch_model.safetensors", "").replace("unet/diffusion_pytorch_model.fp16.safetensors", "");
        assert!(select(&pickles, false).unwrap_err().contains("no safetensors weights of the unet"));
        assert!(lacks("vae/diffusion_pytorch_model.safetensors").contains("no safetensors weights of the vae"));
        assert!(lacks("unet/config.json").contains("unet/config.json"));
        assert!(lacks("scheduler/scheduler_config.json").contains("scheduler"));
        assert!(lacks("tokenizer/merges.txt").contains("tokenizer.json"));
        assert!(select("README.md model.ckpt", false).unwrap_err().contains("diffusers"));
        // SDXL's refiner has the second encoder only.
        let without = |folder: &str| SDXL.split_whitespace().filter(|file| !file.starts_with(folder)).collect::<Vec<_>>().join(" ");
        assert!(select(&without("text_encoder/"), false).unwrap_err().contains("refiner"));
        assert!(select(&without("tokenizer_2/"), false).unwrap_err().contains("tokenizer_2/vocab.json"));
        let pickles = SDXL.replace("text_encoder_2/model.safetensors", "").replace("text_encoder_2/model.fp16.safetensors", "");
        assert!(select(&pickles, false).unwrap_err().contains("no safetensors weights of the text_encoder_2"));
        let fast = SD15.replace("tokenizer/merges.txt", "tokenizer/tokenizer.json").replace("tokenizer/vocab.json", "");
        assert!(select(&fast, false).unwrap().contains(&"tokenizer/tokenizer.json".to_owned()));
    }

    /// As the bundled model.
    #[test]
    fn no_text_encoder() {
        let listing = "attention_distillation.json unet/config.json unet/diffusion_pytorch_model.safetensors
            vae/config.json vae/diffusion_pytorch_model.safetensors scheduler/scheduler_config.json";
        let (mut files, mut all) = (select(listing, false).unwrap(), listing.split_whitespace().collect::<Vec<_>>());
        files.sort();
        all.sort();
        assert_eq!(files, all);
    }
}
