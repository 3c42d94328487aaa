//! The TOML file of each role.

use std::fmt::Display;

use moesaic_attention_worker as attention_worker;
use moesaic_coordinator as coordinator;
use moesaic_expert_worker as expert_worker;
use moesaic_node::config::load;

use super::checks::{Folder, check_error};

thread_local! {
    static FOLDER: Folder = Folder::new(&[]);
}

/// The first byte is the role, the rest is its file.
pub fn role_config(data: &[u8]) {
    let Some((role, text)) = data.split_first() else { return };
    match role % 3 {
        0 => read(text, coordinator::Config::validate),
        1 => read(text, attention_worker::Config::validate),
        _ => read(text, expert_worker::Config::validate),
    }
}

fn read<C: clap::Args, E: Display>(text: &[u8], validate: impl Fn(&C) -> Result<(), E>) {
    FOLDER.with(|folder| {
        folder.put("role.toml", text);
        match load::<C>(Some(&folder.path("role.toml")), []) {
            Err(error) => check_error(error),
            Ok(config) => drop(validate(&config).map_err(check_error)),
        }
    });
}
