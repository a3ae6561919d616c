//! The grouped help of `msb`, which clap does not have: a template written from a table. A test fails when a command is in no
//! group or in two, so a new command cannot be forgotten.

use std::fmt::Write as _;

use clap::Command;

/// Groups and their commands, in the order of the help.
pub const GROUPS: &[(&str, &[&str])] = &[
    (
        "Sandboxes",
        &[
            "run", "create", "start", "stop", "restart", "rm", "ls", "ps", "inspect", "exec", "attach", "shell",
            "wait", "detach", "touch", "cp", "ssh", "label", "fork", "pause", "resume",
        ],
    ),
    ("Images", &["image", "load", "pull", "save", "registry"]),
    ("Storage", &["volume", "snapshot", "template", "df"]),
    ("Observability", &["logs", "events", "metrics", "top", "net"]),
    ("Installation", &["doctor", "config", "install", "uninstall", "self"]),
    ("Other", &["completion", "mcp", "debug", "version", "help"]),
];

/// Gives the command tree its grouped help.
#[must_use]
pub fn apply(command: Command) -> Command {
    let text = render(&command);
    // The template takes the place of clap's one list of commands; everything else is clap's.
    command.help_template(format!("{{about-with-newline}}\n{{usage-heading}} {{usage}}\n\n{text}\nOptions:\n{{options}}\n\nRun 'msb COMMAND --help' for more about a command.\n"))
}

fn render(command: &Command) -> String {
    let header = clap::builder::styling::Style::new().bold().underline();
    let literal = clap::builder::styling::Style::new().bold();
    let width = GROUPS.iter().flat_map(|(_, names)| names.iter()).map(|name| name.len()).max().unwrap_or_default();
    let mut text = String::new();
    for (title, names) in GROUPS {
        let _ = writeln!(text, "{header}{title}:{header:#}");
        for name in *names {
            let _ = writeln!(
                text,
                "  {literal}{name}{literal:#}{:padding$}  {}",
                "",
                about(command, name),
                padding = width - name.len()
            );
        }
        text.push('\n');
    }
    text.truncate(text.trim_end().len());
    text.push('\n');
    text
}

fn about(command: &Command, name: &str) -> String {
    if name == "help" {
        // clap adds this command itself, later than this.
        return "Print this message or the help of a command".into();
    }
    command.find_subcommand(name).and_then(|sub| sub.get_about()).map(ToString::to_string).unwrap_or_default()
}

/// The whole tree of commands and options, one line each.
#[must_use]
pub fn tree(command: &Command) -> String {
    let mut text = String::new();
    let mut command = command.clone();
    // Only a built tree knows how many values its options take.
    command.build();
    branch(&command, 0, &mut text);
    text
}

fn branch(command: &Command, depth: usize, text: &mut String) {
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let aliases: Vec<_> = command.get_visible_aliases().collect();
    let names = std::iter::once(command.get_name()).chain(aliases).collect::<Vec<_>>().join(", ");
    let _ = writeln!(text, "{:indent$}{names}  {about}", "", indent = depth * 2);
    for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
        let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
        let _ = writeln!(text, "{:indent$}{argument}  {help}", "", indent = depth * 2 + 4);
    }
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        branch(sub, depth + 1, text);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    #[test]
    fn every_command_is_in_one_group() {
        let mut command = crate::command();
        command.build();
        let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
        for name in super::GROUPS.iter().flat_map(|(_, names)| names.iter()) {
            *seen.entry(name).or_default() += 1;
        }
        for sub in command.get_subcommands() {
            let expected = usize::from(!sub.is_hide_set());
            let count = seen.remove(sub.get_name()).unwrap_or_default();
            assert_eq!(count, expected, "command '{}' is in {count} groups", sub.get_name());
        }
        assert!(seen.is_empty(), "groups name commands that do not exist: {seen:?}");
    }

    #[test]
    fn the_command_tree_is_consistent() {
        crate::command().debug_assert();
    }

    #[test]
    fn help_lists_every_visible_command_with_its_meaning() {
        let help = crate::command().render_help().to_string();
        for sub in crate::command().get_subcommands().filter(|sub| !sub.is_hide_set()) {
            let about = sub.get_about().unwrap().to_string();
            assert!(help.contains(&about), "{}: {about}", sub.get_name());
        }
    }
}
