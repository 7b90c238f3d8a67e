//! `config.json` files, read with errors that name file, key and value.

use crate::{Error, Result};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Beyond it a number of channels, layers or heads is a slip or an attack.
const MOST: i64 = 1 << 20;

/// No configuration is nearly as long.
const MOST_BYTES: u64 = 16 << 20;

/// One JSON object. Keys that are absent and keys that are null mean the same: the default.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    path: PathBuf,
    /// The key of the file's object that this one stands in, where it does.
    within: Option<String>,
    values: Map<String, Value>,
}

/// Python writes numbers that JSON has not, such as -Infinity in the schedules of DPM-Solver. As texts they do no harm where nobody
/// reads them, and are told where somebody does.
fn quoted(text: &[u8]) -> Vec<u8> {
    let (mut out, mut rest, mut in_string) = (Vec::with_capacity(text.len()), text, false);
    while let Some(&byte) = rest.first() {
        let word = [&b"-Infinity"[..], b"Infinity", b"NaN"].into_iter().find(|word| !in_string && rest.starts_with(word));
        let taken = match (word, byte) {
            (Some(word), _) => {
                out.extend([&b"\""[..], word, b"\""].concat());
                word.len()
            }
            (None, b'\\') if in_string => {
                // With what it escapes.
                out.extend(rest.iter().take(2));
                2
            }
            (None, _) => {
                in_string ^= byte == b'"';
                out.push(byte);
                1
            }
        };
        rest = rest.get(taken..).unwrap_or_default();
    }
    out
}

impl Config {
    /// Nesting is limited by serde_json, the length here.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let bad = |reason: String| Error::Config { path: path.to_owned(), reason };
        if std::fs::metadata(path).map_err(Error::io(path))?.len() > MOST_BYTES {
            return Err(bad(format!("is longer than {MOST_BYTES} bytes, which no configuration is")));
        }
        let text = std::fs::read(path).map_err(Error::io(path))?;
        match serde_json::from_slice(&text).or_else(|error| serde_json::from_slice(&quoted(&text)).map_err(|_| error)) {
            Ok(Value::Object(values)) => Ok(Self { path: path.to_owned(), within: None, values }),
            Ok(_) => Err(bad("is not a JSON object".into())),
            Err(error) => Err(bad(format!("is not JSON: {error}"))),
        }
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// Said to be null, where that means something else than to be absent.
    pub(crate) fn is_null(&self, key: &str) -> bool {
        self.values.get(key).is_some_and(Value::is_null)
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key).filter(|value| !value.is_null())
    }

    /// As if the key were absent.
    pub(crate) fn forget(&mut self, key: &str) {
        self.values.insert(key.to_owned(), Value::Null);
    }

    /// The object as JSON again.
    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(&self.values).map_err(|error| self.bad(error.to_string()))
    }

    pub(crate) fn bad(&self, reason: impl Into<String>) -> Error {
        let reason = match &self.within {
            Some(key) => format!("in `{key}`: {}", reason.into()),
            None => reason.into(),
        };
        Error::Config { path: self.path.clone(), reason }
    }

    /// An object within this one.
    pub(crate) fn object(&self, key: &str) -> Result<Option<Self>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(values)) => Ok(Some(Self { path: self.path.clone(), within: Some(key.to_owned()), values: values.clone() })),
            Some(value) => Err(self.wrong(key, value, "it must be an object")),
        }
    }

    fn wrong(&self, key: &str, value: &Value, wanted: &str) -> Error {
        let mut shown = value.to_string();
        if let Some((end, _)) = shown.char_indices().nth(80) {
            shown.truncate(end);
            shown.push_str("...");
        }
        self.bad(format!("`{key}` is {shown}; {wanted}"))
    }

    /// A count of at least 1.
    pub(crate) fn count(&self, key: &str, default: i64) -> Result<i64> {
        self.get(key).map_or(Ok(default), |value| self.as_count(key, value))
    }

    fn as_count(&self, key: &str, value: &Value) -> Result<i64> {
        value.as_i64().filter(|n| (1..=MOST).contains(n)).ok_or_else(|| self.wrong(key, value, &format!("it must be a whole number in 1..={MOST}")))
    }

    /// A finite number.
    pub(crate) fn number(&self, key: &str, default: f64) -> Result<f64> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_f64().filter(|n| n.is_finite()).ok_or_else(|| self.wrong(key, value, "it must be a number"))
    }

    /// A number above 0.
    pub(crate) fn positive(&self, key: &str, default: f64) -> Result<f64> {
        let number = self.number(key, default)?;
        if number > 0.0 {
            Ok(number)
        } else {
            Err(self.bad(format!("`{key}` is {number}; it must be above 0")))
        }
    }

    pub(crate) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.wrong(key, value, "it must be true or false"))
    }

    pub(crate) fn text<'a>(&'a self, key: &str, default: &'a str) -> Result<&'a str> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_str().ok_or_else(|| self.wrong(key, value, "it must be a text"))
    }

    /// A text out of a table; the error lists what would do.
    pub(crate) fn choice<T: Copy>(&self, key: &str, default: &str, table: &[(&str, T)]) -> Result<T> {
        self.pick(key, self.text(key, default)?, table)
    }

    fn pick<T: Copy>(&self, key: &str, word: &str, table: &[(&str, T)]) -> Result<T> {
        let known = || table.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        table
            .iter()
            .find(|(name, _)| *name == word)
            .map(|(_, value)| *value)
            .ok_or_else(|| self.bad(format!("`{key}` is `{word}`, which is not supported; supported: {}", known())))
    }

    /// A list of texts out of a table, at least one.
    pub(crate) fn choices<T: Copy>(&self, key: &str, table: &[(&str, T)]) -> Result<Vec<T>> {
        let list = self.list(key)?;
        list.iter().map(|value| self.pick(key, value.as_str().ok_or_else(|| self.wrong(key, value, "it must be a text"))?, table)).collect()
    }

    /// A list of counts, at least one.
    pub(crate) fn counts(&self, key: &str) -> Result<Vec<i64>> {
        self.list(key)?.iter().map(|value| self.as_count(key, value)).collect()
    }

    pub(crate) fn numbers(&self, key: &str) -> Result<Vec<f64>> {
        let list = self.list(key)?;
        list.iter().map(|value| value.as_f64().filter(|n| n.is_finite()).ok_or_else(|| self.wrong(key, value, "it must be a number"))).collect()
    }

    fn list(&self, key: &str) -> Result<&[Value]> {
        let value = self.get(key).ok_or_else(|| self.bad(format!("has no `{key}`")))?;
        value.as_array().map(Vec::as_slice).filter(|list| !list.is_empty()).ok_or_else(|| self.wrong(key, value, "it must be a list of at least one"))
    }

    /// One count for all blocks, or a list of one per block.
    pub(crate) fn per_block(&self, key: &str, default: i64, blocks: usize) -> Result<Vec<i64>> {
        match self.get(key) {
            Some(Value::Array(list)) if list.len() == blocks => list.iter().map(|value| self.as_count(key, value)).collect(),
            Some(value @ Value::Array(_)) => Err(self.wrong(key, value, &format!("it must be one number, or one for each of the {blocks} blocks"))),
            _ => Ok(vec![self.count(key, default)?; blocks]),
        }
    }

    /// `norm_num_groups`, which must divide the channels of each block.
    pub(crate) fn groups(&self, channels: &[i64]) -> Result<i64> {
        let groups = self.count("norm_num_groups", 32)?;
        match channels.iter().find(|c| *c % groups != 0) {
            None => Ok(groups),
            Some(odd) => Err(self.bad(format!("`norm_num_groups` is {groups}, which does not divide the {odd} channels of a block"))),
        }
    }

    /// Keys whose other values would change the network in ways that are not built: absent, null or as given.
    pub(crate) fn require(&self, only: &[(&str, Value)]) -> Result<()> {
        for (key, wanted) in only {
            if let Some(value) = self.get(key) {
                let same = value == wanted || matches!((value.as_f64(), wanted.as_f64()), (Some(a), Some(b)) if a == b);
                if !same {
                    return Err(self.wrong(key, value, &format!("only {wanted} is supported")));
                }
            }
        }
        Ok(())
    }
}
