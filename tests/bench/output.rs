//! What a benchmark found, as a table and as JSON.
//!
//! In: rows of figures. Out: text. The JSON form is what others rely on: `bench`, `machine` and `rows` of
//! `case`, `metric`, `unit`, `hestner`, `peer`, `peer_value`, `ratio`, and the spread beside them. Where there are
//! several peers, `peer` and `ratio` are of the best one for that figure, and `peers` has the medians of all.

use std::fmt::Write as _;

use serde_json::{Value, json};

/// From so many measurements on, the spread has a last hundredth.
const MANY: usize = 40;

/// Median and spread of some measurements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Figure {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    /// 99 of 100 are not above it; only of many.
    pub(crate) p99: Option<f64>,
}

impl Figure {
    /// Of at least one value.
    pub(crate) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median =
            if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) };
        let rank = (values.len() * 99).div_ceil(100).max(1);
        let p99 = (values.len() >= MANY).then(|| values[rank - 1]);
        Self { median, min: values[0], max: values[values.len() - 1], p99 }
    }

    fn shown(&self) -> String {
        let p99 = self.p99.map_or_else(String::new, |p99| format!(" p99 {p99:.2}"));
        format!("{:.2} ({:.2}..{:.2}{p99})", self.median, self.min, self.max)
    }
}

/// One line of a benchmark.
pub(crate) struct Row {
    pub(crate) case: String,
    pub(crate) metric: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) hestner: Figure,
    /// Others that did the same, in turns.
    pub(crate) peers: Vec<(String, Figure)>,
}

impl Row {
    /// Whoever needed least.
    fn best(&self) -> Option<&(String, Figure)> {
        self.peers.iter().min_by(|a, b| a.1.median.total_cmp(&b.1.median))
    }

    /// Our share of what the best peer needed.
    fn ratio(&self) -> Option<f64> {
        self.best().filter(|(_, f)| f.median > 0.0).map(|(_, f)| self.hestner.median / f.median)
    }
}

/// A whole benchmark.
pub(crate) struct Bench {
    pub(crate) name: &'static str,
    /// What was measured, for people.
    pub(crate) remark: String,
    pub(crate) rows: Vec<Row>,
}

/// For machines.
pub(crate) fn json(bench: &Bench) -> Value {
    let rows: Vec<Value> = bench.rows.iter().map(row_json).collect();
    json!({"bench": bench.name, "remark": bench.remark, "machine": machine(), "rows": rows})
}

fn row_json(row: &Row) -> Value {
    let Row { case, metric, unit, hestner, peers } = row;
    let best = row.best();
    let of_best = |of: fn(&Figure) -> f64| best.map(|(_, figure)| rounded(of(figure)));
    let all: serde_json::Map<String, Value> =
        peers.iter().map(|(name, figure)| (name.clone(), rounded(figure.median).into())).collect();
    json!({
        "case": case, "metric": metric, "unit": unit,
        "hestner": rounded(hestner.median), "hestner_min": rounded(hestner.min), "hestner_max": rounded(hestner.max),
        "hestner_p99": hestner.p99.map(rounded), "peer_p99": best.and_then(|(_, f)| f.p99).map(rounded),
        "peer": best.map(|(name, _)| name), "peer_value": of_best(|f| f.median),
        "peer_min": of_best(|f| f.min), "peer_max": of_best(|f| f.max),
        "ratio": row.ratio().map(rounded), "peers": all,
    })
}

fn rounded(value: f64) -> f64 {
    (value * 10_000.0).round() / 10_000.0
}

/// For people.
pub(crate) fn table(bench: &Bench) -> String {
    let mut text = format!("\n{}\n{}\n\n", bench.remark, machine());
    let is_wide = bench.rows.iter().any(|row| row.hestner.p99.is_some());
    let figure = if is_wide { 36 } else { 26 };
    let case = bench.rows.iter().map(|row| row.case.len()).max().unwrap_or_default().max(14);
    let peers = peer_names(bench);
    let _ = write!(text, "{:<case$} {:<22} {:>figure$}", "case", "metric", "hestner (min..max)");
    for peer in &peers {
        let _ = write!(text, " {peer:>figure$}");
    }
    let _ = writeln!(text, " {:>7}", "ratio");
    for row in &bench.rows {
        let metric = format!("{}, {}", row.metric, row.unit);
        let _ = write!(text, "{:<case$} {metric:<22} {:>figure$}", row.case, row.hestner.shown());
        for at in 0..peers.len() {
            let shown = row.peers.get(at).map_or_else(|| "-".to_owned(), |(_, f)| f.shown());
            let _ = write!(text, " {shown:>figure$}");
        }
        let _ = writeln!(text, " {:>7}", shown_ratio(row));
    }
    text
}

/// For a page of the documentation: medians only.
pub(crate) fn markdown(bench: &Bench) -> String {
    let peers = peer_names(bench);
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let words = |first: &[&str]| first.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let head = [words(&["case", "figure", "Hestner"]), peers.clone(), words(&["ratio"])].concat();
    let mut text = line(head.clone());
    text.push_str(&line(
        head.iter().enumerate().map(|(at, _)| if at < 2 { "---" } else { "---:" }.to_owned()).collect(),
    ));
    for row in &bench.rows {
        let shown = |at| row.peers.get(at).map_or_else(|| "-".to_owned(), |(_, f): &(_, Figure)| short(f.median));
        let own = [row.case.clone(), format!("{}, {}", row.metric, row.unit), short(row.hestner.median)];
        let cells = [own.to_vec(), (0..peers.len()).map(shown).collect(), vec![shown_ratio(row)]].concat();
        text.push_str(&line(cells));
    }
    let _ = write!(text, "\n{}. Machine: {}.\n", bench.remark, machine_line());
    text
}

/// Columns of the peers: their names where there are several, which then stand in one order in all rows.
fn peer_names(bench: &Bench) -> Vec<String> {
    let widest = bench.rows.iter().max_by_key(|row| row.peers.len());
    match widest.map(|row| &row.peers[..]).unwrap_or_default() {
        [] | [_] => vec!["peer (min..max)".to_owned()],
        several => several.iter().map(|(name, _)| name.clone()).collect(),
    }
}

fn shown_ratio(row: &Row) -> String {
    row.ratio().map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"))
}

/// Three digits are as many as a figure is good for.
pub(crate) fn short(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

fn machine_line() -> String {
    let machine = machine();
    let text = |name: &str| machine[name].as_str().unwrap_or_default().to_owned();
    format!("{} ({} cores), {}, Linux {}", text("cpu"), machine["cores"], text("memory"), text("kernel"))
}

/// What a figure must be read beside.
fn machine() -> Value {
    let line = |file: &str, key: &str| -> String {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let found = text.lines().find(|line| line.starts_with(key)).and_then(|line| line.split_once(':'));
        found.map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
    };
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    json!({
        "cpu": line("/proc/cpuinfo", "model name"),
        "cores": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        "memory": line("/proc/meminfo", "MemTotal"),
        "kernel": kernel.trim(),
    })
}
