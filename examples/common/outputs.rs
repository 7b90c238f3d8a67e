//! Where results go: checked before a run, written at its end.

use super::Shared;
use attention_distillation::{image, tch::Tensor, Error, Result};
use std::path::{Path, PathBuf};

/// Before a long run: whether its outputs can be written at the end of it, none of them over another, nor over a picture that is read.
pub fn check_outputs<'p>(shared: &Shared, files: &[PathBuf], inputs: impl IntoIterator<Item = &'p PathBuf>) -> Result<()> {
    files.iter().chain(&shared.sheet).try_for_each(image::check_writable)?;
    if let Some(sheet) = shared.sheet.as_ref().filter(|sheet| files.iter().any(|file| place(file) == place(sheet))) {
        let reason = "is where the result itself goes; give --sheet a name of its own".into();
        return Err(Error::Image { path: sheet.clone(), reason });
    }
    check_inputs_stay(files.iter().chain(&shared.sheet), inputs)
}

/// Whether no output would take the place of a picture that is read.
pub fn check_inputs_stay<'o, 'i>(outputs: impl Iterator<Item = &'o PathBuf> + Clone, inputs: impl IntoIterator<Item = &'i PathBuf>) -> Result<()> {
    for input in inputs {
        let same = |output: &&PathBuf| place(output) == place(input) || input.canonicalize().is_ok_and(|file| is_at(output, &file));
        if let Some(output) = outputs.clone().find(same) {
            let reason = "is read by this run, and what it writes would take its place; give --output or --sheet another name".into();
            return Err(Error::Image { path: output.clone(), reason });
        }
    }
    Ok(())
}

/// Whether what is written there takes the place of this file. Not where it is a link to it: the link is what is then replaced.
fn is_at(output: &Path, file: &Path) -> bool {
    // Names that differ may be one to the file system, as by their case.
    let itself = |output: &Path| output.symlink_metadata().is_ok_and(|found| !found.is_symlink());
    place(output) == place(file) || itself(output) && output.canonicalize().is_ok_and(|output| output == file)
}

/// A file's name in a folder that exists, by whatever path.
fn place(path: &Path) -> (Option<PathBuf>, Option<std::ffi::OsString>) {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    (folder.canonicalize().ok(), path.file_name().map(std::ffi::OsStr::to_owned))
}

/// The files of so many pictures: the output itself, or NAME-0.png, NAME-1.png and so on.
pub fn files(shared: &Shared, count: usize) -> Vec<PathBuf> {
    if count == 1 {
        return vec![shared.output.clone()];
    }
    let text = |part: &std::ffi::OsStr| part.to_string_lossy().into_owned();
    let stem = shared.output.file_stem().map(text).unwrap_or_default();
    let extension = shared.output.extension().map(|extension| format!(".{}", text(extension))).unwrap_or_default();
    (0..count).map(|i| shared.output.with_file_name(format!("{stem}-{i}{extension}"))).collect()
}

/// Each picture of the batch to its file.
pub fn save(pictures: &Tensor, files: &[PathBuf]) -> Result<()> {
    files.iter().zip(0..).try_for_each(|(file, i)| image::save(&pictures.f_narrow(0, i, 1)?, file))
}

/// Writes inputs and results side by side, where that was asked for.
pub fn sheet(shared: &Shared, inputs: &[&Tensor], results: &[Tensor]) -> Result<()> {
    let row: Vec<&Tensor> = inputs.iter().copied().chain(results).collect();
    shared.sheet.as_ref().map_or(Ok(()), |file| image::save(&image::sheet(&row)?, file))
}
