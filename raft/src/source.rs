//! Answers other nodes' questions about entries: from a running log, or from one whose own repair is not complete.
//!
//! Every entry that is handed out was read and verified for this answer. What cannot be read here is *unknown*, never
//! *never*.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    sync::Arc,
};

use bytes::Bytes;

use crate::{
    entry,
    frame::{EntryKind, FRAME_HEADER_BYTES, FrameHeader, payload_crc, term_of},
    index::{Lookup, OnDisk, SegmentIndex},
    joined::Joined,
    repair::{EntryAnswer, EntryCopy, EntryId, EntryQuestion, NeverBecause},
    scan::Known,
    shared::Shared,
    types::LogId,
};

/// Answers questions about entries. Clones share it. Blocking: it reads the disk.
#[derive(Clone)]
pub struct EntrySource(Inner);

#[derive(Clone)]
enum Inner {
    Running(Arc<Shared>),
    Pending(Arc<Pending>),
    Lost,
}

/// What was found of a log before anything is decided about it.
struct Pending {
    purged: Option<LogId>,
    purged_end: u64,
    committed_end: u64,
    durable_end: u64,
    end: u64,
    segments: VecDeque<SegmentIndex>,
    /// Damaged entries, with what is known of them.
    bad: BTreeMap<u64, Option<Known>>,
}

/// What is at an index.
enum Here {
    Purged,
    Beyond,
    Entry {
        kind: EntryKind,
        term: u64,
        payload: Bytes,
    },
    Damaged(Option<Known>),
    /// It could not be read just now.
    Unreadable,
}

impl EntrySource {
    pub(crate) fn running(shared: Arc<Shared>) -> Self {
        Self(Inner::Running(shared))
    }

    /// A log of which nothing can be told.
    pub fn lost() -> Self {
        Self(Inner::Lost)
    }

    pub(crate) fn pending(log: &Joined, purged: Option<LogId>) -> Self {
        let bad = log.slots().into_iter().map(|slot| (slot.index, log.known(slot.index))).collect();
        let segments = log.segments.iter().map(|s| SegmentIndex {
            number: s.number,
            identity: s.identity,
            header: s.header,
            file: Arc::clone(&s.file),
            first_index: s.first_index,
            entries: s.entries.clone(),
        });
        Self(Inner::Pending(Arc::new(Pending {
            purged,
            purged_end: log.purged_end,
            committed_end: log.committed_end,
            durable_end: log.durable_end,
            end: log.end(),
            segments: segments.collect(),
            bad,
        })))
    }

    /// Answers one question.
    pub fn answer(&self, question: &EntryQuestion) -> EntryAnswer {
        let never = |why| EntryAnswer::Never { why };
        match self.here(question.index) {
            Here::Purged => EntryAnswer::Covered,
            Here::Beyond => never(NeverBecause::Ends),
            Here::Unreadable => EntryAnswer::Unknown,
            Here::Entry { kind, term, payload } => {
                let copy = EntryCopy {
                    index: question.index,
                    term,
                    kind: kind.to_byte(),
                    previous: question.index.checked_sub(1).and_then(|previous| self.id_at(previous)),
                    has_anchor: question.anchor.is_some_and(|anchor| {
                        anchor.payload_crc.is_some() && self.id_at(anchor.index).is_some_and(|id| id.agrees(&anchor))
                    }),
                    committed: question.index < self.committed_end(),
                    payload,
                };
                match differs(question, term, payload_crc(&copy.payload)) {
                    true => never(NeverBecause::Differs),
                    false => EntryAnswer::Have(copy),
                }
            }
            Here::Damaged(Some(known)) if differs(question, known.term, known.payload_crc) => {
                never(NeverBecause::Differs)
            }
            Here::Damaged(_) if self.is_torn(question.index) => never(NeverBecause::Torn),
            Here::Damaged(_) => EntryAnswer::Unknown,
        }
    }

    /// Answers questions in their order until the answers' payloads reach `bytes_max`, but at least one.
    pub fn answer_all(&self, questions: &[EntryQuestion], bytes_max: usize) -> Vec<(u64, EntryAnswer)> {
        let mut answers = Vec::new();
        let mut bytes = 0;
        for question in questions {
            let answer = self.answer(question);
            if let EntryAnswer::Have(copy) = &answer {
                bytes += copy.payload.len();
            }
            if bytes > bytes_max && !answers.is_empty() {
                break;
            }
            answers.push((question.index, answer));
        }
        answers
    }

    fn committed_end(&self) -> u64 {
        match &self.0 {
            Inner::Running(shared) => shared.committed_end(),
            Inner::Pending(pending) => pending.committed_end,
            Inner::Lost => 0,
        }
    }

    fn is_torn(&self, index: u64) -> bool {
        matches!(&self.0, Inner::Pending(pending) if index >= pending.durable_end)
    }

    fn here(&self, index: u64) -> Here {
        let on_disk = match &self.0 {
            Inner::Lost => return Here::Unreadable,
            Inner::Running(shared) => {
                let log = shared.index();
                if log.purged.is_some_and(|purged| index <= purged.index()) {
                    return Here::Purged;
                }
                if index >= log.end() {
                    return Here::Beyond;
                }
                match log.lookup(index) {
                    // The log begins behind it: it was never here, and the log did not begin with Raft's first entry.
                    None => return Here::Purged,
                    Some(Lookup::Cached(cached)) => {
                        return match entry::encode(&cached) {
                            Ok(e) => Here::Entry { kind: e.kind, term: e.term, payload: e.payload },
                            Err(_) => Here::Unreadable,
                        };
                    }
                    Some(Lookup::OnDisk(on_disk)) => on_disk,
                }
            }
            Inner::Pending(pending) => match pending.find(index) {
                Ok(on_disk) => on_disk,
                Err(here) => return here,
            },
        };
        match read_frame(&on_disk) {
            Ok((kind, payload)) => Here::Entry { kind, term: on_disk.located.term, payload },
            Err(error) => {
                tracing::warn!(%error, index, segment = on_disk.segment, "an entry that a peer asks for cannot be read");
                Here::Unreadable
            }
        }
    }

    /// The identity of an entry, without reading it where that can be avoided.
    fn id_at(&self, index: u64) -> Option<EntryId> {
        let named = |term, crc| Some(EntryId { index, term, payload_crc: crc });
        match &self.0 {
            Inner::Lost => None,
            Inner::Running(shared) => {
                let log = shared.index();
                if let Some(Lookup::OnDisk(on_disk)) = log.lookup_located(index) {
                    return named(on_disk.located.term, Some(on_disk.located.payload_crc));
                }
                match log.lookup(index) {
                    Some(Lookup::Cached(cached)) => {
                        let encoded = entry::encode(&cached).ok()?;
                        named(encoded.term, Some(payload_crc(&encoded.payload)))
                    }
                    _ => named(term_of(&log.log_id_at(index)?), None),
                }
            }
            Inner::Pending(pending) => match pending.find(index) {
                Ok(on_disk) => named(on_disk.located.term, Some(on_disk.located.payload_crc)),
                Err(Here::Damaged(Some(known))) => named(known.term, Some(known.payload_crc)),
                Err(_) => {
                    let purged = pending.purged.filter(|purged| purged.index() == index)?;
                    named(term_of(&purged), None)
                }
            },
        }
    }
}

impl Pending {
    fn find(&self, index: u64) -> Result<OnDisk, Here> {
        if index < self.purged_end {
            return Err(Here::Purged);
        }
        if let Some(known) = self.bad.get(&index) {
            return Err(Here::Damaged(*known));
        }
        if index >= self.end {
            return Err(Here::Beyond);
        }
        let segment = self.segments.iter().rev().find(|s| s.first_index <= index).ok_or(Here::Unreadable)?;
        let at = usize::try_from(index - segment.first_index).map_err(|_| Here::Unreadable)?;
        let located = segment.entries.get(at).ok_or(Here::Unreadable)?;
        Ok(OnDisk {
            file: Arc::clone(&segment.file),
            segment: segment.name(),
            identity: segment.identity,
            index,
            located: *located,
        })
    }
}

fn differs(question: &EntryQuestion, term: u64, payload_crc: u32) -> bool {
    question.term.is_some_and(|asked| asked != term) || question.payload_crc.is_some_and(|asked| asked != payload_crc)
}

/// Reads and verifies one frame; its kind and payload.
pub(crate) fn read_frame(on_disk: &OnDisk) -> io::Result<(EntryKind, Bytes)> {
    let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let payload_bytes = usize::try_from(on_disk.located.payload_bytes).map_err(io::Error::other)?;
    let mut bytes = vec![0; FRAME_HEADER_BYTES + payload_bytes];
    let read = on_disk.file.read_at(&mut bytes, u64::from(on_disk.located.offset))?;
    let (header, _) =
        FrameHeader::decode(&bytes, on_disk.identity).map_err(|_| wrong("the frame header does not verify"))?;
    let located = on_disk.located;
    if read < bytes.len() || header.index != on_disk.index || header.term != located.term {
        return Err(wrong("another entry's frame lies there"));
    }
    let payload = Bytes::from(bytes).slice(FRAME_HEADER_BYTES..);
    if payload_crc(&payload) != header.payload_crc || header.payload_crc != located.payload_crc {
        return Err(wrong("the payload does not verify"));
    }
    Ok((header.kind, payload))
}
