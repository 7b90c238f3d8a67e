//! A copy of a tiny model to break.
#![allow(dead_code, missing_docs, clippy::disallowed_methods, clippy::unwrap_used)] // Each test file uses a part of it.

use attention_distillation::{Result, StableDiffusion};
use serde_json::{Map, Value};
use std::fs;
use std::path::{Path, PathBuf};
use tch::{Device, Kind};

pub const UNET: &str = "unet/diffusion_pytorch_model.safetensors";
pub const VAE: &str = "vae/diffusion_pytorch_model.safetensors";
pub const TEXT: &str = "text_encoder/model.safetensors";

/// Gone when dropped.
pub struct ModelCopy {
    folder: tempfile::TempDir,
    original: PathBuf,
}

impl ModelCopy {
    /// Of `fixtures/sd15`.
    pub fn new() -> Self {
        Self::of("sd15")
    }

    pub fn of(fixture: &str) -> Self {
        tch::set_num_threads(1);
        let (folder, original) = (tempfile::tempdir().unwrap(), fixtures().join(fixture));
        copy(&original, folder.path());
        Self { folder, original }
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path(name), bytes).unwrap();
    }

    /// A file or a folder.
    pub fn remove(&self, name: &str) {
        let path = self.path(name);
        if path.is_dir() {
            fs::remove_dir_all(path).unwrap();
        } else {
            fs::remove_file(path).unwrap();
        }
    }

    /// The file or the folder as it was.
    pub fn restore(&self, name: &str) {
        self.put(&self.original.join(name), name);
    }

    /// A file or a folder from elsewhere, in the place of what was there.
    pub fn put(&self, from: &Path, name: &str) {
        if from.is_dir() {
            let target = self.path(name);
            if target.exists() {
                fs::remove_dir_all(&target).unwrap();
            }
            copy(from, &target);
        } else {
            fs::copy(from, self.path(name)).unwrap();
        }
    }

    pub fn json(&self, name: &str) -> Map<String, Value> {
        serde_json::from_slice(&self.read(name)).unwrap()
    }

    /// Writes the object of a JSON file with one key changed.
    pub fn set(&self, name: &str, key: &str, value: Value) {
        let mut object = self.json(name);
        object.insert(key.to_owned(), value);
        self.write(name, serde_json::to_vec(&object).unwrap());
    }

    pub fn unset(&self, name: &str, key: &str) {
        let mut object = self.json(name);
        object.remove(key);
        self.write(name, serde_json::to_vec(&object).unwrap());
    }

    /// Writes a weights file with its header and data changed.
    pub fn weights(&self, name: &str, change: impl FnOnce(&mut Safetensors)) {
        let mut file = Safetensors::parse(&self.read(name));
        change(&mut file);
        self.write(name, file.bytes());
    }

    pub fn open(&self) -> Result<StableDiffusion> {
        StableDiffusion::open(self.folder(), Device::Cpu, Kind::Float)
    }
}

/// A safetensors file taken apart, sound or not.
pub struct Safetensors {
    pub header: Map<String, Value>,
    pub data: Vec<u8>,
}

impl Safetensors {
    pub fn parse(bytes: &[u8]) -> Self {
        let end = 8 + header_length(bytes);
        Self { header: serde_json::from_slice(&bytes[8..end]).unwrap(), data: bytes[end..].to_vec() }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let header = serde_json::to_vec(&self.header).unwrap();
        [&(header.len() as u64).to_le_bytes()[..], &header, &self.data].concat()
    }

    /// One key of one tensor: `dtype`, `shape` or `data_offsets`.
    pub fn set(&mut self, tensor: &str, key: &str, value: Value) {
        self.header[tensor][key] = value;
    }

    /// One tensor more, of zeros.
    pub fn add(&mut self, tensor: &str, dtype: &str, shape: &[usize], bytes: usize) {
        let start = self.data.len();
        self.data.resize(start + bytes, 0);
        let info = serde_json::json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, start + bytes] });
        self.header.insert(tensor.to_owned(), info);
    }
}

pub fn header_length(bytes: &[u8]) -> usize {
    u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize
}

pub fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::write(&target, fs::read(entry.path()).unwrap()).unwrap();
        }
    }
}
