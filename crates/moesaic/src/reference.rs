//! `moesaic reference`: docs/configuration.md, made from the roles' flags and defaults, so that it cannot say anything else.

use std::fmt::Write as _;

use clap::Command;
use serde::Serialize;
use serde_json::Value;

const HEAD: &str = "\
# Configuration

Made from the code by `moesaic reference`. A setting is a flag of `moesaic ROLE`, a variable of the environment, or a line of the TOML file that
`--config FILE` names; flags count more than variables, variables more than the file. A key that is unknown is an error.
";

/// The page, in Markdown.
pub fn configuration() -> String {
    let mut text = HEAD.to_owned();
    role::<moesaic_coordinator::Flags>(&mut text, "coordinator", &moesaic_coordinator::Config::default());
    role::<moesaic_attention_worker::Flags>(
        &mut text,
        "attention-worker",
        &moesaic_attention_worker::Config::default(),
    );
    role::<moesaic_expert_worker::Flags>(&mut text, "expert-worker", &moesaic_expert_worker::Config::default());
    text
}

fn role<F: clap::Args>(text: &mut String, name: &str, defaults: &impl Serialize) {
    let defaults = serde_json::to_value(defaults).expect("a config is plain data");
    let command = F::augment_args(Command::new("role"));
    // Writing to a String cannot fail.
    let _ = writeln!(text, "\n## {name}\n\n| setting | variable | default | what it is |\n|---|---|---|---|");
    for argument in command.get_arguments() {
        let key = argument.get_id().as_str();
        let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
        let variable = format!("MOESAIC_{}", key.to_uppercase());
        let default = default(key, &defaults[key]);
        let _ = writeln!(text, "| `{key}` | `{variable}` | {default} | {} |", help.replace('|', "\\|"));
    }
}

fn default(key: &str, value: &Value) -> String {
    match value {
        // Else the page would depend on the machine that made it.
        _ if key == "threads" => "all cores".into(),
        Value::Null => "-".into(),
        Value::String(text) if text.is_empty() => "-".into(),
        Value::String(text) => format!("`{text}`"),
        other => format!("`{other}`"),
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

    /// Every setting of a config can be given as a flag, and every flag is a setting and says what it is.
    #[test]
    fn every_setting_is_there() {
        fn check<F: clap::Args>(defaults: &impl Serialize) {
            let Value::Object(defaults) = serde_json::to_value(defaults).unwrap() else { panic!("no struct") };
            let command = F::augment_args(Command::new("role"));
            let flags: Vec<_> = command.get_arguments().map(|argument| argument.get_id().to_string()).collect();
            let mut settings: Vec<_> = defaults.keys().cloned().collect();
            settings.sort();
            let mut sorted = flags.clone();
            sorted.sort();
            assert_eq!(sorted, settings);
            let silent = command.get_arguments().find(|argument| argument.get_help().is_none());
            assert!(silent.is_none(), "{silent:?} does not say what it is");
        }
        check::<moesaic_coordinator::Flags>(&moesaic_coordinator::Config::default());
        check::<moesaic_attention_worker::Flags>(&moesaic_attention_worker::Config::default());
        check::<moesaic_expert_worker::Flags>(&moesaic_expert_worker::Config::default());
    }
}
