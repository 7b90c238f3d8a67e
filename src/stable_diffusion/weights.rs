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
        crate::device::check(device, kind)?;
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
        if !matches!(tensor_file::kind_of(entry.dtype), Some(Kind::Float | Kind::Half | Kind::BFloat16 | Kind::Double)) {
            let reason = format!("tensor `{name}` is of kind {:?}; f16, bf16 and f32 are read", entry.dtype);
            return Err(Error::Weights { file: file.to_owned(), reason });
        }
        let map = self.files.get(entry.file).map(|(_, map)| map);
        let bytes = map.and_then(|map| map.get(entry.bytes.clone())).unwrap_or_default();
        let view = TensorView::new(entry.dtype, entry.shape.clone(), bytes).map_err(tensor_file::damaged(file))?;
        let mut tensor = tensor_file::converted(file, name, &view, self.device, self.kind)?;
        if self.device.is_cuda() {
            tensor = channels_last(tensor)?;
        }
        if let Some(map) = map {
            let_go(map, &entry.bytes);
        }
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

/// For kernels of convolutions: cuDNN's fast ones want channels innermost, and else lay weights and pixels anew in each pass. On a CPU nothing
/// was gained by it. One of a single place has but one layout.
fn channels_last(tensor: Tensor) -> Result<Tensor> {
    match tensor.size().as_slice() {
        &[_, _, height, width] if height > 1 || width > 1 => Ok(tensor.f_permute([0, 2, 3, 1])?.f_contiguous()?.f_permute([0, 3, 1, 2])?),
        _ => Ok(tensor),
    }
}

/// These bytes have been read, so that their pages need not count among the program's: a network would be in memory twice.
#[allow(unsafe_code)]
fn let_go(map: &Mmap, bytes: &Range<usize>) {
    // Best effort: where it fails, memory is all that it costs.
    #[cfg(unix)]
    // SAFETY: the map is shared and read-only: a page that goes, a neighbour's too, comes back from the file with the same bytes.
    let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, bytes.start, bytes.len()) };
    #[cfg(not(unix))]
    let _ = (map, bytes);
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error;

    #[test]
    fn kernels_with_channels_innermost_are_the_same_kernels() -> std::result::Result<(), Box<dyn Error>> {
        let kernel = Tensor::f_arange(2 * 5 * 3 * 3, (Kind::Float, Device::Cpu))?.f_view([2, 5, 3, 3])?;
        let found = channels_last(kernel.shallow_clone())?;
        assert!(found.equal(&kernel));
        assert_eq!(found.stride(), [45, 1, 15, 5]);
        let point = kernel.f_view([18, 5, 1, 1])?;
        assert_eq!(channels_last(point.shallow_clone())?.stride(), point.stride());
        let vector = kernel.f_view([90])?;
        assert_eq!(channels_last(vector)?.size(), [90]);
        Ok(())
    }

    /// How much of a mapped file is in this process's memory, in KiB; none where the system does not tell.
    fn resident(file: &Path) -> Option<usize> {
        let maps = std::fs::read_to_string("/proc/self/smaps").ok()?;
        let mut lines = maps.lines().skip_while(|line| !line.ends_with(&*file.to_string_lossy()));
        let line = lines.find_map(|line| line.strip_prefix("Rss:"))?;
        line.trim().strip_suffix("kB")?.trim().parse().ok()
    }

    /// What has been read of a file is no longer in memory beside what became of it.
    #[test]
    fn a_network_is_in_memory_once() -> std::result::Result<(), Box<dyn Error>> {
        tch::set_num_threads(1);
        let folder = tempfile::tempdir()?;
        let file = folder.path().canonicalize()?.join("stem.safetensors");
        let numbers = Tensor::f_ones([1 << 20], (Kind::Half, Device::Cpu))?;
        let tensors = ["a", "b", "c", "d", "e", "f", "g", "h"].map(|name| (name.to_owned(), numbers.shallow_clone()));
        tensor_file::write(&tensors, &file)?;
        let weights = Weights::open(folder.path().canonicalize()?.as_path(), "stem", false, Device::Cpu, Kind::Half)?;
        for (name, _) in &tensors {
            assert!(weights.take(name, &[1 << 20])?.equal(&numbers));
        }
        // Of 16 MiB: the header's page may be there, and what the system reads ahead.
        let found = resident(&file);
        assert!(found.is_some() || !cfg!(target_os = "linux"));
        assert!(found.is_none_or(|found| found < 1024), "{found:?} KiB of the file are in memory");
        Ok(())
    }
}
