//! Keeps the system allocator's memory together.
//!
//! glibc gives threads arenas of their own, up to eight for each core, and memory that one thread frees stays in its
//! arena. A node's requests are parsed, proposed, logged and applied by different threads, so most of what it
//! holds would be holes: with two arenas a leader under load is resident at four fifths of the size
//! (`scripts/measure-footprint.sh`), at the same speed. Called by the binaries before they start a thread.

/// Arenas for the whole process: one for each of the two threads that allocate most, request handling and apply.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const ARENAS_MAX: libc::c_int = 2;

/// Bounds the arenas. `MALLOC_ARENA_MAX` in the environment, which glibc has read by now, wins.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code)]
pub fn bound_arenas() {
    if std::env::var_os("MALLOC_ARENA_MAX").is_some() {
        return;
    }
    // SAFETY: mallopt takes two integers and changes a setting of the allocator; no other thread exists yet.
    let accepted = unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS_MAX) };
    debug_assert_eq!(accepted, 1, "mallopt refused a constant");
}

/// Gives memory that was freed back to the system. A flushed memtable leaves millions of small holes, which glibc
/// keeps otherwise. Takes milliseconds: for threads on which nobody waits.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code)]
pub fn give_back() {
    // SAFETY: malloc_trim takes an integer and touches free memory only; it takes the allocator's own locks.
    // Whether there was anything to give back does not matter here.
    let _released = unsafe { libc::malloc_trim(0) };
}

/// Other allocators have no such arenas.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn bound_arenas() {}

/// Other allocators give memory back by themselves, or not at all.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn give_back() {}
