//! Failures of the local store, kept apart by what may be done about them.

use std::io;
use std::path::{Path, PathBuf};

/// A failure of the local store. It is never the same on every node: the node must stop using it.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The disk answered with an error.
    #[error("storage {operation} error: {source}")]
    Io {
        /// What was being done: `put`, `get`, `scan`, `flush`, `compact`, `checkpoint`, `open`.
        operation: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// What was read is not what was written, or what was written cannot be read.
    #[error("storage {operation} found damage: {}{what}", named(file.as_deref()))]
    Damaged {
        /// What was being done.
        operation: &'static str,
        /// Which file, when it is known.
        file: Option<PathBuf>,
        /// What does not match.
        what: String,
    },
}

fn named(file: Option<&Path>) -> String {
    file.map(|file| format!("{} ", file.display())).unwrap_or_default()
}

/// What a failure allows. Pure; decided from the error alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// The tree is not what was written: it may be replaced, see `replace`.
    Damaged,
    /// There was no room, and what needed it had not begun.
    Full,
    /// Another process, or an earlier incarnation in this one, has the folder.
    Busy,
    /// A newer program wrote it: nothing may be replaced or repaired by this one.
    Newer,
    /// The operator has to change owner or mode of a file.
    NotPermitted,
    /// A write, a sync or a read failed: the disk is not to be trusted any more.
    Disk,
}

/// Marks the failure of a sync, whatever its errno: ENOSPC from a sync is a failed disk, not a full one.
#[derive(Debug, thiserror::Error)]
#[error("fsync failed: {0}")]
pub struct SyncFailed(pub io::Error);

/// Gives the result of a sync the mark of one. Its kind is no longer `StorageFull`, so that nobody
/// takes it for a disk that is only full.
pub fn synced<T>(result: io::Result<T>) -> io::Result<T> {
    result.map_err(|error| io::Error::other(SyncFailed(error)))
}

impl EngineError {
    /// What it allows.
    pub fn class(&self) -> ErrorClass {
        let source = match self {
            EngineError::Damaged { .. } => return ErrorClass::Damaged,
            EngineError::Io { source, .. } => source,
        };
        match source.kind() {
            _ if is_full(source) => ErrorClass::Full,
            io::ErrorKind::ResourceBusy => ErrorClass::Busy,
            io::ErrorKind::Unsupported => ErrorClass::Newer,
            io::ErrorKind::PermissionDenied => ErrorClass::NotPermitted,
            _ => ErrorClass::Disk,
        }
    }

    /// An error with the same kind and text, for the second and later callers of a latched engine.
    pub fn repeat(&self) -> EngineError {
        match self {
            EngineError::Io { operation, source } => {
                EngineError::Io { operation, source: io::Error::new(source.kind(), source.to_string()) }
            }
            EngineError::Damaged { operation, file, what } => {
                EngineError::Damaged { operation, file: file.clone(), what: what.clone() }
            }
        }
    }

    /// What was being done.
    pub fn operation(&self) -> &'static str {
        match self {
            EngineError::Io { operation, .. } | EngineError::Damaged { operation, .. } => operation,
        }
    }

    /// True when the disk had no room. Whether trying again is safe depends on what was being
    /// written, not on this.
    pub fn is_disk_full(&self) -> bool {
        self.class() == ErrorClass::Full
    }

    /// True when what was read is not what was written.
    pub fn is_damage(&self) -> bool {
        matches!(self, EngineError::Damaged { .. })
    }

    pub(crate) fn io(operation: &'static str, source: io::Error) -> EngineError {
        EngineError::Io { operation, source }
    }

    pub(crate) fn damaged(operation: &'static str, what: impl Into<String>) -> EngineError {
        EngineError::Damaged { operation, file: None, what: what.into() }
    }

    pub(crate) fn damaged_file(operation: &'static str, file: &Path, what: impl Into<String>) -> EngineError {
        EngineError::Damaged { operation, file: Some(file.to_owned()), what: what.into() }
    }

    /// The failure of a read of `file`: damage, unless it says nothing about the file's content.
    pub(crate) fn read(operation: &'static str, file: &Path, source: io::Error) -> EngineError {
        if says_nothing_about_the_file(&source) {
            return EngineError::io(operation, io::Error::new(source.kind(), format!("{}: {source}", file.display())));
        }
        EngineError::damaged_file(operation, file, format!("cannot be read: {source}"))
    }

    /// The same error with the file, when it named none.
    pub(crate) fn in_file(mut self, found: Option<PathBuf>) -> EngineError {
        if let EngineError::Damaged { file, .. } = &mut self
            && file.is_none()
        {
            *file = found;
        }
        self
    }
}

/// Errors of a read that come from this process or its rights and not from the medium.
pub(crate) fn says_nothing_about_the_file(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::PermissionDenied
            | io::ErrorKind::OutOfMemory
            | io::ErrorKind::Interrupted
            | io::ErrorKind::WouldBlock
            | io::ErrorKind::Unsupported
            | io::ErrorKind::ResourceBusy
    ) || matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS))
}

/// ENOSPC or a quota, under whichever kind the standard library files them.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_errno_means_what_the_call_makes_of_it() {
        let errno = io::Error::from_raw_os_error;
        for (source, class) in [
            (errno(libc::ENOSPC), ErrorClass::Full),
            (errno(libc::EDQUOT), ErrorClass::Full),
            (errno(libc::EIO), ErrorClass::Disk),
            (errno(libc::EROFS), ErrorClass::Disk),
            (errno(libc::EACCES), ErrorClass::NotPermitted),
            (errno(libc::EBUSY), ErrorClass::Busy),
            (io::ErrorKind::Unsupported.into(), ErrorClass::Newer),
        ] {
            let text = source.to_string();
            assert_eq!(EngineError::io("flush", source).class(), class, "{text}");
        }
        // From a sync, every one of them is a failed disk.
        for code in [libc::ENOSPC, libc::EDQUOT, libc::EIO, libc::EROFS] {
            let Err(source) = synced::<()>(Err(errno(code))) else { panic!("it failed") };
            let error = EngineError::io("flush", source);
            assert_eq!(error.class(), ErrorClass::Disk, "{error}");
            assert!(error.to_string().contains("fsync failed"), "{error}");
        }
    }

    #[test]
    fn a_read_error_is_damage_unless_it_is_about_this_process() {
        let file = Path::new("kv/g1/tables/7");
        for code in [libc::EIO, libc::ENOENT, libc::ESTALE, libc::EISDIR] {
            let error = EngineError::read("get", file, io::Error::from_raw_os_error(code));
            assert!(error.is_damage() && error.to_string().contains("tables/7"), "{error}");
        }
        for code in [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::EACCES, libc::EINTR] {
            assert!(!EngineError::read("get", file, io::Error::from_raw_os_error(code)).is_damage(), "errno {code}");
        }
    }
}
