//! Chat templates: what the public ones render to, and what hostile ones may not do.

use super::*;
use crate::text::tokenizer::fixtures::folder;

fn message(role: &str, content: &str) -> Message {
    Message { role: role.into(), content: content.into(), name: None, reasoning_content: None }
}

fn render(source: &str) -> Result<String, TemplateError> {
    let template = ChatTemplate::new(source.into(), "<s>".into(), "</s>".into())
        .map_err(|e| TemplateError::Refused(e.to_string()))?;
    template.render(&[message("user", "hi <b>\"")], &serde_json::Map::new())
}

fn open(config: &str) -> Result<Option<ChatTemplate>, TemplateError> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
    ChatTemplate::open(dir.path())
}

#[test]
fn renders_the_demo_models_conversation() {
    let template = ChatTemplate::open(&folder()).unwrap().unwrap();
    let messages = [
        message("system", "Be brief."),
        message("user", "1+1="),
        message("assistant", "<think>\nx\n</think>2"),
        message("user", "2+2="),
    ];
    let expected = "<｜begin▁of▁sentence｜>Be brief.<｜User｜>1+1=<｜Assistant｜>2<｜end▁of▁sentence｜>\
                    <｜User｜>2+2=<｜Assistant｜>";
    assert_eq!(template.render(&messages, &serde_json::Map::new()).unwrap(), expected);
}

#[test]
fn templates_find_the_helpers_that_they_expect() {
    let table = [
        ("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}", "<s>hi <b>\"</s>"),
        ("{{ messages | tojson }}", r#"[{"role": "user", "content": "hi <b>\""}]"#),
        ("{{ {'a': [1, {}], 'é': none} | tojson(indent=2) }}", "{\n  \"a\": [\n    1,\n    {}\n  ],\n  \"é\": null\n}"),
        ("{{ strftime_now('%Y')[:2] }}", "20"),
        ("{{ ' a,b '.strip().split(',')[-1] }}", "b"),
        ("  {% if tools %}\n  {% else %}\n x\n  {% endif %}\n", " x\n"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}{{ missing }}", "2"),
        ("{% if add_generation_prompt is defined and add_generation_prompt %}go{% endif %}", "go"),
    ];
    for (source, expected) in table {
        assert_eq!(render(source).unwrap(), expected, "{source}");
    }
}

#[test]
fn a_template_has_its_limits() {
    let table = [
        ("{{ raise_exception('no system, please') }}", "no system, please"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "fuel"),
        ("{% for i in range(9999) %}{{ 'x' * 1000 }}{% endfor %}", "more than 8388608 bytes"),
    ];
    for (source, expected) in table {
        let error = render(source).unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
    }
}

#[test]
fn a_broken_template_is_found_at_start_and_named() {
    let table = [
        (
            r#"{"chat_template": "{% if x %}"}"#,
            "tokenizer_config.json: field chat_template: the chat template is broken",
        ),
        (r#"{"chat_template": "{{ messages | nonsense }}"}"#, "nonsense"),
        (r#"{"chat_template": "{{ nonsense(1) }}"}"#, "the chat template is broken"),
        (r#"{"chat_template": 7}"#, "expected a string or a list"),
        (r#"{"chat_template": [{"name": "default"}]}"#, "expected a list of {name, template}"),
        (r#"{"chat_template": "#, "tokenizer_config.json: EOF"),
    ];
    for (config, expected) in table {
        let error = open(config).unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
    }
}

#[test]
fn finds_the_template_wherever_the_folder_has_it() {
    let rendered = |template: Option<ChatTemplate>| {
        template.unwrap().render(&[message("user", "x")], &serde_json::Map::new()).unwrap()
    };
    let named = r#"{"bos_token": {"content": "B"}, "chat_template":
        [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }}yes"}]}"#;
    assert_eq!(rendered(open(named).unwrap()), "Byes");
    assert!(open("{}").unwrap().is_none());
    assert!(open(r#"{"chat_template": "{{ raise_exception('needs a system message') }}"}"#).unwrap().is_some());

    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), "{{ messages[0].content }}!").unwrap();
    assert_eq!(rendered(ChatTemplate::open(dir.path()).unwrap()), "x!");
}
