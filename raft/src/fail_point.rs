//! Named places at which a test ends the process, as a kill would.
//!
//! Only builds with debug assertions have them: in a release build [`pass`] is empty. A server takes the name of a
//! point from `STEMEDB_TEST_FAIL_POINT`, or, so that it can be armed and disarmed while it runs, from the file that
//! `STEMEDB_TEST_FAIL_FILE` names. `<point>` aborts the process; `<point> panics` ends the task that comes by; and
//! `<point> waits`, in the file only, says so in the log and holds the thread until the file says it no more, so that a
//! test can let the disk fail just there.

/// Every point of this crate, in the order of a start.
pub const POINTS: &[&str] = &[
    "recovery.looked",
    "recovery.set_aside",
    "recovery.folder_synced",
    "recovery.durable",
    "repair.fetched",
    "repair.places_written",
    "repair.places_verified",
    "repair.segment_made",
    "repair.mended",
    "recovery.writes",
];

/// Where a test lets the task die that runs Raft.
pub const TASKS: &[&str] = &["task.raft"];

/// Passes a point, unless a test wants an end here. Points that are in no list of points are a defect.
pub fn pass(point: &'static str) {
    #[cfg(debug_assertions)]
    armed::pass(point);
    #[cfg(not(debug_assertions))]
    let _ = point;
}

/// As [`pass`], for a point of this crate's list.
pub(crate) fn own(point: &'static str) {
    debug_assert!(POINTS.iter().chain(TASKS).any(|known| *known == point), "{point} is in no list");
    pass(point);
}

#[cfg(debug_assertions)]
mod armed {
    use std::{env, fs, path::PathBuf, sync::LazyLock, thread, time::Duration};

    static POINT: LazyLock<Option<String>> = LazyLock::new(|| env::var("STEMEDB_TEST_FAIL_POINT").ok());
    static FILE: LazyLock<Option<PathBuf>> = LazyLock::new(|| env::var_os("STEMEDB_TEST_FAIL_FILE").map(PathBuf::from));

    pub fn pass(point: &'static str) {
        let armed = FILE.as_ref().and_then(|path| fs::read_to_string(path).ok());
        for wanted in POINT.iter().chain(&armed).map(|text| text.trim()) {
            if wanted == point {
                tracing::error!(point, "a test ends the process here");
                std::process::abort();
            }
            assert!(wanted.strip_suffix(" panics") != Some(point), "a planted panic at {point}");
        }
        let waits = |armed: &String| armed.trim().strip_suffix(" waits") == Some(point);
        if armed.as_ref().is_some_and(waits) {
            tracing::error!(point, "a test waits here");
            while FILE.as_ref().and_then(|path| fs::read_to_string(path).ok()).as_ref().is_some_and(waits) {
                thread::sleep(Duration::from_millis(5));
            }
        }
    }
}
