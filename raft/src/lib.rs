//! The write-ahead log of StemeDB, which is its Raft log.
//!
//! ```text
//!  append ─► index (readable at once) ─► queue ─► writer thread ─► frames, rows, one sync ─► callbacks
//!                    │                                  └─ first error: latch, for good
//!  read  ◄───────────┴── cache, or pread + checksum
//!  open: hard state, segments ─► scan ─► decide (one total table) ─► Keep | CutTail | Ask | Repair
//!                                                  peers' answers ─► resolve ─► written again | cut | wait | rebuild
//! ```
//!
//! Invariants, each asserted where it could break: `purged <= flushed <= written`; entries have no
//! holes; a group never straddles segments; a mark promises only what was synced; nothing at or
//! below the highest promise is ever cut. `docs/wal-format.md` has the bytes and the table.

pub mod clock;
pub mod codec;
pub mod disk;
pub mod entry;
pub mod error;
pub mod fail_point;
pub mod frame;
pub mod group;
pub mod handle;
pub mod hard_state;
mod heal;
pub mod index;
pub mod io_times;
mod joined;
pub mod log_disk;
mod mend;
pub mod open;
pub mod options;
mod patch;
pub mod pending;
pub mod reader;
pub mod recovery;
pub mod repair;
pub mod scan;
pub mod scrub;
pub mod segment;
pub mod shared;
pub mod source;
pub mod store;
pub mod tool;
pub mod types;
pub mod writer;

pub use error::{Damage, EntryUnreadable, Latched, OpenError, RepairError};
pub use handle::LogRoom;
pub use io_times::{FsyncFigures, IoInFlight, IoTimes, Waits};
pub use open::RecoveryReport;
pub use options::{Pace, WalOptions};
pub use pending::PendingLog;
pub use repair::{Electorate, EntryAnswer, EntryCopy, EntryHealer, EntryQuestion, LostLog};
pub use scrub::{SealedSegment, SegmentCheck};
pub use shared::{NoObserver, WalObserver};
pub use source::EntrySource;
pub use store::{OpenStep, WalHandle, WalStore};
pub use types::*;
