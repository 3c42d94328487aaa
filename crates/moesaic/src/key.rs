//! `moesaic key`: a new API key, shown once, and what stands for it in the coordinators' file of keys.

use anyhow::Result;
use moesaic_coordinator::core::keys::{KEY_PREFIX, Keys, written_hash};

use crate::cli::{BadArguments, say};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Whose it is: in logs, metrics and refusals
    name: String,
    /// What it is good for: infer, watch, operate, or several of them
    #[arg(long, value_name = "SCOPE", value_delimiter = ',', default_value = "infer", value_parser = ["infer", "watch", "operate"])]
    scopes: Vec<String>,
    /// Requests that it may send a minute
    #[arg(long, value_name = "N")]
    requests_per_minute: Option<u32>,
    /// Tokens that it may have read and made a minute
    #[arg(long, value_name = "N")]
    tokens_per_minute: Option<u32>,
    /// Sequences that it may have at a time
    #[arg(long, value_name = "N")]
    sequences: Option<u32>,
}

pub fn run(args: &Args) -> Result<()> {
    // 244 bits of the operating system's randomness.
    let key = format!("{KEY_PREFIX}{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple());
    let hash = written_hash(&key);
    let mut entry = format!("[[keys]]\nname = {:?}\nsha256 = \"{hash}\"\nscopes = {:?}\n", args.name, args.scopes);
    let limits = [
        ("requests_per_minute", args.requests_per_minute),
        ("tokens_per_minute", args.tokens_per_minute),
        ("sequences", args.sequences),
    ];
    for (name, limit) in limits {
        entry.extend(limit.map(|limit| format!("{name} = {limit}\n")));
    }
    Keys::parse(&entry, &Keys::default()).map_err(|error| BadArguments(error.to_string()))?;
    eprintln!("The key, which is kept nowhere: {key}\n\nFor the coordinators' --keys file:\n");
    say(&entry);
    Ok(())
}
