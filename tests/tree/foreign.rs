//! What operators leave in the folders, or take away.

use std::fs;
use std::path::Path;

use crate::support::*;

/// Name and content of everything left behind, in each folder of a tree and of a checkpoint.
fn leave(folders: &[std::path::PathBuf]) -> Vec<Vec<u8>> {
    let mut contents = Vec::new();
    for (n, folder) in folders.iter().enumerate() {
        for name in
            ["test.dat", "7.corrupted", "v3.corrupted", "x.tmp", "empty", "2.gz", "v1.gz", "version", "007", "+1"]
        {
            let content = if name == "empty" { Vec::new() } else { format!("{n} {name}").into_bytes() };
            fs::write(folder.join(name), &content).unwrap();
            contents.push(content);
        }
        fs::create_dir(folder.join("old stuff")).unwrap();
        fs::write(folder.join("old stuff/notes"), b"do not lose").unwrap();
    }
    contents
}

fn contents_below(dir: &Path) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(contents_below(&path)),
            false => found.push(fs::read(&path).unwrap()),
        }
    }
    found
}

#[tokio::test]
async fn files_of_others_are_left_alone_and_listed() {
    let dir = tempfile::tempdir().unwrap();
    let expected = closed(dir.path(), 600, Some(300)).await;
    let (kv, shelf) = (dir.path().join("kv"), dir.path().join("checkpoint"));
    let newest = fs::read_dir(&shelf).unwrap().next().unwrap().unwrap().path();
    let folders =
        [kv.clone(), tree(dir.path()), tree(dir.path()).join("tables"), shelf, newest.clone(), newest.join("tables")];
    let contents = leave(&folders);
    fs::write(dir.path().join("checkpoint/00000009-7.corrupted"), b"mine").unwrap();
    fs::write(dir.path().join("checkpoint/00000009-7"), b"a file of that name").unwrap();
    fs::create_dir(kv.join("g1.bak")).unwrap();

    for start in 0..2 {
        let mut machine = open(dir.path()).unwrap();
        assert_eq!(expected, rows(&machine.handle()).unwrap());
        let listed = machine.handle().foreign_files();
        // Per folder: ten files and a folder.
        for folder in &folders {
            if start > 0 && folder.starts_with(&newest) {
                assert!(listed.contains(&newest), "{listed:#?}"); // superseded; what is not of it stays
                continue;
            }
            let of_it = listed.iter().filter(|path| path.parent() == Some(folder)).count();
            assert!(of_it >= 11, "{}: {of_it} of {listed:#?}", folder.display());
        }
        assert!(listed.contains(&kv.join("g1.bak")));
        // The tree goes on, and a new checkpoint takes the old one's place.
        machine.handle().engine().compact_blocking(true).unwrap();
        drop(checkpoint(&mut machine).await);
        close(machine);
    }
    let found = contents_below(dir.path());
    for content in
        contents.iter().chain([&b"do not lose".to_vec(), &b"mine".to_vec(), &b"a file of that name".to_vec()])
    {
        assert!(found.contains(content), "{:?} is lost", String::from_utf8_lossy(content));
    }
}

#[tokio::test]
async fn a_table_that_was_moved_or_packed_is_damage_and_fits_again_when_it_is_put_back() {
    let dir = tempfile::tempdir().unwrap();
    let expected = closed(dir.path(), 600, None).await;
    let table = tables(dir.path())[1].clone();
    for moved in [table.with_extension("gz"), dir.path().join("elsewhere"), dir.path().join("kv/2")] {
        fs::rename(&table, &moved).unwrap();
        let error = refused(dir.path());
        assert_eq!(Some(table.as_path()), file_of(&error), "{error}");
        // Its name may have become one that lsm-tree passes over; the content is there.
        let aside = moved.with_file_name(format!("._{}", moved.file_name().unwrap().to_string_lossy()));
        fs::rename(if aside.exists() { aside } else { moved }, &table).unwrap();
    }
    let machine = open(dir.path()).unwrap();
    assert_eq!(expected, rows(&machine.handle()).unwrap());
}

#[tokio::test]
async fn no_empty_file_and_no_temporary_one_carries_meaning() {
    let dir = tempfile::tempdir().unwrap();
    let expected = closed(dir.path(), 600, Some(300)).await;
    // What runbooks say: find … -empty -delete, and rm *.tmp.
    fn clean(dir: &Path) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                clean(&path);
            } else if fs::metadata(&path).unwrap().len() == 0 || name.ends_with(".tmp") || name.starts_with(".tmp") {
                fs::remove_file(&path).unwrap();
            }
        }
    }
    clean(dir.path());
    let machine = open(dir.path()).unwrap();
    assert_eq!(expected, rows(&machine.handle()).unwrap());
    assert!(machine.handle().checkpoint().is_some());
}
