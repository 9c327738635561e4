//! Reading request bodies: JSON objects with known fields, read strictly.
//!
//! Each body type lists its fields once. Reading refuses unknown and repeated fields, arrays where
//! an object belongs (serde's derived readers would take them), and wrong types, and it knows at
//! every moment which field of which item it is in, so that the answer can name it. It costs one
//! pass and no allocation beyond the values kept.

use std::{
    cell::{Cell, RefCell},
    fmt,
    marker::PhantomData,
};

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::problem::{Kind, Problem};

/// A body, or an item of a batch, that is read field by field.
pub trait Fields<'de>: Default {
    /// What it is, with its article: `an assertion`.
    const WHAT: &'static str;
    /// The accepted fields; at most 32.
    const NAMES: &'static [&'static str];
    /// How many of them, from the first, must be there.
    const REQUIRED: usize;
    /// Reads the value of `NAMES[field]`.
    fn read<A: MapAccess<'de>>(&mut self, field: usize, map: &mut A) -> Result<(), A::Error>;
}

/// Where the reader is, and what it met that serde's error cannot carry.
#[derive(Default)]
struct Trace {
    item: Cell<Option<usize>>,
    field: Cell<Option<&'static str>>,
    defect: RefCell<Option<Defect>>,
}

enum Defect {
    Unknown { name: String, what: &'static str, accepted: &'static [&'static str] },
    Repeated { name: &'static str },
    Missing { name: &'static str, what: &'static str },
}

/// How much of an unknown field's name is repeated to its sender, in characters.
const NAME_ECHO_CHARS_MAX: usize = 64;

impl Trace {
    fn fail<E: serde::de::Error>(&self, defect: Defect) -> E {
        *self.defect.borrow_mut() = Some(defect);
        E::custom("refused")
    }

    /// The problem for `error`. `line_offset` counts the lines before this text (NDJSON).
    fn problem(self, error: &serde_json::Error, line_offset: usize) -> Problem {
        let (line, column) = (error.line().saturating_add(line_offset), error.column());
        let item = self.item.get();
        let problem = match self.defect.into_inner() {
            Some(Defect::Unknown { name, what, accepted }) => {
                let list = accepted.join(", ");
                let detail = format!("Field \"{name}\" is unknown. {what} takes: {list}.");
                Problem::new(Kind::UnknownField, detail).with("field", name).with("accepted", list)
            }
            Some(Defect::Repeated { name }) => {
                let detail = format!("Field \"{name}\" is given twice. Give it once.");
                Problem::new(Kind::InvalidField, detail).with("field", name)
            }
            Some(Defect::Missing { name, what }) => {
                let detail = format!("Field \"{name}\" is missing. {what} needs it.");
                Problem::new(Kind::InvalidField, detail).with("field", name)
            }
            None => self
                .field
                .get()
                .map_or_else(|| plain_problem(error, line, column), |field| field_problem(error, field, line, column)),
        };
        let problem = problem.with("line", line).with("column", column);
        match item {
            Some(item) => problem.in_context(&format!("Item {item}: ")).with("item", item),
            None => problem,
        }
    }
}

/// What serde_json says, without the position that it appends.
fn message(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let end = text.rfind(" at line ").unwrap_or(text.len());
    text.get(..end).unwrap_or(&text).to_string()
}

fn plain_problem(error: &serde_json::Error, line: usize, column: usize) -> Problem {
    let what = message(error);
    if error.is_data() {
        let detail = format!("At line {line}, column {column}: {what}.");
        Problem::new(Kind::InvalidField, detail)
    } else {
        let detail = format!("The JSON breaks at line {line}, column {column}: {what}.");
        Problem::new(Kind::MalformedJson, detail)
    }
}

fn field_problem(error: &serde_json::Error, field: &'static str, line: usize, column: usize) -> Problem {
    let what = message(error);
    // A number that does not fit is well-formed JSON, although serde_json calls it syntax.
    if error.is_data() || what.starts_with("number out of range") {
        let detail = format!("Field \"{field}\": {what}, at line {line}, column {column}.");
        Problem::new(Kind::InvalidField, detail).with("field", field)
    } else {
        plain_problem(error, line, column)
    }
}

/// Reads one object that fills `text`; nothing but white space is the empty object.
pub fn parse_object<'de, B: Fields<'de>>(text: &'de [u8]) -> Result<B, Problem> {
    let text = if text.iter().all(u8::is_ascii_whitespace) { b"{}".as_slice() } else { text };
    parse_one(text, Trace::default(), 0)
}

fn parse_one<'de, B: Fields<'de>>(text: &'de [u8], trace: Trace, line_offset: usize) -> Result<B, Problem> {
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let read = Object::<B>(&trace, PhantomData).deserialize(&mut deserializer).and_then(|body| {
        trace.field.set(None);
        deserializer.end().map(|()| body)
    });
    read.map_err(|error| trace.problem(&error, line_offset))
}

/// Reads the items of a batch: a JSON array, or one object per line (NDJSON; empty lines are
/// skipped). Items past `items_max` are counted and not kept, so that a refusal can say how many
/// there were; the second value is that count.
pub fn parse_items<'de, B: Fields<'de>>(text: &'de [u8], items_max: usize) -> Result<(Vec<B>, usize), Problem> {
    match text.iter().find(|byte| !byte.is_ascii_whitespace()) {
        None => Ok((Vec::new(), 0)),
        Some(b'[') => parse_array(text, items_max),
        Some(_) => parse_lines(text, items_max),
    }
}

fn parse_array<'de, B: Fields<'de>>(text: &'de [u8], items_max: usize) -> Result<(Vec<B>, usize), Problem> {
    let trace = Trace::default();
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let items = Items::<B> { trace: &trace, items_max, kind: PhantomData };
    let read = (&mut deserializer).deserialize_seq(items).and_then(|items| {
        trace.item.set(None);
        trace.field.set(None);
        deserializer.end().map(|()| items)
    });
    read.map_err(|error| trace.problem(&error, 0))
}

fn parse_lines<'de, B: Fields<'de>>(text: &'de [u8], items_max: usize) -> Result<(Vec<B>, usize), Problem> {
    let mut items = Vec::new();
    let mut count = 0_usize;
    for (line_offset, line) in text.split(|byte| *byte == b'\n').enumerate() {
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        if count < items_max {
            let trace = Trace { item: Cell::new(Some(count)), ..Trace::default() };
            items.push(parse_one(line, trace, line_offset)?);
        }
        count = count.saturating_add(1);
    }
    Ok((items, count))
}

/// Reads one object into `B`.
struct Object<'t, B>(&'t Trace, PhantomData<B>);

impl<'de, B: Fields<'de>> DeserializeSeed<'de> for Object<'_, B> {
    type Value = B;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<B, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, B: Fields<'de>> Visitor<'de> for Object<'_, B> {
    type Value = B;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} as a JSON object", B::WHAT)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<B, A::Error> {
        let Object(trace, _) = self;
        let mut body = B::default();
        let mut seen = 0_u32;
        trace.field.set(None);
        while let Some(key) = map.next_key_seed(FieldName(B::NAMES))? {
            let field = match key {
                Ok(field) => field,
                Err(name) => {
                    let defect = Defect::Unknown { name, what: B::WHAT, accepted: B::NAMES };
                    return Err(trace.fail(defect));
                }
            };
            let name = B::NAMES.get(field).copied().unwrap_or_default();
            let bit = 1_u32 << field;
            if seen & bit != 0 {
                return Err(trace.fail(Defect::Repeated { name }));
            }
            seen |= bit;
            trace.field.set(Some(name));
            body.read(field, &mut map)?;
            trace.field.set(None);
        }
        for (field, name) in B::NAMES.iter().enumerate().take(B::REQUIRED) {
            if seen & (1_u32 << field) == 0 {
                return Err(trace.fail(Defect::Missing { name, what: B::WHAT }));
            }
        }
        Ok(body)
    }
}

/// Finds a key among the names, without copying it; an unknown one comes back shortened.
struct FieldName(&'static [&'static str]);

impl<'de> DeserializeSeed<'de> for FieldName {
    type Value = Result<usize, String>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for FieldName {
    type Value = Result<usize, String>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field name")
    }
    fn visit_str<E: serde::de::Error>(self, key: &str) -> Result<Self::Value, E> {
        let found = self.0.iter().position(|name| *name == key);
        Ok(found.ok_or_else(|| key.chars().take(NAME_ECHO_CHARS_MAX).collect()))
    }
}

/// Reads an array of objects, keeping at most `items_max`.
struct Items<'t, B> {
    trace: &'t Trace,
    items_max: usize,
    kind: PhantomData<B>,
}

impl<'de, B: Fields<'de>> Visitor<'de> for Items<'_, B> {
    type Value = (Vec<B>, usize);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut items = Vec::new();
        let mut count = 0_usize;
        loop {
            self.trace.item.set(Some(count));
            if count < self.items_max {
                match seq.next_element_seed(Object::<B>(self.trace, PhantomData))? {
                    Some(item) => items.push(item),
                    None => break,
                }
            } else if seq.next_element::<IgnoredAny>()?.is_none() {
                break;
            }
            count = count.saturating_add(1);
        }
        Ok((items, count))
    }
}

/// A point in time in a body: RFC 3339 text or Unix milliseconds. Kept as Unix milliseconds.
pub struct TimeMs(pub i64);

impl<'de> serde::Deserialize<'de> for TimeMs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TimeVisitor;
        impl Visitor<'_> for TimeVisitor {
            type Value = TimeMs;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an RFC 3339 time or Unix milliseconds")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<TimeMs, E> {
                super::time::parse_rfc3339(text).map(TimeMs).map_err(E::custom)
            }
            fn visit_i64<E: serde::de::Error>(self, ms: i64) -> Result<TimeMs, E> {
                super::time::check_unix_ms(ms).map(TimeMs).map_err(E::custom)
            }
            fn visit_u64<E: serde::de::Error>(self, ms: u64) -> Result<TimeMs, E> {
                let ms = i64::try_from(ms).unwrap_or(i64::MAX);
                super::time::check_unix_ms(ms).map(TimeMs).map_err(E::custom)
            }
        }
        deserializer.deserialize_any(TimeVisitor)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[derive(Default, Debug, PartialEq)]
    struct Pair {
        name: String,
        weight: Option<f64>,
    }

    impl<'de> Fields<'de> for Pair {
        const WHAT: &'static str = "A pair";
        const NAMES: &'static [&'static str] = &["name", "weight"];
        const REQUIRED: usize = 1;
        fn read<A: MapAccess<'de>>(&mut self, field: usize, map: &mut A) -> Result<(), A::Error> {
            match field {
                0 => self.name = map.next_value()?,
                _ => self.weight = map.next_value()?,
            }
            Ok(())
        }
    }

    fn refused(text: &str) -> Problem {
        parse_object::<Pair>(text.as_bytes()).unwrap_err()
    }

    #[test]
    fn an_object_is_read_and_null_leaves_an_optional_field_empty() {
        let pair = parse_object::<Pair>(br#" {"weight":null,"name":"a\u0041"} "#).unwrap();
        assert_eq!(pair, Pair { name: "aA".into(), weight: None });
    }

    #[test]
    fn what_is_not_json_is_400_with_line_and_column() {
        for text in
            ["{", "{\"name\":}", "{\n \"name\": nope}", "{\"name\":\"a\"} {}", "{\"name\":\"a\"}x", "\u{feff}{}"]
        {
            let problem = refused(text);
            assert_eq!(problem.kind(), Kind::MalformedJson, "{text}: {}", problem.detail());
            assert!(problem.member("line").is_some() && problem.member("column").is_some());
        }
        assert_eq!(refused("{\n \"name\": nope}").member("line").unwrap(), 2);
    }

    #[test]
    fn what_is_json_but_wrong_is_422_with_the_field() {
        for (text, field) in [
            ("", "name"),
            ("{}", "name"),
            ("{\"weight\":1}", "name"),
            ("{\"name\":5}", "name"),
            ("{\"name\":null}", "name"),
            ("{\"name\":\"a\",\"weight\":\"b\"}", "weight"),
            ("{\"name\":\"a\",\"weight\":1e999}", "weight"),
            ("{\"name\":\"a\",\"name\":\"b\"}", "name"),
        ] {
            let problem = refused(text);
            assert_eq!(problem.kind(), Kind::InvalidField, "{text}: {}", problem.detail());
            assert_eq!(problem.member("field").unwrap(), field, "{text}");
        }
        let unknown = refused("{\"nam\":1}");
        assert_eq!(unknown.kind(), Kind::UnknownField);
        assert_eq!(unknown.member("accepted").unwrap(), "name, weight");
        assert_eq!(refused("[\"a\",1]").kind(), Kind::InvalidField);
        assert_eq!(refused("5").kind(), Kind::InvalidField);
    }

    #[test]
    fn arrays_and_lines_give_the_same_items() {
        let array = br#" [{"name":"a"}, {"name":"b","weight":2}]"#;
        let lines = b"{\"name\":\"a\"}\r\n\n{\"name\":\"b\",\"weight\":2}\n";
        let (from_array, a) = parse_items::<Pair>(array, 10).unwrap();
        let (from_lines, b) = parse_items::<Pair>(lines, 10).unwrap();
        assert_eq!((a, b), (2, 2));
        assert_eq!(from_array, from_lines);
        assert_eq!(parse_items::<Pair>(b" \n", 10).unwrap().1, 0);
        assert_eq!(parse_items::<Pair>(b"[]", 10).unwrap().1, 0);
    }

    #[test]
    fn items_past_the_limit_are_counted_and_not_kept() {
        let text = format!("[{}]", ["{\"name\":\"a\"}"; 7].join(","));
        let (items, count) = parse_items::<Pair>(text.as_bytes(), 3).unwrap();
        assert_eq!((items.len(), count), (3, 7));
        let text = "{\"name\":\"a\"}\n".repeat(7);
        let (items, count) = parse_items::<Pair>(text.as_bytes(), 3).unwrap();
        assert_eq!((items.len(), count), (3, 7));
    }

    #[test]
    fn a_bad_item_is_named() {
        let problem = parse_items::<Pair>(b"[{\"name\":\"a\"},[\"b\"]]", 10).unwrap_err();
        assert_eq!(problem.member("item").unwrap(), 1);
        let problem = parse_items::<Pair>(b"{\"name\":\"a\"}\n\n{\"nam\":1}", 10).unwrap_err();
        assert_eq!(problem.member("item").unwrap(), 1);
        assert_eq!(problem.member("line").unwrap(), 3);
        assert!(problem.detail().starts_with("Item 1: "), "{}", problem.detail());
    }
}
