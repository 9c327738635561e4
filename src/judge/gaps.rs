//! Gaps between acknowledged writes: how long nobody got anything done.

use serde::Serialize;

/// Time between two neighbouring acknowledgements, or between one and the edge of the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Gap {
    /// Start, microseconds of the recorder's clock.
    pub from_us: u64,
    /// End, microseconds of the recorder's clock.
    pub to_us: u64,
}

impl Gap {
    /// Length in microseconds.
    pub fn length_us(&self) -> u64 {
        self.to_us.saturating_sub(self.from_us)
    }
}

/// Figures over many gaps, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GapSummary {
    /// How many gaps.
    pub count: usize,
    /// Half of the gaps are at most this long.
    pub p50_us: u64,
    /// 99 of 100 are at most this long.
    pub p99_us: u64,
    /// 999 of 1,000 are at most this long.
    pub p999_us: u64,
    /// The longest.
    pub longest_us: u64,
}

/// The longest gap that has a part in `from_us..=to_us`. `acknowledged_us` is ascending. Both edges
/// count: silence up to the end of the window is a gap too, so a cluster that never comes back shows.
pub fn longest_gap_touching(acknowledged_us: &[u64], from_us: u64, to_us: u64) -> Gap {
    let first = acknowledged_us.partition_point(|at| *at <= from_us);
    let before = first.checked_sub(1).and_then(|last| acknowledged_us.get(last));
    let mut previous = before.copied().unwrap_or(from_us);
    let mut longest = Gap { from_us: previous, to_us: previous };
    let later = acknowledged_us.iter().skip(first).copied();
    for at in later.take_while(|at| *at < to_us).chain([to_us]) {
        let gap = Gap { from_us: previous, to_us: at.max(previous) };
        if gap.length_us() > longest.length_us() {
            longest = gap;
        }
        previous = at;
    }
    longest
}

/// Percentiles and the maximum of the gaps between neighbours of `acknowledged_us`, which is ascending.
pub fn summarize_gaps(acknowledged_us: &[u64]) -> GapSummary {
    let neighbours = acknowledged_us
        .iter()
        .zip(acknowledged_us.iter().skip(1))
        .map(|(earlier, later)| later.saturating_sub(*earlier));
    let mut lengths: Vec<u64> = neighbours.collect();
    lengths.sort_unstable();
    GapSummary {
        count: lengths.len(),
        p50_us: per_mille(&lengths, 500),
        p99_us: per_mille(&lengths, 990),
        p999_us: per_mille(&lengths, 999),
        longest_us: lengths.last().copied().unwrap_or(0),
    }
}

/// The smallest element that at least `share` thousandths of `sorted` do not exceed; 0 when empty.
pub fn per_mille(sorted: &[u64], share: usize) -> u64 {
    let rank = (sorted.len().saturating_mul(share)).div_ceil(1000);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0)
}
