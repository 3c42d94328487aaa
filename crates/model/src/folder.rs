//! Making a checkpoint's folder: the whole of it, or nothing.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde_json::Value;

use crate::ModelError;

/// Makes `dst`, which must not exist or be an empty folder, from what `write` puts into a folder beside it; a failure
/// leaves `dst` as it was.
pub(crate) fn make<T>(dst: &Path, write: impl FnOnce(&Path) -> Result<T, ModelError>) -> Result<T, ModelError> {
    if dst.exists() && !is_empty_folder(dst) {
        return Err(ModelError::file(dst, "exists, expected the name of a new folder, or an empty one"));
    }
    // Not appended to the whole path: "out/" and ".partial" would lie inside.
    let Some(name) = dst.file_name() else {
        return Err(ModelError::file(dst, "is not a name, expected that of a new folder, or an empty one"));
    };
    let mut partial_name = name.to_owned();
    partial_name.push(".partial");
    let partial = dst.with_file_name(partial_name);
    if let Some(parent) = partial.parent() {
        fs::create_dir_all(parent).map_err(|e| ModelError::io(parent, e))?;
    }
    // Fails if it is there, so that two runs never fill one folder.
    fs::create_dir(&partial).map_err(|e| match e.kind() {
        ErrorKind::AlreadyExists => {
            ModelError::file(&partial, "exists: another run fills it, or was stopped; remove it")
        }
        _ => ModelError::io(&partial, e),
    })?;
    let done = write(&partial)
        .and_then(|written| fs::rename(&partial, dst).map_err(|e| ModelError::io(dst, e)).map(|()| written));
    if done.is_err() {
        // The first error is the one to tell; what cannot be removed has ".partial" in its name.
        fs::remove_dir_all(&partial).ok();
    }
    done
}

pub(crate) fn write_json(file: &Path, value: &Value) -> Result<(), ModelError> {
    fs::write(file, format!("{value:#}\n")).map_err(|e| ModelError::io(file, e))
}

fn is_empty_folder(path: &Path) -> bool {
    fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
}
