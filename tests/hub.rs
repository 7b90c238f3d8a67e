//! Fetching models, from a small server of the test's own that answers as the Hugging Face hub does.
#![cfg(feature = "hub")]
#![allow(clippy::disallowed_methods, missing_docs)] // A test may panic.

mod example;

use attention_distillation::{
    stable_diffusion::hub::{Download, Hub},
    Error, StableDiffusion,
};
use example::{texts, Place};
use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{
        atomic::{AtomicBool, Ordering},
        Arc, Mutex, Once,
    },
    thread::JoinHandle,
    time::Duration,
};
use tch::{Device, Kind};

const REPO: &str = "owner/tiny-sd";
const FIRST: &str = "0123456789abcdef0123456789abcdef01234567";
const SECOND: &str = "fedcba9876543210fedcba9876543210fedcba98";
const UNET: &str = "unet/diffusion_pytorch_model.safetensors";
/// What hub repositories also hold, and nobody here reads.
const CLUTTER: [&str; 9] = [
    "README.md",
    "v1-5-pruned-emaonly.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_flax_model.msgpack",
    "text_encoder/pytorch_model.bin",
    "safety_checker/model.safetensors",
    "vae_decoder/model.onnx",
    "feature_extractor/preprocessor_config.json",
];

const SDXL_CLUTTER: [&str; 9] = [
    "sd_xl_base_1.0.safetensors",
    "sd_xl_offset_example-lora_1.0.safetensors",
    "vae_1_0/config.json",
    "vae_1_0/diffusion_pytorch_model.safetensors",
    "vae_encoder/model.onnx",
    "text_encoder_2/model.onnx_data",
    "text_encoder_2/openvino_model.bin",
    "unet/openvino_model.xml",
    "unet/diffusion_flax_model.msgpack",
];

/// Neither the user's token nor a proxy between the tests and their servers; the address leads nowhere.
fn prepare() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        tch::set_num_threads(1);
        for name in ["ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY"] {
            std::env::remove_var(name);
            std::env::remove_var(name.to_lowercase());
        }
        for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE"] {
            std::env::remove_var(name);
        }
        std::env::set_var("HF_HOME", std::env::temp_dir().join("attention-distillation-no-such-folder"));
        std::env::set_var("HF_TOKEN", " hf_test \n");
        std::env::set_var("HF_ENDPOINT", "http://127.0.0.1:1");
    });
    tch::set_num_threads(1);
}

/// How the server misbehaves.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// This status for every request.
    Status(u16),
    /// This status for files, the listing is open to all: a gated model.
    Gated(u16),
    /// Breaks off in the middle of a file's bytes, having said how many there are.
    Truncated,
    /// The same without having said it.
    TruncatedUnsaid,
}

#[derive(Debug, Clone)]
struct Content {
    sha: &'static str,
    files: BTreeMap<String, Vec<u8>>,
    fault: Fault,
}

#[derive(Debug, Default, Clone)]
struct Request {
    path: String,
    range: Option<String>,
    token: Option<String>,
}

struct Server {
    address: SocketAddr,
    content: Arc<Mutex<Content>>,
    requests: Arc<Mutex<Vec<Request>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(files: BTreeMap<String, Vec<u8>>) -> Self {
        prepare();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let content = Arc::new(Mutex::new(Content { sha: FIRST, files, fault: Fault::None }));
        let (requests, stop) = (Arc::new(Mutex::new(vec![])), Arc::new(AtomicBool::new(false)));
        let thread = std::thread::spawn({
            let (content, requests, stop) = (content.clone(), requests.clone(), stop.clone());
            move || {
                for stream in listener.incoming() {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    // A client that hangs up is no concern of the server.
                    let _ = stream.and_then(|stream| {
                        let content = content.lock().unwrap().clone();
                        answer(stream, &content, &requests)
                    });
                }
            }
        });
        Self { address, content, requests, stop, thread: Some(thread) }
    }

    fn hub(&self, cache: &Path) -> Hub {
        Hub::new().with_endpoint(format!("http://{}/", self.address)).with_cache(cache)
    }

    fn change(&self, change: impl FnOnce(&mut Content)) {
        change(&mut self.content.lock().unwrap());
    }

    /// The requests since the last call.
    fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }

    /// The files of which more than the first byte was asked for since the last call.
    fn downloads(&self) -> Vec<String> {
        let whole = |request: &Request| request.range.as_deref().is_some_and(|range| range != "bytes=0-0");
        let file = |request: Request| Some(request.path.split_once("/resolve/")?.1.split_once('/')?.1.to_owned());
        self.requests().into_iter().filter(whole).filter_map(file).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        let _ = self.thread.take().unwrap().join();
    }
}

fn answer(mut stream: TcpStream, content: &Content, requests: &Mutex<Vec<Request>>) -> std::io::Result<()> {
    let address = stream.local_addr()?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.set_write_timeout(Some(Duration::from_secs(10)))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let mut request = Request { path: first.split(' ').nth(1).unwrap_or_default().to_owned(), ..Request::default() };
    for line in lines {
        let line = line?;
        match line.split_once(": ") {
            Some((name, value)) if name.eq_ignore_ascii_case("range") => request.range = Some(value.to_owned()),
            Some((name, value)) if name.eq_ignore_ascii_case("authorization") => request.token = Some(value.to_owned()),
            Some(_) => (),
            None => break,
        }
    }
    requests.lock().unwrap().push(request.clone());
    let mut send = |status: u16, headers: &str, body: &[u8]| {
        write!(stream, "HTTP/1.1 {status} Status\r\nConnection: close\r\n{headers}\r\n")?;
        stream.write_all(body)
    };
    let mut whole = |status: u16, body: &[u8]| send(status, &format!("Content-Length: {}\r\n", body.len()), body);
    let path = request.path.split('?').next().unwrap_or_default();
    let listing = [format!("/api/models/{REPO}/revision/main"), format!("/api/models/{REPO}/revision/refs%2Fpr%2F1")];
    match content.fault {
        Fault::Status(status) => return whole(status, b"{}"),
        Fault::Gated(status) if !path.starts_with("/api/") => return whole(status, b"{}"),
        _ => (),
    }
    if listing.iter().any(|listing| listing == path) {
        let sibling = |(name, bytes): (&String, &Vec<u8>)| match name.ends_with(".safetensors") {
            true => serde_json::json!({"rfilename": name, "size": bytes.len(), "blobId": "0", "lfs": {"sha256": etag(bytes), "size": bytes.len()}}),
            false => serde_json::json!({"rfilename": name, "size": bytes.len(), "blobId": etag(bytes)}),
        };
        let siblings = content.files.iter().map(sibling).collect::<Vec<_>>();
        return whole(200, serde_json::json!({"sha": content.sha, "siblings": siblings}).to_string().as_bytes());
    }
    let prefix = format!("/{REPO}/resolve/{}/", content.sha);
    let file = path.strip_prefix(&prefix).or(path.strip_prefix("/large/")).unwrap_or_default();
    let Some(bytes) = content.files.get(file) else { return whole(404, b"Entry not found") };
    if path.starts_with(&prefix) && file.ends_with(".safetensors") {
        // Large files lie elsewhere.
        let headers = format!("X-Linked-Etag: \"{}\"\r\nX-Repo-Commit: {}\r\n", etag(bytes), content.sha);
        return send(302, &format!("{headers}Location: http://{address}/large/{file}\r\nContent-Length: 0\r\n"), b"");
    }
    let range = request.range.as_deref().and_then(|range| range.strip_prefix("bytes=")).and_then(|range| range.split_once('-'));
    let (start, end) = range.unwrap_or(("0", ""));
    let (start, end) = (start.parse().unwrap_or(0), end.parse().map_or(bytes.len(), |end: usize| end + 1));
    let Some(part) = bytes.get(start..end.min(bytes.len())) else { return whole(416, b"") };
    let kept = if part.len() > 1 && content.fault != Fault::None { &part[..part.len() / 2] } else { part };
    let length = if content.fault == Fault::TruncatedUnsaid { String::new() } else { format!("Content-Length: {}\r\n", part.len()) };
    let place = format!("Content-Range: bytes {start}-{}/{}\r\n", start + part.len().max(1) - 1, bytes.len());
    send(206, &format!("{length}{place}ETag: \"{}\"\r\nX-Repo-Commit: {}\r\n", etag(bytes), content.sha), kept)
}

/// Differs where the bytes do.
fn etag(bytes: &[u8]) -> String {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
    format!("{hash:016x}")
}

fn model() -> BTreeMap<String, Vec<u8>> {
    fixture("sd15")
}

/// A fixture's files, by their names in the repository.
fn fixture(name: &str) -> BTreeMap<String, Vec<u8>> {
    fn walk(root: &Path, folder: &Path, files: &mut BTreeMap<String, Vec<u8>>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => walk(root, &path, files),
                false => {
                    let name = path.strip_prefix(root).unwrap().to_str().unwrap().replace('\\', "/");
                    files.insert(name, std::fs::read(&path).unwrap());
                }
            }
        }
    }
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    let mut files = BTreeMap::new();
    walk(&root, &root, &mut files);
    files
}

fn cluttered() -> BTreeMap<String, Vec<u8>> {
    model().into_iter().chain(CLUTTER.map(|name| (name.to_owned(), b"not to be read".to_vec()))).collect()
}

fn fetch(hub: &Hub) -> Result<PathBuf, Error> {
    hub.fetch(REPO, &mut |_| ())
}

#[track_caller]
fn refused(result: Result<PathBuf, Error>, words: &[&str]) {
    let error = result.unwrap_err();
    assert!(matches!(error, Error::Hub { .. }), "{error:?}");
    let text = error.to_string();
    assert!(words.iter().all(|word| text.contains(word)), "{text}");
    assert!(!text.contains("hf_test"), "shows the token: {text}");
}

#[track_caller]
fn opens(folder: &Path) {
    let model = StableDiffusion::open(folder, Device::Cpu, Kind::Float).unwrap();
    let condition = model.prompts(&["a cat, by van Gogh"], (64, 64)).unwrap();
    assert_eq!(condition.text.size()[..2], [1, 77]);
}

fn same(folder: &Path, files: &BTreeMap<String, Vec<u8>>) {
    for (name, bytes) in files {
        assert!(&std::fs::read(folder.join(name)).unwrap() == bytes, "{name} differs");
    }
}

#[test]
fn fetches_what_is_needed_once() {
    let (server, cache) = (Server::start(cluttered()), tempfile::tempdir().unwrap());
    let hub = server.hub(cache.path());
    let mut reports: Vec<Download> = vec![];
    let folder = hub.fetch(REPO, &mut |report| reports.push(report.clone())).unwrap();
    opens(&folder);
    same(&folder, &model());

    let requests = server.requests();
    assert!(requests.iter().all(|request| request.path.starts_with("/large/") || request.token.as_deref() == Some("Bearer hf_test")));
    let needed = model();
    let asked = requests.iter().filter_map(|request| request.path.split_once(&format!("/resolve/{FIRST}/")));
    assert_eq!(asked.map(|(_, file)| file).collect::<BTreeSet<_>>(), needed.keys().map(String::as_str).collect());

    // Every file from nothing to all of it, one after the other.
    let mut left = needed.clone();
    for file in reports.chunk_by(|a, b| a.file == b.file) {
        let size = left.remove(&file[0].file).unwrap().len() as u64;
        assert!(file.iter().all(|report| report.total == size && report.files == needed.len()));
        assert!(file.windows(2).all(|pair| pair[0].done <= pair[1].done && pair[0].file_index == pair[1].file_index));
        assert_eq!((file[0].done, file[file.len() - 1].done), (0, size));
        assert_eq!(file[0].file_index, needed.len() - left.len() - 1);
    }
    assert!(left.is_empty());
    assert!(reports.iter().filter(|report| report.file == UNET).count() > 4, "a large file is reported as it comes");

    // Nothing is fetched again.
    assert_eq!(hub.fetch(REPO, &mut |report| panic!("{report:?}")).unwrap(), folder);
    assert_eq!(server.requests().len(), 1);

    // Nor asked for, when nobody answers.
    drop(server);
    assert_eq!(hub.fetch(REPO, &mut |report| panic!("{report:?}")).unwrap(), folder);
    opens(&folder);
    refused(hub.fetch("owner/other", &mut |_| ()), &["owner/other", "127.0.0.1"]);
}

/// Nobody is asked: the server would know.
#[test]
fn offline() {
    let (server, cache) = (Server::start(model()), tempfile::tempdir().unwrap());
    let (hub, offline) = (server.hub(cache.path()), server.hub(cache.path()).with_offline(true));
    refused(fetch(&offline), &["not cached", "HF_HUB_OFFLINE"]);
    assert!(server.requests().is_empty());
    let folder = fetch(&hub.with_offline(false)).unwrap();
    server.requests();
    assert_eq!(fetch(&offline).unwrap(), folder);
    std::fs::remove_file(folder.join(UNET)).unwrap();
    refused(fetch(&offline), &["incomplete", UNET.split_once('/').unwrap().0, "HF_HUB_OFFLINE"]);
    assert!(server.requests().is_empty());
}

/// A commit that changes one file costs one file.
#[test]
fn a_new_commit() {
    let (server, cache) = (Server::start(model()), tempfile::tempdir().unwrap());
    let hub = server.hub(cache.path());
    let old = fetch(&hub).unwrap();
    server.requests();
    server.change(|content| {
        content.sha = SECOND;
        content.files.get_mut("unet/config.json").unwrap().push(b'\n');
    });
    let new = fetch(&hub).unwrap();
    assert_ne!(new, old);
    assert_eq!(server.downloads(), ["unet/config.json"]);
    opens(&new);
    same(&old, &model());
    // The branch leads to the new one from now on.
    server.change(|content| content.fault = Fault::Status(503));
    assert_eq!(fetch(&hub).unwrap(), new);
    // A branch with a slash, and a commit itself.
    server.change(|content| content.fault = Fault::None);
    assert_eq!(fetch(&hub.clone().with_revision("refs/pr/1")).unwrap(), new);
    server.change(|content| content.fault = Fault::Status(503));
    assert_eq!(fetch(&hub.clone().with_revision("refs/pr/1")).unwrap(), new);
    assert_eq!(fetch(&hub.with_revision(FIRST)).unwrap(), old);
}

#[test]
fn half() {
    let mut files = model();
    files.insert("vae/diffusion_pytorch_model.fp16.safetensors".into(), files["vae/diffusion_pytorch_model.safetensors"].clone());
    let (server, cache) = (Server::start(files), tempfile::tempdir().unwrap());
    opens(&fetch(&server.hub(cache.path()).with_half(true)).unwrap());
    let weights = server.downloads().into_iter().filter(|file| file.ends_with(".safetensors")).collect::<Vec<_>>();
    assert_eq!(weights, [UNET, "vae/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.safetensors"]);
}

#[test]
fn weights_in_several_files() {
    let mut files = model();
    // Two files and an index for one tensor each, which is enough for a folder, if not for a network.
    files.remove(UNET);
    let index = "unet/diffusion_pytorch_model.safetensors.index.json";
    let map = r#"{"weight_map": {"a": "part-00001.safetensors", "b": "part-00002.safetensors", "c": "part-00001.safetensors"}}"#;
    files.insert(index.into(), map.into());
    files.insert("unet/part-00001.safetensors".into(), vec![1; 100]);
    files.insert("unet/part-00002.safetensors".into(), vec![2; 100]);
    let (server, cache) = (Server::start(files.clone()), tempfile::tempdir().unwrap());
    let hub = server.hub(cache.path());
    let folder = fetch(&hub).unwrap();
    same(&folder, &files);
    server.change(|content| content.fault = Fault::Status(500));
    assert_eq!(fetch(&hub).unwrap(), folder);
    std::fs::remove_file(folder.join("unet/part-00002.safetensors")).unwrap();
    refused(fetch(&hub), &["500", "incomplete", "unet/part-00002.safetensors"]);
    server.change(|content| {
        content.fault = Fault::None;
        content.files.remove("unet/part-00002.safetensors");
    });
    refused(fetch(&hub), &["unet/part-00002.safetensors"]);
}

#[test]
fn sdxl() {
    let mut files = fixture("sdxl");
    let needed = files.clone();
    for clutter in SDXL_CLUTTER {
        files.insert(clutter.into(), b"not to be read".to_vec());
    }
    // Half precision of one network, which is not asked for.
    files.insert("text_encoder_2/model.fp16.safetensors".into(), b"in half precision".to_vec());
    let (server, cache) = (Server::start(files), tempfile::tempdir().unwrap());
    let hub = server.hub(cache.path());
    let folder = fetch(&hub).unwrap();
    opens(&folder);
    same(&folder, &needed);
    // The tokenizers share files, which are fetched once.
    let fetched = server.downloads();
    assert!(fetched.iter().all(|file| needed.contains_key(file)), "{fetched:?}");
    let half = fetch(&hub.clone().with_half(true)).unwrap();
    assert_eq!((half.as_path(), server.downloads()), (folder.as_path(), vec!["text_encoder_2/model.fp16.safetensors".to_owned()]));

    // Another program may have left out the second encoder, which its list names.
    std::fs::remove_dir_all(folder.join("text_encoder_2")).unwrap();
    server.change(|content| content.fault = Fault::Status(500));
    refused(fetch(&hub), &["500", "incomplete", "text_encoder_2"]);
    server.change(|content| content.fault = Fault::None);
    opens(&fetch(&hub).unwrap());

    // The refiner has only that one.
    server.requests();
    server.change(|content| content.files.retain(|name, _| !name.starts_with("text_encoder/") && !name.starts_with("tokenizer/")));
    refused(fetch(&hub), &[REPO, "text_encoder_2", "refiner"]);
    assert!(server.downloads().is_empty());
}

#[test]
fn refusals_of_the_server() {
    let (server, cache) = (Server::start(model()), tempfile::tempdir().unwrap());
    let hub = server.hub(cache.path());
    for (status, words) in [(404, "no such model"), (401, "HF_TOKEN"), (403, "licence"), (429, "too many"), (500, "500")] {
        server.change(|content| content.fault = Fault::Status(status));
        refused(fetch(&hub), &[REPO, words]);
    }
    for status in [401, 403] {
        server.change(|content| content.fault = Fault::Gated(status));
        refused(fetch(&hub), &["model_index.json", "HF_TOKEN", "licence"]);
    }
    server.change(|content| content.fault = Fault::None);
    refused(fetch(&hub.clone().with_revision("no-such-branch")), &["404", "revision"]);
    opens(&fetch(&hub).unwrap());
}

#[test]
fn broken_off() {
    for fault in [Fault::Truncated, Fault::TruncatedUnsaid] {
        let (server, cache) = (Server::start(model()), tempfile::tempdir().unwrap());
        let hub = server.hub(cache.path());
        server.change(|content| content.fault = fault);
        refused(fetch(&hub), &["model_index.json"]);
        // In the weights, after others that came whole.
        server.change(|content| content.fault = Fault::None);
        let result = hub.fetch(REPO, &mut |report| {
            if report.file == "tokenizer/tokenizer_config.json" {
                server.change(|content| content.fault = fault);
            }
        });
        refused(result, &[UNET]);
        // Half a model is not taken for one, with the server away or back.
        server.change(|content| content.fault = Fault::Status(500));
        refused(fetch(&hub), &["500"]);
        server.change(|content| content.fault = Fault::None);
        server.requests();
        let folder = fetch(&hub).unwrap();
        same(&folder, &model());
        opens(&folder);
        // From where it broke off, if that is known; what came before is not fetched again.
        let half = if fault == Fault::Truncated { model()[UNET].len() / 2 } else { 0 };
        let requests = server.requests();
        let weights = requests.iter().find(|request| request.path.ends_with(UNET) && request.range.as_deref() != Some("bytes=0-0")).unwrap();
        assert_eq!(weights.range, Some(format!("bytes={half}-")));
        assert!(!requests.iter().any(|request| request.path.ends_with("model_index.json")));
    }
}

/// A file of the cache that was cut short, or lost, is fetched again.
#[test]
fn damaged_cache() {
    let (server, cache) = (Server::start(model()), tempfile::tempdir().unwrap());
    let hub = server.hub(cache.path());
    let folder = fetch(&hub).unwrap();
    server.requests();
    let blob = std::fs::canonicalize(folder.join(UNET)).unwrap();
    std::fs::File::options().write(true).open(&blob).unwrap().set_len(1000).unwrap();
    fetch(&hub).unwrap();
    assert_eq!(server.downloads(), [UNET]);
    same(&folder, &model());
    std::fs::remove_file(std::fs::canonicalize(folder.join(UNET)).unwrap()).unwrap();
    fetch(&hub).unwrap();
    assert_eq!(server.downloads(), [UNET]);
    same(&folder, &model());
    // Another program may have fetched a part only.
    std::fs::remove_dir_all(folder.join("text_encoder")).unwrap();
    server.change(|content| content.fault = Fault::Status(500));
    refused(fetch(&hub), &["incomplete", "text_encoder"]);
}

#[test]
fn hostile_listings() {
    for name in ["../../escaped.json", "/tmp/escaped.json", "unet/../../escaped.json"] {
        let (server, cache) = (Server::start(model()), tempfile::tempdir().unwrap());
        server.change(|content| drop(content.files.insert(name.into(), vec![1])));
        refused(fetch(&server.hub(cache.path())), &["refused", name]);
        assert!(server.downloads().is_empty());
    }
    let (server, cache) = (Server::start(model()), tempfile::tempdir().unwrap());
    server.change(|content| content.sha = "../../escaped");
    refused(fetch(&server.hub(cache.path())), &["commit"]);
    server.change(|content| {
        content.sha = FIRST;
        content.files.remove(UNET);
        content.files.insert("unet/diffusion_pytorch_model.bin".into(), vec![1]);
    });
    refused(fetch(&server.hub(cache.path())), &["safetensors", "unet"]);
    assert!(server.downloads().is_empty());
}

/// Before anything is asked of the network: the server would know.
#[test]
fn impossible_names() {
    let (server, cache) = (Server::start(model()), tempfile::tempdir().unwrap());
    let hub = server.hub(cache.path());
    for name in ["", "..", "a/b/c", "/etc/passwd", "../a", "a/..", "a b/c", "a/b?x=1", "a\\b/c", "http://a/b", "a/\u{e9}", "a/b\n"] {
        refused(hub.fetch(name, &mut |_| ()), &["owner/name"]);
    }
    for revision in ["", "../main", "a//b", "a b", "/main", "main?x", "a/../b"] {
        refused(fetch(&hub.clone().with_revision(revision)), &["branch"]);
    }
    assert!(server.requests().is_empty());
}

#[test]
fn environment() {
    prepare();
    let cache = tempfile::tempdir().unwrap();
    refused(fetch(&Hub::new().with_cache(cache.path())), &["127.0.0.1:1/"]);
    refused(fetch(&Hub::new().with_cache(cache.path()).with_endpoint("no address")), &["no address"]);
}

/// Of a login, from a program of its own: the variables are a whole process's. The server refuses it, having seen what it came with.
#[test]
fn tokens() {
    let server = Server::start(model());
    server.change(|content| content.fault = Fault::Status(404));
    let place = Place::of("style_transfer");
    // With this in the variable and that in the file of `hf auth login`: what it says at its end.
    let asks = |variable: Option<&str>, login: Option<&str>, homes: &[(&str, &str)]| {
        let home = tempfile::tempdir().unwrap();
        let mut command = place.command(Path::new(REPO), &["--style", "style.png", "--device", "cpu"]);
        for name in ["HF_TOKEN", "HF_HOME", "XDG_CACHE_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"] {
            command.env_remove(name);
        }
        for (name, folder) in homes {
            command.env(name, home.path().join(folder));
        }
        command.env("HF_ENDPOINT", format!("http://{}", server.address)).env("HOME", home.path());
        variable.map(|token| command.env("HF_TOKEN", token));
        if let Some(token) = login {
            std::fs::create_dir_all(home.path().join("own/huggingface")).unwrap();
            std::fs::write(home.path().join("own/huggingface/token"), token).unwrap();
        }
        let outcome = command.output().unwrap();
        let (stdout, stderr) = texts(&outcome);
        assert_eq!((outcome.status.code(), stdout.as_str()), (Some(1), ""), "{stderr}");
        let secrets = [variable, login].into_iter().flatten().flat_map(str::split_whitespace);
        secrets.for_each(|secret| assert!(!stderr.contains(secret), "shows the token: {stderr}"));
        (stderr, server.requests().into_iter().map(|request| request.token).collect::<Vec<_>>())
    };
    let home = [("HF_HOME", "own/huggingface")];
    for (variable, login, homes, wanted) in [
        (None, Some("hf_login\n"), &home[..], Some("hf_login")),
        (None, Some("hf_login"), &[("XDG_CACHE_HOME", "own")], Some("hf_login")),
        // Files elsewhere, and the login where it is.
        (None, Some("hf_login"), &[home[0], ("HF_HUB_CACHE", "files")], Some("hf_login")),
        (Some(" \n"), Some("hf_login"), &home, Some("hf_login")),
        (Some("hf_own"), Some("hf_login"), &home, Some("hf_own")),
        (None, Some("\n"), &home, None),
        (None, None, &home, None),
    ] {
        let (stderr, tokens) = asks(variable, login, homes);
        assert!(stderr.contains("no such model"), "{stderr}");
        assert_eq!(tokens, [wanted.map(|token| format!("Bearer {token}"))], "{variable:?} {login:?} {homes:?}");
    }
    // What would be a header of its own, or none at all.
    for (variable, login) in [
        (None, Some("hf_login\r\nX-Other: hf_header")),
        (Some("hf_own hf_other"), Some("hf_login")),
        (Some("hf_\u{e9}"), None),
        (None, Some("hf_\u{7f}")),
    ] {
        let (stderr, tokens) = asks(variable, login, &home);
        assert!(stderr.contains(REPO) && stderr.contains("characters that no token has"), "{stderr}");
        assert!(tokens.is_empty(), "the server was asked");
    }
}
