//! Models from the Hugging Face hub: the few files that [`StableDiffusion::open`](crate::StableDiffusion::open) reads, in
//! the cache that Hugging Face's own programs share.

mod selection;

use crate::{Error, Result};
use hf_hub::{
    api::sync::{Api, ApiBuilder, ApiError, ApiRepo},
    Cache, Repo, RepoType,
};
use selection::{needed, shards};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    fs,
    io::Read,
    path::{Component, Path, PathBuf},
    time::Duration,
};

/// The longest wait for a repository's listing, and the most of it that is read: true ones are some kilobytes.
const LISTING: (Duration, u64) = (Duration::from_secs(60), 32 << 20);

/// Where models come from. What is not set here is taken from the environment: `HF_ENDPOINT`, the cache in `HF_HUB_CACHE`
/// or `HF_HOME`, as Python's huggingface_hub finds it, the token of `HF_TOKEN` or of `hf auth login`, and `HF_HUB_OFFLINE`.
///
/// ```no_run
/// # use attention_distillation::{device, stable_diffusion::hub::Hub, StableDiffusion};
/// let folder = Hub::new().fetch("stable-diffusion-v1-5/stable-diffusion-v1-5", &mut |file| println!("{file:?}"))?;
/// let model = StableDiffusion::open(folder, device::best(), tch::Kind::Float)?;
/// # Ok::<(), attention_distillation::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Hub {
    endpoint: Option<String>,
    cache: Option<PathBuf>,
    revision: Option<String>,
    half: bool,
    offline: Option<bool>,
}

/// How far one file of a model has come.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Download {
    /// Its path in the repository.
    pub file: String,
    /// Its number among the model's files, from 0. Those that are cached already are passed over.
    pub file_index: usize,
    /// How many files the model needs. It grows when the index of weights in several files has been read.
    pub files: usize,
    /// Bytes of this file that are here, those of an earlier attempt included.
    pub done: u64,
    /// Bytes of this file.
    pub total: u64,
}

impl Hub {
    /// As the environment says, branch `main`, weights in full precision where there are both.
    pub fn new() -> Self {
        Self::default()
    }

    /// From another server than `https://huggingface.co`, which is also given the token.
    pub fn with_endpoint(mut self, url: impl Into<String>) -> Self {
        self.endpoint = Some(url.into());
        self
    }

    /// Keeps files in this folder, laid out as Hugging Face's cache (which is `~/.cache/huggingface/hub`).
    pub fn with_cache(mut self, folder: impl Into<PathBuf>) -> Self {
        self.cache = Some(folder.into());
        self
    }

    /// A branch, tag or commit.
    pub fn with_revision(mut self, name: impl Into<String>) -> Self {
        self.revision = Some(name.into());
        self
    }

    /// Prefers the fp16 variant of weights: half the bytes. Where there is only one of the two, it is taken either way.
    pub fn with_half(mut self, half: bool) -> Self {
        self.half = half;
        self
    }

    /// Asks nobody and takes what is cached, as with `HF_HUB_OFFLINE=1`; or asks, whatever the environment says.
    pub fn with_offline(mut self, offline: bool) -> Self {
        self.offline = Some(offline);
        self
    }

    /// The local folder of a model, `owner/name` on the hub. Files that are not cached yet are fetched, and `progress` is
    /// called as their bytes arrive. Without network a model that is completely cached is found all the same.
    ///
    /// # Errors
    /// [`Error::Hub`] for a name that no repository can have, one that is not there, is gated, is no model that
    /// [`StableDiffusion::open`](crate::StableDiffusion::open) could read, for failures of network and disk, and offline for one that is not cached whole. What has
    /// arrived until then is kept: the next call goes on from there.
    pub fn fetch(&self, repo: &str, progress: &mut dyn FnMut(&Download)) -> Result<PathBuf> {
        self.snapshot(repo, progress).map_err(|reason| Error::Hub { repo: repo.to_owned(), reason })
    }

    fn snapshot(&self, name: &str, progress: &mut dyn FnMut(&Download)) -> Result<PathBuf, String> {
        let revision = self.revision.as_deref().unwrap_or("main");
        if !is_name(name) {
            return Err("is not the name of a model on the hub, which is `owner/name` in letters, digits, `-`, `_` and `.`".into());
        }
        if !revision.split('/').all(is_plain) {
            return Err(format!("`{revision}` is not the name of a branch, tag or commit"));
        }
        let cache = self.cache.clone().or_else(|| cache(variable)).ok_or("there is no home folder to keep it in; set HF_HOME")?;
        let at = |revision: &str| Repo::with_revision(name.to_owned(), RepoType::Model, revision.to_owned());
        let folder = cache.join(at(revision).folder_name());
        if self.offline.unwrap_or_else(|| std::env::var("HF_HUB_OFFLINE").is_ok_and(|value| is_yes(&value))) {
            let lacks =
                |lacks: Option<String>| lacks.map_or_else(|| "is not cached".into(), |lacks| format!("the cached copy is incomplete: {lacks}"));
            let advice = "and nobody is asked (HF_HUB_OFFLINE, or `Hub::with_offline`); fetch it once without that";
            return cached(&folder, revision, self.half).map_err(|reason| format!("{}, {advice}", lacks(reason)));
        }
        let (api, cache) = (self.api(&cache)?, Cache::new(cache));
        let listing = match Listing::of(&api.repo(at(revision))) {
            Ok(listing) => listing,
            Err(reason) => match cached(&folder, revision, self.half) {
                Ok(snapshot) => {
                    tracing::warn!(repo = name, reason, "the hub did not answer; the cached copy is used");
                    return Ok(snapshot);
                }
                Err(None) => return Err(reason),
                Err(Some(incomplete)) => return Err(format!("{reason}; the cached copy is incomplete: {incomplete}")),
            },
        };
        let store = Store { folder: &folder, snapshot: folder.join("snapshots").join(&listing.sha), repo: api.repo(at(&listing.sha)) };
        let mut files = needed(&|file| listing.files.contains_key(file), self.half)?;
        let mut index = 0;
        while let Some(file) = files.get(index).cloned() {
            let remote = listing.files.get(&file).ok_or_else(|| format!("has no file {file}, which its index names"))?;
            let state = Download { file: file.clone(), file_index: index, files: files.len(), done: 0, total: 0 };
            let path = store.get(&file, remote, Report { progress: &mut *progress, state })?;
            files.extend(shards(&file, &path)?);
            index += 1;
        }
        let snapshot = cached(&folder, &listing.sha, self.half).map_err(|lacks| lacks.unwrap_or_else(|| "vanished while it was fetched".into()))?;
        // Only now, so that a name never leads to half a model.
        if fs::read_to_string(folder.join("refs").join(revision)).ok().as_deref() != Some(&listing.sha) {
            cache.repo(at(revision)).create_ref(&listing.sha).map_err(|error| format!("{}: {error}", folder.display()))?;
        }
        Ok(snapshot)
    }

    fn api(&self, cache: &Path) -> Result<Api, String> {
        let endpoint = self.endpoint.clone().or_else(|| std::env::var("HF_ENDPOINT").ok()).filter(|url| !url.is_empty());
        // hf-hub looks for a token beside the cache only, and does not know the variable.
        let login = || Cache::new(home(variable).map_or_else(|| cache.to_owned(), |home| home.join("hub"))).token();
        let token = std::env::var("HF_TOKEN").ok().map(|token| token.trim().to_owned()).filter(|token| !token.is_empty()).or_else(login);
        if token.as_ref().is_some_and(|token| !token.bytes().all(|byte| byte.is_ascii_graphic())) {
            return Err("the token in HF_TOKEN or of `hf auth login` holds characters that no token has".into());
        }
        let mut builder = ApiBuilder::from_cache(Cache::new(cache.to_owned())).with_token(token).with_progress(false);
        if let Some(url) = endpoint {
            if !["http://", "https://"].iter().any(|scheme| url.starts_with(scheme)) {
                return Err(format!("`{url}` is not the address of a server, as https://huggingface.co is; see HF_ENDPOINT"));
            }
            builder = builder.with_endpoint(url.trim_end_matches('/').to_owned());
        }
        builder.build().map_err(why)
    }
}

/// Whether a user who names this model means one on the hub: `owner/name`, and no file or folder here.
pub fn is_repo_id(name: &str) -> bool {
    name.contains('/') && is_name(name) && !Path::new(name).exists()
}

/// As the hub itself demands.
fn is_name(name: &str) -> bool {
    let parts = name.split('/').collect::<Vec<_>>();
    let edge = |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');
    let part = |part: &&str| is_plain(part) && part.len() <= 96 && edge(part.as_bytes().first()) && edge(part.as_bytes().last());
    parts.len() <= 2 && parts.iter().all(part) && !name.contains("--") && !name.ends_with(".git")
}

/// Fit to be part of a path and of an address.
fn is_plain(part: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    !part.is_empty() && part.bytes().all(plain) && !part.starts_with('.') && !part.contains("..")
}

/// As huggingface_hub reads a switch in the environment.
fn is_yes(value: &str) -> bool {
    ["1", "ON", "YES", "TRUE"].contains(&value.to_ascii_uppercase().as_str())
}

/// A folder that a variable of the environment names.
fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// Where Python's huggingface_hub keeps its cache, unless told otherwise, and a login.
fn home(folder: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let caches = || folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME").or_else(|| folder("USERPROFILE"))?.join(".cache")));
    folder("HF_HOME").or_else(|| Some(caches()?.join("huggingface")))
}

/// The cache; its second variable is an older name of the first.
fn cache(folder: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    folder("HF_HUB_CACHE").or_else(|| folder("HUGGINGFACE_HUB_CACHE")).or_else(|| Some(home(folder)?.join("hub")))
}

/// What a repository holds at one commit.
#[derive(Debug)]
struct Listing {
    sha: String,
    files: BTreeMap<String, Remote>,
}

/// A file, as far as the server describes it: large ones (LFS) by their SHA-256, others by git's hash.
#[derive(Debug, Deserialize)]
struct Remote {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob: Option<String>,
    lfs: Option<Large>,
}

#[derive(Debug, Deserialize)]
struct Large {
    sha256: String,
}

impl Listing {
    fn of(repo: &ApiRepo) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Answer {
            sha: String,
            siblings: Vec<Remote>,
        }
        let response = repo.info_request().query("blobs", "true").timeout(LISTING.0).call().map_err(|error| why(Box::new(error).into()))?;
        let answer = serde_json::from_reader(response.into_reader().take(LISTING.1));
        let Answer { sha, siblings } = answer.map_err(|error| format!("the server's listing of its files cannot be read: {error}"))?;
        if sha.is_empty() || !sha.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(format!("the server names the commit {sha:?}, which is none"));
        }
        if let Some(bad) = siblings.iter().find(|file| !Path::new(&file.rfilename).components().all(|part| matches!(part, Component::Normal(_)))) {
            return Err(format!("refused: it lists a file {:?}, which would lie outside its folder", bad.rfilename));
        }
        Ok(Self { sha, files: siblings.into_iter().map(|file| (file.rfilename.clone(), file)).collect() })
    }
}

/// One commit in the cache, and where it comes from.
struct Store<'a> {
    folder: &'a Path,
    snapshot: PathBuf,
    repo: ApiRepo,
}

impl Store<'_> {
    fn get(&self, file: &str, remote: &Remote, mut report: Report<'_>) -> Result<PathBuf, String> {
        let path = self.snapshot.join(file);
        let whole = |path: &Path| fs::metadata(path).is_ok_and(|found| found.is_file() && remote.size.is_none_or(|size| size == found.len()));
        if whole(&path) {
            return Ok(path);
        }
        // What stands in its place is a link to nothing, or cut short.
        let _ = fs::remove_file(&path);
        // A file that has not changed since an earlier commit is linked to, not fetched.
        let blob = remote.lfs.as_ref().map(|large| &large.sha256).or(remote.blob.as_ref()).filter(|hash| is_plain(hash));
        if let (Some(blob), Some(parent)) = (blob.map(|hash| self.folder.join("blobs").join(hash)), path.parent()) {
            if remote.size.is_some() && whole(&blob) && fs::create_dir_all(parent).is_ok() && fs::hard_link(&blob, &path).is_ok() {
                return Ok(path);
            }
        }
        let found = self.repo.download_with_progress(file, &mut report).map_err(|error| format!("{file}: {}", self.explain(error)))?;
        if found != path {
            return Err(format!("{file}: the server gave it of another commit than it was asked for"));
        }
        // A server that does not say how long its answer is can break off unnoticed.
        let length = fs::metadata(&path).map(|found| found.len()).map_err(|error| format!("{}: {error}", path.display()))?;
        if length != report.state.total || !whole(&path) {
            let _ = fs::canonicalize(&path).and_then(fs::remove_file);
            let _ = fs::remove_file(&path);
            return Err(format!("{file}: {length} bytes arrived instead of {}; try again", remote.size.unwrap_or(report.state.total)));
        }
        Ok(path)
    }

    fn explain(&self, error: ApiError) -> String {
        let parts = self.folder.join("blobs").join("*.part");
        match error {
            ApiError::LockAcquisition(_) => "another program is fetching it; try again when that is done".into(),
            ApiError::InvalidResume => format!("what an earlier attempt left does not fit; delete {} and try again", parts.display()),
            ApiError::IoError(error) => format!("{error}; the next attempt goes on from there"),
            error => why(error),
        }
    }
}

struct Report<'a> {
    progress: &'a mut dyn FnMut(&Download),
    state: Download,
}

impl hf_hub::api::Progress for &mut Report<'_> {
    fn init(&mut self, size: usize, _: &str) {
        (self.state.done, self.state.total) = (0, u64::try_from(size).unwrap_or(u64::MAX));
    }

    fn update(&mut self, size: usize) {
        self.state.done = self.state.done.saturating_add(u64::try_from(size).unwrap_or(u64::MAX)).min(self.state.total);
        (self.progress)(&self.state);
    }

    fn finish(&mut self) {}
}

/// What the user can do about a failure.
fn why(error: ApiError) -> String {
    let ApiError::RequestError(error) = error else { return error.to_string() };
    let text = error.to_string();
    let advice = match error.into_response().map(|response| response.status()) {
        Some(401 | 403) => {
            "; either there is no such model, or it is private or gated: \
             accept its licence on its page while logged in, and set HF_TOKEN to a token of that account"
        }
        Some(404) => "; there is no such model, revision or file",
        Some(416) => "; what an earlier attempt left does not fit: delete the *.part files in the model's cache and try again",
        Some(429) => "; too many requests: wait some minutes, or set HF_TOKEN",
        _ => "",
    };
    format!("{text}{advice}")
}

/// The folder of a model that was fetched before; else what it lacks, where there is something of it.
fn cached(folder: &Path, revision: &str, half: bool) -> Result<PathBuf, Option<String>> {
    let commit = fs::read_to_string(folder.join("refs").join(revision)).unwrap_or_else(|_| revision.to_owned());
    let snapshot = folder.join("snapshots").join(commit.trim());
    if !is_plain(commit.trim()) || !snapshot.is_dir() {
        return Err(None);
    }
    let has = |file: &str| snapshot.join(file).is_file();
    let files = needed(&has, half)?;
    for file in &files {
        if let Some(shard) = shards(file, &snapshot.join(file))?.iter().find(|shard| !has(shard)) {
            return Err(Some(format!("has no file {shard}")));
        }
    }
    // Another program may have fetched a part of the model; only this file says what belongs to it.
    let model = fs::read_to_string(snapshot.join("model_index.json")).unwrap_or_default();
    let model = serde_json::from_str::<serde_json::Value>(&model).unwrap_or_default();
    let named = |part: &str| model.pointer(&format!("/{part}/0")).is_some_and(|library| library.is_string());
    let lacks = |part: &&str| named(part) && !has(&format!("{part}/config.json"));
    match ["text_encoder", "text_encoder_2"].into_iter().find(lacks) {
        Some(part) => Err(Some(format!("has no file {part}/config.json"))),
        None => Ok(snapshot),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for name in ["gpt2", "a/b", "stable-diffusion-v1-5/stable-diffusion-v1-5", "Lykon/dreamshaper-8", "_a/b.c_d"] {
            assert!(is_name(name), "{name}");
        }
        let long = "a/".to_owned() + &"b".repeat(97);
        for name in [
            "", "/", "a/", "/a", "a/b/c", "../a", "a/..", "a/.", ".a/b", "a/b.", "a b/c", "a\\b", "a/b?c", "a/b#c", "ä/b", "a/b--c", "a/b.git",
            "a..b/c", "a/-b", &long,
        ] {
            assert!(!is_name(name), "{name}");
        }
        assert!(is_repo_id("owner/name") && !is_repo_id("name") && !is_repo_id("src/lib.rs") && !is_repo_id("./model"));
    }

    /// As huggingface_hub 0.36 finds them.
    #[test]
    fn folders_of_the_environment() {
        let all = ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME", "USERPROFILE"];
        let wanted = [
            ("HF_HUB_CACHE", "HF_HOME"),
            ("HUGGINGFACE_HUB_CACHE", "HF_HOME"),
            ("HF_HOME/hub", "HF_HOME"),
            ("XDG_CACHE_HOME/huggingface/hub", "XDG_CACHE_HOME/huggingface"),
            ("HOME/.cache/huggingface/hub", "HOME/.cache/huggingface"),
            ("USERPROFILE/.cache/huggingface/hub", "USERPROFILE/.cache/huggingface"),
        ];
        for (first, wanted) in wanted.into_iter().enumerate() {
            let set = |name: &str| all.iter().skip(first).find(|known| **known == name).map(PathBuf::from);
            assert_eq!((cache(set), home(set)), (Some(wanted.0.into()), Some(wanted.1.into())));
        }
        assert_eq!((cache(|_| None), home(|_| None)), (None, None));
    }
}
