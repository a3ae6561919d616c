//! Files of variables and labels in docker's form: one `NAME=value` a line, the value taken as it stands (no quotes, no
//! escapes), lines that begin with `#` and empty lines left out, a bare `NAME` taken from the host if it is set there.

use std::io::Read;
use std::path::Path;

use crate::failure::{self, Failure, invalid};

/// Largest file in bytes: well above what a sandbox's environment can hold.
pub const FILE_LEN_MAX: u64 = 4 << 20;

/// Reads a file of variables.
///
/// # Errors
/// `path_not_found` and the like, `invalid_config` naming file and line.
pub fn read(path: &Path, host: &dyn Fn(&str) -> Option<String>) -> Result<Vec<(String, String)>, Failure> {
    let text = text(path)?;
    parse(&text, host).map_err(|(line, why)| invalid(format!("{}:{line}: {why}", path.display())))
}

/// Reads a file of labels: as variables, but a bare key is a label with the empty value.
///
/// # Errors
/// As [`read`].
pub fn read_labels(path: &Path) -> Result<Vec<(String, String)>, Failure> {
    let text = text(path)?;
    parse(&text, &|_| Some(String::new())).map_err(|(line, why)| invalid(format!("{}:{line}: {why}", path.display())))
}

fn text(path: &Path) -> Result<String, Failure> {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(|error| failure::file(path, &error))?;
    file.take(FILE_LEN_MAX + 1).read_to_end(&mut bytes).map_err(|error| failure::file(path, &error))?;
    if bytes.len() as u64 > FILE_LEN_MAX {
        return Err(invalid(format!("{} is larger than {FILE_LEN_MAX} bytes", path.display())));
    }
    String::from_utf8(bytes).map_err(|_| invalid(format!("{} is no UTF-8 text", path.display())))
}

/// Parses the text of a file of variables; an error is a line, from 1, and a reason that never holds a value.
///
/// # Errors
/// See above.
pub fn parse(text: &str, host: &dyn Fn(&str) -> Option<String>) -> Result<Vec<(String, String)>, (usize, String)> {
    let mut variables = Vec::new();
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    for (index, line) in text.split('\n').enumerate() {
        let line = line.strip_suffix('\r').unwrap_or(line).trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (name, value) = match line.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (line.trim_end(), None),
        };
        if name.is_empty() {
            return Err((index + 1, "a variable without a name".into()));
        }
        if name.contains(char::is_whitespace) {
            return Err((index + 1, format!("the name {name:?} has white space in it")));
        }
        if let Some(value) = value.or_else(|| host(name)) {
            variables.push((name.to_owned(), value));
        }
    }
    Ok(variables)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<(String, String)>, (usize, String)> {
        parse(text, &|name| (name == "HOSTVAR").then(|| "from host".into()))
    }

    #[test]
    fn lines_are_taken_as_docker_takes_them() {
        let text = "\u{feff}# comment\n\n  A=1\nB=\"quoted\" # not a comment\nC=\nD= spaced \r\nHOSTVAR\nUNSET\nE=a=b\n   # indented comment\n";
        let expected = [
            ("A", "1"),
            ("B", "\"quoted\" # not a comment"),
            ("C", ""),
            ("D", " spaced "),
            ("HOSTVAR", "from host"),
            ("E", "a=b"),
        ];
        assert_eq!(read(text).unwrap(), expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line_and_without_values() {
        let (line, why) = read("A=1\nMY SECRET=hunter2\n").unwrap_err();
        assert_eq!(line, 2);
        assert!(why.contains("MY SECRET") && !why.contains("hunter2"));
        assert_eq!(read("=x").unwrap_err().0, 1);
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_variables_or_an_error(text in proptest::prelude::any::<String>()) {
            for (name, _) in read(&text).unwrap_or_default() {
                proptest::prop_assert!(!name.is_empty() && !name.contains('=') && !name.contains(char::is_whitespace));
            }
        }
    }
}
