//! Pictures of acknowledged writes over time, as SVG: one per round in steps of 10 ms, and one of the whole run.
//!
//! Pure functions of times. Colours are classes, which the page that holds the pictures defines for light and dark.

use std::fmt::Write as _;

use super::drill_report::{Mark, Times};
use crate::judge::{Gap, longest_gap_touching};

/// Width of a step, microseconds.
pub const STEP_US: u64 = 10_000;

/// Most columns of the picture of a whole run.
const OVERVIEW_COLUMNS: u64 = 900;

const HEIGHT: f64 = 190.0;
const LEFT: f64 = 46.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 36.0;

/// Width that a character of a label takes, at most.
const LABEL_CHAR: f64 = 6.2;

/// What a picture shows.
pub struct Frame<'a> {
    /// Width in units of the picture.
    pub width: f64,
    /// First and last moment, microseconds.
    pub span_us: (u64, u64),
    /// The moment that is 0 on the axis.
    pub zero_us: u64,
    /// Microseconds per column.
    pub step_us: u64,
    /// Highest count on the axis.
    pub top: f64,
    /// Vertical lines.
    pub marks: &'a [Mark],
    /// A time without acknowledgements that is to be seen.
    pub gap: Option<Gap>,
    /// What it is a picture of.
    pub title: String,
}

/// Writes per 10 ms in columns of `step_us` from `from_us` on; `acknowledged_us` is ascending.
fn columns(acknowledged_us: &[u64], (from_us, to_us): (u64, u64), step_us: u64) -> Vec<f64> {
    let step_us = step_us.max(1);
    let count = usize::try_from(to_us.saturating_sub(from_us).div_ceil(step_us)).unwrap_or(0);
    let mut columns = vec![0.0; count];
    let first = acknowledged_us.partition_point(|at| *at < from_us);
    for at in acknowledged_us.iter().skip(first).take_while(|at| **at < to_us) {
        let place = usize::try_from((at - from_us) / step_us).unwrap_or(usize::MAX);
        if let Some(column) = columns.get_mut(place) {
            *column += STEP_US as f64 / step_us as f64;
        }
    }
    columns
}

/// Microseconds per column of the picture of a whole run: whole steps.
pub fn overview_step_us((from_us, to_us): (u64, u64)) -> u64 {
    to_us.saturating_sub(from_us).div_ceil(OVERVIEW_COLUMNS).div_ceil(STEP_US).max(1) * STEP_US
}

/// The top of an axis that holds every count of the run in steps of 10 ms, but for the highest of 200.
pub fn top_of(acknowledged_us: &[u64], span_us: (u64, u64)) -> f64 {
    let mut counts = columns(acknowledged_us, span_us, STEP_US);
    counts.sort_by(f64::total_cmp);
    let place = (counts.len() * 199 / 200).min(counts.len().saturating_sub(1));
    nice(counts.get(place).copied().unwrap_or(0.0) * 1.1, 1.0)
}

/// The smallest of 1, 2, 5, 10, ... times `unit` that is not below `least`.
fn nice(least: f64, unit: f64) -> f64 {
    let mut scale = unit;
    while scale < f64::MAX / 100.0 {
        for factor in [1.0, 2.0, 5.0] {
            if scale * factor >= least {
                return scale * factor;
            }
        }
        scale *= 10.0;
    }
    scale
}

/// The longest gap around the first fault, up to what happened next.
pub fn gap_of(times: &Times, acknowledged_us: &[u64]) -> Option<Gap> {
    let fault = times.marks.iter().find(|mark| mark.is_fault)?;
    let later = times.marks.iter().map(|mark| mark.at_us).filter(|at| *at > fault.at_us).min();
    let gap = longest_gap_touching(acknowledged_us, fault.at_us, later.unwrap_or(times.to_us));
    (gap.length_us() >= STEP_US).then_some(gap)
}

/// The picture.
pub fn draw(frame: &Frame<'_>, acknowledged_us: &[u64]) -> String {
    let (from_us, to_us) = frame.span_us;
    let span = to_us.saturating_sub(from_us).max(1) as f64;
    let (width, height) = (frame.width - LEFT - RIGHT, HEIGHT - TOP - BOTTOM);
    let x = |at_us: u64| LEFT + (at_us.clamp(from_us, to_us) - from_us) as f64 / span * width;
    let y = |count: f64| TOP + height * (1.0 - (count / frame.top.max(1.0)).min(1.0));
    let (base, right) = (y(0.0), LEFT + width);
    let mut out = String::new();
    let mut put = |text: std::fmt::Arguments<'_>| {
        // Writing to a String cannot fail.
        let _infallible = out.write_fmt(text);
    };
    let title = escape(&frame.title);
    put(format_args!(
        "<svg viewBox=\"0 0 {:.0} {HEIGHT:.0}\" role=\"img\" aria-label=\"{title}\"><title>{title}</title>",
        frame.width
    ));
    for part in [0.0, 0.5, 1.0] {
        let (count, at) = (frame.top * part, y(frame.top * part));
        let text = if count.fract() == 0.0 { format!("{count:.0}") } else { format!("{count:.1}") };
        put(format_args!("<path class=\"grid\" d=\"M{LEFT:.1} {at:.1}H{right:.1}\"/>"));
        put(format_args!(
            "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{text}</text>",
            LEFT - 6.0,
            at + 4.0
        ));
    }
    put(format_args!("<text class=\"unit\" x=\"4\" y=\"{:.1}\">writes per 10 ms</text>", TOP - 26.0));
    let tick_us = nice(span / (width / 90.0).max(1.0), 1000.0) as u64;
    let unit = if tick_us >= 1_000_000 { (1_000_000.0, "s") } else { (1000.0, "ms") };
    let zero = frame.zero_us as f64;
    let first = ((from_us as f64 - zero) / tick_us as f64).ceil() as i64;
    let last = ((to_us as f64 - zero) / tick_us as f64).floor() as i64;
    for number in first..=last {
        let after_us = number as f64 * tick_us as f64;
        let at = x((zero + after_us).max(0.0) as u64);
        let text = after_us / unit.0;
        put(format_args!("<path class=\"axis\" d=\"M{at:.1} {base:.1}v4\"/>"));
        put(format_args!(
            "<text class=\"tick\" x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{text}</text>",
            base + 16.0
        ));
    }
    put(format_args!(
        "<text class=\"unit\" x=\"{right:.1}\" y=\"{:.1}\" text-anchor=\"end\">time, {}</text>",
        base + 31.0,
        unit.1
    ));
    if let Some(gap) = frame.gap {
        let (left, end) = (x(gap.from_us), x(gap.to_us));
        put(format_args!(
            "<rect class=\"gap\" x=\"{left:.1}\" y=\"{TOP:.1}\" width=\"{:.1}\" height=\"{height:.1}\"><title>no write acknowledged for {:.1} ms</title></rect>",
            (end - left).max(1.0),
            gap.length_us() as f64 / 1000.0
        ));
    }
    let counts = columns(acknowledged_us, frame.span_us, frame.step_us);
    put(format_args!("<path class=\"writes\" d=\"M{LEFT:.1} {base:.1}"));
    let mut level = f64::NAN;
    for (place, count) in counts.iter().enumerate() {
        let at = y(*count);
        // Equal neighbours are one line.
        if (at - level).abs() < 0.05 {
            continue;
        }
        let left = x(from_us + place as u64 * frame.step_us);
        put(format_args!("H{left:.1}V{at:.1}"));
        level = at;
    }
    put(format_args!("H{right:.1}V{base:.1}Z\"/>"));
    put(format_args!("<path class=\"axis\" d=\"M{LEFT:.1} {base:.1}H{right:.1}\"/>"));
    // Labels in two rows, so that neighbours do not cover each other; what has no room has its words as a tooltip.
    let mut free = [LEFT, LEFT];
    for mark in frame.marks.iter().filter(|mark| (from_us..=to_us).contains(&mark.at_us)) {
        let (at, class) = (x(mark.at_us), if mark.is_fault { "fault" } else { "event" });
        let what = escape(&mark.what);
        put(format_args!(
            "<path class=\"{class}\" d=\"M{at:.1} {:.1}V{base:.1}\"><title>{what}</title></path>",
            TOP - 8.0
        ));
        let wide = mark.what.chars().count() as f64 * LABEL_CHAR + 8.0;
        let (start, anchor) = if at + wide > frame.width { (at - wide, "end") } else { (at, "start") };
        if let Some(row) = free.iter().position(|free| *free <= start) {
            put(format_args!(
                "<text class=\"{class}-text\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{what}</text>",
                if anchor == "end" { at - 3.0 } else { at + 3.0 },
                TOP - 2.0 - row as f64 * 12.0
            ));
            if let Some(free) = free.get_mut(row) {
                *free = start + wide;
            }
        }
    }
    out.push_str("</svg>");
    out
}

/// Text as it stands in HTML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
    use super::*;

    #[test]
    fn writes_fall_into_their_steps() {
        let at = [5_000, 10_000, 19_999, 20_000, 45_000];
        assert_eq!(columns(&at, (10_000, 45_000), STEP_US), [2.0, 1.0, 0.0, 0.0]);
        // Wider columns show the same rate.
        assert_eq!(columns(&at, (0, 40_000), 2 * STEP_US), [1.5, 0.5]);
        assert_eq!(overview_step_us((0, 9_000_000)), STEP_US);
        assert_eq!(overview_step_us((0, 9_000_001)), 2 * STEP_US);
        assert_eq!([0.0, 1.0, 1.1, 21.0, 480.0].map(|least| nice(least, 1.0)), [1.0, 1.0, 2.0, 50.0, 500.0]);
    }

    #[test]
    fn the_gap_around_the_fault_is_drawn_and_words_are_escaped() {
        let mut times = Times::begun(0);
        times.fault(1_000_000, "a <fault> & more");
        times.event(1_500_000, "back");
        times.to_us = 2_000_000;
        let acknowledged: Vec<u64> =
            (0..200).map(|n| n * 10_000).filter(|at| !(1_000_000..1_080_000).contains(at)).collect();
        let gap = gap_of(&times, &acknowledged).unwrap();
        assert_eq!((gap.from_us, gap.to_us), (990_000, 1_080_000));
        let frame = Frame {
            width: 640.0,
            span_us: (0, 2_000_000),
            zero_us: 1_000_000,
            step_us: STEP_US,
            top: top_of(&acknowledged, (0, 2_000_000)),
            marks: &times.marks,
            gap: Some(gap),
            title: "round 1".into(),
        };
        let svg = draw(&frame, &acknowledged);
        assert!(svg.contains("a &lt;fault&gt; &amp; more") && !svg.contains("<fault>"), "{svg}");
        assert!(svg.contains("no write acknowledged for 90.0 ms"), "{svg}");
        assert_eq!((svg.matches("class=\"fault\"").count(), svg.matches("class=\"event\"").count()), (1, 1));
        // The line goes down once and up again.
        let line = svg.split("class=\"writes\" d=\"").nth(1).unwrap().split('"').next().unwrap();
        assert_eq!(line.matches('V').count(), 4, "{line}");
    }
}
