//! API keys: who a key is, what it is good for, and how much of it. Kept as hashes, so that a file of keys gives none
//! away; compared in constant time.
//!
//! A key's requests and tokens a minute are buckets that fill evenly and hold a minute's worth. Tokens are counted when
//! they are read and made, so a bucket can go below nothing: then the next request waits until it is full again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use moesaic_node::access::Scope;
use serde::Deserialize;
use subtle::ConstantTimeEq;

use super::ApiError;

/// Bytes of a SHA-256.
const HASH_BYTES: usize = 32;
/// What begins every key, so that leaked ones can be searched for.
pub const KEY_PREFIX: &str = "moe-";
const NAME_CHARS_MAX: usize = 63;
const MINUTE_MS: f64 = 60_000.0;

/// A file of keys, by their names.
#[derive(Debug, Default)]
pub struct Keys {
    accounts: Vec<([u8; HASH_BYTES], Arc<Account>)>,
}

/// One key's holder.
#[derive(Debug)]
pub struct Account {
    pub name: String,
    scopes: Vec<Scope>,
    limits: Limits,
    /// Shared with the account of the same name when the file is read again.
    usage: Arc<Mutex<Usage>>,
}

/// None: no bound.
#[derive(Clone, Copy, Debug)]
struct Limits {
    requests_per_minute: Option<u32>,
    tokens_per_minute: Option<u32>,
    sequences: Option<u32>,
}

#[derive(Debug)]
struct Usage {
    /// What is left in the buckets, at `at_ms`; where there is no bound it means nothing.
    requests: f64,
    tokens: f64,
    at_ms: u64,
    sequences: u32,
}

impl Default for Usage {
    /// As full as its limits let it be.
    fn default() -> Self {
        Self { requests: f64::INFINITY, tokens: f64::INFINITY, at_ms: 0, sequences: 0 }
    }
}

/// Holds a request's place among those of its account.
#[derive(Debug)]
pub struct Place {
    account: Arc<Account>,
    sequences: u32,
}

#[derive(Debug, thiserror::Error)]
pub enum InvalidKeys {
    #[error("{0}")]
    Toml(String),
    #[error("there are no keys; expected at least one [[keys]]")]
    Empty,
    #[error("keys[{index}].{field}: {reason}")]
    Field { index: usize, field: &'static str, reason: String },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    keys: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    sha256: String,
    scopes: Option<Vec<String>>,
    requests_per_minute: Option<u32>,
    tokens_per_minute: Option<u32>,
    sequences: Option<u32>,
}

/// A key as a file has it: 64 hexadecimal digits.
pub fn written_hash(key: &str) -> String {
    hash(key).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A key as it is kept.
fn hash(key: &str) -> [u8; HASH_BYTES] {
    let digest = ring::digest::digest(&ring::digest::SHA256, key.as_bytes());
    digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

impl Keys {
    /// Reads a file. Accounts that `before` had keep what they have used.
    pub fn parse(text: &str, before: &Keys) -> Result<Self, InvalidKeys> {
        let file: Result<File, _> = toml::from_str(text);
        let entries = file.map_err(|error| InvalidKeys::Toml(error.to_string().trim_end().to_owned()))?.keys;
        if entries.is_empty() {
            return Err(InvalidKeys::Empty);
        }
        let used: BTreeMap<&str, &Account> = before.accounts.iter().map(|(_, a)| (a.name.as_str(), &**a)).collect();
        let mut keys = Self::default();
        for (index, entry) in entries.into_iter().enumerate() {
            let refuse = |field, reason| InvalidKeys::Field { index, field, reason };
            let hash = parse_hash(&entry.sha256).map_err(|reason| refuse("sha256", reason))?;
            let mut account = entry.account(index)?;
            for (other_hash, other) in &keys.accounts {
                if other.name == account.name {
                    return Err(refuse("name", format!("{:?} is there twice", account.name)));
                }
                if *other_hash == hash {
                    return Err(refuse("sha256", format!("is that of {:?}", other.name)));
                }
            }
            if let Some(before) = used.get(account.name.as_str()) {
                account.usage = before.usage.clone();
            }
            keys.accounts.push((hash, Arc::new(account)));
        }
        Ok(keys)
    }

    /// Whose key this is. Takes as long for one that is nearly right as for any other.
    pub fn find(&self, key: &str) -> Option<Arc<Account>> {
        let given = hash(key);
        let mut found = None;
        for (hash, account) in &self.accounts {
            if bool::from(hash.ct_eq(&given)) {
                found = Some(account.clone());
            }
        }
        found
    }
}

impl Entry {
    fn account(self, index: usize) -> Result<Account, InvalidKeys> {
        let refuse = |field, reason: String| InvalidKeys::Field { index, field, reason };
        let is_valid = |c: char| c.is_ascii_alphanumeric() || "-_.@".contains(c);
        if self.name.is_empty() || self.name.len() > NAME_CHARS_MAX || !self.name.chars().all(is_valid) {
            let reason =
                format!("is {:?}; expected 1 to {NAME_CHARS_MAX} characters of a-z, A-Z, 0-9, -_.@", self.name);
            return Err(refuse("name", reason));
        }
        let scope = |name: &String| match name.as_str() {
            "infer" => Ok(Scope::Infer),
            "watch" => Ok(Scope::Watch),
            "operate" => Ok(Scope::Operate),
            other => Err(refuse("scopes", format!("has {other:?}; expected infer, watch or operate"))),
        };
        let scopes = match &self.scopes {
            None => vec![Scope::Infer],
            Some(names) => names.iter().map(scope).collect::<Result<Vec<_>, _>>()?,
        };
        if scopes.is_empty() {
            return Err(refuse("scopes", "is empty: the key would be good for nothing".into()));
        }
        let limits = Limits {
            requests_per_minute: self.requests_per_minute,
            tokens_per_minute: self.tokens_per_minute,
            sequences: self.sequences,
        };
        let bounds = [
            ("requests_per_minute", limits.requests_per_minute),
            ("tokens_per_minute", limits.tokens_per_minute),
            ("sequences", limits.sequences),
        ];
        if let Some((field, _)) = bounds.into_iter().find(|(_, bound)| *bound == Some(0)) {
            return Err(refuse(field, "is 0; expected at least 1, or nothing for no bound".into()));
        }
        Ok(Account { name: self.name, scopes, limits, usage: Arc::default() })
    }
}

fn parse_hash(text: &str) -> Result<[u8; HASH_BYTES], String> {
    let reason = || format!("expected {} hexadecimal digits, as `moesaic key` prints them", 2 * HASH_BYTES);
    let mut hash = [0; HASH_BYTES];
    if text.len() != 2 * HASH_BYTES || !text.is_ascii() {
        return Err(reason());
    }
    for (byte, digits) in hash.iter_mut().zip(text.as_bytes().chunks(2)) {
        let digits = std::str::from_utf8(digits).map_err(|_| reason())?;
        *byte = u8::from_str_radix(digits, 16).map_err(|_| reason())?;
    }
    Ok(hash)
}

impl Account {
    pub fn has(&self, scope: Scope) -> bool {
        self.scopes.iter().any(|own| own.covers(scope))
    }

    /// Lets a request with that many sequences in, at a time counted in ms from any start.
    pub fn admit(self: &Arc<Self>, sequences: u32, now_ms: u64) -> Result<Place, ApiError> {
        let full = |reason: String, wait_ms: f64| {
            let retry_after_s = ((wait_ms / 1000.0).ceil() as u64).max(1);
            ApiError::Quota { reason: format!("the key {:?} {reason}", self.name), retry_after_s }
        };
        let mut usage = self.lock();
        usage.fill(&self.limits, now_ms);
        if let Some(most) = self.limits.sequences.filter(|most| usage.sequences + sequences > *most) {
            return Err(full(format!("has {} of {most} sequences at a time", usage.sequences), 0.0));
        }
        if let Some(rate) = self.limits.tokens_per_minute.filter(|_| usage.tokens <= 0.0) {
            let wait_ms = (1.0 - usage.tokens) * MINUTE_MS / f64::from(rate);
            return Err(full(format!("has used its {rate} tokens a minute"), wait_ms));
        }
        if let Some(rate) = self.limits.requests_per_minute.filter(|_| usage.requests < 1.0) {
            let wait_ms = (1.0 - usage.requests) * MINUTE_MS / f64::from(rate);
            return Err(full(format!("has used its {rate} requests a minute"), wait_ms));
        }
        usage.requests -= 1.0;
        usage.sequences += sequences;
        drop(usage);
        Ok(Place { account: self.clone(), sequences })
    }

    fn lock(&self) -> MutexGuard<'_, Usage> {
        // Nothing panics while it is held; if it did, the counts would still be whole.
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Usage {
    fn fill(&mut self, limits: &Limits, now_ms: u64) {
        let minutes = now_ms.saturating_sub(self.at_ms) as f64 / MINUTE_MS;
        self.at_ms = self.at_ms.max(now_ms);
        let filled = |left: f64, rate: Option<u32>| {
            let Some(rate) = rate.map(f64::from) else { return f64::INFINITY };
            (left + minutes * rate).min(rate)
        };
        self.requests = filled(self.requests, limits.requests_per_minute);
        self.tokens = filled(self.tokens, limits.tokens_per_minute);
    }
}

impl Place {
    pub fn account(&self) -> &Arc<Account> {
        &self.account
    }

    /// Counts tokens that were read or made for the request.
    pub fn charge(&self, tokens: usize) {
        self.account.lock().tokens -= tokens as f64;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.account.lock().sequences -= self.sequences;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(entries: &[(&str, &str, &str)]) -> Keys {
        let entry = |(name, key, more): &(&str, &str, &str)| {
            format!("[[keys]]\nname = {name:?}\nsha256 = {:?}\n{more}\n", written_hash(key))
        };
        Keys::parse(&entries.iter().map(entry).collect::<String>(), &Keys::default()).unwrap()
    }

    #[test]
    fn a_key_is_its_own_and_no_other() {
        let keys = keys(&[("a", "moe-1", ""), ("b", "moe-2", "scopes = ['operate', 'infer']")]);
        let name = |key| keys.find(key).map(|account| account.name.clone());
        assert_eq!([name("moe-1"), name("moe-2")], [Some("a".into()), Some("b".into())]);
        assert_eq!([name(""), name("moe-3"), name("moe-1 "), name(&written_hash("moe-1"))], [const { None }; 4]);
        let scopes = |key| [Scope::Infer, Scope::Operate].map(|scope| keys.find(key).unwrap().has(scope));
        assert_eq!((scopes("moe-1"), scopes("moe-2")), ([true, false], [true, true]));
    }

    #[test]
    fn requests_fill_up_again() {
        let keys = keys(&[("a", "k", "requests_per_minute = 2")]);
        let account = keys.find("k").unwrap();
        for _ in 0..2 {
            account.admit(1, 0).unwrap();
        }
        let Err(ApiError::Quota { retry_after_s, reason }) = account.admit(1, 0) else { panic!("the third came in") };
        assert_eq!((retry_after_s, reason.as_str()), (30, "the key \"a\" has used its 2 requests a minute"));
        assert!(account.admit(1, 29_999).is_err());
        account.admit(1, 30_000).unwrap();
        assert!(account.admit(1, 30_000).is_err());
        // No more than a minute's worth, however long nothing came.
        for _ in 0..2 {
            account.admit(1, 10_000_000).unwrap();
        }
        assert!(account.admit(1, 10_000_000).is_err());
    }

    #[test]
    fn tokens_are_paid_back_before_the_next_request() {
        let keys = keys(&[("a", "k", "tokens_per_minute = 600")]);
        let account = keys.find("k").unwrap();
        let place = account.admit(1, 0).unwrap();
        place.charge(500);
        account.admit(1, 0).unwrap().charge(400);
        let Err(ApiError::Quota { retry_after_s, .. }) = account.admit(1, 0) else { panic!("it came in") };
        assert_eq!(retry_after_s, 31, "300 over, at 10 a second, and one to go on with");
        account.admit(1, 31_000).unwrap();
    }

    #[test]
    fn sequences_are_free_when_their_request_ends() {
        let keys = keys(&[("a", "k", "sequences = 3")]);
        let account = keys.find("k").unwrap();
        let two = account.admit(2, 0).unwrap();
        assert!(account.admit(2, 0).is_err());
        let one = account.admit(1, 0).unwrap();
        drop((one, two));
        account.admit(3, 0).unwrap();
    }

    #[test]
    fn what_was_used_stays_used_when_the_file_is_read_again() {
        let before = keys(&[("a", "k", "requests_per_minute = 1")]);
        before.find("k").unwrap().admit(1, 0).unwrap();
        let text = format!("[[keys]]\nname = 'a'\nsha256 = {:?}\nrequests_per_minute = 1", written_hash("new"));
        let after = Keys::parse(&text, &before).unwrap();
        assert!(after.find("k").is_none());
        assert!(after.find("new").unwrap().admit(1, 0).is_err());
    }

    #[test]
    fn what_is_wrong_with_a_file_is_named() {
        let good = written_hash("k");
        let one = |text: &str| format!("[[keys]]\nname = 'a'\nsha256 = '{good}'\n{text}");
        for (text, expected) in [
            (String::new(), "no keys"),
            ("keys = 1".into(), "keys"),
            (one("scope = 'infer'"), "scope"),
            (one("scopes = ['all']"), "keys[0].scopes: has \"all\""),
            (one("scopes = []"), "keys[0].scopes: is empty"),
            (one("requests_per_minute = 0"), "keys[0].requests_per_minute: is 0"),
            (one("tokens_per_minute = -1"), "tokens_per_minute"),
            (one(&one("")), "keys[1].name: \"a\" is there twice"),
            (one(&format!("[[keys]]\nname = 'b'\nsha256 = '{good}'")), "keys[1].sha256: is that of \"a\""),
            ("[[keys]]\nname = 'a'\nsha256 = 'zz'".into(), "keys[0].sha256: expected 64"),
            (format!("[[keys]]\nname = 'a b'\nsha256 = '{good}'"), "keys[0].name: is \"a b\""),
        ] {
            let error = Keys::parse(&text, &Keys::default()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
        }
    }
}
