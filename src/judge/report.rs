//! The verdict in words. Its JSON form is the `Serialize` of `Verdict`.

use std::fmt::{self, Display, Formatter};

use super::checker::{FINDINGS_MAX, FindingKind, Verdict};
use super::recorder::BALANCER;

/// Findings printed in a text report; the JSON has more.
const FINDINGS_PRINTED: usize = 20;

/// Every kind, in the order in which a report names them.
pub const KINDS: [FindingKind; 7] = [
    FindingKind::Lost,
    FindingKind::Doubled,
    FindingKind::Stale,
    FindingKind::RefusedButPresent,
    FindingKind::Invented,
    FindingKind::OutOfOrder,
    FindingKind::Diverged,
];

impl Display for FindingKind {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Lost => "lost",
            Self::Doubled => "doubled",
            Self::Stale => "stale",
            Self::RefusedButPresent => "refused but present",
            Self::Invented => "invented",
            Self::OutOfOrder => "out of order",
            Self::Diverged => "diverged",
        })
    }
}

impl Display for Verdict {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        writeln!(
            out,
            "{} writes acknowledged, {} refused, {} unknown ({} of them present), {} reads answered, {} nodes compared",
            self.acknowledged, self.refused, self.unknown, self.unknown_present, self.reads, self.nodes
        )?;
        for (place, kind) in KINDS.iter().enumerate() {
            let separator = if place == 0 { "" } else { ", " };
            write!(out, "{separator}{kind}: {}", self.count(*kind))?;
        }
        for finding in self.findings.iter().take(FINDINGS_PRINTED) {
            write!(out, "\n  {}: key {}", finding.kind, finding.key)?;
            if let Some(value) = finding.value {
                write!(out, ", value {value}")?;
            }
            match finding.node {
                Some(BALANCER) => write!(out, ", through the load balancer")?,
                Some(node) => write!(out, ", node {}", u32::from(node) + 1)?,
                None => {}
            }
            write!(out, ": {}", finding.detail)?;
        }
        let total: u64 = self.counts.values().sum();
        let printed = self.findings.len().min(FINDINGS_PRINTED) as u64;
        if total > printed {
            write!(out, "\n  and {} more (the first {FINDINGS_MAX} are in the JSON report)", total - printed)?;
        }
        Ok(())
    }
}
