//! `CLIPTokenizer`: prompts to token ids, the same as transformers gives.

use super::config::Config;
use crate::{Error, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};
use tokenizers::{
    models::bpe::BPE,
    normalizers::{BertNormalizer, NFC},
    pre_tokenizers::{byte_level::ByteLevel, sequence::Sequence, split::Split, split::SplitPattern},
    NormalizedString, Normalizer, SplitDelimiterBehavior, Tokenizer,
};

/// Words, contractions, single digits, runs of other signs.
const WORDS: &str = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// What tokenizers of CLIP look for: these words, with and without the special tokens, and spaces.
const PATTERNS: [&str; 4] = [
    WORDS,
    r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r"\s+",
];

/// Byte pair encoding over lower-case words.
#[derive(Debug)]
pub struct ClipTokenizer {
    tokenizer: Tokenizer,
    /// From `vocab.json`: the text must be prepared here, a `tokenizer.json` does it itself.
    prepare: bool,
    /// Texts that stand for themselves wherever they occur in a prompt.
    specials: Vec<(String, i64)>,
    begin: i64,
    end: i64,
    pad: i64,
    length: usize,
}

impl ClipTokenizer {
    /// From a folder with `vocab.json` and `merges.txt`, or else `tokenizer.json`; `tokenizer_config.json` and
    /// `special_tokens_map.json` may name other special tokens.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Config`] for files that are missing or damaged.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let (vocab, merges, whole) = (folder.join("vocab.json"), folder.join("merges.txt"), folder.join("tokenizer.json"));
        let prepare = vocab.is_file() && merges.is_file();
        let (file, tokenizer) = if prepare {
            (vocab.clone(), from_vocabulary(&vocab, &merges)?)
        } else if whole.is_file() {
            let tokenizer = from_whole(&whole)?;
            (whole, tokenizer)
        } else {
            let reason = "has neither vocab.json and merges.txt nor tokenizer.json".into();
            return Err(Error::Config { path: folder.to_owned(), reason });
        };
        let names = Names::open(folder)?;
        if [&names.begin, &names.end, &names.pad].iter().any(|name| name.is_empty()) {
            // It would be found everywhere.
            return Err(Error::Config { path: folder.to_owned(), reason: "one of its special tokens is empty".into() });
        }
        let id = |token: &str| match tokenizer.token_to_id(token) {
            Some(id) => Ok(i64::from(id)),
            None => Err(Error::Config { path: file.clone(), reason: format!("has no special token `{token}`") }),
        };
        let [begin, end, pad] = [id(&names.begin)?, id(&names.end)?, id(&names.pad)?];
        let mut specials = vec![(names.begin, begin), (names.end, end), (names.pad, pad)];
        // Words that a fine-tune was taught.
        specials.extend(names.added);
        let mut tokenizer = tokenizer;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(refused(&file))?;
        Ok(Self { tokenizer, prepare, specials, begin, end, pad, length: names.length })
    }

    /// How many ids a prompt becomes: 77.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The id that ends a text.
    pub(crate) fn end(&self) -> i64 {
        self.end
    }

    /// The ids of a prompt between begin and end, padded to [`length`](Self::length). What does not fit is left out,
    /// with a warning through `tracing`.
    ///
    /// # Errors
    /// A prompt that the vocabulary cannot express.
    pub fn encode(&self, prompt: &str) -> Result<Vec<i64>> {
        let mut ids = vec![];
        if self.prepare {
            self.split(prompt, &self.specials, &mut ids, &mut |text, ids| {
                let text = prepared(text)?;
                // Lower case may have made one of the two out of another spelling.
                let ends = self.specials.get(..2).unwrap_or_default();
                self.split(&text, ends, ids, &mut |text, ids| self.words(text, ids))
            })?;
        } else {
            self.words(prompt, &mut ids)?;
        }
        let room = self.length.saturating_sub(2);
        if ids.len() > room {
            tracing::warn!(prompt, tokens = ids.len(), room, "the prompt is too long; its end is left out");
            ids.truncate(room);
        }
        ids.insert(0, self.begin);
        ids.push(self.end);
        ids.resize(self.length.max(2), self.pad);
        Ok(ids)
    }

    fn words(&self, text: &str, ids: &mut Vec<i64>) -> Result<()> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(|error| Error::argument("prompt", error.to_string()))?;
        ids.extend(encoding.get_ids().iter().map(|&id| i64::from(id)));
        Ok(())
    }

    /// The specials in a text become their ids, what lies between goes through `rest`.
    fn split(
        &self,
        text: &str,
        specials: &[(String, i64)],
        ids: &mut Vec<i64>,
        rest: &mut dyn FnMut(&str, &mut Vec<i64>) -> Result<()>,
    ) -> Result<()> {
        let mut text = text;
        loop {
            let first = specials.iter().filter_map(|(token, id)| text.find(token.as_str()).map(|at| (at, std::cmp::Reverse(token.len()), *id))).min();
            let Some((at, std::cmp::Reverse(length), id)) = first else { return rest(text, ids) };
            rest(text.get(..at).unwrap_or_default(), ids)?;
            ids.push(id);
            text = text.get(at + length..).unwrap_or_default();
        }
    }
}

fn from_vocabulary(vocab: &Path, merges: &Path) -> Result<Tokenizer> {
    let name = |path: &Path| {
        path.to_str().map(str::to_owned).ok_or_else(|| Error::Config { path: path.to_owned(), reason: "its path is not Unicode".into() })
    };
    let builder = BPE::from_file(&name(vocab)?, &name(merges)?);
    let model = builder.unk_token("<|endoftext|>".into()).end_of_word_suffix("</w>".into()).build().map_err(refused(vocab))?;
    let words = Split::new(SplitPattern::Regex(WORDS.into()), SplitDelimiterBehavior::Removed, true).map_err(refused(vocab))?;
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![words.into(), ByteLevel::new(false, true, false).into()])));
    Ok(tokenizer)
}

/// Only what turns text into ids is taken: the crate `tokenizers` panics on damaged decoders and character maps.
fn from_whole(path: &Path) -> Result<Tokenizer> {
    let mut config = Config::open(path)?;
    for part in ["decoder", "post_processor", "padding", "truncation"] {
        config.forget(part);
    }
    if let Some(part) = strange(&config) {
        return Err(config.bad(format!("its {part}, which is not CLIP's")));
    }
    Tokenizer::from_bytes(config.to_bytes()?).map_err(refused(path))
}

/// What of it CLIP's tokenizers have not. The crate `tokenizers` panics on some of it, at once or at the first prompt: prefixes, lengths of
/// 0, patterns that go back and forth too often; and with a dropout the same prompt is not always the same ids.
fn strange(config: &Config) -> Option<String> {
    let model = |key: &str| config.get("model").and_then(|model| model.get(key)).filter(|value| !value.is_null());
    let none = |value: &Value| value.as_str() == Some("") || value.as_f64() == Some(0.0);
    if let Some(key) = ["dropout", "continuing_subword_prefix"].into_iter().find(|key| model(key).is_some_and(|value| !none(value))) {
        return Some(format!("model has a `{key}`"));
    }
    let known = |part: &str, kinds: &[&str]| {
        let mut open: Vec<&Value> = config.get(part).into_iter().collect();
        while let Some(step) = open.pop() {
            let kind = step.get("type").and_then(Value::as_str).unwrap_or_default();
            if !kinds.contains(&kind) {
                return Some(format!("{part} is or has a `{kind}`"));
            }
            let pattern = step.get("pattern").map(|pattern| pattern.get("Regex").and_then(Value::as_str).unwrap_or_default());
            if let Some(pattern) = pattern.filter(|pattern| !PATTERNS.contains(pattern)) {
                return Some(format!("{part} has the pattern `{pattern}`"));
            }
            open.extend(["normalizers", "pretokenizers"].iter().filter_map(|key| step.get(key)?.as_array()).flatten());
        }
        None
    };
    known("normalizer", &["Sequence", "BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Replace"])
        .or_else(|| known("pre_tokenizer", &["Sequence", "Split", "ByteLevel", "Whitespace", "WhitespaceSplit"]))
}

fn refused(path: &Path) -> impl Fn(tokenizers::Error) -> Error + '_ {
    move |error| Error::Config { path: path.to_owned(), reason: format!("cannot be used as a tokenizer: {error}") }
}

/// As transformers prepares a text where ftfy is not installed: control characters out, spaces around ideographs,
/// composed characters, single spaces, lower case.
fn prepared(text: &str) -> Result<String> {
    let failed = |error: tokenizers::Error| Error::argument("prompt", error.to_string());
    let mut text = NormalizedString::from(text);
    BertNormalizer::new(true, true, Some(false), false).normalize(&mut text).map_err(failed)?;
    NFC.normalize(&mut text).map_err(failed)?;
    // Word by word: a Greek sigma is written otherwise at a word's end.
    Ok(text.get().split_whitespace().map(str::to_lowercase).collect::<Vec<_>>().join(" "))
}

/// Special tokens, as transformers' files name them.
struct Names {
    begin: String,
    end: String,
    pad: String,
    /// Beyond the vocabulary.
    added: Vec<(String, i64)>,
    length: usize,
}

impl Names {
    fn open(folder: &Path) -> Result<Self> {
        let files: Vec<PathBuf> =
            ["special_tokens_map.json", "tokenizer_config.json"].iter().map(|name| folder.join(name)).filter(|path| path.is_file()).collect();
        let configs = files.iter().map(|path| Config::open(path)).collect::<Result<Vec<_>>>()?;
        let find = |key: &str, default: &str| {
            let value = configs.iter().find_map(|config| config.get(key));
            // Either the text itself, or an object about it.
            value.and_then(|value| value.as_str().or_else(|| value.get("content").and_then(Value::as_str))).unwrap_or(default).to_owned()
        };
        let end = find("eos_token", "<|endoftext|>");
        let length = configs.iter().find_map(|config| config.get("model_max_length")).and_then(Value::as_u64);
        Ok(Self {
            begin: find("bos_token", "<|startoftext|>"),
            pad: find("pad_token", &end),
            end,
            added: added(folder)?,
            // Files say 1e30 for "no limit", but the positions end at 77.
            length: length.and_then(|n| usize::try_from(n).ok()).filter(|n| (3..=4096).contains(n)).unwrap_or(77),
        })
    }
}

/// `added_tokens.json`: words beyond the vocabulary and their ids.
fn added(folder: &Path) -> Result<Vec<(String, i64)>> {
    let path = folder.join("added_tokens.json");
    if !path.is_file() {
        return Ok(vec![]);
    }
    let config = Config::open(&path)?;
    let id = |word: &str| {
        let id = config.get(word).and_then(Value::as_i64).filter(|id| *id >= 0 && !word.is_empty());
        id.map(|id| (word.to_owned(), id)).ok_or_else(|| config.bad(format!("`{word}` has no id")))
    };
    config.keys().map(id).collect()
}
