//! A node's settings: flags over the environment over a TOML file over defaults.
//!
//! A setting stands once: as a field of a struct that derives `clap::Args`, with its default and what it is. The flag
//! `--cache-tokens`, the variable `MOESAIC_CACHE_TOKENS` and the file's key `cache_tokens` follow from its name, and the
//! same parser reads their values.

use std::ffi::{OsStr, OsString};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Args, Command, FromArgMatches, value_parser};
use toml::{Table, Value};

/// The flag that names the file.
const FILE: &str = "config";

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("config file {}: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    #[error("{variable}: {reason}")]
    Variable { variable: String, reason: String },
    #[error("{0}")]
    Flags(String),
}

/// Settings `C` as flags of a program, with its environment and a file beneath them.
#[derive(Clone, Debug)]
pub struct Layered<C>(pub C);

impl<C: Args> Args for Layered<C> {
    fn augment_args(command: Command) -> Command {
        let help = "A TOML file with the same settings; flags and MOESAIC_* variables count more";
        let file = Arg::new(FILE).long(FILE).value_name("FILE").value_parser(value_parser!(PathBuf)).help(help);
        C::augment_args(command).arg(file)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl<C: Args> FromArgMatches for Layered<C> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let is_given = |key: &&str| matches.value_source(key) == Some(ValueSource::CommandLine);
        let command = command::<C>();
        let given = keys(&command).filter(is_given);
        let flags = given.flat_map(|key| matches.get_raw(key).into_iter().flatten().map(move |value| flag(key, value)));
        let file = matches.get_one(FILE).map(PathBuf::as_path);
        load(file, flags).map(Self).map_err(|error| clap::Error::raw(ErrorKind::ValueValidation, error))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Settings where nothing is given.
///
/// # Panics
/// If one of them is required.
pub fn defaults<C: Args>() -> C {
    read(command::<C>(), Vec::new()).expect("every setting has a default")
}

/// Reads settings: `flags` (`--key=value`), variables of the environment, and a file. Of the environment only variables of
/// settings count: Kubernetes adds variables of its own that begin with a service's name, such as `MOESAIC_PORT`.
pub fn load<C: Args>(file: Option<&Path>, flags: impl IntoIterator<Item = OsString>) -> Result<C, ConfigError> {
    load_of(file, |variable| std::env::var_os(variable), flags)
}

fn load_of<C: Args>(
    file: Option<&Path>,
    environment: impl Fn(&str) -> Option<OsString>,
    flags: impl IntoIterator<Item = OsString>,
) -> Result<C, ConfigError> {
    let command = command::<C>();
    // The last one counts.
    let mut arguments = Vec::new();
    if let Some(path) = file {
        let failed = |reason: String| ConfigError::File { path: path.to_owned(), reason: short(&reason) };
        arguments.extend(of_file(&command, path).map_err(failed)?);
    }
    for key in keys(&command) {
        let variable = variable(key);
        if let Some(value) = environment(&variable) {
            let failed = |reason: String| ConfigError::Variable { variable, reason: short(&reason) };
            arguments.push(checked(&command, key, &value).map_err(failed)?);
        }
    }
    arguments.extend(flags);
    read(command.clone(), arguments).map_err(ConfigError::Flags)
}

/// A setting's variable.
pub fn variable(key: &str) -> String {
    format!("MOESAIC_{}", key.to_uppercase())
}

/// A setting as a flag.
pub fn flag(key: &str, value: impl AsRef<OsStr>) -> OsString {
    let mut flag = OsString::from(format!("--{}=", key.replace('_', "-")));
    flag.push(value);
    flag
}

fn command<C: Args>() -> Command {
    C::augment_args(Command::new("settings").no_binary_name(true).disable_help_flag(true).args_override_self(true))
}

fn keys(command: &Command) -> impl Iterator<Item = &str> {
    command.get_arguments().map(|argument| argument.get_id().as_str())
}

fn of_file(command: &Command, path: &Path) -> Result<Vec<OsString>, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("cannot be read: {error}"))?;
    let table: Table = text.parse().map_err(|error: toml::de::Error| error.to_string().trim_end().to_owned())?;
    let read = |(key, value): (String, Value)| {
        let value = match value {
            Value::String(text) => text,
            Value::Integer(_) | Value::Float(_) | Value::Boolean(_) => value.to_string(),
            _ => return Err(format!("{key} is a {}; expected a string, a number, true or false", value.type_str())),
        };
        if !keys(command).any(|known| known == key) {
            let known: Vec<&str> = keys(command).collect();
            return Err(format!("{key} is no setting; expected one of {}", known.join(", ")));
        }
        checked(command, &key, value.as_ref())
    };
    table.into_iter().map(read).collect()
}

/// A setting as a flag, if its value can be read.
fn checked(command: &Command, key: &str, value: &OsStr) -> Result<OsString, String> {
    let flag = flag(key, value);
    match command.clone().try_get_matches_from([&flag]) {
        Ok(_) => Ok(flag),
        Err(error) => Err(format!("{key}: {}", in_a_line(&error))),
    }
}

fn read<C: Args>(command: Command, arguments: Vec<OsString>) -> Result<C, String> {
    let matches = command.try_get_matches_from(arguments).map_err(|error| in_a_line(&error))?;
    C::from_arg_matches(&matches).map_err(|error| in_a_line(&error))
}

/// As much of an error as is read: it repeats what was given.
fn short(reason: &str) -> String {
    const CHARS_MAX: usize = 400;
    match reason.char_indices().nth(CHARS_MAX) {
        Some((end, _)) => format!("{}...", &reason[..end]),
        None => reason.to_owned(),
    }
}

/// What is wrong, without what a program says of its usage.
fn in_a_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let lines = text.lines().map(str::trim).take_while(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join(" ").trim_start_matches("error: ").to_owned()
}

/// A number that is too small or too large.
#[derive(Debug, thiserror::Error)]
#[error("{field} is {given}; expected 1 to {max}")]
pub struct OutOfRange {
    field: &'static str,
    given: u64,
    max: u64,
}

/// Checks settings, each with its largest value.
pub fn check_ranges(settings: &[(&'static str, u64, u64)]) -> Result<(), OutOfRange> {
    match settings.iter().find(|(_, given, max)| !(1..=*max).contains(given)) {
        Some(&(field, given, max)) => Err(OutOfRange { field, given, max }),
        None => Ok(()),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

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

    #[derive(Debug, PartialEq, clap::Args)]
    struct Settings {
        #[command(flatten)]
        part: Part,
        #[arg(long, default_value_t = 1, value_name = "N")]
        config_test_threads: usize,
        #[arg(long)]
        config_test_id: Option<String>,
        #[arg(long, num_args = 0..=1, default_value_t = false, default_missing_value = "true", action = clap::ArgAction::Set)]
        config_test_pin: bool,
    }

    #[derive(Debug, PartialEq, clap::Args)]
    struct Part {
        #[arg(long, default_value = "a")]
        config_test_name: String,
    }

    impl Settings {
        fn of(name: &str, threads: usize, id: Option<&str>, pin: bool) -> Self {
            Self {
                part: Part { config_test_name: name.into() },
                config_test_threads: threads,
                config_test_id: id.map(str::to_owned),
                config_test_pin: pin,
            }
        }
    }

    #[derive(clap::Parser)]
    #[command(no_binary_name = true)]
    struct Program {
        #[command(flatten)]
        settings: Layered<Settings>,
    }

    fn run(file: Option<&str>, flags: &[&str]) -> Result<Settings, String> {
        use clap::Parser as _;
        let written = tempfile::NamedTempFile::new().unwrap();
        let mut arguments: Vec<OsString> = flags.iter().map(OsString::from).collect();
        if let Some(text) = file {
            std::fs::write(written.path(), text).unwrap();
            arguments.push(flag(FILE, written.path()));
        }
        Program::try_parse_from(arguments).map(|program| program.settings.0).map_err(|error| error.to_string())
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        assert_eq!(run(None, &[]), Ok(defaults()));
        assert_eq!(defaults::<Settings>(), Settings::of("a", 1, None, false));
        let file = "config_test_name = 'file'\nconfig_test_threads = 3\nconfig_test_id = 'x'\nconfig_test_pin = true";
        assert_eq!(run(Some(file), &[]), Ok(Settings::of("file", 3, Some("x"), true)));
        // A flag counts where it says what the default is, too.
        let flags = ["--config-test-name=a", "--config-test-threads", "2", "--config-test-pin=false"];
        assert_eq!(run(Some(file), &flags), Ok(Settings::of("a", 2, Some("x"), false)));
        assert_eq!(run(None, &["--config-test-pin"]), Ok(Settings::of("a", 1, None, true)));
    }

    #[test]
    fn variables_win_over_the_file_and_flags_over_variables() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(
            file.path(),
            "config_test_name = 'file'
config_test_id = 'file'",
        )
        .unwrap();
        let given = |value: &'static str| {
            move |name: &str| {
                (name == "MOESAIC_CONFIG_TEST_THREADS" || name == "MOESAIC_CONFIG_TEST_ID").then(|| value.into())
            }
        };
        let read = |value, flags: Vec<OsString>| load_of::<Settings>(Some(file.path()), given(value), flags);
        assert_eq!(read("5", vec![]).unwrap(), Settings::of("file", 5, Some("5"), false));
        let flags = vec![flag("config_test_threads", "7")];
        assert_eq!(read("5", flags).unwrap(), Settings::of("file", 7, Some("5"), false));
        let error = read("many", vec![]).unwrap_err().to_string();
        assert!(
            error.starts_with("MOESAIC_CONFIG_TEST_THREADS: config_test_threads: invalid value 'many'"),
            "{error:?}"
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, expected) in [
            ("config_test_nmae = 'x'", "config_test_nmae is no setting; expected one of config_test_name,"),
            ("config_test_threads = 'many'", "config_test_threads: invalid value 'many' for"),
            ("config_test_threads = -1", "config_test_threads: invalid value '-1' for"),
            ("config_test_pin = 'maybe'", "[possible values: true, false]"),
            ("config_test_name = ['a']", "config_test_name is a array; expected a string"),
            ("config_test_name = ", "TOML"),
        ] {
            let error = run(Some(text), &[]).unwrap_err();
            assert!(error.contains("config file /") && error.contains(expected), "{error:?} does not say {expected:?}");
        }
        let long = run(Some(&format!("config_test_threads = '{}'", "9".repeat(10_000))), &[]).unwrap_err();
        assert!(long.len() < 600 && long.contains("config_test_threads: invalid value '999"), "{long}");
        let error = load::<Settings>(Some(Path::new("/nonexistent.toml")), []).unwrap_err().to_string();
        assert!(error.starts_with("config file /nonexistent.toml: cannot be read: "), "{error:?}");
        let error = load::<Settings>(None, [flag("config_test_size", "1")]).unwrap_err().to_string();
        assert!(error.contains("'--config-test-size'"), "{error:?}");
    }
}
