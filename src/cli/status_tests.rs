#![allow(clippy::unwrap_used)]
use super::*;

fn view(port: u16, leader: Option<&str>, term: u64, members: &[&str]) -> View {
    let members =
        members.iter().map(|name| MemberBody { name: (*name).to_owned(), voter: true, ..MemberBody::default() });
    let cluster =
        ClusterBody { leader: leader.map(str::to_owned), term, members: members.collect(), ..ClusterBody::default() };
    View { endpoint: Endpoint::parse(&format!("127.0.0.1:{port}")).unwrap(), cluster }
}

fn line(name: &str, role: &str, term: u64, leader: &str) -> Line {
    let health = NodeHealth {
        status: "ok".into(),
        name: name.into(),
        role: role.into(),
        term,
        leader: Some(leader.into()),
        disk: Disk { state: "ok".into(), reason: None },
        ..NodeHealth::default()
    };
    Line {
        name: name.into(),
        id: None,
        fsync_p99_ms: None,
        endpoint: None,
        member_role: Some(role.into()),
        lag_entries: None,
        lag_bytes: None,
        health: Some(health),
        error: None,
    }
}

#[test]
fn the_newest_view_with_a_leader_is_believed() {
    const ALL: [&str; 3] = ["a", "b", "c"];
    let picked = |views: Vec<View>| pick(views).map(|view| (view.cluster.leader, view.cluster.term));
    let b_in_4 = Some((Some("b".to_owned()), 4));
    // A leader that was cut off goes on leading in its own eyes; one without the others stands for election again and again.
    assert_eq!(picked(vec![view(1, Some("a"), 3, &ALL), view(2, Some("b"), 4, &ALL)]), b_in_4);
    assert_eq!(picked(vec![view(1, None, 19, &ALL), view(2, Some("b"), 4, &ALL)]), b_in_4);
    // A node that has just started with an empty folder knows nobody.
    assert_eq!(picked(vec![view(1, None, 0, &[]), view(2, Some("b"), 4, &ALL)]), b_in_4);
    assert_eq!(picked(vec![view(1, None, 0, &[]), view(2, None, 5, &ALL)]), Some((None, 5)));
    assert_eq!(picked(vec![]), None);
    let first = pick(vec![view(1, Some("b"), 4, &ALL), view(2, Some("b"), 4, &ALL)]).unwrap();
    assert_eq!(first.endpoint.authority(), "127.0.0.1:1", "of equals the first");
}

#[test]
fn a_node_that_is_cut_off_is_not_called_healthy() {
    let cluster = view(2, Some("b"), 4, &["a", "b", "c"]).cluster;
    let well = [line("a", "follower", 4, "b"), line("b", "leader", 4, "b"), line("c", "follower", 4, "b")];
    assert_eq!(problems(&cluster, None, &well), [""; 0]);

    let mut lines = well;
    lines[0] = line("a", "leader", 3, "a");
    let found = problems(&cluster, None, &lines).join("\n");
    assert!(found.starts_with("a says that it leads, in term 3, and b leads in term 4"), "{found}");

    lines[0].member_role = Some("unreachable".into());
    assert_eq!(problems(&cluster, None, &lines), ["a answers here, and the other members do not reach it"]);

    lines[0] = line("a", "follower", 3, "c");
    let found = problems(&cluster, None, &lines).join("\n");
    assert!(found.starts_with("a follows c, and b leads"), "{found}");
}

#[test]
fn what_a_node_says_of_its_links_is_shown() {
    let cluster = view(2, Some("b"), 4, &["a", "b", "c"]).cluster;
    let mut lines = [line("a", "follower", 4, "b"), line("b", "leader", 4, "b"), line("c", "follower", 4, "b")];
    lines[0].health.as_mut().unwrap().cut_off = Some("it reaches nobody".into());
    assert_eq!(problems(&cluster, None, &lines), ["a is cut off: it reaches nobody"]);
}

#[test]
fn a_full_disk_is_a_problem() {
    let cluster = view(2, Some("b"), 4, &["b"]).cluster;
    let mut full = line("b", "leader", 4, "b");
    full.health.as_mut().unwrap().disk = Disk { state: "full".into(), reason: Some("12 MiB are free".into()) };
    assert_eq!(problems(&cluster, None, &[full]), ["the disk of b is full (12 MiB are free)"]);
}
