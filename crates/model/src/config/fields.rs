//! One JSON object read field by field. What is wrong is noted, not returned, so that one pass finds all of it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::path::Path;
use std::rc::Rc;

use serde_json::Value;

use crate::ModelError;
use crate::json::Entries;

const SHOWN_CHARS_MAX: usize = 60;
/// As many tokens that end a sequence as a coordinator sends with each.
const TOKEN_IDS_MAX: usize = 16;

pub(super) struct Fields<'a> {
    file: &'a Path,
    /// "" or "rope_scaling." and the like.
    prefix: String,
    values: BTreeMap<String, Value>,
    problems: Rc<RefCell<Vec<ModelError>>>,
}

impl<'a> Fields<'a> {
    pub fn parse(file: &'a Path, text: &str) -> Result<Self, ModelError> {
        let entries: Entries<Value> = serde_json::from_str(text).map_err(|e| ModelError::file(file, e.to_string()))?;
        Ok(Self { file, prefix: String::new(), values: entries.0.into_iter().collect(), problems: Rc::default() })
    }

    pub fn is_right(&self) -> bool {
        self.problems.borrow().is_empty()
    }

    /// Each field once, the first thing that was wrong with it.
    pub fn into_problems(self) -> Vec<ModelError> {
        self.problems.take()
    }

    /// Present and not null.
    pub fn given(&self, name: &str) -> bool {
        self.value(name).is_some()
    }

    pub fn problem(&self, name: &str, expected: &str) {
        let field = format!("{}{name}", self.prefix);
        let mut problems = self.problems.borrow_mut();
        if problems.iter().any(|p| matches!(p, ModelError::Field { field: f, .. } if *f == field)) {
            return;
        }
        let value = self.value(name).map_or("missing".to_owned(), |v| shortened(&v.to_string()));
        problems.push(ModelError::Field { file: self.file.to_owned(), field, value, expected: expected.to_owned() });
    }

    pub fn count(&self, name: &str, range: RangeInclusive<usize>) -> usize {
        let value = self.value(name).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        value.filter(|n| range.contains(n)).unwrap_or_else(|| {
            self.problem(name, &format!("a whole number from {} to {}", range.start(), range.end()));
            *range.start()
        })
    }

    pub fn count_or(&self, name: &str, default: usize, range: RangeInclusive<usize>) -> usize {
        if self.given(name) { self.count(name, range) } else { default }
    }

    pub fn number(&self, name: &str, range: RangeInclusive<f64>) -> f64 {
        let value = self.value(name).and_then(Value::as_f64).filter(|x| range.contains(x));
        value.unwrap_or_else(|| {
            self.problem(name, &format!("a number from {} to {}", range.start(), range.end()));
            *range.start()
        })
    }

    pub fn number_or(&self, name: &str, default: f64, range: RangeInclusive<f64>) -> f64 {
        if self.given(name) { self.number(name, range) } else { default }
    }

    pub fn flag_or(&self, name: &str, default: bool) -> bool {
        match self.value(name) {
            None => default,
            Some(Value::Bool(flag)) => *flag,
            Some(_) => {
                self.problem(name, "true or false");
                default
            }
        }
    }

    /// The first choice stands for a wrong value.
    pub fn choice<T: Copy>(&self, name: &str, choices: &[(&str, T)], default: Option<T>) -> T {
        if let (None, Some(default)) = (self.value(name), default) {
            return default;
        }
        let value = self.value(name).and_then(Value::as_str);
        let found = choices.iter().find(|(word, _)| Some(*word) == value);
        found
            .unwrap_or_else(|| {
                let words: Vec<String> = choices.iter().map(|(word, _)| format!("{word:?}")).collect();
                self.problem(name, &words.join(" or "));
                &choices[0]
            })
            .1
    }

    /// An object inside this one; None if absent or null.
    pub fn section(&self, name: &str) -> Option<Fields<'a>> {
        let value = self.value(name)?;
        let Value::Object(values) = value else {
            self.problem(name, "an object or null");
            return None;
        };
        Some(Fields {
            file: self.file,
            prefix: format!("{}{name}.", self.prefix),
            values: values.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
            problems: Rc::clone(&self.problems),
        })
    }

    pub fn pair(&self, name: &str, range: RangeInclusive<usize>) -> [usize; 2] {
        let whole = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| range.contains(n));
        let values = self.value(name).and_then(Value::as_array).map(Vec::as_slice);
        if let Some([a, b]) = values
            && let (Some(a), Some(b)) = (whole(a), whole(b))
        {
            return [a, b];
        }
        self.problem(name, &format!("two whole numbers from {} to {}", range.start(), range.end()));
        [*range.start(); 2]
    }

    /// A token id, a list of them, or nothing.
    pub fn token_ids(&self, name: &str, vocab_size: usize) -> Vec<u32> {
        let values = match self.value(name) {
            None => return Vec::new(),
            Some(Value::Array(values)) => values.as_slice(),
            Some(value) => std::slice::from_ref(value),
        };
        let id = |v: &Value| v.as_u64().filter(|id| (*id as usize) < vocab_size).and_then(|id| u32::try_from(id).ok());
        let ids: Option<Vec<u32>> = values.iter().map(id).collect();
        ids.filter(|ids| ids.len() <= TOKEN_IDS_MAX).unwrap_or_else(|| {
            self.problem(name, &format!("at most {TOKEN_IDS_MAX} token ids below vocab_size, {vocab_size}"));
            Vec::new()
        })
    }

    fn value(&self, name: &str) -> Option<&Value> {
        self.values.get(name).filter(|v| !v.is_null())
    }
}

fn shortened(text: &str) -> String {
    if text.chars().count() <= SHOWN_CHARS_MAX {
        return text.to_owned();
    }
    text.chars().take(SHOWN_CHARS_MAX).chain("...".chars()).collect()
}
