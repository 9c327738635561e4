//! The bytes of frames and notices: frozen, and safe against every kind of damage.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use rand::{Rng, SeedableRng, rngs::StdRng};
use stemedb_net::{
    Lane, code,
    wire::{FrameType, HEADER_BYTES, Header, NOTICE_BYTES, Notice, Start, VERSION, WireError, read_start},
};

const BODY: &[u8] = b"body";

fn header() -> Header {
    Header {
        frame: FrameType::Request,
        lane: Lane::Log,
        cluster_id: *b"0123456789abcdef",
        sender_id: 0x1112_1314_1516_1718,
        target_id: 0x2122_2324_2526_2728,
        boot: 0x3132_3334_3536_3738,
        kind: 0x4142,
        code: 0,
        request_id: 0x5152_5354_5556_5758,
        body_bytes: 4,
        body_crc: 0,
    }
}

/// A frame as its receiver sees it: header and body, or why not. `Ok(None)`: more bytes are needed.
fn read_frame(bytes: &[u8]) -> Result<Option<(Header, Vec<u8>)>, WireError> {
    let Some(start) = read_start(bytes)? else { return Ok(None) };
    let Start::Frame(header) = start else { panic!("a frame was read as a notice") };
    let Some(body) = bytes.get(HEADER_BYTES..HEADER_BYTES + header.body_bytes as usize) else { return Ok(None) };
    header.check_body(body)?;
    Ok(Some((header, body.to_vec())))
}

/// Puts a matching checksum over a header that was tampered with, as a hostile sender would.
fn reseal(bytes: &mut [u8]) {
    let crc = crc32fast::hash(&bytes[..HEADER_BYTES - 4]);
    bytes[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn golden_frame() {
    let bytes = [&header().seal(BODY)[..], BODY].concat();
    let want: &[&[u8]] = &[
        b"STMN",
        &[1, 0],
        &[1],
        &[2],
        b"0123456789abcdef",
        &[0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11],
        &[0x28, 0x27, 0x26, 0x25, 0x24, 0x23, 0x22, 0x21],
        &[0x38, 0x37, 0x36, 0x35, 0x34, 0x33, 0x32, 0x31],
        &[0x42, 0x41],
        &[0, 0],
        &[4, 0, 0, 0],
        &[0x58, 0x57, 0x56, 0x55, 0x54, 0x53, 0x52, 0x51],
        &GOLDEN_BODY_CRC,
        &GOLDEN_HEADER_CRC,
        b"body",
    ];
    assert_eq!(bytes, want.concat());
    let (read, body) = read_frame(&bytes).unwrap().unwrap();
    assert_eq!(read, Header { body_crc: u32::from_le_bytes(GOLDEN_BODY_CRC), ..header() });
    assert_eq!(body, BODY);
}

/// Computed with another implementation, Python's `zlib.crc32`.
const GOLDEN_BODY_CRC: [u8; 4] = [0xb2, 0x0b, 0xa8, 0xdb];
const GOLDEN_HEADER_CRC: [u8; 4] = [0xe3, 0xc4, 0x7a, 0xf5];

#[test]
fn golden_notice() {
    let notice = Notice { version: 1, version_seen: 2, code: code::VERSION };
    let bytes = notice.seal();
    let want: &[&[u8]] = &[b"STMX", &[1, 0], &[2, 0], &[7, 0], &[0, 0], &GOLDEN_NOTICE_CRC];
    assert_eq!(bytes.as_slice(), want.concat());
    assert_eq!(read_start(&bytes), Ok(Some(Start::Notice(notice))));
}

const GOLDEN_NOTICE_CRC: [u8; 4] = [0x67, 0x16, 0x2c, 0x46];

#[test]
fn every_type_and_lane_comes_back() {
    for lane in [Lane::Control, Lane::Log, Lane::Bulk] {
        for frame in [FrameType::Request, FrameType::Reply, FrameType::Refusal] {
            let code = if frame == FrameType::Refusal { 100 } else { 0 };
            let bytes = [&Header { frame, lane, code, ..header() }.seal(BODY)[..], BODY].concat();
            let (read, _) = read_frame(&bytes).unwrap().unwrap();
            assert_eq!((read.frame, read.lane, read.code), (frame, lane, code));
        }
        for frame in [FrameType::Ping, FrameType::Pong] {
            let bytes = Header { frame, lane, request_id: 0, ..header() }.seal(&[]);
            assert_eq!(read_frame(&bytes).unwrap().unwrap().0.frame, frame);
        }
    }
}

#[test]
fn no_changed_byte_gives_another_frame() {
    let intact = [&header().seal(BODY)[..], BODY].concat();
    for at in 0..intact.len() {
        for change in 1..=255 {
            let mut bytes = intact.clone();
            bytes[at] ^= change;
            assert!(read_frame(&bytes).is_err(), "byte {at} changed by {change:#x}");
        }
    }
}

#[test]
fn no_changed_byte_gives_another_notice() {
    let intact = Notice::new(code::BUSY, 0).seal();
    for at in 0..NOTICE_BYTES {
        for change in 1..=255 {
            let mut bytes = intact;
            bytes[at] ^= change;
            assert!(!matches!(read_start(&bytes), Ok(Some(_))), "byte {at} changed by {change:#x}");
        }
    }
}

#[test]
fn a_frame_cut_short_is_never_complete() {
    let intact = [&header().seal(BODY)[..], BODY].concat();
    for length in 0..intact.len() {
        assert_eq!(read_frame(&intact[..length]), Ok(None), "cut to {length}");
    }
    let notice = Notice::new(code::BUSY, 0).seal();
    for length in 0..NOTICE_BYTES {
        assert_eq!(read_start(&notice[..length]), Ok(None), "cut to {length}");
    }
}

#[test]
fn garbage_is_refused_with_its_first_bytes() {
    let mut random = StdRng::seed_from_u64(1);
    for _ in 0..10_000 {
        let length = random.random_range(4..200);
        let mut bytes = vec![0; length];
        random.fill(bytes.as_mut_slice());
        assert_eq!(read_start(&bytes), Err(WireError::Magic));
        // Worse: garbage that begins as a frame or a notice does.
        for magic in [b"STMN\x01\x00".as_slice(), b"STMX"] {
            let bytes = [magic, &bytes].concat();
            assert!(!matches!(read_start(&bytes), Ok(Some(_))));
        }
    }
}

#[test]
fn a_checksum_does_not_excuse_nonsense() {
    let refused = |at: usize, value: u8, what: &str| {
        let mut bytes = header().seal(BODY);
        bytes[at] = value;
        reseal(&mut bytes);
        assert!(matches!(read_start(&bytes), Err(WireError::Malformed { what: got }) if got == what), "{what}");
    };
    refused(6, 0, "type");
    refused(6, 6, "type");
    refused(7, 0, "lane");
    refused(7, 4, "lane");
    refused(50, 1, "code");
    refused(6, 4, "body");
    let no_id = Header { request_id: 0, ..header() }.seal(BODY);
    assert_eq!(read_start(&no_id), Err(WireError::Malformed { what: "request id" }));
}

#[test]
fn another_version_is_named_before_the_rest_is_there() {
    let mut bytes = header().seal(BODY);
    bytes[4] = 9;
    assert_eq!(read_start(&bytes[..6]), Err(WireError::Version { seen: 9 }));
    let text = WireError::Version { seen: 9 }.to_string();
    assert!(text.contains("version 9") && text.contains(&format!("version {VERSION}")), "{text}");
    let text = Notice { version: 9, version_seen: 1, code: code::VERSION }.to_refusal().message;
    assert!(text.contains("version 9") && text.contains("version 1"), "{text}");
}
