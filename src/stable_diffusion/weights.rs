//! Weights from memory-mapped safetensors: one file, or several with an index.

use super::config::Config;
use super::seamless::Borders;
use crate::{tensor_file, Error, Result};
use memmap2::Mmap;
use safetensors::{tensor::TensorView, Dtype, SafeTensors};
use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Range,
    path::{Component, Path, PathBuf},
};
use tch::{Device, Kind, Tensor};

/// The tensors of one network by name, converted to one kind on one device when they are taken.
pub(crate) struct Weights {
    files: Vec<(PathBuf, Mmap)>,
    tensors: HashMap<String, Entry>,
    /// Handles on what the network holds.
    taken: RefCell<BTreeMap<String, Tensor>>,
    borders: Borders,
    device: Device,
    kind: Kind,
}

struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

impl Weights {
    /// From `folder`, whose file is `stem.safetensors`, or `stem.safetensors.index.json` with its shards, or either of
    /// the two with `.fp16` in the name; `half` says which to take where there are both.
    pub(crate) fn open(folder: &Path, stem: &str, half: bool, device: Device, kind: Kind) -> Result<Self> {
        if let Some(file) = file_names(stem, half).map(|name| folder.join(name)).find(|file| file.is_file()) {
            let single = file.extension().is_some_and(|extension| extension == "safetensors");
            return Self::of(if single { vec![file] } else { shards(&file)? }, device, kind);
        }
        let file = folder.join(format!("{stem}.safetensors"));
        let pickle = [stem, "pytorch_model"]
            .iter()
            .any(|stem| ["bin", "pt", "ckpt"].iter().any(|extension| folder.join(format!("{stem}.{extension}")).exists()));
        let reason = match (pickle, folder.is_dir()) {
            (true, _) => "is missing, there is only a pickle, which is not read because it can run code; save the model with safe_serialization=True",
            (false, true) => "is missing; fetch the model's weights (see weights.md)",
            (false, false) => "its folder is missing; name a folder in diffusers layout (see weights.md)",
        };
        Err(Error::Weights { file, reason: reason.into() })
    }

    fn of(paths: Vec<PathBuf>, device: Device, kind: Kind) -> Result<Self> {
        let (mut files, mut tensors) = (vec![], HashMap::new());
        for path in paths {
            let map = map(&path)?;
            let (header, metadata) = SafeTensors::read_metadata(&map).map_err(tensor_file::damaged(&path))?;
            // After the length of the header (8 bytes) and the header itself.
            let data = header.saturating_add(8);
            for (name, info) in metadata.tensors() {
                let (start, end) = info.data_offsets;
                let bytes = data.saturating_add(start)..data.saturating_add(end);
                tensors.insert(name, Entry { file: files.len(), dtype: info.dtype, shape: info.shape.clone(), bytes });
            }
            files.push((path, map));
        }
        Ok(Self { files, tensors, taken: RefCell::default(), borders: Borders::default(), device, kind })
    }

    /// Where names begin.
    pub(crate) fn root(&self) -> Scope<'_> {
        Scope { weights: self, prefix: String::new() }
    }

    /// Reports through `tracing` what the network had no use for.
    pub(crate) fn report(&self) {
        let taken = self.taken.borrow();
        // A buffer of 0, 1, 2 .. that old transformers saved with the weights.
        let unused = self.tensors.keys().filter(|name| !taken.contains_key(*name) && !name.ends_with("position_ids")).collect::<BTreeSet<_>>();
        let file = self.path(0).display();
        tracing::debug!(%file, taken = taken.len(), "weights loaded");
        if !unused.is_empty() {
            let some = unused.iter().take(8).map(|name| name.as_str()).collect::<Vec<_>>().join(", ");
            tracing::warn!(%file, unused = unused.len(), some, "tensors that the network has no use for");
        }
    }

    /// What the network holds, by name and in the order of names: the very tensors of its layers.
    pub(crate) fn into_taken(self) -> BTreeMap<String, Tensor> {
        self.taken.into_inner()
    }

    fn path(&self, file: usize) -> &Path {
        self.files.get(file).map_or(Path::new(""), |(path, _)| path)
    }

    fn take(&self, name: &str, expected: &[i64]) -> Result<Tensor> {
        let entry = self.tensors.get(name).ok_or_else(|| Error::MissingTensor { file: self.path(0).to_owned(), name: name.to_owned() })?;
        let file = self.path(entry.file);
        let found = entry.shape.iter().map(|&side| i64::try_from(side).unwrap_or(i64::MAX)).collect::<Vec<_>>();
        if found != expected {
            return Err(Error::TensorShape { file: file.to_owned(), name: name.to_owned(), expected: expected.to_vec(), found });
        }
        let bytes = self.files.get(entry.file).and_then(|(_, map)| map.get(entry.bytes.clone())).unwrap_or_default();
        let view = TensorView::new(entry.dtype, entry.shape.clone(), bytes).map_err(tensor_file::damaged(file))?;
        let tensor = tensor_file::tensor(file, name, &view)?;
        if !matches!(tensor.f_kind()?, Kind::Float | Kind::Half | Kind::BFloat16 | Kind::Double) {
            let reason = format!("tensor `{name}` is of kind {:?}; f16, bf16 and f32 are read", entry.dtype);
            return Err(Error::Weights { file: file.to_owned(), reason });
        }
        // Over the bus in the file's kind, which is never wider than needed.
        let tensor = tensor.f_to_device(self.device)?.f_to_kind(self.kind)?;
        self.taken.borrow_mut().insert(name.to_owned(), tensor.shallow_clone());
        Ok(tensor)
    }
}

impl std::fmt::Debug for Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Weights").field("file", &self.path(0)).field("tensors", &self.tensors.len()).finish_non_exhaustive()
    }
}

#[allow(unsafe_code)]
fn map(path: &Path) -> Result<Mmap> {
    let file = std::fs::File::open(path).map_err(Error::io(path))?;
    // SAFETY: the map is read while a model is opened and dropped after. A program that cuts the file short in that
    // moment would end this one with SIGBUS; weights are not edited in place, and every reader of them runs this risk.
    unsafe { Mmap::map(&file) }.map_err(Error::io(path))
}

/// What a network's weights, or the index of their files, may be called: the first that exists is taken.
pub(crate) fn file_names(stem: &str, half: bool) -> impl Iterator<Item = String> + '_ {
    let variants = if half { [".fp16", ""] } else { ["", ".fp16"] };
    variants.into_iter().flat_map(move |variant| [format!("{stem}{variant}.safetensors"), format!("{stem}.safetensors.index{variant}.json")])
}

/// The files that an index names, all beside it.
pub(crate) fn shards(index: &Path) -> Result<Vec<PathBuf>> {
    let config = Config::open(index)?;
    let names = config.get("weight_map").and_then(|map| map.as_object()).ok_or_else(|| config.bad("has no `weight_map`"))?;
    let mut files = BTreeSet::new();
    for file in names.values() {
        let name = file.as_str().ok_or_else(|| config.bad("`weight_map` holds something else than file names"))?;
        let plain = matches!(Path::new(name).components().collect::<Vec<_>>().as_slice(), [Component::Normal(_)]);
        if !plain || !name.ends_with(".safetensors") {
            return Err(config.bad(format!("refused: it names `{name}`, which is not a safetensors file beside it")));
        }
        files.insert(index.with_file_name(name));
    }
    if files.is_empty() {
        return Err(config.bad("names no file"));
    }
    Ok(files.into_iter().collect())
}

/// A place among the names of the weights, as in `down_blocks.0.resnets.1`.
#[derive(Debug, Clone)]
pub(crate) struct Scope<'w> {
    weights: &'w Weights,
    prefix: String,
}

impl Scope<'_> {
    /// One name further in.
    pub(crate) fn at(&self, name: impl std::fmt::Display) -> Self {
        Self { weights: self.weights, prefix: self.join(name) }
    }

    fn join(&self, name: impl std::fmt::Display) -> String {
        if self.prefix.is_empty() {
            name.to_string()
        } else {
            format!("{}.{name}", self.prefix)
        }
    }

    /// What all convolutions of this network share.
    pub(crate) fn borders(&self) -> Borders {
        self.weights.borders.clone()
    }

    /// Whether a tensor of this name is there.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.weights.tensors.contains_key(&self.join(name))
    }

    /// The tensor of this name, which must have this shape.
    pub(crate) fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        self.weights.take(&self.join(name), shape)
    }
}
