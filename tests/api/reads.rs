//! Reads end to end.

use serde_json::{Value, json};

use crate::support::{Served, start};

async fn values(served: &Served, query: &str) -> Vec<Value> {
    let answer = served.get(&format!("/v1/query?{query}")).await;
    assert_eq!(answer.status, 200, "{query}: {}", answer.json());
    let json = answer.json();
    assert_eq!(answer.header("x-stemedb-index"), json["index"].to_string());
    assert_eq!(json["served_by"], served.node.name());
    json["assertions"].as_array().unwrap().iter().map(|a| a["value"].clone()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resolve_picks_by_its_rule() {
    let served = start().await;
    let assertion = |value: u64, confidence: f64| json!({"concept_path": "c", "predicate": "p", "value": value, "confidence": confidence});
    let one = served.write("/v1/assert", assertion(1, 0.1)).await;
    let two = served.write("/v1/assert", assertion(2, 0.9)).await;
    let three = served.write("/v1/assert", assertion(3, 0.2)).await;
    served.write("/v1/vote", json!({"assertion_id": one["id"], "voter": "v", "weight": 1})).await;
    assert_eq!(values(&served, "concept_path=c").await, [3]);
    assert_eq!(values(&served, "concept_path=c&resolve=votes").await, [1]);
    assert_eq!(values(&served, "concept_path=c&resolve=confidence").await, [2]);
    assert_eq!(values(&served, "concept_path=c&resolve=all").await.len(), 3);
    served.write("/v1/supersede", json!({"old": three["id"]})).await;
    assert_eq!(values(&served, "concept_path=c").await, [2]);
    let as_of = format!("concept_path=c&as_of={}", three["index"]);
    assert_eq!(values(&served, &as_of).await, [3], "nothing is ever overwritten");
    let as_of = format!("concept_path=c&as_of={}", one["index"]);
    assert_eq!(values(&served, &as_of).await, [1]);

    let answer = served.get(&format!("/v1/assertions/{}", one["id"].as_str().unwrap())).await;
    let view = answer.json();
    assert_eq!(view["votes"], json!({"sum": 1.0, "count": 1}));
    for name in ["id", "index", "created_at"] {
        assert_eq!(view[name], one[name]);
    }
    assert_eq!(two["replayed"], false);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_come_back_as_they_went_in() {
    let served = start().await;
    let text = r#"{"z":123456789012345678901234567890,"a":[1.50,"\u00e9",null]}"#;
    let body = format!(r#"{{"concept_path":"raw","predicate":"p","value": {text} }}"#);
    assert_eq!(served.post("/v1/assert", body).await.status, 201);
    let answer = served.get("/v1/query?concept_path=raw").await;
    let body = String::from_utf8(answer.body.to_vec()).unwrap();
    assert!(body.contains(text), "{body}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subtree_is_paged_and_pinned() {
    let served = start().await;
    for n in 0..7 {
        let path = format!("tree/{n}");
        served.write("/v1/assert", json!({"concept_path": path, "predicate": "p", "value": n})).await;
    }
    served.write("/v1/assert", json!({"concept_path": "trees", "predicate": "p", "value": 99})).await;
    let mut seen = Vec::new();
    let mut cursor = String::new();
    let mut pinned = None;
    loop {
        let path = format!("/v1/query?concept_path=tree/**&limit=3{cursor}");
        let page = served.get(&path).await.json();
        let values = page["assertions"].as_array().unwrap();
        assert!(values.len() <= 3);
        seen.extend(values.iter().map(|a| a["value"].as_u64().unwrap()));
        assert_eq!(*pinned.get_or_insert(page["index"].clone()), page["index"]);
        let more = json!({"concept_path": format!("tree/{}", seen.len() + 100), "predicate": "p", "value": 7});
        served.write("/v1/assert", more).await;
        match page["cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert_eq!(seen, [0, 1, 2, 3, 4, 5, 6]);
    served.get("/v1/query?concept_path=tree/**&cursor=nonsense").await.problem(400, "invalid-cursor");
    let other = served.get(&format!("/v1/query?concept_path=tree{cursor}")).await;
    other.problem(400, "invalid-cursor");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn history_shows_every_fact() {
    let served = start().await;
    let first = json!({"concept_path": "h", "predicate": "p", "value": 1});
    let id = served.write("/v1/assert", first).await["id"].clone();
    served.write("/v1/vote", json!({"assertion_id": id, "voter": "v", "weight": 1})).await;
    served.write("/v1/supersede", json!({"old": id, "reason": "wrong"})).await;
    for query in ["concept_path=h".to_string(), format!("assertion_id={}", id.as_str().unwrap())] {
        let answer = served.get(&format!("/v1/history?{query}")).await;
        let json = answer.json();
        let kinds: Vec<_> = json["events"].as_array().unwrap().iter().map(|e| &e["kind"]).collect();
        assert_eq!(kinds, ["assertion", "vote", "supersession"], "{json}");
        assert_eq!(answer.header("x-stemedb-served-by"), served.node.name());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_consistency_is_served() {
    let served = start().await;
    served.write("/v1/assert", json!({"concept_path": "k", "predicate": "p", "value": 1})).await;
    for level in ["linearizable", "lease", "stale", "stale&max_staleness_ms=600000"] {
        assert_eq!(values(&served, &format!("concept_path=k&consistency={level}")).await, [1]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_and_cluster_have_their_members() {
    let served = start().await;
    let health = served.get("/v1/health").await.json();
    for name in ["status", "name", "role", "term", "leader", "applied_index", "disk", "version"] {
        assert!(health.get(name).is_some(), "{name} in {health}");
    }
    assert_eq!(health["disk"]["state"], "ok");
    for path in ["live", "ready", "leader", "replica", "replica?max_lag=0"] {
        let path = format!("/v1/health/{path}");
        let get = served.get(&path).await;
        let head = served.request(hyper::Method::HEAD, &path, &[], "").await;
        assert_eq!((get.status.as_u16(), head.status.as_u16()), (200, 200), "{path}");
        assert!(head.body.is_empty());
    }
    served.get("/v1/health/replica?max_lag=x").await.problem(400, "invalid-query");
    let cluster = served.get("/v1/admin/cluster").await.json();
    assert_eq!(cluster["leader"], served.node.name());
    assert_eq!(cluster["members"][0]["name"], served.node.name());
    let stats = served.get("/v1/admin/storage/stats").await.json();
    for name in ["sst_file_count", "total_bytes", "pending_compaction_bytes"] {
        assert!(stats[name].is_u64(), "{name} in {stats}");
    }
    assert!(served.get("/metrics").await.header("content-type").starts_with("text/plain"));
}
