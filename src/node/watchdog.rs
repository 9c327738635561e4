//! Sees that the disk hangs.
//!
//! A call that hangs in the kernel says nothing, and a thread that waits for it says nothing either. So whoever changes
//! files notes what it begins and ends (`stemedb_raft::io_times`), and a thread of its own looks at those notes. It does
//! no I/O, not even a line of log, and takes no lock that anybody holds during I/O: it sets the state of the disk, from
//! which everything else follows, and at last closes the doors itself, because a process with a thread that is stuck in
//! the kernel cannot exit, and its sockets would go on accepting.

use std::{io, sync::Arc, thread, time::Duration};

use stemedb_raft::{clock, io_times::IoInFlight};

use super::{disk::DiskState, process::Process};
use crate::config::ClusterSection;

/// How often it looks: a small part of the shortest limit, and cheap.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// What to do. Each is said once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// Nothing new.
    Nothing,
    /// The disk stalls, for this reason.
    Stall(String),
    /// It does so no more.
    Resume,
    /// Close the doors, for this reason.
    Fence(String),
    /// What the doors were closed for has ended: the process can end.
    FenceOver,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Fine,
    Stalled,
    Fenced,
    Over,
}

/// From what is under way to what to do. Pure.
#[derive(Clone, Debug)]
pub struct Watchdog {
    handoff_ms: u64,
    fence_ms: u64,
    phase: Phase,
}

impl Watchdog {
    /// With the limits of the configuration.
    pub fn new(cluster: &ClusterSection) -> Watchdog {
        Watchdog { handoff_ms: cluster.stall_handoff_ms, fence_ms: cluster.stall_fence_ms, phase: Phase::Fine }
    }

    /// Milliseconds after which an operation stalls the node, and after which it fences it. What nobody waits for yet
    /// may take long on a healthy disk.
    fn limits_ms(&self, io: &IoInFlight) -> (u64, u64) {
        if io.background { (self.fence_ms, self.fence_ms.saturating_mul(2)) } else { (self.handoff_ms, self.fence_ms) }
    }

    /// What to do, given everything that is under way at `now_ms`.
    pub fn next(&mut self, under_way: &[IoInFlight], now_ms: u64) -> Act {
        let stalls = under_way.iter().filter(|io| io.age_ms(now_ms) >= self.limits_ms(io).0);
        let Some(oldest) = stalls.max_by_key(|io| io.age_ms(now_ms)) else {
            return match self.phase {
                Phase::Fine | Phase::Over => Act::Nothing,
                Phase::Stalled => self.turn(Phase::Fine, Act::Resume),
                Phase::Fenced => self.turn(Phase::Over, Act::FenceOver),
            };
        };
        let fences = under_way.iter().any(|io| io.age_ms(now_ms) >= self.limits_ms(io).1);
        let why = format!("{} {} has not returned for {} ms", oldest.operation, oldest.file, oldest.age_ms(now_ms));
        match (self.phase, fences) {
            (Phase::Fine | Phase::Stalled, true) => self.turn(Phase::Fenced, Act::Fence(why)),
            (Phase::Fine, false) => self.turn(Phase::Stalled, Act::Stall(why)),
            (Phase::Stalled, false) | (Phase::Fenced | Phase::Over, _) => Act::Nothing,
        }
    }

    fn turn(&mut self, phase: Phase, act: Act) -> Act {
        self.phase = phase;
        act
    }
}

/// Starts the thread. It ends with the process's node.
pub fn start(process: &Arc<Process>) -> io::Result<()> {
    let mut watchdog = Watchdog::new(&process.config.cluster);
    let mut shown = DiskState::Ok;
    let process = Arc::downgrade(process);
    thread::Builder::new().name("watchdog".into()).spawn(move || {
        loop {
            // Not held while it sleeps: the node ends with its last user.
            match process.upgrade() {
                Some(process) if !process.stop.is_cancelled() => {
                    look(&process, &mut watchdog);
                    show(&process, &mut shown);
                }
                _ => return,
            }
            thread::sleep(LOOK_EVERY);
        }
    })?;
    Ok(())
}

fn look(process: &Process, watchdog: &mut Watchdog) {
    let act = watchdog.next(&process.io_times.all(), clock::monotonic_ms());
    let shared = process.current();
    if let Some(shared) = &shared {
        let failed = shared.core.get().and_then(|core| core.state.failed());
        if let Some(failed) = failed.filter(|_| !shared.disk.is(DiskState::Failed)) {
            shared.disk.set(DiskState::Failed, failed.to_string());
        }
    }
    let disk = shared.as_ref().map(|shared| &shared.disk);
    match (act, disk) {
        (Act::Nothing, _) => process.fence.keep_closed(clock::monotonic_ms()),
        (Act::Stall(why), Some(disk)) => disk.set(DiskState::Stalled, why),
        (Act::Resume, Some(disk)) => disk.clear(DiskState::Stalled),
        (Act::Fence(why), _) => {
            if let Some(shared) = &shared {
                // Whatever hangs may come back, and must find that nothing counts any more.
                if let Some(wal) = shared.wal() {
                    wal.latch("wait for", "the disk", &why);
                }
                shared.disk.set(DiskState::Fenced, why);
            }
            process.fence.close(clock::monotonic_ms());
        }
        (Act::FenceOver, _) => process.fence.is_over(),
        // Nothing has come to life yet that could stall.
        (Act::Stall(_) | Act::Resume, None) => {}
    }
}

/// Here, since a scrape that reads the disk to begin with would never say that it hangs.
fn show(process: &Process, shown: &mut DiskState) {
    let state = process.current().map_or(DiskState::Ok, |shared| shared.disk.state());
    if state != *shown {
        *shown = state;
        process.metrics.set_disk_state(state.word());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn io(since_ms: u64, background: bool) -> IoInFlight {
        IoInFlight { operation: "sync", file: "segment.001.wal".into(), since_ms, background }
    }

    fn watchdog() -> Watchdog {
        Watchdog { handoff_ms: 500, fence_ms: 10_000, phase: Phase::Fine }
    }

    #[test]
    fn a_sync_that_hangs_stalls_then_fences_and_its_end_ends_the_process() {
        let mut dog = watchdog();
        let hangs = [io(1_000, false)];
        assert_eq!(dog.next(&hangs, 1_499), Act::Nothing);
        let why = "sync segment.001.wal has not returned for 500 ms".to_owned();
        assert_eq!(dog.next(&hangs, 1_500), Act::Stall(why));
        assert_eq!(dog.next(&hangs, 10_999), Act::Nothing, "said once");
        assert!(matches!(dog.next(&hangs, 11_000), Act::Fence(_)));
        assert_eq!(dog.next(&hangs, 99_000), Act::Nothing);
        assert_eq!(dog.next(&[], 99_001), Act::FenceOver);
        assert_eq!(dog.next(&hangs, 199_000), Act::Nothing, "nothing comes after the end");
    }

    #[test]
    fn a_stall_that_ends_before_the_fence_is_over_and_may_come_back() {
        let mut dog = watchdog();
        assert!(matches!(dog.next(&[io(0, false)], 700), Act::Stall(_)));
        assert_eq!(dog.next(&[io(700, false)], 800), Act::Resume, "another one, and young");
        assert!(matches!(dog.next(&[io(700, false)], 1_200), Act::Stall(_)));
        assert_eq!(dog.next(&[], 1_300), Act::Resume);
        assert_eq!(dog.next(&[], 1_400), Act::Nothing);
    }

    #[test]
    fn what_nobody_waits_for_may_take_longer_and_not_for_ever() {
        let mut dog = watchdog();
        assert_eq!(dog.next(&[io(0, true)], 9_999), Act::Nothing);
        assert!(matches!(dog.next(&[io(0, true)], 10_000), Act::Stall(_)));
        assert_eq!(dog.next(&[io(0, true)], 19_999), Act::Nothing);
        assert!(matches!(dog.next(&[io(0, true)], 20_000), Act::Fence(_)));
    }

    #[test]
    fn a_thread_that_was_not_run_for_long_fences_at_once() {
        assert!(matches!(watchdog().next(&[io(0, false)], 60_000), Act::Fence(_)));
    }
}
