//! Reads the list of tables out of a manifest `v{id}`, without opening the tree.
//!
//! ```text
//! sfa archive, section "tables":
//!   levels u8, for each: runs u8, for each: tables u32 LE,
//!     for each: id u64 LE | checksum type u8, 0 = xxh3 | xxh3-128 of the file, LE | global seqno u64 LE
//! ```
//!
//! Only bytes whose checksum in `current` was right are given to this. A test compares it with what
//! lsm-tree itself opens.

use std::io::Cursor;

/// A table that a manifest names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListedTable {
    /// Its id, and the name of its file in `tables/`.
    pub id: u64,
    /// xxh3-128 of the whole file.
    pub xxh3: u128,
}

/// The tables of a manifest, newest level first.
///
/// Errors: one sentence about what does not parse.
pub fn tables(manifest: &[u8]) -> Result<Vec<ListedTable>, String> {
    let archive = sfa::Reader::from_reader(&mut Cursor::new(manifest)).map_err(|e| format!("no archive: {e:?}"))?;
    let section = archive.toc().section(b"tables").ok_or("it has no section `tables`")?;
    let begin = usize::try_from(section.pos()).map_err(|e| e.to_string())?;
    let end = usize::try_from(section.pos().saturating_add(section.len())).map_err(|e| e.to_string())?;
    let mut rest = Rest(manifest.get(begin..end).ok_or("its section `tables` lies outside the file")?);
    let mut found = Vec::new();
    for _level in 0..rest.u8()? {
        for _run in 0..rest.u8()? {
            for _table in 0..u32::from_le_bytes(rest.take()?) {
                let id = u64::from_le_bytes(rest.take()?);
                let kind = rest.u8()?;
                if kind != 0 {
                    return Err(format!("table {id} has checksum type {kind}, only 0 (xxh3) is known"));
                }
                let xxh3 = u128::from_le_bytes(rest.take()?);
                let _global_seqno: [u8; 8] = rest.take()?;
                found.push(ListedTable { id, xxh3 });
            }
        }
    }
    Ok(found)
}

struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (head, tail) = self.0.split_first_chunk::<N>().ok_or("its list of tables is cut short")?;
        self.0 = tail;
        Ok(*head)
    }

    fn u8(&mut self) -> Result<u8, String> {
        self.take::<1>().map(|[byte]| byte)
    }
}
