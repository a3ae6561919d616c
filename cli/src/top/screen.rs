//! The terminal as ratatui's backend: cells become ANSI sequences of sixteen colours on standard output. Used by `commands::top` with a
//! terminal in raw mode; everything that it changes is given back when it is dropped.

use std::fmt::Write as _;
use std::io::{self, Write as _};

use ratatui::backend::{Backend, ClearType, WindowSize};
use ratatui::buffer::Cell;
use ratatui::layout::{Position, Size};
use ratatui::style::{Color, Modifier};

use crate::failure::Failure;
use crate::terminal::{self, RawTerminal};

/// The other screen, so that what stood there before comes back; no cursor.
const ENTER: &str = "\x1b[?1049h\x1b[?25l\x1b[2J";
const LEAVE: &str = "\x1b[0m\x1b[?25h\x1b[?1049l";

/// The whole terminal.
pub struct FullScreen {
    _raw: RawTerminal,
    waiting: String,
}

impl FullScreen {
    /// Takes the terminal.
    ///
    /// # Errors
    /// `invalid_config` if there is none.
    pub fn enter() -> Result<Self, Failure> {
        let raw = RawTerminal::enter()?;
        let mut screen = Self { _raw: raw, waiting: ENTER.to_owned() };
        screen.flush().map_err(Failure::Output)?;
        Ok(screen)
    }
}

impl Drop for FullScreen {
    fn drop(&mut self) {
        self.waiting = LEAVE.to_owned();
        // A terminal that is gone needs nothing back.
        let _ = self.flush();
    }
}

impl Backend for FullScreen {
    type Error = io::Error;

    fn draw<'a, I>(&mut self, content: I) -> io::Result<()>
    where
        I: Iterator<Item = (u16, u16, &'a Cell)>,
    {
        let mut style = None;
        let mut next = None;
        for (column, line, cell) in content {
            if next != Some((column, line)) {
                let _ = write!(self.waiting, "\x1b[{};{}H", line + 1, column + 1);
            }
            let wanted = (cell.fg, cell.bg, cell.modifier);
            if style != Some(wanted) {
                self.waiting.push_str(&sequence(wanted.0, wanted.1, wanted.2));
                style = Some(wanted);
            }
            self.waiting.push_str(cell.symbol());
            // A wide character takes the column behind it too: then the place is said anew.
            next = (cell.symbol().len() == 1).then_some((column + 1, line));
        }
        self.waiting.push_str("\x1b[0m");
        Ok(())
    }

    fn hide_cursor(&mut self) -> io::Result<()> {
        self.waiting.push_str("\x1b[?25l");
        Ok(())
    }

    fn show_cursor(&mut self) -> io::Result<()> {
        self.waiting.push_str("\x1b[?25h");
        Ok(())
    }

    fn get_cursor_position(&mut self) -> io::Result<Position> {
        // Asked for by inline views only; this one has the whole screen.
        Ok(Position::ORIGIN)
    }

    fn set_cursor_position<P: Into<Position>>(&mut self, position: P) -> io::Result<()> {
        let position = position.into();
        let _ = write!(self.waiting, "\x1b[{};{}H", position.y + 1, position.x + 1);
        Ok(())
    }

    fn clear(&mut self) -> io::Result<()> {
        self.clear_region(ClearType::All)
    }

    fn clear_region(&mut self, region: ClearType) -> io::Result<()> {
        self.waiting.push_str(match region {
            ClearType::All => "\x1b[2J",
            ClearType::AfterCursor => "\x1b[J",
            ClearType::BeforeCursor => "\x1b[1J",
            ClearType::CurrentLine => "\x1b[2K",
            ClearType::UntilNewLine => "\x1b[K",
        });
        Ok(())
    }

    fn size(&self) -> io::Result<Size> {
        let size = terminal::size().ok_or_else(|| io::Error::other("there is no terminal"))?;
        Ok(Size::new(size.columns, size.rows))
    }

    fn window_size(&mut self) -> io::Result<WindowSize> {
        Ok(WindowSize { columns_rows: self.size()?, pixels: Size::ZERO })
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(self.waiting.as_bytes())?;
        self.waiting.clear();
        out.flush()
    }
}

/// Select Graphic Rendition (ECMA-48, 8.3.117), from nothing each time.
fn sequence(foreground: Color, background: Color, modifier: Modifier) -> String {
    let mut text = String::from("\x1b[0");
    for (what, code) in [(Modifier::BOLD, 1), (Modifier::DIM, 2), (Modifier::UNDERLINED, 4), (Modifier::REVERSED, 7)] {
        if modifier.contains(what) {
            let _ = write!(text, ";{code}");
        }
    }
    for (color, base) in [(foreground, 30), (background, 40)] {
        if let Some(number) = number(color) {
            // The bright eight lie sixty further.
            let _ = write!(text, ";{}", if number < 8 { base + number } else { base + 52 + number });
        }
    }
    text.push('m');
    text
}

/// The number of one of the sixteen colours. The view uses no others.
fn number(color: Color) -> Option<u8> {
    Some(match color {
        Color::Black => 0,
        Color::Red => 1,
        Color::Green => 2,
        Color::Yellow => 3,
        Color::Blue => 4,
        Color::Magenta => 5,
        Color::Cyan => 6,
        Color::Gray => 7,
        Color::DarkGray => 8,
        Color::LightRed => 9,
        Color::LightGreen => 10,
        Color::LightYellow => 11,
        Color::LightBlue => 12,
        Color::LightMagenta => 13,
        Color::LightCyan => 14,
        Color::White => 15,
        Color::Reset | Color::Rgb(..) | Color::Indexed(_) => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn styles_become_sequences_of_sixteen_colours() {
        assert_eq!(sequence(Color::Reset, Color::Reset, Modifier::empty()), "\x1b[0m");
        assert_eq!(sequence(Color::Red, Color::Reset, Modifier::BOLD | Modifier::REVERSED), "\x1b[0;1;7;31m");
        assert_eq!(sequence(Color::DarkGray, Color::White, Modifier::empty()), "\x1b[0;90;107m");
    }
}
