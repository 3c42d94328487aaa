//! How a communicator is to be, and NCCL's struct for it.

use std::ffi::{CString, c_char, c_int, c_uint};
use std::time::Duration;

use crate::error::Error;
use crate::library::Version;

/// Of a communicator, or of one that is split or shrunk off. `None` leaves the choice to NCCL.
///
/// Sharing of resources between a communicator and its children (`splitShare`, `shrinkShare`) is not offered: NCCL then
/// forbids to use the two at a time, which no type here could see to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Fewest thread blocks that a kernel of NCCL's runs with; needs `max_ctas` too.
    pub min_ctas: Option<u32>,
    /// Most thread blocks, each of which fills one multiprocessor.
    pub max_ctas: Option<u32>,
    /// Blocks in a cluster, 0 to 8, on Hopper and newer.
    pub cga_cluster_size: Option<u32>,
    /// "IB", "Socket", or what a plugin is called.
    pub net_name: Option<String>,
    /// Of the network's packets: the class that its switches know them by.
    pub traffic_class: Option<u32>,
    /// How long a group may take to be queued. The first between two ranks connects them, which takes seconds.
    pub queue_timeout: Duration,
    /// How long closing may keep its caller; it goes on in the background after that.
    pub close_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            min_ctas: None,
            max_ctas: None,
            cga_cluster_size: None,
            net_name: None,
            traffic_class: None,
            queue_timeout: Duration::from_secs(30),
            close_timeout: Duration::from_secs(10),
        }
    }
}

/// The oldest version that has all fields that are filled.
const FILLED: Version = Version::new(2, 26, 0);
const UNDEFINED: c_int = c_int::MIN;

/// `ncclConfig_t` up to its last field that is used here.
///
/// NCCL reads no more than `size` bytes and no field that is newer than `version`, and takes its defaults for the rest;
/// so every newer library takes a shorter struct.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct RawConfig {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
    traffic_class: c_int,
}

impl Config {
    /// Does something with NCCL's form, which NCCL copies during the call.
    pub(crate) fn with_raw<T>(&self, call: impl FnOnce(&mut RawConfig) -> T) -> Result<T, Error> {
        let net_name = self.net_name.clone().map(CString::new).transpose();
        let net_name = net_name.map_err(|_| argument("net_name", "has a zero in it".into()))?;
        if self.min_ctas.is_some_and(|min| self.max_ctas.is_none_or(|max| min > max)) {
            let problem =
                format!("{:?} of at most {:?}: max_ctas has to be set, and not smaller", self.min_ctas, self.max_ctas);
            return Err(argument("min_ctas", problem));
        }
        let mut raw = RawConfig {
            size: size_of::<RawConfig>(),
            magic: 0xcafe_beef,
            version: FILLED.code(),
            blocking: 0,
            cga_cluster_size: number("cga_cluster_size", self.cga_cluster_size, 0..=8)?,
            min_ctas: number("min_ctas", self.min_ctas, 1..=c_int::MAX)?,
            max_ctas: number("max_ctas", self.max_ctas, 1..=c_int::MAX)?,
            net_name: net_name.as_ref().map_or(std::ptr::null(), |name| name.as_ptr()),
            split_share: UNDEFINED,
            traffic_class: number("traffic_class", self.traffic_class, 0..=c_int::MAX)?,
        };
        Ok(call(&mut raw))
    }
}

fn number(name: &'static str, value: Option<u32>, range: std::ops::RangeInclusive<c_int>) -> Result<c_int, Error> {
    let Some(value) = value else { return Ok(UNDEFINED) };
    let fits = c_int::try_from(value).ok().filter(|value| range.contains(value));
    fits.ok_or_else(|| argument(name, format!("{value} is not in {range:?}")))
}

/// A rank that there is not.
pub(crate) fn not_below(name: &'static str, rank: usize, size: usize) -> Error {
    argument(name, format!("{rank} is not below {size}, the number of ranks"))
}

pub(crate) fn argument(name: &'static str, problem: String) -> Error {
    Error::Argument { name, problem }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use cudarc::nccl::sys::ncclConfig_t;

    use super::*;

    #[test]
    fn the_layout_is_a_prefix_of_nccls() {
        assert_eq!(size_of::<RawConfig>(), 48);
        assert!(size_of::<RawConfig>() <= size_of::<ncclConfig_t>());
        macro_rules! same {
            ($($ours:ident = $theirs:ident),*) => {
                $(assert_eq!(offset_of!(RawConfig, $ours), offset_of!(ncclConfig_t, $theirs));)*
            };
        }
        same!(size = size, magic = magic, version = version, blocking = blocking, cga_cluster_size = cgaClusterSize);
        same!(min_ctas = minCTAs, max_ctas = maxCTAs, net_name = netName, split_share = splitShare);
        same!(traffic_class = trafficClass);
    }

    #[test]
    fn no_newer_version_is_claimed_than_filled() {
        let raw = Config::default().with_raw(|raw| (raw.size, raw.magic, raw.version, raw.blocking));
        assert_eq!(raw, Ok((48, 0xcafe_beef, 22_600, 0)));
    }

    #[test]
    fn what_is_not_set_is_undefined_and_what_is_wrong_is_named() {
        let unset = Config::default().with_raw(|raw| (raw.min_ctas, raw.traffic_class, raw.net_name.is_null()));
        assert_eq!(unset, Ok((c_int::MIN, c_int::MIN, true)));
        let cases = [
            (Config { min_ctas: Some(4), ..Config::default() }, "min_ctas: Some(4) of at most None"),
            (
                Config { min_ctas: Some(4), max_ctas: Some(2), ..Config::default() },
                "min_ctas: Some(4) of at most Some(2)",
            ),
            (Config { max_ctas: Some(0), ..Config::default() }, "max_ctas: 0 is not in"),
            (Config { cga_cluster_size: Some(9), ..Config::default() }, "cga_cluster_size: 9 is not in 0..=8"),
            (Config { net_name: Some("I\0B".into()), ..Config::default() }, "net_name: has a zero in it"),
            (Config { traffic_class: Some(1 << 31), ..Config::default() }, "traffic_class: 2147483648 is not in"),
        ];
        for (config, text) in cases {
            let error = config.with_raw(|_| ()).expect_err(text);
            assert!(error.to_string().starts_with(text), "{error}");
        }
    }
}
