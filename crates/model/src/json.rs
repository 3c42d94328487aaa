//! JSON from files that nobody vouches for: bounded in size, and a key given twice is an error.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::marker::PhantomData;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

use crate::ModelError;

/// An object's entries in the order of the file; refuses a second entry of the same name.
pub(crate) struct Entries<V>(pub Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Entries<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EntriesVisitor(PhantomData))
    }
}

struct EntriesVisitor<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for EntriesVisitor<V> {
    type Value = Entries<V>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        let mut seen = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            if !seen.insert(key.clone()) {
                return Err(A::Error::custom(format!("key {key:?} is given twice")));
            }
            let value = map.next_value().map_err(|e| A::Error::custom(format!("{key}: {e}")))?;
            entries.push((key, value));
        }
        Ok(Entries(entries))
    }
}

/// The whole file as text; a larger one than `bytes_max` is not read.
pub(crate) fn read_text(file: &Path, bytes_max: u64) -> Result<String, ModelError> {
    let mut text = String::new();
    check_is_file(file)?;
    let opened = File::open(file).map_err(|e| ModelError::io(file, e))?;
    opened.take(bytes_max + 1).read_to_string(&mut text).map_err(|e| ModelError::io(file, e))?;
    if text.len() as u64 > bytes_max {
        return Err(ModelError::file(file, format!("is larger than {bytes_max} bytes")));
    }
    Ok(text)
}

/// Before opening: a pipe or a device of that name would make the open itself wait.
pub(crate) fn check_is_file(path: &Path) -> Result<(), ModelError> {
    let metadata = std::fs::metadata(path).map_err(|e| ModelError::io(path, e))?;
    if metadata.is_file() { Ok(()) } else { Err(ModelError::file(path, "is not a file")) }
}
