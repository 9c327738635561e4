//! What a found log means. Pure: the scan looks, this decides, the opener acts.
//!
//! A torn tail and damage look alike and must never be confused: cutting a damaged durable entry
//! loses it, and keeping a torn one invents it. The table below is total, and `docs/wal-format.md`
//! shows the same rows; a test compares the two.

use crate::error::Damage;

/// How a frame was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FrameFound {
    /// Header and payload verify, and it continues the chain.
    Intact,
    /// Anything else, zeros included.
    Damaged,
}

/// How an identifier row was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RowFound {
    /// It verifies and names the entry.
    Intact,
    /// Neither intact nor absent.
    Damaged,
    /// Zeros: it was never written.
    Absent,
}

/// Where an entry lies relative to D, the highest index known durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    /// At or below D: a sync that covered it returned.
    Synced,
    /// Above D: it belongs to the last group, whose sync may never have returned.
    Unsynced,
}

/// What to do with one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Verdict {
    /// It is good.
    Keep,
    /// Cut here, and with it whatever is behind: all of it belongs to a group that was never acknowledged.
    CutTail,
    /// Torn or damaged: only peers can tell.
    Ask,
    /// It was durable and is damaged: fetch it, never cut it.
    Repair,
}

/// The table.
pub fn verdict(frame: FrameFound, row: RowFound, place: Place) -> Verdict {
    use {FrameFound as F, Place::*, RowFound as R, Verdict::*};
    match (frame, row, place) {
        // An intact frame speaks for itself, with or without its row.
        (F::Intact, R::Intact | R::Damaged | R::Absent, Synced | Unsynced) => Keep,
        // Frames are written before rows: in one group a power cut may lose either.  No row at all
        // and nothing synced above: the sync that would have covered it never returned.
        (F::Damaged, R::Absent, Unsynced) => CutTail,
        // The row got there, so the sync may have returned within the last 10 ms.
        (F::Damaged, R::Intact | R::Damaged, Unsynced) => Ask,
        // It was durable.
        (F::Damaged, R::Intact | R::Damaged | R::Absent, Synced) => Repair,
    }
}

/// One entry as the scan found it. Entries have no gaps: every index between the first and the last
/// has a slot, even when nothing of it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Index of the entry.
    pub index: u64,
    /// File name of its segment.
    pub segment: String,
    /// Where its frame begins or should begin, when known.
    pub offset: Option<u64>,
    /// The frame.
    pub frame: FrameFound,
    /// The row.
    pub row: RowFound,
}

/// What the log as a whole needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Everything is good.
    Keep,
    /// Keep what is below this index; the rest was never acknowledged.
    CutTail {
        /// First index that goes.
        first_cut: u64,
    },
    /// Ask the peers about these.
    Ask(Vec<Damage>),
    /// Fetch these from peers.
    Repair(Vec<Damage>),
}

/// What the log lacks, and where it ends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lacking {
    /// Durable entries that are damaged.
    pub repair: Vec<Damage>,
    /// Entries that only peers can tell about.
    pub ask: Vec<Damage>,
    /// First index that goes as never acknowledged.
    pub first_cut: Option<u64>,
}

/// Looks the slots up in the table, in index order, up to the first cut. `durable_end` is one more than D.
pub fn lacking(slots: &[Slot], durable_end: u64) -> Lacking {
    let mut lacking = Lacking::default();
    for slot in slots {
        let place = if slot.index < durable_end { Place::Synced } else { Place::Unsynced };
        match verdict(slot.frame, slot.row, place) {
            Verdict::Keep => {}
            Verdict::Repair => lacking.repair.push(damage_of(slot)),
            Verdict::Ask => lacking.ask.push(damage_of(slot)),
            Verdict::CutTail => {
                lacking.first_cut = Some(slot.index);
                break;
            }
        }
    }
    lacking
}

/// Decides over all slots in index order. `durable_end` is one more than D.
pub fn decide(slots: &[Slot], durable_end: u64) -> Decision {
    let Lacking { repair, ask, first_cut } = lacking(slots, durable_end);
    if !repair.is_empty() {
        // What is torn above the damage is decided when the damage has been repaired.
        return Decision::Repair(repair);
    }
    if !ask.is_empty() {
        return Decision::Ask(ask);
    }
    match first_cut {
        Some(first_cut) => {
            assert!(first_cut >= durable_end, "a cut at {first_cut} below the durable end {durable_end}");
            Decision::CutTail { first_cut }
        }
        None => Decision::Keep,
    }
}

fn damage_of(slot: &Slot) -> Damage {
    let row = match slot.row {
        RowFound::Intact => "row intact",
        RowFound::Damaged => "row damaged",
        RowFound::Absent => "row absent",
    };
    Damage {
        segment: slot.segment.clone(),
        offset: slot.offset,
        index: slot.index,
        what: format!("frame damaged, {row}"),
    }
}
