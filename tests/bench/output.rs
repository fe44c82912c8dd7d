//! What a benchmark found, as a table and as JSON.
//!
//! In: rows of figures. Out: text. The JSON form is what others rely on: `bench`, `machine` and `rows` of
//! `case`, `metric`, `unit`, `hestner`, `peer`, `peer_value`, `ratio`, and the spread beside them.

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
    pub(crate) peer: Option<(String, Figure)>,
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
    let Row { case, metric, unit, hestner, peer } = row;
    let value = peer.as_ref().map(|(_, figure)| figure.median);
    json!({
        "case": case, "metric": metric, "unit": unit,
        "hestner": rounded(hestner.median), "hestner_min": rounded(hestner.min), "hestner_max": rounded(hestner.max),
        "hestner_p99": hestner.p99.map(rounded), "peer_p99": peer.as_ref().and_then(|(_, f)| f.p99).map(rounded),
        "peer": peer.as_ref().map(|(name, _)| name), "peer_value": value.map(rounded),
        "peer_min": peer.as_ref().map(|(_, f)| rounded(f.min)), "peer_max": peer.as_ref().map(|(_, f)| rounded(f.max)),
        "ratio": value.filter(|v| *v > 0.0).map(|v| rounded(hestner.median / v)),
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
    let (ours, theirs) = ("hestner (min..max)", "peer (min..max)");
    let _ = writeln!(text, "{:<case$} {:<22} {ours:>figure$} {theirs:>figure$} {:>7}", "case", "metric", "ratio");
    for row in &bench.rows {
        let peer = row.peer.as_ref().map_or_else(|| "-".to_owned(), |(_, f)| f.shown());
        let ratio = row.peer.as_ref().filter(|(_, f)| f.median > 0.0);
        let ratio = ratio.map_or_else(|| "-".to_owned(), |(_, f)| format!("{:.2}", row.hestner.median / f.median));
        let metric = format!("{}, {}", row.metric, row.unit);
        let hestner = row.hestner.shown();
        let _ = writeln!(text, "{:<case$} {metric:<22} {hestner:>figure$} {peer:>figure$} {ratio:>7}", row.case);
    }
    text
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
