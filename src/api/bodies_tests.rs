//! What the writes accept and refuse, without a node.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use proptest::prelude::*;

use super::*;

type Parse = fn(&[u8]) -> Result<Operation, Problem>;

const PARSERS: [Parse; 5] = [assertion, |body| batch(body, None), vote, epoch, supersession];

fn one(text: &str) -> NewAssertion {
    match assertion(text.as_bytes()).unwrap() {
        Operation::Assert(mut items) => items.remove(0),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_runbooks_assertion_is_taken() {
    let new = one(r#"{"concept_path": "test/disk", "predicate": "space_ok", "value": true}"#);
    assert_eq!((new.concept_path.as_str(), new.predicate.as_str()), ("test/disk", "space_ok"));
    assert_eq!(new.value_json, "true");
    assert_eq!(new.id.get_version_num(), 7);
}

#[test]
fn every_field_of_an_assertion_is_taken() {
    let new = one(r#"{"concept_path":"a/b","predicate":"p","value":{ "x" : [1, null] },"source":"s",
        "confidence":0.5,"epoch":"e","supersedes":"0198c0de-0000-7000-8000-000000000000",
        "valid_from":"2026-01-01T00:00:00Z","valid_to":1800000000000}"#);
    assert_eq!(new.value_json, r#"{"x":[1,null]}"#);
    assert_eq!(new.confidence, Some(0.5));
    assert_eq!(new.valid_from_ms, Some(1_767_225_600_000));
    assert_eq!(new.valid_to_ms, Some(1_800_000_000_000));
    assert!(new.supersedes.is_some());
    let null = one(r#"{"concept_path":"a","predicate":"p","value":null,"source":null,"epoch":null}"#);
    assert_eq!((null.value_json.as_str(), null.source, null.epoch), ("null", None, None));
}

#[test]
fn bad_assertions_are_422_and_name_the_field() {
    let with = |field: &str, value: &str| {
        let mut map = serde_json::json!({"concept_path": "a", "predicate": "p", "value": 1});
        map[field] = serde_json::from_str(value).unwrap();
        map.to_string()
    };
    let long_path = format!("\"{}\"", vec!["abcdefghi"; 200].join("/"));
    let long_name = format!("\"{}\"", "p".repeat(256));
    for (field, value) in [
        ("concept_path", "\"\""),
        ("concept_path", "\"/a\""),
        ("concept_path", "\"a/\""),
        ("concept_path", "\"a//b\""),
        ("concept_path", "\"a/../b\""),
        ("concept_path", "\"a/*\""),
        ("concept_path", "\"a\\u0000b\""),
        ("concept_path", "7"),
        ("concept_path", "null"),
        ("concept_path", &long_path),
        ("predicate", "\"\""),
        ("predicate", "\"a\\nb\""),
        ("predicate", &long_name),
        ("confidence", "1.5"),
        ("confidence", "-0.1"),
        ("confidence", "\"high\""),
        ("source", "[]"),
        ("supersedes", "\"not-an-id\""),
        ("valid_from", "\"yesterday\""),
        ("valid_from", "1.5"),
        ("valid_to", "9223372036854775807"),
    ] {
        let problem = assertion(with(field, value).as_bytes()).unwrap_err();
        assert_eq!(problem.status(), 422, "{field}={value}: {}", problem.detail());
        assert_eq!(problem.member("field").unwrap(), field, "{value}");
        let path_rule = field == "concept_path" && value.starts_with('"');
        assert_eq!(problem.kind() == Kind::InvalidPath, path_rule, "{field}={value}");
    }
    for missing in ["concept_path", "predicate", "value"] {
        let mut map = serde_json::json!({"concept_path": "a", "predicate": "p", "value": 1});
        map.as_object_mut().unwrap().remove(missing);
        let problem = assertion(map.to_string().as_bytes()).unwrap_err();
        assert_eq!((problem.status(), problem.member("field").unwrap()), (422, &missing.into()));
    }
}

#[test]
fn what_no_json_reader_takes_is_400() {
    for value in ["NaN", "Infinity", "0x1", "01", "'a'", "{\"a\":}", "[1,]", "\"\\x\"", ""] {
        let text = format!("{{\"concept_path\":\"a\",\"predicate\":\"p\",\"value\":{value}}}");
        let problem = assertion(text.as_bytes()).unwrap_err();
        assert_eq!(problem.kind(), Kind::MalformedJson, "{value}: {}", problem.detail());
    }
    let invalid_utf8 = b"{\"concept_path\":\"a\xff\",\"predicate\":\"p\",\"value\":1}";
    assert_eq!(assertion(invalid_utf8).unwrap_err().kind(), Kind::MalformedJson);
    let invalid_utf8 = b"{\"concept_path\":\"a\",\"predicate\":\"p\",\"value\":\"\xff\"}";
    assert_eq!(assertion(invalid_utf8).unwrap_err().kind(), Kind::MalformedJson);
}

#[test]
fn votes_epochs_and_supersessions_are_checked() {
    let id = "0198c0de-0000-7000-8000-000000000000";
    let ok = format!(r#"{{"assertion_id":"{id}","voter":"v","weight":-1,"reason":"r"}}"#);
    assert!(matches!(vote(ok.as_bytes()), Ok(Operation::Vote(_))));
    for (bad, field) in [
        (format!(r#"{{"assertion_id":"{id}","voter":"v","weight":1.01}}"#), "weight"),
        (format!(r#"{{"assertion_id":"{id}","voter":"","weight":1}}"#), "voter"),
        (r#"{"assertion_id":"x","voter":"v","weight":1}"#.to_string(), "assertion_id"),
        (format!(r#"{{"assertion_id":"{id}","voter":"v"}}"#), "weight"),
    ] {
        assert_eq!(vote(bad.as_bytes()).unwrap_err().member("field").unwrap(), field, "{bad}");
    }
    assert!(matches!(epoch(br#"{"name":"e","supersedes":"d"}"#), Ok(Operation::Epoch(_))));
    assert_eq!(epoch(b"").unwrap_err().member("field").unwrap(), "name");
    assert_eq!(epoch(br#"{"name":""}"#).unwrap_err().member("field").unwrap(), "name");
    let retract = format!(r#"{{"old":"{id}"}}"#);
    assert!(matches!(supersession(retract.as_bytes()), Ok(Operation::Supersede(_))));
    let same = format!(r#"{{"old":"{id}","new":"{id}"}}"#);
    assert_eq!(supersession(same.as_bytes()).unwrap_err().status(), 422);
}

#[test]
fn batches_are_refused_whole_and_name_the_item() {
    let good = r#"{"concept_path":"a","predicate":"p","value":1}"#;
    let bad = r#"{"concept_path":"a","predicate":"p","value":1,"confidence":2}"#;
    for text in [format!("[{good},{bad}]"), format!("{good}\n{bad}\n")] {
        let problem = batch(text.as_bytes(), None).unwrap_err();
        assert_eq!(problem.status(), 422);
        assert_eq!(problem.member("item").unwrap(), 1);
        assert_eq!(problem.member("field").unwrap(), "confidence");
    }
    for text in ["", " \n", "[]"] {
        assert_eq!(batch(text.as_bytes(), None).unwrap_err().kind(), Kind::EmptyBatch);
    }
    let items = format!("{good}\n").repeat(10_000);
    assert!(batch(items.as_bytes(), None).is_ok());
    let problem = batch(format!("{items}{good}\n{good}").as_bytes(), None).unwrap_err();
    assert_eq!(problem.kind(), Kind::TooManyItems);
    assert_eq!(problem.member("limit").unwrap(), 10_000);
    assert_eq!(problem.member("actual").unwrap(), 10_002);
}

#[test]
fn a_chunk_of_an_import_counts_its_items() {
    let item = r#"{"concept_path":"a","predicate":"p","value":1}"#;
    let import = |position_before| Some(Import { id: "i".into(), position_before });
    match batch(format!("{item}\n{item}").as_bytes(), import(5)).unwrap() {
        Operation::ImportChunk { import_id, position_before, position_after, assertions } => {
            assert_eq!((import_id.as_str(), position_before, position_after), ("i", 5, 7));
            assert_eq!(assertions.len(), 2);
        }
        other => panic!("{other:?}"),
    }
    let problem = batch(item.as_bytes(), import(u64::MAX)).unwrap_err();
    assert_eq!(problem.kind(), Kind::InvalidHeader);
}

#[test]
fn the_document_names_the_fields_that_are_read() {
    let json: serde_json::Value = serde_json::from_slice(&crate::api::openapi::document_json()).unwrap();
    for (schema, names, required) in [
        ("Assert", AssertBody::NAMES, AssertBody::REQUIRED),
        ("Vote", VoteBody::NAMES, VoteBody::REQUIRED),
        ("Epoch", EpochBody::NAMES, EpochBody::REQUIRED),
        ("Supersede", SupersedeBody::NAMES, SupersedeBody::REQUIRED),
    ] {
        let schema = &json["components"]["schemas"][schema];
        let mut described: Vec<_> = schema["properties"].as_object().unwrap().keys().map(String::as_str).collect();
        let mut read = names.to_vec();
        described.sort_unstable();
        read.sort_unstable();
        assert_eq!(described, read);
        let mut needed: Vec<_> = schema["required"].as_array().unwrap().iter().filter_map(|n| n.as_str()).collect();
        needed.sort_unstable();
        let mut wanted = names[..required].to_vec();
        wanted.sort_unstable();
        assert_eq!(needed, wanted);
    }
}

#[test]
fn nesting_of_any_depth_is_answered() {
    let deep = format!("{}1{}", "[".repeat(500_000), "]".repeat(500_000));
    let value = format!("{{\"concept_path\":\"a\",\"predicate\":\"p\",\"value\":{deep}}}");
    assert_eq!(assertion(value.as_bytes()).unwrap_err().member("field").unwrap(), "value");
    for parse in PARSERS {
        let status = parse(deep.as_bytes()).unwrap_err().status();
        assert!(status == 400 || status == 422);
        let status = parse(format!("{{\"name\":{deep}}}").as_bytes()).unwrap_err().status();
        assert!(status == 400 || status == 422);
    }
}

/// Fragments that meet in bodies, so that random texts come close to valid ones.
fn fragment() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("{".to_string()),
        Just("}".to_string()),
        Just("[".to_string()),
        Just("]".to_string()),
        Just(":".to_string()),
        Just(",".to_string()),
        Just("\n".to_string()),
        Just("null".to_string()),
        Just("\"0198c0de-0000-7000-8000-000000000000\"".to_string()),
        prop::sample::select(AssertBody::NAMES).prop_map(|name| format!("\"{name}\":")),
        prop::sample::select(VoteBody::NAMES).prop_map(|name| format!("\"{name}\":")),
        any::<f64>().prop_map(|number| format!("{number:e}")),
        any::<i64>().prop_map(|number| number.to_string()),
        "\"[a-z/*.\\\\\"]{0,9}\"",
        ".{0,5}",
    ]
}

proptest! {
    #[test]
    fn random_bytes_are_refused_and_never_the_nodes_fault(
        body in prop::collection::vec(any::<u8>(), 0..80),
    ) {
        for parse in PARSERS {
            if let Err(problem) = parse(&body) {
                prop_assert!((400..500).contains(&problem.status()), "{}", problem.detail());
            }
        }
    }

    #[test]
    fn nearly_valid_bodies_are_refused_and_never_the_nodes_fault(
        parts in prop::collection::vec(fragment(), 0..24),
    ) {
        let body = parts.concat();
        for parse in PARSERS {
            if let Err(problem) = parse(body.as_bytes()) {
                prop_assert!((400..500).contains(&problem.status()), "{}", problem.detail());
            }
        }
    }

    #[test]
    fn a_cut_assertion_is_400_at_every_length(cut in 0..60_usize) {
        let whole = br#"{"concept_path":"a/b","predicate":"p","value":{"x":[1,2.5]}}"#;
        if let Some(body) = whole.get(1..whole.len() - 1).and_then(|_| whole.get(..cut.min(whole.len() - 1))) {
            let problem = assertion(body).unwrap_err();
            prop_assert_eq!(problem.status(), if body.is_empty() { 422 } else { 400 });
        }
    }
}
