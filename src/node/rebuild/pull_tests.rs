#![allow(clippy::unwrap_used)]
use xxhash_rust::xxh3::xxh3_128;

use super::*;

fn listed(name: &str, content: &[u8]) -> CheckpointFile {
    CheckpointFile { name: name.into(), bytes: content.len() as u64, xxh3: xxh3_128(content) }
}

fn known(id: u64, name: &str, voter: bool) -> KnownMember {
    let member = stemedb_raft::types::Member { name: name.into(), ..Default::default() };
    KnownMember { id, member, voter }
}

#[test]
fn replicas_come_before_the_leader_and_an_operators_choice_stands_alone() {
    let members = [known(1, "a", true), known(2, "b", true), known(3, "c", true), known(9, "d", false)];
    let names = |sources: Vec<KnownMember>| sources.into_iter().map(|s| s.member.name).collect::<Vec<_>>().join(" ");
    assert_eq!(names(sources(&members, "a", Some(2), None)), "c d b");
    assert_eq!(names(sources(&members, "a", None, None)), "b c d");
    assert_eq!(names(sources(&members, "a", Some(2), Some("b"))), "b");
    assert_eq!(names(sources(&members, "a", Some(2), Some("a"))), "");
}

/// Writes `content` as the pieces of one pull, of which only the first `pieces` arrive.
fn feed(dir: &Path, file: &CheckpointFile, content: &[u8], pieces: usize) -> Result<u64, PullError> {
    let todo = missing(dir, std::slice::from_ref(file))?;
    let from = todo.first().map_or(file.bytes, |t| t.from);
    let (send, inbox) = mpsc::channel(64);
    let rest = content.get(usize::try_from(from).unwrap()..).unwrap();
    for piece in rest.chunks(PIECE_BYTES_MAX as usize).take(pieces) {
        send.try_send(Bytes::copy_from_slice(piece)).unwrap();
    }
    drop(send);
    write_files(dir, todo, inbox)?;
    Ok(from)
}

#[test]
fn a_pull_that_is_broken_off_goes_on_where_it_ended_and_what_is_there_is_never_fetched_again() {
    let dir = tempfile::tempdir().unwrap();
    let content: Vec<u8> = (0..3 * PIECE_BYTES_MAX + 77).map(|n| (n % 251) as u8).collect();
    let file = listed("tables/1", &content);
    assert_eq!(feed(dir.path(), &file, &content, 2).unwrap(), 0);
    // A torn piece at the end is written again.
    let part = part(dir.path(), &file);
    let mut torn = fs::read(&part).unwrap();
    torn.extend_from_slice(b"torn");
    fs::write(&part, torn).unwrap();
    assert_eq!(feed(dir.path(), &file, &content, 9).unwrap(), 2 * u64::from(PIECE_BYTES_MAX));
    assert_eq!(fs::read(place(dir.path(), &file)).unwrap(), content);
    // Complete, under another name too; and what is not asked for goes.
    fs::write(dir.path().join("old"), "x").unwrap();
    let renamed = CheckpointFile { name: "tables/7".into(), ..file.clone() };
    assert!(missing(dir.path(), &[renamed]).unwrap().is_empty());
    assert!(!dir.path().join("old").exists());
    // Rot in a file that is there is found, and the file is fetched anew.
    let mut rotten = content.clone();
    *rotten.get_mut(5).unwrap() ^= 1;
    fs::write(place(dir.path(), &file), &rotten).unwrap();
    assert_eq!(missing(dir.path(), std::slice::from_ref(&file)).unwrap().len(), 1);
}

#[test]
fn a_file_that_is_not_what_its_hash_says_never_gets_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let content = vec![7; 100];
    let file = listed("tables/1", &content);
    let error = feed(dir.path(), &file, &[8; 100], 9).unwrap_err();
    assert!(error.to_string().contains("hash"), "{error}");
    assert!(!place(dir.path(), &file).exists() && !part(dir.path(), &file).exists());
    // A sender that answers with less than was asked for.
    let short = feed(dir.path(), &file, &content[..40], 9).unwrap_err();
    assert!(short.to_string().contains("40 bytes"), "{short}");
}
