//! The bytes of a frame. Pure: no socket, no clock, no allocation that the other side decides.
//!
//! ```text
//!   0  4  magic "STMN"            40  8  boot count of the sender
//!   4  2  version                 48  2  kind of request (echoed by answers)
//!   6  1  type of frame           50  2  code of a refusal, else 0
//!   7  1  lane                    52  4  bytes of the body
//!   8 16  cluster id              56  8  request id, counted per connection from 1
//!  24  8  sender's id             64  4  CRC-32 of the body
//!  32  8  target's id             68  4  CRC-32 of bytes 0..68
//!  72 ..  body
//! ```
//!
//! Numbers are little-endian. Magic and version stay where they are in all versions to come. A node that cannot take a
//! connection at all (wrong version, too many) sends a [`Notice`] instead, whose 16 bytes never change, so that any
//! version can read it:
//!
//! ```text
//!   0  4  magic "STMX"    4  2  sender's version    6  2  version it saw, or 0
//!   8  2  code           10  2  zero               12  4  CRC-32 of bytes 0..12
//! ```

use bytes::{Buf, BufMut};

use crate::{ClusterId, Lane, Refusal, code};

/// Version of the format that this program speaks.
pub const VERSION: u16 = 1;
/// Bytes in front of each body.
pub const HEADER_BYTES: usize = 72;
/// Bytes of a notice.
pub const NOTICE_BYTES: usize = 16;

const MAGIC: [u8; 4] = *b"STMN";
const NOTICE_MAGIC: [u8; 4] = *b"STMX";
const CRC_BYTES: usize = 4;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameType {
    /// Asks for something; the only type that has a kind of its own.
    Request,
    /// The answer to the request with the same id.
    Reply,
    /// The answer "no"; the body is a message in UTF-8.
    Refusal,
    /// Asks for a sign of life. No body, request id 0.
    Ping,
    /// A sign of life, asked for or not. No body, request id 0.
    Pong,
}

/// The fixed part of a frame, without magic, version and checksum of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the frame is.
    pub frame: FrameType,
    /// The lane its connection was opened for.
    pub lane: Lane,
    /// The sender's cluster.
    pub cluster_id: ClusterId,
    /// The sender's Raft id, 0 for none.
    pub sender_id: u64,
    /// The Raft id of the node that is meant, 0 for unknown.
    pub target_id: u64,
    /// The sender's boot count.
    pub boot: u64,
    /// Kind of the request.
    pub kind: u16,
    /// Code of a refusal, else 0.
    pub code: u16,
    /// Matches answers with requests.
    pub request_id: u64,
    /// Length of the body.
    pub body_bytes: u32,
    /// Checksum of the body.
    pub body_crc: u32,
}

/// What stands at the front of a stream of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// A header; its body follows.
    Frame(Header),
    /// The other side takes nothing on this connection.
    Notice(Notice),
}

/// Sent instead of any frame by a node that takes nothing on a connection: no request on it was handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Version that the sender of the notice speaks.
    pub version: u16,
    /// Version of the frame it met, 0 when it met none.
    pub version_seen: u16,
    /// [`code::VERSION`] or [`code::BUSY`].
    pub code: u16,
}

/// Why bytes are no frame. The connection they came from is of no use any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Not this protocol at all, or out of step.
    #[error("the bytes do not begin with a frame")]
    Magic,
    /// A frame of another version.
    #[error("a frame in version {seen}, this node speaks version {VERSION}")]
    Version {
        /// Version the frame names.
        seen: u16,
    },
    /// The header's checksum does not match.
    #[error("the header is damaged")]
    HeaderDamaged,
    /// The body's checksum or length does not match.
    #[error("the body of request {request_id} is damaged")]
    BodyDamaged {
        /// Id of the request from the intact header.
        request_id: u64,
    },
    /// Checksums match and the content makes no sense: another program's idea of the format.
    #[error("a frame with an impossible {what}")]
    Malformed {
        /// The field at fault.
        what: &'static str,
    },
}

impl FrameType {
    fn to_byte(self) -> u8 {
        match self {
            FrameType::Request => 1,
            FrameType::Reply => 2,
            FrameType::Refusal => 3,
            FrameType::Ping => 4,
            FrameType::Pong => 5,
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        [FrameType::Request, FrameType::Reply, FrameType::Refusal, FrameType::Ping, FrameType::Pong]
            .into_iter()
            .find(|frame| frame.to_byte() == byte)
    }
}

fn lane_to_byte(lane: Lane) -> u8 {
    match lane {
        Lane::Control => 1,
        Lane::Log => 2,
        Lane::Bulk => 3,
    }
}

fn lane_from_byte(byte: u8) -> Option<Lane> {
    [Lane::Control, Lane::Log, Lane::Bulk].into_iter().find(|lane| lane_to_byte(*lane) == byte)
}

impl Header {
    /// The header's bytes, with length and checksum of `body` in place of the fields in `self`.
    ///
    /// `body` is at most `u32::MAX` bytes long, which every limit of this crate ensures.
    pub fn seal(&self, body: &[u8]) -> [u8; HEADER_BYTES] {
        let body_bytes = u32::try_from(body.len());
        assert!(body_bytes.is_ok(), "a body of {} bytes passed the limits", body.len());
        let body_bytes = body_bytes.unwrap_or_default();
        let mut bytes = [0; HEADER_BYTES];
        let mut at: &mut [u8] = &mut bytes;
        at.put_slice(&MAGIC);
        at.put_u16_le(VERSION);
        at.put_u8(self.frame.to_byte());
        at.put_u8(lane_to_byte(self.lane));
        at.put_slice(&self.cluster_id);
        at.put_u64_le(self.sender_id);
        at.put_u64_le(self.target_id);
        at.put_u64_le(self.boot);
        at.put_u16_le(self.kind);
        at.put_u16_le(self.code);
        at.put_u32_le(body_bytes);
        at.put_u64_le(self.request_id);
        at.put_u32_le(crc32fast::hash(body));
        seal_with_crc(&mut bytes);
        bytes
    }

    /// Whether `body` is the one that this header announced.
    pub fn check_body(&self, body: &[u8]) -> Result<(), WireError> {
        if body.len() as u64 == u64::from(self.body_bytes) && crc32fast::hash(body) == self.body_crc {
            Ok(())
        } else {
            Err(WireError::BodyDamaged { request_id: self.request_id })
        }
    }
}

impl Notice {
    /// A notice from this program.
    pub fn new(code: u16, version_seen: u16) -> Self {
        Notice { version: VERSION, version_seen, code }
    }

    /// Its bytes.
    pub fn seal(&self) -> [u8; NOTICE_BYTES] {
        let mut bytes = [0; NOTICE_BYTES];
        let mut at: &mut [u8] = &mut bytes;
        at.put_slice(&NOTICE_MAGIC);
        at.put_u16_le(self.version);
        at.put_u16_le(self.version_seen);
        at.put_u16_le(self.code);
        seal_with_crc(&mut bytes);
        bytes
    }

    /// The notice as the refusal of each request that was sent on the connection.
    pub fn to_refusal(self) -> Refusal {
        let message = match self.code {
            code::VERSION => format!(
                "the other node speaks version {} of the format and was met with version {}",
                self.version, self.version_seen
            ),
            code::BUSY => "the other node has as many connections as it takes".to_owned(),
            other => format!("the other node takes no requests on this connection (code {other})"),
        };
        Refusal::new(self.code, message)
    }
}

/// Reads what `bytes` begin with. `None`: intact so far, more bytes are needed. Bytes after the header (or notice) are
/// not looked at; wrong ones are refused as early as they can be told.
pub fn read_start(bytes: &[u8]) -> Result<Option<Start>, WireError> {
    let prefix_of = |magic: &[u8; 4]| magic.iter().zip(bytes).all(|(want, got)| want == got);
    if prefix_of(&MAGIC) {
        if let Some(version) = bytes.get(4..6).and_then(|field| field.try_into().ok()).map(u16::from_le_bytes)
            && version != VERSION
        {
            return Err(WireError::Version { seen: version });
        }
        bytes.first_chunk().map(|header| read_header(header).map(Start::Frame)).transpose()
    } else if prefix_of(&NOTICE_MAGIC) {
        bytes.first_chunk().map(|notice| read_notice(notice).map(Start::Notice)).transpose()
    } else {
        Err(WireError::Magic)
    }
}

fn read_header(bytes: &[u8; HEADER_BYTES]) -> Result<Header, WireError> {
    if !crc_matches(bytes) {
        return Err(WireError::HeaderDamaged);
    }
    let mut at: &[u8] = bytes;
    at.advance(MAGIC.len() + size_of::<u16>());
    let frame = FrameType::from_byte(at.get_u8()).ok_or(WireError::Malformed { what: "type" })?;
    let lane = lane_from_byte(at.get_u8()).ok_or(WireError::Malformed { what: "lane" })?;
    let mut cluster_id = [0; 16];
    at.copy_to_slice(&mut cluster_id);
    let header = Header {
        frame,
        lane,
        cluster_id,
        sender_id: at.get_u64_le(),
        target_id: at.get_u64_le(),
        boot: at.get_u64_le(),
        kind: at.get_u16_le(),
        code: at.get_u16_le(),
        body_bytes: at.get_u32_le(),
        request_id: at.get_u64_le(),
        body_crc: at.get_u32_le(),
    };
    let is_sign_of_life = matches!(frame, FrameType::Ping | FrameType::Pong);
    if is_sign_of_life && header.body_bytes != 0 {
        return Err(WireError::Malformed { what: "body" });
    }
    if is_sign_of_life != (header.request_id == 0) {
        return Err(WireError::Malformed { what: "request id" });
    }
    if frame != FrameType::Refusal && header.code != 0 {
        return Err(WireError::Malformed { what: "code" });
    }
    Ok(header)
}

fn read_notice(bytes: &[u8; NOTICE_BYTES]) -> Result<Notice, WireError> {
    if !crc_matches(bytes) {
        return Err(WireError::HeaderDamaged);
    }
    let mut at: &[u8] = bytes;
    at.advance(NOTICE_MAGIC.len());
    Ok(Notice { version: at.get_u16_le(), version_seen: at.get_u16_le(), code: at.get_u16_le() })
}

/// Writes the checksum of all bytes before the last four into these.
fn seal_with_crc(bytes: &mut [u8]) {
    let (covered, crc) = bytes.split_at_mut(bytes.len() - CRC_BYTES);
    crc.copy_from_slice(&crc32fast::hash(covered).to_le_bytes());
}

fn crc_matches(bytes: &[u8]) -> bool {
    let (covered, crc) = bytes.split_at(bytes.len() - CRC_BYTES);
    *crc == crc32fast::hash(covered).to_le_bytes()
}
