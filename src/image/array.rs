//! Pictures as ndarray's arrays.

use crate::scalar::WithNumber;
use crate::{Error, Result};
use ndarray::{Array3, Array4, ArrayView3, ArrayView4};
use tch::{Device, Kind, Tensor};

/// `(batch, 3, height, width)`, values 0 to 1.
///
/// # Errors
/// [`Error::Shape`] if it is not a picture.
pub fn to_array(picture: &Tensor) -> Result<Array4<f32>> {
    let (height, width) = super::size(picture)?;
    let (batch, ..) = picture.size4()?;
    let shape = [batch, 3, height, width].map(|side| usize::try_from(side).unwrap_or(0));
    Array4::from_shape_vec(shape, floats(picture)?).map_err(|error| Error::argument("picture", error.to_string()))
}

/// From `(batch, 3, height, width)`, values 0 to 1, any strides.
///
/// # Errors
/// [`Error::Shape`] if it is not a picture.
pub fn from_array(array: ArrayView4<'_, f32>) -> Result<Tensor> {
    let values: Vec<f32> = array.iter().copied().collect();
    let picture = Tensor::f_from_slice(&values)?.f_view(sides(array.shape()).as_slice())?;
    super::size(&picture)?;
    Ok(picture)
}

/// One picture as `(height, width, 3)` bytes, rounded to the nearest: the layout of image files.
///
/// # Errors
/// [`Error::Shape`] if it is not one picture, [`Error::Argument`] if all of it is NaN; single ones become black.
pub fn to_rgb8(picture: &Tensor) -> Result<Array3<u8>> {
    let (height, width) = super::size(picture)?;
    if picture.size4()?.0 != 1 {
        return Err(Error::shape("picture", "(1, 3, height, width); take one of the batch by `f_narrow`", picture.size()));
    }
    let values = picture.f_detach()?.f_squeeze_dim(0)?.f_permute([1, 2, 0])?.f_to_kind(Kind::Float)?;
    if bool::try_from(values.f_isnan()?.f_all()?)? {
        return Err(Error::argument(
            "picture",
            "is all NaN: either its latents are, or the autoencoder overflowed, as some do in f16; then decode in f32",
        ));
    }
    // What is not a number has no colour; black beats undefined.
    let bytes = values.f_nan_to_num(0.0, 1.0, 0.0)?.within(0.0, 1.0)?.times(255.0)?.f_round()?.f_to_kind(Kind::Uint8)?;
    let bytes = bytes.f_to_device(Device::Cpu)?.f_contiguous()?.f_view([-1])?;
    let shape = [height, width, 3].map(|side| usize::try_from(side).unwrap_or(0));
    Array3::from_shape_vec(shape, Vec::<u8>::try_from(bytes)?).map_err(|error| Error::argument("picture", error.to_string()))
}

/// From `(height, width, 3)` bytes.
///
/// # Errors
/// [`Error::Shape`] if a side is 0 or there are not three channels.
pub fn from_rgb8(array: ArrayView3<'_, u8>) -> Result<Tensor> {
    let bytes: Vec<u8> = array.iter().copied().collect();
    let picture = Tensor::f_from_slice(&bytes)?.f_view(sides(array.shape()).as_slice())?;
    let picture = picture.f_permute([2, 0, 1])?.f_unsqueeze(0)?.f_to_kind(Kind::Float)?.over(255.0)?.f_contiguous()?;
    super::size(&picture)?;
    Ok(picture)
}

fn sides(shape: &[usize]) -> Vec<i64> {
    shape.iter().map(|&side| i64::try_from(side).unwrap_or(i64::MAX)).collect()
}

fn floats(picture: &Tensor) -> Result<Vec<f32>> {
    let flat = picture.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_contiguous()?.f_view([-1])?;
    Ok(Vec::<f32>::try_from(flat)?)
}
