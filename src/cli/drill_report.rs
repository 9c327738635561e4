//! The figures of a drill: one row per round, a summary, and the judge's verdict.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::drill_open::Offered;
use super::output;
use crate::judge::{FindingKind, GapSummary, History, Verdict};

/// When a round was, and what happened in it. Microseconds of the recorder's clock.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Times {
    /// Its beginning.
    pub from_us: u64,
    /// Its end.
    pub to_us: u64,
    /// What happened, in order.
    pub marks: Vec<Mark>,
}

/// Something that happened in a round.
#[derive(Clone, Debug, Serialize)]
pub struct Mark {
    /// When.
    pub at_us: u64,
    /// What, in a word or two.
    pub what: String,
    /// Whether it is what the round is about; else it belongs to the way back.
    pub is_fault: bool,
}

impl Times {
    /// A round that has begun.
    pub fn begun(from_us: u64) -> Self {
        Self { from_us, ..Self::default() }
    }

    /// Notes the fault itself.
    pub fn fault(&mut self, at_us: u64, what: impl Into<String>) {
        self.marks.push(Mark { at_us, what: what.into(), is_fault: true });
    }

    /// Notes something else.
    pub fn event(&mut self, at_us: u64, what: impl Into<String>) {
        self.marks.push(Mark { at_us, what: what.into(), is_fault: false });
    }
}

/// What every kind of round has.
pub trait RoundReport: Serialize {
    /// Heads of the columns.
    const HEAD: &'static [&'static str];

    /// The same, with those that are known only after the end.
    fn head() -> Vec<&'static str> {
        Self::HEAD.to_vec()
    }

    /// Its row below them.
    fn row(&self) -> Vec<String>;

    /// One line while the drill runs.
    fn progress(&self) -> String;

    /// Longest time without an acknowledged write around the fault, microseconds; `None` when there was no fault.
    fn gap_us(&self) -> Option<u64>;

    /// What must not happen in a round and did, beside what the judge finds.
    fn problem(&self) -> Option<String>;

    /// When it was.
    fn times(&self) -> &Times;
}

/// A round, and what the judge found of it after the end.
#[derive(Clone, Debug, Serialize)]
pub struct Judged<R> {
    /// The round.
    #[serde(flatten)]
    pub round: R,
    /// Writes that ended in it and are there twice, of those that the verdict lists.
    pub duplicates: u64,
}

impl<R: RoundReport> RoundReport for Judged<R> {
    const HEAD: &'static [&'static str] = R::HEAD;

    fn head() -> Vec<&'static str> {
        R::head().into_iter().chain(["DOUBLED"]).collect()
    }

    fn row(&self) -> Vec<String> {
        let mut row = self.round.row();
        row.push(self.duplicates.to_string());
        row
    }

    fn progress(&self) -> String {
        self.round.progress()
    }

    fn gap_us(&self) -> Option<u64> {
        self.round.gap_us()
    }

    fn problem(&self) -> Option<String> {
        self.round.problem()
    }

    fn times(&self) -> &Times {
        self.round.times()
    }
}

/// Gives each round what the judge found doubled of its writes.
pub fn judged<R: RoundReport>(rounds: Vec<R>, history: &History, verdict: &Verdict) -> Vec<Judged<R>> {
    let doubled: BTreeSet<u64> = verdict
        .findings
        .iter()
        .filter(|finding| finding.kind == FindingKind::Doubled)
        .filter_map(|finding| finding.value)
        .collect();
    // When each of them was answered first.
    let mut ended_us: BTreeMap<u64, u64> = BTreeMap::new();
    for write in history.writes.iter().filter(|write| doubled.contains(&write.value)) {
        let first = ended_us.entry(write.value).or_insert(write.end_us);
        *first = write.end_us.min(*first);
    }
    let of = |times: &Times| ended_us.values().filter(|at| (times.from_us..=times.to_us).contains(at)).count() as u64;
    rounds.into_iter().map(|round| Judged { duplicates: of(round.times()), round }).collect()
}

/// The whole drill.
#[derive(Debug, Serialize)]
pub struct DrillReport<R> {
    /// The word of its kind.
    pub kind: &'static str,
    /// True when nothing was found.
    pub passed: bool,
    /// What kept the drill from its end, or the judge from a node; empty when nothing did.
    pub broken: Vec<String>,
    /// Longest time without an acknowledged write around a fault that is no finding, milliseconds, if that was asked for.
    pub gap_max_ms: Option<u64>,
    /// The load balancer that the clients used: `nginx`, `envoy` or an address; else they used the nodes.
    pub behind: Option<String>,
    /// Requests of clients, repetitions too.
    pub requests: u64,
    /// Writes that are there twice, by the judge.
    pub duplicates: u64,
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
    /// Errors seen by clients of nodes that were not to fail, or of the balancer; all rounds and the time between.
    pub survivor_errors: u64,
    /// Repetitions after the end that did not get their first outcome as such.
    pub not_replayed: u64,
    /// Repetitions after the end.
    pub repeated: u64,
    /// The first errors that clients saw.
    pub error_samples: Vec<String>,
    /// The judge's verdict.
    pub verdict: Verdict,
}

/// Median (of an even number: the mean of the two in the middle) and maximum, milliseconds.
pub fn median_and_worst_ms<R: RoundReport>(rounds: &[R]) -> (f64, f64) {
    median_and_worst(rounds.iter().filter_map(RoundReport::gap_us).collect())
}

fn median_and_worst(mut gaps: Vec<u64>) -> (f64, f64) {
    gaps.sort_unstable();
    let ms = |us: u64| us as f64 / 1000.0;
    let at = |place: usize| ms(gaps.get(place).copied().unwrap_or(0));
    let (lower, upper) = (gaps.len().saturating_sub(1) / 2, gaps.len() / 2);
    ((at(lower) + at(upper)) / 2.0, ms(gaps.last().copied().unwrap_or(0)))
}

/// The report for people.
pub fn text<R: RoundReport>(report: &DrillReport<R>) -> String {
    let mut table = output::table(R::head());
    for round in &report.rounds {
        table.add_row(round.row());
    }
    format!("{table}\n{}", summary(report))
}

/// What stands below the table of rounds.
pub fn summary<R: RoundReport>(report: &DrillReport<R>) -> String {
    let mut out = format!(
        "gap around a fault: median {:.1} ms, worst {:.1} ms of {}; whole run: longest {} ms\n",
        report.gap_median_ms,
        report.gap_worst_ms,
        report.rounds.iter().filter_map(RoundReport::gap_us).count(),
        output::ms(report.gaps.longest_us),
    );
    out.push_str(&match &report.behind {
        Some(balancer) => format!(
            "{} requests through {balancer}, without keys or second attempts: {} failed, {} doubled\n",
            output::thousands(report.requests),
            report.survivor_errors,
            report.duplicates,
        ),
        None => format!(
            "{} requests; errors on survivors: {}; {} writes sent once more at the end, {} of them without their first outcome\n",
            output::thousands(report.requests),
            report.survivor_errors,
            report.repeated,
            report.not_replayed,
        ),
    });
    out.push_str(&report.verdict.to_string());
    if let (Some(most), Some(offered)) = (report.measured_per_s, &report.offered) {
        out.push_str(&format!(
            "\noffered {:.0} operations/s whatever the answers took ({:.0}/s measured before); {} of {} were too many at once",
            offered.per_s, most, offered.not_sent, offered.sent + offered.not_sent,
        ));
    }
    for line in findings(report) {
        out.push_str("\n  ");
        out.push_str(&line);
    }
    out.push_str(if report.passed { "\nPASSED" } else { "\nFAILED" });
    out
}

/// What must not have happened, beside the judge's findings.
pub fn findings<R: RoundReport>(report: &DrillReport<R>) -> Vec<String> {
    let problems = report.rounds.iter().filter_map(RoundReport::problem);
    let broken = report.broken.iter().cloned();
    let too_long = too_long(&report.rounds, report.gap_max_ms);
    broken.chain(report.error_samples.iter().cloned()).chain(problems).chain(too_long).collect()
}

/// The gaps that are longer than was asked for.
pub fn too_long<R: RoundReport>(rounds: &[R], gap_max_ms: Option<u64>) -> Vec<String> {
    let Some(max_ms) = gap_max_ms else { return Vec::new() };
    let faults = rounds.iter().filter_map(RoundReport::gap_us);
    let long = faults.enumerate().filter(|(_, us)| *us > max_ms.saturating_mul(1000));
    long.map(|(fault, us)| {
        let gap = output::ms(us);
        format!("fault {}: no write was acknowledged for {gap} ms, and at most {max_ms} ms were wanted", fault + 1)
    })
    .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;
    use crate::judge::{Finding, WriteAttempt, WriteOutcome};

    #[derive(Serialize)]
    struct Plain {
        round: usize,
        times: Times,
    }

    impl RoundReport for Plain {
        const HEAD: &'static [&'static str] = &["ROUND"];

        fn row(&self) -> Vec<String> {
            vec![self.round.to_string()]
        }

        fn progress(&self) -> String {
            String::new()
        }

        fn gap_us(&self) -> Option<u64> {
            None
        }

        fn problem(&self) -> Option<String> {
            None
        }

        fn times(&self) -> &Times {
            &self.times
        }
    }

    #[test]
    fn a_doubled_write_is_counted_once_and_in_the_round_of_its_first_answer() {
        let rounds = [1u64, 2].map(|round| {
            let times = Times { from_us: round * 1_000, to_us: round * 1_000 + 900, marks: Vec::new() };
            Plain { round: round as usize, times }
        });
        let write = |value, end_us| WriteAttempt {
            client: 0,
            node: 0,
            key: 0,
            value,
            start_us: end_us - 10,
            end_us,
            outcome: WriteOutcome::Unknown { status: 0 },
        };
        // 7 was sent again in the next round, 8 is between the rounds, 9 is fine.
        let writes = vec![write(7, 1_500), write(7, 2_500), write(8, 1_950), write(9, 2_600), write(5, 2_700)];
        let history = History { writes, ..History::default() };
        let found = |kind, value, node| Finding { kind, key: 0, value: Some(value), node, detail: String::new() };
        let doubled = |value, node| found(FindingKind::Doubled, value, Some(node));
        let findings =
            vec![doubled(7, 0), doubled(7, 1), doubled(8, 0), doubled(5, 2), found(FindingKind::Lost, 9, None)];
        let verdict = Verdict { findings, ..Verdict::default() };
        let judged = judged(rounds.into(), &history, &verdict);
        assert_eq!(judged.iter().map(|round| round.duplicates).collect::<Vec<_>>(), [1, 1]);
        assert_eq!(<Judged<Plain> as RoundReport>::head(), ["ROUND", "DOUBLED"]);
        assert_eq!(judged.first().unwrap().row(), ["1", "1"]);
        let json = serde_json::to_value(judged.first()).unwrap();
        assert_eq!((&json["round"], &json["duplicates"]), (&json!(1), &json!(1)));
    }

    #[test]
    fn a_gap_above_the_wanted_one_is_a_finding() {
        #[derive(Serialize)]
        struct Gap(Option<u64>, Times);
        impl RoundReport for Gap {
            const HEAD: &'static [&'static str] = &[];
            fn row(&self) -> Vec<String> {
                Vec::new()
            }
            fn progress(&self) -> String {
                String::new()
            }
            fn gap_us(&self) -> Option<u64> {
                self.0
            }
            fn problem(&self) -> Option<String> {
                None
            }
            fn times(&self) -> &Times {
                &self.1
            }
        }
        let gaps = [Some(150_000), None, Some(150_001)].map(|us| Gap(us, Times::default()));
        assert!(too_long(&gaps, None).is_empty());
        let found = too_long(&gaps, Some(150));
        assert!(matches!(found.as_slice(), [one] if one.starts_with("fault 2: ")), "{found:?}");
    }

    #[test]
    fn the_median_does_not_flatter() {
        assert_eq!(median_and_worst(vec![4000, 1000, 2000]), (2.0, 4.0));
        assert_eq!(median_and_worst(vec![4000, 1000, 2000, 3000]), (2.5, 4.0));
        assert_eq!(median_and_worst(Vec::new()), (0.0, 0.0));
    }
}
