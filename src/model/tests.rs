//! Every limit of the data model: the largest that passes and the smallest that does not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use uuid::Uuid;

use super::path::{PATH_BYTES_MAX, SEGMENT_BYTES_MAX, parse_query, validate as validate_path};
use super::resolve::{Standing, compare};
use super::validate::*;
use super::value::{VALUE_BYTES_MAX, VALUE_DEPTH_MAX, compact};
use super::*;

fn assertion() -> NewAssertion {
    NewAssertion {
        id: Uuid::from_u128(1),
        concept_path: "debian/net/curl".into(),
        predicate: "version".into(),
        value_json: "\"8.5\"".into(),
        source: None,
        confidence: None,
        epoch: None,
        supersedes: None,
        valid_from_ms: None,
        valid_to_ms: None,
    }
}

fn fault(change: impl FnOnce(&mut NewAssertion)) -> Option<String> {
    let mut changed = assertion();
    change(&mut changed);
    validate_assertion(&changed).err().map(|invalid| invalid.to_string())
}

fn says(fault: Option<String>, words: &str) {
    let fault = fault.unwrap_or_else(|| panic!("accepted; expected: {words}"));
    assert!(fault.contains(words), "{fault:?} does not say {words:?}");
}

#[test]
fn paths() {
    for good in ["a", "debian/net/curl", "ünï/..x/x..", "a b/c", &"a".repeat(255), "...", "/a".trim_start_matches('/')]
    {
        assert_eq!(validate_path(good), Ok(()), "{good}");
    }
    let segment = "s".repeat(SEGMENT_BYTES_MAX);
    let longest = ["s".repeat(204).as_str(); 5].join("/");
    assert_eq!(longest.len(), PATH_BYTES_MAX);
    assert_eq!(validate_path(&longest), Ok(()));
    for (bad, words) in [
        ("", "empty"),
        ("/a", "starts or ends"),
        ("a/", "starts or ends"),
        ("/", "starts or ends"),
        ("a//b", "empty segment"),
        ("a/./b", "segment `.`"),
        ("..", "segment `..`"),
        ("a/*", "reserved"),
        ("a*b", "reserved"),
        ("a/**", "reserved"),
        ("a\0b", "U+0000"),
        ("a\u{7f}", "U+007F"),
        ("a\nb", "U+000A"),
        ("a\u{85}", "U+0085"),
        (&format!("{segment}s"), "a segment of it has 256 bytes, the limit is 255"),
        (&format!("{longest}/"), "it has 1025 bytes, the limit is 1024"),
    ] {
        says(validate_path(bad).err().map(|e| e.to_string()), words);
    }
}

#[test]
fn query_paths() {
    assert_eq!(parse_query("a/b"), Ok(("a/b", false)));
    assert_eq!(parse_query("a/b/**"), Ok(("a/b", true)));
    for bad in ["/**", "**", "a/*", "a/**/b", "", "a/**/**"] {
        assert!(parse_query(bad).is_err(), "{bad}");
    }
}

#[test]
fn assertions() {
    assert_eq!(fault(|_| {}), None);
    says(fault(|a| a.concept_path.clear()), "`concept_path` is empty");
    says(fault(|a| a.predicate.clear()), "`predicate` is empty");
    assert_eq!(fault(|a| a.predicate = "p".repeat(255)), None);
    says(fault(|a| a.predicate = "p".repeat(256)), "has 256 bytes, the limit is 255");
    says(fault(|a| a.predicate = "a\tb".into()), "U+0009");
    assert_eq!(fault(|a| a.confidence = Some(0.0)), None);
    assert_eq!(fault(|a| a.confidence = Some(1.0)), None);
    for confidence in [-0.01, 1.01, f64::NAN, f64::INFINITY] {
        says(fault(|a| a.confidence = Some(confidence)), "between 0 and 1");
    }
    assert_eq!(fault(|a| a.source = Some("s".repeat(SOURCE_BYTES_MAX))), None);
    says(fault(|a| a.source = Some("s".repeat(SOURCE_BYTES_MAX + 1))), "`source`");
    says(fault(|a| a.epoch = Some(String::new())), "`epoch` is empty");
    says(fault(|a| a.epoch = Some("e".repeat(256))), "the limit is 255");
    says(fault(|a| a.supersedes = Some(a.id)), "names the assertion itself");
    assert_eq!(fault(|a| (a.valid_from_ms, a.valid_to_ms) = (Some(1), Some(2))), None);
    says(fault(|a| (a.valid_from_ms, a.valid_to_ms) = (Some(2), Some(2))), "is not after");
    says(fault(|a| a.valid_from_ms = Some(i64::MIN)), "years 0 to 9999");
    says(fault(|a| a.valid_to_ms = Some(VALID_MS.end() + 1)), "years 0 to 9999");
    assert_eq!(fault(|a| a.value_json = "1".repeat(VALUE_BYTES_MAX)), None);
    let mut large = assertion();
    large.value_json = "1".repeat(VALUE_BYTES_MAX + 1);
    let invalid = validate_assertion(&large).unwrap_err();
    assert!(invalid.is_value_too_large());
    assert_eq!(invalid.to_string(), "`value`: it has 1048577 bytes, the limit is 1048576");
}

#[test]
fn batches() {
    says(validate_batch(&[]).err().map(|e| e.to_string()), "empty");
    let mut items = vec![assertion(); BATCH_ITEMS_MAX];
    assert_eq!(validate_batch(&items), Ok(()));
    items[17].predicate.clear();
    assert_eq!(validate_batch(&items).unwrap_err().field(), "[17].predicate");
    items.push(assertion());
    says(validate_batch(&items).err().map(|e| e.to_string()), "has 10001 items");
}

#[test]
fn votes_epochs_and_supersessions() {
    let id = Uuid::from_u128(1);
    let vote = |voter: &str, weight| {
        let (voter, reason) = (voter.to_owned(), None);
        validate_vote(&NewVote { id, assertion_id: id, voter, weight, reason })
    };
    assert_eq!(vote("v", -1.0), Ok(()));
    assert_eq!(vote(&"v".repeat(255), 1.0), Ok(()));
    assert!(vote(&"v".repeat(256), 1.0).is_err());
    assert!(vote("", 1.0).is_err());
    for weight in [-1.1, 1.1, f64::NAN, f64::NEG_INFINITY] {
        assert_eq!(vote("v", weight).unwrap_err().field(), "weight");
    }
    let epoch = |name: &str, description: Option<String>, supersedes: Option<&str>| {
        let supersedes = supersedes.map(str::to_owned);
        validate_epoch(&NewEpoch { id, name: name.into(), description, supersedes })
    };
    assert_eq!(epoch("2026", Some("d".repeat(TEXT_BYTES_MAX)), Some("2025")), Ok(()));
    assert!(epoch("2026", Some("d".repeat(TEXT_BYTES_MAX + 1)), None).is_err());
    assert!(epoch("2026", None, Some("2026")).is_err());
    assert!(epoch("2026", None, Some("")).is_err());
    assert!(epoch("", None, None).is_err());
    assert!(epoch("a\0", None, None).is_err());
    let supersession = |new, reason| validate_supersession(&NewSupersession { id, old: id, new, reason });
    assert_eq!(supersession(None, Some("r".repeat(TEXT_BYTES_MAX))), Ok(()));
    assert!(supersession(None, Some("r".repeat(TEXT_BYTES_MAX + 1))).is_err());
    assert!(supersession(Some(id), None).is_err());
    assert!(validate_import_id("").is_err());
}

#[test]
fn values_are_compacted_and_nothing_else() {
    for (text, compacted) in [
        (" { \"b\" : [ 1 , 2.50 ,\n\t-0e1 ] , \"a\" : \" x \\\" y \" } ", r#"{"b":[1,2.50,-0e1],"a":" x \" y "}"#),
        ("12345678901234567890123456789", "12345678901234567890123456789"),
        (" null ", "null"),
        ("true", "true"),
        (r#""""#, r#""""#),
        ("\"ü \u{2028}\"", "\"ü \u{2028}\""),
    ] {
        assert_eq!(compact(text).as_deref(), Ok(compacted), "{text}");
    }
    for bad in [
        "", " ", "NaN", "Infinity", "1e999", "-1e999", "01", "1.", "[1,]", "{\"a\"}", "[", "]", "[}", "\"open",
        "\"a\nb\"", "1 2", "1\n2", "t rue", "- 1", "{} {}", "'a'", "nul", "ü", "\u{a0}1", "[1 2]", "\"\\x\"",
    ] {
        assert!(compact(bad).is_err(), "{bad:?} gave {:?}", compact(bad));
    }
}

#[test]
fn values_have_limits() {
    let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
    assert!(compact(&nested(VALUE_DEPTH_MAX)).is_ok());
    let fault = compact(&nested(VALUE_DEPTH_MAX + 1)).unwrap_err();
    assert!(fault.to_string().contains("deeper than 100"), "{fault}");
    assert!(compact(&"[".repeat(1 << 20)).is_err());
    let text = |bytes: usize| format!("\"{}\"", "x".repeat(bytes - 2));
    assert!(compact(&text(VALUE_BYTES_MAX)).is_ok());
    assert!(compact(&text(VALUE_BYTES_MAX + 1)).unwrap_err().is_value_too_large());
}

#[test]
fn the_better_standing() {
    let standing = |index, votes_sum_nano, confidence| Standing { index, votes_sum_nano, confidence };
    let (old, new) = (standing(1, 5, Some(0.0)), standing(2, 4, None));
    assert!(compare(Resolve::Latest, &new, &old).is_gt());
    assert!(compare(Resolve::Votes, &new, &old).is_lt());
    assert!(compare(Resolve::Confidence, &new, &old).is_lt(), "none is less than 0");
    let tied = standing(3, 5, Some(0.0));
    assert!(compare(Resolve::Votes, &tied, &old).is_gt(), "then the latest");
    assert!(compare(Resolve::Confidence, &tied, &old).is_gt());
    assert_eq!("votes".parse(), Ok(Resolve::Votes));
    assert!("Votes".parse::<Resolve>().unwrap_err().to_string().contains("latest, votes"));
}
