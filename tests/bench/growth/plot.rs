//! The plot: one panel a metric, both axes logarithmic, as an SVG that needs nothing to be shown.
//!
//! In: rows whose case is `NUMBER case`. Out: text.

use std::fmt::Write as _;

use crate::output::{Bench, short};

const PANELS: [(&str, &str); 3] =
    [("wall", "wall time, s"), ("cpu", "CPU of all processes, s"), ("rss biggest process", "peak RSS, MiB")];
/// Case and colour; told apart by the marks as well.
const LINES: [(&str, &str); 3] = [("first", "#1f6fb4"), ("unchanged", "#2d8a4e"), ("restore", "#c2571a")];
/// How the lines of each program are drawn, in the order of the programs.
const DASHES: [&str; 3] = ["", "7 4", "2 3"];
const WIDTH: f64 = 340.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 52.0;
const TOP: f64 = 46.0;
const GAP: f64 = 40.0;

/// Points of one line.
type Points = Vec<(f64, f64)>;

/// A logarithmic axis.
struct Axis {
    from: f64,
    to: f64,
    /// Where it begins and ends on the page.
    begin: f64,
    end: f64,
}

impl Axis {
    /// Of whole decades that hold all values.
    fn over(values: impl Iterator<Item = f64>, begin: f64, end: f64) -> Self {
        let (low, high) =
            values.filter(|v| *v > 0.0).fold((f64::MAX, f64::MIN_POSITIVE), |(low, high), v| (low.min(v), high.max(v)));
        let (from, to) = (low.log10().floor(), high.log10().ceil());
        Self { from, to: to.max(from + 1.0), begin, end }
    }

    fn at(&self, value: f64) -> f64 {
        let share = (value.max(f64::MIN_POSITIVE).log10() - self.from) / (self.to - self.from);
        self.begin + share.clamp(0.0, 1.0) * (self.end - self.begin)
    }

    fn decades(&self) -> impl Iterator<Item = f64> {
        (self.from as i32..=self.to as i32).map(|power| 10_f64.powi(power))
    }
}

/// Draws it.
pub(super) fn svg(bench: &Bench) -> String {
    let programs = programs(bench);
    let width = PANELS.len() as f64 * (WIDTH + LEFT) + GAP;
    let height = TOP + HEIGHT + 78.0;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<title>What a backup and a restore cost as the number of files grows</title>\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    for (at, (metric, title)) in PANELS.iter().enumerate() {
        panel(&mut text, bench, &programs, metric, title, LEFT + at as f64 * (WIDTH + LEFT));
    }
    legend(&mut text, &programs, TOP + HEIGHT + 58.0);
    text.push_str("</svg>\n");
    text
}

fn panel(text: &mut String, bench: &Bench, programs: &[String], metric: &str, title: &str, left: f64) {
    let lines: Vec<(usize, usize, Points)> = (0..programs.len())
        .flat_map(|program| (0..LINES.len()).map(move |line| (program, line)))
        .map(|(program, line)| (program, line, points(bench, program, LINES[line].0, metric)))
        .collect();
    let all = || lines.iter().flat_map(|(_, _, points)| points);
    let x = Axis::over(all().map(|(x, _)| *x), left, left + WIDTH);
    let y = Axis::over(all().map(|(_, y)| *y), TOP + HEIGHT, TOP);
    let _ = writeln!(text, "<text x=\"{left}\" y=\"{:.0}\" font-size=\"14\">{title}</text>", TOP - 16.0);
    for decade in x.decades() {
        let at = x.at(decade);
        let _ = writeln!(text, "<path d=\"M{at:.1} {TOP}V{:.1}\" stroke=\"#ddd\"/>", TOP + HEIGHT);
        let label = TOP + HEIGHT + 18.0;
        let _ = writeln!(text, "<text x=\"{at:.1}\" y=\"{label:.1}\" text-anchor=\"middle\">{}</text>", count(decade));
    }
    for decade in y.decades() {
        let at = y.at(decade);
        let _ = writeln!(text, "<path d=\"M{left:.1} {at:.1}h{WIDTH}\" stroke=\"#ddd\"/>");
        let (right, low) = (left - 6.0, at + 4.0);
        let _ = writeln!(text, "<text x=\"{right:.1}\" y=\"{low:.1}\" text-anchor=\"end\">{decade}</text>");
    }
    for (program, line, points) in &lines {
        draw(text, points, &x, &y, LINES[*line].1, DASHES[program % DASHES.len()]);
    }
}

fn draw(text: &mut String, points: &Points, x: &Axis, y: &Axis, colour: &str, dash: &str) {
    let places: Vec<String> = points.iter().map(|(px, py)| format!("{:.1},{:.1}", x.at(*px), y.at(*py))).collect();
    let _ = writeln!(
        text,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" stroke-dasharray=\"{dash}\"/>",
        places.join(" ")
    );
    for (px, py) in points {
        let (cx, cy) = (x.at(*px), y.at(*py));
        let _ = writeln!(
            text,
            "<circle cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"3.5\" fill=\"{colour}\"><title>{} files: {}</title></circle>",
            count(*px),
            short(*py)
        );
    }
}

fn legend(text: &mut String, programs: &[String], y: f64) {
    let _ = writeln!(text, "<text x=\"{LEFT}\" y=\"{:.1}\">number of files</text>", y - 18.0);
    let mut x = LEFT;
    for (at, program) in programs.iter().enumerate() {
        for (case, colour) in LINES {
            let dash = DASHES[at % DASHES.len()];
            let _ = writeln!(
                text,
                "<path d=\"M{x} {y}h28\" stroke=\"{colour}\" stroke-width=\"2\" stroke-dasharray=\"{dash}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\">{program} {case}</text>",
                x + 34.0,
                y + 4.0
            );
            x += 128.0;
        }
    }
}

/// Ours, then the peers of the first row.
fn programs(bench: &Bench) -> Vec<String> {
    let peers = bench.rows.first().into_iter().flat_map(|row| row.peers.iter().map(|(name, _)| name.clone()));
    std::iter::once("hestner".to_owned()).chain(peers).collect()
}

fn points(bench: &Bench, program: usize, case: &str, metric: &str) -> Points {
    let rows = bench.rows.iter().filter(|row| row.metric == metric);
    let points = rows.filter_map(|row| {
        let files = row.case.strip_suffix(case)?.trim().replace(' ', "").parse::<f64>().ok()?;
        let figure = match program.checked_sub(1) {
            None => &row.hestner,
            Some(peer) => &row.peers.get(peer)?.1,
        };
        Some((files, figure.median))
    });
    points.collect()
}

fn count(files: f64) -> String {
    match files {
        f if f >= 1e6 => format!("{} M", f / 1e6),
        f if f >= 1e3 => format!("{} k", f / 1e3),
        f => format!("{f}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::{Figure, Row};

    #[test]
    fn every_point_of_every_line_is_drawn() {
        let row = |case: &str, metric, value| Row {
            case: case.to_owned(),
            metric,
            unit: "s",
            hestner: Figure::of(vec![value]),
            peers: Vec::new(),
        };
        let metrics = ["wall", "cpu", "rss biggest process"];
        let cases = ["10 000 first", "1 000 000 first", "10 000 restore"];
        let rows = cases.iter().flat_map(|case| metrics.iter().map(|m| row(case, m, 3.0))).collect();
        let drawn = svg(&Bench { name: "growth", remark: String::new(), rows });
        assert_eq!(drawn.matches("<circle").count(), 9);
        assert!(drawn.contains("1 M files: 3.00"), "{drawn}");
        assert!(!drawn.contains("NaN") && !drawn.contains("inf"), "{drawn}");
    }
}
