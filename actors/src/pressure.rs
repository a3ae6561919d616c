//! Whether this host has too little processor time to go round (pressure stall information; proc_pid(5), Documentation/accounting/psi.rst).
//!
//! Asked by `sandbox::actor` before it holds a guest to be dead that may only have had no processor. Never guesses: a kernel that does not say
//! counts as one with time enough.

use std::path::PathBuf;

/// Where the kernel tells it.
pub const CPU_PRESSURE: &str = "/proc/pressure/cpu";
/// Share of the last ten seconds, in percent, in which something waited for a processor.
const STARVED_PERCENT: f64 = 50.0;

/// The file that says it.
#[derive(Clone, Debug)]
pub struct Pressure(PathBuf);

impl Pressure {
    /// As this file tells it.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Whether somebody waited for a processor most of the last ten seconds. The read is of memory of the kernel's and waits for nothing.
    #[must_use]
    pub fn is_starved(&self) -> bool {
        std::fs::read_to_string(&self.0).is_ok_and(|text| waiting_percent(&text).is_some_and(|p| p >= STARVED_PERCENT))
    }
}

/// `avg10` of the line `some`.
fn waiting_percent(text: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix("some "))?;
    line.split(' ').find_map(|word| word.strip_prefix("avg10="))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_words_are_understood_and_others_count_for_nothing() {
        let text = "some avg10=62.50 avg60=0.98 avg300=7.94 total=11632422136\nfull avg10=99.00 avg60=0.00 avg300=0.00 total=0\n";
        assert_eq!(waiting_percent(text), Some(62.5));
        for nonsense in ["", "full avg10=99.00", "some", "some avg10=", "some avg10=much avg60=1"] {
            assert_eq!(waiting_percent(nonsense), None, "{nonsense}");
        }
        assert!(!Pressure::at("/nowhere").is_starved());
    }
}
