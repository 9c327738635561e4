//! The judge: records what clients were told, and checks it against what is found afterwards.
//!
//! Every key is a register whose newest fact is the one with the highest `index`; every write carries
//! a value that no other write carries. The `index` orders all facts, so the checks need no search:
//! an acknowledged write must be there once, under the index it was acknowledged with, and a
//! linearizable read must see everything that was acknowledged before it began.
//!
//! `recorder` collects, `checker` is a pure function, `report` prints. Tests and drills share all
//! three; how keys and values look on the wire is the caller's affair.
pub mod checker;
pub mod gaps;
pub mod recorder;
pub mod report;

pub use checker::{Fact, Finding, FindingKind, NodeFacts, Verdict, check};
pub use gaps::{Gap, GapSummary, longest_gap_touching, summarize_gaps};
pub use recorder::{BALANCER, History, Lane, ReadAttempt, ReadOutcome, Recorder, Seen, WriteAttempt, WriteOutcome};
