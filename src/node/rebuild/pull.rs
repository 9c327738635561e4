//! Fetches a checkpoint from another node, piece by piece.
//!
//! Files lie in `<data>/rebuild/` under the hash of their content: whichever node they come from and whatever they are
//! called there, a file that is there is never fetched again, and a part of one goes on where it ends. Every file is
//! compared with its hash before it gets that name. One thread writes, hashes and syncs while the next pieces are on
//! their way, so that memory holds no more than those.

use std::{
    collections::{BTreeMap, VecDeque},
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use stemedb_net::{Lane, Peer};
use tokio::sync::mpsc;
use xxhash_rust::xxh3::Xxh3;

use super::{
    desk::Progress,
    messages::{FetchRequest, KnownMember, Offer, OfferRequest, Piece},
    offer::PIECE_BYTES_MAX,
    part_file::PartFile,
    strain,
    throttle::Throttle,
};
use crate::{
    node::{
        kinds::Kind,
        messages::{pack, unpack},
        peers::Peers,
    },
    state::engine::{
        checkpoint::{CheckpointFile, MANIFEST, announced_files},
        folder,
    },
};

/// Pieces under way: 8 MiB, which hides the way of a round trip.
const PIECES_IN_FLIGHT_MAX: usize = 8;
/// How long the sender may take for a piece.
const PIECE_REPLY_MAX: Duration = Duration::from_secs(30);
/// How long it may take for its offer: it writes a memtable.
const OFFER_REPLY_MAX: Duration = Duration::from_secs(30);
/// Buffer for hashing what is there already, bytes.
const HASH_BYTES: usize = 256 * 1024;

/// Why a pull ended.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The sender, or the way to it. Another attempt goes on where this one ended.
    #[error("{from}: {why}")]
    Sender {
        /// Name of the sender.
        from: String,
        /// What happened.
        why: String,
    },
    /// This node's own folder.
    #[error("{operation} {}: {source}", path.display())]
    Local {
        /// What was being done.
        operation: &'static str,
        /// With which file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

fn local(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PullError {
    let path = path.to_owned();
    move |source| PullError::Local { operation, path, source }
}

/// Where the files of checkpoints are collected.
pub fn staging(data_dir: &Path) -> PathBuf {
    data_dir.join("rebuild").join("files")
}

fn place(dir: &Path, file: &CheckpointFile) -> PathBuf {
    dir.join(format!("{:032x}-{}", file.xxh3, file.bytes))
}

fn part(dir: &Path, file: &CheckpointFile) -> PathBuf {
    dir.join(format!("{:032x}-{}.part", file.xxh3, file.bytes))
}

/// From whom to pull: the asked one alone, else replicas first and the leader last. Pure.
pub fn sources(members: &[KnownMember], own_name: &str, leader: Option<u64>, from: Option<&str>) -> Vec<KnownMember> {
    let mut others: Vec<KnownMember> = members
        .iter()
        .filter(|known| known.member.name != own_name && from.is_none_or(|name| known.member.name == name))
        .cloned()
        .collect();
    others.sort_by_key(|known| (Some(known.id) == leader, !known.voter, known.id));
    others
}

/// Fetches everything that is not there yet. Returns the manifest; its files are complete, compared and synced then.
/// `others`: those who shall not suffer.
pub async fn pull(
    peers: &Peers,
    source: &KnownMember,
    others: &[KnownMember],
    data_dir: &Path,
    throttle: &mut Throttle,
    progress: &Progress,
) -> Result<Bytes, PullError> {
    let from = source.member.name.clone();
    let sender = |why: String| PullError::Sender { from: from.clone(), why };
    let peer = peers.to(source.id, &source.member.peer_addr, Lane::Bulk);
    // Before the offer, for which its maker writes a memtable.
    let strain = strain::begin(peers, others, throttle.rate_max()).await;
    let pace = throttle.shared_pace();
    let body = pack(&OfferRequest { fresh: true }).map_err(|e| sender(e.to_string()))?;
    let answer = peer.call(Kind::CheckpointOffer.number(), body, OFFER_REPLY_MAX).await;
    let answer = answer.map_err(|e| sender(e.to_string()))?;
    let offer: Offer = unpack(&answer).map_err(|e| sender(e.to_string()))?;
    let files = announced_files(&offer.manifest).map_err(|e| sender(e.to_string()))?;
    let dir = staging(data_dir);
    progress.begin(&from, files.iter().map(|file| file.bytes).sum());

    let scanned = (dir.clone(), files.clone());
    let todo = blocking(move || missing(&scanned.0, &scanned.1)).await??;
    for file in files.iter().filter(|file| !todo.iter().any(|t| t.file.xxh3 == file.xxh3)) {
        progress.have(file.bytes);
    }
    // As many pieces as may be under way: what is written slower than it comes stops the asking.
    let (pieces, inbox) = mpsc::channel(PIECES_IN_FLIGHT_MAX);
    let wanted: Vec<Wanted> = todo.iter().map(|t| (t.file.name.clone(), t.from, t.file.bytes)).collect();
    for (_, at, _) in &wanted {
        progress.have(*at);
    }
    let writing = tokio::task::spawn_blocking(move || write_files(&dir, todo, inbox));
    let fetched = tokio::select! {
        fetched = fetch(&peer, offer.session, wanted, pieces, throttle, progress) => fetched,
        never = strain::keep(strain, peers, others, &pace) => match never {},
    };
    let written = writing.await.map_err(|e| sender(format!("the writing task died: {e}")))?;
    // What the disk says comes first: it is why the pieces were not taken.
    written.map_err(|error| match error {
        PullError::Sender { why, .. } => sender(why),
        local => local,
    })?;
    fetched.map_err(sender)?;
    Ok(offer.manifest)
}

/// Name of a file, where to go on, its length.
type Wanted = (String, u64, u64);

async fn fetch(
    peer: &Peer,
    session: u64,
    wanted: Vec<Wanted>,
    pieces: mpsc::Sender<Bytes>,
    throttle: &mut Throttle,
    progress: &Progress,
) -> Result<(), String> {
    let mut ranges = wanted.into_iter().flat_map(|(name, from, bytes)| {
        (from..bytes).step_by(PIECE_BYTES_MAX as usize).map(move |offset| (name.clone(), offset))
    });
    let mut under_way = VecDeque::with_capacity(PIECES_IN_FLIGHT_MAX);
    loop {
        while under_way.len() < PIECES_IN_FLIGHT_MAX {
            let Some((file, offset)) = ranges.next() else { break };
            let request = FetchRequest { session, file, offset, bytes: PIECE_BYTES_MAX };
            let body = pack(&request).map_err(|e| e.to_string())?;
            under_way.push_back(peer.send(Kind::CheckpointFetch.number(), body).map_err(|e| e.to_string())?);
        }
        let Some(next) = under_way.pop_front() else { return Ok(()) };
        let answer = next.wait(PIECE_REPLY_MAX).await.map_err(|e| e.to_string())?;
        let Piece { bytes, busy } = unpack(&answer).map_err(|e| e.to_string())?;
        let length = bytes.len() as u64;
        throttle.pace(length, busy).await;
        // The writer has ended with an error, which is told instead.
        pieces.send(bytes).await.map_err(|_| "the files could not be written".to_owned())?;
        progress.have(length);
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, PullError> {
    tokio::task::spawn_blocking(work).await.map_err(|e| PullError::Sender { from: String::new(), why: e.to_string() })
}

/// A file that is not complete.
struct Todo {
    file: CheckpointFile,
    /// Bytes that are there.
    from: u64,
    hasher: Box<Xxh3>,
}

/// Blocking. What has to be fetched. Everything else in the folder goes: it belongs to no file of this checkpoint.
fn missing(dir: &Path, files: &[CheckpointFile]) -> Result<Vec<Todo>, PullError> {
    folder::create_synced(dir).map_err(local("create", dir))?;
    let mut keep = BTreeMap::new();
    for file in files {
        keep.insert(place(dir, file), ());
        keep.insert(part(dir, file), ());
    }
    for entry in fs::read_dir(dir).map_err(local("read", dir))? {
        let path = entry.map_err(local("read", dir))?.path();
        if !keep.contains_key(&path) {
            fs::remove_file(&path).map_err(local("remove", &path))?;
        }
    }
    let mut todo: Vec<Todo> = Vec::new();
    for file in files {
        // Files of the same content are fetched once.
        if todo.iter().any(|t| t.file.xxh3 == file.xxh3 && t.file.bytes == file.bytes) {
            continue;
        }
        let done = place(dir, file);
        match folder::hash(&done) {
            Ok(found) if found == (file.bytes, file.xxh3) => continue,
            Ok(_) => fs::remove_file(&done).map_err(local("remove", &done))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(local("read", &done)(error)),
        }
        let part = part(dir, file);
        let (from, hasher) = begun(&part, file.bytes).map_err(local("read", &part))?;
        todo.push(Todo { file: file.clone(), from, hasher });
    }
    Ok(todo)
}

/// How much of a part is there, in whole pieces, and the hash so far.
fn begun(part: &Path, bytes: u64) -> io::Result<(u64, Box<Xxh3>)> {
    let mut hasher = Box::new(Xxh3::new());
    let mut file = match File::open(part) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((0, hasher)),
        Err(error) => return Err(error),
    };
    let length = file.metadata()?.len().min(bytes);
    let mut left = length - length % u64::from(PIECE_BYTES_MAX);
    let from = left;
    let mut buffer = vec![0; HASH_BYTES];
    while left > 0 {
        let want = usize::try_from(left).unwrap_or(usize::MAX).min(HASH_BYTES);
        let Some(chunk) = buffer.get_mut(..want) else { break };
        file.read_exact(chunk)?;
        hasher.update(chunk);
        left -= want as u64;
    }
    Ok((from, hasher))
}

/// Blocking. Writes the pieces, which come in the order of `todo`.
fn write_files(dir: &Path, todo: Vec<Todo>, mut pieces: mpsc::Receiver<Bytes>) -> Result<(), PullError> {
    for Todo { file, from, mut hasher } in todo {
        let path = part(dir, &file);
        let mut out = PartFile::open(&path, from).map_err(local("open", &path))?;
        let mut at = from;
        while at < file.bytes {
            let Some(piece) = pieces.blocking_recv() else {
                // Broken off: what is whole stays, for the next attempt.
                return Ok(());
            };
            let expected = (file.bytes - at).min(u64::from(PIECE_BYTES_MAX));
            if piece.len() as u64 != expected {
                let why = format!("{} bytes of {:?} at {at} instead of {expected}", piece.len(), file.name);
                return Err(PullError::Sender { from: String::new(), why });
            }
            out.add(&path, &piece).map_err(|error| discard(&path, "write", error))?;
            hasher.update(&piece);
            at += expected;
        }
        if hasher.digest128() != file.xxh3 {
            drop(out);
            fs::remove_file(&path).map_err(local("remove", &path))?;
            let why = format!("{:?} is not what its hash says; fetching it again", file.name);
            return Err(PullError::Sender { from: String::new(), why });
        }
        out.finish().map_err(|error| discard(&path, "sync", error))?;
        let done = place(dir, &file);
        fs::rename(&path, &done).map_err(local("rename to", &done))?;
    }
    folder::sync(dir).map_err(local("sync", dir))
}

/// A write or a sync of a part has failed: nothing is written to it or synced again, and it is not gone on with.
fn discard(part: &Path, operation: &'static str, source: io::Error) -> PullError {
    if let Err(error) = fs::remove_file(part) {
        tracing::warn!(%error, part = %part.display(), "a part of a file that could not be written stays");
    }
    local(operation, part)(source)
}

/// Blocking. Puts the fetched files together as a checkpoint in `into`, which is replaced. The manifest comes last.
pub fn assemble(data_dir: &Path, manifest: &[u8], into: &Path) -> Result<(), PullError> {
    let dir = staging(data_dir);
    let files = announced_files(manifest)
        .map_err(|e| PullError::Sender { from: "the kept manifest".into(), why: e.to_string() })?;
    folder::remove(into).map_err(local("remove", into))?;
    let tables = into.join("tables");
    folder::create_synced(&tables).map_err(local("create", &tables))?;
    for file in &files {
        let to = into.join(&file.name);
        folder::link_or_copy(&place(&dir, file), &to).map_err(local("link", &to))?;
    }
    folder::sync(&tables).map_err(local("sync", &tables))?;
    folder::sync(into).map_err(local("sync", into))?;
    let path = into.join(MANIFEST);
    folder::replace_synced(&path, manifest).map_err(local("write", &path))?;
    into.parent().map_or(Ok(()), folder::sync).map_err(local("sync", into))
}

/// Shares what a puller needs of its node.
pub type SharedProgress = Arc<Progress>;

#[cfg(test)]
#[path = "pull_tests.rs"]
mod tests;
