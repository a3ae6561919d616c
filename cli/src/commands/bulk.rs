//! Operations on several sandboxes: who is meant, and one after another so that one failure does not keep the rest from happening.

use clap::Args;
use msb_protocol::control::{MetricsQuery, SandboxDetail, SandboxSummary};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::id::SandboxName;
use msb_protocol::labels::LabelTerm;
use msb_protocol::selector::Selector;
use msb_sdk::{Client, Error};
use serde::Serialize;

use crate::context::Context;
use crate::failure::{ExitStatus, Failure, invalid};
use crate::parse;

/// One or more names.
#[derive(Debug, Args)]
pub struct NamesArgs {
    /// Names of sandboxes
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
}

/// Which sandboxes by their labels; every term must fit.
#[derive(Debug, Default, Args)]
pub struct FilterArgs {
    /// Those with this label; a bare KEY asks whether it exists, several must all fit
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    pub label: Vec<String>,
    /// Those that fit an expression, as in 'team in (ml,web),!debug'
    #[arg(long, value_name = "EXPRESSION")]
    pub selector: Vec<String>,
}

impl FilterArgs {
    /// Whether there are no terms.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.label.is_empty() && self.selector.is_empty()
    }

    /// Checks the terms before anything is asked.
    ///
    /// # Errors
    /// `invalid_label`, `invalid_selector`.
    pub fn check(&self) -> Result<(), Failure> {
        for term in &self.label {
            LabelTerm::parse(term)?;
        }
        for expression in &self.selector {
            Selector::parse(expression)?;
        }
        Ok(())
    }

    /// Checks the terms, and that none of them means everything by being empty.
    ///
    /// # Errors
    /// `invalid_label`, `invalid_selector`.
    pub fn check_narrow(&self) -> Result<(), Failure> {
        self.check()?;
        for expression in &self.selector {
            if Selector::parse(expression)?.is_empty() {
                let message = "an empty selector would mean every sandbox";
                return Err(ApiError::new(ErrorCode::InvalidSelector, message).into());
            }
        }
        Ok(())
    }

    /// The same terms for a question about metrics.
    #[must_use]
    pub fn metrics_query(&self, names: Vec<String>) -> MetricsQuery {
        MetricsQuery { names, labels: self.label.clone(), selectors: self.selector.clone() }
    }

    /// The sandboxes that fit, newest first.
    ///
    /// # Errors
    /// Those of the service.
    pub async fn list(&self, client: &Client) -> Result<Vec<SandboxSummary>, Failure> {
        Ok(client.select(&self.label, &self.selector).await?.sandboxes)
    }
}

/// Names, labels or both: the union of what they mean.
#[derive(Debug, Args)]
pub struct SelectionArgs {
    /// Names of sandboxes
    #[arg(value_name = "NAME", required_unless_present_any = ["label", "selector"])]
    pub names: Vec<String>,
    /// Also these.
    #[command(flatten)]
    pub filter: FilterArgs,
    /// Only print which sandboxes are meant
    #[arg(long)]
    pub dry_run: bool,
    /// Do nothing unless exactly this many sandboxes are meant
    #[arg(long, value_name = "COUNT")]
    pub expect: Option<usize>,
}

/// A sandbox after an operation.
#[derive(Debug, Serialize)]
struct Done {
    name: SandboxName,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<&'static str>,
}

impl SelectionArgs {
    /// The sandboxes that are meant: names in their order, then those the labels match, each once.
    ///
    /// # Errors
    /// `invalid_name`, `invalid_label`, `invalid_config` for an empty selection.
    pub async fn resolve(&self, client: &Client, context: &Context) -> Result<Vec<SandboxName>, Failure> {
        // Everything is checked before anything is done.
        let mut names = Vec::new();
        for text in &self.names {
            let name = parse::name(text)?;
            if !names.contains(&name) {
                names.push(name);
            }
        }
        self.filter.check_narrow()?;
        if !self.filter.is_empty() {
            let matched = self.filter.list(client).await?;
            if matched.is_empty() {
                let terms: Vec<_> = self.filter.label.iter().chain(&self.filter.selector).cloned().collect();
                context.printer.warning(&format!("no sandbox has the label {}", terms.join(" and ")));
            }
            for summary in matched {
                if !names.contains(&summary.name) {
                    names.push(summary.name);
                }
            }
        } else if names.is_empty() {
            return Err(invalid("name a sandbox, or choose some with --label or --selector"));
        }
        if let Some(expected) = self.expect.filter(|expected| *expected != names.len()) {
            let message = format!("{} sandboxes are meant, {expected} were expected; nothing was done", names.len());
            let error = ApiError::new(ErrorCode::SelectionUnexpected, message);
            return Err(error.with_details(names.iter().take(20).map(ToString::to_string)).into());
        }
        Ok(names)
    }
}

/// Does something to each sandbox that is meant, or with `--dry-run` only prints which ones those are.
///
/// # Errors
/// Those of [`SelectionArgs::resolve`] and of writing.
pub async fn each_selected<F>(
    selection: &SelectionArgs,
    client: &Client,
    context: &Context,
    what: &str,
    operation: F,
) -> Result<ExitStatus, Failure>
where
    F: AsyncFnMut(&SandboxName) -> Result<Option<SandboxDetail>, Error>,
{
    let names = selection.resolve(client, context).await?;
    if !selection.dry_run {
        return each(names, context, what, operation).await;
    }
    context.printer.note(&format!("dry run: {what} would happen to these"));
    each(names, context, what, async |_| Ok(None)).await
}

/// Does something to each sandbox and prints its name (in JSON: its name and state). A failure is told at once and makes the exit
/// code 1; the others still have their turn.
///
/// # Errors
/// Only those of writing.
pub async fn each<F>(
    names: Vec<SandboxName>,
    context: &Context,
    what: &str,
    mut operation: F,
) -> Result<ExitStatus, Failure>
where
    F: AsyncFnMut(&SandboxName) -> Result<Option<SandboxDetail>, Error>,
{
    let mut done = Vec::new();
    let mut failed = false;
    for name in names {
        let progress = context.printer.spinner(&format!("{what} {name}"));
        let result = operation(&name).await;
        drop(progress);
        match result {
            Ok(detail) => {
                if !context.printer.is_json() {
                    context.printer.text(name.as_str())?;
                }
                done.push(Done { name, status: detail.map(|detail| detail.summary.status.as_str()) });
            }
            Err(error) => {
                context.printer.error(error.api());
                failed = true;
            }
        }
    }
    if context.printer.is_json() {
        context.printer.json(&done)?;
    }
    Ok(if failed { ExitStatus::FAILURE } else { ExitStatus::SUCCESS })
}
