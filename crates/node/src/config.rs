//! Typed config: defaults under a TOML file, under the environment, under flags. A key that the struct does not have is
//! an error; so is a value of the wrong type.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use figment::providers::{Env, Format, Serialized, Toml};
use figment::{Figment, Provider};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// `MOESAIC_THREADS=4` sets `threads`.
pub const ENVIRONMENT_PREFIX: &str = "MOESAIC_";

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("config file {}: cannot be read: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    #[error("config: {0}")]
    Value(String),
}

/// An address that other nodes could not use.
#[derive(Debug, thiserror::Error)]
pub enum InvalidAddress {
    #[error("advertise is {given:?}; expected host:port")]
    Advertise { given: String },
    #[error("listen is {listen}: no node can reach this address; set advertise")]
    Unspecified { listen: SocketAddr },
}

/// Checks what a node tells others of where it is: `advertise`, or the address it listens on.
pub fn check_address(listen: SocketAddr, advertise: Option<&str>) -> Result<(), InvalidAddress> {
    let is_address =
        |text: &str| text.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    match advertise {
        Some(given) if !is_address(given) => Err(InvalidAddress::Advertise { given: given.to_owned() }),
        None if listen.ip().is_unspecified() => Err(InvalidAddress::Unspecified { listen }),
        _ => Ok(()),
    }
}

#[derive(Clone, Debug, thiserror::Error)]
#[error("{field} is {given:?}; expected a number of bytes such as 1073741824, 512MiB or 8GiB")]
pub struct InvalidBytes {
    field: &'static str,
    given: String,
}

/// "8GiB", or bytes without a unit.
pub fn read_bytes(field: &'static str, given: &str) -> Result<u64, InvalidBytes> {
    bytes(given).ok_or_else(|| InvalidBytes { field, given: given.to_owned() })
}

fn bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim() {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Reads a config. `T` is a struct with `#[serde(deny_unknown_fields, default)]`; `flags` serialises to the same keys
/// and leaves out what was not given.
///
/// In the environment only variables of the struct's keys count: Kubernetes adds variables of its own that begin
/// with a service's name, such as `MOESAIC_PORT`.
pub fn load<T>(file: Option<&Path>, flags: &impl Serialize) -> Result<T, ConfigError>
where
    T: Default + Serialize + DeserializeOwned,
{
    let defaults = Figment::from(Serialized::defaults(T::default()));
    let value = |error: figment::Error| ConfigError::Value(error.to_string());
    let keys: Vec<String> = defaults.data().map_err(value)?.into_values().flat_map(|dict| dict.into_keys()).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();

    let mut figment = defaults;
    if let Some(path) = file {
        let reason = |error: std::io::Error| ConfigError::File { path: path.to_owned(), reason: error.to_string() };
        figment = figment.merge(Toml::string(&std::fs::read_to_string(path).map_err(reason)?));
    }
    let environment = Env::prefixed(ENVIRONMENT_PREFIX).only(&keys);
    figment.merge(environment).merge(Serialized::defaults(flags)).extract().map_err(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[test]
    fn memory_is_a_number_with_a_unit() {
        let table = [
            ("1024", Some(1024)),
            ("8GiB", Some(8 << 30)),
            (" 512 MiB ", Some(512 << 20)),
            ("8GB", None),
            ("GiB", None),
            ("-1", None),
            ("99999999999TiB", None),
        ];
        for (text, expected) in table {
            assert_eq!(read_bytes("memory", text).ok(), expected, "{text:?}");
        }
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Config {
        node_config_test_threads: usize,
        name: String,
        id: Option<String>,
    }

    impl Default for Config {
        fn default() -> Self {
            Self { node_config_test_threads: 1, name: "a".into(), id: None }
        }
    }

    #[derive(Default, Serialize)]
    struct Flags {
        #[serde(skip_serializing_if = "Option::is_none")]
        name: Option<String>,
    }

    fn load_text(text: &str, flags: &Flags) -> Result<Config, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        load(Some(file.path()), flags).map_err(|e| e.to_string())
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let flags = Flags { name: Some("flag".into()) };
        let config = load_text("name = 'file'\nnode_config_test_threads = 3\nid = 'x'", &flags).unwrap();
        assert_eq!(config, Config { node_config_test_threads: 3, name: "flag".into(), id: Some("x".into()) });
        assert_eq!(load::<Config>(None, &Flags::default()).unwrap(), Config::default());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, expected) in [
            ("nmae = 'x'", "nmae"),
            ("node_config_test_threads = 'many'", "node_config_test_threads"),
            ("name = ", "TOML"),
        ] {
            let error = load_text(text, &Flags::default()).unwrap_err();
            assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
        }
        let error = load::<Config>(Some(Path::new("/nonexistent.toml")), &Flags::default()).unwrap_err();
        assert!(error.to_string().contains("/nonexistent.toml"));
    }
}
