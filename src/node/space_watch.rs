//! Looks at the room in the data folder for as long as the process lives, and keeps the ballast.
//!
//! The first look happens before the start writes anything: a node with neither bytes nor inodes lets its ballast
//! go and starts. After that a task looks several times a second; each incarnation follows what it sees.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::{
    ballast::{self, Ballast},
    space::{Level, Marks, RoomReport, Shortage, Space, SpaceProbe},
};
use crate::{config::Config, metrics::Metrics};

/// How often the task looks. A disk that other programs fill at 1 GB/s loses less than low water meanwhile.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// The ballast is not made in the first moments: a start has better use for the disk.
const BALLAST_AFTER_LOOKS: u32 = 25;

/// Follows the room of one data folder. Cheap to clone.
#[derive(Clone)]
pub struct SpaceWatch {
    inner: Arc<Inner>,
}

struct Inner {
    keeper: Mutex<Keeper>,
    report: watch::Sender<RoomReport>,
    poked: Notify,
}

/// What looks, and what it remembers. Its lock is held over calls of the file system: only by whoever looks.
struct Keeper {
    config: Arc<Config>,
    probe: Arc<dyn SpaceProbe>,
    metrics: Arc<Metrics>,
    data_dir: PathBuf,
    ballast: Ballast,
    level: Level,
    looks: u32,
    is_blind: bool,
}

impl SpaceWatch {
    /// Blocking: looks for the first time. The folder must exist.
    pub fn begin(config: Arc<Config>, metrics: Arc<Metrics>, probe: Arc<dyn SpaceProbe>) -> SpaceWatch {
        let data_dir = config.node.data_dir.clone();
        let ballast = Ballast::find(&data_dir);
        let keeper =
            Keeper { config, probe, metrics, data_dir, ballast, level: Level::Room, looks: 0, is_blind: false };
        let inner = Inner { keeper: Mutex::new(keeper), report: watch::Sender::default(), poked: Notify::new() };
        let watch = SpaceWatch { inner: Arc::new(inner) };
        watch.look(None);
        watch
    }

    /// What this node says of its room. Changes with every look that finds another level or another number.
    pub fn report(&self) -> watch::Receiver<RoomReport> {
        self.inner.report.subscribe()
    }

    /// Looks at once, soon.
    pub fn poke(&self) {
        self.inner.poked.notify_one();
    }

    /// Blocking. Looks now. `blocked`: what did not get room whatever the numbers say.
    pub fn look(&self, blocked: Option<String>) {
        let mut keeper = self.inner.keeper.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(report) = keeper.look(blocked) else { return };
        self.inner.report.send_if_modified(|known| {
            let changed = *known != report;
            *known = report;
            changed
        });
    }

    /// Looks until `stop`. `blocked` is asked before each look.
    pub async fn run(self, stop: CancellationToken, blocked: impl Fn() -> Option<String> + Send + 'static) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.inner.poked.notified() => {}
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
            }
            let (watch, blocked) = (self.clone(), blocked());
            // A file system may hang: then nobody waits for this look, and there is no other one beside it.
            let looked = tokio::task::spawn_blocking(move || watch.look(blocked));
            tokio::select! {
                () = stop.cancelled() => return,
                ended = looked => if let Err(error) = ended {
                    tracing::error!(%error, "the look at the free space died");
                },
            }
        }
    }
}

impl Keeper {
    /// `None` when the file system does not answer.
    fn look(&mut self, blocked: Option<String>) -> Option<RoomReport> {
        let space = self.space()?;
        let marks = Marks::of(&self.config, &space);
        let wanted = ballast::wanted_bytes(&self.config, &space);
        self.looks = self.looks.saturating_add(1);
        let step = match ballast::decide(&space, &marks, self.level, self.ballast.bytes(), wanted) {
            ballast::Step::Grow { .. } if self.looks < BALLAST_AFTER_LOOKS => ballast::Step::Keep,
            step => step,
        };
        let had = self.ballast.bytes();
        let let_go = self.ballast.perform(step);
        if let_go {
            tracing::warn!(
                bytes_free = space.bytes_free,
                inodes_free = space.inodes_free,
                "no space left below {}: the ballast of {had} bytes was let go; it is made again when there is room",
                self.data_dir.display()
            );
        }
        let space = if step == ballast::Step::Keep { space } else { self.space()? };
        // What the ballast wants is not for clients.
        let bytes_free = space.bytes_free.saturating_sub(wanted.saturating_sub(self.ballast.bytes()));
        let level = marks.next(self.level, bytes_free, space.inodes_free, blocked.is_some());
        let shortage = (level != Level::Room).then(|| Shortage {
            node: self.config.node.name.clone(),
            data_dir: self.data_dir.display().to_string(),
            bytes_free,
            bytes_wanted: marks.clear_bytes,
            inodes_free: (space.inodes_total > 0).then_some(space.inodes_free),
            inodes_wanted: marks.clear_inodes,
            blocked,
        });
        match (&shortage, self.level, level) {
            (Some(shortage), before, now) if before < now => {
                let what = match now {
                    Level::Room | Level::Low => "writes of clients are refused",
                    Level::Reserved => "writes of clients and retractions are refused",
                };
                tracing::warn!("no space: {shortage}; {what}, reads go on, and all of it ends by itself");
            }
            (None, before, _) if before != Level::Room => {
                tracing::info!(bytes_free, inodes_free = space.inodes_free, "there is space again: writes are taken");
            }
            _ => {}
        }
        self.level = level;
        self.metrics.set_space(&space, self.ballast.bytes(), marks.low_bytes);
        Some(RoomReport { level, shortage })
    }

    fn space(&mut self) -> Option<Space> {
        match self.probe.look(&self.data_dir) {
            Ok(space) => {
                self.is_blind = false;
                Some(space)
            }
            Err(error) => {
                // What was seen last holds on.
                if !self.is_blind {
                    tracing::warn!(%error, "the free space of {} cannot be read", self.data_dir.display());
                }
                self.is_blind = true;
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::{io, path::Path};

    const MIB: u64 = 1024 * 1024;

    /// Whatever a test says; `None`: an error.
    struct Told(Mutex<Option<Space>>);

    impl Told {
        fn say(&self, bytes_free: u64, inodes_free: u64) {
            let space = Space { bytes_free, bytes_total: 400 * MIB, inodes_free, inodes_total: 10_000 };
            *self.0.lock().unwrap() = Some(space);
        }
    }

    impl SpaceProbe for Told {
        fn look(&self, _: &Path) -> io::Result<Space> {
            self.0.lock().unwrap().ok_or_else(|| io::Error::other("planted"))
        }
    }

    #[test]
    fn the_first_look_lets_the_ballast_go_when_there_is_nothing_left_and_later_ones_make_it_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.node.data_dir = dir.path().to_owned();
        let file = dir.path().join(ballast::FILE);
        std::fs::write(&file, vec![1; 4_000_000]).unwrap();
        let told = Arc::new(Told(Mutex::default()));
        told.say(0, 0);
        let metrics = Arc::new(Metrics::new());
        let watch = SpaceWatch::begin(Arc::new(config), metrics, Arc::<Told>::clone(&told));
        assert!(!file.exists());
        let level = || watch.report().borrow().level;
        assert_eq!(level(), Level::Reserved);
        // What is free may be the ballast's own bytes: then there is none for clients.
        told.say(4 * MIB, 5_000);
        watch.look(None);
        let shortage = watch.report().borrow().shortage.clone().unwrap();
        assert_eq!((level(), shortage.bytes_free), (Level::Reserved, 0));
        // An error of the file system changes nothing.
        *told.0.lock().unwrap() = None;
        watch.look(None);
        assert_eq!(level(), Level::Reserved);
        told.say(300 * MIB, 5_000);
        watch.look(Some("a quota".into()));
        assert_eq!(level(), Level::Low);
        assert_eq!(watch.report().borrow().shortage.clone().unwrap().blocked.as_deref(), Some("a quota"));
        watch.look(None);
        assert_eq!((level(), watch.report().borrow().shortage.is_none()), (Level::Room, true));
        for _ in 0..BALLAST_AFTER_LOOKS {
            watch.look(None);
        }
        assert_eq!(std::fs::metadata(&file).unwrap().len(), 4 * MIB);
    }
}
