//! One error type for the whole crate; every variant says which input was at fault.

use std::{io, path::PathBuf};

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Whatever can go wrong. The message says what, where, and where it helps, what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A hook has all it asked for and ended the forward pass. Not a failure:
    /// [`Features::extract`](crate::Features::extract) swallows it.
    #[error("the forward pass was stopped by its attention hook")]
    Stopped,

    /// libtorch refused: shapes that do not fit, no memory left, no such device.
    #[error("libtorch: {}", first_line(.0))]
    Torch(tch::TchError),

    /// A file or folder could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },

    /// A picture could not be decoded or encoded.
    #[error("{}: {reason}", path.display())]
    Image {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// A configuration file (JSON) holds something that this crate cannot follow.
    #[error("{}: {reason}", path.display())]
    Config {
        /// Which file.
        path: PathBuf,
        /// Which key, its value, and what would do.
        reason: String,
    },

    /// A weights file is damaged or of an unknown kind.
    #[error("{}: {reason}", file.display())]
    Weights {
        /// Which file.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// A network needs a tensor that its weights file lacks.
    #[error("{}: no tensor `{name}`; the file does not fit the config.json beside it", file.display())]
    MissingTensor {
        /// The weights file (the first of them, where there are several).
        file: PathBuf,
        /// The tensor's name.
        name: String,
    },

    /// A tensor of a weights file has another shape than its network's configuration says.
    #[error("{}: tensor `{name}` is {found:?}, but the config.json beside it makes it {expected:?}", file.display())]
    TensorShape {
        /// The weights file.
        file: PathBuf,
        /// The tensor's name.
        name: String,
        /// What the configuration says.
        expected: Vec<i64>,
        /// What the file holds.
        found: Vec<i64>,
    },

    /// A tensor given by the caller has the wrong shape.
    #[error("{name}: expected shape {expected}, found {found:?}")]
    Shape {
        /// Which argument.
        name: &'static str,
        /// In words: `(batch, 3, height, width)`.
        expected: String,
        /// What was given.
        found: Vec<i64>,
    },

    /// An argument or setting outside its range.
    #[error("invalid {argument}: {reason}")]
    Argument {
        /// Which.
        argument: &'static str,
        /// Its value and what would do.
        reason: String,
    },

    /// The network has fewer self-attention layers than were asked for.
    #[error("layers {}..{} were asked for, but the network has only {network} self-attention layers (0..{network})", layers.start, layers.end)]
    MissingLayers {
        /// The range asked for.
        layers: std::ops::Range<usize>,
        /// How many self-attention layers the network has.
        network: usize,
    },

    /// The loss or the latents became infinite or NaN. [`Distiller`](crate::Distiller) and
    /// [`GuidedSampler`](crate::GuidedSampler) say what state the run is in then.
    #[error("the {what} became infinite or NaN in step {step}{}; try a lower learning rate, or f32 or bf16 instead of f16{}", in_brackets(*.timestep), if *.step == 1 { "; or look for NaN in what it was given" } else { "" })]
    NotFinite {
        /// `loss`, `latents`, on a GPU `loss or latents`, or the `decoder` that is tuned.
        what: &'static str,
        /// The step at fault, from 1.
        step: usize,
        /// Its timestep; NaN where there are none, as an epoch of tuning has none.
        timestep: f64,
    },

    /// A device that is not there or cannot be used.
    #[error("device `{device}`: {reason}")]
    Device {
        /// As the caller named it.
        device: String,
        /// Why not, and what to do.
        reason: String,
    },

    /// What was asked for takes more memory than a CPU has left, where the system would end the program without a word. Nothing was begun.
    #[error("{what} needs more than {:.1} GiB of memory, of which {:.1} GiB are free; {advice}", gib(*.needed), gib(*.free))]
    Memory {
        /// What was asked for, and how large.
        what: String,
        /// Bytes, at least.
        needed: i64,
        /// Bytes that the machine, or the container, has left.
        free: i64,
        /// What to do.
        advice: String,
    },

    /// The Hugging Face hub could not be reached or lacks a file.
    #[error("{repo}: {reason}")]
    Hub {
        /// The repository's id.
        repo: String,
        /// What failed.
        reason: String,
    },

    /// A downstream [`Denoiser`](crate::Denoiser) failed for a reason of its own.
    #[error("denoiser: {0}")]
    Denoiser(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Not as its source: that would bring back the lines of libtorch's own stack that the message leaves out.
impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Self::Torch(error)
    }
}

impl Error {
    /// Wraps a downstream error: `.map_err(Error::denoiser)?`.
    pub fn denoiser(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Denoiser(error.into())
    }

    /// The device ran out of memory, or a CPU would have ([`Memory`](Self::Memory)). A run stands at its last finished step and goes on
    /// from there once there is room.
    pub fn is_out_of_memory(&self) -> bool {
        match self {
            Self::Memory { .. } => true,
            Self::Torch(error) => says_out_of_memory(&error.to_string()),
            // The cause may lie deeper than the error that the network gave.
            Self::Denoiser(error) => std::iter::successors(Some(error.as_ref() as &(dyn std::error::Error + 'static)), |e| e.source())
                .any(|e| e.downcast_ref::<Self>().is_some_and(Self::is_out_of_memory) || says_out_of_memory(&e.to_string())),
            _ => false,
        }
    }

    pub(crate) fn argument(argument: &'static str, reason: impl Into<String>) -> Self {
        Self::Argument { argument, reason: reason.into() }
    }

    pub(crate) fn shape(name: &'static str, expected: impl Into<String>, found: Vec<i64>) -> Self {
        Self::Shape { name, expected: expected.into(), found }
    }

    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}

fn gib(bytes: i64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

fn in_brackets(timestep: f64) -> String {
    if timestep.is_nan() {
        String::new()
    } else {
        format!(" (timestep {timestep})")
    }
}

/// CUDA says "out of memory", the CPU's allocator "can't allocate memory" or "not enough memory".
fn says_out_of_memory(message: &str) -> bool {
    ["out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED"].iter().any(|words| message.contains(words))
}

/// libtorch's messages go on with the frames of its C++ stack, or with all the backends that an operation has, which help nobody here.
fn first_line(error: &tch::TchError) -> String {
    let whole = match error {
        tch::TchError::Torch(message) => message.clone(),
        other => other.to_string(),
    };
    let backends = whole.starts_with("Could not run").then_some(" This could be because");
    let ends = ["\nException raised from", "\nframe #"].into_iter().chain(backends);
    let end = ends.filter_map(|end| whole.find(end)).min().unwrap_or(whole.len());
    whole.get(..end).unwrap_or(&whole).trim().to_owned()
}
