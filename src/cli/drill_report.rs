//! The figures of a drill: one row per round, a summary, and the judge's verdict.

use serde::Serialize;

use super::drill_open::Offered;
use super::output;
use crate::judge::{GapSummary, Verdict};

/// What one round showed.
#[derive(Clone, Debug, Serialize)]
pub struct Round {
    /// From 1.
    pub round: usize,
    /// The leader that was killed.
    pub killed: String,
    /// The leader after it, once clients were served again.
    pub new_leader: String,
    /// Its term.
    pub term: u64,
    /// Longest time without an acknowledged write around the kill, microseconds.
    pub gap_us: u64,
    /// Requests to surviving nodes that ended in anything but success.
    pub survivor_errors: u64,
    /// Writes of the killed node's clients that were repeated with their key on another node.
    pub retried: u64,
    /// Writes acknowledged in this round.
    pub acknowledged: u64,
    /// From the restart of the killed node until all nodes were ready, milliseconds.
    pub rejoin_ms: u64,
    /// Longest time without an acknowledged write while it came back, microseconds.
    pub rejoin_gap_us: u64,
    /// Nodes that answered a linearizable read at the end of the round.
    pub readable_nodes: usize,
}

/// What every kind of round has.
pub trait RoundReport: Serialize {
    /// Longest time without an acknowledged write around the fault, microseconds.
    fn gap_us(&self) -> u64;

    /// What must not happen in a round and did, beside what the judge finds.
    fn problem(&self) -> Option<String>;
}

impl RoundReport for Round {
    fn gap_us(&self) -> u64 {
        self.gap_us
    }

    fn problem(&self) -> Option<String> {
        None
    }
}

/// The whole drill.
#[derive(Debug, Serialize)]
pub struct DrillReport<R> {
    /// `kill`, `fsync` or `stall`.
    pub kind: &'static str,
    /// True when nothing was found.
    pub passed: bool,
    /// Operations per second before the first round, one at a time for each client; only with an offered rate.
    pub measured_per_s: Option<f64>,
    /// What was offered, of an open load; else each client had one request at a time.
    pub offered: Option<Offered>,
    /// Clients.
    pub clients: usize,
    /// Nodes.
    pub nodes: usize,
    /// One per fault.
    pub rounds: Vec<R>,
    /// Median of the rounds' gaps, milliseconds.
    pub gap_median_ms: f64,
    /// Longest of the rounds' gaps, milliseconds.
    pub gap_worst_ms: f64,
    /// All gaps between acknowledgements of the whole run.
    pub gaps: GapSummary,
    /// Errors seen by clients of surviving nodes, all rounds and the time between.
    pub survivor_errors: u64,
    /// Repetitions after the end that did not get their first outcome as such.
    pub not_replayed: u64,
    /// Repetitions after the end.
    pub repeated: u64,
    /// The first errors that clients of surviving nodes saw.
    pub error_samples: Vec<String>,
    /// The judge's verdict.
    pub verdict: Verdict,
}

/// Median (of an even number: the mean of the two in the middle) and maximum, milliseconds.
pub fn median_and_worst_ms<R: RoundReport>(rounds: &[R]) -> (f64, f64) {
    let mut gaps: Vec<u64> = rounds.iter().map(RoundReport::gap_us).collect();
    gaps.sort_unstable();
    let ms = |us: u64| us as f64 / 1000.0;
    let at = |place: usize| ms(gaps.get(place).copied().unwrap_or(0));
    let (lower, upper) = (gaps.len().saturating_sub(1) / 2, gaps.len() / 2);
    ((at(lower) + at(upper)) / 2.0, ms(gaps.last().copied().unwrap_or(0)))
}

/// One line for one round, while the drill runs.
pub fn progress_line(round: &Round, rounds: usize) -> String {
    format!(
        "round {:>2}/{rounds}: killed {}, gap {} ms, {} leads in term {}, {} retried, {} errors on survivors, rejoined in {} ms",
        round.round,
        round.killed,
        output::ms(round.gap_us),
        round.new_leader,
        round.term,
        round.retried,
        round.survivor_errors,
        round.rejoin_ms,
    )
}

/// The report for people.
pub fn text(report: &DrillReport<Round>) -> String {
    let mut table = output::table([
        "ROUND",
        "KILLED",
        "GAP ms",
        "ERRORS ON SURVIVORS",
        "RETRIED",
        "NEW LEADER",
        "TERM",
        "WRITES",
        "REJOIN ms",
        "GAP THEN ms",
    ]);
    for round in &report.rounds {
        table.add_row([
            round.round.to_string(),
            round.killed.clone(),
            output::ms(round.gap_us),
            round.survivor_errors.to_string(),
            round.retried.to_string(),
            round.new_leader.clone(),
            round.term.to_string(),
            output::thousands(round.acknowledged),
            round.rejoin_ms.to_string(),
            output::ms(round.rejoin_gap_us),
        ]);
    }
    format!("{table}\n{}", summary(report))
}

/// What stands below the table of rounds.
pub fn summary<R: RoundReport>(report: &DrillReport<R>) -> String {
    let mut out = format!(
        "gap around a fault: median {:.1} ms, worst {:.1} ms; errors on survivors: {}; \
         {} writes sent once more at the end, {} of them without their first outcome\n{}",
        report.gap_median_ms,
        report.gap_worst_ms,
        report.survivor_errors,
        report.repeated,
        report.not_replayed,
        report.verdict,
    );
    if let (Some(most), Some(offered)) = (report.measured_per_s, &report.offered) {
        out.push_str(&format!(
            "\noffered {:.0} operations/s whatever the answers took ({:.0}/s measured before); {} of {} were too many at once",
            offered.per_s, most, offered.not_sent, offered.sent + offered.not_sent,
        ));
    }
    let problems = report.rounds.iter().filter_map(RoundReport::problem);
    for line in report.error_samples.iter().cloned().chain(problems) {
        out.push_str("\n  ");
        out.push_str(&line);
    }
    out.push_str(if report.passed { "\nPASSED" } else { "\nFAILED" });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_does_not_flatter() {
        let rounds = |gaps: &[u64]| -> Vec<Round> {
            let round = |gap_us: &u64| Round {
                round: 1,
                killed: String::new(),
                new_leader: String::new(),
                term: 1,
                gap_us: *gap_us,
                survivor_errors: 0,
                retried: 0,
                acknowledged: 0,
                rejoin_ms: 0,
                rejoin_gap_us: 0,
                readable_nodes: 3,
            };
            gaps.iter().map(round).collect()
        };
        assert_eq!(median_and_worst_ms(&rounds(&[4000, 1000, 2000])), (2.0, 4.0));
        assert_eq!(median_and_worst_ms(&rounds(&[4000, 1000, 2000, 3000])), (2.5, 4.0));
        assert_eq!(median_and_worst_ms::<Round>(&[]), (0.0, 0.0));
    }
}
