//! Tensors in safetensors files.

use crate::{Error, Result};
use safetensors::{tensor::TensorView, Dtype, SafeTensors};
use std::io::Write;
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};
use tch::{Device, Kind, Tensor};

/// The kind that a safetensors dtype becomes; none for dtypes that networks are not stored in.
pub(crate) fn kind_of(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F32 => Kind::Float,
        Dtype::F64 => Kind::Double,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::U8 => Kind::Uint8,
        _ => return None,
    })
}

fn dtype_of(kind: Kind) -> Option<Dtype> {
    Some(match kind {
        Kind::Half => Dtype::F16,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Float => Dtype::F32,
        Kind::Double => Dtype::F64,
        Kind::Int64 => Dtype::I64,
        _ => return None,
    })
}

/// A tensor of its own from a file's bytes; the view has checked that they are as many as its shape needs.
pub(crate) fn tensor(file: &Path, name: &str, view: &TensorView<'_>) -> Result<Tensor> {
    let (shape, kind) = shape_and_kind(file, name, view)?;
    Ok(Tensor::f_from_data_size(view.data(), &shape, kind)?)
}

/// The same on a device and in a kind, without a copy in between. The view is one of a file whose header was found sound.
#[cfg(feature = "stable-diffusion")]
#[allow(unsafe_code)]
pub(crate) fn converted(file: &Path, name: &str, view: &TensorView<'_>, device: Device, kind: Kind) -> Result<Tensor> {
    let (shape, stored) = shape_and_kind(file, name, view)?;
    let bytes = view.data().as_ptr();
    // As libtorch wants its numbers; a file need not have them so.
    let aligned = bytes.align_offset(stored.elt_size_in_bytes()) == 0;
    // SAFETY: so many numbers are there, as the view and the header's check made sure, and outlive this handle on them, which does not leave
    // this function. It is only read, and has been when the copy returns, also by a GPU.
    let there = if aligned { unsafe { Tensor::f_from_blob(bytes, &shape, &[], stored, Device::Cpu) }? } else { tensor(file, name, view)? };
    // Over the bus in the file's kind, which is never wider than needed.
    let mut copy = Tensor::f_empty(&shape, (if device == Device::Cpu { kind } else { stored }, device))?;
    copy.f_copy_(&there)?;
    Ok(copy.f_to_kind(kind)?)
}

fn shape_and_kind(file: &Path, name: &str, view: &TensorView<'_>) -> Result<(Vec<i64>, Kind)> {
    let bad = |reason: String| Error::Weights { file: file.to_owned(), reason };
    let kind = kind_of(view.dtype()).ok_or_else(|| bad(format!("tensor `{name}` is of kind {:?}; f16, bf16 and f32 are read", view.dtype())))?;
    let shape = view.shape().iter().map(|&side| i64::try_from(side).ok()).collect::<Option<Vec<_>>>();
    // Also where one side is 0, so that their product is: who multiplies them one by one comes past the others.
    let sound = |shape: &Vec<i64>| shape.iter().try_fold(1_i64, |all, &side| all.checked_mul(side.max(1))).is_some();
    Ok((shape.filter(sound).ok_or_else(|| bad(format!("tensor `{name}` has an absurd shape")))?, kind))
}

/// What is wrong with a safetensors file, in words.
pub(crate) fn damaged(file: &Path) -> impl Fn(safetensors::SafeTensorError) -> Error + '_ {
    move |error| Error::Weights {
        file: file.to_owned(),
        reason: format!("is not a sound safetensors file ({error}); it may be truncated, or stand for another (Git LFS): fetch or make it again"),
    }
}

/// All of a file's tensors, on the CPU.
pub(crate) fn read(path: &Path) -> Result<Vec<(String, Tensor)>> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let file = SafeTensors::deserialize(&bytes).map_err(damaged(path))?;
    file.tensors().into_iter().map(|(name, view)| Ok((name.clone(), tensor(path, &name, &view)?))).collect()
}

/// Writes tensors under a temporary name beside `path`, then renames.
pub(crate) fn write(tensors: &[(String, Tensor)], path: &Path) -> Result<()> {
    write_whole(path, &to_bytes(tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)), path)?)
}

/// The bytes of a file that is to be `path`.
pub(crate) fn to_bytes<'t>(tensors: impl Iterator<Item = (&'t str, &'t Tensor)>, path: &Path) -> Result<Vec<u8>> {
    let mut stored = vec![];
    for (name, tensor) in tensors {
        let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
        let kind = tensor.f_kind()?;
        let dtype = dtype_of(kind).ok_or_else(|| Error::argument("tensor", format!("`{name}` is of kind {kind:?}, which is not stored")))?;
        let mut bytes = vec![0; tensor.numel().saturating_mul(kind.elt_size_in_bytes())];
        tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
        let shape = tensor.size().iter().map(|&side| usize::try_from(side).unwrap_or(0)).collect::<Vec<_>>();
        stored.push((name, dtype, shape, bytes));
    }
    let refused = damaged(path);
    let views = stored
        .iter()
        .map(|(name, dtype, shape, bytes)| Ok((*name, TensorView::new(*dtype, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, _>>()
        .map_err(&refused)?;
    // What Python's libraries write and some of them ask for.
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize(views, Some(format)).map_err(&refused)
}

/// A file appears whole or not at all: written under a temporary name beside it, then renamed.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    write_all(&[(path.to_owned(), bytes)])
}

/// The same for several files: none is renamed before all are written.
pub(crate) fn write_all(files: &[(PathBuf, &[u8])]) -> Result<()> {
    let parts = files.iter().map(|(path, _)| temporary(path)).collect::<Result<Vec<_>>>()?;
    let each = || parts.iter().zip(files);
    // On the disk before it takes its place: a machine that stops in between leaves the old file or the new one.
    let write = |part: &Path, bytes: &[u8]| {
        let mut file = std::fs::File::create_new(part)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    let written = each().try_for_each(|(part, (path, bytes))| write(part, bytes).map_err(folder_missing(path)).map_err(Error::io(path)));
    let renamed = written.and_then(|()| each().try_for_each(|(part, (path, _))| std::fs::rename(part, path).map_err(Error::io(path))));
    if renamed.is_err() {
        // Best effort: the error to report is the first one.
        parts.iter().for_each(|part| drop(std::fs::remove_file(part)));
    }
    renamed
}

/// Whether files can be made beside `path`, by making one: permissions alone do not tell of a file system that is read-only.
pub(crate) fn check_beside(path: &Path) -> Result<()> {
    let part = temporary(path)?;
    std::fs::write(&part, []).and_then(|()| std::fs::remove_file(&part)).map_err(Error::io(path))
}

/// The system's words for a folder that is not there are those for a file.
fn folder_missing(path: &Path) -> impl Fn(std::io::Error) -> std::io::Error + '_ {
    move |error| match path.parent() {
        Some(folder) if error.kind() == std::io::ErrorKind::NotFound && !folder.as_os_str().is_empty() && !folder.is_dir() => {
            std::io::Error::new(error.kind(), format!("there is no folder {}; make it first", folder.display()))
        }
        _ => error,
    }
}

/// A name beside `path` for what is to become it: of this call alone, whichever threads and machines write there. A killed process leaves
/// it behind, so it begins as `path` does; as far as names may be long.
pub(crate) fn temporary(path: &Path) -> Result<PathBuf> {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().ok_or_else(|| Error::argument("path", format!("`{}` names no file", path.display())))?;
    // Of up to four bytes each: names have 255.
    let begin = name.to_string_lossy().chars().take(50).collect::<String>();
    let call = CALLS.fetch_add(1, Ordering::Relaxed);
    // Processes of two containers may have one number.
    let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos());
    Ok(path.with_file_name(format!(".{begin}.{}-{call}-{time:x}.part", std::process::id())))
}

#[cfg(test)]
#[cfg(feature = "stable-diffusion")]
mod tests {
    use super::*;

    /// Wherever in memory the bytes begin, and whatever they are to become.
    #[test]
    fn converted_wherever_it_lies() -> std::result::Result<(), Box<dyn std::error::Error>> {
        let numbers = Tensor::from_slice(&[1.5_f32, -2.25, 0.125, 1e-3, 3.0, half::f16::MAX.to_f32()]).f_view([2, 3])?;
        for (stored, dtype) in [(Kind::Float, Dtype::F32), (Kind::Half, Dtype::F16), (Kind::BFloat16, Dtype::BF16), (Kind::Double, Dtype::F64)] {
            let wanted = numbers.f_to_kind(stored)?;
            let mut bytes = vec![0; 6 * stored.elt_size_in_bytes()];
            wanted.f_copy_data_u8(&mut bytes, 6)?;
            for before in 0..9 {
                let moved = [vec![7; before], bytes.clone()].concat();
                let view = TensorView::new(dtype, vec![2, 3], moved.get(before..).unwrap_or_default())?;
                for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
                    let found = converted(Path::new("file"), "name", &view, Device::Cpu, kind)?;
                    assert_eq!((found.size(), found.f_kind()?), (vec![2, 3], kind));
                    assert!(found.equal(&wanted.f_to_kind(kind)?), "{stored:?} to {kind:?}, {before} bytes further on: {found}");
                    // Not a view of bytes that somebody else frees.
                    assert_ne!(found.data_ptr().cast_const().cast::<u8>(), view.data().as_ptr());
                }
            }
        }
        Ok(())
    }
}
