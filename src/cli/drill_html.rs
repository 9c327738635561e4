//! The report of a drill as a page: one file without anything from elsewhere, for light and dark screens.

use std::fmt::Write as _;

use super::drill_picture::{Frame, STEP_US, draw, escape, gap_of, overview_step_us, top_of};
use super::drill_report::{DrillReport, Mark, RoundReport, findings};
use super::output;

/// Widths of the pictures of a run, of a round, and of the moments around a fault.
const RUN_WIDTH: f64 = 1180.0;
const ROUND_WIDTH: f64 = 780.0;
const NEAR_WIDTH: f64 = 390.0;

/// Shown before a fault and after the end of its gap.
const NEAR_US: u64 = 150_000;

/// Most of a gap that is shown near.
const NEAR_GAP_MAX_US: u64 = 3_000_000;

const STYLE: &str = "\
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2127;--dim:#5f6b7a;--line:#d9dee5;--card:#f6f8fa;--writes:#2f6fb3;\
--fault:#c62828;--event:#7a5195;--gap:#c6282826;--good:#1b7f4b;--bad:#c62828}\
@media(prefers-color-scheme:dark){:root{--bg:#14181d;--fg:#e4e8ed;--dim:#9aa6b4;--line:#313a45;--card:#1c2229;\
--writes:#6ea8e0;--fault:#ff7b72;--event:#c49be0;--gap:#ff7b7233;--good:#56c98a;--bad:#ff7b72}}\
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif}\
main{max-width:1240px;margin:0 auto;padding:24px 20px 60px}h1{font-size:24px;margin:0 0 4px}h2{font-size:19px;margin:36px 0 6px}\
h3{font-size:14px;margin:0 0 2px;font-weight:600}p{margin:6px 0}.dim{color:var(--dim)}.good{color:var(--good);font-weight:700}\
.bad{color:var(--bad);font-weight:700}ul{margin:6px 0;padding-left:20px}svg{width:100%;height:auto;display:block}\
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:12px 0}\
.figures div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:8px 12px}\
.figures b{display:block;font-size:20px;font-variant-numeric:tabular-nums}.figures span{color:var(--dim);font-size:13px}\
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}\
th,td{padding:5px 9px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}\
th{color:var(--dim);font-weight:600}.words{text-align:left}\
.round{display:grid;grid-template-columns:2fr 1fr;gap:6px 14px;border-top:1px solid var(--line);padding:12px 0}\
.round h3{grid-column:1/-1}@media(max-width:820px){.round{grid-template-columns:1fr}}\
.legend{display:flex;flex-wrap:wrap;gap:4px 20px;color:var(--dim);font-size:13px;margin:8px 0}.legend i{display:inline-block;\
width:14px;height:10px;margin-right:6px;border-radius:2px}.legend .l{height:14px;width:2px;margin-bottom:-3px}\
text{font:11px system-ui,sans-serif;fill:var(--dim)}.fault-text{fill:var(--fault)}.event-text{fill:var(--event)}\
.grid{stroke:var(--line);fill:none}.axis{stroke:var(--dim);fill:none}.writes{fill:var(--writes);stroke:none}\
.fault{stroke:var(--fault);stroke-width:1.5;fill:none}.event{stroke:var(--event);stroke-width:1;stroke-dasharray:3 2;fill:none}\
.gap{fill:var(--gap)}";

const LEGEND: &str = "<p class=\"legend\">\
<span><i style=\"background:var(--writes)\"></i>acknowledged writes per 10 ms</span>\
<span><i class=\"l\" style=\"background:var(--fault)\"></i>fault</span>\
<span><i class=\"l\" style=\"background:var(--event)\"></i>what followed</span>\
<span><i style=\"background:var(--gap)\"></i>longest time without an acknowledged write around the fault</span></p>";

/// The page of one or several drills.
pub fn page(sections: &[&str], passed: bool, left_out: &[String]) -> String {
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width,initial-scale=1\"><title>StemeDB drill: {}</title><style>{STYLE}</style></head>\n\
         <body><main><h1>StemeDB drill: {}</h1>\n<p class=\"dim\">Written by stemedb {}. Every acknowledged write was \
         compared with what each node lists in full.</p>\n",
        word(passed),
        verdict(passed),
        env!("CARGO_PKG_VERSION"),
    );
    for section in sections {
        out.push_str(section);
    }
    list(&mut out, "Left out on this machine", left_out);
    out.push_str("</main></body></html>\n");
    out
}

fn word(passed: bool) -> &'static str {
    if passed { "passed" } else { "failed" }
}

fn verdict(passed: bool) -> String {
    format!("<span class=\"{}\">{}</span>", if passed { "good" } else { "bad" }, word(passed))
}

fn list(out: &mut String, head: &str, items: &[String]) {
    if items.is_empty() {
        return;
    }
    let items: Vec<String> = items.iter().map(|item| format!("<li>{}</li>", escape(item))).collect();
    // Writing to a String cannot fail.
    let _infallible = write!(out, "<p class=\"bad\">{}</p><ul>{}</ul>", escape(head), items.concat());
}

/// The part of a drill that could not be carried out.
pub fn failed(kind: &str, why: &str) -> String {
    let mut out = format!("<section><h2>{}: {}</h2>\n", escape(kind), verdict(false));
    list(&mut out, "It could not be carried out", &[why.to_owned()]);
    out.push_str("</section>\n");
    out
}

/// The part of one drill. `acknowledged_us` is ascending.
pub fn section<R: RoundReport>(report: &DrillReport<R>, acknowledged_us: &[u64]) -> String {
    let whom = match &report.behind {
        Some(balancer) => format!("{} clients without keys or second attempts, through {balancer}", report.clients),
        None => format!("{} clients of the nodes themselves", report.clients),
    };
    let mut out = format!(
        "<section><h2>{}: {}</h2>\n<p class=\"dim\">{} nodes, {}</p>\n<div class=\"figures\">",
        escape(report.kind),
        verdict(report.passed),
        report.nodes,
        escape(&whom)
    );
    let faults = report.rounds.iter().filter_map(RoundReport::gap_us).count();
    for (figure, what) in [
        (format!("{:.1} ms", report.gap_median_ms), format!("median gap of {faults} faults")),
        (format!("{:.1} ms", report.gap_worst_ms), "worst gap around a fault".to_owned()),
        (format!("{} ms", output::ms(report.gaps.longest_us)), "longest gap of the run".to_owned()),
        (output::thousands(report.requests), "requests".to_owned()),
        (output::thousands(report.survivor_errors), errors_are(report).to_owned()),
        (output::thousands(report.verdict.counts.values().sum()), "findings of the judge".to_owned()),
    ] {
        let _infallible = write!(out, "<div><b>{}</b><span>{}</span></div>", escape(&figure), escape(&what));
    }
    let _infallible = writeln!(out, "</div>\n<p>{}</p>", escape(&report.verdict.to_string()).replace('\n', "<br>"));
    list(&mut out, "What must not have happened", &findings(report));
    out.push_str(&table(report));
    out.push_str(LEGEND);
    out.push_str(&pictures(report, acknowledged_us));
    out.push_str("</section>\n");
    out
}

fn errors_are<R>(report: &DrillReport<R>) -> &'static str {
    match report.behind {
        Some(_) => "failed requests",
        None => "failed requests of nodes that were not broken",
    }
}

fn table<R: RoundReport>(report: &DrillReport<R>) -> String {
    let rows: Vec<Vec<String>> = report.rounds.iter().map(RoundReport::row).collect();
    // Words to the left, figures to the right.
    let is_figure = |text: &String| text.chars().all(|c| c.is_ascii_digit() || "-.,/".contains(c));
    let class = |column: usize| match rows.iter().all(|row| row.get(column).is_none_or(is_figure)) {
        true => "",
        false => " class=\"words\"",
    };
    let head: Vec<String> = R::head()
        .iter()
        .enumerate()
        .map(|(column, head)| format!("<th{}>{}</th>", class(column), escape(head)))
        .collect();
    let mut out = format!("<div class=\"scroll\"><table><thead><tr>{}</tr></thead><tbody>", head.concat());
    for row in &rows {
        let cells: Vec<String> = row
            .iter()
            .enumerate()
            .map(|(column, cell)| format!("<td{}>{}</td>", class(column), escape(cell)))
            .collect();
        let _infallible = write!(out, "<tr>{}</tr>", cells.concat());
    }
    out.push_str("</tbody></table></div>\n");
    out
}

fn pictures<R: RoundReport>(report: &DrillReport<R>, acknowledged_us: &[u64]) -> String {
    let begin_us = report.rounds.iter().map(|round| round.times().from_us).min().unwrap_or(0);
    let end_us = report.rounds.iter().map(|round| round.times().to_us).max();
    // A drill that broke has no rounds, and clients that worked all the same.
    let end_us = end_us.or(acknowledged_us.last().copied()).unwrap_or(0);
    let run_us = (begin_us, end_us);
    let top = top_of(acknowledged_us, run_us);
    let every_fault = report.rounds.iter().flat_map(|round| {
        let faults = round.times().marks.iter().filter(|mark| mark.is_fault);
        faults.map(|mark| Mark { what: String::new(), ..mark.clone() })
    });
    let every_fault: Vec<Mark> = every_fault.collect();
    let whole = Frame {
        width: RUN_WIDTH,
        span_us: run_us,
        zero_us: begin_us,
        step_us: overview_step_us(run_us),
        top,
        marks: &every_fault,
        gap: None,
        title: format!("The whole run of {}", report.kind),
    };
    let mut out = format!("<h3>The whole run</h3>{}\n", draw(&whole, acknowledged_us));
    for (number, round) in report.rounds.iter().enumerate() {
        let times = round.times();
        let fault_us = times.marks.iter().find(|mark| mark.is_fault).map_or(times.from_us, |mark| mark.at_us);
        let gap = gap_of(times, acknowledged_us);
        let frame = |width: f64, span_us: (u64, u64), what: &str| Frame {
            width,
            span_us,
            zero_us: fault_us,
            step_us: STEP_US,
            top,
            marks: &times.marks,
            gap,
            title: format!("{what} {}: {}", number + 1, round.progress()),
        };
        let near_end_us = gap.map_or(fault_us, |gap| gap.to_us.min(gap.from_us + NEAR_GAP_MAX_US));
        let near = (
            gap.map_or(fault_us, |gap| gap.from_us.min(fault_us)).saturating_sub(NEAR_US).max(times.from_us),
            near_end_us.max(fault_us) + NEAR_US,
        );
        let _infallible = writeln!(
            out,
            "<div class=\"round\"><h3>{}. {}</h3><div>{}</div><div>{}</div></div>",
            number + 1,
            escape(&round.progress()),
            draw(&frame(ROUND_WIDTH, (times.from_us, times.to_us), "Round"), acknowledged_us),
            draw(&frame(NEAR_WIDTH, near, "Around the fault of round"), acknowledged_us),
        );
    }
    out
}
