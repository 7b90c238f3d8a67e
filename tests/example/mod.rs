//! An example program run from its command line, in a folder of its own.
#![allow(dead_code, missing_docs, clippy::disallowed_methods, clippy::unwrap_used)] // Each test file uses a part of it.

#[cfg(unix)]
pub mod watched;

use attention_distillation::image;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tch::{Device, Kind, Tensor};

/// `cargo test` builds the examples beside the tests.
fn program(example: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let name = format!("{example}{}", std::env::consts::EXE_SUFFIX);
    let program = test.parent().unwrap().parent().unwrap().join("examples").join(name);
    assert!(program.is_file(), "{} is missing; run `cargo build --example {example}` with the test's own flags", program.display());
    program
}

/// A folder with small pictures, and the program run in it.
pub struct Place {
    folder: tempfile::TempDir,
    program: PathBuf,
}

impl Place {
    pub fn of(example: &str) -> Self {
        tch::set_num_threads(1);
        let place = Self { folder: tempfile::tempdir().unwrap(), program: program(example) };
        for (name, height, width, seed) in [("content.png", 48, 40, 1), ("style.png", 32, 64, 2), ("other.png", 48, 48, 3)] {
            place.picture(name, height, width, seed);
        }
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Waves of colour.
    pub fn picture(&self, name: &str, height: i64, width: i64, seed: i64) {
        let axis = |length: i64, speed: f64| (Tensor::arange(length, (Kind::Float, Device::Cpu)) * speed).sin();
        let wave = |i: i64| {
            let (y, x) = (axis(height, 0.1 * (seed + i) as f64).view([-1, 1]), axis(width, 0.07 * (seed * i + 1) as f64).view([1, -1]));
            (y * 0.25 + x * 0.25) + 0.5
        };
        image::save(&Tensor::stack(&[wave(1), wave(2), wave(3)], 0).unsqueeze(0), self.path(name)).unwrap();
    }

    /// All files with their bytes.
    pub fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(self.folder.path()).unwrap() {
            let entry = entry.unwrap();
            let bytes = if entry.file_type().unwrap().is_file() { fs::read(entry.path()).unwrap() } else { vec![] };
            files.insert(entry.file_name().into_string().unwrap(), bytes);
        }
        files
    }

    pub fn command(&self, model: &Path, flags: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.current_dir(self.folder.path()).env("OMP_NUM_THREADS", "1").env("OMP_WAIT_POLICY", "passive");
        command.arg("--model").arg(model).args(flags).stdin(Stdio::null());
        command
    }

    pub fn run_with(&self, model: &Path, flags: &[&str]) -> Output {
        self.command(model, flags).output().unwrap()
    }

    pub fn run(&self, flags: &[&str]) -> Output {
        self.run_with(&tiny(), flags)
    }

    /// A run on the CPU that must succeed: the picture it writes.
    #[track_caller]
    pub fn draw(&self, flags: &[&str], output: &str) -> Tensor {
        self.draw_with(&tiny(), flags, output, &[output]).remove(0)
    }

    /// A run on the CPU that must succeed and write these pictures, and no other file but a sheet.
    #[track_caller]
    pub fn draw_with(&self, model: &Path, flags: &[&str], output: &str, written: &[&str]) -> Vec<Tensor> {
        let before = self.files();
        let outcome = self.run_with(model, &[flags, &["--output", output, "--device", "cpu"]].concat());
        let last = written.last().unwrap();
        finished(&outcome, last);
        assert_eq!(texts(&outcome).0.lines().collect::<Vec<_>>(), written);
        let mut after = self.files();
        let known = |name: &str| before.contains_key(name) || written.contains(&name) || ["sheet.png", "sheet.jpg"].contains(&name);
        after.retain(|name, _| !known(name));
        assert!(after.is_empty(), "left behind: {:?}", after.keys());
        written.iter().map(|name| image::load(self.path(name)).unwrap()).collect()
    }

    /// A run that must fail: its one line, which has all of the words in it. Nothing is written.
    #[track_caller]
    pub fn refused_with(&self, model: &Path, flags: &[&str], words: &[&str]) -> String {
        let before = self.files();
        let outcome = self.run_with(model, flags);
        let (stdout, stderr) = texts(&outcome);
        assert_eq!(outcome.status.code(), Some(1), "{flags:?}: {stdout}{stderr}");
        assert_eq!(stdout, "", "{flags:?}");
        let lines: Vec<_> = stderr.lines().collect();
        let [line] = lines.as_slice() else { panic!("{flags:?}: one line expected: {stderr}") };
        assert!(line.starts_with("error: ") && line.len() < 1000, "{flags:?}: {line}");
        for word in words {
            assert!(line.contains(word), "{flags:?}: does not say `{word}`: {line}");
        }
        assert!(before == self.files(), "{flags:?}: something was written: {:?}", self.files().keys());
        line.to_string()
    }

    #[track_caller]
    pub fn refused(&self, flags: &[&str], words: &[&str]) -> String {
        self.refused_with(&tiny(), flags, words)
    }

    /// Wrong arguments, which clap refuses: status 2, and the flag by its name.
    #[track_caller]
    pub fn misused(&self, flags: &[&str], words: &[&str]) {
        let before = self.files();
        let outcome = self.run(flags);
        let (stdout, stderr) = texts(&outcome);
        assert_eq!(outcome.status.code(), Some(2), "{flags:?}: {stdout}{stderr}");
        assert_eq!(stdout, "", "{flags:?}");
        assert!(stderr.starts_with("error: "), "{flags:?}: {stderr}");
        for word in words {
            assert!(stderr.contains(word), "{flags:?}: does not say `{word}`: {stderr}");
        }
        assert!(before == self.files(), "{flags:?}: something was written");
    }
}

/// A folder of `tests/fixtures`.
pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

pub fn tiny() -> PathBuf {
    fixture("sd15")
}

pub fn texts(outcome: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (text(&outcome.stdout), text(&outcome.stderr))
}

#[track_caller]
pub fn finished(outcome: &Output, path: &str) {
    let (stdout, stderr) = texts(outcome);
    assert_eq!(outcome.status.code(), Some(0), "{stdout}{stderr}");
    assert_eq!(stdout.lines().last(), Some(path), "{stdout}");
    assert!(!stderr.contains("error") && !stderr.contains("WARN") && !stderr.contains("panicked"), "{stderr}");
}

/// `(height, width)`.
pub fn size(picture: &Tensor) -> (i64, i64) {
    image::size(picture).unwrap()
}

pub fn differ(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[])
}
