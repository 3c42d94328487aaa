//! A tensor as what the model needs it to be: a vector of finite f32, or a matrix with its scales. Checks dtype, shape
//! and the values of all but the weights themselves.

use std::borrow::Cow;
use std::path::Path;

use moesaic_kernels::{Matrix, MatrixData};
use safetensors::tensor::Dtype;

use crate::names::{Kind, Spec};
use crate::shards::{Shards, Tensor};
use crate::{Config, ModelError, Quantization};

/// Reads tensors of one checkpoint.
#[derive(Clone, Copy)]
pub(crate) struct Typed<'a> {
    pub dir: &'a Path,
    pub config: &'a Config,
    pub shards: &'a Shards,
}

impl<'a> Typed<'a> {
    /// Whether the tensor is there with a fitting dtype and shape, and its scales too. Reads headers only.
    pub fn check(&self, spec: &Spec) -> Result<(), ModelError> {
        let tensor = self.find(&spec.name, &spec.shape)?;
        match (tensor.dtype, spec.kind) {
            (Dtype::F32 | Dtype::F16 | Dtype::BF16, _) => Ok(()),
            (Dtype::F8_E4M3, Kind::Linear | Kind::Plain) => self.scale_tensor(spec, tensor.file).map(|_| ()),
            (other, kind) => {
                let expected = if kind == Kind::Vector { "F32, F16 or BF16" } else { "F32, F16, BF16 or F8_E4M3" };
                Err(ModelError::tensor(tensor.file, &spec.name, format!("has dtype {other}, expected {expected}")))
            }
        }
    }

    pub fn vector(&self, spec: &Spec) -> Result<Vec<f32>, ModelError> {
        self.check(spec)?;
        let tensor = self.find(&spec.name, &spec.shape)?;
        let data = float_data(tensor).ok_or_else(|| self.missing(&spec.name))?;
        let values = Matrix { rows: 1, cols: spec.shape.iter().product(), data }.to_f32();
        finite(values, tensor.file, &spec.name)
    }

    /// A matrix as finite f32 values, whatever its dtype.
    pub fn finite_matrix(&self, spec: &Spec) -> Result<Vec<f32>, ModelError> {
        let values = self.matrix(spec)?.to_f32();
        let file = self.find(&spec.name, &spec.shape)?.file;
        finite(values, file, &spec.name)
    }

    pub fn matrix(&self, spec: &Spec) -> Result<Matrix<'a>, ModelError> {
        self.check(spec)?;
        let tensor = self.find(&spec.name, &spec.shape)?;
        let &[rows, cols] = tensor.shape else {
            return Err(ModelError::tensor(
                tensor.file,
                &spec.name,
                format!("has shape {:?}, expected two", tensor.shape),
            ));
        };
        let data = match float_data(tensor) {
            Some(data) => data,
            None => {
                let (scales, quantization) = self.scale_tensor(spec, tensor.file)?;
                let values = read_scales(scales, quantization, &spec.scale_name())?;
                MatrixData::Fp8 { q: tensor.bytes, scales: Cow::Owned(values), block: quantization.block }
            }
        };
        Ok(Matrix { rows, cols, data })
    }

    /// What the kernels multiply with the same rows: FP8 in blocks with an odd number of columns, which cannot be read in
    /// pairs, and other dtypes do not go together.
    pub fn check_alike(&self, first: &Spec, other: &Spec) -> Result<(), ModelError> {
        if self.config.quantization.is_none_or(|q| q.block[1].is_multiple_of(2)) {
            return Ok(());
        }
        let (a, b) = (self.find(&first.name, &first.shape)?, self.find(&other.name, &other.shape)?);
        if (a.dtype == Dtype::F8_E4M3) == (b.dtype == Dtype::F8_E4M3) {
            return Ok(());
        }
        let detail = format!(
            "has dtype {}, expected {} as {} has, because weight_block_size has an odd number of columns",
            b.dtype, a.dtype, first.name
        );
        Err(ModelError::tensor(b.file, &other.name, detail))
    }

    fn find(&self, name: &str, shape: &[usize]) -> Result<Tensor<'a>, ModelError> {
        let tensor = self.shards.get(name).ok_or_else(|| self.missing(name))?;
        if tensor.shape == shape {
            return Ok(tensor);
        }
        let detail = format!("has shape {:?}, expected {shape:?} by config.json", tensor.shape);
        Err(ModelError::tensor(tensor.file, name, detail))
    }

    fn scale_tensor(&self, spec: &Spec, weight_file: &Path) -> Result<(Tensor<'a>, Quantization), ModelError> {
        let Some(quantization) = self.config.quantization else {
            let detail = "is F8_E4M3, expected quantization_config.weight_block_size in config.json";
            return Err(ModelError::tensor(weight_file, &spec.name, detail));
        };
        let name = spec.scale_name();
        if self.shards.get(&name).is_none() {
            let detail = format!("is F8_E4M3, expected its scales beside it as {name}");
            return Err(ModelError::tensor(weight_file, &spec.name, detail));
        }
        let blocks: Vec<usize> = spec.shape.iter().zip(quantization.block).map(|(n, b)| n.div_ceil(b)).collect();
        let scales = self.find(&name, &blocks)?;
        if !matches!(scales.dtype, Dtype::F32 | Dtype::F8_E8M0) {
            let detail = format!("has dtype {}, expected F32 or F8_E8M0", scales.dtype);
            return Err(ModelError::tensor(scales.file, name, detail));
        }
        Ok((scales, quantization))
    }

    fn missing(&self, name: &str) -> ModelError {
        ModelError::tensor(self.dir, name, "is missing")
    }
}

/// None for FP8.
fn float_data(tensor: Tensor<'_>) -> Option<MatrixData<'_>> {
    match tensor.dtype {
        Dtype::F32 => Some(MatrixData::F32(tensor.bytes)),
        Dtype::F16 => Some(MatrixData::F16(tensor.bytes)),
        Dtype::BF16 => Some(MatrixData::Bf16(tensor.bytes)),
        _ => None,
    }
}

fn read_scales(scales: Tensor<'_>, quantization: Quantization, name: &str) -> Result<Vec<f32>, ModelError> {
    let values: Vec<f32> = if scales.dtype == Dtype::F8_E8M0 {
        scales.bytes.iter().map(|&exponent| e8m0_to_f32(exponent)).collect()
    } else {
        Matrix { rows: 1, cols: scales.shape.iter().product(), data: MatrixData::F32(scales.bytes) }.to_f32()
    };
    for (block, &scale) in values.iter().enumerate() {
        let expected = if !scale.is_finite() || scale < 0.0 {
            "a finite number from 0"
        } else if quantization.ue8m0 && !is_power_of_two(scale) {
            "a power of two, because scale_fmt is ue8m0"
        } else {
            continue;
        };
        let detail = format!("has scale {scale} in block {block}, expected {expected}");
        return Err(ModelError::tensor(scales.file, name, detail));
    }
    Ok(values)
}

/// 2^(exponent - 127); 255 is NaN.
fn e8m0_to_f32(exponent: u8) -> f32 {
    match exponent {
        255 => f32::NAN,
        0 => f32::from_bits(1 << 22),
        _ => f32::from_bits(u32::from(exponent) << 23),
    }
}

/// 2^-127 is the one power of two of e8m0 that is a denormal in f32.
fn is_power_of_two(scale: f32) -> bool {
    let mantissa = scale.to_bits() & 0x7f_ffff;
    (scale >= f32::MIN_POSITIVE && mantissa == 0) || scale.to_bits() == 1 << 22
}

fn finite(values: Vec<f32>, file: &Path, name: &str) -> Result<Vec<f32>, ModelError> {
    match values.iter().position(|x| !x.is_finite()) {
        None => Ok(values),
        Some(at) => Err(ModelError::tensor(file, name, format!("has {} at {at}, expected finite numbers", values[at]))),
    }
}
