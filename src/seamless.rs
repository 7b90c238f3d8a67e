//! Pictures whose opposite borders meet: tiles for floors, walls and cloth.

/// Which opposite borders of a picture meet, so that copies of it laid side by side show no seam.
///
/// A network is set so ([`StableDiffusion::set_seamless`](crate::StableDiffusion)): along such an axis every convolution goes on at
/// the other border (circular padding) where otherwise it sees zeros. Copies then meet best where a side is a multiple of what the
/// U-Net's deepest layer sees as one place: of 64 pixels in Stable Diffusion 1.5 (its `AutoencoderKl::factor` times `UNet::factor`).
/// [`Windows`](crate::Windows) that are shorter go around the canvas along such an axis, over any network and in any size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Seamless {
    /// A picture with borders, as usual.
    #[default]
    None,
    /// Left and right meet: copies can be laid in a row.
    X,
    /// Top and bottom meet: copies can be stacked.
    Y,
    /// All four: copies can fill a plane.
    Both,
}

impl Seamless {
    /// Left and right where `x`, top and bottom where `y`.
    pub fn of(x: bool, y: bool) -> Self {
        match (x, y) {
            (false, false) => Self::None,
            (true, false) => Self::X,
            (false, true) => Self::Y,
            (true, true) => Self::Both,
        }
    }

    /// Whether left and right meet.
    pub fn x(self) -> bool {
        matches!(self, Self::X | Self::Both)
    }

    /// Whether top and bottom meet.
    pub fn y(self) -> bool {
        matches!(self, Self::Y | Self::Both)
    }
}
