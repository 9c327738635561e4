//! A log that waits for what its peers know before it opens.
//!
//! [`WalStore::begin_open`](crate::WalStore::begin_open) hands it out; its owner asks the peers [`PendingLog::questions`]
//! and brings the answers to [`PendingLog::resolve`], as often as it takes. Nothing is written before every question is
//! decided; meanwhile the log answers the questions of others.

use std::{collections::BTreeMap, io, sync::Arc};

use crate::{
    disk::{Disk, FolderLock},
    error::{Damage, OpenError},
    fail_point,
    frame::{EntryKind, FRAME_HEADER_BYTES, FrameHeader, log_id, payload_crc, term_of},
    joined::{Bad, Trouble},
    mend::{Mended, mend},
    open::{self, Looked, Opened},
    options::WalOptions,
    repair::{
        Case, Electorate, EntryAnswer, EntryCopy, EntryId, EntryQuestion, LostLog, Proof, Resolution, Vote, resolve,
    },
    source::{EntrySource, read_frame},
    types::{LogId, StoredMembership},
};

/// When the entry is known by the next frame's link alone, the frame's two marks must be guessed to compare it; more
/// guesses than this would make a match mean too little.
const GUESSES_MAX: u64 = 4096;

/// What opening came to.
pub(crate) enum Step {
    /// The log is whole.
    Opened(Box<Opened>),
    /// Peers must be asked.
    Ask(Box<PendingLog>),
    /// Beyond repair.
    Lost(LostLog),
}

/// A log that lacks entries.
pub struct PendingLog {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) options: WalOptions,
    lock: Box<dyn FolderLock>,
    looked: Looked,
    /// Damaged entries that must be decided on, ascending.
    needs: Vec<u64>,
    damage: Vec<Damage>,
    /// Copies that were proved to be the entries.
    fetched: BTreeMap<u64, EntryCopy>,
    source: EntrySource,
}

impl std::fmt::Debug for PendingLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PendingLog").field("needs", &self.needs).field("fetched", &self.fetched.len()).finish()
    }
}

/// Looks at a log and opens it if it lacks nothing.
pub(crate) fn begin(disk: Arc<dyn Disk>, options: WalOptions) -> Result<Step, OpenError> {
    let lock = open::lock_folder(&*disk, &options.dir)?;
    let looked = match open::look(&*disk, &options) {
        Ok(looked) => looked,
        Err(Trouble::Error(error)) => return Err(error),
        Err(Trouble::Lost(lost)) => return Ok(Step::Lost(lost)),
    };
    let mut damage: Vec<Damage> = looked.lacking.repair.iter().chain(&looked.lacking.ask).cloned().collect();
    damage.sort_by_key(|d| d.index);
    let needs: Vec<u64> = damage.iter().map(|d| d.index).collect();
    if needs.is_empty() {
        let end = looked.lacking.first_cut.unwrap_or(looked.log.end());
        assert!(end >= looked.log.durable_end.min(looked.log.end()), "a cut at {end} below the durable end");
        return done(open::finish(&*disk, &options.dir, lock, looked, end));
    }
    let source = EntrySource::pending(&looked.log, looked.hard.purged);
    Ok(Step::Ask(Box::new(PendingLog { disk, options, lock, looked, needs, damage, fetched: BTreeMap::new(), source })))
}

fn done(opened: Result<Opened, Trouble>) -> Result<Step, OpenError> {
    match opened {
        Ok(opened) => Ok(Step::Opened(Box::new(opened))),
        Err(Trouble::Error(error)) => Err(error),
        Err(Trouble::Lost(lost)) => Ok(Step::Lost(lost)),
    }
}

impl PendingLog {
    /// Where the log is not as it was written.
    pub fn damage(&self) -> &[Damage] {
        &self.damage
    }

    /// How many entries have been fetched, and of how many.
    pub fn progress(&self) -> (usize, usize) {
        (self.fetched.len(), self.needs.len())
    }

    /// Whether any of the damage is below D.
    pub fn lacks_durable(&self) -> bool {
        !self.looked.lacking.repair.is_empty()
    }

    /// What the log is short of, as the error of an opener that cannot ask.
    pub(crate) fn into_error(self) -> OpenError {
        let Looked { lacking, .. } = self.looked;
        if lacking.repair.is_empty() { OpenError::Ask(lacking.ask) } else { OpenError::Repair(lacking.repair) }
    }

    /// Answers the questions of others meanwhile.
    pub fn source(&self) -> EntrySource {
        self.source.clone()
    }

    /// The vote that this node gave; nobody can restore it.
    pub fn vote(&self) -> Option<crate::types::Vote> {
        self.looked.hard.vote
    }

    /// What is still to be asked, oldest first.
    pub fn questions(&self) -> Vec<EntryQuestion> {
        let mut questions: Vec<EntryQuestion> = Vec::new();
        let mut anchor = None;
        for index in self.needs.iter().rev() {
            if let Some(id) = self.id_at(index + 1) {
                anchor = Some(id);
            }
            if self.fetched.contains_key(index) {
                continue;
            }
            questions.push(self.question(*index, anchor));
        }
        questions.reverse();
        questions
    }

    fn question(&self, index: u64, anchor: Option<EntryId>) -> EntryQuestion {
        let bad = self.looked.log.bad(index);
        let known = bad.and_then(|b| b.found.known);
        EntryQuestion {
            index,
            term: known.map(|k| k.term).or_else(|| bad.and_then(|b| b.term)),
            payload_crc: known.map(|k| k.payload_crc),
            header_crc: bad.and_then(|b| b.found.header_crc.or(b.link)),
            durable: index < self.looked.log.durable_end,
            anchor,
        }
    }

    /// One more than the last entry that may be kept, as far as the log itself says.
    fn end(&self) -> u64 {
        self.looked.lacking.first_cut.unwrap_or(self.looked.log.end())
    }

    /// The identity of a kept entry, fetched ones included.
    fn id_at(&self, index: u64) -> Option<EntryId> {
        if index >= self.end() {
            return None;
        }
        if let Some(copy) = self.fetched.get(&index) {
            return Some(copy.id());
        }
        let known = self.looked.log.known(index)?;
        Some(EntryId { index, term: known.term, payload_crc: Some(known.payload_crc) })
    }

    /// Whether a copy continues the entry before it here; `None` when that one is not known here or there.
    fn continues(&self, copy: &EntryCopy) -> Option<bool> {
        let Some(previous) = copy.index.checked_sub(1) else { return Some(true) };
        if copy.committed && previous < self.looked.log.committed_end {
            return Some(true);
        }
        let purged = self.looked.hard.purged.filter(|id| id.index() == previous);
        let here = match purged {
            Some(id) => EntryId { index: previous, term: term_of(&id), payload_crc: None },
            None => match self.id_at(previous) {
                Some(id) => id,
                // The log began here, and what is before it was never in it.
                None if copy.index == self.looked.hard.start && self.looked.hard.start > 0 => return Some(true),
                None => return None,
            },
        };
        // The other log may have lost that one itself.
        copy.previous.map(|there| there.agrees(&here))
    }

    /// What an answer means for a question.
    fn vote_of(&self, question: &EntryQuestion, answer: &EntryAnswer) -> Vote {
        let copy = match answer {
            EntryAnswer::Have(copy) => copy,
            EntryAnswer::Covered => return Vote::Covered,
            EntryAnswer::Never { .. } => return Vote::Never,
            EntryAnswer::Unknown => return Vote::Unknown,
        };
        let vote = |proof| Vote::Copy { proof, term: copy.term, committed: copy.committed };
        let fits = copy.index == question.index && copy.kind().is_some_and(|kind| is_well_formed(kind, &copy.payload));
        // The checksum of a payload does not cover its kind; an intact header says that too.
        let known = self.looked.log.bad(question.index).and_then(|bad| bad.found.known);
        let is_of_another_kind = known.and_then(|known| known.kind).is_some_and(|kind| Some(kind) != copy.kind());
        if !fits || is_of_another_kind {
            return Vote::Unknown;
        }
        match (question.term, question.payload_crc) {
            (Some(term), Some(crc)) => {
                return if (term, crc) == (copy.term, payload_crc(&copy.payload)) {
                    vote(Proof::Same)
                } else {
                    Vote::Never
                };
            }
            (Some(term), None) if term != copy.term => return Vote::Never,
            _ => {}
        }
        // Of each index only one entry is ever committed.
        if copy.committed && copy.index < self.looked.log.committed_end {
            return vote(Proof::Same);
        }
        if self.is_linked(copy) {
            return vote(Proof::Same);
        }
        let continues = self.continues(copy);
        if question.anchor.is_some() {
            // Two logs that share an entry share all below it: the rule that Raft itself rests on.
            return match (copy.has_anchor, continues) {
                (true, Some(true)) => vote(Proof::Same),
                (true, Some(false)) => Vote::Contradicts,
                (true, None) | (false, _) => Vote::Unknown,
            };
        }
        let own_term = self.looked.hard.vote.map(|vote| vote.leader_id.term).unwrap_or_default();
        match continues {
            // Of a later term than this node ever knew, or of a log that differs before it: not what was here.
            _ if copy.term > own_term => Vote::Never,
            Some(false) => Vote::Never,
            Some(true) => vote(Proof::Continues),
            None => Vote::Unknown,
        }
    }

    /// Whether the copy's frame would have the header checksum that the next frame carries on.
    fn is_linked(&self, copy: &EntryCopy) -> bool {
        self.linked_marks(copy).unwrap_or_default()
    }

    fn linked_marks(&self, copy: &EntryCopy) -> Option<bool> {
        let log = &self.looked.log;
        let bad = log.bad(copy.index)?;
        let link = bad.found.header_crc.or(bad.link)?;
        let owner = log.owner(copy.index)?;
        let first = log.details.get(owner)?.header;
        let header_at = |index: u64| {
            let (segment, located) = log.located(index)?;
            let mut bytes = [0; FRAME_HEADER_BYTES];
            segment.file.read_at(&mut bytes, u64::from(located.offset)).ok()?;
            FrameHeader::decode(&bytes, segment.identity).ok().map(|(header, _)| header)
        };
        let before = copy.index.checked_sub(1).and_then(header_at);
        let after = header_at(copy.index + 1);
        let previous_crc = match copy.index == first.first_index {
            true => first.previous_crc,
            false => log.header_crc(copy.index - 1)?,
        };
        // All frames of a group carry the index of its first one.
        let synced = match &after {
            Some(after) if after.synced_end <= copy.index => vec![after.synced_end],
            _ => vec![copy.index, before.map(|h| h.synced_end).unwrap_or(first.first_index)],
        };
        let committed = before.map(|h| h.committed_end).unwrap_or_default()..=after.map(|h| h.committed_end)?;
        if committed.end().saturating_sub(*committed.start()) > GUESSES_MAX {
            return None;
        }
        let mut header = FrameHeader {
            kind: copy.kind()?,
            payload_bytes: u32::try_from(copy.payload.len()).ok()?,
            previous_crc,
            term: copy.term,
            index: copy.index,
            synced_end: 0,
            committed_end: 0,
            payload_crc: payload_crc(&copy.payload),
        };
        let matches = |synced_end: u64, committed_end: u64| {
            (header.synced_end, header.committed_end) = (synced_end, committed_end);
            header.encode(first.identity).1 == link
        };
        let mut matches = matches;
        Some(synced.into_iter().any(|s| committed.clone().any(|c| matches(s, c))))
    }

    /// The voters whose word counts: those of the last membership below the first question, and of every later one
    /// that the log still has. `applied` is the membership of the node's state.
    pub fn electorate(&self, own: Option<u64>, applied: &StoredMembership) -> Result<Electorate, OpenError> {
        let mut voters: std::collections::BTreeSet<u64> = applied.membership().voter_ids().collect();
        let applied_at = applied.log_id().map(|id| id.index());
        let first = self.needs.first().copied().unwrap_or(u64::MAX);
        let failed =
            |source| OpenError::Io { operation: "read a membership in", path: self.options.dir.clone(), source };
        for (id, membership) in self.memberships().map_err(failed)? {
            if applied_at.is_some_and(|at| id.index() <= at) {
                continue;
            }
            if id.index() < first {
                voters.clear();
            }
            voters.extend(membership.voter_ids());
        }
        Ok(Electorate { own, voters })
    }

    /// Every node that a membership of the log or of the state names, with the newest address of each: whom to ask.
    pub fn members(&self, applied: &StoredMembership) -> Result<BTreeMap<u64, crate::types::Member>, OpenError> {
        let mut members: BTreeMap<_, _> = applied.nodes().map(|(id, member)| (*id, member.clone())).collect();
        let failed =
            |source| OpenError::Io { operation: "read a membership in", path: self.options.dir.clone(), source };
        for (_, membership) in self.memberships().map_err(failed)? {
            members.extend(membership.nodes().map(|(id, member)| (*id, member.clone())));
        }
        Ok(members)
    }

    /// Memberships that the log has, those of fetched entries included, oldest first.
    fn memberships(&self) -> io::Result<Vec<(LogId, openraft::Membership<u64, crate::types::Member>)>> {
        let mut found = BTreeMap::new();
        for index in self.looked.log.memberships.iter().filter(|index| **index < self.end()) {
            let Some((segment, located)) = self.looked.log.located(*index) else { continue };
            let on_disk = crate::index::OnDisk {
                file: Arc::clone(&segment.file),
                segment: segment.name(),
                identity: segment.identity,
                index: *index,
                located,
            };
            let (_, payload) = read_frame(&on_disk)?;
            found.insert(*index, (located.term, payload));
        }
        for (index, copy) in self.fetched.iter().filter(|(_, copy)| copy.kind() == Some(EntryKind::Membership)) {
            found.insert(*index, (copy.term, copy.payload.clone()));
        }
        let decode = |(index, (term, payload)): (u64, (u64, bytes::Bytes))| {
            let membership = crate::codec::decode(&payload).map_err(io::Error::other)?;
            Ok((log_id(term, index), membership))
        };
        found.into_iter().map(decode).collect()
    }

    /// Decides with what the others said. `answers` are (node, index, answer); a later one of a node replaces its
    /// earlier one. Only when everything is decided anything is written; a repair whose write, sync or
    /// read-back fails is not tried again and makes the log a lost one.
    pub fn resolve(
        self,
        answers: &[(u64, u64, EntryAnswer)],
        electorate: &Electorate,
    ) -> Result<crate::OpenStep, OpenError> {
        let (disk, options) = (Arc::clone(&self.disk), self.options.clone());
        crate::store::start(self.step(answers, electorate)?, disk, options)
    }

    fn step(mut self, answers: &[(u64, u64, EntryAnswer)], electorate: &Electorate) -> Result<Step, OpenError> {
        if electorate.is_alone() {
            return self.alone();
        }
        let others: Vec<u64> = electorate.others().collect();
        let mut given: BTreeMap<(u64, u64), &EntryAnswer> = BTreeMap::new();
        for (node, index, answer) in answers.iter().filter(|(node, ..)| Some(*node) != electorate.own) {
            given.insert((*index, *node), answer);
        }
        let mut cut = None;
        let mut waits = false;
        // What was fetched just now may have changed who the voters are.
        let mut voters_are_known = true;
        for question in self.questions() {
            let index = question.index;
            let said: Vec<(u64, &EntryAnswer)> =
                given.range((index, 0)..=(index, u64::MAX)).map(|((_, node), answer)| (*node, *answer)).collect();
            let strangers = said.iter().filter(|(node, _)| !electorate.voters.contains(node)).map(|(node, _)| *node);
            let nodes: Vec<u64> = others.iter().copied().chain(strangers).collect();
            let of = |node: &u64| said.iter().find(|(n, _)| n == node).map(|(_, answer)| *answer);
            let votes: Vec<Vote> =
                nodes.iter().map(|n| of(n).map_or(Vote::Unknown, |answer| self.vote_of(&question, answer))).collect();
            let nameless = question.payload_crc.is_none() && question.anchor.is_none();
            let case = Case { durable: question.durable, voters_are_known, nameless };
            match resolve(case, &votes, others.len()) {
                Resolution::Take(at) => {
                    let Some(EntryAnswer::Have(copy)) = nodes.get(at).and_then(of) else { continue };
                    voters_are_known &= copy.kind() != Some(EntryKind::Membership);
                    self.fetched.insert(index, copy.clone());
                }
                Resolution::Cut => {
                    cut = Some(index);
                    break;
                }
                Resolution::Rebuild => {
                    let why = format!(
                        "entry {index} is damaged and single entries of the peers cannot repair it: it is in their \
                         checkpoints only, or this log has lost more than it shows"
                    );
                    return Ok(Step::Lost(LostLog { why, damage: self.damage }));
                }
                Resolution::Wait => {
                    waits = true;
                    // Whatever hides there may be a change of the voters.
                    voters_are_known = false;
                }
            }
        }
        let bytes: u64 = self.fetched.values().map(|copy| copy.payload.len() as u64).sum();
        if bytes > self.options.segment_bytes {
            let why = format!("{bytes} bytes of entries are damaged, more than a segment holds");
            return Ok(Step::Lost(LostLog { why, damage: self.damage }));
        }
        if waits && cut.is_none() {
            return Ok(Step::Ask(Box::new(self)));
        }
        self.apply(cut)
    }

    /// Everything is decided: write what was fetched, cut what goes.
    fn apply(self, cut: Option<u64>) -> Result<Step, OpenError> {
        let Self { disk, options, lock, mut looked, fetched, damage, .. } = self;
        let end = cut.or(looked.lacking.first_cut).unwrap_or(looked.log.end());
        let fetched: BTreeMap<u64, EntryCopy> = fetched.into_iter().filter(|(index, _)| *index < end).collect();
        let lost = |why: String| Ok(Step::Lost(LostLog { why, damage: damage.clone() }));
        let indexes: Vec<u64> = fetched.keys().copied().collect();
        fail_point::own("repair.fetched");
        let mended = mend(&*disk, &options, &mut looked, &fetched, end);
        fail_point::own("repair.mended");
        match mended {
            Ok(Mended::InPlace) => {
                looked.report.repaired = indexes;
                done(open::finish(&*disk, &options.dir, lock, looked, end))
            }
            Ok(Mended::NewSegments) => {
                let again = match open::look(&*disk, &options) {
                    Ok(looked) => looked,
                    Err(Trouble::Error(error)) => return Err(error),
                    Err(Trouble::Lost(lost)) => return Ok(Step::Lost(lost)),
                };
                let still = again.lacking.repair.iter().chain(&again.lacking.ask).find(|d| d.index < end);
                if let Some(still) = still {
                    return lost(format!("a repair was written and has not helped: {still}"));
                }
                let mut again = again;
                again.report.repaired = indexes;
                let end = cut.or(again.lacking.first_cut).unwrap_or(again.log.end());
                done(open::finish(&*disk, &options.dir, lock, again, end))
            }
            Err(error) => lost(format!("the repair of the log could not be written: {error}")),
        }
    }

    /// Nobody else votes: nothing is cut unless an operator did so.
    fn alone(self) -> Result<Step, OpenError> {
        let first = self.needs.first().copied().unwrap_or_default();
        if self.looked.log.cut_by_tool().is_some_and(|from| first >= from) {
            tracing::warn!(
                index = first,
                "the log goes on where the repair tool cut it: a single voter has nobody to ask"
            );
            return self.apply_cut_by_tool(first);
        }
        Err(self.refusal())
    }

    /// The refusal of a node that has nobody to ask, with the command that gives the damaged entries up.
    pub fn refusal(&self) -> OpenError {
        let first = self.needs.first().copied().unwrap_or_default();
        let what = self.damage.first().map(ToString::to_string).unwrap_or_default();
        let Some(bad) = self.looked.log.bad(first) else { return OpenError::Refuse(what) };
        let name = crate::index::segment_name(bad.segment);
        let command = repair_command(&self.options, &self.looked, bad);
        OpenError::Refuse(format!(
            "{what}. This is the only voter, so nobody can give it back. Entry {first} and all behind it will be lost, and \
             some of them may have been acknowledged. To give them up: {command}; then put the output in the place of \
             {name} (keep the old file), and start again"
        ))
    }

    fn apply_cut_by_tool(self, end: u64) -> Result<Step, OpenError> {
        let Self { disk, options, lock, looked, .. } = self;
        done(open::finish(&*disk, &options.dir, lock, looked, end))
    }
}

fn repair_command(options: &WalOptions, looked: &Looked, bad: &Bad) -> String {
    let name = crate::index::segment_name(bad.segment);
    let path = options.dir.join(&name);
    let index = bad.found.index;
    let previous_end = index.checked_sub(1).and_then(|previous| looked.log.located(previous));
    let offset = bad.found.offset.or(previous_end
        .filter(|(s, _)| s.number == bad.segment)
        .map(|(_, located)| u64::from(located.offset) + crate::frame::frame_bytes(located.payload_bytes)));
    let at = offset.map(|at| format!(" --truncate-at {at}")).unwrap_or_default();
    let durable = if index < looked.log.durable_end { " --lose-durable-entries" } else { "" };
    format!("stemedb-wal-repair --segment {0} --output {0}.cut{at}{durable}", path.display())
}

/// Whether a payload is what its kind says: a copy that cannot be applied is no copy.
fn is_well_formed(kind: EntryKind, payload: &bytes::Bytes) -> bool {
    crate::entry::decode(kind, 0, 0, payload.clone()).is_ok()
}
