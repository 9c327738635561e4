//! Turns what lsm-tree does on damage into values: its errors, and its panics.
//!
//! The crate panics on some damaged files. A panic inside it means that the files are not what was
//! written, never that the process must end, so every call into it goes through [`caught`].

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::EngineError;
use super::error::says_nothing_about_the_file;

/// Runs `call` and turns an error or a panic into an [`EngineError`].
pub(crate) fn caught<T>(operation: &'static str, call: impl FnOnce() -> lsm_tree::Result<T>) -> Result<T, EngineError> {
    // Unwind safety: after a panic the engine is latched (writes) or the answer is an error
    // (reads); nothing half-changed is used again, and the crate's own locks are poisoned.
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(from_lsm(operation, error)),
        Err(panic) => {
            let text = panic
                .downcast_ref::<&str>()
                .map(ToString::to_string)
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "unknown".to_owned());
            Err(EngineError::damaged(operation, format!("lsm-tree panicked: {text}")))
        }
    }
}

/// [`caught`] for reads: a block or a file that cannot be read is damage too, unless the error is
/// about this process and not about the file.
pub(crate) fn caught_read<T>(
    operation: &'static str,
    call: impl FnOnce() -> lsm_tree::Result<T>,
) -> Result<T, EngineError> {
    caught(operation, call).map_err(|error| match error {
        EngineError::Io { operation, source } if !says_nothing_about_the_file(&source) => {
            EngineError::damaged(operation, format!("it cannot be read: {source}"))
        }
        other => other,
    })
}

fn from_lsm(operation: &'static str, error: lsm_tree::Error) -> EngineError {
    match error {
        // A table or manifest that ends too early is damage, not a failing disk.
        lsm_tree::Error::Io(source) if source.kind() == std::io::ErrorKind::UnexpectedEof => {
            EngineError::damaged(operation, format!("a file ends too early: {source}"))
        }
        lsm_tree::Error::Io(source) => EngineError::io(operation, source),
        lsm_tree::Error::InvalidVersion(version) => EngineError::io(
            operation,
            std::io::Error::new(
                std::io::ErrorKind::Unsupported,
                format!("the tree has format {version}, which this program does not know"),
            ),
        ),
        other => EngineError::damaged(operation, format!("{other:?}")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_damage() {
        let found = caught("get", || -> lsm_tree::Result<()> { panic!("row {}", 7) });
        assert!(matches!(found, Err(EngineError::Damaged { operation: "get", what, .. }) if what.contains("row 7")));
    }
}
