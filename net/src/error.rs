//! What a call can fail with, and how much is then known.
//!
//! The one question a caller has after a failure is whether the request may have had an effect. The variants of
//! [`CallError`] keep the answers apart; nothing in this crate ever turns one into another.

/// Numbers of refusals. Below 100 they belong to this crate, from 100 on to the service. Numbers 1 to 8 promise that the
/// request had no effect; a handler that answers with one of them makes that promise itself.
pub mod code {
    /// Sender and target are in different clusters.
    pub const WRONG_CLUSTER: u16 = 1;
    /// The node reached is not the one the sender meant.
    pub const WRONG_TARGET: u16 = 2;
    /// The sender runs with a lower boot count than was seen before: an old copy of its folder.
    pub const STALE_BOOT: u16 = 3;
    /// No handler knows this kind of request.
    pub const UNKNOWN_KIND: u16 = 4;
    /// The sender or the target has no identity yet and the kind is no probe.
    pub const NO_IDENTITY: u16 = 5;
    /// The request is larger than the target takes on this lane.
    pub const TOO_LARGE: u16 = 6;
    /// The two nodes speak different versions of the format.
    pub const VERSION: u16 = 7;
    /// The target has as many connections as it takes.
    pub const BUSY: u16 = 8;
    /// The last of the codes that promise that no handler saw the request.
    pub(crate) const UNHANDLED_MAX: u16 = 8;
    /// The handler panicked; what it had done by then is unknown.
    pub const PANICKED: u16 = 20;
    /// The request was handled, but its answer is larger than the lane carries.
    pub const ANSWER_TOO_LARGE: u16 = 21;
    /// First number that a service may use for its own refusals.
    pub const SERVICE_MIN: u16 = 100;
}

/// Bytes of a refusal's message that are sent; the rest is cut off.
const MESSAGE_BYTES_MAX: usize = 4096;

/// An answer that says no, with a reason for a person to read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("refused ({code}): {message}")]
pub struct Refusal {
    /// One of [`code`], or a service's own number from [`code::SERVICE_MIN`] on.
    pub code: u16,
    /// Plain text. More than 4,096 bytes are cut when sent.
    pub message: String,
}

impl Refusal {
    /// A refusal with this code and text.
    pub fn new(code: u16, message: impl Into<String>) -> Self {
        Refusal { code, message: message.into() }
    }

    /// For handlers that meet a kind they do not know.
    pub fn unknown_kind(kind: u16) -> Self {
        Refusal::new(code::UNKNOWN_KIND, format!("no handler for requests of kind {kind}"))
    }

    /// The message as it is sent: cut at a character boundary.
    pub(crate) fn message_sent(&self) -> &str {
        let cut = self.message.floor_char_boundary(MESSAGE_BYTES_MAX);
        self.message.get(..cut).unwrap_or_default()
    }
}

/// Why a call has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// No byte of the request reached the wire: it surely had no effect.
    #[error("not sent: {why}")]
    NotSent {
        /// What kept it from being sent.
        why: String,
    },
    /// At least a part was sent and no answer came: it may have had an effect, or have one later.
    #[error("sent, outcome unknown: {why}")]
    Unknown {
        /// What kept the answer from arriving.
        why: String,
    },
    /// The other side answered no. See [`CallError::is_surely_unhandled`] for what that says about effects.
    #[error("refused ({code}): {message}")]
    Refused {
        /// One of [`code`] or a service's own number.
        code: u16,
        /// The other side's text.
        message: String,
    },
    /// Too many requests or bytes wait for this connection already. Not sent.
    #[error("the queue for this connection is full")]
    QueueFull,
    /// The body is larger than the lane carries. Not sent.
    #[error("a body of {bytes} bytes is over the limit of {limit}")]
    TooLarge {
        /// Length of the body.
        bytes: usize,
        /// Most that the lane carries.
        limit: usize,
    },
}

impl CallError {
    /// True when no handler can have seen the request, now or later. False also for refusals with a service's own
    /// code: only the service knows what those promise.
    pub fn is_surely_unhandled(&self) -> bool {
        match self {
            CallError::NotSent { .. } | CallError::QueueFull | CallError::TooLarge { .. } => true,
            CallError::Refused { code, .. } => (1..=code::UNHANDLED_MAX).contains(code),
            CallError::Unknown { .. } => false,
        }
    }
}

impl From<Refusal> for CallError {
    fn from(refusal: Refusal) -> Self {
        CallError::Refused { code: refusal.code, message: refusal.message }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_is_cut_between_characters() {
        let refusal = Refusal::new(code::SERVICE_MIN, "é".repeat(MESSAGE_BYTES_MAX));
        assert_eq!(refusal.message_sent().len(), MESSAGE_BYTES_MAX);
        let refusal = Refusal::new(code::SERVICE_MIN, format!("x{}", "é".repeat(MESSAGE_BYTES_MAX)));
        assert_eq!(refusal.message_sent().len(), MESSAGE_BYTES_MAX - 1);
    }

    #[test]
    fn only_what_no_handler_saw_is_surely_unhandled() {
        let refused = |code| CallError::Refused { code, message: String::new() };
        for code in [code::WRONG_CLUSTER, code::UNKNOWN_KIND, code::BUSY] {
            assert!(refused(code).is_surely_unhandled());
        }
        for code in [0, code::PANICKED, code::ANSWER_TOO_LARGE, code::SERVICE_MIN] {
            assert!(!refused(code).is_surely_unhandled());
        }
        assert!(CallError::QueueFull.is_surely_unhandled());
        assert!(!CallError::Unknown { why: String::new() }.is_surely_unhandled());
    }
}
