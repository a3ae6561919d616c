//! Names of signals on the wire (RFC 4254, section 6.9) and their numbers in the guest (signal(7), x86-64). Pure.

use russh::Sig;

const NAMES: [(&str, i32); 15] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
];

/// The number of a signal a client sends; none for names that are not known.
pub(crate) fn number(signal: &Sig) -> Option<i32> {
    let name = match signal {
        Sig::ABRT => "ABRT",
        Sig::ALRM => "ALRM",
        Sig::FPE => "FPE",
        Sig::HUP => "HUP",
        Sig::ILL => "ILL",
        Sig::INT => "INT",
        Sig::KILL => "KILL",
        Sig::PIPE => "PIPE",
        Sig::QUIT => "QUIT",
        Sig::SEGV => "SEGV",
        Sig::TERM => "TERM",
        Sig::USR1 => "USR1",
        Sig::Custom(name) => name.strip_prefix("SIG").unwrap_or(name),
    };
    NAMES.iter().find(|(known, _)| *known == name).map(|(_, number)| *number)
}

/// The number behind a name that [`name`] gives.
pub(crate) fn number_of_death(signal: &Sig) -> Option<i32> {
    number(signal).or_else(|| match signal {
        Sig::Custom(text) => {
            let text = text.strip_suffix("@msb")?;
            let listed = NAMES.iter().find(|(known, _)| *known == text).map(|(_, number)| *number);
            listed.or_else(|| text.strip_prefix("SIG")?.parse().ok())
        }
        _ => None,
    })
}

/// The name under which a death is told. One that the RFC does not list gets a local name, as its section 6.10 asks.
pub(crate) fn name(number: i32) -> Sig {
    match number {
        1 => Sig::HUP,
        2 => Sig::INT,
        3 => Sig::QUIT,
        4 => Sig::ILL,
        6 => Sig::ABRT,
        8 => Sig::FPE,
        9 => Sig::KILL,
        10 => Sig::USR1,
        11 => Sig::SEGV,
        13 => Sig::PIPE,
        14 => Sig::ALRM,
        15 => Sig::TERM,
        // RFC 4254 lists USR2 too; the library has no constant for it.
        12 => Sig::Custom("USR2".into()),
        other => Sig::Custom(match NAMES.iter().find(|(_, number)| *number == other) {
            Some((name, _)) => format!("{name}@msb"),
            None => format!("SIG{other}@msb"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listed_names_and_numbers_agree_in_both_directions() {
        for wanted in [1, 2, 3, 4, 6, 8, 9, 10, 11, 12, 13, 14, 15] {
            assert_eq!(number(&name(wanted)), Some(wanted));
        }
        assert_eq!(number(&Sig::Custom("SIGUSR2".into())), Some(12));
        assert_eq!(number(&Sig::Custom("NOPE".into())), None);
        assert!(matches!(name(7), Sig::Custom(name) if name == "BUS@msb"));
        for wanted in 1..=64 {
            assert_eq!(number_of_death(&name(wanted)), Some(wanted));
        }
        assert!(matches!(name(64), Sig::Custom(name) if name == "SIG64@msb"));
    }
}
