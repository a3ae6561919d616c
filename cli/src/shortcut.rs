//! A tree of commands with one command in it, for those that people and programs type all the time: clap builds every option of every command
//! before it looks at the first word, which takes longer than `msb ls` itself.
//!
//! Called by `main` first. What such a tree does not take (help, a mistake, a prefix) is given to the whole tree, whose words are the ones that
//! people read. A test compares both.

use std::ffi::OsString;

use clap::{Arg, ArgAction, Args, Command};

use crate::arguments::GlobalArgs;
use crate::commands::{create, exec, inspect, list, logs, remove, run, start, status, stop};

/// Adds a command's options.
type Options = fn(Command) -> Command;

/// The commands, each with its options.
const COMMANDS: &[(&str, Options)] = &[
    ("run", run::RunArgs::augment_args),
    ("create", create::CreateArgs::augment_args),
    ("exec", exec::ExecArgs::augment_args),
    ("ls", list::ListArgs::augment_args),
    ("ps", status::StatusArgs::augment_args),
    ("inspect", inspect::InspectArgs::augment_args),
    ("logs", logs::LogsArgs::augment_args),
    ("start", start::StartArgs::augment_args),
    ("stop", stop::StopArgs::augment_args),
    ("rm", remove::RemoveArgs::augment_args),
];

/// The tree for these words, if the first of them is one of those commands.
pub(crate) fn command(words: &[OsString]) -> Option<Command> {
    let first = words.get(1)?.to_str()?;
    let (name, options) = COMMANDS.iter().find(|(name, _)| *name == first)?;
    let tree = Arg::new("tree").long("tree").action(ArgAction::SetTrue);
    Some(GlobalArgs::augment_args(Command::new("msb")).arg(tree).subcommand(options(Command::new(*name))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_command_has_the_options_of_the_whole_tree_and_no_other() {
        let mut whole = crate::command();
        whole.build();
        for (name, _) in COMMANDS {
            let mut short = command(&["msb".into(), (*name).into()]).expect("a command");
            short.build();
            let options = |tree: &Command| {
                let found = tree.find_subcommand(name).expect("the command");
                let mut all: Vec<String> = found.get_arguments().map(|argument| format!("{argument:?}")).collect();
                all.sort();
                all
            };
            assert_eq!(options(&short), options(&whole), "{name}");
            assert_eq!(
                short.find_subcommand(name).expect("the command").get_groups().count(),
                whole.find_subcommand(name).expect("the command").get_groups().count()
            );
        }
    }

    #[test]
    fn other_words_are_the_whole_trees() {
        for words in
            [&["msb"][..], &["msb", "--quiet", "ls"], &["msb", "list"], &["msb", "lss"], &["msb", "image", "ls"]]
        {
            let words: Vec<OsString> = words.iter().map(Into::into).collect();
            assert!(command(&words).is_none(), "{words:?}");
        }
        // Taken by neither: the whole tree says why.
        for words in [&["msb", "ls", "--help"][..], &["msb", "exec"], &["msb", "stop", "--no-such"]] {
            let words: Vec<OsString> = words.iter().map(Into::into).collect();
            assert!(command(&words).expect("a command").try_get_matches_from(&words).is_err(), "{words:?}");
        }
    }
}
