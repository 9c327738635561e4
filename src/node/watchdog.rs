//! Sees that the disk hangs.
//!
//! A call that hangs in the kernel says nothing, and a thread that waits for it says nothing either. So whoever changes
//! files notes what it begins and ends (`stemedb_raft::io_times`), and a thread of its own looks at those notes. It does
//! no I/O, not even a line of log, and takes no lock that anybody holds during I/O: it sets the state of the disk, from
//! which everything else follows, and at last closes the doors itself, because a process with a thread that is stuck in
//! the kernel cannot exit, and its sockets would go on accepting.

use std::{collections::VecDeque, io, sync::Arc, thread, time::Duration};

use stemedb_raft::{
    clock,
    io_times::{IoInFlight, Waits},
};

use super::{disk::DiskState, process::Process};
use crate::config::ClusterSection;

/// How often it looks: a small part of the shortest limit, and cheap.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Two looks further apart than this mean that the process did not run: it was stopped, or its machine was. That time
/// says nothing about the disk.
const PAUSED_MS: u64 = 200;
/// How many times as long as anything else a row of the tree may take: several million deleted rows, or five slow syncs.
const ROWS_MAY_TAKE: u64 = 4;
/// Pauses that are remembered. More of them within one operation only count as waiting.
const PAUSES_MAX: usize = 64;

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
    /// Of the last look; 0 before the first.
    looked_at_ms: u64,
    /// When the process ran again, and for how long it had not.
    pauses: VecDeque<(u64, u64)>,
}

impl Watchdog {
    /// With the limits of the configuration.
    pub fn new(cluster: &ClusterSection) -> Watchdog {
        Watchdog::with_limits(cluster.stall_handoff_ms, cluster.stall_fence_ms)
    }

    fn with_limits(handoff_ms: u64, fence_ms: u64) -> Watchdog {
        let pauses = VecDeque::new();
        Watchdog { handoff_ms, fence_ms, phase: Phase::Fine, looked_at_ms: 0, pauses }
    }

    /// For how long an operation has been under way while this process ran.
    fn age_ms(&self, io: &IoInFlight, now_ms: u64) -> u64 {
        let paused: u64 = self.pauses.iter().filter(|(end, _)| *end > io.since_ms).map(|(_, for_ms)| *for_ms).sum();
        io.age_ms(now_ms).saturating_sub(paused)
    }

    fn note_pause(&mut self, now_ms: u64) {
        let since_ms = std::mem::replace(&mut self.looked_at_ms, now_ms);
        let gap_ms = now_ms.saturating_sub(since_ms);
        if since_ms > 0 && gap_ms >= PAUSED_MS {
            if self.pauses.len() == PAUSES_MAX {
                self.pauses.pop_front();
            }
            self.pauses.push_back((now_ms, gap_ms));
        }
    }

    /// Milliseconds after which an operation stalls the node, and after which it fences it. What nobody waits for yet
    /// may take long on a healthy disk.
    fn limits_ms(&self, io: &IoInFlight) -> (u64, u64) {
        match io.waits {
            Waits::Somebody => (self.handoff_ms, self.fence_ms),
            Waits::ARow => (self.handoff_ms.saturating_mul(ROWS_MAY_TAKE).min(self.fence_ms), self.fence_ms),
            Waits::Nobody => (self.fence_ms, self.fence_ms.saturating_mul(2)),
        }
    }

    /// What to do, given everything that is under way at `now_ms`.
    pub fn next(&mut self, under_way: &[IoInFlight], now_ms: u64) -> Act {
        self.note_pause(now_ms);
        let stalls = under_way.iter().filter(|io| self.age_ms(io, now_ms) >= self.limits_ms(io).0);
        let Some(oldest) = stalls.max_by_key(|io| self.age_ms(io, now_ms)) else {
            return match self.phase {
                Phase::Fine | Phase::Over => Act::Nothing,
                Phase::Stalled => self.turn(Phase::Fine, Act::Resume),
                Phase::Fenced => self.turn(Phase::Over, Act::FenceOver),
            };
        };
        let fences = under_way.iter().any(|io| self.age_ms(io, now_ms) >= self.limits_ms(io).1);
        let why =
            format!("{} {} has not returned for {} ms", oldest.operation, oldest.file, self.age_ms(oldest, now_ms));
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

    fn io(since_ms: u64, waits: Waits) -> IoInFlight {
        IoInFlight { operation: "sync", file: "segment.001.wal".into(), since_ms, waits }
    }

    /// Looks every 10 ms over that time; what was said, and when.
    fn look(dog: &mut Watchdog, under_way: &[IoInFlight], from_ms: u64, to_ms: u64) -> Vec<(u64, Act)> {
        let times = (from_ms..to_ms).step_by(10);
        times.map(|now_ms| (now_ms, dog.next(under_way, now_ms))).filter(|(_, act)| *act != Act::Nothing).collect()
    }

    fn watchdog() -> Watchdog {
        Watchdog::with_limits(500, 10_000)
    }

    #[test]
    fn a_sync_that_hangs_stalls_then_fences_and_its_end_ends_the_process() {
        let mut dog = watchdog();
        let said = look(&mut dog, &[io(1_000, Waits::Somebody)], 1_000, 60_000);
        let stalled = "sync segment.001.wal has not returned for 500 ms".to_owned();
        let fenced = "sync segment.001.wal has not returned for 10000 ms".to_owned();
        assert_eq!(said, [(1_500, Act::Stall(stalled)), (11_000, Act::Fence(fenced))]);
        assert_eq!(look(&mut dog, &[], 60_000, 60_500), [(60_000, Act::FenceOver)]);
        assert_eq!(look(&mut dog, &[io(60_500, Waits::Somebody)], 60_500, 90_000), [], "nothing comes after the end");
    }

    #[test]
    fn a_stall_that_ends_before_the_fence_is_over_and_may_come_back() {
        let mut dog = watchdog();
        assert!(matches!(look(&mut dog, &[io(10, Waits::Somebody)], 10, 700)[..], [(510, Act::Stall(_))]));
        let another = look(&mut dog, &[io(700, Waits::Somebody)], 700, 1_300);
        assert!(matches!(another[..], [(700, Act::Resume), (1_200, Act::Stall(_))]), "{another:?}");
        assert_eq!(look(&mut dog, &[], 1_300, 2_000), [(1_300, Act::Resume)]);
    }

    #[test]
    fn what_nobody_waits_for_may_take_longer_and_not_for_ever() {
        let said = look(&mut watchdog(), &[io(10, Waits::Nobody)], 10, 60_000);
        assert!(matches!(said[..], [(10_010, Act::Stall(_)), (20_010, Act::Fence(_))]), "{said:?}");
        let said = look(&mut watchdog(), &[io(10, Waits::ARow)], 10, 60_000);
        assert!(matches!(said[..], [(2_010, Act::Stall(_)), (10_010, Act::Fence(_))]), "{said:?}");
    }

    #[test]
    fn a_process_that_was_stopped_for_a_minute_has_no_disk_that_hangs() {
        let mut dog = watchdog();
        assert_eq!(look(&mut dog, &[io(100, Waits::Somebody)], 100, 400), []);
        // Stopped with its sync under way, and before that has returned it is looked at again.
        let said = look(&mut dog, &[io(100, Waits::Somebody)], 60_000, 60_150);
        assert_eq!(said, []);
        // What does not return then hangs after all.
        let said = look(&mut dog, &[io(100, Waits::Somebody)], 60_150, 80_000);
        assert!(matches!(said[..], [(60_210, Act::Stall(_)), (69_710, Act::Fence(_))]), "{said:?}");
    }
}
