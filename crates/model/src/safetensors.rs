//! The header of one safetensors file: 8 bytes of length, JSON, then data that the tensors cover without gap or
//! overlap. Checks it against the file's size; never touches the data.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorInfo};
use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

use crate::ModelError;

const LENGTH_BYTES: usize = 8;
/// The format's own limit.
const HEADER_BYTES_MAX: u64 = 100_000_000;
const DIMENSIONS_MAX: usize = 8;

/// Where a tensor lies in its file.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Entry {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// In bytes from the start of the file.
    pub range: Range<usize>,
}

/// The tensors of a file whose bytes are `bytes`, in the order of their data.
pub(crate) fn read_header(file: &Path, bytes: &[u8]) -> Result<Vec<(String, Entry)>, ModelError> {
    let bad = |detail: String| ModelError::file(file, detail);
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(bad(format!("has {} bytes, expected at least the 8 of a header's length", bytes.len())));
    };
    let length = u64::from_le_bytes(*length);
    if length > HEADER_BYTES_MAX {
        return Err(bad(format!("header length is {length}, expected at most {HEADER_BYTES_MAX}")));
    }
    let header = rest.get(..length as usize).ok_or_else(|| {
        bad(format!("header length is {length}, expected at most {}, the rest of the file", rest.len()))
    })?;
    let header = str::from_utf8(header).map_err(|e| bad(format!("header is not UTF-8: {e}")))?;
    let Header(mut tensors) = serde_json::from_str(header).map_err(|e| bad(format!("header: {e}")))?;
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    check_layout(file, &tensors, rest.len() - header.len())?;
    let start = LENGTH_BYTES + header.len();
    let entry = |info: TensorInfo| {
        let (begin, end) = info.data_offsets;
        Entry { dtype: info.dtype, shape: info.shape, range: start + begin..start + end }
    };
    Ok(tensors.into_iter().map(|(name, info)| (name, entry(info))).collect())
}

/// `tensors` by offset must follow one another from 0 to `data_bytes`.
fn check_layout(file: &Path, tensors: &[(String, TensorInfo)], data_bytes: usize) -> Result<(), ModelError> {
    let mut expected_begin = 0;
    for (name, info) in tensors {
        let bad = |detail: String| Err(ModelError::tensor(file, name, detail));
        let (begin, end) = info.data_offsets;
        if begin != expected_begin {
            let what = if begin < expected_begin { "overlaps the tensor before it" } else { "leaves a gap before it" };
            return bad(format!("{what}: data_offsets begin at {begin}, expected {expected_begin}"));
        }
        if end > data_bytes {
            return bad(format!(
                "is truncated: data_offsets end at {end}, and the file has {data_bytes} bytes of data"
            ));
        }
        match size(info) {
            None => return bad(format!("has a shape {:?} that no file can hold", info.shape)),
            Some(size) if end.checked_sub(begin) != Some(size) => {
                return bad(format!(
                    "has data_offsets [{begin}, {end}], expected {size} bytes for {} {:?}",
                    info.dtype, info.shape
                ));
            }
            Some(_) => expected_begin = end,
        }
    }
    if expected_begin == data_bytes {
        return Ok(());
    }
    Err(ModelError::file(file, format!("has {data_bytes} bytes of data, expected {expected_begin} by its header")))
}

fn size(info: &TensorInfo) -> Option<usize> {
    let values = info.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
    let bits = values.checked_mul(info.dtype.bitsize())?;
    (info.shape.len() <= DIMENSIONS_MAX && bits.is_multiple_of(8)).then_some(bits / 8)
}

/// The header's tensors; a name given twice is an error.
struct Header(Vec<(String, TensorInfo)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let (mut tensors, mut seen) = (Vec::new(), HashSet::new());
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) {
                        return Err(A::Error::custom(format!("{name:?} is given twice")));
                    }
                    if name == "__metadata__" {
                        map.next_value::<HashMap<String, String>>()?;
                        continue;
                    }
                    let info = map.next_value().map_err(|e| A::Error::custom(format!("tensor {name}: {e}")))?;
                    tensors.push((name, info));
                }
                Ok(Header(tensors))
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}
