//! Whether a folder takes a file, keeps it and gives it back.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

/// Enough for a device that fails to notice it, and written within a moment on one that does not.
const PROBE_BYTES: usize = 1024 * 1024;

/// Blocking. Writes a file, syncs it and its folder, reads it back and removes it. `seed` makes its content. Each
/// probe has a file of its own: nothing is written to one whose sync has failed.
pub fn probe(dir: &Path, seed: u64) -> io::Result<()> {
    let path: PathBuf = dir.join(format!("probe-{seed}.tmp"));
    let tried = try_file(dir, &path, seed);
    let removed = fs::remove_file(&path);
    tried?;
    removed
}

fn try_file(dir: &Path, path: &Path, seed: u64) -> io::Result<()> {
    let content: Vec<u8> = (0..PROBE_BYTES as u64 / 8)
        .flat_map(|n| (seed ^ n).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes())
        .collect();
    let mut file = File::create_new(path)?;
    file.write_all(&content)?;
    file.sync_all()?;
    drop(file);
    File::open(dir)?.sync_all()?;
    let file = File::open(path)?;
    // From the device, not from the cache. Advice only: some file systems ignore it.
    let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
    let mut read = Vec::with_capacity(content.len());
    (&file).read_to_end(&mut read)?;
    if read == content { Ok(()) } else { Err(io::Error::other("the probe file reads back as something else")) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_good_folder_passes_and_keeps_nothing_and_a_missing_one_fails() {
        let dir = tempfile::tempdir().unwrap();
        probe(dir.path(), 3).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(probe(&dir.path().join("missing"), 3).is_err());
    }
}
