//! Putting damaged entries of a running log right.
//!
//! What an entry was is known from the index in memory: term, length, payload checksum. A copy that agrees with all of
//! that is the entry, whoever has it: this log's own memory or page cache, or a replica that the node asks
//! ([`EntryHealer`](crate::repair::EntryHealer)). The writer puts it in its place. Readers do not wait for that, the
//! scrubber does.

use std::sync::Arc;

use crate::{
    error::{EntryUnreadable, RepairError},
    index::{Located, Lookup},
    repair::{EntryAnswer, EntryCopy, EntryQuestion},
    shared::Shared,
    source::EntrySource,
    store::WalHandle,
};

/// What is asked about an entry that has a place here. It is known in full: no anchor is needed to tell it from others.
pub(crate) fn question(shared: &Shared, index: u64, located: Located) -> EntryQuestion {
    EntryQuestion {
        index,
        term: Some(located.term),
        payload_crc: Some(located.payload_crc),
        header_crc: None,
        durable: index < shared.flushed_end(),
        anchor: None,
    }
}

pub(crate) fn located(shared: &Shared, index: u64) -> Option<Located> {
    match shared.index().lookup_located(index)? {
        Lookup::OnDisk(on_disk) => Some(on_disk.located),
        Lookup::Cached(_) => None,
    }
}

/// A replica's copy of an entry that cannot be read here, proved to be it; `None` when there is none.
pub(crate) async fn copy_of_replica(shared: &Shared, unreadable: &EntryUnreadable) -> Option<EntryCopy> {
    let healer = shared.healer()?;
    let index = unreadable.index;
    tracing::warn!(segment = unreadable.segment, offset = unreadable.offset, index, "{unreadable}: asking for a copy");
    let asked = located(shared, index)?;
    let copy = healer.heal(question(shared, index, asked)).await?;
    // It may have been purged or truncated meanwhile, and even be another entry by now.
    let located = located(shared, index)?;
    if located != asked || !copy.is_of(index, &located) {
        tracing::warn!(index, term = copy.term, "the copy of a damaged entry is of another entry");
        return None;
    }
    Some(copy)
}

impl WalHandle {
    /// Puts a damaged entry of a sealed segment right: from what this node still has of it in memory or in the page
    /// cache, else from another replica. Returns when it is synced and was read back.
    pub async fn heal_entry(&self, index: u64) -> Result<(), RepairError> {
        let shared = &self.inner.shared;
        let Some(located) = located(shared, index) else { return Err(RepairError::Gone(index)) };
        let (own, asked) = (Arc::clone(shared), question(shared, index, located));
        let own = tokio::task::spawn_blocking(move || EntrySource::running(own).answer(&asked)).await;
        let copy = match (own, shared.healer()) {
            (Ok(EntryAnswer::Have(copy)), _) => Some(copy),
            (_, Some(healer)) => healer.heal(question(shared, index, located)).await,
            (_, None) => None,
        };
        self.repair_entry(index, copy.ok_or(RepairError::NoCopy(index))?).await
    }
}
