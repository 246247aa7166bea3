//! One figure with its bar, and the table of all.

use std::io::{self, Write};

use serde::Serialize;

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    /// What was measured.
    what: String,
    /// The figure.
    figure: f64,
    /// Its unit.
    unit: &'static str,
    /// What it should be.
    bar: Bar,
    /// What it is compared with, where the bar is a ratio.
    floor: Option<f64>,
}

/// What a figure should be.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Bar {
    /// At most this.
    AtMost(f64),
    /// At least this.
    AtLeast(f64),
    /// At least this many times the floor.
    TimesFloor(f64),
    /// At most this many times the floor.
    AtMostTimesFloor(f64),
    /// Told for comparison.
    Told,
}

impl Row {
    pub(crate) fn at_most(what: &str, figure: f64, unit: &'static str, bar: f64) -> Self {
        Self { what: what.into(), figure, unit, bar: Bar::AtMost(bar), floor: None }
    }

    pub(crate) fn at_least(what: &str, figure: f64, unit: &'static str, bar: f64) -> Self {
        Self { what: what.into(), figure, unit, bar: Bar::AtLeast(bar), floor: None }
    }

    pub(crate) fn times(what: &str, figure: f64, unit: &'static str, floor: f64, bar: f64) -> Self {
        Self { what: what.into(), figure, unit, bar: Bar::TimesFloor(bar), floor: Some(floor) }
    }

    pub(crate) fn times_at_most(
        what: &str,
        figure: f64,
        unit: &'static str,
        floor: f64,
        bar: f64,
    ) -> Self {
        Self {
            what: what.into(),
            figure,
            unit,
            bar: Bar::AtMostTimesFloor(bar),
            floor: Some(floor),
        }
    }

    pub(crate) fn told(what: &str, figure: f64, unit: &'static str) -> Self {
        Self { what: what.into(), figure, unit, bar: Bar::Told, floor: None }
    }

    pub(crate) fn figure(&self) -> f64 {
        self.figure
    }

    pub(crate) fn met(&self) -> bool {
        match (self.bar, self.floor) {
            (Bar::AtMost(bar), _) => self.figure <= bar,
            (Bar::AtLeast(bar), _) => self.figure >= bar,
            (Bar::TimesFloor(bar), Some(floor)) => self.figure >= bar * floor,
            (Bar::AtMostTimesFloor(bar), Some(floor)) => self.figure <= bar * floor,
            (Bar::TimesFloor(_) | Bar::AtMostTimesFloor(_), None) => false,
            (Bar::Told, _) => true,
        }
    }

    fn cells(&self) -> [String; 5] {
        let number = |value: f64| match value.abs() {
            size if size >= 100.0 => format!("{value:.0}"),
            size if size >= 1.0 => format!("{value:.1}"),
            _ => format!("{value:.3}"),
        };
        let unit = self.unit;
        let (bar, floor) = match (self.bar, self.floor) {
            (Bar::AtMost(bar), _) => (format!("<= {} {unit}", number(bar)), String::new()),
            (Bar::AtLeast(bar), _) => (format!(">= {} {unit}", number(bar)), String::new()),
            (Bar::AtMostTimesFloor(bar), Some(floor)) => (
                format!("<= {bar} x floor"),
                format!("{} {unit} (x {:.1})", number(floor), self.figure / floor),
            ),
            (Bar::TimesFloor(bar), Some(floor)) => (
                format!(">= {bar} x floor"),
                format!("{} {unit} (x {:.1})", number(floor), self.figure / floor),
            ),
            _ => (String::new(), String::new()),
        };
        let verdict = match (self.bar, self.met()) {
            (Bar::Told, _) => "",
            (_, true) => "met",
            (_, false) => "MISSED",
        };
        let figure = format!("{} {unit}", number(self.figure));
        [self.what.clone(), figure, floor, bar, verdict.to_owned()]
    }
}

/// Writes the table to standard output.
pub(crate) fn print(rows: &[Row]) -> io::Result<()> {
    let head = ["WHAT", "MEASURED", "FLOOR", "BAR", ""].map(str::to_owned);
    let lines: Vec<_> = std::iter::once(head).chain(rows.iter().map(Row::cells)).collect();
    let width = |column: usize| {
        lines.iter().map(|line| line[column].chars().count()).max().unwrap_or_default()
    };
    let widths: Vec<_> = (0..5).map(width).collect();
    let mut out = io::stdout().lock();
    for line in &lines {
        let cells: Vec<_> =
            line.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}")).collect();
        writeln!(out, "{}", cells.join("  ").trim_end())?;
    }
    Ok(())
}
