//! Tables for people: a header, rows, two spaces between columns, nothing cut off. Made for reading; programs read JSON.

use comfy_table::{ContentArrangement, TableStyle};

use crate::printer::plain;

/// A table.
#[derive(Debug)]
pub struct Table {
    header: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column names.
    #[must_use]
    pub fn new(header: &[&'static str]) -> Self {
        Self { header: header.to_vec(), rows: Vec::new() }
    }

    /// Adds a row of as many cells as there are columns.
    pub fn row(&mut self, cells: Vec<String>) {
        debug_assert_eq!(cells.len(), self.header.len(), "a row has as many cells as the header");
        // A newline or tab in a cell would break the rows apart.
        self.rows.push(cells.iter().map(|cell| plain(&cell.replace('\n', "\\n").replace('\t', "\\t"))).collect());
    }

    /// The table as text.
    #[must_use]
    pub fn render(&self) -> String {
        let mut table = comfy_table::Table::new();
        table.load_style(TableStyle::new()).set_content_arrangement(ContentArrangement::Disabled);
        table.set_header(self.header.clone());
        table.add_rows(self.rows.clone());
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        let mut text = table.trim_fmt();
        text.push('\n');
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_wide_characters_count_as_wide() {
        let mut table = Table::new(&["NAME", "STATUS"]);
        table.row(vec!["日本".into(), "running".into()]);
        table.row(vec!["a".into(), "stopped\nx".into()]);
        assert_eq!(table.render(), "NAME  STATUS\n日本  running\na     stopped\\nx\n");
    }

    #[test]
    fn a_table_without_rows_is_its_header() {
        assert_eq!(Table::new(&["A", "B"]).render(), "A  B\n");
    }
}
