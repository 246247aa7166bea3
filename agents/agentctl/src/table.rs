//! Aligned columns for people.

use crate::console::tame;

/// How a cell is meant; colours follow from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tone {
    Plain,
    Good,
    Warning,
    Bad,
}

/// One cell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    /// A cell with a meaning.
    pub(crate) fn toned(text: impl Into<String>, tone: Tone) -> Self {
        Self { text: tame(&text.into()), tone }
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::toned(text, Tone::Plain)
    }
}

/// Rows under headers; some columns are shown only in wide output.
#[derive(Debug)]
pub(crate) struct Table {
    wide: bool,
    headers: Vec<(&'static str, bool)>,
    rows: Vec<Vec<Cell>>,
}

impl Table {
    /// An empty table.
    pub(crate) fn new(wide: bool) -> Self {
        Self { wide, headers: Vec::new(), rows: Vec::new() }
    }

    /// Names the columns. A name that starts with `+` is shown only in wide output.
    pub(crate) fn headers(&mut self, names: &[&'static str]) {
        self.headers = names
            .iter()
            .map(|name| (name.trim_start_matches('+'), self.wide || !name.starts_with('+')))
            .collect();
    }

    /// Adds a row: one cell for each column, shown or not.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// The text: columns two blanks apart, no blanks at the end of a line.
    pub(crate) fn render(&self, colour: bool) -> String {
        let shown: Vec<usize> = (0..self.headers.len())
            .filter(|&column| self.headers.get(column).is_some_and(|(_, shown)| *shown))
            .collect();
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column)).map(|cell| &*cell.text);
            let header = self.headers.get(column).map(|(name, _)| *name);
            cells.chain(header).map(|text| text.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = shown.iter().map(|&column| width(column)).collect();
        let mut out = String::new();
        let heads = self.headers.iter().map(|(name, _)| Cell::from(*name)).collect();
        for row in std::iter::once(&heads).chain(&self.rows) {
            let last = shown.iter().rposition(|&column| {
                row.get(column).is_some_and(|cell: &Cell| !cell.text.is_empty())
            });
            for (place, (&column, &width)) in shown.iter().zip(&widths).enumerate() {
                let Some(cell) = row.get(column).filter(|_| last.is_some_and(|it| place <= it))
                else {
                    break;
                };
                out.push_str(&paint(cell, colour));
                if last != Some(place) {
                    let blanks = width.saturating_sub(cell.text.chars().count()) + 2;
                    out.extend(std::iter::repeat_n(' ', blanks));
                }
            }
            out.push('\n');
        }
        out
    }
}

fn paint(cell: &Cell, colour: bool) -> String {
    let code = match cell.tone {
        Tone::Good => "32",
        Tone::Warning => "33",
        Tone::Bad => "31",
        Tone::Plain => return cell.text.clone(),
    };
    if colour { format!("\u{1b}[{code}m{}\u{1b}[0m", cell.text) } else { cell.text.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(wide: bool) -> Table {
        let mut table = Table::new(wide);
        table.headers(&["ID", "ALIVE", "+VERSION", "REASON"]);
        table.row(["6f0c".into(), Cell::toned(":-)", Tone::Good), "0.1.0".into(), "".into()]);
        table.row(["b2".into(), Cell::toned("xxx", Tone::Bad), "0.1.0".into(), "gone".into()]);
        table
    }

    #[test]
    fn columns_are_aligned_without_trailing_blanks() {
        let expected = "\
ID    ALIVE  REASON
6f0c  :-)
b2    xxx    gone
";
        assert_eq!(table(false).render(false), expected);
    }

    #[test]
    fn wide_output_has_more_columns() {
        let expected = "\
ID    ALIVE  VERSION  REASON
6f0c  :-)    0.1.0
b2    xxx    0.1.0    gone
";
        assert_eq!(table(true).render(false), expected);
    }

    #[test]
    fn colours_do_not_move_columns() {
        let painted = table(false).render(true);
        assert!(painted.contains("\u{1b}[31mxxx\u{1b}[0m    gone"), "{painted}");
        let plain = painted.replace("\u{1b}[31m", "").replace("\u{1b}[32m", "");
        assert_eq!(plain.replace("\u{1b}[0m", ""), table(false).render(false));
    }
}
