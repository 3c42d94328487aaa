//! `moesaic reference`: docs/configuration.md, made from the roles' flags and defaults, so that it cannot say anything else.

use std::fmt::Write as _;

use clap::{Arg, Command};
use moesaic_node::config::variable;

const HEAD: &str = "\
# Configuration

Made from the code by `moesaic reference`. A setting is a flag of `moesaic ROLE`, a variable of the environment, or a line of the TOML file that
`--config FILE` names; flags count more than variables, variables more than the file. A key that is unknown is an error.
";

/// The page, in Markdown.
pub fn configuration() -> String {
    let mut text = HEAD.to_owned();
    role::<moesaic_coordinator::Config>(&mut text, "coordinator");
    role::<moesaic_attention_worker::Config>(&mut text, "attention-worker");
    role::<moesaic_expert_worker::Config>(&mut text, "expert-worker");
    text
}

fn role<C: clap::Args>(text: &mut String, name: &str) {
    let command = C::augment_args(Command::new("role"));
    // Writing to a String cannot fail.
    let _ = writeln!(text, "\n## {name}\n\n| setting | variable | default | what it is |\n|---|---|---|---|");
    for argument in command.get_arguments() {
        let key = argument.get_id().as_str();
        let help = argument.get_help().map(ToString::to_string).unwrap_or_default().replace('|', "\\|");
        let _ = writeln!(text, "| `{key}` | `{}` | {} | {help} |", variable(key), default(argument));
    }
}

fn default(argument: &Arg) -> String {
    match argument.get_default_values() {
        // Else the page would depend on the machine that made it.
        _ if argument.get_id() == "threads" => "all cores".into(),
        [value] => format!("`{}`", value.display()),
        _ => "-".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_current() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/configuration.md");
        let page = std::fs::read_to_string(path).unwrap_or_default();
        assert!(page == configuration(), "docs/configuration.md: run `moesaic reference > docs/configuration.md`");
    }

    #[test]
    fn every_setting_says_what_it_is() {
        let silent: Vec<_> = configuration().lines().filter(|line| line.ends_with("|  |")).map(str::to_owned).collect();
        assert_eq!(silent, [""; 0]);
    }
}
