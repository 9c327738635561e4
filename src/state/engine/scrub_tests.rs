//! Order, rate and position; what the sources find is in `tests/tree/scrub.rs`.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

#[derive(Default)]
struct FakeClock {
    ms: AtomicU64,
}

impl ScrubClock for FakeClock {
    fn monotonic_ms(&self) -> u64 {
        self.ms.load(Ordering::Relaxed)
    }
    fn unix_ms(&self) -> u64 {
        1_000_000 + self.ms.load(Ordering::Relaxed)
    }
    fn wait(&self, ms: u64, _stop: &CancellationToken) {
        self.ms.fetch_add(ms, Ordering::Relaxed);
    }
}

#[derive(Default)]
struct Heard {
    bytes: AtomicU64,
    damaged: AtomicU64,
    progress: Mutex<Vec<f64>>,
    done_at: AtomicU64,
}

impl ScrubObserver for Heard {
    fn bytes_read(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
    fn damaged(&self, _kind: &'static str) {
        self.damaged.fetch_add(1, Ordering::Relaxed);
    }
    fn progress(&self, part: f64) {
        self.progress.lock().unwrap().push(part);
    }
    fn pass_done(&self, at_unix_ms: u64) {
        self.done_at.store(at_unix_ms, Ordering::Relaxed);
    }
}

/// Items of 1,000 bytes that are read in pieces of 100.
struct Fake {
    kind: &'static str,
    count: usize,
    verified: Mutex<Vec<String>>,
    /// Stops the scrubber inside this item.
    stop_in: Mutex<Option<(String, CancellationToken)>>,
    bad: Option<&'static str>,
}

impl Fake {
    fn new(kind: &'static str, count: usize) -> Arc<Fake> {
        Arc::new(Fake { kind, count, verified: Mutex::default(), stop_in: Mutex::default(), bad: None })
    }
}

impl ScrubSource for Fake {
    fn kind(&self) -> &'static str {
        self.kind
    }
    fn items(&self) -> Vec<ScrubItem> {
        let item = |n| ScrubItem { key: format!("{n:03}"), path: "/nowhere".into(), bytes: 1_000 };
        (0..self.count).map(item).collect()
    }
    fn verify(&self, item: &ScrubItem, after: &mut dyn FnMut(u64) -> ControlFlow<()>) -> Verdict {
        if let Some((key, stop)) = &*self.stop_in.lock().unwrap()
            && *key == item.key
        {
            stop.cancel();
        }
        for _ in 0..10 {
            if after(100).is_break() {
                return Verdict::Stopped;
            }
        }
        self.verified.lock().unwrap().push(item.key.clone());
        match self.bad == Some(item.key.as_str()) {
            true => Verdict::Damaged("planted".into()),
            false => Verdict::Sound,
        }
    }
}

fn scrubber(
    dir: &Path,
    sources: &[&Arc<Fake>],
    rate: u64,
) -> (Scrubber, Arc<Heard>, Arc<FakeClock>, CancellationToken) {
    let (heard, clock, stop) = (Arc::new(Heard::default()), Arc::new(FakeClock::default()), CancellationToken::new());
    let sources = sources.iter().map(|source| Arc::<Fake>::clone(source) as Arc<dyn ScrubSource>).collect();
    let observer = Arc::clone(&heard) as Arc<dyn ScrubObserver>;
    let scrubber = Scrubber::new(dir, sources, rate, observer, Arc::<FakeClock>::clone(&clock), stop.clone());
    (scrubber, heard, clock, stop)
}

#[test]
fn a_pass_takes_as_long_as_its_rate_says() {
    let dir = tempfile::tempdir().unwrap();
    let source = Fake::new("tree", 20);
    for (rate, takes_ms) in [(1_000, 20_000), (10_000, 2_000), (500_000, 40)] {
        let (mut scrubber, heard, clock, _) = scrubber(dir.path(), &[&source], rate);
        assert_eq!(PassEnd::Complete { damaged: 0 }, scrubber.pass());
        assert_eq!(20_000, heard.bytes.load(Ordering::Relaxed));
        let took_ms = clock.ms.load(Ordering::Relaxed);
        assert!((takes_ms - 1..=takes_ms).contains(&took_ms), "{rate} bytes/s: {took_ms} ms");
    }
}

#[test]
fn a_stopped_pass_goes_on_where_it_was_and_ends_as_one() {
    let dir = tempfile::tempdir().unwrap();
    let (tree, wal) = (Fake::new("tree", 5), Fake::new("wal", 5));
    let (mut first, _, _, stop) = scrubber(dir.path(), &[&tree, &wal], 1_000_000);
    *wal.stop_in.lock().unwrap() = Some(("002".into(), stop));
    assert_eq!(PassEnd::Stopped, first.pass());
    assert_eq!((5, 2), (tree.verified.lock().unwrap().len(), wal.verified.lock().unwrap().len()));

    *wal.stop_in.lock().unwrap() = None;
    let (mut second, heard, _, _) = scrubber(dir.path(), &[&tree, &wal], 1_000_000);
    assert_eq!(0, second.position.wait_ms(5), "a pass is under way");
    assert_eq!(PassEnd::Complete { damaged: 0 }, second.pass());
    assert_eq!(5, tree.verified.lock().unwrap().len(), "none again");
    assert_eq!(vec!["000", "001", "002", "003", "004"], *wal.verified.lock().unwrap());
    assert_eq!(3_000, heard.bytes.load(Ordering::Relaxed));
    assert!(heard.progress.lock().unwrap().iter().any(|part| (0.7..=0.8).contains(part)), "it does not begin at 0");
    // The next one is due a day later.
    let done_at = heard.done_at.load(Ordering::Relaxed);
    let (third, ..) = scrubber(dir.path(), &[&tree, &wal], 1_000_000);
    assert_eq!(PASS_EVERY_MS - 7, third.position.wait_ms(done_at + 7));
    assert_eq!(0, third.position.wait_ms(done_at + PASS_EVERY_MS));
}

#[test]
fn a_lost_or_damaged_position_is_a_new_beginning() {
    let dir = tempfile::tempdir().unwrap();
    let source = Fake::new("tree", 3);
    for content in [None, Some(""), Some("x"), Some("\u{0}\u{0}\u{0}"), Some("0\nno-such-kind 001\n"), Some("0\n")] {
        let path = dir.path().join(POSITION_FILE);
        let _ = fs::remove_file(&path);
        if let Some(content) = content {
            fs::write(&path, content).unwrap();
        }
        source.verified.lock().unwrap().clear();
        let (mut scrubber, ..) = scrubber(dir.path(), &[&source], 1_000_000);
        assert_eq!(0, scrubber.position.wait_ms(77));
        assert_eq!(PassEnd::Complete { damaged: 0 }, scrubber.pass());
        assert_eq!(3, source.verified.lock().unwrap().len(), "{content:?}");
    }
}

#[test]
fn damage_is_counted_and_the_pass_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let source = Arc::new(Fake {
        kind: "tree",
        count: 4,
        verified: Mutex::default(),
        stop_in: Mutex::default(),
        bad: Some("001"),
    });
    let (mut scrubber, heard, ..) = scrubber(dir.path(), &[&source], 1_000_000);
    assert_eq!(PassEnd::Complete { damaged: 1 }, scrubber.pass());
    assert_eq!((4, 1), (source.verified.lock().unwrap().len(), heard.damaged.load(Ordering::Relaxed)));
}
