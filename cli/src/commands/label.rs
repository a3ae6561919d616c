//! `msb label`: shows the labels of a sandbox, or changes them while it lives.

use std::collections::{BTreeMap, BTreeSet};

use clap::Args;
use msb_protocol::control::LabelRequest;
use msb_protocol::labels;

use crate::context::Context;
use crate::failure::{ExitStatus, Failure, invalid};
use crate::parse;
use crate::printer::plain;

/// Options of `label`.
#[derive(Debug, Args)]
pub struct LabelArgs {
    /// The sandbox
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Labels to set (KEY=VALUE) or to remove (KEY-); without any, they are shown
    #[arg(value_name = "KEY=VALUE|KEY-", allow_hyphen_values = true)]
    pub changes: Vec<String>,
}

/// Carries it out.
///
/// # Errors
/// `sandbox_not_found`, `invalid_label`.
pub async fn run(args: LabelArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let name = parse::name(&args.name)?;
    let request = request(&args.changes)?;
    let client = context.client().await?;
    let detail =
        if args.changes.is_empty() { client.inspect(&name).await? } else { client.label(&name, &request).await? };
    if context.printer.is_json() {
        context.printer.json(&detail.summary.labels)?;
    } else if !context.printer.is_quiet() {
        let lines: String = detail
            .summary
            .labels
            .iter()
            .map(|(key, value)| plain(&format!("{key}={value}").replace('\n', "\\n")) + "\n")
            .collect();
        context.printer.text(&lines)?;
    }
    Ok(ExitStatus::SUCCESS)
}

fn request(changes: &[String]) -> Result<LabelRequest, Failure> {
    let (mut set, mut remove) = (BTreeMap::new(), BTreeSet::new());
    for change in changes {
        let key = match (change.split_once('='), change.strip_suffix('-')) {
            (Some((key, value)), _) => {
                labels::check(key, value)?;
                set.insert(key.to_owned(), value.to_owned());
                key
            }
            (None, Some(key)) if !key.is_empty() => {
                remove.insert(key.to_owned());
                key
            }
            _ => return Err(invalid(format!("{change:?} is neither KEY=VALUE nor KEY-"))),
        };
        if set.contains_key(key) && remove.contains(key) {
            return Err(invalid(format!("label {key} is both set and removed")));
        }
    }
    Ok(LabelRequest { set, remove: remove.into_iter().collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_read_as_kubectl_does() {
        let words = |list: &[&str]| list.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let request_of = |list: &[&str]| request(&words(list));
        let made = request_of(&["a=1", "b=", "c-", "d=x-"]).unwrap();
        assert_eq!(made.set, BTreeMap::from([("a", "1"), ("b", ""), ("d", "x-")].map(|(k, v)| (k.into(), v.into()))));
        assert_eq!(made.remove, ["c"]);
        for bad in [&["a"][..], &["-"], &["=x"], &["a=1", "a-"], &["service.x=1"]] {
            assert!(request_of(bad).is_err(), "{bad:?}");
        }
    }
}
