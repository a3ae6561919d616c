//! `msb image prune`: removes what nothing needs, after saying what that is.

use clap::Args;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::images::{PruneReport, PruneRequest};
use msb_protocol::quantity::{parse_bytes, show_bytes};

use crate::context::Context;
use crate::failure::{ExitStatus, Failure};
use crate::printer::plain;
use crate::{parse, terminal};

/// Options of `image prune`.
#[derive(Debug, Args)]
pub struct PruneArgs {
    /// Do not ask
    #[arg(short, long, visible_short_alias = 'f', visible_alias = "force")]
    pub yes: bool,
    /// Only show what would go
    #[arg(long)]
    pub dry_run: bool,
    /// Pinned images too
    #[arg(short, long)]
    pub all: bool,
    /// Only images neither loaded nor used for this time, as in 7d
    #[arg(long, value_name = "TIME", value_parser = parse::duration_ms)]
    pub older_than: Option<u64>,
    /// Stop when what stays is no larger than this; the longest unused go first
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub keep_size: Option<u64>,
    /// Only images with this label: label=KEY[=VALUE]
    #[arg(long, value_name = "label=KEY[=VALUE]", value_parser = label_filter)]
    pub filter: Vec<String>,
}

fn size(text: &str) -> Result<u64, String> {
    parse_bytes(text).map_err(|error| error.to_string())
}

fn label_filter(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some(("label", term)) if !term.is_empty() && !term.starts_with('=') => Ok(term.to_owned()),
        _ => Err("write it as label=KEY or label=KEY=VALUE".into()),
    }
}

/// `image prune`.
///
/// # Errors
/// `invalid_config` where nobody can be asked and `--yes` is missing.
pub async fn run(args: PruneArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let request = PruneRequest {
        dry_run: true,
        all: args.all,
        older_than_ms: args.older_than,
        keep_bytes: args.keep_size,
        labels: args.filter,
    };
    if !args.yes && !args.dry_run && !terminal::stdin_is_terminal() {
        let error = ApiError::new(ErrorCode::InvalidConfig, "nobody can be asked here; use --yes to prune images")
            .with_hint("--dry-run shows what would go");
        return Err(error.into());
    }
    let client = context.client().await?;
    let report = if args.yes {
        client.prune_images(&PruneRequest { dry_run: false, ..request }).await?
    } else {
        let plan = client.prune_images(&request).await?;
        let nothing = plan.images.is_empty() && plan.bytes_reclaimed == 0;
        if args.dry_run || nothing {
            plan
        } else {
            context.printer.raw_error(&render(&plan));
            if !terminal::agreed("Remove them?")? {
                context.printer.note("Nothing was removed.");
                return Ok(ExitStatus::FAILURE);
            }
            client.prune_images(&PruneRequest { dry_run: false, ..request }).await?
        }
    };
    if context.printer.is_json() {
        context.printer.json(&report)?;
    } else {
        context.printer.text(&render(&report))?;
    }
    Ok(ExitStatus::SUCCESS)
}

fn render(report: &PruneReport) -> String {
    if report.images.is_empty() && report.bytes_reclaimed == 0 {
        return "Nothing to prune.\n".into();
    }
    let mut text = String::new();
    for image in &report.images {
        let names = if image.references.is_empty() { "<no name>".to_owned() } else { image.references.join(", ") };
        text.push_str(&format!("{}  {}\n", super::image::short_digest(&image.digest), plain(&names)));
    }
    let verb = if report.dry_run { "Would free" } else { "Freed" };
    text.push_str(&format!(
        "{verb} {} ({} images, {} layers)\n",
        show_bytes(report.bytes_reclaimed),
        report.manifests_removed,
        report.layers_removed
    ));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_labels() {
        assert_eq!(label_filter("label=a=b"), Ok("a=b".into()));
        assert_eq!(label_filter("label=a"), Ok("a".into()));
        for bad in ["", "label", "label=", "label==b", "until=3h", "a=b"] {
            assert!(label_filter(bad).is_err(), "{bad}");
        }
    }
}
